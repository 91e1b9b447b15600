"""Policy optimization on sampled paths of a discrete diffusion model.

A model drew a Path of B = P * G samples, G for each of P prompts, and a black box gave each sample
a reward. The objective is J = E[R] - beta * KL(p_theta || p_ref), with R the reward and the KL, in
nats, that of the paths. LOOP, and SEPO on visited states with the KL in the return, ascend it at
theta_old; the other choices approximate it, as their docstrings say. Nothing in this file knows a
chain: the process supplies views (states and the slots that are scored there) and slot laws w.

Reading order: what a sample is worth; SEPO on views; SEPO as published, on neighbours; LOOP and
PRDP; the exact optimum of small spaces.
"""
import torch

from diffusion import device_of, draw, every_sequence, logits_at, pick

# -----------------------------------------------------------------------------
# what a sample is worth

class Baseline:
    """Running mean of the returns and variance of the rewards, for kinds `ppo` and `running`."""

    def __init__(self, decay=0.9):
        self.decay = decay
        self.mean = self.variance = self.weight = 0.0

    def update(self, returns, rewards):
        """Fold in a rollout (tensors of any shape), after its advantages were taken."""
        self.weight = self.decay * self.weight + 1 - self.decay
        rate = (1 - self.decay) / self.weight           # 1 at first: no bias towards the zeros
        self.mean += rate * (returns.mean().item() - self.mean)
        self.variance += rate * (rewards.var(correction=0).item() - self.variance)

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update(state)


def advantages(returns, kind="grpo", baseline=None, scale=None):
    """Returns [P, G] (rewards, minus what the KL costs) -> advantages [P, G].

    grpo     (R - group mean) / scale                               (GRPO, 2402.03300)
    dr_grpo  R - group mean                                         (Dr. GRPO, 2503.20783)
    loo      R - mean of the others in the group                    (LOOP, 2503.00897)
    ppo      (R - m) / scale, with m the running mean of the returns (Baseline)
    running  R - m                                                  (REINFORCE with a baseline)

    scale: one number per rollout, from `reward_scale` (1 for the other kinds); None: that of the
    returns themselves.
    With grpo, dr_grpo and loo the only sample of a group gets 0, and so do equal returns. Before
    the first update of the baseline m is the mean of this rollout."""
    returns = returns.double()
    if kind in ("grpo", "dr_grpo", "loo"):
        mean = returns.mean(dim=1, keepdim=True)                                        # [P, 1]
    elif kind not in ("ppo", "running"):
        raise ValueError(f"unknown advantage {kind!r}: grpo, dr_grpo, loo, ppo or running")
    elif baseline is None or baseline.weight == 0:
        mean = returns.mean()
    else:
        mean = baseline.mean
    centred = returns - mean
    if kind == "loo":
        G = returns.size(1)
        centred = centred * (G / max(1, G - 1))
    scale = reward_scale(returns, kind, baseline) if scale is None else scale
    return torch.where(scale > 0, centred / scale, 0.0).float()


def reward_scale(rewards, kind, baseline=None, beta=0.0):
    """What advantages are divided by: a float64 scalar, 1 for kinds that are not standardized.

    It is the deviation of the rewards around their group means (grpo; pooled over the rollout) or
    within rollouts (ppo; a running mean), plus beta for the KL, which deviates by about 1 nat:
    sqrt(deviation^2 + beta^2). Were the *returns* standardized, a group of equal rewards would
    get advantages of size 1 made of its KL alone, whatever beta. GRPO divides each group by its
    own deviation, which weighs prompts unequally; one scale per rollout keeps the objective."""
    rewards = rewards.double()
    if kind not in ("grpo", "ppo"):
        return torch.ones_like(rewards[0, 0])
    if kind == "grpo":
        variance = rewards.var(dim=1, correction=0).mean()
    elif baseline is None or baseline.weight == 0:
        variance = rewards.var(correction=0)
    else:
        variance = rewards.new_tensor(baseline.variance)
    scale = (variance + beta ** 2).sqrt()
    rounding = 1e-14 * rewards.abs().max()              # float64: a smaller deviation is none
    return torch.where(scale > rounding, scale, 0.0)

# -----------------------------------------------------------------------------
# SEPO

def draw_view(process, path, states):
    """The states at which concrete scores are taken, one forward pass per view:

    path      a state that the sampler visited, and the slots that it revealed there
    noised    x_t ~ q(. | x0) at a random level, all masked slots at once (a likelihood bound)
    terminal  the final sample with one slot freed (t -> 0): a pseudo-likelihood
    (The fourth choice of --states, the published estimator, is `neighbours_loss`.)
    """
    if states == "path":
        return process.path_view(path)
    if states == "noised":
        return process.noised_view(path.tokens, path.given)
    if states == "terminal":
        return process.terminal_view(path.tokens, path.given)
    raise ValueError(f"unknown states {states!r}: path, noised or terminal")


def surrogate(log_ratio, A, clip, mode="stop"):
    """What each scored token contributes to the objective, and where the clip is active.

    stop  PPO's min(r A, clip(r) A) (1707.06347): no gradient where the clip is active.
    cap   the same number as a detached coefficient of the log-probability (SEPO's own loss): for
          A > 0 the gradient is capped, and it never stops. CISPO (2506.13585) caps both signs."""
    ratio = log_ratio.clamp(-20, 20).exp()
    free, clipped = ratio * A, ratio.clamp(1 - clip, 1 + clip) * A
    smaller = torch.minimum(free, clipped)
    return smaller.detach() * log_ratio if mode == "cap" else smaller, free > clipped


def policy_loss(objective, active, weight, path):
    """-> minus the weighted objective per sample; and among the stats clip_fraction, the share of
    scored terms at which the clip is active."""
    scored = weight > 0
    clipped = (active & scored).sum() / scored.sum().clamp(min=1)
    loss = -(weight * objective).sum() / len(path.tokens)
    return loss, {"clip_fraction": clipped}


def sepo_loss(process, model, path, advantages, states="path", clip=0.2, clip_mode="stop",
              view=None, consistency=0.0, entropy=0.0, reference=None, beta=0.0):
    """Score Entropy Policy Optimization (SEPO, 2502.01384) -> (loss, stats).

    SEPO's gradient is -E_x[A(x) sum_{y != x} p(y) grad log s(x)_y]. On the line of sequences that
    differ from x in one slot, given all other slots, p(y) becomes the slot law
    w_v = softmax_v(log s(x)_v), and (tests/test_sepo.py checks both identities):
      sum_v w_v grad log s(x)_v = -grad log w_{x_i}                the sum is one log-probability
      (w_v'/w_v) (s(x)_v / s(x)_v') = w'_{x_i} / w_{x_i}           one ratio, whatever v
    So a line costs one number, log w of its token. Conditioning on the line is our step, not the
    paper's. With states="path" w is the sampler's own transition kernel: at theta_old the gradient
    is minus the policy gradient of the sampler as it runs (as DDPO, 2305.13301, for images), and
    with clip_mode="stop" the loss is that of LOOP on one event, where an event moves one slot.

    advantages: [B]. view: the scored states; None draws them here, with theta as theta_old.
    consistency: weight of log w of own samples; on noised states that is the likelihood bound, and
    holds it tight (DiPOD, 2606.13795). entropy: weight of the entropy of the slot laws, nats.
    reference, beta: KL(w || w_reference) in closed form, nats, and its weight. Losses of the parts
    of a view (view.split) add up to its loss."""
    view = draw_view(process, path, states) if view is None else view
    log_w = process.log_law(model, view)                                                # [n, k, V]
    logp = pick(log_w, view.y)                                                          # [n, k]
    if view.logp_old is None:                           # theta is still theta_old
        view.logp_old = logp.detach()
    A = advantages[view.row, None]
    objective, active = surrogate(logp - view.logp_old, A, clip, clip_mode)
    w = log_w.exp()
    if consistency:
        objective = objective + consistency * logp
    if entropy:
        objective = objective - entropy * (w * log_w).sum(dim=-1)
    if reference is not None:
        with torch.no_grad():
            log_ref = process.log_law(reference, view)
        objective = objective - beta * (w * (log_w - log_ref)).sum(dim=-1)
    return policy_loss(objective, active, view.weight, path)

# -----------------------------------------------------------------------------
# SEPO's published estimator: all sequences that differ from the sample in one slot

def importance_sampled(model, y, slots, M=2):
    """The authors' estimate of p(y) -> [n, 1]: y [n, L], and the changed slots [n, 1].

    M sequences z ~ pi(. | y) from the network's slot laws at y weigh pi(z) / pi(z | y), with
    pi(z) ~ 1 / pi(z | z), all at the changed slot; p(y) is the weighted mean of pi(z | y). As in
    the authors' code: the identity has pi(y | z) there, and a masked model is read at slots that
    are not masked, which its training leaves untouched."""
    t = torch.zeros(len(y), device=y.device)
    logits = model(y, t)                                                                # [n, L, V]
    total = weights = 0
    for _ in range(M):
        z = draw(logits)                                                                # [n, L]
        given_y = pick(logits.log_softmax(dim=-1), z).gather(1, slots).exp()            # pi(z | y)
        at_z = logits_at(model, z, t, slots).log_softmax(dim=-1)                        # [n, 1, V]
        given_z = pick(at_z, z.gather(1, slots)).exp()                                  # pi(z | z)
        weight = 1 / (given_z * given_y).clamp(min=1e-30)
        total += weight * given_y
        weights += weight
    return total / weights


def neighbours(process, model, path, p_of=importance_sampled):
    """What the estimator needs of a model, at the final samples x [B, L]
    -> log s(x)_y [B, L, V], p(y) [B, L, V] without gradient.

    y is x with slot i set to v. s is the ratio of the slot laws at t -> 0. p_of: the estimate of
    p(y); on small spaces it may be looked up in the exact law (tests/exact.py)."""
    x = path.tokens
    log_w = process.slot_laws(model, path)                                              # [B, L, V]
    log_s = log_w - pick(log_w, x)[..., None]
    B, L, V = log_s.shape
    slots = torch.arange(L, device=x.device).repeat_interleave(V).repeat(B)[:, None]
    letters = torch.arange(V, device=x.device).repeat(B * L)[:, None]
    y = x.repeat_interleave(L * V, dim=0).scatter(1, slots, letters)                # [B L V, L]
    with torch.no_grad():
        p = p_of(model, y, slots)
    return log_s, p.view(B, L, V)


def neighbours_loss(process, model, path, advantages, old, clip=0.2, p_of=importance_sampled):
    """The published loss (SEPO, 2502.01384) -> (loss, stats); old: `neighbours` of the policy that
    drew the path.

    Its gradient is that of E_x[sum_{y != x} p(y) min(r A, clip(r) A) log s(x)_y] with all but log s
    detached: the capped surrogate of r = (p/p_old)(s_old/s), which depends on theta as -log s does.
    The identity behind it sums over all sequences y; over those that differ in one slot it is
    biased. `path` differs in that it conditions on a line. With p(y) by sampling the ratio is
    noisy, so that the clip is active at theta_old already."""
    log_s_old, p_old = old
    log_s, p = neighbours(process, model, path, p_of)
    log_ratio = p.clamp(min=1e-30).log() - p_old.clamp(min=1e-30).log() + log_s_old - log_s
    objective, active = surrogate(log_ratio, advantages[:, None, None], clip, mode="cap")
    is_other = torch.arange(log_s.size(-1), device=p.device) != path.tokens[..., None]
    weight = p * (is_other & ~path.given[..., None])
    return policy_loss(objective, active, weight, path)

# -----------------------------------------------------------------------------
# LOOP, REINFORCE, PRDP

def loop_loss(process, model, path, advantages, clip=0.2, view=None):
    """Leave-one-out PPO (LOOP, 2503.00897) -> (loss, stats). advantages [B], of kind `loo`.

    Ratio and clip are per transition: an event with all the slots that it moved. view: the scored
    events; None: all of them. Losses of several views, as from path.views, add up. With clip = inf
    and one update per rollout it is REINFORCE."""
    view = path.view(*path.visits) if view is None else view
    moved = view.weight > 0
    logp = pick(process.log_law(model, view), view.y)                                   # [n, k]
    log_ratio = ((logp - view.logp_old) * moved).sum(dim=1, keepdim=True)               # [n, 1]
    weight = view.weight.amax(dim=1, keepdim=True)
    objective, active = surrogate(log_ratio, advantages[view.row, None], clip)
    return policy_loss(objective, active, weight, path)


def prdp_loss(process, model, path, rewards, kl, beta, clip=0.5, chunk=None):
    """Proximal reward difference prediction (PRDP, 2402.08714) -> (loss, stats).

    rewards [P, G]; kl [P, G]: log p(path)/p_ref(path) when the path was drawn, nats. At the
    optimum of J, d = beta log p(path)/p_ref(path) - R is the same for all paths of a prompt, if the
    conditionals of the reference agree with one law and an event moves one slot. Regressing each d
    on its group's mean is, without the clip, the regression of all pairs. The proximal clip keeps
    the log-ratio of every event to the policy that drew it within `clip` nats, and the larger of
    both errors counts. Divided by 2 beta: at theta_old its gradient is -(G - 1)/G that of J."""
    def error(change):
        d = beta * (kl + change.sum(dim=1).view_as(kl)) - rewards                       # [P, G]
        return (d - d.mean(dim=1, keepdim=True)).square() / (2 * beta)

    new = process.replay(model, path, chunk)
    change = path.by_event(new - path.logp)                                             # [B, E]
    clipped = change.clamp(-clip, clip)
    free, near = error(change), error(clipped)
    active = (near > free) & (clipped != change).any(dim=1).view_as(rewards)
    return torch.maximum(free, near).mean(), {"clip_fraction": active.float().mean()}

# -----------------------------------------------------------------------------
# the exact optimum of small spaces

def ground_truth(process, reference, reward, length, beta, steps=None):
    """-> a function of a model: its J by enumeration, beside the best that any law can do.

    reward: the black box, tokens [V**L, L] -> float [V**L]; asked once. Over laws p of the sample,
    J(p) = E_p[R] - beta KL(p || p_ref) is largest at p* ~ p_ref exp(R / beta), where it is
    beta log E_ref exp(R / beta). share_of_optimum = (J - J_ref) / (J* - J_ref). The law is that of
    `sample` without a corrector, and the KL that of the samples, not of the paths."""
    @torch.no_grad()
    def law(model):
        p = process.exact_law(model, length, steps).double()                            # [V**L]
        return p / p.sum()                              # float32 sums to 1 only nearly

    beta = max(beta, 1e-9)                              # at 0 the optimum is the largest reward
    R = reward(every_sequence(process.vocab_size, length, device_of(reference))).double()
    p_ref = law(reference)
    log_ref = p_ref.log()                               # -inf for what it never draws
    value_ref = (p_ref * R).sum().item()
    tilted = log_ref + R / beta
    optimum = beta * tilted.logsumexp(dim=0).item()
    best = (tilted.softmax(dim=0) * R).sum().item()
    room = optimum - value_ref                          # 0 where all sequences have one reward

    def evaluate(model):
        p = law(model)
        value = (p * R).sum().item()
        kl = (torch.xlogy(p, p) - p * log_ref.clamp(min=-100)).sum().item()
        gain = value - beta * kl - value_ref
        share = gain / room if room > 1e-9 * max(1, abs(value_ref)) else 1.0
        return dict(exact_reward=value, exact_kl=kl, share_of_optimum=share, best_reward=best,
                    pretrained_reward=value_ref)
    return evaluate
