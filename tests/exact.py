"""Ground truth on small spaces: models as tables, distributions by enumeration, every path.

Read first `Table` (a model that can be anything), then `every_path` (all that a sampler can do),
then `gradient`: a test of a method compares its gradient over every path with autograd through the
exact distribution.
"""
import itertools
import math

import torch
import torch.nn.functional as F

from diffusion import Absorbing, Path
from model import Config, Denoiser


def network(V, L, seed=0, n_layer=2, n_embd=32, scale=1.0, **config):
    """A small Denoiser whose predictions are far from uniform and depend on every input."""
    torch.manual_seed(seed)
    model = Denoiser(Config(V, L, n_layer=n_layer, n_head=2, n_embd=n_embd, **config))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=scale * p.size(1) ** -0.5)
    return model.eval()


def has_bfloat16():
    """Torch may lack the instructions, for instance where ATEN_CPU_CAPABILITY hides them."""
    try:
        x = torch.zeros(1, 2, 64, 16, dtype=torch.bfloat16)
        F.scaled_dot_product_attention(x, x, x)
    except RuntimeError:
        return False
    return True


def sequences(V, L):
    """All V**L sequences, in the order of exact_law -> [V**L, L]."""
    return torch.tensor(list(itertools.product(range(V), repeat=L)))


def rank(tokens, V):
    """The place of each sequence [B, L] in sequences(V, L) -> [B]."""
    power = torch.arange(tokens.size(1) - 1, -1, -1, device=tokens.device)
    return (tokens * V ** power).sum(dim=1)


class Table(torch.nn.Module):
    """A lookup table of logits, one row per state: any distribution of the sampler fits in."""

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
    """The Table of p(x0_i = v | the revealed positions) under the distribution p0 [V**L]: a
    consistent model, one whose conditionals are those of one distribution."""
    x, states = sequences(V, L), sequences(V + 1, L)
    fits = ((states[:, None] == V) | (states[:, None] == x)).all(dim=-1).double()   # [S, V^L]
    joint = torch.einsum("sx,x,xiv->siv", fits, p0.double(), F.one_hot(x, V).double())
    p = (joint / joint.sum(-1, keepdim=True)).nan_to_num(1 / V)     # of impossible states: any
    return Table(V, L, p.clamp(min=1e-30).log().float())


class Posterior(torch.nn.Module):
    """p(x0_i = v | x_t) under the distribution softmax(logits) and uniform noise at level t."""

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


def law_given(process, model, L, prompt):
    """The exact distribution of `sample` with a prompt [L]: that of its free positions, among all
    V**L sequences."""
    if prompt is None:
        return process.exact_law(model, L)
    free, every = prompt == process.mask, sequences(process.vocab_size, L)

    def of_free_positions(x, t):
        whole = prompt.repeat(len(x), 1)
        whole[:, free] = x
        return model(whole, t)[:, free]
    law = process.exact_law(of_free_positions, int(free.sum()))
    fits = (free | (every == prompt)).all(dim=1)
    return torch.zeros(len(every), dtype=law.dtype).masked_scatter(fits, law)


@torch.no_grad()
def corrected_law(process, model, law, t, moves):
    """The distribution of the samples of `correct_path`, if that of the samples before is `law`
    [V**L]: a list, one for each of the rising numbers of `moves`. Absorbing chain, no grid."""
    V, W = process.vocab_size, process.vocab_size + 1
    L = round(math.log(len(law), V))
    states, power = sequences(W, L), W ** torch.arange(L - 1, -1, -1)
    n_masked = (states == V).sum(dim=1)                                             # [S]
    mass = torch.zeros(W ** L, dtype=torch.double)
    mass[n_masked == 0] = law.double()
    for i in range(L):                                  # noise up to time t, one position at a time
        position = mass.view(W ** i, W, -1)
        position[:, V] = t * position[:, :V].sum(dim=1)
        position[:, :V] *= 1 - t

    def flow(mass, p, i):
        """Every state jumps with probabilities p [S, w] to the first w letters at position i."""
        change = torch.arange(p.size(1)) - states[:, i, None]                       # [S, w]
        target = torch.arange(W ** L)[:, None] + change * power[i]
        return torch.zeros_like(mass).index_add(0, target.flatten(), (mass[:, None] * p).flatten())

    time = torch.full((W ** L,), t)
    jumps = [process.jump_probs(model, states, time, torch.full((W ** L, 1), i)).double()
             for i in range(L)]                                                     # L times [S, W]
    stay = 1 - sum(p.sum(dim=1) for p in jumps) / L
    p = model(states, n_masked / (L + 1)).double().softmax(dim=-1)                  # [S, L, V]

    def revealed(mass):
        for m in range(L, 0, -1):
            at = mass * (n_masked == m) / m             # each of the m masks is as likely the next
            mass = mass * (n_masked < m) + sum(
                flow(at * (states[:, i] == V), p[:, i], i) for i in range(L))
        return mass[n_masked == 0]
    laws, done = [], 0
    for number in moves:
        for _ in range(done, number):
            mass = mass * stay + sum(flow(mass, jumps[i], i) for i in range(L)) / L
        laws, done = [*laws, revealed(mass)], number
    return laws


def exact_p(process):
    """A stand-in for sepo.importance_sampled: p(y) from the exact distribution, not the authors'
    estimate."""
    def p_of(_, model, y, position, M=None):
        law = process.exact_law(model, y.size(1))
        return law[rank(y, process.vocab_size), None].float()                       # [n, 1]
    return p_of


def kl(p, q):
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum().item()


@torch.no_grad()
def plain_loop(process, model, x, time=None):
    """Ancestral sampling as it is usually written: N passes, a softmax at every position -> [B, L].

    A mask is revealed in the step from t to s with chance (t - s)/t, or, with reveal times given,
    at its own time."""
    N = process.steps
    for k in range(N, 0, -1):
        t = torch.full((len(x),), k / N)
        p = model(x, t).softmax(dim=-1)                                             # [B, L, V]
        y = torch.multinomial(p.flatten(0, 1), 1).view_as(x)
        now = torch.rand(x.shape) < 1 / k
        if time is not None:
            now = (time * N).round() == k
            y = p.argmax(dim=-1)
        x = torch.where((x == process.mask) & now, y, x)
    return x

# -----------------------------------------------------------------------------
# every path of a sampler


def every_path(process, model, L, prompt=None):
    """Everything that the sampler can do -> tokens [B, L]; the path with the model's logp; log of
    the rest [B].

    The probability of a sequence of states is exp(rest + its sum of path.logp); the rest is what
    else was drawn: the order of the reveals or their times, or the noise at time 1."""
    prompt = torch.full((L,), process.mask) if prompt is None else prompt
    every = every_reveal if isinstance(process, Absorbing) else every_walk
    tokens, path, rest = every(process, prompt)
    with torch.no_grad():
        path.logp = process.logp(model, path)
    return tokens, path, rest


def every_time(n, steps):
    """All reveal times of n positions, and the log-probability of each -> [m, n], [m]."""
    if steps:                                           # each of the N times is equally likely
        k = torch.tensor(list(itertools.product(range(1, steps + 1), repeat=n)))
        return k / steps, torch.full((len(k),), -n * math.log(steps))
    order = torch.tensor(list(itertools.permutations(range(n))))
    return (order + 1) / (n + 1), torch.full((len(order),), -math.log(len(order)))


def every_reveal(process, *prompts):
    """All tokens in the free positions of prompts [L], for all reveal times."""
    rows = []
    for prompt in prompts:
        free = prompt == process.mask
        n = int(free.sum())
        times, rest = every_time(n, process.steps)
        tokens = sequences(process.vocab_size, n)
        x = prompt.repeat(len(times) * len(tokens), 1)
        time = torch.full(x.shape, math.inf)
        x[:, free] = tokens.repeat(len(times), 1)
        time[:, free] = times.repeat_interleave(len(tokens), dim=0)
        rows.append((x, time, rest.repeat_interleave(len(tokens))))
    tokens, time, rest = map(torch.cat, zip(*rows))
    return tokens, process.transitions(tokens, time)[0], rest


def every_walk(process, prompt):
    """All sequences of states on the grid; the first is uniform over those that fit the prompt."""
    N, L, given = process.steps, len(prompt), prompt < process.mask
    states = sequences(process.vocab_size, L)
    states = states[(states == prompt)[:, given].all(dim=1)]
    walk = torch.tensor(list(itertools.product(range(len(states)), repeat=N + 1)))
    walk = states[walk.T]                                                           # [N+1, B, L]
    B = walk.size(1)
    k = torch.arange(N, 0, -1).repeat_interleave(B)
    path = Path(row=torch.arange(B).repeat(N), x=walk[:-1].flatten(0, 1), t=k / N, s=(k - 1) / N,
                positions=torch.arange(L).expand(N * B, L), y=walk[1:].flatten(0, 1),
                scored=~given.expand(N * B, L), logp=None, weight=torch.full((N * B,), 1 / B),
                batch=B)
    return walk[-1], path, torch.full((B,), -math.log(len(states)))


def probability(path, rest, logp=None):
    """Of all that the sampler can do -> [B]; logp [n, k]: of another model, differentiable."""
    return (rest + path.per_sequence(path.logp if logp is None else logp)).exp()
