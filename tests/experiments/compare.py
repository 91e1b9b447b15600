"""Every comparison of the README and of RESULTS.md, each with one command, such as
python tests/experiments/compare.py toy --seeds=10: a table and a figure.

    compare.py defaults         # every task as it is: the table of the README
    compare.py toy --seeds=10   # the default run of the front page
    compare.py replay           # the toy: every method, with and without replay
    compare.py parts            # the toy: the learner without each of its parts
    compare.py ehrlich          # the learner, without two of its parts, and wdce with exploration
    compare.py arithmetic       # every method on prompts never seen
    compare.py dna              # every method on the dna task
    compare.py beta             # dna: oracle and truth for several KL weights
    compare.py corrector        # the toy: its moves in training, and at sampling alone
    compare.py uniform          # the toy on the chain of random letters

All variants of a seed start from one pre-trained model, if they do not change pre-training. Runs
that --out holds already are kept: delete them if the code has changed. The figure goes to
assets/<what>.png, if there are variants to compare.
"""
import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch
from matplotlib import rcParams
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import sample  # noqa: E402
import sepo  # noqa: E402
from diffusion import Absorbing  # noqa: E402
from exact import corrected_law, rank  # noqa: E402
from rewards import TASKS, RewardLog  # noqa: E402

TOY = ["--task=toy", "--report_samples=0", "--eval_every=2"]
ARITHMETIC = ["--task=arithmetic", "--report_samples=0"]
DNA = ["--task=dna", "--report_samples=500"]
EHRLICH = ["--task=ehrlich", "--report_samples=0", "--eval_every=2"]
ONCE = ["--replay=0", "--group=128", "--iters=40"]          # every sample is used in one rollout
ONCE_SEPO = [*ONCE, "--updates=16", "--path_events=1"]
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 11, "savefig.dpi": 110,
         "figure.constrained_layout.use": True}             # of all figures of tests/
LABELS = {"kl": "KL of the paths, nats", "reward": "oracle"}
LOOP, PRDP, REINFORCE = ["--algo=loop"], ["--algo=prdp"], ["--algo=reinforce"]
UNTRAINED = ["--pretrain_iters=50"]     # so that the model's conditionals agree with nothing
SHOWN = [("arithmetic", "held_out_reward"), ("text", "reward"), ("ehrlich", "reward"),
         ("ehrlich", "best")]               # of the default runs
MARKS, MOVES = (128, 256, 512, 1024, 2560, 5120), (0, 8, 32, 128)

PARTS = {                   # of the learner; a flag that is Python is run before train.py
    "all": [], "without denoising": ["--denoise=0"],
    "without contrast": ["import sepo; real = sepo.remembered; "
                         "sepo.remembered = lambda past, seen, far: real(past, seen, 0.0)"],
    "without contrast and denoising": ["import sepo; sepo.distance = lambda *_: 0.0"],
    "without fading": ["import sepo; sepo.distance = lambda *_: 1.0"],
    "AdamW in place of Muon": ["import torch, train; train.make_optimizers = lambda model, decay=0:"
                               "[torch.optim.AdamW(model.parameters(), weight_decay=decay)]"],
}
COMPARISONS = {             # name: (flags of all runs, the column to compare, {variant: its flags})
    "defaults": ([], "reward", {
        task: [f"--task={task}"] for task in ("toy", "arithmetic", "dna", "text", "ehrlich")}),
    "toy": (TOY, "share_of_optimum", {"sepo": []}),
    "replay": (TOY, "share_of_optimum", {
        "sepo": [], "loop": LOOP, "prdp": PRDP, "wdce": ["--algo=wdce", "--explore=0"],
        "sepo, no replay": ONCE_SEPO, "sepo, cap, no replay":
            [*ONCE, "--updates=4", "--path_events=1", "--clip_mode=cap"],
        "loop, no replay": [*ONCE, *LOOP, "--updates=8"],
        "prdp, no replay": [*ONCE, *PRDP, "--updates=8"], "reinforce": [*ONCE, *REINFORCE]}),
    "arithmetic": (ARITHMETIC, "held_out_reward", {
        "sepo": [], "loop": LOOP, "prdp": [*PRDP, "--lr=1e-3"],
        "sepo, no replay": ["--replay=0", "--updates=16", "--path_events=1"]}),
    "dna": (DNA, "true activity", {
        "sepo": [], "loop": LOOP, "prdp": PRDP, "reinforce": REINFORCE,
        "sepo, no replay": [*ONCE_SEPO, "--iters=15"]}),
    "beta": (DNA, "true activity", {
        f"beta {beta}": [f"--beta={beta}"] for beta in (0, 0.03, 0.1, 0.3)}),
    "parts": (TOY, "share_of_optimum", PARTS),
    "ehrlich": (EHRLICH, "reward", {
        "sepo": [], "without contrast": PARTS["without contrast"],
        "AdamW in place of Muon": PARTS["AdamW in place of Muon"],
        "wdce, explore": ["--algo=wdce"]}),
    "corrector": (TOY, "share_of_optimum", {
        f"{name}{n} moves": [f"--corrector_steps={n}", *flags]
        for name, flags in (("", []), ("50 steps of pre-training, ", UNTRAINED)) for n in MOVES}),
    "uniform": (TOY, "share_of_optimum", {"uniform": ["--process=uniform"]}),
}


def folder_of(out, name, seed):
    return out / re.sub("[ ,()]+", "_", name) / str(seed)


def train(folder, *flags):
    """One run in a process of its own, on one core, unless the folder holds it already."""
    if not (folder / "finetuned.pt").exists():
        patches = [flag for flag in flags if flag.startswith("import")]
        flags = [flag for flag in flags if not flag.startswith("import")]
        command = [sys.executable, "-c", "\n".join([*patches, "import train; train.main()"]),
                   f"--out={folder.resolve()}", "--overwrite", *flags]
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(" ".join(command))
        (folder / "cpu_seconds").write_text(str(usage.ru_utime))
    return folder


def pretrained(out, task, seed):
    """The pre-trained model that all variants of a seed start from; task: the flag --task=..."""
    folder = out / task.split("=")[1] / str(seed)
    train(folder, task, f"--seed={seed}", "--iters=1", "--report_samples=0")
    return folder / "pretrained.pt"


def run(out, name, seed, key):
    """-> the metrics of every evaluation of the run of one variant and seed."""
    common, _, variants = COMPARISONS[out.name]
    flags = [*common, *variants[name]]
    folder = folder_of(out, name, seed)
    if not any(flag.startswith(("--pretrain", "--process")) for flag in flags):
        flags.append(f"--init={pretrained(out.parent, flags[0], seed)}")
    train(folder, *flags, f"--seed={seed}")
    lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    lines = [line for line in lines if key in line and line["phase"] == "finetune"]
    lines[-1]["cpu"] = float((folder / "cpu_seconds").read_text())
    print(f"{out.name}: {name}, seed {seed}: {lines[-1][key]:.3f}", file=sys.stderr, flush=True)
    return lines


def span(values):
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"


def table(runs, key, marks):
    """Markdown: the column after so many queries, at the end for every seed, and what a run queried
    and took."""
    heads = [f"at {mark:,}" for mark in marks]
    heads += ["at the end, every seed", "median", "queries", "CPU seconds"]
    heads += ["queries until 0.99"] * (key == "share_of_optimum")
    rows = [f"| | {' | '.join(heads)} |", "|" + " --- |" * (len(heads) + 1)]
    for name, seeds in runs.items():
        cells = []
        for mark in marks:
            last = [[line[key] for line in lines if line["queries"] <= mark] for lines in seeds]
            is_past = all(lines[-1]["queries"] < 0.9 * mark for lines in seeds)
            cells.append("" if is_past or not all(last) else span([found[-1] for found in last]))
        ends = [lines[-1][key] for lines in seeds]
        cells.append(", ".join(f"{end:.3f}" for end in ends))
        cells.append(f"{statistics.median(ends):.3f}")
        cells.append(f"{statistics.median(lines[-1]['queries'] for lines in seeds):,.0f}")
        cells.append(f"{statistics.median(lines[-1]['cpu'] for lines in seeds):.0f}")
        if key == "share_of_optimum":
            until = [min((line["queries"] for line in lines if line[key] >= 0.99), default=math.inf)
                     for lines in seeds]
            cells.append(", ".join(f"{n:.0f}".replace("inf", "-") for n in until))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def figure(runs, panels, file):
    """A panel per (x, y): median over the seeds and the range of y; against the KL, every seed."""
    rcParams.update(STYLE)
    drawing = Figure(figsize=(11, 4))
    axes = drawing.subplots(1, len(panels), squeeze=False)[0]
    for axis, (x, y) in zip(axes, panels):
        for i, (name, seeds) in enumerate(runs.items()):
            if x == "kl":
                for lines in seeds:
                    axis.plot([line[x] for line in lines], [line[y] for line in lines], ".-",
                              color=f"C{i}", label=name if lines is seeds[0] else None, ms=4)
                continue
            xs, ys = (list(zip(*[[line[key] for line in lines] for lines in seeds]))
                      for key in (x, y))
            line, = axis.plot([statistics.median(v) for v in xs],
                              [statistics.median(v) for v in ys], label=name, marker=".")
            axis.fill_between([statistics.median(v) for v in xs], [min(v) for v in ys],
                              [max(v) for v in ys], alpha=0.15, color=line.get_color())
        shown = "every seed" if x == "kl" else "median and range"
        axis.set_xlabel(f"{LABELS.get(x, x)} (seeds: {len(seeds)}; {shown})")
        axis.set_ylabel(LABELS.get(y, y.replace("_", " ")))
        if y == "share_of_optimum":
            axis.set_ylim(0, 1.03)
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:,.0f}")
    drawing.legend(*axes[0].get_legend_handles_labels(), loc="outside right")
    drawing.savefig(file)


def reward_of(task, log=None):
    """-> a function: tokens [n, L] -> rewards, float64 [n]; a log counts the queries."""
    log = log or RewardLog()
    return lambda tokens: log.query(task.reward, task.strings(tokens))


class Known:
    """A process whose models are their distributions."""
    vocab_size = 4

    def exact_law(self, law, length):
        return law


def corrected_samples(out, seeds):
    """Moves at sampling alone, after runs without the corrector: the share of the optimum of the
    fine-tuned model, and the cross-entropy of the data, nats, of the pre-trained one."""
    task, process = TASKS["toy"](), Absorbing(4)
    x = rank(task.draw(50_000, torch.Generator().manual_seed(0)), 4)
    print("\n| at sampling alone | " + " | ".join(f"{n} moves" for n in MOVES) + " |")
    print("| --- " * 5 + "|")
    for name in ("0 moves", "50 steps of pre-training, 0 moves"):
        shares, losses = [], []
        for seed in seeds:
            models = [sample.load_model(folder_of(out, name, seed) / f"{which}.pt")[0]
                      for which in ("pretrained", "finetuned")]
            laws = [process.exact_law(model, task.length).detach() for model in models]
            before, after = (corrected_law(process, model, law, 0.5, MOVES)
                             for model, law in zip(models, laws))
            share = sepo.ground_truth(Known(), laws[0], reward_of(task), task.length, beta=0.1)
            shares.append([share(law)["share_of_optimum"] for law in after])
            losses.append([-law[x].log().mean().item() for law in before])
        for what, rows in (("share of the optimum", shares), ("cross-entropy of the data", losses)):
            cells = (", ".join(f"{value:.3f}" for value in values) for values in zip(*rows))
            print(f"| {name.replace('0 moves', '')}{what} | " + " | ".join(cells) + " |")


def median_and_range(values):
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, middle, high = (f"{v:.2f}" for v in (min(known), statistics.median(known), max(known)))
    return middle if low == high else f"{middle} ({low} to {high})"


def reports_of(out, name, seeds):
    return [json.loads((folder_of(out, name, s) / "report.json").read_text()) for s in seeds]


def report_table(out, names, seeds):
    """dna: the fine-tuned rows of report.json, median over the seeds; the first rows are shared."""
    reports = {name: reports_of(out, name, seeds) for name in names}
    shared = ("data", "pre-trained", "best of 16")
    rows = {row: [r[row] for r in reports[names[0]]] for row in shared}
    rows |= {name: [r["fine-tuned"] for r in reports[name]] for name in names}
    columns = [c for c in rows["pre-trained"][0] if c not in ("n", "error")]
    lines = ["| | " + " | ".join(columns) + " |", "|" + " --- |" * (len(columns) + 1)]
    for name, found in rows.items():
        cells = [median_and_range([row[c] for row in found]) for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@torch.no_grad()
def field_table(out, names, seeds, n=500):
    """dna: what the KL protects, in the field's own measures (DRAKES, 2410.13643): how the counts
    of 3-mers correlate with those of the data, and log p_ref of the samples' paths, nats."""
    def count(tokens):
        words = tokens.unfold(1, 3, 1) @ torch.tensor([16, 4, 1])                       # [n, L - 2]
        return words.flatten().bincount(minlength=64).double()

    found = {name: ([], []) for name in ("pre-trained", *names)}
    for seed, name in product(seeds, found):
        folder = folder_of(out, names[0] if name == "pre-trained" else name, seed)
        reference, saved = sample.load_model(folder / "pretrained.pt")
        which = "pretrained" if name == "pre-trained" else "finetuned"
        process, task = Absorbing(4, saved["flags"]["steps"]), TASKS["dna"]()
        torch.manual_seed(seed)
        tokens, path = process.sample(sample.load_model(folder / f"{which}.pt")[0], n, task.length)
        data, _ = task.split(5000, seed)
        correlation = torch.corrcoef(torch.stack((count(tokens), count(data))))[0, 1].item()
        log_ref = path.per_sequence(process.logp(reference, path)).mean().item()
        for column, value in zip(found[name], (correlation, log_ref)):
            column.append(value)
    lines = ["| | correlation of 3-mers | log p_ref, nats |", "|" + " --- |" * 3]
    lines += [f"| {name} | " + " | ".join(map(median_and_range, columns)) + " |"
              for name, columns in found.items()]
    return "\n".join(lines)


def objective_table(out, names, seeds, beta=0.1, marks=(160, 320, 640, 1280)):
    """dna: J = reward - beta KL of the rollouts, a mean of nine of them around so many rewards."""
    heads = [f"J at {mark:,}" for mark in marks]
    lines = [f"| | {' | '.join(heads)} |", "|" + " --- |" * (len(heads) + 1)]
    for name in names:
        found = {mark: [] for mark in marks}
        for seed in seeds:
            rows = map(json.loads, open(folder_of(out, name, seed) / "metrics.jsonl"))
            rows = [row for row in rows if row["phase"] == "finetune"]
            for mark, values in found.items():
                i = next((i for i, row in enumerate(rows) if row["queries"] >= mark), len(rows))
                near = rows[max(0, i - 4):i + 5]
                values.append(statistics.mean(row["reward"] - beta * row["kl"] for row in near))
        cells = (", ".join(f"{value:.3f}" for value in values) for values in found.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def task_table(out, names, seeds):
    """The reward of the data, and of samples before and after, with the KL that this cost."""
    rows = ("data", "pre-trained", "best of 16", "fine-tuned")
    lines = ["| task | " + " | ".join(rows) + " | KL, nats |", "|" + " --- |" * 6]
    for name in names:
        reports = reports_of(out, name, seeds)
        cells = [median_and_range([report[row]["reward"] for report in reports]) for row in rows]
        cells.append(median_and_range([report["fine-tuned"]["kl"] for report in reports]))
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(COMPARISONS), help="the comparison")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, ... (default: 5)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "compare", help="folder of runs")
    parser.add_argument("--picture", type=Path, help="the figure (default: assets/<what>.png)")
    args = parser.parse_args()
    flags, key, variants = COMPARISONS[args.what]
    out, seeds, names = args.out / args.what, range(args.seeds), list(variants)
    tasks = {[*flags, *variants[name]][0] for name in names}
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: pretrained(args.out, *job), product(sorted(tasks), seeds)))
        runs = {name: [pool.submit(run, out, name, seed, key) for seed in seeds] for name in names}
        runs = {name: [future.result() for future in futures] for name, futures in runs.items()}
    if args.what == "defaults":
        print(task_table(out, names, seeds))
        for name, key in SHOWN:
            lines = [[line for line in of_seed if key in line] for of_seed in runs[name]]
            print("\n" + key.replace("_", " "), table({name: lines}, key, MARKS), sep="\n\n")
        return print("\n" + objective_table(out, ["dna"], seeds))
    print(table(runs, key, MARKS))
    if args.what == "ehrlich":
        print("\n" + table(runs, "best", MARKS))
    if args.what == "corrector":
        corrected_samples(out, seeds)
    if flags == DNA:
        print("\n" + report_table(out, names, seeds))
        print("\n" + field_table(out, names, seeds))
    if args.what == "dna":
        print("\n" + objective_table(out, names, seeds))
    panels = [("queries", key)]
    if args.what == "beta":                             # over-optimization
        panels = [("kl", "reward"), ("kl", key)]
    if len(names) > 1:
        figure(runs, panels, args.picture or ROOT / "assets" / f"{args.what}.png")


if __name__ == "__main__":
    main()
