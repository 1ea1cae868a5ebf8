"""What the tests of serving share: a tiny run of bytes, the models in it, and a server of them."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from conftest import TEXT, TINY_RUN
from starlette.applications import Starlette

import prepare_data
import train
from flatgpt.serving import introspection, openai_api, writing
from flatgpt.serving.engine import Engine

FIRST, LAST = (f"out/tiny/checkpoints/step_000000{step}" for step in (40, 80))


@functools.cache
def tiny_run() -> tempfile.TemporaryDirectory:
    """A folder with data/tiny and the run out/tiny: two checkpoints of a GPT that has learned a little."""
    folder, before = tempfile.TemporaryDirectory(), Path.cwd()
    os.chdir(folder.name)
    try:
        Path("tiny.txt").write_text(TEXT + "Ünïcödé 🎉\n" * 20, encoding="utf-8")
        prepare_data.main(["--input=tiny.txt", "--name=tiny", "--tokenizer=byte"])
        train.main([*TINY_RUN, "--block_size=64", "--n_embd=32", "--max_iters=80", "--eval_interval=40",
                    "--lr_decay_iters=80"])
    finally:
        os.chdir(before)
    return folder


@functools.cache
def models() -> Engine:
    """The run's checkpoints, for a test that stands in its folder."""
    return Engine(lambda: [Path("out/tiny")], ["out/tiny"], "cpu", "float32")


def make_app(engine: Engine | None = None) -> Starlette:
    return Starlette(routes=[route for module in (writing, introspection, openai_api)
                             for route in module.routes(engine or models())])


@contextlib.contextmanager
def served(app: Starlette) -> Iterator[str]:
    """The address of an app, served by uvicorn as serve.py does."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
