"""Runs that stop, and go on: kills, interruptions and faults; --resume, to the same numbers;
checkpoints; several processes, together and resumed.

Read first test_a_killed_run_resumes_to_the_same_numbers."""
import json
import math
import os
import random
import shutil
import signal
import time
from argparse import Namespace
from collections import Counter
from itertools import chain

import pytest
import torch

import ranks
import sample
import train
from exact import network
from helpers import (ROOT, TINY, asked, fails, finished, killed, launch, lines, noting_reward,
                     queried, quick_main, resume, rollouts, run, same, same_runs, saved_as, set_two,
                     share_of, torchrun, weights)
from helpers import toy, two  # noqa: F401  (fixtures)

# -----------------------------------------------------------------------------
# kills


def eventful(folder, *args):
    """The flags of a run with all that a checkpoint must remember; its reward notes queries."""
    reward = noting_reward(folder)
    known = folder / "known.csv"
    rows = ["".join(random.Random(i).choices("ACGT", k=8)) for i in range(12)]
    known.write_text("sample,reward\n" + "".join(f"{s},{s.count('T') / 8}\n" for s in rows))
    return [*TINY, "--task=toy", "--length=8", "--replay=1", "--dropout=0.1", "--save_every=0",
            "--explore=0.5", "--denoise=0", reward, f"--known={known}", f"--out={folder / 'run'}",
            *args]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbs -> its folder."""
    folder = tmp_path_factory.mktemp("whole") / "folder"
    finished(folder.parent, quick_main, eventful(folder))
    return folder


KILLS = {                       # phase, function, at which of its calls, before or after
    "in pre-training": ("pretrain", "train.step", 3, "after"),
    "between the phases": ("pretrain", "os.replace", 6, "after"),
    "inside the reward": ("finetune", "own.answer", 3, "before"),
    "between answer and line": ("finetune", "own.answer", 3, "after"),
    "after the line": ("finetune", "train.step", 2 * 4 + 1, "before"),
    "between updates": ("finetune", "train.step", 2 * 4 + 1, "after"),
    "at the save": ("finetune", "os.replace", 2 * 2 + 2, "before"),
    "between two saves": ("finetune", "os.replace", 2 * 2 + 2, "after"),
    "in the report": ("finetune", "own.answer", 4 + 2, "after")}
UNANSWERED = {"inside the reward", "between answer and line", "in the report"}


@pytest.mark.parametrize("point", KILLS)
def test_a_killed_run_resumes_to_the_same_numbers(point, whole, tmp_path):
    """SIGKILL, then --resume: every number is that of the run that nothing disturbed, and nothing
    is queried twice but the batch that had no line yet."""
    folder = tmp_path / "folder"
    killed(tmp_path, eventful(folder), *KILLS[point])
    batch = asked(folder)[-1]
    if KILLS[point][0] == "finetune":
        n = len(lines(folder / "run", "finetune"))
        assert n == (4 if point == "in the report" else 3 if "save" in point else 2)
    resume(folder / "run")
    assert same_runs(folder / "run", whole / "run")
    times = Counter(chain(*asked(folder)))
    twice = {sample for sample, n in times.items() if n > 1}
    assert twice == (set(batch) if point in UNANSWERED else set())
    assert times.keys() == set(chain(*asked(whole)))


def test_a_run_killed_again_and_again_ends_with_the_same_numbers(tmp_path):
    """SIGKILL at random moments, each further than the one before, until the run is done."""
    args = ["--task=toy", "--length=4", *TINY, "--pretrain_iters=30", "--iters=8",
            "--save_every=0", "--replay=1", "--denoise=9", "--dropout=0.1"]
    train.main([*args, f"--out={tmp_path / 'whole'}"])
    out, chance, n_kills = tmp_path / "killed", random.Random(0), 0
    process, = launch(tmp_path, quick_main, [*args, f"--out={out}"])
    while n_kills < 2:
        last = out / "last.pt"
        before = last.stat().st_mtime_ns if last.exists() else 0
        while process.is_alive() and not (last.exists() and last.stat().st_mtime_ns > before):
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.2))
        if not process.is_alive():
            break
        process.kill()
        process.join()
        n_kills += 1
        process, = launch(tmp_path, quick_main, [f"--out={out}", "--resume"])
    process.join(120)
    assert process.exitcode == 0 and n_kills > 0, (tmp_path / "printed").read_text()
    assert same_runs(out, tmp_path / "whole")


def test_ctrl_c_keeps_the_weights_and_says_how_to_continue(tmp_path):
    """Also where the parent ignores SIGINT, as a shell's background jobs do."""
    argv = ["--task=toy", f"--out={tmp_path}", *TINY, "--iters=100000"]
    process, = launch(tmp_path, quick_main, argv)
    metrics, deadline = tmp_path / "metrics.jsonl", time.time() + 60
    while time.time() < deadline and not (metrics.exists() and "finetune" in metrics.read_text()):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.join(120)
    printed = (tmp_path / "printed").read_text()
    assert process.exitcode == 130 and "Traceback" not in printed
    assert "the same command with --resume continues" in printed
    assert weights(tmp_path) and saved_as(tmp_path, "last")["iter"] > 0

# -----------------------------------------------------------------------------
# faults


@pytest.mark.parametrize("fault", ["nan", "raise"])
def test_a_reward_that_fails_midway_loses_nothing_and_the_run_resumes(fault, tmp_path, monkeypatch,
                                                                      capsys):
    """After --resume the numbers are those of a run without the fault, and what was paid for before
    it is not asked again. The fourth call of the reward is that of the third rollout."""
    good, paid, calls = share_of("C"), [], []
    set_two(monkeypatch, good, "ACGT", 6, exact=False)
    run(tmp_path / "whole", "--replay=1")

    def reward(samples):
        calls.append(len(samples))
        if len(calls) == 4 and fault == "raise":
            raise RuntimeError("the lab is closed")
        if len(calls) == 4:
            return [float("nan")] * len(samples)
        paid.extend(samples)
        return good(samples)
    set_two(monkeypatch, reward, "ACGT", 6, exact=False)
    with pytest.raises(RuntimeError if fault == "raise" else SystemExit):
        run(tmp_path / "broken", "--replay=1", "--save_every=0")
    assert fault == "raise" or "a finite number" in capsys.readouterr().err
    assert weights(tmp_path / "broken") and len(lines(tmp_path / "broken", "finetune")) == 2
    resume(tmp_path / "broken")
    assert len(paid) == len(set(paid)) > 20
    assert same_runs(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("full", ["last.part", "finetuned.part", "metrics.jsonl", "rewards.jsonl"])
def test_a_full_disk_is_a_line(full, tmp_path, monkeypatch, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    open_folder = train.open_folder

    def fill(*args):
        log = open_folder(*args)
        (tmp_path / full).unlink(missing_ok=True)
        (tmp_path / full).symlink_to("/dev/full")
        return log
    monkeypatch.setattr(train, "open_folder", fill)
    fails(train.main, ["--task=two", f"--out={tmp_path}", *TINY],
          "train.py: .*(cannot be written|No space)", capsys)
    assert not (tmp_path / "report.json").exists()              # it stopped there


def test_a_learning_rate_that_blows_up_ends_in_one_line_and_keeps_good_weights(tmp_path, capsys):
    run(tmp_path)
    args = ["--task=two", f"--out={tmp_path}", "--overwrite", *TINY, "--lr=1e38", "--iters=40"]
    fails(train.main, args, "is not finite: try a smaller learning rate", capsys)
    assert all(p.isfinite().all() for p in weights(tmp_path, "last").values())
    assert not (tmp_path / "finetuned.pt").exists()


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """Where the last update makes them so, no gradient tells."""
    model = network(2, 3)
    model.head.bias.data[1] = float("inf")
    with pytest.raises(train.BadInput, match="weights are not finite: .*; last.pt is good"):
        train.save(None, None, model, "finetuned.pt")


def test_a_damaged_checkpoint_and_one_with_code_are_refused(toy, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(toy, out)
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:200])
    fails(train.main, [f"--out={out}", "--resume"], "last.pt is damaged", capsys)

    other = tmp_path / "other"
    shutil.copytree(toy, other)
    torch.save(dict(phase="finetune", iter=2, log_size=0, model={}), other / "last.pt")
    fails(train.main, [f"--out={other}", "--resume"], "a run of another shape", capsys)
    assert same(weights(other), weights(toy))

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)
    torch.save(dict(model=Evil()), out / "finetuned.pt")
    fails(sample.main, [f"--run={out}"], "finetuned.pt is damaged or not", capsys)
    assert not (tmp_path / "owned").exists()

# -----------------------------------------------------------------------------
# --resume of runs that have ended, with other flags; --overwrite


def test_a_finished_run_forgets_what_was_logged_after_the_save(toy, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(toy, out)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"phase": "finetune", "iter": 5}\n{"phase": "fine')
    assert resume(out) == lines(toy)


def test_a_finished_run_asks_nothing_again_and_can_be_carried_on(tmp_path, monkeypatch):
    """More iterations go on from its weights; fewer than were done change nothing."""
    paid = []
    set_two(monkeypatch, lambda samples: paid.extend(samples) or share_of("C")(samples), "ACGT", 6,
            exact=False)
    run(tmp_path)
    n = len(paid)
    resume(tmp_path)
    assert len(paid) == n
    resume(tmp_path, "--iters=7")
    assert [line["iter"] for line in lines(tmp_path, "finetune")] == list(range(1, 8))
    config = tmp_path / "config.json"
    assert json.loads(config.read_text())["iters"] == 7 and len(paid) > n
    n, before, metrics = len(paid), weights(tmp_path), lines(tmp_path)
    assert resume(tmp_path, "--iters=6") == metrics and same(weights(tmp_path), before)
    assert json.loads(config.read_text())["iters"] == 7         # what the weights had
    resume(tmp_path, "--pretrain_iters=99")
    assert json.loads(config.read_text())["pretrain_iters"] == 6
    assert len(paid) == len(set(paid)) == n


def test_pre_training_ends_where_its_number_is_already_done(tmp_path):
    """Three steps of six are done, and two are wanted: fine-tuning starts with the three."""
    out = tmp_path / "run"
    killed(tmp_path, ["--task=toy", "--length=4", f"--out={out}", *TINY, "--save_every=0"],
           "pretrain", "os.replace", 3, "after")
    before = weights(out, "last")
    assert saved_as(out, "last")["iter"] == 3
    metrics = resume(out, "--pretrain_iters=2")
    assert json.loads((out / "config.json").read_text())["pretrain_iters"] == 3
    assert same(weights(out, "pretrained"), before) and not same(weights(out), before)
    assert [line["iter"] for line in metrics] == [1, 2, 3, 4]


def test_what_makes_a_run_what_it_is_cannot_change(toy, monkeypatch, capsys):
    before = (toy / "metrics.jsonl").read_text()
    fails(train.main, [f"--out={toy}", *TINY], "holds a run already", capsys)
    for flag, there in (("lr=0.5", "0.001"), ("task=dna", "toy"), ("reward=x.py:f", ";")):
        fails(train.main, [f"--out={toy}", "--resume", f"--{flag}"],
              f"--{flag.split('=')[0]}=.*: the run in .* has ?{there}", capsys)
    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    fails(train.main, [f"--out={toy}", "--resume"], "--processes=2: the run in .* has 1", capsys)
    assert (toy / "metrics.jsonl").read_text() == before


def test_a_clock_that_is_set_back_does_not_stop_the_saving(tmp_path):
    args, last = Namespace(out=tmp_path, save_every=30), tmp_path / "last.pt"
    assert train.is_time_to_save(args, False)           # there is none yet
    last.touch()
    for seconds, is_time in ((0, False), (-100, True), (100, True)):
        os.utime(last, (time.time() + seconds,) * 2)
        assert train.is_time_to_save(args, False) == is_time


def test_log_ratios_that_are_not_finite_end_the_run_and_what_was_paid_stays(tmp_path, monkeypatch,
                                                                           capsys):
    real = train.roll_out

    def broken(*args):
        *others, path = real(*args)
        path.logp[0] = math.inf
        return *others, path
    monkeypatch.setattr(train, "roll_out", broken)
    fails(train.main, ["--task=toy", f"--out={tmp_path}", *TINY],
          "log-ratios are not finite: .*; last.pt is good", capsys)
    assert len(queried(tmp_path)) > 1


def test_overwrite_keeps_the_rewards_that_were_paid_for(tmp_path):
    run(tmp_path)
    paid = (tmp_path / "rewards.jsonl").read_text()
    run(tmp_path, "--overwrite", "--seed=1")
    kept, = tmp_path.glob("rewards-*.jsonl")
    assert kept.read_text() == paid != (tmp_path / "rewards.jsonl").read_text()

def test_overwrite_keeps_no_policy_of_the_old_run(tmp_path, monkeypatch):
    run(tmp_path)
    assert (tmp_path / "best.pt").exists()
    monkeypatch.setattr(train, "is_best", lambda *_: False)
    run(tmp_path, "--overwrite")
    assert not (tmp_path / "best.pt").exists()

# -----------------------------------------------------------------------------
# several processes


def test_two_processes_learn_what_one_does_with_the_whole_batch(tmp_path):
    ranks.main(tmp_path / "one.pt")
    finished(tmp_path, ranks.main, tmp_path / "two.pt", n=2)
    one, both = (saved_as(tmp_path, name) for name in ("one", "two"))
    assert torch.equal(one["reward"], both["reward"])
    assert both["loss"].item() == pytest.approx(one["loss"].item(), rel=1e-3)
    begin = network(4, 6).state_dict()
    for name, weight in one["model"].items():
        assert torch.allclose(weight, both["model"][name], atol=1e-5)
    assert any(not torch.equal(weight, begin[name]) for name, weight in one["model"].items())


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A run of two processes, with one prompt each -> its folder."""
    folder = tmp_path_factory.mktemp("pair") / "folder"
    finished(folder.parent, quick_main, eventful(folder, "--prompts=2"), n=2)
    return folder


def test_metrics_are_of_the_rollouts_of_both_processes_which_differ(pair):
    out = pair / "run"
    drawn = {i: [old for old in rollouts(out) if old["iter"] == i] for i in range(5)}
    assert [len(both) for both in drawn.values()] == [1, 2, 2, 2, 2]        # first: --known
    for i, line in enumerate(lines(out, "finetune"), 1):
        first, second = drawn[i]
        assert not torch.equal(first["tokens"], second["tokens"])
        reward, log_ratio = (torch.cat([old[name][old["is_own"]] for old in (first, second)])
                             for name in ("reward", "log_ratio"))
        assert line["reward"] == pytest.approx(reward.mean().item(), abs=1e-12)
        assert line["reward_std"] == pytest.approx(reward.std(correction=0).item(), abs=1e-12)
        assert line["kl"] == pytest.approx(log_ratio.mean().item(), abs=1e-12)
    assert line["best"] == max(old["reward"].max() for both in list(drawn.values())[1:]
                               for old in both)
    assert line["queries"] == len(queried(out))


def test_two_processes_ask_no_sample_twice(pair):
    """Over the whole run; and each of them asks about a half of the new samples."""
    batches = asked(pair)
    samples = list(chain(*batches))
    assert len(samples) == len(set(samples)) > 100 and len(batches) > 8
    paid = [json.loads(line)["sample"] for line in open(pair / "run" / "rewards.jsonl")]
    assert sorted(paid) == sorted(samples)


def test_a_killed_run_of_two_processes_resumes_to_the_same_numbers(pair, tmp_path):
    """The second process is killed inside the reward, in the third rollout; torchrun resumes."""
    folder = tmp_path / "folder"
    killed(tmp_path, eventful(folder, "--prompts=2"), "finetune", "own.answer", 3, "before",
           n=2)
    assert len(lines(folder / "run", "finetune")) == 2
    before = set(chain(*asked(folder)[-2:]))
    torchrun(tmp_path, ROOT / "train.py", f"--out={folder / 'run'}", "--resume",
             "--save_every=30")
    assert same_runs(folder / "run", pair / "run")
    times = Counter(chain(*asked(folder)))
    assert {sample for sample, n in times.items() if n > 1} == before
