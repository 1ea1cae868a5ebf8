"""finished_runs.py: which runs a law is fitted to, and what is taken of them."""

import os
from pathlib import Path

import pytest
from conftest import TINY_RUN, records_of, write_run
from made_runs import OPTIONS, make_run

from flatgpt.training.finished_runs import differences, finished_run, gather
from model import GPT


def test_a_run_of_train_py_is_a_point_with_its_parameters_tokens_and_final_loss(cli, tiny_data):
    assert cli("train", *TINY_RUN).code == 0
    run = finished_run(Path("out/tiny"))
    num_params = GPT.from_pretrained("out/tiny").num_params(non_embedding=False)
    assert run.point == ("out/tiny", num_params, 6 * 128, records_of("out/tiny")[-1]["val/loss"])
    assert run.has_decayed
    assert len(run.fingerprint) == 64


@pytest.mark.parametrize(("reason", "options"), [
    ("not finished: step 6 of 10", {"step": 6}),
    ("not finished: step 10 of 20", {"max_iters": 20}),
    ("in the middle of its schedule: 10 steps of lr_decay_iters=600,000", {"lr_decay_iters": 600_000}),
    ("in the middle of its schedule: 10 steps of lr_decay_iters=11", {"lr_decay_iters": 11, "schedule": "wsd"}),
    ("its last validation loss is not a number", {"loss": None}),
    ("trained on no tokens", {"num_tokens": 0}),
    ("began with the weights of openai-community/gpt2", {"init_from": "openai-community/gpt2"})])
def test_a_run_that_cannot_be_compared_is_left_out_with_its_reason(tmp_path, reason, options):
    make_run(tmp_path / "good", loss=1.9)
    bad = make_run(tmp_path / "bad", **options)
    runs, left_out = gather([str(tmp_path / "good"), str(bad)])
    assert [Path(run.point.name).name for run in runs] == ["good"]
    assert reason in left_out[str(bad)]


def test_what_out_holds_besides_runs_is_left_out(tmp_path):
    folders = [make_run(tmp_path / "good")]
    for name in ("empty", "no_reports", "broken", "no_weights", "half", "file.jsonl"):
        folders.append(tmp_path / name)
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "no_reports", [], OPTIONS)
    (make_run(tmp_path / "broken") / "train_config.json").write_text("{")
    write_run(tmp_path / "no_weights", [{"step": 10, "tokens": 1, "val/loss": 2.0}], OPTIONS)
    trainer = next(make_run(tmp_path / "half").rglob("trainer.json"))
    trainer.write_text(trainer.read_text()[:-5])
    (tmp_path / "file.jsonl").write_text("{}")
    runs, left_out = gather([str(folder) for folder in folders])
    assert [run.point.name for run in runs] == [str(folders[0])]
    assert list(left_out) == [str(folder) for folder in folders[1:]]
    assert [reason.rpartition(": ")[2] for reason in left_out.values()][:2] == [
        "it has no train_config.json", "it has not reported anything yet"]
    with pytest.raises(FileNotFoundError, match="there is no run folder"):
        gather([str(tmp_path / "nowhere")])


def test_a_torn_line_at_the_end_is_passed_over(tmp_path):
    assert finished_run(make_run(tmp_path / "torn", torn='{"step": 10, "val/lo')).point.loss == 2.0


def test_the_same_run_counts_once_whatever_it_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(Path("a"))
    os.symlink("a", "link")
    make_run(Path("copy"))
    runs, left_out = gather(["a", "a/", "./a", "link", "copy"])
    assert [run.point.name for run in runs] == ["a"]
    assert left_out == dict.fromkeys(("link", "copy"), "the same run as a")


def test_stems_stand_back_for_the_branches_that_decay(tmp_path):
    stem = make_run(tmp_path / "stem", loss=2.2, schedule="wsd", lr_decay_iters=100)
    constant = make_run(tmp_path / "constant", loss=2.1, schedule="constant")
    branch = make_run(tmp_path / "branch", loss=1.9, schedule="wsd", init_from=str(stem), branch_from="10")
    runs, left_out = gather([str(stem), str(constant), str(branch)])
    assert [run.point.name for run in runs] == [str(branch)]
    assert set(left_out.values()) == {"its learning rate has not decayed, and that of other runs has"}
    runs, left_out = gather([str(stem), str(constant)])
    assert (len(runs), left_out) == (2, {})


def test_runs_on_other_data_are_refused(tmp_path):
    folders = [str(make_run(tmp_path / f"a{i}", num_tokens=1000 + i)) for i in range(5)]
    folders.append(str(make_run(tmp_path / "b", fingerprint="bb", dataset="other")))
    with pytest.raises(ValueError, match=r"2 kinds of data \(tiny: .*a0, .*a1, .*a2 and 2 more; other: .*b\)"):
        gather(folders)


def test_differences_of_the_recipe_are_told(tmp_path):
    runs, _ = gather([str(make_run(tmp_path / "a")), str(make_run(tmp_path / "b", loss=1.8, pos="rope"))])
    points = [run.point for run in runs]
    assert differences(runs, points) == {"pos": ["learned", "rope"]}
    assert differences(runs, points[:1]) == {}
