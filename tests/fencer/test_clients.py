"""Clients that misbehave cost their own connections: they delay neither an order nor the end of a lease.

A real fencer, a real PostgreSQL; the clients are processes of their own, of the agent's uid and of root's.
Asserted are the promises (fence_timeout, one lease), not how far below them this machine stays.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
import pytest

from harmony_fencer import processes, protocol, server
from harmony_fencer.protocol import Generation
from tests import pace
from tests.fencer.node import FENCE_S, PAUSE_S, Node, Template, boot_ns

pytestmark = pytest.mark.real

AS_ROOT = os.geteuid() == 0
AGENT = 65534 if AS_ROOT else os.getuid()
SERVED_S = 2.0  # root's patience while root's own uid floods
needs_root = pytest.mark.skipif(not AS_ROOT, reason="needs root, to connect as the agent's user")
TOP = Path(__file__).parents[2]

# Usage: PATH UID COUNT KIND…: COUNT connections of each kind, until killed. Says "ready" once all have begun.
MISBEHAVE = r"""
import os, socket, struct, sys, threading, time
path, uid, count, kinds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
if uid != os.getuid():
    os.setresuid(uid, uid, uid)

def frame(body):
    return struct.pack(">I", len(body)) + body

STATUS = frame(b'{"op":"status","v":1}')
BAD = frame(b'{"op":"status","v":1,"bad":[1,2,{"v":2}]}') + frame(b"\xff" * 300) + frame(b'{"v":7}')
STALE = frame(b'{"op":"fence","v":1,"generation":{"term":0,"order":0},"reason":"old"}')

def held(sock, begin, end=None):
    sock.sendall(begin)
    if end is not None:
        sock.shutdown(end)
    while sock.recv(65536):
        pass
    time.sleep(0.2)  # longer than the fencer, which has closed its side

def unread(sock):
    sock.setblocking(False)
    while True:
        try:
            sock.send(STATUS * 50)
        except BlockingIOError:
            time.sleep(0.01)

def flood(sock, frames):
    def read():
        try:
            while sock.recv(65536):
                pass
        except OSError:
            pass
    threading.Thread(target=read, daemon=True).start()
    while True:
        sock.sendall(frames * 20)

KINDS = {
    "silent": lambda s: held(s, b""),
    "half-header": lambda s: held(s, STATUS[:2]),
    "half-body": lambda s: held(s, STATUS[:-5]),
    "unread": unread,
    "status-flood": lambda s: flood(s, STATUS),
    "bad-flood": lambda s: flood(s, BAD),
    "stale-flood": lambda s: flood(s, STALE),
    "bad-frames": lambda s: s.sendall(b"\xff\xff\xff\xff" + b"x" * 5000),
    "half-closed": lambda s: held(s, STATUS * 3, socket.SHUT_WR),
    "comes-and-goes": lambda s: None,
}
def client(kind):
    first = True
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(path)
                if first:
                    first = False
                    left.pop()
                    if not left:
                        print("ready", flush=True)
                KINDS[kind](sock)
        except OSError:
            time.sleep(0.005)

left = [None] * (count * len(kinds))
for kind in kinds:
    for _ in range(count):
        threading.Thread(target=client, args=(kind,), daemon=True).start()
time.sleep(1e6)
"""
KINDS = re.findall(r'^    "([a-z-]+)": lambda|^    "(unread)": unread', MISBEHAVE, re.MULTILINE)
EVERY = [a or b for a, b in KINDS]


def path_of(node: Node) -> str:
    return str(node.run / "fencer.sock")


@contextmanager
def misbehaving(node: Node, uid: int, count: int, *kinds: str) -> Iterator[None]:
    argv = [sys.executable, "-I", "-c", MISBEHAVE, path_of(node), str(uid), str(count), *kinds]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield
        finally:
            process.kill()


@contextmanager
def as_user(uid: int) -> Iterator[None]:
    """Of what the kernel tells the fencer at connect()."""
    before = os.geteuid()
    if uid != before:
        os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(before)


def connect(node: Node, uid: int = AGENT) -> socket.socket:
    """Waiting for its turn; with settimeout() before it, connect() would say EAGAIN where many wait."""
    sock = socket.socket(socket.AF_UNIX)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 15, 0))
    with as_user(uid):
        sock.connect(path_of(node))
    sock.settimeout(15)
    return sock


def frame(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


STATUS = frame(b'{"op":"status","v":1}')


def exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = sock.recv(count - len(data))
        if not chunk:
            raise EOFError(data)
        data += chunk
    return data


def answer(sock: socket.socket) -> protocol.Reply:
    """The next one. EOFError: the fencer closed the connection."""
    return protocol.decode_reply(exactly(sock, protocol.frame_length(exactly(sock, 4))))


def fill(sock: socket.socket, one: bytes) -> int:
    """Send the frame again and again until nothing more is taken; the number of bytes sent."""
    sock.setblocking(False)
    sent = 0
    until = time.monotonic() + 0.5  # of which nothing was taken
    while time.monotonic() < until:
        try:
            sent += sock.send((one * 100)[sent % len(one) :])
            until = time.monotonic() + 0.5
        except BlockingIOError:
            time.sleep(0.01)
    sock.settimeout(15)
    return sent


def left_over(sock: socket.socket) -> bytes:
    """All that comes until the fencer closes it."""
    said = b""
    try:
        while chunk := sock.recv(4096):
            said += chunk
    except ConnectionResetError:
        pass
    return said


def ended(sock: socket.socket) -> bool:
    """Whether the fencer closes it before our patience ends."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


class Writer:
    """A client of PostgreSQL that commits again and again; `last_ns` is its newest acknowledged commit."""

    def __init__(self, node: Node) -> None:
        self.last_ns = 0
        self._connection = node.connect()
        self._connection.execute("CREATE TABLE IF NOT EXISTS t (x int)")
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                self._connection.execute("INSERT INTO t VALUES (1)")
                self.last_ns = boot_ns()
                time.sleep(PAUSE_S)
        except psycopg.Error:
            self._connection.close()

    def join(self) -> None:
        """Its server has been stopped."""
        self._thread.join(10)
        assert not self._thread.is_alive()


class Patient(Node):
    """Of a user whose own other connections may have taken all places: it tries again, and counts that.

    It connects as the specification says: waiting for its turn where many wait, for `SERVED_S` at most.
    """

    again = 0

    def ask(self, request: protocol.Request) -> protocol.Reply:
        until = time.monotonic() + SERVED_S
        while True:
            try:
                with connect(self, os.getuid()) as sock:
                    sock.sendall(protocol.frame(request))
                    reply = answer(sock)
            except (OSError, EOFError):
                if time.monotonic() > until:
                    raise
            else:
                crowded = isinstance(reply, protocol.Refusal) and reply.error == "too_many_connections"
                if not crowded or time.monotonic() > until:
                    return reply
            self.again += 1


@pytest.fixture
def guarded(template: Template) -> Iterator[Patient]:
    """A fencer whose agent is of another user than root, where that can be."""
    top = Path(tempfile.mkdtemp(prefix="hf-"))
    top.chmod(0o755)
    node = Patient(top, template)
    told = json.loads(node.config.read_text())
    node.config.write_text(json.dumps(told | {"agent_uid": AGENT, "agent_gid": AGENT}))
    node.start()
    node.again = 0
    yield node
    node.destroy()
    shutil.rmtree(top)


def of_fencer(node: Node) -> tuple[int, int]:
    """(open descriptors, resident kB)."""
    assert node.process is not None
    proc = Path(f"/proc/{node.process.pid}")
    found = re.search(r"VmRSS:\s+(\d+) kB", (proc / "status").read_text())
    assert found is not None
    return len(list((proc / "fd").iterdir())), int(found.group(1))


def leads_and_is_fenced(node: Node, term: int) -> None:
    """Under a lease that is renewed for a while: fenced at its end, without anybody's word."""
    node.make_writable(term, 1)
    writer = Writer(node)
    deadline_ns = 0
    for _ in range(4):
        reply = node.renew(term, 1)
        assert isinstance(reply, protocol.Renewed), (reply, node.log())
        deadline_ns = reply.deadline_boottime_ns
        time.sleep(0.2)
    writer.join()
    assert writer.last_ns <= deadline_ns + round(FENCE_S * 1e9) + pace.SLACK_NS
    node.wait(lambda: node.status().fence_proven, "proof")
    fence = node.status().self_fence
    assert fence is not None
    assert (fence.reason, fence.state) == ("the lease is over", "done")
    assert deadline_ns <= fence.at_boottime_ns
    assert fence.at_boottime_ns / 1e6 + fence.took_ms <= deadline_ns / 1e6 + FENCE_S * 1000 + pace.SLACK_MS
    assert not node.pids()


def leads_and_is_ordered_to_fence(node: Node, term: int) -> None:
    """By root."""
    node.make_writable(term, 1)
    writer = Writer(node)
    node.renew(term, 1)
    ordered_ns = boot_ns()
    reply = node.ask(protocol.Fence(generation=Generation(term, 2), reason="test"))
    assert isinstance(reply, protocol.Accepted), (reply, node.log())
    record = node.outcome()
    writer.join()
    assert (record.op, record.state) == ("fence", "done"), record
    assert 0 < record.took_ms <= FENCE_S * 1000 + pace.SLACK_MS
    assert writer.last_ns <= ordered_ns + round(FENCE_S * 1e9) + pace.SLACK_NS
    assert not node.pids()


def fences_in_time_under(node: Node, uids: set[int], count: int, *kinds: str) -> None:
    fds, rss = of_fencer(node)
    with ExitStack() as stack:
        for uid in uids:
            stack.enter_context(misbehaving(node, uid, count, *kinds))
        leads_and_is_fenced(node, 1)
        leads_and_is_ordered_to_fence(node, 2)
    node.wait(lambda: of_fencer(node)[0] <= fds, f"back to {fds} descriptors", 5)
    assert of_fencer(node)[1] - rss < 6_000  # Python's own buffers and code paths not used before


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", EVERY)
def test_eight_and_eight_of_a_kind(guarded: Patient, kind: str) -> None:
    """Of the agent's user and of root's. W9: both fences within fence_timeout, as the fencer recorded it."""
    fences_in_time_under(guarded, {AGENT, os.getuid()}, 8 if AS_ROOT else 4, kind)


@pytest.mark.sampled(1, group="patience with clients")
def test_all_kinds_together(guarded: Patient) -> None:
    fences_in_time_under(guarded, {AGENT, os.getuid()}, 1, *EVERY)


@needs_root
@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["silent", "status-flood", "bad-frames", "comes-and-goes"])
def test_any_number_of_the_agents_leaves_root_undisturbed(guarded: Patient, kind: str) -> None:
    """Far beyond its places; root is served at its first try, each time."""
    fences_in_time_under(guarded, {AGENT}, 40, kind)
    assert guarded.again == 0


# ---------------------------------------------------------------- one client alone


@needs_root
def test_an_agent_that_takes_all_of_its_connections_leaves_roots(guarded: Patient) -> None:
    """The table of connections per peer, counted from outside; and that they come back."""
    with ExitStack() as stack:
        taken = [stack.enter_context(connect(guarded)) for _ in range(server.CONNECTIONS["agent"])]
        for sock in taken:
            sock.sendall(STATUS)
            assert isinstance(answer(sock), protocol.Status)
        told = connect(guarded)
        reply = answer(told)
        assert isinstance(reply, protocol.Refusal)
        assert (reply.error, reply.detail) == ("too_many_connections", "more than 8 connections of agent")
        told.close()
        taken[0].sendall(STATUS)
        assert isinstance(answer(taken[0]), protocol.Status), "given after it has seen that"
        more = [stack.enter_context(connect(guarded)) for _ in range(server.REFUSED_AT_ONCE + 40)]
        with ExitStack() as roots:
            own = [roots.enter_context(connect(guarded, 0)) for _ in range(server.CONNECTIONS["root"])]
            for sock in own:
                sock.sendall(STATUS)
                assert isinstance(answer(sock), protocol.Status)
        guarded.wait(lambda: isinstance(guarded.ask(protocol.StatusRequest()), protocol.Status), "root again")
        leads_and_is_ordered_to_fence(guarded, 1)
        told_why = sum(bool(left_over(s)) for s in more)
        assert told_why == server.REFUSED_AT_ONCE
    guarded.wait(lambda: agent_is_served(guarded), "the agent's places are free again", 5)


def agent_is_served(node: Node) -> bool:
    with connect(node) as sock:
        sock.sendall(STATUS)
        return isinstance(answer(sock), protocol.Status)


def test_slow_clients_are_closed_and_idle_ones_are_not(guarded: Patient) -> None:
    """A frame once begun and a reply not taken have a deadline; silence before a frame has none."""
    with ExitStack() as stack:
        four = (stack.enter_context(connect(guarded, os.getuid())) for _ in range(4))
        idle, half_header, half_body, unread = four
        half_header.sendall(STATUS[:3])
        half_body.sendall(STATUS[:-1])
        unread.setblocking(False)
        fill(unread, STATUS)
        time.sleep(server.FRAME_TIMEOUT_S + 1)
        assert ended(half_header)
        assert ended(half_body)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            unread.send(STATUS)
        idle.sendall(STATUS)
        assert isinstance(answer(idle), protocol.Status)


def test_replies_taken_late_are_whole(guarded: Patient) -> None:
    """A reply that was cut short would be read together with the next one."""
    bad = frame(b'{"op":"status","v":1,"' + b"x" * 250 + b'":1}')
    with connect(guarded, os.getuid()) as sock:  # the agent's requests are paced: it would fill nothing
        sent = fill(sock, bad)
        time.sleep(2.5)  # the fencer waits in a reply
        sock.settimeout(5)
        for _ in range(sent // len(bad)):
            reply = answer(sock)
            assert isinstance(reply, protocol.Refusal)
            assert (reply.error, "x" * 200 in reply.detail) == ("bad_message", True)


def test_a_half_closed_client_gets_all_its_replies(guarded: Patient) -> None:
    with connect(guarded) as sock:
        sock.sendall(STATUS * 5 + STATUS[:7])
        sock.shutdown(socket.SHUT_WR)
        assert all(isinstance(answer(sock), protocol.Status) for _ in range(5))
        assert ended(sock)


def test_after_a_bad_message_the_connection_goes_on_after_a_bad_frame_it_ends(guarded: Patient) -> None:
    with connect(guarded) as sock:
        sock.sendall(frame(b"{}") + STATUS)
        reply = answer(sock)
        assert isinstance(reply, protocol.Refusal)
        assert reply.error == "bad_message"
        assert isinstance(answer(sock), protocol.Status)
        sock.sendall(struct.pack(">I", protocol.MAX_FRAME_BYTES + 1))
        reply = answer(sock)
        assert isinstance(reply, protocol.Refusal)
        assert reply.error == "bad_frame"
        assert ended(sock)


def test_a_flood_does_not_fill_the_log(guarded: Patient) -> None:
    """Three refusals, thousands of times each: a line a second for each, with their number."""
    kinds = [b"{}", b'{"v":9}', b'{"op":"fence","v":1,"generation":{"term":0,"order":0},"reason":""}']
    begun = time.monotonic()
    with connect(guarded, os.getuid()) as sock:
        for _ in range(100):
            sock.sendall(b"".join(frame(k) for k in kinds) * 20)
            assert all(isinstance(answer(sock), protocol.Refusal) for _ in range(60))
    seconds = time.monotonic() - begun
    lines = [json.loads(line) for line in (guarded.top / "fencer.log").read_text().splitlines()]
    told = [line for line in lines if line["event"] in {"bad message", "refused"}]
    assert 0 < len(told) <= 2 * (seconds + 1)


# ---------------------------------------------------------------- nobody reads the log


@pytest.mark.sampled(1, group="patience with clients")
def test_a_full_stderr_that_nobody_reads(node: Node) -> None:
    """log.py's promise: a journald that hangs stops neither orders nor the dead-man's switch."""
    (node.top / "fencer.log").touch()
    pipe, write_end = os.pipe()
    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)
    try:
        node.process = subprocess.Popen(node.argv(), stderr=write_end, stdin=subprocess.DEVNULL, cwd="/")
        node.wait(node._answers, "the fencer answers")
        with connect(node, os.getuid()) as sock:
            for order in range(1, 400):  # two lines each: more than the queue of the log holds
                fence = protocol.Fence(generation=Generation(1, order), reason="")
                sock.sendall(protocol.frame(fence))
                assert isinstance(answer(sock), protocol.Accepted)
        full = unread_bytes(pipe)
        assert full > 3000
        leads_and_is_fenced(node, 2)
        leads_and_is_ordered_to_fence(node, 3)
        assert unread_bytes(pipe) == full, "somebody read it: the test shows nothing"
        said = b""
        while b"lines_lost_before_this" not in said:  # it goes on writing, and says what is missing
            assert select.select([pipe], [], [], 5)[0], said[-2000:]
            node.ask(protocol.Fence(generation=Generation(4, len(said)), reason=""))
            said += os.read(pipe, 65536)
    finally:
        os.close(pipe)
        os.close(write_end)


def unread_bytes(fd: int) -> int:
    """In the pipe."""
    buffer = bytearray(4)
    fcntl.ioctl(fd, termios.FIONREAD, buffer)
    return int.from_bytes(buffer, sys.byteorder)


# ---------------------------------------------------------------- the specification's own client


def test_the_client_of_the_specification(node: Node) -> None:
    """docs/protocol.md: its text, run with nothing but the standard library."""
    text = (TOP / "docs" / "protocol.md").read_text()
    (client,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(client.splitlines()) <= 40
    node.start()
    node.make_writable()
    use = f"\nf = Fencer({path_of(node)!r})\nprint(json.dumps([f.ask('hello', client='doc'), f.fence('test')]))\n"
    argv = [sys.executable, "-I", "-S", "-c", client + use]
    done = subprocess.run(argv, check=True, capture_output=True, timeout=60)
    hello, fenced = json.loads(done.stdout)
    assert hello["kind"] == "status"
    assert fenced["record"]["generation"] == {"term": 1, "order": 2}
    assert fenced["record"]["state"] == "done"
    assert not processes.of_data_dir(str(node.data))
