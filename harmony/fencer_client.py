"""The client's side of the fencer's protocol, blocking, for harmonyctl; the agent's is agent/fencer.py.

The only file of `harmony` that imports from the fencer. It repeats nothing: one request, one reply.
"""

from __future__ import annotations

import socket
import struct
import time

from harmony.errors import FencerUnavailable
from harmony_fencer import protocol

__all__ = ["call", "protocol"]


def call(path: str, request: protocol.Request, *, timeout_s: float) -> protocol.Reply:
    """One request on a connection of its own, blocking, `timeout_s` for all. Raises FencerUnavailable."""
    until = time.monotonic() + timeout_s
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            # A connect() that may wait: with settimeout() it fails at once where others wait to be accepted.
            limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            sock.connect(path)
            sock.settimeout(timeout_s)
            sock.sendall(protocol.frame(request))
            header = _receive(sock, protocol.HEADER.size, until)
            return protocol.decode_reply(_receive(sock, protocol.frame_length(header), until))
    except (TimeoutError, BlockingIOError) as e:
        raise FencerUnavailable(f"{path}: no answer in {timeout_s:g} s") from e
    except (OSError, protocol.ProtocolError) as e:
        raise FencerUnavailable(f"{path}: {e}") from e


def _receive(sock: socket.socket, count: int, until: float) -> bytes:
    data = b""
    while len(data) < count:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sock.settimeout(left)
        chunk = sock.recv(count - len(data))
        if not chunk:
            raise ConnectionResetError("the fencer closed the connection")
        data += chunk
    return data
