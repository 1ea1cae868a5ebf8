"""files.py: what is written is there whole or not at all, and marks and checksums are those of the content."""

import errno
import hashlib
import os

import hypothesis
import pytest
from conftest import files_of
from hypothesis import given
from hypothesis import strategies as st

import files

VALUES = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.integers() | st.text("aü🎉\n\0"))


@hypothesis.settings(max_examples=30, deadline=None,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@given(value=VALUES)
def test_json_is_read_as_it_was_written(tmp_path, value):
    files.write_json(tmp_path / "value.json", value)
    assert list(files.read_json(tmp_path / "value.json").items()) == list(value.items())
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]


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


def test_a_mark_changes_with_either_end(tmp_path):
    content = bytes(1000)
    variants = [content, b"\1" + content[1:], content[:-1] + b"\1", content[:-10] + b"\1" + content[-9:], b"", b"\1"]
    marks = []
    for i, variant in enumerate(variants):
        path = tmp_path / str(i)
        path.write_bytes(variant)
        marks.append(files.mark(path, edge_bytes=100))
    assert len(set(marks)) == len(variants)
    (tmp_path / "moved").write_bytes(content)
    assert files.mark(tmp_path / "moved", edge_bytes=100) == marks[0]


def test_files_and_folders_are_synced(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_ino), fsync(descriptor)))
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path):
        files.sync(path)
        assert synced[-1] == path.stat().st_ino
    assert len(synced) == 2
