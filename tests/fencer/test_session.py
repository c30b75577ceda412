"""The agent's sessions against what a file, a database or a role sets, and against whatever a database returns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio

from harmony import session
from harmony.agent.keeper import Keeper
from harmony.agent.probe import Probe, Target
from harmony.agent.slots import Wanted
from harmony.core.messages import DbSeen
from tests.fencer.conftest import made_template
from tests.fencer.node import Node, Template, boot_ns

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    """Databases of another encoding are made from template0 alone."""
    with made_template(whole=True) as made:
        yield made


FILE = {
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
    "default_transaction_read_only": "on",
    "statement_timeout": "1",
    "lock_timeout": "1",
    "search_path": "evil, pg_catalog",
    "DateStyle": "SQL, DMY",
    "quote_all_identifiers": "on",
    "client_encoding": "LATIN1",
    "idle_in_transaction_session_timeout": "1",
    "bytea_output": "escape",
    "transform_null_equals": "on",
}
EVIL = (
    "CREATE SCHEMA evil",
    "CREATE FUNCTION evil.pg_is_in_recovery() RETURNS bool LANGUAGE sql AS 'SELECT NOT pg_catalog.pg_is_in_recovery()'",
    "CREATE FUNCTION evil.current_setting(text) RETURNS text LANGUAGE sql AS 'SELECT NULL::text'",
    "GRANT USAGE ON SCHEMA evil TO PUBLIC",
    "CREATE ROLE harmony LOGIN IN ROLE pg_monitor",
    "CREATE ROLE nobody_much",
    "GRANT nobody_much TO harmony",
    "ALTER ROLE harmony SET role = 'nobody_much'",
    "ALTER ROLE harmony SET search_path = 'evil, pg_catalog'",
    "ALTER ROLE harmony SET default_transaction_isolation = 'serializable'",
    "ALTER ROLE harmony SET statement_timeout = 1",
    "ALTER DATABASE postgres SET default_transaction_read_only = on",
    "CREATE DATABASE bytes ENCODING 'SQL_ASCII' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'",
    "ALTER DATABASE bytes SET default_transaction_isolation = 'serializable'",
)


def ask(node: Node, dbname: str) -> DbSeen:
    probe = Probe(Target(str(node.top / "s"), node.port, "harmony", dbname))
    try:
        seen = trio.run(probe.ask, boot_ns(), 30.0)
        assert isinstance(seen, DbSeen), seen
        assert probe.vitals is not None
        assert probe.vitals.checkpointer_born  # as a member of pg_monitor, not as what `role` says
        again = trio.run(probe.ask, boot_ns(), 30.0)  # the same session: no timeout has ended it
        assert isinstance(again, DbSeen), again
        return seen
    finally:
        probe.close()


def test_the_agents_sessions_bring_their_settings_with_them(node: Node) -> None:
    """F5: serializable by file, role or database made every query on a hot standby fail; so could each of these."""
    node.start()
    node.make_writable()
    with node.connect() as c:
        for statement in EVIL:
            c.execute(statement.encode())
    system = node.control("Database system identifier")
    node.fence(1, 2, clean=True)
    node.set_postgres(**FILE)
    node.follow(1, 3)
    for dbname in ("postgres", "bytes"):
        seen = ask(node, dbname)
        assert (seen.db, seen.system_identifier, seen.held) == ("standby", system, False)
    with session.connect(
        host="127.0.0.1", port=node.port, user="postgres", dbname="postgres", application_name="test"
    ) as link:
        link.execute("SELECT pg_wal_replay_pause()")
        node.wait(lambda: ask(node, "postgres").held, "a replay that is held up is seen (F10)", 30)
        link.execute("SELECT pg_wal_replay_resume()")
    wanted = Wanted(node="n1", members=("n1", "n2"), slots=True, permanent={}, synchronous=False)
    found = trio.run(Keeper(Target(str(node.top / "s"), node.port, "harmony", "bytes"), wanted).survey, None)
    assert found is not None
    assert found.limits["max_connections"] > 0
    node.make_writable(1, 4)
    probe = Probe(Target(str(node.top / "s"), node.port, "harmony", "postgres"))
    try:
        assert probe.write() == ""
        assert trio.run(probe.nudge, 30.0) == ""
    finally:
        assert probe._writer is not None
        probe._writer.close()
    assert ask(node, "bytes").db == "primary"


def test_what_a_database_returns_is_survived(node: Node) -> None:
    """F5: bytes that are no UTF-8, in a database without an encoding, as text and in JSON."""
    node.start()
    node.make_writable()
    with node.connect() as c:
        c.execute("CREATE DATABASE bytes ENCODING 'SQL_ASCII' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
        c.execute("ALTER ROLE postgres SET idle_session_timeout = '60s'")  # that version 13 does not know
    with session.connect(
        host="127.0.0.1", port=node.port, user="postgres", dbname="bytes", application_name="test"
    ) as link:
        row = link.execute(
            "SELECT e'\\xff\\xfe'::text, json_build_array(e'\\xff'), e'a'::\"char\", ARRAY[e'\\xff'::name], %s::text",
            ("ü",),
        ).fetchone()
        assert link.execute("SHOW idle_session_timeout").fetchone() == ("0",)
    assert row == ("��", ["�"], "a", ["�"], "ü")
