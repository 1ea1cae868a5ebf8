"""Run folders as copying leaves them: whatever became of the links, a copy does what the original does."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, TINY_RUN, files_of, records_of

from flatgpt.run_folder import read_trainer, verify

RUN = (*TINY_RUN, "--eval_interval=1", "--keep_last=2")
LOSSES = (9.0, 3.0, 2.0, 2.5, 2.6, 2.4, 2.3, 2.2, 2.1, 2.1)  # of the steps 0, 1, ...: the best is step 2's


@pytest.fixture
def scripted(monkeypatch):
    """scripted(at): the next evaluations of train.py find LOSSES from that step on."""

    def script(at: int) -> None:
        left = iter(LOSSES[at:])
        monkeypatch.setattr("flatgpt.training.metrics.Validation.losses",
                            lambda *args, **kwargs: {"val/loss": next(left, 9.0)})

    return script


@pytest.fixture
def original(cli, tiny_data, scripted) -> Path:
    """A run of six steps, of which the checkpoints of 2, the best, 5 and 6 are kept."""
    scripted(0)
    assert cli("train", *RUN, "--max_iters=6", "--out_dir=out/run").code == 0
    assert sorted(os.listdir("out/run/checkpoints")) == ["best", "latest", *steps(2, 5, 6)]
    assert os.readlink("out/run/checkpoints/best") == "step_00000002"
    return Path("out/run")


def steps(*numbers: int) -> list[str]:
    return [f"step_{number:08d}" for number in numbers]


def without_links(run: Path, to: Path) -> None:
    shutil.copytree(run, to, symlinks=True)
    for name in ("best", "latest"):
        (to / "checkpoints" / name).unlink()


def with_links_followed(run: Path, to: Path) -> None:
    shutil.copytree(run, to)


def with_links_as_text(run: Path, to: Path) -> None:
    without_links(run, to)
    for name in ("best", "latest"):
        (to / "checkpoints" / name).write_text(os.readlink(run / "checkpoints" / name))


def with_dangling_links(run: Path, to: Path) -> None:
    without_links(run, to)
    for name in ("best", "latest"):
        (to / "checkpoints" / name).symlink_to(f"/nowhere/{name}")


def with_links_to_the_original(run: Path, to: Path) -> None:
    without_links(run, to)
    for name in ("best", "latest"):
        (to / "checkpoints" / name).symlink_to((run / "checkpoints" / "step_00000005").resolve())


def with_swapped_links(run: Path, to: Path) -> None:
    without_links(run, to)
    (to / "checkpoints" / "best").symlink_to("step_00000006")
    (to / "checkpoints" / "latest").symlink_to("step_00000002")


def with_the_best_under_its_link_alone(run: Path, to: Path) -> None:
    with_links_followed(run, to)
    shutil.rmtree(to / "checkpoints" / "step_00000002")


def with_half_of_the_best_beside_its_link(run: Path, to: Path) -> None:
    with_links_followed(run, to)
    (to / "checkpoints" / "step_00000002" / "model.safetensors").unlink()


def amid_clutter(run: Path, to: Path) -> None:
    """What desktops, clouds and people add, and other times."""
    without_links(run, to)
    checkpoints = to / "checkpoints"
    shutil.copytree(checkpoints / "step_00000005", checkpoints / "step_00000250 (1)")
    shutil.copytree(checkpoints / "step_00000005", checkpoints / "step_00000250.bak")
    for name in ("step_00000250.zip", "step_00000300", ".DS_Store", "desktop.ini", "._step_00000006"):
        (checkpoints / name).write_text("none of ours")
        (checkpoints / "step_00000006" / name).write_text("none of ours")
    for path in to.rglob("*"):
        os.utime(path, (0, 0))


def made_before_the_record(run: Path, to: Path) -> None:
    shutil.copytree(run, to, symlinks=True)
    for folder in (to / "checkpoints").glob("step_*"):
        forget_best_step(folder)


def forget_best_step(folder: Path) -> None:
    path, sums = folder / "training" / "trainer.json", folder / "SHA256SUMS"
    before, trainer = path.read_bytes(), read_trainer(folder)
    del trainer["best_step"]
    path.write_text(json.dumps(trainer))
    old, new = (hashlib.sha256(content).hexdigest() for content in (before, path.read_bytes()))
    sums.write_text(sums.read_text().replace(old, new))


def what_it_does(cli, run: str) -> dict[str, object]:
    """What the scripts that read say of a run, and the models they export of it."""
    shown = {script: cli(script, *options).out for script, options in {
        "sample": (f"--out_dir={run}", "--num_samples=1", "--max_new_tokens=20", "--device=cpu"),
        "eval": (f"--out_dir={run}", "--device=cpu", "--eval_iters=2")}.items()}
    shown["sample"] = re.sub("[0-9.]+ tokens/s", "", shown["sample"])
    for which in ("best", "latest", "step_5"):
        shutil.rmtree("exported", ignore_errors=True)
        result = cli("export", f"--run={run}", "--to=exported", f"--checkpoint={which}")
        shown[which] = result.code, result.err, Path("exported", "model.safetensors").read_bytes()
        by_path = cli("sample", f"--init_from={run}/checkpoints/{which}", "--num_samples=1", "--max_new_tokens=20",
                      "--device=cpu") if which in os.listdir(f"{run}/checkpoints") else None
        assert by_path is None or by_path.code == 0
    assert cli("report", run).code == 0
    shown["report"] = re.search('"parameters": [0-9]+', Path("report.html").read_text())[0]
    return {key: json.loads(json.dumps(value).replace(run, "RUN")) if isinstance(value, str) else value
            for key, value in shown.items()}


COPIES = (without_links, with_links_followed, with_links_as_text, with_dangling_links, with_links_to_the_original,
          with_swapped_links, with_the_best_under_its_link_alone, with_half_of_the_best_beside_its_link, amid_clutter,
          made_before_the_record)
IN_THE_TEST = (without_links, with_links_followed, with_links_as_text, made_before_the_record)  # the rest in the soak


@pytest.fixture
def copied(request, original) -> Path:
    request.param(original, Path("out/copy"))
    return Path("out/copy")


def go_on(cli, scripted, run: Path) -> dict[str, bytes]:
    """Train three more steps; the weights and the optimiser's state of the checkpoints that are then there."""
    scripted(7)
    assert cli("train", *RUN, "--max_iters=9", f"--out_dir={run}").code == 0
    checkpoints = run / "checkpoints"
    assert {name for name in os.listdir(checkpoints) if re.fullmatch("step_[0-9]+", name)} - {
        "step_00000300"} == {*steps(2, 8, 9)}
    assert os.readlink(checkpoints / "best") == "step_00000002"
    assert os.readlink(checkpoints / "latest") == "step_00000009"
    assert read_trainer(checkpoints / "step_00000009")["best_step"] == 2
    for name in steps(2, 8, 9):
        verify(checkpoints / name)
    return {f"{name}/{part}": (checkpoints / name / part).read_bytes() for name in (*steps(2, 8, 9), "best", "latest")
            for part in ("model.safetensors", "training/optimizer.safetensors")}


ORIGINALS: list = []  # what the original does and how it goes on, the same in each test


@pytest.mark.parametrize("copied", [pytest.param(copy, marks=() if copy in IN_THE_TEST else pytest.mark.soak)
                                    for copy in COPIES], indirect=True, ids=lambda copy: copy.__name__)
def test_a_copy_writes_measures_exports_and_goes_on_as_the_original(cli, original, copied, scripted):
    before = files_of(copied)
    if not ORIGINALS:
        ORIGINALS.append(what_it_does(cli, str(original)))
        shutil.copytree(original, "out/other", symlinks=True)  # the copy may have links to the original
        ORIGINALS.append(go_on(cli, scripted, Path("out/other")))
    wanted, trained = dict(ORIGINALS[0]), ORIGINALS[1]
    assert "(step_00000002)" in wanted["sample"]
    found = what_it_does(cli, str(copied))
    if not copied.joinpath("checkpoints/step_00000002/model.safetensors").is_file():  # it is called as it lies there
        for script in ("sample", "eval"):
            found[script] = found[script].replace("(best)", "(step_00000002)")
    assert found == wanted
    assert files_of(copied) == before  # reading changes nothing
    assert go_on(cli, scripted, copied) == trained


@pytest.mark.parametrize("name", ["best", "latest"])
def test_of_a_run_one_real_folder_in_a_links_place_is_enough(cli, original, scripted, name):
    step = {"best": 2, "latest": 6}[name]
    Path("out/copy/checkpoints").mkdir(parents=True)
    shutil.copytree(original / "checkpoints" / name, f"out/copy/checkpoints/{name}")
    result = cli("sample", "--out_dir=out/copy", "--num_samples=1", "--max_new_tokens=20", "--device=cpu")
    assert (result.code, result.err) == (0, "")
    assert cli("prepare_data", "--input=tiny.txt", "--name=again", "--tokenizer=out/copy").code == 0
    scripted(step + 1)
    result = cli("train", *RUN, f"--max_iters={step + 1}", "--out_dir=out/copy")
    assert f"resuming out/copy at step {step}" in result.out
    assert sorted(os.listdir("out/copy/checkpoints")) == ["best", "latest", *steps(step, step + 1)]
    assert os.readlink("out/copy/checkpoints/best") == f"step_{step:08d}"  # of what is there
    assert os.readlink("out/copy/checkpoints/latest") == f"step_{step + 1:08d}"


@pytest.mark.parametrize("path", ["best", "latest"])
def test_the_path_of_a_link_means_the_checkpoint_where_there_are_no_links(cli, original, refused, path):
    options = ("--num_samples=1", "--max_new_tokens=20", "--device=cpu")
    wanted = cli("sample", f"--init_from={original}/checkpoints/{path}", *options).out.splitlines()[1:-1]
    for number, copy in enumerate((without_links, with_links_as_text, with_dangling_links)):
        copy(original, Path(f"out/{number}"))
        named = f"out/{number}/checkpoints/{path}"
        assert cli("sample", f"--init_from={named}", *options).out.splitlines()[1:-1] == wanted
        assert cli("prepare_data", "--input=tiny.txt", f"--name=tiny{number}", f"--tokenizer={named}").code == 0
    assert "no model at 'out/none/checkpoints/best'" in refused("sample", "--init_from=out/none/checkpoints/best")


@pytest.mark.parametrize("lost", [["config.json", "SHA256SUMS"], ["model.safetensors"], ["training/trainer.json"]])
def test_of_half_a_copy_what_is_whole_is_used_and_what_is_not_is_named(cli, original, refused, lost):
    without_links(original, Path("out/copy"))
    checkpoints = Path("out/copy/checkpoints")
    for name in lost:
        (checkpoints / "step_00000006" / name).unlink()
    (checkpoints / "step_00000007").mkdir()
    assert "(step_00000002)" in cli("sample", "--out_dir=out/copy", "--num_samples=1", "--device=cpu").out
    out = cli("export", "--run=out/copy", "--to=ex", "--checkpoint=latest").out
    assert out.startswith("made the model folder ex from step 5 of")
    for name in lost:
        (checkpoints / "step_00000002" / name).unlink(missing_ok=True)
    if lost != ["training/trainer.json"]:
        assert "step_00000002" in refused("sample", "--out_dir=out/copy")
        assert "step_00000002" in refused("export", "--run=out/copy", "--to=ex2")
    result = cli("train", *RUN, "--max_iters=6", "--out_dir=out/copy")
    assert "resuming out/copy at step 5" in result.out
    assert "step_00000007 has no SHA256SUMS" in result.out
    assert result.code == 0


@pytest.mark.parametrize("fault", [OSError(95, "Operation not supported"), NotImplementedError("no links here"),
                                   PermissionError(1, "Operation not permitted")], ids=repr)
def test_a_disk_without_links_costs_one_sentence(cli, tiny_data, scripted, monkeypatch, fault):
    def fail(*args, **kwargs):
        raise fault

    monkeypatch.setattr("os.symlink", fail)
    scripted(0)
    result = cli("train", *RUN, "--max_iters=6")
    assert result.code == 0, result.err
    [warning] = [line for line in result.out.splitlines() if "warning" in line and "tiny/checkpoints" in line]
    assert "the links best and latest could not be made in out/tiny/checkpoints" in warning
    assert sorted(os.listdir("out/tiny/checkpoints")) == steps(2, 5, 6)
    assert "(step_00000002)" in cli("sample", "--out_dir=out/tiny", "--num_samples=1", "--device=cpu").out
    scripted(7)
    assert cli("train", *RUN, "--max_iters=8").out.count("could not be made") == 1
    assert sorted(os.listdir("out/tiny/checkpoints")) == steps(2, 7, 8)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="modes are POSIX's")
def test_a_copy_of_what_was_read_only_goes_on(cli, original, scripted, monkeypatch):
    if os.geteuid() == 0 and not all(folder.stat().st_mode & 0o001 for folder in (ROOT, *ROOT.parents)):
        pytest.skip("the code lies where nobody but root, whom no mode stops, may read it")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own lies where root alone may go
        shutil.copytree(".", folder, symlinks=True, dirs_exist_ok=True)
        monkeypatch.chdir(folder)
        run, is_root = Path("out/run"), os.geteuid() == 0
        for path in run.rglob("*"):
            if not path.is_symlink():
                path.chmod(0o444 if path.is_file() else 0o555 if path.name != "checkpoints" else 0o755)
        if is_root:  # whom no mode stops
            for path in (Path(), *Path().rglob("*")):
                os.chown(path, 65534, -1, follow_symlinks=False)
            os.seteuid(65534)
        try:
            scripted(7)
            result = cli("train", *RUN, "--max_iters=9", "--out_dir=out/run")
        finally:
            if is_root:
                os.seteuid(0)
        assert result.code == 0, result.err
        assert "could not" not in result.out
        assert records_of(run)[-1]["step"] == 9
        assert sorted(os.listdir(run / "checkpoints")) == ["best", "latest", *steps(2, 8, 9)]
        monkeypatch.undo()
