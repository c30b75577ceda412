"""The agent's orders as its link sends them: for models that put the real core before the real admission."""

from __future__ import annotations

from harmony.core.messages import Order, Renew, TellRule
from harmony.core.sync import HOLD
from harmony_fencer import protocol
from harmony_fencer.protocol import Generation


def request(
    c: Order | Renew | TellRule,
) -> protocol.Activate | protocol.Fence | protocol.Follow | protocol.Rejoin | protocol.Renew | protocol.Sync:
    g = Generation(*c.generation)
    if isinstance(c, Renew):
        return protocol.Renew(generation=g, deadline_boottime_ns=c.deadline_ns)
    if isinstance(c, TellRule):
        told = protocol.SyncRule(c.rule.count, c.rule.voters) if c.rule != HOLD else None
        return protocol.Sync(generation=g, number=c.number, rule=told)
    match c.op:
        case "activate":
            rule = protocol.SyncRule(c.sync_count, c.sync_voters)
            return protocol.Activate(
                generation=g, deadline_boottime_ns=c.deadline_ns, sync=rule, timeline=c.timeline
            )
        case "fence":
            return protocol.Fence(generation=g, reason="", clean=c.clean)
        case "follow":
            return protocol.Follow(generation=g, primary=c.primary)
        case "rejoin":
            return protocol.Rejoin(
                generation=g, primary=c.primary or "", system_identifier=c.system_identifier, clone=c.clone
            )
        case _:
            raise AssertionError(f"no agent orders {c.op}")
