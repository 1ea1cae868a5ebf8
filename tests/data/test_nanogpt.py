"""nanogpt.py: whatever a train.bin and a meta.pkl hold, tokens are read right or refused, and nothing is run."""

import collections
import gzip
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from conftest import write_shard
from corpus import CHARS, nanogpt_folder, read_all
from hypothesis import given
from hypothesis import strategies as st

from flatgpt.data.shards import open_dataset, open_shard

quick = hypothesis.settings(max_examples=40, deadline=None)


class Planted:
    """Unpickling it runs a command."""

    def __reduce__(self):
        return os.mkdir, ("planted",)


def numpys(meta: dict) -> dict:
    """With NumPy's numbers and texts in Python's place."""
    return {"vocab_size": np.int64(meta["vocab_size"]), "stoi": {np.str_(c): np.uint16(i) for c, i in
                                                                meta["stoi"].items()}, "itos": np.array(list("abc"))}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("make", [dict, numpys, collections.OrderedDict])
def test_characters_are_read_from_any_protocol_and_from_numpys_numbers(tmp_path, make, protocol):
    folder = nanogpt_folder(tmp_path / "abc")
    (folder / "meta.pkl").write_bytes(pickle.dumps(make(CHARS), protocol))
    dataset = open_dataset(str(folder))
    assert type(dataset.vocab_size) is int
    assert dataset.tokenizer.decode(read_all(dataset.splits["train"])) == "cabba"


@pytest.mark.parametrize("rest", [
    {}, {"stoi": {"the": 0, "cat": 1}}, {"stoi": {"a": 0, "<pad>": 1}}, {"stoi": {"a": 1, "b": 2}},
    {"stoi": {"a": 0, "b": 2}}, {"stoi": {"a": 0, "b": 0}}, {"stoi": {"a": "0"}}, {"stoi": {"a": [0]}},
    {"stoi": {("a", "b"): 0}}, {"stoi": {1: 0, "b": 1}}, {"stoi": {}}, {"stoi": ["a"]}, {"stoi": {"\ud800": 0}},
    {"stoi": {c: i for i, c in enumerate("abcdef")}}, {"itos": {0: "a"}}, {"itos": ["a", "b"]},
    {"itos": np.array(["a", 1], dtype=object)}, {"chars": {"a", "b"}, "counts": collections.Counter("aab")}])
@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_a_vocabulary_size_is_all_that_a_meta_needs(tmp_path, rest, protocol):
    folder = nanogpt_folder(tmp_path / "abc")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3} | rest, protocol))
    dataset = open_dataset(str(folder))
    assert (dataset.vocab_size, dataset.tokenizer) == (3, None)


class PlantedInNumPy:
    """Of what NumPy's own reading runs, a part that is not ours to run."""

    def __reduce__(self):
        return np.load, ("planted",)


@pytest.mark.parametrize("meta", [
    Planted(), {"vocab_size": 3, "stoi": Planted()}, ["no", "dictionary"], {"stoi": {"a": 0}}, {"vocab_size": 3.0},
    {"vocab_size": True}, {"vocab_size": np.bool_(True)}, {"vocab_size": -3}, {"vocab_size": 0}, {"vocab_size": "3"},
    {"vocab_size": 10**12}, {"vocab_size": 65537}, {"vocab_size": np.float64(3)}, {"vocab_size": [3]},
    {"vocab_size": 3, "x": np.array([Planted()], dtype=object)}, {"vocab_size": 3, "x": PlantedInNumPy()},
    {"vocab_size": 3, "x": np.datetime64("2020-01-01")}, {"vocab_size": 3, "x": collections.deque()}])
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


# Files of nanoGPT's name that hold something else


RNG = np.random.default_rng(0)
CHAR_IDS = RNG.choice(65, 5000, p=RNG.dirichlet(np.ones(65)))
TOKEN_IDS = (50257 * RNG.random(5000) ** 4).astype(np.int64)  # most of them low, as tokens are


@pytest.mark.parametrize("dtype", ["<u4", "<i4", "<i8", "<u8", "<f4", "<f8"])
@pytest.mark.parametrize("ids", [CHAR_IDS, TOKEN_IDS, 4 * TOKEN_IDS, np.sort(CHAR_IDS), RNG.integers(0, 2, 3000),
                                 np.concatenate([np.zeros(200_000, int), TOKEN_IDS])], ids=range(6))
def test_wider_numbers_are_refused_with_what_mends_it(tmp_path, dtype, ids):
    path = tmp_path / "train.bin"
    ids.astype(dtype).tofile(path)
    bits = 8 * np.dtype(dtype).itemsize
    with pytest.raises(ValueError, match=rf"train\.bin holds {bits}-bit .*numbers, and .* prepare_data\.py"
                       if ids.max() > 65535 else rf"train\.bin holds {bits}-bit .*numbers, and .* python -c"):
        open_shard(path)


def test_big_endian_characters_are_refused(tmp_path):
    CHAR_IDS.astype(">u2").tofile(tmp_path / "val.bin")
    with pytest.raises(ValueError, match=r"val\.bin holds big-endian 16-bit numbers"):
        open_shard(tmp_path / "val.bin")


@pytest.mark.parametrize("dtype", ["<u4", "<i8", "<f4", ">u2"])
def test_the_command_in_the_message_mends_the_file(tmp_path, dtype):
    path = tmp_path / "train.bin"
    CHAR_IDS.astype(dtype).tofile(path)
    with pytest.raises(ValueError, match="python -c") as caught:
        open_shard(path)
    code = re.search(r'python -c "(.*)"', str(caught.value))[1]
    subprocess.run([sys.executable, "-c", code], check=True)
    assert open_shard(path).tolist() == CHAR_IDS.tolist()


@quick
@given(st.one_of(
    st.tuples(st.integers(1, 16), st.integers(0, 4000), st.floats(0, 1)),  # some of few tokens, mostly the first
    st.tuples(st.integers(17, 65535), st.integers(0, 4000), st.floats(0, 0.99))), st.integers(0, 2**32 - 1))
def test_16_bit_tokens_are_no_wider_numbers(tmp_path_factory, shape, seed):
    vocab_size, count, share_of_0 = shape
    rng = np.random.default_rng(seed)
    ids = np.where(rng.random(count) < share_of_0, 0, rng.integers(0, vocab_size, count)).astype("<u2")
    path = tmp_path_factory.mktemp("bins") / "train.bin"
    ids.tofile(path)
    assert np.array_equal(open_shard(path), ids)


@pytest.mark.parametrize("ids", [
    [0] * 5000, [1] * 5000, [0, 1] * 3000, [1, 0] * 3000, [7, 0, 0, 0] * 3000, [256] * 5000, [50256] * 5000,
    [0] * 3000 + [5, 6] * 20 + [0] * 3000,  # padding
    *([c for i in RNG.integers(1, 5, 3000) for c in (i, 0)] for _ in range(1)),  # one of four letters, a blank, ...
    np.repeat(np.arange(300), 9)], ids=range(10))
def test_monotonous_tokens_are_no_wider_numbers(tmp_path, ids):
    np.array(ids, dtype="<u2").tofile(tmp_path / "train.bin")
    assert open_shard(tmp_path / "train.bin").tolist() == list(ids)


def test_a_shard_that_says_its_type_may_hold_anything(tmp_path):
    for ids, dtype in ((CHAR_IDS, "<u4"), (np.stack([TOKEN_IDS, 0 * TOKEN_IDS], 1).ravel(), "<u2")):
        write_shard(tmp_path / "train.bin", ids, dtype)
        assert open_shard(tmp_path / "train.bin").tolist() == ids.tolist()


def save_npy(path: Path, ids: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, ids)


@pytest.mark.parametrize(("write", "words"), [
    (save_npy, r"is a file of np\.save; this removes its header: np\.load"),
    (lambda path, ids: path.write_bytes(gzip.compress(ids.tobytes())), "is compressed: `gzip -dc FILE > NEW`"),
    (lambda path, ids: torch.save(torch.from_numpy(ids), path), "is a ZIP archive, as np.savez and torch.save write"),
    (lambda path, ids: path.write_text("to be or not to be\n" * 99), r"is a text, not tokens: .*prepare_data\.py"),
    (lambda path, ids: path.write_text("Sein oder Nichtsein, é und 一\n" * 999), "is a text"),
    (lambda path, ids: path.write_text(" ".join(map(str, ids))), "is a text")], ids=range(6))
def test_other_kinds_of_files_are_named(tmp_path, write, words):
    write(tmp_path / "train.bin", CHAR_IDS.astype("<u2"))
    with pytest.raises(ValueError, match=rf"train\.bin {words}"):
        open_shard(tmp_path / "train.bin")


