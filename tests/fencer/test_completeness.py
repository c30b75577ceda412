"""A fence is complete (I6) and lasts (I1), however PostgreSQL was found: real processes, nothing faked.

Each case runs twice where PostgreSQL may be held in two ways: in a cgroup of its own, and by its process
tree. A second data directory of the same user lives and writes all the time: it is never touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import trio

from harmony.demo.cluster import memory_folder
from harmony_fencer import cgroup, processes, protocol
from harmony_fencer.config import load
from harmony_fencer.postgres import Postgres
from harmony_fencer.protocol import Generation
from tests import pace
from tests.fencer.node import FENCE_S, LEASE_S, PAUSE_S, Node, Template, Writer, boot_ns

pytestmark = [pytest.mark.real, pytest.mark.sampled(0.5)]

FREEZER = Path("/sys/fs/cgroup/freezer")  # v1: what it freezes not even SIGKILL ends


# ---------------------------------------------------------------- what is there


@pytest.fixture(scope="module")
def neighbour(template: Template) -> Iterator[tuple[Node, Writer]]:
    """Another data directory of the same user, started by hand; somebody writes to it all the time."""
    top = Path(tempfile.mkdtemp(prefix="hf-", dir=memory_folder()))
    top.chmod(0o755)
    other = Node(top, template)
    other.set_postgres(autovacuum="off")  # its workers end by themselves
    try:
        other.hand()
        other.wait(other.writable, "the neighbour runs")
        with other.writing(pause_s=0.02) as writer:
            yield other, writer
    finally:
        other.destroy()
        shutil.rmtree(top)


@pytest.fixture(params=["cgroup", "tree"])
def node(
    template: Template, neighbour: tuple[Node, Writer], request: pytest.FixtureRequest
) -> Iterator[Node]:
    """Held by a cgroup of its own, or by the process tree. The neighbour must have noticed nothing."""
    top = Path(tempfile.mkdtemp(prefix="hf-", dir=memory_folder()))
    top.chmod(0o755)
    made = Node(top, template)
    made.configure(cgroup=request.param == "cgroup")
    other, writer = neighbour
    before, begun_ns = other.pids(), boot_ns()
    try:
        yield made
        until_ns = boot_ns()
        other.wait(lambda: writer.last_ns > until_ns, "the neighbour writes on", 2)
        assert set(before) <= set(other.pids()), "a process of another data directory was killed"
        assert writer.longest_gap_s(begun_ns, boot_ns()) < 1.0 + pace.SLACK_S, (
            "another data directory was halted"
        )
    finally:
        made.destroy()
        shutil.rmtree(top)


by_hand = pytest.mark.parametrize("node", ["cgroup"], indirect=True)  # is outside of our cgroup anyway


def proven(node: Node, record: protocol.OrderRecord, *, within_s: float = FENCE_S) -> None:
    """I6: done within its budget, nobody left, and it lasts."""
    assert record.state == "done", (record, node.log())
    assert record.took_ms <= within_s * 1000 + pace.SLACK_MS, record
    assert not node.pids(), [processes.describe(p) for p in node.pids()]
    node.wait(lambda: node.status().fence_proven, "proven", 1)
    assert (node.data / "standby.signal").exists()


@contextlib.contextmanager
def session(node: Node, *statements: str) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """A client whose last statement is still running when the block begins; its end does not matter."""
    c = node.connect()
    for statement in statements[:-1]:
        c.execute(statement)  # type: ignore[arg-type]

    def last() -> None:
        with contextlib.suppress(psycopg.Error):
            c.execute(statements[-1])  # type: ignore[arg-type]

    thread = threading.Thread(target=last, daemon=True)
    thread.start()
    try:
        yield c
    finally:
        with contextlib.suppress(psycopg.Error, OSError, ValueError):
            with socket.fromfd(c.fileno(), socket.AF_INET, socket.SOCK_STREAM) as s:
                s.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        c.close()


def active(node: Node, like: str) -> int:
    """How many backends are at it."""
    with node.connect() as c:
        row = c.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND pid <> pg_backend_pid() "
            "AND (query LIKE %s OR backend_type = %s)",
            (like, like),
        ).fetchone()
    assert row is not None
    return int(str(row[0]))


def helpers(*words: str) -> list[int]:
    """Live processes with exactly these arguments."""
    wanted, found = b"\0".join(w.encode() for w in words) + b"\0", []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{name}/cmdline").read_bytes() == wanted:
                    found.append(int(name))
    return found


# ---------------------------------------------------------------- what stands in a fence's way


def test_orphaned_backends_that_go_on_writing(node: Node) -> None:
    """I6: the postmaster is SIGKILLed; backends in the middle of something do not notice, and write on."""
    node.start()
    node.make_writable()
    assert node.writable()
    busy = "DO $$ BEGIN LOOP INSERT INTO {} VALUES (1); COMMIT; END LOOP; END $$"
    with node.connect() as c:
        c.execute("CREATE TABLE u (x int)")  # on one table they would wait for each other, and notice
    with session(node, busy.format("t")), session(node, busy.format("u")), node.writing() as writer:
        node.wait(lambda: active(node, "DO%") == 2, "both are busy")
        node.send(node.postmaster(), signal.SIGKILL)
        time.sleep(0.1)
        node.renew(1, 1)
        assert len(node.pids()) >= 1, "no orphans: this test tests nothing"
        proven(node, node.fence(1, 2))
        ended_ns = boot_ns()
        time.sleep(0.1)
        assert writer.last_ns < ended_ns


@pytest.mark.parametrize(
    ("victim", "clean"), [("postmaster", False), ("postmaster", True), ("backend", True), ("all", False)]
)
def test_stopped_processes(node: Node, victim: str, clean: bool) -> None:
    """I6: SIGSTOP; a clean shutdown that waits for it in vain becomes a kill by the deadline."""
    node.configure(lease_s=1.0)
    node.start()
    node.make_writable()
    with node.connect() as c:
        row = c.execute("SELECT pg_backend_pid()").fetchone()
        assert row is not None
        master = node.postmaster()
        victims = {"postmaster": [master], "backend": [int(str(row[0]))], "all": node.pids()}[victim]
        for pid in victims:
            node.send(pid, signal.SIGSTOP)
        left_s = ((node.status().lease_deadline_boottime_ns or 0) - boot_ns()) / 1e9
        record = node.fence(1, 2, clean=clean)
        proven(node, record, within_s=FENCE_S + (left_s if clean else 0))
        assert [r.name for r in record.rungs] == ["fast"] * clean + ["freeze", "kill"]


def test_ordered_while_a_postmaster_begins(node: Node) -> None:
    """I6, D7: activate is preempted at any moment of pg_ctl, postmaster, start-up and promotion."""
    node.start()
    moments_ms = [*range(0, 40, 4), *range(40, 300, 60)]
    for term, moment_ms in enumerate(moments_ms, 1):
        assert isinstance(node.activate(term, 1), protocol.Accepted)
        time.sleep(moment_ms / 1000)
        proven(node, node.fence(term, 2))
        until = time.monotonic() + 0.05
        while time.monotonic() < until:
            assert not node.pids(), f"activate accepted {moment_ms} ms before: it came up after the proof"


def replace_pg_ctl(node: Node, script: str) -> None:
    """Another bin_dir, with the other programs as they are."""
    bin_dir = node.top / "bin"
    bin_dir.mkdir()
    for program in node.template.postgres.bin_dir.iterdir():
        (bin_dir / program.name).symlink_to(program)
    (bin_dir / "pg_ctl").unlink()
    (bin_dir / "pg_ctl").write_text(f"#!/bin/sh\n{script}\n")
    (bin_dir / "pg_ctl").chmod(0o755)
    node.configure(bin_dir=str(bin_dir))


def test_what_a_start_has_forked_and_not_executed_yet(node: Node) -> None:
    """I6, D7: a child of pg_ctl, a moment before it is PostgreSQL and could be known for it, ends with pg_ctl."""
    real = node.template.postgres.bin_dir / "pg_ctl"
    replace_pg_ctl(node, f'(touch {node.top}/s/forked; sleep 0.4; exec {real} "$@") & wait')
    node.start()
    assert isinstance(node.activate(1, 1), protocol.Accepted)
    node.wait((node.top / "s" / "forked").exists, "pg_ctl has forked", 5)
    proven(node, node.fence(1, 2))
    until = time.monotonic() + 0.8
    while time.monotonic() < until:
        assert not node.pids(), "it came up after the proof"
        time.sleep(0.01)


@by_hand
def test_a_postmaster_is_known_from_its_exec_on(node: Node) -> None:
    """I6: the kernel shows the new executable before it shows the arguments; there is no gap between."""
    wanted = processes.identity(str(node.data))
    assert wanted is not None
    postgres, seen = f"{node.template.postgres.bin_dir}/postgres", 0
    options, arguments = ["-p", str(node.port), "-c", f"unix_socket_directories={node.top}/s"], b""
    for number in range(100):
        node.tidy()
        tell, variables = (["-D", str(node.data)], "") if number % 2 else ([], f"PGDATA={node.data} ")
        with subprocess.Popen(
            ["/bin/sh", "-c", f'read x; {variables}exec "$0" "$@"', postgres, *tell, *options],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd="/",
            user=node.template.user,
            env={"LD_LIBRARY_PATH": str(node.template.postgres.library_dir or "")},
        ) as process:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
            with contextlib.suppress(FileNotFoundError):  # it has ended already: we did not get to run
                while os.readlink(f"/proc/{process.pid}/exe").rpartition("/")[2] != "postgres":  # noqa: PTH115
                    pass
                arguments = processes._arguments(process.pid, time.monotonic() + 1)
            known = processes.belongs(process.pid, wanted)
            lives = process.poll() is None
            process.kill()
        assert (known and arguments) or not lives, number
        seen += lives
    assert seen > 50


@by_hand
@pytest.mark.parametrize("how", ["pg_ctl", "postgres", "PGDATA"])
def test_started_by_hand_a_moment_before_the_fence(node: Node, how: str) -> None:
    """I1, I6: whatever moment of its start the fence meets it in, it is gone, or comes up as a standby."""
    node.start()
    node.make_writable()
    node.fence(1, 2)
    for number in range(8):
        node.hand(how)  # type: ignore[arg-type]
        time.sleep(number * 0.006)
        record = node.fence(1, 3 + number)
        assert record.state == "done", (record, node.log())
        if how != "pg_ctl":  # its child may begin after the proof
            assert not node.pids()
        node.kill_postgres()
        assert (node.data / "standby.signal").exists()


def test_a_long_crash_recovery(node: Node) -> None:
    """I6: the startup process is replaying, nobody can connect."""
    node.set_postgres(checkpoint_timeout="1h", max_wal_size="8GB")
    node.start()
    node.make_writable()
    with session(
        node, "CREATE TABLE big AS SELECT g, repeat('x', 300) FROM generate_series(1, 1000) g", "CHECKPOINT"
    ):
        pass
    with node.connect() as c:
        until = time.monotonic() + pace.wait_s(20)
        start = c.execute("SELECT pg_current_wal_lsn()").fetchone()
        assert start is not None
        while time.monotonic() < until:
            c.execute("INSERT INTO big SELECT g, repeat('x', 300) FROM generate_series(1, 100000) g")
            node.renew(1, 1)
            written = c.execute("SELECT pg_current_wal_lsn() - %s::pg_lsn", start).fetchone()
            if written is not None and int(str(written[0])) > 150e6:
                break
    node.renew(1, 1)
    # The fencer does not look until it recovers: where PostgreSQL is down for a second, it writes standby.signal.
    assert node.process is not None
    node.process.send_signal(signal.SIGSTOP)
    try:
        node.kill_postgres()
        node.hand()
        node.wait(lambda: node.cluster_state() == "in crash recovery", "it recovers", 5)
    finally:
        node.process.send_signal(signal.SIGCONT)
    node.renew(1, 1)  # under the lease: its end would be a fence, too
    proven(node, node.fence(1, 2))
    assert node.cluster_state() == "in crash recovery", "it was over before the fence"


@by_hand
def test_somebody_who_starts_it_again_and_again(node: Node) -> None:
    """I1, I6: proven, or said not to be; never writable, and proven as soon as nobody starts it any more."""
    node.start()
    node.make_writable()
    over, starts = threading.Event(), []

    def again() -> None:
        while not over.is_set():
            node.hand()
            starts.append(boot_ns())
            while node.hands[-1].poll() is None and not over.wait(0.001):
                pass

    thread = threading.Thread(target=again)
    thread.start()
    try:
        for number in range(8):
            record = node.fence(1, 2 + number)
            if record.state == "failed":  # a new one at every look, on a busy host: frozen, and said so
                assert "processes live on" in record.detail or "something listens" in record.detail
                continue
            assert record.took_ms < FENCE_S * 1000 + pace.SLACK_MS
            # Of the first kill, and of the one that was proof: a look that finds nobody is not asked for again.
            assert [rung.gone for rung in record.rungs].count(True) <= 2
            node.wait(node.in_recovery, "it is up again, as a standby", 10)
            with node.connect() as c, pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                c.execute("CREATE TABLE no (x int)")
    finally:
        over.set()
        thread.join()
    assert len(starts) > 5
    proven(node, node.fence(1, 20))


def test_a_stale_pid_file_names_another_program(node: Node) -> None:
    """I6, O7: it is never signalled, the fence is proven, and the next activate starts PostgreSQL."""
    node.start()
    node.make_writable()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as bystander:
        try:
            _stale(node, bystander.pid)
            proven(node, node.fence(1, 2))
            _stale(node, bystander.pid)
            node.make_writable(2, 1)
            assert node.writable()
            assert bystander.poll() is None
            assert processes._stat(bystander.pid)[0] != "T"
        finally:
            bystander.kill()


@by_hand
def test_lock_files_that_a_killed_postmaster_left_empty(node: Node) -> None:
    """O7: killed between making its lock file and writing it; PostgreSQL would never start here again."""
    node.start()
    node.make_writable()
    proven(node, node.fence(1, 2))
    (node.data / "postmaster.pid").write_text("")
    lock = node.top / "s" / f".s.PGSQL.{node.port}.lock"
    lock.write_text("")
    node.make_writable(2, 1)
    assert node.writable()
    assert lock.read_text()


def test_a_stale_pid_file_names_another_clusters_postmaster(
    node: Node, neighbour: tuple[Node, Writer]
) -> None:
    """I6, O7: the same user's, the same executable, and still not ours: the fixture sees that it lives."""
    node.start()
    node.make_writable()
    master = neighbour[0].postmaster()
    _stale(node, master)
    proven(node, node.fence(1, 2))
    clean = node.fence(1, 3, clean=True)
    proven(node, clean)
    _stale(node, master)
    node.make_writable(2, 1)
    assert node.writable()
    assert node.postmaster() != master


def _stale(node: Node, pid: int) -> None:
    """postmaster.pid as a dead postmaster left it, when its pid has passed to `pid`."""
    node.kill_postgres()
    socket_dir = node.top / "s"
    lines = [str(pid), str(node.data), str(int(time.time())), str(node.port), str(socket_dir), "127.0.0.1"]
    (node.data / "postmaster.pid").write_text("\n".join([*lines, "        1 1", "ready   ", ""]))


@by_hand
@pytest.mark.parametrize("how", ["pg_ctl", "postgres", "PGDATA"])
def test_reached_through_symbolic_links(node: Node, how: str) -> None:
    """I6: fencer.json names one link, whoever starts it by hand another: it is the same directory."""
    ours, theirs = node.top / "ours", node.top / "theirs"
    ours.symlink_to(node.data)
    theirs.symlink_to(ours)
    node.configure(data_dir=str(ours))
    node.start()
    node.make_writable()
    proven(node, node.fence(1, 2))
    node.hand(how, theirs)  # type: ignore[arg-type]
    node.wait(node.in_recovery, "it runs")
    proven(node, node.fence(1, 3))
    node.tidy()
    (node.data / "standby.signal").unlink()
    node.hand(how, theirs)  # type: ignore[arg-type]
    node.wait(lambda: node.status().self_fence is not None, "noticed", 5)
    node.wait(lambda: node.status().fence_proven, "fenced")
    assert not node.pids()


def test_parallel_workers(node: Node) -> None:
    """I6: a query that runs in many processes."""
    node.set_postgres(max_worker_processes="12", max_parallel_workers="8")
    node.start()
    node.make_writable()
    slow = "SELECT count(*) FROM p a, p b, p c"
    cheap = [
        f"SET {n} = 0" for n in ("parallel_setup_cost", "parallel_tuple_cost", "min_parallel_table_scan_size")
    ]
    prepare = [
        "CREATE TABLE p AS SELECT generate_series(1, 5000)",
        "ALTER TABLE p SET (parallel_workers = 4)",
    ]
    with session(node, *prepare, *cheap, "SET max_parallel_workers_per_gather = 4", slow):
        node.wait(lambda: active(node, "parallel worker") >= 2, "workers")
        node.renew(1, 1)
        proven(node, node.fence(1, 2))


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("kind", ["physical", "logical"])
def test_a_walsender_stuck_on_a_dead_peer(node: Node, kind: str, clean: bool) -> None:
    """I6: the peer reads no more, and data piles up; a clean shutdown would wait for it."""
    node.set_postgres(wal_level="logical", wal_sender_timeout="0")
    node.configure(lease_s=1.5)
    node.start()
    node.make_writable()
    with node.connect() as c:
        c.execute("CREATE TABLE t AS SELECT 1 AS x, ''::text AS y")
        c.execute("CREATE PUBLICATION p FOR ALL TABLES")
        c.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
        row = c.execute("SELECT pg_current_wal_lsn()").fetchone()
    assert row is not None
    peer = psycopg.connect(
        f"host=127.0.0.1 port={node.port} user=postgres dbname=postgres replication="
        + ("database" if kind == "logical" else "true"),
        autocommit=True,
    )
    with peer:
        start = (
            f"START_REPLICATION PHYSICAL {row[0]}"
            if kind == "physical"
            else "START_REPLICATION SLOT s LOGICAL 0/0 (proto_version '1', publication_names 'p')"
        )
        with socket.fromfd(peer.fileno(), socket.AF_INET, socket.SOCK_STREAM) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # little is on its way
        peer.pgconn.send_query(start.encode())
        with node.connect() as c:
            node.renew(1, 1)
            c.execute("INSERT INTO t SELECT g, repeat('x', 900) FROM generate_series(1, 20000) g")
            stuck = (
                "SELECT count(*) FROM pg_stat_replication r JOIN pg_stat_activity a USING (pid) WHERE "
                "pg_current_wal_lsn() - r.sent_lsn > 1000000 OR a.wait_event = 'WalSenderWriteData'"
            )
            node.wait(lambda: node.renew(1, 1) and c.execute(stuck).fetchone() == (1,), "it piles up", 10)
        left_s = ((node.status().lease_deadline_boottime_ns or 0) - boot_ns()) / 1e9
        record = node.fence(1, 2, clean=clean)
        proven(node, record, within_s=FENCE_S + (left_s if clean else 0))
        assert [r.name for r in record.rungs] == ["fast"] * clean + ["freeze", "kill"]
        peer.pgconn.finish()


@contextlib.contextmanager
def none_left(*numbers: str) -> Iterator[None]:
    """Nobody sleeps so long when the block has ended; who does all the same is killed, for the tests to come."""
    try:
        yield
        assert not [p for n in numbers for p in helpers("sleep", n)]
    finally:
        for pid in [p for n in numbers for p in helpers("sleep", n)]:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("clean", [False, True])
def test_an_archive_command_that_hangs(node: Node, clean: bool) -> None:
    """I6: it, its children and what it put into the background are gone too; a clean fence ends in time."""
    first, second, orphan = (f"{n}{node.port}" for n in (1, 2, 3))
    node.configure(lease_s=1.0)
    node.set_postgres(
        archive_mode="on",
        archive_command=f'(sleep {orphan} &) ; sleep {first} & sh -c "setsid sleep {second}; true"',
    )
    node.start()
    node.make_writable()
    with none_left(first, second, orphan):
        with node.connect() as c:
            c.execute("CREATE TABLE t (x int)")
            c.execute("SELECT pg_switch_wal()")
        node.wait(lambda: all(helpers("sleep", n) for n in (first, second, orphan)), "it hangs", 5)
        node.renew(1, 1)
        begun = time.monotonic()
        left_s = ((node.status().lease_deadline_boottime_ns or 0) - boot_ns()) / 1e9
        record = node.fence(1, 2, clean=clean)
        assert time.monotonic() - begun <= FENCE_S + (left_s if clean else 0) + pace.SLACK_S
        proven(node, record, within_s=FENCE_S + (left_s if clean else 0))
        assert [r.name for r in record.rungs] == ["fast"] * clean + ["freeze", "kill"]


@by_hand
@pytest.mark.parametrize("by", ["another fencer", "the one-shot"])
def test_an_earlier_fencers_cgroup(node: Node, by: str) -> None:
    """I6: PostgreSQL was started in a cgroup elsewhere; what nothing but that cgroup still holds is gone too."""
    number, mount = f"6{node.port}", cgroup.mount_point()
    if mount is None:
        pytest.skip("no cgroup v2")
    elsewhere = cgroup.Cgroup(mount / f"hf-elsewhere-{node.port}")
    node.set_postgres(archive_mode="on", archive_command=f"(setsid sleep {number} &) ; sleep 0.1; true")
    node.start(inside=elsewhere.path)
    try:
        node.make_writable()
        with none_left(number):
            with node.connect() as c:
                c.execute("CREATE TABLE t (x int)")
                c.execute("SELECT pg_switch_wal()")
            node.wait(lambda: helpers("sleep", number), "the helper runs", 5)
            node.renew(1, 1)
            node.kill_fencer()
            if by == "another fencer":
                node.start()
                assert str(elsewhere) not in node.status().held_by
                proven(node, node.fence(1, 2))
            else:
                done = subprocess.run(node.argv("--once", "test"), check=False, capture_output=True)
                assert json.loads(done.stdout)["proven"] is True
                assert not node.pids()
    finally:
        elsewhere.kill()
        node.wait(lambda: not elsewhere.populated(), "all in it are dead", 5)
        for path in (*elsewhere._beneath(), elsewhere.path):
            path.rmdir()


@pytest.mark.parametrize("clean", [False, True])
def test_a_copy_from_program(node: Node, clean: bool) -> None:
    """I6: its child is gone too."""
    number = f"4{node.port}"
    node.configure(lease_s=1.0)
    node.start()
    node.make_writable()
    assert node.writable()
    with none_left(number), session(node, f"COPY t FROM PROGRAM 'trap \"\" TERM; sleep {number}; true'"):
        node.wait(lambda: helpers("sleep", number), "the program runs", 5)
        node.renew(1, 1)
        left_s = ((node.status().lease_deadline_boottime_ns or 0) - boot_ns()) / 1e9
        proven(node, node.fence(1, 2, clean=clean), within_s=FENCE_S + (left_s if clean else 0))


@pytest.mark.parametrize("parent", ["lives", "has ended"])
def test_helpers_that_outlive_a_clean_shutdown(node: Node, parent: str) -> None:
    """I6: all of PostgreSQL is gone, a program that a backend had started is not: it is part of the proof."""
    number = f"5{node.port}"
    node.start()
    node.make_writable()
    assert node.writable()
    program = f'trap "" TERM; sleep {number} >/dev/null 2>&1 & ' + (
        "sleep 0.05" if parent != "lives" else "wait"
    )
    statements = [f"COPY t FROM PROGRAM '{program}'", "SELECT pg_sleep(60)"]
    with none_left(number), session(node, *statements[: 1 if parent == "lives" else 2]):
        node.wait(lambda: helpers("sleep", number), "the program runs", 5)
        record = node.fence(1, 2, clean=True)
        proven(node, record, within_s=FENCE_S + LEASE_S)
        if parent != "lives":
            assert [r.name for r in record.rungs] == ["fast", "freeze", "kill"]
            assert node.cluster_state() == "shut down"


@pytest.mark.parametrize("clean", [False, True])
def test_backends_that_are_busy_or_wait_for_a_lock(node: Node, clean: bool) -> None:
    """I6, O7: long loops, a held lock and those who wait for it."""
    node.start()
    node.make_writable()
    assert node.writable()
    long = "SELECT count(*) FROM generate_series(1, 10000000) a, generate_series(1, 10000000) b"
    held = ("BEGIN", "LOCK TABLE t", "SELECT pg_sleep(100)")
    with session(node, long), session(node, *held), session(node, "INSERT INTO t VALUES (1)"):
        node.wait(lambda: active(node, "%") >= 3, "all are at it")
        record = node.fence(1, 2, clean=clean)
        proven(node, record, within_s=FENCE_S + (LEASE_S if clean else 0))
        assert [r.name for r in record.rungs] == (["fast"] if clean else ["freeze", "kill"])


@pytest.mark.parametrize("operator", [False, True])
def test_a_clean_fence_under_load(node: Node, operator: bool) -> None:
    """O7: a planned demotion is PostgreSQL's own clean shutdown."""
    node.start()
    node.make_writable()
    with node.writing(), node.writing(), node.writing():
        if operator:
            node.ask(protocol.OperatorFence(reason="maintenance", who="me", clean=True))
            record = node.outcome()
        else:
            record = node.fence(1, 2, clean=True)
        proven(node, record, within_s=FENCE_S + LEASE_S)
        assert [r.name for r in record.rungs] == ["fast"]
        assert node.cluster_state() == "shut down"


def test_thirty_fences_leave_nothing_open(node: Node) -> None:
    """No descriptor leaks: a fencer runs for years."""
    node.start()
    node.make_writable()
    node.fence(1, 2)
    assert node.process is not None
    fds = Path(f"/proc/{node.process.pid}/fd")
    before = len(os.listdir(fds))
    for number in range(30):
        node.hand()
        node.wait(node.pids, "it begins")
        time.sleep(0.02 * (number % 3))
        proven(node, node.fence(1, 3 + number))
        node.tidy()
    node.make_writable(2, 1)
    proven(node, node.fence(2, 2))
    node.wait(lambda: len(os.listdir(fds)) <= before, f"as many as before: {before}", 3)


# ---------------------------------------------------------------- what is said when it fails


def test_what_is_said_when_the_port_is_taken(node: Node) -> None:
    """W5, I6: the rung, who it is, what to do; and the next fence is proven when it was done."""
    node.start()
    node.make_writable()
    node.kill_postgres()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", node.port))
        other.listen()
        node.hand()  # another port would be needed: it fails, or is killed by the fence
        record = node.fence(1, 2)
        assert record.state == "failed"
        assert f"port {node.port}" in record.detail
        assert f"{os.getpid()} '" in record.detail, "the process that listens is named"
        assert "Stop it, or correct the port" in record.detail
        assert "after rung " in record.detail
        assert not node.status().fence_proven
    proven(node, node.fence(1, 3))


@pytest.mark.skipif(
    not (FREEZER / "tasks").exists(), reason="needs a v1 freezer: no other way to be unkillable"
)
def test_what_is_said_of_a_process_that_cannot_be_killed(node: Node) -> None:
    """W5, I6: not proven; the rung, each process left and its state, what to do; and then it goes on to the end."""
    node.start()
    node.make_writable()
    box = FREEZER / f"hf-{node.port}"
    box.mkdir()
    try:
        with node.connect() as c:
            row = c.execute("SELECT pg_backend_pid()").fetchone()
            assert row is not None
            (box / "tasks").write_text(str(row[0]))
            (box / "freezer.state").write_text("FROZEN")
            record = node.fence(1, 2)
            assert record.state == "failed"
            assert FENCE_S * 900 <= record.took_ms <= FENCE_S * 1200 + pace.SLACK_MS
            assert "after rung kill 1 processes live on" in record.detail
            assert f"{row[0]} 'postgres: " in record.detail
            assert "state D" in record.detail
            assert "power this host off" in record.detail
            assert not node.status().fence_proven
            (box / "freezer.state").write_text("THAWED")
            proven(node, node.fence(1, 3))
    finally:
        (box / "freezer.state").write_text("THAWED")
        node.wait(lambda: not (box / "tasks").read_text(), "its tasks are gone", 5)
        box.rmdir()


@pytest.mark.skipif(
    not (FREEZER / "tasks").exists(), reason="needs a v1 freezer: no other way to be unkillable"
)
def test_a_start_that_hangs_and_cannot_be_killed_holds_up_no_fence(node: Node) -> None:
    """I6, D7: pg_ctl waits for a disk (state D); the fence is carried out and reported all the same."""
    box = FREEZER / f"hf-{node.port}"
    box.mkdir()
    if node.template.user is not None:
        shutil.chown(box / "tasks", node.template.user)
        shutil.chown(box / "freezer.state", node.template.user)
    replace_pg_ctl(node, f"echo $$ > {box}/tasks\necho FROZEN > {box}/freezer.state\nsleep 9")
    try:
        node.start()
        assert isinstance(node.activate(1, 1), protocol.Accepted)
        node.wait(lambda: (box / "freezer.state").read_text() == "FROZEN\n", "pg_ctl hangs", 5)
        begun = time.monotonic()
        record = node.fence(1, 2)
        assert time.monotonic() - begun < FENCE_S + 0.5 + pace.SLACK_S
        if "cgroup" in node.status().held_by:
            assert record.state == "failed"  # it is in PostgreSQL's cgroup
            assert "pg_ctl" in record.detail
        (box / "freezer.state").write_text("THAWED")
        proven(node, node.fence(1, 3))
        node.wait(lambda: not (box / "tasks").read_text(), "pg_ctl has ended, without a sleep", 3)
    finally:
        (box / "freezer.state").write_text("THAWED")
        node.wait(lambda: not (box / "tasks").read_text(), "its tasks are gone", 12)
        box.rmdir()


@by_hand
def test_nobody_is_signalled_unverified(node: Node, neighbour: tuple[Node, Writer]) -> None:
    """I6: a pid may pass to another program between the look and the signal: another cluster's, or anybody's."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as bystander:
        try:
            others = [bystander.pid, *neighbour[0].pids()]
            pinned = processes.Pinned()
            assert pinned.catch(str(node.data), others) == []
            assert pinned.send(signal.SIGSTOP) == 0
            for pid in others:
                assert not processes.send(pid, signal.SIGSTOP, str(node.data))
                assert processes._stat(pid)[0] != "T"
        finally:
            bystander.kill()


@pytest.mark.skipif(not Path("/proc/sys/kernel/ns_last_pid").exists(), reason="needs to choose the next pid")
@by_hand
def test_a_pid_that_comes_back_is_pinned_anew(node: Node) -> None:
    """I6: in a fence that lasts long, pids come round; what was pinned and has ended is let go of."""
    node.hand("postgres")
    node.wait(lambda: node.in_recovery() is not None, "it runs")
    pinned = processes.Pinned()
    pinned.catch(str(node.data), node.pids())
    master = node.postmaster()
    node.kill_postgres()
    assert not pinned.left()
    for _ in range(20):  # others fork too
        node.tidy()
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(master - 1))
        node.hand("postgres")
        if node.hands[-1].pid == master:
            break
        node.kill_postgres()
    else:
        pytest.skip("could not get the pid again")
    node.wait(lambda: node.in_recovery() is not None, "it runs")
    pinned.catch(str(node.data), node.pids())
    assert master in pinned.left()
    pinned.close()


# ---------------------------------------------------------------- a fence lasts


@by_hand
@pytest.mark.parametrize("how", ["pg_ctl", "postgres", "PGDATA"])
def test_started_by_hand_after_a_fence_it_is_read_only(node: Node, how: str) -> None:
    """I1: whoever starts it."""
    node.start()
    node.make_writable()
    proven(node, node.fence(1, 2))
    node.hand(how)  # type: ignore[arg-type]
    node.wait(node.in_recovery, "it runs, as a standby")
    assert not node.writable()
    time.sleep(0.5)
    assert node.in_recovery(), "a standby is left running"


@by_hand
def test_standby_signal_removed_and_started_writable(node: Node) -> None:
    """I1: a careless hand; fenced at once, though nothing was ordered."""
    node.start()
    node.make_writable()
    proven(node, node.fence(1, 2))
    (node.data / "standby.signal").unlink()
    begun = boot_ns()
    node.hand()
    writer = Writer(node, PAUSE_S)  # it may never get to write
    try:
        time.sleep(1.0)
        assert not writer.acks or (writer.last_ns - begun) / 1e9 < 0.5 + FENCE_S + pace.SLACK_S
    finally:
        writer.stop()
    node.wait(lambda: node.status().fence_proven and not node.pids(), "fenced")
    self_fence = node.status().self_fence
    assert self_fence is not None
    assert "without a lease" in self_fence.reason
    node.tidy()
    assert (node.data / "standby.signal").exists()
    node.hand()
    node.wait(node.in_recovery, "the next start is a standby again")


@by_hand
def test_standby_signal_put_back_under_a_writable_one(node: Node) -> None:
    """I1: the file is no proof: it may have been written after PostgreSQL had looked."""
    node.start()
    node.make_writable()
    proven(node, node.fence(1, 2))
    (node.data / "standby.signal").unlink()
    node.hand()
    node.wait((node.data / "postmaster.pid").exists, "it begins", 2)
    # As the fencer itself does while it is down, 50 ms after it has looked for a postmaster.
    late = threading.Timer(0.1, (node.data / "standby.signal").touch)
    late.start()
    node.wait(lambda: node.status().self_fence is not None, "noticed", 3)
    late.join()  # a fence may be quicker: nothing is written while the data directory is removed
    node.wait(lambda: node.status().fence_proven and not node.pids(), "fenced")


@by_hand
async def test_the_watch_wakes_up_when_a_standby_is_promoted_by_hand(node: Node) -> None:
    """I1: by what changes in the data directory; the look once a second is only the net beneath."""
    node.start()
    node.follow(1, 1)
    beside = Postgres(load(str(node.config)), lasting=False)
    master = node.postmaster()
    node.kill_fencer()
    with trio.fail_after(30):
        assert not await beside.ended(master, 20), "the first look is over at once"
        assert beside.notices
        assert not beside.could_write()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, node.promote_by_hand)
            while not beside.could_write():
                assert not await beside.ended(master, 600)
        node.kill_postgres()
        while not await beside.ended(master, 600):
            pass


@by_hand
def test_a_running_primary_is_seen_behind_its_mark(node: Node) -> None:
    """I1: standby.signal says what the next start will be; what runs is asked of the postmaster."""
    node.start()
    node.make_writable()
    beside = Postgres(load(str(node.config)), lasting=False)
    (node.data / "standby.signal").touch()
    assert beside.is_standby()
    assert beside.could_write()
    node.follow(1, 2)
    assert not beside.could_write()


@by_hand
def test_standby_signal_removed_while_down_is_written_again(node: Node) -> None:
    """I1: also after a fence that a full disk kept from writing it."""
    node.start()
    node.make_writable()
    proven(node, node.fence(1, 2))
    for _ in range(2):
        (node.data / "standby.signal").unlink()
        node.wait((node.data / "standby.signal").exists, "written again", 3)


@by_hand
def test_only_an_accepted_activate_takes_the_mark_away(node: Node) -> None:
    """I1: through follow, fence, activate, refused activates, restarts and kills of the fencer."""
    mark = node.data / "standby.signal"
    node.start()
    node.wait(mark.exists, "marked before anything was ever ordered")
    node.follow(1, 1)
    assert mark.exists()
    assert node.in_recovery()
    node.make_writable(1, 2)
    assert not mark.exists()
    assert node.writable()
    node.follow(1, 3)
    assert mark.exists()
    assert node.in_recovery()
    proven(node, node.fence(1, 4))
    for stale in ((1, 4), (1, 2), (0, 9)):
        assert isinstance(node.activate(*stale), protocol.Refusal)
    late = protocol.Activate(
        generation=Generation(2, 1), deadline_boottime_ns=boot_ns() - 1, sync=protocol.SyncRule(0, ())
    )
    assert isinstance(node.ask(late), protocol.Refusal)
    assert mark.exists()
    node.kill_fencer()
    node.start()
    assert mark.exists()
    node.follow(2, 2)
    node.make_writable(3, 1)
    assert not mark.exists()
    node.wait(lambda: node.status().fence_proven, "the lease ends", LEASE_S + FENCE_S + 1)
    assert mark.exists()


def self_fence_state(node: Node) -> str:
    """Of the newest fence that nobody ordered, when it was for being writable."""
    found = node.status().self_fence
    return found.state if found is not None and "without a lease" in found.reason else ""


@by_hand
def test_a_latch_says_who_when_and_why_and_outlives_everything(node: Node) -> None:
    """I1, O7: also a SIGKILL in the middle of the fence; a latched node is not started writable by anybody."""
    node.start()
    node.make_writable()
    reply = node.ask(protocol.OperatorFence(reason="disk is being replaced", who="uid 0 (anna)"))
    assert isinstance(reply, protocol.Accepted)
    node.kill_fencer()
    node.start()
    node.wait(lambda: not node.pids(), "the new one ends the fence", FENCE_S + 2)
    for _ in range(2):
        latch = node.status().latch
        assert latch is not None
        assert (latch.reason, latch.who) == ("disk is being replaced", "uid 0 (anna)")
        assert latch.at_utc.startswith("20")
        for refused in (
            node.activate(9, 1),
            node.ask(protocol.Follow(generation=Generation(9, 1), primary=None)),
        ):
            assert isinstance(refused, protocol.Refusal)
            assert refused.error == "latched"
        node.kill_fencer()
        node.start()
    (node.data / "standby.signal").unlink(missing_ok=True)
    node.hand()
    node.wait(lambda: self_fence_state(node) == "done", "started writable by hand: fenced", 5)
    node.tidy()
    node.hand()
    node.wait(node.in_recovery, "a standby may run")
    assert isinstance(node.ask(protocol.Unfence(who="me")), protocol.Done)
    assert node.status().latch is None
    node.make_writable(9, 2)


@by_hand
def test_the_one_shot_latches_beside_a_fencer_that_hangs_in_an_activate(node: Node) -> None:
    """I1: once it has been told "proven, latched", the operator relies on it; the hung one may wake any time."""
    for number in range(6):
        node.start()
        assert isinstance(node.activate(number + 1, 1), protocol.Accepted)
        assert node.process is not None
        time.sleep(0.03 * number)
        node.process.send_signal(signal.SIGSTOP)
        argv = node.argv("--once", "the rack burns", "--latch", "anna")
        done = subprocess.run(argv, check=False, capture_output=True)
        assert json.loads(done.stdout)["proven"] is True
        node.process.send_signal(signal.SIGCONT)
        until = time.monotonic() + 0.7
        while time.monotonic() < until:
            assert not node.writable(), f"hung {30 * number} ms into its activate, it went on over the latch"
            time.sleep(0.05)
        assert isinstance(node.activate(number + 1, 2), protocol.Refusal)
        node.kill_fencer()
        node.kill_postgres()
        (node.state / "fencer.latch").unlink()
