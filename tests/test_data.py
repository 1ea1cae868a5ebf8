"""data.py: shards read back by hand, datasets of three makers, and the order of batches against naive enumeration."""

import hashlib
import itertools
import os
import pickle
import re
import struct
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from conftest import TEXT
from hypothesis import given
from hypothesis import strategies as st

import data
from data import DataConfig, EvalOrder, Split, TrainOrder, open_dataset, open_shard, permute, plan_batches, write_shard

quick = hypothesis.settings(max_examples=60, deadline=None)
U2, U4 = np.dtype("<u2"), np.dtype("<u4")
LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**32)


def split_of(lengths: list[int]) -> Split:
    """Shards of these lengths in memory. The tokens count through them all, so that each says where it stands."""
    split = Split([], vocab_size=10**9)
    split.paths = [Path(f"data/counting/train_{i:06d}.bin") for i in range(len(lengths))]
    split.shards = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    split.lengths, split.num_tokens = np.array(lengths), sum(lengths)
    return split


def cut_into(count: int, cuts: list[int]) -> list[tuple[int, int]]:
    """[0, count) as (first, size) pieces, cut at the places given (modulo count)."""
    edges = sorted({0, count, *(cut % count for cut in cuts)})
    return [(a, b - a) for a, b in itertools.pairwise(edges)]


# The permutation


@given(n=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 1000))
@quick
def test_permute_is_a_bijection(n, seed, epoch):
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


def test_permute_shuffles_anew_for_every_seed_and_epoch():
    places = np.arange(1000)
    orders = [places, *(permute(places, 1000, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1)))]
    correlation = np.corrcoef(orders) - np.eye(5)
    assert np.abs(correlation).max() < 0.15  # of independent orders: 0.03 in the mean


def test_permute_takes_any_number_of_windows():
    windows = permute(np.arange(10**12 - 1000, 10**12), 10**12, 1337, 0)
    assert len(set(windows.tolist())) == 1000
    assert 0 <= windows.min() < 10**11 < 9 * 10**11 < windows.max() < 10**12


def test_the_order_is_that_of_earlier_versions():
    """A run that an earlier version began goes on with the same batches: change these numbers only knowingly."""
    assert permute(np.arange(10), 10, 1337, 0).tolist() == [4, 8, 5, 6, 9, 7, 3, 2, 1, 0]
    assert TrainOrder(split_of([50, 30]), 8, 1337).windows(0, 12) == [
        (0, 36), (0, 12), (1, 4), (1, 12), (0, 4), (1, 20), (0, 28), (0, 20),  # epoch 0 begins at token 4
        (0, 24), (1, 8), (0, 0), (0, 16)]


def test_derived_seeds_are_sha256_of_the_key():
    digest = hashlib.sha256(b"(1337, 'offset', 7)").digest()
    assert data.derive_seed(1337, "offset", 7) == int.from_bytes(digest[:8], "little") // 2


# Training


@quick
@given(lengths=LENGTHS, block_size=st.integers(1, 8), seed=SEEDS)
def test_every_epoch_reads_every_window_once(lengths, block_size, seed):
    hypothesis.assume(max(lengths) > block_size)
    order, first_seq = TrainOrder(split_of(lengths), block_size, seed), 0
    for epoch in range(3):
        offsets, counts = order.cut(epoch)
        windows = [(shard, start) for shard, (length, offset) in enumerate(zip(lengths, offsets.tolist()))
                   for start in range(offset, length - block_size, block_size)]
        assert counts.sum() == len(windows)
        assert sorted(order.windows(first_seq, len(windows))) == windows
        assert {shard for shard, _ in windows} == {i for i, length in enumerate(lengths) if length > block_size}
        assert (offsets >= 0).all()
        assert (offsets < block_size).all()
        first_seq += len(windows)


def test_epochs_differ_in_offset_and_order():
    order = TrainOrder(split_of([8 * 50]), 8, 1337)
    epochs = [order.windows(49 * epoch, 49) for epoch in range(6)]
    assert len({epoch[0][1] % 8 for epoch in epochs}) > 1
    assert len({tuple(start // 8 for _, start in epoch) for epoch in epochs}) == 6
    assert TrainOrder(split_of([8 * 50]), 8, 1338).windows(0, 49) != epochs[0]


@quick
@given(lengths=LENGTHS, block_size=st.integers(1, 8), first=st.integers(0, 100), count=st.integers(1, 60),
       cuts=st.lists(st.integers(0, 1000), max_size=5))
def test_batches_are_the_same_however_they_are_asked_for(lengths, block_size, first, count, cuts):
    hypothesis.assume(max(lengths) > block_size)
    split = split_of(lengths)
    x, y = TrainOrder(split, block_size, 1).batch(first, count)
    order = TrainOrder(split, block_size, 1)
    parts = [order.batch(first + start, size) for start, size in reversed(cut_into(count, cuts))]
    assert np.array_equal(np.concatenate([part[0] for part in reversed(parts)]), x)
    assert np.array_equal(np.concatenate([part[1] for part in reversed(parts)]), y)
    for (shard, start), inputs, targets in zip(order.windows(first, count), x, y):
        assert inputs.tolist() == split.shards[shard][start:start + block_size].tolist()
        assert targets.tolist() == split.shards[shard][start + 1:start + 1 + block_size].tolist()


@quick
@given(world_size=st.sampled_from([1, 2, 3, 4, 8]), batch_size=st.integers(1, 30), step=st.integers(0, 50),
       seqs=st.sampled_from([24, 48]), seed=st.integers(0, 9))
def test_a_step_trains_on_the_same_windows_on_any_number_of_ranks(world_size, batch_size, step, seqs, seed):
    order = TrainOrder(split_of([300, 150]), 8, seed)
    plan = plan_batches(DataConfig(batch_size=batch_size, total_batch_size=seqs * 8), {}, 8, world_size)
    read = []
    for rank in range(world_size):
        first = plan.first_seq(step, rank)
        for start in range(0, plan.seqs_per_rank, plan.micro_batch):
            read += order.windows(first + start, plan.micro_batch)
    assert read == order.windows(step * seqs, seqs)


def test_a_train_split_without_a_window_is_refused():
    TrainOrder(split_of([3, 9]), 8, 0)
    with pytest.raises(ValueError, match=r"8 tokens in its longest shard.* block_size \+ 1 = 9"):
        TrainOrder(split_of([3, 8]), 8, 0)


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


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"gradient_accumulation_steps": -1}, {"total_batch_size": -32},
                                     {"total_batch_size": 33}])
def test_a_batch_that_is_none_is_refused(options):
    key, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{key}={value} .*positive"):
        plan_batches(DataConfig(**options), {}, 32, 1)


def test_windows_of_no_tokens_are_refused():
    with pytest.raises(ValueError, match="block_size=0 must be positive"):
        plan_batches(DataConfig(total_batch_size=4), {}, 0, 1)


# Evaluation


@quick
@given(lengths=LENGTHS, block_size=st.integers(1, 8))
def test_the_whole_split_has_every_token_but_a_shards_first_as_target_once(lengths, block_size):
    hypothesis.assume(max(lengths) > 1)
    split = split_of(lengths)
    order = EvalOrder(split, block_size)
    x, y = order.batch(0, len(order))
    real = y >= 0
    assert order.is_whole
    assert x.shape == y.shape == (len(order), block_size)
    assert y[real].tolist() == [token for shard in split.shards for token in shard[1:]]
    assert np.array_equal(x[real], y[real] - 1)
    assert (y[~real] == -1).all()
    assert (x >= 0).all()
    assert real.any(axis=1).all()


@quick
@given(lengths=LENGTHS, num_seqs=st.integers(1, 80), cuts=st.lists(st.integers(0, 1000), max_size=4))
def test_sampled_windows_are_evenly_spaced_however_they_are_asked_for(lengths, num_seqs, cuts):
    hypothesis.assume(max(lengths) > 1)
    split = split_of(lengths)
    whole, order = EvalOrder(split, 4), EvalOrder(split, 4, num_seqs)
    rows = whole.batch(0, len(whole))[0].tolist()
    parts = [order.batch(first, size) for first, size in cut_into(len(order), cuts)]
    chosen = [rows.index(row) for x, _ in parts for row in x.tolist()]
    assert len(chosen) == len(order) == min(num_seqs, len(whole))
    assert order.is_whole == (num_seqs >= len(whole))
    gaps = np.diff([*chosen, len(rows)])
    assert chosen[0] == 0
    assert gaps.min() > 0
    assert gaps.max() - gaps.min() <= 1


def test_beyond_the_last_window_is_padding():
    x, y = EvalOrder(split_of([9]), 4).batch(1, 3)
    assert x.tolist() == [[4, 5, 6, 7], [0] * 4, [0] * 4]
    assert y.tolist() == [[5, 6, 7, 8], [-1] * 4, [-1] * 4]


def test_a_split_without_a_target_is_refused():
    with pytest.raises(ValueError, match="empty"):
        EvalOrder(split_of([1, 0, 1]), 4)


# Shards


@pytest.mark.parametrize(("dtype", "magic", "version", "letter"), [(U2, 20240520, 1, "H"), (U4, 20240801, 7, "I")])
def test_a_shard_is_256_header_words_and_the_tokens(tmp_path, dtype, magic, version, letter):
    tokens = np.array([0, 1, 258, 50256, np.iinfo(dtype).max], dtype=np.uint32)
    ours, theirs = tmp_path / "train_000000.bin", tmp_path / "train_000001.bin"
    write_shard(ours, tokens, dtype)
    raw = ours.read_bytes()
    assert struct.unpack("<256i", raw[:1024]) == (magic, version, 5, *[0] * 253)
    assert struct.unpack(f"<5{letter}", raw[1024:]) == tuple(tokens)
    theirs.write_bytes(struct.pack(f"<256i3{letter}", magic, version, 3, *[9] * 253, 5, 6, 7))
    assert [open_shard(path).tolist() for path in (ours, theirs)] == [tokens.tolist(), [5, 6, 7]]
    assert open_shard(ours).dtype == dtype


def header(*words: int) -> bytes:
    return struct.pack("<256i", *words, *[0] * (256 - len(words)))


@pytest.mark.parametrize(("name", "content", "words"), [
    ("train_000000.bin", header(20240520, 1, 3) + b"12345", "torn.* 1,030 bytes.* 1,029"),
    ("train_000000.bin", header(20240520, 1, 3) + b"12345678", "torn.* 1,030 bytes.* 1,032"),
    ("train_000000.bin", header(20240520, 1, 3)[:500], "torn"),
    ("train_000000.bin", header(20240801, 7, 3) + b"123456", "torn.* 1,036 bytes"),
    ("train_000000.bin", header(20240520, 2, 1) + b"12", "version 2 .* 1 "),
    ("train_000000.bin", header(20240801, 1, 1) + b"1234", "version 1 .* 7 "),
    ("train_000000.bin", header(12345, 1, 1) + b"12", "magic number is 12345.* 20240520, 20240801"),
    ("train_000000.bin", b"", "magic number is missing"),
    ("train.bin", b"12345", "torn.* 5 bytes")])
def test_a_file_that_is_torn_or_no_shard_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{words}"):
        open_shard(tmp_path / name)


def test_a_token_outside_the_vocabulary_is_named_with_file_and_position(tmp_path):
    path = tmp_path / "val_000000.bin"
    write_shard(path, np.array([*range(10)] * 3 + [77] + [0] * 9), U2)
    split = Split([path], vocab_size=10)
    assert split.read(0, 20, 10).tolist() == [*range(10)]
    for read in (lambda: split.read(0, 25, 8), lambda: EvalOrder(split, 4).batch(0, 10),
                 lambda: TrainOrder(split, 4, 0).batch(0, 9)):
        with pytest.raises(ValueError, match=r"val_000000\.bin: token id 77 at position 30 .* vocabulary of 10"):
            read()


# Datasets


@pytest.fixture
def no_gpt2(monkeypatch):
    """GPT-2's ranks can neither be found nor downloaded."""
    def unavailable():
        raise OSError("no network")

    monkeypatch.setattr(data, "GPT2Tokenizer", unavailable)


def nanogpt_folder(folder: Path, meta: object = None) -> Path:
    """train.bin and val.bin as nanoGPT writes them, with or without meta.pkl."""
    folder.mkdir(parents=True)
    np.array([2, 0, 1, 1, 0], dtype=np.uint16).tofile(folder / "train.bin")
    np.array([1, 0], dtype=np.uint16).tofile(folder / "val.bin")
    if meta is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def llmc_folder(folder: Path, tokens: tuple[int, ...] = (4, 5, 6)) -> Path:
    folder.mkdir()
    write_shard(folder / "fineweb_train_000002.bin", np.array(tokens), U2)
    write_shard(folder / "fineweb_train_000001.bin", np.array([1, 2, 3, 4]), U2)
    write_shard(folder / "fineweb_val_000000.bin", np.array([8, 9]), U2)
    return folder


CHARS = {"vocab_size": 3, "stoi": {"b": 1, "c": 2, "a": 0}, "itos": {1: "b", 2: "c", 0: "a"}}


def read_all(split: Split) -> list[int]:
    return [token for shard in split.shards for token in shard.tolist()]


def test_our_folder_opens_by_name_and_by_path(tiny_data):
    by_name, by_path = open_dataset("tiny"), open_dataset(str(tiny_data))
    assert by_name.fingerprint == by_path.fingerprint
    assert by_name.vocab_size == by_name.tokenizer.vocab_size == len(set(TEXT))
    text = {name: by_path.tokenizer.decode(read_all(split)) for name, split in by_path.splits.items()}
    assert text["train"] + text["val"] == TEXT
    assert by_name.splits["train"].num_tokens == len(text["train"])


@pytest.mark.usefixtures("no_gpt2")
def test_llmcs_folder_opens_with_its_shards_in_order(tmp_path):
    dataset = open_dataset(str(llmc_folder(tmp_path / "fineweb")))
    assert {name: read_all(split) for name, split in dataset.splits.items()} == {
        "train": [1, 2, 3, 4, 4, 5, 6], "val": [8, 9]}
    assert (dataset.vocab_size, dataset.tokenizer) == (50257, None)


def test_nanogpts_folder_opens_with_its_characters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nanogpt_folder(Path("data/abc"), CHARS)
    dataset = open_dataset("abc")
    assert dataset.vocab_size == 3
    assert {name: dataset.tokenizer.decode(read_all(split)) for name, split in dataset.splits.items()} == {
        "train": "cabba", "val": "ba"}
    assert dataset.tokenizer.encode("cab").tolist() == [2, 0, 1]


def test_a_folder_that_says_nothing_has_gpt2s_tokens_or_the_vocabulary_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "GPT2Tokenizer", lambda: "GPT-2's")
    folder = str(nanogpt_folder(tmp_path / "plain"))
    for asked, wanted in ((0, (50257, "GPT-2's")), (50304, (50304, "GPT-2's")), (100, (100, None))):
        opened = open_dataset(folder, vocab_size=asked)
        assert (opened.vocab_size, opened.tokenizer) == wanted


def test_a_vocabulary_other_than_the_folders_is_refused(tmp_path, tiny_data):
    for folder in (tiny_data, nanogpt_folder(tmp_path / "abc", CHARS)):
        own = open_dataset(str(folder)).vocab_size
        assert open_dataset(str(folder), vocab_size=own).vocab_size == own
        with pytest.raises(ValueError, match=f"vocab_size=300, but .* {own};"):
            open_dataset(str(folder), vocab_size=300)


class Planted:
    """Unpickling it runs a command."""

    def __reduce__(self):
        return os.mkdir, ("planted",)


@pytest.mark.parametrize("meta", [Planted(), {"vocab_size": 3, "stoi": Planted()}, ["no", "dictionary"],
                                  {"stoi": {"a": 0}}])
def test_a_meta_that_is_not_nanogpts_is_refused_and_runs_nothing(tmp_path, monkeypatch, meta):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"abc/meta\.pkl"):
        open_dataset(str(nanogpt_folder(tmp_path / "abc", meta)))
    assert not Path("planted").exists()


def test_a_torn_meta_is_refused(tmp_path):
    folder = nanogpt_folder(tmp_path / "abc", CHARS)
    (folder / "meta.pkl").write_bytes(pickle.dumps(CHARS)[:-5])
    with pytest.raises(ValueError, match=r"meta\.pkl"):
        open_dataset(str(folder))


def test_a_missing_data_set_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'novel'.*python prepare_data\.py novel .*--name=novel"):
        open_dataset("novel")


@pytest.mark.parametrize("manifest", ['{}', '{"shards": []}', '{"shards": [{"split": "train"}], "tokenizer": {}}'])
def test_a_manifest_that_is_not_ours_is_named(tiny_data, manifest):
    (tiny_data / "dataset.json").write_text(manifest)
    with pytest.raises(ValueError, match=r"dataset\.json is not ours"):
        open_dataset("tiny")


def test_a_folder_without_shards_is_named(tmp_path):
    (tmp_path / "trained.bin").touch()
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} holds no token shards"):
        open_dataset(str(tmp_path))


@pytest.mark.usefixtures("no_gpt2")
def test_the_fingerprint_is_that_of_the_tokens(tmp_path, tiny_data, cli):
    llmc, moved, changed = (open_dataset(str(llmc_folder(tmp_path / name, tokens))).fingerprint for name, tokens in (
        ("a", (4, 5, 6)), ("b", (4, 5, 6)), ("c", (4, 5, 7))))
    assert llmc == moved != changed
    (tmp_path / "tiny.txt").write_text(TEXT.replace("fox", "xof"))
    assert cli("prepare_data", "--input=tiny.txt", "--name=other", "--tokenizer=char").code == 0
    assert open_dataset("other").fingerprint != open_dataset("tiny").fingerprint
