"""Sickness that is not death: busy is told from hung, and a hung primary hands over only to who can take over."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from harmony.core.fold import fold
from harmony.core.messages import Event, FencerSeen, FencerView, HealthSeen, Symptom
from harmony.core.node import step
from harmony.core.observe import barred, confirms, observe, unfit
from harmony.core.sickness import WELL_LOOKS
from harmony.core.states import State
from harmony.core.table import decide
from harmony.core.timing import NS
from harmony.core.view import Policy, SentOrder, Sickness, View
from tests.core.helpers import FAST, T0, cluster, fencer, identity, observation, standby
from tests.core.test_handover import Leading

PATIENT = Policy(sick_after_s=10.0, restart_budget=2, restart_window_s=600.0)


class Sick(Leading):
    """Its PostgreSQL shows a symptom, at each look, from `ail` on until `mend`."""

    symptom: Symptom = ""
    why = "hangs"
    blind = False

    def at_each_tick(self) -> list[Event]:
        """A look, of that moment."""
        return [HealthSeen(self.now, self.symptom, self.why if self.symptom else "", self.blind)]

    def ail(self, symptom: Symptom = "silent") -> None:
        self.symptom = symptom
        self.writable = symptom in {"stalled", "stopped", "hung"}

    @property
    def fenced(self) -> bool:
        return {o.op for o in self.orders} == {"fence"}

    def dies(self) -> None:
        """PostgreSQL dies; the fence that follows is proven; it is started again where that is ordered."""
        up = self.fencer.view
        count = len(self.orders)
        self.writable = False
        self.fencer = FencerSeen(replace(up, postgres_up=False))
        self.do(0.1)
        fence = self.orders[count]
        assert fence.op == "fence"
        gone = replace(
            up,
            postgres_up=False,
            active=None,
            lease_deadline_ns=None,
            highest=fence.generation,
            order=fence.generation,
            order_op="fence",
            order_state="done",
            fence_proven=True,
        )
        self.fencer = FencerSeen(gone)
        self.do(1.5)
        if self.orders[-1].op == "activate":
            g = self.orders[-1].generation
            again = replace(
                up, active=g, highest=g, order=g, order_op="activate", order_state="done", fence_proven=False
            )
            self.fencer, self.writable = FencerSeen(again), True
            self.do(1.0)


@pytest.mark.parametrize("symptom", ["silent", "closed", "stopped", "stalled", "hung"])
def test_a_hung_primary_hands_over_after_the_patience(symptom: Symptom) -> None:
    """I5: not before; then it is fenced, and the place is vacated for who can take it."""
    p = Sick(PATIENT)
    p.ail(symptom)
    p.do(9.8)
    assert p.orders == []
    assert (p.view.row, p.own and p.own.sick) == (224, "")
    p.do(0.5)
    assert p.fenced
    assert p.view.state is State.P_FAILED
    assert symptom in p.view.why
    assert p.view.postgres_failed


def test_busy_is_not_sick() -> None:
    """W10: one good look, or WAL that reaches another member, ends the symptom."""
    p = Sick(PATIENT)
    for _ in range(5):
        p.ail()
        p.do(9.0)
        p.symptom = ""
        p.do(0.1)
    for n in range(30):
        p.ail()
        p.do(1.0)
        p.say("n3", received_lsn=1001 + n)
    assert p.orders == []
    p.do(10.2)
    assert p.fenced


@pytest.mark.parametrize("symptom", ["stopped", "closed", "hung"])
def test_sick_whatever_the_other_sessions_write(symptom: Symptom) -> None:
    """WAL that flows lets no new client in below a stopped postmaster, and makes no disk answer."""
    p = Sick(PATIENT)
    p.ail(symptom)
    for n in range(12):
        p.say("n3", received_lsn=1001 + n)
        p.do(1.0)
    assert p.fenced


def test_a_pause_of_the_agent_proves_nothing() -> None:
    """W10: who was not there has not seen PostgreSQL hang all the time."""
    p = Sick(PATIENT)
    p.ail()
    p.do(9.0)
    v, _ = step(p.view, [], p.me, FAST, p.now + 60 * NS)
    assert v.sick.since_ns == p.now + 60 * NS
    assert not v.sick.ill


@pytest.mark.parametrize(
    "change", [{"sick": "hangs"}, {"db": "unknown"}, {"latched": True}, {"distrust": "x"}]
)
def test_it_leads_on_with_an_alarm_where_nobody_can_take_over(change: dict[str, object]) -> None:
    """A fence without an heir would make it worse: reads, and writes after the stall, are lost."""
    p = Sick(PATIENT)
    p.say("n2", **change)
    p.say("n3", **change)
    p.ail()
    p.do(30.0)
    assert p.orders == []
    assert (p.view.row, p.view.state) == (222, State.HEALTHY)
    assert p.own is not None
    assert p.own.sick == "silent for longer than 10 s: hangs"


def test_with_quorum_one_standby_alone_is_no_heir() -> None:
    """I2: it could not prove that it has every commit, and would not promote."""
    p = Sick(PATIENT)
    del p.members["n3"]
    p.do(5.0)
    p.ail()
    p.do(15.0)
    assert (p.orders, p.view.row) == ([], 222)


def test_an_asynchronous_standby_must_be_near_enough() -> None:
    """maximum_lag_bytes holds here, too."""
    p = Sick(PATIENT)
    p.record = msgspec.structs.replace(p.record, sync_count=0, sync_voters=(), lsn=10**6)
    p.me = replace(p.me, sync_count=0)
    p.view = msgspec.structs.replace(p.view, cluster=p.record)
    p.ail()
    p.do(12.0)
    assert (p.orders, p.view.row) == ([], 222)
    p.say("n3", received_lsn=10**6 - 100)
    p.do(0.2)
    assert p.orders == []  # WAL has reached n3: that is progress
    p.do(11.0)
    assert p.fenced


def test_nothing_but_an_alarm_where_operators_want_that() -> None:
    """sickness.action = alarm."""
    p = Sick(replace(PATIENT, sick_handover=False))
    p.ail()
    p.do(30.0)
    assert (p.orders, p.view.row) == ([], 222)


def test_it_needs_the_store_for_that() -> None:
    """Without it no vacancy can be written: the fence would only end what is left."""
    for field in ({"failures": 1}, {"distrust": "x"}):
        o = observation(State.HEALTHY, sick="hangs", heir=True, **field)
        assert decide(o).row != 211
    assert decide(observation(State.HEALTHY, sick="hangs", heir=True)).do == ("fence",)


def test_an_illness_ends_with_some_good_looks_in_a_row() -> None:
    """Hysteresis: one good look among bad ones ends no illness."""
    p = Sick(replace(PATIENT, sick_handover=False))
    p.ail()
    p.do(11.0)
    for _ in range(3):
        p.symptom = ""
        p.do(0.05 * (WELL_LOOKS - 1))
        assert p.view.sick.ill
        p.ail()
        p.do(0.05)
    p.symptom = ""
    p.do(0.05 * (WELL_LOOKS + 1))
    assert not p.view.sick.ill
    assert p.view.row not in {222, 224}


def test_an_error_is_neither_good_nor_bad() -> None:
    """A probe that is refused: it ends no symptom, and begins none; a crash loop is full of such looks."""
    p = Sick(PATIENT)
    for n in range(12):
        p.ail()
        p.do(0.5)
        p.symptom, p.blind = "", True
        p.do(0.5)
        p.blind = False
        assert p.fenced is (n >= 10), n
    q = Sick(PATIENT)
    q.blind = True
    q.do(30.0)
    assert q.orders == []
    assert q.view.sick == Sickness()


def test_moments_are_not_told() -> None:
    """Else a busy server's log says nothing else."""
    p = Sick(PATIENT)
    p.ail()
    p.do(2.0)
    assert p.view.row != 224
    p.do(1.0)
    assert p.view.row == 224


def test_a_look_from_before_an_order_says_nothing_of_what_it_did() -> None:
    """As with the database's answers."""
    p = Sick(PATIENT)
    order = SentOrder((3, 2), "activate", p.now, done_ns=p.now + NS)
    v = msgspec.structs.replace(p.view, order=order)
    assert fold(v, HealthSeen(p.now, "silent", "x"), p.me, FAST, p.now + 2 * NS).sick == Sickness()
    assert fold(v, HealthSeen(p.now + NS, "silent", "x"), p.me, FAST, p.now + 2 * NS).sick.symptom == "silent"


def test_a_sick_standby_is_no_candidate_and_says_so() -> None:
    """It must not claim, and nobody waits for it to go first or hands over to it."""
    me = replace(identity("n2"), policy=PATIENT)
    ill = Sickness("stopped", "state T", 1, 0, ill=True)
    v = View(State.WATCHING, cluster=cluster(), read_ok=True, sick=ill)
    assert "state T" in barred(v, me, FAST, T0)
    p = Sick(PATIENT)
    assert unfit(p.view, "n2", FAST, p.now) == ""
    p.say("n2", sick="stopped")
    p.do(0.1)
    assert unfit(p.view, "n2", FAST, p.now) == "n2 is sick: stopped"
    named = msgspec.structs.replace(
        v,
        cluster=cluster(successor="n2"),
        fencer=fencer("n2").view,
        fencer_silent="",
        db=standby(T0),
        db_ns=T0,
    )
    assert confirms(named, me, FAST, T0) == 0
    assert confirms(msgspec.structs.replace(named, sick=Sickness()), me, FAST, T0) == 3


def test_what_never_runs_again_gives_the_place_up_and_nothing_else() -> None:
    """A disk that hangs: no proof, so nothing is started here; yet another need not wait (ADR 015)."""
    for spent in (False, True):
        p = Sick(PATIENT)
        p.ail()
        p.do(10.2)
        (fence,) = p.orders
        up = p.fencer.view
        failed = replace(up, active=None, lease_deadline_ns=None, highest=fence.generation, spent=spent)
        g = fence.generation
        p.fencer = FencerSeen(replace(failed, order=g, order_op="fence", order_state="failed"))
        p.do(0.2)
        assert (p.record.primary is None) is spent
        assert p.view.state is State.P_FAILED, "until the proof"
        p.do(3.0)
        assert {o.op for o in p.orders} == {"fence"}


def test_spent_counts_of_the_newest_order_only() -> None:
    """I6: not what an older fence has left, nor what a fencer said that is silent now, nor under a lease."""
    p = Sick(PATIENT)
    g = (3, 2)
    v = msgspec.structs.replace(p.view, order=SentOrder(g, "fence", p.now))
    view = replace(p.fencer.view, highest=g, active=None, spent=True)

    def spent(view: FencerView, silent: str = "") -> bool:
        return observe(msgspec.structs.replace(v, fencer=view, fencer_silent=silent), p.me, FAST, p.now).spent

    assert spent(view)
    assert not spent(replace(view, highest=(3, 1)))
    assert not spent(replace(view, active=g))
    assert not spent(view, "no answer")


@pytest.mark.parametrize(("state", "row"), [(State.FENCED, 405), (State.PROMOTING, 807)])
def test_what_hangs_right_after_its_activation_is_fenced(state: State, row: int) -> None:
    """Its first answer is waited for, but not for ever; then somebody else's turn comes."""
    p = Sick(PATIENT)
    g = (3, 2)
    order = SentOrder(g, "activate", p.now)
    view = replace(p.fencer.view, active=g, highest=g, order=g, order_op="activate", order_state="done")
    ill = Sickness("silent", "x", 1, 0, ill=True)
    v = msgspec.structs.replace(p.view, state=state, order=order, db=None, sick=ill, restart=True)
    v, _ = step(v, [FencerSeen(view)], p.me, FAST, p.now + NS // 100)
    assert (v.row, v.postgres_failed, v.restart) == (row, True, False)


# ---------------------------------------------------------------- crashes


def asynchronous(policy: Policy = PATIENT) -> Sick:
    """n1 leads, n2 and n3 follow without being waited for."""
    p = Sick(policy)
    p.me = replace(p.me, sync_count=0)
    p.record = msgspec.structs.replace(p.record, sync_count=0, sync_voters=())
    p.view = msgspec.structs.replace(p.view, cluster=p.record)
    return p


def test_without_a_synchronous_standby_it_is_restarted_in_place_within_the_budget() -> None:
    """Nothing is lost by that; then it is handed over to whoever is fit."""
    p = asynchronous()
    for n in range(2):
        p.dies()
        assert [o.op for o in p.orders] == ["fence", "activate"] * (n + 1), p.view.why
        assert p.view.state is State.HEALTHY
        assert p.record.primary == "n1"
    p.dies()
    assert [o.op for o in p.orders][:6] == ["fence", "activate", "fence", "activate", "fence", "follow"]
    assert p.record.primary is None


def test_crashes_of_long_ago_are_not_counted() -> None:
    """failover.restart_window_s."""
    p = asynchronous(replace(PATIENT, restart_window_s=20.0))
    for _ in range(6):
        p.dies()
        p.do(12.0)
    assert p.record.primary == "n1"


def test_with_a_synchronous_standby_it_is_handed_over_at_once() -> None:
    """It has every commit, and is faster than crash recovery."""
    p = Sick(PATIENT)
    p.dies()
    assert p.record.primary is None


def test_the_budget_of_a_restart_in_place_is_not_flapping() -> None:
    """Else the second would be handed over."""
    p = asynchronous()
    p.dies()
    p.dies()
    assert p.view.losses == ()


def test_a_restart_in_place_that_fails_counts_as_a_death() -> None:
    """Handed over at once it would lose what no standby has, for a lease that was over or a moment's lack of room."""
    p = asynchronous()

    def failed(*, restart: bool, crashes: int) -> View:
        v = msgspec.structs.replace(p.view, state=State.FENCED, restart=restart, postgres_failed=True)
        v = msgspec.structs.replace(v, crashes=(p.now - NS,) * crashes)
        order = SentOrder((3, 2), "activate", p.now, refused="no room")
        v, _ = step(msgspec.structs.replace(v, order=order), [], p.me, FAST, p.now + NS // 10)
        assert (v.row, v.postgres_failed) == (406, True)
        return v

    again = failed(restart=True, crashes=1)
    assert (again.restart, len(again.crashes)) == (True, 2)
    assert not failed(restart=True, crashes=2).restart, "the budget is used up"
    assert not failed(restart=False, crashes=0).restart, "no restart in place was wanted"


def test_a_restart_in_place_waits_for_a_slow_disk_of_the_fencer() -> None:
    """Its memory is trusted again when that has answered; for failover_timeout, and for nothing else."""
    p = asynchronous()
    v = msgspec.structs.replace(p.view, state=State.FENCED, restart=True, postgres_failed=True)
    gone = replace(p.fencer.view, trusted=False, active=None, postgres_up=False, fence_proven=True)

    def vacates(v: View, after_s: float) -> bool:
        v, _ = step(v, [FencerSeen(gone)], p.me, FAST, p.now)
        later = decide(observe(v, p.me, FAST, p.now + round(after_s * NS)))
        return 402 in {v.row, later.row}

    assert not vacates(v, FAST.failover_timeout_s - 0.1)
    assert vacates(v, FAST.failover_timeout_s + 0.1)
    assert vacates(msgspec.structs.replace(v, restart=False), 0.1)


def test_backends_that_crash_over_and_over_are_an_illness() -> None:
    """The postmaster lives and recovers each time: nobody gets anything done."""
    p = Sick(PATIENT)
    for _ in range(2):
        p.do(0.1, HealthSeen(p.now, crashed=True))
        p.do(30.0)
    assert p.orders == []
    p.do(0.1, HealthSeen(p.now, crashed=True))
    assert p.fenced
    assert "crashed more than 2 times within 600 s" in p.view.why


def test_crashes_that_are_over_hand_nothing_over() -> None:
    """A standby that comes back later finds a primary that is well."""
    p = Sick(PATIENT)
    p.say("n2", latched=True)
    p.say("n3", latched=True)
    for _ in range(5):
        p.do(0.1, HealthSeen(p.now, crashed=True))
    assert p.view.row == 222
    p.do(11.0)
    p.say("n2", latched=False)
    p.say("n3", latched=False)
    p.do(1.0)
    assert p.orders == []


def test_a_new_primary_does_not_inherit_crashes() -> None:
    """Who leads again after another has led begins with a whole budget."""
    p = Sick(PATIENT)
    p.dies()
    assert p.record.primary is None
    assert p.view.crashes == ()
