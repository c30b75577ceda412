"""Field reports (public trouble of other systems) of a node's way back, each tried on real programs."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from harmony_fencer import protocol
from harmony_fencer.reasons import of_the_data
from tests.fencer.pair import Pair

pytestmark = [pytest.mark.real, pytest.mark.sampled(0.5, group="reports from the field")]
TIMES = {  # what keeps PostgreSQL from starting here, and would after any copy; what status has to say
    "restore_command": ("restore_command = 'nowhere %f %p'\n", "could not restore file"),
    "library": ("shared_preload_libraries = 'not_installed'\n", "could not access file"),
    "collector": ("logging_collector = on\nmax_connections = 20\n", "insufficient parameter settings"),
    "other-language": (
        "logging_collector = on\nlog_destination = 'csvlog'\nmax_connections = 20\n",
        "insufficient",
    ),
    "unknown": ("nonsense = 1\n", "configuration file"),
}


def copies(pair: Pair) -> int:
    return (pair.node.top / "fencer.log").read_text().count('"what":"' + str(pair.node.data) + ".harmony-new")


def test_no_copy_for_what_no_copy_can_mend(pair: Pair) -> None:
    """F7: each was copied four times in 85 s, then for ever; with the log collector status gave no reason."""
    pair.node.set_postgres(hot_standby="on")
    pair.diverge(crash=True)
    system = pair.system()
    before = (pair.node.data / "postgresql.conf").read_text()
    for line, said in TIMES.values():
        (pair.node.data / "postgresql.conf").write_text(before + line)
        for _ in range(2):
            record = pair.rejoin(system=system)
            assert record.state == "failed", record
            assert said in record.detail, (record.detail, pair.logs())
        assert not pair.node.pids()
    (pair.node.data / "postgresql.conf").write_text(before)
    (pair.node.data / "recovery.conf").write_text("standby_mode = on\n")
    assert '"recovery.conf" is not supported' in pair.rejoin(system=system).detail
    (pair.node.data / "recovery.conf").unlink()
    assert copies(pair) == 0
    assert pair.beside == {}
    assert pair.rejoin(system=system).state == "done", pair.logs()
    pair.healthy()


def test_what_its_data_keeps_from_starting_is_copied(pair: Pair) -> None:
    """F7: that is what a copy is for; also where pg_rewind finds nothing to do, and more than once."""
    pair.diverge()
    assert "rewound to n2" in pair.rejoin().detail
    pair.healthy()
    for order in (100, 200):
        pair.node.fence(2, order, clean=True)
        pair.order = order
        (pair.node.data / "pg_replslot").rmdir()  # most else recovery makes anew, or pg_rewind brings
        record = pair.rejoin()
        assert record.state == "done", (record, pair.logs())
        assert "copied anew from n2" in record.detail
        assert "pg_replslot" in record.detail
        pair.healthy()


def test_a_copy_that_ended_with_the_same_failure_was_the_last(pair: Pair) -> None:
    """F7: until a configuration file has changed; the next standby streams, and all is forgotten."""
    pair.node.set_postgres(primary_slot_name="missing")
    pair.diverge()
    assert "it does not stream" in pair.rejoin(clone=True).detail
    before = pair.node.data.stat().st_ino
    record = pair.rejoin(clone=True)
    assert record.state == "failed"
    assert "missing" in record.detail  # its log says why: it is turned away
    pair.node.fence(2, 500)
    pair.order = 500
    record = pair.rejoin(clone=True)
    assert record.detail.startswith("ALARM: a copy from n2 ended so: it does not stream"), record
    assert pair.node.data.stat().st_ino == before
    (pair.node.data / "postgresql.conf").touch()
    pair.primary.run("SELECT pg_create_physical_replication_slot('missing')")
    record = pair.rejoin(clone=True)
    assert "it streams" in record.detail, (record.detail, pair.logs())
    pair.healthy()


@pytest.mark.parametrize(
    ("said", "copy"),
    [
        ("PANIC:  could not locate a valid checkpoint record", True),
        ('FATAL:  could not open file "pg_xact/0000": No such file or directory', True),
        ('FATAL:  could not open directory "pg_tblspc/1/PG_15": No such file', True),
        ('FATAL:  could not open file "base/5/112": Permission denied', False),
        ('FATAL:  could not restore file "00000002.history" from archive: command not found', False),
        ('FATAL:  could not access file "pg_nowhere": No such file or directory', False),
        ("FATAL:  requested timeline 3 is not a child of this server's history", True),
        ("FATAL:  recovery aborted because of insufficient parameter settings", False),
        ('PANIC:  could not write to file "pg_wal/xlogtemp.1": No space left on device', False),
        ("FATAL:  something that nobody has seen before", False),
        ("", False),
    ],
)
def test_a_copy_is_for_what_is_recognised_as_the_datas_fault(said: str, copy: bool) -> None:
    """F7: a list of what is not decided it, and what it did not know was copied."""
    assert of_the_data(said) is copy


def own(pair: Pair, etc: Path) -> None:
    """pg_hba.conf and a folder of include_dir are symlinks to `etc`; a folder and a keytab are the node's own."""
    data, user = pair.node.data, pair.node.template.user
    (etc / "more.d").mkdir(parents=True)
    (etc / "more.d" / "a.conf").write_text("work_mem = '5MB'\n")
    shutil.copy(data / "pg_hba.conf", etc / "pg_hba.conf")
    (data / "pg_hba.conf").unlink()
    (data / "pg_hba.conf").symlink_to(etc / "pg_hba.conf")
    (data / "more.d").symlink_to(etc / "more.d")
    (data / "conf.d").mkdir()
    (data / "conf.d" / "own.conf").write_text("maintenance_work_mem = '7MB'\n")
    (data / "krb5.keytab").write_bytes(b"n1's")
    (data / "krb5.keytab").chmod(0o640)
    with (data / "postgresql.conf").open("a") as f:
        f.write("include_dir 'more.d'\ninclude_dir 'conf.d'\n")
    if user is not None:
        for path in (data / "conf.d", data / "conf.d" / "own.conf", data / "krb5.keytab"):
            shutil.chown(path, user)
        for path in (etc.parent, etc, etc / "more.d"):
            path.chmod(0o755)
        for path in (etc / "pg_hba.conf", etc / "more.d" / "a.conf"):
            path.chmod(0o644)


def is_own(pair: Pair, etc: Path) -> None:
    data = pair.node.data
    assert (data / "pg_hba.conf").readlink() == etc / "pg_hba.conf"
    assert (data / "more.d").readlink() == etc / "more.d"
    assert (data / "krb5.keytab").read_bytes() == b"n1's"
    assert (data / "krb5.keytab").stat().st_mode & 0o777 == 0o640
    with pair.node.connect() as c:
        row = c.execute(
            "SELECT current_setting('work_mem'), current_setting('maintenance_work_mem')"
        ).fetchone()
    assert row == ("5MB", "7MB")


def test_the_nodes_own_is_kept_with_its_kind_over_a_rewind_and_a_copy(pair: Pair) -> None:
    """F9: the symlink to pg_hba.conf was lost, and the copy could not start. F13: so was the lost primary's log; and
    pg_rewind died half way at root's postgresql.conf."""
    pair.diverge()
    etc = pair.node.top / "etc" / "n1"
    own(pair, etc)
    log = pair.node.data / "harmony-postgres.log"
    with log.open("a") as f:
        f.write("EVIDENCE\n")
    (pair.node.data / "log").mkdir()
    (pair.node.data / "log" / "a.log").write_text("n1's evidence")
    (pair.primary.data / "log").write_text("n2's")  # its log is called so
    (pair.primary.data / "harmony-postgres.log").write_text("of the other node")
    if pair.node.template.user is not None:
        shutil.chown(pair.node.data / "log", pair.node.template.user)
        shutil.chown(pair.node.data / "log" / "a.log", pair.node.template.user)
        shutil.chown(pair.node.data / "postgresql.conf", "root")
        (pair.node.data / "postgresql.conf").chmod(0o644)
    record = pair.rejoin()
    assert "rewound to n2" in record.detail, (record, pair.logs())
    for clone in (False, True):
        if clone:
            record = pair.rejoin(clone=True)
            assert "copied anew" in record.detail, (record, pair.logs())
        pair.healthy()
        is_own(pair, etc)
        assert "EVIDENCE" in log.read_text()
        assert "of the other node" not in log.read_text()
        assert (pair.node.data / "log" / "a.log").read_text() == "n1's evidence"


def test_what_pg_rewind_could_not_write_is_looked_for_before(pair: Pair) -> None:
    """F13: it died half way, and then a copy was made."""
    if pair.node.template.user is None:
        pytest.skip("only root can give a file away")
    pair.diverge()
    foreign = next(p for p in (pair.node.data / "base").rglob("*") if p.is_file())
    os.chown(foreign, 0, 0)
    pair.follow()
    record = pair.rejoin()
    assert record.state == "failed"
    assert f"{foreign} does not belong to PostgreSQL's user" in record.detail
    assert pair.node.in_recovery(), "nothing is stopped for that"
    os.chown(foreign, (foreign.parent.stat()).st_uid, -1)
    (pair.node.data / "conf.d").mkdir()  # root's: what is in it could be neither replaced nor moved
    assert "/conf.d does not belong" in pair.rejoin().detail
    assert pair.node.in_recovery()
    assert copies(pair) == 0


def test_nothing_is_stopped_before_the_source_was_reached(pair: Pair) -> None:
    """F13: a name that does not resolve had the standby stopped and started at each try."""
    members = {
        "n1": {"host": "127.0.0.1", "port": pair.node.port},
        "n2": {"host": "no.such.host.invalid", "port": pair.primary.port},
    }
    pair.node.configure(members=members)
    pair.diverge()
    pair.node.follow(2, 5)
    starts = pair.node.status().postgres_starts
    for clone in (False, True):
        record = pair.rejoin(clone=clone)
        assert record.state == "failed"
        assert "the primary n2 cannot be used as a source" in record.detail, record
        assert pair.node.in_recovery()
    assert pair.node.status().postgres_starts == starts


def test_what_a_copy_that_was_cut_short_left_in_tablespaces_is_removed(pair: Pair) -> None:
    """F11: "directory exists but is not empty", for ever. What is not ours is never deleted."""
    bin_dir, place = pair.node.top / "bin", pair.node.top / "space"
    real = Path(pair.node.template.postgres.bin_dir)
    bin_dir.mkdir()
    for program in real.iterdir():
        (bin_dir / program.name).symlink_to(program)
    foreign = pair.node.top / "foreign"
    for folder in (place, foreign / "PG_15_1"):
        folder.mkdir(parents=True)
    (foreign / "PG_15_1" / "theirs").write_text("x")
    # Both on one host: the source's places would be in use. So the programs are told apart from outside.
    for name, text in {
        "psql": f"echo {place}; echo {foreign}",
        "pg_basebackup": f"""
if [ ! -e {place}/was ]; then mkdir -p {place}/PG_15_2; echo x > {place}/PG_15_2/half; touch {place}/was; kill -9 $$; fi
if [ -e {place}/PG_15_2 ]; then echo 'directory "{place}" exists but is not empty' >&2; exit 1; fi
exec {real}/pg_basebackup "$@" """,
    }.items():
        (bin_dir / name).unlink(missing_ok=True)
        (bin_dir / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin_dir / name).chmod(0o755)
    if pair.node.template.user is not None:
        shutil.chown(place, pair.node.template.user)
    pair.node.configure(bin_dir=str(bin_dir))
    pair.diverge()
    assert pair.rejoin(clone=True).state == "failed"
    assert (place / "PG_15_2" / "half").exists()
    record = pair.rejoin(clone=True)
    assert record.state == "done", record
    assert not (place / "PG_15_2").exists()
    assert (place / "was").exists()
    assert (foreign / "PG_15_1" / "theirs").exists()
    pair.healthy()


def test_a_mount_point_is_told_on_the_first_day_and_before_anything_is_stopped(pair: Pair) -> None:
    """F12: it cannot be renamed, and was said in the hour of need, after PostgreSQL was stopped."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    pair.diverge()
    pair.node.kill_fencer()
    data = str(pair.node.data)
    subprocess.run(["mount", "--bind", data, data], check=True)
    try:
        pair.node.start()
        pair.node.wait(lambda: "is a mount point" in pair.node.status().cannot_rewind, "it is told", 30)
        pair.node.follow(2, 5)
        for clone in (False, True):
            assert "is a mount point" in pair.rejoin(clone=clone).detail
            assert pair.node.in_recovery()
        pair.node.fence(2, 100)
    finally:
        subprocess.run(["umount", "-l", data], check=True)


def test_places_that_a_copy_would_not_keep_are_refused(pair: Pair) -> None:
    """docs/rejoin.md: tablespaces and a pg_wal elsewhere are copied by hand; a rewind helps all the same."""
    pair.diverge()
    data, user = pair.node.data, pair.node.template.user
    link = data / "pg_tblspc" / "4711"
    link.symlink_to(pair.node.top)
    assert "has tablespaces" in pair.rejoin(clone=True).detail
    link.unlink()
    shutil.move(data / "pg_wal", pair.node.top / "wal")
    (data / "pg_wal").symlink_to(pair.node.top / "wal")
    if user is not None:
        os.lchown(data / "pg_wal", (data / "base").stat().st_uid, (data / "base").stat().st_gid)
        pair.node.top.chmod(0o755)
    assert "is a symlink: a place that the old directory keeps" in pair.rejoin(clone=True).detail
    assert pair.beside == {}
    record = pair.rejoin()
    assert "rewound to n2" in record.detail, (record, pair.logs())
    assert (data / "pg_wal").is_symlink()
    pair.healthy()


def test_an_archive_helps_a_rewind(pair: Pair) -> None:
    """docs/rejoin.md: with the WAL archive where there is a restore_command; also when it is first asked whether."""
    pair.diverge()
    archive = pair.node.top / "archive"
    archive.mkdir(mode=0o755)
    for file in [*(pair.node.data / "pg_wal").glob("0*")]:
        if len(file.name) == 24:
            shutil.move(file, archive / file.name)
            (archive / file.name).chmod(0o644)
    pair.node.set_postgres(restore_command=f"cp {archive}/%f %p")
    record = pair.rejoin()
    assert "rewound to n2" in record.detail, (record, pair.logs())
    assert copies(pair) == 0
    pair.healthy()


def test_of_old_directories_no_more_is_kept_than_allowed(pair: Pair) -> None:
    """docs/rejoin.md: keep_old_mb counts over all that are kept, and the newest goes, too, where it alone is more."""
    pair.node.configure(rejoin={"keep_old": 5, "keep_old_mb": 1})
    pair.diverge()
    record = pair.rejoin(clone=True)
    assert "removed data.harmony-old-" in record.detail, record
    assert pair.beside == {}
    pair.node.kill_fencer()
    pair.node.configure(rejoin={"keep_old": 5, "keep_old_mb": 1000})
    pair.node.start()
    for _ in range(2):
        time.sleep(1.1)  # their names have seconds
        assert "removed" not in pair.rejoin(clone=True).detail
    assert len([*pair.node.data.parent.glob("data.harmony-old-*")]) == 2
    status = pair.node.status()
    assert isinstance(status, protocol.Status)
    pair.healthy()
