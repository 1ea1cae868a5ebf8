"""Curves and tables of one or several runs side by side: one HTML page, and its pictures as PNG files.

    python report.py out/shakespeare_char_cpu                     writes report.html and report_files/*.png
    python report.py --runs out/a out/b --out=compare.html

It reads what train.py leaves in a run folder: metrics.jsonl, train_config.json, and from the newest checkpoint the
number of parameters; and the scores in evals.jsonl, which eval.py --watch writes. A run that is under way can be looked
at. The page needs no network and no script, and the same runs give the same bytes; the numbers that its pictures show
are in it, as JSON in the element `numbers`.
"""

from __future__ import annotations

from flatgpt import signals

if __name__ == "__main__":  # before matplotlib is imported, which takes a second
    signals.begin()

import base64
import html
import itertools
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from matplotlib.figure import Figure

from flatgpt import files
from flatgpt.options import check_options, parse_options, run_script
from flatgpt.training.plots import (
    COLOURS,
    PICTURES,
    Picture,
    RecordedRun,
    dashes,
    has_values,
    picture_of,
    read_run,
    render,
    score_pictures,
    short,
)

LOSS_SCALES = ("dataset", "tokenizer", "data_vocab_size")  # options without which losses do not compare


@dataclass
class ReportConfig:
    runs: Annotated[tuple[str, ...], "path"] = ()  # run folders to compare; words without -- are run folders as well
    out: Annotated[str, "path"] = "report.html"  # page to write; its pictures go beside it, into NAME_files/

    def validate(self) -> list[str]:
        faults = [] if self.runs else ["no run is named; write: python report.py --runs out/a out/b"]
        if Path(self.out).suffix not in (".html", ".htm"):
            faults.append(f"--out={self.out}: the name of the page has to end in .html")
        return faults


def main(argv: list[str]) -> None:
    """Write the page, and its pictures beside it."""
    config, _ = parse_options(ReportConfig, argv, usage=__doc__, bare_word="runs")
    check_options(config)
    out = Path(config.out)
    folders = list({Path(folder).resolve(): Path(folder) for folder in config.runs}.values())
    runs = read_runs(folders)
    pictures = [*PICTURES, *score_pictures(runs)]
    figures = {picture: figure for picture in pictures if (figure := picture_of(picture, runs))}
    beside = out.with_name(f"{out.stem}_files")
    beside.mkdir(parents=True, exist_ok=True)
    for path in [*(beside / f"{picture.name}.png" for picture in PICTURES), *beside.glob("score_*.png")]:
        path.unlink(missing_ok=True)  # an earlier report's
    for picture, figure in figures.items():
        files.write_bytes(beside / f"{picture.name}.png", render(figure, "png"))
    files.write_text(out, page(runs, figures))
    print(f"wrote {out}, and {len(figures)} pictures into {beside}")


def read_runs(folders: list[Path]) -> list[RecordedRun]:
    """Those of the folders that are runs; out/* names others too, which are left out with a line each. Raises
    FileNotFoundError for one that is not there, and ValueError when none is a run."""
    runs, reasons = [], []
    for folder, label in zip(folders, labels(folders)):
        try:
            runs.append(read_run(folder, label))
        except (FileNotFoundError, ValueError) as error:
            if not folder.exists():
                raise
            reasons.append(str(error))
    if not runs:
        raise ValueError("; ".join(reasons))
    for reason in reasons:
        print(f"left out: {reason}")
    return runs


def labels(folders: list[Path]) -> list[str]:
    """A label for each run: its path below the deepest folder that contains all of them."""
    paths = [folder.resolve() for folder in folders]
    common = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(common).as_posix() for path in paths]


def page(runs: list[RecordedRun], figures: dict[Picture, Figure]) -> str:
    """The whole HTML page, which loads nothing from a network."""
    title = " · ".join(run.label for run in runs) if len(runs) <= 4 else f"{len(runs)} runs"
    sections = {"Summary": summary_table(runs) + events(runs), "Scores": scores(runs), "Curves": curves(figures),
                "Options": options(runs), "Samples": samples(runs)}
    body = "".join(f"<section><h2>{name}</h2>{content}</section>\n" for name, content in sections.items() if content)
    numbers = json.dumps([plotted(run) for run in runs], allow_nan=False).replace("<", r"\u003c")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
{body}<script type="application/json" id="numbers">{numbers}</script>
</body>
</html>
"""


def plotted(run: RecordedRun) -> dict[str, Any]:
    """A run's numbers as the page shows them, floats to seven digits; null where the run reported none."""
    return {"run": run.label, "summary": run.summary(), "curves": {
        key: {part: [rounded(value) for value in values.tolist()] for part, values in curve.items()
              if part not in ("low", "high") or not np.array_equal(values, curve["value"], equal_nan=True)}
        for key, curve in run.curves.items() if has_values(curve)}}


def rounded(value: float) -> float | int | None:
    if math.isnan(value):
        return None
    return int(value) if value.is_integer() else float(f"{value:.7g}")


# Tables


def table(head: Iterable[str], rows: Iterable[Iterable[str]], layout: str = "auto") -> str:
    """Of cells that are HTML; the first one of a row heads it. On a narrow screen each row becomes a list, in which
    the cells carry the column's name. With the layout `fixed` the columns are alike."""
    head = list(head)
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>'
        + "".join(f"<td><span>{name}</span><div>{cell}</div></td>" for name, cell in zip(head[1:], cells)) + "</tr>\n"
        for first, *cells in rows)
    return (f'<div class="scroll"><table class="{layout}"><thead><tr>{top}</tr></thead>'
            f"<tbody>\n{body}</tbody></table></div>\n")


def name_of(run: RecordedRun, runs: list[RecordedRun]) -> str:
    """The run's label, after a sample of the line that it is drawn with."""
    index = runs.index(run)
    pattern = " ".join(f"{2 * length:g}" for length in dashes(index))
    return (f'<svg class="stroke" viewBox="0 0 24 4" aria-hidden="true"><line x1="0" y1="2" x2="24" y2="2" '
            f'stroke="{COLOURS[index % len(COLOURS)]}" stroke-width="4" stroke-dasharray="{pattern}"/></svg>'
            f"{html.escape(run.label)}")


def summary_table(runs: list[RecordedRun]) -> str:
    """One row a run; a column that no run has a number for is left out."""
    rows = [run.summary() for run in runs]
    columns = {
        "parameters": lambda s: short(s["parameters"]) if s["parameters"] else "",
        "tokens": lambda s: short(s["tokens"]),
        "steps": lambda s: f"{s['steps']:,}" + (f" of {s['max_iters']:,.0f}" if s["max_iters"] else ""),
        "last train loss": lambda s: show(s["train_loss"], ".4f"),
        "last val loss": lambda s: show(s["val_loss"], ".4f") + (
            "<small>whole split</small>" if s["val_is_whole"] else "") + "".join(
            f"<small>{html.escape(name)} {show(loss, '.4f') or '–'}</small>" for name, loss in s["val_losses"].items()),
        "best val loss": lambda s: show(s["best_val_loss"], ".4f") + (
            "" if s["best_step"] is None else f"<small>step {s['best_step']:,}</small>"),
        "reached": lambda s: "" if s["reached"] is None else reached(s["reached"]),
        "tokens a second": lambda s: show(s["tokens_per_sec"], ",.0f"),
        "MFU": lambda s: show(s["mfu"], ".1%"),
        "peak memory": lambda s: show(s["memory_gb"], ".3g", " GB"),
        "time": lambda s: "" if s["elapsed_s"] is None else duration(s["elapsed_s"]),
        "skipped steps": lambda s: show(s["skipped"] or None, ","),
        "rollbacks": lambda s: show(s["rollbacks"] or None, ","),
        "restarts": lambda s: show(s["restarts"] or None, ",")}
    cells = {name: [cell(row) or "–" for row in rows] for name, cell in columns.items()}
    known = {name: column for name, column in cells.items() if set(column) != {"–"}}
    names = [name_of(run, runs) + f"<small>{html.escape(str(run.folder))}</small>" for run in runs]
    return table(["run", *known], zip(names, *known.values())) + (
        "<p>Speed and MFU are medians over the reports. The best validation loss is over the windows that every "
        "evaluation of a run reads. Time includes evaluations and saves, and leaves out what a restart has lost.</p>")


def scores(runs: list[RecordedRun]) -> str:
    """For each task and metric the last score of each run with its standard error, and the best."""
    keys = dict.fromkeys(key for run in runs for key in run.scores)
    rows = [[html.escape(key.rpartition("/")[0]) + f"<small>{html.escape(key.rpartition('/')[2])}</small>",
             *(last_and_best(run.scores[key]) if key in run.scores else "–" for run in runs)] for key in keys]
    return table(["task", *(name_of(run, runs) for run in runs)], rows) if rows else ""


def last_and_best(score: dict[str, Any]) -> str:
    points = score["points"]
    best = (min if score["is_lower_better"] else max)(points, key=lambda point: point["value"])

    def said(point: dict[str, Any]) -> str:
        return show(point["value"], ".4f") + ("" if point["stderr"] is None else f" ± {point['stderr']:.4f}")

    return (f"{said(points[-1])}<small>step {points[-1]['step']:,}</small>"
            + ("" if best is points[-1] else f"<small>best {said(best)}, step {best['step']:,}</small>"))


def reached(record: dict[str, Any]) -> str:
    """The target of a run, and what it took to reach it."""
    seconds, machine = record.get("train_s"), html.escape(record.get("machine", ""))
    return (f"{record['reached']:g}<small>step {record['step']:,}</small>"
            + ("" if seconds is None else f"<small>{duration(seconds)} of training on {machine}</small>"))


def events(runs: list[RecordedRun]) -> str:
    """Skipped steps, rollbacks, restarts and branches, in a section that is closed at first."""
    rows = [[name_of(run, runs), f"{record['step']:,}", short(run.place(record, "tokens")),
             html.escape(": ".join([kind, *(record[why] for why in ("fault", "branched_from") if why in record)]))]
            for run in runs for kind, record in run.events()]
    title = f"skipped steps, rollbacks, restarts and branches, one by one ({len(rows):,})"
    return folded(title, table(["run", "step", "tokens", "what"], rows)) if rows else ""


def folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>\n"


def show(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit


def duration(seconds: float) -> str:
    """A time in its two largest units: 2 h 05 min."""
    for size, unit, smaller, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            text = f"{seconds // size:.0f} {unit} {seconds % size // smaller:02.0f} {part}"
            return text.replace(" ", "\u00a0")
    return f"{seconds:.1f}\u00a0s"


def options(runs: list[RecordedRun]) -> str:
    """The options that differ between the runs, without their folders; then all options, in a closed section."""
    head = ["option", *(name_of(run, runs) for run in runs)]
    keys = list(dict.fromkeys(key for run in runs for key in run.options))

    def rows(keys: Iterable[str]) -> list[list[str]]:
        return [[html.escape(key), *(html.escape(str(run.options.get(key, "–"))) for run in runs)] for key in keys]

    differing = [key for key in keys if key != "out_dir" and len({repr(run.options.get(key)) for run in runs}) > 1]
    told = ""
    if len(runs) > 1:
        told = table(head, rows(differing), "fixed") if differing else "<p>The runs have the same options.</p>\n"
    if unlike := [key for key in LOSS_SCALES if key in differing]:
        told += f"<p>The runs differ in {' and '.join(unlike)}: compare losses only where they agree.</p>\n"
    return told + folded(f"all {len(keys)} options", table(head, rows(keys), "fixed"))


# Pictures and samples


def curves(figures: dict[Picture, Figure]) -> str:
    """The pictures, side by side where there is room."""
    return '<div class="grid">' + "".join(
        f'<img alt="{html.escape(picture.title)}" src="data:image/svg+xml;base64,'
        f'{base64.b64encode(render(figure, "svg")).decode()}">\n' for picture, figure in figures.items()) + "</div>\n"


def samples(runs: list[RecordedRun]) -> str:
    """The last samples that each run has recorded."""
    last = [(run, written[-1]) for run in runs if (written := [r for r in run.records if "samples" in r])]
    return '<div class="grid">' + "".join(
        f"<div><h3>{name_of(run, runs)}<small>step {record['step']:,}</small></h3>"
        + "".join(map(sample, record["samples"], itertools.chain(record.get("prompts", ()), itertools.repeat(""))))
        + "</div>\n"
        for run, record in last) + "</div>\n" if last else ""


def sample(text: Any, prompt: Any) -> str:
    """A text, with the prompt that it begins with in bold."""
    text, prompt = str(text), str(prompt)
    return f"<pre><b>{html.escape(prompt)}</b>{html.escape(text[len(prompt):])}</pre>" if prompt else (
        f"<pre>{html.escape(text)}</pre>")


STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: #fff; color: #222;
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }
p, summary { color: #555; }
p { margin: .6rem 0; max-width: 46rem; font-size: .87rem; }
small { display: block; color: #666; font-size: .8rem; font-weight: normal; overflow-wrap: anywhere; }
details { margin: .8rem 0; }
summary { cursor: pointer; padding: .3rem 0; }
.stroke { width: 24px; height: 4px; margin-right: .5em; vertical-align: middle; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 1.5rem; }
.grid > * { min-width: 0; }
img { display: block; width: 100%; height: auto; }
pre { margin: 0 0 .8rem; padding: .7rem .9rem; background: #f6f6f4; font-size: .85rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .45rem .9rem .45rem 0; border-bottom: 1px solid #ddd;
  overflow-wrap: break-word; }
thead th { color: #555; font-weight: normal; vertical-align: bottom; }
tbody th { overflow-wrap: anywhere; min-width: 10rem; }
.fixed { table-layout: fixed; }
.fixed th, .fixed td { overflow-wrap: anywhere; }
td > span { display: none; }
@media (max-width: 50rem) {
  table, tbody, tr, th, td { display: block; }
  thead { display: none; }
  tr { padding: .6rem 0; border-bottom: 1px solid #ddd; }
  th, td { border: 0; padding: .12rem 0; }
  td { display: flex; justify-content: space-between; gap: 1rem; }
  td > span { display: block; color: #555; flex: 0 1 auto; }
  td > span, td > div { overflow-wrap: anywhere; min-width: 0; }
  td > div { text-align: right; }
}
"""


if __name__ == "__main__":
    run_script(main)
