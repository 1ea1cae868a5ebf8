"""OpenAI's endpoint through the `openai` package and lm-eval, against the model itself and its folder."""

import json
import math
import re
from pathlib import Path

import openai
import pytest
import torch
from conftest import run_process
from live import serving
from served import LAST, make_app, models, tiny_run
from starlette.testclient import TestClient

from flatgpt.data.tokenizer import ByteTokenizer
from model import GPT

PROMPT = "the quick brown"


@pytest.fixture(autouse=True)
def _there(monkeypatch):
    monkeypatch.chdir(tiny_run().name)


@pytest.fixture
def client():
    with TestClient(make_app(), base_url="http://localhost") as client:
        yield client


@pytest.fixture
def complete(client):
    """`complete(prompt=...)`: the answer's JSON."""
    def ask(**body):
        answer = client.post("/v1/completions", json={"model": LAST, "temperature": 0, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()
    return ask


def ids_of(text: str) -> list[int]:
    return list(text.encode())


def written(prompt: str, num_tokens: int, seed: int = 0, **options) -> str:
    """What the model itself writes behind the prompt."""
    torch.manual_seed(seed)
    ids = GPT.from_pretrained(LAST).generate(torch.tensor([ids_of(prompt)]), num_tokens, **options)[0]
    return ByteTokenizer().decode(ids[len(ids_of(prompt)):])


def log_probs_of(text: str) -> list[float]:
    """The model's log-probability of each byte behind the first."""
    ids = torch.tensor([ids_of(text)])
    with torch.no_grad():
        log_probs = GPT.from_pretrained(LAST).eval()(ids)[0][0].log_softmax(dim=1)
    return log_probs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()


# The openai package


def test_openais_client_completes_streams_and_stops():
    with serving(make_app()) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert LAST in [model.id for model in client.models.list()]
        options = {"model": LAST, "prompt": PROMPT, "max_tokens": 40, "temperature": 0.8, "seed": 3}
        text = written(PROMPT, 40, seed=3, temperature=0.8)
        whole = client.completions.create(**options)
        assert (whole.choices[0].text, whole.choices[0].finish_reason) == (text, "length")
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(PROMPT), 40)
        parts = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
        assert "".join(choice.text for part in parts for choice in part.choices) == text
        assert len(parts) > 20
        assert parts[-1].usage.total_tokens == len(PROMPT) + 40
        stop = text[10:13]
        for stream in (False, True):
            found = client.completions.create(**options, stop=["\0", stop], stream=stream)
            choices = [choice for part in (found if stream else [found]) for choice in part.choices]
            assert "".join(choice.text for choice in choices) == text[:text.index(stop)]
            assert choices[-1].finish_reason == "stop"
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
            client.completions.create(model="gpt-4", prompt="a")
        with pytest.raises(openai.BadRequestError, match="logprobs=9 must be 0 to 5"):
            client.completions.create(**options, logprobs=9)


def test_openais_client_gets_the_models_own_log_probabilities():
    with serving(make_app()) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        choice = client.completions.create(model=LAST, prompt=PROMPT, max_tokens=20, temperature=0.5, seed=1, echo=True,
                                           logprobs=3).choices[0]
    assert choice.text.startswith(PROMPT)
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text
    assert found.text_offset == list(range(len(PROMPT) + 20))
    assert found.token_logprobs[0] is found.top_logprobs[0] is None
    assert found.token_logprobs[1:] == pytest.approx(log_probs_of(choice.text), abs=1e-4)
    for token, log_prob, top in zip(found.tokens[1:], found.token_logprobs[1:], found.top_logprobs[1:]):
        assert len(top) == 3
        assert max(top.values()) >= log_prob
        assert top.get(token, log_prob) == log_prob


# Requests


@pytest.mark.parametrize("prompts", [[PROMPT, "Line 3: the qui", "lazy dogs. Line"], ["a", "the quick", "b", "Ünï"]])
def test_prompts_of_one_request_give_what_single_requests_give(complete, prompts):
    options = {"max_tokens": 30, "temperature": 0.9, "seed": 7, "logprobs": 2, "n": 2, "echo": True}
    together = complete(prompt=prompts, **options)
    assert [choice["index"] for choice in together["choices"]] == list(range(2 * len(prompts)))
    singles = [choice for prompt in prompts for choice in complete(prompt=ids_of(prompt), **options)["choices"]]
    for ours, alone in zip(together["choices"], singles, strict=True):
        assert ours["text"] == alone["text"]
        found, wanted = (choice["logprobs"]["token_logprobs"][1:] for choice in (ours, alone))
        assert found == pytest.approx(wanted, abs=1e-4)
    assert together["usage"]["prompt_tokens"] == sum(len(ids_of(prompt)) for prompt in prompts)


def test_choice_k_is_drawn_with_seed_plus_k(complete):
    texts = [choice["text"] for choice in complete(prompt=PROMPT, n=3, seed=5, temperature=1, max_tokens=20)["choices"]]
    assert texts == [written(PROMPT, 20, seed=5 + k) for k in range(3)]
    assert len({*texts}) == 3
    drawn = [complete(prompt=PROMPT, temperature=1, max_tokens=20)["choices"][0]["text"] for _ in range(2)]
    assert drawn[0] != drawn[1]  # without a seed another text each time


def test_a_text_ends_at_the_end_of_text_and_its_token_keeps_its_log_probability(complete, monkeypatch):
    complete(prompt=PROMPT, max_tokens=1)  # loads the model
    text = written(PROMPT, 12, temperature=0)
    monkeypatch.setattr(models().loaded[LAST].tokenizer, "eot_id", ids_of(text[5])[0])
    end = text.index(text[5])
    choice = complete(prompt=PROMPT, max_tokens=12, logprobs=1)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text[:end], "stop")
    assert len(choice["logprobs"]["token_logprobs"]) == end + 1


def test_text_that_may_begin_a_stop_is_held_back_and_given_if_it_does_not(client):
    text = written(PROMPT, 12, temperature=0)
    assert len({*text[1:8]}) > 3
    stops = [text[2:6] + "\0", text[8:10]]
    body = {"model": LAST, "prompt": PROMPT, "temperature": 0, "max_tokens": 12, "stream": True, "stop": stops}
    answer = client.post("/v1/completions", json=body).text
    events = [json.loads(event) for event in re.findall(r"data: (\{.*)", answer)]
    pieces = [event["choices"][0]["text"] for event in events]
    assert "".join(pieces) == text[:text.index(stops[1])]
    assert text[2:6] in pieces  # in one piece, when it was no stop
    assert answer.endswith("data: [DONE]\n\n")


def test_characters_come_whole_and_bytes_have_names(complete):
    prompt = "Ü 🎉"
    choice = complete(prompt=prompt, max_tokens=0, echo=True, logprobs=0)["choices"][0]
    assert choice["text"] == prompt
    assert choice["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\x9c", " ", *(f"bytes:\\x{byte:02x}" for byte in
                                                                                  "🎉".encode())]
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(log_probs_of(prompt), abs=1e-4)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65])
def test_a_prompt_up_to_the_context_and_one_is_scored(complete, length):
    text = ("Line 7: the quick brown fox, 49 jumps; over lazy lazy dogs.\n" * 2)[:length]
    choice = complete(prompt=text, max_tokens=1, echo=True, logprobs=1)["choices"][0]
    wanted = [] if length == 1 else log_probs_of(text) if length <= 64 else None
    assert len(choice["logprobs"]["token_logprobs"]) == length + 1
    if wanted is not None:
        assert choice["logprobs"]["token_logprobs"][1:-1] == pytest.approx(wanted, abs=1e-4)
    assert choice["text"] == text + written(text, 1, temperature=0)


@pytest.mark.parametrize(("body", "message"), [
    ({"prompt": "x" * 66, "echo": True, "logprobs": 1}, "this model reads 64 at a time: shorten the prompt (lm_eval"),
    ({"prompt": [[1], ["a"]]}, "prompt=[[1], ['a']] must be a text or a list, each item a whole number or"),
    ({"prompt": [[1], []]}, "the prompt is empty"),
    ({"best_of": 3, "suffix": "x"}, "best_of=3 is not offered here: leave it out; suffix=x is not offered here"),
    ({"n": 200}, "1 prompts, 200 choices each: at most 128"),
    ({"stop": ["a"] * 17}, "stop: at most 16 texts of up to 1000 characters"),
    ({"stop": "a" * 1001}, "stop: at most 16 texts of up to 1000 characters"),
    ({"prompt": ["a"] * 100, "max_tokens": 10000}, "the request takes 1,000,100 tokens"),
])
def test_what_is_not_offered_is_a_sentence(client, body, message):
    answer = client.post("/v1/completions", json={"model": LAST, "prompt": "a", **body})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


# lm-eval

LM_EVAL = """
import json
import sys
import lm_eval
from lm_eval.tasks import TaskManager

url, folder = sys.argv[1:]
tasks = TaskManager(include_path="tasks", include_defaults=False)
for name, args in (("local-completions", {"model": folder, "base_url": url + "/v1/completions", "max_length": 65,
                                          "num_concurrent": 2, "tokenized_requests": True}),
                   ("hf", {"pretrained": folder, "dtype": "float32"})):
    found = lm_eval.simple_evaluate(name, model_args=args, tasks=["choice", "answer", "written"], batch_size=7,
                                    device="cpu", task_manager=tasks, bootstrap_iters=0)
    samples = {task: [sample["filtered_resps"] for sample in sorted(of, key=lambda one: one["doc_id"])]
               for task, of in found["samples"].items()}
    print("FOUND" + json.dumps([found["results"], samples]))
"""
TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: choices\ndoc_to_target: label\n"
              "metric_list: [{metric: acc}, {metric: acc_norm}]",
    "answer": "output_type: loglikelihood\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{choices[label]}}'\n"
              "metric_list: [{metric: perplexity}, {metric: acc}]",
    "written": "output_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{choices[label]}}'\n"
               "generation_kwargs: {until: [\",\", \"\\n\"], max_gen_toks: 20, do_sample: false, temperature: 0}\n"
               "metric_list: [{metric: exact_match}]"}


def test_lm_eval_gives_the_score_that_it_gives_the_folder(tmp_path):
    """50 questions of three kinds."""
    folder = Path(LAST).absolute()
    questions = [{"text": f"Line {i}: the quick brown" + " lazy" * (i % 4), "label": i % 3,
                  "choices": [" fox", f" {i * i} jumps", " dogs"]} for i in range(50)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "tasks").mkdir()
    for name, task in TASKS.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/questions.jsonl}}}}\n"
            f"test_split: test\n{task}\n")
    with serving(make_app()) as url:
        # Under the id that the server has for the model, which is its path from here.
        out = run_process("-c", LM_EVAL, url, LAST, cwd=link_to(folder, tmp_path), OMP_NUM_THREADS="1",
                          HF_DATASETS_CACHE=str(tmp_path / "cache"))
    ours, theirs = [json.loads(line.removeprefix("FOUND")) for line in out.splitlines() if line.startswith("FOUND")]
    assert ours[1]["written"] == theirs[1]["written"]
    assert ours[0]["written"]["exact_match,none"] > 0
    for task in ("choice", "answer"):
        flat = [[value for sample in found[1][task] for one in sample for value in (one if isinstance(one, list) else
                                                                                  [one])] for found in (ours, theirs)]
        assert [float(value) for value in flat[0]] == pytest.approx([float(value) for value in flat[1]], abs=1e-4)
    for task, numbers in theirs[0].items():
        for key, number in numbers.items():
            if isinstance(number, float) and not math.isnan(number):
                assert ours[0][task][key] == pytest.approx(number, rel=1e-4), (task, key)


def link_to(folder: Path, place: Path) -> Path:
    """A folder from which the checkpoint has the id that the server gives it."""
    (place / LAST).parent.mkdir(parents=True)
    (place / LAST).symlink_to(folder)
    return place
