"""Carries the slots' plan out: its own connection, in a thread, with a deadline; nobody's decision waits for it.

It makes and moves nothing without a duty (core/slots.py), looks again at every statement whether the database still
is what that says, and, of a primary, whether its lease still runs. What fails is a note for people, and tried again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import psycopg
import structlog
import trio

from harmony import session
from harmony.agent.probe import Target
from harmony.agent.settings import ASKED, check, limits
from harmony.agent.slots import (
    LOGICAL_FROM,
    Action,
    Advance,
    Create,
    Drop,
    Found,
    Setting,
    Slot,
    Wanted,
    kept,
    plan,
)
from harmony.core.messages import Surveyed
from harmony.core.slots import Duty
from harmony.errors import in_a_line
from harmony.records import lsn

DEADLINE_S = 15.0
STATEMENT_MS = 5000
MAX_NOTES, LONGEST_NOTE = 16, 400
UNMANAGED = "(replication.slots is false)"
log = structlog.get_logger("slots")

_FACTS = """
SELECT pg_is_in_recovery(), current_user::text,
       COALESCE(pg_last_wal_replay_lsn(), '0/0') - '0/0'::pg_lsn,
       (SELECT redo_lsn FROM pg_control_checkpoint()) - '0/0'::pg_lsn,
       (SELECT rolreplication OR rolsuper FROM pg_roles WHERE rolname = current_user)
"""
_SLOTS = """
SELECT slot_name::text, slot_type = 'physical', active, restart_lsn - '0/0'::pg_lsn, COALESCE(wal_status, ''),
       CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END - restart_lsn,
       COALESCE(xmin, catalog_xmin) IS NOT NULL, temporary, COALESCE(database::text, ''), COALESCE(plugin::text, '')
"""
_SETTINGS = "SELECT name, setting, source, pending_restart FROM pg_settings WHERE name = ANY(%s)"
_CREATE = "SELECT pg_create_physical_replication_slot(%s, true) WHERE pg_is_in_recovery() = %s"
_CREATE_LOGICAL = (
    "SELECT pg_create_logical_replication_slot(%s, %s, false, false, true) WHERE pg_is_in_recovery() = %s"
)
_ADVANCE = "SELECT pg_replication_slot_advance(%s, %s::pg_lsn) WHERE pg_is_in_recovery() = %s"
_DROP = "SELECT pg_drop_replication_slot(%s) WHERE pg_is_in_recovery() = %s"

Link = session.Link


class Keeper:
    """`await survey(duty)`: what is there after the duty was done; None where the database did not answer."""

    def __init__(self, target: Target, wanted: Wanted) -> None:
        self._target, self._wanted = target, wanted
        self._busy = False
        self._told: tuple[str, ...] = ()

    async def survey(self, duty: Duty | None) -> Surveyed | None:
        """At most one thread is ever lost to a database that hangs: no other begins before it has returned."""
        if self._busy:
            return None
        found: Surveyed | None = None
        with trio.move_on_after(DEADLINE_S):
            found = await trio.to_thread.run_sync(self._survey, duty, abandon_on_cancel=True)
        if found is not None and found.notes != self._told:
            self._told = found.notes
            log.info("settings and slots", notes=found.notes)
        return found

    def _survey(self, duty: Duty | None) -> Surveyed | None:
        self._busy = True
        asked_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        try:
            with contextlib.closing(self._connect(self._target.dbname)) as link:
                return self._done(link, duty, asked_ns)
        except (psycopg.Error, *session.UNREADABLE):
            return None  # the probe says why; nothing was found, and nothing is claimed
        finally:
            self._busy = False

    def _done(self, link: Link, duty: Duty | None, asked_ns: int) -> Surveyed:
        found = look(link)
        actions, notes = plan(found, self._wanted, duty)
        for action in actions:
            why = self._carry_out(link, action, duty)
            if why:
                notes.append(f"slot {action.name}: {why}")
        if actions:
            found = look(link)
        notes = [*(n.written() for n in check(found, self._wanted, duty)), *notes]
        by = found.settings["primary_slot_name"].value
        foreign = self._wanted.slots and by and by != self._wanted.slot
        if foreign:
            notes.append(
                f"primary_slot_name is {by}, which Harmony did not set: ALTER SYSTEM RESET primary_slot_name"
            )
        return Surveyed(
            asked_ns=asked_ns,
            slots=kept(found, self._wanted),
            streams_by=by if self._wanted.slots else UNMANAGED,
            limits=limits(found),
            notes=tuple(note[:LONGEST_NOTE] for note in notes[:MAX_NOTES]),
        )

    def _carry_out(self, link: Link, action: Action, duty: Duty | None) -> str:
        """Why it came to nothing; "" where it did not."""
        standby = duty is not None and duty.role == "standby"
        if duty is None or (not standby and time.clock_gettime_ns(time.CLOCK_BOOTTIME) >= duty.until_ns):
            return "the lease is over"
        try:
            match action:
                case Create(name=name, logical=None):
                    link.execute(_CREATE, (name, standby))
                case Create(name=name, logical=logical) if logical is not None:
                    with contextlib.closing(self._connect(logical.database or "")) as own:
                        own.execute(_CREATE_LOGICAL, (name, logical.plugin, standby))
                case Advance(name=name, to=to):
                    link.execute(_ADVANCE, (name, lsn(to), standby))
                    return ""  # every few seconds: not worth a line
                case Drop(name=name):
                    link.execute(_DROP, (name, standby))
        except psycopg.Error as e:
            return in_a_line(e)
        log.info("slot", did=type(action).__name__.lower(), name=action.name, why=getattr(action, "why", ""))
        return ""

    def _connect(self, dbname: str) -> Link:
        t = self._target
        return session.connect(
            host=t.socket_dir,
            port=t.port,
            user=t.user,
            dbname=dbname,
            application_name="harmony-slots",
            settings={"statement_timeout": str(STATEMENT_MS)},
        )


def look(link: Link) -> Found:
    """Raises psycopg.Error."""
    version = link.info.server_version
    row = link.execute(_FACTS).fetchone()
    if row is None:
        raise psycopg.DataError("PostgreSQL gave no row")
    recovering, user, replayed, redo, may = row
    settings = {
        str(name): Setting(str(value), str(source), bool(pending))
        for name, value, source, pending in link.execute(_SETTINGS, (list(ASKED),)).fetchall()
    }
    return Found(
        recovering=bool(recovering),
        version=version,
        user=str(user),
        may=bool(may),
        replayed=int(str(replayed)),
        redo=int(str(redo)),
        slots=tuple(_slots(link, version)),
        settings=settings,
    )


def _slots(link: Link, version: int) -> Iterator[Slot]:
    more = ", failover, synced" if version >= LOGICAL_FROM else ", false, false"
    for row in link.execute(f"{_SLOTS}{more} FROM pg_replication_slots".encode()).fetchall():
        name, physical, active, lsn, status, behind, pinned, temporary, database, plugin, failover, synced = (
            row
        )
        yield Slot(
            name=str(name),
            physical=bool(physical),
            active=bool(active),
            lsn=int(str(lsn)) if lsn is not None else None,
            status=str(status),
            behind=int(str(behind)) if behind is not None else 0,
            pinned=bool(pinned),
            temporary=bool(temporary),
            database=str(database),
            plugin=str(plugin),
            failover=bool(failover),
            synced=bool(synced),
        )
