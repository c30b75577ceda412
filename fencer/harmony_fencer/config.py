"""The fencer's resolved configuration, as the supervisor writes it to run_dir/fencer.json."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from harmony_fencer.decoding import Unreadable, decoded

EXIT_CONFIG = 78


class Address(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a member's PostgreSQL listens."""

    host: str
    port: int


class PostgresIds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whom PostgreSQL runs as."""

    uid: int
    gid: int
    groups: tuple[int, ...]


class RejoinConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a rejoin may do and leave behind."""

    clone: bool = True  # copy anew where pg_rewind cannot help
    keep_old: int = 1  # old data directories that are kept
    keep_old_mb: int = 0  # and how much they may hold together; 0: no limit
    keep_free_mb: int = 256  # room that a copy must leave


class BootstrapConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a data directory is made where nothing is. `sql`: run once in a cluster made by initdb."""

    method: Literal["none", "copy", "initdb", "command"] = "none"
    command: str = ""
    timeout_s: float = 3600.0
    initdb_options: tuple[str, ...] = ()
    hba: tuple[str, ...] = ()
    sql: str = ""


class SlotsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Replication slots. `keep_mb`: WAL that a slot may hold back; 0: a tenth of the disk."""

    own: bool = False  # stream through a slot of this node, where an order says that it is there
    keep_mb: int = 0
    synced: bool = False  # have PostgreSQL 17 and newer copy the primary's logical failover slots


class FencerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Paths absolute, times in seconds."""

    node: str
    agent_uid: int
    agent_gid: int
    # uid, gid and groups that PostgreSQL runs as; null: our own. Numbers: the name services (LDAP, sssd) may
    # be as dead as the network when it matters.
    postgres_ids: PostgresIds | None
    data_dir: str
    config_file: str  # the user's postgresql.conf
    run: Literal["pg_ctl", "systemd"]
    unit: str  # PostgreSQL's unit, for run = "systemd"
    cgroup: bool  # put PostgreSQL into a cgroup of its own where the host has cgroup v2
    bin_dir: str
    library_dir: str | None
    port: int
    listen_addresses: str | None  # null: as the user's own configuration says
    socket_dir: str
    members: dict[str, Address]
    replication_user: str
    replication_passfile: str | None
    lease_s: float
    fence_timeout_s: float
    start_timeout_s: float
    watchdog_mode: Literal["off", "automatic", "required"]
    watchdog_device: str
    watchdog_timeout_s: float
    state_dir: str
    run_dir: str
    log_format: Literal["auto", "json", "console"]
    synchronous: bool = False  # commits may have to wait for standbys here
    rejoin: RejoinConfig = RejoinConfig()
    bootstrap: BootstrapConfig = BootstrapConfig()
    slots: SlotsConfig = SlotsConfig()

    @property
    def lease_ns(self) -> int:
        return round(self.lease_s * 1e9)


def load(path: str) -> FencerConfig:
    """Read and check. Raises ValueError with the place of what is wrong, and OSError (a restart may help)."""
    try:
        return decoded(msgspec.json.Decoder(FencerConfig), Path(path).read_bytes())
    except (FileNotFoundError, Unreadable) as e:
        raise ValueError(f"{path}: {e}") from e
