"""Token shards, dataset folders, and the data order: (seed, position) -> batch.

Owns the shard format, the opening of dataset folders (ours, nanoGPT's, llm.c's), and the arithmetic of batches. It
makes no text into tokens (prepare_data.py does) and knows no model.

Letters: T = block_size, S = sequences an optimizer step over the whole job, W = ranks, q = a sequence's number since
the run began. Invariants:
- What a step trains on is a function of (data, T, seed, S, step): neither W nor the micro-batch changes it, and no
  state is kept but the number of the next sequence.
- Each epoch cuts the shards anew into windows of T tokens and reads every window once, in an order of its own.
- No token id outside the vocabulary leaves this room.

Example: T = 4, one shard of 14 tokens a b c ... n, and an epoch whose offset is 1. The windows' inputs are bcde, fghi
and jklm, their targets cdef, ghij and klmn: N = 3. Sequence q at place p of the epoch reads window permute(p, 3, key),
say 2, 0, 1 for p = 0, 1, 2. With S = 2 and W = 2 the first step gives rank 0 jklm and rank 1 bcde; the second step
takes fghi, and its other sequence is the first of the next epoch.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from tokenizer import GPT2_VOCAB_SIZE, CharTokenizer, GPT2Tokenizer, Tokenizer, load_tokenizer
from weights import read_json

DATA_DIR = Path("data")
HEADER_WORDS = 256
FORMATS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}  # magic -> version, token type
SHARD_NAME = re.compile(r"(?!\.)(?:.*_)?(?P<split>train|val|test)_\d+\.bin")  # ours, modded-nanogpt's
LLMC_NAME = re.compile(r"(?!\.).*_(?P<split>train|val|test)\.bin")  # tiny_shakespeare_train.bin
NANOGPT_NAME = re.compile(r"(?P<split>train|val)\.bin")


@dataclass
class DataConfig:
    """Data and batch"""

    dataset: str = "openwebtext"  # a folder in data/, or the path of a folder with shards
    gradient_accumulation_steps: int = 40  # micro-batches a step, summed over the ranks
    batch_size: int = 12  # sequences a micro-batch; the largest number that a device takes at a time
    total_batch_size: int = 0  # tokens a step over all ranks; 0 = gradient_accumulation_steps * batch_size * block_size


@dataclass
class BatchPlan:
    """How a step's S sequences fall on W ranks: each takes `accumulation_steps` micro-batches of `micro_batch`."""

    seqs_per_step: int
    micro_batch: int
    accumulation_steps: int
    world_size: int

    @property
    def seqs_per_rank(self) -> int:
        return self.accumulation_steps * self.micro_batch

    def first_seq(self, step: int, rank: int) -> int:
        """Number of the first sequence that a rank reads in a step; it reads `seqs_per_rank` from there on."""
        return step * self.seqs_per_step + rank * self.seqs_per_rank


def plan_batches(config: DataConfig, given: Mapping[str, str], block_size: int, world_size: int) -> BatchPlan:
    """S from the options, cut for W ranks. `given` holds the keys that the user set. Raises ValueError."""
    for key, value in (("batch_size", config.batch_size), ("block_size", block_size),
                       ("gradient_accumulation_steps", config.gradient_accumulation_steps)):
        if value < 1:
            raise ValueError(f"{key}={value} must be positive")
    seqs = config.gradient_accumulation_steps * config.batch_size
    if config.total_batch_size:
        if config.total_batch_size < 0 or config.total_batch_size % block_size:
            raise ValueError(f"total_batch_size={config.total_batch_size} tokens is not a positive multiple of "
                             f"block_size={block_size}")
        if "gradient_accumulation_steps" in given and seqs * block_size != config.total_batch_size:
            raise ValueError(f"total_batch_size={config.total_batch_size} tokens, but gradient_accumulation_steps="
                             f"{config.gradient_accumulation_steps} x batch_size={config.batch_size} x block_size="
                             f"{block_size} is {seqs * block_size}; leave gradient_accumulation_steps out")
        seqs = config.total_batch_size // block_size
    if seqs % world_size:
        below, above = seqs // world_size * world_size, -(-seqs // world_size) * world_size
        raise ValueError(f"{seqs} sequences a step do not divide over {world_size} processes; the nearest that do: "
                         + " and ".join(f"{n} (--total_batch_size={n * block_size})" for n in (below, above) if n))
    per_rank = seqs // world_size
    micro_batch = max(n for n in range(1, min(per_rank, config.batch_size) + 1) if per_rank % n == 0)
    return BatchPlan(seqs, micro_batch, per_rank // micro_batch, world_size)


# Files


def write_shard(path: Path, tokens: np.ndarray, dtype: np.dtype) -> None:
    """Write a shard with its header, under the very name given, and sync it. `tokens` are integers that fit dtype."""
    magic, version = next((magic, version) for magic, (version, kind) in FORMATS.items() if kind == dtype)
    header = np.zeros(HEADER_WORDS, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype(dtype).tobytes())
        file.flush()
        os.fsync(file.fileno())


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, memory-mapped: with our header, or headerless uint16 when it bears nanoGPT's name.

    Raises ValueError for a file that is torn or no shard.
    """
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=3)
    if len(header) == 3 and int(header[0]) in FORMATS:
        version, dtype = FORMATS[int(header[0])]
        if header[1] != version:
            raise ValueError(f"{path}: version {header[1]} of the shard format, but {version} is what can be read")
        offset, count = HEADER_WORDS * 4, int(header[2])
        if size != offset + count * dtype.itemsize:
            raise ValueError(f"{path} is torn: its header counts {count:,} tokens, which takes "
                             f"{offset + count * dtype.itemsize:,} bytes, and it has {size:,}")
    elif NANOGPT_NAME.fullmatch(path.name):
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
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


class Split:
    """The tokens of one split, as shards in a fixed order."""

    def __init__(self, paths: list[Path], vocab_size: int):
        self.paths, self.vocab_size = paths, vocab_size
        self.shards = [open_shard(path) for path in paths]
        self.lengths = np.array([len(shard) for shard in self.shards], dtype=np.int64)
        self.num_tokens = int(self.lengths.sum())

    def read(self, shard: int, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of a shard. Raises ValueError for an id outside the vocabulary."""
        tokens = self.shards[shard][start:start + length]
        if tokens.max() >= self.vocab_size:
            at = int(tokens.argmax())
            raise ValueError(f"{self.paths[shard]}: token id {tokens[at]} at position {start + at} is outside the "
                             f"vocabulary of {self.vocab_size}")
        return tokens


@dataclass
class Dataset:
    folder: Path
    splits: dict[str, Split]
    vocab_size: int
    tokenizer: Tokenizer | None  # None: the folder does not say, and GPT-2's could not be had
    fingerprint: str  # changes when the tokens do


def open_dataset(name: str, vocab_size: int = 0) -> Dataset:
    """Open data/<name>, or the folder of that path. `vocab_size` speaks for a folder that says nothing of its own.

    Raises FileNotFoundError with the command that makes the data, ValueError for a folder that is broken.
    """
    folder = find_folder(name)
    if (folder / "dataset.json").is_file():
        paths, own_size, checksums = _read_manifest(folder)
    else:
        paths, own_size, checksums = _find_shards(folder), _read_meta(folder).get("vocab_size"), []
    if vocab_size and own_size and vocab_size != own_size:
        raise ValueError(f"vocab_size={vocab_size}, but {folder} has a vocabulary of {own_size}; leave the key out")
    vocab_size = own_size or vocab_size or GPT2_VOCAB_SIZE
    splits = {name: Split(files, vocab_size) for name, files in paths.items()}
    summary = [checksums, [(name, path.name, int(length), _mark(path)) for name, split in splits.items()
                           for path, length in zip(split.paths, split.lengths)]]
    fingerprint = hashlib.sha256(json.dumps(summary).encode()).hexdigest()
    return Dataset(folder, splits, vocab_size, folder_tokenizer(folder, vocab_size), fingerprint)


def find_folder(name: str) -> Path:
    """data/<name>, else the folder at that path. Raises FileNotFoundError with the command that makes it."""
    for folder in (DATA_DIR / name, Path(name)):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"no data set {name!r} in {DATA_DIR}/; make it with: python prepare_data.py {name}   (or from your own text: "
        f"python prepare_data.py --input=FILE_OR_FOLDER --name={Path(name).name})")


def _read_manifest(folder: Path) -> tuple[dict[str, list[Path]], int, list[str]]:
    """Shards by split, vocabulary size and checksums of dataset.json. Raises ValueError when it is not ours."""
    manifest = read_json(folder / "dataset.json")
    paths: dict[str, list[Path]] = {}
    try:
        for shard in manifest["shards"]:
            paths.setdefault(shard["split"], []).append(folder / Path(shard["file"]).name)
        return paths, int(manifest["tokenizer"]["vocab_size"]), [shard["sha256"] for shard in manifest["shards"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}/dataset.json is not ours: {error} was not understood") from None


def _find_shards(folder: Path) -> dict[str, list[Path]]:
    for pattern in (SHARD_NAME, LLMC_NAME, NANOGPT_NAME):
        paths: dict[str, list[Path]] = {}
        for path in sorted(folder.iterdir()):
            if match := pattern.fullmatch(path.name):
                paths.setdefault(match["split"], []).append(path)
        if paths:
            return paths
    raise FileNotFoundError(f"{folder} holds no token shards: neither train_000000.bin nor nanoGPT's train.bin")


def _mark(path: Path, edge_bytes: int = 65536) -> str:
    """A hash of a file's two ends: it is too large to be read whole at every start."""
    with open(path, "rb") as file:
        head = file.read(edge_bytes)
        file.seek(max(0, path.stat().st_size - edge_bytes))
        return hashlib.sha256(head + file.read()).hexdigest()


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles dictionaries, lists, strings and numbers; anything that names a class or a function is refused."""

    def find_class(self, module, name):
        raise ValueError(f"it names {module}.{name}, and only plain values are read: a pickle can run code")


def _read_meta(folder: Path) -> dict:
    """nanoGPT's meta.pkl (vocab_size, stoi, itos), or {} where there is none."""
    path = folder / "meta.pkl"
    if not path.is_file():
        return {}
    try:
        with open(path, "rb") as file:
            meta = _PlainUnpickler(file).load()
    except Exception as error:  # a broken pickle raises nearly anything
        raise ValueError(f"{path} was refused: {error}") from None
    if not isinstance(meta, dict) or type(meta.get("vocab_size")) is not int or meta["vocab_size"] < 1:
        raise ValueError(f"{path} is not nanoGPT's: a dictionary with 'vocab_size' was expected")
    return meta


def folder_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a dataset folder: its tokenizer.json, the characters of its meta.pkl, or GPT-2's if it fits."""
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    stoi = _read_meta(folder).get("stoi")
    if isinstance(stoi, dict):
        by_id = {i: character for character, i in stoi.items()}
        characters = [by_id.get(i) for i in range(len(stoi))]
        if not all(isinstance(c, str) and len(c) == 1 for c in characters):
            raise ValueError(f"{folder}/meta.pkl: 'stoi' should number single characters from 0 on")
        return CharTokenizer(characters)
    if vocab_size < GPT2_VOCAB_SIZE:
        return None
    try:
        return GPT2Tokenizer()
    except OSError:  # training can do without: it only writes the tokenizer beside the weights
        return None


# The order


def derive_seed(*key: int | str) -> int:
    """63 random bits that are a function of the key, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> np.ndarray:
    return np.array([derive_seed(seed, "permute", epoch, r) for r in range(6)], dtype=np.uint64)


def _feistel(p: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    """A balanced Feistel network on [0, 4**half_bits): a bijection whatever the round function is."""
    mask = np.uint64((1 << half_bits) - 1)
    left, right = p >> np.uint64(half_bits), p & mask
    for key in keys:
        # The round function: the finaliser of SplitMix64 (Steele et al. 2014), which mixes all bits of right ^ key.
        z = (right ^ key) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((z ^ (z >> np.uint64(31))) & mask)
    return (left << np.uint64(half_bits)) | right


def permute(p: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where places p (int array, 0 <= p < n) go in a random permutation of [0, n) keyed by (seed, epoch).

    O(1) memory whatever n is: a Feistel network on the next power of four, walked along its cycles until it is back
    below n (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"); under four rounds a place on average.
    """
    keys = _round_keys(seed, epoch)
    half_bits = max(1, (int(n - 1).bit_length() + 1) // 2)
    out = _feistel(np.atleast_1d(p).astype(np.uint64), half_bits, keys)
    while (outside := out >= n).any():
        out[outside] = _feistel(out[outside], half_bits, keys)
    return out.astype(np.int64)


class TrainOrder:
    """Sequence number q -> window, without end: epoch after epoch over a split."""

    def __init__(self, split: Split, block_size: int, seed: int):
        """Raises ValueError when no shard of the split holds a single window."""
        self.split, self.block_size, self.seed = split, block_size, seed
        self._epoch_ends: list[int] = []  # sequences up to the end of each epoch met so far
        longest = int(split.lengths.max(initial=0))
        if longest < block_size + 1:
            raise ValueError(f"the train split of {split.paths[0].parent} has {longest} tokens in its longest shard, "
                             f"and one window takes block_size + 1 = {block_size + 1}: lower block_size, or add text")

    def cut(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's offset into each shard, and the number of windows in it; both (shards,)."""
        slack = np.maximum(self.split.lengths - 1 - self.block_size, 0)  # a larger offset would lose a short shard
        offset = np.minimum(derive_seed(self.seed, "offset", epoch) % self.block_size, slack)
        return offset, np.maximum(self.split.lengths - 1 - offset, 0) // self.block_size

    def windows(self, first_seq: int, count: int) -> list[tuple[int, int]]:
        """(shard, start) of the windows that sequences first_seq ... first_seq + count - 1 read."""
        found: list[tuple[int, int]] = []
        while len(found) < count:
            q = first_seq + len(found)
            epoch, epoch_start, epoch_end = self._epoch_of(q)
            offset, per_shard = self.cut(epoch)
            ends = per_shard.cumsum()
            places = np.arange(q, min(first_seq + count, epoch_end)) - epoch_start
            window = permute(places, int(ends[-1]), self.seed, epoch)
            shard = np.searchsorted(ends, window, side="right")
            start = offset[shard] + (window - ends[shard] + per_shard[shard]) * self.block_size
            found.extend(zip(shard.tolist(), start.tolist()))
        return found

    def _epoch_of(self, q: int) -> tuple[int, int, int]:
        """The epoch that sequence q falls in, its first sequence, and the first one after it."""
        ends = self._epoch_ends
        while not ends or ends[-1] <= q:
            ends.append((ends[-1] if ends else 0) + int(self.cut(len(ends))[1].sum()))
        epoch = int(np.searchsorted(ends, q, side="right"))
        return epoch, ends[epoch - 1] if epoch else 0, ends[epoch]

    def batch(self, first_seq: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of `count` sequences, (count, T) int64 each."""
        rows = np.stack([self.split.read(shard, start, self.block_size + 1)
                         for shard, start in self.windows(first_seq, count)]).astype(np.int64)
        return rows[:, :-1], rows[:, 1:]


class EvalOrder:
    """`num_seqs` windows evenly spaced over a split, 0 = all of them: the same for any W, micro-batch and step.

    Unlike in training every token but the first of a shard is a target once: a shard's last window may be short, and
    is filled up with inputs 0 and targets -1.
    """

    def __init__(self, split: Split, block_size: int, num_seqs: int = 0):
        self.split, self.block_size = split, block_size
        self._ends = np.maximum(-(-(split.lengths - 1) // block_size), 0).cumsum()
        total = int(self._ends[-1]) if len(self._ends) else 0
        if total == 0:
            raise ValueError("the validation split is empty: it takes at least two tokens to evaluate")
        count = min(num_seqs, total) or total
        self.is_whole = count == total
        self._chosen = np.arange(count, dtype=np.int64) * total // count

    def __len__(self) -> int:
        return len(self._chosen)

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the chosen windows [first, first + count), (count, T) int64 each; rows beyond the last
        window are padding."""
        chosen = self._chosen[first:first + count]
        rows = np.full((count, self.block_size + 1), -1, dtype=np.int64)
        for row, window, shard in zip(rows, chosen, np.searchsorted(self._ends, chosen, side="right")):
            before = self._ends[shard - 1] if shard else 0
            start = int(window - before) * self.block_size
            tokens = self.split.read(int(shard), start, self.block_size + 1)
            row[:len(tokens)] = tokens
        return np.maximum(rows[:, :-1], 0), rows[:, 1:]


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A batch on its device; to a GPU by an asynchronous copy out of pinned memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
