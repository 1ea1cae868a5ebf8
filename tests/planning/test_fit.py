"""fit.py: laws that are planted in made-up runs are found again, with intervals that hold as often as they say."""

from collections.abc import Iterable

import numpy as np
import pytest

from flatgpt.planning.fit import CONSTANTS, LEVEL, Fit, Point, choose, fit_law
from flatgpt.planning.fit_summary import fit_as_text, summarize_fit, target
from flatgpt.planning.laws import CHINCHILLA, Law

PLANTED = Law(E=1.2, A=30.0, B=100.0, alpha=0.3, beta=0.35)
SIZES, LENGTHS = (5e4, 2e5, 8e5), (2e5, 6.4e5, 2e6, 6.4e6)
GRID = [(size, length) for size in SIZES for length in LENGTHS]


def planted(numbers: Iterable[tuple[float, float]], noise: float, seed: int = 0, law: Law = PLANTED) -> list[Point]:
    """Runs of these parameters and tokens, whose losses scatter about the law by `noise` of themselves."""
    generator = np.random.default_rng(seed)
    return [Point(f"run{i}", int(n), int(d), float(law.loss(n, d) * np.exp(noise * generator.standard_normal())))
            for i, (n, d) in enumerate(numbers)]


def fitted(points: list[Point]) -> Fit:
    return fit_law(*choose(points, {}))


def holds(interval: tuple[float, float], value: float) -> bool:
    return interval[0] <= value <= interval[1]


@pytest.mark.parametrize("law", [PLANTED, CHINCHILLA])
def test_a_law_without_noise_is_found_to_the_digit(law):
    sizes, lengths = (SIZES, LENGTHS) if law is PLANTED else ((1e8, 1e9, 1e10), (5e9, 5e10, 5e11))
    fit = fitted([Point("", int(n), int(d), float(law.loss(n, d))) for n in sizes for d in lengths])
    assert fit.law == pytest.approx(law, rel=1e-2)
    num_params, num_tokens = 4 * sizes[-1], 4 * lengths[-1]
    assert fit.predict(num_params, num_tokens)[0] == pytest.approx(law.loss(num_params, num_tokens), rel=1e-4)


def test_the_intervals_hold_the_planted_law_about_as_often_as_they_say():
    hits, widths = [], []
    for seed in range(40):
        fit = fitted(planted(GRID, noise=0.004, seed=seed))
        asked = 4 * SIZES[-1], 4 * LENGTHS[-1]
        run, = planted([asked], noise=0.004, seed=1000 + seed)
        _, *interval = fit.predict(*asked)
        hits.append([*(holds(fit.interval(name), value) for name, value in PLANTED._asdict().items()),
                     holds(interval, run.loss)])
        widths.append((interval[1] - interval[0]) / run.loss)
    often = np.mean(hits, axis=0)
    # Of 40 draws at 90%, fewer than 30 would be one case in 200; a narrow loss says that it is not held by width alone.
    assert often.min() >= 0.75, dict(zip((*PLANTED._fields, "loss"), often))
    assert abs(often.mean() - LEVEL) < 0.08
    assert np.median(widths) < 0.06


def test_a_run_that_diverged_does_not_decide():
    points = planted(GRID + GRID, noise=0.003)
    without = fitted(points[:7] + points[8:])
    fit = fitted([*points[:7], points[7]._replace(loss=2 * points[7].loss), *points[8:]])
    for name, value in without.law._asdict().items():
        assert holds(fit.interval(name), value), name
    assert fit.residuals[7] == pytest.approx(np.log(2), abs=0.02)
    assert fit.noise < 2 * without.noise


def test_seeds_of_one_run_tell_the_noise():
    fit = fitted(planted(GRID * 3, noise=0.005))
    found = summarize_fit(fit, target(fit), {}, {})
    assert found["noise"] == pytest.approx(0.005, rel=0.35)
    assert found["noise_of_seeds"] == pytest.approx(0.005, rel=0.35)
    assert summarize_fit(fitted(planted(GRID, 0.005)), (1e6, 1e6), {}, {})["noise_of_seeds"] is None


def test_runs_of_another_form_than_the_law_are_told_by_their_seeds():
    bent = [point._replace(loss=point.loss * (
        1 + 0.02 * np.log(point.num_params / 2e5) * np.log(point.num_tokens / 1e6)))
            for point in planted(GRID * 2, noise=0.001)]
    for points, is_told in ((bent, True), (planted(GRID * 2, noise=0.001), False)):
        fit = fitted(points)
        assert ("not quite of its form" in " ".join(fit_as_text(summarize_fit(fit, target(fit), {}, {})))) == is_told


@pytest.mark.parametrize("varying", ["tokens", "params"])
def test_runs_that_differ_in_one_number_get_a_law_of_that_number(varying):
    numbers = [(2e5, length) for length in LENGTHS] if varying == "tokens" else [
        (size, 2e6) for size in (2e4, 8e4, 3e5, 1e6)]
    left_out: dict[str, str] = {}
    stray = Point("stray", 900, 3_000, 3.0)
    points, varies = choose([*planted(numbers, noise=0.002), stray], left_out)
    assert varies == (varying,)
    assert list(left_out) == ["stray"]
    fit = fit_law(points, varies)
    other, = CONSTANTS.keys() - {varying}
    # What the other number adds is a part of this law's E.
    rest = PLANTED.E + (PLANTED.A / 2e5**PLANTED.alpha if varying == "tokens" else PLANTED.B / 2e6**PLANTED.beta)
    coefficient, exponent = CONSTANTS[varying]
    assert holds(fit.interval("E"), rest)
    assert holds(fit.interval(coefficient), getattr(PLANTED, coefficient))
    assert holds(fit.interval(exponent), getattr(PLANTED, exponent))
    assert [getattr(fit.law, name) for name in CONSTANTS[other]] == [0, 0]
    farther = target(fit)
    assert holds(fit.predict(*farther)[1:], PLANTED.loss(*farther))
    with pytest.raises(ValueError, match="it says nothing of"):
        fit.predict(7e7, 7e7)


@pytest.mark.parametrize("numbers", [
    [], GRID[:1], GRID[:3], [(1e5, 1e6), (1e6, 1e6), (1e7, 1e6)], [(1e5, 1e6)] * 8,
    [(n, d) for n in (1e5, 1e6) for d in (1e6, 1e7)],
    [(1e5 * (1 + i / 1000), 1e6) for i in range(8)]])  # sizes that a few biases make
def test_too_few_runs_are_refused_in_words_that_say_what_is_missing(numbers):
    with pytest.raises(ValueError, match=rf"^{len(numbers)} finished runs of \d sizes and \d lengths do not determine"):
        choose(planted(numbers, 0.002), {"out/x": "it is not finished"})


def test_sizes_that_grow_with_the_tokens_leave_wide_intervals_but_tell_the_loss_of_the_next():
    numbers = [(n, 20 * n) for n in np.geomspace(1e5, 1e7, 8)]
    fit = fitted(planted(numbers, noise=0.002))
    low, high = fit.interval("A")
    assert high > 5 * low
    loss, low, high = fit.predict(4e7, 8e8)
    assert holds((low, high), PLANTED.loss(4e7, 8e8))
    assert high - low < 0.2 * loss
    for asked in ((1.6e8, 2e8), (1e7, 3.2e9)):  # off that line they have to admit more
        off = fit.predict(*asked)
        assert off[2] - off[1] > high - low
        assert holds(off[1:], PLANTED.loss(*asked))


def test_the_fewest_runs_admit_what_they_do_not_know():
    few = [GRID[i] for i in (0, 2, 5, 6, 8, 10)]
    few_wide, many_wide = (fit.predict(4e6, 2e7) for fit in (fitted(planted(few, 0.004)), fitted(planted(GRID, 0.004))))
    assert few_wide[2] - few_wide[1] > 3 * (many_wide[2] - many_wide[1])


def test_the_same_runs_in_another_order_give_the_same_law():
    points = planted(GRID, noise=0.004)
    assert fitted(points[::-1]).law == pytest.approx(fitted(points).law, rel=1e-3)


def test_the_text_has_the_law_the_runs_and_what_is_wrong_with_them():
    fit = fitted(planted(GRID, noise=0.004))
    found = summarize_fit(fit, target(fit, num_params=4e6), {"out/x": "it is no folder"}, {"pos": ["learned", "rope"]})
    text = "\n".join(fit_as_text(found))
    for run in found["runs"]:
        assert f"{run['loss']:.4f}" in text
        assert np.log(run["loss"] / run["law"]) == pytest.approx(run["residual"])
    assert "left out: out/x: it is no folder" in text
    assert "the runs differ in pos (learned, rope)" in text
    assert f"{found['constants']['alpha']['low']:.4g} to {found['constants']['alpha']['high']:.4g}" in text
    assert (found["extrapolation"]["parameters"], found["extrapolation"]["tokens"]) == (4_000_000, 6_400_000)
    assert found["extrapolation"]["times_the_compute"] == pytest.approx(5)
