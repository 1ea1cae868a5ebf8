"""Whose turn it is: clients that leave, two at once, more than can wait; and models that come and go."""

import asyncio
import contextlib
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
from conftest import ROOT, run_process
from live import serving
from served import FIRST, LAST, make_app, models, tiny_run

from flatgpt.serving import engine as engine_module
from flatgpt.serving.engine import MAX_ACTIVE, MAX_WAITING, Engine


@pytest.fixture(autouse=True)
def _there(monkeypatch):
    monkeypatch.chdir(tiny_run().name)


@pytest.fixture
def url():
    with serving(make_app()) as url:
        yield url


def is_idle(engine: Engine) -> bool:
    return not (engine.active or engine.waiting)


def until(condition, seconds: float = 30) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


GREEDY = {"model": LAST, "prompt": "the", "temperature": 0}  # a drawn token may be the text's last
ENDLESS = [("/api/generate", {**GREEDY, "max_new_tokens": 16000, "candidates": 1}),
           ("/v1/completions", {**GREEDY, "max_tokens": 16000, "stream": True}),
           ("/v1/completions", {**GREEDY, "max_tokens": 16000})]


@pytest.mark.parametrize(("path", "body"), ENDLESS, ids=["page", "stream", "whole"])
def test_a_client_that_leaves_ends_its_work(url, path, body):
    """It would take long."""
    brief = {"model": LAST, "max_tokens": 1}  # the client's second is for the work, not for loading the model
    assert httpx.post(f"{url}/v1/completions", json=brief, timeout=60).status_code == 200
    with contextlib.suppress(httpx.ReadTimeout), httpx.Client(timeout=1) as client, client.stream(
            "POST", url + path, json=body) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        assert not is_idle(models()), [first, *lines]
    assert until(lambda: is_idle(models()))


def test_a_client_that_leaves_within_its_body_is_no_fault_of_the_server(url, capfd):
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
        httpx.get(f"{url}/v1/models")  # by now the server waits for the rest
    httpx.get(f"{url}/v1/models")
    time.sleep(0.2)
    assert capfd.readouterr().err == ""


def test_a_client_that_leaves_before_its_turn_is_forgotten(url):
    async def ask():
        async with httpx.AsyncClient(timeout=60) as client:
            path, body = ENDLESS[1]
            tasks = [asyncio.create_task(client.post(url + path, json=body)) for _ in range(MAX_ACTIVE + 3)]
            while len(models().waiting) < 3:
                await asyncio.sleep(0.02)
            for task in tasks:
                task.cancel()

    asyncio.run(ask())
    assert until(lambda: is_idle(models()))


def test_two_write_side_by_side(url):
    """Their tokens come in turn, each text as if it were alone, though the models differ."""
    bodies = [{"model": model, "prompt": "the quick", "max_new_tokens": 60, "seed": 2} for model in (FIRST, LAST)]
    alone = [httpx.post(f"{url}/api/generate", json=body, timeout=60).text for body in bodies]
    came = []

    async def read(client, number: int) -> str:
        lines = []
        async with client.stream("POST", f"{url}/api/generate", json=bodies[number]) as answer:
            async for line in answer.aiter_lines():
                lines.append(line)
                came.append(number)
        return "\n".join(lines) + "\n"

    async def both():
        async with httpx.AsyncClient(timeout=60) as client:
            return await asyncio.gather(read(client, 0), read(client, 1))

    assert asyncio.run(both()) == alone
    assert alone[0] != alone[1]
    assert 0 in came[-20:]
    assert 1 in came[-20:]


def test_200_requests_at_once_are_answered_or_refused(url):
    async def ask():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            body = {"model": LAST, "prompt": "the quick", "max_tokens": 8, "temperature": 0}
            return await asyncio.gather(*(client.post(f"{url}/v1/completions", json=body) for _ in range(200)))

    before = peak_bytes()
    answers = asyncio.run(ask())
    counts = {status: sum(answer.status_code == status for answer in answers) for status in (200, 429)}
    assert sum(counts.values()) == 200
    assert counts[200] >= MAX_WAITING
    assert len({answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == 200}) == 1
    for answer in answers:
        if answer.status_code == 429:
            assert "64 requests are waiting already: try again in a moment" in answer.json()["error"]["message"]
            assert answer.headers["Retry-After"] == "1"
    assert peak_bytes() - before < 300e6


def peak_bytes() -> float:
    """The most memory that this process has had so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def run_alone(engine: Engine, model_id: str, begin=lambda loaded: iter([loaded.id])) -> list:
    async def ask():
        async def stay() -> bool:
            return False
        return [result async for result in await engine.submit(model_id, begin, stay)]
    return asyncio.run(ask())


def test_no_more_models_lie_in_memory_than_are_used_at_once(monkeypatch):
    shutil.copytree(LAST, "copy", dirs_exist_ok=True)
    engine = Engine(lambda: [Path("out/tiny")], ["copy"], "cpu", "float32")
    for model_id in (FIRST, LAST, "copy", LAST):
        assert run_alone(engine, model_id) == [model_id]
        assert len(engine.loaded) <= MAX_ACTIVE
    assert [*engine.loaded] == ["copy", LAST]  # the least recently used went


def test_a_checkpoint_that_is_deleted_is_told_from_one_that_never_was(tmp_path):
    shutil.copytree("out/tiny", tmp_path / "run", symlinks=True)
    engine = Engine(lambda: [tmp_path / "run"], [], "cpu", "float32")
    model_id = next(choice.id for choice in engine.choices())
    choices = engine.choices()
    shutil.rmtree(tmp_path / "run")
    assert engine.choices() == []
    with pytest.raises(engine_module.UnknownModel, match="there is no model"):
        run_alone(engine, model_id)
    engine.choices = lambda: choices  # it was there when it was asked for
    with pytest.raises(OSError, match="no model at"):
        run_alone(engine, model_id)


def test_a_run_that_is_begun_anew_writes_with_its_new_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree("out/tiny", tmp_path / "run", symlinks=True))
    best, other, engine = Path(LAST).name, Path(FIRST).name, Engine(list, ["../run", f"checkpoints/{Path(LAST).name}"],
                                                                    "cpu", "float32")

    def norm(loaded):
        yield loaded.model.wte.weight.norm().item()

    before = [run_alone(engine, name, norm) for name in engine.named]
    os.replace(f"checkpoints/{best}", "old")
    shutil.copytree(f"checkpoints/{other}", f"checkpoints/{best}")
    after = [run_alone(engine, name, norm) for name in engine.named]
    assert before[0] == before[1] != after[0] == after[1]
    shutil.rmtree("checkpoints")  # what lies in memory can still be used
    assert [run_alone(engine, name, norm) for name in engine.named] == after


def test_weights_that_are_written_over_in_their_file_are_loaded_anew(tmp_path):
    folder = Path(shutil.copytree(LAST, tmp_path / "model"))
    (folder / "SHA256SUMS").unlink()
    engine = Engine(list, [str(folder)], "cpu", "float32")

    def norm(loaded):
        yield loaded.model.wte.weight.norm().item()

    before = run_alone(engine, str(folder), norm)
    shutil.copyfile(Path(FIRST) / "model.safetensors", folder / "model.safetensors")
    assert run_alone(engine, str(folder), norm) != before


def test_a_run_of_somebody_else_hides_no_other(tmp_path, monkeypatch):
    def refuse(run):
        raise PermissionError(run)

    real = engine_module.run_folder.step_folders
    monkeypatch.setattr(engine_module.run_folder, "step_folders",
                        lambda run: real(run) if run == Path("out/tiny") else refuse(run))
    engine = Engine(lambda: [tmp_path, Path("out/tiny")], [], "cpu", "float32")
    assert [choice.id for choice in engine.choices()] == [LAST, FIRST]


def test_a_server_without_a_model_in_use_has_no_torch_in_memory():
    """It is most of what a process takes, and seconds of its start."""
    modules = "engine, bodies, writing, introspection, openai_api"
    run_process("-c", f"from flatgpt.serving import {modules}; import sys; engine.Engine(list).choices(); "
                      "assert 'torch' not in sys.modules", cwd=ROOT)


def test_a_device_that_is_not_here_is_said_to_who_asks():
    engine = Engine(lambda: [Path("out/tiny")], device="gpu")
    for _ in range(2):
        with pytest.raises(ValueError, match="device='gpu' is not a device: use cuda"):
            run_alone(engine, LAST)


@pytest.mark.parametrize(("path", "body"), ENDLESS)
def test_what_a_stop_cuts_short_says_so(path, body):
    """It must not be taken for a whole answer."""
    engine = Engine(lambda: [Path("out/tiny")], [], "cpu", "float32")
    threading.Thread(target=lambda: until(lambda: engine.active) and engine.close()).start()
    with serving(make_app(engine)) as url:
        answer = httpx.post(url + path, json=body, timeout=60)
    assert "the server was stopped before this was done" in answer.text


def test_an_error_is_its_own_requests(url):
    """The thread lives on, and nothing of it is shown."""
    def fail(loaded):
        raise KeyError("secret")

    with pytest.raises(KeyError):
        run_alone(models(), LAST, fail)
    assert run_alone(models(), LAST) == [LAST]


def test_a_model_that_has_diverged_says_so(tmp_path, monkeypatch):
    run_alone(models(), LAST)
    table = models().loaded[LAST].model.wte.weight
    kept = table.detach().clone()
    with torch.no_grad():
        table.fill_(torch.nan)
    try:
        with serving(make_app()) as url:
            answers = [httpx.post(f"{url}{path}", json={"model": LAST, "prompt": "ab", **body}, timeout=60)
                       for path, body in (("/v1/completions", {}), ("/v1/completions", {"echo": True, "logprobs": 0}),
                                          ("/api/tokens", {}))]
    finally:
        with torch.no_grad():
            table.copy_(kept)
    for answer in answers:
        assert (answer.status_code, "its training diverged" in answer.text) == (400, True)
