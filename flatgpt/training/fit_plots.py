"""The picture of a law that was fitted to runs: the runs, the law's curves, and the run that it is extrapolated to."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from flatgpt.planning.fit import Fit
from flatgpt.training.plots import COLOURS, dashes, short

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
    if kind == "params":  # a law of one length: one curve
        lines = {f"{short(to[1])} tokens": fit.points}
    else:
        sizes = sorted({point.num_params for point in fit.points})
        lines = {f"{short(size)} parameters": [point for point in fit.points if point.num_params == size]
                 for size in sizes}
    handles = {}
    for index, (label, points) in enumerate(lines.items()):
        style = {"color": COLOURS[index % len(COLOURS)], "linestyle": (0, dashes(index))}
        params, tokens = np.array([[point.num_params, point.num_tokens] for point in points], float).T
        axes.plot(_place(kind, params, tokens), [point.loss for point in points], color=style["color"], marker="o",
                  markersize=5, linestyle="", zorder=3)
        path = _path(kind, points, points[0].num_params, min(tokens), fit)
        axes.plot(_place(kind, *path), fit.law.loss(*path), linewidth=1.3, **style)
        handles[label] = Line2D([], [], marker="o", markersize=5, **style)
    path = _path(kind, fit.points, to[0], min(point.num_tokens for point in fit.points), fit, to)
    value, low, high = np.array([fit.predict(*numbers) for numbers in path.T]).T
    axes.plot(_place(kind, *path), value, color=BEYOND, linewidth=1.2, linestyle=":")
    axes.fill_between(_place(kind, *path), low, high, color=BEYOND, alpha=0.15, linewidth=0)
    value, low, high = fit.predict(*to)
    axes.errorbar(_place(kind, *to), value, [[value - low], [high - value]], color=BEYOND, marker="D", markersize=5,
                  capsize=3)
    handles[f"{short(to[0])} parameters, {short(to[1])} tokens: {value:.2f} ({low:.2f} to {high:.2f})"] = Line2D(
        [], [], color=BEYOND, marker="D", markersize=5, linestyle=":")
    return handles
