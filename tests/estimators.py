"""The published policy gradients for masked diffusion in one frame, beside the exact gradient.

    python tests/estimators.py table                        # by enumeration: bias, noise and cost
    python tests/estimators.py curves --seeds=5             # what each of them learns on the toy
    python tests/estimators.py curves --task=arithmetic     # and on prompts never seen

A policy gradient for masked diffusion looks at a finished sample x, or at the path that led to it.
It masks some of its slots, scores the tokens of some masked slots there, and multiplies what it
finds by an advantage. So an estimator is two things:

    draws   (order [L]) -> everything that it may look at: (chance, states of one sample), where a
            state is (masked slots, scored slots, weight); order: how the sampler revealed the slots
    loss    (process, model, view, advantages) -> scalar, one of those below

On a space of 27 sequences all orders, samples and draws can be enumerated, and so the expected
gradient of every estimator is known without noise, and its noise is, too.
"""
import argparse
import itertools
import json
import math
import random
import statistics
import sys
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Callable

import torch
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import compare  # noqa: E402
import sample  # noqa: E402
import sepo  # noqa: E402
from diffusion import Absorbing, MaskPath, View, gumbel_argmax, pick  # noqa: E402
from exact import (Table, exact_p, gradient, network, posterior_table, random_law,  # noqa: E402
                   rank, sequences)
from rewards import TASKS, ask  # noqa: E402

# -----------------------------------------------------------------------------
# what an estimator looks at. A draw is a list of states (masked, scored, weight) of one sample.


def visited(order):
    """The states of a path: before each event, what is still masked; the event's slot is scored."""
    return [(order[j:], order[j:j + 1], 1.0) for j in range(len(order))]


def all_events(order):
    """LOOP (2503.00897); CJ-GRPO (2509.23924) and DCoLT (2505.10446), but for an order that DCoLT
    learns and a factor of 1/L."""
    return [(1.0, visited(order))]


def some_events(k):
    """k random states of the path: SEPO here (k = 1); AGRPO (2510.04019)."""
    def draws(order):
        L = len(order)
        chosen = list(itertools.combinations(visited(order), k))
        return [(1 / len(chosen), [(m, s, L / k) for m, s, _ in states]) for states in chosen]
    return draws


def merged(s):
    """The first of every s neighbouring states of the path; all that these reveal is scored there;
    the mean per state (TraceRL, 2509.06949, for models without blocks)."""
    def draws(order):
        groups = [(order[j:], order[j:j + s]) for j in range(0, len(order), s)]
        return [(1.0, [(m, g, 1 / len(g) / len(groups)) for m, g in groups])]
    return draws


def step_merge(s):
    """The path in N = L / s parts of nearly the same size; all that a part reveals is scored at its
    first state; the sum (d2-StepMerge, 2509.21474)."""
    def draws(order):
        L, N = len(order), -(-len(order) // s)
        cuts = [i * L // N for i in range(N + 1)]
        return [(1.0, [(order[a:], order[a:b], 1.0) for a, b in itertools.pairwise(cuts)])]
    return draws


def new_order(order):
    """Replay, here: all events of a new random path to the sample."""
    orders = list(itertools.permutations(range(len(order))))
    return [(1 / len(orders), visited(list(new))) for new in orders]


def left_to_right(order):
    """JustGRPO (2601.15165): every slot given those on its left. Its own rollouts go that way, too;
    here they are those of the sampler, as for all others."""
    return [(1.0, visited(list(range(len(order)))))]


def all_masked(order):
    """diffu-GRPO (d1, 2504.12216), wd1 (2507.08838): all slots, from the mask alone."""
    slots = list(range(len(order)))
    return [(1.0, [(slots, slots, 1 / len(slots))])]


def by_size(L):
    """Every non-empty set of slots, as random masks draw it: its size first -> chance, slots."""
    for m in range(1, L + 1):
        sets = list(itertools.combinations(range(L), m))
        yield from ((1 / L / len(sets), list(slots)) for slots in sets)


def by_level(L, low, high, cells=8):
    """Each slot masked with chance t, t uniform in (low, high), here in the middles of 8 cells
    -> chance, slots, t; also of the empty set."""
    for t in (low + (high - low) * (i + 0.5) / cells for i in range(cells)):
        for m in range(L + 1):
            for slots in itertools.combinations(range(L), m):
                yield t ** m * (1 - t) ** (L - m) / cells, list(slots), t


def others(slots, L):
    return [i for i in range(L) if i not in slots]


def noised(order):
    """The likelihood bound from one state: m of L slots masked, weight L/m; WDCE."""
    L = len(order)
    return [(p, [(slots, slots, L / len(slots))]) for p, slots in by_size(L)]


def random_mask(order):
    """UniGRPO (MMaDA, 2505.15809), as its authors' later code has it: the mean of a random mask
    that is not empty."""
    drawn = [(p, slots) for p, slots, _ in by_level(len(order), 0.1, 0.9) if slots]
    total = sum(p for p, _ in drawn)
    return [(p / total, [(slots, slots, 1 / len(slots))]) for p, slots in drawn]


def noised_below(order):
    """DiPOD (2606.13795): 0 to L - 1 masks, with the bound's weight."""
    L = len(order)
    return [(1 / L, [])] + [(1 / L / math.comb(L, m), [(list(slots), list(slots), L / m)])
                            for m in range(1, L) for slots in itertools.combinations(range(L), m)]


def coupled(order):
    """coupled-GRPO (DiffuCoder, 2506.20639): per slot the mean of its log-probability from the mask
    alone and from one of two complementary masks, this one times 1/t or 1/(1 - t)."""
    L = len(order)
    every = list(range(L))
    return [(p, [(every, every, 0.5 / L)] + [
        (part, part, 0.5 / level / L) for part, level in ((slots, t), (others(slots, L), 1 - t))
        if part]) for p, slots, t in by_level(L, 0.2, 0.8)]


def complements(order):
    """ESPO (2512.03759): the bound from a mask of 0 to L slots and from its complement."""
    L = len(order)
    result = []
    for m in range(L + 1):
        sets = list(itertools.combinations(range(L), m))
        for slots in map(list, sets):
            parts = [part for part in (slots, others(slots, L)) if part]
            result.append((1 / (L + 1) / len(sets),
                           [(part, part, (L + 1) / 2 / len(part)) for part in parts]))
    return result


def quadrature(order):
    """GDPO (2510.08554), as others' code has it: the bound at two Gauss points of t."""
    L = len(order)
    pairs = itertools.product(*(list(itertools.combinations(range(L), max(1, int(t * L))))
                                for t in (0.2113, 0.7887)))
    pairs = [tuple(map(list, pair)) for pair in pairs]
    return [(1 / len(pairs), [(a, a, 0.5 / 0.2113), (b, b, 0.5 / 0.7887)]) for a, b in pairs]


def two_masks(order):
    """SPG (2510.09541), in one block: two random masks; the mean per masked slot."""
    L = len(order)
    return [(p * q, [(a, a, 1 / len(a)), (b, b, 1 / len(b))])
            for (p, a), (q, b) in itertools.product(by_size(L), repeat=2)]


def mask_and_rest(order):
    """DMPO (2510.08233): a random mask and its complement, the mean per masked slot."""
    L = len(order)
    return [(p, [(part, part, 0.5 / len(part)) for part in (slots, others(slots, L)) if part])
            for p, slots, _ in by_level(L, 0.1, 1.0)]


def terminal(order):
    """The pseudo-likelihood: one slot masked again, given all others (t -> 0)."""
    return [(1 / len(order), [([i], [i], float(len(order)))]) for i in range(len(order))]

# -----------------------------------------------------------------------------
# losses: (process, model, view, A [P, G], chance [P, G]) -> scalar. P prompts with G rows each; a
# row is a sample with one draw, of probability `chance`, in training 1/(P G). view.weight is that
# of a state in its draw.


def token_loss(process, model, view, A, chance, clip=0.2):
    """A ratio and PPO's clip per token."""
    return sepo.sepo_loss(process, model, view, (A * chance).flatten(), clip)[0]


def step_loss(process, model, view, A, chance, clip=0.2):
    """A ratio and PPO's clip per state, with all tokens that are scored there."""
    return sepo.loop_loss(process, model, view, (A * chance).flatten(), clip)[0]


def bound(process, model, view, A):
    """Sum of the scored log-probabilities of each row, weighted -> [P, G], and the same before."""
    logp = torch.stack((process.logp(model, view), view.logp_old))                  # [2, n, k]
    states = (logp * view.scored).sum(dim=2) * view.weight                          # [2, n]
    return torch.zeros(2, A.numel()).index_add(1, view.row, states).view(2, *A.shape)


def sequence_loss(process, model, view, A, chance, clip=0.2):
    """One ratio per sample: exp of the difference of its bound, per slot."""
    new, old = bound(process, model, view, A)
    L = view.scored.any(dim=0).sum()
    return -(chance * sepo.surrogate((new - old) / L, A, clip)[0]).sum()


def mixed_loss(process, model, view, A, chance, clip=0.2):
    """A ratio per token, of a log-probability that is mixed from several states (coupled-GRPO)."""
    L = view.scored.any(dim=0).sum()
    logp = torch.stack((process.logp(model, view), view.logp_old))                  # [2, n, L]
    terms = logp * (view.scored * view.weight[:, None]) * L
    new, old = torch.zeros(2, A.numel(), view.y.size(1)).index_add(1, view.row, terms)
    A, chance = A.flatten()[:, None], chance.flatten()[:, None]
    return -(chance * sepo.surrogate(new - old, A, clip)[0]).sum() / L


def weighted_loss(weights_of):
    """No ratio: the bound, weighted by what weights_of makes of the advantages of each prompt, and
    of kl [P, G], log p(path)/p_ref(path)."""
    def loss(process, model, view, A, chance, kl=0.0):
        weights = weights_of(A, chance, kl)
        return -(chance * weights * bound(process, model, view, A)[0]).sum()
    return loss


def as_they_are(A, chance, kl):
    """JustGRPO: one update per rollout."""
    return A


def tilted(A, chance, kl):
    """softmax(A - kl) over the samples of each prompt, times their number. For A = R / beta these
    are the weights of p* (WDCE)."""
    return (A - kl + chance.log()).softmax(dim=1) / chance * chance.sum(dim=1, keepdim=True)


def pull_and_push(A, chance, kl):
    """softmax(A - kl) pulls, softmax(-A - kl) pushes (DMPO; wd1, without the KL)."""
    return tilted(A, chance, kl) - tilted(-A, chance, kl)


def sandwich_loss(process, model, view, A, chance, beta=1.5):
    """SPG: the bound from below where A > 0; else its mean with one from above: per slot the log of
    the mean over the states of p^beta / t, divided by beta. Both are means over slots."""
    logp = process.logp(model, view)                                                # [n, L]
    below = bound(process, model, view, A)[0] / 2
    level = view.scored.sum(dim=1, keepdim=True) / view.scored.any(dim=0).sum()     # t of a state
    inside = torch.zeros(A.numel(), logp.size(1)).index_add(
        0, view.row, view.scored * (beta * logp).exp() / level / 2)
    seen = inside > 0
    above = torch.where(seen, inside.where(seen, 1).log() / beta, 0).sum(dim=1) / seen.sum(dim=1)
    mixture = (above.view_as(A) + below) / 2
    return -(chance * A * torch.where(A > 0, below, mixture)).sum()


def consistent_loss(process, model, view, A, chance):
    """DiPOD (2606.13795): one ratio per sample, and the bound of the model's own samples beside it,
    which holds it tight."""
    new, old = bound(process, model, view, A)
    objective = sepo.surrogate(new - old, A, 0.2)[0]
    return -(chance * (objective + 0.05 * new)).sum()


@dataclass
class Estimator:
    draws: Callable
    loss: Callable
    passes: Callable                    # L -> states per sample and update
    on_path: bool = False               # does it look at the path, or at the sample alone?
    is_tilted: bool = False             # in the curves A is R / beta, beside the KL


# -----------------------------------------------------------------------------
# the expected gradient, by enumeration


def view_of(x, states, V):
    """States of one draw, for samples x [S, L] -> View of S * len(states) states."""
    S, L = x.shape
    parts = []
    for masked, scored, weight in states:
        noised = x.clone()
        noised[:, masked] = V
        is_scored = torch.zeros(L, dtype=torch.bool)
        is_scored[scored] = True
        t = torch.full((S,), len(masked) / (L + 1))
        weights = torch.full((S,), weight)
        parts.append((torch.arange(S), noised, t, x, is_scored.expand(S, L), weights))
    row, noised, t, y, is_scored, weight = map(torch.cat, zip(*parts))
    return View(row, None, noised, t, None, None, y, is_scored, None, weight,
                torch.full_like(weight, 1 / len(weight)))


def order_logp(process, model, x, order):
    """log p(x | the order of the reveals) -> [S]."""
    view = view_of(x, visited(order), process.vocab_size)
    with torch.no_grad():
        logp = (process.logp(model, view) * view.scored).sum(dim=1)
    return torch.zeros(len(x)).index_add(0, view.row, logp)


def every_row(process, policy, L, estimator):
    """All samples of `policy`, with all draws -> View, sample [R], chance [R]."""
    V = process.vocab_size
    x = sequences(V, L)
    views, chances = [], []
    for order in itertools.permutations(range(L)):
        if estimator.on_path:
            p = order_logp(process, policy, x, list(order)).exp() / math.factorial(L)
        else:
            p = process.exact_law(policy, L).detach().float()
        for chance, states in estimator.draws(list(order)):
            if states:
                view = view_of(x, states, V)
                view.row += len(x) * len(chances)
                views.append(view)
                chances.append(chance * p)
        if not estimator.on_path:
            break
    fields = {name: torch.cat([getattr(view, name) for view in views])
              for name in ("row", "x", "t", "y", "scored", "weight", "share")}
    view = View(event=None, s=None, slots=None, logp_old=None, **fields)
    with torch.no_grad():
        view.logp_old = process.logp(policy, view)
    return view, torch.arange(len(x)).repeat(len(chances)), torch.cat(chances)


class Entries:
    """log p(token | state) for every state, slot and token as one vector, and its Jacobian: every
    gradient is a combination of its rows."""

    def __init__(self, process, model, L):
        self.V, self.L = process.vocab_size, L
        states = sequences(self.V + 1, L)
        t = (states == self.V).sum(dim=1) / (L + 1)
        logp = model(states, t).log_softmax(dim=-1).flatten()                       # [E]
        rows = [torch.cat([g.flatten() for g in torch.autograd.grad(
            value, list(model.parameters()), retain_graph=True, materialize_grads=True)])
            for value in logp]
        self.jacobian = torch.stack(rows)                                           # [E, P]
        self.logp = logp.detach()

    def index(self, view):
        """Where the log-probabilities of a View stand -> [n, L]."""
        slots = torch.arange(self.L)
        return (rank(view.x, self.V + 1)[:, None] * self.L + slots) * self.V + view.y

    def logp_of(self, leaf):
        """A process whose logp is the leaf [n, L]."""
        class Known:
            def logp(self, model, view):
                return leaf
        return Known()


def expected_gradient(process, entries, policy, L, reward, estimator):
    """-> (expected gradient [P]; its noise, in units of the norm of the mean: the standard
    deviation of the gradient of one sample with one draw)."""
    view, sample, chance = every_row(process, policy, L, estimator)
    R = reward[sample]
    A = R - (chance * R).sum() / chance.sum()           # empty draws have no row
    index = entries.index(view)
    leaf = entries.logp[index].requires_grad_()
    loss = estimator.loss(entries.logp_of(leaf), None, view, A[None], chance[None])
    slope = -torch.autograd.grad(loss, leaf)[0]                                     # [n, L]
    E = len(entries.logp)
    flat = torch.zeros(len(chance) * E).index_add(
        0, (view.row[:, None] * E + index).flatten(), slope.flatten())
    per_row = flat.view(len(chance), E)                                             # [R, E]
    mean = per_row.sum(dim=0) @ entries.jacobian
    each = per_row @ (entries.jacobian @ entries.jacobian.T)
    square = ((each * per_row).sum(dim=1) / chance).sum()       # sum of chance * |row / chance|^2
    return mean, ((square - mean.square().sum()).clamp(min=0).sqrt() / mean.norm()).item()


ESTIMATORS = {
    "sepo, 1 event": Estimator(some_events(1), token_loss, lambda L: 1, True),
    "sepo, all events; LOOP, DCoLT, CJ-GRPO": Estimator(all_events, step_loss, lambda L: L, True),
    "sepo, all events, no clip": Estimator(all_events, partial(token_loss, clip=math.inf),
                                           lambda L: L, True),
    "sepo, all events of a new path (replay)": Estimator(new_order, token_loss, lambda L: L),
    "AGRPO, 2 states": Estimator(some_events(2), token_loss, lambda L: 2, True),
    "TraceRL": Estimator(merged(1), token_loss, lambda L: L, True),
    "TraceRL, 2 merged": Estimator(merged(2), token_loss, lambda L: (L + 1) // 2, True),
    "d2, 2 merged": Estimator(step_merge(2), token_loss, lambda L: (L + 1) // 2, True),
    "JustGRPO": Estimator(left_to_right, weighted_loss(as_they_are), lambda L: L),
    "diffu-GRPO": Estimator(all_masked, token_loss, lambda L: 1),
    "coupled-GRPO": Estimator(coupled, mixed_loss, lambda L: 3),
    "UniGRPO": Estimator(random_mask, token_loss, lambda L: 1),
    "noised (ELBO)": Estimator(noised, token_loss, lambda L: 1),
    "DiPOD": Estimator(noised_below, consistent_loss, lambda L: 1),
    "terminal (pseudo-likelihood)": Estimator(terminal, token_loss, lambda L: 1),
    "ESPO": Estimator(complements, sequence_loss, lambda L: 2),
    "GDPO": Estimator(quadrature, sequence_loss, lambda L: 2),
    "SPG": Estimator(two_masks, sandwich_loss, lambda L: 2),
    "wd1": Estimator(all_masked, weighted_loss(pull_and_push), lambda L: 1),
    "DMPO": Estimator(mask_and_rest, weighted_loss(pull_and_push), lambda L: 2, is_tilted=True),
    "WDCE (TR2-D2, MDNS)": Estimator(noised, weighted_loss(tilted), lambda L: 1, is_tilted=True),
}


def pretrained(process, L, rollouts, reward):
    """A small network, trained on samples of a random distribution, and after some rollouts."""
    torch.manual_seed(0)
    model = network(process.vocab_size, L, n_embd=16, scale=0.5)
    drawn = random_law(process.vocab_size, L).multinomial(5000, replacement=True)
    data = sequences(process.vocab_size, L)[drawn]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)

    def step(loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for _ in range(800):
        step(process.loss(model, data[torch.randint(5000, (128,))]))
    for _ in range(rollouts):
        path = process.sample(model, 32, L)
        A = sepo.advantages(reward[rank(path.tokens, process.vocab_size)][None], "loo")[0]
        step(sepo.sepo_loss(process, model, sepo.draw_view(process, model, path), A)[0])
    return model


def moved(model, process, L, reward, target=0.02):
    """The model, moved along grad E[R] until KL(new || old) is the target, nats."""
    old = process.exact_law(model, L).detach()
    direction = gradient((process.exact_law(model, L) * reward).sum(), model).float()
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    low, high = 0.0, 10 / direction.norm()
    for _ in range(40):                                 # bisection
        size = (low + high) / 2
        torch.nn.utils.vector_to_parameters(start + size * direction, model.parameters())
        new = process.exact_law(model, L).detach()
        is_far = torch.xlogy(new, new / old).sum() > target
        low, high = (low, size) if is_far else (size, high)
    return model


def published(process, model, L, reward, draws):
    """The expected gradient of SEPO as its paper has it (2502.01384): over every sample, with exact
    p(y), or with the mean over some draws of its estimate."""
    x = sequences(process.vocab_size, L)
    law = process.exact_law(model, L).detach()
    A = (law * len(x) * (reward - (law * reward).sum())).float()
    path = MaskPath(x, torch.ones(x.shape), None, process.vocab_size)
    p_of, total = (sepo.importance_sampled if draws else exact_p(process)), 0
    for seed in range(max(1, draws)):
        torch.manual_seed(seed)
        old = sepo.draw_neighbours(process, model, path, p_of)
        torch.manual_seed(seed)                         # at theta_old: the same p(y) in both places
        loss = sepo.published_loss(process, model, old, A, math.inf, p_of)[0]
        total = total - gradient(loss, model) / max(1, draws)
    return total


def as_in_its_code(process, model, L, reward, draws=300, M=2, clip=0.2):
    """SEPO as its code has it (github.com/ozekri/SEPO, the DNA experiment): log s is the
    log-softmax at the finished sample x, for all letters of all slots; p(y), for y = x too, is the
    harmonic mean of the probabilities, given y, of the letter in slot m of sample m of M; the ratio
    to the old policy is that of two such estimates; the smaller of two sums over all samples
    counts, and that sum is minimized."""
    V = process.vocab_size
    x = sequences(V, L)
    S, zero = len(x), torch.zeros(len(x))
    law = process.exact_law(model, L).detach()
    A = (law * (reward - (law * reward).sum())).float()[:, None, None]
    y = x.repeat_interleave(L * V, dim=0)                                           # [S L V, L]
    slots = torch.arange(L).repeat_interleave(V).repeat(S)[:, None]
    y = y.scatter(1, slots, torch.arange(V).repeat(S * L)[:, None])
    log_y = model(y, torch.zeros(len(y))).log_softmax(dim=-1).detach()              # [S L V, L, V]

    def p_of_y():
        chosen = [pick(log_y[:, m], gumbel_argmax(log_y[:, m])).exp() for m in range(M)]
        return (M / sum(1 / p for p in chosen)).view(S, L, V)
    total = 0
    for seed in range(draws):
        torch.manual_seed(seed)
        log_s = model(x, zero).log_softmax(dim=-1)                                  # [S, L, V]
        old, new = p_of_y(), p_of_y()
        ratio = new / old
        sums = [(A * new * r * log_s).sum() for r in (ratio, ratio.clamp(1 - clip, 1 + clip))]
        total = total - gradient(torch.minimum(*sums), model) / draws
    return total


def table(L=3, V=3):
    """Per estimator the cosine of its expected gradient with grad E[R], and in brackets its noise:
    the standard deviation of the gradient of one sample, divided by the norm of the mean."""
    process = Absorbing(V)
    reward = torch.randn(V ** L, generator=torch.Generator().manual_seed(1))
    before = pretrained(process, L, 0, reward)
    cases = {"random table": (Table(V, L),) * 2,
             "consistent table": (posterior_table(random_law(V, L), V, L),) * 2,
             "pre-trained": (before,) * 2,
             "after 50 rollouts": (pretrained(process, L, 50, reward),) * 2,
             "off policy": (before, moved(deepcopy(before), process, L, reward))}
    cells, points = {name: [f"{e.passes(L)}"] for name, e in ESTIMATORS.items()}, {}
    neighbours = {"SEPO as published, exact p(y)": lambda *a: published(*a, 0),
                  "SEPO as published": lambda *a: published(*a, 300),
                  "SEPO as its code has it": as_in_its_code}
    cells |= {name: [f"{L * V * k}"] for name, k in zip(neighbours, (1, 3, 3))}
    for old, new in cases.values():
        truth = gradient((process.exact_law(new, L) * reward).sum(), new).float()
        entries = Entries(process, new, L)
        for name, estimator in ESTIMATORS.items():
            mean, noise = expected_gradient(process, entries, old, L, reward, estimator)
            cells[name].append(f"{cosine(mean, truth):.3f} ({noise:.1f})")
            if new is before:
                points[name] = estimator.passes(L) * noise ** 2, cosine(mean, truth)
                scale = mean.norm() / truth.norm()
                cells[name][0] += f" | {scale:.2f}"
        for name, of in neighbours.items():
            mean = of(process, new, L, reward).float() if new is old else None
            cells[name].append("" if mean is None else f"{cosine(mean, truth):.3f}")
            if new is before:
                cells[name][0] += f" | {mean.norm() / truth.norm():.2f}"
    print("| estimator | passes | scale | " + " | ".join(cases) + " |")
    print("|" + " --- |" * (3 + len(cases)))
    for name, row in cells.items():
        print(f"| {name} | " + " | ".join(row) + " |")
    figure(points)


KINDS = {"C2": "visited states", "C0": "random masks of the sample",
         "C3": "all slots masked, or left to right"}


def color_of(name):
    """Of the kind of states that an estimator looks at."""
    kind = ESTIMATORS[name]
    is_far = kind.draws in (all_masked, left_to_right)
    return "C2" if kind.on_path else "C3" if is_far else "C0"


def panels_beside_names(n, names):
    """A figure of n panels, with a numbered list of estimators beside them -> figure, axes."""
    rcParams.update(compare.STYLE)
    drawing = Figure(figsize=(11, 5))
    *axes, beside = drawing.subplots(1, n + 1, width_ratios=[1] * n + [0.45 if n == 1 else 0.9])
    beside.axis("off")
    lines = [(f"{i}  {name}", color_of(name)) for i, name in enumerate(names, 1)]
    for i, (line, color) in enumerate([*lines, ("", "C0"), *((KINDS[c], c) for c in KINDS)]):
        beside.text(0, 1 - i / (len(names) + 4), line, color=color, fontsize=9, va="top")
    return drawing, axes


def figure(points):
    """assets/estimators.png: bias against cost on the pre-trained network."""
    ranked = sorted(points, key=lambda name: -points[name][1])
    drawing, (axis,) = panels_beside_names(1, ranked)
    near = {}                                           # points that lie together share a label
    for i, name in enumerate(ranked, 1):
        cost, value = points[name]
        axis.scatter(cost, value, color=color_of(name), s=25)
        near.setdefault((round(cost / 10), round(value / 0.012)), []).append((i, cost, value))
    for together in near.values():
        numbers = ", ".join(str(i) for i, _, _ in together)
        axis.annotate(f"  {numbers}", together[0][1:], va="center", fontsize=9)
    axis.set_xlabel("cost: passes until the noise is as large as the mean gradient")
    axis.set_ylabel("cosine with the true gradient")
    drawing.savefig(ROOT / "assets" / "estimators.png")


# -----------------------------------------------------------------------------
# what each of them learns

# per task: rollouts, prompts, samples per prompt, rollouts between evaluations; and the same tries
# for each estimator: updates per rollout, learning rate
TASK = {"toy": (40, 1, 64, 8, [(4, 1e-3), (8, 2e-3)]),
        "arithmetic": (20, 64, 4, 4, [(4, 6e-4)])}
BETA = 0.1


@cache
def draws_of(draws, order):
    return draws(list(order))


def random_view(process, model, path, estimator):
    """One random draw for each sample of a path -> View with logp_old. The same slots are free in
    all of its samples."""
    time = path.time[:, ~path.given[0]]                                             # [B, n]
    parts = []
    for b, order in enumerate(time.argsort(dim=1, descending=True).tolist()):
        drawn = draws_of(estimator.draws, tuple(order if estimator.on_path else sorted(order)))
        _, states = random.choices(drawn, [chance for chance, _ in drawn])[0]
        for masked, scored, weight in states:
            marks = torch.zeros(2, len(order), dtype=torch.bool)
            marks[0, masked] = marks[1, scored] = True
            parts.append((b, marks, len(masked) / (len(order) + 1), weight))
    row, marks, t, weight = zip(*parts)
    row, free = torch.tensor(row), torch.stack(marks)                               # [S, 2, n]
    y = path.tokens[row]                                                            # [S, L]
    marks = torch.zeros(len(row), 2, y.size(1), dtype=torch.bool)
    marks[:, :, ~path.given[0]] = free
    view = View(row, None, y.masked_fill(marks[:, 0], process.mask), torch.tensor(t), None, None, y,
                marks[:, 1], None, torch.tensor(weight), torch.full((len(row),), 1 / len(row)))
    with torch.no_grad():
        view.logp_old = process.logp(model, view)
    return view


def learn(task, process, start, estimator, score, updates, lr, seed):
    """-> [(rewards, passes with gradient, score of the model)] of a run."""
    rollouts, P, G, every, _ = TASK[task.name]
    model, points = deepcopy(start).requires_grad_(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0)
    torch.manual_seed(seed)
    random.seed(seed)
    data = task.data(20_000, torch.Generator().manual_seed(seed))
    chance = torch.full((P, G), 1 / P / G)
    for i in range(rollouts):
        prompt = None
        if task.given:
            prompt = task.prompts(data[torch.randint(len(data), (P,))]).repeat_interleave(G, dim=0)
        path = process.sample(model, P * G, task.length, prompt=prompt)
        reward, kl = ask(task, path.tokens).view(P, G), process.path_kl(start, path).view(P, G)
        A, more = sepo.advantages(reward - BETA * kl, "loo"), {}
        if estimator.is_tilted:
            A, more = (reward / BETA).float(), dict(kl=kl)
        for view in [random_view(process, model, path, estimator) for _ in range(updates)]:
            estimator.loss(process, model, view, A, chance, **more).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = lr * (1 - i / rollouts)
            optimizer.step()
            optimizer.zero_grad()
        if i == 0 or (i + 1) % every == 0:
            rewards, n = (i + 1) * P * G, int((~path.given[0]).sum())
            points.append((rewards, rewards * updates * estimator.passes(n), score(model)))
    return points


def score_of(task, process, start, seed):
    """-> a function of a model: its share of the optimum, or its reward on prompts never seen."""
    if task.given is None:
        exact = sepo.ground_truth(process, start, task.reward, task.length, BETA)
        return lambda model: exact(model)["share_of_optimum"]
    prompts = task.prompts(task.held_out(256, seed))
    return lambda model: ask(task, process.sample(
        model, len(prompts), task.length, prompt=prompts).tokens).mean().item()


def curves(name, seeds, out):
    """Each estimator at all settings, from the pre-trained models of tests/compare.py: the scores
    at the end as a table, and the curves of the best setting as a figure."""
    torch.set_num_threads(1)
    task, process, settings = TASKS[name](), Absorbing(TASKS[name]().vocab_size), TASK[name][-1]
    found = {estimator: [[] for _ in settings] for estimator in ESTIMATORS}
    for seed in range(seeds):
        start, _ = sample.load_model(compare.pretrained(out, f"--task={name}", seed))
        score = score_of(task, process, start, seed)
        print(seed, f"at the start: {score(start):.3f}", file=sys.stderr, flush=True)
        for estimator, runs in found.items():
            for setting, run in zip(settings, runs):
                points = learn(task, process, start, ESTIMATORS[estimator], score, *setting, seed)
                run.append(points)
                print(seed, estimator, setting, f"{points[-1][2]:.3f}", file=sys.stderr, flush=True)
    heads = [f"{updates} updates, rate {lr:g}" for updates, lr in settings]
    print("| estimator | passes per sample | " + " | ".join(heads) + " |")
    print("| --- " * (2 + len(heads)) + "|")
    for estimator, runs in found.items():
        cells = [", ".join(f"{points[-1][2]:.2f}" for points in run) for run in runs]
        passes = runs[0][0][0][1] // runs[0][0][0][0] // settings[0][0]
        print(f"| {estimator} | {passes} | " + " | ".join(cells) + " |")
    (out / f"curves-{name}.json").write_text(json.dumps(found))
    draw_curves(name, found)


def draw_curves(name, found):
    """assets/curves-<task>.png: medians over the seeds of the setting that ends better, against
    rewards and against passes."""
    medians = {estimator: max((list(zip(*(map(statistics.median, zip(*at)) for at in zip(*run))))
                               for run in runs), key=lambda columns: columns[2][-1])
               for estimator, runs in found.items()}    # rewards, passes, scores
    ranked = sorted(medians, key=lambda estimator: -medians[estimator][2][-1])
    drawing, axes = panels_beside_names(2, ranked)
    for i, estimator in enumerate(ranked, 1):
        rewards, passes, scores = medians[estimator]
        for axis, x in zip(axes, (rewards, passes)):
            axis.plot(x, scores, color=color_of(estimator), lw=1, marker=".", ms=4)
            axis.annotate(f" {i}", (x[-1], scores[-1]), fontsize=8, annotation_clip=True)
            axis.set_ylim(-0.3 if name == "toy" else 0.4, 1.02)
    axes[0].set_xlabel("rewards asked")
    axes[1].set_xlabel("passes with gradient")
    axes[1].set_xscale("log")
    axes[1].xaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("share of the optimum" if name == "toy" else "true sums, prompts never seen")
    drawing.savefig(ROOT / "assets" / f"curves-{name}.png")


def cosine(a, b):
    return torch.cosine_similarity(a, b, dim=0).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["table", "curves"])
    parser.add_argument("--task", choices=list(TASK), default="toy", help="of the curves")
    parser.add_argument("--seeds", type=int, default=3, help="of the curves: 0, 1, ...")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "compare", help="folder of runs")
    args = parser.parse_args()
    if args.what == "table":
        table()
    else:
        curves(args.task, args.seeds, args.out)


if __name__ == "__main__":
    main()
