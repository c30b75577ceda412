"""The units do what they say, under a real systemd: sandbox, cgroups, scheduling, start, stop, restart (O1, O7)."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harmony.fencer_client import protocol
from tests import pace
from tests.hosts.debian import DROP_IN
from tests.hosts.harmony_host import TREE, HarmonyHost
from tests.hosts.host import wait_until
from tests.hosts.processes import Process
from tests.hosts.writer import now_s, writing

pytestmark = pytest.mark.real
HARMONY = ("harmony-supervisor", "harmony_fencer", "harmony.agent")
LEASE_S = 2.0  # of the fast preset
FENCE_TIMEOUT_S = 1.0
SLOW_START_S = 0.25  # of a fencer: with 0.35 on a slow machine the lease was over three times of three
NAMED = {"chown": 0, "dac_override": 1, "fowner": 3, "kill": 5, "setgid": 6, "setuid": 7, "sys_ptrace": 19}
EXTRA = {"sys_nice": 23, "ipc_lock": 14}
# Of a copy of the unit: what would make it Harmony, and not a probe of Harmony's sandbox.
NOT_A_PROBE = re.compile(
    r"^(Exec\w+|Type|NotifyAccess|Watchdog\w+|Restart\w*|After|Wants)=.*\n", re.MULTILINE
)
PROBE = """import json, os
def opened(path):
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError as e:
        return e.strerror
    return "opened"
print(json.dumps([opened(p) for p in ("/dev/watchdog", "/dev/other", "/dev/null")]))
"""


def only(host: HarmonyHost, name: str) -> Process:
    (found,) = host.processes(name)
    return found


def fact(process: Process, key: str) -> str:
    """A line of /proc/PID/status."""
    text = Path(f"/proc/{process.outside_pid}/status").read_text()
    return dict(line.split(":", 1) for line in text.splitlines())[key].strip()


def scheduling(process: Process) -> set[tuple[str, int, int]]:
    """(policy, real-time priority, nice) of all its threads."""
    names = {os.SCHED_OTHER: "other", os.SCHED_RR: "rr", os.SCHED_FIFO: "fifo"}
    threads = [int(p.name) for p in Path(f"/proc/{process.outside_pid}/task").iterdir()]
    return {
        (
            names[os.sched_getscheduler(t)],
            os.sched_getparam(t).sched_priority,
            os.getpriority(os.PRIO_PROCESS, t),
        )
        for t in threads
    }


def oom_score_adj(process: Process) -> int:
    return int(Path(f"/proc/{process.outside_pid}/oom_score_adj").read_text())


def control_state(host: HarmonyHost, data: str = "/srv/harmony/data") -> str:
    (program,) = Path("/usr/lib/postgresql").glob("*/bin/pg_controldata")
    out = host.run([str(program), "-D", data], user="postgres").stdout
    return next(line.split(":", 1)[1].strip() for line in out.splitlines() if line.startswith("Database cl"))


# ---------------------------------------------------------------- what the files say


def test_systemd_finds_nothing_wrong_with_the_units(harmony_host: HarmonyHost) -> None:
    """O7: no setting that systemd does not know, none that it ignores; also of PostgreSQL's unit with the drop-in."""
    host = harmony_host
    host.write("/etc/systemd/system/pg.service", "[Service]\nExecStart=/bin/true\n")
    host.write(
        DROP_IN.replace("postgresql@", "pg"), (TREE / "systemd" / "postgresql-harmony.conf").read_bytes()
    )
    for unit in ("harmony.service", "harmony-boot-fence.service", "pg.service"):
        done = host.run(["systemd-analyze", "verify", unit])
        assert done.stdout + done.stderr == "", unit
    host.systemctl("daemon-reload")
    assert "harmony-boot-fence.service" in host.show("pg", "Requires").split()
    said = host.run(["journalctl", "--no-pager", "--boot", "_PID=1", "--output=cat"]).stdout
    assert not re.findall(r".*(?:[Ii]gnor|[Uu]nknown|[Dd]eprecat|not match).*", said)


def test_the_figures_of_systemd_analyze_security(harmony_host: HarmonyHost) -> None:
    """An exposure that grows is noticed; 10 is no sandbox at all."""
    figures = {}
    for unit in ("harmony.service", "harmony-boot-fence.service"):
        out = harmony_host.run(["systemd-analyze", "security", "--no-pager", unit], check=False).stdout
        figures[unit] = float(re.findall(r"exposure level for \S+: ([0-9.]+)", out)[0])
    print(f"systemd-analyze security: {figures}")
    assert figures["harmony.service"] <= 4.5
    assert figures["harmony-boot-fence.service"] <= 3.5


def test_capabilities_are_those_that_the_unit_names(harmony_host: HarmonyHost) -> None:
    """The fencer and the supervisor have these seven; the agent and PostgreSQL none; nobody can gain any."""
    named = sum(1 << number for number in NAMED.values())
    for name in HARMONY:
        process = only(harmony_host, name)
        mine = 0 if name == "harmony.agent" else named
        held = [int(fact(process, key), 16) for key in ("CapEff", "CapPrm", "CapInh", "CapAmb")]
        assert held == [mine, mine, 0, 0], name
        assert int(fact(process, "CapBnd"), 16) == named
        assert fact(process, "NoNewPrivs") == "1"
        assert fact(process, "Seccomp") == "2"
    for process in harmony_host.processes("postgres"):
        assert int(fact(process, "CapEff"), 16) == 0
        assert fact(process, "NoNewPrivs") == "1"


def test_the_agent_is_nobody(harmony_host: HarmonyHost) -> None:
    """The agent runs as its own user, in no group but its own, and PostgreSQL as its own."""
    user = harmony_host.run(["id", "-u", "harmony"]).stdout.strip()
    group = harmony_host.run(["id", "-g", "harmony"]).stdout.strip()
    agent = only(harmony_host, "harmony.agent")
    assert set(fact(agent, "Uid").split()) == {user}
    assert set(fact(agent, "Gid").split() + fact(agent, "Groups").split()) == {group}
    assert set(fact(only(harmony_host, "harmony_fencer"), "Uid").split()) == {"0"}


def test_postgresql_has_a_cgroup_of_its_own_beneath_the_units(harmony_host: HarmonyHost) -> None:
    """W9: one write freezes all of it and nothing else. Without Delegate= systemd would own what is beneath."""
    unit = "/system.slice/harmony.service"
    assert {only(harmony_host, name).cgroup for name in HARMONY} == {unit}
    (cgroup,) = {p.cgroup for p in harmony_host.processes("postgres")}
    assert cgroup.startswith(unit + "/harmony-")
    assert harmony_host.show("harmony", "Delegate") == "yes"
    assert harmony_host.fencer().held_by == f"cgroup /sys/fs/cgroup{cgroup}"
    harmony_host.systemctl("daemon-reload")  # systemd realizes its cgroups again
    assert {p.cgroup for p in harmony_host.processes("postgres")} == {cgroup}


# ---------------------------------------------------------------- getting to run


def test_scheduling(hard_host: HarmonyHost) -> None:
    """Who must act in time is real-time, its memory locked; the database has none of it."""
    for name in ("harmony-supervisor", "harmony_fencer"):
        assert {(policy, priority) for policy, priority, _ in scheduling(only(hard_host, name))} == {
            ("rr", 5)
        }
    assert scheduling(only(hard_host, "harmony.agent")) == {("other", 0, -10)}
    backends = hard_host.processes("postgres")
    assert len(backends) > 3
    for process in backends:
        assert scheduling(process) == {("other", 0, 0)}, process.argv
        assert fact(process, "VmLck") == "0 kB"
    assert fact(only(hard_host, "harmony_fencer"), "VmLck") != "0 kB"
    assert "not granted" not in hard_host.journal("harmony", 400)[-20000:].rpartition("Started harmony")[2]


def test_the_oom_killer_is_told(hard_host: HarmonyHost) -> None:
    """Backends put themselves back to 0, as PostgreSQL's documentation has it; the protected ones where granted."""
    assert hard_host.show("harmony", "OOMScoreAdjust") == "-900"
    (postmaster,) = [p for p in hard_host.processes("postgres") if "-D" in p.argv]
    environment = Path(f"/proc/{postmaster.outside_pid}/environ").read_text().split("\0")
    assert {"PG_OOM_ADJUST_FILE=/proc/self/oom_score_adj", "PG_OOM_ADJUST_VALUE=0"} <= set(environment)
    for process in hard_host.processes("postgres"):
        if process != postmaster:
            assert oom_score_adj(process) == 0, process.argv
    protected = oom_score_adj(only(hard_host, "harmony_fencer"))
    assert protected in {-900, 0}  # 0: this machine's systemd may not
    assert oom_score_adj(postmaster) == protected


@pytest.mark.parametrize(("more", "watchdog"), [("", True), ("DeviceAllow=\nDevicePolicy=closed\n", False)])
def test_the_watchdog_device_is_open_and_no_other(hard_host: HarmonyHost, more: str, watchdog: bool) -> None:
    """ProtectClock= closes devices, the unit opens /dev/watchdog. (A node without a driver: open fails later.)"""
    host = hard_host
    host.run(
        [
            "sh",
            "-c",
            "cd /dev; [ -e watchdog ] || mknod watchdog c 10 130; [ -e other ] || mknod other c 10 1",
        ]
    )
    unit = NOT_A_PROBE.sub("", host.read("/etc/systemd/system/harmony.service"))
    host.write("/etc/probe.py", PROBE)
    run = "Type=oneshot\nExecStart=/usr/bin/python3 /etc/probe.py\n"
    host.write("/etc/systemd/system/probe.service", unit.replace("[Install]", run + more + "[Install]"))
    host.systemctl("daemon-reload")
    host.start("probe")
    said = host.run(["journalctl", "--no-pager", "--unit=probe", "--output=cat"]).stdout
    answers = [line for line in said.splitlines() if line.startswith("[")][-1]
    closed = '"Operation not permitted"'
    first, second, third = answers.strip("[]").split(", ")
    assert (first != closed, second, third) == (watchdog, closed, '"opened"'), answers


# ---------------------------------------------------------------- start, stop, restart


def test_stopping_ends_a_primary_cleanly(hard_host: HarmonyHost) -> None:
    """O1: on a primary, a stop is a fence by a clean shutdown: nothing to recover, nobody left."""
    host = hard_host
    with writing(host) as writer:
        host.systemctl("stop", "harmony", timeout=90)
        assert host.show("harmony", "Result") == "success"
        assert [host.pids(name) for name in (*HARMONY, "postgres")] == [[], [], [], []]
        assert control_state(host) == "shut down"
        host.run(["test", "-e", "/srv/harmony/data/standby.signal"])  # the fence lasts
        began = now_s()
        host.start()
        host.wait_for_primary()
        first = writer.wait_for_commit(began) - began
    print(f"writable {first:.2f} s after systemctl start")


def test_a_restart_leads_again(hard_host: HarmonyHost) -> None:
    """O1: as a stop and a start. The client's gap is printed."""
    host = hard_host
    with writing(host) as writer:
        began = now_s()
        host.systemctl("restart", "harmony", timeout=90)
        host.wait_for_primary()
        writer.wait_for_commit(now_s())
    print(f"systemctl restart: nothing written for {writer.so_far().longest_gap_s(began):.2f} s")
    assert len(writer.so_far().eras()) == 2


def test_stopping_leaves_a_standby_running(hard_host: HarmonyHost) -> None:
    """O7: a standby serves its readers, whatever becomes of Harmony."""
    host = hard_host
    with following(host):
        before = host.processes("postgres")
        host.systemctl("stop", "harmony", timeout=90)
    assert [host.pids(name) for name in HARMONY] == [[], [], []]
    (postmaster,) = [p.pid for p in host.processes("postgres") if "-D" in p.argv]
    assert postmaster in {p.pid for p in before}
    assert host.sql("SELECT pg_is_in_recovery()") == [[True]]
    host.start()
    host.wait_for_primary()
    assert host.sql("SELECT pg_is_in_recovery()") == [[False]]


def seconds_to_start(module: str) -> float:
    """The best of three."""
    took = []
    for _ in range(3):
        began = time.monotonic()
        subprocess.run([sys.executable, "-I", "-c", f"import {module}"], check=True)
        took.append(time.monotonic() - began)
    return min(took)


@contextmanager
def following(host: HarmonyHost) -> Iterator[None]:
    """A standby (of nobody) made of a primary whose agent does not get to run, nor its supervisor to replace it.

    Nor does systemd replace that meanwhile, however long it takes. `systemctl stop` lets the supervisor go on.
    """
    host.systemctl("service-watchdogs", "no")
    try:
        host.signal("harmony-supervisor", signal.SIGSTOP)
        host.signal("harmony.agent", signal.SIGSTOP)
        highest = host.fencer().highest
        order = protocol.Follow(generation=protocol.Generation(highest.term, highest.order + 1), primary=None)
        assert isinstance(host.ask_fencer(order), protocol.Accepted)
        wait_until(
            lambda: (record := host.fencer().order) is not None and record.state == "done", "a standby"
        )
        assert host.sql("SELECT pg_is_in_recovery()") == [[True]]
        yield
    finally:
        host.systemctl("service-watchdogs", "yes")


def test_harmony_comes_back_around_a_postgresql_that_runs_on(hard_host: HarmonyHost) -> None:
    """O7: SIGKILL of the supervisor. systemd starts a new one, whose fencer takes over under the lease.

    Whatever happens no write is acknowledged later than the lease and the fence allow; on a machine that is not
    starved nothing is fenced at all: one of three times is asked for, all are printed.
    """
    host = hard_host
    unfenced = 0
    for attempt in range(1, 4):
        old = {name: host.pids(name) for name in HARMONY}
        with writing(host) as writer:
            killed = now_s()
            host.signal("harmony-supervisor", signal.SIGKILL)
            time.sleep(LEASE_S + FENCE_TIMEOUT_S)  # looking costs what they need to start
            host.wait_for_primary()
            writer.wait_for_commit(now_s())
            written = writer.so_far()
        gap = written.longest_gap_s(killed)
        fenced = len(written.eras()) > 1
        print(f"SIGKILL of the supervisor, {attempt}: {'fenced' if fenced else 'no fence'}, gap {gap:.2f} s")
        for name in HARMONY:
            assert not set(old[name]) & set(host.pids(name)), f"{name} was not replaced"
        if fenced:
            assert written.last_s(written.eras()[0]) <= killed + LEASE_S + FENCE_TIMEOUT_S + pace.SLACK_S
        unfenced += not fenced
        if unfenced and attempt > 1:
            break
    if not unfenced:
        load, start_s = os.getloadavg()[0], seconds_to_start("harmony_fencer.main")
        if load > 1.5 * (os.cpu_count() or 1) or start_s > SLOW_START_S:
            pytest.skip(
                f"this machine is slow (load {load:.1f}, a fencer needs {start_s:.2f} s to begin): a takeover "
                "within the lease is not due"
            )
    assert unfenced, host.journal("harmony", 200)
