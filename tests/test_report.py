"""report.py and plots.py: the page has the numbers of metrics.jsonl, and shows in a browser."""

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY_RUN, records_of, run_process, write_run
from faults import start_ranks
from matplotlib.collections import LineCollection
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.image import imread

from flatgpt.training.plots import (
    COLOURS,
    MAX_POINTS,
    PICTURES,
    RecordedRun,
    count_parameters,
    picture_of,
    read_run,
    short,
)
from model import GPT, LanguageModel
from report import duration, labels

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def trained(step: int, loss: float | None = 2.0, **others: object) -> dict:
    return {"step": step, "tokens": 100 * step, "train/loss": loss, "lr": 1e-3, "grad_norm": 1.0, "mfu": None,
            "tokens_per_sec": 50.0, "memory_gb": 0.5, "elapsed_s": 2.0 * step, "skipped": 0} | others


def evaluated(step: int, loss: float | None, **others: object) -> dict:
    return {"step": step, "tokens": 100 * step, "val/loss": loss, "elapsed_s": 2.0 * step} | others


def numbers_in(page: str | Path = "report.html") -> list[dict]:
    return json.loads(re.search(r'id="numbers">(.*?)</script>', Path(page).read_text())[1])


def table_rows(page: str, heading: str) -> list[list[str]]:
    """The cells' texts of the first table behind a heading, its head included."""
    table = re.search(r"<table.*?</table>", page.partition(f"<h2>{heading}</h2>")[2], re.S)[0]
    rows = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", table, re.S)]
    return [[html.unescape(re.sub(r"<span>.*?</span>|<.*?>", "", cell)).strip() for cell in row] for row in rows]


SIGNS = {"o": "validation", "D": "whole split", "x": "skipped step", "<": "rollback"}  # by the marker


def drawn_in(figure: Figure, colour: str = COLOURS[0]) -> dict[str, np.ndarray]:
    """The points (number, 2) of a run's lines in a picture, by what they stand for; a restart is where its line begins.
    The colour is the run's."""
    [axes] = figure.axes
    lines = {SIGNS.get(line.get_marker(), "training"): line.get_xydata() for line in axes.lines
             if line.get_color() == colour}
    restarts = [segment[0] for lines in axes.collections if isinstance(lines, LineCollection)
                and same_color(lines.get_color(), colour) for segment in lines.get_segments()]
    return lines | {"restart": np.array(restarts).reshape(-1, 2)}


def coloured_pixels(png: Path) -> int:
    """How many pixels of a picture are neither black, grey nor white: 0 for one with axes and nothing in them."""
    image = imread(png)[..., :3]
    return int((image.max(-1) - image.min(-1) > 0.3).sum())


def drawn(name: str, *runs: RecordedRun, of: int = 0) -> dict[str, list]:
    """What the picture of that name has of one of the runs; see `drawn_in`."""
    [picture] = [picture for picture in PICTURES if picture.name == name]
    return {what: points.tolist() for what, points in drawn_in(picture_of(picture, [*runs]), COLOURS[of]).items()}


def events_in(page: str | Path = "report.html") -> list[list[str]]:
    """The rows of the list of events, folded away in the summary."""
    return table_rows(Path(page).read_text().replace("<details>", "<h2>Events</h2>", 1), "Events")[1:]


@pytest.fixture
def two_runs(cli, tiny_data) -> list[str]:
    assert cli("train", *TINY_RUN, "--max_iters=3", "--out_dir=out/a").code == 0
    assert cli("train", *TINY_RUN, "--out_dir=out/a").code == 0
    assert cli("train", *TINY_RUN, "--out_dir=out/b", "--learning_rate=3e-3", "--bias=True").code == 0
    return ["out/a", "out/b"]


def test_the_page_has_the_numbers_of_the_runs(cli, two_runs):
    result = cli("report", "--runs", *two_runs, "--out=pages/both.html")
    assert result.code == 0, result.err
    for shown, run in zip(numbers_in("pages/both.html"), two_runs):
        records = records_of(run)
        steps = [r for r in records if "train/loss" in r]
        for key in ("train/loss", "lr", "grad_norm", "tokens_per_sec", "memory_gb"):
            curve = shown["curves"][key]
            assert curve["value"] == pytest.approx([r[key] for r in steps], rel=1e-6)
            assert curve["tokens"] == [r["tokens"] for r in steps]
            assert curve["elapsed_s"] == pytest.approx([r["elapsed_s"] for r in steps], rel=1e-6)
        final = records[-1]
        val = [r.get("val/sampled_loss", r["val/loss"]) for r in records if "val/loss" in r]
        whole = [r["val/loss"] for r in records if "val/sampled_loss" in r]
        assert shown["curves"]["val/loss"]["value"] == pytest.approx(val, rel=1e-6)
        assert shown["curves"]["whole/val/loss"]["value"] == pytest.approx(whole, rel=1e-6)
        assert "mfu" not in shown["curves"]  # a CPU has none
        summary = shown["summary"]
        assert (summary["steps"], summary["tokens"], summary["val_is_whole"]) == (6, 6 * 128, True)
        assert (summary["val_loss"], summary["best_val_loss"]) == (final["val/loss"], pytest.approx(min(val)))
        assert summary["parameters"] == GPT.from_pretrained(run).num_params(non_embedding=False)
    head, *rows = table_rows(Path("pages/both.html").read_text(), "Summary")
    assert [dict(zip(head, row))["last val loss"] for row in rows] == [
        f"{records_of(run)[-1]['val/loss']:.4f}whole split" for run in two_runs]
    assert [dict(zip(head, row))["restarts"] for row in rows] == ["1", "–"]
    assert "MFU" not in head
    assert sorted(path.stem for path in Path("pages/both_files").iterdir()) == sorted(
        picture.name for picture in PICTURES if picture.key != "mfu")


def test_the_pictures_draw_what_metrics_jsonl_has(two_runs):
    runs = [read_run(Path(run), run) for run in two_runs]
    for picture in PICTURES:
        if picture.key == "mfu":  # a CPU has none
            assert picture_of(picture, runs) is None
            continue
        for of, run in enumerate(two_runs):
            records = records_of(run)
            expected = {"training": [(r[picture.x], r[picture.key]) for r in records if "train/loss" in r],
                        "restart": []}
            if picture.is_loss:
                expected |= {
                    "validation": [(r[picture.x], r.get("val/sampled_loss", r["val/loss"])) for r in records
                                   if "val/loss" in r],
                    "whole split": [(r[picture.x], r["val/loss"]) for r in records if "val/sampled_loss" in r],
                    "skipped step": [], "rollback": [],
                    "restart": [({"tokens": 128 * r["step"]}.get(picture.x, r["elapsed_s"]), 0) for r in records
                                if "resumed" in r]}
                assert len(expected["validation"]) == 3
            assert len(expected["training"]) == 6
            shown = drawn(picture.name, *runs, of=of)
            assert shown.keys() == expected.keys()
            for what, points in expected.items():
                assert shown[what] == [list(point) for point in points], (picture.name, run, what)


def test_each_event_is_marked_where_it_happened():
    """At 100 tokens a step; eight minutes of seconds, drawn as minutes."""
    run = RecordedRun("run", Path("run"), [
        trained(1, elapsed_s=60.0), trained(2, elapsed_s=120.0), {"step": 2, "resumed": True, "elapsed_s": 150.0},
        trained(3, None, elapsed_s=300.0, fault="the loss is nan"), {"step": 2, "rollbacks": 1, "elapsed_s": 360.0},
        trained(3, elapsed_s=420.0), {"step": 3, "resumed": True, "elapsed_s": 420.0}, trained(4, elapsed_s=480.0)],
        {}, None)
    for name, skipped, rollback, restarts in (("loss_over_tokens", 300, 200, (200, 300)),
                                              ("loss_over_time", 5, 6, (2.5, 7))):
        shown = drawn(name, run)
        assert [x for x, _ in shown["skipped step"]] == [skipped]
        assert [x for x, _ in shown["rollback"]] == [rollback]
        assert [x for x, _ in shown["restart"]] == pytest.approx(restarts)
    figure = picture_of(PICTURES[0], [run])
    [axes] = figure.axes
    of_events = [line for line in axes.lines if line.get_marker() in ("x", "<")]
    assert [line.get_transform() for line in of_events] == [axes.get_xaxis_transform()] * 2  # y in parts of the height
    assert all(0 < y < 0.1 for line in of_events for y in line.get_ydata())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "training", "skipped step", "rollback", "restart"]


def test_the_png_files_have_their_size_and_are_not_blank(cli, two_runs):
    assert cli("report", "out/a").code == 0  # of one run: nothing but its curves is in colour
    for path in Path("report_files").iterdir():
        assert imread(path).shape[:2] == (740, 1080)
        assert coloured_pixels(path) > 300, path
    assert len([*Path("report_files").iterdir()]) == 6
    assert cli("report", *two_runs).code == 0
    assert imread("report_files/loss_over_tokens.png").shape[:2] == (782, 1080)  # the runs' names


def test_the_same_runs_give_the_same_bytes_in_place_of_the_old(cli, two_runs):
    Path("report.html").write_text("old")
    Path("report_files").mkdir()
    Path("report_files/mfu.png").write_text("of an earlier report")
    pages = []
    for runs in (["--runs", *two_runs], [*two_runs, "./out/a"]):
        assert cli("report", *runs).code == 0
        pages.append(Path("report.html").read_bytes())
    assert pages[0] == pages[1]
    keys = [picture.key for picture in PICTURES]
    shown = [key for key in numbers_in()[0]["curves"] if key in keys]
    assert shown == sorted(shown, key=keys.index)  # no set's order
    assert not Path("report_files/mfu.png").exists()
    assert not list(Path().glob(".report*"))


@pytest.mark.parametrize("options", [(), ("--pos=rope", "--norm=rmsnorm", "--mlp=swiglu"), ("--pos=alibi",)])
def test_parameters_are_the_models_in_every_format(cli, tiny_data, options):
    assert cli("train", *TINY_RUN, "--max_iters=1", *options).code == 0
    num_params = LanguageModel.from_pretrained("out/tiny").num_params(non_embedding=False)
    assert count_parameters(Path("out/tiny/checkpoints/latest")) == num_params


def test_a_mixtures_last_loss_is_told_for_each_data_set(cli, tiny_data):
    shutil.copytree("data/tiny", "data/other")
    assert cli("train", *TINY_RUN, "--dataset=tiny:0.7,other:0.3").code == 0
    assert cli("report", "out/tiny").code == 0
    last = records_of("out/tiny")[-1]
    assert numbers_in()[0]["summary"]["val_losses"] == {name: last[f"val/loss/{name}"] for name in ("tiny", "other")}
    head, row = table_rows(Path("report.html").read_text(), "Summary")
    assert dict(zip(head, row))["last val loss"] == (
        f"{last['val/loss']:.4f}whole splittiny {last['val/loss/tiny']:.4f}other {last['val/loss/other']:.4f}")
    assert numbers_in()[0]["summary"]["val_loss"] == last["val/loss"]


def test_options_that_differ_are_told_and_all_are_there(cli, tmp_path):
    same = {"n_layer": 2, "compile": "auto"}
    write_run(tmp_path / "a", [trained(1)], same | {"lr": 1e-3, "out_dir": "a", "dataset": "x"})
    write_run(tmp_path / "b", [trained(1)], same | {"lr": 1e-4, "out_dir": "b", "dataset": "y", "new_key": False})
    assert cli("report", "a", "b").code == 0
    page = Path("report.html").read_text()
    assert table_rows(page, "Options") == [["option", "a", "b"], ["lr", "0.001", "0.0001"], ["dataset", "x", "y"],
                                           ["new_key", "–", "False"]]
    assert "differ in dataset: compare losses only where they agree" in page
    everything = page.partition("<h2>Options</h2>")[2].partition("<details>")[2]
    assert all(f">{key}<" in everything for key in (*same, "lr", "out_dir", "dataset", "new_key"))
    assert cli("report", "a").code == 0
    assert "<h2>Options</h2><details>" in Path("report.html").read_text()


def test_names_options_and_samples_are_escaped(cli, tmp_path):
    name = "<img src=x onerror=alert(1)> & $x$ \"q'"
    write_run(tmp_path / name, [trained(1), {"step": 1, "samples": ["old"]}, {"step": 2, "samples": [
        "</pre><script>alert(2)</script>", "second"]}], {"dataset": "<b>"})
    assert cli("report", name, "--out=page.html").code == 0
    page = Path("page.html").read_text()
    assert "<img src=x" not in page
    assert "<script>" not in page
    assert "<b>" not in page
    assert [html.unescape(text) for text in re.findall(r"<pre>(.*?)</pre>", page, re.S)] == [
        "</pre><script>alert(2)</script>", "second"]
    assert numbers_in("page.html")[0]["run"] == name


def test_a_run_under_way_with_bad_steps_a_rollback_and_restarts(cli, tmp_path):
    write_run(tmp_path / "run", [
        evaluated(0, 4.0), trained(1), trained(2), {"step": 2, "resumed": True, "elapsed_s": 4.0},
        trained(3, None, fault="the loss is nan", skipped=1), evaluated(3, None),
        {"step": 2, "rollbacks": 1, "skipped": 1, "next_seq": 9, "elapsed_s": 7.0}, trained(4, 1.5, skipped=1),
        evaluated(4, 1.75)], {"max_iters": 9}, torn='{"step": 5, "tok')
    assert cli("report", "run").code == 0
    [shown] = numbers_in()
    assert shown["curves"]["train/loss"]["value"] == [2, 2, None, 1.5]
    assert shown["curves"]["val/loss"]["value"] == [4, None, 1.75]
    assert {key: shown["summary"][key] for key in ("steps", "max_iters", "val_loss", "val_is_whole", "best_val_loss",
                                                   "best_step", "skipped", "rollbacks", "restarts", "elapsed_s")} == {
        "steps": 4, "max_iters": 9, "val_loss": 1.75, "val_is_whole": False, "best_val_loss": 1.75, "best_step": 4,
        "skipped": 1, "rollbacks": 1, "restarts": 1, "elapsed_s": 8.0}
    assert events_in() == [["run", "2", "200", "restart"], ["run", "3", "300", "skipped step: the loss is nan"],
                           ["run", "2", "200", "rollback"]]


def test_the_skipped_steps_that_led_to_a_rollback_are_listed_and_marked(cli, tiny_data, tmp_path):
    options = (*TINY_RUN, "--max_iters=12", "--save_interval=3", "--max_bad_steps=2")
    code, log = start_ranks(1, tmp_path, *options, NAN_STEPS="8-9")
    assert code == 0, log
    assert cli("report", "out/tiny").code == 0
    skipped, back = ([["tiny", f"{step}", short(128 * step), what] for step in steps] for steps, what in (
        ((8, 9), "skipped step: the loss is nan"), ((6,), "rollback")))
    assert events_in() == skipped + back
    [shown] = numbers_in()
    assert shown["curves"]["train/loss"]["step"] == list(range(1, 13))
    assert (shown["summary"]["skipped"], shown["summary"]["rollbacks"]) == (2, 1)
    run, records = read_run(Path("out/tiny"), "tiny"), records_of("out/tiny")
    for name, x in (("loss_over_tokens", "tokens"), ("loss_over_time", "elapsed_s")):
        marks = drawn(name, run)
        assert [x for x, _ in marks["skipped step"]] == [r[x] for r in records if "fault" in r]
        assert len(marks["skipped step"]) == 2
        assert len(marks["rollback"]) == 1
    for step in (9, 12):
        shutil.rmtree(f"out/tiny/checkpoints/step_{step:08d}")
    assert cli("train", *options).code == 0  # goes on from before the steps that were skipped, but after the rollback
    assert cli("report", "out/tiny").code == 0
    assert events_in() == skipped + back + [["tiny", "6", "768", "restart"]]
    assert numbers_in()[0]["curves"]["train/loss"]["step"] == list(range(1, 13))


FEW = [
    [evaluated(0, 4.0)], [trained(1)], [trained(1, None, grad_norm=None)], [{"step": 7, "note": "of another kind"}],
    [trained(1, loss=1e30), trained(2, loss=3.0)], [trained(1, loss=-1.0, lr=0.0, memory_gb=None, elapsed_s=None)]]


def test_runs_with_hardly_anything_in_them_are_drawn_beside_others(cli, tmp_path, recwarn):
    for number, records in enumerate([*FEW, [trained(step) for step in range(1, 200)]]):
        write_run(tmp_path / str(number), records)
    result = cli("report", *map(str, range(len(FEW) + 1)))
    assert result.code == 0, result.err
    assert not [str(warning.message) for warning in recwarn.list]


@pytest.mark.parametrize("records", FEW)
def test_runs_with_hardly_anything_in_them_are_drawn(cli, tmp_path, records, recwarn):
    write_run(tmp_path / "few", records)
    result = cli("report", "few")
    assert result.code == 0, result.err
    assert not [str(warning.message) for warning in recwarn.list]


def test_long_runs_are_drawn_through_means_within_a_band():
    losses = np.random.default_rng(0).normal(3, 0.1, 10 * MAX_POINTS)
    losses[20] = math.nan
    run = RecordedRun("long", Path("long"), [trained(i + 1, loss) for i, loss in enumerate(losses)], {}, None)
    curve = run.curves["train/loss"]
    assert len(curve["value"]) == MAX_POINTS
    groups = losses.reshape(MAX_POINTS, 10)
    for part, reduce in (("value", np.nanmean), ("low", np.nanmin), ("high", np.nanmax)):
        np.testing.assert_allclose(curve[part], reduce(groups, axis=1))
    np.testing.assert_allclose(curve["step"][:2], [5.5, 15.5])
    [axes] = picture_of(PICTURES[0], [run]).axes
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), np.stack([curve["tokens"], curve["value"]], 1))
    [band] = axes.collections[:1]
    corners = {tuple(point) for path in band.get_paths() for point in path.vertices}
    assert corners >= {*zip(curve["tokens"], curve["low"]), *zip(curve["tokens"], curve["high"])}


def test_axes_are_logarithmic_where_runs_reach_far():
    def axes_of(*ends: int, losses: tuple[float, float] = (3.0, 2.0)):
        runs = [RecordedRun(str(i), Path(str(i)), [trained(1, losses[0]), trained(end, losses[1])], {}, None)
                for i, end in enumerate(ends)]
        return picture_of(PICTURES[0], runs).axes[0]

    assert axes_of(1000, 800).get_xscale() == "linear"
    assert axes_of(1000, 900, 3).get_xscale() == "linear"  # one that has just begun
    assert axes_of(1000, 3).get_xscale() == "log"
    assert axes_of(1000).get_yscale() == "linear"
    assert axes_of(1000, losses=(11.0, 3.0)).get_yscale() == "log"


def test_labels_differ_and_are_no_longer_than_that_takes():
    assert labels([Path("/x/a/run")]) == ["run"]
    assert labels([Path("/x/a/run"), Path("/x/b/run"), Path("/x/b/other")]) == ["a/run", "b/run", "b/other"]
    assert labels([Path("/x/a/run/1"), Path("/y/a/run/1")]) == ["x/a/run/1", "y/a/run/1"]
    assert labels([Path("run"), Path("a/run")]) == ["run", "a/run"]


def test_numbers_are_written_as_people_do():
    assert [short(n) for n in (0, 950, 1000, 12_345, 999_999, 1_200_000, 3.5e9, 2e12)] == [
        "0", "950", "1k", "12.3k", "1M", "1.2M", "3.5B", "2T"]
    assert [duration(s).replace("\u00a0", " ") for s in (0.25, 75, 7500, 90_000)] == [
        "0.2 s", "1 min 15 s", "2 h 05 min", "1 d 01 h"]


def test_what_is_no_run_is_refused_in_one_line(refused, tmp_path):
    write_run(tmp_path / "empty", [], torn='{"step": 1, "to')
    write_run(tmp_path / "good", [trained(1)])
    write_run(tmp_path / "broken", [trained(1)])
    (tmp_path / "broken" / "train_config.json").write_text("[1]")
    (tmp_path / "bare").mkdir()
    assert "no run is named; write: python report.py --runs out/a out/b" in refused("report")
    assert "there is no run folder gone" in refused("report", "good", "gone")
    assert "bare has no metrics.jsonl" in refused("report", "bare")
    assert "empty/metrics.jsonl holds no report yet" in refused("report", "--runs=empty")
    assert "train_config.json should hold a JSON object" in refused("report", "broken")
    assert "has to end in .html" in refused("report", "good", "--out=train.py")
    (tmp_path / "bare" / "train_config.json").write_text("{}")
    (tmp_path / "good" / "train_config.json").unlink()
    assert "good has no train_config.json" in refused("report", "good")
    assert not (tmp_path / "report.html").exists()


def test_what_is_no_run_among_several_is_left_out_with_a_line(cli, refused, tmp_path):
    for name in ("good", "other"):
        write_run(tmp_path / "out" / name, [trained(1)])
    write_run(tmp_path / "out" / "begun", [])
    (tmp_path / "out" / "model").mkdir()
    (tmp_path / "out" / "page.html").write_text("of an earlier report")
    result = cli("report", "--runs", *sorted(Path("out").iterdir()))
    assert result.code == 0, result.err
    assert [run["run"] for run in numbers_in()] == ["good", "other"]
    first, second, third, wrote = result.out.splitlines()
    assert first == "left out: out/begun/metrics.jsonl holds no report yet"
    assert second.startswith("left out: out/model has no metrics.jsonl: it is not the out_dir of a run")
    assert third == "left out: there is no run folder out/page.html"
    assert wrote.startswith("wrote report.html")
    error = refused("report", "out/model", "out/begun")
    assert "out/model has no metrics.jsonl" in error
    assert "out/begun/metrics.jsonl holds no report yet" in error


def test_a_report_imports_no_torch(tmp_path):
    write_run(tmp_path / "run", [trained(1)])
    out = run_process("-X", "importtime", ROOT / "report.py", "run", cwd=tmp_path)
    assert "matplotlib" in out
    assert not re.search(r"\| +torch\b", out)


BROWSER_CHECK = """<script>addEventListener("load", () => {
  const page = document.documentElement;
  for (const fold of document.querySelectorAll("details")) fold.open = true;
  const pictures = [...document.images].map(image => {
    const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    pen.drawImage(image, 0, 0);
    // Above the names of the runs nothing but their curves is in colour.
    const seen = pen.getImageData(0, 0, canvas.width, 0.75 * canvas.height).data;
    let coloured = 0;
    for (let at = 0; at < seen.length; at += 4) {
      const [red, green, blue] = seen.slice(at, at + 3);
      coloured += Math.max(red, green, blue) - Math.min(red, green, blue) > 75;
    }
    return {aspect: image.naturalWidth / image.naturalHeight, shown: image.width / image.height, coloured};
  });
  parent.postMessage({scroll: page.scrollWidth, width: innerWidth, pictures}, "*");
});</script></body>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium or google-chrome")
def test_the_page_shows_in_a_browser_wide_and_narrow(cli, two_runs, tmp_path):
    assert cli("report", *two_runs).code == 0
    page = Path("report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing comes from elsewhere
    # Frames, because a window has a least width that is more than a phone's.
    frames = "".join(f'<iframe style="width: {width}px" srcdoc="{html.escape(page.replace("</body>", BROWSER_CHECK))}">'
                     "</iframe>" for width in (1200, 390))
    Path("frames.html").write_text(f"""<!DOCTYPE html><title></title><pre></pre>
        <script>addEventListener("message", e => {{
            document.querySelector("pre").append(JSON.stringify(e.data) + "\\n"); }});</script>{frames}""")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom",
         (tmp_path / "frames.html").as_uri()],
        text=True, capture_output=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    said = html.unescape(re.search(r"<pre>(.*?)</pre>", done.stdout, re.S)[1])
    seen = [json.loads(line) for line in said.splitlines()]
    assert sorted(page["width"] for page in seen) == [390, 1200]
    for each in seen:
        assert each["scroll"] <= each["width"]
        assert len(each["pictures"]) == 6
        for picture in each["pictures"]:
            assert picture["aspect"] == pytest.approx(1080 / 782, rel=0.02)
            assert picture["shown"] == pytest.approx(picture["aspect"], rel=0.02)
            assert picture["coloured"] > 100


def test_scores_are_drawn_and_listed_with_their_standard_errors(cli, tmp_path):
    """Of two tasks, without what a rollback went back from; only one run has any."""
    def score(step: int, next_seq: int, acc: float, perplexity: float) -> dict:
        return {"step": step, "tokens": 100 * step, "next_seq": next_seq, "seqs_per_step": 8, "checkpoint": "x",
                "task": "both", "lower_is_better": ["perplexity"], "scores": {
                    "a": {"acc": acc, "acc_stderr": 0.1, "questions": 9}, "$b<": {"perplexity": perplexity}}}

    run = write_run(tmp_path / "one", [trained(1), trained(30), {"step": 20, "rollbacks": 1, "next_seq": 240},
                                       trained(30), evaluated(30, 2.0)])
    write_run(tmp_path / "two", [trained(1), trained(30)])
    lines = [score(10, 80, 0.5, 9.0), score(20, 160, 0.25, 7.0), score(25, 200, 0.9, 1.0), score(30, 320, 0.375, 8.0)]
    (run / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    assert cli("report", "one", "two").code == 0
    curves = numbers_in()[0]["curves"]
    assert curves["score/a/acc"] | {"elapsed_s": None} == {
        "step": [10, 20, 30], "tokens": [1000, 2000, 3000], "elapsed_s": None, "value": [0.5, 0.25, 0.375],
        "low": [0.4, 0.15, 0.275], "high": [0.6, 0.35, 0.475]}
    assert curves["score/$b</perplexity"]["value"] == [9, 7, 8]
    rows = table_rows(Path("report.html").read_text(), "Scores")
    assert rows == [["task", "one", "two"],
                    ["aacc", "0.3750 ± 0.1000step 30best 0.5000 ± 0.1000, step 10", "–"],
                    ["$b<perplexity", "8.0000step 30best 7.0000, step 20", "–"]]
    assert len(list(Path("report_files").glob("score_*.png"))) == 2
    (run / "evals.jsonl").unlink()
    assert cli("report", "one", "two").code == 0
    assert not list(Path("report_files").glob("score_*.png"))
