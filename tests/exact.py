"""Ground truth on small spaces: models as tables, laws by enumeration, every path of a sampler."""
import itertools
import math

import torch
import torch.nn.functional as F

from diffusion import Absorbing, GridPath, Path
from model import Config, Denoiser


def network(V, L, seed=0, n_layer=2, n_embd=32, scale=1.0, **config):
    """A small Denoiser whose predictions are far from uniform and depend on every input."""
    torch.manual_seed(seed)
    model = Denoiser(Config(V, L, n_layer=n_layer, n_head=2, n_embd=n_embd, **config))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=scale * p.size(1) ** -0.5)
    return model.eval()


def sequences(V, L):
    """All V**L sequences, in the order of exact_law -> [V**L, L]."""
    return torch.tensor(list(itertools.product(range(V), repeat=L)))


def rank(tokens, V):
    """The place of each sequence [B, L] in sequences(V, L) -> [B]."""
    return (tokens * V ** torch.arange(tokens.size(1) - 1, -1, -1)).sum(dim=1)


class Table(torch.nn.Module):
    """A lookup table of logits, one row per state: any law of the sampler fits in."""

    def __init__(self, V, L, logits=None, seed=0):
        super().__init__()
        self.V = V
        if logits is None:
            generator = torch.Generator().manual_seed(seed)
            logits = torch.randn((V + 1) ** L, L, V, generator=generator)
        self.logits = torch.nn.Parameter(logits)

    def forward(self, x, t=None):
        return self.logits[rank(x, self.V + 1)]


def posterior_table(p0, V, L):
    """The Table of p(x0_i = v | the revealed slots) under the law p0: the consistent model."""
    x, states = sequences(V, L), sequences(V + 1, L)
    fits = ((states[:, None] == V) | (states[:, None] == x)).all(dim=-1).double()   # [S, V^L]
    joint = torch.einsum("sx,x,xiv->siv", fits, p0.double(), F.one_hot(x, V).double())
    p = (joint / joint.sum(-1, keepdim=True)).nan_to_num(1 / V)     # of impossible states: any law
    return Table(V, L, p.clamp(min=1e-30).log().float())


class Posterior(torch.nn.Module):
    """p(x0_i = v | x_t) under the law softmax(logits) and uniform noise, alpha = 1 - t."""

    def __init__(self, p0, V, L):
        super().__init__()
        self.logits, self.x0, self.V = torch.nn.Parameter(p0.log()), sequences(V, L), V

    def forward(self, x, t):
        keep = (1 - t)[:, None, None]
        q = (keep * (x[:, None] == self.x0) + (1 - keep) / self.V).prod(-1)         # [B, V^L]
        one_hot = F.one_hot(self.x0, self.V).float()
        joint = torch.einsum("bs,siv->biv", q * self.logits.softmax(0), one_hot)
        return (joint / joint.sum(-1, keepdim=True)).clamp(min=1e-30).log()


def random_law(V, L, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(V ** L, generator=generator)).softmax(0)


def chi_square(tokens, law, V):
    """p-value of the samples [B, L] under law [V**L]; cells that expect less than 5 are pooled."""
    expected = law.detach().double() * len(tokens)
    counts = torch.bincount(rank(tokens, V), minlength=len(law)).double()
    small = expected < 5
    if small.any():
        expected = torch.cat((expected[~small], expected[small].sum()[None]))
        counts = torch.cat((counts[~small], counts[small].sum()[None]))
    keep = expected > 1e-9
    assert counts[~keep].sum() == 0, "a sequence of probability zero was drawn"
    statistic = ((counts - expected).square() / expected)[keep].sum()
    return torch.special.gammaincc((keep.sum().double() - 1) / 2, statistic / 2).item()


def gradient(value, model):
    """Of a scalar, as one vector."""
    parameters = list(model.parameters())
    grads = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters)]
    return torch.cat([part.flatten() for part in parts])


def law_given(process, model, L, steps, prompt):
    """The exact law of `sample` with a prompt [L]: that of its free slots, among all V**L."""
    if prompt is None:
        return process.exact_law(model, L, steps)
    free, every = prompt == process.vocab_size, sequences(process.vocab_size, L)

    def of_free_slots(x, t):
        whole = prompt.repeat(len(x), 1)
        whole[:, free] = x
        return model(whole, t)[:, free]
    law = process.exact_law(of_free_slots, int(free.sum()), steps)
    fits = (free | (every == prompt)).all(dim=1)
    return torch.zeros(len(every)).masked_scatter(fits, law)


def exact_p(process):
    """For sepo.neighbours: p(y) from the exact law, in place of the authors' estimate."""
    def p_of(model, y, slots):
        V, L = process.vocab_size, y.size(1)
        return process.exact_law(model, L)[rank(y, V)]
    return p_of


def kl(p, q):
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum().item()


@torch.no_grad()
def plain_loop(process, model, x, steps, time=None):
    """Ancestral sampling as it is usually written: N passes, a softmax at every slot -> [B, L].

    A masked slot is revealed in the step from t to s with chance (alpha_s - alpha_t)/(1 - alpha_t),
    or, with reveal times given, at its own time."""
    for k in range(steps, 0, -1):
        t, s = torch.full((len(x),), k / steps), torch.full((len(x),), (k - 1) / steps)
        p = model(x, t).softmax(dim=-1)                                             # [B, L, V]
        y = torch.multinomial(p.flatten(0, 1), 1).view_as(x)
        chance = ((process.alpha(s) - process.alpha(t)) / (1 - process.alpha(t)))[:, None]
        now = torch.rand(x.shape) < chance
        if time is not None:
            now = (time * steps).round() == k
            y = p.argmax(dim=-1)
        x = torch.where((x == process.mask) & now, y, x)
    return x


def every_path(process, model, L, steps=None, prompt=None):
    """Every path of the sampler -> (path, the logarithm of what else than tokens was drawn [B]).

    The probability of a path is exp(that + sum of path.logp). absorb: all tokens, and all orders of
    the reveals, or all reveal times of the grid; uniform: all sequences of states."""
    V = process.vocab_size
    prompt = torch.full((L,), V) if prompt is None else prompt
    free = [i for i in range(L) if prompt[i] == V]
    if isinstance(process, Absorbing):
        if steps:
            alpha = process.alpha(torch.arange(steps + 1) / steps)
            chance = alpha[:-1] - alpha[1:]             # of a reveal at time (k + 1) / N
            times = [[(k + 1) / steps for k in ks]
                     for ks in itertools.product(range(steps), repeat=len(free))]
            other = [sum(chance[round(t * steps) - 1].log().item() for t in row) for row in times]
        else:
            times = [[(k + 1) / (L + 1) for k in ks]
                     for ks in itertools.permutations(range(len(free)))]
            other = [-math.log(len(times))] * len(times)
        tokens = [[v for v in values] for values in itertools.product(range(V), repeat=len(free))]
        pairs = list(itertools.product(range(len(times)), range(len(tokens))))
        x = prompt.repeat(len(pairs), 1)
        time = torch.full((len(pairs), L), math.inf)
        x[:, free] = torch.tensor([tokens[b] for _, b in pairs])
        time[:, free] = torch.tensor([times[a] for a, _ in pairs])
        path = Path(x, time, torch.zeros_like(time), V)
        other = torch.tensor([other[a] for a, _ in pairs])
    else:
        given = (prompt < V)
        states = sequences(V, L)
        states = states[(states == prompt)[:, given].all(dim=1)]
        index = torch.tensor(list(itertools.product(range(len(states)), repeat=steps + 1)))
        B = len(index)
        time = torch.arange(steps, -1, -1) / steps
        path = GridPath(states[index].transpose(0, 1), time,
                        torch.zeros(B, steps, L), given.expand(B, L))
        other = torch.full((B,), -math.log(len(states)))
    with torch.no_grad():
        path.logp = process.replay(model, path)
    return path, other


def probability(path, other, logp=None):
    """Of every path -> [B]; logp: shaped as path.logp, of another model, differentiable."""
    return (other + (path.logp if logp is None else logp).flatten(1).sum(dim=1)).exp()
