"""--documents=mask and pack in a run: resumed, on several processes, compiled, measured, and refused."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, files_of, records_of
from faults import start_ranks
from test_compiling import counting
from test_eval import results

from flatgpt.data.documents import find_edges
from flatgpt.data.packing import PackedOrder
from flatgpt.data.shards import open_dataset
from model import GPT

RUN = (*TINY_RUN, "--dataset=lines", "--log_interval=1", "--eval_iters=0")
MODEL = "checkpoints/step_00000006/model.safetensors"


@pytest.fixture
def lines(cli) -> None:
    """data/lines and data/others: documents of 1 to 60 bytes, in many shards."""
    for name in ("lines", "others"):
        Path(f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {i} {"so it goes " * (i * i % 6)}"}}\n'
                                                 for i in range(150)))
        assert cli("prepare_data", f"--input={name}.jsonl", "--tokenizer=byte", "--val_fraction=0.1",
                   "--shard_tokens=2000").code == 0


@pytest.mark.parametrize("options", [
    ("--documents=mask",), ("--documents=pack",), ("--documents=pack", "--dropout=0.1", "--pos=rope"),
    ("--documents=pack", "--dataset=lines:0.6,others:0.4")], ids=["mask", "pack", "dropout", "mixture"])
def test_two_halves_end_byte_identical_to_the_whole(cli, lines, options):
    assert cli("train", *RUN, *options, "--out_dir=out/whole").code == 0
    assert cli("train", *RUN, *options, "--max_iters=3").code == 0
    assert "resuming out/tiny at step 3" in cli("train", *RUN, *options).out
    assert Path("out/tiny", MODEL).read_bytes() == Path("out/whole", MODEL).read_bytes()


@pytest.mark.parametrize(("documents", "nproc", "layout"), [("mask", 2, ()), ("pack", 2, ("--parallel=fsdp",))])
def test_processes_read_the_batches_of_one_and_train_the_same_model(cli, lines, tmp_path, documents, nproc, layout):
    options = (*RUN, f"--documents={documents}")
    assert cli("train", *options, "--out_dir=out/one").code == 0
    code, log = start_ranks(nproc, tmp_path, *options, *layout, "--out_dir=out/two")
    assert code == 0, log
    one, two = ([record for record in records_of(f"out/{run}") if "batch_hash" in record] for run in ("one", "two"))
    assert [record["batch_hash"] for record in two] == [record["batch_hash"] for record in one]
    assert len({record["batch_hash"] for record in one}) == 6
    for key in ("train/loss", "grad_norm"):
        assert [record[key] for record in two] == pytest.approx([record[key] for record in one], abs=1e-3)
    for again in ("out/again", "out/alone"):  # as if killed after step 3
        shutil.copytree("out/two", again, symlinks=True)
        shutil.rmtree(Path(again, MODEL).parent)
    code, log = start_ranks(nproc, tmp_path, *options, *layout, "--out_dir=out/again")
    assert code == 0, log
    assert Path("out/again", MODEL).read_bytes() == Path("out/two", MODEL).read_bytes()
    assert cli("train", *options, "--out_dir=out/alone").code == 0
    losses = [records_of(run)[-1]["val/loss"] for run in ("out/alone", "out/two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_the_loss_is_the_mean_over_the_tokens_that_are_no_padding(cli, lines):
    """The first step of a packed run, against the documents of its windows one by one."""
    result = cli("train", *RUN, "--block_size=64", "--documents=pack", "--max_iters=1", "--eval_interval=100")
    assert cli("train", *RUN, "--block_size=64", "--max_iters=0", "--out_dir=out/start").code == 0
    model, split = GPT.from_pretrained("out/start"), open_dataset("lines").splits["train"]
    order = PackedOrder(split, [find_edges(tokens, 256) for tokens in split.shards], 64, 1337)
    assert f"sequences ({order.padding:.2%} padding)" in result.out
    losses = []
    for x, y, positions in zip(*map(torch.from_numpy, order.batch(0, 8)[:3])):
        begins = [*(positions == 0).nonzero().flatten().tolist(), 64]
        for begin, end in itertools.pairwise(begins):
            logits = model(x[None, begin:end])[0][0]
            losses += torch.nn.functional.cross_entropy(logits, y[begin:end], ignore_index=-1,
                                                        reduction="none")[y[begin:end] >= 0].tolist()
    assert len(losses) < 8 * 64
    assert records_of("out/tiny")[1]["train/loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_an_evaluation_measures_as_the_run_was_trained(cli, lines):
    assert cli("train", *RUN, "--documents=pack", "--pos=rope").code == 0
    trained = records_of("out/tiny")[-1]["val/loss"]
    options = ("--out_dir=out/tiny", "--json", "--device=cpu", "--dtype=float32")
    auto, mask, stream = (results(cli("eval", *options, *documents))["lines"]["loss"]
                          for documents in ((), ("--documents=mask",), ("--documents=stream",)))
    assert auto == mask == pytest.approx(trained, abs=1e-6)
    assert abs(stream - mask) > 1e-4
    for documents, is_within in ((), True), (("--documents=stream",), False):
        first = cli("eval", "--out_dir=out/tiny", "--device=cpu", *documents).out.splitlines()[0]
        assert first.endswith("attention within documents") == is_within
    assert results(cli("eval", *options, "--text=lines.jsonl"))["lines.jsonl"]["loss"] > 0
    Path("questions.jsonl").write_text(json.dumps(
        {"activity_label": "Tea", "ctx_a": "Pour it.", "ctx_b": "then", "endings": ["drink", "dr"], "label": 0}))
    questions = ("--tasks=hellaswag", "--hellaswag_file=questions.jsonl")
    assert (results(cli("eval", *options, *questions, "--documents=mask"))
            == results(cli("eval", *options, *questions, "--documents=stream")))


def test_documents_of_all_kinds_are_one_compilation(cli, lines, monkeypatch):
    graphs = counting(monkeypatch.setattr)
    assert cli("train", *RUN, "--documents=pack", "--compile=True").code == 0
    assert len(graphs) == 4


def test_data_made_before_there_was_an_index_trains_the_same(cli, lines):
    assert cli("train", *RUN, "--documents=pack").code == 0
    before = files_of(Path("data/lines"))
    for path in Path("data/lines").glob("*.documents.npy"):
        path.unlink()
    assert cli("train", *RUN, "--documents=pack", "--out_dir=out/other").code == 0
    assert Path("out/tiny", MODEL).read_bytes() == Path("out/other", MODEL).read_bytes()
    assert files_of(Path("data/lines")).keys() <= before.keys()


def test_a_run_keeps_how_it_treats_documents(cli, refused, lines):
    assert cli("train", *RUN, "--max_iters=3").code == 0
    before = files_of(Path("out"))
    assert "documents was stream, is mask" in refused("train", *RUN, "--documents=mask")
    assert files_of(Path("out")) == before
    other = cli("train", *RUN, "--documents=mask", "--eval_only=True").out
    assert "it is not measured as it was trained: documents was stream, is mask" in other
    assert "not measured" not in cli("train", *RUN, "--eval_only=True").out


@pytest.mark.parametrize(("options", "words"), [
    (("--dataset=tiny",), "nothing separates the documents of tiny, because its tokenizer has no end-of-text token"),
    (("--model=lstm",), "is for model=gpt: a lstm reads on across documents"),
    (("--documents=packed",), "documents")])
def test_documents_that_cannot_be_told_apart_are_refused(refused, lines, tiny_data, options, words):
    for documents in ("mask", "pack"):
        assert words in refused("train", *RUN, f"--documents={documents}", *options)
    assert not Path("out").exists()


def test_unknown_tokens_have_no_known_documents(refused, lines):
    shutil.copytree("data/lines", "data/bare")
    for path in Path("data/bare").iterdir():
        if path.suffix != ".bin":
            path.unlink()
    line = refused("train", *RUN, "--dataset=bare", "--vocab_size=300", "--documents=pack")
    assert "where the documents of bare begin is not known, because its tokenizer is not" in line
