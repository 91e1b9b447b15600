"""SEPO against autograd through the exact law, and by hand-made numbers. Seeds are fixed; tolerances are standard errors."""
import pytest
import torch

import sepo
from diffusion import Absorbing
from exact import Table, flat_gradient, network, posterior_table, random_law, sequences


# ---- the three identities -------------------------------------------------------------------------------------------------

def line(seed=0, V=5):
    generator = torch.Generator().manual_seed(seed)
    new = torch.randn(V, generator=generator, dtype=torch.float64).requires_grad_()     # log s on a line, up to a constant
    return new, new.detach() + 0.3 * torch.randn(V, generator=generator, dtype=torch.float64)


def test_identity_1_the_sum_over_neighbours_is_one_log_probability():
    """sum_v w_v grad log s_v = -grad log w_x for the ratios log s_v = log p(v) - log p(x)."""
    logits, _ = line()
    x, log_s = 2, logits - logits[2]
    w = log_s.softmax(0).detach()
    left, = torch.autograd.grad((w * log_s).sum(), logits, retain_graph=True)
    right, = torch.autograd.grad(-logits.log_softmax(0)[x], logits)
    assert torch.allclose(left, right, atol=1e-12)


def test_identity_2_the_importance_ratio_is_the_same_for_every_neighbour():
    new, old = line()
    x = 1
    w_new, w_old, s_new, s_old = new.softmax(0), old.softmax(0), (new - new[x]).exp(), (old - old[x]).exp()
    r = (w_new / w_old) * (s_old / s_new)
    assert torch.allclose(r, (w_new[x] / w_old[x]).expand(5), atol=1e-12)


@pytest.mark.parametrize("A", [1.5, -0.7])
def test_identity_3_sepo_with_the_clip_is_ppo(A):
    """The gradient of A sum_v [w_v r, 0 where clipped] log s_v is minus that of PPO's clipped surrogate."""
    clipped_seen = set()
    for seed in range(40):
        new, old = line(seed)
        x, clip = 3, 0.2
        log_w = new.log_softmax(0)
        r = (log_w[x] - old.log_softmax(0)[x]).exp()
        off = bool(r > 1 + clip) if A > 0 else bool(r < 1 - clip)
        clipped_seen.add(off)
        weights = torch.zeros(5, dtype=torch.float64) if off else (log_w.exp() * r).detach()
        ours, = torch.autograd.grad(A * (weights * (new - new[x])).sum(), new, retain_graph=True)
        ppo, = torch.autograd.grad(torch.minimum(r * A, r.clamp(1 - clip, 1 + clip) * A), new)
        assert torch.allclose(ours, -ppo, atol=1e-12)
    assert clipped_seen == {True, False}


# ---- the estimator against the true policy gradient -----------------------------------------------------------------------

def estimate(process, model, L, reward, states, steps=None, n=60_000, parts=30, events=1, beta=0.0, reference=None):
    """Minus the gradient of sepo_loss at theta = theta_old, averaged -> (mean, standard error of its projection on u) fn."""
    grads = []
    for _ in range(parts):
        path = process.sample(model, n // parts, L, steps)
        value = reward(path.tokens)
        if beta:
            value = sepo.regularised(value, path.logp - process.replay(reference, path), beta)
        A = sepo.advantages(value[None], "dr_grpo").squeeze(0)
        loss, _ = sepo.sepo_loss(process, model, path, A, states, events=events)
        grads.append(-flat_gradient(loss, model))
    return torch.stack(grads)


def compare(grads, truth):
    """Cosine of the mean with the truth, scale of its projection on the truth, and that scale's standard error."""
    scale = grads @ truth / truth.square().sum()
    return (torch.cosine_similarity(grads.mean(0), truth, dim=0).item(), scale.mean().item(),
            (scale.std() / len(scale) ** 0.5).item())


def toy_reward(tokens):
    return (tokens[:, :-1] == 0).float().sum(1) - 0.7 * (tokens[:, 0] == tokens[:, -1]).float()


@pytest.mark.parametrize("steps, events", [(None, 1), (None, 3), (2, 1)])
def test_path_is_the_true_policy_gradient(steps, events):
    model, process = network(3, 4, n_embd=16), Absorbing(3)
    truth = flat_gradient((process.exact_law(model, 4, steps) * toy_reward(sequences(3, 4))).sum(), model)
    torch.manual_seed(0)
    cosine, scale, error = compare(estimate(process, model, 4, toy_reward, "path", steps, events=events), truth)
    assert cosine > 0.99 and abs(scale - 1) < 4 * error, (cosine, scale, error)


def test_kl_in_the_return_is_the_gradient_of_the_kl_of_paths():
    """With reward zero and beta = 1 it descends KL(path law || reference path law), here by enumerating paths of two slots."""
    model, reference, process = network(3, 2, n_embd=16), network(3, 2, seed=1, n_embd=16), Absorbing(3)
    x = sequences(3, 2)
    total = 0.0
    for first, second in ((0, 1), (1, 0)):                     # the two orders, each with chance one half
        start, middle = torch.full_like(x, 3), torch.full_like(x, 3)
        middle[:, first] = x[:, first]
        moves = ((start, first), (middle, second))
        logp, ref = (sum(m(s).log_softmax(-1)[torch.arange(9), i, x[:, i]] for s, i in moves) for m in (model, reference))
        total = total + 0.5 * (logp.exp() * (logp - ref.detach())).sum()
    truth = -flat_gradient(total, model)
    torch.manual_seed(1)
    grads = estimate(process, model, 2, lambda tokens: torch.zeros(len(tokens)), "path", beta=1.0, reference=reference)
    cosine, scale, error = compare(grads, truth)
    assert cosine > 0.99 and abs(scale - 1) < 4 * error, (cosine, scale, error)


def test_noised_is_unbiased_for_a_consistent_model():
    """Where the bound is tight its gradient is that of the likelihood."""
    model, process = posterior_table(random_law(3, 3), 3, 3), Absorbing(3)
    truth = flat_gradient((process.exact_law(model, 3) * toy_reward(sequences(3, 3))).sum(), model)
    torch.manual_seed(2)
    cosine, scale, error = compare(estimate(process, model, 3, toy_reward, "noised", n=150_000), truth)
    assert cosine > 0.99 and abs(scale - 1) < 4 * error, (cosine, scale, error)


def test_bias_of_noised_and_terminal_for_an_inconsistent_model():
    """A table of random logits, whose conditionals are those of no law: `path` stays true, the two others point elsewhere.
    Cosines measured with 60,000 samples: path 0.999, noised 0.83, terminal 0.23."""
    model, process = Table(3, 3), Absorbing(3)
    truth = flat_gradient((process.exact_law(model, 3) * toy_reward(sequences(3, 3))).sum(), model)
    torch.manual_seed(3)
    cosine = {s: compare(estimate(process, model, 3, toy_reward, s), truth)[0] for s in ("path", "noised", "terminal")}
    assert cosine["path"] > 0.99
    assert cosine["noised"] == pytest.approx(0.83, abs=0.03)
    assert cosine["terminal"] == pytest.approx(0.23, abs=0.03)


def test_a_return_for_each_transition():
    """[B, L] advantages: equal columns give the loss of [B]; a column of its own weighs the transition of that slot."""
    model, process = network(3, 4), Absorbing(3)
    torch.manual_seed(4)
    path = process.sample(model, 64, 4)
    A, view = torch.randn(64), sepo.draw_view(process, path, "path")
    whole = sepo.sepo_loss(process, model, path, A, view=view)[0]
    assert torch.allclose(whole, sepo.sepo_loss(process, model, path, A[:, None].expand(64, 4), view=view)[0])
    only = torch.zeros(64, 4)
    only[:, 2] = A
    logp = sepo.line_logp(process, model, view)[0]
    expected = -(4 * A * (logp - view.logp_old).exp().squeeze(1) * (view.slots.squeeze(1) == 2)).sum() / 64
    assert torch.allclose(sepo.sepo_loss(process, model, path, only, view=view)[0], expected, atol=1e-6)


# ---- the loss by hand ---------------------------------------------------------------------------------------------------

def hand(ratio, A, clip=0.2, **kwargs):
    """One path of one slot whose token's ratio is `ratio` -> (loss, stats, gradient of the loss in log w)."""
    process, model = Absorbing(2), Table(2, 1, torch.zeros(3, 1, 2))
    path = process.sample(model, 1, 1)
    view = sepo.draw_view(process, path, "path")
    view.logp_old = view.logp_old - torch.tensor(ratio).log()
    loss, stats = sepo.sepo_loss(process, model, path, torch.tensor([A]), clip=clip, view=view, **kwargs)
    grad, = torch.autograd.grad(loss, model.logits)
    return loss.item(), stats["clip_fraction"].item(), grad.abs().sum().item()


@pytest.mark.parametrize("ratio, A, loss, clipped", [
    (1.0, 2.0, -2.0, 0), (1.1, 2.0, -2.2, 0), (1.5, 2.0, -2.4, 1), (0.5, 2.0, -1.0, 0),
    (1.0, -2.0, 2.0, 0), (0.9, -2.0, 1.8, 0), (0.5, -2.0, 1.6, 1), (1.5, -2.0, 3.0, 0)])
def test_clip_by_hand(ratio, A, loss, clipped):
    got = hand(ratio, A)
    assert got[0] == pytest.approx(loss, abs=1e-5) and got[1] == clipped and (got[2] == 0) == bool(clipped)


def test_entropy_and_consistency_by_hand():
    """A uniform law over two tokens: entropy log 2, and log w = -log 2."""
    log2 = torch.tensor(2.0).log().item()
    assert hand(1.0, 0.0, entropy=0.5)[0] == pytest.approx(-0.5 * log2, abs=1e-6)
    assert hand(1.0, 0.0, consistency=0.5)[0] == pytest.approx(0.5 * log2, abs=1e-6)


def test_consistency_descends_the_bound_of_own_samples():
    model, process = network(3, 4), Absorbing(3)
    torch.manual_seed(5)
    path = process.sample(model, 32, 4)
    ours = flat_gradient(sepo.sepo_loss(process, model, path, torch.zeros(32), "noised", consistency=1.0,
                                        generator=torch.Generator().manual_seed(6))[0], model)
    bound = flat_gradient(process.loss(model, path.tokens, torch.Generator().manual_seed(6)), model)
    assert torch.allclose(ours, bound, atol=1e-6)


def test_unknown_names_are_errors():
    process, model = Absorbing(2), Table(2, 2)
    with pytest.raises(ValueError, match="unknown states"):
        sepo.sepo_loss(process, model, process.sample(model, 2, 2), torch.zeros(2), states="nowhere")
    with pytest.raises(ValueError, match="unknown advantage"):
        sepo.advantages(torch.zeros(1, 2), "gae")


# ---- advantages by hand -----------------------------------------------------------------------------------------------------

R = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 6.0]])


@pytest.mark.parametrize("kind, expected", [
    ("grpo", [[-1.5 ** 0.5, 0, 1.5 ** 0.5], [-0.5 ** 0.5, -0.5 ** 0.5, 2 ** 0.5]]),
    ("dr_grpo", [[-1, 0, 1], [-2, -2, 4]]),
    ("loo", [[-1.5, 0, 1.5], [-3, -3, 6]]),
    ("ppo", [[-1 / 2, 0, 1 / 2], [-1, -1, 2]])])
def test_advantages_by_hand(kind, expected):
    """ppo: mean 2, and variance (1 + 0 + 1 + 4 + 4 + 16) / 6 = 13 / 3, over the batch."""
    scale = 2 / (13 / 3) ** 0.5 if kind == "ppo" else 1
    assert torch.allclose(sepo.advantages(R, kind), scale * torch.tensor(expected, dtype=torch.float), atol=1e-6)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "loo", "ppo"])
@pytest.mark.parametrize("rewards", [torch.full((2, 4), 0.3), torch.tensor([[0.7]])])
def test_degenerate_groups_get_zeros(kind, rewards):
    assert (sepo.advantages(rewards, kind) == 0).all()


def test_ppo_baseline_is_learnt_across_the_run():
    """decay 0.5: rollouts of mean 0 then 4 weigh 1 : 2, so the mean is 8/3 and the mean square 32/3."""
    baseline = sepo.Baseline(decay=0.5)
    baseline.update(torch.zeros(1, 4))
    baseline.update(torch.full((1, 4), 4.0))
    expected = (R - 8 / 3) / (32 / 3 - 64 / 9) ** 0.5
    assert torch.allclose(sepo.advantages(R, "ppo", baseline), expected, atol=1e-5)
