"""What the fencer needs of a database: the interface that PostgreSQL implements, and models in tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from harmony_fencer.clock import Clock
from harmony_fencer.log import log
from harmony_fencer.protocol import Rung, SyncRule
from harmony_fencer.timelines import Newest
from harmony_fencer.watchdog import Watchdog


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one fence. `detail`: what was not as it should be, the processes left, and what to do."""

    proven: bool
    detail: str
    rungs: tuple[Rung, ...]
    took_ms: float
    shutdown_lsn: int | None = None  # of a clean one that is proven: where its checkpoint record begins
    spent: bool = False  # not proven, yet what is left is killed and in the kernel: it never runs again


class Rejoining(Protocol):
    """How a directory that cannot follow is made one that can (rejoin.py)."""

    @property
    def unfinished(self) -> bool:
        """Only another rejoin can start PostgreSQL here. Never raises."""

    @property
    def progress(self) -> str:
        """What is under way or unfinished, for people; "" nothing."""

    @property
    def cannot_rewind(self) -> str:
        """Why pg_rewind could not help here, with what to do; "": it could, or it is not known."""

    @property
    def empty(self) -> str:
        """By which method something may be made here, where nothing is; "": none, or something is there."""

    async def learn(self) -> None:
        """Look at what cannot_rewind tells. Never raises."""

    async def check(self, primary: str, system_identifier: str, *, clone: bool) -> str:
        """Before anything is stopped: "", or why only a copy helps. Raises PostgresError: neither does."""

    async def run(
        self, primary: str, system_identifier: str, testimony: bytes, *, why_clone: str, slot: bool
    ) -> str:
        """Of what is stopped: make it a standby of `primary` and start it. Raises PostgresError, OSError."""


class Engine(Protocol):
    """One data directory. Everything may be called at any time; only what says so raises."""

    where: str  # how its processes are held: its cgroup, or the process tree and why

    @property
    def rejoin(self) -> Rejoining:
        """The way back of a directory that cannot follow."""

    def initialised(self) -> bool:
        """Whether there is a data directory at all."""

    def is_standby(self) -> bool:
        """Marked so that whoever starts it gets a read-only standby."""

    def pids(self) -> list[int]:
        """Live processes, the postmaster first. Raises OSError: cannot tell."""

    def postmaster(self) -> int | None:
        """The live postmaster's pid. Raises OSError: cannot tell."""

    def could_write(self) -> bool:
        """Not marked as a standby, or running as a primary all the same. Cheap; True when it cannot be told."""

    @property
    def halted(self) -> bool:
        """halt() was called and no stop() has proven all of it gone since."""

    def halt(self) -> None:
        """Stop all writes at once, without waiting for anything but the kernel. Never raises."""

    async def stop(self, *, clean_until_ns: int = 0) -> Outcome:
        """Climb the ladder: a clean shutdown until `clean_until_ns` (0: none), then halt and kill.

        Of one that was to be clean the outcome also tells the shutdown checkpoint, where there was one.
        """

    async def ended(self, pid: int, within_s: float) -> bool:
        """Wait for the process's end, `within_s` at most: whether it has ended. Raises OSError: cannot tell.

        Where it `notices`, also until something that could_write() depends on may have changed.
        """

    @property
    def notices(self) -> bool:
        """Whether ended() returns as soon as could_write() may have changed."""

    async def system_identifier(self) -> str | None:
        """From the control file, once read for good."""

    async def in_production(self) -> bool:
        """Whether the control file says that it is (or was) writable; True when it cannot be read."""

    async def mark_standby(self) -> None:
        """Make it a standby at its next start, durably. Raises OSError."""

    async def found(self, testimony: bytes) -> None:
        """Make a new cluster, where nothing is and the configuration says so. Raises PostgresError, OSError."""

    async def configure(
        self, primary: str | None, sync: SyncRule | None, testimony: bytes, *, slot: bool = False
    ) -> None:
        """Write what Harmony owns, and the witness beside it. Raises PostgresError, OSError.

        `sync` None: whatever it commits waits, for ever; of a standby. `slot`: the primary has one for this node.
        """

    async def start(self) -> None:
        """Start as a standby and wait until it answers. Raises PostgresError, OSError."""

    async def reload(self) -> None:
        """Make it read its configuration again. Raises PostgresError."""

    async def promote(self, reserved: int) -> Newest:
        """Promote, wait for the proof, and return the timeline: `reserved`, where that is not 0.

        Raises PostgresError (TimelineTakenError: it is not newer than what is here), OSError.
        """

    @property
    def was_standby(self) -> bool:
        """Whether the control file says that what ran here last was a standby; False where it does not tell."""

    def timeline(self) -> Newest:
        """The newest timeline that has WAL here, and where it begins."""


def look(engine: Engine) -> tuple[bool, bool]:
    """(whether a process of PostgreSQL lives, whether a postmaster does); what cannot be told is assumed."""
    try:
        return bool(engine.pids()), engine.postmaster() is not None
    except OSError as e:
        log.error("cannot look for PostgreSQL; assuming the worst", why=str(e))
        return True, False


@dataclass(frozen=True)
class Parts:
    """What the fencer stands on; models of them in tests."""

    engine: Engine
    clock: Clock
    boot_id: str
    utc_now: Callable[[], str]
    watchdog: Watchdog | None = None
