"""plan.py from the command line: plans of published models, proposals that train, and what it says to bad input."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_RUN, files_of, write_run

import plan
from flatgpt.models.baselines import build_empty
from flatgpt.options import parse_options
from model import GPT, GPTConfig

GPT2 = str(ROOT / "config" / "gpt2_124m.py")
LLAMA_70B = ("--n_layer=80", "--n_head=64", "--n_embd=8192", "--n_kv_head=8", "--mlp_hidden=28672", "--pos=rope",
             "--norm=rmsnorm", "--mlp=swiglu", "--tie_embeddings=False", "--vocab_size=128256", "--block_size=8192",
             "--gpus=64x8xH100", "--parallel=hsdp", "--total_batch_size=16777216", "--batch_size=1", "--max_iters=1000")


@pytest.fixture
def planned(cli):
    """The plan as JSON."""
    def call(*args: str) -> dict:
        result = cli("plan", *args, "--json")
        assert result.code == 0, result.err
        return json.loads(result.out)

    return call


def test_a_plan_of_gpt_2(planned):
    found = planned(GPT2, "--gpus=8xH100", "--price_per_gpu_hour=2", "--mfu=0.5")
    assert found["model"]["parameters"] == 124_439_808
    assert found["tokens"]["tokens"] == 19073 * 524288
    assert found["tokens"]["epochs"] == pytest.approx(1, rel=1e-3)
    padding = 50304 - 50257  # rows of the token table, of which the optimiser has means
    assert found["checkpoints"]["bytes_each"] == 12 * 124_439_808 + 8 * padding * 768
    hours = found["compute"]["flops"] / (8 * 989e12 * 0.5) / 3600  # 6 N + 12 L C T a token, on a node of eight
    assert found["compute"]["flops"] == 19073 * 524288 * (6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024)
    assert found["compute"]["hours"] == pytest.approx(hours)
    assert found["compute"]["price"] == pytest.approx(hours * 8 * 2)
    assert "by --mfu" in found["compute"]["speed"]
    assert len(found["losses"]) == 3
    assert [(row["parallel"], row["activation_checkpointing"]) for row in found["memory"]] == [
        ("ddp", False), ("ddp", True), ("fsdp", False), ("fsdp", True)]  # hsdp of one node is fsdp
    assert found["warnings"] == []


def test_the_text_has_what_the_json_has(cli, planned):
    text = cli("plan", GPT2, "--gpus=2x8xA100", "--parallel=hsdp").out
    found = planned(GPT2, "--gpus=2x8xA100", "--parallel=hsdp")
    for part in ("weights", "gradients", "optimiser", "activations", "logits", "workspace"):
        assert part in text
    chosen, = (row for row in found["memory"] if row["chosen"])
    assert (chosen["parallel"], chosen["shard_size"]) == ("hsdp", 8)
    assert any(line.startswith("  * hsdp ") and f"{chosen['bytes'] / 1e9:.2f}" in line for line in text.splitlines())
    for words in ("124,439,808 parameters", "2 nodes of 8 x A100", "9,999,745,024 tokens", "assumed", "Chinchilla"):
        assert words in text


def test_each_measure_saves_memory(planned):
    table = planned(GPT2, "--gpus=2x8xH100")["memory"]
    rows = {(row["parallel"], row["activation_checkpointing"]): row for row in table}
    for parallel in ("ddp", "fsdp", "hsdp"):
        assert rows[parallel, True]["bytes"] < rows[parallel, False]["bytes"]
    for part in ("weights", "optimiser"):
        assert rows["ddp", False]["parts"][part] == pytest.approx(16 * rows["fsdp", False]["parts"][part], rel=1e-6)
        assert rows["ddp", False]["parts"][part] == pytest.approx(8 * rows["hsdp", False]["parts"][part], rel=1e-6)


def test_70_billion_parameters_take_no_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, given = parse_options(plan.PlanConfig, [*LLAMA_70B])
    run = plan.plan_run(config, given)
    assert run.model.num_params(non_embedding=False) == 70_553_706_496
    assert all(tensor.is_meta for tensor in (*run.model.parameters(), *run.model.buffers()))
    found = plan.summarize(run)
    assert {row["parallel"]: row["largest_micro_batch"] for row in found["memory"] if row["activation_checkpointing"]
            }["ddp"] == 0  # 16 bytes a parameter are more than 80 GB
    assert next(row for row in found["memory"] if row["parallel"] == "fsdp")["parts"]["weights"] < 1e9


@pytest.mark.parametrize(("source", "count"), [("gpt2", 124_439_808), ("gpt2-xl", 1_557_611_200)])
def test_gpt_2s_sizes_are_known_without_their_files(planned, source, count):
    assert planned(f"--init_from={source}", "--max_iters=10", "--gpus=H100")["model"]["parameters"] == count


def test_of_a_models_folder_only_its_config_is_read(planned, refused, tmp_path):
    GPT(GPTConfig(vocab_size=300, block_size=32, n_layer=2, n_head=2, n_embd=16, bias=True)).save_pretrained(
        str(tmp_path / "folder"))
    (tmp_path / "folder" / "model.safetensors").unlink()
    found = planned("--init_from=folder", "--gpus=H100", "--max_iters=1")
    assert found["model"]["shape"]["n_embd"] == 16
    (tmp_path / "folder" / "config.json").write_text("{")
    assert "config.json" in refused("plan", "--init_from=folder")
    assert "could not get no/such-model from the hub" in refused("plan", "--init_from=no/such-model")


def test_data_that_is_here_says_its_vocabulary_and_its_tokens(planned, tiny_data):
    found = planned(*TINY_RUN)
    manifest = json.loads((tiny_data / "dataset.json").read_text())
    assert found["model"]["shape"]["vocab_size"] == manifest["tokenizer"]["vocab_size"]
    assert found["tokens"]["dataset_tokens"] == sum(
        shard["tokens"] for shard in manifest["shards"] if shard["split"] == "train")
    assert found["compute"]["hours"] is None  # nobody knows the peak of a CPU


def test_a_run_on_this_cpu_is_measured_and_planned_by(cli, planned, tiny_data):
    assert cli("train", *TINY_RUN).code == 0
    found = planned(*TINY_RUN, "--measured=out/tiny", "--max_iters=1000")
    speeds = sorted(record["tokens_per_sec"] for record in map(json.loads, Path("out/tiny/metrics.jsonl").read_text(
        ).splitlines()) if "tokens_per_sec" in record)
    assert speeds[0] <= found["compute"]["tokens_per_sec"] <= speeds[-1]
    assert "measured in out/tiny" in found["compute"]["speed"]
    assert found["compute"]["hours"] == pytest.approx(128_000 / found["compute"]["tokens_per_sec"] / 3600)


def test_a_gpus_share_of_its_peak_is_taken_from_a_run(planned, refused, tmp_path):
    write_run(tmp_path / "run", [{"step": n, "tokens_per_sec": 1e6, "mfu": mfu}
                                 for n, mfu in ((1, 0.1), (2, 0.3), (3, 0.35))])
    found = planned(GPT2, "--gpus=8xH100", "--measured=run")
    assert found["compute"]["mfu"] == pytest.approx(0.3)
    assert "30.0% of the peak, measured in run" in found["compute"]["speed"]
    assert "was measured on a GPU" in refused("plan", GPT2, "--gpus=cpu", "--measured=run")
    assert "no run that has reported a speed" in refused("plan", GPT2, "--measured=nowhere")


def test_a_proposed_config_trains(cli, tiny_data):
    result = cli("plan", "--depth=2", "--gpus=cpu", "--dataset=tiny", "--block_size=16", "--tokens=4000",
                 "--total_batch_size=128", "--write=configs/mine.py")
    assert result.code == 0, result.err
    text = Path("configs/mine.py").read_text()
    assert "python plan.py --depth=2 " in text
    assert "n_embd = 128  # 64 x depth" in text
    result = cli("train", "configs/mine.py", "--eval_iters=1")
    assert result.code == 0, result.err
    assert "warning" not in result.out
    assert json.loads(Path("out/mine/train_config.json").read_text())["max_iters"] == 31  # x 128 = 3,968 tokens
    assert cli("plan", "configs/mine.py").code == 0


def test_a_budget_of_compute_is_spent(planned):
    found = planned("--flops=1e19", "--gpus=8xH100")
    assert found["compute"]["flops"] == pytest.approx(1e19, rel=0.02)
    assert 14 < found["tokens"]["per_parameter"] < 28
    hours = planned("--hours=24", "--gpus=1xRTX4090")
    assert hours["compute"]["hours"] == pytest.approx(24, rel=0.02)
    chosen, = (row for row in hours["memory"] if row["chosen"])
    assert chosen["bytes"] < 24e9
    assert hours["warnings"] == [] == found["warnings"]


def test_a_proposal_takes_what_it_needs_to_fit(planned):
    found = planned("--depth=28", "--gpus=8xRTX4090")
    chosen, = (row for row in found["memory"] if row["chosen"])
    assert chosen["parallel"] == "fsdp"
    assert chosen["bytes"] < 24e9


def test_a_file_is_never_written_over(refused, tmp_path):
    (tmp_path / "mine.py").write_text("n_layer = 1\n")
    before = files_of(tmp_path)
    assert "mine.py is there already: choose another --write" in refused("plan", "--depth=2", "--write=mine.py")
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(("args", "says"), [
    (["--depth=2", "--flops=1e18"], "depth and flops say the same thing twice"),
    (["--write=x.py"], "write is for a proposal: add --depth, --flops or --hours"),
    (["--depth=2", "--n_embd=64"], "n_embd follows from --depth: leave it out"),
    (["--depth=2", "--tokens=1e6", "--tokens_per_param=3"], "tokens and tokens_per_param say the same thing twice"),
    (["--depth=-1"], "depth=-1 must be 0 to 1000"), (["--mfu=40"], "mfu=40.0 must be a share of 1"),
    (["--hours=3", "--gpus=cpu"], "--measured=RUN_FOLDER"), (["--flops=1e6"], "too few: one block of 64 channels"),
    (["--gpus=8xH900"], "write 8xH100"), ([GPT2, "--gpus=3xH100"], "cannot be shared evenly by 3 processes"),
    ([GPT2, "--gpus=8xH100", "--parallel=hsdp", "--shard_size=3"], "shard_size=3 does not divide"),
    (["--n_embd=100"], "n_embd=100 is not divisible by n_head=12"), (["--gpu=cpu"], "did you mean 'gpus'?"),
    (["--mfu=0.4", "--gpus=cpu"], "mfu=0.4 is for GPUs")])
def test_bad_options_are_one_line(refused, args, says):
    assert says in refused("plan", *args)


@pytest.mark.parametrize("args", [
    ["--gpus=8xH100", "--parallel=hsdp"], ["--gpus=2x8xA100", "--parallel=hsdp", "--shard_size=16"],
    ["--gpus=2x8xH100", "--parallel=hsdp", "--shard_size=1"], ["--gpus=1xA100", "--parallel=fsdp"],
    ["--gpus=cpu", "--parallel=fsdp"], ["--gpus=1xH100", "--parallel=hsdp"]])
def test_a_layout_that_spreads_nothing_or_all_is_planned_too(planned, args):
    chosen, = (row for row in planned("--n_layer=2", "--total_batch_size=491520", *args)["memory"] if row["chosen"])
    assert f"--parallel={chosen['parallel']}" in args


@pytest.mark.parametrize(("args", "says"), [
    (["--n_layer=7"], "init_from=model does not fit: n_layer=7 was asked for, and it has 1"),
    (["--block_size=64"], "block_size=64: the model has only 32 positions"),
    (["--depth=4"], "--depth proposes a new model: leave init_from out"),
    (["--branch_from=step_4"], "branch_from=step_4 is for train.py")])
def test_a_plan_from_a_model_is_of_that_model(refused, planned, tmp_path, args, says):
    GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=32)).save_pretrained("model")
    assert says in refused("plan", "--init_from=model", *args)
    assert planned("--init_from=model", "--block_size=16")["model"]["parameters"] == (
        planned("--init_from=model")["model"]["parameters"] - 16 * 32)


def test_what_will_not_fit_or_repeats_is_a_warning(planned):
    found = planned(GPT2, "--gpus=8xT4")
    assert any("will not fit" in line and "--batch_size=" in line for line in found["warnings"])
    found = planned(GPT2, "--gpus=8xH100", "--dataset_tokens=1000000000")
    assert any("10.0 epochs" in line for line in found["warnings"])
    found = planned(GPT2, "--gpus=8xH100", "--max_iters=100")
    assert any("0.4 tokens a parameter" in line for line in found["warnings"])


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_can_be_planned(planned, path):
    found = planned(str(path), "--gpus=8xH100" if "gpt2_124m" in path.name or "record" in path.name else "--gpus=H100")
    assert found["model"]["parameters"] > 0


def test_a_plan_needs_no_network_and_no_gpu(planned, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a plan asks for a device")

    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    assert planned(GPT2, "--documents=mask", "--gpus=8xH100")["memory"]
    assert build_empty(GPTConfig()).head.is_meta
