"""A tiny run of bytes, the models in it, and the application with them."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

from conftest import TEXT, TINY_RUN
from starlette.applications import Starlette

import prepare_data
import train
from flatgpt.serving import introspection, openai_api, writing
from flatgpt.serving.app import build_app
from flatgpt.serving.engine import Engine
from flatgpt.serving.runs import RunTable

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
    """As serve.py makes it, of the models alone."""
    return build_app(RunTable(()), [route for module in (writing, introspection, openai_api)
                                    for route in module.routes(engine or models())])
