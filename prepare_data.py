"""Make a dataset folder of token shards out of text.

    python prepare_data.py shakespeare_char                     tiny Shakespeare, characters
    python prepare_data.py python_source                        every .py file of this Python: needs no network
    python prepare_data.py fineweb_edu                          10 billion tokens of FineWeb-Edu, from the hub
    python prepare_data.py --hf=owner/name --text_column=body   any other data set of the hub
    python prepare_data.py --input='texts/*.jsonl.gz' --name=mine --tokenizer=bpe
    python prepare_data.py shakespeare_char --input=input.txt   a named source, from a file that is already here
    python prepare_data.py --verify=data/mine                   is the folder what was written?
    python prepare_data.py --info=data/mine                     what is in it?

The named sources are shakespeare_char, shakespeare, python_stdlib, python_source, tinystories, wikitext, openwebtext,
fineweb and fineweb_edu.

Several processes on one machine or many, which see the same data/ folder, share out the files of a source:

    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=node0:29500 prepare_data.py fineweb_edu

The folder is data/NAME; train.py finds it as --dataset=NAME. It appears only when it is complete: until then the work
lies in data/.NAME.partial, and the same command goes on from the last finished shard there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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
    begin_progress,
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
COUNTS = {"documents": "document", "bytes": "byte", "empty_documents": "empty document",
          "duplicate_documents": "duplicate", "bad_records": "broken record",
          "documents_with_replaced_bytes": "replaced text"}  # of dataset.json -> in words
FOLDER_NAME = re.compile(r"(?!\.)[\w.+-]+")
SMALL_BYTES = 4 << 20  # below this, starting worker processes takes longer than the work


@dataclass
class PrepareConfig:
    source: SourceConfig = field(default_factory=SourceConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    name: str = ""  # the folder in data/ to make; default: the source's or the input's name
    verify: str = ""  # only check every checksum, count and token id of this dataset folder
    info: str = ""  # only show what is in this dataset folder


def main(argv: list[str]) -> None:
    config, given = settings.parse(PrepareConfig, argv, usage=__doc__, bare_word="dataset")
    check_options(config, given)
    if config.verify:
        return verify(shards.find_folder(config.verify))
    if config.info:
        return show_info(shards.find_folder(config.info))
    source = SOURCES.get(config.source.dataset, sources.Source())
    if config.tokens.val_fraction is None:
        config.tokens.val_fraction = source.val_fraction
    if config.tokens.tokenizer == "auto":
        config.tokens.tokenizer = source.tokenizer
    prepare(config, *ranks())
    return None


def check_options(config: PrepareConfig, given: Mapping[str, str]) -> None:
    """Raises ValueError that lists all faults."""
    source, tokens, faults = config.source, config.tokens, []
    if looking := [key for key in ("verify", "info") if key in given]:
        if others := [f"--{key}" for key in given if key != looking[0]]:
            faults.append(f"--{looking[0]} only looks into a folder: leave out {' '.join(others)}")
    elif not (source.dataset or source.input or source.hf):
        faults.append(f"nothing to read: name a source ({', '.join(SOURCES)}), a data set of the hub (--hf=OWNER/NAME) "
                      "or --input=FILE_OR_FOLDER")
    if source.dataset and source.dataset not in SOURCES:
        hint = settings.closest(source.dataset, SOURCES) or f"the sources are {', '.join(SOURCES)}"
        faults.append(f"no source {source.dataset!r}; {hint} (your own text: --input=FILE_OR_FOLDER --name=NAME)")
    elif source.hf and (source.input or source.dataset):
        faults.append(f"--hf={source.hf} is a source of its own: leave out "
                      + ("--input" if source.input else f"the name {source.dataset}"))
    elif not looking and not sources.hub_name(source):
        faults += [f"{key} is for data sets of the hub" for key in ("subset", "split", "revision") if key in given]
    val, test = tokens.val_fraction, tokens.test_fraction
    if val is not None and not (val > 0 and test >= 0 and val + test < 1):
        faults.append(f"val_fraction={val} must be above 0, test_fraction={test} not below, and both together below 1")
    elif not 0 <= test < 0.9:
        faults.append(f"test_fraction={test} must be at least 0 and below 0.9")
    if not 0 < tokens.shard_tokens < 2**31:
        faults.append(f"shard_tokens={tokens.shard_tokens} must be positive, and below 2**31, which its header can say")
    if tokens.workers < 0:
        faults.append(f"workers={tokens.workers} must be 0 or more")
    if "name" in given and not FOLDER_NAME.fullmatch(config.name):
        faults.append(f"name={config.name!r} must be a plain folder name of letters, digits and .-+_")
    if faults:
        raise ValueError("; ".join(faults))


def ranks() -> tuple[int, int]:
    """This process's number and how many there are, from torchrun's environment. Raises ValueError."""
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdigit() and world_size.isdigit() and int(rank) < int(world_size)):
        raise ValueError(f"RANK={rank} and WORLD_SIZE={world_size} in the environment are not the numbers of a process "
                         "and of all processes")
    return int(rank), int(world_size)


# The folder


def prepare(config: PrepareConfig, rank: int, world_size: int) -> None:
    """Make this rank's shards, and as rank 0 the dataset folder out of all ranks' shards.

        data/.NAME.partial/
            tokenizer_1f0c22a9/                  rank 0 makes it
            rank_00000_of_00002_1f0c22a9/        shards, progress.json, digests of its documents
            rank_00001_of_00002_1f0c22a9/

    Rank 0 waits until every progress.json says `done`, moves the shards up, writes dataset.json and renames the folder.
    The last part of the names stands for the arguments, so that what others have begun is never taken up.
    """
    name = folder_name(config)
    target, unfinished = DATA_DIR / name, DATA_DIR / f".{name}.partial"
    repo = sources.hub_name(config.source)
    commit = pin_commit(repo, config.source.revision, target, unfinished, rank) if repo else ""
    # A commit says what is in a data set; otherwise its parts have to be looked at.
    parts = None if commit and target.exists() else sources.find_parts(config.source, commit)
    arguments = arguments_of(config, commit, "" if commit else sources.fingerprint(parts))
    if is_there(target, arguments, rank):
        return
    tag = hashlib.sha256(json.dumps(compared(arguments)).encode()).hexdigest()[:8]
    check_begun(unfinished, world_size, tag, arguments)
    DATA_DIR.mkdir(exist_ok=True)
    with lock(target, rank):
        if is_there(target, arguments, rank):  # meanwhile
            return
        try:
            work = unfinished / rank_name(rank, world_size, tag)
            if not (is_done(work) or (unfinished / "dataset.json").exists()):
                write_shards(config, parts, work, unfinished / f"tokenizer_{tag}", arguments, rank, world_size)
            if rank == 0:
                join(config, unfinished, world_size, tag, arguments)
                os.rename(unfinished, target)
                files.sync(DATA_DIR)
                print(describe(target, files.read_json(target / "dataset.json")))
        except BaseException:
            if any(unfinished.rglob("*.bin")) and rank == 0:
                print(f"what is finished is kept in {unfinished}: the same command goes on from there", flush=True)
            elif world_size == 1:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise


def folder_name(config: PrepareConfig) -> str:
    """The name of the folder to make: as asked for, else that of what is read. Raises ValueError for none."""
    source = config.source
    name = config.name or source.dataset
    if not name:
        path = Path(source.input or source.hf)
        name = path.resolve().name if source.input else path.name
        if path.is_file():
            name = name.removesuffix(sources.ending(path) or path.suffix)
    if not FOLDER_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a folder in {DATA_DIR}/: add --name=NAME")
    return name


def pin_commit(repo: str, revision: str, target: Path, unfinished: Path, rank: int) -> str:
    """The commit of a hub data set that all ranks read, today and in a resumed run: the one that is written down, else
    what the revision stands for now, which rank 0 finds out."""
    begun = f"rank_{0:05d}_of_*/progress.json"
    if rank > 0 and not (target / "dataset.json").exists():
        wait_for(lambda: [] if any(unfinished.glob(begun)) else ["rank 0 to begin"])
    for record in (target / "dataset.json", unfinished / "dataset.json", *unfinished.glob(begun)):
        if record.exists():
            return files.read_json(record).get("arguments", {}).get("commit", "")
    return sources.commit_of(repo, revision)


def arguments_of(config: PrepareConfig, commit: str, fingerprint: str) -> dict[str, Any]:
    """What the shards are a function of, as dataset.json keeps it."""
    source, tokens = config.source, config.tokens
    return {"source": source.hf or source.dataset, "input": source.input, "input_fingerprint": fingerprint,
            "subset": source.subset, "split": source.split, "revision": source.revision, "commit": commit,
            "text_column": source.text_column, "tokenizer": tokens.tokenizer,
            "vocab_size": tokens.vocab_size if tokens.tokenizer == "bpe" else None,
            "val_fraction": tokens.val_fraction, "test_fraction": tokens.test_fraction, "dedupe": tokens.dedupe,
            "skip_bad": tokens.skip_bad, "shard_tokens": tokens.shard_tokens}


def compared(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key not in ("input", "skip_bad")}


def check_arguments(folder: Path, record: Path, arguments: dict[str, Any]) -> None:
    """Raises ValueError unless `record`, a JSON file in folder, says that folder is made with these arguments. (The
    path of the input and skip_bad may differ: what they lead to is the same, or was counted.)"""
    if not record.is_file():
        raise ValueError(f"{folder} exists and was not made by prepare_data.py: choose another --name, or remove it")
    made = files.read_json(record).get("arguments", {})
    if differing := ["the files of the source have changed" if key == "input_fingerprint" else
                     f"{key} was {made.get(key)}, is {value}" for key, value in compared(arguments).items()
                     if made.get(key) != value]:
        raise ValueError(f"{folder} was made with other arguments ({'; '.join(differing)}): choose another --name, or "
                         "remove it")


def is_there(target: Path, arguments: dict[str, Any], rank: int) -> bool:
    """Whether the folder is finished. Raises ValueError when it was made of something else."""
    if not target.exists():
        return False
    check_arguments(target, target / "dataset.json", arguments)
    if rank == 0:
        print(f"{target} is there already, made with the same arguments")
    return True


def check_begun(unfinished: Path, world_size: int, tag: str, arguments: dict[str, Any]) -> None:
    """Raises ValueError when other arguments, or another number of processes, have finished shards in a folder."""
    if (unfinished / "dataset.json").exists():
        check_arguments(unfinished, unfinished / "dataset.json", arguments)
    for folder in unfinished.glob("rank_*"):
        if any(folder.glob("*.bin")) and not folder.name.endswith(rank_name(0, world_size, tag)[len("rank_00000"):]):
            check_arguments(unfinished, folder / "progress.json", arguments)
            raise ValueError(f"{unfinished} was begun by another number of processes ({folder.name}): go on with that, "
                             "or remove it")


@contextlib.contextmanager
def lock(target: Path, rank: int) -> Iterator[None]:
    """Keep a second run off this rank's work. Raises OSError when there is one."""
    held = FileLock(target.with_name(f".{target.name}.{rank}.lock"), timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise OSError(f"{target} is being made by another process: wait for it, or choose another --name") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows keeps a file that is open
            os.unlink(held.lock_file)
        held.release()


def rank_name(rank: int, world_size: int, tag: str) -> str:
    return f"rank_{rank:05d}_of_{world_size:05d}_{tag}"


def write_shards(config: PrepareConfig, parts: list[Part], work: Path, kept: Path, arguments: dict[str, Any],
                 rank: int, world_size: int) -> None:
    """This rank's part of the work, from where an earlier run left it. `kept` is the folder of the tokenizer."""
    source, tokens = config.source, config.tokens
    work.mkdir(parents=True, exist_ok=True)
    begin_progress(work, arguments)
    if tokens.tokenizer in ("char", "bpe") and not kept.exists():
        if rank == 0:
            max_bytes = BPE_BYTES if tokens.tokenizer == "bpe" else float("inf")
            keep_tokenizer(make_tokenizer(tokens.tokenizer, texts(parts, config, max_bytes), tokens.vocab_size), kept)
        else:
            wait_for(lambda: [] if kept.exists() else ["rank 0 to make the tokenizer"])
    mine = parts[rank::world_size]
    encoder = Encoder(tokens.tokenizer, kept, source.text_column)
    with Workers(num_workers(config, mine), encoder) as workers:
        if rank == 0 and not kept.exists():
            keep_tokenizer(encoder.tokenizer, kept)
        rule = plan_splits(parts, source.text_column, tokens.val_fraction, tokens.test_fraction)
        expected_bytes = int(sum(part.text_bytes for part in parts) * TOKENS_PER_BYTE[tokens.tokenizer]
                             * encoder.dtype.itemsize)
        with Output(work, tokens, encoder.tokenizer.vocab_size, expected_bytes, arguments) as output:
            if output.cursor == Cursor() and rank == 0:
                check_disk(work, expected_bytes)
            if tokens.dedupe and world_size > 1:
                output.seen |= earlier_digests(config, mine, work, rank, world_size)
            with Progress(mine, output, silent=rank > 0) as progress:
                for batch in encode_in_order(mine, output.cursor, rule, workers):
                    progress.show(batch, output.take(batch))
            output.finish()


def num_workers(config: PrepareConfig, mine: list[Part]) -> int:
    """As many as the user says, else one for each core that this rank may use; one for a small source."""
    if sum(part.size for part in mine) < SMALL_BYTES and not sources.hub_name(config.source):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.tokens.workers or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


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
    for path in hidden.iterdir():
        files.sync(path)
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


def earlier_digests(config: PrepareConfig, mine: list[Part], work: Path, rank: int, world_size: int) -> set[bytes]:
    """The digests of all documents that lower ranks have: of what is in several ranks' files, the lowest keeps it.
    Every rank reads its files once for that, before it tokenizes them."""
    own, earlier = work / "all_digests", set()
    if not own.exists():
        hidden = work / "all_digests.tmp"
        with files.named_errors(own):
            hidden.write_bytes(b"".join(digest_of(text.encode()) for text in texts(mine, config)))
        os.replace(hidden, own)
    for r in range(rank):
        path = work.with_name(rank_name(r, world_size, work.name[-8:])) / "all_digests"
        wait_for(lambda path=path: [] if path.exists() else [f"the digests of {path.parent.name}"])
        earlier |= read_digests(path)
    return earlier


def wait_for(missing: Callable[[], list[str]]) -> None:
    """Return when nothing is missing any more; says now and then what is."""
    began = said = time.monotonic()
    while what := missing():
        if time.monotonic() - said > 30:
            said = time.monotonic()
            print(f"waiting for {', '.join(what[:5])} ({said - began:.0f} s)", flush=True)
        time.sleep(min(5.0, 0.1 + (time.monotonic() - began) / 20))  # a shared disk is not asked all the time


def join(config: PrepareConfig, unfinished: Path, world_size: int, tag: str, arguments: dict[str, Any]) -> None:
    """Make the ranks' shards one folder, when all ranks are done. A kill in between loses nothing: what was moved is
    found moved. Raises ValueError when no text is left to train on."""
    folders = [unfinished / rank_name(rank, world_size, tag) for rank in range(world_size)]
    if not (unfinished / "dataset.json").exists():
        wait_for(lambda: [folder.name for folder in folders if not is_done(folder)])
        states = [files.read_json(folder / "progress.json") for folder in folders]
        counts: Counter[str] = sum((Counter(state["counts"]) for state in states), Counter())
        if not counts["train_documents"]:
            shutil.rmtree(unfinished)
            raise ValueError(f"the train split came out empty ({plural(counts['documents'], 'document')}, "
                             f"{plural(counts['bytes'], 'byte')}): give more text")
        listed = []
        for split in SPLITS:
            shards_of_split = [(folder / shard["file"], shard) for folder, state in zip(folders, states)
                               for shard in state["shards"] if shard["split"] == split]
            for number, (path, shard) in enumerate(shards_of_split):
                listed.append(shard | {"file": f"{split}_{number:06d}.bin"})
                if path.exists():
                    os.replace(path, unfinished / listed[-1]["file"])
        for path in (unfinished / f"tokenizer_{tag}").glob("*"):
            os.replace(path, unfinished / path.name)
        files.sync(unfinished)
        vocab_size = states[0]["vocab_size"]
        files.write_json(unfinished / "dataset.json", {
            "format_version": 1, "tokenizer": {"kind": config.tokens.tokenizer, "vocab_size": vocab_size},
            "dtype": shard_dtype(vocab_size).name, **{key: counts[key] for key in COUNTS},
            "splits": {split: {"documents": counts[f"{split}_documents"],
                               "tokens": sum(shard["tokens"] for shard in listed if shard["split"] == split)}
                       for split in SPLITS if split != "test" or config.tokens.test_fraction},
            "arguments": arguments, "shards": listed})
    for leftover in [path for path in unfinished.iterdir() if path.is_dir()]:
        shutil.rmtree(leftover)


def is_done(folder: Path) -> bool:
    """Whether a rank has written all its shards."""
    path = folder / "progress.json"
    return path.exists() and files.read_json(path)["done"]


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def describe(target: Path, manifest: dict[str, Any]) -> str:
    """What was made, and what is missing in it."""
    dropped = [plural(manifest[key], word) for key, word in COUNTS.items() if manifest[key]]
    lines = [f"{target}: {', '.join(dropped)}; tokenizer {manifest['tokenizer']['kind']} with "
             f"{manifest['tokenizer']['vocab_size']:,} tokens; "
             + ", ".join(f"{split} {held['tokens']:,}" for split, held in manifest["splits"].items()) + " tokens"]
    lines += [f"warning: no document fell in the {split} split: give a larger --{split}_fraction"
              for split, held in manifest["splits"].items() if not held["tokens"]]
    return "\n".join(lines)


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
        self._bar.update(self._at(batch.cursor, batch.end) - self._bar.n)

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
        raise ValueError(f"{folder} is not sound: {plural(num_faults, 'fault')}, listed above")
    print(f"{folder} is sound: {plural(checked, 'shard')}")


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
