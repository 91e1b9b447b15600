"""Signal to noise of the ways to spend forward passes on a sampled path, on the toy and on a chain of 64 slots.

    python tests/snr.py                   # about four minutes

For each way of scoring, g is the gradient that one rollout gives; signal / noise is |E g| over the root of E|g - E g|^2 (the
square of the mean over rollouts, less its own noise). The last column divides by the root of the states scored a sample: what
an equal number of forward passes would give.
"""
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import sepo
from diffusion import Absorbing
from exact import flat_gradient, network
from rewards import TASKS


def independent(process, path):
    """One event of each path, drawn without strata."""
    n = path.n_events
    view = path.view(torch.arange(len(n)), (torch.rand(len(n)) * n).long())
    view.weight = view.weight * n[:, None]
    return view


def state_baseline(process, path, value, events=1, ridge=1.0):
    """A view with an advantage of its own for each event: value less a ridge regression of it on the state's letters, fitted
    on the other half of the rows, so that no row's own draw enters its baseline. -> (view, advantages as path.logp)"""
    view = process.path_view(path, events)
    X = torch.nn.functional.one_hot(view.x, process.mask + 1).flatten(1).float()
    A, half = value[view.row], view.row % 2 == 0
    fitted = torch.empty_like(A)
    for fit in (half, ~half):
        Z, y = X[fit], A[fit] - A[fit].mean()
        w = torch.linalg.solve(Z.T @ Z + ridge * len(Z) / Z.size(1) * torch.eye(Z.size(1)), Z.T @ y)
        fitted[~fit] = X[~fit] @ w + A[fit].mean()
    return view, torch.zeros_like(path.logp).index_put((view.row[:, None], view.place), (A - fitted)[:, None])


def ways(process, model):
    def without_strata(path, A):
        return sepo.sepo_loss(process, model, path, A, view=independent(process, path))[0], 1

    def path_with(events):
        return lambda path, A: (sepo.sepo_loss(process, model, path, A, events=events)[0], events)

    def learnt(path, A):
        view, own = state_baseline(process, path, A)
        return sepo.sepo_loss(process, model, path, own, view=view)[0], 1
    return {
        "path, one event, no strata": without_strata,
        "path, one event": path_with(1),
        "path, two events": path_with(2),
        "path, four events": path_with(4),
        "path, every event (loop)": lambda path, A: (sepo.loop_loss(process, model, path, A)[0], path.tokens.size(1)),
        "path, one event, baseline of the state": learnt,
        "noised": lambda path, A: (sepo.sepo_loss(process, model, path, A, "noised")[0], 1),
        "terminal": lambda path, A: (sepo.sepo_loss(process, model, path, A, "terminal")[0], 1),
    }


def measure(name, process, model, length, reward, rollouts, batch):
    print(f"| {name}, {batch} samples a rollout | signal / noise | per root of states scored |\n| --- | --- | --- |")
    for way, loss in ways(process, model).items():
        torch.manual_seed(0)
        grads = []
        for _ in range(rollouts):
            path = process.sample(model, batch, length)
            A = sepo.advantages(reward(path.tokens)[None], "dr_grpo")[0]
            value, states = loss(path, A)
            grads.append(flat_gradient(value, model))
        grads = torch.stack(grads)
        noise = (grads - grads.mean(0)).square().sum(1).sum().item() / (rollouts - 1)
        signal = max(grads.mean(0).square().sum().item() - noise / rollouts, 0)
        print(f"| {way} | {(signal / noise) ** 0.5:.3f} | {(signal / noise / states) ** 0.5:.3f} |", flush=True)


def main():
    process = Absorbing(4)
    measure("toy", process, network(4, 6, n_embd=64), 6, TASKS["toy"].reward, 100, 128)
    measure("L = 64", process, network(4, 64, n_embd=64, scale=0.7), 64,
            lambda x: ((x[:, :-1] == 3) & (x[:, 1:] == 1)).float().sum(1) / 4, 24, 128)


if __name__ == "__main__":
    main()
