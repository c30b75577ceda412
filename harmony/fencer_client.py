"""The client's side of the fencer's protocol, for the agent (trio) and for harmonyctl (blocking).

The only file of `harmony` that imports from the fencer. It repeats nothing: one request, one reply.
"""

from __future__ import annotations

import socket
import struct
import time

import trio

from harmony.errors import FencerUnavailable
from harmony_fencer import protocol

__all__ = ["FencerClient", "call", "protocol"]


class FencerClient:
    """One connection. After any failure it is closed and of no more use."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._stream: trio.SocketStream | None = None

    async def connect(self) -> None:
        """Raises FencerUnavailable."""
        try:
            with trio.fail_after(2.0):
                while self._stream is None:
                    try:
                        self._stream = await trio.open_unix_socket(self._path)
                    except BlockingIOError:  # so many wait to be accepted that none more may
                        await trio.sleep(0.01)
        except (OSError, trio.TooSlowError) as e:
            raise FencerUnavailable(f"{self._path}: {str(e) or 'no answer in 2 s'}") from e

    async def close(self) -> None:
        """Close; never raises."""
        if self._stream is not None:
            await trio.aclose_forcefully(self._stream)
            self._stream = None

    async def request(self, request: protocol.Request, *, timeout_s: float) -> protocol.Reply:
        """Send one request and wait for its reply. Raises FencerUnavailable.

        Also when cancelled from outside it closes: a reply that comes late must never answer the next
        request.
        """
        stream = self._stream
        if stream is None:
            raise FencerUnavailable("not connected")
        answered = False
        try:
            with trio.fail_after(timeout_s):
                await stream.send_all(protocol.frame(request))
                header = await self._exactly(stream, protocol.HEADER.size)
                reply = protocol.decode_reply(await self._exactly(stream, protocol.frame_length(header)))
            answered = True
        except (OSError, trio.BrokenResourceError, trio.TooSlowError, protocol.ProtocolError) as e:
            raise FencerUnavailable(
                f"{type(request).__name__}: {str(e) or f'no answer in {timeout_s:g} s'}"
            ) from e
        finally:
            if not answered:
                self._stream = None
                stream.socket.close()
        return reply

    @staticmethod
    async def _exactly(stream: trio.SocketStream, count: int) -> bytes:
        data = b""
        while len(data) < count:
            chunk = await stream.receive_some(count - len(data))
            if not chunk:
                raise trio.BrokenResourceError("the fencer closed the connection")
            data += chunk
        return data


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
