"""SEPO against autograd through the exact law, and by hand-made numbers. Seeds are fixed; tolerances are standard errors."""
import itertools
import math

import pytest
import torch

import sepo
from diffusion import Absorbing, Path
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


# ---- LOOP, REINFORCE, PRDP ----------------------------------------------------------------------------------------------

def every_path(process, model, V, L):
    """All L! * V**L paths of the chain without a grid -> (Path, probability of each)."""
    orders = torch.tensor(list(itertools.permutations(range(L)))).repeat_interleave(V ** L, 0)
    x = sequences(V, L).repeat(math.factorial(L), 1)
    path = Path(x, (orders + 1) / (L + 1), torch.zeros(len(x), L), V, 1)
    with torch.no_grad():
        path.logp = process.replay(model, path)
    return path, path.logp.sum(1).exp() / math.factorial(L)


@pytest.mark.parametrize("kind", ["network", "table"])
def test_loop_over_all_events_is_the_true_policy_gradient(kind):
    """The mean over every path, by enumeration, against autograd through the exact law: equal, not only close."""
    V, L, process = 2, 3, Absorbing(2)
    model = network(V, L, n_embd=16) if kind == "network" else Table(V, L)
    path, p = every_path(process, model, V, L)
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    loss, stats = sepo.loop_loss(process, model, path, p * toy_reward(path.tokens) * len(p))
    truth = flat_gradient((process.exact_law(model, L) * toy_reward(sequences(V, L))).sum(), model)
    assert torch.allclose(-flat_gradient(loss, model), truth, atol=1e-5) and stats["clip_fraction"] == 0


@pytest.mark.parametrize("events", [None, 2])
def test_loop_follows_the_policy_gradient_of_a_grid(events):
    """Two steps for four slots: transitions move several slots at once."""
    model, process = network(3, 4, n_embd=16), Absorbing(3)
    truth = flat_gradient((process.exact_law(model, 4, 2) * toy_reward(sequences(3, 4))).sum(), model)
    torch.manual_seed(7)
    grads = []
    for _ in range(30):
        path = process.sample(model, 2000, 4, 2)
        A = sepo.advantages(toy_reward(path.tokens)[None], "loo").squeeze(0)
        grads.append(-flat_gradient(sepo.loop_loss(process, model, path, A, events=events)[0], model))
    cosine, scale, error = compare(torch.stack(grads), truth)
    assert cosine > 0.99 and abs(scale - 1) < 4 * error, (cosine, scale, error)


def test_loop_clips_the_joint_ratio_of_a_transition():
    """Two slots in one step, each with ratio 1.15: their product 1.3225 is clipped at 1.2, where SEPO clips neither slot."""
    process, model = Absorbing(2), Table(2, 2, torch.zeros(9, 2, 2))
    path = process.sample(model, 1, 2, steps=1)
    path.logp = path.logp - torch.tensor(1.15).log()
    for A, value, fraction in ((2.0, 2.4, 1), (-2.0, -2.645, 0)):
        for events in (None, 1):
            loss, stats = sepo.loop_loss(process, model, path, torch.tensor([A]), 0.2, events)
            assert loss.item() == pytest.approx(-value, abs=1e-5) and stats["clip_fraction"] == fraction
            assert (flat_gradient(loss, model) == 0).all() == bool(fraction)
    assert sepo.sepo_loss(process, model, path, torch.tensor([2.0]))[1]["clip_fraction"] == 0


def test_reinforce_is_loop_without_a_clip():
    """-A log p(path), whatever the ratio's value at theta_old: one."""
    model, process = network(3, 4), Absorbing(3)
    torch.manual_seed(8)
    path, A = process.sample(model, 16, 4), torch.randn(16)
    plain = -(A * process.replay(model, path).sum(1)).mean()
    loop, _ = sepo.loop_loss(process, model, path, A, float("inf"))
    assert torch.allclose(flat_gradient(loop, model), flat_gradient(plain, model), atol=1e-5)


def optimum(V=2, L=3, beta=0.5):
    """A lookup-table policy at p* ~ p_ref exp(R / beta), with every path of it, its rewards and its reference."""
    process, p_ref = Absorbing(V), random_law(V, L)
    R = toy_reward(sequences(V, L))
    model, reference = posterior_table((p_ref.log() + R / beta).softmax(0), V, L), posterior_table(p_ref, V, L)
    path, _ = every_path(process, model, V, L)
    with torch.no_grad():
        return process, model, path, toy_reward(path.tokens)[None], process.replay(reference, path), beta


def test_prdp_is_zero_exactly_at_the_closed_form_optimum_and_least_there():
    process, model, path, R, logp_ref, beta = optimum()
    loss, _ = sepo.prdp_loss(process, model, path, R, logp_ref, beta)
    assert loss.item() == pytest.approx(0, abs=1e-9) and flat_gradient(loss, model).abs().max() < 1e-4
    generator = torch.Generator().manual_seed(9)
    for _ in range(5):
        other = Table(2, 3, (model.logits + 0.1 * torch.randn(model.logits.shape, generator=generator)).detach())
        assert sepo.prdp_loss(process, other, path, R, logp_ref, beta)[0] > 1e-4


def test_prdp_is_the_mean_over_all_pairs_and_descends_the_regularised_objective():
    """Against the double sum over pairs; and at theta_old its gradient is the policy gradient of R - beta log-ratio."""
    process, _, path, R, logp_ref, beta = optimum()
    model, G = Table(2, 3), R.numel()
    with torch.no_grad():
        path.logp = process.replay(model, path)
    loss, _ = sepo.prdp_loss(process, model, path, R, logp_ref, beta)
    d = beta * (process.replay(model, path) - logp_ref).sum(1) - R[0]
    assert loss.item() == pytest.approx(((d[:, None] - d) ** 2).sum().item() / (2 * G * G) / (2 * beta), rel=1e-4)
    A = sepo.advantages(sepo.regularised(R[0], path.logp - logp_ref, beta)[None], "dr_grpo")[0]
    loop, _ = sepo.loop_loss(process, model, path, A)
    assert torch.allclose(flat_gradient(loss, model), flat_gradient(loop, model), atol=1e-5)


@pytest.mark.parametrize("drift, R, loss, stopped", [(0.3, -1, 0.18, 1), (0.3, 1, 0.125, 0), (0.05, -1, 0.125, 0)])
def test_proximal_clip_by_hand(drift, R, loss, stopped):
    """Two paths of one slot, beta = 1, rewards 0 and R, both log-ratios now 0; the second was `drift` when it was drawn, clip
    0.1. Free, the errors differ by R: (R/2)^2 / 2. Drift 0.3 holds the second at 0.2: it may not fall further for R = -1,
    where the error (1.2/2)^2 / 2 is the larger, and is free to turn back for R = 1."""
    process, model = Absorbing(2), Table(2, 1, torch.zeros(3, 1, 2))
    logp_ref = torch.full((2, 1), 0.5).log()
    path = Path(torch.tensor([[0], [1]]), torch.full((2, 1), 0.5), logp_ref + torch.tensor([[0.0], [drift]]), 2, 1)
    got, stats = sepo.prdp_loss(process, model, path, torch.tensor([[0.0, R]]), logp_ref, 1.0, 0.1)
    assert got.item() == pytest.approx(loss, abs=1e-6) and stats["clip_fraction"].item() == 0.5 * stopped


@pytest.mark.parametrize("G", [1, 4])
def test_prdp_of_a_degenerate_group_is_zero(G):
    """One sample, or equal rewards and a policy that is its reference."""
    model, process = network(3, 4), Absorbing(3)
    path = process.sample(model, G, 4)
    loss, _ = sepo.prdp_loss(process, model, path, torch.ones(1, G), path.logp, 0.1)
    assert loss.item() == pytest.approx(0, abs=1e-9) and flat_gradient(loss, model).abs().max() < 1e-6


def test_replay_has_the_gradient_of_all_passes_whatever_the_chunk():
    model, process = network(3, 5), Absorbing(3)
    torch.manual_seed(10)
    path, c = process.sample(model, 8, 5), torch.randn(8, 5)
    direct = 0.0
    for j in range(5):
        logp = model(path.state(j), None).log_softmax(-1).gather(-1, path.tokens[..., None]).squeeze(-1)
        direct = direct + (c * logp * (path.event == j)).sum()
    direct = flat_gradient(direct, model)
    for chunk in (None, 3):
        assert torch.allclose(flat_gradient((c * process.replay(model, path, chunk)).sum(), model), direct, atol=1e-4)


def test_closed_form_kl_by_hand():
    """One slot, w = (1/2, 1/2), reference (1/4, 3/4): beta times KL(w || ref) is added."""
    process, model = Absorbing(2), Table(2, 1, torch.zeros(3, 1, 2))
    reference = Table(2, 1, torch.tensor([0.25, 0.75]).log().expand(3, 1, 2).clone())
    path = process.sample(model, 4, 1)
    loss, _ = sepo.sepo_loss(process, model, path, torch.zeros(4), reference=reference, beta=0.3)
    assert loss.item() == pytest.approx(0.3 * (0.5 * math.log(2) + 0.5 * math.log(2 / 3)), abs=1e-6)


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
    ("running", [[-1, 0, 1], [-2, -2, 4]]),
    ("ppo", [[-1 / 2, 0, 1 / 2], [-1, -1, 2]])])
def test_advantages_by_hand(kind, expected):
    """ppo: mean 2, and variance (1 + 0 + 1 + 4 + 4 + 16) / 6 = 13 / 3, over the batch."""
    scale = 2 / (13 / 3) ** 0.5 if kind == "ppo" else 1
    assert torch.allclose(sepo.advantages(R, kind), scale * torch.tensor(expected, dtype=torch.float), atol=1e-6)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "loo", "ppo", "running"])
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
    assert torch.allclose(sepo.advantages(R, "running", baseline), R - 8 / 3, atol=1e-5)


@pytest.mark.parametrize("states, events", [("path", 2), ("noised", 1), ("terminal", 1)])
def test_micro_batches_add_up_to_the_whole(states, events):
    """Losses and gradients of a view's parts, and those of a replay in chunks."""
    model, process = network(4, 6), Absorbing(4)
    torch.manual_seed(30)
    path, A = process.sample(model, 16, 6), torch.randn(16)
    view = sepo.draw_view(process, path, states, events)
    losses = [lambda view: sepo.sepo_loss(process, model, path, A, view=view, consistency=0.2, entropy=0.1)[0]]
    if states == "path":
        losses.append(lambda view: sepo.loop_loss(process, model, path, A, view=view)[0])
    for loss in losses:
        whole, parts = loss(view), sum(loss(part) for part in view.split(5))
        assert len(view.split(5)) == -(-16 * events // 5) and torch.allclose(whole, parts, atol=1e-6)
        assert torch.allclose(flat_gradient(whole, model), flat_gradient(parts, model), atol=1e-6)
    logp = process.replay(model, path)
    assert torch.allclose(logp, process.replay(model, path, chunk=7), atol=1e-5)
    assert torch.allclose(flat_gradient(logp.sum(), model), flat_gradient(process.replay(model, path, chunk=7).sum(), model),
                          atol=1e-4)
