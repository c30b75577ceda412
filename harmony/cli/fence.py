"""harmonyctl fence and unfence: straight to the fencer, whatever else is dead."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import click
import msgspec

from harmony.cli.terminal import NOT_CONFIRMED, confirmed, say
from harmony.cli.where import denied, find_run_dir, who
from harmony.decoding import decoded
from harmony.errors import FencerUnavailable
from harmony.fencer_client import call, protocol

FENCE_S = 30.0  # where fencer.json cannot tell
PATIENCE_S = 5.0
ANSWER_S = 3.0
POLL_S = 0.05
NOT_PERMITTED = "only root (or the fencer's own user) may do this by hand: use sudo"


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


@click.command()
@click.option(
    "--force", is_flag=True, help="At once: no questions, no clean shutdown, also when nobody can take over."
)
@click.option("--yes", is_flag=True, help="Answer the question with yes.")
@click.option("--reason", default="by hand", help="Kept with the latch.")
@click.option("--run-dir", help="The node's run_dir.")
@click.option("--config", "config_file", help="The node's configuration file.")
def fence(force: bool, yes: bool, reason: str, run_dir: str | None, config_file: str | None) -> None:
    """Stop PostgreSQL on this node, prove it gone, keep it so until `unfence`.

    Exit 0: only when proven. 1: not, or not proven. 2: not confirmed, or nobody could take over. 64: usage.
    78: the configuration file that was named cannot be used.
    """
    folder = find_run_dir(run_dir, config_file)
    if not force:
        _agreed(folder, yes=yes)
    path = str(folder / "fencer.sock")
    request = protocol.OperatorFence(reason=reason[:500], who=who()[:500], clean=not force)
    try:
        reply = call(path, request, timeout_s=ANSWER_S)
    except FencerUnavailable as e:
        say(denied(e) or f"the fencer does not answer ({e})", err=True)
        if denied(e):
            sys.exit(1)
    else:
        if isinstance(reply, protocol.Accepted):
            _follow(path, reply.record.generation, _wait_s(folder))
        elif isinstance(reply, protocol.Refusal):
            say(f"the fencer refused: {reply.error}: {reply.detail}", err=True)
            if reply.error == "not_permitted":
                say(NOT_PERMITTED, err=True)
                sys.exit(1)
        else:
            say(f"the fencer answered something else: {reply}", err=True)
    _one_shot(folder, reason)


def _agreed(folder: Path, *, yes: bool) -> None:
    """Say what it means, and ask; ends the process where nobody could take over, or it is not confirmed."""
    from harmony.cli.outlook import others_can_take_over  # noqa: PLC0415 (--force needs nothing of this)

    can, text = others_can_take_over(folder)
    click.echo(text)
    if not can:
        click.echo("nobody could take over; use --force to fence all the same", err=True)
        sys.exit(NOT_CONFIRMED)
    if not confirmed("Stop PostgreSQL here and latch the node?", yes=yes):
        click.echo("not fenced (answer yes, or give --yes or --force)", err=True)
        sys.exit(NOT_CONFIRMED)


def _follow(path: str, generation: protocol.Generation, wait_s: float) -> None:
    """Wait for the order's outcome, print it and end. Returns only when the fencer fell silent."""
    until = time.monotonic() + wait_s
    heard = time.monotonic()
    while time.monotonic() < until:
        try:
            status = call(path, protocol.StatusRequest(), timeout_s=ANSWER_S)
        except FencerUnavailable as e:
            if time.monotonic() - heard > ANSWER_S:
                say(f"the fencer fell silent while it fenced ({e})", err=True)
                return
            time.sleep(POLL_S)
            continue
        heard = time.monotonic()
        if isinstance(status, protocol.Status):
            _report(status, generation)
        time.sleep(POLL_S)
    say(f"NOT proven within {wait_s:g} s; the fencer goes on trying", err=True)
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
        say(f"  {rung.name:10} {rung.took_ms:8.1f} ms  gone: {rung.gone}  {rung.detail}")
    if proven or (record.generation == generation and record.state == "done"):
        say(f"fenced, proven, in {record.took_ms:.0f} ms; latched until `harmonyctl unfence`")
        sys.exit(0)
    say(f"NOT proven: {record.op} {record.generation} {record.state} {record.detail}", err=True)
    sys.exit(1)


def _one_shot(folder: Path, reason: str) -> None:
    """The emergency fence, when no fencer does it. It is waited for, never killed."""
    config = folder / "fencer.json"
    if config.exists() and not os.access(config, os.R_OK):
        say(f"{denied(PermissionError())} ({config} cannot be read)", err=True)
        sys.exit(1)
    if not os.access(config, os.R_OK):
        say(f"{config} cannot be read either: stop PostgreSQL by hand, and see --run-dir", err=True)
        sys.exit(1)
    say("running the one-shot emergency fence, with the latch", err=True)
    argv = [sys.executable, "-I", "-m", "harmony_fencer", "--config", str(config), "--once", reason]
    argv += ["--latch", who()]
    wait_s = _wait_s(folder)
    try:
        process = subprocess.Popen(argv)
    except OSError as e:
        say(f"NOT fenced: {sys.executable} cannot be started ({e}): stop PostgreSQL by hand", err=True)
        sys.exit(1)
    try:
        code = process.wait(wait_s)
    except subprocess.TimeoutExpired:
        say(f"NOT proven within {wait_s:g} s; it goes on as pid {process.pid}", err=True)
        sys.exit(1)
    word = "proven: PostgreSQL is gone" if code == 0 else f"NOT proven (exit code {code})"
    say(f"one-shot fence {word}", err=code != 0)
    sys.exit(0 if code == 0 else 1)


@click.command()
@click.option("--run-dir", help="The node's run_dir.")
@click.option("--config", "config_file", help="The node's configuration file.")
def unfence(run_dir: str | None, config_file: str | None) -> None:
    """Take the operator's latch away: the node comes back, as what the cluster needs.

    Exit 0: taken away. 1: not, with the reason. 64: usage. 78: the configuration file that was named cannot be used.
    """
    path = str(find_run_dir(run_dir, config_file) / "fencer.sock")
    try:
        reply = call(path, protocol.Unfence(who=who()[:500]), timeout_s=5.0)
    except FencerUnavailable as e:
        say(denied(e) or f"the fencer does not answer ({e})", err=True)
        sys.exit(1)
    if isinstance(reply, protocol.Done):
        say(reply.detail)
        say("Next, the agent brings this node back as what the cluster needs: see `harmonyctl status`.")
        return
    if isinstance(reply, protocol.Refusal):
        say(f"the fencer refused: {reply.error}: {reply.detail}", err=True)
        if reply.error == "not_permitted":
            say(NOT_PERMITTED, err=True)
    else:
        say(f"the fencer answered something else: {reply}", err=True)
    sys.exit(1)
