"""Make a dataset folder of token shards out of text.

    python prepare_data.py shakespeare_char                     tiny Shakespeare, characters
    python prepare_data.py shakespeare                          tiny Shakespeare, GPT-2's tokens
    python prepare_data.py python_stdlib                        this interpreter's standard library: needs no network
    python prepare_data.py --input=novel.txt --name=novel --tokenizer=char
    python prepare_data.py shakespeare_char --input=input.txt   a named source, from a file that is already here

The folder is data/NAME; train.py finds it as --dataset=NAME. It appears only when it is complete.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import sys
import sysconfig
import tokenize
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

import settings
from data import DATA_DIR, write_shard
from tokenizer import make_tokenizer
from weights import read_json, sha256_file, write_json

TEXT_SUFFIXES = (".txt", ".md", ".py")
MIN_DOCUMENTS = 100  # below this, a split by whole documents could leave a split empty
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"

@dataclass
class Document:
    """A text that is read when it is needed: `load` gives the text, or None for a file that has none."""

    path: str
    load: Callable[[], str | None]


@dataclass
class Source:
    """A named corpus: where its documents come from, and how they are tokenized unless the user says otherwise."""

    documents: Callable[[], list[Document]]
    tokenizer: str
    val_fraction: float = 0.1


@dataclass
class PrepareConfig:
    dataset: str = ""  # a named source (shakespeare_char, shakespeare, python_stdlib); may stand without the --dataset=
    input: str = ""  # a file, or a folder whose .txt, .md and .py files are read in sorted order
    name: str = ""  # the folder in data/ to make; default: the source's or the input's name
    tokenizer: Literal["auto", "gpt2", "char", "byte", "bpe"] = "auto"  # auto = the source's own; gpt2 for --input
    vocab_size: int = 2048  # vocabulary of a bpe, which is trained on the text
    val_fraction: float | None = None  # share of the text for validation; None = the source's own, or 0.1
    test_fraction: float = 0.0  # share for a test split, which lies before the validation split
    shard_tokens: int = 100_000_000  # tokens a shard, at most


def main(argv: list[str]) -> None:
    """Make data/<name>, in a hidden folder first that is renamed when it is complete."""
    config, _ = settings.parse(PrepareConfig, argv, usage=__doc__, bare_word="dataset")
    source = SOURCES.get(config.dataset)
    if config.val_fraction is None:
        config.val_fraction = source.val_fraction if source else 0.1
    check_options(config)
    kind = config.tokenizer if config.tokenizer != "auto" else source.tokenizer if source else "gpt2"
    name = config.name or config.dataset or Path(config.input).resolve().stem
    arguments = {"source": config.dataset, "input": config.input, "tokenizer": kind,
                 "vocab_size": config.vocab_size if kind == "bpe" else None, "val_fraction": config.val_fraction,
                 "test_fraction": config.test_fraction, "shard_tokens": config.shard_tokens}
    documents = local_documents(Path(config.input)) if config.input else source.documents()
    if config.input:  # the same name does not make it the same text
        digests = "".join(sha256_file(Path(document.path)) for document in documents)
        arguments["input_sha256"] = hashlib.sha256(digests.encode()).hexdigest()
    target = DATA_DIR / name
    if is_made(target, arguments):
        print(f"{target} is there already, made with the same arguments")
        return
    partial = DATA_DIR / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        manifest = write_dataset(partial, documents, kind, config, arguments)
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial)
        raise
    counts = {split: sum(s["tokens"] for s in manifest["shards"] if s["split"] == split)
              for split in ("train", "test", "val")}
    print(f"{target}: {manifest['documents']:,} documents, {manifest['bytes']:,} bytes; tokenizer {kind} with "
          f"{manifest['tokenizer']['vocab_size']:,} tokens; "
          + ", ".join(f"{split} {count:,}" for split, count in counts.items() if count) + " tokens")


def check_options(config: PrepareConfig) -> None:
    """Raises ValueError that lists all faults."""
    faults = []
    if not config.dataset and not config.input:
        faults.append(f"nothing to read: name a source ({', '.join(SOURCES)}) or pass --input=FILE_OR_FOLDER")
    if config.dataset and config.dataset not in SOURCES:
        hint = settings.closest(config.dataset, SOURCES) or f"the sources are {', '.join(SOURCES)}"
        faults.append(f"no source {config.dataset!r}; {hint} (your own text: --input=FILE_OR_FOLDER --name=NAME)")
    val, test = config.val_fraction, config.test_fraction
    if not (val > 0 and test >= 0 and val + test < 1):
        faults.append(f"val_fraction={val} must be above 0, test_fraction={test} not below, and both together below 1")
    if config.shard_tokens < 1:
        faults.append(f"shard_tokens={config.shard_tokens} must be positive")
    if Path(config.name).name != config.name:
        faults.append(f"name={config.name!r} must be a plain folder name")
    if faults:
        raise ValueError("; ".join(faults))


def is_made(target: Path, arguments: dict) -> bool:
    """Whether target is the finished folder of these arguments. Raises ValueError when it is anything else."""
    if not target.exists():
        return False
    if not (target / "dataset.json").is_file():
        raise ValueError(f"{target} exists and was not made by prepare_data.py: choose another --name, or remove it")
    made = read_json(target / "dataset.json").get("arguments", {})
    if differing := [f"{key} was {made.get(key)}, is {value}" for key, value in arguments.items()
                     if made.get(key) != value]:
        raise ValueError(f"{target} was made with other arguments ({'; '.join(differing)}): choose another --name, or "
                         "remove it")
    return True


# Sources


def read_utf8(path: Path) -> str:
    """A text file; bytes that are no UTF-8 become U+FFFD."""
    return path.read_bytes().decode("utf-8-sig", errors="replace")


def local_documents(path: Path) -> list[Document]:
    """A file, or the text files below a folder. Raises FileNotFoundError when there are none."""
    if path.is_file():
        return [Document(str(path), lambda: read_utf8(path))]
    files = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
    if not files:
        raise FileNotFoundError(f"--input={path}: " + (f"the folder has no {', '.join(TEXT_SUFFIXES)} files"
                                                       if path.is_dir() else "no such file or folder"))
    return [Document(str(p), lambda p=p: read_utf8(p)) for p in files]


@lru_cache(maxsize=1)
def download(url: str) -> str:
    """A text from the network. Raises OSError with the way out."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.read().decode("utf-8")
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"could not download {url} ({error}); download it on another machine and pass "
                      "--input=FILE") from None


def shakespeare() -> list[Document]:
    return [Document(SHAKESPEARE_URL, lambda: download(SHAKESPEARE_URL))]


def read_python(path: Path) -> str | None:
    """A Python source file, decoded as Python does; None if Python would refuse it."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return None


def python_stdlib() -> list[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py")
                   if not {"site-packages", "dist-packages"} & set(p.relative_to(root).parts))
    return [Document(str(p.relative_to(root)), lambda p=p: read_python(p)) for p in files]


SOURCES = {
    "shakespeare_char": Source(shakespeare, "char"),
    "shakespeare": Source(shakespeare, "gpt2"),
    "python_stdlib": Source(python_stdlib, "bpe", val_fraction=0.02),
}


# Tokens


def texts(documents: list[Document]) -> Iterator[str]:
    """The texts of the documents that have one."""
    return (text for document in documents if (text := document.load()))


def split_text(text: str, by_position: bool, config: PrepareConfig) -> Iterator[tuple[str, str]]:
    """(split, text) of a document: cut into train, test, val in this order, or whole in the split its hash draws."""
    if by_position:
        test_from = int(len(text) * (1 - config.val_fraction - config.test_fraction))
        val_from = int(len(text) * (1 - config.val_fraction))
        yield from (("train", text[:test_from]), ("test", text[test_from:val_from]), ("val", text[val_from:]))
        return
    digest = hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    in_test = draw < config.val_fraction + config.test_fraction
    yield ("val" if draw < config.val_fraction else "test" if in_test else "train"), text


class ShardWriter:
    """Collects the tokens of one split and writes them as shards of at most `shard_tokens`."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int):
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._held: list[np.ndarray] = []
        self._num_held = 0
        self.shards: list[dict] = []

    def add(self, tokens: np.ndarray) -> None:
        while self._num_held + len(tokens) >= self._shard_tokens:
            room = self._shard_tokens - self._num_held
            self._hold(tokens[:room])
            self.flush()
            tokens = tokens[room:]
        self._hold(tokens)

    def _hold(self, tokens: np.ndarray) -> None:
        self._held.append(tokens.astype(self._dtype))
        self._num_held += len(tokens)

    def flush(self) -> None:
        """Write what is held as the next shard: under another name, synced, renamed."""
        if not self._num_held:
            return
        path = self._folder / f"{self._split}_{len(self.shards):06d}.bin"
        partial = path.with_suffix(".tmp")
        write_shard(partial, np.concatenate(self._held), self._dtype)
        os.rename(partial, path)
        self.shards.append({"file": path.name, "split": self._split, "tokens": self._num_held,
                            "sha256": sha256_file(path)})
        self._held, self._num_held = [], 0


def write_dataset(folder: Path, documents: list[Document], kind: str, config: PrepareConfig, arguments: dict) -> dict:
    """Tokenize documents into shards in folder, with tokenizer.json and dataset.json; returns the manifest.

    Raises ValueError when there is no text, or when a split would be empty."""
    tokenizer = make_tokenizer(kind, texts(documents), config.vocab_size)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65536 else "<u4")
    splits = [split for split in ("train", "test", "val") if split != "test" or config.test_fraction]
    writers = {split: ShardWriter(folder, split, dtype, config.shard_tokens) for split in splits}
    by_position = len(documents) < MIN_DOCUMENTS
    eot = np.array([] if tokenizer.eot_id is None else [tokenizer.eot_id], dtype=np.uint32)
    num_bytes = num_skipped = 0
    for document in tqdm(documents, unit="doc", disable=not sys.stderr.isatty()):
        text = document.load()
        if not text:
            num_skipped += 1
            continue
        num_bytes += len(text.encode("utf-8", errors="surrogatepass"))
        for split, part in split_text(text, by_position, config):
            if part:
                writers[split].add(np.concatenate([eot, tokenizer.encode(part)]))
    if num_skipped == len(documents):
        raise ValueError(f"{arguments['input'] or arguments['source']} is empty: there is no text to make tokens of")
    for split, writer in writers.items():
        writer.flush()
        if not writer.shards:
            raise ValueError(f"the {split} split came out empty ({len(documents) - num_skipped} documents, "
                             f"{num_bytes:,} bytes): give more text, or another --val_fraction or --test_fraction")
    tokenizer.save(folder)
    manifest = {"format_version": 1, "tokenizer": {"kind": kind, "vocab_size": tokenizer.vocab_size},
                "dtype": dtype.name, "documents": len(documents) - num_skipped, "skipped_documents": num_skipped,
                "bytes": num_bytes, "arguments": arguments,
                "shards": [shard for writer in writers.values() for shard in writer.shards]}
    write_json(folder / "dataset.json", manifest)
    return manifest


if __name__ == "__main__":
    settings.run(main)
