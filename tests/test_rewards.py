"""Tasks: the toy's data and reward, and what becomes of a reward that misbehaves."""
import itertools

import pytest
import torch

from rewards import TASKS, TOY_STEP, BadInput, Task, ask

toy = TASKS["toy"]


def test_toy_is_small_enough_to_enumerate():
    assert toy.enumerable and (toy.vocab_size + 1) ** toy.length <= 100_000


@pytest.mark.parametrize("text, reward", [
    ("TCTCTC", 12), ("TCTCAA", 10), ("TCAAAA", 8), ("AAAAAA", 6), ("GGGGGG", 0), ("CTCTCT", 8), ("ATCGGA", 6)])
def test_toy_reward_by_hand(text, reward):
    assert toy.reward(toy.encode([text])).item() == pytest.approx(reward / 16)


def test_toy_has_many_separate_peaks():
    """No change of one letter improves them, so a greedy climber that starts near a lower one never sees the highest."""
    x = torch.tensor(list(itertools.product(range(4), repeat=6)))
    best = toy.reward(x)
    for i, v in itertools.product(range(6), range(4)):
        y = x.clone()
        y[:, i] = v
        best = torch.where((y != x).any(1) & (toy.reward(y) >= toy.reward(x) - 1e-6), torch.inf, best)
    peaks = toy.decode(x[best.isfinite()])
    assert len(peaks) == 13 and {"TCTCTC", "TCTCAA", "TCAAAA", "AAAAAA"} < set(peaks)


def test_toy_data_follows_its_chain():
    n = 20_000
    x = toy.data(n, torch.Generator().manual_seed(0))
    assert x.shape == (n, 6) and (x == toy.data(n, torch.Generator().manual_seed(0))).all()
    for a, b in itertools.product(range(4), repeat=2):
        before = x[:, :-1] == a
        share = ((x[:, 1:] == b) & before).sum() / before.sum()
        p = TOY_STEP[a, b]
        assert abs(share - p) < 4.5 * (p * (1 - p) / before.sum()).sqrt()            # 16 cells, 4.5 standard errors


def test_encode_and_decode_are_inverse_and_a_foreign_letter_is_named():
    assert toy.decode(toy.encode(["ACG_TA"])) == ["ACG_TA"]
    with pytest.raises(BadInput, match="'X' at position 3 of 'ACXGTA'"):
        toy.encode(["ACXGTA"])


def fails(tokens):
    raise RuntimeError("no oracle today")


@pytest.mark.parametrize("reward, message", [
    (fails, "raised RuntimeError: no oracle today .*'AC'"),
    (lambda x: torch.zeros(len(x), 2), r"returned shape \[3, 2\] for 3 samples: it must be \[3\]"),
    (lambda x: torch.tensor([0, float("nan"), 0]), "sample 1, 'GT', is nan"),
    (lambda x: torch.tensor([0, 0, float("inf")]), "sample 2, 'AA', is inf"),
    (lambda x: "high", "raised")])
def test_a_reward_that_misbehaves_is_named(reward, message):
    task = Task("t", "ACGT", 2, None, reward)
    with pytest.raises(BadInput, match=message):
        ask(task, task.encode(["AC", "GT", "AA"]))


def test_a_reward_may_return_a_list():
    task = Task("t", "AC", 1, None, lambda x: [float(v) for v in x[:, 0]])
    assert ask(task, torch.tensor([[0], [1]])).tolist() == [0, 1]
