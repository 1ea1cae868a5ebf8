"""Averages of checkpoints: equal to numpy's, as a folder that says what went in; what does not fit is refused."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, files_of, records_of
from safetensors.numpy import load_file
from safetensors.torch import save_file
from test_export import card_of, run_python_block

from flatgpt import files
from flatgpt.data.tokenizer import load_tokenizer
from flatgpt.models.averaging import write_average

RUN = (*TINY_RUN, "--max_iters=4", "--save_interval=1", "--keep_last=0")
TINY = Path("out/tiny")


@pytest.fixture
def run(cli, tiny_data) -> Path:
    """A run whose steps 1 to 4 are kept, step 4 being whole in the validation loss."""
    assert cli("train", *RUN).code == 0
    return TINY


def tensors_of(folder: str | Path) -> dict[str, np.ndarray]:
    return load_file(Path(folder, "model.safetensors"))


def step(number: int, run: Path = TINY) -> Path:
    return run / f"checkpoints/step_{number:08d}"


def averaged(checkpoints: list[Path], weights: list[float] | None = None) -> dict[str, np.ndarray]:
    """By numpy."""
    each = [tensors_of(folder) for folder in checkpoints]
    return {name: np.average(np.stack([one[name] for one in each]).astype(np.float64), axis=0, weights=weights
                             ).astype(np.float32) for name in each[0]}


def assert_bytes(folder: str, expected: dict[str, np.ndarray]) -> None:
    found = tensors_of(folder)
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


@pytest.mark.parametrize(("options", "steps", "weights"), [
    (["--average=3"], [2, 3, 4], None),
    (["--average=step_1,3,latest"], [1, 3, 4], None),
    (["--average=00004,step_1", "--average_weights=1,2.5"], [4, 1], [1, 2.5])])
def test_an_average_is_numpys(cli, run, options, steps, weights):
    result = cli("export", f"--run={run}", "--to=mean", *options)
    assert result.code == 0, result.err
    assert "from the average of step " + ", step ".join(f"{n} of out/tiny" for n in steps) in result.out
    expected = averaged([step(n) for n in steps], weights)
    assert_bytes("mean", expected)
    plain = np.mean(np.stack([tensors_of(step(n))["transformer.ln_f.weight"] for n in steps]), axis=0, dtype=np.float64)
    if not weights:
        assert np.array_equal(expected["transformer.ln_f.weight"], plain.astype(np.float32))


@pytest.mark.parametrize("shape", [("--model=lstm", "--n_layer=1"), ("--model=bigram",),
                                   ("--pos=rope", "--norm=rmsnorm", "--mlp=swiglu", "--tie_embeddings=False")])
def test_models_of_all_kinds_are_averaged(cli, tiny_data, shape):
    assert cli("train", *RUN, *shape).code == 0
    assert cli("export", "--run=out/tiny", "--to=mean", "--average=2").code == 0
    assert_bytes("mean", averaged([step(3), step(4)]))
    result = cli("sample", "--init_from=mean", "--num_samples=1", "--max_new_tokens=5")
    assert result.code == 0, result.err
    assert cli("eval", "--init_from=mean", "--dataset=tiny").code == 0


def test_several_runs_are_averaged_and_the_card_says_what_went_in(cli, run, capsys):
    pytest.importorskip("transformers")
    assert cli("train", *RUN, "--seed=1", "--dropout=0.1", "--out_dir=out/other").code == 0
    other = Path("out/other")
    assert cli("export", "--run=out/tiny,out/other", "--to=mean", "--average=step_2,4", "--average_weights=1,1,2,4"
               ).code == 0
    assert_bytes("mean", averaged([step(2), step(4), step(2, other), step(4, other)], [1, 1, 2, 4]))
    _, text = card_of("mean")
    at_2 = {name: [r for r in records_of(f"out/{name}") if r["step"] == 2 and "val/loss" in r]
            for name in ("tiny", "other")}
    assert at_2 == {"tiny": [], "other": []}  # steps that were not evaluated have no loss
    at_4 = {name: next(r["val/loss"] for r in records_of(f"out/{name}") if r["step"] == 4 and "val/loss" in r)
            for name in ("tiny", "other")}
    assert re.findall(r"^\| `.*$", text, re.M) == [
        "| `tiny` | 2 | 256 | 1 | – |", f"| `tiny` | 4 | 512 | 1 | {at_4['tiny']:.4f} |",
        "| `other` | 2 | 256 | 2 | – |", f"| `other` | 4 | 512 | 4 | {at_4['other']:.4f} |"]
    assert "Its weights are the average of 4 checkpoints." in text
    assert "| seed | 1337; 1 |" in text
    head = text.partition("## Average")[0]
    assert "loss" not in head  # none of the average was measured
    command = re.search(r"```sh\npython (\w+)\.py (.*)\n```", text)
    result = cli(command[1], *command[2].split())
    assert result.code == 0, result.err
    assert run_python_block(text, capsys)
    assert cli("export", "--run=out/tiny,out/other", "--to=latest", "--checkpoint=latest").code == 0
    assert_bytes("latest", averaged([step(4), step(4, other)]))


REFUSED = [
    (["--average=5"], "average=5 is a number of a run's last checkpoints, and out/tiny has 4 checkpoints (steps 1, 2"),
    (["--average=0"], "average=0 is a number of"), (["--average=1"], "takes two checkpoints or more"),
    (["--average=step_2"], "takes two checkpoints or more"),
    (["--average=1,7"], "there is no checkpoint 'step_7' in out/tiny; it has best, latest, step_1, step_2, step_3"),
    (["--average=1,"], "there is no checkpoint '' in out/tiny"), (["--average=-1"], "there is no checkpoint '-1'"),
    (["--average=latest,4"], "the same checkpoint is named twice"),
    (["--run=out/tiny,out/../out/tiny"], "the same checkpoint is named twice"),
    (["--run=out/tiny,out/none"], "out/none is not a run folder with checkpoints"),
    (["--average=2", "--average_weights=1"], "has 1 weights, and the average 2 checkpoints"),
    (["--average=2", "--average_weights=1,-1"], "weights are 0 or more"),
    (["--average=2", "--average_weights=0,0"], "not all 0"), (["--average=2", "--average_weights=1,nan"], "finite"),
    (["--average=2", "--average_weights=1,x"], "should be numbers with commas between them"),
    (["--average_weights=1"], "average_weights=1 is for --average, or several runs"),
    (["--average=2", "--checkpoint=best"], "checkpoint and average both say which checkpoints are meant"),
]


def test_what_cannot_be_averaged_is_one_line_and_writes_nothing(refused, run):
    before = files_of(Path.cwd())
    for options, message in REFUSED:
        assert message in refused("export", "--run=out/tiny", "--to=mean", *options)
        assert files_of(Path.cwd()) == before


def test_runs_of_other_shapes_tokens_and_kinds_are_refused(cli, refused, run, tmp_path):
    for options, message in (("--n_embd=32", "n_embd is 32 and 16"), ("--pos=rope", "pos is rope and learned"),
                             ("--model=lstm", "model is lstm and gpt"), ("--bias=True", "bias is True and False")):
        out = f"out/{options.strip('-')}"
        assert cli("train", *RUN, options, "--max_iters=1", f"--out_dir={out}").code == 0
        error = refused("export", f"--run=out/tiny,{out}", "--to=mean")
        assert "cannot be averaged: " in error
        assert message in error
    text = (tmp_path / "tiny.txt").read_text().swapcase()  # as many characters, in another order
    Path("others.txt").write_text(text)
    assert cli("prepare_data", "--input=others.txt", "--name=others", "--tokenizer=char").code == 0
    assert cli("train", *RUN, "--dataset=others", "--out_dir=out/others").code == 0
    wrong = refused("export", "--run=out/tiny,out/others", "--to=mean")
    same_size = load_tokenizer(TINY / "checkpoints/latest").vocab_size == load_tokenizer(
        Path("out/others/checkpoints/latest")).vocab_size
    assert ("their tokenizers give other ids" if same_size else "vocab_size is") in wrong
    assert not Path("mean").exists()


def test_a_damaged_checkpoint_or_a_full_disk_leaves_no_average(refused, run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_text", lambda path, text: (_ for _ in ()).throw(OSError(28, "No space left", "x")))
        assert "No space left" in refused("export", f"--run={run}", "--to=hf/mean", "--average=2")
    assert list(Path("hf").iterdir()) == []
    with open(step(3) / "model.safetensors", "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\1")
    assert "model.safetensors has changed since it was saved" in refused(
        "export", f"--run={run}", "--to=hf/mean", "--average=2")
    shutil.rmtree(step(3) / "training")
    assert "step_00000003 is damaged" in refused("export", f"--run={run}", "--to=hf/mean", "--average=2")
    assert list(Path("hf").iterdir()) == []


def test_a_run_that_diverged_is_in_no_average(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder, value in ((whole, 1.0), (broken, math.nan)):
        folder.mkdir()
        save_file({"wte": torch.ones(2), "head": torch.tensor([1.0, value])}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"head of the average has values that are no finite numbers: .*broken"):
        write_average([whole, broken], [1, 1], tmp_path / "mean.safetensors")
    assert not (tmp_path / "mean.safetensors").exists()


def test_a_folder_with_commas_in_its_name_is_one_run(cli, run):
    run.rename("out/a,b")
    assert cli("export", "--run=out/a,b", "--to=one").code == 0
    assert json.loads(Path("one/config.json").read_text())["model_type"] == "gpt2"
    assert "| step | 4 of 4 |" in card_of("one")[1]
