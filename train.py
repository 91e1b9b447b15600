"""Pre-train a discrete diffusion model on a task's data, then fine-tune it on the task's black-box reward.

    python train.py --task=toy            about a minute and a half on two CPU cores; results in out/toy
    python train.py --task=toy --resume   go on with a run that was stopped, to the same numbers
    python train.py --task=dna --data=mine.fa.gz --length=80 --crop --reward=my_reward.py:score    your own data and reward
    torchrun --nproc_per_node=4 train.py --task=dna --prompts=4     the same on four cards (or processes), prompts shared out
    python train.py --help                every flag

Read from main() down: it tells the story in the order in which it runs.
"""
import argparse
import difflib
import itertools
import json
import math
import os
import random
import signal
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path as File

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import sepo
from diffusion import SCHEDULES, Absorbing, Uniform
from model import Config, Denoiser
from rewards import TASKS, BadInput, ask, open_task


CHAINS = {                # --process, and the defaults that suit it
    "absorb": {},
    "uniform": dict(steps=16, pretrain_iters=2000, pretrain_lr=1e-3, iters=300),
}

ALGOS = {                 # --algo, and the defaults that suit it
    "sepo": {},
    "loop": dict(advantage="loo", updates=8, path_events=0),
    "prdp": dict(updates=8, path_events=0),
    "reinforce": dict(advantage="running", updates=1, path_events=0),
}


def flag(default, help, choices=None, low=None, high=None):
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high))


@dataclass
class Flags:
    task: str = flag("toy", "what to learn", choices=TASKS)
    length: int = flag(0, "slots of a sequence, for dna and text; 0: as the task has it", low=0)
    data: str = flag("", "file to pre-train on: a sequence a line, or FASTA; for text, a text; .gz too (default: the task's)")
    pad: str = flag("", "letter with which short sequences of --data are filled up (default: they are refused)")
    crop: bool = flag(False, "cut windows at random places from long sequences of --data; else they are refused")
    reward: str = flag("", "file.py:function, list[str] -> list[float], in place of the task's reward")
    init: str = flag("", "pretrained.pt of another run, to start from; skips pre-training, and brings the network's size")
    out: str = flag("", "folder for results (default: out/<task>)")
    overwrite: bool = flag(False, "replace the run that --out holds")
    resume: bool = flag(False, "go on with the run that --out holds, with its own flags")
    save_every: float = flag(30.0, "seconds between two saves of last.pt, from which --resume goes on", low=0)
    seed: int = flag(0, "seed of every random draw", low=0, high=2 ** 32 - 1)
    device: str = flag("auto", "cpu, cuda, or auto: cuda where there is one", choices=["auto", "cpu", "cuda"])
    dtype: str = flag("auto", "of the network's matrix products; auto: bfloat16 on cuda, float32 on cpu",
                      choices=["auto", "float32", "bfloat16"])
    micro_batch: int = flag(0, "states a backward pass, where memory is short; gradients add up. 0: all at once", low=0)
    compile: bool = flag(False, "torch.compile the transformer's blocks: pays on long runs of a large network")
    cuda_graph: bool = flag(False, "replay a rollout's forward passes as one CUDA graph (cuda only; not yet measured)")
    # chain
    process: str = flag("absorb", "noise: absorb turns letters into masks, uniform into other letters",
                        choices=CHAINS)
    schedule: str = flag("linear", "how the noise level runs over time", choices=SCHEDULES)
    # model
    n_layer: int = flag(4, "transformer blocks", low=1)
    n_head: int = flag(4, "attention heads", low=1)
    n_embd: int = flag(128, "channels; a multiple of 2 * n_head", low=2)
    conv: int = flag(0, "letters that a convolution over the embeddings reads at once; an odd number, 0: none", low=0)
    dropout: float = flag(0.0, "dropout, in pre-training alone", low=0, high=0.9)
    time_conditioning: bool = flag(False, "tell the network the time; always so with --process=uniform")
    # pre-training
    pretrain_iters: int = flag(800, "optimizer steps of pre-training", low=1)
    pretrain_batch: int = flag(128, "sequences a step", low=1)
    pretrain_lr: float = flag(2e-3, "peak learning rate; warm-up over 50 steps, then linear decay", low=0)
    data_size: int = flag(20000, "sequences that the task makes, or windows cut from --data", low=1)
    # sampling
    steps: int = flag(0, "grid of the reverse process; 0: none, every slot at its own exact time (absorb only)", low=0)
    corrector_steps: int = flag(0, "moves of the corrector in every rollout", low=0)
    corrector_t: float = flag(0.5, "time at which the reverse process pauses for the corrector", low=0.01, high=0.99)
    # fine-tuning
    algo: str = flag("sepo", "sepo; loop (leave-one-out PPO); prdp (reward differences); reinforce (the baseline)",
                     choices=ALGOS)
    iters: int = flag(150, "rollouts", low=1)
    prompts: int = flag(1, "prompts a rollout (P)", low=1)
    group: int = flag(128, "samples a prompt (G); a rollout asks P * G rewards", low=1)
    updates: int = flag(16, "optimizer steps a rollout", low=1)
    lr: float = flag(1e-3, "learning rate at the start; linear decay to 5%% of it", low=0)
    states: str = flag("path", "where SEPO takes the score", choices=["path", "noised", "terminal"])
    path_events: int = flag(1, "events of each path scored an update, one forward pass each; 0: all (not sepo)", low=0)
    advantage: str = flag("grpo", "what a reward is compared with; prdp compares within the group",
                          choices=["grpo", "dr_grpo", "loo", "ppo", "running"])
    clip: float = flag(0.1, "clip of the ratio to 1 +- clip; prdp: of the log-ratio of a path, in nats", low=0)
    beta: float = flag(0.1, "price of a nat of KL to the pre-trained model, in units of reward", low=0)
    beta_warmup: int = flag(0, "rollouts over which beta grows from 0", low=0)
    kl: str = flag("return", "where the KL is paid: in the return, or in closed form in sepo's loss",
                   choices=["return", "loss"])
    ref_every: int = flag(0, "rollouts after which the KL's reference becomes the model of the day; 0: never", low=0)
    consistency: float = flag(0.0, "weight of the likelihood bound on own samples (steadies --states=noised; try 0.3)", low=0)
    entropy: float = flag(0.0, "entropy bonus, per nat of the slot laws", low=0)
    grad_clip: float = flag(1.0, "largest norm of a gradient", low=1e-6)
    # reporting
    eval_every: int = flag(10, "rollouts between evaluations: exact ones (enumerable tasks), or the task's own", low=1)
    report_samples: int = flag(1000, "samples of each model in the report at the end; a quarter as many of best-of-n", low=1)
    best_of: int = flag(16, "the report's best-of-n of the pre-trained model (tasks that cannot be enumerated)", low=2)


# ---- the story --------------------------------------------------------------------------------------------------------

def main(argv=None):
    """The whole run; returns the report's dict. Raises BadInput for anything that the user can mend."""
    flags = parse_flags(sys.argv[1:] if argv is None else argv)
    task = open_task(flags.task, flags.length, flags.data, flags.pad, flags.crop, flags.reward)
    torch.manual_seed(flags.seed)
    np.random.seed(flags.seed)
    random.seed(flags.seed)
    device = pick_device(flags.device)
    model, process = build(flags, task, device)        # the same weights in every process ...
    if flags.init:
        load(flags.init, task, process, model)
    small = task.enumerable and (task.vocab_size + 1) ** task.length * max(1, flags.steps) <= 1_000_000    # for exact laws
    if small and flags.time_conditioning and not flags.steps and flags.process == "absorb":
        raise BadInput("an exact evaluation of a time-conditioned model needs a grid: add --steps=16")
    data = task.data(flags.data_size, torch.Generator().manual_seed(flags.seed)).to(device)          # [n, L]
    if task.oracle is None:
        ask(task, data[:2])                            # a reward that fails had better fail now
    join(device)
    out = open_folder(flags)                           # nothing is written before all of the input was found good
    if rank():                                         # ... but other draws in each, of its share of the prompts
        torch.manual_seed(flags.seed + 1_000_003 * rank())
    flags = replace(flags, prompts=flags.prompts // ranks(), pretrain_batch=flags.pretrain_batch // ranks())
    clock = Clock(device)

    with Session(out, flags) as session:
        if task.oracle is not None:
            learn_oracle(out, task, data, flags.resume)
        if session.phase == "finetune":
            load(out / "pretrained.pt", task, process, model)
        else:
            if not flags.init:
                pretrain(flags, task, process, model, data, session, clock)
            save(out / "pretrained.pt", task, process, model)
        model.eval()                                   # from here on no dropout: the ratio must be 1 at theta_old
        reference = compiled(flags, deepcopy(model).requires_grad_(False))
        exact = Exact(flags, task, process, reference) if small else None
        watch = exact or Watch(flags, task, process, data)
        anchor = compiled(flags, deepcopy(reference))  # of the KL; --ref_every moves it
        try:
            finetune(flags, task, process, model, anchor, data, watch, session, clock, lambda: plot(out, exact))
        finally:                                       # on Ctrl-C or an error too: nothing that was learnt is lost
            if session.start is not None:              # ... nor overwritten, when last.pt could not be restored
                save(out / "finetuned.pt", task, process, model)
    leave()
    if rank():
        return None
    clock.report(model, task.length)
    plot(out, exact)
    rows = report(flags, task, process, {"pre-trained": reference, "fine-tuned": model}, reference, exact, data)
    (out / "report.json").write_text(json.dumps(rows, indent=2) + "\n")
    return rows


def build(flags, task, device):
    """The network and its chain, or BadInput for a size or a combination of flags that cannot work."""
    uniform, cuda = flags.process == "uniform", device.type == "cuda"
    if uniform and flags.states == "noised":
        raise BadInput("--states=noised scores masked slots, and --process=uniform has none: use path or terminal")
    if uniform and not flags.steps:
        raise BadInput("--process=uniform needs a grid: a slot may change at any time; try --steps=16")
    if flags.algo == "prdp" and not flags.beta:
        raise BadInput("--algo=prdp regresses rewards on beta * log-ratios: it needs --beta above 0")
    if flags.algo == "sepo" and not flags.path_events:
        raise BadInput("--algo=sepo scores --path_events=1 or more; all of them is --algo=loop")
    if flags.algo != "sepo" and (flags.states != "path" or flags.kl != "return" or flags.consistency or flags.entropy):
        raise BadInput(f"--states, --kl, --consistency and --entropy are sepo's: --algo={flags.algo} knows the path alone")
    for name in ("prompts", "pretrain_batch"):
        if getattr(flags, name) % ranks():
            raise BadInput(f"--{name}={getattr(flags, name)}: {ranks()} processes share it: a multiple of {ranks()} is needed")
    if flags.algo == "prdp" and flags.path_events:
        raise BadInput("--algo=prdp needs the whole path: leave out --path_events")
    if flags.cuda_graph and (uniform or not cuda):
        raise BadInput("--cuda_graph needs --device=cuda and --process=absorb")
    config = Config(task.vocab_size, task.length, flags.n_layer, flags.n_head, flags.n_embd, flags.dropout,
                    flags.time_conditioning or uniform, flags.conv)
    try:
        model = Denoiser(config).to(device)
    except ValueError as error:
        raise BadInput(str(error)) from error
    if flags.dtype == "bfloat16" or (flags.dtype == "auto" and cuda):
        model.autocast = torch.bfloat16
    compiled(flags, model)
    if uniform:
        return model, Uniform(task.vocab_size, flags.schedule)
    return model, Absorbing(task.vocab_size, flags.schedule, flags.cuda_graph)


def compiled(flags, model):
    """The model, its blocks compiled where --compile asks for it; a deep copy loses that."""
    if flags.compile:
        torch._dynamo.config.recompile_limit = 64      # blocks share their code: with and without gradients, slots, one row
    for block in model.blocks if flags.compile else []:
        block.compile(dynamic=True)                    # rows and slots shrink from pass to pass
    return model


def learn_oracle(out, task, data, resume):
    """The network in the reward: fitted once a run, by the first process, and saved with the run."""
    if rank() == 0 and not (resume and (out / "oracle.pt").exists()):
        task.oracle.fit(data)
        write(out / "oracle.pt", dict(model=task.oracle.state_dict()))
    if dist.is_initialized():
        dist.barrier()
    restore(out / "oracle.pt", task.oracle)


def pretrain(flags, task, process, model, data, session, clock):
    """Minimise the score entropy of the data [n, L]; of what a prompt leaves free, where there are prompts."""
    device = data.device
    held = held_data(task, 256, flags.seed).to(device) if task.held else None

    def loss_of(x0):
        return process.loss(model, x0, given=None if task.given is None else task.given(x0))
    optimizer = torch.optim.AdamW(model.parameters(), flags.pretrain_lr, weight_decay=0.01, fused=True)
    guard, window, text = Guard(model, optimizer, flags.grad_clip), dict(total=torch.zeros(()), n=0), "warming up"
    clock("start")
    parts = dict(model=model, optimizer=optimizer, guard=guard.count, window=window)
    for i in session.steps("pretrain", flags.pretrain_iters, parts):
        set_lr(optimizer, flags.pretrain_lr * min((i + 1) / 50, max(0.05, 1 - i / flags.pretrain_iters)))
        x0 = data[torch.randint(len(data), (flags.pretrain_batch,), device=device)]
        loss = guard.step(loss_of(part) * (len(part) / len(x0)) for part in x0.split(flags.micro_batch or len(x0)))
        clock.passes["pre-training"] += 3 * len(x0)
        window.update(total=window["total"] + loss, n=window["n"] + 1)
        if (i + 1) % 50 == 0 or i + 1 == flags.pretrain_iters:
            guard.check()
            line = dict(phase="pretrain", iter=i + 1, loss=window["total"].item() / window["n"])
            window.update(total=torch.zeros(()), n=0)
            text = f"loss {line['loss']:.3f} nats"
            if held is not None:
                model.eval()
                with torch.no_grad():
                    line["held_loss"] = loss_of(held).item()
                model.train()
                text += f" (held out: {line['held_loss']:.3f})"
            session.log(**line)
        session.end(i, parts, text)
    clock("pre-training")


def finetune(flags, task, process, model, reference, data, watch, session, clock, draw):
    """Rollout, reward, advantages, a few updates; again."""
    optimizer = torch.optim.AdamW(model.parameters(), flags.lr, weight_decay=0.0, fused=True)
    guard, baseline = Guard(model, optimizer, flags.grad_clip), sepo.Baseline()
    count = dict(queries=0, passes=0)  # rewards asked; states through the network, a backward pass counting two
    parts = dict(model=model, reference=reference, optimizer=optimizer, guard=guard.count, baseline=vars(baseline),
                 count=count)
    clock("start")
    for i in session.steps("finetune", flags.iters, parts):
        set_lr(optimizer, flags.lr * max(0.05, 1 - i / flags.iters))

        # rollout: tokens, and the log-probability of every transition as it was drawn
        prompt = None
        if task.given:
            prompt = task.prompts(data[torch.randint(len(data), (flags.prompts,), device=data.device)])
            prompt = prompt.repeat_interleave(flags.group, 0)                        # [P * G, L]
        clock("other")
        path = process.sample(model, flags.prompts * flags.group, task.length, flags.steps or None, prompt, None,
                              flags.corrector_steps, flags.corrector_t)
        clock("rollout")
        reward = ask(task, path.tokens)                                              # [B], the only use of the black box
        clock("reward")

        # what each sample is worth: its reward, less beta times what its path cost in nats
        with torch.no_grad():
            logp_ref = process.replay(reference, path, flags.micro_batch or None)
        log_ratio = path.logp - logp_ref                                             # a number for each transition
        beta = flags.beta * min(1, (i + 1) / (flags.beta_warmup or 1))
        value = sepo.regularised(reward, log_ratio, beta if flags.kl == "return" else 0).view(flags.prompts, flags.group)
        everyone = gathered(value)                                                   # [P of all processes, G]
        mine = slice(rank() * flags.prompts, (rank() + 1) * flags.prompts)
        advantage = sepo.advantages(everyone, flags.advantage, baseline)[mine].flatten()             # [B]
        baseline.update(everyone)
        clock("reference")

        # updates, each from fresh events of the path
        terms = objective(flags, process, model, reference, path, reward.view_as(value), advantage, logp_ref, beta)
        losses, clipped = [], []

        def noted():
            for loss, stats in terms():
                clipped.append(stats["clip_fraction"])
                yield loss
        for _ in range(flags.updates):
            losses.append(guard.step(noted()))
        guard.check()
        if flags.ref_every and (i + 1) % flags.ref_every == 0:
            reference.load_state_dict(model.state_dict())
        clock("updates")

        states, scored = path.n_events.sum().item(), flags.path_events if flags.states == "path" else 1
        spent = 2 * states + flags.updates * (3 * scored * len(reward) or 4 * states)
        clock.passes["fine-tuning"] += spent
        count["queries"] += len(reward) * ranks()
        count["passes"] += spent * ranks()
        line = averaged(loss=mean(losses), reward=reward.mean().item(), reward_std=reward.std(correction=0).item(),
                        kl=log_ratio.flatten(1).sum(dim=1).mean().item(), clip_fraction=mean(clipped))
        line = dict(phase="finetune", iter=i + 1, **count, **line, skipped=int(guard.count["skipped"]))
        if rank() == 0 and ((i + 1) % flags.eval_every == 0 or i + 1 == flags.iters):
            line.update(watch(model, path, reward))
        session.log(**line)
        if rank() == 0 and (i + 1) % 25 == 0:
            draw()
        session.end(i, parts, f"reward {line['reward']:.3f}  KL {line['kl']:.2f} nats")


def objective(flags, process, model, reference, path, reward, advantage, logp_ref, beta):
    """The chosen method's loss on this rollout -> a function of nothing: its parts (loss, stats) at the weights as they are, a
    part for each micro-batch of states; their losses add up."""
    size = flags.micro_batch
    if flags.algo == "prdp":
        return lambda: [sepo.prdp_loss(process, model, path, reward, logp_ref, beta, flags.clip, size or None)]
    if flags.algo in ("loop", "reinforce"):
        clip = flags.clip if flags.algo == "loop" else float("inf")
        if not flags.path_events:
            return lambda: [sepo.loop_loss(process, model, path, advantage, clip, chunk=size or None)]
        return lambda: (sepo.loop_loss(process, model, path, advantage, clip, view=part)
                        for part in process.path_view(path, flags.path_events).split(size))
    once = None                        # `path` draws fresh states each time, their old log-probabilities being known
    if flags.states != "path":         # the others draw theirs once
        once = sepo.draw_view(process, path, flags.states)
        with torch.no_grad():
            once.logp_old = torch.cat([sepo.line_logp(process, model, part)[0] for part in once.split(size)])
    return lambda: (sepo.sepo_loss(process, model, path, advantage, flags.states, flags.clip, flags.consistency, flags.entropy,
                                   view=part, reference=reference, beta=beta if flags.kl == "loss" else 0)
                    for part in (once or process.path_view(path, flags.path_events)).split(size))


# ---- exact evaluation of enumerable tasks -------------------------------------------------------------------------------

class Exact:
    """Ground truth by enumeration: E[R], KL to the pre-trained model, and the share of the possible improvement.

    Over laws p of the sample, J(p) = E_p[R] - beta KL(p || p_ref) is largest at p* ~ p_ref exp(R / beta), where it is
    beta log E_ref exp(R / beta). share_of_optimum = (J - J_ref) / (J* - J_ref). It scores every sequence once: these
    are not counted as queries, and no update sees them. The sampler that is judged is the plain one, without a corrector."""

    def __init__(self, flags, task, process, reference):
        self.process, self.length, self.steps, self.beta = process, task.length, flags.steps or None, flags.beta
        device = next(reference.parameters()).device
        everything = torch.tensor(list(itertools.product(range(task.vocab_size), repeat=task.length)), device=device)
        self.reward = ask(task, everything)                                          # [V**L]
        self.reference = self.law(reference).clamp(min=torch.finfo(torch.float).tiny).log()        # [V**L]; never -inf
        self.floor = (self.reference.exp() * self.reward).sum().item()               # J of the pre-trained model
        self.optimum = self.beta * torch.logsumexp(self.reference + self.reward / self.beta, 0).item() if self.beta else \
            self.reward.max().item()

    @torch.no_grad()
    def law(self, model):
        return self.process.exact_law(model, self.length, self.steps)

    def __call__(self, model, path=None, reward=None):
        p = self.law(model)
        reward, kl = (p * self.reward).sum().item(), (torch.xlogy(p, p) - p * self.reference).sum().item()
        room = self.optimum - self.floor               # 0 where every sequence has the same reward: any model is optimal
        share = (reward - self.beta * kl - self.floor) / room if room > 1e-9 else 1.0
        return dict(exact_reward=reward, exact_kl=kl, share_of_optimum=share)


class Watch:
    """What can be seen of a task that is too large for exact laws: its own measures of a rollout, and the reward on held-out
    prompts, a sample each."""

    def __init__(self, flags, task, process, data):
        self.task, self.process, self.steps = task, process, flags.steps or None
        self.measure = task.measure(data) if task.measure else None
        self.prompts = task.prompts(held_data(task, 256, flags.seed).to(data.device))

    def __call__(self, model, path, reward):
        seen = self.measure(path.tokens, reward) if self.measure else {}
        if self.prompts is not None:
            path = self.process.sample(model, len(self.prompts), self.task.length, self.steps, self.prompts)
            name = "reward, held-out prompts" if self.task.held else "reward, prompts"
            seen[name] = ask(self.task, path.tokens).mean().item()
        return {"watch": seen} if seen else {}


def held_data(task, n, seed):
    """At most n sequences that pre-training does not see; of its data, where the task holds none out -> [n, L]."""
    return (task.held or task.data)(n, torch.Generator().manual_seed(seed + 1))[:n]


# ---- the end of a run ---------------------------------------------------------------------------------------------------

def report(flags, task, process, models, reference, exact, data):
    """Print what was learnt as a table, and some samples; return its rows. With prompts, all of it is on held-out ones. Where
    laws are not known, the held-out data and the best of several samples of the pre-trained model stand beside the models."""
    held = held_data(task, flags.report_samples, flags.seed).to(data.device)
    prompts = task.prompts(held)
    n = flags.report_samples if prompts is None else len(held)

    def draw(model, count, prompts, kl=True):
        """Samples [count, L], in batches, and their path KL to the pre-trained model, nats."""
        tokens, ratios, size = [], [], max(250, flags.prompts * flags.group)
        for start in range(0, count, size):
            end = min(start + size, count)
            given = None if prompts is None else prompts[start:end]
            path = process.sample(model, end - start, task.length, flags.steps or None, given)
            tokens.append(path.tokens)
            if kl:
                with torch.no_grad():
                    ratios.append((path.logp - process.replay(reference, path)).flatten(1).sum(dim=1))
        return torch.cat(tokens), torch.cat(ratios).mean().item() if kl else None
    drawn = {} if exact else {"data": (held, None)}
    drawn |= {name: draw(model, n, prompts) for name, model in models.items()}
    if not exact:
        k = flags.best_of
        tokens, _ = draw(reference, max(1, n // 4) * k, None if prompts is None else prompts.repeat_interleave(k, 0), kl=False)
        best = ask(task, tokens).view(-1, k).argmax(dim=1) + k * torch.arange(len(tokens) // k, device=data.device)
        drawn[f"best of {k}"] = tokens[best], math.log(k) - (k - 1) / k              # the KL of best-of-n, at most
    measure, rows = task.measure(data) if task.measure else None, {}
    for name, (tokens, kl) in drawn.items():
        reward = ask(task, tokens)
        row = {"reward": reward.mean().item(), "KL (nats)": kl, "distinct": len(tokens.unique(dim=0)) / len(tokens)}
        if exact:
            truth = exact(models[name])
            row |= {"reward": truth["exact_reward"], "KL (nats)": truth["exact_kl"],
                    "share of optimum": truth["share_of_optimum"]}
        else:
            given = None if prompts is None else task.given(tokens)
            row["bound (nats)"] = process.bound(reference, tokens, 8, given=given)[0].mean().item()
        rows[name] = row | (measure(tokens, reward) if measure else {})
    columns = list(rows["fine-tuned"])
    print(f"{'':12}" + "".join(f"  {column:>9}" for column in columns))
    for name, row in rows.items():
        cells = ["-" if row[column] is None else f"{row[column]:.3f}" for column in columns]
        print(f"{name:12}" + "".join(f"  {cell:>{max(9, len(column))}}" for cell, column in zip(cells, columns)))
    for name, (tokens, _) in drawn.items():
        samples = task.decode(tokens[:6])
        print(f"{name:12} {'  '.join(samples)}" if task.length < 16 else "\n".join([f"{name}:", *samples]))
    return rows


def plot(out, exact):
    """curve.png from metrics.jsonl, over the rewards asked: the reward, the share of the optimum, the KL, the clip."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    lines = [line for line in lines if line["phase"] == "finetune"]
    shared = [line for line in lines if "share_of_optimum" in line]
    x, reward, spread, kl, clip = (np.array([line[key] for line in lines]) for key in
                                   ("queries", "reward", "reward_std", "kl", "clip_fraction"))
    figure, ((top, right), (low, last)) = plt.subplots(2, 2, figsize=(10, 6), sharex=True)
    top.fill_between(x, reward - spread, reward + spread, alpha=0.15, lw=0, label="spread of the samples")
    top.plot(x, reward, lw=0.7, alpha=0.5, color="tab:blue", label="mean of a rollout")
    top.plot(x, smooth(reward), color="tab:blue", label="smoothed")
    low.plot(x, kl, lw=0.7, alpha=0.5, color="tab:purple")
    low.plot(x, smooth(kl), color="tab:purple")
    last.plot(x, clip, lw=0.7, color="tab:orange")
    if exact:
        star = torch.softmax(exact.reference + exact.reward / exact.beta, 0) if exact.beta else None
        best = (star * exact.reward).sum().item() if exact.beta else exact.optimum
        top.plot([a["queries"] for a in shared], [a["exact_reward"] for a in shared], "k.-", lw=1, label="exact")
        top.axhline(best, color="tab:green", ls="--", lw=1, label="optimum")
        top.axhline(exact.floor, color="tab:red", ls=":", lw=1, label="pre-trained")
        right.plot([0] + [a["queries"] for a in shared], [0] + [a["share_of_optimum"] for a in shared], "k.-", lw=1)
        right.axhline(1, color="tab:green", ls="--", lw=1)
        right.axhline(0, color="tab:red", ls=":", lw=1)
        worst = min([a["share_of_optimum"] for a in shared], default=0)
        right.set(ylabel="share of the optimum", ylim=(min(worst, 0) - 0.05, 1.05))
    elif any("watch" in line for line in lines):
        watched = [line for line in lines if "watch" in line]
        name = next(iter(watched[0]["watch"]))         # the first is what the task cares for most
        right.plot([line["queries"] for line in watched], [line["watch"][name] for line in watched], "k.-", lw=1)
        right.set(ylabel=name)
    else:
        right.plot(x, [line["loss"] for line in lines], lw=0.7, color="tab:gray")
        right.set(ylabel="loss")
    top.set(ylabel="reward")
    low.set(xlabel="reward queries", ylabel="KL of paths to the reference (nats)")
    last.set(xlabel="reward queries", ylabel="share of terms clipped", ylim=(0, None))
    top.legend(fontsize=7)
    top.locator_params(axis="x", nbins=5)
    figure.tight_layout()
    figure.savefig(out / "curve.part.png", dpi=110)
    os.replace(out / "curve.part.png", out / "curve.png")
    plt.close(figure)


def smooth(values, width=10):
    """Mean over the last `width` values, fewer at the start."""
    total = np.concatenate(([0.0], np.cumsum(values)))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - width, 0)
    return (total[end] - total[start]) / (end - start)


# ---- plumbing -----------------------------------------------------------------------------------------------------------

class Guard:
    """Optimizer steps that a loss or gradient that is not finite cannot spoil: they are skipped and counted on the device, so
    that no update waits for the host; check() stops the run when the last `patience` updates were all skipped."""

    def __init__(self, model, optimizer, grad_clip, patience=20):
        self.parameters, self.optimizer, self.grad_clip = list(model.parameters()), optimizer, grad_clip
        self.patience, self.count = patience, dict(skipped=torch.zeros(()), row=torch.zeros(()))

    def step(self, losses):
        """One update on the sum of `losses`, each with its own backward pass -> that sum, detached."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.parameters[0].device)
        for loss in losses:
            loss.backward()
            total += loss.detach()
        average([total, *(p.grad for p in self.parameters if p.grad is not None)])
        bad = ~(total + torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)).isfinite()
        self.optimizer.found_inf = bad.float()         # as GradScaler has it: fused AdamW leaves weights and moments alone
        self.optimizer.step()
        self.count.update(skipped=self.count["skipped"] + bad, row=(self.count["row"] + 1) * bad)
        return total

    def check(self):
        if self.count["row"] >= self.patience:
            raise BadInput(f"{self.patience} updates in a row had a loss or gradient that is not finite: "
                           "try a smaller learning rate")


class Clock:
    """Seconds by what they went into, and the states that went through the network, a backward pass counting two. On CUDA a
    phase ends when the device has done what it was asked for: one synchronisation a phase, none within."""

    PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12}                   # bfloat16 FLOP/s, dense

    def __init__(self, device):
        self.device, self.last, self.spent = device, time.perf_counter(), {}
        self.passes = {"pre-training": 0, "fine-tuning": 0}

    def __call__(self, name):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.spent[name], self.last = self.spent.get(name, 0.0) + now - self.last, now

    def report(self, model, length):
        """Tokens a second through the network, a training step counting three; on a card that is known, the share of its peak
        (FLOPs: 2 a weight and token, and attention's 4 * length * width a layer); what a rollout's time went into."""
        parts = ("rollout", "reward", "reference", "updates", "other")
        tuning = sum(self.spent.get(name, 0) for name in parts)
        spent = {"pre-training": self.spent.get("pre-training", 0), "fine-tuning": tuning}
        weights = sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel()
        flop = 2 * weights + 4 * length * model.config.n_embd * model.config.n_layer
        card = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        peak = next((peak for name, peak in self.PEAK.items() if name in card), None)
        for phase, passes in self.passes.items():
            if passes:
                rate = passes * length / spent[phase]
                used = f", {rate * flop / peak:.1%} of the peak of one {card}" if peak else ""
                print(f"{phase}: {rate:,.0f} tokens a second{used}", file=sys.stderr)
        if self.passes["fine-tuning"]:
            shares = ", ".join(f"{name} {self.spent.get(name, 0) / tuning:.0%}" for name in parts)
            print(f"fine-tuning: {shares} of the time", file=sys.stderr)


# ---- several processes ----------------------------------------------------------------------------------------------------

def rank():
    """Which of torchrun's processes this is; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def ranks():
    """How many processes there are; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join(device):
    """Meet the other processes: each samples and scores its own prompts, gradients are averaged, the first logs and saves."""
    if ranks() > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def leave():
    if dist.is_initialized():
        dist.destroy_process_group()


def average(tensors):
    """Each tensor becomes its mean over the processes, in one message."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= ranks()
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))


def averaged(**numbers):
    """Each number's mean over the processes, by name."""
    means = torch.tensor(list(numbers.values()), dtype=torch.float64)
    average([means])
    return dict(zip(numbers, means.tolist()))


def agreed(*wishes):
    """What any process wants, all of them do."""
    if not dist.is_initialized():
        return wishes
    wanted = torch.tensor(wishes, dtype=torch.float)
    dist.all_reduce(wanted, dist.ReduceOp.MAX)
    return [wish > 0 for wish in wanted.tolist()]


def gathered(rows):
    """[P, G] of each process -> [P * ranks, G]."""
    if not dist.is_initialized():
        return rows
    parts = [torch.empty_like(rows) for _ in range(ranks())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


class Session:
    """A run as it goes by: metrics.jsonl, progress on standard error, and last.pt, from which --resume goes on to the same
    numbers. The first Ctrl-C (or SIGTERM) lets the update finish and saves; a second one stops a single process at once. Of
    several processes the first writes."""

    def __init__(self, out, flags):
        self.out, self.every, self.stopping, self.saved = out, flags.save_every, False, None
        if flags.resume and (out / "last.pt").exists():
            self.saved = read(out / "last.pt")
            if not {"phase", "iter", "lines", "seconds", "random", "parts"} <= set(self.saved):
                raise BadInput(f"{out / 'last.pt'} is not what --resume saved")
        self.phase, self.start = self.saved["phase"] if self.saved else "pretrain", None
        kept = open(out / "metrics.jsonl").readlines()[:self.saved["lines"]] if self.saved else []
        self.lines, self.gone = len(kept), self.saved["seconds"] if self.saved else 0.0
        if rank() == 0:
            part = out / "metrics.part"                # what a killed run logged after its last save is not part of it
            part.write_text("".join(kept))
            os.replace(part, out / "metrics.jsonl")
        self.file = open(os.devnull if rank() else out / "metrics.jsonl", "a")

    def __enter__(self):
        def stop(*_):
            if self.stopping and ranks() == 1:         # torchrun passes on what the terminal has sent already
                raise KeyboardInterrupt("stopped at once")
            self.stopping = True
        self.handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.file.close()

    def log(self, **line):
        """One JSON object a line, flushed as it comes; seconds: of this phase, over all its sittings."""
        self.file.write(json.dumps(line | dict(seconds=self.gone + time.time() - self.start)) + "\n")
        self.file.flush()
        self.lines += 1

    def steps(self, phase, total, parts):
        """The phase's iterations that are left, after its parts were set to what was saved."""
        first = 0
        if self.saved and self.saved["phase"] == phase:
            first = self.saved["iter"]
            try:
                for name, part in parts.items():
                    (part.update if isinstance(part, dict) else part.load_state_dict)(self.saved["parts"][name])
            except (KeyError, TypeError, RuntimeError, ValueError) as error:
                raise BadInput(f"{self.out / 'last.pt'} belongs to a run of another shape") from error
            if len(self.saved["random"]) != ranks():
                raise BadInput(f"{self.out / 'last.pt'} was saved by {len(self.saved['random'])} processes: this is {ranks()}")
            set_random_state(self.saved["random"][rank()])
        else:
            self.gone = 0.0
        self.phase, self.total, self.first, self.start, self.last = phase, total, first, time.time(), time.time()
        self.bar = tqdm(total=total, initial=first, desc=phase, leave=False) if sys.stderr.isatty() and not rank() else None
        try:
            yield from range(first, total)
        finally:
            if self.bar:
                self.bar.close()

    def end(self, i, parts, text):
        """The end of iteration i: progress, and last.pt if it is time, or the last iteration, or Ctrl-C was pressed."""
        last = i + 1 == self.total
        if self.bar:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif not rank() and (last or (i + 1) % max(1, self.total // 10) == 0):
            left = (time.time() - self.start) / (i + 1 - self.first) * (self.total - i - 1)
            print(f"{self.phase} {i + 1}/{self.total}: {text}, {left:.0f} s left", file=sys.stderr, flush=True)
        due, stop = agreed(last or self.stopping or time.time() - self.last >= self.every, self.stopping)
        if due:
            self.last = time.time()
            state = dict(phase=self.phase, iter=i + 1, lines=self.lines, seconds=self.gone + self.last - self.start,
                         random=random_states(),
                         parts={k: part if isinstance(part, dict) else part.state_dict() for k, part in parts.items()})
            write(self.out / "last.pt", state)
        if stop:
            raise KeyboardInterrupt(f"stopped; go on with: python train.py --resume --out={self.out}")


def random_states():
    """Of torch, CUDA, numpy and Python, in types that a checkpoint of plain tensors may hold; one for each process."""
    kind, key, *rest = np.random.get_state()
    mine = dict(torch=torch.get_rng_state(), cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
                numpy=[kind, torch.from_numpy(key.astype(np.int64)), *rest], python=random.getstate())
    states = [mine] * ranks()
    if dist.is_initialized():
        dist.all_gather_object(states, mine)
    return states


def set_random_state(state):
    kind, key, *rest = state["numpy"]
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state((kind, key.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])


def mean(scalars):
    return torch.stack(scalars).mean().item()


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def write(file, what):
    """torch.save by the first process, renamed into place: a kill at any moment leaves the last good file. BadInput where the
    disk refuses."""
    if rank():
        return
    part = file.with_suffix(".part")
    try:
        torch.save(what, part)
        os.replace(part, file)
    except (OSError, RuntimeError) as error:           # torch's writer turns a full disk into a RuntimeError
        raise BadInput(f"cannot write {file}: {str(error).splitlines()[0]}") from error


def read(file):
    """A checkpoint of plain tensors and numbers; whatever else the file holds is refused, not run."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"{file} does not exist") from None
    except Exception as error:                         # torn, truncated, no checkpoint at all, or one with code in it
        raise BadInput(f"{file} is no checkpoint of plain tensors, or is damaged ({type(error).__name__})") from error


def save(file, task, process, model):
    write(file, dict(model=model.state_dict(), config=asdict(model.config), task=task.name, alphabet=task.alphabet,
                     process=type(process).__name__))


def load(file, task, process, model):
    """A saved model's weights into `model`, or BadInput when they do not fit, or mean other letters or another noise."""
    saved = restore(file, model)
    here = dict(alphabet=task.alphabet, process=type(process).__name__)
    for name, value in here.items():
        if saved.get(name) != value:
            raise BadInput(f"{file} holds a model of {name} {saved.get(name)!r}: this run has {value!r}")


def restore(file, network):
    """A checkpoint's weights into the network -> all that the file holds."""
    saved = read(file)
    try:
        network.load_state_dict(saved["model"])
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        raise BadInput(f"{file} holds a model of another shape") from error
    return saved


RESULTS = ("metrics.jsonl", "oracle.pt", "pretrained.pt", "last.pt", "finetuned.pt", "curve.png", "report.json")


def open_folder(flags):
    """The output folder, new, to be overwritten, or to go on with; config.json is in it."""
    out = File(flags.out or f"out/{flags.task}")
    if rank() == 0:
        if (out / "config.json").exists() and not (flags.overwrite or flags.resume):
            raise BadInput(f"{out} holds another run: choose another --out, go on with --resume, or replace it with "
                           "--overwrite")
        try:
            out.mkdir(parents=True, exist_ok=True)
            for old in RESULTS if not flags.resume else ():
                (out / old).unlink(missing_ok=True)
            if not flags.resume:
                (out / "config.json").write_text(json.dumps(asdict(flags), indent=2) + "\n")
        except OSError as error:
            raise BadInput(f"cannot write to --out={out}: {error.strerror}") from error
    if dist.is_initialized():
        dist.barrier()
    return out


def pick_device(name):
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device=cuda, but torch sees no CUDA device: use --device=cpu")
    device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise BadInput(f"more processes than the {torch.cuda.device_count()} cards here: fewer, or --device=cpu")
        torch.cuda.set_device(local)
    return device


def nearest(word, words):
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"one of {', '.join(words)}"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)                        # one line, where argparse would print its usage first


def parse(argv, kind, doc, special=()):
    """Command line -> the values given of the dataclass `kind`. BadInput, with the nearest valid word, for what it does not
    know. special: {name: {flag: default}}, shown in --help."""
    known = {f.name: f for f in fields(kind)}
    parser = Parser(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, f in known.items():
        own = [f"; {key}: {special[key][name]}" for key in special if name in special[key]]
        plain = f.type is bool or f.default == ""
        shown = f.metadata["help"] + ("" if plain else f" (default: {f.default}{''.join(own)})")
        if f.type is bool:
            parser.add_argument(f"--{name}", action="store_true", help=shown, default=None)
        else:
            parser.add_argument(f"--{name}", metavar="|".join(f.metadata["choices"] or [f.type.__name__.upper()]), help=shown)
    given, unknown = parser.parse_known_args(argv)
    for word in unknown:
        name = word.lstrip("-").split("=")[0]
        raise BadInput(f"unknown flag {word.split('=')[0]}: {nearest(name, list(known))}" if word.startswith("--") else
                       f"unexpected {word!r}: flags are written --name=value")
    return {name: convert(known[name], value) for name, value in vars(given).items() if value is not None}


def parse_flags(argv):
    """Command line -> Flags. The defaults of the task, the chain and the method lie between Flags' own and what the command
    line says; a resumed run has its own flags."""
    special = {task.name: task.flags for task in TASKS.values()} | CHAINS | ALGOS
    values = parse(argv, Flags, __doc__, special)
    values |= {name: os.path.abspath(values[name]) for name in ("data", "reward", "init") if values.get(name)}
    task, process, algo = (values.get(name, getattr(Flags, name)) for name in ("task", "process", "algo"))
    if not values.get("resume"):
        return Flags(**special[task] | special[process] | special[algo] | values | size_of(values))
    out = File(values.get("out") or f"out/{task}")
    try:
        flags = Flags(**json.loads((out / "config.json").read_text()))
    except (OSError, ValueError, TypeError):
        raise BadInput(f"--resume: {out} holds no run to go on with") from None
    if flags.task not in TASKS:
        raise BadInput(f"--resume: the task {flags.task!r} of {out} is not in rewards.TASKS")
    for name, value in values.items():
        if name not in ("resume", "out", "save_every") and getattr(flags, name) != value:
            raise BadInput(f"--{name}={value}: the run in {out} has {getattr(flags, name)}; --resume goes on with it as it is")
    if flags.init and (out / "pretrained.pt").exists():
        flags.init = str(out / "pretrained.pt")        # its copy; the original may be gone
    return replace(flags, resume=True, overwrite=False, out=str(out), save_every=values.get("save_every", flags.save_every))


def size_of(values):
    """The flags of the network's size as the checkpoint --init has them."""
    if not values.get("init"):
        return {}
    names, file = ("n_layer", "n_head", "n_embd", "conv", "time_conditioning", "length"), File(values["init"])
    saved = read(file)
    saved = saved.get("config") if isinstance(saved, dict) else None
    if not isinstance(saved, dict) or not saved.keys() >= set(names):
        raise BadInput(f"--init={file} is no model of train.py")
    if file.parent == File(values.get("out") or f"out/{values.get('task', Flags.task)}").resolve():
        raise BadInput(f"--init={file} lies in the folder that this run would write: choose another --out")
    for name in values:
        if name.startswith("pretrain"):
            raise BadInput(f"--{name}: --init skips pre-training")
    for name in names:
        if values.get(name, saved[name]) != saved[name]:
            raise BadInput(f"--{name}={values[name]}: the model of --init has {saved[name]}")
    return {name: saved[name] for name in names}


def convert(f, text):
    """A flag's text -> its value, or BadInput."""
    if f.type is bool:
        return True
    try:
        value = f.type(text)
    except ValueError:
        kind = "a whole number" if f.type is int else "a number"
        raise BadInput(f"--{f.name}={text}: {kind} is needed") from None
    choices, low, high = f.metadata["choices"], f.metadata["low"], f.metadata["high"]
    if choices and value not in choices:
        raise BadInput(f"--{f.name}={text}: {nearest(value, choices)}")
    if low is not None and not (low <= value <= (float("inf") if high is None else high) and value < float("inf")):
        raise BadInput(f"--{f.name}={text}: it must be at least {low}" + ("" if high is None else f" and at most {high}"))
    return value


def run(main):
    """main() as a command: one line on standard error and exit status 2 for bad input, 130 for Ctrl-C."""
    try:
        main()
    except BadInput as error:
        message, status = error, 2
    except KeyboardInterrupt as stop:
        message, status = str(stop) or "stopped", 130
    except BrokenPipeError:                            # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    except OSError as error:                           # a full disk, a folder that went away
        message, status = f"{error.strerror or error} ({error.filename or 'while writing results'})", 2
    else:
        return
    print(f"{File(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    run(main)
