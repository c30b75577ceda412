"""run = "systemd": PostgreSQL in Debian's layout, started and stopped through its own unit (O7, I1, W9).

Harmony's settings are in force through one file of its own; the user's files stay what they are. What the unit's
Restart= or an operator's systemctl does meanwhile is safe.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import pace
from tests.hosts.conftest import NewHost
from tests.hosts.debian import Debian
from tests.hosts.harmony_host import CONFIG, PREFIX, HarmonyHost
from tests.hosts.host import wait_until
from tests.hosts.test_boot import setting, standby
from tests.hosts.test_switch import ended
from tests.hosts.test_units import FENCE_TIMEOUT_S, HARMONY, LEASE_S, control_state, following
from tests.hosts.writer import now_s, writing

pytestmark = [pytest.mark.real, pytest.mark.sampled(0.6, group="PostgreSQL in a unit of its own")]
FAILS = "postgresql@.service.d/again.conf"


@pytest.fixture(scope="module")
def before(debian_template: HarmonyHost, debian: Debian) -> Iterator[HarmonyHost]:
    """A host with Debian's cluster and run = "systemd"; Harmony has never run."""
    with HarmonyHost("unit", like=debian_template) as made:
        made.configure(debian.cluster("systemd"), debian.programs())
        yield made


@pytest.fixture(scope="module")
def sums(before: HarmonyHost, debian: Debian) -> str:
    """Of the user's files, before Harmony."""
    return checksums(before, debian)


@pytest.fixture(scope="module")
def unit_host(before: HarmonyHost, sums: str) -> HarmonyHost:
    """And a primary. Tests leave it so."""
    before.start()
    before.wait_for_primary()
    return before


def checksums(host: HarmonyHost, debian: Debian) -> str:
    files = [f"{debian.etc}/{n}" for n in ("postgresql.conf", "pg_hba.conf", "pg_ident.conf", "pg_ctl.conf")]
    return host.run(["sha256sum", *files, f"{debian.data}/postgresql.auto.conf"]).stdout


def postmaster(host: HarmonyHost) -> int:
    (pid,) = [p.pid for p in host.processes("postgres") if "-D" in p.argv]
    return pid


# ---------------------------------------------------------------- what it makes of Debian's layout


def test_postgresql_runs_in_its_unit(unit_host: HarmonyHost, debian: Debian) -> None:
    """O7: activate starts it through systemd: in the unit's cgroup, as the unit's main process."""
    host = unit_host
    assert host.show(debian.unit, "ActiveState") == "active"
    assert host.show(debian.unit, "MainPID") == str(postmaster(host))
    (cgroup,) = {p.cgroup for p in host.processes("postgres")}
    assert cgroup == f"/system.slice/system-postgresql.slice/{debian.unit}"
    assert host.fencer().held_by == f"cgroup of {debian.unit}"
    assert not standby(host)


def test_its_settings_are_in_force_and_the_users_files_untouched(
    unit_host: HarmonyHost, debian: Debian, sums: str
) -> None:
    """O7: one file in conf.d includes what Harmony writes; postgresql.conf was found by itself."""
    host = unit_host
    assert setting(host, "config_file") == f"{debian.etc}/postgresql.conf"
    included = f"{debian.etc}/conf.d/zz-harmony.conf"
    sql = "SELECT sourcefile, pending_restart FROM pg_settings WHERE name = 'synchronous_standby_names'"
    ours = f"{debian.data}/harmony.postgresql.conf"
    assert ours in host.read(included)
    assert host.sql(sql, role="harmony")[0][0] == ours
    assert setting(host, "wal_log_hints") == "on"
    assert setting(host, "cluster_name") == f"{debian.version}/main"  # the user's
    assert host.run(["stat", "--format=%a", included]).stdout == "644\n"
    assert checksums(host, debian) == sums


def test_it_has_none_of_our_privileges(unit_host: HarmonyHost) -> None:
    """Its unit's sandbox and scheduling, not ours: systemd starts it, the fencer does not."""
    status = Path(f"/proc/{unit_host.processes('postgres')[0].outside_pid}/status").read_text()
    assert "NoNewPrivs:\t0" in status


# ---------------------------------------------------------------- Harmony stops, comes back, is killed


def test_a_stop_is_a_clean_shutdown_and_the_unit_stays_down(unit_host: HarmonyHost, debian: Debian) -> None:
    """O1: stopped by Harmony, PostgreSQL is not started again by systemd, and is clean."""
    host = unit_host
    host.systemctl("stop", "harmony", timeout=90)
    assert host.pids("postgres") == []
    wait_until(lambda: host.show(debian.unit, "ActiveState") in {"inactive", "failed"}, "its unit is down")
    assert control_state(host, debian.data) == "shut down"
    host.systemctl("start", debian.unit)  # an operator, while Harmony is down
    assert standby(host)
    host.start()
    host.wait_for_primary()
    assert not standby(host)


def test_a_standby_outlives_harmony(unit_host: HarmonyHost) -> None:
    """O7: stopping Harmony never takes PostgreSQL along."""
    host = unit_host
    with following(host):
        master = postmaster(host)
        host.systemctl("stop", "harmony", timeout=90)
    assert postmaster(host) == master
    assert standby(host)
    host.start()
    host.wait_for_primary()


def test_a_killed_harmony_fences_it(unit_host: HarmonyHost, debian: Debian) -> None:
    """W9: all of Harmony dead: ExecStopPost= finds PostgreSQL in its unit and ends it."""
    host = unit_host
    with writing(host) as writer:
        killed = ended(host, *HARMONY)
        wait_until(lambda: len(writer.so_far().eras()) > 1, "it leads again", 60)
        written = writer.so_far()
    took = written.last_s(written.eras()[0]) - killed
    print(f"run = systemd, all killed: last commit acknowledged after {took:.3f} s")
    assert took <= LEASE_S + FENCE_TIMEOUT_S + pace.SLACK_S
    host.wait_for_primary()


# ---------------------------------------------------------------- systemd and operators meanwhile


def test_a_unit_that_restarts_by_itself_comes_back_read_only(unit_host: HarmonyHost, debian: Debian) -> None:
    """I1: Restart=always: the lease's end fences it all the same, and what systemd brings back cannot write."""
    host = unit_host
    host.write(f"/etc/systemd/system/{FAILS}", "[Service]\nRestart=always\nRestartSec=0\n")
    host.systemctl("daemon-reload")
    with writing(host) as writer:
        host.signal("harmony-supervisor", signal.SIGSTOP)
        host.signal("harmony.agent", signal.SIGSTOP)
        began = now_s()
        wait_until(lambda: now_s() > began + LEASE_S + FENCE_TIMEOUT_S + 1.5, "long enough", 10)
        old = writer.so_far()
        assert len(old.eras()) == 1
        last = old.commits[-1].at_s - began
        fence = host.fencer().self_fence
        wait_until(lambda: not host.pids("postgres"), "systemd's restart is stopped")
        host.signal("harmony.agent", signal.SIGCONT)
        host.signal("harmony-supervisor", signal.SIGCONT)
        host.wait_for_primary()
        writer.wait_for_commit(now_s())
    print(f"Restart=always: last commit acknowledged after {last:.3f} s; {fence}")
    assert last <= LEASE_S + FENCE_TIMEOUT_S
    assert fence is not None
    assert fence.state == "done"
    host.run(["rm", f"/etc/systemd/system/{FAILS}"])
    host.systemctl("daemon-reload")


def test_an_operators_restart_while_leading(unit_host: HarmonyHost, debian: Debian) -> None:
    """O7: seen as PostgreSQL's death: fenced, explained, activated again. (systemctl may say that it was cancelled.)"""
    host = unit_host
    with writing(host) as writer:
        began = now_s()
        host.systemctl("restart", debian.unit, check=False)
        wait_until(lambda: "PostgreSQL died" in host.journal("harmony", 40), "it is explained")
        wait_until(
            lambda: host.fencer().active is not None and not host.fencer().is_standby, "it leads again"
        )
        writer.wait_for_commit(now_s())
        gap = writer.so_far().longest_gap_s(began)
    print(f"systemctl restart of PostgreSQL's unit: nothing written for {gap:.2f} s")
    assert host.show(debian.unit, "ActiveState") == "active"


# ---------------------------------------------------------------- one that ran before Harmony


def test_a_unit_that_runs_is_adopted(debian_template: HarmonyHost, debian: Debian, new_host: NewHost) -> None:
    """Issue 5: the same postmaster before and after, no error for its client; then it is guarded as every primary."""
    host = new_host("adopted", like=debian_template)
    host.boot()
    host.configure(debian.cluster("systemd"), debian.programs())
    host.systemctl("start", debian.unit)
    files, master = checksums(host, debian), postmaster(host)
    with writing(host) as writer:
        began = now_s()
        said = host.run([f"{PREFIX}/bin/harmonyctl", "adopt", "--yes", "--no-wait"]).stdout
        assert "permitted" in said
        host.start()
        wait_until(lambda: host.fencer().active is not None, "it is led", 30)
        writer.wait_for_commit(now_s())
        (only,) = writer.so_far().eras()
        assert postmaster(host) == master
        assert host.fencer().held_by == f"cgroup of {debian.unit}"
        assert setting(host, "synchronous_standby_names") == ""
        assert f"{debian.data}/harmony.postgresql.conf" in host.read(f"{debian.etc}/conf.d/zz-harmony.conf")
        assert checksums(host, debian) == files
        host.signal("harmony-supervisor", signal.SIGSTOP)
        host.signal("harmony.agent", signal.SIGSTOP)
        stopped = now_s()
        wait_until(lambda: now_s() > stopped + LEASE_S + FENCE_TIMEOUT_S + 1, "the lease has ended", 20)
        wait_until(lambda: now_s() - writer.so_far().last_s(only) > 1, "writes have ended", 20)
        assert writer.so_far().last_s(only) <= stopped + LEASE_S + FENCE_TIMEOUT_S + pace.SLACK_S
    print(f"adopted: nothing written for {writer.so_far().longest_gap_s(began):.2f} s at most")


# ---------------------------------------------------------------- what is wrong is named


def failure(host: HarmonyHost) -> str:
    """Why the newest activation failed, and that nothing is left half done after it."""
    host.systemctl("restart", "harmony", timeout=90)
    wanted = '"op":"activate"', '"state":"failed"'

    def failed() -> list[str]:
        invocation = host.show("harmony", "InvocationID")
        said = host.run(
            ["journalctl", "--no-pager", "--output=cat", f"_SYSTEMD_INVOCATION_ID={invocation}"]
        ).stdout
        return [line for line in said.splitlines() if all(word in line for word in wanted)]

    wait_until(failed, "an activation fails")
    return failed()[0]


def test_a_unit_that_does_not_exist(unit_host: HarmonyHost, debian: Debian) -> None:
    """A named error, PostgreSQL down and marked, and all well again with the right name."""
    host = unit_host
    good = host.read(CONFIG)
    host.write(CONFIG, good.replace(debian.unit, "nobody-has-this.service"))
    assert "Unit nobody-has-this.service not found" in failure(host)
    assert host.pids("postgres") == []
    host.run(["test", "-e", f"{debian.data}/standby.signal"])
    host.write(CONFIG, good)
    host.systemctl("restart", "harmony", timeout=90)
    host.wait_for_primary()


def test_a_unit_that_fails_to_start(unit_host: HarmonyHost, debian: Debian) -> None:
    """Likewise where PostgreSQL does not like its configuration; the error says where to look."""
    host = unit_host
    wrong = f"{debian.etc}/conf.d/wrong.conf"
    host.write(wrong, "no_such_setting = 1\n", owner="postgres:postgres")
    said = failure(host)
    assert f"systemctl start {debian.unit} exited 1" in said
    assert "journalctl" in said
    wait_until(lambda: not host.pids("postgres"), "nothing is left")
    host.run(["test", "-e", f"{debian.data}/standby.signal"])
    host.run(["rm", wrong])
    host.wait_for_primary()


def test_settings_that_would_override_harmonys_are_refused(unit_host: HarmonyHost, debian: Debian) -> None:
    """I2: who appends to postgresql.conf would switch synchronous commits off unseen: the line is named instead."""
    host = unit_host
    user = f"{debian.etc}/postgresql.conf"
    good = host.read(user)
    late = len(good.splitlines()) + 1
    host.write(user, good + "synchronous_standby_names = ''\n", owner="postgres:postgres")
    said = failure(host)
    assert f"{user}, line {late}, sets synchronous_standby_names" in said
    host.write(user, good, owner="postgres:postgres")
    host.wait_for_primary()
    assert setting(host, "synchronous_standby_names") == ""
