"""fit_plots.py: the picture shows the runs, the law and the interval of what it is extrapolated to."""

import numpy as np
import pytest
from made_runs import make_ladder

from flatgpt.planning.fit import choose, fit_law
from flatgpt.training.finished_runs import gather
from flatgpt.training.fit_plots import picture_of_fit
from flatgpt.training.plots import render

SIZES = (2_000, 10_000, 50_000, 200_000)


@pytest.mark.parametrize(("sizes", "lengths", "over"), [
    (SIZES, (1e4, 1e5, 1e6), ["tokens", "flops, 6 N D"]), (SIZES, (1e5,), ["parameters"]),
    (SIZES[:1], (1e4, 3e4, 1e5, 1e6), ["tokens"])])
def test_the_picture_has_the_runs_the_law_and_the_interval(tmp_path, sizes, lengths, over):
    runs, _ = gather(make_ladder(tmp_path, sizes, lengths))
    fit = fit_law(*choose([run.point for run in runs], {}))
    to = (1e6 if len(sizes) > 1 else sizes[0]), (1e7 if len(lengths) > 1 else lengths[0])
    figure = picture_of_fit(fit, to)
    assert [axes.get_xlabel() for axes in figure.axes] == over
    value, low, high = fit.predict(*to)
    for axes in figure.axes:
        places = {"tokens": lambda n, d: d, "parameters": lambda n, d: n, "flops, 6 N D": lambda n, d: 6 * n * d}
        place = places[axes.get_xlabel()]
        runs = [xy for line in axes.lines if line.get_marker() == "o" for xy in line.get_xydata().tolist()]
        assert sorted(runs) == sorted([place(point.num_params, point.num_tokens), point.loss] for point in fit.points)
        *curves, beyond = [line.get_xydata() for line in axes.lines if len(line.get_xdata()) == 100]
        law = [[place(n, d), fit.law.loss(n, d)] for n in sizes for d in lengths]
        for x, y in law if len(over) == 2 or over == ["parameters"] else law[:1]:  # each lies on a curve
            assert min(np.abs(np.log(curve / [x, y])).sum(1).min() for curve in curves) < 0.05
        assert beyond[-1] == pytest.approx([place(*to), value])
        band = axes.collections[0].get_paths()[0].vertices
        at_end = band[np.isclose(band[:, 0], place(*to)), 1]
        assert (at_end.min(), at_end.max()) == (pytest.approx(low), pytest.approx(high))
    assert render(figure, "svg") == render(picture_of_fit(fit, to), "svg")
