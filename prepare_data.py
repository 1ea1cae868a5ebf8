"""Make a dataset folder of token shards out of text.

    python prepare_data.py shakespeare_char                     tiny Shakespeare, characters
    python prepare_data.py python_source                        every .py file of this Python: needs no network
    python prepare_data.py fineweb_edu                          10 billion tokens of FineWeb-Edu, from the hub
    python prepare_data.py --hf=owner/name --text_column=body   any other data set of the hub
    python prepare_data.py --input='texts/*.jsonl.gz' --name=mine --tokenizer=bpe
    python prepare_data.py shakespeare_char --input=input.txt   a named source, from a file that is already here
    python prepare_data.py --verify=data/mine                   is the folder what was written?
    python prepare_data.py --info=data/mine                     what is in it?

Several processes on one machine or many, which see the same data/ folder, share out the files of a source:

    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=node0:29500 prepare_data.py fineweb_edu

The folder is data/NAME; train.py finds it as --dataset=NAME. It appears only when it is complete: until then the work
lies in data/.NAME.partial, and the same command goes on from the last finished shard there.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

import files
import settings
import shards
import sources
from pipeline import (
    SPLITS,
    Batch,
    Cursor,
    Encoder,
    Output,
    TokensConfig,
    Workers,
    begin,
    digest_of,
    encode_in_order,
    plan_splits,
    read_digests,
    refuse,
)
from shards import DATA_DIR, shard_dtype
from sources import SOURCES, Part, SourceConfig, text_of
from tokenizer import Tokenizer, make_tokenizer

BPE_BYTES = 500 << 20  # text that a bpe is trained on, at most
TOKENS_PER_BYTE = {"gpt2": 0.25, "bpe": 0.25, "char": 1.0, "byte": 1.0}  # about, to know the disk space ahead
COUNTS = ("documents", "bytes", "empty_documents", "duplicate_documents", "bad_records",
          "documents_with_replaced_bytes")  # of dataset.json
SMALL_BYTES = 4 << 20  # below this, starting worker processes takes longer than the work
UNCOMPARED = ("input", "skip_bad")  # arguments that may change: what they lead to is compared by its fingerprint


@dataclass
class PrepareConfig:
    source: SourceConfig = field(default_factory=SourceConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    name: str = ""  # the folder in data/ to make; default: the source's or the input's name
    verify: str = ""  # only check every checksum, count and token id of this dataset folder
    info: str = ""  # only show what is in this dataset folder


def main(argv: list[str]) -> None:
    config, _ = settings.parse(PrepareConfig, argv, usage=__doc__, bare_word="dataset")
    if config.verify:
        return verify(shards.find_folder(config.verify))
    if config.info:
        return show_info(shards.find_folder(config.info))
    source = SOURCES.get(config.source.dataset)
    if config.tokens.val_fraction is None:
        config.tokens.val_fraction = source.val_fraction if source else 0.1
    if config.tokens.tokenizer == "auto":
        config.tokens.tokenizer = source.tokenizer if source else "gpt2"
    check_options(config)
    prepare(config, *(int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1))))
    return None


def check_options(config: PrepareConfig) -> None:
    """Raises ValueError that lists all faults."""
    faults, source = [], config.source
    if not (source.dataset or source.input or source.hf):
        faults.append(f"nothing to read: name a source ({', '.join(SOURCES)}), a data set of the hub (--hf=OWNER/NAME) "
                      "or --input=FILE_OR_FOLDER")
    if source.input and source.hf:
        faults.append("--input and --hf are two sources: choose one")
    if source.dataset and source.dataset not in SOURCES:
        hint = settings.closest(source.dataset, SOURCES) or f"the sources are {', '.join(SOURCES)}"
        faults.append(f"no source {source.dataset!r}; {hint} (your own text: --input=FILE_OR_FOLDER --name=NAME)")
    val, test = config.tokens.val_fraction, config.tokens.test_fraction
    if not (val > 0 and test >= 0 and val + test < 1):
        faults.append(f"val_fraction={val} must be above 0, test_fraction={test} not below, and both together below 1")
    if config.tokens.shard_tokens < 1:
        faults.append(f"shard_tokens={config.tokens.shard_tokens} must be positive")
    if config.tokens.workers < 0:
        faults.append(f"workers={config.tokens.workers} must be 0 or more")
    if Path(config.name).name != config.name:
        faults.append(f"name={config.name!r} must be a plain folder name")
    if faults:
        raise ValueError("; ".join(faults))


def check_arguments(folder: Path, record: Path, arguments: dict[str, Any]) -> None:
    """Raises ValueError unless `record`, a JSON file in folder, says that folder is made with these arguments."""
    if not record.is_file():
        raise ValueError(f"{folder} exists and was not made by prepare_data.py: choose another --name, or remove it")
    made = files.read_json(record).get("arguments", {})
    if differing := [f"{key} was {made.get(key)}, is {value}" for key, value in arguments.items()
                     if made.get(key) != value and key not in UNCOMPARED]:
        raise ValueError(f"{folder} was made with other arguments ({'; '.join(differing)}): choose another --name, or "
                         "remove it")


# The folder


def prepare(config: PrepareConfig, rank: int, world_size: int) -> None:
    """Make this rank's shards, and as rank 0 the dataset folder out of all ranks' shards.

        data/.NAME.partial/
            tokenizer/                  char and bpe, which rank 0 makes of the text
            rank_00000_of_00002/        shards, progress.json, with --dedupe the digests of its documents
            rank_00001_of_00002/

    Rank 0 waits until every progress.json says `done`, moves the shards up, writes dataset.json and renames the folder.
    """
    source, tokens = config.source, config.tokens
    name = config.name or source.dataset or default_name(source)
    target, partial = DATA_DIR / name, DATA_DIR / f".{name}.partial"
    parts = sources.find_parts(source)
    arguments = {
        "source": source.dataset or source.hf, "input": source.input, "input_fingerprint": sources.fingerprint(parts),
        "subset": source.subset, "split": source.split, "revision": source.revision,
        "text_column": source.text_column, "tokenizer": tokens.tokenizer,
        "vocab_size": tokens.vocab_size if tokens.tokenizer == "bpe" else None, "val_fraction": tokens.val_fraction,
        "test_fraction": tokens.test_fraction, "dedupe": tokens.dedupe, "skip_bad": tokens.skip_bad,
        "shard_tokens": tokens.shard_tokens}
    if target.exists():
        check_arguments(target, target / "dataset.json", arguments)
        if rank == 0:
            print(f"{target} is there already, made with the same arguments")
        return
    work = partial / rank_name(rank, world_size)
    for begun in partial.glob("rank_*"):
        if not begun.name.endswith(work.name[-len("_of_00000"):]):
            raise ValueError(f"{partial} was begun by another number of processes ({begun.name}): go on with that, or "
                             "remove it")
    DATA_DIR.mkdir(exist_ok=True)
    lock = FileLock(DATA_DIR / f".{name}.{rank}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise OSError(f"{target} is being made by another process: wait for it, or choose another --name") from None
    if world_size == 1:
        drop_if_nothing_is_finished(partial)
    try:
        if not is_done(work, arguments) and not (partial / "dataset.json").exists():
            write_shards(config, parts, partial, rank, world_size, arguments)
        if rank == 0:
            manifest = join(config, partial, world_size, arguments)
            os.rename(partial, target)
            files.sync(DATA_DIR)
            print(describe(target, manifest))
    except BaseException:
        if world_size == 1:
            drop_if_nothing_is_finished(partial)
        if rank == 0 and partial.exists():
            print(f"what is finished is kept in {partial}: the same command goes on from there", flush=True)
        raise
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def drop_if_nothing_is_finished(partial: Path) -> None:
    """Remove the work of a run that was stopped before its first shard was full."""
    if not any(partial.rglob("*.bin")):
        shutil.rmtree(partial, ignore_errors=True)


def default_name(source: SourceConfig) -> str:
    """The name of what is read, without a file's ending. Raises ValueError for a glob."""
    if glob.has_magic(source.input):
        raise ValueError(f"--input={source.input} is no name for a folder in {DATA_DIR}/: add --name=NAME")
    path = Path(source.input or source.hf)
    return path.resolve().name.removesuffix(sources.ending(path) or path.suffix) if source.input else path.name


def rank_name(rank: int, world_size: int) -> str:
    return f"rank_{rank:05d}_of_{world_size:05d}"


def write_shards(config: PrepareConfig, parts: list[Part], partial: Path, rank: int, world_size: int,
                 arguments: dict[str, Any]) -> None:
    """This rank's part of the work, from where an earlier run left it."""
    source, tokens, kept = config.source, config.tokens, partial / "tokenizer"
    work = partial / rank_name(rank, world_size)
    work.mkdir(parents=True, exist_ok=True)
    begin(work, arguments)
    if tokens.tokenizer in ("char", "bpe") and not kept.exists():
        if rank == 0:
            max_bytes = BPE_BYTES if tokens.tokenizer == "bpe" else float("inf")
            keep_tokenizer(make_tokenizer(tokens.tokenizer, texts(parts, config, max_bytes), tokens.vocab_size), kept)
        else:
            wait_for(lambda: [] if kept.exists() else ["rank 0 to make the tokenizer"])
    mine = parts[rank::world_size]
    encoder = Encoder(tokens.tokenizer, kept, source.text_column)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    small = 0 < sum(part.size for part in mine) < SMALL_BYTES
    with Workers(1 if small else tokens.workers or cores, encoder) as workers:
        if rank == 0 and not kept.exists():
            keep_tokenizer(encoder.tokenizer, kept)
        rule = plan_splits(parts, source.text_column, tokens.val_fraction, tokens.test_fraction)
        expected_bytes = int(sum(part.text_bytes for part in parts) * TOKENS_PER_BYTE[tokens.tokenizer]
                             * encoder.dtype.itemsize)
        with Output(work, tokens, encoder.tokenizer.vocab_size, expected_bytes, arguments) as output:
            if output.cursor == Cursor() and rank == 0:
                check_disk(partial, expected_bytes)
            if tokens.dedupe and world_size > 1:
                output.seen |= earlier_digests(config, mine, partial, rank, world_size)
            with Progress(mine, output, silent=rank > 0) as progress:
                for batch in encode_in_order(mine, output.cursor, rule, workers):
                    progress.show(batch, output.take(batch))
            output.finish()


def check_disk(folder: Path, expected_bytes: int) -> None:
    """Raises OSError when the shards will hardly fit. (It is a rough guess; each shard is checked as it begins.)"""
    free = shutil.disk_usage(folder).free
    if free < 0.8 * expected_bytes:
        raise OSError(f"the disk of {DATA_DIR}/ has {free:,} bytes free, and about {expected_bytes:,} are to be "
                      "written: free some space, or work on another disk")


def keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Save a tokenizer in a folder that appears when it is complete."""
    hidden = folder.with_name(f".{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir()
    tokenizer.save(hidden)
    os.rename(hidden, folder)


def texts(parts: list[Part], config: PrepareConfig, max_bytes: float = float("inf")) -> Iterator[str]:
    """The texts of a source, up to so many bytes."""
    num_bytes = 0
    for part in parts:
        for record in part.read():
            try:
                text = text_of(record, config.source.text_column)[0]
            except ValueError as error:
                refuse(str(error), config.tokens.skip_bad)
                continue
            yield text
            num_bytes += len(text)
            if num_bytes >= max_bytes:
                return


def earlier_digests(config: PrepareConfig, mine: list[Part], partial: Path, rank: int, world_size: int) -> set[bytes]:
    """The digests of all documents that lower ranks have: of what is in several ranks' files, the lowest keeps it.
    Every rank reads its files once for that, before it tokenizes them."""
    folders = [partial / rank_name(r, world_size) for r in range(rank + 1)]
    if not (folders[rank] / "all_digests").exists():
        hidden = folders[rank] / "all_digests.tmp"
        hidden.write_bytes(b"".join(digest_of(text.encode()) for text in texts(mine, config)))
        os.replace(hidden, folders[rank] / "all_digests")
    wait_for(lambda: [f"the digests of {folder.name}" for folder in folders if not (folder / "all_digests").exists()])
    return set().union(*(read_digests(folder / "all_digests") for folder in folders[:rank]))


def wait_for(missing: Callable[[], list[str]]) -> None:
    """Return when nothing is missing any more; says now and then what is."""
    began = said = time.monotonic()
    while what := missing():
        if time.monotonic() - said > 30:
            said = time.monotonic()
            print(f"waiting for {', '.join(what[:5])} ({said - began:.0f} s)", flush=True)
        time.sleep(min(5.0, 0.1 + (time.monotonic() - began) / 20))  # a shared disk is not asked all the time


def join(config: PrepareConfig, partial: Path, world_size: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Make the ranks' shards one folder, when all ranks are done. A kill in between loses nothing: what was moved is
    found moved. Raises ValueError when a split came out empty."""
    folders = [partial / rank_name(rank, world_size) for rank in range(world_size)]
    if not (partial / "dataset.json").exists():
        wait_for(lambda: [folder.name for folder in folders if not is_done(folder, arguments)])
        states = [files.read_json(folder / "progress.json") for folder in folders]
        counts: Counter[str] = sum((Counter(state["counts"]) for state in states), Counter())
        listed = []
        for split in SPLITS:
            moves = [(folder / shard["file"], shard) for folder, state in zip(folders, states)
                     for shard in state["shards"] if shard["split"] == split]
            for number, (path, shard) in enumerate(moves):
                listed.append(shard | {"file": f"{split}_{number:06d}.bin"})
                if path.exists():
                    os.replace(path, partial / listed[-1]["file"])
        splits = {split: {"documents": counts[f"{split}_documents"],
                          "tokens": sum(shard["tokens"] for shard in listed if shard["split"] == split)}
                  for split in SPLITS if split != "test" or config.tokens.test_fraction}
        for split, held in splits.items():
            if not held["tokens"]:
                shutil.rmtree(partial)
                raise ValueError(f"the {split} split came out empty ({counts['documents']:,} documents, "
                                 f"{counts['bytes']:,} bytes): give more text, or another --val_fraction or "
                                 "--test_fraction")
        for path in (partial / "tokenizer").glob("*"):
            os.replace(path, partial / path.name)
        vocab_size = states[0]["vocab_size"]
        files.write_json(partial / "dataset.json", {
            "format_version": 1, "tokenizer": {"kind": config.tokens.tokenizer, "vocab_size": vocab_size},
            "dtype": shard_dtype(vocab_size).name, **{key: counts[key] for key in COUNTS}, "splits": splits,
            "arguments": arguments, "shards": listed})
    for leftover in [*folders, partial / "tokenizer"]:
        shutil.rmtree(leftover, ignore_errors=True)
    check_arguments(partial, partial / "dataset.json", arguments)
    return files.read_json(partial / "dataset.json")


def is_done(folder: Path, arguments: dict[str, Any]) -> bool:
    """Whether a rank has written all its shards. Raises ValueError when it was given other arguments."""
    path = folder / "progress.json"
    if not path.exists():
        return False
    check_arguments(folder, path, arguments)
    return files.read_json(path)["done"]


def describe(target: Path, manifest: dict[str, Any]) -> str:
    """What was made, in one line."""
    dropped = [f"{manifest[key]:,} {key.replace('_', ' ')}" for key in COUNTS[2:] if manifest[key]]
    return (f"{target}: {manifest['documents']:,} documents, {manifest['bytes']:,} bytes"
            + (f" ({', '.join(dropped)})" if dropped else "")
            + f"; tokenizer {manifest['tokenizer']['kind']} with {manifest['tokenizer']['vocab_size']:,} tokens; "
            + ", ".join(f"{split} {held['tokens']:,}" for split, held in manifest["splits"].items()) + " tokens")


class Progress:
    """A bar on a terminal, a line for each finished shard elsewhere: share done, MB/s of text, tokens, time left."""

    def __init__(self, parts: list[Part], output: Output, silent: bool):
        self._before = np.cumsum([0] + [part.size for part in parts])
        self._parts, self._output, self._silent = parts, output, silent
        self._began, self._bytes_before = time.monotonic(), output.counts["bytes"]
        columns, lines = shutil.get_terminal_size()  # 80 x 24 where it is unknown
        self._bar = tqdm(total=max(1, int(self._before[-1])), initial=self._at(output.cursor, 0), ncols=columns,
                         nrows=lines, disable=silent or not sys.stderr.isatty(),
                         bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}")

    def _at(self, cursor: Cursor, end: int) -> int:
        return int(self._before[cursor.part]) + min(end, self._parts[cursor.part].size) if self._parts else 0

    def show(self, batch: Batch, filled: list[dict[str, Any]]) -> None:
        speed = (self._output.counts["bytes"] - self._bytes_before) / 1e6 / max(time.monotonic() - self._began, 1e-9)
        text = f"{speed:.1f} MB/s, {self._output.num_tokens / 1e6:,.1f}M tokens, {len(self._output.shards)} shards"
        if not self._silent and self._bar.disable and filled:
            print(f"{filled[-1]['file']} is full: {text}", flush=True)
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(self._at(batch.cursors[-1], batch.ends[-1]) - self._bar.n)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()


# Looking into a folder


def verify(folder: Path) -> None:
    """Print what is wrong with a dataset folder. Raises ValueError when something is."""
    checked = num_faults = 0
    for name, faults in tqdm(shards.verify(folder), unit="shard", disable=not sys.stderr.isatty()):
        checked += name != folder.name
        num_faults += len(faults)
        for fault in faults:
            tqdm.write(fault)
    if num_faults:
        raise ValueError(f"{folder} is not sound: {num_faults} faults, listed above")
    print(f"{folder} is sound: {checked} shards")


def show_info(folder: Path) -> None:
    """Print a table of a dataset folder, and the text of a few windows."""
    dataset = shards.open_dataset(str(folder))
    manifest, tokenizer = dataset.manifest, dataset.tokenizer
    kind = manifest["tokenizer"]["kind"] if manifest else "not said" if tokenizer is None else tokenizer.kind
    print(f"{folder}: tokenizer {kind}, vocabulary of {dataset.vocab_size:,}")
    if manifest:
        print(describe(folder, manifest))
        print("made with " + ", ".join(f"{key} {value}" for key, value in manifest.get("arguments", {}).items()
                                       if value and key != "input_fingerprint"))
    print(f"\n{'split':6}{'shards':>8}{'tokens':>18}{'documents':>14}{'bytes on disk':>18}")
    for split, held in dataset.splits.items():
        documents = manifest.get("splits", {}).get(split, {}).get("documents")
        size = sum(path.stat().st_size for path in held.paths)
        print(f"{split:6}{len(held.paths):8,}{held.num_tokens:18,}"
              f"{'?' if documents is None else format(documents, ','):>14}{size:18,}")
    for held in dataset.splits.values():
        for path, tokens in list(zip(held.paths, held.shards))[:: max(1, len(held.paths) // 2)]:
            start = len(tokens) // 3
            window = tokens[start:start + 48]
            text = repr(tokenizer.decode(window)) if tokenizer else " ".join(map(str, window))
            print(f"\n{path.name}, tokens {start:,} to {start + len(window):,}:\n    {text}")


if __name__ == "__main__":
    settings.run(main)
