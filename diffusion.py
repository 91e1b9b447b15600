"""Continuous-time Markov chains on tokens: corruption, training loss, concrete score, sampling.

Shapes: B sequences of L slots (a slot is a position of the sequence), V clean tokens; token V is
the mask M. Time t runs from 0 (data) to 1 (noise) and is the noise level: a slot is still clean at
time t with probability alpha = 1 - t.
A model is any callable (x, t) -> logits [B, L, V] of log p_theta(x0_i = v | x_t).

Reading order: what both chains share; the absorbing chain (masks); the uniform chain (random
letters); what a sampled path remembers; exact distributions of small spaces.
"""
import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOG_ZERO = -1e30    # logits of -inf become finite, so that a weight of 0 times them is 0, not NaN


def logits_at(model, x, t, slots=None):
    """The model's logits at slots [n, k] alone -> [n, k, V], or at every slot (None) -> [n, L, V];
    a Denoiser skips the other slots. Another model may give -inf: here that becomes finite."""
    if hasattr(model, "logits_at"):
        return model.logits_at(x, t, slots)
    logits = model(x, t).float().clamp(min=LOG_ZERO)
    return logits if slots is None else logits.take_along_dim(slots[..., None], dim=1)


def device_of(model):
    """Where the model's parameters live; the CPU for a plain function."""
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else []
    return next((p.device for p in parameters), torch.device("cpu"))


def pick(log_p, y):
    """The entries of log_p [..., V] at tokens y [...] -> [...]."""
    return log_p.gather(-1, y[..., None]).squeeze(-1)


def gumbel_argmax(logits, generator=None):
    """Tokens from softmax(logits) [..., V] -> [...]: the argmax after adding Gumbel noise."""
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    return (logits + noise).argmax(dim=-1)


def stratified(n, device=None):
    """n uniforms on [0, 1), one in each of n equal cells, shuffled: less variance than rand(n).
    float64, since float32 would round some of them up to 1."""
    u = torch.rand(n, device=device, dtype=torch.double)
    return (torch.randperm(n, device=device) + u) / n

# -----------------------------------------------------------------------------
# what both chains share

class Chain:
    """A chain defines noise, losses, log_score, log_probs, denoise, path_to, jump_probs, kernel and
    exact_law; everything else is here."""

    DEFAULT_STEPS = None                # of the time grid; None: no grid

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size
        self.mask = vocab_size          # in a prompt, on both chains: a slot that is free

    def is_small(self, length, steps=None):
        """Can exact_law walk every partly masked sequence, in every step of the grid?"""
        states = (self.vocab_size + 1) ** length
        return states <= 100_000 and states * (steps or self.DEFAULT_STEPS or 1) <= 1_000_000

    def corrupt(self, x0, t):
        """x_t ~ q_t(. | x0): x0 [B, L], t [B] -> [B, L]."""
        is_clean = torch.rand(x0.shape, device=x0.device) < (1 - t)[:, None]
        return torch.where(is_clean, x0, self.noise(x0))

    def loss(self, model, x0, given=None):
        """Score entropy of the data x0 [B, L] -> scalar, in nats per sequence.

        An estimate of a bound on -log p_theta(x0); with slots `given` [B, L], on minus the
        log-probability of the other slots given these. (Uniform cuts its integral: see there.)"""
        if given is None:
            given = torch.zeros_like(x0, dtype=torch.bool)
        return self.losses(model, x0, given).mean()

    def sample(self, model, batch, length, steps=None, prompt=None, generator=None):
        """Draw sequences -> Path.

        steps: of the time grid; 0 or None: DEFAULT_STEPS. The absorbing chain needs no grid, and
        has no discretization error without. prompt: [L] or [batch, L], the mask where a slot is
        free; the other slots are given."""
        if prompt is None:
            prompt = torch.tensor(self.mask)
        prompt = prompt.to(device_of(model)).expand(batch, length)
        given = prompt != self.mask
        x = torch.where(given, prompt, self.noise(prompt, generator))
        return self.denoise(model, x, given, 1.0, steps or self.DEFAULT_STEPS, generator)

    def logp(self, model, view):
        """Log-probability under `model` of the tokens that a View scores -> [n, k], nats."""
        return pick(self.log_probs(model, view), view.y)

    def replay(self, model, path, chunk=None):
        """Log-probability under `model` of every transition of the path, shaped as path.logp, nats.

        All visited states are known, so they are scored together, `chunk` states (default: B, but
        at least 256) per forward pass. With gradients each pass is recomputed in the backward
        pass, so that the memory of activations does not grow with the number of events."""
        def score(view):
            return self.logp(model, view) * view.scored                                 # [n, k]

        total = path.zeros()
        for view in path.views(chunk or max(256, len(path.tokens))):
            logp = checkpoint(score, view, use_reentrant=False, preserve_rng_state=False)
            total = total.index_put(path.place(view), logp, accumulate=True)
        return total

    @torch.no_grad()
    def path_kl(self, reference, path, chunk=None):
        """log p(path)/p_ref(path) -> [B], nats: on average the KL of the paths that the policy
        drew to those of the reference."""
        log_ratio = path.logp - self.replay(reference, path, chunk)
        return log_ratio.flatten(1).sum(dim=1)

    @torch.no_grad()
    def correct(self, model, x, t, moves, given=None):
        """Moves of the chain with generator Q_t + reverse Q_t at a fixed time t: x -> x [B, L].

        The predictor-corrector of 2205.14987 and the gradient flow of SEPO (2502.01384). With a
        consistent model, one whose conditionals are those of one distribution, it leaves p_t
        invariant and brings any other distribution closer to it. Uniformized: a move picks one
        slot per row, which jumps with probability rate / (bound of the rate), so that the
        invariant distribution has no step error."""
        if given is None:
            given = torch.zeros_like(x, dtype=torch.bool)
        t = torch.full((len(x),), t, device=x.device)
        for _ in range(moves):
            u = torch.rand(x.shape, device=x.device)
            slot = (u * ~given).argmax(dim=1, keepdim=True)                             # [B, 1]
            p = self.jump_probs(model, x, t, slot)                                      # [B, W]
            stay = (1 - p.sum(dim=1, keepdim=True)).clamp(min=0)
            p = p.scatter(1, x.gather(1, slot), stay)
            new = gumbel_argmax(p.log())[:, None]
            x = torch.where(given, x, x.scatter(1, slot, new))  # a row may be given entirely
        return x

    def correct_path(self, model, path, t, moves, steps=None):
        """The samples of a path are noised again up to time t, corrected there and drawn anew
        -> the path from t on. On the absorbing chain its slots without a mask count as given."""
        steps = steps or self.DEFAULT_STEPS
        if steps:
            t = max(1, round(t * steps)) / steps
        noised = self.corrupt(path.tokens, torch.full_like(path.tokens[:, 0], t, dtype=torch.float))
        x = torch.where(path.given, path.tokens, noised)
        x = self.correct(model, x, t, moves, path.given)
        return self.denoise(model, x, path.given, t, steps)

# -----------------------------------------------------------------------------
# the absorbing chain

class Absorbing(Chain):
    """Masked diffusion: each slot turns into the mask, independently, at a random time (SEDD)."""

    # corruption and training loss

    def noise(self, x, generator=None):
        """What stands in the place of tokens x [B, L] at time 1: the mask."""
        return torch.full_like(x, self.mask)

    def mask_some(self, x0, given):
        """x_t ~ q(. | x0) at a random noise level -> x [B, L]; t [B]; masked [B, L]; n/m [B].

        m [B] is uniform on 1..n of the n free slots, and m of them, drawn at random, are masked."""
        time = self.reveal_times(given)
        n = (~given).sum(dim=1)                                                         # [B]
        m = 1 + (stratified(len(x0), x0.device) * n).long()
        t = time.sort(dim=1).values.gather(1, m[:, None] - 1)                           # [B, 1]
        masked = (time <= t) & ~given                   # the m slots that are revealed last
        x = torch.where(masked, self.mask, x0)
        return x, t[:, 0].clamp(max=1).float(), masked, n / m

    def losses(self, model, x0, given):
        """Denoising score entropy of x0 [B, L] at one random number of masks -> [B], nats.

        On the absorbing chain it is MDLM's weighted cross-entropy (2406.07524), here in any-order
        form (ARDM, 2110.02037): the mean over m of n/m times the masked slots' cross-entropy."""
        x, t, masked, weight = self.mask_some(x0, given)
        logp = pick(logits_at(model, x, t).log_softmax(dim=-1), x0)                     # [B, L]
        return -weight * (masked * logp).sum(dim=1)

    # concrete score

    def log_score(self, model, x, t):
        """log s(x, t)_{i,v} = log p_t(x with slot i set to v) - log p_t(x) -> [B, L, V].

        At a masked slot, s = p_theta(v | x) alpha / (1 - alpha) (RADD, 2406.03736). A revealed
        slot cannot change: 0 at its own token, -inf elsewhere."""
        masked = model(x, t).log_softmax(dim=-1) + ((1 - t) / t).log()[:, None, None]
        revealed = F.one_hot(x, self.vocab_size + 1)[..., :-1].log()
        return torch.where((x == self.mask)[..., None], masked, revealed)

    def log_probs(self, model, view):
        """log w = log_softmax_v(log s(x)_{i,v}) at the slots of a View -> [n, k, V].

        alpha / (1 - alpha) cancels: w is what the sampler draws the token from."""
        return logits_at(model, view.x, view.t, view.slots).log_softmax(dim=-1)

    # sampling

    def reveal_times(self, given, steps=None, start=1.0, generator=None):
        """The time at which each slot is revealed, from `start` down -> float64 [B, L]; inf where
        given. In float32 some rows would reveal two slots at once.

        It does not depend on any token, so all times are drawn before the first forward pass.
        On a grid of N steps, the step from t to t - 1/N reveals at its start t."""
        u = torch.rand(given.shape, generator=generator, device=given.device, dtype=torch.double)
        time = start * u
        if steps:
            time = (time * steps).ceil().clamp(min=1) / steps
        return time.masked_fill(given, math.inf)

    def denoise(self, model, x, given, t, steps, generator=None):
        """The reverse process from the state x [B, L] at time t -> MaskPath. Without a mask, a slot
        is as good as given."""
        is_known = given | (x != self.mask)
        return self.reveal(model, x, self.reveal_times(is_known, steps, t, generator), generator)

    @torch.no_grad()
    def reveal(self, model, x, time, generator=None):
        """Fill in the masked slots of x [B, L], each row in the order of its own times -> MaskPath.

        The samples have the distribution of ancestral sampling (MDLM, 2406.07524) on N steps:

            for k in range(N, 0, -1):
                p = model(x, k / N).softmax(dim=-1)                     # [B, L, V]
                y = torch.multinomial(p.flatten(0, 1), 1).view_as(x)    # a token for every slot
                now = torch.rand(x.shape) < 1 / k                       # is the slot revealed?
                x = torch.where((x == mask) & now, y, x)

        Most of these steps reveal nothing in most rows. Here each row goes from one of its own
        events to the next (2409.02908): pass j reveals the j-th group of slots in every row that
        still has one. Rows that are done leave the batch, and only the slots that are revealed
        reach the output head."""
        path = MaskPath(x.clone(), time, torch.zeros_like(time, dtype=torch.float), self.mask)
        n_rows = path.visits[1].bincount().tolist()   # with a first event, with a second, ...
        for view in path.views(n_rows):                 # each sees what was revealed before it
            logits = logits_at(model, view.x, view.t, view.slots)                       # [n, k, V]
            y = gumbel_argmax(logits, generator)                                        # [n, k]
            logp = pick(logits.log_softmax(dim=-1), y)
            place = path.place(view)
            path.tokens[place] = torch.where(view.scored, y, view.y)
            path.logp[place] = torch.where(view.scored, logp, view.logp_old)
        return path

    def path_to(self, tokens, given=None, steps=None):
        """A path of the forward process from tokens [B, L], read backwards -> MaskPath without
        logp. Its reveal times are new, and `given` [B, L] slots are never masked."""
        if given is None:
            given = torch.zeros_like(tokens, dtype=torch.bool)
        return MaskPath(tokens, self.reveal_times(given, steps), None, self.mask)

    def jump_probs(self, model, x, t, slot):
        """Probability of each token [B, V+1] for slot [B, 1] in a corrector move; 0 at its own.

        Rates: 1 to the mask, p(v | x) odds from it; divided by their sum 1 + odds. The larger of
        both would do as a bound, but where they are equal every slot would jump in every move."""
        odds = ((1 - t) / t)[:, None]                                                   # [B, 1]
        p = logits_at(model, x, t, slot).squeeze(1).softmax(dim=-1)                     # [B, V]
        is_masked = x.gather(1, slot) == self.mask
        rate = torch.cat((torch.where(is_masked, p * odds, 0), ~is_masked), dim=1)
        return rate / (1 + odds)

    # exact distribution

    def exact_law(self, model, length, steps=None):
        """Distribution of `sample` over all V**L sequences, in itertools.product order
        -> float64 [V**L].

        Differentiable. It walks all (V+1)**L partly masked states; with a grid, N times. Without
        one, the time of a state with m masks is the mean m / (L + 1), so that the result is exact
        for models that do not read the time."""
        states = every_sequence(self.vocab_size + 1, length, device_of(model))          # [S, L]
        mass = (states == self.mask).all(dim=1).double()
        if steps:
            mass = push_through_grid(self, model, mass, states, steps)
        else:
            mass = self.push_without_grid(model, mass, states)
        return mass[(states < self.mask).all(dim=1)]

    def push_without_grid(self, model, mass, states):
        """Reveal one slot at a time, every masked slot being equally likely to be the next."""
        V, L = self.vocab_size, states.size(1)
        power = (V + 1) ** torch.arange(L - 1, -1, -1, device=mass.device)  # of a state's number
        change = torch.arange(V, device=mass.device) - V                    # mask -> token v
        s, i = (states == V).nonzero(as_tuple=True)             # every masked slot of every state
        target = s[:, None] + change * power[i, None]                                   # [n, V]
        masked, row = s.unique(return_inverse=True)             # the states with a mask
        t = (states[masked] == V).sum(dim=1) / (L + 1)
        p = logits_at(model, states[masked], t)[row, i].double().softmax(dim=-1)        # [n, V]
        for m in range(L, 0, -1):                       # all mass is on states of m masks
            flow = mass[s, None] * p / m
            mass = torch.zeros_like(mass).index_add(0, target.flatten(), flow.flatten())
        return mass

    def kernel(self, model, x, t, s):
        """Distribution of each slot after a step from t [B] to s [B] -> [B, L, V+1]; float64."""
        chance = ((t - s) / t)[:, None]                 # that a masked slot is revealed
        move = (chance * (x == self.mask))[..., None]                                   # [B, L, 1]
        p = F.pad(logits_at(model, x, t.float()).double().softmax(dim=-1), (0, 1))
        return torch.lerp(F.one_hot(x, self.vocab_size + 1).double(), p, move)

# -----------------------------------------------------------------------------
# the uniform chain

class Uniform(Chain):
    """Each slot is redrawn from all V letters, independently, at a random time:
    q_t(v | x0) = alpha [v = x0] + (1 - alpha) / V.

    Any slot may change at any time, so sampling needs a grid. The model must read the time: a
    corrupted letter looks like a clean one."""

    DEFAULT_STEPS = 16
    CUT = 1e-6                          # the training loss integrates over noise levels above it

    # corruption and training loss

    def noise(self, x, generator=None):
        """What stands in the place of tokens x [B, L] at time 1: random letters."""
        return torch.randint(self.vocab_size, x.shape, generator=generator, device=x.device)

    def transition(self, x, keep):
        """Distribution of tokens x [B, k] kept with chance keep [B], else redrawn -> [B, k, V]."""
        keep = keep[:, None, None].clamp(max=1 - 2 ** -24)      # its log stays finite
        return keep * F.one_hot(x, self.vocab_size) + (1 - keep) / self.vocab_size

    def losses(self, model, x0, given):
        """Denoising score entropy (SEDD, 2310.16834) of x0 [B, L] at one random time -> [B], nats.

        The integral over t of sum_{i, v != x_i} (sigma'/V) (s_v - r_v log s_v + r_v (log r_v - 1)),
        with the model's score s and the ratio r of q_t(. | x0), where sigma' dt = dt / (1 - t). For
        a network that is not exact the integrand grows as 1 / t, so the integral diverges
        logarithmically: we cut it at t = CUT (and just below 1). Times are drawn as t = w^3 with w
        uniform above the cut, since small t has the largest terms."""
        low, high = self.CUT ** (1 / 3), 1 - 1e-4
        w = low + (high - low) * stratified(len(x0), x0.device).float()
        t = w ** 3
        x = torch.where(given, x0, self.corrupt(x0, t))
        log_q = self.transition(x0, 1 - t).log()
        log_r = log_q - log_q.gather(-1, x[..., None])          # 0 at v = x_i
        z = self.log_score(model, x, t) - log_r
        entropy = (log_r.exp() * (z.expm1() - z)).sum(dim=-1).masked_fill(given, 0)     # [B, L]
        dt = 3 * w ** 2 * (high - low)
        return dt / (1 - t) / self.vocab_size * entropy.sum(dim=1)

    # concrete score

    def log_ratio(self, logits, x, t, s):
        """log sum_{x0} p(x0 | x_t) q_s(v | x0) / q_t(x | x0) -> [n, k, V]; x [n, k], t, s [n]."""
        log_p = logits.log_softmax(dim=-1) - self.transition(x, 1 - t).log()
        s = s[:, None, None]
        redrawn = log_p.logsumexp(dim=-1, keepdim=True) + (s / self.vocab_size).log()
        return torch.logaddexp(redrawn, log_p + (1 - s).log())

    def log_score(self, model, x, t):
        """log s(x, t)_{i,v} = log p_t(x with slot i set to v) - log p_t(x) -> [B, L, V]; t > 0."""
        return self.log_ratio(logits_at(model, x, t), x, t, t)

    def log_kernel(self, logits, x, t, s):
        """log p(x_s = v | x_t = x) -> [B, L, V], by Bayes' rule (D3PM, 2107.03006)."""
        step = self.transition(x, (1 - t) / (1 - s))
        return self.log_ratio(logits, x, t, s) + step.log()

    def log_probs(self, model, view):
        """log w at every slot of a View, the sampler's kernel from t to s -> [n, L, V]."""
        return self.log_kernel(logits_at(model, view.x, view.t), view.x, view.t, view.s)

    # sampling

    @torch.no_grad()
    def denoise(self, model, x, given, t, steps, generator=None):
        """The reverse process from the state x [B, L] at time t, on a grid of N = steps per unit of
        time -> GridPath. Given slots stay."""
        time = torch.arange(round(t * steps), -1, -1, device=x.device) / steps
        states, logps = [x], []
        for t, s in pairwise(time):                     # a step of the grid, from t to s
            t, s = t.expand(len(x)), s.expand(len(x))
            log_w = self.log_kernel(logits_at(model, x, t), x, t, s)                    # [B, L, V]
            x = torch.where(given, x, gumbel_argmax(log_w, generator))
            states.append(x)
            logps.append(pick(log_w, x).masked_fill(given, 0))
        return GridPath(torch.stack(states), time, torch.stack(logps, dim=1), given)

    def path_to(self, tokens, given=None, steps=None):
        """A path of the forward process from tokens [B, L], read backwards -> GridPath without
        logp. `given` [B, L] slots never change."""
        if given is None:
            given = torch.zeros_like(tokens, dtype=torch.bool)
        steps = steps or self.DEFAULT_STEPS
        time = torch.arange(steps, -1, -1, device=tokens.device) / steps
        states = [tokens]
        for s, t in pairwise(time.flip(0)):             # from s up to t
            is_kept = torch.rand(tokens.shape, device=tokens.device) < (1 - t) / (1 - s)
            states.append(torch.where(is_kept | given, states[-1], self.noise(tokens)))
        return GridPath(torch.stack(states[::-1]), time, None, given)

    def jump_probs(self, model, x, t, slot):
        """Probability of each letter [B, V] for slot [B, 1] in a corrector move; 0 at its own.

        Rates: 1/V forward plus s_v/V back, divided by a bound of their sum."""
        token = x.gather(1, slot)
        score = self.log_ratio(logits_at(model, x, t, slot), token, t, t).squeeze(1).exp()
        bound = 1 + 1 / t[:, None]
        return ((1 + score) / self.vocab_size / bound).scatter(1, token, 0)

    # exact distribution

    def exact_law(self, model, length, steps=None):
        """Distribution of `sample` over all V**L sequences, in itertools.product order
        -> float64 [V**L]. Differentiable. It costs N passes over all sequences."""
        states = every_sequence(self.vocab_size, length, device_of(model))
        mass = torch.full_like(states[:, 0], 1 / len(states), dtype=torch.double)
        return push_through_grid(self, model, mass, states, steps or self.DEFAULT_STEPS)

    def kernel(self, model, x, t, s):
        """Distribution of each slot after a step from t [B] to s [B] -> [B, L, V]; float64."""
        return self.log_kernel(logits_at(model, x, t.float()).double(), x, t, s).exp()


CHAINS = {"absorb": Absorbing, "uniform": Uniform}

# -----------------------------------------------------------------------------
# what a sampled path remembers

@dataclass
class View:
    """n states of paths, and in each of them k slots whose tokens are scored."""
    row: Tensor                         # [n]     the path that the state lies on
    event: Tensor                       # [n]     which of its events comes next
    x: Tensor                           # [n, L]  the state
    t: Tensor                           # [n]     its time
    s: Tensor | None                    # [n]     on a grid: the time after the step
    slots: Tensor | None                # [n, k]  the scored slots; None: all, k = L
    y: Tensor                           # [n, k]  the token that each of them took
    scored: Tensor                      # [n, k]  False: padding, or a slot that is given
    logp_old: Tensor | None             # [n, k]  log-probability of y under the old policy, nats
    weight: Tensor | None = None        # [n]     sum(weight * f) estimates the mean over paths of
                                        #         the sum of f over events; it carries the 1/B
    share: Tensor | None = None         # [n]     1 / n, n that of the whole view

    def split(self, size):
        """Micro-batches of at most `size` states (0: no limit). Their losses add up."""
        n = max(1, len(self.row))                       # paths without an event: one empty part
        size = size or n
        return [View(*(x if x is None else x[i:i + size] for x in vars(self).values()))
                for i in range(0, n, size)]


class Path:
    """What the paths of both chains offer: B rows, and in row b n_events[b] events, each with a
    state before it. A chain's own kind of path adds tokens, given, n_events, time, logp, view,
    place, state, zeros and by_event."""

    @cached_property
    def visits(self):
        """The row and the event of every visited state, [n] each, in the order in which a sampler
        goes through them: all first events, then all second ones, ..."""
        events = torch.arange(int(self.n_events.max()), device=self.n_events.device)
        event, row = (events[:, None] < self.n_events).nonzero(as_tuple=True)
        return row, event

    def views(self, sizes):
        """Views of all visited states, `sizes` states each: a number, or a list of them. Each is
        made only when its turn comes."""
        for row, event in zip(*(part.split(sizes) for part in self.visits)):
            yield self.view(row, event)


@dataclass
class MaskPath(Path):
    """Paths of the absorbing chain. A slot changes once, so [B, L] tensors suffice."""
    tokens: Tensor                      # [B, L]  the final sample
    time: Tensor                        # [B, L]  when each slot was revealed; inf where given
    logp: Tensor | None                 # [B, L]  log-probability of each token when drawn, nats
    mask: int

    @property
    def given(self):
        """[B, L]: slots without a mask where the path starts, such as those of the prompt."""
        return self.time.isinf()

    @cached_property
    def event(self):
        """[B, L]: in which forward pass of its row a slot was revealed (0, 1, ...); -1 if given."""
        time, order = self.time.sort(dim=1, descending=True)
        before = F.pad(time[:, :-1], (1, 0), value=math.inf)
        rank = (time < before).cumsum(dim=1) - 1        # equal times share one; inf, as given: -1
        return rank.gather(1, order.argsort(dim=1))

    @cached_property
    def n_events(self):
        return self.event.amax(dim=1) + 1                                               # [B]

    @cached_property
    def width(self):
        """The largest number of slots that one event reveals, and at least 1."""
        return max(1, int(self.by_event((~self.given).float()).max()))

    def zeros(self):
        return torch.zeros(self.time.shape, device=self.time.device)

    def by_event(self, logp):
        """Sum [B, L] over the slots of each event -> [B, L]."""
        return torch.zeros_like(logp).scatter_add(1, self.event.clamp(min=0), logp)

    def state(self, j):
        """The state [B, L] before event j; after the last event, the sample."""
        return torch.where(self.event >= j, self.mask, self.tokens)

    def view(self, row, event):
        """The states of rows [n] before their events [n], and the slots revealed there."""
        index = self.event[row]                                                         # [n, L]
        revealed, slots = (index == event[:, None]).float().topk(self.width, dim=1)     # [n, k]
        x = torch.where(index >= event[:, None], self.mask, self.tokens[row])
        place = row[:, None], slots
        t = self.time[place][:, 0].clamp(max=1).float()
        logp = None if self.logp is None else self.logp[place]
        return View(row, event, x, t, None, slots, self.tokens[place], revealed > 0, logp)

    def place(self, view):
        """Where the tokens of a view stand in `tokens` and `logp`."""
        return view.row[:, None], view.slots


@dataclass
class GridPath(Path):
    """Paths on a grid of N steps, where any slot may move in any step: all states are kept."""
    states: Tensor                      # [N+1, B, L]  from noise to sample
    time: Tensor                        # [N+1]
    logp: Tensor | None                 # [B, N, L] log-probability of each slot's move or stay
    given: Tensor                       # [B, L]  the slots of the prompt

    @property
    def tokens(self):
        return self.states[-1]

    @property
    def n_events(self):
        return torch.full_like(self.tokens[:, 0], len(self.time) - 1)                   # [B]

    def zeros(self):
        B, L = self.given.shape
        return torch.zeros(B, len(self.time) - 1, L, device=self.time.device)

    def by_event(self, logp):
        return logp.sum(dim=2)                                                          # [B, N]

    def state(self, j):
        return self.states[j]

    def view(self, row, event):
        """The states of rows [n] before steps [n]; every slot is scored."""
        x, y = self.states[event, row], self.states[event + 1, row]
        t, s = self.time[event], self.time[event + 1]
        logp = None if self.logp is None else self.logp[row, event]
        return View(row, event, x, t, s, None, y, ~self.given[row], logp)

    def place(self, view):
        return view.row, view.event

# -----------------------------------------------------------------------------
# exact distributions of small spaces

def every_sequence(W, length, device):
    """All W**L sequences, in itertools.product order -> [W**L, L]."""
    letters = torch.arange(W, device=device)
    return torch.cartesian_prod(*[letters] * length).view(-1, length)


def push_through_grid(process, model, mass, states, steps):
    """Push the mass [W**L] of all states through the N steps of the grid -> [W**L]."""
    for k in range(steps, 0, -1):
        t, s = torch.full_like(mass, k / steps), torch.full_like(mass, (k - 1) / steps)
        kernel = process.kernel(model, states, t, s)                                # [W**L, L, W]
        # slots move independently, so the move of a whole sequence is the product of the moves of
        # its halves, and the sum over all starting states is one matrix product
        left, right = map(joint_distribution, kernel.tensor_split(2, dim=1))
        mass = torch.einsum("s,sa,sb->ab", mass, left, right).flatten()
    return mass


def joint_distribution(slots):
    """Distributions of l independent slots [S, l, W] -> their joint distribution [S, W**l]."""
    joint = slots.new_ones(len(slots), 1)
    for p in slots.unbind(dim=1):
        joint = torch.einsum("sa,sb->sab", joint, p).flatten(1)
    return joint
