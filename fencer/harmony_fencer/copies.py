"""What is remembered of the last copy, in state_dir: where its tablespaces were to go, and how it ended.

A copy that was cut short leaves its tablespaces filled outside of its directory, and PostgreSQL copies into an empty
place only. What was missing or empty right before a copy of ours began is written down before it begins; from there
only what a copy has made is removed, and nothing that a data directory of this node uses.
And a copy that ended with the failure that it was made for was the last: no other is made until a configuration file
or the primary has changed.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import msgspec

from harmony_fencer import bootstrap, durable, reasons, settings
from harmony_fencer.config import FencerConfig
from harmony_fencer.decoding import Unreadable, decoded
from harmony_fencer.mounts import is_mount
from harmony_fencer.own import own_files
from harmony_fencer.programs import PostgresError

FILE = "copy.json"
_MADE = re.compile(r"PG_\d+_\d+\Z")  # in a tablespace, by a server or a copy of that version


class LastCopy(msgspec.Struct, frozen=True):
    """`failed`: "" where it has not ended, or streamed. `started`: PostgreSQL did start, and did not stream."""

    primary: str = ""
    tablespaces: tuple[str, ...] = ()
    failed: str = ""
    started: bool = False
    configuration: str = ""


_LAST = msgspec.json.Decoder(LastCopy)


class Copies:
    """Of one data directory."""

    def __init__(self, config: FencerConfig) -> None:
        self._c, self._file = config, Path(config.state_dir) / FILE

    def last(self) -> LastCopy:
        """Nothing, where nothing is known."""
        try:
            return decoded(_LAST, self._file.read_bytes())
        except (OSError, Unreadable):
            return LastCopy()

    def begin(self, primary: str, tablespaces: list[str]) -> None:
        """Before a copy, durably. Raises OSError."""
        places = tuple(p for p in tablespaces if p.startswith("/") and bootstrap.is_empty(Path(p)))
        self._save(LastCopy(primary, places))

    def in_place(self) -> None:
        """Its tablespaces are a data directory's now. Raises OSError."""
        if self.last().tablespaces:
            self._save(msgspec.structs.replace(self.last(), tablespaces=()))

    def ended(self, failed: str, data: Path, *, started: bool) -> None:
        """The copy from last().primary, which is in place; "": it streams. Raises OSError."""
        last = self.last()
        if not failed:
            if last.failed:
                self._save(LastCopy())
            return
        last = msgspec.structs.replace(last, failed=failed[:300], started=started)
        self._save(msgspec.structs.replace(last, configuration=self._configuration(data)))

    def refuses(self, primary: str, why: str, data: Path, *, again: bool) -> str:
        """Why no other copy is made for `why`; "": one may be. `again`: it has not streamed since the last one."""
        last = self.last()
        if not last.failed or last.primary != primary:
            return ""
        if last.started and (not again or reasons.has_gone(data)):
            return ""  # it was well since, or what it lacks only a copy brings
        if not last.started and _same(last.failed) not in _same(why) and _same(why) not in _same(last.failed):
            return ""
        if last.configuration != self._configuration(data):
            return ""
        return (
            f"ALARM: a copy from {primary} ended so: {last.failed[:250]}; no other is made until a configuration file "
            "or the primary has changed (touch postgresql.conf counts)"
        )

    def left(self, *used_by: Path) -> list[str]:
        """Folders that a copy of ours has left in tablespaces' places, none of them used by these directories."""
        used = {str(Path(link).readlink()) for data in used_by for link in _links(data)}
        return [
            os.path.join(place, name)  # noqa: PTH118
            for place in self.last().tablespaces
            if place not in used and Path(place).is_dir() and not Path(place).is_symlink()
            for name in sorted(os.listdir(place))
            if _MADE.match(name)
        ]

    def _configuration(self, data: Path) -> str:
        """A mark that is another one once a configuration file has changed."""
        file, mark = Path(self._c.config_file), hashlib.sha256()
        for line in settings.texts(file):
            mark.update(line.encode("utf-8", "surrogateescape"))
        try:
            mark.update(str(file.stat().st_mtime_ns).encode())
            for own in own_files(data):
                if own.name not in settings.WRITTEN:
                    mark.update(f"{own.name} {own.mode} {own.target} ".encode("utf-8", "surrogateescape"))
                    mark.update(own.content or b"")
        except OSError as e:
            mark.update(str(e).encode())
        return mark.hexdigest()[:32]

    def _save(self, last: LastCopy) -> None:
        durable.replace(self._file, msgspec.json.encode(last))


def may_copy(config: FencerConfig, real: Path, why: str) -> None:
    """Raises PostgresError where no copy may or can be made of the primary, `real` being what is here."""
    if not config.rejoin.clone:
        raise PostgresError(f"only a copy would help, and rejoin.clone is false: {why}"[:480])
    if _links(real):
        raise PostgresError(
            f"only a copy would help, and {real} has tablespaces, whose places a copy would need, too: "
            f"copy it by hand with pg_basebackup --tablespace-mapping; {why}"[:480]
        )
    wal = real / "pg_wal"
    if wal.is_symlink() or is_mount(wal):
        raise PostgresError(
            f"only a copy would help, and pg_wal in {real} is a {'symlink' if wal.is_symlink() else 'mount point'}: "
            f"a place that the old directory keeps: copy it by hand with pg_basebackup --waldir; {why}"[:480]
        )


def _links(data: Path) -> list[str]:
    try:
        return [str(p) for p in (data / "pg_tblspc").iterdir() if p.is_symlink()]
    except OSError:
        return []


def _same(why: str) -> str:
    return re.sub(r"[\d\W]+", " ", why.rpartition("FATAL:")[2].rpartition("PANIC:")[2]).strip()
