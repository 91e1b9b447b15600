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


@dataclass
class Task:
    name: str
    alphabet: str
    length: int                         # L
    data: Callable                      # (n, generator) -> clean tokens [n, L]; a file: all it has
    reward: Callable                    # tokens [B, L] -> [B]: a black box, no gradient
    given: Callable | None = None       # clean tokens [n, L] -> bool [n, L]: slots of the prompt
    held: Callable | None = None        # like data, of sequences that data never gives
    is_held: Callable = lambda x: is_held_out(x)    # clean tokens [n, L] -> bool [n]
    measure: Callable = lambda tokens: {}   # tokens [B, L] -> {column: number} of the report
    pad: str = ""                       # the letter that fills up short sequences

    @property
    def vocab_size(self):
        return len(self.alphabet)

    @property
    def blank(self):
        """How the mask is written: _, or another letter that the alphabet leaves free."""
        return next(c for c in "_?#@~\0" if c not in self.alphabet)

    def slots_given(self, x):
        """Clean tokens [n, L] -> bool [n, L]: the slots of the prompt; none without prompts."""
        return self.given(x) if self.given else torch.zeros_like(x, dtype=torch.bool)

    def prompts(self, x):
        """Clean tokens [n, L] -> their prompts: the mask V in all slots that are not given."""
        return x.where(self.slots_given(x), self.vocab_size)

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
        """Tokens [B, L] -> B strings without the pads at their end; `encode` is the inverse."""
        return [string.rstrip(self.pad or "\0") for string in self.decode(tokens)]

    def encode(self, strings, blank=""):
        """Strings -> tokens [B, L]; short ones are filled up with the pad, if there is one.
        blank: how the mask may be written. Raises BadInput."""
        letters = self.alphabet + blank
        if self.pad:
            strings = [string.ljust(self.length, self.pad) for string in strings]
        for string in strings:
            for i, c in enumerate(string, 1):
                if c not in letters:
                    raise BadInput(f"{c!r} at position {i} of {string!r:.40} is not in {letters!r}")
            if len(string) != self.length:
                raise BadInput(f"{string!r:.40} has {len(string)} letters, the task {self.length}")
        return tokens_of(strings, letters)


def tokens_of(strings, letters):
    """Strings of one length -> tokens [n, L]; -1 for what is not among the letters."""
    return torch.tensor([[letters.find(c) for c in string] for string in strings])

# -----------------------------------------------------------------------------
# asking a reward


def ask(task, tokens, on_error=None):
    """The task's reward of tokens [B, L] -> float64 [B] on their device. What it prints goes to
    standard error.

    on_error: the reward of a sample for which it raises, or returns no finite number. None: stop,
    with BadInput for what it returned and its own traceback for what it raised."""
    try:
        with redirect_stdout(sys.stderr):
            values = task.reward(tokens)
            if hasattr(values, "tolist"):               # of torch or numpy
                values = values.tolist()
            is_list = hasattr(values, "__iter__") and not isinstance(
                values, (dict, set, frozenset, str, bytes))
            if not is_list:
                raise BadInput(f"the reward returned {values!r:.80}: it must return one number per "
                               "sample, in the order of the samples")
            values = [v.item() if hasattr(v, "item") else v for v in values]    # runs a generator
    except BadInput:                                    # such as a list that was sorted in place
        raise
    except Exception as error:
        if on_error is None and isinstance(error, OSError):     # main would not show where it is
            raise RuntimeError("the reward raised an exception") from error
        if on_error is None:
            raise
        if len(tokens) > 1:                 # which sample was it? each is asked alone
            return torch.cat([ask(task, x, on_error) for x in tokens.split(1)])
        warnings.warn(f"the reward failed: {error!r}; --on_error makes it {on_error}")
        values = [on_error]
    if len(values) != len(tokens):
        raise BadInput(f"the reward returned {len(values)} values for {len(tokens)} samples")
    for i, value in enumerate(values):
        if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max:
            continue
        if on_error is None:
            raise BadInput(f"the reward of sample {i}, {task.samples(tokens)[i]!r}, is "
                           f"{value!r:.80}: a finite number is needed")
        values[i] = on_error
    return torch.tensor(values, dtype=torch.double, device=tokens.device)


class Paid:
    """The file rewards.jsonl of a run: a line for every sample of every rollout, written as soon as
    the black box has answered. A sample that is in the file is not asked again.

    {"iter": 3, "sample": "TCTCTC", "reward": 0.75, "kl": 1.31, "log_ref": -9.2}, with the prompt
    where there is one; kl and log_ref are those of `Rollout`. Samples that belong to no rollout
    have a "stage" (check, optimum, evaluation, report ...); those of other processes than the
    first have their "rank", and a process knows only its own. Samples whose lines were not yet
    written when the process was killed are asked again."""

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
            table = dict(sample=strings, reward=rewards)
            table |= {name: column.tolist() for name, column in columns.items()}
            if task.given:
                table["prompt"] = task.strings(task.prompts(tokens))
            rows = (dict(zip(table, row)) for row in zip(*table.values()))
            with open(self.file, "a") as file:  # one write: other processes write here, too
                file.write("".join("\n" + json.dumps(where | row) for row in rows))
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
    reward: torch.Tensor                # [P, G]     float64
    kl: torch.Tensor                    # [P, G]     log p(path)/p_ref(path) of the policy of that
                                        #            time, nats; 0 where the reference drew them
    log_ref: torch.Tensor               # [P, G]     log p_ref(path), nats


def rollout_of(task, lines, group):
    """Lines of a rewards.jsonl -> Rollout, `group` samples for each prompt."""
    tokens = task.encode([line["sample"] for line in lines])
    rows = [(line["reward"], line.get("kl", 0), line.get("log_ref", 0)) for line in lines]
    reward, kl, log_ref = torch.tensor(rows, dtype=torch.double).T.reshape(3, -1, group)
    return Rollout(tokens, reward, kl.float(), log_ref.float())


def read_known(task, file, group):
    """--known=FILE: a rewards.jsonl, or CSV or TSV with columns `sample` and `reward` -> Rollouts
    of one prompt and some `group` samples each, as if the reference had drawn them; prompts with a
    single sample are left out. BadInput, with file and row, for what is wrong."""
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
            line = dict(sample=str(line["sample"]), reward=float(line["reward"]))
            x = task.encode([line["sample"]])
            if not math.isfinite(line["reward"]):
                raise BadInput(f"the reward is {line['reward']}")
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"--known={file}, row {i}: {error}") from None
        groups[task.decode(task.prompts(x))[0]].append(line)        # of the same prompt
    parts = []
    for lines in groups.values():
        n = max(1, len(lines) // max(2, group))         # rollouts of `group` samples or a few more
        parts += [lines[i::n] for i in range(n)]
    return [rollout_of(task, part, len(part)) for part in parts if len(part) > 1]

# -----------------------------------------------------------------------------
# held-out data

def is_held_out(x):
    """Which of x [n, L] are for testing: one in twenty, by content, so copies stay together."""
    return fingerprint(x) % 20 == 0


def fingerprint(x):
    """A number for each sequence of x [n, L] -> [n]; equal for equal ones."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 2 ** 31, (x.size(1),), generator=generator)
    return sum((column + 1) * weight for column, weight in zip(x.T, weights))


def split(draw, is_held=is_held_out):
    """draw(n, generator) -> [n, L] is split into (data, held), which never give the same."""
    def side(wanted, n, generator=None):
        parts = []
        while sum(map(len, parts)) < n:
            x = draw(n + 20, generator)
            parts.append(x[is_held(x) == wanted])
        return torch.cat(parts)[:n]
    return partial(side, False), partial(side, True)


def windows(x, length):
    """Tokens x [n], -1 where no window may lie -> (data, held): windows [n, length], each of them
    equally likely.

    Held out is the last twentieth of all windows, less those that overlap one of the others or
    occur among them."""
    rows = F.pad(x, (0, length), value=-1).unfold(0, length, 1)     # a view: it takes no memory
    start = (rows.amin(dim=1) >= 0).nonzero().squeeze(1)
    if not len(start):
        raise BadInput(f"no sequence has {length} known letters in a row, the length of a window")
    train, test = start.tensor_split([len(start) - len(start) // 20])
    test = test[test >= train[-1] + length]
    content = fingerprint(rows)
    test = test[~torch.isin(content[test], content[train])]

    def draw(start, n, generator=None):
        return rows[start[torch.randint(len(start), (n,), generator=generator)]]
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


def markov_chain(step, n, length, generator):
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


def one_hot(tokens):
    """Tokens [B, L] -> [B, 4, L]."""
    return F.one_hot(tokens, 4).mT.float()


@cache
@torch.enable_grad()
def oracle(length):
    """A small convolutional network, one-hot [B, 4, L] -> activity [B, 1], fitted on few and noisy
    measurements, and stopped early since they are few. It takes GC for a cause: it can be hacked.
    Its seed is its own, so that all runs have the same oracle."""
    rng = random.Random(0)
    measured = [dna_sequence(length, rng) for _ in range(MEASUREMENTS)]
    truth = torch.tensor([true_activity(s) for s in measured])
    x = one_hot(tokens_of(measured, "ACGT"))
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


def dna(length=50):
    """Regulatory DNA. What it teaches: a learned reward goes on rising where the truth does not,
    and the KL to the data is what keeps samples where the reward can be believed."""
    def draw(n, generator=None):
        rng = random.Random(torch.randint(2 ** 62, (1,), generator=generator).item())
        return tokens_of([dna_sequence(length, rng) for _ in range(n)], "ACGT")

    @torch.no_grad()
    def reward(tokens):
        return oracle(length).to(tokens.device)(one_hot(tokens)).squeeze(1)

    def measure(tokens):                # GC is what the oracle takes for a cause
        truth = sum(map(true_activity, task.decode(tokens))) / len(tokens)
        is_gc = (tokens == 1) | (tokens == 2)
        return {"true activity": truth, "GC": is_gc.double().mean().item()}

    data, held = split(draw) if length >= 6 else (draw, None)   # else too few to spare any
    task = Task("dna", "ACGT", length, data, reward, held=held, measure=measure)
    return task

# -----------------------------------------------------------------------------
# arithmetic: a prompt, and an answer that can be verified

PROMPT = 6                  # slots of a+b=
SYMBOLS = "0123456789+="


def sums(n, generator=None):
    """a+b=ccc with two-digit a and b -> [n, 9]; half of the answers are wrong in one digit."""
    pairs = torch.randint(10, 100, (2, n), generator=generator).T.tolist()
    x = tokens_of([f"{a}+{b}={a + b:03}" for a, b in pairs], SYMBOLS)
    place = torch.randint(PROMPT, 9, (n, 1), generator=generator)
    slip = torch.randint(1, 10, (n, 1), generator=generator)
    is_wrong = torch.rand(n, 1, generator=generator) < 0.5
    return x.scatter(1, place, (x.gather(1, place) + slip * is_wrong) % 10)


def arithmetic_prompt(x):
    return (torch.arange(9, device=x.device) < PROMPT).expand_as(x)


def is_held_sum(tokens):
    """Are the sums [n, 9] held out? a+b and b+a are together."""
    operands = 10 * tokens[:, [0, 3]] + tokens[:, [1, 4]]
    return is_held_out(operands.sort(dim=1).values)


def arithmetic(length=9):
    """Sums: a+b= is given, the answer is generated, and the truth earns 1. What it teaches: a rule
    that is learned from rewards holds on prompts never seen."""
    if length != 9:
        raise BadInput(f"--length={length}: arithmetic has 9 slots, as in 12+34=046")

    def reward(tokens):
        found = [re.fullmatch(r"(\d\d)\+(\d\d)=(\d{3})", s) for s in task.decode(tokens)]
        return [bool(m) and int(m[1]) + int(m[2]) == int(m[3]) for m in found]

    data, held = split(sums, is_held_sum)
    task = Task("arithmetic", SYMBOLS, 9, data, reward, given=arithmetic_prompt, held=held,
                is_held=is_held_sum)
    return task

# -----------------------------------------------------------------------------
# text: characters, and words of the corpus


@cache
def corpus():
    """The prose of the language reference inside Python, lower case, without indented code."""
    lines = "\n".join(topic for _, topic in sorted(topics.topics.items())).splitlines()
    prose = " ".join(line for line in lines if not line.startswith("   "))
    return re.sub(r"[^a-z.,']+", " ", prose.lower())


def alphabet_of(content):
    return "".join(sorted(set(content) - {"\n"}))


def words_of(content):
    """Its distinct words of four letters and more."""
    return set(re.findall(r"[^\W\d_]{4,}", content.lower()))


def text(length=48):
    """Windows of a text; the reward is the share of slots in distinct words of that text, of four
    letters and more. What it teaches: the reward counts words, so the model learns words, not
    sentences."""
    content = corpus()
    alphabet, known = alphabet_of(content), words_of(content)

    def reward(tokens):
        found = [known & words_of(string) for string in task.samples(tokens)]
        return [sum(map(len, words)) / length for words in found]

    data, held = windows(tokens_of([content], alphabet)[0], length)
    task = Task("text", alphabet, length, data, reward, held=held)
    return task

# -----------------------------------------------------------------------------
# ehrlich: a hard search with a known optimum (Ehrlich functions; Stanton et al., 2407.00236)

def ehrlich(length=32):
    """Sequences in which some letters never follow others. The reward is 0 where a forbidden pair
    occurs; else the product over four motifs of q / 4, where q is the largest number of the motif's
    letters that stand at its distances, over all starts. The best is 1. What it teaches: the
    pre-trained model knows what is feasible, and the black box what is good."""
    letters, motifs, size, banned = "ACDEFGHIKLMNPQRSTVWY", 4, 4, 3
    if length < motifs * size:
        raise BadInput(f"--length={length}: the motifs of ehrlich need {motifs * size} slots")
    V, generator = len(letters), torch.Generator().manual_seed(0)
    order = torch.rand(V, V, generator=generator).fill_diagonal_(2).argsort(dim=1)
    is_banned = torch.zeros(V, V, dtype=torch.bool).scatter(1, order[:, :banned], True)
    step = 2 * torch.randn(V, V, generator=generator)
    step = step.masked_fill(is_banned, -math.inf).softmax(dim=1)
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
            hits = sum(tokens[:, i:i + n] == v for v, i in zip(motif, place))       # [B, n]
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
    data: a file to pre-train on, in a format of `read_sequences`. pad: the letter that fills up
    short sequences. crop: cut windows. reward: file.py:function."""
    if name not in (*TASKS, "own"):
        raise BadInput(f"task {name!r} is not in rewards.TASKS")
    if (pad or crop) and not data:
        raise BadInput("--pad and --crop are for sequences from a file: give --data too")
    if len(pad) > 1:
        raise BadInput(f"--pad={pad}: one letter is needed")
    sequences = read_sequences(data, format) if data else []
    crop = crop or format == "text"
    if name == "own":                       # as long as the longest sequence; windows: 64 letters
        lengths = set(map(len, sequences))
        length = length or min(max(lengths), 64 if crop else math.inf)
        task = Task("own", alphabet_of("\n".join(sequences)), length, data=None, reward=None)
        if len(lengths) > 1 and not crop:
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


def score_in_order(score, samples):
    """The answers of a user's function, which must leave the list of samples as it is."""
    given = list(samples)
    values = score(given)
    if given != samples:
        raise BadInput("the reward changed its list of samples, so its values may be in another "
                       "order: work on a copy, as in sorted(samples)")
    return values


RESERVED = {"iter", "phase", "queries", "reward", "reward_std", "best", "kl", "clip_fraction",
            "grad_norm"}           # columns of metrics.jsonl


def measured(columns):
    """What a user's measure returned -> {column: float}; raises BadInput."""
    try:
        values = {str(name): float(value) for name, value in columns.items()}
        if RESERVED.isdisjoint(values):
            return values
    except (AttributeError, TypeError, ValueError):
        pass
    raise BadInput(f"measure returned {columns!r:.80}: {{column: number}} is needed, and other "
                   f"names than {', '.join(sorted(RESERVED))}")


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
    if format == "text":
        sequences = [" ".join(content.split())]
    elif format == "fasta" or (not format and content.startswith(">")):
        records = ("\n" + content).split("\n>")[1:]     # a record's first line is its name
        sequences = ["".join(record.partition("\n")[2].split()) for record in records]
    else:
        sequences = re.split(r"\s*\n\s*", content)      # without empty lines
    if not sequences:
        raise BadInput(f"--data={file} is no FASTA: no line begins with >")
    if "" in sequences:
        raise BadInput(f"--data={file}: sequence {sequences.index('') + 1} is empty")
    return sequences


def use_data(task, sequences, file, pad, crop):
    """Let the task draw its data from the sequences of a file, and say what is held out."""
    if task.alphabet.isupper() and task.name != "own":  # a genome's lower case marks repeats
        sequences = [s.upper() for s in sequences]
    if pad:
        if pad in task.alphabet or any(pad in s for s in sequences):
            raise BadInput(f"--pad={pad} is a letter of {file} or of the task: choose another")
        task.alphabet, task.pad = task.alphabet + pad, pad
        sequences = [s.ljust(task.length, pad) for s in sequences]      # windows, too
    if crop:                                            # windows avoid letters such as N
        x = tokens_of(["\n".join(sequences)], task.alphabet)[0]
        n_foreign = (x < 0).sum().item() - len(sequences) + 1
        task.data, task.held = windows(x, task.length)
        what = f"windows that avoid {n_foreign:,} foreign letters, the last 5% of them"
    else:
        parts = []
        for i, s in enumerate(sequences, 1):
            try:
                parts.append(task.encode([s]))
            except BadInput as error:
                raise BadInput(f"sequence {i} of {file}: {error}; fill up with --pad=-, choose "
                               "another --length, or cut windows that avoid foreign letters with "
                               "--crop; without --task the alphabet is that of the file") from None
        x = torch.cat(parts)
        held = task.is_held(x)
        if len(x) < 20 or held.all():                   # too few to spare any
            held = torch.zeros_like(held)
        task.data = lambda n, generator=None: x[~held]
        task.held = (lambda n, generator=None: x[held]) if held.any() else None
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
    score = getattr(module, function, None)
    if not callable(score):
        raise BadInput(f"--reward={name}: {file} has no function {function}")
    return score, getattr(module, "measure", lambda samples: {})
