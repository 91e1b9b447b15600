"""What a draw and an update cost, as ratios within one run.

    python tests/experiments/bench.py             # sampling, against the plain loop
    python tests/experiments/bench.py --update    # one update, against the published estimator
    python tests/experiments/bench.py --device=cuda   # larger models, bfloat16

Sampling, per row: V letters, L positions, N steps, batch B, seconds (medians) and ratios. `plain`:
the ancestral loop, 8 of its N equal steps timed. `cached`: a loop that keeps its prediction until a
token of the batch changes, as MDLM does: the plain loop's step times the passes it needs.
`network`: the network alone, on the shapes of our own passes.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]
import sepo  # noqa: E402
from diffusion import Absorbing, gumbel_argmax  # noqa: E402
from model import Config, Denoiser  # noqa: E402

SMALL, LARGE = dict(n_layer=4, n_head=4, n_embd=128), dict(n_layer=8, n_head=8, n_embd=512)
DRAWS = {"cpu": [(27, 64, 128, 32, SMALL), (27, 64, 1000, 32, SMALL), (4, 200, 1000, 16, SMALL),
                 (5000, 64, 128, 32, SMALL)],
         "cuda": [(27, 64, 128, 32, SMALL), (4, 200, 128, 256, LARGE), (4, 200, 1000, 256, LARGE)]}
UPDATES = [(4, 6, 4), (4, 32, 4), (4, 64, 1)]


@torch.no_grad()
def ancestral(process, model, B, L, steps):
    """The first `steps` of N ancestral steps, with a softmax and a draw at every position."""
    N, device = process.steps, next(model.parameters()).device
    x = torch.full((B, L), process.mask, device=device)
    for k in range(N, N - steps, -1):
        p = model(x, torch.full((B,), k / N, device=device)).softmax(dim=-1)            # [B, L, V]
        y = gumbel_argmax(p.log())
        now = torch.rand(x.shape, device=device) < 1 / k
        x = torch.where((x == process.mask) & now, y, x)


@torch.no_grad()
def network_alone(process, model, path):
    count, begin = path.row.bincount(), 0               # of the transitions of each sequence
    for j in range(count.max()):
        size = int((count > j).sum())
        part = path[begin:begin + size]
        process.logits(model, part.x, part.t, part.positions)
        begin += size


def seconds(job, device, repeats, warm_up=True):
    """-> median seconds of the job, and its last result."""
    times = []
    for _ in range(repeats + warm_up):
        begin = time.perf_counter()
        result = job()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[warm_up:]), result


def new_network(V, L, device, size):
    torch.manual_seed(0)
    autocast = torch.bfloat16 if device == "cuda" else None
    model = Denoiser(Config(V, L, **size), autocast).to(device).eval()
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model


class Counted(torch.nn.Module):
    """A model that counts the states which go through it."""

    def __init__(self, model):
        super().__init__()
        self.model, self.states = model, 0

    def forward(self, x, t):
        return self.logits_at(x, t, None)

    def logits_at(self, x, t, positions):
        self.states += len(x)
        return self.model.logits_at(x, t, positions)


def draws(device):
    print("| V, L, N, B | plain | cached | ours | network | plain / ours | cached / ours "
          "| ours / network |\n|" + " --- |" * 8)
    for V, L, N, B, size in DRAWS[device]:
        model, process = new_network(V, L, device, size), Absorbing(V, N)
        ours, (_, path) = seconds(lambda: process.sample(model, B, L), device, 3)
        alone, _ = seconds(lambda: network_alone(process, model, path), device, 3)
        step = seconds(lambda: ancestral(process, model, B, L, 8), device, 3)[0] / 8
        plain, cached = step * N, step * len(path.t.unique())
        print(f"| {V}, {L}, {N}, {B} | {plain:.2f} | {cached:.2f} | {ours:.3f} | {alone:.3f} | "
              f"{plain / ours:.1f} | {cached / ours:.1f} | {ours / alone:.2f} |", flush=True)


def updates(device):
    print("| V, L, B | states through the network: published | ours | seconds: published | ours "
          "| ratio |\n|" + " --- |" * 6)
    for V, L, B in UPDATES:
        model, process = Counted(new_network(V, L, device, SMALL)), Absorbing(V)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
        (x, path), A = process.sample(model, B, L), torch.randn(B, device=device)
        path, given = path.subset(1), torch.zeros_like(x, dtype=torch.bool)
        with torch.no_grad():
            old = sepo.neighbours(process, model, x, given)

        def update(loss_of):
            model.states = 0
            loss_of()[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            return model.states
        ours, n = seconds(lambda: update(lambda: sepo.sepo_loss(
            process.logp(model, path), path, A)), device, 20)
        published, m = seconds(lambda: update(lambda: sepo.published_loss(
            sepo.neighbours(process, model, x, given), old, A)), device, 2)
        print(f"| {V}, {L}, {B} | {m:,} | {n:,} | {published:.2f} | {ours:.4f} | "
              f"{published / ours:.0f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--update", action="store_true", help="an update instead of a draw")
    args = parser.parse_args()
    where = torch.cuda.get_device_name() if args.device == "cuda" else \
        f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {where}")
    updates(args.device) if args.update else draws(args.device)


if __name__ == "__main__":
    main()
