"""The agent's side of its admin socket: one request per connection, bounded in size, time and number.

Who asks is told by the kernel (SO_PEERCRED). It decides nothing: an acceptance is an event for the core.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from pathlib import Path
from typing import Protocol

import msgspec
import structlog
import trio

from harmony.admin import MAX_LINE_BYTES, AcceptReply, AcceptRequest, ErrorReply, Query, StatusReply
from harmony.decoding import Unreadable, decoded
from harmony.errors import FatalError

TIMEOUT_S = 2.0
CONNECTIONS = 16
LONGEST_QUERY_BYTES = 1024
_CREDENTIALS = struct.Struct("3i")
log = structlog.get_logger("agent")
_queries: msgspec.json.Decoder[Query] = msgspec.json.Decoder(Query)


class Answering(Protocol):
    """What the socket speaks for."""

    def status(self) -> StatusReply: ...
    def accept(self, create: bool, who: str, leave: str) -> AcceptReply | ErrorReply: ...


def bind(path: Path) -> trio.SocketListener:
    """The listening socket. Raises FatalError where something else stands in its place."""
    if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
        raise FatalError(f"{path} exists and is not a socket: move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    path.chmod(0o666)  # status is for everybody; the rest is refused by who asks
    sock.listen(CONNECTIONS)
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


def answer(line: bytes, uid: int, agent: Answering) -> StatusReply | AcceptReply | ErrorReply:
    """The reply to one request of user `uid`."""
    try:
        query = decoded(_queries, line)
    except Unreadable as e:
        return ErrorReply(f"bad request: {str(e)[:300]}")
    if not isinstance(query, AcceptRequest):
        return agent.status()
    if uid not in {0, os.geteuid()}:
        log.warning("acceptance of the store refused: not permitted", uid=uid)
        return ErrorReply(
            f"not permitted for uid {uid}: only root and the agent's own user may accept a store"
        )
    return agent.accept(query.create, query.who, query.leave)


async def serve(listener: trio.SocketListener, agent: Answering) -> None:
    """For ever. Slow or wrong clients cost nothing but a slot."""
    limit = trio.CapacityLimiter(CONNECTIONS)

    async def one(stream: trio.SocketStream) -> None:
        async with stream, limit:
            with trio.move_on_after(TIMEOUT_S):
                line = b""
                while b"\n" not in line and len(line) < LONGEST_QUERY_BYTES:
                    chunk = await stream.receive_some(LONGEST_QUERY_BYTES)
                    if not chunk:
                        return
                    line += chunk
                raw = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                _, uid, _ = _CREDENTIALS.unpack(raw)
                reply = msgspec.json.encode(answer(line, uid, agent))
                await stream.send_all(reply[:MAX_LINE_BYTES] + b"\n")

    async def guarded(stream: trio.SocketStream) -> None:
        try:
            await one(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("a client of the admin socket went away")

    await trio.serve_listeners(guarded, [listener])
