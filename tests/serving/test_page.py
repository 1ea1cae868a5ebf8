"""The page in a real browser: runs while they train, compared, on a phone, in the dark, by keyboard."""

import contextlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY_RUN, records_of, write_run
from live import chromium, needs_chromium, serving, until

from flatgpt.serving.app import build_app
from flatgpt.serving.runs import RunTable

pytestmark = needs_chromium

SAMPLE = "<b>bold</b> & <script>alert(1)</script>"
OPTIONS = {"max_iters": 60, "learning_rate": 0.001, "n_layer": 2}


def records(steps: int, shift: float) -> list[dict]:
    found = [{"step": 0, "tokens": 0, "val/loss": 4.0 + shift, "elapsed_s": 0.1}]
    for step in range(1, steps + 1):
        found.append({"step": step, "tokens": 100 * step, "train/loss": 4 / step + shift, "lr": 1e-3 / step,
                      "grad_norm": 1.0, "tokens_per_sec": 50.0, "mfu": None, "memory_gb": 0.5, "elapsed_s": 2.0 * step,
                      "skipped": 0})
    return [*found, {"step": steps, "tokens": 100 * steps, "val/loss": 1.5 + shift, "elapsed_s": 2.0 * steps},
            {"step": steps, "samples": [SAMPLE], "elapsed_s": 2.0 * steps}]


@pytest.fixture
def two_runs(tmp_path):
    write_run(tmp_path / "out" / "a", records(60, 0.0), OPTIONS)
    write_run(tmp_path / "out" / "b", records(30, 0.5), OPTIONS | {"learning_rate": 0.01})
    return tmp_path / "out"


@contextlib.contextmanager
def training(folder: Path, *options: str):
    """A run of train.py in a process of its own, killed at the end if it is still there."""
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *TINY_RUN, *options], cwd=folder,
                               stdout=subprocess.DEVNULL)
    yield process
    process.kill()
    process.wait()


def state_of(page, name: str) -> str | None:
    rows = page.locator(".run-list li[data-run]").evaluate_all(
        "rows => rows.map(row => [row.querySelector('.run-name').textContent, row.dataset.state])")
    return dict(rows).get(name)


def points(page, key: str = "train/loss") -> dict[str, list[list[float]]]:
    """Name of a line in a chart -> its points, as plotly.js has them, once it is drawn."""
    page.wait_for_selector(f'[data-key="{key}"] .plot .scatterlayer', state="attached")
    return page.evaluate("""key => {
        const traces = document.querySelector(`[data-key="${key}"] .plot`).data;
        return Object.fromEntries(traces.map(trace => [trace.name, trace.x.map((x, i) => [x, trace.y[i]])]));
    }""", key)


def wait_for_chart(page) -> None:
    page.wait_for_selector(".main-chart .plot .scatterlayer path")


def test_a_run_grows_while_it_is_watched_and_its_end_is_seen(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr("flatgpt.serving.runs.RESCAN_S", 0.5)
    with serving(build_app(RunTable([str(tmp_path / "out")]))) as address, chromium(address) as open_page:
        page = open_page()
        page.get_by_text("There is no run under").wait_for()
        with training(tmp_path, "--max_iters=1000000", "--eval_interval=1000000", "--log_interval=20",
                       "--out_dir=out/long") as process:
            until(lambda: state_of(page, "long") == "running", "the new run is in the list")
            page.get_by_label("long").check()
            wait_for_chart(page)
            first = len(points(page)["long"])
            until(lambda: len(points(page)["long"]) > first, "the curve grows")
            process.kill()
            process.wait()
        until(lambda: state_of(page, "long") == "died", "the kill is seen")
        known = [[r["tokens"], r["train/loss"]] for r in records_of(tmp_path / "out/long") if "train/loss" in r]
        shown = points(page)["long"]
        assert shown == known[:len(shown)]
        assert len(shown) > first
        with training(tmp_path, "--max_iters=60", "--out_dir=out/short") as process:
            until((tmp_path / "out/short/train_config.json").exists, "the second run begins")
            process.send_signal(signal.SIGSTOP)  # it would be over before anybody looks
            until(lambda: state_of(page, "short") == "running", "the second run is in the list")
            page.get_by_label("short").check()
            process.send_signal(signal.SIGCONT)
            process.wait()
        until(lambda: state_of(page, "short") == "finished", "the end is seen")
        final = records_of(tmp_path / "out/short")
        until(lambda: len(points(page).get("short", ())) == 60, "the last report is shown")
        assert points(page)["short"] == [[r["tokens"], r["train/loss"]] for r in final if "train/loss" in r]
        assert points(page)["short, whole validation split"] == [[final[-1]["tokens"], final[-1]["val/loss"]]]


def test_two_runs_over_each_other_with_the_numbers_of_metrics_jsonl(two_runs):
    with serving(build_app(RunTable([str(two_runs)]))) as address, chromium(address) as open_page:
        page = open_page("#runs?runs=")
        for name in ("a", "b"):
            page.get_by_label(name, exact=True).check()
        until(lambda: {"a", "b"} <= points(page).keys(), "both are drawn")
        for name in ("a", "b"):
            trained = [r for r in records_of(two_runs / name) if "train/loss" in r]
            for key in ("train/loss", "lr", "grad_norm", "tokens_per_sec", "memory_gb"):
                assert points(page, key)[name] == [[r["tokens"], r[key]] for r in trained]
        assert points(page)["b, validation"] == [[0, 4.5], [3000, 2.0]]
        assert page.locator('[data-key="mfu"]').is_hidden()  # a CPU has none
        assert page.locator(".options tbody tr").all_inner_texts() == ["learning_rate\t0.001\t0.01"]
        page.get_by_label("only what differs").uncheck()
        assert page.locator(".options tbody tr.differs th").all_inner_texts() == ["learning_rate"]
        assert page.locator(".options tbody tr").count() == 3
        assert page.locator(".sample").all_inner_texts() == [SAMPLE] * 2  # text is never HTML

        page.get_by_label("time", exact=True).check(force=True)
        page.get_by_label("smoothing").fill("0.5")
        until(lambda: points(page)["b"][0][0] == 2.0, "the axis is time")
        again = open_page(page.url.removeprefix(f"{address}/"))
        wait_for_chart(again)
        assert points(again) == points(page)  # a link holds what is shown


def test_the_page_fits_a_phone_and_follows_the_theme(two_runs):
    with serving(build_app(RunTable([str(two_runs)]))) as address, chromium(address) as open_page:
        page, backgrounds = open_page(), set()
        wait_for_chart(page)
        for width, scheme in ((1400, "light"), (390, "light"), (390, "dark"), (1400, "dark")):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            until(lambda width=width: page.locator(".main-chart .main-svg").first.bounding_box()["width"] < width
                  and page.evaluate("document.documentElement.scrollWidth") <= width, "the drawn page fits")
            backgrounds.add((scheme, page.evaluate("getComputedStyle(document.body).backgroundColor")))
        assert len(backgrounds) == 2


def test_the_keyboard_alone_chooses_runs_and_axes(two_runs):
    with serving(build_app(RunTable([str(two_runs)]))) as address, chromium(address) as open_page:
        page = open_page("#runs?runs=")
        until(lambda: page.locator(".run-list input").count() == 2, "the list is there")
        seen: list[str] = []
        while len(seen) < 40 and "x" not in seen[-1:]:
            page.keyboard.press("Tab")
            seen.append(page.evaluate("document.activeElement.name || document.activeElement.type || ''"))
            if seen[-1] == "checkbox" and page.evaluate("!!document.activeElement.closest('.run-list')"):
                page.keyboard.press("Space")
        page.keyboard.press("ArrowRight")
        until(lambda: {"a", "b"} <= points(page).keys(), "both are drawn")
        assert points(page)["b"][0][0] == 1  # over steps


def test_a_run_whose_folder_is_deleted_leaves_the_page(two_runs):
    with serving(build_app(RunTable([str(two_runs)]))) as address, chromium(address) as open_page:
        page = open_page("#runs?runs=")
        page.get_by_label("a", exact=True).check()
        page.get_by_label("b", exact=True).check()
        until(lambda: {"a", "b"} <= points(page).keys(), "both are drawn")
        for path in (*(two_runs / "b").iterdir(), two_runs / "b"):
            path.rmdir() if path.is_dir() else path.unlink()
        until(lambda: state_of(page, "b") is None and "b" not in points(page), "it is gone")
        assert "a" in points(page)


def test_scores_appear_with_their_errors_as_they_are_written_and_stale_ones_do_not(tmp_path):
    turned = [*records(30, 0.0), {"step": 20, "rollbacks": 1, "next_seq": 240, "elapsed_s": 70.0},
              {"step": 30, "tokens": 3000, "val/loss": 1.4, "elapsed_s": 90.0}]
    run = write_run(tmp_path / "out" / "a", turned, OPTIONS)

    def score(step: int, next_seq: int, acc: float, task: str = "<b>x</b>") -> str:
        return json.dumps({"step": step, "tokens": 100 * step, "next_seq": next_seq, "seqs_per_step": 8,
                           "checkpoint": "x", "task": task, "scores": {task: {"acc": acc, "acc_stderr": 0.1}}}) + "\n"

    key = "score/<b>x</b>/acc"
    (run / "evals.jsonl").write_text(score(10, 80, 0.25) + score(25, 200, 0.9) + '{"torn')
    with serving(build_app(RunTable([str(tmp_path / "out")]))) as address, chromium(address) as open_page:
        page = open_page()
        assert points(page, key) == {"a": [[1000, 0.25]]}
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        (run / "evals.jsonl").write_text(score(10, 80, 0.25) + score(25, 200, 0.9) + score(25, 280, 0.5))
        until(lambda: points(page, key) == {"a": [[1000, 0.25], [2500, 0.5]]}, "the new score is shown")
        page.wait_for_timeout(2500)
        assert len([url for url in asked if re.search("/api/runs/", url)]) == 1  # and no more is asked for
        errors = page.locator(f'[data-key="{key}"] .plot').evaluate("plot => plot.data[0].error_y.array")
        assert errors == [0.1, 0.1]
        assert "<b>x</b>" in page.locator(f'[data-key="{key}"] h3').inner_text()
