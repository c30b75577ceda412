"""harmonyctl: the command line. Each command has a module of its own, loaded when that command is asked for.

Names and short helps stand here: what one command needs must never delay another, or keep anyone from `fence --force`.
The exit codes that all commands share are made here; each command's own stand in its help.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple, NoReturn

import click

from harmony.cli.terminal import deafen

EXIT_PIPE = 128 + 13  # as a shell shows who died of SIGPIPE
EXIT_INTERRUPTED = 130


class Lazy(NamedTuple):
    """Where a command is, and its short help."""

    module: str
    name: str
    help: str


COMMANDS = {
    "acknowledge": Lazy(
        "harmony.cli.acknowledge",
        "acknowledge",
        "Let automatic failover go on: the changes of leadership were looked into.",
    ),
    "adopt": Lazy(
        "harmony.cli.adopt", "adopt", "Lead the PostgreSQL primary that runs here, without a restart."
    ),
    "config": Lazy("harmony.cli.configuration", "config", "Check a configuration, or print an example."),
    "demo": Lazy("harmony.demo.command", "demo", "Three nodes on this machine, one fault, and what it cost."),
    "fence": Lazy("harmony.cli.fence", "fence", "Stop PostgreSQL on this node, prove it gone, keep it so."),
    "status": Lazy("harmony.cli.status", "status", "All nodes, and one number for scripts."),
    "store": Lazy(
        "harmony.cli.store", "store", "Show what this node knows of its store; accept one it distrusts."
    ),
    "switchover": Lazy(
        "harmony.cli.switchover", "switchover", "Hand leadership over, planned: nothing is lost."
    ),
    "unfence": Lazy("harmony.cli.fence", "unfence", "Take the operator's latch away: the node comes back."),
}


class _Unread(Exception):
    """Nobody reads our output. Not click's to catch: it would end with 1."""


@contextlib.contextmanager
def _unread() -> Iterator[None]:
    try:
        yield
    except Exception as e:
        if _only_a_pipe(e):
            raise _Unread from e
        raise


class Commands(click.Group):
    """Loads a command when it is asked for, and ends with one meaning for each exit code."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        lazy = COMMANDS.get(cmd_name)
        if lazy is None:
            return None
        try:
            command: click.Command = getattr(importlib.import_module(lazy.module), lazy.name)
        except ImportError as e:
            why = str(e)
            return click.Command(
                cmd_name, help=f"Not available: {why}", callback=lambda: _missing(cmd_name, why)
            )
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Of the table above: a list of commands loads none."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name].help) for name in self.list_commands(ctx)])

    @_unread()
    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: object
    ) -> click.Context:
        """Here --help is printed."""
        return super().make_context(info_name, args, parent, **extra)

    @_unread()
    def invoke(self, ctx: click.Context) -> object:
        """Here the commands run."""
        return super().invoke(ctx)

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **_: object) -> NoReturn:  # type: ignore[override]
        """Never returns: ends with the command's exit code, or with one of those that all share."""
        try:
            code = super().main(args, prog_name, standalone_mode=False)
            _flush()
        except click.UsageError as e:
            e.show()
            code = os.EX_USAGE
        except click.ClickException as e:
            e.show()
            code = os.EX_SOFTWARE
        except Exception as e:  # noqa: BLE001 (1 and 2 say something of the cluster: never by a fault of ours)
            code = _unexpected(e)
        except (KeyboardInterrupt, click.exceptions.Abort, BaseExceptionGroup):
            click.echo("interrupted", err=True)
            code = EXIT_INTERRUPTED
        sys.exit(code if isinstance(code, int) else 0)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _only_a_pipe(e: BaseException) -> bool:
    """Whether nothing happened but that nobody reads our output any more, also inside of groups."""
    if isinstance(e, BaseExceptionGroup):
        return all(_only_a_pipe(one) for one in e.exceptions)
    return isinstance(e, BrokenPipeError | _Unread)


def _unexpected(e: Exception) -> int:
    if _only_a_pipe(e):
        deafen(1)
        deafen(2)
        return EXIT_PIPE
    if isinstance(e, click.exceptions.Abort):
        click.echo("interrupted", err=True)
        return EXIT_INTERRUPTED
    import traceback  # noqa: PLC0415 (a tenth of the start, and only for faults)

    traceback.print_exception(e)
    return os.EX_SOFTWARE


def _missing(name: str, why: str) -> None:
    click.echo(f"{name} cannot be loaded: {why}", err=True)
    sys.exit(os.EX_UNAVAILABLE)


@click.group("harmonyctl", cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="harmony-ha")
def cli() -> None:
    """High availability for PostgreSQL.

    Exit codes of all commands: 0 done; 64 wrong usage; 69 a part is not installed; 70 a fault of harmonyctl;
    78 configuration; 130 interrupted; 141 nobody read the output. All others stand in each command's help.
    """


def main() -> None:
    """Entry point of harmonyctl and `python -m harmony`."""
    cli(prog_name="harmonyctl")
