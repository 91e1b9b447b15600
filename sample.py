"""Look at a trained model: sample from a run of train.py, score the samples, draw pictures.

    python sample.py --run=out/toy                          # ten samples with their rewards
    python sample.py --run=out/toy --compare                # pre-trained beside fine-tuned
    python sample.py --run=out/toy --best=20                # the best that the run ever asked
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
from pathlib import Path

import torch

from diffusion import CHAINS, device_of
from model import Config, Denoiser
from rewards import BadInput, Task, ask, open_task, whole_lines

FORMATS = {                             # of sample i and its reward, which may be nan
    "text": lambda i, sample, reward: f"{reward:8.4f}  {sample}",
    "fasta": lambda i, sample, reward: f">sample_{i + 1} reward={reward:.4g}\n{sample}",
    "jsonl": lambda i, sample, reward: json.dumps(dict(
        sample=sample, reward=None if math.isnan(reward) else reward)),
}

# -----------------------------------------------------------------------------
# the command line

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def number(kind, low, high=math.inf):
    """A type for add_argument: int or float in [low, high]; nan and infinity are in no range."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise ValueError
        return value
    parse.__name__ = f"{kind.__name__} in [{low}, {high}]"              # for argparse's messages
    return parse


def name_of(suffix):
    """A type for add_argument: a file name with this suffix."""
    def parse(text):
        if not text.endswith(suffix):
            raise ValueError
        return text
    parse.__name__ = f"name with {suffix}"
    return parse


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--run", default="out/toy", help="folder of a run of train.py")
    add("--which", choices=["finetuned", "pretrained"], default="finetuned", help="which model")
    add("--compare", action="store_true", help="both models, side by side")
    add("--best", type=number(int, 0), default=0,
        help="in place of new samples: the N best that the run has asked a reward for")
    add("--n", type=number(int, 1), default=10, help="number of samples")
    add("--steps", type=number(int, -1), default=-1,
        help="steps of the time grid (0: the process's default; -1: the run's)")
    add("--prompt", default="", help="given letters, with _ for free slots: TC____; where _ is "
        "a letter or the pad, the blank is another one, which an error names")
    add("--temperature", type=number(float, 0.001), default=1.0, help="divides the logits")
    add("--seed", type=number(int, 0), default=0, help="seed of every random draw")
    add("--format", choices=list(FORMATS), default="text", help="of the samples")
    add("--movie", type=name_of(".gif"), help="file.gif: the reverse process of a few samples")
    add("--plot", type=name_of(".png"), help="file.png: histogram of the rewards")
    return parser


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.best and (args.compare or args.prompt or args.movie):
        parser.error("--best shows what was asked: it has no --compare, --prompt or --movie")
    if args.compare and args.format != "text":
        parser.error(f"--compare prints a table: --format={args.format} is for one model")
    try:
        run(args)
    except BrokenPipeError:                             # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (BadInput, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        raise SystemExit(2)


def run(args):
    if args.best:
        drawn = {"best": best_asked(Path(args.run), args.best)}
    else:
        names = ["pretrained", "finetuned"] if args.compare else [args.which]
        drawn = {name: draw(args, Path(args.run) / f"{name}.pt") for name in names}
    if args.plot:
        histograms(drawn, args.plot)
    columns = []
    for name, (samples, rewards) in drawn.items():
        cells = [f"  reward  {name}"] if args.compare else []
        cells += map(FORMATS[args.format], range(len(samples)), samples, rewards)
        width = max(map(len, cells)) + 2
        columns.append([cell.ljust(width) for cell in cells])
    for row in zip(*columns):
        print("".join(row).rstrip())
    sys.stdout.flush()


def draw(args, file):
    """Samples of one model -> strings, rewards (nan where there is no reward)."""
    model, run = load_model(file)
    model.head.weight.data /= args.temperature          # logits are linear in the head
    model.head.bias.data /= args.temperature
    task = load_task(run, model.config.length)
    process = CHAINS[run.process](task.vocab_size)
    prompts = read_prompts(task, args.prompt, run.held_out_prompts, args.n)
    torch.manual_seed(args.seed)
    steps = run.steps if args.steps < 0 else args.steps
    path = process.sample(model, args.n, task.length, steps, prompts)
    rewards = [math.nan] * args.n
    if task.reward is not None:
        rewards = ask(task, path.tokens, run.on_error).tolist()
    elif args.plot:
        raise BadInput("--plot: the run's reward is not there")
    distinct, mean = len(path.tokens.unique(dim=0)), sum(rewards) / args.n
    print(f"{file}: {args.n} samples, {distinct} distinct, mean reward {mean:.3f}", file=sys.stderr)
    if args.movie and file.stem == args.which:
        movie(task, path, rewards, args.movie)
    return task.samples(path.tokens), rewards


def best_asked(folder, n):
    """The n best distinct samples in the rollouts of a run -> strings, rewards."""
    pad, file = load(folder / "pretrained.pt")["flags"]["pad"], folder / "rewards.jsonl"
    reward_of = {line["sample"].replace(pad, ""): line["reward"]
                 for line in whole_lines(file.read_text()) if "stage" not in line}
    if not reward_of:
        raise BadInput(f"{file} holds no rollout yet")
    ranked = sorted(reward_of, key=reward_of.get, reverse=True)[:n]
    return ranked, [reward_of[sample] for sample in ranked]


def read_prompts(task, text, prompts, n):
    """--prompt, or else the run's held-out prompts -> tokens [n, L]."""
    if not text:
        return prompts[torch.arange(n) % len(prompts)]
    try:
        prompt = task.encode([text], task.blank)
        if task.blank not in text:
            raise BadInput("no slot is free")
        if task.pad and task.pad in text.rstrip(task.pad):
            raise BadInput(f"the pad {task.pad} can only stand at the end")
    except BadInput as error:
        raise BadInput(f"--prompt={text}: {error}; {task.blank} is a free slot") from None
    return prompt

# -----------------------------------------------------------------------------
# checkpoints

def load(file):
    """A checkpoint of plain tensors and numbers; code in the file is refused, not run."""
    if not Path(file).is_file():
        raise BadInput(f"{file} is missing: is {Path(file).parent} the folder of a run?")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:                          # truncated, no checkpoint, or with code
        raise BadInput(f"{file} is damaged or not a checkpoint of tensors "
                       f"({type(error).__name__})") from None


def load_model(file, autocast=None):
    """A model saved by train.py -> model; flags, alphabet and held-out prompts of its run."""
    saved = load(file)
    try:
        model = Denoiser(Config(**saved["config"]), autocast)
        model.load_state_dict(saved["model"])
        run = argparse.Namespace(**saved["flags"], alphabet=saved["alphabet"],
                                 held_out_prompts=saved["prompts"])
        return model.eval(), run
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        raise BadInput(f"{file} is not a model of train.py ({error.__class__.__name__})") from error


def load_task(run, length):
    """The task of a saved run. Without its data or reward file: no reward, so no scores."""
    try:
        task = open_task(run.task, run.length, run.data, run.pad, run.crop, run.reward, run.format)
        if (task.alphabet, task.length) == (run.alphabet, length):
            return task
        problem = f"{run.data} has other letters or another length than when the run began"
    except BadInput as error:
        problem = error
    print(f"no scores (nan): {problem}", file=sys.stderr)
    return Task(run.task, run.alphabet, length, data=None, reward=None, pad=run.pad)

# -----------------------------------------------------------------------------
# what a run has learnt; train.py calls these

def evaluate(args, task, process, model, tokens, paid, iter):
    """What the task measures on the latest rollout, and the reward on held-out prompts."""
    metrics = task.measure(tokens)
    if task.given:
        prompts = task.prompts(task.held_out(256, args.seed)).to(tokens.device)
        path = process.sample(model, len(prompts), task.length, args.steps, prompts)
        reward = paid.ask(task, path.tokens, iter, "evaluation")
        metrics["held_out_reward"] = reward.mean().item()
    return metrics


def report(args, task, process, exact, reference, model, paid):
    """Print each model's reward, KL to the pre-trained one and samples; save report.json."""
    held_out = task.held_out(args.report_samples, args.seed).to(device_of(model))
    prompts = task.prompts(held_out)
    n = len(held_out)
    few, k = max(1, n // 4), 16
    n_known = len(paid.reward_of)
    print("report: mean reward; KL to the pre-trained model, nats; share of distinct samples; "
          "hamming: share of\nslots in which two samples differ; commonest: share of the commonest "
          "letter; a few samples.\nbest of 16: the best of each 16 samples of the pre-trained one")

    rows = {}

    def add(name, tokens, kl):
        reward = paid.ask(task, tokens, stage=f"report {name}").mean().item()
        row = dict(reward=reward, kl=kl) | diversity(tokens, task.vocab_size) | task.measure(tokens)
        if exact and name == "fine-tuned":
            row.update(exact(model))
        rows[name] = row
        cells = [f"{key} {value:.3f}" for key, value in row.items() if value is not None]
        print(f"{name:12} " + "  ".join(cells), *task.samples(tokens[:4]), sep="\n    ")

    add("data", held_out, None)
    for name, policy in (("pre-trained", reference), ("fine-tuned", model)):
        path = process.sample(policy, n, task.length, args.steps, prompts)
        add(name, path.tokens, process.path_kl(reference, path).mean().item())
    prompts = prompts[:few].repeat_interleave(k, dim=0)
    many = process.sample(reference, few * k, task.length, args.steps, prompts).tokens
    best = paid.ask(task, many, stage="report 16").view(few, k).argmax(dim=1)
    best = many.view(few, k, -1)[torch.arange(few), best]
    add("best of 16", best, math.log(k) - (k - 1) / k)  # its KL is at most this

    print(f"the report asked for {len(paid.reward_of) - n_known:,} more rewards "
          "(--report_samples=0: none)")
    (args.out / "report.json").write_text(json.dumps(rows, indent=2) + "\n")
    before, after = rows["pre-trained"], rows["fine-tuned"]
    if after["hamming"] < before["hamming"] / 2 or after["commonest"] > 1.5 * before["commonest"]:
        print("note: the samples have become much more alike. If that is not what you want, try a "
              "larger --beta, or a reward that forbids it")


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

def plot_curve(args):
    """curve.png, from metrics.jsonl: six panels, of metrics against the number of rewards, and of
    the reward against the KL that it costs."""
    from matplotlib.figure import Figure                # slow to import, so only when needed
    lines = [json.loads(line) for line in open(args.out / "metrics.jsonl")]
    lines = [line for line in lines if line["phase"] == "finetune"]
    panels = [["reward", "best", "exact_reward", "optimum_reward", "pretrained_reward"],
              ["reward"], ["kl", "exact_kl"], ["reward_std"], ["clip_fraction", "grad_norm"]]
    usual = {"phase", "iter", "queries"}.union(*panels)
    panels.append(sorted(set().union(*lines) - usual))  # the task's own columns
    figure = Figure(figsize=(13, 6))
    figure.suptitle(f"{args.task}, {args.algo}, beta {args.beta:g}")
    for i, (axis, keys) in enumerate(zip(figure.subplots(2, 3).flat, panels)):
        x, style = ("kl", ".") if i == 1 else ("queries", ".-")
        for key in keys:
            points = [(line[x], line[key]) for line in lines if key in line]
            if points:
                axis.plot(*zip(*points), style, ms=3, label=key.replace("_", " "))
        axis.set_xlabel("KL to the pre-trained model, nats" if i == 1 else "rewards asked")
        if keys:
            axis.legend()
    figure.subplots_adjust(left=0.05, right=0.98, hspace=0.3)
    figure.savefig(args.out / "curve.png")


def histograms(drawn, file):
    from matplotlib.figure import Figure
    figure = Figure()
    axis = figure.subplots()
    values = [rewards for _, rewards in drawn.values()]
    axis.hist(values, bins=30, label=list(drawn))       # in the same bins
    axis.set_xlabel("reward")
    axis.legend()
    figure.savefig(file, dpi=110)


def movie(task, path, rewards, file):
    """A GIF of the reverse process of eight samples: a row per sample, a cell per slot, grey while
    it is masked; the rewards come with the last state."""
    from matplotlib import colormaps
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.figure import Figure
    last = int(path.n_events[:8].max())
    figure = Figure(figsize=(min(12, 1 + 0.35 * task.length), 3.5))
    axis = figure.subplots()
    colours = colormaps["tab20"].resampled(task.vocab_size).with_extremes(over="0.9")

    def frame(j):
        state = path.state(j)[:8]
        axis.clear()
        axis.axis("off")
        axis.set_title(f"event {j} of {last}")
        labels = [f"{reward:.2f} " if j == last else " " * 6 for reward in rewards[:8]]
        letters = [list(string.replace(task.blank, " ")) for string in task.decode(state)]
        axis.table(letters, colours(state.numpy(), alpha=0.8), cellLoc="center", rowLabels=labels,
                   bbox=[0.1, 0, 0.9, 1])

    frames = list(range(last + 1)) + [last] * 4         # hold the result for a while
    FuncAnimation(figure, frame, frames).save(file, writer=PillowWriter(fps=2))


if __name__ == "__main__":
    main()
