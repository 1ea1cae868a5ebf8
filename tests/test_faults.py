"""Runs that are killed: nothing is lost, and the same command ends where the undisturbed run ends."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from conftest import ROOT, TINY_RUN, files_of, records_of, run_process

import prepare_data
from checkpoint import verify

OPTIONS = (*TINY_RUN, "--max_iters=100", "--lr_decay_iters=100", "--eval_interval=50", "--save_interval=20",
           "--dropout=0.1", "--keep_last=0")


def newest_step(run: Path) -> int:
    return max((int(p.name[5:]) for p in run.glob("checkpoints/step_*")), default=0)


def kill_after(step: int, delay_s: float, *options: str, cwd: Path) -> None:
    """Start a run and SIGKILL it once its checkpoint of `step` is there."""
    with open(cwd / "log", "w") as log:
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *options], cwd=cwd, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while newest_step(cwd / "out" / "tiny") < step:
        assert process.poll() is None, (cwd / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_killed_after_step_60_and_started_again_the_run_ends_byte_identical(cli, tiny_data, tmp_path):
    assert cli("train", *OPTIONS, "--out_dir=out/whole").code == 0
    # An evaluation of the whole split after every step gives the killer time to meet the run before its end.
    command = (*OPTIONS, "--eval_interval=1", "--eval_iters=0")
    kill_after(60, 0.0, *command, cwd=tmp_path)
    killed_at = newest_step(tmp_path / "out" / "tiny")
    assert 60 <= killed_at < 100
    out = run_process(ROOT / "train.py", *command, cwd=tmp_path)
    assert f"resuming out/tiny at step {killed_at}" in out
    model = "checkpoints/step_00000100/model.safetensors"
    assert Path("out/tiny", model).read_bytes() == Path("out/whole", model).read_bytes()
    steps = [record["step"] for record in records_of("out/tiny") if "train/loss" in record]
    assert steps == list(range(1, 101))


def test_killed_at_any_moment_every_published_checkpoint_is_whole(cli, tiny_data, tmp_path):
    options = (*OPTIONS, "--max_iters=100000", "--save_interval=1", "--eval_interval=100000", "--keep_last=2")
    for delay_s in (0.0, 0.013, 0.05):
        kill_after(newest_step(tmp_path / "out" / "tiny") + 3, delay_s, *options, cwd=tmp_path)
        for folder in Path("out/tiny/checkpoints").glob("step_*"):
            verify(folder)
        assert Path("out/tiny/checkpoints/latest/SHA256SUMS").is_file()


def killed_at_operation(number: int, folder: Path, argv: list[str]) -> bool:
    """Run prepare_data.py in a forked child of this process that dies on the spot before its `number`-th operation on
    the disk's names, or sync; whether it came to that."""
    pid = os.fork()
    if pid:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 9)
        return code == 9
    try:
        os.chdir(folder)
        count = itertools.count(1)

        def deadly(call):
            def die_or_call(*args, **options):
                if next(count) == number:
                    os._exit(9)
                return call(*args, **options)

            return die_or_call

        for module, name in ((os, "replace"), (os, "rename"), (os, "fsync"), (os, "mkdir"), (os, "unlink"),
                             (shutil, "rmtree")):
            setattr(module, name, deadly(getattr(module, name)))
        prepare_data.main(argv)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def test_data_preparation_survives_a_kill_at_any_operation_on_the_disk(cli, tmp_path):
    documents = [f"document {i} " * (i % 7 + 1) for i in range(60)]
    argv = ["--input=../texts.jsonl", "--name=made", "--tokenizer=byte", "--shard_tokens=600",
            "--val_fraction=0.2", "--dedupe=True"]
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents * 2))
    (tmp_path / "whole").mkdir()
    os.chdir(tmp_path / "whole")
    assert cli("prepare_data", *argv).code == 0
    expected = files_of(tmp_path / "whole" / "data" / "made")
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        folder.mkdir()
        was_killed = killed_at_operation(number, folder, argv)
        assert not killed_at_operation(0, folder, argv)  # goes on; no operation has the number 0
        assert files_of(folder / "data" / "made") == expected, f"killed before operation {number}"
        assert [path.name for path in (folder / "data").iterdir() if path.is_dir()] == ["made"]
        if not was_killed:
            break
    assert number > 40
    assert len([name for name in expected if name.endswith(".bin")]) >= 4
