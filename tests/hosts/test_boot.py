"""A fence lasts: whoever starts PostgreSQL at boot gets a read-only standby, until Harmony activates it (I1, I3, O7).

The cluster is Debian's, started at boot by Debian's own unit, and led by Harmony with run = "pg_ctl".
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.hosts.debian import DROP_IN, Debian
from tests.hosts.harmony_host import CONFIG, PREFIX, TREE, HarmonyHost
from tests.hosts.host import HostError, wait_until

pytestmark = pytest.mark.real
INSERT = "INSERT INTO harmony_demo (id) VALUES ((random() * 1e15)::bigint)"


@pytest.fixture(scope="module")
def boots(debian_template: HarmonyHost, debian: Debian) -> Iterator[HarmonyHost]:
    """A host that is rebooted and cut off by these tests, in their order; each says how it wants it to boot."""
    with HarmonyHost("boots", like=debian_template) as made:
        debian.at_boot(made, TREE)
        made.start()
        made.wait_for_primary()
        yield made


def lead(host: HarmonyHost) -> None:
    """Harmony leads, and is not to start at the next boot."""
    host.systemctl("disable", "harmony")
    host.start()
    host.wait_for_primary()
    host.sql(INSERT)


def standby(host: HarmonyHost) -> bool:
    return host.sql("SELECT pg_is_in_recovery()") == [[True]]


def setting(host: HarmonyHost, name: str) -> str:
    argv = ["psql", "--no-psqlrc", "--tuples-only", "--no-align", f"--command=SHOW {name}"]
    return host.run(argv, user="postgres").stdout.strip()


def up(host: HarmonyHost, debian: Debian) -> None:
    wait_until(lambda: host.show(debian.unit, "ActiveState") == "active", f"{debian.unit} is active")


def latch(host: HarmonyHost) -> tuple[str, str, str]:
    found = host.fencer().latch
    assert found is not None
    return found.reason, found.who, found.at_utc


def test_a_power_cut_of_a_primary(boots: HarmonyHost, debian: Debian) -> None:
    """I1: nothing was fenced before the cut, no standby.signal is on disk; at boot PostgreSQL is read-only."""
    host = boots
    lead(host)
    assert setting(host, "config_file") == f"{debian.data}/harmony.postgresql.conf"
    assert setting(host, "cluster_name") == f"{debian.version}/main"  # of /etc, which it includes
    host.run(["sh", "-c", 'test ! -e "$0/standby.signal"', debian.data])
    host.power_cut()
    host.boot()
    up(host, debian)
    assert standby(host)
    with pytest.raises(HostError, match="read-only transaction"):
        host.sql(INSERT)
    assert host.show("harmony", "ActiveState") == "inactive"
    assert host.show("harmony-boot-fence", "Result") == "success"
    lead(host)  # and what systemd started is led by Harmony again
    assert not standby(host)


def test_without_the_drop_in_it_is_writable(boots: HarmonyHost, debian: Debian) -> None:
    """What the boot fence is for: the test before can fail."""
    host = boots
    lead(host)
    host.run(["rm", DROP_IN])
    host.systemctl("disable", "harmony-boot-fence")
    host.power_cut()
    host.boot()
    up(host, debian)
    assert not standby(host)
    host.sql(INSERT)
    debian.at_boot(host, TREE)


def test_harmony_ends_what_is_writable_at_its_start(boots: HarmonyHost, debian: Debian) -> None:
    """I1: where the boot fence is not installed, Harmony's fencer fences before anything else."""
    host = boots
    assert not standby(host)  # as the test before left it
    (before,) = [p.pid for p in host.processes("postgres") if "-D" in p.argv]
    lead(host)
    (after,) = [p.pid for p in host.processes("postgres") if "-D" in p.argv]
    assert before != after
    assert "at start: PostgreSQL could write and there is no valid lease" in host.journal("harmony", 200)


def test_an_operators_fence_lasts(boots: HarmonyHost, debian: Debian) -> None:
    """An operator's latch is there after a reboot and a power cut, with who and when; PostgreSQL is never writable."""
    host = boots
    lead(host)
    host.systemctl("enable", "harmony")
    host.run([f"{PREFIX}/bin/harmonyctl", "fence", "--reason", "the disk is replaced", "--force"])
    set_ = latch(host)
    assert set_[0] == "the disk is replaced"
    assert "root" in set_[1]
    for cut in (False, True):
        if cut:
            host.power_cut()
            host.boot()
        else:
            host.reboot()
        wait_until(lambda: host.show("harmony", "ActiveState") == "active", "Harmony is active")
        assert latch(host) == set_
        if host.pids("postgres"):
            assert standby(host)
        host.run(["test", "-e", f"{debian.data}/standby.signal"])
        wait_until(lambda: "the disk is replaced" in host.status()[1], "harmonyctl status names the latch")
        code, said = host.status()
        assert code not in {0, 1}, said
        assert "the disk is replaced" in json.dumps(json.loads(said)["myself"]["latched"])
    host.run([f"{PREFIX}/bin/harmonyctl", "unfence"])
    host.wait_for_primary()
    assert not standby(host)


def test_postgresql_does_not_start_where_the_boot_fence_fails(boots: HarmonyHost, debian: Debian) -> None:
    """Requires=: with a configuration that cannot be read nobody knows what is safe; the journal says why."""
    host = boots
    lead(host)
    good = host.read(CONFIG)
    host.write(CONFIG, good.replace("preset", "pre-set"))
    host.power_cut()
    host.boot()
    assert host.show("harmony-boot-fence", "Result") == "exit-code"
    assert host.show(debian.unit, "ActiveState") == "inactive"
    assert host.pids("postgres") == []
    assert "pre-set" in host.journal("harmony-boot-fence")
    said = host.run(["journalctl", "--no-pager", "--boot", "--output=cat", f"--unit={debian.unit}"]).stdout
    assert "Dependency failed for" in said
    host.write(CONFIG, good)
    host.systemctl("start", debian.unit)  # systemd runs the boot fence first
    assert standby(host)
