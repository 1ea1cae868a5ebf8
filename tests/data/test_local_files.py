"""local_files.py and records.py: every kind of file gives its documents in order, and what is broken says where."""

import bz2
import codecs
import gzip
import json
import lzma
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from corpus import LONG, MAKERS, POINTER, TEXTS, json_lines, parquet, read, replaced_in, texts_in, write, zstd

from flatgpt.data import local_files, records, sources
from flatgpt.data.local_files import local_parts
from flatgpt.data.sources import SourceConfig, find_parts


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# Local files


@pytest.mark.parametrize("ending", [".txt", ".md", ".py"])
def test_a_text_file_is_one_document(ending):
    assert texts_in(write(f"a{ending}", "two lines: ü\nand 🎉\n")) == ["two lines: ü\nand 🎉\n"]


@pytest.mark.parametrize("key", ["text", "body"])
@pytest.mark.parametrize("ending", MAKERS)
def test_each_line_or_row_is_a_document(ending, key):
    write(f"a{ending}", MAKERS[ending](TEXTS, key))
    assert texts_in(f"a{ending}", key) == TEXTS


@pytest.mark.parametrize("ending", MAKERS)
def test_nothing_under_the_key_is_an_empty_document(ending):
    write(f"a{ending}", MAKERS[ending](["one", None, "two"]))
    assert texts_in(f"a{ending}") == ["one", "", "two"]


def test_every_ending_is_tried_here():
    assert {".txt", ".md", ".py", *MAKERS} == set(local_files.READERS)


def test_json_lines_under_another_name_and_what_the_hubs_reader_takes_are_said():
    write("a.data", json_lines(["one", "two"]))
    with pytest.raises(ValueError, match=r"a\.data looks like a JSON object a line: rename it to \.jsonl"):
        local_parts("a.data", "text")
    assert read(local_parts("a.data", "body"))[0] == [json_lines(["one", "two"]).decode()]
    for name in ("a.json", "a.csv"):
        write(name, "x")
        with pytest.raises(ValueError, match=r"not text.* and \.json and \.csv in a folder, by --hf=FOLDER"):
            local_parts(name, "text")
    write("a.txt2", parquet(["one"]))
    with pytest.raises(ValueError, match=r"is a Parquet file: its name has to end in \.parquet"):
        local_parts("a.txt2", "text")


def test_a_folders_files_come_in_sorted_order_and_others_are_left_out():
    contents = {"b.txt": "3", "a/z.md": "1", "a/c/y.py": "0", "c.jsonl": json_lines(["4", "5"]), "B.txt": "2",
                "d.parquet": parquet(["6"]), "e.csv": "no", "f.json": "no", "g.txt.bak": "no", ".hidden.txt.swp": "no"}
    for name in random.Random(0).sample(sorted(contents), len(contents)):
        write(Path("texts", name), contents[name])
    parts = local_parts("texts", "text")
    assert [part.name for part in parts] == ["B.txt", "a/c/y.py", "a/z.md", "b.txt", "c.jsonl", "d.parquet"]
    assert read(parts)[0] == ["2", "0", "1", "3", "4", "5", "6"]


@pytest.mark.parametrize(("pattern", "names"), [
    ("texts/*.md", ["a.md", "c.md"]), ("texts/**/*.md", ["a.md", "c.md", "sub/b.md"]), ("texts/[ab].*", ["a.md"]),
    ("texts/s*", ["b.md", "d.txt"]), ("text?", ["a.md", "c.md", "sub/b.md", "sub/d.txt"]),
    ("texts/sub/b.md", ["b.md"])])
def test_globs_name_files_and_folders(pattern, names):
    for name in ("c.md", "a.md", "sub/b.md", "sub/d.txt", "a.csv"):
        write(Path("texts", name), name)
    for prefix in ("", f"{Path.cwd()}/"):
        parts = local_parts(prefix + pattern, "text")
        assert [part.name for part in parts] == names
        assert [Path(text).name for text in read(parts)[0]] == [Path(name).name for name in names]


@pytest.mark.parametrize("name", ["notes [1].txt", "what?.md", "a*b.txt", "[ab].txt", "{x,y}.txt", "~.txt", "**.md"])
def test_a_name_that_exists_is_that_file_before_it_is_a_pattern(name):
    """Be it a file, a folder, a file in one that a pattern names, or a part of a pattern."""
    for other in ("notes 1.txt", "whatx.md", "aXb.txt", "a.txt", "other/b.txt"):
        write(other, "other")
        write(Path("in", name, other), "other")
    write(name, "this")
    write(Path("in", name, name), "this")
    write(Path("deep", name, "below", "c.txt"), "this")
    assert texts_in(name) == ["this"]
    assert texts_in(Path("in", name, name)) == ["this"]
    assert sorted(set(texts_in(Path("in", name)))) == ["other", "this"]
    assert texts_in(Path("in", name)) == texts_in(Path("in", name, "**")) == texts_in("in/*")
    assert texts_in(Path("deep", name, "*", "?.txt")) == texts_in(Path("deep", name, "**", "*.txt")) == ["this"]


def names_in(pattern: str | Path) -> tuple[list[str], dict[str, list[str]]]:
    """The names of the files that are read, and those of what is left out, by the reason."""
    config = SourceConfig(input=str(pattern))
    parts = find_parts(config)
    return [part.name for part in parts], {
        why: group["named"] for why, group in sources.skipped_files(config, parts).items()}


def link(path: str, target: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    os.symlink(target, path)


def test_each_real_file_is_read_once_however_many_links_lead_to_it():
    for name in ("texts/b/c.txt", "texts/d.txt", "elsewhere/e.txt", "elsewhere/sub/f.md"):
        write(name, name)
    link("texts/a.txt", "d.txt")
    link("texts/a", "b")  # a folder that is there itself, and sorts ahead of itself
    link("texts/b/there", str(Path("elsewhere").absolute()))
    link("texts/z.md", "../elsewhere/sub/f.md")
    link("texts/nowhere.txt", "gone.txt")
    link("texts/itself.txt", "itself.txt")
    os.link("texts/d.txt", "texts/hard.txt")
    read_names = ["b/c.txt", "b/there/e.txt", "b/there/sub/f.md", "d.txt"]
    left = {"linked to nowhere": ["itself.txt", "nowhere.txt"], "linked twice": ["a", "a.txt", "hard.txt", "z.md"]}
    assert names_in("texts") == (read_names, left)
    assert sorted(texts_in("texts")) == ["elsewhere/e.txt", "elsewhere/sub/f.md", "texts/b/c.txt", "texts/d.txt"]
    assert names_in("texts/**") == (read_names, left)
    link("again", "texts")
    assert names_in("again") == (read_names, left)


@pytest.mark.parametrize("pattern", ["texts", "texts/**", "texts/**/*.txt", "tex*", "texts/sub/loop"])
def test_links_in_a_circle_end(pattern):
    write("texts/sub/a.txt", "a")
    write("texts/sub/b.txt", "b")
    write("secret.txt", "of nobody's asking")
    for path, target in (("texts/up", ".."), ("texts/sub/loop", "."), ("texts/sub/back", "../.."),
                         ("texts/sub/one", "two"), ("texts/sub/two", "one")):
        link(path, target)
    assert texts_in(pattern) == ["a", "b"]


def test_a_folder_of_links_is_a_folder_of_texts():
    for i in range(3):
        write(f"store/{i}/blob.txt", f"text {i}")
        link(f"texts/part{i}", f"../store/{i}")
        link(f"files/{i}.txt", f"../store/{i}/blob.txt")
    assert names_in("texts") == ([f"part{i}/blob.txt" for i in range(3)], {})
    assert names_in("files") == ([f"{i}.txt" for i in range(3)], {})
    assert names_in("*") == (["store/0/blob.txt", "store/1/blob.txt", "store/2/blob.txt"], {
        "linked twice": [f"files/{i}.txt" for i in range(3)] + [f"texts/part{i}" for i in range(3)]})


def test_all_that_is_left_out_of_a_folder_is_counted_and_named(monkeypatch):
    for name in ("a.txt", "B.MD", "page.html", "sub/other.HTML", "c.text", "d.txt.gz", "e.tar.bz2", "README", "f.00001",
                 "1. Introduction", ".hidden.txt", ".git/config.txt", "sub/.cache/x.txt"):
        write(Path("texts", name), name)
    os.mkfifo("texts/pipe.txt")
    assert names_in("texts") == (["B.MD", "a.txt"], {
        ".html": ["page.html", "sub/other.HTML"], ".tar.bz2": ["e.tar.bz2"], ".text": ["c.text"],
        ".txt.gz": ["d.txt.gz"], "hidden": [".git", ".hidden.txt", "sub/.cache"], "special": ["pipe.txt"],
        "without an ending": ["1. Introduction", "README", "f.00001"]})
    assert names_in("texts/*.txt") == (["a.txt"], {"special": ["pipe.txt"]})
    assert names_in("texts/page.html") == (["page.html"], {})
    for i in range(records.MAX_NAMED_FILES + 9):
        write(f"many/{i:03d}.x{i}", "")
        write(f"many/{i:03d}.html", "")
    write("many/a.txt", "a")
    counted = sources.skipped_files(SourceConfig(input="many"), [])
    assert len(counted) == records.MAX_NAMED_FILES + 1
    assert sum(group["files"] for group in counted.values()) == 2 * (records.MAX_NAMED_FILES + 9)
    assert len(counted[".html"]["named"]) == records.MAX_NAMED_FILES < counted[".html"]["files"]
    assert local_files.describe_skipped(counted).startswith(
        f"{records.MAX_NAMED_FILES + 9} .html (000.html, 001.html, 002.html, ...), 1")
    assert len(local_files.describe_skipped(counted)) < 500


def test_a_folder_or_file_that_cannot_be_read_is_said(monkeypatch):
    """The tests may run as root, whom nothing is forbidden."""
    for name in ("texts/a.txt", "texts/locked/b.txt", "texts/no.txt", "texts/no.jsonl", "texts/no.parquet"):
        write(name, "text")

    def forbid(real: Callable) -> Callable:
        def guarded(path: str | Path, *args: object, **kwargs: object) -> object:
            if Path(path).stem in ("no", "locked"):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **kwargs)
        return guarded

    monkeypatch.setattr(Path, "iterdir", forbid(Path.iterdir))
    monkeypatch.setattr(local_files.files, "edge_hash", forbid(local_files.files.edge_hash))
    monkeypatch.setattr(Path, "read_bytes", forbid(Path.read_bytes))
    monkeypatch.setattr("builtins.open", forbid(open))
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", forbid(pyarrow.parquet.ParquetFile))
    parts = local_parts("texts", "text")
    found, faults = read(parts)
    assert found == ["text"]
    assert faults == ["texts/no.jsonl cannot be read behind line 0: Permission denied",
                      "texts/no.parquet cannot be read behind row 0: Permission denied",
                      "texts/no.txt cannot be read: Permission denied"]
    assert names_in("texts")[1] == {"unreadable": ["locked"]}


def test_a_file_that_is_named_is_read_whatever_its_ending():
    assert texts_in(write("notes.log", "as it is")) == ["as it is"]


@pytest.mark.parametrize(("pattern", "words"), [
    ("none.txt", r"--input=none\.txt: no such file or folder"), ("*.md", r"--input=\*\.md: no such file or folder"),
    ("folder", r"--input=folder: there are no \.txt, \.md, \.py, \.jsonl, .*\.parquet files"),
    ("fold*", r"--input=fold\*: there are no")])
def test_what_names_no_text_is_refused(pattern, words):
    write("folder/table.csv", "1,2")
    with pytest.raises(FileNotFoundError, match=words):
        local_parts(pattern, "text")


@pytest.mark.parametrize("ending", [".txt", *MAKERS])
def test_reading_ends_where_the_parts_size_says(ending):
    """Progress is told by it."""
    texts = [f"document {i} " * 50 for i in range(3000)]
    write(f"a{ending}", MAKERS[ending](texts) if ending in MAKERS else "".join(texts))
    [part] = local_parts(f"a{ending}", "text")
    ends = [record.end for record in part.read()]
    assert ends == sorted(ends)
    assert ends[-1] == part.size == Path(f"a{ending}").stat().st_size


ENCODINGS = {"utf-8": codecs.BOM_UTF8, "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE,
             "utf-32-le": codecs.BOM_UTF32_LE, "utf-32-be": codecs.BOM_UTF32_BE}
HARD = "a \u0a0a\u0a00\u000a\u010a \U0001f389 \U00010a0a\r\n"  # characters with the bytes of a newline


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["a.txt", "a.MD", "a.log", "a", "a.py"])
def test_a_byte_order_mark_says_how_a_text_is_encoded(name, encoding):
    text = HARD.replace("\r\n", "\n")
    write(name, ENCODINGS[encoding] + text.encode(encoding))
    assert replaced_in(Path(name)) == [(text, 0)]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n \n"])
def test_a_byte_order_mark_says_how_json_lines_are_encoded(ending, encoding, newline):
    texts = ["one", HARD, "", "日本 " * 3000, *(chr(0x0a00 + i) * 9 for i in range(128)), "last"]
    lines = newline.join(json.dumps({"text": text, "\u0a0a": 1}, ensure_ascii=False) for text in texts)
    content = ENCODINGS[encoding] + lines.encode(encoding)  # without a newline at the end
    write(f"a{ending}", {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstd}[ending](content))
    assert replaced_in(Path(f"a{ending}")) == [(text, 0) for text in texts]
    records = [record for part in local_parts(f"a{ending}", "text") for record in part.read()]
    step = newline.count("\n")
    assert [record.where for record in records] == [f"a{ending}:{1 + step * i}" for i in range(len(texts))]


def test_a_mark_may_come_again_where_files_were_joined():
    for encoding, mark in ENCODINGS.items():
        line = mark + '{"text": "ü"}\n'.encode(encoding)
        write("a.jsonl", line + line + line)
        assert replaced_in(Path("a.jsonl")) == [("ü", 0)] * 3


@pytest.mark.parametrize(("encoding", "broken", "text", "count"), [
    ("utf-16-le", b"\x00", "ab\ufffd", 1), ("utf-16-be", b"\xd8\x00", "ab\ufffd", 2),
    ("utf-16-le", b"\x00\xdcc\x00", "ab\ufffdc", 2), ("utf-32-le", b"\x00\x00\x11\x00", "ab\ufffd", 4),
    ("utf-32-be", b"\x00\x00", "ab\ufffd", 2), ("utf-8", b"\xff\xfe\xfd", "ab\ufffd\ufffd\ufffd", 3)])
def test_what_is_broken_in_any_encoding_is_replaced_and_counted(encoding, broken, text, count):
    write("a.txt", ENCODINGS[encoding] + "ab".encode(encoding) + broken)
    assert replaced_in(Path("a.txt")) == [(text, count)]


def test_utf16_without_a_mark_is_not_guessed_but_said():
    with pytest.raises(ValueError, match=r"not text \(it holds NULs: UTF-16 without a byte order mark\?\); what"):
        local_parts(str(write("notes", "text".encode("utf-16-le"))), "text")
    write("a.jsonl", json_lines(["one"]).decode().encode("utf-16-le"))
    assert "(it holds NULs: UTF-16 without a byte order mark?)" in read(local_parts("a.jsonl", "text"))[1][0]


# JSON of any legal size and spelling


@pytest.mark.parametrize(("line", "text"), [
    ('{"n": NINES, "text": "one"}', "one"), ('{"text": "one", "n": [-NINES, {"m": NINES}]}', "one"),
    ('{"text": "one", "n": 1e999, "m": NaN, "o": -Infinity}', "one"), ('{"text": "a", "text": "b"}', "b"),
    (f'{{"n": {"[" * 900}1{"]" * 900}, "text": "one"}}', "one"), ('  {"text" : "one"}\t\r', "one"),
    (r'{"\u0074ext": "\ud83c\udf89\u0000\/"}', "🎉\0/"), ('{"text": "x\u2028y\x7f"}', "x\u2028y\x7f"),
    (f'{{"text": "{"long " * 4_000_000}"}}', "long " * 4_000_000), ('{"text": null, "n": NINES}', "")],
    ids=range(10))
def test_whatever_json_may_say_is_read(line, text):
    line = line.replace("NINES", "9" * 5000)
    write("a.jsonl", f"{line}\n\n{line}")
    assert replaced_in(Path("a.jsonl")) == [(text, 0)] * 2


# Compressed in every way


TWENTY = [f"document {i}" for i in range(20)]
SKIPPED = b"\x50\x2a\x4d\x18" + (8).to_bytes(4, "little") + b"not text"  # a frame that zstd's format has for others


@pytest.mark.parametrize(("ending", "make"), [
    (".jsonl.gz", lambda half: gzip.compress(half[0]) + gzip.compress(half[1]) + bytes(512)),
    (".jsonl.gz", lambda half: gzip.compress(half[0]) + bytes(3000) + gzip.compress(half[1]) + bytes(1)),
    (".jsonl.gz", lambda half: gzip.compress(b"") + gzip.compress(half[0] + half[1], 0) + gzip.compress(b"")),
    (".JSONL.GZ", lambda half: b"".join(gzip.compress(b"".join(half)[i:i + 7]) for i in range(0, 999, 7))),
    (".jsonl.zst", lambda half: SKIPPED + zstd(half[0]) + SKIPPED + zstd(b"") + zstd(half[1]) + SKIPPED),
    (".jsonl.zst", lambda half: b"".join(zstd(b"".join(half)[i:i + 7]) for i in range(0, 999, 7)))])
def test_members_frames_and_padding_are_read_through(ending, make):
    write(f"a{ending}", make((json_lines(TWENTY[:11]), json_lines(TWENTY[11:]))))
    assert texts_in(f"a{ending}") == TWENTY


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_an_empty_file_has_no_documents(ending):
    write(f"a{ending}", b"")
    assert texts_in(f"a{ending}") == []


def test_what_follows_a_gzip_stream_and_is_none_is_said_and_costs_no_line():
    write("a.jsonl.gz", gzip.compress(json_lines(TWENTY)) + b"garbage")
    assert read(local_parts("a.jsonl.gz", "text")) == (
        TWENTY, ["a.jsonl.gz is broken behind line 20: Not a gzipped file (b'ga')"])


def test_a_window_that_cannot_be_read_is_no_broken_file(monkeypatch):
    """What zstd --long=31 writes; its header asks for 2 GB. (A header is enough: nothing behind it is looked at.)"""
    write("my a.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes([0x00, (31 - 10) << 3]) + b"\x01\x00\x00")
    assert read(local_parts("my a.jsonl.zst", "text")) == ([], [
        "my a.jsonl.zst needs a window above 128 MB, which cannot be read here; recompress without --long: "
        "zstd -dc --long=31 'my a.jsonl.zst' | zstd -o NEW.jsonl.zst"])


# Parquet


def test_string_views_that_are_no_utf8_are_replaced_and_counted():
    values = pyarrow.array([b"one", b"caf\xe9 " * 5, b"\xff"], pyarrow.binary_view()).view(pyarrow.string_view())
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), "a.parquet")
    assert replaced_in(Path("a.parquet")) == [("one", 0), ("caf\ufffd " * 5, 5), ("\ufffd", 1)]


@pytest.mark.parametrize(("column", "texts"), [(pyarrow.nulls(3), ["", "", ""]), (pyarrow.array([], "string"), [])])
def test_a_column_of_nothing_holds_no_text(column, texts):
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), "a.parquet")
    assert texts_in("a.parquet") == texts


@pytest.mark.parametrize(("values", "kind"), [
    ([["a"]], "list<"), ([{"a": "b"}], "struct<"), ([1.5], "double"), ([True], "bool")])
def test_a_column_of_something_else_is_called_what_it_is(values, kind):
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), "a.parquet")
    with pytest.raises(ValueError, match=rf"a\.parquet: column 'text' holds {kind}.*, not text; --text_column names"):
        texts_in("a.parquet")


def test_a_column_with_a_dot_in_its_name_is_not_that_in_a_struct():
    pyarrow.parquet.write_table(pyarrow.table({
        "text": [{"en": "wrong"}] * 2, "text.en": ["one", "two"], "a.b": ["three", None]}), "a.parquet")
    assert texts_in("a.parquet", "text.en") == ["one", "two"]
    assert texts_in("a.parquet", "a.b") == ["three", ""]


# What is something else than its name says


READABLE = [".txt", ".md", ".py", *MAKERS]


@pytest.mark.parametrize("ending", READABLE)
def test_a_git_lfs_pointer_is_called_one(ending):
    write(f"a{ending}", POINTER)
    assert read(local_parts(f"a{ending}", "text")) == ([], [
        f"a{ending} is a Git LFS pointer, not the file itself: `git lfs pull` in its folder fetches that"])


@pytest.mark.parametrize("ending", MAKERS)
def test_a_page_in_the_place_of_a_download_is_called_one(ending):
    for page in (b"<!DOCTYPE html>\n<html>404</html>", b"\n <HTML><head>", b"\xef\xbb\xbf<!doctype HTML>"):
        write(f"a{ending}", page)
        assert read(local_parts(f"a{ending}", "text")) == ([], [
            f"a{ending} is an HTML page, probably from a failed download: download it again"])
    assert texts_in(write("a.md", "<!DOCTYPE html>\n")) == ["<!DOCTYPE html>\n"]  # there it is a text


@pytest.mark.parametrize(("content", "command"), [
    (gzip.compress(b"text", mtime=0), "gzip -dc FILE > NEW"), (zstd(b"text"), "zstd -dc FILE > NEW"),
    (bz2.compress(b"text"), "bzip2 -dc FILE > NEW"), (lzma.compress(b"text"), "xz -dc FILE > NEW"),
    (b"PK\x03\x04...", "unzip")])
def test_what_is_compressed_is_refused_with_the_command_that_unpacks_it(content, command):
    for name in ("a.txt", "a.jsonl"):
        write(name, content)
        [fault] = read(local_parts(name, "text"))[1]
        assert fault.startswith(f"{name} is ")
        assert f"`{command}`" in fault
    for name in ("a.txt.gz", "a.bz2", "a.log", "a"):
        with pytest.raises(ValueError, match=rf"--input={name} is .*`{command}` unpacks it; what can be read"):
            local_parts(str(write(name, content)), "text")


# What is broken




@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
def test_a_truncated_stream_gives_what_it_has_and_then_says_where_it_broke(ending):
    content = MAKERS[ending](LONG)
    write(f"a{ending}", content[:len(content) * 2 // 3])
    found, faults = read(local_parts(f"a{ending}", "text"))
    assert found == LONG[:len(found)]
    assert len(found) > 2000
    assert len(faults) == 1
    assert re.match(rf"a{ending} is broken behind line {len(found)}: .*([Tt]runcated|ended before the end)", faults[0])


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("length", [1, 20, -1, -4, -8])
def test_a_short_stream_that_is_torn_is_never_taken_for_whole(ending, length):
    write(f"a{ending}", MAKERS[ending](TEXTS)[:length])
    found, faults = read(local_parts(f"a{ending}", "text"))
    assert found == TEXTS[:len(found)]
    assert len(found) == len(TEXTS) or ending == ".jsonl.zst" or length > 0  # gzip ends in eight bytes of checksums
    assert len(faults) == 1
    assert f"a{ending} is broken behind line {len(found)}" in faults[0]


def test_a_compressed_file_that_is_none_is_named():
    write("a.jsonl.gz", json_lines(TEXTS))
    assert "a.jsonl.gz is broken behind line 0" in read(local_parts("a.jsonl.gz", "text"))[1][0]


def test_a_damaged_stream_gives_what_comes_before():
    content = bytearray(MAKERS[".jsonl.gz"](LONG))
    content[len(content) * 2 // 3] ^= 0xFF
    write("a.jsonl.gz", bytes(content))
    found, faults = read(local_parts("a.jsonl.gz", "text"))
    assert 2000 < len(found) < 6000
    assert found[:2000] == LONG[:2000]
    assert "a.jsonl.gz" in faults[-1]


def test_a_torn_parquet_file_says_so_and_a_damaged_one_gives_the_rows_before():
    content = parquet(LONG, row_group_size=1000, use_dictionary=False, compression="gzip")
    write("torn.parquet", content[:len(content) // 2])
    found, faults = read(local_parts("torn.parquet", "text"))
    assert found == []
    assert len(faults) == 1
    assert "torn.parquet is broken behind row 0: Parquet magic bytes not found" in faults[0]
    place = len(content) * 7 // 10
    write("damaged.parquet", content[:place] + bytes(500) + content[place + 500:])
    found, faults = read(local_parts("damaged.parquet", "text"))
    assert found == LONG[:len(found)]
    assert 2000 < len(found) < 6000
    assert f"damaged.parquet is broken behind row {len(found)}: " in faults[0]


@pytest.mark.parametrize(("line", "words"), [
    (b'{"text": "torn', "is not JSON: Unterminated string starting at, character 10"), (b"{bad}", "is not JSON"),
    (b"\x00", "is not JSON"),
    (b'{"text": "one"} {"text": "two"}', "is not JSON: Extra data"), (b"[" * 100_000, "is not JSON"),
    (b'{"body": "x", "id": 1}', "has no text under 'text', but 'body', 'id'; --text_column names the key"),
    *((b'{"text": %b}' % value, f"has no text under 'text', but {kind};") for value, kind in (
        (b"3", "int"), (b'["x"]', "list"), (b'{"text": "x"}', "dict"), (b"false", "bool"), (b"9" * 5000, "float"))),
    (b'["text"]', "has no text under 'text', but list"), (b"3", "has no text under 'text', but int"),
    (b"9" * 5000, "has no text under 'text', but float"), (b'{"n": %b}}' % (b"9" * 5000), "is not JSON: Extra"),
    (b"null", "has no text under 'text', but NoneType"), (b"{}", "has no text under 'text'")])
def test_a_line_that_holds_no_text_is_named(line, words):
    write("a.jsonl", json_lines(["one"]) + b"\n" + line + b"\n" + json_lines(["two"]))  # a blank line counts as one
    found, faults = read(local_parts("a.jsonl", "text"))
    assert found == ["one", "two"]
    assert len(faults) == 1
    assert faults[0].startswith(f"a.jsonl:3 {words}")


def test_a_column_that_is_not_there_or_holds_no_text_is_refused():
    write("a.parquet", parquet(TEXTS, "body"))
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'text', only id, body; --text_column=NAME says"):
        texts_in("a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: column 'id' holds int64, not text"):
        texts_in("a.parquet", "id")


# Bytes that are no text


def test_bytes_that_are_no_utf8_are_replaced_and_that_is_said():
    assert replaced_in(write("a.txt", b"caf\xe9 \xc3\xa9\xc3")) == [("caf\ufffd é\ufffd", 2)]
    assert replaced_in(write("b.md", "café\ufffd")) == [("café\ufffd", 0)]
    assert replaced_in(write("c.jsonl", b'{"text": "\xff"}\n{"text": "\xc3\xa9"}\n')) == [("\ufffd", 1), ("é", 0)]
    assert replaced_in(write("d.txt", b"\xe6\x97 \xed\xa0\x80")) == [("\ufffd \ufffd\ufffd\ufffd", 5)]  # cut, surrogate


def test_bytes_that_are_no_utf8_are_replaced_in_a_parquet_file_too():
    values = pyarrow.array([b"one", b"caf\xe9", "café".encode()])
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, values.buffers())  # Parquet does not check it either
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), "a.parquet")
    assert replaced_in(Path("a.parquet")) == [("one", 0), ("caf\ufffd", 1), ("café", 0)]


def test_halves_of_surrogate_pairs_are_replaced_and_whole_pairs_kept():
    lines = [rb'"\ud83d\ude00"', rb'"a\ud800b"', rb'"\ude00\ud83d"', rb'"\ud83d"']
    write("a.jsonl", b"".join(b'{"text": %b}\n' % line for line in lines))
    assert replaced_in(Path("a.jsonl")) == [("😀", 0), ("a\ufffdb", 1), ("\ufffd\ufffd", 2), ("\ufffd", 1)]


@pytest.mark.parametrize(("content", "text", "replaced"), [
    (b"# -*- coding: latin-1 -*-\nx = '\xe9'\n", "# -*- coding: latin-1 -*-\nx = 'é'\n", False),
    (b"\xef\xbb\xbfa\r\nb\rc\n", "a\nb\nc\n", False), ("a = 'ü'\n".encode(), "a = 'ü'\n", False),
    (b"x = '\xe9'\n", "x = '\ufffd'\n", True),
    (b"# -*- coding: klingon -*-\n", "# -*- coding: klingon -*-\n", False),
    (b"# -*- coding: ascii -*-\n\xff\n", "# -*- coding: ascii -*-\n\ufffd\n", True)])
def test_python_is_read_as_python_reads_it(content, text, replaced):
    assert replaced_in(write("a.py", content)) == [(text, replaced)]


