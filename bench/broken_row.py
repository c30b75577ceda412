"""A pytest plugin: all decisions are made without one row of the table.

    BROKEN_ROW=204 python -m pytest -p bench.broken_row tests/core

`bench/mutate.py rows` runs it for each of them.
"""

from __future__ import annotations

import dataclasses
import os

from harmony.core import table

_BROKEN = int(os.environ["BROKEN_ROW"])
if _BROKEN not in {row.id for row in table.TABLE}:
    raise SystemExit(f"BROKEN_ROW={_BROKEN}: there is no such row")
table.ROWS_OF = {
    state: tuple(dataclasses.replace(row, when=lambda _: False) if row.id == _BROKEN else row for row in rows)
    for state, rows in table.ROWS_OF.items()
}
