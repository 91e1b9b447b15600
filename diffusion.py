"""Continuous-time Markov chains on tokens: corruption, score-entropy loss, concrete score, sampling, exact laws.

Shapes: B sequences, L slots, V clean tokens; token V is the mask M. Time t runs from 0 (data) to 1 (noise); alpha(t) is the
chance that a slot is still clean. A model is any callable (x, t) -> logits [B, L, V] of log p_theta(x0_i = v | x_t).
"""
import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


# ---- noise schedules --------------------------------------------------------------------------------------------------

LOW, HIGH = 1e-4, 20.0    # sigma = -log alpha runs between these under `geometric` (SEDD, 2310.16834)


def geometric(t):
    """exp(-sigma), sigma = LOW^(1-t) HIGH^t, rescaled to run from 1 to 0 exactly."""
    return ((-LOW * (HIGH / LOW) ** t).exp() - math.exp(-HIGH)) / (math.exp(-LOW) - math.exp(-HIGH))


def geometric_inverse(a):
    sigma = -(a * (math.exp(-LOW) - math.exp(-HIGH)) + math.exp(-HIGH)).log()
    return ((sigma / LOW).log() / math.log(HIGH / LOW)).clamp(0, 1)


SCHEDULES = {             # name: (alpha, its inverse), of tensors on [0, 1]
    "linear": (lambda t: 1 - t, lambda a: 1 - a),
    "cosine": (lambda t: (t * math.pi / 2).cos().clamp(min=0), lambda a: a.acos() * 2 / math.pi),
    "geometric": (geometric, geometric_inverse),
}


# ---- paths and views of them ------------------------------------------------------------------------------------------

@dataclass
class View:
    """States at which concrete scores are taken: n of them, k slots in each, on the paths `row`."""
    row: torch.Tensor               # [n]     whose path it is
    x: torch.Tensor                 # [n, L]  the state
    t: torch.Tensor                 # [n]     its time
    slots: torch.Tensor             # [n, k]  the slots whose line {x with that slot free} is scored
    y: torch.Tensor                 # [n, k]  the token that the slot takes
    weight: torch.Tensor            # [n, k]  an unbiased sum over the path is sum(weight * term); 0 pads
    logp_old: torch.Tensor | None = None  # [n, k] log w_y under the policy that drew the path, where it is known
    s: torch.Tensor | None = None   # [n]     the time of y, if y is drawn by a step of a grid from t to s
    place: torch.Tensor | None = None     # [n, k] where the transitions stand in path.logp.flatten(1)

    def split(self, size):
        """The same in views of at most `size` states each; 0: in one."""
        if not size:
            return [self]
        return [replace(self, **{name: part[i:i + size] for name, part in vars(self).items() if part is not None})
                for i in range(0, len(self.row), size)]


@dataclass
class Path:
    """A batch of sampled reverse paths, whole in three [B, L] tensors: every visited state can be rebuilt from them."""
    tokens: torch.Tensor            # [B, L]  what was drawn in the end
    time: torch.Tensor              # [B, L]  when the slot was revealed; inf where the prompt gave it
    logp: torch.Tensor              # [B, L]  log-probability (nats) of the token when it was drawn; 0 where given
    mask: int                       # M
    width: int                      # the most slots that one event of one row reveals

    @property
    def given(self):
        """[B, L]: slots that the prompt gave."""
        return self.time.isinf()

    @cached_property
    def event(self):
        """[B, L]: which forward pass of its row revealed the slot, 0 the first; -1 where given."""
        return event_index(self.time)

    @cached_property
    def n_events(self):
        """[B]: forward passes that the row took."""
        return self.event.amax(dim=1) + 1

    @cached_property
    def visits(self):
        """Row and event of every state that was visited, [n] each."""
        return visits_of(self.n_events)

    def by_event(self, logp):
        """Log-probabilities of the transitions [B, L] -> of the events that made them, all slots of one together, [B, L]."""
        return torch.zeros_like(logp).scatter_add(1, self.event.clamp(min=0), logp)

    def state(self, j):
        """The state [B, L] that event j (int or [B, 1]) started from; from j = n_events on, the sample itself."""
        return torch.where(self.event >= j, self.mask, self.tokens)

    def view(self, row, event):
        """The states from which events [n] of paths row [n] started, with the slots that they revealed -> View of weight 1."""
        x, index, event = self.tokens[row], self.event[row], event[:, None]
        real, slots = (index == event).float().topk(max(1, self.width), dim=1)                       # [n, k]
        t = self.time[row].gather(1, slots[:, :1]).squeeze(1)
        return View(row, torch.where(index >= event, self.mask, x), t.clamp(max=1), slots, x.gather(1, slots), real,
                    self.logp[row].gather(1, slots), place=slots)


@dataclass
class GridPath:
    """A batch of reverse paths on a grid, where a slot may move in any step: all states are kept, one byte a token."""
    states: torch.Tensor            # [N+1, B, L] uint8 (int32 for more than 256 letters), from noise to sample
    time: torch.Tensor              # [N+1] of the states
    logp: torch.Tensor              # [B, N, L] log-probability (nats) of each slot's move, staying included; 0 where given
    given: torch.Tensor             # [B, L]  slots that the prompt gave

    @property
    def tokens(self):
        return self.states[-1].long()

    @property
    def n_events(self):
        return torch.full_like(self.given[:, 0], len(self.states) - 1, dtype=torch.long)

    @cached_property
    def visits(self):
        """Row and step of every state that was visited, [n] each."""
        return visits_of(self.n_events)

    def by_event(self, logp):
        """Log-probabilities of the slots' moves [B, N, L] -> of the steps [B, N]."""
        return logp.sum(dim=2)

    def state(self, j):
        """The state [B, L] that step j started from; j = N: the sample."""
        return self.states[j].long()

    def view(self, row, event):
        """The states from which steps [n] of paths row [n] started, all slots scored -> View of weight 1."""
        L = self.given.size(1)
        slots = torch.arange(L, device=row.device).expand(len(row), -1)
        return View(row, self.states[event, row].long(), self.time[event], slots, self.states[event + 1, row].long(),
                    (~self.given[row]).float(), self.logp[row, event], self.time[event + 1], slots + event[:, None] * L)


def event_index(time):
    """Reveal times [B, L] -> their dense rank from the latest down, [B, L]; inf (never masked) gets -1."""
    value, order = time.sort(dim=1, descending=True)
    new = torch.ones_like(value, dtype=torch.bool)
    new[:, 1:] = value[:, 1:] < value[:, :-1]
    rank = new.cumsum(dim=1) - 1 - value[:, :1].isinf().long()
    return torch.empty_like(order).scatter_(1, order, rank)


def visits_of(n_events):
    """Numbers of events [B] -> row and event of each, [n] each; a host synchronisation."""
    return (torch.arange(int(n_events.max()), device=n_events.device) < n_events[:, None]).nonzero(as_tuple=True)


def schedule(event):
    """Event index [B, L] -> what the loop over events needs: rows [B] with the longest paths first, so that those that go on
    are a prefix; each row's slots in order of reveal, [B, L], given ones first; end [B, L + 1]: event j holds the places
    end[:, j] to end[:, j + 1] of that order; and for each event how many rows have it, and the most slots in it."""
    row = event.amax(dim=1).argsort(descending=True)
    event = event[row]
    size = torch.zeros(len(event), event.size(1) + 1, dtype=torch.long, device=event.device)
    size.scatter_add_(1, event + 1, torch.ones_like(event))
    active, width = torch.stack(((size > 0).sum(dim=0), size.amax(dim=0)))[:, 1:].tolist()         # the loop's only sync
    n = sum(count > 0 for count in active)
    return row, event.argsort(dim=1, stable=True), size.cumsum(dim=1), active[:n], width[:n]


def logits_at(model, x, t, slots):
    """logits [n, k, V] at slots [n, k] alone. A model with `hidden_at` or `hidden` and `head` spends nothing on the rest."""
    def rows(h):
        return h.gather(1, slots[..., None].expand(-1, -1, h.size(-1)))
    if not hasattr(model, "head"):
        return rows(model(x, t))
    if hasattr(model, "hidden_at"):
        return model.head(model.hidden_at(x, t, slots))
    if hasattr(model, "hidden"):
        return model.head(rows(model.hidden(x, t)))
    return rows(model(x, t))


def stratified(n, generator=None, device=None):
    """n uniforms on [0, 1), one in each of n equal cells, in random order: each is uniform, together they are even."""
    cell = torch.randperm(n, generator=generator, device=device)
    return ((cell + torch.rand(n, generator=generator, device=device)) / n).clamp(max=1 - 2 ** -24)


# ---- what the chains share ----------------------------------------------------------------------------------------------

class Chain:
    """The schedule, and what follows from a chain's own corrupt, losses, log_law, kernel and jump_law."""

    def __init__(self, vocab_size, schedule="linear"):
        self.vocab_size = vocab_size
        self.alpha, self.alpha_inverse = SCHEDULES[schedule]   # alpha(t): chance that a slot is still clean at time t

    def loss(self, model, x0, generator=None, given=None):
        """Denoising score entropy of the data x0 [B, L] -> scalar, nats a sequence: a bound on -log p_theta(x0), or, with
        slots that are `given` [B, L], on minus the log-probability of the others."""
        return self.losses(model, x0, generator, given).mean()

    @torch.no_grad()
    def bound(self, model, x0, draws=128, generator=None, given=None):
        """The same bound of each sequence x0 [B, L] -> (bound [B], its standard error [B]), nats; costs `draws` passes."""
        losses = torch.stack([self.losses(model, x0, generator, given) for _ in range(draws)])              # [draws, B]
        return losses.mean(dim=0), losses.std(dim=0) / draws ** 0.5

    def path_view(self, path, events=1, generator=None):
        """`events` states that the sampler visited on each path, even over its events and stratified over the batch."""
        B, device = len(path.tokens), path.tokens.device
        row = torch.arange(B, device=device).repeat(events)
        stratum = torch.arange(events, device=device).repeat_interleave(B)
        u = (stratum + stratified(B, generator, device).repeat(events)) / events
        n = path.n_events[row]
        view = path.view(row, torch.minimum((u * n).long(), (n - 1).clamp(min=0)))          # u may round to 1
        view.weight = view.weight * (n / events)[:, None]
        return view

    def replay(self, model, path, chunk=None):
        """log-probability under `model` of every transition of the path, shaped as path.logp, nats; differentiable.

        The states are known, so the events of all rows are scored together, `chunk` states (default: B) a pass. Only the
        log-probabilities are kept: with gradients, backward computes each pass again, so that memory is that of one pass
        however many events there are."""
        def score(row, event):
            view = path.view(row, event)
            logp = self.log_law(model, view).gather(-1, view.y[..., None]).squeeze(-1)               # [n, k]
            return logp * view.weight, view.place
        row, event = path.visits
        logp = torch.zeros_like(path.logp).flatten(1)
        for r, e in zip(row.split(chunk or len(path.tokens)), event.split(chunk or len(path.tokens))):
            grad = torch.is_grad_enabled()
            new, place = checkpoint(score, r, e, use_reentrant=False, preserve_rng_state=False) if grad else score(r, e)
            logp = logp.index_put((r[:, None], place), new, accumulate=True)
        return logp.view_as(path.logp)

    @torch.no_grad()
    def correct(self, model, x, t, steps, given=None, generator=None):
        """`steps` moves of the chain with generator Q_t + reverse Q_t at a fixed time t in (0, 1) -> x [B, L].

        That chain leaves p_t as it is, and brings any other law closer to it (the gradient flow of SEPO, 2502.01384). It is
        uniformised: a move picks one slot of each row, not a `given` one, and lets it jump with its rate over the largest
        possible, so there is no discretisation error, and a move costs one pass whose head reads one slot."""
        t = torch.as_tensor(t, dtype=torch.float, device=x.device).expand(len(x))
        free = 1.0 if given is None else 1.0 - given.float()
        for _ in range(steps):
            u = torch.rand(x.shape, generator=generator, device=x.device) * free
            slot = u.argmax(dim=1, keepdim=True)                                                     # [B, 1]
            law = self.jump_law(model, x, t, slot)                                                   # [B, W], 0 at x_i
            law.scatter_(1, x.gather(1, slot), (1 - law.sum(dim=1, keepdim=True)).clamp(min=0))
            y = torch.multinomial(law, 1, generator=generator)
            x = x.scatter(1, slot, torch.where(u.gather(1, slot) > 0, y, x.gather(1, slot)))
        return x

    def _on_grid(self, model, mass, states, steps, given=None):
        """Mass [W**L] over all states after the N steps of the grid."""
        for k in range(steps, 0, -1):
            t, s = (torch.full((len(states),), n / steps, device=mass.device) for n in (k, k - 1))
            kernel = self.kernel(model, states, t, s)
            if given is not None:
                kernel = torch.where(given[:, None], F.one_hot(states, kernel.size(-1)).float(), kernel)
            mass = push(mass, kernel)
        return mass


# ---- the absorbing chain ------------------------------------------------------------------------------------------------

class Absorbing(Chain):
    """Masked diffusion: every slot turns into the mask, by itself, at a random time (SEDD, arXiv 2310.16834)."""

    def __init__(self, vocab_size, schedule="linear", cuda_graph=False):
        super().__init__(vocab_size, schedule)
        self.mask = vocab_size
        self.graphs = {} if cuda_graph else None       # a captured pass for each model and shape; weights change in place

    # -- forward

    def corrupt(self, x0, t, generator=None):
        """x_t ~ q_t(. | x0): x0 [B, L], t [B] -> [B, L]."""
        clean = torch.rand(x0.shape, generator=generator, device=x0.device) < self.alpha(t)[:, None]
        return torch.where(clean, x0, self.mask)

    def reveal_times(self, given, steps=None, generator=None, start=1.0):
        """When each slot of the reverse chain is revealed, [B, L], from time `start` down; inf where `given`. No time depends
        on any token, so all are drawn before the first pass. With a grid of N steps, a step from t to s = t - 1/N reveals at
        its start t."""
        low = self.alpha(torch.tensor(start)).item()
        time = self.alpha_inverse(low + (1 - low) * torch.rand(given.shape, generator=generator, device=given.device))
        if steps is not None:
            time = (time * steps).ceil().clamp(1, steps) / steps
        return time.masked_fill(given, float("inf"))

    def noised_view(self, x0, given, generator=None):
        """x_t ~ q(. | x0) at a random level, all masked slots scored at once -> View; E sum(weight * -log w) is the bound.

        Draw a time for each of the n free slots, let m be uniform on 1..n, and mask the m smallest: the level has the law
        that the bound's weight -alpha'/(1 - alpha) asks for, none is empty, and the weight is n/m (the any-order form of the
        bound, ARDM, 2110.02037)."""
        time = self.reveal_times(given, generator=generator)
        free = (~given).sum(dim=1)
        m = 1 + (stratified(len(x0), generator, x0.device) * free).long()
        t = time.sort(dim=1).values.gather(1, m[:, None].clamp(max=x0.size(1)) - 1)                  # [B, 1]
        masked = (time <= t) & ~given
        row = torch.arange(len(x0), device=x0.device)
        slots = torch.arange(x0.size(1), device=x0.device).expand_as(x0)
        weight = (free / m)[:, None] * masked
        return View(row, torch.where(masked, self.mask, x0), t[:, 0].clamp(max=1), slots, x0, weight)

    def losses(self, model, x0, generator=None, given=None):
        """Denoising score entropy (SEDD, 2310.16834) under the derived score, unbiased at one random time for each of
        x0 [B, L] -> [B], nats. With an absorbing chain it is MDLM's weighted cross-entropy (2406.07524)."""
        view = self.noised_view(x0, torch.zeros_like(x0, dtype=torch.bool) if given is None else given, generator)
        logp = self.log_law(model, view).gather(-1, view.y[..., None]).squeeze(-1)                   # [B, L]
        return -(view.weight * logp).sum(dim=1)

    # -- the concrete score

    def log_score(self, model, x, t):
        """log s(x, t)_{i,v} = log p_t(x with slot i set to v) - log p_t(x), [B, L, V]; x [B, L], t [B].

        From a masked slot it is p_theta(v | x) * alpha / (1 - alpha) (RADD, 2406.03736). A revealed slot cannot
        move backwards in this chain: its row is 0 at v = x_i and -inf elsewhere."""
        a = self.alpha(t)[:, None, None]
        score = model(x, t).log_softmax(dim=-1) + (a / (1 - a)).log()
        stay = torch.zeros_like(score).masked_fill(F.one_hot(x, self.vocab_size + 1)[..., :-1] == 0, -float("inf"))
        return torch.where((x == self.mask)[..., None], score, stay)

    def log_law(self, model, view):
        """The slot laws log w = log_softmax_v(log s(x)_{i, .}) on the view's lines, [n, k, V]: of a masked slot, the odds
        alpha / (1 - alpha) cancel, and w is the kernel with which the sampler draws the token."""
        return logits_at(model, view.x, view.t, view.slots).log_softmax(dim=-1)

    # -- sampling

    def sample(self, model, batch, length, steps=None, prompt=None, generator=None, corrector_steps=0, corrector_t=0.5):
        """Draw `batch` sequences -> Path. steps: a grid of N steps, or None for none (no discretisation error); prompt
        [L] or [batch, L]: the mask where a slot is free, else the token that it keeps. Costs at most min(N, L) passes.

        corrector_steps: moves of `correct` when the reverse process has come down to time corrector_t. The path that is
        returned then starts from the corrected state: what was revealed before counts as given."""
        device = generator.device if generator is not None else device_of(model)
        x = torch.full((batch, length), self.mask, device=device)
        if prompt is not None:
            x = prompt.to(device).expand(batch, length).clone()
        given, alike = x != self.mask, prompt is None
        time = self.reveal_times(given, steps, generator)
        if corrector_steps:
            corrector_t = corrector_t if steps is None else on_grid(corrector_t, steps) / steps
            x = self.reveal(model, x, time.masked_fill(time <= corrector_t, float("inf")), None, generator, alike).tokens
            x, alike = self.correct(model, x, corrector_t, corrector_steps, given, generator), False
            time = self.reveal_times(x != self.mask, steps, generator, corrector_t)
        return self.reveal(model, x, time, None, generator, alike)

    @torch.no_grad()
    def reveal(self, model, x, time, noise=None, generator=None, alike=False):
        """Walk each row of x [B, L] through its own events: its j-th pass reveals its j-th group of slots -> Path.

        The law is that of ancestral sampling (MDLM, 2406.07524) without its empty steps (first hitting times, 2409.02908).
        Rows that are done leave the batch, and only revealed slots reach the head. noise [B, L, V]: Gumbel noise to use
        instead of fresh. alike: all rows of x are one state; if the model reads no time, one row computes the first pass."""
        B, L = x.shape
        row, order, end, active, width = schedule(event_index(time))
        widest, replay = max(width, default=0), None
        walk = (F.pad(x[row], (0, 1)), time.new_zeros(B, L + 1), time[row], order, end,            # column L takes padding
                torch.zeros(1, dtype=torch.long, device=x.device))                                 # the event, on the device
        if self.graphs is not None and width:                      # static shapes: every pass is that of the widest event
            active, width = [B] * len(width), [1 << (widest - 1).bit_length()] * len(width)
            if noise is None:
                walk, fresh, replay = self._captured(model, walk, width[0])
        alike = alike and not getattr(getattr(model, "config", None), "time_conditioning", True)

        def gumbel(logits, slots):
            return gumbel_like(logits, generator) if noise is None else noise[row[:len(slots), None], slots]
        for e, (n, k) in enumerate(zip(active, width)):
            walk[-1].fill_(e)
            if replay is None or (alike and e == 0):
                self._event(model, walk, n, k, gumbel, alike and e == 0)
            else:
                fresh.exponential_(generator=generator)
                replay()
        (x, logp, time, *_), back = walk, row.argsort()
        return Path(x[back, :L], time[back], logp[back, :L], self.mask, widest)

    def _event(self, model, walk, n, k, gumbel, alike=False):
        """One pass, in place: each of the first n rows draws its j-th group of at most k slots."""
        x, logp, time, order, end, j = walk
        L = order.size(1)
        place = end[:n].index_select(1, j) + torch.arange(k, device=x.device)                        # [n, k]
        real = place < end[:n].index_select(1, j + 1)
        slots = order[:n].gather(1, place.clamp(max=L - 1))
        if alike:
            logits = model(x[:1, :L], None)[0][slots]                                                # [n, k, V]
        else:
            t = time[:n].gather(1, slots[:, :1]).squeeze(1).clamp(max=1)
            logits = logits_at(model, x[:n, :L], t, slots)
        y = (logits + gumbel(logits, slots)).argmax(dim=-1)                                          # [n, k]
        slots = slots.where(real, L)
        x[:n].scatter_(1, slots, y)
        logp[:n].scatter_(1, slots, logits.log_softmax(dim=-1).gather(-1, y[..., None]).squeeze(-1))

    def _captured(self, model, walk, k):
        """The walk, copied into the buffers of a pass that is captured once -> (walk, noise [B, k, V], replay)."""
        B, L = walk[2].shape
        if (model, B, L, k) not in self.graphs:
            if len(self.graphs) == 8:
                del self.graphs[next(iter(self.graphs))]           # the oldest, and its memory
            own, fresh = [part.clone() for part in walk], walk[1].new_ones(B, k, self.vocab_size)
            replay = capture(lambda: self._event(model, own, B, k, lambda *_: -fresh.log()), fresh.device)
            self.graphs[model, B, L, k] = own, fresh, replay
        for part, buffer in zip(walk, self.graphs[model, B, L, k][0]):
            buffer.copy_(part)
        return self.graphs[model, B, L, k]

    def jump_law(self, model, x, t, slot):
        """Law [B, V+1] of slot [B, 1] after one move of `correct`, 0 at its own token: rate 1 to the mask, and
        p(v | x) alpha / (1 - alpha) from it, over the larger of the two."""
        odds = (self.alpha(t) / (1 - self.alpha(t)))[:, None]                                        # [B, 1]
        p = F.pad(logits_at(model, x, t, slot).squeeze(1).softmax(dim=-1) * odds, (0, 1))
        mask = F.one_hot(torch.full_like(t, self.mask, dtype=torch.long), self.vocab_size + 1)
        return torch.where(x.gather(1, slot) == self.mask, p, mask) / odds.clamp(min=1)

    # -- views of a path

    def terminal_view(self, path, generator=None):
        """The final sample with one of its free slots masked again, drawn uniformly (t -> 0) -> View."""
        free = ~path.given
        slots = torch.rand(free.shape, generator=generator, device=free.device).masked_fill(~free, -1).argmax(1, keepdim=True)
        row = torch.arange(len(free), device=free.device)
        weight = (free.sum(dim=1, keepdim=True) * free.gather(1, slots)).float()
        return View(row, path.tokens.scatter(1, slots, self.mask), torch.zeros(len(free), device=free.device),
                    slots, path.tokens.gather(1, slots), weight)

    # -- exact law of small spaces

    def exact_law(self, model, length, steps=None, prompt=None):
        """Law of `sample` over the V**L sequences, in the order of itertools.product(range(V), repeat=L) -> [V**L],
        differentiable. Walks all (V+1)**L partly masked states, so it is for small spaces; with a grid, N times over."""
        device = device_of(model)
        start = torch.full((length,), self.mask, device=device) if prompt is None else prompt.to(device)
        states = every_sequence(self.vocab_size + 1, length, device)
        mass = (states == start).all(dim=1).float()
        mass = self._exact(model, mass, states) if steps is None else self._on_grid(model, mass, states, steps)
        return mass[(states < self.mask).all(dim=1)]

    def _exact(self, model, mass, states):
        """One slot at a time, each masked slot equally likely to be next. No time is passed on: a model that reads it has a
        law that depends on the continuous reveal times, which only a grid makes finite."""
        V, L = self.vocab_size, states.size(1)
        base, masks = (V + 1) ** torch.arange(L - 1, -1, -1, device=mass.device), (states == self.mask).sum(dim=1)
        for m in range(L, 0, -1):
            index = (masks == m).nonzero().squeeze(1)
            index = index[mass.detach()[index] > 0]
            if len(index):
                p = model(states[index], None).softmax(dim=-1)                                       # [S, L, V]
                b, i = (states[index] == self.mask).nonzero(as_tuple=True)
                target = index[b, None] + (torch.arange(V, device=mass.device) - V) * base[i, None]
                mass = mass.index_add(0, target.flatten(), (mass[index][b, None] * p[b, i] / m).flatten())
        return mass

    def kernel(self, model, x, t, s):
        """Law of each slot after a step from t to s, [B, L, V+1]: a masked slot is revealed with chance
        (alpha_s - alpha_t) / (1 - alpha_t), by itself."""
        a_t, a_s = self.alpha(t)[:, None, None], self.alpha(s)[:, None, None]
        hazard = (a_s - a_t) / (1 - a_t).clamp(min=2 ** -24)
        move = torch.cat((hazard * model(x, t).softmax(dim=-1), (1 - hazard).expand(-1, x.size(1), 1)), dim=-1)
        return torch.where((x == self.mask)[..., None], move, F.one_hot(x, self.vocab_size + 1).float())


# ---- the uniform chain --------------------------------------------------------------------------------------------------

class Uniform(Chain):
    """Every slot is drawn anew from all V letters, by itself, at a random time: q_t(v | x0) = alpha [v = x0] + (1 - alpha)/V.

    A slot may change at any time, so sampling needs a grid, and a model should read the time: noise does not show."""

    STEPS = 16                   # of the grid, where none is asked for
    TERMINAL_NOISE = 0.05        # 1 - alpha at the time at which `terminal` takes the score of a sample

    # -- forward

    def transition(self, x, keep):
        """Law of the token after (or before) x [B, k] if a slot is left alone with chance keep [B] -> [B, k, V]."""
        keep = keep[:, None, None].clamp(max=1 - 2 ** -24)                                           # its log stays finite
        return keep * F.one_hot(x, self.vocab_size) + (1 - keep) / self.vocab_size

    def corrupt(self, x0, t, generator=None):
        """x_t ~ q_t(. | x0): x0 [B, L], t [B] -> [B, L]."""
        clean = torch.rand(x0.shape, generator=generator, device=x0.device) < self.alpha(t)[:, None]
        return torch.where(clean, x0, torch.randint(self.vocab_size, x0.shape, generator=generator, device=x0.device))

    def losses(self, model, x0, generator=None, given=None):
        """Denoising score entropy (SEDD, 2310.16834), unbiased at one random time for each of x0 [B, L] -> [B], nats:
        the integral over t of sum_{i, v != x_i} (sigma'/V) (s_v - r_v log s_v + r_v (log r_v - 1)), with the concrete score s
        of the model and the ratio r of q_t(. | x0). Written over the noise level m = 1 - alpha, sigma' dt = dm / (1 - m),
        so no schedule appears; m = w^3 with w uniform, since the integrand's deviation was measured to fall as m^-0.7."""
        w = stratified(len(x0), generator, x0.device).clamp(1e-2, 1 - 1e-4)
        m = w ** 3
        t = self.alpha_inverse(1 - m)
        x, free = self.corrupt(x0, t, generator), 1.0
        if given is not None:
            x, free = torch.where(given, x0, x), (~given)[..., None]
        log_q = self.transition(x0, self.alpha(t)).log()
        log_r = log_q - log_q.gather(-1, x[..., None])                                               # [B, L, V]; 0 at v = x_i
        z = self.log_score(model, x, t) - log_r
        entropy = (log_r.exp() * (z.expm1() - z) * free).sum(dim=(1, 2))
        return 3 * w ** 2 / (1 - m) / self.vocab_size * entropy

    def noised_view(self, x0, given, generator=None):
        raise ValueError("states=noised scores masked slots: uniform noise has none; use states=path or states=terminal")

    # -- the concrete score

    def _mixture(self, logits, x, t, s):
        """log sum_{x0} p(x0 | x_t) q_s(v | x0) / q_t(x | x0), [n, k, V]: logits [n, k, V], slots x [n, k], times t, s [n]."""
        log_r = logits.log_softmax(dim=-1) - self.transition(x, self.alpha(t)).log()
        a = self.alpha(s)[:, None, None]
        return torch.logaddexp(log_r.logsumexp(dim=-1, keepdim=True) + ((1 - a) / self.vocab_size).log(), log_r + a.log())

    def _log_kernel(self, logits, x, t, s):
        """log p(x_s = v | x_t), [n, k, V]: the mixture times q_{t|s}(x | v) (Bayes; D3PM, 2107.03006)."""
        return self._mixture(logits, x, t, s) + self.transition(x, self.alpha(t) / self.alpha(s)).log()

    def log_score(self, model, x, t):
        """log s(x, t)_{i,v} = log p_t(x with slot i set to v) - log p_t(x), [B, L, V], in one pass; 0 at v = x_i. t in (0, 1]:
        s_v = sum_{x0} p(x0 | x_t) q_t(v | x0) / q_t(x_i | x0)."""
        return self._mixture(model(x, t), x, t, t)

    def log_law(self, model, view):
        """The slot laws on the view's lines, [n, k, V]: the kernel of the sampler's step from t to s or, without an s,
        log w = log_softmax_v(log s(x, t)_{i, .})."""
        logits, x = logits_at(model, view.x, view.t, view.slots), view.x.gather(1, view.slots)
        if view.s is None:
            return self._mixture(logits, x, view.t, view.t).log_softmax(dim=-1)
        return self._log_kernel(logits, x, view.t, view.s)

    # -- sampling

    @torch.no_grad()
    def sample(self, model, batch, length, steps=None, prompt=None, generator=None, corrector_steps=0, corrector_t=0.5):
        """Draw `batch` sequences -> GridPath: N = steps (default: STEPS) passes, each a draw of every slot.
        prompt, corrector: as Absorbing.sample has them."""
        N, device = steps or self.STEPS, generator.device if generator is not None else device_of(model)
        prompt = torch.full((length,), self.vocab_size) if prompt is None else prompt
        prompt = prompt.to(device).expand(batch, length)
        given = prompt < self.vocab_size
        x = torch.where(given, prompt, torch.randint(self.vocab_size, (batch, length), generator=generator, device=device))
        last = N
        if corrector_steps:
            last = on_grid(corrector_t, N)
            for k in range(N, last, -1):
                x = self._step(model, x, given, k / N, (k - 1) / N, generator)[0]
            x = self.correct(model, x, last / N, corrector_steps, given, generator)
        byte = torch.uint8 if self.vocab_size <= 256 else torch.int32
        states = torch.empty(last + 1, batch, length, dtype=byte, device=device)
        logp, states[0] = torch.empty(batch, last, length, device=device), x
        for j, k in enumerate(range(last, 0, -1)):
            x, logp[:, j] = self._step(model, x, given, k / N, (k - 1) / N, generator)
            states[j + 1] = x
        return GridPath(states, torch.arange(last, -1, -1, device=device) / N, logp, given)

    def _step(self, model, x, given, t, s, generator):
        """A step of the grid from time t to s (floats) -> the next state, and the log-probability of each slot's move."""
        t, s = (torch.full((len(x),), u, device=x.device) for u in (t, s))
        log_w = self._log_kernel(model(x, t), x, t, s)                                               # [B, L, V]
        y = torch.where(given, x, (log_w + gumbel_like(log_w, generator)).argmax(dim=-1))
        return y, log_w.gather(-1, y[..., None]).squeeze(-1).masked_fill(given, 0)

    def jump_law(self, model, x, t, slot):
        """Law [B, V] of slot [B, 1] after one move of `correct`: rates 1/V forward and s_v/V back, over their largest sum."""
        rate = (1 + self._mixture(logits_at(model, x, t, slot), x.gather(1, slot), t, t).squeeze(1).exp()) / self.vocab_size
        jump = rate / (1 + 1 / (1 - self.alpha(t)))[:, None]
        return jump.scatter(1, x.gather(1, slot), 0)

    # -- views of a path

    def terminal_view(self, path, generator=None):
        """The final samples, every slot's line at once, at a low noise level -> View."""
        x = path.tokens
        slots = torch.arange(x.size(1), device=x.device).expand_as(x)
        t = self.alpha_inverse(torch.full((len(x),), 1 - self.TERMINAL_NOISE, device=x.device))
        return View(torch.arange(len(x), device=x.device), x, t, slots, x, (~path.given).float())

    # -- exact law of small spaces

    def exact_law(self, model, length, steps=None, prompt=None):
        """Law of `sample` over the V**L sequences, in the order of itertools.product(range(V), repeat=L) -> [V**L],
        differentiable: N passes over all of them."""
        states = every_sequence(self.vocab_size, length, device_of(model))
        prompt = torch.full((length,), self.vocab_size) if prompt is None else prompt
        prompt = prompt.to(states.device)
        given = prompt < self.vocab_size
        mass = (states == prompt)[:, given].all(dim=1).float()
        return self._on_grid(model, mass / mass.sum(), states, steps or self.STEPS, given)

    def kernel(self, model, x, t, s):
        """Law of each slot after a step from t to s, [B, L, V]."""
        return self._log_kernel(model(x, t), x, t, s).exp()


# ---- helpers --------------------------------------------------------------------------------------------------------------

def every_sequence(W, length, device=None):
    """All W**L sequences, in the order of itertools.product(range(W), repeat=L) -> [W**L, L]."""
    return torch.cartesian_prod(*[torch.arange(W, device=device)] * length).view(-1, length)


def on_grid(t, steps):
    """The point k of the grid 1/N, ..., N/N nearest to time t."""
    return max(1, round(t * steps))


def push(mass, kernel):
    """Mass [W**L] over all sequences after a step in which the slots of each move by themselves, as kernel [W**L, L, W] says.
    The joint move of a sequence is the product of its halves' moves, so the sum over sequences is one matrix product."""
    def joint(moves):                                          # [S, l, W] -> [S, W**l]
        p = moves.new_ones(len(moves), 1)
        for move in moves.unbind(dim=1):
            p = (p[:, :, None] * move[:, None]).flatten(1)
        return p
    half = kernel.size(1) // 2
    return ((joint(kernel[:, :half]) * mass[:, None]).T @ joint(kernel[:, half:])).flatten()


def gumbel_like(logits, generator=None):
    """Standard Gumbel noise: argmax(logits + noise) is a draw from softmax(logits)."""
    return -torch.empty_like(logits).exponential_(generator=generator).log()


def capture(body, device):
    """body(), which works on fixed buffers, as a CUDA graph -> a function that replays it with one launch. Elsewhere body."""
    if device.type != "cuda":
        return body
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):                             # libraries set themselves up in their first calls, outside a capture
            body()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph.replay


def device_of(model):
    """Where a model's parameters live; the CPU for a callable without any."""
    parameters = getattr(model, "parameters", lambda: iter(()))()
    return next((p.device for p in parameters), torch.device("cpu"))
