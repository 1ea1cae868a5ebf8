"""The application of serve.py: its routes, and who may ask for what.

Owns what every answer has in common. Only pages of this server may use it: the Host header must name this machine (a
page elsewhere whose name is made to point here does not), an Origin header must name the same host and port. With a
token each request brings it, as a cookie that the first link sets, or as OpenAI's clients do. Bodies are bounded.
Every error is a sentence, as {"error": {"message": ...}} with the status that fits.

    app = build_app(RunTable(("out",)), more_routes=[...])
"""

from __future__ import annotations

import hashlib
import hmac
import importlib.util
import ipaddress
import re
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders, State
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flatgpt.run_folder import EVALS
from flatgpt.serving.bodies import JSONAnswer, error_body, to_json
from flatgpt.serving.curves import Curves
from flatgpt.serving.runs import FollowedRun, RunTable, Tail, size_of

STATIC = Path(__file__).parent / "static"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_BODY_BYTES = 4 << 20
MAX_DRAINED_BYTES = 64 << 20  # of a body that is too long: read and dropped, so that its sender gets to the answer
READ_S = 1.0  # a request for a long run's history reads on for so long
POLL_S = 1.0  # between two looks for new records
MAX_NEW_RECORDS = 500  # at once; with more the page asks for the run anew
MAX_FOLLOWED = 100  # runs of one event stream
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
                               "frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin"}


def build_app(runs: RunTable, more_routes: Sequence[BaseRoute] = (), host: str = "127.0.0.1",
              token: str = "") -> Starlette:
    """`host` is the address that the server listens at, `more_routes` those of the models. Event streams end when
    `app.state.is_stopping` is set to true."""
    routes = [Route("/", index), Route("/plotly.min.js", chart_library), *run_routes(runs), *more_routes,
              Mount("/static", StaticFiles(directory=STATIC))]
    app = Starlette(routes=routes, middleware=[Middleware(Guard, host=host, token=token)],
                    exception_handlers={HTTPException: refuse, Exception: refuse})
    app.state.is_stopping = False
    return app


async def index(request: Request) -> Response:
    return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})


async def chart_library(request: Request) -> Response:
    [package] = importlib.util.find_spec("plotly").submodule_search_locations
    return FileResponse(Path(package, "package_data", "plotly.min.js"), headers={"Cache-Control": "max-age=86400"})


async def refuse(request: Request, error: Exception) -> JSONAnswer:
    """An error as the page and OpenAI's clients read it. Unexpected errors are printed on the terminal only."""
    if isinstance(error, HTTPException):
        return error_response(error.status_code, str(error.detail))
    return error_response(500, "The server failed; its terminal shows why.")


def error_response(status: int, message: str) -> JSONAnswer:
    return JSONAnswer(error_body(status, message), status)


# Runs


def run_routes(runs: RunTable) -> list[Route]:
    """The list of runs, a run, and a stream of what is new in both."""

    async def list_runs(request: Request) -> Response:
        return JSONAnswer({"runs": await run_in_threadpool(runs.refresh), "folders": runs.patterns})

    async def one_run(request: Request) -> Response:
        try:
            return JSONAnswer(await run_in_threadpool(runs.history, request.path_params["id"], READ_S))
        except KeyError:
            raise HTTPException(404, "There is no such run (any more).") from None

    async def events(request: Request) -> Response:
        wanted = [part for part in request.query_params.get("runs", "").split(",") if part]
        matches = [re.fullmatch(r"([0-9a-f]{12})@(\d{1,15}\.\d{1,10}\.\d{1,15})?", part) for part in wanted]
        if not all(matches) or len(wanted) > MAX_FOLLOWED:
            raise HTTPException(400, f"runs= takes up to {MAX_FOLLOWED} of id@position, with commas between them.")
        feed = Feed(runs, {match[1]: match[2] or "" for match in matches})
        return StreamingResponse(feed.stream(request.app.state), media_type="text/event-stream",
                                 headers={"Cache-Control": "no-store"})

    return [Route("/api/runs", list_runs), Route("/api/runs/{id}", one_run), Route("/api/events", events)]


class Feed:
    """Server-sent events: `runs` has the lines of the list that have changed, `gone` the ids of runs that were deleted,
    `news` what the new records of a followed run come to, in the form of its history; `reload` is the id of one to ask
    for anew, since it went back or has new scores."""

    def __init__(self, runs: RunTable, positions: dict[str, str]):
        """`positions`: id -> up to where a run is known, as its history says it."""
        self._runs, self._positions = runs, positions
        self._followed: dict[str, tuple[FollowedRun, Tail]] = {}
        self._sent: dict[str, dict[str, Any]] = {}

    async def stream(self, state: State) -> AsyncIterator[str]:
        yield "retry: 2000\n\n"
        while not state.is_stopping:
            text = await run_in_threadpool(lambda: "".join(self.new()))
            yield text or ":\n\n"  # a comment, by which a client that has left is noticed
            await anyio.sleep(POLL_S)

    def new(self) -> Iterator[str]:
        """The events since the last call."""
        lines = {line["id"]: line for line in self._runs.refresh()}
        if changed := [line for run_id, line in lines.items() if self._sent.get(run_id) != line]:
            yield event("runs", changed)
        if gone := [run_id for run_id in self._sent if run_id not in lines]:
            yield event("gone", gone)
        self._sent = lines
        for run_id in self._positions.keys() & lines.keys():
            yield from self._news(run_id)

    def _news(self, run_id: str) -> Iterator[str]:
        try:
            place, _, evals_size = self._positions[run_id].rpartition(".")
            if run_id not in self._followed:
                run = self._runs.get(run_id)
                self._followed[run_id] = run, Tail(run.metrics, place)
            run, tail = self._followed[run_id]
            has_scores = size_of(run.metrics.with_name(EVALS)) != int(evals_size or 0)
            records, is_another = tail.read()
        except (KeyError, OSError):  # it is being deleted, or has not reported yet
            return
        if is_another or has_scores or len(records) > MAX_NEW_RECORDS:
            del self._positions[run_id]
            yield event("reload", run_id)
        elif records:
            curves = Curves(run.tokens_per_step)
            curves.add(records)
            yield event("news", {"id": run_id, **curves.as_dict()})


def event(name: str, value: Any) -> str:
    return f"event: {name}\ndata: {to_json(value)}\n\n"


# Who may ask


class Guard:
    """Lets requests of this server's own pages and of other programs pass, and adds HEADERS to each answer."""

    def __init__(self, app: ASGIApp, host: str, token: str):
        self._app, self._token = app, token
        # A browser gives a machine's cookies to all of its ports: two servers must not overwrite each other's.
        self._cookie = f"flatgpt_{hashlib.sha256(token.encode()).hexdigest()[:12]}"
        self._names = {*LOOPBACK, host.lower()} | ({socket.gethostname().lower()} if token else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-cache")
            await send(message)

        request = Request(scope, receive)
        answer = self._refusal(request) or self._welcome(request)
        if answer is None and int(request.headers.get("content-length") or 0) > MAX_BODY_BYTES:
            await drain(receive, {"more_body": True})
            answer = error_response(413, too_long())
        await (answer or self._app)(scope, bounded(receive), send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if not self._is_known(host):
            return error_response(403, f"This server does not answer to the name {host[:100]!r}: open it as "
                                       "localhost, or by the --host that serve.py was given.")
        if origin is not None and origin.partition("://")[2] != host:
            return error_response(403, f"A page of {origin[:100]!r} may not use this server.")
        if request.headers.get("sec-fetch-site") in ("cross-site", "same-site") and (
                request.headers.get("sec-fetch-mode") != "navigate" or request.method != "GET"):
            return error_response(403, "A page of another site may not use this server.")
        return None

    def _is_known(self, host: str) -> bool:
        name = re.sub(r":\d+$", "", host).strip("[]").lower()
        if name in self._names:
            return True
        try:  # an address cannot be made to point elsewhere, as a name can
            return bool(self._token and ipaddress.ip_address(name))
        except ValueError:
            return False

    def _welcome(self, request: Request) -> Response | None:
        """None for a request with the token. A token in the address of the first link becomes a cookie."""
        if not self._token:
            return None
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._is_token(bearer) or self._is_token(request.cookies.get(self._cookie, "")):
            return None
        if request.url.path == "/" and self._is_token(request.query_params.get("token", "")):
            answer = RedirectResponse("./", 303)
            answer.set_cookie(self._cookie, self._token, httponly=True, samesite="lax", max_age=30 * 86400)
            return answer
        return error_response(401, "This server asks for its token: open it as /?token=..., or send it as an API key.")

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self._token.encode())


def too_long() -> str:
    return f"A request may have {MAX_BODY_BYTES >> 20} MB, and this one has more."


def bounded(receive: Receive) -> Receive:
    """The same body, until it gets too long, whatever its header says. Raises HTTPException."""
    size = 0

    async def receive_some() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY_BYTES:
            await drain(receive, message)
            raise HTTPException(413, too_long())
        return message

    return receive_some


async def drain(receive: Receive, message: Message) -> None:
    """Read and drop what follows a message of a body."""
    size = 0
    while message.get("more_body") and size < MAX_DRAINED_BYTES:
        message = await receive()
        size += len(message.get("body", b""))
