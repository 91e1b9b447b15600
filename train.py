"""Pre-train a discrete diffusion model on a task's data, then fine-tune it on a black-box reward.

    python train.py --task=toy                      # 70 seconds on one CPU core
    python train.py --task=toy --resume             # continue a stopped run, to the same numbers
    python train.py --data=mine.fa --reward=my_reward.py:score
    torchrun --nproc_per_node=4 train.py --task=dna --prompts=4

A run writes to out/<task>: config.json, metrics.jsonl, curve.png, report.json, pretrained.pt,
finetuned.pt, best.pt, the policy of the best evaluation (by the mean reward minus beta KL of ten
iterations), rewards.jsonl, which keeps every reward that was queried, and last.pt, the checkpoint
that --resume continues from.
"""
import json
import math
import os
import random
import shlex
import sys
import time
import zlib
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.nn         # see setup
from tqdm import tqdm

import sample
import sepo
from diffusion import CHAINS
from model import SIZES, make_model, make_optimizers
from rewards import TASKS, BadInput, RewardLog, hold, measured, open_task, query, read_known

RANK = int(os.environ.get("RANK", 0))               # set by torchrun; without it, one process
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
MASTER = RANK == 0                                  # the process that logs, saves and reports


@dataclass
class Flags:
    # the run
    task: str = "toy"                   # what to learn: toy, dna, arithmetic, text or ehrlich
    out: Path = Path("out")             # folder for the results; default: out/<task>
    seed: int = 0                       # seed of every random draw
    resume: bool = False                # continue the run in --out with its own flags; --iters may
                                        # differ, and while it pre-trains --pretrain_iters
    overwrite: bool = False             # replace the run in --out
    save_every: int = 30                # seconds between two saves of last.pt

    # your own data, reward and model
    data: str = ""                      # file to pre-train on, .gz too: FASTA, or one sequence per
                                        # line; about 5% is held out; needs --reward
    length: int = 0                     # sequence length; 0: the task's; --data: the longest
    alphabet: str = ""                  # the letters of --data, as ACGT; default: all that occur
    pad: str = ""                       # letter that fills up short sequences of --data
    crop: bool = False                  # cut random windows from long sequences or a text
    reward: str = ""                    # file.py:function, list[str] -> list[float]; the file's
                                        # measure, list[str] -> {column: number}, adds columns
    on_error: float | None = None       # reward of a sample for which the reward raises, or returns
                                        # None, NaN or infinity; default: the run stops
    init: str = ""                      # a pretrained.pt or finetuned.pt to start from: no
                                        # pre-training, and the network has its size

    # system
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"          # auto: cuda if present
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"          # auto: bfloat16 on cuda
    compile: bool = False               # torch.compile the transformer blocks
    micro_batch: int = 0                # states per forward pass, to bound the memory; 0: 2,048

    # model
    process: Literal["absorb", "uniform"] = "absorb"                # noise: masks, random letters
    n_layer: int = 4                    # transformer blocks
    n_head: int = 4                     # attention heads
    n_embd: int = 128                   # channels of the residual stream
    conv: int = 0                       # width of a convolution on the embeddings; 0: none
    dropout: float = 0.0                # during pre-training only

    # pre-training
    pretrain_iters: int = 600           # optimizer steps
    pretrain_batch: int = 128           # sequences per step
    pretrain_lr: float = 3e-3           # peak learning rate
    data_size: int = 20_000             # sequences to generate, or windows to cut

    # sampling
    steps: int = 0                      # steps of the time grid; 0: none for absorb, 16 for uniform
    corrector_steps: int = 0            # moves of the corrector per rollout, which pulls samples
                                        # towards the model's distribution; the KL starts after it
    corrector_t: float = 0.5            # time at which the corrector runs, in (0, 1)

    # fine-tuning
    algo: Literal["sepo", "loop", "prdp", "reinforce", "wdce", "published"] = "sepo"    # method
    iters: int = 100                    # rollouts
    prompts: int = 1                    # prompts per rollout (P)
    group: int = 32                     # samples per prompt (G)
    updates: int = 1                    # optimizer steps per round
    lr: float = 2e-3                    # initial learning rate; decays linearly to 5%
    path_events: int = 0                # transitions scored per path and update; 0: all
    advantage: Literal["loo", "grpo"] = "loo"                       # a return minus the mean of the
                                        # others in its group, or standardized
    clip: float = 0.1                   # of the ratio; prdp: of a transition's log-ratio
    clip_mode: Literal["stop", "cap"] = "stop"                      # PPO's clip, or SEPO's own
    beta: float = 0.1                   # KL weight: how much reward one nat of KL must bring; try a
                                        # quarter to a half of the spread of your rewards
    replay: int = 3                     # rounds on remembered samples per rollout, each along new
                                        # paths; costs no reward
    denoise: int = 14                   # updates of weighted denoising per rollout, at most, among
                                        # these rounds; none when the policy is at the optimum
    known: str = ""                     # samples with known rewards to learn from: CSV or TSV with
                                        # columns sample and reward, or a rewards.jsonl
    min_ess: float = 32.0               # effective sample size of the weights of what was seen
    explore: float = 0.0                # share of each rollout that is recombined from good samples
                                        # of the past and partly drawn anew

    # evaluation
    eval_every: int = 10                # rollouts between evaluations
    exact: bool = False                 # query all sequences of a small space for its optimum
    report_samples: int | None = None   # samples per model in the final report; 0: no report;
                                        # default: so many that it queries a tenth of the rollouts


CHAIN_FLAGS = {"uniform": dict(pretrain_iters=2000, pretrain_lr=1e-3)}
METHOD_FLAGS = {                                    # defaults, after those of the task
    "reinforce": dict(replay=0, clip=math.inf),
    "wdce": dict(updates=16, replay=0, explore=0.5),
    "published": dict(updates=4, replay=0),
}
NOT_SAVED = {"resume", "overwrite", "out"}          # in config.json
MAY_CHANGE = NOT_SAVED | {"iters", "pretrain_iters", "save_every", "on_error", "device", "compile",
                          "report_samples"}         # with --resume

# -----------------------------------------------------------------------------
# the story

def main(argv=None):
    try:
        run(*read_flags(argv))
    except (BadInput, OSError) as error:                # what the user can fix
        print(f"train.py: {error}", file=sys.stderr)
        raise SystemExit(2)
    except KeyboardInterrupt:
        print("train.py: stopped; the same command with --resume continues", file=sys.stderr)
        raise SystemExit(130)
    finally:
        if dist.is_initialized():                       # its threads must not outlive the program
            dist.destroy_process_group()


def run(args, task):
    keep_what_is_done(args)
    device, autocast = setup(args)
    if device == "cpu" and args.n_embd <= 64 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)                        # as fast for so few channels, and less work
    torch.manual_seed(args.seed)                        # the same initial weights on every process
    process = CHAINS[args.process](task.vocab_size, args.steps, args.micro_batch)
    task.data, task.held = (x.to(device) for x in task.split(args.data_size, args.seed))
    known = [x.to(device) for x in read_known(task, args.known)] if args.known else None

    # a new network, or one that was pre-trained before
    pretrained = args.out / "pretrained.pt"
    source = pretrained if args.resume and pretrained.exists() else args.init
    if source:
        model = load_pretrained(source, args, task)
    else:
        model = make_model(args, task.vocab_size, task.length)
    model.autocast = autocast
    compiled(args, model).to(device)

    is_exact = args.exact and process.is_small(task.length) and not task.has_prompts
    if MASTER:
        announce(args, task, device, is_exact)
    if len(task.held) < WORLD_SIZE:
        task.held = task.data
    log = open_folder(args, task)
    if known:                                           # these samples are not queried
        table = dict(zip(task.strings(known[0]), known[1].tolist()))
        unlike = sum(table.get(s, r) != r for s, r in log.reward_of.items())
        if unlike and MASTER:
            print(f"warning: for {unlike} samples the reward is not what --known says",
                  file=sys.stderr)
        log.reward_of |= table
    save_config(args)
    if not source:
        pretrain(args, task, process, model)
    save(args, task, model, "pretrained.pt")

    # fine-tune
    model.eval()                                        # no dropout: the ratio must start at 1
    reference = compiled(args, deepcopy(model).requires_grad_(False))
    exact = None                                        # ground truth, where the space is small
    if MASTER and is_exact:
        free = RewardLog(on_error=args.on_error)        # in memory: it is no query of the run
        exact = sepo.ground_truth(process, reference, lambda tokens: free.query(
            task.reward, task.strings(tokens)).to(device), task.length, args.beta)
    try:
        finetune(args, task, process, model, reference, exact, log, known)
    except KeyboardInterrupt:                           # save the weights so far
        save(args, task, model, "finetuned.pt")
        raise
    save(args, task, model, "finetuned.pt")
    if MASTER:
        seed_everything(args, "report", 0)
        if args.report_samples:
            sample.report(args, task, process, exact, reference, model, log)
        if log.failed:
            print(f"the reward failed for {len(log.failed):,} samples", file=sys.stderr)
        folder = shlex.quote(str(args.out))
        print(f"results are in {folder}; next: python sample.py --run={folder} --compare")


def pretrain(args, task, process, model):
    """Minimize the score entropy of the data, or of what the prompt leaves open if there is one."""
    optimizers = make_optimizers(model, weight_decay=0.01)
    batch = args.pretrain_batch // WORLD_SIZE
    first, _ = restore(args, "pretrain", model, optimizers)

    def loss_of(x0):
        return process.loss(model, x0, task.given(x0))

    bar = progress("pretrain", first, args.pretrain_iters)
    for i in bar:
        seed_everything(args, "pretrain", i)
        lr = args.pretrain_lr * min((i + 1) / 50, decay(i, args.pretrain_iters))
        x0 = random_rows(task.data, batch)                                                # [B, L]
        for part in x0.split(args.micro_batch or batch):
            loss = loss_of(part) * len(part) / batch
            loss.backward()
        norm = step(model, optimizers, lr)

        is_last = i + 1 == args.pretrain_iters
        if (i + 1) % 50 == 0 or is_last:
            model.eval()
            with torch.no_grad():
                losses = torch.stack((loss_of(x0), loss_of(task.held[:256]), norm))
            model.train()
            losses = average_(losses).tolist()
            log_metrics(args, bar, phase="pretrain", iter=i + 1,
                        **dict(zip(("loss", "held_out_loss", "grad_norm"), losses)))
        if is_time_to_save(args, is_last):
            save(args, task, model, "last.pt", phase="pretrain", iter=i + 1,
                 optimizers=[o.state_dict() for o in optimizers], buffer=[])


def finetune(args, task, process, model, reference, exact, log, known):
    """Roll out, query the rewards, learn from the new samples and from remembered ones; repeat."""
    optimizers = make_optimizers(model)
    first, buffer = restore(args, "finetune", model, optimizers)
    if known and not first:
        buffer = as_rollouts(args, task, process, reference, *known)
    bar = progress("finetune", first, args.iters)
    for i in bar:
        seed_everything(args, "finetune", i)

        # 1. roll out the current policy: G samples for each of P prompts, on every process
        tokens, given, is_own, path = roll_out(args, task, process, model, buffer)
        log_ref = path.per_sequence(process.logp(reference, path))                      # [B]
        log_ratio = path.per_sequence(path.logp) - log_ref      # its mean is the KL of the paths

        # 2. query the rewards, and remember what all processes have drawn
        columns = (x.view(-1, args.group) for x in (is_own, log_ratio, log_ref))        # [P, G]
        parts = gather((tokens, given, *columns))
        samples = [s for tokens, *_ in parts for s in task.strings(tokens)]
        rewards = log.query(task.reward, samples, query_together, iter=i + 1)
        rewards = rewards.view(WORLD_SIZE, -1, args.group)
        drawn = [sepo.Rollout(i + 1, *part, R) for part, R in zip(parts, rewards)]
        if not all(old.log_ratio.isfinite().all() for old in drawn):
            raise BadInput("log-ratios are not finite: try a smaller --lr; last.pt is good")
        buffer += [rollout.to(path.x.device) for rollout in drawn]
        failed = log.failed.intersection(samples)
        if MASTER and i == 0:
            advise(args, rewards.flatten()[[s not in failed for s in samples]])
        if MASTER and i + 1 == args.iters // 2:
            advise_halfway(buffer)

        # 3. learn: from the new rollout, then from remembered samples along new paths
        clipped, norms = [], []
        for loss, clip_fraction in sepo.learn(args, process, model, reference, drawn[RANK], path,
                                              buffer):
            loss.backward()
            norms.append(step(model, optimizers, args.lr * decay(i, args.iters)))
            clipped.append(clip_fraction)

        # 4. log, draw, save
        is_last = i + 1 == args.iters
        metrics = summary(drawn, buffer, clipped, norms) | dict(queries=log.queries(i + 1))
        if args.on_error is not None:
            metrics["failed"] = sum(s in failed for s in samples)
        if (i + 1) % args.eval_every == 0 or is_last:
            metrics |= exact(model) if exact else {}
            metrics |= evaluate(task, process, model, drawn, log)
            if is_best(args, buffer):
                save(args, task, model, "best.pt")
        log_metrics(args, bar, phase="finetune", iter=i + 1, **metrics)
        if is_time_to_save(args, is_last):
            save(args, task, model, "last.pt", phase="finetune", iter=i + 1,
                 optimizers=[o.state_dict() for o in optimizers],
                 buffer=[vars(old) for old in buffer])
            save(args, task, model, "finetuned.pt")
            if MASTER:
                sample.plot_curve(args)


def is_best(args, buffer):
    """Has the policy the highest J = E[R] - beta KL of all evaluations so far? J is the mean of the
    last ten iterations."""
    values = torch.stack([(old.reward - args.beta * old.log_ratio)[old.is_own].mean()
                          for old in buffer if old.iter])
    values = values.view(-1, WORLD_SIZE).mean(dim=1)                            # [iterations]
    ends = *range(args.eval_every, len(values), args.eval_every), len(values)
    J = [values[max(0, end - 10):end].mean() for end in ends]
    return J[-1] >= max(J)


def evaluate(task, process, model, drawn, log):
    """What the task measures of the policy's latest samples, and the reward on held-out prompts."""
    own = torch.cat([rollout.tokens[rollout.is_own.flatten()] for rollout in drawn])
    metrics = measured(task, task.strings(own), catch=True)
    if task.has_prompts:
        prompts = task.prompts(task.held[:256])[RANK::WORLD_SIZE]
        tokens, _ = process.sample(model, len(prompts), task.length, prompts)
        samples = [s for part in gather(task.strings(tokens)) for s in part]
        reward = log.query(task.reward, samples, query_together, stage="evaluation")
        metrics["held_out_reward"] = reward.mean().item()
    return metrics


def summary(drawn, buffer, clipped, norms):
    """The metrics of an iteration: of the policy's own samples on all processes, of the updates."""
    reward, kl = (torch.cat([getattr(old, name)[old.is_own] for old in drawn]).double()
                  for name in ("reward", "log_ratio"))
    best = torch.stack([old.reward.max() for old in buffer if old.iter])
    clip_fraction, grad_norm = torch.stack(clipped).mean(), torch.stack(norms).mean()
    values = dict(reward=reward.mean(), reward_std=reward.std(correction=0), best=best.max(),
                  kl=kl.mean(), clip_fraction=clip_fraction, grad_norm=grad_norm)
    numbers = torch.stack(list(values.values())).tolist()       # one transfer from the device
    return dict(zip(values, numbers))

# -----------------------------------------------------------------------------
# rollouts

def roll_out(args, task, process, model, buffer):
    """G samples of the current policy for each of P prompts -> tokens, given [P * G, L], is_own
    [P * G], path. With --explore some are not its own, but remembered and in part drawn anew."""
    prompt = task.prompts(random_rows(task.data, args.prompts // WORLD_SIZE))
    prompt = prompt.repeat_interleave(args.group, dim=0)    # without prompts: masks alone
    given = prompt != process.mask
    n_old = int(args.explore * len(prompt)) if buffer else 0
    if n_old:
        past, _, weights = sepo.target_weights(buffer, args.beta, args.min_ess)
        prompt[:n_old] = sepo.recombine(past, weights, n_old, process.mask)
    tokens, path = process.sample(model, len(prompt), task.length, prompt)
    if args.corrector_steps:
        tokens, path = process.correct_path(model, tokens, prompt != process.mask,
                                            args.corrector_t, args.corrector_steps)
    if n_old:                                           # the policy did not draw them alone
        path = process.path_to(tokens, given)
        with torch.no_grad():
            path.logp = process.logp(model, path)
    return tokens, given, torch.arange(len(tokens), device=tokens.device) >= n_old, path


def random_rows(x, n):
    return x[torch.randint(len(x), (n,), device=x.device)]


def as_rollouts(args, task, process, reference, tokens, rewards):
    """Samples of --known [n, L], as if the reference had drawn them -> list of Rollouts, each of
    one prompt and about --group samples; a sample that is alone with its prompt is left out."""
    torch.manual_seed(args.seed)                        # the same paths on every process
    given = task.given(tokens)
    paths = map(process.path_to, tokens.split(2048), given.split(2048))
    log_ref = torch.cat([path.per_sequence(process.logp(reference, path)) for path in paths])
    zero, rollouts, prompts = torch.zeros_like(log_ref), [], task.prompts(tokens)
    for prompt in prompts.unique(dim=0):
        rows = (prompts == prompt).all(dim=1).nonzero()[:, 0]
        n_groups = max(1, len(rows) // args.group)
        for row in (rows[i::n_groups] for i in range(n_groups) if len(rows) > 1):
            columns = (zero[row] > 0, zero[row], log_ref[row], rewards[row])
            rollouts.append(sepo.Rollout(0, tokens[row], given[row], *(c[None] for c in columns)))
    return rollouts


def query_together(reward, samples, catch=False):
    """`query`, where each process asks about its share of the samples."""
    share = samples[RANK::WORLD_SIZE]
    parts = gather(query(reward, share, catch) if share else ([], ""))
    values = [0.0] * len(samples)
    for rank, (answers, _) in enumerate(parts):
        values[rank::WORLD_SIZE] = answers
    return values, next((problem for _, problem in parts if problem), "")

# -----------------------------------------------------------------------------
# what the user is told

def announce(args, task, device, is_exact):
    """Print the task, the method and the largest number of queries, before any is made."""
    rollouts, n = args.iters * args.prompts * args.group, args.report_samples
    evaluations = task.has_prompts * 256 * math.ceil(args.iters / args.eval_every)
    optimum = is_exact * task.vocab_size ** task.length
    queries = {"to try it": 2, "in rollouts": rollouts, "in evaluations": evaluations,
               "for the exact optimum": optimum,
               "in the report": 3 * n + (16 * (n // 4) if n >= 64 else 0)}
    cost = ", ".join(f"{count:,} {where}" for where, count in queries.items() if count)
    reward = os.path.relpath(args.reward) if args.reward else f"the one built into {args.task}"
    example, = task.strings(task.data[:1])
    print(f"task {args.task}: {len(task.data):,} sequences of {task.length} letters "
          f"{task.alphabet!r}, such as {example!r}; {len(task.held):,} others held out",
          file=sys.stderr)
    if task.note:
        print(f"warning: {task.note}", file=sys.stderr)
    print(f"reward: {reward}; queries, at most: {cost}", file=sys.stderr)
    print(f"method {args.algo}, beta {args.beta:g}; {device}; results in {args.out}",
          file=sys.stderr)


def advise(args, rewards):
    """Tell the user after the first rollout what cannot work, and what can be done now."""
    if len(rewards) < 8:                                # too few, or nearly all failed
        return
    spread = rewards.std(correction=0).item()
    equal = (rewards == rewards.median()).double().mean().item()
    rest = rewards[rewards > rewards.min()]
    advice = ""
    if len(rest) > 1 and 0 < rest.std().item() < spread / 100:
        advice = (f"{rewards.min():g} is far below all others: a penalty that is nearer to them "
                  "would leave more to learn from")
    elif equal > 0.8:
        advice = f"{equal:.0%} are equal: a finer reward would tell more"
    elif args.beta > spread or args.beta < spread / 100:
        advice = (f"they spread by {spread:.3g}, and one nat of KL costs --beta={args.beta:g}: "
                  f"--beta={spread / 4:.2g} to {spread / 2:.2g} may do better, with --init="
                  f"{args.out}/pretrained.pt --known={args.out}/rewards.jsonl, another --out")
    if advice:
        print(f"warning: the rewards of the first rollout: {advice}", file=sys.stderr)


def advise_halfway(buffer):
    """Tell the user if the last fifth of the rollouts has no more reward than the first."""
    rewards = [old.reward[old.is_own] for old in buffer if old.iter]
    n = len(rewards) // 5
    if n < 2:                                           # too early to tell
        return
    first, last = torch.cat(rewards[:n]), torch.cat(rewards[-n:])
    error = (first.var() / len(first) + last.var() / len(last)).sqrt()
    if last.mean() <= first.mean() + error:
        print(f"warning: after half of the rollouts the mean reward is {last.mean():.3g}, and was "
              f"{first.mean():.3g} at first: try a smaller --beta, a larger --group, or a reward "
              "that tells more", file=sys.stderr)

# -----------------------------------------------------------------------------
# optimizer steps, processes, seeds

def decay(i, total):
    """Linear, to 5% of the initial learning rate."""
    return max(0.05, 1 - i / total)


def step(model, optimizers, lr):
    """Average the gradients over the processes, clip them, step -> their norm before the clip."""
    for p in model.parameters():
        average_(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    return norm


def compiled(args, model):
    """With --compile, its blocks compiled in place (a deep copy loses that)."""
    if args.compile:
        for block in model.blocks:
            block.compile(dynamic=True)                 # batch and positions shrink pass by pass
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
    """Each iteration has its own seed, so a resumed run draws exactly what the whole run would."""
    seed = zlib.crc32(f"{args.seed} {phase} {i} {RANK}".encode())
    torch.manual_seed(seed)
    random.seed(seed)


def average_(tensor):
    """In place: the mean over the processes."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
        tensor /= WORLD_SIZE
    return tensor


def gather(part):
    """What every process has -> list, in the order of the processes."""
    if WORLD_SIZE == 1:
        return [part]
    parts = [None] * WORLD_SIZE
    dist.all_gather_object(parts, part)
    return parts

# -----------------------------------------------------------------------------
# log and checkpoints

def progress(name, first, total):
    return tqdm(range(first, total), name, total, initial=first, disable=not MASTER, mininterval=1)


def log_metrics(args, bar, **metrics):
    """Append a line to metrics.jsonl. A gradient that is not finite ends the run here, before
    last.pt is written again."""
    if not math.isfinite(metrics["grad_norm"]):
        raise BadInput(f"a gradient of iteration {metrics['iter']} is not finite: try a smaller "
                       "learning rate, or rewards nearer to 1; last.pt is older, and good")
    if MASTER:
        shown = {"loss", "reward", "best", "kl", "share_of_optimum"} & metrics.keys()
        bar.set_postfix({name: metrics[name] for name in sorted(shown)}, refresh=False)
        with open(args.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")


def flags_of(args):
    """The flags that make a run what it is; they are in its config.json and in its models."""
    return {name: value for name, value in asdict(args).items() if name not in NOT_SAVED}


def open_folder(args, task):
    """The folder of a new run, or with --resume of the one to go on with -> its RewardLog."""
    file, lock = args.out / "rewards.jsonl", None
    answers = {} if args.resume else try_reward(args, task)     # before anything is written
    if MASTER:
        args.out.mkdir(parents=True, exist_ok=True)
        lock = hold(args.out)
    if MASTER and args.resume:                          # forget what followed the last checkpoint
        os.truncate(args.out / "metrics.jsonl", checkpoint_of(args).get("log_size", 0))
    elif MASTER:
        if file.exists():                               # of an overwritten run: it was paid for
            file.rename(args.out / f"rewards-{time.time_ns()}.jsonl")
        for name in ("config.json", "last.pt", "pretrained.pt", "finetuned.pt", "best.pt",
                     "report.json", "curve.png"):
            (args.out / name).unlink(missing_ok=True)
        (args.out / "metrics.jsonl").write_text("")
    gather(None)                                        # the others wait
    log = RewardLog(file, args.on_error, MASTER)
    log.lock = lock                                     # it is held as long as the log is there
    log.add(answers, stage="check")
    return log


def try_reward(args, task):
    """Try the reward, and what the task measures, on two samples -> {sample: reward}."""
    trial = RewardLog(on_error=args.on_error)
    samples = list(dict.fromkeys(task.strings(task.data[:2])))[::-1]    # a reward may sort its list
    measured(task, samples)                             # first: the reward may cost
    trial.query(task.reward, samples, query_together)
    if trial.failed.issuperset(samples):
        raise BadInput(f"the reward fails for the first samples of the data, {samples}. If it "
                       "works for others, begin the data with these")
    return {s: r for s, r in trial.reward_of.items() if s not in trial.failed}


def save_config(args):
    config = flags_of(args) | dict(processes=WORLD_SIZE)
    if MASTER:
        write(args.out / "config.json", lambda file: file.write_text(json.dumps(config, indent=2)))


def checkpoint_of(args):
    """last.pt of the run to resume -> dict; {} if there is none."""
    last = args.out / "last.pt"
    return sample.load(last) if args.resume and last.exists() else {}


def keep_what_is_done(args):
    """On --resume, flags cannot take back the steps and rollouts that last.pt holds."""
    done = checkpoint_of(args)
    if done.get("phase") == "finetune":
        args.iters = max(args.iters, done["iter"])
        args.pretrain_iters = done.get("flags", {}).get("pretrain_iters", args.pretrain_iters)
    elif done:
        args.pretrain_iters = max(args.pretrain_iters, done["iter"])


def restore(args, phase, model, optimizers):
    """On --resume, load what last.pt holds of a phase -> its first iteration that is left, and the
    rollouts so far."""
    saved = checkpoint_of(args)
    if saved.get("phase") != phase:
        return 0, []
    try:
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        device = next(model.parameters()).device
        buffer = [sepo.Rollout(**old).to(device) for old in saved["buffer"]]
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise BadInput(f"{args.out}/last.pt belongs to a run of another shape") from error
    return saved["iter"], buffer


def is_time_to_save(args, is_last):
    last = args.out / "last.pt"
    return is_last or not last.exists() or (            # a clock may be set back
        abs(time.time() - last.stat().st_mtime) >= args.save_every)


def save(args, task, model, name, **more):
    """A model, with all that sample.py needs to know of its run; in last.pt with `more`, all that
    --resume needs. Weights that are not finite end the run here."""
    if not all(p.isfinite().all() for p in model.parameters()):
        raise BadInput("weights are not finite: try a smaller learning rate; last.pt is good")
    if MASTER:
        prompts = task.prompts(task.held[:256])
        log_size = (args.out / "metrics.jsonl").stat().st_size
        checkpoint = dict(model=model.state_dict(), flags=flags_of(args), length=task.length,
                          alphabet=task.alphabet, pad=task.pad, prompts=prompts,
                          log_size=log_size, **more)
        try:
            write(args.out / name, lambda part: torch.save(checkpoint, part))
        except RuntimeError as error:                   # torch raises this when the disk is full
            raise OSError(f"{name} cannot be written: {error}") from None


def write(file, job):
    """Write under a temporary name, then rename: a kill at any moment leaves the last good file."""
    part = file.with_suffix(".part")
    job(part)
    os.replace(part, file)


def load_pretrained(file, args, task):
    """The model of --init, or of the run to resume; BadInput if it does not fit the run. The run
    takes over the size of its network."""
    model, saved = sample.load_model(file)
    there = saved["alphabet"], saved["length"], saved["flags"]["process"]
    here = task.alphabet, task.length, args.process
    if here != there:
        raise BadInput(f"{file} holds a model of alphabet, length and process {there}: "
                       f"this run has {here}")
    for name in SIZES:
        setattr(args, name, saved["flags"][name])
    return model

# -----------------------------------------------------------------------------
# flags

def read_flags(argv=None):
    """The command line -> Flags and the task. Defaults are those of the task, the chain, then the
    method; with --resume the flags of the run."""
    epilog = "defaults of tasks, chains and methods:"
    named = {name: task.flags for name, task in TASKS.items()} | CHAIN_FLAGS | METHOD_FLAGS
    for name, flags in named.items():
        epilog += f"\n  {name}: " + " ".join(f"--{flag}={value}" for flag, value in flags.items())
    parser = sample.parser_of(Flags, __doc__, epilog)
    typed = vars(parser.parse_args(argv))
    for name in {"data", "reward", "init", "known"} & typed.keys():
        typed[name] = os.path.abspath(os.path.expanduser(typed[name]))
    if "data" in typed:
        typed.setdefault("task", "own")
    out = typed.get("out", Path("out") / typed.get("task", Flags.task)).expanduser()
    typed["out"] = out
    is_run = (out / "config.json").exists()
    if is_run and not typed.keys() & {"resume", "overwrite"}:
        parser.error(f"{out} holds a run already: use --resume, --overwrite or another --out")
    if "resume" in typed:
        if not is_run:
            parser.error(f"--resume: {out} holds no run")
        try:
            saved = json.loads((out / "config.json").read_text())
        except ValueError as error:
            parser.error(f"{out}/config.json is damaged: {error}")
        for name, value in {**typed, "processes": WORLD_SIZE}.items():
            if name not in MAY_CHANGE and value != saved.get(name):
                parser.error(f"--{name}={value}: the run in {out} has {saved.get(name)}; leave the "
                             "flag out, or start another --out with --init and --known")
        typed = saved | typed
    typed.pop("processes", None)
    task = open_task(**typed)
    chain = typed.get("process", Flags.process)
    algo = typed.get("algo", task.flags.get("algo", Flags.algo))
    defaults = task.flags | CHAIN_FLAGS.get(chain, {}) | METHOD_FLAGS.get(algo, {})
    args = Flags(**(defaults | typed))
    if args.report_samples is None:
        args.report_samples = args.iters * args.prompts * args.group // 280 * 4
    check(parser, args, task)
    return args, task


def check(parser, args, task):
    """Refuse what would not fail by itself, or too late."""
    def refuse(is_wrong, message):
        if is_wrong:
            parser.error(message)

    refuse(args.device == "cuda" and not torch.cuda.is_available(),
           "--device=cuda: torch sees no CUDA device; use --device=cpu")
    refuse(args.device == "mps", "--device=mps has no float64, which the times of the sampler "
           "need; use --device=cpu")
    refuse(min(args.prompts, args.updates, args.eval_every, args.n_layer, args.group - 1) < 1,
           "--group must be at least 2; --prompts, --updates, --eval_every and --n_layer 1")
    numbers = (args.beta, args.lr, args.clip, args.min_ess, args.explore, args.dropout, args.steps,
               args.replay, args.micro_batch, args.denoise)
    refuse(not all(number >= 0 for number in numbers) or math.inf in (args.beta, args.lr),
           "--beta and --lr must be at least 0, as --clip, --min_ess, --explore, --dropout, "
           "--steps, --replay, --micro_batch and --denoise")
    refuse(max(args.explore, args.dropout) >= 1, "--explore and --dropout must be below 1")
    refuse(not 0 < args.corrector_t < 1, "--corrector_t must be between 0 and 1")
    refuse(not math.isfinite(args.on_error or 0), "--on_error must be a finite number")
    refuse(args.prompts % WORLD_SIZE or args.pretrain_batch % WORLD_SIZE,
           f"--prompts and --pretrain_batch must be multiples of {WORLD_SIZE}")
    refuse(args.n_embd % args.n_head or args.n_embd % 2,
           "--n_embd must be even and a multiple of --n_head")
    is_wdce, is_absorb = args.algo == "wdce", args.process == "absorb"
    refuse((args.algo == "prdp" or is_wdce or args.explore) and not args.beta,
           "prdp, wdce and --explore need --beta above 0")
    refuse((is_wdce or args.explore) and (
        task.has_prompts or args.corrector_steps or not is_absorb),
           "wdce and --explore are for tasks without prompts, --process=absorb and no corrector")
    refuse(is_wdce and args.replay, "--algo=wdce learns from all, so it has no --replay")
    refuse(args.algo != "sepo" and args.clip_mode != "stop", "--clip_mode is for --algo=sepo")
    refuse(args.algo == "published" and (args.replay or not is_absorb),
           "--algo=published needs --process=absorb and --replay=0")


if __name__ == "__main__":
    sample.print_any_letter()
    main()
