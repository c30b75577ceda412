"""The configuration: one TOML file and HARMONY_* variables, strict, every problem at once with its place.

It starts nothing and looks at the machine only in `resolve` (users, PostgreSQL's programs, data directory).
"""

from __future__ import annotations

import difflib
import math
import os
import pwd
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from harmony.core.timing import PRESETS, Timing
from harmony.errors import ConfigError

_NAME = r"^[a-z0-9]([a-z0-9_-]{0,38}[a-z0-9])?\Z"
_HOST = r"^[A-Za-z0-9_.:-]{1,253}\Z"
_ABSOLUTE = r"^/[^\x00-\x1f']*\Z"
SOCKET_MAX = 107

Name = Annotated[str, msgspec.Meta(pattern=_NAME)]
Absolute = Annotated[str, msgspec.Meta(pattern=_ABSOLUTE)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]
Count = Annotated[int, msgspec.Meta(ge=1, le=100)]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Cluster(_Section, frozen=True):
    id: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}\Z")]
    preferred_primary: Name


class Node(_Section, frozen=True):
    name: Name
    priority: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 100
    nofailover: bool = False
    state_dir: Absolute = "/var/lib/harmony"
    run_dir: Absolute = "/run/harmony"


class MemberAddress(_Section, frozen=True):
    host: Annotated[str, msgspec.Meta(pattern=_HOST)]
    port: Port = 5432


class StoreSection(_Section, frozen=True):
    type: Literal["nats", "memory"] = "nats"
    urls: Annotated[list[str], msgspec.Meta(min_length=1, max_length=16)] = msgspec.field(
        default_factory=lambda: ["nats://127.0.0.1:4222"]
    )
    replicas: Literal[1, 3, 5] = 1
    credentials_file: Absolute | None = None


class TimingSection(_Section, frozen=True):
    preset: Literal["fast", "standard", "wan"] = "standard"
    heartbeat_interval_s: Seconds | None = None
    heartbeat_timeout_s: Seconds | None = None
    failure_threshold: Count | None = None
    success_threshold: Count | None = None
    fence_timeout_s: Seconds | None = None
    safety_margin_s: Seconds | None = None
    failover_timeout_s: Seconds | None = None


class Replication(_Section, frozen=True):
    mode: Literal["quorum", "off"] = "quorum"
    synchronous_count: Annotated[int, msgspec.Meta(ge=1, le=31)] = 1
    maximum_lag_bytes: Annotated[int, msgspec.Meta(ge=0)] = 1_048_576


class Postgresql(_Section, frozen=True):
    data_dir: Absolute
    bin_dir: Absolute | None = None
    library_dir: Absolute | None = None
    user: str | None = None
    listen_addresses: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.:, *-]*\Z")] = "*"
    socket_dir: Absolute = "/var/run/postgresql"
    db_user: str = "harmony"
    db_name: str = "postgres"
    replication_user: str = "replicator"
    replication_passfile: Absolute | None = None
    start_timeout_s: Seconds = 60.0


class Agent(_Section, frozen=True):
    user: str | None = None


class Supervisor(_Section, frozen=True):
    ping_interval_s: Seconds = 0.5
    ping_timeout_s: Seconds = 3.0


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
    postgresql: Postgresql
    agent: Agent
    supervisor: Supervisor
    log: Log


SECTIONS: dict[str, type[_Section]] = {
    "cluster": Cluster,
    "node": Node,
    "store": StoreSection,
    "timing": TimingSection,
    "replication": Replication,
    "postgresql": Postgresql,
    "agent": Agent,
    "supervisor": Supervisor,
    "log": Log,
}


def _hint(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(known))}"


def _section(name: str, raw: object, problems: list[str], place: str) -> _Section | None:
    """Convert one section key by key, so that each wrong key is reported."""
    kind = SECTIONS.get(name, MemberAddress)
    if not isinstance(raw, dict):
        problems.append(f"{place}: must be a table, such as [{name}]")
        return None
    fields = {f.name: f for f in msgspec.structs.fields(kind)}
    good: dict[str, object] = {}
    before = len(problems)
    for key, value in raw.items():
        if key not in fields:
            problems.append(f"{place}.{key}: unknown key{_hint(key, list(fields))}")
            continue
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{place}.{key}: must be a finite number, not {value}")
            continue
        try:
            good[key] = msgspec.convert(value, fields[key].type)
        except msgspec.ValidationError as e:
            problems.append(f"{place}.{key}: {value!r}: {e}")
    problems.extend(
        f"{place}.{f.name}: missing; it has no default"
        for f in fields.values()
        if f.required and f.name not in raw
    )
    return kind(**good) if len(problems) == before else None


def _environment(env: Mapping[str, str], raw: dict[str, object], problems: list[str]) -> None:
    """Lay HARMONY_<SECTION>_<KEY> over the file's values."""
    for variable, text in sorted(env.items()):
        if (
            not variable.startswith("HARMONY_")
            or variable.startswith("HARMONY_DEMO_")
            or variable == "HARMONY_CONFIG"
        ):
            continue
        section, _, key = variable.removeprefix("HARMONY_").lower().partition("_")
        kind = SECTIONS.get(section)
        fields = {f.name: f for f in msgspec.structs.fields(kind)} if kind is not None else {}
        if key not in fields:
            known = [
                f"HARMONY_{s}_{f.name}".upper()
                for s, k in SECTIONS.items()
                for f in msgspec.structs.fields(k)
            ]
            near = difflib.get_close_matches(variable, known, 1)
            problems.append(
                f"environment: {variable}: unknown" + (f"; did you mean {near[0]}?" if near else "")
            )
            continue
        value: object = text.split(",") if key == "urls" else text
        if key != "urls":
            try:
                value = msgspec.convert(text, fields[key].type, strict=False)
            except msgspec.ValidationError as e:
                problems.append(f"environment: {variable}: {text!r}: {e}")
                continue
        table = raw.setdefault(section, {})
        if isinstance(table, dict):
            table[key] = value


def load(path: str | Path, env: Mapping[str, str] | None = None) -> Config:
    """Read the file and the environment. Raises ConfigError with every problem and its place."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError([f"{path}: cannot be read: {e}"]) from e
    try:
        raw: dict[str, object] = dict(tomllib.loads(text))
    except tomllib.TOMLDecodeError as e:
        raise ConfigError([f"{path}: not TOML: {e}"]) from e
    problems: list[str] = []
    _environment(os.environ if env is None else env, raw, problems)
    sections: dict[str, _Section | None] = {}
    for name in raw:
        if name not in SECTIONS and name != "members":
            problems.append(f"{name}: unknown section{_hint(name, [*SECTIONS, 'members'])}")
    for name, kind in SECTIONS.items():
        if name in raw or any(f.required for f in msgspec.structs.fields(kind)):
            sections[name] = _section(name, raw.get(name, {}), problems, name)
        else:
            sections[name] = kind()
    members = _members(raw.get("members", {}), problems)
    timing = _timing(sections["timing"], problems)
    if not problems and timing is not None:
        config = msgspec.convert(
            {k: msgspec.to_builtins(v) for k, v in sections.items()}
            | {"members": msgspec.to_builtins(members), "timing": msgspec.to_builtins(timing)},
            Config,
        )
        _together(config, problems)
        if not problems:
            return config
    raise ConfigError([p if p.startswith("environment:") else f"{path}: {p}" for p in problems])


def _members(raw: object, problems: list[str]) -> dict[str, MemberAddress]:
    if not isinstance(raw, dict) or not raw:
        problems.append("members: missing; name each node, such as [members.n1] with host and port")
        return {}
    found: dict[str, MemberAddress] = {}
    for name, value in raw.items():
        if not re.match(_NAME, name):
            problems.append(
                f"members.{name}: a name has 1 to 40 of a-z 0-9 _ -, beginning and ending in a-z 0-9"
            )
        address = _section("members.NAME", value, problems, f"members.{name}")
        if isinstance(address, MemberAddress):
            found[name] = address
    if len(raw) > 32:
        problems.append(f"members: {len(raw)} nodes; at most 32")
    return found


def _timing(section: _Section | None, problems: list[str]) -> Timing | None:
    if not isinstance(section, TimingSection):
        return None
    values = {k: v for k, v in msgspec.to_builtins(section).items() if k != "preset" and v is not None}
    timing = msgspec.structs.replace(PRESETS[section.preset], **values)
    violation = timing.violation()
    if violation is not None:
        problems.append(f"timing (preset {section.preset}): {violation}")
        return None
    return timing


def _together(c: Config, problems: list[str]) -> None:
    """What only shows when everything is known."""
    for place, name in (
        ("node.name", c.node.name),
        ("cluster.preferred_primary", c.cluster.preferred_primary),
    ):
        if name not in c.members:
            problems.append(f"{place}: {name} is not in [members]{_hint(name, list(c.members))}")
    if c.replication.mode == "quorum" and c.replication.synchronous_count >= len(c.members):
        problems.append(
            f"replication.synchronous_count: {c.replication.synchronous_count} standbys of {len(c.members)} "
            'members; lower it, add members, or set mode = "off"'
        )
    addresses = [(m.host, m.port) for m in c.members.values()]
    if len(set(addresses)) != len(addresses):
        problems.append("members: two members have the same host and port")
    for what, path in (
        ("node.run_dir", f"{c.node.run_dir}/agent/agent.sock"),
        ("postgresql.socket_dir", f"{c.postgresql.socket_dir}/.s.PGSQL.65535"),
    ):
        if len(path.encode()) > SOCKET_MAX:
            problems.append(
                f"{what}: {path} has {len(path.encode())} bytes; a Unix socket's path at most {SOCKET_MAX}"
            )


# ---------------------------------------------------------------- resolve


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


def find_bin_dir(data_dir: str) -> str | None:
    """Debian's newest PostgreSQL of the data directory's major version (the newest of all without one)."""
    try:
        wanted = (Path(data_dir) / "PG_VERSION").read_text().strip()
    except OSError:
        wanted = ""
    found = [p for p in Path("/usr/lib/postgresql").glob("*/bin") if (p / "postgres").exists()]
    found = [p for p in found if not wanted or p.parent.name == wanted]
    return str(max(found, key=lambda p: float(p.parent.name))) if found else None


def resolve(c: Config) -> dict[str, dict[str, object]]:
    """What supervisor, fencer and agent are started with. Raises ConfigError where the machine does not fit."""
    problems: list[str] = []
    p = c.postgresql
    agent_uid, agent_gid = _user(c.agent.user, "agent.user", problems)
    postgres_uid, _ = _user(p.user, "postgresql.user", problems)
    if p.user is None and os.geteuid() == 0:
        problems.append("postgresql.user: missing; PostgreSQL refuses to run as root, name its user")
    try:
        data = Path(p.data_dir).stat()
        if postgres_uid >= 0 and data.st_uid != postgres_uid:
            owner = data.st_uid
            problems.append(
                f"postgresql.data_dir: {p.data_dir} belongs to uid {owner}, PostgreSQL runs as {postgres_uid}"
            )
    except OSError as e:
        problems.append(f"postgresql.data_dir: {e}")
    bin_dir = p.bin_dir or find_bin_dir(p.data_dir)
    if bin_dir is None:
        problems.append("postgresql.bin_dir: no PostgreSQL found under /usr/lib/postgresql; name its folder")
    for program in ("postgres", "pg_ctl", "pg_controldata"):
        if bin_dir is not None and not (Path(bin_dir) / program).exists():
            problems.append(f"postgresql.bin_dir: {bin_dir} has no {program}")
    if problems:
        raise ConfigError(problems)
    return {
        "supervisor": {
            "node": c.node.name,
            "run_dir": c.node.run_dir,
            "state_dir": c.node.state_dir,
            "agent_user": c.agent.user,
            "ping_interval_s": c.supervisor.ping_interval_s,
            "ping_timeout_s": c.supervisor.ping_timeout_s,
            "fence_timeout_s": c.timing.fence_timeout_s,
            "log_format": c.log.format,
        },
        "fencer": {
            "node": c.node.name,
            "agent_uid": agent_uid,
            "agent_gid": agent_gid,
            "postgres_user": p.user,
            "data_dir": str(Path(p.data_dir).resolve()),
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
            "state_dir": c.node.state_dir,
            "run_dir": c.node.run_dir,
            "log_format": c.log.format,
        },
        "agent": msgspec.to_builtins(c),
    }
