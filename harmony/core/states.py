"""The states of both workflows, by name. Nothing else: what leads where is in table.py."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """A node's workflow state. The preferred primary starts in the primary workflow, others as replicas."""

    P_INITIALIZING = "primary/initializing"
    ADOPTING = "primary/adopting"
    HEALTHY = "primary/healthy"
    P_FAILED = "primary/failed"
    FENCED = "primary/fenced"
    YIELDING = "primary/yielding"
    R_INITIALIZING = "replica/initializing"
    WATCHING = "replica/watching"
    PROMOTING = "replica/promoting"
    LEADER = "replica/leader"
    DEMOTING = "replica/demoting"
    R_FAILED = "replica/failed"


WRITABLE_STATES = frozenset({State.HEALTHY, State.LEADER})
