"""Times that must fit into others: what is derived from them, and what is said of those that a user has set.

Pure: it reads no clock and no file. The inequality that keeps two primaries apart is Timing.violation().
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from harmony.core.timing import Timing

Values = Mapping[str, Mapping[str, object]]  # the configuration by section and key, as far as it is valid

AGENT_HUNG_SHARE = 0.35  # of the lease; in the rest another agent starts and its heartbeat is acknowledged
AGENT_HUNG_MOST_S = 3.0
PINGS = 4  # within ping_timeout_s: a hang is noticed by then, whenever it begins
PING_INTERVAL_MOST_S = 0.5
LEAST_HUNG_S = 0.25  # on a busy host a healthy process does not get to run for so long now and then
LEAST_LEASE_S = 0.75  # a hung agent is replaced within it: LEAST_HUNG_S is at most AGENT_HUNG_SHARE of it
# running.py's, in the supervisor: within fence_timeout a hung fencer is killed, and another one started, which fences.
LEAST_FENCE_S = 2 * LEAST_HUNG_S
FENCER_HUNG_SHARE = 0.35
FENCER_START_S = 0.3
RECONNECT_S = 2.5  # the standbys' connect_timeout and wal_retrieve_retry_interval: harmony_fencer/settings.py
ROUNDING_S = 1e-9  # 0.35 × 11 is a little less than 3.85
# systemd/harmony.service
START_LIMIT_S = 120.0
STOP_LIMIT_S = 60.0
STARTING_S = (
    30.0  # until both children are ready, where the lease of an earlier supervisor does not run any more
)
STOPPING_S = 6.0  # the supervisor's patience over the agent's hand-over and the fencer's shutdown


def pings(lease_s: float, timeout_s: float | None, interval_s: float | None) -> tuple[float, float]:
    """Seconds (between pings of the agent, without an answer until it is replaced); None: the user sets none."""
    if timeout_s is None:
        timeout_s = min(AGENT_HUNG_MOST_S, AGENT_HUNG_SHARE * lease_s)
    return (min(PING_INTERVAL_MOST_S, timeout_s / PINGS) if interval_s is None else interval_s), timeout_s


def problems(t: Timing, values: Values) -> list[str]:
    """Each time that does not fit, by its place, with why and what to do."""
    return [problem for check in _CHECKS for problem in check(t, values)]


def warnings(t: Timing, watchdog: bool) -> list[str]:
    """What fits only if something outside of this configuration is changed, or costs more than it needs to."""
    found = []
    starts_s = t.lease_s + t.fence_timeout_s + STARTING_S
    stops_s = t.lease_s + 2 * t.fence_timeout_s + STOPPING_S
    for what, takes_s, key, limit_s in (
        ("start", starts_s, "TimeoutStartSec", START_LIMIT_S),
        ("stop", stops_s, "TimeoutStopSec", STOP_LIMIT_S),
    ):
        if takes_s > limit_s:
            found.append(
                f"timing: with a lease of {t.lease_s:g} s a {what} may take {takes_s:g} s, and {key}={limit_s:g} in "
                f"harmony.service ends it before: set {key}={takes_s:g} there by `systemctl edit harmony`"
            )
    replaced_s = 1.5 * max(LEAST_HUNG_S, FENCER_HUNG_SHARE * t.fence_timeout_s) + FENCER_START_S
    if watchdog and t.watchdog_timeout_s < replaced_s:
        found.append(
            f"watchdog.timeout_s: {t.watchdog_timeout_s:g} is short: a fencer that hangs once is replaced within "
            f"{replaced_s:g} s (fence_timeout_s {t.fence_timeout_s:g}), and would reset the host before; raise it, "
            "which costs nothing up to fence_timeout_s"
        )
    return found


def _lease(t: Timing, _values: Values) -> Iterator[str]:
    if t.lease_s < LEAST_LEASE_S:
        yield (
            f"timing.heartbeat_timeout_s: the lease of {t.lease_s:g} s (heartbeat_interval_s "
            f"{t.heartbeat_interval_s:g} + heartbeat_timeout_s {t.heartbeat_timeout_s:g} × failure_threshold "
            f"{t.failure_threshold}) is too short: an agent that hangs could not be replaced within it; at least "
            f"{LEAST_LEASE_S:g} s: raise one of the three"
        )


def _fence(t: Timing, _values: Values) -> Iterator[str]:
    if t.fence_timeout_s < LEAST_FENCE_S:
        yield (
            f"timing.fence_timeout_s: {t.fence_timeout_s:g} is too short: a fencer that hangs is killed after "
            f"{LEAST_HUNG_S:g} s, and the next one must have fenced within fence_timeout_s; at least "
            f"{LEAST_FENCE_S:g}, raise it (and failover_timeout_s)"
        )


def _ping_timeout(t: Timing, values: Values) -> Iterator[str]:
    timeout_s = _seconds(values, "supervisor", "ping_timeout_s")
    if timeout_s is None:
        return
    most_s = AGENT_HUNG_SHARE * t.lease_s
    if timeout_s > most_s + ROUNDING_S:
        yield (
            f"supervisor.ping_timeout_s: {timeout_s:g} is too long for the lease of {t.lease_s:g} s: an agent that "
            f"hangs must be replaced within it, or its primary is fenced; at most {most_s:g} ({AGENT_HUNG_SHARE:g} of "
            "the lease): lower it, leave it out (it follows the lease), or take a longer lease"
        )
    elif timeout_s < LEAST_HUNG_S:
        yield (
            f"supervisor.ping_timeout_s: {timeout_s:g} is too short: a healthy agent on a busy host would be killed "
            f"again and again; at least {LEAST_HUNG_S:g}: raise it, or leave it out"
        )


def _ping_interval(t: Timing, values: Values) -> Iterator[str]:
    interval_s = _seconds(values, "supervisor", "ping_interval_s")
    _, timeout_s = pings(t.lease_s, _seconds(values, "supervisor", "ping_timeout_s"), interval_s)
    if interval_s is not None and interval_s > timeout_s / 2 + ROUNDING_S:
        yield (
            f"supervisor.ping_interval_s: {interval_s:g} is too long for supervisor.ping_timeout_s {timeout_s:g}: an "
            f"agent answers only when it is asked, and would look hung; at most {timeout_s / 2:g} (half of it): "
            "lower it, or leave it out"
        )


def _patience(t: Timing, values: Values) -> Iterator[str]:
    patience_s = _seconds(values, "sickness", "patience_s")
    look_s = 2 * t.heartbeat_timeout_s + t.heartbeat_interval_s / 2
    if patience_s is not None and patience_s < look_s - ROUNDING_S:
        yield (
            f"sickness.patience_s: {patience_s:g} is too short: a look at PostgreSQL takes up to {look_s:g} s (2 × "
            f"heartbeat_timeout_s {t.heartbeat_timeout_s:g} + heartbeat_interval_s {t.heartbeat_interval_s:g} / 2), "
            f"and a busy one would count as sick after two; at least {look_s:g}: raise it, or leave it out"
        )


def _rejoin(_t: Timing, values: Values) -> Iterator[str]:
    after_s = _seconds(values, "rejoin", "after_s")
    if after_s is not None and after_s < RECONNECT_S:
        yield (
            f"rejoin.after_s: {after_s:g} is too short: a standby that only connects anew takes up to {RECONNECT_S:g} "
            f"s, and would be rewound or copied, which destroys what only it has; at least {RECONNECT_S:g}: raise it"
        )


_CHECKS: tuple[Callable[[Timing, Values], Iterator[str]], ...] = (
    _lease,
    _fence,
    _ping_timeout,
    _ping_interval,
    _patience,
    _rejoin,
)


def _seconds(values: Values, section: str, key: str) -> float | None:
    value = values[section].get(key)
    return float(value) if isinstance(value, int | float) else None
