"""The models that can be chosen, and the one thread that runs them.

Owns which models there are (the checkpoints under the run folders, and those named at the start), which of them lie in
memory, and whose turn it is. What a request wants is a function of the loaded model that yields results; the thread
runs one step of it, then one of the other request that is under way, and so on. It knows neither HTTP nor what a model
does: loaded.py does, and with it torch, which is imported when a model is asked for the first time. So a server of runs
alone starts at once and stays small.

Example: two columns of the page write with two checkpoints. Both requests are under way, and their tokens come in turn.
A third waits. When its client leaves before its turn, it is never begun.

Invariants:
- At most MAX_ACTIVE requests are under way, MAX_WAITING wait, and MAX_ACTIVE models lie in memory.
- A client names a model by an id from the list. No id is ever opened as a path.
- A seed gives a prompt the same text whatever else is under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flatgpt import run_folder

if TYPE_CHECKING:
    from flatgpt.serving.loaded import Loaded

MAX_ACTIVE = 2  # requests that take turns, and models in memory: two columns side by side
MAX_WAITING = 64  # further requests
POLL_S = 0.2  # seconds between looks whether a client that waits is still there


class Busy(Exception):
    """The queue of waiting requests is full."""


class UnknownModel(Exception):
    """An id that is not in the list."""


class Stopping(Exception):
    """The server ends."""


class Choice(NamedTuple):
    """A model that can be chosen."""

    id: str  # a checkpoint's folder, as seen from the server's; or what --models names
    run: str  # the run's folder; "" for a model from --models
    step: int | None
    is_best: bool  # of its run
    created: int  # seconds since 1970


class Work:
    """A request: waiting, under way, or given up by its client."""

    def __init__(self, model_id: str, begin: Callable[[Loaded], Iterator[Any]]):
        self.model_id, self.begin = model_id, begin
        self.steps: Iterator[Any] | None = None  # once it is under way
        self.is_given_up = False
        self.loop, self.results = asyncio.get_running_loop(), asyncio.Queue()

    def give(self, result: Any) -> None:
        """Hand a result from the engine's thread to the request's."""
        try:
            self.loop.call_soon_threadsafe(self.results.put_nowait, result)
        except RuntimeError:  # the loop has ended, and so has the server
            self.is_given_up = True


END = object()  # the last result


class Engine:
    """`find_runs` lists run folders, `models` names further models (see weights.resolve); `device` and `dtype` are
    DeviceConfig's."""

    def __init__(self, find_runs: Callable[[], Sequence[Path]], models: Sequence[str] = (), device: str = "auto",
                 dtype: str = "auto"):
        self.find_runs, self.named, self.device, self.dtype = find_runs, tuple(models), device, dtype
        self.loaded: OrderedDict[str, Loaded] = OrderedDict()  # least recently used first; the thread's own
        self.active: deque[Work] = deque()  # the thread's own
        self.waiting: deque[Work] = deque()
        self.changed = threading.Condition()
        self.is_closed = False
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    # Models

    def choices(self) -> list[Choice]:
        """What can be chosen: the models named at the start, then each run's checkpoints, newest first."""
        found = [Choice(name, "", None, False, 0) for name in self.named]
        for run in self.find_runs():
            with contextlib.suppress(OSError):  # somebody else's, or just being deleted
                best = run_folder.best_checkpoint(run)
                for step, folder in reversed(run_folder.step_folders(run).items()):
                    if run_folder.is_whole(folder):
                        created = int((folder / "SHA256SUMS").stat().st_mtime)
                        found.append(Choice(shown(folder), shown(run), step, folder == best, created))
        return found

    def _load(self, model_id: str) -> Loaded:
        """Raises ValueError or OSError in words for a user."""
        if model_id in self.loaded and self.loaded[model_id].is_outdated():
            del self.loaded[model_id]
        if model_id not in self.loaded:
            from flatgpt.serving.loaded import load

            while len(self.loaded) >= MAX_ACTIVE:
                in_use = {work.model_id for work in self.active}
                del self.loaded[next(other for other in self.loaded if other not in in_use)]
            self.loaded[model_id] = load(model_id, self.device, self.dtype)
        self.loaded.move_to_end(model_id)
        return self.loaded[model_id]

    # Requests

    @property
    def is_full(self) -> bool:
        return len(self.waiting) >= MAX_WAITING

    async def submit(self, model_id: str, begin: Callable[[Loaded], Iterator[Any]],
                     is_gone: Callable[[], Awaitable[bool]]) -> AsyncIterator[Any]:
        """What `begin` yields in the engine's thread, or what it raises. `is_gone` tells whether the client has left;
        then, and when the iterator is closed, the work ends. Raises UnknownModel, and Busy."""
        if model_id not in self.loaded and model_id not in {
                choice.id for choice in await asyncio.to_thread(self.choices)}:
            raise UnknownModel(f"there is no model {model_id!r}: /v1/models lists those that there are")
        work = Work(model_id, begin)
        with self.changed:
            if self.is_full:
                raise Busy(f"{MAX_WAITING} requests are waiting already: try again in a moment")
            self.waiting.append(work)
            self.changed.notify()
        return self._results(work, is_gone)

    async def _results(self, work: Work, is_gone: Callable[[], Awaitable[bool]]) -> AsyncIterator[Any]:
        try:
            while not await is_gone():
                if self.is_closed:
                    raise Stopping("the server was stopped before this was done")
                try:
                    result = await asyncio.wait_for(work.results.get(), POLL_S)
                except asyncio.TimeoutError:
                    continue
                if result is END:
                    return
                if isinstance(result, Exception):
                    raise result
                yield result
        finally:
            with self.changed:
                work.is_given_up = True
                if work in self.waiting:
                    self.waiting.remove(work)

    def close(self) -> None:
        """End all requests: the server stops."""
        self.is_closed = True

    def _run(self) -> None:
        """The thread: a step of one request, then one of the next."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.active or self.waiting)
                while self.waiting and len(self.active) < MAX_ACTIVE:
                    self.active.append(self.waiting.popleft())
            if self._step(self.active[0]):
                self.active.rotate(-1)
            else:
                self.active.popleft()

    def _step(self, work: Work) -> bool:
        """Run one step of a request; return whether it has more to do."""
        if work.is_given_up:
            work.steps = None  # closes what it iterates over
            return False
        try:
            if work.steps is None:
                work.steps = work.begin(self._load(work.model_id))
            work.give(next(work.steps))
            return True
        except StopIteration:
            work.give(END)
        except Exception as error:  # whatever it is, it is this request's
            work.give(error)
        return False


def shown(folder: Path) -> str:
    """A folder's path relative to the folder in which the server was started."""
    folder, here = folder.absolute(), Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)
