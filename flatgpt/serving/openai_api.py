"""The endpoint that other tools use: OpenAI's /v1/models and /v1/completions.

Owns what a completion is: text that ends at the first stop or end-of-text token, and the log-probabilities of its
tokens, in OpenAI's shapes. What the engine's models do for it is in engine.py.

Prompts are texts or token ids, or lists of either. Choice k of each prompt is drawn with seed + k, so that it is the
text of `sample.py --seed=...`, up to its end-of-text token. Prompts of equal length run as one batch.
`logprobs` are the model's own, before temperature and filters. Beside OpenAI's options there are sample.py's top_k,
min_p and repetition_penalty.

Example: {"prompt": [5, 7, 9], "max_tokens": 1, "echo": true, "logprobs": 1} is what lm-eval asks: the
log-probabilities of 7 and 9, that of the first token being null, and a new token that it does not look at.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from flatgpt.options import failed_rules
from flatgpt.serving.bodies import JSONAnswer, answering, error_body, first_of, in_words, read_body, to_json
from flatgpt.serving.engine import Engine

if TYPE_CHECKING:
    from flatgpt.data.tokenizer import Tokenizer
    from flatgpt.models.sampling import Sampler
    from flatgpt.serving.loaded import Loaded, Scores

MAX_CHOICES = 128  # in one answer
MAX_ANSWER_TOKENS = 2**17  # prompts and what is written, of all choices
MAX_LOGPROBS = 5  # OpenAI's
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 1000
Top = list[tuple[int, float]]  # the likeliest tokens at a place, with their log-probabilities
FIXED = {"best_of": 1, "suffix": "", "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}}


@dataclass
class CompletionBody:
    model: str
    prompt: str | list[int] | list[str] | list[list[int]] = ""
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    stop: str | list[str] = ""
    seed: int | None = None  # None: another at each request
    stream: bool = False
    stream_options: dict | None = None  # {"include_usage": true}
    logprobs: int | None = None  # so many of the likeliest tokens at each place, and the token's own
    echo: bool = False  # the prompt first
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    user: str = ""  # is not used
    best_of: int = 1
    suffix: str = ""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict | None = None

    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        is_many = isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int)
        return self.prompt if is_many else [self.prompt]

    def stops(self) -> list[str]:
        return [stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop) if stop]

    def validate(self) -> None:
        """Raises ValueError that lists all faults, but for those that Sampler finds."""
        faults = failed_rules(
            self, ("max_tokens", self.max_tokens >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"), ("n", self.n >= 1, "1 or more"),
            ("seed", (self.seed or 0) >= 0, "0 or more"),
            ("logprobs", 0 <= (self.logprobs or 0) <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"))
        faults += [f"{key}={getattr(self, key)} is not offered here: leave it out" for key, only in FIXED.items()
                   if (getattr(self, key) or only) != only and (key, getattr(self, key)) != ("best_of", self.n)]
        if len(self.prompts()) * self.n > MAX_CHOICES:
            faults.append(f"{len(self.prompts())} prompts, {self.n} choices each: at most {MAX_CHOICES} in one request")
        if len(self.stops()) > MAX_STOPS or any(len(stop) > MAX_STOP_CHARACTERS for stop in self.stops()):
            faults.append(f"stop: at most {MAX_STOPS} texts of up to {MAX_STOP_CHARACTERS} characters")
        if faults:
            raise ValueError("; ".join(faults))


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text in lists of log-probabilities, another one for each token."""
    piece = tokenizer.piece(token)
    if isinstance(piece, bytes):
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)  # as OpenAI writes it
    return f"<token {token}>" if piece is None else piece.replace("▁", " ")


class Writer:
    """One choice as it is written: takes tokens, gives OpenAI's chunks of the text that is certain. Text that may begin
    a stop is held back."""

    def __init__(self, index: int, prompt: str | list[int], ids: list[int], body: CompletionBody, tokenizer: Tokenizer):
        self.index, self.ids, self.tokenizer = index, ids, tokenizer
        self.token_text = cache(partial(token_text, tokenizer))  # a long prompt asks for thousands
        self.prompt_text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
        self.stops, self.has_logprobs = body.stops(), body.logprobs is not None
        self.text, self.begin = "", 0  # of the answer; where what was written begins, behind an echoed prompt
        self.num_sent, self.num_written, self.finish_reason = 0, 0, None
        self.records: list[tuple[int, int, float | None, dict[str, float] | None]] = []  # to be sent: see `record`
        self.inbox: list[int | None] = []
        self.texts = tokenizer.decode_stream(iter(self.inbox.pop, None), ids)  # takes an id, gives a text

    def record(self, offset: int, token: int, log_prob: float | None, top: Top | None) -> None:
        """A token whose text begins at an offset."""
        names = None if top is None else {self.token_text(i): value for i, value in top}
        self.records.append((offset, token, log_prob, names))

    def echo(self, scores: Scores | None, row: int) -> dict[str, Any]:
        """The prompt as the first chunk, with its log-probabilities, if there are any, in this row."""
        offset = 0
        for i, (token, text) in enumerate(zip(self.ids, self.tokenizer.decode_stream(self.ids))):
            self.record(offset, token, *(None, None) if i == 0 or scores is None else scores.at(row, i - 1))
            offset = min(offset + len(text), len(self.prompt_text))
        self.text, self.begin = self.prompt_text, len(self.prompt_text)
        return self.chunk(len(self.text))

    def add(self, token: int, log_prob: float, top: Top) -> dict[str, Any] | None:
        """A chunk, or None where no more text is certain yet."""
        self.num_written += 1
        self.record(len(self.text), token, log_prob, top)
        if token == self.tokenizer.eot_id:
            return self.finish("stop")
        self.inbox.append(token)
        self.extend(next(self.texts))
        if self.finish_reason:
            return self.chunk(len(self.text))
        written = self.text[self.begin:]
        held = max((length for stop in self.stops for length in range(1, len(stop))
                    if written.endswith(stop[:length])), default=0)
        return self.chunk(len(self.text) - held) if len(self.text) - held > self.num_sent else None

    def finish(self, reason: str) -> dict[str, Any]:
        """The last chunk, unless a stop comes with it."""
        self.inbox.append(None)
        self.extend(next(self.texts))
        self.finish_reason = self.finish_reason or reason
        return self.chunk(len(self.text))

    def extend(self, text: str) -> None:
        """Append a text, and end at the first stop in it."""
        start = max(self.begin, len(self.text) - max(map(len, self.stops), default=0))
        self.text += text
        if places := [place for stop in self.stops if (place := self.text.find(stop, start)) >= 0]:
            self.text, self.finish_reason = self.text[:min(places)], "stop"

    def chunk(self, end: int) -> dict[str, Any]:
        """The text up to `end`, and the tokens that begin before it, as far as they were not sent; all of them at last.
        """
        count = len(self.records) if self.finish_reason else sum(offset < end for offset, *_ in self.records)
        columns = [*map(list, zip(*self.records[:count]))] or [[], [], [], []]
        self.records, text, self.num_sent = self.records[count:], self.text[self.num_sent:end], end
        logprobs = {"tokens": [self.token_text(token) for token in columns[1]], "token_logprobs": columns[2],
                    "top_logprobs": columns[3], "text_offset": columns[0]} if self.has_logprobs else None
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": self.finish_reason}


def complete(body: CompletionBody) -> Callable[[Loaded], Iterator[list[dict[str, Any]]]]:
    """The work of a request, which gives lists of chunks, one for each step, some empty; last [{"usage": ...}]. It
    raises ValueError for what cannot be before the first."""
    first_seed = secrets.randbelow(2**32) if body.seed is None else body.seed

    def chunks(loaded: Loaded) -> Iterator[list[dict[str, Any]]]:
        sampler = loaded.sampler(body.temperature, body.top_k, body.top_p, body.min_p, body.repetition_penalty)
        prompts = [(prompt, loaded.encode(prompt)) for prompt in body.prompts()]
        total = body.n * sum(len(ids) + body.max_tokens for _, ids in prompts)
        if total > MAX_ANSWER_TOKENS:
            raise ValueError(f"the request takes {total:,} tokens, prompts included, and at most "
                             f"{MAX_ANSWER_TOKENS:,} are allowed in one request: send it in parts")
        writers = [Writer(i * body.n + k, *prompt, body, loaded.tokenizer)
                   for i, prompt in enumerate(prompts) for k in range(body.n)]
        for batch in batches(loaded, writers, body.max_tokens):
            seeds = [first_seed + writer.index % body.n for writer in batch]
            yield from run_batch(loaded, body, sampler, batch, seeds)
        num_read, num_written = sum(len(ids) for _, ids in prompts), sum(writer.num_written for writer in writers)
        yield [{"usage": {"prompt_tokens": num_read, "completion_tokens": num_written,
                          "total_tokens": num_read + num_written}}]

    return chunks


def batches(loaded: Loaded, writers: list[Writer], max_tokens: int) -> list[list[Writer]]:
    """Those with prompts of equal length together, as many as fit. Raises ValueError for a prompt too long."""
    by_length: dict[int, list[Writer]] = {}
    for writer in writers:
        by_length.setdefault(len(writer.ids), []).append(writer)
    found = []
    for length, group in by_length.items():
        size = loaded.batch_size(length + max_tokens)
        found += [group[i:i + size] for i in range(0, len(group), size)]
    return found


def run_batch(loaded: Loaded, body: CompletionBody, sampler: Sampler, batch: list[Writer],
              seeds: list[int]) -> Iterator[list[dict[str, Any]]]:
    """The chunks of prompts of equal length."""
    rows, scores = [writer.ids for writer in batch], None
    cache = loaded.model.make_cache(len(rows), len(rows[0]) + body.max_tokens)
    if body.echo and body.logprobs is not None:
        for so_far in loaded.score(rows, body.logprobs, cache):
            scores = so_far
            yield []
    if body.echo:
        yield [writer.echo(scores, row) for row, writer in enumerate(batch)]
    for step in loaded.write(rows, body.max_tokens, sampler, seeds, cache):
        scores = step.scores(body.logprobs or 0)
        chunks = [writer.add(token, *scores.at(row, 0)) for row, (writer, token) in enumerate(
            zip(batch, step.tokens.tolist())) if not writer.finish_reason]
        yield [chunk for chunk in chunks if chunk]
        if all(writer.finish_reason for writer in batch):
            break
    yield [writer.finish("length") for writer in batch if not writer.finish_reason]


# Answers


def joined(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chunks of each choice as one."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        choice = choices.setdefault(chunk["index"], chunk)
        if choice is not chunk:
            choice["text"] += chunk["text"]
            choice["finish_reason"] = chunk["finish_reason"]
            for key, values in (chunk["logprobs"] or {}).items():
                choice["logprobs"][key] += values
    return [choices[index] for index in sorted(choices)]


def routes(engine: Engine) -> list[Route]:
    """Those of the endpoint, over the engine's models."""
    async def list_models(request: Request) -> Response:
        return JSONAnswer({"object": "list", "data": [
            {"id": choice.id, "object": "model", "created": choice.created, "owned_by": "flatgpt"}
            for choice in await run_in_threadpool(engine.choices)]})

    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionBody)
        body.validate()
        results = await first_of(await engine.submit(body.model, complete(body), request.is_disconnected))
        head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
                "model": body.model}
        if body.stream:
            include_usage = bool((body.stream_options or {}).get("include_usage"))
            return StreamingResponse(events(head, results, include_usage), media_type="text/event-stream")
        *chunks, usage = [chunk async for chunks in results for chunk in chunks] or [{}]  # [{}]: the client has left
        return JSONAnswer({**head, "choices": joined(chunks), **usage})

    return [Route("/v1/models", answering(list_models)),
            Route("/v1/completions", answering(completions), methods=["POST"])]


async def events(head: dict[str, Any], results: AsyncIterator[list[dict[str, Any]]],
                 include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events: a chunk each, and [DONE]."""
    try:
        async for chunks in results:
            for chunk in chunks:
                if "usage" not in chunk:
                    yield f"data: {to_json({**head, 'choices': [chunk]})}\n\n"
                elif include_usage:
                    yield f"data: {to_json({**head, 'choices': [], **chunk})}\n\n"
        yield "data: [DONE]\n\n"
    except Exception as error:  # the status is sent already
        yield f"data: {to_json(error_body(*in_words(error)))}\n\n"
    finally:
        await results.aclose()
