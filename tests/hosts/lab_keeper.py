"""Keeps a lab's namespaces, cgroups, disks and folder, and removes them all when the process that wanted them is gone.

Started in mount and IPC namespaces of its own with one JSON argument: {"base", "cgroup", "parent", "disks": {name:
megabytes}, "hosts": {name: address}}. It answers with one line of JSON, {"switch": pid, "hosts": {name: pid}}:
processes that hold a network namespace each. The end of standard input, or of the parent, ends it all: also when that
was SIGKILLed.

It refuses to know anything about what runs in the hosts, and touches no process outside the lab's cgroup.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from tests.hosts.keeper import mount, remove_cgroup

HOLD = ["sh", "-c", "echo && exec sleep infinity"]


def run(argv: list[str], stdin: str = "") -> None:
    """A program to its end, with its words in the error."""
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(argv)}: {done.stderr.strip()}")


def hold() -> int:
    """A process in a new network namespace, which lasts as long as this one; returns its pid."""
    argv = ["unshare", "--net", "setpriv", "--pdeathsig", "KILL", *HOLD]
    holder = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    if not holder.stdout.readline():
        raise SystemExit("no network namespace could be made")
    holder.returncode = 0  # killed and reaped in main, not by subprocess
    return holder.pid


def in_net(pid: int, batch: str) -> None:
    """ip(8) commands in a namespace."""
    run(["nsenter", "-t", str(pid), "-n", "ip", "-batch", "-"], batch)


def make_network(hosts: dict[str, str]) -> tuple[int, dict[str, int]]:
    """A switch (a bridge in a namespace of its own) and the hosts on it, each by a cable p-NAME to its eth0."""
    switch = hold()
    in_net(switch, "link add br0 type bridge\nlink set br0 up\n")
    held = {name: hold() for name in hosts}
    for name, pid in held.items():
        cable = f"link add p-{name} type veth peer name eth0 netns {pid}\nlink set p-{name} master br0 up\n"
        in_net(switch, cable)
        address = f"addr add {hosts[name]}/24 dev eth0\n"
        in_net(pid, f"link set lo up\n{address}link set eth0 up\n")
    return switch, held


def make_disk(base: Path, name: str, megabytes: int) -> None:
    """A file system of the host's own at base/NAME/disk: fsfreeze makes it hang as a broken disk does."""
    image = base / f"{name}.img"
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", str(image)])
    disk = base / name / "disk"
    disk.mkdir()
    mount("-o", "loop", str(image), str(disk))
    (disk / "lost+found").rmdir()


def main() -> None:
    """Make everything, say so, wait, and leave nothing."""
    asked = json.loads(sys.argv[1])
    base, cgroup = Path(asked["base"]), Path(asked["cgroup"])
    watched = os.pidfd_open(asked["parent"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    cgroup.mkdir()
    held: list[int] = []
    # A killed PostgreSQL leaves its shared memory: ours goes with our namespaces (System V's, too).
    mount("-t", "tmpfs", "-o", "mode=1777", "harmony-lab", "/dev/shm")  # noqa: S108
    try:
        for name in (*asked["hosts"], "outside"):
            (cgroup / name).mkdir()
            (base / name).mkdir()
            (base / name).chmod(0o755)
        for name, megabytes in asked["disks"].items():
            make_disk(base, name, megabytes)
        switch, hosts = make_network(asked["hosts"])
        held = [switch, *hosts.values()]
        print(json.dumps({"switch": switch, "hosts": hosts}), flush=True)
        if os.getppid() == asked["parent"]:
            select.select([0, watched], [], [])
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        disks = [base / name / "disk" for name in asked["disks"] if os.path.ismount(base / name / "disk")]
        for disk in disks:  # who waits for a frozen disk cannot be killed
            subprocess.run(["fsfreeze", "--unfreeze", str(disk)], capture_output=True, check=False)
        remove_cgroup(cgroup, None)
        for disk in disks:
            subprocess.run(["umount", str(disk)], capture_output=True, check=False)
        for pid in held:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if not any(os.path.ismount(disk) for disk in disks):
            shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
