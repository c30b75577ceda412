"""The demo's claims are computed rightly: outage, lost rows, two writable primaries (I1, I2)."""

from __future__ import annotations

import math

import pytest

from harmony.demo.measure import (
    NS,
    Ack,
    Recording,
    Span,
    dual_primary_s,
    last_ack_s,
    lost_rows,
    outage_s,
    parse,
    spans,
)
from harmony.demo.scenarios import Measured, Scenario, judge, store_down_s


def writes(*times_s: float, took_s: float = 0.01) -> tuple[Ack, ...]:
    """Writes sent at these seconds."""
    return tuple(Ack(i, round(t * NS), round((t + took_s) * NS), 5432) for i, t in enumerate(times_s, 1))


def recording(*times_s: float, refused_s: tuple[float, ...] = ()) -> Recording:
    return Recording(writes(*times_s), tuple(round(t * NS) for t in refused_s))


def test_parse_leaves_out_a_line_cut_short() -> None:
    """A client killed in mid-line has acknowledged what stands in whole lines only (I2)."""
    found = parse(["A 1 10 20 5001\n", "R 30\n", "nonsense\n", "A 2 40 50 500"])
    assert found == Recording((Ack(1, 10, 20, 5001),), (30,))


def test_lost_rows_are_acknowledged_and_not_stored() -> None:
    """I2: a row stored without acknowledgement is not counted, a missing acknowledged one is."""
    assert lost_rows([1, 2, 3, 5], [1, 3, 4]) == (2, 5)
    assert lost_rows([1, 2], [1, 2, 3]) == ()


def test_outage_is_the_longest_gap_that_ends_after_the_fault() -> None:
    """A longer gap before the fault does not count; no write after it is endless."""
    acks = writes(0, 10, 10.1, 12.6, 12.7)
    assert outage_s(acks, round(10.2 * NS)) == pytest.approx(2.5)
    assert outage_s(acks, round(20 * NS)) == math.inf
    assert outage_s((), 0) == math.inf


def test_spans_break_at_refusals_and_silence() -> None:
    """A node that refused in between was not writable all the time; nor one silent for over a second."""
    found = spans(recording(1.0, 1.1, 1.3, 1.4, 5.0, refused_s=(0.5, 1.2, 1.25, 6.0)))
    assert [t / NS for s in found for t in (s.start_ns, s.end_ns)] == pytest.approx(
        [1.0, 1.11, 1.3, 1.41, 5.0, 5.01]
    )
    assert spans(Recording()) == ()


def test_a_refusal_during_a_write_does_not_break_the_span_later() -> None:
    """Only what lies between two writes breaks."""
    assert spans(recording(1.0, 1.02, refused_s=(1.005,))) == (Span(NS, round(1.03 * NS)),)


def test_no_overlap_when_one_takes_over_from_the_other() -> None:
    """I1 holds: n1 writes, then n2, then n1 comes back after n2 has gone."""
    nodes = {
        "n1": recording(1, 1.5, 9, 9.5),
        "n2": recording(5, 5.5, 6),
        "n3": recording(refused_s=(1, 2, 3)),
    }
    assert dual_primary_s(nodes) == 0


def test_overlap_is_measured_precisely() -> None:
    """I1 broken: from the new primary's first send to the old one's last answer."""
    nodes = {"n1": recording(1, 1.5, 2.0), "n2": recording(1.8, 2.2, 3)}
    assert dual_primary_s(nodes) == pytest.approx(0.21)


def test_three_at_once_are_not_counted_twice() -> None:
    """I1: the time during which two or more wrote."""
    nodes = {name: recording(1, 1.5) for name in ("n1", "n2", "n3")}
    assert dual_primary_s(nodes) == pytest.approx(0.51)


def test_touching_spans_do_not_overlap() -> None:
    """Ended at the very moment in which the other began: zero seconds."""
    nodes = {"n1": Recording((Ack(1, 0, NS, 1),)), "n2": Recording((Ack(1, NS, 2 * NS, 2),))}
    assert dual_primary_s(nodes) == 0


def test_last_ack_counts_from_the_fault() -> None:
    """W9: how long the old primary went on; never negative; only up to the store's return."""
    assert last_ack_s(recording(1, 2, 3), 2 * NS) == pytest.approx(1.01)
    assert last_ack_s(recording(1, 2, 3), 5 * NS) == 0
    assert last_ack_s(recording(1, 2, 30), 2 * NS, 20 * NS) == pytest.approx(0.01)
    assert last_ack_s(Recording(), 0) == 0


GOOD = Measured(4.2, 0, 100, 0.0, 1.5, "n1", "n2", back_s=9.0)


def test_a_takeover_without_loss_is_ok() -> None:
    """I5: another node leads, nothing lost, never two."""
    for scenario in Scenario:
        good = GOOD if scenario is not Scenario.STORE_DOWN else Measured(11.0, 0, 100, 0.0, 1.5, "n1", "n1")
        result = judge(scenario, "fast", good)
        assert result.ok, result.why


@pytest.mark.parametrize(
    ("scenario", "found", "says"),
    [
        (Scenario.NODE_KILLED, Measured(math.inf, 0, 1, 0, 0, "n1", None), "nobody took over"),
        (Scenario.NODE_KILLED, Measured(1, 0, 1, 0, 0, "n1", "n1"), "expected another"),
        (Scenario.NODE_KILLED, Measured(1, 3, 1, 0, 0, "n1", "n2"), "3 acknowledged rows are lost"),
        (Scenario.NODE_KILLED, Measured(1, 0, 1, 0.0004, 0, "n1", "n2"), "two nodes accepted writes"),
        (Scenario.AGENT_FROZEN, Measured(5, 0, 1, 0, 3.01, "n1", "n2"), "lease 2 + fence_timeout 1 = 3"),
        (Scenario.STORE_DOWN, Measured(11, 0, 1, 0, 1, "n1", "n2"), "expected n1 again"),
        (Scenario.STORE_DOWN, Measured(11, 0, 1, 0, 9.9, "n1", "n1"), "until 9.900 s"),
        (Scenario.NODE_KILLED, Measured(1, 0, 1, 0, 0, "n1", "n2", ("a client ended",)), "a client ended"),
        (
            Scenario.POSTGRES_KILLED,
            Measured(1, 0, 1, 0, 0, "n1", "n2"),
            "n1 is not back as a streaming standby",
        ),
    ],
)
def test_every_broken_promise_is_named(scenario: Scenario, found: Measured, says: str) -> None:
    """I1, I2, I5, W9: not ok, and why."""
    result = judge(scenario, "fast", found)
    assert not result.ok
    assert says in result.why


def test_the_store_stays_away_longer_than_a_lease_can_bridge() -> None:
    """W9: ten seconds at fast, scaled with the preset."""
    assert store_down_s("fast") == 10
    assert store_down_s("standard") == 11 + 2 + 5
