"""The published policy gradients for masked diffusion in one frame, and their exact expectations.

A policy gradient for masked diffusion looks at a finished sample x, or at the path that led to it.
It masks some of its positions, scores the tokens of some masked ones there, and multiplies what it
finds by an advantage. So an estimator is two things:

    draws   (order [L]) -> everything that it may look at: (chance, states of one sample), where a
            state is (masked positions, scored positions, weight); order: how the sampler revealed
            the positions
    loss    (logp, path, advantages, chance) -> scalar, one of those below

On a space of 27 sequences all orders, samples and draws can be enumerated, and so the expected
gradient of every estimator is known without noise, and its noise is, too. curves.py prints and
draws what is found here.
"""
import itertools
import math
import random
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Callable

import torch

import sepo
from diffusion import Path, gumbel_argmax, pick
from exact import gradient, network, random_law, rank, sequences

# -----------------------------------------------------------------------------
# what an estimator looks at. A draw is a list of states (masked, scored, weight) of one sample.


def visited(order):
    """The states of a path: before each transition, what is still masked; what it reveals is
    scored."""
    return [(order[j:], order[j:j + 1], 1.0) for j in range(len(order))]


def all_transitions(order):
    """LOOP (2503.00897); CJ-GRPO (2509.23924) and DCoLT (2505.10446), but for an order that DCoLT
    learns and a factor of 1/L."""
    return [(1.0, visited(order))]


def some_transitions(k):
    """k random ones of the path: SEPO here (k = 1); AGRPO (2510.04019)."""
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
    """Replay, here: all transitions of a new random path to the sample."""
    orders = list(itertools.permutations(range(len(order))))
    return [(1 / len(orders), visited(list(new))) for new in orders]


def left_to_right(order):
    """JustGRPO (2601.15165): every position given those on its left. Its own rollouts go that way,
    too; here they are those of the sampler, as for all others."""
    return [(1.0, visited(list(range(len(order)))))]


def all_masked(order):
    """diffu-GRPO (d1, 2504.12216), wd1 (2507.08838): all positions, from the mask alone."""
    every = list(range(len(order)))
    return [(1.0, [(every, every, 1 / len(every))])]


def by_size(L, low, high):
    """Every set of low to high positions, all sizes being equally likely -> chance, positions."""
    for m in range(low, high + 1):
        sets = list(itertools.combinations(range(L), m))
        yield from ((1 / (high + 1 - low) / len(sets), list(part)) for part in sets)


def by_level(L, low, high, cells=8):
    """Each position masked with chance t, t uniform in (low, high), here in the middles of 8 cells
    -> chance, positions, t; also of the empty set."""
    for t in (low + (high - low) * (i + 0.5) / cells for i in range(cells)):
        for m in range(L + 1):
            for part in itertools.combinations(range(L), m):
                yield t ** m * (1 - t) ** (L - m) / cells, list(part), t


def others(part, L):
    return [i for i in range(L) if i not in part]


def noised(order):
    """The likelihood bound from one state: m of L positions masked, weight L/m; WDCE."""
    L = len(order)
    return [(p, [(part, part, L / len(part))]) for p, part in by_size(L, 1, L)]


def random_mask(order):
    """UniGRPO (MMaDA, 2505.15809), as its authors' later code has it: the mean of a random mask
    that is not empty."""
    drawn = [(p, part) for p, part, _ in by_level(len(order), 0.1, 0.9) if part]
    total = sum(p for p, _ in drawn)
    return [(p / total, [(part, part, 1 / len(part))]) for p, part in drawn]


def noised_below(order):
    """DiPOD (2606.13795): 0 to L - 1 masks, with the bound's weight."""
    L = len(order)
    return [(p, [(part, part, L / len(part))] if part else [])
            for p, part in by_size(L, 0, L - 1)]


def coupled(order):
    """coupled-GRPO (DiffuCoder, 2506.20639): per position the mean of its log-probability from the
    mask alone and from one of two complementary masks, this one times 1/t or 1/(1 - t)."""
    L = len(order)
    every = list(range(L))
    return [(p, [(every, every, 0.5 / L)] + [
        (half, half, 0.5 / level / L) for half, level in ((part, t), (others(part, L), 1 - t))
        if half]) for p, part, t in by_level(L, 0.2, 0.8)]


def complements(order):
    """ESPO (2512.03759): the bound from a mask of 0 to L positions and from its complement."""
    L = len(order)
    return [(p, [(half, half, (L + 1) / 2 / len(half)) for half in (part, others(part, L)) if half])
            for p, part in by_size(L, 0, L)]


def quadrature(order):
    """GDPO (2510.08554), as others' code has it: the bound at two Gauss points of t."""
    L = len(order)
    pairs = itertools.product(*(list(itertools.combinations(range(L), max(1, int(t * L))))
                                for t in (0.2113, 0.7887)))
    pairs = [tuple(map(list, pair)) for pair in pairs]
    return [(1 / len(pairs), [(a, a, 0.5 / 0.2113), (b, b, 0.5 / 0.7887)]) for a, b in pairs]


def two_masks(order):
    """SPG (2510.09541), in one block: two random masks; the mean per masked position."""
    L = len(order)
    return [(p * q, [(a, a, 1 / len(a)), (b, b, 1 / len(b))])
            for (p, a), (q, b) in itertools.product(by_size(L, 1, L), repeat=2)]


def mask_and_rest(order):
    """DMPO (2510.08233): a random mask and its complement, the mean per masked position."""
    L = len(order)
    return [(p, [(half, half, 0.5 / len(half)) for half in (part, others(part, L)) if half])
            for p, part, _ in by_level(L, 0.1, 1.0)]


def terminal(order):
    """The pseudo-likelihood: one position masked again, given all others (t -> 0)."""
    return [(1 / len(order), [([i], [i], float(len(order)))]) for i in range(len(order))]

# -----------------------------------------------------------------------------
# losses: (logp [n, L], path, A [P, G], chance [P, G]) -> scalar. logp is that of the current model,
# path.logp that of the old one. P prompts with G rows each; a row is a sample with one draw, of
# probability `chance`, in training 1/(P G). path.weight is that of a state in its draw.


def token_loss(logp, path, A, chance, clip=0.2):
    """A ratio and PPO's clip per token."""
    return sepo.sepo_loss(logp, path, (A * chance).flatten(), clip)[0]


def step_loss(logp, path, A, chance, clip=0.2):
    """A ratio and PPO's clip per state, with all tokens that are scored there."""
    return sepo.loop_loss(logp, path, (A * chance).flatten(), clip)[0]


def bound(logp, path, A):
    """Weighted sum of the scored log-probabilities of each row -> [P, G]."""
    return path.per_sequence(logp * path.weight[:, None]).view_as(A)


def per_position(values, path):
    """The scored values [n, L] of each row, summed over its states -> [P G, L]."""
    zero = values.new_zeros(path.batch, values.size(1))
    return zero.index_add(0, path.row, values * path.scored)


def n_free(path):
    """The number of positions that are not given, which are those that some row scores."""
    return path.scored.any(dim=0).sum()


def sequence_loss(logp, path, A, chance, clip=0.2):
    """One ratio per sample: exp of the difference of its bound, per position."""
    log_ratio = bound(logp - path.logp, path, A) / n_free(path)
    return -(chance * sepo.surrogate(log_ratio, A, clip)[0]).sum()


def mixed_loss(logp, path, A, chance, clip=0.2):
    """A ratio per token, of a log-probability that is mixed from several states (coupled-GRPO)."""
    log_ratio = n_free(path) * per_position((logp - path.logp) * path.weight[:, None], path)
    A, chance = A.flatten()[:, None], chance.flatten()[:, None]
    return -(chance * sepo.surrogate(log_ratio, A, clip)[0]).sum() / n_free(path)


def weighted_loss(weights_of):
    """No ratio: the bound, weighted by what weights_of makes of the advantages of each prompt, and
    of kl [P, G], log p(path)/p_ref(path)."""
    def loss(logp, path, A, chance, kl=0.0):
        return -(chance * weights_of(A, chance, kl) * bound(logp, path, A)).sum()
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


def sandwich_loss(logp, path, A, chance, beta=1.5):
    """SPG: the bound from below where A > 0; else its mean with one from above: per position the
    log of the mean over the states of p^beta / t, divided by beta. Both are means over positions.
    """
    below = bound(logp, path, A) / 2
    level = path.scored.sum(dim=1, keepdim=True) / n_free(path)                     # t of a state
    inside = per_position((beta * logp).exp() / level / 2, path)
    seen = inside > 0
    above = torch.where(seen, inside.where(seen, 1).log() / beta, 0).sum(dim=1) / seen.sum(dim=1)
    mixture = (above.view_as(A) + below) / 2
    return -(chance * A * torch.where(A > 0, below, mixture)).sum()


def consistent_loss(logp, path, A, chance):
    """DiPOD (2606.13795): one ratio per sample, and the bound of the model's own samples beside it,
    which holds it tight."""
    objective = sepo.surrogate(bound(logp - path.logp, path, A), A, 0.2)[0]
    return -(chance * (objective + 0.05 * bound(logp, path, A))).sum()


@dataclass
class Estimator:
    draws: Callable
    loss: Callable
    passes: Callable                    # L -> states per sample and update
    on_path: bool = False               # does it look at the path, or at the sample alone?
    is_tilted: bool = False             # in the curves A is R / beta, beside the KL


# -----------------------------------------------------------------------------
# the expected gradient, by enumeration


def path_of(process, policy, tokens, drawn, free):
    """What was drawn for each of the samples [B, L], lists of states -> Path, with the policy's
    logp. Positions of a state count the free ones alone, which are `free` in all samples."""
    row = torch.tensor([b for b, states in enumerate(drawn) for _ in states])           # [n]
    masked, scored, weight = zip(*itertools.chain(*drawn))

    def marks(parts):
        found = torch.zeros(len(row), tokens.size(1), dtype=torch.bool)
        found[:, free] = torch.tensor([[i in part for i in range(len(free))] for part in parts])
        return found
    y, is_masked = tokens[row], marks(masked)
    t = is_masked.sum(dim=1) / (len(free) + 1)
    positions = torch.arange(tokens.size(1)).expand_as(y)
    path = Path(row, y.masked_fill(is_masked, process.mask), t, t, positions, y, marks(scored),
                None, torch.tensor(weight), batch=len(tokens))
    with torch.no_grad():
        return replace(path, logp=process.logp(policy, path))


def every_draw(process, policy, L, estimator):
    """All samples of `policy`, with all that an estimator may draw for them -> Path, chance [R];
    the sample of row r is number r % V**L of `sequences`."""
    x, free = sequences(process.vocab_size, L), range(L)
    p = process.exact_law(policy, L).detach().float()
    orders = itertools.permutations(free) if estimator.on_path else [free]
    drawn, chances = [], []
    for order in map(list, orders):
        if estimator.on_path:
            path = path_of(process, policy, x, [visited(order)] * len(x), free)
            p = path.per_sequence(path.logp).exp() / math.factorial(L)  # of order and sample
        for chance, states in estimator.draws(order):
            drawn += [states] * len(x)
            chances.append(chance * p)
    tokens = x.repeat(len(chances), 1)
    return path_of(process, policy, tokens, drawn, free), torch.cat(chances)


class Entries:
    """log p(token | state) for every state, position and token as one vector, and its Jacobian:
    every gradient is a combination of its rows."""

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

    def index(self, path):
        """Where the log-probabilities of a Path stand -> [n, k]."""
        return (rank(path.x, self.V + 1)[:, None] * self.L + path.positions) * self.V + path.y


def expected_gradient(process, entries, policy, L, reward, estimator):
    """-> (expected gradient [P]; its noise, in units of the norm of the mean: the standard
    deviation of the gradient of one sample with one draw)."""
    path, chance = every_draw(process, policy, L, estimator)
    R = reward.repeat(len(chance) // len(reward))
    A = R - (chance * R).sum()
    index = entries.index(path)
    logp = entries.logp[index].requires_grad_()
    loss = estimator.loss(logp, path, A[None], chance[None])
    slope = -torch.autograd.grad(loss, logp)[0]                                     # [n, L]
    E = len(entries.logp)
    flat = torch.zeros(len(chance) * E).index_add(
        0, (path.row[:, None] * E + index).flatten(), slope.flatten())
    per_row = flat.view(len(chance), E)                                             # [R, E]
    mean = per_row.sum(dim=0) @ entries.jacobian
    each = per_row @ (entries.jacobian @ entries.jacobian.T)
    square = ((each * per_row).sum(dim=1) / chance).sum()       # sum of chance * |row / chance|^2
    return mean, ((square - mean.square().sum()).clamp(min=0).sqrt() / mean.norm()).item()


ESTIMATORS = {
    "sepo, 1 transition": Estimator(some_transitions(1), token_loss, lambda L: 1, True),
    "sepo, all transitions; LOOP, DCoLT, CJ-GRPO": Estimator(all_transitions, step_loss,
                                                             lambda L: L, True),
    "sepo, all transitions, no clip": Estimator(all_transitions, partial(token_loss, clip=math.inf),
                                           lambda L: L, True),
    "sepo, all transitions of a new path (replay)": Estimator(new_order, token_loss, lambda L: L),
    "AGRPO, 2 states": Estimator(some_transitions(2), token_loss, lambda L: 2, True),
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
        tokens, path = process.sample(model, 32, L)
        A = sepo.advantages(reward[rank(tokens, process.vocab_size)][None], "loo")[0]
        path = path.subset(1)
        step(sepo.sepo_loss(process.logp(model, path), path, A)[0])
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


def neighbours(x, V):
    """All that differ from x [S, L] in one position, and x itself -> [S L V, L]."""
    is_changed = torch.eye(x.size(1), dtype=torch.bool)[:, None]                    # [L, 1, L]
    y = torch.where(is_changed, torch.arange(V)[:, None], x[:, None, None])         # [S, L, V, L]
    return y.flatten(0, 2)


def published(process, model, L, reward, draws):
    """The expected gradient of SEPO as its paper has it (2502.01384): over every sample, with exact
    p(y), or with the mean over some draws of its estimate."""
    V = process.vocab_size
    x = sequences(V, L)
    law = process.exact_law(model, L).detach()
    A = (law * len(x) * (reward - (law * reward).sum())).float()
    exact = law[rank(neighbours(x, V), V)].view(-1, L * V).log().float()
    none_given, total = torch.zeros_like(x, dtype=torch.bool), 0
    for seed in range(max(1, draws)):
        torch.manual_seed(seed)
        log_s, log_p, is_other = sepo.neighbours(process, model, x, none_given)
        log_p = log_p if draws else exact
        new, old = (log_s, log_p, is_other), (log_s.detach(), log_p, is_other)  # at theta_old
        loss, _ = sepo.published_loss(new, old, A, math.inf)
        total = total - gradient(loss, model) / max(1, draws)
    return total


def as_in_its_code(process, model, L, reward, draws=300, M=2, clip=0.2):
    """SEPO as its code has it (github.com/ozekri/SEPO, the DNA experiment): log s is the
    log-softmax at the finished sample x, for all letters of all positions; p(y), for y = x too, is
    the harmonic mean of the probabilities, given y, of the letter at position m of sample m of M;
    the ratio to the old policy is that of two such estimates; the smaller of two sums over all
    samples counts, and that sum is minimized."""
    V = process.vocab_size
    x = sequences(V, L)
    law = process.exact_law(model, L).detach()
    A = (law * (reward - (law * reward).sum())).float()[:, None, None]
    y = neighbours(x, V)
    log_y = model(y, torch.zeros(len(y))).log_softmax(dim=-1).detach()              # [S L V, L, V]

    def p_of_y():
        chosen = [pick(log_y[:, m], gumbel_argmax(log_y[:, m])).exp() for m in range(M)]
        return (M / sum(1 / p for p in chosen)).view(-1, L, V)
    total = 0
    for seed in range(draws):
        torch.manual_seed(seed)
        log_s = model(x, torch.zeros(len(x))).log_softmax(dim=-1)                   # [S, L, V]
        old, new = p_of_y(), p_of_y()
        ratio = new / old
        sums = [(A * new * r * log_s).sum() for r in (ratio, ratio.clamp(1 - clip, 1 + clip))]
        total = total - gradient(torch.minimum(*sums), model) / draws
    return total


@cache
def draws_of(draws, order):
    return draws(list(order))


def random_path(process, model, tokens, path, estimator):
    """One random draw for each of the samples [B, L] of a path without a time grid -> Path, with
    the model's logp. The same positions are free in all samples."""
    order = path.positions[path.row.argsort(stable=True)].view(len(tokens), -1)         # [B, n]
    drawn = []
    for places in order.argsort(dim=1).argsort(dim=1).tolist():     # among the free ones
        places = tuple(places if estimator.on_path else sorted(places))
        chances, draws = zip(*draws_of(estimator.draws, places))
        drawn += random.choices(draws, chances)
    return path_of(process, model, tokens, drawn, free=order[0].sort().values)
