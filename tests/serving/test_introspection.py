"""What a model computes for a prompt, against transformers and plain formulas."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from served import LAST, make_app, tiny_run
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM

from flatgpt.data.tokenizer import ByteTokenizer
from flatgpt.models.baselines import build
from flatgpt.serving.loaded import Loaded
from model import GPT, GPTConfig

PROMPT = "Line 7: the quick Ü"
IDS = list(PROMPT.encode())


@pytest.fixture
def ask(monkeypatch):
    monkeypatch.chdir(tiny_run().name)
    with TestClient(make_app(), base_url="http://localhost") as client:
        yield lambda path, **body: client.post(f"/api/{path}", json={"model": LAST, **body})


def loaded(model) -> Loaded:
    return Loaded("", model, ByteTokenizer(), (Path(), 0, 0))


def theirs(folder: str, layer: int) -> torch.Tensor:
    """Attention (H, T, T) as transformers computes it."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([IDS]), output_attentions=True).attentions[layer][0]


def test_attention_is_that_of_transformers(ask):
    for layer in (0, 1):
        wanted = theirs(LAST, layer)
        for head in (0, 1):
            rows = ask("attention", prompt=PROMPT, layer=layer, head=head).json()["weights"]
            assert [len(row) for row in rows] == [*range(1, len(IDS) + 1)]
            for t, row in enumerate(rows):
                assert row == pytest.approx(wanted[head, t, :t + 1].tolist(), abs=1e-4)


def test_attention_with_rotated_and_shared_keys_is_that_of_transformers(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=257, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, pos="rope",
                          norm="rmsnorm", mlp="swiglu")).eval()
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.1
    model.save_pretrained(str(tmp_path))
    for head, wanted in enumerate(theirs(str(tmp_path), 1)):
        torch.testing.assert_close(loaded(model).attention(IDS, 1, head), wanted, atol=1e-5, rtol=1e-4)


def test_attention_with_alibi_falls_with_the_distance():
    model = GPT(GPTConfig(block_size=64, vocab_size=257, n_layer=1, n_head=2, n_embd=16, pos="alibi")).eval()
    torch.nn.init.zeros_(model.h[0].attn.c_attn.weight)  # all scores alike
    distance = torch.arange(9)[:, None] - torch.arange(9)
    for head, slope in enumerate((2**-4, 2**-8)):
        scores = (-slope * distance).masked_fill(distance < 0, -math.inf)
        torch.testing.assert_close(loaded(model).attention(IDS[:9], 0, head), scores.softmax(dim=1))


def test_tokens_have_their_ids_names_and_what_the_model_thought_of_them(ask):
    found = ask("tokens", prompt=PROMPT).json()
    assert [token["id"] for token in found["tokens"]] == IDS
    assert [token["name"] for token in found["tokens"]] == [*map(repr, PROMPT[:-1]), "b'\\xc3'", "b'\\x9c'"]
    with torch.no_grad():
        logits = GPT.from_pretrained(LAST).eval()(torch.tensor([IDS]))[0][0]
    wanted = F.cross_entropy(logits[:-1], torch.tensor(IDS[1:]), reduction="none").tolist()
    assert found["tokens"][0]["surprise"] is None
    assert [token["surprise"] for token in found["tokens"][1:]] == pytest.approx(wanted, abs=1e-4)
    assert (found["layers"], found["heads"], found["vocab_size"]) == (2, 2, 257)


def test_neighbors_are_the_nearest_by_cosine(ask):
    table = GPT.from_pretrained(LAST).wte.weight.detach()[:257]
    cosines = [F.cosine_similarity(table[ord("e")], row, dim=0).item() for row in table]
    wanted = sorted((i for i in range(257) if i != ord("e")), key=lambda i: -cosines[i])[:20]
    found = ask("neighbors", token=ord("e")).json()
    assert (found["name"], [other["id"] for other in found["neighbors"]]) == ("'e'", wanted)
    assert [other["cosine"] for other in found["neighbors"]] == pytest.approx([cosines[i] for i in wanted], abs=1e-4)


@pytest.mark.parametrize(("path", "body", "message"), [
    ("tokens", {"prompt": "x" * 65}, "the prompt has 65 tokens, and this view shows at most 64 of this model"),
    ("attention", {"prompt": "a", "layer": 2}, "layer=2 must be 0 to 1"),
    ("attention", {"prompt": "a", "head": -1}, "head=-1 must be 0 to 1"),
    ("neighbors", {"token": 257}, "token id 257 is outside the vocabulary: 0 to 256"),
    ("neighbors", {}, "token is missing"),
])
def test_bad_input_is_a_sentence(ask, path, body, message):
    answer = ask(path, **body)
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (400, True), answer.text


def test_a_model_without_attention_says_so():
    model = build(GPTConfig(model="gru", vocab_size=257, n_layer=1, n_embd=16))
    with pytest.raises(ValueError, match=r"this model \(gru\) has no attention"):
        loaded(model).attention(IDS, 0, 0)
