"""flatgpt.planning.flops: parameters and operations against counts by hand, and against published tables."""

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from flatgpt.models.baselines import build, build_empty
from flatgpt.planning.flops import flops_by_part, flops_per_token, num_non_embedding, params_by_part
from model import GPT, GPTConfig

LLAMA = {"pos": "rope", "norm": "rmsnorm", "mlp": "swiglu", "tie_embeddings": False, "vocab_size": 128256,
         "block_size": 8192, "n_kv_head": 8}
GPT2 = {"bias": True, "mlp": "gelu_tanh"}
# OpenAI's GPT-2, whose four sizes are published as 124M, 355M, 774M and 1.5B; the numbers are those of their files
GPT2_SIZES = [(12, 12, 768, 124_439_808), (24, 16, 1024, 354_823_168), (36, 20, 1280, 774_030_080),
              (48, 25, 1600, 1_557_611_200)]
# GPT-3 (arXiv:2005.14165): n_layer, n_head, channels a head from table 2.1; millions of parameters, and operations for
# 300 billion tokens, from table D.1. (In table 2.1 the 1.3B has 24 heads, which does not give its d_model of 2048.)
GPT3 = [(12, 12, 64, 125, 2.25e20), (24, 16, 64, 356, 6.41e20), (24, 16, 96, 760, 1.37e21),
        (24, 16, 128, 1320, 2.38e21), (32, 32, 80, 2650, 4.77e21), (32, 32, 128, 6660, 1.20e22),
        (40, 40, 128, 12850, 2.31e22), (96, 96, 128, 174600, 3.14e23)]
# Llama 3 (arXiv:2407.21783, table 3): n_layer, n_head, n_embd, mlp_hidden; the numbers are those of the hub's files
LLAMA3 = [(32, 32, 4096, 14336, 8_030_261_248), (80, 64, 8192, 28672, 70_553_706_496),
          (126, 128, 16384, 53248, 405_853_388_800)]


def empty(**options) -> GPT:
    return build_empty(GPTConfig(**options))


@pytest.mark.parametrize(("n_layer", "n_head", "n_embd", "published"), GPT2_SIZES)
def test_gpt2s_parameters_are_those_of_its_files_and_of_a_count_by_hand(n_layer, n_head, n_embd, published):
    model = empty(n_layer=n_layer, n_head=n_head, n_embd=n_embd, **GPT2)
    by_hand = {
        "token table": 50257 * n_embd, "position table": 1024 * n_embd,
        "attention": n_layer * (4 * n_embd**2 + 4 * n_embd), "MLP": n_layer * (8 * n_embd**2 + 5 * n_embd),
        "norms": (2 * n_layer + 1) * 2 * n_embd}
    assert params_by_part(model) == by_hand
    assert sum(by_hand.values()) == published
    assert num_non_embedding(model) == published - 50257 * n_embd - 1024 * n_embd
    work = flops_by_part(model)
    assert work["head"] == 6 * 50257 * n_embd
    assert work["MLP"] == 6 * by_hand["MLP"]
    assert work["scores"] == 12 * n_layer * n_embd * 1024
    assert flops_per_token(model) == 6 * (published - 1024 * n_embd) + 12 * n_layer * n_embd * 1024


@pytest.mark.parametrize(("n_layer", "n_head", "n_embd", "hidden", "published"), LLAMA3)
def test_llama_3s_parameters_are_those_of_its_files_and_of_a_count_by_hand(n_layer, n_head, n_embd, hidden, published):
    model = empty(n_layer=n_layer, n_head=n_head, n_embd=n_embd, mlp_hidden=hidden, **LLAMA)
    kv = 8 * n_embd // n_head
    by_hand = {
        "token table": 128256 * n_embd, "head": 128256 * n_embd, "attention": n_layer * 2 * n_embd * (n_embd + kv),
        "MLP": n_layer * 3 * n_embd * hidden, "norms": (2 * n_layer + 1) * n_embd}
    assert params_by_part(model) == by_hand
    assert sum(by_hand.values()) == published
    matrices = published - 128256 * n_embd  # the table is looked up
    assert flops_per_token(model) == 6 * matrices + 12 * n_layer * n_embd * 8192


def test_llama_3_405bs_compute_is_the_published_one():
    n_layer, n_head, n_embd, hidden, _ = LLAMA3[-1]
    work = flops_by_part(empty(n_layer=n_layer, n_head=n_head, n_embd=n_embd, mlp_hidden=hidden, **LLAMA))
    assert 15.6e12 * (sum(work.values()) - work["scores"]) == pytest.approx(3.8e25, abs=0.05e25)  # section 3.2


@pytest.mark.parametrize(("n_layer", "n_head", "head_dim", "millions", "flops"), GPT3)
def test_gpt_3s_table_to_its_rounding(n_layer, n_head, head_dim, millions, flops):
    model = empty(n_layer=n_layer, n_head=n_head, n_embd=n_head * head_dim, block_size=2048, **GPT2)
    rounded_to = 1e6 if millions < 1000 else 10e6 if millions < 100_000 else 100e6
    assert model.num_params(non_embedding=False) == pytest.approx(1e6 * millions, abs=rounded_to / 2)
    work = flops_by_part(model)
    without_scores = sum(work.values()) - work["scores"]  # the table has 6 a parameter, those of positions among them
    assert 300e9 * (without_scores + 6 * params_by_part(model)["position table"]) == pytest.approx(flops, rel=0.005)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_parameters_are_what_transformers_counts(kind):
    if kind == "gpt2":
        theirs = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=24, n_layer=2, n_head=3))
        ours = empty(vocab_size=300, block_size=32, n_embd=24, n_layer=2, n_head=3, **GPT2)
    else:
        theirs = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                                              num_attention_heads=4, num_key_value_heads=2))
        ours = empty(**LLAMA | {"vocab_size": 300, "block_size": 32, "n_embd": 24, "n_layer": 2, "n_head": 4,
                                "n_kv_head": 2, "mlp_hidden": 40})
    assert sum(params_by_part(ours).values()) == theirs.num_parameters()


def test_flops_are_6n_plus_12lhqt():
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8))
    params = 11 * 8 + 8 + 8 + 8 + 12 * 8 * 8  # tokens, three norms, and the block's four matrices
    assert flops_per_token(model) == 6 * params + 12 * 1 * 2 * 4 * 8
    windowed = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=3, n_head=2, n_embd=8, head_dim=6, pos="none",
                             sliding_window=5, window_pattern="SL"))
    params = 11 * 8 + 8 + 3 * (2 * 8 + 4 * 8 * 12 + 8 * 8 * 8)  # q, k, v and the output have 2 heads of 6 channels
    assert flops_per_token(windowed) == 6 * params + 12 * 2 * 6 * (5 + 8 + 5)  # as many keys a layer
    lstm = build(GPTConfig(model="lstm", block_size=8, vocab_size=11, n_layer=1, n_embd=8))
    assert flops_per_token(lstm) == 6 * (11 * 8 + 2 * 4 * 8 * 8 + 8)  # it has no attention
    bigram = build(GPTConfig(model="bigram", block_size=8, vocab_size=128))
    assert flops_per_token(bigram) == 6 * 128 * 128
