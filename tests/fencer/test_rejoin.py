"""A node that cannot follow comes back: real pg_rewind and pg_basebackup, and a fencer killed at each step."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harmony.demo.parts import run_as
from harmony_fencer import protocol
from tests import pace
from tests.fencer.node import Template
from tests.fencer.pair import Pair

pytestmark = pytest.mark.real


def test_a_diverged_standby_is_rewound(pair: Pair) -> None:
    """O5: what only the old primary had is gone, its own configuration is kept, nothing is left beside."""
    pair.diverge()
    with (pair.node.data / "pg_hba.conf").open("a") as f:
        f.write("# mine\n")
    record = pair.rejoin()
    assert record.state == "done", (record, pair.node.log())
    assert "rewound to n2" in record.detail
    assert "it streams" in record.detail, pair.logs()
    pair.healthy()
    assert pair.beside == {}
    assert "# mine" in (pair.node.data / "pg_hba.conf").read_text()


def test_a_crashed_primary_recovers_first(pair: Pair) -> None:
    """O5: standby.signal is never taken away for it."""
    pair.diverge(crash=True)
    assert pair.node.cluster_state() == "in production"
    record = pair.rejoin()
    assert record.state == "done", (record, pair.node.log())
    assert "rewound" in record.detail
    pair.healthy()


def test_two_timelines_of_one_number_are_not_mistaken_for_one(pair: Pair) -> None:
    """O5: pg_rewind sees no fork there, and the standby would stream what does not fit."""
    pair.diverge(promote=True)
    record = pair.rejoin()
    assert record.state == "done", (record, pair.node.log())
    assert "have both led on one timeline" in record.detail
    pair.healthy()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("promote", [True, False])
def test_a_source_without_a_checkpoint_on_its_timeline(pair: Pair, promote: bool) -> None:
    """O5: pg_rewind (before 16) takes it for one of the timeline that it left, and PostgreSQL does not start then."""
    pair.diverge(promote=promote, checkpoint=False)
    reply = pair.send()
    assert isinstance(reply, protocol.Accepted), reply

    def judged() -> bool:
        order = pair.node.status().order
        return "a copy is made instead" in pair.node.log() or (order is not None and order.state != "running")

    try:
        pair.node.wait(judged, "it is rewound, or is not to be")
    finally:
        pair.primary.checkpointer(signal.SIGCONT)  # or the copy would wait for it
    record = pair.node.outcome()
    assert record.state == "done", (record, pair.logs())
    of_one = "n2 have both led on one timeline"
    if int(pair.node.template.postgres.version.split(".")[0]) >= 16:
        assert (of_one if promote else "rewound to n2") in record.detail
    elif promote:
        assert (
            "n2 has no checkpoint on its timeline 3 yet, and was taken for one of timeline 2" in record.detail
        )
    else:
        assert of_one in record.detail
    pair.healthy()


def test_a_running_diverged_standby_is_looked_at_before_it_is_stopped(pair: Pair) -> None:
    """An unreachable source costs no reader anything, and is named."""
    pair.diverge()
    pair.node.follow(2, 5)
    system = pair.system()
    pair.primary.stop()
    record = pair.rejoin(system=system)
    assert record.state == "failed"
    assert "the primary n2 cannot be used as a source" in record.detail
    assert pair.node.in_recovery()
    pair.primary.start()
    assert pair.rejoin().state == "done"
    pair.healthy()


def test_without_the_wal_it_is_copied_and_the_old_one_kept(pair: Pair) -> None:
    """O5: re-cloned after a failed rewind, with the old data kept; a second time, only the newest is."""
    pair.diverge()
    for file in (pair.node.data / "pg_wal").glob("0*"):
        if file.is_file():
            file.write_bytes(b"\0" * 100)
    record = pair.rejoin()
    assert record.state == "done", (record, pair.node.log())
    assert "copied anew from n2 (pg_rewind" in record.detail
    pair.healthy()
    (old,) = pair.beside.values()
    assert old.name.startswith("data.harmony-old-")
    assert (old / "PG_VERSION").exists()
    time.sleep(1.1)
    record = pair.rejoin(clone=True)
    assert record.state == "done", record
    assert f"removed {old.name}" in record.detail
    (newer,) = pair.beside.values()
    assert newer != old


def test_another_clusters_primary_is_refused(pair: Pair, template: Template) -> None:
    """Neither rewound to nor copied: by the id in the order, and by what the source says."""
    pair.diverge()
    assert "another cluster's" in pair.rejoin(system="4711").detail
    system = pair.system()
    pair.primary.stop()
    shutil.rmtree(pair.primary.data)
    bin_dir, user = template.postgres.bin_dir, template.user
    pair.primary.data.mkdir(mode=0o700)
    if user is not None:
        shutil.chown(pair.primary.data, user)
    argv = [f"{bin_dir}/initdb", "-D", str(pair.primary.data), "-U", "postgres", "-A", "trust", "--no-sync"]
    run_as(user, argv, template.postgres.library_dir, 60)
    pair.primary.start()
    record = pair.rejoin(system=system)
    assert record.state == "failed"
    assert "different systems" in record.detail
    record = pair.rejoin(system=system, clone=True)
    assert record.state == "failed"
    assert "another cluster" in record.detail
    assert pair.node.status().is_standby
    assert not (pair.node.data.parent / "data.harmony-new").exists()


def test_a_disk_too_small_is_named(pair: Pair) -> None:
    """Before anything is thrown away; with room it goes on."""
    pair.node.configure(rejoin={"keep_free_mb": 100_000_000})
    pair.diverge()
    record = pair.rejoin(clone=True)
    assert record.state == "failed"
    assert "the disk is too small for a copy" in record.detail
    assert (pair.node.data / "PG_VERSION").exists()
    pair.node.kill_fencer()
    pair.node.configure(rejoin={})
    pair.node.start()
    assert pair.rejoin(clone=True).state == "done"
    pair.healthy()


def test_no_copy_where_none_is_wanted(pair: Pair) -> None:
    pair.node.configure(rejoin={"clone": False})
    pair.diverge()
    record = pair.rejoin(clone=True)
    assert "rejoin.clone is false" in record.detail


def test_a_leader_is_not_rejoined(pair: Pair) -> None:
    """I2: it would destroy what only this node has."""
    pair.diverge()
    pair.node.make_writable(2, 3)
    reply = pair.send()
    assert isinstance(reply, protocol.Refusal)
    assert reply.error == "active"
    assert pair.node.writable()


def is_aside(p: Pair) -> bool:
    return (p.node.data / "harmony.rejoin").exists()


def is_copying(p: Pair) -> bool:
    new = p.node.data.parent / "data.harmony-new"
    return (new / "PG_VERSION").exists()


def runs(program: str) -> Callable[[Pair], bool]:
    def found(p: Pair) -> bool:
        return any(
            program.encode() in (line := _command(pid)) and os.fsencode(str(p.node.data)) in line
            for pid in os.listdir("/proc")
            if pid.isdigit()
        )

    return found


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def is_rewound(p: Pair) -> bool:
    return (p.node.data.parent / "data.harmony-rewind" / "harmony.whole").exists()


def is_put_in_place(p: Pair) -> bool:
    return (p.node.data / "harmony.whole").exists()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("clone", "moment"),
    [
        (False, runs("pg_rewind")),
        (False, is_aside),
        (False, is_rewound),
        (False, is_put_in_place),
        (True, runs("pg_basebackup")),
        (True, is_copying),
        (True, is_put_in_place),
    ],
    ids=[
        "rewind-runs",
        "stub-in-place",
        "rewound",
        "back-in-place",
        "copy-runs",
        "copying",
        "copy-in-place",
    ],
)
def test_a_fencer_killed_at_any_step_is_taken_up(
    pair: Pair, clone: bool, moment: Callable[[Pair], bool]
) -> None:
    """C2: whatever it left can be started as nothing but a standby, and the next order ends the work."""
    pair.diverge()
    node = pair.node
    assert isinstance(pair.send(clone=clone), protocol.Accepted)
    until = time.monotonic() + pace.wait_s(20)
    while not moment(pair):
        order = node.status().order
        assert order is not None
        if order.state != "running":
            break  # it was too fast for us: killed at its end, then
        assert time.monotonic() < until
    node.kill_fencer(signal.SIGKILL)
    node.start()
    status = node.status()
    assert status.is_standby
    assert status.unfinished == (node.data / "harmony.rejoin").exists()
    if status.unfinished:
        assert "interrupted" in status.progress
        node.hand()
        time.sleep(0.5)
        assert not node.writable()
        node.tidy()
        reply = node.ask(protocol.Follow(generation=protocol.Generation(2, 9999), primary="n2"))
        assert isinstance(reply, protocol.Accepted)
        pair.order = 10_000
        record = node.outcome()
        assert record.state == "failed"
        assert "only a rejoin" in record.detail
    record = pair.rejoin(clone=clone)
    assert record.state == "done", (record, node.log())
    pair.healthy()
    assert set(pair.beside) <= {"harmony-old-"}


def stopped(pair: Pair, program: str) -> int:
    """The program at work on n1's directories, stopped (SIGSTOP)."""
    found: list[int] = []

    def look() -> bool:
        for pid in filter(str.isdigit, os.listdir("/proc")):
            line = _command(pid)
            if (
                program.encode() in line
                and os.fsencode(str(pair.node.data)) in line
                and not set(line.split(b"\0")) & {b"setpriv", b"--dry-run"}
            ):
                os.kill(int(pid), signal.SIGSTOP)
                found.append(int(pid))
                return True
        return False

    pair.node.wait(look, f"{program} runs")
    return found[0]


def test_what_somebody_has_started_meanwhile_is_not_taken_away_from_below(pair: Pair) -> None:
    """I1: in a directory that was moved away nobody would see it become a primary. What was copied is not lost."""
    pair.diverge()
    node = pair.node
    assert isinstance(pair.send(clone=True), protocol.Accepted)
    copying = stopped(pair, "pg_basebackup")
    before = node.data.stat().st_ino
    node.hand()
    node.wait(lambda: node.in_recovery() is not None, "somebody has started it")
    os.kill(copying, signal.SIGCONT)
    record = node.outcome()
    assert record.state == "failed", record
    assert "somebody has started PostgreSQL" in record.detail
    assert node.data.stat().st_ino == before
    record = pair.rejoin(clone=True)
    assert record.state == "done", record
    pair.healthy()


def test_a_stray_primary_is_fenced_while_a_copy_is_made(pair: Pair) -> None:
    """I1: a copy takes hours."""
    pair.diverge()
    node = pair.node
    assert isinstance(pair.send(clone=True), protocol.Accepted)
    copying = stopped(pair, "pg_basebackup")
    try:
        node.hand()
        node.wait(lambda: node.in_recovery() is not None, "somebody has started it")
        node.promote_by_hand()
        node.wait(lambda: not node.pids(), "it is fenced", 5)
        assert node.status().is_standby
    finally:
        with contextlib.suppress(ProcessLookupError):  # the fence has ended it, too
            os.kill(copying, signal.SIGCONT)
    node.tidy()
    record = pair.rejoin(clone=True)
    assert record.state == "done", record.detail + pair.logs()
    pair.healthy()


def test_a_fencer_killed_between_the_end_of_a_rewind_and_its_mark(pair: Pair) -> None:
    """C2: pg_rewind outlives it, and ends. Told apart from half a rewind by nothing, it is copied: dear, and right."""
    pair.diverge()
    assert isinstance(pair.send(), protocol.Accepted)
    rewinding = stopped(pair, "pg_rewind")
    pair.node.kill_fencer(signal.SIGKILL)
    os.kill(rewinding, signal.SIGCONT)
    pair.node.wait(lambda: not runs("pg_rewind")(pair), "pg_rewind has ended")
    assert not is_rewound(pair)
    pair.node.start()
    assert pair.node.status().unfinished
    record = pair.rejoin()
    assert record.state == "done", record.detail + pair.logs()
    assert "copied anew" in record.detail
    pair.healthy()


def test_the_old_one_is_kept_until_the_new_one_streams(pair: Pair) -> None:
    """O5: whatever the limits say."""
    pair.node.configure(rejoin={"keep_old": 0})
    pair.node.set_postgres(primary_slot_name="missing")
    pair.diverge()
    record = pair.rejoin(clone=True)
    assert "it does not stream" in record.detail, (record, pair.logs())
    (old,) = pair.beside.values()
    assert (old / "global" / "pg_control").exists()
    pair.primary.run("SELECT pg_create_physical_replication_slot('missing')")
    pair.follow()
    pair.healthy()
    assert old.exists()
    pair.node.fence(2, 900)
    pair.order = 900
    assert f"removed {old.name}" in pair.rejoin().detail
    pair.healthy()
    assert pair.beside == {}
