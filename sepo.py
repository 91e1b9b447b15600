"""Policy optimisation on sampled paths of a discrete diffusion model: advantages, returns with the KL in them, SEPO.

A model drew a Path of B = P * G samples, G for each of P prompts; a black box gave each a reward. Nothing here knows a chain:
the process supplies views (states, and the lines through them that are scored) and the slot law w on each line.
"""
import torch


# ---- what a sample is worth -------------------------------------------------------------------------------------------

class Baseline:
    """A baseline learnt across the run: exponential averages of the mean and variance of the rewards (for kind `ppo`)."""

    def __init__(self, decay=0.9):
        self.decay, self.mean, self.square, self.weight = decay, 0.0, 0.0, 0.0

    def update(self, rewards):
        """Fold a rollout's rewards (any shape) in, after its advantages were taken."""
        self.mean = self.decay * self.mean + (1 - self.decay) * rewards.mean().item()
        self.square = self.decay * self.square + (1 - self.decay) * rewards.square().mean().item()
        self.weight = self.decay * self.weight + (1 - self.decay)    # as Adam corrects its start from zero


def advantages(rewards, kind="grpo", baseline=None):
    """Rewards [P, G] -> advantages [P, G]. A group whose rewards are all equal, or of one sample, gets zeros, never NaN.

    grpo     (R - group mean) / group standard deviation               (GRPO, 2402.03300)
    dr_grpo  R - group mean                                            (Dr. GRPO, 2503.20783)
    loo      R - mean of the others of its group                       (LOOP, 2503.00897)
    ppo      (R - m) / s with m, s learnt across the run (Baseline); before its first update, of this batch
    """
    if kind == "ppo":
        if baseline is None or baseline.weight == 0:
            return standardise(rewards - rewards.mean(), rewards.std(correction=0))
        mean = baseline.mean / baseline.weight
        return standardise(rewards - mean, rewards.new_tensor(max(baseline.square / baseline.weight - mean ** 2, 0)).sqrt())
    G, centred = rewards.size(1), rewards - rewards.mean(dim=1, keepdim=True)
    if kind == "grpo":
        return standardise(centred, rewards.std(dim=1, keepdim=True, correction=0))
    if kind == "dr_grpo":
        return centred
    if kind == "loo":
        return centred * (G / (G - 1) if G > 1 else 0)
    raise ValueError(f"unknown advantage {kind!r}: one of grpo, dr_grpo, loo, ppo")


def standardise(centred, deviation):
    """centred / deviation, and 0 where there is no deviation to speak of."""
    return torch.where(deviation > 1e-6, centred / deviation.clamp(min=1e-6), 0.0)


def regularised(rewards, log_ratio, beta):
    """The return R - beta * log p_theta(path)/p_ref(path) of each path -> [B], detached; rewards [B], log_ratio [B, L] nats.

    With the KL in the return, the policy gradient also counts its part through the states that are visited, which a
    closed-form KL in the loss leaves out. The mean of the second term is beta * KL(p_theta || p_ref) over paths."""
    return (rewards - beta * log_ratio.sum(dim=1)).detach()


# ---- SEPO -------------------------------------------------------------------------------------------------------------

def draw_view(process, path, states, events=1, generator=None):
    """Where the concrete scores of a path are taken, one forward pass a view (`path`: `events` of them):

    path      a state that the sampler visited, the slots that it revealed there: unbiased for the sampler as it runs
    noised    x_t ~ q(. | x0) at a random level, all masked slots at once: low variance; biased where the bound is loose
    terminal  the sample with one slot freed (2502.01384, t -> 0): a pseudo-likelihood, biased
    """
    if states == "path":
        return process.path_view(path, events, generator)
    if states == "noised":
        return process.noised_view(path.tokens, path.given, generator)
    if states == "terminal":
        return process.terminal_view(path, generator)
    raise ValueError(f"unknown states {states!r}: one of path, noised, terminal")


def line_logp(process, model, view):
    """-> log w [n, k] of the tokens that the view's slots take, and the laws log w [n, k, V] themselves."""
    log_w = process.log_law(model, view)
    return log_w.gather(-1, view.y[..., None]).squeeze(-1), log_w


def sepo_loss(process, model, path, advantages, states="path", clip=0.2, consistency=0.0, entropy=0.0, events=1, view=None,
              generator=None):
    """Score Entropy Policy Optimization (SEPO, arXiv 2502.01384) -> (loss, stats of detached scalars).

    advantages: float [B], or, with states=path, [B, L] where each transition has its own return. view: the states, from
    draw_view; pass the one of the rollout, with its logp_old, to later updates of the same rollout (None: drawn here;
    logp_old None: theta is theta_old, where the gradient of the loss is minus the policy gradient of the mean reward).
    consistency: weight of the likelihood bound on the model's own samples. entropy: weight of the slot laws' entropy, in
    nats, as a bonus.

    On the line {x with slot i free} the slot law is w_v = softmax_v log s(x)_{i,v}. SEPO's ratio (w_v'/w_v)(s_v/s_v') is
    w'_{x_i} / w_{x_i} for every v, and sum_v w_v grad log s_v = -grad log w_{x_i}, so its sum over all neighbours of a
    line is PPO's clipped surrogate on log w_{x_i}: one number a slot (the three identities: tests/test_sepo.py)."""
    view = draw_view(process, path, states, events, generator) if view is None else view
    logp, log_w = line_logp(process, model, view)                                    # [n, k], [n, k, V]
    ratio = (logp - (logp.detach() if view.logp_old is None else view.logp_old)).exp()
    A = advantages[view.row, None] if advantages.dim() == 1 else advantages[view.row].gather(1, view.slots)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    term = torch.minimum(ratio * A, clipped * A)                                     # PPO (1707.06347), eq. 7
    if consistency:
        term = term + consistency * logp
    if entropy:
        term = term - entropy * (log_w.exp() * log_w).sum(dim=-1)
    loss = -(view.weight * term).sum() / len(path.tokens)
    seen = view.weight > 0
    active = seen & (ratio * A > clipped * A)                                        # where the clip stops the gradient
    return loss, {"clip_fraction": (active.sum() / seen.sum().clamp(min=1)).detach()}
