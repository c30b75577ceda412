"""What is not left to the next beat: the database is asked, and our record written with its answer, at once. Pure.

Three occasions: nobody leads any more, the primary is stale by our own clock, and we are named as the successor.
Each has a name, and is acted upon once: one question, and one record when its answer is there; where WAL still
streams from a primary that is gone, the next question follows the answer, for DRAIN_NS. It changes nothing
that is decided: an answer counts here only if it was asked for after the occasion, and a record means what it did.
"""

from __future__ import annotations

from msgspec.structs import replace

from harmony.core.messages import Ask, Command
from harmony.core.observe import stale_here
from harmony.core.timing import NS, Timing
from harmony.core.view import NO_OCCASION, Identity, Occasion, View, leads

DRAIN_NS = NS // 10  # the longest wait for the receiver of a primary that is gone to come to its end


def occasion(v: View, me: Identity, t: Timing, now_ns: int) -> Occasion:
    """What others wait for us to tell of, by kind and number; NO_OCCASION: nothing."""
    c, who = v.cluster, leads(v, me)
    if c is None:
        return NO_OCCASION
    if who == "vacant":
        return ("vacancy", v.revision)
    if who == "other" and stale_here(v, t, now_ns):
        return ("stale", v.revision)
    if who == "other" and c.successor == me.node:
        return ("named", c.term)
    return NO_OCCASION


def ask(v: View, me: Identity, t: Timing, now_ns: int, commands: list[Command]) -> View:
    """Have the database asked, where there is a new occasion; when the one before is over, nothing is owed."""
    new = occasion(v, me, t, now_ns)
    if new == v.occasion:
        if v.urged_ns and drains(v, now_ns) and v.db is not None and v.db.asked_ns >= v.asked_ns:
            commands.append(Ask())
            return replace(v, asked_ns=now_ns)
        return v
    if new == NO_OCCASION:
        return replace(v, occasion=new, urged_ns=0)
    commands.append(Ask())
    return replace(v, occasion=new, urged_ns=now_ns, asked_ns=now_ns)


def drains(v: View, now_ns: int) -> bool:
    """Whether WAL of a primary that is gone may still be on its way here, though none that was acknowledged.

    Who tells of less than it has in the end lets another begin a timeline before that, and must be rewound to it.
    """
    soon = v.occasion[0] == "vacancy" and now_ns - v.urged_ns <= DRAIN_NS
    return soon and v.db is not None and v.db.streaming


def answered(v: View, now_ns: int) -> bool:
    """Whether a record is owed and can be written: the database has answered a question of after the occasion."""
    asked = v.urged_ns > 0 and v.db is not None and v.db.asked_ns >= v.urged_ns
    return asked and not drains(v, now_ns)
