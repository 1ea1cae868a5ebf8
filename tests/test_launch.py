"""launch/: each file is read by its own tool or schema; the Slurm script runs with stand-ins for Slurm's commands."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from kubeflow_trainer_api import models
from torch.distributed.run import get_args_parser

LAUNCH = ROOT / "launch"
TOOLS = Path(sys.executable).parent
SCHEMAS = {"PersistentVolumeClaim": models.IoK8sApiCoreV1PersistentVolumeClaim, "Job": models.IoK8sApiBatchV1Job,
           "TrainJob": models.TrainerV1alpha1TrainJob}


def complaints(tool: str, path: Path) -> str:
    done = subprocess.run([TOOLS / tool, path], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def documents(name: str) -> dict[str, dict]:
    """A file's documents by their kinds."""
    return {each["kind"]: each for each in yaml.safe_load_all((LAUNCH / name).read_text(encoding="utf-8"))}


# Docker


def test_the_dockerfile_has_no_fault_that_its_linter_knows(tmp_path):
    assert complaints("hadolint", LAUNCH / "Dockerfile") == ""
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /\nCOPPY . .\n")
    assert complaints("hadolint", tmp_path / "Dockerfile")


def test_the_image_is_of_one_version_has_no_root_and_copies_what_the_build_context_has():
    lines = re.sub(r"\\\n", "", (LAUNCH / "Dockerfile").read_text(encoding="utf-8")).splitlines()
    steps = [line.split(None, 1) for line in lines if line and not line.startswith("#")]
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04", dict(steps)["FROM"])
    assert [value for key, value in steps if key == "USER"] == ["10001:10001"]
    torch = next(re.search(r"torch==(\S+)", value)[1] for key, value in steps if key == "RUN" and "torch==" in value)
    assert f"<={torch}" in (ROOT / "requirements.txt").read_text(encoding="utf-8")
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"]
    assert {"requirements.txt", "*.py", "flatgpt", "config"} <= set(kept)
    assert all([*ROOT.glob(pattern)] for pattern in kept)


# Kubernetes


@pytest.mark.parametrize("name", ["kubernetes.yaml", "kubernetes_data.yaml"])
def test_kubernetes_schemas_know_every_field_and_its_type(name):
    """A field that a schema does not know is left out of what it reads."""
    for kind, document in documents(name).items():
        assert json.loads(SCHEMAS[kind].from_dict(document).to_json()) == document


def test_a_schema_leaves_out_what_it_does_not_know():
    document = documents("kubernetes.yaml")["TrainJob"]
    document["spec"]["trainer"]["numNode"] = 2
    assert json.loads(SCHEMAS["TrainJob"].from_dict(document).to_json()) != document


def test_torchrun_takes_the_pods_arguments_and_what_the_trainer_puts_into_the_environment(monkeypatch):
    for key, value in {"NNODES": "2", "NPROC_PER_NODE": "auto", "NODE_RANK": "1", "MASTER_PORT": "29500",
                       "MASTER_ADDR": "flatgpt-node-0-0.flatgpt"}.items():
        monkeypatch.setenv(f"PET_{key}", value)
    trainer = documents("kubernetes.yaml")["TrainJob"]["spec"]["trainer"]
    assert trainer["command"] == ["torchrun"]
    args = get_args_parser().parse_args([re.sub(r"\$\((\w+)\)", lambda found: os.environ[found[1]], arg)
                                         for arg in trainer["args"]])
    assert (args.nnodes, args.nproc_per_node, args.rdzv_backend) == ("2", "auto", "c10d")
    assert args.rdzv_endpoint == "flatgpt-node-0-0.flatgpt:29500"
    assert (ROOT / args.training_script).is_file()
    assert (ROOT / args.training_script_args[0]).is_file()


def test_a_pod_leaves_torchrun_its_time_and_mounts_what_it_declares():
    job, data = documents("kubernetes.yaml")["TrainJob"], documents("kubernetes_data.yaml")
    [patch] = job["spec"]["runtimePatches"]
    pod = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    env = {each["name"]: each["value"] for each in job["spec"]["trainer"]["env"]}
    assert pod["terminationGracePeriodSeconds"] > int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    preparing = data["Job"]["spec"]["template"]["spec"]
    for each in (pod, preparing):
        mounted = {mount["name"] for container in each["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in each["volumes"]}
        claims = {volume["persistentVolumeClaim"]["claimName"] for volume in each["volumes"]
                  if "persistentVolumeClaim" in volume}
        assert claims == {data["PersistentVolumeClaim"]["metadata"]["name"]}
        assert each["securityContext"]["runAsUser"] == 10001  # the image's
    assert preparing["containers"][0]["image"] == job["spec"]["trainer"]["image"]


# Slurm

COMMANDS = {  # srun waits for a second signal's worth of time, or ends as it is told
    "srun": 'echo "srun $*" >> "$CALLS"; [ -z "$SLOW" ] && exit $CODE\n'
            'trap "exit $CODE" USR1; touch "$CALLS.ready"; while :; do sleep 0.05; done',
    "scontrol": 'echo "scontrol $*" >> "$CALLS"; [ "$1" = show ] && printf "east\\nwest\\n"; true',
    "python": "exit 0"}


def run_slurm(folder: Path, code: int, signals_it: bool, **env: str) -> tuple[int, list[str]]:
    """The script's exit status, and how it called Slurm's commands."""
    for name, body in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    calls = folder / "calls"
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "[east,west]", "SLURM_NNODES": "2",
           "SLURM_CPUS_PER_TASK": "64"}
    process = subprocess.Popen(["bash", LAUNCH / "slurm.sbatch", "config/a.py", "--out_dir=a b"], env={
        **os.environ, **job, "PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls), "CODE": str(code),
        "SLOW": "yes" * signals_it, **env})
    if signals_it:
        while not (folder / "calls.ready").exists():
            time.sleep(0.02)
        time.sleep(0.1)  # for the script's own trap
        process.send_signal(signal.SIGUSR1)
    return process.wait(30), calls.read_text().splitlines()


def test_the_slurm_script_has_no_fault_that_shellcheck_knows(tmp_path):
    assert complaints("shellcheck", LAUNCH / "slurm.sbatch") == ""
    (tmp_path / "faulty").write_text("#!/bin/bash\ncd $1\n")
    assert complaints("shellcheck", tmp_path / "faulty")


@pytest.mark.parametrize(("gpus", "processes"), [({"SLURM_GPUS_ON_NODE": "4"}, 4), ({}, 1)])
def test_slurm_starts_a_process_for_each_gpu_that_it_grants(tmp_path, gpus, processes):
    code, calls = run_slurm(tmp_path, 0, signals_it=False, **gpus)
    assert code == 0
    srun, = (call for call in calls if call.startswith("srun"))
    assert f"--nnodes=2 --nproc_per_node={processes} " in srun
    assert "--rdzv_endpoint=east:23456 --rdzv_id=123456" in srun
    assert srun.endswith("train.py config/a.py --out_dir=a b")


def test_a_slurm_job_that_fails_says_so_and_is_not_requeued(tmp_path):
    code, calls = run_slurm(tmp_path, 3, signals_it=False)
    assert code == 3
    assert not any("requeue" in call for call in calls)


@pytest.mark.parametrize(("code", "requeued"), [(1, ["scontrol requeue 123456"]), (0, [])])
def test_a_slurm_job_told_to_stop_is_requeued_unless_it_had_come_to_its_end(tmp_path, code, requeued):
    status, calls = run_slurm(tmp_path, code, signals_it=True)
    assert status == 0
    assert [call for call in calls if "requeue" in call] == requeued
