"""The one place that opens SQL sessions to PostgreSQL: each brings all its settings with it.

What postgresql.conf, a database or a role sets is for users' sessions. `default_transaction_isolation = serializable`
makes every query fail on a hot standby, a `search_path` of somebody else's may replace pg_catalog's functions, an
`idle_session_timeout` ends what lasts: none of that may look like a PostgreSQL that does not answer. So a session's
settings are given at its start, where they go before file, database and role. What a database returns is survived,
too: texts come as bytes, in whatever encoding the database is, and become str here, invalid bytes replaced.

It refuses nothing and asks nothing: it opens, and the caller closes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import psycopg
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.types.json import set_json_loads

CONNECT_S = 2
Link = psycopg.Connection[tuple[object, ...]]

# Settings that every version (13 to 18) has and every role may set. Not synchronous_commit: what users' sessions
# have is looked at (agent/settings.py); whoever commits sets it.
SETTINGS: Mapping[str, str] = {
    "role": "none",
    "search_path": "pg_catalog, pg_temp",
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "default_transaction_deferrable": "off",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "row_security": "on",
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "standard_conforming_strings": "on",
    "escape_string_warning": "off",
    "transform_null_equals": "off",
    "array_nulls": "on",
    "quote_all_identifiers": "off",
    "xmloption": "content",
    "jit": "off",
    "max_parallel_workers_per_gather": "0",
    "plan_cache_mode": "auto",
    "client_min_messages": "warning",
    "temp_tablespaces": "",
}
# Those that only some versions have: set where they are known, right after the start.
_NEWER = {
    "idle_session_timeout": "0",
    "transaction_timeout": "0",
    "client_connection_check_interval": "0",
    "debug_parallel_query": "off",
    "force_parallel_mode": "off",
}
_SET_NEWER = (
    "SELECT pg_catalog.set_config(name, value, false) FROM pg_catalog.json_each_text(%s) AS w (name, value) "
    "WHERE name IN (SELECT s.name FROM pg_catalog.pg_settings s)"
)
_TEXTS = (*("text", "varchar", "bpchar", "name", '"char"'), 0, 705)  # no type, and unknown


# What reading an answer may raise beside psycopg.Error, where a value is not what was asked for.
UNREADABLE = (ValueError, TypeError, ArithmeticError, LookupError)


class _Text(Loader):
    """Whatever the database's encoding is; names of Harmony's own are ASCII."""

    def load(self, data: Buffer) -> str:
        return bytes(data).decode("utf-8", "replace")


def _json(data: str | bytes) -> object:
    text = data.decode("utf-8", "replace") if isinstance(data, bytes) else data
    found: object = json.loads(text)
    return found


def options(more: Mapping[str, str]) -> str:
    """libpq's `options` for SETTINGS, `more` going before."""
    return " ".join(f"-c {key}={_escaped(value)}" for key, value in {**SETTINGS, **more}.items())


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace(" ", "\\ ")


def connect(
    *,
    host: str,
    port: int,
    user: str,
    dbname: str,
    application_name: str,
    timeout_s: int = CONNECT_S,
    settings: Mapping[str, str] | None = None,
) -> Link:
    """A session in autocommit; `settings`: of its own, above SETTINGS. Raises psycopg.Error."""
    more = settings or {}
    link = psycopg.connect(
        host=host,
        port=port,
        user=user,
        dbname=dbname,
        connect_timeout=timeout_s,
        autocommit=True,
        application_name=application_name,
        client_encoding="SQL_ASCII",  # nothing is converted: a conversion can fail
        target_session_attrs="any",
        options=options(more),
    )
    try:
        for kind in _TEXTS:
            link.adapters.register_loader(kind, _Text)
        set_json_loads(_json, link)
        wanted = json.dumps({key: value for key, value in _NEWER.items() if key not in more})
        link.execute(_SET_NEWER, (wanted,))
    except BaseException:
        link.close()
        raise
    return link
