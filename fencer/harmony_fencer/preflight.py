"""What is asked before a rejoin stops or changes anything: of the primary, by its programs, and of the disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from harmony_fencer import durable, own, reasons, settings
from harmony_fencer.config import FencerConfig
from harmony_fencer.durable import read_small
from harmony_fencer.log import log
from harmony_fencer.mounts import is_mount
from harmony_fencer.programs import PostgresError, Programs

PREFLIGHT_S = 30.0
CONTROL_S = 5.0


class Base(Protocol):
    """What is needed of the engine."""

    programs: Programs

    def pids(self) -> list[int]: ...


def rewind_arguments(c: FencerConfig, where: Path, primary: str) -> tuple[str, ...]:
    conninfo = settings.conninfo(c, primary) + " dbname='postgres'"
    return ("-D", str(where), "--source-server", conninfo, "--no-ensure-shutdown", "--progress")


def immovable(data: Path) -> str:
    """Why the names that a rejoin exchanges cannot be exchanged; "": they can."""
    if not is_mount(data):
        return ""
    return (
        f"{data} is a mount point and cannot be moved: put the data directory one level below it "
        "(PostgreSQL's documentation advises the same), or rejoin by hand with pg_rewind"
    )


async def cannot_rewind(c: FencerConfig, base: Base, where: Path, primary: str) -> str:
    """Why pg_rewind cannot be tried, as its dry run says; it asks the source first, and the target last. "": it can.

    Raises PostgresError where the source was not reached, is another cluster's, or a copy would help no more.
    """
    more = await restoring(c, base.programs, Path(c.data_dir), where)
    arguments = (*rewind_arguments(c, where, primary), *more, "--dry-run")
    try:
        await base.programs.run("pg_rewind", *arguments, timeout_s=PREFLIGHT_S)
    except PostgresError as e:
        said = e.said
        if reasons.NOT_STOPPED in said:
            return ""
        if reasons.FOREIGN in said:
            raise PostgresError(
                f"{primary} answers for another cluster (other system identifier): not touched; {said[-200:]}"
            ) from e
        if "permission denied for function" in said:
            return f'{said[-200:]} (GRANT EXECUTE to "{c.replication_user}" as pg_rewind(1) says)'
        if not said and not base.pids():
            return ""  # it has looked at more and more WAL: the real one has all the time that it wants
        if reasons.CONNECTED not in e.text or reasons.hopeless(said):
            why = reasons.with_advice(said[-300:] or str(e))
            raise PostgresError(f"the primary {primary} cannot be used as a source: {why}"[:480]) from e
        if any(own.is_own(name) for name in reasons.OTHER_KIND.findall(said)):
            return ""  # a symlink of the node's own, which is made plain before
        return f"pg_rewind would fail: {said[-300:]}"
    return ""


async def can_be_written(c: FencerConfig, where: Path) -> None:
    """pg_rewind would die half way at what it must write and cannot. Raises PostgresError."""
    uid = c.postgres_ids.uid if c.postgres_ids is not None else os.geteuid()
    foreign = await durable.in_thread(lambda: own.not_writable(where, uid))
    if foreign:
        raise PostgresError(
            f"{foreign} does not belong to PostgreSQL's user (uid {uid}), and pg_rewind could not write it: chown it; "
            "nothing was touched"
        )


async def restoring(c: FencerConfig, programs: Programs, data: Path, aside: Path) -> tuple[str, ...]:
    """Where the user has a restore_command, pg_rewind may fetch from the archive what pg_wal lost."""
    version = read_small(data / "PG_VERSION", 16).decode().strip()
    config = Path(c.config_file)
    inside = config.parent == data
    if not inside and int(version.split(".")[0]) < 15:
        return ()  # pg_rewind cannot be told where it is
    try:
        said = await programs.run(
            "postgres", "-D", str(aside), "-c", f"config_file={config}", "-C", "restore_command",
            timeout_s=CONTROL_S,
        )  # fmt: skip
    except PostgresError as e:
        log.warning("restore_command cannot be read; rewinding without an archive", why=str(e))
        return ()
    if not said.strip():
        return ()
    return ("--restore-target-wal",) if inside else ("--restore-target-wal", "--config-file", str(config))


async def tablespaces(c: FencerConfig, programs: Programs, primary: str) -> list[str]:
    """Where the primary's tablespaces are, and a copy would put them here, too; [] where psql cannot tell."""
    conninfo = settings.conninfo(c, primary) + " dbname='postgres'"
    question = "SELECT pg_catalog.pg_tablespace_location(oid) FROM pg_catalog.pg_tablespace"
    try:
        said = await programs.run("psql", "-XAtwqc", question, conninfo, timeout_s=PREFLIGHT_S)
    except PostgresError as e:
        log.warning(
            "the primary's tablespaces are not known: what a copy leaves there is not removed", why=str(e)
        )
        return []
    return [line for line in said.splitlines() if line.startswith("/")]
