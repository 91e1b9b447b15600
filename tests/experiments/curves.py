"""What the estimators of estimators.py do: by enumeration, and in training.

    python tests/experiments/curves.py table                    # bias, noise, cost: half a minute
    python tests/experiments/curves.py learn --seeds=5          # what each learns on the toy
    python tests/experiments/curves.py learn --task=arithmetic  # and on prompts never seen
"""
import argparse
import json
import random
import statistics
import sys
from copy import deepcopy
from pathlib import Path

import torch
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import compare  # noqa: E402
import sample  # noqa: E402
import sepo  # noqa: E402
from diffusion import Absorbing  # noqa: E402
from estimators import (ESTIMATORS, Entries, all_masked, as_in_its_code,  # noqa: E402
                        expected_gradient, left_to_right, moved, pretrained, published,
                        random_path)
from exact import Table, gradient, posterior_table, random_law  # noqa: E402
from rewards import TASKS  # noqa: E402

# -----------------------------------------------------------------------------
# their expected gradients


def cosine(a, b):
    return torch.cosine_similarity(a, b, dim=0).item()


def table(L=3, V=3):
    """Per estimator the cosine of its expected gradient with grad E[R], and in brackets its noise:
    the standard deviation of the gradient of one sample, divided by the norm of the mean."""
    process = Absorbing(V)
    reward = torch.randn(V ** L, generator=torch.Generator().manual_seed(1))
    before = pretrained(process, L, 0, reward)
    cases = {"random table": (Table(V, L),) * 2,
             "consistent table": (posterior_table(random_law(V, L), V, L),) * 2,
             "pre-trained": (before,) * 2,
             "after 50 rollouts": (pretrained(process, L, 50, reward),) * 2,
             "off policy": (before, moved(deepcopy(before), process, L, reward))}
    cells, points = {name: [f"{e.passes(L)}"] for name, e in ESTIMATORS.items()}, {}
    others = {"SEPO as published, exact p(y)": lambda *a: published(*a, 0),
              "SEPO as published": lambda *a: published(*a, 300),
              "SEPO as its code has it": as_in_its_code}
    cells |= {name: [f"{L * V * k}"] for name, k in zip(others, (1, 3, 3))}
    for old, new in cases.values():
        truth = gradient((process.exact_law(new, L) * reward).sum(), new).float()
        entries = Entries(process, new, L)
        for name, estimator in ESTIMATORS.items():
            mean, noise = expected_gradient(process, entries, old, L, reward, estimator)
            cells[name].append(f"{cosine(mean, truth):.3f} ({noise:.1f})")
            if new is before:
                points[name] = estimator.passes(L) * noise ** 2, cosine(mean, truth)
                scale = mean.norm() / truth.norm()
                cells[name][0] += f" | {scale:.2f}"
        for name, of in others.items():
            mean = of(process, new, L, reward).float() if new is old else None
            cells[name].append("" if mean is None else f"{cosine(mean, truth):.3f}")
            if new is before:
                cells[name][0] += f" | {mean.norm() / truth.norm():.2f}"
    print("| estimator | passes | scale | " + " | ".join(cases) + " |")
    print("|" + " --- |" * (3 + len(cases)))
    for name, row in cells.items():
        print(f"| {name} | " + " | ".join(row) + " |")
    figure(points)


KINDS = {"C2": "visited states", "C0": "random masks of the sample",
         "C3": "all positions masked, or left to right"}


def color_of(name):
    """Of the kind of states that an estimator looks at."""
    kind = ESTIMATORS[name]
    is_far = kind.draws in (all_masked, left_to_right)
    return "C2" if kind.on_path else "C3" if is_far else "C0"


def panels_beside_names(n, names):
    """A figure of n panels, with a numbered list of estimators beside them -> figure, axes."""
    rcParams.update(compare.STYLE)
    drawing = Figure(figsize=(11, 5))
    *axes, beside = drawing.subplots(1, n + 1, width_ratios=[1] * n + [0.45 if n == 1 else 0.9])
    beside.axis("off")
    lines = [(f"{i}  {name}", color_of(name)) for i, name in enumerate(names, 1)]
    for i, (line, color) in enumerate([*lines, ("", "C0"), *((KINDS[c], c) for c in KINDS)]):
        beside.text(0, 1 - i / (len(names) + 4), line, color=color, fontsize=9, va="top")
    return drawing, axes


def figure(points):
    """assets/estimators.png: bias against cost on the pre-trained network."""
    ranked = sorted(points, key=lambda name: -points[name][1])
    drawing, (axis,) = panels_beside_names(1, ranked)
    near = {}                                           # points that lie together share a label
    for i, name in enumerate(ranked, 1):
        cost, value = points[name]
        axis.scatter(cost, value, color=color_of(name), s=25)
        near.setdefault((round(cost / 10), round(value / 0.012)), []).append((i, cost, value))
    for together in near.values():
        numbers = ", ".join(str(i) for i, _, _ in together)
        axis.annotate(f"  {numbers}", together[0][1:], va="center", fontsize=9)
    axis.set_xlabel("cost: passes until the noise is as large as the mean gradient")
    axis.set_ylabel("cosine with the true gradient")
    drawing.savefig(ROOT / "assets" / "estimators.png")

# -----------------------------------------------------------------------------
# what each of them learns

# per task: rollouts, prompts, samples per prompt, rollouts between evaluations; and the same tries
# for each estimator: updates per rollout, learning rate
TASK = {"toy": (40, 1, 64, 8, [(4, 1e-3), (8, 2e-3)]),
        "arithmetic": (20, 64, 4, 4, [(4, 6e-4)])}
BETA = 0.1


def learn(name, process, start, estimator, score, updates, lr, seed):
    """-> [(queries, passes with gradient, score of the model)] of a run."""
    task, (rollouts, P, G, every, _) = TASKS[name](), TASK[name]
    model, points = deepcopy(start).requires_grad_(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0)
    torch.manual_seed(seed)
    random.seed(seed)
    data, _ = task.split(20_000, seed)
    chance = torch.full((P, G), 1 / P / G)
    for i in range(rollouts):
        prompt = task.prompts(data[torch.randint(len(data), (P,))]).repeat_interleave(G, dim=0)
        tokens, path = process.sample(model, P * G, task.length, prompt)
        with torch.no_grad():
            kl = path.per_sequence(path.logp - process.logp(start, path)).view(P, G)
        reward = compare.reward_of(task)(tokens).view(P, G)
        A, more = sepo.advantages(reward - BETA * kl, "loo"), {}
        if estimator.is_tilted:
            A, more = (reward / BETA).float(), dict(kl=kl)
        for part in [random_path(process, model, tokens, path, estimator) for _ in range(updates)]:
            estimator.loss(process.logp(model, part), part, A, chance, **more).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = lr * (1 - i / rollouts)
            optimizer.step()
            optimizer.zero_grad()
        if i == 0 or (i + 1) % every == 0:
            queries, n = (i + 1) * P * G, int((prompt[0] == process.mask).sum())
            points.append((queries, queries * updates * estimator.passes(n), score(model)))
    return points


def score_of(task, process, start, seed):
    """-> a function of a model: its share of the optimum, or its reward on prompts never seen."""
    if not task.has_prompts:
        exact = sepo.ground_truth(process, start, compare.reward_of(task), task.length, BETA)
        return lambda model: exact(model)["share_of_optimum"]
    _, held = task.split(20_000, seed)
    prompts = task.prompts(held[:256])
    return lambda model: compare.reward_of(task)(process.sample(
        model, len(prompts), task.length, prompts)[0]).mean().item()


def curves(name, seeds, out):
    """Each estimator at all settings, from the pre-trained models of tests/compare.py: the scores
    at the end as a table, and the curves of the best setting as a figure."""
    task, settings = TASKS[name](), TASK[name][-1]
    process = Absorbing(task.vocab_size)
    found = {estimator: [[] for _ in settings] for estimator in ESTIMATORS}
    for seed in range(seeds):
        start, _ = sample.load_model(compare.pretrained(out, f"--task={name}", seed))
        score = score_of(task, process, start, seed)
        print(seed, f"at the start: {score(start):.3f}", file=sys.stderr, flush=True)
        for estimator, runs in found.items():
            for setting, run in zip(settings, runs):
                points = learn(name, process, start, ESTIMATORS[estimator], score, *setting, seed)
                run.append(points)
                print(seed, estimator, setting, f"{points[-1][2]:.3f}", file=sys.stderr, flush=True)
    heads = [f"{updates} updates, rate {lr:g}" for updates, lr in settings]
    print("| estimator | passes per sample | " + " | ".join(heads) + " |")
    print("| --- " * (2 + len(heads)) + "|")
    for estimator, runs in found.items():
        cells = [", ".join(f"{points[-1][2]:.2f}" for points in run) for run in runs]
        passes = runs[0][0][0][1] // runs[0][0][0][0] // settings[0][0]
        print(f"| {estimator} | {passes} | " + " | ".join(cells) + " |")
    (out / f"curves-{name}.json").write_text(json.dumps(found))
    draw_curves(name, found)


def draw_curves(name, found):
    """assets/curves-<task>.png: medians over the seeds of the setting that ends better, against
    queries and against passes."""
    medians = {estimator: max((list(zip(*(map(statistics.median, zip(*at)) for at in zip(*run))))
                               for run in runs), key=lambda columns: columns[2][-1])
               for estimator, runs in found.items()}    # queries, passes, scores
    ranked = sorted(medians, key=lambda estimator: -medians[estimator][2][-1])
    drawing, axes = panels_beside_names(2, ranked)
    for i, estimator in enumerate(ranked, 1):
        queries, passes, scores = medians[estimator]
        for axis, x in zip(axes, (queries, passes)):
            axis.plot(x, scores, color=color_of(estimator), lw=1, marker=".", ms=4)
            axis.annotate(f" {i}", (x[-1], scores[-1]), fontsize=8, annotation_clip=True)
            axis.set_ylim(-0.3 if name == "toy" else 0.4, 1.02)
    axes[0].set_xlabel("queries")
    axes[1].set_xlabel("passes with gradient")
    axes[1].set_xscale("log")
    axes[1].xaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("share of the optimum" if name == "toy" else "true sums, prompts never seen")
    drawing.savefig(ROOT / "assets" / f"curves-{name}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["table", "learn"])
    parser.add_argument("--task", choices=list(TASK), default="toy", help="of the curves")
    parser.add_argument("--seeds", type=int, default=3, help="of the curves: 0, 1, ...")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "compare", help="folder of runs")
    args = parser.parse_args()
    torch.set_num_threads(1)            # faster, and sums do not depend on the machine's cores
    if args.what == "table":
        table()
    else:
        curves(args.task, args.seeds, args.out)


if __name__ == "__main__":
    main()
