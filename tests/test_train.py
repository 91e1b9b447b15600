"""train.py and sample.py as a user runs them: whole tiny runs, files, errors, interruptions.

Read first test_an_iteration_is_its_formulas_written_out: it takes finetune apart."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ranks
import sample
import sepo
import train
from diffusion import Absorbing
from exact import has_bfloat16, network
from model import Block, Config, Denoiser
from rewards import TASKS, BadInput, Task, whole_lines

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--pretrain_iters=6", "--iters=4", "--group=8", "--updates=2", "--n_embd=16", "--n_layer=1",
        "--n_head=2", "--eval_every=2", "--replay=0", "--data_size=100", "--report_samples=20"]


@pytest.fixture(autouse=True)
def two(monkeypatch):
    """--task=two: a task of three slots and two letters."""
    set_two(monkeypatch, lambda tokens: (tokens == 1).float().mean(dim=1))


def set_two(monkeypatch, reward, alphabet="01", length=3):
    """Give --task=two another reward or size."""
    def data(n, generator):
        return torch.randint(len(alphabet), (n, length), generator=generator)
    task = Task("two", alphabet, length, data, reward)
    monkeypatch.setitem(TASKS, "two", lambda length=length: task)


def start(*args, script="train.py", **more):
    return subprocess.Popen([sys.executable, str(ROOT / script), *map(str, args)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def run(out, *args, task="two"):
    """A tiny run in this process -> its lines of metrics."""
    train.main([f"--task={task}", f"--out={out}", *TINY, *args])
    return lines(out)


def lines(out, phase=None):
    everything = [json.loads(line) for line in open(out / "metrics.jsonl")]
    return [line for line in everything if phase in (None, line["phase"])]


def paid_lines(out):
    return list(whole_lines((out / "rewards.jsonl").read_text()))


def weights(out, name="finetuned"):
    return torch.load(out / f"{name}.pt", weights_only=True)["model"]


def fails(main, args, message, capsys):
    """The last line on standard error tells what is wrong; status 2, and no traceback."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "Traceback" not in err
    assert re.search(message, last), last
    return err

# -----------------------------------------------------------------------------
# a whole run


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy through the command line, once."""
    out = tmp_path_factory.mktemp("toy") / "run"
    process = start("--task=toy", f"--out={out}", *TINY)
    printed, progress = process.communicate(timeout=120)
    assert process.returncode == 0, progress
    return out, printed, progress


def test_a_run_leaves_its_files_and_says_what_to_type_next(toy):
    out, printed, progress = toy
    assert {file.name for file in out.iterdir()} == {
        "config.json", "metrics.jsonl", "rewards.jsonl", "pretrained.pt", "finetuned.pt", "last.pt", "curve.png",
        "report.json"}
    assert (out / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert f"python sample.py --run={out}" in printed.splitlines()[-1]
    assert "share_of_optimum" in printed and "finetune" in progress
    report = json.loads((out / "report.json").read_text())
    assert set(report) == {"data", "pre-trained", "fine-tuned", "best of 16"}


def test_every_line_of_metrics_holds_what_it_should(toy):
    fine = lines(toy[0], "finetune")
    assert [(line["iter"], line["queries"]) for line in fine] == [(i, 8 * i) for i in range(1, 5)]
    always = {"reward", "reward_std", "kl", "clip_fraction", "grad_norm"}
    assert all(always <= set(line) for line in fine)
    exact = {"exact_reward", "exact_kl", "share_of_optimum", "optimum_reward"}
    assert [exact <= set(line) for line in fine] == [False, True, False, True]
    assert {"loss", "held_out_loss"} <= set(lines(toy[0], "pretrain")[-1])


def test_checkpoints_are_plain_tensors(toy):
    for name in ("pretrained", "finetuned"):
        saved = torch.load(toy[0] / f"{name}.pt", weights_only=True)
        assert saved["alphabet"] == "ACGT"
        Denoiser(Config(**saved["config"])).load_state_dict(saved["model"])


@pytest.mark.parametrize("extra", [
    ["--steps=2", "--advantage=loo"], ["--group=1", "--advantage=running"],
    ["--beta=0", "--path_events=3"], ["--dropout=0.1"],
    pytest.param(["--dtype=bfloat16"], marks=pytest.mark.skipif(not has_bfloat16(), reason="none")),
    ["--corrector_steps=2"], ["--clip_mode=cap", "--micro_batch=3"],
    ["--algo=loop", "--micro_batch=5"], ["--algo=loop", "--path_events=2", "--process=uniform"],
    ["--algo=prdp", "--group=4", "--prompts=2"], ["--algo=prdp", "--process=uniform"],
    ["--algo=prdp", "--micro_batch=3"], ["--algo=published"], ["--algo=reinforce", "--conv=3"],
    ["--replay=2", "--path_events=0"], ["--replay=2", "--process=uniform"],
    ["--replay=1", "--algo=prdp"], ["--replay=1", "--algo=loop", "--explore=0.5"],
    ["--algo=wdce", "--explore=0.5"], ["--process=uniform", "--explore=0.5", "--keep=1"],
    ["--process=uniform", "--corrector_steps=3", "--corrector_t=0.3", "--path_events=2"]])
def test_every_choice_runs(extra, tmp_path):
    assert run(tmp_path, *extra)[-1]["share_of_optimum"] <= 1 + 1e-4


@pytest.mark.parametrize("alphabet, length", [("01", 1), ("A", 2)])
@pytest.mark.parametrize("process", ["absorb", "uniform"])
def test_the_smallest_spaces(alphabet, length, process, tmp_path, monkeypatch):
    set_two(monkeypatch, lambda x: (x == 0).float().mean(1), alphabet, length)
    assert run(tmp_path, f"--process={process}")[-1]["share_of_optimum"] <= 1 + 1e-4


def test_learning_on_the_toy_reaches_most_of_the_optimum_in_few_rollouts(tmp_path):
    """A tenth of the default run; what an update with a wrong sign or scale cannot do."""
    metrics = run(tmp_path, "--pretrain_iters=150", "--iters=30", "--group=64", "--updates=16",
                  "--n_embd=32", "--data_size=5000", "--eval_every=15", task="toy")
    assert metrics[-1]["share_of_optimum"] > 0.6        # thirteen seeds: 0.87 to 0.94


@pytest.mark.parametrize("task, columns", [
    ("dna", {"true activity", "GC"}),
    ("arithmetic", set()), ("text", set())])
def test_tasks_beyond_the_toy_run_resume_and_are_sampled(task, columns, tmp_path, capsys):
    run(tmp_path / "a", "--save_every=0", task=task)
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert set(report) == {"data", "pre-trained", "fine-tuned", "best of 16"}
    assert all(columns <= set(row) and 0 < row["distinct"] <= 1 for row in report.values())
    if task != "text":
        columns = columns or {"held_out_reward"}
        metrics = lines(tmp_path / "a", "finetune")
        assert [columns <= set(line) for line in metrics] == [False, True] * 2
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "finetuned.pt").unlink()
    train.main([f"--task={task}", f"--out={tmp_path / 'b'}", "--resume"])
    assert json.loads((tmp_path / "b" / "report.json").read_text()) == report
    capsys.readouterr()
    sample.main([f"--run={tmp_path / 'a'}", "--n=4", "--format=jsonl"])
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_own_data_and_reward_and_a_start_from_a_saved_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.fa").write_text("".join(f">{i}\n{'ACGT'[i % 4] * 7}\n" for i in range(40)))
    Path("my_reward.py").write_text("def score(samples):\n"
                                    "    return [s.count('G') / 7 for s in samples]\n")
    data = ["--task=dna", "--data=mine.fa", "--reward=my_reward.py:score", "--length=7"]
    train.main([*data, "--out=a", *TINY])
    init = [*data, "--init=a/pretrained.pt", "--iters=2", "--group=8", "--report_samples=9"]
    train.main([*init, "--out=b"])
    capsys.readouterr()
    assert [line["phase"] for line in lines(Path("b"))] == ["finetune"] * 2
    a, b = weights(Path("a"), "pretrained"), weights(Path("b"), "pretrained")
    assert all(torch.equal(a[name], b[name]) for name in a)
    sample.main(["--run=b", "--n=3"])
    drawn = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(drawn) == 3
    assert all(float(r) == pytest.approx(s.count("G") / 7, abs=1e-4) for r, s in drawn)
    torch.save([0, 1], "bare.pt")
    for args, message in (
            (["--task=dna", "--init=a/pretrained.pt", "--length=8"], "holds a model of .* 7, .*: this run has .* 8, "),
            (["--task=text", "--init=a/pretrained.pt"], "holds a model of"),
            ([*data, "--init=a/pretrained.pt", "--process=uniform"], "holds a model of"),
            ([*data, "--pad=N", "--init=a/pretrained.pt"], "holds a model of"),
            (["--init=none.pt"], "none.pt is missing"),
            (["--init=mine.fa"], "mine.fa is damaged or not a checkpoint"),
            (["--init=bare.pt"], "is not a model of train.py")):
        fails(train.main, ["--out=c", *args], message, capsys)
        assert not Path("c/config.json").exists()

# -----------------------------------------------------------------------------
# an iteration, taken apart


def captured(monkeypatch, owner, name):
    """Every call of a function: its arguments, then its result."""
    calls, real = [], getattr(owner, name)

    def spy(*args, **more):
        result = real(*args, **more)
        calls.append((*args, *more.values(), result))
        return result
    monkeypatch.setattr(owner, name, spy)
    return calls


def rollouts(out):
    """The rewards and the kl of each rollout, from the file -> {iteration: (reward, kl)}."""
    rows = paid_lines(out)
    rows = [row for row in rows if "stage" not in row]
    return {i: tuple(torch.tensor([row[key] for row in rows if row["iter"] == i]).double()
                     for key in ("reward", "kl")) for i in range(1, 3)}


BIG = ["--iters=2", "--updates=1", "--beta=0.3", "--lr=0.01"]          # so that the kl of rollout 2 is not 0


@pytest.mark.parametrize("algo", ["sepo", "loop", "reinforce"])
def test_an_iteration_is_its_formulas_written_out(algo, tmp_path, monkeypatch):
    """Advantages, clips and rates of the updates on the second rollout and on a remembered one."""
    set_two(monkeypatch, lambda x: (x == 1).float().mean(dim=1), "ACGT", 4)
    name = "sepo_loss" if algo == "sepo" else "loop_loss"
    losses, paths = captured(monkeypatch, sepo, name), captured(monkeypatch, train, "new_path")
    steps = captured(monkeypatch, train, "step")
    monkeypatch.setattr(random, "choice", lambda buffer: buffer[0])     # remember the first rollout
    kind = dict(sepo="grpo", loop="loo", reinforce="running")[algo]
    run(tmp_path, f"--algo={algo}", "--replay=1", "--path_events=1", f"--advantage={kind}", *BIG)
    (R1, kl1), (R, kl) = rollouts(tmp_path).values()
    returns, first = R - 0.3 * kl, R1 - 0.3 * kl1
    assert kl1.abs().max() < 1e-5 and kl.abs().max() > 0.1
    expected = {"sepo": (returns - returns.mean()) / (R.var(correction=0) + 0.3 ** 2).sqrt(),
                "loop": (returns - returns.mean()) * 8 / 7,
                "reinforce": returns - first.mean()}[algo]
    _, _, view, A, clip, *mode, _ = losses[2]                   # of four: two per iteration
    assert torch.allclose(A, expected.float(), atol=1e-5) and len(losses) == 4
    assert clip == (float("inf") if algo == "reinforce" else 0.1) and mode in ([], ["stop"])
    assert [call[2] for call in steps[-4:]] == pytest.approx([0.01, 0.01, 0.005, 0.005])

    _, _, process, _, old, path = paths[1]                      # the replay of iteration 2
    A = losses[3][3]
    assert torch.equal(path.tokens, old) and not path.given.any()
    reference, _ = sample.load_model(tmp_path / "pretrained.pt")
    R = (old == 1).double().mean(dim=1)
    returns = R - 0.3 * (path.logp - process.replay(reference, path).detach()).sum(dim=1)
    expected = {"sepo": (returns - returns.mean()) / (R.var(correction=0) + 0.3 ** 2).sqrt(),
                "loop": (returns - returns.mean()) * 8 / 7,
                "reinforce": returns - first.mean()}[algo]
    assert torch.allclose(A, expected.float(), atol=1e-4)


def test_the_scale_of_grpo_is_pooled_over_the_processes(tmp_path, monkeypatch):
    """As if the mean variance over all processes were four times that of this one."""
    set_two(monkeypatch, lambda x: (x == 1).float().mean(dim=1), "ACGT", 4)
    monkeypatch.setattr(train, "average_", lambda x: x if x.dim() else 4 * x)
    losses = captured(monkeypatch, sepo, "sepo_loss")
    run(tmp_path, "--advantage=grpo", "--path_events=1", *BIG)
    R, _ = rollouts(tmp_path)[1]
    expected = (R - R.mean()) / (R.var(correction=0) + 0.3 ** 2).sqrt() / 2
    assert torch.allclose(losses[0][3], expected.float(), atol=1e-5)


def test_prdp_is_given_the_kl_of_its_paths(tmp_path, monkeypatch):
    set_two(monkeypatch, lambda x: (x == 1).float().mean(dim=1), "ACGT", 4)
    losses = captured(monkeypatch, sepo, "prdp_loss")
    run(tmp_path, "--algo=prdp", *BIG)
    R, kl = rollouts(tmp_path)[2]
    _, _, _, rewards, given_kl, beta, clip, _, _ = losses[1]
    assert torch.allclose(rewards[0], R) and torch.allclose(given_kl[0].double(), kl) and beta == 0.3
    assert kl.abs().max() > 0.05


def test_wdce_draws_rows_of_the_buffer_by_their_weights(tmp_path, monkeypatch):
    """One sample earns something, so at min_ess 1 and a small beta all updates draw it."""
    monkeypatch.setattr(Absorbing, "is_small", lambda *_: False)
    seen = []

    def reward(x):
        seen.extend(x.tolist())
        return [float(len(seen) > 5 and row == seen[5]) for row in x.tolist()]
    set_two(monkeypatch, reward, "ACGT", 8)
    losses = captured(monkeypatch, sepo, "wdce_loss")
    run(tmp_path, "--algo=wdce", "--iters=2", "--min_ess=1", "--beta=0.001", "--keep=2")
    for _, _, tokens, given, weights, _ in losses:
        assert (tokens == torch.tensor(seen[5])).all() and not given.any()
        assert (weights == 1 / 8).all() and len(tokens) == 8
    assert len(losses) == 2 * 2


def test_explored_rows_keep_most_of_what_they_came_from(tmp_path, monkeypatch):
    monkeypatch.setattr(Absorbing, "is_small", lambda *_: False)
    set_two(monkeypatch, lambda x: (x == 1).float().mean(dim=1), "ACGT", 30)
    drawn = captured(monkeypatch, Absorbing, "sample")
    run(tmp_path, "--explore=0.5", "--iters=2", "--report_samples=0")
    first, second = (call[5] for call in drawn[:2])             # the prompts of both rollouts
    assert (first == 4).all() and (second[4:] == 4).all()
    n_free = (second[:4] == 4).sum(dim=1)
    assert 0 < n_free.sum() and (n_free < 25).all()             # of 30, each with chance 0.5 at most


def test_prompts_are_not_noised_in_pre_training(tmp_path, monkeypatch):
    """The loss is given the slots of a+b=, of its own batch and of the held-out sequences."""
    losses = captured(monkeypatch, Absorbing, "loss")
    run(tmp_path, "--iters=1", "--prompts=2", task="arithmetic")
    assert len(losses) >= 8
    for _, _, x0, given, _ in losses:
        assert given.shape == x0.shape and given[:, :6].all() and not given[:, 6:].any()


def test_known_rewards_are_learned_from_before_anything_is_asked(tmp_path, monkeypatch):
    """Twenty sequences from a table, in remembered rollouts of four."""
    monkeypatch.setattr(Absorbing, "is_small", lambda *_: False)
    set_two(monkeypatch, lambda x: (x == 1).float().mean(dim=1), "ACGT", 6)
    rows = ["".join(random.Random(i).choices("ACGT", k=6)) for i in range(20)]
    (tmp_path / "lab.csv").write_text("sample,reward\n" + "".join(f"{s},{i}\n"
                                                                  for i, s in enumerate(rows)))
    paths = captured(monkeypatch, train, "new_path")
    run(tmp_path / "a", f"--known={tmp_path / 'lab.csv'}", "--replay=12", "--iters=1", "--group=4")
    tokens = {tuple(row) for call in paths for row in call[4].tolist()}
    encoded = {tuple("ACGT".index(c) for c in row) for row in rows}
    assert len(tokens & encoded) > 10 and lines(tmp_path / "a")[-1]["queries"] <= 4


# -----------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize("args, message", [
    (["--grup=8"], "unrecognized arguments: --grup=8"),
    (["--crop", "True"], "unrecognized arguments: True"),
    (["--group=1"], "--group=1 leaves nothing to compare a sample with"),
    (["--task=toi"], "argument --task: invalid choice: 'toi'"),
    (["--iters=1.5"], "argument --iters: invalid int in .1, inf. value: '1.5'"),
    (["--beta=inf"], "argument --beta: invalid float in .0, inf. value: 'inf'"),
    (["--group=0"], "argument --group: invalid int in .1, inf. value: '0'"),
    (["--lr=nan"], "argument --lr/--learning_rate: invalid float in .0, inf. value: 'nan'"),
    (["--iters"], "argument --iters: expected one argument"),
    (["--n_embd=30"], "n_embd must be even and a multiple of --n_head"),
    (["--algo=prdp", "--beta=0"], "--algo=prdp needs --group above 1 and --beta above 0"),
    (["--algo=wdce", "--process=uniform"], "--algo=wdce needs --process=absorb and no corrector"),
    (["--algo=wdce", "--replay=1"], "--algo=wdce has no --replay"),
    (["--algo=wdce", "--beta=0"], "--algo=wdce and --explore need --beta above 0"),
    (["--explore=0.5", "--beta=0"], "--algo=wdce and --explore need --beta above 0"),
    (["--explore=1.5"], "argument --explore: invalid float in .0, 1. value: '1.5'"),
    (["--algo=loop", "--clip_mode=cap"], "--clip_mode is for --algo=sepo"),
    (["--algo=published", "--process=uniform"], "--algo=published needs --process=absorb"),
    (["--algo=published", "--micro_batch=2"], "--algo=published has no --micro_batch"),
    (["--data=x.txt"], "--data needs --reward=file.py:function"),
    (["--task=own"], "--task=own needs --data and --reward"),
    (["--on_error=go"], "argument --on_error: invalid stop_or_value value: 'go'"),
    (["--device=cuda"], "sees no CUDA device"),
    (["--resume"], "holds no run")])
def test_bad_flags_get_a_short_message_and_status_2(args, message, tmp_path, capsys):
    if args == ["--device=cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    err = fails(train.main, ["--task=toy", f"--out={tmp_path / 'run'}", *args], message, capsys)
    assert err.count("\n") <= 2 and not (tmp_path / "run").exists()


def test_a_run_is_not_resumed_by_another_number_of_processes(toy, monkeypatch, capsys):
    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    fails(train.main, ["--task=toy", f"--out={toy[0]}", "--resume"], "processes=2: the run in .* has 1", capsys)


def test_every_flag_is_explained_with_its_default():
    shown = train.get_parser().format_help()
    flags = re.findall(r"^  --(\w+)", shown, re.M)
    assert len(flags) >= 40
    for action in train.get_parser()._actions[1:]:
        assert action.help
    assert re.search(r"uniform: .*--pretrain_iters=2000", shown) and re.search(r"toy: .*--n_embd=64", shown)


def test_the_start_says_which_reward_is_asked_and_how_often(tmp_path, capsys):
    """Rewards: two before all, 4 rollouts of 8, the optimum of the toy, 3 n + 17 n/4 in the report."""
    run(tmp_path / "a", task="toy")
    err = capsys.readouterr().err
    assert "reward: the one built into toy, asked for at most 4,275 samples: " in err
    assert "task toy: 100 sequences of 6 letters 'ACGT', 0 others held out" in err
    assert "32 in rollouts, 4,096 for the exact optimum, 145 in the report" in err
    assert f"method sepo, beta 0.1; cpu; results in {tmp_path / 'a'}" in err
    args = train.parse_args(["--task=arithmetic", f"--out={tmp_path / 'c'}", *TINY])
    task = TASKS["arithmetic"]()
    for every, evaluations in ((2, 512), (3, 512), (9, 256)):   # the last rollout is evaluated, too
        args.eval_every = every
        train.announce(args, task, task.data(50), "cpu", 0)
        err = capsys.readouterr().err
        assert f"2,048 in rollouts, {evaluations} in evaluations, 145 in the report" in err
    assert "50 sequences of 9 letters '0123456789+=', 256 others held out" in err
    (tmp_path / "own.py").write_text("def score(samples): return [len(set(s)) for s in samples]\n")
    (tmp_path / "data.txt").write_text("\n".join(["AB" * 5, "BA" * 5, "CCCCCAAAAA"] * 10))
    args = [f"--data={tmp_path / 'data.txt'}", f"--reward={tmp_path / 'own.py'}:score", *TINY[:-1]]
    train.main([*args, f"--out={tmp_path / 'b'}", "--group=80"])
    err = capsys.readouterr().err
    assert "own.py:score, asked for at most 351 samples: 320 in rollouts, 29 in the report" in err
    paid = [line for line in paid_lines(tmp_path / "b") if line.get("stage", "").startswith("report")]
    assert 0 < len(paid) <= 29


def test_the_size_of_the_network_follows_the_size_of_the_data(tmp_path):
    found = []
    for n in (100, 200_000):
        (tmp_path / "data.txt").write_text("ACGT\n" * (n // 5))
        args = train.parse_args([f"--data={tmp_path / 'data.txt'}", "--reward=x.py:f", f"--out={tmp_path / 'x'}"])
        assert (args.task, args.algo, args.lr, args.replay) == ("own", "sepo", 3e-4, 7)
        found.append((args.n_layer, args.n_embd, args.pretrain_iters))
    assert found == [(2, 64, 1000), (4, 128, 6000)]


def test_another_run_in_the_folder_is_refused(toy, capsys):
    before = (toy[0] / "metrics.jsonl").read_text()
    fails(train.main, [f"--out={toy[0]}", *TINY], "holds another run", capsys)
    fails(train.main, [f"--out={toy[0]}", "--resume", "--lr=0.5"], "lr=0.5: the run in", capsys)
    assert (toy[0] / "metrics.jsonl").read_text() == before


def test_a_finished_run_forgets_what_was_logged_after_the_save(toy, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(toy[0], out)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"phase": "finetune", "iter": 5}\n{"phase": "fine')
    train.main(["--task=toy", f"--out={out}", "--resume"])
    assert lines(out) == lines(toy[0])


def test_a_finished_run_asks_nothing_again_and_can_be_carried_on(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Absorbing, "is_small", lambda *_: False)
    set_two(monkeypatch, lambda x: asked.extend(map(tuple, x.tolist())) or (x == 1).float().mean(1), "ACGT", 6)
    run(tmp_path)
    n = len(asked)
    train.main(["--task=two", f"--out={tmp_path}", "--resume"])
    assert len(asked) == n
    train.main(["--task=two", f"--out={tmp_path}", "--resume", "--iters=7"])
    assert [line["iter"] for line in lines(tmp_path, "finetune")] == list(range(1, 8))
    assert json.loads((tmp_path / "config.json").read_text())["iters"] == 7
    with pytest.raises(SystemExit):
        train.main(["--task=two", f"--out={tmp_path}", "--resume", "--iters=6"])
    assert len(asked) == len(set(asked)) > n


def test_an_edited_reward_file_is_not_resumed(tmp_path, capsys):
    file = tmp_path / "own.py"
    file.write_text("def score(samples): return [len(set(s)) for s in samples]\n")
    args = [f"--reward={file}:score", f"--out={tmp_path / 'run'}"]
    run(tmp_path / "run", args[0])
    train.main(["--task=two", *args, "--resume"])
    file.write_text("def score(samples): return [len(s) for s in samples]\n")
    fails(train.main, ["--task=two", *args, "--resume"], "the file of --reward has changed .*"
          "--init=.*/pretrained.pt, and with --known=.*/rewards.jsonl", capsys)


@pytest.mark.parametrize("full", ["last.part", "finetuned.part", "metrics.jsonl"])
def test_a_full_disk_is_a_line(full, tmp_path, monkeypatch, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    open_out_dir = train.open_out_dir

    def fill(args):
        open_out_dir(args)
        (tmp_path / full).unlink(missing_ok=True)
        (tmp_path / full).symlink_to("/dev/full")
    monkeypatch.setattr(train, "open_out_dir", fill)
    err = fails(train.main, ["--task=two", f"--out={tmp_path}", *TINY], "train.py: .*(cannot be written|No space)", capsys)
    assert "Traceback" not in err


def test_learning_rate_is_lr(tmp_path):
    assert train.parse_args([f"--out={tmp_path / 'x'}", "--learning_rate=0.5"]).lr == 0.5


def test_equal_rewards_are_noticed(tmp_path, monkeypatch, capsys):
    set_two(monkeypatch, lambda x: (x < 0).all(1))
    run(tmp_path)
    assert ("warning: 100% of the first rollout's rewards are equal: try --algo=wdce --explore=0.5"
            in capsys.readouterr().err)


@pytest.mark.parametrize("algo, share, is_told", [
    ("sepo", 0.75, False), ("sepo", 0.85, True), ("wdce", 0.85, False), ("wdce", 1, True)])
def test_rewards_far_from_the_data_are_noticed(algo, share, is_told, capsys):
    reward = (torch.arange(100) >= 100 * share).float()[None]
    train.advise(train.parse_args([f"--algo={algo}", "--out=nowhere"]), reward)
    assert ("of the first rollout's rewards are equal" in capsys.readouterr().err) == is_told


@pytest.mark.parametrize("beta, is_told", [(0.04, True), (0.06, False), (4, False), (6, True)])
def test_a_beta_that_cannot_work_is_noticed(beta, is_told, capsys):
    """The rewards 0 and 10 deviate by 5 from their mean: beta is to be between a hundredth of it
    and all of it; better between a quarter and a half."""
    train.advise(train.parse_args([f"--beta={beta}", "--out=nowhere"]), torch.tensor([[0.0, 10.0]]))
    err = capsys.readouterr().err
    assert ("the first rollout spread by 5, and one nat of KL costs "
            f"--beta={beta:g}: try 1.2 to 2.5" in err) == is_told


def test_a_run_folder_stands_by_itself(tmp_path, capsys):
    """Alphabet, pad and length are in the checkpoint; without data and reward: no scores."""
    (tmp_path / "own.py").write_text("def score(s): return [len(x) for x in s]\n")
    (tmp_path / "data.txt").write_text("\n".join(["MKV", "MKVLA", "LLA"] * 5))
    run(tmp_path / "out", f"--data={tmp_path / 'data.txt'}",
        f"--reward={tmp_path / 'own.py'}:score", task="own")
    (tmp_path / "data.txt").write_text("MKVLAA\nLLA\n" * 5)     # the same letters, another length
    capsys.readouterr()
    sample.main([f"--run={tmp_path / 'out'}", "--n=2"])
    assert "data.txt has other letters or another length than when" in capsys.readouterr().err
    for gone in ("own.py", "data.txt"):
        (tmp_path / gone).unlink()
    sample.main([f"--run={tmp_path / 'out'}", "--n=30"])
    out, err = capsys.readouterr()
    assert "no scores (nan): --data=" in err and len(out.splitlines()) == 30
    assert set("".join(line.split()[-1] for line in out.splitlines())) <= set("MKVLA")


def test_an_unwritable_folder_is_a_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    fails(train.main, [f"--out={tmp_path / 'file' / 'run'}", *TINY], "Not a directory", capsys)


def test_a_reward_that_raises_shows_its_own_traceback_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "own.py").write_text("def score(samples):\n    raise ValueError('the lab is shut')\n")
    process = start(f"--reward={tmp_path / 'own.py'}:score", f"--out={tmp_path / 'run'}")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and not (tmp_path / "run").exists()
    assert "own.py\", line 2, in score" in err and "ValueError: the lab is shut" in err


@pytest.mark.parametrize("fault", ["nan", "raise"])
def test_a_reward_that_fails_midway_loses_nothing_and_the_run_resumes(fault, tmp_path, monkeypatch,
                                                                      capsys):
    """After --resume the numbers are those of a run without the fault, and what was paid for before
    it is not asked again. The fourth call of the reward is that of the third rollout."""
    monkeypatch.setattr(Absorbing, "is_small", lambda *_: False)
    good, asked, calls = lambda tokens: (tokens == 1).float().mean(dim=1), [], []
    set_two(monkeypatch, good, "ACGT", 6)
    run(tmp_path / "whole", "--replay=1")

    def reward(tokens):
        calls.append(len(tokens))
        if len(calls) == 4 and fault == "raise":
            raise RuntimeError("the lab is closed")
        if len(calls) == 4:
            return good(tokens) / 0
        asked.extend(map(tuple, tokens.tolist()))
        return good(tokens)
    set_two(monkeypatch, reward, "ACGT", 6)
    args = ["--task=two", f"--out={tmp_path / 'broken'}"]
    with pytest.raises(RuntimeError if fault == "raise" else SystemExit):
        train.main([*args, *TINY, "--replay=1", "--save_every=0"])
    assert fault == "raise" or "a finite number" in capsys.readouterr().err
    assert weights(tmp_path / "broken") and len(lines(tmp_path / "broken", "finetune")) == 2
    train.main([*args, "--resume"])
    assert len(asked) == len(set(asked)) > 20
    for name in ("metrics.jsonl", "rewards.jsonl", "report.json"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "broken" / name).read_text()
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_constant_reward_moves_nothing_but_by_the_kl(tmp_path, monkeypatch):
    set_two(monkeypatch, lambda tokens: torch.ones(len(tokens)))
    run(tmp_path, "--beta=0")
    before, after = weights(tmp_path, "pretrained"), weights(tmp_path)
    assert all((before[name] == after[name]).all() for name in before)


def test_a_learning_rate_that_blows_up_ends_in_one_line_and_keeps_good_weights(tmp_path, capsys):
    run(tmp_path)
    good = weights(tmp_path)
    args = train.parse_args(["--task=two", f"--out={tmp_path}", "--overwrite", *TINY, "--lr=1e38",
                             "--iters=40"])
    with pytest.raises(train.BadInput, match="is not finite: try a smaller learning rate"):
        train.run(args)
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert all(p.isfinite().all() for p in last["model"].values())
    assert not (tmp_path / "finetuned.pt").exists() and good


@pytest.mark.parametrize("extra", [
    [], ["--algo=loop"], ["--algo=loop", "--path_events=2"], ["--algo=prdp"], ["--micro_batch=3"]])
def test_no_update_waits_for_the_device(extra, monkeypatch, tmp_path):
    """Whatever reads a tensor's value on the host is forbidden while updates run: it replaces
    Tensor.item and the like for the time between the first view and the baseline's update."""
    def forbidden(*_, **__):
        raise AssertionError("a host synchronisation")
    updates, learn = train.draw_updates, sepo.Baseline.update

    def forbid(*args):
        views = updates(*args)
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero",
                     "numpy", "cpu"):
            patch.setattr(torch.Tensor, name, forbidden)
        return views

    def allow(baseline, returns):
        patch.undo()
        patch.setattr(train, "draw_updates", forbid)
        patch.setattr(sepo.Baseline, "update", allow)
        learn(baseline, returns)
    with monkeypatch.context() as patch:
        patch.setattr(train, "draw_updates", forbid)
        patch.setattr(sepo.Baseline, "update", allow)
        out = run(tmp_path, "--micro_batch=0", *extra)
    assert len(out) == 1 + 4

# -----------------------------------------------------------------------------
# interruption


def test_ctrl_c_keeps_the_weights_and_says_how_to_continue(tmp_path):
    process = start("--task=toy", f"--out={tmp_path}", *TINY, "--iters=100000")
    metrics, deadline = tmp_path / "metrics.jsonl", time.time() + 60
    while time.time() < deadline and not (metrics.exists() and "finetune" in metrics.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "the same command with --resume continues" in err
    assert weights(tmp_path) and torch.load(tmp_path / "last.pt", weights_only=True)["iter"] > 0


KILLS = {                   # at which of its calls (in the third rollout) a function kills the run
    "line": ("rewards.Paid.count", 3), "update": ("train.step", 6 + 2 * 4 + 1),
    "replay": ("train.new_path", 3), "checkpoint": ("torch.save", 6 + 1 + 2 * 2 + 1)}


@pytest.mark.parametrize("point", KILLS)
def test_a_run_killed_between_line_update_and_checkpoint_asks_nothing_twice(point, tmp_path):
    """The reward notes what it is asked; with --resume the run ends as if nothing had happened."""
    (tmp_path / "own.py").write_text(f"""
def score(samples):
    with open("{tmp_path / 'asked'}", "a") as file:
        file.writelines(s + "\\n" for s in samples)
    return [s.count("T") / 8 for s in samples]
""")
    args = ["--task=toy", "--length=8", *TINY, "--replay=1", "--save_every=0", "--report_samples=0",
            f"--reward={tmp_path / 'own.py'}:score"]
    name, at = KILLS[point]
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import rewards, torch, train
calls, real = [], {name}
def fatal(*args, **more):
    result = real(*args, **more)
    calls.append(1)
    if len(calls) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
{name} = fatal
train.main(sys.argv[1:])
"""
    command = [sys.executable, "-c", code, *args, f"--out={tmp_path / 'a'}"]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    assert len(lines(tmp_path / "a", "finetune")) in (2, 3)
    train.main(["--task=toy", f"--out={tmp_path / 'a'}", "--resume"])
    asked = (tmp_path / "asked").read_text().split()
    assert len(asked) == len(set(asked))
    train.main([*args, f"--out={tmp_path / 'b'}"])
    for name in ("metrics.jsonl", "rewards.jsonl"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_killed_again_and_again_ends_with_the_same_numbers(tmp_path):
    """SIGKILL at random moments, until the run is done; then metrics and weights, bit for bit."""
    args = ["--task=toy", *TINY, "--pretrain_iters=40", "--iters=8", "--save_every=0", "--eval_every=8",
            "--advantage=running", "--dropout=0.1", "--report_samples=0"]
    train.main([*args, f"--out={tmp_path / 'whole'}"])
    out, chance, kills = tmp_path / "killed", random.Random(0), 0
    process, last = start(*args, f"--out={out}"), out / "last.pt"
    while kills < 2:
        before = last.stat().st_mtime_ns if last.exists() else 0
        while process.poll() is None and not (last.exists() and last.stat().st_mtime_ns > before):
            time.sleep(0.005)                           # further than the sitting before
        time.sleep(chance.uniform(0, 0.3))
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
        process = start("--task=toy", f"--out={out}", "--resume")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and kills > 0, err
    assert lines(out) == lines(tmp_path / "whole")
    for name in ("pretrained", "finetuned"):
        a, b = weights(out, name), weights(tmp_path / "whole", name)
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_damaged_checkpoint_and_one_with_code_are_refused(toy, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(toy[0], out)
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:200])
    fails(train.main, [f"--out={out}", "--resume"], "last.pt is damaged", capsys)

    shutil.copytree(toy[0], tmp_path / "other")
    torch.save(dict(phase="finetune", iter=2, log_size=0, model={}), tmp_path / "other" / "last.pt")
    fails(train.main, [f"--out={tmp_path / 'other'}", "--resume"], "a run of another shape", capsys)
    kept, before = weights(tmp_path / "other"), weights(toy[0])
    assert all(torch.equal(kept[name], before[name]) for name in before)

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)
    torch.save(dict(model=Evil()), out / "finetuned.pt")
    fails(sample.main, [f"--run={out}"], "finetuned.pt is damaged or not", capsys)
    assert not (tmp_path / "owned").exists()

# -----------------------------------------------------------------------------
# several processes, compilation


def torchrun(*args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run([*command, *map(str, args)], capture_output=True, text=True, timeout=120)


def test_two_processes_learn_what_one_does_with_the_whole_batch(tmp_path):
    ranks.main(tmp_path / "one.pt")
    done = torchrun(ROOT / "tests/ranks.py", tmp_path / "two.pt")
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("one", "two"))
    assert one["scale"].item() == pytest.approx(two["scale"].item(), rel=1e-12)
    assert one["reward"] == pytest.approx(two["reward"], abs=1e-6)
    begin = network(4, 6).state_dict()
    for name, weight in one["model"].items():
        assert torch.allclose(weight, two["model"][name], atol=1e-5)
    assert any(not torch.equal(weight, begin[name]) for name, weight in one["model"].items())


def test_a_run_of_two_processes_resumes_to_the_same_numbers(tmp_path):
    """The reward keeps a copy of the folder as it was in the middle; that is resumed."""
    (tmp_path / "own.py").write_text(f"""
import os, shutil
calls = []
def score(samples):
    calls.append(1)
    if len(calls) == 4 and os.environ["RANK"] == "0" and not os.path.exists("{tmp_path / 'b'}"):
        shutil.copytree("{tmp_path / 'a'}", "{tmp_path / 'b'}")
    return [s.count("T") / 8 for s in samples]
""")
    args = ["--task=toy", "--length=8", *TINY, "--prompts=2", "--report_samples=0", "--replay=1",
            "--save_every=0"]
    reward = f"--reward={tmp_path / 'own.py'}:score"
    done = torchrun(ROOT / "train.py", *args, reward, f"--out={tmp_path / 'a'}")
    assert done.returncode == 0, done.stderr
    assert len(lines(tmp_path / "b", "finetune")) < 4 == len(lines(tmp_path / "a", "finetune"))
    done = torchrun(ROOT / "train.py", "--task=toy", f"--out={tmp_path / 'b'}", "--resume")
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    paid = paid_lines(tmp_path / "a")
    for rank in (0, 1):
        rows = [line for line in paid if line.get("rank", 0) == rank and "iter" in line]
        assert len(rows) == 4 * 8
    everyone = torch.tensor([line["reward"] for line in paid if line.get("iter") == 4])
    last = lines(tmp_path / "a")[-1]
    assert last["reward"] == pytest.approx(everyone.mean().item(), abs=1e-6)
    assert last["reward_std"] == pytest.approx(everyone.std(correction=0).item(), abs=1e-6)
    asked = {(line.get("rank"), line["sample"]) for line in paid if "iter" in line}
    assert last["queries"] == len(asked)
    assert last["best"] == max(line["reward"] for line in paid if "iter" in line)


def test_compiled_blocks_compute_the_same_in_every_copy(monkeypatch):
    """Rows and slots of all sizes. (The graphs run as they were traced: machine code takes a
    minute to build, and is the compiler's business.)"""
    graphs, real = [], torch.nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self, **kwargs: real(self, backend=backend, **kwargs))
    plain, args = network(4, 8), type("Args", (), dict(compile=True))
    fast = train.compiled(args, deepcopy(plain))
    for B, k in ((5, 2), (3, 7), (2, 2)):
        x, slots = torch.randint(5, (B, 8)), torch.randint(8, (B, k))
        assert torch.allclose(fast(x), plain(x), atol=1e-5)
        ours, theirs = (m.logits_at(x, None, slots) for m in (fast, plain))
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert graphs and isinstance(fast.blocks[0], Block)

# -----------------------------------------------------------------------------
# sample.py, and the report


def test_the_measures_of_diversity_by_hand():
    """Three samples: pairs differ in 2, 1 and 1 of 2 slots; letter 0 fills 4 of 6 slots."""
    seen = sample.diversity(torch.tensor([[0, 0], [1, 0], [0, 2]]), 3)
    assert seen == pytest.approx(dict(distinct=1, hamming=(2 + 1 + 1) / 3 / 2, commonest=4 / 6))


def test_the_report_says_what_it_asks_and_notes_an_exploited_reward(tmp_path, monkeypatch, capsys):
    """Its numbers: the KL of the samples' paths, 0 before and a lot after; and of each group of 16
    the best (the mean of the best of 16 samples with 3 letters of two is 2.9 of 3 for a fair coin)."""
    asked = []
    monkeypatch.setattr(Absorbing, "is_small", lambda *_: False)
    set_two(monkeypatch, lambda x: asked.extend(map(tuple, x.tolist())) or (x == 1).float().mean(1))
    run(tmp_path, "--iters=30", "--updates=8", "--lr=0.03", "--beta=0")
    printed = capsys.readouterr().out
    assert "the report asked for 0 more rewards" in printed and len(asked) == len(set(asked)) == 8
    assert "much more alike" in printed and "a reward that forbids it" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["pre-trained"]["kl"] == pytest.approx(0, abs=1e-4)
    assert 1 < report["fine-tuned"]["kl"] < 5 and report["fine-tuned"]["reward"] > 0.9
    assert report["best of 16"]["reward"] > 0.85 > 0.75 > report["pre-trained"]["reward"]


def test_samples_as_text_fasta_and_json(toy, capsys):
    arguments = [f"--run={toy[0]}", "--n=5", "--seed=3"]
    sample.main(arguments)
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert len(rows) == 5 and "5 samples" in err and "mean reward" in err
    task = TASKS["toy"]()
    for reward, string in rows:
        assert float(reward) == pytest.approx(task.reward(task.encode([string])).item(), abs=1e-4)
    sample.main([*arguments, "--format=fasta"])
    fasta = capsys.readouterr().out.splitlines()
    assert [line for line in fasta if line[0] != ">"] == [string for _, string in rows]
    sample.main([*arguments, "--format=jsonl"])
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [item["sample"] for item in objects] == [string for _, string in rows]


def test_a_low_temperature_draws_the_likeliest_letter(toy, tmp_path, capsys):
    """A head that gives A an advantage of half a nat: exp(50) to 1 at temperature 0.01."""
    shutil.copytree(toy[0], tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "finetuned.pt", weights_only=True)
    saved["model"]["head.weight"].zero_()
    saved["model"]["head.bias"] = torch.tensor([0.5, 0.0, 0.0, 0.0])
    torch.save(saved, tmp_path / "run" / "finetuned.pt")
    drawn = {}
    for temperature in (0.01, 1):
        sample.main([f"--run={tmp_path / 'run'}", "--n=20", f"--temperature={temperature}"])
        drawn[temperature] = {row.split()[1] for row in capsys.readouterr().out.splitlines()}
    assert drawn[0.01] == {"AAAAAA"} and len(drawn[1]) > 10


def test_the_best_that_was_ever_asked(toy, capsys):
    """In rollouts: without what was asked to know the optimum, or for the report."""
    paid = paid_lines(toy[0])
    found = {line["sample"]: line["reward"] for line in paid if "stage" not in line}
    sample.main([f"--run={toy[0]}", "--best=5"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len({string for _, string in rows}) == 5
    assert [float(reward) for reward, _ in rows] == pytest.approx(
        sorted(found.values(), reverse=True)[:5], abs=1e-4)
    assert all(found[string] == pytest.approx(float(reward), abs=1e-4) for reward, string in rows)
    sample.main([f"--run={toy[0]}", "--best=3", "--format=fasta"])
    assert capsys.readouterr().out.count(">sample_") == 3


def test_prompts_comparison_movie_and_histogram(toy, tmp_path, capsys):
    gif, png = tmp_path / "a.gif", tmp_path / "a.png"
    sample.main([f"--run={toy[0]}", "--n=3", "--prompt=TC____", "--compare", f"--movie={gif}",
                 f"--plot={png}", "--steps=4"])
    out = capsys.readouterr().out.splitlines()
    assert "pretrained" in out[0] and "finetuned" in out[0] and len(out) == 4
    assert all(column[:2] == "TC" for line in out[1:] for column in line.split()[1::2])
    assert gif.read_bytes()[:4] == b"GIF8" and png.read_bytes()[:4] == b"\x89PNG"


def test_a_uniform_run_is_sampled_and_filmed(tmp_path, capsys):
    run(tmp_path, "--process=uniform")
    capsys.readouterr()
    sample.main([f"--run={tmp_path}", "--n=2", f"--movie={tmp_path / 'a.gif'}"])
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("text, message", [
    ("AC___", "--prompt=AC___: no slot is free; [?] is a free slot"),
    ("AC_??", "the pad _ can only stand at the end; [?] is a free slot"),
    ("AC-??", "'-' at position 3 of 'AC-[?][?]' is not in 'ACGT_[?]'; [?] is a free slot"),
    ("AC???", None), ("AC??_", None)])
def test_the_blank_of_a_prompt_is_neither_letter_nor_pad(text, message):
    task = replace(TASKS["toy"](5), alphabet="ACGT_", pad="_")
    if message:
        with pytest.raises(BadInput, match=message):
            sample.read_prompts(task, text, None, 1)
    else:
        x = sample.read_prompts(task, text, None, 1)
        assert x.tolist() == [[0, 1, 5, 5, 5 if text[-1] == "?" else 4]]


def test_measure_is_tried_before_anything_is_paid_or_written(tmp_path):
    (tmp_path / "own.py").write_text("def score(samples): return [1.0] * len(samples)\n"
                                     "def measure(samples): return {'x': 1 / 0}\n")
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "out", f"--reward={tmp_path / 'own.py'}:score", task="toy")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("args, message", [
    (["--run=nowhere"], "nowhere/finetuned.pt is missing"),
    (["--n=0"], "invalid int in .1, inf. value"), (["--which=best"], "invalid choice: 'best'"),
    (["--movie=a.xyz"], "invalid name with .gif value"), (["--plot=a.x"], "invalid name with .png value"),
    (["--prompt=TC"], "--prompt=TC: 'TC' has 2 letters, the task 6; _ is a free slot"),
    (["--prompt=TCTCTC"], "--prompt=TCTCTC: no slot is free; _ is a free slot"),
    (["--best=2", "--run=nowhere"], "pretrained.pt is missing: is nowhere the folder of a run"),
    (["--best=2", "--movie=a.gif"], "--best shows what was asked: it has no --compare, --prompt or"),
    (["--prompt=TCX___"], "'X' at position 3 of 'TCX___' is not in 'ACGT_'; _ is a free slot"),
    (["--steps=-3"], "invalid int in .-1, inf. value"),
    (["--compare", "--format=fasta"], "--compare prints a table")])
def test_bad_input_of_sample_gets_a_line(args, message, toy, capsys):
    fails(sample.main, [f"--run={toy[0]}", *args], message, capsys)


def test_a_closed_pipe_is_no_error(toy):
    process = start(f"--run={toy[0]}", "--n=20000", script="sample.py")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0 and "Traceback" not in process.stderr.read()
