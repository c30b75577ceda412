"""A real fencer process and a real PostgreSQL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harmony_fencer import processes, protocol, realtime
from harmony_fencer.protocol import Generation
from tests import pace
from tests.fencer.node import FENCE_S, LEASE_S, Node

pytestmark = pytest.mark.real


def refused(reply: protocol.Reply) -> str:
    assert isinstance(reply, protocol.Refusal), reply
    return reply.error


def test_activate_renew_and_the_end_of_the_lease(node: Node) -> None:
    """W9, I6: writable only by activate; renewals keep it; without them it is fenced, proven, in time."""
    node.start()
    assert node.status().postgres == "down"
    node.make_writable()
    assert node.writable()
    for _ in range(8):
        assert isinstance(node.renew(1, 1), protocol.Renewed)
        time.sleep(LEASE_S / 4)
    assert node.writable()
    with node.connect() as c:
        last = begun = time.monotonic()
        while time.monotonic() - begun < LEASE_S + FENCE_S + 5:
            try:
                c.execute("INSERT INTO t VALUES (1)")
            except Exception:  # noqa: BLE001 (the end of it is what we wait for)
                break
            last = time.monotonic()
    assert last - begun <= LEASE_S + FENCE_S
    node.wait(lambda: node.status().fence_proven, "proof")
    status = node.status()
    assert status.active is None
    assert status.is_standby
    assert status.self_fence is not None
    assert status.self_fence.reason == "the lease is over"  # not the second net, for stray writability
    assert not node.pids()
    assert refused(node.renew(1, 1)) == "not_active"


def test_a_run_dir_on_a_disk_is_named(node: Node) -> None:
    """Each renewal is written there by the event loop: 0.35 s under load, and the supervisor kills at 0.36."""

    def kind(folder: Path) -> str:
        return subprocess.run(
            ["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=True
        ).stdout

    node.start()
    where = f"a run_dir in memory ({node.run} is on "
    assert (where in node.log()) == (kind(node.run) != "tmpfs\n")
    shared = Path("/dev/shm")  # noqa: S108
    assert kind(shared) != "tmpfs\n" or not realtime.on_a_disk(shared)
    assert kind(Path("/sys")) == "sysfs\n"
    assert realtime.on_a_disk(Path("/sys")) == ["a run_dir in memory (/sys is on sysfs, not on tmpfs)"]
    unknown = realtime.on_a_disk(node.run, table=node.top / "missing")
    assert unknown == [f"a run_dir in memory ({node.run} is on a disk, not on tmpfs)"]


def test_stale_orders_are_refused_and_repeats_get_their_outcome(node: Node) -> None:
    """I3, D7."""
    node.start()
    node.make_writable(3, 1)
    fence = protocol.Fence(generation=Generation(3, 2), reason="test")
    assert isinstance(node.ask(fence), protocol.Accepted)
    assert node.outcome().state == "done"
    assert refused(node.activate(3, 1)) == "stale_generation"
    assert refused(node.activate(2, 9)) == "stale_generation"
    assert refused(node.activate(3, 2)) == "conflicting_order"
    again = node.ask(fence)
    assert isinstance(again, protocol.Accepted)
    assert again.record.state == "done"
    assert not node.pids()
    node.kill_fencer()
    node.start()
    assert node.status().highest == Generation(3, 2)
    assert refused(node.activate(3, 1)) == "stale_generation"


def test_a_fence_preempts_a_running_activate(node: Node) -> None:
    """D7: cancelled and awaited; afterwards nothing of the older order has any effect."""
    node.start()
    assert isinstance(node.activate(1, 1), protocol.Accepted)
    time.sleep(0.1)
    node.ask(protocol.Fence(generation=Generation(1, 2), reason="test"))
    record = node.outcome()
    assert (record.op, record.state) == ("fence", "done")
    time.sleep(1.0)
    assert not node.pids()
    assert node.status().fence_proven


def test_a_killed_fencer_carries_on_under_the_lease_and_fences_without(node: Node) -> None:
    """W8, W9."""
    node.start()
    node.make_writable()
    node.renew(1, 1)
    node.kill_fencer()
    node.start()
    assert node.status().active == Generation(1, 1)
    assert node.writable()
    node.kill_fencer()
    time.sleep(LEASE_S)
    assert node.pids()
    node.start()
    node.wait(lambda: node.status().fence_proven, "fenced at start", FENCE_S + 5)
    assert not node.pids()


def test_an_unbelievable_state_file_fences_and_refuses(node: Node) -> None:
    """I3: fail closed, and say how to repair."""
    node.start()
    node.make_writable(5, 1)
    node.kill_fencer()
    state = node.state / "fencer.state"
    state.write_bytes(state.read_bytes()[:-20])
    node.start()
    node.wait(lambda: node.status().fence_proven, "fenced")
    status = node.status()
    assert not status.trusted
    assert "--reset-state --term" in status.trust_detail
    assert refused(node.activate(9, 9)) == "untrusted_state"
    busy = subprocess.run(node.argv("--reset-state", "--term", "5"), check=False, capture_output=True)
    assert busy.returncode == 75
    node.kill_fencer()
    subprocess.run(node.argv("--reset-state", "--term", "5"), check=True, capture_output=True)
    node.start()
    assert refused(node.activate(4, 9)) == "stale_generation"
    node.make_writable(6, 1)


def test_started_by_hand_after_a_fence_it_is_read_only(node: Node) -> None:
    """I1: a fence lasts, whoever starts PostgreSQL."""
    node.start()
    node.make_writable()
    node.ask(protocol.Fence(generation=Generation(1, 2), reason="test"))
    assert node.outcome().state == "done"
    node.start_by_hand()
    with node.connect() as c:
        assert c.execute("SELECT pg_is_in_recovery()").fetchone() == (True,)


def test_a_writable_one_without_a_lease_is_fenced_at_start(node: Node) -> None:
    """I1: found writable at start without a lease."""
    node.start_by_hand()
    assert node.writable()
    node.start()
    node.wait(lambda: node.status().fence_proven, "fenced")
    assert not node.pids()


def test_promoted_by_hand_it_is_fenced(node: Node) -> None:
    """I1: whoever makes it writable without a lease, it does not stay so."""
    node.start()
    node.ask(protocol.Follow(generation=Generation(1, 1), primary=None))
    assert node.outcome().state == "done"
    node.promote_by_hand()
    node.wait(lambda: node.status().fence_proven, "fenced", FENCE_S + 5)
    assert not node.pids()
    self_fence = node.status().self_fence
    assert self_fence is not None
    assert "without a lease" in self_fence.reason


def test_a_fencer_killed_while_promoting_fences_at_start(node: Node) -> None:
    """I1: an interrupted promotion may still complete; only a fence settles it."""
    node.start()
    node.ask(protocol.Follow(generation=Generation(1, 1), primary=None))
    assert node.outcome().state == "done"
    assert isinstance(node.activate(2, 1), protocol.Accepted)
    node.kill_fencer()
    (node.run / "lease.json").unlink(missing_ok=True)
    node.start()
    node.wait(lambda: not node.pids(), "fenced at start", FENCE_S + 5)


def test_orphaned_backends_are_killed_and_a_stale_pid_file_harms_nobody(node: Node) -> None:
    """I6: a SIGKILLed postmaster's backends go on; postmaster.pid may name somebody else by now."""
    node.start()
    node.make_writable()
    with node.connect() as c:
        c.execute("SELECT 1")
        master = processes.postmaster(str(node.data))
        assert master is not None
        backends = [p for p in node.pids() if p != master]
        for pid in backends:
            processes.send(pid, signal.SIGSTOP, str(node.data))
        processes.send(master, signal.SIGKILL, str(node.data))
        bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        try:
            pid_file = node.data / "postmaster.pid"
            pid_file.write_text(f"{bystander.pid}\n" + pid_file.read_text().split("\n", 1)[1])
            node.wait(lambda: node.status().postgres == "down", "the death is noticed")
            node.ask(protocol.Fence(generation=Generation(1, 2), reason="test"))
            record = node.outcome()
            assert record.state == "done"
            assert [r.name for r in record.rungs] == ["freeze", "kill"]
            assert not node.pids()
            assert bystander.poll() is None
        finally:
            bystander.kill()
            bystander.wait()


def test_a_stopped_postmaster_is_killed(node: Node) -> None:
    """I6: one that does not react climbs the ladder to the end."""
    node.start()
    node.make_writable()
    master = processes.postmaster(str(node.data))
    assert master is not None
    processes.send(master, signal.SIGSTOP, str(node.data))
    node.ask(protocol.Fence(generation=Generation(1, 2), reason="test"))
    record = node.outcome()
    assert record.state == "done"
    assert record.rungs[-1].name == "kill"
    assert record.took_ms <= FENCE_S * 1000 + pace.SLACK_MS
    assert not node.pids()


def test_not_proven_while_something_listens_on_the_port(node: Node) -> None:
    """W5, I6: no proof, no 'done'."""
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", node.port))
        other.listen()
        node.start()
        node.ask(protocol.Fence(generation=Generation(1, 1), reason="test"))
        record = node.outcome()
        assert record.state == "failed"
        assert str(node.port) in record.detail
        assert not node.status().fence_proven


def test_the_operators_fence_latches(node: Node) -> None:
    node.start()
    node.make_writable()
    reply = node.ask(protocol.OperatorFence(reason="maintenance", who="me"))
    assert isinstance(reply, protocol.Accepted)
    assert node.outcome().state == "done"
    assert refused(node.activate(9, 1)) == "latched"
    node.kill_fencer()
    node.start()
    latch = node.status().latch
    assert latch is not None
    assert latch.reason == "maintenance"
    assert isinstance(node.ask(protocol.Unfence(who="me")), protocol.Done)
    node.make_writable(9, 1)


def test_sigterm_fences_what_it_leads(node: Node) -> None:
    """O1."""
    node.start()
    node.make_writable()
    assert node.kill_fencer(signal.SIGTERM) == 0
    assert not node.pids()


def test_the_one_shot_fences_beside_a_hung_fencer(node: Node) -> None:
    node.start()
    node.make_writable()
    assert node.process is not None
    node.process.send_signal(signal.SIGSTOP)
    done = subprocess.run(node.argv("--once", "test"), check=False, capture_output=True)
    assert done.returncode == 0
    assert json.loads(done.stdout)["proven"] is True
    assert not node.pids()


def test_a_clean_fence_tells_where_the_shutdown_checkpoint_begins(node: Node) -> None:
    """I2: what the hand-over rests on, held against pg_controldata; None wherever it could mislead."""

    def told() -> int | None:
        return node.status().shutdown_lsn

    node.start()
    node.make_writable(1, 1)
    assert told() is None
    assert node.fence(1, 2, clean=True).state == "done"
    assert node.cluster_state() == "shut down"
    high, low = node.control("Latest checkpoint location").split("/")
    assert told() == (int(high, 16) << 32) + int(low, 16)
    node.start_by_hand()
    node.wait(lambda: node.status().postgres == "running", "the start is seen")
    assert told() is None
    assert node.fence(1, 3, clean=True).state == "done"
    assert node.cluster_state() == "shut down in recovery"
    assert told() is None
    node.make_writable(2, 1)
    assert node.fence(2, 2).state == "done"
    assert told() is None
    node.make_writable(3, 1)
    node.wait(lambda: node.status().fence_proven, "an own fence at the lease's end")
    assert told() is None


def test_a_path_that_is_not_a_socket_is_left_alone(node: Node) -> None:
    (node.run / "fencer.sock").write_text("mine")
    done = subprocess.run(node.argv(), check=False, capture_output=True, text=True)
    assert done.returncode == 78
    assert "not a socket" in done.stderr
    assert (node.run / "fencer.sock").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to connect as another user")
def test_the_wrong_user_is_refused(node: Node) -> None:
    node.start()
    (node.run / "fencer.sock").chmod(0o666)
    code = (
        "import socket,struct,sys\n"
        "s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        'b=b\'{"op":"status","v":1}\'; s.sendall(struct.pack(\'>I\',len(b))+b)\n'
        "n=struct.unpack('>I',s.recv(4))[0]; print(s.recv(n).decode())\n"
    )
    argv = [
        "setpriv",
        "--reuid",
        "nobody",
        "--regid",
        "nogroup",
        "--clear-groups",
        "/usr/bin/python3",
        "-c",
        code,
    ]
    done = subprocess.run([*argv, str(node.run / "fencer.sock")], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["error"] == "not_permitted"


def test_a_user_setting_that_would_override_is_named(node: Node) -> None:
    """Nothing half-done: the order fails and says which file and which setting."""
    node.start()
    with (node.data / "postgresql.auto.conf").open("a") as f:
        f.write("primary_conninfo = 'host=elsewhere'\n")
    node.ask(protocol.Follow(generation=Generation(1, 1), primary="n2"))
    record = node.outcome()
    assert record.state == "failed"
    assert "postgresql.auto.conf" in record.detail
    assert "primary_conninfo" in record.detail
