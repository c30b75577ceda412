"""Keeps one test host's disk, cgroup and container, and removes all three when the test that wanted them is gone.

A process of its own, in a mount namespace of its own (`unshare --mount --propagation private`), started with one
JSON argument: {"base", "cgroup", "shadow", "like", "parent", "nspawn"}. Each line on standard input boots the
container (again); the answer is `started PID`. The end of standard input, or of the parent, ends it all: so it works
for a test process that was SIGKILLed, too.

It refuses to know anything about what runs in the host, and touches no process outside its cgroup. It runs by
itself, without the package: only the standard library.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

GONE_TIMEOUT_S = 20.0


def mount(*arguments: str) -> None:
    """mount(8), with its words in the error."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"mount {' '.join(arguments)}: {done.stderr.strip()}")


def make_disk(base: Path, like: str | None) -> None:
    """This machine's root, with a writable layer (empty, or a copy of `like`) over it, at base/disk/root."""
    disk = base / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "mode=0755", "harmony-host", str(disk))
    for name in ("upper", "work", "root"):
        (disk / name).mkdir()
    if like is not None:
        subprocess.run(["cp", "--archive", f"{like}/.", str(disk / "upper")], check=True)
    layers = f"lowerdir=/,upperdir={disk}/upper,workdir={disk}/work"
    mount("-t", "overlay", "-o", layers, "harmony-host", str(disk / "root"))
    # nspawn leaves locks and a propagation directory there: here they vanish with this namespace.
    Path("/run/systemd").mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", "mode=0755", "harmony-host", "/run/systemd")


def boot(base: Path, cgroup: Path, argv: list[str]) -> int:
    """Start the container's manager in the host's cgroup; it dies with this process. Returns its pid."""
    join = 'echo $$ > "$0/cgroup.procs" && exec setpriv --pdeathsig KILL "$@"'
    with (base / "console.log").open("ab") as console:
        manager = subprocess.Popen(
            ["sh", "-c", join, str(cgroup), *argv],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
                "NOTIFY_SOCKET": str(base / "notify"),
            },
        )
    manager.returncode = 0  # reaped in `reap`, not by subprocess
    return manager.pid


def reap() -> None:
    """Collect the managers that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def remove_cgroup(cgroup: Path, shadow: Path | None) -> None:
    """Kill everything in it until it is empty, then remove it with all below it.

    `shadow` is the cgroup of the same name that nspawn makes in a hybrid machine's v1 hierarchy.
    """
    deadline = time.monotonic() + GONE_TIMEOUT_S
    while cgroup.exists() and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            (cgroup / "cgroup.kill").write_text("1")
            with (cgroup / "cgroup.events").open() as events:
                poller = select.poll()
                poller.register(events, select.POLLPRI)
                while "populated 0" not in events.read() and time.monotonic() < deadline:
                    poller.poll(100)
                    events.seek(0)
        for top in (cgroup, *([shadow] if shadow else [])):
            for folder, _folders, _files in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()


def serve(base: Path, cgroup: Path, parent: int, argv: list[str]) -> None:
    """Boot at each line, until input or parent end."""
    watched = os.pidfd_open(parent)
    if os.getppid() != parent:
        return
    while True:
        ready, _, _ = select.select([0, watched], [], [])
        if watched in ready or not os.read(0, 4096):
            return
        reap()
        print(f"started {boot(base, cgroup, argv)}", flush=True)


def main() -> None:
    """Make the disk, say `ready`, serve, and leave nothing."""
    asked = json.loads(sys.argv[1])
    base, cgroup = Path(asked["base"]), Path(asked["cgroup"])
    shadow = Path(asked["shadow"]) if asked["shadow"] else None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    cgroup.mkdir()
    try:
        make_disk(base, asked["like"])
        print("ready", flush=True)
        serve(base, cgroup, asked["parent"], asked["nspawn"])
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        remove_cgroup(cgroup, shadow)
        disk = base / "disk"
        subprocess.run(["umount", "--recursive", "--lazy", str(disk)], capture_output=True, check=False)
        if not os.path.ismount(disk):
            shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
