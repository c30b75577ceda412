"""What each process sees of its host, and how it touches it; each broken on purpose (bench/mutate.py)."""

from __future__ import annotations

from bench.mutants.rule import FENCER, Rule

AGENT, RESOLVE = "harmony/agent", "harmony/resolve.py"
HEALTH = "tests/agent/test_health.py -k 'symptoms or crash or stall or used_up or greeting or nobody_there or errand'"
SLOTS, CONFIG = "tests/agent/test_slots.py", "tests/config/test_config.py"
WATCHDOG, FILES, ROOM = (f"tests/fencer/test_{name}.py" for name in ("watchdog", "files", "room"))

RULES: list[Rule] = [
    # the agent's look at PostgreSQL
    ("health: a stopped postmaster", f"{AGENT}/health.py", 'if s.process in {"T", "t"}:', 'if s.process in {"t"}:', HEALTH),
    ("health: nobody new gets in", f"{AGENT}/health.py", '        if s.greeting == "silent":\n            return "closed"', '        if False:\n            return "closed"', HEALTH),
    ("health: one look is no stall", f"{AGENT}/health.py", "STUCK_LOOKS = 2", "STUCK_LOOKS = 1", HEALTH),
    ("health: no answer, no memory", f"{AGENT}/health.py", "            self.still = self.stuck = self.waited = 0\n", "", HEALTH),
    ("health: a crash is of the same postmaster", f"{AGENT}/health.py", " and before[0] == born[0] and before[1] != born[1]", " and before[1] != born[1]", HEALTH),
    ("health: no birth is no crash", f"{AGENT}/health.py", "        if not all(born):", "        if False:", HEALTH),
    ("health: one greeting at a time", f"{AGENT}/health.py", '        except (TimeoutError, BlockingIOError):\n            return "silent"', '        except (TimeoutError, BlockingIOError):\n            self.close()\n            return "silent"', HEALTH),
    ("health: one errand at a time", f"{AGENT}/health.py", "        if self.away:\n", "        if False:\n", HEALTH),
    ("health: the pid is the kernel's word", f"{AGENT}/health.py", "            self.postmaster = _PEER.unpack(", "            _PEER.unpack(", HEALTH),
    # slots and settings of PostgreSQL here
    ("slots: nothing without a duty", f"{AGENT}/slots.py", "or duty is None or found.recovering != (duty.role", "or duty is None or (duty.role", SLOTS),
    ("slots: switched off", f"{AGENT}/slots.py", "if not wanted.slots or duty is None", "if duty is None", SLOTS),
    ("slots: none without a bound", f"{AGENT}/slots.py", 'if keep is not None and keep.value == "-1"', "if False", SLOTS),
    ("slots: none without the right", f"{AGENT}/slots.py", "    if not found.may:\n", "    if False:\n", SLOTS),
    ("slots: others' are left alone", f"{AGENT}/slots.py", "s.name.startswith(SLOT_PREFIX) and s.physical", "s.physical", SLOTS),
    ("slots: what is in use is left alone", f"{AGENT}/slots.py", "s.name not in mine and not s.active", "s.name not in mine", SLOTS),
    ("slots: never beyond what was replayed", f"{AGENT}/slots.py", "min(to, found.replayed)", "to", SLOTS),
    ("slots: never backwards", f"{AGENT}/slots.py", " and to > slot.lsn:", ":", SLOTS),
    ("slots: what holds VACUUM back", f"{AGENT}/slots.py", "    if standby and slot.pinned:", "    if False:", SLOTS),
    ("slots: a lost one keeps nothing", f"{AGENT}/slots.py", "s.lsn is not None and not s.lost and not s.temporary", "s.lsn is not None and not s.temporary", SLOTS),
    ("keeper: nothing after the lease", f"{AGENT}/keeper.py", "time.clock_gettime_ns(time.CLOCK_BOOTTIME) >= duty.until_ns)", "False)", f"{SLOTS} -k after_the_lease"),
    ("keeper: nor without a duty", f"{AGENT}/keeper.py", "if duty is None or (not standby", "if (not standby", f"{SLOTS} -k after_the_lease"),
    # the configuration on this host
    ("resolve: whose data it is", RESOLVE, "elif postgres_uid >= 0 and data.st_uid != postgres_uid:", "elif False:", f"{CONFIG} -k 'resolve or does_not_fit'"),
    ("resolve: PostgreSQL is not root", RESOLVE, "if p.user is None and os.geteuid() == 0:", "if False:", f"{CONFIG} -k 'resolve or does_not_fit'"),
    ("resolve: a data directory that is missing", RESOLVE, '        if c.bootstrap.method == "none":\n', "        if False:\n", f"{CONFIG} -k 'resolve or does_not_fit'"),
    ("resolve: nothing inside the data, by whatever name", RESOLVE, "    problems += inside_data(msgspec.to_builtins(c), os.path.realpath)", "    pass", f"{CONFIG} -k leads_inside"),
    ("resolve: each of PostgreSQL's programs", RESOLVE, 'for program in ("postgres", "pg_ctl", "pg_controldata")', 'for program in ("postgres",)', f"{CONFIG} -k 'resolve or does_not_fit'"),
    ("resolve: PostgreSQL of the data's version", RESOLVE, '        and wanted in {"", p.parent.name}\n', "", "tests/config/test_strictness.py -k right_major"),
    ("resolve: Debian's file that names this data", RESOLVE, "if named and Path(named[-1]).resolve() == Path(data_dir).resolve():", "if named:", f"{CONFIG} -k 'debian or another_datas'"),
    ("resolve: an agent that is root is told", RESOLVE, "if c.agent.user is None and os.geteuid() == 0:", "if False:", f"{CONFIG} -k does_not_fit"),
    # the fencer's watchdog, its files, its room
    ("device: petted to the lease's end only", f"{FENCER}/watchdog.py", "now_ns < lease_deadline_ns", "now_ns <= lease_deadline_ns", WATCHDOG),
    ("device: not petted while it could write", f"{FENCER}/watchdog.py", "return not could_write or", "return could_write or", WATCHDOG),
    ("device: no longer than asked for", f"{FENCER}/watchdog.py", "        if in_force_s > timeout_s:\n", "        if False:\n", WATCHDOG),
    ("device: one that only rings", f"{FENCER}/watchdog.py", "if options & WDIOF_ALARMONLY:", "if False:", WATCHDOG),
    ("device: one that our death would stop", f"{FENCER}/watchdog.py", "if not options & WDIOF_MAGICCLOSE:", "if False:", WATCHDOG),
    ("device: an earlier holder's magic close", f"{FENCER}/watchdog.py", '            os.write(fd, b"\\0")\n', "            pass\n", WATCHDOG),
    ("device: what cannot be disarmed is petted on", f"{FENCER}/watchdog.py", "        except OSError:\n            return False\n        os.close(self._fd)", "        except OSError:\n            pass\n        os.close(self._fd)", WATCHDOG),
    ("device: refused before it is opened", f"{FENCER}/watchdog.py", "        if timeout_s < 1:", "        if False:", WATCHDOG),
    ("device: refused and stopped again", f"{FENCER}/watchdog.py", "            if self.disarm():\n                raise\n", "            raise\n", WATCHDOG),
    ("files: no latecomer renames", f"{FENCER}/files.py", "            if number != self._number:", "            if False:", FILES),
    ("files: a disk that hangs is named", f"{FENCER}/files.py", "self._lock.acquire(timeout=BUSY_S)", "self._lock.acquire(timeout=60)", FILES),
    ("files: written as the owner", f"{FENCER}/files.py", "with as_user(None if own else self._ids):", "with as_user(None):", FILES),
    ("files: root again afterwards", f"{FENCER}/files.py", "        _libc.setfsuid(os.geteuid())\n", "        pass\n", FILES),
    ("files: a symlink put in their place", f"{FENCER}/files.py", "        temporary.unlink(missing_ok=True)\n        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)", "        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, mode)", FILES),
    ("files: their mode whatever the umask", f"{FENCER}/files.py", "            os.fchmod(fd, mode)\n", "", FILES),
    ("files: fsync before the rename", f"{FENCER}/files.py", "            disk.fsync(fd)\n", "", FILES),
    ("room: a copy that does not fit is not begun", f"{FENCER}/places.py", "    if free_kb < wanted_kb:\n", "    if False:\n", ROOM),
    ("room: what is to be kept free", f"{FENCER}/places.py", " + keep_free_mb * 1024", "", ROOM),
    ("room: what is done already counts", f"{FENCER}/places.py", "total_kb - done_kb", "total_kb", ROOM),
    ("room: a link that leads nowhere is there", f"{FENCER}/places.py", "path.exists() or path.is_symlink()", "path.exists()", ROOM),
    ("realtime: a run_dir on a disk is told", f"{FENCER}/realtime.py", "return [] if kind in IN_MEMORY else", "return [] if True else", ROOM),
    ("realtime: one in memory is not", f"{FENCER}/realtime.py", 'IN_MEMORY = {"tmpfs", "ramfs"}', "IN_MEMORY = set[str]()", ROOM),
    ("realtime: children are ordinary", f"{FENCER}/realtime.py", 'prefix += ["chrt", "--other", "0"]', "pass", ROOM),
]  # fmt: skip
