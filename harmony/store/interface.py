"""What Harmony asks of a store: reads, compare-and-set writes and a watch. There is no unconditional write.

It knows nothing of what the values mean, keeps no cache and never retries: one call, one attempt, one answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec


class Entry(msgspec.Struct, frozen=True):
    """One stored value. `revision` and `created_ns` (ns since the epoch, its clock) are the store's own."""

    key: str
    value: bytes
    revision: int
    created_ns: int


class StoreFacts(msgspec.Struct, frozen=True):
    """The store itself. `lineage` names this history of it ("" where there is none): another one was made anew.

    `problem`: what is not as Harmony needs it, in words; writes may work all the same ("" where all is right).
    """

    lineage: str
    problem: str


WatchCallback = Callable[[Entry], None]


class Store(Protocol):
    """One bucket. Every call ends within `timeout_s` (seconds) or raises StoreUnavailable.

    Callbacks run in the store's task and must not block; they may see an entry again and must ignore
    revisions that are not newer. `connection_epoch` counts up at every (re)connection; 0 = never connected.
    """

    @property
    def connection_epoch(self) -> int: ...

    @property
    def connected(self) -> bool: ...

    @property
    def facts(self) -> StoreFacts | None:
        """As last looked at: at each connection, about every 10 s, and where a call found no bucket. None: not yet."""
        ...

    def allow_creation(self) -> None:
        """From now on make the bucket, once, where it is missing: an operator accepts that its history is lost."""
        ...

    async def get(self, key: str, *, timeout_s: float) -> Entry | None:
        """The key's newest entry, or None where there is none (or it was deleted)."""
        ...

    async def keys(self, prefix: str, *, timeout_s: float) -> list[str]:
        """All live keys that begin with `prefix`, sorted."""
        ...

    async def create(self, key: str, value: bytes, *, timeout_s: float) -> int:
        """Write only where the key has never been written; the new revision. Raises SequenceMismatch."""
        ...

    async def update(self, key: str, value: bytes, revision: int, *, timeout_s: float) -> int:
        """Write only where the key's revision is `revision`; the new one. Raises SequenceMismatch."""
        ...

    def watch(self, callback: WatchCallback) -> Callable[[], None]:
        """Call back with every key's newest entry and then with each change; returns the unsubscribe call."""
        ...
