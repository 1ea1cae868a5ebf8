"""What the tests share: running a script as a user would, tiny data, and the real texts where they are at hand."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import locale
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # real texts and GPT-2's ranks, where a checkout has them beside it
sys.path.insert(0, str(ROOT))

# What the tests inherit from a launcher, a cluster, or a shell that started them under nohup or in the background, is
# none of theirs, nor of the programs that they start. No test needs the network.
INHERITED = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|SLURM_.*"
                       r"|WANDB_.*|TORCH_DISABLE_SHARE_RDZV_TCP_STORE|HF_.*|LC_.*|LANG|LANGUAGE|COLUMNS|LINES|NO_COLOR"
                       r"|FORCE_COLOR|CLICOLOR.*|PYTHON(IOENCODING|UTF8|COERCECLOCALE|UNBUFFERED|WARNINGS)")
for key in filter(INHERITED.fullmatch, list(os.environ)):
    del os.environ[key]
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
with contextlib.suppress(locale.Error):
    locale.setlocale(locale.LC_ALL, "C.UTF-8")  # of files that are opened without an encoding
signal.pthread_sigmask(signal.SIG_SETMASK, [])
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD):
    signal.signal(number, signal.SIG_DFL)

from flatgpt.data.shards import shard_header  # noqa: E402
from flatgpt.options import run_script  # noqa: E402


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """`cli("train", "--max_iters=3")`: run a script's main in this process, in tmp_path, with its output captured."""
    monkeypatch.chdir(tmp_path)

    def call(script: str, *args: object) -> Result:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
        capsys.readouterr()
        try:
            run_script(importlib.import_module(script).main)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def refused(cli):
    """`refused("train", "--bad=1")`: run it, see it exit 2 with one line on stderr and no traceback; gives the line."""

    def call(script: str, *args: object) -> str:
        result = cli(script, *args)
        lines = result.err.strip().splitlines()
        assert result.code == 2
        assert len(lines) == 1, result.err
        assert lines[0].startswith("error: ")
        return lines[0]

    return call


def run_process(*args: object, cwd: Path, **env: str) -> str:
    """Run `python args...` to its end and give its output; the test fails with that unless it exits 0."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env={**os.environ, **env}, text=True, timeout=300,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def torchrun(nproc: int, *args: object, cwd: Path) -> str:
    """`torchrun --nproc_per_node=nproc args...` on a free port, CPU only."""
    return run_process("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}", *args, cwd=cwd,
                       OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.distributed.fsdp", "torch._dynamo", "tyro", "faults"])  # faults: train.py


@functools.cache
def start_fork_server() -> None:
    """Where it finds what it is to import: before Python 3.12 it does not get the path of this process."""
    cwd = os.getcwd()
    os.chdir(Path(__file__).parent)
    forkserver.ensure_running()
    os.chdir(cwd)


def on_ranks(nproc: int, do: Callable, *args: Any) -> list:
    """do(*args) on `nproc` ranks with torchrun's environment; its values, in the order of ranks. They are forked from
    a process that has imported train.py, and so start in a fraction of the time that torchrun takes. CPU only; `do`
    has to be a function of a module. The test fails with the traceback of a rank that raises."""
    start_fork_server()
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = []
    for rank in range(nproc):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc,
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True,
               "TORCHELASTIC_RESTART_COUNT": 0}
        ours, theirs = multiprocessing.Pipe()
        env = {key: str(value) for key, value in env.items()}
        process = FORKS.Process(target=_be_rank, args=(theirs, env, do, args), daemon=True)
        process.start()
        theirs.close()
        ranks.append((process, ours))
    try:
        answers = [_answer(ours) for _, ours in ranks]
    finally:
        for process, _ in ranks:
            process.kill()
    failures = [f"rank {rank}: {failure}" for rank, (_, failure) in enumerate(answers) if failure]
    assert not failures, "\n".join(failures)
    return [value for value, _ in answers]


def _answer(pipe: Any) -> tuple[Any, str]:
    """What a rank's `do` returned, and what kept it from that."""
    try:
        return pipe.recv() if pipe.poll(180) else (None, "it gave no answer in time")
    except EOFError:
        return None, "it died"


def _be_rank(pipe: Any, env: dict[str, str], do: Callable, args: tuple) -> None:
    os.environ.update(env)
    torch.set_num_threads(1)
    try:
        pipe.send((do(*args), ""))
    except BaseException:
        pipe.send((None, traceback.format_exc()))


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content, to see that nothing changed."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def records_of(run: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def write_shard(path: Path, tokens: np.ndarray, dtype: str = "<u2") -> None:
    """A token shard as we, llm.c and modded-nanogpt write it."""
    path.write_bytes(shard_header(len(tokens), np.dtype(dtype)) + np.asarray(tokens, dtype).tobytes())


@pytest.fixture(scope="session")
def shakespeare() -> Path:
    path = SHARED / "data" / "tinyshakespeare.txt"
    if not path.is_file():
        pytest.skip(f"tiny Shakespeare is not at {path}")
    return path


@pytest.fixture(scope="session", autouse=True)
def _gpt2_ranks_offline():
    if "TIKTOKEN_CACHE_DIR" not in os.environ and (SHARED / "tiktoken").is_dir():
        os.environ["TIKTOKEN_CACHE_DIR"] = str(SHARED / "tiktoken")


@pytest.fixture(scope="session")
def gpt2_tokenizer():
    from flatgpt.data.tokenizer import GPT2Tokenizer

    try:
        return GPT2Tokenizer()
    except OSError as error:
        pytest.skip(f"GPT-2's ranks are not here: {error}")


TEXT = "".join(f"Line {i}: the quick brown fox, {i * i} jumps; over {'lazy ' * (i % 5)}dogs.\n" for i in range(400))


@pytest.fixture
def tiny_data(cli, tmp_path) -> Path:
    """data/tiny in tmp_path: characters of TEXT (about 18,000 tokens)."""
    (tmp_path / "tiny.txt").write_text(TEXT)
    assert cli("prepare_data", "--input=tiny.txt", "--name=tiny", "--tokenizer=char").code == 0
    return tmp_path / "data" / "tiny"


def write_run(folder: Path, records: list[dict], options: dict | None = None, torn: str = "") -> Path:
    """A run folder as train.py leaves it, without checkpoints; `torn` is the line that it has begun to write."""
    folder.mkdir(parents=True)
    (folder / "train_config.json").write_text(json.dumps(options or {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + torn)
    return folder


TINY_RUN = ("--dataset=tiny", "--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4",
            "--gradient_accumulation_steps=2", "--max_iters=6", "--eval_interval=3", "--eval_iters=2",
            "--warmup_iters=2", "--lr_decay_iters=6", "--learning_rate=1e-2", "--out_dir=out/tiny", "--device=cpu",
            "--dtype=float32")
