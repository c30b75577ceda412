"""The parameters in words: default, unit, range and cost of each; the example file and the docs come from it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import msgspec
import tomli_w

from harmony.config import SECTIONS
from harmony.core.timing import PRESETS

TEXT: dict[str, tuple[str, str]] = {
    "cluster.id": ("name of the cluster; its bucket is harmony_<id>", "another id is another cluster"),
    "cluster.preferred_primary": ("the member that founds the cluster", "only it may claim the first term"),
    "node.name": ("this node, one of the members", "unique in the cluster"),
    "node.priority": ("0 to 1000; among equal candidates the highest promotes", "order only, never data"),
    "node.nofailover": ("true: never promote this node", "one candidate fewer"),
    "node.state_dir": (
        "folder kept over reboots: generations and latch",
        "losing it makes the node a stranger",
    ),
    "node.run_dir": (
        "folder of sockets and lease, on tmpfs",
        "its path must be short (107 bytes with the socket)",
    ),
    "store.type": ("nats, or memory (tests only)", "memory is shared by nobody"),
    "store.urls": ("NATS servers, tried in turn", "name them all"),
    "store.replicas": (
        "1, 3 or 5 copies of the bucket",
        "1 does not survive its server; 3 need elections of 4 to 9 s",
    ),
    "store.credentials_file": ("NATS credentials file", "-"),
    "timing.preset": ("fast, standard or wan; single values below override it", "see the presets"),
    "timing.heartbeat_interval_s": ("s, pause between heartbeats", "lower: faster failover, more load"),
    "timing.heartbeat_timeout_s": (
        "s, longest wait for one heartbeat",
        "lower: faster failover, more false fences",
    ),
    "timing.failure_threshold": (
        "consecutive failures before self-fencing",
        "higher: outlasts more, longer lease",
    ),
    "timing.success_threshold": ("good heartbeats before recovery", "higher: slower, calmer recovery"),
    "timing.fence_timeout_s": (
        "s, the fencer's budget to prove PostgreSQL stopped",
        "lower: less clean shutdowns",
    ),
    "timing.safety_margin_s": ("s, for clock drift and scheduling delay", "lower: less certain under load"),
    "timing.failover_timeout_s": (
        "s, how stale the primary may be",
        "lower: faster failover; bounded by the inequality",
    ),
    "replication.mode": (
        "quorum: ANY k of the other members; off: asynchronous",
        "off may lose acknowledged commits",
    ),
    "replication.synchronous_count": (
        "k, standbys that must have each commit",
        "higher: safer, blocks sooner",
    ),
    "replication.maximum_lag_bytes": (
        "bytes, mode off: largest lag of a candidate",
        "higher: more may be lost",
    ),
    "postgresql.data_dir": ("the data directory", "-"),
    "postgresql.bin_dir": ("PostgreSQL's programs", "default: Debian's, of the data directory's version"),
    "postgresql.library_dir": ("LD_LIBRARY_PATH for them", "only for relocated builds"),
    "postgresql.user": ("OS user PostgreSQL runs as", "needed when the supervisor is root"),
    "postgresql.listen_addresses": ("as PostgreSQL's own parameter", "-"),
    "postgresql.socket_dir": ("folder of PostgreSQL's Unix socket", "the agent's probe connects there"),
    "postgresql.db_user": ("role of the probe, with pg_monitor", "-"),
    "postgresql.db_name": ("database of the probe", "-"),
    "postgresql.replication_user": ("role of the standbys", "-"),
    "postgresql.replication_passfile": ("its password file", "-"),
    "postgresql.start_timeout_s": (
        "s, longest start or promotion",
        "higher: longer crash recovery is waited for",
    ),
    "agent.user": ("OS user of the agent", "default: the supervisor's; name an unprivileged one"),
    "supervisor.ping_interval_s": ("s, between pings of the children", "-"),
    "supervisor.ping_timeout_s": (
        "s without an answer: killed and restarted",
        "lower: more needless restarts",
    ),
    "log.format": ("auto, json or console", "auto: console on a terminal"),
    "log.level": ("debug, info or warning", "-"),
}


@dataclass(frozen=True)
class Parameter:
    """One row of the table. `default` None: there is none, or the preset's."""

    section: str
    key: str
    required: bool
    default: object
    meaning: str
    cost: str


def parameters() -> list[Parameter]:
    """Every parameter, in the order of the code."""
    found = []
    for section, kind in SECTIONS.items():
        for f in msgspec.structs.fields(kind):
            default = f.default if f.default is not msgspec.NODEFAULT else None
            if f.default_factory is not msgspec.NODEFAULT:
                default = f.default_factory()
            if isinstance(default, enum.Enum):
                default = default.value
            meaning, cost = TEXT[f"{section}.{f.name}"]
            found.append(Parameter(section, f.name, f.required, default, meaning, cost))
    return found


_FILL = {"cluster.id": "main", "cluster.preferred_primary": "n1", "node.name": "n1"} | {
    "postgresql.data_dir": "/var/lib/postgresql/15/main"
}


def example() -> str:
    """A commented file that passes `config check`."""
    lines = [
        "# Harmony. One file per node; only node.name differs. `harmonyctl config check FILE` checks it.",
        "",
    ]
    section = ""
    for p in parameters():
        if p.section != section:
            if section == "cluster":
                for n in ("n1", "n2", "n3"):
                    lines += [f"[members.{n}]", tomli_w.dumps({"host": f"{n}.example.org", "port": 5432})]
            section = p.section
            lines += [f"[{section}]"]
        lines.append(f"# {p.meaning} ({p.cost})")
        name = f"{p.section}.{p.key}"
        value = _FILL.get(name, p.default)
        text = " ".join(tomli_w.dumps({p.key: value}).split()) if value is not None else f"{p.key} = ..."
        lines += [text if p.required or name in _FILL else f"# {text}".replace("\n", "\n# "), ""]
    return "\n".join(lines)


def markdown() -> str:
    """docs/configuration.md, whole."""
    lines = [
        "# Configuration",
        "",
        "One TOML file and `HARMONY_<SECTION>_<KEY>` variables over it. Unknown keys are errors. Rendered from",
        "the code by `make rewrite`; a test keeps it equal.",
        "",
        "`[members.NAME]` with `host` and `port` (default 5432) names each node, at most 32.",
        "",
        "| parameter | default | what it is | raising or lowering it |",
        "| --- | --- | --- | --- |",
    ]
    for p in parameters():
        preset = p.section == "timing" and p.key != "preset"
        default = "required" if p.required else "the preset's" if preset else f"`{p.default}`"
        lines.append(f"| `{p.section}.{p.key}` | {default} | {p.meaning} | {p.cost} |")
    names = list(PRESETS)
    lines += [
        "",
        "## Presets",
        "",
        "| parameter | " + " | ".join(names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    for key in msgspec.structs.asdict(PRESETS["fast"]):
        lines.append(f"| `{key}` | " + " | ".join(f"{getattr(PRESETS[n], key):g}" for n in names) + " |")
    lines.append("| lease (derived), s | " + " | ".join(f"{PRESETS[n].lease_s:g}" for n in names) + " |")
    return "\n".join(lines) + "\n"
