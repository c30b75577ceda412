"""The configuration: one TOML file and HARMONY_* variables, strict, every problem at once with its place.

It starts nothing and does not look at the machine (resolve.py does).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from harmony import config_times
from harmony.config_file import read
from harmony.config_places import inside_data
from harmony.config_words import (
    ABSOLUTE,
    HOST,
    ID,
    LISTEN,
    MONITOR,
    NAME,
    ROLE,
    SLOT,
    TEXT_LINE,
    UNIT,
    URL,
    WORDS,
    hint,
    value_of,
)
from harmony.core.timing import PRESETS, Timing
from harmony.environment import lay_over
from harmony.errors import ConfigError
from harmony.records import SLOT_PREFIX, slot_name

SOCKET_MAX = 107

Name = Annotated[str, msgspec.Meta(pattern=NAME)]
Absolute = Annotated[str, msgspec.Meta(pattern=ABSOLUTE)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]
Window = Annotated[float, msgspec.Meta(gt=0, le=604_800)]
Count = Annotated[int, msgspec.Meta(ge=1, le=100)]
Role = Annotated[str, msgspec.Meta(pattern=ROLE)]
Url = Annotated[str, msgspec.Meta(pattern=URL)]
MonitorUrl = Annotated[str, msgspec.Meta(pattern=MONITOR)]
Option = Annotated[str, msgspec.Meta(pattern=TEXT_LINE)]
Unit = Annotated[str, msgspec.Meta(pattern=UNIT)]
Plugin = Annotated[str, msgspec.Meta(pattern=SLOT)]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Cluster(_Section, frozen=True):
    id: Annotated[str, msgspec.Meta(pattern=ID)]
    preferred_primary: Name


class Node(_Section, frozen=True):
    name: Name
    priority: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 100
    nofailover: bool = False
    state_dir: Absolute = "/var/lib/harmony"
    run_dir: Absolute = "/run/harmony"


class MemberAddress(_Section, frozen=True):
    host: Annotated[str, msgspec.Meta(pattern=HOST)]
    port: Port = 5432


class StoreSection(_Section, frozen=True):
    type: Literal["nats", "memory"] = "nats"
    urls: Annotated[list[Url], msgspec.Meta(min_length=1, max_length=16)] = msgspec.field(
        default_factory=lambda: ["nats://127.0.0.1:4222"]
    )
    replicas: Literal[1, 3, 5] = 1
    credentials_file: Absolute | None = None
    monitor_urls: Annotated[list[MonitorUrl], msgspec.Meta(max_length=16)] = msgspec.field(
        default_factory=list
    )


class TimingSection(_Section, frozen=True):
    preset: Literal["fast", "standard", "wan"] = "standard"
    heartbeat_interval_s: Seconds | None = None
    heartbeat_timeout_s: Seconds | None = None
    failure_threshold: Count | None = None
    success_threshold: Count | None = None
    fence_timeout_s: Seconds | None = None
    safety_margin_s: Seconds | None = None
    failover_timeout_s: Seconds | None = None


class PermanentSlot(_Section, frozen=True):
    """A replication slot of somebody else's that is on the primary, whoever leads. `database`: logical only."""

    type: Literal["physical", "logical"]
    database: Role | None = None
    plugin: Plugin | None = None


class Replication(_Section, frozen=True):
    mode: Literal["quorum", "on", "strict", "off"] = "quorum"
    synchronous_count: Annotated[int, msgspec.Meta(ge=1, le=31)] = 1
    maximum_lag_bytes: Annotated[int, msgspec.Meta(ge=0)] = 1_048_576
    slots: bool = True
    slot_wal_keep_mb: Annotated[int, msgspec.Meta(ge=0, le=10**8)] = 0
    permanent_slots: dict[str, PermanentSlot] = msgspec.field(default_factory=dict)

    @property
    def logical_slots(self) -> bool:
        return any(slot.type == "logical" for slot in self.permanent_slots.values())


class Failover(_Section, frozen=True):
    failback: Literal["off", "automatic"] = "off"
    failback_after_s: Window = 60.0
    maximum_changes: Annotated[int, msgspec.Meta(ge=0, le=32)] = 5
    changes_window_s: Window = 3600.0
    flap_window_s: Window = 600.0
    on_stop: Literal["handover", "fence"] = "handover"
    restart_budget: Annotated[int, msgspec.Meta(ge=0, le=100)] = 3
    restart_window_s: Window = 600.0


class Sickness(_Section, frozen=True):
    action: Literal["handover", "alarm"] = "handover"
    patience_s: Seconds | None = None
    write_probe: Literal["off", "suspicion", "always"] = "suspicion"
    disk_free_mb: Annotated[int, msgspec.Meta(ge=0, le=10**9)] = 512


class Rejoin(_Section, frozen=True):
    mode: Literal["automatic", "off"] = "automatic"
    after_s: Seconds = 10.0
    clone: bool = True
    keep_old: Annotated[int, msgspec.Meta(ge=0, le=100)] = 1
    keep_old_mb: Annotated[int, msgspec.Meta(ge=0, le=10**9)] = 0
    keep_free_mb: Annotated[int, msgspec.Meta(ge=0, le=10**9)] = 256


class Bootstrap(_Section, frozen=True):
    method: Literal["none", "copy", "initdb", "command"] = "none"
    command: Absolute | None = None
    timeout_s: Seconds = 3600.0
    initdb_options: Annotated[list[Option], msgspec.Meta(max_length=32)] = msgspec.field(
        default_factory=lambda: ["--username=postgres", "--auth=peer", "--encoding=UTF8", "--data-checksums"]
    )
    hba: Annotated[list[Option], msgspec.Meta(max_length=100)] = msgspec.field(default_factory=list)
    sql_file: Absolute | None = None


class Postgresql(_Section, frozen=True):
    data_dir: Absolute
    config_file: Absolute | None = None
    run: Literal["pg_ctl", "systemd"] = "pg_ctl"
    unit: Unit | None = None
    cgroup: bool = True
    bin_dir: Absolute | None = None
    library_dir: Absolute | None = None
    user: Role | None = None
    listen_addresses: Annotated[str, msgspec.Meta(pattern=LISTEN)] | None = None
    socket_dir: Absolute = "/var/run/postgresql"
    db_user: Role = "harmony"
    db_name: Role = "postgres"
    replication_user: Role = "replicator"
    replication_passfile: Absolute | None = None
    start_timeout_s: Seconds = 60.0


class Watchdog(_Section, frozen=True):
    mode: Literal["off", "automatic", "required"] = "off"
    device: Absolute = "/dev/watchdog"
    timeout_s: Annotated[int, msgspec.Meta(ge=1, le=60)] = 1


class Agent(_Section, frozen=True):
    user: Role | None = None


class Supervisor(_Section, frozen=True):
    ping_interval_s: Seconds | None = None
    ping_timeout_s: Seconds | None = None


class Log(_Section, frozen=True):
    format: Literal["auto", "json", "console"] = "auto"
    level: Literal["debug", "info", "warning"] = "info"


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole configuration, valid as a whole; `timing` is the preset with the single values over it."""

    cluster: Cluster
    node: Node
    members: dict[str, MemberAddress]
    store: StoreSection
    timing: Timing
    replication: Replication
    failover: Failover
    sickness: Sickness
    rejoin: Rejoin
    bootstrap: Bootstrap
    postgresql: Postgresql
    watchdog: Watchdog
    agent: Agent
    supervisor: Supervisor
    log: Log


SECTIONS: dict[str, type[_Section]] = {
    "cluster": Cluster,
    "node": Node,
    "store": StoreSection,
    "timing": TimingSection,
    "replication": Replication,
    "failover": Failover,
    "sickness": Sickness,
    "rejoin": Rejoin,
    "bootstrap": Bootstrap,
    "postgresql": Postgresql,
    "watchdog": Watchdog,
    "agent": Agent,
    "supervisor": Supervisor,
    "log": Log,
}


def _section(kind: type[_Section], raw: object, problems: list[str], place: str) -> dict[str, object]:
    """Convert one section key by key, so that each wrong key is reported; returns the good ones."""
    if not isinstance(raw, dict):
        problems.append(f"{place}: must be a table, and only one; begin it with [{place}]")
        return {}
    fields = {f.name: f for f in msgspec.structs.fields(kind)}
    good: dict[str, object] = {}
    for key, value in raw.items():
        if key not in fields:
            problems.append(f"{place}.{key}: unknown key{hint(key, list(fields))}")
            continue
        if key == "permanent_slots":
            good[key] = _permanent_slots(value, problems, f"{place}.{key}")
            continue
        converted, wrong = value_of(fields[key].type, key, value)
        if wrong is None:
            good[key] = converted
        else:
            problems.append(f"{place}.{key}: {wrong}")
    problems.extend(
        f"{place}.{f.name}: missing; it has no default"
        for f in fields.values()
        if f.required and f.name not in raw
    )
    return good


def _permanent_slots(raw: object, problems: list[str], place: str) -> dict[str, dict[str, object]]:
    """Each slot by its name, checked like a section of its own."""
    if not isinstance(raw, dict):
        problems.append(f"{place}: must be a table; begin each slot with [{place}.NAME]")
        return {}
    found: dict[str, dict[str, object]] = {}
    for name, value in raw.items():
        if not re.match(SLOT, name):
            problems.append(f"{place}.{name}: the name is not allowed; must be {WORDS[SLOT]}")
        if name.startswith(SLOT_PREFIX):
            problems.append(f"{place}.{name}: names that begin with {SLOT_PREFIX} are the members' own slots")
        found[name] = slot = _section(PermanentSlot, value, problems, f"{place}.{name}")
        for key in ("database", "plugin"):
            if slot.get("type") == "logical" and key not in slot and key not in value:
                problems.append(
                    f"{place}.{name}.{key}: missing; a logical slot is of one database and one plugin"
                )
            if slot.get("type") == "physical" and key in slot:
                problems.append(f"{place}.{name}.{key}: a physical slot has none; delete it")
    if len(raw) > 32:
        problems.append(f"{place}: {len(raw)} slots; at most 32")
    return found


def load(path: str | Path, env: Mapping[str, str] | None = None, warnings: list[str] | None = None) -> Config:
    """Read the file and the environment. Raises ConfigError with every problem and its place.

    `warnings` is added to: what is no problem, and perhaps not meant.
    """
    env = os.environ if env is None else env
    problems: list[str] = []
    ignored = warnings if warnings is not None else []
    kinds = {name: {f.name: f.type for f in msgspec.structs.fields(k)} for name, k in SECTIONS.items()}
    try:
        raw = read(path)
    except ConfigError as e:
        lay_over(env, {}, kinds, problems, ignored)
        raise ConfigError(e.problems + problems) from e
    lay_over(env, raw, kinds, problems, ignored)
    problems.extend(
        f"{name}: unknown section{hint(name, [*SECTIONS, 'members'])}"
        for name in raw
        if name not in SECTIONS and name != "members"
    )
    values = {name: _section(kind, raw.get(name, {}), problems, name) for name, kind in SECTIONS.items()}
    members = _members(raw.get("members", {}), problems)
    timing = _timing(values["timing"], raw.get("timing"), values["watchdog"], problems)
    if timing is not None:
        problems += config_times.problems(timing, values)
        ignored += config_times.warnings(timing, values["watchdog"].get("mode", "off") != "off")
    _together(values, members, problems)
    problems += inside_data(values, os.path.normpath, str(Path(path).absolute()))
    if not problems and timing is not None:
        whole = {**values, "members": members, "timing": msgspec.structs.asdict(timing)}
        return msgspec.convert(whole, Config)
    raise ConfigError([p if p.startswith("environment:") else f"{path}: {p}" for p in problems])


def _members(raw: object, problems: list[str]) -> dict[str, dict[str, object]]:
    """By name, also those with problems: their names count."""
    if not isinstance(raw, dict) or not raw:
        wrong = "missing" if raw == {} else "must be tables with names, and no [[members]] or single value"
        problems.append(f"members: {wrong}; name each node, such as [members.n1] with host and port")
        return {}
    found: dict[str, dict[str, object]] = {}
    for name, value in raw.items():
        if not re.match(NAME, name):
            problems.append(f"members.{name}: the name is not allowed; must be {WORDS[NAME]}")
        found[name] = _section(MemberAddress, value, problems, f"members.{name}")
    if len(raw) > 32:
        problems.append(f"members: {len(raw)} nodes; at most 32")
    return found


def _timing(
    good: dict[str, object], raw: object, watchdog: dict[str, object], problems: list[str]
) -> Timing | None:
    """The preset with the single values over it; not judged while one of them is wrong in itself."""
    names = {f.name for f in msgspec.structs.fields(TimingSection)}
    if not isinstance(raw, dict | None) or any(k in names and k not in good for k in raw or {}):
        return None
    section = msgspec.convert(good, TimingSection)
    values = {k: v for k, v in msgspec.structs.asdict(section).items() if k != "preset" and v is not None}
    w = msgspec.convert(watchdog, Watchdog)
    reset_s = 0.0 if w.mode == "off" else float(w.timeout_s)
    timing = msgspec.structs.replace(PRESETS[section.preset], watchdog_timeout_s=reset_s, **values)
    violation = timing.violation()
    if violation is not None:
        problems.append(f"timing.failover_timeout_s (preset {section.preset}): {violation}")
    return timing


def _together(
    values: dict[str, dict[str, object]], members: dict[str, dict[str, object]], problems: list[str]
) -> None:
    """What only shows between the values; a value that is wrong in itself is left out here."""
    for section, key in (("node", "name"), ("cluster", "preferred_primary")):
        name = values[section].get(key)
        if members and isinstance(name, str) and name not in members:
            problems.append(f"{section}.{key}: {name} is not in [members]{hint(name, list(members))}")
    postgresql = values["postgresql"]
    if postgresql.get("run") == "systemd" and postgresql.get("unit") is None:
        problems.append(
            'postgresql.unit: missing; run = "systemd" needs its name, such as postgresql@15-main.service'
        )
    if values["bootstrap"].get("method") == "command" and values["bootstrap"].get("command") is None:
        problems.append('bootstrap.command: missing; method = "command" needs the program to run')
    replication = values["replication"]
    count = replication.get("synchronous_count", 1)
    mode = replication.get("mode", "quorum")
    if members and mode != "off" and isinstance(count, int):
        if len(members) == 1:
            problems.append(
                f'replication.mode: "{mode}" needs at least two members, there is one; set mode = "off"'
            )
        elif count >= len(members):
            problems.append(
                f"replication.synchronous_count: {count} must be below the number of members "
                f'({len(members)}); lower it, add members, or set mode = "off"'
            )
    of_slot: dict[str, str] = {}
    for name in members:
        other = of_slot.setdefault(slot_name(name), name)
        if other != name and replication.get("slots", True):
            problems.append(
                f"members.{name}: its replication slot would have the name of that of {other} "
                f"({slot_name(name)}: - becomes _); rename one of the two, or set replication.slots = false"
            )
    if replication.get("permanent_slots") and not replication.get("slots", True):
        problems.append("replication.permanent_slots: needs replication.slots = true; drop one of the two")
    seen: dict[tuple[object, object], str] = {}
    for name, m in members.items():
        if "host" in m:
            other = seen.setdefault((m["host"], m.get("port", 5432)), name)
            if other != name:
                problems.append(f"members.{name}: same host and port as {other}; give each its own")
    for section, key, tail in (
        ("node", "run_dir", "/agent/agent.sock"),
        ("postgresql", "socket_dir", "/.s.PGSQL.65535"),
    ):
        path = f"{values[section].get(key, '')}{tail}"
        if len(os.fsencode(path)) > SOCKET_MAX:
            problems.append(
                f"{section}.{key}: {path} has {len(os.fsencode(path))} bytes, a Unix socket's path at most "
                f"{SOCKET_MAX}; choose a shorter folder"
            )
