"""The fencer's resolved configuration, as the supervisor writes it to run_dir/fencer.json."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import Literal

import msgspec

EXIT_CONFIG = 78


class Address(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a member's PostgreSQL listens."""

    host: str
    port: int


class FencerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Paths absolute, times in seconds."""

    node: str
    agent_uid: int
    agent_gid: int
    postgres_user: str | None
    data_dir: str
    config_file: str  # the user's postgresql.conf
    run: Literal["pg_ctl", "systemd"]
    unit: str  # PostgreSQL's unit, for run = "systemd"
    cgroup: bool  # put PostgreSQL into a cgroup of its own where the host has cgroup v2
    bin_dir: str
    library_dir: str | None
    port: int
    listen_addresses: str
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

    @property
    def lease_ns(self) -> int:
        return round(self.lease_s * 1e9)

    @property
    def postgres_ids(self) -> tuple[int, int]:
        """(uid, gid) that PostgreSQL runs as."""
        if self.postgres_user is None:
            return os.getuid(), os.getgid()
        entry = pwd.getpwnam(self.postgres_user)
        return entry.pw_uid, entry.pw_gid


def load(path: str) -> FencerConfig:
    """Read and check. Raises ValueError with the place of what is wrong."""
    try:
        config = msgspec.json.decode(Path(path).read_bytes(), type=FencerConfig)
    except (OSError, msgspec.DecodeError) as e:
        raise ValueError(f"{path}: {e}") from e
    if config.postgres_user is not None:
        try:
            pwd.getpwnam(config.postgres_user)
        except KeyError as e:
            raise ValueError(f"{path}: postgres_user: no such user: {config.postgres_user}") from e
    return config
