"""Records in, shards out: reading, tokenizing in worker processes, writing, all in the order of the source.

Owns the processes, and what is decided about a single document: its tokens, and whether it is kept. The main process
reads records and hands them out in batches of about a megabyte; the workers decode, hash, split (splits.py) and
tokenize; the results come back in the order of reading, and the main process writes them. The number of bytes under
way is limited, which bounds the memory whatever the size of the corpus.

Invariants: the tokens of a document are a function of its text, the SplitRule and, with `dedupe`, of the documents
before it; the number of workers changes nothing. progress.json is true at any moment: a killed run goes on from there,
and writes the same bytes. Workers end with the process that started them, however that ends.

Example: of the documents "a b" and "", the first falls in val. Its worker gives [eot 64 275] and the outcomes
[("val", 3)] and []; three tokens go to val_000000.tmp, and one empty document is counted.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from flatgpt import files, signals
from flatgpt.data.records import MAX_NAMED_FILES, Part, Record, text_of
from flatgpt.data.shards import ShardWriter, shard_dtype
from flatgpt.data.splits import DIGEST_BYTES, SPLITS, SplitRule, digest_of
from flatgpt.data.tokenizer import Tokenizer, check_kind, load_tokenizer, make_tokenizer
from flatgpt.options import failed_rules

BATCH_BYTES = 1 << 20  # text that a worker is handed at a time
AHEAD_BYTES = 64 << 20  # text that is on its way at a time, or one document if that is longer


@dataclass
class TokensConfig:
    """Tokens and shards to make"""

    tokenizer: Annotated[str, "path"] = "auto"  # gpt2, char, byte, bpe, a folder or hub id; auto = the source's
    vocab_size: int = 2048  # vocabulary of a bpe, which is trained on the text (its first 500 million characters)
    val_fraction: float | None = None  # share of the documents for validation; None = the source's own, or 0.1
    test_fraction: float = 0.0  # share of the documents for a test split
    dedupe: bool = False  # drop documents that came before, word for word; takes 130 MB of memory a million documents
    skip_bad: bool = False  # count broken lines and files instead of stopping at them
    shard_tokens: int = 100_000_000  # tokens a shard
    workers: int = 0  # processes that tokenize; 0 = one for each core

    def validate(self) -> list[str]:
        """What is wrong with these options, a sentence each."""
        val, test = self.val_fraction, self.test_fraction
        faults = failed_rules(
            self, ("shard_tokens", 0 < self.shard_tokens < 2**31, "positive, and below 2**31, which its header can "
                   "say"), ("workers", self.workers >= 0, "0 or more"))
        if val is not None and not (val > 0 and test >= 0 and val + test < 1):
            faults.append(f"val_fraction={val} must be above 0, test_fraction={test} not below, and both together below"
                          " 1")
        elif not 0 <= test < 0.9:
            faults.append(f"test_fraction={test} must be at least 0 and below 0.9")
        if self.tokenizer != "auto":
            try:
                check_kind(self.tokenizer)
            except ValueError as error:
                faults.append(str(error))
        return faults


class Cursor(NamedTuple):
    """A place between two records: `record` records of part number `part` lie before it, and all earlier parts."""

    part: int = 0
    record: int = 0


NOTED = ("replaced_bytes", "nul_characters", "unknown_tokens")  # of a document that is kept


class Outcome(NamedTuple):
    """What a record gave: the split and the number of tokens of each span, in order. A record that was empty or broken
    has none; `fault` says where and how it was broken."""

    spans: list[tuple[str, int]]
    num_bytes: int = 0
    digest: bytes = b""
    noted: Mapping[str, int] = {}  # how often each of NOTED was found in it
    fault: str = ""


@dataclass
class Encoder:
    """Records -> tokens; each worker has an Encoder."""

    kind: str  # the tokenizer's
    folder: Path  # with its tokenizer.json
    text_column: str

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return make_tokenizer(self.kind, [], 0) if self.kind in ("gpt2", "byte") else load_tokenizer(self.folder)

    @cached_property
    def dtype(self) -> np.dtype:
        return shard_dtype(self.tokenizer.vocab_size)

    def encode(self, records: list[Record], rule: SplitRule) -> tuple[np.ndarray, list[Outcome]]:
        """The tokens of all records one after the other, and the outcome of each record."""
        tokens = [np.empty(0, np.uint32)]
        outcomes = []
        for record in records:
            try:
                of_record, outcome = self._encode_record(record, rule)
            except ValueError as error:
                of_record, outcome = [], Outcome([], fault=str(error))
            tokens += of_record
            outcomes.append(outcome)
        return np.concatenate(tokens).astype(self.dtype), outcomes

    def _encode_record(self, record: Record, rule: SplitRule) -> tuple[list[np.ndarray], Outcome]:
        """Each span of the record stands behind an end-of-text token if there is one. Raises ValueError, saying where
        and what, for a record that is broken or cannot be encoded."""
        text, replaced = text_of(record, self.text_column)
        if not text:
            return [], Outcome([])
        eot_id, unk_id, utf8 = self.tokenizer.eot_id, self.tokenizer.unk_id, text.encode()
        before, digest = [] if eot_id is None else [np.array([eot_id], dtype=np.uint32)], digest_of(utf8)
        try:
            encoded = [(split, self.tokenizer.encode(part)) for split, part in rule.split(text, digest)]
        except ValueError as error:
            at = min((text.find(unknown) for unknown in getattr(error, "unknown", [])), default=-1)
            line = "" if at < 0 or record.form == "json" else f", line {text.count(chr(10), 0, at) + 1}"
            raise ValueError(f"{record.where}{line}: {error}") from None
        unknown = 0 if unk_id is None else sum(int(np.count_nonzero(ids == unk_id)) for _, ids in encoded)
        noted = {what: number for what, number in zip(NOTED, (replaced, text.count("\0"), unknown)) if number}
        spans = [(split, len(before) + len(ids)) for split, ids in encoded]
        return [part for _, ids in encoded for part in (*before, ids)], Outcome(spans, len(utf8), digest, noted)


# Workers


def start_method(kind: str) -> str:
    """How worker processes are started: "fork" if that is safe, else "spawn". Forking takes no time and shares the
    tokenizer's tables, but a lock that a library's thread holds would stay locked in the child for ever. So it is for
    Linux alone, before any of those libraries is imported, and not after a bpe's training or a download."""
    alone = threading.active_count() == 1 and not {"pyarrow", "datasets", "torch"} & sys.modules.keys()
    return "fork" if sys.platform == "linux" and alone and kind in ("gpt2", "char", "byte") else "spawn"


class Workers(contextlib.AbstractContextManager):
    """Processes that tokenize; a single worker is a thread. They load their tokenizer at once, while the caller does
    other things. A context manager."""

    def __init__(self, count: int, encoder: Encoder):
        start = {"initializer": _init_worker, "initargs": (encoder,)}
        self.count, method = count, start_method(encoder.kind)
        if method == "fork":
            encoder.tokenizer.encode("")  # the children share what it has loaded
        self._pool: Executor = ThreadPoolExecutor(1, **start) if count == 1 else ProcessPoolExecutor(
            count, multiprocessing.get_context(method), **start)
        with _ignored_sigint():
            for _ in range(count):  # each loads its tokenizer; an error there is raised by the next `_encode` as well
                self._pool.submit(_encode, [], None)

    def submit(self, records: list[Record], rule: SplitRule) -> Future:
        return self._pool.submit(_encode, records, rule)

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _ignored_sigint() -> Iterator[None]:
    """Processes that are started in here ignore Ctrl-C, even while they import: the main process is interrupted, and
    ends its workers."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_encoder: Encoder  # a worker's own


def _init_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    if parent := multiprocessing.parent_process():
        signals.prepare_streams()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_exit_with_parent, args=(parent.sentinel,), daemon=True).start()


def _exit_with_parent(parent_sentinel: int) -> None:
    """End a worker when its main process has been killed; otherwise it would wait for work for ever."""
    multiprocessing.connection.wait([parent_sentinel])
    os._exit(1)


def _encode(records: list[Record], rule: SplitRule | None) -> tuple[np.ndarray, list[Outcome]]:
    return _encoder.encode(records, rule)


# From records to shards


class Batch(NamedTuple):
    """Records that were tokenized together."""

    cursor: Cursor  # the reader's place behind the last
    end: int  # bytes of the last one's part up to there
    files: list[str]  # of each record
    tokens: np.ndarray
    outcomes: list[Outcome]


def encode_in_order(parts: list[Part], start: Cursor, rule: SplitRule, pool: Workers) -> Iterator[Batch]:
    """All records from `start` on, tokenized by the workers. Raises OSError if a worker dies."""
    ahead: deque[tuple[int, Future, Cursor, int, list[str]]] = deque()
    bytes_ahead, max_bytes_ahead = 0, max(AHEAD_BYTES, 2 * pool.count * BATCH_BYTES)
    try:
        for cursor, names, records in _read_batches(parts, start):
            num_bytes = sum(len(record.data) for record in records)
            ahead.append((num_bytes, pool.submit(records, rule), cursor, records[-1].end, names))
            bytes_ahead += num_bytes
            while len(ahead) > 8 * pool.count or bytes_ahead > max_bytes_ahead:
                num_bytes, future, *place = ahead.popleft()
                bytes_ahead -= num_bytes
                yield Batch(*place, *future.result())
        for _, future, *place in ahead:
            yield Batch(*place, *future.result())
    except BrokenExecutor:
        raise OSError("a tokenizing process died, perhaps because memory ran out: the same command with fewer "
                      "--workers goes on from the last finished shard") from None


def _read_batches(parts: list[Part], start: Cursor) -> Iterator[tuple[Cursor, list[str], list[Record]]]:
    """Records in batches of about BATCH_BYTES, with the place behind each batch and the names of their parts."""
    names, records, num_bytes = [], [], 0
    for index in range(start.part, len(parts)):
        for number, record in enumerate(parts[index].read(), 1):
            if index == start.part and number <= start.record:
                continue
            cursor = Cursor(index, number)
            names.append(parts[index].name)
            records.append(record)
            num_bytes += len(record.data)
            if num_bytes >= BATCH_BYTES:
                yield cursor, names, records
                names, records, num_bytes = [], [], 0
    if records:
        yield cursor, names, records


def refuse(fault: str, skip_bad: bool) -> None:
    """Raises ValueError for a broken record, unless `skip_bad` says that these are only counted."""
    if not skip_bad:
        raise ValueError(f"{fault} (--skip_bad=True counts what is broken, and goes on)")


class Output(contextlib.AbstractContextManager):
    """What one rank writes: shards, counts, and progress.json, which says how far they go. A new Output goes on from
    there (staging.py writes the first); what an earlier run wrote beyond it is written anew."""

    def __init__(self, folder: Path, config: TokensConfig, vocab_size: int, arguments: dict[str, Any]):
        self._folder, self._config, self._arguments, self._vocab_size = folder, config, arguments, vocab_size
        with files.reading_values(folder / "progress.json"):
            state = files.read_json(folder / "progress.json")
            self.cursor, self.counts, self.done = Cursor(*map(int, state["cursor"])), Counter(state["counts"]), False
            self.files: dict[str, dict[str, int]] = state.get("files", {})  # what was counted -> the first it is of
            self.first_fault: str = state.get("first_fault", "")
            self._writers = {split: ShardWriter(
                folder, split, shard_dtype(vocab_size), config.shard_tokens,
                [shard for shard in state["shards"] if shard["split"] == split], state["open_tokens"].get(split, 0))
                for split in SPLITS}
        self.seen: set[bytes] = set()
        self._digests = open(folder / "digests", "a+b")  # noqa: SIM115  closed by __exit__
        self._digests.truncate(self.counts["digests"] * DIGEST_BYTES)
        self.seen |= read_digests(folder / "digests")

    @property
    def shards(self) -> list[dict[str, Any]]:
        return [shard for writer in self._writers.values() for shard in writer.shards]

    @property
    def num_tokens(self) -> int:
        return sum(writer.num_tokens for writer in self._writers.values())

    def take(self, batch: Batch) -> list[dict[str, Any]]:
        """Write a batch without its empty, broken and duplicate documents; return the shards that it filled.

        Raises ValueError or OSError."""
        kept: list[tuple[str, int, int]] = []  # split, begin and end in the batch's tokens: neighbours as one
        begin = 0
        for outcome, file in zip(batch.outcomes, batch.files):
            dropped = self._count(outcome, file)
            for split, count in outcome.spans:
                end = begin + count
                if not dropped and kept and kept[-1][0] == split and kept[-1][2] == begin:
                    kept[-1] = (split, kept[-1][1], end)
                elif not dropped:
                    kept.append((split, begin, end))
                begin = end
        filled = [shard for split, begin, end in kept for shard in self._writers[split].add(batch.tokens[begin:end])]
        self.cursor = batch.cursor
        if filled:
            self._save()
        return filled

    def _count(self, outcome: Outcome, file: str) -> bool:
        """Count a record of a file; return whether it is dropped. Raises ValueError for a broken one, or OSError."""
        is_duplicate = self._config.dedupe and bool(outcome.spans) and outcome.digest in self.seen
        if outcome.fault or not outcome.spans or is_duplicate:
            if outcome.fault:
                refuse(outcome.fault, self._config.skip_bad)
                self.first_fault = self.first_fault or outcome.fault
            self._note("bad_records" if outcome.fault else "duplicate_documents" if is_duplicate else "empty_documents",
                       file, 1)
            return True
        if self._config.dedupe:
            self.seen.add(outcome.digest)
            with files.named_errors(self._folder / "digests"):
                self._digests.write(outcome.digest)
            self.counts["digests"] += 1
        self.counts["documents"] += 1
        self.counts["bytes"] += outcome.num_bytes
        self.counts["documents_with_replaced_bytes"] += outcome.noted.get("replaced_bytes", 0) > 0
        self.counts.update(f"{split}_documents" for split, _ in outcome.spans)
        for what, number in outcome.noted.items():
            self._note(what, file, number)
        return False

    def _note(self, what: str, file: str, number: int) -> None:
        """Count what was dropped or changed, by file for the first MAX_NAMED_FILES files."""
        self.counts[what] += number
        named = self.files.setdefault(what, {})
        if file in named or len(named) < MAX_NAMED_FILES:
            named[file] = named.get(file, 0) + number

    def finish(self) -> None:
        for writer in self._writers.values():
            writer.finish()
        self.done = True
        self._save()

    def _save(self) -> None:
        for writer in self._writers.values():
            writer.checkpoint()
        with files.named_errors(self._folder / "digests"):
            self._digests.flush()
            os.fsync(self._digests.fileno())
        files.write_json(self._folder / "progress.json", {
            "arguments": self._arguments, "done": self.done, "cursor": self.cursor, "counts": self.counts,
            "files": self.files, "first_fault": self.first_fault, "vocab_size": self._vocab_size, "shards": self.shards,
            "open_tokens": {split: writer.open_tokens for split, writer in self._writers.items()}})

    def __exit__(self, *exception: object) -> None:
        for writer in self._writers.values():
            writer.close()
        with contextlib.suppress(OSError):
            self._digests.close()


def read_digests(path: Path) -> set[bytes]:
    data = path.read_bytes()
    return {data[i:i + DIGEST_BYTES] for i in range(0, len(data), DIGEST_BYTES)}
