"""The times that must fit into others, each broken on purpose (bench/mutate.py)."""

from __future__ import annotations

from bench.mutants.rule import FENCER, Rule

TIMES, CONFIG = "harmony/config_times.py", "harmony/config.py"
SUPERVISOR = "supervisor/harmony_supervisor"
FIT, PARTS = "tests/config/test_times.py", "tests/supervisor/test_parts.py"
SETTINGS = "tests/fencer/test_settings.py"

RULES: list[Rule] = [
    ("times: a hung agent's replacement fits into the lease", TIMES, "AGENT_HUNG_SHARE = 0.35", "AGENT_HUNG_SHARE = 1.5", FIT),
    ("times: a hung agent does not stay for a long lease", TIMES, "AGENT_HUNG_MOST_S = 3.0", "AGENT_HUNG_MOST_S = 30.0", FIT),
    ("times: the user's own timeout", TIMES, "    if timeout_s is None:\n        timeout_s = min(", "    if True:\n        timeout_s = min(", FIT),
    ("times: the user's own interval", TIMES, "if interval_s is None else interval_s), timeout_s", "), timeout_s", FIT),
    ("times: an agent is asked often enough", TIMES, "timeout_s / PINGS", "timeout_s", FIT),
    ("times: a timeout that is too long for the lease", TIMES, "if timeout_s > most_s + ROUNDING_S:", "if False:", FIT),
    ("times: one that just fits", TIMES, "if timeout_s > most_s + ROUNDING_S:", "if timeout_s > most_s:", FIT),
    ("times: one that kills the healthy", TIMES, "elif timeout_s < LEAST_HUNG_S:", "elif False:", FIT),
    ("times: pings that are too far apart", TIMES, "if interval_s is not None and interval_s >", "if False and interval_s >", FIT),
    ("times: a patience of less than a look", TIMES, "if patience_s is not None and patience_s <", "if False and patience_s <", FIT),
    ("times: a rejoin before it could connect anew", TIMES, "if after_s is not None and after_s <", "if False and after_s <", FIT),
    ("times: a lease in which nothing is replaced", TIMES, "if t.lease_s < LEAST_LEASE_S:", "if False:", FIT),
    ("times: a fence before a hang is noticed", TIMES, "if t.fence_timeout_s < LEAST_FENCE_S:", "if False:", FIT),
    ("times: what the unit allows", TIMES, "if takes_s > limit_s:", "if False:", FIT),
    ("times: both stops in a stop", TIMES, "t.lease_s + 2 * t.fence_timeout_s + STOPPING_S", "t.lease_s + STOPPING_S", FIT),
    ("times: a watchdog that does not wait for a replacement", TIMES, "if watchdog and t.watchdog_timeout_s < replaced_s:", "if False:", FIT),
    ("times: only where there is one", TIMES, "if watchdog and t.watchdog_timeout_s < replaced_s:", "if t.watchdog_timeout_s < replaced_s:", FIT),
    ("times: they are checked", CONFIG, "        problems += config_times.problems(timing, values)\n", "", FIT),
    ("times: what is no error is told", CONFIG, "        ignored += config_times.warnings(", "        config_times.warnings(", FIT),
    ("times: beside a broken inequality", CONFIG, "(preset {section.preset}): {violation}\")\n", "(preset {section.preset}): {violation}\")\n        return None\n", FIT),
    ("times: the supervisor's are the derived ones", "harmony/resolve.py", '"ping_timeout_s": ping_timeout_s,', '"ping_timeout_s": s.ping_timeout_s,', "tests/config/test_config.py -k test_resolve"),
    ("times: how often it pings, too", "harmony/resolve.py", '"ping_interval_s": ping_interval_s,', '"ping_interval_s": s.ping_interval_s,', "tests/config/test_config.py -k test_resolve"),
    ("times: a healthy fencer is not hung", f"{SUPERVISOR}/running.py", "FENCER_HUNG_LEAST_S = 0.25", "FENCER_HUNG_LEAST_S = 0.05", FIT),
    ("times: a hung fencer is looked at twice", f"{SUPERVISOR}/running.py", "FENCER_PING_SHARE = 0.515", "FENCER_PING_SHARE = 0.9", FIT),
    ("times: our own pause is no silence", f"{SUPERVISOR}/child.py", "return min(now, last_pong + overslept_s)", "return last_pong", f"{PARTS} -k pause_of_our_own"),
    ("times: nor a credit", f"{SUPERVISOR}/child.py", "return min(now, last_pong + overslept_s)", "return last_pong + overslept_s", f"{PARTS} -k pause_of_our_own"),
    ("times: that is looked at", f"{SUPERVISOR}/child.py", "self.last_pong = heard_at(self.last_pong, now, now - asleep - interval_s)", "pass", "tests/fencer/test_deadman.py -k stopped_supervisor"),
    ("times: an agent starts soon, also on a busy machine", f"{SUPERVISOR}/child.py", '                Path(f"/proc/{process.pid}/autogroup").write_text(str(AGENT_NICE))\n', "", f"{PARTS} -k favoured"),
    ("settings: a standby asks again soon", f"{FENCER}/settings.py", "settings = {_RETRY: _RETRY_AFTER}", "settings: dict[str, str] = {}", SETTINGS),
    ("settings: not where the user has said how soon", f"{FENCER}/settings.py", "for key, value in settings.items() if not _user_sets(c, key)}", "for key, value in settings.items()}", SETTINGS),
]  # fmt: skip
