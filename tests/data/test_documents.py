"""documents.py: where documents begin, and the files that keep it."""

from pathlib import Path

import numpy as np
import pytest
from conftest import write_shard
from hypothesis import given
from hypothesis import strategies as st

from flatgpt.data import documents, shards
from flatgpt.data.documents import find_edges, index_path, open_index
from flatgpt.data.order import positions_in_documents
from flatgpt.data.shards import Split

TOKENS = np.array([9, 1, 2, 9, 9, 3, 4, 5], dtype="<u2")
EDGES = [0, 3, 4, 8]


@pytest.fixture
def split(tmp_path) -> Split:
    write_shard(tmp_path / "train_000000.bin", TOKENS)
    return Split([tmp_path / "train_000000.bin"], 10)


@given(tokens=st.lists(st.integers(0, 3), max_size=50), scanned=st.integers(1, 60))
def test_documents_begin_at_end_of_text_tokens_and_at_the_start(tokens, scanned):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "SCANNED_TOKENS", scanned)
        edges = find_edges(np.array(tokens, dtype="<u2"), 0).tolist()
    wanted = [i for i, token in enumerate(tokens) if token == 0 or i == 0] + [len(tokens)]
    assert edges == (wanted if tokens else [0])


@given(rows=st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4))
def test_positions_begin_anew_at_each_document(rows):
    found = positions_in_documents(np.array(rows), 0)
    for row, positions in zip(rows, found.tolist()):
        for i, (token, position) in enumerate(zip(row, positions)):
            assert position == (0 if i == 0 or token == 0 else positions[i - 1] + 1)


def test_without_an_end_of_text_token_there_are_no_positions():
    assert positions_in_documents(np.zeros((2, 3), dtype=np.int64), None) is None


def test_an_index_is_made_once_and_read_after_that(split, monkeypatch):
    path = index_path(split.paths[0])
    assert path.name == "train_000000.documents.npy"
    assert [edges.tolist() for edges in open_index(split, 9)] == [EDGES]
    assert np.load(path).dtype == np.uint32
    monkeypatch.setattr(documents, "find_edges", None)
    assert [edges.tolist() for edges in open_index(split, 9)] == [EDGES]


@pytest.mark.parametrize("wrong", [
    b"", b"no array", b"PK\x03\x04 no archive", b"\x93NUMPY\x01\x00\x04\x00{'a'",
    np.array([0, 3, 8], dtype=np.float32), np.array([[0, 3, 4, 8]], dtype=np.uint32),
    np.array([0, 3, 4, 9], dtype=np.uint32), np.array([0, 4, 3, 8], dtype=np.uint32),
    np.array([0, 2, 8], dtype=np.uint32), np.array([3, 4, 8], dtype=np.uint32), np.array([], dtype=np.uint32),
    np.array([0, 3, 4, 20, 8], dtype=np.uint32), np.array(8, dtype=np.uint32), np.array([{}], dtype=object)],
    ids=["empty", "text", "zip", "header", "float", "2-D", "longer", "falling", "no_end_of_text", "start", "none",
         "outside", "0-D", "pickle"])
def test_an_index_that_does_not_belong_to_its_shard_is_made_again(split, wrong):
    path = index_path(split.paths[0])
    path.write_bytes(wrong) if isinstance(wrong, bytes) else np.save(path, wrong, allow_pickle=True)
    assert [edges.tolist() for edges in open_index(split, 9)] == [EDGES]
    assert np.load(path).tolist() == EDGES


def test_an_index_for_another_end_of_text_token_is_made_again(split):
    for eot_id, edges in ((7, [0, 8]), (3, [0, 5, 8]), (9, EDGES)):
        assert [found.tolist() for found in open_index(split, eot_id)] == [edges]
    split.shards[0] = split.shards[0][:3]
    assert open_index(split, 9)[0].tolist() == [0, 3]


def test_a_single_document_is_found_anew_and_written_once(split):
    open_index(split, 7)
    written = index_path(split.paths[0]).stat()
    open_index(split, 7)
    assert index_path(split.paths[0]).stat() == written


def test_a_torn_index_is_made_again(split):
    open_index(split, 9)
    path = index_path(split.paths[0])
    path.write_bytes(path.read_bytes()[:-3])
    assert [edges.tolist() for edges in open_index(split, 9)] == [EDGES]


def test_a_folder_that_cannot_be_written_is_read_all_the_same(split, monkeypatch):
    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(documents.files, "write_bytes", refuse)
    assert [edges.tolist() for edges in open_index(split, 9)] == [EDGES]
    assert not index_path(split.paths[0]).exists()


def test_prepared_data_has_an_index_of_4_bytes_a_document_and_verify_checks_it(cli):
    texts = [f"Document {i} says {'so and ' * (i % 7)}on." for i in range(60)]
    Path("texts").mkdir()
    for i, text in enumerate(texts):
        Path(f"texts/{i:02d}.txt").write_text(text)
    assert cli("prepare_data", "--input=texts", "--name=mine", "--tokenizer=byte", "--shard_tokens=700").code == 0
    dataset = shards.open_dataset("mine")
    eot_id, count = dataset.tokenizer.eot_id, 0
    for split in dataset.splits.values():
        for path, tokens in zip(split.paths, split.shards):
            edges = np.load(index_path(path))
            assert edges.tolist() == find_edges(tokens, eot_id).tolist()
            assert edges.itemsize == 4
            count += int((tokens == eot_id).sum())
    assert count == 60
    assert cli("prepare_data", "--verify=data/mine").code == 0
    np.save(index_path(dataset.splits["train"].paths[0]), np.array([0, 5, 700], dtype=np.uint32))
    result = cli("prepare_data", "--verify=data/mine")
    assert result.code == 2
    assert "train_000000.documents.npy does not say where the documents of train_000000.bin begin" in result.out
