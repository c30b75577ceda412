"""A model of whom PostgreSQL's commits wait for: each of its processes has loaded a rule of its own.

After syncrep.c: a walsender confirms with the count that it has loaded, over all standbys whose own walsenders have
loaded a rule with them in it. Whether commits wait at all is a flag that the checkpointer sets when it has loaded the
rule, and nobody else. When each process loads it is for whoever uses the model to say (`load`).
"""

from __future__ import annotations

from harmony.core.messages import Walsender
from harmony.core.ruling import names
from harmony.core.sync import Rule

MAIN, CHECKPOINTER = "postmaster", "checkpointer"  # and each walsender by its standby's name


class Waiting:
    """Of one start of PostgreSQL. Positions in bytes; `acked`: all that clients were told is safe."""

    def __init__(self, rule: Rule) -> None:
        self.file = rule  # set anew with each reload, which MAIN is signalled to begin
        self.loaded = rule  # by the postmaster, and so by whatever it begins
        self.defined = rule.count > 0
        self.senders: dict[str, Rule] = {}
        self.runs: dict[str, int] = {}
        self.flushed: dict[str, int] = {}
        self.end = 0
        self.acked = 0
        self.awaited = 0  # the newest commit that has waited, or waits

    def load(self, process: str) -> tuple[str, ...]:
        """It reads the file as it is now. Whom it signals to do the same."""
        if process == MAIN:
            self.loaded = self.file
            return (CHECKPOINTER, *self.senders)
        if process == CHECKPOINTER:
            self.defined = self.file.count > 0
            if not self.defined:
                self.acked = self.end  # it wakes all that wait
        elif process in self.senders:
            self.senders[process] = self.file
        return ()

    def wrote(self, end: int) -> None:
        """A commit at `end` is flushed here."""
        self.end = end
        if self.defined:
            self.awaited = end
        else:
            self.acked = end

    def confirm(self, name: str, run: int, lsn: int) -> None:
        """A standby has flushed up to `lsn`; `run` is another number for each of its connections."""
        if self.runs.get(name) != run:
            self.runs[name], self.senders[name] = run, self.loaded
        self.flushed[name] = lsn
        rule = self.senders[name]
        voters = [n for n, r in self.senders.items() if n in r.voters]
        if name in voters and len(voters) >= rule.count:
            ranked = sorted((self.flushed[n] for n in voters), reverse=True)
            self.acked = max(self.acked, ranked[rule.count - 1])

    def gone(self, name: str) -> None:
        """The connection of that standby has ended."""
        for known in (self.runs, self.senders, self.flushed):
            known.pop(name, None)

    @property
    def waiting(self) -> bool:
        return self.awaited > self.acked

    @property
    def names(self) -> str:
        return names(self.loaded)

    def walsenders(self) -> tuple[Walsender, ...]:
        return tuple(Walsender(n, n in r.voters, self.flushed[n]) for n, r in self.senders.items())
