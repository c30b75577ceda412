"""Whether the old primary is back: a standby that streams from the new primary, and shows what that wrote since.

It only looks, by SQL; Harmony brings the node back by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import psycopg

from harmony.demo.cluster import Cluster

LOOK_S = 0.25
CONNECT = " connect_timeout=2"


def is_back(cluster: Cluster, old: str, new: str, row: int) -> bool:
    """Whether `old` is read-only, `new` streams to it, and it shows the row, acknowledged after the fault was over."""
    try:
        with psycopg.connect(cluster.conninfo(new, "postgres") + CONNECT, autocommit=True) as link:
            streams = link.execute(
                "SELECT 1 FROM pg_stat_replication WHERE application_name = %s AND state = 'streaming'",
                (old,),
            ).fetchone()
        with psycopg.connect(cluster.conninfo(old, "postgres") + CONNECT, autocommit=True) as link:
            shown = link.execute(
                "SELECT pg_is_in_recovery() AND EXISTS (SELECT FROM harmony_demo WHERE id = %s)", (row,)
            ).fetchone()
    except psycopg.Error:
        return False
    return streams is not None and shown is not None and shown[0] is True


def await_back(
    cluster: Cluster, old: str, new: str, row: int, limit_s: float, pause: Callable[[], None]
) -> bool:
    """Look now and then, `limit_s` at most; `pause` lets the client go on meanwhile."""
    began = looked = time.monotonic()
    while time.monotonic() - began < limit_s:
        pause()
        if time.monotonic() - looked >= LOOK_S:
            if is_back(cluster, old, new, row):
                return True
            looked = time.monotonic()
    return False
