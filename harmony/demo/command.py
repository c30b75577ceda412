"""`harmonyctl demo`: bring a cluster up, break it, say in plain words what happened, leave nothing behind.

It touches no existing PostgreSQL, NATS or Harmony: own ports, own temporary directory, own processes.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import click
import msgspec
from rich.console import Console

from harmony.core.timing import PRESETS
from harmony.demo.cluster import MEMORY, Cluster, make_base, remove_base
from harmony.demo.parts import SetupError
from harmony.demo.scenarios import Result, Run, Scenario
from harmony.demo.view import View

EXIT_OK = 0
EXIT_NOT_OK = 1
EXIT_SETUP = 2
EXIT_INTERRUPTED = 130


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _ignore() -> None:
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    _ignore()  # a closed terminal sends more than one, and stopping everything must not be interrupted
    raise KeyboardInterrupt


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """The first SIGINT, SIGTERM or SIGHUP raises KeyboardInterrupt, more do nothing; as before afterwards."""
    before = {number: signal.signal(number, _interrupt) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def summary(result: Result) -> str:
    """What happened, in plain words."""
    if result.new_primary is None:
        taken = "Nobody accepted writes again"
    elif result.new_primary == result.old_primary:
        taken = f"{result.old_primary} leads again"
    else:
        taken = f"{result.new_primary} took over from {result.old_primary}"
    outage = "for good" if result.outage_s is None else f"for {result.outage_s:.2f} s"
    lines = [
        f"{taken}. The client could not write {outage}.",
        f"Acknowledged rows lost: {result.lost_rows}.",
        f"Time with two writable primaries: {result.dual_primary_s:g} s.",
        f"{result.old_primary}'s last local write: {result.old_primary_last_ack_s:.2f} s after the fault.",
        "All as promised." if result.ok else f"NOT as promised: {result.why}.",
    ]
    if result.old_primary_back_s is not None:
        back = f"{result.old_primary_back_s:.1f} s after the end of the fault"
        lines.insert(-1, f"{result.old_primary} was back as a streaming standby {back}.")
    return "\n".join(lines)


def _keep(cluster: Cluster, view: View) -> None:
    view.close()
    view.say("The cluster keeps running. Press Ctrl-C to stop and remove it.")
    view.say(f"The primary, wherever it is:  psql '{cluster.writer_conninfo}'")
    for name, node in cluster.nodes.items():
        view.say(f"{name}:  psql '{cluster.conninfo(name, 'postgres')}'")
        view.say(f"{name}:  harmonyctl status --config {node.config}   (log: {node.folder}/node.log)")
    while True:
        time.sleep(1)


def _remove(cluster: Cluster | None, base: Path, keep_logs: bool, view: View) -> None:
    """Stop everything; remove the directory, or only the data when its logs are still wanted. First done, then said."""
    left = cluster.stop() if cluster is not None else []
    if left:
        view.say(f"These processes would not end: {left}; their files stay in {base}")
        return
    if not keep_logs:
        remove_base(base)
        return
    for data in [*base.glob("n*/data"), base / "jetstream", base / "embedded_postgres", MEMORY / base.name]:
        shutil.rmtree(data, ignore_errors=True)
    view.say(f"Logs and recordings: {base}")


def run_demo(scenario: Scenario, preset: str, keep: bool, view: View) -> tuple[int, Result | None]:
    """The whole demo; (exit code, result). Everything is stopped when it returns."""
    base = make_base()
    cluster: Cluster | None = None
    result: Result | None = None
    code = EXIT_SETUP
    with _interruptible():
        try:
            with view:
                cluster = Cluster.prepare(preset, base)
                view.watch(cluster)
                cluster.start(view.say)
                result = Run(cluster, scenario, view.say, view.tick).measure()
                code = EXIT_OK if result.ok else EXIT_NOT_OK
                view.close()
                for line in summary(result).splitlines():
                    view.say(line)
                if keep:
                    _keep(cluster, view)
        except SetupError as error:
            code = EXIT_SETUP
            view.end()
            view.say(f"The demo could not be carried out: {error}")
        except KeyboardInterrupt:
            code = code if keep and result is not None else EXIT_INTERRUPTED
            view.end()
            view.say("Interrupted: stopping everything")
        finally:
            _ignore()
            view.end()
            _remove(cluster, base, code in {EXIT_NOT_OK, EXIT_SETUP}, view)
    return code, result


@click.command()
@click.option(
    "--scenario",
    type=click.Choice([s.value for s in Scenario]),
    default=Scenario.NODE_KILLED.value,
    show_default=True,
    help="What goes wrong.",
)
@click.option(
    "--preset", type=click.Choice(list(PRESETS)), default="fast", show_default=True, help="The nodes' timing."
)
@click.option("--keep", is_flag=True, help="Leave the cluster running afterwards, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object as the last line on standard output.")
def demo(scenario: str, preset: str, keep: bool, as_json: bool) -> None:
    """Three nodes on this machine, one fault, and what it cost: measured.

    Exit code 0: as promised; 1: not; 2: could not be set up; 130: interrupted.
    """
    console = Console(stderr=as_json)
    view = View(console, plain=not console.is_terminal)
    code, result = run_demo(Scenario(scenario), preset, keep, view)
    if as_json and result is not None:
        sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
        sys.stdout.flush()
    sys.exit(code)
