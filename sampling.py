"""From logits to the next token: the filters, in their order, and the draw.

Pure functions of the logits; nothing here knows a model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Sampler:
    """How the next token is chosen; `sampling_probs` says what the options do. Called by LanguageModel.stream."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def __call__(self, logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) behind the tokens `seen` (B, T) -> tokens (B, 1)."""
        return draw(sampling_probs(logits, self.temperature, self.top_k, self.top_p), self.generator)


def sampling_probs(logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None,
                   top_p: float | None = None) -> torch.Tensor:
    """The distribution that a next token is drawn from: logits (B, V) -> probabilities (B, V), rows sum to one.

    Applied in this order: divide by `temperature` (0: all mass on the likeliest token), keep the `top_k` likeliest
    tokens, then keep the fewest likeliest of those that together hold at least `top_p` of the probability
    (Holtzman et al. 2019, arXiv:1904.09751). Of equal logits at a border the lower token id is kept.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must not be negative")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or left out")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1, or left out")
    if temperature == 0:
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    logits = logits.float()
    largest = logits.max(dim=1, keepdim=True).values  # taken off, so that a tiny temperature cannot overflow
    if top_p is None:
        probs = ((logits - largest) / temperature).exp()
        if top_k is not None and top_k < logits.size(1):
            kth = logits.topk(top_k, dim=1).values[:, -1:]  # before any rounding could make new ties
            above, equal = logits > kth, logits == kth
            wanted = top_k - above.sum(dim=1, keepdim=True)  # so many of the equal ones, counted from the lowest id
            probs = probs.masked_fill(~(above | (equal & (equal.cumsum(dim=1) <= wanted))), 0.0)
        return probs / probs.sum(dim=1, keepdim=True)
    ordered, token = logits.sort(dim=1, descending=True, stable=True)  # before any rounding could make new ties
    probs = ((ordered[:, :top_k] - largest) / temperature).softmax(dim=1)  # (B, k), likeliest first
    if top_p is not None:
        before = probs.cumsum(dim=1) - probs  # mass of the likelier tokens: below top_p, this one is still needed
        probs = probs.masked_fill(before >= top_p, 0.0)
        probs = probs / probs.sum(dim=1, keepdim=True)
    return torch.zeros_like(logits).scatter_(1, token[:, :top_k], probs)


def draw(probs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One token a row, (B, 1), from probabilities (B, V), each with one random number (torch.multinomial needs V)."""
    wide = probs.dtype if probs.device.type == "mps" else torch.float64  # MPS has no float64
    below = probs.to(wide).cumsum(dim=1)
    at = torch.rand(probs.size(0), 1, dtype=wide, device=probs.device, generator=generator) * below[:, -1:]
    return torch.searchsorted(below, at, right=True).clamp(max=probs.size(1) - 1)  # never one of probability 0
