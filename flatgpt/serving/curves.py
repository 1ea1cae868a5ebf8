"""A run's records as curves of bounded length, with its evaluations, events and samples.

A curve has at most MAX_POINTS points. While a run is shorter, each point is a report, as metrics.jsonl has it. When it
grows longer, neighbouring points are joined, two and two, again and again: a point is then the mean of
`reports_a_point` reports, with their lowest and highest beside it, so that no spike is lost.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flatgpt.run_folder import EVENTS, number, restart_point

MAX_POINTS = 2000
MAX_EVALUATIONS, MAX_EVENTS, MAX_SAMPLES = 1000, 500, 100  # kept; beyond it every second one is left out
MAX_TEXT, MAX_TEXTS = 10_000, 100  # characters of a sample, and samples of a step
MAX_LOSSES = 100  # of an evaluation
MAX_RESTART_POINTS = 10_000  # rollbacks and resumes, of which the latest are kept
PLACES = ("step", "tokens", "elapsed_s")
VALUES = ("train/loss", "lr", "grad_norm", "tokens_per_sec", "mfu", "memory_gb")
COLUMNS = PLACES + VALUES


class Thinned:
    """Rows of numbers joined to at most MAX_POINTS points; a number that is missing is NaN, and counts for nothing."""

    def __init__(self) -> None:
        self.rows_a_point = 1
        self._num_rows = 0
        empty = np.empty((0, len(COLUMNS)))
        self._sum, self._count, self._low, self._high = empty, empty, empty, empty

    def add(self, rows: np.ndarray) -> None:
        """`rows` is (number, len(COLUMNS)) float64."""
        if not len(rows):
            return
        is_known = np.isfinite(rows)
        points = (np.where(is_known, rows, 0.0), is_known.astype(float), np.where(is_known, rows, np.inf),
                  np.where(is_known, rows, -np.inf))
        place = (self._num_rows + np.arange(len(rows))) // self.rows_a_point
        self._num_rows += len(rows)
        # The last point so far may not be full: the new rows that belong to it follow it, and are joined with it.
        last = max(0, len(self._sum) - 1)
        place = np.concatenate([np.arange(last, len(self._sum)), place])
        self._join(points, last, np.flatnonzero(np.diff(place, prepend=-1)))
        while len(self._sum) > MAX_POINTS:
            self.rows_a_point *= 2
            nothing = tuple(part[:0] for part in points)
            self._join(nothing, 0, np.arange(0, len(self._sum), 2))

    def _join(self, points: tuple[np.ndarray, ...], first: int, starts: np.ndarray) -> None:
        """Put `points` behind the present ones, and join those from `first` on in groups that begin at `starts`."""
        present = (self._sum, self._count, self._low, self._high)
        reducers = (np.add, np.add, np.minimum, np.maximum)
        self._sum, self._count, self._low, self._high = (
            np.concatenate([old[:first], reduce.reduceat(np.concatenate([old[first:], new]), starts, axis=0)])
            for old, new, reduce in zip(present, points, reducers))

    def as_dict(self) -> dict[str, list[float | None]]:
        """Column -> its points; with `low/` and `high/` before its name the lowest and highest that a point is made of,
        when it is made of several."""
        with np.errstate(invalid="ignore"):
            parts = {"": self._sum / self._count}
        if self.rows_a_point > 1:
            parts |= {"low/": self._low, "high/": self._high}
        return {prefix + key: [value if math.isfinite(value) else None for value in part[:, column].tolist()]
                for prefix, part in parts.items() for column, key in enumerate(COLUMNS)
                if not prefix or key in VALUES}


class Curves:
    """What the records of a run come to. `tokens_per_step` places those that have no tokens, where no report among the
    records tells."""

    def __init__(self, tokens_per_step: float = 0.0) -> None:
        self._train = Thinned()
        self._evaluations: list[dict] = []
        self._events: list[dict] = []
        self._samples: list[dict] = []
        self._tokens_per_step = tokens_per_step
        self.restart_points: list[tuple[int, int]] = []  # see run_folder.current_scores
        self.newest_step = 0

    def add(self, records: list[dict[str, Any]]) -> None:
        """Take in the next records of metrics.jsonl."""
        rows = []
        for record in records:
            self._tokens_per_step = tokens_per_step(record) or self._tokens_per_step
            self.newest_step = record["step"]
            if point := restart_point(record):
                self.restart_points = [*self.restart_points[1 - MAX_RESTART_POINTS:], point]
            if "train/loss" in record:
                rows.append([record.get(key) for key in COLUMNS])
            if "val/loss" in record:
                self._evaluations.append(self._placed(record) | {
                    key: plain(record[key]) for key in [k for k in record if k.startswith("val/")][:MAX_LOSSES]})
            if "samples" in record:
                self._samples.append(self._placed(record) | {
                    key: [str(text)[:MAX_TEXT] for text in record.get(key, [])[:MAX_TEXTS]]
                    for key in ("samples", "prompts")})
            for key, kind in (EVENTS | {"stopped": "stop"}).items():
                if key in record:
                    why = next((record[why] for why in ("fault", "stopped", "branched_from") if why in record), "")
                    self._events.append(self._placed(record) | {"kind": kind, "why": why[:500]})
        self._train.add(as_numbers(rows))
        for kept, most in ((self._evaluations, MAX_EVALUATIONS), (self._events, MAX_EVENTS),
                           (self._samples, MAX_SAMPLES)):
            while len(kept) > most:
                del kept[-2:0:-2]  # the last stays, and so does the first

    def _placed(self, record: dict[str, Any]) -> dict[str, Any]:
        """Where a record stands; its tokens follow from its step where it has none."""
        tokens = record.get("tokens")
        if tokens is None:
            tokens = number(record["step"]) * self._tokens_per_step
        return {"step": plain(record["step"]), "tokens": plain(tokens), "elapsed_s": plain(record.get("elapsed_s"))}

    def as_dict(self) -> dict[str, Any]:
        return {"reports_a_point": self._train.rows_a_point, "columns": self._train.as_dict(),
                "evaluations": self._evaluations, "events": self._events, "samples": self._samples}


def tokens_per_step(record: dict[str, Any]) -> float:
    """0 where the record does not tell."""
    rate = number(record.get("tokens")) / (number(record["step"]) or math.nan)
    return rate if math.isfinite(rate) else 0.0


def as_numbers(rows: list[list[Any]]) -> np.ndarray:
    """(len(rows), len(COLUMNS)) float64, NaN for null."""
    try:
        numbers = np.array(rows, float)
    except OverflowError:  # an integer of hundreds of digits
        numbers = np.array([[number(value) for value in row] for row in rows])
    return numbers.reshape(-1, len(COLUMNS))


def plain(value: Any) -> float | int | None:
    """A number that JSON can hold, else None."""
    return value if math.isfinite(number(value)) else None
