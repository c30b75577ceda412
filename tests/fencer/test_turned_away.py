"""A primary that does not let a standby in: named with what to do, nothing thrown away, and back when it is mended."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.fencer.pair import Pair

pytestmark = [pytest.mark.real, pytest.mark.sampled(0.5)]
GRANTS = (
    "GRANT EXECUTE ON FUNCTION pg_ls_dir(text, boolean, boolean), pg_stat_file(text, boolean), "
    "pg_read_binary_file(text), pg_read_binary_file(text, bigint, bigint, boolean) TO repl"
)


class Guarded:
    """n2 asks for repl's password; n1 has `password` in its passfile."""

    def __init__(self, pair: Pair, password: str, role: str, *, grants: bool = True) -> None:
        self.pair, self.passfile = pair, pair.node.top / "passfile"
        self.give(password)
        pair.node.configure(replication_user="repl", replication_passfile=str(self.passfile))
        pair.diverge()
        pair.primary.run(f"CREATE ROLE repl {role} PASSWORD 'right'")
        if grants:
            pair.primary.run(GRANTS)
        hba = pair.primary.data / "pg_hba.conf"
        rules = "host all repl 127.0.0.1/32 scram-sha-256\nhost replication repl 127.0.0.1/32 scram-sha-256\n"
        hba.write_text(rules + hba.read_text())
        pair.primary.run("SELECT pg_reload_conf()")

    def give(self, password: str) -> None:
        self.passfile.write_text(f"*:*:*:repl:{password}\n")
        self.passfile.chmod(0o600)
        if self.pair.node.template.user is not None:
            shutil.chown(self.passfile, self.pair.node.template.user)


def untouched(pair: Pair) -> bool:
    return (
        pair.beside == {} and (pair.node.data / "PG_VERSION").exists() and not pair.node.status().unfinished
    )


@pytest.mark.parametrize("runs", [False, True], ids=["down", "running"])
def test_a_wrong_password(pair: Pair, runs: bool) -> None:
    guarded = Guarded(pair, "wrong", "LOGIN REPLICATION")
    if runs:
        pair.follow()
    for clone in (False, True) if runs else (False,):
        record = pair.rejoin(clone=clone)
        assert record.state == "failed", record
        assert "password authentication failed" in record.detail
        assert "correct replication.passfile" in record.detail
    assert pair.node.in_recovery() is (True if runs else None), "who reads here goes on reading"
    assert untouched(pair)
    guarded.give("right")
    # What runs is turned away by its log, until it has asked again (wal_retrieve_retry_interval).
    pair.node.wait(lambda: pair.rejoin().state == "done", "it is let in")
    pair.healthy()


def test_a_role_without_the_replication_right(pair: Pair) -> None:
    """It may rewind, and then not stream: said so; a copy is not even tried."""
    Guarded(pair, "right", "LOGIN")
    record = pair.rejoin()
    assert "it does not stream" in record.detail, (record, pair.logs())
    assert "ALTER ROLE ... REPLICATION" in record.detail
    before = Path(pair.node.data).stat().st_ino
    record = pair.rejoin(clone=True)
    assert record.state == "failed"
    assert "a copy would not either" in record.detail
    assert "ALTER ROLE ... REPLICATION" in record.detail
    assert Path(pair.node.data).stat().st_ino == before
    pair.primary.run("ALTER ROLE repl REPLICATION")
    pair.follow()
    pair.healthy()


def test_a_role_that_may_not_rewind_copies(pair: Pair) -> None:
    Guarded(pair, "right", "LOGIN REPLICATION", grants=False)
    record = pair.rejoin()
    assert record.state == "done", record
    assert "copied anew" in record.detail
    assert 'GRANT EXECUTE to "repl"' in record.detail
    pair.healthy()


def test_a_missing_slot(pair: Pair) -> None:
    """No copy helps, and none is made, however often it is asked for."""
    pair.node.set_postgres(primary_slot_name="missing")
    pair.diverge()
    record = pair.rejoin()
    assert "it does not stream" in record.detail, (record, pair.logs())
    assert 'replication slot "missing" does not exist' in record.detail
    assert "create the slot on the primary" in record.detail
    before = pair.node.data.stat().st_ino
    for _ in range(2):
        record = pair.rejoin(clone=True)
        assert record.state == "failed"
        assert "create the slot on the primary" in record.detail
    assert pair.node.data.stat().st_ino == before
    pair.primary.run("SELECT pg_create_physical_replication_slot('missing')")
    pair.follow()
    pair.healthy()


def test_a_wrong_setting_is_no_reason_for_a_copy(pair: Pair) -> None:
    """Nor is anything else that keeps PostgreSQL from starting and is not its data's fault."""
    pair.diverge(crash=True)
    with (pair.node.data / "postgresql.conf").open("a") as f:
        f.write("shared_preload_libraries = ''\nno_such_setting = 1\n")
    record = pair.rejoin()
    assert record.state == "failed", record
    assert "configuration" in record.detail
    assert not (pair.node.data.parent / "data.harmony-new").exists()
    text = (pair.node.data / "postgresql.conf").read_text()
    (pair.node.data / "postgresql.conf").write_text(text.replace("no_such_setting = 1", ""))
    record = pair.rejoin()
    assert record.state == "done", record
    assert "rewound" in record.detail
    pair.healthy()


def test_whether_pg_rewind_could_help_is_told_at_start(pair: Pair) -> None:
    """From the control file: before PostgreSQL has ever run under Harmony, it says what a rejoin would mean."""
    node = pair.node
    conf = node.data / "postgresql.conf"
    conf.write_text(conf.read_text().replace("wal_log_hints = 'on'", ""))
    node.start()
    node.wait(lambda: "wal_log_hints is off" in node.status().cannot_rewind, "it is told")
    assert "a copy will be made" in node.status().cannot_rewind
    assert "wal_log_hints is off" in node.log()
    node.make_writable()
    node.wait(lambda: node.status().cannot_rewind == "", "it is told that pg_rewind could help from now on")
