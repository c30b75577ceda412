"""harmonyctl config: check a file, print an example, and (for the supervisor) resolve it on this machine."""

from __future__ import annotations

import sys

import click
import msgspec

from harmony.cli.where import config_file
from harmony.config import Config, load
from harmony.core.timing import Timing
from harmony.errors import EXIT_CONFIG, ConfigError


@click.group()
def config() -> None:
    """Check a configuration, or print an example."""


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
@click.argument("file", default=lambda: config_file(None))
@click.option("--host", is_flag=True, help="Check this host too: users, programs, data directory.")
def config_check(file: str, host: bool) -> None:
    """Check FILE and the environment; every problem at once.

    Exit 0: it can be used, perhaps with warnings. 78: it cannot. 64: usage.
    """
    warnings: list[str] = []
    try:
        loaded = load(file, warnings=warnings)
        if host:
            _resolve(loaded, file)
            warnings += _on_this_host(loaded)
    except ConfigError as e:
        _fail(e)
        return
    click.echo(f"{file}: ok, node {loaded.node.name} of cluster {loaded.cluster.id}")
    click.echo(_timing_text(loaded.timing))
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)


@config.command("example")
def config_example() -> None:
    """Print a commented example file."""
    from harmony.config_text import example  # noqa: PLC0415 (the supervisor's start, which resolves, needs no texts)

    click.echo(example(), nl=False)


def _resolve(loaded: Config, file: str) -> dict[str, dict[str, object]]:
    from harmony.resolve import resolve  # noqa: PLC0415 (only a check of this host needs it)

    try:
        return resolve(loaded)
    except ConfigError as e:
        raise ConfigError([f"{file}: {p}" for p in e.problems]) from e


def _on_this_host(loaded: Config) -> list[str]:
    from harmony.resolve import warnings  # noqa: PLC0415 (as above)

    return warnings(loaded)


@config.command("resolve", hidden=True)
@click.option("--config", "file", default=lambda: config_file(None))
def config_resolve(file: str) -> None:
    """For the supervisor: everything that its children are started with, as JSON."""
    warnings: list[str] = []
    try:
        loaded = load(file, warnings=warnings)
        click.echo(msgspec.json.encode(_resolve(loaded, file)).decode())
        warnings += _on_this_host(loaded)
    except ConfigError as e:
        _fail(e)
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
