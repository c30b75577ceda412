"""A short chaos campaign on real parts: nothing is broken that was promised; and what is broken, is seen."""

from __future__ import annotations

import os
import shutil
from itertools import islice

import pytest

from bench.ha import checker, plan
from bench.ha.chaos import Chaos, options
from bench.ha.faults import FAULTS
from bench.ha.harmony import Harmony
from bench.ha.peer import DATABASES
from bench.ha.scenarios import Act
from bench.ha.stage import Stage
from harmony.config import Rejoin
from harmony.core.timing import PRESETS
from tests.hosts.lab import why_not

pytestmark = pytest.mark.real
# The agent is kept down and the stream's leader frozen; then a host is lost, and a switchover asked for as it returns.
SEED, ROUNDS = 6285, 2


def test_a_short_campaign() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    bounds = checker.bounds(PRESETS["fast"], Rejoin().after_s)
    with Stage(options("harmony", "fast", "on"), disks=True, say=print) as stage:
        acting = Chaos(stage, bounds, print)
        for what in islice(plan.rounds(SEED, list(FAULTS)), ROUNDS):
            played = acting.play(what, lambda: os.getloadavg()[0])
            print(played)
            assert played.violations == (), acting.keep(f"seed {SEED}, round {what.number}")
        assert sum(acting.counts.values()) >= ROUNDS + 1
        _no_failover_is_stopped(acting)
        _what_is_broken_is_seen(acting)


def _no_failover_is_stopped(acting: Chaos) -> None:
    """Each round begins with an operator who has looked into the changes of leadership so far."""
    peer = acting.stage.peer
    assert isinstance(peer, Harmony)
    assert _changes(peer) > 0
    acting.attend()
    acting.stage.wait_until(lambda: _changes(peer) == 0, "changes that nobody has looked into yet", 15)


def _changes(peer: Harmony) -> int:
    said = peer.status(DATABASES[0])["myself"]
    assert isinstance(said, dict)
    return int(said["changes"])


def _what_is_broken_is_seen(acting: Chaos) -> None:
    """A row that was acknowledged is taken away; then a standby whose Harmony stands still is promoted by hand."""
    stage = acting.stage
    assert acting.read_back() == []
    primary = acting.primary()
    assert stage.client is not None
    row = stage.client.poll()[-20].id
    stage.execute(primary, f"DELETE FROM bench WHERE id = {row}")  # noqa: S608 (a number)
    found = acting.read_back()
    assert {(v.kind, f" {row} (by " in v.what) for v in found} == {("lost", True)}

    assert checker.overlaps(acting.acks()) == []
    other = min(set(DATABASES) - {primary})
    for fault in ("supervisor-frozen", "agent-frozen", "fencer-frozen"):  # who else would end it in a moment
        FAULTS[fault].strike(Act(stage, primary, other))
    stage.execute(other, "SELECT pg_promote(false)")

    def seen() -> bool:
        acting.poll()
        return checker.overlaps(acting.acks()) != []

    stage.wait_until(seen, "two primaries that the checker sees", 15)
    kept = acting.keep("asked for by a test")
    text = (kept / "timeline.txt").read_text()
    shutil.rmtree(kept)
    for words in ("row 806", "strike host-lost", "clients: first acknowledgement", "/postgres"):
        assert words in text
