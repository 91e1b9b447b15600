"""What a user would try first: a genetic algorithm, from the same data and with the same rewards.

    python tests/baselines.py --task=ehrlich --seeds=5          # the best found, by rewards asked
"""
import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
from rewards import TASKS, ask  # noqa: E402

MARKS = (1280, 2560, 5120, 6400, 12_800)


def genetic_algorithm(task, rewards, seed, batch=64, parents=64, rate=0.02, start=256):
    """Crossover at two points and mutation of the best distinct sequences asked so far
    -> tokens [n, L], rewards [n], in the order in which they were asked. The first `start` are
    data; every child is new, so that no reward is asked twice."""
    torch.manual_seed(seed)
    tokens = task.data(start, torch.Generator().manual_seed(seed)).unique(dim=0)
    values = ask(task, tokens)
    while len(tokens) < rewards:
        best = tokens[values.argsort(descending=True, stable=True)[:parents]]
        a, b = best[torch.randint(len(best), (2, 4 * batch))]                       # [4 batch, L]
        cut = torch.rand(2, 4 * batch, 1).mul(task.length + 1).long()
        place = torch.arange(task.length)
        child = torch.where((place >= cut.amin(0)) & (place < cut.amax(0)), b, a)
        mutated = torch.rand(child.shape) < rate
        child = torch.where(mutated, torch.randint(task.vocab_size, child.shape), child)
        seen = {tuple(row) for row in tokens.tolist()}
        new = [row for row in dict.fromkeys(map(tuple, child.tolist())) if row not in seen]
        child = torch.tensor(new[:batch], dtype=torch.long).view(-1, task.length)
        tokens, values = torch.cat((tokens, child)), torch.cat((values, ask(task, child)))
    return tokens[:rewards], values[:rewards]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="ehrlich")
    parser.add_argument("--seeds", type=int, default=5)
    for name, kind, value in (("parents", int, 64), ("rate", float, 0.02), ("batch", int, 64)):
        parser.add_argument(f"--{name}", type=kind, default=value)
    args = parser.parse_args()
    task = TASKS[args.task]()
    runs = [genetic_algorithm(task, MARKS[-1], seed, args.batch, args.parents, args.rate)[1]
            for seed in range(args.seeds)]
    print("| rewards | best, every seed | median |\n| --- | --- | --- |")
    for mark in MARKS:
        best = [values[:mark].max().item() for values in runs]
        cells = ", ".join(f"{value:.2f}" for value in best)
        print(f"| {mark:,} | {cells} | {statistics.median(best):.2f} |")


if __name__ == "__main__":
    main()
