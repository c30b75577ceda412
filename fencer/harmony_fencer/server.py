"""The fencer's socket: frames in, one reply each, the peer known by SO_PEERCRED.

A client that is slow, silent, flooding or wrong costs its own connection and nothing else: each has a task,
each frame a deadline, one request is answered before the next is read, and each peer has at most
CONNECTIONS: an agent that takes all of its own leaves root's free. What is beyond that, or has gone again
before its turn, is closed as fast as it can come, without a task and a place: nobody fills the queue of those
who wait to be accepted.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import struct
import time
from pathlib import Path

import trio

from harmony_fencer.admit import Peer
from harmony_fencer.config import FencerConfig
from harmony_fencer.fencer import Fencer
from harmony_fencer.log import log
from harmony_fencer.protocol import HEADER, ProtocolError, Refusal, decode_request, frame, frame_length

CONNECTIONS: dict[Peer, int] = {"root": 16, "agent": 8, "other": 0}
REFUSED_AT_ONCE = 16  # beyond CONNECTIONS: so many are told why, the rest is closed
BACKLOG = 512
ACCEPTED_AT_ONCE = 64  # then the others get to run
NO_MORE_S = 0.1  # the pause when the host has no descriptor left
FRAME_TIMEOUT_S = 10.0  # for a frame once begun, and for a reply to be taken
REFUSAL_TIMEOUT_S = 1.0  # the same, for a connection too many
READ_BYTES = 8192
AGENT_PER_S = 200.0  # requests, over all connections of the agent's user; it needs about ten
AGENT_BURST = 100
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid


def bind(config: FencerConfig) -> socket.socket:
    """The listening socket. The caller holds the lock, so a socket that is there is a dead fencer's.

    Raises ValueError when the path is taken by something that is not a socket.
    """
    path = Path(config.run_dir) / "fencer.sock"
    if path.exists() and not stat.S_ISSOCK(path.lstat().st_mode):
        raise ValueError(f"{path} exists and is not a socket: it is not ours; move it away")
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o177)
    try:
        sock.bind(str(path))
    finally:
        os.umask(old)
    if os.geteuid() == 0:
        os.chown(path, config.agent_uid, config.agent_gid)
    sock.listen(BACKLOG)
    return sock


def peer_of(config: FencerConfig, uid: int) -> Peer:
    """Who a uid is to us: root (or the fencer's own user) may everything, the agent's may order."""
    if uid in {0, os.geteuid()}:
        return "root"
    return "agent" if uid == config.agent_uid else "other"


class _Door:
    """Who is inside, and who gets in."""

    def __init__(self, config: FencerConfig, fencer: Fencer) -> None:
        self._config, self._fencer = config, fencer
        self._open: dict[Peer, int] = dict.fromkeys(CONNECTIONS, 0)
        self._pace = _Pace(AGENT_PER_S, AGENT_BURST)

    def admit(self, sock: socket.socket, nursery: trio.Nursery) -> None:
        """Give it a task, or close it."""
        if _gone(sock):
            sock.close()
            return
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(raw)
        peer = peer_of(self._config, uid)
        before = self._open[peer]
        if before >= CONNECTIONS[peer]:
            log.seldom("connection refused", peer=peer, uid=uid, pid=pid)
        if before >= CONNECTIONS[peer] + REFUSED_AT_ONCE:
            sock.close()
            return
        self._open[peer] += 1
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        why = None
        if peer == "other":
            why = Refusal("not_permitted", f"uid {uid} may not talk to the fencer")
        elif before >= CONNECTIONS[peer]:
            why = Refusal("too_many_connections", f"more than {CONNECTIONS[peer]} connections of {peer}")
        nursery.start_soon(self._inside, stream, peer, f"uid {uid}, pid {pid}", why)

    async def _inside(self, stream: trio.SocketStream, peer: Peer, who: str, why: Refusal | None) -> None:
        try:
            async with stream:
                if why is not None:
                    await _refuse(stream, why)
                else:
                    await _talk(self._fencer, stream, peer, who, self._pace if peer == "agent" else None)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass  # it went away, or was too slow: its own loss
        finally:
            self._open[peer] -= 1


async def serve(config: FencerConfig, fencer: Fencer, sock: socket.socket) -> None:
    """Until cancelled."""
    sock.setblocking(False)
    door = _Door(config, fencer)
    async with trio.open_nursery() as nursery:
        while True:
            await trio.lowlevel.wait_readable(sock)
            try:
                for _ in range(ACCEPTED_AT_ONCE):
                    door.admit(sock.accept()[0], nursery)
            except (BlockingIOError, ConnectionError):
                pass  # that was all of them, or one has gone again
            except OSError as e:
                log.seldom("cannot accept connections", why=str(e))
                await trio.sleep(NO_MORE_S)


def _gone(sock: socket.socket) -> bool:
    """Its client has closed it: nobody waits for an answer."""
    poll = select.poll()
    poll.register(sock, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


async def _refuse(stream: trio.SocketStream, why: Refusal) -> None:
    with trio.fail_after(REFUSAL_TIMEOUT_S):
        await stream.send_all(frame(why))
        while await stream.receive_some(4096):  # it may still be sending: let it read the answer
            pass


class _Frames:
    """Whole frames from a stream: one system call for one that came in one piece."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream, self._buffer = stream, b""

    async def next(self) -> bytes | None:
        """The body of the next frame; None at the end. An idle client may be so for ever, a frame once begun
        has FRAME_TIMEOUT_S. Raises ProtocolError("bad_frame"), TooSlowError."""
        if not self._buffer:
            self._buffer = await self._stream.receive_some(READ_BYTES)
        with trio.fail_after(FRAME_TIMEOUT_S):
            while self._buffer:
                if len(self._buffer) >= HEADER.size:
                    end = HEADER.size + frame_length(self._buffer[: HEADER.size])
                    if len(self._buffer) >= end:
                        body, self._buffer = self._buffer[HEADER.size : end], self._buffer[end:]
                        return body
                more = await self._stream.receive_some(READ_BYTES)
                if not more:
                    return None
                self._buffer += more
        return None


class _Pace:
    """So many requests a second from all connections of the agent's user: the fencer runs at real-time
    priority, and a client that floods it must not take the host's processors that way."""

    def __init__(self, per_second: float, burst: int) -> None:
        self._per_second, self._burst = per_second, burst
        self._left, self._at = float(burst), time.monotonic()

    async def turn(self) -> None:
        """Wait until one more is in order."""
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._at) * self._per_second)
        self._at = now
        self._left -= 1
        if self._left < 0:
            await trio.sleep(-self._left / self._per_second)


async def _talk(fencer: Fencer, stream: trio.SocketStream, peer: Peer, who: str, pace: _Pace | None) -> None:
    frames = _Frames(stream)
    while True:
        if pace is not None:
            await pace.turn()
        try:
            body = await frames.next()
            if body is None:
                return
            reply = await fencer.handle(decode_request(body), peer)
            over = False
        except ProtocolError as e:
            log.seldom("bad message", error=e.error, detail=e.detail, who=who)
            reply = Refusal(e.error, e.detail)
            over = e.error == "bad_frame"  # where the next frame begins is not known
        # A reply that was cut short would be read as the beginning of the next: too slow means closed.
        with trio.fail_after(FRAME_TIMEOUT_S):
            await stream.send_all(frame(reply))
        if over:
            return
