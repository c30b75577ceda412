"""Read-only SQL questions to the local PostgreSQL, in a thread, one at a time, each with a deadline.

It changes nothing in the database but for a message in the WAL that nobody reads (`nudge`). A question that hangs
is left behind, and no other is asked until it has returned: so at most one thread is ever lost to a frozen server, one
to a checkpoint and one to a nudge, which have connections of their own.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import psycopg
import trio

from harmony.core.messages import DbSeen, DbSilent, Walsender

_QUESTION = """
SELECT pg_is_in_recovery(),
       CASE WHEN pg_is_in_recovery() THEN COALESCE(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn())
            ELSE pg_current_wal_flush_lsn() END - '0/0'::pg_lsn,
       COALESCE(pg_last_wal_replay_lsn() - '0/0'::pg_lsn, 0),
       (SELECT max(('x' || left(name, 8))::bit(32)::int) FROM pg_ls_waldir()
         WHERE name ~ '^[0-9A-F]{24}$'),
       EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming'),
       (SELECT system_identifier::text FROM pg_control_system()),
       current_setting('synchronous_standby_names'),
       COALESCE((SELECT json_agg(json_build_array(application_name, sync_priority > 0, flush_lsn - '0/0'::pg_lsn))
                   FROM pg_stat_replication WHERE state = 'streaming' AND flush_lsn IS NOT NULL), '[]'),
       EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep')
"""


@dataclass(frozen=True)
class Target:
    """Where the local PostgreSQL listens. `library_dir` is the server's matter, not ours."""

    socket_dir: str
    port: int
    user: str
    dbname: str


class Probe:
    """`await ask(now, timeout_s)`: a DbSeen dated `now` (CLOCK_BOOTTIME ns, taken before), or DbSilent."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._connection: psycopg.Connection[tuple[object, ...]] | None = None
        self._busy = False
        self._checkpointing = False
        self._nudging = False

    async def ask(self, now_ns: int, timeout_s: float) -> DbSeen | DbSilent:
        if self._busy:
            return DbSilent("the previous question is still unanswered: PostgreSQL hangs")
        with trio.move_on_after(timeout_s):
            return await trio.to_thread.run_sync(self._ask, now_ns, abandon_on_cancel=True)
        return DbSilent(f"no answer within {timeout_s:g} s")

    def _ask(self, now_ns: int) -> DbSeen | DbSilent:
        self._busy = True
        try:
            return self._query(now_ns)
        except psycopg.Error as e:
            self.close()
            return DbSilent(" ".join(str(e).split())[:300])
        finally:
            self._busy = False

    def _query(self, now_ns: int) -> DbSeen | DbSilent:
        if self._connection is None:
            self._connection = self._connect()
        row = self._connection.execute(_QUESTION).fetchone()
        if row is None:
            return DbSilent("PostgreSQL gave no row")
        recovering, received, replayed, timeline, streaming, system_identifier, names, senders, waiting = row
        # On a standby that has just started nothing was received yet: what it has replayed it also has.
        position = max(_number(received), _number(replayed))
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
            waiting=bool(waiting),
        )

    def _connect(self) -> psycopg.Connection[tuple[object, ...]]:
        t = self._target
        return psycopg.connect(
            host=t.socket_dir,
            port=t.port,
            user=t.user,
            dbname=t.dbname,
            connect_timeout=2,
            autocommit=True,
            application_name="harmony-agent",
        )

    async def checkpoint(self, timeout_s: float) -> str:
        """CHECKPOINT; why it came to nothing, or empty.

        PostgreSQL 15 and newer want membership in pg_checkpoint for it, older ones a superuser.
        """
        if self._checkpointing:
            return "the one before has not returned"
        with trio.move_on_after(timeout_s):
            return await trio.to_thread.run_sync(self._checkpoint, abandon_on_cancel=True)
        return f"not finished within {timeout_s:g} s"

    def _checkpoint(self) -> str:
        self._checkpointing = True
        try:
            with contextlib.closing(self._connect()) as connection:
                connection.execute("CHECKPOINT")
        except psycopg.Error as e:
            return " ".join(str(e).split())[:300]
        finally:
            self._checkpointing = False
        return ""

    async def nudge(self, timeout_s: float) -> str:
        """Begin a commit that waits as clients' do; why there was none, or empty. It may still wait on return."""
        if self._nudging:
            return ""
        with trio.move_on_after(timeout_s):
            return await trio.to_thread.run_sync(self._nudge, abandon_on_cancel=True)
        return ""

    def _nudge(self) -> str:
        self._nudging = True
        try:
            with contextlib.closing(self._connect()) as connection:
                connection.execute("SET synchronous_commit = on")
                connection.execute("SELECT pg_logical_emit_message(true, 'harmony', '')")
        except psycopg.Error as e:
            return " ".join(str(e).split())[:300]
        finally:
            self._nudging = False
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
