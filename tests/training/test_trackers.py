"""trackers.py: what arrives at wandb and TensorBoard, and that neither can harm a run."""

import html
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, TINY_RUN, records_of, run_process
from faults import start_ranks, until

from flatgpt.training import metrics, trackers
from model import GPT

RUN = (*TINY_RUN, "--dropout=0.1", "--keep_last=0")
BOTH = ("--wandb_log=True", "--wandb_project=flat", "--wandb_run_name=tiny", "--tensorboard=True")
TINY = Path("out/tiny")


@pytest.fixture(autouse=True)
def _nobody_is_logged_in(monkeypatch, tmp_path):
    """And wandb waits for no server, as it would for minutes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / ".config"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield
    if wandb := sys.modules.get("wandb"):
        wandb.teardown()


def wandb_files(run: Path = TINY) -> list[Path]:
    return sorted(run.glob("wandb/*run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)


def read_wandb(path: Path) -> list:
    """The records of a run that is over; wandb's own process may still be writing the last of them."""
    until(lambda: any(record.HasField("exit") for record in parse_wandb(path)), lambda: f"no end in {path}", limit_s=60)
    return parse_wandb(path)


def parse_wandb(path: Path) -> list:
    """The protocol buffers in a .wandb file so far: LevelDB's log format behind a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, record, records = path.read_bytes(), 7, b"", []
    assert not content or content.startswith(b":W&B")
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # a header is not cut in two
            at += 32768 - at % 32768
        length, kind = int.from_bytes(content[at + 4:at + 6], "little"), content[at + 6]
        record += content[at + 7:at + 7 + length]
        at += 7 + length
        if at > len(content):  # torn
            break
        if kind in (1, 4):  # whole, or the last part of one
            records.append(wandb_internal_pb2.Record.FromString(record))
            record = b""
    return records


def wandb_history(path: Path) -> list[dict]:
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for record in read_wandb(path) if record.HasField("history")]


def wandb_values(path: Path, kind: str) -> dict:
    """What a run's config or summary came to."""
    values = {}
    for record in read_wandb(path):
        whole = record.run if record.HasField("run") else None
        parts = [getattr(whole, kind)] if whole and whole.HasField(kind) else []
        for part in parts + ([getattr(record, kind)] if record.HasField(kind) else []):
            values |= {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in part.update}
    return values


def curves(records: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) of every number but the step."""
    found: dict[str, list] = {}
    for record in records:
        for key, value in trackers.numbers(record).items():
            if key != "step" and not key.startswith(("_", "samples/")):  # wandb's own
                found.setdefault(key, []).append((record["step"], value))
    return found


def tensorboard_of(run: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def assert_tensorboard_has(records: list[dict], run: Path = TINY) -> None:
    events = tensorboard_of(run)
    shown = {tag: [(event.step, event.value) for event in points] for tag in events.Tags()["scalars"]
             if (points := events.Scalars(tag))}  # none where all were purged
    assert shown == {key: [(step, np.float32(value)) for step, value in curve]
                     for key, curve in curves(records).items()}


def texts_of(events, tag: str) -> list[tuple[int, str]]:
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(f"{tag}/text_summary")]


def lose_last_checkpoint(run: Path, step: int) -> None:
    """As if the run had been killed just before it was published."""
    shutil.rmtree(run / f"checkpoints/step_{step:08d}")


def test_wandb_has_the_options_every_record_and_what_the_run_came_to(cli, tiny_data):
    result = cli("train", *RUN, *BOTH[:3], "--sample_interval=3", "--sample_tokens=20")
    assert result.code == 0, result.err
    [path], records = wandb_files(), records_of(TINY)
    config = wandb_values(path, "config")
    derived = {"parameters": GPT.from_pretrained(TINY).num_params(False), "tokens_per_step": 8 * 16, "world_size": 1}
    for key, value in {**json.loads((TINY / "train_config.json").read_text()), **derived}.items():
        assert config[key] == value
    history = wandb_history(path)
    assert curves(history) == curves(records)
    pages = [line["samples/path"] for line in history if "samples/path" in line]
    shown = [next(TINY.glob(f"wandb/*/files/{page}")).read_text() for page in pages]
    written = [record["samples"] for record in records if "samples" in record]
    assert len(shown) == len(written) == 2
    assert all(html.escape(text) in page for page, texts in zip(shown, written) for text in texts)
    summary = wandb_values(path, "summary")
    evaluations = [record for record in records if "val/loss" in record]
    assert summary["final_val_loss"] == evaluations[-1]["val/loss"]
    assert summary["best_val_loss"] == min(r.get("val/sampled_loss", r["val/loss"]) for r in evaluations)
    assert summary["tokens"] == 6 * 8 * 16
    assert summary["tokens_per_sec"] == np.median([r["tokens_per_sec"] for r in records if "tokens_per_sec" in r])
    axes = {record.metric.glob_name or record.metric.name: record.metric.step_metric for record in read_wandb(path)
            if record.HasField("metric")}
    assert axes["*"] == "step"


def test_a_run_that_goes_on_is_the_same_at_wandb_and_a_new_one_is_not(cli, tiny_data):
    assert cli("train", *RUN, *BOTH).code == 0
    lose_last_checkpoint(TINY, 6)
    assert cli("train", *RUN, *BOTH, "--learning_rate=1e-3").code == 0
    first, again = wandb_files()
    ids = [next(record.run.run_id for record in read_wandb(path) if record.HasField("run")) for path in (first, again)]
    assert ids[0] == ids[1] == (TINY / "wandb_id").read_text().strip()
    steps = [line["step"] for line in wandb_history(again) if "train/loss" in line]
    assert steps == [4, 5, 6]  # once more: nothing is dropped
    assert wandb_values(again, "config")["learning_rate"] == 1e-3
    assert cli("train", *RUN, *BOTH, "--resume=never", "--overwrite=True").code == 0
    assert (TINY / "wandb_id").read_text().strip() != ids[0]


def test_a_restart_by_torchrun_before_the_first_checkpoint_is_the_same_run_at_wandb(cli, tiny_data, monkeypatch):
    def fail(*_args):
        raise RuntimeError("before anything is saved")

    monkeypatch.setattr("flatgpt.launcher.UNDER_TORCHRUN", True)
    monkeypatch.setattr("flatgpt.launcher.end_torchrun", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr("flatgpt.training.samples.write_samples", fail)
        with pytest.raises(RuntimeError):
            cli("train", *RUN, *BOTH[:3], "--sample_interval=1")
    first = (TINY / "wandb_id").read_text()
    assert cli("train", *RUN, *BOTH[:3]).code == 0
    assert (TINY / "wandb_id").read_text() == first


def test_wandb_that_its_owner_has_turned_off_stays_off(cli, tiny_data, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    result = cli("train", *RUN, *BOTH[:3])
    assert (result.code, "wandb" in result.out, wandb_files()) == (0, False, [])


def test_tensorboard_shows_metrics_jsonl_and_the_texts(cli, tiny_data):
    assert cli("train", *RUN, "--tensorboard=True", "--sample_interval=3", "--sample_tokens=20").code == 0
    assert_tensorboard_has(records_of(TINY))
    events = tensorboard_of(TINY)
    [(step, options)] = texts_of(events, "options")
    assert step == 0
    assert "| dropout | 0.1 |" in options
    for number in (1, 2):
        assert texts_of(events, f"samples/{number}") == [
            (record["step"], "\n".join("    " + line for line in record["samples"][number - 1].splitlines()))
            for record in records_of(TINY) if "samples" in record]


def test_after_a_resume_tensorboard_has_no_step_twice(cli, tiny_data):
    assert cli("train", *RUN, "--tensorboard=True").code == 0
    lose_last_checkpoint(TINY, 6)
    assert cli("train", *RUN, "--tensorboard=True").code == 0
    assert len(list(TINY.glob("tensorboard/*"))) == 2
    assert_tensorboard_has(records_of(TINY))
    assert cli("train", *RUN, "--tensorboard=True", "--resume=never", "--overwrite=True", "--max_iters=4").code == 0
    assert_tensorboard_has(records_of(TINY))


def test_after_a_rollback_nothing_stale_is_left_and_nothing_new_is_lost(cli, tiny_data, tmp_path):
    code, log = start_ranks(1, tmp_path, *RUN, *BOTH, "--max_iters=12", "--max_bad_steps=2", NAN_STEPS="8-9")
    assert code == 0, log
    records = records_of(TINY)
    assert [record["step"] for record in records if "rollbacks" in record] == [6]
    assert_tensorboard_has([record for record in records if record.keys() != {"step", "tokens", "elapsed_s", "fault"}])
    steps = [line["step"] for line in wandb_history(wandb_files()[0]) if "train/loss" in line or "skipped" in line]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8, 9, 6, 7, 8, 9, 10, 11, 12]


def test_a_run_without_them_imports_neither(tiny_data, tmp_path):
    code = ("import sys, train; train.main(sys.argv[1:]); print([name for name in sys.modules "
            "if name.partition('.')[0] in ('wandb', 'tensorboard', 'tensorboardX', 'matplotlib')])")
    out = run_process("-c", code, *RUN, "--sample_interval=3", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert out.splitlines()[-1] == "[]"


# Failures


def test_a_tracker_that_fails_is_left_out_with_one_line(monkeypatch):
    said, logged = [], []

    class Works(SimpleNamespace):
        log = staticmethod(logged.append)

        def close(self, summary):
            raise OSError("the disk is full")

    class Fails(Works):
        def log(self, record):
            raise ConnectionError("no network\nat all")

    def cannot_start():
        raise ImportError("no module of that name")

    everyone = trackers.Trackers(said.append)
    for name, start in (("a", Works), ("b", Fails), ("c", cannot_start)):
        everyone.add(name, start)
    for step in (1, 2):
        everyone.each(lambda tracker, step=step: tracker.log({"step": step}))
    for _ in range(2):  # the second time nobody is left
        everyone.each(lambda tracker: tracker.close({}))
    assert logged == [{"step": 1}, {"step": 2}]
    assert said == ["warning: c failed (ImportError: no module of that name); going on without it",
                    "warning: b failed (ConnectionError: no network); going on without it",
                    "warning: a failed (OSError: the disk is full); going on without it"]


def test_a_run_outlives_wandbs_process_and_a_folder_that_is_none(cli, tiny_data, monkeypatch):
    TINY.mkdir(parents=True)
    (TINY / "tensorboard").write_text("a file")
    log, killed = trackers.Wandb.log, []

    def log_and_kill(self, record):
        if record["step"] == 2 and not killed:
            for stat in Path("/proc").glob("[0-9]*/stat"):
                pid, name, _, parent = stat.read_text().replace("(", "").replace(")", "").split()[:4]
                if name == "wandb-core" and int(parent) == os.getpid():
                    os.kill(int(pid), signal.SIGKILL)
                    killed.append(pid)
            time.sleep(0.2)
        log(self, record)

    monkeypatch.setattr(trackers.Wandb, "log", log_and_kill)
    result = cli("train", *RUN, *BOTH)
    assert result.code == 0, result.err
    assert killed
    assert result.out.count("warning: TensorBoard failed (FileExistsError: ") == 1
    assert result.out.count("warning: wandb failed (ConnectionResetError: ") == 1
    assert records_of(TINY)[-1]["step"] == 6


@pytest.mark.soak  # wandb tries for twenty seconds
def test_without_a_server_the_run_is_kept_on_the_disk(tiny_data, tmp_path):
    out = run_process(ROOT / "train.py", *RUN, *BOTH[:2], cwd=tmp_path, WANDB_MODE="online", WANDB_API_KEY="0" * 40,
                      WANDB_BASE_URL="http://127.0.0.1:9", WANDB_INIT_TIMEOUT="1")
    assert "warning: wandb cannot be reached (CommError: " in out
    offline = next(path for path in wandb_files() if path.parent.name.startswith("offline-"))
    assert curves(wandb_history(offline)) == curves(records_of(TINY))


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("script"), reason="needs Linux's `script`")
def test_without_a_key_nobody_is_asked_for_one_even_at_a_terminal(tiny_data, tmp_path):
    command = shlex.join(["env", "-u", "WANDB_MODE", sys.executable, str(ROOT / "train.py"), *RUN, "--wandb_log=True"])
    subprocess.run(["script", "-qec", command, "log"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL, timeout=120)
    assert "wandb has no API key: the run is kept in out/tiny/wandb" in (tmp_path / "log").read_text()
    assert curves(wandb_history(wandb_files()[0])) == curves(records_of(TINY))


def test_scores_of_another_process_reach_both_over_tokens_and_stale_ones_do_not(cli, tiny_data, tmp_path, monkeypatch):
    """Written while the run goes on, torn at first, and again after a rollback."""
    path = tmp_path / "out/tiny/evals.jsonl"
    line = {"step": 3, "tokens": 384, "next_seq": 24, "seqs_per_step": 8, "checkpoint": "x", "task": "a",
            "scores": {"a": {"acc": 0.5, "acc_stderr": 0.25, "questions": 4}}}
    text = json.dumps(line) + "\n" + json.dumps(line | {"step": 2, "next_seq": 99}) + "\n"
    report = metrics.Reporter.train

    def train(self, step, *args, **options):
        if step in (4, 5):
            with open(path, "a") as file:
                file.write(text[:20] if step == 4 else text[20:])
        return report(self, step, *args, **options)

    monkeypatch.setattr(metrics.Reporter, "train", train)
    result = cli("train", *RUN, *BOTH)
    assert result.code == 0, result.err
    assert "warning" not in result.out
    scores = {tag: [(event.step, event.value) for event in tensorboard_of(TINY).Scalars(tag)]
              for tag in ("eval/a/acc", "eval/a/acc_stderr")}
    assert scores == {"eval/a/acc": [(384, 0.5)], "eval/a/acc_stderr": [(384, 0.25)]}
    [logged] = [record for record in wandb_history(wandb_files()[0]) if "eval/a/acc" in record]
    assert (logged["tokens"], logged["step"], logged["eval/a/acc_stderr"]) == (384, 3, 0.25)


def test_scores_come_again_after_a_turn_and_cost_a_look_otherwise(tmp_path):
    path, stale = tmp_path / "evals.jsonl", 8 * 5
    lines = [{"step": step, "tokens": step, "next_seq": seq, "seqs_per_step": 8, "checkpoint": "x", "task": "a",
              "scores": {"a": {"acc": seq}}} for step, seq in ((3, 24), (5, stale), (5, 80))]
    scores = trackers.Scores(path)
    assert scores.after({"step": 5}) == []  # there is no file
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    assert [found["eval/a/acc"] for found in scores.after({"step": 5})] == [24, stale]
    assert scores.after({"step": 6}) == []
    scores.rewind()
    assert [found["eval/a/acc"] for found in scores.after({"step": 4, "rollbacks": 1, "next_seq": 72})] == [24]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [found["eval/a/acc"] for found in scores.after({"step": 5})] == [80]
