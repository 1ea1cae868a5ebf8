"""From logits to the next token: the filters, in their order, and the draw.

Pure functions of the logits and of the tokens before them; nothing here knows a model. The order is Hugging Face's, and
what is left is what their logits processors leave (but for ties, of which they keep all):

    repetition_penalty    logits of tokens that were there before shrink (the prompt's tokens count)
    temperature           logits / temperature; 0: all mass on the likeliest token, and the filters below have no say
    top_k                 the k likeliest tokens stay
    top_p                 of these the fewest likeliest that together hold at least this much probability
    min_p                 of these the tokens that are at least this share as likely as the likeliest

Invariants: at least one token stays; of tied logits at a border of top_k, top_p or temperature=0 the lower id stays;
tokens are ranked by their logits before they are divided, because rounding could make new ties.

Example: logits 2, 1, 0, 0 are probabilities .61 .22 .08 .08. top_k=3 leaves .67 .24 .09 and 0; then top_p=0.9 leaves
.73 .27, because these two held .91; then min_p=0.5 leaves the first alone, because .27 is not half of .73.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from flatgpt.options import failed_rules

MASS = 2**40  # probabilities are summed up as whole numbers of 1 / MASS: in any order, and on any device, to the same


class Stage(NamedTuple):
    """The distribution behind a filter: the softmax of logits (B, V) / temperature, -inf for what is filtered out."""

    name: str  # of the option; "model" before all filters
    logits: torch.Tensor
    temperature: float = 1.0

    def probs(self) -> torch.Tensor:
        """(B, V), float32; rows sum to one."""
        return distances(self.logits, self.temperature).softmax(dim=1)


@dataclass
class Sampler:
    """How the next token is chosen. Called by LanguageModel.stream. Raises ValueError that lists all faults."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    generator: torch.Generator | None = None
    watch: Callable[[list[Stage], torch.Tensor], None] | None = None  # is told the stages and the token (B, 1) drawn

    def __post_init__(self) -> None:
        faults = failed_rules(
            self, ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "from 0 (all tokens) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"))
        if faults:
            raise ValueError("; ".join(faults))

    def __call__(self, logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) behind the tokens `seen` (B, T) -> tokens (B, 1)."""
        stages = list(self.stages(logits, seen))
        token = draw(stages[-1].probs(), self.generator)
        if self.watch:
            self.watch(stages, token)
        return token

    def stages(self, logits: torch.Tensor, seen: torch.Tensor) -> Iterator[Stage]:
        """The model's own distribution, then that behind each filter that is on; the last is drawn from."""
        logits, at = logits.float(), 1.0  # the temperature so far
        yield Stage("model", logits)
        if self.repetition_penalty != 1:
            logits = penalize(logits, seen, self.repetition_penalty)
            yield Stage("repetition_penalty", logits)
        if self.temperature == 0:
            yield Stage("temperature", keep_likeliest(logits))
            return
        if self.temperature != 1:
            at = self.temperature
            yield Stage("temperature", logits, at)
        most = min(self.top_k or logits.size(1), logits.size(1))  # tokens that are left
        if most < logits.size(1):
            logits = keep_top_k(logits, most)
            yield Stage("top_k", logits, at)
        if self.top_p is not None and self.top_p < 1:
            logits = keep_top_p(logits, self.top_p, at, most)
            yield Stage("top_p", logits, at)
        if self.min_p:
            logits = keep_min_p(logits, self.min_p, at)
            yield Stage("min_p", logits, at)


def distances(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits (B, V) / temperature, the largest of a row taken off first, so that a tiny temperature overflows nothing:
    all are at most 0. (Below 1e-37 float32 has no inverse, and the mass lies on the largest anyhow.)"""
    return (logits - logits.max(dim=1, keepdim=True).values) / max(temperature, 1e-37)


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits (B, V), those of the tokens `seen` (B, T) divided by the penalty where they are positive and multiplied
    where they are negative (CTRL, Keskar et al. 2019, arXiv:1909.05858, with the sign as transformers has it)."""
    of_seen, penalty = logits.gather(1, seen), min(max(penalty, 1e-37), 1e37)  # beyond these float32 has 0 and inf
    of_seen = torch.where(of_seen < 0, of_seen * penalty, of_seen / penalty)
    largest = torch.finfo(logits.dtype).max  # a row of nothing but infinities would be no distribution
    return logits.scatter(1, seen, of_seen.clamp(-largest, largest))


def keep_likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Logits (B, V) with all but the likeliest token at -inf."""
    first = logits.argmax(dim=1, keepdim=True)  # of equal ones the lowest id
    return torch.full_like(logits, -math.inf).scatter(1, first, logits.gather(1, first))


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Logits (B, V) with all but the k likeliest tokens at -inf."""
    return _keep(logits, logits.topk(k, dim=1).values[:, -1:], k)  # a sort of all V takes ten times as long


def keep_top_p(logits: torch.Tensor, p: float, temperature: float, most: int) -> torch.Tensor:
    """Logits (B, V) with all but the fewest likeliest tokens that hold probability p together at -inf (Holtzman et al.
    2019, arXiv:1904.09751); no more than `most` are not -inf yet."""
    ordered = logits.topk(most, dim=1).values  # likeliest first
    probs = distances(ordered, temperature).softmax(dim=1)
    mass = (probs * MASS).long()
    before = (mass.cumsum(dim=1) - mass) / MASS  # of the likelier tokens: below p, this one is still needed
    count = (before < p).sum(dim=1, keepdim=True).clamp(min=1)  # float32 has no p of 1e-320
    return _keep(logits, ordered.gather(1, count - 1), count)


def keep_min_p(logits: torch.Tensor, p: float, temperature: float) -> torch.Tensor:
    """Logits (B, V) with the tokens whose probability is below p times the likeliest's at -inf (Nguyen et al. 2024,
    arXiv:2407.01082)."""
    return logits.masked_fill(distances(logits, temperature) < math.log(p), -math.inf)


def _keep(logits: torch.Tensor, least: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """Logits (B, V) with all but the `count` likeliest of each row at -inf, of which `least` (B, 1) is the smallest."""
    above, equal = logits > least, logits == least
    wanted = count - above.sum(dim=1, keepdim=True)  # so many of the equal ones, counted from the lowest id
    return logits.masked_fill(~(above | (equal & (equal.cumsum(dim=1) <= wanted))), -math.inf)


def draw(probs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One token a row, (B, 1), from probabilities (B, V), each with one random number (torch.multinomial needs V)."""
    wide = probs.dtype if probs.device.type == "mps" else torch.float64  # MPS has no float64
    below = (probs * MASS).long().cumsum(dim=1)
    at = torch.rand(probs.size(0), 1, dtype=wide, device=probs.device, generator=generator) * below[:, -1:]
    at = torch.minimum(at.long(), below[:, -1:] - 1)  # a random number next to 1 may have been rounded up
    return torch.searchsorted(below, at, right=True)  # never a token of probability 0


class Candidates(NamedTuple):
    """What each stage made of the probabilities of the likeliest tokens: what `table` prints."""

    stages: list[str]  # their names
    ids: list[int]
    probs: list[list[float]]  # a row for each of ids, a column for each of stages; 0 = filtered out
    others: list[float]  # all other tokens together


def candidates(stages: list[Stage], token: torch.Tensor, num_rows: int) -> Candidates:
    """The candidates of a batch's first row: the `num_rows` likeliest before all filters, what came among so many by
    them, and the one drawn."""
    drawn, probs = int(token[0]), torch.stack([stage.probs()[0].cpu() for stage in stages])  # (stages, V)
    first, last = (probs[i].topk(min(num_rows, probs.size(1))).indices for i in (0, -1))
    ids = list(dict.fromkeys([*first.tolist(), *last[probs[-1, last] > 0].tolist(), drawn]))
    others = probs.index_fill(1, torch.tensor(ids), 0.0).sum(dim=1)
    return Candidates([stage.name for stage in stages], ids, probs[:, ids].T.tolist(), others.tolist())


def table(stages: list[Stage], token: torch.Tensor, num_rows: int, spell: Callable[[int], str]) -> str:
    """The `candidates` for a terminal, the one drawn marked by >. A dash is a token without probability: filtered out.
    """
    drawn, (names, ids, probs, others) = int(token[0]), candidates(stages, token, num_rows)
    labels = [("> " if i == drawn else "  ") + spell(i) for i in ids] + ["  others"]
    width = max(map(len, labels))
    lines = [" " * width + "".join(f"  {name:>7}" for name in names)]
    for label, row in zip(labels, [*probs, others]):
        cells = [f"{share:.2%}" if share else "-" for share in row]
        lines.append(f"{label:{width}}" + "".join(f"  {cell:>{max(7, len(name))}}" for cell, name in zip(cells, names)))
    return "\n".join(lines)
