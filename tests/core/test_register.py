"""One key written by compare-and-set: every doubt is resolved by reading (I4, D1, D6)."""

from __future__ import annotations

from harmony.core import register
from harmony.core.register import Acked, Attempt, Failed, Lost, Register

MS = 1_000_000


def started(revision: int = 10) -> Register:
    r = register.start(Register(revision=revision), 0, 500 * MS)
    assert register.due(r, 0) == "write"
    return register.sent(r, "write", Attempt("a1", 5))


def test_acknowledged_is_dated_from_its_send() -> None:
    r, out = register.write_done(started(), "a1", "acked", 11, 100)
    assert out == Acked(5, 11, "a1")
    assert (r.revision, r.running) == (11, False)


def test_refused_is_judged_only_after_reading() -> None:
    """D6: errors 10071/10164 mean 'lost or unknown': read before judging."""
    r, out = register.write_done(started(), "a1", "refused", 0, 100)
    assert out is None
    assert register.due(r, 100) == "read"


def test_ambiguous_timeout_resolved_by_attempt_id() -> None:
    """A write whose answer was lost is ours when the store shows our attempt; dated from its own send."""
    r, _ = register.write_done(started(), "a1", "unknown", 0, 100)
    r = register.sent(r, "read", None)
    _, out = register.read_done(r, "a1", 11, ours=True, now_ns=200)
    assert out == Acked(5, 11, "a1")


def test_first_attempt_landing_after_the_second_was_sent() -> None:
    r, _ = register.write_done(started(), "a1", "unknown", 0, 100)
    r = register.sent(r, "read", None)
    r, out = register.read_done(r, "other", 10, ours=False, now_ns=200)  # not stored yet
    assert out is None
    later = 200 + register.RETRY_NS
    assert register.due(r, later) == "write"
    r = register.sent(r, "write", Attempt("a2", later))
    r, _ = register.write_done(r, "a2", "refused", 0, later + 1)
    r = register.sent(r, "read", None)
    _, out = register.read_done(r, "a1", 11, ours=True, now_ns=later + 2)
    assert out == Acked(5, 11, "a1")


def test_another_writer_is_a_confirmed_loss() -> None:
    """D6, D9: a newer value of somebody else ends it at once."""
    r, _ = register.write_done(started(), "a1", "refused", 0, 100)
    r = register.sent(r, "read", None)
    r, out = register.read_done(r, "theirs", 11, ours=False, now_ns=200)
    assert out == Lost(11)
    assert not r.running


def test_the_watch_may_bring_the_loss_while_a_write_is_under_way() -> None:
    _, out = register.read_done(started(), "theirs", 12, ours=False, now_ns=50)
    assert out == Lost(12)


def test_our_own_earlier_write_is_adopted_not_mistaken_for_success() -> None:
    r, _ = register.write_done(started(), "a1", "refused", 0, 100)
    r = register.sent(r, "read", None)
    r, out = register.read_done(r, "a0", 11, ours=True, now_ns=200)
    assert out is None
    assert (r.revision, register.due(r, 200)) == (11, "write")


def test_nothing_within_the_deadline_is_a_failure() -> None:
    r, out = register.tick(started(), 500 * MS)
    assert isinstance(out, Failed)
    assert not r.running
    _, late = register.write_done(r, "a1", "acked", 11, 501 * MS)
    assert late is None


def test_a_store_that_goes_back_is_a_failure() -> None:
    r, _ = register.write_done(started(), "a1", "unknown", 0, 100)
    r = register.sent(r, "read", None)
    _, out = register.read_done(r, "x", 9, ours=False, now_ns=200)
    assert isinstance(out, Failed)
