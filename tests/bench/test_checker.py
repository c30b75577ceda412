"""The chaos checker on hand-made records: it finds each kind of broken promise, and accuses nobody falsely."""

from __future__ import annotations

import pytest

from bench.ha.checker import bounds, inconsistent, lost_rows, outage_s, overlaps, slow
from bench.ha.records import NS, Ack
from harmony.core.timing import PRESETS


def ack(number: int, at_s: float, host: str = "n1", timeline: int = 1, took_s: float = 0.001) -> Ack:
    return Ack(number, round((at_s - took_s) * NS), round(at_s * NS), host, timeline)


def every(since_s: float, until_s: float, host: str, timeline: int, first: int) -> list[Ack]:
    return [
        ack(first + n, since_s + n / 10, host, timeline) for n in range(round((until_s - since_s) * 10) + 1)
    ]


def test_a_lost_row_is_found_wherever_it_is_missing() -> None:
    acks = [ack(n, float(n)) for n in range(1, 5)]
    whole = {1, 2, 3, 4, 99}
    assert lost_rows(acks, {"n1": whole, "n2": whole}) == []
    (found,) = lost_rows(acks, {"n1": whole, "n2": whole - {3}})
    assert (found.kind, found.at_ns) == ("lost", 3 * NS)
    assert "1 acknowledged rows are not on n2: 3 (by n1, timeline 1)" in found.what


def test_primaries_in_turn_do_not_overlap() -> None:
    first = every(10, 20, "n1", 1, 0)
    second = every(20.2, 30, "n2", 2, 1000)
    again = every(30.1, 40, "n1", 3, 2000)
    restarted = every(40.5, 50, "n1", 4, 3000)
    assert overlaps([*again, *first, *restarted, *second]) == []


def test_an_old_primary_that_takes_a_row_after_the_new_one_acknowledged() -> None:
    new = every(15.0, 30, "n2", 2, 1000)
    assert overlaps([*every(10, 15.0, "n1", 1, 0), *new]) == []
    (found,) = overlaps([*every(10, 15.2, "n1", 1, 0), *new])
    assert (found.kind, found.at_ns) == ("overlap", 15 * NS)
    assert "n1 took row 52 on timeline 1, sent 0.199 s after n2 had acknowledged 1000 on 2" in found.what


def test_a_row_that_was_sent_before_and_acknowledged_late_proves_nothing() -> None:
    """A frozen host's: it may have committed before the new primary began."""
    late = ack(500, 25.0, "n1", 1, took_s=10.5)
    assert overlaps([*every(10, 14, "n1", 1, 0), late, *every(15, 30, "n2", 2, 1000)]) == []


def test_two_hosts_on_one_timeline_even_far_apart() -> None:
    (found,) = overlaps([*every(10, 11, "n1", 2, 0), *every(20, 21, "n2", 2, 1000)])
    assert found.what == "n1 and n2 both acknowledged on timeline 2"


def test_a_third_primary_is_compared_with_each() -> None:
    acks = [*every(10, 20, "n1", 1, 0), *every(15, 18, "n2", 2, 1000), *every(17, 30, "n3", 3, 2000)]
    assert sorted(v.what.split()[0] + v.what.split()[-1] for v in overlaps(acks)) == ["n12", "n13", "n23"]


def test_an_inconsistent_read_back() -> None:
    stored = {"n1": [1, 2, 3], "n2": [1, 2, 3]}
    assert inconsistent(stored, {1, 2, 3, 4}) == []
    (phantom, _) = inconsistent({**stored, "n1": [1, 2, 3, 7]}, {1, 2, 3, 4})
    assert phantom.what == "n1: rows that nobody sent: 1 (7)"
    (behind,) = inconsistent({**stored, "n2": [1, 3]}, {1, 2, 3})
    assert behind.what == "n2: rows missing that another host has: 1 (2)"
    (twice,) = inconsistent({**stored, "n2": [1, 2, 3, 3]}, {1, 2, 3})
    assert twice.what == "n2: 1 rows are there twice"


@pytest.mark.parametrize(
    ("acks", "end_s", "waited_s"),
    [
        ([ack(1, 99.0), ack(2, 109.0)], 110.0, 9.0),
        ([ack(1, 99.0), ack(2, 111.0)], 112.0, 11.0),  # too late
        ([ack(1, 99.0)], 112.0, 12.0),  # not at all
        ([ack(1, 101.0), ack(2, 102.0), ack(3, 113.0)], 113.5, 11.0),  # wrote, and stopped again
        ([ack(1, 101.0, took_s=5.0)], 112.0, 12.0),  # sent before all was healed: no recovery
        ([ack(1, 101.0), ack(2, 109.0), ack(3, 150.0)], 112.0, 8.0),  # another round's
    ],
)
def test_a_recovery_that_took_too_long(acks: list[Ack], end_s: float, waited_s: float) -> None:
    found = outage_s(acks, 100 * NS, round(end_s * NS))
    assert found == pytest.approx(waited_s)
    late = slow(found, 10.0, "the client had nothing acknowledged", 100 * NS)
    assert [(v.kind, v.at_ns) for v in late] == ([("slow", 100 * NS)] if waited_s > 10 else [])


def test_the_bounds_follow_the_preset() -> None:
    fast, standard = bounds(PRESETS["fast"], 10.0), bounds(PRESETS["standard"], 10.0)
    assert (fast.writes_s, standard.writes_s) == (28.0, 50.0)
    assert (fast.back_s, standard.back_s) == (86.0, 118.0)
    assert (fast.settle_s, standard.settle_s) == (3.0, 13.0)
