"""The supervisor's parts over real files, sockets and processes: lock, modes, environment, back-off, systemd."""

from __future__ import annotations

import json
import os
import pwd
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from harmony_supervisor import child as children
from harmony_supervisor.child import Child, Spec, heard_at
from harmony_supervisor.main import _folders, _lock, _resolved, _write
from harmony_supervisor.notify import Notifier
from harmony_supervisor.supervisor import Settings, Supervisor

AS_ROOT = os.geteuid() == 0
NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hsup") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---------------------------------------------------------------- main's files


def test_one_supervisor_holds_the_lock(folder: Path) -> None:
    held = _lock(folder)
    assert held is not None
    assert _lock(folder) is None
    assert mode(folder / "supervisor.lock") == 0o600
    assert not os.get_inheritable(held), "a child that outlives us must not hold it"
    os.close(held)
    again = _lock(folder)
    assert again is not None
    os.close(again)


@pytest.mark.parametrize(("wanted", "mask"), [(0o600, 0), (0o644, 0o077)])
def test_files_have_their_mode_whatever_the_umask(folder: Path, wanted: int, mask: int) -> None:
    """Also over an older file that was readable, and never through a symlink that waits in its place."""
    path = folder / "fencer.json"
    path.write_text("old")
    path.chmod(0o666)
    elsewhere = folder / "elsewhere"
    elsewhere.write_text("precious")
    path.with_suffix(".new").symlink_to(elsewhere)
    with umask(mask):
        _write(path, {"a": 1}, wanted)
    assert json.loads(path.read_text()) == {"a": 1}
    assert mode(path) == wanted
    assert elsewhere.read_text() == "precious"


def test_the_folders_modes(folder: Path) -> None:
    owner = (NOBODY, NOBODY) if AS_ROOT else None
    with umask(0):
        _folders(folder / "run", folder / "state", owner)
    assert (mode(folder / "run"), mode(folder / "state")) == (0o755, 0o711)
    assert mode(folder / "state" / "agent") == 0o700
    if AS_ROOT:
        for made in (folder / "run" / "agent", folder / "state" / "agent"):
            assert (made.stat().st_uid, made.stat().st_gid) == (NOBODY, NOBODY)
        assert (folder / "run").stat().st_uid == (folder / "state").stat().st_uid == 0


@pytest.mark.parametrize(("code", "expected"), [(78, 78), (1, 1), (3, 1)])
def test_a_configuration_that_is_not_resolved(
    code: int, expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """78: a restart does not help. Anything else may be of the moment."""
    script = f"import sys; sys.stderr.write('what is wrong'); sys.exit({code})"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with pytest.raises(SystemExit) as ended:
        _resolved(process)
    assert ended.value.code == expected
    assert "what is wrong" in capsys.readouterr().err


CONFIG = """
[cluster]
id = "c1"
preferred_primary = "n1"
[node]
name = "n1"
run_dir = "{folder}/run"
state_dir = "{folder}/state"
[members]
n1.host = "10.0.0.1"
n2.host = "10.0.0.2"
[agent]
{agent}
[postgresql]
data_dir = "{folder}/data"
bin_dir = "{folder}/bin"
{user}
"""


def configured(folder: Path) -> Path:
    data = folder / "data"
    (folder / "bin").mkdir()
    data.mkdir(mode=0o700)
    (data / "postgresql.conf").touch()
    (data / "PG_VERSION").write_text("15\n")
    for name in ("postgres", "pg_ctl", "pg_controldata"):
        (folder / "bin" / name).touch()
    if AS_ROOT:
        os.chown(data, NOBODY, NOBODY)
    user = pwd.getpwuid(NOBODY).pw_name
    text = CONFIG.format(
        folder=folder,
        user=f'user = "{user}"' if AS_ROOT else "",
        agent=f'user = "{user}"' if AS_ROOT else "",
    )
    (folder / "harmony.toml").write_text(text)
    return folder / "harmony.toml"


def supervise(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-I", "-m", "harmony_supervisor", "--config", str(configured(folder)), *more]
    with umask(0):
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120, cwd="/")


@pytest.mark.real
def test_a_second_supervisor_is_turned_away_and_changes_nothing(folder: Path) -> None:
    """75. The first one's children go on by what they were started with."""
    (folder / "run").mkdir()
    held = _lock(folder / "run")
    assert held is not None
    done = supervise(folder)
    assert done.returncode == 75, done.stderr
    assert "another one runs here" in done.stderr
    assert not (folder / "run" / "fencer.json").exists()
    os.close(held)


@pytest.mark.real
def test_the_boot_fence_writes_what_the_processes_read_and_fences(folder: Path) -> None:
    """fencer.json holds what PostgreSQL is started with: nobody but its owner reads or writes it."""
    (folder / "run").mkdir()
    held = _lock(folder / "run")  # a supervisor that runs already is none of its business
    assert held is not None
    done = supervise(folder, "--boot-fence")
    os.close(held)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["reason"] == "boot"
    assert (folder / "data" / "standby.signal").exists()
    assert mode(folder / "run" / "fencer.json") == 0o600
    assert mode(folder / "run" / "agent.json") == 0o644
    if AS_ROOT:
        assert (folder / "run" / "agent").stat().st_uid == NOBODY


# ---------------------------------------------------------------- systemd


@contextmanager
def listening(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        sock.settimeout(30)
        yield sock


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_hears_it(folder: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    path = f"@hsup-{os.getpid()}" if abstract else str(folder / "n.sock")
    with listening("\0" + path[1:] if abstract else path) as sock:
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        notifier = Notifier()
        assert "NOTIFY_SOCKET" not in os.environ, "no child speaks for us"
        notifier.send("READY=1", "STATUS=x")
        assert sock.recv(5000) == b"READY=1\nSTATUS=x"
        notifier.send("STATUS=" + "x" * 9000)
        assert len(sock.recv(9000)) == 4000


def test_a_systemd_that_is_not_there_or_full_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Notifier().send("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(folder / "nobody"))
    Notifier().send("READY=1")
    with listening(str(folder / "n.sock")):
        monkeypatch.setenv("NOTIFY_SOCKET", str(folder / "n.sock"))
        full = Notifier()

        def fill() -> None:
            for _ in range(2000):  # never waits: its queue is full long before
                full.send("STATUS=" + "x" * 3000)

        thread = threading.Thread(target=fill, daemon=True)
        thread.start()
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("usec", "pid", "expected"),
    [("3000000", "", 3.0), ("3000000", "mine", 3.0), ("3000000", "1", None), ("", "", None), ("x", "", None)],
)
def test_whose_watchdog_it_is(
    monkeypatch: pytest.MonkeyPatch, usec: str, pid: str, expected: float | None
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "mine" else pid)
    assert Notifier().watchdog_s == expected
    assert "WATCHDOG_USEC" not in os.environ
    assert "WATCHDOG_PID" not in os.environ


class Told(Notifier):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.watchdog_s = 3.0

    def send(self, *lines: str) -> None:
        self.lines += lines


SPEC = Spec("x", ["/nonexistent"], 0.05, 60)


async def test_the_watchdog_is_petted_only_while_both_answer(autojump_clock: trio.testing.MockClock) -> None:
    """O1: a supervisor whose children hang and cannot be replaced is ended by systemd."""
    told = Told()
    supervisor = Supervisor(Settings("n1", 1, 2), SPEC, SPEC, [], told)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervisor._watchdog)
        await trio.sleep(9.5)
        assert told.lines == ["WATCHDOG=1"] * 10, "before both are up, three times in its timeout"
        supervisor._was_ready = True
        for one, other in (
            (supervisor.fencer, supervisor.agent),
            (supervisor.agent, supervisor.fencer),
        ):
            one.ready, one.last_pong = True, time.monotonic() + 1e6
            other.ready, other.last_pong = True, time.monotonic() - 61
            told.lines.clear()
            await trio.sleep(30)
            assert told.lines == [], "one of them hangs"
            other.ready, other.last_pong = False, time.monotonic() + 1e6
            await trio.sleep(30)
            assert told.lines == [], "one of them is down"
            other.ready = True
            await trio.sleep(3)
            assert told.lines
        nursery.cancel_scope.cancel()


# ---------------------------------------------------------------- a child

NOTES = """
import json, os, signal, socket, sys, time
folder, how = sys.argv[1:3]
fd = int(sys.argv[sys.argv.index("--supervisor-fd") + 1])
with open(f"{folder}/notes", "a") as f:
    f.write(json.dumps({
        "environment": dict(os.environ), "cwd": os.getcwd(), "session": os.getsid(0) == os.getpid(),
        "ids": [os.getuid(), os.getgid()], "groups": os.getgroups(), "scheduler": os.sched_getscheduler(0),
        "stdin": os.path.realpath("/proc/self/fd/0"), "at": time.monotonic(),
        "fds": [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")],
    }) + "\\n")
if how.isdigit():
    sys.exit(int(how))
if how == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
s = socket.socket(fileno=fd)
if how != "never-ready":
    s.sendall(b"ready x\\n")
while s.recv(1000):
    pass
time.sleep(600)
"""


def spec_of(folder: Path, how: str, **changes: object) -> Spec:
    script = folder / "child.py"
    script.write_text(NOTES)
    folder.chmod(0o777)
    argv = [sys.executable, "-I", str(script), str(folder), how]
    return replace(Spec("x", argv, 0.05, 60), **changes)  # type: ignore[arg-type]


def notes(folder: Path) -> list[dict[str, object]]:
    path = folder / "notes"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


async def until(condition: object) -> None:
    with trio.fail_after(60):
        while not condition():  # type: ignore[operator]
            await trio.sleep(0.01)


async def started(folder: Path, spec: Spec) -> dict[str, object]:
    child = Child(spec, lambda: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(child.run)
        await until(lambda: notes(folder))
        await child.stop(0.2)
        nursery.cancel_scope.cancel()
    return notes(folder)[0]


@pytest.mark.real
async def test_what_a_child_is_started_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session of its own, nothing of our environment but what programs need, no descriptor but its line."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    monkeypatch.setenv("HARMONY_SECRET", "x")
    with (folder / "open").open("w") as leaked:
        os.set_inheritable(leaked.fileno(), True)
        found = await started(folder, spec_of(folder, "runs"))
    environment = found["environment"]
    assert isinstance(environment, dict)
    assert set(environment) - {"LC_CTYPE"} <= {"PATH", "LANG", "LC_ALL", "TZ"}
    assert "PATH" in environment
    assert (found["cwd"], found["session"], found["stdin"]) == ("/", True, "/dev/null")
    assert str(folder / "open") not in str(found["fds"]), found["fds"]
    assert "socket:" in str(found["fds"]), "but its own line"


@pytest.mark.real
@pytest.mark.skipif(not AS_ROOT, reason="needs root, to be somebody else")
async def test_the_agent_is_somebody_else(folder: Path) -> None:
    """Its user, its group, and of root's groups none. (A shell: nobody else may run this test's Python.)"""
    folder.chmod(0o777)  # noqa: ASYNC240
    ids = '"$(id -u)" "$(id -g)" "$(id -G)"'
    say = f'printf \'{{"ids": [%s, %s], "groups": "%s"}}\\n\' {ids} > {folder}/notes; sleep 600'
    spec = Spec("x", ["/bin/sh", "-c", say], 0.05, 60, uid=NOBODY, gid=NOBODY, groups=(NOBODY, 12345))
    found = await started(folder, spec)
    assert found["ids"] == [NOBODY, NOBODY]
    assert sorted(str(found["groups"]).split()) == ["12345", str(NOBODY)]


@pytest.mark.real
@pytest.mark.skipif(not AS_ROOT, reason="needs root, to be scheduled in real time")
@pytest.mark.parametrize("steady", [True, False])
async def test_only_the_fencer_inherits_real_time_scheduling(folder: Path, steady: bool) -> None:
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    try:
        found = await started(folder, spec_of(folder, "runs", steady=steady))
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    assert found["scheduler"] == (os.SCHED_RR if steady else os.SCHED_OTHER)


def autogroup_nice(pid: int) -> int | None:
    """Of a process's session; None: this kernel has no such groups."""
    try:
        return int(Path(f"/proc/{pid}/autogroup").read_text().rpartition(" ")[2])
    except FileNotFoundError:
        return None


@pytest.mark.real
@pytest.mark.skipif(not AS_ROOT, reason="needs root, to be favoured")
@pytest.mark.parametrize("steady", [True, False])
async def test_the_agent_is_favoured_and_its_session_too(folder: Path, steady: bool) -> None:
    """On a busy machine it took four times as long to start, and the lease was over."""
    child = Child(spec_of(folder, "runs", steady=steady), lambda: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(child.run)
        await until(lambda: child.ready)
        assert child.pid is not None
        nice = os.getpriority(os.PRIO_PROCESS, child.pid)
        of_group = autogroup_nice(child.pid)
        await child.stop(5)
        nursery.cancel_scope.cancel()
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    assert nice == (mine if steady else -10)
    assert of_group in {None, 0 if steady else -10}


@pytest.mark.real
async def test_one_that_does_not_stop_is_killed(folder: Path) -> None:
    child = Child(spec_of(folder, "deaf"), lambda: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(child.run)
        await until(lambda: child.ready)
        pid = child.pid
        assert pid is not None
        with trio.fail_after(60):
            await child.stop(0.05)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        nursery.cancel_scope.cancel()


@pytest.mark.real
async def test_one_that_never_gets_ready_is_replaced(folder: Path) -> None:
    spec = spec_of(folder, "never-ready", ready_timeout_s=0.2, again_timeout_s=0.2)
    child = Child(spec, lambda: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(child.run)
        await until(lambda: child.starts >= 2)
        await child.stop(0.05)
        nursery.cancel_scope.cancel()


@pytest.mark.real
async def test_starts_in_vain_come_further_apart(folder: Path) -> None:
    """At once after the first death, then each time later; no host is filled with starts."""
    child = Child(spec_of(folder, "3"), lambda: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(child.run)
        await until(lambda: len(notes(folder)) >= 5)
        await child.stop(60)
        nursery.cancel_scope.cancel()
    at = [float(str(n["at"])) for n in notes(folder)]
    assert at[2] - at[1] >= children.BACKOFF_FIRST_S
    assert at[3] - at[2] >= 2 * children.BACKOFF_FIRST_S
    assert at[4] - at[3] >= 4 * children.BACKOFF_FIRST_S
    assert len(child.deaths) >= 4


@pytest.mark.real
async def test_an_emergency_fence_says_why_and_is_believed_only_with_its_proof(folder: Path) -> None:
    """Exit code 0 of the one-shot, nothing else; it is called with a reason."""
    once = folder / "once.py"
    once.write_text(
        f"import sys; open({str(folder / 'said')!r}, 'w').write(repr(sys.argv[1:]))\n"
        f"sys.exit(int(open({str(folder / 'code')!r}).read()))\n"
    )
    emergency = [sys.executable, "-I", str(once), "--once"]
    supervisor = Supervisor(Settings("n1", 30, 2), SPEC, SPEC, emergency, Told())
    for code, proven in ((0, True), (1, False), (75, False)):
        (folder / "code").write_text(str(code))
        assert await supervisor._fence_once() is proven
    assert (folder / "said").read_text() == "['--once', 'the fencer cannot be kept up']"


@pytest.mark.real
async def test_a_one_shot_that_hangs_is_killed(folder: Path) -> None:
    """And another one begun: `fence_timeout` and 5 s."""
    script = f"import os, time; open({str(folder / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    supervisor = Supervisor(Settings("n1", -4.0, 2), SPEC, SPEC, [sys.executable, "-c", script], Told())
    with trio.fail_after(60):
        assert await supervisor._fence_once() is False


@pytest.mark.parametrize(
    ("overslept_s", "silent_s"),
    [
        (0.0, 0.3),
        (0.2, 0.1),  # a busy host: it was silent for 0.1 s while we ran
        (9.0, 0.0),  # a paused one
    ],
)
def test_a_pause_of_our_own_is_no_silence_of_the_childs(overslept_s: float, silent_s: float) -> None:
    """However short: a scheduling gap of less than its timeout had a healthy fencer killed in the middle of a fence."""
    assert 100.3 - heard_at(100.0, 100.3, overslept_s) == pytest.approx(silent_s)


# ---------------------------------------------------------------- what running.py makes of the configuration

RUNNING = """
import gc, json, os, pwd, sys
from dataclasses import asdict
from harmony_supervisor import running
from harmony_supervisor.notify import Notifier
from harmony_supervisor.supervisor import Supervisor
class Looks(Notifier):
    def send(self, *lines):
        found = next(o for o in gc.get_objects() if isinstance(o, Supervisor))
        said = {"fencer": asdict(found.fencer.spec), "agent": asdict(found.agent.spec),
                "settings": asdict(found._s), "once": list(found._emergency)}
        print(json.dumps(said), flush=True)
        os._exit(0)  # the first word comes before the first child
resolved = json.loads(sys.argv[1])
user = pwd.getpwuid(65534) if os.geteuid() == 0 else None
sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
sys.exit(running.run(resolved, [*sleeper, "F"], [*sleeper, "A"], user, Looks()))
"""


@pytest.mark.real
def test_the_children_are_as_configured() -> None:
    """The fencer keeps our scheduling and outlives us; the agent does neither, and is not root."""
    resolved = {
        "supervisor": {
            "node": "n7", "log_format": "json", "fence_timeout_s": 10.0, "ping_interval_s": 0.7,
            "ping_timeout_s": 2.5,
        },
        "fencer": {"lease_s": 7.0},
    }  # fmt: skip
    argv = [sys.executable, "-c", RUNNING, json.dumps(resolved)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[0])
    fencer, agent = said["fencer"], said["agent"]
    assert (fencer["steady"], fencer["die_with_us"], fencer["uid"]) == (True, False, None)
    assert (agent["steady"], agent["die_with_us"]) == (False, True)
    if AS_ROOT:
        assert (agent["uid"], agent["gid"]) == (NOBODY, NOBODY)
        assert agent["groups"] == os.getgrouplist(pwd.getpwuid(NOBODY).pw_name, NOBODY)
    # It is replaced, and the new one has fenced, within fence_timeout of the lease's end.
    assert fencer["ping_interval_s"] + fencer["ping_timeout_s"] < 0.6 * 10
    assert fencer["ready_timeout_s"] >= 30 + 7 + 10
    assert fencer["again_timeout_s"] >= 10
    assert said["settings"] == {"node": "n7", "fence_timeout_s": 10.0, "lease_s": 7.0}
    assert said["once"][-2:] == ["F", "--once"]
