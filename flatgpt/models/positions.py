"""Formulas for where a token stands: RoPE, ALiBi, sinusoids.

Owns functions of positions, as tensors. It does not know a model or its configuration: GPT.attention_context in
model.py decides which of these a model uses.

Letters: T positions, S positions that can be seen, C channels, H heads, D channels a head.

Invariant: each value depends on the positions alone, so a token has the same one in a batch, in a cache, and in any
window that gives it the same position.
"""

from __future__ import annotations

import math

import torch

LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR = 1, 4  # config.json's names; every Llama 3 that Meta has published has these values


def rope_cos_sin(positions: torch.Tensor, head_dim: int, theta: float, factor: float = 1.0,
                 original: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (T, D) of RoPE's angles at positions (T,). Channels i and i + D/2 are a pair, which turns by
    position * theta^(-2i/D) (Su et al. 2021, arXiv:2104.09864; paired as in Llama's published weights).

    A `factor` slows the pairs that turn less than once in `original` positions by this factor. Pairs that turn more
    than 4 times keep their speed, and between the two the speed changes smoothly (Llama 3.1's: apply_scaling in Meta's
    llama-models, rope_type=llama3 in transformers)."""
    speed = theta ** (-torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
    if factor != 1:
        turns = original * speed / (2 * math.pi)
        kept = ((turns - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR)).clamp(0, 1)
        speed = speed * (kept + (1 - kept) / factor)
    angle = (positions[:, None] * speed).repeat(1, 2)
    return angle.cos(), angle.sin()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, T, H, D) with each pair of channels turned by its angle; cos and sin (T, D)."""
    cos, sin = (t.unsqueeze(1).to(x.dtype) for t in (cos, sin))  # (T, 1, D)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def alibi_slopes(n_head: int, device: torch.device | None = None) -> torch.Tensor:
    """(H,): a head's penalty for each position of distance, 2^(-8/H), 2^(-16/H), ... If H is not a power of two, the
    further heads take every other slope of twice as many heads (Press et al. 2021, arXiv:2108.12409)."""
    power = 2 ** int(math.log2(n_head))
    head = torch.arange(n_head, device=device)
    return torch.exp2(torch.where(head < power, -8 * (head + 1) / power, -4 * (2 * (head - power) + 1) / power))


def alibi_bias(n_head: int, distance: torch.Tensor) -> torch.Tensor:
    """(1, H, T, S): what ALiBi adds to the scores of keys that stand `distance` (T, S) before the query; -inf for later
    keys."""
    penalty = alibi_slopes(n_head, distance.device)[:, None, None] * distance
    return (-penalty).masked_fill(distance < 0, -math.inf)[None]


def sinusoids(positions: torch.Tensor, width: int) -> torch.Tensor:
    """(T, C): sines and cosines of positions (T,), wavelengths from 2 pi to 2 pi * 10,000 (Vaswani et al. 2017,
    arXiv:1706.03762). They are as large as the token table at the start: both are of size 1 in the paper, 0.02 here."""
    speed = 10000 ** (-torch.arange(0, width, 2, device=positions.device) / width)
    angle = positions[:, None] * speed
    return 0.02 * math.sqrt(2) * torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
