"""Breaks one safety rule at a time in a copy of the tree and shows which tests notice.

    python bench/mutate.py            each rule below
    python bench/mutate.py WORD       those whose name has the word in it
    python bench/mutate.py rows       each row of the table taken away

Exit code 1: a broken rule that no test noticed. docs/mutation.md holds what it printed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench import field_rules
from harmony.core.table import TABLE

TOP = Path(__file__).parents[1]
FENCER, CORE = "fencer/harmony_fencer", "harmony/core"
MODEL, STORIES = "tests/fencer/test_model.py", "tests/fencer/test_model.py -k 'not Interleaving'"
CRASH = "tests/fencer/test_crash.py"
# rule, file, what stands there, what is put there instead, the tests that should notice
RULES = [
    ("lease: the guard", f"{FENCER}/guard.py", 'await fencer.fence_by_itself("the lease is over")',
     "fencer._drop_lease()", "tests/fencer/test_process.py -k end_of_the_lease"),
    ("lease: activate's deadline", f"{FENCER}/admit.py",
     "if isinstance(r, Activate) and r.deadline_boottime_ns <= now_ns:", "if False:", "tests/fencer/test_admit.py"),
    ("lease: never revived", f"{FENCER}/admit.py", "if now_ns >= f.lease_deadline_ns:", "if False:",
     "tests/fencer/test_admit.py"),
    ("generation: stale orders", f"{FENCER}/admit.py", "if g <= f.highest:", "if False:",
     "tests/fencer/test_admit.py"),
    ("generation: renewals", f"{FENCER}/admit.py", "r.generation != f.active or f.active != f.highest",
     "False", "tests/fencer/test_admit.py"),
    ("generation: checksum of the state", f"{FENCER}/durable.py", "if not right:", "if False:",
     "tests/fencer/test_durable.py"),
    ("compare-and-set: nats", "harmony/store/nats.py",
     'headers = {"Nats-Expected-Last-Subject-Sequence": str(revision)}', "headers = None",
     "tests/store/test_contract.py"),
    ("compare-and-set: lost is fatal", f"{CORE}/table.py", 'lambda o: o.lost or o.leads != "me",',
     "lambda o: False,", "tests/core"),
    ("two clocks: the store's", f"{CORE}/observe.py", "return by_store and by_boot", "return by_boot", "tests/core"),
    ("two clocks: our own", f"{CORE}/observe.py", "return by_store and by_boot", "return by_store", "tests/core"),
    ("two clocks: pauses", f"{CORE}/node.py", "if v.last_step_ns and now_ns", "if False and now_ns", "tests/core"),
    ("send time", f"{CORE}/register.py", "Acked(ours.sent_ns, revision", "Acked(now_ns, revision", "tests/core"),
    ("proof: processes and port", f"{FENCER}/ladder.py", "if gone and not self._listening():",
     "if True:",
     "tests/fencer/test_process.py -k listens"),
    ("proof: Failed waits for it", f"{CORE}/observe.py", "fence_proven=f is not None",
     "fence_proven=True or f is not None", "tests/sim tests/core"),
    ("proof: orphans", f"{FENCER}/processes.py", "if (there.st_dev, there.st_ino) in wanted.places:",
     "if False:",
     "tests/fencer/test_process.py -k orphaned"),
    ("a fence lasts", f"{FENCER}/postgres.py", 'change.write(self.data / "standby.signal", b"")', "pass",
     "tests/fencer/test_process.py -k by_hand"),
    ("final positions", f"{CORE}/candidate.py", "m.seen_revision == revision and m.silent_ns >= settle_ns",
     "True", "tests/core"),
    ("orders: one number, one order", f"{CORE}/node.py",
     "if o is not None and untaken and (o.op, o.primary, o.clean, o.slot) == (op, primary, clean, slot):", "if o is not None and untaken:", "tests/core"),
    ("orders: a refused number is used up", f"{CORE}/node.py", "o is not None and not o.refused and f is not None",
     "o is not None and f is not None", "tests/core"),
    ("orders: sent again under their number", f"{CORE}/node.py",
     "        return o.generation\n    return (term, order + 1)", "        pass\n    return (term, order + 1)", "tests/core"),
    ("orders: who follows another node is no standby yet", f"{CORE}/node.py", "following == primary is not None", "True",
     "tests/core/test_slots.py"),
    ("orders: who follows nobody is none either", f"{CORE}/node.py", "following == primary is not None",
     "following == primary", "tests/core/test_slots.py"),
    ("store: founding with the data that was accepted", f"{CORE}/observe.py", "f.system_identifier == v.may_found",
     "True", "tests/core/test_distrust.py"),
    ("timelines: each promotion its own", f"{CORE}/node.py", "v = replace(v, reserved=0)  # for this", "pass  # for this",
     "tests/core"),
    ("timelines: never one that was reserved", f"{CORE}/view.py", "known += [c.reserved, c.timeline]",
     "known += [c.timeline]", "tests/core"),
    ("timelines: reserved when acknowledged", f"{CORE}/observe.py", "reserved=v.reserved > 0", "reserved=True",
     "tests/core"),
    ("timelines: also in an old term", f"{CORE}/node.py", "if _needs_timeline(v) else 0", "* 0",
     "tests/core"),
    ("timelines: the fencer begins the reserved one", f"{FENCER}/postgres.py", "        if reserved:\n", "        if False:\n",
     "tests/fencer/test_timelines.py"),
    ("timelines: given back before a start", f"{FENCER}/postgres.py", "lambda _: timelines.give_back(", "lambda _: str(",
     "tests/fencer/test_timelines.py"),
    ("quorum of voters", f"{CORE}/candidate.py", "if len(heard) < needed:", "if False:", "tests/core"),
    ("sync: the recorded rule is implied first", f"{CORE}/sync.py", "if not implies(reached, recorded):", "if False:",
     "tests/core/test_sync.py"),
    ("sync: a higher count by way of HOLD", f"{CORE}/sync.py", "raises = goal.count > worst.count", "raises = False",
     "tests/core/test_sync.py"),
    ("sync: the voters have caught up", f"{CORE}/sync.py", "if have >= target.count else None", "", "tests/core/test_sync.py"),
    ("sync: in force before it is recorded", f"{CORE}/sync.py", "if not ruling.in_force or", "if", "tests/core/test_sync.py"),
    ("sync: the mixture is what may be in force", f"{CORE}/ruling.py", "mixed(r.worst, rule)", "rule", "tests/core"),
    ("sync: the session has loaded it", f"{CORE}/ruling.py", "if e.names != names(r.told) or", "if", "tests/core/test_sync.py"),
    ("sync: nobody else is a voter", f"{CORE}/ruling.py", "not voting <= set(r.told.voters)", "False", "tests/core/test_sync.py"),
    ("sync: a commit was seen to wait", f"{CORE}/ruling.py", "and not e.waiting", "and False", "tests/core/test_sync.py"),
    ("sync: an answer of after it was told", f"{CORE}/ruling.py", "or e.asked_ns <= r.taken_ns", "", "tests/core/test_sync.py"),
    ("sync: nothing while a record is open", f"{CORE}/ruling.py", "or v.unsettled or", "or", "tests/core"),
    ("sync: an agent that begins looks first", f"{CORE}/ruling.py", "if not r.sure:\n        return v", "if False:\n        return v", "tests/core"),
    ("sync: a claim records no more than before", f"{CORE}/ruling.py", "min(c.sync_count, me.sync_count, len(others))", "me.sync_count", "tests/core"),
    ("sync: a claim counts on the last primary", f"{CORE}/ruling.py", "{*c.sync_voters, c.last_primary}", "set()", "tests/core"),
    ("sync: a founder is alone", f"{CORE}/ruling.py", "return Rule(0, tuple(sorted(others)))", "return Rule(me.sync_count, tuple(sorted(others)))", "tests/core"),
    ("sync: commits that waited for nobody", f"{CORE}/candidate.py", "if not cluster.sync_count:", "if False:", "tests/core"),
    ("sync: the record of the attempt that landed", f"{CORE}/fold.py", "if r.attempt == attempt", "if True", "tests/core"),
    ("sync: standbys hold", f"{FENCER}/settings.py", "if c.synchronous else", "if False else", "tests/fencer/test_sync.py"),
    ("sync: a rule that was held up", f"{FENCER}/admit.py", "if r.number < told.number:", "if False:", "tests/fencer/test_admit.py"),
    ("inequality", f"{CORE}/timing.py", "if self.failover_ns > self.lease_ns + self.stop_ns + self.margin_ns:",
     "if True:", "tests/core tests/config"),
    # the fencer's own rules: what the model and the crash tests notice
    ("order: the older effect is awaited", f"{FENCER}/effects.py", "            await ended.wait()",
     "            self._scope = None", STORIES),
    ("disk: a fence that overtakes a write is kept", f"{FENCER}/ledger.py",
     "new if self.state is before else change(self.state)", "new", "tests/fencer/test_crash.py -k overtakes"),
    ("disk: all of it, before it is trusted", f"{FENCER}/ledger.py", "if self.state is state and self.latch is latch:",
     "if True:", "tests/fencer/test_crash.py -k 'slow or latch_that'"),
    ("disk: the latch, too", f"{FENCER}/ledger.py", "if latch is not None and self.latch is latch:", "if False:",
     "tests/fencer/test_crash.py -k latch_that"),
    ("order: a fence halts before its disk", f"{FENCER}/fencer.py",
     "self._engine.halt()  # before anything else: writes end here, no disk is waited for", "pass", STORIES),
    ("order: a fence ends the lease", f"{FENCER}/fencer.py", "            case _:\n                self._drop_lease()",
     "            case _:", STORIES),
    ("order: a follow stops what could write", f"{FENCER}/standby.py",
     "        if self._unsafe():\n            await self._stop(clean_until_ns)\n", "", STORIES),
    ("order: a repeat starts nothing", f"{FENCER}/admit.py", "return Repeat(f.newest)",
     "return NewOrder(op, g, primary)", STORIES),
    ("order: one number, one order", f"{FENCER}/admit.py", "if (f.newest.op, f.newest.primary) == (op, primary):",
     "if True:", STORIES),
    ("order: equal is not greater", f"{FENCER}/admit.py", "if g <= f.highest:", "if g < f.highest:", STORIES),
    ("order: latched", f"{FENCER}/admit.py", '        if f.latched:\n            return Refusal("latched"',
     '        if False:\n            return Refusal("latched"', "tests/fencer/test_admit.py"),
    ("own fence: halts first", f"{FENCER}/fencer.py",
     "        if not clean:\n            self._engine.halt()\n", "        if not clean:\n", STORIES),
    ("own fence: yields to a newer order", f"{FENCER}/fencer.py",
     "if self._effects.busy or (self._active is not None and not clean):", "if False:", STORIES),
    ("own fence: until proven", f"{FENCER}/fencer.py", "            await trio.sleep(0.1)", "            return",
     STORIES),
    ("own fence: stray primaries", f"{FENCER}/guard.py",
     "if unguarded and engine.could_write() and not fencer.adopting:", "if False:", STORIES),
    ("own fence: a primary hidden by standby.signal", f"{FENCER}/postgres.py",
     "return not self.is_standby() or self._runs_as_primary()", "return not self.is_standby()",
     "tests/fencer/test_completeness.py -k behind_its_mark"),
    ("lease: clamped", f"{FENCER}/fencer.py",
     "leases.clamp(request.deadline_boottime_ns, now_ns, self._c.lease_ns)", "request.deadline_boottime_ns", STORIES),
    ("lease: of the newest activate only", f"{FENCER}/ledger.py",
     "and lease.generation == order.generation == self.state.highest", "and True", STORIES),
    ("lease: no time without one", f"{FENCER}/fencer.py",
     "if self._active is not None or not self.could_write:", "if True:", STORIES),
    ("start: an interrupted promotion", f"{FENCER}/fencer.py",
     '(order.op == "activate" or order.state != "done")', '(order.op == "activate")', STORIES),
    ("start: writable without a lease", f"{FENCER}/fencer.py",
     "elif pids and (self.could_write or not self._running or await self._engine.in_production()):", "elif False:",
     STORIES),
    ("end: nothing may write any more", f"{FENCER}/fencer.py",
     "while self._active or (look(self._engine)[0] and self.could_write and not self.adopting):", "while False:", STORIES),
    ("disk: durable before it acts", f"{FENCER}/ledger.py", "            await self.persist(newest, patience)",
     "            self.state = newest(self.state)", STORIES),
    ("disk: memory never ahead", f"{FENCER}/ledger.py", "                new = change(before)\n",
     "                new = self.state = change(before)\n", MODEL),
    ("disk: a fence that it did not take", f"{FENCER}/ledger.py", "        self.testify()\n", "        pass\n",
     STORIES),
    ("disk: told when durable", f"{FENCER}/fencer.py", "        try:\n            await self._ledger.persist(ended)",
     "        self._order = record\n        try:\n            await self._ledger.persist(ended)", STORIES),
    ("disk: one writer at a time", f"{FENCER}/ledger.py", "trio.CapacityLimiter(1)", "trio.CapacityLimiter(9)",
     f"{CRASH} -k abandoned"),
    ("disk: fsync of the file", f"{FENCER}/durable.py", "        disk.fsync(fd)\n", "", f"{CRASH} -k power"),
    ("disk: fsync of the folder", f"{FENCER}/durable.py",
     "    disk.rename(temporary, path)\n    disk.sync_folder(path.parent)\n", "    disk.rename(temporary, path)\n",
     f"{CRASH} -k power"),
    ("disk: replaced whole", f"{FENCER}/durable.py", 'temporary = path.with_name(path.name + ".new")',
     "temporary = path", f"{CRASH} -k instruction"),
    ("disk: the lease replaced whole", f"{FENCER}/lease.py", 'temporary = path.with_suffix(".new")',
     "temporary = path", f"{CRASH} -k instruction"),
    ("disk: an older copy", f"{FENCER}/state.py", "    if ours:\n", "    if False:\n", f"{CRASH} -k trusted"),
    ("disk: a latch that cannot be read", f"{FENCER}/state.py",
     '        return Latch(f"{path} cannot be read', '        return None if e else Latch(f"{path} cannot be read',
     f"{CRASH} -k damaged_latch"),
    # admission, check by check
    ("admission: who may ask what", f"{FENCER}/admit.py", "if peer not in PERMITTED[type(request)]:", "if False:",
     "tests/fencer/test_admit.py"),
    ("admission: an unfence without a latch", f"{FENCER}/admit.py", "                if f.latched\n", "                if True\n",
     "tests/fencer/test_admit.py"),
    ("admission: retiring", f"{FENCER}/admit.py", "case _ if f.retiring:", "case _ if False:",
     "tests/fencer/test_admit.py"),
    ("admission: a renewal into the past", f"{FENCER}/admit.py",
     "    if r.deadline_boottime_ns <= now_ns:\n        return Refusal(\"lease_expired\", \"the deadline asked",
     "    if False:\n        return Refusal(\"lease_expired\", \"the deadline asked", "tests/fencer/test_admit.py"),
    ("admission: a renewal shortens nothing", f"{FENCER}/admit.py",
     "Extend(max(r.deadline_boottime_ns, f.lease_deadline_ns))", "Extend(r.deadline_boottime_ns)",
     "tests/fencer/test_admit.py"),
    ("admission: untrusted state", f"{FENCER}/admit.py", "if not f.trusted:", "if False:", "tests/fencer/test_admit.py"),
    ("admission: whom commits wait for", f"{FENCER}/admit.py",
     "if isinstance(r, Activate) and not set(r.sync.voters) <= f.members - {f.node}:", "if False:",
     "tests/fencer/test_admit.py"),
    ("admission: whom to follow", f"{FENCER}/admit.py",
     "        and (primary == f.node or primary not in f.members)\n", "        and False\n", "tests/fencer/test_admit.py"),
    # a rejoin, which destroys what only this node has
    ("rejoin: never of a leader", f"{FENCER}/admit.py",
     "if isinstance(r, Rejoin) and f.active is not None:", "if False:", "tests/fencer/test_admit.py"),
    ("rejoin: what is unfinished never leads", f"{FENCER}/admit.py",
     "if isinstance(r, Activate) and f.unfinished:", "if False:", "tests/fencer/test_admit.py"),
    ("rejoin: what is unfinished is never started", f"{FENCER}/postgres.py", "        if self.unfinished:\n",
     "        if False:\n", "tests/fencer/test_rejoin.py -k 'killed and stub'"),
    ("rejoin: what could write is stopped first", f"{FENCER}/standby.py",
     "        if self._unsafe():\n            await self._stop_for_good(clean_until_ns)\n", "", STORIES),
    ("rejoin: a stray primary is fenced meanwhile", f"{FENCER}/fencer.py",
     "return self._effects.busy and not self._standby.rejoining", "return self._effects.busy", STORIES),
    ("rejoin: alone", f"{FENCER}/rejoin.py", "        if self._base.pids():\n            raise Disturbed(",
     "        if False:\n            raise Disturbed(", "tests/fencer/test_rejoin.py -k from_below"),
    ("rejoin: of this cluster only", f"{FENCER}/rejoin.py", "            if found != system_identifier:\n",
     "            if False:\n", "tests/fencer/test_rejoin.py -k another_clusters"),
    ("rejoin: the old one is kept", f"{FENCER}/rejoin.py",
     "await self._change(lambda change: change.act(lambda: move(place, target)), parent=True)",
     "await self._remove(place)", "tests/fencer/test_rejoin.py -k without_the_wal"),
    ("rejoin: until the new one streams", f"{FENCER}/rejoin.py", "            while not streams(self._base.pids(), seen, trio.current_time()):\n",
     "            while False:\n", "tests/fencer/test_rejoin.py -k until_the_new"),
    ("rejoin: no copy in vain", f"{FENCER}/rejoin.py",
     "(turned_away := reasons.not_let_in(where))", "(turned_away := \"\")",
     "tests/fencer/test_turned_away.py -k 'slot or right'"),
    ("rejoin: what is certain is not waited for", f"{CORE}/rejoin.py",
     "0 < c.begins < db.replayed_lsn", "False", "tests/core"),
    ("rejoin: by what was replayed beyond the fork alone", f"{CORE}/rejoin.py",
     "0 < c.begins < db.replayed_lsn", "0 < c.begins <= db.replayed_lsn", "tests/core"),
    ("rejoin: a fork that is not known proves nothing", f"{CORE}/rejoin.py",
     "0 < c.begins < db.replayed_lsn", "c.begins < db.replayed_lsn", "tests/core"),
    ("rejoin: a fork of the timeline that it is about", f"{CORE}/node.py",
     "c.begins if c.timeline == timeline else 0", "c.begins", "tests/core"),
    ("rejoin: a fork of this timeline only, of the fencer's", f"{CORE}/node.py",
     "f.begins if f.timeline == timeline and f.begins else", "f.begins if f.begins else", "tests/core"),
    ("rejoin: only to who has a checkpoint on its timeline", f"{CORE}/rejoin.py", "        and not waits(v)\n", "",
     "tests/core/test_rejoin.py"),
    ("rejoin: a copy into nothing waits for no checkpoint", f"{CORE}/rejoin.py", "f is None or f.empty or source", "f is None or source",
     "tests/core/test_rejoin.py"),
    ("rejoin: the checkpoint is hurried", f"{CORE}/node.py", 'commands.append(Checkpoint("a rewind"))', "pass",
     "tests/core/test_handover.py"),
    ("rejoin: for who waits alone", f"{CORE}/node.py", "if not any(m.unable and", "if not any(True and",
     "tests/core/test_handover.py"),
    ("rejoin: what does not start is noticed first", f"{FENCER}/wal.py", "int(reached) >= newest", "True",
     "tests/fencer/test_rejoin.py -k without_a_checkpoint"),
    ("rejoin: who waits for a checkpoint is told of", f"{CORE}/node.py", 'unable=rejoin.unable(v, me, now_ns) != "",', "",
     "tests/core/test_rejoin.py"),
    ("rejoin: the probe tells the checkpoint", "harmony/agent/probe.py", "early=bool(early),", "",
     "tests/demo/test_comeback.py -k once_the_new_primary"),
    ("fence: one look that finds nobody is enough", f"{FENCER}/ladder.py", "gone = await self._kill()\n",
     "await self._kill()\n                gone = self._tree.gone()\n",
     "tests/fencer/test_completeness.py -k again_and_again"),
    ("slots: a dead standby leaves its own soon", f"{FENCER}/settings.py", "conninfo(c, source.primary) + _until_dead(c)",
     "conninfo(c, source.primary)", "tests/fencer/test_settings.py"),
    ("rejoin: only from who is seen writing", f"{CORE}/rejoin.py", '        and source.db == "primary"\n', "",
     "tests/core"),
    ("rejoin: only by a fresh heartbeat", f"{CORE}/table.py",
     'return o.leads == "other" and not o.stale and o.unable', 'return o.leads == "other" and o.unable', "tests/core"),
    ("rejoin: in no older term", f"{CORE}/rejoin.py", "        and highest(v)[0] <= max(c.term, v.marks.overruled)\n", "",
     "tests/core"),
    ("rejoin: an older term that was given up", f"{CORE}/rejoin.py", "max(c.term, v.marks.overruled)", "c.term",
     "tests/core"),
    ("rejoin: at work in an older term that was given up", f"{CORE}/rejoin.py",
     "given_up = c.term < f.order[0] <= v.marks.overruled", "given_up = False", "tests/core"),
    ("rejoin: ends when another leads", f"{CORE}/rejoin.py",
     'another = v.order is not None and v.order.op == "rejoin" and v.order.primary != c.primary', "another = False", "tests/core"),
    ("rejoin: never while a heartbeat is overdue", f"{CORE}/rejoin.py",
     "        and now_ns - v.first_seen_ns <= t.interval_ns + t.timeout_ns\n", "", "tests/core"),
    ("store: what is given up is remembered", f"{CORE}/fold.py", "lineage, m.overruled)", "lineage)", "tests/core"),
    ("two clocks: an older answer is no clock that went back", f"{CORE}/fold.py",
     "crossed = e.revision < v.member_revision.get(me.node, 0)", "crossed = False", "tests/core"),
    ("two clocks: a clock that went back", f"{CORE}/fold.py",
     "crossed = e.revision < v.member_revision.get(me.node, 0)", "crossed = True", "tests/core"),
    ("store: an older answer that crossed nothing", f"{CORE}/fold.py", "e.asked_at <= e.revision < m.revision",
     "e.revision < m.revision", "tests/core"),
    ("store: an older answer that crossed a newer one", f"{CORE}/fold.py", "e.asked_at <= e.revision < m.revision",
     "False", "tests/core"),
    ("rejoin: by no distrusted store", f"{CORE}/rejoin.py", "        not distrust(v)\n", "        True\n",
     "tests/core"),
    ("rejoin: what is unfinished is no standby", f"{CORE}/view.py",
     "(v.fencer.unfinished or rejoining(v))", "rejoining(v)", "tests/core"),
    ("rejoin: what recovers for it is no standby", f"{CORE}/view.py",
     "(v.fencer.unfinished or rejoining(v))", "v.fencer.unfinished", "tests/core"),
    ("rejoin: ends when its primary leads no more", f"{CORE}/rejoin.py",
     "    if c is None or f is None or f.order is None or not rejoining(v):\n", "    if True:\n", "tests/core"),
    ("rejoin: a pause that doubles", f"{CORE}/rejoin.py", "REJOIN_PAUSE_NS * 2 ** min(v.rejoins, 20)",
     "REJOIN_PAUSE_NS", "tests/core"),
    ("rejoin: a start in vain is not repeated for ever", f"{CORE}/rejoin.py",
     "FOLLOW_PAUSE_NS << min(v.follows - 1, FOLLOW_PAUSES)", "0", "tests/core"),
    # adoption and founding
    ("adoption: nobody takes over from what has no lease", f"{CORE}/observe.py",
     "if v.cluster is not None and v.cluster.adopting:", "if False:", "tests/core"),
    ("adoption: until the synchronous rule is shown", f"{CORE}/node.py",
     "adopting=c.adopting and v.state is State.ADOPTING,", "adopting=False,", "tests/core"),
    ("adoption: standbys first", f"{CORE}/observe.py", "if len(others) - len(missing) >= me.sync_count:",
     "if True:", "tests/core"),
    ("adoption: a permit of one postmaster", f"{FENCER}/adopt.py",
     "engine.postmaster() == self.pid and started(self.pid) == self.started", "True",
     "tests/fencer/test_adopt.py"),
    ("adoption: until the first order", f"{FENCER}/ledger.py", "new = self.state.highest == Generation(0, 0)",
     "new = True", "tests/fencer/test_adopt.py"),
    ("adoption: what a reload cannot bring in", f"{FENCER}/main.py", "if why := postgres.not_adoptable():",
     "if why := \"\":", "tests/fencer/test_adopt.py"),
    ("founding: not with a standby's data", f"{CORE}/observe.py", "if f is not None and f.was_standby and",
     "if False and", "tests/core"),
    ("founding: not beside others' data", f"{CORE}/observe.py", "for n, m in v.members.items() if m.system_identifier]",
     "for n, m in v.members.items() if False]", "tests/core"),
    ("bootstrap: what is no data directory is not touched", f"{FENCER}/bootstrap.py", "        return next(entries, None) is None\n",
     "        return True\n", "tests/fencer/test_bootstrap.py -k touched"),
    ("bootstrap: of this cluster only", f"{FENCER}/rejoin.py", "            if found != system:\n", "            if False:\n",
     "tests/fencer/test_bootstrap.py -k operators"),
    # the inequality, term by term
    ("inequality: interval", f"{CORE}/timing.py",
     "return self.heartbeat_interval_s + self.heartbeat_timeout_s", "return self.heartbeat_timeout_s", "tests/core"),
    ("inequality: timeout", f"{CORE}/timing.py",
     "self.heartbeat_interval_s + self.heartbeat_timeout_s * self.failure_threshold",
     "self.heartbeat_interval_s + self.failure_threshold", "tests/core"),
    ("inequality: threshold", f"{CORE}/timing.py", "self.heartbeat_timeout_s * self.failure_threshold\n",
     "self.heartbeat_timeout_s\n", "tests/core"),
    ("inequality: fence", f"{CORE}/timing.py", "max(self.fence_timeout_s, self.watchdog_timeout_s)",
     "self.watchdog_timeout_s", "tests/core"),
    ("inequality: watchdog", f"{CORE}/timing.py", "max(self.fence_timeout_s, self.watchdog_timeout_s)",
     "self.fence_timeout_s", "tests/core tests/config"),
    ("inequality: margin", f"{CORE}/timing.py", "self.lease_ns + self.stop_ns + self.margin_ns:",
     "self.lease_ns + self.stop_ns:", "tests/core"),
    ("inequality: settling waits for the stop", f"{CORE}/timing.py", "return self.lease_ns + self.stop_ns\n",
     "return self.lease_ns\n", "tests/core"),
    ("inequality: failover_timeout is awaited", f"{CORE}/observe.py",
     "by_boot = now_ns - v.silent_from_ns > t.failover_ns", "by_boot = now_ns - v.silent_from_ns > t.lease_ns",
     "tests/core"),
    ("inequality: no pause after a failed heartbeat", f"{CORE}/node.py",
     "(t.interval_ns if failures == 0 else t.timeout_ns)", "t.interval_ns + t.timeout_ns", "tests/core"),
    # what is believed of the store, and for how long
    ("silence: a new connection proves none", f"{CORE}/fold.py",
     "case Connected():\n            return replace(v, silent_from_ns=now_ns)", "case Connected():\n            return v",
     "tests/core"),
    ("silence: a failed look proves none", f"{CORE}/fold.py",
     "refreshing_until_ns=now_ns + register.RETRY_NS, silent_from_ns=now_ns)",
     "refreshing_until_ns=now_ns + register.RETRY_NS)", "tests/core"),
    ("silence: the store's clock went back", f"{CORE}/fold.py",
     "v = replace(v, silent_from_ns=now_ns)  # the store's clock went back", "pass", "tests/core"),
    ("distrust: the term went back", f"{CORE}/fold.py", "e.revision > m.revision and c.term < m.term:",
     "False:", "tests/core"),
    ("distrust: two histories", f"{CORE}/fold.py", "m.attempt and c.attempt != m.attempt:", "False:", "tests/core"),
    ("distrust: less than was seen", f"{CORE}/fold.py", "    if not v.went_back_ns:\n",
     "    if True:\n        return v\n    if not v.went_back_ns:\n", "tests/core"),
    ("distrust: a stream made anew", f"{CORE}/fold.py", "if known and e.lineage and known != e.lineage",
     "if False and known != e.lineage", "tests/core"),
    ("distrust: damaged memory", f"{CORE}/fold.py", "    if e.damage:\n", "    if False:\n", "tests/core"),
    ("distrust: kept on disk", f"{CORE}/node.py", "    commands.append(Remember(v.marks))\n", "", "tests/core"),
    ("distrust: bars promotion", f"{CORE}/observe.py", "    if distrust(v):\n        return f\"the store",
     "    if False:\n        return f\"the store", "tests/core"),
    # leading
    ("vacancy: only after the proof of the newest order", f"{CORE}/observe.py",
     "f.fence_proven and not f.postgres_up and f.highest >= highest(v)", "f.fence_proven and not f.postgres_up",
     "tests/core"),
    ("clean: only with the shutdown checkpoint", f"{CORE}/node.py",
     "clean = vacate and f.shutdown_lsn is not None", "clean = vacate", "tests/core"),
    ("hand-over: the successor confirms", f"{CORE}/observe.py",
     "said = c.successor == name and v.members[name].confirms == c.term", "said = True", "tests/core"),
    ("hand-over: and has caught up", f"{CORE}/observe.py", "return True, said and ready and not lag,", "return True, said and ready,",
     "tests/core"),
    ("hand-over: a checkpoint first", f"{CORE}/observe.py", "return True, said and ready and not lag,", "return True, said and not lag,",
     "tests/core"),
    ("hand-over: the named one first", f"{CORE}/candidate.py",
     "        if cluster.successor != me.node:\n", "        if False:\n", "tests/core"),
    ("anti-flap: more good heartbeats after each loss", f"{CORE}/observe.py",
     "t.success_threshold * 2 **", "t.success_threshold * 1 **", "tests/core"),
    ("anti-flap: who flaps leaves the place", f"{CORE}/observe.py", "flapping = losses(v, me, now_ns) > 1",
     "flapping = False", "tests/core"),
    ("anti-flap: who led says why it waits", f"{CORE}/observe.py", '    elif who == "me":\n',
     '    elif who == "nobody":\n', "tests/core"),
    ("anti-flap: too many changes stop", f"{CORE}/observe.py", "    if len(recent) < p.maximum_changes:\n",
     "    if True:\n", "tests/core"),
    ("order: an answer of the database before it counts not", f"{CORE}/fold.py",
     "if v.order is not None and e.asked_ns < v.order.sent_ns:", "if False:", "tests/core"),
    ("sickness: only after the patience", f"{CORE}/sickness.py", "(patience_ns > 0 and now_ns - since_ns >= patience_ns)",
     "True", "tests/core"),
    ("sickness: WAL that reaches another is progress", f"{CORE}/sickness.py",
     "busy = e.symptom in FLOWING and flowed > s.flowed", "busy = False", "tests/core"),
    ("sickness: but lets nobody in", f"{CORE}/sickness.py", "busy = e.symptom in FLOWING and flowed > s.flowed",
     "busy = flowed > s.flowed", "tests/core"),
    ("sickness: a pause proves nothing", f"{CORE}/node.py", "sick=sickness.not_running(v.sick, now_ns)", "sick=v.sick",
     "tests/core"),
    ("sickness: only for an heir", f"{CORE}/table.py", 'o.sick != "" and o.heir and', 'o.sick != "" and', "tests/core"),
    ("sickness: enough voters heard", f"{CORE}/observe.py", "len(heard) > len(c.sync_voters) - c.sync_count", "True",
     "tests/core"),
    ("sickness: a sick standby is barred", f"{CORE}/observe.py", "    if v.sick.ill:\n", "    if False:\n", "tests/core"),
    ("sickness: an error is an answer", "harmony/agent/health.py", ' or (s.greeting == "answered" and s.refused)', "",
     "tests/agent/test_health.py -k symptoms"),
    ("sickness: nobody waits, nothing stalls", "harmony/agent/health.py", "if same and vitals.wal_waiters else 0",
     "if same else 0", "tests/agent/test_health.py -k stall"),
    ("spent: in the kernel", f"{FENCER}/processes.py", 'state == "D" and bool(', "bool(", "tests/fencer/test_spent.py"),
    ("spent: killed", f"{FENCER}/processes.py", 'bool(int(fields["SigPnd"], 16) & kill)', "True",
     "tests/fencer/test_spent.py"),
    ("spent: of the newest order", f"{CORE}/observe.py", "        and f.spent\n        and f.active is None\n        and f.highest >= highest(v)",
     "        and f.spent", "tests/core"),
    ("budget: then it is handed over", f"{CORE}/sickness.py", "not waited_for and within_budget(v, me, now_ns)",
     "not waited_for", "tests/core"),
    ("sickness: a wait that ends is none", "harmony/agent/health.py", "since_ns if then == now else now_ns", "since_ns",
     "tests/agent/test_health.py -k slept_in_between"),
    ("sickness: an error ends no symptom", f"{CORE}/sickness.py", "    if e.blind:\n", "    if False:\n", "tests/core"),
    ("budget: not with a synchronous standby", f"{CORE}/sickness.py",
     "not waited_for and within_budget(v, me, now_ns)", "within_budget(v, me, now_ns)",
     "tests/core"),
    ("budget: what hangs after a restart is handed over", f"{CORE}/node.py",
     "v = replace(v, postgres_failed=True, restart=False)", "v = replace(v, postgres_failed=True)", "tests/core"),
    ("budget: a restart in place that fails is tried again", f"{CORE}/node.py", "RESTART_FAILED and o.restart_here",
     "RESTART_FAILED and False", "tests/core"),
    ("budget: a slow disk of the fencer is waited for", f"{CORE}/table.py", "(o.untrusted_long or not o.restart_here)",
     "True", "tests/core"),
    ("budget: a failed disk of the fencer is not", f"{CORE}/table.py", "(o.untrusted_long or not o.restart_here)",
     "not o.restart_here", "tests/core"),
    ("rejoin: a primary that recovers has not told what it has", f"{CORE}/rejoin.py", " and c.status in WRITABLE_STATES:",
     ":", "tests/core"),
    *field_rules.RULES,
]  # fmt: skip


def broken(folder: Path, file: str, was: str, now: str) -> None:
    path = folder / file
    text = path.read_text()
    if was not in text:
        raise SystemExit(f"{file}: {was!r} is not there any more: correct this script")
    path.write_text(text.replace(was, now))


def environment(folder: Path, tree: Path) -> Path:
    """A virtual environment that imports the broken copy, also in processes started with `python -I`."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    paths = [str(tree / p) for p in ("", "fencer", "supervisor")] + [sysconfig.get_path("purelib")]
    (site / "tree.pth").write_text("\n".join(paths) + "\n")
    return folder / "bin" / "python"


def noticed_by(python: Path, tree: Path, arguments: str, **variables: str) -> str:
    """The first test that fails; NOBODY."""
    binaries = Path(sys.executable).parent
    env = os.environ | {"SEEDS": "160", "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"} | variables
    argv = [str(python), "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(arguments)]
    done = subprocess.run(argv, cwd=tree, env=env, capture_output=True, text=True, check=False)
    failed = [line.split(" ")[1] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    if done.returncode not in {0, 1}:
        raise SystemExit(f"pytest {arguments} did not run:\n{done.stdout}{done.stderr}")
    return failed[0] if done.returncode == 1 and failed else "NOBODY"


def without_each_row() -> Iterator[tuple[str, str]]:
    """Rows of the table, and who notices that it is missing: their examples, which are left out, aside."""
    for row in TABLE:
        tests = "-p bench.broken_row tests/core --ignore tests/core/test_rows.py"
        name = f"{row.id} {row.state}: {row.condition}"
        noticed = noticed_by(Path(sys.executable), TOP, tests, BROKEN_ROW=str(row.id))
        if noticed == "NOBODY":
            tests = f"-p bench.broken_row tests/core/test_rows.py -k test_row[{row.id}]"
            noticed = noticed_by(Path(sys.executable), TOP, tests, BROKEN_ROW=str(row.id))
        yield name, noticed


def without_each_rule(wanted: str) -> Iterator[tuple[str, str]]:
    """The rules whose name contains `wanted`, and who notices."""
    for rule, file, was, now, tests in RULES:
        if wanted not in rule:
            continue
        with tempfile.TemporaryDirectory(prefix="mutate-") as name:
            folder = Path(name) / "tree"
            shutil.copytree(
                TOP, folder, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache")
            )
            Path(name).chmod(0o755)
            broken(folder, file, was, now)
            yield rule, noticed_by(environment(Path(name) / "venv", folder), folder, tests)


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    survivors = []
    for rule, noticed in without_each_row() if wanted == "rows" else without_each_rule(wanted):
        if noticed == "NOBODY":
            survivors.append(rule)
        print(f"| {rule} | `{noticed}` |", flush=True)
    if survivors:
        raise SystemExit(f"not noticed: {', '.join(survivors)}")


if __name__ == "__main__":
    main()
