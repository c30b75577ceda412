"""Hosts for tests: one plain, and one with a Harmony cluster of one; skipped, with the reason, where none can be.

`host` and `harmony_host` are shared by all tests of a session: leave them running, and healthy. A test that breaks
things takes `fresh_harmony_host` (a copy of the disk of a host that was shut down cleanly) or `new_host`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Protocol

import pytest

from tests.hosts.debian import Debian, version
from tests.hosts.harmony_host import HarmonyHost
from tests.hosts.host import Host, why_not

GRANT = "/etc/systemd/system/harmony.service.d/grant.conf"


class NewHost(Protocol):
    """Takes what HarmonyHost takes."""

    def __call__(
        self,
        name: str = "host",
        *,
        netns: str | None = None,
        wanted: Sequence[str] = (),
        like: Host | None = None,
    ) -> HarmonyHost: ...


@pytest.fixture(scope="session")
def able() -> None:
    """Skips where this machine cannot have such hosts."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def host(able: None) -> Iterator[HarmonyHost]:
    """A booted host with nothing on it."""
    with HarmonyHost("plain") as made:
        yield made


@pytest.fixture(scope="session")
def template(able: None) -> Iterator[HarmonyHost]:
    """A host with a Harmony cluster of one, shut down cleanly: `like=template` copies its disk."""
    with HarmonyHost("template") as made:
        made.install_harmony()
        made.make_cluster()
        made.power_off()
        yield made


@pytest.fixture(scope="session")
def harmony_host(template: HarmonyHost) -> Iterator[HarmonyHost]:
    """A host whose Harmony came up by itself at boot, and is the primary."""
    with HarmonyHost("harmony", like=template) as made:
        made.wait_for_primary()
        yield made


@pytest.fixture(scope="session")
def hard_host(template: HarmonyHost) -> Iterator[HarmonyHost]:
    """A primary that tests stop, kill and freeze, and leave leading again; with real-time scheduling granted."""
    with HarmonyHost("hard", like=template) as made:
        grant(made)
        made.systemctl("restart", "harmony", timeout=90)
        made.wait_for_primary()
        yield made


def grant(host: HarmonyHost) -> None:
    """What LimitRTPRIO= and LimitMEMLOCK= grant on a real host, where this one's systemd may not raise limits."""
    limit = [
        "systemd-run",
        "--quiet",
        "--wait",
        "--pipe",
        "--property=LimitRTPRIO=5",
        "sh",
        "-c",
        "ulimit -Hr",
    ]
    if host.run(limit).stdout.strip() == "0":
        host.write(GRANT, "[Service]\nCapabilityBoundingSet=CAP_SYS_NICE CAP_IPC_LOCK\n")
        host.systemctl("daemon-reload")


@pytest.fixture
def new_host(able: None) -> Iterator[NewHost]:
    """Makes hosts of a test's own, not yet booted; they are destroyed after the test."""
    with ExitStack() as stack:

        def make(
            name: str = "host",
            *,
            netns: str | None = None,
            wanted: Sequence[str] = (),
            like: Host | None = None,
        ) -> HarmonyHost:
            made = HarmonyHost(name, netns=netns, wanted=wanted, like=like)
            stack.callback(made.destroy)
            return made

        yield make


@pytest.fixture
def fresh_harmony_host(template: HarmonyHost, new_host: NewHost) -> HarmonyHost:
    """A host of a test's own, like `harmony_host`."""
    made = new_host("fresh", like=template)
    made.boot()
    made.wait_for_primary()
    return made


@pytest.fixture(scope="session")
def debian(able: None) -> Debian:
    """Debian's PostgreSQL; skips where this machine has none."""
    found = version()
    if found is None:
        pytest.skip("no PostgreSQL of Debian's, or no postgresql-common, on this machine")
    return Debian(found)


@pytest.fixture(scope="session")
def debian_template(template: HarmonyHost, debian: Debian) -> Iterator[HarmonyHost]:
    """A host with Debian's cluster and Harmony configured for it (run = "pg_ctl"), not started, switched off."""
    with HarmonyHost("debian", like=template) as made:
        made.systemctl("disable", "--now", "harmony", timeout=90)
        made.run(["sh", "-c", "rm -rf /var/lib/harmony /srv/harmony /run/harmony"])
        debian.make(made)
        made.configure(debian.cluster("pg_ctl"), debian.programs())
        made.power_off()
        yield made
