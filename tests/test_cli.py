"""The command line of train.py and sample.py: flags and their help, bad input, what the user is
told; samples, pictures and the report.

Read first test_bad_flags_get_a_short_message_and_status_2."""
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import traceback
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import rewards
import sample
import sepo
import train
from diffusion import Absorbing, Uniform
from helpers import (TINY, captured, fails, launch, lines, queried, run, same, saved_as, set_two,
                     share_of, weights)
from helpers import toy, two  # noqa: F401  (fixtures)
from rewards import TASKS, BadInput, RewardLog, hold


def printed_rows(capsys):
    return [line.split() for line in capsys.readouterr().out.splitlines()]

# -----------------------------------------------------------------------------
# flags


@pytest.mark.parametrize("args, message", [
    (["--grup=8"], "unrecognized arguments: --grup=8"),
    (["--crop", "True"], "unrecognized arguments: True"),
    (["--group=1"], "--group must be at least 2"),
    (["--task=toi"], "--task=toi: choose one of toy, dna, "),
    (["--iters=1.5"], "argument --iters: invalid int value: '1.5'"),
    (["--beta=inf"], "--beta and --lr must be at least 0"),
    (["--prompts=0"], "--prompts, --updates, --eval_every and --n_layer 1"),
    (["--n_layer=0"], "--n_layer 1"),
    (["--lr=nan"], "--beta and --lr must be at least 0"),
    (["--iters"], "argument --iters: expected one argument"),
    (["--n_embd=30"], "n_embd must be even and a multiple of --n_head"),
    (["--algo=prdp", "--beta=0"], "prdp, wdce and --explore need --beta above 0"),
    (["--algo=wdce", "--process=uniform"], "wdce and --explore are for .* --process=absorb"),
    (["--explore=0.5", "--process=uniform"], "wdce and --explore are for .* --process=absorb"),
    (["--algo=wdce", "--replay=1"], "--algo=wdce learns from all, .* no --replay"),
    (["--algo=wdce", "--corrector_steps=1"], "wdce and --explore are .* no corrector"),
    (["--algo=wdce", "--beta=0"], "prdp, wdce and --explore need --beta above 0"),
    (["--task=arithmetic", "--algo=wdce", "--replay=0"], "wdce and --explore are for tasks"),
    (["--explore=1"], "--explore and --dropout must be below 1"),
    (["--corrector_t=1"], "--corrector_t must be between 0 and 1"),
    (["--dropout=1"], "--dropout must be below 1"),
    (["--on_error=nan"], "--on_error must be a finite number"),
    (["--clip=-1"], "must be at least 0, as --clip"),
    (["--replay=-1"], "must be at least 0, as .*--replay"),
    (["--algo=wdce", "--min_ess=nan"], "must be at least 0, as .*--min_ess"),
    (["--algo=loop", "--clip_mode=cap"], "--clip_mode is for --algo=sepo"),
    (["--algo=published", "--process=uniform"], "--algo=published needs --process=absorb"),
    (["--algo=published", "--replay=1"], "--algo=published needs .* --replay=0"),
    (["--data=x.txt"], "--data brings its own task, .*: leave out --task"),
    (["--pad=N"], "--data brings its own task, with --alphabet, --pad and --crop"),
    (["--task=own"], "--data brings its own task"),
    (["--reward=x.py:f"], "--reward=.*x.py:f: file.py:function is needed, and a file that exists"),
    (["--known=x.csv"], "--known=.*x.csv cannot be read: .*No such file"),
    (["--on_error=go"], "argument --on_error: invalid float value: 'go'"),
    (["--device=cuda"], "sees no CUDA device"),
    (["--device=mps"], "--device=mps has no float64"),
    (["--resume"], "holds no run")])
def test_bad_flags_get_a_short_message_and_status_2(args, message, tmp_path, capsys):
    if args == ["--device=cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    args = ["--task=toy", "--data_size=100", f"--out={tmp_path / 'run'}", *args]
    err = fails(train.main, args, message, capsys)
    assert err.count("\n") <= 2 and not (tmp_path / "run").exists()


def test_data_without_a_reward_gets_a_line(tmp_path, capsys):
    (tmp_path / "data.txt").write_text("ACGT\nACCA\n" * 9)
    fails(train.main, [f"--data={tmp_path / 'data.txt'}", f"--out={tmp_path / 'run'}"],
          "has no reward: give it one, or --reward", capsys)
    assert not (tmp_path / "run").exists()


def test_a_value_follows_a_space_or_an_equals_sign(tmp_path):
    typed = {"lr": 0.5, "algo": "loop", "iters": 3, "on_error": -1.0}
    out, pairs = ["--out", str(tmp_path / "x")], [(f"--{k}", str(v)) for k, v in typed.items()]
    spaced, _ = train.read_flags([*out, *(part for pair in pairs for part in pair)])
    joined, _ = train.read_flags([*out, *map("=".join, pairs)])
    assert spaced == joined and {k: getattr(joined, k) for k in typed} == typed


def test_defaults_are_those_of_the_task_the_chain_the_method_then_what_was_typed(tmp_path):
    def flags(*args):
        return train.read_flags([f"--out={tmp_path / 'x'}", *args])[0]
    assert flags().exact and flags().replay == 15 and flags().updates == 1
    assert flags("--algo=wdce").replay == 0 and flags("--algo=wdce", "--replay=0").updates == 16
    text = flags("--task=text")
    assert (text.algo, text.explore, text.pretrain_iters) == ("wdce", 0.5, 800)
    text = flags("--task=text", "--algo=sepo", "--process=uniform", "--pretrain_iters=7")
    assert (text.explore, text.pretrain_iters, text.pretrain_lr) == (0, 7, 1e-3)


@pytest.mark.parametrize("program", [train, sample])
def test_every_flag_is_explained_with_its_default(program, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(["--help"])
    shown = capsys.readouterr().out
    words = "".join(shown.split())                              # lines are broken anywhere
    explained = {action.dest: action.help.replace("%%", "%")
                 for action in sample.parser_of(program.Flags, "")._actions}
    assert stop.value.code == 0 and len(explained) >= 12
    assert {field.name for field in fields(program.Flags)} == set(explained) - {"help"}
    for field in fields(program.Flags):
        text = explained[field.name]
        assert text and "".join(text.split()) in words, field
        if type(field.default) in (int, float):
            value, = re.findall(rf"^  --{field.name} (\S+)", shown, re.M)
            assert float(value) == field.default
    if program is train:
        defaults = shown[shown.index("\ndefaults of"):]
        assert re.search("  uniform: .*--pretrain_iters=2000", defaults)
        assert re.search("  toy: .*--n_embd=64", defaults)
        assert "--itersmaydiffer,andwhileitpre-trains" in words     # a comment's second line


def test_the_size_of_the_network_follows_the_size_of_the_data(tmp_path):
    (tmp_path / "own.py").write_text("def f(samples): return [1.0] * len(samples)\n")
    found = []
    for n in (100, 200_000):
        (tmp_path / "data.txt").write_text("ACGT\n" * (n // 5))
        args, _ = train.read_flags([f"--data={tmp_path / 'data.txt'}", f"--out={tmp_path / 'x'}",
                                    f"--reward={tmp_path / 'own.py'}:f"])
        assert (args.task, args.algo, args.lr, args.replay) == ("own", "sepo", 2e-3, 3)
        found.append((args.n_layer, args.n_embd, args.pretrain_iters))
    assert found == [(2, 64, 500), (4, 128, 3000)]

# -----------------------------------------------------------------------------
# what the user is told


def test_the_start_says_which_reward_is_asked_and_how_often(tmp_path, capsys):
    """Rewards: 4 rollouts of 8, the optimum of the toy, 3 n in the report (from 64 on 4 n more).
    """
    def said(name, **changes):
        args, task = train.read_flags([f"--task={name}", f"--out={tmp_path / 'a'}", *TINY])
        vars(args).update(changes)
        task.data, task.held = task.split(1000, 0)
        task.note = "something is left out"
        train.announce(args, task, "cpu", args.exact)
        return capsys.readouterr().err, task
    err, task = said("toy")
    assert "task toy: 1,000 sequences of 6 letters 'ACGT', such as '" in err
    assert ("; 0 others held out\nwarning: something is left out\n"
            "reward: the one built into toy; queries, at most: 2 to try it, "
            "32 in rollouts, 4,096 for the exact optimum, 60 in the report\n"
            f"method sepo, beta 0.1; cpu; results in {tmp_path / 'a'}\n") in err
    for every, evaluations in ((2, 512), (3, 512), (9, 256)):   # the last rollout is evaluated, too
        err, task = said("arithmetic", eval_every=every)
        assert (f"queries, at most: 2 to try it, 2,048 in rollouts, {evaluations} in evaluations, "
                "60 in the report\n") in err
    assert f"{len(task.data)} sequences of 9 letters '0123456789+=', such as " in err
    assert f"; {len(task.held)} others held out" in err and 20 < len(task.held) < 90
    (tmp_path / "own.py").write_text("def score(samples): return [len(set(s)) for s in samples]\n")
    (tmp_path / "data.txt").write_text("\n".join(["AB" * 5, "BA" * 5, "CCCCCAAAAA"] * 10))
    args = [f"--data={tmp_path / 'data.txt'}", f"--reward={tmp_path / 'own.py'}:score", *TINY[:-1]]
    train.main([*args, f"--out={tmp_path / 'b'}", "--group=80"])
    err = capsys.readouterr().err
    assert "own.py:score; queries, at most: 2 to try it, 320 in rollouts, 12 in the report\n" in err
    paid = queried(tmp_path / "b", "stage")
    assert 0 < sum(line["stage"].startswith("report") for line in paid) <= 12


def test_equal_rewards_are_noticed(tmp_path, monkeypatch, capsys):
    set_two(monkeypatch, lambda samples: [0] * len(samples))
    run(tmp_path)
    assert ("warning: the rewards of the first rollout: 100% are equal: a finer reward would tell "
            "more\n") in capsys.readouterr().err


def flags(**changes):
    return train.Flags(**{**dict(out=Path("nowhere")), **changes})


@pytest.mark.parametrize("share, is_told", [(0.75, False), (0.85, True), (1, True)])
def test_rewards_far_from_the_data_are_noticed(share, is_told, capsys):
    train.advise(flags(), (torch.arange(100) >= 100 * share).double())
    assert ("are equal: a finer reward would tell more" in capsys.readouterr().err) == is_told


@pytest.mark.parametrize("beta, is_told", [(0.04, True), (0.06, False), (4, False), (6, True)])
def test_a_beta_that_cannot_work_is_noticed(beta, is_told, capsys):
    """The rewards 0 and 10 deviate by 5 from their mean: beta is to be between a hundredth of it
    and all of it; better between a quarter and a half."""
    train.advise(flags(beta=beta), torch.tensor([0.0, 10.0] * 4).double())
    err = capsys.readouterr().err
    assert (f"they spread by 5, and one nat of KL costs --beta={beta:g}: --beta=1.2 to 2.5 may do "
            "better, with --init=nowhere/pretrained.pt --known=nowhere/rewards.jsonl, another "
            "--out\n" in err) == is_told
    train.advise(flags(beta=beta), torch.zeros(0).double())     # all failed
    assert not capsys.readouterr().err


def test_a_penalty_far_below_all_others_is_named(capsys):
    """One of ten earns -1e9, the others between 0 and 1; with 0 for it all is well."""
    for penalty, is_told in ((-1e9, True), (0, False)):
        train.advise(flags(), torch.tensor([penalty, *torch.linspace(0, 1, 9)]).double())
        err = capsys.readouterr().err
        assert ("-1e+09 is far below all others" in err) == is_told and "--beta" not in err


@pytest.mark.parametrize("gain, is_told", [(0.0, True), (0.1, True), (0.5, False)])
def test_a_run_that_has_gained_nothing_halfway_gets_a_line(gain, is_told, capsys):
    """Rewards 0 and 1; after ten rollouts of eight the first two and the last two are compared:
    0.5 +- 0.18. What was known or recombined does not count."""
    R, own = torch.tensor([[0.0, 1.0] * 4 + [9.0]]), torch.tensor([[True] * 8 + [False]])
    buffer = [sepo.Rollout(i, None, None, own, None, None, (R + gain * (i > 8)).double())
              for i in range(11)]
    train.advise_halfway(buffer)
    err = capsys.readouterr().err
    assert ("after half of the rollouts the mean reward is" in err) == is_told
    assert (", and was 0.5 at first" in err) == is_told


def test_too_few_rollouts_are_not_judged(capsys):
    """A fifth of nine is one rollout, of four none."""
    own, R = torch.ones(1, 8, dtype=torch.bool), torch.tensor([[0.0, 1.0] * 4]).double()
    for n in (4, 9):
        train.advise_halfway([sepo.Rollout(i, None, None, own, None, None, R)
                              for i in range(1, n + 1)])
    assert not capsys.readouterr().err


def test_a_terminal_without_utf_8_shows_an_escape(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    sample.print_any_letter()
    print("A\xb5", flush=True)
    print("A\xb5", file=sys.stderr, flush=True)
    assert sys.stdout.buffer.getvalue() == sys.stderr.buffer.getvalue() == b"A\\xb5\n"


def test_a_second_run_in_one_folder_is_refused(tmp_path):
    """By its lock, which another process holds until it ends."""
    code = ("import fcntl, sys; lock = open(sys.argv[1], 'w'); fcntl.lockf(lock, fcntl.LOCK_EX); "
            "print('locked', flush=True); input()")
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "lock")], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(BadInput, match=f"another process runs in {tmp_path}"):
            hold(tmp_path)
        other.communicate("")
    assert hold(tmp_path)


def can_be_locked(folder):
    """By another process."""
    code = "import sys, fcntl; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    return not subprocess.run([sys.executable, "-c", code, str(folder / "lock")],
                              stderr=subprocess.DEVNULL).returncode


def test_a_folder_is_locked_while_its_run_goes_on(tmp_path, two, monkeypatch):
    found = []
    monkeypatch.setattr(train, "finetune", lambda *_: found.append(can_be_locked(tmp_path)))
    run(tmp_path, "--report_samples=0")
    assert found == [False] and can_be_locked(tmp_path)


def test_without_locks_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "fcntl", None)
    assert hold(tmp_path) is None


def test_the_advice_can_be_taken(tmp_path, capsys):
    run(tmp_path / "a", "--beta=9", "--group=60")
    beta, init, known = re.findall(r"warning: .*: (--beta=\S+) to .*, with (--init=\S+) "
                                   r"(--known=\S+), another", capsys.readouterr().err)[0]
    run(tmp_path / "b", beta, init, known)
    assert same(weights(tmp_path / "b", "pretrained"), weights(tmp_path / "a", "pretrained"))
    known = {line["sample"] for line in map(json.loads, open(tmp_path / "a" / "rewards.jsonl"))}
    assert known.isdisjoint(line["sample"] for line in queried(tmp_path / "b"))
    assert not any(line["phase"] == "pretrain" for line in lines(tmp_path / "b"))


def test_measure_is_tried_before_anything_is_paid_or_written(tmp_path):
    (tmp_path / "own.py").write_text("def score(samples): raise ValueError('it was paid')\n"
                                     "def measure(samples): return {'x': 1 / 0}\n")
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "out", f"--reward={tmp_path / 'own.py'}:score", task="toy")
    assert not (tmp_path / "out").exists()


def test_a_reward_that_raises_shows_its_own_traceback_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "own.py").write_text("def score(samples):\n"
                                     "    raise ValueError('the lab is shut')\n")
    with pytest.raises(RuntimeError) as stop:
        run(tmp_path / "out", f"--reward={tmp_path / 'own.py'}:score", task="toy")
    shown = "".join(traceback.format_exception(stop.value))
    assert "own.py\", line 2, in score" in shown and "ValueError: the lab is shut" in shown
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder_is_a_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    fails(train.main, [f"--out={tmp_path / 'file' / 'run'}", *TINY], "Not a directory", capsys)
    assert (tmp_path / "file").read_text() == ""


def test_a_run_folder_stands_by_itself(tmp_path, capsys):
    """Alphabet, pad and length are in the checkpoint; without data and reward: no scores."""
    (tmp_path / "own.py").write_text("def score(s): return [len(x) for x in s]\n")
    (tmp_path / "data.txt").write_text("\n".join(["MKV", "MKVLA", "LLA"] * 5))
    train.main([f"--out={tmp_path / 'out'}", *TINY, f"--data={tmp_path / 'data.txt'}",
                f"--reward={tmp_path / 'own.py'}:score"])
    (tmp_path / "data.txt").write_text("MKVLAA\nLLA\n" * 5)     # the same letters, another length
    capsys.readouterr()
    sample.main([f"--run={tmp_path / 'out'}", "--n=2"])
    err = capsys.readouterr().err
    assert re.search("data.* has other letters or another length than when", err)
    for gone in ("own.py", "data.txt"):
        (tmp_path / gone).unlink()
    sample.main([f"--run={tmp_path / 'out'}", "--n=30"])
    out, err = capsys.readouterr()
    assert "no scores (nan): --data=" in err and len(out.splitlines()) == 30
    assert set("".join(line.split()[-1] for line in out.splitlines())) <= set("MKVLA")

# -----------------------------------------------------------------------------
# the report


def test_the_measures_of_diversity_by_hand():
    """Three samples: pairs differ in 2, 1 and 1 of 2 positions."""
    task = TASKS["toy"](2)
    assert sample.diversity(task, ["AA", "CA", "AG"]) == pytest.approx(
        dict(distinct=1, hamming=(2 + 1 + 1) / 3 / 2))
    assert sample.diversity(task, ["AA", "AA"]) == dict(distinct=0.5, hamming=0)


def test_the_report_says_what_it_asks_and_notes_an_exploited_reward(tmp_path, monkeypatch, capsys):
    """Its numbers: the KL of the samples' paths, 0 before and a lot after; and of each group of 16
    the best (of 16 samples with 3 letters of two it has 2.9 of 3 points, for a fair coin)."""
    asked = []
    set_two(monkeypatch, lambda samples: asked.extend(samples) or share_of("1")(samples),
            exact=False)
    run(tmp_path, "--iters=30", "--updates=8", "--lr=0.01", "--beta=0", "--group=16",
        "--report_samples=80")
    printed = capsys.readouterr().out
    assert "the report made 0 more queries" in printed and len(asked) == len(set(asked)) == 8
    assert "much more alike" in printed and "a reward that forbids it" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["pre-trained"]["kl"] == pytest.approx(0, abs=1e-4)
    assert 1 < report["fine-tuned"]["kl"] < 5 and report["fine-tuned"]["reward"] > 0.9
    for row in report.values():                     # a sample has 3 letters of two
        assert row["n"] == (20 if row is report["best of 16"] else 80)
        assert 0 <= row["error"] < 0.5 / row["n"] ** 0.5
    assert report["pre-trained"]["error"] > 0.1 / 80 ** 0.5
    assert report["best of 16"]["reward"] > 0.85 > 0.75 > report["pre-trained"]["reward"]


def test_best_of_16_is_the_best_of_each_prompts_own_samples(tmp_path, monkeypatch):
    """Its KL is at most log 16 - 15/16."""
    asked = captured(monkeypatch, RewardLog, "query")
    run(tmp_path, "--iters=1", "--pretrain_iters=1", "--prompts=1", "--data_size=2000",
        "--report_samples=64", task="arithmetic")
    (samples, rewards), = [(call[2], call[-1]) for call in asked if "report 16" in call]
    groups = [samples[i:i + 16] for i in range(0, 256, 16)]
    prompts = [{sample[:6] for sample in group} for group in groups]
    assert all(len(prompt) == 1 for prompt in prompts) and len(set.union(*prompts)) > 8
    row = json.loads((tmp_path / "report.json").read_text())["best of 16"]
    assert row["kl"] == pytest.approx(math.log(16) - 15 / 16) and row["n"] == 16
    assert row["reward"] == pytest.approx(rewards.view(16, 16).amax(dim=1).mean().item())


@pytest.mark.parametrize("shift, is_told", [(0, False), (0.8, False), (-9, True)])
def test_a_policy_below_best_of_16_at_no_less_kl_gets_a_note(shift, is_told, tmp_path, monkeypatch,
                                                             capsys):
    """The pre-trained policy is below it at a KL of 0; one without the letter 1 at a large KL. At
    0.8 samples are a little more alike, which is not much."""
    def finetune(args, task, process, model, *rest):
        model.head.bias.data[1] += shift
    monkeypatch.setattr(train, "finetune", finetune)
    run(tmp_path, "--report_samples=80")
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert "share_of_optimum" not in report["pre-trained"]
    assert (report["fine-tuned"]["exact_kl"] > 0.01) == bool(shift)
    assert ("note: best of 16 has more reward" in printed) == is_told
    assert ("much more alike" in printed) == is_told


def test_the_report_counts_pads_inside_of_samples(tmp_path, monkeypatch):
    """The reward sees no pad, so it would not notice them: the data has them at the end alone."""
    (tmp_path / "own.py").write_text("def score(s): return [len(x) for x in s]\n")
    (tmp_path / "data.txt").write_text("\n".join(["MKV", "MKVLA", "LLA"] * 10))
    drawn = captured(monkeypatch, Absorbing, "sample")
    out = tmp_path / "out"
    train.main([f"--out={out}", *TINY, f"--data={tmp_path / 'data.txt'}",
                f"--reward={tmp_path / 'own.py'}:score"])
    report = json.loads((out / "report.json").read_text())
    alphabet, pad = (saved_as(out, "finetuned")[name] for name in ("alphabet", "pad"))
    assert report["data"]["inner pads"] == 0 and alphabet[-1] == pad
    for name, (*_, (tokens, _)) in zip(("pre-trained", "fine-tuned"), drawn[-2:]):
        is_pad = tokens == alphabet.index(pad)
        is_inner = (is_pad[:, :-1] & ~is_pad[:, 1:]).any(dim=1)
        assert report[name]["inner pads"] == is_inner.double().mean().item() > 0

# -----------------------------------------------------------------------------
# sample.py


def test_samples_as_text_fasta_and_json(toy, capsys):
    arguments = [f"--run={toy}", "--n=5", "--seed=3"]
    sample.main(arguments)
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert len(rows) == 5 and "5 samples" in err and "mean reward" in err
    for reward, string in rows:
        assert float(reward) == pytest.approx(TASKS["toy"]().reward([string])[0], abs=1e-4)
    sample.main([*arguments, "--format=fasta"])
    fasta = capsys.readouterr().out.splitlines()
    assert [line for line in fasta if line[0] != ">"] == [string for _, string in rows]
    sample.main([*arguments, "--format=jsonl"])
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [item["sample"] for item in objects] == [string for _, string in rows]


def test_weights_that_are_not_finite_are_refused(toy, tmp_path, capsys):
    saved = saved_as(toy, "finetuned")
    saved["model"]["blocks.0.up.weight"][3, 1] = float("nan")
    torch.save(saved, tmp_path / "finetuned.pt")
    err = fails(sample.main, [f"--run={tmp_path}"], "blocks.0.up.weight is not finite", capsys)
    assert err.count("\n") == 1


def test_a_reward_that_fails_for_the_whole_start_check_stops(tmp_path, monkeypatch, capsys):
    set_two(monkeypatch, lambda samples: [None] * len(samples))
    fails(train.main, ["--task=two", f"--out={tmp_path / 'a'}", *TINY, "--on_error=0"],
          "the reward fails for the first samples of the data", capsys)
    assert not (tmp_path / "a").exists()


def test_a_sample_that_failed_at_the_start_has_no_answer(tmp_path, monkeypatch):
    """The second of the first two sequences of the data, which are asked from the back."""
    set_two(monkeypatch, lambda samples: [None if s[0] == "1" else 0.5 for s in samples],
            exact=False)
    monkeypatch.setattr(TASKS["two"], "draw", lambda task, n, generator: torch.tensor(
        [[0, 1, 0], [1, 1, 1]] * 20))
    run(tmp_path, "--on_error=-1", "--iters=1")
    assert [line["sample"] for line in queried(tmp_path, "stage")
            if line["stage"] == "check"] == ["010"]


def test_a_seed_draws_the_same_samples_again(toy, capsys):
    found = []
    for seed in (1, 2, 1):
        sample.main([f"--run={toy}", "--n=20", f"--seed={seed}"])
        found.append(printed_rows(capsys))
    assert found[0] == found[2] != found[1]


def test_a_low_temperature_draws_the_likeliest_letter_and_edits_no_weights(toy, tmp_path, capsys,
                                                                           monkeypatch):
    """A head that gives A an advantage of half a nat: exp(50) to 1 at temperature 0.01."""
    out = tmp_path / "run"
    shutil.copytree(toy, out)
    saved = saved_as(out, "finetuned")
    saved["model"]["head.weight"].zero_()
    saved["model"]["head.bias"] = torch.tensor([0.5, 0.0, 0.0, 0.0])
    torch.save(saved, out / "finetuned.pt")
    loaded, drawn = captured(monkeypatch, sample, "load_model"), {}
    for temperature in (0.01, 1):
        sample.main([f"--run={out}", "--n=20", f"--temperature={temperature}"])
        drawn[temperature] = {string for _, string in printed_rows(capsys)}
    assert drawn[0.01] == {"AAAAAA"} and len(drawn[1]) > 10
    for *_, (model, _) in loaded:
        assert same(model.state_dict(), saved["model"])


def test_what_sample_asks_is_kept_unless_the_run_still_goes_on(toy, tmp_path, capsys, monkeypatch):
    """Nor where there are no locks, or nothing can be written; then the lock is free again."""
    out, asked = tmp_path / "run", []
    shutil.copytree(toy, out)
    before, real, real_hold = len(queried(out, "stage")), TASKS["toy"].reward, sample.hold
    monkeypatch.setattr(TASKS["toy"], "reward", lambda task, samples: (
        asked.extend(samples) or real(task, samples)))

    def fail(error):
        raise error
    for lock in (lambda _: None, lambda _: fail(BadInput()), lambda _: fail(PermissionError()),
                 real_hold):
        monkeypatch.setattr(sample, "hold", lock)
        sample.main([f"--run={out}", "--n=50"])
    known = {line["sample"] for line in queried(toy) + queried(toy, "stage")}
    new = {string for _, string in printed_rows(capsys)} - known
    lines = queried(out, "stage")[before:]
    assert len(new) > 5 and {line["sample"] for line in lines} == new
    assert {line["stage"] for line in lines} == {"sample"} and len(asked) == 4 * len(new)
    assert can_be_locked(out)
    sample.main([f"--run={out}", "--n=50"])
    assert len(asked) == 4 * len(new)


def test_the_best_that_was_ever_asked(toy, capsys):
    """In rollouts: without what was asked before the run, or for the report."""
    found = {line["sample"]: line["reward"] for line in queried(toy)}
    sample.main([f"--run={toy}", "--best=5"])
    rows = printed_rows(capsys)
    assert len({string for _, string in rows}) == 5
    assert [float(reward) for reward, _ in rows] == pytest.approx(
        sorted(found.values(), reverse=True)[:5], abs=1e-4)
    assert all(found[string] == pytest.approx(float(reward), abs=1e-4) for reward, string in rows)
    sample.main([f"--run={toy}", "--best=3", "--format=fasta"])
    assert capsys.readouterr().out.count(">sample_") == 3


def test_the_best_is_none_that_failed(tmp_path):
    file = tmp_path / "rewards.jsonl"
    rows = [dict(sample="A", reward=1.0, iter=1), dict(sample="B", reward=9.0, iter=1, failed=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [*sample.best_found(file, 5)] == [("A",), (1.0,)]


def test_a_loaded_model_has_no_dropout_and_takes_turns_with_the_prompts(toy):
    model, saved = sample.load_model(toy / "finetuned.pt")
    assert not any(module.training for module in model.modules())
    prompts = torch.arange(3)[:, None]
    assert sample.read_prompts(None, "", prompts, 5).flatten().tolist() == [0, 1, 2, 0, 1]


def test_the_report_asks_a_tenth_of_all_prompts_rollouts(tmp_path):
    args, _ = train.read_flags(["--task=two", f"--out={tmp_path}", "--iters=29", "--prompts=10",
                                "--group=4"])
    assert args.report_samples == 16


def test_prompts_comparison_movie_and_histogram(toy, tmp_path, capsys):
    gif, png = tmp_path / "a.gif", tmp_path / "a.png"
    sample.main([f"--run={toy}", "--n=3", "--prompt=TC____", "--compare", f"--movie={gif}",
                 f"--plot={png}", "--steps=4"])
    out = capsys.readouterr().out.splitlines()
    assert "pretrained" in out[0] and "finetuned" in out[0] and len(out) == 4
    assert all(column[:2] == "TC" for line in out[1:] for column in line.split()[1::2])
    assert gif.read_bytes()[:4] == b"GIF8" and png.read_bytes()[:4] == b"\x89PNG"


def test_a_uniform_run_is_sampled_and_filmed(tmp_path, capsys):
    run(tmp_path, "--process=uniform", "--steps=5")
    capsys.readouterr()
    sample.main([f"--run={tmp_path}", "--n=2", f"--movie={tmp_path / 'a.gif'}"])
    assert len(printed_rows(capsys)) == 2 and (tmp_path / "a.gif").read_bytes()[:4] == b"GIF8"


def test_samples_have_the_steps_of_the_run_or_those_that_were_typed(tmp_path, monkeypatch):
    run(tmp_path, "--process=uniform", "--steps=5", "--iters=0", "--report_samples=0")
    plans = captured(monkeypatch, Uniform, "plan")
    for steps in ([], ["--steps=3"], ["--steps=0"]):
        sample.main([f"--run={tmp_path}", "--n=2", *steps])
    assert [len(call[-1][1]) for call in plans] == [5, 3, 16]


def test_the_best_have_a_histogram_and_the_best_model_stands_beside(toy, tmp_path, capsys):
    sample.main([f"--run={toy}", "--best=3", f"--plot={tmp_path / 'a.png'}"])
    assert len(printed_rows(capsys)) == 3 and (tmp_path / "a.png").stat().st_size > 1000
    sample.main([f"--run={toy}", "--compare", "--which=best", "--n=2"])
    assert re.search("reward  pretrained .* reward  best", capsys.readouterr().out)


@pytest.mark.parametrize("text, message", [
    ("AC___", "--prompt=AC___: no position is free; [?] is a free position"),
    ("AC_??", "the pad _ can only stand at the end; [?] is a free position"),
    ("AC-??", "'-' at position 3 of 'AC-[?][?]' is not in 'ACGT_[?]'; [?] is a free position"),
    ("AC???", None), ("AC??_", None)])
def test_the_blank_of_a_prompt_is_neither_letter_nor_pad(text, message):
    task = TASKS["toy"](5)
    task.alphabet, task.pad = "ACGT_", "_"
    if message:
        with pytest.raises(BadInput, match=message):
            sample.read_prompts(task, text, None, 1)
    else:
        x = sample.read_prompts(task, text, None, 1)
        assert x.tolist() == [[0, 1, 5, 5, 5 if text[-1] == "?" else 4]]


@pytest.mark.parametrize("args, message", [
    (["--run=nowhere"], "nowhere/finetuned.pt is missing"),
    (["--n=0"], "--n must be at least 1"), (["--n=x"], "argument --n: invalid int value: 'x'"),
    (["--temperature=0"], "--temperature above 0"), (["--which=worst"], "invalid choice: 'worst'"),
    (["--movie=a.xyz"], "--movie needs a name with .gif"),
    (["--plot=a.x"], "--plot needs a name with .png"),
    (["--prompt=TC"], "--prompt=TC: 'TC' has 2 letters, the task 6; _ is a free position"),
    (["--prompt=TCTCTC"], "--prompt=TCTCTC: no position is free; _ is a free position"),
    (["--best=2", "--run=nowhere"], "nowhere/rewards.jsonl holds no rollout: is nowhere the"),
    (["--best=2", "--movie=a.gif"], "--best shows what was queried: it has no --compare, --prompt"),
    (["--prompt=TCX___"], "'X' at position 3 of 'TCX___' is not in 'ACGT_'; _ is a free position"),
    (["--compare", "--format=fasta"], "--compare prints a table")])
def test_bad_input_of_sample_gets_a_line(args, message, toy, capsys):
    err = fails(sample.main, [f"--run={toy}", *args], message, capsys)
    assert err.count("\n") <= 2                                # argparse has a line of usage


def write_into(pipe, argv):
    with open(pipe, "w") as file:
        os.dup2(file.fileno(), 1)
    sample.main(argv)


def test_a_closed_pipe_is_no_error(toy, tmp_path):
    """As with `| head -1`."""
    os.mkfifo(tmp_path / "pipe")
    process, = launch(tmp_path, write_into, tmp_path / "pipe", [f"--run={toy}", "--n=8000"])
    with open(tmp_path / "pipe") as pipe:
        assert len(pipe.readline().split()) == 2
    process.join(120)
    printed = (tmp_path / "printed").read_text()
    assert process.exitcode == 0 and "Traceback" not in printed and "8000 samples" in printed
