"""The normal form loses nothing that a decision reads: held against the real `step`, on real Views.

From the View as it is and from its normal form, some seconds and some writes later, a step on the same events
must order the same, and both results must have the same normal form. By induction all that follows is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace as with_fields

import pytest
from msgspec.structs import replace

from harmony.core.messages import (
    ClusterSeen,
    Command,
    DbSeen,
    Event,
    FencerSeen,
    Log,
    MemberSeen,
    Order,
    Renew,
    Write,
    WriteDone,
)
from harmony.core.node import step
from harmony.core.register import Attempt
from harmony.core.view import View
from harmony.records import CLUSTER_STATE, ClusterState, Member
from tests.exhaustive import normal
from tests.exhaustive.agent import ME, Moment, Node, Setting, Store, cluster_seen, read_all
from tests.exhaustive.explore import calm, explore
from tests.exhaustive.host import NODES, Host, fencer_view
from tests.exhaustive.model import FAULTS, Model
from tests.exhaustive.normal import COUNTER, NEWEST, NOW, UNIT
from tests.exhaustive.test_exhaustive import timing

pytestmark = pytest.mark.computes

T = timing()
SETTING = Setting(T)


@pytest.fixture(scope="module")
def samples() -> list[tuple[str, View, Host, Store]]:
    """Views as `step` has left them, from explorations with and without faults."""
    found = []
    for faults, depth in ((0, 20), (1, 8)):
        model = Model(SETTING, faults, FAULTS if faults else frozenset(), 3)
        explore(model, [calm(model) if faults else model.empty()], depth=depth)
        for (number, i, store_number, streams, what, late), _ in list(model.steps.items())[::29]:
            node, store = model.nodes.values[number], model.stores.values[store_number]
            if what == "steps":
                found.append((NODES[i], *_raw(node, NODES[i], store, streams, late)))
    return found


def _raw(node: Node, name: str, store: Store, streams: bool, late: bool) -> tuple[View, Host, Store]:
    m = Moment(node, name, store, streams, SETTING, late)
    m.run([])
    seen, _ = normal.numbered(m.view, name)
    return replace(seen, counter=COUNTER), m.host, m.store


def _events(
    name: str, host: Host, store: Store, seconds: int, by: int, pending: tuple[Attempt, ...]
) -> Iterator[list[Event]]:
    """What may be told at one moment, at NOW."""
    told: list[Event] = [FencerSeen(fencer_view(host, name))]
    if host.postgres != "down":
        primary = host.postgres == "primary"
        db, lsn = ("primary", 1000) if primary else ("standby", 1001)
        told.append(DbSeen(db, 1, lsn, lsn, False, "sys", NOW))  # type: ignore[arg-type]
    later = store._replace(age=store.age + seconds, member_ages=tuple(a + seconds for a in store.member_ages))
    yield told
    yield [*told, *read_all(later, name)]
    if store.record is not None:
        yield [*told, cluster_seen(later, name, by_read=False)]
    for attempt in pending[-1:]:
        if by:  # a write that was stored has a newer revision than what it replaced
            yield [*told, WriteDone(CLUSTER_STATE, attempt.id, "acked", NEWEST)]
        yield [*told, WriteDone(CLUSTER_STATE, attempt.id, "unknown")]


def _shifted(e: Event, ns: int, by: int) -> Event:
    """The same event for who counts time and revisions from another beginning."""
    match e:
        case FencerSeen(view=f):
            deadline = f.lease_deadline_ns
            return FencerSeen(
                with_fields(f, lease_deadline_ns=deadline + ns if deadline is not None else None)
            )
        case DbSeen():
            return with_fields(e, asked_ns=e.asked_ns + ns)
        case ClusterSeen() if e.record is not None:
            return with_fields(e, revision=e.revision + by, stamp_ns=e.stamp_ns + ns)
        case WriteDone():
            return with_fields(e, revision=e.revision + by if e.revision else 0)
        case MemberSeen() if e.record is not None:
            seen = e.record.seen_revision
            record = replace(e.record, seen_revision=seen + by if seen else 0)
            return with_fields(e, record=record, stamp_ns=e.stamp_ns + ns)
        case _:
            return e


def _ordered(commands: list[Command], by: int, now_ns: int) -> list[object]:
    """Commands without absolute times and revisions, texts and attempts; no renewal that `admit` must refuse."""
    out: list[object] = []
    for c in commands:
        match c:
            case Log(row=row, before=before, after=after):
                out.append((row, before, after))
            case Renew(deadline_ns=deadline_ns):
                out += [c.generation] if deadline_ns > now_ns else []
            case Order():
                out.append((c.op, c.generation, c.primary, c.clean))
            case Write(record=ClusterState() as record):
                out.append(
                    (normal.cluster(record), c.revision - by if c.revision > normal.OLDEST + by else 0)
                )
            case Write(record=Member() as record):
                out.append(normal.behind(normal.member(record, T), by))
            case _:
                out.append(type(c))
    return out


def _quiet(commands: list[object]) -> list[object]:
    """A row that is logged again because its text was dropped is no difference."""
    return [c for c in commands if not (isinstance(c, tuple) and len(c) == 3 and c[1] == c[2])]


def _differences(a: View, b: View) -> dict[str, tuple[object, object]]:
    """By field, for people."""
    fields = a.__struct_fields__
    return {f: (getattr(a, f), getattr(b, f)) for f in fields if getattr(a, f) != getattr(b, f)}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("seconds", "by"), [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 2), (5, 1), (9, 0)])
def test_a_step_from_the_normal_form_is_the_same_step(
    samples: list[tuple[str, View, Host, Store]], seconds: int, by: int
) -> None:
    assert len(samples) > 300
    ns = seconds * UNIT
    for name, raw, host, store in samples:
        reduced = normal.view(raw, name, T, shift_ns=ns, by=by)
        for events in _events(name, host, store, seconds, by, raw.lead.pending):
            told = [_shifted(e, ns, by) for e in events]
            full, did = step(raw, told, ME[name], T, NOW + ns)
            less, does = step(reduced, events, ME[name], T, NOW)
            assert _quiet(_ordered(did, by, NOW + ns)) == _quiet(_ordered(does, 0, NOW)), (name, raw, events)
            after, instead = normal.view(full, name, T, shift_ns=ns, by=by), normal.view(less, name, T)
            assert _differences(after, instead) == {}, (name, raw, events)


def test_the_normal_form_is_one(samples: list[tuple[str, View, Host, Store]]) -> None:
    for name, raw, _, _ in samples:
        once = normal.view(raw, name, T)
        assert normal.view(once, name, T) == once
        assert once.revision in {0, *range(normal.OLDEST, NEWEST + 1)}
