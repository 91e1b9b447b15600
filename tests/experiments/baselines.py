"""What needs no training: a genetic algorithm, and three ways to steer a pre-trained model.

    python tests/experiments/baselines.py search --task=ehrlich --seeds=5 # best found, by queries
    python tests/experiments/baselines.py steer --run=out/toy    # best of N, SMC, SVDD, training
"""
import argparse
import json
import math
import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import sample  # noqa: E402
from compare import reward_of  # noqa: E402
from diffusion import CHAINS, gumbel_argmax  # noqa: E402
from exact import rank, sequences  # noqa: E402
from rewards import TASKS, RewardLog  # noqa: E402

MARKS = (1280, 2560, 5120, 6400, 12_800)


def genetic_algorithm(task, queries, seed, batch=64, parents=64, rate=0.02, start=256):
    """Crossover at two points and mutation of the best distinct sequences so far -> tokens [n, L],
    rewards [n], in the order of the queries. The first are data, from `start` draws; every child is
    new, so that nothing is queried twice. Ends where a generation holds no new child."""
    torch.manual_seed(seed)
    tokens, reward = task.split(start, seed)[0].unique(dim=0), reward_of(task)
    values = reward(tokens)
    while len(tokens) < queries:
        best = tokens[values.argsort(descending=True, stable=True)[:parents]]
        a, b = best[torch.randint(len(best), (2, 4 * batch))]                       # [4 batch, L]
        cut = torch.rand(2, 4 * batch, 1).mul(task.length + 1).long()
        place = torch.arange(task.length)
        child = torch.where((place >= cut.amin(0)) & (place < cut.amax(0)), b, a)
        mutated = torch.rand(child.shape) < rate
        child = torch.where(mutated, torch.randint(task.vocab_size, child.shape), child)
        seen = {tuple(row) for row in tokens.tolist()}
        new = [row for row in dict.fromkeys(map(tuple, child.tolist())) if row not in seen]
        if not new:
            break
        child = torch.tensor(new[:batch])
        tokens, values = torch.cat((tokens, child)), torch.cat((values, reward(child)))
    return tokens[:queries], values[:queries]


def best_of(process, model, prompt, reward, N):
    """For each prompt [n, L] the best of N samples -> tokens [n, L]. KL at most log N - (N-1)/N."""
    n, L = prompt.shape
    tokens, _ = process.sample(model, n * N, L, prompt.repeat_interleave(N, dim=0))
    best = reward(tokens).view(n, N).argmax(dim=1)
    return tokens.view(n, N, L)[torch.arange(n), best]


@torch.no_grad()
def filled(process, model, x):
    """States [n, L] with the likeliest letter for every mask -> logits; samples [n, L]."""
    logits = process.logits(model, x, torch.full((len(x),), 0.5))
    return logits, torch.where(x == logits.size(-1), logits.argmax(dim=-1), x)


def random_mask(process, x):
    """The position of one of the masks of each state x [n, L] -> [n, 1]."""
    return torch.where(x == process.mask, torch.rand(x.shape), -1).argmax(dim=1, keepdim=True)


def svdd(process, model, prompt, reward, M, alpha):
    """Soft value-based decoding (SVDD, 2408.08252): in every transition M proposals per sample, of
    which one stays, in proportion to exp(value / alpha); a state's value is the reward of `filled`.
    """
    x, n = prompt, len(prompt)
    for _ in range(int((prompt == process.mask).sum(dim=1).max())):
        position = random_mask(process, x)
        logits, _ = filled(process, model, x)
        logits = logits.take_along_dim(position[..., None], dim=1)                  # [n, 1, V]
        letters = gumbel_argmax(logits.repeat(M, 1, 1))                             # [M n, 1]
        proposals = x.repeat(M, 1).scatter(1, position.repeat(M, 1), letters)
        values = reward(filled(process, model, proposals)[1]).view(M, n)
        chosen = gumbel_argmax(values.T / alpha)                                    # [n]
        x = proposals.view(M, n, -1)[chosen, torch.arange(n)]
    return x


def smc(process, model, prompt, reward, alpha):
    """Sequential Monte Carlo: all samples of one prompt are particles whose weights change by
    exp(difference of values / alpha) in every transition; they are resampled where the effective
    sample size falls below half of them. The value of a state is the reward of `filled`."""
    x, n = prompt, len(prompt)
    logits, fill = filled(process, model, x)
    value, log_w = reward(fill), torch.zeros(n, dtype=torch.double)
    for _ in range(int((prompt == process.mask).sum(dim=1).max())):
        position = random_mask(process, x)
        letter = gumbel_argmax(logits.take_along_dim(position[..., None], dim=1))
        x = x.scatter(1, position, letter)
        logits, fill = filled(process, model, x)
        new = reward(fill)
        log_w, value = log_w + (new - value) / alpha, new
        weights = log_w.softmax(dim=0)
        if 1 / weights.square().sum() < n / 2:
            kept = weights.multinomial(n, replacement=True)
            x, value, logits = x[kept], value[kept], logits[kept]
            log_w = torch.zeros_like(log_w)
    return x[log_w.softmax(dim=0).multinomial(n, replacement=True)]


def small_space(process, model, task, way, runs):
    """Where all sequences can be listed, from that many runs of a way -> its mean reward, its KL to
    the model, nats, and the mean reward that the optimum p* has at this KL."""
    V, L = process.vocab_size, task.length
    p_ref = process.exact_law(model, L).detach()
    reward = reward_of(task)
    R = reward(sequences(V, L))
    tokens = torch.cat([way(reward) for _ in range(runs)])
    counts = torch.bincount(rank(tokens, V), minlength=V ** L)
    p = counts / len(tokens)
    bias = (counts > 0).sum() / (2 * len(tokens))       # of the entropy (Miller and Madow)
    kl = (torch.xlogy(p, p) - torch.xlogy(p, p_ref)).sum() - bias
    low, high = 1e-3, 10.0                              # bisection for beta
    for _ in range(60):
        best = (p_ref.log() + R / (low * high) ** 0.5).softmax(dim=0)
        is_far = torch.xlogy(best, best / p_ref).sum() > kl
        low, high = ((low * high) ** 0.5, high) if is_far else (low, (low * high) ** 0.5)
    return (p * R).sum().item(), kl.item(), (best * R).sum().item()


def steer(folder, n, seed):
    """A table of what each way gives, and how many distinct queries it makes per sample."""
    torch.manual_seed(seed)
    model, saved = sample.load_model(folder / "pretrained.pt")
    tuned, _ = sample.load_model(folder / "finetuned.pt")
    task, flags = sample.load_task(saved), saved["flags"]
    process, beta = CHAINS[flags["process"]](task.vocab_size, flags["steps"]), flags["beta"]
    prompt = sample.read_prompts(task, "", saved["prompts"], n)
    lines = map(json.loads, open(folder / "rewards.jsonl"))
    trained = sum("iter" in line for line in lines)

    def drawn(policy):
        return lambda reward: process.sample(policy, n, task.length, prompt)[0]
    ways = {"pre-trained": drawn(model), "fine-tuned": drawn(tuned)}
    for N in (4, 16, 64):
        ways[f"best of {N}"] = lambda reward, N=N: best_of(process, model, prompt, reward, N)
    for M in (2, 4):
        ways[f"SVDD, {M}"] = lambda reward, M=M: svdd(process, model, prompt, reward, M, beta)
    if not task.has_prompts:
        ways["SMC"] = lambda reward: smc(process, model, prompt, reward, beta)
    is_small = not task.has_prompts and process.is_small(task.length)
    heads = ["", "mean reward", "distinct", "hamming", "KL, nats", "queries per sample"]
    heads += ["p* at this KL"] * is_small
    print("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    for name, way in ways.items():
        log = RewardLog()
        tokens = way(reward_of(task, log))
        row = sample.diversity(task, task.strings(tokens))
        queries = f"{len(log.reward_of) / n:.1f}"
        kl = ""
        if name.startswith("best of"):
            N = int(name.split()[-1])
            kl = f"at most {math.log(N) - (N - 1) / N:.2f}"
        if name == "fine-tuned":
            _, path = process.sample(tuned, n, task.length, prompt)
            with torch.no_grad():
                log_ratio = path.per_sequence(path.logp - process.logp(model, path))
            kl = f"at most {log_ratio.mean():.2f}"
            queries = f"0, after {trained:,}"
        cells = [f"{reward_of(task)(tokens).mean():.3f}", f"{row['distinct']:.2f}",
                 f"{row['hamming']:.2f}", kl, queries]
        if is_small:
            mean, kl, best = small_space(process, model, task, way, 1 + 50_000 // n)
            cells = [f"{mean:.3f}", *cells[1:3], f"{kl:.2f}", queries, f"{best:.3f}"]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["search", "steer"])
    parser.add_argument("--run", type=Path, help="steer: the folder of a run of train.py")
    parser.add_argument("--n", type=int, default=500, help="steer: samples")
    parser.add_argument("--task", choices=list(TASKS), default="ehrlich")
    parser.add_argument("--seeds", type=int, default=5)
    for name, kind, value in (("parents", int, 64), ("rate", float, 0.02), ("batch", int, 64)):
        parser.add_argument(f"--{name}", type=kind, default=value)
    args = parser.parse_args()
    if args.what == "steer":
        return steer(args.run, args.n, seed=0)
    task = TASKS[args.task]()
    runs = [genetic_algorithm(task, MARKS[-1], seed, args.batch, args.parents, args.rate)[1]
            for seed in range(args.seeds)]
    print("| queries | best, every seed | median |\n| --- | --- | --- |")
    for mark in MARKS:
        best = [values[:mark].max().item() for values in runs]
        cells = ", ".join(f"{value:.2f}" for value in best)
        print(f"| {mark:,} | {cells} | {statistics.median(best):.2f} |")


if __name__ == "__main__":
    main()
