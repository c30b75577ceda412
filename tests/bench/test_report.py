"""The failover bench's table: medians, worst, and what never came."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from bench.ha.peer import Options
from bench.ha.records import Figures
from bench.ha.repeat import Repeat
from bench.ha.report import Results, cell, load, markdown, save

FIGURES = Figures(
    outage_s=2.0,
    old_stopped_s=1.0,
    new_first_s=1.5,
    overlap_s=0.25,
    late_rows=3,
    acknowledged=100,
    lost_client=1,
    lost_local=4,
)


def repeat(figures: Figures | None, rejoin_s: float | None = 5.0, error: str = "") -> Repeat:
    return Repeat(
        "host-lost",
        Options("patroni", "fast", "on"),
        figures,
        fault_lasted_s=10.0,
        rejoin_s=rejoin_s,
        rejoin_limit_s=30.0,
        final_primary="n2",
        load=(0.0, 0.0, 0.0),
        error=error,
    )


def test_cells() -> None:
    assert cell([None, None]) == "–"
    assert cell([3.0]) == "3.00"
    assert cell([5.0, 1.0, 2.0]) == "2.00 (5.00)"
    assert cell([5.0, None, 1.0]) == "3.00 (5.00, 1 never)"


def test_repeats_of_the_same_thing_are_one_line() -> None:
    worse = msgspec.structs.replace(FIGURES, outage_s=9.0, overlap_s=0.5, late_rows=4, lost_local=0)
    rows = [
        repeat(FIGURES),
        repeat(worse, rejoin_s=None),
        repeat(msgspec.structs.replace(FIGURES, outage_s=3.0)),
        repeat(None, error="it broke"),
    ]
    line = markdown(Results({}, rows)).splitlines()[-1]
    cells = [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
    assert cells == [
        "host-lost",
        "patroni",
        "fast, on",
        "4 (1 failed)",
        "3.00 (9.00)",
        "1.00 (1.00)",
        "1.50 (1.50)",
        "0.50 (10 rows)",
        "3, 8",
        "5.00 (5.00, 1 never)",
    ]


def test_other_settings_are_other_lines() -> None:
    other = msgspec.structs.replace(repeat(FIGURES), options=Options("patroni", "fast", "off"))
    assert len(markdown(Results({}, [repeat(FIGURES), other])).splitlines()) == 4


def test_a_file_is_read_back(tmp_path: Path) -> None:
    results = Results({"cores": "2"}, [repeat(FIGURES), repeat(None, None, "x")])
    save(results, tmp_path / "r.json")
    assert load(tmp_path / "r.json") == results
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
