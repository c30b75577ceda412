"""Where Harmony's own files must not be: inside the data directory, which a rejoin exchanges for another. Pure.

While it is rewound, only a stub stands there; a copy has the primary's files. What postgresql.conf needs at the top of
the data directory is kept (places.py of the fencer); what Harmony itself needs meanwhile has to be elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import PurePath

# Harmony's own files and folders, which are wanted while the data directory is exchanged for another.
_NOT_INSIDE = (
    ("node", "state_dir"),
    ("node", "run_dir"),
    ("store", "credentials_file"),
    ("bootstrap", "command"),
    ("bootstrap", "sql_file"),
    ("postgresql", "replication_passfile"),
    ("postgresql", "socket_dir"),
    ("postgresql", "bin_dir"),
    ("postgresql", "library_dir"),
)


def inside_data(
    values: Mapping[str, Mapping[str, object]], path: Callable[[str], str], own: str = ""
) -> list[str]:
    """Problems of what stands inside postgresql.data_dir. `path` makes one comparable; `own`: the file of all this."""
    named = values["postgresql"].get("data_dir")
    if not isinstance(named, str):
        return []
    data, found = PurePath(path(named)), list[str]()
    if own and data in PurePath(path(own)).parents:
        found.append(
            f"{own} is inside postgresql.data_dir, which a rejoin exchanges for another: put it elsewhere"
        )
    for section, key in _NOT_INSIDE:
        value = values[section].get(key)
        if isinstance(value, str) and data in (place := PurePath(path(value)), *place.parents):
            found.append(
                f"{section}.{key}: {value} is inside postgresql.data_dir, which a rejoin exchanges for another: put it "
                "elsewhere"
            )
    file = values["postgresql"].get("config_file")
    if isinstance(file, str) and data in PurePath(path(file)).parents and PurePath(path(file)).parent != data:
        found.append(
            f"postgresql.config_file: {file} is in a folder inside postgresql.data_dir, which a rejoin exchanges for "
            "another: put it at its top, or elsewhere"
        )
    return found
