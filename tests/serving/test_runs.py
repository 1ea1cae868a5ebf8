"""runs.py: runs are found, followed and told apart by their state; files of any content are read in bounded memory."""

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY_RUN, records_of, write_run

from flatgpt.serving import runs
from flatgpt.serving.bodies import to_json
from flatgpt.serving.curves import Curves
from flatgpt.serving.runs import BLOCK_BYTES, FollowedRun, History, RunTable, Tail, find_runs, locked_inodes

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc/locks is Linux's")


def report(step: int) -> dict:
    return {"step": step, "tokens": 8 * step, "train/loss": 2.0 - step / 1000, "elapsed_s": step / 2}


def append(path: Path, *records: dict, torn: str = "") -> None:
    with open(path, "a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records) + torn)


def table(*patterns: object) -> RunTable:
    """A table that looks anew each time that it is asked."""
    found = RunTable(map(str, patterns))
    found.refresh()
    return found


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(runs, "RESCAN_S", 0.0)
    monkeypatch.setattr(runs, "REFRESH_S", 0.0)


def test_runs_are_found_in_folders_patterns_and_by_themselves(tmp_path, monkeypatch):
    for name in ("out/a", "out/sweep/b", "other/c", "out/.hidden/d", "out/a/checkpoints/e", "with[1]/f"):
        write_run(tmp_path / name, [])
    (tmp_path / "out" / "link").symlink_to(tmp_path / "other")
    monkeypatch.chdir(tmp_path)

    def found(*patterns: str) -> list[str]:
        return [str(path.relative_to(tmp_path.resolve())) for path in find_runs(patterns)]

    assert found("out") == ["out/a", "out/sweep/b"]
    assert found("out/a", "ot*", "out") == ["other/c", "out/a", "out/sweep/b"]
    assert found("with[1]") == ["with[1]/f"]  # a name that exists is no pattern
    assert found("missing", "missing*") == []
    assert [line["name"] for line in table("out").refresh()] == ["a", "sweep/b"]
    assert [line["name"] for line in table("out", "other").refresh()] == ["other/c", "out/a", "out/sweep/b"]


def test_new_lines_alone_are_read_and_a_torn_one_when_it_is_whole(tmp_path):
    path = write_run(tmp_path / "a", [report(1)], torn='{"step": 2, "tra') / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == ([report(1)], False)
    assert tail.read() == ([], False)
    append(path, torn='in/loss": 1.0}\nnot json\n[1]\n{"step": "3"}\n')
    append(path, report(4))
    assert tail.read() == ([{"step": 2, "train/loss": 1.0}, report(4)], False)
    append(path, report(5))
    assert Tail(path, tail.position).read() == ([report(5)], False)


def test_a_file_that_a_resume_has_rewritten_is_read_from_the_start(tmp_path):
    path = write_run(tmp_path / "a", [report(step) for step in range(1, 50)]) / "metrics.jsonl"
    tail = Tail(path)
    tail.read()
    kept = [report(1), report(2)]
    path.write_text("")
    append(path, *kept)  # shorter
    assert tail.read() == (kept, True)
    others = [report(step) | {"lr": 0.5} for step in range(1, 9)]
    path.write_text("")
    append(path, *others)  # longer, and other lines
    assert tail.read() == (others, True)
    assert tail.read() == ([], False)


def test_a_line_that_is_far_too_long_is_passed_over_in_bounded_memory(tmp_path):
    path = write_run(tmp_path / "a", [report(1)]) / "metrics.jsonl"
    append(path, {"step": 2, "junk": "x" * (3 * BLOCK_BYTES)}, report(3))
    history = History(path).catch_up(60.0)
    assert history["columns"]["step"] == [1, 3]


@pytest.mark.parametrize("line", [
    '{"step": 1e999}', '{"step": NaN, "val/loss": 1}', "[" * 100_000, '{"step": 5, "tokens"', '"step"', "\x00\xff",
    '{"step": "7", "fault": {}, "samples": 3, "train/loss": "low"}', '{"step": 8, "fault": {}, "samples": 3}'])
def test_lines_that_are_no_records_do_no_harm(tmp_path, line):
    folder = write_run(tmp_path / "a", [report(1)], torn=line + "\n")
    append(folder / "metrics.jsonl", report(9))
    seen = table(tmp_path)
    [shown] = seen.refresh()
    assert shown["step"] == 9
    assert seen.history(shown["id"], 60.0)["columns"]["step"] == [1, 9]


@pytest.mark.parametrize(("name", "content"), [
    ("train_config.json", "[]"), ("train_config.json", '{"max_iters": "many", "x": {"y": 1}, "z": NaN}'),
    ("launch.json", '{"ranks": 3}'), ("launch.json", '{"ranks": [{"host": {}}]}'), ("metrics.jsonl", "")])
def test_files_of_a_run_that_hold_anything_do_no_harm(tmp_path, name, content):
    folder = write_run(tmp_path / "a", [report(1)])
    (folder / name).write_text(content)
    seen = table(tmp_path)
    [shown] = seen.refresh()
    to_json(shown)
    to_json(seen.history(shown["id"], 60.0))


@pytest.mark.parametrize("number", ["1" + "0" * 400, "Infinity", "-Infinity", "NaN", "1e308", "true"])
def test_numbers_that_nothing_can_be_reckoned_with_do_no_harm(tmp_path, number):
    step = number if number.isdecimal() else "3"
    values = "".join(f', "{key}": {number}' for key in ("tokens", "train/loss", "val/loss", "elapsed_s"))
    folder = write_run(tmp_path / "a", [report(1)], {"max_iters": 9}, torn=f'{{"step": {step}{values}}}\n')
    (folder / "launch.json").write_text('{"ranks": [{"host": "elsewhere"}]}')
    seen = table(tmp_path)
    [shown] = seen.refresh()
    assert shown["state"] == "running"  # so that the time left is asked for
    assert not any(isinstance(value, bool) for value in shown.values())
    to_json(shown)
    to_json(seen.history(shown["id"], 60.0))


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero"),
                                  lambda path: path.symlink_to(path)], ids=["folder", "pipe", "device", "loop"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "launch.json", "train_config.json"])
def test_what_is_no_file_is_not_read(tmp_path, name, make):
    """A pipe would be waited for, and a device has no end."""
    write_run(tmp_path / "b", [report(1)])
    place = write_run(tmp_path / "a", [report(1)]) / name
    place.unlink(missing_ok=True)
    make(place)
    seen = table(tmp_path)
    shown = [line["name"] for line in seen.refresh()]
    assert shown == (["b"] if name == "train_config.json" else ["a", "b"])
    for line in seen.refresh():
        to_json(seen.history(line["id"], 60.0))


def test_a_link_that_leads_to_itself_holds_no_runs(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert find_runs([str(tmp_path / "loop"), str(tmp_path / "loo*")]) == []


def test_a_long_run_is_first_shown_by_a_sample_and_then_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "OVERVIEW_BYTES", 1)
    monkeypatch.setattr(runs, "OVERVIEW_BLOCK_BYTES", 400)
    monkeypatch.setattr(runs, "BLOCK_BYTES", 20_000)
    records = [report(step) for step in range(1, 3001)]
    history = History(write_run(tmp_path / "a", records) / "metrics.jsonl")
    first = history.catch_up(0.0)
    steps = first["columns"]["step"]
    assert 0 < first["read"] < 1
    assert first["position"] is None
    assert steps[0] == 1
    assert steps[-1] == 3000
    assert 64 <= len(steps) < 1000
    while (shown := history.catch_up(0.0))["read"] < 1:
        assert shown["columns"] == first["columns"]
    whole = Curves()
    whole.add(records)
    assert {key: shown[key] for key in whole.as_dict()} == whole.as_dict()


def test_the_list_finds_an_evaluation_that_lies_far_back(tmp_path):
    evaluation = {"step": 5, "tokens": 40, "val/loss": 1.25}
    write_run(tmp_path / "a", [evaluation, *map(report, range(6, 3000))])
    [shown] = table(tmp_path).refresh()
    assert (shown["step"], shown["val/loss"], shown["train/loss"]) == (2999, 1.25, report(2999)["train/loss"])


def test_a_folder_that_is_deleted_leaves_the_list(tmp_path):
    for name in "ab":
        write_run(tmp_path / name, [report(1)])
    seen = table(tmp_path)
    ids = {line["name"]: line["id"] for line in seen.refresh()}
    seen.history(ids["a"], 1.0)
    shutil.rmtree(tmp_path / "a")
    assert [line["name"] for line in seen.refresh()] == ["b"]
    with pytest.raises(KeyError):
        seen.history(ids["a"], 1.0)
    (tmp_path / "b" / "metrics.jsonl").unlink()
    assert seen.history(ids["b"], 1.0)["columns"]["step"] == []


# States


def state(folder: Path, is_held: bool = False) -> str:
    held = locked_inodes() if is_held else {}
    return FollowedRun(folder).refresh(held)["state"]


def run_at(folder: Path, last: dict, host: str = "") -> Path:
    write_run(folder, [report(1), report(2), last], {"max_iters": 3})
    (folder / "launch.json").write_text(json.dumps({"ranks": [{"host": host or platform.node()}]}))
    return folder


@pytest.mark.parametrize(("last", "expected"), [
    (report(3), "died"), ({"step": 3, "val/loss": 1.0}, "finished"), ({"step": 2, "val/loss": 1.0}, "died"),
    ({"step": 2, "stopped": "SIGTERM", "elapsed_s": 1.0}, "stopped")])
def test_a_run_that_nobody_holds_has_finished_stopped_or_died(tmp_path, last, expected):
    assert state(run_at(tmp_path / "a", last)) == expected


@pytest.mark.parametrize(("saved", "expected"), [(2, "died"), (3, "finished")])
def test_a_run_that_died_before_its_last_save_has_not_finished(tmp_path, saved, expected):
    folder = run_at(tmp_path / "a", {"step": 3, "val/loss": 1.0})
    (folder / "checkpoints" / f"step_{saved:08}").mkdir(parents=True)
    assert state(folder) == expected


@pytest.mark.parametrize(("target", "expected"), [(1.5, "finished"), (1.0, "died"), (0.0, "died")])
def test_a_run_that_has_reached_its_target_is_finished_until_it_has_a_lower_one(tmp_path, target, expected):
    folder = run_at(tmp_path / "a", {"step": 2, "tokens": 8, "reached": 1.5, "train_s": 1.0, "elapsed_s": 2.0})
    (folder / "train_config.json").write_text(json.dumps({"max_iters": 3, "target_val_loss": target}))
    assert state(folder) == expected


def test_on_another_host_the_age_of_the_last_line_tells(tmp_path):
    folder = run_at(tmp_path / "a", report(3), host="elsewhere")
    assert state(folder) == "running"
    for name in ("metrics.jsonl", "train_config.json"):
        os.utime(folder / name, (time.time() - 130,) * 2)
    assert state(folder) == "died"
    append(folder / "metrics.jsonl", {"step": 2, "stopped": "SIGTERM"})
    assert state(folder) == "stopped"


@linux
def test_a_held_lock_is_seen_without_being_taken(tmp_path, monkeypatch):
    folder = run_at(tmp_path / "a", {"step": 3, "val/loss": 1.0})
    with open(folder / ".lock", "w") as lock:
        assert state(folder, is_held=True) == "finished"
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert state(folder, is_held=True) == "running"
        held = locked_inodes()
        inode = os.fstat(lock.fileno()).st_ino
        elsewhere = {inode: [(12345, process) for _, process in held[inode]]}  # the device that btrfs has in the list
        assert FollowedRun(folder).refresh(elsewhere)["state"] == "running"
        assert FollowedRun(folder).refresh({inode: [(12345, "1")]})["state"] == "finished"  # the inode of another disk


@linux
def test_a_run_can_start_while_its_folder_is_looked_at(cli, tiny_data, tmp_path):
    looking = subprocess.Popen([sys.executable, "-c", (
        "import sys; from flatgpt.serving import runs; runs.RESCAN_S = runs.REFRESH_S = 0.0\n"
        "table = runs.RunTable(['out'])\nwhile True: [table.history(run['id'], 1.0) for run in table.refresh()]")],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        for _ in range(3):
            assert cli("train", *TINY_RUN, "--resume=never", "--overwrite=True").code == 0
    finally:
        assert looking.poll() is None
        looking.kill()
        looking.wait()
    [line] = table("out").refresh()
    assert line["state"] == "finished"
    assert line["val/loss"] == records_of("out/tiny")[-1]["val/loss"]


def test_a_run_that_is_stopped_says_so_and_what_goes_on_from_it_does_not(cli, tiny_data):
    assert cli("train", *TINY_RUN, "--max_minutes=1e-9").code == 75
    [line] = table("out").refresh()
    assert line["state"] == "stopped"
    assert records_of("out/tiny")[-1]["stopped"] == "max_minutes=1e-09"
    assert cli("train", *TINY_RUN).code == 0
    seen = table("out")
    [line] = seen.refresh()
    assert line["state"] == "finished"
    assert [event["kind"] for event in seen.history(line["id"], 1.0)["events"]] == ["stop", "restart"]


def test_the_time_left_follows_from_the_latest_steps(tmp_path):
    folder = write_run(tmp_path / "a", [report(step) for step in range(1, 11)], {"max_iters": 110})
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = FollowedRun(folder).refresh(locked_inodes())
    assert line["time_left_s"] == pytest.approx(50.0)  # a hundred steps of half a second


@pytest.mark.soak
def test_a_gigabyte_is_shown_at_once_and_read_in_bounded_memory(tmp_path):
    """The first picture within 10 s, and the process below 300 MB, of which Python and its libraries take about 60."""
    lines = "".join(json.dumps(report(step) | {"lr": 1e-3, "grad_norm": 1.234567, "tokens_per_sec": 123456.789,
                                               "mfu": 0.4567, "memory_gb": 45.6789, "batch_hash": "0" * 16,
                                               "skipped": 0}) + "\n" for step in range(1, 100_000))
    path = write_run(tmp_path / "a", []) / "metrics.jsonl"
    with open(path, "w") as file:
        while file.tell() < 1e9:
            file.write(lines)
    code = """
import resource, sys, time
from flatgpt.serving.runs import RunTable
began, table = time.monotonic(), RunTable([sys.argv[1]])
[run] = table.refresh()
shown = table.history(run["id"], 1.0)
print(time.monotonic() - began, len(shown["columns"]["step"]))
while shown["read"] < 1:
    shown = table.history(run["id"], 10.0)
print(len(shown["columns"]["step"]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, text=True,
                          stdout=subprocess.PIPE)
    first_s, first_points, points, memory_kb = map(float, done.stdout.split())
    assert first_s < 10
    assert first_points > 1000
    assert points > 1000
    assert memory_kb < 300_000
