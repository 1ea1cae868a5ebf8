"""The hidden folder that a dataset folder is made in, and where the ranks of a job meet.

    data/.NAME.partial/
        tokenizer_1f0c22a9/                  rank 0 makes it
        rank_00000_of_00002_1f0c22a9/        shards, progress.json, with dedupe the digests of its documents
        rank_00001_of_00002_1f0c22a9/

Owns who may work there, what may be continued, and the last step, `publish`: when every rank's progress.json says
`done`, rank 0 moves the shards up, writes dataset.json and renames the folder. There is no process group: the ranks see
each other's files, so that a late or a resumed one needs nobody to be there.

Invariants: data/NAME exists only when it is complete; the last part of the names stands for the arguments, so that work
begun with others is never taken up; finished shards of others are never removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from flatgpt import files
from flatgpt.data.documents import open_index
from flatgpt.data.local_files import describe_skipped
from flatgpt.data.pipeline import Cursor
from flatgpt.data.records import MAX_NAMED_FILES
from flatgpt.data.shards import Split, shard_dtype
from flatgpt.data.splits import SPLITS
from flatgpt.data.tokenizer import has_tokenizer, load_tokenizer

COUNTS = {"documents": "document", "bytes": "byte", "empty_documents": "empty document",
          "duplicate_documents": "duplicate", "bad_records": "broken record",
          "documents_with_replaced_bytes": "replaced text"}  # of dataset.json -> in words
FILES = {  # of dataset.json -> how it is said of which files
    "bad_records": "dropped, because broken", "empty_documents": "dropped, because empty",
    "duplicate_documents": "dropped, because duplicate",
    "replaced_bytes": "warning: bytes that are not valid text, replaced by U+FFFD",
    "unknown_tokens": "warning: tokens for text that the tokenizer does not know",
    "nul_characters": "warning: NULs in the text, as of UTF-16 without a byte order mark"}
UNCOMPARED = ("input", "skip_bad")  # arguments that may differ: what they lead to is the same, or was counted


class StagingFolder:
    def __init__(self, target: Path, arguments: dict[str, Any], rank: int, world_size: int):
        """`arguments` is what the shards are a function of, and goes into dataset.json."""
        self.target, self.folder = target, hidden_folder(target)
        self.arguments, self.rank, self.world_size = arguments, rank, world_size
        self._compared = {key: value for key, value in arguments.items() if key not in UNCOMPARED}
        tag = hashlib.sha256(json.dumps(self._compared).encode()).hexdigest()[:8]
        self._of_all = f"_of_{world_size:05d}_{tag}"
        self.work = self.rank_folder(rank)
        self.tokenizer = self.folder / f"tokenizer_{tag}"

    def rank_folder(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}{self._of_all}"

    def is_published(self) -> bool:
        """Whether the target is there. Raises ValueError if it was made with other arguments."""
        if self.target.exists():
            self._compare(self.target, self.target / "dataset.json")
        return self.target.exists()

    def check_begun_work(self) -> None:
        """Raises ValueError if a run with other arguments, or another number of processes, has finished shards here."""
        if (self.folder / "dataset.json").exists():
            self._compare(self.folder, self.folder / "dataset.json")
        for begun in self.folder.glob("rank_*"):
            if any(begun.glob("*.bin")) and not begun.name.endswith(self._of_all):
                self._compare(self.folder, begun / "progress.json")
                raise ValueError(f"{self.folder} was begun by another number of processes ({begun.name}): use that "
                                 "number again, or remove the folder")

    def _compare(self, folder: Path, record: Path) -> None:
        """Raises ValueError unless `record`, a JSON file, says that folder is made with our arguments."""
        if not record.is_file():
            raise ValueError(f"{folder} exists and was not made by prepare_data.py: choose another --name, or remove "
                             "it")
        made = arguments_in(record)
        if differing := ["the files of the source have changed" if key == "input_fingerprint" else
                         f"{key} was {made.get(key)}, is {value}" for key, value in self._compared.items()
                         if made.get(key) != value]:
            raise ValueError(f"{folder} was made with other arguments ({'; '.join(differing)}): choose another "
                             "--name, or remove it")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock this rank's work against a second run. Raises OSError when another run holds the lock."""
        self.target.parent.mkdir(exist_ok=True)
        held = FileLock(self.target.with_name(f".{self.target.name}.{self.rank}.lock"))
        files.take_lock(held, f"{self.target} is being made by another process: wait for it, or choose another --name")
        try:
            yield
        finally:
            os.unlink(held.lock_file)
            held.release()

    def begin(self) -> bool:
        """Make this rank's folder, with its progress.json. False if rank 0 has published the target in the meantime:
        then nothing is left to do."""
        self.work.mkdir(parents=True, exist_ok=True)
        if not (self.work / "progress.json").exists():
            files.write_json(self.work / "progress.json", {
                "arguments": self.arguments, "done": False, "cursor": Cursor(), "counts": {}, "shards": [],
                "open_tokens": {}})
        if published := self.target.exists():
            shutil.rmtree(self.work, ignore_errors=True)
            shutil.rmtree(self.target / self.work.name, ignore_errors=True)  # it went along
            with contextlib.suppress(OSError):  # other ranks may be stepping back as well
                self.folder.rmdir()
        return not published

    def is_done(self) -> bool:
        """Whether nothing is left to do for this rank."""
        return (self.folder / "dataset.json").exists() or is_done(self.work)

    def publish(self, files_read: int, left_out: dict[str, Any]) -> dict[str, Any]:
        """As rank 0, wait for all ranks and make the target of their shards; returns its dataset.json. A kill in
        between loses nothing: the next run finds what was moved. Raises ValueError if there is nothing to train on."""
        folders = [self.rank_folder(rank) for rank in range(self.world_size)]
        if not (self.folder / "dataset.json").exists():
            wait_for(lambda: [folder.name for folder in folders if not is_done(folder)])
            self._join([files.read_json(folder / "progress.json") for folder in folders],
                       {"files_read": files_read, "left_out": left_out})
        for leftover in [path for path in self.folder.iterdir() if path.is_dir()]:
            shutil.rmtree(leftover)
        os.rename(self.folder, self.target)
        files.sync(self.target.parent)
        return files.read_json(self.target / "dataset.json")

    def _join(self, states: list[dict[str, Any]], about: dict[str, Any]) -> None:
        """Move the ranks' shards up under new numbers, and write dataset.json, to which `about` is added."""
        counts: Counter[str] = sum((Counter(state["counts"]) for state in states), Counter())
        if not counts["train_documents"]:
            shutil.rmtree(self.folder)
            found = ", ".join(plural(counts[key], word) for key, word in COUNTS.items()
                              if counts[key] or key in ("documents", "bytes"))
            first = f"; the first that is broken: {fault}" if (fault := _first_fault(states)) else ""
            raise ValueError(f"the train split came out empty ({found}{first}): give more text")
        listed = []
        for split in SPLITS:
            of_split = [(self.rank_folder(rank) / shard["file"], shard) for rank, state in enumerate(states)
                        for shard in state["shards"] if shard["split"] == split]
            for number, (path, shard) in enumerate(of_split):
                listed.append(shard | {"file": f"{split}_{number:06d}.bin"})
                if path.exists():
                    os.replace(path, self.folder / listed[-1]["file"])
        for path in self.tokenizer.glob("*"):
            os.replace(path, self.folder / path.name)
        files.sync(self.folder)
        if (eot_id := load_tokenizer(self.folder).eot_id) is not None:
            open_index(Split([self.folder / shard["file"] for shard in listed], states[0]["vocab_size"]), eot_id)
        vocab_size = states[0]["vocab_size"]
        named = {what: sorted(item for state in states for item in state.get("files", {}).get(what, {}).items())
                 for what in FILES if counts[what]}
        about |= {key: counts[key] for key in COUNTS | FILES} | {
            "files": {what: dict(found[:MAX_NAMED_FILES]) for what, found in named.items()},
            "first_fault": _first_fault(states)}
        splits = {split: {"documents": counts[f"{split}_documents"],
                          "tokens": sum(shard["tokens"] for shard in listed if shard["split"] == split)}
                  for split in SPLITS if split != "test" or self.arguments["test_fraction"]}
        files.write_json(self.folder / "dataset.json", {
            "format_version": 1, "tokenizer": {"kind": self.arguments["tokenizer"], "vocab_size": vocab_size},
            "dtype": shard_dtype(vocab_size).name, **about, "splits": splits,
            "arguments": self.arguments, "shards": listed})

    def clean_up(self) -> None:
        """After a failure, say what is kept; if no shard is finished, remove the folder."""
        if any(self.folder.rglob("*.bin")):
            if self.rank == 0:
                print(f"what is finished is kept in {self.folder}: the same command goes on from there", flush=True)
        elif self.world_size == 1:
            shutil.rmtree(self.folder, ignore_errors=True)


def _first_fault(states: list[dict[str, Any]]) -> str:
    return next((state["first_fault"] for state in states if state.get("first_fault")), "")


def hidden_folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def recorded_commit(target: Path, source: str, revision: str, rank: int) -> str | None:
    """The commit of a hub data set that was recorded when this work on target began. Rank 0 records it, and gets None
    if it has not done so; the others wait for it."""
    def found() -> list[str]:
        records = [target / "dataset.json", hidden_folder(target) / "dataset.json",
                   *hidden_folder(target).glob("rank_00000_of_*/progress.json")]
        begun = [arguments_in(record) for record in records if record.exists()]
        return [arguments.get("commit", "") for arguments in begun
                if (arguments.get("source"), arguments.get("revision")) == (source, revision)]

    if rank > 0 and not target.exists():
        wait_for(lambda: [] if found() else ["rank 0 to begin"])
    return next(iter(found()), None)


def is_done(rank_folder: Path) -> bool:
    """Whether a rank has written all its shards."""
    path = rank_folder / "progress.json"
    with files.reading_values(path):
        return path.exists() and files.read_json(path)["done"]


def arguments_in(record: Path) -> dict[str, Any]:
    """The arguments in a dataset.json or progress.json. Raises ValueError if they are no object."""
    arguments = files.read_json(record).get("arguments", {})
    if not isinstance(arguments, dict):
        raise ValueError(f"{record}: 'arguments' should be an object, not {arguments!r}")
    return arguments


def wait_for(missing: Callable[[], list[str]]) -> None:
    """Wait until nothing is missing any more; print now and then what is missing."""
    began = said = time.monotonic()
    while what := missing():
        if time.monotonic() - said > 30:
            said = time.monotonic()
            print(f"waiting for {', '.join(what[:5])} ({said - began:.0f} s)", flush=True)
        time.sleep(min(5.0, 0.1 + (time.monotonic() - began) / 20))  # a shared disk is not asked all the time


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def describe(target: Path, manifest: dict[str, Any]) -> str:
    """The summary of a dataset folder, with its warnings, a line each."""
    counts = [plural(manifest[key], word) for key, word in COUNTS.items() if manifest.get(key)]
    lines = [f"{target}: {', '.join(counts)}; tokenizer {manifest['tokenizer']['kind']} with "
             f"{manifest['tokenizer']['vocab_size']:,} tokens; "
             + ", ".join(f"{split} {held['tokens']:,}" for split, held in manifest["splits"].items()) + " tokens"]
    if left_out := manifest.get("left_out"):
        lines.append(f"left out: {describe_skipped(left_out)}")
    for what, named in manifest.get("files", {}).items():
        first = dict(list(named.items())[:3])
        others = manifest[what] - sum(first.values())
        lines.append(f"{FILES[what]}: " + ", ".join(f"{file} {count:,}" for file, count in first.items())
                     + (f", other files {others:,}" if others else "")
                     + (f" (the first: {manifest['first_fault']})" if what == "bad_records" else ""))
    lines += [f"warning: no document fell in the {split} split: give a larger --{split}_fraction"
              for split, held in manifest["splits"].items() if not held["tokens"]]
    lines += [f"warning: the {split} split has one token, but a loss takes two: give "
              + ("more text" if split == "train" else f"more text, or a larger --{split}_fraction")
              for split, held in manifest["splits"].items() if held["tokens"] == 1]
    total, arguments = sum(held["tokens"] for held in manifest["splits"].values()), manifest.get("arguments", {})
    for split, held in manifest["splits"].items():
        wanted = arguments.get(f"{split}_fraction") or 0
        if held["tokens"] > 2 * wanted * total > 0:
            lines.append(f"warning: the {split} split has {100 * held['tokens'] / total:.2g}% of the tokens, and "
                         f"{100 * wanted:g}% were asked for: a document is in one split, and these are few, or very "
                         "different in length")
    if manifest["documents"] > 1 and has_tokenizer(target) and load_tokenizer(target).eot_id is None:
        lines.append("note: nothing separates the documents, because the tokenizer has no end-of-text token")
    return "\n".join(lines)
