"""Continuous-time Markov chains on tokens: corruption, training loss, concrete score, sampling.

Shapes: B sequences of L positions, V clean tokens; token V is the mask M. Time t runs from 0 (data)
to 1 (noise) and is the noise level: a position is still clean with probability alpha = 1 - t.
A model is any callable (x, t) -> logits [B, L, V] of log p_theta(x0_i = v | x_t).

Reading order: the path of a sampler, as a table of transitions, and one pass of it as a CUDA graph;
what both chains share; the absorbing chain (masks); the uniform chain (random letters); exact
distributions of small spaces. The two chains define the same methods in the same order.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOG_ZERO = -1e30    # logits of -inf become finite, so that a weight of 0 times them is 0, not NaN


def device_of(model, default=torch.device("cpu")):
    """Where the model's parameters live; the default for a plain function."""
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else []
    return next((p.device for p in parameters), default)


def pick(log_p, y):
    """The entries of log_p [..., V] at tokens y [...] -> [...]."""
    return log_p.gather(-1, y[..., None]).squeeze(-1)


def gumbel_argmax(logits):
    """Tokens from softmax(logits) [..., V] -> [...]: the argmax after adding Gumbel noise.

    The noise is float64: float32 exponentials end at 2^-24 on a GPU, so that among many letters the
    unlikely ones would never be drawn."""
    exponential = torch.empty_like(logits, dtype=torch.double).exponential_()
    return (logits - exponential.log()).argmax(dim=-1)


def stratified(n, device=None):
    """n uniforms on [0, 1), one in each of n equal cells, shuffled: less variance than rand(n).
    float64, since float32 would round some of them up to 1."""
    u = torch.rand(n, device=device, dtype=torch.double)
    return (torch.randperm(n, device=device) + u) / n


def none_given(x):
    """No position of x [B, L] belongs to a prompt -> bool [B, L]."""
    return torch.zeros_like(x, dtype=torch.bool)

# -----------------------------------------------------------------------------
# the path of a sampler

@dataclass
class Path:
    """n transitions of B sequences: the steps of the reverse process in which something was drawn.

    The transitions of one sequence are in the order of the reverse process. x takes n L integers:
    41 MB for 128 sequences of 200 masks."""
    row: Tensor                         # [n]     which sequence
    x: Tensor                           # [n, L]  the state before
    t: Tensor                           # [n]     its time
    s: Tensor                           # [n]     the time after
    positions: Tensor                   # [n, k]  where tokens were drawn
    y: Tensor                           # [n, k]  the tokens drawn
    scored: Tensor                      # [n, k]  False: padding, or given
    logp: Tensor | None                 # [n, k]  their log-probability when drawn, nats; None: not
                                        #         known; 0 where not scored
    weight: Tensor                      # [n]     sum(weight * f) is the mean over sequences of the
                                        #         sum of f over their transitions
    batch: int                          # B

    def __len__(self):
        return len(self.row)

    def __getitem__(self, index):
        """Some transitions, their weights as they are; index: a slice or a tensor [m] or [n]."""
        values = vars(self).values()
        return Path(*(v[index] if isinstance(v, Tensor) else v for v in values))

    def subset(self, transitions):
        """So many random transitions of each sequence (0: all); weights are scaled, so that
        weighted sums stay unbiased."""
        if not transitions or not len(self):
            return self
        count = self.row.bincount(minlength=self.batch)                                 # [B]
        first = count.cumsum(dim=0) - count
        cell = torch.arange(transitions, device=self.row.device)[:, None]
        u = (cell + stratified(self.batch, self.row.device)) / transitions  # one per cell: [k, B]
        nth = (first + (u * count).long()).flatten()
        in_order = self.row.argsort(stable=True)
        part = self[in_order[nth.clamp(max=len(self) - 1)]]
        part.row = torch.arange(self.batch, device=self.row.device).repeat(transitions)
        part.weight = part.weight * count[part.row] / transitions
        part.scored = part.scored & (part.weight > 0)[:, None]      # without a transition: nothing
        return part

    def per_sequence(self, values):
        """The sum of values [n, k] (or [n], one per transition) over each sequence -> [B]."""
        if values.dim() == 2:
            values = (values * self.scored).sum(dim=1)
        return values.new_zeros(self.batch).index_add(0, self.row, values)


def should_capture(model, x, sizes):
    """Where launches cost: on a GPU, for passes of one size, and batches [B, L] that do not fill it
    by themselves; not where somebody else's autocast keeps casts of the weights."""
    is_allowed = x.is_cuda and getattr(model, "can_be_captured", False)
    is_plain = not (torch.is_autocast_enabled("cuda") or torch.is_inference_mode_enabled())
    return is_allowed and is_plain and len(set(sizes)) == 1 and x.numel() <= 2 ** 16


class CapturedPass:
    """One pass of a sampler as a CUDA graph: one launch in place of a hundred.

    A graph works on the memory that it was captured on: so a draw copies its plan to `path`, and
    its result from there. now [size]: the transitions of the next pass."""

    def __init__(self, process, model, x, path, size):
        self.process, self.model, self.size = process, model, size
        self.all = torch.arange(len(path), device=x.device)
        self.tokens, self.path, self.now = x.clone(), path[self.all], self.all[:size].clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.random.fork_rng([x.device]):
            self.one_pass()                             # the libraries allocate what they need
        with torch.cuda.graph(self.graph, stream=torch.cuda.Stream(x.device)):
            self.one_pass()

    def one_pass(self):
        self.process.one_pass(self.model, self.tokens, self.path, self.now)
        self.now += self.size

    def __call__(self, x, path):
        self.now.copy_(self.all[:self.size])
        self.tokens.copy_(x)
        for mine, planned in zip(vars(self.path).values(), vars(path).values()):
            if isinstance(mine, Tensor):
                mine.copy_(planned)
        for _ in range(len(path) // self.size):
            self.graph.replay()
        return self.tokens.clone(), self.path[self.all]

# -----------------------------------------------------------------------------
# what both chains share

class Chain:
    """A chain defines noise, losses, log_score, log_probs, plan, path_to, jump_probs, start and
    kernel; everything else is here."""

    default_steps = None

    def __init__(self, vocab_size, steps=None, chunk=None):
        self.vocab_size = vocab_size
        self.mask = vocab_size                      # in a prompt, on both chains: a free position
        self.steps = steps or self.default_steps    # of the time grid per unit of time; None: none
        self.chunk = chunk or 2048                  # states per forward pass of `logp`
        self.graphs = {}                            # of passes of the sampler, on a GPU

    def is_small(self, length):
        """Can exact_law walk every partly masked sequence, in every step of the grid?"""
        states = (self.vocab_size + 1) ** length
        return states <= 100_000 and states * (self.steps or 1) <= 1_000_000

    def logits(self, model, x, t, positions=None):
        """The model's logits at positions [n, k] -> [n, k, V], or at all (None) -> [n, L, V]; a
        Denoiser computes no others. Another model may give -inf: here that becomes finite."""
        picks = hasattr(model, "logits_at")
        logits = model.logits_at(x, t, positions) if picks else model(x, t)
        where = x if positions is None or not picks else positions
        if logits.shape != (*where.shape, self.vocab_size):
            raise ValueError(f"the model returned logits {tuple(logits.shape)} for tokens "
                             f"{tuple(x.shape)}: it must return [B, L, {self.vocab_size}], without "
                             "a logit for the mask")
        if picks:
            return logits
        logits = logits.float().clamp(min=LOG_ZERO)
        return logits if positions is None else logits.take_along_dim(positions[..., None], dim=1)

    def corrupt(self, x0, t):
        """x_t ~ q_t(. | x0): x0 [B, L], t [B] -> [B, L]."""
        is_clean = torch.rand(x0.shape, device=x0.device) < (1 - t)[:, None]
        return torch.where(is_clean, x0, self.noise(x0))

    def loss(self, model, x0, given=None):
        """Score entropy of the data x0 [B, L] -> scalar, in nats per sequence.

        An estimate of a bound on -log p_theta(x0); with positions `given` [B, L], on minus the
        log-probability of the others given these. (Uniform cuts its integral: see there.)"""
        return self.losses(model, x0, none_given(x0) if given is None else given).mean()

    def sample(self, model, batch, length, prompt=None):
        """Draw sequences -> tokens [batch, length], Path.

        prompt: [length] or [batch, length], the mask where a position is free; the others are
        given. The absorbing chain needs no time grid, and has no discretization error without."""
        if prompt is None:
            prompt = torch.full((length,), self.mask)
        is_tokens = isinstance(prompt, Tensor) and prompt.dtype == torch.long
        if not is_tokens or prompt.shape[-1:] != (length,) or not (
                0 <= prompt.min() <= prompt.max() <= self.mask):
            raise ValueError(f"a prompt is an int64 tensor of {length} tokens from 0 to {self.mask}"
                             f", where {self.mask} is a free position")
        prompt = prompt.to(device_of(model, prompt.device)).expand(batch, length)
        given = prompt != self.mask
        x = torch.where(given, prompt, self.noise(prompt))
        return self.reverse(model, x, *self.plan(x, given, 1.0))

    @torch.no_grad()
    def reverse(self, model, x, path, sizes):
        """The reverse process from the state x [B, L], along a path that is planned but for what is
        drawn, `sizes` of its transitions per pass -> tokens, Path."""
        if should_capture(model, x, sizes):
            if graph := self.captured(model, x, path, sizes[0]):
                return graph(x, path)
        tokens, begin = x.clone(), 0
        for size in sizes:
            self.one_pass(model, tokens, path, slice(begin, begin + size))
            begin += size
        return tokens, path

    def one_pass(self, model, tokens, path, index):
        """Draw the transitions `index` of a path, in place: the tokens [B, L] move on."""
        now = path[index]
        path.x[index] = now.x = tokens[now.row]
        log_p = self.log_probs(model, now)                                              # [m, k, V]
        path.y[index] = y = gumbel_argmax(log_p)
        path.logp[index] = pick(log_p, y) * now.scored
        before = now.x.gather(1, now.positions)
        tokens[now.row[:, None], now.positions] = torch.where(now.scored, y, before)

    def captured(self, model, x, path, size):
        """The graph of a pass, for draws of these shapes with weights in the same place; None for
        the first of them, since most shapes never come again."""
        weights = tuple(p.data_ptr() for p in model.parameters())
        kind = model.training, getattr(model, "autocast", None)
        key = model, weights, kind, size, x.shape, path.positions.shape
        if key not in self.graphs:
            if len(self.graphs) == 4:
                self.graphs.clear()
            self.graphs[key] = None
        elif self.graphs[key] is None:
            self.graphs[key] = CapturedPass(self, model, x, path, size)
        return self.graphs[key]

    def logp(self, model, path):
        """Log-probability under `model` of all that a path drew -> [n, k], nats; 0 where nothing
        is scored.

        The states of a path are known, so they are scored together, `chunk` of them per forward
        pass. If there is more than one pass, each is recomputed in the backward pass, so that the
        memory of activations is that of one chunk."""
        def score(part):
            return pick(self.log_probs(model, part), part.y) * part.scored

        if len(path) <= self.chunk:
            return score(path)
        parts = [path[i:i + self.chunk] for i in range(0, len(path), self.chunk)]
        return torch.cat([checkpoint(score, part, use_reentrant=False, preserve_rng_state=False)
                          for part in parts])

    @torch.no_grad()
    def correct(self, model, x, t, moves, given=None):
        """Moves of the chain with generator Q_t + reverse Q_t at a fixed time t: x -> x [B, L].

        The predictor-corrector of 2205.14987 and the gradient flow of SEPO (2502.01384). With a
        consistent model, one whose conditionals are those of one distribution, it leaves p_t
        invariant and brings any other distribution closer to it. Uniformized: a move picks one
        position per row, which jumps with probability rate / (bound of the rate), so that the
        invariant distribution has no step error."""
        given = none_given(x) if given is None else given
        t = torch.full((len(x),), t, device=x.device)
        for _ in range(moves):
            u = torch.rand(x.shape, device=x.device)
            position = (u * ~given).argmax(dim=1, keepdim=True)                         # [B, 1]
            p = self.jump_probs(model, x, t, position)                                  # [B, W]
            stay = (1 - p.sum(dim=1, keepdim=True)).clamp(min=0)
            p = p.scatter(1, x.gather(1, position), stay)
            new = gumbel_argmax(p.log())[:, None]
            x = torch.where(given, x, x.scatter(1, position, new))  # a row may be given entirely
        return x

    def correct_path(self, model, tokens, given, t, moves):
        """Samples [B, L] are noised again up to time t, corrected there and drawn anew -> tokens,
        and the path from t on."""
        if self.steps:
            t = max(1, round(t * self.steps)) / self.steps
        noised = self.corrupt(tokens, torch.full_like(tokens[:, 0], t, dtype=torch.float))
        x = self.correct(model, torch.where(given, tokens, noised), t, moves, given)
        return self.reverse(model, x, *self.plan(x, given, t))

    def exact_law(self, model, length):
        """Distribution of `sample` over all V**L sequences, in itertools.product order
        -> float64 [V**L].

        Differentiable. It walks all (partly masked) states, once, or N times with a grid. Without
        one, the time of a state with m masks is the mean m / (L + 1), so that the result is exact
        for models that do not read the time."""
        if not self.is_small(length):
            raise ValueError(f"{self.vocab_size} letters at {length} positions are too many "
                             "sequences to enumerate")
        states, mass = self.start(length, device_of(model))
        push = push_through_grid if self.steps else push_without_grid
        return push(self, model, states, mass)[(states < self.vocab_size).all(dim=1)]

# -----------------------------------------------------------------------------
# the absorbing chain

class Absorbing(Chain):
    """Masked diffusion: each position turns into the mask, independently, at a random time (SEDD).
    """

    # corruption and training loss

    def noise(self, x):
        """The state at time 1, shaped as tokens x [B, L]: masks."""
        return torch.full_like(x, self.mask)

    def mask_some(self, x0, given):
        """x_t ~ q(. | x0) at a random noise level -> x [B, L]; t [B]; masked [B, L]; n/m [B].

        m [B] is uniform on 1..n of the n free positions, and m of them, at random, are masked."""
        time = torch.rand(x0.shape, device=x0.device, dtype=torch.double)      # no grid: no ties
        time = time.masked_fill(given, math.inf)
        n = (~given).sum(dim=1)                                                         # [B]
        m = 1 + (stratified(len(x0), x0.device) * n).long()
        t = time.sort(dim=1).values.gather(1, m[:, None] - 1)                           # [B, 1]
        masked = (time <= t) & ~given                   # the m positions that are revealed last
        x = torch.where(masked, self.mask, x0)
        return x, t[:, 0].clamp(max=1).float(), masked, n / m

    def losses(self, model, x0, given):
        """Denoising score entropy of x0 [B, L] at one random number of masks -> [B], nats.

        On the absorbing chain it is MDLM's weighted cross-entropy (2406.07524), here in any-order
        form (ARDM, 2110.02037): the mean over m of n/m times the masked positions' cross-entropy.
        """
        x, t, masked, weight = self.mask_some(x0, given)
        logp = pick(self.logits(model, x, t).log_softmax(dim=-1), x0)                   # [B, L]
        return -weight * (masked * logp).sum(dim=1)

    # concrete score

    def log_score(self, model, x, t):
        """log s(x, t)_{i,v} = log p_t(x with position i set to v) - log p_t(x) -> [B, L, V].

        At a mask, s = p_theta(v | x) alpha / (1 - alpha) (RADD, 2406.03736). A revealed position
        cannot change: 0 at its own token, -inf elsewhere."""
        odds = (1 - t) / t
        masked = self.logits(model, x, t).log_softmax(dim=-1) + odds.log()[:, None, None]
        revealed = F.one_hot(x, self.vocab_size + 1)[..., :-1].log()
        return torch.where((x == self.mask)[..., None], masked, revealed)

    def log_probs(self, model, path):
        """log w = log_softmax_v(log s(x)_{i,v}) at the positions of a path -> [n, k, V].

        alpha / (1 - alpha) cancels: w is what the sampler draws the token from."""
        return self.logits(model, path.x, path.t, path.positions).log_softmax(dim=-1)

    # sampling

    def reveal_times(self, free, start=1.0):
        """The time at which each free position is revealed, from `start` down -> float64 [B, L];
        inf where not free. In float32 some rows would reveal two positions at once.

        It does not depend on any token, so all times are drawn before the first forward pass.
        On a grid of N steps, the step from t to t - 1/N reveals at its start t."""
        time = start * torch.rand(free.shape, device=free.device, dtype=torch.double)
        if self.steps:
            time = (time * self.steps).ceil().clamp(min=1) / self.steps
        return time.masked_fill(~free, math.inf)

    def plan(self, x, given, t):
        """The reverse process from the state x [B, L] at time t, but for its tokens -> Path, and
        how many transitions there are per pass.

        The samples have the distribution of ancestral sampling (MDLM, 2406.07524) on N steps:

            for k in range(N, 0, -1):
                p = model(x, k / N).softmax(dim=-1)                     # [B, L, V]
                y = torch.multinomial(p.flatten(0, 1), 1).view_as(x)    # a token for every position
                now = torch.rand(x.shape) < 1 / k                       # is it revealed?
                x = torch.where((x == mask) & now, y, x)

        Most of these steps reveal nothing in most rows. Here each row goes from one of its own
        transitions to the next (2409.02908): pass j makes the j-th transition of every row that
        still has one. Rows that are done leave the batch, and only the positions that are revealed
        reach the output head."""
        return self.transitions(x, self.reveal_times(x == self.mask, t))

    def transitions(self, tokens, time):
        """Reveal times [B, L] -> Path, sorted by pass, and the number of transitions in each pass:
        pass j makes the j-th transition of every sequence that has one."""
        ordered, at = time.sort(dim=1, descending=True)
        is_new = ordered < F.pad(ordered[:, :-1], (1, 0), value=math.inf)   # inf, given: never
        rank = (is_new.cumsum(dim=1) - 1).short()       # equal times share one
        turn = torch.empty_like(rank).scatter(1, at, rank)      # [B, L]  when; -1: given
        each = torch.arange(time.size(1), device=time.device)[:, None, None]
        now, row = (turn == each).any(dim=2).nonzero(as_tuple=True)                     # [n]
        is_drawn = turn[row] == now[:, None]                                            # [n, L]
        k = F.pad(is_drawn.sum(dim=1), (0, 1), value=1).max().item()        # the most, or 1
        scored, positions = is_drawn.byte().topk(k, dim=1)                              # [n, k]
        x = tokens[row].masked_fill_(turn[row] >= now[:, None], self.mask)
        t = time[row, positions[:, 0]]
        s = t - 1 / self.steps if self.steps else t     # without a grid a reveal takes no time
        y = tokens[row[:, None], positions]
        logp = torch.zeros_like(y, dtype=torch.float)
        weight = torch.full_like(t, 1 / len(time), dtype=torch.float)
        path = Path(row, x, t.float(), s.float(), positions, y, scored > 0, logp, weight, len(time))
        return path, now.bincount().tolist()

    def path_to(self, tokens, given=None):
        """A path of the forward process from tokens [B, L], read backwards -> Path without logp.
        Its reveal times are new; positions `given` [B, L] are never masked."""
        given = none_given(tokens) if given is None else given
        path, _ = self.transitions(tokens, self.reveal_times(~given))
        return replace(path, logp=None)

    # corrector

    def jump_probs(self, model, x, t, position):
        """Probability of each token [B, V+1] for a position [B, 1] in a corrector move; 0 at its
        own.

        Rates: 1 to the mask, p(v | x) odds from it; divided by their sum 1 + odds. The larger of
        both would do as a bound, but where they are equal every position would always jump."""
        odds = ((1 - t) / t)[:, None]                                                   # [B, 1]
        p = self.logits(model, x, t, position).squeeze(1).softmax(dim=-1)               # [B, V]
        is_masked = x.gather(1, position) == self.mask
        rate = torch.cat((torch.where(is_masked, p * odds, 0), ~is_masked), dim=1)
        return rate / (1 + odds)

    # exact distribution

    def start(self, length, device):
        """All partly masked states [S, L], and their mass at time 1, float64 [S]."""
        states = every_sequence(self.vocab_size + 1, length, device)
        return states, (states == self.mask).all(dim=1).double()

    def kernel(self, model, x, t, s):
        """Distribution of each position after a step from t [B] to s [B] -> float64 [B, L, V+1]."""
        chance = ((t - s) / t)[:, None]                 # that a mask is revealed
        move = (chance * (x == self.mask))[..., None]                                   # [B, L, 1]
        p = F.pad(self.logits(model, x, t.float()).double().softmax(dim=-1), (0, 1))
        return torch.lerp(F.one_hot(x, self.vocab_size + 1).double(), p, move)

# -----------------------------------------------------------------------------
# the uniform chain

class Uniform(Chain):
    """Each position is redrawn from all V letters, independently, at a random time:
    q_t(v | x0) = alpha [v = x0] + (1 - alpha) / V.

    Any position may change at any time, so sampling needs a grid. The model must read the time: a
    corrupted letter looks like a clean one."""

    default_steps = 16
    CUT = 1e-6                          # the training loss integrates over noise levels above it

    # corruption and training loss

    def noise(self, x):
        """The state at time 1, shaped as tokens x [B, L]: random letters."""
        return torch.randint(self.vocab_size, x.shape, device=x.device)

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

    def log_mean_ratio(self, logits, x, t, s):
        """log E_{x0 ~ p(. | x_t)}[q_s(v | x0) / q_t(x | x0)] -> [n, k, V]; x [n, k], t, s [n].

        `transition(x, 1 - t)` is q_t(. | x), and q_t is symmetric, q_t(x0 | x) = q_t(x | x0): so it
        holds the denominator for every x0. What q_s(v | x0) keeps of x0 needs no sum over x0; what
        it redraws has the same sum for every v."""
        log_p = logits.log_softmax(dim=-1) - self.transition(x, 1 - t).log()
        s = s[:, None, None]
        redrawn = log_p.logsumexp(dim=-1, keepdim=True) + (s / self.vocab_size).log()
        return torch.logaddexp(redrawn, log_p + (1 - s).log())

    def log_score(self, model, x, t):
        """log s(x, t)_{i,v} = log p_t(x with position i set to v) - log p_t(x) -> [B, L, V]; t > 0.
        """
        return self.log_mean_ratio(self.logits(model, x, t), x, t, t)

    def log_kernel(self, logits, x, t, s):
        """log p(x_s = v | x_t = x) -> [B, L, V], by Bayes' rule (D3PM, 2107.03006)."""
        step = self.transition(x, (1 - t) / (1 - s))
        return self.log_mean_ratio(logits, x, t, s) + step.log()

    def log_probs(self, model, path):
        """log w at every position of a path's states, the sampler's kernel from t to s
        -> [n, L, V]."""
        return self.log_kernel(self.logits(model, path.x, path.t), path.x, path.t, path.s)

    # sampling

    def plan(self, x, given, t):
        """The reverse process from the state x [B, L] at time t, but for its tokens -> Path, and
        how many transitions there are per pass: every position moves in every step of the grid."""
        N, (B, L) = round(t * self.steps), x.shape
        row = torch.arange(B, device=x.device).repeat(N)
        step = torch.arange(N, 0, -1, device=x.device).repeat_interleave(B)
        positions = torch.arange(L, device=x.device).expand(N * B, L)
        states = x.repeat(N, 1)                                                         # [N B, L]
        logp = torch.zeros_like(states, dtype=torch.float)
        weight = torch.full_like(row, 1 / B, dtype=torch.float)
        t, s = step / self.steps, (step - 1) / self.steps
        path = Path(row, states, t, s, positions, states.clone(), ~given[row], logp, weight, B)
        return path, [B] * N

    def path_to(self, tokens, given=None):
        """A path of the forward process from tokens [B, L], read backwards -> Path without logp.
        Positions `given` [B, L] never change."""
        given = none_given(tokens) if given is None else given
        states = [tokens]
        for k in range(self.steps):                     # from s = k / N up to t = (k + 1) / N
            chance = 1 - 1 / (self.steps - k)           # (1 - t) / (1 - s)
            is_kept = torch.rand(tokens.shape, device=tokens.device) < chance
            states.append(torch.where(is_kept | given, states[-1], self.noise(tokens)))
        path, _ = self.plan(tokens, given, 1.0)
        return replace(path, x=torch.cat(states[:0:-1]), y=torch.cat(states[-2::-1]), logp=None)

    # corrector

    def jump_probs(self, model, x, t, position):
        """Probability of each letter [B, V] for a position [B, 1] in a corrector move; 0 at its
        own.

        Rates: 1/V forward plus s_v/V back, divided by a bound of their sum."""
        token = x.gather(1, position)
        logits = self.logits(model, x, t, position)
        score = self.log_mean_ratio(logits, token, t, t).squeeze(1).exp()
        bound = 1 + 1 / t[:, None]
        return ((1 + score) / self.vocab_size / bound).scatter(1, token, 0)

    # exact distribution

    def start(self, length, device):
        """All sequences [S, L], and their mass at time 1, float64 [S]."""
        states = every_sequence(self.vocab_size, length, device)
        return states, torch.full_like(states[:, 0], 1 / len(states), dtype=torch.double)

    def kernel(self, model, x, t, s):
        """Distribution of each position after a step from t [B] to s [B] -> float64 [B, L, V]."""
        return self.log_kernel(self.logits(model, x, t.float()).double(), x, t, s).exp()


CHAINS = {"absorb": Absorbing, "uniform": Uniform}

# -----------------------------------------------------------------------------
# exact distributions of small spaces

def every_sequence(W, length, device):
    """All W**L sequences, in itertools.product order -> [W**L, L]."""
    letters = torch.arange(W, device=device)
    return torch.cartesian_prod(*[letters] * length).view(-1, length)


def push_without_grid(process, model, states, mass):
    """Push the mass [(V+1)**L] of all partly masked states to the sequences without a mask: reveal
    one position at a time, every mask being equally likely to be the next."""
    V, L = process.vocab_size, states.size(1)
    power = (V + 1) ** torch.arange(L - 1, -1, -1, device=mass.device)  # of a state's number
    change = torch.arange(V, device=mass.device) - V                    # mask -> token v
    s, i = (states == V).nonzero(as_tuple=True)             # every mask of every state
    target = s[:, None] + change * power[i, None]                                   # [n, V]
    masked, row = s.unique(return_inverse=True)             # the states with a mask
    t = (states[masked] == V).sum(dim=1) / (L + 1)
    p = process.logits(model, states[masked], t)[row, i].double().softmax(dim=-1)   # [n, V]
    for m in range(L, 0, -1):                               # all mass is on states of m masks
        flow = mass[s, None] * p / m
        mass = torch.zeros_like(mass).index_add(0, target.flatten(), flow.flatten())
    return mass


def push_through_grid(process, model, states, mass):
    """Push the mass [W**L] of all states through the N steps of the grid -> [W**L]."""
    N = process.steps
    for k in range(N, 0, -1):
        t, s = torch.full_like(mass, k / N), torch.full_like(mass, (k - 1) / N)
        kernel = process.kernel(model, states, t, s)                                # [W**L, L, W]
        # positions move independently, so the move of a whole sequence is the product of the moves
        # of its halves, and the sum over all starting states is one matrix product
        left, right = map(joint_distribution, kernel.tensor_split(2, dim=1))
        mass = torch.einsum("s,sa,sb->ab", mass, left, right).flatten()
    return mass


def joint_distribution(positions):
    """Distributions of l independent positions [S, l, W] -> their joint distribution [S, W**l]."""
    joint = positions.new_ones(len(positions), 1)
    for p in positions.unbind(dim=1):
        joint = torch.einsum("sa,sb->sab", joint, p).flatten(1)
    return joint
