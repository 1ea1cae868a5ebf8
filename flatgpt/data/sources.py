"""What to read: named corpora, data sets on the hub, local files.

Owns the way from the options to parts, and the named corpora with their settings. local_files.py and hub.py read them;
splits are drawn and tokens made in pipeline.py. To add a named source, add a line to SOURCES.

Invariant: the parts of a source, and the records in them, come in an order that never changes.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shlex
import sysconfig
import urllib.request
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

from flatgpt.data.hub import hub_parts
from flatgpt.data.local_files import READERS, count_skipped, find_files, local_parts
from flatgpt.data.records import Part, Record
from flatgpt.options import closest

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


@dataclass
class SourceConfig:
    """What to read: a named source, a data set on the hub, or files"""

    dataset: str = ""  # a named source, of the list above; may stand without the --dataset=
    input: Annotated[str, "path"] = ""  # file, folder, glob of .txt .md .py .jsonl .jsonl.gz .jsonl.zst .parquet
    hf: Annotated[str, "path"] = ""  # a data set on the Hugging Face hub, owner/name, or a folder with its files
    subset: str = ""  # of a hub data set: its configuration; empty: the named source's own, or the only one
    split: str = "train"  # of a hub data set: what is read; the validation and test splits made here are cut from it
    revision: str = ""  # of a hub data set: branch, tag or commit; empty: the newest when the work begins
    text_column: str = "text"  # column of a Parquet file, key of a JSON line, that holds the text

    def validate(self) -> list[str]:
        if self.dataset and self.dataset not in SOURCES:
            hint = closest(self.dataset, SOURCES) or f"the sources are {', '.join(SOURCES)}"
            own = shlex.quote(self.dataset) if Path(self.dataset).exists() else "FILE_OR_FOLDER"
            return [f"no source {self.dataset!r}; {hint} (your own text: --input={own} --name=NAME)"]
        if self.hf and (self.input or self.dataset):
            return [f"--hf={self.hf} is a source of its own: leave out "
                    + ("--input" if self.input else f"the name {self.dataset}")]
        return []

    def conflicts(self, given: Collection[str]) -> list[str]:
        """Which of the given keys have no effect on the source that is named."""
        if not (self.input or self.dataset in SOURCES) or hub_name(self):
            return []
        return [f"{key} is for data sets of the hub" for key in ("subset", "split", "revision") if key in given]


@dataclass
class Source:
    """A named corpus, a data set of the hub or the parts that `find` gives, and its defaults. `join` makes documents of
    rows that are less than one."""

    find: Callable[[], list[Part]] | None = None
    hf: str = ""
    subset: str = ""
    join: Callable[[Iterator[str]], Iterator[str]] | None = None
    tokenizer: str = "gpt2"
    val_fraction: float = 0.1


def hub_name(config: SourceConfig) -> str:
    """The hub data set that the options name, or ""."""
    return "" if config.input else config.hf or SOURCES.get(config.dataset, Source()).hf


def find_parts(config: SourceConfig, commit: str = "") -> list[Part]:
    """The parts of what the options name, a hub data set at that commit. Raises OSError or ValueError."""
    source = Source(hf=config.hf) if config.hf else SOURCES.get(config.dataset)
    if config.input:
        return local_parts(config.input, config.text_column)
    if source.hf:
        return hub_parts(source.hf, config.subset or source.subset, config.split, commit, config.text_column,
                         source.join)
    return source.find()


def fingerprint(parts: list[Part]) -> str:
    """A hash of the names, sizes and contents of all parts."""
    summary = [(part.name, part.size, part.content_hash) for part in parts]
    return hashlib.sha256(json.dumps(summary).encode()).hexdigest()


def skipped_files(config: SourceConfig, parts: list[Part]) -> dict[str, dict[str, Any]]:
    """The files of a local source that are not among its `parts`: see `count_skipped`."""
    if config.input:
        return count_skipped(*find_files(config.input))
    read = {os.path.realpath(part.name) for part in parts} if os.path.isdir(config.hf) else set()
    if not any(map(os.path.isfile, read)):  # of the hub, or named otherwise
        return {}
    base, found = find_files(config.hf)
    return count_skipped(base, {path: "" if os.path.realpath(path) in read else why or "not of the split"
                                 for path, why in found.items()})


# Named corpora


def python_parts(keys: tuple[str, ...]) -> list[Part]:
    """The .py files below this interpreter's folders of those names in `sysconfig`: the standard library is "stdlib",
    and installed packages lie in "purelib" and "platlib"."""
    roots = {os.path.realpath(sysconfig.get_paths()[key]): key for key in reversed(keys)}
    parts = []
    for root, key in roots.items():
        for path in Path(root).rglob("*.py"):
            name = path.relative_to(root).as_posix()
            is_installed = key == "stdlib" and re.match("(.*/)?(site|dist)-packages/", name)
            if path.is_file() and not is_installed:
                size = path.stat().st_size
                parts.append(Part(f"{key}/{name}", size, "", size, partial(READERS[".py"], path, "")))
    return sorted(parts, key=lambda part: part.name)


@lru_cache(maxsize=1)
def download(url: str) -> bytes:
    """Download a file. Raises OSError, which says what to do without a network."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.read()
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"could not download {url} ({error}); download it on another machine and pass "
                      "--input=FILE") from None


def url_part(url: str) -> list[Part]:
    """A text on the web, which is one document."""
    return [Part(url, 0, "", 0, lambda: iter([Record(url, "utf8", download(url), 0)]))]


def wikitext_articles(rows: Iterator[str]) -> Iterator[str]:
    """WikiText's rows are lines; an article begins with the line " = Title = "."""
    article: list[str] = []
    for row in rows:
        if article and re.fullmatch(r" = [^=](.*[^=])? = \n?", row):
            yield "".join(article)
            article = []
        if row:
            article.append(row if row.endswith("\n") else row + "\n")
    if article:
        yield "".join(article)


SOURCES = {
    "shakespeare_char": Source(partial(url_part, SHAKESPEARE_URL), tokenizer="char"),
    "shakespeare": Source(partial(url_part, SHAKESPEARE_URL)),
    "python_stdlib": Source(partial(python_parts, ("stdlib",)), tokenizer="bpe", val_fraction=0.02),
    "python_source": Source(partial(python_parts, ("stdlib", "purelib", "platlib")), val_fraction=0.01),
    "tinystories": Source(hf="roneneldan/TinyStories", val_fraction=0.01),
    "wikitext": Source(hf="Salesforce/wikitext", subset="wikitext-103-raw-v1", join=wikitext_articles,
                       val_fraction=0.01),
    "openwebtext": Source(hf="Skylion007/openwebtext", val_fraction=0.0005),
    "fineweb": Source(hf="HuggingFaceFW/fineweb", subset="sample-10BT", val_fraction=0.001),
    "fineweb_edu": Source(hf="HuggingFaceFW/fineweb-edu", subset="sample-10BT", val_fraction=0.001),
}
