"""The store in memory: one server object, many clients, faults on request. For tests and simulation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from harmony.errors import SequenceMismatch, StoreUnavailable
from harmony.store.interface import Entry, StoreFacts, WatchCallback


@dataclass
class Faults:
    """What a client's next calls suffer. `lost` and `lost_ack` count down."""

    disconnected: bool = False
    lost: int = 0  # the write is not stored, and not answered
    lost_ack: int = 0  # the write is stored, but not answered
    delay_s: float = 0.0


@dataclass
class MemoryServer:
    """The shared truth. `clock_ns` is the store's clock; `missing`: the bucket is gone."""

    clock_ns: Callable[[], int] = time.time_ns
    revision: int = 0
    lineage: str = "memory-1"
    problem: str = ""
    missing: bool = False
    data: dict[tuple[str, str], Entry] = field(default_factory=dict)
    watchers: list[tuple[str, WatchCallback]] = field(default_factory=list)


class MemoryStore:
    """One client; see harmony.store.interface.Store."""

    def __init__(self, server: MemoryServer, cluster_id: str) -> None:
        self._server = server
        self._bucket = f"harmony_{cluster_id}"
        self.faults = Faults()

    @property
    def connection_epoch(self) -> int:
        return 1

    @property
    def connected(self) -> bool:
        return not self.faults.disconnected

    @property
    def facts(self) -> StoreFacts:
        """As the server now has it."""
        server = self._server
        return (
            StoreFacts("", f"{self._bucket} is gone")
            if server.missing
            else StoreFacts(server.lineage, server.problem)
        )

    def allow_creation(self) -> None:
        """Make the bucket anew where it is missing."""
        server = self._server
        if server.missing:
            server.data.clear()
            server.revision, server.missing = 0, False
            server.lineage = f"memory-{int(server.lineage.rpartition('-')[2]) + 1}"

    async def _arrive(self, timeout_s: float) -> None:
        with trio.move_on_after(timeout_s) as scope:
            await trio.sleep(self.faults.delay_s)
        if scope.cancelled_caught:
            raise StoreUnavailable(f"no answer within {timeout_s:g} s")
        if self.faults.disconnected:
            raise StoreUnavailable("disconnected")
        if self._server.missing:
            raise StoreUnavailable(f"no stream: {self._bucket} is gone")

    async def get(self, key: str, *, timeout_s: float) -> Entry | None:
        """The key's entry."""
        await self._arrive(timeout_s)
        return self._server.data.get((self._bucket, key))

    async def keys(self, prefix: str, *, timeout_s: float) -> list[str]:
        """Keys that begin with `prefix`, sorted."""
        await self._arrive(timeout_s)
        return sorted(k for b, k in self._server.data if b == self._bucket and k.startswith(prefix))

    async def create(self, key: str, value: bytes, *, timeout_s: float) -> int:
        """Write where nothing has ever been written."""
        return await self.update(key, value, 0, timeout_s=timeout_s)

    async def update(self, key: str, value: bytes, revision: int, *, timeout_s: float) -> int:
        """Write where the revision is `revision`."""
        await self._arrive(timeout_s)
        if self.faults.lost > 0:
            self.faults.lost -= 1
            raise StoreUnavailable("no answer (the write was lost)")
        server = self._server
        current = server.data.get((self._bucket, key))
        if (current.revision if current is not None else 0) != revision:
            raise SequenceMismatch(f"{key}: expected revision {revision}")
        server.revision += 1
        entry = Entry(key, value, server.revision, server.clock_ns())
        server.data[self._bucket, key] = entry
        for bucket, callback in list(server.watchers):
            if bucket == self._bucket:
                callback(entry)
        if self.faults.lost_ack > 0:
            self.faults.lost_ack -= 1
            raise StoreUnavailable("no answer (the acknowledgement was lost)")
        return entry.revision

    def watch(self, callback: WatchCallback) -> Callable[[], None]:
        """Call back with what is there and then with each change."""
        for (bucket, _), entry in sorted(self._server.data.items(), key=lambda i: i[1].revision):
            if bucket == self._bucket:
                callback(entry)
        item = (self._bucket, callback)
        self._server.watchers.append(item)

        def unsubscribe() -> None:
            if item in self._server.watchers:
                self._server.watchers.remove(item)

        return unsubscribe
