"""What a draw costs: the event loop against the plain ancestral loop, with the same network, in one run.

    python tests/bench.py                    # under three minutes on two cores
    python tests/bench.py --device=cuda      # larger models, bfloat16, our pass replayed as a CUDA graph
    python tests/bench.py --memory           # peak memory at N = 128 and N = 10,000

Each row: V letters, L slots, N steps, batch B; forward passes of the plain loop, of a loop that keeps its prediction until a
token of the batch changes (as MDLM does), and of ours (a pass of half the rows counts one half); then medians of seconds,
and ratios. All steps of the plain loop do the same work, so 8 of them are timed and scaled to N (to its passes, for the
cached loop). `hidden` is bare model.hidden on the shapes of our own passes. A row is a process of its own; its peak memory is
counted from the loaded model on, in MiB (`plain` is at least `ours` by construction: ours runs first).
"""
import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
from diffusion import Absorbing, gumbel_like
from model import Config, Denoiser

SMALL, LARGE = dict(n_layer=4, n_head=4, n_embd=128), dict(n_layer=8, n_head=8, n_embd=512)
ROWS = {"cpu": [(27, 64, 128, 32, SMALL), (27, 64, 1000, 32, SMALL), (4, 200, 1000, 16, SMALL), (5000, 64, 128, 32, SMALL)],
        "cuda": [(27, 64, 128, 32, SMALL), (4, 200, 128, 256, LARGE), (4, 200, 1000, 256, LARGE)]}


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


def clock(f, device):
    start = time.perf_counter()
    result = f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def network(V, L, device, size):
    torch.manual_seed(0)
    model = Denoiser(Config(V, L, **size)).to(device).eval()
    torch.nn.init.normal_(model.output.weight, std=0.1)
    model.autocast = torch.bfloat16 if device.type == "cuda" else None
    return model


def peak(device):
    """Most memory so far, in MiB: of the process, or of the card."""
    return torch.cuda.max_memory_allocated() / 2 ** 20 if device.type == "cuda" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def speed(device, V, L, N, B, size, timed=8):
    """One row of the table."""
    model, process = network(V, L, device, size), Absorbing(V, cuda_graph=device.type == "cuda")
    floor = peak(device)
    process.sample(model, B, L, N)
    memory = [peak(device) - floor]
    ancestral(process, model, B, L, N, 1)                                            # both are warm
    memory.append(peak(device) - floor)
    times = []
    for _ in range(4 if N < 1000 else 3):                                            # in turn: noise hits all three
        path, ours = clock(lambda: process.sample(model, B, L, N), device)
        times.append((ours, clock(lambda: bare(model, path), device)[1],
                      clock(lambda: ancestral(process, model, B, L, N, timed), device)[1]))
    ours, hidden, step = (statistics.median(column) for column in zip(*times))
    plain, cached_passes = step / timed * N, len(path.time.unique())                 # a step without a reveal needs no pass
    cached, mine = step / timed * cached_passes, path.n_events.sum().item() / B
    print(f"| {V}, {L}, {N}, {B} | {N} | {cached_passes} | {mine:.1f} | {plain:.2f} | {cached:.2f} | {ours:.3f} | "
          f"{hidden:.3f} | {plain / ours:.1f} | {cached / ours:.1f} | {ours / hidden:.2f} | "
          f"{memory[1]:.0f} | {memory[0]:.0f} |")


def table(device):
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {where}")
    print("| V, L, N, B | passes: plain | cached | ours | seconds: plain | cached | ours | hidden "
          "| plain / ours | cached / ours | ours / hidden | MiB: plain | ours |\n|" + " --- |" * 13, flush=True)
    for row in range(len(ROWS[device.type])):
        subprocess.run([sys.executable, __file__, f"--device={device}", f"--row={row}"], check=True)


def memory(device):
    """Peak memory after sampling on a short and on a long grid."""
    model, process = network(27, 64, device, SMALL), Absorbing(27)
    for N in (128, 10_000, None):
        for _ in range(3):
            path = process.sample(model, 32, 64, N)
        kept = sum(tensor.nbytes for tensor in (path.tokens, path.time, path.logp)) / 2 ** 10
        print(f"N = {N}: a path keeps {kept:.0f} KiB, peak {peak(device):.0f} MiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device, help="cpu or cuda (default: cpu)")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    parser.add_argument("--row", type=int, help="one row of the table alone, in this process")
    args = parser.parse_args()
    if args.row is not None:
        return speed(args.device, *ROWS[args.device.type][args.row])
    (memory if args.memory else table)(args.device)


if __name__ == "__main__":
    main()
