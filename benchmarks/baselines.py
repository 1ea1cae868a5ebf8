"""What people would use instead of flatGPT's scripts, for bench.py, which runs each way in a process of its own."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.scripts import Figures
from flatgpt.data import sources
from flatgpt.data.loader import plan_batches
from flatgpt.data.records import text_of
from flatgpt.data.shards import open_dataset
from flatgpt.data.sources import SourceConfig
from flatgpt.training.config import TrainConfig
from flatgpt.training.device import pick_device
from flatgpt.training.metrics import peak_memory_gb
from model import GPT, GPTConfig

PROMPT_IDS = list(range(100, 116))
NEW_TOKENS = 128


def train_plainly(config: TrainConfig, steps: int) -> Figures:
    """What one would write first, and what nanoGPT does, with the same model and number of tokens a step: whole logits,
    random windows, a read of the loss at every step, evaluations of both splits on random batches, each followed by a
    torch.save. On a CPU it is float32, eager and unfused AdamW; on CUDA bfloat16, compiled as a whole, fused AdamW."""
    torch.manual_seed(config.seed)
    dataset, device = open_dataset(config.data.dataset), pick_device(config.where.device)
    on_cuda = device.type == "cuda"
    model = GPT(GPTConfig(**asdict(config.model) | {"vocab_size": dataset.vocab_size})).to(device)
    plan = plan_batches(config.data, {}, config.model.block_size, 1)
    decay = [{"params": [p for p in model.parameters() if (p.dim() > 1) == is_matrix], "weight_decay": weight_decay}
             for is_matrix, weight_decay in ((True, config.optim.weight_decay), (False, 0.0))]
    optimizer = torch.optim.AdamW(decay, config.optim.learning_rate, (config.optim.beta1, config.optim.beta2),
                                  fused=on_cuda)
    torch.set_float32_matmul_precision("high" if on_cuda else "highest")
    loss_on = {name: _loss_on_random_windows(model, split.shards[0], plan.micro_batch)
               for name, split in dataset.splits.items()}

    began, step_seconds = time.perf_counter(), []
    for step in range(steps + 1):
        if step % config.eval_interval == 0 or step == steps:
            with torch.no_grad():
                for split in ("train", "val"):
                    [loss_on[split]().item() for _ in range(config.eval_iters)]
            with tempfile.TemporaryDirectory() as folder:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{folder}/ckpt.pt")
        if step == steps:
            break
        step_began = time.perf_counter()
        for _ in range(plan.accumulation_steps):
            loss = loss_on["train"]() / plan.accumulation_steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        step_seconds.append(time.perf_counter() - step_began)
    step_s = statistics.median(step_seconds[1:] or step_seconds)
    return {"tokens_per_sec": plan.seqs_per_step * config.model.block_size / step_s, "ms_per_step": 1000 * step_s,
            "run_s": time.perf_counter() - began, "memory_gb": peak_memory_gb(device)}


def _loss_on_random_windows(model: GPT, tokens: np.ndarray, batch_size: int) -> Callable[[], torch.Tensor]:
    device, size = model.wte.weight.device, model.config.block_size
    on_cuda = device.type == "cuda"

    def cross_entropy(rows: torch.Tensor) -> torch.Tensor:
        logits = F.linear(model.hidden_states(rows[:, :-1]), model.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    if on_cuda:
        cross_entropy = torch.compile(cross_entropy)

    def loss() -> torch.Tensor:
        starts = torch.randint(len(tokens) - size, (batch_size,))
        rows = torch.stack([torch.from_numpy(tokens[i:i + size + 1].astype(np.int64)) for i in starts])
        rows = rows.pin_memory().to(device, non_blocking=True) if on_cuda else rows
        with torch.autocast("cuda", torch.bfloat16, enabled=on_cuda):
            return cross_entropy(rows)

    return loss


# Sampling, from a folder with GPT-2 small


def sample_uncached(folder: str, num_rows: int) -> Figures:
    """nanoGPT's way: every position again for every token, the logits' top 200, multinomial; bfloat16 on CUDA."""
    device = pick_device("auto")
    model, idx = GPT.from_pretrained(folder).to(device).eval(), torch.tensor([PROMPT_IDS] * num_rows, device=device)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        for new_tokens in (8, NEW_TOKENS):  # the first to warm up
            began = time.perf_counter()
            for _ in range(new_tokens):
                logits = model(idx)[0][:, -1] / 0.8
                logits[logits < logits.topk(200).values[:, -1:]] = -float("inf")
                idx = torch.cat([idx, torch.multinomial(logits.softmax(-1), 1)], dim=1)
            idx[-1, -1].item()
            seconds = time.perf_counter() - began
    return {"tokens_per_sec": num_rows * NEW_TOKENS / seconds}


def sample_with_transformers(folder: str) -> Figures:
    """transformers' `generate` with its cache, in float32."""
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    began = time.perf_counter()
    model.generate(torch.tensor([PROMPT_IDS]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=True,
                   temperature=0.8, top_k=200, pad_token_id=0)
    return {"tokens_per_sec": NEW_TOKENS / (time.perf_counter() - began)}


# Preparing data


def corpus() -> Iterator[str]:
    """The texts of every .py file of this Python, as prepare_data.py reads them."""
    parts = sources.find_parts(SourceConfig(dataset="python_source"))
    return (text_of(record, "")[0] for record in itertools.chain.from_iterable(part.read() for part in parts))


def encode_in_pool() -> float:
    """Seconds of a bare multiprocessing.Pool that encodes every text with tiktoken and throws the tokens away."""
    began = time.perf_counter()
    with multiprocessing.Pool() as pool:
        sum(pool.imap_unordered(_count_tokens, corpus(), chunksize=64))
    return time.perf_counter() - began


def _count_tokens(text: str) -> int:
    import tiktoken

    return len(tiktoken.get_encoding("gpt2").encode_ordinary(text))  # tiktoken keeps what it has loaded


def prepare_plainly(folder: str) -> float:
    """Seconds of nanoGPT's way: a data set of texts, split, mapped over all cores, written to a memory-mapped file."""
    began = time.perf_counter()
    os.environ["HF_HOME"] = tempfile.mkdtemp(dir=folder)
    import datasets
    import tiktoken

    datasets.disable_progress_bars()
    encoding = tiktoken.get_encoding("gpt2")

    def tokenize(row: dict) -> dict:
        ids = encoding.encode_ordinary(row["text"]) + [encoding.eot_token]
        return {"ids": ids, "len": len(ids)}

    texts = datasets.Dataset.from_dict({"text": list(corpus())}).train_test_split(test_size=0.01, seed=1)
    for name, rows in texts.items():
        rows = rows.map(tokenize, remove_columns=["text"], num_proc=os.cpu_count())
        tokens = np.memmap(f"{folder}/{name}.bin", dtype=np.uint16, mode="w+", shape=(sum(rows["len"]),))
        num_parts, end = min(1024, len(rows)), 0
        for part in range(num_parts):
            batch = rows.shard(num_shards=num_parts, index=part, contiguous=True).with_format("numpy")
            ids = np.concatenate(batch["ids"])
            tokens[end:end + len(ids)] = ids
            end += len(ids)
        tokens.flush()
    return time.perf_counter() - began
