"""A client that writes all the time, from outside a test host's cgroup: it goes on while the host stands still.

Every acknowledged commit is kept with CLOCK_BOOTTIME and the era it belongs to: the postmaster that gave it. What a
fence must end is the old era's writes; what comes after it is another postmaster's.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import psycopg

from tests import pace
from tests.hosts.host import Host, HostError

CLIENTS = 4
PAUSE_S = 0.004
AGAIN_S = 0.1
FIRST_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Commit:
    """One acknowledgement, in seconds of CLOCK_BOOTTIME; `era` is the postmaster's start, as the database says it."""

    at_s: float
    era: str


@dataclass(frozen=True)
class Written:
    """All acknowledgements, in order."""

    commits: list[Commit]

    def eras(self) -> list[str]:
        """The postmasters that acknowledged anything, in order."""
        return list(dict.fromkeys(c.era for c in self.commits))

    def first_s(self, era: str) -> float:
        """When an era's first commit was acknowledged."""
        return next(c.at_s for c in self.commits if c.era == era)

    def last_s(self, era: str) -> float:
        """When an era's last commit was acknowledged."""
        return next(c.at_s for c in reversed(self.commits) if c.era == era)

    def longest_gap_s(self, since_s: float = 0.0) -> float:
        """The longest time without any acknowledgement that ended after `since_s`."""
        return max((b.at_s - a.at_s for a, b in pairwise(self.commits) if b.at_s > since_s), default=0.0)


def now_s() -> float:
    """The clock that all figures are on."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Writer:
    """Of one host, while it runs. `stop` returns what was acknowledged."""

    def __init__(self, host: Host, *, port: int = 5432, address: str = "127.0.0.1") -> None:
        assert host.leader is not None, "it writes to a running host"
        conninfo = f"host={address} port={port} user=app dbname=postgres sslmode=disable connect_timeout=5"
        enter = ["nsenter", "-t", str(host.leader), "-n", "--"]
        self._process = subprocess.Popen(
            [*enter, sys.executable, "-m", "tests.hosts.writer", conninfo],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._commits: list[Commit] = []
        self._first = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._first.wait(FIRST_TIMEOUT_S):
            self.stop()
            raise HostError(f"{host.name}: nothing could be written within {FIRST_TIMEOUT_S:g} s")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            at_ns, _, era = line.rstrip("\n").partition(" ")
            self._commits.append(Commit(int(at_ns) / 1e9, era))
            self._first.set()

    def so_far(self) -> Written:
        """What has been acknowledged until now."""
        return Written(sorted(self._commits, key=lambda c: c.at_s))

    def wait_for_commit(self, since_s: float, timeout: float = 30.0) -> float:
        """Wait for a commit acknowledged after `since_s`; returns when that was."""
        deadline = time.monotonic() + pace.wait_s(timeout)
        while time.monotonic() < deadline:
            last = self._commits[-1].at_s
            if last > since_s:
                return last
            time.sleep(0.01)
        raise HostError(f"nothing was written within {timeout:g} s")

    def stop(self) -> Written:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(5)
        self._reader.join(5)
        self._process.stdout.close()
        return self.so_far()


@contextlib.contextmanager
def writing(host: Host, *, port: int = 5432) -> Iterator[Writer]:
    """A writer for as long as the block runs."""
    writer = Writer(host, port=port)
    try:
        yield writer
    finally:
        writer.stop()


def _client(conninfo: str) -> None:
    while True:
        try:
            with psycopg.connect(conninfo, autocommit=True) as connection:
                row = connection.execute("SELECT pg_postmaster_start_time()::text").fetchone()
                era = str(row[0]).replace(" ", "T") if row else ""
                while True:
                    connection.execute("INSERT INTO harmony_demo (id) VALUES (%s)", (secrets.randbits(62),))
                    at_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
                    os.write(1, f"{at_ns} {era}\n".encode())  # whole lines, whoever else writes
                    time.sleep(PAUSE_S)
        except psycopg.Error:
            time.sleep(AGAIN_S)


def main() -> None:
    """Write until stdin is closed."""
    for _ in range(CLIENTS):
        threading.Thread(target=_client, args=(sys.argv[1],), daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
