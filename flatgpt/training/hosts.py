"""The hosts of a job: how its processes find each other before torch connects them, and the messages, with the hosts'
names, for when they do not find each other, or a connection is lost.

Owns every message about hosts, addresses and interfaces. docs/hosts.md lists the failures that were tested.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch.distributed as dist

from flatgpt import launcher
from flatgpt.files import one_line

if TYPE_CHECKING:
    from flatgpt.training.distributed import Job

NAME_INTERFACE = ("start torchrun on every host with GLOO_SOCKET_IFNAME=NAME NCCL_SOCKET_IFNAME=NAME, NAME being its "
                  "network interface to the others (`ip -brief address` lists them)")


def meet(job: Job, where: str, timeout: datetime.timedelta) -> dist.Store:
    """The store of rank 0, at `where`, in which the processes find each other; `job` learns each rank's host.

    Raises OSError where they would wait in vain: the store is out of reach, a rank does not come, or gloo would listen
    on a host's loopback, whose ranks torch would keep waiting for five times the timeout."""
    me, (address, _, port) = socket.gethostname(), where.rpartition(":")
    hint = (f"every host has to reach rank 0 there; if {address} does not lead to its host, start torchrun on that "
            "host with --local-addr=ADDRESS") if launcher.UNDER_TORCHRUN else (
            f"the environment has {launcher.rank_variables()}: {launcher.HOW_TO_START}")
    deadline_s = time.monotonic() + timeout.total_seconds()
    while job.rank > 0:
        try:
            socket.create_connection((address, int(port)), timeout.total_seconds()).close()
            break
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise OSError(f"rank {job.rank} on {me} cannot reach rank 0 at {where} ({error}): {hint}") from None
            time.sleep(0.2)
    told, heard = ([f"{what}_{rank}" for rank in range(job.world_size)] for what in ("host_of", "heard_by"))
    try:
        store, _, _ = next(dist.rendezvous("env://", job.rank, job.world_size, timeout=timeout))
        store.set(told[job.rank], f"{me} ({_gloo_address()})")
        store.wait(told, timeout)
        job.hosts = tuple(host.decode() for host in store.multi_get(told))  # one question; the store answers all ranks
        store.set(heard[job.rank], "")
        if job.rank == 0:
            store.wait(heard, timeout)  # it may end with this process
    except dist.DistError as error:
        raise OSError(f"rank {job.rank} on {me} did not meet the others at {where} ({one_line(error)}), whose output "
                      f"may say why: {hint}") from None
    if len(set(job.hosts)) > 1 and (deaf := sorted(set(filter(_is_loopback, job.hosts)))):
        raise OSError(f"the processes cannot reach each other: {', '.join(deaf)} listens only on loopback, because its "
                      f"own name leads there (/etc/hosts), or to an address that it does not have: {NAME_INTERFACE}, "
                      "or correct the name")
    return store


def _gloo_address() -> str:
    """Where gloo listens on this host: at the interface it is told, else where the host's name leads."""
    if interface := os.environ.get("GLOO_SOCKET_IFNAME"):
        return interface
    with contextlib.suppress(OSError):  # a name that leads nowhere
        for family, *_, address in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.bind(address)  # fails for an address of another host
                return address[0]
    return "127.0.0.1"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.rpartition("(")[2].rstrip(")").partition("%")[0]).is_loopback
    except ValueError:  # an interface's name
        return False


@contextlib.contextmanager
def deadline(seconds: float, job: Job) -> Iterator[None]:
    """End the process if the block takes longer: a rank that waits for connections in gloo learns of no failure."""

    def end() -> None:
        sys.stderr.write(f"error: {_cannot_connect(job, f'nothing heard for {seconds:.0f} s')}\n")
        sys.stderr.flush()
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def lost_connections(job: Job) -> Iterator[None]:
    """Turn torch's error about a broken connection into an OSError of one line, which names the hosts."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"\[\S+:\d+\] ", "", one_line(error))  # without the line of torch's source
        if job.cpu_group is None and "connectFullMesh" in reason:
            raise OSError(_cannot_connect(job, reason)) from None
        is_gloos = "/gloo/" in str(error) and "enforce fail" not in str(error)
        if not is_gloos and "ncclRemoteError" not in str(error):
            raise
        others = sorted(set(job.hosts) - {job.hosts[job.rank]}) or ["the other processes"]
        raise OSError(f"{job.name(job.rank)} lost the connection to {', '.join(others)}: {reason}. What was saved is "
                      "intact: torchrun --max-restarts=3 starts all processes again by itself; without it, give the "
                      "same command again on every host") from None


def _cannot_connect(job: Job, reason: str) -> str:
    return (f"{job.name(job.rank)} cannot connect to the others, which listen at "
            f"{', '.join(sorted(set(job.hosts)))}: {reason}. Every host has to reach those: {NAME_INTERFACE}")
