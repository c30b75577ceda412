"""Rules of mutate.py for the fencer's way back of a node, and for what field reports have shown (its
postgres.py, rejoin.py and those beside them): what each refuses, keeps, and does in which order.

(name, file, text as it is, text that breaks the rule, tests that should notice)
"""

from __future__ import annotations

from bench.mutants.rule import Rule

FENCER, CORE = "fencer/harmony_fencer", "harmony/core"
RULES: list[Rule] = [
    (
        "start: asked why in English",
        f"{FENCER}/postgres.py",
        "if e.reason or self._hurried or self.pids():",
        "if True:",
        "tests/fencer/test_field.py -k no_copy_for",
    ),
    (
        "start: an older reason is not taken for its own",
        f"{FENCER}/programs.py",
        "    if since:\n",
        "    if False:\n",
        "tests/fencer/test_field.py -k no_copy_for",
    ),
    (
        "copy: only for the data's fault",
        f"{FENCER}/rejoin.py",
        "(self._starting and not reasons.of_the_data(e.reason or text))",
        "False",
        "tests/fencer/test_field.py -k no_copy_for",
    ),
    (
        "copy: where the rewound does not start",
        f"{FENCER}/rejoin.py",
        "if not self._copied and reasons.of_the_data(e.reason):",
        "if False:",
        "tests/fencer/test_field.py -k data_keeps_from",
    ),
    (
        "copy: a file of the data",
        f"{FENCER}/reasons.py",
        "if _DATA_FILE.search(text):",
        "if False:",
        "tests/fencer/test_field.py -k recognised",
    ),
    (
        "copy: one that failed was the last",
        f"{FENCER}/rejoin.py",
        "raise PostgresError(refused)",
        "pass",
        "tests/fencer/test_field.py -k was_the_last",
    ),
    (
        "copy: until a file has changed",
        f"{FENCER}/copies.py",
        "if last.configuration != self._configuration(data):",
        "if False:",
        "tests/fencer/test_field.py -k was_the_last",
    ),
    (
        "copy: lock files are cleared before",
        f"{FENCER}/rejoin.py",
        "await self._base.clear_locks()",
        "pass",
        "tests/fencer/test_field.py -k was_the_last",
    ),
    (
        "copy: its tablespaces are listed",
        f"{FENCER}/rejoin.py",
        "self._copies.begin(primary, found)",
        "self._copies.begin(primary, [])",
        "tests/fencer/test_field.py -k cut_short",
    ),
    (
        "copy: only empty places are listed",
        f"{FENCER}/copies.py",
        'p.startswith("/") and bootstrap.is_empty(Path(p))',
        'p.startswith("/")',
        "tests/fencer/test_field.py -k cut_short",
    ),
    (
        "copy: no place of a tablespace's own",
        f"{FENCER}/copies.py",
        "if _links(real):",
        "if False:",
        "tests/fencer/test_field.py -k would_not_keep",
    ),
    (
        "copy: pg_wal elsewhere",
        f"{FENCER}/copies.py",
        "if wal.is_symlink() or is_mount(wal):",
        "if False:",
        "tests/fencer/test_field.py -k would_not_keep",
    ),
    (
        "kept: symlinks as such",
        f"{FENCER}/own.py",
        "if stat.S_ISLNK(seen.st_mode):",
        "if False:",
        "tests/fencer/test_field.py -k own_is_kept",
    ),
    (
        "kept: made plain for pg_rewind",
        f"{FENCER}/rejoin.py",
        "own.make_plain(change, self.aside, own.own_files(self.aside))",
        "pass",
        "tests/fencer/test_field.py -k own_is_kept",
    ),
    (
        "kept: folders",
        f"{FENCER}/own.py",
        "if stat.S_ISDIR(seen.st_mode):",
        "if False:",
        "tests/fencer/test_field.py -k own_is_kept",
    ),
    (
        "kept: modes",
        f"{FENCER}/own.py",
        "change.write(path, one.content, mode=one.mode)",
        "change.write(path, one.content)",
        "tests/fencer/test_field.py -k own_is_kept",
    ),
    (
        "kept: the log over a rewind",
        f"{FENCER}/rejoin.py",
        "own.move_logs(self.aside, self.data, over=False)",
        "pass",
        "tests/fencer/test_field.py -k own_is_kept",
    ),
    (
        "kept: the log over a copy",
        f"{FENCER}/rejoin.py",
        "own.link_logs(self.data, place)",
        "pass",
        "tests/fencer/test_field.py -k own_is_kept",
    ),
    (
        "before: what pg_rewind could not write",
        f"{FENCER}/rejoin.py",
        "await preflight.can_be_written(self._c, where)",
        "pass",
        "tests/fencer/test_field.py -k could_not_write",
    ),
    (
        "before: the source was reached",
        f"{FENCER}/preflight.py",
        "reasons.CONNECTED not in e.text or reasons.hopeless(said)",
        "reasons.hopeless(said.replace('translate host name', ''))",
        "tests/fencer/test_field.py -k source_was_reached",
    ),
    (
        "before: a mount point",
        f"{FENCER}/rejoin.py",
        (
            "            if immovable := preflight.immovable(self.data):\n                "
            "raise PostgresError(immovable)\n            if self.empty"
        ),
        "            if self.empty",
        "tests/fencer/test_field.py -k mount_point",
    ),
    (
        "before: the archive is asked, too",
        f"{FENCER}/preflight.py",
        'primary), *more, "--dry-run")',
        'primary), "--dry-run")',
        "tests/fencer/test_field.py -k archive",
    ),
    (
        "kept: old ones within their size",
        f"{FENCER}/rejoin.py",
        "(limit and total > limit)",
        "False",
        "tests/fencer/test_field.py -k old_directories",
    ),
    (
        "astray: not while its replay is held up",
        f"{CORE}/fold.py",
        "replays = e.held or",
        "replays =",
        "tests/core/test_rejoin.py",
    ),
    (
        "sessions: their own settings",
        "harmony/session.py",
        "for key, value in {**SETTINGS, **more}.items()",
        "for key, value in more.items()",
        "tests/fencer/test_session.py",
    ),
    (
        "sessions: nothing is converted",
        "harmony/session.py",
        'client_encoding="SQL_ASCII"',
        'client_encoding="UTF8"',
        "tests/fencer/test_session.py",
    ),
]
