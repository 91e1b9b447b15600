"""Both chains against enumeration. Seeds are fixed; a distribution is rejected at p < 1e-3.

Read first test_the_exact_law_is_the_sum_over_every_path: it ties the sampler's replay to exact_law,
on which everything in test_sepo.py stands."""
import itertools
import math

import pytest
import torch

import sepo
from diffusion import Absorbing, MaskPath, Uniform, pick, stratified
from exact import (Posterior, Table, chi_square, corrected_law, every_path, has_bfloat16, kl,
                   law_given, network, plain_loop, posterior_table, probability, random_law, rank,
                   sequences)
from model import Denoiser

P_MIN = 1e-3
CHAINS = [Absorbing, Uniform]
PROMPT = torch.tensor([3, 1, 3, 0])


def model_for(chain, V, L, **config):
    return network(V, L, time_conditioning=chain is Uniform, **config)

# -----------------------------------------------------------------------------
# laws of the samplers


@pytest.mark.parametrize("chain, steps, prompt", [
    (Absorbing, None, None), (Absorbing, 1, None), (Absorbing, 2, None), (Absorbing, 5, None),
    (Absorbing, None, PROMPT), (Absorbing, 3, PROMPT),
    (Uniform, 1, None), (Uniform, 4, None), (Uniform, 3, PROMPT)])
def test_samples_follow_the_exact_law(chain, steps, prompt):
    model, process = model_for(chain, 3, 4), chain(3)
    torch.manual_seed(1)
    law = law_given(process, model, 4, steps, prompt)
    path = process.sample(model, 10_000, 4, steps, prompt)
    assert law.sum().item() == pytest.approx(1, abs=1e-5)
    assert chi_square(path.tokens, law, 3) > P_MIN
    if prompt is not None:
        assert (path.tokens == prompt)[:, prompt < 3].all()


@pytest.mark.parametrize("chain, steps, prompt", [
    (Absorbing, None, None), (Absorbing, 3, None), (Absorbing, None, torch.tensor([2, 1, 2])),
    (Uniform, 2, None), (Uniform, 2, torch.tensor([2, 1, 2]))])
def test_the_exact_law_is_the_sum_over_every_path(chain, steps, prompt):
    V, L = 2, 3
    model, process = model_for(chain, V, L), chain(V)
    path, other = every_path(process, model, L, steps, prompt)
    p = probability(path, other)
    law = torch.zeros(V ** L).index_add(0, rank(path.tokens, V), p)
    assert torch.allclose(law.double(), law_given(process, model, L, steps, prompt), atol=1e-6)


def test_a_grid_changes_the_law_and_chi_square_sees_it():
    model, process = network(3, 4), Absorbing(3)
    torch.manual_seed(2)
    tokens = process.sample(model, 10_000, 4, steps=1).tokens
    assert chi_square(tokens, process.exact_law(model, 4), 3) < 1e-6


def test_time_conditioned_masks_follow_the_exact_law_on_a_grid():
    model, process = network(3, 3, time_conditioning=True), Absorbing(3)
    torch.manual_seed(4)
    law = process.exact_law(model, 3, 4)
    assert chi_square(process.sample(model, 10_000, 3, 4).tokens, law, 3) > P_MIN


def test_the_exact_law_without_a_grid_gives_the_model_the_mean_time_of_each_state():
    """m of L slots are masked just before event L - m, at time m / (L + 1) on average."""
    seen = {}

    def model(x, t):
        seen.update(zip((x == 2).sum(dim=1).tolist(), t.tolist()))
        return torch.zeros(*x.shape, 2)
    Absorbing(2).exact_law(model, 3)
    assert seen == pytest.approx({m: m / 4 for m in (1, 2, 3)})
    with pytest.raises(ValueError, match="needs a time"):
        network(3, 3, time_conditioning=True)(torch.zeros(1, 3, dtype=torch.long))


def test_the_exact_law_reaches_below_the_smallest_float32():
    """Letter 1 has probability e^-300 in each of two slots; on a grid e^-150."""
    def model(x, t):
        return torch.stack((torch.zeros(x.shape), torch.full(x.shape, -150.0)), dim=-1)
    law = Absorbing(2).exact_law(model, 2)
    assert law.dtype == torch.double and law[3].log().item() == pytest.approx(-300)
    assert Absorbing(2).exact_law(model, 2, 4)[1].log().item() == pytest.approx(-150)


def test_the_plain_loop_follows_the_exact_law():
    model, process = network(3, 3), Absorbing(3)
    torch.manual_seed(5)
    tokens = plain_loop(process, model, torch.full((10_000, 3), 3), steps=3)
    assert chi_square(tokens, process.exact_law(model, 3, 3), 3) > P_MIN


def test_a_consistent_model_has_its_own_law():
    p0, process = random_law(3, 3), Absorbing(3)
    model = posterior_table(p0, 3, 3)
    assert torch.allclose(process.exact_law(model, 3), p0.double(), atol=1e-6)
    slots = torch.rand(3, 3, generator=torch.Generator().manual_seed(0)).softmax(1)
    product = torch.einsum("a,b,c->abc", *slots).flatten()      # independent: no grid error
    law = process.exact_law(posterior_table(product, 3, 3), 3, steps=2)
    assert torch.allclose(law, product.double(), atol=1e-6)


def test_the_uniform_posterior_gives_back_the_data_as_the_grid_gets_finer():
    p0 = random_law(3, 3)
    model = Posterior(p0, 3, 3)
    gap = [kl(p0, Uniform(3).exact_law(model, 3, N).detach()) for N in (4, 16, 64)]
    assert gap[0] > 4 * gap[1] > 16 * gap[2] and gap[2] < 1e-3


def test_the_uniform_law_is_the_product_of_transition_matrices():
    """From Bayes: p(y|x) = prod_i sum_a p(a|x) q_s(y_i|a) q_{t|s}(x_i|y_i) / q_t(x_i|a)."""
    V, L, N = 2, 2, 3
    model, process, x = model_for(Uniform, V, L), Uniform(V), sequences(V, L)
    law = torch.full((V ** L,), V ** -L)

    def q(a, b, keep):
        return keep * (a == b) + (1 - keep) / V
    with torch.no_grad():
        for k in range(N, 0, -1):
            t, s = k / N, (k - 1) / N
            matrix = torch.ones(V ** L, V ** L)
            p = model(x, torch.full((V ** L,), t)).softmax(-1)
            for b, c, i in itertools.product(range(V ** L), range(V ** L), range(L)):
                X, Y = x[b, i].item(), x[c, i].item()
                matrix[b, c] *= sum(p[b, i, a] * q(Y, a, 1 - s) * q(X, Y, (1 - t) / (1 - s))
                                    / q(X, a, 1 - t) for a in range(V))
            law = law @ matrix
        assert torch.allclose(process.exact_law(model, L, N), law.double(), atol=1e-6)


# -----------------------------------------------------------------------------
# the event loop and its paths


@pytest.mark.parametrize("time_conditioning, conv", [(False, 0), (True, 5)])
@pytest.mark.parametrize("steps", [16, 200])
def test_event_loop_and_plain_loop_draw_the_same_tokens(steps, time_conditioning, conv):
    """Same reveal times, same Gumbel noise (one draw per slot, so large in the logits that the
    sampler's own noise does not count), prompts of 0 to 64 slots: the same tokens."""
    V, L, B = 7, 64, 8
    inner = network(V, L, scale=0.7, time_conditioning=time_conditioning, conv=conv)
    process = Absorbing(V)
    generator = torch.Generator().manual_seed(6)
    noise = -torch.empty(L, V).exponential_(generator=generator).log()
    given = torch.arange(L) < torch.tensor([0, 0, 5, 17, 30, 50, 63, 64])[:, None]
    x = torch.where(given, torch.randint(V, (B, L), generator=generator), V)
    time = process.reveal_times(given, steps, generator=generator)

    def model(x, t):
        return 1e6 * (inner(x, t) + noise)
    path = process.reveal(model, x, time)
    assert (path.tokens == plain_loop(process, model, x, steps, time)).all()
    distinct = [len(set(row[row.isfinite()].tolist())) for row in time]
    assert path.n_events.tolist() == distinct


def test_passes_are_those_of_the_rows_that_are_not_done():
    process, calls = Absorbing(5), []

    def model(x, t):
        calls.append(len(x))
        return torch.zeros(*x.shape, 5)
    torch.manual_seed(7)
    path = process.sample(model, 16, 32, steps=64)
    assert len(calls) == path.n_events.max() <= 32
    assert sum(calls) == path.n_events.sum() == len(path.visits[0])


def test_reveal_times_are_uniform_up_to_their_start_and_never_tie():
    """20 million pairs of float32 numbers would tie some hundred times. On a grid of ten steps from
    0.3 on, the three steps are equally likely."""
    torch.manual_seed(3)
    process, n = Absorbing(2), 10_000
    time = process.reveal_times(torch.zeros(200, 450, dtype=torch.bool), start=0.8)
    assert time.dtype == torch.double
    assert (time.sort(dim=1).values.diff(dim=1) > 0).all() and time.max() <= 0.8
    assert abs(time.mean().item() - 0.4) < 4 * 0.8 / 12 ** 0.5 / 90_000 ** 0.5
    given = torch.zeros(n, 2, dtype=torch.bool)
    given[:, 1] = True
    time = process.reveal_times(given, steps=10, start=0.3)
    counts = (time[:, 0] * 10).round().long().bincount()
    assert time[:, 1].isinf().all() and len(counts) == 4 and counts[0] == 0
    assert ((counts[1:] - n / 3).abs() < 4 * (n * 2 / 9) ** 0.5).all()


@pytest.mark.parametrize("chain, steps", [(Absorbing, None), (Absorbing, 4), (Uniform, 5)])
def test_a_path_rebuilds_every_state_and_its_log_probabilities(chain, steps):
    V, L, B = 5, 9, 16
    model, process = network(V, L, time_conditioning=True), chain(V)
    prompt = torch.full((B, L), V)
    prompt[3:, 2], prompt[7, :] = 1, 0                          # row 7 has nothing to draw
    visited = []

    def spy(x, t):
        visited.append((x.clone(), t.clone()))
        return model(x, t)
    torch.manual_seed(8)
    path = process.sample(spy, B, L, steps, prompt)
    assert (path.state(int(path.n_events.max())) == path.tokens).all()
    assert (path.logp.transpose(1, -1)[path.given] == 0).all() if chain is Uniform else \
        ((path.logp == 0) == path.given).all()
    for j, (x, t) in enumerate(visited):
        rows = path.n_events > j
        assert sorted(path.state(j)[rows].tolist()) == sorted(x.tolist())   # the loop sorts rows
        view = path.view(rows.nonzero().squeeze(1), torch.full((int(rows.sum()),), j))
        assert sorted(view.t.tolist()) == pytest.approx(sorted(t.tolist()))
        logp = process.logp(model, view)
        assert torch.allclose(logp[view.scored], view.logp_old[view.scored], atol=1e-4)
    for chunk in (None, 10):
        assert torch.allclose(process.replay(model, path, chunk), path.logp, atol=1e-4)


def test_a_view_draws_every_event_equally_often_and_weighs_it_by_their_number():
    """300 paths of 3 events: one uniform per path and cell, so the counts are exact."""
    process, model = Absorbing(2), Table(2, 3)
    path = process.sample(model, 300, 3)
    time = torch.tensor([0.2, 0.9, 0.5]).double().expand(300, 3)
    path = MaskPath(path.tokens, time, path.logp, 2)
    for events in (1, 3):
        view = sepo.draw_view(process, model, path, events)
        assert view.slots.flatten().bincount().tolist() == [100 * events] * 3
        assert torch.allclose(view.weight, torch.tensor(3 / events / 300))
    several = sepo.draw_view(process, model, path, 3)
    per_path = several.event[several.row.argsort(stable=True)].view(300, 3)
    assert (per_path.sort(dim=1).values == torch.arange(3)).all()       # each event once


@pytest.mark.parametrize("chain, steps", [(Absorbing, None), (Absorbing, 4), (Uniform, 4)])
def test_the_forward_process_read_backwards_ends_in_its_tokens(chain, steps):
    """Its states have the distribution of `corrupt` at their times, and replay scores them."""
    V, n, process = 3, 8000, chain(3)
    tokens, given = torch.tensor([0, 2, 1]).repeat(n, 1), torch.zeros(n, 3, dtype=torch.bool)
    given[:, 1] = True
    torch.manual_seed(4)
    path = process.path_to(tokens, given, steps)
    assert (path.tokens == tokens).all() and (path.given == given).all() and path.logp is None
    assert (process.path_to(tokens, None, steps).given == torch.zeros(n, 3, dtype=torch.bool)).all()
    states = [path.state(j) for j in range(int(path.n_events.max()) + 1)]
    assert all((x[:, 1] == 2).all() for x in states)
    if chain is Absorbing and steps is None:                    # one of two slots is left
        assert abs((states[1] == 3).double().mean().item() * 3 - 1) < 1e-9
        first = (states[1][:, 0] == 3).double().mean().item()
        assert abs(first - 0.5) < 4 * 0.5 / n ** 0.5
    if chain is Uniform:
        for j, t in enumerate(path.time.tolist()):
            kept = (states[j][:, 0] == 0).double().mean().item()
            chance = (1 - t) + t / V
            assert abs(kept - chance) <= 4 * (chance * (1 - chance) / n) ** 0.5 + 1e-9
    if chain is Absorbing and steps:
        masked = (path.time[:, [0, 2]] > 0.5).double().mean().item()    # still masked at t = 1/2
        assert abs(masked - 0.5) < 4 * 0.5 / (2 * n) ** 0.5
    logp = process.replay(network(V, 3, time_conditioning=True), path)
    assert logp.isfinite().all() and (logp < 0).any()


def test_a_path_with_nothing_to_draw():
    model, process = network(3, 4), Absorbing(3)
    path = process.sample(model, 5, 4, prompt=torch.tensor([0, 1, 2, 0]))
    assert (path.tokens == torch.tensor([0, 1, 2, 0])).all() and (path.n_events == 0).all()
    assert (process.replay(model, path) == 0).all()
    for events in (0, 1):
        view = sepo.draw_view(process, model, path, events)
        assert sepo.sepo_loss(process, model, view, torch.ones(5)) == (0, 0)
        assert sepo.loop_loss(process, model, view, torch.ones(5)) == (0, 0)


def test_a_fine_grid_near_time_zero_stays_finite():
    """The chance to keep a letter rounds to 1 there."""
    model, process = network(3, 3, time_conditioning=True), Uniform(3)
    t, s = torch.full((1,), 1e-9), torch.zeros(1)
    kernel = process.kernel(model, torch.tensor([[0, 2, 1]]), t, s)
    assert torch.allclose(kernel.sum(-1).float(), torch.ones(1, 3), atol=1e-4)


def test_a_users_network_may_have_layers_named_hidden_and_head():
    class Foreign(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = torch.nn.Linear(4, 3)
            self.head = torch.nn.Linear(3, 3)

        def forward(self, x, t):
            return self.hidden(torch.nn.functional.one_hot(x, 4).float())
    torch.manual_seed(17)
    assert Absorbing(3).sample(Foreign(), 4, 5).tokens.max() < 3


def test_forbidden_tokens_and_padding_give_no_nan():
    """Logits of -inf: a token that is never drawn, and a slot of which nothing is known."""
    process = Absorbing(3)

    def model(x, t):
        logits = torch.zeros(*x.shape, 3, requires_grad=True) + 0
        logits[..., 2] = -math.inf
        logits[x == 0] = -math.inf                              # revealed slots, as some models do
        return logits
    path = process.sample(model, 50, 4, steps=2)
    assert (path.tokens < 2).all()
    assert process.replay(model, path).isfinite().all()
    loss, _ = sepo.sepo_loss(process, model, sepo.draw_view(process, model, path), torch.ones(50))
    assert loss.isfinite()


@pytest.mark.skipif(not has_bfloat16(), reason="torch has no bfloat16 here")
def test_bfloat16_keeps_the_log_probabilities():
    model, process = network(27, 64, n_layer=2, n_embd=128), Absorbing(27)
    torch.manual_seed(16)
    path = process.sample(model, 8, 64)
    rough = Denoiser(model.config, torch.bfloat16).eval()
    rough.load_state_dict(model.state_dict())
    half = process.replay(rough, path)
    assert half.dtype == torch.float32 and 0 < (half - path.logp).abs().max() < 0.2


def test_events_by_hand():
    inf = math.inf
    time = torch.tensor([[0.5, 1.0, 0.5, 0.25], [inf, 0.1, 0.2, inf], [inf] * 4])
    event = MaskPath(time, time, time, 0).event
    assert event.tolist() == [[1, 0, 1, 2], [-1, 1, 0, -1], [-1] * 4]


def test_stratified_puts_one_uniform_in_each_cell():
    torch.manual_seed(0)
    u = stratified(50)
    assert (u.mul(50).long().sort().values == torch.arange(50)).all() and u.max() < 1

# -----------------------------------------------------------------------------
# forward process, score, loss


@pytest.mark.parametrize("chain", CHAINS)
def test_corrupt_keeps_a_letter_with_probability_one_minus_t(chain):
    torch.manual_seed(5)
    n, t = 10_000, torch.tensor([0.0, 0.4, 1.0])
    x = chain(4).corrupt(torch.zeros(3, n, dtype=torch.long), t)
    expected = (1 - t) + (t / 4 if chain is Uniform else 0)
    error = (expected * (1 - expected) / n).sqrt()
    assert (((x == 0).float().mean(dim=1) - expected).abs() <= 4 * error).all()


def at_level(chain, t, V=2, L=3):
    """A consistent model, its chain, all states and their law p_t."""
    p0, x, W = random_law(V, L, spread=1.5), sequences(V, L), V + (chain is Absorbing)
    y = sequences(W, L)[:, None]
    if chain is Absorbing:
        return (posterior_table(p0, V, L), chain(V), sequences(W, L),
                torch.where(y == V, t, (1 - t) * (x == y)).prod(-1) @ p0)
    q = (1 - t) * (x == y) + t / V
    return Posterior(p0, V, L), chain(V), sequences(W, L), q.prod(-1) @ p0


@pytest.mark.parametrize("chain", CHAINS)
def test_log_score_is_the_ratio_of_the_noised_law(chain):
    V, L, t = 3, 2, 0.3
    model, process, states, p_t = at_level(chain, t, V, L)
    W = states.max().item() + 1
    log_s = process.log_score(model, states, torch.full((len(states),), t)).detach()
    for n, i, v in itertools.product(range(len(states)), range(L), range(V)):
        y = states[n].clone()
        y[i] = v
        if chain is Absorbing and states[n, i] < V:             # a revealed slot cannot change
            assert log_s[n, i, v] == (0 if v == states[n, i] else -math.inf)
        else:
            ratio = (p_t[rank(y[None], W)] / p_t[n]).item()
            assert log_s[n, i, v].exp().item() == pytest.approx(ratio, rel=1e-3)


def score_entropy(s, r):
    """SEDD's integrand, without the rate."""
    return s - r * s.log() + r * (r.log() - 1)


def test_the_absorbing_loss_is_score_entropy_and_weighted_cross_entropy():
    """At every masked slot, sum_v rate * integrand(s_v, r_v), r_v = [v = x0] alpha / (1 - alpha):
    the terms without x0 sum to a constant, so it is -log p(x0) times alpha / (1 - alpha)."""
    V, L = 5, 6
    model, process = network(V, L), Absorbing(V)
    generator = torch.Generator().manual_seed(11)
    x0 = torch.randint(V, (64, L), generator=generator)
    t = 0.05 + 0.9 * torch.rand(64, generator=generator)
    torch.manual_seed(11)
    x = process.corrupt(x0, t)
    odds = ((1 - t) / t)[:, None].double()
    s = process.log_score(model, x, t).exp().double()                               # [B, L, V]
    own = pick(s, x0)
    entropy = s.sum(dim=-1) - own + score_entropy(own, odds)
    cross_entropy = -odds * pick(model(x, t).log_softmax(-1), x0).double()
    masked = x == V
    assert torch.allclose(entropy[masked], cross_entropy[masked], atol=1e-4)


def test_the_mean_absorbing_loss_is_the_bound_written_out():
    """For every x0, over all masked subsets: the mean over m of n/m times the mean over subsets of
    size m. Slots that are given are neither masked nor scored."""
    V, L, n = 2, 3, 10_000
    model, process = network(V, L), Absorbing(V)
    x0 = torch.tensor([1, 0, 1])
    torch.manual_seed(3)
    for given in (torch.tensor([False] * 3), torch.tensor([True, False, False])):
        free = [i for i in range(L) if not given[i]]
        bound = 0.0
        for m in range(1, len(free) + 1):
            subsets = list(itertools.combinations(free, m))
            for subset in subsets:
                x = x0.clone()
                x[list(subset)] = V
                logp = model(x[None])[0].log_softmax(-1)[list(subset), x0[list(subset)]].sum()
                bound -= logp.item() / m / len(subsets)
        with torch.no_grad():
            losses = process.losses(model, x0.expand(n, L), given=given.expand(n, L))
        assert abs(losses.mean().item() - bound) < 4 * losses.std().item() / n ** 0.5


def test_the_uniform_loss_is_score_entropy_in_sedd_form():
    """The integrand written out with rates 1/V and ratios, at the noise that the loss drew."""
    V, L, B = 4, 5, 64
    model, process, seen = model_for(Uniform, V, L), Uniform(V), []
    corrupt = process.corrupt

    def spy(x0, t):
        seen.append((corrupt(x0, t), t))
        return seen[0][0]
    process.corrupt = spy
    torch.manual_seed(6)
    x0 = torch.randint(V, (B, L))
    losses = process.losses(model, x0, given=x0 < 0)
    x, t = seen[0]
    s = process.log_score(model, x, t).exp().double()

    def q(token):
        return ((1 - t[:, None]) * (token == x0) + t[:, None] / V).double()
    total = torch.zeros(B, dtype=torch.double)
    for v in range(V):
        r = q(torch.full_like(x0, v)) / q(x)
        total += (score_entropy(s[..., v], r) * (x != v)).sum(1) / V / (1 - t)     # sigma'
    clear = t > 1e-3                                            # below, float32 rounds 1 - t
    density = 3 * t.double() ** (2 / 3) * (1 - 1e-4 - 1e-2)     # t = w^3, dt = 3 w^2 dw
    assert clear.sum() > 50
    assert torch.allclose(losses.double()[clear], (total * density)[clear], rtol=1e-3)


def test_uniform_levels_lie_above_the_cut_and_do_not_pile_up_on_it():
    seen, process = [], Uniform(2)
    process.corrupt = lambda x0, t: seen.append(t) or x0
    process.loss(lambda x, t: torch.zeros(*x.shape, 2), torch.zeros(10_000, 2, dtype=torch.long))
    t = seen[0].double()
    assert t.min() > 0.9 * Uniform.CUT and t.max() < 1
    assert 0.4 < (t < 0.0100 ** 3 * 8).sum() / 10_000 / 0.0101 < 1.6       # w in [0.01, 0.02]: 1%


def test_the_mean_uniform_loss_of_the_true_posterior_is_the_entropy():
    """The part below the cut is negligible."""
    V, L, n = 3, 2, 30_000
    p0, process = random_law(V, L), Uniform(V)
    torch.manual_seed(1)
    x0 = sequences(V, L)[torch.multinomial(p0, n, replacement=True)]
    with torch.no_grad():
        losses = process.losses(Posterior(p0, V, L), x0, x0 < 0)
    entropy = -(p0 * p0.log()).sum().item()
    assert abs(losses.mean().item() - entropy) < 4 * losses.std().item() / n ** 0.5


def test_given_slots_are_neither_noised_nor_scored_on_the_uniform_chain():
    V, seen = 3, []
    inner = model_for(Uniform, V, 4)
    x0 = torch.randint(V, (500, 4), generator=torch.Generator().manual_seed(0))
    given = torch.tensor([True, False, False, True]).expand_as(x0)

    def losses(shift):
        def model(x, t):
            seen.append(x)
            return inner(x, t) + shift * given[0, :, None] * torch.arange(V)
        with torch.no_grad():
            torch.manual_seed(1)
            return Uniform(V).losses(model, x0, given)
    assert torch.equal(losses(0), losses(3))
    assert (seen[0][given] == x0[given]).all() and (seen[0] != x0).any()


@torch.no_grad()
def bound_of(process, model, x0, draws=1000):
    """The loss of each sequence averaged over draws -> mean [B], standard error [B], nats."""
    losses = torch.stack([process.losses(model, x0, x0 < 0) for _ in range(draws)])
    return losses.mean(dim=0), losses.std(dim=0) / draws ** 0.5


@pytest.mark.parametrize("chain, steps", [(Absorbing, None), (Uniform, 64)])
def test_the_loss_bounds_minus_log_of_the_exact_law(chain, steps):
    V, L = 3, 2
    model, process = model_for(chain, V, L, scale=0.7), chain(V)
    torch.manual_seed(8)
    bound, error = bound_of(process, model, sequences(V, L))
    gap = bound + process.exact_law(model, L, steps).detach().log()
    assert (gap > -4 * error).all() and gap.mean() > 0.005 and (error < 0.2 * bound).all()


@pytest.mark.parametrize("chain", CHAINS)
def test_training_brings_the_bound_to_the_entropy(chain):
    V, L = 3, 2
    p0, process = random_law(V, L), chain(V)
    torch.manual_seed(7)
    model = model_for(chain, V, L, n_layer=1, scale=0.2).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for i in range(200):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - i / 200)
        x0 = sequences(V, L)[torch.multinomial(p0, 256, replacement=True)]
        optimizer.zero_grad()
        process.loss(model, x0).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    bound, error = bound_of(process, model.eval(), sequences(V, L))
    bound, error = (p0 * bound).sum(), (p0 * error).square().sum().sqrt()
    entropy = -(p0 * p0.log()).sum()
    assert entropy - 4 * error < bound < 1.05 * entropy + 4 * error

# -----------------------------------------------------------------------------
# the corrector


def move_matrix(process, model, states, t):
    """One move of `correct`, by enumeration -> [S, S]."""
    S, L = states.shape
    W = states.max().item() + 1
    time = torch.full((S,), t)
    matrix = torch.zeros(S, S)
    for i in range(L):
        law = process.jump_probs(model, states, time, torch.full((S, 1), i)).detach()
        for v in range(W):
            y = states.clone()
            y[:, i] = v
            matrix[torch.arange(S), rank(y, W)] += law[:, v] / L
    return matrix + torch.diag(1 - matrix.sum(dim=1))


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("t", [0.3, 0.5, 0.7])
def test_the_corrector_keeps_the_law_of_its_level_and_brings_others_closer(chain, t):
    model, process, states, p_t = at_level(chain, t)
    matrix = move_matrix(process, model, states, t)
    assert (matrix > -1e-6).all() and torch.allclose(p_t @ matrix, p_t, atol=1e-5)
    eigenvalues = torch.linalg.eigvals(matrix.double()).abs().sort(descending=True).values
    assert eigenvalues[1] < 0.99                        # it forgets where it started: not periodic
    p, distance = torch.zeros_like(p_t), []
    p[0] = 1
    for _ in range(20):
        distance.append(kl(p, p_t))
        p = (p @ matrix).clamp(min=0)
    assert all(b < a for a, b in zip(distance, distance[1:])) and distance[-1] < 0.5 * distance[0]


@pytest.mark.parametrize("chain", CHAINS)
def test_the_corrector_draws_from_its_matrix_and_keeps_what_is_given(chain):
    model, process, states, _ = at_level(chain, 0.4)
    matrix = torch.linalg.matrix_power(move_matrix(process, model, states, 0.4), 3)
    torch.manual_seed(9)
    x = process.correct(model, states[1].expand(10_000, 3), 0.4, 3)
    assert chi_square(x, matrix[1], states.max().item() + 1) > P_MIN
    given = torch.tensor([True, False, False]).expand(500, 3)
    y = process.correct(model, states[1].expand(500, 3), 0.4, 9, given)
    assert (y[:, 0] == states[1, 0]).all() and (y[:, 1:] != states[1, 1:]).any()


@pytest.mark.parametrize("chain, steps", [(Absorbing, None), (Absorbing, 64), (Uniform, 128)])
def test_sampling_with_a_corrector_has_the_law_of_a_consistent_model(chain, steps):
    p0 = random_law(2, 3, spread=1.5)
    model = posterior_table(p0, 2, 3) if chain is Absorbing else Posterior(p0, 2, 3)
    process = chain(2)
    torch.manual_seed(12)
    path = process.correct_path(model, process.sample(model, 3000, 3, steps), 0.4, 5, steps)
    assert chi_square(path.tokens, p0, 2) > P_MIN and (path.tokens < 2).all()
    assert torch.allclose(process.replay(model, path), path.logp, atol=1e-4)
    assert path.time.masked_fill(path.time.isinf(), 0).max() <= 0.41
    prompted = process.sample(model, 50, 3, steps, torch.tensor([1, 2, 2]))
    again = process.correct_path(model, prompted, 0.4, 5, steps)
    assert (again.tokens[:, 0] == 1).all() and (again.tokens[:, 1:] != prompted.tokens[:, 1:]).any()
    assert process.correct_path(model, prompted, 0.001, 1, steps).tokens.shape == (50, 3)


def test_the_law_after_the_corrector_is_that_of_its_samples():
    """And it is the law before it, where the model is consistent."""
    process, model, law = Absorbing(3), Table(3, 2), random_law(3, 2)
    torch.manual_seed(0)
    path = MaskPath(sequences(3, 2)[law.multinomial(20_000, True)], torch.rand(20_000, 2), None, 3)
    for moves, expected in zip((1, 6), corrected_law(process, model, law, 0.7, (1, 6))):
        assert expected.sum().item() == pytest.approx(1, abs=1e-6)
        assert chi_square(process.correct_path(model, path, 0.7, moves).tokens, expected, 3) > 1e-3
    for after in corrected_law(process, posterior_table(law, 3, 2), law, 0.7, (0, 1, 6)):
        assert torch.allclose(after, law.double(), atol=1e-6)


def test_the_corrector_starts_at_the_nearest_step_of_the_grid():
    """0.29 of ten steps is the third, not the second."""
    process, model = Uniform(2), network(2, 3, time_conditioning=True)
    path = process.correct_path(model, process.sample(model, 4, 3, 10), 0.29, 1, 10)
    assert path.time.tolist() == pytest.approx([0.3, 0.2, 0.1, 0.0])
