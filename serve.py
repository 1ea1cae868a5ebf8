"""Runs and models in the browser, from this machine.

    python serve.py                                      the runs under out/, at http://127.0.0.1:8000
    python serve.py --runs out /data/runs/*              any folders and patterns; words without -- are folders as well
    python serve.py --models gpt2 out-old/ckpt.pt        models to write with, beside the runs' checkpoints
    python serve.py --host=0.0.0.0 --token=SECRET        for other machines, which need the token
    ssh -L 8000:localhost:8000 HOST                      on a laptop: the page of a server that runs at HOST

It reads what train.py writes, and changes nothing. Nothing is fetched from elsewhere.
"""

from __future__ import annotations

from flatgpt import signals

if __name__ == "__main__":
    signals.begin()

import contextlib
import ipaddress
import os
import socket
import sys
import threading
import webbrowser
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from flatgpt.machine import device_faults
from flatgpt.options import check_options, failed_rules, parse_options, run_script

MIN_TOKEN = 16  # characters


@dataclass
class ServeConfig:
    runs: Annotated[tuple[str, ...], "path"] = ()  # run folders, folders of them, or patterns; none: out
    host: str = "127.0.0.1"  # address to listen at; another than this machine's own needs a token
    port: int = 8000  # port to listen at; 0 = any that is free
    open: bool = True  # open the page in a browser, where there is one
    token: str = ""  # secret that every request must carry; the printed link contains it
    models: Annotated[tuple[str, ...], "path"] = ()  # more models than the runs': gpt2, hub ids, folders
    device: str = "auto"  # device of the models: auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # number type of the models

    def validate(self) -> list[str]:
        """What is wrong with these options, a sentence each."""
        faults = failed_rules(self, ("port", 0 <= self.port < 65536, "between 0 and 65535"))
        faults += device_faults(self.device)
        if not is_loopback(self.host) and not self.token:
            faults.append(f"host={self.host} can be reached from other machines, and whoever reaches it can read all "
                          "runs: add --token=SECRET")
        if self.token and (len(self.token) < MIN_TOKEN or not self.token.isascii() or not self.token.isalnum()):
            faults.append(f"token must be {MIN_TOKEN} or more letters and digits, for example "
                          f"{os.urandom(16).hex()}")
        return faults


def main(argv: list[str]) -> None:
    """Serve until it is interrupted. Raises ValueError for wrong options and missing packages, OSError for the port."""
    config, _ = parse_options(ServeConfig, argv, usage=__doc__, bare_word="runs")
    check_options(config)
    try:
        import plotly  # noqa: F401  (its chart library goes to the browser)
        import uvicorn

        from flatgpt.serving import introspection, openai_api, writing
        from flatgpt.serving.app import build_app
        from flatgpt.serving.engine import Engine
        from flatgpt.serving.runs import RunTable, find_runs
    except ModuleNotFoundError as error:
        raise ValueError(f"the page needs {error.name}, which is not installed: "
                         "pip install plotly starlette uvicorn (or make install)") from None
    patterns = config.runs or ("out",)
    engine = Engine(lambda: find_runs(patterns), config.models, config.device, config.dtype)
    routes = [route for module in (writing, introspection, openai_api) for route in module.routes(engine)]
    app = build_app(RunTable(patterns), routes, config.host, config.token)
    listener = listen(config.host, config.port)
    url = page_url(config.host, listener.getsockname()[1], config.token)
    print(f"{url} shows the runs under {', '.join(patterns)}; Ctrl-C ends the server", flush=True)
    for pattern in config.runs:
        if not find_runs([pattern]):
            print(f"warning: there is no run under {pattern} yet", flush=True)
    if config.open and has_browser():
        threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

    class Server(uvicorn.Server):
        def handle_exit(self, *signal: Any) -> None:
            app.state.is_stopping = True  # the server waits for its answers, and an event stream would never end
            engine.close()
            super().handle_exit(*signal)

    server = Server(uvicorn.Config(app, log_level="error", access_log=False, server_header=False,
                                   timeout_graceful_shutdown=5))
    with contextlib.suppress(KeyboardInterrupt):  # the way to end it
        server.run(sockets=[listener])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at host and port. Raises OSError with a message for the user."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, UnicodeError) as error:
        raise OSError(f"cannot listen at {host}, port {port}: {getattr(error, 'strerror', None) or error} "
                      "(--port=0 takes any port that is free)") from None


def page_url(host: str, port: int, token: str) -> str:
    name = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)
    return f"http://{f'[{name}]' if ':' in name else name}:{port}/{f'?token={token}' if token else ''}"


def has_browser() -> bool:
    """Whether there is a screen; without one the browser would be one that takes over the terminal."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


if __name__ == "__main__":
    run_script(main)
