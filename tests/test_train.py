"""train.py as a user runs it: a whole tiny run, its files, its errors. Nothing here depends on how well it learns."""
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import sample
import train
from diffusion import Absorbing, Uniform
from exact import network, sequences
from model import Config, Denoiser
from rewards import TASKS, BadInput, Task

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--pretrain_iters=20", "--iters=6", "--group=8", "--updates=2", "--n_embd=16", "--n_layer=1", "--n_head=2",
        "--eval_every=3", "--data_size=100", "--report_samples=40"]


def command(*args, script="train.py"):
    return subprocess.run([sys.executable, ROOT / script, *args], capture_output=True, text=True)


def numbers(out):
    """metrics.jsonl without its clock."""
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in open(out / "metrics.jsonl")]


def weights(out, name="finetuned"):
    return torch.load(out / f"{name}.pt", weights_only=True)["model"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny") / "toy"
    return out, command("--task=toy", f"--out={out}", *TINY)


def test_a_whole_run_through_the_command_line(tiny):
    out, done = tiny
    assert done.returncode == 0, done.stderr
    assert {p.name for p in out.iterdir()} == {"config.json", *train.RESULTS} - {"oracle.pt"}
    assert (out / "curve.png").read_bytes()[:4] == b"\x89PNG"
    for word in ("reward", "KL", "share of optimum", "distinct", "pre-trained", "fine-tuned"):
        assert word in done.stdout
    config = json.loads((out / "config.json").read_text())
    assert config["n_embd"] == 16 and set(config) == {f.name for f in fields(train.Flags)}


def test_every_line_of_metrics_holds_what_it_should(tiny):
    lines = [json.loads(line) for line in open(tiny[0] / "metrics.jsonl")]
    assert all({"phase", "iter", "loss"} <= set(line) for line in lines)
    fine = [line for line in lines if line["phase"] == "finetune"]
    assert [(line["iter"], line["queries"]) for line in fine] == [(i, 8 * i) for i in range(1, 7)]
    assert all({"reward", "reward_std", "kl", "clip_fraction", "passes", "seconds"} <= set(line) for line in fine)
    exact = {"exact_reward", "exact_kl", "share_of_optimum"}
    assert [exact <= set(line) for line in fine] == [False, False, True, False, False, True]


def test_checkpoints_are_plain_tensors_and_load(tiny):
    for name in ("pretrained", "finetuned"):
        saved = torch.load(tiny[0] / f"{name}.pt", weights_only=True)
        assert saved["task"] == "toy"
        Denoiser(Config(**saved["config"])).load_state_dict(saved["model"])


def test_the_same_seed_gives_the_same_numbers(tiny, tmp_path):
    assert command("--task=toy", f"--out={tmp_path / 'again'}", *TINY).returncode == 0
    assert numbers(tiny[0]) == numbers(tmp_path / "again")


@pytest.mark.parametrize("extra", [
    ["--states=noised", "--consistency=0.3"], ["--states=terminal", "--advantage=ppo", "--entropy=0.01"],
    ["--steps=2", "--time_conditioning", "--advantage=loo"], ["--group=1"], ["--beta=0", "--path_events=3"],
    ["--advantage=dr_grpo", "--dropout=0.1", "--dtype=bfloat16"], ["--schedule=cosine", "--corrector_steps=2"],
    ["--algo=loop"], ["--algo=loop", "--path_events=2", "--process=uniform"], ["--algo=prdp", "--group=4", "--prompts=2"],
    ["--algo=prdp", "--process=uniform", "--beta_warmup=3"], ["--algo=reinforce", "--conv=3"], ["--kl=loss", "--ref_every=2"],
    ["--process=uniform", "--steps=4"], ["--process=uniform", "--states=terminal", "--schedule=geometric"],
    ["--micro_batch=3"], ["--micro_batch=5", "--algo=loop"], ["--micro_batch=3", "--algo=prdp", "--process=uniform"],
    ["--micro_batch=3", "--states=noised"], ["--micro_batch=3", "--algo=loop", "--path_events=2"],
    ["--process=uniform", "--corrector_steps=3", "--corrector_t=0.3", "--path_events=2"]])
def test_every_choice_runs(extra, tmp_path):
    train.main([f"--out={tmp_path}", *TINY, *extra])
    last = json.loads(open(tmp_path / "metrics.jsonl").readlines()[-1])
    assert last["iter"] == 6 and last["share_of_optimum"] <= 1 + 1e-5


# ---- tasks beyond the toy -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task, columns", [
    ("dna", ["true activity (median)", "oracle (median)", "over data's 99%", "3-mer corr."]),
    ("arithmetic", []), ("text", ["known words", "distinct words"])])
def test_a_task_beyond_the_toy_runs_goes_on_and_is_sampled(task, columns, tmp_path, capsys):
    """Through the command line at a tiny size: its report, its curve, the same numbers after --resume, its samples."""
    done = command(f"--task={task}", f"--out={tmp_path / 'a'}", *TINY, "--save_every=0")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert list(report) == ["data", "pre-trained", "fine-tuned", "best of 16"]
    assert list(report["data"]) == ["reward", "KL (nats)", "distinct", "bound (nats)", *columns]
    assert all(row["reward"] == row["reward"] and 0 < row["distinct"] <= 1 for row in report.values())
    for word in ["data", "best of 16", *columns]:
        assert word in done.stdout
    lines = numbers(tmp_path / "a")
    assert "held_loss" in lines[0] and [("watch" in line) for line in lines[1:]] == [False, False, True] * 2 or not columns
    sample.main([f"--run={tmp_path / 'a'}", "--n=4", "--format=jsonl"])
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert (tmp_path / "a" / "oracle.pt").exists() == (task == "dna")

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "finetuned.pt").unlink()
    train.main([f"--out={tmp_path / 'b'}", "--resume"])
    assert json.loads((tmp_path / "b" / "report.json").read_text()) == report


def test_arithmetic_is_asked_in_groups_and_answers_held_out_prompts(tmp_path, capsys):
    train.main(["--task=arithmetic", f"--out={tmp_path}", *TINY, "--prompts=3", "--group=4"])
    lines = numbers(tmp_path)
    assert [line["queries"] for line in lines[1:]] == [12 * i for i in range(1, 7)]
    assert [list(line.get("watch", {})) for line in lines[1:]] == [[], [], ["reward, held-out prompts"]] * 2
    capsys.readouterr()
    sample.main([f"--run={tmp_path}", "--n=3", "--prompt=12+34=___"])
    assert [line.split()[1][:6] for line in capsys.readouterr().out.splitlines()] == ["12+34="] * 3


def test_own_data_and_reward_and_a_start_from_a_saved_model(tmp_path, monkeypatch, capsys):
    """What was pre-trained on a file is the start of a run with another reward: no pre-training, the same network."""
    monkeypatch.chdir(tmp_path)
    Path("mine.fa").write_text("".join(f">{i}\n{'ACGT'[i % 4] * 7}\n" for i in range(40)))
    Path("my_reward.py").write_text("def score(samples):\n    return [s.count('G') / 7 for s in samples]\n")
    data = ["--task=dna", "--data=mine.fa", "--length=7"]
    train.main([*data, "--out=a", *TINY])
    train.main([*data, "--out=b", "--init=a/pretrained.pt", "--reward=my_reward.py:score", "--iters=3", "--group=8",
                "--report_samples=9"])
    capsys.readouterr()
    assert [line["phase"] for line in numbers(Path("b"))] == ["finetune"] * 3
    a, b = weights(Path("a"), "pretrained"), weights(Path("b"), "pretrained")
    assert all(torch.equal(a[name], b[name]) for name in a)
    config = json.loads(Path("b/config.json").read_text())
    assert config["n_embd"] == 16 and config["length"] == 7
    torch.save(torch.zeros(3), "bare.pt")
    sample.main(["--run=b", "--n=3"])
    drawn = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(drawn) == 3 and all(float(reward) == pytest.approx(s.count("G") / 7, abs=1e-4) for reward, s in drawn)

    for args, message in (
            ([*data, "--init=a/pretrained.pt", "--n_embd=32"], "--n_embd=32: the model of --init has 16"),
            (["--task=dna", "--init=a/pretrained.pt", "--length=8"], "--length=8: the model of --init has 7"),
            (["--task=toy", "--init=a/pretrained.pt"], "--length=7: --task=toy has 6 slots"),
            (["--task=text", "--init=a/pretrained.pt"], "holds a model of another shape"),
            ([*data, "--init=a/pretrained.pt", "--process=uniform"], "holds a model of another shape"),
            ([*data, "--pad=N", "--init=a/pretrained.pt"], "holds a model of another shape"),
            (["--init=none.pt"], "none.pt does not exist"), (["--init=mine.fa"], "mine.fa is no checkpoint of plain tensors"),
            (["--init=a/oracle.pt"], "a/oracle.pt is no model of train.py"), (["--init=bare.pt"], "is no model of train.py"),
            ([*data, "--init=a/pretrained.pt", "--out=a", "--overwrite"], "lies in the folder that this run would write"),
            ([*data, "--init=a/pretrained.pt", "--pretrain_iters=3"], "--pretrain_iters: --init skips pre-training")):
        one_line(train.main, ["train.py", "--out=c", *args], message, monkeypatch, capsys)
        assert not Path("c").exists()


def test_weights_that_mean_other_letters_or_another_noise_are_refused(tmp_path):
    model, toy = network(4, 6, time_conditioning=True), TASKS["toy"]
    train.save(tmp_path / "m.pt", toy, Absorbing(4), model)
    train.load(tmp_path / "m.pt", toy, Absorbing(4), model)
    with pytest.raises(BadInput, match="a model of alphabet 'ACGT': this run has 'ACGU'"):
        train.load(tmp_path / "m.pt", replace(toy, alphabet="ACGU"), Absorbing(4), model)
    with pytest.raises(BadInput, match="a model of process 'Absorbing': this run has 'Uniform'"):
        train.load(tmp_path / "m.pt", toy, Uniform(4), model)


def test_an_own_reward_that_fails_does_so_before_pre_training(tmp_path):
    """Its traceback is one line, its sample is named, and no folder is left."""
    (tmp_path / "own.py").write_text("def score(samples):\n    raise ValueError('two\\nlines')\n")
    done = command(f"--reward={tmp_path / 'own.py'}:score", f"--out={tmp_path / 'run'}", *TINY)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()
    assert done.stderr.startswith("train.py: the reward raised ValueError: two lines (on '")


# ---- exact evaluation -----------------------------------------------------------------------------------------------------

def test_share_of_optimum_is_zero_for_the_reference_and_below_one_for_any_model():
    task, flags = TASKS["toy"], train.Flags()
    reference = network(4, 6, n_embd=16)
    exact = train.Exact(flags, task, Absorbing(4), reference)
    assert exact(reference)["share_of_optimum"] == pytest.approx(0, abs=1e-5)
    assert exact(reference)["exact_kl"] == pytest.approx(0, abs=1e-5)
    assert all(exact(network(4, 6, seed=s, n_embd=16))["share_of_optimum"] < 1 for s in range(3))


def test_a_reference_that_never_draws_some_sequences_gives_no_nan():
    reference = network(4, 6, n_embd=16)
    with torch.no_grad():
        reference.output.bias += torch.tensor([0.0, -300.0, 0.0, 0.0])
    truth = train.Exact(train.Flags(), TASKS["toy"], Absorbing(4), reference)(network(4, 6, n_embd=16))
    assert all(torch.tensor(value).isfinite() for value in truth.values())


def test_the_closed_form_optimum_has_share_one():
    """A stand-in for the process that returns p* ~ p_ref exp(R / beta) itself."""
    exact = train.Exact(train.Flags(), TASKS["toy"], Absorbing(4), network(4, 6, n_embd=16))
    exact.law = lambda model: torch.softmax(exact.reference + TASKS["toy"].reward(sequences(4, 6)) / 0.1, 0)
    assert exact(None)["share_of_optimum"] == pytest.approx(1, abs=1e-5)


# ---- bad input --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("args, message", [
    (["--grup=8"], "unknown flag --grup: did you mean group?"),
    (["--task=toi"], "--task=toi: did you mean toy?"),
    (["--states=pth"], "--states=pth: did you mean path?"),
    (["--advantage=zzz"], "--advantage=zzz: one of grpo, dr_grpo, loo, ppo, running"),
    (["--iters=many"], "--iters=many: a whole number is needed"),
    (["--iters=1.5"], "--iters=1.5: a whole number is needed"),
    (["--lr=fast"], "--lr=fast: a number is needed"),
    (["--lr=nan"], "--lr=nan: it must be at least 0"),
    (["--lr=inf"], "--lr=inf: it must be at least 0"),
    (["--group=0"], "--group=0: it must be at least 1"),
    (["--dropout=1"], "--dropout=1: it must be at least 0 and at most 0.9"),
    (["--iters"], "argument --iters: expected one argument"),
    (["toy"], "unexpected 'toy': flags are written --name=value"),
    (["--n_embd=30"], "n_embd (30) must be a multiple of twice n_head (4): rotary pairs"),
    (["--conv=4"], "conv (4) must be odd"),
    (["--process=uniform", "--states=noised"], "--process=uniform has none: use path or terminal"),
    (["--process=uniform", "--steps=0"], "--process=uniform needs a grid"),
    (["--algo=prdp", "--beta=0"], "it needs --beta above 0"),
    (["--path_events=0"], "all of them is --algo=loop"),
    (["--algo=loop", "--states=noised"], "are sepo's: --algo=loop knows the path alone"),
    (["--algo=reinforce", "--entropy=0.1"], "are sepo's: --algo=reinforce knows the path alone"),
    (["--algo=prdp", "--path_events=2"], "--algo=prdp needs the whole path"),
    (["--seed=99999999999999999999"], "it must be at least 0 and at most 4294967295"),
    (["--algo=prpd"], "--algo=prpd: did you mean prdp?"),
    (["--schedule=linea"], "--schedule=linea: did you mean linear?"),
    (["--corrector_t=1"], "--corrector_t=1: it must be at least 0.01 and at most 0.99"),
    (["--cuda_graph", "--device=cpu"], "--cuda_graph needs --device=cuda and"),
    (["--time_conditioning"], "needs a grid: add --steps=16"),
])
def test_bad_flags_get_one_line_and_status_2(args, message, tmp_path, monkeypatch, capsys):
    one_line(train.main, ["train.py", f"--out={tmp_path / 'run'}", *args], message, monkeypatch, capsys)
    assert not (tmp_path / "run").exists()


def one_line(main, argv, message, monkeypatch, capsys):
    """Run a script's main as its command does: exit status 2, one line on standard error, nothing on standard output."""
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as stop:
        train.run(main)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith(f"{argv[0]}: ") and message in err


def wrong_values():
    """For every flag of both scripts that takes a value: one of no sense, and one below its range."""
    for main, kind in ((train.main, train.Flags), (sample.main, sample.Options)):
        script = f"{main.__module__}.py"
        for f in fields(kind):
            choices, low = f.metadata["choices"], f.metadata["low"]
            if choices:
                yield main, script, f"--{f.name}={next(iter(choices))}x", f"did you mean {next(iter(choices))}?"
            if f.type in (int, float):
                yield main, script, f"--{f.name}=zebra", "number is needed"
                yield main, script, f"--{f.name}={int(low) - 1}", f"it must be at least {low}"
                yield main, script, f"--{f.name}=nan", "number is needed" if f.type is int else "it must be at least"
            if f.type is not bool:
                yield main, script, f"--{f.name}", "expected one argument"
            yield main, script, f"--{f.name}s=1", f"unknown flag --{f.name}s: did you mean {f.name}"


@pytest.mark.parametrize("main, script, arg, message", list(wrong_values()))
def test_every_flag_of_both_scripts_refuses_what_it_cannot_use(main, script, arg, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    one_line(main, [script, arg], message, monkeypatch, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_flag_of_the_command_itself(tmp_path):
    done = command(f"--out={tmp_path / 'run'}", "--grup=8")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "train.py: unknown flag --grup: did you mean group?\n")


def test_a_full_disk_is_a_line(tmp_path, monkeypatch, capsys):
    """Its metrics can no longer be written: one line, and the folder's last good files stay."""
    real = train.Session.log

    def full(self, **line):
        if line["phase"] == "finetune":
            raise OSError(28, "No space left on device", str(self.out / "metrics.jsonl"))
        real(self, **line)
    monkeypatch.setattr(train.Session, "log", full)
    monkeypatch.setattr("sys.argv", ["train.py", f"--out={tmp_path}", *TINY])
    with pytest.raises(SystemExit) as stop:
        train.run(train.main)
    assert stop.value.code == 2 and capsys.readouterr().err.splitlines()[-1] == \
        f"train.py: No space left on device ({tmp_path / 'metrics.jsonl'})"
    assert weights(tmp_path, "pretrained") and weights(tmp_path)


def test_an_absent_gpu_is_a_line_too(tmp_path):
    if torch.cuda.is_available():
        assert train.pick_device("cuda").type == "cuda"
    else:
        with pytest.raises(BadInput, match="sees no CUDA device"):
            train.pick_device("cuda")


def test_an_output_folder_with_another_run_is_refused_unless_overwritten(tiny):
    before = (tiny[0] / "metrics.jsonl").read_text()
    done = command(f"--out={tiny[0]}", *TINY)
    assert done.returncode == 2 and "holds another run" in done.stderr and done.stderr.count("\n") == 1
    assert (tiny[0] / "metrics.jsonl").read_text() == before


def test_an_unwritable_folder_is_a_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = command(f"--out={tmp_path / 'file' / 'run'}", *TINY)
    assert done.returncode == 2 and "cannot write to --out=" in done.stderr and done.stderr.count("\n") == 1


def test_help_shows_every_flag_with_its_default():
    shown = {entry.split()[0]: " ".join(entry.split()) for entry in command("--help").stdout.split("\n  --")[1:]}
    for f in fields(train.Flags):
        own = {"n_layer": "; toy: 2", "n_embd": "; toy: 64", "steps": "; dna: 20; uniform: 16"}.get(f.name, "")
        assert len(shown[f.name].split()) > 3
        if f.type is not bool and f.default != "":
            assert f"(default: {f.default}{own}" in shown[f.name]


# ---- trouble on the way -------------------------------------------------------------------------------------------------

def test_a_reward_that_fails_midway_stops_the_run_and_loses_nothing(tmp_path, monkeypatch):
    calls = []

    def reward(tokens):
        calls.append(len(tokens))
        return tokens[:, 0] / (0.0 if calls.count(8) > 3 else 1.0)
    monkeypatch.setitem(TASKS, "toy", replace(TASKS["toy"], reward=reward))
    with pytest.raises(BadInput, match="is (nan|inf)"):
        train.main([f"--out={tmp_path}", *TINY])
    assert torch.load(tmp_path / "finetuned.pt", weights_only=True)["task"] == "toy"
    assert json.loads(open(tmp_path / "metrics.jsonl").readlines()[-1])["iter"] == 3


def test_a_constant_reward_changes_nothing_but_by_the_kl(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "toy", replace(TASKS["toy"], reward=lambda tokens: torch.ones(len(tokens))))
    train.main([f"--out={tmp_path}", *TINY, "--beta=0"])
    before, after = (torch.load(tmp_path / f"{name}.pt", weights_only=True)["model"] for name in ("pretrained", "finetuned"))
    assert all((before[name] == after[name]).all() for name in before)


def test_a_reward_that_raises_stops_with_a_line_and_the_run_goes_on_once_it_is_mended(tiny, tmp_path, monkeypatch):
    """It raises in the fourth rollout. What was learnt is there, and after --resume the numbers are those of a good run."""
    good, calls = TASKS["toy"].reward, []

    def reward(tokens):
        calls.append(len(tokens))
        if calls.count(8) == 4:
            raise RuntimeError("the lab is closed")
        return good(tokens)
    monkeypatch.setitem(TASKS, "toy", replace(TASKS["toy"], reward=reward))
    with pytest.raises(BadInput, match="the reward raised RuntimeError: the lab is closed"):
        train.main([f"--out={tmp_path}", *TINY, "--save_every=0"])
    assert weights(tmp_path) and len(numbers(tmp_path)) == 4
    assert command(f"--out={tmp_path}", "--resume").returncode == 0
    assert numbers(tmp_path) == numbers(tiny[0])


def test_updates_that_are_not_finite_are_skipped_counted_and_stop_the_run_when_they_persist():
    """The weights and Adam's moments are as if they had never been."""
    model, twin = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    twin.load_state_dict(model.state_dict())
    guard, other = (train.Guard(m, torch.optim.AdamW(m.parameters(), 0.1, fused=True), 1.0, patience=3) for m in (model, twin))
    one, nan = torch.ones(1, 1), torch.tensor([[float("nan")]])
    for x in (one, nan, nan, one, one):
        guard.step([model(x).sum()])
    guard.check()
    for _ in range(3):
        other.step([twin(one).sum()])
    assert torch.equal(model.weight, twin.weight) and guard.count == {"skipped": 2, "row": 0}
    for _ in range(3):
        guard.step([model(torch.tensor([[float("inf")]])).sum()])
    with pytest.raises(BadInput, match="smaller learning rate"):
        guard.check()


@pytest.mark.parametrize("extra", [dict(), dict(states="noised", consistency=0.3), dict(states="terminal"), dict(kl="loss"),
                                   dict(algo="loop", path_events=0), dict(algo="loop", path_events=2),
                                   dict(algo="prdp", path_events=0), dict(micro_batch=3)])
def test_no_update_waits_for_the_device(extra, monkeypatch):
    """Whatever reads a tensor's value on the host is forbidden while updates run, the rollout being over."""
    flags, model, process = replace(train.Flags(), **extra), network(4, 6), Absorbing(4)
    path = process.sample(model, 8, 6)
    with torch.no_grad():
        logp_ref = process.replay(model, path)         # it asks which states were visited, once a path
    guard = train.Guard(model, torch.optim.AdamW(model.parameters(), 1e-3, fused=True), 1.0)
    terms = train.objective(flags, process, model, model, path, torch.randn(1, 8), torch.randn(8), logp_ref, 0.1)
    before = model.output.weight.clone()

    def forbidden(*_, **__):
        raise AssertionError("a host synchronisation")
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "numpy", "cpu"):
            patch.setattr(torch.Tensor, name, forbidden)
        for _ in range(2):
            guard.step(loss for loss, _ in terms())
    assert not torch.equal(before, model.output.weight) and guard.count["skipped"] == 0


def test_a_learning_rate_that_blows_up_ends_in_one_line(tmp_path):
    done = command(f"--out={tmp_path}", *TINY, "--lr=1e38", "--updates=30")
    assert done.returncode == 2 and "try a smaller learning rate" in done.stderr.splitlines()[-1]
    assert weights(tmp_path, "pretrained") and "Traceback" not in done.stderr


@pytest.mark.parametrize("alphabet, length", [("01", 1), ("01", 5), ("ABC", 1)])
@pytest.mark.parametrize("process", ["absorb", "uniform"])
def test_a_length_of_one_and_an_alphabet_of_two(alphabet, length, process, tmp_path, monkeypatch):
    data = lambda n, generator: torch.randint(len(alphabet), (n, length), generator=generator)
    monkeypatch.setitem(TASKS, "small", Task("small", alphabet, length, data, lambda tokens: (tokens == 1).float().mean(1)))
    train.main(["--task=small", f"--process={process}", f"--out={tmp_path}", *TINY, "--iters=3"])
    assert numbers(tmp_path)[-1]["share_of_optimum"] <= 1 + 1e-4


# ---- interruption -------------------------------------------------------------------------------------------------------

def start(*args):
    return subprocess.Popen([sys.executable, ROOT / "train.py", *args], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            text=True)


def test_ctrl_c_finishes_the_update_saves_says_how_to_go_on_and_exits_with_130(tmp_path):
    process = start(f"--out={tmp_path}", *TINY, "--iters=100000")
    deadline = time.time() + 120
    metrics = tmp_path / "metrics.jsonl"
    while time.time() < deadline and not (metrics.exists() and "finetune" in metrics.read_text()):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stderr.read().splitlines()[-1] == \
        f"train.py: stopped; go on with: python train.py --resume --out={tmp_path}"
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert last["iter"] == numbers(tmp_path)[-1]["iter"] and last["phase"] == "finetune" and weights(tmp_path)


def test_a_run_killed_ten_times_ends_with_the_same_numbers(tmp_path):
    """SIGKILL at random moments, in pre-training and in fine-tuning; then metrics and weights, bit for bit."""
    args = [*TINY, "--pretrain_iters=60", "--iters=20", "--save_every=0", "--advantage=ppo", "--ref_every=3", "--dropout=0.1"]
    assert command(f"--out={tmp_path / 'whole'}", *args).returncode == 0
    out, chance = tmp_path / "killed", random.Random(0)
    process, kills, phases = start(f"--out={out}", *args), 0, set()
    while kills < 10:
        before = (out / "last.pt").stat().st_mtime_ns if (out / "last.pt").exists() else 0
        while process.poll() is None and not ((out / "last.pt").exists() and (out / "last.pt").stat().st_mtime_ns > before):
            time.sleep(0.005)                          # it has got further than the sitting before ...
        time.sleep(chance.uniform(0, 0.1))             # ... and may be anywhere: in an update, or in the middle of a file
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        phases.add(torch.load(out / "last.pt", weights_only=True)["phase"])
        kills += 1
        process = start(f"--out={out}", "--resume")
    process.communicate(timeout=120)
    assert command(f"--out={out}", "--resume").returncode == 0
    assert kills == 10 or phases == {"pretrain", "finetune"}
    assert numbers(out) == numbers(tmp_path / "whole")
    for name in ("pretrained", "finetuned"):
        a, b = weights(out, name), weights(tmp_path / "whole", name)
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_resume_refuses_other_flags_and_empty_folders(tiny, tmp_path):
    for args, message in ((["--lr=0.5"], "--lr=0.5: the run in"), (["--task=toy", "--iters=7"], "--iters=7: the run in")):
        done = command(f"--out={tiny[0]}", "--resume", *args)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    done = command(f"--out={tmp_path / 'none'}", "--resume")
    assert done.returncode == 2 and "holds no run to go on with" in done.stderr and not (tmp_path / "none").exists()


def test_compiled_blocks_compute_the_same_in_every_copy(monkeypatch):
    """Rows and slots of all sizes, and the fast path; a deep copy loses its compilation and gets it back. (The graphs
    are run as they were traced: building machine code is the compiler's business, and takes a minute.)"""
    real, graphs = torch.nn.Module.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: real(self, backend=backend, **kwargs))
    plain, flags = network(4, 8), replace(train.Flags(), compile=True)
    fast = train.compiled(flags, deepcopy(plain))
    again = train.compiled(flags, deepcopy(fast))
    for B, k in ((5, 2), (3, 7), (2, 2)):
        x, slots = torch.randint(5, (B, 8)), torch.randint(8, (B, k))
        for model in (fast, again):
            assert torch.allclose(model(x), plain(x), atol=1e-5)
            assert torch.allclose(model.hidden_at(x, None, slots), plain.hidden_at(x, None, slots), atol=1e-5)
    assert graphs and all(block._compiled_call_impl is not None for block in again.blocks)


# ---- several processes ----------------------------------------------------------------------------------------------------

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def torchrun(*args, timeout=120):
    """Two processes on this machine; a hang is a failure."""
    return subprocess.run([*TORCHRUN, *map(str, args)], capture_output=True, text=True, timeout=timeout)


def test_two_processes_learn_what_one_does_with_the_whole_batch(tmp_path):
    assert command(tmp_path / "one.pt", script="tests/ranks.py").returncode == 0
    done = torchrun(ROOT / "tests/ranks.py", tmp_path / "two.pt")
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert torch.equal(one["rewards"], two["rewards"]) and one["losses"] == pytest.approx(two["losses"], abs=1e-5)
    start = network(4, 6).state_dict()
    for name in one["model"]:
        assert torch.allclose(one["model"][name], two["model"][name], atol=1e-5)
    assert any((one["model"][name] - start[name]).abs().max() > 1e-3 for name in start)


def test_a_run_of_two_processes_goes_on_to_the_same_numbers(tmp_path):
    """Stopped by SIGTERM, as a cluster does it; the rewards of both are counted, and nothing is written twice."""
    args = [*TINY, "--prompts=2", "--pretrain_batch=64", "--advantage=ppo", "--save_every=0"]
    assert torchrun(ROOT / "train.py", f"--out={tmp_path / 'whole'}", *args).returncode == 0
    lines = numbers(tmp_path / "whole")
    assert [line["queries"] for line in lines[1:]] == [16 * i for i in range(1, 7)]
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    last = torch.load(tmp_path / "part" / "last.pt", weights_only=True)
    assert len(last["random"]) == 2 and not torch.equal(last["random"][0]["torch"], last["random"][1]["torch"])
    out = tmp_path / "stopped"
    process = subprocess.Popen([*TORCHRUN, ROOT / "train.py", f"--out={out}", *args], stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 100
    while time.time() < deadline and not (out / "last.pt").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    done = torchrun(ROOT / "train.py", f"--out={out}", "--resume")
    assert done.returncode == 0, done.stderr
    assert numbers(out) == lines
    a, b = weights(out), weights(tmp_path / "whole")
    assert all(torch.equal(a[name], b[name]) for name in a)
    done = command(f"--out={out}", "--resume")
    assert done.returncode == 2 and "was saved by 2 processes: this is 1" in done.stderr


def test_a_process_that_dies_ends_the_run(tmp_path):
    (tmp_path / "own.py").write_text("import os\ndef score(samples):\n"
                                     "    if os.environ['RANK'] == '1' and len(samples) > 2:\n        os._exit(3)\n"
                                     "    return [0.0] * len(samples)\n")
    done = torchrun(ROOT / "train.py", f"--out={tmp_path / 'run'}", *TINY, "--prompts=2",
                    f"--reward={tmp_path / 'own.py'}:score")
    assert done.returncode != 0 and "exitcode  : 3" in done.stderr


def test_prompts_must_be_shared_out_evenly(tmp_path):
    done = torchrun(ROOT / "train.py", f"--out={tmp_path / 'run'}", *TINY, "--prompts=3")
    assert done.returncode != 0 and "--prompts=3: 2 processes share it: a multiple of 2 is needed" in done.stderr
    assert not (tmp_path / "run").exists()


# ---- checkpoints --------------------------------------------------------------------------------------------------------

class Bomb:
    """A pickle that leaves a file behind when it is loaded carelessly."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(script, tiny, tmp_path):
    out, left = tmp_path / "run", tmp_path / "left"
    shutil.copytree(tiny[0], out)
    for name in ("last.pt", "pretrained.pt", "finetuned.pt"):
        torch.save(dict(model=Bomb(left)), out / name)
    done = command(*([f"--out={out}", "--resume"] if script == "train.py" else [f"--run={out}"]), script=script)
    assert done.returncode == 2 and "is no checkpoint of plain tensors" in done.stderr and done.stderr.count("\n") == 1
    assert not left.exists()
    torch.load(out / "last.pt", weights_only=False)            # the bomb is live: a careless load would have run it
    assert left.exists()


def test_damaged_checkpoints_and_those_of_another_shape_get_a_line(tiny, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(tiny[0], out)
    whole = (out / "finetuned.pt").read_bytes()
    (out / "finetuned.pt").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(BadInput, match="damaged"):
        sample.main([f"--run={out}", "--which=finetuned"])
    torch.save(dict(model=network(4, 6, n_embd=32).state_dict()), out / "finetuned.pt")
    with pytest.raises(BadInput, match="another shape"):
        sample.main([f"--run={out}", "--which=finetuned"])
    before, last = (out / "finetuned.pt").read_bytes(), torch.load(out / "last.pt", weights_only=True)
    torch.save({**last, "parts": {}}, out / "last.pt")
    with pytest.raises(BadInput, match="last.pt belongs to a run of another shape"):
        train.main([f"--out={out}", "--resume"])
    assert (out / "finetuned.pt").read_bytes() == before
    shutil.copy(out / "pretrained.pt", out / "last.pt")
    with pytest.raises(BadInput, match="is not what --resume saved"):
        train.main([f"--out={out}", "--resume"])
    (out / "finetuned.pt").unlink()
    with pytest.raises(BadInput, match="finetuned.pt does not exist"):
        sample.main([f"--run={out}", "--which=finetuned"])


def test_a_save_never_leaves_a_torn_file(tmp_path, monkeypatch):
    model = network(2, 2)
    train.save(tmp_path / "m.pt", TASKS["toy"], Absorbing(2), model)
    good = (tmp_path / "m.pt").read_bytes()

    def torn(what, file):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")
    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(BadInput, match="cannot write .*m.pt: disk full"):
        train.save(tmp_path / "m.pt", TASKS["toy"], Absorbing(2), model)
    assert (tmp_path / "m.pt").read_bytes() == good
