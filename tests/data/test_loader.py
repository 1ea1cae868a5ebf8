"""loader.py: batches and how ranks share them, mixtures of data sets, reading ahead."""

import itertools
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_shard
from hypothesis import given
from hypothesis import strategies as st

from flatgpt.data.loader import (
    DataConfig,
    empty_batch,
    max_documents,
    open_mixture,
    pin,
    pin_batch,
    plan_batches,
    prefetch,
    to_device,
)
from flatgpt.data.order import Batch, positions_in_documents

CPU = torch.device("cpu")

# The batch plan


@given(per_rank=st.integers(1, 500), world_size=st.integers(1, 9), batch_size=st.integers(1, 64))
def test_the_micro_batch_is_the_largest_divisor_up_to_batch_size(per_rank, world_size, batch_size):
    config = DataConfig(batch_size=batch_size, total_batch_size=per_rank * world_size * 16)
    plan = plan_batches(config, {"batch_size": "", "total_batch_size": ""}, 16, world_size)
    assert plan.seqs_per_step == plan.world_size * plan.accumulation_steps * plan.micro_batch == per_rank * world_size
    assert plan.world_size == world_size
    assert plan.micro_batch == max(n for n in range(1, batch_size + 1) if per_rank % n == 0)


def test_the_global_batch_is_nanogpts_product_or_total_batch_size():
    config = DataConfig(gradient_accumulation_steps=5 * 8, batch_size=12)
    assert plan_batches(config, {}, 1024, 8).seqs_per_step == 480
    config.total_batch_size = 480 * 1024
    assert plan_batches(config, {"gradient_accumulation_steps": "40"}, 1024, 8).accumulation_steps == 5
    config.total_batch_size = 512 * 1024
    assert plan_batches(config, {}, 1024, 8).seqs_per_step == 512
    with pytest.raises(ValueError, match=r"524288 tokens, but .* 491520; leave gradient_accumulation_steps out"):
        plan_batches(config, {"gradient_accumulation_steps": "40"}, 1024, 8)


@pytest.mark.parametrize(("seqs", "world_size", "nearest"), [(10, 4, [8, 12]), (3, 4, [4]), (17, 8, [16, 24])])
def test_a_batch_that_does_not_divide_names_the_nearest_that_do(seqs, world_size, nearest):
    with pytest.raises(ValueError, match=f"{seqs} sequences .* {world_size} processes") as caught:
        plan_batches(DataConfig(gradient_accumulation_steps=seqs, batch_size=1), {}, 32, world_size)
    offered = [int(tokens) for tokens in re.findall(r"--total_batch_size=(\d+)", str(caught.value))]
    assert offered == [32 * n for n in nearest]
    for tokens in offered:
        assert plan_batches(DataConfig(total_batch_size=tokens), {}, 32, world_size).seqs_per_step == tokens // 32


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": -1}, {"total_batch_size": -32},
                                     {"total_batch_size": 33}])
def test_a_batch_that_is_none_is_refused(options):
    key, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{key}={value} .*positive"):
        plan_batches(DataConfig(**options), {}, 32, 1)


def test_batch_size_0_asks_what_fits():
    config, asked = DataConfig(batch_size=0, total_batch_size=48 * 32), []
    plan = plan_batches(config, {}, 32, 2, lambda seqs_per_rank: asked.append(seqs_per_rank) or 6)
    assert asked == [24]
    assert (config.batch_size, plan.micro_batch, plan.accumulation_steps) == (6, 6, 4)
    config = DataConfig(batch_size=0, total_batch_size=48 * 32, gradient_accumulation_steps=5)  # a config file's 5
    assert plan_batches(config, {"gradient_accumulation_steps": "5"}, 32, 1).seqs_per_step == 48
    with pytest.raises(ValueError, match="add --total_batch_size=N"):
        plan_batches(DataConfig(batch_size=0), {}, 32, 1)
    with pytest.raises(ValueError, match="batch_size=-1 must be 0 or more"):
        plan_batches(DataConfig(batch_size=-1), {}, 32, 1)


def test_windows_of_no_tokens_are_refused():
    with pytest.raises(ValueError, match="block_size=0 must be positive"):
        plan_batches(DataConfig(total_batch_size=4), {}, 0, 1)


# Mixtures


@pytest.fixture
def folders(tmp_path, monkeypatch) -> Path:
    """data/a and data/b, of unknown tokens below 50."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        folder = Path("data", name)
        folder.mkdir(parents=True)
        for split in ("train", "val"):
            write_shard(folder / f"{split}_000000.bin", np.arange(40) + (name == "b"))
    return Path("data")


def test_weights_are_shares_whatever_their_sum(folders):
    mixtures = [open_mixture(spec, vocab_size=50) for spec in ("a:0.7,b:0.3", "a:7,b:3", "a:0.3,b:0.7", "b:0.3,a:0.7",
                                                               "a,b", "data/a:1,data/b:1")]
    assert [mixture.shares for mixture in mixtures] == [
        pytest.approx(shares) for shares in ([0.7, 0.3], [0.7, 0.3], [0.3, 0.7], [0.3, 0.7], [0.5, 0.5], [0.5, 0.5])]
    assert list(mixtures[0].splits("train")) == ["a", "b"]
    assert list(mixtures[3].splits("val")) == ["b", "a"]
    prints = [mixture.fingerprint for mixture in mixtures]
    assert prints[0] == prints[1]
    assert prints[4] == prints[5]
    assert len(set(prints)) == 4


def test_one_data_set_is_a_mixture_of_itself(folders):
    mixture = open_mixture("a", vocab_size=50)
    assert mixture.shares == [1.0]
    assert mixture.fingerprint == mixture.datasets["a"].fingerprint


@pytest.mark.parametrize(("spec", "words"), [
    ("a:0.7,a:0.3", "'a:0.3' should be name:weight, with a name that comes once"),
    ("a:0.7,b:none", "'b:none' should be name:weight"), ("a:0.7,b:0", "'b:0' should .* above 0"),
    ("a:-1,b:2", "'a:-1' should .* above 0"), ("a:nan,b:1", "'a:nan' should"), ("a:inf,b:1", "'a:inf' should"),
    ("a:1,b:1e-9", "a share below 1 in 10,000 cannot be drawn; leave that data set out")])
def test_a_mixture_that_is_none_is_refused(folders, spec, words):
    with pytest.raises(ValueError, match=words):
        open_mixture(spec, vocab_size=50)


@pytest.mark.parametrize("name", ["x:y", "x,y", "a:2", "x:0.5"])
def test_a_data_set_whose_name_looks_like_a_mixture_is_that_data_set(folders, name):
    for place in ("", "data/"):
        shutil.copytree("data/a", f"{place}{name}")
        mixture = open_mixture(name, vocab_size=50)
        assert (list(mixture.datasets), mixture.shares) == ([name], [1.0])
        if "," not in name:
            assert open_mixture(f"{name}, b:3", vocab_size=50).shares == [0.25, 0.75]
            assert list(open_mixture(f"{name}:1,b:3", vocab_size=50).datasets) == [name, "b"]
        shutil.rmtree(f"{place}{name}")


def test_a_data_set_of_a_mixture_that_is_missing_names_the_command_that_makes_it(folders):
    with pytest.raises(FileNotFoundError, match=r"'novel'.*python prepare_data\.py novel"):
        open_mixture("a:0.7,novel:0.3", vocab_size=50)


def test_a_data_set_without_the_split_is_named(folders):
    (folders / "b" / "val_000000.bin").unlink()
    mixture = open_mixture("a:0.7,b:0.3", vocab_size=50)
    assert list(mixture.splits("train")) == ["a", "b"]
    with pytest.raises(ValueError, match="data/b has no val split"):
        mixture.splits("val")


def test_data_sets_of_different_tokenizers_are_not_mixed(cli):
    texts = {"a": "one two three " * 9, "b": "eno owt eerht " * 9, "c": "ONE TWO THREE " * 9}  # a and b: same letters
    for name, text in texts.items():
        Path(f"{name}.txt").write_text(text)
        assert cli("prepare_data", f"--input={name}.txt", "--tokenizer=char").code == 0
    assert cli("prepare_data", "--input=a.txt", "--name=d", "--tokenizer=byte").code == 0
    assert open_mixture("a,b").tokenizer.vocab_size == open_mixture("c").vocab_size == len(set(texts["a"]))
    for other in ("c", "d"):
        with pytest.raises(ValueError, match=f"data/a and data/{other} were made with different tokenizers"):
            open_mixture(f"a:1,b:1,{other}:1")


# Loading


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_values_come_in_order_from_another_thread(depth, count):
    values = list(prefetch(lambda a: (a * a, threading.current_thread().name), range(count), depth))
    assert [value for value, _ in values] == [a * a for a in range(count)]
    assert all(name.startswith("prefetch") for _, name in values)
    assert reading_threads() == []


def test_so_many_values_are_made_ahead_and_no_more():
    made, third = [], threading.Event()

    def make(a: int) -> int:
        made.append(a)
        if len(made) == 3:
            third.set()
        return a

    values = prefetch(make, itertools.count(), depth=2)
    assert made == []
    assert next(values) == 0
    assert third.wait(10)  # two more, without being asked
    assert made == [0, 1, 2]
    assert reading_threads() != []
    values.close()
    assert reading_threads() == []
    assert made == [0, 1, 2]


def test_closing_waits_for_the_value_under_way_and_drops_the_others():
    made, is_under_way, go_on = [], threading.Event(), threading.Event()

    def make(a: int) -> int:
        made.append(a)
        if a == 1:
            is_under_way.set()
            assert go_on.wait(10)
        return a

    values = prefetch(make, itertools.count(), depth=3)
    assert next(values) == 0
    assert is_under_way.wait(10)
    threading.Timer(0.1, go_on.set).start()
    values.close()
    assert made == [0, 1]
    assert reading_threads() == []


def test_an_error_is_raised_where_its_value_would_have_come():
    def make(a: int) -> int:
        if a == 3:
            raise ValueError("the third is broken")
        return a

    values = prefetch(make, range(9))
    assert [next(values) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="the third is broken"):
        next(values)
    assert reading_threads() == []


@given(lengths=st.lists(st.integers(1, 8), min_size=8, max_size=64), num_rows=st.integers(1, 8))
def test_the_number_of_documents_has_a_bound_that_seldom_changes(lengths, num_rows):
    begins = np.cumsum(lengths)[:-1]
    tokens = np.isin(np.arange(64), begins).reshape(8, 8)
    positions = positions_in_documents(tokens.astype(np.int64), 1)
    bound = max_documents(positions, num_rows)
    in_rows = (positions == 0).sum(axis=1)
    most = max(in_rows[i:i + num_rows].sum() for i in range(0, 8, num_rows))
    assert most <= bound < 2 * most
    assert bound.bit_count() == 1


def test_a_micro_batch_is_said_to_hold_a_document_for_each_128_tokens_unless_it_holds_more():
    rows = np.zeros((64, 1024), dtype=np.int64)
    rows[:, ::500] = 1
    assert max_documents(positions_in_documents(rows, 1), 64) == 512
    rows[:, ::100] = 1
    assert max_documents(positions_in_documents(rows, 1), 64) == 1024


def test_a_trial_meets_what_a_run_meets():
    """Shapes, types and the number that a kernel is compiled for."""
    rows = np.zeros((4, 512), dtype=np.int64)
    rows[:, 100::150] = 1
    for eot_id in (None, 1):
        real = pin_batch(Batch(rows, rows, positions_in_documents(rows, eot_id)), 4, CPU)
        empty = empty_batch(4, 512, eot_id is not None, CPU)
        for ours, theirs in zip(empty[:3], real[:3]):
            assert (ours is None) == (theirs is None)
            assert ours is None or (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert empty.max_documents == real.max_documents


def test_a_batch_becomes_a_tensor_of_its_own_layout():
    rows = np.arange(12).reshape(3, 4)
    tensor = pin(rows[:, 1:], CPU)
    assert tensor.tolist() == rows[:, 1:].tolist()
    assert tensor.is_contiguous()
    assert tensor.dtype == torch.int64


@pytest.mark.parametrize(("device", "waits"), [("cuda:1", False), ("mps", True), ("cpu", True)])
def test_only_a_copy_from_pinned_memory_is_not_waited_for(monkeypatch, device, waits):
    asked = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where, **how: asked.append((where, how)))
    to_device(torch.zeros(2), torch.device(device))
    assert asked == [((torch.device(device),), {"non_blocking": not waits})]
