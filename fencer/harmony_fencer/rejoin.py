"""A data directory that cannot follow is made one that can: pg_rewind, else a new copy, the old one kept.

What stands at data_dir is at every moment something that may be started, or cannot be started at all: while a
directory is being rewound it stands beside (data_dir.harmony-rewind), and a stub takes its place by one atomic
exchange of the two names; it comes back by another. So nobody (systemd at boot, an operator) can start what is half
rewound, and no mark inside is lost to pg_rewind, which deletes what its source does not have. A copy
is made beside, too (data_dir.harmony-new), and exchanged when it is whole. Whatever was interrupted is told by
what stands there, and taken up by the next rejoin (docs/adr/010-rejoin-beside.md). No SQL: PostgreSQL's own
programs speak to the primary.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import trio

from harmony_fencer import bootstrap, durable, own, places, preflight, reasons, settings, wal
from harmony_fencer.alone import only_one
from harmony_fencer.config import FencerConfig
from harmony_fencer.copies import Copies, may_copy
from harmony_fencer.durable import read_small
from harmony_fencer.engine import Outcome
from harmony_fencer.files import Change, Files
from harmony_fencer.log import log
from harmony_fencer.places import STUB, exchange, is_stub, move, size, there, unlink
from harmony_fencer.programs import PostgresError, Programs
from harmony_fencer.standby import streams

WHOLE = "harmony.whole"  # the last to be written into what is to be put in place
UNPROVEN = "harmony.unproven"  # in a copy that was never seen streaming and never led: not worth keeping
LOCK = "rejoin.lock"
STREAMS = "it streams"
STREAM_S = 10.0  # how long it is looked whether the new standby streams
SHUT_DOWN = ("shut down", "shut down in recovery")
_PROGRESS = re.compile(r"(\d+)/(\d+) kB \((\d+)%\)")


class Disturbed(PostgresError):
    """Somebody started PostgreSQL meanwhile. A copy would help no more than a rewind."""


class Base(Protocol):
    """What a rejoin needs of the engine."""

    data: Path
    files: Files
    programs: Programs

    def pids(self) -> list[int]: ...
    async def control(self, field: str, data: Path | None = None) -> str: ...
    async def stop(self, *, clean_until_ns: int = 0) -> Outcome: ...
    async def start(self) -> None: ...
    async def clear_locks(self) -> None: ...
    def settle(
        self, change: Change, primary: str | None, testimony: bytes, where: Path, *, slot: bool = False
    ) -> None: ...


class Rejoin:
    """Of one data directory. `progress` is for people, "" when nothing is under way."""

    def __init__(self, config: FencerConfig, base: Base) -> None:
        self._c, self._base = config, base
        self.data = base.data
        self.aside = self.data.with_name(self.data.name + ".harmony-rewind")
        self.new = self.data.with_name(self.data.name + ".harmony-new")
        self._working = ""
        self._slot = self._copied = self._starting = False
        self._copies = Copies(config)
        self.cannot_rewind = ""
        ids = config.postgres_ids
        self._ids = (ids.uid, ids.gid) if ids is not None else None

    @property
    def unfinished(self) -> bool:
        """Whether only a rejoin can make a standby of what stands there."""
        return is_stub(self.data)

    @property
    def progress(self) -> str:
        if self._working or not self.unfinished:
            return self._working
        return "a rejoin was interrupted; the next one takes it up"

    async def learn(self) -> None:
        """Whether pg_rewind could help here one day: what was changed without a WAL record, it would not see."""
        before, self.cannot_rewind = self.cannot_rewind, preflight.immovable(self.data)
        if self.cannot_rewind or not there(self._real() / "PG_VERSION"):
            return
        try:
            hints = await self._base.control("wal_log_hints setting", self._real())
            checksums = await self._base.control("Data page checksum version", self._real())
        except PostgresError as e:
            log.warning("pg_controldata failed: whether pg_rewind could help is not known", why=str(e))
            return
        if hints == "off" and checksums == "0":
            self.cannot_rewind = (
                "wal_log_hints is off and there are no data checksums: pg_rewind cannot help here, a copy will be "
                "made; Harmony sets wal_log_hints at the next start of PostgreSQL (restart the primary once)"
            )
            if not before:
                log.warning("pg_rewind could not help here", why=self.cannot_rewind)

    @property
    def empty(self) -> str:
        """By which method something may be made here, where nothing is; "": none, or something is there."""
        return bootstrap.may_make(self._c)

    async def found(self, testimony: bytes) -> None:
        """Where there is nothing: a new cluster. Raises PostgresError, OSError; the next found() begins anew."""
        fd = await only_one(Path(self._c.run_dir) / LOCK, (self.aside, self.new))
        try:
            self._working = "making a new cluster"
            await self._fill(None, "", fd)
            await self._furnish(self.new, None, testimony, unproven=False)
            await self._put_in_place(self.new)
        finally:
            self._working = ""
            os.close(fd)

    # ------------------------------------------------------------ the whole

    async def check(self, primary: str, system_identifier: str, *, clone: bool) -> str:
        """Before anything is stopped: "" or why only a copy helps. Raises PostgresError: neither can be tried."""
        try:
            self._working = f"looking at {primary}"
            bootstrap.check(self.data)
            if immovable := preflight.immovable(self.data):
                raise PostgresError(immovable)
            if self.empty:
                return "there was no data directory"
            where = self._real()
            found = await self._base.control("system identifier", where)
            if found != system_identifier:
                raise PostgresError(
                    f"{where} has system identifier {found or 'unknown'}, the cluster {system_identifier}: it is "
                    "another cluster's and is not touched; correct postgresql.data_dir, or move it away"
                )
            if not is_stub(self.data) and self._base.pids() and (turned_away := reasons.not_let_in(where)):
                raise PostgresError(
                    f"{primary} does not let it stream, and a copy would not either: {turned_away}"
                )
            why = ""
            if not (self.aside / WHOLE).exists():  # also before a copy: that the source can be reached at all
                why = await preflight.cannot_rewind(self._c, self._base, where, primary)
            why = "a copy was ordered" if clone else why
            if why:
                await self._may_clone(primary, why, again=clone)
            else:
                await preflight.can_be_written(self._c, where)
            return why
        finally:
            self._working = ""

    async def run(
        self, primary: str, system_identifier: str, testimony: bytes, *, why_clone: str, slot: bool
    ) -> str:
        """Of what is stopped: rewound or copied, and started as a standby of `primary`. Says what was done.

        `slot`: the primary has one for this node; it keeps the WAL that a copy needs.
        Raises PostgresError, OSError; whatever the end, the next run() takes it up.
        """
        self._slot, self._copied = slot and self._c.slots.own, False
        try:
            if immovable := preflight.immovable(self.data):
                raise PostgresError(immovable)
            fd = await only_one(Path(self._c.run_dir) / LOCK, (self.aside, self.new))
            try:
                said = await self._made(primary, system_identifier, testimony, why_clone, fd)
                self._working = "starting as a standby"
                said = await self._started(said, primary, system_identifier, testimony, fd)
            finally:
                os.close(fd)
            streams = await self._seen_streaming()
            if self._copied or streams.startswith(STREAMS):
                await self._remember("" if streams.startswith(STREAMS) else streams, started=True)
            return f"{said}; {streams}"
        finally:
            self._working = ""

    async def _started(self, said: str, primary: str, system: str, testimony: bytes, fd: int) -> str:
        """Where PostgreSQL does not start for what is in a rewound one, it is copied; a copy is the last word."""
        try:
            await self._base.start()
        except PostgresError as e:
            if not self._copied and reasons.of_the_data(e.reason):
                await self._may_clone(primary, why := f"{said}, and does not start: {e.reason}")
                await self._clone(primary, system, testimony, fd)
                said = f"copied anew from {primary} ({why})"
                return await self._started(said, primary, system, testimony, fd)
            if self._copied:
                await self._remember(e.reason or str(e), started=False)
            raise
        return said

    async def _remember(self, failed: str, *, started: bool) -> None:
        """How the copy ended that was made now; "": it streams. Raises OSError."""
        await durable.in_thread(lambda: self._copies.ended(failed, self.data, started=started))

    async def _made(self, primary: str, system: str, testimony: bytes, why_clone: str, fd: int) -> str:
        await self._base.clear_locks()  # by postmaster.pid, which another directory does not have
        await self._tidy()
        if not why_clone and (self.data / STUB).exists() and (self.aside / WHOLE).exists():
            await self._put_in_place(self.aside)  # rewound, and interrupted right after it
            return "the rewind that was interrupted is complete"
        if not why_clone:
            try:
                await self._rewind(primary, testimony, fd)
            except Disturbed:
                raise
            except PostgresError as e:
                text = f"{e.said} {e}"
                if reasons.hopeless(text) or (self._starting and not reasons.of_the_data(e.reason or text)):
                    raise
                await self._may_clone(primary, why := str(e)[-400:])
                log.error("pg_rewind failed: a copy is made instead", why=why)
                why_clone = f"pg_rewind failed: {why}"
            else:
                return f"rewound to {primary}"
        await self._clone(primary, system, testimony, fd)
        return f"copied anew from {primary} ({why_clone})"

    # ------------------------------------------------------------ rewind

    async def _rewind(self, primary: str, testimony: bytes, fd: int) -> None:
        led = self._starting = False
        if not is_stub(self.data):
            led = await self._recover(testimony)
            await self._step_aside()
        self._working = "rewinding"
        await self._make_room()
        arguments = preflight.rewind_arguments(self._c, self.aside, primary)
        more = await preflight.restoring(self._c, self._base.programs, self.data, self.aside)
        said = await self._base.programs.run(
            "pg_rewind", *arguments, *more, timeout_s=math.inf, watch=self._watch("rewinding"), fds=(fd,)
        )
        if led and "on the same timeline" in said:
            raise PostgresError(
                f"this node and {primary} have both led on one timeline: no fork can be found"
            )
        if not more and wal.broken(self.aside):
            raise PostgresError(f"{primary} does not have the WAL any more that a rewound one begins with")
        if mistaken := wal.mistaken(self.aside, await self._base.control(wal.REACHED, self.aside)):
            raise PostgresError(f"{primary} {mistaken}")
        await self._furnish(self.aside, primary, testimony, unproven=False)
        await self._put_in_place(self.aside)

    async def _recover(self, testimony: bytes) -> bool:
        """pg_rewind wants a cleanly stopped target. A start as a standby of nobody replays all the WAL there is,
        and never takes standby.signal away, as single-user mode would have to. Says whether it was a primary."""
        state = await self._base.control("Database cluster state")
        led = "recovery" not in state
        if state in SHUT_DOWN:
            return led
        self._working = "crash recovery"
        log.info("crash recovery before the rewind", state=state)

        def alone(change: Change) -> None:
            self._base.settle(change, None, testimony, self.data)

        await self._base.files.change(alone)
        self._starting = True  # what fails now is for PostgreSQL to say, not for pg_rewind
        await self._base.start()
        self._starting = False
        until_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) + round(self._c.start_timeout_s * 1e9)
        outcome = await self._base.stop(clean_until_ns=until_ns)
        if not outcome.proven:
            raise PostgresError(f"could not be stopped after crash recovery: {outcome.detail}")
        return led

    # ------------------------------------------------------------ copy

    async def _may_clone(self, primary: str, why: str, *, again: bool = False) -> None:
        """Raises PostgresError where no copy may or can be made, or the last one ended as this would."""
        real, copies = self._real(), self._copies
        may_copy(self._c, real, why)
        if refused := await durable.in_thread(lambda: copies.refuses(primary, why, real, again=again)):
            raise PostgresError(refused)

    async def _clone(self, primary: str, system: str, testimony: bytes, fd: int) -> None:
        if (
            not (self.new / WHOLE).exists()
            or await self._base.control("system identifier", self.new) != system
        ):
            await self._fill(primary, system, fd)
            found = await self._base.control("system identifier", self.new)
            if found != system:
                await self._discard()
                raise PostgresError(
                    f"{primary} sent a cluster with system identifier {found}, not {system}: thrown away"
                )
        await self._furnish(self.new, primary, testimony, unproven=True)
        self._copied = True
        await self._put_in_place(self.new)

    async def _fill(self, primary: str | None, system: str, fd: int) -> None:
        """Beside, from nothing: by the operator's command, as a new cluster (`primary` None), or as a copy."""
        await self._discard()
        programs = self._base.programs
        if primary is not None:
            found = await preflight.tablespaces(self._c, programs, primary) if self.empty != "command" else []
            await durable.in_thread(lambda: self._copies.begin(primary, found))
        await self._change(lambda change: change.act(lambda: self._make(self.new)), parent=True)
        if self.empty == "command":
            watch = self._watch("bootstrap.command")
            await bootstrap.command(self._c, programs, self.new, primary, system, (fd,), watch)
        elif primary is None:
            await bootstrap.initdb(self._c, programs, self._base.files, self.new, (fd,))
        else:
            self._working = f"copying from {primary}"
            watch = self._watch(
                "copying", fits=partial(places.must_fit, self.data.parent, self._c.rejoin.keep_free_mb)
            )
            slot = ("-S", settings.slot_name(self._c.node)) if self._slot else ()
            await programs.run(
                "pg_basebackup", "-D", str(self.new), "-d", settings.conninfo(self._c, primary), "-X", "stream",
                "-c", "fast", "--progress", "--no-password", *slot, timeout_s=math.inf, watch=watch, fds=(fd,),
            )  # fmt: skip

    def _watch(self, what: str, fits: Callable[[int, int], None] | None = None) -> Callable[[str], None]:
        def watch(tail: str) -> None:
            found = _PROGRESS.findall(tail)
            if found:
                done, total, percent = (int(n) for n in found[-1])
                self._working = f"{what}: {percent} % of {total // 1024} MB"
                if fits is not None:
                    fits(total, done)

        return watch

    # ------------------------------------------------------------ what stands there

    def _real(self) -> Path:
        """The directory that has this node's data."""
        return self.aside if is_stub(self.data) else self.data

    async def _tidy(self) -> None:
        """Bring what an interrupted rejoin left into one of two shapes: the real one in place, or the stub there and
        the real one aside. Beside either, perhaps, a whole copy that is still to be put in place."""
        if is_stub(self.data):
            if not (self.aside / "PG_VERSION").exists():
                raise PostgresError(
                    f"{self.data} only holds the place of {self.aside}, which is gone: restore it from there, or "
                    f"delete {self.data / STUB} and copy by hand"
                )
            if not (self.new / WHOLE).exists():
                await self._discard()
            return
        if (self.data / WHOLE).exists():  # put in place: what stands beside was there before
            await durable.in_thread(self._copies.in_place)
            for place in (self.aside, self.new):
                await self._put_away(place)
            await self._change(lambda _: unlink(self.data / WHOLE))
            return
        if (self.aside / STUB).exists() or not (self.aside / "PG_VERSION").exists():
            await self._remove(self.aside)
        else:
            await self._put_away(self.aside)
        if not (self.new / WHOLE).exists():
            await self._discard()

    async def _discard(self) -> None:
        """A copy that is not whole, and what it has left in its tablespaces' places."""
        await self._remove(self.new)
        old = self.data.parent.glob(f"{self.data.name}.harmony-old-*")
        for left in await durable.in_thread(lambda: self._copies.left(self.data, self.aside, *old)):
            log.info("removing what a copy has left", place=left)
            await self._base.programs.tool("find", left, "-xdev", "-delete", timeout_s=math.inf)

    async def _put_away(self, place: Path) -> None:
        """Keep what held this node's data; what only held a place, or a copy that never streamed, is removed."""
        if not there(place):
            return
        if (place / STUB).exists() or (place / UNPROVEN).exists() or not (place / "PG_VERSION").exists():
            await self._remove(place)
            return
        now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        target = self.data.with_name(f"{self.data.name}.harmony-old-{now}")
        await self._change(lambda change: change.act(lambda: move(place, target)), parent=True)
        log.info("the old data directory is kept", place=str(target))

    async def _step_aside(self) -> None:
        def fill(change: Change) -> None:
            text = f"{self.aside} has this node's data: Harmony is making it a standby again. Leave both alone.\n"
            change.write(self.aside / STUB, text.encode())
            change.write(self.aside / "standby.signal", b"")
            change.write(self.aside / "PG_VERSION", read_small(self.data / "PG_VERSION", 16))
            own.put(change, self.aside, own.own_files(self.data))

        await self._change(lambda change: change.act(lambda: self._make(self.aside)), parent=True)
        await self._change(fill)
        self._must_be_alone()
        await self._change(lambda change: change.act(lambda: exchange(self.data, self.aside)), parent=True)

    async def _make_room(self) -> None:
        """For pg_rewind: what it would refuse or overwrite of the node's own is in the stub, by now or for now."""

        def make(change: Change) -> None:
            own.make_plain(change, self.aside, own.own_files(self.aside))
            own.move_logs(self.aside, self.data, over=False)

        await self._change(make)

    async def _furnish(self, place: Path, primary: str | None, testimony: bytes, *, unproven: bool) -> None:
        """A finished directory gets this node's own files and settings, and the mark that it is whole."""

        def furnish(change: Change) -> None:
            for name in (WHOLE, UNPROVEN, STUB):
                unlink(place / name)
            own.put(change, place, own.own_files(self.data))
            if place == self.aside:
                own.move_logs(self.data, place, over=True)
            else:
                own.link_logs(self.data, place)
            change.write(place / "standby.signal", b"")
            self._base.settle(change, primary, testimony, place, slot=self._slot)
            if unproven:
                change.write(place / UNPROVEN, b"")
            change.write(place / WHOLE, b"")

        await self._change(furnish)

    def _must_be_alone(self) -> None:
        """Before the directory is taken away from below what runs in it: nobody would guard that any more."""
        if self._base.pids():
            raise Disturbed(
                f"somebody has started PostgreSQL in {self.data} meanwhile: stop it, or wait; what was done is kept"
            )

    async def _put_in_place(self, place: Path) -> None:
        self._must_be_alone()
        if not there(self.data):
            await self._change(lambda change: change.act(lambda: self._make(self.data)), parent=True)
        await self._change(lambda change: change.act(lambda: exchange(self.data, place)), parent=True)
        log.info("put in place", what=str(place))
        await self._tidy()

    async def _seen_streaming(self) -> str:
        """Whether its WAL receiver lasts. Only then old directories are thrown away."""
        seen: dict[int, float] = {}
        with trio.move_on_after(STREAM_S):
            while not streams(self._base.pids(), seen, trio.current_time()):
                await trio.sleep(0.1)
            await self._change(lambda _: unlink(self.data / UNPROVEN))
            removed = await self._prune()
            return STREAMS + (f"; removed {', '.join(removed)}" if removed else "")
        why = reasons.not_let_in(self.data)
        return f"it does not stream within {STREAM_S:g} s" + (f": {why}" if why else "")

    async def _prune(self) -> list[str]:
        """Old directories beyond what is to be kept, the oldest first."""
        pattern = self.data.name + ".harmony-old-*"
        kept = sorted(self.data.parent.glob(pattern), key=lambda p: p.name, reverse=True)
        limit, total, gone = self._c.rejoin.keep_old_mb * 1_000_000, 0, list[str]()
        for number, place in enumerate(kept):
            if limit and number < self._c.rejoin.keep_old:
                total += await durable.in_thread(lambda place=place: size(place))  # type: ignore[misc]
            if number >= self._c.rejoin.keep_old or (limit and total > limit):
                await self._remove(place)
                gone.append(place.name)
        return gone

    # ------------------------------------------------------------ acting

    def _parent_ids(self) -> bool:
        """Whether the names beside data_dir are ours to change, not PostgreSQL's user's."""
        return self._ids is None or self.data.parent.stat().st_uid != self._ids[0]

    async def _change(self, work: Callable[[Change], None], *, parent: bool = False) -> None:
        own = parent and self._parent_ids()
        await self._base.files.change(work, own=own)

    def _make(self, place: Path) -> None:
        """An empty directory of PostgreSQL's user; its parent may be root's."""
        place.mkdir(mode=0o700)
        if self._ids is not None and place.stat().st_uid != self._ids[0]:
            os.chown(place, *self._ids, follow_symlinks=False)

    async def _remove(self, place: Path) -> None:
        if not there(place):
            return
        if place == self.data or not place.name.startswith(self.data.name + ".harmony-"):
            raise AssertionError(f"{place} is not ours to remove")
        log.info("removing", place=str(place))
        # As PostgreSQL's user: what it owns may hold symlinks that lead anywhere.
        await self._base.programs.tool(
            "find", str(place), "-xdev", "-mindepth", "1", "-delete", timeout_s=math.inf
        )
        await self._change(lambda change: change.act(place.rmdir), parent=True)
