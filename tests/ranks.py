"""Five updates on a fixed path, shared out among torchrun's processes; the first saves losses and weights.

    torchrun --nproc_per_node=2 tests/ranks.py out.pt
"""
import sys
from pathlib import Path as File

import torch

sys.path[:0] = [str(File(__file__).resolve().parent.parent), str(File(__file__).resolve().parent)]
import sepo  # noqa: E402
import train  # noqa: E402
from diffusion import Absorbing, Path  # noqa: E402
from exact import network  # noqa: E402

torch.set_num_threads(1)
train.join(torch.device("cpu"))
model, process, P, G = network(4, 6), Absorbing(4), 4, 8
path = process.sample(model, P * G, 6, generator=torch.Generator().manual_seed(0))
tokens, time, logp = (part.chunk(train.ranks())[train.rank()] for part in (path.tokens, path.time, path.logp))
path = Path(tokens, time, logp, path.mask, path.width)
rewards = (tokens == 2).float().mean(dim=1).view(-1, G)
everyone = train.gathered(rewards)
assert everyone.shape == (P, G)
advantage = sepo.advantages(rewards, "loo").flatten()
guard = train.Guard(model, torch.optim.AdamW(model.parameters(), 1e-3, fused=True), 1.0)
losses = [guard.step([sepo.loop_loss(process, model, path, advantage)[0]]).item() for _ in range(5)]
if train.rank() == 0:
    torch.save(dict(losses=losses, rewards=everyone, model=model.state_dict()), sys.argv[1])
train.leave()
