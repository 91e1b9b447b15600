"""Where to take the score: the toy with every --states, several seeds, one figure and one table.

    python tests/compare.py                            # 4 variants x 5 seeds, two at a time; about 15 minutes on two cores
    python tests/compare.py --picture=assets/states.png --seeds=5 --jobs=2
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "path": ["--states=path"],
    "noised": ["--states=noised"],
    "noised, consistency 0.3": ["--states=noised", "--consistency=0.3"],
    "terminal": ["--states=terminal"],
}


def run(out, variant, seed):
    """One fine-tuning in a process of its own, on one core -> its lines with an exact evaluation."""
    folder = out / variant.replace(", ", "_").replace(" ", "_") / str(seed)
    command = ["train.py", "--task=toy", f"--seed={seed}", f"--out={folder.resolve()}", "--overwrite", *VARIANTS[variant]]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    lines = [line for line in lines if "share_of_optimum" in line]
    print(f"{variant}, seed {seed}: {lines[-1]['share_of_optimum']:.3f}", file=sys.stderr, flush=True)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, ... (default: 5)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")
    parser.add_argument("--out", type=Path, default=Path("out/compare"), help="folder of the runs (default: out/compare)")
    parser.add_argument("--picture", type=Path, default=Path("out/compare/states.png"), help="the figure")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {v: [pool.submit(run, args.out, v, s) for s in range(args.seeds)] for v in VARIANTS}
        runs = {v: [f.result() for f in futures] for v, futures in runs.items()}

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(7, 4))
    print("| states | at 6,400 queries | at 12,800 | at the end, every seed |\n| --- | --- | --- | --- |")
    for name, seeds in runs.items():
        queries = [0] + [line["queries"] for line in seeds[0]]
        curves = [[0] + [line["share_of_optimum"] for line in lines] for lines in seeds]
        line, = axis.plot(queries, [statistics.median(c) for c in zip(*curves)], label=name)
        low, high = ([pick(c) for c in zip(*curves)] for pick in (min, max))
        axis.fill_between(queries, low, high, alpha=0.2, color=line.get_color())
        row = [min(range(len(queries)), key=lambda i: abs(queries[i] - q)) for q in (6400, 12800)]
        spread = [f"{min(c[i] for c in curves):.2f} to {max(c[i] for c in curves):.2f}" for i in row]
        print(f"| `{name}` | {spread[0]} | {spread[1]} | {', '.join(f'{c[-1]:.3f}' for c in curves)} |")
    axis.axhline(1, color="tab:green", ls="--", lw=1)
    axis.axhline(0, color="tab:red", ls=":", lw=1)
    axis.set(xlabel="reward queries", ylabel=f"share of the optimum (median, range of {args.seeds} seeds)")
    axis.legend(loc="lower left")
    figure.tight_layout()
    figure.savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()
