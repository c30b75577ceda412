"""harmonyctl: the command line. Each command has a module of its own; here are names and options."""

from __future__ import annotations

import os
import sys

import click
import msgspec

from harmony.cli.adopt import adopt
from harmony.cli.control import DEFAULT_CONFIG, acknowledge
from harmony.cli.fence import fence, unfence
from harmony.cli.status import status
from harmony.cli.store import store
from harmony.cli.switchover import switchover
from harmony.config import Config, load
from harmony.config_text import example
from harmony.core.timing import Timing
from harmony.errors import EXIT_CONFIG, ConfigError
from harmony.resolve import remarks, resolve


class _Commands(click.Group):
    """`demo` is imported when asked for: what it needs must never keep anyone from `fence --force`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), "demo"])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name != "demo":
            return super().get_command(ctx, cmd_name)
        try:
            from harmony.demo.command import demo  # noqa: PLC0415 (see above)
        except ImportError as e:
            why = str(e)
            return click.Command("demo", help=f"Not available: {why}", callback=lambda: _no_demo(why))
        return demo


def _no_demo(why: str) -> None:
    raise click.ClickException(f"the demo cannot be loaded: {why}")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="harmony-ha")
def cli() -> None:
    """High availability for PostgreSQL."""


@cli.group()
def config() -> None:
    """Check, show and resolve the configuration."""


def _fail(e: ConfigError) -> None:
    count = len(e.problems)
    click.echo(f"{count} problem{'s' if count != 1 else ''} in the configuration:", err=True)
    for problem in e.problems:
        click.echo(f"  {problem}", err=True)
    sys.exit(EXIT_CONFIG)


def _timing_text(t: Timing) -> str:
    return (
        f"lease {t.lease_s:g} s = heartbeat_interval_s {t.heartbeat_interval_s:g} + heartbeat_timeout_s "
        f"{t.heartbeat_timeout_s:g} × failure_threshold {t.failure_threshold}\n"
        f"failover_timeout_s {t.failover_timeout_s:g} > lease {t.lease_s:g} + fence_timeout_s "
        f"{t.fence_timeout_s:g} + safety_margin_s {t.safety_margin_s:g} = "
        f"{t.lease_s + t.fence_timeout_s + t.safety_margin_s:g} s"
    )


@config.command("check")
@click.argument("file", default=lambda: os.environ.get("HARMONY_CONFIG", DEFAULT_CONFIG))
@click.option("--host", is_flag=True, help="Check this host too: users, programs, data directory.")
def config_check(file: str, host: bool) -> None:
    """Check FILE and the environment; every problem at once. Exit 0 or 78."""
    try:
        loaded = load(file)
        if host:
            _resolve(loaded, file)
    except ConfigError as e:
        _fail(e)
        return
    for remark in remarks(loaded) if host else ():
        click.echo(f"  note: {remark}", err=True)
    click.echo(f"{file}: ok, node {loaded.node.name} of cluster {loaded.cluster.id}")
    click.echo(_timing_text(loaded.timing))


@config.command("example")
def config_example() -> None:
    """Print a commented example file."""
    click.echo(example(), nl=False)


def _resolve(loaded: Config, file: str) -> dict[str, dict[str, object]]:
    try:
        return resolve(loaded)
    except ConfigError as e:
        raise ConfigError([f"{file}: {p}" for p in e.problems]) from e


@config.command("resolve", hidden=True)
@click.option("--config", "file", default=lambda: os.environ.get("HARMONY_CONFIG", DEFAULT_CONFIG))
def config_resolve(file: str) -> None:
    """For the supervisor: everything that its children are started with, as JSON."""
    try:
        click.echo(msgspec.json.encode(_resolve(load(file), file)).decode())
    except ConfigError as e:
        _fail(e)


cli.add_command(status)
cli.add_command(fence)
cli.add_command(unfence)
cli.add_command(store)
cli.add_command(acknowledge)
cli.add_command(adopt)
cli.add_command(switchover)


def main() -> None:
    """Entry point of harmonyctl and `python -m harmony`."""
    cli(prog_name="harmonyctl")
