"""Both chains against enumeration. Seeds are fixed; a distribution is rejected at p < 1e-3.

Read first test_the_exact_law_is_the_sum_over_every_path: it ties the log-probabilities of paths to
exact_law, on which everything in test_sepo.py stands."""
import contextlib
import itertools
import math
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion
import sepo
from diffusion import (Absorbing, Path, Uniform, device_of, gumbel_argmax, pick, should_capture,
                       stratified)
from exact import (Posterior, Table, chi_square, corrected_law, every_path, gradient, has_bfloat16,
                   kl, law_given, network, plain_loop, posterior_table, probability, random_law,
                   rank, sequences)
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
    model, process = model_for(chain, 3, 4), chain(3, steps)
    torch.manual_seed(1)
    law = law_given(process, model, 4, prompt)
    tokens, _ = process.sample(model, 10_000, 4, prompt)
    assert law.sum().item() == pytest.approx(1, abs=1e-5)
    assert chi_square(tokens, law, 3) > P_MIN
    if prompt is not None:
        assert (tokens == prompt)[:, prompt < 3].all()


@pytest.mark.parametrize("chain, steps, prompt", [
    (Absorbing, None, None), (Absorbing, 3, None), (Absorbing, None, torch.tensor([2, 1, 2])),
    (Uniform, 2, None), (Uniform, 2, torch.tensor([2, 1, 2]))])
def test_the_exact_law_is_the_sum_over_every_path(chain, steps, prompt):
    V, L = 2, 3
    model, process = model_for(chain, V, L), chain(V, steps)
    tokens, path, rest = every_path(process, model, L, prompt)
    law = torch.zeros(V ** L).index_add(0, rank(tokens, V), probability(path, rest))
    assert torch.allclose(law.double(), law_given(process, model, L, prompt), atol=1e-6)


def test_a_grid_changes_the_law_and_chi_square_sees_it():
    model = network(3, 4)
    torch.manual_seed(2)
    tokens, _ = Absorbing(3, steps=1).sample(model, 10_000, 4)
    assert chi_square(tokens, Absorbing(3).exact_law(model, 4), 3) < 1e-6


def test_time_conditioned_masks_follow_the_exact_law_on_a_grid():
    model, process = network(3, 3, time_conditioning=True), Absorbing(3, steps=4)
    torch.manual_seed(4)
    tokens, _ = process.sample(model, 10_000, 3)
    assert chi_square(tokens, process.exact_law(model, 3), 3) > P_MIN


def test_the_exact_law_without_a_grid_gives_the_model_the_mean_time_of_each_state():
    """A reveal of one of m masks among L positions is at time m / (L + 1) on average."""
    seen = {}

    def model(x, t):
        seen.update(zip((x == 2).sum(dim=1).tolist(), t.tolist()))
        return torch.zeros(*x.shape, 2)
    Absorbing(2).exact_law(model, 3)
    assert seen == pytest.approx({m: m / 4 for m in (1, 2, 3)})
    with pytest.raises(ValueError, match="needs a time"):
        network(3, 3, time_conditioning=True)(torch.zeros(1, 3, dtype=torch.long))


def test_the_exact_law_reaches_below_the_smallest_float32():
    """Letter 1 has probability e^-300 in each of two positions; on a grid e^-150."""
    def model(x, t):
        return torch.stack((torch.zeros(x.shape), torch.full(x.shape, -150.0)), dim=-1)
    law = Absorbing(2).exact_law(model, 2)
    assert law.dtype == torch.double and law[3].log().item() == pytest.approx(-300)
    assert Absorbing(2, steps=4).exact_law(model, 2)[1].log().item() == pytest.approx(-150)


def test_the_plain_loop_follows_the_exact_law():
    model, process = network(3, 3), Absorbing(3, steps=3)
    torch.manual_seed(5)
    tokens = plain_loop(process, model, torch.full((10_000, 3), 3))
    assert chi_square(tokens, process.exact_law(model, 3), 3) > P_MIN


def test_a_consistent_model_has_its_own_law():
    p0 = random_law(3, 3)
    model = posterior_table(p0, 3, 3)
    assert torch.allclose(Absorbing(3).exact_law(model, 3), p0.double(), atol=1e-6)
    torch.manual_seed(0)
    positions = torch.rand(3, 3).softmax(1)
    product = torch.einsum("a,b,c->abc", *positions).flatten()  # independent: no grid error
    law = Absorbing(3, steps=2).exact_law(posterior_table(product, 3, 3), 3)
    assert torch.allclose(law, product.double(), atol=1e-6)


def test_the_uniform_posterior_gives_back_the_data_as_the_grid_gets_finer():
    p0 = random_law(3, 3)
    model = Posterior(p0, 3, 3)
    gap = [kl(p0, Uniform(3, N).exact_law(model, 3).detach()) for N in (4, 16, 64)]
    assert gap[0] > 4 * gap[1] > 16 * gap[2] and gap[2] < 1e-3


def test_the_uniform_law_is_the_product_of_transition_matrices():
    """From Bayes: p(y|x) = prod_i sum_a p(a|x) q_s(y_i|a) q_{t|s}(x_i|y_i) / q_t(x_i|a)."""
    V, L, N = 2, 2, 3
    model, process, x = model_for(Uniform, V, L), Uniform(V, N), sequences(V, L)
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
        assert torch.allclose(process.exact_law(model, L), law.double(), atol=1e-6)


# -----------------------------------------------------------------------------
# the sampler and its path


@pytest.mark.parametrize("time_conditioning, conv", [(False, 0), (True, 5)])
@pytest.mark.parametrize("steps", [16, 200])
def test_the_sampler_and_the_plain_loop_draw_the_same_tokens(steps, time_conditioning, conv):
    """Same reveal times, same Gumbel noise (one draw per position, so large in the logits that the
    sampler's own noise does not count), prompts of 0 to 64 tokens: the same tokens."""
    V, L, B = 7, 64, 8
    inner = network(V, L, scale=0.7, time_conditioning=time_conditioning, conv=conv)
    process = Absorbing(V, steps)
    torch.manual_seed(6)
    noise = -torch.empty(L, V).exponential_().log()
    given = torch.arange(L) < torch.tensor([0, 0, 5, 17, 30, 50, 63, 64])[:, None]
    x = torch.where(given, torch.randint(V, (B, L)), V)
    time = process.reveal_times(~given)

    def model(x, t):
        return 1e6 * (inner(x, t) + noise)
    tokens, path = process.reverse(model, x, *process.transitions(x, time))
    assert (tokens == plain_loop(process, model, x, time)).all()
    distinct = [len(set(row[row.isfinite()].tolist())) for row in time]
    assert path.row.bincount(minlength=B).tolist() == distinct


def test_passes_are_those_of_the_rows_that_are_not_done():
    process, calls = Absorbing(5, steps=64), []

    def model(x, t):
        calls.append(len(x))
        return torch.zeros(*x.shape, 5)
    torch.manual_seed(7)
    _, path = process.sample(model, 16, 32)
    assert len(calls) == path.row.bincount().max() <= 32
    assert sum(calls) == len(path)


class Waits(TorchDispatchMode):
    """Counts the operations after which a processor must wait for its device."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name
        self.count += name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("steps, prompt", [(None, None), (None, PROMPT), (3, None)])
def test_nothing_waits_for_the_device_in_the_sampling_loop_or_an_update(steps, prompt):
    """What must be known of a path is fetched when it is planned. (The uniform chain uses one_hot,
    which looks at its values on a CPU alone.)"""
    model, process = network(3, 4), Absorbing(3, steps)
    prompt = torch.full((5, 4), 3) if prompt is None else prompt.expand(5, 4)
    given = prompt != 3
    with Waits() as waits:
        plan = process.plan(prompt, given, 1.0)
    assert waits.count == 2                             # and its list of sizes is a third
    with Waits() as waits:
        _, path = process.reverse(model, prompt, *plan)
        loss, _ = sepo.sepo_loss(process.logp(model, path), path, torch.randn(5))
        loss.backward()
        path.subset(2)
    assert waits.count == 0


@pytest.mark.parametrize("chain, prompt", [(Absorbing, None), (Absorbing, PROMPT), (Uniform, None)])
def test_a_captured_pass_draws_what_the_loop_draws(chain, prompt, monkeypatch):
    """The graph here replays nothing by itself: it calls the pass anew. gpu.py has a real one."""
    for owner, name in ((torch.random, "fork_rng"), (torch.cuda, "graph"), (torch.cuda, "Stream")):
        monkeypatch.setattr(owner, name, lambda *args, **more: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    model, process = model_for(chain, 3, 4), chain(3)
    x = torch.full((5, 4), 3) if prompt is None else prompt.expand(5, 4)
    if chain is Uniform:
        x = process.noise(x)

    def draw(how, seed):
        torch.manual_seed(seed)
        plan = process.plan(x, x != 3 if prompt is not None else x < 0, 1.0)
        tokens, path = how(*plan)
        return [tokens, *(v for v in vars(path).values() if isinstance(v, torch.Tensor))]

    def replayed(path, sizes):
        pass_ = process.captured(model, x, path, sizes[0]) or (
            process.captured(model, x, path, sizes[0]))         # on the second sight
        pass_.graph.replay = pass_.one_pass
        return pass_(x, path)

    with torch.no_grad():
        draw(replayed, 0)                               # captured here
        found = [draw(replayed, seed) for seed in (2, 3, 2)]
        for seed, values in zip((2, 3, 2), found):
            expected = draw(lambda path, sizes: process.reverse(model, x, path, sizes), seed)
            assert all(map(torch.equal, values, expected))


def test_a_pass_is_captured_anew_where_anything_has_changed(monkeypatch):
    """And only where its kind comes for the second time."""
    monkeypatch.setattr(diffusion, "CapturedPass", lambda *args: object())
    model, process, found = network(3, 4), Absorbing(3), []

    def captured(L=4, size=5):
        x = torch.full((5, L), 3)
        path, _ = process.plan(x, x != x, 1.0)
        return process.captured(model, x, path, size)

    def is_new(**shape):
        assert captured(**shape) is None
        found.append(captured(**shape))
        assert captured(**shape) is found[-1] and found.index(found[-1]) == len(found) - 1
        return len(process.graphs) <= 4
    assert is_new() and is_new(L=3) and is_new(size=10)         # other passes, of as many moves
    assert captured() is found[0] and captured(L=3) is found[1]
    model.head.weight.data = model.head.weight.data.clone()     # its memory may hold anything now
    assert is_new()
    model.train()
    assert is_new()
    model.autocast = torch.bfloat16
    assert is_new()
    model = deepcopy(model)
    assert is_new()


def test_samples_and_their_paths_have_no_gradient():
    tokens, path = Absorbing(3).sample(network(3, 4), 2, 4)
    assert not path.logp.requires_grad


def test_a_sequence_that_is_given_entirely_is_noise_free_and_finite():
    """It has no time of its own: infinity would be no number to a network that reads it."""
    x = torch.tensor([[0, 1, 2]] * 2)
    seen, t, masked, weight = Absorbing(3).mask_some(x, torch.tensor([[True] * 3, [False] * 3]))
    assert torch.equal(seen[0], x[0]) and t[0] == 1 and 0 < t[1] < 1
    assert weight[0] == 0 and not masked[0].any() and masked[1].any()


def test_a_position_is_never_revealed_at_the_end_of_time(monkeypatch):
    monkeypatch.setattr(torch, "rand", torch.zeros)
    assert (Absorbing(2, steps=4).reveal_times(torch.ones(1, 3) > 0) == 0.25).all()


def test_a_pass_is_captured_where_launches_cost(monkeypatch):
    small, large, cpu = (SimpleNamespace(is_cuda=is_cuda, numel=lambda n=n: n)
                         for is_cuda, n in ((True, 2 ** 16), (True, 2 ** 16 + 1), (False, 4)))
    model = network(3, 4)
    assert should_capture(model, small, [5, 5, 5])
    for model, x, sizes in ((model, small, [5, 5, 4]), (model, large, [5, 5]), (model, cpu, [5, 5]),
                            (lambda x, t: x, small, [5, 5]), (model, small, [])):
        assert not should_capture(model, x, sizes)
    with torch.inference_mode():
        assert not should_capture(network(3, 4), small, [5, 5])
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    assert not should_capture(network(3, 4), small, [5, 5])


def test_reveal_times_are_uniform_up_to_their_start_and_never_tie():
    """20 million pairs of float32 numbers would tie some hundred times. On a grid of ten steps from
    0.3 on, the three steps are equally likely."""
    torch.manual_seed(3)
    time = Absorbing(2).reveal_times(torch.ones(200, 450, dtype=torch.bool), start=0.8)
    assert time.dtype == torch.double
    assert (time.sort(dim=1).values.diff(dim=1) > 0).all() and time.max() <= 0.8
    assert abs(time.mean().item() - 0.4) < 4 * 0.8 / 12 ** 0.5 / 90_000 ** 0.5
    n, free = 10_000, torch.tensor([True, False])
    time = Absorbing(2, steps=10).reveal_times(free.expand(n, 2), start=0.3)
    counts = (time[:, 0] * 10).round().long().bincount()
    assert time[:, 1].isinf().all() and len(counts) == 4 and counts[0] == 0
    assert ((counts[1:] - n / 3).abs() < 4 * (n * 2 / 9) ** 0.5).all()


def leads_to(path, tokens):
    """Every transition leads to the state of the next one of its sequence, the last to the tokens.
    """
    path = path[path.row.argsort(stable=True)]
    before = path.x.gather(1, path.positions)
    after = path.x.scatter(1, path.positions, path.y.where(path.scored, before))
    is_last = path.row != F.pad(path.row[1:], (0, 1), value=-1)
    assert torch.equal(after, torch.where(is_last[:, None], tokens[path.row], path.x.roll(-1, 0)))
    assert (path.t.roll(-1) < path.t)[~is_last].all()


@pytest.mark.parametrize("chain, steps", [(Absorbing, None), (Absorbing, 4), (Uniform, 5)])
def test_a_path_holds_what_the_model_saw_and_what_was_drawn(chain, steps):
    V, L, B = 5, 9, 16
    model, process = network(V, L, time_conditioning=True), chain(V, steps)
    prompt = torch.full((B, L), V)
    prompt[3:, 2], prompt[7, :] = 1, 0                          # row 7 has nothing to draw
    seen = []

    def spy(x, t):
        seen.append(torch.cat((x, t[:, None]), dim=1))
        return model(x, t)
    torch.manual_seed(8)
    tokens, path = process.sample(spy, B, L, prompt)
    saw = torch.cat((path.x, path.t[:, None]), dim=1)
    assert sorted(saw.tolist()) == sorted(torch.cat(seen).tolist())
    assert (path.logp[path.scored] < 0).all() and (path.logp[~path.scored] == 0).all()
    leads_to(path, tokens)
    assert torch.allclose(path.s, path.t - (1 / steps if steps else 0))
    given = prompt < V
    assert torch.equal(tokens[given], prompt[given]) and not (path.scored & given[path.row].gather(
        1, path.positions)).any()
    if chain is Absorbing:                                      # it starts from the masks
        first = (path.x == V).sum(dim=1) == (prompt == V).sum(dim=1)[path.row]
        assert sorted(path.row[first].tolist()) == [b for b in range(B) if b != 7]
        assert torch.equal(path.x[first], prompt[path.row[first]])
    else:
        assert path.row.bincount().tolist() == [steps] * B
    for process.chunk in (2048, 10):
        assert torch.allclose(process.logp(model, path), path.logp, atol=1e-4)


def test_the_transitions_of_a_path_by_hand():
    """Two positions at once, given positions, and a row with nothing to draw."""
    inf, M = math.inf, 5
    tokens = torch.tensor([[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1]])
    time = torch.tensor([[0.5, 1.0, 0.5, 0.25], [inf, 0.1, 0.2, inf], [inf] * 4])
    path, sizes = Absorbing(5, steps=20).transitions(tokens, time)
    assert path.batch == 3 and sizes == [2, 2, 1]
    assert torch.allclose(path.weight, torch.tensor(1 / 3)) and len(path) == 5

    def transition(i):
        drawn = torch.stack((path.positions[i], path.y[i]), dim=1)[path.scored[i]]
        t, s = round(path.t[i].item(), 4), round(path.s[i].item(), 4)
        return path.row[i].item(), path.x[i].tolist(), t, s, sorted(drawn.tolist())
    assert [transition(i) for i in range(5)] == [               # first ones, second ones, third
        (0, [M, M, M, M], 1.0, 0.95, [[1, 1]]), (1, [4, M, M, 2], 0.2, 0.15, [[2, 1]]),
        (0, [M, 1, M, M], 0.5, 0.45, [[0, 0], [2, 2]]), (1, [4, M, 1, 2], 0.1, 0.05, [[1, 0]]),
        (0, [0, 1, 2, M], 0.25, 0.2, [[3, 3]])]


def test_subset_draws_every_transition_equally_often():
    """300 sequences of 3 transitions: one uniform per sequence and cell: the counts are exact."""
    time = torch.tensor([0.2, 0.9, 0.5]).double().expand(300, 3)
    path, _ = Absorbing(2).transitions(torch.zeros(300, 3, dtype=torch.long), time)
    for transitions in (1, 3):
        part = path.subset(transitions)
        assert part.positions.flatten().bincount().tolist() == [100 * transitions] * 3
        assert torch.allclose(part.weight, torch.tensor(3 / transitions / 300))
    each = part.positions[part.row.argsort(stable=True)].view(300, 3).sort(dim=1).values
    assert (each == torch.arange(3)).all()                      # each transition once
    assert path.subset(0) is path


@pytest.mark.parametrize("transitions", [1, 2])
def test_subset_is_unbiased_and_knows_sequences_without_a_transition(transitions):
    """Sequences with 0, 1, 2 and 5 transitions, 500 of each, which draw one token per transition;
    transition j of 5 has the value 1 + j^2."""
    n, B, L = 500, 2000, 5
    count = torch.tensor([0, 1, 2, 5]).repeat(n)
    time = torch.arange(L, 0, -1).double() / 10
    time = time.where(torch.arange(L) < count[:, None], math.inf)
    path, _ = Absorbing(2).transitions(torch.zeros(B, L, dtype=torch.long), time)
    torch.manual_seed(0)
    part = path.subset(transitions)
    assert part.row.bincount().tolist() == [transitions] * B
    assert torch.allclose(part.weight, count[part.row] / (transitions * B))
    assert (part.scored.any(dim=1) == (count > 0)[part.row]).all()
    for c in (1, 2, 5):                                         # the position is the transition
        drawn = part.positions[(count == c)[part.row], 0].bincount(minlength=c)
        total = transitions * n
        assert ((drawn - total / c).abs() <= 4 * (total / c * (1 - 1 / c)) ** 0.5).all()

    def mean(path):
        value = (1 + path.positions ** 2) * path.scored
        return (path.weight[:, None] * value).sum().item()
    assert mean(path) == pytest.approx((1 + 3 + 35) / 4)
    assert mean(part) == pytest.approx(mean(path), rel=0.05)
    assert part.per_sequence(torch.ones(len(part), 1))[::4].tolist() == [0.0] * n


def test_a_part_of_a_part_is_unbiased():
    """One of four of six transitions, or of two: its weight is that of all."""
    process, model = Absorbing(3), network(3, 6)
    _, path = process.sample(model, 5, 6)
    part = path.subset(4).subset(1)
    assert len(part) == 5 and part.weight.tolist() == pytest.approx([6 / 5] * 5)


def test_a_function_is_sampled_where_its_prompt_is(monkeypatch):
    """And a module where its parameters are."""
    asked, prompt, cpu = [], torch.full((4,), 3), torch.device("cpu")
    monkeypatch.setattr(diffusion, "device_of", lambda *args: asked.append(args) or cpu)

    def model(x, t):
        return torch.zeros(*x.shape, 3)
    Absorbing(3).sample(model, 2, 4, prompt)
    assert asked == [(model, prompt.device)]
    meta = torch.device("meta")
    assert device_of(model, meta) == meta and device_of(network(2, 2), meta).type == "cpu"


def test_a_part_of_a_path_keeps_its_weights():
    path = Absorbing(2).path_to(torch.zeros(4, 3, dtype=torch.long))
    path.weight = torch.arange(12.0)
    for index in (slice(3, 5), torch.tensor([7, 0, 0]), path.row == 2):
        part = path[index]
        assert torch.equal(part.weight, path.weight[index]) and torch.equal(part.x, path.x[index])
        assert part.batch == 4 and part.logp is None and len(part) == len(path.row[index])


def test_per_sequence_by_hand():
    n, k = 4, 2
    zeros = torch.zeros(n, k, dtype=torch.long)
    scored = torch.tensor([[True, True], [True, False], [False, False], [True, True]])
    path = Path(torch.tensor([0, 2, 0, 2]), zeros, zeros[:, 0], zeros[:, 0], zeros, zeros, scored,
                None, torch.ones(n), batch=4)
    values = torch.tensor([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0], [64.0, 128.0]])
    assert path.per_sequence(values).tolist() == [3, 0, 196, 0]
    assert path.per_sequence(values[:, 0]).tolist() == [17, 0, 68, 0]


@pytest.mark.parametrize("chain", CHAINS)
def test_log_probabilities_do_not_depend_on_the_chunk(chain):
    """Neither values nor gradients; a chunk is the largest number of states in a pass."""
    V, L = 3, 5
    model, process, states = model_for(chain, V, L), chain(V, steps=6), []
    torch.manual_seed(10)
    _, path = process.sample(model, 8, L)
    c = torch.randn(path.y.shape)

    def spy(x, t):
        states.append(len(x))
        return model(x, t)
    by_hand = 0.0
    for i in range(len(path)):                                  # one state after the other
        log_p = process.log_probs(model, path[i:i + 1])[0]
        by_hand = by_hand + (c[i] * pick(log_p, path.y[i]) * path.scored[i]).sum()
    results = [path.logp, gradient(by_hand, model)]
    for process.chunk in (len(path), len(path) - 1, 7):
        states.clear()
        logp = process.logp(spy, path)
        assert sum(states) == len(path) and max(states) <= process.chunk
        for result, known in zip((logp, gradient((c * logp).sum(), model)), results):
            assert torch.allclose(result, known, rtol=1e-6, atol=1e-6 * known.abs().max().item())


@pytest.mark.parametrize("chain", CHAINS)
def test_every_path_is_on_the_grid_of_the_process(chain):
    model, process, times = model_for(chain, 3, 4), chain(3, steps=2), []
    tokens, drawn = process.sample(model, 50, 4)
    noised = process.path_to(tokens)
    _, corrected = process.correct_path(model, tokens, tokens < 0, 0.6, 1)
    for path, expected in ((drawn, [0.5, 1]), (noised, [0.5, 1]), (corrected, [0.5])):
        assert path.t.unique().tolist() == expected and torch.equal(path.s, path.t - 0.5)

    def spy(x, t):
        times.extend(t.tolist())
        return model(x, t)
    process.exact_law(spy, 4)
    assert set(times) == {1, 0.5}
    assert Absorbing(3).steps is None and Uniform(3).steps == 16


@pytest.mark.parametrize("chain, steps", [(Absorbing, None), (Absorbing, 4), (Uniform, 4)])
def test_the_forward_process_read_backwards_ends_in_its_tokens(chain, steps):
    """Its states have the distribution of `corrupt` at their times, and logp scores them."""
    V, n, process = 3, 8000, chain(3, steps)
    tokens, given = torch.tensor([0, 2, 1]).repeat(n, 1), torch.zeros(n, 3, dtype=torch.bool)
    given[:, 1] = True
    torch.manual_seed(4)
    path = process.path_to(tokens, given)
    leads_to(path, tokens)
    assert path.logp is None and path.batch == n and (path.x[:, 1] == 2).all()
    assert not (path.scored & (path.positions == 1)).any()
    if chain is Uniform:
        for t in path.t.unique():
            kept = (path.x[path.t == t][:, 0] == 0).double().mean().item()
            chance = 1 - t.item() + t.item() / V
            assert abs(kept - chance) <= 4 * (chance * (1 - chance) / n) ** 0.5 + 1e-9
    elif steps:
        early = (path.t[:, None] > 0.5).expand_as(path.scored)[path.scored]     # masks at t = 1/2
        assert len(early) == 2 * n and abs(early.double().mean() - 0.5) < 4 * 0.5 / (2 * n) ** 0.5
    else:
        assert (path.x[:n, [0, 2]] == 3).all()
        left = path.x[n:, [0, 2]] == 3                          # one of two positions is left
        assert (left.sum(dim=1) == 1).all() and len(left) == n
        assert abs(left[:, 0].double().mean().item() - 0.5) < 4 * 0.5 / n ** 0.5
    logp = process.logp(network(V, 3, time_conditioning=True), path)
    assert logp.isfinite().all() and (logp < 0).any()
    scored = process.path_to(tokens).scored.sum()               # nothing is given
    assert scored == 3 * n * (steps if chain is Uniform else 1)


def test_a_path_with_nothing_to_draw():
    model, process = network(3, 4), Absorbing(3)
    prompt = torch.tensor([0, 1, 2, 0])
    tokens, path = process.sample(model, 5, 4, prompt)
    assert (tokens == prompt).all() and len(path) == 0
    for part in (path, path.subset(0), path.subset(1)):
        logp = process.logp(model, part)
        assert logp.shape == part.y.shape and part.per_sequence(logp).tolist() == [0] * 5
        assert sepo.sepo_loss(logp, part, torch.ones(5)) == (0, 0)
        assert sepo.loop_loss(logp, part, torch.ones(5)) == (0, 0)


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
    assert Absorbing(3).sample(Foreign(), 4, 5)[0].max() < 3


def test_forbidden_tokens_and_padding_give_no_nan():
    """Logits of -inf: a token that is never drawn, and a position of which nothing is known."""
    process = Absorbing(3, steps=2)

    def model(x, t):
        logits = torch.zeros(*x.shape, 3, requires_grad=True) + 0
        logits[..., 2] = -math.inf
        logits[x == 0] = -math.inf                              # if revealed, as some models do
        return logits
    tokens, path = process.sample(model, 50, 4)
    assert (tokens < 2).all() and (~path.scored).any()
    logp = process.logp(model, path)
    assert logp.isfinite().all() and sepo.sepo_loss(logp, path, torch.ones(50))[0].isfinite()


@pytest.mark.skipif(not has_bfloat16(), reason="torch has no bfloat16 here")
def test_bfloat16_keeps_the_log_probabilities():
    model, process = network(27, 32, n_layer=2, n_embd=128), Absorbing(27)
    torch.manual_seed(16)
    _, path = process.sample(model, 8, 32)
    rough = Denoiser(model.config, torch.bfloat16).eval()
    rough.load_state_dict(model.state_dict())
    half = process.logp(rough, path)
    assert half.dtype == torch.float32 and 0 < (half - path.logp).abs().max() < 0.2


def test_stratified_puts_one_uniform_in_each_cell():
    torch.manual_seed(0)
    u = stratified(50)
    assert (u.mul(50).long().sort().values == torch.arange(50)).all() and u.max() < 1


def test_unlikely_letters_are_drawn_among_very_many(monkeypatch):
    """On a GPU the smallest exponential is eps/2 of its dtype: 2^-24 in float32, which ends the
    Gumbel noise at 16.6. Here one of 262,144 letters has 2^-40, so 27.7, and beats a logit of 20.
    """
    def as_on_a_gpu(x):
        x.fill_(1)[..., 7] = 2 ** -40
        return x.clamp_(min=torch.finfo(x.dtype).eps / 2)
    monkeypatch.setattr(torch.Tensor, "exponential_", as_on_a_gpu)
    logits = torch.zeros(2, 262_144)
    logits[:, 0] = torch.tensor([20, 30])
    assert gumbel_argmax(logits).tolist() == [7, 0]

# -----------------------------------------------------------------------------
# what cannot be


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 4, 4), (2, 4), (2, 3), (2, 3, 4, 1), (4,)])
def test_a_model_of_the_wrong_shape_gets_one_clear_line(chain, shape):
    """For two sequences of three positions and four letters it must return [2, 3, 4]."""
    with pytest.raises(ValueError, match=r"it must return \[B, L, 4\], without a logit") as error:
        chain(4).sample(lambda x, t: torch.zeros(shape), 2, 3)
    assert "\n" not in str(error.value) and str(shape) in str(error.value)
    with pytest.raises(ValueError, match="without a logit"):
        chain(4).sample(model_for(chain, 5, 3), 2, 3)           # a Denoiser for one letter more


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("prompt", [torch.tensor([0, 4, 3]), torch.tensor([0, -1, 3]), "abc",
                                    [0, 1, 3], torch.tensor([0, 3]), torch.zeros(3),
                                    torch.zeros(3, dtype=torch.bool),
                                    torch.tensor([[0, 4, 3], [0, 1, 2]])])
def test_a_prompt_that_cannot_be_is_refused(chain, prompt):
    with pytest.raises(ValueError, match="tokens from 0 to 3, where 3 is a free position") as error:
        chain(3).sample(model_for(chain, 3, 3), 2, 3, prompt)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("chain, V, L", [(Absorbing, 3, 9), (Uniform, 2, 11), (Uniform, 9, 5)])
def test_a_space_that_is_too_large_is_not_enumerated(chain, V, L):
    assert not chain(V).is_small(L) and chain(V).is_small(2)
    with pytest.raises(ValueError, match=f"{V} letters at {L} positions are too many"):
        chain(V).exact_law(lambda x, t: 1 / 0, L)

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
        if chain is Absorbing and states[n, i] < V:             # what is revealed cannot change
            assert log_s[n, i, v] == (0 if v == states[n, i] else -math.inf)
        else:
            ratio = (p_t[rank(y[None], W)] / p_t[n]).item()
            assert log_s[n, i, v].exp().item() == pytest.approx(ratio, rel=1e-3)


def score_entropy(s, r):
    """SEDD's integrand, without the rate."""
    return s - r * s.log() + r * (r.log() - 1)


def test_the_absorbing_loss_is_score_entropy_and_weighted_cross_entropy():
    """At every mask, sum_v rate * integrand(s_v, r_v), r_v = [v = x0] alpha / (1 - alpha):
    the terms without x0 sum to a constant, so it is -log p(x0) times alpha / (1 - alpha)."""
    V, L = 5, 6
    model, process = network(V, L), Absorbing(V)
    torch.manual_seed(11)
    x0 = torch.randint(V, (64, L))
    t = 0.05 + 0.9 * torch.rand(64)
    x = process.corrupt(x0, t)
    odds = ((1 - t) / t)[:, None].double()
    s = process.log_score(model, x, t).exp().double()                               # [B, L, V]
    own = pick(s, x0)
    entropy = s.sum(dim=-1) - own + score_entropy(own, odds)
    cross_entropy = -odds * pick(model(x, t).log_softmax(-1), x0).double()
    masked = x == V
    assert torch.allclose(entropy[masked], cross_entropy[masked], atol=1e-4)


@pytest.mark.parametrize("steps", [None, 2])
def test_the_mean_absorbing_loss_is_the_bound_written_out(steps):
    """For every x0, over all masked subsets: the mean over m of n/m times the mean over subsets of
    size m. Given positions are neither masked nor scored; the grid is that of sampling alone."""
    V, L, n = 2, 3, 10_000
    model, process = network(V, L), Absorbing(V, steps)
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


def test_given_positions_are_neither_noised_nor_scored_on_the_uniform_chain():
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
    model, process = model_for(chain, V, L, scale=0.7), chain(V, steps)
    torch.manual_seed(8)
    bound, error = bound_of(process, model, sequences(V, L))
    gap = bound + process.exact_law(model, L).detach().log()
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
    moved, jump_probs = [], process.jump_probs
    process.jump_probs = lambda *a: moved.append(a[-1]) or jump_probs(*a)
    y = process.correct(model, states[1].expand(500, 3), 0.4, 9, given)
    assert (y[:, 0] == states[1, 0]).all() and (y[:, 1:] != states[1, 1:]).any()
    assert torch.cat(moved).unique().tolist() == [1, 2]         # no move is wasted
    x = states[1].expand(500, 3)
    assert torch.equal(process.correct(model, x, 0.4, 3, x >= 0), x)    # nothing is free


def test_a_move_that_rounding_makes_more_than_certain_is_made():
    process, x = Absorbing(3), torch.zeros(50, 1, dtype=torch.long)
    process.jump_probs = lambda *_: torch.tensor([0, 0.5, 0.5 + 1e-6, 0]).expand(50, 4)
    assert (process.correct(None, x, 0.4, 1) > 0).all()


@pytest.mark.parametrize("chain, steps", [(Absorbing, None), (Absorbing, 64), (Uniform, 128)])
def test_sampling_with_a_corrector_has_the_law_of_a_consistent_model(chain, steps):
    p0 = random_law(2, 3, spread=1.5)
    model = posterior_table(p0, 2, 3) if chain is Absorbing else Posterior(p0, 2, 3)
    process = chain(2, steps)
    torch.manual_seed(12)
    tokens, _ = process.sample(model, 3000, 3)
    tokens, path = process.correct_path(model, tokens, tokens < 0, 0.4, 5)
    assert chi_square(tokens, p0, 2) > P_MIN and (tokens < 2).all()
    assert torch.allclose(process.logp(model, path), path.logp, atol=1e-4)
    assert 0.2 < path.t.max() <= 0.41
    tokens, _ = process.sample(model, 50, 3, torch.tensor([1, 2, 2]))
    given = torch.tensor([True, False, False]).expand(50, 3)
    again, path = process.correct_path(model, tokens, given, 0.4, 5)
    assert (again[:, 0] == 1).all() and (again[:, 1:] != tokens[:, 1:]).any()
    assert not (path.scored & (path.positions == 0)).any()
    assert process.correct_path(model, tokens, given, 0.001, 1)[0].shape == (50, 3)


def test_the_law_after_the_corrector_is_that_of_its_samples():
    """And it is the law before it, where the model is consistent."""
    process, model, law = Absorbing(3), Table(3, 2), random_law(3, 2)
    torch.manual_seed(0)
    tokens = sequences(3, 2)[law.multinomial(20_000, True)]
    for moves, expected in zip((1, 6), corrected_law(process, model, law, 0.7, (1, 6))):
        assert expected.sum().item() == pytest.approx(1, abs=1e-6)
        corrected, _ = process.correct_path(model, tokens, tokens < 0, 0.7, moves)
        assert chi_square(corrected, expected, 3) > P_MIN
    for after in corrected_law(process, posterior_table(law, 3, 2), law, 0.7, (0, 1, 6)):
        assert torch.allclose(after, law.double(), atol=1e-6)


@pytest.mark.parametrize("N", [10, 22, 23])
def test_a_plan_starts_at_its_step_of_the_grid(N):
    """Though in floating point 15 / 22 * 22 is less than 15."""
    x = torch.zeros(3, 2, dtype=torch.long)
    for k in range(1, N + 1):
        path, sizes = Uniform(2, steps=N).plan(x, x > 0, k / N)
        assert sizes == [3] * k and path.t[0].item() == pytest.approx(k / N) and path.s[-1] == 0


@pytest.mark.parametrize("chain", CHAINS)
def test_the_corrector_takes_one_step_of_the_grid_at_least(chain):
    process, model = chain(2, steps=10), network(2, 30, time_conditioning=True)
    tokens, _ = process.sample(model, 4, 30)
    _, path = process.correct_path(model, tokens, tokens < 0, 0.01, 1)
    assert path.t.unique().tolist() == pytest.approx([0.1])


def test_the_corrector_starts_at_the_nearest_step_of_the_grid():
    """0.29 of ten steps is the third, not the second."""
    process, model = Uniform(2, steps=10), network(2, 3, time_conditioning=True)
    tokens, _ = process.sample(model, 4, 3)
    _, path = process.correct_path(model, tokens, tokens < 0, 0.29, 1)
    assert path.t.unique().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert path.s.unique().tolist() == pytest.approx([0.0, 0.1, 0.2])
