"""Tasks: data and rewards against what they state, held-out parts, files, faulty rewards.

Read first test_a_faulty_reward_is_told_which_sample, for what a black box may return."""
import gzip
import itertools
import math
import os
import random
from dataclasses import replace

import pytest
import torch

import rewards
from diffusion import Absorbing, Uniform
from rewards import TASKS, TOY_STEP, BadInput, Task, ask, open_task, true_activity

toy, dna = TASKS["toy"](), TASKS["dna"]()


def within(count, n, p, sigmas=4.5):
    """Is a count of n trials with probability p unsurprising?"""
    return abs(count - n * p) <= sigmas * math.sqrt(n * p * (1 - p)) + 1e-9

# -----------------------------------------------------------------------------
# toy


@pytest.mark.parametrize("text, reward", [
    ("TCTCTC", 12), ("TCTCAA", 10), ("TCAAAA", 8), ("AAAAAA", 6), ("GGGGGG", 0), ("CTCTCT", 8)])
def test_toy_reward_by_hand(text, reward):
    assert toy.reward(toy.encode([text])).item() == pytest.approx(reward / 16)


def test_toy_is_enumerable_and_has_many_separate_peaks():
    """No change of one letter improves them, so a greedy search from a lower one stays there."""
    assert Absorbing(4).is_small(6) and Absorbing(4).is_small(6, 16) and Uniform(4).is_small(6)
    assert not Absorbing(4).is_small(6, 100) and not Absorbing(4).is_small(8)
    x = torch.tensor(list(itertools.product(range(4), repeat=6)))
    is_peak = torch.ones(len(x), dtype=torch.bool)
    for i, v in itertools.product(range(6), range(4)):
        y = x.clone()
        y[:, i] = v
        is_peak &= ~((y != x).any(1) & (toy.reward(y) >= toy.reward(x) - 1e-6))
    peaks = toy.decode(x[is_peak])
    assert len(peaks) == 13 and {"TCTCTC", "TCTCAA", "TCAAAA", "AAAAAA"} < set(peaks)


def test_toy_data_follows_its_chain():
    x = toy.data(20_000, torch.Generator().manual_seed(0))
    assert (x == toy.data(20_000, torch.Generator().manual_seed(0))).all()
    for a, b in itertools.product(range(4), repeat=2):
        before = x[:, :-1] == a
        count = ((x[:, 1:] == b) & before).sum().item()
        assert within(count, before.sum().item(), TOY_STEP[a, b].item())

# -----------------------------------------------------------------------------
# letters, and asking a reward


def test_encode_and_decode_are_inverse_and_a_foreign_letter_is_named():
    assert toy.decode(toy.encode(["ACG_TA"], blank="_")) == ["ACG_TA"]
    for string, message in (("ACXGTA", "'X' at position 3 of 'ACXGTA' is not in 'ACGT'"),
                            ("ACG_TA", "'_' at position 4"), ("ACG", "'ACG' has 3 letters")):
        with pytest.raises(BadInput, match=message):
            toy.encode([string])


@pytest.mark.parametrize("reward, message", [
    (lambda x: torch.zeros(len(x), 2), "sample 0, 'AC', is .0.0, 0.0.: a finite number"),
    (lambda x: [1.0, 2.0], "returned 2 values for 3 samples"),
    (lambda x: torch.tensor([0, math.nan, 0]), "sample 1, 'GT', is nan"),
    (lambda x: torch.tensor([0, 0, math.inf]), "sample 2, 'AA', is inf"),
    (lambda x: [0.1, None, 0.2], "sample 1, 'GT', is None: a finite number is needed"),
    (lambda x: [0.1, 0.2, "high"], "sample 2, 'AA', is 'high'"),
    (lambda x: [0.1, 10 ** 400, 0.2], "sample 1, 'GT', is 1000"),
    (lambda x: None, "the reward returned None: it must return one number per sample"),
    (lambda x: dict(AC=1, GT=2, AA=3), "the reward returned {'AC': 1, .*in the order of the sam"),
    (lambda x: {1.0, 2.0, 3.0}, "the reward returned {1.0, 2.0, 3.0}: it must"),
    (lambda x: b"abc", "the reward returned b'abc': it must"),
    (lambda x: "123", "the reward returned '123': it must"),
    (lambda x: torch.tensor(1.0), "the reward returned 1.0: it must return one number"),
    (lambda x: 1.0, "the reward returned 1.0: it must return one number")])
def test_a_faulty_reward_is_told_which_sample(reward, message):
    task = Task("t", "ACGT", 2, None, reward)
    with pytest.raises(BadInput, match=message) as error:
        ask(task, task.encode(["AC", "GT", "AA"]))
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_what_a_reward_raises_is_passed_on():
    def reward(tokens):
        raise RuntimeError("no oracle today")
    with pytest.raises(RuntimeError, match="no oracle today"):
        ask(Task("t", "AC", 2, None, reward), torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.parametrize("reward", [
    lambda x: [float(v) for v in x[:, 0]], lambda x: (v for v in x[:, 0].tolist()),
    lambda x: x[:, 0].numpy(), lambda x: list(x[:, 0].double().numpy()), lambda x: x[:, 0]])
def test_a_reward_may_return_any_numbers(reward):
    task = Task("t", "AC", 1, None, reward)
    assert ask(task, torch.tensor([[0], [1]])).tolist() == [0, 1]

# -----------------------------------------------------------------------------
# what was paid for


def counting_task(alphabet="AC", length=3, **more):
    """A task whose reward is its number of C, and the list of all samples that it was asked."""
    asked = []
    task = Task("t", alphabet, length, None, None, **more)

    def reward(tokens):
        asked.extend(task.decode(tokens))
        return (tokens == 1).sum(dim=1)
    task.reward = reward
    return task, asked


def test_a_sample_is_asked_once_whoever_asks_and_every_row_gets_a_line(tmp_path):
    task, asked = counting_task()
    paid = rewards.Paid(tmp_path / "rewards.jsonl")
    x = task.encode(["AAC", "CCC", "AAC"])
    assert paid.ask(task, x, iter=1, kl=torch.tensor([0.5, -1.0, 0.25])).tolist() == [1, 3, 1]
    assert paid.ask(task, x[:1], 2, "evaluation").tolist() == [1] and asked == ["AAC", "CCC"]
    lines = list(rewards.whole_lines((tmp_path / "rewards.jsonl").read_text()))
    assert lines == [dict(iter=1, sample="AAC", reward=1, kl=0.5),
                     dict(iter=1, sample="CCC", reward=3, kl=-1),
                     dict(iter=1, sample="AAC", reward=1, kl=0.25),
                     dict(iter=2, stage="evaluation", sample="AAC", reward=1)]
    assert len(paid.seen) == 2 and paid.best == 3


def test_the_optimum_knows_everything_but_does_not_count(tmp_path):
    task, asked = counting_task()
    paid = rewards.Paid(tmp_path / "rewards.jsonl")
    paid.ask(task, task.encode(["CCC", "AAA"]), stage="optimum")
    assert not paid.seen and paid.best == -math.inf
    assert paid.ask(task, task.encode(["AAA"]), iter=1).tolist() == [0] and len(asked) == 2
    assert paid.seen == {"AAA"} and paid.best == 0


@pytest.mark.parametrize("cut", range(0, 200, 7))
def test_a_file_that_was_torn_anywhere_is_completed(cut, tmp_path):
    """A second sitting asks for what the first had not written, and then the rollout is there."""
    task, asked = counting_task(length=6)
    file, kl = tmp_path / "rewards.jsonl", torch.arange(4.0)
    x = task.encode(["AAACAC", "CCCAAA", "AAACAC", "ACACAC"])
    first = rewards.Paid(file).ask(task, x, iter=1, kl=kl)
    whole, n = file.read_text(), len(asked)
    file.write_text(whole[:cut])
    kept = {line["sample"] for line in rewards.whole_lines(whole[:cut])}
    paid = rewards.Paid(file)
    assert torch.equal(paid.ask(task, x, iter=1, kl=kl), first)
    assert set(asked[n:]) == {"AAACAC", "CCCAAA", "ACACAC"} - kept and len(asked) == 2 * n - len(kept)
    samples = [line["sample"] for line in rewards.whole_lines(file.read_text())]
    assert samples[-4:] == ["AAACAC", "CCCAAA", "AAACAC", "ACACAC"] and len(samples) < 8
    assert len(paid.seen) == 3 and paid.best == 3


def test_the_buffer_is_rebuilt_from_the_file(tmp_path):
    """With pads, which the file leaves out at the end, and prompts; float32 survives."""
    task, asked = counting_task("AC-", 5, pad="-", given=lambda x: (torch.arange(5) < 2).expand_as(x))
    x = torch.randint(3, (6, 5), generator=torch.Generator().manual_seed(0))
    x[0] = torch.tensor([1, 0, 2, 2, 2])
    kl = torch.randn(6)
    paid = rewards.Paid(tmp_path / "rewards.jsonl")
    reward = paid.ask(task, x, iter=4, kl=kl, log_ref=2 * kl)
    first, *_ = rewards.whole_lines((tmp_path / "rewards.jsonl").read_text())
    assert list(first) == ["iter", "sample", "reward", "kl", "log_ref", "prompt"]
    assert (first["sample"], first["reward"], first["prompt"]) == ("CA", 1, "CA___")
    again = rewards.Paid(tmp_path / "rewards.jsonl")
    rollout = again.recall(task, 4, group=3, size=6)
    assert torch.equal(rollout.tokens, x) and torch.equal(rollout.reward, reward.view(2, 3))
    assert torch.equal(rollout.log_ref, 2 * kl.view(2, 3))
    assert torch.equal(rollout.kl, kl.view(2, 3))
    assert again.seen == paid.seen and again.best == paid.best


def test_processes_know_their_own_lines_only(tmp_path):
    task, asked = counting_task()
    file, x = tmp_path / "rewards.jsonl", task.encode(["AAC", "CCC"])
    for rank in (0, 1):
        rewards.Paid(file, rank).ask(task, x, iter=1)
    assert len(asked) == 4
    assert [line.get("rank") for line in rewards.whole_lines(file.read_text())] == [None] * 2 + [1] * 2
    rewards.Paid(file, 1).ask(task, x, iter=1)
    assert len(asked) == 4 and len(list(rewards.whole_lines(file.read_text()))) == 4


def test_another_machine_that_draws_other_samples_keeps_what_was_paid(tmp_path):
    task, asked = counting_task()
    file = tmp_path / "rewards.jsonl"
    rewards.Paid(file).ask(task, task.encode(["AAC", "CCC"]), iter=1, kl=torch.zeros(2))
    paid = rewards.Paid(file)
    assert paid.ask(task, task.encode(["ACC", "AAC"]), 1, kl=torch.ones(2)).tolist() == [2, 1]
    assert asked == ["AAC", "CCC", "ACC"]
    rollout = rewards.Paid(file).recall(task, 1, group=2, size=2)
    assert task.decode(rollout.tokens) == ["ACC", "AAC"]


@pytest.mark.parametrize("text", [
    'sample,reward\nAAC,1.5\nCCC,-2\n', 'reward\tname\tsample\n1.5\tx\tAAC\n-2\ty\tCCC\n',
    '\n{"iter": 1, "sample": "AAC", "reward": 1.5}\n{"sample": "CCC", "reward": -2}\n{"sa',
    '{"stage": "optimum", "sample": "CAC", "reward": 9}\n{"sample": "AAC", "reward": 1.5}\n'
    '{"sample": "CCC", "reward": -2}'])
def test_known_rewards_come_from_tables_and_from_other_runs(text, tmp_path):
    task, asked = counting_task()
    (tmp_path / "known.txt").write_text(text)
    rollout, = rewards.read_known(task, str(tmp_path / "known.txt"), 9)
    assert task.decode(rollout.tokens) == ["AAC", "CCC"] and not asked
    assert rollout.reward.tolist() == [[1.5, -2]] and rollout.kl.tolist() == [[0, 0]]


def test_known_rewards_of_one_prompt_stay_together(tmp_path):
    task, _ = counting_task(given=lambda x: (torch.arange(3) < 1).expand_as(x))
    (tmp_path / "known.csv").write_text("sample,reward\nAAC,1\nCCC,2\nACC,3\nAAA,4\nACA,5\n")
    one, two = rewards.read_known(task, str(tmp_path / "known.csv"), 2)
    assert task.decode(one.tokens) == ["AAC", "AAA"]            # every second row, since a table
    assert two.reward.tolist() == [[3, 5]]                      # may be sorted; CCC is alone


@pytest.mark.parametrize("text, message", [
    ("sample,reward\nAAC,1\nAXC,2\n", "known.csv, row 2: 'X' at position 2"),
    ("sample,reward\nAAC,1\nA_C,2\n", "known.csv, row 2: '_' at position 2"),
    ("sample,reward\nAA,1\n", "row 1: 'AA' has 2 letters, the task 3"),
    ("sample,reward\nAAC,much\n", "row 1: could not convert string to float: 'much'"),
    ("sample,reward\nAAC,nan\n", "row 1: the reward is nan"),
    ("reward,sample\n1,AAC\n2\n", "row 2: .*None"), ("sample,reward\nAAC\n", "row 1: .*None"),
    ("sequence,reward\nAAC,1\n", "columns sample and reward are needed; it has sequence, reward"),
    ("", "known.csv has no row"), (None, "known.csv cannot be read: .*No such file")])
def test_known_rewards_that_do_not_fit_get_a_line(text, message, tmp_path):
    if text is not None:
        (tmp_path / "known.csv").write_text(text)
    with pytest.raises(BadInput, match=message) as error:
        rewards.read_known(counting_task()[0], str(tmp_path / "known.csv"), 9)
    assert "\n" not in str(error.value)

# -----------------------------------------------------------------------------
# held-out parts


@pytest.mark.parametrize("name", ["dna", "arithmetic"])
def test_train_and_held_out_are_disjoint(name):
    """The whole sequences, or the prompts where there are some."""
    task = TASKS[name]()
    train = task.data(5000, torch.Generator().manual_seed(0))
    held = task.held(500, torch.Generator().manual_seed(1))
    assert train.shape == (5000, task.length) and held.shape == (500, task.length)
    train, held = (set(task.decode(task.prompts(x) if task.given else x)) for x in (train, held))
    assert held and not train & held


def test_a_short_task_has_nothing_to_hold_out():
    for length in (1, 5):
        short = TASKS["dna"](length)
        assert short.held is None and short.held_out(30, 0).shape == (30, length)
    assert len(TASKS["dna"](6).held(3, torch.Generator().manual_seed(0))) == 3


def test_windows_lie_in_one_text_and_the_last_twentieth_is_held_out():
    parts = [torch.arange(1000), torch.arange(2000, 2020), torch.arange(5000, 9000)]
    parts.append(torch.arange(5))
    n_windows = 981 + 1 + 3981
    ended = [torch.cat((part, torch.tensor([-1]))) for part in parts]
    data, held = rewards.windows(torch.cat(ended), 20)
    train = data(50_000, torch.Generator().manual_seed(0))
    test = held(5000, torch.Generator().manual_seed(0))
    assert (train.diff(dim=1) == 1).all() and (test.diff(dim=1) == 1).all()     # one text each
    assert not set(train.flatten().tolist()) & set(test.flatten().tolist())
    assert len(test[:, 0].unique()) == n_windows // 20 - 19 and test.max() == 8999
    starts = train[:, 0].bincount(minlength=9000)
    assert (starts > 0).sum() == n_windows - n_windows // 20
    assert within(starts[2000].item(), 50_000, 1 / (n_windows - n_windows // 20))


def test_held_out_windows_do_not_occur_in_the_training_part():
    """The last twentieth starts at 951; it repeats 0 to 19, of which the windows at 0 to 15 are
    whole, and then has new ones."""
    x = torch.cat((torch.arange(960), torch.arange(20), torch.arange(2000, 2020)))
    _, held = rewards.windows(x, 5)
    starts = set(held(2000, torch.Generator().manual_seed(0))[:, 0].tolist())
    assert starts == {*range(951, 960), *range(16, 20), *range(2000, 2016)}


def test_text_holds_out_the_end_of_its_corpus():
    task, whole = TASKS["text"](), rewards.corpus()
    cut = len(whole) - (len(whole) - task.length + 1) // 20     # where the last training window ends
    for draw, part in ((task.data, whole[:cut]), (task.held, whole[cut:])):
        strings = task.decode(draw(3000, torch.Generator().manual_seed(0)))
        assert all(string in part for string in strings)
    assert not any(string in whole[:cut] for string in strings[:300])

# -----------------------------------------------------------------------------
# dna


def spell(**sites):
    """A sequence of 60 C with sites given as start=letters: s10="TGACTCA"."""
    letters = list("C" * 60)
    for start, site in sites.items():
        letters[int(start[1:]):int(start[1:]) + len(site)] = site
    return "".join(letters)


@pytest.mark.parametrize("sequence, value", [
    (spell(), 0),
    (spell(s10="TGACTCA"), 0.5), (spell(s10="TGACTGA"), 0),                     # AP-1; a letter off
    (spell(s10="TGACTCA", s30="TGAGTCA"), 0.75),
    (spell(s5="TGACTCA", s20="TGACTCA", s40="TGACTCA"), 0.875),
    (spell(s53="TGACTCA"), 0.5), (spell(s54="TGACTC"), 0),                      # at the end, over
    (spell(s3="CAAAGTCCA"), 0.5), (spell(s3="TGGACTTTG"), 0.5),                 # on either strand
    (spell(s3="GTTAATAATTAAC"), 0.6), (spell(s3="GTTAATCATTAAC"), 0.6),         # any middle letter
    (spell(s3="CAAAGTCCA", s30="GTTAATAATTAAC"), 1.1),
    (spell(s10="TGACTCA", s30="AGATAA"), 0.25),                                 # GATA1 represses
    (spell(s10="TGACTCA", s30="AGATAA", s45="TTATCT"), 0.125)])
def test_true_activity_by_hand(sequence, value):
    assert true_activity(sequence) == pytest.approx(value)


def activity(tokens):
    return torch.tensor([true_activity(s) for s in dna.decode(tokens)])


def test_both_strands_have_the_same_activity():
    x = dna.data(500, torch.Generator().manual_seed(0))
    assert torch.allclose(activity(x), activity(3 - x.flip(1))) and activity(x).max() > 1


def test_sites_stand_at_their_places_and_go_along_with_gc():
    """Half of the 3 places hold a site on average; elsewhere sites occur by chance alone."""
    n, L, rng = 4000, 50, random.Random(0)
    rich, poor, elsewhere = [], [], 0
    for _ in range(n):
        sequence = rewards.dna_sequence(L, rng)
        assert len(sequence) == L and set(sequence) <= set("ACGT")
        starts = {m.start() for p in rewards.PATTERNS.values() for m in p.finditer(sequence)}
        planted = len(starts & {2, 18, 34})
        elsewhere += len(starts) - planted
        (rich if sequence.count("G") + sequence.count("C") > L / 2 else poor).append(planted)
    assert 0.48 < sum(rich + poor) / (3 * n) < 0.54 and elsewhere < 0.01 * L * n
    assert sum(rich) / len(rich) > 1.7 * sum(poor) / len(poor)


def test_the_oracle_knows_something_believes_in_gc_and_is_always_the_same():
    new = dna.held(1000, torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    first = ask(dna, new)
    rewards.oracle.cache_clear()
    torch.manual_seed(5)
    assert torch.equal(first, ask(dna, new))
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))            # the run's own random numbers are untouched
    assert torch.allclose(first[:3], ask(dna, new[:3]), atol=1e-5)              # no batch effects
    assert torch.corrcoef(torch.stack((first, activity(new))))[0, 1] > 0.35
    rng = random.Random(0)
    rich, plain = (dna.encode(["".join(rng.choices(letters, k=50)) for _ in range(300)])
                   for letters in ("CG", "ACGT"))
    assert activity(rich).mean() < 0.2 and ask(dna, rich).mean() > ask(dna, plain).mean() + 0.15


def test_measures_of_dna():
    x = dna.encode(["TGACTCA" + "G" * 43, "A" * 50])
    assert dna.measure(x) == pytest.approx({"true activity": 0.25, "GC": (43 + 3) / 100})

# -----------------------------------------------------------------------------
# arithmetic and text


def test_a_sum_and_its_mirror_are_held_out_together():
    task = TASKS["arithmetic"]()
    train = {s[:6] for s in task.decode(task.data(20_000, torch.Generator().manual_seed(0)))}
    held = {s[:6] for s in task.decode(task.held(2000, torch.Generator().manual_seed(1)))}
    assert 300 < len(held) and not train & {f"{s[3:5]}+{s[:2]}=" for s in held}


def test_half_of_the_sums_are_wrong_in_one_digit():
    task, n = TASKS["arithmetic"](), 10_000
    x = task.data(n, torch.Generator().manual_seed(0))
    right = 0
    for string in task.decode(x):
        a, b, c = string[:2], string[3:5], string[6:]
        truth = f"{int(a) + int(b):03}"
        wrong = sum(p != q for p, q in zip(c, truth))
        assert string[2] == "+" and string[5] == "=" and wrong <= 1
        right += wrong == 0
    assert within(right, n, 0.5) and ask(task, x).sum() == right
    assert task.decode(task.prompts(task.encode(["12+34=046"]))) == ["12+34=___"]


def test_the_reward_of_a_text_counts_distinct_known_words_of_four_letters(monkeypatch):
    """The text knows house, garden, and words of three letters, which do not count."""
    content = "the cat sat in the garden, the house. "
    monkeypatch.setattr(rewards, "corpus", lambda: content * 10)
    task = TASKS["text"](12)
    expected = {"house garden": 11, "garden house": 11, "house house ": 5, "houses garde": 0,
                "the cat sat ": 0, "house ......": 5, "            ": 0}
    values = ask(task, task.encode(list(expected)))
    assert values.tolist() == pytest.approx([n / 12 for n in expected.values()])


def test_a_text_cannot_be_gamed_by_a_word_over_and_over():
    task = TASKS["text"]()
    assert ask(task, task.held_out(300, 0)).mean() > 0.4
    for string, most in (("this " * 9, 4 / 48), ("and the " * 6, 0), ("x" * 48, 0)):
        assert ask(task, task.encode([string.ljust(48)[:48]])).item() <= most + 1e-9


# -----------------------------------------------------------------------------
# ehrlich


def ehrlich_parts():
    """The motifs, their places and the banned pairs, read out of the reward's closure."""
    inside = dict(zip(TASKS["ehrlich"]().reward.__code__.co_freevars,
                      (cell.cell_contents for cell in TASKS["ehrlich"]().reward.__closure__)))
    return inside["wanted"], inside["places"], inside["is_feasible"]


def best_ehrlich():
    """All motifs one after the other, each letter repeated until the next is due."""
    wanted, places, _ = ehrlich_parts()
    x = []
    for motif, place in zip(wanted.tolist(), places.tolist()):
        ends = place[1:] + [place[-1] + 1]
        for v, start, end in zip(motif, place, ends):
            x += [v] * (end - start)
    return torch.tensor([x + x[-1:] * (32 - len(x))])


def test_the_best_ehrlich_sequence_earns_one_and_each_loss_its_share():
    task, best = TASKS["ehrlich"](), best_ehrlich()
    wanted, places, is_feasible = ehrlich_parts()
    assert is_feasible(best).all() and ask(task, best).item() == 1
    letters, banned = task.vocab_size, 0
    for a, b in itertools.product(range(letters), repeat=2):
        pair = torch.full((1, 32), a)
        pair[0, 1] = b
        is_banned = not is_feasible(pair[:, :2]).item()
        banned += is_banned
        assert (ask(task, pair) == 0) or not is_banned
        assert not is_banned or a != b                          # a letter may always be repeated
    assert banned == 3 * letters
    found = set()
    for v in range(letters):                                    # a letter of the first motif is lost
        other = best.clone()
        other[0, 0] = v
        if v != wanted[0, 0] and is_feasible(other):
            found.add(ask(task, other).item())
    assert 0.75 in found and found <= {0.75, 1.0}


def test_ehrlich_data_are_feasible_and_seldom_good():
    task = TASKS["ehrlich"]()
    x = task.data(2000, torch.Generator().manual_seed(0))
    assert task.measure(x) == {"feasible": 1} and 0 < ask(task, x).mean() < 0.1
    assert task.held(50, torch.Generator().manual_seed(0)).shape == (50, 32)
    noise = torch.randint(20, (500, 32), generator=torch.Generator().manual_seed(0))
    assert task.measure(noise)["feasible"] < 0.1 and ask(task, noise).mean() < 0.01
    with pytest.raises(BadInput, match="--length=15: the motifs of ehrlich need 16 slots"):
        TASKS["ehrlich"](15)

# -----------------------------------------------------------------------------
# files


def write(folder, content, name="data.txt"):
    if isinstance(content, str):
        content = content.encode()
    if name.endswith(".gz"):
        content = gzip.compress(content)
    (folder / name).write_bytes(content)
    return str(folder / name)


def rows(task, n=1000):
    train = task.decode(task.data(n))
    held = task.decode(task.held(n)) if task.held else []
    assert not set(train) & set(held)
    return train, held


@pytest.mark.parametrize("name", ["data.txt", "data.txt.gz"])
def test_one_sequence_per_line(tmp_path, name):
    sequences = ["".join(s) for s in itertools.product("ACGT", repeat=4)]
    file = write(tmp_path, "\r\n".join(sequences).lower() + "\n\n", name)
    train, held = rows(open_task("dna", 4, file))
    assert sorted(train + held) == sequences and 3 < len(held) < 30


def test_fasta_with_wrapped_lines(tmp_path):
    file = write(tmp_path, ">one of two\nACG\nTTT\n>two\nGGGccc\n", "x.fa.gz")
    assert rows(open_task("dna", 6, file)) == (["ACGTTT", "GGGCCC"], [])
    file = write(tmp_path, b"\xef\xbb\xbf>marked\nACGTTT\n", "x.fa")
    assert rows(open_task("dna", 6, file)) == (["ACGTTT"], [])


def test_a_pad_joins_the_alphabet_and_the_reward_does_not_see_it(tmp_path):
    (tmp_path / "own.py").write_text("def score(samples):\n    return [len(s) for s in samples]\n")
    file = write(tmp_path, "ACGTA\nAC\n")
    task = open_task("dna", 5, file, "-", reward=f"{tmp_path / 'own.py'}:score")
    assert task.alphabet == "ACGT-" and rows(task)[0] == ["ACGTA", "AC---"]
    assert ask(task, task.data(2)).tolist() == [5, 2]
    assert task.samples(task.data(2)) == ["ACGTA", "AC"]


def test_a_pad_that_occurs_in_the_data_is_refused(tmp_path):
    """Its copies would vanish from the samples: [O-] would become [O]."""
    with pytest.raises(BadInput, match="--pad=- is a letter of .*: choose another"):
        open_task("own", 4, write(tmp_path, "[O-]\nCC\n"), "-")


def test_windows_of_a_genome_avoid_foreign_letters_and_say_so(tmp_path, capsys):
    rng = random.Random(0)
    left, right = ("".join(rng.choices("ACGT", k=100)) for _ in range(2))
    file = write(tmp_path, f">chr\n{left}\nNNNNNR\n{right}\n".lower(), "g.fa.gz")
    task = open_task("dna", 8, file, crop=True)
    assert "windows that avoid 6 foreign letters" in capsys.readouterr().err
    drawn = set(task.decode(task.data(2000)))
    assert drawn and all(s in left or s in right for s in drawn)
    with pytest.raises(BadInput, match="sequence 1 of .*: 'N' at position 101 .*avoid foreign let"):
        open_task("dna", 206, file)


def test_crop_makes_sequences_of_a_list_for_text(tmp_path):
    file = write(tmp_path, "\n".join(["C1CCCCC1", "CCO-CC=O"] * 20))
    task = open_task("own", 8, file, crop=True)
    assert set(task.decode(task.data(50))) == {"C1CCCCC1", "CCO-CC=O"}


def test_a_reward_file_may_define_columns_of_the_report(tmp_path):
    (tmp_path / "own.py").write_text("def score(s): return [len(x) for x in s]\n"
                                     "def measure(s): return {'G': sum(x.count('G') for x in s)}\n")
    task = open_task("toy", reward=f"{tmp_path / 'own.py'}:score")
    tokens = task.encode(["GGGCCC", "AAAAAG"])
    assert task.measure(tokens) == {"G": 4} and TASKS["toy"]().measure(tokens) == {}


def test_cropping_takes_windows_and_holds_out_the_last(tmp_path):
    rng = random.Random(0)
    long = "".join(rng.choices("ACGT", k=400))
    task = open_task("dna", 10, write(tmp_path, f"ACGTACGTAC\n{long}\n"), crop=True)
    train, held = rows(task, 3000)
    assert all(s in long[:382] or s == "ACGTACGTAC" for s in train)
    assert held and all(s in long[381:] for s in held)


def test_a_file_of_sums_holds_out_mirrors_together(tmp_path):
    lines = [f"{a}+{b}={a + b:03}" for a in range(10, 50) for b in range(10, 50)]
    train, held = rows(open_task("arithmetic", 0, write(tmp_path, "\n".join(lines))), 10 ** 6)
    assert 20 < len(held) < 200 and not {f"{s[3:5]}+{s[:2]}{s[5:]}" for s in held} & set(train)


def test_a_file_of_sums_is_held_out_by_prompt_and_may_be_padded(tmp_path):
    lines = [f"{a}+{b}={c:03}" for a in range(10, 40) for b in (11, 57) for c in (a + b, a + b + 1)]
    task = open_task("arithmetic", 0, write(tmp_path, "\n".join(lines)), "-")
    train, held = (task.decode(task.prompts(x)) for x in (task.data(1000), task.held(1000)))
    assert held and not set(train) & set(held) and len(train) + len(held) == 120
    assert all(s.endswith("=___") for s in train) and task.vocab_size == 13


def test_a_running_text_brings_its_own_alphabet(tmp_path):
    content = "Zwölf_Boxkämpfer jagen\nViktor quer über den Sylter Deich. " * 10
    task = open_task("own", 12, write(tmp_path, content), format="text")
    assert set(task.alphabet) == set(content) - {"\n"} and task.blank == "?"
    assert all(len(s) == 12 for s in task.decode(task.data(100))) and task.held is None
    assert open_task("own", 0, write(tmp_path, content), format="text").length == 64


def test_without_a_task_letters_length_and_pad_are_what_the_file_needs(tmp_path, capsys):
    task = open_task("own", 0, write(tmp_path, "MKV\nMKVLAA\nacgu\n"))
    assert sorted(task.alphabet) == sorted("MKVLAacgu-") and task.pad == "-" and task.length == 6
    assert rows(task)[0] == ["MKV---", "MKVLAA", "acgu--"]
    assert "3 sequences, 0 held out; short ones are filled up with -" in capsys.readouterr().err
    task = open_task("own", 0, write(tmp_path, "[O-]\nCC*\n"))
    assert task.pad == "." and open_task("own", 0, write(tmp_path, "ab\nba\n")).pad == ""
    lines = "\n".join(map("".join, itertools.product("ACGU", repeat=4)))
    task = open_task("own", 0, write(tmp_path, lines))
    n_held = len(task.held(1000))
    assert f"256 sequences, {n_held} held out\n" in capsys.readouterr().err


def test_the_format_of_a_file_can_be_named(tmp_path):
    file = write(tmp_path, ">a\nbc\nd >\n")
    assert rewards.read_sequences(file) == rewards.read_sequences(file, "fasta") == ["bcd>"]
    assert rewards.read_sequences(file, "lines") == [">a", "bc", "d >"]
    assert rewards.read_sequences(file, "text") == [">a bc d >"]


@pytest.mark.parametrize("content, more, message", [
    ("ACGT\nACG\n", {}, "sequence 2 of .* has 3 letters, the task 4; fill up with --pad=-"),
    ("ACGT\nACGTA\n", {}, "sequence 2 of .* has 5 letters, .* cut windows .* with --crop"),
    ("ACG\nAC\n", dict(crop=True), "no sequence has 4 known letters in a row"),
    ("@read\nACGT\n+\nFFFF\n", {}, "data.txt: .* not in 'ACGT'.* without --task the alphabet is"),
    (">x\nACGT\n>y\nAC\nXT\n", {}, "sequence 2 of .*data.txt: 'X' at position 3 .* not in 'ACGT'"),
    ("ACGT\nACGTA\n", dict(pad="-"), "sequence 2 of .* has 5 letters"),
    (">x\nACGT\n>y\n>z\nACGT\n", {}, "data.txt: sequence 2 is empty"),
    (">a\n>b\nACGT\n", {}, "data.txt: sequence 1 is empty"),
    ("ACGT\nACXT\n", {}, "sequence 2 of .*: 'X' at position 3 of 'ACXT' is not in 'ACGT'"),
    ("ACGT\nA_GT\n", {}, "sequence 2 of .*: '_' at position 2 of 'A_GT' is not in"),
    ("", {}, "sequence 1 is empty"), ("\n \n", {}, "sequence 1 is empty"),
    (b"\xff\xfe\x00A", {}, "data.txt cannot be read as text"),
    ("ACGT", dict(pad="--"), "--pad=--: one letter is needed"),
    ("ACGT", dict(pad="A"), "--pad=A is a letter of"), ("CCGG", dict(pad="A"), "--pad=A is a letter of")])
def test_files_that_cannot_be_used_get_a_line(content, more, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        open_task("dna", 4, write(tmp_path, content), **more)


def test_missing_and_damaged_files_and_flags_that_need_one(tmp_path):
    (tmp_path / "torn.gz").write_bytes(gzip.compress(b"ACGT" * 1000)[:30])
    (tmp_path / "no.gz").write_text("ACGT")
    for file, message in (("none.txt", "No such file"), ("torn.gz", "ended before"),
                          ("no.gz", "Not a gzipped file"), ("", "Is a directory")):
        with pytest.raises(BadInput, match=f"--data=.*{message}"):
            open_task("dna", 4, str(tmp_path / file) if file else str(tmp_path))
    for more in (dict(crop=True), dict(pad="-")):
        with pytest.raises(BadInput, match="--pad and --crop are for"):
            open_task("dna", **more)
    with pytest.raises(BadInput, match="--length=7: arithmetic has 9 slots"):
        open_task("arithmetic", 7)
    assert open_task("toy", 7).data(3).shape == (3, 7)
    with pytest.raises(BadInput, match="no sequence has 48 known letters"):
        open_task("own", 48, write(tmp_path, "short"), format="text")


def test_a_reward_from_a_file_may_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour.py").write_text("LETTER = 'G'\n")
    (tmp_path / "own.py").write_text("from neighbour import LETTER\ndef count(samples):\n"
                                     "    return [s.count(LETTER) / len(s) for s in samples]\n")
    task = open_task("toy", reward=f"{tmp_path / 'own.py'}:count")
    assert ask(task, task.encode(["GGGCCC", "AAAAAG"])).tolist() == pytest.approx([1 / 2, 1 / 6])


@pytest.mark.parametrize("code, name, message", [
    ("", "own.py", "own.py: file.py:function is needed"),
    ("", "own.txt:score", "file.py:function is needed"),
    ("", "other.py:score", "other.py:score: .* a file that exists"),
    ("x = 1", "own.py:score", "own.py has no function score"),
    ("score = 1", "own.py:score", "has no function score"),
    ("score = None", "own.py:score", "has no function score")])
def test_reward_files_that_cannot_be_used_get_a_line(code, name, message, tmp_path):
    (tmp_path / "own.py").write_text(code)
    with pytest.raises(BadInput, match=message) as error:
        open_task("toy", reward=str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("code, error", [
    ("1 / 0", ZeroDivisionError), ("import nowhere", ModuleNotFoundError),
    ("def score(s) return 1", SyntaxError)])
def test_what_a_reward_file_raises_is_passed_on(code, error, tmp_path):
    (tmp_path / "own.py").write_text(code)
    with pytest.raises(error):
        open_task("toy", reward=f"{tmp_path / 'own.py'}:score")


@pytest.mark.parametrize("body, message", [
    ("samples.sort()\n    return [len(s) for s in samples]", "the reward changed its list of samples"),
    ("samples.pop()\n    return [1]", "the reward changed its list of samples"),
    ("return {s: 1 for s in samples}", "must return one number per sample")])
def test_a_reward_that_changes_its_list_is_refused(body, message, tmp_path):
    (tmp_path / "own.py").write_text(f"def score(samples):\n    {body}\n")
    task = open_task("toy", reward=f"{tmp_path / 'own.py'}:score")
    for on_error in (None, 0.0):
        with pytest.raises(BadInput, match=message):
            ask(task, task.encode(["TTTTTT", "AAAAAA"]), on_error)


def test_what_a_reward_prints_goes_to_standard_error(tmp_path, capsys):
    (tmp_path / "own.py").write_text("print('loaded')\ndef score(samples):\n    print('asked')\n"
                                     "    return [len(s) for s in samples]\n")
    task = open_task("toy", reward=f"{tmp_path / 'own.py'}:score")
    ask(task, task.encode(["TTTTTT"]))
    assert tuple(capsys.readouterr()) == ("", "loaded\nasked\n")


def test_on_error_is_the_reward_of_samples_whose_reward_fails(tmp_path):
    """Only theirs: a batch that raises is asked again, sample by sample."""
    def reward(samples):
        return [None if s[0] == "A" else math.nan if s[0] == "C" else 1 / (s[0] != "G") for s in samples]
    task = replace(TASKS["toy"](), reward=lambda tokens: reward(task.samples(tokens)))
    x = task.encode(["AAAAAA", "TTTTTT", "CAAAAA", "GAAAAA"])
    with pytest.warns(UserWarning, match="the reward failed: ZeroDivisionError.*makes it -5.0"):
        assert ask(task, x, on_error=-5.0).tolist() == [-5, 1, -5, -5]
        late = replace(task, reward=lambda x: (v for _ in "a" for v in task.reward(x)))     # raises
        assert ask(late, x, on_error=-5.0).tolist() == [-5, 1, -5, -5]      # only when it is read
    assert ask(task, x[:3], on_error=0.0).tolist() == [0, 1, 0]
    with pytest.raises(ZeroDivisionError):
        ask(task, x)
    with pytest.raises(BadInput, match="the reward of sample 0, 'AAAAAA', is None: a finite number"):
        ask(task, x[:3])
    paid = rewards.Paid(tmp_path / "rewards.jsonl", on_error=-5.0)
    assert paid.ask(task, x[:3]).tolist() == [-5, 1, -5]


def test_an_exception_of_the_users_own_is_never_a_line_of_ours():
    def reward(tokens):
        raise FileNotFoundError("scores.csv")
    with pytest.raises(RuntimeError, match="the reward raised an exception") as error:
        ask(replace(TASKS["toy"](), reward=reward), torch.zeros(1, 6))
    assert isinstance(error.value.__cause__, FileNotFoundError)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_rewards_that_cannot_be_written_are_told(tmp_path):
    task, paid = TASKS["toy"](), rewards.Paid(tmp_path / "rewards.jsonl")
    paid.file.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        paid.ask(task, task.encode(["TTTTTT"]))


def test_samples_that_differ_in_their_pads_alone_are_paid_for_once(tmp_path):
    """Also after the file was read again; the file keeps the slots."""
    asked = []
    task = replace(TASKS["toy"](4), alphabet="ACGT-", pad="-")
    task.reward = lambda tokens: asked.extend(task.samples(tokens)) or [1.0] * len(tokens)
    file = tmp_path / "rewards.jsonl"
    x = task.encode(["A-C-", "AC--", "-AC-", "TT--"])
    rewards.Paid(file, pad="-").ask(task, x[:1], iter=1)
    paid = rewards.Paid(file, pad="-")
    paid.ask(task, x, iter=2)
    assert asked == ["AC", "TT"] and len(paid.seen) == 2
    written = [line["sample"] for line in rewards.whole_lines(file.read_text())]
    assert written == ["A-C", "A-C", "AC", "-AC", "TT"]


@pytest.mark.parametrize("columns", [{"reward": 1}, {"iter": 1}, {"x": None}, {"x": [1]}, [1], None])
def test_what_measure_must_not_return(columns):
    with pytest.raises(BadInput, match="measure returned .*: {column: number} is needed"):
        rewards.measured(columns)
    assert rewards.measured({"x": 1, "y": torch.tensor(0.5)}) == {"x": 1.0, "y": 0.5}


@pytest.mark.parametrize("content, format, message", [
    (">a\n>b\n", "", "sequence 1 is empty"), ("ACGT\n", "fasta", "is no FASTA: no line begins with")])
def test_fasta_that_is_none(content, format, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        open_task("own", 0, write(tmp_path, content), format=format)


def test_every_known_row_is_in_a_rollout_of_two_or_more(tmp_path):
    rows = "".join(f"{s},1\n" for s in ("AAAAAA", "CCCCCC", "GGGGGG", "TTTTTT", "ACACAC"))
    file = write(tmp_path, "sample, reward\n" + rows)
    for group, sizes in ((1, [3, 2]), (2, [3, 2]), (3, [5]), (9, [5])):
        known = rewards.read_known(TASKS["toy"](), file, group)
        assert [len(old.tokens) for old in known] == sizes

