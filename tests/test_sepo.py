"""Every method against autograd through the exact distribution, over all paths; losses by hand.

Read first test_sepo_and_loop_have_the_policy_gradient_of_the_sampler, the claim on which the project
stands, and test_both_clips_by_their_formulas, which is SEPO's algebra.
"""
import itertools
import math
from dataclasses import replace
from functools import cache, partial

import pytest
import torch

import estimators
import sepo
from diffusion import Absorbing, MaskPath, Uniform
from exact import (Table, every_path, exact_p, gradient, kl, law_given, network, posterior_table,
                   probability, random_law, sequences)

KINDS = ["grpo", "loo", "running"]
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

# -----------------------------------------------------------------------------
# the identities


def line(seed=0, V=5):
    """log s on a line, new and old, up to a constant."""
    generator = torch.Generator().manual_seed(seed)
    new = torch.randn(V, generator=generator, dtype=torch.float64).requires_grad_()
    return new, new.detach() + 0.3 * torch.randn(V, generator=generator, dtype=torch.float64)


def test_the_sum_over_a_line_is_one_log_probability():
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
    """cap: the paper's sum over the line, its weights p(y) min(r A, clip(r) A) detached. stop: the
    same where the clip is not active, and no gradient where it is."""
    seen = set()
    for seed in range(40):
        new, old = line(seed)
        log_ratio = new.log_softmax(0)[3] - old.log_softmax(0)[3]
        r = log_ratio.exp().item()
        capped = min(r * A, min(max(r, 0.8), 1.2) * A)
        active = r * A > capped
        seen.add(active)
        coefficient = 0 if active and mode == "stop" else capped
        weights = (new.softmax(0) * coefficient).detach()
        paper, = torch.autograd.grad((weights * (new - new[3])).sum(), new, retain_graph=True)
        objective, flag = sepo.surrogate(log_ratio, torch.tensor(A), 0.2, mode)
        ours, = torch.autograd.grad(-objective, new)
        assert torch.allclose(ours, paper, atol=1e-12) and bool(flag) == active
    assert seen == {True, False}


def test_equal_rewards_get_nothing_and_scales_are_of_the_groups():
    """0.05 and 0.1 are not exact in binary; their means over 3, 7 or 100 samples need not be."""
    for G in (3, 7, 100):
        returns = torch.tensor([[0.0] * G, [0.05] * G], dtype=torch.double)
        assert (sepo.advantages(returns, "grpo") == 0).all()
    rewards = torch.tensor([[0.0, 1.0], [10.0, 11.0]])
    assert sepo.reward_scale(rewards, "grpo").item() == pytest.approx(0.5)
    assert sepo.reward_scale(rewards, "grpo", beta=1.2).item() == pytest.approx(1.3)    # 5:12:13
    assert sepo.reward_scale(rewards, "loo", beta=1.2).item() == 1

# -----------------------------------------------------------------------------
# gradients, over every path


@pytest.mark.parametrize("kind", ["network", "table"])
@pytest.mark.parametrize("chain, L, steps, prompt", CASES)
def test_sepo_and_loop_have_the_policy_gradient_of_the_sampler(chain, L, steps, prompt, kind):
    """Sum over every path of its probability times the gradient of its loss = autograd through
    the exact law: equal in direction and in scale, for any model, grid and prompt."""
    model, process = model_for(chain, L, kind), chain(2)
    path, other = every_path(process, model, L, steps, prompt)
    weight = probability(path, other) * len(path.tokens)        # the loss averages over paths
    assert weight.mean().item() * len(weight) == pytest.approx(len(weight), rel=1e-4)
    law = law_given(process, model, L, steps, prompt)
    truth = gradient((law * some_reward(sequences(2, L))).sum(), model)
    A = weight * some_reward(path.tokens)
    view = sepo.draw_view(process, model, path, events=0)
    for mode in ("stop", "cap"):
        loss, clip_fraction = sepo.sepo_loss(process, model, view, A, clip_mode=mode)
        assert close(-gradient(loss, model), truth) and clip_fraction == 0
    assert close(-gradient(sepo.loop_loss(process, model, view, A)[0], model), truth)
    forgetful = replace(path, logp=None)                        # logp_old by a pass of the model
    again = sepo.draw_view(process, model, forgetful, events=0)
    assert torch.allclose(again.logp_old * again.scored, view.logp_old * view.scored, atol=1e-5)


@pytest.mark.parametrize("chain, L, steps, prompt", CASES)
def test_kl_in_the_return_is_the_gradient_of_the_kl_of_paths(chain, L, steps, prompt):
    """Both parts: the one through the log-ratio has mean 0, the other goes through the states."""
    model, process = model_for(chain, L), chain(2)
    reference = network(2, L, seed=1, n_embd=16, time_conditioning=chain is Uniform)
    path, other = every_path(process, model, L, steps, prompt)
    with torch.no_grad():
        log_ratio = path.logp - process.replay(reference, path)
    p = probability(path, other, process.replay(model, path))
    new = process.replay(model, path) - process.replay(reference, path).detach()
    J = (p * (some_reward(path.tokens) - 0.3 * new.flatten(1).sum(dim=1))).sum()
    returns = path_return(some_reward(path.tokens), log_ratio, 0.3)
    assert torch.allclose(process.path_kl(reference, path), log_ratio.flatten(1).sum(dim=1))
    A = (probability(path, other) * len(path.tokens) * returns).float()
    view = sepo.draw_view(process, model, path, events=0)
    loss, _ = sepo.sepo_loss(process, model, view, A)
    assert close(-gradient(loss, model), gradient(J, model), 1e-4)


def path_return(rewards, log_ratio, beta):
    """R - beta log p(path)/p_ref(path), as finetune has it -> [B], float64."""
    return (rewards.double() - beta * log_ratio.flatten(1).sum(dim=1)).detach()


def kl_of(path, logp_ref, rewards):
    return (path.logp - logp_ref).flatten(1).sum(dim=1).view_as(rewards)


def even_population(P):
    """A uniform policy, so that its 48 paths (24 per prompt if P = 2) are equally likely and their
    plain mean is the exact expectation; and a reference that differs from it."""
    process, reference = Absorbing(2), Table(2, 3, seed=3)
    model = Table(2, 3, torch.zeros(27, 3, 2))
    prompts = [None] if P == 1 else [torch.tensor([2, 2, 0]), torch.tensor([2, 1, 2])]
    paths = [every_path(process, model, 3, None, prompt)[0] for prompt in prompts]
    tokens, time, logp = (torch.cat([getattr(p, name) for p in paths])
                          for name in ("tokens", "time", "logp"))
    path = MaskPath(tokens, time, logp, 2)
    with torch.no_grad():
        logp_ref = process.replay(reference, path)
    return process, model, reference, path, logp_ref


def update(P, kind, reward, beta):
    """Minus the gradient of the loss on the whole population, as finetune composes it."""
    process, model, reference, path, logp_ref = even_population(P)
    returns = path_return(reward, path.logp - logp_ref, beta)
    baseline = None
    if kind == "running":
        baseline = sepo.Baseline()
        baseline.update(reward)
    scale = sepo.reward_scale(reward.view(P, -1), kind, beta)
    A = sepo.advantages(returns.view(P, -1), kind, baseline, scale).flatten()
    loss, _ = sepo.sepo_loss(process, model, sepo.draw_view(process, model, path, 0), A)
    return -gradient(loss, model).float(), scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("P", [1, 2])
@pytest.mark.parametrize("spread", [1.0, 0.0])
def test_the_update_is_the_gradient_of_the_objective_with_the_betas_weight(kind, P, spread):
    """Up to one positive number per rollout, also when all rewards are equal (spread 0): then
    it is the gradient of -beta KL."""
    process, model, reference, path, logp_ref = even_population(P)
    reward, beta = spread * some_reward(path.tokens), 0.3
    logp = process.replay(model, path)
    p = (logp - path.logp).sum(1).exp() / len(path.tokens)      # differentiable; even
    cost = (p * (logp - logp_ref).sum(1)).sum()
    G = len(path.tokens) // P
    loo = G / (G - 1) if kind == "loo" else 1                   # over whole groups, not samples
    truth = loo * gradient((p * reward).sum() - beta * cost, model)
    ours, scale = update(P, kind, reward, beta)
    assert close(ours * scale.float(), truth, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_constants_and_units_of_the_reward_change_nothing(kind):
    reward = some_reward(even_population(2)[3].tokens).double()
    plain, scale = update(2, kind, reward, 0.3)
    for shift, unit in ((1000.0, 1.0), (0.0, 1e-7), (5.0, 1e-7), (1000.0, 0.1), (0.0, 1e6)):
        other, new_scale = update(2, kind, unit * reward + shift * 1.0, 0.3 * unit)
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
        returns = path_return(rewards.flatten(), log_ratio.flatten()[:, None], beta).view(2, 4)
        A = sepo.advantages(returns, "grpo", None, sepo.reward_scale(rewards, "grpo", beta))
        assert A[0].std() < 0.6 * beta and A[1].std() > 0.5


@cache
def truth_of(kind):
    """The reward, the model, its gradients by entries, and the true gradient."""
    model = Table(3, 3) if kind == "random" else posterior_table(random_law(3, 3), 3, 3)
    process, reward = Absorbing(3), torch.randn(27, generator=torch.Generator().manual_seed(1))
    truth = gradient((process.exact_law(model, 3) * reward).sum(), model).float()
    return reward, model, estimators.Entries(process, model, 3), truth


def cosine_of(name, kind):
    """Of the expected gradient of an estimator of tests/estimators.py with the true gradient, and the
    ratio of their norms."""
    reward, model, entries, truth = truth_of(kind)
    mean, noise = estimators.expected_gradient(Absorbing(3), entries, model, 3, reward,
                                               estimators.ESTIMATORS[name])
    assert noise > 0.5
    return torch.cosine_similarity(mean, truth, dim=0).item(), (mean.norm() / truth.norm()).item()


@pytest.mark.parametrize("name, scale", [
    ("sepo, 1 event", 1), ("sepo, all events; LOOP, DCoLT, CJ-GRPO", 1), ("AGRPO, 2 states", 1),
    ("TraceRL", 1 / 3)])
def test_estimators_on_the_path_have_the_true_gradient_of_any_model(name, scale):
    assert cosine_of(name, "random") == pytest.approx((1, scale), abs=1e-4)


@pytest.mark.parametrize("name, random, scale", [
    ("sepo, all events of a new path (replay)", 0.854, 1), ("noised (ELBO)", 0.854, 1),
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
    """The mean of the bound's weights over random draws: every slot counts once."""
    process, model = Absorbing(2), Table(2, 3)
    torch.manual_seed(0)
    path = process.sample(model, 3000, 3)
    for name, total in (("noised (ELBO)", 3), ("sepo, 1 event", 3), ("UniGRPO", 1)):
        view = estimators.random_view(process, model, path, estimators.ESTIMATORS[name])
        per_slot = (view.weight[:, None] * view.scored).sum(dim=0) / 3000
        assert per_slot.tolist() == pytest.approx([total / 3] * 3, abs=0.1)
        assert ((view.x == 2) >= view.scored).all() and (view.y == path.tokens[view.row]).all()


def test_the_published_estimator_is_its_formula_written_out():
    """Its gradient, with exact p(y) and active clips; on three slots of two letters."""
    process, model, old_model = Absorbing(2), Table(2, 3), Table(2, 3, seed=1)
    torch.manual_seed(4)
    path, A = process.sample(old_model, 6, 3), torch.randn(6)
    p_of = exact_p(process)
    path.time[:, 2] = math.inf                                  # slot 2 is given: no neighbours there
    old = sepo.draw_neighbours(process, old_model, path, p_of)
    loss, clip_fraction = sepo.published_loss(process, model, old, A, 0.2, p_of)
    p_new, p_old = (process.exact_law(m, 3).detach() for m in (model, old_model))
    total, active = 0.0, []
    for x, a in zip(path.tokens, A):
        for i in range(2):
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


def test_importance_sampling_of_the_neighbours_tends_to_its_limit():
    """One slot: the weights are 1 / (pi(z|z) pi(z|y)), so p(y) tends to 1 / sum_z 1 / pi(z|z)
    weighted as drawn: sum_z pi(z|y) / pi(z|z) / sum_z 1 / pi(z|z)."""
    process, model = Absorbing(3), Table(3, 1)
    x = torch.zeros(500, 1, dtype=torch.long)
    _, p = sepo.neighbours(process, model, x, partial(sepo.importance_sampled, M=200))
    pi = model(sequences(3, 1))[:, 0].softmax(-1).detach()      # [y, z]
    inverse = 1 / pi.diagonal()
    expected = (pi * inverse).sum(1) / inverse.sum()
    assert torch.allclose(p.mean(dim=0)[0], expected, atol=0.02)


# -----------------------------------------------------------------------------
# losses by hand


def test_loop_clips_a_transition_and_sepo_a_slot():
    """Two slots in one step, each with ratio 1.15: their product 1.3225 is clipped at 1.2."""
    process, model = Absorbing(2), Table(2, 2, torch.zeros(9, 2, 2))
    path = process.sample(model, 1, 2, steps=1)
    path = replace(path, logp=path.logp - torch.tensor(1.15).log())
    view = sepo.draw_view(process, model, path)
    for A, value, fraction in ((2.0, 2.4, 1), (-2.0, -2.645, 0)):
        loss, clip_fraction = sepo.loop_loss(process, model, view, torch.tensor([A]), 0.2)
        assert loss.item() == pytest.approx(-value, abs=1e-5) and clip_fraction == fraction
        assert (gradient(loss, model) == 0).all() == bool(fraction)
    assert sepo.sepo_loss(process, model, view, torch.tensor([2.0]))[1] == 0
    assert sepo.sepo_loss(process, model, view, torch.tensor([2.0]), clip=0.1)[1] == 1


def test_clip_fractions_of_unequal_parts_add_up():
    """Two events in each of five paths; both are clipped in the first two paths: 4 of 10 states. The
    states are listed event by event, so parts of seven and three have 2 + 2 and 0 of them."""
    process, model = Absorbing(2), Table(2, 2, torch.zeros(9, 2, 2))
    path = process.sample(model, 5, 2)
    path = replace(path, logp=path.logp - torch.tensor([1.0, 1.0, 0, 0, 0])[:, None])
    for loss_of in (sepo.sepo_loss, sepo.loop_loss):
        view = sepo.draw_view(process, model, path, events=0)
        parts = [loss_of(process, model, part, torch.ones(5)) for part in view.split(7)]
        assert [round(f.item(), 5) for _, f in parts] == [0.4, 0]
        assert loss_of(process, model, view, torch.ones(5))[1].item() == pytest.approx(0.4)


def test_on_one_slot_per_event_sepo_is_loop():
    """Without a grid, with PPO's clip: the same loss and gradient, also away from theta_old."""
    process, model, other = Absorbing(3), network(3, 4), network(3, 4, seed=1)
    torch.manual_seed(0)
    path, A = process.sample(other, 32, 4), torch.randn(32)
    view = sepo.draw_view(process, model, path)
    a = sepo.sepo_loss(process, model, view, A)
    b = sepo.loop_loss(process, model, view, A)
    assert torch.allclose(a[0], b[0]) and a[1] == b[1] > 0.1
    assert close(gradient(a[0], model), gradient(b[0], model))


@pytest.mark.parametrize("events", [0, 2])
def test_a_view_without_any_event_has_a_loss_of_zero(events):
    """As after a corrector at a small t, where no slot is masked again."""
    process, model = Absorbing(3), network(3, 4)
    path = process.correct_path(model, process.sample(model, 5, 4), 1e-6, 1)
    assert path.given.all()
    for part in sepo.draw_view(process, model, path, events).split(2):
        for loss_of in (sepo.sepo_loss, sepo.loop_loss):
            loss, clip_fraction = loss_of(process, model, part, torch.ones(5))
            loss.backward()
            assert loss == 0 and clip_fraction == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("chain", [Absorbing, Uniform])
@pytest.mark.parametrize("events", [0, 1, 2])
def test_micro_batches_add_up_to_the_whole(chain, events):
    model, process = network(4, 6, time_conditioning=True), chain(4)
    torch.manual_seed(30)
    path, A = process.sample(model, 16, 6, steps=5), torch.randn(16)
    view = sepo.draw_view(process, network(4, 6, seed=2), path, events)
    assert len(view.split(5)) == -(-len(view.row) // 5) and len(view.split(0)) == 1
    for loss_of in (sepo.sepo_loss, sepo.loop_loss):
        whole, fraction = loss_of(process, model, view, A)
        parts = [loss_of(process, model, part, A) for part in view.split(5)]
        assert torch.allclose(whole, sum(loss for loss, _ in parts), atol=1e-5)
        assert torch.allclose(fraction, sum(f for _, f in parts), atol=1e-6)
        assert close(gradient(sum(loss for loss, _ in parts), model), gradient(whole, model))


def test_replay_has_the_gradient_of_all_passes_whatever_the_chunk():
    model, process = network(3, 5), Absorbing(3)
    torch.manual_seed(10)
    path, c = process.sample(model, 8, 5), torch.randn(8, 5)
    direct = 0.0
    for j in range(5):
        log_p = model(path.state(j)).log_softmax(-1)
        logp = log_p.gather(-1, path.tokens[..., None]).squeeze(-1)
        direct = direct + (c * logp * (path.event == j)).sum()
    direct = gradient(direct, model)
    for chunk in (None, 3):
        assert close(gradient((c * process.replay(model, path, chunk)).sum(), model), direct)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown advantage"):
        sepo.advantages(torch.zeros(1, 2), "gae")

# -----------------------------------------------------------------------------
# off policy: remembered samples


def random_weights(n, seed=5):
    """A distribution over n paths that no policy has."""
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).softmax(0)


@pytest.mark.parametrize("chain, L, steps, prompt", CASES)
def test_off_policy_the_update_is_the_gradient_of_the_log_variance(chain, L, steps, prompt):
    """For any q over paths, with d = beta log p(path)/p_ref(path) - R:
    grad Var_q(d) / (2 beta) = -E_q[A grad log p(path)], A = (R - beta log p/p_ref) - its mean under q
    (VarGrad, 2010.10436). The paths are all paths of the sampler, each with its random weight."""
    model, process, beta = model_for(chain, L), chain(2), 0.3
    reference = network(2, L, seed=1, n_embd=16, time_conditioning=chain is Uniform)
    path, _ = every_path(process, model, L, steps, prompt)
    q, R, B = random_weights(len(path.tokens)), some_reward(path.tokens), len(path.tokens)
    log_ratio = process.replay(model, path) - process.replay(reference, path).detach()
    d = beta * log_ratio.flatten(1).sum(dim=1) - R
    truth = gradient(((q * d ** 2).sum() - (q * d).sum() ** 2) / (2 * beta), model)
    returns = R - beta * process.path_kl(reference, path)
    A = (returns - (q * returns).sum()) * q * B
    view = sepo.draw_view(process, model, path, events=0)
    assert close(gradient(sepo.sepo_loss(process, model, view, A)[0], model), truth)
    assert close(gradient(sepo.loop_loss(process, model, view, A)[0], model), truth)
    kl = process.path_kl(reference, path)[None]                 # prdp: q is uniform
    truth = gradient(d.var(correction=0) / (2 * beta), model)
    loss, clip_fraction = sepo.prdp_loss(process, model, path, R[None], kl, beta)
    assert close(gradient(loss, model), truth) and clip_fraction == 0


def test_the_only_zero_of_the_log_variance_is_the_optimum():
    """Descent along the update of random rows that no policy drew, on new paths every time, ends
    at p* ~ p_ref exp(R / beta)."""
    V, L, beta, process = 2, 2, 0.5, Absorbing(2)
    reference = posterior_table(random_law(V, L), V, L)
    R = some_reward(sequences(V, L))
    optimum = (process.exact_law(reference, L).detach().log() + R / beta).softmax(0)
    model = Table(V, L)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    torch.manual_seed(6)
    for i in range(400):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - i / 400)
        tokens = sequences(V, L)[torch.randint(V ** L, (16,))]
        path = process.path_to(tokens)
        path = replace(path, logp=process.replay(model, path).detach())
        returns = some_reward(tokens) - beta * process.path_kl(reference, path)
        A = sepo.advantages(returns[None], "loo")[0]
        view = sepo.draw_view(process, model, path, events=0)
        optimizer.zero_grad()
        sepo.sepo_loss(process, model, view, A)[0].backward()
        optimizer.step()
    found = process.exact_law(model, L).detach()
    assert kl(optimum, found) < 1e-3 < 0.05 < kl(optimum, process.exact_law(reference, L).detach())

# -----------------------------------------------------------------------------
# weighted denoising cross-entropy


def test_wdce_weights_are_those_of_the_optimum_and_keep_the_sample_size():
    """All four sequences, as if drawn uniformly: their kl is -log(4 p_ref), so c = 1 gives p*."""
    reference = random_law(2, 2).double()
    R = some_reward(sequences(2, 2)).double()
    optimum = (reference.log() + R / 0.5).softmax(0)
    uniform_kl = -(4 * reference).log()
    assert torch.allclose(sepo.wdce_weights(R, uniform_kl, 0.5, min_ess=1), optimum)
    for beta, min_ess in ((0.01, 2), (0.01, 3.5), (1e-6, 2)):
        w = sepo.wdce_weights(R, uniform_kl, beta, min_ess)
        assert 1 / w.square().sum().item() == pytest.approx(min_ess, rel=1e-3)
        assert w.sum().item() == pytest.approx(1) and w.argmax() == (R / beta - uniform_kl).argmax()
    even = torch.full((4,), 0.25, dtype=torch.double)
    assert torch.allclose(sepo.wdce_weights(R, uniform_kl, 0.01, min_ess=9), even)     # out of reach


class EveryMask(Absorbing):
    """Absorbing(2) that masks two slots in all ways at once, in proportion to their chances: rows of
    four, for the subsets {0}, {1}, {0, 1} and {0, 1} again."""

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
        loss, _ = sepo.wdce_loss(process, model, x, torch.zeros_like(x, dtype=torch.bool), weights)
        return gradient(loss, model)
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
    """The optimum of J as a table, with every path of it, its rewards and its reference."""
    process = Absorbing(V)
    reference = posterior_table(random_law(V, L), V, L) if p_ref_consistent else Table(V, L)
    log_ref = process.exact_law(reference, L).detach().log()
    model = posterior_table((log_ref + some_reward(sequences(V, L)) / beta).softmax(0), V, L)
    path, _ = every_path(process, model, L)
    with torch.no_grad():
        logp_ref = process.replay(reference, path)
    return process, model, path, some_reward(path.tokens)[None], logp_ref, beta


def test_prdp_is_zero_at_the_optimum_of_a_consistent_reference_only():
    process, model, path, R, logp_ref, beta = optimum()
    loss, _ = sepo.prdp_loss(process, model, path, R, kl_of(path, logp_ref, R), beta)
    assert loss.item() == pytest.approx(0, abs=1e-9)
    assert gradient(loss, model).abs().max() < 1e-4
    generator = torch.Generator().manual_seed(9)
    for _ in range(3):
        noise = 0.1 * torch.randn(model.logits.shape, generator=generator)
        other = Table(2, 3, (model.logits + noise).detach())
        assert sepo.prdp_loss(process, other, path, R, kl_of(path, logp_ref, R), beta)[0] > 1e-4
    process, model, path, R, logp_ref, beta = optimum(p_ref_consistent=False)
    assert sepo.prdp_loss(process, model, path, R, kl_of(path, logp_ref, R), beta)[0] > 1e-3


def test_prdp_is_the_mean_over_all_pairs_and_descends_the_regularised_objective():
    process, _, path, R, logp_ref, beta = optimum()
    model, G = Table(2, 3), R.numel()
    with torch.no_grad():
        path.logp = process.replay(model, path)
    loss, _ = sepo.prdp_loss(process, model, path, R, kl_of(path, logp_ref, R), beta)
    d = beta * (path.logp - logp_ref).sum(1) - R[0]
    pairs = ((d[:, None] - d) ** 2).sum().item() / (2 * G * G)
    assert loss.item() == pytest.approx(pairs / (2 * beta), rel=1e-4)
    A = sepo.advantages(path_return(R[0], path.logp - logp_ref, beta)[None], "loo")[0]
    loop, _ = sepo.loop_loss(process, model, sepo.draw_view(process, model, path, 0), A)
    assert close(gradient(loss, model), gradient(loop, model) * (G - 1) / G, 1e-4)


@pytest.mark.parametrize("drift, R, loss, active", [
    (0.3, -1, 0.18, 1), (0.3, 1, 0.125, 0), (0.05, -1, 0.125, 0)])
def test_the_proximal_clip_by_hand(drift, R, loss, active):
    """Two paths of one slot, beta = 1, rewards 0 and R, both log-ratios now 0; the second was
    `drift` when it was drawn, clip 0.1. Free, the errors differ by R: (R/2)^2 / 2. Drift 0.3 holds
    the second at 0.2: it may not fall further for R = -1, where the error (1.2/2)^2 / 2 is the
    larger, and is free to turn back for R = 1."""
    process, model = Absorbing(2), Table(2, 1, torch.zeros(3, 1, 2))
    logp_ref = torch.full((2, 1), 0.5).log()
    old = logp_ref + torch.tensor([[0.0], [drift]])
    path = MaskPath(torch.tensor([[0], [1]]), torch.full((2, 1), 0.5), old, 2)
    rewards = torch.tensor([[0.0, R]])
    got, clip_fraction = sepo.prdp_loss(process, model, path, rewards, kl_of(path, logp_ref, rewards), 1.0, 0.1)
    assert got.item() == pytest.approx(loss, abs=1e-6) and clip_fraction == 0.5 * active


def test_prdp_clips_every_event():
    """Log-ratios of two events, old (0.3, -0.4), now (0, 0): moves of -0.3 and +0.4 are held at
    -0.2 and +0.2, so the path stands at -0.1 where it would be at 0."""
    process, model = Absorbing(2), Table(2, 2, torch.zeros(9, 2, 2))
    path = process.sample(model, 2, 2)
    logp_ref = path.logp.clone()
    path.logp[0] += torch.tensor([0.3, -0.4])
    rewards = torch.tensor([[0.0, 1.0]])
    loss, _ = sepo.prdp_loss(process, model, path, rewards, kl_of(path, logp_ref, rewards), 1.0, 0.2)
    free, near = 1 ** 2 / 8, (1 - 0.1) ** 2 / 8
    assert loss.item() == pytest.approx(max(free, near), abs=1e-5)
    rewards = torch.tensor([[1.0, 0.0]])
    loss, _ = sepo.prdp_loss(process, model, path, rewards, kl_of(path, logp_ref, rewards), 1.0, 0.2)
    assert loss.item() == pytest.approx((1 + 0.1) ** 2 / 8, abs=1e-5)


@pytest.mark.parametrize("G", [1, 4])
def test_prdp_of_a_degenerate_group_is_zero(G):
    model, process = network(3, 4), Absorbing(3)
    path = process.sample(model, G, 4)
    loss, _ = sepo.prdp_loss(process, model, path, torch.ones(1, G), torch.zeros(1, G), 0.1)
    assert loss.item() == pytest.approx(0, abs=1e-9) and gradient(loss, model).abs().max() < 1e-5

# -----------------------------------------------------------------------------
# advantages and the exact optimum

R = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 6.0]])


@pytest.mark.parametrize("kind, expected, variance", [
    ("grpo", [[-1, 0, 1], [-2, -2, 4]], 26 / 6),
    ("loo", [[-1.5, 0, 1.5], [-3, -3, 6]], 1), ("running", [[-1, 0, 1], [-2, -2, 4]], 1)])
def test_advantages_by_hand(kind, expected, variance):
    """Both groups have mean 2; squares around it sum to 2 and 24."""
    assert torch.allclose(sepo.advantages(R, kind), torch.tensor(expected) / variance ** 0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rewards", [torch.full((2, 4), 0.3), torch.tensor([[0.7]])])
def test_degenerate_groups_get_zeros(kind, rewards):
    assert (sepo.advantages(rewards, kind) == 0).all()


def test_the_baseline_is_learnt_across_the_run():
    """decay 0.5: returns of mean 0 then 4 weigh 1 : 2, so the mean is 8/3."""
    baseline = sepo.Baseline(decay=0.5)
    baseline.update(torch.zeros(1, 4))
    baseline.update(torch.full((1, 4), 4.0))
    assert torch.allclose(sepo.advantages(R, "running", baseline), R - 8 / 3, atol=1e-5)


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


def unlikely_letter(bias):
    """A reference whose logit of letter 1 is lower by `bias` in every slot."""
    reference = network(3, 3)
    with torch.no_grad():
        reference.head.bias -= torch.tensor([0.0, bias, 0.0])
    return reference


def test_the_optimum_knows_what_float32_cannot():
    """Letter 1 alone earns, and the reference draws it with e^-100 or less per slot, which squared is
    0 in float32. With beta = 0.005 one letter is worth 67 nats of KL at most, so it is not worth
    its price; with beta = 0.002 all three are. J* is summed here in logarithms, slot by slot."""
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
    """All rewards are equal, so the reference is the optimum, and a nat spent is spent for nothing."""
    process, reference = Absorbing(3), network(3, 3)
    for beta in (0.1, 0):
        exact = sepo.ground_truth(process, reference, lambda x: torch.ones(len(x)), 3, beta)
        assert exact(reference)["share_of_optimum"] == pytest.approx(1, abs=1e-6)
        other = exact(network(3, 3, seed=1))
        assert other["share_of_optimum"] == pytest.approx(1 - other["exact_kl"], abs=1e-6)


def test_a_reference_that_never_draws_some_sequences_gives_no_nan():
    exact = sepo.ground_truth(Absorbing(3), unlikely_letter(1000), some_reward, 3, 0.1)
    assert all(math.isfinite(value) for value in exact(network(3, 3, seed=1)).values())
