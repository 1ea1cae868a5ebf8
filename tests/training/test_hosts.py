"""Two hosts and the wire between them: a run ends with the bytes of one that nothing happened to, or in one line that
names the host and says what to do, and no later than the timeout.

A host is a set of namespaces: a network device with its own address, a host name, an /etc/hosts, and process ids, whose
first process takes all others with it. Namespaces end with the processes that hold them, and those with this one by the
kernel's hand, so that nothing is left over. All carry the mark `soak`; what each cost is printed: `pytest -rP`.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import planted
import pytest
import wire
from conftest import ROOT, TEXT, files_of, run_process, torchrun
from faults import RUN, TINY, Torchrun, assert_same_end, newest_step, resumed_at, until

pytest_plugins = ["faults"]
pytestmark = [pytest.mark.soak, pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")]

TIED = ("setpriv", "--pdeathsig", "KILL")  # ends with us
ADDRESSES = {"east": "192.168.77.1", "west": "192.168.77.2"}
LOCALHOST = "127.0.0.1 localhost\n"
RIGHT_NAMES = LOCALHOST + "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
AGENT = ("--nnodes=2", "--rdzv_backend=c10d", "--rdzv_endpoint=east:29500")  # whose torchrun keeps the store


class Hosts:
    """east and west, and the wire."""

    def __init__(self, folder: Path):
        self._folder, self._holders = folder, {}
        self._wire = hold(*TIED, "unshare", "--net", sys.executable, wire.__file__, *ADDRESSES)
        for name in ADDRESSES:
            self._etc_hosts(name).write_text(RIGHT_NAMES)
            self._holders[name] = hold(*TIED, "unshare", "--net", "--uts", "--mount", "sh", "-ec", f"""
                echo {name} > /proc/sys/kernel/hostname
                mount --bind {self._etc_hosts(name)} /etc/hosts
                mount --bind /dev/null /etc/resolv.conf
                echo ready
                exec cat""")
            in_namespace(self._wire, f"ip link set {name} netns {self._holders[name].pid}")
            in_namespace(self._holders[name], f"""
                ip link set lo up
                ip link set {name} name link0
                ip address add {ADDRESSES[name]}/24 dev link0
                ip link set link0 up""")

    def _etc_hosts(self, name: str) -> Path:
        return self._folder / f"hosts-of-{name}"

    def set_names(self, name: str, text: str) -> None:
        """What /etc/hosts says on one of them."""
        self._etc_hosts(name).write_text(text)

    def set_tcp_retries(self, retries: int) -> None:
        """How often what got no answer is sent anew before TCP gives a connection up: 15 times, a quarter of an hour,
        by default."""
        for holder in self._holders.values():
            in_namespace(holder, f"echo {retries} > /proc/sys/net/ipv4/tcp_retries2")

    def set_wire(self, loss: float, delay_s: float = 0) -> None:
        print(loss, delay_s, file=self._wire.stdin, flush=True)

    def prefix(self, name: str, cwd: Path) -> tuple[str, ...]:
        """Before a command: run it there, as the process that all others there end with."""
        return (*TIED, "nsenter", f"--target={self._holders[name].pid}", "--net", "--uts", "--mount", "unshare",
                "--mount", "--pid", "--mount-proc", "--fork", "--kill-child", "env", f"--chdir={cwd}")

    def close(self) -> None:
        for process in (self._wire, *self._holders.values()):
            process.kill()
            process.wait()


def hold(*command: str) -> subprocess.Popen:
    """Start what holds a namespace, and wait until it is ready."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def in_namespace(holder: subprocess.Popen, script: str) -> None:
    subprocess.run(["nsenter", f"--target={holder.pid}", "--net", "sh", "-ec", script], check=True)


@pytest.fixture
def hosts(tmp_path):
    for tool, package in (("ip", "iproute2"), ("unshare", "util-linux"), ("setpriv", "util-linux")):
        if not shutil.which(tool):
            pytest.skip(f"needs `{tool}`: apt-get install {package}")
    if subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True,
                      check=False).returncode:
        pytest.skip("this user may make no namespaces")
    if not os.access("/dev/net/tun", os.W_OK):
        pytest.skip("/dev/net/tun is not there, or not for this user")
    made = Hosts(tmp_path)
    yield made
    made.close()


@pytest.fixture
def one_host(undisturbed) -> Path:
    """The folder of a run of two ranks on one host that nothing happened to."""
    return undisturbed("ddp")


@pytest.fixture
def launch(hosts, data):
    """launch("--key=value"): start torchrun on both hosts, or on those in `on`; returns it for each by its name."""
    started = []

    def start(*options: str, on: tuple[str, ...] = tuple(ADDRESSES), agent: tuple[str, ...] = (), run=RUN,
              cwd: Path = data, script: Path | str = planted.__file__, **env: str) -> dict[str, Torchrun]:
        runs = {name: Torchrun(cwd, 1, (*run, *options), (*AGENT, *agent), env, script, hosts.prefix(name, cwd))
                for name in on}
        started.extend(runs.values())
        return runs

    yield start
    for run in started:
        run.process.kill()
        run.process.wait()


def wait_for_all(runs: dict[str, Torchrun], limit_s: float) -> dict[str, int]:
    """The exit statuses, by name."""
    until(lambda: all(run.process.poll() is not None for run in runs.values()), lambda: logs(runs), limit_s)
    return {name: run.process.returncode for name, run in runs.items()}


def logs(runs: dict[str, Torchrun]) -> str:
    return "\n".join(f"-------- {name}\n{run.log}" for name, run in runs.items())


def errors(run: Torchrun) -> list[str]:
    """The lines for a user."""
    return [line for line in run.log.splitlines() if "error: " in line]


def assert_ends_like_one_host(runs: dict[str, Torchrun], one_host: Path, limit_s: float = 200) -> None:
    assert set(wait_for_all(runs, limit_s).values()) == {0}, logs(runs)
    assert_same_end(TINY, one_host)


def assert_lines(runs: dict[str, Torchrun], *words: str) -> None:
    """Each host shows one line for a user, with these words, and no traceback but torchrun's own."""
    for run in runs.values():
        [line] = errors(run)
        assert all(word in line for word in words), line
        assert run.log.count("Traceback") == run.log.count("ChildFailedError: "), run.log


def cost(what: str, since_s: float) -> None:
    print(f"COST {what}: {time.monotonic() - since_s:.1f} s")


def hold_in_step_26(launch, *options: str, **more) -> dict[str, Torchrun]:
    """A run that waits there, with the checkpoint of step 20, until `go` is there."""
    runs = launch(*options, HOLD_STEP="25", **more)
    until(lambda: (Path("held").exists() and newest_step(TINY) == 20)
          or any(run.process.poll() is not None for run in runs.values()), lambda: logs(runs))
    return runs


def go_on() -> float:
    Path("go").touch()
    return time.monotonic()


def test_two_hosts_with_folders_of_their_own_end_as_one_host_does(launch, data, one_host):
    since_s, runs = time.monotonic(), {}
    for name in ADDRESSES:
        (data / name).mkdir()
        (data / name / "data").symlink_to(data / "data")
        runs |= launch(on=(name,), cwd=data / name)
    assert set(wait_for_all(runs, 200).values()) == {0}, logs(runs)
    cost("undisturbed, 40 steps with the start", since_s)
    [folder] = data.glob("*/out/tiny")  # rank 0's
    assert_same_end(folder, one_host)


@pytest.mark.parametrize(("own_name", "cure"), [("127.0.1.1 east", ()),  # Debian's way
                                                ("127.0.0.1 east", ("--local-addr=192.168.77.1",))])
def test_a_host_whose_name_leads_to_loopback_is_named_and_with_the_interface_named_all_is_well(
        launch, hosts, one_host, own_name, cure):
    hosts.set_names("east", f"{LOCALHOST}{own_name}\n{ADDRESSES['west']} west\n")
    runs, since_s = launch("--timeout_s=20"), time.monotonic()
    assert 0 not in wait_for_all(runs, 100).values()
    cost(f"/etc/hosts of east says {own_name!r}, to the end of both with the start", since_s)
    if cure:  # torchrun takes "localhost" for the name of its host, and tells it to the other
        assert "rank 1 on west cannot reach rank 0 at localhost" in errors(runs["west"])[0]
        assert "start torchrun on that with --local-addr=ADDRESS" in errors(runs["west"])[0]
        assert "rank 0 on east did not meet the others at localhost" in errors(runs["east"])[0]
    else:
        assert_lines(runs, "cannot reach each other: east (127.0.", "GLOO_SOCKET_IFNAME=NAME NCCL_SOCKET_IFNAME=NAME")
    runs = launch(on=("west",), GLOO_SOCKET_IFNAME="link0")
    runs |= launch(on=("east",), agent=cure, GLOO_SOCKET_IFNAME="link0")
    assert_ends_like_one_host(runs, one_host)


def test_a_short_cut_is_waited_out(launch, hosts, one_host):
    runs = hold_in_step_26(launch, "--timeout_s=60")
    hosts.set_wire(loss=1)
    since_s = go_on()
    time.sleep(20)
    hosts.set_wire(loss=0)
    assert_ends_like_one_host(runs, one_host)
    assert not any(map(errors, runs.values()))
    cost("the wire cut for 20 s, to the end of the last 14 steps", since_s)


def test_after_a_cut_that_outlasts_the_timeout_torchrun_starts_all_again(launch, hosts, one_host):
    runs = hold_in_step_26(launch, "--timeout_s=10", agent=("--max-restarts=3",))
    hosts.set_wire(loss=1)
    since_s = go_on()
    time.sleep(25)
    hosts.set_wire(loss=0)
    assert_ends_like_one_host(runs, one_host)
    assert [step for run in runs.values() for step in resumed_at(run.log)] == [20]
    assert_lines(runs, "lost the connection to", "Timed out waiting")
    cost("the wire cut for 25 s with --timeout_s=10 and --max-restarts=3, to the end of 20 steps", since_s)


def test_a_cut_for_good_ends_both_hosts_with_a_line_and_the_same_command_goes_on(launch, hosts, one_host):
    hosts.set_tcp_retries(6)  # torchrun itself asks the store without any limit in time
    runs = hold_in_step_26(launch, "--timeout_s=10")
    hosts.set_wire(loss=1)
    since_s = go_on()
    until(lambda: all(map(errors, runs.values())), lambda: logs(runs), 60)
    cost("the wire cut for good with --timeout_s=10, to the line on both hosts", since_s)
    assert 0 not in wait_for_all(runs, 200).values()
    cost("the same with net.ipv4.tcp_retries2=6, to torchrun's end", since_s)
    for (name, run), other in zip(runs.items(), reversed(runs)):
        assert f"on {name} ({ADDRESSES[name]}) lost the connection to {other} ({ADDRESSES[other]})" in errors(run)[0]
        assert "give the same command again on every host" in errors(run)[0]
    hosts.set_wire(loss=0)
    assert_ends_like_one_host(launch(), one_host)


def test_a_bad_wire_costs_time_only(launch, hosts, one_host):
    hosts.set_wire(loss=0.05, delay_s=0.05)
    since_s = time.monotonic()
    assert_ends_like_one_host(launch(), one_host, 300)
    cost("5% of packets lost and 50 ms each way, 40 steps with the start", since_s)


def test_a_host_that_is_killed_and_started_again_joins_the_other(launch, one_host):
    runs = hold_in_step_26(launch, agent=("--max-restarts=3",))
    runs["west"].process.kill()
    since_s = go_on()
    runs |= launch(on=("west",), agent=("--max-restarts=3",))
    assert_ends_like_one_host(runs, one_host)
    assert [step for run in runs.values() for step in resumed_at(run.log)] == [20]
    cost("west killed and started again at once, to the end of 20 steps", since_s)


def test_with_the_host_of_the_store_the_other_ends_too_and_the_same_command_goes_on(launch, one_host):
    runs = hold_in_step_26(launch, agent=("--max-restarts=3",))
    runs["east"].process.kill()
    since_s = go_on()
    assert wait_for_all(runs, 100)["west"] != 0
    cost("east killed, to the end of west's torchrun", since_s)
    assert "on west (192.168.77.2) lost the connection to east (192.168.77.1)" in errors(runs["west"])[0]
    runs = launch()
    assert_ends_like_one_host(runs, one_host)
    assert [step for run in runs.values() for step in resumed_at(run.log)] == [20]


def test_a_host_with_another_copy_of_the_code_is_named(launch, data):
    copy = data / "copy"
    shutil.copytree(ROOT / "flatgpt", copy / "flatgpt")
    for name in ("train.py", "model.py"):
        shutil.copy(ROOT / name, copy)
    with open(copy / "flatgpt" / "training" / "optim.py", "a") as file:
        file.write("# another version\n")
    runs, since_s = launch(on=("east",), script=ROOT / "train.py"), time.monotonic()
    runs |= launch(on=("west",), script=copy / "train.py")
    assert 0 not in wait_for_all(runs, 100).values()
    cost("other code on west, to the end of both with the start", since_s)
    assert_lines(runs, "do not run the same job: the code is ", " on west (192.168.77.2)", " on east (192.168.77.1)",
                 "the same command, code and data")


def test_a_host_with_other_data_is_named(launch, data):
    (data / "other").mkdir()
    (data / "other" / "tiny.txt").write_text(TEXT.replace("fox", "cat"))
    run_process(ROOT / "prepare_data.py", "--input=tiny.txt", "--name=tiny", "--tokenizer=char", cwd=data / "other")
    runs = launch(on=("east",)) | launch(on=("west",), cwd=data / "other")
    assert 0 not in wait_for_all(runs, 100).values()
    assert_lines(runs, "do not run the same job: the data is ", " on west (192.168.77.2)", " on east (192.168.77.1)")


def test_what_only_rank_0_finds_is_pointed_to_on_the_other_host(launch, data):
    Path("out").write_text("no folder")
    runs = launch()
    assert 0 not in wait_for_all(runs, 100).values()
    lines = sorted(errors(run)[0] for run in runs.values())
    assert "has failed: its own output says why" in lines[0]
    assert "out" in lines[1]


def test_data_prepared_by_two_hosts_of_which_one_is_killed_is_the_same(launch, tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir(tmp_path / "texts")
    for part in range(4):
        Path(f"texts_{part}.txt").write_text("".join(f"{part} {line} {TEXT}" for line in range(200)))
    options = ("--input=texts_*.txt", "--tokenizer=byte", "--shard_tokens=100000", "--workers=1")
    torchrun(2, ROOT / "prepare_data.py", *options, "--name=whole", cwd=Path.cwd())

    def start(on: str) -> dict[str, Torchrun]:
        return launch(*options, "--name=made", on=(on,), agent=("--max-restarts=3",), run=(), cwd=Path.cwd(),
                      script=ROOT / "prepare_data.py")

    runs = start("east") | start("west")
    until(lambda: all(list(Path("data").glob(f".made.partial/rank_{rank:05d}*/*.bin")) for rank in (0, 1)),
          lambda: logs(runs))
    assert not Path("data/made").exists()
    runs["west"].process.kill()
    since_s = time.monotonic()
    runs |= start("west")
    assert set(wait_for_all(runs, 200).values()) == {0}, logs(runs)
    cost("prepare_data.py on two hosts, west killed and started again at once, to the end", since_s)
    assert files_of(Path("data/made")) == files_of(Path("data/whole"))
