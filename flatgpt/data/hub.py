"""Data sets on the Hugging Face hub, or in a folder laid out like one, -> parts and records.

Owns the network to the hub: the commit of a data set, and its files, read as a stream through `datasets`, which runs no
code of theirs. Each file is a part.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from flatgpt import files
from flatgpt.data.local_files import COMPRESSION, TEXT_TYPES, column_texts, find_files
from flatgpt.data.records import Part, Record


def commit_of(repo: str, revision: str) -> str:
    """The commit that a revision of a data set stands for now, "" for a folder. Raises OSError."""
    if Path(repo).is_dir():
        return ""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(repo, revision=revision or None).sha
    except Exception as error:  # of many kinds: no network, no such data set, no such revision
        raise OSError(f"could not open the data set {repo!r}: {type(error).__name__}: {error} (without network: copy "
                      "its files here, and pass their folder as --input=FOLDER)") from None


def hub_parts(repo: str, subset: str, split: str, commit: str, text_column: str,
              join: Callable[[Iterator[str]], Iterator[str]] | None) -> list[Part]:
    """The files of a data set; for `join` see sources.Source. Raises OSError or ValueError that names the data set."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        builder = datasets.load_dataset_builder(repo, subset or None, revision=commit or None)
        if split not in builder.config.data_files:
            raise ValueError(f"there is no split {split!r}, only {', '.join(map(str, builder.config.data_files))}")
        urls = builder.config.data_files[split]
        rows = builder.as_streaming_dataset(split=split)
        columns = rows.column_names or list(next(iter(rows), {}))
        # If the format allows it: read no other column, few rows at a time, and text files as one document.
        for key, value in (("columns", [text_column]), ("batch_size", 256), ("sample_by", "document")):
            if text_column in columns and hasattr(builder.config, key):
                setattr(builder.config, key, value)
        rows = builder.as_streaming_dataset(split=split)
    except Exception as error:  # of many kinds: no network, no such data set, subset or split, files of no known format
        for path in filter(Path.is_file, find_files(repo)[1] if os.path.isdir(repo) else ()):
            files.refuse_pointer(path)
        hint = ("datasets reads [ ] * ? in a folder's name as a pattern: rename it, or pass it as --input=FOLDER"
                if os.path.isdir(repo) and glob.escape(os.path.abspath(repo)) != os.path.abspath(repo) else
                "without network: copy its files here, and pass their folder as --input=FOLDER")
        raise OSError(f"could not open the data set {repo!r}: {type(error).__name__}: {error} ({hint})") from None
    if text_column not in columns:
        raise ValueError(f"{repo} has no column {text_column!r}, only {', '.join(columns)}; --text_column=NAME says "
                         "which one has the text")
    kind = getattr((rows.features or {}).get(text_column), "dtype", "string")
    if kind not in TEXT_TYPES:
        raise ValueError(f"{repo}: column {text_column!r} holds {kind}, not text; --text_column names the one with the "
                         "text")
    names = urls if len(urls) == rows.num_shards else [f"{repo}#{i}" for i in range(rows.num_shards)]
    about = (builder.info.splits or {}).get(split)
    sizes = [about.num_bytes // len(names)] * len(names) if about and about.num_bytes else [
        int(_remote_size(url) * COMPRESSION) for url in names]
    hashes = [files.edge_hash(Path(url)) if os.path.isfile(url) else "" for url in names]  # the hub has the commit
    return [Part(name, size, content_hash, size, partial(_read_hub, rows, len(names), index, name, text_column, join))
            for index, (name, size, content_hash) in enumerate(zip(names, sizes, hashes))]


def _read_hub(rows: Any, num_parts: int, index: int, name: str, text_column: str,
              join: Callable[[Iterator[str]], Iterator[str]] | None) -> Iterator[Record]:
    """The records of one file. Broken content gives a record with a fault; a network that fails raises OSError."""
    import pyarrow

    part = rows.shard(num_shards=num_parts, index=index).select_columns([text_column]).with_format("arrow")
    texts = (text for table in part.iter(batch_size=256) for text in column_texts(table.column(0), name, text_column))
    documents = join(text.decode(errors="replace") for text in texts) if join else texts
    row = end = 0
    try:
        for row, text in enumerate(documents, 1):
            end += len(text)
            yield Record(f"{name}: document {row}", "text" if join else "utf8", text, end)
    except (ValueError, pyarrow.ArrowException) as error:
        yield Record(name, "fault", files.broken(Path(name), f" behind document {row}: {error}", b"PAR1"), end)
    except Exception as error:  # of many kinds, by the way a file is fetched
        raise OSError(f"reading {name} failed: {type(error).__name__}: {error}; the same command again goes on from "
                      "the last finished shard") from None


def _remote_size(url: str) -> int:
    """The size of a file on the hub or here; 0 if it is unknown."""
    from huggingface_hub import HfFileSystem

    try:
        return HfFileSystem().size(url) if url.startswith("hf://") else os.path.getsize(url)
    except OSError:
        return 0
