"""PostgreSQL's settings held against what the cluster needs: what each wrong one means, and what to do. Pure.

It changes nothing, and nothing that it says makes anybody fence: a running primary goes on running.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from harmony.agent.slots import KEEP, Found, Wanted
from harmony.core.slots import Duty
from harmony.records import SLOT_PREFIX, Note

# A standby must not have less of these than its primary (PostgreSQL, "Hot Standby", administrator's overview).
LIMITS = (
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
)
ASKED = (
    *LIMITS,
    KEEP,
    "max_replication_slots",
    "wal_level",
    "hot_standby",
    "wal_log_hints",
    "data_checksums",
    "full_page_writes",
    "fsync",
    "synchronous_commit",
    "primary_slot_name",
)
SPARE_SENDERS = 2  # pg_basebackup of a rejoin takes two


def limits(found: Found) -> dict[str, int]:
    """The values that a standby of this one must have."""
    return {name: int(found.settings[name].value) for name in LIMITS if name in found.settings}


def check(found: Found, wanted: Wanted, duty: Duty | None) -> list[Note]:
    """Everything that is wrong, in words; an alarm endangers data."""
    values = {name: s.value for name, s in found.settings.items()}
    said = [*_data(values, wanted)]
    said += map(Note, (*_room(values, found, wanted), *_standing(values, duty)))
    said += [
        Note(f"{name} was changed and waits for a restart of PostgreSQL: until then {s.value} counts")
        for name, s in found.settings.items()
        if s.pending
    ]
    return said


def _data(values: Mapping[str, str], wanted: Wanted) -> Iterator[Note]:
    if values.get("fsync") == "off":
        yield Note(
            "fsync is off: a crash of this host may lose acknowledged commits and corrupt the database, "
            "whatever Harmony does. Set fsync = on in postgresql.conf and reload",
            alarm=True,
        )
    if values.get("full_page_writes") == "off":
        yield Note(
            "full_page_writes is off: a crash of this host may leave torn pages, and pg_rewind refuses to "
            "help. Set full_page_writes = on and reload",
            alarm=True,
        )
    commit = values.get("synchronous_commit")
    if wanted.synchronous and commit in {"off", "local"}:
        yield Note(
            f"synchronous_commit is {commit}: commits do not wait for a standby, as replication.mode says "
            'they do, and a failover may lose them. Set it to on, or replication.mode to "off"',
            alarm=True,
        )
    if wanted.synchronous and commit == "remote_write":
        yield Note(
            "synchronous_commit is remote_write: a commit is lost when the primary is lost and the hosts of its "
            "standbys crash with it. Set it to on where that is not wanted"
        )
    if values.get("wal_log_hints") == "off" and values.get("data_checksums") == "off":
        yield Note(
            "wal_log_hints is off and there are no data checksums: an old primary is copied anew instead of rewound. "
            "Harmony sets wal_log_hints; it counts from the next restart of PostgreSQL"
        )


def _room(values: Mapping[str, str], found: Found, wanted: Wanted) -> Iterator[str]:
    others = len(wanted.members) - 1
    level, needed = values.get("wal_level"), "logical" if wanted.logical else "replica"
    if level == "minimal" or (level == "replica" and needed == "logical"):
        yield (
            f"wal_level is {level}: {'no standby' if level == 'minimal' else 'no logical slot'} can work. "
            f"Set wal_level = {needed} on every member and restart PostgreSQL"
        )
    if values.get("hot_standby") == "off":
        yield (
            "hot_standby is off: as a standby this node would answer nothing, and could not be watched. "
            "Harmony sets it; take it out of postgresql.auto.conf (ALTER SYSTEM RESET hot_standby) and restart"
        )
    senders = int(values.get("max_wal_senders", others + SPARE_SENDERS))
    if senders < others + SPARE_SENDERS:
        yield (
            f"max_wal_senders is {senders}: {others} standbys and a copy need {others + SPARE_SENDERS}. One that "
            "finds none free does not stream. Raise it on every member, the standbys first, and restart"
        )
    if wanted.slots:
        used = [
            s for s in found.slots if s.name not in wanted.permanent and not s.name.startswith(SLOT_PREFIX)
        ]
        needs = others + len(wanted.permanent) + len(used)
        have = int(values.get("max_replication_slots", needs))
        if have < needs:
            yield (
                f"max_replication_slots is {have}, and {needs} are needed (other members {others}, permanent "
                f"{len(wanted.permanent)}, others' {len(used)}): raise it on every member, and restart"
            )
        keep = found.settings.get(KEEP)
        if keep is not None and keep.value == "-1" and keep.source != "default":
            yield (
                f"{KEEP} is -1 by your own setting: a slot of a member that is gone may fill the disk. "
                "Give it a bound, or take it out, and Harmony sets one"
            )


def _standing(values: Mapping[str, str], duty: Duty | None) -> Iterator[str]:
    if duty is None or duty.role != "standby":
        return
    for name, theirs in duty.limits.items():
        ours = int(values.get(name, theirs))
        if ours < theirs:
            yield (
                f"{name} is {ours} here and {theirs} on {duty.primary}: at the next start, or when that changes, this "
                f"standby stops replaying WAL or does not start. Set it to {theirs} or more here and restart"
            )
