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
def library(tmp_path_factory) -> Path:
    """fake_cuda.cpp, compiled."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None or sys.platform != "linux" or torch.version.cuda:
        pytest.skip("needs a C++ compiler, Linux, and a build of torch without CUDA")
    path = tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so"
    include = Path(torch.__file__).parent / "include"
    subprocess.run([compiler, "-shared", "-fPIC", "-std=c++20", f"-I{include}",
                    f"-I{include}/torch/csrc/api/include", HERE / "fake_cuda.cpp", "-o", path], check=True)
    return path


def run_with(library: Path, script: str) -> dict:
    """The JSON object that a script of this folder prints."""
    return json.loads(run_process(HERE / script, library, cwd=library.parent).splitlines()[-1])


@pytest.fixture(scope="module")
def traced(library) -> dict:
    return run_with(library, "fake_cuda.py")


def test_no_operation_mixes_devices_or_waits_for_the_card(traced):
    assert len(traced["cases"]) == 9
    assert [f"{name}: {failure}" for name, failure in traced["cases"].items() if failure] == []


def test_documents_and_windows_take_the_kernel_for_sequences_of_different_lengths(traced):
    """Not in float32, with dropout within attention, or with numbers that are added to the scores."""
    assert traced["varlen"] == ["bfloat16", "float16", "llama", "mistral", "fast", "post-norm"]


def test_the_end_of_a_step_takes_few_launches(traced):
    """Budgets for 12 blocks, of 75 tensors: nothing grows with the model but Muon's number of stacks, which are six for
    GPT-2 small."""
    launches = traced["launches"]
    assert launches["clip"] <= 8
    assert launches["update"] <= 6
    assert launches["Muon's update"] <= 130
    assert launches["zero"] <= 2


def test_the_memory_of_a_step_is_forecast(library):
    """Within 5% of what torch's tracker counts; see fake_memory.py."""
    found = run_with(library, "fake_memory.py")
    assert len(found) == 10
    assert {name: forecast / peak for name, (peak, forecast) in found.items()} == pytest.approx(
        dict.fromkeys(found, 1), rel=0.05)


def test_the_heads_gradient_is_added_within_the_product(traced):
    assert traced["launches"]["add_product"] == 1


def test_a_recording_that_breaks_off_leaves_nothing_behind(traced):
    assert traced["after_a_broken_recording"] == {"stream": "usual", "random_state": "usual"}


def test_a_compiled_step_keeps_to_its_memory_traffic(library):
    """Budgets in GB (1e9 bytes) of 64 x 1,024 tokens in bfloat16, for a block's kernels that are no libraries' and for
    4,096 rows of GPT-2's logits. BENCHMARKS.md has what each was before."""
    if not torch.__version__.startswith("2.13."):
        pytest.skip("the budgets are those of torch 2.13's compiler")
    found = run_with(library, "fake_h100.py")
    gigabytes = {case: round(traffic["bytes"] / 1e9, 2) for case, traffic in found.items()}
    budgets = {"gpt2": 6.5, "llama": 6.8, "fast": 7.7, "chunk": 1.3}
    assert gigabytes.keys() == budgets.keys()
    assert {case: gb for case, gb in gigabytes.items() if not 0.8 * budgets[case] < gb <= budgets[case]} == {}
    assert found["chunk"]["largest_buffer_bytes"] == 4096 * 50304 * 2, "a chunk's logits exist in float32 as well"
