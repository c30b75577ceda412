"""The merged timeline: lines of all kinds of logs in the order of time, with the rows of decisions."""

from __future__ import annotations

from bench.ha.merged import NS, merged, of_log, when_ns

AGENT = (
    '{"row": 906, "before": "leader", "after": "demoting", "why": "heartbeats failed", "term": 3, "event": "decision",'
    ' "process": "agent", "node": "n1", "level": "warning", "timestamp": "2026-11-25T18:00:02.500000Z"}'
)
FENCER = '{"process":"fencer","event":"fencing","timestamp":"2026-11-25T18:00:02.600000+00:00"}'
POSTGRES = "2026-11-25 18:00:02.550 UTC [12] LOG:  received immediate shutdown request"
NATS = "[77] 2026/11/25 18:00:01.000123 [INF] Server is ready"
AT_NS = 1795629602 * NS


def test_times_of_all_kinds() -> None:
    assert when_ns(POSTGRES) == AT_NS + 550_000_000
    assert when_ns(NATS) == AT_NS - NS + 123_000
    assert when_ns('{"timestamp": "2026-11-25T18:00:02Z"}') == AT_NS
    assert when_ns("no time at all") is None


def test_a_lines_own_timestamp_counts_not_one_that_it_tells_of() -> None:
    line = '{"until": "2027-01-01T00:00:00Z", "timestamp": "2026-11-25T18:00:02Z", "event": "latched"}'
    assert of_log("n1", line)[0][0] == AT_NS


def test_merged_in_order_with_rows_and_what_was_done() -> None:
    logs = {"n1/harmony": f"{AGENT}\nTraceback\n{FENCER}\n", "n1/postgres": POSTGRES, "s1/nats": NATS}
    text = merged(logs, [(AT_NS, "strike mute at n1")])
    lines = text.splitlines()
    assert [line.split()[1] for line in lines] == [
        "s1/nats", "*****", "n1/harmony", "n1/harmony", "n1/postgres", "n1/harmony",
    ]  # fmt: skip
    assert "18:00:02.500000 n1/harmony" in lines[2]
    assert "agent  row 906  leader  demoting  decision  heartbeats failed  term=3" in lines[2]
    assert lines[3].endswith("Traceback")  # stays behind the line that it belongs to
