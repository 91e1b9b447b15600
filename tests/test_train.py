"""Whole runs of train.py at a tiny size: what they leave, and every choice of their flags; then an
iteration taken apart: what the loop gives to each method, and what it makes of the answers.

Read first test_an_iteration_is_its_formulas_written_out."""
import json
import math
import os
import random
import re
import time
from argparse import Namespace
from copy import deepcopy
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
import torch

import sample
import sepo
import train
from diffusion import Absorbing
from diffusion import Path as Transitions
from exact import has_bfloat16, network, posterior_table, random_law, rank
from helpers import (TINY, captured, command, fails, lines, queried, resume, rollouts, run, same,
                     saved_as, set_two, share_of, weights)
from helpers import two  # noqa: F401  (a fixture of every test)
from model import Block, Muon, make_model, make_optimizers, orthogonal
from rewards import TASKS, RewardLog

# -----------------------------------------------------------------------------
# a whole run


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy through the command line, once."""
    out = tmp_path_factory.mktemp("toy") / "run"
    return out, command(out.parent, "train.py", "--task=toy", f"--out={out}", *TINY)


def test_a_run_leaves_its_files_and_says_what_to_type_next(toy):
    out, printed = toy
    assert {file.name for file in out.iterdir()} == {
        "config.json", "metrics.jsonl", "rewards.jsonl", "pretrained.pt", "finetuned.pt", "last.pt",
        "best.pt", "curve.png", "report.json", "lock"}
    assert (out / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert f"python sample.py --run={out}" in printed.splitlines()[-1]
    assert "share_of_optimum" in printed and "finetune" in printed
    assert "best of 16 is not shown: 5 groups are too few; --report_samples=64 has 16" in printed
    report = json.loads((out / "report.json").read_text())
    assert set(report) == {"data", "pre-trained", "fine-tuned"}
    assert not any("inner pads" in row for row in report.values())


def test_every_line_of_metrics_holds_what_it_should(toy):
    fine = lines(toy[0], "finetune")
    assert [line["iter"] for line in fine] == [1, 2, 3, 4]
    always = {"reward", "reward_std", "best", "kl", "clip_fraction", "grad_norm", "queries"}
    assert all(always <= set(line) for line in fine)
    exact = {"exact_reward", "exact_kl", "share_of_optimum", "optimum_reward"}
    assert [exact <= set(line) for line in fine] == [False, True, False, True]
    assert {"loss", "held_out_loss"} <= set(lines(toy[0], "pretrain")[-1])


def test_rewards_are_a_memo_of_distinct_queries(toy):
    """One line each, with a rollout or a stage; the exact optimum was asked apart."""
    everything = [json.loads(line) for line in open(toy[0] / "rewards.jsonl")]
    assert len(everything) == len({line["sample"] for line in everything}) < 250
    assert all(("iter" in line) != ("stage" in line) for line in everything)
    stages = [line["stage"].split()[0] for line in queried(toy[0], "stage")]
    assert stages[:2] == ["check"] * 2 and set(stages[2:]) == {"report"}
    for i, line in enumerate(lines(toy[0], "finetune"), 1):
        assert line["queries"] == sum(query["iter"] <= i for query in queried(toy[0])) <= 8 * i


def test_checkpoints_are_plain_tensors(toy):
    for name in ("pretrained", "finetuned"):
        saved = saved_as(toy[0], name)
        assert saved["alphabet"] == "ACGT" and saved["length"] == 6 and saved["pad"] == ""
        assert (saved["prompts"] == 4).all() and saved["prompts"].shape == (100, 6)
        model = make_model(Namespace(**saved["flags"]), 4, 6)
        model.load_state_dict(saved["model"])


def test_config_holds_the_flags_of_the_run(tmp_path):
    argv = ["--task=two", f"--out={tmp_path}", *TINY, "--algo=reinforce", "--on_error=0.5"]
    args, _ = train.read_flags(argv)
    train.main(argv)
    flags = {k: v for k, v in asdict(args).items() if k not in ("resume", "overwrite", "out")}
    assert json.loads((tmp_path / "config.json").read_text()) == flags | dict(processes=1)
    assert saved_as(tmp_path, "finetuned")["flags"] == flags


@pytest.mark.parametrize("extra", [
    ["--steps=2", "--advantage=grpo"],
    ["--beta=0", "--path_events=3"], ["--dropout=0.1"],
    pytest.param(["--dtype=bfloat16"], marks=pytest.mark.skipif(not has_bfloat16(), reason="none")),
    ["--corrector_steps=2"], ["--clip_mode=cap", "--micro_batch=7"],
    ["--algo=loop", "--micro_batch=9"], ["--algo=loop", "--path_events=2", "--process=uniform"],
    ["--algo=prdp", "--group=4", "--prompts=2"], ["--algo=prdp", "--process=uniform"],
    ["--algo=prdp", "--micro_batch=7"], ["--algo=published"], ["--algo=reinforce", "--conv=3"],
    ["--replay=2", "--path_events=0"], ["--replay=2", "--process=uniform"],
    ["--replay=1", "--algo=prdp"], ["--replay=1", "--algo=loop", "--explore=0.5"],
    ["--algo=wdce", "--group=2"],
    ["--process=uniform", "--replay=2", "--denoise=0"],
    ["--process=uniform", "--corrector_steps=3", "--corrector_t=0.3", "--path_events=2"]])
def test_every_choice_runs(extra, tmp_path):
    metrics = run(tmp_path, "--pretrain_iters=2", "--iters=2", *extra)
    assert metrics[-1]["share_of_optimum"] <= 1 + 1e-4


@pytest.mark.parametrize("letters, L", [("01", 1), ("A", 2)])
@pytest.mark.parametrize("process", ["absorb", "uniform"])
def test_the_smallest_spaces(letters, L, process, tmp_path, monkeypatch):
    set_two(monkeypatch, share_of(letters[0]), letters, L)
    assert run(tmp_path, f"--process={process}")[-1]["share_of_optimum"] <= 1 + 1e-4


def test_learning_on_the_toy_reaches_most_of_the_optimum_in_few_rollouts(tmp_path):
    """What an update with a wrong sign or scale cannot do."""
    metrics = run(tmp_path, "--pretrain_iters=100", "--iters=12", "--group=64", "--replay=10",
                  "--lr=0.003", "--n_embd=32", "--data_size=5000", "--eval_every=12", task="toy")
    assert metrics[-1]["share_of_optimum"] > 0.4        # five seeds: 0.56 to 0.59


def test_a_constant_reward_moves_nothing_but_by_the_kl(tmp_path, monkeypatch):
    set_two(monkeypatch, lambda samples: [1.0] * len(samples))
    run(tmp_path, "--beta=0")
    assert same(weights(tmp_path, "pretrained"), weights(tmp_path))


PLOT = sample.plot_curve


@pytest.mark.parametrize("task, columns", [
    ("dna", {"true activity", "GC"}), ("arithmetic", {"held_out_reward"}), ("text", set())])
def test_tasks_beyond_the_toy_run_resume_and_are_sampled(task, columns, tmp_path, capsys,
                                                         monkeypatch):
    if task == "dna":                                           # columns of its own
        monkeypatch.setattr(sample, "plot_curve", PLOT)
    run(tmp_path, task=task)
    text = (tmp_path / "report.json").read_text()
    report = json.loads(text)
    assert set(report) == {"data", "pre-trained", "fine-tuned"}
    assert all(columns - {"held_out_reward"} <= set(row) and 0 < row["distinct"] <= 1
               for row in report.values())
    measured = [bool(columns) and columns <= set(line) for line in lines(tmp_path, "finetune")]
    assert measured == [False, task != "text"] * 2
    assert (tmp_path / "curve.png").exists() == (task == "dna")
    for gone in ("finetuned.pt", "report.json"):
        (tmp_path / gone).unlink()
    resume(tmp_path)
    assert (tmp_path / "report.json").read_text() == text
    capsys.readouterr()
    sample.main([f"--run={tmp_path}", "--n=4", "--format=jsonl"])
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_own_data_and_reward_and_a_start_from_a_saved_model(tmp_path, monkeypatch, capsys):
    """The second run, with the default size of network, takes over that of the first."""
    monkeypatch.chdir(tmp_path)
    Path("mine.fa").write_text("".join(f">{i}\n{'ACGT'[i % 4] * 7}\n" for i in range(40)))
    Path("my_reward.py").write_text("def score(samples):\n"
                                    "    return [s.count('G') / 7 for s in samples]\n")
    data = ["--data=mine.fa", "--reward=my_reward.py:score", "--length=7"]
    train.main([*data, "--out=a", *TINY])
    init = [*data, "--init=a/pretrained.pt", "--iters=2", "--group=8", "--report_samples=9"]
    train.main([*init, "--out=b"])
    capsys.readouterr()
    assert [line["phase"] for line in lines(Path("b"))] == ["finetune"] * 2
    assert same(weights(Path("a"), "pretrained"), weights(Path("b"), "pretrained"))
    config = json.loads(Path("b/config.json").read_text())
    assert [config[name] for name in ("n_layer", "n_head", "n_embd")] == [1, 2, 16]
    resume(Path("b"), "--iters=3")
    capsys.readouterr()
    sample.main(["--run=b", "--n=3"])
    drawn = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(drawn) == 3
    assert all(float(r) == pytest.approx(s.count("G") / 7, abs=1e-4) for r, s in drawn)
    torch.save([0, 1], "bare.pt")
    for args, message in (
            (["--task=dna", "--init=a/pretrained.pt", "--length=8"],
             "holds a model of .* 7, .*: this run has .* 8, "),
            (["--task=text", "--init=a/pretrained.pt"], "holds a model of"),
            ([*data, "--init=a/pretrained.pt", "--process=uniform"], "holds a model of"),
            ([*data, "--pad=N", "--init=a/pretrained.pt"], "holds a model of"),
            (["--init=none.pt"], "none.pt is missing"),
            (["--init=mine.fa"], "mine.fa is damaged or not a checkpoint"),
            (["--init=bare.pt"], "is not a model of train.py")):
        fails(train.main, ["--out=c", "--data_size=100", *args], message, capsys)
        assert not Path("c/config.json").exists()

# -----------------------------------------------------------------------------
# an iteration, taken apart


BIG = ["--iters=2", "--updates=1", "--beta=0.3", "--lr=0.01",   # so that rollout 2 has a log-ratio
       "--denoise=0"]


def two_rollouts(out):
    """Rewards and log-ratios [8] of the two rollouts of a run."""
    first, second = rollouts(out)
    assert (first["iter"], second["iter"]) == (1, 2)
    return [(old["reward"][0], old["log_ratio"][0].double()) for old in (first, second)]


@pytest.mark.parametrize("algo, kind", [("sepo", "grpo"), ("loop", "loo"), ("reinforce", "loo")])
def test_an_iteration_is_its_formulas_written_out(algo, kind, tmp_path, monkeypatch):
    """Advantages, clips and rates of the updates on the second rollout and on a remembered one."""
    set_two(monkeypatch, share_of("C"), "ACGT", 4)
    losses = captured(monkeypatch, sepo, "sepo_loss" if algo == "sepo" else "loop_loss")
    steps = captured(monkeypatch, train, "step")
    monkeypatch.setattr(sepo, "remembered", lambda past, *_: past[0])   # the first rollout
    n = 0 if algo == "reinforce" else 1                                 # rounds on it
    run(tmp_path, f"--algo={algo}", f"--replay={n}", "--path_events=1", f"--advantage={kind}", *BIG)
    (_, log_ratio1), (R, log_ratio) = two_rollouts(tmp_path)
    assert log_ratio1.abs().max() < 1e-5 and log_ratio.abs().max() > 0.1

    def expected(R, log_ratio):
        returns = R - 0.3 * log_ratio
        return {"grpo": (returns - returns.mean()) / (R.var(correction=0) + 0.3 ** 2).sqrt(),
                "loo": (returns - returns.mean()) * 8 / 7}[kind]
    _, part, A, clip, *mode, _ = losses[1 + n]                  # of all: 1 + n per iteration
    assert torch.allclose(A, expected(R, log_ratio).float(), atol=1e-5)
    assert len(losses) == 2 * (1 + n) and len(part) == 8
    assert clip == (float("inf") if algo == "reinforce" else 0.1) and mode in ([], ["stop"])
    assert [call[2] for call in steps[6:]] == pytest.approx([0.01] * (1 + n) + [0.005] * (1 + n))


@pytest.mark.parametrize("events", [0, 1])
def test_a_replayed_path_is_scored_by_the_current_model(events, tmp_path, monkeypatch):
    """Not by the one that drew the samples, nor by that of the iteration's start. The log-ratio in
    the returns is to the reference; so is log_ref of the rollouts."""
    set_two(monkeypatch, share_of("C"), "ACGT", 4)
    losses, worth = captured(monkeypatch, sepo, "sepo_loss"), captured(monkeypatch, sepo, "worth")
    whole = captured(monkeypatch, Transitions, "subset")
    drawn = captured(monkeypatch, train, "roll_out")
    made = captured(monkeypatch, Absorbing, "path_to")
    states, step = [], train.step

    def spy(model, *args):
        norm = step(model, *args)
        states.append(deepcopy(model.state_dict()))
        return norm
    monkeypatch.setattr(train, "step", spy)
    monkeypatch.setattr(sepo, "remembered", lambda past, *_: past[0])
    run(tmp_path, "--replay=1", f"--path_events={events}", *BIG)
    reference, _ = sample.load_model(tmp_path / "pretrained.pt")
    process, current = Absorbing(4), deepcopy(reference)

    def of(state, path):
        current.load_state_dict(state)
        with torch.no_grad():
            return process.logp(current, path)
    _, begin, now, _ = states[6:]                   # of iteration 2, and of the replay in it
    path, part = whole[3][0], losses[3][1]
    assert torch.equal(path.x, made[1][-1].x) and torch.equal(path.y, made[1][-1].y)
    for scored in (path, part):
        assert torch.allclose(scored.logp, of(now, scored), atol=1e-6)
        assert not torch.allclose(scored.logp, of(begin, scored), atol=1e-3)
    assert torch.allclose(losses[3][0], part.logp, atol=1e-6)       # the ratio starts at 1
    log_ref = path.per_sequence(of(reference.state_dict(), path))
    expected = path.per_sequence(path.logp) - log_ref
    assert torch.allclose(worth[3][2].flatten(), expected, atol=1e-5) and expected.abs().max() > 0.1
    old, = (old for old in rollouts(tmp_path) if old["iter"] == 2)
    tokens, *_, path = drawn[1][-1]
    log_ref = path.per_sequence(of(reference.state_dict(), path))
    assert torch.equal(old["tokens"], tokens) and torch.allclose(old["log_ref"][0], log_ref)
    assert torch.allclose(old["log_ratio"][0], path.per_sequence(path.logp) - log_ref)


def test_one_pass_of_the_model_serves_a_round_of_one_update(tmp_path, monkeypatch):
    """With whole paths: per rollout 1 + replay passes of the model, and as many of the reference.
    """
    passes = captured(monkeypatch, Absorbing, "logp")
    run(tmp_path, "--replay=3", "--path_events=0", "--report_samples=0", *BIG)
    is_reference = [not any(p.requires_grad for p in model.parameters())
                    for _, model, *_ in passes]
    assert (is_reference.count(False), is_reference.count(True)) == (2 * (1 + 3), 2 * (1 + 3))


def test_the_chain_has_the_steps_and_the_chunks_that_were_asked(tmp_path, monkeypatch):
    passes = captured(monkeypatch, Absorbing, "logp")
    run(tmp_path, "--steps=2", "--micro_batch=900", "--iters=1", "--report_samples=0")
    assert {(process.steps, process.chunk) for process, *_ in passes} == {(2, 900)}


def test_prdp_is_given_the_log_ratio_of_its_paths(tmp_path, monkeypatch):
    set_two(monkeypatch, share_of("C"), "ACGT", 4)
    losses = captured(monkeypatch, sepo, "prdp_loss")
    run(tmp_path, "--algo=prdp", *BIG)
    _, (R, log_ratio) = two_rollouts(tmp_path)
    _, _, rewards, given, beta, _, _ = losses[1]
    assert torch.equal(rewards[0], R) and torch.equal(given[0].double(), log_ratio) and beta == 0.3
    assert log_ratio.abs().max() > 0.05


def test_wdce_draws_rows_of_the_buffer_by_their_weights(tmp_path, monkeypatch):
    """One sample earns something, so at min_ess 1 and a small beta all updates draw it."""
    seen = []

    def reward(samples):
        seen.extend(samples)
        return [float(len(seen) > 5 and sample == seen[5]) for sample in samples]
    set_two(monkeypatch, reward, "ACGT", 8, exact=False)
    losses = captured(monkeypatch, sepo, "wdce_loss")
    run(tmp_path, "--algo=wdce", "--iters=2", "--min_ess=1", "--beta=0.001")
    best = TASKS["two"]().encode([seen[5]])
    for _, _, tokens, weights, _ in losses:
        assert (tokens == best).all() and (weights == 1 / 8).all() and len(tokens) == 8
    assert len(losses) == 2 * 2


def test_prompts_stay_in_replay_and_under_the_corrector(tmp_path, monkeypatch):
    made = captured(monkeypatch, Absorbing, "path_to")
    corrected = captured(monkeypatch, Absorbing, "correct_path")
    run(tmp_path, "--replay=2", "--corrector_steps=1", "--iters=1", "--prompts=2",
        "--report_samples=0", task="arithmetic")
    given = [call[2] for call in made] + [call[3] for call in corrected]
    assert len(given) == 2 + 1
    assert all(rows[:, :6].all() and not rows[:, 6:].any() for rows in given)


def test_explored_rows_keep_most_of_what_they_came_from(tmp_path, monkeypatch):
    set_two(monkeypatch, share_of("C"), "ACGT", 30, exact=False)
    drawn = captured(monkeypatch, Absorbing, "sample")
    run(tmp_path, "--explore=0.55", "--iters=2", "--report_samples=0")
    first, second = (call[4] for call in drawn[:2])             # the prompts of both rollouts
    assert (first == 4).all() and (second[4:] == 4).all()
    n_free = (second[:4] == 4).sum(dim=1)
    assert 0 < n_free.sum() and (n_free < 25).all()         # of 30, each with chance 0.5 at most


def test_what_is_logged_is_of_the_policys_own_samples(tmp_path, monkeypatch):
    """Not of the explored ones, of which a half of the second rollout is made."""
    set_two(monkeypatch, share_of("C"), "ACGT", 9, exact=False)
    monkeypatch.setattr(train, "measured", lambda task, samples, catch=False: dict(n=len(samples)))
    first, second = run(tmp_path, "--explore=0.5", "--iters=2", "--eval_every=1")[-2:]
    old = rollouts(tmp_path)[1]
    assert old["is_own"].tolist() == [[False] * 4 + [True] * 4]
    assert second["reward"] == pytest.approx(old["reward"][0, 4:].mean().item())
    assert second["kl"] == pytest.approx(old["log_ratio"][0, 4:].mean().item())
    assert (first["n"], second["n"]) == (8, 4)


@pytest.mark.parametrize("returns, is_best", [
    ([3], True), ([0, 3], True), ([9, 0, 2], False), ([9, 0, 5], True), ([0, 0, 8, -4], True),
    ([4, 3] + [0] * 9 + [4] * 9, True), ([4, 5] + [0] * 9 + [4] * 9, False)])
def test_the_best_policy_is_that_of_the_highest_mean_return(returns, is_best):
    """Evaluations after every second iteration and the last compare the means of ten; a return is
    the reward minus beta = 2 times the log-ratio 1. Known and recombined samples do not count."""
    def rollout(iter, value):
        reward = torch.tensor([[value, -99.0]]).double()        # the second is not its own
        is_own, one = torch.tensor([[True, False]]), torch.ones(1, 2)
        return sepo.Rollout(iter, None, None, is_own, one, one, reward)
    buffer = [rollout(0, 99.0)] + [rollout(i, value + 2.0) for i, value in enumerate(returns, 1)]
    assert train.is_best(Namespace(beta=2.0, eval_every=2), buffer) == is_best


def test_the_best_policy_is_kept(tmp_path, monkeypatch):
    """At the evaluations after iterations 2 and 4; here only the first is the best."""
    monkeypatch.setattr(train, "is_best", lambda args, buffer: len(buffer) == 2)
    run(tmp_path, "--lr=0.01")
    first, last = weights(tmp_path, "pretrained"), weights(tmp_path)
    best = weights(tmp_path, "best")
    assert not same(best, first) and not same(best, last)
    sample.main([f"--run={tmp_path}", "--which=best", "--n=2"])


def test_a_mean_return_is_that_of_all_processes_and_counts_the_kl(monkeypatch):
    """Two processes, beta = 2: the returns of an iteration are those of both."""
    monkeypatch.setattr(train, "WORLD_SIZE", 2)

    def rollout(iter, reward, log_ratio):
        column = torch.ones(1, 2)
        return sepo.Rollout(iter, None, None, column > 0, log_ratio * column, column,
                            reward * column.double())
    first, second = (rollout(1, 4.0, 0.0), rollout(1, 0.0, 0.0)), (rollout(2, 3.0, 0.0),) * 2
    args = Namespace(beta=2.0, eval_every=1)                    # means 2, then (2 + 3) / 2
    assert train.is_best(args, [*first, *second]) and not train.is_best(args, [*second, *first])
    assert train.is_best(args, [*second, *second])              # of equal ones the last
    assert not train.is_best(args, [*first, rollout(2, 3.0, 0.6), rollout(2, 3.0, 0.5)])


def test_rates_and_dropout_of_every_step(tmp_path, monkeypatch):
    """In pre-training: a warm-up of 50 steps, a decay to 5%, weight decay, and dropout also after
    an evaluation; in fine-tuning none of these but the decay."""
    steps, real, made = [], train.step, captured(monkeypatch, train, "make_optimizers")

    def spy(model, optimizers, lr):
        steps.append((lr, model.training))
        return real(model, optimizers, lr)
    monkeypatch.setattr(train, "step", spy)
    run(tmp_path, "--pretrain_iters=60", "--pretrain_lr=0.5", "--lr=0.25", "--iters=2",
        "--updates=1", "--report_samples=0")
    rates = [0.5 * min((i + 1) / 50, max(0.05, 1 - i / 60)) for i in range(60)]
    assert [lr for lr, _ in steps] == pytest.approx([*rates, 0.25, 0.125])
    assert [is_on for _, is_on in steps] == [True] * 60 + [False] * 2
    decays = [[o.param_groups[0]["weight_decay"] for o in call[-1]] for call in made]
    assert decays == [[0.01] * 2, [0.0] * 2]
    assert [train.decay(i, 10) for i in (0, 5, 10, 20)] == [1, 0.5, 0.05, 0.05]


def test_a_step_holds_the_norm_of_the_gradient_at_one():
    model = torch.nn.Linear(2, 1, bias=False)
    for gradient, length in ((5.0, 1.0), (0.5, 0.5)):
        torch.nn.init.zeros_(model.weight)
        model.weight.grad = gradient * torch.tensor([[0.6, -0.8]])
        norm = train.step(model, [torch.optim.SGD(model.parameters(), 9.0)], 2.0)
        assert norm.item() == pytest.approx(gradient) and model.weight.grad is None
        assert model.weight.tolist()[0] == pytest.approx([-1.2 * length, 1.6 * length])


def test_micro_batches_of_pre_training_add_up_to_the_batch(tmp_path, monkeypatch):
    """32 sequences at once, or 12, 12 and 8 of them; here with a loss that draws nothing."""
    def loss(self, model, x0, given):
        logits = model(x0)
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), x0.roll(1, dims=1))
    monkeypatch.setattr(Absorbing, "loss", loss)
    for n in (0, 12):
        run(tmp_path / str(n), f"--micro_batch={n}", "--iters=0", "--report_samples=0",
            "--pretrain_lr=0.05")
    whole, parts = (lines(tmp_path / n, "pretrain")[-1] for n in ("0", "12"))
    for name in ("loss", "grad_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4)


def test_every_seed_phase_iteration_and_process_draws_its_own(monkeypatch):
    drawn = set()
    for seed, phase, i, rank in product((0, 1), ("pretrain", "finetune"), range(3), range(2)):
        monkeypatch.setattr(train, "RANK", rank)
        train.seed_everything(Namespace(seed=seed), phase, i)
        drawn |= {(0, torch.rand(1).item()), (1, random.random())}
    assert len(drawn) == 2 * 24


def test_the_path_of_explored_rows_draws_every_position(monkeypatch):
    """Not only those that were masked: what they cost is the log-ratio of whole samples."""
    set_two(monkeypatch, share_of("C"), "ACGT", 9)
    task, process, model = TASKS["two"](), Absorbing(4), network(4, 9)
    args = Namespace(prompts=1, group=8, explore=0.5, beta=0.3, min_ess=2.0, corrector_steps=0)
    task.data, zero = task.draw(10, None), torch.zeros(1, 10)
    old = sepo.Rollout(1, task.data, task.data < 0, zero == 0, zero, zero, zero.double())
    tokens, given, is_own, path = train.roll_out(args, task, process, model, [old])
    assert is_own.tolist() == [False] * 4 + [True] * 4 and not given.any()
    assert path.per_sequence(torch.ones_like(path.logp)).tolist() == [9] * 8
    assert (path.y == tokens[path.row].gather(1, path.positions))[path.scored].all()
    with torch.no_grad():
        assert torch.allclose(path.logp, process.logp(model, path), atol=1e-6)


def test_the_best_reward_never_falls_and_is_that_of_the_run(tmp_path, monkeypatch):
    """The first sample of each rollout earns 9, 1, 5 and 1, all others 0; a known one 99."""
    def rollout(iter, value):
        reward = torch.tensor([[value, 0.0]]).double()
        return sepo.Rollout(iter, None, None, reward >= 0, reward, reward, reward)
    buffer, best = [rollout(0, 99.0)], []
    for i, value in enumerate((9.0, 1.0, 5.0), 1):
        buffer.append(rollout(i, value))
        zero = [torch.zeros(())]
        best.append(train.summary(buffer[-1:], buffer, zero, zero)["best"])
    assert best == [9, 9, 9]


def test_the_first_judgement_is_without_samples_that_failed(tmp_path, monkeypatch):
    advised = captured(monkeypatch, train, "advise")
    set_two(monkeypatch, lambda samples: [None if s[0] == "1" else 1.0 for s in samples],
            exact=False)
    run(tmp_path, "--iters=1", "--group=40", "--on_error=-9")
    (_, rewards, _), = advised
    assert 0 < len(rewards) < 40 and (rewards == 1).all()


def test_a_group_has_one_prompt_and_evaluations_have_held_out_ones(tmp_path, monkeypatch):
    drawn = captured(monkeypatch, train, "roll_out")
    asked = captured(monkeypatch, RewardLog, "query")
    run(tmp_path, "--iters=1", "--prompts=2", "--group=4", "--data_size=2000", task="arithmetic")
    prompts = drawn[0][-1][0][:, :6].view(2, 4, 6)
    assert (prompts == prompts[:, :1]).all() and not torch.equal(prompts[0], prompts[1])
    samples, = (call[2] for call in asked if "evaluation" in call)
    task = TASKS["arithmetic"]()
    assert len(samples) > 50 and task.is_held(task.encode(samples)).all()


def test_the_run_is_judged_at_first_and_halfway_and_its_folder_is_held(tmp_path, monkeypatch):
    """Once each; the folder also where it is resumed."""
    seen, held = [], captured(monkeypatch, train, "hold")
    monkeypatch.setattr(train, "advise_halfway", lambda buffer: seen.append(len(buffer)))
    monkeypatch.setattr(train, "advise", lambda args, rewards: seen.append(-len(rewards)))
    run(tmp_path)
    assert seen == [-8, 2] and [folder for folder, _ in held] == [tmp_path]
    resume(tmp_path)
    assert seen == [-8, 2] and [folder for folder, _ in held] == [tmp_path] * 2


@pytest.mark.parametrize("given, n_embd, n", [(None, 16, [1]), ("2", 16, []), (None, 66, [])])
def test_small_networks_take_one_thread_unless_told_otherwise(given, n_embd, n, tmp_path,
                                                              monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    run(tmp_path, "--iters=1", "--pretrain_iters=1", f"--n_embd={n_embd}")
    assert calls == n


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_muon_is_that_of_torch_in_float32(shape):
    """torch's rounds to bfloat16. Tall, wide and square matrices, with weight decay; two per shape,
    one of them with small gradients."""
    torch.manual_seed(0)
    first = torch.randn(2, *shape)
    ours, theirs = ([torch.nn.Parameter(matrix.clone()) for matrix in first] for _ in range(2))
    optimizers = [Muon(ours, weight_decay=0.1),
                  torch.optim.Muon(theirs, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]
    for _ in range(5):
        for a, b, scale in zip(ours, theirs, (1, 1e-3)):
            a.grad = b.grad = scale * torch.randn(shape)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.02
            optimizer.step()
    for a, b, before in zip(ours, theirs, first):
        assert (a - b).norm() < 0.03 * (a - before).norm()
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
    assert 0.5 < values.min() and values.max() < 1.3


def test_a_new_network_predicts_evenly_and_keeps_its_scale_at_any_depth():
    args = Namespace(n_layer=8, n_head=2, n_embd=64, conv=0, dropout=0.0, process="uniform")
    torch.manual_seed(0)
    model = make_model(args, 5, 6)
    assert (model(torch.randint(6, (2, 6)), torch.rand(2)) == 0).all()
    for block in model.blocks:
        for layer, std in ((block.up, 0.02), (block.query, 0.02), (block.out, 0.005),
                           (block.down, 0.005)):                # 0.02 / sqrt(2 * 8)
            assert layer.weight.std().item() == pytest.approx(std, rel=0.1)


def test_dropout_is_in_three_places_of_a_block_in_training_alone():
    """At p = 1 nothing of both branches is left; where the attention alone drops, the MLP is."""
    x, block = torch.randn(2, 5, 16), network(4, 5, n_embd=16, n_layer=1).blocks[0]
    plain = block(x)
    block.drop.p = 1.0
    assert torch.equal(block(x), plain) and torch.equal(block.train()(x), x)
    real, block.drop.p, seen = block.drop.forward, 0.25, []
    block.drop.forward = lambda h: seen.append((real(h) == 0).float().mean().item()) or h
    torch.manual_seed(0)
    noisy = block(x)
    assert len(seen) == 2 and seen == pytest.approx([0.25] * 2, abs=0.1)
    assert not torch.allclose(noisy, plain)                     # that of the attention
    block.drop.forward = real
    assert torch.equal(block.eval()(x), plain)


def test_the_network_reads_the_time_in_waves_from_one_thousandth_on():
    """1000 t times 10000^(-j / half)."""
    model, x = network(4, 3, n_embd=8, time_conditioning=True), torch.zeros(1, 3, dtype=torch.long)
    model.time = torch.nn.Identity()
    plain = model.token(x) + model.position.weight[:3]
    waves = (model.embed(x, torch.tensor([0.0123])) - plain)[0, 1]
    angles = [12.3, 1.23, 0.123, 0.0123]
    expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    assert waves.tolist() == pytest.approx(expected, abs=1e-4)


def test_every_parameter_has_one_optimizer():
    model = network(4, 6, conv=3)
    muon, adamw = make_optimizers(model, weight_decay=0.25)
    found = [p for optimizer in (muon, adamw) for p in optimizer.param_groups[0]["params"]]
    assert {id(p) for p in found} == {id(p) for p in model.parameters()}
    assert len(found) == len(list(model.parameters()))
    assert len(muon.param_groups[0]["params"]) == 5 * 2         # of each of two blocks
    assert all(o.param_groups[0]["weight_decay"] == 0.25 for o in (muon, adamw))


def test_the_measurements_for_a_gpu_run_here(tmp_path):
    """All parts of gpu.py but those that run train.py, and the slow one."""
    printed = command(tmp_path, "tests/gpu.py", "--quick", f"--out={tmp_path}", "--parts",
                      "samples", "captured_as_the_loop", "updates_as_on_the_cpu",
                      "ratios_at_the_start", "sampling", "updates")
    assert "0 of 6 parts failed" in printed
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert all(row["p_value"] > 1e-4 for row in found["samples"])
    assert all(row["equal"] == 1 for row in found["captured_as_the_loop"])
    assert all(row["gradient"] < 1e-3 for row in found["updates_as_on_the_cpu"]
               if row["dtype"] == "float32")


def test_prompts_are_not_noised_in_pre_training(tmp_path, monkeypatch):
    """The loss is given the positions of a+b=, of its own batch and of the held-out sequences."""
    losses = captured(monkeypatch, Absorbing, "loss")
    run(tmp_path, "--iters=1", "--prompts=2", task="arithmetic")
    assert len(losses) >= 8
    for _, _, x0, given, _ in losses:
        assert given.shape == x0.shape and given[:, :6].all() and not given[:, 6:].any()


def test_the_first_rollout_has_no_kl_whatever_the_dropout(tmp_path):
    """Dropout is for pre-training alone, so the model starts as its reference."""
    metrics = run(tmp_path, "--dropout=0.5", "--pretrain_iters=40")
    first, *_, last = lines(tmp_path, "finetune")
    assert abs(first["kl"]) < 1e-6 and abs(last["kl"]) > 1e-4 and len(metrics) == 5


# -----------------------------------------------------------------------------
# known rewards


def test_known_rewards_are_learned_from_before_anything_is_asked(tmp_path, monkeypatch):
    """Twenty sequences from a table: what is seen, with their weights, before the first round."""
    set_two(monkeypatch, share_of("C"), "ACGT", 6, exact=False)
    rows = ["".join(random.Random(i).choices("ACGT", k=6)) for i in range(20)]
    table = tmp_path / "lab.csv"
    table.write_text("sample,reward\n" + "".join(f"{s},{i}\n" for i, s in enumerate(rows)))
    rounds = captured(monkeypatch, sepo, "remembered")
    run(tmp_path / "a", f"--known={table}", "--replay=3", "--iters=1", "--group=4", "--min_ess=1")
    assert len(rounds) == 3 and lines(tmp_path / "a")[-1]["queries"] <= 4
    for past, (tokens, reward, weights), _, group in rounds:
        assert [old.iter for old in past] == [0] * 5 + [1] and group.iter == 1
        found = dict(zip(TASKS["two"]().decode(tokens), reward.tolist()))
        assert [found[row] for row in rows] == list(range(20))
        assert reward[weights.argmax()] > 9


def test_known_samples_are_not_queried(tmp_path, monkeypatch):
    """All eight sequences are in the table, with other rewards than the black box gives."""
    asked = []
    set_two(monkeypatch, lambda samples: asked.extend(samples) or [0.0] * len(samples), exact=False)
    table = tmp_path / "lab.csv"
    table.write_text("sample,reward\n" + "".join(f"{i:03b},{i}\n" for i in range(8)))
    out = tmp_path / "a"
    run(out, f"--known={table}")
    assert asked == [line["sample"] for line in queried(out, "stage")]      # before the run
    assert [line["queries"] for line in lines(out, "finetune")] == [0] * 4 and not queried(out)
    for old in rollouts(out):
        assert old["reward"].tolist() == [[int("".join(map(str, x)), 2)
                                           for x in old["tokens"].tolist()]]


def test_known_rows_are_grouped_by_their_prompts():
    """Five rows of one prompt are two groups, of every second row (a table may be sorted); two rows
    of another are one; a row alone with its prompt has nothing to be compared with."""
    task = TASKS["arithmetic"]()
    samples = ["10+10=020", "10+10=021", "33+33=066", "10+10=022", "44+44=088", "10+10=023",
               "44+44=089", "10+10=024"]
    tokens, rewards = task.encode(samples), torch.arange(8.0).double()
    reference = network(task.vocab_size, 9)
    groups = train.as_rollouts(Namespace(seed=0, group=2), task, Absorbing(task.vocab_size),
                               reference, tokens, rewards)
    found = [task.strings(group.tokens) for group in groups]
    assert sorted(found) == [["10+10=020", "10+10=022", "10+10=024"], ["10+10=021", "10+10=023"],
                             ["44+44=088", "44+44=089"]]
    for group, strings in zip(groups, found):
        assert group.reward.tolist() == [[samples.index(s) for s in strings]] and group.iter == 0
        assert group.given[:, :6].all() and not group.given[:, 6:].any()
        assert (group.log_ratio == 0).all() and (group.log_ref < -1).all()
        assert group.log_ratio.shape == group.log_ref.shape == (1, len(strings))


def test_known_rows_have_the_same_paths_on_every_process():
    task, reference = TASKS["arithmetic"](), network(12, 9)
    tokens, reward = task.encode(["44+44=088", "44+44=089"]), torch.zeros(2).double()
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        group, = train.as_rollouts(Namespace(seed=0, group=2), task, Absorbing(12), reference,
                                   tokens, reward)
        found.append(group.log_ref)
    assert torch.equal(*found)


def test_many_known_rows_are_scored_in_parts():
    """2,100 of them, by a consistent reference: log p_ref does not depend on the path."""
    reference, task = posterior_table(random_law(4, 2), 4, 2), TASKS["toy"](2)
    tokens = task.draw(2100, torch.Generator().manual_seed(0))
    groups = train.as_rollouts(Namespace(seed=0, group=700), task, Absorbing(4), reference, tokens,
                               torch.arange(2100.0).double())
    assert [group.reward.numel() for group in groups] == [700] * 3
    law = Absorbing(4).exact_law(reference, 2).log()
    for group in groups:
        assert torch.equal(group.tokens, tokens[group.reward[0].long()])
        assert torch.allclose(group.log_ref[0].double(), law[rank(group.tokens, 4)], atol=1e-4)


def test_a_known_reward_that_contradicts_the_black_box_is_told(tmp_path, capsys):
    """Of the start check, which asks for one or two samples."""
    rows = ["".join(letters) for letters in product("01", repeat=3)]
    file = tmp_path / "known.csv"
    file.write_text("sample,reward\n" + "".join(f"{row},7\n" for row in rows))
    run(tmp_path / "a", f"--known={file}", "--iters=1")
    err = capsys.readouterr().err
    assert re.search("for [12] samples the reward is not what --known says", err)


def test_the_held_out_loss_is_that_of_held_out_data(tmp_path, monkeypatch):
    monkeypatch.setattr(TASKS["two"], "split", lambda self, n, seed: (
        torch.zeros(50, 3, dtype=torch.long), torch.ones(9, 3, dtype=torch.long)))
    monkeypatch.setattr(Absorbing, "loss", lambda self, model, x0, given: (
        x0.float().mean() + 0 * sum(p.sum() for p in model.parameters())))
    run(tmp_path, "--iters=1")
    line, = lines(tmp_path, "pretrain")
    assert (line["loss"], line["held_out_loss"]) == (0, 1)


def test_a_model_brings_held_out_prompts_and_the_dtype_that_was_asked(tmp_path, monkeypatch):
    seen = captured(monkeypatch, train, "finetune")
    run(tmp_path, "--dtype=bfloat16", "--iters=0", "--report_samples=0", "--data_size=2000",
        task="arithmetic")
    assert seen[0][3].autocast is torch.bfloat16
    prompts = saved_as(tmp_path, "pretrained")["prompts"]
    assert len(prompts) > 50 and TASKS["arithmetic"]().is_held(prompts).all()


def test_a_clock_that_was_set_back_saves(tmp_path):
    args, now = Namespace(out=tmp_path, save_every=30), time.time()
    assert train.is_time_to_save(args, False)
    (tmp_path / "last.pt").touch()
    for shift, expected in ((0, False), (-100, True), (100, True)):
        os.utime(tmp_path / "last.pt", (now + shift, now + shift))
        assert train.is_time_to_save(args, False) == expected
    os.utime(tmp_path / "last.pt")
    assert train.is_time_to_save(args, True)

# -----------------------------------------------------------------------------
# speed


@pytest.mark.parametrize("extra", [
    [], ["--algo=loop"], ["--algo=loop", "--path_events=2"], ["--algo=prdp"], ["--micro_batch=7"],
    ["--algo=reinforce"], ["--replay=2", "--path_events=0"]])
def test_no_update_waits_for_the_device(extra, monkeypatch, tmp_path):
    """Whatever reads a tensor's value on the host is forbidden while a method and its steps run."""
    def forbidden(*_, **__):
        raise AssertionError("a host synchronisation")

    def hasty(method):
        def updates(*args):
            with monkeypatch.context() as patch:
                for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__",
                             "nonzero", "numpy", "cpu"):
                    patch.setattr(torch.Tensor, name, forbidden)
                yield from method(*args)                # the loop steps where this yields
        return updates
    for name, method in sepo.METHODS.items():
        monkeypatch.setitem(sepo.METHODS, name, hasty(method))
    assert len(run(tmp_path, *extra)) == 1 + 4


def test_compiled_blocks_compute_the_same_in_every_copy(monkeypatch):
    """Rows and positions of all sizes. (The graphs run as they were traced: machine code takes a
    minute to build, and is the compiler's business.)"""
    graphs, real = [], torch.nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self, **kwargs: real(self, backend=backend, **kwargs))
    plain, args = network(4, 8, n_layer=1), Namespace(compile=True)
    fast = train.compiled(args, deepcopy(plain))
    for B, k in ((5, 2), (3, 7)):
        x, positions = torch.randint(5, (B, 8)), torch.randint(8, (B, k))
        assert torch.allclose(fast(x), plain(x), atol=1e-5)
        ours, theirs = (m.logits_at(x, None, positions) for m in (fast, plain))
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert graphs and isinstance(fast.blocks[0], Block)
