"""The toy, every method or every --states, several seeds: one figure and one table.

    python tests/compare.py                            # the four methods x 5 seeds; about 25 minutes on two cores
    python tests/compare.py --what=states              # where to take the score; about 15 minutes
    python tests/compare.py --picture=assets/algos.png --seeds=5 --jobs=2

The figure shows the share of the optimum (median, range over the seeds) against rewards asked and against states through the
network, a backward pass counting two: a black box that costs hours asks for the first, a network that does, for the second.
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
    "algos": {"sepo": [], "loop": ["--algo=loop"], "prdp": ["--algo=prdp"], "reinforce": ["--algo=reinforce"]},
    "states": {
        "path": ["--updates=16"],
        "noised": ["--updates=16", "--states=noised"],
        "noised, consistency 0.3": ["--updates=16", "--states=noised", "--consistency=0.3"],
        "terminal": ["--updates=16", "--states=terminal"],
    },
}


def run(out, variant, flags, seed):
    """One fine-tuning in a process of its own, on one core -> its lines with an exact evaluation."""
    folder = out / variant.replace(", ", "_").replace(" ", "_") / str(seed)
    command = ["train.py", "--task=toy", f"--seed={seed}", f"--out={folder.resolve()}", "--overwrite", "--eval_every=5"]
    subprocess.run([sys.executable, *command, *flags], cwd=ROOT, check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    lines = [line for line in lines if "share_of_optimum" in line]
    print(f"{variant}, seed {seed}: {lines[-1]['share_of_optimum']:.3f}", file=sys.stderr, flush=True)
    return lines


def row(name, seeds):
    """A line of the table: shares at three counts of queries and one of states, queries to 0.95, shares at the end."""
    def spread(x, most):
        values = [max((e for e in lines if e[x] <= most), key=lambda e: e[x])["share_of_optimum"] for lines in seeds]
        return f"{min(values):.2f} to {max(values):.2f}"
    at = [spread("queries", q) for q in (5000, 10000, 20000)] + [spread("passes", 10 ** 6)]
    first = [next((x["queries"] for x in lines if x["share_of_optimum"] >= 0.95), None) for lines in seeds]
    reached = f"{min(first):,} to {max(first):,}" if None not in first else \
        f"{sum(q is not None for q in first)} of {len(first)} seeds"
    ends = ", ".join(f"{lines[-1]['share_of_optimum']:.3f}" for lines in seeds)
    return f"| `{name}` | {' | '.join(at)} | {reached} | {ends} | {seeds[0][-1]['passes'] / 1e6:.1f} |"


def figure(runs, picture):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    drawing, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, x, label in zip(axes, ("queries", "passes"), ("rewards asked", "states through the network")):
        for name, seeds in runs.items():
            zero = [0] if x == "queries" else []       # the other axis is logarithmic
            curves = [zero + [line["share_of_optimum"] for line in lines] for lines in seeds]
            grid = zero + [line[x] for line in seeds[0]]
            line, = axis.plot(grid, [statistics.median(c) for c in zip(*curves)], label=name)
            low, high = ([pick(c) for c in zip(*curves)] for pick in (min, max))
            axis.fill_between(grid, low, high, alpha=0.2, color=line.get_color())
        axis.axhline(1, color="tab:green", ls="--", lw=1)
        axis.axhline(0, color="tab:red", ls=":", lw=1)
        axis.set(xlabel=label)
    axes[1].set(xscale="log")
    axes[0].set(ylabel=f"share of the optimum ({len(seeds)} seeds)")
    axes[0].legend(loc="lower right")
    drawing.tight_layout()
    drawing.savefig(picture, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=list(VARIANTS), default="algos", help="what to compare (default: algos)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, ... (default: 5)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")
    parser.add_argument("--out", type=Path, default=Path("out/compare"), help="folder of the runs (default: out/compare)")
    parser.add_argument("--picture", type=Path, help="the figure (default: <out>/<what>.png)")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {name: [pool.submit(run, args.out, name, flags, seed) for seed in range(args.seeds)]
                for name, flags in VARIANTS[args.what].items()}
        runs = {name: [f.result() for f in futures] for name, futures in runs.items()}
    print("| | at 5,000 queries | at 10,000 | at 20,000 | at a million states | queries to 0.95 | at the end, every seed "
          "| million states |\n|"
          + " --- |" * 8)
    for name, seeds in runs.items():
        print(row(name, seeds))
    figure(runs, args.picture or args.out / f"{args.what}.png")


if __name__ == "__main__":
    main()
