"""The dead-man's switch on a real host: whoever is killed, stopped or frozen, writes end in time (I1, W9).

Each test prints what it measured; what it asserts is the promise: no commit is acknowledged later than the end of
the lease plus fence_timeout. The clients are outside the host, and go on while it stands still.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest

from tests import pace
from tests.hosts.harmony_host import CONFIG, HarmonyHost
from tests.hosts.host import wait_until
from tests.hosts.test_units import FENCE_TIMEOUT_S, HARMONY, LEASE_S
from tests.hosts.writer import now_s, writing

pytestmark = [pytest.mark.real, pytest.mark.sampled(4, group="Harmony dies or hangs on a real host")]
THAW_S = 0.3
WATCHDOG_S = 10.0  # WatchdogSec= of the unit


def replaced(host: HarmonyHost, old: dict[str, list[int]]) -> bool:
    """All three are there, and none of the old ones."""
    return all(len(pids := host.pids(name)) == 1 and not set(pids) & set(gone) for name, gone in old.items())


def running(host: HarmonyHost, *names: str) -> dict[str, list[int]]:
    found = {name: host.pids(name) for name in names}
    assert all(len(pids) == 1 for pids in found.values()), found
    return found


def ended(host: HarmonyHost, *names: str) -> float:
    """SIGKILL them, all at once; returns when."""
    found = [process for name in names for process in host.processes(name)]
    assert len(found) == len(names)
    began = now_s()
    for process in found:
        with contextlib.suppress(ProcessLookupError):  # the agent dies with its supervisor
            os.kill(process.outside_pid, signal.SIGKILL)
    return began


# ---------------------------------------------------------------- killed, stopped


def test_all_of_harmony_killed_at_once(hard_host: HarmonyHost) -> None:
    """W9: ExecStopPost= fences what nobody guards any more; then all comes back by itself and leads again."""
    host = hard_host
    old = running(host, *HARMONY)
    with writing(host) as writer:
        killed = ended(host, *HARMONY)
        wait_until(lambda: replaced(host, old), "all three are back")
        host.wait_for_primary()
        again = writer.wait_for_commit(now_s())
        written = writer.so_far()
    first, *_, last = written.eras()
    took = written.last_s(first) - killed
    back = written.first_s(last) - killed
    print(f"all three killed: last commit acknowledged after {took:.3f} s, written again after {back:.2f} s")
    assert took <= LEASE_S + FENCE_TIMEOUT_S + pace.SLACK_S
    assert again > killed
    assert "Harmony has ended" in host.journal("harmony", 400)


def test_all_of_harmony_killed_and_unable_to_come_back(hard_host: HarmonyHost) -> None:
    """W9: nothing but ExecStopPost= is left: no Harmony starts with a configuration that was broken meanwhile."""
    host = hard_host
    good = host.read(CONFIG)
    host.write(CONFIG, good + "this is no TOML\n")
    with writing(host) as writer:
        killed = ended(host, *HARMONY)
        wait_until(lambda: host.show("harmony", "ActiveState") == "failed", "systemd gives up")
        time.sleep(max(0.0, killed + LEASE_S + FENCE_TIMEOUT_S + 1 - now_s()))
        took = writer.so_far().commits[-1].at_s - killed
        host.write(CONFIG, good)
        assert host.pids("postgres") == []
        host.start()
        host.wait_for_primary()
    print(f"all killed for good: last commit acknowledged after {took:.3f} s")
    assert took <= LEASE_S + FENCE_TIMEOUT_S + pace.SLACK_S


def test_agent_and_fencer_killed_at_once(hard_host: HarmonyHost) -> None:
    """W9: the supervisor starts both again; the fencer goes on under the lease, or fences when it is over."""
    host = hard_host
    old = running(host, "harmony_fencer", "harmony.agent")
    supervisor = host.pids("harmony-supervisor")
    with writing(host) as writer:
        killed = ended(host, "harmony_fencer", "harmony.agent")
        wait_until(lambda: replaced(host, old), "both are back")
        host.wait_for_primary()
        writer.wait_for_commit(killed + LEASE_S + FENCE_TIMEOUT_S)
        written = writer.so_far()
    fenced = len(written.eras()) > 1
    gap = written.longest_gap_s(killed)
    print(f"agent and fencer killed: {'fenced' if fenced else 'no fence'}, gap {gap:.2f} s")
    assert host.pids("harmony-supervisor") == supervisor
    if fenced:
        assert written.last_s(written.eras()[0]) <= killed + LEASE_S + FENCE_TIMEOUT_S + pace.SLACK_S


def test_a_hung_supervisor_is_killed_and_replaced(hard_host: HarmonyHost) -> None:
    """W9: WatchdogSec= is real: a supervisor that pets no more is killed, and the next one takes over."""
    host = hard_host
    old = running(host, *HARMONY)
    with writing(host) as writer:
        host.signal("harmony-supervisor", signal.SIGSTOP)
        began = now_s()
        wait_until(
            lambda: not set(host.pids(HARMONY[0])) & set(old[HARMONY[0]]), "it is killed", WATCHDOG_S + 15
        )
        killed = now_s()
        wait_until(lambda: replaced(host, old), "all three are replaced")
        host.wait_for_primary()
        writer.wait_for_commit(killed + LEASE_S + FENCE_TIMEOUT_S)
        written = writer.so_far()
    gap = written.longest_gap_s(began)
    fenced = len(written.eras()) > 1
    print(
        f"hung supervisor: killed after {killed - began:.1f} s; {'fenced' if fenced else 'no fence'}, gap {gap:.2f} s"
    )
    assert killed - began <= WATCHDOG_S + 2 + pace.SLACK_S
    if fenced:  # its agent went on renewing until it died with it
        assert written.last_s(written.eras()[0]) <= killed + LEASE_S + FENCE_TIMEOUT_S + pace.SLACK_S


def test_agent_and_supervisor_stopped(hard_host: HarmonyHost) -> None:
    """W9: nobody renews, nobody is dead: the fencer fences by itself at the lease's end, alone."""
    host = hard_host
    with writing(host) as writer:
        host.signal("harmony-supervisor", signal.SIGSTOP)
        host.signal("harmony.agent", signal.SIGSTOP)
        began = now_s()
        wait_until(lambda: not host.pids("postgres"), "PostgreSQL is gone", LEASE_S + FENCE_TIMEOUT_S + 3)
        gone = now_s() - began
        last = writer.so_far().commits[-1].at_s - began
        host.signal("harmony.agent", signal.SIGCONT)
        host.signal("harmony-supervisor", signal.SIGCONT)
        host.wait_for_primary()
        writer.wait_for_commit(now_s())
    print(f"nobody renews: last commit acknowledged after {last:.3f} s, nobody left after {gone:.3f} s")
    assert last <= LEASE_S + FENCE_TIMEOUT_S + pace.SLACK_S


# ---------------------------------------------------------------- frozen


@pytest.mark.sampled(1)
@pytest.mark.parametrize("beyond_s", [5.0, 12.0])
def test_a_host_that_stood_still(hard_host: HarmonyHost, beyond_s: float) -> None:
    """I1: a host paused beyond its lease (and beyond systemd's watchdog) writes next to nothing when it wakes.

    Statements that clients sent meanwhile wait in its sockets, and its backends are as awake as its fencer.
    """
    host = hard_host
    with writing(host) as writer:
        host.freeze()
        frozen = now_s()
        time.sleep(LEASE_S + beyond_s)
        thawed = now_s()
        host.thaw()
        wait_until(lambda: len(writer.so_far().eras()) > 1, "it leads again", 40)
        written = writer.so_far()
    host.wait_for_primary()
    old = written.eras()[0]
    late = [c for c in written.commits if c.era == old and c.at_s > thawed]
    after_ms = (written.last_s(old) - thawed) * 1000
    print(
        f"frozen for {thawed - frozen:.1f} s: {len(late)} commits acknowledged after the thaw"
        + (f", the last after {after_ms:.1f} ms" if late else "")
        + f"; written again after {written.first_s(written.eras()[1]) - thawed:.2f} s"
    )
    assert after_ms <= THAW_S * 1000 + pace.SLACK_MS


def test_a_short_pause_fences_nothing(hard_host: HarmonyHost) -> None:
    """A pause shorter than what is left of the lease is none: PostgreSQL, fencer and agent are what they were."""
    host = hard_host
    before = running(host, *HARMONY)
    starts, fence = host.fencer().postgres_starts, host.fencer().self_fence
    with writing(host) as writer:
        began = now_s()
        host.freeze()
        time.sleep(0.8)
        host.thaw()
        writer.wait_for_commit(now_s() + LEASE_S)
        written = writer.so_far()
    print(f"frozen for 0.8 s: gap {written.longest_gap_s(began):.2f} s")
    assert len(written.eras()) == 1
    assert (host.fencer().postgres_starts, host.fencer().self_fence) == (starts, fence)
    assert running(host, *HARMONY) == before
