"""The absorbing chain against enumeration. Seeds are fixed; a law is rejected at p < 1e-3."""
import itertools
import math

import pytest
import torch

import sepo
from diffusion import Absorbing, Uniform, event_index, stratified
from exact import (Table, chi_square, network, plain_loop, posterior_table, random_law, rank, sequences)

P_MIN = 1e-3


# ---- laws -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("steps", [None, 1, 2, 5])
def test_samples_follow_the_exact_law(steps):
    model, process = network(3, 4), Absorbing(3)
    torch.manual_seed(1)
    law = process.exact_law(model, 4, steps)
    assert law.sum().item() == pytest.approx(1, abs=1e-5)
    assert chi_square(process.sample(model, 40_000, 4, steps).tokens, law, 3) > P_MIN


def test_the_grid_changes_the_law_and_chi_square_sees_it():
    model, process = network(3, 4), Absorbing(3)
    torch.manual_seed(2)
    tokens = process.sample(model, 40_000, 4, steps=1).tokens
    assert chi_square(tokens, process.exact_law(model, 4), 3) < 1e-6


@pytest.mark.parametrize("steps", [None, 3])
def test_prompt_is_kept_and_the_rest_follows_the_conditional_law(steps):
    model, process = network(3, 4), Absorbing(3)
    prompt = torch.tensor([3, 1, 3, 0])
    torch.manual_seed(3)
    path = process.sample(model, 40_000, 4, steps, prompt)
    assert (path.tokens[:, [1, 3]] == torch.tensor([1, 0])).all()
    assert chi_square(path.tokens, process.exact_law(model, 4, steps, prompt), 3) > P_MIN


def test_time_conditioned_samples_follow_the_exact_law():
    model, process = network(3, 3, time_conditioning=True), Absorbing(3)
    torch.manual_seed(4)
    law = process.exact_law(model, 3, 4)
    assert chi_square(process.sample(model, 40_000, 3, 4).tokens, law, 3) > P_MIN
    with pytest.raises(ValueError, match="needs a time"):
        process.exact_law(model, 3)


def test_the_plain_loop_follows_the_exact_law():
    model, process = network(3, 3), Absorbing(3)
    torch.manual_seed(5)
    tokens = plain_loop(process, model, torch.full((40_000, 3), 3), steps=3)
    assert chi_square(tokens, process.exact_law(model, 3, 3), 3) > P_MIN


def test_consistent_model_has_its_own_law_whatever_the_grid():
    p0, process = random_law(3, 3), Absorbing(3)
    assert torch.allclose(process.exact_law(posterior_table(p0, 3, 3), 3), p0, atol=1e-6)
    product = torch.einsum("a,b,c->abc", *torch.rand(3, 3).softmax(1)).flatten()       # independent slots: no grid error
    assert torch.allclose(process.exact_law(posterior_table(product, 3, 3), 3, steps=2), product, atol=1e-6)


def test_exact_law_is_differentiable():
    table, process = Table(2, 2), Absorbing(2)
    direction = torch.randn(table.logits.shape, generator=torch.Generator().manual_seed(0))
    f = lambda h: (process.exact_law(Table(2, 2, (table.logits + h * direction).detach()), 2) * torch.arange(4.)).sum()
    value = (process.exact_law(table, 2) * torch.arange(4.)).sum()
    slope = (torch.autograd.grad(value, table.logits)[0] * direction).sum()
    assert slope.item() == pytest.approx(((f(1e-2) - f(-1e-2)) / 2e-2).item(), abs=1e-3)


# ---- the event loop -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("time_conditioning", [False, True])
@pytest.mark.parametrize("steps", [16, 200])
def test_event_loop_and_plain_loop_draw_the_same_tokens(steps, time_conditioning, static):
    """Same reveal times, same Gumbel noise, ragged prompts (0 to 64 slots given), L = 64: the same tokens, with passes that
    shrink and with the padded passes that a CUDA graph replays."""
    V, L, B = 7, 64, 8
    model = network(V, L, scale=0.7, time_conditioning=time_conditioning, conv=5 if static else 0)
    process = Absorbing(V, cuda_graph=static)
    generator = torch.Generator().manual_seed(6)
    given = torch.arange(L) < torch.tensor([0, 0, 5, 17, 30, 50, 63, 64])[:, None]
    x = torch.where(given, torch.randint(V, (B, L), generator=generator), V)
    time = process.reveal_times(given, steps, generator)
    noise = -torch.empty(B, L, V).exponential_(generator=generator).log()
    path = process.reveal(model, x, time, noise)
    assert (path.tokens == plain_loop(process, model, x, steps, time, noise)).all()
    assert path.n_events.tolist() == [len(set(row[row.isfinite()].tolist())) for row in time]


def test_passes_are_those_of_the_longest_row_only():
    process, calls = Absorbing(5), []
    model = lambda x, t: calls.append(len(x)) or torch.zeros(*x.shape, 5)
    torch.manual_seed(7)
    path = process.sample(model, 16, 32, steps=64)
    assert len(calls) == path.n_events.max() <= 32
    assert sum(calls) == path.n_events.sum()                # a row that is done costs nothing


@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("prompt", [None, torch.tensor([3, 1, 3, 0])])
def test_replayed_passes_follow_the_law_of_the_weights_as_they_are(steps, prompt):
    """On the CPU the captured pass is called, not replayed: its buffers, padding and reuse after an update are real."""
    model, process = network(3, 4), Absorbing(3, cuda_graph=True)
    torch.manual_seed(15)
    for _ in range(2):
        path = process.sample(model, 20_000, 4, steps, prompt)
        assert chi_square(path.tokens, process.exact_law(model, 4, steps, prompt), 3) > P_MIN
        assert torch.allclose(process.replay(model, path), path.logp, atol=1e-5)
        before, kept = path.tokens.clone(), path
        with torch.no_grad():
            model.output.weight.mul_(-1)
    assert (kept.tokens == before).all()
    assert len(process.graphs) == 1                         # the second rollout found the first one's pass


def test_one_row_computes_the_common_first_state():
    model, process, rows = network(3, 5), Absorbing(3), []
    hidden_at = model.hidden_at
    model.hidden_at = lambda x, *rest: rows.append(len(x)) or hidden_at(x, *rest)
    for prompt, first in ((None, 1), (torch.tensor([3, 3, 3, 3, 1]), 16)):
        rows.clear()
        path = process.sample(model, 16, 5, prompt=prompt)
        assert rows[0] == first and rows[1:] == [16] * (len(rows) - 1)
        assert torch.allclose(process.replay(model, path), path.logp, atol=1e-5)


def test_bfloat16_keeps_the_log_probabilities_and_the_ratio_at_theta_old():
    """Measured: 0.03 nats from float32 at most; rollout and update agree, though their passes have other shapes."""
    model, process = network(27, 64, n_layer=4, n_embd=128), Absorbing(27)
    torch.manual_seed(16)
    path = process.sample(model, 8, 64)
    model.autocast = torch.bfloat16
    half = process.replay(model, path)
    assert half.dtype == torch.float32 and 0 < (half - path.logp).abs().max() < 0.1
    path = process.sample(model, 8, 64)
    assert (process.replay(model, path, chunk=100) - path.logp).abs().max() < 1e-3


@pytest.mark.parametrize("steps", [None, 4])
@pytest.mark.parametrize("time_conditioning", [False, True])
def test_path_rebuilds_every_state_and_its_log_probabilities(steps, time_conditioning):
    V, L, B = 5, 9, 16
    model, process = network(V, L, time_conditioning=time_conditioning), Absorbing(V)
    prompt = torch.full((B, L), V)
    prompt[3:, 2], prompt[7, :] = 1, 0                      # row 7 has nothing to draw
    visited = []

    def spy(x, t):
        visited.append((x.clone(), t))
        return model(x, t)
    torch.manual_seed(8)
    path = process.sample(spy, B, L, steps, prompt)
    assert (path.state(int(path.n_events.max())) == path.tokens).all() and path.n_events[7] == 0
    assert ((path.logp == 0) == path.given).all()
    for j, (x, t) in enumerate(visited):
        rows = path.n_events > j
        state = path.state(j)[rows]
        assert sorted(state.tolist()) == sorted(x.tolist())  # as a set: the loop reorders rows
        time = path.time.masked_fill(path.event != j, 0).amax(dim=1)[rows]
        logp = model(state, time).log_softmax(-1).gather(-1, path.tokens[rows, :, None]).squeeze(-1)
        drawn = (path.event == j)[rows]
        assert torch.allclose(logp[drawn], path.logp[rows][drawn], atol=1e-5)
    assert torch.allclose(process.replay(model, path, chunk=10), path.logp, atol=1e-5)


def test_a_foreign_network_with_hidden_and_head_is_sampled_through_them():
    class Foreign:
        def hidden(self, x, t):
            return torch.nn.functional.one_hot(x, 4).float()

        def head(self, h):
            return h[..., :3] * 0 + torch.tensor([0., 50., 0.])
    torch.manual_seed(9)
    path = Absorbing(3).sample(Foreign(), 4, 5)
    assert (path.tokens == 1).all() and torch.allclose(path.logp, torch.zeros(4, 5))


def test_a_path_with_nothing_to_draw():
    """Every slot given: no events, no error, and a loss of zero in every way of scoring."""
    model, process = network(3, 4, time_conditioning=True), Absorbing(3)
    path = process.sample(model, 5, 4, 8, torch.tensor([0, 1, 2, 0]))
    assert (path.tokens == torch.tensor([0, 1, 2, 0])).all() and (path.n_events == 0).all()
    assert (process.replay(model, path) == 0).all()
    for loss in (sepo.sepo_loss(process, model, path, torch.ones(5)), sepo.loop_loss(process, model, path, torch.ones(5)),
                 sepo.loop_loss(process, model, path, torch.ones(5), events=1)):
        assert loss[0] == 0


def test_a_fine_grid_near_time_zero_stays_finite():
    """alpha(1/N) rounds to 1 there."""
    x, t = torch.tensor([[0, 3, 1]]), torch.full((1,), 1e-8)
    for process in (Absorbing(3, "cosine"), Uniform(3, "cosine")):
        model = network(3, 3, time_conditioning=True)
        kernel = process.kernel(model, x.clamp(max=3 if isinstance(process, Absorbing) else 2), t, torch.zeros(1))
        assert kernel.isfinite().all() and torch.allclose(kernel.sum(-1), torch.ones(1, 3), atol=1e-4)


def test_a_foreign_network_may_call_a_layer_hidden():
    class Foreign(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = torch.nn.Linear(4, 3)

        def forward(self, x, t):
            return self.hidden(torch.nn.functional.one_hot(x, 4).float())
    torch.manual_seed(17)
    assert Absorbing(3).sample(Foreign(), 4, 5).tokens.max() < 3


def test_event_index_by_hand():
    time = torch.tensor([[0.5, 1.0, 0.5, 0.25], [float("inf"), 0.1, 0.2, float("inf")], [float("inf")] * 4])
    assert event_index(time).tolist() == [[1, 0, 1, 2], [-1, 1, 0, -1], [-1] * 4]


def test_stratified_puts_one_uniform_in_each_cell():
    u = stratified(50, torch.Generator().manual_seed(0))
    assert (u.mul(50).long().sort().values == torch.arange(50)).all() and u.max() < 1


# ---- score, loss, forward process -----------------------------------------------------------------------------------------

def test_corrupt_masks_at_the_rate_of_the_schedule():
    torch.manual_seed(10)
    t = torch.tensor([0.0, 0.3, 1.0])
    x = Absorbing(4).corrupt(torch.zeros(3, 40_000, dtype=torch.long), t)
    share = (x == 4).float().mean(dim=1)
    assert share[0] == 0 and share[2] == 1
    assert abs(share[1] - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 40_000)


def test_log_score_is_the_ratio_of_the_noised_law():
    """Under the true posterior, s(x, t)_{i,v} = p_t(x with slot i set to v) / p_t(x), by enumeration."""
    V, L, t = 3, 3, 0.4
    p0, process = random_law(V, L), Absorbing(V)
    model, x, states = posterior_table(p0, V, L), sequences(V, L), sequences(V + 1, L)
    q = torch.where(states[:, None] == V, t, torch.where(states[:, None] == x, 1 - t, 0.0)).prod(-1)  # q_t(state | x)
    p_t = (q * p0).sum(-1)
    log_s = process.log_score(model, states, torch.full((len(states),), t)).detach()
    for n, i, v in itertools.product(range(len(states)), range(L), range(V)):
        if states[n, i] == V:
            neighbour = states[n].clone()
            neighbour[i] = v
            assert log_s[n, i, v].exp() == pytest.approx((p_t[rank(neighbour[None], V + 1)] / p_t[n]).item(), rel=1e-4)
        else:
            assert log_s[n, i, v] == (0 if v == states[n, i] else -math.inf)


def test_score_entropy_of_the_derived_score_is_the_weighted_cross_entropy():
    """SEDD's integrand, written out with rates and ratios, against MDLM's, at every masked pattern of random x0 and t."""
    V, L = 5, 6
    model, process = network(V, L), Absorbing(V)
    generator = torch.Generator().manual_seed(11)
    x0, t = torch.randint(V, (64, L), generator=generator), 0.05 + 0.9 * torch.rand(64, generator=generator)
    x = process.corrupt(x0, t, generator)
    masked, rate = x == V, 1 / (1 - t)[:, None]                                       # sigma'(t), for alpha = 1 - t
    s = process.log_score(model, x, t)
    r = torch.nn.functional.one_hot(x0, V) * ((1 - t) / t)[:, None, None]             # q(y | x0) / q(x | x0)
    entropy = s.exp() - r * s + torch.xlogy(r, r) - r              # SEDD's score entropy, K(r) = r (log r - 1)
    sedd = (rate * masked * entropy.sum(-1).nan_to_num()).sum(1)
    logp = model(x, t).log_softmax(-1).gather(-1, x0[..., None]).squeeze(-1)
    mdlm = -(masked * logp).sum(1) / t                                                # -alpha' / (1 - alpha) = 1 / t
    assert masked.any(1).sum() > 40 and torch.allclose(sedd, mdlm, rtol=1e-5, atol=1e-5)


def test_loss_is_the_bound_in_expectation():
    """The mean of the loss against the bound summed over every mask pattern; the bound lies above -log of the law."""
    V, L = 3, 4
    model, process = network(V, L), Absorbing(V)
    x0 = torch.tensor([[0, 2, 1, 1]])
    bound = 0.0
    for pattern in itertools.product([False, True], repeat=L):
        masked, m = torch.tensor([pattern]), sum(pattern)
        if m:                            # a level m is uniform on 1..L, a pattern uniform given m, its weight L / m
            logp = model(torch.where(masked, V, x0), torch.zeros(1)).log_softmax(-1).gather(-1, x0[..., None]).squeeze(-1)
            bound -= (logp * masked).sum().item() / m / math.comb(L, m)
    torch.manual_seed(12)
    with torch.no_grad():
        losses = torch.stack([process.loss(model, x0.expand(256, L)) for _ in range(64)])
    assert abs(losses.mean() - bound) < 4 * losses.std() / 8
    law = process.exact_law(model, L)
    assert bound > -law[rank(x0, V)].log().item()


def test_loss_of_the_true_posterior_is_the_entropy():
    """For the consistent model the bound is tight: its mean over the data is the entropy, and any other model's is larger."""
    V, L = 3, 3
    p0, process = random_law(V, L), Absorbing(V)
    torch.manual_seed(13)
    x0 = sequences(V, L)[torch.multinomial(p0, 100_000, replacement=True)]
    entropy = -(p0 * p0.log()).sum().item()
    with torch.no_grad():
        losses = torch.stack([process.loss(posterior_table(p0, V, L), batch) for batch in x0.split(1000)])
        other = process.loss(network(V, L), x0)
    assert abs(losses.mean() - entropy) < 4 * losses.std() / 10
    assert other > entropy + 0.1


def test_loss_given_some_slots_is_that_of_the_conditional_law():
    """For the consistent model: minus the log-probability of the free slots given the others, for each sequence by itself."""
    V, L = 3, 3
    p0, process = random_law(V, L), Absorbing(V)
    x0, given = torch.tensor([[2, 0, 1]]), torch.tensor([[True, False, False]])
    conditional = p0[rank(x0, V)] / p0[sequences(V, L)[:, 0] == 2].sum()
    bound, error = process.bound(posterior_table(p0, V, L), x0.expand(500, L), given=given.expand(500, L))
    assert abs(bound.mean() + conditional.log()) < 4.5 * error.mean() / 500 ** 0.5


def test_noised_view_keeps_the_prompt_and_scores_masked_slots_only():
    process = Absorbing(4)
    torch.manual_seed(14)
    x0, given = torch.randint(4, (200, 6)), torch.rand(200, 6) < 0.4
    given[0] = True
    view = process.noised_view(x0, given)
    masked = view.x == 4
    assert not (masked & given).any() and ((view.weight > 0) == masked).all()
    assert (masked.any(1) == ~given.all(1)).all()
    assert torch.allclose(view.weight.sum(1), (~given).sum(1).float())
