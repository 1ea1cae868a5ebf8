"""The models that can be chosen, and the one thread that runs them.

Owns which models there are (the checkpoints under the run folders, and those named at the start), which of them lie in
memory, and whose turn it is. What a request wants is a function of the loaded model that yields results; the thread
runs one step of it, then one of the other request that is under way, and so on. It does not know HTTP: bodies.py,
page_api.py and openai_api.py do.

Example: two columns of the page write with two checkpoints. Both requests are under way, and their tokens come in turn.
A third waits. When its client leaves before its turn, it is never begun.

Invariants:
- At most MAX_ACTIVE requests are under way, MAX_WAITING wait, and MAX_ACTIVE models lie in memory.
- A client names a model by an id from the list. No id is ever opened as a path.
- A seed gives a prompt the same text whatever else is under way.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flatgpt import run_folder
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.models import inference, weights
from flatgpt.models.generate import Cache
from flatgpt.models.language_model import LanguageModel
from flatgpt.models.sampling import Sampler, Stage, draw
from flatgpt.training import distributed
from flatgpt.training.device import DeviceConfig, pick_device, pick_numerics

MAX_ACTIVE = 2  # requests that take turns, and models in memory: two columns side by side
MAX_WAITING = 64  # further requests
MAX_TOKENS = 2**14  # a prompt's and those written behind it
CACHE_BYTES = 2**29  # of keys and values that the rows of a batch may take; one row may take four times as much
MAX_BATCH = 64  # rows
LOGIT_CELLS = 2**24  # logits that are computed at a time: 64 MB in float32
POLL_S = 0.2  # seconds between looks whether a client that waits is still there


class Busy(Exception):
    """As many requests wait as may."""


class UnknownModel(Exception):
    """An id that is not in the list."""


class Choice(NamedTuple):
    """A model that can be chosen."""

    id: str  # a checkpoint's folder, as seen from the server's; or what --models names
    run: str  # the run's folder; "" for a model from --models
    step: int | None
    is_best: bool  # of its run
    created: int  # seconds since 1970


class Loaded(NamedTuple):
    """A model in memory."""

    id: str
    model: LanguageModel
    tokenizer: Tokenizer

    def encode(self, prompt: str | list[int]) -> list[int]:
        """The ids of a prompt, of which there is at least one. Raises ValueError."""
        if isinstance(prompt, str):
            if any("\ud800" <= character <= "\udfff" for character in prompt):
                raise ValueError("the prompt is no valid text: it holds half of a surrogate pair")
            return inference.encode(self.tokenizer, prompt)[0].tolist()
        vocab_size = self.model.config.vocab_size
        if bad := next((i for i in prompt if not 0 <= i < vocab_size), None):
            raise ValueError(f"token id {bad} is outside the vocabulary: 0 to {vocab_size - 1}")
        if not prompt:
            raise ValueError("the prompt is empty: it takes at least one token id")
        return prompt


class Work:
    """A request: waiting, under way, or given up by its client."""

    def __init__(self, model_id: str, begin: Callable[[Loaded], Iterator[Any]]):
        self.model_id, self.begin = model_id, begin
        self.steps: Iterator[Any] | None = None  # once it is under way
        self.is_given_up = False
        self.loop, self.results = asyncio.get_running_loop(), asyncio.Queue()

    def give(self, result: Any) -> None:
        """From the engine's thread to the request's."""
        try:
            self.loop.call_soon_threadsafe(self.results.put_nowait, result)
        except RuntimeError:  # the loop has ended, and so has the server
            self.is_given_up = True


END = object()  # the last result


class Engine:
    """`find_runs` lists run folders, `models` names further models (see weights.resolve)."""

    def __init__(self, find_runs: Callable[[], Sequence[Path]], models: Sequence[str] = (),
                 where: DeviceConfig | None = None):
        """Raises ValueError for a device that is not here."""
        self.find_runs, self.named, self.where = find_runs, tuple(models), where or DeviceConfig()
        self.device = pick_device(self.where.device)  # here, where the script can still complain
        self.loaded: OrderedDict[str, Loaded] = OrderedDict()  # least recently used first; the thread's own
        self.active: deque[Work] = deque()  # the thread's own
        self.waiting: deque[Work] = deque()
        self.changed = threading.Condition()
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    # Models

    def choices(self) -> list[Choice]:
        """What can be chosen: the models named at the start, then each run's checkpoints, newest first."""
        found = [Choice(name, "", None, False, 0) for name in self.named]
        for run in self.find_runs():
            best = run_folder.best_checkpoint(run)
            for step, folder in reversed(run_folder.step_folders(run).items()):
                if run_folder.is_whole(folder):
                    created = int((folder / "SHA256SUMS").stat().st_mtime)
                    found.append(Choice(shown(folder), shown(run), step, folder == best, created))
        return found

    def _load(self, model_id: str) -> Loaded:
        """Raises ValueError or OSError in words for a user."""
        if model_id not in self.loaded:
            while len(self.loaded) >= MAX_ACTIVE:
                in_use = {work.model_id for work in self.active}
                del self.loaded[next(other for other in self.loaded if other not in in_use)]
            path = weights.resolve(model_id)
            with run_folder.reading(path):
                model = inference.load_model(str(path)).eval()
                tokenizer = inference.find_tokenizer(path, model.config.vocab_size)
            numerics, _ = pick_numerics(model, self.where.dtype, "sdpa", self.device, 1, inference.options_of(path),
                                        training=False)
            self.loaded[model_id] = Loaded(model_id, model.to(self.device, numerics.dtype), tokenizer)
        self.loaded.move_to_end(model_id)
        return self.loaded[model_id]

    # Requests

    @property
    def is_full(self) -> bool:
        return len(self.waiting) >= MAX_WAITING

    def submit(self, model_id: str, begin: Callable[[Loaded], Iterator[Any]],
               is_gone: Callable[[], Awaitable[bool]]) -> AsyncIterator[Any]:
        """What `begin` yields in the engine's thread, or what it raises. `is_gone` tells whether the client has left;
        then, and when the iterator is closed, the work ends. Raises UnknownModel, and Busy."""
        if model_id not in self.loaded and all(model_id != choice.id for choice in self.choices()):
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

    def _run(self) -> None:
        """The thread: a step of one request, then one of the next."""
        with distributed.init_job(self.where, alone=True):
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
        """Whether there is more to do."""
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
    """A folder as seen from the one that the server was started in."""
    folder, here = folder.absolute(), Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


# What a loaded model does, a step at a time


def check_size(loaded: Loaded, num_tokens: int) -> int:
    """How many rows of so many tokens, prompt and new ones, make a batch. Raises ValueError for a row too long."""
    if num_tokens > MAX_TOKENS:
        raise ValueError(f"the prompt and what is to be written take {num_tokens:,} tokens, and the server reads at "
                         f"most {MAX_TOKENS:,}: shorten the prompt, or ask for fewer tokens")
    c = loaded.model.config
    positions = min(num_tokens, c.max_positions or num_tokens)
    row_bytes = 2 * c.n_layer * c.num_kv_heads * (c.n_embd // c.n_head) * positions * loaded.model.head.itemsize
    if c.pos == "alibi":
        row_bytes += 4 * c.n_head * positions**2  # its mask
    if row_bytes > 4 * CACHE_BYTES:
        raise ValueError(f"the keys and values of {num_tokens:,} tokens take {row_bytes / 1e9:.1f} GB, and the server "
                         f"keeps at most {4 * CACHE_BYTES / 1e9:.1f}: shorten the prompt, or ask for fewer tokens")
    return min(MAX_BATCH, max(1, CACHE_BYTES // row_bytes))


class Step(NamedTuple):
    """A token of each row, and what it was drawn from."""

    tokens: torch.Tensor  # (B,)
    stages: list[Stage]


def write(loaded: Loaded, ids: torch.Tensor, max_new_tokens: int, sampler: Sampler, seeds: Sequence[int],
          cache: Cache | None = None) -> Iterator[Step]:
    """Continue each row of ids (B, T). A row with seed s is drawn as sample.py draws its first sample with --seed=s,
    whatever rows are beside it."""
    device = loaded.model.head.device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    stages: list[Stage] = []

    def choose(logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        stages[:] = sampler.stages(logits, seen)
        if logits.isnan().any():
            raise ValueError("what this model computes are no numbers (NaN): it has diverged in its training")
        rows = stages[-1].probs().split(1)
        return torch.cat([draw(probs, generator) for probs, generator in zip(rows, generators)])

    for tokens in loaded.model.stream(ids.to(device), max_new_tokens, choose, cache=cache):
        yield Step(tokens, list(stages))


class Scores(NamedTuple):
    """What a model thought of tokens (B, T) that came, in nats."""

    log_probs: torch.Tensor  # (B, T)
    top_ids: torch.Tensor  # (B, T, K): the likeliest tokens at each place, likeliest first
    top_log_probs: torch.Tensor

    def at(self, row: int, place: int) -> tuple[float, list[tuple[int, float]]]:
        """The log-probability of the token there, and the likeliest ones with theirs."""
        top = zip(self.top_ids[row, place].tolist(), self.top_log_probs[row, place].tolist())
        return self.log_probs[row, place].item(), list(top)


def score_logits(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> Scores:
    """Of logits (B, T, V), what they say of tokens (B, T) and of the `top` likeliest."""
    log_probs = logits.float().log_softmax(dim=2)
    likeliest = log_probs.topk(min(top, log_probs.size(2)), dim=2)
    return Scores(log_probs.gather(2, tokens.unsqueeze(2)).squeeze(2).cpu(), likeliest.indices.cpu(),
                  likeliest.values.cpu())


@torch.no_grad()
def score(loaded: Loaded, ids: torch.Tensor, top: int = 0, cache: Cache | None = None) -> Iterator[Scores]:
    """What the model thinks of ids (B, T) behind the first: (B, T - 1). Yields what is known after each step of the
    work, last all of it. A cache can then be continued from, as if `stream` had read the prompt. Raises ValueError for
    more tokens than the model has positions, and one, because nothing is read behind the last."""
    model, limit = loaded.model, loaded.model.config.max_positions or MAX_TOKENS
    ids = ids.to(model.head.device)
    if ids.size(1) > limit + 1:
        raise ValueError(f"log-probabilities of {ids.size(1):,} tokens were asked for, and this model reads {limit:,} "
                         f"at a time: shorten the prompt (lm_eval: --model_args max_length={limit})")
    if cache and ids.size(1) <= limit:
        x = model.hidden_states(ids, cache)  # (B, T, C)
        cache.mark(model.compute_logits(x[:, -1]))
    else:
        x = model.hidden_states(ids[:, :limit])
    length, parts = max(1, LOGIT_CELLS // (len(x) * model.config.vocab_size)), []
    for start in range(0, max(1, ids.size(1) - 1), length):
        targets = ids[:, 1:][:, start:start + length]
        parts.append(score_logits(model.compute_logits(x[:, start:start + targets.size(1)]), targets, top))
        yield Scores(*(torch.cat(tensors, dim=1) for tensors in zip(*parts)))
