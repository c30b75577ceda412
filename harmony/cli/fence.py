"""harmonyctl fence and unfence: straight to the fencer, whatever else is dead."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
import time
from pathlib import Path

import click
import msgspec

from harmony.cli.status import ask
from harmony.cli.where import find_run_dir
from harmony.errors import FencerUnavailable
from harmony.fencer_client import call, protocol

WAIT_S = 30.0


def _who() -> str:
    name = os.environ.get("SUDO_USER") or getpass.getuser()
    return f"{name} (pid {os.getpid()})"


def _others_can_take_over(folder: Path) -> tuple[bool, str]:
    try:
        reply = ask(folder / "agent" / "agent.sock")
    except (OSError, msgspec.DecodeError) as e:
        return False, f"the agent cannot be asked ({e})"
    me = reply.myself.node
    ready = [
        n.name
        for n in reply.nodes
        if n.name != me and n.alive and n.member is not None and n.member.db not in {"unknown", "down"}
    ]
    leads = reply.cluster is not None and reply.cluster.primary == me
    role = "the PRIMARY" if leads else "a standby"
    return bool(ready) or not leads, f"{me} is {role}; others ready: {', '.join(ready) or 'none'}"


@click.command()
@click.option("--force", is_flag=True, help="At once, without questions, also when nobody can take over.")
@click.option("--yes", is_flag=True, help="Answer the question with yes.")
@click.option("--reason", default="by hand", help="Kept with the latch.")
@click.option("--run-dir", help="The node's run_dir.")
@click.option("--config", "config_file", help="The node's configuration file.")
def fence(force: bool, yes: bool, reason: str, run_dir: str | None, config_file: str | None) -> None:
    """Stop PostgreSQL on this node, prove it gone, and keep it so until `unfence`. Exit 0 only when proven."""
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
    request = protocol.OperatorFence(reason=reason[:500], who=_who()[:500])
    try:
        reply = call(path, request, timeout_s=3.0)
        if isinstance(reply, protocol.Accepted):
            _follow(path, reply.record.generation)
        click.echo(f"the fencer refused: {reply}", err=True)
        if not isinstance(reply, protocol.Refusal) or reply.error != "retiring":
            sys.exit(1)
    except FencerUnavailable as e:
        click.echo(f"the fencer does not answer ({e})", err=True)
    _one_shot(folder, reason)


def _follow(path: str, generation: protocol.Generation) -> None:
    """Wait for the order's outcome, print it and end."""
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        status = call(path, protocol.StatusRequest(), timeout_s=3.0)
        record = status.order if isinstance(status, protocol.Status) else None
        if record is not None and record.generation == generation and record.state != "running":
            for rung in record.rungs:
                click.echo(f"  {rung.name:10} {rung.took_ms:8.1f} ms  gone: {rung.gone}  {rung.detail}")
            if record.state == "done":
                click.echo(f"fenced, proven, in {record.took_ms:.0f} ms; latched until `harmonyctl unfence`")
                sys.exit(0)
            click.echo(f"NOT proven: {record.state} {record.detail}", err=True)
            sys.exit(1)
        if record is not None and record.generation > generation:
            click.echo(f"a newer order came: {record.op} {record.generation}", err=True)
            sys.exit(1)
        time.sleep(0.05)
    click.echo(f"NOT proven within {WAIT_S:g} s; the fencer goes on trying", err=True)
    sys.exit(1)


def _one_shot(folder: Path, reason: str) -> None:
    config = folder / "fencer.json"
    if not config.exists():
        click.echo(f"no {config} either: stop PostgreSQL by hand, and see --run-dir", err=True)
        sys.exit(1)
    click.echo("running the one-shot emergency fence (it sets no latch: stop Harmony too)", err=True)
    argv = [sys.executable, "-I", "-m", "harmony_fencer", "--config", str(config), "--once", reason]
    sys.exit(subprocess.run(argv, check=False).returncode)


@click.command()
@click.option("--run-dir", help="The node's run_dir.")
@click.option("--config", "config_file", help="The node's configuration file.")
def unfence(run_dir: str | None, config_file: str | None) -> None:
    """Take the operator's latch away; the agent then brings the node back as what the cluster needs."""
    path = str(find_run_dir(run_dir, config_file) / "fencer.sock")
    try:
        reply = call(path, protocol.Unfence(who=_who()[:500]), timeout_s=5.0)
    except FencerUnavailable as e:
        click.echo(f"the fencer does not answer ({e})", err=True)
        sys.exit(1)
    if isinstance(reply, protocol.Done):
        click.echo(reply.detail)
        return
    click.echo(f"the fencer refused: {reply}", err=True)
    sys.exit(1)
