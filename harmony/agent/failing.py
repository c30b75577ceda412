"""Which of the store's calls fail now, why and since when; each cause is logged once, not at every call.

Reads and writes are kept apart: where JetStream's disk is full, reads go on while every write fails.
"""

from __future__ import annotations

import re

import structlog

NS = 1_000_000_000
MAX_TOLD = 16  # causes remembered for one failure; more are not logged before it ends
_NUMBERS = re.compile(r"\d+(\.\d+)?")
log = structlog.get_logger("agent")


class Failing:
    """`failed` and `worked` after each call; times are CLOCK_BOOTTIME in ns."""

    def __init__(self) -> None:
        self._now: dict[str, tuple[str, int]] = {}  # kind of call → why, since when
        self._told: dict[str, set[str]] = {}

    def failed(self, kind: str, why: str, now_ns: int) -> None:
        """A call of `kind` ("write", "read") came to nothing."""
        _, since_ns = self._now.get(kind, ("", now_ns))
        self._now[kind] = (why, since_ns)
        told = self._told.setdefault(kind, set())
        cause = _NUMBERS.sub("#", why)  # a time or a revision in it makes no other cause
        if cause not in told and len(told) < MAX_TOLD:
            told.add(cause)
            log.warning("store unavailable", call=kind, why=why)

    def worked(self, kind: str) -> None:
        """A call of `kind` was answered; a refused write is an answer, too."""
        self._told.pop(kind, None)
        self._now.pop(kind, None)

    def newest(self, now_ns: int) -> tuple[str, float]:
        """Why calls fail, and for how many seconds; ("", 0.0) where the last of each kind was answered.

        Failing writes come first: without them nobody leads.
        """
        for kind in ("write", "read"):
            if kind in self._now:
                why, since_ns = self._now[kind]
                return f"{kind}s fail: {why}", (now_ns - since_ns) / NS
        return "", 0.0
