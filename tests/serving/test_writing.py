"""The Write view's routes against sample.py."""

import json
import re

import pytest
from served import FIRST, LAST, make_app, tiny_run
from starlette.testclient import TestClient

import sample

OPTIONS = {"max_new_tokens": 30, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02,
           "repetition_penalty": 1.1, "seed": 5}


@pytest.fixture
def client(monkeypatch):
    monkeypatch.chdir(tiny_run().name)
    with TestClient(make_app(), base_url="http://localhost") as client:
        yield client


def sampled(capsys, prompt: str, **options) -> str:
    """What sample.py prints of one sample."""
    capsys.readouterr()
    sample.main([f"--init_from={LAST}", f"--prompt={prompt}", "--num_samples=1", "--device=cpu", "--dtype=float32",
                 *(f"--{key}={value}" for key, value in options.items())])
    return capsys.readouterr().out.partition("\n")[2].rpartition("\n---------------\n")[0]


def lines_of(client, **body) -> list[dict]:
    answer = client.post("/api/generate", json={"model": LAST, **body})
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def text_of(lines: list[dict]) -> str:
    """What was written behind the prompt."""
    return "".join(line.get("text", line.get("end", "")) for line in lines[1:])


@pytest.mark.parametrize(("prompt", "options"), [
    ("the quick", {}), ("", {}), ("Ünïc", {"max_new_tokens": 90, "top_k": 0}), ("Line", {"temperature": 0})])
def test_the_text_is_sample_pys(client, capsys, prompt, options):
    lines = lines_of(client, prompt=prompt, **OPTIONS | options)
    assert prompt + text_of(lines) == sampled(capsys, prompt, **OPTIONS | options)
    assert len(lines) == 2 + (OPTIONS | options)["max_new_tokens"]


def test_each_tokens_table_is_that_of_show_probs(client, capsys):
    """Drawn as sample.py prints it, from the numbers of the page."""
    *tables, _ = sampled(capsys, "the quick", show_probs=4, **OPTIONS).split("\n\n")
    lines = lines_of(client, prompt="the quick", candidates=4, **OPTIONS)[1:-1]
    assert len(lines) == len(tables) == OPTIONS["max_new_tokens"]
    for number, (line, printed) in enumerate(zip(lines, tables), 1):
        title, head, *rows = printed.split("\n")
        assert title == f"token {number}: {line['name']}"
        assert head.split() == line["candidates"]["stages"]
        shown = [("> " if row["id"] == line["id"] else "  ", row["name"], row["probs"])
                 for row in line["candidates"]["rows"]] + [("  ", "others", line["candidates"]["others"])]
        for (mark, name, probs), row in zip(shown, rows, strict=True):
            assert row.startswith(mark + name)
            assert re.findall(r"[\d.]+%|-(?=\s|$)", row[len(mark + name):]) == [f"{p:.2%}" if p else "-" for p in probs]


def test_a_token_is_replaced_and_the_text_goes_on(client, capsys):
    """As if what stands before had been the prompt."""
    prompt = "the quick"
    lines = lines_of(client, prompt=prompt, **OPTIONS)
    other = next(row["id"] for row in lines[3]["candidates"]["rows"] if row["id"] != lines[3]["id"])
    again = lines_of(client, prompt=prompt, written=[lines[1]["id"], lines[2]["id"], other], **OPTIONS)
    assert again[0] == lines[0]
    kept = prompt + text_of(lines)[:2] + chr(other)
    assert prompt + text_of(again) == sampled(capsys, kept, **OPTIONS)
    assert [line["text"] for line in again[1:4]] == [*kept[-3:]]


def test_surprise_is_what_the_model_thought_of_the_token_before_any_filter(client):
    for line in lines_of(client, prompt="the quick", **OPTIONS)[1:-1]:
        prob = next(row["probs"][0] for row in line["candidates"]["rows"] if row["id"] == line["id"])
        assert 2.718281828 ** -line["surprise"] == pytest.approx(prob, rel=1e-5)


def test_the_models_are_the_runs_checkpoints_and_those_named(client):
    found = client.get("/api/models").json()["models"]
    assert [(choice["id"], choice["run"], choice["step"]) for choice in found] == [
        ("out/tiny", "", None), (LAST, "out/tiny", 80), (FIRST, "out/tiny", 40)]
    assert [choice["is_best"] for choice in found].count(True) == 1


@pytest.mark.parametrize(("body", "status", "message"), [
    ({"model": "out/none"}, 404, "there is no model 'out/none'"),
    ({"model": "../../etc"}, 404, "there is no model '../../etc'"),
    ({"model": "tiny.txt"}, 404, "there is no model 'tiny.txt'"),
    ({}, 400, "model is missing"),
    ({"model": LAST, "temperature": "hot"}, 400, "temperature='hot' must be a number"),
    ({"model": LAST, "temperature": -1, "top_p": 0}, 400, "temperature=-1 must be 0 or more; top_p=0 must be above 0"),
    ({"model": LAST, "seed": -1, "candidates": 0}, 400, "seed=-1 must be 0 or more; candidates=0 must be 1 to 50"),
    ({"model": LAST, "promt": "a"}, 400, "unknown key 'promt'; did you mean 'prompt'?"),
    ({"model": LAST, "written": [1, 257]}, 400, "token id 257 is outside the vocabulary: 0 to 256"),
    ({"model": LAST, "written": [[1]]}, 400, "written=[[1]] must be a list, each item a whole number"),
    ({"model": LAST, "prompt": "\ud800"}, 400, "the prompt is not valid text"),
    ({"model": LAST, "max_new_tokens": 10**9}, 400, "take 1,000,000,001 tokens"),
    ({"model": LAST, "prompt": "x" * 10**7}, 413, "A request may have 4 MB"),
])
def test_bad_input_is_a_sentence(client, body, status, message):
    answer = client.post("/api/generate", content=json.dumps(body))
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"[" * 10**5, b'{"model": NaN}'])
def test_a_body_that_is_no_object_is_a_sentence(client, body):
    answer = client.post("/api/generate", content=body)
    assert answer.status_code == 400
    assert "must be" in answer.json()["error"]["message"]
