"""A cable with faults: sits between a host's port and the switch, and delays, loses or holds up what passes.

Runs in the switch's namespace: `python -m tests.hosts.relay NAME`. Each line on standard input is JSON, {"to": way,
"from": way}, as seen from the host, way = {"delay_ms", "loss", "block", "peers"}: with `peers` (addresses) only what
comes from them, or goes to them, is affected. `ok` is the answer; the end of input restores the plain cable.

It refuses to change a frame, or the order of frames in one direction. A kernel with netem would not need it.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import json
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23
TUNSETIFF, IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x400454CA, 0x0002, 0x1000, 0x4000
ETH_P_ALL, IPV4 = 0x0003, b"\x08\x00"
HEADER = 10  # struct virtio_net_hdr: both ends carry it, so that unfinished checksums stay right
LARGEST = HEADER + 14 + 65535
SOURCE_AT, DESTINATION_AT = 14 + 12, 14 + 16  # of an IPv4 header behind Ethernet's
QUEUE = 100_000
AT_ONCE = 256


@dataclass
class Way:
    """What one direction does to its frames."""

    delay_ms: float = 0.0
    loss: float = 0.0
    block: bool = False
    peers: list[str] = field(default_factory=list)

    def delay_s(self, frame: bytes, peer_at: int) -> float | None:
        """How long to keep the frame; None: for ever. `peer_at` is where its IPv4 header names the peer."""
        if self.peers:
            header = frame[HEADER:]
            if header[12:14] != IPV4 or socket.inet_ntoa(header[peer_at : peer_at + 4]) not in self.peers:
                return 0.0
        if self.block or random.random() < self.loss:
            return None
        return self.delay_ms / 1000


def ip(*arguments: str) -> None:
    """ip(8)."""
    subprocess.run(["ip", *arguments], check=True)


def open_tap(name: str) -> int:
    """A TAP device of that name, which vanishes with its descriptor."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    return tap


def open_port(name: str) -> socket.socket:
    """All that comes out of the host at its cable's end, and into it."""
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    port.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    port.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    port.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    port.bind((name, 0))
    port.setblocking(False)
    return port


def serve(tap: int, port: int) -> None:
    """Pass frames until input ends."""
    to_host, from_host = Way(), Way()
    waiting: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        left = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready, _, _ = select.select([0, tap, port], [], [], left)
        if 0 in ready:
            line = os.read(0, 65536)
            if not line:
                return
            ways = json.loads(line.splitlines()[-1])
            to_host, from_host = Way(**ways["to"]), Way(**ways["from"])
            os.write(1, b"ok\n")
        for source, target, way, peer_at in (
            (tap, port, to_host, SOURCE_AT),
            (port, tap, from_host, DESTINATION_AT),
        ):
            for frame in frames(source) if source in ready else []:
                delay_s = way.delay_s(frame, peer_at)
                if delay_s is not None and len(waiting) < QUEUE:
                    number += 1
                    heapq.heappush(waiting, (time.monotonic() + delay_s, number, target, frame))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _due, _number, target, frame = heapq.heappop(waiting)
            # The device is down, or its queue is full: frames get lost, as on any network.
            with contextlib.suppress(OSError):
                os.write(target, frame)


def frames(source: int) -> Iterator[bytes]:
    """All that can be read now, up to a number: the other direction has its turn, too."""
    for _ in range(AT_ONCE):
        try:
            yield os.read(source, LARGEST)
        except BlockingIOError:
            return


def main() -> None:
    """Take the cable's place on the switch, serve, and give it back."""
    name = sys.argv[1]
    cable, device = f"p-{name}", f"t-{name}"
    tap, port = open_tap(device), open_port(cable)
    ip("link", "set", cable, "nomaster", "promisc", "on")
    ip("link", "set", device, "master", "br0", "up")
    try:
        serve(tap, port.fileno())
    finally:
        os.close(tap)
        ip("link", "set", cable, "promisc", "off", "master", "br0")


if __name__ == "__main__":
    main()
