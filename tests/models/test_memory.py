"""What loading a model takes of a process's memory, by what Linux counts of it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import on_ranks

from flatgpt.models.language_model import LanguageModel
from flatgpt.models.weights import open_pretrained
from flatgpt.training import distributed, setup
from flatgpt.training.device import DeviceConfig
from flatgpt.training.distributed import ParallelConfig

STATUS = Path("/proc/self/status")
pytestmark = pytest.mark.skipif(not STATUS.is_file() or "RssAnon" not in STATUS.read_text(),
                                reason="only Linux tells what memory has no file behind it")


def anonymous_bytes() -> int:
    """Of memory that no file stands behind: the pages of a mapped file do not count."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text())[1])


def with_peak(do: Callable[[], Any]) -> tuple[Any, int]:
    """What `do` returns, and how many bytes more than before were held at a time."""
    before, most, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.0005):
            most = max(most, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = do()
    finally:
        done.set()
        watcher.join()
    return result, max(most, anonymous_bytes()) - before


def load(folder: str) -> float:
    """The most that loading holds, as a multiple of the float32 parameters."""
    model, peak = with_peak(lambda: LanguageModel.from_pretrained(folder))
    return peak / sum(p.nbytes for p in model.parameters())


def start_a_run(folder: str, layout: str) -> float:
    """The same of a rank that begins to train from the folder."""
    where = DeviceConfig(device="cpu", dtype="float32")
    with distributed.init_job(where, ParallelConfig(parallel=layout, timeout_s=60)) as job:
        def build() -> LanguageModel:
            return setup.build_model(lambda: open_pretrained(folder), where, "sdpa", 1, {}, print, job)[0]

        model, peak = with_peak(build)
        return peak / (4 * model.num_params(non_embedding=False))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Two models of about 80 million parameters in bfloat16: one whose layers are transposed in the file, and one whose
    layers are put together from several."""
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_embd=768, n_layer=10, n_head=8, vocab_size=8100, n_positions=64, bos_token_id=0, eos_token_id=0))
    qwen3 = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=8100, hidden_size=768, intermediate_size=2304, num_hidden_layers=10, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=64, tie_word_embeddings=True))
    made = {}
    for name, model in (("gpt2", gpt2), ("qwen3", qwen3)):
        made[name] = str(tmp_path_factory.mktemp(name))
        model.bfloat16().save_pretrained(made[name])
    return made


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_loading_takes_the_memory_of_the_parameters_and_no_copy(folders, name):
    assert 0.5 < on_ranks(1, load, folders[name])[0] < 1.1


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
@pytest.mark.parametrize(("layout", "most"), [("ddp", 1.3), ("fsdp", 0.85)])
def test_a_rank_holds_what_it_trains_and_one_parameter_that_is_read(folders, name, layout, most):
    """Rank 0, which reads for all, as well. The largest parameter is a twelfth of the model, and as much is torch's
    own."""
    assert max(on_ranks(2, start_a_run, folders[name], layout)) < most
