"""The server's part of the "Write" view: which models there are, and text as it is written, token by token.

    GET  /api/models     {"models": [Choice, ...]}
    POST /api/generate   a line of JSON for the prompt's ids, one for each token, one for the end

A token's line has what the page shows of it: {"id": 262, "name": "' the'", "text": " the", "surprise": 1.2,
"candidates": {"stages": [...], "rows": [{"id", "name", "probs"}, ...], "others": [...]}}. `name` is quoted as sample.py
quotes it. `text` may be empty, where a token ends within a character, and then comes with a later token. The texts
joined are what sample.py prints behind the prompt with the same options and seed. A token that was `written` before has
neither surprise nor candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
    from flatgpt.serving.loaded import Loaded, Step

MAX_CANDIDATES = 50


@dataclass
class GenerateBody:
    """Keys and defaults are sample.py's."""

    model: str
    prompt: str = ""
    written: list[int] = field(default_factory=list)  # tokens that stand behind the prompt already: to go on from them
    max_new_tokens: int = 500
    temperature: float = 0.8
    top_k: int = 200
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 1337
    candidates: int = 10  # for each token so many, as --show_probs

    def validate(self) -> None:
        """Raises ValueError that lists all faults, but for those that Sampler finds."""
        faults = failed_rules(
            self, ("max_new_tokens", self.max_new_tokens >= 0, "0 or more"), ("top_k", self.top_k >= 0, "0 or more"),
            ("seed", self.seed >= 0, "0 or more"),
            ("candidates", 1 <= self.candidates <= MAX_CANDIDATES, f"1 to {MAX_CANDIDATES}"))
        if faults:
            raise ValueError("; ".join(faults))


def generate(body: GenerateBody) -> Callable[[Loaded], Iterator[dict[str, Any]]]:
    """The work of a request: yields the lines. Raises ValueError for a bad request before the first line."""

    def lines(loaded: Loaded) -> Iterator[dict[str, Any]]:
        sampler = loaded.sampler(body.temperature, body.top_k, body.top_p, body.min_p, body.repetition_penalty)
        tokenizer, prompt = loaded.tokenizer, loaded.encode(body.prompt)
        ids = loaded.encode(prompt + body.written)
        loaded.batch_size(len(ids) + body.max_new_tokens)  # it has to be one at least
        yield {"prompt": prompt}
        inbox: list[int | None] = []
        texts = tokenizer.decode_stream(iter(inbox.pop, None), prompt)  # takes an id, gives a text
        for token in body.written:
            inbox.append(token)
            yield {"id": token, "name": tokenizer.spell(token), "text": next(texts)}
        for step in loaded.write([ids], body.max_new_tokens, sampler, [body.seed]):
            inbox.append(int(step.tokens[0]))
            yield describe_token(step, next(texts), tokenizer, body.candidates)
        inbox.append(None)
        yield {"end": next(texts)}

    return lines


def describe_token(step: Step, text: str, tokenizer: Tokenizer, num_rows: int) -> dict[str, Any]:
    token = int(step.tokens[0])
    found = step.candidates(num_rows)
    rows = [{"id": i, "name": tokenizer.spell(i), "probs": probs} for i, probs in zip(found.ids, found.probs)]
    prob = found.probs[found.ids.index(token)][0]
    return {"id": token, "name": tokenizer.spell(token), "text": text, "surprise": -math.log(max(prob, 1e-45)),
            "candidates": {"stages": found.stages, "rows": rows, "others": found.others}}


def routes(engine: Engine) -> list[Route]:
    """Those of this view, over the engine's models."""
    async def list_models(request: Request) -> Response:
        return JSONAnswer({"models": [choice._asdict() for choice in await run_in_threadpool(engine.choices)]})

    async def stream_text(request: Request) -> Response:
        body = await read_body(request, GenerateBody)
        body.validate()
        results = await first_of(await engine.submit(body.model, generate(body), request.is_disconnected))

        async def lines():
            try:
                async for result in results:
                    yield to_json(result) + "\n"
            except Exception as error:  # the status is sent already
                yield to_json(error_body(*in_words(error))) + "\n"
            finally:
                await results.aclose()

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    return [Route("/api/models", answering(list_models)),
            Route("/api/generate", answering(stream_text), methods=["POST"])]
