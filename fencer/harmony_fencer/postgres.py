"""The real Engine: the PostgreSQL of one data directory. Never as root, never by SQL. It decides nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import struct
from pathlib import Path

import trio

from harmony_fencer import durable, own, processes, settings, timelines
from harmony_fencer.changes import PAUSE_S, Changes
from harmony_fencer.config import FencerConfig
from harmony_fencer.engine import Outcome
from harmony_fencer.files import Change, Files
from harmony_fencer.ladder import MARK_SHARE, Ladder
from harmony_fencer.log import log
from harmony_fencer.programs import PostgresError, Programs
from harmony_fencer.protocol import SyncRule
from harmony_fencer.rejoin import UNPROVEN, Rejoin
from harmony_fencer.state import WITNESS
from harmony_fencer.timelines import Newest
from harmony_fencer.tree import Tree

CONTROL_S = 5.0
# PostgreSQL 13 to 18: miscadmin.h, LOCK_FILE_LINE_PM_STATUS; pidfile.h; pg_control.h, ControlFileData and DBState.
_STATUS_LINE = 8
_MAY_BE_PRIMARY = {b"ready", b"stopping"}
_VERSION_OFFSET, _STATE_OFFSET, _CHECKPOINT_OFFSET = 8, 16, 32
_VERSIONS = range(1300, 1900)
_SHUT_DOWN, _IN_PRODUCTION = 1, 6
_RECOVERS = {2, 5}  # shut down in recovery, in archive recovery
FOUNDS = ("initdb", "command")


@dataclasses.dataclass(frozen=True, slots=True)
class _Watched:
    """The postmaster that is waited for, and postmaster.pid as it was when it was verified."""

    pid: int
    fd: int
    mark: tuple[int, int] | None
    changes: Changes | None


class Postgres:
    """Implements engine.Engine. Files of a disk that may hang are written in threads that are not waited for."""

    def __init__(self, config: FencerConfig, *, lasting: bool = True) -> None:
        """`lasting`: it may start PostgreSQL, in a cgroup made for it; a one-shot only uses the one that is."""
        self._c = config
        self.data = Path(config.data_dir)
        self.programs = Programs(config)
        ids = config.postgres_ids
        self.files = Files((ids.uid, ids.gid) if ids is not None else None)
        self.tree = Tree(
            config.data_dir,
            unit=config.unit if config.run == "systemd" else "",
            own=config.cgroup and lasting,
            owner=ids.uid if ids is not None else os.geteuid(),
            notes=Path(config.run_dir) / "places.json",
        )
        self.where = self.tree.where
        self._system_identifier: str | None = None
        self.rejoin = Rejoin(config, self)
        self._lock_file = self.data / "postmaster.pid"
        self._signal_file = self.data / "standby.signal"
        self._watched: _Watched | None = None
        self._hurried = False  # it is to lead: nobody waits for reasons

    # ------------------------------------------------------------ looking

    def pids(self) -> list[int]:
        return self.tree.pids()

    def postmaster(self) -> int | None:
        return self.tree.postmaster()

    @property
    def halted(self) -> bool:
        return self.tree.halted

    def initialised(self) -> bool:
        return _exists(self.data / "PG_VERSION", otherwise=True)

    def is_standby(self) -> bool:
        return _exists(self._signal_file, otherwise=False) or (bool(self.rejoin.empty) and not self.pids())

    def could_write(self) -> bool:
        return not self.is_standby() or self._runs_as_primary()

    def _runs_as_primary(self) -> bool:
        # standby.signal may have been written under a running primary: the postmaster's own word is wanted.
        try:
            lines = durable.read_small(self._lock_file, 4096).split(b"\n")
            if len(lines) < _STATUS_LINE or lines[_STATUS_LINE - 1].strip() not in _MAY_BE_PRIMARY:
                return False
            if self.postmaster() is None:
                return False
        except FileNotFoundError:
            return False
        except OSError:
            return True
        try:  # "ready" outlives a crash of the backends, after which it may come back as a standby
            head = durable.read_small(self.data / "global" / "pg_control", 64)
            return bool(struct.unpack_from("=i", head, _STATE_OFFSET)[0] == _IN_PRODUCTION)
        except (OSError, struct.error):
            return True

    @property
    def was_standby(self) -> bool:
        try:
            head = durable.read_small(self.data / "global" / "pg_control", 64)
            return struct.unpack_from("=i", head, _STATE_OFFSET)[0] in _RECOVERS
        except (OSError, struct.error):
            return False

    def timeline(self) -> Newest:
        wal = self.data / "pg_wal"
        return Newest(number := timelines.newest(wal), timelines.begins(wal, number))

    @property
    def notices(self) -> bool:
        return self._watched is not None and self._watched.changes is not None

    async def ended(self, pid: int, within_s: float) -> bool:
        # The pidfd is kept from one look to the next: who it is is asked again only when postmaster.pid has changed.
        try:
            mark = _mark(self._lock_file)
            if self._watched is None or (self._watched.pid, self._watched.mark) != (pid, mark):
                self._unwatch()
                with contextlib.ExitStack() as stack:
                    fd = os.pidfd_open(pid)
                    stack.callback(os.close, fd)
                    if self.postmaster() != pid:
                        return True  # the pidfd may be another program's by now
                    stack.pop_all()
                self._watched = _Watched(pid, fd, mark, self._changes())
                within_s = min(within_s, PAUSE_S)  # what changed before Changes was there has told nobody
        except ProcessLookupError:
            return True
        fd, changes = self._watched.fd, self._watched.changes
        async with trio.open_nursery() as nursery:

            async def noticed(changes: Changes) -> None:
                await changes.wait()
                nursery.cancel_scope.cancel()

            if changes is not None:
                nursery.start_soon(noticed, changes)
            with trio.move_on_after(within_s):
                await trio.lowlevel.wait_readable(fd)
            nursery.cancel_scope.cancel()
        if processes.has_ended(fd):
            self._unwatch()
            return True
        return False

    def _changes(self) -> Changes | None:
        try:
            return Changes(self.data)
        except OSError as e:  # then it is looked at more often
            log.seldom("changes in the data directory cannot be waited for", why=str(e))
            return None

    def _unwatch(self) -> None:
        watched, self._watched = self._watched, None
        if watched is not None:
            os.close(watched.fd)
            if watched.changes is not None:
                watched.changes.close()

    async def control(self, field: str, data: Path | None = None) -> str:
        """One field of pg_controldata, "" where it has none such. Raises PostgresError."""
        where = str(data or self.data)
        out = await self.programs.run("pg_controldata", "-D", where, timeout_s=CONTROL_S)
        found = re.search(rf"{field}:\s*(.+)", out)
        return found.group(1).strip() if found else ""

    async def system_identifier(self) -> str | None:
        if self._system_identifier is None and self.initialised():
            with contextlib.suppress(PostgresError):
                self._system_identifier = await self.control("system identifier") or None
        return self._system_identifier

    async def in_production(self) -> bool:
        try:
            return await self.control("cluster state") == "in production"
        except PostgresError as e:
            log.warning("pg_controldata failed; assuming the worst", why=str(e))
            return True

    async def _shutdown_lsn(self) -> int | None:
        """Of what does not run: where its shutdown checkpoint begins; None also where it cannot be told."""
        with trio.move_on_after(self._c.fence_timeout_s * MARK_SHARE), contextlib.suppress(OSError):
            return await durable.in_thread(lambda: shutdown_checkpoint(self.data))
        return None

    # ------------------------------------------------------------ files

    async def mark_standby(self) -> None:
        if self.rejoin.empty:
            return  # nothing stands there that could be started

        def mark(change: Change) -> None:
            if not self.data.exists():
                raise OSError(f"{self.data} is not there any more (renamed?): nothing marks it as a standby")
            if self.initialised() and not self.is_standby():
                change.write(self.data / "standby.signal", b"")

        await self.files.change(mark)

    def settle(
        self, change: Change, primary: str | None, testimony: bytes, where: Path, *, slot: bool = False
    ) -> None:
        """What configure() does, of a standby that stands at `where` for now."""
        # Crash recovery goes its own way, whatever it has heard of others' timelines: it may have diverged.
        self._hurried = False
        timeline = "latest" if primary is not None else "current"
        source = settings.Source(primary, slot, timeline)
        self._configure(change, source, None, testimony, where)

    def _configure(
        self, change: Change, source: settings.Source, sync: SyncRule | None, testimony: bytes, where: Path
    ) -> None:
        for path, content, mode in self._wanted(source, sync, testimony, where):
            change.write(path, content, mode=mode)

    def _wanted(
        self, source: settings.Source, sync: SyncRule | None, testimony: bytes, where: Path
    ) -> list[tuple[Path, bytes, int]]:
        """The files of a configuration, with their modes. Raises PostgresError: it would not be read, or overridden."""
        user = Path(self._c.config_file)
        if not (where / user.name if user.parent == self.data else user).exists():
            raise PostgresError(
                f"{self._c.config_file} is missing: set postgresql.config_file to where postgresql.conf is"
            )
        auto = where / "postgresql.auto.conf"
        clash = settings.clash(auto.read_text(errors="surrogateescape")) if auto.exists() else None
        if clash is not None:
            raise PostgresError(
                f"{auto} sets {clash}, which would override Harmony: "
                f"ALTER SYSTEM RESET {clash}, or delete that line while PostgreSQL is down"
            )
        since_before = self._runs_since_before()
        included = self._c.run != "systemd" and (since_before or (where / settings.INCLUDED).exists())
        name = settings.INCLUDED if included else settings.CONF
        files = [(where / WITNESS, testimony, 0o600)]
        if self._c.run == "systemd" or since_before:
            try:
                found = settings.drop_in(self._c, name)
            except ValueError as e:
                if self._c.run == "systemd" or not (where / settings.CONF).exists():
                    raise PostgresError(str(e)) from e
                found = None  # it was started by hand beside Harmony, and reads ours when it is started by it
            if found is not None:
                files.append((found[0], found[1].encode(), 0o644))
        for each in {settings.CONF, name}:
            text = settings.render(self._c, source, sync, where, name=each)
            files.append((where / each, text.encode(), 0o600))
        return files

    def _runs_since_before(self) -> bool:
        """Whether what runs was started by other hands, with the user's configuration file."""
        try:
            told = durable.read_small(self.data / "postmaster.opts", 4096)
        except OSError:
            return False
        return settings.CONF.encode() not in told and self.postmaster() is not None

    def not_adoptable(self) -> str:
        """Why what runs cannot be led as it is, with what to do; "": a reload brings Harmony's settings in."""
        if self.is_standby() or self.postmaster() is None:
            return (
                f"no primary runs in {self.data}: adopt it where it runs; a standby is taken over by itself"
            )
        try:
            self._wanted(settings.Source(None), None, b"", self.data)
        except (PostgresError, OSError) as e:
            return str(e)
        return ""

    async def configure(
        self, primary: str | None, sync: SyncRule | None, testimony: bytes, *, slot: bool = False
    ) -> None:
        if self.unfinished:
            raise PostgresError(f"{self.data}: {self.rejoin.progress}; only a rejoin starts PostgreSQL here")
        self._hurried = sync is not None
        source = settings.Source(primary, slot)
        await self.files.change(lambda change: self._configure(change, source, sync, testimony, self.data))

    async def found(self, testimony: bytes) -> None:
        if self.rejoin.empty in FOUNDS:
            await self.rejoin.found(testimony)

    @property
    def unfinished(self) -> bool:
        return self.rejoin.unfinished

    # ------------------------------------------------------------ acting

    async def start(self) -> None:
        await self.mark_standby()
        if self.pids():  # somebody else's, begun before the mark was there: it may not have seen it
            outcome = await self.stop()
            if not outcome.proven:
                raise PostgresError(
                    f"somebody else started it, and it could not be stopped: {outcome.detail}"
                )
        await self.clear_locks()
        freed = await self.files.change(lambda _: timelines.give_back(self.data / "pg_wal"))
        if freed:
            log.warning("gave timelines back that a promotion never began", files=freed)
        await self.files.change(lambda change: own.rotate(change, self.data))
        try:
            await self.programs.start(self.data / settings.CONF, self.tree.ready_to_start())
        except PostgresError as e:
            if e.reason or self._hurried or self.pids():
                raise
            await self._explain(e)

    async def clear_locks(self) -> None:
        """Remove what a dead postmaster of this directory left and PostgreSQL would refuse to start at."""
        stale = await self.files.change(
            lambda _: self.tree.clear_stale_lock(self._c.port, self._c.socket_dir)
        )
        if stale:
            log.warning("removed lock files that a dead postmaster left", files=stale)

    async def _explain(self, failed: PostgresError) -> None:
        """Its reason stands in a log of its own, in another language, or nowhere. Raises PostgresError."""
        file = Path(self._c.config_file) if self._c.run == "systemd" else self.data / settings.CONF
        try:
            await self.programs.ask_why(file, self.tree.ready_to_start())
        except PostgresError as e:
            raise (e if e.reason else failed) from e
        outcome = await self.stop()
        raise PostgresError(
            f"{failed}; it does start where it logs to stderr in English: look at logging_collector, log_directory and "
            f"lc_messages{'' if outcome.proven else '; and could not be stopped again'}"[:480]
        )

    async def reload(self) -> None:
        # A program of its own costs as much as all the rest of a promotion, and says no more.
        if self.tree.signal_postmaster(signal.SIGHUP):
            return
        await self.programs.run("pg_ctl", "reload", "-D", self._c.data_dir, timeout_s=CONTROL_S)

    async def promote(self, reserved: int) -> Newest:
        if reserved:
            wal = self.data / "pg_wal"
            await self.files.change(lambda change: timelines.take_up_to(change, wal, reserved))
        seconds = max(1, round(self._c.start_timeout_s))
        arguments = ("promote", "-D", self._c.data_dir, "-w", "-t", str(seconds))
        (self.data / UNPROVEN).unlink(missing_ok=True)  # from now on it holds what no other has
        await self.programs.run("pg_ctl", *arguments, timeout_s=seconds + 5)
        state = await self.control("cluster state")
        if state != "in production" or self.is_standby():
            raise PostgresError(f"after promotion the control file says {state!r}")
        timeline = self.timeline()
        if reserved and timeline.number != reserved:
            raise PostgresError(
                f"the promotion began timeline {timeline.number}, and {reserved} was reserved for it"
            )
        return timeline

    def halt(self) -> None:
        self.tree.halt()

    async def stop(self, *, clean_until_ns: int = 0) -> Outcome:
        ladder = Ladder(
            self.tree,
            self.mark_standby,
            port=self._c.port,
            fence_timeout_s=self._c.fence_timeout_s,
            clean_until_ns=clean_until_ns,
        )
        outcome = await ladder.run()
        if outcome.proven and clean_until_ns:
            outcome = dataclasses.replace(outcome, shutdown_lsn=await self._shutdown_lsn())
        if self._c.run == "systemd":
            # Whatever became of it: the unit must not be started again by systemd.
            await self.programs.systemctl("stop --no-block", timeout_s=1.0, check=False)
        return outcome


def shutdown_checkpoint(data: Path) -> int | None:
    """Where the checkpoint of a primary's clean shutdown begins: all the WAL there is ends with it.

    None: PostgreSQL runs, was killed, or was a standby (its checkpoint is an older one). Raises OSError.
    """
    try:
        head = durable.read_small(data / "global" / "pg_control", 64)
        (version,) = struct.unpack_from("=I", head, _VERSION_OFFSET)
        (state,) = struct.unpack_from("=i", head, _STATE_OFFSET)
        (begins,) = struct.unpack_from("=Q", head, _CHECKPOINT_OFFSET)
    except struct.error:
        return None
    return int(begins) if version in _VERSIONS and state == _SHUT_DOWN else None


def _exists(path: Path, *, otherwise: bool) -> bool:
    """`otherwise`, the safe answer, where the disk or the folder does not tell."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return otherwise
    return True


def _mark(path: Path) -> tuple[int, int] | None:
    """What changes when the file is written anew or replaced; None where it is not there. Raises OSError."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
