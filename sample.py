"""Sample from a run of train.py, score the samples, and draw pictures of the run.

    python sample.py --run=out/toy                          # ten samples with their rewards
    python sample.py --run=out/toy --compare                # pre-trained beside fine-tuned
    python sample.py --run=out/toy --prompt=TC____          # some letters given
    python sample.py --run=out/toy --movie=denoise.gif      # the reverse process, slot by slot
    python sample.py --run=out/toy --n=1000 --format=fasta > samples.fasta

Samples go to standard output, everything else to standard error.
"""
import argparse
import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from diffusion import Absorbing, Uniform
from model import Config, Denoiser
from rewards import BadInput, Task, ask, open_task

CHAINS = {"absorb": Absorbing, "uniform": Uniform}
FORMATS = {                             # of sample i and its reward, which may be nan
    "text": lambda i, sample, reward: f"{reward:8.4f}  {sample}",
    "fasta": lambda i, sample, reward: f">sample_{i + 1} reward={reward:.4g}\n{sample}",
    "jsonl": lambda i, sample, reward: json.dumps(dict(
        sample=sample, reward=None if math.isnan(reward) else reward)),
}

# -----------------------------------------------------------------------------
# the command line

def at_least(low, kind=int):
    """An argparse type: a finite number that is not below `low`."""
    def convert(text):
        value = kind(text)
        if not low <= value < math.inf:
            raise ValueError
        return value
    convert.__name__ = f"{kind.__name__} >= {low}"      # argparse says: invalid int >= 1 value: '0'
    return convert


def inside(text):
    """An argparse type: a number between 0 and 1, without the ends."""
    value = float(text)
    if not 0 < value < 1:
        raise ValueError
    return value


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    count, whole = at_least(1), at_least(0)
    add = parser.add_argument
    add("--run", type=Path, default=Path("out/toy"), help="folder of a run of train.py")
    add("--which", choices=["pretrained", "finetuned"], default="finetuned", help="which model")
    add("--compare", action="store_true", help="both models, side by side")
    add("--n", type=count, default=10, help="number of samples")
    add("--steps", type=whole, help="steps of the time grid (default: the run's; 0: none)")
    add("--prompt", default="", help="given letters, with _ for free slots: TC____")
    add("--temperature", type=at_least(0.001, float), default=1.0, help="divides the logits")
    add("--seed", type=whole, default=0, help="seed of every random draw")
    add("--format", choices=FORMATS, default="text", help="of the samples")
    add("--movie", type=Path, help="file.gif: the reverse process of a few samples")
    add("--plot", type=Path, help="file.png: histogram of the rewards")
    args = parser.parse_args(argv)
    if args.compare and args.format != "text":
        parser.error(f"--compare prints a table: --format={args.format} is for one model")
    for file, ending in ((args.movie, ".gif"), (args.plot, ".png")):
        if file and file.suffix != ending:
            parser.error(f"{file}: a name that ends in {ending} is needed")
    try:
        run(args)
    except BrokenPipeError:                             # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (BadInput, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        raise SystemExit(2)


def run(args):
    names = ["pretrained", "finetuned"] if args.compare else [args.which]
    drawn = {name: draw(args, args.run / f"{name}.pt") for name in names}
    if args.plot:
        histograms(drawn, args.plot)
    show = FORMATS[args.format]
    columns = []
    for name, (samples, rewards) in drawn.items():
        cells = [show(i, samples[i], rewards[i]) for i in range(args.n)]
        heading = [f"  reward  {name}"] if args.compare else []
        width = max(map(len, heading + cells)) + 2
        columns.append([cell.ljust(width) for cell in heading + cells])
    for cells in zip(*columns):
        print("".join(cells).rstrip())
    sys.stdout.flush()


def draw(args, file):
    """Samples of one model -> strings, rewards (nan where there is no reward)."""
    task, process, model, steps, prompts = load_run(file)
    prompts = read_prompts(task, args.prompt, prompts, args.n)
    torch.manual_seed(args.seed)
    steps = steps if args.steps is None else args.steps
    policy = lambda x, t: model(x, t) / args.temperature
    path = process.sample(policy, args.n, task.length, steps, prompts)
    rewards = [math.nan] * args.n
    if task.reward is not None:
        rewards = ask(task, path.tokens).tolist()
    elif args.plot:
        raise BadInput("--plot: the run's reward is not there")
    distinct, mean = len(path.tokens.unique(dim=0)), sum(rewards) / args.n
    print(f"{file}: {args.n} samples, {distinct} distinct, mean reward {mean:.3f}", file=sys.stderr)
    if args.movie:
        movie(task, path, args.movie)
    return task.samples(path.tokens), rewards


def read_prompts(task, text, prompts, n):
    """--prompt, or else the run's held-out prompts -> tokens [n, L]; None without prompts."""
    if not text:
        return None if prompts is None else prompts[torch.arange(n) % len(prompts)]
    if len(text) != task.length:
        raise BadInput(f"--prompt={text} has {len(text)} letters, the task {task.length} slots: "
                       f"write {task.blank} for a free slot")
    return task.encode([text])

# -----------------------------------------------------------------------------
# checkpoints

def load(file):
    """A checkpoint of plain tensors and numbers; code in the file is refused, not run."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:                          # truncated, no checkpoint, or with code
        raise BadInput(f"{file} is missing, damaged or not a checkpoint of tensors "
                       f"({type(error).__name__})") from None


def load_model(file):
    """A model saved by train.py -> model, all that the file holds."""
    saved = load(file)
    try:
        model = Denoiser(Config(**saved["config"]))
        model.load_state_dict(saved["model"])
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        raise BadInput(f"{file} is not a model of train.py ({error.__class__.__name__})") from error
    return model, saved


def task_of(args):
    return open_task(args.task, args.length, args.data, args.pad, args.crop, args.reward)


def meta_of(args, task, model):
    """What a checkpoint holds beside the weights: all that sample.py needs."""
    prompts = task.prompts(held_out_data(task, 256, args.seed)) if task.given else None
    return dict(config=asdict(model.config), flags=args.saved, alphabet=task.alphabet,
                pad=task.pad, prompts=prompts)


def load_run(file):
    """A model saved by train.py -> task, process, model, steps of the time grid, prompts.

    Without the run's data or reward file the task has no reward: samples come without scores."""
    model, saved = load_model(file)
    args = argparse.Namespace(**saved["flags"])
    try:
        task = task_of(args)
    except BadInput as error:
        print(f"no scores (nan): {error}", file=sys.stderr)
        task = Task(args.task, saved["alphabet"], model.config.length, data=None, reward=None)
    task.alphabet, task.pad = saved["alphabet"], saved["pad"]
    process = CHAINS[args.process](task.vocab_size, args.schedule)
    return task, process, model.eval(), args.steps, saved["prompts"]

# -----------------------------------------------------------------------------
# what a run has learnt; train.py calls these

def held_out_data(task, n, seed):
    """At most n sequences that pre-training does not see, if there are some -> [n, L]."""
    draw = task.held or task.data
    return draw(n, torch.Generator().manual_seed(seed + 1))[:n]


def evaluate(args, task, process, exact, model, tokens):
    """Metrics beside the reward: exact ones where the space is small; else what the task measures
    on the latest rollout, and the reward on held-out prompts."""
    if exact:
        return exact(model)
    metrics = task.measure(tokens)
    if task.given:
        prompts = task.prompts(held_out_data(task, 256, args.seed)).to(tokens.device)
        path = process.sample(model, len(prompts), task.length, args.steps, prompts)
        metrics["held_out_reward"] = ask(task, path.tokens).mean().item()
    return metrics


def report(args, task, process, exact, reference, model):
    """Print each model's reward, KL to the pre-trained one and samples; save report.json."""
    held_out = held_out_data(task, args.report_samples, args.seed).to(args.device)
    prompts = task.prompts(held_out)
    n = len(held_out)
    few, k = max(1, n // 4), 16
    print(f"report: asks for {3 * n + few * (k + 1):,} more rewards (--report_samples=0: none)")

    samples = {"data": (held_out, None)}
    for name, policy in (("pre-trained", reference), ("fine-tuned", model)):
        path = process.sample(policy, n, task.length, args.steps, prompts)
        with torch.no_grad():
            log_ratio = path.logp - process.replay(reference, path)
        samples[name] = path.tokens, log_ratio.flatten(1).sum(dim=1).mean().item()
    if prompts is not None:
        prompts = prompts[:few].repeat_interleave(k, dim=0)
    many = process.sample(reference, few * k, task.length, args.steps, prompts).tokens
    best = ask(task, many).view(few, k).argmax(dim=1)
    best = many.view(few, k, -1)[torch.arange(few), best]
    samples["best of 16"] = best, math.log(k) - (k - 1) / k     # its KL is at most this

    rows = {}
    for name, (tokens, kl) in samples.items():
        reward = ask(task, tokens).mean().item()
        row = dict(reward=reward, kl=kl, **diversity(tokens, task.vocab_size))
        row.update(task.measure(tokens))
        if exact and name == "fine-tuned":
            row.update(exact(model))
        rows[name] = row
        cells = [f"{key} {value:.3f}" for key, value in row.items() if value is not None]
        print(f"{name:12} " + "  ".join(cells))
        print("\n".join(f"    {s}" for s in task.samples(tokens[:4])))
    (args.out / "report.json").write_text(json.dumps(rows, indent=2) + "\n")
    before, after = rows["pre-trained"], rows["fine-tuned"]
    if after["hamming"] < before["hamming"] / 2 or after["commonest"] > 1.5 * before["commonest"]:
        print("note: the samples have become much more alike: is the reward being exploited?")


def diversity(tokens, V):
    """What shows that a reward is exploited, of tokens [B, L]: the share of distinct samples, the
    mean share of slots in which two samples differ, and the share of the commonest letter."""
    B = len(tokens)
    share = torch.nn.functional.one_hot(tokens, V).double().mean(dim=0)                 # [L, V]
    differ = (1 - share.square().sum(dim=1)).mean() * B / max(1, B - 1)
    commonest = share.mean(dim=0).max()
    return dict(distinct=len(tokens.unique(dim=0)) / B, hamming=differ.item(),
                commonest=commonest.item())

# -----------------------------------------------------------------------------
# pictures

def pyplot():
    import matplotlib                                   # slow to import, so only when needed
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def plot_curve(out):
    """curve.png, from metrics.jsonl: four panels of quantities against the number of rewards."""
    plt = pyplot()
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    lines = [line for line in lines if line["phase"] == "finetune"]
    panels = [["reward", "exact_reward", "best_reward", "pretrained_reward"], ["reward_std"],
              ["kl", "kl_after_corrector", "exact_kl"], ["clip_fraction"]]
    usual = {"phase", "iter", "queries", "passes"}.union(*panels)
    own = sorted(set().union(*lines) - usual)           # the task's own columns
    panels[1] = own or panels[1]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True)
    for axis, keys in zip(axes.flat, panels):
        for key in keys:
            points = [(line["queries"], line[key]) for line in lines if key in line]
            if points:
                axis.plot(*zip(*points), ".-", ms=3, label=key.replace("_", " "))
        axis.set_xlabel("rewards asked")
        axis.legend()
    figure.tight_layout()
    figure.savefig(out / "curve.part.png", dpi=110)
    os.replace(out / "curve.part.png", out / "curve.png")
    plt.close(figure)


def histograms(drawn, file):
    plt = pyplot()
    for name, (_, values) in drawn.items():
        plt.hist(values, bins=30, alpha=0.6, label=f"{name}: mean {sum(values) / len(values):.3f}")
    plt.xlabel("reward")
    plt.legend()
    plt.savefig(file, dpi=110)
    plt.close()


def movie(task, path, file):
    """A GIF of the reverse process of eight samples: a row per sample, a cell per slot, grey while
    it is masked."""
    plt = pyplot()
    from matplotlib.animation import FuncAnimation, PillowWriter
    V, L, last = task.vocab_size, task.length, int(path.n_events[:8].max())
    figure, axis = plt.subplots(figsize=(min(12, 1 + 0.35 * L), 3.5))
    colours = plt.get_cmap("tab20", V).with_extremes(over="0.9")

    def frame(j):
        state = path.state(j)[:8]
        axis.clear()
        axis.axis("off")
        axis.set_title(f"state {j} of {last}", fontsize=8)
        letters = [list(string.replace(task.blank, " ")) for string in task.decode(state)]
        axis.table(letters, colours(state.numpy(), alpha=0.8), cellLoc="center", bbox=[0, 0, 1, 1])

    frames = list(range(last + 1)) + [last] * 4         # hold the result for a while
    FuncAnimation(figure, frame, frames).save(file, writer=PillowWriter(fps=2))
    plt.close(figure)


if __name__ == "__main__":
    main()
