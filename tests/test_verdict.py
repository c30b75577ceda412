"""The verdict on a cluster: each finding, its severity, and what it does to the exit code. No I/O."""

from __future__ import annotations

import msgspec
import pytest

from harmony.admin import StatusReply
from harmony.cli.status import lines, table
from harmony.core.states import State
from harmony.core.table import TABLE
from harmony.records import Note, lsn
from harmony.verdict import FOLLOWING, Finding, counted, judge, lag
from tests.cli.test_commands import CLUSTER, R, reply, with_node

replace = msgspec.structs.replace
TIMED = replace(R, myself=replace(R.myself, failure_threshold=3, beat_s=1.0, lease_s=2.0))
ELSEWHERE = replace(
    reply("n2"), myself=replace(reply("n2").myself, failure_threshold=3, beat_s=1.0, lease_s=2.0)
)
VACANT = replace(R, cluster=replace(CLUSTER, primary=None))
PEER = 'the probe is refused: Peer authentication failed for user "harmony"'


def me(s: StatusReply = TIMED, **changes: object) -> StatusReply:
    return replace(s, myself=replace(s.myself, **changes))


def texts(s: StatusReply) -> str:
    return " | ".join(f.text for f in judge(s).findings)


def finding(s: StatusReply, word: str) -> Finding:
    (found,) = [f for f in judge(s).findings if word in f.text]
    return found


def test_all_is_well() -> None:
    for s in (R, TIMED, ELSEWHERE):
        assert (judge(s).code, judge(s).findings) == (0, ())


# ---------------------------------------------------------------- B2


@pytest.mark.parametrize("s", [VACANT, replace(R, cluster=None), replace(R, cluster_stale=True)])
def test_b2_complaints_are_shown_without_a_primary(s: StatusReply) -> None:
    """The probe's words are needed most where nobody leads."""
    ill = with_node(with_node(s, "n1", db="unknown", note=PEER), "n3", fencer_ok=False)
    assert judge(ill).code == 2
    assert judge(ill).findings[0].severity == "alarm"
    assert finding(ill, "Peer auth") == Finding("degraded", "n1", f"PostgreSQL of n1: {PEER}")
    assert finding(ill, "the fencer of n3 does not answer").node == "n3"


def test_b2_who_is_recorded_says_why_it_does_not_lead() -> None:
    s = replace(R, cluster=replace(CLUSTER, status=State.FENCED))
    said = with_node(s, "n1", why="activation failed")
    assert judge(said).reasons[0] == "n1 is recorded but says primary/fenced (activation failed)"


def test_b2_without_a_primary_nobody_has_to_stream() -> None:
    assert "stream" not in texts(with_node(VACANT, "n2", streaming=False))
    assert "database of n1" not in texts(with_node(replace(R, cluster_stale=True), "n1", db="down"))


# ---------------------------------------------------------------- B5


def test_b5_failing_heartbeats_cannot_tell_and_name_the_cause() -> None:
    """The store is connected, and answers nothing: what is known is of before."""
    s = me(failures=92, store_failure="no answer within 0.5 s")
    verdict = judge(s)
    assert verdict.code == 3
    assert "92 heartbeats of this agent in a row have failed" in verdict.reasons[0]
    assert verdict.reasons[0].endswith(": no answer within 0.5 s")
    assert judge(me(failures=3)).code == 3
    assert judge(me(R, failures=92)).code == 0, "an agent of before does not tell how many are too many"


def test_b5_a_heartbeat_that_fails_now_and_then_is_a_note() -> None:
    s = me(failures=2, store_failure="no answer")
    assert (judge(s).code, judge(s).reasons) == (0, [])
    assert finding(s, "2 heartbeats in a row have failed here: no answer").severity == "note"
    assert finding(me(failures=1), "1 heartbeat in a row has failed here").severity == "note"
    assert texts(me(failures=3)).count("failed") == 1


def test_b5_an_own_heartbeat_older_than_the_lease_cannot_tell() -> None:
    """No call has failed yet: each still waits."""
    assert judge(with_node(TIMED, "n1", age_s=1.9)).code == 0
    s = with_node(TIMED, "n1", age_s=2.1)
    assert judge(s).code == 3
    assert "no heartbeat of this agent for 2.1 s" in texts(s)
    assert judge(with_node(R, "n1", age_s=46.8)).code == 0


def test_b5_a_primary_whose_lease_is_over_is_no_primary() -> None:
    assert judge(replace(ELSEWHERE, cluster_age_s=1.9)).code == 0
    s = replace(ELSEWHERE, cluster_age_s=2.1)
    assert judge(s).code == 2
    assert "the heartbeat of n1 is 2.1 s old" in texts(s)
    assert judge(replace(R, cluster_age_s=46.8)).code == 0, "nobody told how long the lease is"


def test_b5_nothing_old_is_held_against_others_by_who_cannot_tell() -> None:
    s = with_node(with_node(me(failures=9), "n2", alive=False), "n1", note=PEER, db="down")
    assert [f.node for f in judge(s).findings] == ["", "n1"]
    shown = lines(s, judge(s), 80)
    assert shown[0].startswith("cluster c1: cannot tell; last known: term 3, primary n1")


# ---------------------------------------------------------------- B6


def test_b6_the_record_of_a_node_that_left_raises_no_split_brain() -> None:
    left = with_node(ELSEWHERE, "n3", db="primary", retiring=True, age_s=0.3)
    assert judge(left).code == 1
    assert finding(left, "n3") == Finding("degraded", "n3", "n3 was asked to stop")
    later = with_node(left, "n3", age_s=9.0)
    assert finding(later, "n3").text == "n3 was asked to stop: its last record is 9 s old"


def test_b6_a_record_that_is_no_longer_written_says_nothing_of_now() -> None:
    crashed = with_node(ELSEWHERE, "n3", db="primary", age_s=2.1, latched=True)
    assert finding(crashed, "n3") == Finding("degraded", "n3", "n3 is silent: its last record is 2 s old")
    assert "was primary" in "\n".join(lines(crashed, judge(crashed), 160))


def test_b6_a_second_primary_that_writes_its_record_is_an_alarm() -> None:
    for s in (with_node(ELSEWHERE, "n3", db="primary", age_s=1.9), with_node(VACANT, "n3", db="primary")):
        assert (
            finding(s, "n3 is not the recorded primary, but its database says it is one").severity == "alarm"
        )
    assert "not the recorded" not in texts(with_node(replace(R, cluster=None), "n1", db="primary"))


def test_b6_who_is_dead_is_not_heard_of() -> None:
    s = with_node(ELSEWHERE, "n3", alive=False, age_s=46.8, db="primary")
    assert finding(s, "n3").text == "n3 is not heard of (its last record is 47 s old)"
    assert finding(with_node(R, "n3", member=None), "n3").text == "n3 is not heard of"


# ---------------------------------------------------------------- B15


def test_b15_commits_that_wait_for_nobody_are_degraded() -> None:
    s = replace(R, cluster=replace(CLUSTER, sync_count=0))
    assert judge(s).code == 1
    assert "commits wait for NOBODY; only n1 may lead" in judge(s).reasons[0]
    assert judge(s).findings[0].severity == "degraded"
    asynchronous = replace(R, cluster=replace(CLUSTER, sync_count=0, sync_voters=()))
    assert judge(asynchronous).code == 0


# ---------------------------------------------------------------- B22


@pytest.mark.parametrize("change", [{"received_lsn": 0}, {"db": "down"}, {"db": "unknown"}, {"age_s": 3.0}])
def test_b22_the_lag_of_who_does_not_run_is_not_known(change: dict[str, object]) -> None:
    s = with_node(TIMED, "n3", **change)
    assert lag(s, s.nodes[2]) is None
    assert lag(TIMED, TIMED.nodes[2]) == 256
    assert lag(TIMED, TIMED.nodes[0]) is None
    ahead = with_node(TIMED, "n3", received_lsn=CLUSTER.lsn + 9)
    assert lag(ahead, ahead.nodes[2]) == 0
    early = replace(TIMED, cluster=replace(CLUSTER, lsn=0))
    assert lag(early, early.nodes[2]) is None


def unstreamed(**changes: object) -> str:
    return finding(with_node(R, "n3", streaming=False, **changes), "n3 does not stream").text


def test_b22_who_does_not_stream_gives_the_cause() -> None:
    history = unstreamed(row="1100", why="heartbeats are good again: watching")
    assert "heartbeats" not in history
    assert "its own log" in history
    assert "(ordering it)" in unstreamed(row="714", why="ordering it")
    assert "(copying: 40 %)" in unstreamed(row="714", why="ordering it", progress="copying: 40 %")
    assert "is down" in unstreamed(row="1100", db="down")
    assert "does not answer" in unstreamed(row="1100", db="unknown")
    assert "does not stream" in texts(with_node(R, "n3", db="down")), "streaming is told of a moment ago"


def test_b22_the_rows_that_give_a_cause_are_rows_that_stay() -> None:
    """A row that leads into a state is history there; and those of both states that follow are all looked at."""
    rows = {str(row.id): row for row in TABLE}
    assert all(rows[i].next is rows[i].state for i in FOLLOWING)
    assert {rows[i].state for i in FOLLOWING} == {State.WATCHING, State.YIELDING}
    ordering = {i for i, row in rows.items() if {"follow", "rejoin"} & set(row.do)}
    assert ordering <= FOLLOWING


def test_b22_who_is_fenced_on_purpose_says_so_and_no_more() -> None:
    s = with_node(
        R, "n3", latched=True, db="down", streaming=False, note="the probe is refused: no such file"
    )
    assert [f.text for f in judge(s).findings] == ["n3 is latched by an operator"]
    running = with_node(R, "n3", latched=True, note="the disk is full")
    assert "the disk is full" in texts(running)
    own = with_node(replace(R, myself=replace(R.myself, latched="work (by w)")), "n1", latched=True)
    assert finding(own, "latched").text == "n1 is latched by an operator: work (by w)"


def test_b22_one_is_not_many() -> None:
    assert (counted(1, "failover"), counted(2, "failover")) == ("1 failover", "2 failovers")


def test_b22_notes_stand_once_below_the_table() -> None:
    s = with_node(R, "n2", notes=("wal_log_hints is off",), cannot_rewind="no checksums", nofailover=True)
    assert judge(s).code == 0
    assert {f.severity for f in judge(s).findings} == {"note"}
    shown = "\n".join(lines(s, judge(s), 160))
    assert shown.count("wal_log_hints is off") == shown.count("no checksums") == 1
    assert "tagged nofailover" in shown


# ---------------------------------------------------------------- severities


def test_severities() -> None:
    assert finding(with_node(R, "n2", notes=("ALARM: fsync is off",)), "fsync") == Finding(
        "alarm", "n2", "n2: fsync is off"
    )
    assert finding(me(distrust="lost history"), "n1 DISTRUSTS").severity == "alarm"
    assert finding(with_node(R, "n2", distrust="lost history"), "n2 DISTRUSTS").severity == "alarm"
    assert texts(with_node(me(distrust="x"), "n1", distrust="x")).count("DISTRUSTS") == 1
    assert finding(me(stopped="5 changes"), "5 changes").severity == "alarm"
    assert finding(with_node(R, "n2", sick="hung"), "SICK").severity == "degraded"
    silent = with_node(me(fencer_detail="gone"), "n1", fencer_ok=False)
    assert finding(silent, "fencer").text == "the fencer of n1 does not answer: gone"
    assert finding(with_node(R, "n1", db="down"), "the database of n1 is down").severity == "degraded"


def test_the_worst_comes_first_and_notes_are_no_reasons() -> None:
    s = with_node(with_node(R, "n1", notes=("small",)), "n2", latched=True)
    s = with_node(s, "n3", notes=("ALARM: fsync is off",))
    assert [f.severity for f in judge(s).findings] == ["alarm", "degraded", "note"]
    assert judge(s).reasons == ["n3: fsync is off", "n2 is latched by an operator"]


def test_notes_are_read_as_they_were_written() -> None:
    for note in (Note("fsync is off", alarm=True), Note("wal_level is ALARM: minimal")):
        assert Note.read(note.written()) == note


@pytest.mark.parametrize(
    ("s", "code", "severity", "word"),
    [
        (
            me(store_connected=False, store_failure="refused"),
            3,
            "alarm",
            "not connected to the store: what it knows is old: refused",
        ),
        (with_node(replace(R, cluster_stale=True), "n1", alive=False), 3, "alarm", "its view is stale"),
        (replace(R, cluster_stale=True), 2, "alarm", "the heartbeat of n1 is stale"),
        (replace(R, cluster=None), 2, "alarm", "no primary was ever elected"),
        (VACANT, 2, "alarm", "the place is vacant (n1 left it)"),
        (replace(R, cluster=replace(CLUSTER, status=State.P_FAILED)), 2, "alarm", "says primary/failed (w)"),
        (
            replace(R, cluster=replace(CLUSTER, primary="n9")),
            1,
            "degraded",
            "n9 is not among the configured members",
        ),
    ],
)
def test_who_leads(s: StatusReply, code: int, severity: str, word: str) -> None:
    assert judge(s).code == code
    assert finding(s, word).severity == severity
    assert not any("not among" in reason for reason in judge(R).reasons)


# ---------------------------------------------------------------- what is shown


def test_lsn_is_postgresqls_notation() -> None:
    assert (lsn(0x4137E40), lsn(0x1_0000_00FF)) == ("0/4137E40", "1/FF")


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_fits(width: int) -> None:
    s = with_node(R, "n2", status=State.R_INITIALIZING, received_lsn=0xFF_4137E40, row="1100", latched=True)
    shown = lines(with_node(s, "n3", why="why " * 60, row="714", streaming=False), judge(s), width)
    assert max(map(len, shown)) <= width
    for heading in ("node", "database", "state [row]", "lag", "lease"):
        assert any(heading in line for line in shown)
    assert ("generation" in "".join(shown)) is (width == 160)


def test_a_table_that_cannot_fit_is_shown_all_the_same() -> None:
    assert len(table([["n" * 90] * 10], 80)) == 2


def test_texts_of_others_do_not_move_the_cursor() -> None:
    s = with_node(R, "n2", note="\x1b[2Jgone\nmore")
    assert not any("\x1b" in line or "\n" in line for line in lines(s, judge(s), 80))
