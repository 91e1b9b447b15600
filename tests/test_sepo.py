"""Every method against autograd through the exact distribution, over all paths; losses by hand.

Read first test_sepo_and_loop_have_the_policy_gradient_of_the_sampler, the claim on which the
project stands, and test_both_clips_by_their_formulas, which is SEPO's algebra.
"""
import itertools
import math
import random
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch

import estimators
import sepo
from diffusion import Absorbing, Path, Uniform
from exact import (Table, chi_square, every_path, every_reveal, exact_p, gradient, kl, law_given,
                   network, posterior_table, probability, random_law, rank, sequences)

KINDS = ["grpo", "loo"]
PROMPT = torch.tensor([2, 1, 2])
CASES = [(Absorbing, 3, None, None), (Absorbing, 3, 2, None), (Absorbing, 3, None, PROMPT),
         (Uniform, 2, 3, None), (Uniform, 2, 2, PROMPT[:2])]


def some_reward(tokens):
    return (tokens[:, :-1] == 0).float().sum(1) - 0.7 * (tokens[:, 0] == tokens[:, -1]).float()


def model_for(chain, L, kind="network", V=2):
    if kind == "table":                                         # conditionals of no one law
        return Table(V, L)
    return network(V, L, n_embd=16, time_conditioning=chain is Uniform)


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, b, atol=tolerance * b.abs().max().item(), rtol=1e-4)


def path_of(logp, row=None, scored=None):
    """A path of numbers alone: transitions with log-probabilities [n, k], of sequences `row`."""
    n, k = logp.shape
    row = torch.arange(n) if row is None else torch.tensor(row)
    scored = torch.ones(n, k, dtype=torch.bool) if scored is None else torch.tensor(scored)
    batch, nothing = int(row.max()) + 1, torch.zeros(n, k, dtype=torch.long)
    time = torch.full((n,), 0.5)
    return Path(row, nothing, time, time, nothing, nothing, scored, logp,
                torch.full((n,), 1 / batch), batch)


def flags(**changes):
    """The flags of train.py that methods read."""
    return SimpleNamespace(**dict(algo="sepo", advantage="loo", beta=0.3, path_events=0, updates=1,
                                  clip=0.1, clip_mode="stop", replay=0, denoise=1,
                                  corrector_steps=0,
                                  min_ess=1.0) | changes)


def rollout_of(tokens, reward, log_ratio=None, iter=1):
    """Samples with rewards [P, G] and log-ratios [P, G]."""
    log_ratio = torch.zeros_like(reward) if log_ratio is None else log_ratio
    return sepo.Rollout(iter=iter, tokens=tokens, given=tokens < 0, reward=reward.double(),
                        is_own=torch.ones_like(reward, dtype=torch.bool),
                        log_ratio=log_ratio.double(), log_ref=torch.zeros_like(reward))


def log_ratio_of(process, model, reference, path):
    """log p(path)/p_ref(path) -> [B]."""
    with torch.no_grad():
        return path.per_sequence(process.logp(model, path) - process.logp(reference, path))

# -----------------------------------------------------------------------------
# the identities


def line(seed=0, V=5):
    """log s at one position, new and old, up to a constant."""
    generator = torch.Generator().manual_seed(seed)
    new = torch.randn(V, generator=generator, dtype=torch.float64).requires_grad_()
    return new, new.detach() + 0.3 * torch.randn(V, generator=generator, dtype=torch.float64)


def test_the_sum_over_the_letters_is_one_log_probability():
    """sum_v w_v grad log s_v = -grad log w_x for log s_v = log p(v) - log p(x)."""
    logits, _ = line()
    log_s = logits - logits[2]
    w = log_s.softmax(0).detach()
    left, = torch.autograd.grad((w * log_s).sum(), logits, retain_graph=True)
    right, = torch.autograd.grad(-logits.log_softmax(0)[2], logits)
    assert torch.allclose(left, right, atol=1e-12)


def test_the_importance_ratio_is_the_same_for_every_neighbour():
    new, old = line()
    w_new, w_old, s_new, s_old = new.softmax(0), old.softmax(0), new.exp(), old.exp()
    s_new, s_old = s_new / s_new[1], s_old / s_old[1]
    r = (w_new / w_old) * (s_old / s_new)
    assert torch.allclose(r, (w_new[1] / w_old[1]).expand(5), atol=1e-12)


@pytest.mark.parametrize("mode", ["stop", "cap"])
@pytest.mark.parametrize("A", [1.5, -0.7])
def test_both_clips_by_their_formulas(mode, A):
    """cap: the paper's sum over the letters, its weights p(y) min(r A, clip(r) A) detached. stop:
    the same where the clip is not active, and no gradient where it is."""
    seen = set()
    for seed in range(40):
        new, old = line(seed)
        logp, logp_old = (x.log_softmax(0)[3].view(1, 1) for x in (new, old))
        r = (logp - logp_old).exp().item()
        capped = min(r * A, min(max(r, 0.8), 1.2) * A)
        active = r * A > capped
        seen.add(active)
        coefficient = 0 if active and mode == "stop" else capped
        weights = (new.softmax(0) * coefficient).detach()
        paper, = torch.autograd.grad((weights * (new - new[3])).sum(), new, retain_graph=True)
        A_of_it = torch.tensor([A], dtype=torch.double)
        loss, flag = sepo.sepo_loss(logp, path_of(logp_old.detach()), A_of_it, 0.2, mode)
        ours, = torch.autograd.grad(loss, new)
        assert torch.allclose(ours, paper, atol=1e-12) and bool(flag) == active
    assert seen == {True, False}


@pytest.mark.parametrize("ratio, A, value, flows", [
    (1.3, 2.0, 2.4, False), (1.3, -2.0, -2.6, True), (0.7, 2.0, 1.4, True),
    (0.7, -2.0, -1.6, False), (1.1, 2.0, 2.2, True), (0.9, -2.0, -1.8, True)])
def test_no_gradient_flows_where_the_clip_is_active(ratio, A, value, flows):
    log_ratio = torch.tensor(ratio).log().requires_grad_()
    objective, is_clipped = sepo.surrogate(log_ratio, torch.tensor(A), 0.2)
    objective.backward()
    assert objective.item() == pytest.approx(value) and bool(is_clipped) is not flows
    assert log_ratio.grad.item() == pytest.approx(value if flows else 0)


def test_a_ratio_ends_at_the_exponential_of_20():
    log_ratio = torch.tensor([1000.0, -1000.0], requires_grad=True)
    objective, _ = sepo.surrogate(log_ratio, torch.tensor([-1.0, 1.0]), 0.2)
    objective.sum().backward()
    assert objective.tolist() == pytest.approx([-math.exp(20), math.exp(-20)], rel=1e-5)
    assert log_ratio.grad.tolist() == [0, 0]


def test_equal_rewards_get_nothing_and_scales_are_of_the_groups():
    """0.05 and 0.1 are not exact in binary; their means over 3, 7 or 100 samples need not be."""
    for G in (3, 7, 100):
        returns = torch.tensor([[0.0] * G, [0.05] * G], dtype=torch.double)
        assert (sepo.advantages(returns, "grpo") == 0).all()
    rewards = torch.tensor([[0.0, 1.0], [10.0, 11.0]])
    assert sepo.reward_scale(rewards).item() == pytest.approx(0.5)
    assert sepo.reward_scale(rewards, beta=1.2).item() == pytest.approx(1.3)            # 5:12:13


def test_a_deviation_that_is_rounding_is_no_scale():
    pair = torch.tensor([[-1.0, 1.0]], dtype=torch.double)
    assert sepo.reward_scale(1 + 1e-15 * pair) == 0
    assert sepo.reward_scale(1 + 1e-12 * pair).item() == pytest.approx(1e-12, rel=1e-3)
    assert sepo.reward_scale(1e-20 * pair).item() == pytest.approx(1e-20)
    assert sepo.reward_scale(1 + 0 * pair, beta=1e-3).item() == pytest.approx(1e-3)

# -----------------------------------------------------------------------------
# gradients, over every path


@pytest.mark.parametrize("kind", ["network", "table"])
@pytest.mark.parametrize("chain, L, steps, prompt", CASES)
def test_sepo_and_loop_have_the_policy_gradient_of_the_sampler(chain, L, steps, prompt, kind):
    """Sum over every path of its probability times the gradient of its loss = autograd through
    the exact law: equal in direction and in scale, for any model, grid and prompt."""
    model, process = model_for(chain, L, kind), chain(2, steps)
    tokens, path, rest = every_path(process, model, L, prompt)
    weight = probability(path, rest) * len(tokens)              # the loss averages over paths
    assert weight.mean().item() * len(weight) == pytest.approx(len(weight), rel=1e-4)
    law = law_given(process, model, L, prompt)
    truth = gradient((law * some_reward(sequences(2, L))).sum(), model)
    A, logp = weight * some_reward(tokens), process.logp(model, path)
    for mode in ("stop", "cap"):
        loss, clip_fraction = sepo.sepo_loss(logp, path, A, clip_mode=mode)
        assert close(-gradient(loss, model), truth) and clip_fraction == 0
    assert close(-gradient(sepo.loop_loss(logp, path, A)[0], model), truth)


@pytest.mark.parametrize("chain, L, steps, prompt", CASES)
def test_kl_in_the_return_is_the_gradient_of_the_kl_of_paths(chain, L, steps, prompt):
    """Both parts: the one through the log-ratio has mean 0, the other goes through the states."""
    model, process = model_for(chain, L), chain(2, steps)
    reference = network(2, L, seed=1, n_embd=16, time_conditioning=chain is Uniform)
    tokens, path, rest = every_path(process, model, L, prompt)
    R, logp, log_ref = some_reward(tokens), process.logp(model, path), process.logp(reference, path)
    log_ratio = path.per_sequence(logp - log_ref.detach())
    p = probability(path, rest, logp)
    J = (p * (R - 0.3 * log_ratio)).sum()
    A = (p * len(tokens) * (R - 0.3 * log_ratio)).detach()
    assert close(-gradient(sepo.sepo_loss(logp, path, A)[0], model), gradient(J, model), 1e-4)


def even_population(P):
    """A uniform policy, so that its 48 paths (8 for each of two prompts if P = 2) are equally
    likely and their plain mean is the exact expectation; and a reference that differs from it."""
    process, reference = Absorbing(2), Table(2, 3, seed=3)
    model = Table(2, 3, torch.zeros(27, 3, 2))
    prompts = [torch.tensor([2, 2, 2])] if P == 1 else [torch.tensor([2, 2, 0]), PROMPT]
    tokens, path, _ = every_reveal(process, *prompts)
    path.logp = process.logp(model, path).detach()
    return process, model, reference, tokens, path


def update(P, kind, reward, beta):
    """Minus the gradient of the loss on the whole population; what grpo divides by."""
    process, model, reference, tokens, path = even_population(P)
    log_ratio = log_ratio_of(process, model, reference, path).view(P, -1)
    rollout = rollout_of(tokens, reward.view(P, -1), log_ratio, iter=2)
    (loss, _), = sepo.METHODS["sepo"](flags(advantage=kind, beta=beta), process, model, reference,
                                      rollout, path, None)
    scale = sepo.reward_scale(rollout.reward, beta) if kind == "grpo" else torch.tensor(1.0)
    return -gradient(loss, model).float(), scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("P", [1, 2])
@pytest.mark.parametrize("spread", [1.0, 0.0])
def test_the_update_is_the_gradient_of_the_objective_with_the_betas_weight(kind, P, spread):
    """Up to one positive number per rollout, also when all rewards are equal (spread 0): then
    it is the gradient of -beta KL."""
    process, model, reference, tokens, path = even_population(P)
    reward, beta = spread * some_reward(tokens), 0.3
    logp, log_ref = process.logp(model, path), process.logp(reference, path).detach()
    p = path.per_sequence(logp - path.logp).exp() / len(tokens)     # differentiable; even
    cost = (p * path.per_sequence(logp - log_ref)).sum()
    G = len(tokens) // P
    loo = G / (G - 1) if kind == "loo" else 1                   # over whole groups, not samples
    truth = loo * gradient((p * reward).sum() - beta * cost, model)
    ours, scale = update(P, kind, reward, beta)
    assert close(ours * scale.float(), truth, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_constants_and_units_of_the_reward_change_nothing(kind):
    reward = some_reward(even_population(2)[3]).double()
    plain, scale = update(2, kind, reward, 0.3)
    for shift, unit in ((1000.0, 1.0), (0.0, 1e-7), (5.0, 1e-7), (1000.0, 0.1), (0.0, 1e6)):
        other, new_scale = update(2, kind, unit * reward + shift, 0.3 * unit)
        factor = 1 if kind == "grpo" else unit
        expected = scale.item() * (unit if factor == 1 else 1)
        assert new_scale.item() == pytest.approx(expected, rel=1e-3)
        assert close(other / factor, plain, 1e-3)


def expected_gradient(kind, G, reward, law, model):
    """The mean update over all groups of G sequences, each with its probability; the sum over a
    group's paths of one sequence is the gradient of its log-probability."""
    groups = torch.tensor(list(itertools.product(range(len(law)), repeat=G)))
    chance = law.detach()[groups].prod(dim=1, keepdim=True)
    A = torch.cat([sepo.advantages(reward[group][None], kind) for group in groups])
    share = torch.zeros_like(law).index_add(0, groups.flatten(), (chance * A / G).flatten())
    return gradient((share * law.log()).sum(), model)


def test_loo_is_unbiased_and_grpo_of_small_groups_is_not():
    """Two samples have grpo's advantages +-1 whatever they earn, so that a difference of 10 counts
    no more than one of 1."""
    process, model, reward = Absorbing(2), Table(2, 2), torch.tensor([1.0, 0.0, 0.0, 10.0])
    law = process.exact_law(model, 2)
    truth = gradient((law * reward).sum(), model)
    for G in (2, 4):
        assert close(expected_gradient("loo", G, reward, law, model), truth)
    for G, cosine in ((2, 0.877), (6, 0.997)):
        ours = expected_gradient("grpo", G, reward, law, model)
        assert torch.cosine_similarity(ours, truth, dim=0) == pytest.approx(cosine, abs=1e-3)


def test_a_group_of_equal_rewards_is_not_made_of_kl():
    """Group 0 has equal rewards; the deviation of its advantages is beta's, not 1."""
    rewards = torch.tensor([[1.0] * 4, [0.0, 1.0, 0.0, 1.0]])
    log_ratio = torch.tensor([[0.1, -0.1, 0.2, -0.2], [0.0] * 4])
    for beta in (0.1, 1e-4):
        scale = sepo.reward_scale(rewards, beta)
        A = sepo.advantages(rewards - beta * log_ratio, "grpo", scale)
        assert A[0].std() < 0.6 * beta and A[1].std() > 0.5


@cache
def truth_of(kind):
    """The reward, the model, its gradients by entries, and the true gradient."""
    model = Table(3, 3) if kind == "random" else posterior_table(random_law(3, 3), 3, 3)
    process, reward = Absorbing(3), torch.randn(27, generator=torch.Generator().manual_seed(1))
    truth = gradient((process.exact_law(model, 3) * reward).sum(), model).float()
    return reward, model, estimators.Entries(process, model, 3), truth


def cosine_of(name, kind):
    """Of the expected gradient of an estimator of tests/estimators.py with the true gradient, and
    the ratio of their norms."""
    reward, model, entries, truth = truth_of(kind)
    mean, noise = estimators.expected_gradient(Absorbing(3), entries, model, 3, reward,
                                               estimators.ESTIMATORS[name])
    assert noise > 0.5
    return torch.cosine_similarity(mean, truth, dim=0).item(), (mean.norm() / truth.norm()).item()


@pytest.mark.parametrize("name, scale", [
    ("sepo, 1 transition", 1), ("sepo, all transitions; LOOP, DCoLT, CJ-GRPO", 1),
    ("AGRPO, 2 states", 1),
    ("TraceRL", 1 / 3)])
def test_estimators_on_the_path_have_the_true_gradient_of_any_model(name, scale):
    assert cosine_of(name, "random") == pytest.approx((1, scale), abs=1e-4)


@pytest.mark.parametrize("name, random, scale", [
    ("sepo, all transitions of a new path (replay)", 0.854, 1), ("noised (ELBO)", 0.854, 1),
    ("ESPO", 0.854, 1 / 3)])
def test_estimators_on_the_sample_have_it_where_the_bound_is_tight(name, random, scale):
    assert cosine_of(name, "consistent") == pytest.approx((1, scale), abs=1e-4)
    assert cosine_of(name, "random")[0] == pytest.approx(random, abs=2e-3)


@pytest.mark.parametrize("name, random, consistent", [
    ("diffu-GRPO", 0.677, 0.699), ("coupled-GRPO", 0.814, 0.926), ("UniGRPO", 0.831, 0.983),
    ("JustGRPO", 0.665, 0.674), ("TraceRL, 2 merged", 0.848, 0.898), ("GDPO", 0.510, 0.690),
    ("terminal (pseudo-likelihood)", 0.420, 0.565), ("SPG", 0.857, 0.998), ("wd1", 0.659, 0.695),
    ("DiPOD", 0.518, 0.716), ("DMPO", 0.825, 0.977), ("WDCE (TR2-D2, MDNS)", 0.535, 0.847),
    ("d2, 2 merged", 0.773, 0.779)])
def test_the_bias_of_the_other_estimators_is_what_the_table_says(name, random, consistent):
    assert cosine_of(name, "random")[0] == pytest.approx(random, abs=2e-3)
    assert cosine_of(name, "consistent")[0] == pytest.approx(consistent, abs=2e-3)


def test_random_draws_of_an_estimator_are_those_that_are_enumerated():
    """The mean of the bound's weights over random draws: every position counts once."""
    process, model = Absorbing(2), Table(2, 3)
    torch.manual_seed(0)
    random.seed(0)
    tokens, path = process.sample(model, 3000, 3)
    for name, total in (("noised (ELBO)", 3), ("sepo, 1 transition", 3), ("UniGRPO", 1)):
        part = estimators.random_path(process, model, tokens, path, estimators.ESTIMATORS[name])
        weights = part.weight[:, None] * part.scored / 3000
        sums = torch.zeros(3).index_add(0, part.positions.flatten(), weights.flatten())
        assert sums.tolist() == pytest.approx([total / 3] * 3, abs=0.1)
        assert (part.x.gather(1, part.positions) == 2)[part.scored].all()
        assert (part.y == tokens[part.row].gather(1, part.positions)).all()

# -----------------------------------------------------------------------------
# SEPO as published


def test_the_published_estimator_is_its_formula_written_out(monkeypatch):
    """Its gradient, with exact p(y) and active clips; on three positions of two letters."""
    process, model, old_model = Absorbing(2), Table(2, 3), Table(2, 3, seed=1)
    monkeypatch.setattr(sepo, "importance_sampled", exact_p(process))
    torch.manual_seed(4)
    tokens, _ = process.sample(old_model, 6, 3)
    A, given = torch.randn(6), torch.tensor([False, False, True]).expand(6, 3)
    new, old = (sepo.neighbours(process, m, tokens, given) for m in (model, old_model))
    assert new[0].requires_grad and not new[1].requires_grad
    loss, clip_fraction = sepo.published_loss(new, old, A, 0.2)
    p_new, p_old = (process.exact_law(m, 3).detach() for m in (model, old_model))
    total, active = 0.0, []
    for x, a in zip(tokens, A):
        for i in range(2):                                      # a given position has no neighbours
            hole, y = x.clone(), x.clone()
            hole[i], y[i] = 2, 1 - x[i]
            new, before = (m(hole[None])[0, i].log_softmax(0) for m in (model, old_model))
            log_s, log_s_old = new[y[i]] - new[x[i]], before[y[i]] - before[x[i]]
            place = int(y @ torch.tensor([4, 2, 1]))
            r = p_new[place] / p_old[place] * (log_s_old - log_s).exp().detach()
            smaller = torch.minimum(r * a, r.clamp(0.8, 1.2) * a)
            active.append(bool(r * a > smaller))
            total = total + p_new[place] * smaller.detach() * log_s / 6
    assert close(gradient(loss, model), gradient(total, model))
    assert clip_fraction.item() == pytest.approx(sum(active) / 12) and 0 < sum(active) < 12


def test_importance_sampling_of_the_neighbours_tends_to_its_limit(monkeypatch):
    """One position: the weights are 1 / (pi(z|z) pi(z|y)), so p(y) tends to 1 / sum_z 1 / pi(z|z)
    weighted as drawn: sum_z pi(z|y) / pi(z|z) / sum_z 1 / pi(z|z)."""
    process, model = Absorbing(3), Table(3, 1)
    monkeypatch.setattr(sepo, "importance_sampled", partial(sepo.importance_sampled, M=200))
    torch.manual_seed(0)
    x = torch.zeros(500, 1, dtype=torch.long)
    _, log_p, _ = sepo.neighbours(process, model, x, x < 0)
    pi = model(sequences(3, 1))[:, 0].softmax(-1).detach()      # [y, z]
    inverse = 1 / pi.diagonal()
    expected = (pi * inverse).sum(1) / inverse.sum()
    assert torch.allclose(log_p.exp().mean(dim=0), expected, atol=0.02)

# -----------------------------------------------------------------------------
# losses by hand


def test_loop_clips_a_transition_and_sepo_a_position():
    """Two positions in one transition, each with ratio 1.15: the product 1.3225 is clipped at 1.2.
    """
    path = path_of(torch.tensor([[-0.5, -2.0]]))
    logp = (path.logp + math.log(1.15)).requires_grad_()
    for A, value, fraction in ((2.0, 2.4, 1), (-2.0, -2.645, 0)):
        loss, clip_fraction = sepo.loop_loss(logp, path, torch.tensor([A]), 0.2)
        slope, = torch.autograd.grad(loss, logp)
        assert loss.item() == pytest.approx(-value, abs=1e-5) and clip_fraction == fraction
        assert (slope == 0).all() == bool(fraction)
    assert sepo.sepo_loss(logp, path, torch.tensor([2.0]), clip=0.2)[1] == 0
    assert sepo.sepo_loss(logp, path, torch.tensor([2.0]), clip=0.1)[1] == 1


def test_the_clip_fraction_is_the_share_of_scored_terms():
    """Three positions in two transitions, of which the first has moved; beside them padding that
    seems to, and a transition where nothing is scored."""
    path = path_of(torch.zeros(3, 2), scored=[[True, True], [True, False], [False, False]])
    logp, A = torch.tensor([[1.0, 0.0], [0.0, 5.0], [5.0, 5.0]]), torch.ones(3)
    assert sepo.sepo_loss(logp, path, A, 0.2)[1].item() == pytest.approx(1 / 3)
    assert sepo.loop_loss(logp, path, A, 0.2)[1].item() == pytest.approx(1 / 2)
    assert sepo.sepo_loss(logp, path, -A, 0.2)[1] == sepo.loop_loss(logp, path, -A, 0.2)[1] == 0


def test_padding_and_what_is_given_change_no_loss():
    path = path_of(torch.zeros(3, 2), [0, 1, 0], [[True, True], [True, False], [False, False]])
    rewards, log_ratio = torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2)
    for loss_of in (lambda logp: sepo.sepo_loss(logp, path, torch.ones(2)),
                    lambda logp: sepo.loop_loss(logp, path, torch.ones(2)),
                    lambda logp: sepo.prdp_loss(logp, path, rewards, log_ratio, 1.0)):
        losses = [loss_of(torch.tensor([[0.02, 0.01], [0.03, x], [x, x]]))[0] for x in (0, 5)]
        assert losses[0] == losses[1] != 0
    loss, _ = sepo.loop_loss(torch.zeros(3, 2), path, torch.tensor([1.0, 1.0]))
    assert loss == -1                                           # two transitions / two sequences


def test_on_one_position_per_transition_sepo_is_loop():
    """Without a grid, with PPO's clip: the same loss and gradient, also away from theta_old."""
    process, model, other = Absorbing(3), network(3, 4), network(3, 4, seed=1)
    torch.manual_seed(0)
    path, A = process.sample(other, 32, 4)[1].subset(1), torch.randn(32)
    logp = process.logp(model, path)
    a, b = sepo.sepo_loss(logp, path, A), sepo.loop_loss(logp, path, A)
    assert torch.allclose(a[0], b[0]) and a[1] == b[1] > 0.1
    assert close(gradient(a[0], model), gradient(b[0], model))


def test_advantages_are_one_per_sequence():
    path = path_of(torch.zeros(6, 1), row=[0, 1, 2, 0, 1, 2])
    for A in (torch.ones(6), torch.ones(2), torch.ones(3, 1), torch.tensor(1.0)):
        for loss_of in (sepo.sepo_loss, sepo.loop_loss):
            with pytest.raises(ValueError, match="3 advantages are needed, not") as error:
                loss_of(path.logp, path, A)
            assert "\n" not in str(error.value)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown advantage"):
        sepo.advantages(torch.zeros(1, 2), "gae")

# -----------------------------------------------------------------------------
# the methods, as train.py runs them


def spied(process):
    """A list of (model, path) of all calls of process.logp."""
    calls, logp = [], process.logp
    process.logp = lambda *call: calls.append(call) or logp(*call)
    return calls


def shift_(model):
    """In place of a step of the optimizer."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)


def a_round(L=4, V=3, steps=2):
    """process, model, reference, rollout of two groups, path, past: on a grid, so that transitions
    move several positions."""
    process, model, reference = Absorbing(V, steps), network(V, L), network(V, L, seed=1)
    torch.manual_seed(3)
    tokens, path = process.sample(model, 12, L)
    log_ratio = log_ratio_of(process, model, reference, path).view(2, 6)
    rollout = rollout_of(tokens, some_reward(tokens).view(2, 6), log_ratio)
    return process, model, reference, rollout, path, [rollout]


def drawn_or_remembered(process, model, reference, rollout, path, is_new):
    """The rollout's own path, or a new one to its samples; the old logp and log-ratios there."""
    old = path.logp
    if not is_new:
        path = process.path_to(rollout.tokens)
        old = process.logp(model, path).detach()
    log_ratio = path.per_sequence(old - process.logp(reference, path)).detach()
    return path, old, log_ratio.view(2, 6)


@pytest.mark.parametrize("algo, loss_of", [
    ("sepo", sepo.sepo_loss), ("loop", sepo.loop_loss), ("reinforce", sepo.loop_loss),
    ("cap", partial(sepo.sepo_loss, clip_mode="cap"))])
@pytest.mark.parametrize("is_new", [True, False])
def test_one_pass_of_the_model_serves_the_loss_and_the_log_ratio(algo, loss_of, is_new):
    """Of a new path, and of one without logp: that is the current model's, and the reference is
    asked. Beside it all is computed step by step, also for a second update."""
    process, model, reference, rollout, path, past = a_round()
    path, old, log_ratio = drawn_or_remembered(process, model, reference, rollout, path, is_new)
    A = sepo.advantages(rollout.reward - 0.3 * log_ratio, "loo").flatten()
    mode = "cap" if algo == "cap" else "stop"
    args = flags(algo="sepo" if mode == "cap" else algo, clip_mode=mode, updates=2, clip=0.01)
    calls = spied(process)
    updates = sepo.METHODS[args.algo](args, process, model, reference, rollout, path, past)
    for update in range(2):
        loss, clip_fraction = next(updates)
        assert [m for m, _ in calls] == [model] * (update + 1) if is_new else \
            [m for m, _ in calls] == [model, reference, model][:update + 2]
        known = replace(path, logp=old)
        expected, fraction = loss_of(process.logp(model, known), known, A, clip=0.01)
        calls.pop()                                             # that of the line above
        assert torch.allclose(loss, expected, atol=1e-5) and clip_fraction == fraction
        assert close(gradient(loss, model), gradient(expected, model), 1e-4)
        shift_(model)
    assert fraction > 0 and next(updates, None) is None


@pytest.mark.parametrize("is_new", [True, False])
def test_random_transitions_are_drawn_for_every_update(is_new):
    process, model, reference, rollout, path, past = a_round(steps=None)
    path = path if is_new else process.path_to(rollout.tokens)
    calls = spied(process)
    for loss, _ in sepo.METHODS["sepo"](flags(path_events=2, updates=3), process, model, reference,
                                        rollout, path, past):
        assert loss.requires_grad
    whole = [] if is_new else [(model, 48), (reference, 48)]    # a pass without gradient
    assert [(m, len(part)) for m, part in calls] == whole + [(model, 24)] * 3
    a, b, c = (part.x for _, part in calls[-3:])
    assert not torch.equal(a, b) and not torch.equal(b, c)


def test_the_return_of_a_new_path_and_of_a_remembered_one(monkeypatch):
    """One position of two letters; the model draws 1 with odds of 3 to 1, the reference evenly. A
    new path has the log-ratio that its rollout knows; without logp it is computed."""
    process, reference = Absorbing(2), Table(2, 1, torch.zeros(3, 1, 2))
    model = Table(2, 1, torch.tensor([0.0, math.log(3)]).expand(3, 1, 2).clone())
    tokens, reward = torch.tensor([[0], [1]]), torch.tensor([[5.0, 7.0]])
    rollout = rollout_of(tokens, reward, torch.tensor([[0.25, 0.5]]), iter=4)
    seen, advantages = [], sepo.advantages
    monkeypatch.setattr(sepo, "advantages", lambda *a: seen.append(a) or advantages(*a))
    remembered = process.path_to(tokens)
    new = replace(remembered, logp=process.logp(model, remembered).detach())
    for path, log_ratio in ((new, [0.25, 0.5]), (remembered, [math.log(0.5), math.log(1.5)])):
        for events in (0, 1):
            list(sepo.METHODS["sepo"](flags(beta=2.0, path_events=events, advantage="grpo"),
                                      process, model, reference, rollout, path, None))
            returns, kind, scale = seen.pop()
            expected = [r - 2 * x for r, x in zip((5, 7), log_ratio)]
            assert returns.tolist()[0] == pytest.approx(expected) and kind == "grpo"
            assert scale.item() == pytest.approx(5 ** 0.5)                      # sqrt(1 + beta^2)


@pytest.mark.parametrize("events", [0, 2])
@pytest.mark.parametrize("algo", ["sepo", "loop"])
def test_a_path_without_any_transition_has_a_loss_of_zero(algo, events):
    """As after a corrector at a small t, where nothing is masked again."""
    process, model = Absorbing(3), network(3, 4)
    tokens, _ = process.sample(model, 6, 4)
    _, path = process.correct_path(model, tokens, tokens < 0, 1e-6, 1)
    assert len(path) == 0
    rollout = rollout_of(tokens, some_reward(tokens).view(1, 6))
    for loss, clip_fraction in sepo.METHODS[algo](flags(algo=algo, path_events=events), process,
                                                  model, model, rollout, path, [rollout]):
        loss.backward()
        assert loss == 0 and clip_fraction == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("chain", [Absorbing, Uniform])
@pytest.mark.parametrize("events", [0, 1, 2])
def test_chunks_add_up_to_the_whole_update(chain, events):
    model, process = network(4, 6, time_conditioning=True), chain(4, steps=5)
    other = network(4, 6, seed=2, time_conditioning=True)
    torch.manual_seed(30)
    tokens, path = process.sample(other, 16, 6)
    rollout = rollout_of(tokens, some_reward(tokens).view(2, 8))
    for algo in ("sepo", "loop", "prdp"):
        parts = []
        for process.chunk in (2048, 5):
            torch.manual_seed(31)
            (loss, fraction), = sepo.METHODS[algo](flags(algo=algo, path_events=events), process,
                                                   model, other, rollout, path, [rollout])
            parts.append((loss, fraction, gradient(loss, model)))
        whole, sum_of_parts = parts
        assert torch.allclose(whole[0], sum_of_parts[0], atol=1e-5) and whole[1] == sum_of_parts[1]
        assert close(whole[2], sum_of_parts[2])


@pytest.mark.parametrize("is_new", [True, False])
def test_prdp_runs_on_whole_paths(is_new):
    process, model, reference, rollout, path, past = a_round()
    path, old, log_ratio = drawn_or_remembered(process, model, reference, rollout, path, is_new)
    calls, args = spied(process), flags(algo="prdp", updates=2, path_events=1, clip=0.01)
    for update, (loss, clip_fraction) in enumerate(sepo.METHODS["prdp"](
            args, process, model, reference, rollout, path, past)):
        assert len(calls) == update + (1 if is_new else 2)
        known = replace(path, logp=old)
        expected = sepo.prdp_loss(process.logp(model, known), known, rollout.reward, log_ratio,
                                  0.3, 0.01)
        calls.pop()
        assert torch.allclose(loss, expected[0], atol=1e-5) and clip_fraction == expected[1]
        assert close(gradient(loss, model), gradient(expected[0], model), 1e-4)
        shift_(model)
    assert update == 1 and clip_fraction > 0


def test_published_remembers_the_neighbours_of_the_old_model(monkeypatch):
    process, model, reference, rollout, path, past = a_round(L=3, V=2, steps=None)
    monkeypatch.setattr(sepo, "importance_sampled", exact_p(process))
    samples = rollout.tokens, rollout.given
    old = [x.detach() for x in sepo.neighbours(process, model, *samples)]
    A = sepo.advantages(rollout.reward - 0.3 * rollout.log_ratio, "loo").flatten()
    for update, (loss, clip_fraction) in enumerate(sepo.METHODS["published"](
            flags(updates=2, clip=0.01), process, model, reference, rollout, path, past)):
        expected = sepo.published_loss(sepo.neighbours(process, model, *samples), old, A, 0.01)
        assert torch.allclose(loss, expected[0]) and clip_fraction == expected[1]
        assert (clip_fraction > 0) == (update > 0)              # p(y) is exact: r = 1 at first
        shift_(model)
    assert update == 1


def of_columns(tokens, reward, log_ratio, log_ref):
    """A rollout of one group."""
    rollout = rollout_of(torch.tensor(tokens), torch.tensor([reward]), torch.tensor([log_ratio]))
    return replace(rollout, log_ref=torch.tensor([log_ref]).double())


OLD = of_columns([[0, 0], [0, 1]], [1.0, 5.0], [0.1, 0.2], [-1.0, -2.0])
NEW = of_columns([[0, 1], [1, 1]], [5.0, 3.0], [0.4, 0.3], [-2.5, -3.0])    # 01 for a second time


def test_weights_of_the_target_by_hand():
    """A sample that was drawn twice counts once; both of its paths tell how likely it was. The
    effective sample size is at most half of the samples, whatever was asked."""
    tokens, reward, weights = sepo.target_weights([OLD, NEW], 2.0, 1)
    assert tokens.tolist() == [[0, 0], [0, 1], [1, 1]] and reward.tolist() == [1, 5, 3]
    expected = 4 * torch.tensor([-0.9, -1.95, -2.7]).exp()      # times drawn, of four draws
    log_w = reward / 2 + torch.tensor([-1, -2.25, -3]) - (1 - (-expected).exp()).log()
    assert torch.allclose(weights, log_w.softmax(0), atol=1e-6)
    _, _, half = sepo.target_weights([OLD, NEW], 0.02, 3)
    assert 1 / half.square().sum() == pytest.approx(1.5, rel=1e-3)


@pytest.mark.parametrize("log_ref", [0.0, -15.0, -25.0, -2000.0])
def test_weights_of_the_target_in_small_and_in_large_spaces(log_ref):
    """Where everything was seen, p_ref exp(R / beta); where nothing is seen twice, exp(R / beta -
    log-ratio), without an underflow."""
    R, log_ratio, log_p = [0.0, 0.3, 0.1, 0.2], [0.5, 0.1, -0.3, 0.2], [0.2, 0.1, 0.4, 0.0]
    refs = [log_ref + x for x in log_p]
    rows = [[0, 0], [0, 1], [1, 0], [1, 1]]
    _, _, weights = sepo.target_weights([of_columns(rows, R, log_ratio, refs)] * 50, 1.0, 1)
    small = torch.tensor(R) + torch.tensor(log_p)
    large = torch.tensor(R) - torch.tensor(log_ratio)
    expected = (large if log_ref < -9 else small).double().softmax(0)
    assert torch.allclose(weights, expected, atol=1e-3)
    _, _, weights = sepo.target_weights([of_columns(rows, R, log_ratio, refs)], 1.0, 1,
                                        restricted=True)
    assert torch.allclose(weights, small.double().softmax(0), atol=1e-3)


@pytest.mark.parametrize("algo, restricted", [("wdce", True), ("sepo", False), ("loop", False)])
def test_wdce_alone_learns_from_the_optimum_restricted_to_what_was_seen(algo, restricted,
                                                                        monkeypatch):
    process, model, reference, rollout, path, past = a_round(L=3, V=2, steps=None)
    found, real = [], sepo.target_weights
    monkeypatch.setattr(sepo, "target_weights", lambda *args, **more: (
        found.append(more) or real(*args, **more)))
    next(sepo.learn(flags(algo=algo, replay=algo != "wdce"), process, model, reference, rollout,
                    path, [rollout]))
    assert found == [dict(restricted=restricted)]


def test_wdce_draws_what_was_seen_by_the_weights_of_the_target(monkeypatch):
    """Each update has as many rows as a rollout."""
    process, seen = Absorbing(2), []

    def loss_of(process, model, tokens, weights):
        seen.append((tokens, weights))
        return model
    monkeypatch.setattr(sepo, "wdce_loss", loss_of)
    torch.manual_seed(0)
    updates = sepo.METHODS["wdce"](flags(updates=2000), process, "the loss", None, NEW, None,
                                   sepo.target_weights([OLD, NEW], 2.0, 1))
    assert all(loss == "the loss" and fraction == 0 for loss, fraction in updates)
    assert len(seen) == 2000
    assert all(len(tokens) == 2 and weights.tolist() == [0.5, 0.5] for tokens, weights in seen)
    _, _, weights = sepo.target_weights([OLD, NEW], 2.0, 1)
    law = torch.tensor([weights[0], weights[1], 0, weights[2]])
    assert chi_square(torch.cat([tokens for tokens, _ in seen]), law, 2) > 1e-3

# -----------------------------------------------------------------------------
# near and far


def test_the_distance_is_zero_at_the_optimum_and_one_where_one_sample_has_all_weight():
    """By hand: weights 1 : 2 : 2 of p*, so 1/ESS = 9/25, and (9/25 - 1/3) / (1 - 1/3) = 1/25. By
    enumeration: on all paths of the optimum itself."""
    beta, log2 = 0.5, math.log(2)
    tokens = torch.zeros(2, 1, dtype=torch.long)
    parts = [rollout_of(tokens, torch.tensor([[7.0, 7 + beta * log2]]), torch.tensor([[3.0, 3.0]])),
             rollout_of(tokens[:1], torch.tensor([[7 + 2 * beta * log2]]),
                        torch.tensor([[3 + log2]]))]
    assert sepo.distance(parts, beta) == pytest.approx(1 / 25)
    parts[0].is_own = torch.tensor([[False, True]])             # weights 2 : 2 of its own are equal
    assert sepo.distance(parts, beta) == pytest.approx(0, abs=1e-6)
    _, _, path, R, log_ratio, beta, _ = optimum()
    tokens = torch.zeros(R.numel(), 3, dtype=torch.long)
    assert sepo.distance([rollout_of(tokens, R, log_ratio)], beta) == pytest.approx(0, abs=1e-6)
    assert sepo.distance([rollout_of(tokens, R, log_ratio)], beta / 1e9) == pytest.approx(1, abs=1)


def test_weights_of_the_target_are_those_of_p_star_among_random_samples():
    """80 rollouts of 32 from p_ref, 4,096 states; with a reward of 0 p* is p_ref. On average over
    what is seen and what is not, a weight is p*: so their sums over halves of the space agree."""
    torch.manual_seed(0)
    law = random_law(2, 12, spread=2.0).double()                                        # [4096]
    x, past = sequences(2, 12), []
    for _ in range(80):
        rows = torch.multinomial(law.float(), 32, replacement=True)
        rollout = rollout_of(x[rows], torch.zeros(1, 32))
        past.append(replace(rollout, log_ref=law[rows].log()[None]))
    tokens, _, weights = sepo.target_weights(past, 1.0, 1)
    for i in range(12):                             # some 1,000 states are seen: 0.03 at most
        assert weights[tokens[:, i] == 0].sum() == pytest.approx(law[x[:, i] == 0].sum().item(),
                                                                    abs=0.05)
    assert (weights * law[rank(tokens, 2)].log()).sum() == pytest.approx(
        (law * law.log()).sum().item(), abs=0.3)    # minus the entropy, nats


def test_one_sample_of_its_own_is_a_distance_of_zero():
    assert sepo.distance([rollout_of(torch.zeros(1, 1).long(), torch.ones(1, 1))], 0.1) == 0


def seen_and_past():
    """Known samples 9, and two rollouts of two groups of four: samples 0 to 7 and 10 to 17."""
    row = torch.arange(8)[:, None]
    past = [rollout_of(row[:2] * 0 + 9, torch.full((1, 2), 9.0), iter=0),
            rollout_of(row, row.view(2, 4).float()), rollout_of(row + 10, row.view(2, 4) + 10.0)]
    return (torch.tensor([[20], [21], [22]]), torch.tensor([20.0, 21, 22]).double(),
            torch.tensor([0.7, 0.3, 0.0]).double()), past


def test_a_remembered_group_is_half_of_what_the_optimum_would_draw_with_chance_far():
    seen, past = seen_and_past()
    random.seed(0)
    torch.manual_seed(0)
    halves, good, kept = 0, [], set()
    for _ in range(400):
        group = sepo.remembered(past, seen, 0.25)
        assert torch.equal(group.tokens.flatten().double(), group.reward.flatten())
        if any(group is old for old in past[1:]):
            continue
        halves += 1
        first, rest = group.tokens.view(2, 4).split(2, dim=1)
        good += first.flatten().tolist()
        kept |= set(rest.flatten().tolist())
        assert all(len(set(row)) == 2 for row in rest.tolist())
        assert ((rest % 10 // 4).T == torch.arange(2)).all()    # each group keeps its own
    assert 70 < halves < 130 and kept == {*range(8), *range(10, 18)}
    assert set(good) == {20, 21} and good.count(20) / len(good) == pytest.approx(0.7, abs=0.08)


def test_known_samples_never_crowd_out_those_of_the_run():
    """They are in the weights; where each prompt has its own samples, in half of the rounds."""
    seen, past = seen_and_past()
    random.seed(1)
    past = past[:1] * 50 + past[1:]
    assert all(sepo.remembered(past, seen, 0.0).iter for _ in range(50))
    counts = [sepo.remembered(past, None, 0.0).iter for _ in range(400)].count(0)
    assert 150 < counts < 250
    assert all(sepo.remembered(past[50:], None, 0.0).iter for _ in range(9))


def test_a_recombined_sample_has_a_segment_of_another_that_is_moved_and_masks():
    """Each letter names its parent and its place there. A third parent has no weight."""
    L, n = 40, 600
    parents = torch.arange(3 * L).view(3, L)
    torch.manual_seed(0)
    child = sepo.recombine(parents, torch.tensor([0.5, 0.5, 0.0]), n, 3 * L)
    free = child == 3 * L
    parent, shift = child // L, (child - torch.arange(L) + 2) % L - 2
    assert set(parent[~free].tolist()) == {0, 1} and set(shift[~free].tolist()) == {*range(-2, 3)}
    crossed = 0
    for i in range(n):
        rows = zip(parent[i, ~free[i]].tolist(), shift[i, ~free[i]].tolist())
        pieces = [piece for piece, _ in itertools.groupby(rows)]
        assert len(pieces) <= 3 and (len(pieces) < 3 or pieces[0] == pieces[2])
        assert all(move == 0 for _, move in (pieces[0], pieces[-1])) or len(pieces) < 3
        crossed += len({parent for parent, _ in pieces}) > 1
    assert crossed > n / 4                                      # half of the pairs differ
    share = free.float().mean(dim=1)            # a deviation of 0.13, or of 0.07 at one chance
    assert share.mean().item() == pytest.approx(0.275, abs=0.02) and share.std() > 0.12


def test_at_the_optimum_what_is_biased_has_faded_and_the_rest_stands_still():
    """Weighted denoising of two of eight sequences would leave the optimum; its share is 0 there,
    and so is the gradient along new paths to any samples."""
    process, model, _, _, _, beta, reference = optimum()
    bias = sepo.wdce_loss(process, model, sequences(2, 3)[[0, 7]].repeat(50, 1),
                          torch.full((100,), 0.01))
    assert gradient(bias, model).abs().max() > 0.01
    tokens, path = process.sample(model, 40, 3)
    rollout = rollout_of(tokens, some_reward(tokens)[None],
                         log_ratio_of(process, model, reference, path)[None])
    args = flags(beta=beta, replay=3, denoise=12)
    losses = list(sepo.learn(args, process, model, reference, rollout, path, [rollout]))
    assert len(losses) == 1 + 3
    assert all(gradient(loss, model).abs().max() < 1e-5 for loss, _ in losses)


def test_an_iteration_denoises_as_often_as_it_is_far(monkeypatch):
    """At a distance of 0.3 so are 3 of 10 updates, over 5 rounds; with prompts and at beta 0 none.
    All rollouts of the iteration are measured, and all that was seen is weighed."""
    process, model, reference, rollout, path, past = a_round(steps=None)
    past = [replace(past[0], iter=1), replace(rollout, iter=2), replace(rollout, iter=2)]
    asked, drawn = [], []
    monkeypatch.setattr(sepo, "distance", lambda old, beta: asked.append((old, beta)) or 0.3)
    monkeypatch.setattr(sepo, "denoise", lambda *a: drawn.append(a) or "denoised")
    monkeypatch.setattr(sepo, "remembered", lambda past, seen, far: drawn.append(far) or past[0])
    args = flags(replay=5, denoise=10, beta=0.5)

    def kinds(args, rollout):
        asked.clear(), drawn.clear()
        updates = sepo.learn(args, process, model, reference, rollout, path, past)
        return "".join("d" if update == "denoised" else "m" for update in updates)
    assert kinds(args, past[1]) == "mmmdmmdmd"
    (old, beta), = asked
    assert len(old) == 2 and old[0] is past[1] and old[1] is past[2] and beta == 0.5
    whole = sepo.target_weights(past, 0.5, args.min_ess)
    for _, scored, seen, n in (call for call in drawn if call != 0.3):
        assert scored is model and n == len(rollout.tokens)
        assert all(torch.equal(a, b) for a, b in zip(seen, whole))
    assert kinds(flags(replay=5, denoise=10, beta=0.0), past[1]) == "m" * 6
    assert sepo.can_weigh(args, Absorbing(2)) and not sepo.can_weigh(args, Uniform(2))
    assert not sepo.can_weigh(flags(replay=5, corrector_steps=1), Absorbing(2))
    assert not sepo.can_weigh(flags(replay=0), Absorbing(2))
    assert sepo.can_weigh(flags(replay=0, algo="wdce"), Absorbing(2))
    past[2] = replace(past[1], given=torch.ones_like(rollout.given))    # on another process
    assert kinds(args, past[1]) == "m" * 6 and drawn == [0.0] * 5 and not asked

# -----------------------------------------------------------------------------
# off policy: remembered samples


def random_weights(n, seed=5):
    """A distribution over n paths that no policy has."""
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).softmax(0)


@pytest.mark.parametrize("chain, L, steps, prompt", CASES)
def test_off_policy_the_update_is_the_gradient_of_the_log_variance(chain, L, steps, prompt):
    """For any q over paths, with d = beta log p(path)/p_ref(path) - R:
    grad Var_q(d) / (2 beta) = -E_q[A grad log p(path)], A = (R - beta log p/p_ref) - its mean under
    q (VarGrad, 2010.10436). The paths are all paths of the sampler, with random weights."""
    model, process, beta = model_for(chain, L), chain(2, steps), 0.3
    reference = network(2, L, seed=1, n_embd=16, time_conditioning=chain is Uniform)
    tokens, path, _ = every_path(process, model, L, prompt)
    q, R, B = random_weights(len(tokens)), some_reward(tokens), len(tokens)
    logp = process.logp(model, path)
    log_ratio = path.per_sequence(logp - process.logp(reference, path).detach())
    d = beta * log_ratio - R
    truth = gradient(((q * d ** 2).sum() - (q * d).sum() ** 2) / (2 * beta), model)
    A = (((q * d).sum() - d) * q * B).detach()
    assert close(gradient(sepo.sepo_loss(logp, path, A)[0], model), truth)
    assert close(gradient(sepo.loop_loss(logp, path, A)[0], model), truth)
    truth = gradient(d.var(correction=0) / (2 * beta), model)   # prdp: q is uniform
    loss, clip_fraction = sepo.prdp_loss(logp, path, R[None], log_ratio.detach()[None], beta)
    assert close(gradient(loss, model), truth) and clip_fraction == 0


def test_the_only_zero_of_the_log_variance_is_the_optimum():
    """Descent along the update of random rows that no policy drew, on new paths every time, ends
    at p* ~ p_ref exp(R / beta)."""
    V, L, process, args = 2, 2, Absorbing(2), flags(beta=0.5)
    reference = posterior_table(random_law(V, L), V, L)
    R = some_reward(sequences(V, L))
    optimum = (process.exact_law(reference, L).detach().log() + R / args.beta).softmax(0)
    model = Table(V, L)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    torch.manual_seed(6)
    for i in range(400):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - i / 400)
        tokens = sequences(V, L)[torch.randint(V ** L, (16,))]
        rollout = rollout_of(tokens, some_reward(tokens)[None])
        for loss, _ in sepo.METHODS["sepo"](args, process, model, reference, rollout,
                                            process.path_to(tokens), [rollout]):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found = process.exact_law(model, L).detach()
    assert kl(optimum, found) < 1e-3 < 0.05 < kl(optimum, process.exact_law(reference, L).detach())

# -----------------------------------------------------------------------------
# weighted denoising cross-entropy


def test_wdce_weights_are_those_of_the_optimum_and_keep_the_sample_size():
    """All four sequences, as if drawn uniformly: their cost is -log(4 p_ref), so c = 1 gives p*."""
    reference = random_law(2, 2).double()
    R = some_reward(sequences(2, 2)).double()
    optimum = (reference.log() + R / 0.5).softmax(0)
    cost = -(4 * reference).log()
    assert torch.allclose(sepo.wdce_weights(R, cost, 0.5, min_ess=1), optimum)
    for beta, min_ess in ((0.01, 1.2), (0.01, 1.9), (1e-6, 1.5)):
        w = sepo.wdce_weights(R, cost, beta, min_ess)
        assert 1 / w.square().sum().item() == pytest.approx(min_ess, rel=1e-3)
        assert w.sum().item() == pytest.approx(1) and w.argmax() == (R / beta - cost).argmax()
    w = sepo.wdce_weights(R, cost, 0.01, min_ess=9)
    assert 1 / w.square().sum().item() == pytest.approx(2, rel=1e-3)            # half of four


class EveryMask(Absorbing):
    """Absorbing(2) that masks two positions in all ways at once, in proportion to their chances:
    rows of four, for the subsets {0}, {1}, {0, 1} and {0, 1} again."""

    def mask_some(self, x0, given):
        masked = torch.tensor([[1, 0], [0, 1], [1, 1], [1, 1]]).bool().repeat(len(x0) // 4, 1)
        n_masked = masked.sum(dim=1)
        return torch.where(masked, 2, x0), n_masked / 3, masked, 2 / n_masked


def test_the_wdce_gradient_is_that_of_the_bound_and_vanishes_at_the_optimum():
    V, L, process = 2, 2, EveryMask(2)
    optimum = random_law(V, L, seed=4)
    x = sequences(V, L).repeat_interleave(4, dim=0)
    weights = (optimum / 4).repeat_interleave(4)

    def ours(model):
        return gradient(sepo.wdce_loss(process, model, x, weights), model)
    best = posterior_table(optimum, V, L)
    assert ours(best).abs().max() < 1e-6
    for model in (Table(V, L), network(V, L)):
        bound = 0.0
        for p, (a, b) in zip(optimum, sequences(V, L)):         # by hand, per sequence
            logp = {s: model(torch.tensor([s])).log_softmax(-1)[0] for s in
                    ((2, b.item()), (a.item(), 2), (2, 2))}
            one = logp[2, b.item()][0, a] + logp[a.item(), 2][1, b]
            both = logp[2, 2][0, a] + logp[2, 2][1, b]
            bound = bound - p * (one + both) / 2
        assert close(ours(model), gradient(bound, model))

# -----------------------------------------------------------------------------
# PRDP


def optimum(p_ref_consistent=True, V=2, L=3, beta=0.5):
    """The optimum of J as a table, its process, every path of it, their rewards and log-ratios
    [1, B], and the reference."""
    process = Absorbing(V)
    reference = posterior_table(random_law(V, L), V, L) if p_ref_consistent else Table(V, L)
    log_ref = process.exact_law(reference, L).detach().log()
    model = posterior_table((log_ref + some_reward(sequences(V, L)) / beta).softmax(0), V, L)
    tokens, path, _ = every_path(process, model, L)
    log_ratio = log_ratio_of(process, model, reference, path)[None]
    return process, model, path, some_reward(tokens)[None], log_ratio, beta, reference


def test_prdp_is_zero_at_the_optimum_of_a_consistent_reference_only():
    process, model, path, R, log_ratio, beta, _ = optimum()
    loss, _ = sepo.prdp_loss(process.logp(model, path), path, R, log_ratio, beta)
    assert loss.item() == pytest.approx(0, abs=1e-9)
    assert gradient(loss, model).abs().max() < 1e-4
    generator = torch.Generator().manual_seed(9)
    for _ in range(3):
        noise = 0.1 * torch.randn(model.logits.shape, generator=generator)
        other = Table(2, 3, (model.logits + noise).detach())
        assert sepo.prdp_loss(process.logp(other, path), path, R, log_ratio, beta)[0] > 1e-4
    process, model, path, R, log_ratio, beta, _ = optimum(p_ref_consistent=False)
    assert sepo.prdp_loss(process.logp(model, path), path, R, log_ratio, beta)[0] > 1e-3


def test_prdp_is_the_mean_over_all_pairs_and_descends_the_regularised_objective():
    process, _, path, R, _, beta, reference = optimum()
    model, G = Table(2, 3), R.numel()
    logp = process.logp(model, path)
    path.logp = logp.detach()
    log_ratio = log_ratio_of(process, model, reference, path)[None]
    loss, _ = sepo.prdp_loss(logp, path, R, log_ratio, beta)
    d = (beta * log_ratio - R)[0]
    pairs = ((d[:, None] - d) ** 2).sum().item() / (2 * G * G)
    assert loss.item() == pytest.approx(pairs / (2 * beta), rel=1e-4)
    A = sepo.advantages(R - beta * log_ratio, "loo")[0]
    loop, _ = sepo.loop_loss(logp, path, A)
    assert close(gradient(loss, model), gradient(loop, model) * (G - 1) / G, 1e-4)


@pytest.mark.parametrize("drift, R, loss, active", [
    (0.3, -1, 0.18, 1), (0.3, 1, 0.125, 0), (0.05, -1, 0.125, 0)])
def test_the_proximal_clip_by_hand(drift, R, loss, active):
    """Two paths of one position, beta = 1, rewards 0 and R, both log-ratios now 0; the second was
    `drift` when it was drawn, clip 0.1. Free, the errors differ by R: (R/2)^2 / 2. Drift 0.3 holds
    the second at 0.2: it may not fall further for R = -1, where the error (1.2/2)^2 / 2 is the
    larger, and is free to turn back for R = 1."""
    log_ratio = torch.tensor([[0.0, drift]])
    logp = torch.full((2, 1), 0.5).log()
    path = path_of(logp + log_ratio.view(2, 1))
    got, clip_fraction = sepo.prdp_loss(logp, path, torch.tensor([[0.0, R]]), log_ratio, 1.0, 0.1)
    assert got.item() == pytest.approx(loss, abs=1e-6) and clip_fraction == 0.5 * active


@pytest.mark.parametrize("R, loss", [([0.0, 1.0], 1 / 8), ([1.0, 0.0], 1.1 ** 2 / 8)])
def test_prdp_clips_every_transition(R, loss):
    """Log-ratios of two transitions, old (0.3, -0.4), now (0, 0): moves of -0.3 and +0.4 are held
    at -0.2 and +0.2, so the path stands at -0.1 where it would be at 0."""
    path = path_of(torch.tensor([[0.3], [-0.4], [0.0], [0.0]]), row=[0, 0, 1, 1])
    log_ratio = torch.tensor([[-0.1, 0.0]])
    got, _ = sepo.prdp_loss(torch.zeros(4, 1), path, torch.tensor([R]), log_ratio, 1.0, 0.2)
    assert got.item() == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("G", [1, 4])
def test_prdp_of_a_degenerate_group_is_zero(G):
    model, process = network(3, 4), Absorbing(3)
    _, path = process.sample(model, G, 4)
    loss, _ = sepo.prdp_loss(process.logp(model, path), path, torch.ones(1, G), torch.zeros(1, G),
                             0.1)
    assert loss.item() == pytest.approx(0, abs=1e-9) and gradient(loss, model).abs().max() < 1e-5

# -----------------------------------------------------------------------------
# advantages and the exact optimum

R = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 6.0]])


@pytest.mark.parametrize("kind, expected, variance", [
    ("grpo", [[-1, 0, 1], [-2, -2, 4]], 26 / 6),
    ("loo", [[-1.5, 0, 1.5], [-3, -3, 6]], 1)])
def test_advantages_by_hand(kind, expected, variance):
    """Both groups have mean 2; squares around it sum to 2 and 24."""
    assert torch.allclose(sepo.advantages(R, kind), torch.tensor(expected) / variance ** 0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rewards", [torch.full((2, 4), 0.3), torch.tensor([[0.7]])])
def test_degenerate_groups_get_zeros(kind, rewards):
    assert (sepo.advantages(rewards, kind) == 0).all()


@pytest.mark.parametrize("beta", [0.1, 0.0])
def test_share_of_optimum_is_zero_for_the_reference_and_one_at_the_optimum(beta):
    process, reference = Absorbing(3), network(3, 3)
    exact = sepo.ground_truth(process, reference, some_reward, 3, beta)
    assert exact(reference)["share_of_optimum"] == pytest.approx(0, abs=1e-5)
    assert exact(reference)["exact_kl"] == pytest.approx(0, abs=1e-5)
    assert all(exact(network(3, 3, seed=s))["share_of_optimum"] < 1 for s in range(1, 4))
    log_ref = process.exact_law(reference, 3).detach().log()
    tilted = (log_ref + some_reward(sequences(3, 3)) / max(beta, 1e-3)).softmax(0).float()
    best = exact(posterior_table(tilted, 3, 3))
    assert best["share_of_optimum"] == pytest.approx(1, abs=1e-3)
    assert best["exact_reward"] == pytest.approx(best["optimum_reward"], abs=1e-3)


@pytest.mark.parametrize("beta", [0.1, 0.0])
def test_the_unit_of_rewards_changes_no_share(beta):
    process, reference, other = Absorbing(3), network(3, 3), network(3, 3, seed=1)
    results = [sepo.ground_truth(process, reference, lambda x: unit * some_reward(x).double(), 3,
                                 unit * beta) for unit in (1, 1e-9, 1e9)]
    plain, *others = [exact(other) for exact in results]
    for result, unit in zip(others, (1e-9, 1e9)):
        assert result["share_of_optimum"] == pytest.approx(plain["share_of_optimum"], rel=1e-6)
        assert result["exact_kl"] == pytest.approx(plain["exact_kl"])
        assert result["optimum_reward"] == pytest.approx(unit * plain["optimum_reward"])


def unlikely_letter(bias):
    """A reference whose logit of letter 1 is lower by `bias` at every position."""
    reference = network(3, 3)
    with torch.no_grad():
        reference.head.bias -= torch.tensor([0.0, bias, 0.0])
    return reference


def test_the_optimum_knows_what_float32_cannot():
    """Letter 1 alone earns, and the reference draws it with e^-100 or less per position, which
    squared is 0 in float32. With beta = 0.005 one letter is worth 67 nats of KL at most, so it is
    not worth its price; with beta = 0.002 all three are. J* is summed here in logarithms, one
    position after the other."""
    process, reward = Absorbing(3), lambda x: (x == 1).float().mean(dim=1)
    reference = unlikely_letter(100)
    for beta, best in ((0.005, 0), (0.002, 1)):
        exact = sepo.ground_truth(process, reference, reward, 3, beta)
        assert exact(reference)["optimum_reward"] == pytest.approx(best, abs=1e-6)
        assert exact(reference)["share_of_optimum"] == pytest.approx(1 - best, abs=1e-6)
    x = sequences(3, 3)
    tilted = torch.zeros(27, dtype=torch.double)
    for order in torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]):
        state, logp = torch.full((27, 3), 3), torch.zeros(27, dtype=torch.double)
        for i in order:
            logits = reference(state)[:, i].double().detach().log_softmax(-1)
            logp += logits.gather(1, x[:, i, None])[:, 0]
            state[:, i] = x[:, i]
        tilted += logp.exp() / 6
    best = 0.002 * (tilted.log() + reward(x).double() / 0.002).logsumexp(0).item()
    ours = exact(network(3, 3, seed=1))
    J = ours["exact_reward"] - 0.002 * ours["exact_kl"]
    assert ours["share_of_optimum"] == pytest.approx(J / best, rel=1e-4)


def test_where_there_is_no_room_the_share_counts_what_the_kl_cost():
    """All rewards are equal, so the reference is the optimum, and a nat is spent for nothing."""
    process, reference = Absorbing(3), network(3, 3)
    for beta in (0.1, 0):
        exact = sepo.ground_truth(process, reference, lambda x: torch.ones(len(x)), 3, beta)
        assert exact(reference)["share_of_optimum"] == pytest.approx(1, abs=1e-6)
        other = exact(network(3, 3, seed=1))
        assert other["share_of_optimum"] == pytest.approx(1 - other["exact_kl"], abs=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.0])
def test_the_kl_to_a_reference_that_never_draws_some_sequences_is_infinite(beta):
    exact = sepo.ground_truth(Absorbing(3), unlikely_letter(1000), some_reward, 3, beta)
    other = exact(network(3, 3, seed=1))
    assert other["exact_kl"] == math.inf and other["share_of_optimum"] == -math.inf
    assert math.isfinite(other["exact_reward"]) and math.isfinite(other["optimum_reward"])
    same = exact(unlikely_letter(1000))                         # both never do
    assert same["exact_kl"] == pytest.approx(0, abs=1e-6)
    assert same["share_of_optimum"] == pytest.approx(0, abs=1e-5)
