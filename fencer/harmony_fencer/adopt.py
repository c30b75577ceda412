"""An operator's permit: a primary that ran before Harmony runs on unfenced until it is taken over (docs/adoption.md).

It is about one postmaster in one boot, on a node whose fencer has never accepted an order. The first order ends it,
whichever it is: from then on the node is guarded as any other. It stands in run_dir: a one-shot fence that looks for
it waits for no disk. Nothing here touches PostgreSQL.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Protocol

import msgspec

from harmony_fencer.clock import boot_ns
from harmony_fencer.decoding import decoded
from harmony_fencer.durable import read_small, remove, replace, seal, unseal

NAME = "fencer.adopt"
_START_TIME = 19  # proc(5), stat, field 22; counted after the name


class Permit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which postmaster: `started` is its start in clock ticks since the boot, `granted_ns` CLOCK_BOOTTIME.

    Not the boot's id: in a container (systemd-nspawn) it is another one for who runs in a unit's sandbox.
    """

    granted_ns: int
    pid: int
    started: int
    who: str
    at_utc: str

    def covers(self, engine: Running) -> bool:
        """Whether this very postmaster runs, as a primary. Never raises."""
        try:
            return (
                engine.postmaster() == self.pid and started(self.pid) == self.started and engine.could_write()
            )
        except OSError:
            return False


class Running(Protocol):
    """What a permit must know of the engine."""

    def postmaster(self) -> int | None: ...
    def could_write(self) -> bool: ...


def started(pid: int) -> int:
    """When a process was started, in clock ticks since the boot. Raises OSError."""
    return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[_START_TIME])


def unit_of(pid: int) -> str:
    """The systemd unit that a process runs in; "": none, or it cannot be told."""
    try:
        groups = Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return ""
    names = [part for line in groups.splitlines() for part in line.split("/") if part.endswith(".service")]
    return names[-1] if names else ""


def system_identifier(data: Path) -> str:
    """Of the control file, without a program. Raises OSError."""
    try:
        return str(struct.unpack_from("=Q", read_small(data / "global" / "pg_control", 8))[0])
    except struct.error as e:
        raise OSError(f"{data}/global/pg_control is cut short") from e


def grant(folder: Path, permit: Permit) -> None:
    """Durable when it returns. Raises OSError."""
    replace(folder / NAME, seal(msgspec.json.encode(permit)))


def withdraw(folder: Path) -> None:
    """Raises OSError."""
    remove(folder / NAME)


def load(folder: Path) -> Permit | None:
    """The permit; what cannot be read is none, nor is what was granted at a time that this boot has not reached."""
    try:
        found = decoded(msgspec.json.Decoder(Permit), unseal(read_small(folder / NAME)))
    except (OSError, ValueError):
        return None
    return found if found.granted_ns <= boot_ns() else None
