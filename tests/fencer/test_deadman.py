"""The dead-man's switch (W9, I1): whoever dies, hangs or lies, writes end by the lease's end plus fence_timeout.

The real supervisor's main() and the real fencer, real PostgreSQL, and an agent that is a script and does what a
test tells it. A client writes all the time and notes when its writes are acknowledged: the promise is about that.
Without systemd; what that adds is in tests/hosts.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harmony.config_times import pings
from harmony.demo.cluster import memory_folder
from harmony_fencer import cgroup, protocol
from harmony_fencer import lease as leases
from harmony_fencer.clock import boot_id
from harmony_fencer.protocol import Generation
from tests import pace
from tests.fencer.node import FENCE_S, LEASE_S, Node, Template, Writer, boot_ns

pytestmark = pytest.mark.real

AGENT_PATIENCE_S = 20.0  # a healthy one that does not get to run, on a busy machine, is not to be replaced
AGENT = f"""
import select, socket, sys, time
from pathlib import Path
from harmony.fencer_client import call, protocol
folder = Path(sys.argv[1])
pongs = socket.socket(fileno=int(sys.argv[sys.argv.index("--supervisor-fd") + 1]))
pongs.sendall(b"ready agent\\n")
(folder / "agent.ready").touch()
while True:
    if select.select([pongs], [], [], 0.1)[0]:
        data = pongs.recv(1000)
        if not data:
            sys.exit(0)
        pongs.sendall(b"".join(b"pong" + l[4:] + b"\\n" for l in data.split(b"\\n") if l.startswith(b"ping ")))
    what = (folder / "agent.mode").read_text()
    while what == "loop":
        pass
    if what == "renew":
        try:
            active = call(str(folder / "fencer.sock"), protocol.StatusRequest(), timeout_s=0.5).active
            if active is not None:
                until = time.clock_gettime_ns(time.CLOCK_BOOTTIME) + {round(LEASE_S * 1e9)}
                renew = protocol.Renew(generation=active, deadline_boottime_ns=until)
                call(str(folder / "fencer.sock"), renew, timeout_s=0.5)
        except Exception:
            pass
"""

# What the supervisor's main() does, once it has the configuration; the agent is the script.
SUPERVISOR = """
import json, sys
from pathlib import Path
from harmony_supervisor import main
main._steady()
resolved, agent = json.loads(Path(sys.argv[1]).read_text()), [sys.executable, "-I", *sys.argv[2:]]
run_dir = Path(resolved["supervisor"]["run_dir"])
held = main._lock(run_dir)
if held is None:
    sys.exit(main.EXIT_LOCKED)
from harmony_supervisor import running
fencer = [*main.PYTHON, "harmony_fencer", "--config", str(run_dir / "fencer.json")]
sys.exit(running.run(resolved, fencer, agent, None, main.Notifier()))
"""


class Rig:
    """Supervisor, fencer and scripted agent of one node."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.mode("renew")
        (node.run / "agent.py").write_text(AGENT)
        self._write(AGENT_PATIENCE_S)
        self.supervisors: list[subprocess.Popen[bytes]] = []

    def _write(self, agent_hung_s: float) -> None:
        """What the supervisor is started with."""
        node = self.node
        resolved = {
            "supervisor": {
                "node": "n1",
                "run_dir": str(node.run),
                "state_dir": str(node.state),
                "log_format": "json",
                "agent_user": None,
                "fence_timeout_s": FENCE_S,
                "ping_interval_s": 0.2,
                "ping_timeout_s": agent_hung_s,
            },
            "fencer": json.loads(node.config.read_text()),
            "agent": {},
        }
        (node.run / "resolved.json").write_text(json.dumps(resolved))

    def replace_hung_agents(self) -> None:
        """As soon as in production; to be said before the start."""
        self._write(pings(LEASE_S, None, None)[1])

    def mode(self, what: str) -> None:
        """What the agent does from its next round on: "renew", "idle" or "loop"."""
        (self.node.run / "agent.mode.new").write_text(what)
        (self.node.run / "agent.mode.new").rename(self.node.run / "agent.mode")

    def start(self, inside: Path | None = None, *, answers: bool = True) -> None:
        """A supervisor, in the cgroup `inside`; its agent is ready when this returns, its fencer if `answers`."""
        (self.node.run / "agent.ready").unlink(missing_ok=True)
        run = str(self.node.run)
        argv = [sys.executable, "-I", "-c", SUPERVISOR, f"{run}/resolved.json", f"{run}/agent.py", run]
        if inside is not None:
            argv = ["/bin/sh", "-c", 'echo 0 > "$0" && exec "$@"', f"{inside}/cgroup.procs", *argv]
        with (self.node.top / "fencer.log").open("ab") as log:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=log, cwd="/")
        self.supervisors.append(process)
        self.node.wait((self.node.run / "agent.ready").exists, "the agent is ready")
        if answers:
            self.node.wait(self.node._answers, "the fencer answers")

    @property
    def supervisor(self) -> int:
        return self.supervisors[-1].pid

    def pids(self, module: str) -> list[int]:
        """This node's processes with this word in their arguments."""
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError):
                    arguments = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
                    mine = any(a.startswith(os.fsencode(self.node.run)) for a in arguments)
                    if mine and module.encode() in b" ".join(arguments) and int(name) != os.getpid():
                        found.append(int(name))
        return found

    @property
    def fencer(self) -> int:
        """Whoever holds the lock."""
        return int((self.node.run / "fencer.lock").read_text())

    @property
    def agent(self) -> int:
        found = [p for p in self.pids("agent.py") if p not in {s.pid for s in self.supervisors}]
        assert len(found) == 1
        return found[0]

    def kill_supervisor(self) -> None:
        self.supervisors[-1].kill()
        self.supervisors[-1].wait()

    def fall_silent(self) -> int:
        """No more renewals; when the lease ends."""
        self.mode("idle")
        time.sleep(0.2)
        return self.deadline_ns()

    def deadline_ns(self) -> int:
        """The lease in force, as the fencer keeps it; a hung one cannot be asked."""
        path = self.node.run / leases.NAME
        lease = leases.load(path, boot_id=boot_id(), now_ns=boot_ns(), lease_ns=round(LEASE_S * 1e9))
        assert lease is not None, self.node.log()
        return lease.deadline_boottime_ns

    def destroy(self) -> None:
        for process in self.supervisors:
            process.kill()
            process.wait()
        until = time.monotonic() + pace.wait_s(10)
        while (left := self.pids("harmony_fencer") + self.pids("agent.py")) and time.monotonic() < until:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


@pytest.fixture(autouse=True)
def steady() -> Iterator[None]:
    """These tests are about moments: they get to run on a busy host (what they start does not inherit it)."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    yield
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.fixture
def node(template: Template) -> Iterator[Node]:
    """In memory: a disk that is busy with other tests would be measured too."""
    top = Path(tempfile.mkdtemp(prefix="hf-", dir=memory_folder()))
    top.chmod(0o755)
    made = Node(top, template)
    yield made
    made.destroy()
    shutil.rmtree(top)


@pytest.fixture
def rig(node: Node) -> Iterator[Rig]:
    made = Rig(node)
    try:
        yield made
    finally:
        made.destroy()


@contextlib.contextmanager
def leading(rig: Rig) -> Iterator[Writer]:
    """The rig started, PostgreSQL activated, the lease renewed by the agent, and a client that writes."""
    rig.start()
    rig.node.make_writable()
    with rig.node.writing() as writer:
        yield writer


def sleep_until(when_ns: int) -> None:
    time.sleep(max(0.0, (when_ns - boot_ns()) / 1e9))


def kept(node: Node, writer: Writer, deadline_ns: int, what: str) -> None:
    """The promise: no write acknowledged after the lease's end plus fence_timeout, and PostgreSQL gone."""
    end_ns = deadline_ns + round(FENCE_S * 1e9) + pace.SLACK_NS
    while node.pids() and boot_ns() < end_ns:
        time.sleep(0.02)
    gone_ms = (boot_ns() - deadline_ns) / 1e6
    time.sleep(0.15)  # nobody is left to write, or the promise is broken already
    late_ms = (writer.last_ns - deadline_ns) / 1e6
    said = f"{what}: last write acknowledged {late_ms:+.0f} ms, nobody left {gone_ms:+.0f} ms from the lease's end"
    print(said)
    assert late_ms <= FENCE_S * 1000 + pace.SLACK_MS, f"{said}\n{node.log()}"
    assert not node.pids(), f"{said}\n{node.log()}"
    assert (node.data / "standby.signal").exists()


def uninterrupted(writer: Writer, since_ns: int, within_s: float = 1.0) -> None:
    """Writes went on all the time since then, and go on: nobody here would start again what had been fenced."""
    writer.wait_for_more()
    gap_s = writer.longest_gap_s(since_ns, boot_ns())
    print(f"longest time without a write: {gap_s * 1000:.0f} ms")
    assert gap_s < within_s + pace.SLACK_S


# ---------------------------------------------------------------- an agent that lies


def far(generation: Generation) -> protocol.Renew:
    return protocol.Renew(generation=generation, deadline_boottime_ns=boot_ns() + 3600 * 10**9)


def test_renewals_that_do_not_count(node: Node) -> None:
    """W9, I3: from the past, of a lower, a higher, an unaccepted generation: refused by name, and the lease ends."""
    node.start()
    node.make_writable(2, 5)
    deadline_ns = node.status().lease_deadline_boottime_ns
    assert deadline_ns is not None
    with node.writing() as writer:
        while boot_ns() < deadline_ns - 50_000_000:
            past = protocol.Renew(generation=Generation(2, 5), deadline_boottime_ns=boot_ns() - 1)
            errors = [getattr(node.ask(past), "error", None)]
            for term, order in ((2, 4), (1, 9), (2, 6), (3, 1), (2**40, 0)):
                errors.append(getattr(node.ask(far(Generation(term, order))), "error", None))
            assert errors == ["lease_expired", *["not_active"] * 5]
            time.sleep(0.05)
        kept(node, writer, deadline_ns, "renewals that do not count")
    assert getattr(node.ask(far(Generation(2, 5))), "error", None) == "not_active", "revived"


def test_a_deadline_far_in_the_future_is_clamped(node: Node) -> None:
    """W9: whatever an agent asks for, silence ends it within one lease; in activate and in renew."""
    node.start()
    assert isinstance(node.activate(1, 1, seconds=86400), protocol.Accepted)
    assert (node.status().lease_deadline_boottime_ns or 0) <= boot_ns() + LEASE_S * 1e9
    assert node.outcome(renewing=True).state == "done"
    with node.writing() as writer:
        asked_ns = boot_ns()
        reply = node.ask(far(Generation(1, 1)))
        assert isinstance(reply, protocol.Renewed)
        now_ns = boot_ns()
        assert asked_ns + LEASE_S * 1e9 <= reply.deadline_boottime_ns <= now_ns + LEASE_S * 1e9
        kept(node, writer, now_ns + round(LEASE_S * 1e9), "a deadline in an hour")


# ---------------------------------------------------------------- an agent that dies or hangs


@pytest.mark.sampled(1)
@pytest.mark.parametrize("how", ["killed", "stopped", "loops"])
def test_an_agent_that(rig: Rig, how: str) -> None:
    """W9: it does not renew any more, whatever became of it (nor does the one that replaces it)."""
    rig.replace_hung_agents()
    with leading(rig) as writer:
        agent = rig.agent
        if how == "loops":
            rig.mode("loop")
        else:
            os.kill(agent, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
            rig.mode("idle")
        time.sleep(0.15)
        kept(rig.node, writer, rig.deadline_ns(), f"agent {how}")
        rig.mode("idle")
        rig.node.wait(lambda: agent not in rig.pids("agent.py"), "it is replaced", 5)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_an_agent_killed_or_frozen_and_replaced_in_time(rig: Rig, number: signal.Signals) -> None:
    """W9: the lease spans that a hang is noticed, and its restart; no write is lost."""
    rig.replace_hung_agents()
    with leading(rig) as writer:
        begun_ns, agent = boot_ns(), rig.agent
        os.kill(agent, number)
        time.sleep(LEASE_S + 0.5)
        rig.node.wait(lambda: agent not in rig.pids("agent.py"), "it is replaced")
        uninterrupted(writer, begun_ns)
        assert rig.node.status().self_fence is None or not pace.STRICT


# ---------------------------------------------------------------- a fencer that dies or hangs


def test_a_fencer_killed_while_it_leads(rig: Rig) -> None:
    """W9: replaced; the new one carries on under the lease, and PostgreSQL does not notice."""
    with leading(rig) as writer:
        begun_ns, fencer = boot_ns(), rig.fencer
        os.kill(fencer, signal.SIGKILL)
        time.sleep(LEASE_S + 0.5)
        uninterrupted(writer, begun_ns)
        assert rig.fencer != fencer
        assert rig.node.status().active == Generation(1, 1)
        kept(rig.node, writer, rig.fall_silent(), "the fencer's successor")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("number", "before_ms"),
    [
        (signal.SIGKILL, 300),
        (signal.SIGKILL, 30),
        (signal.SIGSTOP, 900),
        (signal.SIGSTOP, 300),
        (signal.SIGSTOP, 30),
        (signal.SIGSTOP, -5),  # in the middle of the fence
    ],
)
def test_a_fencer_that_dies_or_hangs_before_the_lease_ends(
    rig: Rig, number: signal.Signals, before_ms: int
) -> None:
    """W9: the supervisor kills it where it hangs, and starts another, which fences: all within fence_timeout."""
    with leading(rig) as writer:
        deadline_ns, fencer = rig.fall_silent(), rig.fencer
        sleep_until(deadline_ns - before_ms * 1_000_000)
        os.kill(fencer, number)
        kept(rig.node, writer, deadline_ns, f"fencer {number.name} {before_ms} ms before the lease's end")
        rig.node.wait(lambda: fencer not in rig.pids("harmony_fencer"), "the old one is dead", 5)
        rig.node.wait(lambda: rig.node._answers() and rig.fencer != fencer, "another one answers", 5)
        if before_ms == 30:  # at its start, not by the second net, for stray writability
            self_fence = rig.node.status().self_fence
            assert self_fence is not None
            assert "at start" in self_fence.reason
        rig.node.make_writable(2, 1)
        assert rig.node.writable()


# ---------------------------------------------------------------- a supervisor that dies or hangs


def test_an_orphaned_fencer_guards_the_lease_to_its_end(rig: Rig) -> None:
    """W9: the supervisor is SIGKILLed, the agent with it; the fencer takes no more orders, fences, and ends."""
    with leading(rig) as writer:
        fencer = rig.fencer
        rig.kill_supervisor()
        deadline_ns = rig.deadline_ns()
        time.sleep(0.2)
        refused = rig.node.activate(2, 1)
        assert isinstance(refused, protocol.Refusal)
        assert refused.error == "retiring"
        kept(rig.node, writer, deadline_ns, "supervisor killed")
        assert not rig.pids("agent.py")
        rig.node.wait(lambda: fencer not in rig.pids("harmony_fencer"), "the orphan ends", 3)


def test_a_new_supervisor_takes_over_under_the_lease(rig: Rig) -> None:
    """W9: killed and started again, as systemd does: the orphan goes, its successor carries on, no write is lost."""
    with leading(rig) as writer:
        begun_ns, fencer = boot_ns(), rig.fencer
        rig.kill_supervisor()
        rig.start()
        time.sleep(LEASE_S)
        uninterrupted(writer, begun_ns)
        assert rig.fencer != fencer
        assert fencer not in rig.pids("harmony_fencer")
        kept(rig.node, writer, rig.fall_silent(), "the new supervisor's fencer")


def test_a_stopped_supervisor_changes_nothing(rig: Rig) -> None:
    """W9: nothing needs it as long as the two live; it kills nobody when it goes on; the lease ends without it."""
    with leading(rig) as writer:
        begun_ns, fencer, agent = boot_ns(), rig.fencer, rig.agent
        os.kill(rig.supervisor, signal.SIGSTOP)
        time.sleep(1.3)
        os.kill(rig.supervisor, signal.SIGCONT)
        time.sleep(0.5)
        assert (rig.fencer, rig.agent) == (fencer, agent)
        uninterrupted(writer, begun_ns)
        os.kill(rig.supervisor, signal.SIGSTOP)
        kept(rig.node, writer, rig.fall_silent(), "supervisor stopped")
        os.kill(rig.supervisor, signal.SIGCONT)


def test_an_orphan_that_hangs_is_fenced_beside_and_killed(rig: Rig) -> None:
    """W9: supervisor killed, its fencer stopped, then everything is started anew; the node can be used again."""
    with leading(rig) as writer:
        fencer = rig.fencer
        rig.kill_supervisor()
        os.kill(fencer, signal.SIGSTOP)
        deadline_ns = rig.deadline_ns()
        rig.mode("idle")
        rig.start(answers=False)
        kept(rig.node, writer, deadline_ns, "an orphan that hangs")
        assert fencer not in rig.pids("harmony_fencer")
        rig.node.wait(rig.node._answers, "the new one answers")
        rig.mode("renew")
        rig.node.make_writable(2, 1)
        assert rig.node.writable()


def test_all_three_killed(rig: Rig) -> None:
    """W9: nobody guards, so systemd's last resort fences at once; beside a living fencer it does nothing."""
    with leading(rig) as writer:
        argv = rig.node.argv("--if-unguarded", "test")
        assert subprocess.run(argv, check=False, capture_output=True).returncode == 0
        assert rig.node.writable(), "a fencer is there: it guards the lease"
        fencer, agent = rig.fencer, rig.agent
        os.kill(rig.supervisor, signal.SIGSTOP)  # it would replace the others
        os.kill(fencer, signal.SIGKILL)
        os.kill(agent, signal.SIGKILL)
        rig.kill_supervisor()
        deadline_ns = rig.deadline_ns()
        done = subprocess.run(argv, check=False, capture_output=True)
        assert done.returncode == 0
        assert json.loads(done.stdout)["proven"] is True
        assert not rig.node.pids()
        kept(rig.node, writer, deadline_ns, "all three killed, --if-unguarded")


def test_the_one_shot_beside_a_fencer_that_hangs(rig: Rig) -> None:
    """W9, O7: proven and latched though nobody answers; the latch holds for the hung one and its successor."""
    with leading(rig) as writer:
        fencer = rig.fencer
        os.kill(rig.supervisor, signal.SIGSTOP)
        os.kill(fencer, signal.SIGSTOP)
        deadline_ns = rig.deadline_ns()
        argv = rig.node.argv("--once", "the rack burns", "--latch", "anna")
        done = subprocess.run(argv, check=False, capture_output=True)
        ended_ns = boot_ns()
        assert done.returncode == 0
        assert json.loads(done.stdout)["proven"] is True
        os.kill(fencer, signal.SIGCONT)
        reply = rig.node.activate(2, 1)
        assert getattr(reply, "error", "") == "latched", "the one that hung"
        os.kill(rig.supervisor, signal.SIGCONT)
        os.kill(fencer, signal.SIGKILL)
        rig.node.wait(lambda: rig.fencer != fencer and rig.node._answers(), "a successor", 5)
        assert getattr(rig.node.activate(2, 1), "error", "") == "latched", "its successor"
        latch = rig.node.status().latch
        assert latch is not None
        assert (latch.reason, latch.who) == ("the rack burns", "anna")
        kept(rig.node, writer, deadline_ns, "the one-shot")
        assert writer.last_ns < ended_ns


# ---------------------------------------------------------------- a node that stands still


@pytest.mark.sampled(1)
@pytest.mark.parametrize("own_cgroup", [True, False])
def test_a_node_frozen_beyond_its_lease(node: Node, own_cgroup: bool) -> None:
    """W9: fencer, supervisor, agent and PostgreSQL stop together, as a paused virtual machine; CLOCK_BOOTTIME goes on.

    After the thaw the fencer is as late as the pause was long; no more writes than fit into its waking up.
    """
    node.configure(cgroup=own_cgroup)
    rig = Rig(node)
    mount = cgroup.mount_point()
    whole = cgroup.Cgroup(Path(str(mount)) / f"hf-node-{rig.node.port}")
    try:
        whole.path.mkdir()
    except OSError as e:
        pytest.skip(f"no cgroup v2 that can be written: {e}")
    try:
        rig.start(inside=whole.path)
        rig.node.make_writable()
        with rig.node.writing() as writer, rig.node.writing():
            assert whole.freeze(1.0)
            deadline_ns, frozen_ns = rig.deadline_ns(), boot_ns()
            time.sleep(0.1)
            assert writer.last_ns <= frozen_ns + 20_000_000 + pace.SLACK_NS
            sleep_until(deadline_ns + round(FENCE_S * 1e9) + 200_000_000)
            written, thawed_ns = len(writer.acks), boot_ns()
            whole.thaw()
            rig.node.wait(lambda: not rig.node.pids(), "fenced", FENCE_S)
            time.sleep(0.2)
            after = writer.acks[written:]
            last_ms = (max(after, default=thawed_ns) - thawed_ns) / 1e6
            print(f"after the thaw: {len(after)} writes of one client, the last {last_ms:.1f} ms after it")
            assert last_ms <= 150 + pace.SLACK_MS
        rig.node.wait(lambda: rig.node.status().fence_proven, "proven")
    finally:
        rig.destroy()
        rig.node.destroy()
        for path in (*whole._beneath(), whole.path):
            with contextlib.suppress(OSError):
                path.rmdir()


def test_the_rig_leaves_nothing_behind(template: Template) -> None:
    """The tests' own duty: no process, no cgroup."""
    top = Path(tempfile.mkdtemp(prefix="hf-", dir=memory_folder()))
    top.chmod(0o755)
    rig = Rig(Node(top, template))
    try:
        rig.start()
        rig.node.make_writable()
        rig.destroy()
        rig.node.destroy()
        assert not rig.node.pids() + rig.pids("harmony") + rig.pids("agent.py")
    finally:
        rig.destroy()
        rig.node.destroy()
        shutil.rmtree(top)
