"""plan.py --fit: the law of finished runs, as text, as JSON and as a picture."""

import json
from pathlib import Path

import pytest
from made_runs import PLANTED, make_ladder, make_run
from matplotlib.image import imread


@pytest.fixture
def ladder(cli) -> list[str]:
    """Nine runs whose losses follow PLANTED, in out/ of the working directory."""
    return make_ladder(Path("out"))


def test_fit_recovers_the_planted_law_within_its_intervals_and_draws_it(cli, ladder):
    result = cli("plan", "--fit", *ladder, "--json=True", "--params=2e5", "--tokens=4e6", "--picture=laws/law.png")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    for name, value in PLANTED._asdict().items():
        assert found["constants"][name]["low"] <= value <= found["constants"][name]["high"], name
    asked = found["extrapolation"]
    assert (asked["parameters"], asked["tokens"]) == (200_000, 4_000_000)
    assert asked["low"] <= PLANTED.loss(2e5, 4e6) <= asked["high"]
    assert [run["run"] for run in found["runs"]] == ladder
    assert found["picture"] == "laws/law.png"
    image = imread("laws/law.png")[..., :3]
    assert (image.max(-1) - image.min(-1) > 0.3).sum() > 1000  # curves, in colours


def test_fit_says_the_same_in_words_and_names_what_it_left_out(cli, ladder):
    make_run(Path("out/half"), step=6)
    result = cli("plan", "--fit", *ladder, "out/half")
    assert result.code == 0, result.err
    assert "L = E + A / N^alpha + B / D^beta" in result.out
    assert "left out: out/half: it is not finished: step 6 of 10" in result.out
    assert "10 times the most compute of a run" in result.out
    assert Path("fit.svg").read_text().startswith("<?xml")


def test_fit_extrapolates_to_the_run_that_the_options_describe(cli, ladder):
    shape = ("--n_layer=2", "--n_head=2", "--n_embd=64", "--vocab_size=65", "--block_size=32", "--batch_size=4",
             "--gradient_accumulation_steps=1", "--max_iters=100", "--gpus=cpu")
    plan = json.loads(cli("plan", *shape, "--json=True").out)
    result = cli("plan", *shape, "--json=True", "--fit", *ladder)
    assert result.code == 0, result.err
    asked = json.loads(result.out)["extrapolation"]
    assert (asked["parameters"], asked["tokens"]) == (plan["model"]["parameters"], 100 * 4 * 32)


def test_fit_refuses_in_one_line(cli, refused, ladder):
    assert "2 finished runs of 1 sizes and 2 lengths do not determine a law" in refused("plan", "--fit", *ladder[:2])
    assert "there is no run folder out/nowhere" in refused("plan", "--fit", *ladder, "out/nowhere")
    assert "name config files before it" in refused("plan", "--fit", *ladder, "config/mine.py")
    assert "hours says nothing beside --fit" in refused("plan", "--hours=2", "--fit", *ladder)
    assert "params is for a law of one's own: add --fit" in refused("plan", "--params=1e6")
    assert "a name in .svg or .png" in refused("plan", "--picture=law.html", "--fit", *ladder)
    assert "says nothing of 7,000" in refused("plan", "--params=7000", "--fit", *make_ladder(
        Path("more"), (2_000,), (1e4, 3e4, 1e5, 1e6)))
    assert not Path("fit.svg").exists()
