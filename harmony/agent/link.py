"""The agent's link to its fencer: sends orders and renewals, watches the status, and says what it sees.

Two connections: on one it orders and renews, on the other it waits for changes, so that neither waits for the
other. It decides nothing and repeats nothing: an order that was not accepted is the core's to send anew.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog
import trio

from harmony.agent.fencer import FencerClient
from harmony.core.messages import (
    Event,
    FencerSeen,
    FencerSilent,
    FencerView,
    Order,
    OrderRefused,
    Renew,
    RuleRefused,
    TellRule,
)
from harmony.core.sync import HOLD, Rule
from harmony.errors import FencerUnavailable
from harmony.fencer_client import protocol

ANSWER_S = 0.5
WATCH_MS = 500
log = structlog.get_logger("fencer-link")


class FencerLink:
    """`run()` owns the connections; `send()` queues (bounded) what the core decided, in order."""

    def __init__(self, socket_path: str, post: Callable[[Event], None]) -> None:
        self._path = socket_path
        self._post = post
        self._send, self._receive = trio.open_memory_channel[Order | Renew | TellRule](64)
        self._told = ""

    def send(self, command: Order | Renew | TellRule) -> None:
        """Queue a command. A full queue (a fencer silent for long) drops it: the core sends anew."""
        try:
            self._send.send_nowait(command)
        except trio.WouldBlock:
            log.warning("fencer queue full; dropped", command=type(command).__name__)

    async def run(self) -> None:
        """Connect, and connect again, for ever."""
        pause = 0.05
        while True:
            began = trio.current_time()
            why = ""
            orders, watch = FencerClient(self._path), FencerClient(self._path)
            try:
                await self._connected(orders, watch)
            except* FencerUnavailable as group:
                why = "; ".join(str(e) for e in group.exceptions)
            finally:
                await orders.close()
                await watch.close()
            self._post(FencerSilent(why))
            if why != self._told:
                self._told = why
                log.warning("fencer unreachable", why=why)
            pause = 0.05 if trio.current_time() - began > 1.0 else min(1.0, pause * 2)
            await trio.sleep(pause)

    async def _connected(self, orders: FencerClient, watch: FencerClient) -> None:
        async with trio.open_nursery() as nursery:
            await orders.connect()
            await watch.connect()
            nursery.start_soon(self._serve, orders)
            nursery.start_soon(self._watch, watch)

    async def _serve(self, client: FencerClient) -> None:
        while True:
            command = await self._receive.receive()
            match command:
                case Order():
                    await self._order(client, command)
                case Renew():
                    await self._renew(client, command)
                case TellRule():
                    await self._tell(client, command)

    async def _watch(self, client: FencerClient) -> None:
        seen = await self._status(client, protocol.Hello(client="harmony-agent"))
        while True:
            seen = await self._status(client, protocol.StatusRequest(unless=seen, wait_ms=WATCH_MS))

    async def _status(self, client: FencerClient, request: protocol.Hello | protocol.StatusRequest) -> int:
        reply = await client.request(request, timeout_s=ANSWER_S + WATCH_MS / 1000)
        if not isinstance(reply, protocol.Status):
            raise FencerUnavailable(f"the fencer answered a status request with {reply}")
        if self._told:
            self._told = ""
            log.info("fencer reachable", node=reply.node, generation=str(reply.highest))
        self._post(FencerSeen(_view(reply)))
        return reply.change

    async def _order(self, client: FencerClient, o: Order) -> None:
        generation = protocol.Generation(*o.generation)
        request: protocol.Request
        if o.op == "activate":
            rule = protocol.SyncRule(o.sync_count, o.sync_voters)
            request = protocol.Activate(
                generation=generation,
                deadline_boottime_ns=o.deadline_ns,
                sync=rule,
                timeline=o.timeline,
            )
        elif o.op == "follow":
            request = protocol.Follow(generation=generation, primary=o.primary, slot=o.slot)
        elif o.op == "rejoin":
            request = protocol.Rejoin(
                generation=generation,
                primary=o.primary or "",
                system_identifier=o.system_identifier,
                clone=o.clone,
                slot=o.slot,
            )
        else:
            request = protocol.Fence(generation=generation, reason=o.reason, clean=o.clean)
        reply = await client.request(request, timeout_s=ANSWER_S)
        if isinstance(reply, protocol.Refusal):
            log.warning(
                "order refused", op=o.op, generation=str(generation), error=reply.error, detail=reply.detail
            )
            self._post(OrderRefused(o.generation, reply.error, reply.detail))
        else:
            log.info("order accepted", op=o.op, generation=str(generation), reason=o.reason)

    async def _renew(self, client: FencerClient, r: Renew) -> None:
        generation = protocol.Generation(*r.generation)
        reply = await client.request(
            protocol.Renew(generation=generation, deadline_boottime_ns=r.deadline_ns), timeout_s=ANSWER_S
        )
        if isinstance(reply, protocol.Refusal):
            log.warning("renewal refused", generation=str(generation), error=reply.error, detail=reply.detail)

    async def _tell(self, client: FencerClient, t: TellRule) -> None:
        rule = protocol.SyncRule(t.rule.count, t.rule.voters) if t.rule != HOLD else None
        request = protocol.Sync(generation=protocol.Generation(*t.generation), number=t.number, rule=rule)
        reply = await client.request(request, timeout_s=ANSWER_S)
        if isinstance(reply, protocol.Refusal):
            log.warning("rule refused", number=t.number, error=reply.error, detail=reply.detail)
            self._post(RuleRefused(t.number))
        else:
            log.info("whom commits wait for", number=t.number, rule=str(t.rule))


def _rule(s: protocol.Status) -> Rule | None:
    if s.sync is None:
        return None
    return Rule(s.sync.rule.count, s.sync.rule.voters) if s.sync.rule is not None else HOLD


def _view(s: protocol.Status) -> FencerView:
    return FencerView(
        fencer_id=s.fencer_id,
        # A node that is required to have a watchdog and has none must not be a candidate either.
        trusted=s.trusted and not s.cannot_lead,
        detail=s.trust_detail or s.cannot_lead,
        highest=(s.highest.term, s.highest.order),
        active=(s.active.term, s.active.order) if s.active is not None else None,
        lease_deadline_ns=s.lease_deadline_boottime_ns,
        order=(s.order.generation.term, s.order.generation.order) if s.order is not None else None,
        order_op=s.order.op if s.order is not None else "",
        order_state=s.order.state if s.order is not None else "",
        order_detail=s.order.detail if s.order is not None else "",
        empty=s.empty,
        was_standby=s.was_standby,
        adopting=s.adopting,
        timeline=s.timeline,
        begins=s.begins,
        fence_proven=s.fence_proven,
        postgres_up=s.postgres == "running",
        following=s.following,
        is_standby=s.is_standby,
        system_identifier=s.system_identifier,
        latched=f"{s.latch.reason} (by {s.latch.who}, {s.latch.at_utc})" if s.latch is not None else None,
        shutdown_lsn=s.shutdown_lsn,
        unfinished=s.unfinished,
        progress=s.progress,
        cannot_rewind=s.cannot_rewind,
        spent=s.spent,
        rule=_rule(s),
        rule_number=s.sync.number if s.sync is not None else 0,
        rule_done=s.sync is not None and s.sync.done,
    )
