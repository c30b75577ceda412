"""What the configuration wants of the watchdog, and the task that pets it: with a watchdog that notes resets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio
import trio.testing

from harmony_fencer import guard
from harmony_fencer.fencer import Fencer
from harmony_fencer.watchdog import Policy, WatchdogError
from tests.fencer.fakes import NS, DrivenClock, FakeWatchdog

TIMEOUT_NS = 2 * NS


class Pet:
    """guard.pet over a fake fencer, driven step by step."""

    def __init__(self, tmp_path: Path) -> None:
        self.clock = DrivenClock(NS)
        self.device = FakeWatchdog(self.clock.now_ns)
        self.policy = Policy("required", 2, self.device, tmp_path / "watchdog.armed")
        self.fencer = SimpleNamespace(watchdog=self.policy, deadline_ns=None, could_write=False)

    async def through(self, seconds: float, *, step_ns: int = NS // 10) -> None:
        """Let the task run while so much time passes."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guard.pet, cast(Fencer, self.fencer), self.clock, 0.5)
            end = self.clock.now_ns() + round(seconds * NS)
            while self.clock.now_ns() < end:
                await trio.testing.wait_all_tasks_blocked()
                self.clock.advance(step_ns)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()


async def test_petted_while_the_lease_lasts_and_not_after_it(tmp_path: Path) -> None:
    """W9: from the lease's end until a proven fence nobody keeps the host from being reset."""
    p = Pet(tmp_path)
    p.policy.arm()
    p.fencer.could_write, p.fencer.deadline_ns = True, p.clock.now_ns() + 5 * NS
    await p.through(4.5)
    assert p.device.reset_at_ns is None
    await p.through(4)
    reset = p.device.reset_at_ns
    assert reset is not None
    assert reset <= p.fencer.deadline_ns + TIMEOUT_NS


async def test_petted_on_once_the_fence_is_proven(tmp_path: Path) -> None:
    """A fence that is proven within the timeout saves the host."""
    p = Pet(tmp_path)
    p.policy.arm()
    p.fencer.could_write, p.fencer.deadline_ns = True, p.clock.now_ns() + NS
    await p.through(2)
    p.fencer.could_write, p.fencer.deadline_ns = False, None
    await p.through(10)
    assert p.device.reset_at_ns is None


async def test_a_device_that_fails_does_not_end_the_fencer(tmp_path: Path) -> None:
    """O5: the host may be reset; the fencer, which would fence, goes on."""
    p = Pet(tmp_path)
    p.policy.arm()
    p.device.refuse = "broken"
    await p.through(3)
    assert p.device.reset_at_ns is not None


def test_required_refuses_to_lead_and_says_so_until_it_can(tmp_path: Path) -> None:
    """The agent is no candidate while cannot_lead says why."""
    device = FakeWatchdog(lambda: 0)
    policy = Policy("required", 2, device, tmp_path / "m")
    assert not policy.cannot_lead
    device.refuse = "held by systemd"
    with pytest.raises(WatchdogError):
        policy.arm()
    assert "held by systemd" in policy.cannot_lead
    device.refuse = None
    policy.arm()
    assert not policy.cannot_lead
    assert "armed, 2 s" in str(policy)


def test_automatic_leads_without_and_off_touches_nothing(tmp_path: Path) -> None:
    device = FakeWatchdog(lambda: 0)
    device.refuse = "missing"
    automatic = Policy("automatic", 2, device, tmp_path / "m")
    automatic.arm()
    assert not automatic.cannot_lead
    assert "missing" in str(automatic)
    off = Policy("off", 2, None, tmp_path / "m")
    off.arm()
    off.disarm()
    assert str(off) == "off"


def test_a_timer_that_a_dead_fencer_left_is_stopped_after_the_fence(tmp_path: Path) -> None:
    """Else the host is reset though nothing here writes; a node that never led leaves the device alone."""
    now = [0]
    device = FakeWatchdog(lambda: now[0])
    Policy("required", 2, device, tmp_path / "m").arm()
    device.holder_dies()
    successor = Policy("required", 2, device, tmp_path / "m")
    now[0] = NS
    successor.disarm()
    now[0] = 100 * NS
    assert device.reset_at_ns is None
    untouched = FakeWatchdog(lambda: now[0])
    untouched.refuse = "must not be opened"
    Policy("required", 2, untouched, tmp_path / "never").disarm()


def test_a_timer_that_cannot_be_stopped_is_kept(tmp_path: Path) -> None:
    device = FakeWatchdog(lambda: 0, nowayout=True)
    policy = Policy("automatic", 2, device, tmp_path / "m")
    policy.arm()
    policy.disarm()
    assert device.armed
    assert "nowayout" in str(policy)
    assert (tmp_path / "m").exists()
