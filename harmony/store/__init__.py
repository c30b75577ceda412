"""The store: its interface, its implementations, and the factory that picks one by configuration."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

from harmony.errors import ConfigError
from harmony.store.interface import Store


@contextlib.asynccontextmanager
async def open_store(
    kind: str,
    *,
    urls: list[str],
    cluster_id: str,
    replicas: int,
    credentials_file: str | None,
    monitor_urls: Sequence[str] = (),
    may_create: bool = True,
) -> AsyncIterator[Store]:
    """The configured store, connecting in the background. Raises ConfigError on an unknown kind (C3).

    `may_create`: make the bucket, once, where there is none. Not for who has seen one: its history would be lost.
    """
    match kind:
        case "nats":
            from harmony.store.nats import open_nats  # noqa: PLC0415 (nats-py only where it is used)

            async with open_nats(
                urls, cluster_id, replicas, credentials_file, monitor_urls, may_create=may_create
            ) as store:
                yield store
        case "memory":
            from harmony.store.memory import MemoryServer, MemoryStore  # noqa: PLC0415

            yield MemoryStore(MemoryServer(), cluster_id)
        case _:
            raise ConfigError([f"store.type: {kind!r} is not one of nats, memory"])
