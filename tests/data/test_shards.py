"""shards.py: shards read back by hand, and folders of three makers opened, refused and checked."""

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from conftest import TEXT, TINY_RUN, files_of, write_shard
from corpus import CHARS, llmc_folder, nanogpt_folder, read_all
from hypothesis import given
from hypothesis import strategies as st
from test_files import POINTER

from flatgpt.data import shards
from flatgpt.data.order import EvalOrder, TrainOrder
from flatgpt.data.shards import ShardWriter, Split, list_shards, open_dataset, open_shard, shard_dtype
from flatgpt.data.staging import plural

U2, U4 = np.dtype("<u2"), np.dtype("<u4")


# Shards


def written(folder: Path, chunks: list[np.ndarray], shard_tokens: int = 10**9, dtype: np.dtype = U2,
            **state: object) -> ShardWriter:
    """A writer that was given these chunks and is finished."""
    writer = ShardWriter(folder, "train", dtype, shard_tokens, **state)
    for chunk in chunks:
        writer.add(chunk)
    writer.finish()
    return writer


@pytest.mark.parametrize(("dtype", "magic", "version", "letter"), [(U2, 20240520, 1, "H"), (U4, 20240801, 7, "I")])
def test_a_shard_is_256_header_words_and_the_tokens(tmp_path, dtype, magic, version, letter):
    tokens = np.array([0, 1, 258, 50256, np.iinfo(dtype).max], dtype=np.uint32)
    ours, theirs = tmp_path / "train_000000.bin", tmp_path / "train_000001.bin"
    written(tmp_path, [tokens], dtype=dtype)
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
    ("train_000000.bin", header(20240520, 2, 1) + b"12", "version 2 .* only version 1"),
    ("train_000000.bin", header(20240801, 1, 1) + b"1234", "version 1 .* only version 7"),
    ("train_000000.bin", header(12345, 1, 1) + b"12", "magic number is 12345.* 20240520, 20240801"),
    ("train_000000.bin", b"", "magic number is missing"),
    ("train_000000.bin", POINTER, "is a Git LFS pointer, not the file itself: `git lfs pull`"),
    ("train.bin", POINTER + b"\n" * (len(POINTER) % 2), "is a Git LFS pointer"),
    ("train.bin", b"12345", "torn.* 5 bytes")])
def test_a_file_that_is_torn_or_no_shard_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{words}"):
        open_shard(tmp_path / name)


def test_a_token_outside_the_vocabulary_is_named_with_file_and_position(tmp_path):
    path = tmp_path / "val_000000.bin"
    write_shard(path, np.array([*range(10)] * 3 + [77] + [0] * 9))
    split = Split([path], vocab_size=10)
    rows = np.full((2, 10), -1)
    split.read([(0, 20), (0, 35)], rows)
    assert rows.tolist() == [[*range(10)], [0] * 5 + [-1] * 5]  # the shard ends
    for read in (lambda: split.read([(0, 1), (0, 25)], rows), lambda: EvalOrder(split, 4).batch(0, 10),
                 lambda: TrainOrder(split, 4, 0).rows(0, 9)):
        with pytest.raises(ValueError, match=r"val_000000\.bin: token id 77 at position 30 .* vocabulary of 10"):
            read()


# Writing


quick = hypothesis.settings(max_examples=40, deadline=None,
                            suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])


@pytest.fixture
def fresh(tmp_path, monkeypatch) -> Callable[[], Path]:
    """Makes empty folders, where syncing takes no time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    numbers = itertools.count()

    def make() -> Path:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        return folder

    return make


@quick
@given(sizes=st.lists(st.integers(0, 30), max_size=8), shard_tokens=st.integers(1, 40))
def test_tokens_come_back_from_shards_of_one_size_however_they_came(fresh, sizes, shard_tokens):
    folder, tokens = fresh(), np.arange(sum(sizes))
    writer = written(folder, np.split(tokens, np.cumsum(sizes)[:-1]) if sizes else [], shard_tokens)
    paths = sorted(folder.iterdir())
    assert [path.name for path in paths] == [f"train_{i:06d}.bin" for i in range(-(-len(tokens) // shard_tokens))]
    parts = [open_shard(path) for path in paths]
    assert [token for part in parts for token in part] == tokens.tolist()
    assert all(len(part) == shard_tokens for part in parts[:-1])
    assert writer.shards == [{"file": path.name, "split": "train", "tokens": len(part),
                              "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
                             for path, part in zip(paths, parts)]
    assert writer.num_tokens == len(tokens)


@quick
@given(count=st.integers(1, 60), shard_tokens=st.integers(1, 20), cut=st.integers(0, 60), lost=st.integers(0, 60))
def test_a_new_writer_goes_on_from_a_checkpoint_whatever_came_after_it(fresh, count, shard_tokens, cut, lost):
    tokens, whole, again = np.arange(count), fresh(), fresh()
    written(whole, [tokens], shard_tokens)
    first = ShardWriter(again, "train", U2, shard_tokens)
    first.add(tokens[:cut])
    first.checkpoint()
    state = {"shards": list(first.shards), "open_tokens": first.open_tokens}
    first.add(tokens[cut:cut + lost] + 7)  # is written, and not spoken of
    first.close()
    second = written(again, [tokens[cut:]], shard_tokens, **state)
    for shard in second.shards:
        assert (again / shard["file"]).read_bytes() == (whole / shard["file"]).read_bytes()
    assert [shard["file"] for shard in second.shards] == sorted(path.name for path in whole.iterdir())


def test_add_gives_the_shards_that_it_filled(tmp_path):
    writer = ShardWriter(tmp_path, "val", U4, 10)
    filled = [[shard["file"] for shard in writer.add(np.arange(size))] for size in (9, 1, 25, 4)]
    assert filled == [[], ["val_000000.bin"], ["val_000001.bin", "val_000002.bin"], []]
    assert (writer.open_tokens, writer.num_tokens) == (9, 39)


def test_a_shard_under_way_bears_no_shards_name(tmp_path):
    writer = ShardWriter(tmp_path, "train", U2, 10)
    writer.add(np.arange(9))
    writer.checkpoint()
    assert [path.name for path in tmp_path.iterdir()] == ["train_000000.tmp"]
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["train_000000.bin"]


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = ShardWriter(tmp_path, "train", U2, 10)
    writer.add(np.arange(9))
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"could not write .*train_000000\.tmp: No space left on device"):
        writer.add(np.arange(1))
    assert [path.name for path in tmp_path.iterdir()] == ["train_000000.tmp"]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65, U2), (50257, U2), (65536, U2), (65537, U4)])
def test_the_smallest_type_that_holds_every_id(vocab_size, dtype):
    assert shard_dtype(vocab_size) == dtype


# Folders


@pytest.fixture
def no_gpt2(monkeypatch):
    """GPT-2's ranks can neither be found nor downloaded."""
    def unavailable():
        raise OSError("no network")

    monkeypatch.setattr(shards, "GPT2Tokenizer", unavailable)


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


@pytest.mark.usefixtures("no_gpt2")
def test_shards_are_known_by_their_names(tmp_path):
    names = {"train": ["fineweb_train_000001.bin", "fineweb_train_000002.bin"], "val": ["fineweb_val_000000.bin"],
             "test": ["test_000000.bin"]}
    for name in (*itertools.chain(*names.values()), "train_000003.tmp", ".train_000004.bin", "fineweb_000005.bin"):
        write_shard(tmp_path / name, np.array([1, 2]))
    assert {split: [path.name for path in paths] for split, paths in list_shards(tmp_path)[0].items()} == names


@pytest.mark.usefixtures("no_gpt2")
def test_llmcs_tiny_shakespeare_opens(tmp_path):
    for split in ("train", "val"):
        write_shard(tmp_path / f"tiny_shakespeare_{split}.bin", np.array([1, 2]))
    assert set(open_dataset(str(tmp_path)).splits) == {"train", "val"}


def test_nanogpts_folder_opens_with_its_characters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nanogpt_folder(Path("data/abc"), CHARS)
    dataset = open_dataset("abc")
    assert dataset.vocab_size == 3
    assert {name: dataset.tokenizer.decode(read_all(split)) for name, split in dataset.splits.items()} == {
        "train": "cabba", "val": "ba"}
    assert dataset.tokenizer.encode("cab").tolist() == [2, 0, 1]


def test_a_folder_that_says_nothing_has_gpt2s_tokens_or_the_vocabulary_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "GPT2Tokenizer", lambda: "GPT-2's")
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


def test_gpt2_speaks_for_a_folder_that_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "GPT2Tokenizer", lambda: "GPT-2's")
    for folder in (nanogpt_folder(tmp_path / "nano"), llmc_folder(tmp_path / "llmc")):
        for vocab_size, wanted in ((0, 50257), (50304, 50304)):
            dataset = open_dataset(str(folder), vocab_size, tokenizer="gpt2")
            assert (dataset.vocab_size, dataset.tokenizer) == (wanted, "GPT-2's")


@pytest.mark.usefixtures("no_gpt2")
def test_gpt2s_tokenizer_is_needed_only_where_it_was_asked_for(tmp_path):
    folder = str(llmc_folder(tmp_path / "llmc"))
    assert open_dataset(folder).tokenizer is None
    with pytest.raises(OSError, match="no network"):
        open_dataset(folder, tokenizer="gpt2")


def test_gpt2_is_refused_where_the_folder_says_otherwise(tmp_path, tiny_data, monkeypatch):
    monkeypatch.setattr(shards, "GPT2Tokenizer", lambda: "GPT-2's")
    for folder in (tiny_data, nanogpt_folder(tmp_path / "abc", CHARS)):
        own = open_dataset(str(folder)).vocab_size
        with pytest.raises(ValueError, match=f"tokenizer=gpt2 has 50257 tokens, but {folder} .* {own};"):
            open_dataset(str(folder), tokenizer="gpt2")


def test_gpt2s_tokens_do_not_fit_in_a_smaller_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "GPT2Tokenizer", lambda: "GPT-2's")
    with pytest.raises(ValueError, match="vocab_size=100"):
        open_dataset(str(llmc_folder(tmp_path / "llmc")), vocab_size=100, tokenizer="gpt2")


def test_a_metas_words_are_not_taken_for_gpt2s(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "GPT2Tokenizer", lambda: "GPT-2's")
    for meta, wanted in (({"vocab_size": 50257}, "GPT-2's"), ({"vocab_size": 50257, "itos": ["the"]}, None)):
        assert open_dataset(str(nanogpt_folder(tmp_path / str(wanted), meta))).tokenizer == wanted


def test_a_run_on_words_trains_and_says_that_there_is_no_text(cli, refused, tmp_path):
    nanogpt_folder(tmp_path / "data" / "words", {"vocab_size": 3, "stoi": {"the": 0, "cat": 1, "sat": 2}})
    np.tile(np.array([0, 1, 2], dtype=np.uint16), 100).tofile(tmp_path / "data" / "words" / "train.bin")
    result = cli("train", *TINY_RUN, "--dataset=words", "--max_iters=1")
    assert result.code == 0, result.err
    assert "no tokenizer is known for words: " in result.out
    assert result.out.endswith("done.\n")
    line = refused("sample", "--out_dir=out/tiny", "--max_new_tokens=2")
    assert "no tokenizer for the model's 3 tokens" in line
    assert "cannot be read as text" in line


def test_a_missing_data_set_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'novel'.*python prepare_data\.py novel .*--name=novel"):
        open_dataset("novel")


@pytest.mark.parametrize("manifest", ['{}', '{"shards": []}', '{"shards": [{"split": "train"}], "tokenizer": {}}'])
def test_a_manifest_that_is_not_ours_is_named(tiny_data, manifest):
    (tiny_data / "dataset.json").write_text(manifest)
    with pytest.raises(ValueError, match=r"dataset\.json was not written by prepare_data\.py"):
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


# Checked


@pytest.fixture
def sound(cli, tmp_path) -> Path:
    """data/sound: forty documents, as bytes, in shards of 1,000 tokens."""
    (tmp_path / "sound.jsonl").write_text("".join(json.dumps({"text": f"document {i} " * 9}) + "\n" for i in range(40)))
    assert cli("prepare_data", "--input=sound.jsonl", "--tokenizer=byte", "--shard_tokens=1000").code == 0
    return tmp_path / "data" / "sound"


def test_what_was_written_is_sound(cli, sound):
    count = len(list(sound.glob("*.bin")))
    assert count > 4
    for name in ("sound", "data/sound", sound):
        result = cli("prepare_data", f"--verify={name}")
        assert result.code == 0
        assert result.out.strip().endswith(f"is intact: {count} shards")


def patch(path: Path, at: int, new: bytes) -> None:
    """Write over bytes of a file; a negative `at` counts from the end."""
    content = bytearray(path.read_bytes())
    at %= len(content)
    assert content[at:at + len(new)] != new
    content[at:at + len(new)] = new
    path.write_bytes(content)


def change(path: Path, *keys: str | int, to: object) -> None:
    """Change a value of a JSON file."""
    value = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    assert inner[keys[-1]] != to
    inner[keys[-1]] = to
    path.write_text(json.dumps(value))


DAMAGE = {  # what is done to the folder -> the lines that --verify prints
    "a flipped byte": (lambda folder: patch(folder / "train_000002.bin", -2, b"\x01"),
                       [r"train_000002\.bin has changed since it was written: its SHA-256 differs"]),
    "a changed header": (lambda folder: patch(folder / "train_000002.bin", 1000, b"\x01"),
                         [r"train_000002\.bin has changed since it was written: its SHA-256 differs"]),
    "a wrong count": (lambda folder: patch(folder / "val_000000.bin", 8, struct.pack("<i", 77)),
                      [r"val_000000\.bin is torn: its header counts 77 tokens", "the val split has 0 end-of-text"]),
    "a torn tail": (lambda folder: os.truncate(folder / "train_000001.bin", 2001),
                    [r"train_000001\.bin is torn: its header counts 1,000 tokens, .* 2,001", "the train split has"]),
    "no magic number": (lambda folder: patch(folder / "train_000001.bin", 0, b"\0\0\0\0"),
                        [r"train_000001\.bin is not a token shard", "the train split has"]),
    "an id out of range": (lambda folder: patch(folder / "train_000001.bin", 1024 + 2 * 345, b"\x01\x01"),
                           [r"train_000001\.bin: token id 257 at position 345 is outside the vocabulary of 257",
                            r"train_000001\.bin has changed since it was written"]),
    "a missing shard": (lambda folder: (folder / "train_000001.bin").unlink(),
                        [r"No such file or directory: .*train_000001\.bin", "the train split has"]),
    "a stray shard": (lambda folder: shutil.copy(folder / "train_000000.bin", folder / "train_000099.bin"),
                      [r"^train_000099\.bin is not in dataset\.json$"]),
    "a wrong number of tokens": (lambda folder: change(folder / "dataset.json", "shards", 1, "tokens", to=999),
                                 [r"train_000001\.bin has 1,000 tokens, and dataset\.json says 999"]),
    "another type": (lambda folder: change(folder / "dataset.json", "dtype", to="uint32"),
                     [r"_00000\d\.bin holds uint16, and dataset\.json says uint32"] * 5),
    "a wrong number of documents": (
        lambda folder: change(folder / "dataset.json", "splits", "val", "documents", to=5),
        [r"^the val split has 4 end-of-text tokens, one a document, and dataset\.json counts 5 documents$"]),
    "a broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"),
                           [r"its tokenizer cannot be read: .*tokenizer\.json is not readable JSON"]),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(),
                     [r"its tokenizer cannot be read: .*tokenizer\.json"]),
    "a tokenizer of another size": (
        lambda folder: change(folder / "dataset.json", "tokenizer", "vocab_size", to=300),
        [r"^tokenizer\.json has 257 tokens, and dataset\.json says 300$"]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_kind_of_damage_is_found_and_named(cli, sound, kind):
    damage, expected = DAMAGE[kind]
    damage(sound)
    before = files_of(sound)
    result = cli("prepare_data", "--verify=sound")
    lines = result.out.strip().splitlines()
    assert result.code == 2
    assert result.err.strip() == f"error: data/sound is damaged: {plural(len(expected), 'fault')}, listed above"
    assert len(lines) == len(expected), lines
    for line, words in zip(lines, expected):
        assert re.search(words, line), line
    assert files_of(sound) == before


def test_all_faults_of_a_folder_are_listed(cli, sound):
    for kind in ("a flipped byte", "an id out of range", "a stray shard", "a wrong number of documents"):
        DAMAGE[kind][0](sound)
    result = cli("prepare_data", "--verify=sound")
    assert "damaged: 5 faults" in result.err
    for name in ("train_000001.bin", "train_000002.bin", "train_000099.bin", "the val split"):
        assert name in result.out


def test_folders_of_others_are_checked_for_what_they_say(cli, refused, tmp_path):
    llmc, nano = llmc_folder(tmp_path / "llmc"), nanogpt_folder(tmp_path / "nano", CHARS)
    assert "llmc is intact: 3 shards" in cli("prepare_data", f"--verify={llmc}").out
    assert "nano is intact: 2 shards" in cli("prepare_data", f"--verify={nano}").out
    np.array([0, 1, 3], dtype=np.uint16).tofile(nano / "train.bin")
    assert "damaged: 1 fault" in refused("prepare_data", f"--verify={nano}")
    result = cli("prepare_data", f"--verify={nano}")
    assert "train.bin: token id 3 at position 2 is outside the vocabulary of 3" in result.out
    write_shard(llmc / "fineweb_train_000002.bin", np.array([50256, 50257]))
    os.truncate(llmc / "fineweb_val_000000.bin", 1027)
    result = cli("prepare_data", f"--verify={llmc}")
    assert "damaged: 2 faults" in result.err
    assert "fineweb_train_000002.bin: token id 50257 at position 1" in result.out
    assert "fineweb_val_000000.bin is torn" in result.out


def test_what_is_no_dataset_folder_cannot_be_checked(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no data set 'none'" in refused("prepare_data", "--verify=none")
    assert "empty holds no token shards" in refused("prepare_data", "--verify=empty")
