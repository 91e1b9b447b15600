"""The tasks: an alphabet, data to pre-train on, perhaps prompts, and a black-box reward.

A task is made by a function of its length. To add one, write such a function and put it into TASKS;
--data and --reward bring your own without a line of code here. Shapes: B sequences of L slots, V
letters; token v is letter v of the alphabet.

Reading order: what a task is; asking a reward, and keeping the answers; held-out data; the tasks
toy, dna, arithmetic, text and ehrlich; the user's own files.
"""
import csv
import gzip
import importlib.util
import json
import math
import random
import re
import sys
import warnings
import zlib
from collections import defaultdict
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from pydoc_data import topics
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F


class BadInput(ValueError):
    """What the user gave cannot be used. One line: what is wrong, where, and what to do."""


def is_held_out(x):
    """Which of x [n, L] are for testing: one in twenty, by content, so copies stay together."""
    return fingerprint(x.unbind(dim=1)) % 20 == 0


def fingerprint(columns):
    """A number for each of n sequences, given as L columns [n] -> [n]; equal for equal ones."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 2 ** 31, (len(columns),), generator=generator).tolist()
    return sum((column + 1) * weight for column, weight in zip(columns, weights))


@dataclass
class Task:
    name: str
    alphabet: str
    length: int                         # L
    data: Callable                      # (n, generator) -> clean tokens [n, L]; a file: all it has
    reward: Callable                    # tokens [B, L] -> [B]: a black box, no gradient
    given: Callable | None = None       # clean tokens [n, L] -> bool [n, L]: slots of the prompt
    held: Callable | None = None        # like data, of sequences that data never gives
    is_held: Callable = is_held_out     # clean tokens [n, L] -> bool [n]: are they held out?
    measure: Callable = lambda tokens: {}   # tokens [B, L] -> {column: number} of the report
    pad: str = ""                       # the letter that fills up short sequences

    @property
    def vocab_size(self):
        return len(self.alphabet)

    @property
    def blank(self):
        """How the mask is written: _, or another letter that the alphabet leaves free."""
        return next(c for c in "_?#@~\0" if c not in self.alphabet)

    def prompts(self, x):
        """Clean tokens [n, L] -> their prompts, the mask V in free slots; None without prompts."""
        if self.given is None:
            return None
        return x.where(self.given(x), self.vocab_size)

    def held_out(self, n, seed):
        """At most n sequences that pre-training does not see, if there are some -> [n, L]."""
        draw = self.held or self.data
        return draw(n, torch.Generator().manual_seed(seed + 1))[:n]

    def decode(self, tokens):
        """Tokens [B, L] -> B strings; a mask is written as `blank`."""
        letters = self.alphabet + self.blank
        return ["".join(letters[v] for v in row) for row in tokens.tolist()]

    def samples(self, tokens):
        """Tokens [B, L] -> B strings without pads, as a reward or a reader wants them."""
        return [string.replace(self.pad, "") for string in self.decode(tokens)]

    def strings(self, tokens):
        """Tokens [B, L] -> B strings without the pads at their end; `read` is the inverse."""
        return [string.rstrip(self.pad or "\0") for string in self.decode(tokens)]

    def read(self, strings):
        """Whole strings, without pads at their end -> tokens [B, L]; raises BadInput."""
        filled = [string.ljust(self.length, self.pad) if self.pad else string for string in strings]
        for string, whole in zip(strings, filled):
            if len(whole) != self.length:
                raise BadInput(f"{string!r} has {len(string)} letters, the task {self.length}")
            self.check(string, repr(string), self.alphabet)
        return self.encode(filled)

    def encode(self, strings):
        """Strings of one length -> tokens [B, L]; `blank` is the mask. Raises BadInput."""
        letters = self.alphabet + self.blank
        for string in strings:
            self.check(string, repr(string), letters)
        return torch.tensor([[letters.index(c) for c in string] for string in strings])

    def check(self, string, where, letters, hint=""):
        """Raises BadInput if the string has a letter that is not among `letters`."""
        for i, c in enumerate(string, 1):
            if c not in letters:
                raise BadInput(f"{c!r} at position {i} of {where} is not in {self.alphabet!r}"
                               f"{hint}")

# -----------------------------------------------------------------------------
# asking a reward

LARGEST = sys.float_info.max


def ask(task, tokens, on_error=None):
    """The task's reward of tokens [B, L] -> float64 [B] on their device. What it prints goes to
    standard error.

    on_error: the reward of a sample for which it raises, or returns no finite number. None: stop,
    with BadInput for what it returned and its own traceback for what it raised."""
    try:
        with redirect_stdout(sys.stderr):
            values = task.reward(tokens)
    except Exception as error:
        is_ours = isinstance(error, BadInput)           # such as a list that was sorted in place
        if on_error is not None and not is_ours:        # which sample was it? each is asked alone
            if len(tokens) == 1:
                warnings.warn(f"the reward failed: {error!r}; --on_error makes it {on_error}")
                return torch.tensor([on_error], dtype=torch.double, device=tokens.device)
            return torch.cat([ask(task, x, on_error) for x in tokens.split(1)])
        if isinstance(error, OSError):      # of the user's own, so no one-line message
            raise RuntimeError("the reward raised an exception") from error
        raise
    if hasattr(values, "tolist"):                       # of torch or numpy
        values = values.tolist()
    if isinstance(values, (dict, set, frozenset, str, bytes)) or not hasattr(values, "__iter__"):
        raise BadInput(f"the reward returned {values!r:.80}: it must return one number per sample, "
                       "in the order of the samples")
    values = [v.item() if hasattr(v, "item") else v for v in values]
    if len(values) != len(tokens):
        raise BadInput(f"the reward returned {len(values)} values for {len(tokens)} samples")
    for i, value in enumerate(values):
        if isinstance(value, (int, float)) and -LARGEST <= value <= LARGEST:
            continue
        values[i] = on_error
        if on_error is None:
            sample = task.samples(tokens[i:i + 1])[0]
            raise BadInput(f"the reward of sample {i}, {sample!r}, is {value!r:.80}: "
                           "a finite number is needed")
    return torch.tensor(values, dtype=torch.double, device=tokens.device)


class Paid:
    """The file rewards.jsonl of a run: a line for every sample of every rollout, written as soon as
    the black box has answered. A sample that is in the file is not asked again.

    {"iter": 3, "sample": "TCTCTC", "reward": 0.75, "kl": 1.31, "log_ref": -9.2}, with the prompt
    where there is one; kl and log_ref are those of `Rollout`. Samples that belong to no rollout
    have a "stage" (check, optimum, evaluation, report ...); those of other processes than the
    first have their "rank", and a process knows only its own. What a kill between the answer and
    the line costs cannot be known here: those samples alone are asked again."""

    def __init__(self, file, rank=0, on_error=None, pad=""):
        self.file, self.rank, self.on_error = file, rank, on_error
        self.reward_of = {}                             # sample without any pad -> reward
        self.seen, self.best = set(), -math.inf         # samples of rollouts; the largest reward
        self.old = defaultdict(list)    # (iter, stage) -> lines written before the run was resumed
        for line in whole_lines(file.read_text() if file.exists() else ""):
            if line.get("rank", 0) == rank:
                self.reward_of[line["sample"].replace(pad, "")] = line["reward"]
                self.old[line.get("iter"), line.get("stage")].append(line)

    def ask(self, task, tokens, iter=None, stage=None, **columns):
        """The reward of tokens [B, L] -> float64 [B]. columns: tensors [B] to be noted with it."""
        strings, samples = task.strings(tokens), task.samples(tokens)
        new = {s: i for i, s in enumerate(samples) if s not in self.reward_of}
        if new:
            answers = ask(task, tokens[list(new.values())], self.on_error).tolist()
            self.reward_of |= zip(new, answers)
        rewards = [self.reward_of[sample] for sample in samples]
        old = [line["sample"] for line in self.old.pop((iter, stage), [])]
        if old[-len(strings):] != strings:      # else it was killed after it had written these
            where = dict(iter=iter, stage=stage, rank=self.rank or None)
            where = {name: value for name, value in where.items() if value is not None}
            columns = {name: column.tolist() for name, column in columns.items()}
            columns |= dict(sample=strings, reward=rewards)
            if task.given:
                columns["prompt"] = task.strings(task.prompts(tokens))
            rows = (dict(zip(columns, row)) for row in zip(*columns.values()))
            text = "".join("\n" + json.dumps(where | row) for row in rows).encode()
            with open(self.file, "ab", buffering=0) as file:    # in one piece: other processes
                if file.write(text) < len(text):                # write here, too
                    raise OSError(f"{self.file} cannot be written: is the disk full?")
        if stage is None:
            self.count(samples, rewards)
        return torch.tensor(rewards, dtype=torch.double, device=tokens.device)

    def count(self, samples, rewards):
        """len(seen) is the number of distinct samples in the rollouts."""
        self.seen.update(samples)
        self.best = max(self.best, *rewards)

    def recall(self, task, iter, group, size):
        """The rollout of an iteration before the run was resumed, `group` samples per prompt."""
        lines = self.old.pop((iter, None), [])[-size:]
        if len(lines) < size:
            raise BadInput(f"{self.file} lacks rewards of iteration {iter}: it cannot be resumed")
        rollout = rollout_of(task, lines, group)
        self.count(task.samples(rollout.tokens), rollout.reward.flatten().tolist())
        return rollout


def whole_lines(text):
    """The objects of a rewards.jsonl, without empty lines and those that a kill has torn."""
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            pass


@dataclass
class Rollout:
    """Samples whose rewards are known: P prompts with G samples each."""
    tokens: torch.Tensor                # [P * G, L]
    given: torch.Tensor                 # [P * G, L] the slots of the prompt
    reward: torch.Tensor                # [P, G]     float64
    kl: torch.Tensor                    # [P, G]     log p(path)/p_ref(path) of the policy of that
                                        #            time, nats; 0 where the reference drew them
    log_ref: torch.Tensor               # [P, G]     log p_ref(path), nats


def rollout_of(task, lines, group):
    """Lines of a rewards.jsonl -> Rollout, `group` samples for each prompt."""
    tokens = task.read([line["sample"] for line in lines])
    reward = torch.tensor([float(line["reward"]) for line in lines], dtype=torch.double)
    kl, log_ref = (torch.tensor([line.get(name, 0.0) for line in lines]).view(-1, group)
                   for name in ("kl", "log_ref"))
    given = task.given(tokens) if task.given else torch.zeros_like(tokens, dtype=torch.bool)
    return Rollout(tokens, given, reward.view(-1, group), kl, log_ref)


def read_known(task, file, group):
    """--known=FILE: a rewards.jsonl, or CSV or TSV with columns `sample` and `reward` -> Rollouts
    of one prompt and some `group` samples each, as if the reference had drawn them; the only sample
    of a prompt teaches nothing and is left out. BadInput, with file and row, for what is wrong."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--known={file} cannot be read: {error}") from None
    if text.lstrip().startswith("{"):
        lines = [line for line in whole_lines(text) if line.get("stage") != "optimum"]
    else:
        delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
        lines = list(csv.DictReader(text.splitlines(), delimiter=delimiter, skipinitialspace=True))
    if not lines:
        raise BadInput(f"--known={file} has no row")
    if not {"sample", "reward"} <= set(lines[0]):
        raise BadInput(f"--known={file}: columns sample and reward are needed; it has "
                       f"{', '.join(map(str, lines[0]))}")
    groups = defaultdict(list)
    for i, line in enumerate(lines, 1):
        try:
            x = task.read([line["sample"]])
            value = float(line["reward"])
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"--known={file}, row {i}: {error}") from None
        if not math.isfinite(value):
            raise BadInput(f"--known={file}, row {i}: the reward is {value}")
        prompt = task.decode(task.prompts(x))[0] if task.given else ""
        groups[prompt].append(dict(sample=line["sample"], reward=value))
    parts = []
    for lines in groups.values():
        parts += [lines[i:i + group] for i in range(0, len(lines), group)]
        if len(parts[-1]) == 1 < len(lines):            # the last one joins the others
            last = parts.pop()
            parts[-1] = parts[-1] + last
    return [rollout_of(task, part, len(part)) for part in parts if len(part) > 1]

# -----------------------------------------------------------------------------
# held-out data

def split(draw, is_held=is_held_out):
    """draw(n, generator) -> [n, L] is split into (data, held), which never give the same."""
    def side(wanted, n, generator=None):
        parts = []
        while sum(map(len, parts)) < n:
            x = draw(n + 20, generator)
            parts.append(x[is_held(x) == wanted])
        return torch.cat(parts)[:n]
    return partial(side, False), partial(side, True)


def find(content, alphabet):
    """The tokens of a text [n], -1 for letters that are not in the alphabet."""
    return torch.tensor([alphabet.find(c) for c in content])


def windows(x, length):
    """Tokens x [n], -1 where no window may lie -> (data, held): windows [n, length], each of them
    equally likely.

    Held out is the last twentieth of all windows, less those that overlap one of the others or
    occur among them."""
    gaps = F.pad((x < 0).cumsum(dim=0), (1, 0))         # how many there are before each token
    start = (gaps[length:] == gaps[:-length]).nonzero().squeeze(1)
    if not len(start):
        raise BadInput(f"no sequence has {length} known letters in a row, the length of a window")
    train, test = start.split([len(start) - len(start) // 20, len(start) // 20])
    test = test[test >= train[-1] + length]
    content = fingerprint([x[i:len(x) - length + 1 + i] for i in range(length)])
    test = test[~torch.isin(content[test], content[train])]

    def draw(start, n, generator=None):
        first = start[torch.randint(len(start), (n,), generator=generator)]
        return x.unfold(0, length, 1)[first]
    return partial(draw, train), partial(draw, test) if len(test) else None

# -----------------------------------------------------------------------------
# toy: small enough to enumerate

TOY_STEP = torch.tensor([[.55, .15, .25, .05],  # a Markov chain on ACGT; row: the letter before
                         [.10, .50, .05, .35],
                         [.30, .10, .50, .10],
                         [.05, .30, .15, .50]])


def toy_reward(tokens):
    """A quarter for each copy of TC, a sixteenth for each A -> [B]; with six letters at most 3/4.

    TCTCTC (12/16), TCTCAA (10/16), TCAAAA (8/16) and AAAAAA (6/16) are peaks: no change of one
    letter improves them, and AAAAAA, the lowest, is the likeliest in the data. A greedy search
    stops at the first peak it meets."""
    copies = ((tokens[:, :-1] == 3) & (tokens[:, 1:] == 1)).sum(dim=1)
    return copies / 4 + (tokens == 0).sum(dim=1) / 16


def markov_chain(step, n, length, generator=None):
    """n sequences of a chain with transition probabilities step [V, V], from a uniform start."""
    x = torch.randint(len(step), (n, 1), generator=generator)
    for _ in range(length - 1):
        x = torch.cat((x, torch.multinomial(step[x[:, -1]], 1, generator=generator)), dim=1)
    return x


def toy(length=6):
    """Short sequences of a Markov chain. What it teaches: the optimum can be known, and reached."""
    def draw(n, generator=None):
        return markov_chain(TOY_STEP, n, length, generator)
    return Task("toy", "ACGT", length, draw, toy_reward)

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
    "GATA1": ("WGATAR", 0.0),           # a repressor, by our decree
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
    """What no reward sees: sites of one factor saturate, and every site of the repressor halves
    the whole."""
    total = 0
    for name, (_, weight) in FACTORS.items():
        n_sites = len(PATTERNS[name].findall(sequence))
        total += weight * (1 - 0.5 ** n_sites)
    return total * 0.5 ** len(PATTERNS["GATA1"].findall(sequence))


def activity(tokens):
    """The true activity of tokens [B, L] -> float [B]; anything but ACGT is no letter of a site."""
    strings = ["".join("ACGT-"[v] for v in row) for row in tokens.clamp(max=4).tolist()]
    return torch.tensor([true_activity(s) for s in strings], device=tokens.device)


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


def dna_tokens(strings):
    """Strings of one length -> tokens [B, L]."""
    return torch.tensor([["ACGT".index(c) for c in string] for string in strings])


def one_hot(tokens):
    """Tokens [B, L] -> [B, 4, L]; a pad is all 0."""
    letters = torch.arange(4, device=tokens.device)
    return (tokens[:, None] == letters[:, None]).float()


@cache
@torch.enable_grad()
def oracle(length):
    """A small convolutional network, one-hot [B, 4, L] -> activity [B, 1], fitted on few and noisy
    measurements, and stopped early since they are few. It takes GC for a cause: it can be hacked.
    Its seed is its own, so that all runs have the same oracle."""
    rng = random.Random(0)
    measured = [dna_sequence(length, rng) for _ in range(MEASUREMENTS)]
    truth = torch.tensor([true_activity(s) for s in measured])
    x = one_hot(dna_tokens(measured))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        y = truth + NOISE * torch.randn(MEASUREMENTS)
        sites = [nn.Conv1d(4, 64, 13, padding=6), nn.ReLU(), nn.AdaptiveAvgPool1d(1)]
        head = [nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)]
        net = nn.Sequential(*sites, *head)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.1)
    for _ in range(60):
        loss = F.mse_loss(net(x).squeeze(1), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def dna_measure(tokens):
    """The truth, and the share of G and C, which the oracle takes for a cause."""
    is_gc = (tokens == 1) | (tokens == 2)
    return {"true activity": activity(tokens).mean().item(), "GC": is_gc.float().mean().item()}


def dna(length=50):
    """Regulatory DNA. What it teaches: a learned reward goes on rising where the truth does not,
    and the KL to the data is what keeps samples where the reward can be believed."""
    def draw(n, generator=None):
        rng = random.Random(torch.randint(2 ** 62, (1,), generator=generator).item())
        return dna_tokens([dna_sequence(length, rng) for _ in range(n)])

    @torch.no_grad()
    def reward(tokens):
        return oracle(length).to(tokens.device)(one_hot(tokens)).squeeze(1)

    data, held = split(draw) if length >= 6 else (draw, None)   # else too few to spare any
    return Task("dna", "ACGT", length, data, reward, held=held, measure=dna_measure)

# -----------------------------------------------------------------------------
# arithmetic: a prompt, and an answer that can be verified

PROMPT = 6                  # slots of a+b=


def sum_tokens(a, b, c):
    """The tokens of a+b=ccc, for numbers [n] -> [n, 9]; 10 is +, 11 is =."""
    plus, equals = torch.full_like(a, 10), torch.full_like(a, 11)
    question = [a // 10, a % 10, plus, b // 10, b % 10, equals]
    answer = [c // 100, c // 10 % 10, c % 10]
    return torch.stack(question + answer, dim=1)


def sums(n, generator=None):
    """a+b=ccc with two-digit a and b -> [n, 9]; half of the answers are wrong in one digit."""
    a, b = torch.randint(10, 100, (2, n), generator=generator)
    x = sum_tokens(a, b, a + b)
    place = torch.randint(PROMPT, 9, (n, 1), generator=generator)
    slip = torch.randint(1, 10, (n, 1), generator=generator)
    is_wrong = torch.rand(n, 1, generator=generator) < 0.5
    return x.scatter(1, place, (x.gather(1, place) + slip * is_wrong) % 10)


def operands(tokens):
    """The numbers a and b -> [B, 2]."""
    return 10 * tokens[:, [0, 3]] + tokens[:, [1, 4]]


def is_true(tokens):
    """1 where the three digits after = are the sum -> [B]."""
    a, b = operands(tokens).T
    return (tokens == sum_tokens(a, b, a + b)).all(dim=1).float()


def arithmetic_prompt(x):
    return (torch.arange(9, device=x.device) < PROMPT).expand_as(x)


def is_held_sum(tokens):
    """Are the sums [n, 9] held out? a+b and b+a are together."""
    return is_held_out(operands(tokens).sort(dim=1).values)


def arithmetic(length=9):
    """Sums: a+b= is given, the answer is generated, and the truth earns 1. What it teaches: a rule
    that is learned from rewards holds on prompts never seen."""
    if length != 9:
        raise BadInput(f"--length={length}: arithmetic has 9 slots, as in 12+34=046")
    data, held = split(sums, is_held_sum)
    return Task("arithmetic", "0123456789+=", 9, data, is_true, given=arithmetic_prompt, held=held,
                is_held=is_held_sum)

# -----------------------------------------------------------------------------
# text: characters, and words of the corpus

WORD = re.compile(r"[^\W\d_]{4,}")      # of four letters and more


@cache
def corpus():
    """The prose of the language reference inside Python, lower case, without indented code."""
    lines = [line for _, topic in sorted(topics.topics.items()) for line in topic.splitlines()]
    prose = " ".join(line for line in lines if not line.startswith("   "))
    return re.sub(r"[^a-z.,']+", " ", prose.lower())


def alphabet_of(content):
    return "".join(sorted(set(content) - {"\n"}))


def words_of(content):
    return set(WORD.findall(content.lower()))


def text(length=48):
    """Windows of a text; the reward is the share of slots in distinct words of that text, of four
    letters and more. What it teaches: a reward says what it says: real words, in any order."""
    content = corpus()
    alphabet, known = alphabet_of(content), words_of(content)

    def reward(tokens):
        found = [known & words_of(string) for string in task.samples(tokens)]
        return [sum(map(len, words)) / length for words in found]

    data, held = windows(find(content, alphabet), length)
    task = Task("text", alphabet, length, data, reward, held=held)
    return task

# -----------------------------------------------------------------------------
# ehrlich: a hard search with a known optimum (Ehrlich functions; Stanton et al., 2407.00236)

def ehrlich(length=32):
    """Sequences in which some letters never follow others; the reward of all that are feasible is
    the product over motifs of the largest share of the motif's letters that stand at its distances
    somewhere; the best is 1. What it teaches: the pre-trained model knows what is feasible, and
    the black box what is good."""
    letters, motifs, size, banned = "ACDEFGHIKLMNPQRSTVWY", 4, 4, 3
    if length < motifs * size:
        raise BadInput(f"--length={length}: the motifs of ehrlich need {motifs * size} slots")
    V, generator = len(letters), torch.Generator().manual_seed(0)
    order = torch.rand(V, V, generator=generator).fill_diagonal_(2).argsort(dim=1)
    is_banned = torch.zeros(V, V, dtype=torch.bool).scatter(1, order[:, :banned], True)
    step = (2 * torch.randn(V, V, generator=generator)).masked_fill(is_banned, -math.inf)
    is_banned = F.pad(is_banned, (0, 1, 0, 1))          # a pad may stand anywhere
    step = step.softmax(dim=1)
    # one chain of all motifs, so that all of them fit into one feasible sequence
    wanted = markov_chain(step, 1, motifs * size, generator).view(motifs, size)
    share = torch.rand(motifs, size - 1, generator=generator)
    gaps = (length // motifs - size) * share / share.sum(dim=1, keepdim=True)
    places = F.pad((1 + gaps.long()).cumsum(dim=1), (1, 0))                 # [motifs, size]

    def is_feasible(tokens):
        return ~is_banned.to(tokens.device)[tokens[:, :-1], tokens[:, 1:]].any(dim=1)

    def reward(tokens):
        total = is_feasible(tokens).double()
        for motif, place in zip(wanted.tolist(), places.tolist()):
            n = length - place[-1]                              # where the motif may start
            hits = sum((tokens[:, i:i + n] == v).int() for v, i in zip(motif, place))    # [B, n]
            total *= hits.amax(dim=1) / size
        return total

    def measure(tokens):
        return {"feasible": is_feasible(tokens).double().mean().item()}

    data, held = split(lambda n, generator=None: markov_chain(step, n, length, generator))
    return Task("ehrlich", letters, length, data, reward, held=held, measure=measure)


TASKS = {"toy": toy, "dna": dna, "arithmetic": arithmetic, "text": text, "ehrlich": ehrlich}

# -----------------------------------------------------------------------------
# the user's own data and reward

def open_task(name, length=0, data="", pad="", crop=False, reward="", format=""):
    """The task as the flags of a run want it; raises BadInput for what cannot be used.

    name: one of TASKS, or `own`: the alphabet is what the file holds. length 0: the task's own.
    data: a file to pre-train on, in a format of `read_sequences`. reward: file.py:function."""
    if name not in (*TASKS, "own"):
        raise BadInput(f"task {name!r} is not in rewards.TASKS")
    if (pad or crop) and not data:
        raise BadInput("--pad and --crop are for sequences from a file: give --data too")
    if len(pad) > 1 or not pad.isprintable():
        raise BadInput(f"--pad={pad}: one letter is needed")
    sequences = read_sequences(data, format) if data else []
    crop = crop or format == "text"
    if name == "own":
        if not data:
            raise BadInput("--task=own takes its letters from a file: give --data")
        task = own(sequences, length, crop)
        if len(set(map(len, sequences))) > 1 and not crop:
            pad = pad or next(c for c in "-.*~|$" if c not in task.alphabet)
    else:
        task = TASKS[name](length) if length else TASKS[name]()
    if data:
        use_data(task, sequences, data, pad, crop)
    if reward:
        score, measure = load_reward(reward)
        task.reward = lambda tokens: score_in_order(score, task.samples(tokens))
        task.measure = lambda tokens: measured(measure(task.samples(tokens)))
    return task


def own(sequences, length, crop):
    """A task of the letters that the sequences hold, as long as the longest of them; windows have
    64 letters."""
    longest = max(map(len, sequences))
    length = length or (min(64, longest) if crop else longest)
    return Task("own", alphabet_of("\n".join(sequences)), length, data=None, reward=None)


def score_in_order(score, samples):
    """The answers of a user's function, which must leave the list of samples as it is."""
    given = list(samples)
    values = score(given)
    if given != samples:
        raise BadInput("the reward changed its list of samples, so its values may be in another "
                       "order: work on a copy, as in sorted(samples)")
    return values


OURS = {"iter", "phase", "queries", "reward", "reward_std", "best", "kl", "clip_fraction",
        "grad_norm"}


def measured(columns):
    """What a user's measure returned -> {column: float}; raises BadInput."""
    try:
        values = {str(name): float(value) for name, value in columns.items()}
    except (AttributeError, TypeError, ValueError):
        values = None
    if values is None or OURS & values.keys():
        raise BadInput(f"measure returned {columns!r:.80}: {{column: number}} is needed, and other "
                       f"names than {', '.join(sorted(OURS))}")
    return values


def read_sequences(file, format=""):
    """A file, perhaps gzipped -> its sequences, list[str].

    format: lines, one sequence each; fasta, with a line >name before each sequence; text, one
    running text; empty: fasta if the file begins with >, else lines."""
    opened = gzip.open if file.endswith(".gz") else open
    try:
        with opened(file, "rt", encoding="utf-8-sig") as f:
            content = f.read().strip()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise BadInput(f"--data={file} cannot be read as text: {error}") from None
    if not content:
        raise BadInput(f"--data={file} is empty")
    if format == "text":
        return [" ".join(content.split())]
    is_fasta = content.startswith(">")
    if format == "fasta" and not is_fasta:
        raise BadInput(f"--data={file} is no FASTA: it does not begin with >")
    if is_fasta and format != "lines":
        records = content.removeprefix(">").split("\n>")        # a record's first line is its name
        sequences = ["".join(record.partition("\n")[2].split()) for record in records]
        if not any(sequences):
            raise BadInput(f"--data={file} has names, and no sequence")
        return sequences
    return [line.strip() for line in content.splitlines() if line.strip()]


def use_data(task, sequences, file, pad, crop):
    """Let the task draw its data from the sequences of a file, and say what is held out."""
    if task.alphabet.isupper() and task.name != "own":  # a genome's lower case marks repeats
        sequences = [s.upper() for s in sequences]
    if pad:
        if pad in task.alphabet or any(pad in s for s in sequences):
            raise BadInput(f"--pad={pad} is a letter of {file} or of the task: choose another")
        task.alphabet, task.pad = task.alphabet + pad, pad
        sequences = [s and s.ljust(task.length, pad) for s in sequences]
    if crop:                                            # windows avoid letters such as N
        x = find("\n".join(sequences), task.alphabet)
        n_foreign = (x < 0).sum().item() - len(sequences) + 1
        task.data, task.held = windows(x, task.length)
        what = f"windows that avoid {n_foreign:,} foreign letters, the last 5% of them"
    else:
        for i, s in enumerate(sequences, 1):
            where = f"sequence {i} of {file}"
            task.check(s, where, task.alphabet, ": without --task the alphabet is that of the "
                       "file; --crop avoids N and other foreign letters")
            if len(s) != task.length:
                raise BadInput(f"{where} has {len(s)} letters, the task {task.length} slots: "
                               "fill up with --pad=-, cut windows with --crop, or choose another "
                               "--length")
        x = task.encode(sequences)
        held = task.is_held(x)
        if len(x) < 20 or held.all():                   # too few to spare any
            held = torch.zeros_like(held)
        task.data, task.held = (lambda n, generator=None: x[~held]), None
        if held.any():
            task.held = lambda n, generator=None: x[held]
        what = f"{len(x):,} sequences, {held.sum():,}"
    padded = f"; short ones are filled up with {pad}" if pad else ""
    print(f"{file}: {what} held out{padded}", file=sys.stderr)


def load_reward(name):
    """--reward=file.py:function -> the function, list[str] -> list[float], and the file's
    `measure`, list[str] -> {column: number}. Raises BadInput; what the file raises is passed on."""
    file, _, function = name.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise BadInput(f"--reward={name}: file.py:function is needed, and a file that exists")
    sys.path.insert(0, str(Path(file).resolve().parent))        # it may import its neighbours
    spec = importlib.util.spec_from_file_location("own_reward", file)
    module = sys.modules["own_reward"] = importlib.util.module_from_spec(spec)
    with redirect_stdout(sys.stderr):
        spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise BadInput(f"--reward={name}: {file} has no function {function}")
    return getattr(module, function), getattr(module, "measure", lambda samples: {})
