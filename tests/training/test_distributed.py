"""distributed.py: what the ranks must agree on, they compare."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, on_ranks
from test_parallel import join

from flatgpt.options import flatten
from flatgpt.training import distributed, hosts
from flatgpt.training.config import TrainConfig
from flatgpt.training.device import DeviceConfig
from flatgpt.training.distributed import Job, ParallelConfig


def groups_of(config: ParallelConfig, local_world_size: str) -> tuple[int, list[int], list[int]]:
    """The shard_size of this rank's job, and the ranks of its two groups."""
    os.environ["LOCAL_WORLD_SIZE"], os.environ["LOCAL_RANK"] = local_world_size, "0"
    with distributed.init_job(DeviceConfig(device="cpu"), config) as job:
        return job.shard_size, *([] if group is None else dist.get_process_group_ranks(group)
                                 for group in (job.shard_group, job.replica_group))


@pytest.mark.parametrize(("layout", "local_world_size", "expected"), [
    ("ddp", 2, [(1, [], [0, 1])] * 2), ("fsdp", 1, [(2, [0, 1], [])] * 2), ("hsdp", 2, [(2, [0, 1], [])] * 2),
    ("hsdp", 1, [(1, [], [0, 1])] * 2),
    ("hsdp", 2, [(2, [0, 1], [0, 2]), (2, [0, 1], [1, 3]), (2, [2, 3], [0, 2]), (2, [2, 3], [1, 3])])])
def test_neighbours_hold_a_copy_of_the_model_and_their_peers_the_same_part(layout, local_world_size, expected):
    assert on_ranks(len(expected), groups_of, ParallelConfig(parallel=layout), str(local_world_size)) == expected


def gather_parts(counts: list[int]) -> list[float]:
    with join("ddp") as job:
        mine = torch.arange(counts[job.rank], dtype=torch.bfloat16) + 100 * job.rank
        return distributed.all_gather(mine, counts, job.replica_group).tolist()


@pytest.mark.parametrize("counts", [[3, 2, 2], [0, 1, 0], [3, 0, 0]], ids=["padded", "one rank", "the first"])
def test_parts_of_any_sizes_are_gathered_whole(counts):
    """The first with padding, the others, where that would take most of it, as a sum with zeros."""
    wanted = [100 * rank + i for rank, count in enumerate(counts) for i in range(count)]
    assert on_ranks(3, gather_parts, counts) == 3 * [wanted]


def test_one_process_is_a_copy_by_itself_in_any_layout():
    for layout in ("ddp", "fsdp", "hsdp"):
        with join(layout, shard_size=0) as job:
            assert (job.shard_size, job.shard_group, job.replica_group) == (1, None, None)


def why_not_joined(shard_sizes: tuple[int, int]) -> str:
    try:
        with join("hsdp", shard_size=shard_sizes[int(os.environ["RANK"])]):
            return ""
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(("shard_sizes", "fault"), [
    ((4, 4), "shard_size=4 does not divide the 2 processes: it can be 1, 2"),
    ((2, 1), "the processes do not run the same job: shard_size is 1 on rank 1 and 2 on rank 0")])
def test_groups_that_do_not_share_out_the_processes_are_refused_on_all(shard_sizes, fault):
    assert all(said.startswith(fault) for said in on_ranks(2, why_not_joined, shard_sizes))


@pytest.mark.parametrize(("options", "fault"), [
    (["--shard_size=2"], "shard_size=2 does nothing with parallel=ddp: leave it out, or use --parallel=hsdp"),
    (["--parallel=fsdp", "--shard_size=2"], "shard_size=2 does nothing with parallel=fsdp"),
    (["--reshard_after_forward=False"], "or use --parallel=fsdp or hsdp"),
    (["--reduce_every_micro_batch=True"], "reduce_every_micro_batch=True does nothing with parallel=ddp"),
    (["--parallel=hsdp", "--shard_size=-1"], "shard_size=-1 must be 0 or more"),
    (["--parallel=hsdp", "--shard_size=2"], "shard_size=2 does not divide the 1 processes")])
def test_options_that_the_layout_has_no_use_for_are_refused(refused, options, fault):
    assert fault in refused("train", *options, "--device=cpu")


def disagree():
    with join("ddp") as job:
        distributed.check_agreement({"learning_rate": 0.1, "n_layer": 2}, job)
        try:
            distributed.check_agreement({"learning_rate": (0.1, 0.2)[job.rank], "n_layer": 2}, job)
        except ValueError as error:
            return str(error)


def test_ranks_that_disagree_all_hear_of_what():
    for message in on_ranks(2, disagree):
        assert "learning_rate is 0.2 on rank 1 and 0.1 on rank 0" in message
        assert "n_layer" not in message


def meet_on_two_hosts(address_of_east: str):
    """What rank 0 on `east` and rank 1 on `west` say when they join, and then when rank 0 fails at what it does."""
    rank = int(os.environ["RANK"])
    socket.gethostname = lambda: ("east", "west")[rank]
    hosts._gloo_address = lambda: (address_of_east, "10.0.0.2")[rank]
    try:
        with join("ddp") as job:
            distributed.on_rank0(lambda: 1 / 0, job)
    except (OSError, ZeroDivisionError) as error:
        return str(error)


@pytest.mark.parametrize("address", ["127.0.1.1", "::1"])
def test_a_host_that_is_known_by_loopback_is_named_on_all(address):
    for message in on_ranks(2, meet_on_two_hosts, address):
        assert f"east ({address}) listens only on loopback" in message
        assert "GLOO_SOCKET_IFNAME=NAME NCCL_SOCKET_IFNAME=NAME" in message
        assert "west" not in message


def read_on_rank0(rank_file: str) -> tuple[Any, str]:
    """What a rank gets of a file that rank 0 reads, and how it ends where there is none."""
    with join("ddp") as job:
        found = distributed.kept_on_rank0(lambda: Path(rank_file).read_text(), job)
        try:
            distributed.kept_on_rank0(lambda: Path(f"{rank_file}.none").read_text(), job)
        except (OSError, SystemExit) as end:
            return found, type(end).__name__


def test_what_rank_0_reads_for_itself_is_not_sent_and_its_failure_ends_all(tmp_path):
    (tmp_path / "file").write_text("text")
    assert on_ranks(2, read_on_rank0, str(tmp_path / "file")) == [("text", "FileNotFoundError"), (None, "SystemExit")]


def test_another_host_hears_where_to_read_why_rank_0_failed():
    east, west = on_ranks(2, meet_on_two_hosts, "eth0")
    assert east == "division by zero"
    assert west == "rank 0 on east (eth0) has failed: its own output says why"


def test_a_connection_that_breaks_is_one_line_with_the_hosts_and_no_defect_is_taken_for_one():
    job = Job(1, 2, torch.device("cpu"), torch.float32, cpu_group=object(),
              hosts=("east (10.0.0.1)", "west (10.0.0.2)"))
    broken = "[/src/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:4321\nmore"
    line = (r"^rank 1 on west \(10.0.0.2\) lost the connection to east \(10.0.0.1\): RuntimeError: Connection closed "
            r"by peer \[10.0.0.1\]:4321. What was saved is intact")
    with pytest.raises(OSError, match=line), hosts.lost_connections(job):
        raise RuntimeError(broken)
    for defect in ("[enforce fail at /src/third_party/gloo/gloo/transport/tcp/pair.cc:446] 8 vs 4", "size mismatch"):
        with pytest.raises(RuntimeError, match=re.escape(defect)), hosts.lost_connections(job):
            raise RuntimeError(defect)


def test_connecting_has_an_end():
    code = ("import torch, time\nfrom flatgpt.training import distributed, hosts\n"
            "here = distributed.Job(0, 2, torch.device('cpu'), torch.float32,"
            "hosts=('east (10.0.0.1)', 'west (10.0.0.2)'))\n"
            "with hosts.deadline(0, here): time.sleep(100)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: rank 0 on east (10.0.0.1) cannot connect to the others, which listen at ")


def share(marked: dict) -> tuple[dict, str]:
    """A run's options on this rank once rank 0's count, and what the ranks disagree about then."""
    with join("ddp") as job:
        config = TrainConfig(max_minutes=job.rank + 1.0)
        config.run.out_dir, config.log.wandb_run_name = f"out/{job.rank}", f"run-{job.rank}"
        config.optim.learning_rate = marked["learning_rate"][job.rank]
        distributed.share_rank0s(config, job)
        try:
            distributed.check_agreement(flatten(config), job)
        except ValueError as error:
            return flatten(config), str(error)
        return flatten(config), ""


@pytest.mark.parametrize("learning_rates", [(0.1, 0.1), (0.1, 0.2)])
def test_what_only_rank_0_acts_on_is_rank_0s_and_nothing_else_is(learning_rates):
    for rank, (options, fault) in enumerate(on_ranks(2, share, {"learning_rate": learning_rates})):
        assert [options[key] for key in ("out_dir", "wandb_run_name", "max_minutes")] == ["out/0", "run-0", 1.0]
        assert options["learning_rate"] == learning_rates[rank]
        assert ("learning_rate is 0.2 on rank 1" in fault) == (len(set(learning_rates)) == 2)
        for key in ("out_dir", "wandb_run_name", "max_minutes"):
            assert key not in fault
