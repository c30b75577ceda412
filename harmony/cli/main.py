"""harmonyctl: the command line. Every command's work is in a module of its own; here are names and options."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
import msgspec

from harmony.cli.fence import fence, unfence
from harmony.cli.status import status
from harmony.config import load, resolve
from harmony.config_text import example
from harmony.core.timing import Timing
from harmony.demo.command import demo
from harmony.errors import EXIT_CONFIG, ConfigError

DEFAULT_CONFIG = "/etc/harmony/harmony.toml"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
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
        f"{t.fence_timeout_s:g} + safety_margin_s {t.safety_margin_s:g}"
    )


@config.command("check")
@click.argument("file", default=lambda: os.environ.get("HARMONY_CONFIG", DEFAULT_CONFIG))
def config_check(file: str) -> None:
    """Check FILE and the environment; every problem at once. Exit 0 or 78."""
    try:
        loaded = load(file)
    except ConfigError as e:
        _fail(e)
        return
    click.echo(f"{file}: ok, node {loaded.node.name} of cluster {loaded.cluster.id}")
    click.echo(_timing_text(loaded.timing))


@config.command("example")
def config_example() -> None:
    """Print a commented example file."""
    click.echo(example(), nl=False)


@config.command("resolve", hidden=True)
@click.option("--config", "file", default=DEFAULT_CONFIG)
def config_resolve(file: str) -> None:
    """For the supervisor: everything that its children are started with, as JSON."""
    try:
        click.echo(msgspec.json.encode(resolve(load(Path(file)))).decode())
    except ConfigError as e:
        _fail(e)


cli.add_command(status)
cli.add_command(fence)
cli.add_command(unfence)
cli.add_command(demo)


def main() -> None:
    """Entry point of harmonyctl and `python -m harmony`."""
    cli(prog_name="harmonyctl")
