"""launcher.py: signals are heard, ends are tied to torchrun's, time counts from the launch, a launcher's variables are
read or named. (test_streams.py has the standard streams.)"""

import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY_RUN

from flatgpt import launcher, signals
from flatgpt.data import staging


@pytest.fixture
def nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


def test_under_nohup_a_terminal_that_closes_is_not_heard(nohup):
    with signals.stop_requests() as asked:
        signal.raise_signal(signal.SIGHUP)
        assert asked == []
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_signals_are_recorded_and_handlers_put_back(number):
    before = [signal.getsignal(n) for n in signals.STOP_SIGNALS]
    with signals.stop_requests() as asked:
        assert asked == []
        signal.raise_signal(number)
        assert asked == [signal.Signals(number).name]
    assert [signal.getsignal(n) for n in signals.STOP_SIGNALS] == before


def test_ctrl_c_twice_is_waited_for_and_after_a_second_it_is_not(monkeypatch):
    now_s = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now_s)
    with signals.stop_requests() as asked:
        signal.raise_signal(signal.SIGINT)
        now_s += 0.5  # torchrun hands on what the terminal has sent already
        signal.raise_signal(signal.SIGINT)
        assert asked == ["SIGINT", "SIGINT"]
        now_s += 1.5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # a scheduler repeats itself
        now_s += 1.5
        signal.raise_signal(signal.SIGTERM)
        assert asked[2:] == ["SIGTERM", "SIGTERM"]


@pytest.mark.skipif(sys.platform != "linux", reason="processes' ages are read in /proc")
def test_seconds_since_launch_are_the_processs_and_under_torchrun_its_parents(monkeypatch):
    loaded_s = time.monotonic() - launcher._LOADED_S
    uptime_s = time.clock_gettime(time.CLOCK_MONOTONIC)
    monkeypatch.setattr(launcher, "UNDER_TORCHRUN", False)
    own_s = launcher.seconds_since_launch()
    assert loaded_s - 0.02 <= own_s <= uptime_s  # the kernel counts in hundredths
    monkeypatch.setattr(launcher, "UNDER_TORCHRUN", True)
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert launcher.seconds_since_launch() == pytest.approx(own_s, abs=5)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert launcher.seconds_since_launch() > own_s


LAUNCHER = """
import os
import subprocess
import sys
ours = [sys.executable, "-c", "from flatgpt import launcher; print(launcher.launch()['torchrun'])"]
for command in (ours, ours, ["sh", "-c", f"'{ours[0]}' -c \\"{ours[2]}\\"; true"]):
    subprocess.run(command, env={**os.environ, "TORCHELASTIC_RUN_ID": "none"}, check=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes' parents are read in /proc")
def test_a_launch_is_the_same_for_all_that_a_torchrun_starts_and_no_other_for_a_wrapper():
    first, second = (subprocess.run([sys.executable, "-c", LAUNCHER], cwd=ROOT, check=True, capture_output=True,
                                    text=True).stdout.splitlines() for _ in range(2))
    assert len(first) == len(second) == 3
    assert len(set(first)) == len(set(second)) == 1
    assert first[0].startswith("none on ")
    assert first[0] != second[0]


STOPPED = """
import os
import signal
import subprocess
import sys
signal.signal(signal.SIGTERM, lambda *args: print("told to end", flush=True))
worker = [sys.executable, "-c", "from flatgpt import launcher; launcher.end_torchrun()"]
ours = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_MAX_RESTARTS": "3", "RANK": "0", "WORLD_SIZE": "1",
        "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
for command in (worker, ["sh", "-c", f"'{worker[0]}' -c \\"{worker[2]}\\"; true"]):
    subprocess.run(command, env={**os.environ, **ours}, check=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes' parents are read in /proc")
def test_torchrun_is_told_to_end_also_through_a_wrapper():
    done = subprocess.run([sys.executable, "-c", STOPPED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "told to end\n" * 2), done.stderr


def test_without_torchrun_and_slurm_there_is_no_launch(monkeypatch):
    monkeypatch.setattr(launcher, "UNDER_TORCHRUN", False)
    for key in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.setenv(key, "")
    assert launcher.launch() == {"host": platform.node(), "torchrun": "", "slurm_job": "", "slurm_restarts": "0"}


def test_torch_is_not_imported_before_a_workers_end_is_tied_to_torchruns():
    code = "import sys; from flatgpt import launcher, signals; assert not {'torch', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(("is_torchrun", "restarts", "wanted"), [
    (True, "3", True), (True, "0", False), (True, "", False), (True, None, False), (False, "3", False)])
def test_only_a_torchrun_that_was_told_to_starts_a_job_again(monkeypatch, is_torchrun, restarts, wanted):
    monkeypatch.setattr(launcher, "UNDER_TORCHRUN", is_torchrun)
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    if restarts is not None:
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    assert launcher.may_restart() == wanted


# The launcher's variables

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """`environment("RANK=0 WORLD_SIZE=2")`: these variables of a launcher, and no others."""

    def change(variables: str) -> None:
        for key in VARIABLES:
            monkeypatch.delenv(key, raising=False)
        for variable in variables.split():
            monkeypatch.setenv(*variable.split("="))

    return change


@pytest.mark.parametrize(("variables", "place"), [
    ("", (0, 1, 0, 1)),
    ("RANK= WORLD_SIZE= LOCAL_RANK= LOCAL_WORLD_SIZE=", (0, 1, 0, 1)),
    ("RANK=0", (0, 1, 0, 1)),
    ("WORLD_SIZE=1", (0, 1, 0, 1)),
    ("RANK=0 WORLD_SIZE=1", (0, 1, 0, 1)),
    ("RANK=0 WORLD_SIZE=", (0, 1, 0, 1)),
    ("LOCAL_RANK=3", (0, 1, 0, 1)),  # another program's: it says nothing of a job
    ("LOCAL_RANK=x LOCAL_WORLD_SIZE=y", (0, 1, 0, 1)),
    ("RANK=1 WORLD_SIZE=2", (1, 2, 0, 1)),  # a machine for each
    ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1", (1, 2, 1, 1)),
    ("RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4", (5, 8, 1, 4)),
    ("RANK=5 WORLD_SIZE=8 LOCAL_WORLD_SIZE=4", (5, 8, 0, 4))])
def test_a_place_in_a_job_is_what_the_launcher_says(environment, variables, place):
    environment(variables)
    assert launcher.ranks() == place


@pytest.mark.parametrize(("variables", "fault"), [
    ("RANK=1", "RANK should be below WORLD_SIZE, which is missing"),
    ("RANK=2 WORLD_SIZE=2", "RANK should be below WORLD_SIZE, which is 2"),
    ("RANK=0 WORLD_SIZE=0", "RANK should be below WORLD_SIZE, which is 0"),
    ("WORLD_SIZE=2", "RANK, the number of this process, is missing"),
    ("RANK= WORLD_SIZE=2", "RANK, the number of this process, is missing"),
    ("RANK=x", "RANK should be a number"),
    ("RANK=-1 WORLD_SIZE=2", "RANK should be a number"),
    ("RANK=0 WORLD_SIZE=2.0", "WORLD_SIZE should be a number"),
    ("RANK=0x1 WORLD_SIZE=two", "RANK and WORLD_SIZE should be a number"),
    ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=%q{X}", "LOCAL_RANK should be a number"),
    ("RANK=٣ WORLD_SIZE=4", "RANK should be a number"),
    (f"RANK=0 WORLD_SIZE=1{'0' * 5000}", "WORLD_SIZE should be a number"),
    ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=1", "LOCAL_RANK should be below LOCAL_WORLD_SIZE"),
    ("RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=0", "LOCAL_RANK should be below LOCAL_WORLD_SIZE")])
def test_variables_that_contradict_each_other_are_named(environment, variables, fault):
    environment(variables)
    with pytest.raises(ValueError, match=r"the environment has .*: start several processes with torchrun") as caught:
        launcher.ranks()
    assert f", and {fault}: " in str(caught.value)
    assert all(variable in str(caught.value) for variable in variables.split() if not variable.endswith("="))


@pytest.mark.parametrize("where", [
    "", "MASTER_ADDR=node0", "MASTER_PORT=29500", "MASTER_ADDR= MASTER_PORT=29500", "MASTER_ADDR=node0 MASTER_PORT=",
    "MASTER_ADDR=node0 MASTER_PORT=http", "MASTER_ADDR=node0 MASTER_PORT=0", "MASTER_ADDR=node0 MASTER_PORT=65536",
    "MASTER_ADDR=node0 MASTER_PORT=99999", "MASTER_ADDR=node0 MASTER_PORT=-1", "MASTER_ADDR=node0 MASTER_PORT=29500.0"])
def test_without_a_place_to_meet_the_variables_are_named(environment, where):
    environment(f"RANK=0 WORLD_SIZE=2 {where}")
    with pytest.raises(ValueError, match=r"has RANK=0, WORLD_SIZE=2.* MASTER_ADDR and MASTER_PORT should name"):
        launcher.rendezvous()


@pytest.mark.parametrize("port", ["1", "29500", "65535"])
def test_a_place_to_meet_is_an_address_and_a_port(environment, port):
    environment(f"MASTER_ADDR=node0 MASTER_PORT={port}")
    assert launcher.rendezvous() == f"node0:{port}"


def test_one_process_of_a_launcher_needs_nobody(cli, tiny_data, environment):
    environment("RANK=0 WORLD_SIZE=1")
    result = cli("train", *TINY_RUN)
    assert result.code == 0, result.err


def test_sampling_joins_nobody(cli, tiny_data, environment):
    assert cli("train", *TINY_RUN).code == 0
    options = ("--out_dir=out/tiny", "--num_samples=1", "--max_new_tokens=5")
    alone = cli("sample", *options).out.partition("---")[0]
    for variables in ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0", "RANK=1 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=1",
                      "RANK=x"):
        environment(variables)
        result = cli("sample", *options)
        assert (result.code, result.out.partition("---")[0]) == (0, alone), result.err


@pytest.mark.parametrize("script", ["train", "eval"])
def test_a_job_without_a_place_to_meet_is_refused_in_one_line(refused, tiny_data, environment, script):
    environment("RANK=0 WORLD_SIZE=2")
    options = TINY_RUN if script == "train" else ("--dataset=tiny", "--init_from=tiny")
    assert "RANK=0, WORLD_SIZE=2, and so MASTER_ADDR and MASTER_PORT should" in refused(script, *options)


@pytest.mark.parametrize(("rank", "label", "is_taken"), [
    (0, "error", False), (0, "error", True), (1, "[rank 1] error", False)])
def test_a_rank_says_for_what_it_waits_and_ends_when_nobody_comes(cli, tiny_data, environment, rank, label, is_taken):
    with socket.socket() as meeting:
        meeting.bind(("127.0.0.1", 0))
        variables = f"RANK={rank} WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT={meeting.getsockname()[1]}"
        if not is_taken:
            meeting.close()
        environment(variables)
        result = cli("train", *TINY_RUN, "--timeout_s=1")
    waits, error = result.err.splitlines()
    named = variables.replace(" ", ", ")
    assert result.code == 2
    assert waits.startswith(f"rank {rank} waits for the other 1 at 127.0.0.1:")
    assert waits.endswith(f"up to 1 s: the environment has {named}")
    assert error.startswith(f"{label}: rank {rank} on ")
    assert re.search("(did not meet the others|cannot reach rank 0) at 127\\.0\\.0\\.1", error)
    assert f"the environment has {named}: start several" in error


def test_a_preparation_says_at_once_why_it_will_wait(cli, tmp_path, environment, monkeypatch):
    def wait_for(missing):
        raise OSError(f"missing: {missing()}")

    monkeypatch.setattr(staging, "wait_for", wait_for)
    (tmp_path / "t.txt").write_text("some text\n" * 99)
    environment("RANK=0 WORLD_SIZE=2")
    result = cli("prepare_data", "--input=t.txt", "--name=t", "--tokenizer=byte")
    assert result.out.startswith("this is rank 0 of 2, and all of them have to be started: the environment has "
                                 "RANK=0, WORLD_SIZE=2;")
    assert result.err.startswith("error: missing: ['rank_00001_of_00002_")


# Ctrl-C

# In place of torch and NumPy: Ctrl-C while one of them is imported, and an end if nobody hears it.
SLOW = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('not heard')\nraise SystemExit(7)\n"


@pytest.mark.parametrize("script", ["train", "sample", "eval", "export", "benchmarks/bench", "prepare_data", "report"])
@pytest.mark.parametrize(("trap", "code", "out"), [("", -signal.SIGINT, ""), ("trap '' INT;", 7, "not heard\n")])
def test_ctrl_c_while_a_script_imports_is_no_traceback(tmp_path, script, trap, code, out):
    for name in ("torch", "numpy"):
        (tmp_path / f"{name}.py").write_text(SLOW)
    run = (f"import runpy, sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; "
           f"runpy.run_path({str(ROOT / script)!r} + '.py', run_name='__main__')")
    done = subprocess.run(["sh", "-c", f'{trap} exec "$@"', "sh", sys.executable, "-c", run], capture_output=True,
                          text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, "")


@pytest.mark.parametrize(("before", "inside"), [
    (signal.SIG_DFL, signal.default_int_handler), (signal.SIG_IGN, signal.SIG_IGN)])
def test_ctrl_c_is_an_exception_while_a_main_runs_unless_it_was_ignored(before, inside):
    pytests = signal.signal(signal.SIGINT, before)
    try:
        with signals.interruptible():
            assert signal.getsignal(signal.SIGINT) == inside
        assert signal.getsignal(signal.SIGINT) == before
    finally:
        signal.signal(signal.SIGINT, pytests)
