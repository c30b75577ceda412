"""The shell around the core: what the store shows reaches the core, what the core decides reaches the world.

A memory store, no fencer, a database that is silent; everything else is real, with the times of the preset `fast`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import structlog.testing
import trio
from structlog.testing import capture_logs

from harmony.admin import AcceptReply, ErrorReply
from harmony.agent import memory
from harmony.agent.failing import Failing
from harmony.agent.main import identity
from harmony.agent.memory import Memory
from harmony.agent.shell import Shell, World
from harmony.config import Config, load
from harmony.core.messages import DbSeen, DbSilent, HealthSeen, Marks, Remembered, Retiring
from harmony.core.slots import Duty
from harmony.records import CLUSTER_STATE, CONTROL, Control, encode
from harmony.store.memory import MemoryServer, MemoryStore
from harmony.verdict import CANNOT_TELL, judge
from tests.cli.test_commands import CLUSTER
from tests.core.helpers import fencer

CONFIG = """
[cluster]
id = "c1"
preferred_primary = "n1"
[node]
name = "n2"
[members]
n1.host = "10.0.0.1"
n2.host = "10.0.0.2"
[timing]
preset = "fast"
[failover]
failback = "automatic"
maximum_changes = 3
[postgresql]
data_dir = "/nowhere"
"""
LEADS = msgspec.structs.replace(CLUSTER, cluster_id="c1", primary="n1", last_primary="n1")


class SilentProbe:
    async def ask(self, now_ns: int, timeout_s: float) -> DbSilent:
        return DbSilent("no database in this test")


class NoHealth:
    async def look(self, asked_ns: int, answer: DbSeen | DbSilent, timeout_s: float) -> HealthSeen:
        return HealthSeen(asked_ns)


async def no_survey(duty: Duty | None) -> None:
    """No database in this test."""


@dataclass
class Running:
    shell: Shell
    server: MemoryServer
    store: MemoryStore
    folder: Path
    ended: trio.Event

    async def until(self, condition: Callable[[], object]) -> None:
        with trio.fail_after(30):
            while not condition():
                await trio.sleep(0.005)

    async def put(self, key: str, value: bytes) -> int:
        found = await self.store.get(key, timeout_s=10)
        revision = found.revision if found is not None else 0
        return await self.store.update(key, value, revision, timeout_s=10)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    file = tmp_path / "harmony.toml"
    file.write_text(CONFIG)
    return load(file, {})


@contextlib.asynccontextmanager
async def running(
    config: Config, tmp_path: Path, server: MemoryServer, remembered: Remembered | None = None
) -> AsyncIterator[Running]:
    store, kept = MemoryStore(server, "c1"), Memory(tmp_path, "c1")
    found = remembered or memory.load(tmp_path, "c1")
    nowhere = str(tmp_path / "none")
    world = World(store, SilentProbe(), NoHealth(), no_survey, kept, found, nowhere, lambda text: None)  # type: ignore[arg-type]
    made = Running(Shell(config, identity(config), world), server, store, tmp_path, trio.Event())

    async def run() -> None:
        await made.shell.run()
        made.ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kept.run)
        nursery.start_soon(run)
        yield made
        nursery.cancel_scope.cancel()


def test_the_policy_is_the_configurations(config: Config) -> None:
    """C2: every value of [failover] reaches the core."""
    p = identity(config).policy
    assert (p.failback, p.maximum_changes, p.preferred_primary) == ("automatic", 3, "n1")
    assert (p.failback_after_s, p.changes_window_s, p.flap_window_s) == (60.0, 3600.0, 600.0)


async def test_what_was_seen_is_kept_and_compared_at_the_next_start(config: Config, tmp_path: Path) -> None:
    """I2, I4: a store that was rolled back while no agent ran is noticed by what the disk remembers."""
    server = MemoryServer()
    async with running(config, tmp_path, server) as r:
        await r.put(CLUSTER_STATE, encode(LEADS))
        await r.until(lambda: memory.load(tmp_path, "c1").marks.term == LEADS.term)
    found = memory.load(tmp_path, "c1").marks
    assert found.lineage == "memory-1"
    anew = MemoryServer(lineage="memory-2")
    async with running(config, tmp_path, anew) as r:
        await r.put(CLUSTER_STATE, encode(LEADS))
        await r.until(lambda: r.shell.status().myself.distrust)
        assert "made anew" in r.shell.status().myself.distrust
        shown = r.shell.status().myself.store
        assert (shown.lineage, shown.marks.lineage) == ("memory-2", "memory-1")
        assert memory.load(tmp_path, "c1").marks == found
        reply = r.shell.accept(create=False, who="somebody", leave="")
        assert isinstance(reply, AcceptReply)
        assert "memory-2" in reply.accepted
        await r.until(lambda: not r.shell.status().myself.distrust)
        await r.until(lambda: memory.load(tmp_path, "c1").marks.lineage == "memory-2")
        again = r.shell.accept(create=False, who="somebody", leave="")
        assert isinstance(again, ErrorReply)
        assert "nothing to accept" in again.error


async def test_a_damaged_memory_is_an_alarm_until_it_is_accepted(config: Config, tmp_path: Path) -> None:
    """I2: a torn file is never taken for a first start."""
    (tmp_path / memory.NAME).write_bytes(b"torn")
    async with running(config, tmp_path, MemoryServer()) as r:
        await r.put(CLUSTER_STATE, encode(LEADS))
        await r.until(lambda: r.shell.status().myself.distrust)
        assert str(tmp_path / memory.NAME) in r.shell.status().myself.store.memory
        r.shell.accept(create=False, who="somebody", leave="")
        await r.until(lambda: memory.load(tmp_path, "c1").marks.term == LEADS.term)
        await r.until(lambda: not r.shell.status().myself.store.memory)


async def test_problems_come_and_go(config: Config, tmp_path: Path) -> None:
    """I2: what makes the store untrustworthy is distrusted while it lasts, without an operator."""
    async with running(config, tmp_path, MemoryServer()) as r:
        await r.put(CLUSTER_STATE, encode(LEADS))
        r.server.problem = "num_replicas is 1"
        await r.until(lambda: "num_replicas is 1" in r.shell.status().myself.distrust)
        r.server.problem = ""
        await r.until(lambda: not r.shell.status().myself.distrust)


async def test_what_operators_ask_for_is_seen(config: Config, tmp_path: Path) -> None:
    """By the watch at once; one that is unreadable is reported, and keeps nobody from deciding."""
    async with running(config, tmp_path, MemoryServer()) as r:
        changed = msgspec.structs.replace(LEADS, changes=((2, 1), (3, 2)))
        await r.put(CLUSTER_STATE, encode(changed))
        await r.until(lambda: r.shell.status().myself.changes == 2)
        await r.put(CONTROL, encode(Control(attempt="x", acknowledged=2)))
        await r.until(lambda: r.shell.status().myself.changes == 1)
        for unreadable in (b'{"from":"the future"}', b'{"attempt":"\xff"}', b"\xff", b""):
            await r.put(CONTROL, unreadable)
            before = r.shell._view.refreshed_ns
            await r.until(lambda before=before: r.shell._view.refreshed_ns > before)
        assert r.shell.status().myself.changes == 1


async def test_asked_to_stop_it_ends_when_nothing_holds_it(config: Config, tmp_path: Path) -> None:
    """O1: a standby has nothing to hand over."""
    async with running(config, tmp_path, MemoryServer()) as r:
        await r.put(CLUSTER_STATE, encode(LEADS))
        await r.until(lambda: r.shell.status().cluster is not None)
        r.shell.post(Retiring(hand_over=True))
        with trio.fail_after(2):
            await r.ended.wait()


async def test_a_store_that_is_gone_is_made_anew_only_where_it_is_to_be_founded(
    config: Config, tmp_path: Path
) -> None:
    """I2: without --found the acceptance creates nothing."""
    remembered = Remembered(Marks(3, 7, "a", "memory-1"))
    async with running(config, tmp_path, MemoryServer(missing=True), remembered) as r:
        await r.until(lambda: "is gone" in r.shell.status().myself.distrust)
        r.shell.accept(create=False, who="somebody", leave="")
        await trio.sleep(0.2)
        assert r.server.missing
        r.shell.accept(create=True, who="somebody", leave="")
        assert not r.server.missing
        await r.until(lambda: r.shell.status().myself.store.lineage == "memory-2")


async def test_data_that_is_not_whole_is_refused_as_a_founder(config: Config, tmp_path: Path) -> None:
    """I5: and nothing is made anew for it; found by simulation (seed 29934911074)."""
    remembered = Remembered(Marks(3, 7, "a", "memory-1"))
    async with running(config, tmp_path, MemoryServer(missing=True), remembered) as r:
        await r.until(lambda: "is gone" in r.shell.status().myself.distrust)
        r.shell.post(fencer(unfinished=True))
        await r.until(lambda: (f := r.shell._view.fencer) is not None and f.unfinished)
        refused = r.shell.accept(create=True, who="somebody", leave="")
        assert isinstance(refused, ErrorReply)
        assert "not whole" in refused.error
        assert r.server.missing


async def test_status_tells_of_now_what_the_store_does_not_take(config: Config, tmp_path: Path) -> None:
    """B5: the own row is what the agent knows now; heartbeats that fail are told of, with the store's words."""
    async with running(config, tmp_path, MemoryServer()) as r:
        await r.put(CLUSTER_STATE, encode(LEADS))
        await r.until(lambda: "member.n2" in {key for _, key in r.server.data})
        await r.until(lambda: judge(r.shell.status()).code != CANNOT_TELL)
        assert r.shell.status().myself.store_failure == ""
        r.store.faults.lost = 1_000_000
        with trio.fail_after(30):
            while judge(r.shell.status()).code != CANNOT_TELL or not r.shell.status().myself.store_failure:
                await trio.sleep(0.02)
        said = r.shell.status()
        own = said.nodes[1].member
        assert own is not None
        assert (own.status, own.row, own.why) == (said.myself.state, said.myself.row, said.myself.why)
        assert own.attempt == "", "no record that the store took"
        assert said.myself.store_failure in judge(said).reasons[0]
        r.store.faults.lost = 0
        with trio.fail_after(30):
            while judge(r.shell.status()).code == CANNOT_TELL or r.shell.status().myself.store_failure:
                await trio.sleep(0.02)


async def test_why_the_probe_fails_stands_in_the_journal_once(config: Config, tmp_path: Path) -> None:
    """B2: the cause of what is decided, at each change, and no flood."""
    with capture_logs() as logs:
        async with running(config, tmp_path, MemoryServer()) as r:
            asked: list[int] = []
            whys = ["Peer authentication failed", "the password is wrong"]

            async def ask(now_ns: int, timeout_s: float) -> DbSeen | DbSilent:
                asked.append(now_ns)
                return DbSilent(whys[len(asked) > 3])

            r.shell._probe.ask = ask  # type: ignore[method-assign]
            with trio.fail_after(30):
                while len(asked) < 7:
                    await trio.sleep(0.02)
    told = [e["why"] for e in logs if e["event"] == "PostgreSQL does not answer the probe"]
    assert [why for why in told if why in whys] == whys


async def test_at_a_vacancy_the_database_is_asked_without_waiting_for_the_beat(
    config: Config, tmp_path: Path
) -> None:
    """Beats of an hour: only the event can have asked. A question that was open then is not the answer."""
    slow = msgspec.structs.replace(config.timing, heartbeat_interval_s=3600.0, heartbeat_timeout_s=3600.0)
    async with running(config, tmp_path, MemoryServer()) as r:
        asked: list[int] = []
        open_, answer = trio.Event(), trio.Event()

        async def ask(now_ns: int, timeout_s: float) -> DbSilent:
            asked.append(now_ns)
            if len(asked) == 1:
                open_.set()
                await answer.wait()
            return DbSilent("no database in this test")

        r.shell._probe.ask = ask  # type: ignore[method-assign]
        r.shell._timing = slow
        with trio.fail_after(30):
            await open_.wait()
        await r.put(CLUSTER_STATE, encode(LEADS))
        await r.until(lambda: r.shell._view.cluster is not None)
        vacant = msgspec.structs.replace(LEADS, primary=None, primary_fencer_id=None)
        await r.put(CLUSTER_STATE, encode(vacant))
        await r.until(lambda: r.shell._view.urged_ns)
        assert len(asked) == 1
        answer.set()
        await r.until(lambda: len(asked) == 2)
        assert asked[1] >= r.shell._view.urged_ns
        await r.put(CLUSTER_STATE, encode(LEADS))
        await r.until(lambda: r.shell._view.occasion == ("", 0))
        assert len(asked) == 2, "once for each event"
        await r.put(CLUSTER_STATE, encode(vacant))
        await r.until(lambda: len(asked) == 3)


@pytest.mark.parametrize("named", ["", "mian", "c1"])
async def test_another_clusters_data_founds_nothing_unless_that_cluster_is_named(
    config: Config, tmp_path: Path, named: str
) -> None:
    """I1: a typo in cluster.id, and the hint followed, made a second primary (operator's report, B8)."""
    memory.save(tmp_path, memory.Stored("main", Marks(3, 7, "a", "memory-0")))
    server = MemoryServer()
    async with running(config, tmp_path, server) as r:
        await r.until(lambda: r.shell.status().myself.distrust)
        me = r.shell.status().myself
        assert "is cluster.id right? This node was in cluster main" in me.distrust
        await r.until(lambda: "This node was in cluster main" in r.shell.status().myself.why)
        assert me.store.was_in == "main"
        for create in (False, True):
            refused = r.shell.accept(create=create, who="somebody", leave=named)
            assert isinstance(refused, ErrorReply), refused
            assert "is cluster.id right? n2 was in cluster main" in refused.error
        assert r.shell.status().myself.distrust
        assert isinstance(r.shell.accept(create=True, who="somebody", leave="main"), AcceptReply)
        await r.until(lambda: not r.shell.status().myself.distrust)
        assert r.shell.status().myself.store.was_in == ""
        assert isinstance(r.shell.accept(create=True, who="somebody", leave="main"), ErrorReply)
        await r.until(lambda: memory.load(tmp_path, "c1").was_in == "")


async def test_failing_writes_are_named_while_reads_work(config: Config, tmp_path: Path) -> None:
    """F13: where JetStream's disk is full, the status says that writes fail, and why, until one is stored again."""
    server = MemoryServer()
    async with running(config, tmp_path, server) as r:
        await r.until(lambda: r.shell.status().nodes[1].member is not None)
        assert (r.shell.status().myself.store_failure, r.shell.status().myself.store_failing_s) == ("", 0.0)
        r.store.faults.lost = 1_000_000
        await r.until(lambda: r.shell.status().myself.store_failure.startswith("writes fail: "))
        await r.until(lambda: r.shell.status().myself.store_failing_s > 0.6)  # reads do not end it
        r.store.faults.lost = 0
        await r.until(lambda: r.shell.status().myself.store_failure == "")


def test_each_cause_of_a_failure_is_logged_once() -> None:
    """B18: two texts in turn, or one with another number each time, are no flood."""
    failing = Failing()
    with structlog.testing.capture_logs() as logs:
        for n in range(100):
            failing.failed("read", f"no answer within 0.{n} s", n)
            failing.failed("read", "not connected", n)
        assert len(logs) == 2
        failing.worked("write")
        failing.failed("read", "not connected", 100)
        assert len(logs) == 2
        failing.worked("read")
        failing.failed("read", "not connected", 101)
        assert len(logs) == 3


async def test_an_unreadable_record_is_logged_once_not_at_each_revision(
    config: Config, tmp_path: Path
) -> None:
    """B18: a node of another version writes twice a second; the log says so once, and again after it was readable."""
    server = MemoryServer()
    with structlog.testing.capture_logs() as logs:
        async with running(config, tmp_path, server) as r:

            def told() -> int:
                return sum(e["event"] == "unreadable record" for e in logs)

            for _ in range(20):
                await r.put(CLUSTER_STATE, b"{}")
            await r.until(lambda: told() == 1)
            await r.put(CLUSTER_STATE, encode(LEADS))
            await r.until(lambda: r.shell.status().cluster is not None)
            assert told() == 1
            await r.put(CLUSTER_STATE, b"{}")
            await r.until(lambda: told() == 2)
