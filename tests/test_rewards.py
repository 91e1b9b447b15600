"""Tasks: data and rewards against what they state, held-out parts, files, faulty rewards.

Read first test_a_faulty_answer_is_refused, for what a black box may not return."""
import gzip
import itertools
import json
import math
import os
import random
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

import rewards
from diffusion import Absorbing, Uniform
from rewards import (TASKS, TOY_STEP, BadInput, Own, RewardLog, Task, measured, open_task, query,
                     read_known, read_sequences, split_windows, true_activity)

toy, dna, arithmetic, text, ehrlich = (TASKS[name]() for name in TASKS)
THREE = ["AC", "GT", "AA"]              # samples to ask about


class Count(Task):
    """The reward is the number of C; `asked` holds all samples that it was asked."""
    alphabet, length = "AC", 3

    def __init__(self, length=0, pad=""):
        super().__init__(length)
        self.asked, self.pad, self.alphabet = [], pad, self.alphabet + pad

    def draw(self, n, generator):
        return torch.randint(self.vocab_size, (n, self.length), generator=generator)

    def reward(self, samples):
        self.asked += samples
        return [s.count("C") for s in samples]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def within(count, n, p, sigmas=4.5):
    """Is a count of n trials with probability p unsurprising?"""
    return abs(count - n * p) <= sigmas * math.sqrt(n * p * (1 - p)) + 1e-9


def lines_of(file):
    return [json.loads(line) for line in open(file)]

# -----------------------------------------------------------------------------
# what a task is


def test_encode_and_decode_are_inverse_and_a_foreign_letter_is_named():
    assert toy.decode(toy.encode(["ACG_TA"], blank="_")) == ["ACG_TA"]
    for string, message in (("ACXGTA", "'X' at position 3 of 'ACXGTA' is not in 'ACGT'"),
                            ("ACG_TA", "'_' at position 4"), ("ACG", "'ACG' has 3 letters")):
        with pytest.raises(BadInput, match="^" + message):
            toy.encode([string])
        with pytest.raises(BadInput, match="^sequence 2: " + message):
            toy.encode(["AAAAAA", string])
    task = Task(2)
    for task.alphabet, blank in (("CG", "_"), ("A_", "?"), ("_?#@~", "!")):     # a letter is free
        x = torch.tensor([[0, task.vocab_size]])
        assert task.blank == blank and task.decode(x) == [task.alphabet[0] + blank]


def test_the_help_names_every_method_that_a_subclass_may_give():
    named = set(re.findall(r"^ {8}(\w+) {2,}", Task.__doc__, re.M))
    assert named == {"alphabet", "length", "flags", "draw", "reward", "given", "is_held", "measure"}
    for name in ("toy", "dna", "arithmetic", "ehrlich"):        # text and own cut windows
        given = {key for key in vars(TASKS[name]) if hasattr(Task, key) and key[0] != "_"}
        assert {"draw", "reward"} <= given <= named


def test_what_a_subclass_leaves_out():
    with pytest.raises(BadInput, match="the task Task has no data: give it a method draw"):
        Task(3).split(9, 0)
    for catch in (False, True):
        with pytest.raises(BadInput, match="the task Task has no reward: give it one, or --reward"):
            query(Task(3).reward, ["A", "C"], catch)
    assert Task(3).length == 3 and not Task(3).has_prompts and Task(3).measure(["A"]) == {}


def test_pads_are_no_part_of_a_sample(tmp_path):
    """The reward never sees them, and samples that differ in them alone are queried once, also
    after the file was read again."""
    task, file = Count(4, pad="-"), tmp_path / "rewards.jsonl"
    x = task.encode(["A-C-", "AC", "-AC-", "CC"])
    assert task.decode(x) == ["A-C-", "AC--", "-AC-", "CC--"]
    samples = task.strings(x)
    RewardLog(file).query(task.reward, samples[:1], iter=1)
    assert RewardLog(file).query(task.reward, samples, iter=2).tolist() == [1, 1, 1, 2]
    assert task.asked == ["AC", "CC"] == [line["sample"] for line in lines_of(file)]
    tokens, values = read_known(task, str(file))
    assert task.decode(tokens) == ["AC--", "CC--"] and values.tolist() == [1, 2]

# -----------------------------------------------------------------------------
# querying a reward


@pytest.mark.parametrize("reward", [
    lambda s: [1, 0.0, 0.5], lambda s: (True, False, 0.5), lambda s: [Decimal(1), Fraction(0), 0.5],
    lambda s: (v for v in (1, 0, 0.5)), lambda s: map(float, (1, 0, 0.5)),
    lambda s: torch.tensor([1, 0, 0.5]), lambda s: torch.tensor([1, 0, 0.5], requires_grad=True),
    lambda s: list(torch.tensor([1, 0, 0.5])), lambda s: torch.tensor([1, 0, 0.5]).bfloat16(),
    lambda s: np.array([1, 0, 0.5]), lambda s: list(np.array([1, 0, 0.5])),
    lambda s: [np.bool_(True), np.int64(0), np.float16(0.5)],
    lambda s: np.array([1, Fraction(0), Decimal("0.5")], dtype=object),
    lambda s: pytest.importorskip("pandas").Series([1, 0, 0.5], index=s)])
def test_a_reward_may_return_any_numbers(reward):
    values, problem = query(reward, THREE)
    assert values == [1, 0, 0.5] and problem == "" and {type(v) for v in values} == {float}


@pytest.mark.parametrize("answer", [
    [1.0, 2.0], [1, 2, 3, 4], [], torch.zeros(3, 2), torch.zeros(3, 1), np.zeros((3, 1)),
    [0.1, 0.2, "high"], ["1", "2", "3"], [0.1, 10 ** 400, 0.2], [1, 1j, 2], None,
    dict(AC=1, GT=2, AA=3), {1.0, 2.0, 3.0}, b"abc", "123", 1.0, torch.tensor(1.0),
    np.float64(1)], ids=repr)
def test_a_faulty_answer_is_refused(answer):
    """It is no list of one number per sample; --on_error, which is for samples, does not help."""
    for catch in (False, True):
        with pytest.raises(BadInput, match="the reward returned .* for 3 samples: it must return "
                                           "one number per sample, in the order") as error:
            query(lambda samples: answer, THREE, catch)
        assert "\n" not in str(error.value) and len(str(error.value)) < 230


@pytest.mark.parametrize("change", [list.sort, list.pop, list.clear])
@pytest.mark.parametrize("catch", [False, True])
def test_a_reward_that_changes_its_list_is_refused(change, catch):
    with pytest.raises(BadInput, match="the reward changed its list of samples"):
        query(lambda samples: [change(samples), 1, 2], THREE, catch)
    assert THREE == ["AC", "GT", "AA"]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
def test_a_reward_that_is_no_finite_number_is_told(bad):
    values, problem = query(lambda s: [2, bad, None], THREE)
    assert values[0] == 2 and math.isnan(values[1]) and math.isnan(values[2])
    assert problem == f"the reward of 'GT' is {bad!r}"
    with pytest.raises(BadInput) as error:
        RewardLog().query(lambda s: [2, bad, 3], THREE)
    assert str(error.value) == (f"the reward of 'GT' is {bad!r}: a finite number is needed; "
                                "--on_error=VALUE is the reward of such samples")


def test_answers_are_kept_in_parts(tmp_path):
    """A kill, or here an exception, in the third call of the reward loses that call alone."""
    calls = []

    def reward(samples):
        calls.append(len(samples))
        return [1 / (len(calls) < 3)] * len(samples)
    samples = [f"{i:03d}" for i in range(600)]
    with pytest.raises(RuntimeError, match="division by zero"):
        RewardLog(tmp_path / "a").query(reward, samples)
    log = RewardLog(tmp_path / "a")
    assert calls == [256, 256, 88] and [line["sample"] for line in log.lines] == samples[:512]
    calls.clear()
    assert log.query(reward, samples).tolist() == [1.0] * 600 and calls == [88]


@pytest.mark.parametrize("wrong", [
    dict(draw=lambda x: ["AC", "GT"]), dict(draw=lambda x: x.float()), dict(draw=lambda x: x[0]),
    dict(draw=lambda x: x[:, :2]), dict(draw=lambda x: x[:0]), dict(draw=lambda x: x - 1),
    dict(draw=lambda x: x + 1), dict(given=lambda x: True),
    dict(given=lambda x: x), dict(given=lambda x: x[0] > 0)])
def test_a_task_of_ones_own_is_told_what_its_methods_must_return(wrong):
    class Mine(Task):
        alphabet, length = "ACGT", 3

        def draw(self, n, generator):
            x = torch.arange(30).view(10, 3) % 4
            return wrong.get("draw", lambda x: x)(x)

        def given(self, x):
            return wrong.get("given", lambda x: x < 0)(x)
    with pytest.raises(BadInput, match=f"{[*wrong][0]} of Mine must return (int64|bool)"):
        Mine().split(10, 0)


@pytest.mark.parametrize("error", [FileNotFoundError("a.csv"), ZeroDivisionError(), SystemExit(2),
                                   RuntimeError("no oracle today")], ids=repr)
@pytest.mark.parametrize("is_late", [False, True])
def test_an_exception_of_the_users_own_is_never_a_line_of_ours(error, is_late):
    def fail(samples):
        raise error
    reward = (lambda samples: map(fail, samples)) if is_late else fail      # when it is read
    with pytest.raises(RuntimeError, match="the reward raised ") as raised:
        query(reward, THREE)
    assert raised.value.__cause__ is error and repr(error) in str(raised.value)
    values, problem = query(reward, THREE, catch=True)
    assert len(values) == 3 and all(map(math.isnan, values))
    assert problem == f"the reward of 'AC' raised {error!r}"
    error = KeyboardInterrupt()                         # Ctrl-C stops it
    with pytest.raises(KeyboardInterrupt):
        query(reward, THREE, catch=True)


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(1).item()])
def test_a_reward_that_draws_random_numbers_has_others_in_each_call(draw):
    """And the same for the same samples, so that a resumed run is told what the whole one was."""
    def noise(samples):
        return [draw() for _ in samples]
    rewards = RewardLog().query(noise, [f"0{i:03d}" for i in range(600)])
    assert len(rewards.unique()) > 590
    assert query(noise, THREE) == query(noise, THREE)


def test_a_reward_that_fails_in_many_calls_is_one_warning(capsys):
    log = RewardLog(on_error=-1)
    for first in (0, 600):
        log.query(lambda samples: [None if int(s) % 600 < 500 else 1 for s in samples],
                  [f"{first + i}" for i in range(600)])
        err = capsys.readouterr().err
        assert err.count("warning") == 1
        assert "500 of 600 new samples failed: their reward is -1" in err


def test_a_file_that_is_whole_is_not_touched(tmp_path, monkeypatch):
    """Another process may just be writing to it, where there are no locks."""
    RewardLog(tmp_path / "a").add({"x": 1.0})
    monkeypatch.setattr(os, "truncate", None)
    assert RewardLog(tmp_path / "a").reward_of == {"x": 1.0}


def test_what_a_reward_prints_goes_to_standard_error(tmp_path, capsys):
    (tmp_path / "own.py").write_text("print('loaded')\ndef score(samples):\n    print('asked')\n"
                                     "    for s in samples:\n        print(s)\n        yield 1\n")
    task = open_task(reward=f"{tmp_path / 'own.py'}:score")
    assert query(task.reward, ["TTTTTT"]) == ([1], "") and task.measure(["TTTTTT"]) == {}
    assert tuple(capsys.readouterr()) == ("", "loaded\nasked\nTTTTTT\n")


@pytest.mark.parametrize("columns", [
    {"reward": 1}, {"iter": 1}, {"failed": 1}, {"x": None}, {"x": [1]}, [1], None])
def test_what_measure_must_not_return(columns):
    task = Count()
    task.measure = lambda samples: columns
    with pytest.raises(BadInput, match="measure returned .*: {column: number} is needed"):
        measured(task, ["A"])
    task.measure = lambda samples: {"x": len(samples), "y": torch.tensor(0.5)}
    assert measured(task, ["A"]) == {"x": 1.0, "y": 0.5} and measured(toy, ["A"]) == {}
    task.measure = lambda samples: {"x": math.nan, "y": 2}
    assert measured(task, ["A"]) == {"x": None, "y": 2}


def test_measure_that_raises_is_warned_of_once(capsys):
    task = Count()
    task.measure = lambda samples: 1 / 0
    with pytest.raises(ZeroDivisionError):
        measured(task, ["A"])
    assert [measured(task, ["A"], catch=True) for _ in range(2)] == [{}, {}]
    assert capsys.readouterr().err.count("measure failed, its columns are left out: ZeroDiv") == 1

# -----------------------------------------------------------------------------
# the file of rewards


def test_a_sample_is_queried_once_whoever_asks_and_gets_a_line(tmp_path):
    task, file = Count(), tmp_path / "rewards.jsonl"
    log = RewardLog(file)
    answer = log.query(task.reward, ["AAC", "CCC", "AAC"], iter=1)
    assert answer.tolist() == [1, 3, 1] and answer.dtype == torch.double
    log.query(task.reward, ["CCC", "ACA"], stage="evaluation")
    log.query(task.reward, ["ACA", "AAA"], iter=2)
    log.add({'é\u2028"\\\x1c\n': 1 / 3}, stage="check")
    assert lines_of(file) == log.lines == [
        dict(sample="AAC", reward=1, iter=1), dict(sample="CCC", reward=3, iter=1),
        dict(sample="ACA", reward=1, stage="evaluation"), dict(sample="AAA", reward=0, iter=2),
        dict(sample='é\u2028"\\\x1c\n', reward=1 / 3, stage="check")]
    assert file.read_text().endswith("}\n")
    assert [log.queries(iter) for iter in (0, 1, 2, 9)] == [0, 2, 3, 3]
    again = RewardLog(file)
    assert again.query(task.reward, ["CCC", "AAC"], iter=3).tolist() == [3, 1]
    assert again.lines == log.lines and again.reward_of == log.reward_of and not again.failed
    assert task.asked == ["AAC", "CCC", "ACA", "AAA"]


@pytest.mark.parametrize("cut", [*range(0, 150, 8), 46, 47, 48, 93, 94, 95])
def test_a_file_that_was_torn_anywhere_is_completed(cut, tmp_path):
    """A second sitting asks for what the first had not written to the end."""
    task, file = Count(6), tmp_path / "rewards.jsonl"
    samples = ["AAACAC", "CCCAAA", "AAACAC", "ACACAC"]
    first = RewardLog(file).query(task.reward, samples, iter=1)
    whole = file.read_text()
    assert len(whole) == 3 * 47
    n_kept = min(cut, len(whole)) // 47
    file.write_text(whole[:cut])
    RewardLog(file, is_writer=False)                    # of another process: it leaves the file
    assert file.read_text() == whole[:cut]
    log = RewardLog(file)
    assert file.read_text() == whole[:47 * n_kept] and len(log.lines) == n_kept
    assert torch.equal(log.query(task.reward, samples, iter=1), first)
    assert task.asked[3:] == ["AAACAC", "CCCAAA", "ACACAC"][n_kept:] and file.read_text() == whole


def test_a_file_that_another_tool_has_rewritten_loses_nothing(tmp_path):
    """Letters outside ASCII take two bytes each, line ends too."""
    content = '{"sample": "äöü", "reward": 1}\r\n{"sample": "b", "reward": 2}\r\n'.encode()
    (tmp_path / "rewards.jsonl").write_bytes(content)
    assert RewardLog(tmp_path / "rewards.jsonl").reward_of == {"äöü": 1, "b": 2}
    assert (tmp_path / "rewards.jsonl").read_bytes() == content


@pytest.mark.parametrize("line", ["", '{"samp', '{"sample": "A"}', "3", "[1]",
                                  '{"sample": "A", "reward": null}'])
def test_a_file_that_is_damaged_in_the_middle_is_told(line, tmp_path):
    (tmp_path / "rewards.jsonl").write_text(line + '\n{"sample": "A", "reward": 1}\n')
    with pytest.raises(BadInput, match="rewards.jsonl is damaged: "):
        RewardLog(tmp_path / "rewards.jsonl")


def test_one_process_writes_and_all_remember(tmp_path):
    task, log = Count(), RewardLog(tmp_path / "rewards.jsonl", is_writer=False)
    for _ in range(2):
        assert log.query(task.reward, ["AAC"], iter=1).tolist() == [1]
    assert task.asked == ["AAC"] and not log.file.exists() and log.queries(1) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_rewards_that_cannot_be_written_are_told(tmp_path):
    log = RewardLog(tmp_path / "rewards.jsonl")
    log.file.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        log.query(Count().reward, ["AAC"])


def test_good_answers_are_kept_though_one_of_their_batch_fails(tmp_path):
    task, log = Count(), RewardLog(tmp_path / "rewards.jsonl")
    with pytest.raises(BadInput, match="the reward of 'CCC' is None"):
        log.query(lambda s: [1, None, 0], ["AAC", "CCC", "AAA"], iter=1)
    log = RewardLog(log.file)
    assert log.query(task.reward, ["AAC", "CCC", "AAA"], iter=1).tolist() == [1, 3, 0]
    assert task.asked == ["CCC"]
    assert [line["sample"] for line in lines_of(log.file)] == ["AAC", "AAA", "CCC"]


def test_on_error_is_the_reward_of_samples_whose_reward_fails(tmp_path, capsys):
    """Only theirs: a batch that raises is asked again, each sample once, and one warning tells."""
    asked, file = [], tmp_path / "rewards.jsonl"
    bad = {"A": None, "C": math.nan, "T": 1}

    def reward(samples):
        asked.extend(samples)
        return [bad[s[0]] for s in samples]             # it raises for a G
    samples = ["TA", "GA", "TA", "AA", "CA", "TT"]
    new = ["TA", "GA", "AA", "CA", "TT"]
    log = RewardLog(file, on_error=-5.0)
    assert log.query(reward, samples, iter=1).tolist() == [1, -5, 1, -5, -5, 1]
    assert asked == new + new
    assert capsys.readouterr().err == ("warning: the reward of 'GA' raised KeyError('G'); 3 of 5 "
                                       "new samples failed: their reward is -5\n")
    assert lines_of(file)[1:3] == [
        dict(sample="TT", reward=1, iter=1), dict(sample="GA", reward=-5, failed=True, iter=1)]
    for log in (log, RewardLog(file, on_error=0.0)):    # what failed is not asked again
        assert log.query(reward, samples, iter=2).tolist() == [1, -5, 1, -5, -5, 1]
        assert log.failed == {"GA", "AA", "CA"} and len(asked) == 10 and log.queries(1) == 5
    assert capsys.readouterr().err == ""
    log.query(reward, ["GG"])                           # alone, it is asked just once
    assert asked[10:] == ["GG"] and log.reward_of["GG"] == 0
    query(reward, ["AA", "TA"], catch=True)             # nothing was raised: nothing asked again
    assert asked[11:] == ["AA", "TA"]


@pytest.mark.parametrize("content", [
    "sample,reward\nAAC,0\nCCC,-2\n", "sample, reward\r\nAAC, 0\r\nCCC, -2\r\n",
    "reward\tname\tsample\n0\tx\tAAC\n-2\ty\tCCC\n", "\ufeffsample,reward\nAAC,0\nCCC,-2",
    '{"sample": "AAC", "reward": 0.0, "iter": 1}\n'
    '{"sample": "CAC", "reward": 9, "failed": true, "iter": 1}\n'
    '{"sample": "CCC", "reward": -2, "stage": "check"}\n{"sample": "CA'])
def test_known_rewards_come_from_tables_and_from_other_runs(content, tmp_path):
    task = Count()
    (tmp_path / "known.txt").write_text(content)
    tokens, values = read_known(task, str(tmp_path / "known.txt"))
    assert task.decode(tokens) == ["AAC", "CCC"] and not task.asked
    assert values.tolist() == [0, -2] and values.dtype == torch.double


@pytest.mark.parametrize("content, message", [
    ("@read 1\nACGT\n+\nIIII\n", "it looks like FASTQ: .*awk 'NR % 4 == 2'"),
    ('{"sample": "ACGT"}\n', "it looks like JSON"), ('["ACGT", "AC"]\n', "it looks like JSON"),
    ("# mine\nACGT\n", "line 1 looks like a comment"), ("AC\n#\nAC", "line 2 looks like"),
    ("by hand\n>1\nACGT\n", "other lines before the first >"),
    ("id,seq\n1,ACGT\n2,AC\n", "every line holds a ',', .*cut -d','"),
    ("ACGT;1\nAC;2\n", "every line holds a ';'"), ("ACGT,\nAC,\n", "every line holds a ','"),
    ('"ACGT"\n"AC"\n', "every line holds a '\"'")])
def test_other_formats_are_not_learned_as_letters(content, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        read_sequences(write(tmp_path, content, "data.txt"))


def test_what_is_no_other_format_is_read(tmp_path):
    def read(content, **options):
        return read_sequences(write(tmp_path, content, "data.txt"), **options)
    assert read("; a comment\n>1\nAC\n; another\nGT\n>2\nA\n") == ["ACGT", "A"]
    assert read("# a title\nand > more\n> quoted", crop=True) == ["# a title and > more > quoted"]
    assert read("a,b\nc,d", alphabet="abcd,") == ["a,b", "c,d"] == read("a,b\nc,d", crop=True)
    assert read("a,b\ncd\n[O-]C#N") == ["a,b", "cd", "[O-]C#N"]


def test_the_users_code_leaves_no_trace(tmp_path, capsys):
    """Neither in random numbers, grad mode, dtype or folder; also where it raises."""
    def reward(samples):
        torch.manual_seed(1), np.random.seed(1), random.seed(1), os.chdir(tmp_path)
        torch.set_default_dtype(torch.double), torch.set_grad_enabled(False)
        print("hello")
        return [float(samples[0] == "AAC")] if len(samples) == 1 else 1 / 0

    def state():
        return (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(),
                random.getstate(), os.getcwd(), torch.get_default_dtype(), torch.is_grad_enabled())
    before = state()
    assert query(reward, ["AAC"]) == ([1.0], "") and state() == before
    with pytest.raises(RuntimeError):
        query(reward, ["AAC", "CCC"])
    assert state() == before and capsys.readouterr().out == ""


def test_contradictory_known_rewards_count_by_their_mean_and_are_counted(tmp_path, capsys):
    content = "sample,reward\nAAC,1\nCCC,2\nAAC,4\nCCC,2\nAAC,4\n"
    tokens, values = read_known(Count(), write(tmp_path, content, "known.csv"))
    assert Count().decode(tokens) == ["AAC", "CCC"] and values.tolist() == [3, 2]
    assert "--known: 2 samples; 1 of them have unequal rewards" in capsys.readouterr().err


@pytest.mark.parametrize("content, message", [
    ("sample,reward\nAAC,1\nAXC,2\n", "known.csv, row 2: 'X' at position 2"),
    ("sample,reward\nAAC,1\nA_C,2\n", "known.csv, row 2: '_' at position 2"),
    ("sample,reward\nAA,1\n", "row 1: 'AA' has 2 letters, the task 3"),
    ("sample,reward\nAAC,much\n", "row 1: could not convert string to float: 'much'"),
    ("sample,reward\nCCC,1\nAAC,nan\n", "row 2: the reward is nan"),
    ("sample,reward\nAAC,inf\n", "row 1: the reward is inf"),
    ("reward,sample\n1,AAC\n2\n", "row 2: .*None"),
    ("sample,reward\nAAC\n", "row 1: .*None"),
    ("sequence,reward\nAAC,1\n", "columns sample and reward are needed, there is no 'sample'"),
    ("", "known.csv has no row"), ("sample,reward\n", "known.csv has no row"),
    ('{"sample": "AAC", "reward": 1}\nAAC\n', "known.csv is damaged: JSONDecodeError"),
    (None, "--known=.*No such file"), (b"\xff\xfe", "known.csv cannot be read: .*can't decode")])
def test_known_rewards_that_do_not_fit_get_a_line(content, message, tmp_path):
    with pytest.raises(BadInput, match=message) as error:
        read_known(Count(), write(tmp_path, content, "known.csv"))
    assert "\n" not in str(error.value)

# -----------------------------------------------------------------------------
# held-out parts


@pytest.mark.parametrize("name", ["dna", "arithmetic", "ehrlich"])
def test_train_and_held_out_are_disjoint(name):
    """The whole sequences, or the prompts where there are some."""
    task = TASKS[name]()
    train, held = task.split(1000, seed=0)
    assert len(train) + len(held) == 1000 and 20 < len(held) < 90       # 50 expected
    assert torch.equal(task.split(1000, seed=0)[1], held)
    assert not torch.equal(task.split(9, seed=1)[0], train[:9])
    if task.has_prompts:
        train, held = task.prompts(train), task.prompts(held)
    assert not set(task.decode(train)) & set(task.decode(held))


def test_copies_are_held_out_together_and_nothing_where_too_little_would_stay():
    task = Count()                                      # 8 sequences
    task.is_held = lambda x: x[:, 0] == 1
    for n in (20, 200):
        train, held = task.split(n, seed=0)
        assert len(held) > n / 4 and not train[:, 0].any() and held[:, 0].all()
    assert list(map(len, task.split(19, seed=0))) == [19, 0]
    task.draw = lambda n, generator: torch.ones(n, 3, dtype=torch.long)
    assert list(map(len, task.split(50, seed=0))) == [50, 0]
    assert list(map(len, toy.split(2000, seed=0))) == [2000, 0]         # it wants none


def test_a_task_in_python_holds_out_prompts():
    """It gives `given`, and may choose with `is_held`."""
    class Prompted(Count):
        length = 9

        def given(self, x):
            return (torch.arange(9) < 7).expand_as(x)

    class Chosen(Prompted):
        def is_held(self, x):
            return x[:, 0] == 1
    for task in (Prompted(), Chosen()):
        assert task.decode(task.prompts(task.encode(["ACACACACA"]))) == ["ACACACA__"]
        train, held = (set(task.decode(task.prompts(x))) for x in task.split(1000, seed=0))
        assert task.has_prompts and len(train) + len(held) == 128 and len(held) > 2
        assert not train & held
    assert len(train) == 64 and all(prompt[0] == "C" for prompt in held)


def test_windows_lie_in_one_text_and_the_last_twentieth_is_held_out():
    n_windows, end = 981 + 1 + 3981, torch.tensor([-1])
    x = torch.cat((torch.arange(1000), end, torch.arange(2000, 2020), end,
                   torch.arange(5000, 9000), end, torch.arange(5)))
    train, held = split_windows(x, 20, 50_000, seed=0)
    assert (train.diff(dim=1) == 1).all() and (held.diff(dim=1) == 1).all()     # one text each
    assert not set(train.flatten().tolist()) & set(held.flatten().tolist())
    assert len(held[:, 0].unique()) == len(held) == n_windows // 20 - 19 and held.max() == 8999
    starts = train[:, 0].bincount(minlength=9000)
    assert len(train) == 50_000 and (starts > 0).sum() == n_windows - n_windows // 20
    assert within(starts[2000].item(), 50_000, 1 / (n_windows - n_windows // 20))


def test_held_out_windows_do_not_occur_in_the_training_part():
    """The last twentieth starts at 951; it repeats 0 to 19, of which the windows at 0 to 15 are
    whole, and then has new ones."""
    x = torch.cat((torch.arange(960), torch.arange(20), torch.arange(2000, 2020)))
    _, held = split_windows(x, 5, 2000, seed=0)
    expected = [*range(16, 20), *range(951, 960), *range(2000, 2016)]
    assert sorted(held[:, 0].tolist()) == expected
    train, few = split_windows(x, 5, 7, seed=0)
    assert len(train) == len(few) == 7 and set(few[:, 0].tolist()) < set(expected)
    assert not torch.equal(split_windows(x, 5, 7, seed=1)[0], train)


def test_text_holds_out_the_end_of_its_corpus():
    whole = rewards.corpus()
    cut = len(whole) - (len(whole) - text.length + 1) // 20     # the last training window ends here
    train, held = map(text.decode, text.split(3000, seed=0))
    assert len(train) == len(held) == 3000
    assert all(s in whole[:cut] for s in train) and all(s in whole[cut:] for s in held)
    assert not any(s in whole[:cut] for s in held[:300])

# -----------------------------------------------------------------------------
# toy and dna


def test_toy_is_enumerable_and_has_many_separate_peaks():
    """No change of one letter improves them, so a greedy search from a lower one stays there."""
    assert Absorbing(4).is_small(6) and Absorbing(4, 16).is_small(6) and Uniform(4).is_small(6)
    assert not Absorbing(4, 100).is_small(6) and not Absorbing(4).is_small(8)
    everything = ["".join(letters) for letters in itertools.product("ACGT", repeat=6)]
    value = dict(zip(everything, toy.reward(everything)))
    by_hand = dict(TCTCTC=12, TCTCAA=10, TCAAAA=8, AAAAAA=6, GGGGGG=0, CTCTCT=8)
    assert [16 * value[s] for s in by_hand] == pytest.approx(list(by_hand.values()))
    peaks = {s for s in everything if not any(
        c != s[i] and value[s[:i] + c + s[i + 1:]] >= value[s] - 1e-6
        for i, c in itertools.product(range(6), "ACGT"))}
    assert len(peaks) == 13 and {"TCTCTC", "TCTCAA", "TCAAAA", "AAAAAA"} < peaks


def test_toy_data_follows_its_chain():
    x = toy.draw(20_000, seeded())
    assert torch.equal(x, toy.draw(20_000, seeded()))
    assert TASKS["toy"](7).draw(3, seeded()).shape == (3, 7)
    for a, b in itertools.product(range(4), repeat=2):
        before = x[:, :-1] == a
        count = ((x[:, 1:] == b) & before).sum().item()
        assert within(count, before.sum().item(), TOY_STEP[a, b].item())


def spell(*sites):
    """60 letters C with sites: "10 TGACTCA" starts at position 10."""
    letters = list("C" * 60)
    for start, site in map(str.split, sites):
        letters[int(start):int(start) + len(site)] = site
    return "".join(letters)


@pytest.mark.parametrize("value, sites", [
    (0, []), (0.5, ["10 TGACTCA"]), (0, ["10 TGACTGA"]),                        # AP-1; a letter off
    (0.75, ["10 TGACTCA", "30 TGAGTCA"]), (0.875, ["5 TGACTCA", "20 TGACTCA", "40 TGACTCA"]),
    (0.5, ["53 TGACTCA"]), (0, ["54 TGACTC"]),                                  # at the end, over
    (0.5, ["3 CAAAGTCCA"]), (0.5, ["3 TGGACTTTG"]),                             # on either strand
    (0.6, ["3 GTTAATAATTAAC"]), (0.6, ["3 GTTAATCATTAAC"]),                     # any middle letter
    (1.1, ["3 CAAAGTCCA", "30 GTTAATAATTAAC"]), (0.25, ["10 TGACTCA", "30 AGATAA"]),
    (0.125, ["10 TGACTCA", "30 AGATAA", "45 TTATCT"])])                         # GATA1 represses
def test_true_activity_by_hand(value, sites):
    assert true_activity(spell(*sites)) == pytest.approx(value)


def activity(samples):
    return torch.tensor([true_activity(s) for s in samples])


def test_both_strands_have_the_same_activity_and_gc_is_measured_too():
    samples = ["TGACTCA" + "G" * 43, "A" * 50]
    assert dna.measure(samples) == pytest.approx({"true activity": 0.25, "GC": (43 + 3) / 100})
    x = dna.draw(500, seeded())
    one, other = activity(dna.decode(x)), activity(dna.decode(3 - x.flip(1)))
    assert torch.allclose(one, other) and one.max() > 1


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
    new = dna.decode(dna.draw(1000, seeded(1)))
    torch.manual_seed(5)
    first = dna.reward(new)
    rewards.oracle.cache_clear()
    torch.manual_seed(5)
    assert torch.equal(first, dna.reward(new)) and not first.requires_grad
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))            # the run's own random numbers are untouched
    assert torch.allclose(first[:3], dna.reward(new[:3]), atol=1e-5)            # no batch effects
    assert torch.corrcoef(torch.stack((first, activity(new))))[0, 1] > 0.35
    rng = random.Random(0)
    rich, plain = (["".join(rng.choices(letters, k=50)) for _ in range(300)]
                   for letters in ("CG", "ACGT"))
    assert activity(rich).mean() < 0.2 and dna.reward(rich).mean() > dna.reward(plain).mean() + 0.15

# -----------------------------------------------------------------------------
# arithmetic, text, ehrlich


def test_a_sum_and_its_mirror_are_held_out_together():
    train, held = ({s[:6] for s in arithmetic.decode(x)} for x in arithmetic.split(20_000, seed=0))
    assert 300 < len(held) and not train & {f"{s[3:5]}+{s[:2]}=" for s in held}


def test_half_of_the_sums_are_wrong_in_one_digit():
    task, n, right = arithmetic, 10_000, 0
    sums = task.decode(task.draw(n, seeded()))
    for s in sums:
        wrong = sum(p != q for p, q in zip(s[6:], f"{int(s[:2]) + int(s[3:5]):03}"))
        assert s[2] == "+" and s[5] == "=" and wrong <= 1
        right += wrong == 0
    assert within(right, n, 0.5) and sum(task.reward(sums)) == right
    assert task.decode(task.prompts(task.encode(["12+34=046"]))) == ["12+34=___"]
    assert not any(task.reward(["12+34=46=", "1+234=046", "12+34=0460"]))


def test_the_reward_of_a_text_counts_distinct_known_words_of_four_letters(monkeypatch):
    """The text knows house, garden, and words of three letters, which do not count."""
    content = "the cat sat in the garden, the house. "
    monkeypatch.setattr(rewards, "corpus", lambda: content * 10)
    expected = {"house garden": 11, "garden house": 11, "house house ": 5, "houses garde": 0,
                "the cat sat ": 0, "house ......": 5, "            ": 0}
    values = TASKS["text"](12).reward(list(expected))
    assert values == pytest.approx([n / 12 for n in expected.values()])


def test_a_text_cannot_be_gamed_by_a_word_over_and_over():
    values = text.reward(text.decode(text.split(300, seed=0)[1]))
    assert sum(values) / len(values) > 0.4
    for string, most in (("this " * 9, 4 / 48), ("and the " * 6, 0), ("x" * 48, 0)):
        assert text.reward([string.ljust(48)[:48]])[0] <= most + 1e-9


def best_ehrlich():
    """All motifs one after the other, each letter repeated until the next is due."""
    x = []
    for motif, place in zip(ehrlich.wanted, ehrlich.places):
        x += motif.repeat_interleave(place.diff(append=place[-1:] + 1)).tolist()
    return torch.tensor([x + x[-1:] * (32 - len(x))])


def reward_of(x):
    return ehrlich.reward(ehrlich.decode(x))


def test_the_best_ehrlich_sequence_earns_one_and_each_loss_its_share():
    best, V = best_ehrlich(), torch.arange(20)
    assert ehrlich.is_feasible(best).all() and reward_of(best).item() == 1
    pairs = V.repeat_interleave(20)[:, None].repeat(1, 32)
    pairs[:, 1] = V.repeat(20)
    is_banned = ~ehrlich.is_feasible(pairs[:, :2])
    assert is_banned.sum() == 3 * 20 and not reward_of(pairs)[is_banned].any()
    assert not is_banned[pairs[:, 0] == pairs[:, 1]].any()      # a letter may always be repeated
    others = best.repeat(20, 1)
    others[:, 0] = V                                            # the first motif loses a letter
    others = others[ehrlich.is_feasible(others) & (V != ehrlich.wanted[0, 0])]
    assert {0.75} <= set(reward_of(others).tolist()) <= {0.75, 1.0}


def test_ehrlich_data_are_feasible_and_seldom_good():
    x = ehrlich.draw(2000, seeded())
    assert ehrlich.measure(ehrlich.decode(x)) == {"feasible": 1} and 0 < reward_of(x).mean() < 0.1
    x = torch.randint(20, (500, 32), generator=seeded())
    assert ehrlich.measure(ehrlich.decode(x))["feasible"] < 0.1 and reward_of(x).mean() < 0.01
    with pytest.raises(BadInput, match="--length=15: the motifs of ehrlich need 16 positions"):
        TASKS["ehrlich"](15)
    short = TASKS["ehrlich"](16)                        # there is but one best sequence
    assert short.reward(short.decode(short.wanted.view(1, 16))) == 1

# -----------------------------------------------------------------------------
# files of data and of rewards


def write(folder, content, name="data.txt"):
    if content is not None:
        content = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(folder / name)


def rows(task, n=1000):
    train, held = map(task.decode, task.split(n, seed=0))
    assert not set(train) & set(held)
    return train, held


@pytest.mark.parametrize("name", ["data.txt", "data.txt.gz"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", " \n\n \n"])
def test_one_sequence_per_line(tmp_path, name, line_end):
    sequences = ["".join(s) for s in itertools.product("ACGT", repeat=4)]
    content = "\ufeff" + line_end.join(["", *sequences, "", ""]).lower()
    train, held = rows(open_task("own", 4, write(tmp_path, content, name), alphabet="ACGT"))
    assert sorted(train + held) == sequences and 3 < len(held) < 30


@pytest.mark.parametrize("content", [
    ">one of two\nACG\nTTT\n>two\nGGGccc\n", "\ufeff>one\r\nACG\r\n\r\nTTT\r\n>\r\ngggccc"])
@pytest.mark.parametrize("name", ["x.fa", "x.fa.gz"])
def test_fasta_with_wrapped_lines_and_lower_case(content, name, tmp_path):
    file = write(tmp_path, content, name)
    assert rows(open_task("own", 6, file, alphabet="ACGT")) == (["ACGTTT", "GGGCCC"], [])


def test_case_is_kept_unless_the_alphabet_is_all_upper_case(tmp_path):
    file = write(tmp_path, "Acg\nccg\n")
    assert open_task("own", 0, file).alphabet == "Acg"
    assert rows(open_task("own", 0, file, alphabet="Acg"))[0] == ["Acg", "ccg"]
    with pytest.raises(BadInput, match="'C' at position 2 of 'ACG' is not in 'AG'"):
        open_task("own", 0, file, alphabet="AG")


@pytest.mark.parametrize("alphabet", ["", "CO"])
@pytest.mark.parametrize("space", [" ", "\t", "  "])
def test_names_after_smiles_are_noticed(alphabet, space, tmp_path):
    file = write(tmp_path, f"C\nCCO{space}ethanol\nCC{space}ethane\n")
    with pytest.raises(BadInput, match="line 2 holds white space. If names follow .* cut -f1"):
        open_task("own", 0, file, alphabet)
    file = write(tmp_path, "CC O\nO CC\n")              # a space may be a letter
    assert rows(open_task("own", 0, file, alphabet="CO "))[0] == ["CC O", "O CC"]


def test_windows_of_a_genome_avoid_foreign_letters(tmp_path):
    rng = random.Random(0)
    left, right = ("".join(rng.choices("ACGT", k=100)) for _ in range(2))
    file = write(tmp_path, f">chr\n{left}\nNNNNNR\n{right}\n".lower(), "g.fa.gz")
    drawn, _ = rows(open_task("own", 8, file, alphabet="ACGT", crop=True), 2000)
    assert len(drawn) == 2000 and all(s in left or s in right for s in drawn)
    with pytest.raises(BadInput, match="--data=.*g.fa.gz: 'N' at position 101 of .* not in 'ACGT'"):
        open_task("own", 206, file, alphabet="ACGT")


def test_cropping_takes_windows_of_each_line_and_holds_out_the_last(tmp_path):
    file = write(tmp_path, "\n".join(["C1CCCCC1", "CCO-CC=O"] * 20))
    assert set(rows(open_task("own", 8, file, crop=True), 50)[0]) == {"C1CCCCC1", "CCO-CC=O"}
    rng = random.Random(0)
    long = "".join(rng.choices("ACGT", k=400))
    file = write(tmp_path, f"ACGTACGTAC\n{long}\n")
    train, held = rows(open_task("own", 10, file, crop=True), 3000)
    assert all(s in long[:382] or s == "ACGTACGTAC" for s in train)
    assert held and all(s in long[381:] for s in held)


def test_a_running_text_brings_its_own_alphabet(tmp_path):
    content = "Zwölf_Boxkämpfer jagen\nViktor quer über\n\nden Sylter Deich. " * 10
    file = write(tmp_path, content)
    task = open_task("own", 12, file, crop=True)
    assert set(task.alphabet) == set(content) - {"\n"} and task.blank == "?" and task.pad == ""
    train, held = rows(task, 100)
    assert all(s in " ".join(content.split()) for s in train) and not held
    assert all(len(s) == 12 for s in train) and open_task("own", 0, file, crop=True).length == 64
    assert open_task("own", 0, write(tmp_path, "a b c"), crop=True).length == 5


def test_cropping_says_what_it_leaves_out(tmp_path):
    file = write(tmp_path, "ACGTACGT\nACG\nACGT\n")
    for length, left_out in ((0, 2), (4, 1), (3, 0)):
        note = open_task("own", length, file, crop=True).note
        assert f"{left_out} of 3 sequences are shorter" in note if left_out else not note


def test_letters_length_and_pad_are_what_the_file_needs(tmp_path):
    task = open_task("own", 0, write(tmp_path, "MKV\nMKVLAA\nacgu\n"))
    assert (task.alphabet, task.pad, task.length) == ("AKLMVacgu|", "|", 6)
    assert rows(task) == (["MKV|||", "MKVLAA", "acgu||"], [])
    file = write(tmp_path, "ab\nba\n")
    assert open_task("own", 0, file).pad == "" and open_task("own", 4, file).pad == "|"
    assert open_task("own", 0, write(tmp_path, "ab" * 50)).length == 100
    task = open_task("own", 5, write(tmp_path, "ACGTA\nAC\n"), "ACGT", "-")
    assert task.alphabet == "ACGT-" and rows(task)[0] == ["ACGTA", "AC---"]
    assert task.strings(task.split(2, 0)[0]) == ["ACGTA", "AC"]


@pytest.mark.parametrize("letters, pad", [
    ("[O-].*~$", "|"), ("a|", "^"), ("|^", "`"), ("|^`", "!"), ("!|^`", '"')])
def test_the_pad_is_a_letter_that_means_nothing(letters, pad, tmp_path):
    assert open_task("own", 0, write(tmp_path, f"{letters}\na\n")).pad == pad
    assert open_task("own", 9, write(tmp_path, "a\n"), alphabet="a" + letters).pad == pad


@pytest.mark.parametrize("n, line, flags", [
    (1, "A" * 99_999 + "\n\n", Own.SMALL), (1, "A" * 100_000, Own.LARGE),
    (2, "A" * 50_000 + "\n", Own.LARGE), (1, "ä" * 60_000, Own.SMALL)], ids=range(4))
def test_flags_depend_on_the_number_of_letters(n, line, flags, tmp_path):
    (tmp_path / "own.py").write_text("def score(samples): pass")
    more = dict(data=write(tmp_path, n * line, "data.txt.gz"), crop=True)
    assert open_task("own", **more).flags == flags
    assert open_task("own", reward=f"{tmp_path / 'own.py'}:score", **more).flags == flags | dict(
        exact=False, report_samples=None)               # queries cost


@pytest.mark.parametrize("content, more, message", [
    ("CCGG", dict(pad="A"), "--pad=A: one letter is needed that does not occur in the data"),
    ("ACGT", dict(pad="--"), "--pad=--: one letter is needed"),
    ("ACGT\nAC-T\n", dict(pad="-"), "--pad=-: one letter is needed"),
    ("ACGT\nACGTA\n", {}, "sequence 2: 'ACGTA' has 5 letters, the task 4"),
    ("ACG\nAC\n", dict(crop=True), "no sequence has 4 known letters in a row"),
    ("@read\nACGT\n+\nFFFF\n", {}, "it looks like FASTQ"),
    (">x\nACGT\n>y\nAC\nXT\n", {}, "sequence 2: 'X' at position 3 of 'ACXT' is not in 'ACGT'"),
    (">x\nACGT\n>y\n>z\nACGT\n", {}, "sequence 2 is empty"),
    ("ACGT\nA_GT\n", {}, "sequence 2: '_' at position 2 of 'A_GT' is not in"),
    (">a\n>b\nACGT\n", {}, "sequence 1 is empty"), ("\n \n", {}, "it is empty"),
    (b"\xff\xfe\x00A", {}, "it cannot be read as text"), (None, {}, "cannot be .*No such file")])
def test_files_that_cannot_be_used_get_a_line(content, more, message, tmp_path):
    file = write(tmp_path, content)
    with pytest.raises(BadInput, match=message) as error:
        open_task("own", 4, file, alphabet="ACGT", **more).split(100, 0)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"--data={file}: ") or "crop" in more


def test_damaged_files_and_flags_that_do_not_fit(tmp_path):
    file = write(tmp_path, "ACGT\n")
    (tmp_path / "torn.gz").write_bytes(gzip.compress(b"ACGT" * 1000)[:30])
    (tmp_path / "no.gz").write_text("ACGT")
    for name, message in (("torn.gz", "ended before"), ("no.gz", "Not a gzip"), ("", "Is a dir")):
        with pytest.raises(BadInput, match=f"--data=.*: it cannot be read as text: .*{message}"):
            open_task("own", 4, str(tmp_path / name))
    for more in (dict(task="dna", crop=True), dict(task="dna", pad="-"), dict(alphabet="ACGT"),
                 dict(task="own"), dict(task="dna", data=file), dict(data=file)):
        with pytest.raises(BadInput, match="--data brings its own task"):
            open_task(**more)
    with pytest.raises(BadInput, match="--task=nothing: choose one of toy, .*bring --data, or run"):
        open_task("nothing")
    with pytest.raises(BadInput, match="--length=7: arithmetic has 9 positions"):
        open_task("arithmetic", 7)
    assert [open_task(**more).length for more in (
        dict(task="arithmetic"), dict(task="arithmetic", length=9), dict(lr=3))] == [9, 9, 6]


def test_a_reward_file_may_define_columns_of_the_report_and_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour.py").write_text("LETTER = 'G'\n")
    (tmp_path / "own.py").write_text(
        "from neighbour import LETTER\n"
        "def score(samples): return [s.count(LETTER) for s in samples]\n"
        "def measure(samples): return {'G': sum(s.count('G') for s in samples)}\n"
        "def other(samples): return [0 for s in samples]\n")
    task, samples = open_task(reward=f"{tmp_path / 'own.py'}:score"), ["GGGCCC", "AAAAAG"]
    assert task.reward(samples) == [3, 1] and task.measure(samples) == {"G": 4}
    assert open_task(reward=f"{tmp_path / 'own.py'}:other").reward(samples) == [0, 0]
    assert toy.reward(["GG"]) == [0] and toy.measure(samples) == {}     # other tasks keep theirs


@pytest.mark.parametrize("code, name, error, message", [
    ("", "own.py", BadInput, "own.py: file.py:function is needed"),
    ("", "own.txt:score", BadInput, "file.py:function is needed"),
    ("", "other.py:score", BadInput, "other.py:score: .* a file that exists"),
    ("x = 1", "own.py:score", BadInput, "own.py has no function score"),
    ("score = None", "own.py:score", BadInput, "has no function score"),
    ("1 / 0", "own.py:score", ZeroDivisionError, "by zero"),
    ("0 +", "own.py:score", SyntaxError, "invalid"),
    ("import nowhere", "own.py:score", ModuleNotFoundError, "nowhere")])
def test_reward_files_that_cannot_be_used(code, name, error, message, tmp_path):
    """A line, but for what the file itself raises."""
    (tmp_path / "own.py").write_text(code)
    with pytest.raises(error, match=message) as raised:
        open_task(reward=str(tmp_path / name))
    assert "\n" not in str(raised.value)
