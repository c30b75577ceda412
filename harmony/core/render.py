"""The table as documents: docs/states.md comes from here, so that it cannot say something else. Pure."""

from __future__ import annotations

from harmony.core.states import State
from harmony.core.table import TABLE


def markdown() -> str:
    """The whole of docs/states.md: a diagram of the transitions, then every row."""
    lines = [
        "# States and transitions",
        "",
        "Rendered from `harmony/core/table.py` by `make rewrite`; a test keeps it equal. In each state the first",
        "row whose condition holds is taken; none: hold. The row's number is in every log line and in `harmonyctl",
        "status`.",
        "",
        "```mermaid",
        "stateDiagram-v2",
    ]
    lines += [f'    state "{s}" as {s.name}' for s in State]
    edges: dict[tuple[State, State], list[str]] = {}
    for row in TABLE:
        if row.next is not row.state:
            edges.setdefault((row.state, row.next), []).append(str(row.id))
    lines += [f"    {a.name} --> {b.name}: {', '.join(ids)}" for (a, b), ids in edges.items()]
    lines += ["```", ""]
    for state in State:
        lines += [
            f"## {state}",
            "",
            "| row | when | next | orders | why |",
            "| --- | --- | --- | --- | --- |",
        ]
        for row in TABLE:
            if row.state is state:
                then = "stays" if row.next is state else str(row.next)
                lines.append(f"| {row.id} | {row.condition} | {then} | {', '.join(row.do)} | {row.why} |")
        lines.append("")
    return "\n".join(lines)
