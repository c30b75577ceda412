"""What all commands share: exit codes, what stands on standard output, and what is loaded for which command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from harmony.cli.main import COMMANDS, Commands, cli
from harmony.cli.terminal import confirmed, typed

HEAVY = (
    "psycopg",
    "nats",
    "trio",
    "trio_asyncio",
    "rich",
    "structlog",
    "harmony.store.nats",
    "harmony.config_text",
)
RUN = (
    "import sys\n"
    "from harmony.cli.main import cli\n"
    "try:\n    cli(sys.argv[1:])\n"
    "finally:\n    print('LOADED', *sys.modules)\n"
)


def loaded(tmp_path: Path, *arguments: str) -> set[str]:
    """The modules after harmonyctl has run with these arguments."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HARMONY_")}
    argv = [sys.executable, "-c", RUN, *arguments]
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, timeout=60, env=env, cwd=tmp_path
    )
    line = next(one for one in done.stdout.splitlines() if one.startswith("LOADED "))
    return set(line.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("fence", "--help"),
        ("unfence", "--help"),
        ("fence", "--force", "--run-dir", "."),
        ("unfence", "--run-dir", "."),
        ("config", "check", "nowhere.toml"),
    ],
)
def test_a_command_loads_what_it_needs(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """It is what stands between an operator and the end of writes: no database, store or event loop."""
    assert not loaded(tmp_path, *arguments) & set(HEAVY)


def test_status_loads_neither_store_nor_database(tmp_path: Path) -> None:
    assert not loaded(tmp_path, "status", "--run-dir", ".") & {
        "psycopg",
        "nats",
        "trio",
        "trio_asyncio",
        "structlog",
    }


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"status"}))
def test_the_short_helps_are_the_commands_own(name: str) -> None:
    """What the list says without loading a command is the beginning of what the command says itself."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert (command.name, " ".join((command.help or "").split())[: len(COMMANDS[name].help) - 1]) == (
        name,
        COMMANDS[name].help.rstrip("."),
    )
    listed = CliRunner().invoke(cli, ["--help"]).output
    assert f"  {name} " in listed


def leaves(group: click.Group, path: str = "") -> list[tuple[str, click.Command]]:
    found = []
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        found += (
            leaves(command, f"{path}{name} ")
            if isinstance(command, click.Group)
            else [(f"{path}{name}", command)]
        )
    return found


@pytest.mark.parametrize(
    "path", [p for p, c in leaves(cli) if not c.hidden and p not in {"status", "config example"}]
)
def test_each_command_documents_its_exit_codes(path: str) -> None:
    """B12: for scripts; 2 and 1 mean something of the cluster, wrong usage never does."""
    helped = CliRunner().invoke(cli, [*path.split(), "--help"])
    assert "Exit 0" in helped.output.replace("Exit code 0", "Exit 0"), helped.output
    wrong = CliRunner().invoke(cli, [*path.split(), "--no-such-option"])
    assert wrong.exit_code == 64, wrong.output
    assert "No such option" in wrong.output


@pytest.mark.parametrize("arguments", [["stauts"], ["status", "--jsn"], ["config", "chek"], ["--what"]])
def test_wrong_usage_is_no_answer_of_the_cluster(arguments: list[str]) -> None:
    """B12: `status --jsn` was 2, which means that there is no primary."""
    assert CliRunner().invoke(cli, arguments).exit_code == 64


def test_the_shared_exit_codes_are_documented() -> None:
    text = " ".join(CliRunner().invoke(cli, ["--help"]).output.split())
    for code in (
        "0 done",
        "64 wrong usage",
        "70 a fault",
        "78 configuration",
        "130 interrupted",
        "141 nobody",
    ):
        assert code in text


def ending(error: BaseException) -> int:
    @click.command(cls=click.Command)
    def command() -> None:
        raise error

    class One(Commands):
        def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
            return command

    return CliRunner().invoke(One("one"), ["command"]).exit_code


def test_a_fault_of_ours_is_not_degraded() -> None:
    """B12: 1 would mean degraded."""
    assert ending(ValueError("a bug")) == 70
    assert ending(ExceptionGroup("g", [ValueError("a bug"), BrokenPipeError()])) == 70
    assert ending(OSError(5, "EIO")) == 70


def test_an_interruption_and_a_closed_pipe_have_their_own() -> None:
    assert ending(KeyboardInterrupt()) == 130
    assert ending(click.exceptions.Abort()) == 130
    assert ending(BaseExceptionGroup("trio's", [KeyboardInterrupt()])) == 130
    assert ending(ExceptionGroup("g", [ExceptionGroup("h", [BrokenPipeError(32, "EPIPE")])])) == 141


@pytest.mark.parametrize("command", ["--help", "config example", "config check harmony.toml"])
def test_nobody_reads_and_there_is_no_traceback(tmp_path: Path, command: str) -> None:
    """B13: a closed pipe ends a command quietly, wherever it is noticed."""
    from tests.config.test_config import GOOD

    (tmp_path / "harmony.toml").write_text(GOOD)
    read, write = os.pipe()
    os.close(read)
    argv = [sys.executable, "-m", "harmony", *command.split()]
    done = subprocess.run(
        argv, stdout=write, stderr=subprocess.PIPE, text=True, check=False, timeout=60, cwd=tmp_path
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_without_a_terminal_only_an_option_says_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(os.devnull).open() as nowhere:
        monkeypatch.setattr(sys, "stdin", nowhere)
        assert not confirmed("?", yes=False)
        assert confirmed("?", yes=True)
        assert typed("?") == ""
