"""A server of flatgpt/serving in a thread, and Debian's Chromium that looks at it."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (Debian's package chromium)")


@contextlib.contextmanager
def serving(app: Starlette) -> Iterator[str]:
    """The app's address, http://127.0.0.1:PORT, while it is served."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        app.state.is_stopping = server.should_exit = True
        thread.join(10)


@contextlib.contextmanager
def chromium(address: str) -> Iterator[Callable[..., Any]]:
    """open_page("#runs", width=1400, scheme="dark") gives Playwright's page. At the end there must have been no error
    in the console, and no request to another address."""
    playwright = pytest.importorskip("playwright.sync_api")
    faults: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def open_page(path: str = "", width: int = 1400, scheme: str = "light") -> Any:
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.set_default_timeout(30_000)
            page.on("console", lambda message: message.type == "error" and faults.append(message.text))
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("request", lambda request: re.match(rf"{address}/|data:|blob:", request.url)
                    or faults.append(f"request to {request.url}"))
            page.goto(f"{address}/{path}")
            return page

        yield open_page
        browser.close()
    assert faults == []


def until(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    """What the condition gives as soon as that is true; the test fails when it takes too long."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {timeout_s} s")
