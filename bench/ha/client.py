"""A writer of numbered rows, a process of its own; its file is all that the failover bench measures by.

    python -m bench.ha.client --out FILE --first ID [--at NAME] [--patience S] [--pause S] CONNINFO

Each acknowledged row is a line `A id sent acked host timeline` at once, CLOCK_BOOTTIME nanoseconds, where `host` is
NAME or the host of libpq's list that answered, and `timeline` PostgreSQL's as it wrote it; each row that was refused or
not answered `R time id`, each failed connection `R time`. A row is never sent twice, a statement
never cancelled: one that is not answered within `patience` is unknown, and its connection given up.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TextIO

from psycopg import pq
from psycopg.pq import abc

from harmony.demo.client import acknowledged, boottime_ns, connect_blocking

# A promotion begins a new timeline: it tells whose history the row is in, whoever else is a primary.
TIMELINE = b"('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int"
WRITE = b"INSERT INTO bench (id) VALUES ($1) RETURNING " + TIMELINE
RECONNECT_PAUSE_S = 0.05


def host_of(connection: abc.PGconn, at: str) -> str:
    """Who answers: NAME, or libpq's own word for it."""
    return at or connection.host.decode()


def run(conninfo: str, out: TextIO, first: int, at: str, patience_s: float, pause_s: float) -> None:
    """Write until killed."""
    connection: abc.PGconn | None = None
    number = first
    while True:
        if connection is None:
            connection = connect_blocking(conninfo)
            if connection is None:
                out.write(f"R {boottime_ns()}\n")
                time.sleep(RECONNECT_PAUSE_S)
                continue
        number += 1
        sent = boottime_ns()
        returned: list[str] = []
        outcome = acknowledged(connection, WRITE, number, patience_s, returned)
        if outcome:
            out.write(f"A {number} {sent} {boottime_ns()} {host_of(connection, at)} {returned[-1]}\n")
        else:
            out.write(f"R {boottime_ns()} {number}\n")
        # A local writer keeps asking a standby on one connection; the client looks for the primary anew.
        if outcome is None or (outcome is False and not at) or connection.status != pq.ConnStatus.OK:
            connection.finish()
            connection = None
        time.sleep(pause_s if outcome else max(pause_s, RECONNECT_PAUSE_S))


def main() -> None:
    """Parse, and write until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--at", default="")
    parser.add_argument("--patience", type=float, default=1.0)
    parser.add_argument("--pause", type=float, default=0.005)
    parser.add_argument("conninfo")
    given = parser.parse_args()
    with given.out.open("w", buffering=1) as out:
        run(given.conninfo, out, given.first, given.at, given.patience, given.pause)


if __name__ == "__main__":
    main()
