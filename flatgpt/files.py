"""Files on disk: small ones that are replaced whole, checksums, syncing, the hub's cache.

Owns how small files are written, and lines added, so that a kill or a full disk leaves the old one or the new one,
never half of either; how a lock is taken; which encoding a text has; and what a file is by its first bytes, for those
that are not what their name says.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name on the Hugging Face hub
BOMS = {codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",  # before UTF-16's, which begin alike
        codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
HTML = "an HTML page, probably from a failed download: download it again"
MAGIC_BYTES = {  # first bytes of a file -> what it is, and the way out
    LFS_POINTER: "a Git LFS pointer, not the file itself: `git lfs pull` in its folder fetches that",
    b"<!doctype html": HTML, b"<html": HTML,
    **{magic: f"compressed: `{tool} -dc FILE > NEW` unpacks it" for magic, tool in {
        b"\x1f\x8b\x08": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh91AY&SY": "bzip2", b"\xfd7zXZ\0": "xz"}.items()},
    b"PK\x03\x04": "a ZIP archive, as np.savez and torch.save write one, too: `unzip` unpacks it",
    b"\x93NUMPY": "a file of np.save; this removes its header: np.load(FILE).astype('<u2').tofile(FILE)",
    b"PAR1": "a Parquet file: its name has to end in .parquet",
    b"%PDF-": "a PDF: `pdftotext` extracts its text"}


def read_json(path: Path) -> dict:
    """Raises FileNotFoundError, or ValueError naming the file that is not a JSON object."""
    content = path.read_bytes()
    try:
        value = json.loads(content)  # in any encoding of Unicode
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is {identify(content) or f'not readable JSON: {error}'}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object")
    return value


@contextlib.contextmanager
def reading_values(path: Path) -> Iterator[None]:
    """Turn an error in here over a missing value, or one of another kind, into a ValueError that names the file."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else (
            f"has unexpected content: {(str(error) or type(error).__name__).splitlines()[0]}")
        raise ValueError(f"{path} {what}") from None


def decode(data: bytes) -> tuple[str, int]:
    """The text, in the encoding of its byte order mark, else UTF-8; and how many bytes were no text and were replaced
    by U+FFFD."""
    try:
        return data.decode("utf-8-sig"), 0
    except UnicodeDecodeError:
        bom = bom_of(data)
        encoding, data = BOMS.get(bom, "utf-8"), data.removeprefix(bom or codecs.BOM_UTF8)
        return data.decode(encoding, "replace"), len(data) - len(data.decode(encoding, "ignore").encode(encoding))


def bom_of(data: bytes) -> bytes:
    """The byte order mark of UTF-16 or UTF-32 that data begin with, or b""."""
    return next((bom for bom in BOMS if data.startswith(bom)), b"")


def read_text(path: Path) -> str:
    """The text in a file. Raises OSError, or ValueError for a file that is no text."""
    refuse_pointer(path)
    text, replaced = decode(path.read_bytes())
    if replaced:
        raise ValueError(f"{path} is not UTF-8 text: {replaced:,} of its bytes are invalid")
    return text


def identify(head: bytes) -> str:
    """What a file is by its first bytes, with the command that mends it; "" if they do not tell."""
    head = head[:512].removeprefix(codecs.BOM_UTF8).lstrip().lower()
    return next((what for magic, what in MAGIC_BYTES.items() if head.startswith(magic.lower())), "")


def refuse_pointer(path: Path) -> None:
    """Raises ValueError for a Git LFS pointer in the place of a file."""
    with open(path, "rb") as file:
        if (head := file.read(len(LFS_POINTER))) == LFS_POINTER:
            raise ValueError(f"{path} is {identify(head)}")


def broken(path: Path, reason: object, own: bytes = b"") -> str:
    """The message for a file that cannot be read: what it is by its first bytes, else that it is broken. `own` is how a
    file of its kind begins."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(512)
        if (what := identify(head)) and not (own and head.startswith(own)):
            return f"{path} is {what}"
    return f"{path} is broken{reason}"


def one_line(error: Exception) -> str:
    """The type and the first line of an error, for a message."""
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"


def write_json(path: Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write or replace a file: write it under a hidden name, sync it, rename it. Raises OSError that names it.
    Processes that write one path at the same time have to write the same content: they share the hidden name."""
    hidden = path.with_name(f".{path.name}.tmp")
    try:
        with named_errors(path), open(hidden, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, path)
    except BaseException:
        hidden.unlink(missing_ok=True)
        raise


def append_line(path: Path, line: str) -> None:
    """Add a line to a file and sync it, all of it or nothing; a line that a kill has left torn is cut first. Raises
    OSError that names the file. For a file that no other process writes."""
    with named_errors(path):
        with open(path, "ab+") as file:
            end = _end_of_lines(file)
            file.truncate(end)
        try:
            with open(path, "ab") as file:
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError:  # only now: closing the file writes what its buffer still holds
            with contextlib.suppress(OSError):
                os.truncate(path, end)
            raise


def _end_of_lines(file: BinaryIO) -> int:
    """Where the last whole line of a file ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        file.seek(start)
        if (place := file.read(end - start).rfind(b"\n")) >= 0:
            return start + place + 1
        end = start
    return 0


def take_lock(lock: FileLock, refusal: str) -> None:
    """Raises OSError with the words of `refusal` when another process holds the lock. The system frees it when this
    process dies."""
    path = Path(lock.lock_file)
    with contextlib.suppress(OSError):  # there is none yet, or it is another user's
        path.chmod(path.stat().st_mode | 0o200)  # of a copy of what was read-only
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OSError(refusal) from None


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Add the file's name to an OSError without one: a full disk does not say which file it is about."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename:
            raise
        raise OSError(f"could not write {path}: {error.strerror}") from None


def fetch_snapshot(repo_id: str, patterns: list[str]) -> Path:
    """Folder of a hub repository's files that fit one of the patterns; what is in the cache is not fetched again.
    Raises OSError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # a ValueError over a name that the hub cannot have
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"could not get {repo_id} from the hub, and it is neither a folder here nor in the cache: "
                      f"{reason} (without network: copy its folder to this machine, and give the path instead)"
                      ) from None


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def code_fingerprint() -> str:
    """A hash of flatGPT's own source files."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parent
    for path in sorted([*package.parent.glob("*.py"), *package.rglob("*.py")]):
        digest.update(path.relative_to(package.parent).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def edge_hash(path: Path, edge_bytes: int = 65536) -> str:
    """A hash of a file's two ends, for files too large to read whole at every start."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(edge_bytes)
        file.seek(max(0, size - edge_bytes))
        return hashlib.sha256(head + file.read()).hexdigest()


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk, so that a power cut cannot keep only its rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Sync a folder and everything in it."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A hidden folder to fill, which becomes `path` when it is complete and synced. An error leaves neither."""
    hidden = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(hidden, ignore_errors=True)  # what a kill has left
    hidden.mkdir(parents=True)
    try:
        yield hidden
        sync_tree(hidden)
        os.rename(hidden, path)
    except BaseException:
        shutil.rmtree(hidden)
        raise
    sync(path.parent)
