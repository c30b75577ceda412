"""The hosts themselves: they boot, keep their disk, stop, stand still, vanish; and Harmony comes up on one."""

from __future__ import annotations

import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.hosts import cgroups
from tests.hosts.conftest import NewHost
from tests.hosts.harmony_host import HarmonyHost
from tests.hosts.host import Host, HostError
from tests.hosts.processes import killed_owner

pytestmark = pytest.mark.real


def boot_id(host: Host) -> str:
    """Differs after each boot: when its systemd began (the kernel's own is the machine's)."""
    return host.systemctl("show", "--property=UserspaceTimestampMonotonic").stdout


# ---------------------------------------------------------------- any host


def test_systemd_runs_and_nothing_failed(host: HarmonyHost) -> None:
    assert host.systemctl("is-system-running").stdout == "running\n"
    assert host.run(["hostname"]).stdout.strip() == host.name
    assert host.pids("systemd") == [1]
    assert host.systemctl("list-units", "--no-legend", "--state=failed").stdout == ""
    assert host.show("postgresql.service", "LoadState") == "masked"


def test_commands(host: HarmonyHost) -> None:
    assert host.run(["cat"], stdin=b"in and out").stdout == "in and out"
    assert host.run(["sh", "-c", "id -un; id -Gn"], user="nobody").stdout == "nobody\nnogroup\n"
    assert host.run(["false"], check=False).returncode == 1
    with pytest.raises(HostError, match="exited 3: too bad"):
        host.run(["sh", "-c", "echo too bad >&2; exit 3"])
    with pytest.raises(HostError, match="not done within"):
        host.run(["sh", "-c", "sleep 60 & sleep 60"], timeout=0.2)
    assert "VIRTUAL_ENV" not in host.run(["env"]).stdout


def test_the_machine_is_out_of_reach(host: HarmonyHost) -> None:
    host.write("/etc/written-by-a-test", "x")
    assert not Path("/etc/written-by-a-test").exists()
    assert host.run(["cat", "/proc/net/dev"]).stdout.count(":") == 1  # a loopback, and that is all
    with pytest.raises(HostError):
        host.run(["touch", "/opt/test-venv/x"])


def test_files(host: HarmonyHost) -> None:
    host.write("/srv/a/b c/file", "one\n", mode=0o640, owner="nobody:nogroup")
    host.write("/srv/a/b c/file", b"two\n", mode=0o600)
    assert host.read("/srv/a/b c/file") == "two\n"
    assert host.run(["stat", "--format=%a %U", "/srv/a/b c/file"]).stdout == "600 root\n"


def test_processes_have_a_unit_and_two_numbers(host: HarmonyHost) -> None:
    host.systemctl("start", "systemd-journald")
    (journald,) = host.processes("systemd-journald")
    assert str(journald.pid) == host.show("systemd-journald", "MainPID")
    assert journald.cgroup == "/system.slice/systemd-journald.service"
    assert Path(f"/proc/{journald.outside_pid}/comm").read_text() == "systemd-journal\n"
    host.run(["systemd-run", "--property=Type=exec", "--unit=sleeper", "sleep", "600"])
    assert host.signal("sleep", signal.SIGKILL) == 1
    assert host.signal("nothing goes by this name", signal.SIGKILL) == 0


def test_a_real_service_manager(host: HarmonyHost) -> None:
    """What units of Harmony count on: capabilities, mlockall, system call filters, cgroups of their own."""
    memory = "import ctypes; assert ctypes.CDLL(None, use_errno=True).mlockall(3) == 0"
    host.run(["systemd-run", "--wait", "--pipe", "python3", "-c", memory])
    bounded = ["systemd-run", "--wait", "--pipe", "-p", "CapabilityBoundingSet=CAP_KILL", "python3", "-c"]
    host.run([*bounded, "import os; os.pidfd_open(os.getpid())"])
    with pytest.raises(HostError):
        host.run([*bounded, "import os; os.chown('/etc/hostname', 1, 1)"])


# ---------------------------------------------------------------- power


def test_files_outlive_reboots_and_power_cuts(new_host: NewHost) -> None:
    host = new_host()
    host.write("/srv/before", "written while it was off\n")
    host.boot()
    first = boot_id(host)
    host.write("/srv/kept", "kept\n")
    host.write("/run/lost", "lost\n")
    host.reboot()
    second = boot_id(host)
    assert second != first
    assert host.read("/srv/before") + host.read("/srv/kept") == "written while it was off\nkept\n"
    with pytest.raises(HostError, match="No such file"):
        host.read("/run/lost")
    host.power_cut()
    assert not host.running
    assert host.read("/srv/kept") == "kept\n"  # the disk can be looked at
    host.boot()
    assert boot_id(host) != second
    assert host.read("/srv/kept") == "kept\n"
    assert host.run(["journalctl", "--list-boots", "--no-pager", "--quiet"]).stdout.count("\n") >= 1


def test_a_frozen_host_does_nothing(new_host: NewHost) -> None:
    host = new_host()
    host.boot()
    host.freeze()
    with pytest.raises(HostError, match="not done within"):
        host.run(["true"], timeout=0.3)
    host.thaw()
    host.run(["true"])
    host.freeze()
    host.power_cut()
    host.boot()


def test_two_hosts_do_not_meet(new_host: NewHost) -> None:
    hosts = [new_host("twin"), new_host("twin")]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Host.boot, hosts))
    assert len({host.read("/etc/machine-id") for host in hosts}) == 2
    assert len({host.run(["readlink", "/proc/self/ns/net"]).stdout for host in hosts}) == 2
    hosts[0].write("/srv/x", "of the first\n")
    with pytest.raises(HostError):
        hosts[1].read("/srv/x")
    hosts[0].power_cut()
    hosts[1].run(["true"])


def test_a_copy_of_a_disk(new_host: NewHost) -> None:
    first = new_host("first")
    first.write("/srv/x", "of the first\n")
    first.run(["rm", "/etc/debian_version"])
    second = new_host("second", like=first)
    assert second.read("/srv/x") == "of the first\n"
    assert second.read("/etc/machine-id") != first.read("/etc/machine-id")
    with pytest.raises(HostError):
        second.read("/etc/debian_version")
    first.boot()
    with pytest.raises(HostError, match="must be switched off"):
        new_host("third", like=first)


def test_a_host_joins_a_network_namespace(new_host: NewHost) -> None:
    with subprocess.Popen(
        ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write(b"x")
        other.stdin.flush()
        assert other.stdout.read(1) == b"x"  # it is in its namespace
        host = new_host(netns=f"/proc/{other.pid}/ns/net")
        host.boot()
        inside = host.run(["readlink", "/proc/self/ns/net"]).stdout.strip()
        assert inside == str(Path(f"/proc/{other.pid}/ns/net").readlink())
        assert inside != str(Path("/proc/self/ns/net").readlink())
        other.stdin.close()


def test_debians_own_postgresql_when_asked_for(new_host: NewHost) -> None:
    if not Path("/etc/postgresql/15/main").is_dir():
        pytest.skip("no Debian cluster 15/main on this machine")
    host = new_host(wanted=["postgresql.service"])
    host.boot()
    assert host.show("postgresql@15-main", "ActiveState") == "active"
    assert host.pids("postgres")


def test_a_killed_test_process_leaves_nothing(able: None) -> None:
    script = (
        "import sys; from tests.hosts.host import Host\n"
        "host = Host('orphan'); host.boot(); host.freeze()\n"
        "print(host._keeper.pid, host.cgroup, host._base, flush=True); sys.stdin.read()"
    )
    with killed_owner(script) as (cgroup, base):
        assert len(cgroups.pids(Path(cgroup))) > 3
    assert not Path(cgroup).exists()
    assert not Path(base).exists()
    assert base not in Path("/proc/mounts").read_text()


# ---------------------------------------------------------------- with Harmony


def test_harmony_comes_up_at_boot(harmony_host: HarmonyHost) -> None:
    host = harmony_host
    assert host.show("harmony", "ActiveState") == "active"
    assert host.show("harmony", "Type") == "notify"
    assert host.pids("harmony-supervisor") == [int(host.show("harmony", "MainPID"))]
    (agent,) = host.pids("harmony.agent")
    assert host.run(["stat", "--format=%U", f"/proc/{agent}"]).stdout == "harmony\n"
    assert host.systemctl("is-system-running").stdout == "running\n"


def test_postgresql_is_writable(harmony_host: HarmonyHost) -> None:
    assert harmony_host.sql("INSERT INTO harmony_demo (id) VALUES (1) RETURNING id") == [[1]]
    assert harmony_host.sql("SELECT pg_is_in_recovery()", role="postgres") == [[False]]


def test_stop_and_start(fresh_harmony_host: HarmonyHost) -> None:
    host = fresh_harmony_host
    host.sql("INSERT INTO harmony_demo (id) VALUES (2)")
    host.systemctl("stop", "harmony", timeout=90)
    assert host.show("harmony", "ActiveState") == "inactive"
    assert host.show("harmony", "Result") == "success"
    assert [host.pids(name) for name in ("harmony-supervisor", "harmony_fencer", "harmony.agent")] == [
        [],
        [],
        [],
    ]
    assert host.pids("postgres") == []
    host.start()
    assert host.wait_for_primary() == "n1"
    assert host.sql("SELECT id FROM harmony_demo") == [[2]]


def test_a_power_cut_loses_no_row(fresh_harmony_host: HarmonyHost) -> None:
    host = fresh_harmony_host
    host.sql("INSERT INTO harmony_demo (id) VALUES (3)")
    host.power_cut()
    host.boot()
    assert host.wait_for_primary() == "n1"
    assert host.sql("SELECT id FROM harmony_demo") == [[3]]
