"""The settings that Harmony owns, as text; and where they go, so that the user's own files stay untouched.

Run by pg_ctl: data_dir/harmony.postgresql.conf is the config_file; it includes the user's postgresql.conf
(in the data directory, or Debian's in /etc/postgresql) and sets ours after it. Run by systemd: the unit
starts PostgreSQL with the user's file, which must include ours at its end; a conf.d folder that it
includes already (Debian's) gets a file that does so. Nothing here starts or signals anything.
"""

from __future__ import annotations

import re
from pathlib import Path

from harmony_fencer.config import FencerConfig
from harmony_fencer.protocol import SyncRule

CONF = "harmony.postgresql.conf"
DROP_IN = "zz-harmony.conf"
OURS = re.compile(r"^\s*(primary_conninfo|synchronous_standby_names)\s*=", re.MULTILINE)
_INCLUDE_DIR = re.compile(r"^\s*include_dir\s*=?\s*'([^']+)'", re.MULTILINE)


def quote(value: str) -> str:
    """A string in postgresql.conf."""
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


def _conninfo(fields: dict[str, str]) -> str:
    return " ".join(
        f"{key}='{value.replace(chr(92), chr(92) * 2).replace(chr(39), chr(92) + chr(39))}'"
        for key, value in fields.items()
    )


def render(c: FencerConfig, primary: str | None, sync: SyncRule) -> str:
    """The whole file."""
    conninfo = ""
    if primary is not None:
        address = c.members[primary]
        fields = {
            "host": address.host,
            "port": str(address.port),
            "user": c.replication_user,
            "application_name": c.node,
            "connect_timeout": "2",
            "keepalives_idle": "2",
            "keepalives_interval": "1",
            "keepalives_count": "3",
        }
        if c.replication_passfile:
            fields["passfile"] = c.replication_passfile
        conninfo = _conninfo(fields)
    names = ""
    if sync.count > 0 and sync.voters:
        names = f"ANY {sync.count} ({', '.join(chr(34) + v + chr(34) for v in sync.voters)})"
    settings = {
        "port": str(c.port),
        "listen_addresses": c.listen_addresses,
        "unix_socket_directories": c.socket_dir,
        "hot_standby": "on",
        "wal_log_hints": "on",
        "recovery_target_timeline": "latest",
        "primary_conninfo": conninfo,
        "synchronous_standby_names": names,
    }
    lines = [
        "# Written by Harmony's fencer at every order; changes here are lost. Yours go into postgresql.conf."
    ]
    if c.run == "pg_ctl":
        lines.append(f"include {quote(c.config_file)}")
    lines += [f"{key} = {quote(value)}" for key, value in settings.items()]
    return "\n".join(lines) + "\n"


def clash(auto_conf: str) -> str | None:
    """A setting in postgresql.auto.conf that would override ours, or None."""
    found = OURS.search(auto_conf)
    return found.group(1) if found else None


def drop_in(c: FencerConfig) -> tuple[Path, str] | None:
    """For run = "systemd": (file, content) that makes the user's configuration read ours; None: it does already.

    Raises ValueError saying which line the user must add, where there is no folder for it.
    """
    line = f"include_if_exists {quote(f'{c.data_dir}/{CONF}')}"
    user = Path(c.config_file)
    text = user.read_text()
    if CONF in text:
        return None
    for folder in _INCLUDE_DIR.findall(text):
        where = user.parent / folder
        if where.is_dir():
            path = where / DROP_IN
            wanted = f"# Written by Harmony's fencer (run = systemd).\n{line}\n"
            return None if path.exists() and path.read_text() == wanted else (path, wanted)
    raise ValueError(
        f"{user} does not read Harmony's settings and includes no folder to put them in: add as its last "
        f"line\n{line}"
    )
