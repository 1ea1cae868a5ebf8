"""sources.py: what the options name is found, and the named corpora are what they are called."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from corpus import read, write
from huggingface_hub import HfApi

from flatgpt.data import sources
from flatgpt.data.local_files import local_parts
from flatgpt.data.sources import SourceConfig, find_parts, fingerprint, python_parts, wikitext_articles


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_fingerprint_is_that_of_names_and_contents():
    def of(folder: str, contents: dict[str, str]) -> str:
        for name, text in contents.items():
            write(Path(folder, name), text)
        return fingerprint(local_parts(folder, "text"))

    contents = {"a.txt": "one", "b.txt": "two"}
    marks = [of("texts", contents), of("moved", contents), of("changed", contents | {"a.txt": "eno"}),
             of("renamed", {"a.txt": "one", "c.txt": "two"}), of("less", {"a.txt": "one"})]
    assert marks[0] == marks[1]
    assert len(set(marks)) == 4


# Python's own sources


STDLIB, ALL = ("stdlib",), ("stdlib", "purelib", "platlib")


@pytest.fixture
def python(monkeypatch) -> Callable[..., None]:
    """Pretends that this interpreter's folders are others."""
    def pretend(**paths: str) -> None:
        found = {key: str(Path(path).absolute()) for key, path in paths.items()}
        monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: found)

    return pretend


def test_no_file_of_python_is_counted_twice(python):
    for name in ("lib/os.py", "lib/json/decoder.py", "lib/site-packages/a.py", "lib/site-packages/b/__init__.py",
                 "lib/dist-packages/c.py", "lib64/fast.py", "lib/notes.txt"):
        write(name, f"# {name}\n")
    os.symlink("lib", "same")
    os.symlink("nowhere.py", "lib/dangling.py")
    python(stdlib="lib", purelib="lib/site-packages", platlib="same/site-packages")  # two names of one folder
    assert [part.name for part in python_parts(ALL)] == [
        "purelib/a.py", "purelib/b/__init__.py", "stdlib/json/decoder.py", "stdlib/os.py"]
    assert [part.name for part in python_parts(STDLIB)] == ["stdlib/json/decoder.py", "stdlib/os.py"]
    python(stdlib="lib", purelib="lib/site-packages", platlib="lib64")
    parts = python_parts(ALL)
    assert [part.name for part in parts] == ["platlib/fast.py", "purelib/a.py", "purelib/b/__init__.py",
                                             "stdlib/json/decoder.py", "stdlib/os.py"]
    assert read(parts)[0][0] == "# lib64/fast.py\n"


def test_this_pythons_library_and_packages_are_found_once():
    parts = find_parts(SourceConfig(dataset="python_source"))
    names = [part.name for part in parts]
    assert names == sorted(set(names))
    assert "stdlib/json/decoder.py" in names
    assert any(name.endswith("lib/numpy/__init__.py") for name in names)
    library = find_parts(SourceConfig(dataset="python_stdlib"))
    assert [part.name for part in library] == [name for name in names if name.startswith("stdlib/")]
    assert sum(part.size for part in library) < sum(part.size for part in parts)
    [decoder] = (part for part in library if part.name == "stdlib/json/decoder.py")
    assert read([decoder])[0] == [Path(json.decoder.__file__).read_text(encoding="utf-8")]


# Data sets of the hub


@pytest.fixture
def asked(monkeypatch) -> list[tuple[tuple, dict]]:
    """What `datasets` is asked for; it gives nothing."""
    calls = []

    def load_dataset_builder(*args: object, **kwargs: object) -> None:
        calls.append((args, kwargs))
        raise ConnectionError("asked")

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    return calls


@pytest.mark.parametrize(("name", "repo", "subset"), [
    ("openwebtext", "Skylion007/openwebtext", None), ("fineweb", "HuggingFaceFW/fineweb", "sample-10BT"),
    ("fineweb_edu", "HuggingFaceFW/fineweb-edu", "sample-10BT"), ("tinystories", "roneneldan/TinyStories", None),
    ("wikitext", "Salesforce/wikitext", "wikitext-103-raw-v1")])
def test_named_sources_are_data_sets_of_the_hub(refused, asked, monkeypatch, name, repo, subset):
    commits = {None: "newest", "v1": "older"}
    monkeypatch.setattr(HfApi, "dataset_info", lambda api, repo, revision: SimpleNamespace(sha=commits[revision]))
    assert f"could not open the data set '{repo}'" in refused("prepare_data", name, "--tokenizer=byte")
    refused("prepare_data", name, "--subset=other", "--revision=v1", "--tokenizer=byte")
    assert asked == [((repo, subset), {"revision": "newest"}), ((repo, "other"), {"revision": "older"})]


# WikiText


def test_wikitexts_lines_become_articles():
    rows = ["", " = First = \n", "", " One line . \n", " = = A section = = \n", " Another . \n", "",
            " = Second , a title = \n", " x = y = z \n", " = = = Deep = = = \n"]
    assert [article for article in wikitext_articles(iter(rows)) if article] == [
        " = First = \n One line . \n = = A section = = \n Another . \n",
        " = Second , a title = \n x = y = z \n = = = Deep = = = \n"]
