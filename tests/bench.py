"""What a draw costs: the event loop against the plain ancestral loop, with the same network, in one run.

    python tests/bench.py                    # under three minutes on two cores
    python tests/bench.py --device=cuda      # larger models, bfloat16, our pass replayed as a CUDA graph
    python tests/bench.py --memory           # peak memory at N = 128 and N = 10,000
    python tests/bench.py --train            # one update of SEPO against one that estimates the neighbours' weights
    python tests/bench.py --cost             # how a step, a rollout and an update grow with batch, length and layers

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
import sepo
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


# ---- one update, against the estimator that asks for every neighbour ----------------------------------------------------

def snis(model, x, M):
    """BASELINE, for the comparison alone: p(y) for every y that differs from x [B, L] in at most one slot, by self-normalised
    importance sampling (SEPO, 2502.01384) -> [B, L, V+1]. For each y, M sequences z are drawn from the network's slot laws
    pi(. | y) and weighed by pi(z) / pi(z | y), with pi(z) ~ 1 / pi(z | z); p(y) ~ sum_m w_m pi(z_m | y) / sum_m w_m, all at
    the slot that was changed. (1 + M) passes of L (V + 1) sequences for each row of x."""
    (B, L), W = x.shape, model.config.vocab_size + 1
    slot = torch.arange(L, device=x.device)
    y = x[:, None, None].expand(B, L, W, L).clone()
    y[:, slot, :, slot] = torch.arange(W, device=x.device)                           # [L, B, W]: slot i of y[:, i, v] is v
    p = model(y.view(-1, L), None).softmax(dim=-1)                                   # [B*L*W, L, V]
    z = torch.multinomial(p.flatten(0, 1), M, replacement=True).view(-1, L, M).mT    # [B*L*W, M, L]
    given_y = p[:, None].expand(-1, M, -1, -1).gather(-1, z[..., None]).squeeze(-1)  # [B*L*W, M, L]
    own = model(z.reshape(-1, L), None).softmax(dim=-1).gather(-1, z.reshape(-1, L, 1)).view_as(given_y)
    at = slot.repeat_interleave(W).repeat(B)[:, None, None].expand(-1, M, 1)
    given_y, own = (q.gather(2, at).squeeze(2).clamp(min=1e-8) for q in (given_y, own))
    weight = 1 / own / given_y
    return ((weight * given_y).sum(dim=1) / weight.sum(dim=1)).view(B, L, W)


def neighbours_update(model, old, x, A, M=2, clip=0.2):
    """BASELINE: the clipped loss over all neighbours, weights under both policies -> its loss."""
    with torch.no_grad():
        new_p, old_p, old_s = snis(model, x, M)[..., :-1], snis(old, x, M)[..., :-1], old(x, None).log_softmax(dim=-1)
    log_s = model(x, None).log_softmax(dim=-1)
    ratio = new_p / old_p * (old_s - log_s.detach()).exp()
    inner, clipped = ((new_p * r * log_s).sum(dim=(1, 2)) for r in (ratio, ratio.clamp(1 - clip, 1 + clip)))
    return -torch.minimum(A * inner, A * clipped).mean()


def update(device, V, L, B, size):
    """One row: our update on one event of each path, and the baseline's, where it fits."""
    model, process = network(V, L, device, size), Absorbing(V)
    old = network(V, L, device, size)
    path, A = process.sample(model, B, L), torch.randn(B, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)

    def step(loss_of):
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()
    ways = [lambda: sepo.sepo_loss(process, model, path, A)[0], lambda: neighbours_update(model, old, path.tokens, A)]
    seconds, memory = [], []
    for way, repeats in zip(ways, (20, 3 if L < 64 else 1)):
        if repeats > 1:
            step(way)                                  # warm
        seconds.append(statistics.median(clock(lambda: step(way), device)[1] for _ in range(repeats)))
        memory.append(peak(device))                    # ours runs first: the most so far is its own
    passes = 2 * (1 + 2) * L * (V + 1) + 2
    print(f"| {V}, {L}, {B} | {passes} | 1 | {seconds[1]:.2f} | {seconds[0]:.4f} | {seconds[1] / seconds[0]:.0f} | "
          f"{memory[1]:.0f} | {memory[0]:.0f} |")


UPDATES = [(4, 6, 4, SMALL), (4, 32, 4, SMALL), (4, 64, 4, SMALL), (4, 128, 1, SMALL)]


def updates(device):
    print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads" if device.type == "cpu" else
          f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    print("| V, L, B | forward passes a sequence: neighbours | ours | seconds an update: neighbours | ours | ratio "
          "| MiB, whole process: neighbours | ours |\n|" + " --- |" * 8, flush=True)
    for row in range(len(UPDATES)):
        subprocess.run([sys.executable, __file__, f"--device={device}", "--train", f"--row={row}"], check=True)


# ---- the cost model -------------------------------------------------------------------------------------------------------

def cost(device):
    """Seconds of a pre-training step, a rollout, the reference's replay and one update, as one size grows at a time."""
    base = dict(B=32, L=32, n_layer=2, n_embd=64) if device.type == "cpu" else dict(B=256, L=128, n_layer=4, n_embd=256)
    print("| B, L, layers, width | pre-training step | rollout | replay of the reference | update (path) | update (noised) "
          "| rollout's passes |\n|" + " --- |" * 7, flush=True)
    for change in ({}, dict(B=2), dict(L=2), dict(n_layer=2), dict(n_embd=2)):
        B, L, n_layer, n_embd = (base[name] * change.get(name, 1) for name in ("B", "L", "n_layer", "n_embd"))
        model, process = network(4, L, device, dict(n_layer=n_layer, n_head=4, n_embd=n_embd)), Absorbing(4)
        optimizer, x0, A = torch.optim.AdamW(model.parameters(), 1e-5, fused=True), torch.randint(4, (B, L)), torch.randn(B)
        x0, A, path = x0.to(device), A.to(device), process.sample(model, B, L)

        def step(loss):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        @torch.no_grad()
        def replay():
            return process.replay(model, path)
        jobs = [lambda: step(process.loss(model, x0)), lambda: process.sample(model, B, L), replay,
                lambda: step(sepo.sepo_loss(process, model, path, A)[0]),
                lambda: step(sepo.sepo_loss(process, model, path, A, "noised", consistency=0.3)[0])]
        times = [[clock(job, device)[1] for job in jobs] for _ in range(8)][1:]      # in turn: noise hits all alike
        medians = [statistics.median(column) for column in zip(*times)]
        print(f"| {B}, {L}, {n_layer}, {n_embd} | " + " | ".join(f"{1000 * t:.0f} ms" for t in medians) +
              f" | {int(path.n_events.max())} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device, help="cpu or cuda (default: cpu)")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    parser.add_argument("--train", action="store_true", help="one update instead of a draw")
    parser.add_argument("--cost", action="store_true", help="the cost model: how each part grows")
    parser.add_argument("--row", type=int, help="one row of the table alone, in this process")
    args = parser.parse_args()
    if args.row is not None:
        return update(args.device, *UPDATES[args.row]) if args.train else speed(args.device, *ROWS[args.device.type][args.row])
    (memory if args.memory else updates if args.train else cost if args.cost else table)(args.device)


if __name__ == "__main__":
    main()
