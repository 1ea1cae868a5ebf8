"""train.py in one process: where a run starts, how it goes on, and what it refuses."""

import hashlib
import json
import math
import os
import pickle
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TEXT, TINY_RUN, files_of, on_ranks, records_of, write_shard
from test_families import save_as_before
from test_weights import Planted, save_hf, save_nanogpt
from torch.utils._python_dispatch import TorchDispatchMode

import train
from flatgpt.data.order import TrainOrder
from flatgpt.data.shards import open_dataset
from flatgpt.data.tokenizer import ByteTokenizer, load_tokenizer
from flatgpt.run_folder import read_trainer
from flatgpt.training import checkpoint
from flatgpt.training.checkpoint import RunConfig, RunFolder
from flatgpt.training.distributed import Job
from model import GPT, GPTConfig

LATEST = Path("out/tiny/checkpoints/latest")


def weights_of(run: str = "out/tiny") -> bytes:
    return Path(run, "checkpoints/latest/model.safetensors").read_bytes()


@pytest.mark.parametrize("option", ["--dropout=0.0", "--dropout=0.2", "--optimizer=muon",
                                    "--optimizer=muon --muon_beta2=0.9 --width_base=8"])
def test_two_halves_end_byte_identical_to_the_whole(cli, tiny_data, option):
    options = (*TINY_RUN, *option.split())
    assert cli("train", *options, "--out_dir=out/whole").code == 0
    assert cli("train", *options, "--max_iters=3").code == 0
    result = cli("train", *options)
    assert "resuming out/tiny at step 3; changed: out_dir" not in result.out
    assert "changed: max_iters was 3, is 6" in result.out
    assert weights_of() == weights_of("out/whole")
    assert Path(LATEST, "training/optimizer.safetensors").read_bytes() == Path(
        "out/whole/checkpoints/latest/training/optimizer.safetensors").read_bytes()
    records = records_of("out/tiny")
    assert [r["step"] for r in records if "resumed" in r] == [3]
    assert [r["step"] for r in records if "resumed" not in r] == [r["step"] for r in records_of("out/whole")]


def test_the_loop_makes_the_updates_that_its_parts_define(cli, tiny_data):
    """Six steps written out with whole batches, plain AdamW and no micro-batches."""
    assert cli("train", *TINY_RUN).code == 0
    trained = GPT.from_pretrained("out/tiny")
    torch.manual_seed(1337)
    model = GPT(trained.config)
    order = TrainOrder(open_dataset("tiny").splits["train"], 16, 1337)
    decay = [{"params": [p for p in model.parameters() if (p.dim() > 1) == is_matrix], "weight_decay": wd}
             for is_matrix, wd in ((True, 0.1), (False, 0.0))]
    optimizer = torch.optim.AdamW(decay, betas=(0.9, 0.95))
    for step in range(6):
        rows = torch.from_numpy(order.rows(step * 8, 8))
        x, y = rows[:, :-1], rows[:, 1:]
        loss = torch.nn.functional.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = train.optim.learning_rate(step, train.optim.OptimConfig(
                learning_rate=1e-2, warmup_iters=2, lr_decay_iters=6))
        optimizer.step()
        optimizer.zero_grad()
    for (name, a), b in zip(model.named_parameters(), trained.parameters()):
        # An update is about learning_rate, 1e-2; Adam makes rounding in the smallest gradients visible.
        torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-4, msg=f"{name}: {a} {b}")
    last = [record for record in records_of("out/tiny") if "train/loss" in record][-1]
    assert last["train/loss"] == pytest.approx(loss.item(), abs=1e-4)


class Course(TorchDispatchMode):
    """The course of a loop: where it begins a forward pass, reads a number from the device, which waits for all that
    was launched before, and updates the weights."""

    def __init__(self):
        super().__init__()
        aten, self.seen = torch.ops.aten, []
        self.parts = {aten.embedding.default: "forward", aten._local_scalar_dense.default: "read",
                      aten._fused_adamw_.default: "update"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.parts and self.seen[-1:] != [self.parts[func]]:
            self.seen.append(self.parts[func])
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_between_an_update_and_the_next_step(cli, tiny_data):
    with Course() as course:
        result = cli("train", *TINY_RUN, "--max_iters=3", "--eval_interval=10", "--always_save_checkpoint=False")
    assert result.code == 0, result.err
    evaluation, step = ["forward", "read"], ["forward", "read", "update"]
    assert course.seen == [*evaluation, *3 * step, *evaluation, *evaluation], "a step waits for the device once"


def test_the_micro_batch_changes_nothing_but_rounding(cli, tiny_data):
    assert "2 micro-batches x 4 sequences" in cli("train", *TINY_RUN, "--eval_iters=0").out
    other = [option for option in TINY_RUN if "accumulation" not in option]  # 128 tokens in another way
    assert "4 micro-batches x 2 sequences" in cli("train", *other, "--batch_size=3", "--total_batch_size=128",
                                                  "--eval_iters=0", "--out_dir=out/other").out
    for a, b in zip(*(GPT.from_pretrained(f"out/{run}").parameters() for run in ("tiny", "other"))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_trainer_state_is_the_documented_one(cli, tiny_data):
    assert cli("train", *TINY_RUN).code == 0
    state = read_trainer(LATEST)
    assert (state["step"], state["next_seq"], state["tokens"]) == (6, 48, 48 * 16)
    assert state["options"] == json.loads(Path("out/tiny/train_config.json").read_text())
    assert {"best_val_loss", "scaler", "micro_batch", "seed", "data_fingerprint", "versions"} <= state.keys()


def test_a_finished_run_says_so_and_is_left_alone(cli, tiny_data):
    assert cli("train", *TINY_RUN).code == 0
    before = files_of(Path("out"))
    result = cli("train", *TINY_RUN)
    assert result.code == 0
    assert "out/tiny is finished: 6 steps" in result.out
    assert files_of(Path("out")) == before


def test_a_target_ends_a_run_as_finished(cli, tiny_data):
    """At the first evaluation at or below it, with the time that training took, and for good."""
    options = (*TINY_RUN, "--max_iters=300", "--lr_decay_iters=300", "--eval_interval=20", "--eval_iters=4")
    result = cli("train", *options, "--target_val_loss=3.0")
    assert result.code == 0, result.err
    records = records_of("out/tiny")
    evaluated = [record for record in records if "val/loss" in record]
    step, reached = evaluated[-1]["step"], records[-1]
    assert 0 < step < 300
    assert evaluated[-1]["val/sampled_loss"] <= 3.0 < min(record["val/loss"] for record in evaluated[:-1])
    assert (reached["step"], reached["tokens"], reached["reached"]) == (step, 128 * step, 3.0)
    assert 0 < reached["train_s"] < reached["elapsed_s"]
    assert reached["machine"].startswith("1 x cpu (")
    assert f"step {step}: reached the target, a val loss of 3, after {128 * step:,} tokens and " in result.out
    assert read_trainer(LATEST)["step"] == step
    before = files_of(Path("out"))
    again = cli("train", *options, "--target_val_loss=3.0")
    assert f"out/tiny is finished: after {step} steps its best val loss is" in again.out
    assert files_of(Path("out")) == before
    assert cli("report", "out/tiny").code == 0
    assert f"3<small>step {step}</small>" in Path("report.html").read_text()
    assert cli("train", *options, "--target_val_loss=0.1").code == 0
    assert read_trainer(LATEST)["step"] == 300


def test_a_target_that_the_start_has_reached_leaves_a_checkpoint(cli, tiny_data):
    assert cli("train", *TINY_RUN, "--target_val_loss=20").code == 0
    assert read_trainer(LATEST)["step"] == 0
    assert "is finished: after 0 steps" in cli("train", *TINY_RUN, "--target_val_loss=20").out


def test_a_target_of_0_is_none_also_for_a_loss_of_0(cli):
    Path("tiny.txt").write_text("a" * 2000)
    assert cli("prepare_data", "--input=tiny.txt", "--name=tiny", "--tokenizer=char").code == 0
    for max_iters in (1, 2):
        result = cli("train", *TINY_RUN, f"--max_iters={max_iters}")
        assert result.code == 0, result.err
        assert "reached the target" not in result.out
        assert read_trainer(LATEST)["step"] == max_iters
    assert read_trainer(LATEST)["best_val_loss"] == 0


@pytest.mark.parametrize("num_tokens", [100, 128, 1])
def test_an_evaluation_can_read_the_first_tokens_whole(cli, tiny_data, num_tokens):
    result = cli("train", *TINY_RUN, f"--eval_tokens={num_tokens}")
    assert result.code == 0, result.err
    evaluated = [record for record in records_of("out/tiny") if "val/loss" in record]
    assert "val/sampled_loss" not in evaluated[-1]
    tokens = open_dataset("tiny").splits["val"].shards[0][:num_tokens + 1].astype(np.int64)
    model, losses = GPT.from_pretrained("out/tiny"), []
    for start in range(0, num_tokens, 16):
        x, y = (torch.from_numpy(tokens[start + shift:min(start + 16, num_tokens) + shift]) for shift in (0, 1))
        losses += torch.nn.functional.cross_entropy(model(x[None])[0][0], y, reduction="none").tolist()
    assert len(losses) == num_tokens
    said = cli("train", *TINY_RUN, f"--eval_tokens={num_tokens}", "--eval_only=True").out
    assert f"{evaluated[-1]['val/loss']:.4f} on the first {num_tokens:,} tokens of the validation split" in said
    assert cli("report", "out/tiny").code == 0
    assert "whole split" not in Path("report.html").read_text()
    assert evaluated[-1]["val/loss"] == pytest.approx(sum(losses) / num_tokens, abs=1e-5)


def test_more_tokens_than_the_split_has_are_refused(refused, tiny_data):
    line = refused("train", *TINY_RUN, "--eval_tokens=1000000")
    assert "tokens less to evaluate on than eval_tokens says" in line
    assert not Path("out").exists()


def test_eval_only_reads_the_whole_split_and_writes_nothing(cli, tiny_data):
    *_, warning, line = cli("train", *TINY_RUN, "--eval_only=True").out.splitlines()
    assert "no checkpoint was read: the weights are random" in warning
    fresh = float(line.split()[4])
    assert fresh == pytest.approx(math.log(len(set(TEXT))), abs=0.05)
    assert not Path("out").exists()
    assert cli("train", *TINY_RUN).code == 0
    before = files_of(Path("out"))
    final = records_of("out/tiny")[-1]["val/loss"]
    assert f"step 6: val loss {final:.4f} on the whole" in cli("train", *TINY_RUN, "--eval_only=True").out
    assert files_of(Path("out")) == before


@pytest.mark.parametrize(("options", "saved"), [
    (["--always_save_checkpoint=True"], [3, 6]), (["--save_interval=2"], [2, 3, 4, 6]),
    (["--save_interval=4", "--keep_last=1"], [6])])
def test_checkpoints_fall_where_the_options_say(cli, tiny_data, options, saved):
    assert cli("train", *TINY_RUN, "--keep_last=0", *options).code == 0
    assert [int(p.name[5:]) for p in sorted(Path("out/tiny/checkpoints").glob("step_*"))] == saved


def test_only_improvements_are_saved_when_asked(cli, tiny_data):
    assert cli("train", *TINY_RUN, "--keep_last=0", "--eval_interval=1", "--always_save_checkpoint=False",
               "--learning_rate=2.0", "--decay_lr=False", "--grad_clip=0").code == 0  # a loss that goes up and down
    losses = {r["step"]: r.get("val/sampled_loss", r["val/loss"])
              for r in records_of("out/tiny") if "val/loss" in r}
    # The start is evaluated as well, but there is no checkpoint of it.
    best_at = [s for s in range(1, 7) if losses[s] < min((losses[e] for e in range(1, s)), default=math.inf)]
    saved = [int(p.name[5:]) for p in sorted(Path("out/tiny/checkpoints").glob("step_*"))]
    assert saved == sorted({*best_at, 6})
    assert len(saved) < 6


# Starting from elsewhere


def test_fine_tuning_starts_from_the_given_weights(cli, tiny_data, tmp_path):
    save_nanogpt(tmp_path / "ckpt.pt", vocab_size=64)
    save_hf(tmp_path / "hf", vocab_size=64, bos_token_id=None, eos_token_id=None)
    for source in ("ckpt.pt", "hf"):
        options = ("--dataset=tiny", f"--init_from={source}", "--batch_size=4", "--gradient_accumulation_steps=1",
                   "--max_iters=2", "--eval_interval=2", "--eval_iters=1", f"--out_dir=out/{source}",
                   "--decay_lr=False", "--learning_rate=1e-3", "--device=cpu")
        result = cli("train", *options)
        assert result.code == 0, result.err
        start = GPT.from_pretrained(str(tmp_path / source))
        tuned = GPT.from_pretrained(f"out/{source}")
        assert tuned.config.block_size == 32
        assert tuned.config.dropout == 0.0  # the option's, not the file's
        far = max((a - b).abs().max().item() for a, b in zip(start.parameters(), tuned.parameters()))
        assert 0 < far < 0.01
        assert "is finished" in cli("train", *options).out


def test_init_from_resume_takes_the_shape_from_the_checkpoint_and_keeps_the_start(cli, refused, tiny_data, tmp_path):
    save_hf(tmp_path / "models" / "base", vocab_size=64, bos_token_id=None, eos_token_id=None)
    options = [option for option in TINY_RUN if not option.startswith(("--n_", "--block_size"))]
    assert cli("train", *options, "--init_from=models/base").code == 0
    shutil.rmtree("models")
    result = cli("train", *options, "--init_from=resume", "--max_iters=8")
    assert result.code == 0, result.err
    assert "resuming out/tiny at step 6; changed: max_iters was 6, is 8" in result.out
    trainer = read_trainer(LATEST)
    assert (trainer["step"], trainer["options"]["n_layer"], trainer["options"]["block_size"]) == (8, 2, 32)
    assert trainer["options"]["init_from"] == f"{tmp_path}/models/base"
    assert cli("export", "--run=out/tiny", "--to=folder").code == 0
    card = Path("folder/README.md").read_text()
    assert "trained further from base with flatGPT" in card
    assert "base_model" not in card
    assert str(tmp_path) not in card
    assert "n_layer was 2, is 12" in refused("train", *options)  # the same command is meant, or init_from=resume


def test_a_start_that_training_does_not_improve_leaves_a_best_checkpoint_all_the_same(cli, tiny_data, monkeypatch):
    losses = iter([1.0, 3.0, 2.0, 2.0])
    monkeypatch.setattr("flatgpt.training.metrics.validation_loss", lambda *args, **kwargs: next(losses))
    assert cli("train", *TINY_RUN).code == 0
    assert os.readlink("out/tiny/checkpoints/best") == "step_00000006"
    assert read_trainer(LATEST)["best_val_loss"] == 2.0


def test_data_in_another_tokenizers_ids_is_not_fed_to_a_model(cli, refused, tiny_data, tmp_path):
    """Where both are known. A model with more tokens than the data's, one for padding say, is fine."""
    save_hf(tmp_path / "model", vocab_size=300, bos_token_id=256, eos_token_id=256)
    ByteTokenizer().save(tmp_path / "model")
    base = [option for option in TINY_RUN if not option.startswith("--n_")]
    line = refused("train", *base, "--init_from=model")
    assert "its tokenizer gives other ids than that of tiny: prepare the data with --tokenizer=" in line
    assert line.endswith(f"{tmp_path}/model")
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 200)
    assert cli("prepare_data", "--input=text.txt", "--name=bytes", f"--tokenizer={tmp_path}/model").code == 0
    tokenizer = load_tokenizer("model")
    tokenizer.hf.add_special_tokens(["[PAD]"])
    tokenizer.save("model")
    assert cli("train", *base, "--init_from=model", "--dataset=bytes").code == 0


def test_a_model_of_gpt2s_size_without_a_tokenizer_needs_none_to_be_trained(cli, tiny_data, tmp_path, monkeypatch):
    """GPT-2's may not be to be had; and whether it is the model's nobody knows."""
    def missing():
        raise OSError("GPT-2's tokenizer could not be downloaded")

    monkeypatch.setattr("flatgpt.models.inference.GPT2Tokenizer", missing)
    save_hf(tmp_path / "bare", vocab_size=50257, bos_token_id=None, eos_token_id=None)
    base = [option for option in TINY_RUN if not option.startswith("--n_")]
    result = cli("train", *base, "--init_from=bare", "--max_iters=1")
    assert result.code == 0, result.err
    result = cli("eval", "--init_from=bare", "--dataset=tiny", "--device=cpu")
    assert result.code == 0, result.err
    assert "bits per byte" in result.out  # by the data's own tokenizer


def test_fine_tuning_on_a_shorter_context_crops_and_contradictions_are_listed(cli, refused, tiny_data, tmp_path):
    save_hf(tmp_path / "hf", vocab_size=64)
    base = [o for o in TINY_RUN if not o.startswith("--n_")]
    assert cli("train", *base, "--init_from=hf").code == 0
    assert GPT.from_pretrained("out/tiny").config.block_size == 16
    line = refused("train", *base, "--init_from=hf", "--out_dir=out/x", "--n_layer=5", "--mlp=gelu")
    assert "n_layer=5 was asked for, and it has 2" in line
    assert "mlp=gelu was asked for, and it has gelu_tanh" in line
    assert "block_size=64" in refused("train", *base, "--init_from=hf", "--out_dir=out/x", "--block_size=64")
    save_hf(tmp_path / "small", vocab_size=20, bos_token_id=None, eos_token_id=None)
    assert "its vocabulary is 20" in refused("train", *base, "--init_from=small", "--out_dir=out/x")
    assert not Path("out/x").exists()


def headerless(folder: Path, meta: bool) -> None:
    """A data set of nanoGPT's making."""
    folder.mkdir(parents=True)
    text = "to be, or not to be: that is the question\n" * 200
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = np.array([stoi[c] for c in text], dtype=np.uint16)
    ids[:7000].tofile(folder / "train.bin")
    ids[7000:].tofile(folder / "val.bin")
    if meta:
        table = {"vocab_size": len(stoi), "stoi": stoi, "itos": {i: c for c, i in stoi.items()}}
        (folder / "meta.pkl").write_bytes(pickle.dumps(table))


@pytest.mark.parametrize("meta", [True, False])
def test_nanogpts_config_and_data_train_unmodified(cli, tmp_path, meta):
    headerless(tmp_path / "data" / "hamlet", meta)
    Path("hamlet.py").write_text('''
# train a tiny character-level model, quickly
import time
out_dir = 'out-hamlet'
eval_interval = 4 # keep frequent
eval_iters = 2
log_interval = 1
always_save_checkpoint = False
wandb_log = False
wandb_run_name = 'mini-' + str(time.time())
dataset = 'hamlet'
gradient_accumulation_steps = 1
batch_size = 4
block_size = 16
n_layer = 1
n_head = 2
n_embd = 16
dropout = 0.2
learning_rate = 1e-3
max_iters = 4
lr_decay_iters = 4
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 1
device = 'cpu'
compile = False
''')
    result = cli("train", "hamlet.py")
    assert result.code == 0, result.err
    model = GPT.from_pretrained("out-hamlet")
    assert model.config.mlp == "gelu"
    if meta:
        assert model.config.vocab_size == len(set("to be, or not to be: that is the question\n"))
        assert cli("sample", "--out_dir=out-hamlet", "--start=to be", "--num_samples=1", "--device=cpu").code == 0
    else:
        assert model.config.vocab_size == 50257


def test_the_batch_goes_by_the_context_that_the_weights_bring(cli, tiny_data, tmp_path):
    save_nanogpt(tmp_path / "ckpt.pt", vocab_size=64)
    options = ("--dataset=tiny", "--init_from=ckpt.pt", "--total_batch_size=128", "--max_iters=1", "--eval_iters=1",
               "--out_dir=out/tuned", "--device=cpu")
    assert "128 tokens a step = 1 micro-batches x 4 sequences x 32 tokens" in cli("train", *options).out
    saved = json.loads(Path("out/tuned/train_config.json").read_text())
    assert (saved["block_size"], saved["n_layer"], saved["n_embd"]) == (32, 2, 16)
    (tmp_path / "ckpt.pt").unlink()  # a run that goes on does not need it any more
    assert "resuming out/tuned at step 1; changed: max_iters was 1, is 2" in cli("train", *options, "--max_iters=2").out


BY_TRIAL = tuple(option for option in TINY_RUN if not option.startswith("--dtype"))


def faster(monkeypatch, winner: str) -> None:
    """A processor with instructions for bfloat16 on which every trial is won by that number type."""
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr("flatgpt.training.device.time_in_turn", lambda steps: {
        choice: 1 + (str(choice) != f"{winner} with attention=sdpa") for choice in steps})


@pytest.mark.parametrize(("first", "then"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_number_type_of_a_trial_is_kept_from_the_first_step_on(cli, tiny_data, monkeypatch, first, then):
    """Over a kill before there is a checkpoint, and over a resume, whatever another trial would say."""
    faster(monkeypatch, first)
    with monkeypatch.context() as killed:
        killed.setattr("flatgpt.data.loader.prefetch", lambda *args: (_ for _ in ()).throw(OSError("killed")))
        assert "killed" in cli("train", *BY_TRIAL).err
    assert not list(Path("out/tiny/checkpoints").iterdir())
    faster(monkeypatch, then)
    result = cli("train", *BY_TRIAL)
    assert f"parameters, torch.{first} on 1 x cpu" in result.out
    assert "a trial took" not in result.out
    assert "changed" not in cli("train", *BY_TRIAL, "--max_iters=8").out.replace("changed: max_iters was 6, is 8", "")
    options = read_trainer(LATEST)["options"]
    assert (options["dtype"], options["attention"], options["device"]) == (first, "sdpa", "cpu")
    assert options == json.loads(Path("out/tiny/train_config.json").read_text())
    assert f"{then} with attention=sdpa: a trial took" in cli(
        "train", *BY_TRIAL, "--resume=never", "--overwrite=True").out
    assert read_trainer(LATEST)["options"]["dtype"] == then


def test_a_checkpoint_that_recorded_auto_goes_on_by_the_old_rule(cli, tiny_data, monkeypatch):
    """As versions did that made no trial: bfloat16 where there are instructions, short windows by the formula."""
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr("flatgpt.training.device.time_in_turn", None)
    assert cli("train", *BY_TRIAL, "--dtype=bfloat16", "--attention=math").code == 0
    trainer = Path(LATEST, "training", "trainer.json")
    recorded = json.loads(trainer.read_text())
    recorded["options"] |= dict.fromkeys(("device", "dtype", "attention"), "auto")
    trainer.write_text(json.dumps(recorded))
    checkpoint._write_sums(trainer.parent.parent)
    result = cli("train", *BY_TRIAL, "--max_iters=8")
    assert "resuming out/tiny at step 6; changed: max_iters was 6, is 8\n" in result.out
    options = read_trainer(LATEST)["options"]
    assert (options["dtype"], options["attention"]) == ("bfloat16", "math")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_waits_for_the_device_once(cli, tiny_data, monkeypatch, optimizer):
    """For loss, norm and stop flag together; the hash of the batch, made before them, is there as well."""
    waits = Counter()
    for name in ("tolist", "item", "__int__", "__float__", "__bool__", "__index__"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, name=name, read=read: (
            waits.update([name]), read(tensor))[1])
    seen = []
    for steps in (3, 8):
        waits.clear()
        assert cli("train", *TINY_RUN, f"--optimizer={optimizer}", f"--max_iters={steps}", "--eval_interval=100",
                   "--log_interval=100", f"--out_dir=out/{steps}").code == 0
        seen.append(waits.copy())
    assert seen[1] - seen[0] == {"tolist": 5, "__int__": 5}


def test_a_checkpoint_of_the_first_muon_goes_on_and_says_what_changed(cli, tiny_data):
    assert cli("train", *TINY_RUN, "--optimizer=muon", "--max_iters=3").code == 0
    trainer = Path(LATEST, "training", "trainer.json")
    recorded = json.loads(trainer.read_text())
    assert recorded.pop("muon_version") == 2
    trainer.write_text(json.dumps(recorded))
    checkpoint._write_sums(trainer.parent.parent)
    assert "Muon orthogonalises queries, keys and values" in cli(
        "train", *TINY_RUN, "--optimizer=muon", "--max_iters=4").out
    assert read_trainer(LATEST)["step"] == 4
    assert "Muon" not in cli("train", *TINY_RUN, "--optimizer=muon", "--max_iters=5").out


def train_on_a_rank_with_its_own_trial(folder: str) -> None:
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patched:
        faster(patched, "float32" if os.environ["RANK"] == "0" else "bfloat16")
        train.main([*BY_TRIAL])


def test_rank_0_decides_the_number_type_for_all(tiny_data, tmp_path):
    on_ranks(2, train_on_a_rank_with_its_own_trial, tmp_path)
    options = json.loads(Path(tmp_path, "out/tiny/train_config.json").read_text())
    assert (options["dtype"], options["attention"]) == ("float32", "sdpa")


def test_a_conversion_without_steps_can_be_resumed(cli, tiny_data):
    assert cli("train", *TINY_RUN, "--max_iters=0").code == 0
    assert cli("train", *TINY_RUN).code == 0
    assert cli("train", *TINY_RUN, "--out_dir=out/whole").code == 0
    assert weights_of() == weights_of("out/whole")


def test_eval_only_evaluates_what_init_from_names_whatever_lies_in_out_dir(cli, tiny_data, tmp_path):
    assert cli("train", *TINY_RUN).code == 0
    save_nanogpt(tmp_path / "ckpt.pt", vocab_size=64)
    options = ("--dataset=tiny", "--init_from=ckpt.pt", "--eval_only=True", "--out_dir=out/tiny", "--device=cpu")
    assert "step 0: val loss 4." in cli("train", *options).out  # ln 64 = 4.16
    other_batch = ("--batch_size=7", "--gradient_accumulation_steps=1", "--eval_only=True")
    assert "step 6: val loss" in cli("train", *TINY_RUN, *other_batch).out


def test_a_nan_evaluation_is_not_the_best_and_not_the_end(cli, tiny_data, monkeypatch):
    losses = iter([float("nan"), 2.0, float("nan"), 1.0, 1.0])
    monkeypatch.setattr("flatgpt.training.metrics.validation_loss", lambda *args, **kwargs: next(losses))
    assert cli("train", *TINY_RUN, "--max_iters=3", "--eval_interval=1").code == 0
    assert [r["val/loss"] for r in records_of("out/tiny") if "val/loss" in r] == [None, 2.0, None, 1.0]
    assert read_trainer(LATEST)["best_val_loss"] == 1.0
    assert "NaN" not in Path("out/tiny/metrics.jsonl").read_text()


def test_a_vocabulary_that_grew_is_not_fed_to_the_old_model(cli, refused, tmp_path):
    headerless(tmp_path / "data" / "tiny", meta=False)
    assert cli("train", *TINY_RUN, "--vocab_size=100", "--max_iters=2").code == 0
    assert "data_vocab_size was 100, is 600" in refused("train", *TINY_RUN, "--vocab_size=600")


def test_a_nanogpt_folder_is_not_touched_by_resume(refused, tiny_data, tmp_path):
    (tmp_path / "nano").mkdir()
    save_nanogpt(tmp_path / "nano" / "ckpt.pt")
    line = refused("train", *TINY_RUN, "--init_from=resume", "--out_dir=nano")
    assert "--init_from=nano/ckpt.pt" in line
    assert files_of(tmp_path / "nano").keys() == {"ckpt.pt"}


# Shards of others


def fineweb(folder: Path, tokens: np.ndarray) -> Path:
    """Shards as llm.c and modded-nanogpt have them."""
    folder.mkdir(parents=True)
    for name, part in (("train_000001", tokens[:500]), ("train_000002", tokens[500:800]), ("val_000000", tokens[800:])):
        write_shard(folder / f"fineweb_{name}.bin", part)
    return folder


def test_a_fineweb_folder_trains_from_where_it_lies(cli, tmp_path, gpt2_tokenizer):
    tokens = gpt2_tokenizer.encode("the quick brown fox jumps over the lazy dog. " * 100)
    folder = fineweb(tmp_path / "elsewhere" / "fineweb10B", tokens[:900])
    before = files_of(folder)
    options = (*TINY_RUN, f"--dataset={folder}", "--tokenizer=gpt2", "--max_iters=3")
    assert cli("train", *options).code == 0
    assert GPT.from_pretrained("out/tiny").config.vocab_size == 50257
    first, last = (record["val/loss"] for record in (records_of("out/tiny")[0], records_of("out/tiny")[-1]))
    assert first == pytest.approx(math.log(50257), abs=0.1)
    assert last < first
    assert load_tokenizer(LATEST).encode("the fox").tolist() == gpt2_tokenizer.encode("the fox").tolist()
    assert cli("sample", "--out_dir=out/tiny", "--prompt=the", "--num_samples=1", "--max_new_tokens=3",
               "--device=cpu").code == 0
    assert files_of(folder) == before
    assert not Path("data").exists()


@pytest.mark.parametrize(("dataset", "folder"), [("tiny", "tiny"), ("hamlet", "hamlet"),
                                                 ("fineweb:0.5,tiny:0.5", "tiny")])
def test_gpt2_is_not_taken_for_the_tokenizer_of_what_says_otherwise(refused, tiny_data, gpt2_tokenizer, dataset,
                                                                    folder):
    headerless(Path("data/hamlet"), meta=True)
    fineweb(Path("data/fineweb"), np.arange(90).repeat(10))
    line = refused("train", *TINY_RUN, f"--dataset={dataset}", "--tokenizer=gpt2")
    assert f"tokenizer=gpt2 has 50257 tokens, but data/{folder} has a vocabulary of" in line
    assert not Path("out").exists()


# Mixtures


@pytest.fixture
def two_data_sets(cli, tmp_path) -> tuple[str, ...]:
    """The options of a run on data/a and data/b, of the same characters, 0.7 to 0.3."""
    for name, text in (("a", TEXT), ("b", TEXT[::-1])):
        Path(f"{name}.txt").write_text(text)
        assert cli("prepare_data", f"--input={name}.txt", "--tokenizer=char").code == 0
    return (*TINY_RUN, "--dataset=a:0.7,b:0.3")


def test_a_mixture_reports_the_loss_of_each_data_set_and_their_weighted_mean(cli, two_data_sets):
    result = cli("train", *two_data_sets)
    assert result.code == 0, result.err
    assert re.search(r"an epoch has, of a \(70\.0%\), 1,\d+ sequences; of b \(30\.0%\), 1,\d+ sequences", result.out)
    evaluated = [record for record in records_of("out/tiny") if "val/loss" in record]
    assert [record["step"] for record in evaluated] == [0, 3, 6]
    for record in evaluated:
        a, b = record["val/loss/a"], record["val/loss/b"]
        assert a != b
        assert record["val/loss"] == pytest.approx(0.7 * a + 0.3 * b, abs=1e-9)
        line = f"val loss {record['val/loss']:.4f} (a {a:.4f}, b {b:.4f})"
        assert line in result.out
    alone = [float(cli("train", *two_data_sets, f"--dataset={name}", "--eval_only=True", "--init_from=out/tiny",
                       "--out_dir=out/none").out.split()[4]) for name in ("a", "b")]
    assert [evaluated[-1]["val/loss/a"], evaluated[-1]["val/loss/b"]] == pytest.approx(alone, abs=1e-4)
    whole = cli("train", *two_data_sets, "--eval_only=True").out
    assert f"(a {alone[0]:.4f}, b {alone[1]:.4f}) on the whole validation split" in whole


def test_a_mixture_trains_on_the_sequences_that_its_pattern_names(cli, two_data_sets, monkeypatch):
    """Of six steps of 8 sequences, 34 are a's and 14 b's."""
    read = []
    rows = TrainOrder.rows
    monkeypatch.setattr(TrainOrder, "rows", lambda order, first, count: (
        read.append((order.split.paths[0].parent.name, first, count)), rows(order, first, count))[1])
    assert cli("train", *two_data_sets, "--eval_interval=100").code == 0
    for name, total in (("a", 34), ("b", 14)):
        numbers = [q for data, first, count in read if data == name for q in range(first, first + count)]
        assert numbers[:total] == list(range(total))  # a thread reads a few more ahead


def test_two_halves_of_a_mixed_run_end_byte_identical_to_the_whole(cli, two_data_sets):
    assert cli("train", *two_data_sets, "--out_dir=out/whole").code == 0
    assert cli("train", *two_data_sets, "--max_iters=3").code == 0
    assert "resuming out/tiny at step 3" in cli("train", *two_data_sets).out
    assert weights_of() == weights_of("out/whole")
    assert cli("train", *two_data_sets, "--dataset=a", "--out_dir=out/other").code == 0
    assert weights_of("out/other") != weights_of("out/whole")


@pytest.mark.parametrize("dataset", ["a:0.6,b:0.4", "b:0.7,a:0.3", "a"])
def test_a_mixed_run_does_not_go_on_with_other_weights(cli, refused, two_data_sets, dataset):
    assert cli("train", *two_data_sets, "--max_iters=3").code == 0
    before = files_of(Path("out"))
    line = refused("train", *two_data_sets, f"--dataset={dataset}")
    assert "the tokens or the shares of the data sets changed" in line
    assert files_of(Path("out")) == before
    assert "resuming" in cli("train", *two_data_sets, "--dataset=a:7,b:3").out  # the same shares


# What is refused


def damage(data: Path, how: str) -> None:
    shard = data / "train_000000.bin"
    content = shard.read_bytes()
    if how == "torn":
        shard.write_bytes(content[:-3])
    elif how == "magic":
        shard.write_bytes(b"\0" * 8 + content[8:])
    elif how == "id":
        shard.write_bytes(content[:1024] + b"\xff\x00" * ((len(content) - 1024) // 2))


@pytest.mark.parametrize(("how", "message"), [("torn", "is torn"), ("magic", "is not a token shard"),
                                              ("id", "token id 255 at position")])
def test_damaged_shards(refused, tiny_data, how, message):
    damage(tiny_data, how)
    before = files_of(tiny_data)
    assert message in refused("train", *TINY_RUN, "--eval_interval=100")
    assert files_of(tiny_data) == before


@pytest.mark.parametrize(("options", "message"), [
    (["--n_layers=3"], "--n_layers: unknown key 'n_layers'; did you mean 'n_layer'?"),
    (["--n_layer=three"], "--n_layer: n_layer='three' is not a whole number"),
    (["config/none.py"], "no config file 'config/none.py'"),
    (["--dataset=shakespear"], "python prepare_data.py shakespear"),
    (["--dataset=tiny:0.7,tiny:0.3"], "'tiny:0.3' should be name:weight"),
    (["--dataset=tiny:0.7,shakespear:0.3"], "python prepare_data.py shakespear"),
    (["--n_head=3"], "n_embd=16 is not divisible by n_head=3"),
    (["--block_size=100000"], "lower block_size"),
    (["--batch_size=0"], "batch_size=0 fits the micro-batch to the device"),
    (["--total_batch_size=100"], "not a positive multiple of block_size=16"),
    (["--total_batch_size=1600"], "leave gradient_accumulation_steps out"),
    (["--max_iters=-1", "--eval_interval=0"], "max_iters=-1 must be 0 or more; eval_interval=0 must be positive"),
    (["--device=tpu9"], "device='tpu9'"),
    (["--device=meta"], "device='meta' is not a device"),
    (["--seed=-1"], "seed=-1 must be 0 or more"),
    (["--muon_lr=0", "--muon_momentum=1"], "muon_lr=0.0 must be positive; muon_momentum=1.0 must be at least 0 and"),
    (["--schedule=wsd", "--decay_fraction=0"], "decay_fraction=0.0 must be above 0 and at most 1"),
    (["--schedule=linear", "--decay_lr=False"], "schedule=linear needs decay_lr=True"),
    (["--device=cpu", "--dtype=float16"], "hundred times slower"),
    (["--init_from=no-such-model"], "no model at 'no-such-model'"),
    (["--resume=must"], "nothing to resume"),
    (["--init_from=resume"], "nothing to resume"),
    (["--overwrite=True"], "needs resume=never"),
    (["--vocab_size=7"], "leave the key out"),
])
def test_bad_options_are_one_line_and_leave_nothing(refused, tiny_data, tmp_path, options, message):
    before = files_of(tmp_path)
    assert message in refused("train", *TINY_RUN, *options)
    assert files_of(tmp_path) == before
    assert not Path("out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda(refused, tiny_data):
    assert "use --device=cpu" in refused("train", *TINY_RUN, "--device=cuda")


def test_resuming_with_another_shape_data_batch_or_seed_lists_the_differences(cli, refused, tiny_data):
    assert cli("train", *TINY_RUN, "--max_iters=3").code == 0
    before = files_of(Path("out"))
    line = refused("train", *TINY_RUN, "--n_embd=32", "--seed=1", "--gradient_accumulation_steps=1")
    for difference in ("n_embd was 16, is 32", "seed was 1337, is 1", "seqs_per_step was 8, is 4"):
        assert difference in line
    assert "choose another --out_dir" in line
    manifest = json.loads((tiny_data / "dataset.json").read_text())
    manifest["shards"][0]["sha256"] = "0" * 64  # as if the data had been made anew
    (tiny_data / "dataset.json").write_text(json.dumps(manifest))
    assert "the tokens or the shares of the data sets changed" in refused("train", *TINY_RUN)
    assert files_of(Path("out")) == before


def test_a_run_goes_on_with_the_optimizer_it_was_trained_with(cli, refused, tiny_data):
    assert cli("train", *TINY_RUN, "--max_iters=3").code == 0
    assert "optimizer was adamw, is muon" in refused("train", *TINY_RUN, "--optimizer=muon")
    assert cli("train", *TINY_RUN, "--optimizer=muon", "--eval_only=True").code == 0  # which needs none
    normed = (*TINY_RUN, "--optimizer=muon", "--out_dir=out/muon")
    assert cli("train", *normed, "--max_iters=3").code == 0
    assert "muon_beta2 was 0.0, is 0.9" in refused("train", *normed, "--muon_beta2=0.9")


@pytest.mark.parametrize(("options", "message"), [
    ("--model=lstm", "says how a new GPT begins, and this is model=lstm, init_from=scratch"),
    ("--init_from=gpt2", "says how a new GPT begins, and this is model=gpt, init_from=gpt2"),
    ("--norm_position=post", "needs a norm before the head, or a head of its own")])
def test_width_base_is_for_new_gpts_with_a_norm_before_the_head(refused, tiny_data, options, message):
    assert message in refused("train", *TINY_RUN, "--width_base=8", *options.split())


def test_width_base_is_the_width_at_which_nothing_changes(cli, tiny_data):
    for width_base in (0, 16, 8):
        assert cli("train", *TINY_RUN, f"--width_base={width_base}", f"--out_dir=out/{width_base}").code == 0
    assert weights_of("out/16") == weights_of("out/0") != weights_of("out/8")


def test_a_flipped_byte_in_the_only_checkpoint(cli, refused, tiny_data):
    assert cli("train", *TINY_RUN, "--max_iters=2").code == 0
    path = LATEST / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    before = files_of(Path("out"))
    assert "model.safetensors has changed since it was saved" in refused("train", *TINY_RUN)
    assert "model.safetensors has changed since it was saved" in refused("sample", "--out_dir=out/tiny")
    assert files_of(Path("out")) == before


def test_planted_pickles_do_not_run(refused, tiny_data, tmp_path):
    torch.save({"model": {}, "model_args": Planted(tmp_path / "ran")}, "ckpt.pt")
    headerless(tmp_path / "data" / "trap", meta=False)
    (tmp_path / "data" / "trap" / "meta.pkl").write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
    assert "ckpt.pt" in refused("train", *TINY_RUN, "--init_from=ckpt.pt")
    assert "meta.pkl was refused" in refused("train", *TINY_RUN, "--dataset=trap")
    assert not (tmp_path / "ran").exists()
    assert not Path("out").exists()


def test_two_runs_on_one_folder(cli, refused, tiny_data):
    assert cli("train", *TINY_RUN, "--max_iters=2").code == 0
    before = files_of(Path("out"))
    with RunFolder(RunConfig("out/tiny"), Job(0, 1, torch.device("cpu"), torch.float32)) as other:
        other.open(json.loads(Path("out/tiny/train_config.json").read_text()), is_new=False)
        assert "out/tiny is in use by another run" in refused("train", *TINY_RUN)
    assert files_of(Path("out")) == before


def test_overwrite_starts_anew(cli, refused, tiny_data):
    assert cli("train", *TINY_RUN).code == 0
    assert "--overwrite=True" in refused("train", *TINY_RUN, "--resume=never")
    assert cli("train", *TINY_RUN, "--resume=never", "--overwrite=True", "--max_iters=1").code == 0
    assert [p.name for p in Path("out/tiny/checkpoints").glob("step_*")] == ["step_00000001"]


@pytest.mark.parametrize("source", ["out/tiny", "out/tiny/checkpoints/best"])
def test_overwrite_spares_what_the_run_starts_from(cli, refused, tiny_data, source):
    assert cli("train", *TINY_RUN).code == 0
    before = files_of(Path("out"))
    anew = [*TINY_RUN, f"--init_from={source}", "--resume=never", "--overwrite=True"]
    assert f"overwrite=True would delete init_from={source}" in refused("train", *anew)
    assert files_of(Path("out")) == before


def test_a_block_that_does_not_compile_falls_back_to_eager(cli, tiny_data, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("model.Block.compile", lambda self: setattr(self, "_compiled_call_impl", fail))
    result = cli("train", *TINY_RUN, "--compile=True")
    assert result.code == 0, result.err
    assert "torch.compile failed, going on without it: RuntimeError: no compiler here" in result.out


def test_a_run_older_than_an_option_goes_on_with_its_default_alone(cli, tiny_data, refused):
    assert cli("train", *TINY_RUN, "--max_iters=3").code == 0
    [checkpoint] = Path("out/tiny/checkpoints").glob("step_*")
    trainer = checkpoint / "training" / "trainer.json"
    state = json.loads(trainer.read_text())
    for key in ("pos", "norm", "optimizer", "rope_factor", "rope_original_block_size", "rope_scaling", "head_dim",
                "qkv_bias", "sliding_window", "window_pattern"):  # it never heard of them
        del state["options"][key]
    before = trainer.read_bytes()
    trainer.write_text(json.dumps(state))
    sums = checkpoint / "SHA256SUMS"
    old, new = (hashlib.sha256(content).hexdigest() for content in (before, trainer.read_bytes()))
    sums.write_text(sums.read_text().replace(old, new))
    line = refused("train", *TINY_RUN, "--pos=rope", "--norm=rmsnorm")
    assert "pos was learned, is rope; norm was layernorm, is rmsnorm" in line
    assert cli("train", *TINY_RUN).code == 0


def val_loss_at(cli, run: str, block_size: int) -> float:
    result = cli("train", "--dataset=tiny", f"--init_from={run}", f"--block_size={block_size}", "--eval_only=True",
                 "--device=cpu", "--dtype=float32", "--batch_size=4", "--gradient_accumulation_steps=1")
    assert result.code == 0, result.err
    return float(re.search(r"val loss ([\d.]+)", result.out)[1])


def test_alibi_reads_twice_what_it_was_trained_on_and_learned_positions_say_that_they_cannot(cli, tiny_data, refused):
    options = (*TINY_RUN, "--max_iters=150", "--lr_decay_iters=150", "--eval_interval=150", "--n_embd=32")
    assert cli("train", *options, "--pos=alibi", "--out_dir=out/alibi").code == 0
    short, long = (val_loss_at(cli, "out/alibi", block_size) for block_size in (16, 32))
    assert short < 3.0
    assert long == pytest.approx(short, abs=0.1)
    assert cli("train", *TINY_RUN, "--out_dir=out/learned").code == 0
    assert "block_size=32: the model has only 16 positions" in refused(
        "train", "--dataset=tiny", "--init_from=out/learned", "--block_size=32", "--eval_only=True", "--device=cpu")


LIKE_LLAMA = ("--pos=rope", "--norm=rmsnorm", "--mlp=swiglu")


@pytest.mark.parametrize(("options", "wanted"), [
    (["--rope_factor=4"], {"rope_type": "llama3", "original_max_position_embeddings": 16}),
    (["--rope_factor=4", "--rope_scaling=yarn", "--rope_original_block_size=12"],
     {"rope_type": "yarn", "original_max_position_embeddings": 12}),
    (["--rope_factor=4", "--rope_scaling=linear"], {"rope_type": "linear"})])
def test_a_model_of_ones_own_is_stretched_to_a_longer_context_and_the_run_goes_on(cli, tiny_data, options, wanted):
    assert cli("train", *TINY_RUN, *LIKE_LLAMA, "--out_dir=out/base").code == 0
    training = ("train", "--init_from=out/base", "--dataset=tiny", "--out_dir=out/long", "--device=cpu",
                "--dtype=float32", "--total_batch_size=256", "--batch_size=2", "--eval_iters=1", "--eval_interval=2")
    assert cli(*training, *options, "--block_size=64", "--max_iters=2").code == 0
    for more in ([*options, "--block_size=64", "--max_iters=4"], ["--max_iters=6"]):  # said again, or left to the run
        assert (done := cli(*training, *more)).code == 0, done.err
        assert "resuming out/long" in done.out
    config = json.loads(Path("out/long/checkpoints/step_00000006/config.json").read_text())
    assert config["max_position_embeddings"] == 64
    assert config["rope_scaling"].items() >= (wanted | {"factor": 4.0}).items()


@pytest.mark.parametrize("scaling", ["llama3", "yarn"])
def test_a_fresh_model_is_made_for_a_longer_context_than_its_block_size(cli, tiny_data, scaling):
    training = (*TINY_RUN, *LIKE_LLAMA, f"--rope_scaling={scaling}", "--rope_factor=4")
    assert cli("train", *training, "--max_iters=2").code == 0
    for more in ([], ["--rope_original_block_size=16"]):  # left to the default, or said
        assert (done := cli("train", *training, "--max_iters=4", *more)).code == 0, done.err
    config = json.loads(Path("out/tiny/checkpoints/step_00000004/config.json").read_text())
    assert config["rope_scaling"].items() >= {"rope_type": scaling, "factor": 4.0,
                                              "original_max_position_embeddings": 16}.items()


def test_options_that_say_what_a_model_is_by_default_are_accepted_at_its_start_and_when_it_goes_on(
        cli, tiny_data, refused):
    assert cli("train", *TINY_RUN, "--max_iters=2").code == 0
    said = ("--n_kv_head=2", "--head_dim=8", "--mlp_hidden=64")
    assert (done := cli("train", *TINY_RUN, *said, "--max_iters=3")).code == 0, done.err
    assert "resuming out/tiny at step 2" in done.out
    line = refused("train", *TINY_RUN, "--n_kv_head=1", "--head_dim=4", "--max_iters=4")
    assert "n_kv_head was 2, is 1; head_dim was 8, is 4" in line
    start = ("train", "--init_from=out/tiny", TINY_RUN[0], *TINY_RUN[5:])
    assert (done := cli(*start, *said, "--max_iters=2", "--out_dir=out/more")).code == 0, done.err
    assert (done := cli(*start, "--max_iters=3", "--out_dir=out/more")).code == 0, done.err
    line = refused(*start, "--n_kv_head=1", "--mlp_hidden=63", "--window_pattern=SL", "--out_dir=out/x")
    for fault in ("n_kv_head=1 was asked for, and it has 2", "mlp_hidden=63 was asked for, and it has 64",
                  "window_pattern=SL was asked for, and it has SS"):
        assert fault in line


def test_only_rotations_can_be_stretched(cli, tiny_data, refused):
    assert cli("train", *TINY_RUN, "--max_iters=1").code == 0
    line = refused("train", "--init_from=out/tiny", "--dataset=tiny", "--rope_factor=4", "--out_dir=out/x")
    assert "rope_factor=4.0 needs pos=rope (here learned)" in line


def test_a_run_goes_on_though_its_file_now_spells_out_what_its_start_left_to_defaults(cli, tiny_data):
    config = GPTConfig(block_size=16, vocab_size=load_tokenizer(tiny_data).vocab_size, n_layer=2, n_head=2, n_embd=16,
                       qk_norm=True, pos="rope", norm="rmsnorm", mlp="swiglu")
    save_as_before(GPT(config), Path("base"))  # n_kv_head=0; a checkpoint in Qwen3's shape has it as 2
    training = ("train", "--init_from=base", *TINY_RUN[:1], *TINY_RUN[5:])
    assert cli(*training, "--max_iters=3").code == 0
    assert json.loads(Path("out/tiny/checkpoints/best/config.json").read_text())["num_key_value_heads"] == 2
    assert (done := cli(*training)).code == 0, done.err
    assert "resuming out/tiny at step 3" in done.out


def test_the_fine_tuning_config_goes_on_from_any_hugging_face_gpt2(cli, shakespeare, gpt2_tokenizer):
    assert cli("prepare_data", "shakespeare", f"--input={shakespeare}", "--val_fraction=0.01").code == 0
    torch.manual_seed(0)
    save_hf(Path("hf"), vocab_size=50257, bos_token_id=50256, eos_token_id=50256)
    result = cli("train", ROOT / "config" / "finetune_shakespeare.py", "--init_from=hf", "--device=cpu",
                 "--max_iters=2", "--eval_iters=1", "--gradient_accumulation_steps=2", "--learning_rate=1e-3")
    assert result.code == 0, result.err
    first, last = (record["val/loss"] for record in records_of("out/finetune_shakespeare") if "val/loss" in record)
    assert last < first
    text = cli("sample", "--out_dir=out/finetune_shakespeare", "--prompt=ROMEO:", "--num_samples=1", "--device=cpu").out
    assert "ROMEO:" in text
