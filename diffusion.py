"""Continuous-time Markov chains on tokens: corruption, score-entropy loss, concrete score, sampling, exact laws.

Shapes: B sequences, L slots, V clean tokens; token V is the mask M. Time t runs from 0 (data) to 1 (noise); alpha(t) is the
chance that a slot is still clean. A model is any callable (x, t) -> logits [B, L, V] of log p_theta(x0_i = v | x_t).
"""
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
import torch.nn.functional as F


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

    def state(self, j):
        """The state [B, L] that event j (int or [B, 1]) started from; from j = n_events on, the sample itself."""
        return torch.where(self.event >= j, self.mask, self.tokens)


def event_index(time):
    """Reveal times [B, L] -> their dense rank from the latest down, [B, L]; inf (never masked) gets -1."""
    value, order = time.sort(dim=1, descending=True)
    new = torch.ones_like(value, dtype=torch.bool)
    new[:, 1:] = value[:, 1:] < value[:, :-1]
    rank = new.cumsum(dim=1) - 1 - value[:, :1].isinf().long()
    return torch.empty_like(order).scatter_(1, order, rank)


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
    if hasattr(model, "hidden_at"):
        return model.head(model.hidden_at(x, t, slots))
    if hasattr(model, "hidden"):
        return model.head(rows(model.hidden(x, t)))
    return rows(model(x, t))


def stratified(n, generator=None, device=None):
    """n uniforms on [0, 1), one in each of n equal cells, in random order: each is uniform, together they are even."""
    cell = torch.randperm(n, generator=generator, device=device)
    return ((cell + torch.rand(n, generator=generator, device=device)) / n).clamp(max=1 - 2 ** -24)


# ---- the absorbing chain ----------------------------------------------------------------------------------------------

class Absorbing:
    """Masked diffusion: every slot turns into the mask, by itself, at a random time (SEDD, arXiv 2310.16834)."""

    def __init__(self, vocab_size, cuda_graph=False):
        self.vocab_size = self.mask = vocab_size
        self.graphs = {} if cuda_graph else None       # a captured pass for each model and shape; weights change in place

    def alpha(self, t):
        """Chance that a slot is still clean at time t."""
        return 1 - t

    def alpha_inverse(self, a):
        """The time at which alpha is a: a uniform on [0, 1) gives the time at which a slot is masked."""
        return 1 - a

    # -- forward

    def corrupt(self, x0, t, generator=None):
        """x_t ~ q_t(. | x0): x0 [B, L], t [B] -> [B, L]."""
        clean = torch.rand(x0.shape, generator=generator, device=x0.device) < self.alpha(t)[:, None]
        return torch.where(clean, x0, self.mask)

    def reveal_times(self, given, steps=None, generator=None):
        """When each slot of the reverse chain is revealed, [B, L]; inf where `given`. No time depends on any token, so all
        are drawn before the first pass. With a grid of N steps, a step from t to s = t - 1/N reveals at its start t."""
        a = torch.rand(given.shape, generator=generator, device=given.device)
        time = self.alpha_inverse(a)
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

    def loss(self, model, x0, generator=None):
        """Denoising score entropy (SEDD, 2310.16834) of x0 [B, L] under the derived score -> scalar, nats a sequence: a
        bound on -log p_theta(x0). With an absorbing chain it is MDLM's weighted cross-entropy (2406.07524)."""
        view = self.noised_view(x0, torch.zeros_like(x0, dtype=torch.bool), generator)
        logp = self.log_law(model, view).gather(-1, view.y[..., None]).squeeze(-1)                   # [B, L]
        return -(view.weight * logp).sum() / len(x0)

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

    def sample(self, model, batch, length, steps=None, prompt=None, generator=None):
        """Draw `batch` sequences -> Path. steps: a grid of N steps, or None for none (no discretisation error); prompt
        [L] or [batch, L]: the mask where a slot is free, else the token that it keeps. Costs at most min(N, L) passes."""
        device = generator.device if generator is not None else device_of(model)
        x = torch.full((batch, length), self.mask, device=device)
        if prompt is not None:
            x = prompt.to(device).expand(batch, length).clone()
        return self.reveal(model, x, self.reveal_times(x != self.mask, steps, generator), None, generator, prompt is None)

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
            logits = model.head(model.hidden(x[:1, :L], None))[0][slots]                             # [n, k, V]
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

    # -- views of a path

    def view(self, path, row, event):
        """The states from which events [n] of paths row [n] started, with the slots that they revealed -> View of weight 1."""
        x, index, event = path.tokens[row], path.event[row], event[:, None]
        real, slots = (index == event).float().topk(path.width, dim=1)                               # [n, k]
        t = path.time[row].gather(1, slots[:, :1]).squeeze(1)
        return View(row, torch.where(index >= event, self.mask, x), t.clamp(max=1), slots, x.gather(1, slots), real,
                    path.logp[row].gather(1, slots))

    def path_view(self, path, events=1, generator=None):
        """`events` states that the sampler visited on each path, even over its events and stratified over the batch."""
        B, device = len(path.tokens), path.tokens.device
        row = torch.arange(B, device=device).repeat(events)
        stratum = torch.arange(events, device=device).repeat_interleave(B)
        u = (stratum + stratified(B, generator, device).repeat(events)) / events
        n = path.n_events[row]
        view = self.view(path, row, torch.minimum((u * n).long(), (n - 1).clamp(min=0)))    # u may round to 1
        view.weight = view.weight * (n / events)[:, None]
        return view

    def terminal_view(self, path, generator=None):
        """The final sample with one of its free slots masked again, drawn uniformly (t -> 0) -> View."""
        free = ~path.given
        slots = torch.rand(free.shape, generator=generator, device=free.device).masked_fill(~free, -1).argmax(1, keepdim=True)
        row = torch.arange(len(free), device=free.device)
        weight = (free.sum(dim=1, keepdim=True) * free.gather(1, slots)).float()
        return View(row, path.tokens.scatter(1, slots, self.mask), torch.zeros(len(free), device=free.device),
                    slots, path.tokens.gather(1, slots), weight)

    @torch.no_grad()
    def replay(self, model, path, chunk=None):
        """log-probability under `model` of every transition of the path, as `path.logp` has it -> [B, L], nats. The states
        are known, so the events of all rows are scored together, `chunk` states (default: B) a pass."""
        E, device = int(path.n_events.max()), path.tokens.device
        row, event = (torch.arange(E, device=device) < path.n_events[:, None]).nonzero(as_tuple=True)
        logp = torch.zeros_like(path.logp)
        for r, e in zip(row.split(chunk or len(path.tokens)), event.split(chunk or len(path.tokens))):
            view = self.view(path, r, e)
            new = self.log_law(model, view).gather(-1, view.y[..., None]).squeeze(-1) * view.weight  # [n, k]
            logp.index_put_((r[:, None], view.slots), new, accumulate=True)
        return logp

    # -- exact law of small spaces

    def exact_law(self, model, length, steps=None, prompt=None):
        """Law of `sample` over the V**L sequences, in the order of itertools.product(range(V), repeat=L) -> [V**L],
        differentiable. Walks all (V+1)**L partly masked states, so it is for small spaces; with a grid, N times over."""
        V, device = self.vocab_size, device_of(model)
        base = (V + 1) ** torch.arange(length - 1, -1, -1, device=device)                            # place values
        states = torch.cartesian_prod(*[torch.arange(V + 1, device=device)] * length).view(-1, length)
        start = torch.full((length,), self.mask, device=device) if prompt is None else prompt.to(device)
        mass = F.one_hot((start * base).sum(), len(states)).float()
        flow = self._flow_exact if steps is None else self._flow_grid
        return flow(model, mass, states, base, steps)[(states < V).all(dim=1)]

    def _flow_exact(self, model, mass, states, base, _):
        """One slot at a time, each masked slot equally likely to be next. No time is passed on: a model that reads it has a
        law that depends on the continuous reveal times, which only a grid makes finite."""
        V, masks = self.vocab_size, (states == self.mask).sum(dim=1)
        for m in range(states.size(1), 0, -1):
            index = (masks == m).nonzero().squeeze(1)
            index = index[mass.detach()[index] > 0]
            if len(index):
                p = model(states[index], None).softmax(dim=-1)                                       # [S, L, V]
                b, i = (states[index] == self.mask).nonzero(as_tuple=True)
                target = index[b, None] + (torch.arange(V, device=mass.device) - V) * base[i, None]
                mass = mass.index_add(0, target.flatten(), (mass[index][b, None] * p[b, i] / m).flatten())
        return mass

    def _flow_grid(self, model, mass, states, base, steps):
        """N steps from t to s: each masked slot, by itself, is revealed with chance (alpha_s - alpha_t) / (1 - alpha_t)."""
        V, L, M = self.vocab_size, states.size(1), self.mask
        moves = [(v, v) for v in range(V)] + [(M, v) for v in range(V + 1)]
        pairs = torch.tensor(list(product(moves, repeat=L)), device=mass.device)                     # [(2V+1)^L, L, 2]
        source, target = (pairs * base[:, None]).sum(dim=1).unbind(dim=1)
        for k in range(steps, 0, -1):
            t, s = (torch.full((len(states),), n / steps, device=mass.device) for n in (k, k - 1))
            hazard = ((self.alpha(s) - self.alpha(t)) / (1 - self.alpha(t)))[:, None, None]
            move = torch.cat((hazard * model(states, t).softmax(dim=-1), (1 - hazard).expand(-1, L, 1)), dim=-1)
            move = torch.where((states == M)[..., None], move, F.one_hot(states, V + 1).float())     # [S, L, V+1]
            kernel = move[source].gather(-1, pairs[:, :, 1:]).squeeze(-1).prod(dim=1)
            mass = torch.zeros_like(mass).index_add(0, target, mass[source] * kernel)
        return mass


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
