"""What is to be thought of a cluster, by what one agent says of it: a number for scripts, and why. Pure.

It asks nobody and shows nothing: `harmonyctl status` does, and whatever else has to say how the cluster is. It refuses
to call anything good that it cannot know: where the agent's own heartbeats fail, all it says of others is old. What a
record says counts only as long as its node keeps writing it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from harmony.admin import NodeView, SelfView, StatusReply
from harmony.core.states import WRITABLE_STATES
from harmony.records import ClusterState, Member, Note

HEALTHY, DEGRADED, NO_PRIMARY, CANNOT_TELL = 0, 1, 2, 3
Severity = Literal["alarm", "degraded", "note"]
ORDER: tuple[Severity, ...] = ("alarm", "degraded", "note")
# Rows of the table by which a node stays in its state and says why PostgreSQL does not follow. The `why` of any other
# tells how the node came into its state, which is no reason for what is so now.
FOLLOWING = frozenset(
    {
        "503",
        "504",
        "505",
        "507",
        "508",
        "509",
        "510",
        "704",
        "705",
        "711",
        "713",
        "714",
        "715",
        "716",
        "717",
        "719",
    }
)


class Finding(msgspec.Struct, frozen=True):
    """One thing that is so. `node`: whose; "": the cluster's. A note alone leaves a cluster healthy."""

    severity: Severity
    node: str
    text: str


class Verdict(msgspec.Struct, frozen=True):
    """`code`: 0 healthy, 1 degraded, 2 no primary, 3 cannot tell. `findings`: the worst first."""

    code: int
    findings: tuple[Finding, ...]

    @property
    def reasons(self) -> list[str]:
        """What keeps the cluster from being healthy, in words."""
        return [f.text for f in self.findings if f.severity != "note"]


def judge(s: StatusReply) -> Verdict:
    """The verdict on what an agent answered."""
    code, why = _leadership(s)
    found = [Finding("alarm" if code else "degraded", "", text) for text in why]
    found += _own(s.myself)
    for n in s.nodes:
        if code != CANNOT_TELL or n.name == s.myself.node:  # of the others all is old
            found += _node(s, n, code)
    if code == HEALTHY and any(f.severity != "note" for f in found):
        code = DEGRADED
    return Verdict(code, tuple(sorted(found, key=lambda f: ORDER.index(f.severity))))


def old(s: StatusReply, n: NodeView) -> bool:
    """Whether what the node's record says is of before: it left, or two heartbeats are overdue."""
    if n.name == s.myself.node:
        return False  # it speaks itself
    beat_s = s.myself.beat_s
    return not n.alive or bool(beat_s and (n.age_s or 0.0) > 2 * beat_s)


def lag(s: StatusReply, n: NodeView) -> int | None:
    """Bytes behind the newest heartbeat of the primary; None: not known, or nobody's."""
    c, m = s.cluster, n.member
    if c is None or m is None or not c.lsn or not m.received_lsn or c.primary == n.name:
        return None
    return None if m.db != "standby" or old(s, n) else max(0, c.lsn - m.received_lsn)


def counted(number: int, noun: str) -> str:
    """`1 failover`, `2 failovers`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# ---------------------------------------------------------------- who leads


def _leadership(s: StatusReply) -> tuple[int, list[str]]:
    c, me = s.cluster, s.myself
    blind = _blind(s)
    if blind:
        return CANNOT_TELL, [blind + (f": {me.store_failure}" if me.store_failure else "")]
    if c is None:
        return NO_PRIMARY, ["the cluster has no record yet: no primary was ever elected"]
    if c.primary is None:
        return NO_PRIMARY, [f"the place is vacant ({c.last_primary} left it)"]
    if s.cluster_stale:
        return NO_PRIMARY, [f"the heartbeat of {c.primary} is stale"]
    if c.status not in WRITABLE_STATES:
        return NO_PRIMARY, [f"{c.primary} is recorded but says {c.status}{_said_of(s, c.primary)}"]
    age_s = s.cluster_age_s or 0.0
    if me.lease_s and age_s > me.lease_s:
        return NO_PRIMARY, [
            f"the heartbeat of {c.primary} is {age_s:.1f} s old: its lease of {me.lease_s:g} s is over"
        ]
    return HEALTHY, [*_unconfirmed(c), *_stranger(s, c.primary)]


def _blind(s: StatusReply) -> str:
    """Why this agent cannot know how the cluster is; "": it can."""
    me = s.myself
    own = next((n for n in s.nodes if n.name == me.node), None)
    if not me.store_connected:
        return "this agent is not connected to the store: what it knows is old"
    if me.failure_threshold and me.failures >= me.failure_threshold:
        beats = (
            "heartbeat of this agent has" if me.failures == 1 else "heartbeats of this agent in a row have"
        )
        return f"{me.failures} {beats} failed: what it knows is old"
    if s.cluster_stale and (own is None or not own.alive):
        return "this agent has read nothing new lately, not even of itself: its view is stale"
    if own is not None and me.lease_s and (own.age_s or 0.0) > me.lease_s:
        return (
            f"the store has shown no heartbeat of this agent for {own.age_s or 0:.1f} s: what it knows is old"
        )
    return ""


def _said_of(s: StatusReply, primary: str) -> str:
    why = next((n.member.why for n in s.nodes if n.name == primary and n.member is not None), "")
    return f" ({why})" if why else ""


def _unconfirmed(c: ClusterState) -> list[str]:
    if not c.sync_voters or c.sync_count:
        return []
    why = "synchronous replication is asked for, and no standby keeps up: commits wait for NOBODY"
    return [f"{why}; only {c.last_primary} may lead for now"]


def _stranger(s: StatusReply, primary: str) -> list[str]:
    if any(n.name == primary for n in s.nodes):
        return []
    return [f"the primary {primary} is not among the configured members"]


# ---------------------------------------------------------------- the answering agent


def _own(me: SelfView) -> Iterator[Finding]:
    if me.distrust:
        yield Finding("alarm", me.node, f"{me.node} DISTRUSTS the store: {me.distrust}")
    if me.stopped:
        yield Finding("alarm", "", me.stopped)
    if me.failures and not (me.failure_threshold and me.failures >= me.failure_threshold):
        why = f": {me.store_failure}" if me.store_failure else ""
        failed = counted(me.failures, "heartbeat")
        yield Finding(
            "note", me.node, f"{failed} in a row {'has' if me.failures == 1 else 'have'} failed here{why}"
        )


# ---------------------------------------------------------------- each node


def _node(s: StatusReply, n: NodeView, code: int) -> Iterator[Finding]:
    m, own = n.member, n.name == s.myself.node
    age = f"{n.age_s:.0f} s old" if n.age_s is not None else "of old"
    if m is None or not (n.alive or own):
        last = f" (its last record is {age})" if m is not None else ""
        yield Finding("degraded", n.name, f"{n.name} is not heard of{last}")
        return
    if m.retiring:
        last = f": its last record is {age}" if old(s, n) else ""
        yield Finding("degraded", n.name, f"{n.name} was asked to stop{last}")
    elif old(s, n):
        yield Finding("degraded", n.name, f"{n.name} is silent: its last record is {age}")
    if old(s, n):
        return  # whatever else it says is of before
    if m.distrust and not own:
        yield Finding("alarm", n.name, f"{n.name} DISTRUSTS the store: {m.distrust}")
    yield from _health(s, n.name, m)
    yield from _role(s, n.name, m, code)
    if m.nofailover:
        yield Finding("note", n.name, f"{n.name} is tagged nofailover: it never takes over")
    if m.cannot_rewind:
        yield Finding("note", n.name, f"{n.name}: {m.cannot_rewind}")
    for note in map(Note.read, m.notes):
        yield Finding("alarm" if note.alarm else "note", n.name, f"{n.name}: {note.text}")


def _health(s: StatusReply, name: str, m: Member) -> Iterator[Finding]:
    if not m.fencer_ok:
        why = f": {s.myself.fencer_detail}" if name == s.myself.node and s.myself.fencer_detail else ""
        yield Finding("degraded", name, f"the fencer of {name} does not answer{why}")
    if m.latched:
        why = f": {s.myself.latched}" if name == s.myself.node and s.myself.latched else ""
        yield Finding("degraded", name, f"{name} is latched by an operator{why}")
    if m.sick:
        yield Finding("degraded", name, f"PostgreSQL of {name} is SICK: {m.sick}")
    if m.note and not (m.latched and m.db == "down"):  # it is down on purpose
        yield Finding("degraded", name, f"PostgreSQL of {name}: {m.note}")


def _role(s: StatusReply, name: str, m: Member, code: int) -> Iterator[Finding]:
    c = s.cluster
    if c is None or code == CANNOT_TELL:  # then whom to compare it with is not known
        return
    if name == c.primary:
        if m.db != "primary" and code == HEALTHY:
            yield Finding("degraded", name, f"the database of {name} is {m.db}")
    elif m.db == "primary":
        if not m.retiring:
            whose = f"{name} is not the recorded primary, but its database says it is one"
            yield Finding("alarm", name, whose)
    elif code == HEALTHY and not m.latched and not (m.streaming and m.db == "standby"):
        yield Finding("degraded", name, f"{name} does not stream ({_unstreamed(m)})")


def _unstreamed(m: Member) -> str:
    """Why a standby does not stream: the cause, where it is known."""
    if m.progress:
        return m.progress
    if m.row in FOLLOWING:
        return m.why
    if m.db == "down":
        return f"its PostgreSQL is down; {m.status}"
    if m.db == "unknown":
        return "its PostgreSQL does not answer"
    return "its PostgreSQL runs as a standby, and what keeps it from streaming stands in its own log"
