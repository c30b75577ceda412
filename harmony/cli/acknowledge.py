"""harmonyctl acknowledge: an operator has looked into the changes of leadership; automatic failover goes on."""

from __future__ import annotations

import sys

import click
import msgspec

from harmony.cli.control import change, connected, with_store
from harmony.cli.terminal import NOT_CONFIRMED, confirmed
from harmony.config import Config
from harmony.records import ClusterState, Control


def edit(control: Control, cluster: ClusterState) -> Control:
    """All changes up to the present term."""
    return msgspec.structs.replace(control, acknowledged=max(control.acknowledged, cluster.term))


async def _acknowledge(config: Config) -> int:
    async with connected(config) as store:
        control = await change(store, edit)
    click.echo(
        f"acknowledged: changes of leadership up to term {control.acknowledged} are not counted any more"
    )
    return 0


@click.command()
@click.option("--yes", is_flag=True, help="Answer the question with yes.")
@click.option("--verbose", is_flag=True, help="Say on standard error what happens to the connection.")
@click.option("--config", "config_file", help="The node's configuration file.")
def acknowledge(yes: bool, verbose: bool, config_file: str | None) -> None:
    """Let automatic failover go on: the changes of leadership were looked into. From any node.

    Exit 0: done. 1: not, with the reason. 2: not confirmed. 64: usage. 78: configuration.
    """

    async def act(config: Config) -> int:
        question = f"Have the changes of leadership of cluster {config.cluster.id} been looked into?"
        if not confirmed(question, yes=yes):
            click.echo("not acknowledged (answer yes, or give --yes)", err=True)
            return NOT_CONFIRMED
        return await _acknowledge(config)

    sys.exit(with_store(config_file, act, verbose=verbose))
