"""The demo's clients, each a process of its own: the writer of numbered rows, and a prober for every node.

They record what was acknowledged and when; they judge nothing, retry no row, and never cancel a statement.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

import psycopg
from psycopg import pq
from psycopg.pq import abc

ACK_TIMEOUT_S = 1.0
PROBE_TIMEOUT_S = 0.3
WRITE_PAUSE_S = 0.005
PROBE_PAUSE_S = 0.02
RECONNECT_PAUSE_S = 0.05
WRITE = b"INSERT INTO harmony_demo (id) VALUES ($1)"
PROBE = b"INSERT INTO harmony_demo_probe (id) VALUES ($1)"


def boottime_ns() -> int:
    """CLOCK_BOOTTIME, nanoseconds: the one clock that all recordings share."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _wait(fd: int, for_write: bool, deadline: float) -> bool:
    left = deadline - time.monotonic()
    if left <= 0:
        return False
    poller = select.poll()
    poller.register(fd, select.POLLOUT if for_write else select.POLLIN)
    return bool(poller.poll(left * 1000))


def connect_quickly(conninfo: str, timeout_s: float) -> abc.PGconn | None:
    """Connect to one host within `timeout_s` (libpq's own connect_timeout cannot be under 2 s)."""
    deadline = time.monotonic() + timeout_s
    connection = pq.PGconn.connect_start(conninfo.encode())
    writing = True
    for _ in range(100):
        if connection.status == pq.ConnStatus.BAD or not _wait(connection.socket, writing, deadline):
            break
        step = connection.connect_poll()
        if step == pq.PollingStatus.OK:
            connection.nonblocking = 1
            return connection
        if step == pq.PollingStatus.FAILED:
            break
        writing = step == pq.PollingStatus.WRITING
    connection.finish()
    return None


def connect_blocking(conninfo: str) -> abc.PGconn | None:
    """Connect by libpq's own multi-host search (PQconnectdb), bounded by connect_timeout for each host."""
    connection = pq.PGconn.connect(conninfo.encode())
    if connection.status != pq.ConnStatus.OK:
        connection.finish()
        return None
    connection.nonblocking = 1
    return connection


def acknowledged(
    connection: abc.PGconn,
    statement: bytes,
    number: int,
    timeout_s: float,
    returned: list[str] | None = None,
) -> bool | None:
    """Write one row: True acknowledged, False refused by the server, None unknown (dead or too late).

    An acknowledgement that comes with a warning is unknown: so PostgreSQL says 'committed here only'.
    `returned` takes what the statement's RETURNING said, its first column.
    """
    deadline = time.monotonic() + timeout_s
    warned: list[bool] = []
    connection.notice_handler = lambda _result: warned.append(True)
    try:
        connection.send_query_params(statement, [str(number).encode()])
        while connection.flush():
            if not _wait(connection.socket, True, deadline):
                return None
        outcome: bool | None = None
        for _ in range(100):  # results of one statement; the last one stands only after ReadyForQuery
            while connection.is_busy():
                if not _wait(connection.socket, False, deadline):
                    return None
                connection.consume_input()
            result = connection.get_result()
            if result is None:
                break
            outcome = result.status in {pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK}
            if returned is not None and result.ntuples:
                returned.append((result.get_value(0, 0) or b"").decode())
    except psycopg.OperationalError:
        return None
    if connection.status != pq.ConnStatus.OK or (outcome and warned):
        return None
    return outcome


def _stop_at_end_of_input(stop: threading.Event) -> None:
    """The demo closes our standard input to stop us; its death does so too."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    stop.set()


def _record(out: TextIO, number: int, sent: int, connection: abc.PGconn) -> None:
    out.write(f"A {number} {sent} {boottime_ns()} {connection.port.decode()}\n")


def run(conninfo: str, statement: bytes, probing: bool, out: TextIO, stop: threading.Event) -> None:
    """Write rows until told to stop; every acknowledged one is a line in `out` at once."""
    connection: abc.PGconn | None = None
    number = 0
    timeout_s = PROBE_TIMEOUT_S if probing else ACK_TIMEOUT_S
    while not stop.is_set():
        if connection is None:
            connection = connect_quickly(conninfo, timeout_s) if probing else connect_blocking(conninfo)
            if connection is None:
                out.write(f"R {boottime_ns()}\n")
                stop.wait(PROBE_PAUSE_S if probing else RECONNECT_PAUSE_S)
                continue
        number += 1
        sent = boottime_ns()
        outcome = acknowledged(connection, statement, number, timeout_s)
        if outcome:
            _record(out, number, sent, connection)
        elif outcome is False:
            out.write(f"R {boottime_ns()}\n")
        if outcome is None or (outcome is False and not probing):
            connection.finish()
            connection = None
        stop.wait(PROBE_PAUSE_S if probing else WRITE_PAUSE_S)
    if connection is not None:
        connection.finish()


def main() -> None:
    """`python -I -m harmony.demo.client --out FILE [--probe] CONNINFO`; ends when standard input does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--probe", action="store_true")
    parser.add_argument("conninfo")
    arguments = parser.parse_args()
    stop = threading.Event()
    threading.Thread(target=_stop_at_end_of_input, args=(stop,), daemon=True).start()
    with arguments.out.open("w", buffering=1) as out:
        run(arguments.conninfo, PROBE if arguments.probe else WRITE, arguments.probe, out, stop)
    sys.exit(0)


if __name__ == "__main__":
    main()
