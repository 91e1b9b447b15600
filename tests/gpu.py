"""Does everything hold on a GPU, and how fast is it there? One command, a table per part.

    python tests/gpu.py --device=cuda --out=DIR         # three minutes on an H200
    python tests/gpu.py --quick --out=DIR               # any machine: tiny sizes, half a minute

Parts: truth (samples, captured passes, updates and the tail of the noise against what is exact),
runs (train.py on the device and on the CPU; a kill and a resume), sampling and updates (seconds,
launches, memory).
Each part is caught on its own; DIR/gpu.json has all numbers, and DIR/errors.txt what failed.
"""
import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "experiments")]

import bench  # noqa: E402
import sepo  # noqa: E402
from diffusion import Absorbing, Uniform, gumbel_argmax  # noqa: E402
from exact import chi_square, exact_p, gradient, law_given, network  # noqa: E402

SMALL = dict(n_layer=4, n_head=4, n_embd=128)
SHAPES = [(27, 64, SMALL, (1, 32, 512, 4096)), (4, 200, SMALL, (1, 32, 512)),
          (5000, 64, SMALL, (1, 32, 512)),
          (50_257, 1024, dict(n_layer=12, n_head=12, n_embd=768), (16,))]
QUICK = [(5, 8, dict(n_layer=1, n_head=2, n_embd=16), (2,))]
TINY = ["--pretrain_iters=20", "--iters=4", "--n_layer=1", "--n_embd=16", "--n_head=2",
        "--replay=1", "--report_samples=0", "--save_every=0"]


def to(path, device):
    """A path on another device."""
    return type(path)(*(v.to(device) if isinstance(v, torch.Tensor) else v
                        for v in vars(path).values()))

# -----------------------------------------------------------------------------
# truth


def samples(args):
    """p-values of samples of a network under their exact distribution: uniform on [0, 1]."""
    n, prompt = 20_000 if args.quick else 200_000, torch.tensor([3, 1, 3])
    for chain, V, steps, given in ((Absorbing, 3, None, None), (Absorbing, 3, 2, None),
                                   (Absorbing, 3, None, prompt), (Uniform, 2, 4, None)):
        process, model = chain(V, steps), network(V, 3, time_conditioning=chain is Uniform)
        law = law_given(process, model, 3, given)
        model.to(args.device)                           # in parts, which are captured
        tokens = torch.cat([process.sample(model, 20_000, 3, given)[0] for _ in range(n // 20_000)])
        yield dict(chain=chain.__name__, steps=steps, prompt=given is not None, n=n,
                   p_value=chi_square(tokens.cpu(), law.detach(), V))


def captured_as_the_loop(args):
    """Draws of the captured pass and of the loop with the same noise: which share is equal."""
    for chain in (Absorbing, Uniform):
        process = chain(4)
        model = network(4, 8, time_conditioning=chain is Uniform).to(args.device)
        for n in range(4):                              # seen, captured, replayed; other weights
            if n == 3:
                model.head.bias.data = torch.tensor([9.0, 0, 0, 0], device=args.device)
            draws = []
            for model.can_be_captured in (True, False):
                torch.manual_seed(n)
                draws.append(process.sample(model, 32, 8))
            (x, path), (expected, plain) = draws
            yield dict(chain=chain.__name__, equal=(x == expected).float().mean().item(),
                       log_ratio=(path.logp - plain.logp).abs().max().item())


def losses(process, model, path, masked):
    """The loss of every method on one path, with the same masks and a known p(y)."""
    B = path.batch
    A = torch.linspace(-1, 1, B, device=path.x.device)
    tokens = torch.zeros(B, path.x.size(1), dtype=torch.long, device=path.x.device)
    tokens[path.row[:, None], path.positions] = path.y
    logp = process.logp(model, path)
    yield "sepo", sepo.sepo_loss(logp, path, A)[0]
    yield "cap", sepo.sepo_loss(logp, path, A, clip_mode="cap")[0]
    yield "loop", sepo.loop_loss(logp, path, A)[0]
    yield "prdp", sepo.prdp_loss(logp, path, A[None], 0 * A[None], 0.1)[0]
    process.mask_some = lambda x0, given: [part.to(x0.device) for part in masked]
    yield "wdce", sepo.wdce_loss(process, model, tokens, torch.full_like(A, 1 / B))
    new = sepo.neighbours(process, model, tokens, tokens < 0)
    yield "published", sepo.published_loss(new, [part.detach() for part in new], A)[0]


def updates_as_on_the_cpu(args):
    """Losses and gradients of all methods against float32 on the CPU: relative errors."""
    sepo.importance_sampled = exact_p(Absorbing(4))
    cpu, process = network(4, 6), Absorbing(4)
    tokens, path = process.sample(cpu, 32, 6)
    masked = process.mask_some(tokens, tokens < 0)
    expected = {name: (loss.item(), gradient(loss, cpu))
                for name, loss in losses(process, cpu, path, masked)}
    for kind in ("float32", "tf32", "bfloat16"):
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        model = deepcopy(cpu).to(args.device)
        model.autocast = torch.bfloat16 if kind == "bfloat16" else None
        for name, loss in losses(Absorbing(4), model, to(path, args.device), masked):
            value, grad = expected[name]
            found = gradient(loss, model).cpu()
            yield dict(method=name, dtype=kind, loss=abs(loss.item() - value) / (abs(value) + 1e-3),
                       gradient=((found - grad).norm() / grad.norm()).item())
    torch.backends.cuda.matmul.allow_tf32 = False


def ratios_at_the_start(args):
    """What `logp` gives to a path against what the sampler noted: the largest log-ratio, nats."""
    V, L, size, _ = (QUICK if args.quick else SHAPES)[0]
    for dtype in (None, torch.bfloat16):
        model, process = bench.new_network(V, L, args.device, size), Absorbing(V)
        model.autocast = dtype
        _, path = process.sample(model, 64, L)
        with torch.no_grad():
            yield dict(dtype=str(dtype), log_ratio=(process.logp(model, path) - path.logp)
                       .abs().max().item())


def tail(args):
    """One of 262,144 letters has nearly all mass; the others are drawn as often as they should."""
    logits = torch.zeros(262_144, device=args.device)
    logits[0] = 19.0
    chance, n = 1 - logits.softmax(dim=0)[0].item(), 256 if args.quick else 20_000
    seen = sum((gumbel_argmax(logits.expand(64, -1)) > 0).sum().item() for _ in range(n // 64))
    yield dict(expected=n * chance, seen=seen, sigmas=(seen - n * chance) / math.sqrt(n * chance))

# -----------------------------------------------------------------------------
# runs


def train(args, folder, *flags, device, wait=True):
    command = [sys.executable, str(ROOT / "train.py"), f"--out={folder}", f"--device={device}"]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    if wait and process.wait():
        raise RuntimeError(f"train.py {flags} failed")
    return process


def metrics_of(folder):
    return [json.loads(line) for line in open(folder / "metrics.jsonl")]


def run(args, task, device, *flags):
    folder, begin = args.out / f"{task}-{device}", time.perf_counter()
    train(args, folder, f"--task={task}", "--overwrite", *flags, device=device)
    last = metrics_of(folder)[-1]
    return dict(task=task, device=device, seconds=time.perf_counter() - begin,
                reward=last["reward"], share=last.get("share_of_optimum"))


def runs(args):
    """Whole runs on the device and on one core of this machine: seconds, reward or share."""
    flags = TINY if args.quick else ["--report_samples=0"]
    with ThreadPoolExecutor() as pool:                  # the CPU beside the device
        on_cpu = pool.submit(run, args, "toy", "cpu", *flags)
        if args.device != "cpu":
            yield run(args, "toy", args.device, *flags)
            yield run(args, "text", args.device, *flags, "--iters=20", "--pretrain_iters=300")
        yield on_cpu.result()


def resume(args):
    """A run that is killed and resumed, and the same run again, against one that is not: the
    largest relative difference."""
    whole, again, part = (args.out / name for name in ("whole", "again", "killed"))
    for folder in (whole, again):
        train(args, folder, "--task=toy", "--overwrite", *TINY, device=args.device)
    process = train(args, part, "--task=toy", "--overwrite", *TINY, device=args.device, wait=False)
    while process.poll() is None and not (part / "finetuned.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train(args, part, "--resume", device=args.device)
    for folder in (part, again):
        pairs = [(a[key], b[key])
                 for a, b in zip(metrics_of(whole), metrics_of(folder), strict=True)
                 for key in a if isinstance(a[key], float)]
        yield dict(run=folder.name,
                   difference=max(abs(a - b) / (abs(a) + 1e-9) for a, b in pairs))

# -----------------------------------------------------------------------------
# speed


def profiled(args, job):
    """-> launches of a job, and seconds in which the device works; None on the CPU."""
    if args.device == "cpu":
        return None, None
    from torch.profiler import ProfilerActivity, profile
    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=kinds, acc_events=True) as found:
        job()
        torch.cuda.synchronize()
    launches = sum("Launch" in event.name for event in found.events())
    busy = sum(event.time_range.elapsed_us() for event in found.events()
               if event.device_type.name == "CUDA")
    return launches, busy / 1e6


def peak(args):
    """GiB since the last call; None on the CPU."""
    if args.device == "cpu":
        return None
    value = torch.cuda.max_memory_allocated() / 2 ** 30
    torch.cuda.reset_peak_memory_stats()
    return value


def sampling(args):
    """Seconds of a draw: the plain loop of N steps, MDLM's cached loop, ours, the bare network."""
    for V, L, size, batches in QUICK if args.quick else SHAPES:
        model = bench.new_network(V, L, args.device, size)
        few, repeats = min(L, 16), 3 if L < 1000 else 1
        prompt = torch.zeros(L, dtype=torch.long)
        prompt[:few] = V                                # some passes are enough for a profile
        for B in batches:
            def seconds(job, repeats=3, **how):
                return bench.seconds(job, args.device, repeats, **how)

            process, row = Absorbing(V), dict(V=V, L=L, B=B)
            for model.can_be_captured in (False, True):
                process.sample(model, B, L, prompt)
                peak(args)
                took, (_, path) = seconds(lambda: process.sample(model, B, L), repeats,
                                          warm_up=L < 1000)
                row |= {"ours" if model.can_be_captured else "loop": took, "GiB": peak(args)}
            short = seconds(lambda: process.sample(model, B, L, prompt))[0]
            launches, busy = profiled(args, lambda: process.sample(model, B, L, prompt))
            part, network_alone = path[:B], bench.network_alone
            if args.device == "cuda":                   # the bare network, captured
                graph = torch.cuda.CUDAGraph()
                network_alone(process, model, part)
                with torch.cuda.graph(graph):
                    process.logits(model, part.x, part.t, part.positions)
                network_alone = lambda *_: graph.replay()           # noqa: E731
            alone = seconds(lambda: [network_alone(process, model, part) for _ in range(few)])[0]
            row |= dict(network=alone * L / few, tokens_per_s=B * L / row["ours"],
                        launches_per_pass=launches and launches / few, busy=busy and busy / short)
            for N in (128, 1000):
                grid = Absorbing(V, N)
                step = seconds(lambda: bench.ancestral(grid, model, B, L, 4))[0] / 4
                passes = N * (1 - (1 - 1 / N) ** (B * L))       # steps in which a token changes
                row |= {f"plain_{N}": step * N, f"cached_{N}": step * passes}
            yield row


def updates(args):
    """Milliseconds and memory of an update of each method, in one chunk and in chunks of 256."""
    for V, L, size, batches in QUICK if args.quick else SHAPES[:3]:
        for chunk in (2 ** 20, 256):
            model, process = bench.new_network(V, L, args.device, size), Absorbing(V, chunk=chunk)
            B = min(32, max(batches))
            tokens, path = process.sample(model, B, L)
            A = torch.linspace(-1, 1, B, device=args.device)
            for name, loss_of in (
                    ("sepo", lambda: sepo.sepo_loss(process.logp(model, path), path, A)[0]),
                    ("loop", lambda: sepo.loop_loss(process.logp(model, path), path, A)[0]),
                    ("prdp", lambda: sepo.prdp_loss(process.logp(model, path), path, A[None],
                                                    0 * A[None], 0.1)[0]),
                    ("wdce", lambda: sepo.wdce_loss(process, model, tokens, A * 0 + 1 / B))):
                peak(args)
                taken, _ = bench.seconds(lambda: loss_of().backward(), args.device, 3)
                yield dict(V=V, L=L, B=B, method=name, chunk=chunk, ms=1000 * taken,
                           GiB=peak(args))


PARTS = [samples, captured_as_the_loop, updates_as_on_the_cpu, ratios_at_the_start, tail, runs,
         resume, sampling, updates]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of the results")
    parser.add_argument("--parts", nargs="*", default=[part.__name__ for part in PARTS])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if args.device == "cuda" else os.uname().machine
    print(f"torch {torch.__version__}, {args.device}, {name}")
    found, failed = {}, 0
    for part in PARTS:
        if part.__name__ not in args.parts:
            continue
        begin, rows = time.perf_counter(), []
        try:
            for row in part(args):                      # rows before a failure are kept
                rows.append(row)
        except Exception:
            failed += 1
            with open(args.out / "errors.txt", "a") as file:
                file.write(f"{part.__name__}\n{traceback.format_exc()}\n")
        found[part.__name__] = rows
        (args.out / "gpu.json").write_text(json.dumps(found, indent=1))
        print(f"\n{part.__name__}: {part.__doc__} ({time.perf_counter() - begin:.0f} s)\n")
        for n, row in enumerate(rows):
            if n == 0:
                print("| " + " | ".join(row) + " |\n|" + " --- |" * len(row))
            print("| " + " | ".join(f"{value:.3g}" if isinstance(value, float) else str(value)
                                    for value in row.values()) + " |", flush=True)
    where = f"; see {args.out}/errors.txt" * bool(failed)
    print(f"\n{failed} of {len(found)} parts failed{where}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
