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
from harmony.cli.where import find_run_dir, who
from harmony.decoding import decoded

TRUSTED, DISTRUSTED = 0, 1
RISKS = """What accepting risks:
- The store has lost, or may lose, what it had acknowledged. Transactions that PostgreSQL acknowledged to clients
  and that exist only in the lost part of that history (on a primary that this node knows nothing of) are lost.
- Where another part of the cluster still follows the old history, there may then be two primaries: first make
  sure that no other store answers those nodes, and that no other PostgreSQL of this cluster accepts writes.
- It is about this node only: run it on every node that distrusts the store (`harmonyctl store show`)."""
FOUND_RISK = """- --found: where the store is empty, THIS NODE'S DATA BECOMES THE CLUSTER'S. Give it on one node only,
  the one with the newest data (compare the LSNs of `harmonyctl status`); on the others run the command without it."""


class _Reply(msgspec.Struct):
    """An AcceptReply or an ErrorReply."""

    accepted: str = ""
    error: str = ""


def lines(s: StatusReply) -> list[str]:
    """The store as the asked agent sees it, for people. Pure."""
    me, store = s.myself, s.myself.store
    m, shown = store.marks, store.shown
    found = [
        f"store as {me.node} sees it: {'connected' if me.store_connected else 'NOT CONNECTED'}",
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
        click.echo(f"the agent does not answer ({path}: {e}); it is the one that knows", err=True)
        sys.exit(CANNOT_TELL)


@click.group()
def store() -> None:
    """Show what this node knows of its store; accept a store that it distrusts."""


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
@click.option("--yes", is_flag=True, help="Answer the question with yes.")
@click.option("--run-dir", help="The node's run_dir.")
@click.option("--config", "config_file", help="The node's configuration file.")
def accept(found: bool, yes: bool, run_dir: str | None, config_file: str | None) -> None:
    """Take the store as it is now, although this node has seen more of it. Exit 0 only when accepted."""
    folder = find_run_dir(run_dir, config_file)
    for line in lines(_ask(folder)):
        click.echo(line)
    click.echo(RISKS)
    if found:
        click.echo(FOUND_RISK)
    question = "Found the cluster anew by this node's data?" if found else "Accept the store as it is?"
    if not yes and not (sys.stdin.isatty() and click.confirm(question)):
        click.echo("not accepted (answer yes, or give --yes)", err=True)
        sys.exit(2)
    path = folder / "agent" / "agent.sock"
    try:
        raw = request(path, msgspec.json.encode(AcceptRequest(found, who()[:500])))
        reply = decoded(msgspec.json.Decoder(_Reply), raw)
    except (OSError, ValueError) as e:
        click.echo(
            f"whether it was accepted is not known ({path}: {e}); see `harmonyctl store show`", err=True
        )
        sys.exit(1)
    if not reply.accepted:
        click.echo(f"the agent refused: {reply.error}", err=True)
        sys.exit(1)
    click.echo(f"accepted: {reply.accepted}")
