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
BETA_FAST, BETA_SLOW = 32, 1  # likewise, of YaRN: the paper's values, which published models have


def rope_cos_sin(positions: torch.Tensor, head_dim: int, theta: float, factor: float = 1.0, original: int = 0,
                 scaling: str = "llama3") -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (..., T, D) of RoPE's angles at positions (..., T). Channels i and i + D/2 are a pair, which
    turns by position * theta^(-2i/D) (Su et al. 2021, arXiv:2104.09864; paired as in Llama's published weights).

    A `factor` slows pairs down for a context longer than the `original` (see kept_speed). With `scaling` yarn it also
    makes queries and keys longer (see yarn_length)."""
    speed = theta ** (-torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
    if factor != 1:
        kept = kept_speed(speed, theta, original, scaling)
        speed = speed * (kept + (1 - kept) / factor)
    angle = positions[..., None] * speed
    angle = torch.cat([angle, angle], dim=-1)
    length = yarn_length(factor) if scaling == "yarn" else 1
    return angle.cos() * length, angle.sin() * length


def yarn_length(factor: float) -> float:
    """How much longer queries and keys get, so that attention stays as sharp; config.json's attention_factor."""
    return 1 + math.log(factor) / 10


def kept_speed(speed: torch.Tensor, theta: float, original: int, scaling: str) -> torch.Tensor:
    """Which share of its speed (D/2,) a pair keeps; the rest is divided by the factor. It depends on how often the pair
    turns in `original` positions.

    linear: none (Chen et al. 2023, arXiv:2306.15595). llama3: all with more than 4 turns, none with less than one, and
    between them in proportion to the turns (apply_scaling in Meta's llama-models). yarn: all with more than 32 turns,
    none with less than one, and between them in proportion to the pair's number, whose limits are rounded outwards
    (Peng et al. 2023, arXiv:2309.00071)."""
    if scaling == "linear":
        return torch.zeros_like(speed)
    if scaling == "llama3":
        turns = original * speed / (2 * math.pi)
        return ((turns - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR)).clamp(0, 1)
    num_pairs = speed.size(0)
    first, last = (num_pairs * math.log(original / (2 * math.pi * turns), theta) for turns in (BETA_FAST, BETA_SLOW))
    first, last = max(math.floor(first), 0), min(math.ceil(last), 2 * num_pairs - 1)
    pair = torch.arange(num_pairs, device=speed.device)
    return 1 - ((pair - first) / (last - first or 0.001)).clamp(0, 1)  # as transformers avoids a division by zero


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, T, H, D) with each pair of channels turned by its angle; cos and sin (T, D) or (B, T, D)."""
    cos, sin = (t.unsqueeze(-2).to(x.dtype) for t in (cos, sin))  # (..., T, 1, D)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def alibi_slopes(n_head: int, device: torch.device | None = None) -> torch.Tensor:
    """(H,): a head's penalty for each position of distance, 2^(-8/H), 2^(-16/H), ... If H is not a power of two, the
    further heads take every other slope of twice as many heads (Press et al. 2021, arXiv:2108.12409)."""
    power = 2 ** int(math.log2(n_head))
    head = torch.arange(n_head, device=device)
    return torch.exp2(torch.where(head < power, -8 * (head + 1) / power, -4 * (2 * (head - power) + 1) / power))


def alibi_bias(n_head: int, distance: torch.Tensor) -> torch.Tensor:
    """(1, H, T, S): what ALiBi adds to the scores of keys that stand `distance` (T, S) before the query."""
    return -alibi_slopes(n_head, distance.device)[None, :, None, None] * distance


def sinusoids(positions: torch.Tensor, width: int) -> torch.Tensor:
    """(..., T, C): sines and cosines of positions (..., T), wavelengths from 2 pi to 2 pi * 10,000 (Vaswani et al.
    2017, arXiv:1706.03762). They are as large as the token table at the start: both are of size 1 in the paper, 0.02
    here."""
    speed = 10000 ** (-torch.arange(0, width, 2, device=positions.device) / width)
    angle = positions[..., None] * speed
    return 0.02 * math.sqrt(2) * torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)
