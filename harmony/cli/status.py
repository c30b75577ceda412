"""harmonyctl status: the cluster as this node's agent sees it, and one number for scripts.

It shows what harmony/verdict.py has found, and judges nothing. It loads no more than that takes: on the worst day it
has to answer at once.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec

from harmony.admin import MAX_LINE_BYTES, NodeView, StatusReply
from harmony.cli.where import find_run_dir
from harmony.decoding import decoded
from harmony.records import ClusterState, lsn
from harmony.verdict import CANNOT_TELL, Finding, Verdict, counted, judge, lag, old

__all__ = ["CANNOT_TELL", "ask", "lines", "request", "status", "table"]

WORDS = ("healthy", "degraded", "NO PRIMARY", "cannot tell")
COLOURS = ("green", "yellow", "red", "red")
NO_TERMINAL = 160  # columns
HEADINGS = (
    "node",
    "address",
    "database",
    "state [row]",
    "timeline",
    "LSN",
    "lag",
    "lease",
    "generation",
    "marks",
)
# Left out from the first on where the terminal is too narrow: each of them stands elsewhere or is for experts.
DISPENSABLE = ("generation", "address", "marks", "timeline", "LSN")


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


# ---------------------------------------------------------------- for people


def _row(s: StatusReply, n: NodeView) -> list[str]:
    m = n.member
    if m is None:
        return [n.name, f"{n.host}:{n.port}", "?", "never heard of", "", "", "", "", "", ""]
    behind, was = lag(s, n), old(s, n)
    primary = s.cluster is not None and s.cluster.primary == n.name
    marks = [
        *(["latched"] if m.latched else []),
        *(["nofailover"] if m.nofailover else []),
        *(["stopping"] if m.retiring else []),
        *([f"{n.age_s or 0:.0f} s old"] if was else []),
        *([] if m.fencer_ok or was else ["fencer silent"]),
        *(["sick"] if m.sick else []),
        *(["not streaming"] if m.db == "standby" and not m.streaming else []),
    ]
    return [
        n.name,
        f"{n.host}:{n.port}",
        f"was {m.db}" if was else m.db,
        f"{m.status} [{m.row}]",
        str(m.timeline) if m.timeline else "?",
        lsn(m.received_lsn) if m.received_lsn else "?",
        str(behind) if behind is not None else ("" if primary else "?"),
        f"{m.lease_left_ms / 1000:.1f} s" if m.lease_left_ms is not None and not was else "",
        m.generation,
        ", ".join(marks),
    ]


def table(rows: list[list[str]], width: int) -> list[str]:
    """Lines of at most `width` columns, where leaving out columns can bring that about."""
    whole = [list(HEADINGS), *rows]
    for left_out in range(len(DISPENSABLE) + 1):
        gone = DISPENSABLE[:left_out]
        keep = [i for i, heading in enumerate(HEADINGS) if heading not in gone]
        wide = [max(len(row[i]) for row in whole) for i in keep]
        if sum(wide) + 2 * (len(keep) - 1) <= width:
            break
    return ["  ".join(row[i].ljust(w) for i, w in zip(keep, wide, strict=True)).rstrip() for row in whole]


def _synchronous(c: ClusterState) -> str:
    if c.sync_count:
        return f"synchronous: any {c.sync_count} of {', '.join(c.sync_voters)}"
    if c.sync_voters:
        return f"synchronous: no standby keeps up, commits wait for NOBODY; only {c.last_primary} may lead for now"
    return "asynchronous: a failover may lose the newest commits"


def _after(s: StatusReply) -> Iterator[str]:
    c, me = s.cluster, s.myself
    yield f"{me.node} decides: {me.state} [{me.row}] {me.why}"
    if me.distrust:
        yield "`harmonyctl store show` says what is known; `harmonyctl store accept` is the last way out"
    if me.changes:
        yield f"{counted(me.changes, 'failover')} since the last that was acknowledged (harmonyctl acknowledge)"
    if c is not None and c.successor is not None:
        to = "is to take over" if c.primary is None else f"is to take over from {c.primary}"
        yield f"hand-over under way: {c.successor} {to}"
    elif me.successor is not None:
        yield f"hand-over under way: {me.node} gives leadership to {me.successor}"
    if me.latched:
        yield f"latched: {me.latched}; `harmonyctl unfence` ends it"
    if me.fencer_ok and me.fencer_detail:
        yield f"fencer of {me.node}: {me.fencer_detail}"


def _finding(f: Finding) -> str:
    return f"ALARM: {f.text}" if f.severity == "alarm" else f"- {f.text}"


def _plain(text: str) -> str:
    """Without what could move a terminal's cursor: texts are not ours."""
    return "".join(ch if ch.isprintable() else " " for ch in text)


def lines(s: StatusReply, v: Verdict, width: int) -> list[str]:
    """All that people are shown; the first line has the verdict."""
    c = s.cluster
    age = f", heartbeat {s.cluster_age_s:.1f} s ago" if s.cluster_age_s is not None else ""
    led = f", term {c.term}, primary {c.primary}{age}" if c is not None else ""
    if c is not None and v.code == CANNOT_TELL:
        led = f"; last known: term {c.term}, primary {c.primary}{age}"
    head = f"cluster {s.cluster_id}: {WORDS[v.code]}{led}"
    said = [head] if c is None else [head, _synchronous(c)]
    shown = [[_plain(cell) for cell in _row(s, n)] for n in s.nodes]
    said = [*_wrapped(said, width), *table(shown, width)]
    return said + _wrapped([*map(_finding, v.findings), *_after(s)], width)


def _wrapped(texts: list[str], width: int) -> list[str]:
    found = []
    for text in texts:
        found += textwrap.wrap(
            _plain(text), width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
    return found


def show(s: StatusReply, v: Verdict) -> None:
    """Print for people: as wide as the terminal is, and with a colour for the verdict there."""
    terminal = sys.stdout.isatty()
    first, *rest = lines(s, v, shutil.get_terminal_size((80, 24)).columns if terminal else NO_TERMINAL)
    if terminal and "NO_COLOR" not in os.environ:
        first = first.replace(WORDS[v.code], click.style(WORDS[v.code], fg=COLOURS[v.code], bold=True), 1)
    click.echo("\n".join([first, *rest]))


def _without_agent(folder: Path, why: str, *, as_json: bool) -> None:
    """What the fencer alone can say: of this node, nothing of the cluster."""
    from harmony.errors import FencerUnavailable  # noqa: PLC0415 (an agent that answers needs none of it)
    from harmony.fencer_client import call, protocol  # noqa: PLC0415

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
        findings = [Finding("alarm", "", reason) for reason in reasons]
        merged = {"exit_code": CANNOT_TELL, "reasons": reasons, "findings": findings, "fencer": fencer}
        click.echo(msgspec.json.encode(merged))
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
    verdict = judge(reply)
    if as_json:
        found = {"exit_code": verdict.code, "reasons": verdict.reasons, "findings": verdict.findings}
        click.echo(msgspec.json.encode({**found, **msgspec.to_builtins(reply)}).decode())
    else:
        show(reply, verdict)
    sys.exit(verdict.code)
