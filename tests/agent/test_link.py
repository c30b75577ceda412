"""The link to the fencer over a real socket: what is sent, what is made of the answers, and what each costs."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import trio

from harmony.agent.fencer import FencerClient
from harmony.agent.link import FencerLink, _view
from harmony.core.messages import (
    Event,
    FencerSeen,
    FencerSilent,
    Order,
    OrderRefused,
    Renew,
    RuleRefused,
    TellRule,
)
from harmony.core.sync import HOLD, Rule
from harmony.errors import FencerUnavailable
from harmony.fencer_client import call, protocol
from harmony_fencer.protocol import Generation, Latch, OrderRecord, SyncRule, SyncTold

STATUS = protocol.Status(
    v=1, node="n1", fencer_id="f", boot_id="b", now_boottime_ns=5, trusted=True, trust_detail="",
    highest=Generation(3, 4), active=Generation(3, 2), lease_deadline_boottime_ns=77,
    order=OrderRecord(generation=Generation(3, 4), op="fence", state="failed", primary=None, detail="why"),
    self_fence=None, fence_proven=False, shutdown_lsn=99, postgres="down", postgres_starts=2, following="n2",
    is_standby=True, was_standby=True, system_identifier="7", timeline=6, latch=Latch("r", "w", "t"),
    adopting=True, held_by="", watchdog="", cannot_lead="", progress="p", empty="initdb", unfinished=True,
    cannot_rewind="c", change=12, sync=SyncTold(number=8, rule=None, done=False), begins=55, spent=True,
)  # fmt: skip


@pytest.fixture
def path() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="hlink") as name:
        yield str(Path(name) / "fencer.sock")


def test_all_of_the_status_is_understood() -> None:
    """None of it by its default: what is left out here, the core decides without."""
    v = _view(STATUS)
    assert (v.fencer_id, v.trusted, v.highest, v.active, v.lease_deadline_ns) == (
        "f",
        True,
        (3, 4),
        (3, 2),
        77,
    )
    assert (v.order, v.order_op, v.order_state, v.order_detail) == ((3, 4), "fence", "failed", "why")
    assert (v.fence_proven, v.postgres_up, v.following, v.is_standby) == (False, False, "n2", True)
    assert (v.system_identifier, v.latched, v.unfinished, v.progress) == ("7", "r (by w, t)", True, "p")
    assert (v.cannot_rewind, v.was_standby, v.empty, v.adopting) == ("c", True, "initdb", True)
    assert (v.timeline, v.begins, v.spent, v.shutdown_lsn) == (6, 55, True, 99)
    assert (v.rule, v.rule_number, v.rule_done) == (HOLD, 8, False)
    told = SyncTold(number=8, rule=SyncRule(1, ("n2", "n3")), done=True)
    up = _view(msgspec.structs.replace(STATUS, postgres="running", fence_proven=True, latch=None, sync=told))
    assert (up.postgres_up, up.fence_proven, up.latched) == (True, True, None)
    assert (up.rule, up.rule_done) == (Rule(1, ("n2", "n3")), True)
    none = _view(msgspec.structs.replace(STATUS, sync=None, order=None, active=None))
    assert (none.rule, none.rule_number, none.rule_done, none.order, none.active) == (
        None,
        0,
        False,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("trusted", "cannot_lead", "expected"),
    [(True, "", True), (False, "", False), (True, "no watchdog", False), (False, "no watchdog", False)],
)
def test_who_cannot_lead_is_no_candidate(trusted: bool, cannot_lead: str, expected: bool) -> None:
    """A node that is required to have a watchdog, and has none, is not to be trusted with leadership."""
    said = msgspec.structs.replace(STATUS, trusted=trusted, cannot_lead=cannot_lead)
    assert _view(said).trusted == expected
    assert _view(said).detail == cannot_lead


@dataclass
class Fencer:
    """Answers over a real socket: status at once, then nothing new; to what else is asked, what the test says."""

    asked: list[protocol.Request] = field(default_factory=list)
    reply: Callable[[protocol.Request], protocol.Reply] = lambda _: protocol.Done("")

    async def client(self, stream: trio.SocketStream) -> None:
        async def exactly(count: int) -> bytes:
            data = b""
            while len(data) < count:
                chunk = await stream.receive_some(count - len(data))
                if not chunk:
                    raise trio.EndOfChannel
                data += chunk
            return data

        with contextlib.suppress(trio.EndOfChannel, trio.BrokenResourceError):
            while True:
                header = await exactly(protocol.HEADER.size)
                request = protocol.decode_request(await exactly(protocol.frame_length(header)))
                self.asked.append(request)
                if isinstance(request, protocol.StatusRequest):
                    await trio.sleep(0.05)
                known = isinstance(request, protocol.Hello | protocol.StatusRequest)
                await stream.send_all(protocol.frame(STATUS if known else self.reply(request)))

    def of(self, kind: type) -> list[protocol.Request]:
        return [r for r in self.asked if isinstance(r, kind)]


def listening(path: str, backlog: int = 16) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen(backlog)
    return sock


@contextlib.asynccontextmanager
async def linked(
    path: str, fencer: Fencer
) -> AsyncIterator[tuple[FencerLink, list[Event], trio.CancelScope]]:
    posted: list[Event] = []
    link = FencerLink(path, posted.append)
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening(path)))
    async with trio.open_nursery() as nursery:
        served = trio.CancelScope()

        async def serve() -> None:
            with served:
                await trio.serve_listeners(fencer.client, [listener])

        nursery.start_soon(serve)
        nursery.start_soon(link.run)
        yield link, posted, served
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(30):
        while not condition():
            await trio.sleep(0.01)


ACTIVATE = Order("activate", (4, 1), "r", deadline_ns=123, sync_count=1, sync_voters=("n2",), timeline=9)


@pytest.mark.parametrize(
    ("command", "request_"),
    [
        (
            ACTIVATE,
            protocol.Activate(
                generation=Generation(4, 1), deadline_boottime_ns=123, sync=SyncRule(1, ("n2",)), timeline=9
            ),
        ),
        (
            Order("follow", (4, 2), "r", primary="n2", slot=True),
            protocol.Follow(generation=Generation(4, 2), primary="n2", slot=True),
        ),
        (
            Order("rejoin", (4, 3), "r", primary="n2", system_identifier="7", clone=True, slot=True),
            protocol.Rejoin(
                generation=Generation(4, 3), primary="n2", system_identifier="7", clone=True, slot=True
            ),
        ),
        (
            Order("fence", (4, 4), "why", clean=True),
            protocol.Fence(generation=Generation(4, 4), reason="why", clean=True),
        ),
        (
            Order("fence", (4, 5), "why"),
            protocol.Fence(generation=Generation(4, 5), reason="why", clean=False),
        ),
        (Renew((4, 1), 321), protocol.Renew(generation=Generation(4, 1), deadline_boottime_ns=321)),
        (
            TellRule((4, 1), 3, Rule(1, ("n3",))),
            protocol.Sync(generation=Generation(4, 1), number=3, rule=SyncRule(1, ("n3",))),
        ),
        (TellRule((4, 1), 4, HOLD), protocol.Sync(generation=Generation(4, 1), number=4, rule=None)),
    ],
)
async def test_what_is_decided_is_what_is_ordered(
    path: str, command: Order | Renew | TellRule, request_: protocol.Request
) -> None:
    fencer = Fencer()
    async with linked(path, fencer) as (link, posted, _):
        await until(lambda: any(isinstance(e, FencerSeen) for e in posted))
        link.send(command)
        await until(lambda: fencer.of(type(request_)))
        assert fencer.of(type(request_)) == [request_]


async def test_refusals_are_told_and_renewals_are_not(path: str) -> None:
    fencer = Fencer(reply=lambda _: protocol.Refusal("latched", "by somebody"))
    async with linked(path, fencer) as (link, posted, _):
        link.send(Renew((4, 1), 321))
        link.send(ACTIVATE)
        link.send(TellRule((4, 1), 3, HOLD))
        await until(lambda: RuleRefused(3) in posted)
        assert OrderRefused((4, 1), "latched", "by somebody") in posted


async def test_changes_are_waited_for_and_a_fencer_that_is_gone_is_told(path: str) -> None:
    fencer = Fencer()
    async with linked(path, fencer) as (_, posted, served):
        await until(lambda: len(fencer.of(protocol.StatusRequest)) >= 2)
        asked = fencer.of(protocol.StatusRequest)[0]
        assert isinstance(asked, protocol.StatusRequest)
        assert (asked.unless, asked.wait_ms > 0) == (STATUS.change, True)
        assert not any(isinstance(e, FencerSilent) for e in posted)
        served.cancel()
        await until(lambda: any(isinstance(e, FencerSilent) for e in posted))


async def test_a_late_reply_never_answers_the_next_request(path: str) -> None:
    """After a deadline the connection is of no more use."""
    with listening(path) as sock:
        client = FencerClient(path)
        await client.connect()
        ask = protocol.StatusRequest()
        with trio.fail_after(30), pytest.raises(FencerUnavailable, match=r"no answer in 0.05 s"):
            await client.request(ask, timeout_s=0.05)
        other, _ = sock.accept()
        with other, contextlib.suppress(OSError):
            other.sendall(protocol.frame(STATUS))
        with pytest.raises(FencerUnavailable, match="not connected"):
            await client.request(ask, timeout_s=20)


def test_one_deadline_for_all_of_a_call(path: str) -> None:
    """harmonyctl's: also against a fencer that answers byte by byte."""
    with listening(path) as sock:

        def drip() -> None:
            client, _ = sock.accept()
            with client, contextlib.suppress(OSError):
                for byte in protocol.frame(STATUS):
                    client.send(bytes([byte]))
                    time.sleep(0.05)

        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(FencerUnavailable, match=r"no answer in 0.3 s"):
            call(path, protocol.StatusRequest(), timeout_s=0.3)
        thread.join(60)


def test_a_call_that_finds_no_place_in_the_queue(path: str) -> None:
    """connect() waits for one, as long as its deadline is."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(listening(path, 0))
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(path)
        said: list[str] = []

        def ask() -> None:
            try:
                call(path, protocol.StatusRequest(), timeout_s=0.2)
            except FencerUnavailable as e:
                said.append(str(e))

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(30)
        assert said == [f"{path}: no answer in 0.2 s"]
