"""The line that a run keeps on a terminal while it trains:

    340/1000 |███▍      | loss 3.214 ↓ · val 3.352 · 12,345 tok/s · 01:23 left

On a narrow terminal the bar goes first, then the speed, then the validation loss. metrics.py says what it shows.
"""

from __future__ import annotations

import shutil
import sys

from tqdm import tqdm

MIN_BAR = 12  # columns that a bar needs to tell something
QUICK, SLOW = 0.7, 0.95  # weights of what was before in two running means of the loss; their difference is its trend
FLAT = 0.002  # of the loss: a smaller difference is no trend


class ProgressLine:
    """A line for `total` steps, of which `step` are made. Close it."""

    def __init__(self, total: int, step: int):
        # A terminal of unknown size counts as 80 x 24; tqdm by itself would show nothing there.
        columns, lines = shutil.get_terminal_size()
        self._bar = tqdm(total=total, initial=step, ncols=columns, nrows=lines)
        self._texts = {"loss": "", "val": "", "speed": ""}
        self._quick, self._slow = Mean(QUICK), Mean(SLOW)
        self._arrange()

    def advance(self) -> None:
        """Count one step."""
        self._bar.update(1)

    def trained(self, loss: float, tokens_per_sec: float | None) -> None:
        trend = self._quick.add(loss) - self._slow.add(loss)
        self._texts |= {"loss": f"loss {loss:.3f} {arrow(0 if abs(trend) < FLAT * abs(loss) else trend)}",
                        "speed": "" if tokens_per_sec is None else f"{tokens_per_sec:,.0f} tok/s"}
        self._arrange()

    def validated(self, loss: float) -> None:
        self._texts["val"] = f"val {loss:.3f}"
        self._arrange()

    def go_back(self, step: int) -> None:
        self._bar.n = step

    def close(self) -> None:
        self._bar.close()

    def _arrange(self) -> None:
        columns = shutil.get_terminal_size().columns - 1  # of now: a window can be resized
        self._bar.ncols = columns
        self._bar.bar_format = arrange(self._texts, len(str(self._bar.total)), columns)


class Mean:
    """A running mean, in which the earlier values have a weight between 0 and 1."""

    def __init__(self, weight: float):
        self._weight, self._sum, self._total = weight, 0.0, 0.0

    def add(self, value: float) -> float:
        """The mean with one more value."""
        self._sum = self._weight * self._sum + (1 - self._weight) * value
        self._total = self._weight * self._total + (1 - self._weight)
        return self._sum / self._total


def arrow(trend: float) -> str:
    """An arrow for a trend; - = + where the terminal's encoding has no arrows."""
    return ("↓→↑" if can_encode("↓→↑") else "-=+")[1 + (trend > 0) - (trend < 0)]


def can_encode(text: str) -> bool:
    try:
        text.encode(sys.stderr.encoding)
    except UnicodeError:
        return False
    return True


def arrange(texts: dict[str, str], digits: int, columns: int) -> str:
    """tqdm's bar_format with as many of the texts (loss, val, speed) as there are columns for, and a bar where there is
    room for one. Step numbers have so many digits."""
    pieces = texts | {"left": "{remaining} left"}
    widths = {key: len(text) for key, text in pieces.items() if text} | {"left": len("00:00:00 left")}
    room, kept = columns - (2 * digits + 1), set()
    for key in ("loss", "left", "val", "speed"):
        if key in widths and widths[key] + 3 <= room:
            kept.add(key)
            room -= widths[key] + 3
    line = (" · " if can_encode("·") else " | ").join(text for key, text in pieces.items() if key in kept)
    count = "{n_fmt}/{total_fmt}"
    return f"{count} |{{bar}}| {line}" if room >= MIN_BAR else f"{count} {line}"
