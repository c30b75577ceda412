"""Repeats put together: JSON as they were measured, a table of medians and worst, a plot. It computes no figure."""

from __future__ import annotations

import statistics
from pathlib import Path

import msgspec

from bench.ha.repeat import Repeat

Row = tuple[str, str, str, str]  # scenario, peer, preset, sync


BEGIN, END = "<!-- rendered: {} -->", "<!-- end -->"
COLUMNS = (
    "scenario",
    "peer",
    "preset, sync",
    "runs",
    "outage, s",
    "old stops, s",
    "new writes, s",
    "two acknowledge, s",
    "rows lost: client, local",
    "rejoins, s",
)


class Results(msgspec.Struct):
    """A campaign's file."""

    machine: dict[str, str]
    repeats: list[Repeat]


def save(results: msgspec.Struct, to: Path) -> None:
    """Whole, at once: a campaign that is killed leaves the last good file."""
    to.parent.mkdir(parents=True, exist_ok=True)
    fresh = to.with_suffix(".new")
    fresh.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1))
    fresh.replace(to)


def load(source: Path) -> Results:
    """Raises msgspec.ValidationError for another file."""
    return msgspec.json.decode(source.read_bytes(), type=Results)


def seconds(value: float | None) -> str:
    """For people."""
    return "never" if value is None else f"{value:.2f} s"


def grouped(results: Results) -> dict[Row, list[Repeat]]:
    """Repeats of the same thing, in the order of their first."""
    found: dict[Row, list[Repeat]] = {}
    for repeat in results.repeats:
        o = repeat.options
        peer = o.peer + (" (failsafe)" if o.failsafe else "")
        found.setdefault((repeat.scenario, peer, o.preset, o.sync), []).append(repeat)
    return found


def cell(values: list[float | None]) -> str:
    """Median and worst; those that never came are counted."""
    came = sorted(v for v in values if v is not None)
    if not came:
        return "–"
    missed = f", {len(values) - len(came)} never" if len(came) < len(values) else ""
    if len(came) == 1:
        return f"{came[0]:.2f}{missed}"
    return f"{statistics.median(came):.2f} ({came[-1]:.2f}{missed})"


def markdown(results: Results) -> str:
    """One line for each scenario, peer, preset and mode: seconds as median (worst), rows as sums."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    for (scenario, peer, preset, sync), repeats in grouped(results).items():
        found = [r.figures for r in repeats if r.figures is not None]
        broken = sum(1 for r in repeats if r.error)
        runs = f"{len(repeats)}" + (f" ({broken} failed)" if broken else "")
        overlap = max((f.overlap_s for f in found), default=0.0)
        lines.append(
            f"| {scenario} | {peer} | {preset}, {sync} | {runs} | {cell([f.outage_s for f in found])} "
            f"| {cell([f.old_stopped_s for f in found])} | {cell([f.new_first_s for f in found])} "
            f"| {overlap:.2f} ({sum(f.late_rows for f in found)} rows) "
            f"| {sum(f.lost_client for f in found)}, {sum(f.lost_local for f in found)} "
            f"| {cell([r.rejoin_s for r in repeats if r.figures is not None])} |"
        )
    return "\n".join(lines) + "\n"


def circumstances(results: Results) -> str:
    """One sentence: when, on what, with which versions, and how busy the machine was."""
    m = results.machine
    versions: dict[str, str] = {}
    for repeat in results.repeats:
        versions |= repeat.versions
    loads = [repeat.load[0] for repeat in results.repeats]
    busy = f"; load before a repeat {statistics.median(loads):.1f}, at most {max(loads):.1f}" if loads else ""
    named = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return f"{m['date']}, {m['cores']} cores ({m['cpu']}), Linux {m['linux']}, Python {m['python']}; {named}{busy}.\n"


def rendered(page: str, name: str, results: Results) -> str:
    """The documentation's page with these results in the place that is called `name`."""
    begin = BEGIN.format(name)
    before, mark, rest = page.partition(begin)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"no {begin} … {END} in the page")
    return f"{before}{mark}\n\n{circumstances(results)}\n{markdown(results)}\n{end}{after}"


def plot(results: Results, to: Path) -> None:
    """Outages by scenario: each repeat a dot, the median a bar. Needs matplotlib (the extra `bench`)."""
    import matplotlib as mpl  # noqa: PLC0415 (an extra: only plots need it)

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    rows = grouped(results)
    scenarios = list(dict.fromkeys(row[0] for row in rows))
    series = list(dict.fromkeys(row[1:] for row in rows))
    figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * len(rows)))
    ticks, y, seen = [], 0.0, set[tuple[str, ...]]()
    for scenario in scenarios:
        there = [one for one in series if (scenario, *one) in rows]
        ticks.append(y + (len(there) - 1) / 2)
        for one in there:
            color = f"C{series.index(one)}"
            outages = _outages(rows[(scenario, *one)])
            label = None if one in seen else ", ".join(one)
            axes.barh(y, statistics.median(outages or [0.0]), 0.9, color=color, alpha=0.5, label=label)
            axes.plot(outages, [y] * len(outages), ".", color=color)
            seen.add(one)
            y += 1
        y += 0.6
    axes.set_yticks(ticks, scenarios)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("the client could not write, s")
    axes.legend()
    figure.tight_layout()
    figure.savefig(to)


def _outages(repeats: list[Repeat]) -> list[float]:
    return [r.figures.outage_s for r in repeats if r.figures is not None and r.figures.outage_s is not None]
