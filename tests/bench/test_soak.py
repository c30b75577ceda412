"""The soak's figures, from samples: cost of a core, memory at the end and its growth."""

from __future__ import annotations

import pytest

from bench.soak import Outcome, Sample, growth, percent, table

MB = 1_000_000


def samples(
    node: str, pid: int, cpu_s_a_minute: float, mb_an_hour: float, kind: str = "agent"
) -> list[Sample]:
    """Ten minutes of one process that has 30 MB at first."""
    return [
        Sample(60.0 * n, node, kind, pid, cpu_s_a_minute * n, round((30 + mb_an_hour * n / 60) * MB))
        for n in range(11)
    ]


def test_cost_is_the_median_of_the_nodes() -> None:
    found = [*samples("n1", 1, 0.6, 0), *samples("n2", 2, 1.2, 0), *samples("n3", 3, 6.0, 0)]
    assert percent(found, "agent") == pytest.approx(2.0)


def test_growth_is_of_the_process_that_grows_most_after_the_warm_up() -> None:
    found = [*samples("n1", 1, 1, 0), *samples("n2", 2, 1, 12.0)]
    memory, slope = growth(found, "agent")
    assert slope == pytest.approx(12.0, rel=1e-3)
    assert memory == pytest.approx(32.0)
    caches = [Sample(s.at_s, s.node, s.kind, s.pid, s.cpu_s, max(s.uss, 32 * MB)) for s in found]
    flat = [s if s.at_s < 120 else Sample(s.at_s, s.node, s.kind, s.pid, s.cpu_s, 40 * MB) for s in caches]
    assert growth(flat, "agent")[1] == pytest.approx(0.0)


def test_a_process_that_was_replaced_is_a_series_of_its_own() -> None:
    """Its CPU time begins anew: it must not count as negative."""
    found = samples("n1", 1, 0.6, 0)[:5] + [
        Sample(s.at_s + 400, "n1", "agent", 9, s.cpu_s, s.uss) for s in samples("n1", 9, 0.6, 0)
    ]
    assert percent(found, "agent") == pytest.approx(1.0)
    assert "| fencer | nan | nan |" in table(Outcome(10, "fast", loaded=found))
