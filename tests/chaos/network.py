"""Two hosts on one machine: network namespaces joined by a wire of our own, which delays, loses and breaks.

Each namespace has a TUN device; a thread carries packets between the two. (The kernels of small machines come without
`netem`.) Addresses exist inside the namespaces only.
"""

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
ADDRESSES = ("10.77.0.1", "10.77.0.2")


class TwoHosts:
    """Namespaces `names[0]` and `names[1]`; needs root. Use as a context manager.

    Attributes:
        delay: seconds a packet travels.
        loss: share of packets that do not arrive.
        up: False while the cable is unplugged.
    """

    def __init__(self, seed: int) -> None:
        self.names = tuple(f"chaos{os.getpid()}{side}" for side in "ab")
        self.delay, self.loss, self.up = 0.0, 0.0, True
        self._random, self._over = random.Random(seed), threading.Event()
        self._wires: list[int] = []

    def __enter__(self) -> "TwoHosts":
        for side, name in enumerate(self.names):
            _ip("netns", "add", name)
            wire = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            device = f"w{os.getpid()}{'ab'[side]}"
            fcntl.ioctl(wire, _TUNSETIFF, struct.pack("16sH", device.encode(), _IFF_TUN | _IFF_NO_PI))
            self._wires.append(wire)
            _ip("link", "set", device, "netns", name)
            _ip("-n", name, "addr", "add", ADDRESSES[side], "peer", ADDRESSES[1 - side], "dev", device)
            _ip("-n", name, "link", "set", device, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        for wire in self._wires:
            os.close(wire)
        for name in self.names:
            _ip("netns", "del", name)

    def environment(self, side: int) -> dict[str, str]:
        """What a rank on that host needs to find its interface."""
        return {"GLOO_SOCKET_IFNAME": f"w{os.getpid()}{'ab'[side]}", "MASTER_ADDR": ADDRESSES[0]}

    def _carry(self) -> None:
        travelling: list[tuple[float, int, int, bytes]] = []
        number = 0
        while not self._over.is_set():
            pause = 0.05 if not travelling else max(0.0, min(0.05, travelling[0][0] - time.monotonic()))
            for wire in select.select(self._wires, [], [], pause)[0]:
                packet = os.read(wire, 65536)
                if self.up and self._random.random() >= self.loss:
                    number += 1
                    other = self._wires[1 - self._wires.index(wire)]
                    heapq.heappush(travelling, (time.monotonic() + self.delay, number, other, packet))
            while travelling and travelling[0][0] <= time.monotonic():
                _, _, other, packet = heapq.heappop(travelling)
                try:
                    os.write(other, packet)
                except OSError:  # the other end is full: a lost packet
                    continue


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
