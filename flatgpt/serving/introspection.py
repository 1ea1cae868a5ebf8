"""The server's part of the "Look inside" view: what a model computes for a prompt.

    POST /api/tokens      the prompt as the tokenizer cuts it, with ids, and how surprised the model was by each
    POST /api/attention   where each position of the prompt looks, in one head of one layer
    POST /api/neighbors   the tokens whose embeddings point most nearly the same way

loaded.py computes the numbers; this module puts them into JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flatgpt.serving.bodies import JSONAnswer, answering, read_body
from flatgpt.serving.engine import Engine

if TYPE_CHECKING:
    from flatgpt.serving.loaded import Loaded

NEIGHBORS = 20


@dataclass
class TokensBody:
    model: str
    prompt: str = ""


@dataclass
class AttentionBody:
    model: str
    prompt: str = ""
    layer: int = 0  # counted from 0, as in the weights' names
    head: int = 0


@dataclass
class NeighborsBody:
    model: str
    token: int


def tokens(body: TokensBody, loaded: Loaded) -> dict[str, Any]:
    """What there is to look at: the tokens, and the numbers of layers and heads (0 where there is no attention)."""
    ids = loaded.short(body.prompt)
    *_, scores = loaded.score([ids])
    surprises = [None, *(-scores.log_probs[0]).tolist()]
    config, num_layers = loaded.model.config, len(loaded.model.h)
    return {"tokens": [{"id": i, "name": loaded.tokenizer.spell(i), "surprise": surprise}
                       for i, surprise in zip(ids, surprises)],
            "layers": num_layers, "heads": config.n_head if num_layers else 0, "vocab_size": config.vocab_size}


def attention(body: AttentionBody, loaded: Loaded) -> dict[str, Any]:
    """Row t has the weights of positions 0 to t, which sum to one."""
    rows = loaded.attention(loaded.short(body.prompt), body.layer, body.head).tolist()
    return {"weights": [[round(weight, 5) for weight in row[:t + 1]] for t, row in enumerate(rows)]}


def neighbors(body: NeighborsBody, loaded: Loaded) -> dict[str, Any]:
    return {"name": loaded.tokenizer.spell(body.token), "neighbors": [
        {"id": i, "name": loaded.tokenizer.spell(i), "cosine": round(cosine, 5)}
        for i, cosine in loaded.neighbors(body.token, NEIGHBORS)]}


def routes(engine: Engine) -> list[Route]:
    """Those of this view, over the engine's models."""
    def route(path: str, kind: type, look: Callable[[Any, Loaded], dict[str, Any]]) -> Route:
        async def handle(request: Request) -> Response:
            body = await read_body(request, kind)

            def begin(loaded: Loaded) -> Iterator[dict[str, Any]]:
                yield look(body, loaded)

            results = await engine.submit(body.model, begin, request.is_disconnected)
            found = [result async for result in results]
            return JSONAnswer(found[0] if found else {})  # nothing: the client has left

        return Route(path, answering(handle), methods=["POST"])

    return [route("/api/tokens", TokensBody, tokens), route("/api/attention", AttentionBody, attention),
            route("/api/neighbors", NeighborsBody, neighbors)]
