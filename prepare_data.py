"""Make a dataset folder of token shards out of text.

    python prepare_data.py shakespeare_char                     tiny Shakespeare, characters
    python prepare_data.py python_source                        every .py file of this Python: needs no network
    python prepare_data.py fineweb_edu                          10 billion tokens of FineWeb-Edu, from the hub
    python prepare_data.py --hf=owner/name --text_column=body   any other data set of the hub
    python prepare_data.py --input='texts/*.jsonl.gz' --name=mine --tokenizer=bpe
    python prepare_data.py --input=texts --name=more --tokenizer=out/run/checkpoints/best   in that model's tokens
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

from flatgpt import launcher, signals

if __name__ == "__main__":
    signals.begin()

import re
import shutil
import sys
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tqdm import tqdm

from flatgpt import files, machine
from flatgpt.data import hub, pipeline, shards, sources, staging
from flatgpt.data.local_files import expand_glob, known_suffix
from flatgpt.data.pipeline import Batch, Cursor, Encoder, Output, TokensConfig, Workers, encode_in_order, refuse
from flatgpt.data.records import Part, text_of
from flatgpt.data.shards import DATA_DIR
from flatgpt.data.sources import SOURCES, SourceConfig
from flatgpt.data.splits import digest_of, plan_splits
from flatgpt.data.staging import StagingFolder, describe, plural, wait_for
from flatgpt.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer
from flatgpt.options import check_options, parse_options, run_script

BPE_CHARACTERS = 500 << 20  # text that a bpe is trained on, at most
FOLDER_NAME = re.compile(r"(?!\.)[\w.+-]+")
SMALL_BYTES = 4 << 20  # below this, starting worker processes takes longer than the work


@dataclass
class PrepareConfig:
    source: SourceConfig = field(default_factory=SourceConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    name: str = ""  # the folder in data/ to make; default: the source's or the input's name
    show_merges: bool = False  # print what a bpe has learned: every merge, in order
    verify: Annotated[str, "path"] = ""  # only check every checksum, count and token id of this dataset folder
    info: Annotated[str, "path"] = ""  # only show what is in this dataset folder

    def validate(self) -> list[str]:
        """What is wrong with these options, a sentence each."""
        source, looking, faults = self.source, bool(self.verify or self.info), []
        if not (looking or source.dataset or source.input or source.hf):
            faults.append(f"nothing to read: name a source ({', '.join(SOURCES)}), a data set of the hub "
                          "(--hf=OWNER/NAME) or --input=FILE_OR_FOLDER")
        if self.show_merges and not looking and (kind := tokenizer_kind(self)) != "bpe":
            faults.append(f"show_merges: the {kind} tokenizer learns no merges from the text, --tokenizer=bpe does")
        if self.name and not FOLDER_NAME.fullmatch(self.name):
            faults.append(f"name={self.name!r} must be a plain folder name of letters, digits and .-+_")
        return faults

    def conflicts(self, given: Collection[str]) -> list[str]:
        """Which of the given keys have no effect together with --verify or --info."""
        looking = "verify" if self.verify else "info" if self.info else ""
        others = [f"--{key}" for key in given if key != looking]
        return [f"--{looking} only looks into a folder: leave out {' '.join(others)}"] if looking and others else []


def main(argv: list[str]) -> None:
    """Make a dataset folder, verify one, or show what is in it."""
    config, given = parse_options(PrepareConfig, argv, usage=__doc__, bare_word="dataset")
    check_options(config, given)
    if config.verify:
        return verify(shards.find_folder(config.verify))
    if config.info:
        return show_info(shards.find_folder(config.info))
    if config.tokens.val_fraction is None:
        config.tokens.val_fraction = SOURCES.get(config.source.dataset, sources.Source()).val_fraction
    config.tokens.tokenizer = tokenizer_kind(config)
    rank, world_size, *_ = launcher.ranks()
    if world_size > 1 and not launcher.UNDER_TORCHRUN:
        print(f"this is rank {rank} of {world_size}, and all of them have to be started: the environment has "
              f"{launcher.rank_variables()}; {launcher.HOW_TO_START}", flush=True)
    prepare(config, rank, world_size)
    if config.show_merges and rank == 0:
        show_merges(DATA_DIR / folder_name(config))
    return None


def tokenizer_kind(config: PrepareConfig) -> str:
    """The tokenizer asked for, else the source's own."""
    source = SOURCES.get(config.source.dataset, sources.Source())
    return source.tokenizer if config.tokens.tokenizer == "auto" else config.tokens.tokenizer


def prepare(config: PrepareConfig, rank: int, world_size: int) -> None:
    """Make data/<name>, together with the other ranks, unless it exists. Raises ValueError or OSError."""
    target = DATA_DIR / folder_name(config)
    repo, commit = sources.hub_name(config.source), ""
    if repo:  # all ranks, and a resumed run, read what the first one found
        source = config.source
        commit = staging.recorded_commit(target, source.hf or source.dataset, source.revision, rank)
        commit = hub.commit_of(repo, source.revision) if commit is None else commit
    # A commit says what is in a data set; otherwise its parts have to be looked at.
    parts = [] if commit and target.exists() else sources.find_parts(config.source, commit)
    fingerprint = "" if commit else sources.fingerprint(parts)
    folder = StagingFolder(target, input_arguments(config, commit, fingerprint), rank, world_size)
    if not folder.is_published():
        folder.check_begun_work()
        with folder.lock():
            if not folder.is_published():  # meanwhile
                make(config, parts, folder)
                return
    if rank == 0:
        print(f"{target} exists already and was made with the same arguments: nothing to do")


def make(config: PrepareConfig, parts: list[Part], folder: StagingFolder) -> None:
    """Write this rank's shards; as rank 0, make a folder of all ranks' shards."""
    try:
        if not folder.is_done():
            write_shards(config, parts, folder)
        if folder.rank == 0:
            left_out = sources.skipped_files(config.source, parts)
            print(describe(folder.target, folder.publish(len(parts), left_out)))
    except BaseException:
        folder.clean_up()
        raise


def folder_name(config: PrepareConfig) -> str:
    """The name of the folder to make: --name, else the name of the source. Raises ValueError if there is none."""
    source, path = config.source, Path(config.source.input or config.source.hf)
    name = config.name or source.dataset or (path.resolve() if source.input else path).name
    if path.is_file() and not (config.name or source.dataset):
        name = name.removesuffix(known_suffix(path) or path.suffix)
    if source.input and not expand_glob(source.input):
        raise FileNotFoundError(f"--input={source.input}: no such file or folder")
    if not FOLDER_NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot be the name of a folder in {DATA_DIR}/: add --name=NAME")
    return name


def input_arguments(config: PrepareConfig, commit: str, fingerprint: str) -> dict[str, Any]:
    """The arguments that decide what the shards hold, as dataset.json keeps them."""
    source, tokens = config.source, config.tokens
    return {"source": source.hf or source.dataset, "input": source.input, "input_fingerprint": fingerprint,
            "subset": source.subset, "split": source.split, "revision": source.revision, "commit": commit,
            "text_column": source.text_column, "tokenizer": tokens.tokenizer,
            "vocab_size": tokens.vocab_size if tokens.tokenizer == "bpe" else None,
            "val_fraction": tokens.val_fraction, "test_fraction": tokens.test_fraction, "dedupe": tokens.dedupe,
            "skip_bad": tokens.skip_bad, "shard_tokens": tokens.shard_tokens}


def write_shards(config: PrepareConfig, parts: list[Part], folder: StagingFolder) -> None:
    """Write this rank's shards, going on from where an earlier run left them."""
    source, tokens, rank = config.source, config.tokens, folder.rank
    if not folder.begin():
        return
    if tokens.tokenizer not in ("gpt2", "byte") and not folder.tokenizer.exists():
        if rank == 0:
            learned = texts(parts, config, BPE_CHARACTERS if tokens.tokenizer == "bpe" else float("inf"))
            made = make_tokenizer(tokens.tokenizer, learned, tokens.vocab_size)
            if not made.vocab_size:
                raise ValueError("the source is empty: there is no text to make tokens of")
            save_tokenizer(made, folder.tokenizer)
        else:
            wait_for(lambda: [] if folder.tokenizer.exists() else ["rank 0 to make the tokenizer"])
    mine = parts[rank::folder.world_size]
    encoder = Encoder(tokens.tokenizer, folder.tokenizer, source.text_column)
    with Workers(num_workers(config, mine), encoder) as workers, ThreadPoolExecutor(1) as background:
        saving = background.submit(save_tokenizer, encoder.tokenizer, folder.tokenizer) if rank == 0 else None
        rule = plan_splits(parts, source.text_column, tokens.val_fraction, tokens.test_fraction)
        with Output(folder.work, tokens, encoder.tokenizer.vocab_size, folder.arguments) as output:
            if output.cursor == Cursor() and rank == 0:
                check_disk(folder.work, parts, encoder)
            if tokens.dedupe and folder.world_size > 1:
                output.seen |= earlier_digests(config, mine, folder)
            write_batches(encode_in_order(mine, output.cursor, rule, workers), mine, output, silent=rank > 0)
            if saving:
                saving.result()
            output.finish()


def num_workers(config: PrepareConfig, mine: list[Part]) -> int:
    """The number asked for, else one for each core that this rank may use; one for a small source."""
    if sum(part.size for part in mine) < SMALL_BYTES and not sources.hub_name(config.source):
        return 1
    return config.tokens.workers or max(1, machine.num_cores() // launcher.ranks().local_world_size)


def check_disk(folder: Path, parts: list[Part], encoder: Encoder) -> None:
    """Raises OSError if a rough estimate says that the disk is too small for the shards."""
    tokens_per_byte = 1.0 if encoder.kind in ("char", "byte") else 0.25
    expected_bytes = int(sum(part.text_bytes for part in parts) * tokens_per_byte * encoder.dtype.itemsize)
    free = shutil.disk_usage(folder).free
    if free < 0.8 * expected_bytes:
        raise OSError(f"the disk of {DATA_DIR}/ has {free:,} bytes free, but about {expected_bytes:,} will be "
                      "written: free some space, or work on another disk")


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Save a tokenizer in a folder that appears when it is complete, unless it exists."""
    if not folder.exists():
        with files.named_errors(folder), files.new_folder(folder) as hidden:
            tokenizer.save(hidden)


def texts(parts: list[Part], config: PrepareConfig, max_characters: float = float("inf")) -> Iterator[str]:
    """The texts of a source, up to `max_characters`."""
    num_characters = 0
    for part in parts:
        for record in part.read():
            try:
                text = text_of(record, config.source.text_column)[0]
            except ValueError as error:
                refuse(str(error), config.tokens.skip_bad)
                continue
            yield text
            num_characters += len(text)
            if num_characters >= max_characters:
                return


def earlier_digests(config: PrepareConfig, mine: list[Part], folder: StagingFolder) -> set[bytes]:
    """The digests of all documents in the files of lower ranks: the lowest rank keeps a document that several have.
    For that, every rank reads its files once before it tokenizes them."""
    own, earlier = folder.work / "all_digests", set()
    if not own.exists():
        files.write_bytes(own, b"".join(digest_of(text.encode()) for text in texts(mine, config)))
    for rank in range(folder.rank):
        path = folder.rank_folder(rank) / "all_digests"
        wait_for(lambda path=path: [] if path.exists() else [f"the digests of {path.parent.name}"])
        earlier |= pipeline.read_digests(path)
    return earlier


def write_batches(batches: Iterator[Batch], parts: list[Part], output: Output, silent: bool) -> None:
    """Write all batches, and show the share done, MB/s of text, tokens and the time left: as a bar on a terminal, a
    line for each finished shard elsewhere."""
    part_starts = np.cumsum([0] + [part.size for part in parts])
    began, bytes_before = time.monotonic(), output.counts["bytes"]

    def place(cursor: Cursor, end: int) -> int:
        return int(part_starts[cursor.part]) + min(end, parts[cursor.part].size) if parts else 0

    columns, lines = shutil.get_terminal_size()  # 80 x 24 where it is unknown
    with tqdm(total=max(1, int(part_starts[-1])), initial=place(output.cursor, 0), ncols=columns, nrows=lines,
              disable=silent or not sys.stderr.isatty(),
              bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}") as bar:
        for batch in batches:
            filled = output.take(batch)
            speed = (output.counts["bytes"] - bytes_before) / 1e6 / max(time.monotonic() - began, 1e-9)
            text = f"{speed:.1f} MB/s, {output.num_tokens / 1e6:,.1f}M tokens, {len(output.shards)} shards"
            if filled and bar.disable and not silent:
                print(f"{filled[-1]['file']} is finished: {text}", flush=True)
            bar.set_postfix_str(text, refresh=False)
            bar.update(place(batch.cursor, batch.end) - bar.n)


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
        raise ValueError(f"{folder} is damaged: {plural(num_faults, 'fault')}, listed above")
    print(f"{folder} is intact: {plural(checked, 'shard')}")


def show_info(folder: Path) -> None:
    """Print a table of a dataset folder, and the text of a few windows."""
    dataset = shards.open_dataset(str(folder))
    manifest, tokenizer = dataset.manifest, dataset.tokenizer
    kind = manifest["tokenizer"]["kind"] if manifest else "not said" if tokenizer is None else tokenizer.kind
    print(f"{folder}: tokenizer {kind}, vocabulary of {dataset.vocab_size:,}")
    if manifest:
        with files.reading_values(folder / "dataset.json"):
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


def show_merges(folder: Path) -> None:
    """Print the merges that the folder's tokenizer has learned: number, the two parts, and what they make."""
    tokenizer = load_tokenizer(folder)
    merges = tokenizer.merges()
    print(f"{plural(len(merges), 'merge')}, in the order they were learned:")
    for number, rule in enumerate(merges, 1):
        left, right, made = map(tokenizer.spell, rule)
        print(f"{number:6}  {left:>12} + {right:12} = {made}")


if __name__ == "__main__":
    run_script(main)
