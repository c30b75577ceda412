"""Each scenario of the demo on real parts: nothing lost, never two primaries, bounded (I1, I2, I5, W9)."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest

from harmony.core.timing import PRESETS
from harmony.demo.scenarios import Result, Scenario, store_down_s
from tests import pace

pytestmark = pytest.mark.real
FAST = PRESETS["fast"]
BOUND_S = FAST.lease_s + FAST.fence_timeout_s


def run(scenario: Scenario) -> Result:
    """The demo as a person starts it; its JSON."""
    argv = [
        sys.executable,
        "-I",
        "-m",
        "harmony",
        "demo",
        "--scenario",
        scenario.value,
        "--preset",
        "fast",
        "--json",
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return msgspec.json.decode(done.stdout.splitlines()[-1].encode(), type=Result)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("scenario", list(Scenario))
def test_scenario(scenario: Scenario) -> None:
    """I1, I2, I5: takeover (or return), no row lost, never two. W9: writes stop within the bound."""
    result = run(scenario)
    assert result.ok, result.why
    assert result.scenario == scenario.value
    assert result.lost_rows == 0
    assert result.dual_primary_s == 0
    assert result.old_primary_last_ack_s <= BOUND_S + pace.SLACK_S
    assert result.outage_s is not None
    if scenario is Scenario.STORE_DOWN:
        assert result.new_primary == result.old_primary
        assert result.outage_s >= store_down_s("fast") - BOUND_S
    else:
        assert result.new_primary != result.old_primary
        assert result.old_primary_back_s is not None
        assert 0 < result.outage_s < 3 * FAST.failover_timeout_s + 30 + pace.SLACK_S
