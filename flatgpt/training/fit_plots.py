"""The picture of a law that was fitted to runs: the runs, the law's curves, and the run that it is extrapolated to."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from flatgpt.planning.fit import Fit, Point
from flatgpt.training.plots import COLOURS, dashes, short

OF_RUNS = {"marker": "o", "markersize": 5, "linestyle": ""}
BEYOND = "#555555"  # the colour of the extrapolation
AXES = {"tokens": "tokens", "params": "parameters", "flops": "flops, 6 N D"}


def picture_of_fit(fit: Fit, to: tuple[float, float]) -> Figure:
    """Loss over tokens and over compute with a curve for each size; a law of one number is drawn over that. The run
    `to` = (parameters, tokens) has its interval, and the band on the way there."""
    kinds = ("tokens", "flops") if len(fit.varies) == 2 else fit.varies
    figure = Figure(figsize=(5.4 * len(kinds), 4.0), layout="constrained")
    for kind, axes in zip(kinds, np.ravel(figure.subplots(1, len(kinds), sharey=True))):
        handles = _draw(axes, kind, fit, to)
        axes.set_title(f"Loss over {kind.replace('flops', 'compute').replace('params', 'parameters')}", loc="left",
                       fontweight="bold")
        axes.set_xlabel(AXES[kind])
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        _set_ticks(axes.xaxis, *axes.get_xlim(), lambda value, is_flops=kind == "flops": (
            f"{value:.0e}" if is_flops else short(value)))
        _set_ticks(axes.yaxis, *axes.get_ylim(), "{:g}".format)
    figure.axes[0].set_ylabel("validation loss, nats a token")
    *sizes, asked = handles
    columns = 3 * len(kinds)
    figure.set_figheight(figure.get_figheight() + 0.21 * math.ceil(len(sizes) / columns))
    figure.legend([handles[size] for size in sizes], sizes, loc="outside lower left", ncols=columns, frameon=False,
                  fontsize=9)
    figure.axes[0].legend([handles[asked]], [asked], loc="upper right", fontsize=9, framealpha=0.85, edgecolor="none")
    return figure


def _set_ticks(axis: Axis, low: float, high: float, write: Callable[[float], str]) -> None:
    """Powers of ten, or where there are too few of them, round numbers in equal steps."""
    axis.set_major_locator(LogLocator(numticks=8) if high > 30 * low else MaxNLocator(6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    axis.set_minor_locator(NullLocator())


def _draw(axes: Axes, kind: str, fit: Fit, to: tuple[float, float]) -> dict[str, Line2D]:
    """The runs and the curves over `kind`; returns what the legend explains."""
    axes.set(xscale="log", yscale="log")
    groups: dict[str, list[Point]] = {}
    for point in sorted(fit.points, key=lambda point: point.num_params):
        label = "runs" if kind == "params" else f"{short(point.num_params)} parameters"
        groups.setdefault(label, []).append(point)
    handles = {}
    for index, (label, points) in enumerate(groups.items()):
        style = {"color": COLOURS[index % len(COLOURS)], "linestyle": (0, dashes(index))}
        numbers = np.array([[point.num_params, point.num_tokens] for point in points], float).T
        axes.plot(_place(kind, *numbers), [point.loss for point in points], color=style["color"], zorder=3, **OF_RUNS)
        path = np.geomspace(numbers.min(1), numbers.max(1), 100).T
        axes.plot(_place(kind, *path), fit.law.loss(*path), linewidth=1.3, **style)
        handles[label] = Line2D([], [], **style | OF_RUNS | {"linestyle": style["linestyle"]})
    lowest = min(fit.points, key=lambda point: getattr(point, f"num_{fit.varies[-1]}"))
    begin = (lowest.num_params, to[1]) if kind == "params" else (to[0], lowest.num_tokens)
    path = np.geomspace(begin, to, 100)
    value, low, high = np.array([fit.predict(*numbers) for numbers in path]).T
    axes.plot(_place(kind, *path.T), value, color=BEYOND, linewidth=1.2, linestyle=":")
    axes.fill_between(_place(kind, *path.T), low, high, color=BEYOND, alpha=0.15, linewidth=0)
    axes.errorbar(_place(kind, *to), value[-1], [[value[-1] - low[-1]], [high[-1] - value[-1]]], color=BEYOND,
                  marker="D", markersize=5, capsize=3)
    asked = f"{short(to[0])} parameters, {short(to[1])} tokens: {value[-1]:.3g} ({low[-1]:.3g} to {high[-1]:.3g})"
    return handles | {asked: Line2D([], [], color=BEYOND, marker="D", markersize=5, linestyle=":")}


def _place(kind: str, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return {"params": params, "tokens": tokens, "flops": 6 * params * tokens}[kind]
