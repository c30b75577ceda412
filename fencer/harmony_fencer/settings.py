"""The settings that Harmony owns, as text; and where they go, so that the user's own files stay untouched.

Run by pg_ctl: data_dir/harmony.postgresql.conf is the config_file; it includes the user's postgresql.conf
(in the data directory, or Debian's in /etc/postgresql) and sets ours after it. Run by systemd: the unit
starts PostgreSQL with the user's file, which must include ours at its end; a conf.d folder that it
includes already (Debian's) gets a file that does so. One that runs since before Harmony, and is to be run by
pg_ctl, reads the user's file until its next start: this must include ours, too, without the way back
(harmony.included.conf: the other would include it in turn). Of max_slot_wal_keep_size and wal_retrieve_retry_interval
the user's value counts, where there is one. Nothing here starts or signals anything.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harmony_fencer.config import FencerConfig
from harmony_fencer.protocol import SyncRule

CONF = "harmony.postgresql.conf"
INCLUDED = "harmony.included.conf"
DROP_IN = "zz-harmony.conf"
WRITTEN = (CONF, INCLUDED, DROP_IN)
OWN_ALWAYS = ("primary_conninfo", "synchronous_standby_names")  # whatever their value
OURS = re.compile(rf"^\s*({'|'.join(OWN_ALWAYS)})\s*=", re.MULTILINE)
_INCLUDE_DIR = re.compile(r"\s*include_dir\s*=?\s*'([^']+)'")
_INCLUDES = re.compile(r"\s*include(?:_if_exists)?\s*=?\s*'([^']+)'")
_INCLUDE = re.compile(r"\s*(include|include_if_exists|include_dir)\s*=?\s*'([^']+)'")
_KEEP = "max_slot_wal_keep_size"
_RETRY = "wal_retrieve_retry_interval"
_RETRY_AFTER = "500ms"  # by default 5 s: so long who leads again in place would wait for its standbys
_DEEPEST = 10  # files that include files; PostgreSQL's own limit
_LEAST_MB, _UNKNOWN_MB, _DISK_SHARE = 64, 1024, 10
_LEAST_WAIT_S, _POSTGRES_WAIT_S = 10, 60
_SYNCS_SLOTS = 17  # the first version that copies logical slots to standbys
_SETTING = re.compile(r"\s*(\w+)(?:\s*=\s*|\s+)('(?:[^']|'')*'|[^\s#']+)")


@dataclass(frozen=True, slots=True)
class Source:
    """Whom a standby follows; `slot`: through its own slot there."""

    primary: str | None
    slot: bool = False
    timeline: str = "latest"


def slot_name(node: str) -> str:
    """The replication slot of a member, on every other member: the agents make it (harmony/core/slots.py)."""
    return "harmony_member_" + node.replace("-", "_")


def quote(value: str) -> str:
    """A string in postgresql.conf."""
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


def _conninfo(fields: dict[str, str]) -> str:
    return " ".join(
        f"{key}='{value.replace(chr(92), chr(92) * 2).replace(chr(39), chr(92) + chr(39))}'"
        for key, value in fields.items()
    )


def conninfo(c: FencerConfig, primary: str) -> str:
    """How this node reaches a member's PostgreSQL."""
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
    return _conninfo(fields)


def _until_dead(c: FencerConfig) -> str:
    """For primary_conninfo: how long the primary waits for a standby's answer. A power cut closes no connection:
    until the primary gives it up, it holds the standby's slot, and who comes back is turned away."""
    wait_s = min(max(_LEAST_WAIT_S, math.ceil(c.lease_s)), _POSTGRES_WAIT_S)
    return " " + _conninfo({"options": f"-c wal_sender_timeout={wait_s}s"})


def _same_always(c: FencerConfig) -> dict[str, str]:
    listens = {"listen_addresses": c.listen_addresses} if c.listen_addresses is not None else {}
    return listens | {
        "port": str(c.port),
        "unix_socket_directories": c.socket_dir,
        "hot_standby": "on",
        "wal_log_hints": "on",
        "recovery_target_timeline": "latest",
    }


def names(c: FencerConfig, sync: SyncRule | None) -> str:
    """synchronous_standby_names. None: every commit waits.

    So it is on every standby where commits are synchronous at all. From a start without names on, commits would go on
    waiting for nobody after a promotion until the checkpointer has read the new ones (in an fsync: minutes);
    and who is promoted by hand acknowledges nothing.
    """
    if sync is None:
        return 'ANY 32 ("harmony: nobody")' if c.synchronous else ""
    if not sync.count:
        return ""
    return f"ANY {sync.count} ({', '.join(chr(34) + v + chr(34) for v in sync.voters)})"


def _keep_mb(c: FencerConfig, data: Path) -> int:
    """The most WAL that a slot may hold back, in MB: as configured, else a tenth of the disk that pg_wal is on."""
    if c.slots.keep_mb:
        return c.slots.keep_mb
    try:
        disk = os.statvfs(data / "pg_wal")
    except OSError:
        return _UNKNOWN_MB  # some bound is better than none, and than no order carried out
    return max(_LEAST_MB, disk.f_blocks * disk.f_frsize // 2**20 // _DISK_SHARE)


def texts(file: Path, depth: int = 0) -> Iterator[str]:
    """The lines of a configuration file and of what it includes; what cannot be read is PostgreSQL's to refuse."""
    try:
        lines = file.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        yield line
        found = _INCLUDE.match(line)
        if found is None or depth >= _DEEPEST:
            continue
        place = file.parent / found.group(2)
        inner = sorted(place.glob("*.conf")) if found.group(1) == "include_dir" else [place]
        for one in inner:
            if one.name not in WRITTEN:
                yield from texts(one, depth + 1)


def _user_sets(c: FencerConfig, key: str) -> bool:
    settings = (_SETTING.match(line) for line in texts(Path(c.config_file)))
    return any(found is not None and found.group(1).lower() == key for found in settings)


def _unless_the_user_does(c: FencerConfig, data: Path) -> dict[str, str]:
    """What counts only where no file of the user's sets it. (ALTER SYSTEM's is read last, and counts anyway.)"""
    settings = {_RETRY: _RETRY_AFTER}
    if c.slots.own:
        settings[_KEEP] = f"{_keep_mb(c, data)}MB"
    return {key: value for key, value in settings.items() if not _user_sets(c, key)}


def _of_slots(c: FencerConfig, source: Source, data: Path) -> dict[str, str]:
    if not c.slots.own:
        return {}
    settings = {"primary_slot_name": slot_name(c.node) if source.primary is not None and source.slot else ""}
    version = (data / "PG_VERSION").read_text().strip()
    if c.slots.synced and int(version.split(".")[0]) >= _SYNCS_SLOTS:
        settings |= {"sync_replication_slots": "on", "hot_standby_feedback": "on"}
    return settings


def render(c: FencerConfig, source: Source, sync: SyncRule | None, data: Path, *, name: str = CONF) -> str:
    """The whole file of that name, for the data directory `data`."""
    reach = conninfo(c, source.primary) + _until_dead(c) if source.primary is not None else ""
    of_slots = _of_slots(c, source, data)
    if reach and "sync_replication_slots" in of_slots:
        reach += " dbname='postgres'"  # PostgreSQL's slot sync worker asks there; a walreceiver does not look at it
    settings = {**_same_always(c), "primary_conninfo": reach, "synchronous_standby_names": names(c, sync)}
    settings |= {"recovery_target_timeline": source.timeline, **of_slots}
    lines = [
        "# Written by Harmony's fencer at every order; changes here are lost. Yours go into postgresql.conf."
    ]
    lines += [f"{key} = {quote(value)}" for key, value in _unless_the_user_does(c, data).items()]
    if c.run == "pg_ctl" and name == CONF:
        lines.append(f"include {quote(c.config_file)}")
    lines += [f"{key} = {quote(value)}" for key, value in settings.items()]
    return "\n".join(lines) + "\n"


def clash(auto_conf: str) -> str | None:
    """A setting in postgresql.auto.conf that would override ours, or None."""
    found = OURS.search(auto_conf)
    return found.group(1) if found else None


def drop_in(c: FencerConfig, name: str = CONF) -> tuple[Path, str] | None:
    """(file, content) that makes the user's configuration read ours, `name`; None: it does already.

    Raises ValueError saying which line the user must add, where there is no folder for it, or take away, where
    one sets a setting of Harmony's once more: PostgreSQL takes the last. (Files that are included by name after
    ours are not looked into.)
    """
    line = f"include_if_exists {quote(f'{c.data_dir}/{name}')}"
    user = Path(c.config_file)
    lines = user.read_text(errors="surrogateescape").splitlines()
    for number, text in reversed(list(enumerate(lines, 1))):
        included = _INCLUDES.match(text)
        if included is not None and Path(included.group(1)).name == name:
            _refuse_later(c, user, number)
            return None
    for number, text in enumerate(lines, 1):
        found = _INCLUDE_DIR.match(text)
        if found is not None and (user.parent / found.group(1)).is_dir():
            path = user.parent / found.group(1) / DROP_IN
            for other in sorted(path.parent.glob("*.conf")):
                if other.name > DROP_IN:
                    _refuse_later(c, other)
            _refuse_later(c, user, number)
            wanted = f"# Written by Harmony's fencer (run = systemd).\n{line}\n"
            return (
                None
                if path.exists() and path.read_text(errors="surrogateescape") == wanted
                else (path, wanted)
            )
    raise ValueError(
        f"{user} does not read Harmony's settings and includes no folder to put them in: add as its last "
        f"line\n{line}"
    )


def _refuse_later(c: FencerConfig, file: Path, after: int = 0) -> None:
    """Raises ValueError for a line beyond `after` that sets what Harmony owns, unless to the same value."""
    same_always = _same_always(c)
    for number, text in enumerate(file.read_text(errors="surrogateescape").splitlines(), 1):
        found = _SETTING.match(text)
        if found is None or number <= after:
            continue
        key, value = found.group(1).lower(), found.group(2).strip("'")
        if key in OWN_ALWAYS or same_always.get(key, value) != value:
            raise ValueError(
                f"{file}, line {number}, sets {key} after Harmony's settings have been read, and would override "
                "them: delete it, or move it further up"
            )
