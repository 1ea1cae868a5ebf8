"""Where a run reports besides its own files: Weights & Biases and TensorBoard.

Owns both services' ways of starting, resuming and going back. A tracker gets each record of metrics.jsonl: its numbers
become curves over `step`, its samples texts. And it gets the scores of evals.jsonl, which eval.py --watch writes while
the run goes on, as eval/TASK/METRIC over `tokens`.

Invariants: a service is imported only when it is asked for; whatever fails in one, at any time, ends its reports with
one line, and never the run; nothing here waits for a person.
"""

from __future__ import annotations

import contextlib
import html
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flatgpt.files import one_line, write_text
from flatgpt.run_folder import current_scores, parse_eval, restart_point


class Trackers:
    """All services that a run reports to. `log` prints a line for the user."""

    def __init__(self, log: Callable[[str], None]):
        self._log = log
        self._open: dict[str, Wandb | TensorBoard] = {}

    @property
    def is_wanted(self) -> bool:
        return bool(self._open)

    def add(self, name: str, start: Callable[[], Wandb | TensorBoard]) -> None:
        self._guard(name, lambda: self._open.update({name: start()}))

    def each(self, do: Callable[[Wandb | TensorBoard], None]) -> None:
        """Call `do` with every tracker that has not failed yet."""
        for name, tracker in [*self._open.items()]:
            self._guard(name, lambda tracker=tracker: do(tracker))

    def _guard(self, name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except (Exception, SystemExit) as error:  # no network, no disk, a server's error: a run is worth more
            self._open.pop(name, None)
            self._log(f"warning: {name} failed ({one_line(error)}); going on without it")


class Scores:
    """The scores in an evals.jsonl that trackers have not got yet. After a start and after a rollback all of what the
    run has in its past comes again: TensorBoard has dropped those past the step, and a point twice is one."""

    def __init__(self, path: Path):
        self._path, self._restart_points = path, []
        self.rewind()

    def start(self, records: list[dict[str, Any]]) -> None:
        """`records` of metrics.jsonl lie before what is reported from now on."""
        self._restart_points = [point for record in records if (point := restart_point(record))]

    def rewind(self) -> None:
        self._offset, self._size = 0, 0

    def after(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """What is new when the run has reported `record`: each with step, tokens, eval/TASK/METRIC. It costs a look at
        the file's size, unless that has changed."""
        if point := restart_point(record):
            self._restart_points.append(point)
        try:
            size = self._path.stat().st_size
            if size == self._size:
                return []
            with open(self._path, "rb") as file:
                file.seek(self._offset if size > self._size else 0)
                block = file.read()
        except OSError:  # there are none
            return []
        lines = block[:block.rfind(b"\n") + 1]
        self._offset, self._size = (self._offset if size > self._size else 0) + len(lines), size
        evals = filter(None, map(parse_eval, lines.split(b"\n")))
        return [{"step": found["step"], "tokens": found.get("tokens", 0),
                 **{f"eval/{task}/{metric}": value for task, metrics in found["scores"].items()
                    for metric, value in metrics.items() if metric != "questions"}}
                for found in current_scores(evals, self._restart_points, record["step"])]


class Wandb:
    """A run at Weights & Biases: online where there is a key and a network, else offline, for `wandb sync` to upload.

    Its id lies in the run folder, so that a run that goes on does so there too. wandb numbers records by itself and
    drops those that come with a number it has seen; so our step is a value like the others, and is named as the axis
    of all curves. What was logged past a checkpoint that a run goes on from stays, as wandb's history only grows."""

    def __init__(self, folder: Path, project: str, name: str, is_new: bool, options: dict[str, Any],
                 log: Callable[[str], None]):
        # Its own patience at the end has no limit, and is the job's time.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "120")
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")
        import wandb

        self._wandb = wandb
        id_file = folder / "wandb_id"
        if is_new or not id_file.is_file():
            write_text(id_file, secrets.token_hex(4) + "\n")
        settings = {"project": project, "name": name, "id": id_file.read_text(encoding="utf-8").strip(), "dir": folder,
                    "resume": "allow"}
        mode = wandb.setup().settings.mode  # of the environment, or of wandb's own files
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            mode = "offline"
            log(f"wandb has no API key: the run is kept in {folder}/wandb, for `wandb sync` to upload")
        try:
            self._run = wandb.init(mode=mode, **settings)
        except wandb.errors.Error as error:
            if mode != "online":
                raise
            log(f"warning: wandb cannot be reached ({one_line(error)}): the run is kept in {folder}/wandb, for "
                "`wandb sync` to upload")
            wandb.teardown()  # its service would not let go of the id
            self._run = wandb.init(mode="offline", **settings)
        self._run.config.update(options, allow_val_change=True)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("eval/*", step_metric="tokens")

    def log(self, record: dict[str, Any]) -> None:
        values = numbers(record)
        with self._or_leave():
            if texts := record.get("samples"):
                values["samples"] = self._wandb.Html("<hr>".join(f"<pre>{html.escape(text)}</pre>" for text in texts))
            self._run.log(values)

    def go_back(self, step: int) -> None:
        """The records that follow begin behind `step`, an earlier one: the curves go back with their axis."""

    def close(self, summary: dict[str, Any]) -> None:
        """The run has ended; `summary` is what it came to."""
        with self._or_leave():
            self._run.summary.update(summary)
            self._run.finish()

    @contextlib.contextmanager
    def _or_leave(self) -> Iterator[None]:
        try:
            yield
        except Exception:  # raised again below: `Trackers` tells of it and leaves wandb out
            with contextlib.suppress(Exception, SystemExit):
                self._wandb.teardown()  # else it would try, and complain, once more when the process ends
            raise


class TensorBoard:
    """Event files in out_dir/tensorboard, on the disk with each record. Those past a step that a run goes on from are
    purged: the files say from where on, and TensorBoard leaves them out."""

    def __init__(self, folder: Path, step: int, options: dict[str, Any]):
        self._folder, self._writer = folder, None
        self.go_back(step)
        table = "".join(f"| {key} | {value} |\n" for key, value in options.items())
        self._writer.add_text("options", f"| option | value |\n| --- | --- |\n{table}", step)

    def go_back(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._writer:
            self._writer.close()
        self._writer = SummaryWriter(self._folder / "tensorboard", purge_step=step + 1 if step else 0)

    def log(self, record: dict[str, Any]) -> None:
        for key, value in numbers(record).items():
            if key.startswith("eval/"):
                self._writer.add_scalar(key, value, int(record["tokens"]))
            elif key != "step":
                self._writer.add_scalar(key, value, record["step"])
        for number, text in enumerate(record.get("samples", ()), 1):
            lines = "\n".join(f"    {line}" for line in text.splitlines())  # as code: it is shown as Markdown
            self._writer.add_text(f"samples/{number}", lines, record["step"])
        self._writer.flush()

    def close(self, summary: dict[str, Any]) -> None:
        self._writer.close()


def numbers(record: dict[str, Any]) -> dict[str, int | float]:
    return {key: value for key, value in record.items() if isinstance(value, int | float) and value is not True}
