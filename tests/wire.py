"""A wire between two network devices, which can lose and delay what it carries: `wire.py ONE OTHER` makes both.

Started in a network namespace of its own; the devices may be moved to others, and are gone when it ends. Says `ready`,
then reads lines from standard input: the share of packets that are lost from there on, and the seconds that one is
under way. "0 0" is a good wire, "1 0" is cut. (The kernel's netem does the same, but many kernels are built without.)
"""

import contextlib
import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


def make_device(name: str) -> int:
    """A descriptor that gives a packet a read, and takes one a write."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return descriptor


def carry(ends: list[int]) -> None:
    loss, delay_s, under_way = 0.0, 0.0, deque()  # of (when it arrives, where, packet), in the order of sending
    while True:
        wait_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        ready, _, _ = select.select([0, *ends], [], [], wait_s)
        if 0 in ready:
            line = os.read(0, 100).decode()
            if not line:
                return
            loss, delay_s = map(float, line.split())
        for end in set(ready) & set(ends):
            packet = os.read(end, 65536)
            if random.random() >= loss:
                under_way.append((time.monotonic() + delay_s, ends[end == ends[0]], packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, end, packet = under_way.popleft()
            with contextlib.suppress(OSError):  # that device is down
                os.write(end, packet)


if __name__ == "__main__":
    devices = [make_device(name) for name in sys.argv[1:]]
    print("ready", flush=True)
    carry(devices)
