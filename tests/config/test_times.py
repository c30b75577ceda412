"""Times that must fit into others: derived where nothing is set, refused by name where what is set does not fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from harmony import config_times
from harmony.cli.main import cli
from harmony.config import load
from harmony.config_times import pings
from harmony.core.timing import PRESETS
from harmony_supervisor import running
from tests.config.test_config import GOOD, problems, write

START_S = 0.3  # of an agent, and of a fencer; measured 0.1 to 0.3
SERVICE = Path(__file__).parents[2] / "systemd" / "harmony.service"


def refused(tmp_path: Path, text: str) -> str:
    (one,) = problems(write(tmp_path, GOOD + text))
    return one.partition("harmony.toml: ")[2]


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_hung_agent_is_replaced_within_the_lease(tmp_path: Path, preset: str) -> None:
    """It had renewed it up to a heartbeat before; in the rest another one starts and renews it again."""
    t = load(write(tmp_path, GOOD + f'[timing]\npreset = "{preset}"\n'), {}).timing
    interval_s, timeout_s = pings(t.lease_s, None, None)
    assert timeout_s == pytest.approx(min(3.0, 0.35 * t.lease_s))
    assert t.heartbeat_interval_s + interval_s + timeout_s + START_S < t.lease_s
    assert interval_s <= timeout_s / 4, "it is asked often enough to be told from one that hangs"


@pytest.mark.parametrize(
    ("lease_s", "timeout_s", "interval_s", "found"),
    [
        (2.0, None, None, (0.175, 0.7)),
        (11.0, None, None, (0.5, 3.0)),
        (2.0, 0.4, None, (0.1, 0.4)),
        (11.0, 3.85, None, (0.5, 3.85)),
        (2.0, None, 0.2, (0.2, 0.7)),
    ],
)
def test_what_the_user_sets_goes_first(
    lease_s: float, timeout_s: float | None, interval_s: float | None, found: tuple[float, float]
) -> None:
    assert pings(lease_s, timeout_s, interval_s) == pytest.approx(found)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_longest_that_fits_is_accepted(tmp_path: Path, preset: str) -> None:
    most_s = f"{0.35 * PRESETS[preset].lease_s:g}"
    text = f'[timing]\npreset = "{preset}"\n[supervisor]\nping_timeout_s = {most_s}\n'
    assert load(write(tmp_path, GOOD + text), {}).supervisor.ping_timeout_s == float(most_s)


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        (
            '[timing]\npreset = "fast"\n[supervisor]\nping_timeout_s = 3.0\n',
            "supervisor.ping_timeout_s: 3 is too long for the lease of 2 s",
            "at most 0.7 (0.35 of the lease): lower it",
        ),
        (
            "[supervisor]\nping_timeout_s = 0.2\n",
            "supervisor.ping_timeout_s: 0.2 is too short",
            "at least 0.25: raise it",
        ),
        (
            "[supervisor]\nping_timeout_s = 0.8\nping_interval_s = 0.5\n",
            "supervisor.ping_interval_s: 0.5 is too long for supervisor.ping_timeout_s 0.8",
            "at most 0.4 (half of it): lower it",
        ),
        (
            '[timing]\npreset = "fast"\n[supervisor]\nping_interval_s = 0.5\n',
            "supervisor.ping_interval_s: 0.5 is too long for supervisor.ping_timeout_s 0.7",
            "at most 0.35 (half of it): lower it",
        ),
        (
            "[timing]\nfence_timeout_s = 0.4\n",
            "timing.fence_timeout_s: 0.4 is too short",
            "at least 0.5, raise it",
        ),
        (
            "[timing]\nheartbeat_interval_s = 0.1\nheartbeat_timeout_s = 0.2\nfailure_threshold = 3\n",
            "timing.heartbeat_timeout_s: the lease of 0.7 s (heartbeat_interval_s 0.1 + heartbeat_timeout_s 0.2 × fail",
            "at least 0.75 s: raise one of the three",
        ),
        (
            "[sickness]\npatience_s = 4.4\n",
            "sickness.patience_s: 4.4 is too short: a look at PostgreSQL takes up to 4.5 s",
            "at least 4.5: raise it",
        ),
        ("[rejoin]\nafter_s = 2.4\n", "rejoin.after_s: 2.4 is too short", "at least 2.5: raise it"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, text: str, place: str, said: str) -> None:
    """Where, why and what to do."""
    found = refused(tmp_path, text)
    assert found.startswith(place), found
    assert said in found


@pytest.mark.parametrize(
    "text",
    [
        "[supervisor]\nping_timeout_s = 0.25\n",
        "[supervisor]\nping_timeout_s = 0.8\nping_interval_s = 0.4\n",
        "[timing]\nfence_timeout_s = 0.5\n",
        "[timing]\nheartbeat_interval_s = 0.15\nheartbeat_timeout_s = 0.2\nfailure_threshold = 3\n",
        "[sickness]\npatience_s = 4.5\n",
        "[rejoin]\nafter_s = 2.5\n",
    ],
)
def test_what_just_fits_is_not(tmp_path: Path, text: str) -> None:
    load(write(tmp_path, GOOD + text), {})


def test_all_of_them_are_told_at_once_and_by_the_command(tmp_path: Path) -> None:
    """C2: also beside a broken inequality."""
    text = '[timing]\npreset = "fast"\nfailover_timeout_s = 3\n[supervisor]\nping_timeout_s = 20\n'
    path = write(tmp_path, GOOD + text + "[rejoin]\nafter_s = 1\n")
    done = CliRunner().invoke(cli, ["config", "check", str(path)])
    assert done.exit_code == 78
    for place in ("timing.failover_timeout_s", "supervisor.ping_timeout_s", "rejoin.after_s"):
        assert f"{path}: {place}" in done.output


# ---------------------------------------------------------------- the fencer's


@pytest.mark.parametrize("fence_timeout_s", [config_times.LEAST_FENCE_S, 0.7, 1.0, 2.0, 5.0, 60.0])
def test_a_hung_fencer_is_replaced_within_its_timeout_and_a_healthy_one_is_not(
    fence_timeout_s: float,
) -> None:
    """W9, I1: the least that config check accepts leaves room for the next one's fence."""
    interval_s, timeout_s = running.fencer_pings(fence_timeout_s)
    assert timeout_s >= config_times.LEAST_HUNG_S
    assert timeout_s < 2 * interval_s < 1.1 * timeout_s, "the second look after a hang, and no third"
    assert 2 * interval_s + 0.2 < fence_timeout_s, "a start and a fence: measured 0.15 s"
    assert fence_timeout_s < 1 or timeout_s == 0.35 * fence_timeout_s


def test_both_sides_mean_the_same(tmp_path: Path) -> None:
    """config check's numbers are the supervisor's and the unit's own."""
    assert config_times.LEAST_HUNG_S == running.FENCER_HUNG_LEAST_S
    assert config_times.FENCER_HUNG_SHARE == running.FENCER_HUNG_SHARE
    unit = dict(re.findall(r"^(Timeout\w+)=(\d+)$", SERVICE.read_text(), re.MULTILINE))
    assert float(unit["TimeoutStartSec"]) == config_times.START_LIMIT_S
    assert float(unit["TimeoutStopSec"]) == config_times.STOP_LIMIT_S


# ---------------------------------------------------------------- what lies outside of the configuration


def said(tmp_path: Path, text: str) -> list[str]:
    found: list[str] = []
    load(write(tmp_path, GOOD + text), {}, warnings=found)
    return found


@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_presets_fit_into_the_unit(tmp_path: Path, preset: str) -> None:
    assert said(tmp_path, f'[timing]\npreset = "{preset}"\n') == []


def test_a_long_lease_does_not_fit_into_the_unit(tmp_path: Path) -> None:
    """systemd would kill the supervisor in the middle of a clean stop."""
    times = "[timing]\nheartbeat_interval_s = 1\nheartbeat_timeout_s = {}\nfailure_threshold = 5\n"
    (stop,) = said(tmp_path, times.format(10) + "failover_timeout_s = 100\n")
    assert "a stop may take 61 s, and TimeoutStopSec=60 in harmony.service ends it before" in stop
    start, stop = said(tmp_path, times.format(18) + "failover_timeout_s = 200\n")
    assert "a start may take 123 s, and TimeoutStartSec=120" in start
    assert "a stop may take 101 s" in stop


@pytest.mark.parametrize(("timeout_s", "told"), [(1, True), (2, False)])
def test_a_watchdog_that_is_faster_than_a_fencers_replacement(
    tmp_path: Path, timeout_s: int, told: bool
) -> None:
    """A fencer that hangs once under the lease costs nothing, or the whole host."""
    found = said(tmp_path, f'[watchdog]\nmode = "required"\ntimeout_s = {timeout_s}\n')
    assert [w.partition(":")[0] for w in found] == ["watchdog.timeout_s"] * told
    assert said(tmp_path, f"[watchdog]\ntimeout_s = {timeout_s}\n") == [], "it is off"
