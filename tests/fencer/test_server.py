"""The fencer's socket without a PostgreSQL: who may connect, how many, how slowly, and how often."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from harmony_fencer import protocol, server
from harmony_fencer.admit import Peer
from harmony_fencer.server import bind, peer_of, serve
from tests.fencer.fakes import configuration

AS_ROOT = os.geteuid() == 0
AGENT, OTHER = 65534, 65533
needs_root = pytest.mark.skipif(not AS_ROOT, reason="needs root, to connect as somebody else")


class Fencer:
    """Notes who asked."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []

    async def handle(self, request: protocol.Request, peer: Peer) -> protocol.Reply:
        self.peers.append(peer)
        return protocol.Done("answered")


class Served:
    def __init__(self, folder: Path) -> None:
        changes = {
            "agent_uid": AGENT if AS_ROOT else os.getuid(),
            "agent_gid": AGENT if AS_ROOT else os.getgid(),
        }
        self.config = configuration(folder)
        self.config = type(self.config)(
            **{f: getattr(self.config, f) for f in self.config.__struct_fields__} | changes
        )
        Path(self.config.run_dir).mkdir(parents=True, exist_ok=True)
        self.path = Path(self.config.run_dir) / "fencer.sock"
        self.fencer = Fencer()


@pytest.fixture
def served() -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="hfs") as name:
        Path(name).chmod(0o755)
        yield Served(Path(name))


@contextlib.contextmanager
def as_user(uid: int) -> Iterator[None]:
    """Of what the kernel tells the fencer at connect()."""
    if uid == os.geteuid():
        yield
        return
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.asynccontextmanager
async def running(served: Served) -> AsyncIterator[None]:
    sock = bind(served.config)
    with sock:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, served.config, served.fencer, sock)
            yield
            nursery.cancel_scope.cancel()


async def connected(served: Served, uid: int) -> trio.SocketStream:
    sock = socket.socket(socket.AF_UNIX)
    with as_user(uid):
        sock.connect(str(served.path))
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


async def reply(stream: trio.SocketStream) -> protocol.Reply:
    async def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            chunk = await stream.receive_some(count - len(data))
            assert chunk, "closed"
            data += chunk
        return data

    with trio.fail_after(30):
        header = await exactly(protocol.HEADER.size)
        return protocol.decode_reply(await exactly(protocol.frame_length(header)))


ASK = protocol.frame(protocol.StatusRequest())


async def asked(stream: trio.SocketStream) -> protocol.Reply:
    await stream.send_all(ASK)
    return await reply(stream)


def test_the_socket_is_the_agents_alone(served: Served) -> None:
    """Whatever the umask: nobody else may even connect."""
    before = os.umask(0)
    try:
        sock = bind(served.config)
    finally:
        assert os.umask(before) == 0, "it is as it was"
    found = served.path.stat()
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert (found.st_uid, found.st_gid) == (served.config.agent_uid, served.config.agent_gid)
    sock.close()
    bind(served.config).close()  # over a dead fencer's


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_is_no_socket_is_left_alone(served: Served, what: str) -> None:
    if what == "file":
        served.path.write_text("precious")
    else:
        served.path.mkdir()
    with pytest.raises(ValueError, match="is not a socket"):
        bind(served.config)
    assert served.path.exists()


def test_who_is_who(served: Served) -> None:
    """The agent's user may order, root and the fencer's own user everything."""
    assert peer_of(served.config, 0) == "root"
    assert peer_of(served.config, os.geteuid()) == "root"
    assert peer_of(served.config, OTHER) == "other"
    if AS_ROOT:
        assert peer_of(served.config, AGENT) == "agent"


@needs_root
async def test_the_kernel_says_who_asks(served: Served) -> None:
    async with running(served):
        served.path.chmod(0o666)  # as if somebody else got in: refused by who it is
        for uid in (0, AGENT):
            stream = await connected(served, uid)
            assert await asked(stream) == protocol.Done("answered")
            await stream.aclose()
        stream = await connected(served, OTHER)
        refused = await reply(stream)
        assert isinstance(refused, protocol.Refusal)
        assert refused.error == "not_permitted"
        assert f"uid {OTHER}" in refused.detail
        await stream.aclose()
    assert served.fencer.peers == ["root", "agent"]


@needs_root
async def test_each_peer_has_its_own_places(served: Served) -> None:
    """An agent that takes all of its own leaves root's free; a place is given back."""
    async with running(served):
        mine = [await connected(served, AGENT) for _ in range(server.CONNECTIONS["agent"])]
        for stream in mine:
            assert await asked(stream) == protocol.Done("answered")
        more = await connected(served, AGENT)
        refused = await reply(more)
        assert isinstance(refused, protocol.Refusal)
        assert refused.error == "too_many_connections"
        await more.aclose()
        roots = [await connected(served, 0) for _ in range(server.CONNECTIONS["root"])]
        for stream in roots:
            assert await asked(stream) == protocol.Done("answered")
        more = await connected(served, 0)
        refused = await reply(more)
        assert isinstance(refused, protocol.Refusal)
        for stream in (more, *roots, mine.pop()):
            await stream.aclose()
        await trio.testing.wait_all_tasks_blocked(0.05)
        again = await connected(served, AGENT)
        assert await asked(again) == protocol.Done("answered")
        for stream in (again, *mine):
            await stream.aclose()


@needs_root
async def test_so_many_are_told_why_and_the_rest_is_closed(served: Served) -> None:
    async with running(served):
        there = [
            await connected(served, AGENT)
            for _ in range(server.CONNECTIONS["agent"] + server.REFUSED_AT_ONCE + 1)
        ]
        with trio.fail_after(30):
            assert await there[-1].receive_some(1) == b"", "closed without a word"
        for stream in there:
            await stream.aclose()


async def test_a_frame_once_begun_has_a_deadline_and_an_idle_client_none(
    served: Served, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(served):
        idle, slow = await connected(served, os.geteuid()), await connected(served, os.geteuid())
        await slow.send_all(ASK[:3])
        began = trio.current_time()
        assert await slow.receive_some(1) == b""
        assert trio.current_time() - began == pytest.approx(server.FRAME_TIMEOUT_S)
        await trio.sleep(1000)
        assert await asked(idle) == protocol.Done("answered")
        await idle.aclose()
        await slow.aclose()


async def test_a_reply_that_is_not_taken_has_a_deadline(
    served: Served, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(served):
        deaf = await connected(served, os.geteuid())
        began = trio.current_time()
        with pytest.raises(trio.BrokenResourceError):  # noqa: PT012
            while True:
                await deaf.send_all(ASK * 100)
        assert trio.current_time() - began == pytest.approx(server.FRAME_TIMEOUT_S)
        await deaf.aclose()


@needs_root
async def test_a_refused_client_that_stays_is_closed(
    served: Served, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(served):
        served.path.chmod(0o666)
        stream = await connected(served, OTHER)
        await reply(stream)
        began = trio.current_time()
        assert await stream.receive_some(1) == b""
        assert trio.current_time() - began == pytest.approx(server.REFUSAL_TIMEOUT_S, abs=0.1)
        await stream.aclose()


@needs_root
async def test_the_agents_user_has_a_pace_and_root_none(
    served: Served, autojump_clock: trio.testing.MockClock
) -> None:
    """Over all of its connections: the fencer runs in real time, and must not take the host with it."""
    async with running(served):
        for uid, slowed in ((0, False), (AGENT, True)):
            streams = [await connected(served, uid) for _ in range(2)]
            began = trio.current_time()
            for turn in range(400):
                await asked(streams[turn % 2])
            took = trio.current_time() - began
            assert took > 0.5 if slowed else took == 0
            for stream in streams:
                await stream.aclose()


async def test_after_a_bad_frame_the_connection_ends_after_a_bad_message_it_goes_on(served: Served) -> None:
    async with running(served):
        stream = await connected(served, os.geteuid())
        await stream.send_all(protocol.HEADER.pack(8) + b'{"op":1}')
        assert isinstance(await reply(stream), protocol.Refusal)
        assert await asked(stream) == protocol.Done("answered")
        await stream.send_all(b"\xff\xff\xff\xff")
        refused = await reply(stream)
        assert isinstance(refused, protocol.Refusal)
        assert refused.error == "bad_frame"
        with trio.fail_after(30):
            assert await stream.receive_some(1) == b""
        await stream.aclose()
