"""Who may promote: pure, every refusal with its reason.

Invariant (I2, sync.py): every acknowledged commit is on at least `sync_count` of `sync_voters`, flushed.
A candidate that has seen the *final* WAL position of more than `len(voters) - count` voters (itself
included) has seen at least one that holds any given commit; when none of them has more WAL than the
candidate, the candidate holds every acknowledged commit. A position is final when it was read after the
primary had certainly stopped: after `settle` of silence following the revision that the claim will replace
(at once when that revision is a vacancy, which is written only after a proven fence). Whoever has received the
shutdown checkpoint of a clean vacancy needs nobody else's position: nothing was written after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from harmony.records import ClusterState, Member, lsn

NO_STANDBY = "PostgreSQL is not running here as a standby"


@dataclass(frozen=True, slots=True)
class Standing:
    """What this node knows of itself as a candidate; LSNs in bytes, times in ns."""

    node: str
    db_standby: bool
    timeline: int
    received_lsn: int
    silent_ns: int  # of the current cluster_state revision when the LSN was read
    latched: bool
    nofailover: bool
    priority: int
    trusted: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    ok: bool
    why: str


def _settled(m: Member, revision: int, settle_ns: int) -> bool:
    return m.seen_revision == revision and m.silent_ns >= settle_ns and m.db in {"standby", "primary"}


def judge(
    me: Standing,
    cluster: ClusterState,
    revision: int,
    members: Mapping[str, Member],
    *,
    settle_ns: int,
    maximum_lag_bytes: int,
    barred: str,
    patient: bool,
) -> Verdict:
    """May this node claim leadership by replacing `revision`?

    `members` are the other nodes' records; `settle_ns` is 0 for a vacancy; `barred` is a reason that has nothing
    to do with its WAL; `patient` False: rivals of equal standing, and the successor that was named, have had
    their time and are no longer waited for.
    """
    if me.latched:
        return Verdict(ok=False, why="an operator's fence latches this node; harmonyctl unfence")
    if not me.trusted:
        return Verdict(ok=False, why="the fencer's state file cannot be trusted; see harmonyctl status")
    if me.nofailover:
        return Verdict(ok=False, why="this node is tagged nofailover")
    if not me.db_standby:
        return Verdict(ok=False, why=NO_STANDBY)
    if me.timeline < cluster.timeline:
        return Verdict(ok=False, why=f"on timeline {me.timeline}, the cluster is on {cluster.timeline}")
    if barred:
        return Verdict(ok=False, why=barred)
    if me.silent_ns < settle_ns:
        return Verdict(ok=False, why="own WAL position was read before the primary had certainly stopped")
    mine = (me.timeline, me.received_lsn)
    seen = {n: m for n, m in members.items() if n != me.node and _settled(m, revision, settle_ns)}
    was_primary = cluster.last_primary == me.node
    if _complete(me, cluster):
        pass
    elif cluster.sync_voters:
        voters = set(cluster.sync_voters)
        if not was_primary:
            if not cluster.sync_count:
                why = f"commits waited for nobody in the end: only {cluster.last_primary} certainly has all of them"
                return Verdict(ok=False, why=why)
            if me.node not in voters:
                return Verdict(ok=False, why="this node is not one of the recorded synchronous standbys")
            heard = ({*seen, me.node}) & voters
            needed = len(voters) - cluster.sync_count + 1
            if len(heard) < needed:
                missing = ", ".join(sorted(voters - heard))
                return Verdict(
                    ok=False,
                    why=f"final WAL position known of {len(heard)} synchronous standbys, {needed} needed "
                    f"(not heard: {missing}): an acknowledged commit could be missing here",
                )
        for n in sorted(seen):
            if (seen[n].timeline, seen[n].received_lsn) > mine:
                return Verdict(ok=False, why=f"{n} has more WAL ({_at(seen[n])} against {_pos(*mine)})")
    elif cluster.lsn - me.received_lsn > maximum_lag_bytes:
        lag = cluster.lsn - me.received_lsn
        return Verdict(
            ok=False, why=f"{lag} bytes behind the primary's last heartbeat (limit {maximum_lag_bytes})"
        )
    if patient and cluster.clean and not _complete(me, cluster):
        return Verdict(
            ok=False, why=f"the clean shutdown at {_pos(cluster.timeline, cluster.lsn)} was not received here"
        )
    if patient and cluster.clean and cluster.successor is not None:
        if cluster.successor != me.node:
            return Verdict(ok=False, why=f"{cluster.successor} was named as the successor: it goes first")
        return Verdict(ok=True, why=f"named as the successor, at {_pos(*mine)}")
    if patient:
        for n, m in sorted(seen.items()):
            if m.barred or m.latched or m.nofailover or m.db != "standby" or m.timeline < cluster.timeline:
                continue
            theirs = (m.timeline, m.received_lsn, m.priority)
            ours = (*mine, me.priority)
            if theirs > ours or (theirs == ours and n < me.node):
                return Verdict(ok=False, why=f"{n} goes first ({_at(m)}, priority {m.priority})")
        if was_primary:
            return Verdict(ok=False, why="this node left the vacancy; the others have their time first")
    return Verdict(ok=True, why=f"eligible at {_pos(*mine)}")


def _complete(me: Standing, cluster: ClusterState) -> bool:
    """Whether all that the last primary ever wrote is here: the shutdown checkpoint, its last record, is."""
    return cluster.clean and me.timeline == cluster.timeline and me.received_lsn > cluster.lsn


def _pos(timeline: int, position: int) -> str:
    return f"timeline {timeline} {lsn(position)}"


def _at(m: Member) -> str:
    return _pos(m.timeline, m.received_lsn)
