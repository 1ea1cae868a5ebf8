"""sample.py: every way to name a model and a prompt, and what comes out."""

import ast
import io
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEXT, TINY_RUN, run_process
from test_train import headerless
from test_weights import make_hub_cache, save_nanogpt

from flatgpt.data.shards import open_dataset
from flatgpt.data.tokenizer import ByteTokenizer, load_tokenizer
from flatgpt.models.sampling import Sampler
from model import GPT

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
               "--top_p=0.9", "--min_p=0.02", "--repetition_penalty=1.1", "--temperature=0.7", "--seed=3",
               "--device=cpu")
    texts = samples(cli("sample", *options))
    model, tokenizer = GPT.from_pretrained("out/tiny"), load_tokenizer("out/tiny/checkpoints/best")
    torch.manual_seed(3)
    ids = torch.from_numpy(tokenizer.encode("the quick").astype("int64"))[None]
    assert texts == [tokenizer.decode(model.generate(ids, 40, 0.7, 5, top_p=0.9, min_p=0.02,
                                                     repetition_penalty=1.1)[0]) for _ in range(2)]
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
    (["--prompt=Ω and ∂"], "the tokenizer has no token for 'Ω' '∂': its"),
    (["--prompt=FILE:none.txt"], "none.txt"),
    (["--prompt=FILE:out/tiny/checkpoints/best/model.safetensors"], "model.safetensors is not UTF-8 text"),
    (["--prompt=caf\udce9"], "the prompt is not valid text"),
    (["--seed=99999999999999999999"], "is not a whole number that can be"),
    (["--temperature=-1", "--top_p=0"], "temperature=-1.0 must be 0 or more; top_p=0.0 must be above 0"),
    (["--min_p=2", "--repetition_penalty=0", "--show_probs=-1"], "show_probs=-1 must be 0 (none) or more; min_p=2.0 "
     "must be from 0 (all tokens) to 1; repetition_penalty=0.0 must be above 0"),
    (["--split=dev"], "split='dev' is not one of train, val, test"),
    (["--split=test"], "data/tiny has no test split: it has train and val"),
    (["--split=val", "--prompt=a"], "--split=val takes its prompts from the data: leave out --prompt"),
    (["--split=val", "--prompt_tokens=-1"], "prompt_tokens=-1 must be 0 (half of block_size) or more"),
    (["--split=val", "--max_new_tokens=5000"], "in its longest shard, but a prompt with its continuation takes 5008"),
    (["--split=val", "--dataset=other"], "no data set 'other' in data/; make it with"),
    (["--dataset=tiny"], "--dataset and --prompt_tokens are for --split=train, val or test: leave out --dataset"),
    (["--interactive", "--start=a", "--split=val"], "continues each once: leave out --prompt --split"),
    (["--interactive", "--num_samples=2"], "leave out --num_samples"),
    (["--max_tokens=3"], "did you mean 'max_new_tokens'?"),
    (["--init_from=out/none"], "could not get out/none"),
    (["--out_dir=data"], "data holds no model"),
])
def test_bad_input_is_one_line(refused, trained, monkeypatch, options, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert message in refused("sample", "--out_dir=out/tiny", *options)


def test_a_run_folder_without_a_model_is_told_from_one_that_is_not_there(refused, tmp_path):
    """And neither is looked for on the hub."""
    for script in ("sample", "eval"):
        assert "there is no run folder out/nowhere" in refused(script, "--out_dir=out/nowhere")
    (tmp_path / "out" / "begun" / "checkpoints").mkdir(parents=True)
    assert "out/begun holds a run that has saved no checkpoint yet" in refused("sample", "--out_dir=out/begun")


def test_a_checkpoint_that_a_run_deletes_meanwhile_is_called_that(refused, trained, monkeypatch):
    folder = Path("out/tiny/checkpoints/best").resolve()

    def load_late(source, **_overrides):
        shutil.rmtree(folder)
        return GPT.from_pretrained(source)

    monkeypatch.setattr("flatgpt.models.inference.load_model", load_late)
    line = refused("sample", "--out_dir=out/tiny")
    assert f"the run that is still training has deleted {folder} in the meantime" in line


def test_a_model_without_any_tokenizer_says_where_one_was_looked_for(refused, tmp_path):
    save_nanogpt(tmp_path / "ckpt.pt")
    assert "no tokenizer for the model's 101 tokens, so they cannot be read as text: data/tiny has" in refused(
        "sample", "--init_from=ckpt.pt")


@pytest.mark.parametrize(("kind", "models"), [
    ("char", ["bigram", "mlp", "rnn", "lstm", "gru"]), ("byte", ["rnn"]), ("bpe", ["bigram"]), ("gpt2", ["mlp"])])
def test_every_tokenizer_and_every_model_train_and_sample(cli, request, tmp_path, kind, models):
    if kind == "gpt2":
        request.getfixturevalue("gpt2_tokenizer")
    Path("text.txt").write_text(TEXT)
    made = cli("prepare_data", "--input=text.txt", "--name=tiny", f"--tokenizer={kind}", "--vocab_size=300")
    assert (made.code, cli("train", *TINY_RUN, "--max_iters=1").code) == (0, 0)
    for model in models:
        assert cli("train", *TINY_RUN, "--max_iters=1", f"--model={model}", f"--out_dir=out/{model}").code == 0
        out = cli("sample", f"--out_dir=out/{model}", "--prompt=the quick", "--num_samples=1", "--max_new_tokens=5")
        assert out.code == 0, out.err
        assert "the quick" in out.out
    for options in (("--prompt=the quick",), ("--split=train",)):
        out = cli("sample", "--out_dir=out/tiny", "--num_samples=1", "--max_new_tokens=5", "--show_probs=3", *options)
        assert out.code == 0, out.err
        assert out.out.count("> ") == 5


# Prompts from the data


def compared(out: str, split: str, num_samples: int, prompt_tokens: int, new_tokens: int) -> list[tuple[str, ...]]:
    """Prompt, true continuation and model's continuation of each sample."""
    found = re.findall(r"=== (\d+) of (\d+), (\w+) split: prompt, (\d+) tokens ===\n(.*?)\n=== true continuation, "
                       r"(\d+) tokens ===\n(.*?)\n=== model's continuation, (\d+) tokens ===\n(.*?)\n-{15}\n", out,
                       re.DOTALL)
    assert [(first, *rest) for first, *rest in ((int(n), int(of), s, int(p), int(t), int(m)) for
            n, of, s, p, _, t, _, m, _ in found)] == [
        (n, num_samples, split, prompt_tokens, new_tokens, new_tokens) for n in range(1, num_samples + 1)]
    return [(prompt, truth, written) for _, _, _, _, prompt, _, truth, _, written in found]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_prompts_from_a_split_stand_beside_how_it_goes_on_and_what_the_model_writes(cli, split):
    Path("tiny.txt").write_text(TEXT)
    cli("prepare_data", "--input=tiny.txt", "--name=tiny", "--tokenizer=char", "--test_fraction=0.1")
    assert cli("train", *TINY_RUN).code == 0
    options = ("--out_dir=out/tiny", f"--split={split}", "--num_samples=3", "--max_new_tokens=30", "--temperature=0",
               "--device=cpu", "--dtype=float32")
    first = cli("sample", *options, "--prompt_tokens=11")
    model, tokenizer = GPT.from_pretrained("out/tiny"), load_tokenizer("data/tiny")
    held = tokenizer.decode(open_dataset("tiny").splits[split].shards[0])
    rows = compared(first.out, split, 3, 11, 30)
    assert len({prompt for prompt, _, _ in rows}) == 3
    for prompt, truth, written in rows:
        assert prompt + truth in held
        ids = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))[None]
        assert prompt + written == tokenizer.decode(model.generate(ids, 30, temperature=0)[0])
    again, other = (compared(cli("sample", *options, "--prompt_tokens=11", f"--seed={seed}").out, split, 3, 11, 30)
                    for seed in (1337, 1))
    assert again == rows
    assert {prompt for prompt, _, _ in other} != {prompt for prompt, _, _ in rows}
    assert compared(cli("sample", *options).out, split, 3, 8, 30)  # half of block_size


def test_the_data_is_that_of_the_run_of_the_checkpoint_or_nanogpts_or_said(cli, refused, trained, tmp_path):
    options = ("--split=val", "--num_samples=2", "--max_new_tokens=20", "--prompt_tokens=8")
    rows = compared(cli("sample", "--out_dir=out/tiny", *options).out, "val", 2, 8, 20)
    assert compared(cli("sample", "--init_from=out/tiny/checkpoints/latest", *options).out, "val", 2, 8, 20) == rows
    assert compared(cli("sample", "--out_dir=out/tiny", *options, "--dataset=data/tiny").out, "val", 2, 8, 20) == rows
    shutil.copytree("out/tiny/checkpoints/latest", "bare", ignore=lambda *_: ["training", "SHA256SUMS"])
    assert "does not say what data it was trained on: add --dataset=NAME" in refused(
        "sample", "--init_from=bare", *options)
    headerless(tmp_path / "data" / "chars", meta=True)
    assert "chars: made with another tokenizer than the model's" in refused(
        "sample", "--out_dir=out/tiny", *options, "--dataset=chars")
    (tmp_path / "data" / "tiny").rename(tmp_path / "data" / "ours")
    (tmp_path / "data" / "chars").rename(tmp_path / "data" / "tiny")
    save_nanogpt(tmp_path / "ckpt.pt", vocab_size=17)
    assert compared(cli("sample", "--init_from=ckpt.pt", *options).out, "val", 2, 8, 20)


def test_a_run_is_sampled_and_measured_in_the_numbers_that_it_recorded(cli, tiny_data, monkeypatch):
    """Whatever a trial would say here and now: there is none."""
    options = [option for option in TINY_RUN if not option.startswith("--dtype")]
    assert cli("train", *options, "--dtype=bfloat16", "--attention=sdpa").code == 0
    monkeypatch.setattr("flatgpt.training.device.time_in_turn", None)
    for script, more in (("sample", ("--num_samples=1", "--max_new_tokens=3")), ("eval", ())):
        for model in ("--out_dir=out/tiny", "--init_from=out/tiny/checkpoints/latest"):
            assert "on cpu, torch.bfloat16" in cli(script, model, *more).out
            assert "on cpu, torch.float32" in cli(script, model, *more, "--dtype=float32").out


# Candidates


def test_show_probs_shows_what_each_token_was_drawn_from_and_changes_no_sample(cli, trained):
    options = ("--out_dir=out/tiny", "--prompt=the quick", "--num_samples=2", "--max_new_tokens=4", "--top_k=6",
               "--top_p=0.8", "--min_p=0.1", "--repetition_penalty=1.3", "--device=cpu", "--dtype=float32")
    plain, shown = samples(cli("sample", *options)), samples(cli("sample", *options, "--show_probs=3"))
    model, tokenizer = GPT.from_pretrained("out/tiny"), load_tokenizer("out/tiny/checkpoints/best")
    for text, with_tables in zip(plain, shown):
        *tables, end = with_tables.split("\n\n")
        assert end == text
        assert len(tables) == 4
        for i, block in enumerate(tables, len("the quick")):
            title, head, *rows = block.splitlines()
            assert title == f"token {i - len('the quick') + 1}: {text[i]!r}"
            assert head.split() == ["model", "repetition_penalty", "temperature", "top_k", "top_p", "min_p"]
            assert {len(row) for row in rows} == {len(head)}
            seen = torch.from_numpy(tokenizer.encode(text[:i]).astype("int64"))[None]
            with torch.no_grad():
                stages = Sampler(0.8, 6, 0.8, 0.1, 1.3).stages(model.eval().next_token_logits(seen, None), seen)
                probs = torch.cat([stage.probs() for stage in stages])
            drawn = []
            for row in rows[:-1]:
                mark, name, cells = re.fullmatch(r"(.) ('.+?')  (.*)", row).groups()
                column = probs[:, tokenizer.encode(ast.literal_eval(name))[0]].tolist()
                assert [float(cell.strip("-%") or 0) / 100 for cell in cells.split()] == pytest.approx(column, abs=1e-4)
                assert [cell == "-" for cell in cells.split()] == [share == 0 for share in column]
                drawn += [name] if mark == ">" else []
            assert drawn == [repr(text[i])]


# Conversation


def say(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_lines_that_are_typed_are_continued_one_by_one(cli, trained, monkeypatch):
    options = ("--out_dir=out/tiny", "--max_new_tokens=12", "--temperature=0")
    wanted = [samples(cli("sample", *options, "--num_samples=1", f"--prompt={prompt}"))[0]
              for prompt in ("the", "", "quick brown fox, 16 jumps", "a")]
    say(monkeypatch, b"the\n\ncaf\xe9\nquick brown fox, 16 jumps\n\xce\xa9\r\na")
    result = cli("sample", *options, "--interactive=True")
    assert result.code == 0
    assert result.out.partition("\n")[2] == "".join(text + LINE for text in wanted)
    assert result.err.splitlines() == [
        "error: the prompt is not valid text: the terminal did not send it as UTF-8",
        "error: the tokenizer has no token for 'Ω': its 43 characters are those of the text it was made from"]


def test_a_seed_repeats_a_conversation(cli, trained, monkeypatch):
    said = []
    for seed in (1, 1, 2):
        say(monkeypatch, b"the\nthe\n")
        said.append(cli("sample", "--out_dir=out/tiny", "--max_new_tokens=20", "--interactive", f"--seed={seed}").out)
    assert said[0] == said[1] != said[2]
    first, second, _ = said[0].partition("\n")[2].split(LINE)
    assert first != second


def test_ctrl_c_ends_a_conversation_with_status_0(trained):
    command = [sys.executable, ROOT / "sample.py", "--out_dir=out/tiny", "--max_new_tokens=5", "--interactive"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        process.stdin.write("the\n")
        process.stdin.flush()
        assert "parameters" in process.stdout.readline()
        while "-----" not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
