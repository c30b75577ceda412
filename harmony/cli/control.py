"""What operators ask of the cluster: the record `control`, changed by compare-and-set, straight in the store.

It opens the store itself: what an operator asks for must not depend on which agent answers. It makes no bucket,
and waits for everything with a bound.
"""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import click
import msgspec
import structlog
import trio

from harmony.cli import where
from harmony.config import Config, load
from harmony.decoding import Unreadable
from harmony.errors import EXIT_CONFIG, ConfigError, SequenceMismatch, StoreError, StoreUnavailable
from harmony.records import (
    CLUSTER_STATE,
    CONTROL,
    ClusterState,
    Control,
    decode_cluster,
    decode_control,
    encode,
)
from harmony.store import open_store
from harmony.store.interface import Entry, Store

CONNECT_S = 5.0
CALL_S = 2.0
TRIES = 5

T = TypeVar("T")
Edit = Callable[[Control, ClusterState], Control]


class Impossible(Exception):
    """Why it was not done, for people."""


async def change(store: Store, edit: Edit) -> Control:
    """Read, edit, write; again where somebody else was faster. Raises Impossible, StoreError.

    An answer that did not come leaves open whether it was written: that is looked up by its attempt id.
    """
    attempt = ""
    why = "somebody else changes it all the time"
    for _ in range(TRIES):
        cluster, control, revision = await _read(store)
        if attempt and control.attempt == attempt:
            return control  # the write whose answer was lost
        attempt = uuid.uuid4().hex
        wanted = msgspec.structs.replace(edit(control, cluster), attempt=attempt)
        try:
            await store.update(CONTROL, encode(wanted), revision, timeout_s=CALL_S)
        except (SequenceMismatch, StoreUnavailable) as e:
            why = str(e)
        else:
            return wanted
    raise Impossible(f"not written after {TRIES} tries: {why}")


async def cluster_entry(store: Store) -> Entry:
    """What is stored of cluster_state. Raises Impossible where there is nothing, StoreUnavailable."""
    entry = await store.get(CLUSTER_STATE, timeout_s=CALL_S)
    if entry is None:
        raise Impossible("the cluster has no record yet: no primary was ever elected")
    return entry


async def _read(store: Store) -> tuple[ClusterState, Control, int]:
    entry = await cluster_entry(store)
    asked = await store.get(CONTROL, timeout_s=CALL_S)
    try:
        cluster = decode_cluster(entry.value)
        control = decode_control(asked.value) if asked is not None else Control(attempt="")
    except Unreadable as e:
        raise Impossible(f"cluster_state or control is not a record of this version of Harmony: {e}") from e
    return cluster, control, asked.revision if asked is not None else 0


@asynccontextmanager
async def connected(config: Config, *, new: bool = False) -> AsyncIterator[Store]:
    """The configured store, within CONNECT_S. Raises Impossible, StoreError. `new`: it may have no bucket yet."""
    s = config.store
    async with open_store(
        s.type,
        urls=s.urls,
        cluster_id=config.cluster.id,
        replicas=s.replicas,
        credentials_file=s.credentials_file,
        may_create=False,
    ) as store:
        with trio.move_on_after(CONNECT_S):
            while not (store.connected or (store.facts is not None and not store.facts.lineage)):
                await trio.sleep(0.01)
        if new and store.facts is not None and not store.facts.lineage:
            yield store
            return
        if store.facts is not None and store.facts.problem:
            click.echo(f"warning: {store.facts.problem}", err=True)
        if not store.connected:
            raise Impossible(f"the store cannot be reached within {CONNECT_S:g} s: {', '.join(s.urls)}")
        yield store


def with_store(config_file: str | None, act: Callable[[Config], Awaitable[T]], *, verbose: bool = False) -> T:
    """Run `act` on the configuration; ends the process with a message where it fails.

    What the store's connection logs goes to standard error, and only where it is asked for: results stand alone.
    """
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if verbose else logging.CRITICAL),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
    try:
        config = load(where.config_file(config_file))
    except ConfigError as e:
        click.echo("\n".join(e.problems), err=True)
        sys.exit(EXIT_CONFIG)
    try:
        return trio.run(act, config)
    except* (Impossible, StoreError) as group:
        click.echo(f"not done: {_first(group)}", err=True)
    sys.exit(1)


def _first(group: BaseExceptionGroup[Exception]) -> str:
    e: BaseException = group
    while isinstance(e, BaseExceptionGroup):
        e = e.exceptions[0]
    return str(e)
