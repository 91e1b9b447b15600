"""What a draw costs: the event loop against the plain ancestral loop, with the same network, in one run.

    python tests/bench.py                    # under three minutes on two cores
    python tests/bench.py --device=cuda
    python tests/bench.py --memory           # peak memory at N = 128 and N = 10,000

Each row: V letters, L slots, N steps, batch B; forward passes of the plain loop, of a loop that keeps its prediction until a
token of the batch changes (as MDLM does), and of ours (a pass of half the rows counts one half); then medians of seconds,
and ratios. All steps of the plain loop do the same work, so 8 of them are timed and scaled to N (to its passes, for the
cached loop). `hidden` is bare model.hidden on the shapes of our own passes.
"""
import argparse
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
from diffusion import Absorbing, gumbel_like
from model import Config, Denoiser

ROWS = [(27, 64, 128, 32), (27, 64, 1000, 32), (4, 200, 1000, 16), (5000, 64, 128, 32)]


@torch.no_grad()
def ancestral(process, model, B, L, N, steps):
    """The first `steps` of N ancestral steps, a softmax and a draw at every slot (exact.plain_loop, on any device)."""
    x = torch.full((B, L), process.mask, device=next(model.parameters()).device)
    for k in range(N, N - steps, -1):
        p = model(x, torch.full((B,), k / N, device=x.device)).softmax(dim=-1)                       # [B, L, V]
        y = (p.log() + gumbel_like(p)).argmax(dim=-1)
        x = torch.where((x == process.mask) & (torch.rand(x.shape, device=x.device) < 1 / k), y, x)


@torch.no_grad()
def bare(model, path):
    """model.hidden alone, on the row counts of the event loop's passes."""
    for j in range(int(path.n_events.max())):
        n = int((path.n_events > j).sum())
        model.hidden(path.tokens[:n], path.time[:n, 0].clamp(max=1))


def clock(f, repeats, device):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = f()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return result, statistics.median(times)


def network(V, L, device, n_layer=4, n_embd=128, n_head=4):
    torch.manual_seed(0)
    model = Denoiser(Config(V, L, n_layer, n_head, n_embd)).to(device).eval()
    torch.nn.init.normal_(model.output.weight, std=0.1)
    return model


def speed(device, timed=8):
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {where}")
    print("| V, L, N, B | passes: plain | cached | ours | seconds: plain | cached | ours | hidden "
          "| plain / ours | cached / ours | ours / hidden |\n|" + " --- |" * 11)
    for V, L, N, B in ROWS:
        model, process = network(V, L, device), Absorbing(V)
        process.sample(model, B, L, N)                                               # warm-up
        path, ours = clock(lambda: process.sample(model, B, L, N), 3, device)
        _, hidden = clock(lambda: bare(model, path), 3, device)
        _, step = clock(lambda: ancestral(process, model, B, L, N, timed), 3, device)
        plain, cached_passes = step / timed * N, len(path.time.unique())             # a step without a reveal needs no pass
        cached, mine = step / timed * cached_passes, path.n_events.sum().item() / B
        print(f"| {V}, {L}, {N}, {B} | {N} | {cached_passes} | {mine:.1f} | {plain:.2f} | {cached:.2f} | {ours:.3f} | "
              f"{hidden:.3f} | {plain / ours:.1f} | {cached / ours:.1f} | {ours / hidden:.2f} |", flush=True)


def memory(device):
    """Peak memory of the process (of the card, on CUDA) after sampling on a short and on a long grid."""
    model, process = network(27, 64, device), Absorbing(27)
    for N in (128, 10_000, None):
        for _ in range(3):
            path = process.sample(model, 32, 64, N)
        peak = torch.cuda.max_memory_allocated() / 2 ** 20 if device.type == "cuda" else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        kept = sum(tensor.nbytes for tensor in (path.tokens, path.time, path.logp)) / 2 ** 10
        print(f"N = {N}: a path keeps {kept:.0f} KiB, peak {peak:.0f} MiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    args = parser.parse_args()
    (memory if args.memory else speed)(torch.device(args.device))


if __name__ == "__main__":
    main()
