"""A data directory from nothing: by initdb, or by the operator's own command (docs/bootstrap.md).

It is filled beside, as data_dir.harmony-new, and rejoin.py puts it in place when it is whole: what was interrupted is
never taken for a cluster. Only what is missing or empty counts as nothing; whatever else stands there is not touched.
No SQL connection: roles come in through PostgreSQL's single-user mode, before anybody can connect.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from harmony_fencer.config import FencerConfig
from harmony_fencer.files import Change, Files
from harmony_fencer.programs import PostgresError, Programs


def is_empty(data: Path) -> bool:
    """Whether nothing stands at `data`: missing, or an empty directory. Never raises; False: it cannot be told."""
    try:
        with os.scandir(data) as entries:
            return next(entries, None) is None
    except FileNotFoundError:
        return True
    except OSError:
        return False


def may_make(c: FencerConfig) -> str:
    """By which method something may be made where nothing is; "": it may not, or something is there."""
    return c.bootstrap.method if c.bootstrap.method != "none" and is_empty(Path(c.data_dir)) else ""


def check(data: Path) -> None:
    """Raises PostgresError for what is neither nothing nor a data directory."""
    if not is_empty(data) and not (data / "PG_VERSION").exists():
        raise PostgresError(
            f"{data} is not empty, and no data directory of PostgreSQL: it is not touched; move it away, or correct "
            "postgresql.data_dir"
        )


async def initdb(
    c: FencerConfig, programs: Programs, files: Files, place: Path, fds: tuple[int, ...]
) -> None:
    """A new cluster in the empty `place`, with the configured roles and pg_hba.conf. Raises PostgresError, OSError."""
    b = c.bootstrap
    await programs.run("initdb", "-D", str(place), *b.initdb_options, timeout_s=b.timeout_s, fds=fds)
    if b.hba:

        def write(change: Change) -> None:
            change.write(place / "pg_hba.conf", ("\n".join(b.hba) + "\n").encode())

        await files.change(write)
    if b.sql:
        said = await programs.run(
            "postgres", "--single", "-j", "-D", str(place), "postgres", timeout_s=b.timeout_s, fds=fds,
            feed=f"{b.sql}\n\n".encode(),
        )  # fmt: skip
        wrong = [line for line in said.splitlines() if "ERROR:" in line or "FATAL:" in line]
        if wrong:
            raise PostgresError(f"bootstrap.sql_file: {wrong[0]}"[:400])


async def command(
    c: FencerConfig, programs: Programs, place: Path, primary: str | None, system_identifier: str,
    fds: tuple[int, ...], watch: Callable[[str], None],
) -> None:  # fmt: skip
    """The operator's own, as PostgreSQL's user. It fills `place`, and exits 0. Raises PostgresError, OSError."""
    about = {
        "HARMONY_ROLE": "standby" if primary is not None else "founder",
        "HARMONY_NODE": c.node,
        "HARMONY_DATA_DIR": str(place),
        "HARMONY_SYSTEM_IDENTIFIER": system_identifier,
        "HARMONY_PRIMARY": primary or "",
        "HARMONY_PRIMARY_HOST": c.members[primary].host if primary is not None else "",
        "HARMONY_PRIMARY_PORT": str(c.members[primary].port) if primary is not None else "",
        "HARMONY_REPLICATION_USER": c.replication_user,
    }
    argv = [f"{key}={value}" for key, value in about.items()]
    await programs.tool(
        "env", *argv, c.bootstrap.command, timeout_s=c.bootstrap.timeout_s, fds=fds, watch=watch
    )
    if not (place / "global" / "pg_control").exists():
        raise PostgresError(
            f"{c.bootstrap.command} ended well, and {place} is no data directory of PostgreSQL"
        )
    with contextlib.suppress(FileNotFoundError):  # it would end recovery; standby.signal takes its place
        (place / "recovery.signal").unlink()
