"""machine.py: memory and cores out of made-up folders of control groups, of both versions."""

from pathlib import Path

import pytest

from flatgpt import launcher, machine

GB = 10**9
NO_LIMIT_V1 = 9223372036854771712  # what version 1 writes where there is none


@pytest.fixture
def root(tmp_path, monkeypatch):
    """`root({"proc/self/cgroup": "0::/", ...})` makes these files and reads them in the machine's place."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 64 * GB // 1000}[name])
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)), raising=False)

    def make(files: dict[str, object]) -> None:
        for name, content in ({"proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable:   40000000 kB\n"} | files).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{content}\n")

    return make


def v2(folder: str, limit: object, used: int = 0, cache: int = 0, cpu: str = "max 100000") -> dict[str, object]:
    at = f"sys/fs/cgroup/{folder}".rstrip("/")
    return {f"{at}/memory.max": limit, f"{at}/memory.current": used, f"{at}/cpu.max": cpu,
            f"{at}/memory.stat": f"anon {used - cache}\ninactive_file {cache}\nactive_file 5"}


def v1(folder: str, limit: int, used: int = 0, cache: int = 0, quota: int = -1) -> dict[str, object]:
    memory, cpu = (f"sys/fs/cgroup/{name}/{folder}".rstrip("/") for name in ("memory", "cpu,cpuacct"))
    return {f"{memory}/memory.limit_in_bytes": limit, f"{memory}/memory.usage_in_bytes": used,
            f"{memory}/memory.stat": f"inactive_file 1\ntotal_inactive_file {cache}",
            f"{cpu}/cpu.cfs_quota_us": quota, f"{cpu}/cpu.cfs_period_us": 100000}


V1_GROUPS = "5:cpu,cpuacct:{0}\n4:memory:{0}\n3:cpuset:/elsewhere\n1:name=systemd:{0}\n0::/"


@pytest.mark.parametrize(("files", "memory", "free", "cores"), [
    ({}, 64 * GB, 40.96 * GB, 16),  # no control groups at all
    ({"proc/self/cgroup": "0::/"} | v2("", "max"), 64 * GB, 40.96 * GB, 16),
    # a container: its own group is the root that it sees
    ({"proc/self/cgroup": "0::/"} | v2("", 4 * GB, 3 * GB, GB, "150000 100000"), 4 * GB, 2 * GB, 1),
    ({"proc/self/cgroup": "0::/"} | v2("", 4 * GB, 3 * GB, GB, "50000 100000"), 4 * GB, 2 * GB, 1),
    ({"proc/self/cgroup": "0::/"} | v2("", 4 * GB, 5 * GB, 0, "400000 50000"), 4 * GB, 0, 8),
    # a job within a slice: the lowest limit on the way up, and the least room
    ({"proc/self/cgroup": "0::/a/b"} | v2("a", 8 * GB, 7 * GB, 0, "300000 100000") | v2("a/b", 6 * GB, GB)
     | v2("c", GB), 6 * GB, GB, 3),
    ({"proc/self/cgroup": "0::/a/b"} | v2("a", 6 * GB, GB) | v2("a/b", "max", GB, 0, "1600000 100000"), 6 * GB,
     5 * GB, 16),
    ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/memory.high": 2 * GB} | v2("a", 6 * GB, GB), 2 * GB, GB, 16),
    # a limit above the machine is none
    ({"proc/self/cgroup": "0::/a"} | v2("a", 99 * GB, GB, 0, "9900000 100000"), 64 * GB, 40.96 * GB, 16),
    # paths of the host, and those that leave the namespace
    ({"proc/self/cgroup": "0::/docker/123"} | v2("", 4 * GB, GB), 4 * GB, 3 * GB, 16),
    ({"proc/self/cgroup": "0::/../../a"} | v2("a", 4 * GB, GB), 4 * GB, 3 * GB, 16),
    # version 1
    ({"proc/self/cgroup": V1_GROUPS.format("/")} | v1("", NO_LIMIT_V1, 3 * GB), 64 * GB, 40.96 * GB, 16),
    ({"proc/self/cgroup": V1_GROUPS.format("/docker/123")} | v1("", 4 * GB, 3 * GB, GB, 250000), 4 * GB, 2 * GB, 2),
    ({"proc/self/cgroup": V1_GROUPS.format("/job/step")} | v1("job", 4 * GB, 2 * GB) | v1("job/step", NO_LIMIT_V1, GB)
     | v1("", NO_LIMIT_V1), 4 * GB, 2 * GB, 16),
    # both: the controllers are version 1's, or the memory is version 2's
    ({"proc/self/cgroup": V1_GROUPS.format("/a"), "sys/fs/cgroup/unified/cgroup.procs": ""}
     | v1("a", 4 * GB, GB, 0, 400000), 4 * GB, 3 * GB, 4),
    ({"proc/self/cgroup": "4:cpu:/\n0::/a"} | v2("unified/a", 4 * GB, GB, 0, "200000 100000"), 4 * GB, 3 * GB, 2),
    # what cannot be understood is no limit
    ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "", "sys/fs/cgroup/cpu.max": ""}, 64 * GB, 40.96 * GB,
     16),
    ({"proc/self/cgroup": "odd\n\n0::/", "sys/fs/cgroup/memory.max": GB}, GB, GB, 16),
], ids=range(18))
def test_memory_and_cores_are_what_the_groups_leave(root, files, memory, free, cores):
    root(files)
    assert machine.memory_bytes() == memory
    assert machine.free_memory_bytes() == pytest.approx(free)
    assert machine.num_cores() == cores


def test_an_old_kernel_that_does_not_say_what_is_free_has_half(root):
    root({"proc/meminfo": "MemTotal: 64000000 kB"})
    assert machine.free_memory_bytes() == 32 * GB


def test_ranks_of_a_machine_share_its_cores(root, monkeypatch):
    from flatgpt.data.pipeline import TokensConfig
    from flatgpt.data.sources import SourceConfig
    from prepare_data import PrepareConfig, num_workers

    root({"proc/self/cgroup": "0::/"} | v2("", "max", 0, 0, "600000 100000"))
    config = PrepareConfig(SourceConfig(hf="owner/name"), TokensConfig())
    for told, workers in (("1", 6), ("2", 3), ("9", 1), ("", 6)):
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "9"), ("LOCAL_WORLD_SIZE", told)):
            monkeypatch.setenv(name, value)
        assert num_workers(config, []) == workers


@pytest.mark.parametrize(("cpu", "omp", "ranks", "threads"), [
    ("max 100000", None, 1, 8), ("300000 100000", None, 1, 3), ("300000 100000", None, 2, 1),
    ("300000 100000", "8", 1, 8), ("1200000 100000", None, 1, 8)])
def test_torch_takes_no_more_threads_than_the_quota(root, monkeypatch, cpu, omp, ranks, threads):
    import torch

    from flatgpt.training import distributed
    from flatgpt.training.device import DeviceConfig

    root({"proc/self/cgroup": "0::/"} | v2("", "max", 0, 0, cpu))
    monkeypatch.setattr("flatgpt.launcher.ranks", lambda: launcher.Ranks(local_world_size=ranks))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    taken = [8]  # what torch would take
    monkeypatch.setattr(torch, "get_num_threads", lambda: taken[-1])
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    with distributed.init_job(DeviceConfig(device="cpu", dtype="float32")):
        assert taken[-1] == threads


def test_too_little_memory_for_torch_is_said(root, monkeypatch, capsys):
    root({"proc/self/cgroup": "0::/"} | v2("", 300_000_000, 20_000_000))
    machine.warn_of_little_memory()
    assert capsys.readouterr().err == ""
    root({"proc/self/cgroup": "0::/"} | v2("", 160_000_000, 20_000_000))
    machine.warn_of_little_memory()
    assert capsys.readouterr().err.startswith("warning: 140 MB of memory are left, and")
    monkeypatch.setenv("RANK", "1")
    machine.warn_of_little_memory()
    assert capsys.readouterr().err == ""


def test_a_process_knows_what_it_holds():
    if not Path("/proc/self/status").is_file():
        pytest.skip("only Linux says")
    before = machine.resident_bytes()
    held = bytearray(b"x" * 50_000_000)
    assert 40_000_000 < machine.resident_bytes() - before < 200_000_000
    del held
