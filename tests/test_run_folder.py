"""A run folder's records, and trainer.json: values of another kind than a run writes are named, or left out."""

import json

import pytest

from flatgpt import files, run_folder
from flatgpt.run_folder import read_records, read_trainer


@pytest.mark.parametrize(("key", "value"), [
    ("step", None), ("step", "3"), ("step", 3.5), ("next_seq", [1]), ("best_val_loss", "low"), ("best_step", {}),
    ("options", None), ("spike_detector", 1), ("elapsed_s", None)])
def test_a_trainer_json_that_no_run_can_go_on_from_is_named(tmp_path, key, value):
    (tmp_path / "training").mkdir()
    files.write_json(tmp_path / "training" / "trainer.json", {"step": 3, key: value})
    with pytest.raises(ValueError, match=rf"trainer\.json has unexpected content: {key} is "):
        read_trainer(tmp_path)
    files.write_json(tmp_path / "training" / "trainer.json", {"step": 3, "an": "addition"})
    assert read_trainer(tmp_path) == {"step": 3, "an": "addition"}
    files.write_json(tmp_path / "training" / "trainer.json", {"step": 3, "judge": {"mean": 1.0}})  # an older one
    assert read_trainer(tmp_path) == {"step": 3, "spike_detector": {"mean": 1.0}}


def test_of_records_what_is_of_another_kind_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "tokens": "64", "val/loss": [3], "mfu": null, "fault": 1, "mine": {"a": 1}}\n'
                    '{"step": "2"}\n[3]\n{"step": 4, "tokens": 64, "train/loss": null, "samples": "x"}\n{"ste')
    assert read_records(path) == [{"step": 1, "mfu": None, "mine": {"a": 1}},
                                        {"step": 4, "tokens": 64, "train/loss": None}]
    assert read_records(tmp_path / "none.jsonl") == []
    nines = "9" * 400  # which no float holds
    path.write_text(f'{{"step": {nines}}}\n{{"step": 5, "tokens": {nines}, "val/loss": -{nines}, "mine": true}}\n')
    assert read_records(path) == [{"step": 5, "mine": True}]


# Scores


def eval_line(step: int, task: str = "a", **more) -> dict:
    """A line of evals.jsonl, of a run that reads 8 sequences a step."""
    return {"step": step, "tokens": 100 * step, "next_seq": 8 * step, "seqs_per_step": 8, "checkpoint": f"{step}",
            "task": task, "scores": {task: {"acc": 0.5, "acc_stderr": 0.1, "questions": 7}}} | more


def test_scores_count_where_step_and_data_agree_with_the_last_restart_before_them():
    """Back from 30 to 10, where the data goes on at 30's; later from 40 to 20."""
    restart_points = [(10, 240), (20, 480)]
    first = [eval_line(step) for step in (5, 10, 15, 20, 25, 30)]
    second = [eval_line(step, next_seq=240 + 8 * (step - 10)) for step in (15, 20, 25, 40)]
    third = [eval_line(step, next_seq=480 + 8 * (step - 20)) for step in (25, 30)]
    kept = run_folder.current_scores([*first, *second, *third], restart_points, 30)
    assert [(line["step"], line["next_seq"]) for line in kept] == [
        (5, 40), (10, 80), (15, 280), (20, 320), (25, 520), (30, 560)]
    assert run_folder.current_scores(first, [], 12) == first[:2]  # the run began anew, and is at 12
    again = eval_line(5, scores={"a": {"acc": 0.7}})
    assert run_folder.current_scores([*first[:2], again], [], 12) == [again, first[1]]
    untold = {key: value for key, value in first[2].items() if key not in ("next_seq", "seqs_per_step")}
    assert run_folder.current_scores([untold], restart_points, 30) == [untold]


def test_lines_that_are_no_scores_are_left_out(tmp_path):
    good = [eval_line(1), {"step": 2, "checkpoint": "b", "missed": True}]
    bad = ['{"torn', "[]", "7", '{"step": true}', *map(json.dumps, (
        eval_line(3, checkpoint=5), eval_line(3) | {"step": "3"}, eval_line(3, scores=[]), eval_line(10**400),
        eval_line(3, tokens=float("nan")), {"step": 3, "checkpoint": "c"}))]
    odd = eval_line(4, scores={"a": {"acc": 0.5, "x": None, "y": float("inf"), "z": 10**400, "w": True}, "b": 1})
    (tmp_path / "evals.jsonl").write_text("\n".join([*map(json.dumps, good), *bad, json.dumps(odd)]))
    found = run_folder.read_records(tmp_path / "evals.jsonl", run_folder.parse_eval)
    assert [line["step"] for line in found] == [1, 2, 4]
    assert found[2]["scores"] == {"a": {"acc": 0.5}}
    assert run_folder.read_records(tmp_path / "none.jsonl", run_folder.parse_eval) == []


def test_scores_become_curves_by_task_and_metric():
    line = eval_line(3, scores={"a": {"acc": 0.5, "acc_stderr": 0.1, "questions": 7}, "b": {
        "exact_match,strict": 0.2, "exact_match_stderr,strict": 0.3, "perplexity": 9.0}},
        lower_is_better=["perplexity"])
    found = run_folder.curves_of_scores([line])
    assert {key: (curve["points"][0]["value"], curve["points"][0]["stderr"], curve["is_lower_better"])
            for key, curve in found.items()} == {
        "a/acc": (0.5, 0.1, False), "b/exact_match,strict": (0.2, 0.3, False), "b/perplexity": (9.0, None, True)}
