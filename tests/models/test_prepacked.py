"""prepacked.py against the layers that it replaces."""

import weakref

import pytest
import torch
import torch.nn as nn

from flatgpt.models.baselines import build
from flatgpt.models.language_model import LanguageModel
from flatgpt.models.prepacked import PrepackedLinear, prepack
from flatgpt.models.sampling import Sampler
from model import GPTConfig

QWEN3 = {"pos": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "n_kv_head": 1, "tie_embeddings": False}
MODELS = [{"bias": True}, {"mlp": "relu2", "norm_position": "post"}, QWEN3, {"qkv_bias": True, "sliding_window": 5},
          {"model": "mlp"}, {"model": "mlp", "tie_embeddings": False}, {"model": "lstm"}]


def make_model(**shape) -> LanguageModel:
    torch.manual_seed(0)
    small = {"block_size": 16, "vocab_size": 37, "n_layer": 2, "n_head": 2, "n_embd": 16}
    return build(GPTConfig(**small | shape)).eval()


def tokens(model: LanguageModel, idx: torch.Tensor) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [token.tolist() for token in model.stream(idx, 24, Sampler(0.8, 20, generator=generator))]


@pytest.mark.parametrize("shape", MODELS)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_prepacked_model_has_the_logits_and_the_samples_of_the_plain_one(shape, num_rows):
    plain, model = (make_model(**shape) for _ in range(2))
    prepack(model)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert isinstance(model.lm_head, PrepackedLinear)
    idx = torch.randint(37, (num_rows, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], plain(idx)[0])
    assert tokens(model, idx) == tokens(plain, idx)


@pytest.mark.parametrize("shape", MODELS)
def test_prepacked_in_bfloat16(shape):
    """A processor without kernels for it keeps its layers, and a test there compares them with themselves."""
    plain, model = (make_model(**shape).bfloat16() for _ in range(2))
    prepack(model)
    idx = torch.randint(37, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], plain(idx)[0], atol=1e-2, rtol=2e-2)


def test_the_matrices_that_were_replaced_are_let_go():
    model = make_model(tie_embeddings=False)
    replaced = [weakref.ref(layer.weight) for layer in model.modules() if isinstance(layer, nn.Linear)]
    prepack(model)
    assert len(replaced) == 9
    assert not any(weight() is not None for weight in replaced)


def test_models_without_kernels_stay_as_they_are():
    for model in (make_model(model="bigram"), make_model().double(), make_model().to("meta")):
        names = [type(module) for module in model.modules()]
        prepack(model)
        assert [type(module) for module in model.modules()] == names
