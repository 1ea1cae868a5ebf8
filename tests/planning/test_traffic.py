"""traffic.py by hand. (tests/training/test_parallel.py compares it with what real steps send.)"""

import torch

from flatgpt.models.baselines import build_empty
from flatgpt.planning.traffic import ddp_buckets, padded_numel, step_traffic
from model import GPTConfig


def test_parts_of_equal_numbers_of_rows_are_padded():
    matrix, vector = torch.nn.Parameter(torch.empty(768, 10)), torch.nn.Parameter(torch.empty(5))
    assert padded_numel([matrix], 8) == 7680
    assert padded_numel([matrix], 500) == 2 * 500 * 10
    assert padded_numel([matrix, vector], 4096) == 4096 * 10 + 4096


def test_ddps_last_bucket_has_the_token_table_and_waits_for_all_other_gradients():
    model = build_empty(GPTConfig())
    buckets = ddp_buckets(model)
    assert sum(buckets) == 4 * sum(p.numel() for p in model.parameters())
    assert buckets[-1] >= 4 * 50304 * 768
    assert all(size >= 25 * 2**20 for size in buckets[1:-1])


def test_a_model_without_blocks_is_gathered_once_in_each_micro_batch():
    found = step_traffic(build_empty(GPTConfig(model="bigram", vocab_size=100)), "fsdp", 2, 2, 3)
    table = 4 * 128 * 128
    assert [(each.kind, each.part, each.count, each.num_bytes) for each in found] == [
        ("all-gather", "the rest", 3, table), ("reduce-scatter", "the rest", 1, table),
        ("all-reduce", "the norm", 1, 4)]
