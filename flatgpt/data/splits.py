"""Which split a document falls in: train, test or val.

Owns the SplitRule, and the look at the beginning of a source that makes it.

Invariants: the split of a document is a function of its text and the rule, so it depends neither on the order of the
documents nor on the number of ranks; and a small source has no empty split.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from flatgpt.data.records import Part, text_of

SPLITS = ("train", "test", "val")
DIGEST_BYTES = 16
FEW_DOCUMENTS, FEW_CHARACTERS = 1000, 64 << 20  # a source below both is small: see `plan_splits`


@dataclass
class SplitRule:
    """A document's draw, a number in [0, 1) made of its hash, decides its split.

    A source of one document is cut by position instead, into train, test and val in this order."""

    val_fraction: float
    test_fraction: float
    val_below: float  # val if the draw is below this
    test_below: float  # else test if it is below this, else train
    by_position: bool = False

    def split(self, text: str, digest: bytes) -> list[tuple[str, str]]:
        """(split, text) for a text that is not empty."""
        if not self.by_position:
            drawn = draw(digest)
            return [("val" if drawn < self.val_below else "test" if drawn < self.test_below else "train", text)]
        test_from = int(len(text) * (1 - self.val_fraction - self.test_fraction))
        val_from = int(len(text) * (1 - self.val_fraction))
        cut = (("train", text[:test_from]), ("test", text[test_from:val_from]), ("val", text[val_from:]))
        return [(split, part) for split, part in cut if part]


def digest_of(utf8: bytes) -> bytes:
    """16 bytes of the SHA-256 of a document's text; only duplicates have the same digest."""
    return hashlib.sha256(utf8).digest()[:DIGEST_BYTES]


def draw(digest: bytes) -> float:
    return int.from_bytes(digest[:8], "big") / 2**64


def plan_splits(parts: list[Part], text_column: str, val_fraction: float, test_fraction: float) -> SplitRule:
    """The rule for a source, from its beginning alone.

    In a small source too few documents, or none, might fall below `val_fraction` by chance. There the documents with
    the lowest draws make the val split, as many as the fraction says and at least one; likewise the test split; but one
    is left to train on. Raises ValueError for a source without text."""
    rule = SplitRule(val_fraction, test_fraction, val_fraction, val_fraction + test_fraction)
    draws, num_characters, fault = set(), 0, ""
    for part in parts:
        for record in part.read():
            try:
                text = text_of(record, text_column)[0]
            except ValueError as error:  # is reported in its turn
                text, fault = "", fault or str(error)
            if text:
                draws.add(draw(digest_of(text.encode())))
                num_characters += len(text)
            if len(draws) >= FEW_DOCUMENTS or (num_characters >= FEW_CHARACTERS and len(draws) > 1):
                return rule
    if not draws:
        raise ValueError(fault or "the source is empty: there is no text to make tokens of")
    if len(draws) == 1:
        rule.by_position = True
        return rule
    ordered = sorted(draws) + [1.0]
    spare = len(draws) - 1  # at least one document is to train on
    num_val = min(max(1, round(val_fraction * len(draws))), spare)
    num_test = min(max(1, round(test_fraction * len(draws))), spare - num_val) if test_fraction else 0
    rule.val_below, rule.test_below = ordered[num_val], ordered[num_val + num_test]
    return rule
