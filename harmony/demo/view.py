"""Shows a running demo: a live table on a terminal, plain lines with the time otherwise.

It asks the agents' admin sockets for their state and changes nothing. Who cannot be shown anything any more (a closed
terminal, a pipe that nobody reads) has gone: the first attempt says so like Ctrl-C, and from then on it is silent.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from harmony.demo.cluster import Cluster, ask_status
from harmony.records import lsn

REFRESH_S = 0.5
LINES_KEPT = 12


class View:
    """`say` a sentence; `tick` with the writer's count as often as you like. `plain` writes lines only."""

    def __init__(self, console: Console, plain: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._began = clock()
        self._cluster: Cluster | None = None
        self._rows = 0
        self._next = 0.0
        self._lines: list[str] = []
        self._live: Live | None = None if plain else Live(console=console, auto_refresh=False)
        self._gone = self._ending = False

    def __enter__(self) -> View:
        if self._live is not None:
            self._show(self._live.start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the live table (its last picture stays); plain lines from here on."""
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(OSError):
                live.stop()

    def end(self) -> None:
        """What is still said is said to whoever is there; nobody there interrupts nothing."""
        self._ending = True
        self.close()

    def watch(self, cluster: Cluster) -> None:
        """The cluster whose nodes the table shows."""
        self._cluster = cluster

    def say(self, sentence: str) -> None:
        """One sentence, with the seconds since the start."""
        line = f"{self._clock() - self._began:7.2f} s  {sentence}"
        if self._live is None:
            self._show(lambda: self._console.print(line, markup=False, highlight=False, soft_wrap=True))
            return
        self._lines = [*self._lines, line][-LINES_KEPT:]
        self._refresh()

    def tick(self, rows: int) -> None:
        """Refresh the table, at most every REFRESH_S seconds."""
        self._rows = rows
        if self._live is None or self._clock() < self._next:
            return
        self._next = self._clock() + REFRESH_S
        self._refresh()

    def _refresh(self) -> None:
        if self._live is not None:
            self._show(partial(self._live.update, self._picture(), refresh=True))

    def _show(self, write: Callable[[], object]) -> None:
        """Raises KeyboardInterrupt where nobody is there any more, once and not while ending."""
        if self._gone:
            return
        try:
            write()
        except OSError as e:
            self._gone = True
            if not self._ending:
                raise KeyboardInterrupt from e

    def _picture(self) -> Group:
        table = Table(title=f"Harmony demo: {self._rows} rows acknowledged")
        for heading in ("node", "port", "agent's state", "database", "LSN", "lease left"):
            table.add_column(heading)
        for name, node in self._cluster.nodes.items() if self._cluster else ():
            reply = ask_status(node.admin_socket, timeout_s=0.1)
            mine = next((n.member for n in reply.nodes if n.name == name), None) if reply else None
            lease = reply.myself.lease_left_ms if reply else None
            table.add_row(
                name,
                str(node.port),
                reply.myself.state if reply else "no answer",
                mine.db if mine else "?",
                lsn(mine.received_lsn) if mine else "",
                f"{lease} ms" if lease is not None else "",
            )
        return Group(table, Text("\n".join(self._lines)))
