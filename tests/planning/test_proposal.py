"""flatgpt.planning.proposal: its rules against published models, and its short cuts against the long way."""

import pytest

from flatgpt.models.baselines import build_empty
from flatgpt.planning import flops, proposal
from model import GPTConfig

# DeepSeek LLM (arXiv:2401.02954), tables 2 and 3.1: n_layer, n_embd, sequences of 4,096 tokens a step, learning rate; 2
# trillion tokens each
DEEPSEEK = [(30, 4096, 2304, 4.2e-4), (95, 8192, 4608, 3.2e-4)]


@pytest.mark.parametrize(("n_layer", "n_embd", "seqs", "rate"), DEEPSEEK)
def test_batch_and_rate_are_about_those_of_the_models_that_the_law_was_made_for(n_layer, n_embd, seqs, rate):
    compute = 2e12 * (72 * n_layer * n_embd**2 + 12 * n_layer * n_embd * 4096)  # equation 2 there
    assert proposal.batch_tokens(compute) == pytest.approx(4096 * seqs, rel=0.1)
    assert proposal.learning_rate(compute) == pytest.approx(rate, rel=0.03)


@pytest.mark.parametrize("options", [
    {}, {"pos": "rope", "norm": "rmsnorm", "mlp": "swiglu"}, {"tie_embeddings": False, "bias": True},
    {"sliding_window": 64, "window_pattern": "SSL"}])
@pytest.mark.parametrize("depth", [1, 2, 5, 7])
def test_the_size_of_any_depth_is_that_of_the_model(options, depth):
    shape = proposal.shape_of_depth(depth, GPTConfig(vocab_size=300, block_size=128, **options))
    model = build_empty(shape)
    assert proposal.size_of(shape) == (
        model.num_params(non_embedding=False), flops.flops_per_token(model),
        flops.flops_per_token(model) - flops.flops_by_part(model)["head"])


def test_a_depth_of_12_is_gpt_2_small():
    shape = proposal.shape_of_depth(12, GPTConfig())
    assert (shape.n_layer, shape.n_head, shape.n_embd) == (12, 12, 768)


@pytest.mark.parametrize("compute", [1e15, 1e17, 1e19, 1e21, 1e23])
def test_the_depth_for_a_compute_spends_it_with_20_tokens_a_parameter(compute):
    shape = GPTConfig()

    def needed(depth: int) -> float:
        size = proposal.size_of(proposal.shape_of_depth(depth, shape))
        return 20 * size.params * size.flops

    depth = proposal.depth_for(compute, shape, lambda params: 20 * params)
    ratios = {d: max(needed(d) / compute, compute / needed(d)) for d in range(max(1, depth - 1), depth + 2)}
    assert min(ratios, key=ratios.get) == depth


def test_chinchilla_itself_is_about_what_its_compute_buys():
    """70 billion parameters and 1.4 trillion tokens, for 5.76e23 operations (arXiv:2203.15556, section 3)."""
    shape = GPTConfig(vocab_size=32000, block_size=2048)
    depth = proposal.depth_for(5.76e23, shape, lambda params: 20 * params)
    params = proposal.size_of(proposal.shape_of_depth(depth, shape)).params
    assert params == pytest.approx(70e9, rel=0.1)


def test_too_little_compute_is_an_error():
    with pytest.raises(ValueError, match="too few: one block of 64 channels takes"):
        proposal.depth_for(1e6, GPTConfig(), lambda params: 20 * params)


@pytest.mark.parametrize("world_size", [1, 3, 8, 16])
def test_a_proposed_batch_is_shared_evenly_and_as_large_as_the_law_says_within_a_factor(world_size):
    settings = proposal.propose(12, GPTConfig(), 2.5e9, world_size, "", {})
    total, steps = settings["total_batch_size"].value, settings["max_iters"].value
    assert total % (1024 * world_size) == 0
    size = proposal.size_of(proposal.shape_of_depth(12, GPTConfig()))
    assert 0.7 < total / proposal.batch_tokens(2.5e9 * size.flops_without_head) < 1.42
    assert total * steps == pytest.approx(2.5e9, rel=0.01)
    assert settings["lr_decay_iters"].value == steps > settings["warmup_iters"].value


def test_a_written_config_reads_as_it_was_meant(tmp_path):
    docstring = 'With "quotes", """three""" and a \\ in it'
    text = proposal.as_config(docstring, {"n_layer": proposal.Setting(2, "two"), "pos": proposal.Setting("rope", "")})
    names: dict = {}
    exec(compile(text, "config.py", "exec"), names)
    assert names["__doc__"] == docstring
    assert (names["n_layer"], names["pos"]) == (2, "rope")
    assert "n_layer = 2  # two\n" in text
