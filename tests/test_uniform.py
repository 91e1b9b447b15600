"""The uniform chain, the noise schedules, the corrector and the likelihood bound of both chains, against enumeration."""
import itertools

import pytest
import torch

import sepo
from diffusion import SCHEDULES, Absorbing, Uniform
from exact import Posterior, Table, chi_square, flat_gradient, network, posterior_table, random_law, rank, sequences
from test_sepo import compare, estimate, toy_reward

P_MIN = 1e-3


def kl(p, q):
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum().item()


# ---- schedules --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_runs_from_one_to_zero_and_is_inverted(name):
    alpha, inverse = SCHEDULES[name]
    t = torch.linspace(0, 1, 101)
    a = alpha(t)
    assert a[0] == pytest.approx(1, abs=1e-6) and a[-1] == pytest.approx(0, abs=1e-6) and (a.diff() < 0).all()
    u = torch.linspace(0.001, 0.999, 101)
    assert torch.allclose(alpha(inverse(u)), u, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_a_grid_the_law_does_not_depend_on_the_schedule(name):
    model, process = network(3, 4), Absorbing(3, name)
    torch.manual_seed(0)
    assert chi_square(process.sample(model, 40_000, 4).tokens, Absorbing(3).exact_law(model, 4), 3) > P_MIN
    on_grid = process.exact_law(model, 4, 3)                   # with one it does, and the sampler follows it there
    assert chi_square(process.sample(model, 40_000, 4, 3).tokens, on_grid, 3) > P_MIN
    assert name == "linear" or kl(on_grid, Absorbing(3).exact_law(model, 4, 3)) > 1e-4


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_bound_does_not_depend_on_the_schedule(name):
    """A uniform chain's model that knows the noise level, whatever the schedule calls it: the mean loss is the entropy."""
    V, L = 3, 3
    p0, process = random_law(V, L), Uniform(V, name)
    truth = Posterior(p0, V, L)
    torch.manual_seed(1)
    x0 = sequences(V, L)[torch.multinomial(p0, 100_000, replacement=True)]
    with torch.no_grad():
        losses = process.losses(lambda x, t: truth(x, 1 - process.alpha(t)), x0)
    assert abs(losses.mean().item() + (p0 * p0.log()).sum().item()) < 4 * losses.std().item() / len(x0) ** 0.5


# ---- the uniform chain's law ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("steps", [None, 1, 3])
def test_samples_follow_the_exact_law(steps):
    model, process = network(3, 4, time_conditioning=True), Uniform(3)
    torch.manual_seed(2)
    law = process.exact_law(model, 4, steps)
    assert law.sum().item() == pytest.approx(1, abs=1e-5)
    assert chi_square(process.sample(model, 20_000, 4, steps).tokens, law, 3) > P_MIN


def test_prompt_is_kept_and_the_rest_follows_the_law():
    model, process, prompt = network(3, 4, time_conditioning=True), Uniform(3), torch.tensor([3, 1, 3, 0])
    torch.manual_seed(3)
    path = process.sample(model, 40_000, 4, 4, prompt)
    assert (path.tokens[:, [1, 3]] == torch.tensor([1, 0])).all() and (path.logp[:, :, [1, 3]] == 0).all()
    assert chi_square(path.tokens, process.exact_law(model, 4, 4, prompt), 3) > P_MIN


def test_exact_law_is_the_product_of_transition_matrices():
    """The matrices written out from Bayes: p(y | x) = prod_i sum_a p(a | x) q_s(y_i | a) q_{t|s}(x_i | y_i) / q_t(x_i | a)."""
    V, L, N = 2, 3, 4
    model, process, x = network(V, L, time_conditioning=True), Uniform(V), sequences(V, L)
    q = lambda a, b, keep: keep * (a == b) + (1 - keep) / V
    law = torch.full((V ** L,), V ** -L)
    with torch.no_grad():
        for k in range(N, 0, -1):
            t, s, matrix = k / N, (k - 1) / N, torch.ones(V ** L, V ** L)
            p = model(x, torch.full((V ** L,), t)).softmax(-1)
            for b, c, i in itertools.product(range(V ** L), range(V ** L), range(L)):
                X, Y = x[b, i].item(), x[c, i].item()
                bayes = [p[b, i, a] * q(Y, a, 1 - s) * q(X, Y, (1 - t) / (1 - s)) / q(X, a, 1 - t) for a in range(V)]
                matrix[b, c] *= sum(bayes)
            law = law @ matrix
        assert torch.allclose(process.exact_law(model, L, N), law, atol=1e-6)


def test_the_true_posterior_gives_back_the_data_as_the_grid_gets_finer():
    p0 = random_law(3, 3)
    gap = [kl(p0, Uniform(3).exact_law(Posterior(p0, 3, 3), 3, N).detach()) for N in (4, 16, 64)]
    assert gap[0] > 4 * gap[1] > 16 * gap[2] and gap[2] < 1e-3


def test_a_path_rebuilds_every_state_and_its_log_probabilities():
    V, L, B, N = 5, 6, 16, 7
    model, process = network(V, L, time_conditioning=True), Uniform(V)
    torch.manual_seed(4)
    path = process.sample(model, B, L, N)
    assert (path.state(N) == path.tokens).all() and path.states.dtype == torch.uint8
    for j in range(N):
        t, s = (torch.full((B,), 1 - n / N) for n in (j, j + 1))
        law = process.kernel(model, path.state(j), t, s)
        assert torch.allclose(law.sum(-1), torch.ones(B, L), atol=1e-5)
        assert torch.allclose(law.log().gather(-1, path.state(j + 1)[..., None]).squeeze(-1), path.logp[:, j], atol=1e-4)
    assert torch.allclose(process.replay(model, path, chunk=10), path.logp, atol=1e-5)


# ---- score, loss, bound -------------------------------------------------------------------------------------------------

def test_corrupt_keeps_a_letter_at_the_rate_of_the_schedule():
    torch.manual_seed(5)
    x = Uniform(4).corrupt(torch.zeros(3, 40_000, dtype=torch.long), torch.tensor([0.0, 0.4, 1.0]))
    share = (x == 0).float().mean(dim=1)
    for got, expected in zip(share.tolist(), (1, 0.6 + 0.4 / 4, 1 / 4)):
        assert abs(got - expected) <= 4 * (expected * (1 - expected) / 40_000) ** 0.5


def test_log_score_is_the_ratio_of_the_noised_law():
    V, L, t = 3, 3, 0.3
    p0, x = random_law(V, L), sequences(V, L)
    q = ((1 - t) * (x[:, None] == x) + t / V).prod(-1)                                              # [x_t, x0]
    p_t = q @ p0
    log_s = Uniform(V).log_score(Posterior(p0, V, L), x, torch.full((V ** L,), t)).detach()
    for n, i, v in itertools.product(range(V ** L), range(L), range(V)):
        y = x[n].clone()
        y[i] = v
        assert log_s[n, i, v].item() == pytest.approx((p_t[rank(y[None], V)] / p_t[n]).log().item(), abs=1e-4)


def test_loss_is_score_entropy_in_sedd_form():
    """The integrand written out with rates 1/V and ratios, at the noise that the loss itself drew."""
    V, L, B = 4, 5, 64
    model, process = network(V, L, time_conditioning=True), Uniform(V)
    seen = []
    corrupt = process.corrupt
    process.corrupt = lambda x0, t, generator=None: seen.append((t, corrupt(x0, t, generator))) or seen[-1][1]
    torch.manual_seed(6)
    x0 = torch.randint(V, (B, L))
    losses = process.losses(model, x0)
    (t, x), s = seen[0], process.log_score(model, *seen[0][::-1]).exp().double()
    q = lambda token: ((1 - t[:, None]) * (token == x0) + t[:, None] / V).double()
    total = torch.zeros(B, dtype=torch.double)
    for v in range(V):
        r = q(torch.full_like(x0, v)) / q(x)
        term = s[..., v] - r * s[..., v].log() + r * (r.log() - 1)
        total += (term * (x != v)).sum(1) / V / (1 - t)                                             # sigma' = 1 / (1 - t)
    clear = t > 1e-3                                           # below, float32 rounds 1 - t
    assert clear.sum() > 50                                    # t = w^3, dt = 3 w^2 dw
    assert torch.allclose(losses.double()[clear], (total * 3 * t.double() ** (2 / 3))[clear], rtol=1e-3)


@pytest.mark.parametrize("chain", [Absorbing, Uniform])
def test_a_trained_bound_lies_just_above_the_entropy(chain):
    V, L = 3, 3
    p0, process = random_law(V, L), chain(V)
    torch.manual_seed(7)
    model = network(V, L, n_layer=1, scale=0.2, time_conditioning=chain is Uniform).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for i in range(600):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - i / 600)
        loss = process.loss(model, sequences(V, L)[torch.multinomial(p0, 256, replacement=True)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    bound, error = process.bound(model.eval(), sequences(V, L), draws=4000)
    bound, error, entropy = (p0 * bound).sum(), (p0 * error).square().sum().sqrt(), -(p0 * p0.log()).sum()
    assert entropy - 3 * error < bound < 1.05 * entropy, (bound, error, entropy)


def test_loss_given_some_slots_neither_noises_nor_scores_them():
    V, seen = 3, []
    inner = network(V, 4, time_conditioning=True)

    def model(x, t, shift=0.0):
        seen.append(x)
        return inner(x, t) + shift * torch.tensor([1.0, 0, 0, 1.0])[:, None] * torch.arange(V)
    process, x0 = Uniform(V), torch.randint(V, (500, 4), generator=torch.Generator().manual_seed(0))
    given = torch.tensor([True, False, False, True]).expand_as(x0)
    with torch.no_grad():
        a, b = (process.losses(lambda x, t: model(x, t, shift), x0, torch.Generator().manual_seed(1), given)
                for shift in (0, 3))
        whole = process.losses(model, x0, torch.Generator().manual_seed(1))
    assert torch.equal(a, b) and (seen[0][given] == x0[given]).all() and (seen[0] != x0).any()
    assert whole.mean() > 1.3 * a.mean()


@pytest.mark.parametrize("chain, steps", [(Absorbing, None), (Uniform, 128)])
def test_the_bound_lies_above_minus_log_of_the_exact_law(chain, steps):
    """For every sequence of a small space and an inconsistent model. The bound is that of the chain without a grid."""
    V, L = 3, 3
    model, process = network(V, L, scale=0.7, time_conditioning=chain is Uniform), chain(V)
    torch.manual_seed(8)
    bound, error = process.bound(model, sequences(V, L), draws=4000)
    gap = bound + process.exact_law(model, L, steps).detach().log()
    assert (gap > -4 * error).all() and gap.mean() > 0.01 and (error < 0.1 * bound).all()


# ---- the corrector --------------------------------------------------------------------------------------------------------

def at_level(chain, t, V=2, L=3):
    """A consistent model, its chain, all states and their law p_t."""
    p0, x, W = random_law(V, L, spread=1.5), sequences(V, L), V + (chain is Absorbing)
    y = sequences(W, L)[:, None]
    q = torch.where(y == V, t, (1 - t) * (x == y)) if chain is Absorbing else (1 - t) * (x == y) + t / V
    model = posterior_table(p0, V, L) if chain is Absorbing else Posterior(p0, V, L)
    return model, chain(V), sequences(W, L), q.prod(-1) @ p0


@pytest.mark.parametrize("chain", [Absorbing, Uniform])
@pytest.mark.parametrize("t", [0.3, 0.7])
def test_the_corrector_leaves_the_law_of_its_level_alone(chain, t):
    model, process, states, p_t = at_level(chain, t)
    torch.manual_seed(9)
    x = states[torch.multinomial(p_t, 60_000, replacement=True)]
    y = process.correct(model, x, t, 6)
    assert (x != y).any(1).float().mean() > 0.3
    assert chi_square(y, p_t, states.max().item() + 1) > P_MIN


@pytest.mark.parametrize("chain", [Absorbing, Uniform])
def test_every_move_of_the_corrector_brings_another_law_closer(chain):
    """From one single state. KL of 200,000 samples to p_t; its own bias, (states - 1) / (2 n), is below 1e-4."""
    model, process, states, p_t = at_level(chain, 0.5)
    W = states.max().item() + 1
    torch.manual_seed(10)
    x = states[torch.zeros(200_000, dtype=torch.long)]
    distance = []
    for _ in range(24):
        p = torch.bincount(rank(x, W), minlength=len(states)) / len(x)
        distance.append(kl(p, p_t))
        x = process.correct(model, x, 0.5, 1)
    assert all(b < a for a, b in zip(distance, distance[1:])) and distance[-1] < 0.3 * distance[0], distance


@pytest.mark.parametrize("chain", [Absorbing, Uniform])
def test_the_corrector_keeps_what_is_given(chain):
    V, L = 3, 5
    model, process = network(V, L, time_conditioning=True), chain(V)
    torch.manual_seed(11)
    x, given = torch.randint(V, (50, L)), torch.rand(50, L) < 0.5
    given[0] = True
    y = process.correct(model, x, 0.6, 20, given)
    assert (y == x)[given].all() and (y != x)[~given].any()


@pytest.mark.parametrize("chain, steps", [(Absorbing, None), (Absorbing, 64), (Uniform, 256)])
def test_sampling_with_a_corrector_has_the_law_of_a_consistent_model(chain, steps):
    V, L = 2, 3
    p0 = random_law(V, L, spread=1.5)
    model, process = posterior_table(p0, V, L) if chain is Absorbing else Posterior(p0, V, L), chain(V)
    torch.manual_seed(12)
    path = process.sample(model, 10_000, L, steps, corrector_steps=5, corrector_t=0.4)
    assert chi_square(path.tokens, p0, V) > P_MIN
    assert torch.allclose(process.replay(model, path), path.logp, atol=1e-4)
    assert (path.tokens < V).all() and path.time.masked_fill(path.time.isinf(), 0).max() <= 0.41


# ---- SEPO on uniform noise --------------------------------------------------------------------------------------------------

def test_path_is_the_true_policy_gradient():
    model, process = network(3, 4, n_embd=16, time_conditioning=True), Uniform(3)
    truth = flat_gradient((process.exact_law(model, 4, 8) * toy_reward(sequences(3, 4))).sum(), model)
    torch.manual_seed(13)
    cosine, scale, error = compare(estimate(process, model, 4, toy_reward, "path", 8), truth)
    assert cosine > 0.98 and abs(scale - 1) < 4 * error, (cosine, scale, error)


def test_terminal_scores_every_slot_of_the_sample_at_a_low_level():
    """Its gradient is that of sum_i log w_{x_i} at the level: written out for one sample through log_score."""
    model, process = network(3, 4, n_embd=16, time_conditioning=True), Uniform(3)
    torch.manual_seed(14)
    path = process.sample(model, 8, 4, 4)
    A, t = torch.randn(8), torch.full((8,), Uniform.TERMINAL_NOISE)
    ours = flat_gradient(sepo.sepo_loss(process, model, path, A, "terminal")[0], model)
    log_w = process.log_score(model, path.tokens, t).log_softmax(-1).gather(-1, path.tokens[..., None]).squeeze(-1)
    assert torch.allclose(ours, flat_gradient(-(A[:, None] * log_w).sum() / 8, model), atol=1e-5)


def test_noised_is_refused():
    model, process = Table(2, 2), Uniform(2)
    with pytest.raises(ValueError, match="uniform noise has none"):
        sepo.draw_view(process, process.sample(model, 2, 2), "noised")


def test_a_return_for_each_transition():
    model, process = network(3, 4, time_conditioning=True), Uniform(3)
    torch.manual_seed(15)
    path = process.sample(model, 32, 4, 5)
    A, view = torch.randn(32), sepo.draw_view(process, path, "path")
    whole = sepo.sepo_loss(process, model, path, A, view=view)[0]
    assert torch.allclose(whole, sepo.sepo_loss(process, model, path, A[:, None, None].expand(32, 5, 4), view=view)[0])
    only = torch.zeros(32, 5, 4)
    only[:, 2, 1] = A
    logp = sepo.line_logp(process, model, view)[0]
    expected = -(5 * A * (logp - view.logp_old).exp()[:, 1] * (view.t == path.time[2])).sum() / 32
    assert torch.allclose(sepo.sepo_loss(process, model, path, only, view=view)[0], expected, atol=1e-6)
