"""What the fencer says about itself: its own memory, and one look at the database. It changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from harmony_fencer.config import FencerConfig
from harmony_fencer.engine import Parts
from harmony_fencer.ledger import Ledger
from harmony_fencer.protocol import VERSION, Generation, OrderRecord, SelfFence, Status, SyncTold
from harmony_fencer.timelines import Newest
from harmony_fencer.watchdog import Policy


@dataclass(frozen=True, slots=True)
class Memory:
    """What only the fencer itself knows, as Status has it."""

    active: Generation | None
    deadline_ns: int | None
    order: OrderRecord | None
    self_fence: SelfFence | None
    sync: SyncTold | None
    proven: bool
    shutdown_lsn: int | None
    running: bool
    starts: int
    system_identifier: str | None
    timeline: Newest
    change: int
    spent: bool


def status(c: FencerConfig, ledger: Ledger, parts: Parts, watchdog: Policy, m: Memory) -> Status:
    """Everything, as of now."""
    engine, state = parts.engine, ledger.state
    standby = engine.is_standby()
    return Status(
        v=VERSION,
        node=c.node,
        fencer_id=state.fencer_id,
        boot_id=parts.boot_id,
        now_boottime_ns=parts.clock.now_ns(),
        trusted=not ledger.untrusted,
        trust_detail=ledger.untrusted[:400],
        highest=state.highest,
        active=m.active,
        lease_deadline_boottime_ns=m.deadline_ns,
        order=m.order,
        self_fence=m.self_fence,
        fence_proven=m.proven,
        shutdown_lsn=m.shutdown_lsn if m.proven else None,
        postgres="running" if m.running else "down",
        postgres_starts=m.starts,
        following=state.following if m.running and standby else None,
        is_standby=standby,
        was_standby=engine.was_standby,
        system_identifier=m.system_identifier,
        timeline=m.timeline.number,
        begins=m.timeline.begins,
        sync=m.sync,
        latch=ledger.latch,
        adopting=ledger.permits(engine),
        held_by=engine.where,
        watchdog=str(watchdog),
        cannot_lead=watchdog.cannot_lead,
        progress=engine.rejoin.progress[:300],
        unfinished=engine.rejoin.unfinished,
        empty=engine.rejoin.empty,
        cannot_rewind=engine.rejoin.cannot_rewind,
        change=m.change,
        spent=m.spent,
    )
