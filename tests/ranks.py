"""Five updates on a fixed path, shared out among torchrun's processes; the first saves weights.

    torchrun --nproc_per_node=2 tests/ranks.py out.pt
"""
import sys
from argparse import Namespace
from pathlib import Path as File

import torch

HERE = File(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import sepo  # noqa: E402
import train  # noqa: E402
from diffusion import Absorbing, MaskPath  # noqa: E402
from exact import network  # noqa: E402



def main(file):
    args = Namespace(device="cpu", dtype="auto")
    train.setup(args)
    model, process, G = network(4, 6), Absorbing(4), 8
    path = process.sample(model, 4 * G, 6, generator=torch.Generator().manual_seed(0))
    parts = (path.tokens, path.time, path.logp)
    path = MaskPath(*(part.chunk(train.WORLD_SIZE)[train.RANK] for part in parts), path.mask)
    rewards = (path.tokens == 2).float().mean(dim=1).view(-1, G)
    scale = train.average_(sepo.reward_scale(rewards, "grpo", beta=0.1).square()).sqrt()
    A = sepo.advantages(rewards, "grpo", scale=scale).flatten()
    optimizer = train.adamw(model, 0.0)
    for _ in range(5):
        view = sepo.draw_view(process, model, path, events=0)
        sepo.loop_loss(process, model, view, A)[0].backward()
        train.step(model, optimizer, 1e-3)
    mean = train.average(dict(reward=rewards.mean()))["reward"]
    if train.MASTER:
        torch.save(dict(reward=mean, scale=scale, model=model.state_dict()), file)
    if train.WORLD_SIZE > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
