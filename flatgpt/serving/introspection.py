"""The Look-inside view's side of the server: what a model makes of a prompt.

    POST /api/tokens      the prompt as the tokenizer cuts it, with ids, and how surprised the model was by each
    POST /api/attention   where each position of the prompt looks, in one head of one layer
    POST /api/neighbors   the tokens whose embeddings point most nearly the same way

Owns the reading of these numbers from a loaded model. Attention is what the model itself computes: the layer's queries
and keys, given to `model.attend` with the identity in place of the values, so that what comes out is the weights.

Letters: as in model.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flatgpt.models.language_model import LanguageModel
from flatgpt.serving.bodies import answering, read_body
from flatgpt.serving.engine import Engine, Loaded, score
from model import attend

MAX_TOKENS = 512  # of a prompt: attention is T^2 numbers


@dataclass
class TokensBody:
    model: str
    prompt: str | list[int] = ""

    def encode(self, loaded: Loaded) -> list[int]:
        """Raises ValueError for a prompt that cannot be looked into."""
        ids = loaded.encode(self.prompt)
        limit = min(MAX_TOKENS, loaded.model.config.max_positions or MAX_TOKENS)
        if len(ids) > limit:
            raise ValueError(f"the prompt has {len(ids):,} tokens, and this view shows at most {limit} of this model: "
                             "shorten it")
        return ids


@dataclass
class AttentionBody(TokensBody):
    layer: int = 0  # counted from 0, as in the weights' names
    head: int = 0


@dataclass
class NeighborsBody:
    model: str
    token: int
    count: int = 20


def tokens(body: TokensBody, loaded: Loaded) -> dict[str, Any]:
    """What there is to look at: the tokens, and the numbers of layers and heads (0 where there is no attention)."""
    ids, tokenizer = body.encode(loaded), loaded.tokenizer
    *_, scores = score(loaded, torch.tensor([ids]))
    surprises = [None, *(-scores.log_probs[0]).tolist()]
    num_layers = len(loaded.model.h)
    return {"tokens": [{"id": i, "name": tokenizer.spell(i), "surprise": surprise}
                       for i, surprise in zip(ids, surprises)],
            "layers": num_layers, "heads": loaded.model.config.n_head if num_layers else 0,
            "vocab_size": loaded.model.config.vocab_size}


def attention(body: AttentionBody, loaded: Loaded) -> dict[str, Any]:
    """Row t has the weights of positions 0 to t, which sum to one."""
    weights = attention_weights(loaded.model, body.encode(loaded), body.layer)
    if not 0 <= body.head < len(weights):
        raise ValueError(f"head={body.head} must be 0 to {len(weights) - 1}")
    rows = weights[body.head].tolist()
    return {"weights": [[round(weight, 5) for weight in row[:t + 1]] for t, row in enumerate(rows)]}


@torch.no_grad()
def attention_weights(model: LanguageModel, ids: list[int], layer: int) -> torch.Tensor:
    """(H, T, T), float32: row t is where position t looks. Raises ValueError for a layer that is not there."""
    if not model.h:
        raise ValueError(f"this model ({model.config.model}) has no attention")
    if not 0 <= layer < len(model.h):
        raise ValueError(f"layer={layer} must be 0 to {len(model.h) - 1}")
    attn, inputs = model.h[layer].attn, []
    hook = attn.register_forward_pre_hook(lambda module, args: inputs.extend(args[:2]))
    try:
        model.hidden_states(torch.tensor([ids], device=model.head.device))
    finally:
        hook.remove()
    q, k, _ = attn.queries_keys_values(*inputs)
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)  # (B, K, T, D) -> (B, H, T, D)
    identity = torch.eye(k.size(2), device=q.device).expand(*k.shape[:2], -1, -1)
    return attend(q.float(), k.float(), identity, inputs[1].mask, 0.0, "math")[0].cpu()


@torch.no_grad()
def neighbors(body: NeighborsBody, loaded: Loaded) -> dict[str, Any]:
    """The tokens nearest to one, nearest first, by the cosine of the angle between their embeddings."""
    vocab_size, table = loaded.model.config.vocab_size, getattr(loaded.model, "wte", None)
    if table is None:
        raise ValueError(f"this model ({loaded.model.config.model}) has no embeddings")
    faults = [f"token={body.token} must be 0 to {vocab_size - 1}"] * (not 0 <= body.token < vocab_size)
    faults += [f"count={body.count} must be 1 to 200"] * (not 1 <= body.count <= 200)
    if faults:
        raise ValueError("; ".join(faults))
    embeddings = F.normalize(table.weight[:vocab_size].float(), dim=1)  # (V, C)
    cosines = (embeddings @ embeddings[body.token]).index_fill(0, torch.tensor(body.token).to(embeddings.device), -2.0)
    nearest = cosines.topk(min(body.count, vocab_size - 1))
    return {"name": loaded.tokenizer.spell(body.token), "neighbors": [
        {"id": i, "name": loaded.tokenizer.spell(i), "cosine": round(cosine, 5)}
        for i, cosine in zip(nearest.indices.tolist(), nearest.values.tolist())]}


def routes(engine: Engine) -> list[Route]:
    def route(path: str, kind: type, look: Callable[[Any, Loaded], dict[str, Any]]) -> Route:
        async def handle(request: Request) -> Response:
            body = await read_body(request, kind)

            def begin(loaded: Loaded) -> Iterator[dict[str, Any]]:
                yield look(body, loaded)

            found = [found async for found in engine.submit(body.model, begin, request.is_disconnected)]
            return JSONResponse(found[0] if found else {})  # nothing: the client has left

        return Route(path, answering(handle), methods=["POST"])

    return [route("/api/tokens", TokensBody, tokens), route("/api/attention", AttentionBody, attention),
            route("/api/neighbors", NeighborsBody, neighbors)]
