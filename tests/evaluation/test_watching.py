"""A watcher beside a run: what it writes, what it leaves alone, kills, deletions, rollbacks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY_RUN, files_of, records_of
from faults import start_ranks

from flatgpt import run_folder
from flatgpt.evaluation import questions, watching

RUN = Path("out/tiny")
KEPT = ("--eval_interval=2", "--keep_last=0")
FIXED = ("--device=cpu", "--dtype=float32")


@pytest.fixture
def asked(tmp_path) -> str:
    """The option that names a file of questions in the characters of the tiny data."""
    with open(tmp_path / "questions.jsonl", "w") as file:
        for i in range(12):
            file.write(json.dumps({"activity_label": "Line", "ctx_a": f"{i}: the quick", "ctx_b": "", "label": i % 2,
                                   "endings": [f"brown fox, {i}", "lazy dogs."]}) + "\n")
    return f"--hellaswag_file={tmp_path}/questions.jsonl"


@pytest.fixture
def watch(cli, asked, monkeypatch):
    """`watch()`: eval.py --watch in this process, which looks often and keeps its priority."""
    monkeypatch.setattr(watching, "POLL_S", 0.05)
    monkeypatch.setattr("os.nice", lambda _by: 0)
    return lambda *args: cli("eval", f"--watch={RUN}", "--tasks=hellaswag", asked, *FIXED, *args)


def lines() -> list[dict]:
    return [json.loads(line) for line in (RUN / "evals.jsonl").read_text().splitlines()]


def test_each_checkpoint_is_scored_once_and_nothing_else_of_the_run_is_touched(cli, tiny_data, watch, asked):
    assert cli("train", *TINY_RUN, *KEPT).code == 0
    before = files_of(RUN)
    result = watch()
    assert result.code == 0, result.err
    assert "out/tiny has finished, and its checkpoints are scored" in result.out
    after = files_of(RUN)
    assert {name: after.pop(name, None) is not None for name in ("evals.jsonl", ".evals.lock")} == {
        "evals.jsonl": True, ".evals.lock": True}
    assert after == before
    found = lines()
    assert [line["step"] for line in found] == [2, 4, 6]
    assert [line["tokens"] for line in found] == [2 * 128, 4 * 128, 6 * 128]
    for line in found:
        alone = cli("eval", f"--init_from={RUN}/checkpoints/step_{line['step']:08d}", "--tasks=hellaswag", asked,
                    *FIXED, "--json")
        assert json.loads(alone.out)["results"]["hellaswag"] == line["scores"]["hellaswag"]
        assert line["versions"] == {"hellaswag": 1.0}
        assert line["seconds"] > 0
    content = (RUN / "evals.jsonl").read_bytes()
    assert watch().code == 0
    assert (RUN / "evals.jsonl").read_bytes() == content
    assert watch("--limit=5").code == 0  # other questions: other lines
    assert [line["scores"]["hellaswag"]["questions"] for line in lines()] == [12] * 3 + [5] * 3


def test_a_kill_between_and_within_lines_costs_nothing(cli, tiny_data, watch, monkeypatch):
    assert cli("train", *TINY_RUN, *KEPT).code == 0
    with monkeypatch.context() as patch:
        answer, calls = questions.answer, []
        patch.setattr(questions, "answer", lambda *args: calls.append(1) or (
            answer(*args) if len(calls) < 3 else signal.raise_signal(signal.SIGINT)))
        assert watch().code == 130
    assert [line["step"] for line in lines()] == [2, 4]
    path = RUN / "evals.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert watch().code == 0
    assert [line["step"] for line in lines()] == [2, 4, 6]


def test_a_second_watcher_ends_with_one_line(refused, cli, tiny_data, asked):
    assert cli("train", *TINY_RUN).code == 0
    with watching.only_watcher(RUN):
        assert "another process is watching out/tiny already" in refused(
            "eval", f"--watch={RUN}", "--tasks=hellaswag", asked)
    assert not (RUN / "evals.jsonl").exists()


def test_what_the_run_deletes_is_scored_if_it_was_open_and_else_missed(cli, tiny_data, watch, monkeypatch):
    assert cli("train", *TINY_RUN, *KEPT).code == 0
    answer = questions.answer

    def delete_and_answer(*args):
        for step in (2, 4):
            shutil.rmtree(RUN / f"checkpoints/step_{step:08d}", ignore_errors=True)
        return answer(*args)

    monkeypatch.setattr(questions, "answer", delete_and_answer)
    assert "step 4: missed, the run has deleted it" in watch().out
    assert [(line["step"], line.get("missed", False)) for line in lines()] == [(2, False), (4, True), (6, False)]
    content = (RUN / "evals.jsonl").read_bytes()
    assert watch().code == 0
    assert (RUN / "evals.jsonl").read_bytes() == content


def test_a_damaged_checkpoint_is_left_out_and_a_step_made_anew_is_scored_anew(cli, tiny_data, watch):
    assert cli("train", *TINY_RUN, *KEPT).code == 0
    weights = RUN / "checkpoints/step_00000004/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    shutil.copytree(RUN / "checkpoints/step_00000002", RUN / "checkpoints/step_00000003")
    (RUN / "checkpoints/step_00000003/config.json").unlink()  # half a copy
    result = watch()
    assert result.out.count("warning: step_00000004 is left out until it changes") == 1
    assert [line["step"] for line in lines()] == [2, 6]
    weights.write_bytes(content)
    assert watch().code == 0
    assert [line["step"] for line in lines()] == [2, 6, 4]
    assert cli("train", *TINY_RUN, *KEPT, "--resume=never", "--overwrite=True").code == 0
    assert not (RUN / "evals.jsonl").exists()  # it was the old run's
    assert watch().code == 0
    assert [line["step"] for line in lines()] == [2, 4, 6]


def test_after_a_rollback_scores_count_only_for_what_the_run_has_kept(tiny_data, tmp_path, cli):
    code, log = start_ranks(1, tmp_path, *TINY_RUN, "--max_iters=12", "--eval_interval=3", "--save_interval=1",
                            "--keep_last=0", "--max_bad_steps=2", NAN_STEPS="8-9")
    assert code == 0, log
    turns = [turn for record in records_of(RUN) if (turn := run_folder.restart_point(record))]
    assert len(turns) == 1
    went_back_to = turns[0][0]
    assert 0 < went_back_to < 9
    found = [watching.facts_of(folder, step, "made") | {"task": "a", "scores": {"a": {"acc": step}}}
             for step, folder in run_folder.step_folders(RUN).items()]
    again = {line["step"] for line in found} - {*range(went_back_to + 1)}
    stale = [line | {"next_seq": line["step"] * line["seqs_per_step"], "checkpoint": "gone"} for line in found
             if line["step"] in again]
    assert len(stale) > 2
    kept = run_folder.current_scores([*stale, *found], turns, 12)
    assert [line["checkpoint"] for line in kept] == ["made"] * len(found)
    assert run_folder.current_scores(stale, turns, 12) == []
    early = [line for line in found if line["step"] <= went_back_to]
    assert run_folder.current_scores(found, turns, went_back_to) == early


@pytest.mark.parametrize(("options", "message"), [
    (["--watch=nowhere", "--tasks=hellaswag"], "there is no run folder nowhere to watch: `mkdir -p nowhere`"),
    (["--watch=out", "--tasks=hellaswag"], "out is no run folder but holds some: watch one of them, out/tiny say"),
    (["--watch=out/tiny"], "watch=out/tiny is for --tasks=..."),
    (["--watch=out/tiny", "--tasks=hellaswag", "--json"], "leave out --json"),
    (["--watch=out/tiny", "--tasks=hellaswag", "--limit=-1"], "limit=-1 must be 0 (all) or more"),
])
def test_bad_input_is_one_line(refused, tmp_path, options, message):
    (tmp_path / "out/tiny").mkdir(parents=True)
    (tmp_path / "out/tiny/train_config.json").write_text("{}")
    assert message in refused("eval", *options)


def test_training_ends_in_the_same_bytes_beside_a_watcher_that_is_killed(cli, tiny_data, tmp_path, asked):
    """Of a run that keeps one checkpoint, in processes of their own."""
    def start(script: str, *args: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, ROOT / script, *args], cwd=tmp_path, text=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT)

    run = (*TINY_RUN, "--max_iters=60", "--eval_interval=5", "--keep_last=1")
    command = ("eval.py", f"--watch={RUN}", "--tasks=hellaswag", asked, *FIXED)
    RUN.mkdir(parents=True)
    first = start(*command)
    training = start("train.py", *run)
    end = time.monotonic() + 200
    while not (RUN / "evals.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.05)
    first.kill()
    first.wait()
    second = start(*command)
    outputs = [process.communicate(timeout=200)[0] for process in (training, second)]
    assert training.returncode == second.returncode == 0, outputs
    assert cli("train", *run, "--out_dir=out/alone").code == 0
    for file in ("model.safetensors", "training/optimizer.safetensors"):
        beside, alone = (folder / "checkpoints/latest" / file for folder in (RUN, Path("out/alone")))
        assert beside.read_bytes() == alone.read_bytes()
    steps = [line["step"] for line in lines()]
    assert steps[-1] == 60
    assert len(steps) == len({*steps})
