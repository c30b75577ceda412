"""Breaks one safety rule at a time in a copy of the tree and shows which tests notice.

python bench/mutate.py        (exit code 1: a broken rule that no test noticed)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

TOP = Path(__file__).parents[1]
FENCER, CORE = "fencer/harmony_fencer", "harmony/core"
# rule, file, what stands there, what is put there instead, the tests that should notice
RULES = [
    ("lease: the guard", f"{FENCER}/fencer.py", 'await self._fence_by_itself("the lease is over")',
     "self._drop_lease()", "tests/fencer/test_process.py -k end_of_the_lease"),
    ("lease: activate's deadline", f"{FENCER}/admit.py",
     "if isinstance(r, Activate) and r.deadline_boottime_ns <= now_ns:", "if False:", "tests/fencer/test_admit.py"),
    ("lease: never revived", f"{FENCER}/admit.py", "if now_ns >= f.lease_deadline_ns:", "if False:",
     "tests/fencer/test_admit.py"),
    ("generation: stale orders", f"{FENCER}/admit.py", "if g <= f.highest:", "if False:",
     "tests/fencer/test_admit.py"),
    ("generation: renewals", f"{FENCER}/admit.py", "if f.active is None or r.generation != f.active:",
     "if f.active is None:", "tests/fencer/test_admit.py"),
    ("generation: checksum of the state", f"{FENCER}/state.py", "if not right:", "if False:",
     "tests/fencer/test_durable.py"),
    ("compare-and-set: nats", "harmony/store/nats.py",
     'headers = {"Nats-Expected-Last-Subject-Sequence": str(revision)}', "headers = None",
     "tests/store/test_contract.py"),
    ("compare-and-set: lost is fatal", f"{CORE}/table.py", 'lambda o: o.lost or o.leads != "me",',
     "lambda o: False,", "tests/core"),
    ("two clocks: the store's", f"{CORE}/view.py", "return by_store and by_boot", "return by_boot", "tests/core"),
    ("two clocks: our own", f"{CORE}/view.py", "return by_store and by_boot", "return by_store", "tests/core"),
    ("two clocks: pauses", f"{CORE}/node.py", "if v.last_step_ns and now_ns", "if False and now_ns", "tests/core"),
    ("send time", f"{CORE}/register.py", "Acked(ours.sent_ns, revision)", "Acked(now_ns, revision)", "tests/core"),
    ("proof: processes and port", f"{FENCER}/ladder.py", "if not proven:", "if False:",
     "tests/fencer/test_process.py -k listens"),
    ("proof: Failed waits for it", f"{CORE}/view.py", "fence_proven=f is not None",
     "fence_proven=True or f is not None", "tests/sim tests/core"),
    ("proof: orphans", f"{FENCER}/processes.py", "if (cwd.st_dev, cwd.st_ino) == identity:", "if False:",
     "tests/fencer/test_process.py -k orphaned"),
    ("a fence lasts", f"{FENCER}/postgres.py", 'self._write("standby.signal", "")', "pass",
     "tests/fencer/test_process.py -k by_hand"),
    ("final positions", f"{CORE}/candidate.py", "m.seen_revision == revision and m.silent_ns >= settle_ns",
     "True", "tests/core"),
    ("quorum of voters", f"{CORE}/candidate.py", "if len(heard) < needed:", "if False:", "tests/core"),
    ("inequality", f"{CORE}/timing.py", "if self.failover_ns > self.lease_ns + self.fence_ns + self.margin_ns:",
     "if True:", "tests/core tests/config"),
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


def main() -> None:
    survivors = []
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
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
            python = environment(Path(name) / "venv", folder)
            binaries = Path(sys.executable).parent
            env = os.environ | {"SEEDS": "160", "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
            argv = [str(python), "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split(" ")]
            done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, check=False)
        failed = [line.split(" ")[1] for line in done.stdout.splitlines() if line.startswith("FAILED")]
        noticed = failed[0] if done.returncode == 1 and failed else "NOBODY"
        if noticed == "NOBODY":
            survivors.append(rule)
        print(f"| {rule} | `{noticed}` |", flush=True)
    if survivors:
        raise SystemExit(f"not noticed: {', '.join(survivors)}")


if __name__ == "__main__":
    main()
