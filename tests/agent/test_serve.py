"""The admin socket: everybody may ask, only root and the agent's own user may accept, and what is wrong is named."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from harmony.admin import AcceptReply, ErrorReply, StatusReply
from harmony.agent.serve import CONNECTIONS, LONGEST_QUERY_BYTES, TIMEOUT_S, answer, bind, serve
from harmony.cli.status import request
from harmony.errors import FatalError
from tests.cli.test_commands import R

ACCEPT = b'{"op":"accept","create":true,"who":"me"}\n'
NOBODY = 65534


class Agent:
    """Notes what it was told to accept."""

    def __init__(self) -> None:
        self.accepted: list[tuple[bool, str]] = []

    def status(self) -> StatusReply:
        return R

    def accept(self, create: bool, who: str, leave: str) -> AcceptReply | ErrorReply:
        self.accepted.append((create, who))
        return AcceptReply("all of it")


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hserve") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_who_may_accept() -> None:
    """I2: another user's word must not make a node promote by a store that lost history."""
    agent = Agent()
    for uid in (0, os.geteuid()):
        assert answer(ACCEPT, uid, agent) == AcceptReply("all of it")
    for uid in (NOBODY, 4_000_000):
        refused = answer(ACCEPT, uid, agent)
        assert isinstance(refused, ErrorReply)
        assert f"not permitted for uid {uid}" in refused.error
        assert answer(b'{"op":"status"}', uid, agent) == R
    assert agent.accepted == [(True, "me")] * 2


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"nonsense",
        b'"\xff"',
        b"[" * 1000,
        b'{"op":"stop"}',
        b'{"op":"status","more":1}',
        b'{"op":"accept","create":1,"who":"me"}',
        b'{"op":"accept","create":true}',
        b'{"op":"accept","create":true,"who":"' + b"w" * 501 + b'"}',
    ],
)
def test_what_is_wrong_is_named_and_does_nothing(line: bytes) -> None:
    agent = Agent()
    refused = answer(line, 0, agent)
    assert isinstance(refused, ErrorReply)
    assert refused.error.startswith("bad request")
    assert agent.accepted == []


async def test_over_a_real_socket(folder: Path) -> None:
    """The kernel says who asks; slow and silent clients keep nobody waiting."""
    path, agent = folder / "agent.sock", Agent()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, bind(path), agent)
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(str(path))
            line = await trio.to_thread.run_sync(request, path, b'{"op":"status"}')
            assert msgspec.json.decode(line, type=StatusReply) == R
            line = await trio.to_thread.run_sync(request, path, ACCEPT.strip())
            assert json.loads(line) == {"accepted": "all of it"}
            if os.geteuid() == 0:
                script = (
                    "import os, socket, sys\n"
                    "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
                    "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
                    "s.sendall(sys.argv[2].encode()); print(s.makefile().readline())\n"
                )
                argv = [sys.executable, "-c", script, str(path), ACCEPT.decode()]
                done = await trio.run_process(argv, capture_stdout=True)
                assert b"not permitted for uid 65534" in done.stdout
        assert agent.accepted == [(True, "me")]
        nursery.cancel_scope.cancel()


def test_what_is_no_socket_is_left_alone(folder: Path) -> None:
    (folder / "agent.sock").write_text("somebody's")
    with pytest.raises(FatalError, match="is not a socket"):
        bind(folder / "agent.sock")


async def test_silence_and_floods_are_bounded(folder: Path, autojump_clock: trio.testing.MockClock) -> None:
    """O5: as many as may be at once say nothing, and are closed; who says too much is answered at its bound."""
    path = str(folder / "agent.sock")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, bind(Path(path)), Agent())
        silent = [await trio.open_unix_socket(path) for _ in range(CONNECTIONS)]
        await trio.testing.wait_all_tasks_blocked()
        asking = await trio.open_unix_socket(path)
        await asking.send_all(b'{"op":"status"}\n')
        with trio.move_on_after(TIMEOUT_S / 2) as waits:
            await asking.receive_some(100)
        assert waits.cancelled_caught, "no more than so many at once"
        with trio.fail_after(2 * TIMEOUT_S):
            assert (await asking.receive_some(100)).startswith(b"{")
        for stream in silent:
            assert await stream.receive_some(100) == b""
            await stream.aclose()
        loud = await trio.open_unix_socket(path)
        await loud.send_all(b"x" * LONGEST_QUERY_BYTES)
        assert b"bad request" in await loud.receive_some(1000)
        await loud.aclose()
        await asking.aclose()
        nursery.cancel_scope.cancel()


async def test_everybody_may_connect(folder: Path) -> None:
    async with bind(folder / "agent.sock"):
        assert (folder / "agent.sock").stat().st_mode & 0o777 == 0o666
