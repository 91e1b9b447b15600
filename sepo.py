"""Policy optimization on paths of a discrete diffusion model: SEPO, LOOP, PRDP, WDCE.

SEPO (Score Entropy Policy Optimization, 2502.01384) is a policy gradient for models that are known
through their concrete score s(x)_y = p(y) / p(x). With advantages A of the samples x,
    grad E[R] = -E_x[A(x) sum_{y != x} p(y) grad log s(x)_y]                                   (1)
What we do, and where it differs from the paper and its code:
- The paper takes (1) at final samples. We take it at states that the sampler visited on its path,
  and there at the slots that were revealed next.
- The paper sums over the L (V - 1) sequences y that differ from x in one slot, which biases (1).
  We condition on the line of such sequences, given all other slots; there the sum is exact.
- The paper estimates p(y) by importance sampling, in hundreds of passes. On the line p(y) is the
  distribution w = softmax(log s) of the slot: one pass, and one importance ratio per token.
- The paper caps the ratio in a detached coefficient (clip_mode="cap"). Our default is PPO's clip.
- Their code can add a KL to the loss. We subtract beta log p(path)/p_ref(path) from the reward.
The paper's own estimator is `published_loss`.

A path has B = P * G samples, G for each of P prompts. The objective is J = E[R] - beta KL(p ||
p_ref), with the KL of paths in nats. The losses of SEPO and LOOP take (process, model, view,
advantages). All losses change nothing and return (loss, clip_fraction). Only `published_loss`
knows a chain: it needs masks.

Off policy, too: let d = beta log p_theta(path)/p_ref(path) - R. For any distribution q over paths,
    grad Var_q(d) / (2 beta) = -E_q[A grad log p_theta(path)],   A = -d + E_q[d]
(VarGrad, 2010.10436; trajectory balance, 2201.13259). For q = p_theta it is the gradient of -J; for
q = new paths to remembered samples it still has its only zero at p* ~ p_ref exp(R / beta). So a
rollout can be learned from again and again, with the same losses and no importance weights.

Reading order: what a sample is worth; SEPO; LOOP and PRDP; weighted denoising; SEPO as published;
the exact optimum.
"""
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusion import device_of, every_sequence, gumbel_argmax, logits_at, pick, stratified

# -----------------------------------------------------------------------------
# what a sample is worth

class Baseline:
    """Running mean of the returns, for advantages of kind `running`."""

    def __init__(self, decay=0.9):
        self.decay = decay
        self.mean = self.weight = 0.0

    def update(self, returns):
        """Fold in a rollout (a tensor of any shape), after its advantages were taken."""
        self.weight = self.decay * self.weight + 1 - self.decay
        rate = (1 - self.decay) / self.weight           # 1 at first: no bias towards the zero
        self.mean += rate * (returns.mean().item() - self.mean)

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update(state)


def advantages(returns, kind="grpo", baseline=None, scale=None):
    """Returns [P, G] (rewards, minus what the KL costs) -> advantages [P, G].

    grpo     (R - group mean) / scale                               (GRPO, 2402.03300)
    loo      R - mean of the others in the group                    (LOOP, 2503.00897)
    running  R - m, with m the running mean of the returns          (REINFORCE with a Baseline)

    scale: one number per rollout, from `reward_scale`; None: that of the returns themselves.
    loo is unbiased. running is too, but for the first rollout, whose own mean is m. With grpo the
    scale depends on the same samples, so that small groups point elsewhere: on a space of four
    sequences the expected gradient has a cosine of 0.877 with the true one for G = 2, and 0.997
    for G = 6 (tests/test_sepo.py). The only sample of a group gets 0 from grpo and loo, and so do
    equal returns."""
    returns = returns.double()
    G = returns.size(1)
    centred = returns - returns.mean(dim=1, keepdim=True)
    if kind == "loo":
        centred *= G / max(1, G - 1)
    elif kind == "running":
        is_new = baseline is None or baseline.weight == 0
        centred = returns - (returns.mean() if is_new else baseline.mean)
    elif kind != "grpo":
        raise ValueError(f"unknown advantage {kind!r}: grpo, loo or running")
    scale = reward_scale(returns, kind) if scale is None else scale
    return torch.where(scale > 0, centred / scale, 0.0).float()


def reward_scale(rewards, kind, beta=0.0):
    """What advantages of rewards [P, G] are divided by: a float64 scalar; 1 for loo and running.

    For grpo the deviation of the rewards around their group means, pooled over the rollout, plus
    beta for the KL, which deviates by about 1 nat: sqrt(deviation^2 + beta^2). Were the *returns*
    standardized, a group of equal rewards would get advantages of size 1 made of its KL alone,
    whatever beta. GRPO divides each group by its own deviation, which weighs prompts unequally;
    one scale per rollout keeps the objective."""
    rewards = rewards.double()
    if kind != "grpo":
        return torch.ones_like(rewards[0, 0])
    scale = (rewards.var(dim=1, correction=0).mean() + beta ** 2).sqrt()
    rounding = 1e-14 * rewards.abs().max()              # float64: a smaller deviation is none
    return torch.where(scale > rounding, scale, 0.0)

# -----------------------------------------------------------------------------
# SEPO

def draw_view(process, model, path, events=1):
    """`events` random states of each path -> View, whose weights make sum(weight * f) an unbiased
    estimate of the mean over paths of the sum of f over all events. events=0: all states.

    logp_old is that of the policy that the path remembers; of `model`, if it remembers none."""
    n = path.n_events                                                                   # [B]
    B = len(n)
    if events:
        row = torch.arange(B, device=n.device).repeat(events)
        cell = torch.arange(events, device=n.device).repeat_interleave(B)
        u = (cell + stratified(B, n.device).repeat(events)) / events    # one per cell and path
        event = (u * n[row]).long()
        weight = n[row] / (events * B)
    else:
        row, event = path.visits
        weight = torch.full_like(row, 1 / B, dtype=torch.float)
    view = path.view(row, event)
    logp_old = view.logp_old
    if logp_old is None:
        with torch.no_grad():
            logp_old = process.logp(model, view)
    share = torch.full_like(weight, 1 / max(1, len(row)))
    return replace(view, weight=weight, share=share, logp_old=logp_old)


def surrogate(log_ratio, A, clip, mode="stop"):
    """What each scored token contributes to the objective, and where the clip is active.

    stop  PPO's min(r A, clip(r) A) (1707.06347): no gradient where the clip is active.
    cap   the same number as a detached coefficient of the log-probability (SEPO's own loss): for
          A > 0 the gradient is capped, and it never stops. CISPO (2506.13585) caps both signs."""
    ratio = log_ratio.clamp(-20, 20).exp()
    free, clipped = ratio * A, ratio.clamp(1 - clip, 1 + clip) * A
    smaller = torch.minimum(free, clipped)
    return smaller.detach() * log_ratio if mode == "cap" else smaller, free > clipped


def policy_loss(objective, is_clipped, scored, weight, share):
    """objective, is_clipped, scored [n, k]; weight, share [n] -> minus the weighted objective; and
    the clip_fraction: per state the share of scored terms at which the clip is active; the mean."""
    loss = -(weight[:, None] * scored * objective).sum()
    n_clipped = (is_clipped & scored).sum(dim=1)
    return loss, (share * n_clipped / scored.sum(dim=1).clamp(min=1)).sum()


def sepo_loss(process, model, view, advantages, clip=0.2, clip_mode="stop"):
    """Score Entropy Policy Optimization (SEPO, 2502.01384) -> (loss, clip_fraction).

    On the line of sequences that differ from x in one slot, given all other slots, p(y) in (1)
    becomes w_v = softmax_v(log s(x)_v), and (tests/test_sepo.py checks both identities):
      sum_v w_v grad log s(x)_v = -grad log w_{x_i}                the sum is one log-probability
      (w_v'/w_v) (s(x)_v / s(x)_v') = w'_{x_i} / w_{x_i}           one ratio, whatever v
    So a line costs one number, log w of its token. At visited states w is the sampler's own
    transition kernel: at theta_old the gradient is minus the policy gradient of the sampler as it
    runs (as DDPO, 2305.13301, for images), and with clip_mode="stop" the loss is that of LOOP on
    one event, where an event moves one slot. advantages: [B]."""
    logp = process.logp(model, view)                                                    # [n, k]
    A = advantages[view.row, None]                                                      # [n, 1]
    objective, is_clipped = surrogate(logp - view.logp_old, A, clip, clip_mode)
    return policy_loss(objective, is_clipped, view.scored, view.weight, view.share)

# -----------------------------------------------------------------------------
# LOOP, REINFORCE, PRDP

def loop_loss(process, model, view, advantages, clip=0.2):
    """Leave-one-out PPO (LOOP, 2503.00897) -> (loss, clip_fraction). advantages [B], of kind `loo`.

    Ratio and clip are per transition: an event with all the slots that it moved. With clip = inf
    and one update per rollout it is REINFORCE."""
    logp = process.logp(model, view)                                                    # [n, k]
    log_ratio = ((logp - view.logp_old) * view.scored).sum(dim=1, keepdim=True)         # [n, 1]
    objective, is_clipped = surrogate(log_ratio, advantages[view.row, None], clip)
    moved = view.scored.any(dim=1, keepdim=True)
    return policy_loss(objective, is_clipped, moved, view.weight, view.share)


def prdp_loss(process, model, path, rewards, kl, beta, clip=0.5, chunk=None):
    """Proximal reward difference prediction (PRDP, 2402.08714) -> (loss, clip_fraction).

    rewards [P, G]; kl [P, G]: log p(path)/p_ref(path) when the path was drawn, nats. At the optimum
    of J, d = beta log p(path)/p_ref(path) - R is the same for all paths of a prompt, if the
    conditionals of the reference agree with one distribution and an event moves one slot.
    Regressing each d on its group's mean is, without the clip, the regression of all pairs. The
    proximal clip keeps the log-ratio of every event to the policy that drew it within `clip` nats,
    and the larger of both errors counts. Divided by 2 beta: at theta_old its gradient is
    -(G - 1)/G that of J. chunk: states per forward pass."""
    def error(change):
        d = beta * (kl + change.sum(dim=1).view_as(kl)) - rewards                       # [P, G]
        return (d - d.mean(dim=1, keepdim=True)).square() / (2 * beta)

    new = process.replay(model, path, chunk)
    change = path.by_event(new - path.logp)                                             # [B, E]
    clipped = change.clamp(-clip, clip)
    free, near = error(change), error(clipped)
    is_clipped = (near > free) & (clipped != change).any(dim=1).view_as(rewards)
    return torch.maximum(free, near).mean(), is_clipped.float().mean()

# -----------------------------------------------------------------------------
# weighted denoising cross-entropy

def wdce_weights(rewards, kl, beta, min_ess):
    """Weights [n] of samples with rewards [n], ~ exp(c (R / beta - kl)), that sum to 1.

    kl [n]: log q(path)/p_ref(path) of the policy q that drew each of them; -log p_ref for distinct
    samples that count once each. With c = 1 they are self-normalized importance weights of
    p* ~ p_ref exp(R / beta). c is the largest number up to 1 that keeps the effective sample size
    1 / sum(w^2) at min_ess or above: it flattens p*, and the proposal q, alike."""
    log_w = rewards / beta - kl
    low, high, c = 0.0, 1.0, 1.0
    for _ in range(40):                                 # bisection: the size falls as c grows
        if 1 / (c * log_w).softmax(dim=0).square().sum() >= min_ess:
            low = c
        else:
            high = c
        c = (low + high) / 2
    return (low * log_w).softmax(dim=0)


def wdce_loss(process, model, tokens, given, weights):
    """Weighted denoising cross-entropy (TR2-D2, 2509.25171; MDNS, 2508.10684)
    -> (loss in nats, clip_fraction 0).

    With the weights of p* its expectation is a bound on the cross-entropy -E_p*[log p_theta(x)], so
    that it minimizes KL(p* || p_theta). Every update scores all masked slots of one noised state
    per sample [n, L], and weights [n] are positive, so that the bound tightens. As far as their
    abstracts tell, TR2-D2 fills the buffer by tree search, MDNS with samples of the policy, and
    DMPO (2510.08233) subtracts a baseline from the weights; here the buffer is all that was paid
    for, and min_ess tempers the weights."""
    loss = (weights * process.losses(model, tokens, given)).sum()
    return loss, torch.zeros_like(loss)

# -----------------------------------------------------------------------------
# SEPO as published: all sequences that differ from the sample in one slot

@dataclass
class Neighbours:
    """What the estimator remembers of the policy that drew the samples."""
    x: Tensor                           # [B, L]     the samples
    given: Tensor                       # [B, L]     slots of the prompt
    log_s: Tensor                       # [B, L, V]  log s(x)_y, where y is x with slot i set to v
    p: Tensor                           # [B, L, V]  estimates of p(y)


def draw_neighbours(process, model, path, p_of=None):
    """The view of `published_loss`: the neighbours of the path's samples under `model`."""
    with torch.no_grad():
        log_s, p = neighbours(process, model, path.tokens, p_of or importance_sampled)
    return Neighbours(path.tokens, path.given, log_s, p)


def neighbours(process, model, x, p_of):
    """At samples x [B, L] -> log s(x)_y [B, L, V]; p(y) [B, L, V] without gradient.

    s is a ratio of the slot's probabilities at t -> 0, with the slot masked again on its own.
    p_of: the estimate of p(y); on small spaces it may be looked up (tests/exact.py)."""
    (B, L), V = x.shape, process.vocab_size
    slots = torch.arange(L, device=x.device).repeat(B)[:, None]                     # [B L, 1]
    x_masked = x.repeat_interleave(L, dim=0).scatter(1, slots, process.mask)        # [B L, L]
    logits = logits_at(model, x_masked, torch.zeros(B * L, device=x.device), slots)
    log_w = logits.log_softmax(dim=-1).view(B, L, V)
    log_s = log_w - pick(log_w, x)[..., None]
    slots = slots.repeat_interleave(V, dim=0)                                       # [B L V, 1]
    letters = torch.arange(V, device=x.device).repeat(B * L)[:, None]
    y = x.repeat_interleave(L * V, dim=0).scatter(1, slots, letters)                # [B L V, L]
    with torch.no_grad():
        p = p_of(model, y, slots)
    return log_s, p.view(B, L, V)


def importance_sampled(model, y, slots, M=2):
    """The paper's estimate of p(y) -> [n, 1]: y [n, L], and the changed slots [n, 1].

    M sequences z ~ pi(. | y) from the network's distributions at y weigh pi(z) / pi(z | y), with
    pi(z) ~ 1 / pi(z | z), all at the changed slot; p(y) is the weighted mean of pi(z | y), as in
    the authors' code (the identity has pi(y | z) there), where a masked model is read at slots that
    are not masked, which its training leaves untouched. Their code differs from this in four
    points: its pi(z) is a constant, since it clamps log-probabilities, which are negative, to
    1e-8; it pairs sample m with slot m instead of the changed slot; y = x counts among the
    neighbours; and it takes the smaller of two sums over the whole batch, not term by term."""
    t = torch.zeros(len(y), device=y.device)
    logits = model(y, t)                                                                # [n, L, V]
    total = weights = 0
    for _ in range(M):
        z = gumbel_argmax(logits)                                                       # [n, L]
        given_y = pick(logits.log_softmax(dim=-1), z).gather(1, slots).exp()            # pi(z | y)
        at_z = logits_at(model, z, t, slots).log_softmax(dim=-1)                        # [n, 1, V]
        given_z = pick(at_z, z.gather(1, slots)).exp()                                  # pi(z | z)
        weight = 1 / (given_z * given_y).clamp(min=1e-30)
        total += weight * given_y
        weights += weight
    return total / weights


def published_loss(process, model, old, advantages, clip=0.2, p_of=None):
    """The published loss (SEPO, 2502.01384) -> (loss, clip_fraction); old: `draw_neighbours` of the
    policy that drew the samples.

    Its gradient is that of E_x[sum_{y != x} p(y) min(r A, clip(r) A) log s(x)_y] with all but log s
    detached: the capped surrogate of r = (p/p_old)(s_old/s), which depends on theta as -log s does.
    The identity behind it sums over all sequences y; over those that differ in one slot it is
    biased. With p(y) by sampling the ratio is noisy, so that the clip is active at theta_old."""
    log_s, p = neighbours(process, model, old.x, p_of or importance_sampled)
    log_ratio = p.clamp(min=1e-30).log() - old.p.clamp(min=1e-30).log() + old.log_s - log_s
    A = advantages[:, None, None]
    objective, is_clipped = surrogate(log_ratio, A, clip, mode="cap")                   # [B, L, V]
    is_other = torch.arange(log_s.size(-1), device=p.device) != old.x[..., None]
    scored = is_other & ~old.given[..., None]
    share = torch.full_like(advantages, 1 / len(old.x))
    terms = ((p * objective).flatten(1), is_clipped.flatten(1), scored.flatten(1))  # [B, L V] each
    return policy_loss(*terms, share, share)

# -----------------------------------------------------------------------------
# the exact optimum of small spaces

def ground_truth(process, reference, reward, length, beta, steps=None):
    """-> a function of a model: its J by enumeration, beside the best that any model can do.

    reward: the black box, tokens [V**L, L] -> float [V**L]; asked once. Over distributions p of the
    sample, J(p) = E_p[R] - beta KL(p || p_ref) is largest at p* ~ p_ref exp(R / beta), where it is
    beta log E_ref exp(R / beta). share_of_optimum = (J - J_ref) / (J* - J_ref); where the reference
    is the optimum, as with equal rewards, it is 1 - KL. The distribution is that of `sample`
    without a corrector, and the KL that of the samples, not of the paths."""
    @torch.no_grad()
    def distribution(model):
        p = process.exact_law(model, length, steps)                                     # [V**L]
        return p / p.sum()                              # sums to 1 up to rounding

    beta = max(beta, 1e-9)                              # at 0 the optimum is the largest reward
    R = reward(every_sequence(process.vocab_size, length, device_of(reference))).double()
    p_ref = distribution(reference)
    value_ref = (p_ref * R).sum().item()
    tilted = p_ref.log() + R / beta                     # -inf for what the reference never draws
    optimum = beta * tilted.logsumexp(dim=0).item()
    best = (tilted.softmax(dim=0) * R).sum().item()
    room = optimum - value_ref
    if room < 1e-9 * max(1, abs(value_ref)):            # no more than rounding
        room = beta
    log_ref = p_ref.clamp(min=torch.finfo(p_ref.dtype).tiny).log()

    def evaluate(model):
        p = distribution(model)
        value = (p * R).sum().item()
        kl = (torch.xlogy(p, p) - p * log_ref).sum().item()
        share = 1 - (optimum - value + beta * kl) / room
        return dict(exact_reward=value, exact_kl=kl, share_of_optimum=share, optimum_reward=best,
                    pretrained_reward=value_ref)
    return evaluate
