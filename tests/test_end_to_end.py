"""The whole job as a user runs it: the documents' commands, `make demo`, and torchrun against one process."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_RUN, records_of
from faults import start_ranks

from model import GPT

# Commands that cannot run here: they need a network (GPT-2's ranks are on it), a GPU, or eight of them, containers, a
# dozen finished runs, a quiet machine, or do not end.
ELSEWHERE = re.compile(r"^(git|cd|make|pip) |gpt2|nproc_per_node=8|finetune|config/shakespeare_char\.py|ckpt\.pt"
                       r"|fineweb|--hf=|python_source|--push=|serve\.py|--watch=|--fit |--check=True"
                       r"|^(ssh|lm_eval|docker|kubectl) ")


CLOCK = """
# fine-tune, with the clock in the names
import os
import time

rank = int(os.environ.get("RANK", 0))
tokens_per_iter = 2 * 4 * 16
stamp = str(time.time_ns())
out_dir = f"out/{stamp}-{rank}"
wandb_log = False
wandb_run_name = 'ft-' + stamp
max_minutes = 60 - time.time() % 1
device = ("cpu", "auto")[rank]  # each process its own
"""


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_config_with_the_clock_in_it_trains_on_any_number_of_processes(tiny_data, tmp_path, nproc):
    if nproc == 2 and torch.cuda.is_available():
        pytest.skip("auto is no CPU here")
    (tmp_path / "clock.py").write_text(CLOCK)
    options = [option for option in TINY_RUN if not option.startswith(("--out_dir", "--device"))]
    code, log = start_ranks(nproc, tmp_path, "clock.py", *options)
    assert code == 0, log
    assert log.count("clock.py:6: warning: rank is no option and is not used") == 1
    run, = (tmp_path / "out").iterdir()
    stamp, rank = run.name.split("-")
    assert rank == "0"
    assert json.loads((run / "train_config.json").read_text())["wandb_run_name"] == f"ft-{stamp}"


@pytest.fixture
def clone(tmp_path) -> Path:
    """What a user has after `git clone`: the project without what was built in it."""
    everywhere, at_the_top = (shutil.ignore_patterns(*names) for names in ((".*", "__pycache__"), ("data", "out*")))
    shutil.copytree(ROOT, tmp_path / "flatgpt", ignore=lambda folder, names: everywhere(folder, names) | (
        at_the_top(folder, names) if Path(folder) == ROOT else set()))  # flatgpt/data is code
    return tmp_path / "flatgpt"


def shell(command: str, cwd: Path) -> str:
    """Run a command with this interpreter as `python`; the test fails with its output unless it exits 0."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, shell=True, cwd=cwd, env={**os.environ, "PATH": path}, text=True, timeout=600,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def documented_commands() -> list[str]:
    """Those of the README, then of docs/, whose pages go on with what these made."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = [block for page in pages if page.name != "models.md"  # whose commands test_docs.py looks at
              for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S)]
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    return [command for line in lines if (command := line.partition("  #")[0].strip())]


# Appended to a run's command where it need not come to its end.
SHORT = " --max_iters=20 --eval_interval=20 --eval_iters=2 --warmup_iters=2 --lr_decay_iters=20"


@pytest.mark.parametrize("is_whole", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_readmes_commands_run_and_shakespeare_reaches_its_loss(cli, clone, monkeypatch, shakespeare, is_whole):
    """In this process, where they are a script and its arguments: to import torch takes longer than most of them."""
    monkeypatch.chdir(clone)
    run = []
    for command in documented_commands():
        if ELSEWHERE.search(command):
            continue
        run.append(command)
        if command == "python prepare_data.py shakespeare_char":  # here without the download
            command += f" --input={shlex.quote(str(shakespeare))}" + ("" if is_whole else " --val_fraction=0.01")
        if " train.py " in command and not is_whole:
            command += SHORT
        if script := re.match(r"python (\w+)\.py ", command):
            result = cli(script[1], *shlex.split(command)[2:])
            assert result.code == 0, f"{command}\n{result.out}{result.err}"
        else:
            shell(command, clone)
    for name, steps, loss in (("shakespeare_char_cpu", 2000, 1.92), ("shakespeare_char_fast", 200, 1.9)):
        assert f"python train.py config/{name}.py" in run
        last = records_of(clone / "out" / name)[-1]
        assert last["step"] == (steps if is_whole else 20)
        assert last["val/loss"] <= (loss if is_whole else 3.5)


@pytest.mark.parametrize("data", [
    "--input=flatgpt --name=python_stdlib --tokenizer=bpe --vocab_size=2048",
    pytest.param("python_stdlib", marks=pytest.mark.soak)])
def test_make_demo_ends_with_a_sample(clone, data):
    python = shlex.quote(sys.executable)
    out = shell(f"make --no-print-directory -o .venv/.run demo PY={python} DATA={shlex.quote(data)} "
                "ARGS='--max_iters=20 --eval_iters=1'", clone)
    assert "data/python_stdlib" in out
    written = re.split(r"parameters on cpu, torch\.\w+\n", out)[1].split("def __init__(self,")[1:]
    assert len(written) == 2
    assert all(len(text) > 50 for text in written)
    assert "serve.py" in out.splitlines()[-1]  # how to see it
    assert "tokens/s" in written[-1]


@pytest.mark.parametrize("shape", [
    (), ("--bias=True", "--mlp=gelu_tanh"), ("--pos=rope", "--norm=rmsnorm", "--mlp=swiglu", "--n_kv_head=1"),
    ("--pos=rope", "--norm=rmsnorm", "--mlp=swiglu", "--rope_factor=4", "--rope_original_block_size=8"),
    ("--pos=rope", "--norm=rmsnorm", "--mlp=swiglu", "--sliding_window=5"),
    ("--pos=rope", "--norm=rmsnorm", "--mlp=swiglu", "--qk_norm=True", "--head_dim=12", "--sliding_window=5",
     "--window_pattern=SL")])
def test_transformers_goes_on_from_a_runs_checkpoint_as_it_is(cli, tiny_data, shape):
    """The likeliest tokens, one by one, up to the context's end."""
    transformers = pytest.importorskip("transformers")
    assert cli("train", *TINY_RUN, *shape).code == 0
    folder = "out/tiny/checkpoints/best"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)("the quick", return_tensors="pt").input_ids
    mask = torch.ones_like(ids)
    written = theirs.generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False, pad_token_id=0)
    assert written.tolist() == GPT.from_pretrained("out/tiny").generate(ids, 7, temperature=0.0).tolist()


TWO_RANKS = ("--eval_iters=0", "--eval_interval=100", "--log_interval=20")


def test_two_processes_train_the_model_that_one_trains(cli, tiny_data, tmp_path):
    config = (ROOT / "config" / "shakespeare_char_cpu.py", "--dataset=tiny", *TWO_RANKS)
    for steps in (1, 40):
        options = (*config, f"--max_iters={steps}", "--dtype=float32")
        assert cli("train", *options, f"--out_dir=out/one-{steps}").code == 0
        code, log = start_ranks(2, tmp_path, *map(str, options), f"--out_dir=out/two-{steps}")
        assert code == 0, log
    for a, b in zip(*(GPT.from_pretrained(f"out/{run}-1").parameters() for run in ("one", "two"))):
        assert (a - b).abs().max() <= 1e-6
    one, two = (records_of(f"out/{run}-40")[-1] for run in ("one", "two"))
    assert one["step"] == two["step"] == 40
    assert two["val/loss"] == pytest.approx(one["val/loss"], abs=1e-3)


@pytest.mark.parametrize(("nproc", "how"), [
    pytest.param(2, (), marks=pytest.mark.soak),
    (4, ()),  # four summands can be added in more than one order, two cannot
    (2, ("--parallel=fsdp", "--optimizer=muon", "--muon_beta2=0.9")),
    (4, ("--parallel=hsdp", "--shard_size=2", "--reshard_after_forward=False", "--reduce_every_micro_batch=True"))])
def test_ranks_resume_byte_identically_and_one_process_goes_on_from_it(cli, tiny_data, tmp_path, nproc, how):
    options = (*TINY_RUN, "--dropout=0.1", "--keep_last=0", "--batch_size=2", "--gradient_accumulation_steps=4", *how)
    code, log = start_ranks(nproc, tmp_path, *options, "--out_dir=out/whole")
    assert code == 0, log
    for copy in ("again", "alone"):  # as if killed after step 3
        shutil.copytree("out/whole", f"out/{copy}", symlinks=True)
        shutil.rmtree(f"out/{copy}/checkpoints/step_00000006")
    code, log = start_ranks(nproc, tmp_path, *options, "--out_dir=out/again")
    assert code == 0, log
    model = "checkpoints/step_00000006/model.safetensors"
    assert Path("out/again", model).read_bytes() == Path("out/whole", model).read_bytes()
    alone = [option for option in options if not option.startswith("--shard_size")]
    result = cli("train", *alone, "--out_dir=out/alone")
    assert "resuming out/alone at step 3" in result.out
    # The same global batches and, at the same micro-batch, the same dropout masks: only rounding differs.
    assert records_of("out/alone")[-1]["val/loss"] == pytest.approx(records_of("out/whole")[-1]["val/loss"], abs=1e-4)


def test_a_step_that_does_not_divide_over_the_processes_is_one_line(tiny_data, tmp_path):
    code, log = start_ranks(3, tmp_path, *TINY_RUN)
    assert code == 2
    assert "error: 8 sequences a step cannot be shared evenly by 3 processes" in log
    assert not (tmp_path / "out").exists()


def test_a_failure_of_rank_0_ends_all_ranks(tiny_data, tmp_path):
    code, log = start_ranks(2, tmp_path, *TINY_RUN, "--init_from=no-such-model")
    assert code == 2
    assert log.count("error: no model at 'no-such-model'") == 1
