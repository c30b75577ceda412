"""What comes into the core (events) and what goes out (commands): plain data, nothing that acts.

All times are CLOCK_BOOTTIME nanoseconds of this host, but `stamp_ns`, which is the store's own clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from harmony.core.sync import Rule
from harmony.records import ClusterState, Control, Member

Db = Literal["down", "standby", "primary", "unknown"]
OrderOp = Literal["activate", "fence", "follow", "rejoin"]
# silent: gives no answer; closed: lets nobody in; stopped: by a signal; stalled: WAL does not get to the disk;
# hung: a process has asked for a file of the database, and the kernel does not answer
Symptom = Literal["", "silent", "closed", "stopped", "stalled", "hung"]
Gen = tuple[int, int]  # (term, order), as the fencer compares them


@dataclass(frozen=True, slots=True)
class FencerView:
    """What the core needs of the fencer's status."""

    fencer_id: str
    trusted: bool
    detail: str
    highest: Gen
    active: Gen | None
    lease_deadline_ns: int | None
    order: Gen | None
    order_op: str
    order_state: Literal["running", "done", "failed", "preempted", ""]
    order_detail: str
    fence_proven: bool
    postgres_up: bool
    following: str | None
    is_standby: bool
    system_identifier: str | None
    latched: str | None
    unfinished: bool = False  # a rejoin was interrupted: only another can start PostgreSQL
    progress: str = ""  # of a rejoin
    cannot_rewind: str = ""  # why a rejoin would have to copy, and what to do
    was_standby: bool = False  # by the control file, what ran here last was a standby
    empty: str = ""  # bootstrap.method, where nothing stands at data_dir and something may be made there
    adopting: bool = False  # PostgreSQL runs as a primary with an operator's permit and without a lease
    timeline: int = 0  # the newest with WAL here that it knows of
    begins: int = 0  # where that left the one before; 0: not known
    spent: bool = False  # what is left of PostgreSQL is killed, and waits in the kernel: none runs again
    shutdown_lsn: int | None = None  # after a clean shutdown by the newest fence: where its checkpoint begins
    rule: Rule | None = None  # that PostgreSQL was told in the active generation; None: not known
    rule_number: int = 0  # 0: with the order itself
    rule_done: bool = True  # told indeed, not only accepted


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Connected:
    """The store's connection is a new one."""


@dataclass(frozen=True, slots=True)
class ClusterSeen:
    """cluster_state as the store holds it (None: never written), by a read or by the watch.

    `asked_at`: the newest revision that this node had seen when it sent the read. Where that is no newer than the
    answer, an answer that is behind now has only crossed something newer: the store has not gone back.
    """

    record: ClusterState | None
    revision: int
    stamp_ns: int
    by_read: bool
    asked_at: int | None = None


@dataclass(frozen=True, slots=True)
class MemberSeen:
    """A member's record as the store holds it (None: never written)."""

    name: str
    record: Member | None
    revision: int
    stamp_ns: int


@dataclass(frozen=True, slots=True)
class ControlSeen:
    """What operators ask for, as the store holds it (None: never written)."""

    record: Control | None
    revision: int


@dataclass(frozen=True, slots=True)
class StoreSeen:
    """The store itself: `lineage` names this history of it, `problem` what is not as Harmony needs it."""

    lineage: str
    problem: str


class Marks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The most that this node has ever seen of the store; kept on its own disk.

    `attempt` is of cluster_state at `revision`: the same revision with another one is another history. `overruled`:
    the fencer's term when an operator accepted the store; up to there its term is of a history that is given up.
    """

    term: int = 0
    revision: int = 0
    attempt: str = ""
    lineage: str = ""
    overruled: int = 0


@dataclass(frozen=True, slots=True)
class Remembered:
    """At the agent's start: what its disk holds; `damage` says why it could not be read.

    `was_in`: the other cluster that this node's data belonged to. Until it is moved, this store is not its own.
    """

    marks: Marks
    damage: str = ""
    was_in: str = ""

    @property
    def of_nothing(self) -> bool:
        """No store's history was ever seen, or an operator has accepted its loss: who finds none may begin one."""
        return not (self.damage or self.was_in or self.marks.revision or self.marks.lineage)


@dataclass(frozen=True, slots=True)
class Accepted:
    """An operator accepts the store as it now is. `create`: where it is empty, this node founds the cluster anew."""

    create: bool


@dataclass(frozen=True, slots=True)
class Retiring:
    """The agent was asked to stop. `hand_over`: after handing leadership over, where somebody can take it."""

    hand_over: bool


@dataclass(frozen=True, slots=True)
class RefreshDone:
    """A periodic read of all keys has ended; `ok` False: something could not be read."""

    ok: bool


@dataclass(frozen=True, slots=True)
class WriteDone:
    """The store's answer to a write: acked (with its revision), refused, or unknown."""

    key: str
    attempt: str
    outcome: Literal["acked", "refused", "unknown"]
    revision: int = 0


@dataclass(frozen=True, slots=True)
class ReadFailed:
    """A read asked for by a register could not be answered."""

    key: str


@dataclass(frozen=True, slots=True)
class Walsender:
    """A standby as its primary sees it. `voter`: its walsender counts it as one that commits may wait for."""

    name: str
    voter: bool
    flushed_lsn: int


@dataclass(frozen=True, slots=True)
class DbSeen:
    """The database's answer. `asked_ns` is before the question: the LSNs are at least as new.

    Of a primary also: `names`, the synchronous_standby_names that the answering session has loaded; `walsenders`;
    whether some commit was seen `waiting` for a synchronous standby; and whether it is too `early` for a rewind to it:
    its control file still names the timeline that it left. Of a standby: whether its replay is `held` up, by a delay, a
    pause or a query, and so asks for no WAL until it has come to the end of what is there.
    """

    db: Literal["standby", "primary"]
    timeline: int
    received_lsn: int
    replayed_lsn: int
    streaming: bool
    system_identifier: str
    asked_ns: int
    names: str = ""
    walsenders: tuple[Walsender, ...] = ()
    waiting: bool = False
    early: bool = False
    held: bool = False


@dataclass(frozen=True, slots=True)
class DbSilent:
    """The database did not answer."""

    reason: str


@dataclass(frozen=True, slots=True)
class HealthSeen:
    """What a look at the local PostgreSQL's health has found. `asked_ns` is before it, `why` the evidence in words.

    `blind`: it was answered by an error, which says neither. `crashed`: since the look before, it has restarted itself
    after a crash of one of its processes. `note`: what people should know and nothing is done about.
    """

    asked_ns: int
    symptom: Symptom = ""
    why: str = ""
    blind: bool = False
    crashed: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class Surveyed:
    """What the agent's slot keeper has found in the database, and done there. `asked_ns` is before it began."""

    asked_ns: int
    slots: Mapping[str, int]  # that Harmony keeps here, each with the byte position from which it holds WAL
    streams_by: str  # primary_slot_name, as PostgreSQL has it
    limits: Mapping[str, int]  # settings of which a standby must not have less than its primary
    notes: tuple[str, ...]  # what is wrong, with what to do


@dataclass(frozen=True, slots=True)
class FencerSeen:
    """The fencer's newest status."""

    view: FencerView


@dataclass(frozen=True, slots=True)
class FencerSilent:
    """The fencer did not answer."""

    reason: str


@dataclass(frozen=True, slots=True)
class OrderRefused:
    """The fencer did not admit an order."""

    generation: Gen
    error: str
    detail: str


@dataclass(frozen=True, slots=True)
class RuleRefused:
    """The fencer did not admit a TellRule."""

    number: int


@dataclass(frozen=True, slots=True)
class CheckpointDone:
    """The checkpoint that was asked for has ended; `why` it came to nothing, where it did."""

    why: str = ""


Event = (
    Connected
    | ClusterSeen
    | MemberSeen
    | ControlSeen
    | StoreSeen
    | Remembered
    | Accepted
    | Retiring
    | RefreshDone
    | WriteDone
    | ReadFailed
    | DbSeen
    | DbSilent
    | HealthSeen
    | Surveyed
    | FencerSeen
    | FencerSilent
    | OrderRefused
    | RuleRefused
    | CheckpointDone
)

# ---------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class Write:
    """Compare-and-set `record` under `key`; revision 0 means create. Answer with WriteDone."""

    key: str
    record: ClusterState | Member
    revision: int
    attempt: str
    timeout_ns: int


@dataclass(frozen=True, slots=True)
class Read:
    """Read `key`; answer with ClusterSeen / MemberSeen, or ReadFailed."""

    key: str
    timeout_ns: int


@dataclass(frozen=True, slots=True)
class Refresh:
    """Read cluster_state, every member and control; answer with what was seen, then RefreshDone."""

    timeout_ns: int


class Order(msgspec.Struct, frozen=True):
    """Send an order to the fencer; its fate is seen in FencerSeen, a refusal in OrderRefused."""

    op: OrderOp
    generation: Gen
    reason: str
    primary: str | None = None
    deadline_ns: int = 0
    sync_count: int = 0
    sync_voters: tuple[str, ...] = ()
    timeline: int = 0  # of an activate: what the promotion must begin, reserved for it
    clean: bool = False  # of a fence: shut down cleanly while the lease lasts
    system_identifier: str = ""  # of a rejoin: the cluster's
    clone: bool = False  # of a rejoin: copy anew at once
    slot: bool = False  # of a follow or rejoin: the primary has a replication slot for this node


@dataclass(frozen=True, slots=True)
class Renew:
    """Move the fencer's deadline: absolute, counted from the send of an acknowledged heartbeat."""

    generation: Gen
    deadline_ns: int


@dataclass(frozen=True, slots=True)
class TellRule:
    """Have PostgreSQL wait by `rule` (HOLD: every commit waits); its fate is seen in FencerSeen, a refusal in
    RuleRefused."""

    generation: Gen
    number: int
    rule: Rule


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask the database now, not at the next beat; one that is under way is not the answer. Answered as always."""


@dataclass(frozen=True, slots=True)
class Nudge:
    """Begin a commit of our own, so that it is seen to wait. Nothing answers it."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Have the database write a checkpoint: ahead of a hand-over, so that the clean shutdown has little left to write;
    ahead of another node's rewind, which only then sees on what timeline this one is (rejoin.waits).

    Always answered with CheckpointDone, if need be after a bound of the shell's.
    """

    ahead_of: Literal["the hand-over", "a rewind"] = "the hand-over"


@dataclass(frozen=True, slots=True)
class Log:
    """A transition or a changed reason, for the operator."""

    row: str
    before: str
    after: str
    why: str


@dataclass(frozen=True, slots=True)
class Fatal:
    """This node must not go on as configured; the shell ends the process with EXIT_CONFIG."""

    why: str


@dataclass(frozen=True, slots=True)
class Remember:
    """Keep these marks on the agent's own disk. Nothing waits for it; only the newest counts."""

    marks: Marks


@dataclass(frozen=True, slots=True)
class Stop:
    """Retired: nothing holds this agent any more; the shell ends the process."""

    why: str


Command = (
    Write
    | Read
    | Refresh
    | Order
    | Renew
    | TellRule
    | Ask
    | Nudge
    | Checkpoint
    | Log
    | Fatal
    | Remember
    | Stop
)
