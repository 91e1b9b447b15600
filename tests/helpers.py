"""What the tests of whole runs share: a tiny task, its runs in this process and in others, the
files that they leave, and the calls that a function got.

A test that needs a process of its own (to be killed, or two of them) forks it from a server that
has imported torch once: see `launch`."""
import json
import multiprocessing
import os
import pkgutil
import re
import runpy
import signal
import socket
import sys
from itertools import count
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.run

import sample
import train
from rewards import TASKS, Task

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--pretrain_iters=6", "--pretrain_batch=32", "--iters=4", "--group=8", "--updates=2",
        "--n_embd=16", "--n_layer=1", "--n_head=2", "--eval_every=2", "--replay=0",
        "--data_size=100", "--report_samples=20"]

# -----------------------------------------------------------------------------
# a task of three positions and two letters


@pytest.fixture(autouse=True)
def two(monkeypatch):
    """--task=two, and no curve.png: to draw it takes longer than a tiny run."""
    serve()
    set_two(monkeypatch)
    monkeypatch.setattr(sample, "plot_curve", lambda args: None)


def share_of(letter):
    return lambda samples: [s.count(letter) / len(s) for s in samples]


def set_two(monkeypatch, reward=share_of("1"), letters="01", L=3, exact=True):
    """Give --task=two another reward or size, or no exact optimum (which queries all sequences)."""
    class Two(Task):
        alphabet, length, flags = letters, L, dict(exact=exact)

        def draw(self, n, generator):
            return torch.randint(len(letters), (n, self.length), generator=generator)

        def is_held(self, x):                           # nothing: there are too few
            return torch.zeros(len(x), dtype=torch.bool)

        def reward(self, samples):
            return reward(samples)
    monkeypatch.setitem(TASKS, "two", Two)

# -----------------------------------------------------------------------------
# runs in this process, and what they leave


def run(out, *args, task="two"):
    """A tiny run -> its lines of metrics."""
    train.main([f"--task={task}", f"--out={out}", *TINY, *args])
    return lines(out)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A finished run -> its folder; what changes it works on a copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "plot_curve", lambda args: None)
        out = tmp_path_factory.mktemp("toy") / "run"
        run(out, task="toy")
    return out


def resume(out, *args):
    train.main([f"--out={out}", "--resume", *args])
    return lines(out)


def lines(out, phase=None):
    """Of metrics.jsonl."""
    everything = [json.loads(line) for line in open(out / "metrics.jsonl")]
    return [line for line in everything if phase in (None, line["phase"])]


def queried(out, key="iter"):
    """The lines of rewards.jsonl that belong to rollouts, or to a stage."""
    return [line for line in map(json.loads, open(out / "rewards.jsonl")) if key in line]


def saved_as(out, name):
    return torch.load(out / f"{name}.pt", weights_only=True)


def weights(out, name="finetuned"):
    return saved_as(out, name)["model"]


def same(a, b):
    """Are these weights equal, bit for bit?"""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_runs(a, b):
    """Have two runs left the same numbers?"""
    for name in ("metrics.jsonl", "rewards.jsonl", "report.json"):
        assert (a / name).read_text() == (b / name).read_text(), name
    for name in ("pretrained", "finetuned"):
        assert same(weights(a, name), weights(b, name)), name
    return True


def rollouts(out):
    """The buffer of last.pt: per rollout a dict of tokens, given, log_ratio, log_ref, reward, iter.
    """
    return saved_as(out, "last")["buffer"]


def fails(main, args, message, capsys):
    """The last line on standard error tells what is wrong; status 2, and no traceback."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "Traceback" not in err
    assert re.search(message, last), last
    return err


def captured(monkeypatch, owner, name):
    """Every call of a function: its arguments, then its result."""
    calls, real = [], getattr(owner, name)

    def spy(*args, **more):
        result = real(*args, **more)
        calls.append((*args, *more.values(), result))
        return result
    monkeypatch.setattr(owner, name, spy)
    return calls

# -----------------------------------------------------------------------------
# runs in other processes


FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["helpers", "torch._dynamo", "torch._inductor"])  # for optimizers


def serve():
    """Start the server, which then imports torch beside the first tests."""
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()


def launch(folder, function, *args, n=1):
    """Start function(*args) in n processes that know of each other -> them. What they print goes to
    folder/printed."""
    serve()
    with socket.socket() as s:                          # to find a port that is free
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [FORK.Process(target=begin, args=(folder, function, args, rank, n, port))
                 for rank in range(n)]
    for process in processes:
        process.daemon = True                           # it ends with the tests
        process.start()
    return processes


def begin(folder, function, args, rank, n, port):
    """In a new process: be one of n, then do it. Ctrl-C works, even where the parent ignores it."""
    with open(folder / "printed", "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(port))
    train.RANK, train.WORLD_SIZE, train.MASTER = rank, n, rank == 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    function(*args)


def finished(folder, function, *args, n=1):
    """Do it in n processes, to a good end."""
    processes = launch(folder, function, *args, n=n)
    for process in processes:
        process.join(120)
    printed = (folder / "printed").read_text()
    assert [process.exitcode for process in processes] == [0] * n, printed
    return printed


def killed(folder, argv, phase, name, nth, moment, n=1):
    """A run of n processes, the last of which is killed (SIGKILL) before or after the nth call of a
    function in a phase; the others end as torchrun would end them."""
    *others, last = launch(folder, fatal_run, argv, phase, name, nth, moment, n=n)
    last.join(120)
    for process in others:
        process.kill()
        process.join()
    assert last.exitcode == -signal.SIGKILL, (folder / "printed").read_text()


def fatal_run(argv, phase, name, nth, moment):
    real_phase, calls = getattr(train, phase), count(1)

    def fatal_phase(*args):
        module, _, function = name.rpartition(".")
        owner = pkgutil.resolve_name(module)
        real = getattr(owner, function)

        def fatal(*args, **more):
            n = next(calls)
            if n == nth and moment == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **more)
            if n == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        setattr(owner, function, fatal)
        return real_phase(*args)
    if train.RANK == train.WORLD_SIZE - 1:
        setattr(train, phase, fatal_phase)
    quick_main(argv)


def command(folder, script, *args):
    """python script args -> what it prints."""
    return finished(folder, script_main, [str(ROOT / script), *map(str, args)])


def script_main(argv):
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def quick_main(argv):
    """train.py, but for curve.png."""
    sample.plot_curve = lambda args: None
    train.main(argv)


def torchrun(folder, *args):
    """The command torchrun, with two processes, which import torch themselves."""
    return finished(folder, torch.distributed.run.main,
                    ["--standalone", "--nproc_per_node=2", *map(str, args)])


def noting_reward(folder):
    """A reward file in a new folder, which notes every query before it answers -> its flag."""
    folder.mkdir()
    (folder / "own.py").write_text("""
import json, os
from pathlib import Path

def score(samples):
    with open(Path(__file__).with_name("asked"), "a") as file:
        file.write(json.dumps(samples) + "\\n")
    return answer(samples)

def answer(samples):
    return [s.count("T") / len(s) for s in samples]
""")
    return f"--reward={folder / 'own.py'}:score"


def asked(folder):
    """What that reward was asked: list of batches."""
    return [json.loads(line) for line in open(folder / "asked")]
