"""process.py: signals are heard, ends are tied to torchrun's, time counts from the launch."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import process


@pytest.fixture
def nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


def test_under_nohup_a_terminal_that_closes_is_not_heard(nohup):
    with process.stop_requests() as asked:
        signal.raise_signal(signal.SIGHUP)
        assert asked == []
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("number", process.STOP_SIGNALS)
def test_signals_are_recorded_and_handlers_put_back(number):
    before = [signal.getsignal(n) for n in process.STOP_SIGNALS]
    with process.stop_requests() as asked:
        assert asked == []
        signal.raise_signal(number)
        assert asked == [signal.Signals(number).name]
    assert [signal.getsignal(n) for n in process.STOP_SIGNALS] == before


def test_ctrl_c_twice_is_waited_for_and_after_a_second_it_is_not(monkeypatch):
    now_s = 100.0
    monkeypatch.setattr(process.time, "monotonic", lambda: now_s)
    with process.stop_requests() as asked:
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
    loaded_s = time.monotonic() - process._LOADED_S
    uptime_s = time.clock_gettime(time.CLOCK_MONOTONIC)
    monkeypatch.setattr(process, "UNDER_TORCHRUN", False)
    own_s = process.seconds_since_launch()
    assert loaded_s - 0.02 <= own_s <= uptime_s  # the kernel counts in hundredths
    monkeypatch.setattr(process, "UNDER_TORCHRUN", True)
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert process.seconds_since_launch() == pytest.approx(own_s, abs=5)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert process.seconds_since_launch() > own_s


LAUNCHER = """
import os, subprocess, sys
ours = [sys.executable, "-c", "import process; print(process.launch()['torchrun'])"]
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


def test_without_torchrun_and_slurm_there_is_no_launch(monkeypatch):
    monkeypatch.setattr(process, "UNDER_TORCHRUN", False)
    for key in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.setenv(key, "")
    assert process.launch() == {"torchrun": "", "slurm_job": "", "slurm_restarts": "0"}


def test_torch_is_not_imported_before_a_workers_end_is_tied_to_torchruns():
    code = "import sys, process; assert not {'torch', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
