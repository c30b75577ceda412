"""What is this node's own in its data directory, which pg_rewind and a copy would replace by the primary's.

That is all at the top that PostgreSQL has not made itself: configuration, keys, symlinks, folders of include_dir, each
with its kind, mode and time. What belongs to somebody else (root's postgresql.conf) is the owner's afterwards. And
PostgreSQL's logs, the evidence of what became of a lost primary: they are moved, not copied.
All of it runs as PostgreSQL's user (files.py). What is too large for a node's own is left, and said.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harmony_fencer.durable import read_small
from harmony_fencer.files import Change
from harmony_fencer.log import log
from harmony_fencer.programs import LOG

KEPT_BYTES = 1_000_000  # of one file
LOG_BYTES = 16_000_000
KEPT_ENTRIES = 200  # of one folder
_POSTGRES = re.compile(
    r"base|global|log|PG_VERSION|pg_(commit_ts|dynshmem|log|logical|multixact|notify|replslot|serial|snapshots|stat|"
    r"stat_tmp|subtrans|tblspc|twophase|wal|xact|xlog|clog|upgrade_output\.d|internal\.init.*)|postmaster\.(pid|opts)|"
    r"backup_(label|manifest).*|tablespace_map.*|standby\.signal|recovery\.(signal|conf|done)|promote|"
    r"fallback_promote|logrotate|current_logfiles.*|pgsql_tmp.*|lost\+found|core(\.\d+)?|\..*\.new|"
    r"harmony[.-](?!.*\.conf\Z).*"
)
_LOG_DIRS = ("log", "pg_log")


@dataclass(frozen=True, slots=True)
class Own:
    """One entry. `content`: of a file; `target`: of a symlink; neither: a folder."""

    name: str
    mode: int
    time_ns: int
    content: bytes | None = None
    target: str | None = None
    plain: bool = True  # pg_rewind can write over it


def is_own(name: str) -> bool:
    """Of a path below the data directory, by its first part."""
    return not _POSTGRES.fullmatch(name.partition("/")[0])


def own_files(data: Path) -> list[Own]:
    """A folder comes before what is in it. Raises OSError."""
    found: list[Own] = []
    for entry in sorted(os.scandir(data), key=lambda e: e.name) if data.exists() else ():
        kept = entry.is_symlink() and entry.name in _LOG_DIRS
        if kept or not _POSTGRES.fullmatch(entry.name):
            found += _own(Path(entry.path), entry.name)
    return found


def _own(path: Path, name: str) -> list[Own]:
    try:
        seen = path.lstat()
        mode = stat.S_IMODE(seen.st_mode)
        mine = seen.st_uid == _fs_uid(path)
        # A key that only root could open for the group must not stay open to it when it is PostgreSQL's.
        mode = mode if mine else mode & 0o700 | 0o600
        if stat.S_ISLNK(seen.st_mode):
            return [Own(name, mode, seen.st_mtime_ns, target=str(path.readlink()), plain=False)]
        if stat.S_ISREG(seen.st_mode) and seen.st_size <= KEPT_BYTES:
            return [Own(name, mode, seen.st_mtime_ns, read_small(path, KEPT_BYTES), plain=mine)]
        if stat.S_ISDIR(seen.st_mode):
            return _folder(path, name, mode | 0o700, seen.st_mtime_ns)
    except PermissionError as e:  # PostgreSQL cannot read it either
        log.warning("not this node's own: it cannot be read", file=str(path), why=str(e))
        return []
    if stat.S_ISREG(seen.st_mode):
        log.warning("not this node's own: it is too large", file=str(path), bytes=seen.st_size)
    return []


def _folder(path: Path, name: str, mode: int, time_ns: int) -> list[Own]:
    found = [Own(name, mode, time_ns)]
    for number, entry in enumerate(os.scandir(path)):
        if number >= KEPT_ENTRIES:
            log.warning("not this node's own: too much is in it", folder=str(path))
            return []
        found += _own(Path(entry.path), f"{name}/{entry.name}")
    return found if len(found) <= KEPT_ENTRIES else []


def _fs_uid(path: Path) -> int:
    """Whose the data directory is, in which `path` stands (at whatever depth its folder is the owner's, too)."""
    return path.parent.stat().st_uid


def put(change: Change, place: Path, own: list[Own]) -> None:
    """Into another directory, in place of what has these names there. Raises OSError."""
    for one in own:
        path = place / one.name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        if one.target is not None:
            temporary = path.with_name(f".{path.name}.link.new")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(one.target)
            change.act(lambda old=temporary, new=path: old.replace(new))  # type: ignore[misc]
        elif one.content is None:
            path.unlink(missing_ok=True)
            path.mkdir(mode=one.mode)
        else:
            if path.is_symlink():
                path.unlink()
            change.write(path, one.content, mode=one.mode)
            os.utime(path, ns=(one.time_ns, one.time_ns))


def make_plain(change: Change, data: Path, own: list[Own]) -> None:
    """What pg_rewind would refuse (a symlink where its source has a file) or could not write over (root's) becomes a
    plain file of PostgreSQL's user with the same content. Raises OSError."""
    for one in own:
        path = data / one.name
        if one.plain or not (path.is_symlink() or path.exists()):
            continue
        content = one.content
        if content is None and path.is_file():
            content = path.read_bytes()[:KEPT_BYTES]
        path.unlink()
        if content is not None:
            change.write(path, content)


def not_writable(data: Path, uid: int) -> str:
    """The first file or folder that is not PostgreSQL's user's, but for files of its own at the top; "": none.

    Those are made plain before; what is in a folder of somebody else's is not ours to replace.
    """
    for at, folders, names in os.walk(data):
        top = at == str(data)
        for name in (*folders, *names):
            if top and name in names and (is_own(name) or name.startswith("recovery.")):
                continue
            path = os.path.join(at, name)  # noqa: PTH118 (many files)
            with contextlib.suppress(FileNotFoundError):
                found = os.lstat(path)
                if found.st_uid != uid and not stat.S_ISLNK(found.st_mode):
                    return path
    return ""


# ------------------------------------------------------------ logs


def _logs(data: Path) -> Iterator[str]:
    for name in (LOG, f"{LOG}.1", *_LOG_DIRS):
        path = data / name
        if not path.is_symlink() and path.exists():
            yield name


def move_logs(data: Path, to: Path, *, over: bool) -> None:
    """`over`: in place of what is there; else what is there counts. Never raises: no rejoin fails for a log."""
    for name in list(_logs(data)):
        try:
            if (to / name).exists():
                if not over:
                    continue
                _away(to / name)
            (data / name).rename(to / name)
        except OSError as e:
            log.warning("PostgreSQL's log could not be kept", file=str(data / name), why=str(e))


def link_logs(data: Path, to: Path) -> None:
    """Into a copy, in place of the primary's; the old directory has them, too. Never raises."""
    for name in {LOG, f"{LOG}.1", *_LOG_DIRS}:
        try:
            if (to / name).is_symlink():
                continue
            if (to / name).exists():
                _away(to / name)
            if (data / name).is_symlink() or not (data / name).exists():
                continue
            if (data / name).is_file():
                os.link(data / name, to / name)
                continue
            (to / name).mkdir(mode=0o700)
            for file in (data / name).iterdir():
                if file.is_file() and not file.is_symlink():
                    os.link(file, to / name / file.name)
        except OSError as e:
            log.warning("PostgreSQL's log could not be kept", file=str(data / name), why=str(e))


def rotate(change: Change, data: Path) -> None:
    """Before a start: a log that has grown long makes room for a new one. Raises OSError."""
    path = data / LOG
    if path.exists() and path.lstat().st_size > LOG_BYTES:
        change.act(lambda: path.replace(path.with_name(f"{LOG}.1")))  # type: ignore[arg-type]


def _away(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
