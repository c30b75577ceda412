"""Light hosts: they meet on their switch, are cut off, slowed, frozen, lose power; and leave nothing behind."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import cgroups
from tests.hosts.host import HostError, wait_until
from tests.hosts.lab import Lab, Light, why_not
from tests.hosts.processes import killed_owner
from tests.hosts.relay import Way

pytestmark = pytest.mark.real
PORT = 9000
ECHO = f"""
import socketserver
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(65536):
            self.request.sendall(data)
socketserver.ThreadingTCPServer.allow_reuse_address = True
socketserver.ThreadingTCPServer(("0.0.0.0", {PORT}), Echo).serve_forever()
"""


@pytest.fixture
def lab() -> Iterator[Lab]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Lab(["a", "b"]) as made:
        yield made


def serve(host: Light) -> None:
    host.start([sys.executable, "-I", "-c", ECHO], host.folder / "echo.log")
    wait_until(lambda: echo(host, host) is not None, "the echo")


def echo(at: Light, to: Light, timeout_s: float = 0.5) -> float | None:
    """Seconds that 100 bytes took there and back; None: they did not come back in time."""

    def ask() -> float | None:
        try:
            with socket.create_connection((to.address, PORT), timeout_s) as link:
                link.settimeout(timeout_s)
                began = time.monotonic()
                link.sendall(b"x" * 100)
                return time.monotonic() - began if link.recv(100) else None
        except OSError:
            return None

    return at.in_net(ask)


def test_shared_memory_goes_with_the_lab(lab: Lab) -> None:
    """A killed PostgreSQL leaves its own; the machine has room for 4096 of System V's."""
    name = Path(f"/dev/shm/{lab.base.name}")  # noqa: S108
    lab.hosts["a"].run(["sh", "-c", f"echo kept > {name}; ipcmk -M 56"])
    segments = "/proc/sysvipc/shm"
    assert len(lab.hosts["b"].run(["cat", segments]).stdout.splitlines()) == 2  # its headline, and that one
    assert lab.hosts["b"].run(["cat", str(name)]).stdout == "kept\n"
    assert not name.exists()


def test_cuts_and_slow_cables(lab: Lab) -> None:
    a, b = lab.hosts["a"], lab.hosts["b"]
    serve(b)
    assert echo(a, b) is not None
    b.cut()
    assert echo(a, b) is None
    assert echo(b, b) is not None  # it goes on by itself
    b.heal()
    wait_until(lambda: echo(a, b) is not None, "the healed cable")
    b.shape(to=Way(delay_ms=80))
    assert (echo(a, b, 2.0) or 0.0) >= 0.08
    b.shape()
    assert (echo(a, b, 2.0) or 1.0) < 0.08
    b.shape(from_=Way(block=True, peers=[a.address]))
    assert echo(a, b) is None
    b.shape(from_=Way(block=True, peers=["10.77.0.99"]))
    assert echo(a, b) is not None
    b.shape(to=Way(loss=1.0))
    assert echo(a, b) is None
    b.heal()
    wait_until(lambda: echo(a, b) is not None, "the plain cable")


def test_a_frozen_host_and_a_power_cut(lab: Lab) -> None:
    a, b = lab.hosts["a"], lab.hosts["b"]
    serve(b)
    b.freeze()
    assert echo(a, b) is None
    b.thaw()
    assert echo(a, b) is not None
    (b.folder / "kept").write_text("kept")
    b.power_cut()
    assert not b.running
    assert echo(a, b) is None
    assert (b.folder / "kept").read_text() == "kept"
    b.power_on()
    serve(b)
    wait_until(lambda: echo(a, b) is not None, "the host is back")


def test_processes_of_a_host_are_its_own(lab: Lab) -> None:
    a, b = lab.hosts["a"], lab.hosts["b"]
    sleeper = a.start(["sleep", "600"], a.folder / "log")
    wait_until(lambda: a.processes("sleep"), "it sleeps")
    assert not b.processes("sleep")
    assert a.run(["id", "-un"], user="nobody").stdout == "nobody\n"
    with pytest.raises(HostError, match="exited 3: too bad"):
        a.run(["sh", "-c", "echo too bad >&2; exit 3"])
    a.power_cut()
    assert sleeper.wait(5) == -9


def test_a_killed_owner_leaves_nothing(lab: Lab) -> None:
    """Not even with a host frozen, a disk that hangs and somebody waiting for it."""
    script = (
        "import sys, time; from tests.hosts.lab import Lab\n"
        "lab = Lab(['x', 'y'], disks={'x': 64}); x, y = lab.hosts.values()\n"
        "y.start(['sleep', '600'], y.folder / 'log'); y.freeze()\n"
        "x.freeze_disk(True); x.start(['touch', f'{x.folder}/disk/file'], x.folder / 'log'); time.sleep(0.3)\n"
        "print(lab._keeper.pid, lab.cgroup, lab.base, x.holder, flush=True); sys.stdin.read()"
    )
    with killed_owner(script) as (cgroup, base, holder):
        assert len(cgroups.pids(Path(cgroup))) == 2
    assert not Path(cgroup).exists()
    assert not Path(base).exists()
    assert not Path(f"/proc/{holder}").exists()
    loops = subprocess.run(["losetup", "--list"], capture_output=True, text=True, check=True).stdout
    assert base not in loops
