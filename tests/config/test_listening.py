"""Where PostgreSQL listens is the user's matter; what is overridden, or reaches nobody, is said (F13)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from harmony.cli.main import cli
from harmony.config import load
from harmony.listening import users_own, warnings
from harmony.resolve import resolve
from harmony.resolve import warnings as on_this_host
from tests.config.test_config import GOOD

NOWHERE = "/tmp/nowhere"  # noqa: S108 (it is never there)


def conf(tmp_path: Path, text: str, auto: str = "") -> Path:
    (tmp_path / "postgresql.conf").write_text(text)
    (tmp_path / "postgresql.auto.conf").write_text(auto)
    return tmp_path / "postgresql.conf"


def own(tmp_path: Path, text: str, auto: str = "") -> str:
    return users_own(str(conf(tmp_path, text, auto)), str(tmp_path))


def test_the_users_own_value(tmp_path: Path) -> None:
    assert own(tmp_path, "") == "localhost"
    assert own(tmp_path, "#listen_addresses = '*'\n") == "localhost"
    assert (
        own(tmp_path, "listen_addresses = '*'  # all\nListen_Addresses '10.0.0.1, ::1'\n") == "10.0.0.1, ::1"
    )
    assert own(tmp_path, "listen_addresses = '*'\n", "listen_addresses = ''\n") == ""
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "x.conf").write_text("listen_addresses = '10.0.0.7'\ninclude 'gone.conf'\n")
    assert own(tmp_path, "listen_addresses = '*'\ninclude_dir 'conf.d'\n") == "10.0.0.7"
    (tmp_path / "harmony.postgresql.conf").write_text("listen_addresses = 'ours'\n")
    assert own(tmp_path, "include_if_exists 'harmony.postgresql.conf'\n") == "localhost"
    assert own(tmp_path, "include 'postgresql.conf'\n") == "localhost", "one that includes itself"
    assert users_own(str(tmp_path / "none"), str(tmp_path / "none")) == "localhost"


@pytest.mark.parametrize(
    ("users", "ours", "said"),
    [
        ("127.0.0.1", None, ["the other members reach it as 10.0.0.2"]),
        ("", None, ["the other members reach it as 10.0.0.2"]),
        ("10.0.0.2", None, []),
        ("*", None, []),
        ("127.0.0.1", "*", ["'*' overrides '127.0.0.1'"]),
        ("*", "*", []),
        ("*", "localhost", ["'localhost' overrides '*'", "the other members reach it as 10.0.0.2"]),
    ],
)
def test_what_is_said(tmp_path: Path, users: str, ours: str | None, said: list[str]) -> None:
    file = conf(tmp_path, f"listen_addresses = '{users}'\n")
    toml = tmp_path / "harmony.toml"
    more = f'listen_addresses = "{ours}"\n' if ours is not None else ""
    toml.write_text(GOOD.replace("[postgresql]\n", f"[postgresql]\n{more}"))
    found = warnings(load(toml, {}), str(file))
    assert len(found) == len(said), found
    for one, word in zip(found, said, strict=True):
        assert word in one


def test_it_is_said_by_the_check_and_at_the_start(tmp_path: Path) -> None:
    """F13, B23: on standard error; the start's goes into the journal."""
    bins = tmp_path / "bin"
    bins.mkdir()
    for name in ("postgres", "pg_ctl", "pg_controldata"):
        (bins / name).touch()
    data = tmp_path / "data"
    data.mkdir()
    conf(data, "listen_addresses = '127.0.0.1'\n")
    user = 'user = "nobody"\n' if os.geteuid() == 0 else ""
    if os.geteuid() == 0:
        os.chown(data, 65534, 65534)
    lines = f'listen_addresses = "*"\nbin_dir = "{bins}"\n{user}'
    text = GOOD.replace("[postgresql]\n", f"[postgresql]\n{lines}").replace(NOWHERE, str(data))
    file = tmp_path / "harmony.toml"
    file.write_text(text)
    loaded = load(file, {})
    assert resolve(loaded)["fencer"]["listen_addresses"] == "*"
    wanted = [f"warning: {one}" for one in on_this_host(loaded)]
    assert ("agent.user" in "".join(wanted)) is (os.geteuid() == 0)
    assert "overrides '127.0.0.1'" in "".join(wanted)
    for arguments in (["config", "check", "--host", str(file)], ["config", "resolve", "--config", str(file)]):
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output
        assert result.stderr.splitlines() == wanted
    plain = CliRunner().invoke(cli, ["config", "check", str(file)])
    assert plain.stderr == ""
