"""Sample from a run of train.py, score the samples, and show what fine-tuning changed.

    python sample.py --run=out/toy                         ten samples with their rewards, on standard output
    python sample.py --run=out/toy --compare               pre-trained beside fine-tuned
    python sample.py --run=out/toy --movie=denoise.gif     the reverse process, slot by slot
    python sample.py --run=out/toy --n=1000 --format=fasta --out=samples.fasta

Samples go to standard output or --out; everything else goes to standard error.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path as File

import torch

from rewards import TASKS, BadInput, ask, open_task
from train import Flags, build, flag, held_data, load, parse, pick_device, restore, run


@dataclass
class Options:
    run: str = flag("out/toy", "folder of a run of train.py")
    which: str = flag("newest", "which of its models", choices=["newest", "pretrained", "finetuned"])
    n: int = flag(10, "samples", low=1)
    steps: int = flag(-1, "grid of the reverse process; -1: as the run had it; 0: none (absorb only)", low=-1)
    prompt: str = flag("", "letters that are given, _ where a slot is free: TC____ (default: the task's held-out prompts)")
    temperature: float = flag(1.0, "divides the logits: below 1 sharper, above 1 flatter", low=0.01, high=100)
    corrector_steps: int = flag(0, "moves of the corrector", low=0)
    corrector_t: float = flag(0.5, "time at which the reverse process pauses for the corrector", low=0.01, high=0.99)
    seed: int = flag(0, "seed of every random draw", low=0, high=2 ** 32 - 1)
    format: str = flag("text", "of the samples", choices=["text", "fasta", "jsonl"])
    out: str = flag("", "file for the samples (default: standard output)")
    compare: bool = flag(False, "the pre-trained model's samples beside the fine-tuned one's")
    movie: str = flag("", "file.gif: the reverse process of a few samples")
    plot: str = flag("", "file.png: rewards of a thousand samples before and after fine-tuning")
    batch: int = flag(256, "samples drawn at a time", low=1)
    device: str = flag("auto", "cpu, cuda, or auto: cuda where there is one", choices=["auto", "cpu", "cuda"])


def main(argv=None):
    options = Options(**parse(sys.argv[1:] if argv is None else argv, Options, __doc__))
    folder, flags = File(options.run), run_flags(options)
    task = open_task(flags.task, flags.length, flags.data, flags.pad, flags.crop, flags.reward)
    model, process = build(flags, task, pick_device(options.device))
    head = model.head
    model.head = lambda h: head(h) / options.temperature
    prompts = read_prompts(task, options)
    if task.oracle is not None:
        restore(folder / "oracle.pt", task.oracle)

    def draw(name, n):
        """n samples of one of the run's models -> (the first batch's path, tokens [n, L], rewards [n])."""
        load(folder / f"{name}.pt", task, process, model)
        model.eval()
        torch.manual_seed(options.seed)
        first, tokens, rewards = None, [], []
        for size in [options.batch] * (n // options.batch) + [n % options.batch] * (n % options.batch > 0):
            given = None if prompts is None else prompts[torch.arange(size) % len(prompts)]
            path = process.sample(model, size, task.length, flags.steps or None, given, None, options.corrector_steps,
                                  options.corrector_t)
            first = first or path
            tokens.append(path.tokens)
            rewards.append(ask(task, path.tokens))
        return first, torch.cat(tokens), torch.cat(rewards)

    both = ("pretrained", "finetuned")
    if options.plot:
        histogram({name: draw(name, max(options.n, 1000))[2] for name in both}, options.plot)
    if options.compare:
        return emit(options, side_by_side(task, {name: draw(name, options.n)[1:] for name in both}))
    name = options.which if options.which != "newest" else newest(folder)
    path, tokens, rewards = draw(name, options.n)
    if options.movie:
        movie(task, path, options.movie)
    print(f"{folder}/{name}.pt: {len(tokens)} samples, {len(tokens.unique(dim=0))} distinct, mean reward "
          f"{rewards.mean().item():.3f}", file=sys.stderr)
    emit(options, written(options.format, task.decode(tokens), rewards.tolist()))      # last: its reader may leave early


# ---- what was asked for -------------------------------------------------------------------------------------------------

def run_flags(options):
    """The flags of the run, with the grid that was asked for."""
    folder = File(options.run)
    for name, ending in (("movie", ".gif"), ("plot", ".png")):
        if getattr(options, name) and File(getattr(options, name)).suffix != ending:
            raise BadInput(f"--{name}={getattr(options, name)}: a name that ends in {ending} is needed")
    if options.movie and options.compare:
        raise BadInput("--movie shows one model: use it without --compare")
    if options.compare and options.format != "text":
        raise BadInput(f"--compare prints a table: --format={options.format} is for one model")
    try:
        flags = Flags(**json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError):
        raise BadInput(f"--run={folder} holds no run of train.py") from None
    if flags.task not in TASKS:
        raise BadInput(f"--run={folder}: its task {flags.task!r} is not in rewards.TASKS")
    flags.cuda_graph = flags.compile = False   # another machine may have neither, and a few samples gain nothing
    if options.steps >= 0:
        flags.steps = options.steps
    return flags


def newest(folder):
    for name in ("finetuned", "pretrained"):
        if (folder / f"{name}.pt").exists():
            return name
    raise BadInput(f"--run={folder} holds no model yet: its pre-training has not ended")


def read_prompts(task, options):
    """--prompt, or else the task's held-out prompts -> tokens [m, L], the mask where a slot is free; None for no prompt."""
    text = options.prompt
    if not text:
        return task.prompts(held_data(task, min(options.n, options.batch), options.seed)) if task.given else None
    if len(text) != task.length:
        raise BadInput(f"--prompt={text} has {len(text)} letters: {task.name} has {task.length} slots ({task.blank} where one "
                       "is free)")
    return task.encode([text])


# ---- text -----------------------------------------------------------------------------------------------------------------

def written(form, samples, rewards):
    """Samples and their rewards as lines of text, FASTA or JSON."""
    for i, (sample, reward) in enumerate(zip(samples, rewards), 1):
        if form == "fasta":
            yield f">sample_{i} reward={reward:.4g}\n{sample}"
        elif form == "jsonl":
            yield json.dumps({"sample": sample, "reward": reward})
        else:
            yield f"{reward:8.4f}  {sample}"


def side_by_side(task, columns):
    """Lines of a table: a column of samples and rewards for each model, and the mean rewards below."""
    width = max(task.length, 12)
    yield "    ".join(f"{'reward':>8}  {name:{width}}" for name in columns).rstrip()
    for row in zip(*[list(zip(task.decode(tokens), rewards.tolist())) for tokens, rewards in columns.values()]):
        yield "    ".join(f"{reward:8.4f}  {sample:{width}}" for sample, reward in row).rstrip()
    yield "    ".join(f"{rewards.mean().item():8.4f}  {'mean':{width}}" for _, rewards in columns.values()).rstrip()


def emit(options, lines):
    """Lines to --out, or to standard output."""
    if not options.out:
        return print("\n".join(lines), flush=True)
    try:
        File(options.out).write_text("\n".join(lines) + "\n")
    except OSError as error:
        raise BadInput(f"cannot write to --out={options.out}: {error.strerror}") from error


# ---- pictures -------------------------------------------------------------------------------------------------------------

def canvas():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def stored(picture, file):
    try:
        picture(file)
    except OSError as error:
        raise BadInput(f"cannot write {file}: {error.strerror or error}") from error
    print(f"wrote {file}", file=sys.stderr)


def movie(task, path, file, rows=8):
    """A GIF of the reverse process: a row for each sample, a cell for each slot, grey while it is masked; what has just
    changed is framed."""
    plt = canvas()
    from matplotlib.animation import FuncAnimation, PillowWriter
    last = int(path.n_events[:rows].max())
    states = torch.stack([path.state(j)[:rows] for j in range(last + 1)]).cpu()                      # [events + 1, rows, L]
    colours = plt.get_cmap("tab20" if task.vocab_size > 10 else "tab10")
    figure, axis = plt.subplots(figsize=(min(12, 1 + 0.35 * task.length), 0.5 + 0.4 * states.size(1)))

    def frame(j):
        axis.clear()
        axis.axis("off")
        axis.set(xlim=(0, task.length), ylim=(states.size(1), -0.6))
        axis.text(0, -0.2, f"state {j} of {last}", fontsize=8)
        for b, row in enumerate(states[j].tolist()):
            for i, v in enumerate(row):
                new = j > 0 and v != states[j - 1, b, i]
                axis.add_patch(plt.Rectangle((i + 0.05, b + 0.05), 0.9, 0.9, ec="black" if new else "none", lw=1.5,
                                             fc="0.9" if v == task.vocab_size else colours(v % colours.N), alpha=0.8))
                if v < task.vocab_size and task.length <= 64:
                    axis.text(i + 0.5, b + 0.52, task.alphabet[v], ha="center", va="center", fontsize=9)
    frames = [*range(last + 1)] + [last] * 4           # the result stands for a while
    stored(lambda name: FuncAnimation(figure, frame, frames).save(name, writer=PillowWriter(fps=2)), file)
    plt.close(figure)


def histogram(rewards, file):
    """Rewards of each model's samples as two histograms over one axis."""
    plt = canvas()
    figure, axis = plt.subplots(figsize=(6, 3.6))
    everything = torch.cat(list(rewards.values()))
    span = everything.min().item(), everything.max().item() + 1e-6
    for name, r in rewards.items():
        axis.hist(r.tolist(), bins=30, range=span, alpha=0.6, label=f"{name}: mean {r.mean().item():.3f}")
    axis.set(xlabel="reward", ylabel=f"of {len(r)} samples")
    axis.legend(fontsize=8)
    figure.tight_layout()
    stored(lambda name: figure.savefig(name, dpi=110), file)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
