"""Runs the client processes of a demo and follows what they record.

It stops them by closing their standard input; it never signals anything but its own children.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import psutil

from harmony.demo.measure import Ack, Recording, parse
from harmony.demo.parts import environment


class Recorder:
    """One client process and its file. `poll` reads what is new; `acks` and `refused_ns` grow with it."""

    def __init__(self, out: Path, conninfo: str, probing: bool) -> None:
        self.acks: list[Ack] = []
        self.refused_ns: list[int] = []
        self._out = out
        self._offset = 0
        argv = [sys.executable, "-I", "-m", "harmony.demo.client", "--out", str(out)]
        argv += ["--probe", conninfo] if probing else [conninfo]
        with out.with_suffix(".log").open("ab") as log:
            self._process = psutil.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd="/",
                env=environment(),
                start_new_session=True,
            )

    def poll(self) -> None:
        """Take in the lines written since the last call."""
        try:
            with self._out.open("rb") as source:
                source.seek(self._offset)
                fresh = source.read()
        except FileNotFoundError:
            return
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._offset += len(whole)
        recording = parse(whole.decode("ascii").splitlines(keepends=True))
        self.acks += recording.acks
        self.refused_ns += recording.refused_ns

    @property
    def died(self) -> bool:
        """True when the client ended by itself: then its measurement is worth nothing."""
        return self._process.poll() is not None

    @property
    def recording(self) -> Recording:
        """All that was recorded up to the last `poll`."""
        return Recording(tuple(self.acks), tuple(self.refused_ns))

    def stop(self, wait_s: float = 10.0) -> None:
        """Let the client finish its row and end (at most `wait_s`, then kill it); read the rest."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=wait_s)
        except psutil.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=wait_s)
        self.poll()


class Recorders:
    """The writer and one prober for each node."""

    def __init__(self, folder: Path, writer_conninfo: str, probe_conninfos: dict[str, str]) -> None:
        folder.mkdir()
        self.writer = Recorder(folder / "writer.txt", writer_conninfo, probing=False)
        self.probers = {
            name: Recorder(
                folder / f"{name}.txt", f"{conninfo} options='-c synchronous_commit=local'", probing=True
            )
            for name, conninfo in probe_conninfos.items()
        }

    def all(self) -> list[Recorder]:
        return [self.writer, *self.probers.values()]

    def poll(self) -> None:
        """Read what all have written."""
        for recorder in self.all():
            recorder.poll()

    def acked_at(self, port: int, since_ns: int) -> int:
        """The writer's acknowledgements by the node on this port, of rows sent since then; reads what is new."""
        self.poll()
        return sum(a.port == port and a.sent_ns >= since_ns for a in self.writer.acks)

    def stop(self) -> None:
        """End all clients; harmless when repeated."""
        for recorder in self.all():
            recorder.stop()
