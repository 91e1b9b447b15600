"""The tasks: an alphabet, data to pre-train on, perhaps prompts, and a black-box reward.

To add one, write a function that returns a Task and name it in TASKS. Shapes: B sequences, L slots, V letters.
"""
from dataclasses import dataclass, field
from typing import Callable

import torch


class BadInput(ValueError):
    """What the user gave cannot be used. The message is one line: what is wrong, where, and what to do."""


@dataclass
class Task:
    name: str
    alphabet: str                       # letter v stands for token v; V = len(alphabet)
    length: int                         # L
    data: Callable                      # (n, generator) -> clean sequences, long [n, L]
    reward: Callable                    # tokens [B, L] -> float [B]; a black box: no gradient, no batch effects
    prompt: Callable | None = None      # (n, generator) -> [n, L], the mask V where a slot is free; None: all are
    flags: dict = field(default_factory=dict)  # defaults of train.py's flags that suit this task

    @property
    def vocab_size(self):
        return len(self.alphabet)

    @property
    def enumerable(self):
        """Small enough for exact laws, which walk every partly masked sequence."""
        return self.prompt is None and (self.vocab_size + 1) ** self.length <= 100_000

    def decode(self, tokens):
        """[B, L] -> B strings; the mask is shown as _."""
        return ["".join((self.alphabet + "_")[v] for v in row) for row in tokens.tolist()]

    def encode(self, strings):
        """Strings of one length -> [B, L]; _ is the mask."""
        letters = self.alphabet + "_"
        for s in strings:
            for i, c in enumerate(s):
                if c not in letters:
                    raise BadInput(f"{c!r} at position {i + 1} of {s!r} is not in the alphabet {self.alphabet!r}")
        return torch.tensor([[letters.index(c) for c in s] for s in strings])


def ask(task, tokens):
    """The task's reward of tokens [B, L] -> float32 [B] on their device, or BadInput that names the sample at fault."""
    try:
        reward = torch.as_tensor(task.reward(tokens), device=tokens.device).detach().float()
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"the reward raised {type(error).__name__}: {error} (a batch that starts with "
                       f"{task.decode(tokens[:1])[0]!r})") from error
    if reward.shape != tokens.shape[:1]:
        raise BadInput(f"the reward returned shape {list(reward.shape)} for {len(tokens)} samples: "
                       f"it must be [{len(tokens)}]")
    bad = ~reward.isfinite()
    if bad.any():
        b = int(bad.int().argmax())
        raise BadInput(f"the reward of sample {b}, {task.decode(tokens[b:b + 1])[0]!r}, is {reward[b].item()}: "
                       "it must be finite")
    return reward


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

TASKS = {task.name: task for task in (toy,)}
