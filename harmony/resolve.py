"""What the three processes are started with: a valid configuration held against this machine.

It looks (users, PostgreSQL's programs, the data directory, its configuration file) and changes nothing.
"""

from __future__ import annotations

import os
import pwd
import re
import stat
from pathlib import Path

import msgspec

from harmony import config_times, listening
from harmony.config import Config
from harmony.config_places import inside_data
from harmony.errors import ConfigError
from harmony.mounts import is_mount

LOGICAL_SLOTS_FROM = 17  # failover slots


def _user(name: str | None, place: str, problems: list[str]) -> tuple[int, int]:
    if name is None:
        return os.getuid(), os.getgid()
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        problems.append(f"{place}: no such user: {name}")
        return -1, -1
    if os.geteuid() not in {0, entry.pw_uid}:
        problems.append(f"{place}: {name}: only root can start a process as another user")
    return entry.pw_uid, entry.pw_gid


def _ids(name: str | None) -> dict[str, object] | None:
    """Whom PostgreSQL runs as, in numbers: the fencer must never have to ask a name service."""
    if name is None or os.geteuid() != 0:
        return None
    entry = pwd.getpwnam(name)
    groups = os.getgrouplist(name, entry.pw_gid)
    return {"uid": entry.pw_uid, "gid": entry.pw_gid, "groups": groups}


def _major(data_dir: str) -> str:
    try:
        return (Path(data_dir) / "PG_VERSION").read_text(errors="replace").strip()
    except OSError:
        return ""


def find_bin_dir(data_dir: str, root: str = "/usr/lib/postgresql") -> str | None:
    """Debian's PostgreSQL of the data directory's major version (the newest of all without one)."""
    wanted = _major(data_dir)
    found = [
        p
        for p in Path(root).glob("*/bin")
        if re.match(r"\d+(\.\d+)?\Z", p.parent.name)
        and (p / "postgres").exists()
        and wanted in {"", p.parent.name}
    ]
    return str(max(found, key=lambda p: float(p.parent.name))) if found else None


_DATA_DIRECTORY = re.compile(r"^\s*data_directory\s*=?\s*'([^']+)'", re.MULTILINE)


def find_config_file(data_dir: str, root: str = "/etc/postgresql") -> str | None:
    """The user's postgresql.conf: in the data directory, else Debian's that names it (ROOT/15/main/…)."""
    inside = Path(data_dir) / "postgresql.conf"
    if inside.exists():
        return str(inside)
    for path in sorted(Path(root).glob("*/*/postgresql.conf")):
        try:
            named = _DATA_DIRECTORY.findall(path.read_text(errors="replace"))
        except OSError:
            continue
        if named and Path(named[-1]).resolve() == Path(data_dir).resolve():
            return str(path)
    return None


def _to_be_made(c: Config) -> str | None:
    """postgresql.conf of a data directory that is missing or empty, and that Harmony makes."""
    try:
        empty = not os.listdir(c.postgresql.data_dir)
    except FileNotFoundError:
        empty = True
    except OSError:
        empty = False
    return f"{c.postgresql.data_dir}/postgresql.conf" if empty and c.bootstrap.method != "none" else None


def _sql(c: Config, problems: list[str]) -> str:
    """What is run in a new cluster; checked by PostgreSQL only then."""
    file = c.bootstrap.sql_file
    if file is None:
        return ""
    try:
        return Path(file).read_text()
    except (OSError, UnicodeDecodeError) as e:
        problems.append(f"bootstrap.sql_file: {file}: {e}")
        return ""


def remarks(c: Config) -> list[str]:
    """What keeps Harmony from nothing today, and will matter at a node's way back."""
    data = Path(c.postgresql.data_dir).resolve()
    found = []
    if is_mount(data):
        found.append(
            f"postgresql.data_dir: {data} is a mount point: an old primary cannot come back by itself, neither by "
            "pg_rewind nor by a copy; put the data directory one level below it"
        )
    if is_mount(data / "pg_wal"):
        found.append(
            f"postgresql.data_dir: {data}/pg_wal is a mount point: where pg_rewind cannot help, a copy has to be made "
            "by hand (pg_basebackup --waldir)"
        )
    return found


def warnings(c: Config) -> list[str]:
    """What works, and perhaps is not meant on this host."""
    found = []
    if c.agent.user is None and os.geteuid() == 0:
        found.append("agent.user: not set: the agent runs as root, and needs no more than an ordinary user")
    config_file = c.postgresql.config_file or find_config_file(c.postgresql.data_dir) or _to_be_made(c)
    found += listening.warnings(c, config_file) if config_file is not None else []
    return found + remarks(c)


def resolve(c: Config) -> dict[str, dict[str, object]]:
    """What the three processes are started with. Raises ConfigError where the machine does not fit."""
    problems: list[str] = []
    p = c.postgresql
    agent_uid, agent_gid = _user(c.agent.user, "agent.user", problems)
    postgres_uid, _ = _user(p.user, "postgresql.user", problems)
    if p.user is None and os.geteuid() == 0:
        problems.append("postgresql.user: missing; PostgreSQL refuses to run as root, name its user")
    try:
        data = Path(p.data_dir).stat()
        if not stat.S_ISDIR(data.st_mode):
            problems.append(f"postgresql.data_dir: {p.data_dir} is no directory")
        elif postgres_uid >= 0 and data.st_uid != postgres_uid:
            problems.append(
                f"postgresql.data_dir: {p.data_dir} belongs to uid {data.st_uid}, PostgreSQL runs as uid "
                f"{postgres_uid} ({p.user or 'our own user'}); set postgresql.user, or chown the directory"
            )
    except FileNotFoundError as e:
        if c.bootstrap.method == "none":
            problems.append(
                f"postgresql.data_dir: {p.data_dir}: {e.strerror}; initdb or restore it first, or set bootstrap.method"
            )
    except OSError as e:
        problems.append(f"postgresql.data_dir: {p.data_dir}: {e.strerror}")
    problems += inside_data(msgspec.to_builtins(c), os.path.realpath)  # symlinks may lead there
    config_file = p.config_file or find_config_file(p.data_dir) or _to_be_made(c)
    sql = _sql(c, problems)
    if config_file is None:
        problems.append(
            f"postgresql.config_file: no postgresql.conf in {p.data_dir}, and none in /etc/postgresql names it "
            "as its data_directory; set it"
        )
    bin_dir = p.bin_dir or find_bin_dir(p.data_dir)
    if bin_dir is None:
        version = f" {_major(p.data_dir)}".rstrip()
        problems.append(
            f"postgresql.bin_dir: no PostgreSQL{version} found under /usr/lib/postgresql; name its folder"
        )
    else:
        problems.extend(
            f"postgresql.bin_dir: {bin_dir} has no {program}"
            for program in ("postgres", "pg_ctl", "pg_controldata")
            if not (Path(bin_dir) / program).exists()
        )
    major = _major(p.data_dir)
    if c.replication.logical_slots and major.isdecimal() and int(major) < LOGICAL_SLOTS_FROM:
        problems.append(
            f"replication.permanent_slots: logical ones survive a failover from PostgreSQL {LOGICAL_SLOTS_FROM} on, "
            f"this is {major}: take them out and make them by hand after each failover, or upgrade"
        )
    if problems:
        raise ConfigError(problems)
    s = c.supervisor
    ping_interval_s, ping_timeout_s = config_times.pings(
        c.timing.lease_s, s.ping_timeout_s, s.ping_interval_s
    )
    return {
        "supervisor": {
            "node": c.node.name,
            "run_dir": c.node.run_dir,
            "state_dir": c.node.state_dir,
            "agent_user": c.agent.user,
            "ping_interval_s": ping_interval_s,
            "ping_timeout_s": ping_timeout_s,
            "fence_timeout_s": c.timing.fence_timeout_s,
            "log_format": c.log.format,
        },
        "fencer": {
            "node": c.node.name,
            "agent_uid": agent_uid,
            "agent_gid": agent_gid,
            "postgres_ids": _ids(p.user),
            "data_dir": str(Path(p.data_dir).resolve()),
            "config_file": str(Path(config_file).resolve()) if config_file is not None else "",
            "run": p.run,
            "unit": p.unit or "",
            "cgroup": p.cgroup,
            "bin_dir": bin_dir,
            "library_dir": p.library_dir,
            "port": c.members[c.node.name].port,
            "listen_addresses": p.listen_addresses,
            "socket_dir": p.socket_dir,
            "members": msgspec.to_builtins(c.members),
            "replication_user": p.replication_user,
            "replication_passfile": p.replication_passfile,
            "lease_s": c.timing.lease_s,
            "fence_timeout_s": c.timing.fence_timeout_s,
            "start_timeout_s": p.start_timeout_s,
            "watchdog_mode": c.watchdog.mode,
            "watchdog_device": c.watchdog.device,
            "watchdog_timeout_s": float(c.watchdog.timeout_s),
            "state_dir": c.node.state_dir,
            "run_dir": c.node.run_dir,
            "log_format": c.log.format,
            "bootstrap": {
                "method": c.bootstrap.method,
                "command": c.bootstrap.command or "",
                "timeout_s": c.bootstrap.timeout_s,
                "initdb_options": c.bootstrap.initdb_options,
                "hba": c.bootstrap.hba,
                "sql": sql,
            },
            "synchronous": c.replication.mode != "off",
            "rejoin": {
                "clone": c.rejoin.clone,
                "keep_old": c.rejoin.keep_old,
                "keep_old_mb": c.rejoin.keep_old_mb,
                "keep_free_mb": c.rejoin.keep_free_mb,
            },
            "slots": {
                "own": c.replication.slots,
                "keep_mb": c.replication.slot_wal_keep_mb,
                "synced": c.replication.logical_slots,
            },
        },
        "agent": msgspec.to_builtins(c),
    }
