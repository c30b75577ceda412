"""A promotion begins the timeline that was reserved for it: real PostgreSQL, real fencer."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from harmony.demo.parts import run_as
from harmony_fencer import protocol
from harmony_fencer.files import Files
from harmony_fencer.programs import PostgresError
from harmony_fencer.timelines import MARK, MOST, TimelineTakenError, begins, give_back, newest, take_up_to
from tests.fencer.node import Node, free_port


def activated(node: Node, term: int, timeline: int) -> protocol.OrderRecord:
    assert isinstance(node.activate(term, 1, 30.0, timeline=timeline), protocol.Accepted)
    return node.outcome(renewing=True)


def timeline(node: Node) -> int:
    with node.connect() as c:
        c.execute("CHECKPOINT")
        found = c.execute("SELECT timeline_id FROM pg_control_checkpoint()").fetchone()
        assert found is not None
        return int(found[0])


def histories(node: Node) -> list[str]:
    return sorted(p.name for p in (node.data / "pg_wal").glob("*.history"))


def test_the_timeline_is_the_reserved_one(node: Node) -> None:
    """I2: also where this node knows of none between; the next promotion goes on from there."""
    node.start()
    record = activated(node, 1, 5)
    assert (record.state, record.timeline) == ("done", 5), node.log()
    assert timeline(node) == 5
    assert node.fence(1, 2).state == "done"
    record = activated(node, 2, 6)
    assert (record.state, record.timeline) == ("done", 6), node.log()


def test_where_it_begins_is_told(node: Node) -> None:
    """O5: right after the promotion, and by a fencer that has started since; it is PostgreSQL's own word."""
    node.start()
    assert activated(node, 1, 5).state == "done"
    with node.connect() as c:
        found = c.execute("SELECT pg_read_file('pg_wal/00000005.history')").fetchone()
    assert found is not None
    high, low = found[0].split()[1].split("/")
    told = node.status()
    assert (told.timeline, told.begins) == (5, int(high, 16) << 32 | int(low, 16))
    assert told.begins > 0
    node.kill_fencer()
    node.start()
    node.wait(lambda: node.status().timeline == 5, "it has looked")
    assert node.status().begins == told.begins


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("1\t0/3000000\tno recovery target specified\n\n2\t1/A0\tbefore 2020\n", (1 << 32) + 0xA0),
        ("# of an archive\n1\t0/1\tx\n", 1),
        ("", 0),
        ("nonsense\n", 0),
        (None, 0),
    ],
)
def test_what_a_history_file_says(tmp_path: Path, content: str | None, expected: int) -> None:
    if content is not None:
        (tmp_path / "00000003.history").write_text(content)
    assert begins(tmp_path, 3) == expected


def test_a_number_that_is_taken_is_refused_and_nothing_is_promoted(node: Node) -> None:
    """I2: the outcome tells the newest here, so that a newer one can be reserved."""
    node.start()
    assert activated(node, 1, 4).state == "done"
    assert node.fence(1, 2).state == "done"
    record = activated(node, 2, 4)
    assert record.state == "failed"
    assert "reserved" in record.detail
    assert node.status().timeline == 4
    node.wait(lambda: node.status().fence_proven, "fenced")
    assert newest(node.data / "pg_wal") == 4


def test_what_a_promotion_that_never_came_has_left_hinders_no_start(node: Node) -> None:
    """I5: PostgreSQL would wait for ever for WAL of the newest timeline that it finds a history of."""
    node.start()
    node.follow(1, 1)
    assert node.fence(1, 2).state == "done"
    for number in (2, 3):
        path = node.data / "pg_wal" / f"{number:08X}.history"
        path.write_text(f"1\t0/1\t{MARK}\n")
    node.follow(1, 3)
    assert histories(node) == []
    assert "gave timelines back" in node.log()


def test_a_standby_streams_across_the_numbers_that_were_left_out(node: Node) -> None:
    """I5: it asks its primary for the history of each timeline from its own on."""
    node.configure(lease_s=60)
    node.start()
    assert activated(node, 1, 2).state == "done"
    with cloned(node) as standby:
        assert node.fence(1, 2).state == "done"
        assert activated(node, 2, 5).state == "done"
        node.wait(lambda: streams(standby, 5), "the standby streams on timeline 5")


@contextlib.contextmanager
def cloned(node: Node) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """A standby of the node, streaming; nothing of Harmony's."""
    copy, port, t = node.top / "copy", free_port(), node.template
    source = f"host=127.0.0.1 port={node.port} user=postgres"
    programs = t.postgres.bin_dir
    clone = [f"{programs}/pg_basebackup", "-D", str(copy), "-d", source, "-X", "stream", "-c", "fast", "-R"]
    options = f"-p {port} -c unix_socket_directories= -c listen_addresses=127.0.0.1"
    copy.mkdir(0o700)
    if t.user is not None:
        shutil.chown(copy, t.user)
    for argv in (
        clone,
        [f"{programs}/pg_ctl", "start", "-w", "-D", str(copy), "-l", str(copy / "log"), "-o", options],
    ):
        run = run_as(t.user, argv, t.postgres.library_dir, 60)
        assert run.returncode == 0, run.stderr
    try:
        with psycopg.connect(
            f"host=127.0.0.1 port={port} user=postgres dbname=postgres", autocommit=True
        ) as c:
            node.wait(lambda: streams(c, 2), "the standby streams")
            yield c
    finally:
        run_as(
            t.user,
            [f"{programs}/pg_ctl", "stop", "-m", "immediate", "-D", str(copy)],
            t.postgres.library_dir,
            60,
        )


def streams(c: psycopg.Connection[tuple[object, ...]], wanted: int) -> bool:
    row = c.execute("SELECT status, received_tli FROM pg_stat_wal_receiver").fetchone()
    return row == ("streaming", wanted)


@pytest.fixture
def pg_wal(tmp_path: Path) -> Path:
    folder = tmp_path / "pg_wal"
    folder.mkdir()
    (folder / "0000000A0000000000000001").touch()
    return folder


async def taken(pg_wal: Path, reserved: int) -> list[str]:
    await Files(None).change(lambda change: take_up_to(change, pg_wal, reserved))
    return sorted(n for n in os.listdir(pg_wal) if n.endswith(".history"))


async def test_the_numbers_between_are_taken_and_given_back(pg_wal: Path) -> None:
    assert await taken(pg_wal, 11) == []
    assert await taken(pg_wal, 13) == ["0000000B.history", "0000000C.history"]
    assert give_back(pg_wal) == ["0000000C.history", "0000000B.history"]
    assert newest(pg_wal) == 10


async def test_only_ours_and_only_the_newest_are_given_back(pg_wal: Path) -> None:
    await taken(pg_wal, 12)
    (pg_wal / "0000000C.history").write_text("10\t0/5000\tno recovery target specified\n")
    assert give_back(pg_wal) == []
    (pg_wal / "00000009.history").write_text(f"8\t0/1\t{MARK}\n")
    (pg_wal / "0000000C.history").unlink()
    assert give_back(pg_wal) == ["0000000B.history"]
    assert (pg_wal / "00000009.history").exists()


@pytest.mark.parametrize("reserved", [9, 10])
async def test_what_is_not_newer_is_taken(pg_wal: Path, reserved: int) -> None:
    with pytest.raises(TimelineTakenError) as e:
        await taken(pg_wal, reserved)
    assert e.value.timeline == 10


async def test_a_gap_that_no_crash_explains_is_refused(pg_wal: Path) -> None:
    with pytest.raises(PostgresError, match="no such gap"):
        await taken(pg_wal, 11 + MOST)
