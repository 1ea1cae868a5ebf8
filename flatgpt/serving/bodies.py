"""What a client posts, checked, and the error that it gets when that is not valid.

Owns the way from a body to a dataclass, and from an exception to a status with a sentence. The shape of an error is the
one that OpenAI's client reads: {"error": {"message": ..., "type": ..., "code": ...}}.

Example: a body {"temperature": "hot"} is answered with 400 and "temperature='hot' must be a number".
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import traceback
import types
import typing
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from flatgpt.options import closest
from flatgpt.serving.engine import Busy, Stopping, UnknownModel

T = TypeVar("T")
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "an object"}


async def read_body(request: Request, kind: type[T]) -> T:
    """The JSON body, which app.Guard has bounded, as a dataclass. Raises ValueError that lists all faults."""
    body = await request.body()
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the body must be JSON") from None
    return parse(data, kind)


def parse(data: Any, kind: type[T]) -> T:
    """A JSON object as a dataclass; null means the default. Raises ValueError that lists all faults."""
    if not isinstance(data, dict):
        raise ValueError("the body must be a JSON object")
    hints, given = typing.get_type_hints(kind), {key: value for key, value in data.items() if value is not None}
    faults = [f"unknown key {key!r:.60}; {closest(key, hints) or 'known are ' + ', '.join(hints)}"
              for key in given if key not in hints]
    faults += [f"{key}={value!r:.60} must be {describe(hints[key])}" for key, value in given.items()
               if key in hints and not fits(value, hints[key])]
    faults += [f"{field.name} is missing" for field in dataclasses.fields(kind)
               if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
               and field.name not in given]
    if faults:
        raise ValueError("; ".join(faults))
    return kind(**given)


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a type: a union, a list of something, int, float, bool or str."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(fits(item, typing.get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return type(value) is hint and (hint is not int or abs(value) < 2**63)


def describe(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in typing.get_args(hint) if option is not types.NoneType)
    if typing.get_origin(hint) is list:
        return f"a list, each item {describe(typing.get_args(hint)[0])}"
    return KINDS[hint]


# Answers


def to_json(value: Any) -> str:
    """In ASCII, since names of files and texts of runs may hold what no UTF-8 has: half of a surrogate pair. Raises
    ValueError for a number that is not finite."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


class JSONAnswer(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content).encode()


def in_words(error: Exception) -> tuple[int, str]:
    """The status and the sentence for an error. Unexpected errors are printed on the server's standard error."""
    for kind, status in ((UnknownModel, 404), (Busy, 429), (Stopping, 503), (ValueError, 400), (OSError, 400),
                         (ClientDisconnect, 400)):
        if isinstance(error, kind):
            return status, str(error)
    if isinstance(error, MemoryError) or re.search("can't allocate memory|out of memory", str(error)):  # torch's
        return 503, "the server's memory is full: ask for fewer tokens, or for a smaller model"
    traceback.print_exception(error, file=sys.stderr)
    return 500, "the server failed; the terminal where serve.py runs shows why"


def error_body(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def answering(handle: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """A handler whose exceptions become answers."""

    async def answer(request: Request) -> Response:
        try:
            return await handle(request)
        except HTTPException:  # the application's own
            raise
        except Exception as error:
            status, message = in_words(error)
            headers = {"Retry-After": "1"} if status == 429 else None
            return JSONAnswer(error_body(status, message), status, headers)

    return answer


async def first_of(results: AsyncIterator[T]) -> AsyncIterator[T]:
    """The same results, the first one already computed: an error before it can still be answered with a status."""
    try:
        head = [await anext(results)]
    except StopAsyncIteration:
        head = []

    async def rest() -> AsyncIterator[T]:
        try:
            for result in head:
                yield result
            async for result in results:
                yield result
        finally:
            await results.aclose()

    return rest()
