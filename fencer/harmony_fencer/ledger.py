"""The fencer's memory: what it keeps on disk, and in memory never ahead of the disk (I3). It decides nothing.

The state and the latch are durable in state_dir; the lease and a witness of the generation are in run_dir,
for this boot. A disk that fails makes the state *untrusted*; so does one that does not answer a fence in time, until it
has taken all that it missed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from harmony_fencer import adopt
from harmony_fencer import lease as leases
from harmony_fencer import state as states
from harmony_fencer.config import FencerConfig
from harmony_fencer.durable import REAL, Disk, in_thread
from harmony_fencer.engine import Engine
from harmony_fencer.log import log
from harmony_fencer.protocol import Generation, Latch, OrderRecord, SyncTold

UNHURRIED_S = 5.0  # how long an activate or follow waits for the disk of its generation
PATIENCE_SHARE = 0.25  # of fence_timeout: how long a disk may take before it counts as broken


def load_state(config: FencerConfig) -> tuple[states.State, str]:
    """The durable state and why it cannot be trusted, both witnesses heard."""
    witnesses = (Path(config.run_dir) / states.WITNESS, Path(config.data_dir) / states.WITNESS)
    return states.load(Path(config.state_dir), node=config.node, witnesses=witnesses)


class Ledger:
    """Of one fencer, read at its start."""

    def __init__(self, config: FencerConfig, boot_id: str, *, disk: Disk = REAL) -> None:
        self._node, self._boot_id, self._lease_ns = config.node, boot_id, config.lease_ns
        self._folder, self._run = Path(config.state_dir), Path(config.run_dir)
        self._patience_s = config.fence_timeout_s * PATIENCE_SHARE
        self._disk = disk
        self._changing = trio.Lock()
        # One writing thread at a time, abandoned ones included: an older content never lands after a newer.
        self._writing = trio.CapacityLimiter(1)
        self._missed = trio.Event()
        self.state, self.untrusted = load_state(config)
        self.latch = states.latch(self._folder)
        self._permit = adopt.load(self._run)

    # ------------------------------------------------------------ the state

    async def persist(
        self, change: Callable[[states.State], states.State], patience: trio.CancelScope | None = None
    ) -> None:
        """Durable first, then in memory, one writer at a time, each change made on the newest state.

        Raises OSError, also when the disk does not answer within `patience` (by default as long as a fence
        may wait for it). Its write may land later, but never after a newer one.
        """
        with patience or trio.move_on_after(self._patience_s):
            async with self._changing:
                before = self.state
                new = change(before)
                if not self.untrusted:  # else there is nothing on disk to keep right
                    await in_thread(lambda: states.write(self._folder, new, disk=self._disk), self._writing)
                # A fence that would not wait for this disk may have been accepted in memory meanwhile.
                self.state = new if self.state is before else change(self.state)
                return
        raise TimeoutError(f"the disk of {self._folder} did not answer in time")

    async def accept(
        self, record: OrderRecord, latch: Latch | None, patience: trio.CancelScope | None
    ) -> str:
        """Make a new order, its generation and its latch durable: "", or why the order is refused.

        A fence (`patience` None) is never refused for a broken disk: it is remembered in memory and by its
        witness, and nothing is activated until the disk has it, or a restart has found the disk repaired.
        """

        def newest(s: states.State) -> states.State:
            return msgspec.structs.replace(s, highest=record.generation, order=record)

        try:
            if latch is not None:
                await self.set_latch(latch)
            await self.persist(newest, patience)
        except OSError as e:
            if patience is not None:
                log.error("the state could not be made durable; order refused", why=str(e))
                return f"{self._folder}: {e}"
            if isinstance(e, TimeoutError) and not self.untrusted:
                self.untrusted = f"{e}; it is trusted again when it has kept the newest order"
                self._missed.set()
            self.untrusted = self.untrusted or f"{self._folder}: {e}; repair the disk and restart Harmony"
            self.state = newest(self.state)
            log.error("the state could not be made durable; fencing all the same", why=str(e))
        self.testify()
        return ""

    async def catch_up(self, tell: Callable[[], None]) -> None:
        """For ever: give a disk that did not answer in time what it missed, and trust it when it has all of that.

        `tell` is called then. A write that fails leaves it untrusted, until a restart.
        """
        while True:
            await self._missed.wait()
            self._missed = trio.Event()
            try:
                await self._write_all()
            except OSError as e:
                self.untrusted = f"{self._folder}: {e}; repair the disk and restart Harmony"
                log.error("the disk was slow, and now it fails", why=str(e))
                continue
            self.untrusted = ""
            log.warning("the disk has kept what it was too slow for, and is trusted again")
            tell()

    async def _write_all(self) -> None:
        """Return when state and latch are on disk as they are in memory. Raises OSError."""
        while True:
            state, latch = self.state, self.latch

            def write(state: states.State = state, latch: Latch | None = latch) -> None:
                if latch is not None and self.latch is latch:
                    states.set_latch(self._folder, latch, disk=self._disk)
                states.write(self._folder, state, disk=self._disk)

            await in_thread(write, self._writing)
            if self.state is state and self.latch is latch:
                return

    def testimony(self) -> bytes:
        """The witness of the highest generation, as it stands in the data directory."""
        return states.sealed_witness(self._witness(self.state.highest))

    def testify(self) -> None:
        """Leave a witness of the highest generation for this boot, also where the disk could not keep it."""
        try:
            states.testify(self._run / states.WITNESS, self._witness(self.state.highest))
        except OSError as e:
            log.seldom("no witness of the generation could be left in run_dir", why=str(e))

    def _witness(self, highest: Generation) -> states.Witness:
        return states.Witness(self._node, self.state.fencer_id, highest)

    # ------------------------------------------------------------ the latch

    @property
    def latched(self) -> bool:
        """Also by a latch that the one-shot fence set beside us while we hung: it is taken over."""
        if self.latch is None:
            self.latch = states.latch(self._folder)
        return self.latch is not None

    async def set_latch(self, latch: Latch) -> None:
        """In force at once; raises OSError when it is not durable."""
        self.latch = latch
        with trio.move_on_after(self._patience_s):
            await in_thread(lambda: states.set_latch(self._folder, latch, disk=self._disk), self._writing)
            return
        raise TimeoutError("the latch could not be made durable in time")

    async def lift_latch(self) -> None:
        """Raises OSError, and then it is still in force (after a restart: as the disk then shows it)."""
        with trio.move_on_after(self._patience_s):
            await in_thread(lambda: states.lift_latch(self._folder, disk=self._disk), self._writing)
            self.latch = None
            return
        raise TimeoutError("the latch could not be removed in time: the disk does not answer")

    # ------------------------------------------------------------ the permit

    def permits(self, engine: Engine) -> bool:
        """Whether PostgreSQL may run on without a lease: adoption was permitted, and nothing was ordered yet."""
        new = self.state.highest == Generation(0, 0) and not self.untrusted
        return self._permit is not None and new and not self.latched and self._permit.covers(engine)

    # ------------------------------------------------------------ the lease

    def lease(self, now_ns: int) -> leases.Lease | None:
        """The lease in force, as a fencer before us left it."""
        path = self._run / leases.NAME
        return leases.load(path, boot_id=self._boot_id, now_ns=now_ns, lease_ns=self._lease_ns)

    def is_mine(self, lease: leases.Lease) -> bool:
        """Whether the lease is of the newest order, a finished activate whose outcome can be believed."""
        order = self.state.order
        return (
            not self.untrusted
            and order is not None
            and (order.op, order.state) == ("activate", "done")
            and lease.generation == order.generation == self.state.highest
        )

    def save_lease(self, active: Generation, deadline_ns: int, sync: SyncTold | None) -> None:
        """Never raises: without it a restarted fencer would fence early, which is safe."""
        try:
            leases.save(self._run / leases.NAME, leases.Lease(active, deadline_ns, self._boot_id, sync))
        except OSError as e:
            log.seldom("the lease could not be saved", why=str(e))

    def drop_lease(self) -> None:
        """Never raises: it ends by itself, and the newest order speaks against it."""
        try:
            leases.clear(self._run / leases.NAME)
        except OSError as e:
            log.seldom("the lease file could not be removed", why=str(e))
