"""The picture of a law that was fitted to runs: the runs, the law's curves, and the run that it is extrapolated to."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

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
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _, kind=kind: (
            f"{value:.0e}" if kind == "flops" else short(value))))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=np.arange(1, 10, 0.2 if _is_narrow(fit, to) else 1)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    np.ravel(figure.axes)[0].set_ylabel("validation loss, nats a token")
    figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=5 * len(kinds) // 2, frameon=False,
                  fontsize=9)
    return figure


def _is_narrow(fit: Fit, to: tuple[float, float]) -> bool:
    """Whether the losses reach so little that whole numbers would leave the axis bare."""
    reach = [*(point.loss for point in fit.points), *fit.predict(*to)]
    return max(reach) < 4 * min(reach)


def _draw(axes: Axes, kind: str, fit: Fit, to: tuple[float, float]) -> dict[str, Line2D]:
    """The runs and the curves over `kind`; returns what the legend explains."""
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
