"""A run folder's records, and trainer.json: values of another kind than a run writes are named, or left out."""

import pytest

from flatgpt import files
from flatgpt.run_folder import read_records, read_trainer


@pytest.mark.parametrize(("key", "value"), [
    ("step", None), ("step", "3"), ("step", 3.5), ("next_seq", [1]), ("best_val_loss", "low"), ("best_step", {}),
    ("options", None), ("judge", 1), ("elapsed_s", None)])
def test_a_trainer_json_that_no_run_can_go_on_from_is_named(tmp_path, key, value):
    (tmp_path / "training").mkdir()
    files.write_json(tmp_path / "training" / "trainer.json", {"step": 3, key: value})
    with pytest.raises(ValueError, match=rf"trainer\.json has unexpected content: {key} is "):
        read_trainer(tmp_path)
    files.write_json(tmp_path / "training" / "trainer.json", {"step": 3, "an": "addition"})
    assert read_trainer(tmp_path) == {"step": 3, "an": "addition"}


def test_of_records_what_is_of_another_kind_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "tokens": "64", "val/loss": [3], "mfu": null, "fault": 1, "mine": {"a": 1}}\n'
                    '{"step": "2"}\n[3]\n{"step": 4, "tokens": 64, "train/loss": null, "samples": "x"}\n{"ste')
    assert read_records(path) == [{"step": 1, "mfu": None, "mine": {"a": 1}},
                                        {"step": 4, "tokens": 64, "train/loss": None}]
    assert read_records(tmp_path / "none.jsonl") == []
