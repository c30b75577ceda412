"""What PostgreSQL's programs and its log say, sorted by what would help: a copy, or somebody's hand.

Matched on the English texts: the programs run under LC_ALL=C, and a server that does not start is asked for its reason
in English (programs.py). Where pg_rewind fails, what is not recognised counts as a reason for a copy, once (copies.py).
Where PostgreSQL does not start, a copy is for what is recognised as the data's fault: its files and its WAL.
"""

from __future__ import annotations

import re
from pathlib import Path

from harmony_fencer.durable import read_small
from harmony_fencer.programs import LOG

NOT_STOPPED = "must be shut down cleanly"  # the last thing that pg_rewind checks: all else was right
FOREIGN = "different systems"
NO_ROOM = "No space left"
SOURCE_FAILS = (
    "could not connect",
    "connection to server",
    "server closed the connection",
    "timeout expired",
)
NOT_THE_DATA = (  # why PostgreSQL does not start here, and a copy would not either
    "configuration file",
    "configuration parameter",
    "invalid value for parameter",
    "insufficient parameter settings",
    "could not bind",
    "could not create any TCP/IP sockets",
    "lock file",
    "Permission denied",
    "shared memory",
    '"restore_command" failed',
    "could not translate host name",
)
_NOT_AT_START = (  # the same, of a server
    *NOT_THE_DATA,
    "could not restore file",  # a restore_command that does not exist, or is killed
    "could not access file",  # a library that is not installed
    "could not load",
    "recovery command file",
    "could not create log file",
    "could not open log file",
    "lower setting than on the primary",
    "database files are incompatible",
)
_NOT_THE_DATA_EVER = (
    "Permission denied",
    "Operation not permitted",
    "Too many open files",
    "Cannot allocate memory",
)
_OF_THE_DATA = re.compile(
    r"checkpoint|timeline|backup.label|checksum|corrupt|PANIC:|control file|pg_control|relation mapping file|"
    r"could not access status of transaction|invalid (page|data|record|magic|resource|contrecord|length|xlog|primary)|"
    r"unexpected pageaddr|WAL (file|segment|was|ends|contains|directory)|log file .*segment|already been removed|"
    r"valid data directory|replication checkpoint|missing file"
)
_DATA_FILE = re.compile(
    r'"(\./)?((base|global|pg_[a-z_]+)/|pg_(wal|xact|tblspc|multixact|replslot|logical|commit_ts|twophase|subtrans)")'
)
CONNECTED = "connected to server"  # pg_rewind --progress: the source was reached, and let it in
OTHER_KIND = re.compile(r'"([^"]+)" is (?:of different type|not a )')  # there and here; by pg_rewind
NOT_LET_IN = {  # why the primary does not let its WAL be streamed, and what to do there
    "harmony_member_": "the primary's agent makes this slot; where it cannot, `harmonyctl status` says why",
    "replication slot": "create the slot on the primary, or take primary_slot_name out of postgresql.conf",
    "password authentication failed": "correct replication.passfile, or the role's password",
    "no password supplied": "put the role's password into replication.passfile",
    "no pg_hba.conf entry": "let the role in for replication in the primary's pg_hba.conf",
    "replication role": "ALTER ROLE ... REPLICATION on the primary",  # PostgreSQL 13 to 15
    "to start WAL sender": "ALTER ROLE ... REPLICATION on the primary",  # since 16
    "does not exist": "create the role on the primary",
    "is not permitted to log in": "ALTER ROLE ... LOGIN on the primary",
    "max_wal_senders": "raise max_wal_senders on the primary",
    "identifier differs": "it is another cluster's primary: correct [members]",
}
_TAIL = 16_000


def hopeless(text: str) -> bool:
    """Whether a copy would fail like the rewind, or be of the wrong cluster."""
    return any(word in text for word in (NO_ROOM, FOREIGN, *SOURCE_FAILS, *NOT_THE_DATA))


def of_the_data(text: str) -> bool:
    """Whether PostgreSQL does not start for what it found in its data, so that a copy would help."""
    if NO_ROOM in text or any(word in text for word in _NOT_THE_DATA_EVER):
        return False
    if _DATA_FILE.search(text):
        return True
    return not any(word in text for word in _NOT_AT_START) and _OF_THE_DATA.search(text) is not None


def has_gone(data: Path) -> bool:
    """Whether the newest that its log says of the primary is that it does not have the WAL any more."""
    try:
        text = read_small(data / LOG, _TAIL, tail=True).decode("utf-8", "replace")
    except OSError:
        return False
    return "has already been removed" in text.rpartition("starting PostgreSQL")[2]


def with_advice(text: str) -> str:
    """And what to do, where it is known."""
    found = [todo for word, todo in NOT_LET_IN.items() if word in text]
    return f"{text}: {found[0]}" if found else text


def not_let_in(data: Path) -> str:
    """Why the WAL receiver of what runs in `data` is turned away, by the newest line of its log that tells; ""."""
    try:
        lines = read_small(data / LOG, _TAIL, tail=True).decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        if "streaming WAL" in line or "WAL streaming at" in line or "starting PostgreSQL" in line:
            return ""
        if "FATAL: " in line and (
            "WAL stream" in line or "connect to the primary" in line or "identifier" in line
        ):
            said = line.partition("FATAL: ")[2].strip()[-300:]
            return with_advice(said) if with_advice(said) != said else ""
    return ""
