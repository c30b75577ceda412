"""The times that safety rests on, their derived lease, the inequality between them, and the presets.

It reads no clock. All values are seconds in the configuration and nanoseconds inside the core.
"""

from __future__ import annotations

from functools import cached_property

import msgspec

NS = 1_000_000_000


class Timing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """Seconds throughout; `failure_threshold` and `success_threshold` are counts. `dict`: for what is derived once."""

    heartbeat_interval_s: float
    heartbeat_timeout_s: float
    failure_threshold: int
    success_threshold: int
    fence_timeout_s: float
    safety_margin_s: float
    failover_timeout_s: float
    watchdog_timeout_s: float = 0.0  # 0: no watchdog

    @property
    def stop_s(self) -> float:
        """How long after the lease's end PostgreSQL may go on at the most: the fence, or the host's reset."""
        return max(self.fence_timeout_s, self.watchdog_timeout_s)

    @property
    def lease_s(self) -> float:
        """How long a heartbeat entitles the primary, counted from its send."""
        return self.heartbeat_interval_s + self.heartbeat_timeout_s * self.failure_threshold

    @cached_property
    def lease_ns(self) -> int:
        return round(self.lease_s * NS)

    @cached_property
    def interval_ns(self) -> int:
        return round(self.heartbeat_interval_s * NS)

    @cached_property
    def timeout_ns(self) -> int:
        return round(self.heartbeat_timeout_s * NS)

    @cached_property
    def stop_ns(self) -> int:
        return round(self.stop_s * NS)

    @cached_property
    def margin_ns(self) -> int:
        return round(self.safety_margin_s * NS)

    @cached_property
    def failover_ns(self) -> int:
        return round(self.failover_timeout_s * NS)

    @cached_property
    def settle_ns(self) -> int:
        """After this silence the primary has certainly stopped: what a standby then has received is all."""
        return self.lease_ns + self.stop_ns

    def violation(self) -> str | None:
        """None when failover_timeout > lease + max(fence_timeout, watchdog) + safety_margin; else every number."""
        needed = self.lease_s + self.stop_s + self.safety_margin_s
        if self.failover_ns > self.lease_ns + self.stop_ns + self.margin_ns:
            return None
        stop = f"fence_timeout_s {self.fence_timeout_s:g}"
        if self.watchdog_timeout_s > self.fence_timeout_s:
            stop = f"watchdog.timeout_s {self.watchdog_timeout_s:g} (longer than {stop})"
        return (
            f"failover_timeout_s {self.failover_timeout_s:g} must be greater than lease {self.lease_s:g} "
            f"(heartbeat_interval_s {self.heartbeat_interval_s:g} + heartbeat_timeout_s "
            f"{self.heartbeat_timeout_s:g} × failure_threshold {self.failure_threshold}) + {stop} "
            f"+ safety_margin_s {self.safety_margin_s:g} = {needed:g}: "
            "otherwise a replica could promote before the old primary has certainly stopped; "
            f"raise failover_timeout_s above {needed:g} or lower one of the others"
        )


PRESETS: dict[str, Timing] = {
    "fast": Timing(
        heartbeat_interval_s=0.5,
        heartbeat_timeout_s=0.5,
        failure_threshold=3,
        success_threshold=2,
        fence_timeout_s=1.0,
        safety_margin_s=0.5,
        failover_timeout_s=4.0,
    ),
    "standard": Timing(
        heartbeat_interval_s=1.0,
        heartbeat_timeout_s=2.0,
        failure_threshold=5,
        success_threshold=2,
        fence_timeout_s=2.0,
        safety_margin_s=1.5,
        failover_timeout_s=15.0,
    ),
    "wan": Timing(
        heartbeat_interval_s=2.0,
        heartbeat_timeout_s=5.0,
        failure_threshold=5,
        success_threshold=3,
        fence_timeout_s=5.0,
        safety_margin_s=3.0,
        failover_timeout_s=40.0,
    ),
}
