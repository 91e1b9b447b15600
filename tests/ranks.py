"""Five updates on a fixed path, shared out among torchrun's processes; the first saves weights.

    torchrun --nproc_per_node=2 tests/ranks.py out.pt
"""
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path as File

import torch

HERE = File(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import sepo  # noqa: E402
import train  # noqa: E402
from diffusion import Absorbing  # noqa: E402
from exact import network  # noqa: E402
from model import make_optimizers  # noqa: E402


def main(file):
    train.setup(Namespace(device="cpu", dtype="auto"))
    model, process, P, G = network(4, 6), Absorbing(4), 4, 8
    torch.manual_seed(0)
    tokens, path = process.sample(model, P * G, 6)
    rewards = (tokens == 2).float().mean(dim=1).view(P, G)
    A = sepo.advantages(rewards, "loo").flatten()

    n = P * G // train.WORLD_SIZE                       # this process has the rows from `first` on
    first = n * train.RANK
    mine = path[(first <= path.row) & (path.row < first + n)]
    mine = replace(mine, row=mine.row - first, weight=mine.weight * train.WORLD_SIZE, batch=n)
    optimizers = make_optimizers(model)
    for _ in range(5):
        loss, _ = sepo.loop_loss(process.logp(model, mine), mine, A[first:first + n])
        loss.backward()
        train.step(model, optimizers, 1e-3)
    loss = train.average_(loss.detach())
    parts = train.gather(rewards.flatten()[first:first + n])
    if train.MASTER:
        torch.save(dict(loss=loss, reward=torch.cat(parts), model=model.state_dict()), file)
    if train.WORLD_SIZE > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
