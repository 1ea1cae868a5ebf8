"""files.py: what is written is there whole or not at all, and hashes and checksums are those of the content."""

import codecs
import errno
import hashlib
import os
import resource

import hypothesis
import pytest
from conftest import files_of
from corpus import POINTER
from hypothesis import given
from hypothesis import strategies as st

from flatgpt import files

VALUES = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.integers() | st.text("aü🎉\n\0"))


@hypothesis.settings(max_examples=30, deadline=None,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@given(value=VALUES)
def test_json_is_read_as_it_was_written(tmp_path, value):
    files.write_json(tmp_path / "value.json", value)
    assert list(files.read_json(tmp_path / "value.json").items()) == list(value.items())
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_json_and_text_are_read_in_every_encoding_that_says_so(tmp_path, encoding):
    path = tmp_path / "value.json"
    path.write_bytes('{"ü": "🎉"}'.encode(encoding))
    assert files.read_json(path) == {"ü": "🎉"}
    if encoding != "utf-16-be":  # which is JSON's own rule
        assert files.read_text(path) == '{"ü": "🎉"}'


MARKED = {"utf-8": codecs.BOM_UTF8, "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE,
          "utf-32-le": codecs.BOM_UTF32_LE, "utf-32-be": codecs.BOM_UTF32_BE}


@given(text=st.text(st.characters(exclude_categories=["Cs"])), encoding=st.sampled_from(sorted(MARKED)))
def test_text_is_decoded_by_its_mark(text, encoding):
    text = f"a{text}"  # a mark or a NUL behind a mark would make another mark
    assert files.decode(MARKED[encoding] + text.encode(encoding)) == (text, 0)
    assert files.decode(text.encode()) == (text, 0)


BROKEN = st.sampled_from([b"\xff", b"\xc3(", b"\xf0\x9f", b"\xed\xa0\x80", b"\xe6"])


@given(pieces=st.lists(st.text("aü🎉\n", min_size=1) | BROKEN))
def test_the_bytes_that_are_replaced_are_those_that_are_no_text(pieces):
    """Each piece of bytes is followed by a letter, so that it stays what it is; of `\\xc3(` the bracket is text."""
    data = b"x" + b"".join(piece.encode() if isinstance(piece, str) else piece + b"x" for piece in pieces)
    text, replaced = files.decode(data)
    assert replaced == sum(len(piece) - piece.count(b"(") for piece in pieces if isinstance(piece, bytes))
    assert text.replace("\ufffd", "") == "x" + "".join(
        piece if isinstance(piece, str) else "(x" if b"(" in piece else "x" for piece in pieces)




def test_what_is_no_text_and_no_json_is_called_what_it_is(tmp_path):
    path = tmp_path / "a.json"
    for content, words in (
            (POINTER, "is a Git LFS pointer"), (b"<html>", "is an HTML page"), (b"{", "not readable JSON"),
            (b"[" * 100_000, "not readable JSON"), (b"[]", "should hold a JSON object")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"a\.json .*{words}"):
            files.read_json(path)
    for content, words in (
            (POINTER, "is a Git LFS pointer"), (b"a\xff\xfeb", "is not UTF-8 text: 2 of its bytes are invalid")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"a\.json .*{words}"):
            files.read_text(path)
    assert files.broken(path, ": reason") == f"{path} is broken: reason"
    path.write_bytes(b"\x1f\x8b\x08torn")
    assert files.broken(path, ": reason") == f"{path} is compressed: `gzip -dc FILE > NEW` unpacks it"
    assert files.broken(path, ": reason", b"\x1f\x8b") == f"{path} is broken: reason"
    assert files.broken(tmp_path / "gone", ": reason") == f"{tmp_path}/gone is broken: reason"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, step):
    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files.write_json(tmp_path / "value.json", {"old": 1})
    before = files_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="No space left on device"):
            files.write_json(tmp_path / "value.json", {"new": 2})
    assert files_of(tmp_path) == before
    files.write_json(tmp_path / "value.json", {"new": 2})
    assert files.read_json(tmp_path / "value.json") == {"new": 2}


def test_an_error_without_a_name_gets_one_and_others_keep_theirs(tmp_path):
    with pytest.raises(OSError, match=r"^could not write .*here\.bin: No space left on device$"), \
            files.named_errors(tmp_path / "here.bin"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError, match=r"elsewhere"), files.named_errors(tmp_path / "here.bin"):
        (tmp_path / "elsewhere").read_bytes()
    with pytest.raises(OSError, match=r"^in our words$"), files.named_errors(tmp_path / "here.bin"):
        raise OSError("in our words")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff\xfe{}"])
def test_what_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "value.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"value\.json"):
        files.read_json(tmp_path / "value.json")
    with pytest.raises(FileNotFoundError, match=r"other\.json"):
        files.read_json(tmp_path / "other.json")


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (5 << 19) + 7])
def test_a_checksum_is_that_of_the_whole_file(tmp_path, size):
    content = bytes(i % 251 for i in range(size))
    (tmp_path / "file").write_bytes(content)
    assert files.sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_an_edge_hash_changes_with_either_end(tmp_path):
    content = bytes(1000)
    variants = [content, b"\1" + content[1:], content[:-1] + b"\1", content[:-10] + b"\1" + content[-9:], b"", b"\1"]
    hashes = []
    for i, variant in enumerate(variants):
        path = tmp_path / str(i)
        path.write_bytes(variant)
        hashes.append(files.edge_hash(path, edge_bytes=100))
    assert len(set(hashes)) == len(variants)
    (tmp_path / "moved").write_bytes(content)
    assert files.edge_hash(tmp_path / "moved", edge_bytes=100) == hashes[0]


def test_files_and_folders_are_synced(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_ino), fsync(descriptor)))
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path):
        files.sync(path)
        assert synced[-1] == path.stat().st_ino
    assert len(synced) == 2


def test_a_line_that_does_not_fit_leaves_the_lines_before_it(tmp_path):
    """Also what the file's buffer still holds when the disk is full is not written."""
    path = tmp_path / "lines"
    files.append_line(path, "first")
    with open(path, "ab") as file:
        file.write(b"torn")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        for length in (19_995, 30_000, 200_000):
            with pytest.raises(OSError, match="lines: File too large"):
                files.append_line(path, "x" * length)
            assert path.read_bytes() == b"first\n"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    files.append_line(path, "second")
    assert path.read_bytes() == b"first\nsecond\n"
