"""The parameters in words: default, range, unit and cost of each; the example and the docs come from it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import msgspec
import tomli_w

from harmony import config_times as times
from harmony.config import SECTIONS
from harmony.config_words import allowed
from harmony.core.timing import PRESETS

TEXT: dict[str, tuple[str, str]] = {
    "cluster.id": ("name of the cluster; its bucket is harmony_<id>", "another id is another cluster"),
    "cluster.preferred_primary": ("the member that founds the cluster", "only it may claim the first term"),
    "node.name": ("this node, one of the members", "unique in the cluster"),
    "node.priority": (
        "among equal candidates the highest promotes",
        "higher: chosen sooner; order only, never data",
    ),
    "node.nofailover": ("true: never promote this node", "one candidate fewer"),
    "node.state_dir": (
        "folder kept over reboots: generations, latch, what was seen of the store",
        "losing it makes the node a stranger",
    ),
    "node.run_dir": (
        "folder of sockets and lease, on tmpfs",
        "on a disk each renewal waits for it; its path must be short (107 bytes with the socket)",
    ),
    "store.type": ("nats, or memory (tests only)", "memory is shared by nobody"),
    "store.urls": (
        "NATS servers, tried in turn",
        "fewer than all of them: no way in when the named ones are down",
    ),
    "store.replicas": (
        "1, 3 or 5 copies of the bucket",
        "1 does not survive its server; 3 need elections of 4 to 9 s",
    ),
    "store.credentials_file": (
        "NATS credentials file",
        "needed where the server demands it",
    ),
    "store.monitor_urls": (
        "monitoring ports of the NATS servers, to see that they sync every write before they acknowledge it",
        "left out: sync_interval is not checked, and a power cut may take acknowledged writes (docs/store.md)",
    ),
    "timing.preset": (
        "fast, standard or wan; single values below override it",
        "fast: shorter outages, but a JetStream election fences the primary; wan: longer outages",
    ),
    "timing.heartbeat_interval_s": (
        "pause between heartbeats",
        "lower: faster failover, more load on the store; higher: longer lease",
    ),
    "timing.heartbeat_timeout_s": (
        "longest wait for one heartbeat",
        "lower: faster failover, more false fences; higher: longer lease and failover_timeout_s",
    ),
    "timing.failure_threshold": (
        "consecutive failures before self-fencing",
        "higher: outlasts more, longer lease; lower: more false fences",
    ),
    "timing.success_threshold": (
        "good heartbeats before recovery",
        "higher: slower, calmer recovery; lower: may flap",
    ),
    "timing.fence_timeout_s": (
        "the fencer's budget to prove PostgreSQL stopped",
        "lower: fewer clean shutdowns, more kills; higher: longer failover_timeout_s",
    ),
    "timing.safety_margin_s": (
        "room for clock drift and scheduling delay",
        "lower: less certain under load; higher: longer failover_timeout_s",
    ),
    "timing.failover_timeout_s": (
        "how stale the primary must be before a replica may promote; more than lease, fence and margin",
        "lower: faster failover; higher: longer outages",
    ),
    "replication.mode": (
        "quorum: any synchronous_count of who keeps up; on: chosen ones; both go on with fewer; strict blocks; off",
        "off may lose acknowledged commits; quorum, on: with none left only the last primary may lead; strict blocks",
    ),
    "replication.synchronous_count": (
        "standbys that must have each commit, while there are so many (mode strict: always)",
        "higher: survives more losses at a time, slower commits; lower: fewer candidates after a failure",
    ),
    "replication.maximum_lag_bytes": (
        "mode off: largest lag of a candidate",
        "higher: more may be lost; lower: a failover may find no candidate",
    ),
    "replication.slots": (
        "a replication slot for each member on every member, so that no WAL is recycled that it still needs",
        "false: no slots are made and primary_slot_name is left alone; who was away for long is copied anew",
    ),
    "replication.slot_wal_keep_mb": (
        "MB of WAL that a slot may hold back (max_slot_wal_keep_size); 0: a tenth of the disk that pg_wal is on",
        "higher: who was away for longer need not be copied, more disk; postgresql.conf's own value goes first",
    ),
    "replication.permanent_slots": (
        "slots of others, on every primary: tables with type, if logical database and plugin (docs/slots.md)",
        "one whose owner is gone holds WAL back up to the bound; logical ones need PostgreSQL 17",
    ),
    "failover.failback": (
        "automatic: leadership goes back to the preferred primary by a hand-over; off: it stays where it is",
        "automatic: one short outage more after each failover",
    ),
    "failover.failback_after_s": (
        "how long the preferred primary must have been able to lead before it is handed leadership back",
        "lower: back sooner, and to and fro where that host is unsteady",
    ),
    "failover.maximum_changes": (
        "after so many failovers within changes_window_s no more until `harmonyctl acknowledge`; 0: no limit",
        "lower: somebody must look sooner; 0: an unsteady cluster changes its primary for ever",
    ),
    "failover.changes_window_s": (
        "over what time failovers are counted",
        "higher: slower series of failovers are stopped, too",
    ),
    "failover.flap_window_s": (
        "who has lost leadership by its own failure so recently needs more good heartbeats to lead again",
        "higher: an unsteady node is kept from leading longer",
    ),
    "failover.on_stop": (
        "what a primary does when Harmony is stopped: handover, to a standby that can take it; fence: it stops",
        "fence: writes end until the others have elected a primary",
    ),
    "failover.restart_budget": (
        "crashes within restart_window_s before another takes over; mode off: each is answered by a restart in place",
        "0: handed over at once, and what no standby has received is lost; higher: more short outages in a row",
    ),
    "failover.restart_window_s": (
        "over what time its crashes are counted",
        "higher: slower series of crashes end in a hand-over, too",
    ),
    "sickness.action": (
        "handover: a primary that hangs beyond patience_s is fenced, and another leads, if one can; alarm: it is told",
        "alarm: a hung PostgreSQL leads until somebody comes",
    ),
    "sickness.patience_s": (
        "how long it must have shown no sign of life or progress; default: twice failover_timeout_s, at least 10",
        "lower: shorter outages, and a disk that stalls for a while costs a failover; higher: longer outages",
    ),
    "sickness.write_probe": (
        "a message into the WAL while that stands still: suspicion: when somebody waits for it; always: also when idle",
        "off: a disk that hangs behind a wait for a standby is not seen; always: an idle server writes now and then",
    ),
    "sickness.disk_free_mb": (
        "less free room than this on the disk of the data or the WAL is told; 0: never",
        "lower: told when it is nearly too late",
    ),
    "rejoin.mode": (
        "automatic: a standby that cannot follow the primary is rewound or copied anew; off: it says so and waits",
        "automatic destroys what only that standby has; off: somebody has to do it by hand",
    ),
    "rejoin.after_s": (
        "how long a standby must not have streamed (without other signs: 6 times that; surely diverged: at once)",
        "lower: back sooner, more rewinds that were not needed; higher: one standby fewer for longer",
    ),
    "rejoin.clone": (
        "copy the whole primary where pg_rewind cannot help",
        "false: such a standby waits for somebody; true: needs room for a second copy, and loads the primary",
    ),
    "rejoin.keep_old": (
        "old data directories that are kept beside the new one, once that streams",
        "0: what only the old primary had is gone for good; higher: more disk",
    ),
    "rejoin.keep_old_mb": (
        "how much they may hold together; 0: no limit",
        "smaller than the database: none is kept",
    ),
    "rejoin.keep_free_mb": ("room that a copy must leave on the disk", "lower: a copy may fill the disk"),
    "bootstrap.method": (
        "for an empty data_dir: none; copy: of the primary; initdb: that, or a new cluster; command: both by yours",
        "other than none: an empty mount point is filled, too, instead of an error (docs/bootstrap.md)",
    ),
    "bootstrap.command": ("your program for method = command", "its contract is in docs/bootstrap.md"),
    "bootstrap.timeout_s": (
        "longest initdb or bootstrap.command; a copy has no limit",
        "higher: one that hangs is noticed later; lower: a big restore is ended, and begun anew",
    ),
    "bootstrap.initdb_options": (
        "options of initdb, one each",
        "without --data-checksums: pg_rewind rests on wal_log_hints, which Harmony sets",
    ),
    "bootstrap.hba": (
        "lines of a new cluster's pg_hba.conf",
        "empty: initdb's, which lets no standby in from elsewhere",
    ),
    "bootstrap.sql_file": (
        "SQL that is run once in a cluster made by initdb, before anybody can connect: roles, grants",
        "without it there is neither postgresql.db_user nor replication_user in it",
    ),
    "postgresql.data_dir": (
        "the data directory; initialised (or see bootstrap.method), and owned by postgresql.user",
        "of another cluster: refused by its system identifier",
    ),
    "postgresql.config_file": (
        "the user's postgresql.conf",
        "default: in the data directory, else Debian's in /etc/postgresql that names it",
    ),
    "postgresql.run": (
        "pg_ctl: the fencer starts PostgreSQL itself; systemd: it starts and stops postgresql.unit",
        "systemd: the unit's own limits and sandbox; a start waits for systemd, a fence never does",
    ),
    "postgresql.unit": (
        "PostgreSQL's unit, such as postgresql@15-main.service",
        "needed for run = systemd; Harmony then starts it: disable it, or let harmony-boot-fence go first",
    ),
    "postgresql.cgroup": (
        "a cgroup (v2) of its own for PostgreSQL, where the host has it (run = pg_ctl)",
        "false: a fence finds its processes one by one, which takes some ten milliseconds longer",
    ),
    "postgresql.bin_dir": ("PostgreSQL's programs", "default: Debian's, of the data directory's version"),
    "postgresql.library_dir": ("LD_LIBRARY_PATH for them", "only for relocated builds"),
    "postgresql.user": ("OS user PostgreSQL runs as", "needed when the supervisor is root"),
    "postgresql.listen_addresses": (
        "as PostgreSQL's own parameter; left out: postgresql.conf's counts (localhost where it sets none)",
        "either must include what the other members reach; set: it overrides postgresql.conf, and that is said",
    ),
    "postgresql.socket_dir": ("folder of PostgreSQL's Unix socket", "the agent's probe connects there"),
    "postgresql.db_user": (
        "role of the probe, with pg_monitor, and of the slots, with REPLICATION",
        "without REPLICATION no slots are made, and harmonyctl status says so",
    ),
    "postgresql.db_name": ("database of the probe", "must exist and let db_user in"),
    "postgresql.replication_user": (
        "role of the standbys",
        "needs REPLICATION, and pg_hba.conf on every member",
    ),
    "postgresql.replication_passfile": (
        "its password file",
        "without it pg_hba.conf must let the standbys in otherwise",
    ),
    "postgresql.start_timeout_s": (
        "longest start or promotion",
        "higher: longer crash recovery is waited for; lower: given up sooner",
    ),
    "watchdog.mode": (
        "off; automatic: used where the device can be had; required: without it this node never leads",
        "a fencer that hangs together with its supervisor is only ended by a watchdog",
    ),
    "watchdog.device": ("the kernel's watchdog device", "systemd's RuntimeWatchdogSec must not hold it"),
    "watchdog.timeout_s": (
        "the host resets when it was not petted for so long; counts in the timing inequality",
        "higher than fence_timeout_s: a longer failover_timeout_s; lower: resets under heavy load",
    ),
    "agent.user": ("OS user of the agent", "default: the supervisor's; name an unprivileged one"),
    "supervisor.ping_interval_s": (
        "between pings of the agent; default: a quarter of ping_timeout_s, at most 0.5",
        "lower: a hung agent is noticed sooner, more wake-ups; at most half of ping_timeout_s",
    ),
    "supervisor.ping_timeout_s": (
        "without an answer the agent is killed and restarted; default: 0.35 of the lease, at most 3",
        "lower: more needless restarts; higher (at most 0.35 of the lease): a hung agent stays longer",
    ),
    "log.format": ("auto, json or console", "auto: console on a terminal"),
    "log.level": ("debug, info or warning", "warning hides the reasons of decisions; debug is loud"),
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
    unit: str
    range: str


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
            unit = "s" if f.name.endswith("_s") else "bytes" if f.name.endswith("_bytes") else ""
            words = allowed(msgspec.inspect.type_info(f.type))
            found.append(Parameter(section, f.name, f.required, default, meaning, cost, unit, words))
    return found


_FILL = {"cluster.id": "main", "cluster.preferred_primary": "n1", "node.name": "n1"} | {
    "postgresql.data_dir": "/var/lib/postgresql/15/main",
    "postgresql.user": "postgres",
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
        lines += [f"# {p.meaning} ({p.cost})", f"# {p.range}{' ' if p.unit else ''}{p.unit}"]
        name = f"{p.section}.{p.key}"
        value = _FILL.get(name, p.default)
        text = " ".join(tomli_w.dumps({p.key: value}).split()) if value is not None else f"{p.key} = ..."
        if isinstance(value, dict):  # a table of tables: at the end of the section's other keys
            text = f'[{name}.NAME]\ntype = "physical"'
        lines += [text if p.required or name in _FILL else f"# {text}".replace("\n", "\n# "), ""]
    return "\n".join(lines)


_FITTING = (
    (
        "`timing.failover_timeout_s`",
        "more than lease + `timing.fence_timeout_s` (or `watchdog.timeout_s`, where longer) + `timing.safety_margin_s`",
        "a replica could promote before the old primary has certainly stopped",
    ),
    ("lease", f"at least {times.LEAST_LEASE_S:g} s", "an agent that hangs could not be replaced within it"),
    (
        "`timing.fence_timeout_s`",
        f"at least {times.LEAST_FENCE_S:g} s",
        "a fencer that hangs could not be replaced, and its successor have fenced, within it",
    ),
    (
        "`supervisor.ping_timeout_s`",
        f"{times.LEAST_HUNG_S:g} s to {times.AGENT_HUNG_SHARE:g} of the lease",
        "an agent that hangs once costs its primary; or a healthy one is killed again and again",
    ),
    (
        "`supervisor.ping_interval_s`",
        "at most half of `supervisor.ping_timeout_s`",
        "an agent looks hung that was not asked",
    ),
    (
        "`sickness.patience_s`",
        "at least 2 × `timing.heartbeat_timeout_s` + `timing.heartbeat_interval_s` / 2",
        "a busy PostgreSQL counts as sick after two looks",
    ),
    (
        "`rejoin.after_s`",
        f"at least {times.RECONNECT_S:g} s",
        "a standby that only connects anew is rewound or copied, which destroys what only it has",
    ),
)


def _default(value: object) -> str:
    if value is None or value == {}:
        return "none"
    text = (
        " ".join(tomli_w.dumps({"x": value}).removeprefix("x = ").split())
        .replace("[ ", "[")
        .replace(", ]", "]")
    )
    return f"`{text}`"


def markdown() -> str:
    """docs/configuration.md, whole."""
    lines = [
        "# Configuration",
        "",
        "One TOML file and `HARMONY_<SECTION>_<KEY>` variables over it. Unknown keys are errors. Rendered",
        "from the code by `make rewrite`; a test keeps it equal.",
        "",
        "`[members.NAME]` with `host` and `port` (default 5432) names each node, at most 32; as a variable:",
        "`HARMONY_MEMBERS=n1=HOST:PORT,n2=HOST:PORT`, in place of the file's.",
        "",
        "| parameter | default | range | unit | what it is | raising, lowering or leaving it out |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for p in parameters():
        preset = p.section == "timing" and p.key != "preset"
        default = "required" if p.required else "the preset's" if preset else _default(p.default)
        name = f"`{p.section}.{p.key}`"
        lines.append(f"| {name} | {default} | {p.range} | {p.unit} | {p.meaning} | {p.cost} |")
    names = list(PRESETS)
    lines += [
        "",
        "## Presets",
        "",
        "| parameter | " + " | ".join(names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    for key in (k for k in msgspec.structs.asdict(PRESETS["fast"]) if k != "watchdog_timeout_s"):
        lines.append(f"| `{key}` | " + " | ".join(f"{getattr(PRESETS[n], key):g}" for n in names) + " |")
    lines.append("| lease (derived), s | " + " | ".join(f"{PRESETS[n].lease_s:g}" for n in names) + " |")
    lines += [
        "",
        "## Times that must fit into others",
        "",
        "`harmonyctl config check` refuses what does not fit, by its name and with what to do. It warns of a start or",
        "stop that takes longer than harmony.service allows, and of a watchdog that is faster than a hung fencer is",
        "replaced.",
        "",
        "| time | must be | or else |",
        "| --- | --- | --- |",
        *(f"| {time} | {must} | {why} |" for time, must, why in _FITTING),
    ]
    return "\n".join(lines) + "\n"
