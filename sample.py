"""Look at a trained model: sample from a run of train.py, score the samples, draw pictures.

    python sample.py --run=out/toy                          # ten samples with their rewards
    python sample.py --run=out/toy --compare                # pre-trained beside fine-tuned
    python sample.py --run=out/toy --best=20                # the best of the run's rollouts
    python sample.py --run=out/toy --prompt=TC____          # some letters given
    python sample.py --run=out/toy --movie=denoise.gif      # the reverse process, step by step
    python sample.py --run=out/toy --n=1000 --format=fasta > samples.fasta

Samples go to standard output, messages to standard error, new rewards to the run's rewards.jsonl.
"""
import argparse
import inspect
import json
import math
import os
import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import torch

from diffusion import CHAINS
from model import make_model
from rewards import BadInput, RewardLog, Task, hold, measured, open_task


@dataclass
class Flags:
    # what to show
    run: Path = Path("out/toy")         # folder of a run of train.py
    which: Literal["finetuned", "best", "pretrained"] = "finetuned"     # which model
    compare: bool = False               # show it beside the pre-trained model
    best: int = 0                       # in place of new samples: the N best of the rollouts
    n: int = 10                         # number of samples
    format: Literal["text", "fasta", "jsonl"] = "text"              # of the samples
    movie: str = ""                     # file.gif: the reverse process of a few samples
    plot: str = ""                      # file.png: histogram of the rewards

    # how to sample
    prompt: str = ""                    # given letters, with _ for free positions: TC____; where _
                                        # is a letter or the pad, an error names another blank
    steps: int = -1                     # of the time grid; 0: the process's default; -1: the run's
    temperature: float = 1.0            # divides the logits
    seed: int = 0                       # seed of every random draw


FORMATS = {                             # of sample i and its reward, which may be nan
    "text": lambda i, sample, reward: f"{reward:8.4f}  {sample}",
    "fasta": lambda i, sample, reward: f">sample_{i + 1} reward={reward:.4g}\n{sample}",
    "jsonl": lambda i, sample, reward: json.dumps(dict(
        sample=sample, reward=None if math.isnan(reward) else reward)),
}

# -----------------------------------------------------------------------------
# the command line

@cache                                  # reading the source takes 50 ms
def parser_of(flags, description, epilog=""):
    """A parser of a dataclass of flags: its types, with the comments as help, beside the defaults.
    What was not typed is left out of its result."""
    parser = argparse.ArgumentParser(usage="%(prog)s [--flag=value ...]", description=description,
                                     epilog=epilog, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = get_type_hints(flags)
    for line in inspect.getsource(flags).replace("%", "%%").splitlines():
        if heading := re.fullmatch(r" {4}# (.+)", line):
            group = parser.add_argument_group(heading[1])
        elif more := re.fullmatch(r" {8,}# (.+)", line):
            flag.help += " " + more[1]
        elif field := re.fullmatch(r" {4}(\w+): .+? = \S+ +# (.+)", line):
            name, text = field.groups()
            kind, *others = get_args(kinds[name]) or [kinds[name]]
            default = getattr(flags, name)
            if kind is bool:
                options = dict(action="store_true")
            elif isinstance(kind, str):
                options = dict(choices=[kind, *others])
                text = f"[{default}] {text}"
            else:
                shown = name.upper() if default in ("", None) else default
                options = dict(type=kind, metavar=shown)
            flag = group.add_argument(f"--{name}", help=text, **options)
    return parser


def print_any_letter():
    """A letter that the terminal cannot show is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):              # not if something else took its place
            stream.reconfigure(errors="backslashreplace")


def main(argv=None):
    parser = parser_of(Flags, __doc__)
    args = Flags(**vars(parser.parse_args(argv)))
    if args.n < 1 or args.temperature <= 0:
        parser.error("--n must be at least 1, --temperature above 0")
    if args.movie and not args.movie.endswith(".gif"):
        parser.error("--movie needs a name with .gif")
    if args.plot and not args.plot.endswith(".png"):
        parser.error("--plot needs a name with .png")
    if args.best and (args.compare or args.prompt or args.movie):
        parser.error("--best shows what was queried: it has no --compare, --prompt or --movie")
    if args.compare and args.format != "text":
        parser.error("--compare prints a table: --format is for one model")
    try:
        run(args)
    except BrokenPipeError:                             # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (BadInput, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        raise SystemExit(2)


def run(args):
    names = ["pretrained"] * args.compare + [args.which]
    if args.best:
        drawn = {"best": best_found(args.run / "rewards.jsonl", args.best)}
    else:
        drawn = {name: draw(args, args.run / f"{name}.pt") for name in names}
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
    model, saved = load_model(file)
    task, flags = load_task(saved), argparse.Namespace(**saved["flags"])
    steps = flags.steps if args.steps < 0 else args.steps
    process = CHAINS[flags.process](task.vocab_size, steps)
    prompts = read_prompts(task, args.prompt, saved["prompts"], args.n)
    torch.manual_seed(args.seed)
    policy = model if args.temperature == 1 else lambda x, t: model(x, t) / args.temperature
    tokens, path = process.sample(policy, args.n, task.length, prompts)
    samples, rewards = task.strings(tokens), [math.nan] * args.n
    if task.reward is not None:
        rewards = ask(task, samples, args.run, flags.on_error)
    elif args.plot:
        raise BadInput("--plot: the run's reward is not there")
    print(f"{file}: {args.n} samples, {len(set(samples))} distinct, mean reward "
          f"{sum(rewards) / args.n:.3f}", file=sys.stderr)
    if args.movie and file.stem == args.which:
        movie(task, tokens, path, rewards, args.movie)
    return samples, rewards


def ask(task, samples, run, on_error):
    """Rewards of samples, list. What the run knows is not asked again, and new answers are kept in
    its rewards.jsonl, unless it still goes on, or nothing can be written there."""
    try:
        lock = hold(run)
    except (BadInput, OSError):
        lock = None
    with lock or nullcontext():
        log = RewardLog(run / "rewards.jsonl", on_error, is_writer=lock is not None)
        return log.query(task.reward, samples, stage="sample").tolist()


def best_found(file, n):
    """The n best distinct samples in the rollouts of a run -> strings, rewards."""
    lines = [line for line in RewardLog(file, is_writer=False).lines
             if "iter" in line and not line.get("failed")]
    if not lines:
        raise BadInput(f"{file} holds no rollout: is {file.parent} the folder of a run?")
    lines.sort(key=lambda line: -line["reward"])
    return tuple(zip(*((line["sample"], line["reward"]) for line in lines[:n])))


def read_prompts(task, text, prompts, n):
    """--prompt, or else the run's held-out prompts -> tokens [n, L]."""
    if not text:
        return prompts[torch.arange(n) % len(prompts)]
    try:
        prompt = task.encode([text], task.blank)
        if task.blank not in text:
            raise BadInput("no position is free")
        if task.pad and task.pad in text.rstrip(task.pad):
            raise BadInput(f"the pad {task.pad} can only stand at the end")
    except BadInput as error:
        raise BadInput(f"--prompt={text}: {error}; {task.blank} is a free position, as in "
                       f"{text[:task.length].ljust(task.length, task.blank)}") from None
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


def load_model(file):
    """A model saved by train.py -> model; all else that was saved with it."""
    saved = load(file)
    try:
        flags = argparse.Namespace(**saved["flags"])
        model = make_model(flags, len(saved["alphabet"]), saved["length"])
        model.load_state_dict(saved.pop("model"))
    except (AttributeError, KeyError, IndexError, TypeError, RuntimeError) as error:
        raise BadInput(f"{file} is not a model of train.py ({type(error).__name__})") from error
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise BadInput(f"{file}: {name} is not finite, so its training has failed")
    return model.eval(), saved


def load_task(saved):
    """The task of a saved run. Without its data or reward file: no reward, so no scores."""
    try:
        task = open_task(**saved["flags"])
        if (task.alphabet, task.length) == (saved["alphabet"], saved["length"]):
            return task
        print("no scores (nan): the data has other letters or another length than when the run "
              "began", file=sys.stderr)
    except BadInput as error:
        print(f"no scores (nan): {error}", file=sys.stderr)
    task = Task(saved["length"])
    task.alphabet, task.pad, task.reward = saved["alphabet"], saved["pad"], None
    return task

# -----------------------------------------------------------------------------
# the report of a run, which train.py prints

def report(args, task, process, exact, reference, model, log):
    """Print each model's reward, KL to the pre-trained one and samples; save report.json."""
    held = task.held[:args.report_samples]
    n, few, k = len(held), len(held) // 4, 16
    prompts, n_before, rows = task.prompts(held), len(log.lines), {}
    print("report: n samples; mean reward, its standard error; KL to the pre-trained model, nats; "
          "share of\nthe n samples that are distinct; hamming: share of positions in which two "
          "samples differ;\na few samples. best of 16: the best of each 16 samples of the "
          "pre-trained model" + "; inner pads: share of\nsamples with a pad before their end"
          * bool(task.pad))

    def add(name, tokens, kl, **more):
        samples = task.strings(tokens)
        reward = log.query(task.reward, samples, stage=f"report {name}")
        error = reward.std().item() / math.sqrt(len(samples)) if len(samples) > 1 else None
        more |= diversity(task, samples) | measured(task, samples, catch=True)
        if task.pad:                                    # the reward does not see them
            inner = [task.pad in string.rstrip(task.pad) for string in task.decode(tokens)]
            more["inner pads"] = sum(inner) / len(inner)
        rows[name] = dict(n=len(samples), reward=reward.mean().item(), error=error, kl=kl, **more)
        cells = [f"{key} {value:.4g}" for key, value in rows[name].items() if value is not None]
        print(f"{name:12} " + "  ".join(cells), *samples[:4], sep="\n    ")

    add("data", held, None)
    for name, policy in (("pre-trained", reference), ("fine-tuned", model)):
        tokens, path = process.sample(policy, n, task.length, prompts)
        log_ratio = path.per_sequence(path.logp - process.logp(reference, path))
        truth = exact(model) if exact and policy is model else {}
        add(name, tokens, log_ratio.mean().item(), **truth)
    if few >= 16:
        prompts = prompts[:few].repeat_interleave(k, dim=0)
        many, _ = process.sample(reference, few * k, task.length, prompts)
        reward = log.query(task.reward, task.strings(many), stage="report 16").view(few, k)
        best = many.view(few, k, -1)[torch.arange(few), reward.argmax(dim=1)]
        add("best of 16", best, math.log(k) - (k - 1) / k)      # its KL is at most this
    else:
        print(f"best of 16 is not shown: {few} groups are too few; --report_samples=64 has 16")

    print(f"the report made {len(log.lines) - n_before:,} more queries (--report_samples=0: none)")
    (args.out / "report.json").write_text(json.dumps(rows, indent=2) + "\n")
    tuned, name = rows["fine-tuned"], "best of 16" if few >= 16 else "pre-trained"
    if tuned["reward"] < rows[name]["reward"] and tuned["kl"] > rows[name]["kl"] - 0.1:
        print(f"note: {name} has more reward, at no more KL: try more --iters, another --lr or "
              "--beta")
    if rows["fine-tuned"]["hamming"] < rows["pre-trained"]["hamming"] / 2:
        print("note: the samples have become much more alike. If that is not what you want, try a "
              "larger --beta, or a reward that forbids it")


def diversity(task, samples):
    """What shows that a reward is exploited: the share of distinct samples, and the mean share of
    positions in which two samples differ."""
    n = len(samples)
    one_hot = torch.nn.functional.one_hot(task.encode(samples), task.vocab_size).double()
    differ = (1 - one_hot.mean(dim=0).square().sum(dim=1)).mean() * n / max(1, n - 1)
    return dict(distinct=len(set(samples)) / n, hamming=differ.item())

# -----------------------------------------------------------------------------
# pictures

def plot_curve(args):
    """curve.png, from metrics.jsonl: six panels, of metrics against the number of queries, and of
    the reward against the KL that it costs."""
    from matplotlib.figure import Figure                # slow to import, so only when needed
    lines = [json.loads(line) for line in open(args.out / "metrics.jsonl")]
    lines = [line for line in lines if line["phase"] == "finetune"]
    panels = [["reward", "best", "exact_reward", "optimum_reward", "pretrained_reward"],
              ["reward"], ["kl", "exact_kl"], ["reward_std"], ["clip_fraction", "grad_norm"]]
    usual = {"phase", "iter", "queries"}.union(*panels)
    panels.append(sorted(set().union(*lines) - usual))  # the task's own columns
    figure = Figure(figsize=(13, 6))
    figure.suptitle(f"{args.task}, {args.algo}, beta {args.beta:g}; means over the policy's own "
                    "samples of a rollout")
    for i, (axis, keys) in enumerate(zip(figure.subplots(2, 3).flat, panels)):
        x = "kl" if i == 1 else "queries"
        for key in keys:
            points = [(line[x], line[key]) for line in lines if line.get(key) is not None]
            if points:
                label = key.replace("_", " ")
                axis.plot(*zip(*points), "." if i == 1 else ".-", ms=3, label=label)
        axis.set_xlabel("KL to the pre-trained model, nats" if i == 1 else "queries")
        if keys:
            axis.legend()
    figure.subplots_adjust(left=0.05, right=0.98, hspace=0.3)
    figure.savefig(args.out / "curve.png")


def histograms(drawn, file):
    from matplotlib.figure import Figure
    figure = Figure()
    axis = figure.subplots()
    axis.hist([rewards for _, rewards in drawn.values()], bins=30, label=list(drawn))
    axis.set_xlabel("reward")
    axis.legend()
    figure.savefig(file, dpi=110)


def movie(task, tokens, path, rewards, file):
    """A GIF of the reverse process of eight samples: a row per sample, a cell per position, grey
    while it is masked; the rewards come with the last state."""
    from matplotlib import colormaps
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.figure import Figure
    tokens = tokens[:8]
    states = [torch.cat((path.x[path.row == b], x0[None])) for b, x0 in enumerate(tokens)]
    last = max(map(len, states)) - 1
    figure = Figure(figsize=(min(12, 1 + 0.35 * task.length), 3.5))
    axis = figure.subplots()
    colours = colormaps["tab20"].resampled(task.vocab_size).with_extremes(over="0.9")

    def frame(j):
        state = torch.stack([rows[min(j, len(rows) - 1)] for rows in states])           # [8, L]
        axis.clear()
        axis.axis("off")
        axis.set_title(f"transition {j} of {last}")
        labels = [f"{reward:.2f} " if j == last else " " * 6 for reward in rewards[:8]]
        letters = [list(string.replace(task.blank, " ")) for string in task.decode(state)]
        axis.table(letters, colours(state.numpy(), alpha=0.8), cellLoc="center", rowLabels=labels,
                   bbox=[0.1, 0, 0.9, 1])

    frames = list(range(last + 1)) + [last] * 4         # hold the result for a while
    FuncAnimation(figure, frame, frames).save(file, writer=PillowWriter(fps=2))


if __name__ == "__main__":
    print_any_letter()
    main()
