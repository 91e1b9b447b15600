"""The denoiser: a bidirectional transformer from noisy tokens (and a time) to one row of logits a slot.

Shapes: B sequences, L slots, V clean tokens (the network also reads V itself, the mask), D channels, H heads.
Any callable `(x, t) -> logits [B, L, V]` can stand in for `Denoiser`; `hidden`, `hidden_at` and `head` only make it fast.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    vocab_size: int                  # V, clean tokens
    length: int                      # the longest sequence that the rotary table covers
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128                # D
    dropout: float = 0.0
    time_conditioning: bool = False  # absorbing noise shows its level as the share of masks, and does well without
    conv: int = 0                    # letters, an odd number, that a convolution over the embeddings reads at once; 0: none


def at(h, slots):
    """Rows of h [B, L, D] at slots [B, k] -> [B, k, D]."""
    return h.gather(1, slots[..., None].expand(-1, -1, h.size(-1)))


def rotate(x, cos, sin):
    """Rotary positions (RoFormer, arXiv 2104.09864, eq. 34): x [B, H, n, D/H], cos and sin [..., n, D/2H]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class Norm(nn.Module):
    """RMSNorm; with a condition [B, D], adaLN then shifts and scales it (DiT, arXiv 2212.09748), starting at no effect."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.RMSNorm(config.n_embd)
        self.modulation = nn.Linear(config.n_embd, 2 * config.n_embd) if config.time_conditioning else None

    def forward(self, x, condition):
        h = self.norm(x)
        if condition is None:
            return h
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)                          # [B, 1, D] each
        return h * (1 + scale) + shift


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config):
        super().__init__()
        d, self.n_head, self.dropout = config.n_embd, config.n_head, config.dropout
        self.norm1, self.norm2 = Norm(config), Norm(config)
        self.query, self.key_value = nn.Linear(d, d, bias=False), nn.Linear(d, 2 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d, bias=False), nn.GELU(approximate="tanh"),
                                 nn.Linear(4 * d, d, bias=False), nn.Dropout(config.dropout))

    def heads(self, x):  # [B, n, D] -> [B, H, n, D/H]
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)

    def forward(self, x, cos, sin, condition=None, slots=None):
        """x [B, L, D] -> [B, L, D]; with slots [B, k], only those rows -> [B, k, D]: every slot is still attended to,
        but queries, output projection and MLP are spent on the rows that somebody will read."""
        h = self.norm1(x, condition)
        k, v = map(self.heads, self.key_value(h).chunk(2, dim=-1))
        k, qcos, qsin = rotate(k, cos, sin), cos, sin
        if slots is not None:
            x, h = at(x, slots), at(h, slots)
            qcos, qsin = cos[slots][:, None], sin[slots][:, None]                                    # [B, 1, k, D/2H]
        q = rotate(self.heads(self.query(h)), qcos, qsin)
        a = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        x = x + F.dropout(self.out(a.transpose(1, 2).flatten(2)), self.dropout, self.training)
        return x + self.mlp(self.norm2(x, condition))


class Denoiser(nn.Module):
    """logits[b, i, v]: the network's belief log p(x0_i = v | x_t), up to a constant a slot."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % (2 * config.n_head):
            raise ValueError(f"n_embd ({config.n_embd}) must be a multiple of twice n_head ({config.n_head}): rotary pairs")
        if config.conv and config.conv % 2 == 0:
            raise ValueError(f"conv ({config.conv}) must be odd: as many letters on either side")
        self.config, d = config, config.n_embd
        self.autocast = None             # or torch.bfloat16: the blocks' matrix products; weights and residuals stay float32
        self.embedding = nn.Embedding(config.vocab_size + 1, d)
        self.time = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU()) if config.time_conditioning else None
        self.conv = nn.Conv1d(d, d, config.conv, padding=config.conv // 2) if config.conv else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(d)
        self.output = nn.Linear(d, config.vocab_size)
        half = d // config.n_head // 2
        angle = torch.arange(config.length)[:, None] * 10000.0 ** (-torch.arange(half) / half)       # [L, D/2H]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.reset_parameters()

    def reset_parameters(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:  # the residual stream keeps its scale at any depth (GPT-2)
            nn.init.normal_(block.out.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))
            nn.init.normal_(block.mlp[2].weight, std=0.02 / math.sqrt(2 * self.config.n_layer))
        for module in self.modules():
            if isinstance(module, Norm) and module.modulation is not None:
                nn.init.zeros_(module.modulation.weight)  # time starts without effect ...
        nn.init.zeros_(self.output.weight)                # ... and the prediction starts uniform

    def condition(self, t):
        """Time t [B] in [0, 1] -> [B, D]: sinusoids, then an MLP."""
        if t is None:
            raise ValueError("this denoiser is time-conditioned: it needs a time t [B]")
        half = self.config.n_embd // 2
        angle = 1000 * t[:, None].float() * 10000.0 ** (-torch.arange(half, device=t.device) / half)
        return self.time(torch.cat((angle.cos(), angle.sin()), dim=-1))

    def hidden(self, x, t=None):
        """x long [B, L] in 0..V, t float [B] or None (read only with time_conditioning) -> [B, L, D]."""
        return self.hidden_at(x, t, None)

    def hidden_at(self, x, t, slots):
        """hidden(x, t) at slots [B, k] alone -> [B, k, D]; the last block computes nothing else."""
        length = x.size(1)
        if length > self.config.length:
            raise ValueError(f"a sequence of {length} slots in a model made for {self.config.length}")
        condition = None if self.time is None else self.condition(t)
        cos, sin = self.cos[:length], self.sin[:length]
        h = self.embedding(x)                                                                        # [B, L, D]
        if self.conv is not None:        # words of a few letters, such as binding sites, are seen at once
            h = h + F.gelu(self.conv(h.transpose(1, 2))).transpose(1, 2)
        # no cache of cast weights: a captured graph must cast them anew, since updates change them in place
        with torch.autocast(x.device.type, self.autocast, self.autocast is not None, cache_enabled=False):
            for block in self.blocks[:-1]:
                h = block(h, cos, sin, condition)
            h = self.blocks[-1](h, cos, sin, condition, slots)
        return self.norm(h)

    def head(self, h):
        """[..., D] -> logits [..., V], always float32: ratios of probabilities are taken of them."""
        return self.output(h).float()

    def forward(self, x, t=None):
        """x long [B, L] in 0..V, t float [B] or None -> logits float32 [B, L, V]."""
        return self.head(self.hidden(x, t))
