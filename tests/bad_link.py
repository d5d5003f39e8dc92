"""A link between two network namespaces that is slow and loses packets, in user space: kernels may lack netem.

    python bad_link.py NAMESPACE NAMESPACE DELAY_MS LOSS_PERCENT

Each namespace gets the device `intlm0`. SIGUSR1 takes the link down, and up again the next time.
"""

import ctypes
import fcntl
import heapq
import os
import random
import select
import signal
import struct
import sys
import time
from pathlib import Path

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000
CLONE_NEWNET = 0x40000000


def open_device(namespace):
    """A file whose reads and writes are the packets of the device in that namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/var/run/netns/{namespace}").open() as place:
        if libc.setns(place.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", b"intlm0", IFF_TUN | IFF_NO_PI))
    return device


def main(first, second, delay, loss):
    """Carry packets until the process is ended."""
    devices = [open_device(first), open_device(second)]
    other = dict(zip(devices, reversed(devices), strict=True))
    up, chance, waiting = [True], random.Random(0), []
    signal.signal(signal.SIGUSR1, lambda *_: up.append(not up.pop()))
    print("ready", flush=True)
    while True:
        due = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 1.0
        for device in select.select(devices, [], [], due)[0]:
            packet = os.read(device, 65536)
            if up[0] and chance.random() >= int(loss) / 100:
                heapq.heappush(
                    waiting, (time.monotonic() + int(delay) / 1000, len(waiting), other[device], packet)
                )
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, device, packet = heapq.heappop(waiting)
            os.write(device, packet)


if __name__ == "__main__":
    main(*sys.argv[1:])
