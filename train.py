"""Pre-train a discrete diffusion model on a task's data, then fine-tune it on a black-box reward.

    python train.py --task=toy                      # under a minute on two CPU cores
    python train.py --task=toy --resume             # continue a stopped run, to the same numbers
    python train.py --task=dna --data=mine.fa --reward=my_reward.py:score --length=80 --crop
    torchrun --nproc_per_node=4 train.py --task=dna --prompts=4

A run writes to out/<task>: config.json, metrics.jsonl, curve.png, report.json, pretrained.pt,
finetuned.pt, and last.pt, the checkpoint that --resume continues from.
"""
import argparse
import json
import math
import os
import random
import signal
import sys
import time
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import sample
import sepo
from diffusion import SCHEDULES
from model import Config, Denoiser
from rewards import TASKS, BadInput, ask
from sample import HelpFormatter, flags_of

RANK = int(os.environ.get("RANK", 0))               # set by torchrun; without it, one process
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
MASTER = RANK == 0                                  # the process that logs, saves and reports

DEFAULTS = {                                        # that go with a choice of task, chain, method
    "toy": "--n_layer=2 --n_embd=64",
    "dna": "--n_layer=1 --n_embd=48 --conv=25 --pretrain_iters=1500 --pretrain_lr=4e-3 --steps=20 "
           "--group=64 --updates=8 --iters=100 --lr=3e-4 --eval_every=5",
    "arithmetic": "--n_layer=3 --pretrain_iters=3000 --pretrain_batch=256 --pretrain_lr=1e-3 "
                  "--data_size=200000 --prompts=16 --group=16 --updates=8 --iters=120 --lr=3e-4",
    "text": "--n_layer=2 --n_embd=96 --conv=7 --dropout=0.1 --pretrain_iters=2500 "
            "--pretrain_lr=3e-3 --data_size=100000 --clip=0.2 --updates=8 --path_events=2 "
            "--iters=80 --lr=2e-4 --beta=0.01 --eval_every=5",
    "uniform": "--steps=16 --pretrain_iters=2000 --pretrain_lr=1e-3 --iters=300",
    "cap": "--updates=4",
    "loop": "--advantage=loo --updates=8 --path_events=0",
    "prdp": "--updates=8 --path_events=0",
    "reinforce": "--advantage=running --updates=1 --path_events=0",
}

# -----------------------------------------------------------------------------
# training

def main(argv=None):
    args = parse_args(argv)
    try:
        run(args)
    except (BadInput, OSError) as error:                # what the user can fix
        print(f"train.py: {error}", file=sys.stderr)
        raise SystemExit(2)
    except KeyboardInterrupt as error:
        print(f"train.py: {str(error) or 'stopped'}", file=sys.stderr)
        raise SystemExit(130)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if dist.is_initialized():                       # its threads must not outlive the program
            dist.destroy_process_group()


def run(args):
    setup(args)
    torch.manual_seed(args.seed)                        # the same initial weights on every process
    task = sample.task_of(args)
    process = sample.CHAINS[args.process](task.vocab_size, args.schedule)

    # a new network, or one that was pre-trained before
    pretrained = args.out / "pretrained.pt"
    source = pretrained if args.resume and pretrained.exists() else args.init
    if source:
        model = load_pretrained(source, args, task)
    else:
        model = Denoiser(Config(task.vocab_size, task.length, args.n_layer, args.n_head,
                                args.n_embd, args.dropout, args.process == "uniform", args.conv))
    compiled(args, model).to(args.device)
    if args.dtype == "bfloat16" or args.dtype == "auto" and args.device == "cuda":
        model.autocast = torch.bfloat16

    generator = torch.Generator().manual_seed(args.seed)
    data = task.data(args.data_size, generator).to(args.device)                         # [n, L]
    if MASTER:
        n_rewards = args.iters * args.prompts * args.group
        print(f"{task.name}: {len(data):,} sequences of {task.length} letters {task.alphabet!r}; "
              f"asks for {n_rewards:,} rewards, besides evaluations; {args.device}; "
              f"results in {args.out}",
              file=sys.stderr)
    ask(task, data[:2])                                 # an error here costs less than later
    meta = dict(config=vars(model.config), flags=args.saved, alphabet=task.alphabet,
                prompts=task.prompts(sample.held_out_data(task, 256, args.seed)))
    open_out_dir(args)
    if not source:
        pretrain(args, task, process, model, data)
    save(pretrained, model=model, **meta)

    # fine-tune
    model.eval()                                        # no dropout: the ratio must start at 1
    reference = compiled(args, deepcopy(model).requires_grad_(False))
    exact = None                                        # ground truth, where the space is small
    if MASTER and task.is_small(args.steps):
        reward = partial(ask, task)
        exact = sepo.ground_truth(process, reference, reward, task.length, args.beta, args.steps)
    try:
        finetune(args, task, process, model, data, exact)
    finally:                                            # an error loses nothing that was learnt
        if args.restored:
            save(args.out / "finetuned.pt", model=model, **meta)
    if MASTER:
        signal.signal(signal.SIGINT, signal.default_int_handler)    # the run is complete by now
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        seed_everything(args, 2, 0)
        sample.plot_curve(args.out)
        if args.report_samples:
            sample.report(args, task, process, exact, reference, model)
        print(f"results are in {args.out}; next: python sample.py --run={args.out} --compare")


def load_pretrained(file, args, task):
    """The model of --init, or of the run to resume; BadInput if it does not fit the run."""
    model, run = sample.load_model(file)
    there = [run.alphabet, model.config.length, run.process, run.schedule]
    here = [task.alphabet, task.length, args.process, args.schedule]
    if here != there:
        raise BadInput(f"{file} holds a model of alphabet, length, process and schedule {there}: "
                       f"this run has {here}")
    return model


def pretrain(args, task, process, model, data):
    """Minimize the score entropy of the data, or of what the prompt leaves open if there is one."""
    optimizer = adamw(model, weight_decay=0.01)
    held_out = sample.held_out_data(task, 256, args.seed).to(args.device)
    batch = args.pretrain_batch // WORLD_SIZE
    state = dict(model=model, optimizer=optimizer)
    first = restore(args, "pretrain", state)

    def loss_of(x0):
        return process.loss(model, x0, given=task.given(x0) if task.given else None)

    bar = progress("pretrain", first, args.pretrain_iters)
    for i in bar:
        seed_everything(args, 0, i)
        lr = args.pretrain_lr * min((i + 1) / 50, decay(i, args.pretrain_iters))
        x0 = data[torch.randint(len(data), (batch,), device=args.device)]               # [B, L]
        for part in x0.split(args.micro_batch or batch):
            loss = loss_of(part) * len(part) / batch
            loss.backward()
        step(args, model, optimizer, lr)

        if (i + 1) % 50 == 0 or i + 1 == args.pretrain_iters:
            model.eval()
            with torch.no_grad():
                losses = average(dict(loss=loss_of(x0), held_out_loss=loss_of(held_out)))
            model.train()
            log(args, bar, optimizer, phase="pretrain", iter=i + 1, **losses)
        end_iteration(args, "pretrain", i, args.pretrain_iters, state)


def finetune(args, task, process, model, data, exact):
    """Roll out, ask for rewards, compute advantages, take a few optimizer steps; repeat."""
    optimizer = adamw(model, weight_decay=0.0)
    reference = compiled(args, deepcopy(model).requires_grad_(False))   # --ref_every moves it
    baseline = sepo.Baseline()
    P, G = args.prompts // WORLD_SIZE, args.group
    state = dict(model=model, reference=reference, optimizer=optimizer, baseline=baseline)
    first = restore(args, "finetune", state)

    bar = progress("finetune", first, args.iters)
    for i in bar:
        seed_everything(args, 1, i)
        model.passes = reference.passes = 0

        # 1. roll out the current policy: G samples for each of P prompts
        prompt = None
        if task.given:
            prompt = task.prompts(data[torch.randint(len(data), (P,), device=args.device)])
            prompt = prompt.repeat_interleave(G, dim=0)                                 # [P * G, L]
        path = process.sample(model, P * G, task.length, args.steps, prompt)
        if args.corrector_steps:
            path = process.corrected(model, path, args.corrector_steps, args.corrector_t,
                                     args.steps)

        # 2. ask the black box
        reward = ask(task, path.tokens).view(P, G)
        if MASTER and i == 0 and (reward == reward.median()).double().mean() > 0.9:
            print("warning: more than 90% of the first rollout's rewards are equal: a finer reward "
                  "or a larger --group would teach more", file=sys.stderr)

        # 3. what is each sample worth? its reward, minus beta times the KL that its path cost
        kl = process.path_kl(reference, path, args.micro_batch).view(P, G)  # nats
        beta = args.beta * min(1, (i + 1) / max(1, args.beta_warmup))
        cost = beta * kl if args.kl == "return" else 0
        returns, rewards = gather(reward - cost), gather(reward)            # of all processes
        scale = sepo.reward_scale(rewards, args.advantage, baseline, beta)
        advantage = sepo.advantages(returns, args.advantage, baseline, scale)
        advantage = advantage.chunk(WORLD_SIZE)[RANK].flatten()                         # [P * G]
        baseline.update(returns, rewards)

        # 4. take a few optimizer steps on this rollout (kept: what its first update draws for all)
        penalty = reference if args.kl == "loss" and beta else None
        rollout = SimpleNamespace(path=path, reward=reward, kl=kl, advantage=advantage, beta=beta,
                                  scale=scale, reference=penalty, kept=None)
        clipped = []
        for _ in range(args.updates):
            for loss, stats in policy_losses(args, process, model, rollout):
                loss.backward()
                clipped.append(stats["clip_fraction"])
            step(args, model, optimizer, args.lr * decay(i, args.iters))
        if args.ref_every and (i + 1) % args.ref_every == 0:
            reference.load_state_dict(model.state_dict())

        # 5. log, draw, save
        name = "kl_after_corrector" if args.corrector_steps else "kl"   # the path starts after it
        metrics = average({"reward": reward.mean(), "reward_std": reward.std(correction=0),
                           name: kl.mean(), "clip_fraction": torch.stack(clipped).mean()})
        metrics["queries"] = (i + 1) * args.prompts * G
        metrics["passes"] = (model.passes + reference.passes) * WORLD_SIZE
        if MASTER and ((i + 1) % args.eval_every == 0 or i + 1 == args.iters):
            metrics.update(sample.evaluate(args, task, process, exact, model, path.tokens))
        log(args, bar, optimizer, phase="finetune", iter=i + 1, **metrics)
        if MASTER and (i + 1) % 25 == 0:
            sample.plot_curve(args.out)
        end_iteration(args, "finetune", i, args.iters, state)


def policy_losses(args, process, model, rollout):
    """(loss, stats) of the chosen method at the current weights; micro-batches add up."""
    path, advantage, size = rollout.path, rollout.advantage, args.micro_batch
    if args.algo == "prdp":
        yield sepo.prdp_loss(process, model, path, rollout.reward, rollout.kl, rollout.beta,
                             args.clip, size)
        return
    if args.states == "neighbours":
        with torch.no_grad():
            rollout.kept = rollout.kept or sepo.neighbours(process, model, path)
        yield sepo.neighbours_loss(process, model, path, advantage, rollout.kept, args.clip)
        return
    if args.states in ("noised", "terminal"):           # the same states in every update
        rollout.kept = rollout.kept or sepo.draw_view(process, path, args.states).split(size)
        views = rollout.kept
    elif args.path_events == 0:                         # every event of every path
        views = path.views(size)
    else:
        views = process.path_view(path, args.path_events).split(size)
    for view in views:
        if args.algo == "sepo":
            yield sepo.sepo_loss(process, model, path, advantage, args.states, args.clip,
                                 args.clip_mode, view, args.consistency, args.entropy,
                                 rollout.reference, rollout.beta / rollout.scale)
        else:                                           # reinforce is loop without a clip
            clip = args.clip if args.algo == "loop" else math.inf
            yield sepo.loop_loss(process, model, path, advantage, clip, view)

# -----------------------------------------------------------------------------
# optimizer steps, processes, seeds

def adamw(model, weight_decay):
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=weight_decay, fused=True)
    optimizer.skipped = 0                               # updates in a row
    return optimizer


def decay(i, total):
    """Linear, to 5% of the initial learning rate."""
    return max(0.05, 1 - i / total)


def step(args, model, optimizer, lr):
    """Average the gradients over the processes, clip them, and step, unless they are not finite."""
    optimizer.param_groups[0]["lr"] = lr
    for p in model.parameters():
        average_(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
    # fused AdamW skips the step where found_inf is set (GradScaler's hook): no wait for the host
    optimizer.found_inf = (~norm.isfinite()).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    optimizer.skipped = (optimizer.skipped + 1) * optimizer.found_inf


def compiled(args, model):
    """With --compile, its blocks compiled in place (a deep copy loses that)."""
    if args.compile:
        for block in model.blocks:
            block.compile(dynamic=True)                 # batch and slots shrink from pass to pass
    return model


def setup(args):
    """Device, processes and signals."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    args.stop = False
    args.restored = False                               # else the model is not what was learnt

    def on_signal(*_):                                  # finish the iteration, save, stop
        if args.stop and WORLD_SIZE == 1:
            raise KeyboardInterrupt("stopped at once")  # the second Ctrl-C
        args.stop = True
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)


def seed_everything(args, phase, i):
    """Each iteration has its own seed, so a resumed run draws exactly what the whole run would."""
    sequence = np.random.SeedSequence([args.seed, phase, i, RANK])
    seed = int(sequence.generate_state(1)[0])
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def gather(rows):
    """[P, G] of each process -> [P * WORLD_SIZE, G]."""
    if WORLD_SIZE == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(WORLD_SIZE)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def average_(tensor):
    """In place: the mean over the processes; None stays None."""
    if WORLD_SIZE > 1 and tensor is not None:
        dist.all_reduce(tensor)
        tensor /= WORLD_SIZE
    return tensor


def average(scalars):
    """{name: tensor} -> {name: float}, means over the processes."""
    values = torch.stack([value.detach().float() for value in scalars.values()])
    return dict(zip(scalars, average_(values).tolist()))

# -----------------------------------------------------------------------------
# log and checkpoints

def progress(name, first, total):
    return tqdm(range(first, total), name, total, initial=first, disable=not MASTER, mininterval=1)


def log(args, bar, optimizer, **metrics):
    """Append a line to metrics.jsonl."""
    if optimizer.skipped >= 20:
        raise BadInput("20 updates in a row were not finite: try a smaller learning rate")
    if MASTER:
        shown = {"loss", "reward", "kl", "share_of_optimum"} & metrics.keys()
        bar.set_postfix({name: metrics[name] for name in sorted(shown)}, refresh=False)
        with open(args.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")


def open_out_dir(args):
    """Start with a new folder, but for --resume."""
    if MASTER and not args.resume:
        args.out.mkdir(parents=True, exist_ok=True)
        for name in ("pretrained.pt", "finetuned.pt", "last.pt", "report.json", "curve.png"):
            (args.out / name).unlink(missing_ok=True)
        (args.out / "metrics.jsonl").write_text("")
        writing = args.out / "config.part"
        writing.write_text(json.dumps(args.saved, indent=2) + "\n")
        os.replace(writing, args.out / "config.json")   # whole, or not there


def restore(args, phase, state):
    """On --resume, load what last.pt holds of a phase -> its first iteration that is left."""
    last, checkpoint = args.out / "last.pt", dict(phase="", log_size=0)
    if args.resume and last.exists():
        checkpoint = sample.load(last)
    first = 0
    try:
        if checkpoint["phase"] == phase:
            first = checkpoint["iter"]
            for name, part in state.items():
                part.load_state_dict(checkpoint[name])
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise BadInput(f"{last} belongs to a run of another shape") from error
    if args.resume and MASTER:                          # what was logged after that is forgotten
        os.truncate(args.out / "metrics.jsonl", checkpoint["log_size"])
    args.restored = True
    return first


def end_iteration(args, phase, i, total, state):
    """Save last.pt if it is time to, or at the end, or if Ctrl-C was pressed; then stop."""
    stop = args.stop
    if WORLD_SIZE > 1:                                  # all processes stop at the same iteration
        stop = gather(torch.tensor([stop], device=args.device)).any()
    last = args.out / "last.pt"
    is_due = not last.exists() or time.time() - last.stat().st_mtime >= args.save_every
    if MASTER and (stop or is_due or i + 1 == total):
        log_size = (args.out / "metrics.jsonl").stat().st_size
        save(last, phase=phase, iter=i + 1, log_size=log_size, **state)
    if stop:
        raise KeyboardInterrupt("stopped: the same command with --resume continues")


def save(file, **parts):
    """Write under a temporary name, then rename: a kill at any moment leaves the last good file."""
    if MASTER:
        plain = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in parts.items()}
        writing = file.with_suffix(".part")
        torch.save(plain, writing)
        os.replace(writing, file)

# -----------------------------------------------------------------------------
# flags

def get_parser():
    epilog = "defaults that depend on task, process, method or clip mode:"
    for name, flags in DEFAULTS.items():
        epilog += f"\n  {name}: {flags}"
    parser = argparse.ArgumentParser(usage="train.py [--flag=value ...]", description=__doc__,
                                     epilog=epilog, formatter_class=HelpFormatter,
                                     allow_abbrev=False)
    add = flags_of(parser, "the run")
    add("--task", list(TASKS), "what to learn")
    add("--out", "", "folder for the results (empty: out/<task>)")
    add("--seed", 0, "seed of every random draw")
    add("--resume", False, "continue the run in --out with its own flags")
    add("--overwrite", False, "replace the run in --out")
    add("--save_every", 30, "seconds between two saves of last.pt")
    add = flags_of(parser, "your own data, reward and model")
    add("--data", None, "file to pre-train on: FASTA or one sequence per line; for --task=text one "
        "running text, unless --pad or --crop is given; .gz too")
    add("--length", 0, "sequence length (0: the task's)")
    add("--pad", "", "letter that fills up short sequences of --data")
    add("--crop", False, "cut random windows from long sequences of --data")
    add("--reward", None, "file.py:function, list[str] -> list[float]; the file's measure, "
        "list[str] -> {column: number}, adds columns to the report")
    add("--init", None, "a pretrained.pt or finetuned.pt to start from: no pre-training, and the "
        "network has its size")
    add = flags_of(parser, "system")
    add("--device", ["auto", "cpu", "cuda"], "auto: cuda if present")
    add("--dtype", ["auto", "float32", "bfloat16"], "of matrix products; auto: bfloat16 on cuda")
    add("--compile", False, "torch.compile the transformer blocks")
    add("--micro_batch", 0, "states per backward pass (0: all; loop, prdp: one per sample)")
    add = flags_of(parser, "noise")
    add("--process", list(sample.CHAINS), "noise: masks or random letters")
    add("--schedule", list(SCHEDULES), "noise level over time")
    add = flags_of(parser, "model")
    add("--n_layer", 4, "transformer blocks", low=1)
    add("--n_head", 4, "attention heads", low=1)
    add("--n_embd", 128, "channels of the residual stream", low=1)
    add("--conv", 0, "width of a convolution on the embeddings (0: none)")
    add("--dropout", 0.0, "dropout, during pre-training only", below=1)
    add = flags_of(parser, "pre-training")
    add("--pretrain_iters", 800, "optimizer steps", low=1)
    add("--pretrain_batch", 128, "sequences per step", low=1)
    add("--pretrain_lr", 2e-3, "peak learning rate")
    add("--data_size", 20000, "sequences to generate, or windows to cut", low=1)
    add = flags_of(parser, "sampling")
    add("--steps", 0, "steps of the time grid (0: none; absorb only)")
    add("--corrector_steps", 0, "moves of the corrector, which pulls samples towards the model's "
        "law, per rollout")
    add("--corrector_t", 0.5, "time at which the corrector runs", low=0.001, below=1)
    add = flags_of(parser, "fine-tuning")
    add("--algo", ["sepo", "loop", "prdp", "reinforce"], "method")
    add("--iters", 100, "rollouts", low=1)
    add("--prompts", 1, "prompts per rollout (P)", low=1)
    add("--group", 128, "samples per prompt (G)", low=1)
    add("--updates", 16, "optimizer steps per rollout", low=1)
    add("--lr --learning_rate", 1e-3, "initial learning rate; decays linearly to 5%%")
    add("--states", ["path", "noised", "terminal", "neighbours"],
        "where SEPO takes the score; neighbours: its published estimator")
    add("--path_events", 1, "events scored per path and update (0: all)")
    add("--advantage", ["grpo", "dr_grpo", "loo", "ppo", "running"], "advantage estimator")
    add("--clip", 0.1, "clip of the ratio; prdp: of an event's log-ratio")
    add("--clip_mode", ["stop", "cap"],
        "stop: PPO's clip; cap: SEPO's own, a capped and detached coefficient")
    add("--beta", 0.1, "KL weight: how much reward one nat of KL must bring; try a tenth to a half "
        "of the spread of your rewards")
    add("--beta_warmup", 0, "rollouts over which beta grows from 0")
    add("--kl", ["return", "loss"],
        "the KL in the return of each path, or in closed form in sepo's loss")
    add("--ref_every", 0, "rollouts between updates of the KL reference")
    add("--consistency", 0.0, "weight of the likelihood of own samples, for --states=noised: try "
        "0.3")
    add("--entropy", 0.0, "weight of the entropy bonus")
    add("--grad_clip", 1.0, "largest gradient norm", low=0.001)
    add = flags_of(parser, "evaluation")
    add("--eval_every", 10, "rollouts between evaluations", low=1)
    add("--report_samples", 1000, "samples per model in the final report, at most the held-out "
        "ones; 0: no report")
    return parser


def parse_args(argv=None):
    """Flags; defaults depend on task, process and algorithm, or on the run to resume."""
    parser = get_parser()
    args = parser.parse_args(argv)
    out = Path(args.out or f"out/{args.task}")
    config = out / "config.json"
    fixed = {}                                          # flags that must stay as they were
    if args.resume and not config.exists():
        parser.error(f"--resume: {out} holds no run")
    elif args.resume:
        fixed = json.loads(config.read_text())
    elif config.exists() and not args.overwrite:
        parser.error(f"{out} holds another run: use --resume, --overwrite or another --out")
    chosen = (args.task, args.process, args.algo, args.clip_mode)
    defaults = parser.parse_args(" ".join(DEFAULTS.get(name, "") for name in chosen).split())
    vars(defaults).update(fixed)
    args = parser.parse_args(argv, defaults)
    args.processes = WORLD_SIZE
    for name, value in fixed.items():
        if getattr(args, name) != value and name != "save_every":
            parser.error(f"{name}={getattr(args, name)}: the run in {out} has {value}")
    check_combinations(parser, args)

    passing = ("resume", "overwrite", "out")
    args.saved = {name: value for name, value in vars(args).items() if name not in passing}
    args.out = out
    return args


def check_combinations(parser, args):
    uniform = args.process == "uniform"
    options = args.kl != "return" or args.consistency or args.entropy or args.clip_mode != "stop"
    for wrong, message in [
        (args.device == "cuda" and not torch.cuda.is_available(),
         "--device=cuda: torch sees no CUDA device; use --device=cpu"),
        (args.prompts % WORLD_SIZE or args.pretrain_batch % WORLD_SIZE,
         f"--prompts and --pretrain_batch must be multiples of {WORLD_SIZE}"),
        (args.n_embd % args.n_head or args.n_embd % 2,
         "--n_embd must be even and a multiple of --n_head"),
        (uniform and args.states == "noised", "--states=noised needs masks: use --process=absorb"),
        (uniform and not args.steps, "--process=uniform needs a time grid: try --steps=16"),
        (args.group == 1 and args.advantage in ("grpo", "dr_grpo", "loo"),
         "--group=1 leaves nothing to compare a sample with: add --advantage=running"),
        (args.consistency and args.states != "noised", "--consistency is for --states=noised"),
        (args.algo == "prdp" and (args.path_events or args.group == 1 or not args.beta),
         "--algo=prdp needs --path_events=0, --group above 1 and --beta above 0"),
        (args.algo != "sepo" and (options or args.states != "path"),
         f"--states, --kl, --consistency, --entropy and --clip_mode do not apply to {args.algo}"),
        (args.states == "neighbours" and (options or args.micro_batch),
         "--states=neighbours has no --kl, --consistency, --entropy, --clip_mode or --micro_batch"),
    ]:
        if wrong:
            parser.error(message)


if __name__ == "__main__":
    main()
