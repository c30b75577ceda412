"""The synchronous rule of a primary, step by step: who confirms commits, and what is told or recorded next. Pure.

sync.py has the rules and why they are safe; here they meet what is known: the answers of the database, the fencer's
word that PostgreSQL was told, and the record. Only who leads and hears from both the store and the database changes
anything; whoever does not leaves the rule as it is, which is safe.
"""

from __future__ import annotations

from msgspec.structs import replace

from harmony.core.messages import Command, DbSeen, FencerView, Nudge, TellRule
from harmony.core.observe import ORDER_LOST_NS
from harmony.core.states import WRITABLE_STATES
from harmony.core.sync import HOLD, NOBODY, Pulse, Record, Rule, Ruling, mixed, next_step, told_as, wanted
from harmony.core.timing import Timing
from harmony.core.view import Identity, View, alive, distrust, is_leading
from harmony.records import ClusterState

RAISE_PAUSES = 10  # times failover_timeout, before a higher count is tried again that was not seen in force


def recorded(c: ClusterState) -> Rule:
    """The rule by which a candidate is judged."""
    return Rule(c.sync_count, c.sync_voters)


def names(rule: Rule) -> str:
    """synchronous_standby_names, as the fencer writes it."""
    if rule == HOLD:
        return f'ANY {HOLD.count} ("harmony: nobody")'
    if not rule.count:
        return ""
    return f"ANY {rule.count} ({', '.join(f'{chr(34)}{v}{chr(34)}' for v in rule.voters)})"


def claimed(c: ClusterState | None, me: Identity) -> Rule:
    """What a claim that replaces `c` records.

    Each commit of before is on `count` of its voters; the last primary has all of them. So without the claimant, and
    with the last primary, as many as before have each. Of what a founder has nothing is known: it may be all alone.
    """
    others = {n for n in me.members if n != me.node}
    if not me.sync_count:
        return NOBODY
    if c is None:
        return Rule(0, tuple(sorted(others)))
    voters = (others | {*c.sync_voters, c.last_primary}) - {me.node}
    return Rule(min(c.sync_count, me.sync_count, len(others)), tuple(sorted(voters)))


def activated(c: ClusterState, me: Identity) -> Rule:
    """What PostgreSQL is told with the order to become the primary: it waits from the first commit on."""
    voters = tuple(n for n in c.sync_voters if n in me.members and n != me.node)
    return told_as(Rule(c.sync_count or min(me.sync_count, len(voters)), voters))


# ---------------------------------------------------------------- what is known of it


def database_seen(r: Ruling, e: DbSeen) -> Ruling:
    """Fold in an answer of the primary: how far each standby is, and whether the newest rule is in force."""
    pulses = dict(r.pulses)
    for w in e.walsenders:
        p = pulses.get(w.name, Pulse())
        reached = r.seen_ns > 0 and w.flushed_lsn >= r.seen_lsn
        good_ns = e.asked_ns if reached or w.flushed_lsn > p.flushed else p.good_ns
        pulses[w.name] = Pulse(w.flushed_lsn, good_ns, (p.since_ns or e.asked_ns) if reached else 0)
    for name in pulses.keys() - {w.name for w in e.walsenders}:
        pulses[name] = replace(pulses[name], since_ns=0)
    r = replace(r, pulses=pulses, seen_ns=e.asked_ns, seen_lsn=e.received_lsn)
    if not r.taken_ns or e.asked_ns <= r.taken_ns:
        return r
    if r.sure and r.worst == r.told:
        return r if r.lsn else replace(r, lsn=e.received_lsn)  # of a later answer than the one that proved it
    if r.told.count > r.worst.count and r.told != HOLD:
        return r  # whatever is seen: not without HOLD before
    voting = {w.name for w in e.walsenders if w.voter}
    # From a rule of nobody on, what is seen to wait has met a new one; of a number's rise nothing else is seen.
    unproven = r.told == HOLD and r.worst.count == 0 and not e.waiting
    if e.names != names(r.told) or not voting <= set(r.told.voters) or unproven:
        return r
    return replace(r, worst=r.told, sure=True)


def fencer_seen(r: Ruling, f: FencerView, now_ns: int) -> Ruling | None:
    """Fold in what the fencer has told PostgreSQL; None: something else than we know of, so it is looked at anew."""
    if f.rule is None or f.rule_number > r.number:
        return None
    if not r.taken_ns and (f.rule_number, f.rule) == (r.number, r.told) and f.rule_done:
        return replace(r, taken_ns=now_ns)
    return r


def _found(v: View, f: FencerView, rule: Rule, now_ns: int) -> Ruling:
    """What is in force where we begin to lead: by our own activation, or as an agent before us left it."""
    o = v.order
    ours = o is not None and (o.op, o.generation) == ("activate", f.active) and not f.rule_number
    c = v.cluster
    if c is None or (ours and not c.adopting) or (c.sync_count and rule.count not in {0, HOLD.count}):
        worst, sure = rule, False  # a count was never raised but by way of HOLD: no lower one is in force
    else:  # commits may have waited for nobody: of HOLD nothing is known before, and what is adopted had no rule
        worst, sure = Rule(0, c.sync_voters), not c.sync_count
    taken_ns = now_ns if f.rule_done else 0
    return Ruling(
        f.rule_number, rule, worst, sure=sure, began_ns=now_ns, sent_ns=now_ns * ours, taken_ns=taken_ns
    )


# ---------------------------------------------------------------- who confirms


def able(v: View, r: Ruling, me: Identity, t: Timing, now_ns: int) -> frozenset[str]:
    """Who can confirm commits. A standby that is waited for is given up when it has neither moved on nor kept up for
    one lease, or is silent; another one must have kept up as long. None that may not lead, if others suffice."""
    grace_ns = r.began_ns + t.failover_ns  # the standbys of a new primary have to find it first
    found, fit = set[str](), set[str]()
    for name in me.members:
        if name == me.node:
            continue
        p, m = r.pulses.get(name, Pulse()), v.members.get(name)
        if now_ns <= grace_ns and (name in r.told.voters or r.told == HOLD):
            ok = True
        elif not alive(v, name, t, now_ns):
            ok = False
        elif name in r.told.voters:
            ok = r.seen_ns - p.good_ns <= t.lease_ns
        else:
            ok = p.since_ns > 0 and r.seen_ns - p.since_ns >= t.lease_ns
        if ok:
            found.add(name)
            if m is not None and not (m.nofailover or m.latched or m.sick):
                fit.add(name)
    return frozenset(fit if len(fit) >= me.sync_count else found)


def target(v: View, r: Ruling, me: Identity, t: Timing, now_ns: int) -> Rule:
    """The rule that there should be now."""
    others = frozenset(n for n in me.members if n != me.node)
    before = frozenset(v.cluster.sync_voters) if v.cluster is not None else frozenset()
    rule = wanted(me.sync_mode, me.sync_count, able(v, r, me, t, now_ns), others, before)
    if now_ns < r.raise_from_ns and rule.count > r.worst.count:
        return Rule(r.worst.count, rule.voters if r.worst.count else tuple(sorted(others)))
    return rule


# ---------------------------------------------------------------- the next step


def drive(v: View, me: Identity, t: Timing, now_ns: int, commands: list[Command]) -> View:
    """Begin the next step, where one is due and nothing of the step before is open."""
    f, c, r = v.fencer, v.cluster, v.ruling
    if v.state not in WRITABLE_STATES or not is_leading(v, me) or f is None or f.active is None or c is None:
        return v if r is None else replace(v, ruling=None, recording=None)
    if r is None:
        return v if f.rule is None else replace(v, ruling=_found(v, f, f.rule, now_ns))
    heard = r.seen_ns and now_ns - r.seen_ns <= t.interval_ns + t.timeout_ns
    if v.failures or v.intent != "beat" or distrust(v) or not heard or v.unsettled or v.recording is not None:
        return v
    if not r.taken_ns:
        if r.sent_ns and now_ns - r.sent_ns > ORDER_LOST_NS:
            return _tell(v, r, f.active, r.told, r.number, now_ns, commands)
        return v
    goal = target(v, r, me, t, now_ns)
    if (recorded(c), r.told) == (goal, told_as(goal)):
        return v
    if not r.sent_ns:  # of an agent before us, which may have sent more than was heard
        return _tell(v, r, f.active, r.told, r.number + 1, now_ns, commands)
    if r.told == HOLD and r.worst != HOLD and now_ns - r.sent_ns > t.lease_ns:
        r = replace(r, raise_from_ns=now_ns + RAISE_PAUSES * t.failover_ns)
        return _tell(v, r, f.active, told_as(r.worst), r.number + 1, now_ns, commands)
    if r.told == HOLD and r.worst.count == 0 and not r.nudged:
        commands.append(Nudge())
        return replace(v, ruling=replace(r, nudged=True))
    if not r.sure:
        return v
    match next_step(recorded(c), r, goal, {n: p.flushed for n, p in r.pulses.items()}):
        case Record(rule=rule):
            return replace(v, recording=rule, lead_sent_ns=0)
        case None:
            return v
        case tell:
            return _tell(v, r, f.active, tell.rule, r.number + 1, now_ns, commands)


def _tell(
    v: View,
    r: Ruling,
    generation: tuple[int, int],
    rule: Rule,
    number: int,
    now_ns: int,
    commands: list[Command],
) -> View:
    """Have PostgreSQL told, by way of the fencer; the same number again where it is not known to have arrived."""
    commands.append(TellRule(generation, number, rule))
    worst = r.worst if rule == r.told else mixed(r.worst, rule)
    r = replace(r, number=number, told=rule, worst=worst, sent_ns=now_ns, taken_ns=0, lsn=0, nudged=False)
    return replace(v, ruling=r)
