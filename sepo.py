"""Policy optimisation on sampled paths of a discrete diffusion model: advantages, the KL in the return, SEPO, LOOP, PRDP.

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
    running  R - m, the same m                                         (REINFORCE with a baseline)
    """
    if kind in ("ppo", "running"):
        if baseline is None or baseline.weight == 0:
            mean, deviation = rewards[0, 0] + (rewards - rewards[0, 0]).mean(), rewards.std(correction=0)
        else:
            mean = baseline.mean / baseline.weight
            deviation = rewards.new_tensor(max(baseline.square / baseline.weight - mean ** 2, 0)).sqrt()
        return rewards - mean if kind == "running" else standardise(rewards - mean, deviation)
    G, centred = rewards.size(1), rewards - rewards[:, :1]     # of equal rewards the mean is exact only after a shift to 0
    centred = centred - centred.mean(dim=1, keepdim=True)
    if kind == "grpo":
        return standardise(centred, rewards.std(dim=1, keepdim=True, correction=0))
    if kind == "dr_grpo":
        return centred
    if kind == "loo":
        return centred * (G / (G - 1) if G > 1 else 0)
    raise ValueError(f"unknown advantage {kind!r}: one of grpo, dr_grpo, loo, ppo, running")


def standardise(centred, deviation):
    """centred / deviation, and 0 where there is no deviation to speak of."""
    return torch.where(deviation > 1e-6, centred / deviation.clamp(min=1e-6), 0.0)


def regularised(rewards, log_ratio, beta):
    """The return R - beta * log p_theta(path)/p_ref(path) of each path -> [B], detached; rewards [B], log_ratio (nats) as
    path.logp has it, one for each transition.

    With the KL in the return, the policy gradient also counts its part through the states that are visited, which a
    closed-form KL in the loss leaves out. The mean of the second term is beta * KL(p_theta || p_ref) over paths."""
    return (rewards - beta * log_ratio.flatten(1).sum(dim=1)).detach()


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


def surrogate(log_ratio, A, clip):
    """PPO's clipped surrogate min(r A, clip(r, 1 - eps, 1 + eps) A) (1707.06347), and where the clip stops its gradient."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip) * A
    return torch.minimum(ratio * A, clipped), (ratio * A > clipped).detach()


def sepo_loss(process, model, path, advantages, states="path", clip=0.2, consistency=0.0, entropy=0.0, events=1, view=None,
              reference=None, beta=0.0, generator=None):
    """Score Entropy Policy Optimization (SEPO, arXiv 2502.01384) -> (loss, stats of detached scalars). The losses of a view's
    parts (view.split) add up to that of the whole.

    advantages: float [B], or, with states=path, shaped as path.logp: a return for each transition. view: the states, from
    draw_view; pass the one of the rollout, with its logp_old, to later updates of the same rollout (None: drawn here;
    logp_old None: theta is theta_old, where the gradient of the loss is minus the policy gradient of the mean reward).
    consistency: weight of the likelihood bound on the model's own samples. entropy: weight of the slot laws' entropy, in
    nats, as a bonus. reference, beta: price of a nat of KL(w || w_reference) on the lines, in closed form.

    On the line {x with slot i free} the slot law is w_v = softmax_v log s(x)_{i,v}. SEPO's ratio (w_v'/w_v)(s_v/s_v') is
    w'_{x_i} / w_{x_i} for every v, and sum_v w_v grad log s_v = -grad log w_{x_i}, so its sum over all neighbours of a
    line is PPO's clipped surrogate on log w_{x_i}: one number a slot (the three identities: tests/test_sepo.py)."""
    view = draw_view(process, path, states, events, generator) if view is None else view
    logp, log_w = line_logp(process, model, view)                                    # [n, k], [n, k, V]
    A = advantages[view.row, None] if advantages.dim() == 1 else advantages.flatten(1)[view.row].gather(1, view.place)
    log_ratio = logp - (logp.detach() if view.logp_old is None else view.logp_old)
    term, stopped = surrogate(log_ratio, A, clip)
    if consistency:
        term = term + consistency * logp
    if entropy:
        term = term - entropy * (log_w.exp() * log_w).sum(dim=-1)
    if beta:
        with torch.no_grad():
            log_ref = process.log_law(reference, view)
        term = term - beta * (log_w.exp() * (log_w - log_ref)).sum(dim=-1)
    loss = -(view.weight * term).sum() / len(path.tokens)
    seen = view.weight > 0
    return loss, {"clip_fraction": (stopped & seen).sum() / seen.sum().clamp(min=1)}


# ---- LOOP, REINFORCE, PRDP ----------------------------------------------------------------------------------------------

def loop_loss(process, model, path, advantages, clip=0.2, events=None, view=None, chunk=None, generator=None):
    """Leave-one-out PPO (LOOP, arXiv 2503.00897) -> (loss, stats). advantages [B], of kind `loo` in the paper.

    Importance weight and clip are on every transition: an event of the path with all the slots that it moved, their joint
    probability. events: how many a path, drawn without bias, one pass each, or the view of them (its parts add up); None: all
    of them, `chunk` states (default: B) a pass, in the memory of one. With clip = inf and one update it is REINFORCE."""
    if events is None and view is None:
        new, old = path.by_event(process.replay(model, path, chunk)), path.by_event(path.logp)       # [B, E]
        weight = torch.arange(new.size(1), device=new.device) < path.n_events[:, None]
        A = advantages[:, None]
    else:
        view = process.path_view(path, events, generator) if view is None else view
        moved = view.weight > 0
        new, old = ((logp * moved).sum(dim=1, keepdim=True) for logp in (line_logp(process, model, view)[0], view.logp_old))
        weight, A = view.weight.amax(dim=1, keepdim=True), advantages[view.row, None]
    term, stopped = surrogate(new - old, A, clip)
    seen = weight > 0
    return -(weight * term).sum() / len(path.tokens), {"clip_fraction": (stopped & seen).sum() / seen.sum().clamp(min=1)}


def prdp_loss(process, model, path, rewards, logp_ref, beta, clip=0.5, chunk=None):
    """Proximal reward difference prediction (PRDP, arXiv 2402.08714) -> (loss, stats). rewards [P, G]; logp_ref: the
    transitions' log-probabilities under the reference, shaped as path.logp; clip in nats of a path; chunk: states a pass.

    At the optimum of E[R] - beta KL, beta log p(path)/p_ref(path) - R is the same for all paths of a prompt. Regressing all
    pairs of a group on each other is regressing each path on the group's mean. The proximal clip keeps a path's log-ratio
    near that of the policy which drew it, and the larger of both errors counts. Divided by 2 beta, so that at theta_old the
    gradient is minus that of E[R] - beta KL."""
    def error(log_ratio):
        d = beta * log_ratio - rewards                                               # [P, G]
        return (d - d.mean(dim=1, keepdim=True)).square() / (2 * beta)
    new, old = ((logp - logp_ref).flatten(1).sum(dim=1).view_as(rewards)
                for logp in (process.replay(model, path, chunk), path.logp))
    near = new.clamp(old - clip, old + clip)
    free, bounded = error(new), error(near)
    return torch.maximum(free, bounded).mean(), {"clip_fraction": ((near != new) & (bounded > free)).float().mean()}
