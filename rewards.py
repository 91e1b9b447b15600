"""The tasks: an alphabet, data to pre-train on, perhaps prompts, and a black-box reward.

A task is a subclass of Task; to add one, write the class and put it into TASKS. --data and --reward
bring your own without a line of code here. Shapes: B sequences of L positions, V letters; token v
is letter v of the alphabet. A reward sees strings only.

Reading order: what a task is; querying a reward, and keeping the answers; held-out data; the tasks
toy, dna, arithmetic, text and ehrlich; the user's own files.
"""
import csv
import gzip
import importlib.util
import json
import math
import os
import random
import re
import sys
import zlib
from contextlib import contextmanager, redirect_stdout
from functools import cache
from itertools import chain
from pathlib import Path
from pydoc_data import topics

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    import fcntl
except ImportError:                     # Windows
    fcntl = None


class BadInput(ValueError):
    """What the user gave cannot be used. One line: what is wrong, where, and what to do."""


class Task:
    """What to learn. A subclass gives

        alphabet    str: its letters; token v is letter v
        length      int: L, the number of positions
        flags       dict: defaults of train.py for this task, such as dict(n_layer=2, iters=80)
        draw        (n, generator) -> clean tokens [n, L] to pre-train on
        reward      (samples: list[str]) -> list[float]: the black box, one number per sample

    and may give, for clean tokens x [n, L],

        given       (x) -> bool [n, L]: which positions are the prompt (default: none)
        is_held     (x) -> bool [n]: which are held out (default: one in twenty, by the content of
                    the prompt, or of the whole where there is none)
        measure     (samples: list[str]) -> {column: number}: more columns of the report

    Then TASKS["mine"] = Mine, and train.main(["--task=mine"])."""

    alphabet = ""
    length = 0
    pad = ""                                # the letter that fills up short sequences, if any
    text = None                             # tokens to cut windows from, in place of draw
    flags = {}
    note = ""                               # what the user should know about the data

    def __init__(self, length=0):
        self.length = length or self.length

    def draw(self, n, generator):
        raise BadInput(f"the task {type(self).__name__} has no data: give it a method draw")

    def reward(self, samples):
        raise BadInput(f"the task {type(self).__name__} has no reward: give it one, or --reward")

    def given(self, x):
        return torch.zeros_like(x, dtype=torch.bool)

    def is_held(self, x):
        return fingerprint(self.prompts(x) if self.has_prompts else x) % 20 == 0

    def measure(self, samples):
        return {}

    def split(self, n, seed):
        """Draw n sequences -> those to train on, those held out. The latter are none if there are
        fewer than 20, or if all would be held out."""
        if self.text is not None:
            return split_windows(self.text, self.length, n, seed)
        x = self.draw(n, torch.Generator().manual_seed(seed))
        name, V = type(self).__name__, self.vocab_size
        is_tokens = getattr(x, "dtype", None) == torch.long and x.shape[1:] == (self.length,)
        if not is_tokens or not len(x) or x.min() < 0 or x.max() >= V:
            raise BadInput(f"draw of {name} must return int64 tokens [n, {self.length}], from 0 to "
                           f"{V - 1}")
        given = self.given(x)
        if getattr(given, "dtype", None) != torch.bool or given.shape != x.shape:
            raise BadInput(f"given of {name} must return bool [n, {self.length}]")
        held = self.is_held(x)
        if len(x) < 20 or held.all():
            held = torch.zeros_like(held)
        return x[~held], x[held]

    @property
    def vocab_size(self):
        return len(self.alphabet)

    @property
    def has_prompts(self):
        return type(self).given is not Task.given

    @property
    def blank(self):
        """How the mask is written: _, or another letter that the alphabet leaves free."""
        return unused("_?#@~", self.alphabet)

    def prompts(self, x):
        """Clean tokens [n, L] -> their prompts: the mask V at all positions that are not given."""
        return x.where(self.given(x), self.vocab_size)

    def decode(self, tokens):
        """Tokens [B, L] -> B strings of L letters; a mask is written as `blank`."""
        letters = self.alphabet + self.blank
        return ["".join(letters[v] for v in row) for row in tokens.tolist()]

    def strings(self, tokens):
        """Tokens [B, L] -> B strings without any pad, as a reward or a reader wants them."""
        return [string.replace(self.pad, "") for string in self.decode(tokens)]

    def encode(self, strings, blank=""):
        """Strings -> tokens [B, L]; short ones are filled up with the pad, if there is one.
        blank: how the mask may be written. Raises BadInput."""
        letters = self.alphabet + blank
        if self.pad:
            strings = [string.ljust(self.length, self.pad) for string in strings]
        for n, string in enumerate(strings, 1):
            which = f"sequence {n}: " if len(strings) > 1 else ""
            for i, c in enumerate(string, 1):
                if c not in letters:
                    raise BadInput(f"{which}{c!r} at position {i} of {string!r:.40} is not in "
                                   f"{letters!r}")
            if len(string) != self.length:
                raise BadInput(f"{which}{string!r:.40} has {len(string)} letters, the task "
                               f"{self.length}")
        return tokens_of(strings, letters)


def tokens_of(strings, letters):
    """Strings of one length -> tokens [n, L]; -1 for what is not among the letters."""
    return torch.tensor([[letters.find(c) for c in string] for string in strings])


def unused(preferred, letters):
    """A letter that does not occur: one of the preferred ones, or any other."""
    return next(c for c in chain(preferred, map(chr, range(33, 0x10000))) if c not in letters)

# -----------------------------------------------------------------------------
# querying a reward, and keeping the answers


@contextmanager
def users_code():
    """While code of the user runs: what it prints goes to standard error, it does not see our
    command line, and our random numbers, folder, grad mode and default dtype are afterwards what
    they were."""
    state, folder, dtype = random.getstate(), os.getcwd(), torch.get_default_dtype()
    numpy_state, argv = np.random.get_state(), sys.argv
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with redirect_stdout(sys.stderr), torch.random.fork_rng(devices), torch.set_grad_enabled(
            torch.is_grad_enabled()):
        try:
            sys.argv = argv[:1]
            yield
        finally:
            sys.argv = argv
            random.setstate(state)
            np.random.set_state(numpy_state)
            os.chdir(folder)
            torch.set_default_dtype(dtype)


def query(reward, samples, catch=False):
    """Ask a reward about samples, list[str] -> (values, problem).

    values: a float per sample, in their order; NaN where the reward failed, that is, returned None,
    NaN or infinity, or raised with catch=True (then each sample of the batch is asked alone).
    problem: the first failure, in one line; empty if there is none. What the reward prints goes to
    standard error. Raises RuntimeError from what the reward raises, and BadInput where it returns
    no list of one number per sample. A reward that draws random numbers has others in each call."""
    given, seed = list(samples), zlib.crc32("\n".join(samples).encode())
    try:
        with users_code():
            for seed_it in (random.seed, np.random.seed, torch.manual_seed):
                seed_it(seed)
            values = reward(given)
            if hasattr(values, "tolist"):               # of torch, numpy or pandas
                values = values.tolist()
            if hasattr(values, "__next__"):             # a generator runs now
                values = list(values)
    except BadInput:                                    # such as a task without a reward
        raise
    except (Exception, SystemExit) as error:
        if not catch:
            empty = " (one of its samples is empty)" if "" in samples else ""
            raise RuntimeError(f"the reward raised {error!r:.200}{empty}") from error
        if len(samples) == 1:
            return [math.nan], f"the reward of {samples[0]!r} raised {error!r:.80}"
        values, problems = zip(*(query(reward, [sample], catch) for sample in samples))
        return [value for value, in values], next(filter(None, problems), "")
    if given != samples:
        raise BadInput("the reward changed its list of samples, so its values may be in another "
                       "order: work on a copy, as in sorted(samples)")
    try:
        if not isinstance(values, (list, tuple)) or len(values) != len(samples):
            raise TypeError
        numbers = [math.nan if value is None else float(value + 0) for value in values]
    except (TypeError, ValueError, OverflowError):
        raise BadInput(f"the reward returned {values!r:.80} for {len(samples)} samples: it must "
                       "return one number per sample, in the order of the samples") from None
    failed = [i for i, number in enumerate(numbers) if not math.isfinite(number)]
    problem = f"the reward of {samples[failed[0]]!r} is {values[failed[0]]!r:.80}" if failed else ""
    return [number if math.isfinite(number) else math.nan for number in numbers], problem


RESERVED = {"iter", "phase", "queries", "failed", "reward", "reward_std", "best", "kl",
            "clip_fraction", "grad_norm"}           # columns of metrics.jsonl


def measured(task, samples, catch=False):
    """What the task measures of samples -> {column: float; None for NaN and infinity}. Raises
    BadInput for what is no such dict. catch: a failure is a warning, and the task measures nothing
    from then on."""
    try:
        with users_code():
            columns = task.measure(samples)
        try:
            values = {str(name): float(value) for name, value in columns.items()}
        except (AttributeError, TypeError, ValueError):
            values = None
        if values is None or not RESERVED.isdisjoint(values):
            raise BadInput(f"measure returned {columns!r:.80}: {{column: number}} is needed, and "
                           f"other names than {', '.join(sorted(RESERVED))}")
        return {name: x if math.isfinite(x) else None for name, x in values.items()}
    except (Exception, SystemExit) as error:
        if not catch:
            raise
        print(f"warning: measure failed, its columns are left out: {error!r:.200}", file=sys.stderr)
        task.measure = lambda samples: {}
        return {}


class RewardLog:
    """A memo of rewards, in the file rewards.jsonl of a run: one JSON line per distinct query,
    written as soon as the black box has answered. What is in it is not asked again.

        {"sample": "TCTCTC", "reward": 0.75, "iter": 3}

    iter: the rollout that asked it first; other queries have a "stage" (check, evaluation, report,
    sample). A sample that failed has --on_error as its reward, and "failed": true. Answers that
    were not yet written when the process was killed, AT_ONCE at most, are asked again."""

    AT_ONCE = 256                       # samples per call, of all processes together

    def __init__(self, file=None, on_error=None, is_writer=True):
        """file None: in memory alone. on_error: the reward of samples that fail; None: stop."""
        self.file, self.on_error, self.is_writer = file, on_error, is_writer
        self.lines, self.reward_of = [], {}
        if file and file.exists():
            content = file.read_bytes()
            whole = content[:content.rfind(b"\n") + 1]      # a kill may have torn the last line
            if is_writer and whole != content:
                os.truncate(file, len(whole))
            try:
                self.remember([json.loads(line) for line in whole.splitlines()])
            except (KeyError, TypeError, ValueError) as error:
                raise BadInput(f"{file} is damaged: {error!r}") from None

    def remember(self, lines):
        self.lines += lines
        self.reward_of |= {line["sample"]: float(line["reward"]) for line in lines}

    def add(self, rewards, **where):
        """Remember {sample: reward}, and write the lines at once."""
        lines = [dict(sample=sample, reward=r, **where) for sample, r in rewards.items()]
        if lines and self.file and self.is_writer:
            with open(self.file, "a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        self.remember(lines)

    def query(self, reward, samples, ask=query, **where):
        """The rewards of samples, list[str] -> float64 [B]. ask: how to query the new ones. where:
        iter or stage of their lines. Raises BadInput; good answers are kept even then."""
        new = [sample for sample in dict.fromkeys(samples) if sample not in self.reward_of]
        parts = [new[i:i + self.AT_ONCE] for i in range(0, len(new), self.AT_ONCE)]
        problems = [problem for part in parts if (problem := self.ask(reward, part, ask, where))]
        if problems and self.is_writer:
            n = len(self.failed.intersection(new))
            print(f"warning: {problems[0]}; {n} of {len(new)} new samples failed: their reward is "
                  f"{self.on_error:g}", file=sys.stderr)
        return torch.tensor([self.reward_of[sample] for sample in samples], dtype=torch.double)

    def ask(self, reward, new, ask, where):
        """Ask about new samples and remember the answers -> the first failure, if any."""
        values, problem = ask(reward, new, catch=self.on_error is not None)
        self.add({s: value for s, value in zip(new, values) if not math.isnan(value)}, **where)
        failed = [sample for sample in new if sample not in self.reward_of]
        if failed and self.on_error is None:
            raise BadInput(f"{problem}: a finite number is needed; --on_error=VALUE is the reward "
                           "of such samples")
        self.add(dict.fromkeys(failed, self.on_error), failed=True, **where)
        return problem

    @property
    def failed(self):
        """The samples for which the reward failed."""
        return {line["sample"] for line in self.lines if line.get("failed")}

    def queries(self, iter):
        """The number of distinct queries in the rollouts up to an iteration."""
        return sum(line.get("iter", math.inf) <= iter for line in self.lines)


def hold(folder):
    """Lock the folder of a run -> a file; nobody else gets the lock until it is closed. None where
    there are no locks; BadInput if another process has it."""
    file = open(folder / "lock", "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except (BlockingIOError, PermissionError):
        raise BadInput(f"another process runs in {folder}") from None
    except (AttributeError, OSError):                   # a system, or a file system, without them
        return None


def read_known(task, file):
    """--known=FILE: a rewards.jsonl, or CSV or TSV with columns `sample` and `reward` -> distinct
    tokens [n, L], mean rewards float64 [n]. BadInput, with file and row, for what is wrong."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadInput(f"--known={file} cannot be read: {error}") from None
    if text.startswith("{"):
        lines = text.splitlines()
        if re.fullmatch(r"\{.*[^}]", lines[-1]):         # a kill may have torn it
            lines.pop()
        try:
            rows = [row for row in map(json.loads, lines) if not row.get("failed")]
        except (AttributeError, ValueError) as error:
            raise BadInput(f"--known={file} is damaged: {error!r}") from None
    else:
        head = text.partition("\n")[0]
        delimiter = next((mark for mark in "\t;" if mark in head), ",")
        rows = csv.DictReader(text.splitlines(), delimiter=delimiter, skipinitialspace=True)
    found = {}                                          # a sample may have several rewards
    for i, row in enumerate(rows, 1):
        try:
            sample, = task.encode([str(row["sample"])]).tolist()
            reward = float(row["reward"])
            if not math.isfinite(reward):
                raise BadInput(f"the reward is {reward}")
            found.setdefault(tuple(sample), []).append(reward)
        except KeyError as error:
            raise BadInput(f"--known={file}: columns sample and reward are needed, there is no "
                           f"{error}") from None
        except (TypeError, ValueError) as error:
            raise BadInput(f"--known={file}, row {i}: {error}") from None
    if not found:
        raise BadInput(f"--known={file} has no row")
    unequal = sum(len(set(rewards)) > 1 for rewards in found.values())
    more = f"; {unequal:,} of them have unequal rewards: their mean counts" * bool(unequal)
    print(f"--known: {len(found):,} samples{more}", file=sys.stderr)
    rewards = [sum(rewards) / len(rewards) for rewards in found.values()]
    return torch.tensor(list(found)), torch.tensor(rewards, dtype=torch.double)

# -----------------------------------------------------------------------------
# held-out data

def fingerprint(x):
    """A number for each sequence of x [n, L] -> [n]; equal for equal ones."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 2 ** 31, (x.size(1),), generator=generator)
    return sum((column + 1) * weight for column, weight in zip(x.T, weights))


def split_windows(x, length, n, seed):
    """Tokens x, -1 where no window may lie -> n random windows [n, length] to train on, and those
    held out: of the last twentieth of all windows those that neither overlap nor equal one of the
    others."""
    rows = F.pad(x, (0, length), value=-1).unfold(0, length, 1)     # a view: it takes no memory
    start = (rows.amin(dim=1) >= 0).nonzero().squeeze(1)
    if not len(start):
        raise BadInput(f"no sequence has {length} known letters in a row, the length of a window")
    train, held = start.tensor_split([len(start) - len(start) // 20])
    held = held[held >= train[-1] + length]
    content = fingerprint(rows)
    held = held[~torch.isin(content[held], content[train])]
    generator = torch.Generator().manual_seed(seed)
    train = train[torch.randint(len(train), (n,), generator=generator)]
    held = held[torch.randperm(len(held), generator=generator)[:n]]
    return rows[train], rows[held]

# -----------------------------------------------------------------------------
# toy: small enough to enumerate

TOY_STEP = torch.tensor([[.55, .15, .25, .05],  # a Markov chain on ACGT; row: the letter before
                         [.10, .50, .05, .35],
                         [.30, .10, .50, .10],
                         [.05, .30, .15, .50]])


def markov_chain(step, n, length, generator):
    """n sequences of a chain with transition probabilities step [V, V], from a uniform start."""
    x = torch.randint(len(step), (n, 1), generator=generator)
    for _ in range(length - 1):
        x = torch.cat((x, torch.multinomial(step[x[:, -1]], 1, generator=generator)), dim=1)
    return x


class Toy(Task):
    """Short sequences of a Markov chain. What it teaches: the optimum can be known, and reached."""

    alphabet, length = "ACGT", 6
    flags = dict(exact=True, n_layer=2, n_embd=64, pretrain_iters=300, iters=80, lr=1e-3,
                 replay=15, eval_every=8, report_samples=1000)

    def draw(self, n, generator):
        return markov_chain(TOY_STEP, n, self.length, generator)

    def is_held(self, x):                   # nothing: there are but 4,096 sequences
        return torch.zeros(len(x), dtype=torch.bool)

    def reward(self, samples):
        """A quarter for each copy of TC, a sixteenth for each A; with six letters at most 3/4.

        TCTCTC (12/16), TCTCAA (10/16), TCAAAA (8/16) and AAAAAA (6/16) are peaks: no change of one
        letter improves them, and AAAAAA, the lowest, is the likeliest in the data. A greedy search
        stops at the first peak it meets."""
        return [s.count("TC") / 4 + s.count("A") / 16 for s in samples]

# -----------------------------------------------------------------------------
# dna: binding sites, their true activity, and an oracle that can be fooled; the experiment of
# DRAKES (2410.13643) in miniature

FACTORS = {                 # transcription factor: consensus in IUPAC letters, weight as activator
    "HNF4A": ("CAAAGTCCA", 1.0),
    "HNF1A": ("GTTAATNATTAAC", 1.2),
    "CEBPA": ("RTTGCGYAAY", 1.0),
    "FOXA": ("TRTTKRY", 0.8),
    "AP-1": ("TGASTCA", 1.0),
    "CREB": ("TGACGTCA", 1.0),
    "GATA1": ("WGATAR", 0.0),           # a repressor, in this simulation
}
MEASUREMENTS = 200          # sequences whose activity was measured ...
NOISE = 1.0                 # ... and the standard deviation of a measurement
IUPAC = dict(A="A", C="C", G="G", T="T", R="AG", Y="CT", S="CG", W="AT", K="GT", M="AC", N="ACGT")
OTHER_STRAND = str.maketrans("ACGT", "TGCA")


def site_pattern(consensus):
    """A regular expression that matches where a site starts, on either strand."""
    letters = [f"[{IUPAC[c]}]" for c in consensus]
    backward = "".join(reversed(letters)).translate(OTHER_STRAND)
    return re.compile(f"(?={''.join(letters)}|{backward})")


PATTERNS = {name: site_pattern(consensus) for name, (consensus, _) in FACTORS.items()}


def true_activity(sequence):
    """The ground truth, which the reward does not use: sites of one factor saturate, and every site
    of the repressor halves the whole."""
    total = 0
    for name, (_, weight) in FACTORS.items():
        n_sites = len(PATTERNS[name].findall(sequence))
        total += weight * (1 - 0.5 ** n_sites)
    return total * 0.5 ** len(PATTERNS["GATA1"].findall(sequence))


def dna_sequence(length, rng):
    """A promoter, aligned to its start: in every 16 letters of a random background there is a place
    for a site of any factor, on either strand. Half of the promoters are rich in G and C, and hold
    most of the sites: GC goes along with activity without causing it."""
    gc, site_rate = rng.choice([(0.65, 0.9), (0.35, 0.1)])
    letters = rng.choices("ACGT", [1 - gc, gc, gc, 1 - gc], k=length)
    for start in range(2, length, 16):
        consensus, _ = rng.choice(list(FACTORS.values()))
        site = "".join(rng.choice(IUPAC[c]) for c in consensus)
        if rng.random() < 0.5:
            site = site[::-1].translate(OTHER_STRAND)
        if rng.random() < site_rate:
            letters[start:start + len(site)] = site
    return "".join(letters[:length])


def one_hot(samples):
    """DNA strings -> [B, 4, L]."""
    return F.one_hot(tokens_of(samples, "ACGT"), 4).mT.float()


@cache
@torch.enable_grad()
def oracle(length):
    """A small convolutional network, one-hot [B, 4, L] -> activity [B, 1], fitted on few and noisy
    measurements, and stopped early since they are few. It takes GC for a cause: it can be hacked.
    Its seed is its own, so that all runs have the same oracle."""
    rng = random.Random(0)
    sequences = [dna_sequence(length, rng) for _ in range(MEASUREMENTS)]
    truth = torch.tensor([true_activity(s) for s in sequences])
    x = one_hot(sequences)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        y = truth + NOISE * torch.randn(MEASUREMENTS)
        net = nn.Sequential(nn.Conv1d(4, 64, 13, padding=6), nn.ReLU(), nn.AdaptiveAvgPool1d(1),
                            nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.1)
    for _ in range(60):
        loss = F.mse_loss(net(x).squeeze(1), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


class Dna(Task):
    """Regulatory DNA. What it teaches: a learned reward goes on rising where the truth does not,
    and the KL to the data is what keeps samples where the reward can be believed."""

    alphabet, length = "ACGT", 50
    flags = dict(n_layer=1, n_embd=48, conv=25, pretrain_iters=750, pretrain_lr=4e-3, steps=20,
                 iters=40, lr=3e-4, replay=15, eval_every=5, report_samples=1000)

    def draw(self, n, generator):
        rng = random.Random(torch.randint(2 ** 62, (1,), generator=generator).item())
        return tokens_of([dna_sequence(self.length, rng) for _ in range(n)], self.alphabet)

    @torch.no_grad()
    def reward(self, samples):
        return oracle(self.length)(one_hot(samples)).squeeze(1)

    def measure(self, samples):             # GC is what the oracle takes for a cause
        n_gc = sum(s.count("G") + s.count("C") for s in samples)
        return {"true activity": sum(map(true_activity, samples)) / len(samples),
                "GC": n_gc / sum(map(len, samples))}

# -----------------------------------------------------------------------------
# arithmetic: a prompt, and an answer that can be verified

PROMPT = 6                  # positions of a+b=


class Arithmetic(Task):
    """Sums: a+b= is given, the answer is generated, and the truth earns 1. What it teaches: a rule
    that is learned from rewards holds on prompts never seen."""

    alphabet, length = "0123456789+=", 9
    flags = dict(n_layer=3, pretrain_iters=400, pretrain_batch=256, data_size=200_000, prompts=64,
                 group=4, iters=40, lr=2e-4, replay=7, eval_every=2, report_samples=1000)

    def __init__(self, length=9):
        if length not in (0, 9):
            raise BadInput(f"--length={length}: arithmetic has 9 positions, as in 12+34=046")

    def draw(self, n, generator):
        """a+b=ccc with two-digit a and b; half of the answers are wrong in one digit."""
        pairs = torch.randint(10, 100, (2, n), generator=generator).T.tolist()
        x = tokens_of([f"{a}+{b}={a + b:03}" for a, b in pairs], self.alphabet)
        place = torch.randint(PROMPT, 9, (n, 1), generator=generator)
        slip = torch.randint(1, 10, (n, 1), generator=generator)
        is_wrong = torch.rand(n, 1, generator=generator) < 0.5
        return x.scatter(1, place, (x.gather(1, place) + slip * is_wrong) % 10)

    def given(self, x):
        return (torch.arange(9, device=x.device) < PROMPT).expand_as(x)

    def is_held(self, x):                   # a+b and b+a are together
        operands = 10 * x[:, [0, 3]] + x[:, [1, 4]]
        return fingerprint(operands.sort(dim=1).values) % 20 == 0

    def reward(self, samples):
        found = [re.fullmatch(r"(\d\d)\+(\d\d)=(\d{3})", s) for s in samples]
        return [bool(m) and int(m[1]) + int(m[2]) == int(m[3]) for m in found]

# -----------------------------------------------------------------------------
# text: characters, and words of the corpus


@cache
def corpus():
    """The prose of the language reference inside Python, lower case, without indented code."""
    lines = "\n".join(topic for _, topic in sorted(topics.topics.items())).splitlines()
    prose = " ".join(line for line in lines if not line.startswith("   "))
    return re.sub(r"[^a-z.,']+", " ", prose.lower())


def words_of(content):
    """Its distinct words of four letters and more."""
    return set(re.findall(r"[^\W\d_]{4,}", content.lower()))


class Text(Task):
    """Windows of a text; the reward is the share of letters in distinct words of that text, of four
    letters and more. What it teaches: the reward counts words, so the model learns words, not
    sentences."""

    length = 48
    flags = dict(n_layer=2, n_embd=96, conv=7, dropout=0.1, pretrain_iters=800, pretrain_lr=5e-3,
                 data_size=100_000, group=64, iters=80, lr=1e-3, beta=0.01, algo="wdce",
                 eval_every=5, report_samples=1000)

    def __init__(self, length=0):
        super().__init__(length)
        self.alphabet = "".join(sorted(set(corpus())))
        self.words = words_of(corpus())
        self.text, = tokens_of([corpus()], self.alphabet)

    def reward(self, samples):
        found = [self.words & words_of(sample) for sample in samples]
        return [sum(map(len, words)) / self.length for words in found]

# -----------------------------------------------------------------------------
# ehrlich: a hard search with a known optimum (Ehrlich functions; Stanton et al., 2407.00236)

class Ehrlich(Task):
    """Sequences in which some letters never follow others. The reward is 0 where a forbidden pair
    occurs; else the product over four motifs of q / 4, where q is the largest number of the motif's
    letters that stand at its distances, over all starts. The best is 1. What it teaches: the
    pre-trained model knows what is feasible, and the black box what is good."""

    alphabet, length = "ACDEFGHIKLMNPQRSTVWY", 32
    flags = dict(n_layer=2, n_embd=96, pretrain_lr=4e-3, group=64, iters=60, lr=1e-3,
                 path_events=4, beta=0.002, eval_every=5, report_samples=1000)

    def __init__(self, length=0):
        super().__init__(length)
        motifs, size, banned, V = 4, 4, 3, self.vocab_size
        if self.length < motifs * size:
            raise BadInput(f"--length={length}: the motifs of ehrlich need {motifs * size} "
                           "positions")
        generator = torch.Generator().manual_seed(0)
        order = torch.rand(V, V, generator=generator).fill_diagonal_(2).argsort(dim=1)
        self.is_banned = torch.zeros(V, V, dtype=torch.bool).scatter(1, order[:, :banned], True)
        step = 2 * torch.randn(V, V, generator=generator)
        self.step = step.masked_fill(self.is_banned, -math.inf).softmax(dim=1)
        # one chain of all motifs, so that all of them fit into one feasible sequence
        wanted = markov_chain(self.step, 1, motifs * size, generator)
        self.wanted = wanted.view(motifs, size)
        share = torch.rand(motifs, size - 1, generator=generator)
        gaps = (self.length // motifs - size) * share / share.sum(dim=1, keepdim=True)
        self.places = F.pad((1 + gaps.long()).cumsum(dim=1), (1, 0))            # [motifs, size]

    def draw(self, n, generator):
        return markov_chain(self.step, n, self.length, generator)

    def is_feasible(self, x):
        return ~self.is_banned[x[:, :-1], x[:, 1:]].any(dim=1)

    def reward(self, samples):
        x = self.encode(samples)
        total = self.is_feasible(x).double()
        for motif, place in zip(self.wanted.tolist(), self.places.tolist()):
            n = self.length - place[-1]                         # where the motif may start
            hits = sum(x[:, i:i + n] == v for v, i in zip(motif, place))                # [B, n]
            total *= hits.amax(dim=1) / len(motif)
        return total

    def measure(self, samples):
        return {"feasible": self.is_feasible(self.encode(samples)).double().mean().item()}


TASKS = {"toy": Toy, "dna": Dna, "arithmetic": Arithmetic, "text": Text, "ehrlich": Ehrlich}

# -----------------------------------------------------------------------------
# the user's own data and reward

class Own(Task):
    """The sequences of a file: its letters, as long as the longest; short ones are filled up. With
    crop: windows of `length` letters (64), which avoid letters that are not in the alphabet."""

    SMALL = dict(n_layer=2, n_embd=64, dropout=0.1, pretrain_iters=500)
    LARGE = dict(n_layer=4, conv=7, pretrain_iters=3000, pretrain_batch=64)

    def __init__(self, file, length=0, alphabet="", pad="", crop=False):
        sequences = read_sequences(file, crop, alphabet)
        if alphabet.isupper():                          # a genome's lower case marks repeats
            sequences = [s.upper() for s in sequences]
        letters = "".join(sorted(set("".join(sequences))))
        lengths = set(map(len, sequences))
        self.alphabet = alphabet or letters
        self.length = length or min(max(lengths), 64 if crop else math.inf)
        if lengths != {self.length} and not crop:       # no letter of SMILES, proteins or DNA
            pad = pad or unused("|^`", letters + self.alphabet)
        if len(pad) > 1 or pad and pad in letters + self.alphabet:
            raise BadInput(f"--pad={pad}: one letter is needed that does not occur in the data")
        self.pad = pad
        self.alphabet += pad
        self.flags = self.LARGE if sum(map(len, sequences)) >= 100_000 else self.SMALL
        short = sum(len(s) < self.length for s in sequences)
        if crop and short:
            self.note = (f"--crop: {short:,} of {len(sequences):,} sequences are shorter than "
                         f"--length={self.length}, and are left out")
        if crop:                                        # windows avoid line ends, and letters as N
            self.text, = tokens_of(["\n".join(sequences)], self.alphabet)
        else:
            self.x = self.encode(sequences)

    def draw(self, n, generator):                       # all that there is
        return self.x


def open_task(task="toy", length=0, data="", alphabet="", pad="", crop=False, reward="", **_):
    """The task as the flags of a run want it; other flags are ignored. Raises BadInput.

    data: a file for `read_sequences`; reward: file.py:function."""
    if (task == "own") != bool(data) or not data and (alphabet or pad or crop):
        raise BadInput("--data brings its own task, with --alphabet, --pad and --crop if you want: "
                       "leave out --task")
    if task not in (*TASKS, "own"):
        raise BadInput(f"--task={task}: choose one of {', '.join(TASKS)}, bring --data, or run the "
                       "file that puts it into TASKS")
    if data:
        try:
            opened = Own(data, length, alphabet, pad, crop)
        except BadInput as error:
            raise BadInput(f"--data={data}: {error}") from None
    else:
        opened = TASKS[task](length)
    if reward:
        opened.reward, opened.measure = load_reward(reward)
        opened.flags = opened.flags | dict(exact=False, report_samples=None)    # not for free
    return opened


def read_sequences(file, crop=False, alphabet=""):
    """A file, perhaps gzipped -> its sequences, list[str]: FASTA if it begins with >, else one per
    line; with crop, lines that hold spaces are one running text. Raises BadInput."""
    opened = gzip.open if file.lower().endswith(".gz") else open
    try:
        with opened(file, "rt", encoding="utf-8-sig") as f:
            content = f.read().strip()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise BadInput(f"it cannot be read as text: {error}") from None
    if content.startswith((">", ";")):                  # FASTA; comments begin with ;
        content = re.sub(r"^;.*\n?", "", content, flags=re.M)
        records = ("\n" + content).split("\n>")[1:]     # a record's first line is its name
        sequences = ["".join(record.partition("\n")[2].split()) for record in records]
    else:
        refuse_other_formats(content, crop, alphabet)
        sequences = re.split(r"\s*\n\s*", content)      # without empty lines
    spaced = [i for i, s in enumerate(sequences, 1) if len(s.split()) > 1]
    if spaced and crop:
        return [" ".join(content.split())]
    if spaced and " " not in alphabet:
        raise BadInput(f"line {spaced[0]} holds white space. If names follow the sequences, keep "
                       "the first column: cut -f1 (or cut -d' ' -f1). If it is a running text, cut "
                       "windows with --crop; or give an --alphabet with a space")
    if not content:
        raise BadInput("it is empty")
    if "" in sequences:
        raise BadInput(f"sequence {sequences.index('') + 1} is empty")
    return sequences


def refuse_other_formats(content, crop, alphabet):
    """One sequence per line is wanted; BadInput for what would be learned as letters otherwise."""
    lines = content.splitlines()
    if re.match(r"@.*\n\S+\n\+", content):
        raise BadInput("it looks like FASTQ: keep the sequences, awk 'NR % 4 == 2'")
    if content.startswith(('{"', '[{', '["')):
        raise BadInput("it looks like JSON: write one sequence per line")
    if "\n>" in content and not crop:
        raise BadInput("it looks like FASTA with other lines before the first >: remove these")
    comments = [i for i, line in enumerate(lines, 1) if line.startswith("#")]
    if comments and not crop and "#" not in alphabet:
        raise BadInput(f"line {comments[0]} looks like a comment: remove it, grep -v '^#'")
    for mark in ',;|"':
        if lines and not crop and mark not in alphabet and all(mark in line for line in lines):
            raise BadInput(f"every line holds a {mark!r}, as in a table: keep the sequences alone, "
                           f"such as cut -d'{mark}' -f1, without a header; or name the letter in "
                           "--alphabet")


def load_reward(name):
    """--reward=file.py:function -> the function, list[str] -> list[float], and the file's
    `measure`, list[str] -> {column: number}. Raises BadInput; what the file raises is passed on."""
    file, _, function = name.rpartition(":")
    if not file.endswith(".py") or not os.path.isfile(file):
        raise BadInput(f"--reward={name}: file.py:function is needed, and a file that exists")
    sys.path.insert(0, os.path.dirname(os.path.abspath(file)))  # it may import its neighbours
    stem = Path(file).stem                              # so that its child processes can import it
    stem = "own_reward" if stem in sys.modules else stem
    spec = importlib.util.spec_from_file_location(stem, file)
    module = sys.modules[stem] = importlib.util.module_from_spec(spec)
    with users_code():
        spec.loader.exec_module(module)
    score = getattr(module, function, None)
    if not callable(score):
        raise BadInput(f"--reward={name}: {file} has no function {function}")
    return score, getattr(module, "measure", lambda samples: {})
