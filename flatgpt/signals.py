"""This process's standard streams, its limit of open files, and the signals that ask it to stop.

Imports no torch: a script prepares its streams before the seconds that this import takes.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

# What schedulers, people, clouds and a terminal that closes send.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
MAX_OPEN_FILES = 65536  # wanted: a trillion tokens are 10,000 shards


def begin(needs_reader: bool = False) -> None:
    """What a script does first, before it imports torch, prints or opens a file: see `prepare_streams` and
    `allow_open_files`. Until its main runs (`interruptible`), Ctrl-C ends the process by the signal, without a
    traceback."""
    prepare_streams(needs_reader)
    allow_open_files()
    is_interactive = hasattr(sys, "ps1")  # a notebook's process, which goes on behind the script
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler and not is_interactive:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within this context Ctrl-C raises KeyboardInterrupt, unless the process was started with SIGINT ignored."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if before == signal.SIG_DFL:
            signal.signal(signal.SIGINT, before)


def allow_open_files() -> None:
    """Raise this process's limit of open files as far as the system allows: each shard of a data set holds one, and
    many systems begin with 256 or 1,024."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows; macOS has a limit of its own below `hard`
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def prepare_streams(needs_reader: bool = False) -> None:
    """Let every print succeed: what an encoding lacks is written as \\u1234, and what cannot be written is dropped (see
    `_Output`). A standard stream that was closed becomes the null device: else the next file that is opened would take
    its number, and prints would go into that. `needs_reader`: the output is the work, so its first loss is raised."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number, this one
        stream = getattr(sys, name)
        if stream is None:
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
        if number and isinstance(stream, io.TextIOWrapper):  # else a notebook's
            raw = _Output(stream, is_needed=needs_reader and number == 1)
            setattr(sys, name, io.TextIOWrapper(
                raw if stream.write_through else io.BufferedWriter(raw), stream.encoding, "backslashreplace",
                line_buffering=stream.line_buffering, write_through=stream.write_through))


class _Output(io.RawIOBase):
    """The bytes of a standard stream. What cannot be written, because the reader has left, the terminal is closed or
    the disk is full, is dropped; where it `is_needed`, the first such error is raised."""

    def __init__(self, stream: io.TextIOWrapper, is_needed: bool):
        self._stream, self._is_needed = stream, is_needed  # kept, because its end would close what is beneath it
        self._raw = getattr(stream.buffer, "raw", stream.buffer)

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        try:
            while rest:  # all of it, for with PYTHONUNBUFFERED nobody above writes what was left over
                if (count := self._raw.write(rest)) is None:  # the terminal or pipe does not block, and is full
                    select.select([], [self], [])
                rest = rest[count or 0:]
        except OSError as error:
            if self._is_needed:
                self._is_needed = False
                raise OSError(error.errno, error.strerror, "standard output") from None
        return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return self._raw.isatty()


@contextlib.contextmanager
def stop_requests() -> Iterator[list[str]]:
    """A list that gets the name of each signal that asks this process to stop, so that the step under way can be
    finished and saved first. A second Ctrl-C, a second or more after the first, is not waited for."""
    asked: list[str] = []
    last_s = 0.0

    def remember(number: int, _frame: Any) -> None:
        nonlocal last_s
        name, now_s = signal.Signals(number).name, time.monotonic()
        if name == "SIGINT" and name in asked and now_s - last_s > 1:  # torchrun sends one Ctrl-C on as another
            raise KeyboardInterrupt
        asked.append(name)
        last_s = now_s

    is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    before = {number: signal.signal(number, remember) for number in STOP_SIGNALS
              if not (number == signal.SIGHUP and is_nohup)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
