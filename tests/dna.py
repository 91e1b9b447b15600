"""The dna task, every method from one pre-trained model: a table of their reports, and a figure.

    python tests/dna.py                                # the default size, seed 0, two runs at a time
    python tests/dna.py --length=200 --steps=128 ...   # further flags go to every run of train.py, pre-training included

Write flags as --name=value. Runs that --out holds already are not repeated: delete it first if flags have changed.
The reward is an oracle that has seen noisy measurements; the truth, which no run sees, is in the table beside it.
"""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "sepo, path": [],
    "sepo, noised, consistency 0.3": ["--states=noised", "--consistency=0.3"],
    "sepo, terminal": ["--states=terminal"],
    "sepo, path, corrector": ["--corrector_steps=20"],
    "sepo, path, no KL": ["--beta=0"],
    "loop": ["--algo=loop", "--updates=4", "--path_events=5"],     # all 20 events in 8 updates would cost 7 times as much
    "prdp": ["--algo=prdp", "--updates=1"],
}


def train(folder, *flags, threads=1):
    if (folder / "report.json").exists():              # of an earlier call
        return json.loads((folder / "report.json").read_text())
    subprocess.run([sys.executable, "train.py", "--task=dna", f"--out={folder.resolve()}", "--overwrite", *flags], cwd=ROOT,
                   check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, stdout=subprocess.DEVNULL)
    print(f"{folder.name}: done", file=sys.stderr, flush=True)
    return json.loads((folder / "report.json").read_text())


def watched(folder):
    """-> queries, true activities and oracle rewards (medians of a rollout) as the run went by."""
    lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    return list(zip(*[(line["queries"], line["watch"]["true activity (median)"], line["watch"]["oracle (median)"])
                      for line in lines if "watch" in line]))


def figure(out, rows, picture):
    """Left: the truth over the rewards asked; right: the truth against the oracle at the end, where hacking shows."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    drawing, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for name in VARIANTS:
        queries, truth, _ = watched(out / name)
        line, = left.plot(queries, truth, label=name)
        right.plot(rows[name]["oracle (median)"], rows[name]["true activity (median)"], "o", color=line.get_color())
    for name, row in rows.items():
        if name not in VARIANTS:
            right.plot(row["oracle (median)"], row["true activity (median)"], "ks", ms=4)
            right.annotate(name, (row["oracle (median)"], row["true activity (median)"]), fontsize=7, xytext=(4, -8),
                           textcoords="offset points")
    top = max(row["oracle (median)"] for row in rows.values())
    right.plot([0, top], [0, top], "k:", lw=1)
    left.set(xlabel="reward queries", ylabel="true activity (median of a rollout)")
    right.set(xlabel="oracle (median of 1000)", ylabel="true activity (median of 1000)")
    left.legend(fontsize=7)
    drawing.tight_layout()
    drawing.savefig(picture, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("out/compare_dna"), help="folder of the runs")
    parser.add_argument("--picture", type=Path, help="the figure (default: <out>/dna.png)")
    parser.add_argument("--init", type=Path, help="a pre-trained model (default: pre-train one)")
    args, flags = parser.parse_known_args()
    init = args.init or args.out / "start" / "pretrained.pt"
    if not args.init:
        train(args.out / "start", *flags, "--iters=1", "--updates=1", "--group=8", threads=os.cpu_count())
    sizes = ("--length", "--n_", "--conv", "--pretrain")       # of the model, which --init brings
    rest = [flag for flag in flags if not flag.startswith(sizes)]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {name: pool.submit(train, args.out / name, *rest, f"--init={init.resolve()}", *own) for name, own in
                VARIANTS.items()}
    reports = {name: run.result() for name, run in runs.items()}
    rows = {name: row for name, row in reports["sepo, path"].items() if name != "fine-tuned"}
    rows |= {name: report["fine-tuned"] for name, report in reports.items()}
    columns = list(rows["data"])
    print("| | " + " | ".join(columns) + " |\n|" + " --- |" * (len(columns) + 1))
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join("" if row[c] is None else f"{row[c]:.3g}" for c in columns) + " |")
    figure(args.out, rows, args.picture or args.out / "dna.png")


if __name__ == "__main__":
    main()
