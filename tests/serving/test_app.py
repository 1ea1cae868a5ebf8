"""app.py: who may ask, what cannot be named, sizes, errors as sentences, and the stream of what is new."""

import json
import os
import shutil
from pathlib import Path

import httpx
import pytest
from conftest import write_run
from live import serving
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from flatgpt.serving import app as app_module
from flatgpt.serving.app import MAX_BODY_BYTES, MAX_NEW_RECORDS, build_app
from flatgpt.serving.runs import RunTable

TOKEN = "0123456789abcdef"


def report(step: int, **others: object) -> dict:
    return {"step": step, "tokens": 8 * step, "train/loss": 1.0, "elapsed_s": step / 2} | others


async def echo(request: Request) -> JSONResponse:
    return JSONResponse({"bytes": len(await request.body())})


async def fail(request: Request) -> JSONResponse:
    raise RuntimeError("secret detail")


def app_of(folder: Path, **options: str):
    more = [Route("/echo", echo, methods=["POST"]), Route("/fail", fail)]
    return build_app(RunTable([str(folder)]), more, **options)


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path / "out" / "a", [report(1), report(2)], {"max_iters": 9})
    (tmp_path / "secret.json").write_text("{}")
    return tmp_path / "out"


@pytest.fixture
def client(folder):
    return TestClient(app_of(folder), base_url="http://localhost:8000", raise_server_exceptions=False)


def refusal(response: httpx.Response, status: int) -> str:
    """The sentence of an error."""
    assert response.status_code == status
    return response.json()["error"]["message"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", "10.0.0.1", "",
                                  "[::2]"])
def test_a_name_that_is_not_this_machines_is_refused(client, host):
    assert "does not answer to the name" in refusal(client.get("/api/runs", headers={"host": host}), 403)


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:9000", "[::1]:8000", "LOCALHOST"])
def test_this_machines_names_are_answered(client, host):
    assert client.get("/api/runs", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("headers", [
    {"origin": "https://evil.example"}, {"origin": "http://localhost:3000"}, {"origin": "null"}, {"origin": ""},
    {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, {"sec-fetch-site": "same-site"}])
def test_a_page_of_another_origin_is_refused(client, headers):
    assert "may not use this server" in refusal(client.post("/echo", headers=headers), 403)
    assert "may not use this server" in refusal(client.get("/api/runs", headers=headers), 403)


def test_the_servers_own_page_and_programs_are_answered(client):
    own = {"origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}
    assert client.post("/echo", content=b"abc", headers=own).json() == {"bytes": 3}
    assert client.post("/echo", content=b"abc").json() == {"bytes": 3}
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/", headers=link).status_code == 200


@pytest.mark.parametrize("path", [
    "/api/runs/../../secret.json", "/api/runs/%2e%2e%2f%2e%2e%2fsecret.json", "/api/runs/a", "/api/runs/000000000000",
    "/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/static//etc/passwd", "/static/nothing.js"])
def test_no_path_outside_can_be_named(client, path):
    refusal(client.get(path), 404)


@pytest.mark.parametrize("runs", ["a", "../secret@0.0", "0123456789ab@-5.0", "0123456789ab@x",
                                  "0123456789ab@9." + "9" * 99])
def test_a_stream_of_nonsense_is_refused(client, runs):
    assert "id@position" in refusal(client.get(f"/api/events?runs={runs}"), 400)


def test_a_body_that_is_too_long_is_refused(client):
    long = b"x" * (10 << 20)
    assert "may have 4 MB" in refusal(client.post("/echo", content=long), 413)
    pieces = (long[:1 << 16] for _ in range(160))  # without a length in the header
    assert "may have 4 MB" in refusal(client.post("/echo", content=pieces), 413)
    assert client.post("/echo", content=b"x" * MAX_BODY_BYTES).json() == {"bytes": MAX_BODY_BYTES}


def test_an_error_is_a_sentence_and_no_traceback(client):
    assert refusal(client.get("/fail"), 500) == "The server failed; its terminal shows why."
    assert refusal(client.get("/nowhere"), 404) == "Not Found"
    assert refusal(client.get("/echo"), 405) == "Method Not Allowed"


def test_the_token_is_asked_of_every_request(folder):
    client = TestClient(app_of(folder, host="0.0.0.0", token=TOKEN), base_url="http://192.168.0.7:8000")
    for path in ("/", "/api/runs", "/static/app.js", "/plotly.min.js", "/?token=wrong", "/?token=%C3%BC"):
        assert "asks for its token" in refusal(client.get(path), 401)
    assert client.get("/api/runs", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert client.get("/api/runs").status_code == 401
    welcome = client.get(f"/?token={TOKEN}", follow_redirects=False)
    assert (welcome.status_code, welcome.headers["location"]) == (303, "./")
    assert {"HttpOnly", "SameSite=lax"} <= set(welcome.headers["set-cookie"].split("; "))
    assert client.get("/api/runs").status_code == 200  # by the cookie
    assert "does not answer to the name" in refusal(client.get("/", headers={"host": "evil.example"}), 403)


def test_two_servers_do_not_overwrite_each_others_cookies(folder):
    """A browser gives a machine's cookies to all of its ports."""
    browser: dict[str, str] = {}
    for token in (TOKEN, TOKEN[::-1]):
        client = TestClient(app_of(folder, token=token), base_url="http://localhost:8000", cookies=browser)
        client.get(f"/?token={token}")
        browser |= dict(client.cookies)
    for token in (TOKEN, TOKEN[::-1]):
        client = TestClient(app_of(folder, token=token), base_url="http://localhost:8000", cookies=browser)
        assert client.get("/api/runs").status_code == 200


def test_names_and_texts_that_are_no_unicode_are_given_all_the_same(folder):
    name = os.fsdecode(b"\xff\xfe")
    write_run(folder / name, [{"step": 1, "samples": ["\ud800"]}], {"wandb_run_name": "\udfff"})
    client = TestClient(app_of(folder), base_url="http://localhost:8000")
    [line] = [line for line in client.get("/api/runs").json()["runs"] if line["name"] == name]
    history = client.get(f"/api/runs/{line['id']}").json()
    assert (history["samples"][0]["samples"], history["options"]) == (["\ud800"], {"wandb_run_name": "\udfff"})


def test_answers_say_that_nothing_comes_from_elsewhere(client):
    for path in ("/", "/api/runs", "/nowhere", "/static/style.css"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'self'")
        assert headers["x-content-type-options"] == "nosniff"


def test_the_page_names_nothing_elsewhere():
    texts = {path.name: path.read_text() for path in app_module.STATIC.iterdir()}
    assert [name for name, text in texts.items() if "://" in text.replace("http://www.w3.org/2000/svg", "")] == []
    assert [name for name, text in texts.items() if "innerHTML" in text] == []


def test_a_run_is_given_with_its_options(client, folder):
    answer = client.get("/api/runs").json()
    assert answer["folders"] == [str(folder)]
    [line] = answer["runs"]
    assert (line["name"], line["step"], line["max_iters"]) == ("a", 2, 9)
    run = client.get(f"/api/runs/{line['id']}").json()
    assert run["options"] == {"max_iters": 9}
    assert run["columns"]["step"] == [1, 2]
    assert run["read"] == 1


def events_of(lines) -> tuple[str, object]:
    """The next event of a stream: its name and value."""
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            return name, json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream ended")


def test_the_stream_has_what_is_new_and_nothing_else(folder, monkeypatch):
    for name, seconds in (("app.POLL_S", 0.05), ("runs.RESCAN_S", 0.0), ("runs.REFRESH_S", 0.0)):
        monkeypatch.setattr(f"flatgpt.serving.{name}", seconds)
    metrics = folder / "a" / "metrics.jsonl"
    with serving(app_of(folder)) as address, httpx.Client(base_url=address, timeout=30) as client:
        [line] = client.get("/api/runs").json()["runs"]
        position = client.get(f"/api/runs/{line['id']}").json()["position"]
        with client.stream("GET", f"/api/events?runs={line['id']}@{position}") as response:
            lines = response.iter_lines()
            name, [first] = events_of(lines)
            assert (name, first["step"]) == ("runs", 2)
            with open(metrics, "a") as file:
                file.write(json.dumps(report(3)) + '\n{"step": 4, "train/loss": 1e999}\n{"step": 4, "stopped": "x"}\n'
                           '{"step": 5, "tra')
            name, [changed] = events_of(lines)
            assert (name, changed["step"]) == ("runs", 4)
            name, news = events_of(lines)
            assert (name, news["id"]) == ("news", line["id"])
            assert news["columns"]["train/loss"] == [1.0, None]
            assert (news["columns"]["step"], news["evaluations"]) == ([3, 4], [])
            assert news["events"] == [{"step": 4, "tokens": 32, "elapsed_s": None, "kind": "stop", "why": "x"}]
            metrics.write_text(json.dumps(report(1)) + "\n")  # a resume cuts what lies behind its checkpoint
            assert events_of(lines)[0] == "runs"
            assert events_of(lines) == ("reload", line["id"])
            shutil.rmtree(folder / "a")
            assert events_of(lines) == ("gone", [line["id"]])


def test_a_flood_of_new_lines_is_read_anew_instead(folder, monkeypatch):
    table = RunTable([str(folder)])
    [line] = table.refresh()
    feed = app_module.Feed(table, {line["id"]: table.history(line["id"], 1.0)["position"]})
    with open(folder / "a" / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(report(step)) + "\n" for step in range(3, MAX_NEW_RECORDS + 9))
    assert f'event: reload\ndata: "{line["id"]}"' in "".join(feed.new())
