"""Pre-train a discrete diffusion model on a task's data, then fine-tune it on a black-box reward.

    python train.py --task=toy                      # under a minute on two CPU cores
    python train.py --task=toy --resume             # continue a stopped run, to the same numbers
    python train.py --data=mine.fa --reward=my_reward.py:score
    torchrun --nproc_per_node=4 train.py --task=dna --prompts=4

A run writes to out/<task>: config.json, metrics.jsonl, curve.png, report.json, pretrained.pt,
finetuned.pt, rewards.jsonl, which keeps every reward that was asked, and last.pt, the checkpoint
that --resume continues from.
"""
import argparse
import json
import math
import os
import random
import sys
import time
import zlib
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn         # see setup
from tqdm import tqdm

import sample
import sepo
from diffusion import CHAINS
from model import Config, Denoiser
from rewards import TASKS, BadInput, Paid, Rollout, ask, open_task, read_known
from sample import HelpFormatter, number

RANK = int(os.environ.get("RANK", 0))               # set by torchrun; without it, one process
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
MASTER = RANK == 0                                  # the process that logs, saves and reports

DEFAULTS = {                                        # that go with a task, process or method
    "toy": dict(n_layer=2, n_embd=64, iters=80, replay=15, path_events=0, eval_every=8),
    "dna": dict(n_layer=1, n_embd=48, conv=25, pretrain_iters=1500, pretrain_lr=4e-3, steps=20,
                iters=40, lr=3e-4, replay=15, path_events=0, eval_every=5),
    "arithmetic": dict(n_layer=3, pretrain_iters=3000, pretrain_batch=256, pretrain_lr=1e-3,
                       data_size=200_000, prompts=64, group=4, iters=40, lr=2e-4, path_events=0,
                       eval_every=2),
    "text": dict(n_layer=2, n_embd=96, conv=7, dropout=0.1, pretrain_iters=2500, pretrain_lr=3e-3,
                 data_size=100_000, group=64, iters=80, beta=0.01, algo="wdce", explore=0.5,
                 eval_every=5),
    "ehrlich": dict(n_layer=2, n_embd=96, pretrain_iters=2000, group=64, iters=100, beta=0.002,
                    algo="wdce", explore=0.5, eval_every=5),
    "own": dict(n_layer=2, n_embd=64, dropout=0.1, pretrain_iters=1000, lr=3e-4),
    "own, from 100 kB of data on": dict(n_layer=4, conv=7, pretrain_iters=6000, pretrain_batch=64,
                                        lr=3e-4),
    "uniform": dict(pretrain_iters=2000, pretrain_lr=1e-3),
    "loop": dict(path_events=0),
    "reinforce": dict(advantage="running", path_events=0, replay=0, clip=math.inf),
    "wdce": dict(updates=16, replay=0),
    "published": dict(updates=4, replay=0),
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
    except KeyboardInterrupt:
        print("train.py: stopped; the same command with --resume continues", file=sys.stderr)
        raise SystemExit(130)
    finally:
        if dist.is_initialized():                       # its threads must not outlive the program
            dist.destroy_process_group()


def run(args):
    device, autocast = setup(args)
    torch.manual_seed(args.seed)                        # the same initial weights on every process
    task = open_task(args.task, args.length, args.data, args.pad, args.crop, args.reward,
                     args.format)
    process = CHAINS[args.process](task.vocab_size)

    # a new network, or one that was pre-trained before
    pretrained = args.out / "pretrained.pt"
    source = pretrained if args.resume and pretrained.exists() else args.init
    if source:
        model = load_pretrained(source, args, task, autocast)
    else:
        config = Config(task.vocab_size, task.length, args.n_layer, args.n_head, args.n_embd,
                        args.dropout, args.process == "uniform", args.conv)
        model = Denoiser(config, autocast)
    compiled(args, model).to(device)

    data = task.data(args.data_size, torch.Generator().manual_seed(args.seed)).to(device)   # [n, L]
    if task.given and (args.explore or args.algo == "wdce"):
        raise BadInput("--explore and --algo=wdce are for tasks without prompts")
    is_exact = (task.given is None and args.task != "own"
                and process.is_small(task.length, args.steps))
    if MASTER:
        announce(args, task, data, device, task.vocab_size ** task.length if is_exact else 0)
    known = read_known(task, args.known, args.group) if args.known else []
    probe = data[:2].unique(dim=0).flip(0)              # not in order: a reward may sort its list
    if not args.resume:                                 # fail before pre-training
        checked = ask(task, probe, args.on_error).tolist()
        task.measure(probe)
    open_out_dir(args)
    paid = Paid(args.out / "rewards.jsonl", RANK, args.on_error, task.pad)
    if not args.resume:
        paid.reward_of |= zip(task.samples(probe), checked)
        paid.ask(task, probe, stage="check")
    for rollout in known:                               # is not asked again, either
        paid.reward_of |= zip(task.samples(rollout.tokens), rollout.reward.flatten().tolist())
    if not source:
        pretrain(args, task, process, model, data)
    save_model(args, task, model, "pretrained.pt")

    # fine-tune
    model.eval()                                        # no dropout: the ratio must start at 1
    reference = compiled(args, deepcopy(model).requires_grad_(False))
    exact = None                                        # ground truth, where the space is small
    if MASTER and is_exact:
        reward = partial(paid.ask, task, stage="optimum")
        exact = sepo.ground_truth(process, reference, reward, task.length, args.beta, args.steps)
    try:
        finetune(args, task, process, model, reference, data, exact, paid, known)
    except KeyboardInterrupt:                           # save the weights so far
        save_model(args, task, model, "finetuned.pt")
        raise
    save_model(args, task, model, "finetuned.pt")
    if MASTER:
        seed_everything(args, 2, 0)
        if args.report_samples:
            sample.report(args, task, process, exact, reference, model, paid)
        print(f"results are in {args.out}; next: python sample.py --run={args.out} --compare")


def announce(args, task, data, device, n_optimum):
    """Print the task, the method and the largest number of rewards, before any is asked."""
    reward = os.path.relpath(args.reward) if args.reward else f"the one built into {args.task}"
    rollouts = args.iters * args.prompts * args.group
    evaluations = 256 * math.ceil(args.iters / args.eval_every) if task.given else 0
    samples = args.report_samples
    counts = {"in rollouts": rollouts, "in evaluations": evaluations,
              "for the exact optimum": n_optimum,
              "in the report": 3 * samples + 17 * max(1, samples // 4) if samples else 0}
    cost = ", ".join(f"{n:,} {where}" for where, n in counts.items() if n)
    held = len(task.held_out(max(256, samples), args.seed)) if task.held else 0
    print(f"task {args.task}: {len(data):,} sequences of {task.length} letters {task.alphabet!r}, "
          f"{held:,} others held out\n"
          f"reward: {reward}, asked for at most {sum(counts.values()) + 2:,} samples: {cost}\n"
          f"method {args.algo}, beta {args.beta:g}; {device}; results in {args.out}",
          file=sys.stderr)


def load_pretrained(file, args, task, autocast):
    """The model of --init, or of the run to resume; BadInput if it does not fit the run."""
    model, run = sample.load_model(file, autocast)
    there = [run.alphabet, model.config.length, run.process]
    here = [task.alphabet, task.length, args.process]
    if here != there:
        raise BadInput(f"{file} holds a model of alphabet, length and process {there}: "
                       f"this run has {here}")
    return model


def pretrain(args, task, process, model, data):
    """Minimize the score entropy of the data, or of what the prompt leaves open if there is one."""
    optimizer = adamw(model, weight_decay=0.01)
    held_out = task.held_out(256, args.seed).to(data.device)
    batch = args.pretrain_batch // WORLD_SIZE
    saved = dict(model=model, optimizer=optimizer)
    first = restore(args, "pretrain", saved)

    def loss_of(x0):
        return process.loss(model, x0, task.slots_given(x0))

    bar = progress("pretrain", first, args.pretrain_iters)
    for i in bar:
        seed_everything(args, 0, i)
        lr = args.pretrain_lr * min((i + 1) / 50, decay(i, args.pretrain_iters))
        x0 = data[torch.randint(len(data), (batch,), device=data.device)]               # [B, L]
        for part in x0.split(args.micro_batch or batch):
            loss = loss_of(part) * len(part) / batch
            loss.backward()
        norm = step(model, optimizer, lr)

        if (i + 1) % 50 == 0 or i + 1 == args.pretrain_iters:
            model.eval()
            with torch.no_grad():
                losses = dict(loss=loss_of(x0), held_out_loss=loss_of(held_out), grad_norm=norm)
            model.train()
            log(args, bar, phase="pretrain", iter=i + 1, **average(losses))
        end_iteration(args, task, "pretrain", i, args.pretrain_iters, saved)


def finetune(args, task, process, model, reference, data, exact, paid, known):
    """Roll out, ask for rewards, learn from the new samples and from remembered ones; repeat."""
    optimizer, baseline = adamw(model, weight_decay=0.0), sepo.Baseline()
    P, G = args.prompts // WORLD_SIZE, args.group
    saved = dict(model=model, optimizer=optimizer, baseline=baseline)
    first = restore(args, "finetune", saved)
    known = known[RANK::WORLD_SIZE]
    buffer = known + [paid.recall(task, i, G, P * G) for i in range(1, first + 1)]
    buffer = [Rollout(*(x.to(data.device) for x in vars(old).values())) for old in buffer]
    buffer[:len(known)] = [score_known(args, task, process, reference, old)
                           for old in buffer[:len(known)]]
    bar = progress("finetune", first, args.iters)
    for i in bar:
        seed_everything(args, 1, i)

        # 1. roll out the current policy: G samples for each of P prompts
        path = roll_out(args, task, process, model, data, buffer)
        kl = process.path_kl(reference, path, args.micro_batch)             # [P * G] nats

        # 2. ask for the rewards, and remember the rollout
        log_ref = path.logp.flatten(1).sum(dim=1) - kl
        reward = paid.ask(task, path.tokens, iter=i + 1, kl=kl, log_ref=log_ref)
        new = Rollout(path.tokens, *(x.view(P, G) for x in (reward, kl, log_ref)))
        buffer.append(new)
        if MASTER and i == 0:
            advise(args, new.reward)

        rollout, clipped, norms = new, [], []
        for k in range(1 + args.replay):
            if k > 0:                                   # a remembered rollout, along new paths
                rollout = random.choice(buffer)
                path = new_path(args, task, process, model, rollout.tokens)
                kl = process.path_kl(reference, path, args.micro_batch)

            # 3. what is each sample worth? its reward, minus beta times the KL that its path cost
            reward = rollout.reward                                         # [P, G]
            kl = kl.view_as(reward)                                         # [P, G] nats
            returns = reward - args.beta * kl
            variance = sepo.reward_scale(reward, args.advantage, args.beta).square()
            scale = average_(variance).sqrt()           # pooled over the processes
            A = sepo.advantages(returns, args.advantage, baseline, scale).flatten()     # [P * G]

            # 4. take a few optimizer steps along these paths
            for parts in draw_updates(args, process, model, path, buffer):
                for part in parts:
                    loss, clip_fraction = loss_of(args, process, model, part, A, reward, kl)
                    loss.backward()
                    clipped.append(clip_fraction)
                norms.append(step(model, optimizer, args.lr * decay(i, args.iters)))

        # 5. log, draw, save
        baseline.update(average_((new.reward - args.beta * new.kl).mean()))
        metrics = summary(new, paid, sum(clipped) / len(norms), torch.stack(norms).mean())
        if MASTER and ((i + 1) % args.eval_every == 0 or i + 1 == args.iters):
            metrics |= (exact(model) if exact else
                        sample.evaluate(args, task, process, model, new.tokens, paid, i + 1))
        log(args, bar, phase="finetune", iter=i + 1, **metrics)
        end_iteration(args, task, "finetune", i, args.iters, saved)


def loss_of(args, process, model, part, A, reward, kl):
    """The method's loss of one micro-batch, with advantages A [P * G] -> (loss, clip_fraction)."""
    if args.algo == "prdp":
        return sepo.prdp_loss(process, model, part, reward, kl, args.beta, args.clip,
                              args.micro_batch)
    if args.algo == "wdce":
        return sepo.wdce_loss(process, model, *part)
    if args.algo == "sepo":
        return sepo.sepo_loss(process, model, part, A, args.clip, args.clip_mode)
    loss = sepo.published_loss if args.algo == "published" else sepo.loop_loss
    return loss(process, model, part, A, args.clip)


def summary(new, paid, clip_fraction, grad_norm):
    """The metrics of a Rollout and of its updates, over all processes."""
    mean = average_(new.reward.mean())
    queries = mean.new_tensor(WORLD_SIZE * len(paid.seen))              # its mean is the sum of all
    metrics = average(dict(reward=mean, reward_std=(new.reward - mean).square().mean(),
                           kl=new.kl.mean(), clip_fraction=clip_fraction, grad_norm=grad_norm,
                           queries=queries))
    metrics["reward_std"] **= 0.5                       # of all processes: a variance until here
    best = mean.new_tensor(paid.best)
    if WORLD_SIZE > 1:
        dist.all_reduce(best, dist.ReduceOp.MAX)
    return metrics | dict(best=best.item())


def advise(args, reward):
    """Tell the user after the first rollout what cannot work."""
    spread = reward.std(correction=0).item()
    equal = (reward == reward.median()).double().mean().item()
    if equal > 0.8 and (equal == 1 or args.algo != "wdce"):
        print(f"warning: {equal:.0%} of the first rollout's rewards are equal: try --algo=wdce "
              "--explore=0.5 (without prompts), which learns from the best so far, or a finer "
              "reward",
              file=sys.stderr)
    elif args.beta > spread or args.beta < spread / 100:
        print(f"warning: the rewards of the first rollout spread by {spread:.3g}, and one nat of "
              f"KL costs --beta={args.beta:g}: try {spread / 4:.2g} to {spread / 2:.2g}",
              file=sys.stderr)


def score_known(args, task, process, reference, old):
    """A Rollout of --known with its log_ref, the same whenever the run is resumed."""
    seed_everything(args, 3, 0)
    path = new_path(args, task, process, reference, old.tokens)
    return replace(old, log_ref=path.logp.flatten(1).sum(dim=1).view_as(old.reward))


def roll_out(args, task, process, model, data, buffer):
    """G samples of the current policy for each of P prompts -> path.

    With --explore a share of them are remembered samples, drawn anew in part."""
    P = args.prompts // WORLD_SIZE
    n = P * args.group
    prompt = torch.full((n, task.length), process.mask, device=data.device)
    if task.given:
        prompt = task.prompts(data[torch.randint(len(data), (P,), device=data.device)])
        prompt = prompt.repeat_interleave(args.group, dim=0)
    n_old = int(args.explore * n) if buffer else 0
    if n_old:
        tokens, weights = kept(args, buffer, lambda old: old.kl)
        prompt[:n_old] = recombine(tokens, weights, n_old, process.mask)
    path = process.sample(model, n, task.length, args.steps, prompt)
    if args.corrector_steps:
        path = process.correct_path(model, path, args.corrector_t, args.corrector_steps,
                                    args.steps)
    if n_old:                                           # the policy did not draw them alone
        path = new_path(args, task, process, model, path.tokens)
    return path


def recombine(tokens, weights, n, mask):
    """n prompts made of remembered samples [m, L], which are chosen by their weights: one parent
    gives a segment, moved by up to two slots, to another; then slots are masked, each with a
    chance that is drawn per row between 0.05 and 0.5, so that the policy fits the parts."""
    L, device = tokens.size(1), tokens.device
    parents = tokens[torch.multinomial(weights, 2 * n, replacement=True)].view(2, n, L)
    place = torch.arange(L, device=device)
    moved = (place + torch.randint(-2, 3, (n, 1), device=device)) % L
    cut = torch.randint(L + 1, (2, n, 1), device=device)
    is_inside = (place >= cut.amin(dim=0)) & (place < cut.amax(dim=0))
    child = torch.where(is_inside, parents[1].gather(1, moved), parents[0])
    chance = 0.05 + 0.45 * torch.rand(n, 1, device=device)
    return child.masked_fill(torch.rand(n, L, device=device) < chance, mask)


@torch.no_grad()
def new_path(args, task, process, model, tokens):
    """A path of the forward process from tokens [B, L], read backwards, with the model's logp."""
    path = process.path_to(tokens, task.slots_given(tokens), args.steps)
    return replace(path, logp=process.replay(model, path, args.micro_batch))


def kept(args, buffer, cost_of):
    """The distinct samples of the last --keep rollouts -> tokens [n, L]; their weights [n], which
    sum to 1 and are ~ exp(R / beta - cost), with the values of the last time that each was drawn.

    wdce learns from the cost -log p_ref: these are the weights of p* on what was seen, since each
    counts once, however often it was drawn. --explore chooses parents by the cost kl, which is
    biased towards what the policy of that time seldom drew, and keeps the search alive."""
    latest = {}
    for old in buffer[-args.keep:]:
        values = torch.stack((old.reward, cost_of(old)), dim=-1).flatten(0, 1)          # [P * G, 2]
        latest |= zip(map(tuple, old.tokens.tolist()), values.tolist())
    tokens = torch.tensor(list(latest), device=buffer[-1].tokens.device)
    reward, cost = torch.tensor(list(latest.values()), dtype=torch.double, device=tokens.device).T
    return tokens, sepo.wdce_weights(reward, cost, args.beta, args.min_ess)


def draw_updates(args, process, model, path, buffer):
    """What each update scores -> a list of micro-batches per update, which are drawn before the
    first one, while the model is still the policy that drew the path."""
    if args.algo == "prdp":
        return [[path]] * args.updates
    if args.algo == "published":
        return [[sepo.draw_neighbours(process, model, path)]] * args.updates
    if args.algo == "wdce":                             # rows of the buffer, by their weights
        tokens, weights = kept(args, buffer, lambda old: -old.log_ref)
        n = len(path.tokens)
        rows = torch.multinomial(weights, args.updates * n, replacement=True).split(n)
        even = torch.full((n,), 1 / n, device=tokens.device)
        none_given = torch.zeros_like(tokens[rows[0]], dtype=torch.bool)
        return [[(tokens[row], none_given, even)] for row in rows]
    views = [sepo.draw_view(process, model, path, args.path_events) for _ in range(args.updates)]
    return [view.split(args.micro_batch) for view in views]

# -----------------------------------------------------------------------------
# optimizer steps, processes, seeds

def adamw(model, weight_decay):
    return torch.optim.AdamW(model.parameters(), weight_decay=weight_decay, fused=True)


def decay(i, total):
    """Linear, to 5% of the initial learning rate."""
    return max(0.05, 1 - i / total)


def step(model, optimizer, lr):
    """Average the gradients over the processes, clip them, step -> their norm before the clip."""
    optimizer.param_groups[0]["lr"] = lr
    for p in model.parameters():
        average_(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def compiled(args, model):
    """With --compile, its blocks compiled in place (a deep copy loses that)."""
    if args.compile:
        for block in model.blocks:
            block.compile(dynamic=True)                 # batch and slots shrink from pass to pass
    return model


def setup(args):
    """Start the processes -> the device, and the dtype of matrix products (None: float32)."""
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # Functions of torch.distributed.nn have the process group as a default argument. Imported by an
    # optimizer after this line they would keep it alive, and its threads would outlive Python and
    # abort: so they are imported above.
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    is_half = args.dtype == "bfloat16" or args.dtype == "auto" and device == "cuda"
    return device, torch.bfloat16 if is_half else None


def seed_everything(args, phase, i):
    """Each iteration has its own seed, so a resumed run draws exactly what the whole run would.

    phase: 0 pre-training, 1 fine-tuning, 2 the report, 3 --known."""
    sequence = np.random.SeedSequence([args.seed, phase, i, RANK])
    seed = int(sequence.generate_state(1)[0])
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def average_(tensor):
    """In place: the mean over the processes."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
        tensor /= WORLD_SIZE
    return tensor


def average(scalars):
    """{name: tensor} -> {name: float}, means over the processes."""
    values = torch.stack([value.detach().double() for value in scalars.values()])
    return dict(zip(scalars, average_(values).tolist()))        # one transfer from the device

# -----------------------------------------------------------------------------
# log and checkpoints

def progress(name, first, total):
    return tqdm(range(first, total), name, total, initial=first, disable=not MASTER, mininterval=1)


def log(args, bar, **metrics):
    """Append a line to metrics.jsonl. A gradient that is not finite ends the run here, before
    last.pt is written again."""
    if not math.isfinite(metrics["grad_norm"]):
        raise BadInput(f"a gradient of iteration {metrics['iter']} is not finite: try a smaller "
                       "learning rate; last.pt is older, and good")
    if MASTER:
        shown = {"loss", "reward", "best", "kl", "share_of_optimum"} & metrics.keys()
        bar.set_postfix({name: metrics[name] for name in sorted(shown)}, refresh=False)
        with open(args.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")


def flags_of(args):
    """The flags that make a run what it is; they are in its config.json and in its models."""
    passing = ("resume", "overwrite", "out")
    flags = {name: value for name, value in vars(args).items() if name not in passing}
    code = Path((args.reward or "").rpartition(":")[0])
    reward_hash = zlib.crc32(code.read_bytes()) if code.is_file() else None
    return flags | dict(processes=WORLD_SIZE, reward_hash=reward_hash)


def open_out_dir(args):
    """Start with a new folder, but for --resume."""
    if MASTER and not args.resume:
        args.out.mkdir(parents=True, exist_ok=True)
        paid = args.out / "rewards.jsonl"               # was paid for: --overwrite keeps it, too
        if paid.exists():
            with open(args.out / "rewards.old.jsonl", "a") as old:
                old.write(paid.read_text())
            paid.unlink()
        for name in ("config.json", "pretrained.pt", "finetuned.pt", "last.pt", "report.json",
                     "curve.png"):
            (args.out / name).unlink(missing_ok=True)
        (args.out / "metrics.jsonl").write_text("")
    if MASTER:                                          # --resume may change --iters
        writing = args.out / "config.part"
        writing.write_text(json.dumps(flags_of(args), indent=2) + "\n")
        os.replace(writing, args.out / "config.json")   # atomic
    if WORLD_SIZE > 1:
        dist.barrier()


def restore(args, phase, saved):
    """On --resume, load what last.pt holds of a phase -> its first iteration that is left."""
    last, checkpoint = args.out / "last.pt", dict(phase="", log_size=0)
    if args.resume and last.exists():
        checkpoint = sample.load(last)
    first = 0
    try:
        if checkpoint["phase"] == phase:
            first = checkpoint["iter"]
            for name, part in saved.items():
                part.load_state_dict(checkpoint[name])
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise BadInput(f"{last} belongs to a run of another shape") from error
    if args.resume and MASTER:                          # what was logged after that is forgotten
        os.truncate(args.out / "metrics.jsonl", checkpoint["log_size"])
    return first


def end_iteration(args, task, phase, i, total, saved):
    """Save last.pt, and with it the fine-tuned model and its curve, if it is time to; at the end,
    too."""
    last = args.out / "last.pt"
    is_due = not last.exists() or time.time() - last.stat().st_mtime >= args.save_every
    if MASTER and (is_due or i + 1 == total):
        if not all(p.isfinite().all() for p in saved["model"].parameters()):
            raise BadInput("weights are not finite: try a smaller learning rate; last.pt is good")
        log_size = (args.out / "metrics.jsonl").stat().st_size
        parts = {name: part.state_dict() for name, part in saved.items()}
        save(last, dict(phase=phase, iter=i + 1, log_size=log_size, **parts))
        if phase == "finetune":
            save_model(args, task, saved["model"], "finetuned.pt")
            sample.plot_curve(args)


def save_model(args, task, model, name):
    """A model with all that sample.py needs to know of its run."""
    prompts = task.prompts(task.held_out(256, args.seed))
    save(args.out / name, dict(model=model.state_dict(), config=vars(model.config),
                               flags=flags_of(args) | dict(pad=task.pad), alphabet=task.alphabet,
                               prompts=prompts))


def save(file, checkpoint):
    """Write under a temporary name, then rename: a kill at any moment leaves the last good file."""
    if MASTER:
        writing = file.with_suffix(".part")
        try:
            torch.save(checkpoint, writing)
        except RuntimeError as error:                   # torch raises this when the disk is full
            raise OSError(f"{writing} cannot be written: {error}") from None
        os.replace(writing, file)

# -----------------------------------------------------------------------------
# flags

def stop_or_value(text):
    return None if text == "stop" else number(float, -math.inf)(text)


count, positive, weight = number(int, 0), number(int, 1), number(float, 0)


def get_parser():
    epilog = "defaults that depend on task, process or method:"
    for name, flags in DEFAULTS.items():
        epilog += f"\n  {name}: " + " ".join(f"--{flag}={value}" for flag, value in flags.items())
    parser = argparse.ArgumentParser(usage="train.py [--flag=value ...]", description=__doc__,
                                     epilog=epilog, formatter_class=HelpFormatter,
                                     allow_abbrev=False)
    add_run_flags(parser)
    add_network_flags(parser)
    add_fine_tuning_flags(parser)
    return parser


def add_run_flags(parser):
    add = parser.add_argument_group("the run").add_argument
    add("--task", choices=[*TASKS, "own"], help="what to learn; own: the alphabet "
        "and the sequences of --data, and --reward (default: own with --data, else toy)")
    add("--out", type=Path, help="folder for the results (default: out/<task>)")
    add("--seed", type=count, default=0, help="seed of every random draw")
    add("--resume", action="store_true", help="continue the run in --out with its own flags; also "
        "one that has ended, with a larger --iters")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--save_every", type=count, default=30, help="seconds between two saves of last.pt")

    add = parser.add_argument_group("your own data, reward and model").add_argument
    add("--data", type=os.path.abspath, help="file to pre-train on, .gz too; needs --reward; about "
        "5%% of it is held out")
    add("--format", choices=["", "lines", "fasta", "text"], default="", help="of --data: one "
        "sequence per line, FASTA, or one running text (empty: FASTA if it begins with >)")
    add("--length", type=count, default=0, help="sequence length (0: the task's; own: the longest)")
    add("--pad", default="", help="letter that fills up short sequences of --data; own chooses one")
    add("--crop", action="store_true", help="cut random windows from long sequences of --data")
    add("--reward", type=os.path.abspath, help="file.py:function, list[str] -> list[float]; the "
        "file's measure, list[str] -> {column: number}, adds columns to the report")
    add("--on_error", type=stop_or_value, default="stop", help="stop, or a number: the reward of a "
        "sample for which the reward raises, or returns None, NaN or infinity")
    add("--init", type=os.path.abspath, help="a pretrained.pt or finetuned.pt to start from: no "
        "pre-training, and the network has its size")

    add = parser.add_argument_group("system").add_argument
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if present")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of matrix products; auto: bfloat16 on cuda")
    add("--compile", action="store_true", help="torch.compile the transformer blocks")
    add("--micro_batch", type=count, default=0,
        help="states per pass, to bound the memory (0: all of an update's)")


def add_network_flags(parser):
    add = parser.add_argument_group("model").add_argument
    add("--process", choices=list(CHAINS), default="absorb", help="noise: masks or random letters")
    add("--n_layer", type=positive, default=4, help="transformer blocks")
    add("--n_head", type=positive, default=4, help="attention heads")
    add("--n_embd", type=positive, default=128, help="channels of the residual stream")
    add("--conv", type=count, default=0, help="width of a convolution on the embeddings (0: none)")
    add("--dropout", type=number(float, 0, 0.99), default=0.0, help="during pre-training only")

    add = parser.add_argument_group("pre-training").add_argument
    add("--pretrain_iters", type=positive, default=800, help="optimizer steps")
    add("--pretrain_batch", type=positive, default=128, help="sequences per step")
    add("--pretrain_lr", type=weight, default=2e-3, help="peak learning rate")
    add("--data_size", type=positive, default=20000, help="sequences to generate, or to cut")

    add = parser.add_argument_group("sampling").add_argument
    add("--steps", type=count, default=0,
        help="steps of the time grid (0: none for absorb, 16 for uniform)")
    add("--corrector_steps", type=count, default=0, help="moves of the corrector per rollout, "
        "which pulls samples towards the model's distribution; the KL then starts after it")
    add("--corrector_t", type=number(float, 0.001, 0.999), default=0.5,
        help="time at which the corrector runs")


def add_fine_tuning_flags(parser):
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--algo", choices=["sepo", "loop", "prdp", "reinforce", "wdce", "published"],
        default="sepo", help="method; published: SEPO's own estimator, in hundreds of passes")
    add("--iters", type=positive, default=100, help="rollouts")
    add("--prompts", type=positive, default=1, help="prompts per rollout (P)")
    add("--group", type=positive, default=32, help="samples per prompt (G)")
    add("--updates", type=positive, default=1, help="optimizer steps per round")
    add("--lr", "--learning_rate", type=weight, default=1e-3,
        help="initial learning rate; decays linearly to 5%%")
    add("--path_events", type=count, default=4, help="events scored per path and update (0: all); "
        "for sepo, loop and reinforce")
    add("--advantage", choices=["grpo", "loo", "running"], default="loo",
        help="what a return is compared with: its group, the others of it, or a running mean")
    add("--clip", type=weight, default=0.1, help="clip of the ratio; prdp: of an event's log-ratio")
    add("--clip_mode", choices=["stop", "cap"], default="stop",
        help="stop: PPO's clip; cap: SEPO's own, a capped and detached coefficient")
    add("--beta", type=weight, default=0.1, help="KL weight: how much reward one nat of KL must "
        "bring; try a quarter to a half of the spread of your rewards")
    add("--replay", type=count, default=7, help="rounds of updates on remembered rollouts per new "
        "one, each along new paths; costs no reward")
    add("--known", type=os.path.abspath, help="samples with known rewards to learn from: CSV or "
        "TSV with columns sample and reward, or the rewards.jsonl of another run")
    add("--keep", type=positive, default=1000, help="wdce, explore: so many last rollouts")
    add("--min_ess", type=weight, default=32.0,
        help="wdce, explore: the effective sample size that flattens their weights")
    add("--explore", type=number(float, 0, 1), default=0.0, help="share of each rollout that is "
        "recombined from good samples of the past and partly drawn anew")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_every", type=positive, default=10, help="rollouts between evaluations")
    add("--report_samples", type=count, help="samples per model in the final report, at most the "
        "held-out ones; 0: no report (default: 1000; with --reward so many that it asks at most a "
        "tenth of the rewards of the rollouts)")


def parse_args(argv=None):
    """Flags; defaults depend on task, process and algorithm, or on the run to resume."""
    parser = get_parser()

    def parse(**defaults):
        parser.set_defaults(**defaults)
        return parser.parse_args(argv)

    args = parse()
    args = parse(task="own" if args.data else "toy")
    out = args.out or Path("out") / args.task
    config = out / "config.json"
    if args.resume and not config.exists():
        parser.error(f"--resume: {out} holds no run")
    if config.exists() and not (args.resume or args.overwrite):
        parser.error(f"{out} holds another run: use --resume, --overwrite or another --out")
    fixed = json.loads(config.read_text()) if args.resume else {}
    size = os.path.getsize(args.data) if args.data and os.path.exists(args.data) else 0
    is_large = args.task == "own" and size >= 100_000
    args = parse(**DEFAULTS.get("own, from 100 kB of data on" if is_large else args.task, {}))
    args = parse(**DEFAULTS.get(args.process, {}))
    args = parse(**DEFAULTS.get(args.algo, {}))         # which the task may have chosen
    rewards = args.iters * args.prompts * args.group
    args = parse(report_samples=rewards // 290 * 4 if args.reward else 1000)
    args = parse(out=out, **fixed)                      # flags that must stay as they were
    if args.resume:
        check_resumed(parser, args, fixed)
    check_combinations(parser, args)
    return args


def check_resumed(parser, args, fixed):
    """Refuse flags that differ from those of the run; it may get longer."""
    for name, value in flags_of(args).items():
        is_longer = name == "iters" and value > fixed[name]
        if is_longer or name in ("save_every", "on_error") or fixed.get(name) == value:
            continue
        if name == "reward_hash":
            parser.error("--resume: the file of --reward has changed since the run began, and old "
                         "and new rewards do not mix: undo the change, or start another run with "
                         f"--init={args.out}/pretrained.pt, and with "
                         f"--known={args.out}/rewards.jsonl if the old rewards still hold")
        parser.error(f"{name}={value}: the run in {args.out} has {fixed.get(name)}")


def check_combinations(parser, args):
    for wrong, message in [
        (args.data and not args.reward, "--data needs --reward=file.py:function: the rewards of "
         "the tasks are made for their own sequences"),
        (args.task == "own" and not args.data, "--task=own needs --data and --reward"),
        (args.device == "cuda" and not torch.cuda.is_available(),
         "--device=cuda: torch sees no CUDA device; use --device=cpu"),
        (args.prompts % WORLD_SIZE or args.pretrain_batch % WORLD_SIZE,
         f"--prompts and --pretrain_batch must be multiples of {WORLD_SIZE}"),
        (args.n_embd % args.n_head or args.n_embd % 2,
         "--n_embd must be even and a multiple of --n_head"),
        (args.group == 1 and args.advantage != "running",
         "--group=1 leaves nothing to compare a sample with: add --advantage=running"),
        (args.algo == "prdp" and (args.group == 1 or not args.beta),
         "--algo=prdp needs --group above 1 and --beta above 0"),
        ((args.algo == "wdce" or args.explore) and not args.beta,
         "--algo=wdce and --explore need --beta above 0"),
        (args.algo == "wdce" and args.replay, "--algo=wdce has no --replay: it learns from all"),
        (args.algo != "sepo" and args.clip_mode != "stop", "--clip_mode is for --algo=sepo"),
        (args.algo == "published" and args.process == "uniform",
         "--algo=published needs --process=absorb"),
        (args.algo == "wdce" and (args.process == "uniform" or args.corrector_steps),
         "--algo=wdce needs --process=absorb and no corrector"),
        (args.algo in ("published", "wdce") and args.micro_batch,
         f"--algo={args.algo} has no --micro_batch"),
    ]:
        if wrong:
            parser.error(message)


if __name__ == "__main__":
    main()
