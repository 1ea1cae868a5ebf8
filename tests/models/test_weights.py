"""weights.py against transformers, and against files of nanoGPT's layout."""

import gzip
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import TINY_RUN
from corpus import POINTER
from safetensors.torch import load_file, save_file

from flatgpt.models import weights
from model import GPT, GPTConfig

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16}


def save_hf(folder, prefixed: bool = True, **changes) -> transformers.GPT2LMHeadModel:
    """A random GPT-2 written by transformers; `prefixed=False` renames its tensors to those of OpenAI's own file."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(**{"n_positions": 32, "vocab_size": 101, "bos_token_id": 100,
                                        "eos_token_id": 100} | SHAPE | changes)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    model.save_pretrained(folder)
    if not prefixed:
        state = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
        for layer in range(2):  # the causal mask, a buffer in OpenAI's file
            state[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(1, 1, 32, 32))
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def save_nanogpt(path, compiled: bool = True, **changes) -> dict:
    """A ckpt.pt of nanoGPT's layout with random weights; returns the state dict in it."""
    torch.manual_seed(2)
    args = {"block_size": 32, "vocab_size": 101, "bias": False, "dropout": 0.1} | SHAPE | changes
    model = GPT(GPTConfig(**args))
    prefix = "_orig_mod." if compiled else ""
    state = {f"{prefix}transformer.{name}": t for name, t in model.state_dict().items()}
    table = state.pop(f"{prefix}transformer.wte.weight")[:args["vocab_size"]].clone()
    state |= {f"{prefix}transformer.wte.weight": table, f"{prefix}lm_head.weight": table}
    torch.save({"model": state, "model_args": args, "iter_num": 7, "best_val_loss": torch.tensor(2.5),
                "optimizer": {"state": {}, "param_groups": []}, "config": {"dataset": "tiny"}}, path)
    return model.state_dict()


def test_a_nanogpt_checkpoint_without_the_option_has_nanogpts_biases(tmp_path):
    state = save_nanogpt(tmp_path / "ckpt.pt", bias=True)
    theirs = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    del theirs["model_args"]["bias"]
    torch.save(theirs, tmp_path / "ckpt.pt")
    ours = GPT.from_pretrained(str(tmp_path / "ckpt.pt"))
    assert ours.config.bias
    assert torch.equal(ours.h[1].attn.c_attn.bias, state["h.1.attn.c_attn.bias"])


@pytest.mark.parametrize("write", [save_nanogpt, lambda path: save_hf(path.parent, True)])
def test_a_file_that_is_written_over_does_not_reach_a_model_in_memory(tmp_path, write):
    """Nor end the process, which may hold it as a map of memory."""
    write(tmp_path / "ckpt.pt")
    file = next(path for path in (tmp_path / "model.safetensors", tmp_path / "ckpt.pt") if path.is_file())
    model = GPT.from_pretrained(str(tmp_path if file.suffix == ".safetensors" else file))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    file.write_bytes(b"")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_logits_and_loss_equal_transformers(tmp_path, prefixed, activation):
    theirs = save_hf(tmp_path, prefixed, activation_function=activation, layer_norm_epsilon=1e-4)
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    idx = torch.randint(101, (3, 32))
    targets = torch.where(torch.rand(3, 32) < 0.2, -100, idx)
    wanted = theirs(idx, labels=targets)
    torch.testing.assert_close(ours(idx)[0], wanted.logits, atol=1e-5, rtol=1e-5)
    shifted = torch.where(targets[:, 1:] == -100, -1, targets[:, 1:])
    torch.testing.assert_close(ours(idx[:, :-1], shifted)[1], wanted.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": False, "n_inner": 24}, {"activation_function": "relu"}])
def test_other_shapes_of_gpt2_travel_both_ways(tmp_path, changes):
    theirs = save_hf(tmp_path / "theirs", **changes)
    ours = GPT.from_pretrained(str(tmp_path / "theirs")).eval()
    ours.save_pretrained(str(tmp_path / "ours"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    idx = torch.randint(101, (3, 32))
    for logits in (ours(idx)[0], again(idx).logits):
        torch.testing.assert_close(logits, theirs(idx).logits, atol=1e-5, rtol=1e-5)


LLAMA = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 48}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}  # pairs with 6, 11, 20 and 35 positions a turn, by theta 10:
LLAMA3 = LLAMA3_ROPE | {"rope_theta": 10.0}  # the first keeps its speed, the last loses all that it can


@pytest.mark.parametrize("changes", [
    {}, {"num_key_value_heads": 2, "tie_word_embeddings": True}, {"num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    {"rope_parameters": LLAMA3, "num_key_value_heads": 2, "tie_word_embeddings": True}])
def test_llamas_travel_both_ways_and_generate_the_same(tmp_path, changes):
    torch.manual_seed(1)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | changes)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(4) if p.dim() == 2 else p.add_(torch.randn_like(p) * 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(str(tmp_path / "theirs")).eval()
    ours.save_pretrained(str(tmp_path / "ours"), eot_id=100)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert isinstance(again, transformers.LlamaForCausalLM)
    idx = torch.randint(101, (3, 48))
    wanted = theirs(idx, labels=idx)
    for logits in (ours(idx)[0], again(idx).logits):
        torch.testing.assert_close(logits, wanted.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(idx[:, :-1], idx[:, 1:])[1], wanted.loss, atol=1e-5, rtol=1e-5)
    text = theirs.generate(idx[:, :5], max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(idx[:, :5], 40, temperature=0), text)


@pytest.mark.parametrize(("change", "message"), [
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}}, "rope_type=longrope"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type=dynamic"),
    ({"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}}, r"low_freq_factor=2.0 \(every published Llama 3 has 1\)"),
    ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 8}}, r"high_freq_factor=8 \(every published Llama 3 has 4\)"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "low_freq_factor=None .*high_freq_factor=None"),
    ({"rope_parameters": LLAMA3 | {"factor": None}}, r"config\.json: rope_factor is None"),
    ({"attention_bias": True}, "attention_bias"), ({"hidden_act": "gelu"}, "hidden_act=gelu"),
    ({"head_dim": 16}, "of another shape than config.json says: h.0.attn.c_attn.weight"),
    ({"num_hidden_layers": 3}, "missing"), ({"num_hidden_layers": 1}, "unknown: model.layers.1")])
def test_a_llama_with_what_we_lack_says_why(tmp_path, change, message):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("change", [
    {"rope_parameters": LLAMA3}, {"rope_parameters": LLAMA3_ROPE, "rope_theta": 10.0},
    {"rope_scaling": LLAMA3_ROPE, "rope_theta": 10.0}, {"rope_scaling": LLAMA3, "rope_parameters": None},
    {"rope_scaling": LLAMA3_ROPE, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    {"rope_scaling": None, "rope_theta": 10.0}, {"rope_scaling": {"type": "default"}, "rope_theta": 10.0}, {},
    {"rope_theta": 10, "head_dim": None, "num_key_value_heads": None, "pretraining_tp": 2, "attention_dropout": 0.1}])
def test_rotations_are_found_wherever_a_llamas_file_has_them(tmp_path, change):
    config = LLAMA | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | change
    torch.manual_seed(1)
    GPT(GPTConfig(block_size=48, vocab_size=101, n_layer=2, n_head=4, n_embd=32, mlp_hidden=56, pos="rope",
                  norm="rmsnorm", mlp="swiglu", tie_embeddings=False)).save_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours, idx = GPT.from_pretrained(str(tmp_path)).eval(), torch.randint(101, (3, 48))
    for model in (theirs, ours):
        model.load_state_dict({name: p * 8 if p.dim() == 2 else p for name, p in model.state_dict().items()})
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-5, rtol=1e-5)


def test_scaled_rotations_are_written_under_the_names_of_old_and_new_readers(tmp_path):
    llama = {"block_size": 48, "vocab_size": 101, "n_layer": 2, "n_head": 4, "n_embd": 32, "pos": "rope",
             "norm": "rmsnorm", "mlp": "swiglu", "rope_theta": 10.0, "dropout": 0.0}
    for factor in (8.0, 1.0):
        model = GPT(GPTConfig(**llama, rope_factor=factor, rope_original_block_size=32))
        model.save_pretrained(str(tmp_path))
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["rope_scaling"] == LLAMA3_ROPE | {"factor": factor}  # what Meta's own files have
        assert config["rope_parameters"] == LLAMA3 | {"factor": factor}
        assert GPT.from_pretrained(str(tmp_path)).config == GPTConfig(**vars(model.config) | {
            "n_kv_head": 4, "mlp_hidden": model.config.hidden})
        for absent in ("rope_scaling", "rope_parameters"):
            (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != absent}))
            again = transformers.AutoConfig.from_pretrained(tmp_path)
            assert again.rope_parameters == LLAMA3 | {"factor": factor}
    GPT(GPTConfig(**llama)).save_pretrained(str(tmp_path))
    assert "rope_scaling" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("changes", [
    {"pos": "alibi"}, {"pos": "none", "tie_embeddings": False}, {"mlp": "swiglu"}, {"norm": "rmsnorm", "qk_norm": True},
    {"pos": "rope", "norm_position": "post"}, {"n_kv_head": 1}, {"pos": "learned_sinusoidal", "mlp": "relu2"}])
def test_every_other_mix_comes_back_as_it_was(tmp_path, changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=101, **SHAPE | changes)).eval()
    model.save_pretrained(str(tmp_path))
    again = GPT.from_pretrained(str(tmp_path)).eval()
    idx = torch.randint(101, (3, 32))
    assert again.config == model.config
    assert torch.equal(again(idx)[0], model(idx)[0])


def test_a_folder_of_ours_older_than_an_option_has_its_default(tmp_path):
    model = GPT(GPTConfig(block_size=32, vocab_size=101, pos="rope", **SHAPE))
    model.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_factor"], config["rope_original_block_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert GPT.from_pretrained(str(tmp_path)).config == model.config


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mlp", ["gelu", "gelu_tanh"])
def test_what_we_save_transformers_loads_and_so_do_we(tmp_path, bias, mlp):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=101, bias=bias, mlp=mlp, dropout=0.1, **SHAPE)).eval()
    model.save_pretrained(str(tmp_path), eot_id=100)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    idx = torch.randint(101, (3, 32))
    assert isinstance(theirs, transformers.GPT2LMHeadModel)
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == 100
    assert theirs.config.activation_function == {"gelu": "gelu", "gelu_tanh": "gelu_new"}[mlp]
    torch.testing.assert_close(theirs(idx).logits, model(idx)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs(idx, labels=idx).loss, model(idx[:, :-1], idx[:, 1:])[1], atol=1e-5, rtol=1e-5)
    again = GPT.from_pretrained(str(tmp_path))
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))


def test_transformers_generates_our_greedy_tokens(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=101, **SHAPE)).eval()
    model.save_pretrained(str(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    idx = torch.randint(101, (2, 5))
    wanted = theirs.generate(idx, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(idx, 20, temperature=0), wanted)


def test_biases_that_someone_else_trained_are_not_dropped(tmp_path):
    GPT(GPTConfig(block_size=32, vocab_size=101, bias=False, **SHAPE)).save_pretrained(str(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        theirs.transformer.h[0].mlp.c_fc.bias.add_(0.5)
    theirs.save_pretrained(tmp_path)
    ours, idx = GPT.from_pretrained(str(tmp_path)).eval(), torch.randint(101, (1, 32))
    assert ours.config.bias
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-5, rtol=1e-5)


def test_weights_in_several_files_and_in_half_precision_load(tmp_path):
    theirs = save_hf(tmp_path / "whole")
    theirs.half().save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    assert (tmp_path / "parts" / "model.safetensors.index.json").is_file()
    ours, idx = GPT.from_pretrained(str(tmp_path / "parts")).eval(), torch.randint(101, (1, 32))
    torch.testing.assert_close(ours(idx)[0], theirs.float()(idx).logits, atol=1e-5, rtol=1e-5)


def make_hub_cache(cache, name: str = "gpt2", **changes) -> transformers.GPT2LMHeadModel:
    """A hub cache that holds openai-community/<name> with random weights."""
    repo = cache / f"models--openai-community--{name}"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    return save_hf(snapshot, **changes)


def test_alias_loads_from_the_hub_cache_offline(tmp_path, monkeypatch):
    theirs = make_hub_cache(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    idx = torch.randint(101, (1, 32))
    for source in ("gpt2", "openai-community/gpt2"):
        torch.testing.assert_close(GPT.from_pretrained(source).eval()(idx)[0], theirs(idx).logits, atol=1e-5, rtol=1e-5)


def test_without_cache_and_network_the_error_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    match = r"could not get openai-community/gpt2-xl from .*copy its folder to this machine"
    with pytest.raises(OSError, match=match) as error:
        GPT.from_pretrained("gpt2-xl")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_checkpoint_keeps_its_weights_and_its_exact_gelu(tmp_path, compiled, bias):
    state = save_nanogpt(tmp_path / "ckpt.pt", compiled, bias=bias)
    model = GPT.from_pretrained(str(tmp_path / "ckpt.pt"))
    assert (model.config.mlp, model.config.bias, model.config.dropout) == ("gelu", bias, 0.1)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    model.save_pretrained(str(tmp_path / "hf"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["activation_function"] == "gelu"
    assert torch.equal(GPT.from_pretrained(str(tmp_path)).wte.weight, model.wte.weight)  # nanoGPT's out_dir


class Planted:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_planted_in_ckpt_pt_is_not_run(tmp_path, save):
    save({"model": {}, "model_args": Planted(tmp_path / "ran")}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=r"ckpt\.pt"):
        GPT.from_pretrained(str(tmp_path / "ckpt.pt"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_numpys_numbers_in_ckpt_pt_are_plain_values(tmp_path, zipped):
    save_nanogpt(tmp_path / "ckpt.pt")
    wanted = GPT.from_pretrained(str(tmp_path / "ckpt.pt"))
    theirs = torch.load(tmp_path / "ckpt.pt")
    theirs |= {"best_val_loss": np.float64(1.5), "iter_num": np.int64(7), "losses": np.array([3.0, 2.5])}
    theirs["model_args"] |= {"n_layer": np.int64(2), "dropout": np.float32(0.5), "bias": np.bool_(False)}
    theirs["config"] |= {"learning_rate": np.float64(1e-3), "dataset": np.str_("tiny")}
    torch.save(theirs, tmp_path / "numpy.pt", _use_new_zipfile_serialization=zipped)
    read = weights.read_nanogpt(tmp_path / "numpy.pt")
    assert [read[key] for key in ("best_val_loss", "iter_num", "losses")] == [1.5, 7, [3.0, 2.5]]
    assert read["config"] == {"dataset": "tiny", "learning_rate": 1e-3}
    model = GPT.from_pretrained(str(tmp_path / "numpy.pt"))
    assert all(map(torch.equal, model.state_dict().values(), wanted.state_dict().values()))
    assert (model.config.n_layer, model.config.dropout, model.config.bias) == (2, 0.5, False)


@pytest.mark.parametrize("value", [np.array([Planted("ran")], dtype=object), np.datetime64("2020-01-01"), Path("x")])
def test_what_else_a_ckpt_pt_holds_is_refused(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "model_args": {}, "config": value}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=r"ckpt\.pt"):
        weights.read_nanogpt(tmp_path / "ckpt.pt")
    assert not Path("ran").exists()


JUNK = {"empty": b"", "text": b"hello world\n" * 99, "zeros": bytes(5000), "gzip": gzip.compress(b"x" * 999),
        "a pickle": pickle.dumps([1, 2]), "a dictionary": pickle.dumps({"model": 1}), "a pointer": b"version https://g",
        "an empty zip": b"PK\x05\x06" + bytes(18)}


@pytest.mark.parametrize("kind", [*JUNK, "torn", "its tail", "a byte short"])
def test_a_junk_ckpt_pt_is_named_and_not_offered_as_a_start(refused, tiny_data, kind):
    path = Path("out/tiny/ckpt.pt")
    path.parent.mkdir(parents=True)
    save_nanogpt(path)
    line = refused("train", *TINY_RUN, "--init_from=resume")
    assert "start from nanoGPT's with --init_from=out/tiny/ckpt.pt" in line
    good = path.read_bytes()
    path.write_bytes((JUNK | {"torn": good[:len(good) // 2], "its tail": good[-900:], "a byte short": good[:-1]})[kind])
    for command in (["--init_from=resume"], ["--init_from=out/tiny/ckpt.pt", "--out_dir=out/new"]):
        line = refused("train", *TINY_RUN, *command)
        assert "out/tiny/ckpt.pt is not a readable PyTorch checkpoint" in line
        assert "start from" not in line
        assert "weights_only" not in line


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model-00001-of-00001.safetensors", "ckpt.pt",
                                  "model.safetensors.index.json"])
def test_a_git_lfs_pointer_is_called_one(tmp_path, name):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    if name.startswith("model-"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(ValueError, match=rf"/{name} is a Git LFS pointer, not the file itself: `git lfs pull`"):
        weights.open_pretrained(str(tmp_path / name if name == "ckpt.pt" else tmp_path))


def test_a_page_in_the_place_of_weights_is_called_one(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "model.safetensors").write_text("<!DOCTYPE html>")
    with pytest.raises(ValueError, match=r"model\.safetensors is an HTML page, probably from a failed download"):
        weights.open_pretrained(str(tmp_path))


def test_files_that_are_something_else_are_named(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"no checkpoint")
    torch.save([1, 2], tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match=name):
            GPT.from_pretrained(str(tmp_path / name))
    for source in ("nothing-here", "no/such/file.pt", str(tmp_path)):
        with pytest.raises(OSError, match="no model"):
            weights.resolve(source)


@pytest.mark.parametrize(("change", "message"), [
    ({"model_type": "bert"}, "only gpt2, llama, mistral, ministral, qwen2 and qwen3"),
    ({"n_inner": 20}, "of another shape"), ({"activation_function": "tanh"}, "activation_function=tanh"),
    ({"n_embd": 32}, "of another shape"),
    ({"n_layer": 3}, "missing"), ({"n_layer": 1}, "unknown"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn"), ({"quantization_config": {"bits": 8}}, "quantization")])
def test_a_folder_that_is_no_such_gpt2_says_why(tmp_path, change, message):
    save_hf(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("change", [{"n_embd": "16"}, {"n_layer": None}, {"n_head": 3}, {"activation_function": ["x"]}])
def test_values_that_are_none_are_named(tmp_path, change):
    save_hf(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=rf"config\.json|{next(iter(change))}"):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("content", [
    {"model": {}, "model_args": {"n_layer": "2"}}, {"model": {"a": 1}, "model_args": {}},
    {"model": None, "model_args": None}])
def test_a_checkpoint_with_odd_values_is_named(tmp_path, content):
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=r"ckpt\.pt"):
        GPT.from_pretrained(str(tmp_path / "ckpt.pt"))


@pytest.mark.parametrize(("name", "dtype"), [
    ("h.1.mlp.c_fc.weight", torch.int8), ("wte.weight", torch.float8_e4m3fn), ("ln_f.weight", torch.bool)])
def test_numbers_that_need_a_scale_are_named(tmp_path, name, dtype):
    save_hf(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state[f"transformer.{name}"] = state[f"transformer.{name}"].to(dtype)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"of other number types than float32, .*: {name}"):
        GPT.from_pretrained(str(tmp_path))


def test_an_index_and_its_files_do_not_fit_each_other(tmp_path):
    save_hf(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    table = {"transformer.wte.weight": state.pop("transformer.wte.weight")}
    names = dict.fromkeys(state, "model-1.safetensors") | dict.fromkeys(table, "model-2.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    save_file(state, tmp_path / "model-1.safetensors")
    with pytest.raises(FileNotFoundError, match=r"has no model-2\.safetensors"):
        GPT.from_pretrained(str(tmp_path))
    save_file(state, tmp_path / "model-2.safetensors")
    with pytest.raises(ValueError, match=r"parameters missing: wte\.weight"):
        GPT.from_pretrained(str(tmp_path))
    save_file(table | {"score.weight": torch.zeros(2, 16)}, tmp_path / "model-2.safetensors")
    with pytest.raises(ValueError, match=r"parameters unknown: score\.weight"):
        GPT.from_pretrained(str(tmp_path))


def test_broken_files_are_named(tmp_path):
    save_hf(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="broken"):
        GPT.from_pretrained(str(tmp_path))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="safetensors only"):
        GPT.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not readable JSON"):
        GPT.from_pretrained(str(tmp_path))
