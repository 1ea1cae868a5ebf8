"""Token shards and dataset folders: written, opened, verified.

Owns the shard format and what a dataset folder is, be it ours, nanoGPT's or llm.c's. It makes no text into tokens
(pipeline.py does) and draws no batches (loader.py does). Our folder, data/<name>/:

    train_000000.bin ... val_000000.bin ...    256 header words (int32: magic, version, token count), then the tokens
    train_000000.documents.npy ...             where documents begin (documents.py)
    tokenizer.json  tokenizer_config.json      the tokenizer, in Hugging Face's format
    dataset.json                               what made it, and per shard its split, tokens and SHA-256

Invariants: a shard that bears its name is complete, because it is written as .tmp, synced and renamed; and no token id
outside the vocabulary leaves this module.

Example: two documents of 3 and 2 tokens behind end-of-text tokens, cut in shards of 4, are [eot a b c] and [eot d e].
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flatgpt import files, machine
from flatgpt.data.documents import index_fault
from flatgpt.data.nanogpt import MAX_VOCAB_SIZE, characters_of, read_meta, refuse_foreign_bin
from flatgpt.data.tokenizer import GPT2_VOCAB_SIZE, CharTokenizer, GPT2Tokenizer, Tokenizer, load_tokenizer

DATA_DIR = Path("data")
HEADER_WORDS = 256
UNKNOWN_VOCAB_SIZE = MAX_VOCAB_SIZE  # no id lies outside it
FORMATS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}  # magic -> version, token type
SHARD_NAME = re.compile(r"(?!\.)(?:.*_)?(?P<split>train|val|test)_\d+\.bin")  # ours, modded-nanogpt's
LLMC_NAME = re.compile(r"(?!\.).*_(?P<split>train|val|test)\.bin")  # tiny_shakespeare_train.bin
NANOGPT_NAME = re.compile(r"(?P<split>train|val)\.bin")


# Shards


def shard_dtype(vocab_size: int) -> np.dtype:
    """The smallest type of FORMATS that holds every id."""
    return np.dtype("<u2" if vocab_size <= 65536 else "<u4")


def shard_header(num_tokens: int, dtype: np.dtype) -> bytes:
    """The 1,024 bytes before a shard's tokens."""
    magic, version = next((magic, version) for magic, (version, kind) in FORMATS.items() if kind == dtype)
    header = np.zeros(HEADER_WORDS, dtype="<i4")
    header[:3] = magic, version, num_tokens
    return header.tobytes()


class ShardWriter:
    """Writes the tokens of one split, as they come, into shards of `shard_tokens`; only the last is shorter.

    `shards` lists what is finished: file, split, tokens, sha256 of each. With the `shards` and `open_tokens` that an
    earlier writer had at a `checkpoint`, a new one goes on from there, and what came after it on disk is written over.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int,
                 shards: list[dict[str, Any]] | None = None, open_tokens: int = 0):
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self.shards, self.open_tokens = list(shards or []), 0
        self._file: BinaryIO | None = None
        if open_tokens:
            self._begin(open_tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens in all shards, the open one included."""
        return sum(shard["tokens"] for shard in self.shards) + self.open_tokens

    def _begin(self, num_tokens: int = 0) -> None:
        """Open the next shard, to append behind its first `num_tokens`."""
        self._path = self._folder / f"{self._split}_{len(self.shards):06d}.tmp"
        if num_tokens and not self._path.exists():  # it was finished after the checkpoint
            os.replace(self._path.with_suffix(".bin"), self._path)
        self._file = open(self._path, "r+b" if num_tokens else "wb")  # noqa: SIM115  closed by finish() or close()
        if not num_tokens:
            self._file.write(shard_header(0, self._dtype))
        self._file.truncate(HEADER_WORDS * 4 + num_tokens * self._dtype.itemsize)
        self._file.seek(0, os.SEEK_END)
        self.open_tokens = num_tokens

    def add(self, tokens: np.ndarray) -> list[dict[str, Any]]:
        """Append tokens, integers that fit the shards' type; return the shards that they filled. Raises OSError."""
        finished = len(self.shards)
        while len(tokens):
            if self._file is None:
                self._begin()
            part = tokens[:self._shard_tokens - self.open_tokens]
            with files.named_errors(self._path):
                self._file.write(np.ascontiguousarray(part, dtype=self._dtype))
            self.open_tokens += len(part)
            tokens = tokens[len(part):]
            if self.open_tokens == self._shard_tokens:
                self.finish()
        return self.shards[finished:]

    def finish(self) -> None:
        """Finish the open shard, if there is one."""
        if self._file is None:
            return
        with files.named_errors(self._path):
            self._file.seek(0)
            self._file.write(shard_header(self.open_tokens, self._dtype))
            self.checkpoint()
            self._file.close()
            path = self._path.with_suffix(".bin")
            os.replace(self._path, path)
            files.sync(self._folder)
        self.shards.append({"file": path.name, "split": self._split, "tokens": self.open_tokens,
                            "sha256": files.sha256_file(path)})
        self._file, self.open_tokens = None, 0

    def checkpoint(self) -> None:
        """Sync the open shard to the disk."""
        if self._file is not None:
            with files.named_errors(self._path):
                self._file.flush()
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Leave the open shard as it is."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # its buffer is given up
                self._file.close()


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, memory-mapped: with our header, or headerless uint16 when it bears nanoGPT's name.

    Raises ValueError for a file that is torn or no shard.
    """
    size = path.stat().st_size
    files.refuse_pointer(path)
    header = np.fromfile(path, dtype="<i4", count=3)
    if len(header) == 3 and int(header[0]) in FORMATS:
        version, dtype = FORMATS[int(header[0])]
        if header[1] != version:
            raise ValueError(f"{path}: version {header[1]} of the shard format cannot be read, only version {version}")
        offset, count = HEADER_WORDS * 4, int(header[2])
        if size != offset + count * dtype.itemsize:
            raise ValueError(f"{path} is torn: its header counts {count:,} tokens, which takes "
                             f"{offset + count * dtype.itemsize:,} bytes, and it has {size:,}")
    elif NANOGPT_NAME.fullmatch(path.name):
        refuse_foreign_bin(path)
        offset, dtype = 0, np.dtype("<u2")
        count = size // 2
        if size % 2:
            raise ValueError(f"{path} is torn: {size:,} bytes are no whole number of 2-byte tokens")
    else:
        magic = header[0] if len(header) else "missing"
        raise ValueError(f"{path} is not a token shard: its magic number is {magic}, not one of "
                         f"{', '.join(map(str, FORMATS))}")
    if count == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)))  # sliced faster as such


# Folders


class Split:
    """The tokens of one split, as shards in a fixed order: those in the files, or `shards`, which were made of them."""

    def __init__(self, paths: list[Path], vocab_size: int, shards: list[np.ndarray] | None = None):
        self.paths, self.vocab_size = paths, vocab_size
        self.shards = [open_shard(path) for path in paths] if shards is None else shards
        self.lengths = np.array([len(shard) for shard in self.shards], dtype=np.int64)
        self.num_tokens = int(self.lengths.sum())

    def first(self, num_targets: int) -> Split:
        """The split up to its first `num_targets` targets: all tokens but a shard's first are one. Raises ValueError
        when it has fewer."""
        shards = []
        for tokens in self.shards:
            shards.append(tokens[:num_targets + 1])
            num_targets -= max(0, len(shards[-1]) - 1)
            if num_targets == 0:
                return Split(self.paths[:len(shards)], self.vocab_size, shards)
        raise ValueError(f"{self.paths[0].parent} has {num_targets:,} tokens less to evaluate on than eval_tokens says")

    def read(self, places: Iterable[tuple[int, int]], rows: np.ndarray) -> None:
        """Fill rows (n, length), int64, with the tokens from n places on, each a (shard, start); where a shard ends,
        the rest of a row stays as it was. Raises ValueError for an id outside the vocabulary."""
        places = list(places)
        for (shard, start), row in zip(places, rows):
            tokens = self.shards[shard][start:start + len(row)]
            row[:len(tokens)] = tokens
        if rows.max() >= self.vocab_size:
            at, place = np.argwhere(rows >= self.vocab_size)[0]
            shard, start = places[at]
            raise ValueError(f"{self.paths[shard]}: token id {rows[at, place]} at position {start + place} is outside "
                             f"the vocabulary of {self.vocab_size}")


@dataclass
class Dataset:
    folder: Path
    splits: dict[str, Split]
    vocab_size: int
    tokenizer: Tokenizer | None  # None: the folder does not say, and GPT-2's could not be had
    fingerprint: str  # changes when the tokens do
    manifest: dict[str, Any]  # dataset.json; {} if there is none


def open_dataset(name: str, vocab_size: int = 0, tokenizer: str = "auto") -> Dataset:
    """Open data/<name>, or the folder of that path.

    `vocab_size`, and `tokenizer="gpt2"`, speak for a folder that says nothing of its own. Raises FileNotFoundError with
    the command that makes the data, ValueError for a folder that is broken or says otherwise, OSError for GPT-2's
    tokenizer where it was asked for and is not to be had.
    """
    folder = find_folder(name)
    paths, manifest = list_shards(folder)
    own_size = manifest["tokenizer"]["vocab_size"] if manifest else read_meta(folder).get("vocab_size")
    if vocab_size and own_size and vocab_size != own_size:
        raise ValueError(f"vocab_size={vocab_size}, but {folder} has a vocabulary of {own_size}; leave the key out")
    if tokenizer == "gpt2":
        if 0 < vocab_size < GPT2_VOCAB_SIZE:
            raise ValueError(f"vocab_size={vocab_size} does not hold the {GPT2_VOCAB_SIZE} tokens of tokenizer=gpt2")
        vocab_size = vocab_size or GPT2_VOCAB_SIZE
        if own_size and own_size != GPT2_VOCAB_SIZE:
            raise ValueError(f"tokenizer=gpt2 has {GPT2_VOCAB_SIZE} tokens, but {folder} has a vocabulary of "
                             f"{own_size}; leave the key out")
    vocab_size = own_size or vocab_size or _guess_vocab_size(next(iter(paths.values()))[0])
    splits = {split: Split(found, vocab_size) for split, found in paths.items()}
    max_ids = 256 ** max(shard.itemsize for held in splits.values() for shard in held.shards)
    if own_size and own_size > max_ids:
        raise ValueError(f"{folder}/meta.pkl has a vocabulary of {own_size:,} tokens, but ids above {max_ids - 1:,} do "
                         "not fit the type of its tokens: make the data again with python prepare_data.py, which takes "
                         "a wider type")
    summary = [[shard["sha256"] for shard in manifest.get("shards", [])],
               [(split, path.name, int(length), files.edge_hash(path)) for split, held in splits.items()
                for path, length in zip(held.paths, held.lengths)]]
    fingerprint = hashlib.sha256(json.dumps(summary).encode()).hexdigest()
    found = folder_tokenizer(folder, vocab_size) or (GPT2Tokenizer() if tokenizer == "gpt2" else None)
    return Dataset(folder, splits, vocab_size, found, fingerprint, manifest)


def _guess_vocab_size(path: Path) -> int:
    """For a folder that does not say: GPT-2's for 16-bit tokens, else UNKNOWN_VOCAB_SIZE."""
    return GPT2_VOCAB_SIZE if open_shard(path).itemsize == 2 else UNKNOWN_VOCAB_SIZE


def find_folder(name: str) -> Path:
    """data/<name>, else the folder at that path. Raises FileNotFoundError with the command that makes it."""
    for folder in (DATA_DIR / name, Path(name)):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"there is no data folder {name}" if "/" in name else (
        f"no data set {name!r} in {DATA_DIR}/; make it with: python prepare_data.py {name}   (or from your own text: "
        f"python prepare_data.py --input=FILE_OR_FOLDER --name={name})"))


def list_shards(folder: Path) -> tuple[dict[str, list[Path]], dict[str, Any]]:
    """The shards by split, and dataset.json, {} where there is none. Raises ValueError when it is not ours,
    FileNotFoundError for a folder without shards."""
    paths: dict[str, list[Path]] = {}
    if not (folder / "dataset.json").is_file():
        for pattern in (SHARD_NAME, LLMC_NAME, NANOGPT_NAME):
            found: dict[str, list[Path]] = {}
            for path in sorted(folder.iterdir()):
                if match := pattern.fullmatch(path.name):
                    found.setdefault(match["split"], []).append(path)
            paths = found | paths
        if not paths:
            raise FileNotFoundError(f"{folder} holds no token shards: neither train_000000.bin nor nanoGPT's train.bin")
        return paths, {}
    manifest = files.read_json(folder / "dataset.json")
    try:
        for shard in manifest["shards"]:
            paths.setdefault(shard["split"], []).append(folder / Path(shard["file"]).name)
            _ = index(shard["tokens"]), bytes.fromhex(shard["sha256"])
        if not all(isinstance(split, str) for split in paths):
            raise TypeError("a split that is no text")
        _ = index(manifest["tokenizer"]["vocab_size"]), manifest["tokenizer"]["kind"], np.dtype(manifest["dtype"])
        _ = [(index(held["documents"]), index(held["tokens"])) for held in manifest.get("splits", {}).values()]
        _ = manifest.get("arguments", {}).items()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder}/dataset.json was not written by prepare_data.py: {error} was not "
                         "understood") from None
    return paths, manifest


def verify(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(file, what is wrong with it and where) for every shard of a folder as it has been read, then for the folder.

    Checked are headers, sizes, token ids, document indexes and, where dataset.json speaks of them, checksums, counts
    of tokens and documents, and the tokenizer. Raises as `list_shards` does.
    """
    paths, manifest = list_shards(folder)
    listed = {shard["file"]: shard for shard in manifest.get("shards", [])}
    faults, eot_id, vocab_size = [], None, read_meta(folder).get("vocab_size", 0)
    if manifest:
        vocab_size = manifest["tokenizer"]["vocab_size"]
        try:
            tokenizer = load_tokenizer(folder)
            eot_id = tokenizer.eot_id
            # It was once said to be the number of tokens, which is less where there are gaps.
            if vocab_size not in (tokenizer.vocab_size, tokenizer.hf.get_vocab_size()):
                faults.append(f"tokenizer.json has {tokenizer.vocab_size:,} tokens, and dataset.json says "
                              f"{vocab_size:,}")
        except (OSError, ValueError) as error:
            faults.append(f"its tokenizer cannot be read: {error}")
        faults += [f"{path.name} is not in dataset.json" for path in sorted(folder.glob("*.bin"))
                   if path.name not in listed]
    with contextlib.suppress(OSError, ValueError):  # a shard that cannot be opened is reported in its turn
        vocab_size = vocab_size or _guess_vocab_size(next(iter(paths.values()))[0])
    found: Counter[str] = Counter()  # split -> end-of-text tokens
    jobs = [(split, path) for split, split_paths in paths.items() for path in split_paths]
    with ThreadPoolExecutor(machine.num_cores()) as pool:  # hashing and NumPy let other threads work
        for (split, path), (shard_faults, num_eot) in zip(jobs, pool.map(
                lambda job: _verify_shard(job[1], vocab_size, eot_id, manifest, listed.get(job[1].name)), jobs)):
            found[split] += num_eot
            yield path.name, shard_faults
    faults += [f"the {split} split has {found[split]:,} end-of-text tokens, one a document, and dataset.json counts "
               f"{counts['documents']:,} documents" for split, counts in manifest.get("splits", {}).items()
               if eot_id is not None and found[split] != counts["documents"]]
    yield folder.name, faults


def _verify_shard(path: Path, vocab_size: int, eot_id: int | None, manifest: dict[str, Any],
                  listed: dict[str, Any] | None) -> tuple[list[str], int]:
    """The faults of a shard, and its number of end-of-text tokens; reads the file once."""
    try:
        tokens = open_shard(path)
    except (OSError, ValueError) as error:
        return [str(error)], 0
    faults, num_eot = [], 0
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(path.stat().st_size - tokens.nbytes))  # the header
    for start in range(0, len(tokens), 1 << 20):
        block = tokens[start:start + (1 << 20)]
        digest.update(block)
        num_eot += int(np.count_nonzero(block == eot_id)) if eot_id is not None else 0
        if vocab_size and not faults and block.max() >= vocab_size:
            at = int(np.argmax(block >= vocab_size))
            faults.append(f"{path}: token id {block[at]} at position {start + at:,} is outside the vocabulary of "
                          f"{vocab_size:,}")
    if listed:
        if len(tokens) != listed["tokens"]:
            faults.append(f"{path} has {len(tokens):,} tokens, and dataset.json says {listed['tokens']:,}")
        if tokens.dtype != np.dtype(manifest["dtype"]):
            faults.append(f"{path} holds {tokens.dtype}, and dataset.json says {manifest['dtype']}")
        if digest.hexdigest() != listed["sha256"]:
            faults.append(f"{path} has changed since it was written: its SHA-256 differs from that in dataset.json")
    if eot_id is not None and (fault := index_fault(path, tokens, eot_id)):
        faults.append(fault)
    return faults, num_eot


def folder_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a dataset folder: its tokenizer.json, the characters of its meta.pkl, or GPT-2's if it fits.

    None for a meta.pkl of words, of other numbers than 0 on, or of whatever else: ids are all that training needs."""
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    meta = read_meta(folder)
    if characters := characters_of(meta):
        return CharTokenizer(characters)
    if meta.keys() & {"stoi", "itos"} or not GPT2_VOCAB_SIZE <= vocab_size <= 65536:
        return None
    try:
        return GPT2Tokenizer()
    except OSError:  # training can do without: it only writes the tokenizer beside the weights
        return None


