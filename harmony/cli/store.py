"""harmonyctl store: what this node knows of its store, and accepting one that it distrusts.

An acceptance goes through the agent's socket, to this node only. The store itself is not changed here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import msgspec

from harmony.admin import AcceptRequest, StatusReply
from harmony.cli.status import CANNOT_TELL, ask, request
from harmony.cli.terminal import NOT_CONFIRMED, confirmed, typed
from harmony.cli.where import denied, find_run_dir, who
from harmony.decoding import decoded

TRUSTED, DISTRUSTED = 0, 1
RISKS = """What accepting risks:
- The store has lost, or may lose, what it had acknowledged. Transactions that PostgreSQL acknowledged to clients
  and that exist only in the lost part of that history (on a primary that this node knows nothing of) are lost.
- Where another part of the cluster still follows the old history, there may then be two primaries: first make
  sure that no other store answers those nodes, and that no other PostgreSQL of this cluster accepts writes.
- It is about this node only: run it on every node that distrusts the store (`harmonyctl store show`)."""
FOUND_RISK = """- --found: where the store is empty, THIS NODE'S DATA BECOMES THE CLUSTER'S. Give it on one node only,
  the one with the newest data (the highest timeline in `harmonyctl status`, then the highest LSN); on the others run
  the command without it."""

MOVE_RISK = """- THIS NODE'S DATA BELONGED TO CLUSTER {was_in}, and {cluster_id} is configured. Most likely
  cluster.id is mistyped: then correct it, restart Harmony and accept nothing. If {was_in} goes on without this node,
  and this node's data is founded anew as {cluster_id}, both accept writes under the same system identifier."""


class _Reply(msgspec.Struct):
    """An AcceptReply or an ErrorReply."""

    accepted: str = ""
    error: str = ""


def lines(s: StatusReply) -> list[str]:
    """The store as the asked agent sees it, for people. Pure."""
    me, store = s.myself, s.myself.store
    m, shown = store.marks, store.shown
    connected = "connected" if me.store_connected else "NOT CONNECTED"
    found = [
        f"store of cluster {s.cluster_id} as {me.node} sees it: {connected}",
        f"  lineage    {store.lineage or 'none: there is no bucket, or it was not looked at yet'}",
        f"  problem    {store.problem or 'none'}",
    ]
    if shown is None:
        found.append("  it shows   nothing was read yet")
    elif shown.revision == 0:
        found.append(f"  it shows   no cluster_state (read {shown.age_s:.1f} s ago)")
    else:
        leads = f"primary {shown.primary}" if shown.primary is not None else "no primary"
        found.append(
            f"  it shows   revision {shown.revision}, term {shown.term}, {leads} (read {shown.age_s:.1f} s ago)"
        )
    if m.revision or m.lineage:
        found.append(
            f"  seen here  revision {m.revision}, term {m.term}, of lineage {m.lineage or 'unknown'}"
        )
    else:
        found.append("  seen here  nothing yet")
    found.append(f"  on disk    {store.memory or 'yes'}")
    found.append(
        f"{me.node}: " + (f"DISTRUSTS the store: {me.distrust}" if me.distrust else "trusts the store")
    )
    if store.was_in:
        found.append(f"{me.node}'s data belonged to cluster {store.was_in}, not to {s.cluster_id}")
    for n in s.nodes:
        if n.name != me.node and n.member is not None:
            word = f"DISTRUSTS the store: {n.member.distrust}" if n.member.distrust else "trusts the store"
            age = "" if n.alive else f" (as of {n.age_s or 0:.0f} s ago)"
            found.append(f"{n.name}: {word}{age}")
    return found


def _ask(folder: Path) -> StatusReply:
    path = folder / "agent" / "agent.sock"
    try:
        return ask(path)
    except (OSError, ValueError) as e:
        click.echo(
            denied(e) or f"the agent does not answer ({path}: {e}); it is the one that knows", err=True
        )
        sys.exit(CANNOT_TELL)


@click.group()
def store() -> None:
    """Show what this node knows of its store; accept one it distrusts."""


@store.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--run-dir", help="The node's run_dir.")
@click.option("--config", "config_file", help="The node's configuration file.")
def show(as_json: bool, run_dir: str | None, config_file: str | None) -> None:
    """What the store shows, and the most that this node has seen. Exit 0 trusted, 1 distrusted, 3 cannot tell."""
    s = _ask(find_run_dir(run_dir, config_file))
    if as_json:
        others = {n.name: n.member.distrust for n in s.nodes if n.member is not None}
        told = {"node": s.myself.node, "distrust": s.myself.distrust, "others": others}
        click.echo(msgspec.json.encode(told | msgspec.to_builtins(s.myself.store)).decode())
    else:
        for line in lines(s):
            click.echo(line)
    sys.exit(DISTRUSTED if s.myself.distrust else TRUSTED)


@store.command()
@click.option(
    "--found", is_flag=True, help="Where the store is empty: found the cluster anew by this node's data."
)
@click.option(
    "--leave",
    default="",
    metavar="CLUSTER",
    help="Move this node's data here from that cluster, to which it belonged.",
)
@click.option("--yes", is_flag=True, help="Answer the question with yes.")
@click.option("--run-dir", help="The node's run_dir.")
@click.option("--config", "config_file", help="The node's configuration file.")
def accept(found: bool, leave: str, yes: bool, run_dir: str | None, config_file: str | None) -> None:
    """Take the store as it is now, although this node has seen more of it.

    Where its data belonged to a cluster of another id, that one's name must be typed, or given as --leave.
    Exit 0: accepted. 1: not, or it is not known. 2: not confirmed. 3: the agent does not answer. 64: usage.
    """
    folder = find_run_dir(run_dir, config_file)
    told = _ask(folder)
    for line in lines(told):
        click.echo(line)
    click.echo(RISKS)
    if found:
        click.echo(FOUND_RISK)
    was_in = told.myself.store.was_in
    if was_in:
        click.echo(MOVE_RISK.format(was_in=was_in, cluster_id=told.cluster_id))
        leave = leave or typed(f"Type the name of the cluster that this node leaves ({was_in}) to move it")
    if leave != was_in:
        click.echo(
            f"not accepted: is cluster.id right? --leave must name the other cluster ({was_in or 'none'})",
            err=True,
        )
        sys.exit(NOT_CONFIRMED)
    here = f"cluster {told.cluster_id}"
    question = f"Found {here} anew by this node's data?" if found else f"Accept the store of {here} as it is?"
    if not confirmed(question, yes=yes):
        click.echo("not accepted (answer yes, or give --yes)", err=True)
        sys.exit(NOT_CONFIRMED)
    path = folder / "agent" / "agent.sock"
    try:
        raw = request(path, msgspec.json.encode(AcceptRequest(found, who()[:500], leave)))
        reply = decoded(msgspec.json.Decoder(_Reply), raw)
    except (OSError, ValueError) as e:
        click.echo(
            f"whether it was accepted is not known ({path}: {e}); see `harmonyctl store show`", err=True
        )
        sys.exit(1)
    if not reply.accepted:
        click.echo(f"the agent refused: {reply.error}", err=True)
        if reply.error.startswith("not permitted"):
            click.echo(denied(PermissionError()), err=True)
        sys.exit(1)
    click.echo(f"accepted: {reply.accepted}")
