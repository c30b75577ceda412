"""What hostile hands, other users and an exhausted host can do to the fencer: none of it makes a lease longer.

A real fencer and a real PostgreSQL; each test is something an adversary once did, with success. Asserted is the
promise (no acknowledged write after lease end + fence_timeout), and that the fencer lives on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from harmony.fencer_client import call
from harmony_fencer import cgroup, durable, main, processes, protocol, server
from harmony_fencer import state as states
from harmony_fencer import tree as trees
from harmony_fencer.programs import log_tail
from harmony_fencer.protocol import Generation, OrderRecord
from harmony_fencer.tree import Tree
from harmony_fencer.watchdog import Policy
from tests import pace
from tests.fencer.fakes import FakeClock, FakeWatchdog
from tests.fencer.node import FENCE_S, Node, Writer, boot_ns

pytestmark = [pytest.mark.real, pytest.mark.sampled(0.5)]
AS_ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not AS_ROOT, reason="needs root")
SHORT_S = 1.0  # of a lease, where nothing happens in it but its end
AGENT = 65534 if AS_ROOT else os.getuid()


@contextlib.contextmanager
def leased(node: Node) -> Iterator[tuple[Writer, int]]:
    """A client that writes under a lease renewed just now: it, and the lease's end."""
    with node.writing(0.005) as writer:
        reply = node.renew(1, 1)
        assert isinstance(reply, protocol.Renewed)
        yield writer, reply.deadline_boottime_ns


def kept(node: Node, writer: Writer, deadline_ns: int, more_s: float = 0.3) -> None:
    """W9: wait until the promise is due; not one write was acknowledged after it."""
    due_ns = deadline_ns + round(FENCE_S * 1e9)
    time.sleep(max(0, due_ns - boot_ns()) / 1e9 + more_s)
    node.wait(lambda: boot_ns() - writer.last_ns > 500_000_000, "writes end")  # also where the bound is slack
    late_s = (writer.last_ns - due_ns) / 1e9
    assert late_s <= pace.SLACK_S, f"written {late_s:.2f} s after lease end + fence_timeout: {node.log()}"


def once(node: Node, *more: str) -> subprocess.CompletedProcess[bytes]:
    """The one-shot fence."""
    return subprocess.run(
        node.argv("--once", *(more or ("test",))), capture_output=True, timeout=60, check=False
    )


def as_owner(node: Node, *argv: str) -> None:
    """What PostgreSQL's user may do."""
    owner = node.data.stat()
    subprocess.run(
        argv,
        check=True,
        user=owner.st_uid,
        group=owner.st_gid,
        extra_groups=[] if AS_ROOT else None,
        cwd=node.data,
    )


# ---------------------------------------------------------------- traps in PostgreSQL's folder


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """It comes back, or the test fails."""

    def late(*_: object) -> None:
        raise AssertionError("it waits for a trap")

    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def trap(path: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "symlink":  # to what is another's, and could be read
        target = path.with_name(path.name + ".elsewhere")
        target.write_bytes(b"1\n")
        path.symlink_to(target)
    elif kind == "symlink to a fifo":
        os.mkfifo(path.with_name("elsewhere"))
        path.symlink_to("elsewhere")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 1 << 40)


READERS: dict[str, Callable[[Path], object]] = {
    "postmaster.pid": lambda folder: processes.pid_file(str(folder)),
    "harmony.witness": lambda folder: states.witness(folder / states.WITNESS, "n1"),
    "harmony-postgres.log": lambda folder: log_tail(folder).strip("\0"),
    ".s.PGSQL.5432.lock": lambda folder: trees._lock(folder / ".s.PGSQL.5432.lock"),
}
TRAPS = ["fifo", "symlink", "symlink to a fifo", "socket", "folder", "huge"]


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", TRAPS)
def test_a_trap_is_not_read(name: str, kind: str) -> None:
    """W9: nothing but a plain file is opened, and of it only a little read."""
    with tempfile.TemporaryDirectory() as folder:
        trap(Path(folder) / name, kind)
        with at_once():
            found = READERS[name](Path(folder))
        nothing = found in {None, ""} or (kind == "huge" and found == trees.EMPTY)
        assert nothing, found


def test_what_is_plain_is_read(tmp_path: Path) -> None:
    """From its beginning or to its end, and not more than asked for."""
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    assert durable.read_small(path, 4) == b"0123"
    assert durable.read_small(path, 4, tail=True) == b"6789"
    assert durable.read_small(path, 99, tail=True) == b"0123456789"


def test_fifos_everywhere_in_the_data_directory(node: Node) -> None:
    """W9: set by PostgreSQL's own user under the lease: the fence comes in time, and so does whoever comes after."""
    node.configure(lease_s=SHORT_S)
    node.start()
    node.make_writable()
    with leased(node) as (writer, deadline_ns):
        names = ("postmaster.pid", "harmony.witness", "harmony-postgres.log")
        as_owner(node, "sh", "-c", "for n; do mv $n aside.$n; mkfifo $n; done", "sh", *names)
        lock = node.top / "s" / f".s.PGSQL.{node.port}.lock"
        lock.unlink()
        os.mkfifo(lock)
        kept(node, writer, deadline_ns)
    assert node.status().fence_proven
    began = time.monotonic()
    assert once(node).returncode == 0
    node.kill_fencer()
    node.start()
    assert time.monotonic() - began < 10 + pace.SLACK_S
    assert node.status().trusted


# ---------------------------------------------------------------- the directory itself


def test_the_data_directory_is_renamed_under_the_lease(node: Node) -> None:
    """W9, I6: its processes are those of the directory that stood there, whatever it is called now."""
    node.configure(cgroup=False, lease_s=SHORT_S)
    node.start()
    node.make_writable()
    elsewhere = node.top / "elsewhere"
    with leased(node) as (writer, deadline_ns):
        node.data.rename(elsewhere)
        kept(node, writer, deadline_ns)
    try:
        assert node.status().fence_proven
        assert not processes.of_data_dir(str(elsewhere))
    finally:
        elsewhere.rename(node.data)
    node.wait((node.data / "standby.signal").exists, "it is marked when it is back")


@pytest.mark.parametrize("held", ["cgroup", "tree"])
@pytest.mark.parametrize("after", ["the one-shot", "a new fencer"])
def test_it_is_renamed_and_the_fencer_dies(node: Node, held: str, after: str) -> None:
    """W9, I6: who comes after it finds in run_dir where PostgreSQL lives."""
    node.configure(cgroup=held == "cgroup")
    node.start()
    node.make_writable()
    elsewhere = node.top / "elsewhere"
    with leased(node) as (writer, deadline_ns):
        node.kill_fencer()
        node.data.rename(elsewhere)
        if after == "a new fencer":
            node.start()
            node.wait(lambda: node.status().fence_proven, "it fences")
        else:
            done = once(node)
            assert done.returncode == 0, done.stdout
        assert not processes.of_data_dir(str(elsewhere))
        assert writer.last_ns < deadline_ns
    elsewhere.rename(node.data)


def test_a_proven_fence_forgets_where_it_was(node: Node) -> None:
    """The number of a directory that is gone may be another's: it is remembered only while somebody may be in it."""
    node.start()
    node.make_writable()
    wanted = processes.Place(str(node.data), notes=node.run / "places.json").identity()
    here = processes.identity(str(node.data))
    assert wanted == here is not None
    old = node.top / "old"
    node.data.rename(old)
    shutil.copytree(old, node.data)
    node.fence(1, 2)
    seen = processes.Place(str(node.data), notes=node.run / "places.json").identity()
    now = processes.identity(str(node.data))
    assert seen is not None
    assert now is not None
    assert seen.places == now.places
    assert here.places != now.places


@needs_root
def test_the_data_directory_becomes_roots(node: Node) -> None:
    """W9: whose processes are looked for is in the configuration, not in the folder's owner."""
    node.configure(cgroup=False, lease_s=SHORT_S)
    node.start()
    node.make_writable()
    owner = node.data.stat().st_uid
    with leased(node) as (writer, deadline_ns):
        os.chown(node.data, 0, 0)
        kept(node, writer, deadline_ns)
        left = processes.of_data_dir(processes.Place(str(node.data), owner))
    assert not left


# ---------------------------------------------------------------- an exhausted host


def test_no_descriptor_is_left_for_the_fencer(node: Node) -> None:
    """W9, I6: the fence needs none; its proof does, and is not given without. What lives is not said to be down."""
    node.start()
    node.make_writable()
    assert node.process is not None
    pid = node.process.pid
    with leased(node) as (writer, deadline_ns), socket.socket(socket.AF_UNIX) as open_before:
        open_before.settimeout(5)
        open_before.connect(str(node.run / "fencer.sock"))

        def status() -> protocol.Status:
            open_before.sendall(protocol.frame(protocol.StatusRequest()))
            raw = open_before.recv(1 << 20)
            reply = protocol.decode_reply(raw[protocol.HEADER.size :])
            assert isinstance(reply, protocol.Status)
            return reply

        assert status().postgres == "running"
        usual = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, usual[1]))
        try:
            time.sleep(1.3)  # longer than the watch looks away
            assert status().postgres == "running"
            kept(node, writer, deadline_ns)
            assert not status().fence_proven
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, usual)
    node.wait(lambda: node.status().fence_proven, "with descriptors it is proven")
    assert node.process.poll() is None


def test_what_cannot_be_looked_at_is_not_gone(node: Node) -> None:
    """I6: with no descriptor left nothing is proven, and its cgroup is frozen all the same."""
    node.start()
    node.make_writable()
    node.kill_fencer()
    tree = Tree(str(node.data))
    wanted, master = processes.identity(str(node.data)), node.postmaster()
    assert wanted is not None
    looks: dict[str, Callable[[], object]] = {
        "pids": tree.pids,
        "postmaster": tree.postmaster,
        "belongs": lambda: processes.belongs(master, wanted),
        "listening": lambda: processes.listening(node.port),
    }
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    told: dict[str, object] = {}
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, usual[1]))
    try:
        for name, look in looks.items():
            try:
                told[name] = look()
            except OSError as e:
                told[name] = e.errno
        gone, signalled = tree.gone(), tree.signal_postmaster(signal.SIGCONT)
        tree.halt()
        frozen = tree.own.frozen() if tree.own is not None else None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)
        with contextlib.suppress(OSError):
            if tree.own is not None:
                tree.own.thaw()
    assert told == dict.fromkeys(looks, errno.EMFILE)
    assert (gone, signalled) == (False, False)
    assert frozen in {True, None}
    assert node.writable()


class Tasks:
    """A cgroup in which no thread and no process can be started, as at a unit's TasksMax."""

    def __init__(self) -> None:
        v1, v2 = Path("/sys/fs/cgroup/pids"), cgroup.mount_point()
        top = v1 if v1.is_dir() else v2
        if top is None:
            pytest.skip("needs the pids controller")
        self.path = top / f"harmony-test-{os.getpid()}"
        try:
            self.path.mkdir()
            (self.path / "pids.max").write_text("max")
        except OSError as e:
            with contextlib.suppress(OSError):
                self.path.rmdir()
            pytest.skip(f"needs the pids controller: {e}")

    def run(self, *argv: str) -> list[str]:
        """argv of a program that starts nothing."""
        enter = 'echo $$ > "$0/cgroup.procs" && echo 1 > "$0/pids.max" && exec "$@"'
        return ["/bin/sh", "-c", enter, str(self.path), *argv]

    def __enter__(self) -> Tasks:
        return self

    def more(self) -> None:
        (self.path / "pids.max").write_text("max")

    def __exit__(self, *_: object) -> None:
        for pid in (self.path / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (self.path.parent / "cgroup.procs").write_text(pid)
        until = time.monotonic() + pace.wait_s(5)
        while self.path.exists() and time.monotonic() < until:
            with contextlib.suppress(OSError):
                self.path.rmdir()
            time.sleep(0.01)


def test_no_thread_is_left_for_the_fencer(node: Node) -> None:
    """W9, I3: an activate is refused, the lease's end is kept, and with threads again all is as before."""
    node.start()
    node.make_writable()
    with Tasks() as tasks, leased(node) as (writer, deadline_ns):
        node.kill_fencer()
        with (node.top / "fencer.log").open("ab") as log:
            node.process = subprocess.Popen(tasks.run(*node.argv()), stderr=log, cwd="/")
        # Its log needs a thread, and so it may not even start: then its supervisor's turn would come.
        node.wait(lambda: node._answers() or node.process.poll() is not None, "it answers or ends")
        assert node.process.poll() is None, node.log()
        assert node.status().active == Generation(1, 1)
        reply = node.activate(1, 2)
        assert isinstance(reply, protocol.Refusal)
        assert reply.error == "storage_failed"
        kept(node, writer, deadline_ns)
        assert node.process.poll() is None, node.log()
        assert node.status().fence_proven
        tasks.more()
        node.make_writable(1, 2)
        node.kill_fencer(signal.SIGTERM)


def test_no_thread_is_left_for_the_one_shot(node: Node) -> None:
    """W9: nor for its log: it fences and proves it."""
    node.start()
    node.make_writable()
    node.kill_fencer()
    with Tasks() as tasks:
        done = subprocess.run(
            tasks.run(*node.argv("--once", "x")), capture_output=True, timeout=60, check=False
        )
    assert done.returncode == 0, done.stderr
    assert not node.pids()


def test_no_thread_is_left_for_the_supervisor(tmp_path: Path) -> None:
    """W9: its one-shot cannot be run, its children cannot be started, and it lives on."""
    code = (
        "import sys, trio; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from tests.supervisor.test_supervisor import Run\n"
        "run = Run(Path(sys.argv[2]))\n"
        "async def main():\n"
        "    assert await run.supervisor._fence_once() is False\n"
        "    with trio.move_on_after(1) as scope:\n"
        "        await run.supervisor.fencer.run()\n"
        "    assert scope.cancelled_caught and len(run.supervisor.fencer.deaths) > 1\n"
        "trio.run(main)\n"
    )
    argv = [sys.executable, "-c", code, str(Path(__file__).parents[2]), str(tmp_path)]
    with Tasks() as tasks:
        done = subprocess.run(tasks.run(*argv), capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


NO_TEMPORARY = """
mount --make-rprivate / && mount --bind {top} {top} && mount -o remount,ro,bind / || exit 99
for f in /tmp /var/tmp /dev/shm; do case {top} in $f/*) ;; *) mount -t tmpfs -o ro none $f || exit 99;; esac; done
exec "$@"
"""


@needs_root
def test_no_folder_for_temporary_files(node: Node) -> None:
    """W9: a host whose disks are read-only or full: PostgreSQL's programs are run, their output is kept in memory."""
    node.start()
    node.make_writable()
    node.kill_fencer()
    script = NO_TEMPORARY.format(top=node.top)
    with (node.top / "fencer.log").open("ab") as log:
        argv = ["unshare", "-m", "/bin/sh", "-c", script, "sh", *node.argv()]
        node.process = subprocess.Popen(argv, stderr=log, cwd="/")
    node.wait(lambda: node._answers() or node.process.poll() is not None, "it answers or ends")
    if node.process.poll() == 99:
        pytest.skip("mounts are not allowed here")
    node.make_writable(1, 2)
    assert node.writable()


def test_the_socket_cannot_be_made(node: Node) -> None:
    """A host without room or memory: a restart may help (1), it is not the configuration (78, nothing restarts)."""
    far = node.top / (
        "x" * 100
    )  # no socket's path may be so long: bind() fails as it does for want of memory
    node.run.rename(far)
    node.run, node.config = far, far / "fencer.json"
    node.configure(run_dir=str(far))
    done = subprocess.run(node.argv(), capture_output=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert b"socket" in done.stderr


# ---------------------------------------------------------------- a fence that was cut short


@pytest.mark.parametrize("op", ["fence", "follow"])
def test_if_unguarded_after_a_fence_that_was_only_accepted(node: Node, op: protocol.OrderOp) -> None:
    """I3: all of Harmony died before the newest order was carried out: a promotion may be under way, whatever
    standby.signal says."""
    node.start()
    node.follow(1, 1)
    node.kill_fencer()
    state, why = states.load(node.state, node="n1")
    assert not why
    order = OrderRecord(Generation(1, 3), op, None, "running")
    states.write(node.state, msgspec.structs.replace(state, highest=order.generation, order=order))
    done = subprocess.run(node.argv("--if-unguarded", "boot"), capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
    assert not node.pids()


def test_a_standby_that_a_fence_left_frozen_is_finished(node: Node) -> None:
    """I6: the fencer died between freezing and killing: its successor finishes it, and can start it again."""
    node.start()
    group = Tree(str(node.data)).own
    if group is None:
        pytest.skip("needs a cgroup of v2")
    node.follow(1, 1)
    node.kill_fencer()
    assert group.freeze(2)
    node.start()
    node.wait(lambda: node.status().fence_proven, "it is finished")
    assert not node.pids()
    assert not group.frozen()
    node.follow(1, 2)
    assert node.in_recovery()


# ---------------------------------------------------------------- what does not speak UTF-8


def test_settings_that_are_not_utf_8(node: Node) -> None:
    """PostgreSQL takes any byte in its files: the fencer lives, and still sees what would override it."""
    node.start()
    node.make_writable()
    auto = node.data / "postgresql.auto.conf"
    for file in (auto, node.data / "postgresql.conf"):
        with file.open("ab") as f:
            f.write(b"# gr\xfc\xdfe\n")
    node.make_writable(1, 2)
    with auto.open("ab") as f:
        f.write(b"synchronous_standby_names = 'gr\xfc\xdfe'\n")
    assert isinstance(node.activate(1, 3), protocol.Accepted)
    record = node.outcome()
    assert (record.state, "synchronous_standby_names" in record.detail) == ("failed", True)
    assert node.process is not None
    assert node.process.poll() is None


def test_a_reason_that_is_not_utf_8(node: Node) -> None:
    """An operator's terminal may be of another world: the one-shot fences, and latches, all the same."""
    node.start()
    node.make_writable()
    node.kill_fencer()
    reason = b"gr\xfc\xdfe".decode("utf-8", "surrogateescape")
    done = once(node, reason, "--latch", reason)
    assert done.returncode == 0, done.stderr
    assert not node.pids()
    latch = states.latch(node.state)
    assert latch is not None
    assert latch.reason == latch.who == "gr??e"


# ---------------------------------------------------------------- whose process it is, what lies in the way


@pytest.mark.parametrize("how", ["script", "module"])
def test_a_supervisor_is_recognised_however_it_was_started(tmp_path: Path, how: str) -> None:
    """O1: the unit starts bin/harmony-supervisor: its fencer is no orphan, and is not killed as one."""
    if how == "script":
        script = tmp_path / "harmony-supervisor"
        script.write_text("import time\ntime.sleep(60)\n")
        argv = [sys.executable, str(script), "--config", "x"]
    else:
        argv = [sys.executable, "-c", "import time; time.sleep(60)", "-m", "harmony_supervisor"]
    with subprocess.Popen(argv) as process:
        try:
            # Popen returns at the close-on-exec, a moment before the new command line can be read.
            while not Path(f"/proc/{process.pid}/cmdline").read_bytes():
                time.sleep(0.001)
            assert main._is_ours(process.pid, b"harmony_supervisor")
            assert not main._is_ours(process.pid, b"harmony_fencer")
        finally:
            process.kill()


def test_a_marker_that_cannot_be_removed(tmp_path: Path) -> None:
    """W9: the watchdog is disarmed all the same, and again and again: nothing here ends the fencer."""
    marker = tmp_path / "watchdog.armed"
    watchdog = FakeWatchdog(FakeClock())
    policy = Policy("required", 5, watchdog, marker)
    policy.arm()
    marker.unlink()
    marker.mkdir()  # unlink() fails for root, too
    for _ in range(2):
        policy.disarm()
        assert not watchdog.armed
    assert "disarmed" in str(policy)


# ---------------------------------------------------------------- floods

FLOOD = """
import os, socket, struct, sys, threading, time
path, uid, connections, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
if uid != os.getuid():
    os.setresuid(uid, uid, uid)
body = b'{"op":"status","v":1}'
frame = struct.pack(">I", len(body)) + body
counts = [0] * connections

def flood(number):
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(path)
        s.setblocking(False)
        out, buffer = b"", b""
        while True:
            out = out or frame * 50
            try:
                out = out[s.send(out):]
            except BlockingIOError:
                time.sleep(0.002)
            try:
                buffer += s.recv(1 << 20)
            except BlockingIOError:
                continue
            while len(buffer) >= 4 and len(buffer) >= 4 + (n := struct.unpack(">I", buffer[:4])[0]):
                buffer, counts[number] = buffer[4 + n:], counts[number] + 1

for n in range(connections):
    threading.Thread(target=flood, args=(n,), daemon=True).start()
print("ready", flush=True)
began = time.monotonic()
time.sleep(seconds)
print(sum(counts), time.monotonic() - began, flush=True)
"""


@contextlib.contextmanager
def flooding(node: Node, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """The agent's user asks as much as it can, over half of its connections."""
    argv = [sys.executable, "-c", FLOOD, str(node.run / "fencer.sock"), str(AGENT), "4", str(seconds)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@needs_root
def test_a_flood_of_the_agents_user_is_slowed_and_root_is_not(node: Node) -> None:
    """W9: so many requests a second over all its connections; root's fence goes through as if it were not there."""
    node.configure(agent_uid=AGENT)
    node.start()
    node.make_writable()
    seconds = 2.0
    with flooding(node, seconds) as flood:
        time.sleep(0.7)
        began = time.monotonic()
        record = node.fence(1, 2)
        assert time.monotonic() - began < FENCE_S + 1 + pace.SLACK_S
        assert record.state == "done"
        assert flood.stdout is not None
        answered, took_s = (float(word) for word in flood.stdout.readline().split())
    assert answered <= server.AGENT_BURST + server.AGENT_PER_S * took_s * 1.1 + 10
    assert not pace.STRICT or answered >= server.AGENT_PER_S * took_s * 0.5


@pytest.mark.parametrize("flooded", [False, pytest.param(True, marks=needs_root)])
def test_the_long_poll(node: Node, flooded: bool) -> None:
    """O5: answered at once when there is news, when it comes, and at the latest after wait_ms."""
    node.configure(agent_uid=AGENT)
    node.start()

    def ask(unless: int | None, wait_s: float) -> tuple[float, protocol.Status]:
        began = time.monotonic()
        request = protocol.StatusRequest(unless=unless, wait_ms=round(wait_s * 1000))
        reply = call(str(node.run / "fencer.sock"), request, timeout_s=20)
        assert isinstance(reply, protocol.Status)
        return time.monotonic() - began, reply

    with flooding(node, 60) if flooded else contextlib.nullcontext():
        node.wait(lambda: ask(ask(None, 0)[1].change, 0.5)[0] > 0.4, "nothing changes any more")
        change = ask(None, 1)[1].change
        for unless in (None, change - 1):
            took_s, status = ask(unless, 1)
            assert took_s < 0.5 + pace.SLACK_S
            assert status.change == change
        took_s, status = ask(change, 0.5)
        assert 0.5 <= took_s < 0.95 + pace.SLACK_S
        assert status.change == change

        def order_soon() -> None:
            time.sleep(0.3)
            node.ask(protocol.Fence(generation=Generation(1, 1), reason="news"))

        thread = threading.Thread(target=order_soon)
        thread.start()
        took_s, status = ask(change, 1)
        thread.join()
        assert 0.2 < took_s < 0.8 + pace.SLACK_S
        assert status.change != change
        assert status.highest == Generation(1, 1)
