"""harmonyctl fence and unfence: straight to the fencer, whatever else is dead."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import click
import msgspec

from harmony.admin import NodeView, StatusReply
from harmony.cli.status import ask
from harmony.cli.where import find_run_dir, who
from harmony.core.observe import unfit_by
from harmony.core.states import WRITABLE_STATES
from harmony.decoding import decoded
from harmony.errors import FencerUnavailable
from harmony.fencer_client import call, protocol

FENCE_S = 30.0  # where fencer.json cannot tell
PATIENCE_S = 5.0
ANSWER_S = 3.0
POLL_S = 0.05


class _Known(msgspec.Struct):
    """What is used of fencer.json here."""

    fence_timeout_s: float = FENCE_S
    lease_s: float = FENCE_S


def _wait_s(folder: Path) -> float:
    """How long a fence may take: a clean shutdown while the lease lasts, the fencer's budget, some patience."""
    try:
        known = decoded(msgspec.json.Decoder(_Known), (folder / "fencer.json").read_bytes())
    except (OSError, ValueError):
        known = _Known()
    return known.lease_s + known.fence_timeout_s + PATIENCE_S


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


def _others_can_take_over(folder: Path) -> tuple[bool, str]:
    try:
        return outlook(ask(folder / "agent" / "agent.sock"))
    except (OSError, ValueError) as e:
        return False, f"the agent cannot be asked ({e})"


@click.command()
@click.option(
    "--force", is_flag=True, help="At once: no questions, no clean shutdown, also when nobody can take over."
)
@click.option("--yes", is_flag=True, help="Answer the question with yes.")
@click.option("--reason", default="by hand", help="Kept with the latch.")
@click.option("--run-dir", help="The node's run_dir.")
@click.option("--config", "config_file", help="The node's configuration file.")
def fence(force: bool, yes: bool, reason: str, run_dir: str | None, config_file: str | None) -> None:
    """Stop PostgreSQL on this node, prove it gone, keep it so until `unfence`. Exit 0 only when proven."""
    folder = find_run_dir(run_dir, config_file)
    if not force:
        can, text = _others_can_take_over(folder)
        click.echo(text)
        if not can:
            click.echo("nobody could take over; use --force to fence all the same", err=True)
            sys.exit(2)
        if not yes and not (sys.stdin.isatty() and click.confirm("Stop PostgreSQL here and latch the node?")):
            click.echo("not fenced (answer yes, or give --yes or --force)", err=True)
            sys.exit(2)
    path = str(folder / "fencer.sock")
    request = protocol.OperatorFence(reason=reason[:500], who=who()[:500], clean=not force)
    try:
        reply = call(path, request, timeout_s=ANSWER_S)
    except FencerUnavailable as e:
        click.echo(f"the fencer does not answer ({e})", err=True)
    else:
        if isinstance(reply, protocol.Accepted):
            _follow(path, reply.record.generation, _wait_s(folder))
        elif isinstance(reply, protocol.Refusal):
            click.echo(f"the fencer refused: {reply.error}: {reply.detail}", err=True)
            if reply.error == "not_permitted":
                click.echo("only root (or the fencer's own user) may fence by hand: use sudo", err=True)
                sys.exit(1)
        else:
            click.echo(f"the fencer answered something else: {reply}", err=True)
    _one_shot(folder, reason)


def _follow(path: str, generation: protocol.Generation, wait_s: float) -> None:
    """Wait for the order's outcome, print it and end. Returns only when the fencer fell silent."""
    until = time.monotonic() + wait_s
    heard = time.monotonic()
    while time.monotonic() < until:
        try:
            status = call(path, protocol.StatusRequest(), timeout_s=ANSWER_S)
        except FencerUnavailable as e:
            if time.monotonic() - heard > ANSWER_S:
                click.echo(f"the fencer fell silent while it fenced ({e})", err=True)
                return
            time.sleep(POLL_S)
            continue
        heard = time.monotonic()
        if isinstance(status, protocol.Status):
            _report(status, generation)
        time.sleep(POLL_S)
    click.echo(f"NOT proven within {wait_s:g} s; the fencer goes on trying", err=True)
    sys.exit(1)


def _report(s: protocol.Status, generation: protocol.Generation) -> None:
    """End when the outcome is known; a newer order of the agent does not undo a latched, proven fence."""
    record = s.order
    if record is None or record.generation < generation:
        return
    if record.generation == generation and record.state == "running":
        return
    proven = s.fence_proven and s.postgres == "down" and s.latch is not None
    if record.generation > generation and not proven and record.state == "running":
        return  # latched, it can only be another fence
    for rung in record.rungs:
        click.echo(f"  {rung.name:10} {rung.took_ms:8.1f} ms  gone: {rung.gone}  {rung.detail}")
    if proven or (record.generation == generation and record.state == "done"):
        click.echo(f"fenced, proven, in {record.took_ms:.0f} ms; latched until `harmonyctl unfence`")
        sys.exit(0)
    click.echo(f"NOT proven: {record.op} {record.generation} {record.state} {record.detail}", err=True)
    sys.exit(1)


def _one_shot(folder: Path, reason: str) -> None:
    """The emergency fence, when no fencer does it. It is waited for, never killed."""
    config = folder / "fencer.json"
    if not os.access(config, os.R_OK):
        click.echo(f"{config} cannot be read either: stop PostgreSQL by hand, and see --run-dir", err=True)
        sys.exit(1)
    click.echo("running the one-shot emergency fence, with the latch", err=True)
    argv = [sys.executable, "-I", "-m", "harmony_fencer", "--config", str(config), "--once", reason]
    argv += ["--latch", who()]
    wait_s = _wait_s(folder)
    try:
        process = subprocess.Popen(argv)
    except OSError as e:
        click.echo(f"NOT fenced: {sys.executable} cannot be started ({e}): stop PostgreSQL by hand", err=True)
        sys.exit(1)
    try:
        code = process.wait(wait_s)
    except subprocess.TimeoutExpired:
        click.echo(f"NOT proven within {wait_s:g} s; it goes on as pid {process.pid}", err=True)
        sys.exit(1)
    word = "proven: PostgreSQL is gone" if code == 0 else f"NOT proven (exit code {code})"
    click.echo(f"one-shot fence {word}", err=code != 0)
    sys.exit(0 if code == 0 else 1)


@click.command()
@click.option("--run-dir", help="The node's run_dir.")
@click.option("--config", "config_file", help="The node's configuration file.")
def unfence(run_dir: str | None, config_file: str | None) -> None:
    """Take the operator's latch away; the agent then brings the node back as what the cluster needs."""
    path = str(find_run_dir(run_dir, config_file) / "fencer.sock")
    try:
        reply = call(path, protocol.Unfence(who=who()[:500]), timeout_s=5.0)
    except FencerUnavailable as e:
        click.echo(f"the fencer does not answer ({e})", err=True)
        sys.exit(1)
    if isinstance(reply, protocol.Done):
        click.echo(reply.detail)
        click.echo(
            "Next, the agent brings this node back as what the cluster needs: see `harmonyctl status`."
        )
        return
    if isinstance(reply, protocol.Refusal):
        click.echo(f"the fencer refused: {reply.error}: {reply.detail}", err=True)
    else:
        click.echo(f"the fencer answered something else: {reply}", err=True)
    sys.exit(1)
