"""SQL to the local PostgreSQL, in a thread, one question at a time, each with a deadline.

It changes nothing in the database but for a message in the WAL that nobody reads (`nudge`). A question that hangs
is left behind, and no other is asked until it has returned: so at most one thread is ever lost to a frozen server, one
to a checkpoint and one to a nudge, which have connections of their own.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import psycopg
import trio

from harmony import session
from harmony.core.messages import DbSeen, DbSilent, Walsender
from harmony.errors import in_a_line

_QUESTION = """
SELECT pg_is_in_recovery(),
       CASE WHEN pg_is_in_recovery() THEN COALESCE(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn())
            ELSE pg_current_wal_flush_lsn() END - '0/0'::pg_lsn,
       COALESCE(pg_last_wal_replay_lsn() - '0/0'::pg_lsn, 0),
       (SELECT max(('x' || left(name, 8))::bit(32)::int) FROM pg_ls_waldir()
         WHERE name ~ '^[0-9A-F]{24}$'),
       EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming'),
       (SELECT system_identifier::text FROM pg_control_system()),
       CASE WHEN pg_is_in_recovery() THEN false
            ELSE (SELECT GREATEST(timeline_id, CASE WHEN current_setting('server_version_num')::int >= 160000
                                               THEN min_recovery_end_timeline END)
                    FROM pg_control_checkpoint(), pg_control_recovery())
                 < ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int END,
       wal_waiters, sync_waiters, sessions,
       current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int,
       pg_postmaster_start_time()::text, checkpointer, file_waiters,
       COALESCE(held, false), current_setting('synchronous_standby_names'),
       COALESCE((SELECT json_agg(json_build_array(application_name, sync_priority > 0, flush_lsn - '0/0'::pg_lsn))
                   FROM pg_stat_replication WHERE state = 'streaming' AND flush_lsn IS NOT NULL), '[]')
  FROM (SELECT count(*) FILTER (WHERE lower(wait_event) IN ('walsync', 'walwrite', 'walinitsync', 'walinitwrite')),
               count(*) FILTER (WHERE wait_event = 'SyncRep'),
               count(*) FILTER (WHERE backend_type = 'client backend'),
               max(backend_start) FILTER (WHERE backend_type = 'checkpointer')::text,
               (array_agg(pid ORDER BY query_start, pid)
                FILTER (WHERE wait_event LIKE 'DataFile%' AND wait_event NOT LIKE '%Sync'))[:64],
               bool_or(wait_event IN ('RecoveryApplyDelay', 'RecoveryPause') OR wait_event LIKE 'RecoveryConflict%'
                       OR wait_event_type IN ('Lock', 'BufferPin')) FILTER (WHERE backend_type = 'startup')
          FROM pg_stat_activity) AS a (wal_waiters, sync_waiters, sessions, checkpointer, file_waiters, held)
"""
# The least that proves a flush to this disk and to nobody else's: a commit that waits for no standby.
_MESSAGE = "SELECT pg_logical_emit_message(true, 'harmony', '')"
_WAITING = f"SET synchronous_commit = on; {_MESSAGE}"  # and the same as one that waits


@dataclass(frozen=True)
class Target:
    """Where the local PostgreSQL listens. `library_dir` is the server's matter, not ours."""

    socket_dir: str
    port: int
    user: str
    dbname: str


@dataclass(frozen=True)
class Vitals:
    """What an answer tells of PostgreSQL's health. Without pg_monitor waits and births of others are not seen."""

    flushed: int  # WAL position in bytes; of a standby: received
    wal_waiters: int = 0  # sessions and processes that wait for WAL to be written or flushed
    sync_waiters: int = 0  # sessions that wait for a synchronous standby
    sessions: int = 0
    limit: int = 0  # of them, for who is no superuser
    postmaster_born: str = ""
    checkpointer_born: str = ""
    file_waiters: tuple[int, ...] = ()  # pids that read or write a file of the database; at most 64


class Probe:
    """`await ask(now, timeout_s)`: a DbSeen dated `now` (CLOCK_BOOTTIME ns, taken before), or DbSilent."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._connection: session.Link | None = None
        self._writer: session.Link | None = None
        self.vitals: Vitals | None = None  # of the newest answer
        self.refused = ""  # what the newest question was answered with instead: an error; "": nothing
        self._busy = False
        self._beside: set[str] = set()  # what is under way on connections of its own

    async def ask(self, now_ns: int, timeout_s: float) -> DbSeen | DbSilent:
        self.refused = ""
        if self._busy:
            return DbSilent("the previous question is still unanswered: PostgreSQL hangs")
        with trio.move_on_after(timeout_s):
            return await trio.to_thread.run_sync(self._ask, now_ns, abandon_on_cancel=True)
        return DbSilent(f"no answer within {timeout_s:g} s")

    def _ask(self, now_ns: int) -> DbSeen | DbSilent:
        self._busy = True
        try:
            return self._query(now_ns)
        except (psycopg.Error, *session.UNREADABLE) as e:
            self.close()
            why = in_a_line(e)
            self.refused = "" if isinstance(e, psycopg.errors.ConnectionTimeout) else why
            return DbSilent(why)
        finally:
            self._busy = False

    def _query(self, now_ns: int) -> DbSeen | DbSilent:
        if self._connection is None:
            self._connection = self._connect()
        row = self._connection.execute(_QUESTION).fetchone()
        if row is None:
            return DbSilent("PostgreSQL gave no row")
        recovering, received, replayed, timeline, streaming, system_identifier, early, *rest = row
        wal, sync, sessions, limit, postmaster, checkpointer, waiters, held, names, senders = rest
        # On a standby that has just started nothing was received yet: what it has replayed it also has.
        position = max(_number(received), _number(replayed))
        self.vitals = Vitals(
            position,
            _number(wal),
            _number(sync),
            _number(sessions),
            _number(limit),
            str(postmaster or ""),
            str(checkpointer or ""),
            tuple(waiters) if isinstance(waiters, list) else (),
        )
        return DbSeen(
            db="standby" if recovering else "primary",
            timeline=_number(timeline),
            received_lsn=position,
            replayed_lsn=_number(replayed),
            streaming=bool(streaming),
            system_identifier=str(system_identifier),
            asked_ns=now_ns,
            names=str(names),
            walsenders=_walsenders(senders),
            waiting=self.vitals.sync_waiters > 0,
            early=bool(early),
            held=bool(recovering and held),
        )

    def _connect(self, **settings: str) -> session.Link:
        t = self._target
        return session.connect(
            host=t.socket_dir,
            port=t.port,
            user=t.user,
            dbname=t.dbname,
            application_name="harmony-agent",
            settings=settings,
        )

    def write(self) -> str:
        """A message into the WAL, flushed here; blocks as long as that takes. Why it was refused, or "".

        Any role may (pg_logical_emit_message is PUBLIC's); logical decoding shows it, nothing else ever reads it.
        """
        try:
            if self._writer is None:
                self._writer = self._connect(synchronous_commit="local")
            self._writer.execute(_MESSAGE)
        except psycopg.Error as e:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            full = isinstance(e, psycopg.errors.DiskFull)
            what = "THE DISK IS FULL" if full else "the write probe fails"
            return f"{what}: {in_a_line(e, 200)}"
        return ""

    async def checkpoint(self, timeout_s: float) -> str:
        """CHECKPOINT; why it came to nothing, or empty.

        PostgreSQL 15 and newer want membership in pg_checkpoint for it, older ones a superuser.
        """
        if "CHECKPOINT" in self._beside:
            return "the one before has not returned"
        with trio.move_on_after(timeout_s):
            return await trio.to_thread.run_sync(self._alone, "CHECKPOINT", abandon_on_cancel=True)
        return f"not finished within {timeout_s:g} s"

    async def nudge(self, timeout_s: float) -> str:
        """Begin a commit that waits as clients' do; why there was none, or empty. It may still wait on return."""
        if _WAITING in self._beside:
            return ""
        with trio.move_on_after(timeout_s):
            return await trio.to_thread.run_sync(self._alone, _WAITING, abandon_on_cancel=True)
        return ""

    def _alone(self, statements: str) -> str:
        """On a connection of their own, for as long as they take. Why they failed, or "".

        It is for the caller to ask whether the same is under way.
        """
        self._beside.add(statements)
        try:
            with contextlib.closing(self._connect()) as connection:
                for statement in statements.split(";"):
                    connection.execute(statement.encode())
        except psycopg.Error as e:
            return in_a_line(e)
        finally:
            self._beside.discard(statements)
        return ""

    def close(self) -> None:
        """Drop the connection; the next question makes a new one."""
        if self._connection is not None:
            with contextlib.suppress(psycopg.Error):
                self._connection.close()
            self._connection = None


def _walsenders(value: object) -> tuple[Walsender, ...]:
    if not isinstance(value, list):
        return ()
    return tuple(Walsender(str(name), bool(voter), int(flushed)) for name, voter, flushed in value)


def _number(value: object) -> int:
    return int(str(value)) if value is not None else 0
