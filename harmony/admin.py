"""The agent's admin socket: what is asked and answered there. One JSON line each way, then it closes.

Everybody may ask for the status; only root and the agent's own user may have a store accepted that it distrusts.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from harmony.core.messages import Marks
from harmony.records import ClusterState, Member

MAX_LINE_BYTES = 1024 * 1024


class StatusQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="status"):
    """`{"op": "status"}`."""


class AcceptRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="accept"):
    """Take the store as it is now. `create`: where it is empty, this node founds the cluster anew.

    `leave`: the cluster that this node's data belonged to, and leaves; must be named where there is one.
    """

    create: bool
    who: Annotated[str, msgspec.Meta(max_length=500)]
    leave: Annotated[str, msgspec.Meta(max_length=100)] = ""


Query = StatusQuery | AcceptRequest


class AcceptReply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was accepted, in words."""

    accepted: str


class ErrorReply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why nothing was done."""

    error: str


class NodeView(msgspec.Struct, frozen=True):
    """A configured member as this agent sees it. `age_s` is since its record last changed (local clock).

    `member` is its newest record; of the answering agent's own node, what that would write now.
    """

    name: str
    host: str
    port: int
    member: Member | None
    age_s: float | None
    alive: bool  # its record changed within failover_timeout


class Shown(msgspec.Struct, frozen=True):
    """cluster_state as the store has last answered with it. Revision 0: it has none."""

    revision: int
    term: int
    primary: str | None
    age_s: float


class StoreView(msgspec.Struct, frozen=True):
    """What the agent knows of the store, and what the store shows it."""

    lineage: str = ""  # "": there is no bucket, or it was not looked at yet
    problem: str = ""
    marks: Marks = Marks()  # the most that this node has seen of it
    shown: Shown | None = None  # None: not read yet
    memory: str = ""  # why the marks could not be read from disk, or are not kept there; "": they are
    was_in: str = ""  # the other cluster that this node's data belonged to; "": this one, or none


class SelfView(msgspec.Struct, frozen=True):
    """The answering agent. What has a default is newer: an agent that was not restarted yet does not tell it."""

    node: str
    state: str
    row: str
    why: str
    store_connected: bool
    failures: int
    lease_left_ms: int | None
    fencer_ok: bool
    fencer_detail: str
    latched: str | None
    distrust: str = ""  # why it does not trust the store; "": it does
    stopped: str = ""  # why no failover happens by itself; "": it does
    changes: int = 0  # failovers since the last that an operator has acknowledged
    retiring: bool = False  # it was asked to stop
    successor: str | None = None  # to whom it hands leadership over now
    store: StoreView = StoreView()
    store_failure: str = (
        ""  # "writes fail: …" or "reads fail: …" with the cause; "": the last calls were answered
    )
    store_failing_s: float = 0.0  # for how long
    failure_threshold: int = 0  # so many heartbeats in a row may not fail; 0: not told, likewise below
    beat_s: float = 0.0  # the longest between two good heartbeats: interval and timeout
    lease_s: float = 0.0


class StatusReply(msgspec.Struct, frozen=True):
    """The whole cluster as one agent sees it. `cluster_age_s`: since cluster_state last changed."""

    cluster_id: str
    cluster: ClusterState | None
    cluster_revision: int | None
    cluster_age_s: float | None
    cluster_stale: bool
    nodes: tuple[NodeView, ...]
    myself: SelfView
