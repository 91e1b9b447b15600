"""Continuous-time Markov chains on tokens: noise, training loss, score, sampling, exact law.

Shapes: B sequences of L slots, V clean tokens; token V is the mask M. Time t runs from 0 (data)
to 1 (noise), and alpha(t) is the probability that a slot is still clean at time t.
A model is any callable (x, t) -> logits [B, L, V] of log p_theta(x0_i = v | x_t).

Reading order: noise schedules; what a sampled path remembers; what both chains share; the
absorbing chain (masks); the uniform chain (random letters); exact laws of small spaces.
"""
import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOG_ZERO = -1e30    # logits of -inf become finite, so that a weight of 0 times them is 0, not NaN

# -----------------------------------------------------------------------------
# noise schedules

SIGMA_MIN, SIGMA_MAX = 1e-4, 20.0       # of the geometric schedule (SEDD, 2310.16834)
LOWEST, HIGHEST = math.exp(-SIGMA_MAX), math.exp(-SIGMA_MIN)


def geometric(t):
    """alpha = exp(-sigma), sigma = SIGMA_MIN^(1-t) SIGMA_MAX^t, rescaled to run from 1 to 0."""
    sigma = SIGMA_MIN * (SIGMA_MAX / SIGMA_MIN) ** t
    return (((-sigma).exp() - LOWEST) / (HIGHEST - LOWEST)).clamp(0, 1)


def geometric_inverse(alpha):
    sigma = -(alpha * (HIGHEST - LOWEST) + LOWEST).log()
    t = (sigma / SIGMA_MIN).log() / math.log(SIGMA_MAX / SIGMA_MIN)
    return t.clamp(0, 1)


def cosine(t):
    return (t * math.pi / 2).cos().clamp(min=0)


SCHEDULES = {                           # alpha(t) and its inverse
    "linear": (lambda t: 1 - t, lambda alpha: 1 - alpha),
    "cosine": (cosine, lambda alpha: alpha.acos() * 2 / math.pi),
    "geometric": (geometric, geometric_inverse),
}

# -----------------------------------------------------------------------------
# what a sampled path remembers

@dataclass
class View:
    """n states of paths, or noised samples, and in each of them k slots whose tokens are scored."""
    row: Tensor                         # [n]     the path that the state lies on
    x: Tensor                           # [n, L]  the state
    t: Tensor                           # [n]     its time
    slots: Tensor | None                # [n, k]  the scored slots; None: all, k = L
    y: Tensor                           # [n, k]  the token that each of them took
    weight: Tensor                      # [n, k]  sum(weight * f) estimates sum f over the path
    logp_old: Tensor | None = None      # [n, k] log-probability of y when it was drawn
    s: Tensor | None = None             # [n]     on a grid: the time after the step
    place: tuple | None = None          # index of y in path.logp; a part of a view has none

    def split(self, size):
        """Micro-batches of at most `size` states (0: no limit)."""
        size = size or len(self.row)
        parts = vars(self).values()
        return [View(*(part[i:i + size] if isinstance(part, Tensor) else None for part in parts))
                for i in range(0, len(self.row), size)]


class Visits:
    """What both kinds of path share; n_events [B] is the number of events of each row."""

    @cached_property
    def visits(self):
        """The row and the event of every visited state, [n] each: all first events, then all second
        ones, ...; in each the rows with the most events come first."""
        order = self.n_events.argsort(descending=True)
        events = torch.arange(self.logp.size(1), device=order.device)
        event, place = (events[:, None] < self.n_events[order]).nonzero(as_tuple=True)
        return order[place], event

    def views(self, size=None):
        """Views of all visited states, `size` (default: B) states each, or as many as it lists."""
        size = size or len(self.n_events)
        for row, event in zip(*(part.split(size) for part in self.visits)):
            yield self.view(row, event)


@dataclass
class Path(Visits):
    """Paths of the absorbing chain. A slot moves only once, so three [B, L] tensors say it all."""
    tokens: Tensor                      # [B, L]  the final sample
    time: Tensor                        # [B, L]  when each slot was revealed; inf where given
    logp: Tensor                        # [B, L]  log-probability of each token when drawn, nats
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
        ones = (~self.given).float()
        return max(1, int(self.by_event(ones).max()))

    def by_event(self, logp):
        """Sum [B, L] over the slots of each event -> [B, L]."""
        return torch.zeros_like(logp).scatter_add(1, self.event.clamp(min=0), logp)

    def state(self, j):
        """The state [B, L] before event j; after the last event, the sample."""
        return torch.where(self.event >= j, self.mask, self.tokens)

    def view(self, row, event):
        """The states of rows [n] before their events [n], and the slots revealed there."""
        index, event = self.event[row], event[:, None]
        revealed, slots = (index == event).float().topk(self.width, dim=1)              # [n, k]
        x = torch.where(index >= event, self.mask, self.tokens[row])
        place = row[:, None], slots
        t = self.time[place][:, 0].clamp(max=1)
        return View(row, x, t, slots, self.tokens[place], revealed, self.logp[place], place=place)


@dataclass
class GridPath(Visits):
    """Paths on a grid of N steps, where any slot may move in any step: all states are kept."""
    states: Tensor                      # [N+1, B, L]  from noise to sample
    time: Tensor                        # [N+1]
    logp: Tensor                        # [B, N, L] log-probability of each slot's move or stay
    given: Tensor                       # [B, L]  the slots of the prompt

    @property
    def tokens(self):
        return self.states[-1]

    @cached_property
    def n_events(self):
        return torch.full_like(self.tokens[:, 0], self.logp.size(1))                    # [B]

    def by_event(self, logp):
        return logp.sum(dim=2)                                                          # [B, N]

    def state(self, j):
        return self.states[j]

    def view(self, row, event):
        """The states of rows [n] before steps [n]; every slot is scored."""
        x, y = self.states[event, row], self.states[event + 1, row]
        t, s = self.time[event], self.time[event + 1]
        free, place = (~self.given[row]).float(), (row, event)
        return View(row, x, t, None, y, free, self.logp[place], s, place)


def pick(log_w, y):
    """Of laws log_w [..., V], the log-probabilities of tokens y [...]."""
    return log_w.gather(-1, y[..., None]).squeeze(-1)


def stratified(n, device=None):
    """n uniforms on [0, 1), one in each of n equal cells, shuffled: less variance than rand(n)."""
    u = (torch.randperm(n, device=device) + torch.rand(n, device=device)) / n
    return u.clamp(max=1 - 2 ** -24)                    # float32 may round up to 1


def draw(logits, generator=None):
    """Tokens from softmax(logits) [..., V] -> [...]: the argmax after adding Gumbel noise."""
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    return (logits + noise).argmax(dim=-1)


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

# -----------------------------------------------------------------------------
# what both chains share

class Chain:
    """A chain defines noise, losses, log_score, log_law, slot_laws, denoise, jump_law, kernel,
    exact_law, and the views of finished samples."""

    DEFAULT_STEPS = None                # of the time grid; None: no grid

    def __init__(self, vocab_size, schedule="linear"):
        self.vocab_size = vocab_size
        self.mask = vocab_size          # in a prompt, on both chains: a slot that is free
        self.alpha, self.alpha_inverse = SCHEDULES[schedule]

    def loss(self, model, x0, given=None):
        """Score entropy of the data x0 [B, L] -> scalar, in nats per sequence.

        An estimate of a bound on -log p_theta(x0); with slots `given` [B, L], on minus the
        log-probability of the other slots given these. (Uniform cuts its integral: see there.)"""
        if given is None:
            given = torch.zeros_like(x0, dtype=torch.bool)
        return self.losses(model, x0, given).mean()

    @torch.no_grad()
    def bound(self, model, x0, draws=128):
        """The same for each sequence, averaged over draws -> mean [B], standard error [B], nats."""
        given = torch.zeros_like(x0, dtype=torch.bool)
        losses = torch.stack([self.losses(model, x0, given) for _ in range(draws)])
        return losses.mean(dim=0), losses.std(dim=0) / draws ** 0.5

    def corrupt(self, x0, t):
        """x_t ~ q_t(. | x0): x0 [B, L], t [B] -> [B, L]."""
        u = torch.rand(x0.shape, device=x0.device)
        return torch.where(u < self.alpha(t)[:, None], x0, self.noise(x0))

    def sample(self, model, batch, length, steps=None, prompt=None, generator=None):
        """Draw sequences -> Path or GridPath.

        steps: of the time grid. The absorbing chain needs none, and has no discretization error
        without. prompt: [L] or [batch, L], the mask where a slot is free."""
        if prompt is None:
            prompt = torch.tensor(self.mask)
        prompt = prompt.to(device_of(model)).expand(batch, length)
        given = prompt != self.mask
        x = torch.where(given, prompt, self.noise(prompt, generator))
        return self.denoise(model, x, given, 1.0, steps or self.DEFAULT_STEPS, generator)

    def path_view(self, path, events=1):
        """`events` random states per path that the sampler visited -> View, weighted so that the
        sum over its terms is an unbiased estimate of the sum over the whole path."""
        n = path.n_events                                                               # [B]
        u = stratified(len(n), n.device).double()    # float32 would round up to 1
        u = (torch.arange(events, device=n.device)[:, None] + u) / events       # [events, B]
        row = torch.arange(len(n), device=n.device).repeat(events)
        view = path.view(row, (u * n).long().flatten())
        view.weight = view.weight * (n[row] / events)[:, None]
        return view

    def replay(self, model, path, chunk=None):
        """Log-probability under `model` of every transition of the path, shaped as path.logp, nats.

        All visited states are known, so they are scored together, `chunk` states (default: B)
        per forward pass. With gradients each pass is recomputed in the backward pass, so that the
        memory of activations does not grow with the number of events."""
        def score(view):
            return pick(self.log_law(model, view), view.y) * view.weight                # [n, k]

        total = torch.zeros_like(path.logp)
        for view in path.views(chunk):
            logp = checkpoint(score, view, use_reentrant=False, preserve_rng_state=False)
            total = total.index_put(view.place, logp, accumulate=True)
        return total

    @torch.no_grad()
    def path_kl(self, reference, path, chunk=None):
        """log p(path)/p_ref(path) -> [B], nats: on average the KL of paths to a reference."""
        log_ratio = path.logp - self.replay(reference, path, chunk)
        return log_ratio.flatten(1).sum(dim=1)

    @torch.no_grad()
    def correct(self, model, x, t, steps, given=None):
        """`steps` moves of the chain with generator Q_t + reverse Q_t at a fixed time t -> x.

        The predictor-corrector of 2205.14987 and the gradient flow of SEPO (2502.01384). With a
        consistent model, one whose conditionals are those of one law, it leaves p_t invariant
        and brings any other law closer to it. Uniformized: a move picks one slot per row, which
        jumps with probability rate / (largest rate); the invariant law has no step error."""
        if given is None:
            given = torch.zeros_like(x, dtype=torch.bool)
        t = torch.full((len(x),), t, device=x.device)
        for _ in range(steps):
            u = torch.rand(x.shape, device=x.device)
            slot = (u * ~given).argmax(dim=1, keepdim=True)                             # [B, 1]
            law = self.jump_law(model, x, t, slot)                                      # [B, W]
            stay = (1 - law.sum(dim=1, keepdim=True)).clamp(min=0)
            law = law.scatter(1, x.gather(1, slot), stay)
            new = draw(law.log())[:, None]
            x = torch.where(given, x, x.scatter(1, slot, new))  # a row may be given entirely
        return x

    def corrected(self, model, path, moves, t, steps=None):
        """The samples of a path are noised again up to time t, corrected there by some moves of
        `correct`, and drawn anew -> path from t on, where slots without a mask count as given."""
        steps = steps or self.DEFAULT_STEPS
        if steps:
            t = max(1, round(t * steps)) / steps
        x, given = path.tokens, path.given
        noised = self.corrupt(x, torch.full((len(x),), t, device=x.device))
        x = self.correct(model, torch.where(given, x, noised), t, moves, given)
        return self.denoise(model, x, given, t, steps)

# -----------------------------------------------------------------------------
# the absorbing chain

class Absorbing(Chain):
    """Masked diffusion: each slot turns into the mask, independently, at a random time (SEDD)."""

    # forward process and training loss

    def noise(self, x, generator=None):
        """What stands in the place of tokens x [B, L] at time 1: the mask."""
        return self.mask

    def noised_view(self, x0, given, m=None):
        """x_t ~ q(. | x0) at a random noise level, all masked slots scored -> View.

        E[sum(weight * -log w)] is the likelihood bound: draw m [B] uniform on 1..n of the n free
        slots, mask m of them at random, and weigh by n / m (any-order form; ARDM, 2110.02037)."""
        time = self.reveal_times(given)
        n = (~given).sum(dim=1)
        if m is None:
            m = 1 + (stratified(len(x0), x0.device) * n).long()
        t = time.sort(dim=1).values.gather(1, m[:, None] - 1)                           # [B, 1]
        masked = (time <= t) & ~given                   # the m slots that are revealed last
        row = torch.arange(len(x0), device=x0.device)
        x = torch.where(masked, self.mask, x0)
        return View(row, x, t[:, 0].clamp(max=1), None, x0, (n / m)[:, None] * masked)

    def losses(self, model, x0, given):
        """Denoising score entropy of x0 [B, L] at one random number of masks -> [B], nats.

        On the absorbing chain it equals MDLM's weighted cross-entropy (2406.07524)."""
        view = self.noised_view(x0, given)
        logp = pick(self.log_law(model, view), view.y)                                  # [B, L]
        return -(view.weight * logp).sum(dim=1)

    # concrete score

    def log_score(self, model, x, t):
        """log s(x, t)_{i,v} = log p_t(x with slot i set to v) - log p_t(x) -> [B, L, V].

        At a masked slot, s = p_theta(v | x) alpha / (1 - alpha) (RADD, 2406.03736). A revealed
        slot cannot change: 0 at its own token, -inf elsewhere."""
        masked = model(x, t).log_softmax(dim=-1) + self.alpha(t).logit()[:, None, None]
        revealed = F.one_hot(x, self.vocab_size + 1)[..., :-1].log()
        return torch.where((x == self.mask)[..., None], masked, revealed)

    def log_law(self, model, view):
        """Slot laws log w = log_softmax_v(log s(x)_{i,.}) at the view's slots -> [n, k, V].

        alpha / (1 - alpha) cancels: w is what the sampler draws the token from."""
        return logits_at(model, view.x, view.t, view.slots).log_softmax(dim=-1)

    # sampling

    def reveal_times(self, given, steps=None, start=1.0, generator=None):
        """The time at which each slot is revealed, from `start` down -> [B, L]; inf where given.

        It does not depend on any token, so all times are drawn before the first forward pass.
        On a grid of N steps, the step from t to t - 1/N reveals at its start t."""
        alpha_start = self.alpha(torch.tensor(start)).item()
        u = torch.rand(given.shape, generator=generator, device=given.device)
        time = self.alpha_inverse(alpha_start + (1 - alpha_start) * u)
        if steps:
            time = (time * steps).ceil().clamp(1, steps) / steps
        return time.masked_fill(given, math.inf)

    def denoise(self, model, x, given, t, steps, generator=None):
        """The reverse process from the state x [B, L] at time t -> Path. Without a mask, a slot is
        as good as given."""
        time = self.reveal_times(x != self.mask, steps, t, generator)
        return self.reveal(model, x, time, generator)

    @torch.no_grad()
    def reveal(self, model, x, time, generator=None):
        """Fill in the masked slots of x [B, L], each row in the order of its own times -> Path.

        Ancestral sampling (MDLM, 2406.07524) runs the network N times, and most of its steps
        reveal nothing in most rows. Here each row goes from one of its own events to the next:
        pass j reveals the j-th group of slots in every row that still has one. The law is the
        same (2409.02908). Rows that are done leave the batch; revealed slots alone reach the
        output head; and a draw is one argmax over logits plus Gumbel noise."""
        path = Path(x.clone(), time, torch.zeros_like(time), self.mask)
        n_rows = path.visits[1].bincount().tolist()     # rows with a first event, a second, ...
        for view in path.views(n_rows):                 # each sees what was revealed before it
            logits = logits_at(model, view.x, view.t, view.slots)                       # [n, k, V]
            y = draw(logits, generator)                                                 # [n, k]
            logp = pick(logits.log_softmax(dim=-1), y)
            revealed = view.weight > 0                  # the rest is padding and stays as it was
            path.tokens[view.place] = torch.where(revealed, y, view.y)
            path.logp[view.place] = torch.where(revealed, logp, view.logp_old)
        return path

    # corrector and final samples

    def jump_law(self, model, x, t, slot):
        """Probability of each token [B, V+1] for slot [B, 1] in a corrector move; 0 at its own.

        Rates: 1 to the mask, p(v | x) alpha / (1 - alpha) from it; divided by the larger."""
        odds = (self.alpha(t) / (1 - self.alpha(t)))[:, None]                           # [B, 1]
        p = logits_at(model, x, t, slot).squeeze(1).softmax(dim=-1)                     # [B, V]
        is_masked = x.gather(1, slot) == self.mask
        rate = torch.cat((torch.where(is_masked, p * odds, 0), ~is_masked), dim=1)
        return rate / odds.clamp(min=1)

    def slot_laws(self, model, path):
        """log w of each slot of the final samples, masked again on its own -> [B, L, V]."""
        B, L = path.tokens.shape
        slots = torch.arange(L, device=path.tokens.device).repeat(B)[:, None]           # [B L, 1]
        x = path.tokens.repeat_interleave(L, dim=0).scatter(1, slots, self.mask)        # [B L, L]
        logits = logits_at(model, x, torch.zeros(B * L, device=x.device), slots)
        return logits.log_softmax(dim=-1).view(B, L, -1)

    def terminal_view(self, x0, given):
        """Final samples x0 [B, L] with one random free slot masked again -> View."""
        return self.noised_view(x0, given, m=torch.ones_like(x0[:, 0]))

    # exact law

    def exact_law(self, model, length, steps=None):
        """Law of `sample` over all V**L sequences, in itertools.product order -> [V**L].

        Differentiable. It walks all (V+1)**L partly masked states; with a grid, N times."""
        states = every_sequence(self.vocab_size + 1, length, device_of(model))          # [S, L]
        mass = (states == self.mask).all(dim=1).float()
        if steps:
            mass = law_on_grid(self, model, mass, states, steps)
        else:
            mass = self.law_without_grid(model, mass, states)
        return mass[(states < self.mask).all(dim=1)]

    def law_without_grid(self, model, mass, states):
        """Reveal one slot at a time, every masked slot being equally likely to be the next."""
        V, L = self.vocab_size, states.size(1)
        place = (V + 1) ** torch.arange(L - 1, -1, -1, device=mass.device)  # state -> its index
        change = torch.arange(V, device=mass.device) - V                    # mask -> token v
        s, i = (states == V).nonzero(as_tuple=True)             # every masked slot of every state
        target = s[:, None] + change * place[i, None]                                   # [n, V]
        p = logits_at(model, states, None).softmax(dim=-1)[s, i]                        # [n, V]
        for m in range(L, 0, -1):                       # all mass is on states of m masks
            flow = mass[s, None] * p / m
            mass = torch.zeros_like(mass).index_add(0, target.flatten(), flow.flatten())
        return mass

    def kernel(self, model, x, t, s):
        """Law of each slot after a step from t to s -> [B, L, V+1]."""
        a_t, a_s = self.alpha(t)[:, None], self.alpha(s)[:, None]
        chance = (a_s - a_t) / (1 - a_t).clamp(min=2 ** -24)    # that a masked slot is revealed
        move = (chance * (x == self.mask))[..., None]                                   # [B, L, 1]
        p = F.pad(logits_at(model, x, t).softmax(dim=-1), (0, 1))
        return torch.lerp(F.one_hot(x, self.vocab_size + 1).float(), p, move)

# -----------------------------------------------------------------------------
# the uniform chain

class Uniform(Chain):
    """Each slot is redrawn from all V letters, independently, at a random time:
    q_t(v | x0) = alpha [v = x0] + (1 - alpha) / V.

    Any slot may change at any time, so sampling needs a grid. The model must read the time: a
    corrupted letter looks like a clean one."""

    DEFAULT_STEPS = 16
    TERMINAL_NOISE = 0.05               # 1 - alpha where --states=terminal takes the score
    CUT = 1e-6                          # the training loss integrates over noise levels above it

    # forward process and training loss

    def transition(self, x, keep):
        """Law of a token x [B, k] kept with probability keep [B], else redrawn -> [B, k, V]."""
        keep = keep[:, None, None].clamp(max=1 - 2 ** -24)      # its log stays finite
        return keep * F.one_hot(x, self.vocab_size) + (1 - keep) / self.vocab_size

    def noise(self, x, generator=None):
        """What stands in the place of tokens x [B, L] at time 1: random letters."""
        return torch.randint(self.vocab_size, x.shape, generator=generator, device=x.device)

    def losses(self, model, x0, given):
        """Denoising score entropy (SEDD, 2310.16834) of x0 [B, L] at one random time -> [B], nats.

        The integral over t of sum_{i, v != x_i} (sigma'/V) (s_v - r_v log s_v + r_v (log r_v - 1)),
        with the model's score s and the ratio r of q_t(. | x0). In the noise level m = 1 - alpha,
        sigma' dt = dm / (1 - m). For a network that is not exact the integrand grows as 1 / m,
        so the integral diverges logarithmically: we cut it at m = CUT (and just below 1). Levels
        are drawn as m = w^3 with w uniform above the cut, since small m has the largest terms."""
        low, high = self.CUT ** (1 / 3), 1 - 1e-4
        w = low + (high - low) * stratified(len(x0), x0.device)
        m = w ** 3
        t = self.alpha_inverse(1 - m)
        x = torch.where(given, x0, self.corrupt(x0, t))
        log_q = self.transition(x0, 1 - m).log()
        log_r = log_q - log_q.gather(-1, x[..., None])          # 0 at v = x_i
        z = self.log_score(model, x, t) - log_r
        entropy = (log_r.exp() * (z.expm1() - z)).sum(dim=-1).masked_fill(given, 0)     # [B, L]
        dm = 3 * w ** 2 * (high - low)
        return dm / (1 - m) / self.vocab_size * entropy.sum(dim=1)

    # concrete score

    def log_ratio(self, logits, x, t, s):
        """log sum_{x0} p(x0 | x_t) q_s(v | x0) / q_t(x | x0) -> [n, k, V]; x [n, k], t, s [n]."""
        log_p = logits.log_softmax(dim=-1) - self.transition(x, self.alpha(t)).log()
        a = self.alpha(s)[:, None, None]
        redrawn = log_p.logsumexp(dim=-1, keepdim=True) + ((1 - a) / self.vocab_size).log()
        return torch.logaddexp(redrawn, log_p + a.log())

    def log_kernel(self, model, x, t, s):
        """log p(x_s = v | x_t = x) -> [B, L, V], by Bayes' rule (D3PM, 2107.03006)."""
        step = self.transition(x, self.alpha(t) / self.alpha(s))
        return self.log_ratio(logits_at(model, x, t), x, t, s) + step.log()

    def log_score(self, model, x, t):
        """log s(x, t)_{i,v} = log p_t(x with slot i set to v) - log p_t(x) -> [B, L, V]; t > 0."""
        return self.log_ratio(logits_at(model, x, t), x, t, t)

    def log_law(self, model, view):
        """Slot laws -> [n, L, V]: the sampler's kernel from t to s, or log_softmax(log s) at t."""
        if view.s is None:
            return self.log_score(model, view.x, view.t).log_softmax(dim=-1)
        return self.log_kernel(model, view.x, view.t, view.s)

    # sampling

    @torch.no_grad()
    def denoise(self, model, x, given, t, N, generator=None):
        """The reverse process from the state x [B, L] at time t, on a grid of N steps -> GridPath.
        Given slots stay."""
        time = torch.arange(round(t * N), -1, -1, device=x.device) / N
        states, logps = [x], []
        for t, s in zip(time[:-1], time[1:]):           # a step of the grid, from t to s
            t, s = t.expand(len(x)), s.expand(len(x))
            log_w = self.log_kernel(model, x, t, s)                                     # [B, L, V]
            x = torch.where(given, x, draw(log_w, generator))
            states.append(x)
            logps.append(pick(log_w, x).masked_fill(given, 0))
        return GridPath(torch.stack(states), time, torch.stack(logps, dim=1), given)

    # corrector and final samples

    def jump_law(self, model, x, t, slot):
        """Probability of each letter [B, V] for slot [B, 1] in a corrector move; 0 at its own.

        Rates: 1/V forward plus s_v/V back, divided by a bound of their sum."""
        token = x.gather(1, slot)
        score = self.log_ratio(logits_at(model, x, t, slot), token, t, t).squeeze(1).exp()
        largest = 1 + 1 / (1 - self.alpha(t))[:, None]
        return ((1 + score) / self.vocab_size / largest).scatter(1, token, 0)

    def terminal_view(self, x0, given):
        """Final samples x0 [B, L] at a low noise level, every slot scored -> View."""
        row = torch.arange(len(x0), device=x0.device)
        alpha = torch.full_like(row, 1 - self.TERMINAL_NOISE, dtype=torch.float)
        return View(row, x0, self.alpha_inverse(alpha), None, x0, (~given).float())

    def slot_laws(self, model, path):
        return self.log_law(model, self.terminal_view(path.tokens, path.given))

    # exact law

    def exact_law(self, model, length, steps=None):
        """Law of `sample` over all V**L sequences, in itertools.product order -> [V**L].

        Differentiable. It costs N passes over all sequences."""
        states = every_sequence(self.vocab_size, length, device_of(model))
        mass = torch.full_like(states[:, 0], 1 / len(states), dtype=torch.float)
        return law_on_grid(self, model, mass, states, steps or self.DEFAULT_STEPS)

    def kernel(self, model, x, t, s):
        """Law of each slot after a step from t to s -> [B, L, V]."""
        return self.log_kernel(model, x, t, s).exp()

# -----------------------------------------------------------------------------
# exact laws of small spaces

def every_sequence(W, length, device):
    """All W**L sequences, in itertools.product order -> [W**L, L]."""
    letters = torch.arange(W, device=device)
    return torch.cartesian_prod(*[letters] * length).view(-1, length)


def law_on_grid(process, model, mass, states, steps):
    """Push the mass [W**L] of all states through the N steps of the grid -> [W**L]."""
    for k in range(steps, 0, -1):
        step = torch.full_like(mass, k)                 # from t = k / N to s = (k - 1) / N
        kernel = process.kernel(model, states, step / steps, (step - 1) / steps)    # [W**L, L, W]
        # slots move independently, so the move of a whole sequence is the product of the moves of
        # its halves, and the sum over all starting states is one matrix product
        left, right = map(joint_law, kernel.tensor_split(2, dim=1))
        mass = torch.einsum("s,sa,sb->ab", mass, left, right).flatten()
    return mass


def joint_law(kernel):
    """Laws of l independent slots [S, l, W] -> their joint law [S, W**l]."""
    p = kernel.new_ones(len(kernel), 1)
    for law in kernel.unbind(dim=1):
        p = torch.einsum("sa,sb->sab", p, law).flatten(1)
    return p
