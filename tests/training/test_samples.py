"""Continuations of one's own prompts while a run is trained."""

from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, files_of, records_of

from flatgpt.data.tokenizer import load_tokenizer
from flatgpt.training.distributed import Job
from flatgpt.training.samples import Prompt, continue_prompt
from model import GPT

PROMPTS = ["Line 7: ", "the quick"]
HERE = Job(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture
def prompts(tmp_path) -> str:
    """The option that names a file of PROMPTS, with a blank line and Windows's line ends."""
    (tmp_path / "prompts.txt").write_bytes("\r\n\r\n".join([*PROMPTS, ""]).encode())
    return "--sample_prompts=prompts.txt"


def test_each_evaluation_continues_each_prompt_and_training_ends_in_the_same_bytes(cli, tiny_data, prompts):
    run = (*TINY_RUN, "--dropout=0.1")
    assert cli("train", *run, "--out_dir=out/silent").code == 0
    assert cli("train", *run, prompts, "--sample_tokens=20", "--sample_interval=2").code == 0
    for file in ("model.safetensors", "training/optimizer.safetensors"):
        ours, theirs = (Path("out") / name / "checkpoints/latest" / file for name in ("tiny", "silent"))
        assert ours.read_bytes() == theirs.read_bytes()
    written = {record["step"]: record for record in records_of("out/tiny") if "samples" in record}
    assert {step: record.get("prompts") for step, record in written.items()} == {
        0: PROMPTS, 2: None, 3: PROMPTS, 4: None, 6: ["", "", *PROMPTS]}
    model, tokenizer = GPT.from_pretrained("out/tiny"), load_tokenizer("out/tiny/checkpoints/latest")
    for text, prompt in zip(written[6]["samples"][2:], PROMPTS):
        assert text.startswith(prompt)
        assert len(text) == len(prompt) + 20
        alone = Prompt(prompt, tokenizer.encode(prompt).tolist())
        assert continue_prompt(alone, model, tokenizer, 20, HERE) == [text]


@pytest.mark.parametrize(("content", "message"), [
    (None, "prompts.txt"),
    (b"", "prompts.txt holds no prompt"),
    (b" \n\n", "prompts.txt holds no prompt"),
    (b"\xff\xfe\xfd", "prompts.txt is not UTF-8 text"),
    ("the\n\nWhat is 日本?".encode(), "prompts.txt:3 cannot be continued"),
    (b"the quick brown fox", "prompts.txt:1 has 19 tokens, but the model reads 16"),
])
def test_prompts_that_cannot_be_continued_end_a_run_before_it_begins(refused, tiny_data, tmp_path, content, message):
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    before = files_of(tmp_path)
    assert message in refused("train", *TINY_RUN, "--sample_prompts=prompts.txt")
    assert files_of(tmp_path) == before


def test_prompts_need_a_tokenizer(refused, tiny_data, prompts):
    (tiny_data / "tokenizer.json").unlink()
    assert "sample_prompts=prompts.txt needs a tokenizer" in refused("train", *TINY_RUN, prompts)
