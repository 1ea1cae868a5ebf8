"""curves.py: thinned curves are means of neighbours with their extremes, and what is kept of the rest is bounded."""

import math

import numpy as np
import pytest

from flatgpt.serving.curves import COLUMNS, MAX_EVALUATIONS, MAX_POINTS, MAX_SAMPLES, Curves


def report(step: int, loss: float | None, **others: object) -> dict:
    return {"step": step, "tokens": 8 * step, "elapsed_s": 0.5 * step, "train/loss": loss, "lr": 1e-3} | others


def test_a_short_run_is_shown_as_it_was_reported():
    curves = Curves()
    curves.add([report(step, 0.1 * step) for step in range(1, 4)])
    curves.add([report(4, None)])
    shown = curves.as_dict()
    assert shown["reports_a_point"] == 1
    assert shown["columns"]["train/loss"] == [0.1 * 1, 0.1 * 2, 0.1 * 3, None]
    assert shown["columns"]["tokens"] == [8, 16, 24, 32]
    assert shown["columns"]["mfu"] == [None] * 4
    assert shown["columns"].keys() == {*COLUMNS}


@pytest.mark.parametrize("size", [MAX_POINTS + 1, 3 * MAX_POINTS + 7, 9 * MAX_POINTS])
@pytest.mark.parametrize("batch", [1000, 7919])
def test_a_long_run_is_means_with_their_lowest_and_highest(size, batch):
    losses = np.random.default_rng(0).normal(size=size)
    losses[[5, 6, size // 2]] = math.nan
    losses[size // 3] = 1e6  # a spike
    curves = Curves()
    records = [report(step, None if math.isnan(loss) else loss) for step, loss in enumerate(losses, 1)]
    for start in range(0, size, batch):
        curves.add(records[start:start + batch])
    shown = curves.as_dict()
    a_point, columns = shown["reports_a_point"], shown["columns"]
    assert a_point == 2 ** math.ceil(math.log2(size / MAX_POINTS))
    groups = [losses[start:start + a_point] for start in range(0, size, a_point)]
    assert len(columns["step"]) == len(groups) <= MAX_POINTS
    for key, reduce in (("train/loss", np.nanmean), ("low/train/loss", np.nanmin), ("high/train/loss", np.nanmax)):
        wanted = [None if np.isnan(group).all() else reduce(group) for group in groups]
        assert columns[key] == pytest.approx(wanted)
    assert max(filter(None, columns["high/train/loss"])) == 1e6
    assert columns["step"][0] == (1 + a_point) / 2


def test_evaluations_samples_and_events_are_placed_and_bounded():
    curves = Curves()
    curves.add([report(1, 2.0)])
    curves.add([{"step": step, "val/loss": step / 7, "val/loss/a": 1.0} for step in range(5000)])
    curves.add([{"step": step, "samples": ["x" * 20_000, 5]} for step in range(500)])
    curves.add([{"step": 2, "fault": "spike"}, {"step": 1, "rollbacks": 1}, {"step": 1, "resumed": True},
                {"step": 3, "stopped": "SIGTERM"}])
    shown = curves.as_dict()
    for key, most, last in (("evaluations", MAX_EVALUATIONS, 4999), ("samples", MAX_SAMPLES, 499)):
        assert most // 2 <= len(shown[key]) <= most
        assert (shown[key][0]["step"], shown[key][-1]["step"]) == (0, last)
    assert shown["evaluations"][-1] == {"step": 4999, "tokens": 8 * 4999, "elapsed_s": None, "val/loss": 4999 / 7,
                                        "val/loss/a": 1.0}
    assert [len(text) for text in shown["samples"][-1]["samples"]] == [10_000, 1]
    assert [(event["kind"], event["why"]) for event in shown["events"]] == [
        ("skipped step", "spike"), ("rollback", ""), ("restart", ""), ("stop", "SIGTERM")]


def test_numbers_that_json_or_a_float_cannot_hold_are_gaps():
    curves = Curves()
    curves.add([report(1, math.inf), report(2, 10**400), report(3, 1.0, tokens=-(10**400))])
    assert curves.as_dict()["columns"]["train/loss"] == [None, None, 1.0]
    curves.add([{"step": 10**400, "val/loss": math.nan}])
    assert curves.as_dict()["evaluations"][-1]["step"] is None
