"""What a CPU run never takes: the operations of training and decoding on CUDA, traced without a card (fake_cuda.py)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_process

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> dict:
    """What fake_cuda.py has found."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None or sys.platform != "linux" or torch.version.cuda:
        pytest.skip("needs a C++ compiler, Linux, and a build of torch without CUDA")
    folder = tmp_path_factory.mktemp("fake_cuda")
    include = Path(torch.__file__).parent / "include"
    subprocess.run([compiler, "-shared", "-fPIC", "-std=c++20", f"-I{include}",
                    f"-I{include}/torch/csrc/api/include", HERE / "fake_cuda.cpp", "-o", folder / "fake_cuda.so"],
                   check=True)
    return json.loads(run_process(HERE / "fake_cuda.py", folder / "fake_cuda.so", cwd=folder).splitlines()[-1])


def test_no_operation_mixes_devices_or_waits_for_the_card(traced):
    assert len(traced["cases"]) == 9
    assert [f"{name}: {failure}" for name, failure in traced["cases"].items() if failure] == []


def test_the_end_of_a_step_takes_few_launches(traced):
    """Budgets for 12 blocks: clipping and AdamW do not grow with the model; zeroing takes one for each tensor; Muon's
    grow with its stacks, of which GPT-2 small has six."""
    launches = traced["launches"]
    assert launches["clip"] <= 8
    assert launches["update"] <= 6
    assert launches["Muon's update"] <= 150
    assert launches["zero"] <= traced["tensors"] == 75


def test_a_recording_that_breaks_off_leaves_nothing_behind(traced):
    assert traced["after_a_broken_recording"] == {"stream": "usual", "random_state": "usual"}
