"""The failover bench's figures, from hand-made records: each of these numbers was worked out with a pencil."""

from __future__ import annotations

import pytest

from bench.ha.records import NS, Ack, figures, intervals, lost, outage_s, overlap_s, parse

FAULT_S = 100.0


def ack(number: int, at_s: float, host: str = "n1", took_s: float = 0.001) -> Ack:
    return Ack(number, round((at_s - took_s) * NS), round(at_s * NS), host)


def every(step_s: float, since_s: float, until_s: float, host: str, first: int) -> list[Ack]:
    count = round((until_s - since_s) / step_s) + 1
    return [ack(first + n, since_s + n * step_s, host) for n in range(count)]


def test_parse_takes_whole_acknowledgements_only() -> None:
    text = "A 7 100 250 n1\nR 300\nA 8 400 500 10.77.0.12\nnoise\nA 9 600 700 n"
    assert parse(text) == [Ack(7, 100, 250, "n1"), Ack(8, 400, 500, "10.77.0.12")]


def test_outage_is_the_longest_pause_that_ends_after_the_fault() -> None:
    before = [ack(1, 80.0), ack(2, 95.0), ack(3, 99.5)]  # a pause of 15 s, over before the fault
    after = [ack(4, 104.0), ack(5, 104.5), ack(6, 106.0)]
    assert outage_s([*after, *before], round(FAULT_S * NS)) == pytest.approx(4.5)
    assert outage_s([*before, *after[1:]], round(FAULT_S * NS)) == pytest.approx(5.0)


def test_outage_counts_from_the_acknowledgement_not_from_the_send() -> None:
    slow = [ack(1, 99.0), ack(2, 103.0, took_s=3.9)]
    assert outage_s(slow, round(FAULT_S * NS)) == pytest.approx(4.0)


def test_a_second_pause_may_be_the_longer_one() -> None:
    acks = [ack(1, 99.9), ack(2, 101.0), ack(3, 108.0)]
    assert outage_s(acks, round(FAULT_S * NS)) == pytest.approx(7.0)


def test_a_client_that_never_writes_again_has_no_outage_to_give() -> None:
    assert outage_s([ack(1, 98.0), ack(2, 99.0)], round(FAULT_S * NS)) is None


def test_intervals_are_broken_by_silence_only() -> None:
    at = [ack(1, 1.0), ack(2, 1.4), ack(3, 1.9), ack(4, 2.5), ack(5, 9.0)]
    assert intervals(at) == [(NS, round(1.9 * NS)), (round(2.5 * NS),) * 2, (9 * NS, 9 * NS)]


def test_overlap() -> None:
    old = every(0.1, 90.0, 103.0, "n1", 0)
    new = every(0.1, 101.0, 110.0, "n2", 1000)
    assert overlap_s({"n1": old, "n2": new}) == pytest.approx(2.0)
    assert overlap_s({"n1": old}) == 0.0
    third = every(0.1, 102.5, 104.0, "n3", 2000)  # three at once count once; n2 and n3 overlap until 104
    assert overlap_s({"n1": old, "n2": new, "n3": third}) == pytest.approx(3.0)


def test_hosts_that_write_in_turn_do_not_overlap() -> None:
    old = every(0.1, 90.0, 100.0, "n1", 0)
    new = every(0.1, 100.2, 105.0, "n2", 1000)
    back = every(0.1, 105.1, 107.0, "n1", 500)
    assert overlap_s({"n1": [*old, *back], "n2": new}) == 0.0


def test_a_frozen_hosts_late_acknowledgement_is_not_seconds_of_overlap() -> None:
    """Sent before the freeze, acknowledged after the thaw: one late row, no interval between."""
    old = [*every(0.1, 95.0, 100.0, "n1", 0), ack(900, 112.0, "n1", took_s=12.0)]
    new = every(0.1, 104.0, 120.0, "n2", 1000)
    assert overlap_s({"n1": old, "n2": new}) == 0.0
    found = figures(
        [], {"n1": old, "n2": new}, range(2000), fault_ns=round(FAULT_S * NS), old="n1", last="n2"
    )
    assert found.late_rows == 1
    assert found.old_stopped_s == pytest.approx(12.0)


def test_lost_is_acknowledged_and_not_stored() -> None:
    acks = [ack(1, 1.0), ack(2, 2.0), ack(3, 3.0)]
    assert [a.id for a in lost(acks, {1, 3, 4})] == [2]


def test_figures_of_a_split_brain() -> None:
    """The old primary goes on for 3 s, the new one begins after 1 s; what only the old one has is lost."""
    client = [*every(0.1, 95.0, 100.0, "n1", 0), *every(0.1, 102.0, 110.0, "n2", 100)]
    old = every(0.1, 95.0, 103.0, "n1", 1000)  # 81 rows; those after 101.0 are on nobody else
    new = every(0.1, 101.0, 110.0, "n2", 2000)
    kept = {a.id for a in client if a.id != 50} | {a.id for a in old if a.acked_ns <= 101 * NS}
    stored = kept | {a.id for a in new}
    found = figures(
        client, {"n1": old, "n2": new, "n3": []}, stored, fault_ns=round(FAULT_S * NS), old="n1", last="n2"
    )
    assert found.outage_s == pytest.approx(2.0)
    assert found.old_stopped_s == pytest.approx(3.0)
    assert found.new_first_s == pytest.approx(1.0)
    assert found.overlap_s == pytest.approx(2.0)
    assert found.late_rows == 20
    assert found.lost_client == 1
    assert found.lost_local == 20
    assert found.acknowledged == len(client) + len(old) + len(new)


def test_figures_where_the_primary_stays() -> None:
    client = [*every(0.1, 95.0, 100.0, "n1", 0), *every(0.1, 103.0, 110.0, "n1", 100)]
    found = figures(
        client, {"n1": [], "n2": []}, range(1000), fault_ns=round(FAULT_S * NS), old="n1", last="n1"
    )
    assert found.outage_s == pytest.approx(3.0)
    assert found.old_stopped_s is None
    assert found.new_first_s is None
    assert (found.late_rows, found.lost_client, found.lost_local) == (0, 0, 0)


def test_a_primary_that_stops_before_the_fault_stops_at_it() -> None:
    client = [*every(0.1, 95.0, 99.9, "n1", 0), *every(0.1, 104.0, 110.0, "n2", 100)]
    found = figures(client, {}, range(1000), fault_ns=round(FAULT_S * NS), old="n1", last="n2")
    assert found.old_stopped_s == 0.0
    assert found.new_first_s == pytest.approx(4.0)
