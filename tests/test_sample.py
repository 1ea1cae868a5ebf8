"""sample.py: every way to name a model and a prompt, and what comes out."""

import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_RUN, run_process
from test_train import headerless
from test_weights import make_hub_cache, save_nanogpt

from model import GPT
from tokenizer import ByteTokenizer, load_tokenizer

LINE = "\n---------------\n"


@pytest.fixture
def trained(cli, tiny_data):
    assert cli("train", *TINY_RUN).code == 0


def samples(result) -> list[str]:
    """The samples in a script's output: between the first line and the tokens/s of the last."""
    assert result.code == 0, result.err
    body = result.out.partition("\n")[2]
    assert re.fullmatch(r"[\d.]+ tokens/s\n", body.rpartition(LINE)[2])
    return body.rpartition(LINE)[0].split(LINE)


def test_a_sample_is_what_generate_gives(cli, trained):
    options = ("--out_dir=out/tiny", "--prompt=the quick", "--num_samples=2", "--max_new_tokens=40", "--top_k=5",
               "--top_p=0.9", "--temperature=0.7", "--seed=3", "--device=cpu")
    texts = samples(cli("sample", *options))
    model, tokenizer = GPT.from_pretrained("out/tiny"), load_tokenizer("out/tiny/checkpoints/best")
    torch.manual_seed(3)
    ids = torch.from_numpy(tokenizer.encode("the quick").astype("int64"))[None]
    assert texts == [tokenizer.decode(model.generate(ids, 40, 0.7, 5, 0.9)[0]) for _ in range(2)]
    assert samples(cli("sample", *options)) == texts
    assert samples(cli("sample", *options, "--seed=4")) != texts


def test_nanogpts_ways_of_giving_a_prompt(cli, trained):
    Path("prompt.txt").write_text("quick brown")
    base = ("--out_dir=out/tiny", "--num_samples=1", "--max_new_tokens=10", "--temperature=0")
    wanted = samples(cli("sample", *base, "--prompt=quick brown"))
    assert wanted[0].startswith("quick brown")
    assert len(wanted[0]) == len("quick brown") + 10
    assert samples(cli("sample", *base, "--start=quick brown")) == wanted
    assert samples(cli("sample", *base, "--start=FILE:prompt.txt")) == wanted
    assert samples(cli("sample", *base, "--init_from=resume", "--start=quick brown")) == wanted
    assert samples(cli("sample", "--init_from=out/tiny/checkpoints/best", *base[1:], "--prompt=quick brown")) == wanted


def test_an_empty_prompt_starts_from_a_newline_or_the_end_of_text(cli, trained, tmp_path):
    model, tokenizer = GPT.from_pretrained("out/tiny"), load_tokenizer("out/tiny/checkpoints/best")
    newline = torch.tensor([[int(tokenizer.encode("\n")[0])]])
    base = ("--num_samples=1", "--max_new_tokens=10", "--temperature=0", "--device=cpu", "--dtype=float32")
    wanted = tokenizer.decode(model.generate(newline, 10, temperature=0)[0, 1:])
    assert samples(cli("sample", "--out_dir=out/tiny", *base)) == [wanted]
    theirs = make_hub_cache(tmp_path / "cache", vocab_size=257, bos_token_id=256, eos_token_id=256)
    snapshot = next((tmp_path / "cache").rglob("config.json")).parent
    ByteTokenizer().save(snapshot)
    ids = theirs.generate(torch.tensor([[256]]), max_new_tokens=10, do_sample=False, pad_token_id=0)[0, 1:]
    assert samples(cli("sample", f"--init_from={snapshot}", *base)) == [ByteTokenizer().decode(ids)]


def test_gpt2_from_a_hub_cache_offline(tmp_path):
    make_hub_cache(tmp_path, vocab_size=257, bos_token_id=256, eos_token_id=256)
    ByteTokenizer().save(next(tmp_path.rglob("config.json")).parent)
    out = run_process(ROOT / "sample.py", "--init_from=gpt2", "--prompt=Hello", "--num_samples=1",
                      "--max_new_tokens=20", cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path))
    assert "\nHello" in out


def test_a_folder_without_a_tokenizer_but_gpt2s_vocabulary_takes_gpt2s(cli, gpt2_tokenizer, tmp_path):
    make_hub_cache(tmp_path / "cache", vocab_size=50257)
    snapshot = next((tmp_path / "cache").rglob("config.json")).parent
    texts = samples(cli("sample", f"--init_from={snapshot}", "--prompt=Hello", "--num_samples=2", "--max_new_tokens=5"))
    assert all(text.startswith("Hello") for text in texts)


def test_without_cache_and_network_one_line(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "could not get openai-community/gpt2 from the hub" in refused("sample", "--init_from=gpt2")


def test_a_nanogpt_checkpoint_samples_with_its_data_sets_characters(cli, tmp_path):
    headerless(tmp_path / "data" / "tiny", meta=True)
    save_nanogpt(tmp_path / "ckpt.pt", vocab_size=17)
    text = samples(cli("sample", "--init_from=ckpt.pt", "--prompt=to be", "--num_samples=1", "--max_new_tokens=30"))[0]
    assert text.startswith("to be")
    assert set(text) <= set("to be, or not to be: that is the question\n")


@pytest.mark.parametrize(("options", "message"), [
    (["--prompt=Ω and ∂"], "the char tokenizer does not know 'Ω' '∂'"),
    (["--prompt=FILE:none.txt"], "none.txt"),
    (["--prompt=FILE:out/tiny/checkpoints/best/model.safetensors"], "model.safetensors is no UTF-8 text"),
    (["--prompt=caf\udce9"], "the prompt is no valid text"),
    (["--seed=99999999999999999999"], "below 2**63"),
    (["--temperature=-1", "--top_p=0"], "temperature=-1.0 must be 0 or more; top_p=0.0 must be above 0"),
    (["--max_tokens=3"], "did you mean 'max_new_tokens'?"),
    (["--init_from=out/none"], "could not get out/none"),
    (["--out_dir=data"], "data holds no model"),
])
def test_bad_input_is_one_line(refused, trained, monkeypatch, options, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert message in refused("sample", "--out_dir=out/tiny", *options)


def test_a_model_without_any_tokenizer_says_where_one_was_looked_for(refused, tmp_path):
    save_nanogpt(tmp_path / "ckpt.pt")
    assert "no tokenizer for the model's 101 tokens: data/tiny" in refused("sample", "--init_from=ckpt.pt")
