"""One key that this node writes, by compare-and-set, with every doubt about a write resolved by reading.

Invariant (I4): an exchange is `acked` only when the store acknowledged one of its attempts, or a read
shows one of its attempts stored; it is then dated from *that attempt's send*. An exchange is `lost` only
when a read shows a newer value of somebody else. Everything else is `failed`: nothing is assumed.

Pure: it sends nothing and reads no clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec
from msgspec.structs import replace

RETRY_NS = 50_000_000  # pause before asking again inside one exchange


@dataclass(frozen=True, slots=True)
class Attempt:
    id: str
    sent_ns: int


class Register(msgspec.Struct, frozen=True):
    """`revision` None: never read. `deadline_ns` 0: no exchange is running."""

    revision: int | None = None
    deadline_ns: int = 0
    busy: Literal["", "write", "read"] = ""
    next_: Literal["write", "read"] = "write"
    retry_at_ns: int = 0
    pending: tuple[Attempt, ...] = ()

    @property
    def running(self) -> bool:
        return self.deadline_ns != 0


@dataclass(frozen=True, slots=True)
class Acked:
    sent_ns: int
    revision: int
    attempt: str


@dataclass(frozen=True, slots=True)
class Lost:
    revision: int


@dataclass(frozen=True, slots=True)
class Failed:
    why: str
    went_back: bool = False  # the store shows an older value than it has acknowledged


Outcome = Acked | Lost | Failed | None


def start(r: Register, now_ns: int, timeout_ns: int) -> Register:
    """Begin an exchange that ends by now + timeout."""
    first: Literal["write", "read"] = "read" if r.revision is None else "write"
    return replace(r, deadline_ns=now_ns + timeout_ns, next_=first, retry_at_ns=now_ns, pending=(), busy="")


def _end(r: Register) -> Register:
    return replace(r, deadline_ns=0, busy="", pending=())


def due(r: Register, now_ns: int) -> Literal["", "write", "read"]:
    """What the exchange wants sent now."""
    if not r.running or r.busy or now_ns < r.retry_at_ns or now_ns >= r.deadline_ns:
        return ""
    return r.next_


def sent(r: Register, what: Literal["write", "read"], attempt: Attempt | None) -> Register:
    """Note that the write (with its attempt) or the read has been sent."""
    pending = r.pending if attempt is None else (*r.pending, attempt)
    return replace(r, busy=what, pending=pending)


def write_done(
    r: Register, attempt: str, outcome: str, revision: int, now_ns: int
) -> tuple[Register, Outcome]:
    """Fold in the store's answer to a write. Answers to attempts that are no longer ours change nothing."""
    ours = next((a for a in r.pending if a.id == attempt), None)
    if not r.running or ours is None:
        return r, None
    if outcome == "acked":
        return replace(_end(r), revision=revision), Acked(ours.sent_ns, revision, ours.id)
    return replace(r, busy="", next_="read", retry_at_ns=now_ns), None


def read_done(
    r: Register, attempt: str, revision: int, *, ours: bool, now_ns: int
) -> tuple[Register, Outcome]:
    """Fold in what a read (or the watch) shows. `ours`: this node wrote that value, whichever attempt."""
    if r.revision is not None and revision < r.revision:
        if r.busy == "read":
            why = f"the store went back from revision {r.revision} to {revision}"
            return _end(r), Failed(why, went_back=True)
        return r, None
    newer = r.revision is None or revision > r.revision
    if not r.running:
        return (replace(r, revision=revision) if newer else r), (
            Lost(revision) if newer and not ours else None
        )
    if not newer:
        if r.busy != "read":
            return r, None
        # Not stored (yet). Try again: should both land, the second is refused by the first's revision.
        return replace(r, busy="", next_="write", retry_at_ns=now_ns + RETRY_NS), None
    hit = next((a for a in r.pending if a.id == attempt), None)
    if hit is not None:
        return replace(_end(r), revision=revision), Acked(hit.sent_ns, revision, hit.id)
    if ours or (r.revision is None and not r.pending):
        # Our own earlier write, or the first look: adopt the revision and write on it.
        busy: Literal["", "write", "read"] = "" if r.busy == "read" else r.busy
        return replace(r, revision=revision, busy=busy, next_="write", retry_at_ns=now_ns), None
    return replace(_end(r), revision=revision), Lost(revision)


def read_failed(r: Register, now_ns: int) -> Register:
    """The read could not be answered: ask again, until the deadline."""
    if not r.running or r.busy != "read":
        return r
    return replace(r, busy="", next_="read", retry_at_ns=now_ns + RETRY_NS)


def tick(r: Register, now_ns: int) -> tuple[Register, Outcome]:
    """End an exchange whose deadline has passed."""
    if r.running and now_ns >= r.deadline_ns:
        return _end(r), Failed("no acknowledgement within the heartbeat timeout")
    return r, None
