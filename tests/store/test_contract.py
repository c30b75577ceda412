"""The contract of every store, and what only a real server can show."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
import uuid
from contextlib import AbstractAsyncContextManager

import pytest
import trio
import trio_asyncio

from harmony.errors import ConfigError, SequenceMismatch, StoreMisconfigured, StoreUnavailable
from harmony.store import open_store
from harmony.store.interface import Entry, Store
from harmony.store.memory import MemoryServer, MemoryStore
from harmony.store.nats import NatsStore
from tests import pace
from tests.store.conftest import Breaker, Opener, Server, api, opener


def cluster() -> str:
    return "t" + uuid.uuid4().hex[:12]


async def up(store: Store) -> Store:
    with trio.fail_after(10):
        while not store.connected:
            await trio.sleep(0.01)
    return store


async def until(condition: object, seconds: float = 10) -> None:
    with trio.fail_after(seconds):
        while not condition():  # type: ignore[operator]
            await trio.sleep(0.02)


async def test_round_trip(open_client: Opener) -> None:
    """D1: writes are compare-and-set only; D9: a stale revision is refused by the store."""
    async with open_client(cluster()) as store:
        await up(store)
        assert await store.get("k", timeout_s=2) is None
        first = await store.create("k", b"1", timeout_s=2)
        with pytest.raises(SequenceMismatch):
            await store.create("k", b"x", timeout_s=2)
        second = await store.update("k", b"2", first, timeout_s=2)
        assert second > first
        with pytest.raises(SequenceMismatch):
            await store.update("k", b"x", first, timeout_s=2)
        entry = await store.get("k", timeout_s=2)
        assert entry is not None
        assert (entry.key, entry.value, entry.revision) == ("k", b"2", second)
        await store.create("member.n1", b"m", timeout_s=2)
        assert await store.keys("member.", timeout_s=2) == ["member.n1"]


async def test_fifty_claims_one_winner(open_client: Opener) -> None:
    """D1: concurrent promotions, exactly one wins."""
    name = cluster()
    won: list[int] = []
    refused: list[int] = []

    async with open_client(name) as a, open_client(name) as b:
        revision = await (await up(a)).create("cluster_state", b"0", timeout_s=2)
        await up(b)

        async def claim(i: int) -> None:
            try:
                await (a, b)[i % 2].update("cluster_state", b"%d" % i, revision, timeout_s=5)
            except SequenceMismatch:
                refused.append(i)
            else:
                won.append(i)

        async with trio.open_nursery() as nursery:
            for i in range(50):
                nursery.start_soon(claim, i)
        assert len(won) == 1
        assert len(refused) == 49
        entry = await b.get("cluster_state", timeout_s=2)
        assert entry is not None
        assert entry.value == b"%d" % won[0]


async def test_time_and_revision_are_the_stores(open_client: Opener) -> None:
    """D2, D3: the same metadata for every reader, by read and by watch, and monotone."""
    name = cluster()
    async with open_client(name) as a, open_client(name) as b:
        await up(a)
        await up(b)
        seen: list[Entry] = []
        b.watch(seen.append)
        revision, stamps = 0, []
        for i in range(5):
            revision = await a.update("k", b"%d" % i, revision, timeout_s=2)
            one, two = await a.get("k", timeout_s=2), await b.get("k", timeout_s=2)
            assert one == two
            assert one is not None
            assert one.revision == revision
            stamps.append(one.created_ns)
        assert stamps == sorted(stamps)
        await until(lambda: seen and seen[-1] == one)


async def test_watch(open_client: Opener) -> None:
    """D4: what is there first, then each change in order, nothing twice; and it ends when asked to."""
    async with open_client(cluster()) as store:
        await up(store)
        revision = await store.create("a", b"1", timeout_s=2)
        seen: list[Entry] = []
        stop = store.watch(seen.append)
        await until(lambda: len(seen) == 1)
        for i in range(10):
            revision = await store.update("a", b"%d" % i, revision, timeout_s=2)
        await until(lambda: len(seen) == 11)
        revisions = [e.revision for e in seen]
        assert revisions == sorted(set(revisions))
        stop()
        await store.update("a", b"x", revision, timeout_s=2)
        await trio.sleep(0.1)
        assert len(seen) == 11


async def test_clusters_do_not_meet(open_client: Opener) -> None:
    """D8: a bucket per cluster id."""
    async with open_client(cluster()) as a, open_client(cluster()) as b:
        await up(a)
        await up(b)
        await a.create("k", b"1", timeout_s=2)
        assert await b.get("k", timeout_s=2) is None
        assert await b.keys("", timeout_s=2) == []


async def test_the_factory() -> None:
    """C3: by name; others are refused."""
    with pytest.raises(ConfigError, match=r"store\.type"):
        async with open_store("etcd", urls=[], cluster_id="x", replicas=1, credentials_file=None):
            pass


async def test_ambiguous_writes_in_memory() -> None:
    """A lost acknowledgement is 'unavailable' while the value is there; a lost write is not there."""
    store = MemoryStore(MemoryServer(), "x")
    store.faults.lost_ack = 1
    with pytest.raises(StoreUnavailable):
        await store.create("k", b"1", timeout_s=1)
    assert await store.get("k", timeout_s=1) is not None
    store.faults.lost = 1
    with pytest.raises(StoreUnavailable):
        await store.create("other", b"1", timeout_s=1)
    assert await store.get("other", timeout_s=1) is None


@pytest.mark.real
async def test_nothing_is_buffered_while_disconnected(server: Server) -> None:
    """A claim that was given up must never win later."""
    async with opener(server.url)(cluster()) as store:
        await up(store)
        revision = await store.create("k", b"1", timeout_s=2)
        server.stop()
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                await store.update("k", b"late", revision, timeout_s=0.5)
        server.start()
        await until(lambda: store.connected)
        await trio.sleep(1.5)
        entry = await store.get("k", timeout_s=2)
        assert entry is not None
        assert (entry.value, entry.revision) == (b"1", revision)
        assert store.connection_epoch >= 2


@pytest.mark.real
async def test_the_watch_survives_a_restart_and_a_deleted_consumer(server: Server) -> None:
    """D4: a silently dead watch is noticed."""
    name = cluster()
    async with opener(server.url)(name) as store:
        await up(store)
        seen: list[bytes] = []
        store.watch(lambda e: seen.append(e.value))
        revision = await store.create("k", b"1", timeout_s=2)
        await until(lambda: seen == [b"1"])
        server.stop()
        await trio.sleep(0.2)
        server.start()
        await until(lambda: store.connected)
        revision = await store.update("k", b"2", revision, timeout_s=2)
        await until(lambda: seen == [b"1", b"2"])
        client = store._link.client  # type: ignore[attr-defined]
        stream = f"KV_harmony_{name}"
        answer = await trio_asyncio.aio_as_trio(client.request)(
            f"$JS.API.CONSUMER.NAMES.{stream}", b"", timeout=2
        )
        consumers = json.loads(answer.data)["consumers"]
        assert consumers
        for consumer in consumers:
            await trio_asyncio.aio_as_trio(client.request)(
                f"$JS.API.CONSUMER.DELETE.{stream}.{consumer}", b"", timeout=2
            )
        await store.update("k", b"3", revision, timeout_s=2)
        await until(lambda: seen == [b"1", b"2", b"3"])


@pytest.mark.real
async def test_a_frozen_server_costs_no_more_than_the_deadline(server: Server) -> None:
    async with opener(server.url)(cluster()) as store:
        await up(store)
        server.send(signal.SIGSTOP)
        try:
            began = time.monotonic()
            with pytest.raises(StoreUnavailable):
                await store.get("k", timeout_s=0.4)
            assert time.monotonic() - began < 2.0 + pace.SLACK_S
        finally:
            server.send(signal.SIGCONT)


@pytest.mark.real
async def test_down_at_start(server: Server) -> None:
    """A store that is down at start: opening works, calls say so, and it works when the server comes."""
    server.stop()
    async with opener(server.url)(cluster()) as store:
        with pytest.raises(StoreUnavailable):
            await store.get("k", timeout_s=0.5)
        server.start()
        await until(lambda: store.connected)
        assert await store.create("k", b"1", timeout_s=2) > 0


async def test_the_lineage_is_of_the_history_and_the_same_for_all(breakable: tuple[Opener, Breaker]) -> None:
    """I2, I4: what tells a bucket that was made anew from the one that this node has seen."""
    opens, breaker = breakable
    name = cluster()
    async with opens(name) as a, opens(name) as b:
        await up(a)
        await up(b)
        await a.create("k", b"1", timeout_s=2)
        before = a.facts
        assert before is not None
        assert before.lineage
        assert before.problem == ""
        assert b.facts == before
        await breaker.delete(a, name)
        for store in (a, b):
            with pytest.raises(StoreUnavailable):
                await store.get("k", timeout_s=2)
        await until(lambda: a.facts is not None and "is gone" in a.facts.problem)
        assert a.facts is not None
        assert a.facts.lineage == ""
        await trio.sleep(0.3)
        with pytest.raises(StoreUnavailable):  # and nobody makes it again
            await a.create("k", b"2", timeout_s=1)
        a.allow_creation()
        await until(lambda: a.connected and a.facts is not None and a.facts.problem == "")
        assert a.facts is not None
        assert a.facts.lineage not in {"", before.lineage}
        assert await a.get("k", timeout_s=2) is None
        assert await a.create("k", b"2", timeout_s=2) > 0
        await until(lambda: b.facts == a.facts and b.connected, 15)


async def test_a_weaker_bucket_is_named_and_goes_on_working(breakable: tuple[Opener, Breaker]) -> None:
    """I2: a problem is for the core to distrust; who leads must be able to renew all the same."""
    opens, breaker = breakable
    name = cluster()
    async with opens(name) as store:
        await up(store)
        await breaker.weaken(store, name)
        if isinstance(store, NatsStore):
            store._look_again.set()  # about 10 s early
        await until(lambda: store.facts is not None and "max_msgs_per_subject is 2" in store.facts.problem)
        revision = await store.create("k", b"1", timeout_s=2)
        assert await store.update("k", b"2", revision, timeout_s=2) > revision


@pytest.mark.real
async def test_every_weakness_is_named(server: Server) -> None:
    """I2: each difference with what is there and what must be; calls work."""
    name = cluster()
    async with opener(server.url)("other") as helper:
        await up(helper)
        config = {
            "name": f"KV_harmony_{name}",
            "subjects": [f"$KV.harmony_{name}.>"],
            "storage": "memory",
            "max_msgs_per_subject": 5,
            "max_age": 10**12,
            "allow_direct": True,
            "num_replicas": 1,
        }
        await api(helper, f"STREAM.CREATE.KV_harmony_{name}", config)
    async with opener(server.url)(name) as store:
        await up(store)
        assert store.facts is not None
        for difference in ("storage", "max_msgs_per_subject", "max_age", "allow_direct"):
            assert difference in store.facts.problem
        assert await store.create("k", b"1", timeout_s=2) > 0


@pytest.mark.real
async def test_a_bucket_that_cannot_be_written_is_an_error_of_its_own(server: Server) -> None:
    """C3: with other subjects no heartbeat could ever be stored: said at once, with what to do."""
    name = cluster()
    async with opener(server.url)("other") as helper:
        await up(helper)
        config = {"name": f"KV_harmony_{name}", "subjects": [f"elsewhere.{name}.>"], "num_replicas": 1}
        await api(helper, f"STREAM.CREATE.KV_harmony_{name}", config)
    async with opener(server.url)(name) as store:
        await until(lambda: store._misconfigured is not None)  # type: ignore[attr-defined]
        with pytest.raises(StoreMisconfigured, match="subjects is"):
            await store.get("k", timeout_s=0.5)


@pytest.mark.real
async def test_who_has_seen_a_bucket_does_not_make_it(server: Server) -> None:
    """I2: an empty store where there was one is the loss of all terms, not a first start."""
    async with opener(server.url, may_create=False)(cluster()) as store:
        await until(lambda: store.facts is not None)
        assert store.facts is not None
        assert "is gone" in store.facts.problem
        assert not store.connected


@pytest.mark.real
async def test_a_server_that_refuses_is_not_waited_for(server: Server) -> None:
    """The next server is asked at once, and what went wrong is said; nor does an end wait for it."""

    def opens(urls: list[str]) -> AbstractAsyncContextManager[Store]:
        return open_store("nats", urls=urls, cluster_id=cluster(), replicas=1, credentials_file=None)

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        dead = f"nats://127.0.0.1:{nobody.getsockname()[1]}"
        async with opens([dead, server.url]) as store:
            with trio.fail_after(1):
                while not store.connected:
                    await trio.sleep(0.01)
        for n in range(40):
            with trio.fail_after(1):
                async with opens([dead]) as store:
                    await trio.sleep(n / 4000)
        async with opens([dead]) as store:
            await trio.sleep(0.3)
            with pytest.raises(StoreUnavailable, match=re.escape(dead)):
                await store.get("k", timeout_s=0.1)


@pytest.mark.real
async def test_lax_sync_settings_are_seen_through_the_monitoring_port(server: Server) -> None:
    """I2: acknowledged and not on disk: only the monitoring port tells; a silent port changes nothing."""
    name = cluster()
    async with opener(server.url, monitor=server.monitor)(name) as store:
        await up(store)
        await until(lambda: store.monitors._found)  # type: ignore[attr-defined]
        assert store.facts is not None
        assert store.facts.problem == ""
        lineage = store.facts.lineage
    server.stop()
    server.start(sync_interval="30s")
    async with opener(server.url, monitor=server.monitor)(name) as store:
        await up(store)
        await until(lambda: store.facts is not None and store.facts.problem != "")
        assert store.facts is not None
        assert "sync_interval 30 s, must be always" in store.facts.problem
        assert store.facts.lineage == lineage  # over a restart of the server
        server.stop()
        await store.monitors._ask(server.monitor)  # type: ignore[attr-defined]
        assert "sync_interval 30 s" in store.facts.problem
