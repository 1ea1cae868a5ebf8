"""The kinds of models that transformers knows and model.py can be: their options, and the names of their tensors.

Owns the translation between `(GPTConfig, state dict)` of model.py and `(config.json, tensors)` of Hugging Face. It
knows no files; weights.py reads and writes them. What a config.json asks for and model.py lacks is told by name.

FAMILIES is the table. A model of ours is written as the first family that it fits. Llama and its relatives share all
names: they differ in the options of ours that `fits` looks at, in the keys that `extra_keys` writes, and in what
transformers takes for keys that a config.json leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flatgpt.models.positions import BETA_FAST, BETA_SLOW, HIGH_FREQ_FACTOR, LOW_FREQ_FACTOR, yarn_length
from model import GPTConfig

State = dict[str, torch.Tensor | list[torch.Tensor]]  # of a list, the rows lie below each other
Read = tuple[dict[str, Any], list[str]]  # the values of our configuration, and what model.py does not have

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
               "relu2": "relu2"}  # Hugging Face's names for GPT-2's activation -> ours
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # Conv1D
ATTENTION_MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # buffers in old files, not parameters
LLAMA = {  # ours -> Llama's
    "wte.weight": "model.embed_tokens.weight", "ln_f.weight": "model.norm.weight", "lm_head.weight": "lm_head.weight"}
LLAMA_BLOCK = {  # of a block, and where there are several their rows lie below each other in ours
    "ln_1.weight": ["input_layernorm.weight"], "ln_2.weight": ["post_attention_layernorm.weight"],
    "attn.c_attn.weight": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "attn.c_attn.bias": ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"],
    "attn.q_norm.weight": ["self_attn.q_norm.weight"], "attn.k_norm.weight": ["self_attn.k_norm.weight"],
    "attn.c_proj.weight": ["self_attn.o_proj.weight"], "mlp.c_proj.weight": ["mlp.down_proj.weight"],
    "mlp.c_fc.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"]}
LLAMA_DEFAULTS = {  # transformers' own, for keys that config.json may leave out
    "max_position_embeddings": 2048, "vocab_size": 32000, "num_hidden_layers": 32, "num_attention_heads": 32,
    "hidden_size": 4096, "intermediate_size": 11008, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "rope_theta": 10000.0, "hidden_act": "silu"}
QWEN_DEFAULTS = LLAMA_DEFAULTS | {"max_position_embeddings": 32768, "vocab_size": 151936, "intermediate_size": 22016,
                                  "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
MISTRAL_DEFAULTS = LLAMA_DEFAULTS | {"max_position_embeddings": 131072, "intermediate_size": 14336,
                                     "num_key_value_heads": 8, "sliding_window": 4096}


@dataclass(frozen=True)
class Family:
    """A kind of model, under the `model_type` that its config.json has."""

    title: str
    architecture: str  # transformers' class
    fits: Callable[[GPTConfig], bool]  # whether a model of ours is one
    read_config: Callable[[Mapping[str, Any]], Read]
    read_state: Callable[[GPTConfig, State], State]
    write_config: Callable[[GPTConfig], dict[str, Any]]
    write_state: Callable[[GPTConfig, State], State]


def family_of(config: GPTConfig) -> str | None:
    """The model_type under which a model is written; None for a mix that transformers does not know."""
    return next((name for name, family in FAMILIES.items() if family.fits(config)), None)


# GPT-2


def _is_gpt2(config: GPTConfig) -> bool:
    return (config.model == "gpt" and config.pos.startswith("learned") and config.mlp in ACTIVATIONS.values()
            and config.num_kv_heads == config.n_head and not any(config.windows)
            and config.head_size * config.n_head == config.n_embd
            and (config.norm, config.norm_position) == ("layernorm", "pre") and not (config.qk_norm or config.qkv_bias))


def _read_gpt2_config(settings: Mapping[str, Any]) -> Read:
    """The fall-backs are transformers' defaults for keys that config.json may leave out."""
    activation = str(settings.get("activation_function", "gelu_new"))
    faults = [key for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention", "quantization_config")
              if settings.get(key)]
    if not settings.get("scale_attn_weights", True):
        faults.append("scale_attn_weights=False")
    if activation not in ACTIVATIONS:
        faults.append(f"activation_function={activation}")
    return {"block_size": settings.get("n_positions", 1024), "vocab_size": settings.get("vocab_size", 50257),
            "n_layer": settings.get("n_layer", 12), "n_head": settings.get("n_head", 12),
            "n_embd": settings.get("n_embd", 768), "mlp_hidden": settings.get("n_inner") or 0,
            "dropout": settings.get("resid_pdrop", 0.1), "norm_eps": settings.get("layer_norm_epsilon", 1e-5),
            "tie_embeddings": settings.get("tie_word_embeddings", True), "mlp": ACTIVATIONS.get(activation, "gelu"),
            "pos": (settings.get("flatgpt") or {}).get("pos", "learned"),
            "bias": (settings.get("flatgpt") or {}).get("bias", True)}, faults


def without_prefixes(theirs: State) -> State:
    """GPT-2's parameters without what transformers and torch.compile put before their names."""
    state = {name.removeprefix("_orig_mod.").removeprefix("transformer."): tensor for name, tensor in theirs.items()}
    return {name: tensor for name, tensor in state.items() if not ATTENTION_MASKS.fullmatch(name)}


def _read_gpt2_state(config: GPTConfig, theirs: State) -> State:
    """GPT-2 always has biases there. Where they are zero and the file says that they were never trained, they are
    dropped; where someone else has trained them, `config` gets them."""
    state = {name: tensor.t() if name.endswith(TRANSPOSED) else tensor
             for name, tensor in without_prefixes(theirs).items()}
    config.bias = config.bias or any(name.endswith(".bias") and bool(tensor.any()) for name, tensor in state.items())
    return state if config.bias else {name: tensor for name, tensor in state.items() if not name.endswith(".bias")}


def _write_gpt2_config(config: GPTConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size, "n_positions": config.block_size, "n_ctx": config.block_size,
        "n_embd": config.n_embd, "n_layer": config.n_layer, "n_head": config.n_head,
        "n_inner": config.mlp_hidden or None,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.mlp, config.mlp), "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout, "attn_pdrop": config.dropout, "layer_norm_epsilon": config.norm_eps,
        "initializer_range": 0.02, "scale_attn_weights": True, "use_cache": True,
        "tie_word_embeddings": config.tie_embeddings, "flatgpt": {"bias": config.bias, "pos": config.pos}}


def _write_gpt2_state(config: GPTConfig, state: State) -> State:
    """Absent biases are written as zeros, and `flatgpt.bias` in config.json remembers them."""
    layers = [name for name in state if name.endswith(".weight") and name.startswith(("h.", "ln_f."))]
    zeros = {name.removesuffix("weight") + "bias": torch.zeros(state[name].size(0)) for name in layers}
    return {name if name == "lm_head.weight" else f"transformer.{name}":
            tensor.t() if name.endswith(TRANSPOSED) else tensor for name, tensor in (zeros | state).items()}


# Llama and its relatives


def _llama_like(title: str, architecture: str, defaults: Mapping[str, Any], fits: Callable[[GPTConfig], bool],
                options: Mapping[str, Any], read_windows: Callable[[Mapping[str, Any], int], dict[str, Any]],
                extra_keys: Callable[[GPTConfig], dict[str, Any]]) -> Family:
    """A family with Llama's names. `options` of ours are what all of its models have; `read_windows` takes the sliding
    windows of so many layers from a config.json."""
    def is_one(config: GPTConfig) -> bool:
        return (config.model == "gpt" and (config.pos, config.mlp, config.bias) == ("rope", "swiglu", False)
                and (config.norm, config.norm_position) == ("rmsnorm", "pre") and fits(config))

    def read_config(settings: Mapping[str, Any]) -> Read:
        settings = {**defaults, **settings}
        values, faults = _read_llama_config(settings)
        return values | options | read_windows(settings, values["n_layer"]), faults

    return Family(title, architecture, is_one, read_config, _read_llama_state,
                  lambda config: _write_llama_config(config) | extra_keys(config), _write_llama_state)


def _read_llama_config(settings: Mapping[str, Any]) -> Read:
    rope, faults = _read_rope(settings)
    width, n_head = settings["hidden_size"], settings["num_attention_heads"]
    head_dim = settings.get("head_dim") or 0
    faults += [key for key in ("attention_bias", "mlp_bias", "quantization_config") if settings.get(key)]
    if settings["hidden_act"] not in ("silu", "swish"):  # two names of one function
        faults.append(f"hidden_act={settings['hidden_act']}")
    return {"block_size": settings["max_position_embeddings"], "vocab_size": settings["vocab_size"],
            "n_layer": settings["num_hidden_layers"], "n_head": n_head,
            "n_kv_head": settings.get("num_key_value_heads") or 0, "n_embd": width,
            "head_dim": 0 if head_dim * n_head == width else head_dim, "mlp_hidden": settings["intermediate_size"],
            "norm_eps": settings["rms_norm_eps"], "tie_embeddings": settings["tie_word_embeddings"], "dropout": 0.0,
            "bias": False, "pos": "rope", "norm": "rmsnorm", "mlp": "swiglu", **rope}, faults


def _read_rope(settings: Mapping[str, Any]) -> Read:
    """Of the rotations alone. Where a file has both names, transformers takes `rope_scaling`, and of two original
    lengths the one outside."""
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    values = {"rope_theta": rope.get("rope_theta") or settings["rope_theta"]}
    partial = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor"))
    faults = [f"partial_rotary_factor={partial}"] if partial not in (None, 1) else []
    faults += [f"rotations of {name} alone" for name, value in rope.items() if isinstance(value, dict)]
    if kind not in ("llama3", "linear", "yarn"):
        return values, faults if kind == "default" else [*faults, f"rope_type={kind}"]
    values |= {"rope_scaling": kind, "rope_factor": rope.get("factor")}
    if kind != "linear":
        original = settings.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
        values["rope_original_block_size"] = settings["max_position_embeddings"] if original is None else original
        faults += ["original_max_position_embeddings=0"] if original == 0 else []
    if kind == "llama3":
        faults += [f"{key}={rope.get(key)} (every published Llama 3 has {bound})" for key, bound in (
            ("low_freq_factor", LOW_FREQ_FACTOR), ("high_freq_factor", HIGH_FREQ_FACTOR)) if rope.get(key) != bound]
    if kind == "yarn":
        factor = rope.get("factor")
        length = yarn_length(factor) if isinstance(factor, (int, float)) and factor > 0 else None
        faults += [f"{key}={rope[key]}" for key, usual in (
            ("beta_fast", BETA_FAST), ("beta_slow", BETA_SLOW), ("truncate", True), ("attention_factor", length),
            ("mscale", None), ("mscale_all_dim", None)) if rope.get(key) not in (None, usual)]
    return values, faults


def _read_llama_state(config: GPTConfig, theirs: State) -> State:
    theirs = {name.removeprefix("_orig_mod."): tensor for name, tensor in theirs.items()
              if not name.endswith("rotary_emb.inv_freq")}  # a buffer
    if "embed_tokens.weight" in theirs:  # a LlamaModel, say, which is the model without its head
        theirs = {name if name == "lm_head.weight" else f"model.{name}": tensor for name, tensor in theirs.items()}
    state = {ours: theirs.pop(name) for ours, name in LLAMA.items() if name in theirs}
    for layer in range(config.n_layer):
        for ours, names in LLAMA_BLOCK.items():
            names = [f"model.layers.{layer}.{name}" for name in names]
            if all(name in theirs for name in names):
                state[f"h.{layer}.{ours}"] = [theirs.pop(name) for name in names]
    return state | theirs  # what is left over is named as unknown


def _write_llama_config(config: GPTConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_original_block_size or config.rope_factor != 1:
        rope = {"rope_type": config.rope_scaling, "factor": float(config.rope_factor)}
        if config.rope_scaling != "linear":
            rope["original_max_position_embeddings"] = config.rope_original_block_size
        if config.rope_scaling == "llama3":
            rope |= {"low_freq_factor": float(LOW_FREQ_FACTOR), "high_freq_factor": float(HIGH_FREQ_FACTOR)}
    settings = {
        "vocab_size": config.vocab_size, "max_position_embeddings": config.block_size, "hidden_size": config.n_embd,
        "head_dim": config.head_size, "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
        "num_key_value_heads": config.num_kv_heads, "intermediate_size": config.hidden, "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
        "rope_parameters": rope | {"rope_theta": config.rope_theta}, "attention_bias": False, "mlp_bias": False,
        "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
        "tie_word_embeddings": config.tie_embeddings}
    # rope_scaling is transformers 4's name; it warns of a rope_theta in there.
    return settings if rope["rope_type"] == "default" else settings | {"rope_scaling": rope}


def _write_llama_state(config: GPTConfig, state: State) -> State:
    q_k_v = [config.head_size * heads for heads in (config.n_head, *[config.num_kv_heads] * 2)]
    rows = {"attn.c_attn.weight": q_k_v, "attn.c_attn.bias": q_k_v, "mlp.c_fc.weight": [config.hidden] * 2}
    tensors = {theirs: state[ours] for ours, theirs in LLAMA.items() if ours in state}
    for layer in range(config.n_layer):
        for ours, names in LLAMA_BLOCK.items():
            if (tensor := state.get(f"h.{layer}.{ours}")) is not None:
                for name, part in zip(names, tensor.split(rows.get(ours, [tensor.size(0)]))):
                    tensors[f"model.layers.{layer}.{name}"] = part
    return tensors


# Sliding windows

LAYER_TYPES = {"sliding_attention": "S", "full_attention": "L"}


def _read_mistral_windows(settings: Mapping[str, Any], n_layer: int) -> dict[str, Any]:
    """Of all layers, or of those that layer_types names."""
    window, kinds = settings["sliding_window"] or 0, settings.get("layer_types")
    return _windows_of(kinds, window, n_layer) if kinds and window else {"sliding_window": window}


def _read_qwen_windows(settings: Mapping[str, Any], n_layer: int) -> dict[str, Any]:
    """Of the layers that layer_types names, or from max_window_layers on."""
    if not settings.get("use_sliding_window") or not settings["sliding_window"]:
        return {}
    kinds = settings.get("layer_types") or [
        "sliding_attention" if layer >= settings["max_window_layers"] else "full_attention" for layer in range(n_layer)]
    return _windows_of(kinds, settings["sliding_window"], n_layer)


def _windows_of(kinds: list[str], window: int, n_layer: int) -> dict[str, Any]:
    if unknown := {*kinds} - LAYER_TYPES.keys():
        raise LookupError(f"layer_types has {', '.join(map(str, unknown))}")
    letters = "".join(LAYER_TYPES[kind] for kind in kinds)
    if len(letters) != n_layer:
        raise LookupError(f"{len(letters)} layer_types for {n_layer} layers")
    if "S" not in letters:
        return {}
    pattern = next(letters[:n] for n in range(1, len(letters) + 1) if (letters[:n] * n_layer)[:n_layer] == letters)
    return {"sliding_window": window, "window_pattern": pattern}


def _layer_types(config: GPTConfig) -> list[str]:
    return ["sliding_attention" if window else "full_attention" for window in config.windows]


def _qwen_window_keys(config: GPTConfig) -> dict[str, Any]:
    """Older readers know no layer_types: to them all layers from max_window_layers on have the window."""
    kinds = _layer_types(config)
    has_windows = any(config.windows)
    return {"use_sliding_window": has_windows, "sliding_window": config.sliding_window if has_windows else None,
            "max_window_layers": kinds.index("sliding_attention") if has_windows else config.n_layer,
            "layer_types": kinds}


FAMILIES = {
    "gpt2": Family("GPT-2", "GPT2LMHeadModel", _is_gpt2, _read_gpt2_config, _read_gpt2_state, _write_gpt2_config,
                   _write_gpt2_state),
    "llama": _llama_like(
        "Llama", "LlamaForCausalLM", LLAMA_DEFAULTS,
        lambda c: not (c.qkv_bias or c.qk_norm or any(c.windows)), {}, lambda settings, n_layer: {}, lambda c: {}),
    "mistral": _llama_like(
        "Mistral", "MistralForCausalLM", MISTRAL_DEFAULTS,
        lambda c: all(c.windows) and not (c.qkv_bias or c.qk_norm), {}, _read_mistral_windows,
        lambda c: {"sliding_window": c.sliding_window}),
    "ministral": _llama_like(  # transformers' name for a Mistral of which some layers see all
        "Ministral", "MinistralForCausalLM", MISTRAL_DEFAULTS,
        lambda c: any(c.windows) and not (c.qkv_bias or c.qk_norm), {}, _read_mistral_windows,
        lambda c: {"sliding_window": c.sliding_window, "layer_types": _layer_types(c)}),
    "qwen2": _llama_like(
        "Qwen2", "Qwen2ForCausalLM", QWEN_DEFAULTS,
        lambda c: c.qkv_bias and not c.qk_norm, {"qkv_bias": True}, _read_qwen_windows, _qwen_window_keys),
    "qwen3": _llama_like(
        "Qwen3", "Qwen3ForCausalLM", QWEN_DEFAULTS | {"head_dim": 128},
        lambda c: c.qk_norm and not c.qkv_bias, {"qk_norm": True}, _read_qwen_windows, _qwen_window_keys)}
