"""The tasks: an alphabet, data to pre-train on, perhaps prompts, and a black-box reward; and the user's own data and reward.

To add one, write a function that returns a Task and name it in TASKS. Shapes: B sequences, L slots, V letters.
"""
import gzip
import importlib.util
import re
import sys
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path as File
from pydoc_data import topics
from typing import Callable

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class BadInput(ValueError):
    """What the user gave cannot be used. The message is one line: what is wrong, where, and what to do."""


@dataclass
class Task:
    name: str
    alphabet: str                       # letter v stands for token v; V = len(alphabet)
    length: int                         # L
    data: Callable                      # (n, generator) -> clean sequences, long [n, L]; of a file, all there are
    reward: Callable                    # tokens [B, L] -> float [B]; a black box: no gradient, no batch effects
    given: Callable | None = None       # clean [n, L] -> bool [n, L]: the slots that a prompt gives; None: no prompts
    held: Callable | None = None        # as data, of sequences that data never gives: to test on
    measure: Callable | None = None     # data [n, L] -> (tokens [B, L], rewards [B]) -> {column of the report: number}
    oracle: nn.Module | None = None     # a network in the reward: a run calls its fit(data) once, and saves it
    variant: Callable | None = None     # (length, text or None) -> this task at another length, or on another text
    running: bool = False               # a plain file of data is one running text, not a sequence a line
    flags: dict = field(default_factory=dict)  # defaults of train.py's flags that suit this task

    @property
    def vocab_size(self):
        return len(self.alphabet)

    @property
    def enumerable(self):
        """Small enough for exact laws, which walk every partly masked sequence."""
        return self.given is None and (self.vocab_size + 1) ** self.length <= 100_000

    def prompts(self, x):
        """Clean sequences [n, L] -> their prompts, the mask V where a slot is free; None where the task has none."""
        return None if self.given is None else x.where(self.given(x), self.vocab_size)

    @property
    def blank(self):
        """How the mask is written: _, or what the alphabet leaves."""
        return next(c for c in "_?#@~\0" if c not in self.alphabet)

    def decode(self, tokens):
        """[B, L] -> B strings; the mask is shown as `blank`."""
        letters = self.alphabet + self.blank
        return ["".join([letters[v] for v in row]) for row in tokens.tolist()]

    def encode(self, strings):
        """Strings of one length -> [B, L]; `blank` is the mask."""
        for s in strings:
            self.check(s, repr(s), self.blank)
        index = {ord(c): v for v, c in enumerate(self.alphabet + self.blank)}
        codes = [np.frombuffer(s.translate(index).encode("utf-32-le"), np.int32).copy() for s in strings]
        return torch.from_numpy(np.stack(codes)).long()

    def check(self, string, where, also=""):
        """BadInput if a letter of the string is not of the alphabet, nor `also`."""
        for c in set(string).difference(self.alphabet, also):
            raise BadInput(f"{c!r} at position {string.index(c) + 1} of {where} is not in the alphabet {self.alphabet!r}")


def ask(task, tokens):
    """The task's reward of tokens [B, L] -> float32 [B] on their device, or BadInput that names the sample at fault."""
    try:
        reward = torch.as_tensor(task.reward(tokens), device=tokens.device).detach().float()
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"the reward raised {said(error)} ({culprit(task, tokens)})") from error
    if reward.shape != tokens.shape[:1]:
        raise BadInput(f"the reward returned shape {list(reward.shape)} for {len(tokens)} samples: "
                       f"it must be [{len(tokens)}] (a batch that starts with {task.decode(tokens[:1])[0]!r})")
    bad = ~reward.isfinite()
    if bad.any():
        b = int(bad.int().argmax())
        raise BadInput(f"the reward of sample {b}, {task.decode(tokens[b:b + 1])[0]!r}, is {reward[b].item()}: "
                       "it must be finite")
    return reward


def said(error):
    """An exception of the user's code as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def culprit(task, tokens):
    """Which of tokens [B, L] the reward raises on, in words; found by halves, provided that it raises again."""
    def raises(x):
        try:
            task.reward(x)
        except Exception:
            return True
        return False
    x = tokens
    while len(x) > 1:
        half = x[:len(x) // 2]
        x = half if raises(half) else x[len(half):]
    return f"on {task.decode(x)[0]!r}" if raises(x) else f"on a batch that starts with {task.decode(tokens[:1])[0]!r}"


# ---- train and held-out -------------------------------------------------------------------------------------------------

def held_out(x):
    """Which of x [n, L] are for testing: one in twenty, by content, so that equal sequences are on one side -> bool [n]."""
    weight = torch.randint(1, 2 ** 31, (x.size(1),), generator=torch.Generator().manual_seed(0))
    return ((x + 1) * weight).sum(dim=1) % 20 == 0


def split(draw, side=held_out):
    """draw(n, generator) -> [n, L], as many as one likes -> (data, held), the same on either side of the split."""
    def only(wanted, n, generator):
        parts = []
        while sum(map(len, parts)) < n:
            x = draw(n + 20, generator)
            parts.append(x[side(x) == wanted])
        return torch.cat(parts)[:n]
    return lambda n, generator=None: only(False, n, generator), lambda n, generator=None: only(True, n, generator)


def windows(texts, length):
    """Texts of tokens -> (data, held): windows [n, length] at random places, which overlap none of the other side. Held out is
    the last twentieth of every text that is long enough; where none is, one text in twenty."""
    size = torch.tensor([len(x) for x in texts])
    begin, late = size.cumsum(0) - size, torch.where(size // 20 >= length, size // 20, 0)            # late: letters held out
    if not late.any():
        late = size * (torch.arange(len(texts)) % 20 == 19)
    flat, step = torch.cat(texts), torch.arange(length)

    def cut(begin, size):
        """Windows of the texts that lie at `begin` and have `size` letters."""
        last = (size - length + 1).clamp(min=0).cumsum(0)                            # windows up to and with each text

        def draw(n, generator=None):
            u = torch.randint(int(last[-1]), (n,), generator=generator)
            text = torch.searchsorted(last, u, right=True)
            start = begin[text] + size[text] - length - (last[text] - 1 - u)
            return flat[start[:, None] + step].long()
        return draw if len(last) and last[-1] > 0 else None
    return cut(begin, size - late), cut(begin + size - late, late)


# ---- the user's own data and reward -------------------------------------------------------------------------------------

def open_task(name, length=0, data="", pad="", crop=False, reward=""):
    """The task as the flags of a run want it: of `length` slots (0: its own), on the sequences of the file `data`, with
    `reward` = file.py:function. BadInput for what cannot be used."""
    task = TASKS[name]
    length = length or task.length
    if (pad or crop) and not data:
        raise BadInput(f"--{'pad' if pad else 'crop'} is for sequences from a file: give --data too")
    if len(pad) > 1 or not pad.isprintable():
        raise BadInput(f"--pad={pad}: one letter is needed")
    if pad and pad in task.alphabet and not task.running:
        raise BadInput(f"--pad={pad} is a letter of --task={name}: choose another")
    if length != task.length and task.variant is None:
        raise BadInput(f"--length={length}: --task={name} has {task.length} slots")
    sequences = read_sequences(data, task.running and not pad) if data else []
    if task.variant:
        task = task.variant(length, "\n".join(letters for _, letters in sequences) if data and task.running else None)
    if data:
        if task.alphabet.isupper():                    # a genome's lower case marks repeats
            sequences = [(where, letters.upper()) for where, letters in sequences]
        task = replace(task, alphabet=task.alphabet + pad * (pad not in task.alphabet))
        train, held = from_file(task, sequences, pad, crop or (task.running and len(sequences) == 1))
        task = replace(task, data=train, held=held)
    if reward:
        score = load_function(reward)
        task = replace(task, oracle=None, measure=None,
                       reward=lambda tokens: score([s.replace(pad, "") if pad else s for s in task.decode(tokens)]))
    return task


def read_sequences(file, running=False):
    """A file of one sequence a line, or FASTA, or (running) one text; gzip too -> [(letters' place, letters)]."""
    try:
        with (gzip.open if file.endswith(".gz") else open)(file, "rt", encoding="utf-8-sig") as f:
            lines = [line.strip() for line in f]
    except UnicodeDecodeError:
        raise BadInput(f"--data={file} is not text") from None
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"--data={file}: {getattr(error, 'strerror', None) or error}") from None
    if not any(lines):
        raise BadInput(f"--data={file} is empty")
    if lines[0].startswith(">"):
        heads = [i for i, line in enumerate(lines) if line.startswith(">")]
        return [(f"{file} line {i + 1}", "".join(lines[i + 1:end])) for i, end in zip(heads, heads[1:] + [len(lines)])]
    if running:
        return [(file, " ".join(" ".join(lines).split()))]
    while not lines[-1]:
        lines.pop()
    return [(f"{file} line {i + 1}", line) for i, line in enumerate(lines)]


def from_file(task, sequences, pad, crop):
    """-> (data, held) as Task has them: whole sequences, short ones filled with `pad`; or windows of them (crop)."""
    L, rows = task.length, []
    for where, letters in sequences:
        if not letters:
            raise BadInput(f"{where} is empty")
        task.check(letters, where)
        if len(letters) < L and not pad:
            raise BadInput(f"{where} has {len(letters)} letters, --task={task.name} {L} slots: fill up with --pad=-, or "
                           f"choose --length={len(letters)}")
        if len(letters) > L and not crop:
            raise BadInput(f"{where} has {len(letters)} letters, --task={task.name} {L} slots: cut windows with --crop, or "
                           f"choose --length={len(letters)}")
        rows.append(task.encode([letters.ljust(L, pad or " ")])[0].to(torch.uint8 if task.vocab_size < 256 else torch.int32))
    if crop:
        return windows(rows, L)
    x = torch.stack(rows).long()
    side = held_out(x if task.given is None else x.where(task.given(x), 0))          # by prompt, where there are prompts
    if len(x) < 20 or side.all() or not side.any():    # too few to spare any
        return lambda n, generator=None: x, None
    return lambda n, generator=None: x[~side], lambda n, generator=None: x[side][:n]


def load_function(name):
    """--reward=file.py:function -> the function, list[str] -> list[float]."""
    file, _, function = name.rpartition(":")
    if not file.endswith(".py") or not function:
        raise BadInput(f"--reward={name}: file.py:function is needed")
    if not File(file).is_file():
        raise BadInput(f"--reward={name}: {file} does not exist")
    sys.path.insert(0, str(File(file).resolve().parent))       # so that it can import its neighbours
    spec = importlib.util.spec_from_file_location("own_reward", file)
    module = sys.modules["own_reward"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise BadInput(f"--reward={name}: {file} raised {said(error)}") from error
    if not callable(getattr(module, function, None)):
        raise BadInput(f"--reward={name}: {file} has no function {function}")
    return getattr(module, function)


# ---- toy: small enough to enumerate -----------------------------------------------------------------------------------

TOY_STEP = torch.tensor([[.55, .15, .25, .05],   # a first-order Markov chain on ACGT: row, the letter before
                         [.10, .50, .05, .35],
                         [.30, .10, .50, .10],
                         [.05, .30, .15, .50]])


def toy_data(n, generator=None):
    """Six letters of the chain from a uniform start -> [n, 6]."""
    x = torch.randint(4, (n, 1), generator=generator)
    for _ in range(5):
        x = torch.cat((x, torch.multinomial(TOY_STEP[x[:, -1]], 1, generator=generator)), dim=1)
    return x


def toy_reward(tokens):
    """A quarter for each copy of TC, a sixteenth for each A -> [B], at most 3/4.

    TCTCTC (12/16), TCTCAA (10/16), TCAAAA (8/16) and AAAAAA (6/16) are peaks: no change of one letter improves
    them, and AAAAAA, the lowest, is the likeliest in the data. Who climbs the nearest one is stuck."""
    copies = ((tokens[:, :-1] == 3) & (tokens[:, 1:] == 1)).sum(dim=1)
    return copies / 4 + (tokens == 0).sum(dim=1) / 16


toy = Task("toy", "ACGT", 6, toy_data, toy_reward,
           flags=dict(n_layer=2, n_embd=64))

# ---- dna: binding sites, their true activity, and an oracle that has only seen noisy measurements -----------------------

TRIPLETS = torch.tensor([                        # trinucleotides of the human genome (hg19, both strands), in millions:
    [[115.4, 66.6, 14.4, 92.1], [118.0, 76.4, 105.1, 142.7]],    # ACA ACC ACG ACT, ATA ATC ATG ATT
    [[105.5, 75.2, 15.8, 101.6], [73.8, 96.3, 116.0, 114.2]],    # C..
    [[82.4, 68.1, 13.6, 80.0], [64.9, 54.1, 86.0, 83.4]],        # G..
    [[112.1, 88.3, 12.6, 126.6], [119.0, 112.8, 108.4, 219.9]]]) # T..; those around A and G are on the other strand

FACTORS = {               # transcription factor: consensus in IUPAC letters, weight as an activator
    "HNF4A": ("CAAAGTCCA", 1.0),
    "HNF1A": ("GTTAATNATTAAC", 1.2),
    "CEBPA": ("RTTGCGYAAY", 1.0),
    "FOXA": ("TRTTKRY", 0.8),
    "AP-1": ("TGASTCA", 1.0),
    "CREB": ("TGACGTCA", 1.0),
    "SP1": ("GGGGCGGGG", 0.8),
    "GATA1": ("WGATAR", 0.0),    # the repressor, by decree
}
SYNERGY = (("HNF4A", "HNF1A"), ("FOXA", "CEBPA"))      # pairs that help one another, with at most 15 letters between them
IUPAC = dict(A="A", C="C", G="G", T="T", R="AG", Y="CT", S="CG", W="AT", K="GT", M="AC", N="ACGT")
SITE_RATE = 0.75          # sites a place
MUTATION = 0.04           # wrong letters a letter of a site
NOISE = 0.3               # standard deviation of a measurement


def consensus(width=13):
    """The factors' sites as the letters that each place allows, float [S, width, 4] of 0 and 1 (0 beyond a site's end), and
    their lengths [S]."""
    sites = torch.zeros(len(FACTORS), width, 4)
    for site, (letters, _) in zip(sites, FACTORS.values()):
        for place, letter in zip(site, letters):
            place[["ACGT".index(c) for c in IUPAC[letter]]] = 1
    return sites, torch.tensor([len(letters) for letters, _ in FACTORS.values()])


def one_hot(tokens):
    """tokens [B, L] -> float [B, 4, L]; all 0 at anything but ACGT, such as a pad."""
    return (tokens[:, None] == torch.arange(4, device=tokens.device)[:, None]).float()


def sites_in(tokens):
    """Where sites start, on either strand: tokens [B, L] -> bool [B, S, L]."""
    sites, size = consensus()
    back = torch.zeros_like(sites)                     # the other strand: backwards, and A for T, C for G
    for k, n in enumerate(size):
        back[k, :n] = sites[k, :n].flip(0, 1)
    x = one_hot(tokens)
    match = F.conv1d(F.pad(x, (0, sites.size(1) - 1)), torch.cat((sites, back)).transpose(1, 2).to(x))
    forth, back = (match.round() == torch.cat((size, size)).to(x)[:, None]).chunk(2, dim=1)
    return forth | back


def activity(tokens):
    """The true activity that no reward sees: tokens [B, L] -> [B]. Sites of one factor saturate, a synergic pair adds 1, and
    each site of the repressor halves the whole."""
    if len(tokens) > 8192:                             # memory: 16 patterns at every letter
        return torch.cat([activity(part) for part in tokens.split(8192)])
    hit, names = sites_in(tokens), list(FACTORS)
    count = hit.sum(dim=2).float()                                                   # [B, S]
    total = (1 - 0.5 ** count) @ torch.tensor([weight for _, weight in FACTORS.values()]).to(count)

    def follows(a, b):                                 # b starts 0 to 15 letters after a ends -> bool [B]
        size = len(FACTORS[a][0])
        reach = F.max_pool1d(F.pad(hit[:, names.index(b)].float(), (0, size + 15)), 16, stride=1)    # b starts in i .. i + 15
        return (hit[:, names.index(a)] & (reach[:, size:] > 0)).any(dim=1)
    for a, b in SYNERGY:
        total = total + (follows(a, b) | follows(b, a))
    return total * 0.5 ** count[:, names.index("GATA1")]


def background(n, length, generator=None):
    """A second-order Markov chain with the genome's trinucleotides -> [n, length]."""
    triplet = torch.zeros(4, 4, 4)
    triplet[:, [1, 3]] = TRIPLETS
    triplet[:, [2, 0]] = TRIPLETS.permute(2, 1, 0).flip(0, 2)                        # complement of v: 3 - v
    first = torch.multinomial(triplet.sum(dim=2).flatten(), n, replacement=True, generator=generator)
    x = [first // 4, first % 4]
    for _ in range(length - 2):
        x.append(torch.multinomial(triplet[x[-2], x[-1]], 1, generator=generator).squeeze(1))
    return torch.stack(x, dim=1)


def plant(x, generator=None):
    """Sites into the background x [n, L], in place -> (factor [n, J], -1 where there is none; start [n, J]; flip [n, J]).

    J = L / 15 places hold a site each, with chance SITE_RATE: of any factor, on either strand (flip: on the other), its
    letters mutated at rate MUTATION. Places start one or more turns of the helix (10.5 letters) apart, so as not to overlap;
    what would overhang the end is left out."""
    (n, L), (sites, size) = x.shape, consensus()
    start, planted = torch.randint(8, (n,), generator=generator), []
    for _ in range(max(1, L // 15)):
        k = torch.randint(len(size), (n,), generator=generator)
        letters = torch.multinomial(sites[k].clamp(min=1e-9).flatten(0, 1), 1, generator=generator).view(n, -1)
        wrong = torch.rand(letters.shape, generator=generator) < MUTATION
        letters = torch.where(wrong, (letters + torch.randint(1, 4, letters.shape, generator=generator)) % 4, letters)
        place = torch.arange(letters.size(1))
        flip = torch.rand(n, generator=generator) < 0.5
        mirrored = (size[k, None] - 1 - place).clamp(min=0)
        letters = torch.where(flip[:, None], 3 - letters.gather(1, mirrored), letters)
        real = (torch.rand(n, generator=generator) < SITE_RATE) & (start + size[k] <= L)
        b, i = ((place < size[k, None]) & real[:, None]).nonzero(as_tuple=True)
        x[b, start[b] + i] = letters[b, i]
        planted.append((torch.where(real, k, -1), start, flip))
        turns = 1 + (torch.rand(n, generator=generator) < 0.5) + (real & (size[k] > 10))
        start = start + (10.5 * turns).round().long()
    return tuple(torch.stack(part, dim=1) for part in zip(*planted))


def dna_data(n, generator, length):
    """Background with sites in it -> [n, length]."""
    x = background(n, length, generator)
    plant(x, generator)
    return x


class Oracle(nn.Module):
    """A small convolutional network, tokens [B, L] -> activity [B]. It is fitted on measurements of half of the data, so it is
    wrong where they say little: what a reward can be hacked by."""

    def __init__(self, width=64):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(4, width, 13, padding=6), nn.ReLU(), nn.MaxPool1d(4, ceil_mode=True), nn.Dropout(0.2),
            nn.Conv1d(width, width, 5, padding=2), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Dropout(0.2),
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, tokens):
        return self.net(one_hot(tokens)).squeeze(1)

    def fit(self, data, epochs=15, batch=64, lr=5e-3):
        """Least squares on noisy measurements of the first half of data [n, L], read from either strand; always the same."""
        self.train()
        with torch.random.fork_rng([data.device] if data.is_cuda else []), torch.enable_grad():
            torch.manual_seed(0)
            for module in self.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            x = data[:(len(data) + 1) // 2]
            y = activity(x)
            y = y + NOISE * torch.randn(y.shape).to(y)
            optimizer = torch.optim.AdamW(self.to(x.device).parameters(), lr, weight_decay=0.1)
            steps = epochs * -(-len(x) // batch)
            decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
            for _ in range(epochs):
                for rows in torch.randperm(len(x)).to(x.device).split(batch):
                    flip = (torch.rand(len(rows), 1) < 0.5).to(x.device)
                    loss = F.mse_loss(self(torch.where(flip, 3 - x[rows].flip(1), x[rows])), y[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    decay.step()


def triplets_of(tokens):
    """Shares of the 64 3-mers in tokens [B, L] -> [64]; those with anything but ACGT do not count."""
    x = tokens.unfold(1, 3, 1).flatten(0, 1)
    x = x[(x < 4).all(dim=1)]
    return torch.bincount((x * x.new_tensor([16, 4, 1])).sum(dim=1), minlength=64) / max(1, len(x))


def dna_measure(data):
    """Beside the reward: the truth, the share of it above the data's best, and whether sequences still look like those."""
    data = data[:100_000]
    truth = activity(data)
    best = truth.quantile(0.99)
    top = triplets_of(data[truth.topk(-(-len(data) // 100)).indices])

    def measure(tokens, rewards):
        true = activity(tokens)
        return {"true activity (median)": true.median().item(), "oracle (median)": rewards.median().item(),
                "over data's 99%": (true > best).float().mean().item(),
                "3-mer corr.": torch.corrcoef(torch.stack((triplets_of(tokens), top)))[0, 1].item()}
    return measure


def dna(length=50, text=None):
    """Regulatory DNA; the reward is the oracle's, never the truth."""
    if length < 3:
        raise BadInput(f"--length={length}: --task=dna needs 3 slots or more, for its 3-mers")
    with torch.random.fork_rng(devices=[]):
        oracle = Oracle()
    data, held = split(lambda n, generator: dna_data(n, generator, length))

    @torch.no_grad()
    def reward(tokens):
        return oracle.eval().to(tokens.device)(tokens)
    return Task("dna", "ACGT", length, data, reward, held=held, measure=dna_measure, oracle=oracle, variant=dna,
                flags=dict(n_layer=2, n_embd=64, conv=13, pretrain_iters=2500, pretrain_lr=3e-3, steps=20, beta=0.02,
                           iters=300, eval_every=5))


# ---- arithmetic: a prompt, and an answer that can be verified -----------------------------------------------------------

def sums(n, generator=None):
    """a+b=ccc with two-digit a and b -> [n, 9]; half of the answers are wrong in one digit."""
    a, b = torch.randint(10, 100, (2, n), generator=generator)
    x = digits(a, b, a + b)
    place, slip = torch.randint(6, 9, (n, 1), generator=generator), torch.randint(1, 10, (n, 1), generator=generator)
    wrong = torch.rand(n, 1, generator=generator) < 0.5
    return x.scatter(1, place, torch.where(wrong, (x.gather(1, place) + slip) % 10, x.gather(1, place)))


def digits(a, b, c):
    """The tokens of a+b=ccc: numbers [n] -> [n, 9]; 10 is +, 11 is =."""
    return torch.stack((a // 10, a % 10, torch.full_like(a, 10), b // 10, b % 10, torch.full_like(a, 11),
                        c // 100, c // 10 % 10, c % 10), dim=1)


def is_true(tokens):
    """1 where the three digits after = are the sum -> [B]."""
    a, b = 10 * tokens[:, 0] + tokens[:, 1], 10 * tokens[:, 3] + tokens[:, 4]
    return (tokens == digits(a, b, a + b)).all(dim=1).float()


def arithmetic():
    """Sums: a+b= is given, the answer is generated, and the truth earns 1."""
    data, held = split(sums, lambda x: held_out(x[:, :6]))                           # by prompt, not by answer
    return Task("arithmetic", "0123456789+=", 9, data, is_true, held=held,
                given=lambda x: (torch.arange(9, device=x.device) < 6).expand_as(x),
                flags=dict(n_layer=3, pretrain_iters=3000, pretrain_batch=256, pretrain_lr=1e-3, data_size=200000, prompts=16,
                           group=16, updates=8, lr=3e-4, iters=120))


# ---- text: characters, and words of the corpus --------------------------------------------------------------------------

WORD = re.compile(r"[^\W\d_]+")


def corpus():
    """The language reference inside Python, its prose in lower case, without its grammar and code (which are indented)."""
    lines = [line for _, topic in sorted(topics.topics.items()) for line in topic.splitlines() if not line.startswith("   ")]
    return re.sub(r"[^a-z.,']+", " ", " ".join(lines).lower())


def text(length=48, text_of=None):
    """Windows of a text. The reward is the share of slots in whole words of that text, a first time: letters of a word again
    count against it, and one gap a word is free. So one word over and over, or one word and blanks, earns little."""
    whole = corpus() if text_of is None else text_of
    alphabet = "".join(sorted(set(whole) - {"\n"}))
    known = {word for word in WORD.findall(whole.lower()) if len(word) > 1 or word in "ai"}

    def score(string):
        words, seen, total = WORD.findall(string.lower()), set(), 0
        for word in words:
            total += len(word) * (word in known) * (-1 if word in seen else 1)
            seen.add(word)
        gaps = len(string) - sum(map(len, words))
        return total / max(1, len(string) - min(gaps, len(words)))

    def measure(data):
        def count(tokens, rewards):
            words = [word for string in task.decode(tokens) for word in WORD.findall(string.lower())]
            return {"known words": sum(word in known for word in words) / max(1, len(words)),
                    "distinct words": len(set(words)) / max(1, len(words))}
        return count
    task = Task("text", alphabet, length, None, lambda tokens: torch.tensor([score(s) for s in task.decode(tokens)]),
                measure=measure, variant=text, running=True,
                flags=dict(n_layer=2, n_embd=96, conv=7, dropout=0.1, pretrain_iters=2500, pretrain_lr=3e-3, data_size=100000,
                           lr=2e-4, clip=0.2, updates=8, path_events=2, beta=0.01, iters=80, eval_every=5))
    if text_of is None:
        task.data, task.held = windows([task.encode([whole])[0]], length)
    return task


TASKS = {task.name: task for task in (toy, dna(), arithmetic(), text())}
