"""harmonyctl switchover: who could take over and why not, the request, and what became of it.

The request goes straight to the store; the leader carries it out, or refuses it with its reason. The judgement
shown here is the leader's own (core.observe), by the records that it has as well.
"""

from __future__ import annotations

import sys
import time
import uuid
from dataclasses import dataclass

import click
import msgspec
import trio

from harmony.cli.control import CALL_S, Impossible, change, cluster_entry, connected, with_store
from harmony.cli.terminal import NOT_CONFIRMED, confirmed, say
from harmony.cli.where import who
from harmony.config import Config
from harmony.core.observe import behind_by, best_of, unfit_by
from harmony.core.timing import Timing
from harmony.decoding import Unreadable
from harmony.errors import StoreUnavailable
from harmony.records import (
    CLUSTER_STATE,
    MEMBER_PREFIX,
    ClusterState,
    Control,
    Member,
    Switchover,
    decode_cluster,
    decode_member,
)
from harmony.store.interface import Store

LOOK_S = 0.1


@dataclass(frozen=True)
class Picture:
    """The records as they are now; members that are not alive are left out."""

    cluster: ClusterState
    members: dict[str, Member]
    maximum_lag_bytes: int

    def obstacle(self, name: str) -> str:
        """Why this node cannot take over now; empty: it can."""
        m = self.members.get(name)
        return unfit_by(self.cluster, m, name) or behind_by(self.cluster, m, name, self.maximum_lag_bytes)

    def plan(self, names: tuple[str, ...], to: str | None) -> str:
        """Who would take over. Raises Impossible with the reasons."""
        primary = self.cluster.primary
        if primary is None:
            raise Impossible(
                "the place is vacant: there is nothing to hand over, a standby takes it by itself"
            )
        if primary not in self.members:
            raise Impossible(
                f"{primary} is recorded as the primary and its agent is not alive: it can hand over nothing"
            )
        if to == primary:
            raise Impossible(f"{to} is the primary already")
        if to is not None and to not in names:
            raise Impossible(f"{to} is not a member; members are {', '.join(names)}")
        others = [n for n in names if n != primary]
        obstacles = {n: self.obstacle(n) for n in ([to] if to is not None else others)}
        best = best_of([self.members[n] for n, why in obstacles.items() if not why])
        if best is None:
            raise Impossible("; ".join(obstacles.values()) or "there is no other member")
        return best


async def look(store: Store, config: Config) -> Picture:
    """Raises Impossible, StoreUnavailable."""
    entry = await cluster_entry(store)
    found = {n: await store.get(MEMBER_PREFIX + n, timeout_s=CALL_S) for n in config.members}
    newest = max([entry.created_ns, *(e.created_ns for e in found.values() if e is not None)])
    alive_ns = newest - config.timing.failover_ns
    try:
        members = {
            n: decode_member(e.value) for n, e in found.items() if e is not None and e.created_ns >= alive_ns
        }
        cluster = decode_cluster(entry.value)
    except Unreadable as e:
        raise Impossible(f"a record is not one of this version of Harmony: {e}") from e
    lag = config.replication.maximum_lag_bytes
    return Picture(cluster, members, lag)


def outcome(c: ClusterState, term: int, to: str, request: str) -> tuple[bool, str] | None:
    """What became of the request, by cluster_state; None: it is under way."""
    if c.refused is not None and c.refused[0] == request:
        return False, f"refused: {c.refused[1]}"
    if c.term == term or c.primary is None:
        return None
    if c.primary == to:
        return True, f"{to} leads in term {c.term}"
    return False, f"{c.primary} leads in term {c.term}: it was faster than {to}"


def bound_s(t: Timing) -> float:
    """A confirmation, a clean shutdown within the lease, a claim, a promotion; and once more of it all."""
    return 3 * t.failover_timeout_s + 2 * t.lease_s


async def follow(store: Store, t: Timing, term: int, to: str, request: str) -> str:
    until, told = time.monotonic() + bound_s(t), ""
    while time.monotonic() < until:
        try:
            entry = await store.get(CLUSTER_STATE, timeout_s=CALL_S)
        except StoreUnavailable as e:
            say(f"  store: {e}", err=True)
            entry = None
        if entry is not None:
            try:
                c = decode_cluster(entry.value)
            except Unreadable as e:
                raise Impossible(f"cluster_state cannot be read any more ({e}): see harmonyctl status") from e
            ended = outcome(c, term, to, request)
            if ended is not None and ended[0]:
                return ended[1]
            if ended is not None:
                raise Impossible(ended[1])
            now = "the place is vacant, WAL complete" if c.primary is None else f"{c.primary} is {c.status}"
            if c.primary is not None and c.successor is not None:
                now += f", has named {c.successor}"
            if now != told:
                told = now
                say(f"  {now}")
        await trio.sleep(LOOK_S)
    raise Impossible(
        f"no outcome within {bound_s(t):g} s (last: {told}); the request stays valid for term {term}: "
        "see harmonyctl status"
    )


def wished(control: Control, now: ClusterState, seen: ClusterState, wish: Switchover) -> Control:
    """With the request; of what was seen when it was asked for. Raises Impossible where that is over. Pure."""
    if (now.term, now.primary) != (seen.term, seen.primary):
        raise Impossible(f"leadership has changed meanwhile: {now.primary or 'nobody'}, term {now.term}")
    return msgspec.structs.replace(control, switchover=wish)


async def _switch(config: Config, to: str | None, dry_run: bool, yes: bool) -> int:
    names = tuple(config.members)
    async with connected(config) as store:
        picture = await look(store, config)
        c = picture.cluster
        click.echo(f"cluster {c.cluster_id}, term {c.term}: {c.primary or 'nobody'} leads")
        for name in names:
            if name != c.primary:
                click.echo(f"  {name}: {picture.obstacle(name) or 'could take over'}")
        chosen = picture.plan(names, to)
        click.echo(
            f"would hand over from {c.primary} to {chosen}: {c.primary} names it, "
            "shuts its PostgreSQL down cleanly once it has confirmed (clients are disconnected), and goes on as "
            "its standby"
        )
        if dry_run:
            return 0
        if not confirmed(f"Hand {c.cluster_id} over from {c.primary} to {chosen}?", yes=yes):
            click.echo("not handed over (answer yes, or give --yes)", err=True)
            return NOT_CONFIRMED
        say("handing over")
        request, began = uuid.uuid4().hex, time.monotonic()

        wish = Switchover(request, chosen, c.term, who())
        await change(store, lambda control, now: wished(control, now, c, wish))
        ended = await follow(store, config.timing, c.term, chosen, request)
        say(f"done after {time.monotonic() - began:.1f} s: {ended}")
    return 0


@click.command()
@click.option("--to", metavar="NODE", help="Who shall lead; else the one with the most WAL.")
@click.option("--dry-run", is_flag=True, help="Only say who could take over, and what would be done.")
@click.option("--yes", is_flag=True, help="Answer the question with yes.")
@click.option("--verbose", is_flag=True, help="Say on standard error what happens to the connection.")
@click.option("--config", "config_file", help="The node's configuration file.")
def switchover(to: str | None, dry_run: bool, yes: bool, verbose: bool, config_file: str | None) -> None:
    """Hand leadership over, planned: nothing is lost, and on a failed step the primary leads on. From any node.

    Exit 0: done (with --dry-run: possible). 1: not, with the reason. 2: not confirmed. 64: usage. 78: configuration.
    """
    sys.exit(with_store(config_file, lambda config: _switch(config, to, dry_run, yes), verbose=verbose))
