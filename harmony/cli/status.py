"""harmonyctl status: the cluster as this node's agent sees it, and one number for scripts."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from harmony.admin import MAX_LINE_BYTES, NodeView, StatusReply
from harmony.agent.settings import ALARM
from harmony.cli.where import find_run_dir
from harmony.core.states import WRITABLE_STATES
from harmony.decoding import decoded
from harmony.errors import FencerUnavailable
from harmony.fencer_client import call, protocol

HEALTHY, DEGRADED, NO_PRIMARY, CANNOT_TELL = 0, 1, 2, 3


def ask(path: Path, timeout_s: float = 3.0) -> StatusReply:
    """The agent's answer, within `timeout_s` in all. Raises OSError or ValueError (a wrong answer)."""
    return decoded(msgspec.json.Decoder(StatusReply), request(path, b'{"op":"status"}', timeout_s))


def request(path: Path, line: bytes, timeout_s: float = 3.0) -> bytes:
    """One line to the agent's socket and the line that it answers with. Raises OSError."""
    until = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        sock.connect(str(path))
        sock.sendall(line + b"\n")
        data = b""
        while not data.endswith(b"\n") and len(data) <= MAX_LINE_BYTES:
            sock.settimeout(max(0.001, until - time.monotonic()))
            chunk = sock.recv(65536)
            if not chunk:
                break
            data += chunk
    return data


def health(s: StatusReply) -> tuple[int, list[str]]:
    """(exit code, reasons): 0 healthy, 1 degraded, 2 no primary, 3 cannot tell. Pure."""
    code, reasons = _leadership(s)
    me = s.myself
    alarms = [f"{me.node} DISTRUSTS the store: {me.distrust}"] if me.distrust else []
    for n in s.nodes:
        if n.name != me.node and n.alive and n.member is not None and n.member.distrust:
            alarms.append(f"{n.name} DISTRUSTS the store: {n.member.distrust}")
    if me.stopped:
        alarms.append(me.stopped)
    alarms += [note for note in notes(s) if ALARM in note]
    return (DEGRADED if alarms and code == HEALTHY else code), reasons + alarms


def notes(s: StatusReply) -> list[str]:
    """What each live member says of its settings and slots."""
    return [
        f"{n.name}: {note}" for n in s.nodes if n.alive and n.member is not None for note in n.member.notes
    ]


def _leadership(s: StatusReply) -> tuple[int, list[str]]:
    if not s.myself.store_connected:
        return CANNOT_TELL, ["this agent is not connected to the store: what it knows is old"]
    if s.cluster is None:
        return NO_PRIMARY, ["the cluster has no record yet: no primary was ever elected"]
    if s.cluster.primary is None:
        return NO_PRIMARY, [f"the place is vacant ({s.cluster.last_primary} left it)"]
    by_name = {n.name: n for n in s.nodes}
    own = by_name.get(s.myself.node)
    if s.cluster_stale and (own is None or not own.alive):
        return CANNOT_TELL, ["this agent has read nothing new lately, not even of itself: its view is stale"]
    if s.cluster_stale:
        return NO_PRIMARY, [f"the heartbeat of {s.cluster.primary} is stale"]
    if s.cluster.status not in WRITABLE_STATES:
        return NO_PRIMARY, [f"{s.cluster.primary} is recorded but says {s.cluster.status}"]
    reasons = []
    if s.cluster.primary not in by_name:
        reasons.append(f"the primary {s.cluster.primary} is not among the configured members")
    for n in s.nodes:
        reasons += _complaints(n, s.cluster.primary)
    return (DEGRADED if reasons else HEALTHY), reasons


def _complaints(n: NodeView, primary: str | None) -> list[str]:
    m = n.member
    if m is None or not n.alive:
        return [f"{n.name} is not heard of"]
    found = []
    if not m.fencer_ok:
        found.append(f"the fencer of {n.name} does not answer")
    if m.latched:
        found.append(f"{n.name} is latched by an operator")
    if m.sick:
        found.append(f"PostgreSQL of {n.name} is SICK: {m.sick}")
    if m.note:
        found.append(f"PostgreSQL of {n.name}: {m.note}")
    if n.name == primary and m.db != "primary":
        found.append(f"the database of {n.name} is {m.db}")
    if n.name != primary and m.db == "primary":
        found.append(f"{n.name} is not the recorded primary, but its database says it is one")
    elif n.name != primary and not (m.streaming and m.db == "standby"):
        found.append(f"{n.name} does not stream ({m.why})")
    return found


def lsn(value: int) -> str:
    """PostgreSQL's notation of a WAL position."""
    return f"{value >> 32:X}/{value & 0xFFFFFFFF:08X}"


def _row(s: StatusReply, n: NodeView) -> list[str]:
    m = n.member
    if m is None:
        return [n.name, f"{n.host}:{n.port}", "?", "never heard of", "", "", "", "", "", ""]
    primary = s.cluster is not None and s.cluster.primary == n.name
    lag = max(0, s.cluster.lsn - m.received_lsn) if s.cluster is not None else 0
    notes = [
        *(["latched"] if m.latched else []),
        *(["nofailover"] if m.nofailover else []),
        *([] if n.alive else [f"silent for {n.age_s or 0:.0f} s"]),
        *([] if m.fencer_ok else ["fencer silent"]),
        *([m.progress] if m.progress else []),
        *([m.cannot_rewind] if m.cannot_rewind else []),
        *(["sick"] if m.sick else []),
        *(["not streaming"] if m.db == "standby" and not m.streaming else []),
    ]
    return [
        n.name,
        f"{n.host}:{n.port}",
        m.db,
        f"{m.status} [{m.row}]",
        str(m.timeline),
        lsn(m.received_lsn),
        "" if primary else str(lag),
        f"{m.lease_left_ms / 1000:.1f} s" if m.lease_left_ms is not None else "",
        m.generation,
        ", ".join(notes),
    ]


def show(s: StatusReply, code: int, reasons: list[str]) -> None:
    """Print for people."""
    width = None if sys.stdout.isatty() else 160
    console = Console(width=width, markup=False, highlight=False, emoji=False)  # texts are not ours
    c = s.cluster
    word = ["healthy", "degraded", "NO PRIMARY", "cannot tell"][code]
    age = f", heartbeat {s.cluster_age_s:.1f} s ago" if s.cluster_age_s is not None else ""
    console.print(
        f"cluster {s.cluster_id}: {word}" + (f", term {c.term}, primary {c.primary}{age}" if c else "")
    )
    if c is not None and c.sync_count:
        console.print(f"synchronous: any {c.sync_count} of {', '.join(c.sync_voters)}")
    elif c is not None and c.sync_voters:
        console.print(
            f"synchronous: no standby keeps up, commits wait for NOBODY; only {c.last_primary} may lead for now"
        )
    elif c is not None:
        console.print("asynchronous: a failover may lose the newest commits")
    table = Table(
        "node", "address", "database", "state [row]", "timeline", "LSN", "lag", "lease", "generation", "notes"
    )
    for n in s.nodes:
        table.add_row(*_row(s, n))
    console.print(table)
    for reason in (*reasons, *(note for note in notes(s) if note not in reasons)):
        console.print(f"- {reason}")
    me = s.myself
    console.print(f"{me.node} decides: {me.state} [{me.row}] {me.why}")
    if me.distrust:
        console.print(
            "`harmonyctl store show` says what is known; `harmonyctl store accept` is the last way out"
        )
    if me.changes:
        console.print(f"{me.changes} failovers since the last that was acknowledged (harmonyctl acknowledge)")
    if c is not None and c.successor is not None:
        to = "is to take over" if c.primary is None else f"is to take over from {c.primary}"
        console.print(f"hand-over under way: {c.successor} {to}")
    elif me.successor is not None:
        console.print(f"hand-over under way: {me.node} gives leadership to {me.successor}")
    if me.retiring:
        console.print(f"{me.node} was asked to stop")
    if me.failures:
        console.print(f"{me.failures} heartbeats in a row have failed here")
    if me.latched:
        console.print(f"latched: {me.latched}; `harmonyctl unfence` ends it")
    if not me.fencer_ok or me.fencer_detail:
        console.print(f"fencer of {me.node}: {me.fencer_detail}")


def _without_agent(folder: Path, why: str, *, as_json: bool) -> None:
    """What the fencer alone can say: of this node, nothing of the cluster."""
    fencer: protocol.Status | None = None
    also = ""
    try:
        answer = call(str(folder / "fencer.sock"), protocol.StatusRequest(), timeout_s=3.0)
        if isinstance(answer, protocol.Status):
            fencer = answer
        else:
            also = f"the fencer does not say its status: {answer}"
    except FencerUnavailable as e:
        also = f"nor does the fencer ({e})"
    if as_json:
        reasons = [r for r in (why, also) if r]
        click.echo(msgspec.json.encode({"exit_code": CANNOT_TELL, "reasons": reasons, "fencer": fencer}))
        return
    click.echo(why, err=True)
    if fencer is None:
        click.echo(also, err=True)
        return
    left_ms = ((fencer.lease_deadline_boottime_ns or 0) - fencer.now_boottime_ns) / 1e6
    leased = f"leased for {left_ms / 1000:.1f} s more" if fencer.active and left_ms > 0 else "no lease"
    click.echo("Its fencer does; it knows this node only, nothing of the cluster:")
    kind = "standby" if fencer.is_standby else "writable"
    click.echo(f"  {fencer.node}: PostgreSQL is {fencer.postgres} ({kind} when it runs), {leased}")
    click.echo(
        f"  highest generation {fencer.highest}, fence proven: {'yes' if fencer.fence_proven else 'no'}"
    )
    click.echo(f"  held by {fencer.held_by}; watchdog {fencer.watchdog}")
    if fencer.cannot_lead:
        click.echo(f"  it cannot lead: {fencer.cannot_lead}")
    if fencer.latch is not None:
        click.echo(f"  latched by {fencer.latch.who} at {fencer.latch.at_utc}: {fencer.latch.reason}")
    if not fencer.trusted:
        click.echo(f"  its state file is not trusted: {fencer.trust_detail}")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--run-dir", help="The node's run_dir.")
@click.option("--config", "config_file", help="The node's configuration file.")
def status(as_json: bool, run_dir: str | None, config_file: str | None) -> None:
    """All nodes. Exit 0 healthy, 1 degraded, 2 no primary, 3 cannot tell."""
    folder = find_run_dir(run_dir, config_file)
    try:
        reply = ask(folder / "agent" / "agent.sock")
    except (OSError, ValueError) as e:
        _without_agent(folder, f"the agent does not answer ({folder}/agent/agent.sock: {e})", as_json=as_json)
        sys.exit(CANNOT_TELL)
    code, reasons = health(reply)
    if as_json:
        merged = {"exit_code": code, "reasons": reasons, **msgspec.to_builtins(reply)}
        click.echo(msgspec.json.encode(merged).decode())
    else:
        show(reply, code, reasons)
    sys.exit(code)
