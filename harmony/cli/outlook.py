"""What a fence by hand would mean for the cluster, as far as this node's agent knows. --force does not load it."""

from __future__ import annotations

from pathlib import Path

from harmony.admin import NodeView, StatusReply
from harmony.cli.status import ask
from harmony.cli.where import denied
from harmony.core.observe import unfit_by
from harmony.core.states import WRITABLE_STATES


def able(s: StatusReply, n: NodeView) -> bool:
    """Whether this other node could take over, as far as the asked agent knows. Pure."""
    return n.name != s.myself.node and not unfit_by(s.cluster, n.member if n.alive else None, n.name)


def outlook(s: StatusReply) -> tuple[bool, str]:
    """(may fence without --force, what will happen in words). Pure."""
    me = s.myself.node
    if not s.myself.store_connected or s.cluster is None:
        return False, f"the agent of {me} does not see the cluster: it cannot tell who could take over"
    ready = [n.name for n in s.nodes if able(s, n)]
    if s.cluster.primary == me or s.myself.state in WRITABLE_STATES:
        then = f"{' or '.join(ready)} takes over" if ready else "NO OTHER NODE is able to take over"
        return bool(ready), f"{me} is the PRIMARY: its PostgreSQL stops, clients are cut off, and {then}"
    return True, f"{me} is a standby: its PostgreSQL stops; the primary is {s.cluster.primary or 'nobody'}"


def others_can_take_over(folder: Path) -> tuple[bool, str]:
    """The same of the node whose run_dir this is."""
    try:
        return outlook(ask(folder / "agent" / "agent.sock"))
    except (OSError, ValueError) as e:
        return False, denied(e) or f"the agent cannot be asked ({e})"
