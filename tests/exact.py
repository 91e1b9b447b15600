"""What the tests share: models on small spaces, laws by enumeration, the plain ancestral loop, and statistics."""
import itertools

import torch

from model import Config, Denoiser


def network(V, L, seed=0, n_layer=2, n_embd=32, scale=1.0, **config):
    """A small Denoiser whose predictions are far from uniform, far from consistent, and depend on every input."""
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
    """Place of each sequence [B, L] in sequences(V, L) -> [B]."""
    return (tokens * V ** torch.arange(tokens.size(1) - 1, -1, -1)).sum(dim=1)


class Table(torch.nn.Module):
    """A model that is a lookup table of logits, one row for each of the (V+1)**L states: any law of the chain fits in."""

    def __init__(self, V, L, logits=None, seed=0):
        super().__init__()
        self.V = V
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.nn.Parameter(torch.randn((V + 1) ** L, L, V, generator=generator) if logits is None else logits)

    def forward(self, x, t=None):
        return self.logits[rank(x, self.V + 1)]


def posterior_table(p0, V, L):
    """The Table that predicts p(x0_i = v | the revealed slots) under the law p0 [V**L]: the one consistent model of p0."""
    x, states = sequences(V, L), sequences(V + 1, L)
    fits = ((states[:, None] == V) | (states[:, None] == x)).all(dim=-1).double()                  # [(V+1)^L, V^L]
    joint = torch.einsum("sx,x,xiv->siv", fits, p0.double(), torch.nn.functional.one_hot(x, V).double())
    return Table(V, L, (joint / joint.sum(-1, keepdim=True)).clamp(min=1e-30).log().float())


class Posterior(torch.nn.Module):
    """p(x0_i = v | x_t) under the law softmax(logits) [V**L] and uniform noise, alpha = 1 - t, by Bayes over all."""

    def __init__(self, p0, V, L):
        super().__init__()
        self.logits, self.x0, self.V = torch.nn.Parameter(p0.log()), sequences(V, L), V

    def forward(self, x, t):
        keep = (1 - t)[:, None, None]
        q = (keep * (x[:, None] == self.x0) + (1 - keep) / self.V).prod(-1)                          # [B, V^L]
        joint = torch.einsum("bs,siv->biv", q * self.logits.softmax(0), torch.nn.functional.one_hot(self.x0, self.V).float())
        return (joint / joint.sum(-1, keepdim=True)).clamp(min=1e-30).log()


def random_law(V, L, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(V ** L, generator=generator)).softmax(0)


def chi_square(tokens, law, V):
    """p-value of the samples [B, L] under law [V**L]; cells that expect fewer than five are pooled."""
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


def flat_gradient(value, model):
    grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(grads, model.parameters())])


@torch.no_grad()
def plain_loop(process, model, x, steps, time=None, noise=None):
    """Ancestral sampling as it is usually written, N passes with a softmax at every slot -> tokens [B, L].

    Each masked slot of x is revealed in the step from t to s with chance (alpha_s - alpha_t) / (1 - alpha_t). Given reveal
    times and Gumbel noise, it uses them instead of drawing its own."""
    for k in range(steps, 0, -1):
        t, s = torch.full((len(x),), k / steps), torch.full((len(x),), (k - 1) / steps)
        p = model(x, t).softmax(dim=-1)                                                              # [B, L, V]
        g = -torch.empty_like(p).exponential_().log() if noise is None else noise
        y = (p.log() + g).argmax(dim=-1)
        if time is None:
            hazard = ((process.alpha(s) - process.alpha(t)) / (1 - process.alpha(t)))[:, None]
            now = torch.rand(x.shape) < hazard
        else:
            now = (time * steps).round() == k
        x = torch.where((x == process.mask) & now, y, x)
    return x
