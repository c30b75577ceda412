"""B4: a server that is up and cut off from the others is left; one slow answer is waited for."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import AsyncIterator, Callable

import pytest
import trio
import trio_asyncio
from structlog.testing import capture_logs

from harmony.errors import StoreError, StoreUnavailable
from harmony.store.link import open_link
from harmony.store.nats import REST_S, NatsStore, open_nats
from tests.store.conftest import Trio
from tests.store.fakenats import STREAM, FakeNats

TIMEOUT_S = 0.5  # of a heartbeat in the preset `fast`
GET = "$JS.API.STREAM.MSG.GET."
VALUE = {"message": {"data": "e30=", "seq": 7, "time": "2026-01-02T03:04:05.6Z", "subject": "x"}}


def at(store: NatsStore) -> str:
    """The server that it uses."""
    return store._link.url if store._link is not None else ""


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.02)


async def beat(store: NatsStore, until: Callable[[], object] = lambda: True) -> int:
    """Write as heartbeats do until the store takes one and the condition holds: the newest revision."""
    with trio.fail_after(60):
        while True:
            with contextlib.suppress(StoreError):
                found = await store.get("k", timeout_s=TIMEOUT_S)
                revision = found.revision if found is not None else 0
                revision = await store.update("k", b"beat", revision, timeout_s=TIMEOUT_S)
                if until():
                    return revision
            await trio.sleep(0.05)
    raise AssertionError("unreachable")


@pytest.mark.real
async def test_a_server_that_is_cut_off_from_its_cluster_is_left(trio_of_servers: Trio) -> None:
    """Its clients' connections stay up. The watch goes on through the other server."""
    urls = [s.url for s in trio_of_servers.servers]
    async with open_nats(urls, "c", 3, None) as store:
        await beat(store)
        seen: list[int] = []
        store.watch(lambda e: seen.append(e.revision))
        first = at(store)
        trio_of_servers.cut(urls.index(first))
        revision = await beat(store, lambda: at(store) not in {"", first})
        await until(lambda: seen and seen[-1] >= revision)
        assert store.facts is not None
        assert store.facts.problem == ""
        trio_of_servers.cut(urls.index(first), again=True)
        await beat(store)


@pytest.mark.real
async def test_without_a_quorum_nothing_moves_and_all_is_well_afterwards(trio_of_servers: Trio) -> None:
    """Every server is without JetStream then: going round would help nobody."""
    urls = [s.url for s in trio_of_servers.servers]
    async with open_nats(urls, "c", 3, None) as store:
        await beat(store)
        first, epoch = at(store), store.connection_epoch
        others = [i for i, url in enumerate(urls) if url != first]
        for i in others:
            trio_of_servers.servers[i].stop()
        failures = 0
        with trio.fail_after(60):
            while failures < 6:
                try:
                    await store.create(f"x{failures}", b"1", timeout_s=TIMEOUT_S)
                except StoreUnavailable:
                    failures += 1
        assert (at(store), store.connection_epoch) == (first, epoch)
        trio_of_servers.servers[others[0]].start()
        await beat(store)


@contextlib.asynccontextmanager
async def between(a: FakeNats, b: FakeNats, patience: float = 0.5) -> AsyncIterator[NatsStore]:
    """A store that uses `a`, and knows of `b`."""
    async with trio.open_nursery() as nursery:
        for fake in (a, b):
            fake.answers.setdefault(GET, lambda: VALUE)
            await nursery.start(fake.serve)
        async with open_nats([a.url, b.url], "c", 1, None) as store:
            store.patience = patience
            await until(lambda: store.connected)
            assert at(store) == a.url
            yield store
        nursery.cancel_scope.cancel()


async def test_who_does_not_answer_is_left_for_who_does() -> None:
    a, b = FakeNats(silent=(GET,)), FakeNats()
    async with between(a, b) as store:
        with pytest.raises(StoreUnavailable):
            await store.get("k", timeout_s=TIMEOUT_S)
        await until(lambda: at(store) == b.url)
        found = await store.get("k", timeout_s=30)
        assert found is not None
        assert found.revision == 7
        assert store._rest_s == REST_S  # before it would move again


@pytest.mark.parametrize("code", [10008, 10009, 10076])
async def test_who_says_that_jetstream_is_not_there_is_left_at_once(code: int) -> None:
    a, b = FakeNats(), FakeNats()
    async with between(a, b, patience=1.0) as store:
        a.answers[GET] = lambda: {"error": {"err_code": code, "description": "not here"}}
        with pytest.raises(StoreUnavailable):
            await store.get("k", timeout_s=3600)
        await until(lambda: at(store) == b.url)


async def test_a_slow_answer_still_arrives() -> None:
    """What was asked here is answered here, although the next call goes elsewhere."""
    released = trio.Event()
    a, b = FakeNats(held={GET: released}), FakeNats()
    async with between(a, b, patience=0.0001) as store, trio.open_nursery() as nursery:
        b.answers[GET] = lambda: {"message": {**VALUE["message"], "seq": 8}}
        revisions: list[int] = []

        async def ask() -> None:
            found = await store.get("k", timeout_s=60)
            revisions.append(found.revision if found is not None else 0)

        nursery.start_soon(ask)
        await until(lambda: at(store) == b.url)
        await ask()
        assert revisions == [8]
        released.set()
        await until(lambda: revisions == [8, 7])


async def test_another_history_is_not_gone_over_to() -> None:
    """I2: a server of another NATS, or of a bucket made anew, is a stranger, however quick it answers."""
    a, b = FakeNats(silent=(GET,)), FakeNats()
    b.answers["$JS.API.STREAM.INFO."] = lambda: {**STREAM, "created": "2026-02-02T00:00:00Z"}
    async with between(a, b) as store:
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                await store.get("k", timeout_s=0.2)
        await until(lambda: any("STREAM.INFO" in subject for subject, _ in b.asked))
        await trio.sleep(0.2)
        assert (at(store), store.connection_epoch) == (a.url, 1)


async def test_each_servers_cause_is_logged_once() -> None:
    """B18: two servers that are down for two reasons took turns in the journal."""
    refusing = FakeNats()
    refusing.answers["$JS.API.STREAM.INFO."] = lambda: {
        "error": {"err_code": 10008, "description": "no leader"}
    }
    with capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            await nursery.start(refusing.serve)
            async with open_nats([refusing.url, "nats://127.0.0.1:1"], "c", 1, None):
                await until(lambda: len(refusing.connects) > 3)
            nursery.cancel_scope.cancel()
    said = [str(entry["why"]) for entry in logs if entry["event"] == "store not connected"]
    assert len(said) == len(set(said)), said
    assert any("no leader" in why for why in said)
    assert any("127.0.0.1:1" in why for why in said)


async def test_a_lost_connection_is_no_reason_to_rest() -> None:
    """Who went over and then lost that server would not have looked elsewhere for up to half a minute."""
    a, b = FakeNats(silent=(GET,)), FakeNats()
    async with between(a, b) as store:
        with pytest.raises(StoreUnavailable):
            await store.get("k", timeout_s=TIMEOUT_S)
        await until(lambda: at(store) == b.url)
        b.life.cancel()
        await until(lambda: at(store) == a.url)
        assert store._rest_s == 0


async def test_a_server_that_is_named_twice_hides_no_other() -> None:
    refusing, good = FakeNats(), FakeNats()
    refusing.answers["$JS.API.STREAM.INFO."] = lambda: {"error": {"err_code": 10008, "description": "no"}}
    async with trio.open_nursery() as nursery:
        for fake in (refusing, good):
            await nursery.start(fake.serve)
        async with open_nats([refusing.url, refusing.url, good.url], "c", 1, None) as store:
            await until(lambda: at(store) == good.url)
        nursery.cancel_scope.cancel()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
async def test_a_connection_that_is_given_up_halfway_is_closed() -> None:
    """Whoever is asked beside another, and is too late, would leave its socket to the garbage collector."""
    ends = 0

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal ends
        await stream.send_all(b'INFO {"server_id":"X","version":"2.11.1","max_payload":1048576}\r\n')
        while await stream.receive_some(65536):
            pass  # no PONG: it never gets further
        ends += 1

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        url = f"nats://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        async with trio_asyncio.open_loop():
            with pytest.raises(trio.TooSlowError):
                await open_link(url, None, 0.3)
            await until(lambda: ends == 1)
            gc.collect()
        nursery.cancel_scope.cancel()
