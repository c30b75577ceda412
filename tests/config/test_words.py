"""config check says what is allowed in words of its own, and is kept from its work by nobody (B20)."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

from harmony.cli.main import cli
from harmony.config import load
from tests.config.test_config import GOOD, problems, write

# Of msgspec 0.19 to 0.23: none may be repeated to the user.
LIBRARY = ("Expected `", "Invalid enum", "Object ", "got `", "matching regex", "length >=", "length <=")


@pytest.mark.parametrize(
    ("section", "line", "said"),
    [
        ("replication", "mode = 'sync'", "'sync' is not allowed; must be one of off, on, quorum, strict"),
        ("store", "replicas = 2", "2 is not allowed; must be one of 1, 3, 5"),
        ("store", "urls = 'nats://h:1'", "must be a list of 1 to 16 of: nats://HOST:PORT"),
        ("store", "credentials_file = 7", "7 is not allowed; must be an absolute path"),
        (
            "timing",
            "fence_timeout_s = '3'",
            "'3' is not allowed; must be a number of seconds, above 0, to 3600",
        ),
        ("timing", "failure_threshold = 1.5", "1.5 is not allowed; must be a whole number, 1 to 100"),
        (
            "replication",
            "maximum_lag_bytes = -1",
            "-1 is not allowed; must be a whole number of bytes, at least 0",
        ),
        ("replication", "slots = 1", "1 is not allowed; must be true or false"),
        ("sickness", "disk_free_mb = 'x'", "must be a whole number of megabytes, 0 to 1000000000"),
        ("agent", "user = ''", "must be a user, role or database name"),
    ],
)
def test_types_and_ranges_in_words(tmp_path: Path, section: str, line: str, said: str) -> None:
    text = "\n".join(problems(write(tmp_path, GOOD + f"[{section}]\n{line}\n")))
    assert said in text
    assert not [word for word in LIBRARY if word in text], text


def test_no_library_words_any_kind_of_any_key(tmp_path: Path) -> None:
    """Each key with a value of a kind that it is not."""
    from harmony.config_text import parameters

    for p in parameters():
        for value in ("[[1]]", "{ x = 1 }", "1979-05-27"):
            head = GOOD.replace(f"[{p.section}]\n", f"[{p.section}]\n{p.key} = {value}\n")
            text = head if head != GOOD else GOOD + f"[{p.section}]\n{p.key} = {value}\n"
            if head != GOOD and f"\n{p.key} = " in GOOD:
                continue
            if p.key == "permanent_slots" and value.startswith("{"):
                continue
            found = "\n".join(problems(write(tmp_path, text)))
            assert f"{p.section}.{p.key}" in found
            assert not [word for word in LIBRARY if word in found], found


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ("[[members]]\nname = 'n1'\nhost = 'h'\n", "members: must be tables with names, and no [[members]]"),
        ("members = 'n1,n2'\n", "members: must be tables with names"),
        ("", "members: missing; name each node, such as [members.n1] with host and port"),
        (
            "[members]\nn1 = '10.0.0.1'\n",
            "members.n1: must be a table, and only one; begin it with [members.n1]",
        ),
        (
            "[[members.n1]]\nhost = 'h'\n",
            "members.n1: must be a table, and only one; begin it with [members.n1]",
        ),
    ],
)
def test_members_written_otherwise(tmp_path: Path, members: str, said: str) -> None:
    begin, end = GOOD.index("[members.n1]"), GOOD.index("[postgresql]")
    text = "\n".join(problems(write(tmp_path, members + GOOD[:begin] + GOOD[end:])))
    assert said in text


@pytest.mark.parametrize("name", ["HARMONY_HOME", "HARMONY_X", "HARMONY_", "HARMONY_NODE", "HARMONYCTL"])
def test_a_foreign_variable_is_nobodys_problem(tmp_path: Path, name: str) -> None:
    """B20: HARMONY_HOME=/x made every command 78."""
    told: list[str] = []
    load(write(tmp_path, GOOD), {name: "/x"}, told)
    assert told == []


@pytest.mark.parametrize(
    ("name", "meant"), [("HARMONY_NOD_NAME", "HARMONY_NODE_NAME"), ("HARMONY_MEMBER", "HARMONY_MEMBERS")]
)
def test_a_near_miss_is_a_warning(tmp_path: Path, name: str, meant: str) -> None:
    file = write(tmp_path, GOOD)
    told: list[str] = []
    assert load(file, {name: "n1"}, told).node.name == "n2"
    assert told == [f"environment: {name}: unknown, and ignored; did you mean {meant}?"]
    result = CliRunner().invoke(cli, ["config", "check", str(file)], env={name: "n1"})
    assert (result.exit_code, result.stderr) == (0, f"warning: {told[0]}\n")


def test_a_variable_of_a_section_must_be_a_key(tmp_path: Path) -> None:
    found = problems(write(tmp_path, GOOD), {"HARMONY_TIMING_PRESETT": "fast", "HARMONY_STORE_URLS": "x"})
    assert "did you mean HARMONY_TIMING_PRESET?" in found[-1]
    assert "HARMONY_STORE_URLS: the value is not allowed" in found[0]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    file = tmp_path / "harmony.toml"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load(file, {}).node.name == "n2"


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_file_is_named_at_once(tmp_path: Path, kind: str) -> None:
    """B20: a FIFO hung; it must not even be waited for."""
    file = tmp_path / "harmony.toml"
    match kind:
        case "fifo":
            os.mkfifo(file)
            assert stat.S_ISFIFO(file.stat().st_mode)
        case _:
            file = Path(os.devnull)
    assert problems(file) == [f"{file}: no regular file: no configuration of Harmony"]
