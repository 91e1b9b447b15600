"""The denoiser: a bidirectional transformer that reads noisy tokens and predicts clean ones.

Shapes: B sequences of L positions, V clean tokens, D channels, H heads. The input tokens are 0..V,
where V is the mask. Any callable (x, t) -> logits [B, L, V] can stand in for a Denoiser; the method
`logits_at`, which skips the positions that nobody reads, only makes it faster. train.py and
sample.py get their network from `make_model`, and its optimizers from `make_optimizers`: for
another one, change it there.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    vocab_size: int                     # V, the number of clean tokens
    length: int                         # the longest sequence
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128                   # D
    dropout: float = 0.0
    time_conditioning: bool = False     # masks show the noise level; random letters do not
    conv: int = 0                       # width of a convolution over the embeddings; 0: none


SIZES = ("n_layer", "n_head", "n_embd", "conv")     # flags of a run that its weights depend on


def make_model(flags, vocab_size, length):
    """The network of a run of train.py, untrained: a function of the run's flags alone."""
    sizes = {name: getattr(flags, name) for name in SIZES}
    return Denoiser(Config(vocab_size, length, dropout=flags.dropout,
                           time_conditioning=flags.process == "uniform", **sizes))


class Block(nn.Module):
    """Attention and MLP, each after a norm and around a residual connection."""

    def __init__(self, config):
        super().__init__()
        D = config.n_embd
        self.n_head = config.n_head
        self.drop = nn.Dropout(config.dropout)
        self.norm1 = nn.LayerNorm(D)
        self.query = nn.Linear(D, D, bias=False)
        self.key_value = nn.Linear(D, 2 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.norm2 = nn.LayerNorm(D)
        self.up = nn.Linear(D, 4 * D, bias=False)
        self.down = nn.Linear(4 * D, D, bias=False)

    def split_heads(self, h):
        return h.unflatten(-1, (self.n_head, -1)).transpose(1, 2)       # [B, H, L, D / H]

    def forward(self, x, positions=None):
        """x [B, L, D] -> [B, L, D], or [B, k, D] at positions [B, k] alone: all are attended to,
        but queries and the MLP are computed only where somebody reads the result."""
        h = self.norm1(x)
        key, value = self.key_value(h).chunk(2, dim=-1)
        if positions is not None:
            x, h = (a.take_along_dim(positions[..., None], dim=1) for a in (x, h))      # [B, k, D]
        query, key, value = map(self.split_heads, (self.query(h), key, value))
        dropout = self.drop.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        x = x + self.drop(self.out(attended.transpose(1, 2).flatten(2)))
        return x + self.drop(self.down(self.up(self.norm2(x)).relu_()))


class Denoiser(nn.Module):
    """logits[b, i, v] = log p_theta(x0_i = v | x_t) up to a constant per position.

    n_embd: even, and a multiple of n_head. autocast: the dtype of the blocks' matrix products, such
    as torch.bfloat16; None: float32. Raises ValueError for a missing time."""

    can_be_captured = True              # what it launches depends on shapes, never on tokens: the
                                        # sampler may replay it as a CUDA graph

    def __init__(self, config, autocast=None):
        super().__init__()
        D = config.n_embd
        self.config = config
        self.autocast = autocast
        self.token = nn.Embedding(config.vocab_size + 1, D)
        self.position = nn.Embedding(config.length, D)
        if config.time_conditioning:
            self.time = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))
        if config.conv:
            self.conv = nn.Conv1d(D, D, config.conv, padding="same")
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, config.vocab_size)
        self.apply(self.init_weights)
        nn.init.zeros_(self.head.weight)                # the first prediction is uniform

    def init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):                   # the residual stream keeps its scale at
            std = 0.02 / math.sqrt(2 * self.config.n_layer)         # any depth, as in GPT-2
            nn.init.normal_(module.out.weight, std=std)
            nn.init.normal_(module.down.weight, std=std)

    def embed(self, x, t):
        """Tokens [B, L] and times [B] -> [B, L, D]."""
        h = self.token(x) + self.position.weight[:x.size(1)]
        if self.config.time_conditioning:
            if t is None:
                raise ValueError("this denoiser is time-conditioned: it needs a time t [B]")
            half = self.config.n_embd // 2
            frequency = 10000.0 ** (-torch.arange(half, device=t.device) / half)
            angle = 1000 * t[:, None] * frequency                       # [B, D / 2]
            h = h + self.time(torch.cat((angle.cos(), angle.sin()), dim=-1))[:, None]
        if self.config.conv:            # sees words of a few letters, such as binding sites
            h = h + self.conv(h.transpose(1, 2)).relu().transpose(1, 2)
        return h

    def logits_at(self, x, t, positions):
        """The logits at positions [B, k] alone -> float32 [B, k, V]; None: at every position."""
        h = self.embed(x, t)
        with torch.autocast(x.device.type, self.autocast, self.autocast is not None):
            for block in self.blocks[:-1]:
                h = block(h)
            h = self.blocks[-1](h, positions)
        return self.head(self.norm(h)).float()          # ratios of probabilities are taken of them

    def forward(self, x, t=None):
        """x: long [B, L] in 0..V; t: float [B] or None -> logits float32 [B, L, V]."""
        return self.logits_at(x, t, None)

# -----------------------------------------------------------------------------
# its optimizers

class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal matrix by matrix (Muon, 2502.16982), with updates as large as those
    of AdamW.

    torch.optim.Muon is the same but for bfloat16, where a processor without such instructions takes
    up to fifteen times longer."""

    def __init__(self, matrices, weight_decay=0.0, momentum=0.95):
        super().__init__(matrices, dict(lr=0.0, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        group, = self.param_groups
        alike = {}                                      # matrices of one shape: one stack of them
        for p in group["params"]:
            alike.setdefault(p.shape, []).append(p)
        for shape, matrices in alike.items():
            grad = torch.stack([p.grad for p in matrices])                          # [k, m, n]
            mean = self.state[matrices[0]].setdefault("means", torch.zeros_like(grad))
            mean.lerp_(grad, 1 - group["momentum"])
            update = orthogonal(grad.lerp(mean, group["momentum"]))                 # Nesterov's
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, update.unbind(),
                                alpha=-0.2 * group["lr"] * math.sqrt(max(shape)))


def orthogonal(x):
    """Nearly the orthogonal matrices that are nearest to x [k, m, n], by Newton-Schulz iterations:
    singular values end between 0.7 and 1.2."""
    if x.size(-2) > x.size(-1):
        return orthogonal(x.mT).mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x


def make_optimizers(model, weight_decay=0.0):
    """Muon for the matrices of the blocks, AdamW for all else. Pre-training needs at most half as
    many steps as with AdamW alone."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return [Muon(matrices, weight_decay),
            torch.optim.AdamW(others, weight_decay=weight_decay, fused=True)]
