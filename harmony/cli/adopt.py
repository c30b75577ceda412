"""harmonyctl adopt: have Harmony take over a primary that runs already, without a restart (docs/adoption.md).

It looks at everything first, permits it to this node's fencer, and tells what becomes of it. It starts and stops
nothing, and changes nothing in PostgreSQL: agent and fencer do the rest once Harmony is started.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

import click
import msgspec
import trio

from harmony.adoption import Findings, look_at_members, look_at_store, look_here
from harmony.cli.control import CALL_S, Impossible, connected, with_store
from harmony.cli.terminal import NOT_CONFIRMED, confirmed
from harmony.cli.where import who
from harmony.config import Config
from harmony.core.states import WRITABLE_STATES
from harmony.decoding import Unreadable, decoded
from harmony.errors import ConfigError, StoreUnavailable
from harmony.records import CLUSTER_STATE, MEMBER_PREFIX, decode_cluster, decode_member
from harmony.resolve import resolve
from harmony.store.interface import Entry, Store

FENCER_S = 30.0
LOOK_S = 0.5
RISKS = """What it means:
- Until the store is good and enough standbys are taken over, PostgreSQL runs on as it does now: nobody guards it, and
  nobody takes over from it. Then it is led under a lease, as if Harmony had started it: from that moment on it IS
  STOPPED when this node's agent, fencer or connection to the store fails for longer than the lease.
- Nothing is restarted. Settings that need a restart take effect at the next one.
- Give this permit on one node only, where the one primary runs. It ends with this PostgreSQL's next restart: if you
  restart it before Harmony is started here, run adopt again, or Harmony stops it as a primary without a lease.
- Whatever else promotes or restarts PostgreSQL (another HA tool, a script) must be switched off first."""


class Judgement(msgspec.Struct, frozen=True):
    """The fencer's, of what runs here. `held_by`: the systemd unit that it runs in."""

    problems: tuple[str, ...]
    system_identifier: str
    held_by: str


def ask_fencer(config: Config, *arguments: str) -> Judgement:
    """Run the fencer's program on the configuration as it is now. Raises Impossible."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(msgspec.json.encode(resolve(config)["fencer"]))
        file.flush()
        argv = [sys.executable, "-I", "-m", "harmony_fencer", "--config", file.name, *arguments]
        try:
            done = subprocess.run(argv, capture_output=True, timeout=FENCER_S, check=False)
            nothing = b'{"problems":[],"system_identifier":"","held_by":""}'
            return decoded(msgspec.json.Decoder(Judgement), done.stdout or nothing)
        except (OSError, subprocess.SubprocessError, Unreadable) as e:
            raise Impossible(f"the fencer's program cannot be asked: {e}") from e


async def _findings(config: Config, without: tuple[str, ...], store: Store) -> Findings:
    found = Findings()
    judged = ask_fencer(config, "--check-adoption")
    found.problems += judged.problems
    await trio.to_thread.run_sync(look_here, config, found)
    if found.system_identifier and not judged.problems:
        await trio.to_thread.run_sync(look_at_members, config, without, found)
    unit = judged.held_by
    if unit and config.postgresql.run == "pg_ctl":
        found.remarks.append(
            f'it runs in systemd\'s {unit}: set postgresql.run = "systemd" and unit = "{unit}", or disable that unit '
            "so that nobody but Harmony starts PostgreSQL later"
        )
    members = {n: await _get(store, MEMBER_PREFIX + n) for n in config.members}
    look_at_store(config, await _get(store, CLUSTER_STATE), members, found)
    return found


async def _get(store: Store, key: str) -> Entry | None:
    """None also where no agent has made the bucket yet."""
    if store.facts is not None and not store.facts.lineage:
        return None
    return await store.get(key, timeout_s=CALL_S)


async def _follow(config: Config, store: Store) -> int:
    """Tell what becomes of it, until it is led. Never gives up: the operator may."""
    told, began = "", time.monotonic()
    while True:
        now = await _progress(config, store)
        if now is None:
            click.echo(
                f"adopted after {time.monotonic() - began:.1f} s: {config.node.name} leads under a lease"
            )
            return 0
        if now != told:
            told = now
            click.echo(f"  {now}")
        await trio.sleep(LOOK_S)


async def _progress(config: Config, store: Store) -> str | None:
    me = config.node.name
    try:
        entry, own = await _get(store, CLUSTER_STATE), await _get(store, MEMBER_PREFIX + me)
    except StoreUnavailable as e:
        return f"store: {e}"
    if own is None:
        return "now start Harmony on this host (systemctl start harmony); waiting for it"
    try:
        m, c = decode_member(own.value), decode_cluster(entry.value) if entry is not None else None
    except Unreadable as e:
        raise Impossible(f"a record is not one of this version of Harmony: {e}") from e
    if c is None:
        return f"{me}: {m.status}, {m.why}"
    if c.primary != me:
        raise Impossible(f"the store shows {c.primary or 'nobody'} as the primary: see harmonyctl status")
    return None if c.status in WRITABLE_STATES and not c.adopting else f"{me}: {m.status}, {m.why}"


def permit(config: Config, found: Findings, *, dry_run: bool, yes: bool) -> int | None:
    """Say what was found, ask, have the fencer permit it. None: permitted; else the exit code. Raises Impossible."""
    for remark in found.remarks:
        click.echo(f"  {remark}")
    for problem in found.problems:
        click.echo(f"  AGAINST IT: {problem}", err=True)
    if found.problems:
        click.echo(f"not adopted: {len(found.problems)} against it; PostgreSQL runs on as before", err=True)
        return 1
    click.echo(f"nothing speaks against adopting the primary on {config.node.name}")
    if dry_run:
        return 0
    click.echo(RISKS)
    if not confirmed("Have Harmony take this PostgreSQL over?", yes=yes):
        click.echo("not adopted (answer yes, or give --yes)", err=True)
        return NOT_CONFIRMED
    judged = ask_fencer(config, "--permit-adoption", who())
    if judged.problems:
        raise Impossible("; ".join(judged.problems))
    click.echo("permitted")
    return None


async def _adopt(config: Config, without: tuple[str, ...], dry_run: bool, yes: bool, wait: bool) -> int:
    async with connected(config, new=True) as store:
        found = await _findings(config, without, store)
        code = permit(config, found, dry_run=dry_run, yes=yes)
        if code is not None:
            return code
        return await _follow(config, store) if wait else 0


@click.command()
@click.option("--without", multiple=True, metavar="NODE", help="A member that is away; more than once.")
@click.option("--dry-run", is_flag=True, help="Only look, and say what speaks against it.")
@click.option("--withdraw", is_flag=True, help="Take the permit back. What is led under a lease stays so.")
@click.option(
    "--wait/--no-wait", default=True, help="Tell what becomes of it until it is led (Ctrl-C harms nothing)."
)
@click.option("--yes", is_flag=True, help="Answer the question with yes.")
@click.option("--verbose", is_flag=True, help="Say on standard error what happens to the connection.")
@click.option("--config", "config_file", help="The node's configuration file.")
def adopt(
    without: tuple[str, ...],
    dry_run: bool,
    withdraw: bool,
    wait: bool,
    yes: bool,
    verbose: bool,
    config_file: str | None,
) -> None:
    """Lead the PostgreSQL primary that runs here, without a restart.

    First start Harmony on the standbys' hosts, then run this as root where the primary runs, then start Harmony here.
    Exit 0: done (with --dry-run: possible). 1: not, with the reasons. 2: not confirmed. 64: usage. 78: configuration.
    """

    async def act(config: Config) -> int:
        if os.geteuid() != 0 and config.postgresql.user is not None:
            raise Impossible("only root may permit it here: use sudo")
        try:
            if withdraw:
                ask_fencer(config, "--withdraw-adoption")
                click.echo(
                    "no permit is left: Harmony, started here now, would stop a primary without a lease"
                )
                return 0
            return await _adopt(config, without, dry_run, yes, wait)
        except ConfigError as e:
            raise Impossible("; ".join(e.problems)) from e

    sys.exit(with_store(config_file, act, verbose=verbose))
