"""terminal.py: the line of a run has the trend of its loss, and what there is room for."""

import io
import sys

import pytest

from flatgpt.training.terminal import QUICK, SLOW, Mean, arrange, arrow

TEXTS = {"loss": "loss 3.214 ↓", "val": "val 3.352", "speed": "12,345 tok/s"}


def keys_at(columns: int) -> list[str]:
    line = arrange(TEXTS, 4, columns)
    return [key for key, text in (("bar", "{bar}"), *TEXTS.items(), ("left", "{remaining} left")) if text in line]


def test_a_narrow_terminal_loses_the_bar_first_and_the_loss_last():
    assert keys_at(120) == ["bar", "loss", "val", "speed", "left"]
    assert keys_at(70) == ["loss", "val", "speed", "left"]
    assert keys_at(56) == ["loss", "val", "left"]
    assert keys_at(44) == ["loss", "left"]
    assert keys_at(30) == ["loss"]
    assert keys_at(10) == []
    assert arrange(TEXTS, 4, 120) == (
        "{n_fmt}/{total_fmt} |{bar}| loss 3.214 ↓ · val 3.352 · 12,345 tok/s · {remaining} left")


def test_a_mean_forgets():
    mean = Mean(0.5)
    assert [mean.add(value) for value in (2.0, 4.0)] == [2.0, pytest.approx((2 + 2 * 4) / 3)]
    quick, slow = Mean(QUICK), Mean(SLOW)
    gaps = [quick.add(value) - slow.add(value) for value in (5.0, 4.0, 3.0, 4.0, 5.0, 6.0)]
    assert gaps[0] == 0
    assert gaps[2] < 0 < gaps[5]


@pytest.mark.parametrize(("encoding", "signs"), [("utf-8", "↓→↑"), ("ascii", "-=+")])
def test_a_trend_is_a_sign_that_the_terminal_has(monkeypatch, encoding, signs):
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding))
    assert "".join(map(arrow, (-0.1, 0.0, 0.1))) == signs
