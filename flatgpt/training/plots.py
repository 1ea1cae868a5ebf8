"""The curves of a run folder, and pictures of several runs in one.

Owns what the lines of metrics.jsonl and evals.jsonl mean as curves: null is a gap. A run of more than MAX_POINTS
reports is drawn through the means of neighbouring ones, in a band from their lowest to their highest. The validation
loss is that of the windows which every evaluation of a run reads; the loss over the whole split, which a run ends with,
is a point of its own (`whole/val/loss` among the curves). A score (`score/arc_easy/acc`) has its standard error to both
sides.

    run = read_run(Path("out/a"), "a")
    run.curves["train/loss"]["value"]      (points,), with "step", "tokens", "elapsed_s", "low", "high" beside it
    picture_of(PICTURES[0], [run])         matplotlib's Figure
"""

from __future__ import annotations

import io
import math
import re
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from safetensors import SafetensorError, safe_open

from flatgpt import files, run_folder
from flatgpt.run_folder import number

# Okabe and Ito's colours, which people who see fewer of them can tell apart, without the yellow that white swallows;
# then the same once more in dashes, and in dots.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ((), (5, 2), (1.5, 1.5))
MAX_POINTS = 400  # of a curve
MAX_SCORES = 60  # pictures of scores
WIDE = 20  # times as much: what reaches further than that gets a logarithmic axis

PARTS = ("step", "tokens", "elapsed_s", "value", "low", "high")
Curve = dict[str, np.ndarray]  # PARTS -> numbers, as many of each; NaN where the run reported none
Record = dict[str, Any]  # a line of metrics.jsonl
OF_VALIDATION: dict[str, Any] = {"marker": "o", "markersize": 4, "markerfacecolor": "white"}
OF_WHOLE_SPLIT: dict[str, Any] = {"marker": "D", "markersize": 5, "linestyle": ""}
OF_EVENTS: dict[str, dict[str, Any]] = {
    "skipped step": {"marker": "x", "markersize": 5, "linestyle": ""},
    "rollback": {"marker": "<", "markersize": 5, "linestyle": ""}, "restart": {"linestyle": ":"},
    "branch": {"linestyle": "-."}}


class Picture(NamedTuple):
    name: str  # of its file
    title: str
    key: str  # in metrics.jsonl
    x: str = "tokens"
    unit: str = ""
    factor: float = 1.0  # from the number in metrics.jsonl to the unit
    from_zero: bool = False  # the axis begins at zero, where it is linear

    @property
    def is_loss(self) -> bool:
        return self.key == "train/loss"

    @property
    def is_score(self) -> bool:
        return self.key.startswith("score/")


PICTURES = (
    Picture("loss_over_tokens", "Loss over tokens", "train/loss", unit="nats a token"),
    Picture("loss_over_time", "Loss over time", "train/loss", "elapsed_s", "nats a token"),
    Picture("learning_rate", "Learning rate", "lr", from_zero=True),
    Picture("gradient_norm", "Gradient norm, before clipping", "grad_norm"),
    Picture("throughput", "Throughput", "tokens_per_sec", unit="tokens a second", from_zero=True),
    Picture("mfu", "Model FLOPs utilisation", "mfu", unit="%", factor=100, from_zero=True),
    Picture("memory", "Peak memory of a process", "memory_gb", unit="GB", from_zero=True),
)


# Numbers


@dataclass
class RecordedRun:
    """A run folder as it was read."""

    label: str
    folder: Path
    records: list[Record]
    options: dict[str, Any]
    num_params: int | None  # None when there is no checkpoint yet
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)  # see run_folder.curves_of_scores

    def __post_init__(self) -> None:
        self._tokens_per_step = next(
            (tokens / r["step"] for r in self.records if r["step"] and (tokens := number(r.get("tokens"))) > 0), 0.0)
        self.evaluated = [r for r in self.records if "val/loss" in r]
        self.trained = [r for r in self.records if "train/loss" in r]
        self.curves = {picture.key: thin(self._curve(self.trained, picture.key)) for picture in PICTURES}
        self.curves["val/loss"] = self._curve(
            [r | {"val/loss": r.get("val/sampled_loss", r["val/loss"])} for r in self.evaluated], "val/loss")
        self.curves["whole/val/loss"] = self._curve([r for r in self.evaluated if "val/sampled_loss" in r], "val/loss")
        self.curves |= {f"score/{key}": self._score(score["points"]) for key, score in self.scores.items()}

    def curve(self, key: str) -> Curve:
        """One of `curves`; without a point where the run has no such score."""
        return self.curves.get(key) or self._curve([], key)

    def _score(self, points: list[dict[str, Any]]) -> Curve:
        rows = [(point["step"], number(point["tokens"]), math.nan, point["value"],
                 point["value"] - (point["stderr"] or 0), point["value"] + (point["stderr"] or 0)) for point in points]
        return dict(zip(PARTS, np.array(rows, float).reshape(-1, len(PARTS)).T))

    def events(self) -> list[tuple[str, Record]]:
        """The events of the run: for each its kind, a value of run_folder.EVENTS, and its record."""
        return [(kind, record) for record in self.records for key, kind in run_folder.EVENTS.items() if key in record]

    def place(self, record: Record, x: str) -> float:
        """Where a record stands on the axis `x`, tokens or elapsed_s."""
        if x == "tokens" and record.get(x) is None:
            return record["step"] * self._tokens_per_step
        return number(record.get(x))

    def _curve(self, records: list[Record], key: str) -> Curve:
        rows = [(r["step"], self.place(r, "tokens"), self.place(r, "elapsed_s"), *[number(r.get(key))] * 3)
                for r in records]
        return dict(zip(PARTS, np.array(rows, float).reshape(-1, len(PARTS)).T))

    def summary(self) -> dict[str, Any]:
        """The run in one row of numbers; None for what is not known."""
        val, max_iters = self.curves["val/loss"], number(self.options.get("max_iters"))
        best = np.nanargmin(val["value"]) if has_values(val) else None
        final = self.evaluated[-1] if self.evaluated else {}
        return {
            "parameters": self.num_params, "tokens": round(self.place(self.records[-1], "tokens")),
            "steps": self.records[-1]["step"], "max_iters": max_iters if math.isfinite(max_iters) else None,
            "train_loss": self.trained[-1]["train/loss"] if self.trained else None,
            "val_loss": final.get("val/loss"),
            "val_losses": {key.removeprefix("val/loss/"): value for key, value in final.items()  # a mixture's
                           if key.startswith("val/loss/")},
            "val_is_whole": "val/sampled_loss" in final or (
                bool(final) and final["step"] == max_iters and not self.options.get("eval_tokens")),
            "best_val_loss": None if best is None else float(val["value"][best]),
            "best_step": None if best is None else int(val["step"][best]),
            # The first report is of the step that warms up.
            "tokens_per_sec": self._over("tokens_per_sec", statistics.median, self.trained[1:] or self.trained),
            "mfu": self._over("mfu", statistics.median, self.trained[1:] or self.trained),
            "memory_gb": self._over("memory_gb", max), "elapsed_s": self._over("elapsed_s", max),
            "skipped": int(self._over("skipped", max) or 0), "rollbacks": int(self._over("rollbacks", max) or 0),
            "restarts": sum("resumed" in r for r in self.records),
            "reached": next((r for r in self.records if r.get("reached") is not None), None)}

    def _over(self, key: str, reduce: Callable, records: list[Record] | None = None) -> float | None:
        known = [r[key] for r in (self.records if records is None else records) if np.isfinite(number(r.get(key)))]
        return reduce(known) if known else None


def has_values(curve: Curve) -> bool:
    return bool(np.isfinite(curve["value"]).any())


def thin(curve: Curve) -> Curve:
    """At most MAX_POINTS points, each the mean of as many neighbours, with their lowest and highest."""
    size = math.ceil(len(curve["step"]) / MAX_POINTS)
    if size <= 1:
        return curve
    reduce = dict.fromkeys(PARTS, np.nanmean) | {"low": np.nanmin, "high": np.nanmax}
    groups = {part: np.split(values, range(size, len(values), size)) for part, values in curve.items()}
    return {part: np.array([reduce[part](group) if np.isfinite(group).any() else math.nan for group in of_part])
            for part, of_part in groups.items()}


def read_run(folder: Path, label: str) -> RecordedRun:
    """Raises FileNotFoundError or ValueError for what is no run folder, or one without a single report."""
    metrics, options = folder / "metrics.jsonl", folder / "train_config.json"
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no run folder {folder}")
    for path in (metrics, options):
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {path.name}: it is not the out_dir of a run of train.py, or that "
                                    "run has not reported anything yet")
    records = run_folder.read_records(metrics)
    if not records:
        raise ValueError(f"{metrics} holds no report yet")
    newest = run_folder.newest_checkpoint(folder)
    restart_points = [point for record in records if (point := run_folder.restart_point(record))]
    scores = run_folder.curves_of_scores(run_folder.current_scores(
        run_folder.read_records(folder / run_folder.EVALS, run_folder.parse_eval), restart_points, records[-1]["step"]))
    return RecordedRun(label, folder, records, files.read_json(options), count_parameters(newest) if newest else None,
                       scores)


def count_parameters(checkpoint: Path) -> int | None:
    """From the header of a checkpoint's weights; None when there is none."""
    try:
        has_bias = (files.read_json(checkpoint / "config.json").get("flatgpt") or {}).get("bias", True)
        with safe_open(checkpoint / "model.safetensors", framework="numpy") as weights:
            # GPT-2's format has no word for a model without biases: it holds zeros for them.
            names = [name for name in list(weights.keys()) if has_bias or not name.endswith(".bias")]
            return sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    except (OSError, ValueError, AttributeError, SafetensorError):  # a run that is under way may just be deleting it
        return None


# Pictures


def score_pictures(runs: list[RecordedRun]) -> list[Picture]:
    """One for each task and metric that a run has scores of, MAX_SCORES at most."""
    keys = dict.fromkeys(key for run in runs for key in run.scores)
    return [Picture(f"score_{re.sub('[^A-Za-z0-9_.-]+', '_', key)}", key.rpartition("/")[0], f"score/{key}",
                    unit=f"{key.rpartition('/')[2]} ± standard error") for key in [*keys][:MAX_SCORES]]


def picture_of(picture: Picture, runs: list[RecordedRun]) -> Figure | None:
    """One picture of all runs, or None when none of them has its numbers."""
    keys = (picture.key, "val/loss", "whole/val/loss") if picture.is_loss else (picture.key,)
    curves = [run.curve(key) for run in runs for key in keys if has_values(run.curve(key))]
    if not curves:
        return None
    figure = Figure(figsize=(5.4, 3.7), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(escape(picture.title), loc="left", fontweight="bold")
    x_scale = _set_x_axis(axes, picture.x, [run.place(run.records[-1], picture.x) for run in runs])
    _set_y_axis(axes, picture, np.concatenate([[curve["low"], curve["high"]] for curve in curves], axis=1))
    styles = [{"color": COLOURS[i % len(COLOURS)], "linestyle": (0, dashes(i))} for i in range(len(runs))]
    for run, style in zip(runs, styles):
        _draw_run(axes, picture, run, x_scale, style)
    if picture.is_loss:
        _explain_signs(axes, runs)
    if len(runs) > 1:
        _name_runs(figure, [run.label for run in runs], [Line2D([], [], **style) for style in styles])
    return figure


def dashes(index: int) -> tuple[float, ...]:
    """The dash pattern (on, off) of the run with this number; empty for a solid line."""
    return DASHES[index // len(COLOURS) % len(DASHES)]


def shorten(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[:most // 2 - 1]}…{text[-most // 2:]}"


def escape(text: str) -> str:
    """For matplotlib, which would read formulas between two $."""
    return text.replace("$", r"\$")


def short(value: float) -> str:
    """1200000 -> 1.2M."""
    power = next((p for p in (12, 9, 6, 3) if abs(value) >= 0.9995 * 10**p), 0)
    return f"{value / 10**power:.3g}" + {12: "T", 9: "B", 6: "M", 3: "k", 0: ""}[power]


def render(figure: Figure, kind: str) -> bytes:
    """svg or png; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "flatgpt"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a run's name in a script that the font has not
        figure.savefig(buffer, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _draw_run(axes: Axes, picture: Picture, run: RecordedRun, x_scale: float, style: dict[str, Any]) -> None:
    def place(curve: Curve) -> np.ndarray:
        on_axis = (curve[picture.x] > 0) | (axes.get_xscale() != "log")  # step 0 is not on a logarithmic one
        return np.where(on_axis, curve[picture.x] / x_scale, np.nan)

    colour, line = style["color"], run.curve(picture.key)
    has_few = len(line["step"]) <= 20  # a single point makes no line
    low, mean, high = (line[part] * picture.factor for part in ("low", "value", "high"))
    alpha = 0.45 if picture.is_loss else 1  # the validation loss is what counts
    axes.plot(place(line), mean, linewidth=1.2, marker="." if has_few else "", alpha=alpha, **style)
    if picture.is_score:
        axes.errorbar(place(line), mean, [mean - low, high - mean], fmt="none", ecolor=colour, elinewidth=1, capsize=2)
    elif not np.array_equal(low, high, equal_nan=True):
        axes.fill_between(place(line), low, high, color=colour, alpha=0.15, linewidth=0)
    if not picture.is_loss:
        return
    points, whole = run.curves["val/loss"], run.curves["whole/val/loss"]
    axes.plot(place(points), points["value"], linewidth=1.3, zorder=3, **style, **OF_VALIDATION)
    axes.plot(place(whole), whole["value"], color=colour, zorder=4, **OF_WHOLE_SPLIT)
    at_bottom = axes.get_xaxis_transform()
    for kind, style in OF_EVENTS.items():
        when = [run.place(record, picture.x) / x_scale for happened, record in run.events() if happened == kind]
        if kind in ("restart", "branch"):
            axes.vlines(when, 0, 1, colors=colour, linewidth=0.9, transform=at_bottom, **style)
        else:
            axes.plot(when, [0.025] * len(when), color=colour, transform=at_bottom, **style)


def _explain_signs(axes: Axes, runs: list[RecordedRun]) -> None:
    """Add a legend, in grey, for the signs that all runs share."""
    signs = {"training": {"alpha": 0.45}, "validation": OF_VALIDATION, "validation, whole split": OF_WHOLE_SPLIT,
             **OF_EVENTS}
    seen = {kind for run in runs for kind, _ in run.events()} | {
        name for run in runs for name, key in zip(signs, ("train/loss", "val/loss", "whole/val/loss"))
        if has_values(run.curves[key])}
    handles = {name: Line2D([], [], color="#555555", **style) for name, style in signs.items() if name in seen}
    axes.legend(handles.values(), handles.keys(), loc="best", fontsize=9, framealpha=0.85, edgecolor="none")


def _name_runs(figure: Figure, labels: list[str], strokes: list[Line2D]) -> None:
    """Add the runs' names below the axes, in as many columns as fit, and make the picture higher by that."""
    names = [escape(shorten(label)) for label in labels]
    columns = max(1, min(len(names), 72 // (max(map(len, names)) + 6)))
    figure.set_figheight(figure.get_figheight() + 0.21 * math.ceil(len(names) / columns))
    figure.legend(strokes, names, loc="outside lower left", ncols=columns, frameon=False, fontsize=9)


def _set_x_axis(axes: Axes, x: str, ends: list[float]) -> float:
    """The axis for runs that end there, logarithmic where a linear one would squeeze half of them into a corner;
    returns what its unit is of the numbers'."""
    known = [end for end in ends if end > 0]
    longest = max(known, default=0)
    if known and longest > WIDE * statistics.median_low(known):
        axes.set_xscale("log")
    if x == "tokens":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.set_xlabel("tokens")
        return 1.0
    scale, unit = next(((s, unit) for s, unit in ((86400, "days"), (3600, "hours"), (60, "minutes"))
                        if longest >= 2 * s), (1, "seconds"))
    if axes.get_xscale() == "log":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(unit)
    return scale


def _set_y_axis(axes: Axes, picture: Picture, reach: np.ndarray) -> None:
    """Logarithmic where the numbers, of which `reach` has the lowest and highest, go far (a loss: from 3 times on)."""
    low, high = np.nanmin(reach), np.nanmax(reach)
    axes.set_ylabel(escape(picture.unit))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if not picture.from_zero and low > 0 and high > (3 if picture.is_loss else WIDE) * low:
        axes.set_yscale("log")
        if high < 30 * low:  # about a decade: the powers of ten alone would leave the axis bare
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif picture.key == "tokens_per_sec":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    if picture.from_zero:
        axes.set_ylim(0, 1.08 * high * picture.factor or 1)
