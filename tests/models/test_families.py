"""families.py against transformers: what it writes we read, what we write it reads, and both write the same text."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TEXT
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from flatgpt.data.hf_tokenizer import Tokenizer as ModelTokenizer
from flatgpt.data.tokenizer import train_bpe
from flatgpt.models import weights
from flatgpt.models.baselines import build_empty
from flatgpt.models.families import FAMILIES, family_of
from flatgpt.models.weights import save_tensors
from model import GPT, GPTConfig

SIZES = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
         "num_attention_heads": 4, "max_position_embeddings": 48}
ORIGINAL = {"original_max_position_embeddings": 16}  # a third of the context
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | ORIGINAL
YARN = {"rope_type": "yarn", "factor": 4.0} | ORIGINAL
LINEAR = {"rope_type": "linear", "factor": 3.0}
CLASSES = {"gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
           "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
           "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
           "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
           "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM)}
WINDOW = {"use_sliding_window": True, "sliding_window": 6}
CASES = [  # the family, what its config says, and as what we write it
    ("gpt2", {}, "gpt2"),
    ("gpt2", {"tie_word_embeddings": False, "n_inner": 40, "activation_function": "gelu"}, "gpt2"),
    ("llama", {"head_dim": 16, "num_key_value_heads": 2}, "llama"),
    ("llama", {"rope_parameters": LINEAR | {"rope_theta": 10.0}, "tie_word_embeddings": True}, "llama"),
    ("llama", {"rope_parameters": YARN | {"rope_theta": 10.0, "attention_factor": 0.1 * math.log(4.0) + 1}}, "llama"),
    ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 10.0}, "num_key_value_heads": 1}, "llama"),
    ("mistral", {"sliding_window": 6, "num_key_value_heads": 2}, "mistral"),
    ("mistral", {"sliding_window": 20, "num_key_value_heads": 2, "tie_word_embeddings": True,
                 "rope_parameters": YARN | {"rope_theta": 100.0}}, "mistral"),
    ("mistral", {"sliding_window": None, "num_key_value_heads": 2,
                 "rope_parameters": LINEAR | {"rope_theta": 100.0}}, "llama"),
    ("mistral", {"sliding_window": None, "tie_word_embeddings": True, "num_key_value_heads": 4}, "llama"),
    ("mistral", {"sliding_window": 6, "head_dim": 6, "rope_parameters": LLAMA3 | {"rope_theta": 10.0},
                 "num_key_value_heads": 1}, "mistral"),
    ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}, "qwen2"),
    ("qwen2", {"rope_parameters": YARN | {"rope_theta": 100.0}, "num_key_value_heads": 4}, "qwen2"),
    ("qwen2", {"rope_parameters": LLAMA3 | {"rope_theta": 10.0}, "num_key_value_heads": 2}, "qwen2"),
    ("qwen2", WINDOW | {"rope_parameters": LINEAR | {"rope_theta": 10.0}, "max_window_layers": 2,
                        "num_key_value_heads": 2, "tie_word_embeddings": True}, "qwen2"),
    ("qwen2", WINDOW | {"max_window_layers": 1, "num_key_value_heads": 1}, "qwen2"),
    ("qwen3", {"head_dim": 16, "num_key_value_heads": 2, "tie_word_embeddings": True}, "qwen3"),
    ("qwen3", {"head_dim": 8, "num_key_value_heads": 4, "rope_parameters": LINEAR | {"rope_theta": 10.0}}, "qwen3"),
    ("qwen3", {"head_dim": 6, "num_key_value_heads": 4, "rope_parameters": LLAMA3 | {"rope_theta": 10.0}}, "qwen3"),
    ("qwen3", WINDOW | {"head_dim": 12, "num_key_value_heads": 1, "max_window_layers": 0}, "qwen3"),
    ("qwen3", WINDOW | {"head_dim": 16, "num_key_value_heads": 2, "rope_parameters": YARN | {"rope_theta": 10.0},
                        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, "qwen3")]


def save_theirs(folder: Path, family: str, changes: dict, **options: object) -> transformers.PreTrainedModel:
    """A random model that transformers wrote, far from initialisation so that a mistake shows."""
    make_config, make = CLASSES[family]
    torch.manual_seed(1)
    model = make(make_config(**SIZES | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4) if p.dim() == 2 else p.add_(torch.randn_like(p) * 0.3)
    model.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize(("family", "changes", "written"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_models_travel_both_ways_and_write_the_same_text(tmp_path, family, changes, written):
    theirs = save_theirs(tmp_path / "theirs", family, changes)
    ours = GPT.from_pretrained(str(tmp_path / "theirs")).eval()
    ours.save_pretrained(str(tmp_path / "ours"), eot_id=100)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert (again.config.model_type, type(again).__name__) == (written, FAMILIES[written].architecture)
    idx = torch.randint(101, (2, 48))
    with torch.no_grad():
        wanted = theirs(idx).logits
        for logits in (ours(idx)[0], again(idx).logits):
            torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    num_tokens = 39 if family == "gpt2" else 45  # up to the last position, or beyond block_size
    text = theirs.generate(idx[:, :9], max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    for use_cache in (True, False):
        assert torch.equal(ours.generate(idx[:, :9], num_tokens, temperature=0, use_cache=use_cache), text)
    assert GPT.from_pretrained(str(tmp_path / "ours")).config == ours.config


LIKE_LLAMA = {"pos": "rope", "norm": "rmsnorm", "mlp": "swiglu"}
WINDOWED = {"sliding_window": 5}
SHAPES = [({}, "gpt2"), ({"head_dim": 4, "n_kv_head": 4, "mlp_hidden": 64}, "gpt2"), ({"head_dim": 8}, None),
          ({"qkv_bias": True}, None), (WINDOWED, None), (LIKE_LLAMA, "llama"),
          (LIKE_LLAMA | WINDOWED, "mistral"), (LIKE_LLAMA | WINDOWED | {"window_pattern": "SL"}, "ministral"),
          (LIKE_LLAMA | {"qk_norm": True, "head_dim": 8}, "qwen3"), (LIKE_LLAMA | {"qkv_bias": True}, "qwen2"),
          (LIKE_LLAMA | WINDOWED | {"qkv_bias": True, "window_pattern": "SL"}, "qwen2"),
          (LIKE_LLAMA | {"qkv_bias": True, "qk_norm": True}, None), (LIKE_LLAMA | {"bias": True}, None),
          (LIKE_LLAMA | WINDOWED | {"qk_norm": True, "window_pattern": "LLLLS"}, "qwen3"),
          (LIKE_LLAMA | {"qk_norm": True, "norm": "layernorm"}, None),
          (LIKE_LLAMA | {"qk_norm": True, "norm_position": "post"}, None)]


@pytest.mark.parametrize(("shape", "family"), SHAPES, ids=lambda value: str(value).replace(" ", ""))
def test_a_model_is_written_as_the_first_family_that_it_fits(tmp_path, shape, family):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=101, n_layer=3, n_head=4, n_embd=16, **shape)).eval()
    model.load_state_dict({name: p * 8 if p.dim() == 2 else p for name, p in model.state_dict().items()})
    assert family_of(model.config) == family
    model.save_pretrained(str(tmp_path))
    idx = torch.randint(101, (2, 16))
    if family:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert type(theirs).__name__ == FAMILIES[family].architecture
        torch.testing.assert_close(theirs(idx).logits, model(idx)[0], atol=1e-5, rtol=1e-5)
    else:
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "flatgpt"
    assert torch.equal(GPT.from_pretrained(str(tmp_path)).eval()(idx)[0], model(idx)[0])


@pytest.mark.parametrize("rope", [{"pos": "alibi"}, {"pos": "rope", "rope_scaling": "yarn", "rope_factor": 2.0,
                                                       "rope_original_block_size": 8}])
def test_transformers_reads_the_tokenizer_beside_a_model_that_it_does_not_know(tmp_path, rope):
    tokenizer = train_bpe(["the quick brown fox " * 9], 280)
    model = GPT(GPTConfig(block_size=16, vocab_size=280, n_layer=1, n_head=2, n_embd=16, mlp="relu2", **rope))
    model.save_pretrained(str(tmp_path))
    weights.save_tokenizer(model.config, tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("the quick fox")["input_ids"] == tokenizer.encode("the quick fox").tolist()
    assert GPT.from_pretrained(str(tmp_path)).config == model.config
    settings = json.loads((tmp_path / "config.json").read_text())  # as it was written before
    settings["rope_scaling"] = settings.pop("rope_scaling_type")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert GPT.from_pretrained(str(tmp_path)).config == model.config


def save_as_before(model: GPT, folder: Path) -> None:
    """A model under our own names, as all were written that are neither a GPT-2 nor a Llama."""
    folder.mkdir(exist_ok=True)
    rows = model.config.vocab_size
    save_tensors({name: p[:rows].clone() if name == "wte.weight" else p for name, p in model.state_dict().items()},
                 folder / "model.safetensors")
    settings = {key: value for key, value in vars(model.config).items() if key not in (
        "head_dim", "qkv_bias", "rope_scaling", "sliding_window", "window_pattern")}
    (folder / "config.json").write_text(json.dumps({"model_type": "flatgpt", **settings}))


def test_what_we_wrote_under_our_own_names_before_a_family_was_known_loads(tmp_path):
    torch.manual_seed(0)
    config = GPTConfig(block_size=16, vocab_size=101, n_layer=2, n_head=4, n_embd=16, qk_norm=True, **LIKE_LLAMA)
    model = GPT(config).eval()
    save_as_before(model, tmp_path)
    again, idx = GPT.from_pretrained(str(tmp_path)).eval(), torch.randint(101, (2, 16))
    assert again.config == config
    assert torch.equal(again(idx)[0], model(idx)[0])


def published(family: str, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int, **more) -> dict:
    return {"model_type": family, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab, "hidden_act": "silu",
            "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16"} | more


# What is in their config.json, and the number of parameters that their cards give.
PUBLISHED = {
    "Qwen3-0.6B": (596_049_920, published(
        "qwen3", 1024, 3072, 28, 16, 8, 151936, head_dim=128, tie_word_embeddings=True, max_position_embeddings=40960,
        attention_bias=False, max_window_layers=28, rope_scaling=None, rope_theta=1000000, sliding_window=None,
        use_sliding_window=False)),
    "Qwen2.5-0.5B": (494_032_768, published(
        "qwen2", 896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True, max_position_embeddings=32768,
        max_window_layers=24, rope_theta=1000000.0, sliding_window=32768, use_mrope=False, use_sliding_window=False)),
    "Mistral-7B-v0.1": (7_241_732_096, published(
        "mistral", 4096, 14336, 32, 32, 8, 32000, max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=10000.0,
        sliding_window=4096)),
    "TinyLlama-1.1B": (1_100_048_384, published(
        "llama", 2048, 5632, 22, 32, 4, 32000, max_position_embeddings=2048, rms_norm_eps=1e-5, pretraining_tp=1,
        rope_scaling=None, rope_theta=10000.0, attention_bias=False)),
    "SmolLM2-135M": (134_515_008, published(
        "llama", 576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_interleaved=False, rope_scaling=None, rope_theta=100000, is_llama_config=True, mlp_bias=False))}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_parameters_as_their_cards_say(name):
    count, settings = PUBLISHED[name]
    values, faults = FAMILIES[settings["model_type"]].read_config(settings)
    assert not faults
    config = GPTConfig(**values)
    assert build_empty(config).num_params(non_embedding=False) == count
    assert family_of(config) == settings["model_type"]
    assert set(config.windows) == {4096 if name.startswith("Mistral") else 0}


CHAT = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 2, "attention_dropout": 0.0, "use_cache": True,
        "initializer_range": 0.02, "torch_dtype": "bfloat16", "transformers_version": "4.45.0"}
# As they are published, every key, but for sizes, which are small here.
WHOLE = {
    "Llama-3.2-1B": CHAT | published(
        "llama", 32, 56, 3, 4, 2, 101, architectures=["LlamaForCausalLM"], attention_bias=False, head_dim=8,
        max_position_embeddings=64, mlp_bias=False, pretraining_tp=1, rms_norm_eps=1e-05, tie_word_embeddings=True,
        rope_scaling={"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                      "original_max_position_embeddings": 16, "rope_type": "llama3"}, rope_theta=500000.0),
    "SmolLM2-135M": CHAT | published(
        "llama", 36, 56, 3, 3, 1, 101, architectures=["LlamaForCausalLM"], attention_bias=False,
        is_llama_config=True, max_position_embeddings=64, mlp_bias=False, pretraining_tp=1, rms_norm_eps=1e-05,
        rope_interleaved=False, rope_scaling=None, rope_theta=100000, tie_word_embeddings=True,
        **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}}),
    "TinyLlama-1.1B": CHAT | published(
        "llama", 32, 56, 3, 4, 1, 101, architectures=["LlamaForCausalLM"], attention_bias=False,
        max_position_embeddings=64, pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=10000.0),
    "Mistral-7B-v0.1": CHAT | published(
        "mistral", 32, 56, 3, 4, 2, 101, architectures=["MistralForCausalLM"], max_position_embeddings=64,
        rms_norm_eps=1e-05, rope_theta=10000.0, sliding_window=8),
    "Mistral-7B-v0.3": CHAT | published(
        "mistral", 32, 56, 3, 4, 2, 101, architectures=["MistralForCausalLM"], max_position_embeddings=64,
        rms_norm_eps=1e-05, rope_theta=1000000.0, sliding_window=None),
    "Qwen2.5-0.5B": CHAT | published(
        "qwen2", 32, 56, 3, 4, 2, 101, architectures=["Qwen2ForCausalLM"], max_position_embeddings=64,
        max_window_layers=3, rope_theta=1000000.0, sliding_window=8, tie_word_embeddings=True, use_mrope=False,
        use_sliding_window=False),
    "Qwen2.5-7B, stretched as its card says": CHAT | published(
        "qwen2", 32, 56, 3, 4, 2, 101, architectures=["Qwen2ForCausalLM"], max_position_embeddings=64,
        max_window_layers=3, rope_theta=1000000.0, sliding_window=8, use_sliding_window=False,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 16, "type": "yarn"}),
    "Qwen3-0.6B": CHAT | published(
        "qwen3", 32, 56, 3, 4, 2, 101, architectures=["Qwen3ForCausalLM"], attention_bias=False, head_dim=16,
        max_position_embeddings=64, max_window_layers=3, rope_scaling=None, rope_theta=1000000, sliding_window=None,
        tie_word_embeddings=True, use_sliding_window=False),
    "Qwen3, as transformers 5 writes it": CHAT | published(
        "qwen3", 32, 56, 3, 4, 2, 101, architectures=["Qwen3ForCausalLM"], attention_bias=False, head_dim=16,
        dtype="bfloat16", layer_types=["full_attention"] * 3, max_position_embeddings=64, max_window_layers=3,
        rope_parameters={"rope_theta": 1000000, "rope_type": "default"}, sliding_window=None, use_sliding_window=False),
    "a Mistral with layer_types": CHAT | published(
        "mistral", 32, 56, 3, 4, 2, 101, max_position_embeddings=64, rope_theta=10.0, sliding_window=8, head_dim=8,
        layer_types=["full_attention", "sliding_attention", "full_attention"]),
    "a length that stands outside": CHAT | published(
        "llama", 32, 56, 3, 4, 2, 101, max_position_embeddings=64, original_max_position_embeddings=24,
        rope_theta=10.0, rope_scaling=YARN)}


@pytest.mark.parametrize("name", WHOLE)
def test_published_files_mean_what_transformers_takes_them_for(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(WHOLE[name]))
    torch.manual_seed(1)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path), dtype=torch.float32).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(4) if p.dim() == 2 else p.add_(torch.randn_like(p) * 0.3)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(WHOLE[name]))
    ours, idx = GPT.from_pretrained(str(tmp_path)).eval(), torch.randint(101, (2, 64))
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-5, rtol=1e-5)
    ours.save_pretrained(str(tmp_path / "ours"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(again(idx).logits, theirs(idx).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.model."])
def test_a_llama_without_its_head_or_from_the_compiler_is_one(tmp_path, prefix):
    theirs = save_theirs(tmp_path, "llama", {"tie_word_embeddings": True, "num_key_value_heads": 2})
    state = load_file(tmp_path / "model.safetensors")
    save_file({name.replace("model.", prefix, 1): tensor for name, tensor in state.items()},
              tmp_path / "model.safetensors", metadata={"format": "pt"})
    idx = torch.randint(101, (2, 16))
    torch.testing.assert_close(GPT.from_pretrained(str(tmp_path))(idx)[0], theirs(idx).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_keys_that_a_config_leaves_out_have_transformers_defaults(family):
    values, faults = FAMILIES[family].read_config({})
    theirs = CLASSES[family][0]()
    assert not faults
    assert values["n_kv_head"] in (0, theirs.num_key_value_heads)
    assert {"block_size": theirs.max_position_embeddings, "vocab_size": theirs.vocab_size, "n_embd": theirs.hidden_size,
            "n_layer": theirs.num_hidden_layers, "n_head": theirs.num_attention_heads, "norm_eps": theirs.rms_norm_eps,
            "mlp_hidden": theirs.intermediate_size, "tie_embeddings": theirs.tie_word_embeddings,
            "rope_theta": theirs.rope_parameters["rope_theta"]}.items() <= values.items()
    config = GPTConfig(**values)
    assert config.head_size == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert config.windows == [getattr(theirs, "sliding_window", None) or 0] * theirs.num_hidden_layers


@pytest.mark.parametrize(("family", "change", "message"), [
    ("qwen3", {"attention_bias": True}, "attention_bias"), ("qwen2", {"hidden_act": "gelu"}, "hidden_act=gelu"),
    ("mistral", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type=dynamic"),
    ("qwen3", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type=longrope"),
    ("qwen3", {"rope_scaling": {"full_attention": YARN}}, "rotations of full_attention alone"),
    ("llama", {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0}}, "original_max_position_embeddings=0"),
    ("qwen2", {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}}, "mscale=0.7, mscale_all_dim=1.0"),
    ("mistral", {"rope_scaling": YARN | {"beta_slow": 2}}, "beta_slow=2"),
    ("llama", {"tie_word_embeddings": True}, "the head differs from the token table"),
    ("qwen2", {"rope_scaling": YARN | {"beta_fast": 16}}, "beta_fast=16"),
    ("qwen2", {"rope_scaling": YARN | {"attention_factor": 2.0}}, "attention_factor=2.0"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("qwen3", {"head_dim": 64}, "of another shape"), ("qwen2", WINDOW | {"layer_types": ["full_attention"]},
                                                       "1 layer_types for 3 layers"),
    ("mistral", {"num_hidden_layers": None}, r"config\.json"),
    ("mistral", {"layer_types": ["chunked_attention"] * 3}, "layer_types has chunked_attention"),
    ("qwen3", {"model_type": "qwen3_moe"}, "only gpt2, llama, mistral, ministral, qwen2 and qwen3")])
def test_what_a_config_asks_for_and_we_lack_is_named(tmp_path, family, change, message):
    save_theirs(tmp_path, family, {"num_key_value_heads": 2})
    config = json.loads((tmp_path / "config.json").read_text())
    if "rope_scaling" in change:
        del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(str(tmp_path))


def save_tokenizer(folder: Path) -> None:
    """Of Qwen's kind: bytes, an end-of-text token and a turn's, and a chat template."""
    hf = Tokenizer(models.BPE())
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    hf.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=298, special_tokens=["<|endoftext|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=hf, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template="{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}").save_pretrained(folder)


def test_a_qwen2_with_another_tokenizer_than_qwen2s_is_read_with_that_and_runs_no_code(tmp_path, gpt2_tokenizer):
    config = GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=2, n_embd=8, qkv_bias=True, **LIKE_LLAMA)
    GPT(config).save_pretrained(str(tmp_path))
    qwens = transformers.Qwen2Tokenizer(vocab=gpt2_tokenizer.hf.get_vocab(), merges=[])
    text, classes = "Don't 12345\n\n  cafe\u0301", []
    for hf in (gpt2_tokenizer.hf, qwens.backend_tokenizer):
        weights.save_tokenizer(config, ModelTokenizer(hf, 50256), tmp_path)
        again = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert again(text).input_ids == hf.encode(text).ids
        classes.append(type(again).__name__)
    assert classes == ["TokenizersBackend", "Qwen2Tokenizer"]


@pytest.mark.parametrize(("family", "title", "changes"), [
    ("gpt2", "GPT-2", {}), ("llama", "Llama", {"rope_parameters": LLAMA3 | {"rope_theta": 100.0}}),
    ("mistral", "Mistral", {"sliding_window": 6, "num_key_value_heads": 2}),
    ("qwen2", "Qwen2", {"num_key_value_heads": 2, "rope_parameters": YARN | {"rope_theta": 100.0}}),
    ("qwen3", "Qwen3", {"num_key_value_heads": 2, "head_dim": 16})])
def test_a_model_of_the_hubs_cache_is_trained_further_exported_and_loaded(cli, monkeypatch, family, title, changes):
    """In several files, in 16 bits, with a tied head, as small models are published."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo, commit = Path("hub/models--someone--small"), "0" * 40
    folder = repo / "snapshots" / commit
    folder.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    save_tokenizer(folder)
    base = transformers.AutoTokenizer.from_pretrained(folder)
    ids = {"eos_token_id": [base.eos_token_id, base.pad_token_id], "bos_token_id": base.pad_token_id,
           "pad_token_id": base.pad_token_id}  # a list, as chat models have it
    changes = {"vocab_size": 320, "dtype": torch.bfloat16, "tie_word_embeddings": True} | changes
    save_theirs(folder, family, changes | ids, max_shard_size="30KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    Path("text.txt").write_text(TEXT)
    training = ("train", "--init_from=someone/small", "--dataset=more", "--out_dir=out/more", "--batch_size=2",
                "--gradient_accumulation_steps=1", "--eval_interval=10", "--eval_iters=2", "--device=cpu",
                "--dtype=float32", "--learning_rate=1e-4")
    for command in (("prepare_data", "--input=text.txt", "--name=more", "--tokenizer=someone/small"),
                    (*training, "--max_iters=10"), (*training, "--max_iters=20"),
                    ("export", "--run=out/more", "--to=exported")):
        assert (done := cli(*command)).code == 0, done.err
    assert f"in the shape of {title}, trained further from someone/small" in Path("exported/README.md").read_text()
    theirs = transformers.AutoModelForCausalLM.from_pretrained("exported").eval()
    again = transformers.AutoTokenizer.from_pretrained("exported")
    assert type(theirs).__name__ == FAMILIES[family].architecture
    assert (again.special_tokens_map, again.chat_template) == (base.special_tokens_map, base.chat_template)
    for text in ("Don't 12345\n\n  cafe\u0301<|im_end|>", TEXT[:300]):
        assert again(text).input_ids == base(text).input_ids
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == ids["eos_token_id"]
    prompt = torch.tensor([again("the quick").input_ids])
    wanted = theirs.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(GPT.from_pretrained("exported").generate(prompt, 20, temperature=0), wanted)
