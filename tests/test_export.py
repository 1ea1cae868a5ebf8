"""export.py: the folder that others load, its card, and what is refused."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from conftest import TINY_RUN, files_of, records_of
from matplotlib.image import imread
from safetensors import safe_open
from test_report import coloured_pixels, drawn_in

from flatgpt import files
from flatgpt.training.plots import render
from model import GPT

LLAMA = ("--pos=rope", "--norm=rmsnorm", "--mlp=swiglu")
OWN = ("--pos=alibi",)
TINY = Path("out/tiny")


@pytest.fixture
def run(cli, tiny_data) -> Path:
    """A run on tiny_data, whose best checkpoint is that of step 6."""
    assert cli("train", *TINY_RUN, "--keep_last=0").code == 0
    return TINY


def card_of(folder: str) -> tuple[str, str]:
    """The header of README.md, and the text below it."""
    _, header, text = Path(folder, "README.md").read_text().split("---\n", 2)
    return header, text


def run_python_block(text: str, capsys) -> str:
    """What the card's example prints when a reader runs it."""
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    capsys.readouterr()
    exec(code, {})
    return capsys.readouterr().out


@pytest.mark.parametrize(("shape", "architecture"), [((), "GPT2LMHeadModel"), (LLAMA, "LlamaForCausalLM")])
def test_transformers_loads_the_folder_and_the_cards_example_writes(cli, tiny_data, capsys, shape, architecture):
    transformers = pytest.importorskip("transformers")
    assert cli("train", *TINY_RUN, *shape).code == 0
    result = cli("export", "--run=out/tiny", "--to=hf/model")
    assert result.code == 0, result.err
    assert set(files_of(Path("hf/model"))) == {"README.md", "config.json", "generation_config.json", "loss.png",
                                               "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained("hf/model").eval()
    assert type(theirs).__name__ == architecture
    ids = torch.tensor([transformers.AutoTokenizer.from_pretrained("hf/model")("the quick").input_ids])
    torch.testing.assert_close(theirs(ids).logits, GPT.from_pretrained("out/tiny")(ids)[0], atol=1e-4, rtol=1e-4)
    header, text = card_of("hf/model")
    assert "library_name: transformers\n" in header
    text = text.replace('"model"', '"hf/model"')  # as if read in that folder
    assert len(run_python_block(text, capsys)) >= 15
    assert cli("sample", "--init_from=hf/model", "--num_samples=1", "--max_new_tokens=20").code == 0


@pytest.mark.parametrize("shape", [(), LLAMA])
def test_the_files_have_what_vllm_and_llama_cpp_look_for(cli, tiny_data, shape):
    """By what their loaders read: names of classes and tensors, sizes, the number type, the tokenizer's own files."""
    Path("tiny.txt").write_text("to be or not to be, that is the question\n" * 300)
    assert cli("prepare_data", "--input=tiny.txt", "--name=words", "--tokenizer=bpe", "--vocab_size=300").code == 0
    assert cli("train", *TINY_RUN, *shape, "--dataset=words").code == 0
    assert cli("export", "--run=out/tiny", "--to=folder").code == 0
    config = json.loads(Path("folder/config.json").read_text())
    assert config["torch_dtype"] == "float32"
    tokenizer = json.loads(Path("folder/tokenizer.json").read_text())
    assert (tokenizer["model"]["type"], tokenizer["pre_tokenizer"]["type"]) == ("BPE", "ByteLevel")
    settings = json.loads(Path("folder/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_max_length"] == 16
    with safe_open("folder/model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert weights.metadata() == {"format": "pt"}
        if shape:
            assert config["architectures"] == ["LlamaForCausalLM"]
            assert {"max_position_embeddings", "rms_norm_eps", "rope_theta", "num_key_value_heads"} <= config.keys()
            assert {"model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"} <= names
        else:
            assert config["architectures"] == ["GPT2LMHeadModel"]
            sizes = [config[key] for key in ("n_ctx", "n_positions", "n_embd", "n_head", "n_layer")]
            assert sizes == [16, 16, 16, 2, 2]
            assert weights.get_slice("transformer.h.1.mlp.c_fc.weight").get_shape() == [16, 64]  # Conv1D
    assert not any(name.endswith((".attn.bias", "inv_freq")) for name in names)
    assert not Path("folder/training").exists()


def test_the_card_says_what_the_run_recorded_and_no_folder_of_this_machine(cli, tmp_path):
    source = tmp_path / "private" / "texts.txt"
    source.parent.mkdir()
    source.write_text("".join(f"{i} bottles of beer on the wall\n" for i in range(2000)))
    assert cli("prepare_data", f"--input={source}", "--name=beer", "--tokenizer=char").code == 0
    out = tmp_path / "private" / "run"
    assert cli("train", *TINY_RUN, f"--dataset={tmp_path}/data/beer", f"--out_dir={out}").code == 0
    assert cli("export", f"--run={out}", "--to=folder").code == 0
    _, text = card_of("folder")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    final = next(record for record in reversed(records) if "val/loss" in record)
    assert f"| final validation loss of the run | {final['val/loss']:.4f} |" in text
    assert f"| best validation loss of the run | {final['val/sampled_loss']:.4f} |" in text
    assert f"| parameters | {GPT.from_pretrained(out).num_params(False):,} |" in text
    assert "| tokens seen | 768 |" in text
    assert "| learning_rate | 0.01 |" in text
    assert "- `beer`: made from texts.txt; tokens: " in text
    assert "## Licence\n\nNot stated yet." in text
    assert str(tmp_path) not in text
    assert "private" not in text


def test_the_cards_curve_is_the_runs(cli, run, monkeypatch):
    figures = []
    monkeypatch.setattr("export.render", lambda figure, kind: figures.append(figure) or render(figure, kind))
    assert cli("export", f"--run={run}", "--to=folder").code == 0
    [figure], records = figures, records_of(run)
    shown = drawn_in(figure)
    assert shown["training"].tolist() == [[r["tokens"], r["train/loss"]] for r in records if "train/loss" in r]
    assert shown["validation"].tolist() == [[r["tokens"], r.get("val/sampled_loss", r["val/loss"])] for r in records
                                            if "val/loss" in r]
    assert shown["whole split"].tolist() == [[records[-1]["tokens"], records[-1]["val/loss"]]]
    assert [len(shown[what]) for what in ("training", "validation")] == [6, 3]
    assert imread("folder/loss.png").shape[:2] == (740, 1080)
    assert coloured_pixels(Path("folder/loss.png")) > 300


def test_a_data_set_of_the_hub_is_named_and_one_that_is_gone_is_not_made_up(cli, run, tiny_data):
    record = json.loads((tiny_data / "dataset.json").read_text())
    record["arguments"] |= {"source": "tinystories", "commit": "0123abc"}
    files.write_json(tiny_data / "dataset.json", record)
    assert cli("export", f"--run={run}", "--to=one").code == 0
    header, text = card_of("one")
    assert "datasets:\n- roneneldan/TinyStories\n" in header
    assert "[roneneldan/TinyStories](https://huggingface.co/datasets/roneneldan/TinyStories), commit 0123abc" in text
    tiny_data.rename("elsewhere")
    assert cli("export", f"--run={run}", "--to=two").code == 0
    header, text = card_of("two")
    assert "datasets" not in header
    assert "`tiny`; its origin was no longer known" in text


def test_a_shape_of_our_own_is_exported_for_flatgpt(cli, tiny_data):
    assert cli("train", *TINY_RUN, *OWN).code == 0
    assert cli("export", "--run=out/tiny", "--to=folder").code == 0
    header, text = card_of("folder")
    assert "library_name" not in header
    assert "transformers has no model of this shape" in text
    assert cli("sample", "--init_from=folder", "--num_samples=1", "--max_new_tokens=20").code == 0


def test_any_checkpoint_that_is_kept_can_be_exported(cli, run):
    for name, step in (("latest", 6), ("step_3", 3), ("step_00000003", 3)):
        assert cli("export", f"--run={run}", f"--to={name}", f"--checkpoint={name}").code == 0
        weights = run / f"checkpoints/step_{step:08d}/model.safetensors"
        assert Path(name, "model.safetensors").read_bytes() == weights.read_bytes()
        assert f"| step | {step} of 6 |" in card_of(name)[1]


@pytest.mark.parametrize(("options", "message"), [
    ([], "--to=FOLDER says where"),
    (["--to=data"], "data exists already: choose another --to"),
    (["--to=x", "--checkpoint=step_4"], "in out/tiny; it has best, latest, step_3, step_6"),
    (["--to=x", "--run=data"], "data is not a run folder with checkpoints"),
    (["--to=x", "--push=name"], "push='name' is no name of a repository: owner/name"),
    (["--to=x", "--push=owner/name"], "pushing needs a token"),
    (["--to=x", "--public=True"], "public=True is for --push"),
])
def test_what_cannot_work_is_one_line_and_writes_nothing(refused, run, monkeypatch, options, message):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    before = files_of(Path.cwd())
    assert message in refused("export", "--run=out/tiny", *options)
    assert files_of(Path.cwd()) == before


def test_a_damaged_checkpoint_or_a_failed_write_leaves_no_folder(refused, run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_text", lambda path, text: (_ for _ in ()).throw(OSError(28, "No space left", "x")))
        assert "No space left" in refused("export", f"--run={run}", "--to=hf/model")
    assert list(Path("hf").iterdir()) == []
    with open(run / "checkpoints/best/model.safetensors", "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\1")
    assert "model.safetensors has changed since it was saved" in refused("export", f"--run={run}", "--to=hf/model")
    assert list(Path("hf").iterdir()) == []


class Hub:
    """Stands in for huggingface_hub.HfApi, and keeps what it was asked."""

    calls: ClassVar[list] = []
    is_private = True

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        return f"https://huggingface.co/{repo_id}"

    def repo_info(self, repo_id):
        return SimpleNamespace(private=self.is_private)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append(("upload_folder", repo_id, set(os.listdir(folder_path))))


@pytest.fixture
def hub(monkeypatch) -> type[Hub]:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_token")
    monkeypatch.setattr(Hub, "calls", [])
    return Hub


@pytest.mark.parametrize("public", [False, True])
def test_push_uploads_the_folder_and_is_private_unless_told(cli, run, hub, monkeypatch, public):
    monkeypatch.setattr(hub, "is_private", not public)
    result = cli("export", f"--run={run}", "--to=folder", "--push=owner/name", f"--public={public}")
    assert result.code == 0, result.err
    assert hub.calls == [("create_repo", "owner/name", {"private": not public, "exist_ok": True}),
                         ("upload_folder", "owner/name", set(os.listdir("folder")))]
    assert "pushed to https://huggingface.co/owner/name" in result.out
    assert 'from_pretrained("owner/name")' in card_of("folder")[1]


def test_push_into_a_repository_that_is_public_has_to_be_meant(refused, run, hub, monkeypatch):
    monkeypatch.setattr(hub, "is_private", False)
    error = refused("export", f"--run={run}", "--to=folder", "--push=owner/name")
    assert "folder is complete, but was not pushed: owner/name exists and is public" in error
    assert [call[0] for call in hub.calls] == ["create_repo"]


def test_a_push_that_fails_says_how_to_try_again(refused, run, hub, monkeypatch):
    def no_network(self, repo_id, **options):
        raise RuntimeError("no route to the hub\nand more")

    monkeypatch.setattr(hub, "create_repo", no_network)
    error = refused("export", f"--run={run}", "--to=folder", "--push=owner/name")
    assert "could not be pushed to owner/name: RuntimeError: no route to the hub" in error
    assert "hf upload owner/name folder . --private" in error
    assert Path("folder/model.safetensors").is_file()
