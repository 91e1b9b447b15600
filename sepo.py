"""Policy optimization on paths of a discrete diffusion model: SEPO, LOOP, PRDP, WDCE.

SEPO (Score Entropy Policy Optimization, 2502.01384) is a policy gradient for models that are known
through their concrete score s(x)_y = p(y) / p(x). With advantages A of the samples x,
    grad E[R] = -E_x[A(x) sum_{y != x} p(y) grad log s(x)_y]                                   (1)
What SEPO is here, and how it differs from the paper and its code:
- The paper takes (1) at final samples. We take it at the states that the sampler visited, and there
  at the positions that were revealed next.
- The paper sums over the L (V - 1) sequences y that differ from x in one position, which biases
  (1). We condition on all other positions, one position at a time; there the sum is exact.
- The paper estimates p(y) by importance sampling, in hundreds of passes. Conditioned on all other
  positions p(y) is w = softmax(log s): one pass, and one importance ratio per token.
- The paper caps the ratio in a detached coefficient (clip_mode="cap"). Our default is PPO's clip.
- Their code can add a KL to the loss. We subtract beta log p(path)/p_ref(path) from the reward.
The paper's own estimator is the last section.

A path (see diffusion.Path) belongs to B = P * G samples, G for each of P prompts. The objective is
J = E[R] - beta KL(p || p_ref), with the KL of paths in nats. Losses are functions of numbers: logp
[n, k], what the current model gives to all that a path drew, the path itself, which remembers what
the old model gave, and advantages [B]. They change nothing and return (loss, clip_fraction).

Off policy, too: let d = beta log p_theta(path)/p_ref(path) - R. For any distribution q over paths,
    grad Var_q(d) / (2 beta) = -E_q[A grad log p_theta(path)],   A = -d + E_q[d]
(VarGrad, 2010.10436; trajectory balance, 2201.13259). For q = p_theta it is the gradient of -J. For
q = new paths to remembered samples its only zero is p* ~ p_ref exp(R / beta), if the conditionals
of the reference agree with one distribution, as those of a well trained network nearly do. So a
rollout can be learned from again and again, with the same losses and no importance weights. There
log p_theta/p_ref is a log-ratio at samples that another policy drew: it may be negative, and its
mean is no KL.

Near and far: since any q will do, a remembered group may hold samples that p* would draw, among all
that was seen, beside the policy's own. Where the policy is far from p*, weighted denoising fits
these samples, too. That is fast and biased, since it knows nothing but what was seen: so both fade
with the `distance` to p*, which is measured on every new rollout and is 0 there.

Reading order: what a sample is worth; SEPO, LOOP, PRDP; weighted denoising; what to learn from,
near and far; the methods, and how an iteration learns; the exact optimum; SEPO as published.
"""
import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusion import Absorbing, device_of, every_sequence, gumbel_argmax, none_given, pick

# -----------------------------------------------------------------------------
# what a sample is worth

@dataclass
class Rollout:
    """Samples whose rewards are known: P prompts with G samples each."""
    iter: int                           # the iteration that drew them; 0: known before the run
    tokens: Tensor                      # [P * G, L]
    given: Tensor                       # [P * G, L]  the positions of the prompt
    is_own: Tensor                      # [P, G]      False: known, or not the policy's alone
    log_ratio: Tensor                   # [P, G]      log p(path)/p_ref(path) of the policy of that
                                        #             time, nats; 0 where the reference drew them
    log_ref: Tensor                     # [P, G]      log p_ref(path), nats
    reward: Tensor                      # [P, G]      float64

    def to(self, device):
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self


def advantages(returns, kind="loo", scale=None):
    """Returns [P, G] (rewards, minus what the KL costs) -> advantages [P, G].

    loo    R - mean of the others in the group; unbiased            (LOOP, 2503.00897)
    grpo   (R - group mean) / scale                                 (GRPO, 2402.03300)

    scale: one number, from `reward_scale`; None: that of the returns. It depends on the same
    samples, so that small groups point elsewhere: on a space of four sequences the expected
    gradient has a cosine of 0.877 with the true one for G = 2, and 0.997 for G = 6
    (tests/test_sepo.py). Equal returns get 0, and so does the only sample of a group."""
    returns = returns.double()
    G = returns.size(1)
    centred = returns - returns.mean(dim=1, keepdim=True)
    if kind == "loo":
        centred *= G / max(1, G - 1)
    elif kind == "grpo":
        scale = torch.as_tensor(reward_scale(returns) if scale is None else scale)
        centred = torch.where(scale > 0, centred / scale, 0.0)
    else:
        raise ValueError(f"unknown advantage {kind!r}: loo or grpo")
    return centred.float()


def reward_scale(rewards, beta=0.0):
    """What grpo divides advantages of rewards [P, G] by: a float64 scalar.

    The deviation of the rewards around their group means, pooled over the rollout, plus beta for
    the KL, which deviates by about 1 nat: sqrt(deviation^2 + beta^2). Were the *returns*
    standardized, a group of equal rewards would get advantages of size 1 made of its KL alone,
    whatever beta. GRPO divides each group by its own deviation, which weighs prompts unequally;
    one scale per rollout keeps the objective."""
    rewards = rewards.double()
    scale = (rewards.var(dim=1, correction=0).mean() + beta ** 2).sqrt()
    rounding = 1e-14 * rewards.abs().max()              # float64: a smaller deviation is none
    return torch.where(scale > rounding, scale, 0.0)

# -----------------------------------------------------------------------------
# SEPO, LOOP, REINFORCE, PRDP

def surrogate(log_ratio, A, clip):
    """What each scored token contributes to the objective, and where the clip is active: PPO's
    min(r A, clip(r) A) (1707.06347), which has no gradient there."""
    ratio = log_ratio.clamp(-20, 20).exp()
    free, clipped = ratio * A, ratio.clamp(1 - clip, 1 + clip) * A
    return torch.minimum(free, clipped), free > clipped


def loss_and_clip_fraction(objective, is_clipped, scored, weight):
    """Terms [n, k] of the objective -> minus their weighted sum; the share of the scored ones where
    the clip is active."""
    loss = -(weight[:, None] * scored * objective).sum()
    return loss, (is_clipped & scored).sum() / scored.sum().clamp(min=1)


def of_transitions(path, advantages):
    """Advantages [B] -> [n, 1], one per transition."""
    if advantages.shape != (path.batch,):
        raise ValueError(f"{path.batch} advantages are needed, not {tuple(advantages.shape)}")
    return advantages[path.row, None]


def sepo_loss(logp, path, advantages, clip=0.1, clip_mode="stop"):
    """Score Entropy Policy Optimization (SEPO, 2502.01384) -> (loss, clip_fraction).

    Conditioned on all positions of x but one, p(y) in (1) becomes w_v = softmax_v(log s(x)_v), and
    (tests/test_sepo.py checks both identities):
      sum_v w_v grad log s(x)_v = -grad log w_{x_i}                the sum is one log-probability
      (w'_v / w_v) (s(x)_v / s'(x)_v) = w'_{x_i} / w_{x_i}         one ratio, whatever v
    Here the primes stand for the current model.
    So each position costs one number, log w of its token. At visited states w is the sampler's own
    transition kernel: at theta_old the gradient is minus the policy gradient of the sampler as it
    runs (as DDPO, 2305.13301, for images). With clip_mode="stop", and where a transition moves one
    position, it is LOOP on some transitions. clip_mode="cap" is SEPO's own: the clipped ratio is a
    detached coefficient of the log-probability, so that for A > 0 the gradient is capped and never
    stops (CISPO, 2506.13585, caps both signs)."""
    A = of_transitions(path, advantages)
    objective, is_clipped = surrogate(logp - path.logp, A, clip)                        # [n, k]
    if clip_mode == "cap":
        objective = objective.detach() * logp
    return loss_and_clip_fraction(objective, is_clipped, path.scored, path.weight)


def loop_loss(logp, path, advantages, clip=0.1):
    """Leave-one-out PPO (LOOP, 2503.00897) -> (loss, clip_fraction). advantages [B], of kind `loo`.

    Ratio and clip are per transition, with all positions that it moved. With clip = inf and one
    update per rollout it is REINFORCE."""
    log_ratio = ((logp - path.logp) * path.scored).sum(dim=1, keepdim=True)             # [n, 1]
    objective, is_clipped = surrogate(log_ratio, of_transitions(path, advantages), clip)
    is_scored = path.scored.any(dim=1, keepdim=True)
    return loss_and_clip_fraction(objective, is_clipped, is_scored, path.weight)


def prdp_loss(logp, path, rewards, log_ratio, beta, clip=0.1):
    """Proximal reward difference prediction (PRDP, 2402.08714) -> (loss, clip_fraction).

    rewards [P, G]; log_ratio [P, G]: log p(path)/p_ref(path) when the path was drawn, nats. At the
    optimum of J, d = beta log p(path)/p_ref(path) - R is the same for all paths of a prompt, if the
    conditionals of the reference agree with one distribution and a transition moves one position.
    Regressing each d on its group's mean is, without the clip, the regression of all pairs. The
    proximal clip keeps the log-ratio of every transition to the policy that drew it within `clip`
    nats, and the larger of both errors counts. Divided by 2 beta: at theta_old its gradient is
    -(G - 1)/G that of J."""
    def error(change):
        d = beta * (log_ratio + path.per_sequence(change).view_as(rewards)) - rewards   # [P, G]
        return (d - d.mean(dim=1, keepdim=True)).square() / (2 * beta)

    change = ((logp - path.logp) * path.scored).sum(dim=1)                              # [n]
    clipped = change.clamp(-clip, clip)
    free, near = error(change), error(clipped)
    has_moved = path.per_sequence((clipped != change).float()).view_as(rewards) > 0
    return torch.maximum(free, near).mean(), (has_moved & (near > free)).float().mean()

# -----------------------------------------------------------------------------
# weighted denoising cross-entropy

def wdce_weights(rewards, cost, beta, min_ess):
    """Weights [n] of samples with rewards [n], ~ exp(c (R / beta - cost)), that sum to 1.

    cost [n]: log q/p_ref, with the chance q that a sample is there. With c = 1 they are
    self-normalized importance weights of p* ~ p_ref exp(R / beta). c is the largest number up to 1
    that keeps the effective sample size 1 / sum(w^2) at min_ess or above, or at n / 2: it flattens
    p*, and the proposal q, alike."""
    log_w = rewards / beta - cost
    min_ess = min(min_ess, len(log_w) / 2)
    low, high, c = 0.0, 1.0, 1.0
    for _ in range(40):                                 # bisection: the size falls as c grows
        if 1 / (c * log_w).softmax(dim=0).square().sum() >= min_ess:
            low = c
        else:
            high = c
        c = (low + high) / 2
    return (low * log_w).softmax(dim=0)


def wdce_loss(process, model, tokens, weights):
    """Weighted denoising cross-entropy (TR2-D2, 2509.25171; MDNS, 2508.10684), in nats.

    tokens [n, L], weights [n]. With the weights of p* its expectation is a bound on the
    cross-entropy -E_p*[log p_theta(x)], so that it minimizes KL(p* || p_theta). Every update scores
    all masks of one noised state per sample, and weights are positive, so that the bound tightens.
    As far as their abstracts tell, TR2-D2 fills the buffer by tree search, MDNS with samples of the
    policy, and DMPO (2510.08233) subtracts a baseline from the weights; here the buffer is all that
    was queried, and min_ess tempers the weights."""
    return (weights * process.losses(model, tokens, none_given(tokens))).sum()

# -----------------------------------------------------------------------------
# what to learn from, near and far

def distance(rollouts, beta):
    """How far the policy that drew these rollouts is from p* ~ p_ref exp(R / beta) -> 0 to 1.

    By the importance weights of p* on its n samples: 1 / ESS, the sum of their squares, falls from
    1, where one sample has all weight, to 1/n, where all weights are equal: there it is p*."""
    log_w = torch.cat([(old.reward / beta - old.log_ratio)[old.is_own] for old in rollouts])
    lowest = 1 / len(log_w)
    return (log_w.softmax(dim=0).square().sum().item() - lowest) / max(1 - lowest, lowest)


def target_weights(rollouts, beta, min_ess, restricted=False):
    """The distinct samples of rollouts [n, L], their rewards [n], and weights [n] of p* among them.

    A weight is p*(x) over the chance that x was seen at all, as in survey sampling (Horvitz and
    Thompson, 1952): 1 - exp(-m), with m the number of times that all rollouts were to draw it, were
    they like those that did. So where all of a small space was seen it is p* itself; where nothing
    is seen twice it is the importance weight exp(R / beta - log-ratio). restricted: p* itself, as
    if nothing but these samples existed. It keeps what was found, but beta restrains it less."""
    tokens, which = torch.cat([old.tokens for old in rollouts]).unique(dim=0, return_inverse=True)
    count = which.bincount()                                                            # [n]

    def mean(column):
        values = torch.cat([column(old).flatten() for old in rollouts]).double()
        return torch.zeros_like(count, dtype=torch.double).index_add(0, which, values) / count

    log_ref = mean(lambda old: old.log_ref)
    log_m = mean(lambda old: old.log_ref + old.log_ratio) + math.log(len(which))
    log_seen = torch.where(log_m < -20, log_m, (-(-log_m.exp()).expm1()).log())
    cost = -log_ref if restricted else log_seen - log_ref
    reward = mean(lambda old: old.reward)
    return tokens, reward, wdce_weights(reward, cost, beta, min_ess)


def remembered(past, seen, far):
    """What a round of replay learns from -> Rollout: one of the past; with chance `far` half of it
    gives way to samples that p* would draw among all that was `seen`.

    Any group is allowed (see the header); this one shows the policy its own samples beside the best
    ones known. Known samples come in by their weights only, or, where there are none (with prompts,
    or beta = 0), in half of the rounds, so that they cannot crowd out those of the run."""
    own = [old for old in past if old.iter]
    known = [old for old in past if not old.iter]
    rollout = random.choice(known if known and not seen and random.random() < 0.5 else own)
    if random.random() >= far:
        return rollout
    tokens, reward, weights = seen
    P, G = rollout.reward.shape
    good = torch.multinomial(weights, P * (G // 2), replacement=True).view(P, -1)
    rest = torch.randperm(G, device=good.device)[G // 2:]
    drawn = rollout.tokens.unflatten(0, (P, G))[:, rest]                            # [P, G/2, L]
    mixed = torch.cat((tokens[good], drawn), dim=1)                                 # [P, G, L]
    reward = torch.cat((reward[good], rollout.reward[:, rest]), dim=1)
    return replace(rollout, tokens=mixed.flatten(0, 1), reward=reward)


def recombine(tokens, weights, n, mask):
    """n prompts bred from remembered samples [m, L], which are chosen by their weights: a segment
    of one parent is copied into another, moved by up to two positions; then 5 to 50% of all
    positions are masked, so that the policy fits the parts together."""
    L, device = tokens.size(1), tokens.device
    parents = tokens[torch.multinomial(weights, 2 * n, replacement=True)].view(2, n, L)
    place = torch.arange(L, device=device)
    moved = (place + torch.randint(-2, 3, (n, 1), device=device)) % L
    cut = torch.randint(L + 1, (2, n, 1), device=device)
    is_inside = (place >= cut.amin(dim=0)) & (place < cut.amax(dim=0))
    child = torch.where(is_inside, parents[1].gather(1, moved), parents[0])
    chance = 0.05 + 0.45 * torch.rand(n, 1, device=device)
    return child.masked_fill(torch.rand(n, L, device=device) < chance, mask)

# -----------------------------------------------------------------------------
# the methods. Each is a generator (args, process, model, reference, rollout, path, seen), which
# yields (loss, clip_fraction) and expects a step of the optimizers after each. rollout: what to
# learn from; path: how it was drawn, or a path to it without logp; seen: tokens, rewards and
# weights of all samples so far, or None.

def log_probabilities(process, model, reference, rollout, path, with_grad):
    """Score a path in one pass -> logp [n, k] under the current model, with its gradient if wanted;
    the path, with logp filled in if it had none; log p(path)/p_ref(path) [P, G]."""
    with torch.set_grad_enabled(with_grad):
        logp = process.logp(model, path)
    if path.logp is not None:                           # the rollout of this iteration
        return logp, path, rollout.log_ratio
    path = replace(path, logp=logp.detach())
    with torch.no_grad():
        log_ratio = path.per_sequence(path.logp - process.logp(reference, path))
    return logp, path, log_ratio.view_as(rollout.reward)


def worth(args, rollout, log_ratio):
    """The advantages [B] of a rollout whose paths have log-ratios [P, G]."""
    returns = rollout.reward - args.beta * log_ratio                                    # [P, G]
    return advantages(returns, args.advantage, reward_scale(rollout.reward, args.beta)).flatten()


def policy_gradient(args, process, model, reference, rollout, path, seen):
    """sepo, loop and reinforce, on random transitions of each path (args.path_events; 0: all);
    prdp, on all."""
    transitions = 0 if args.algo == "prdp" else args.path_events
    logp, log_ratio = None, rollout.log_ratio
    if not transitions or path.logp is None:
        logp, path, log_ratio = log_probabilities(process, model, reference, rollout, path,
                                                  with_grad=not transitions)
    A = worth(args, rollout, log_ratio)
    for update in range(args.updates):
        part = path.subset(transitions)
        if update > 0 or transitions:
            logp = process.logp(model, part)
        if args.algo == "prdp":
            yield prdp_loss(logp, part, rollout.reward, log_ratio, args.beta, args.clip)
        elif args.algo == "sepo":
            yield sepo_loss(logp, part, A, args.clip, args.clip_mode)
        else:
            yield loop_loss(logp, part, A, args.clip)


def wdce(args, process, model, reference, rollout, path, seen):
    for _ in range(args.updates):
        yield denoise(process, model, seen, len(rollout.tokens))


def denoise(process, model, seen, n):
    """Weighted denoising of n rows of all that was seen, drawn by their weights."""
    tokens, _, weights = seen
    rows = torch.multinomial(weights, n, replacement=True)
    even = torch.full((n,), 1 / n, device=tokens.device)
    return wdce_loss(process, model, tokens[rows], even), even.new_zeros(())


def published(args, process, model, reference, rollout, path, seen):
    A = worth(args, rollout, rollout.log_ratio)
    with torch.no_grad():
        old = neighbours(process, model, rollout.tokens, rollout.given)
    for _ in range(args.updates):
        new = neighbours(process, model, rollout.tokens, rollout.given)
        yield published_loss(new, old, A, args.clip)


METHODS = {"sepo": policy_gradient, "loop": policy_gradient, "reinforce": policy_gradient,
           "prdp": policy_gradient, "wdce": wdce, "published": published}


def can_weigh(args, process):
    """Are importance weights wanted, and known? Only an uncorrected path of masks tells how likely
    its sample is: a path of random letters has many other states."""
    is_asked = args.replay or args.algo == "wdce"
    return args.beta and is_asked and isinstance(process, Absorbing) and not args.corrector_steps


def learn(args, process, model, reference, rollout, path, past):
    """All (loss, clip_fraction) of an iteration: of its rollout, then of remembered samples, each
    time along new paths. past: all rollouts so far, this one among them."""
    far, seen = 0.0, None
    fresh = [old for old in past if old.iter == rollout.iter]       # of all processes
    if can_weigh(args, process) and not any(old.given.any() for old in fresh):
        far = distance(fresh, args.beta)
        seen = target_weights(past, args.beta, args.min_ess, restricted=args.algo == "wdce")
    method = METHODS[args.algo]
    yield from method(args, process, model, reference, rollout, path, seen)
    for k in range(args.replay):
        old = remembered(past, seen, far)
        path = process.path_to(old.tokens, old.given)
        yield from method(args, process, model, reference, old, path, seen)
        wanted = far * args.denoise / args.replay       # after each round
        for _ in range(int((k + 1) * wanted) - int(k * wanted)):
            yield denoise(process, model, seen, len(rollout.tokens))

# -----------------------------------------------------------------------------
# the exact optimum of small spaces

def ground_truth(process, reference, reward, length, beta):
    """-> a function of a model: its J by enumeration, beside the best that any model can do.

    reward: the black box, tokens [V**L, L] -> float [V**L]; queried once. Over distributions p of
    the sample, J(p) = E_p[R] - beta KL(p || p_ref) is largest at p* ~ p_ref exp(R / beta), where it
    is beta log E_ref exp(R / beta). share_of_optimum = (J - J_ref) / (J* - J_ref); where the
    reference is the optimum, as with equal rewards, it is 1 - KL. The distribution is that of
    `sample` without a corrector, and the KL that of the samples, not of the paths."""
    @torch.no_grad()
    def distribution(model):
        p = process.exact_law(model, length)                                            # [V**L]
        return p / p.sum()                              # sums to 1 up to rounding

    R = reward(every_sequence(process.vocab_size, length, device_of(reference))).double()
    unit = R.abs().max().item() or 1.0                  # thresholds are relative to the rewards
    beta = max(beta, 1e-9 * unit)                       # at 0 the optimum is the largest reward
    p_ref = distribution(reference)
    value_ref = (p_ref * R).sum().item()
    tilted = p_ref.log() + R / beta                     # -inf for what the reference never draws
    optimum = beta * tilted.logsumexp(dim=0).item()
    best = (tilted.softmax(dim=0) * R).sum().item()
    room = optimum - value_ref
    if room < 1e-9 * unit:                              # no more than rounding
        room = beta

    def evaluate(model):
        p = distribution(model)
        value = (p * R).sum().item()
        kl = (torch.xlogy(p, p) - torch.xlogy(p, p_ref)).sum().item()   # inf where p_ref is 0 alone
        share = 1 - (optimum - value + beta * kl) / room
        return dict(exact_reward=value, exact_kl=kl, share_of_optimum=share, optimum_reward=best,
                    pretrained_reward=value_ref)
    return evaluate

# -----------------------------------------------------------------------------
# SEPO as published: all sequences that differ from the sample in one position

def neighbours(process, model, x, given):
    """Of samples x [B, L], given [B, L] -> log s(x)_y; estimates of log p(y), without gradient; and
    which y differ from x in a position that is not given; [B, L V] each, for x with position i set
    to letter v.

    s is a ratio of the position's probabilities at t -> 0, with this position masked again."""
    (B, L), V = x.shape, process.vocab_size
    position = torch.arange(L, device=x.device).repeat(B)[:, None]                  # [B L, 1]
    x_masked = x.repeat_interleave(L, dim=0).scatter(1, position, process.mask)     # [B L, L]
    t = torch.zeros(B * L, device=x.device)
    log_w = process.logits(model, x_masked, t, position).log_softmax(dim=-1).view(B, L, V)
    log_s = log_w - pick(log_w, x)[..., None]
    letter = torch.arange(V, device=x.device)
    position = position.repeat_interleave(V, dim=0)                                 # [B L V, 1]
    y = x.repeat_interleave(L * V, dim=0).scatter(1, position, letter.repeat(B * L)[:, None])
    with torch.no_grad():
        p = importance_sampled(process, model, y, position).view(B, L * V)
    is_other = (letter != x[..., None]) & ~given[..., None]
    return log_s.flatten(1), p.clamp(min=1e-30).log(), is_other.flatten(1)


def importance_sampled(process, model, y, position, M=2):
    """The paper's estimate of p(y) -> [n, 1]: y [n, L], and the changed positions [n, 1].

    M sequences z ~ pi(. | y) from the network's distributions at y weigh pi(z) / pi(z | y), with
    pi(z) ~ 1 / pi(z | z), all at the changed position; p(y) is the weighted mean of pi(z | y), as
    in the authors' code (the identity has pi(y | z) there), where a masked model is read at
    positions without a mask, which its training leaves untouched. Their code differs from this in
    four points: its pi(z) is a constant, since it clamps log-probabilities, which are negative, to
    1e-8; it pairs sample m with position m instead of the changed one; y = x counts among the
    neighbours; and it takes the smaller of two sums over the whole batch, not term by term."""
    t = torch.zeros(len(y), device=y.device)
    logits = process.logits(model, y, t)                                                # [n, L, V]
    total = weights = 0
    for _ in range(M):
        z = gumbel_argmax(logits)                                                       # [n, L]
        pi_zy = pick(logits.log_softmax(dim=-1), z).gather(1, position).exp()         # pi(z | y)
        at_z = process.logits(model, z, t, position).log_softmax(dim=-1)                # [n, 1, V]
        pi_zz = pick(at_z, z.gather(1, position)).exp()                               # pi(z | z)
        weight = 1 / (pi_zz * pi_zy).clamp(min=1e-30)
        total += weight * pi_zy
        weights += weight
    return total / weights


def published_loss(new, old, advantages, clip=0.1):
    """The published loss (SEPO, 2502.01384) -> (loss, clip_fraction). new, old: `neighbours` of the
    samples under the current model and under the one that drew them; advantages [B].

    Its gradient is that of E_x[sum_{y != x} p(y) min(r A, clip(r) A) log s(x)_y] with all but log s
    detached: the capped surrogate of r = (p/p_old)(s_old/s), which depends on theta as -log s does.
    The identity behind it sums over all sequences y; over those that differ in one position it is
    biased. With p(y) by sampling the ratio is noisy, so that the clip is active at theta_old."""
    (log_s, log_p, is_other), (log_s_old, log_p_old, _) = new, old                  # [B, L V]
    log_ratio = log_p - log_p_old + log_s_old - log_s
    smaller, is_clipped = surrogate(log_ratio, advantages[:, None], clip)
    objective = -(log_p.exp() * smaller).detach() * log_s
    weight = torch.full_like(advantages, 1 / len(log_s))
    return loss_and_clip_fraction(objective, is_clipped, is_other, weight)
