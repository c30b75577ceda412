"""Harmony as a peer: from the wheel in a virtual environment, supervisor, agent and fencer as in production."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
from pathlib import Path

import tomli_w

from bench.ha.peer import DATABASES, PORT, Options, make_databases, stores
from harmony.core.timing import PRESETS
from harmony.demo.parts import Parts, run_as, version_of
from tests.hosts.harmony_host import wheel
from tests.hosts.host import HostError
from tests.hosts.lab import Lab, Light
from tests.hosts.processes import TOP, Process

HOME = TOP / "build" / "bench"
RUN = Path("/dev/shm/harmony")  # noqa: S108 (the lab's own tmpfs, as /run is a host's)
AGENT_USER = "nobody"
GUARDS = {"fencer": "harmony_fencer", "supervisor": "harmony-supervisor"}
# systemd/harmony.service: ExecStart, ExecStopPost, Restart=always, RestartPreventExitStatus=78.
UNIT = """
while :; do
    "$0/harmony-supervisor" --config "$1/harmony.toml"
    test $? = 78 && exit 78
    flock -n -E 99 "$2/fencer.lock" true
    test $? = 99 || "$0/harmony-fencer" --config "$2/fencer.json" --if-unguarded "Harmony has ended"
done
"""


def _python() -> str:
    """A Python of this version that everybody may run: the agent has a user of its own."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for candidate in (f"{sys.base_prefix}/bin/{version}", f"/usr/bin/{version}"):
        try:
            if run_as(AGENT_USER, [candidate, "-c", "import venv"]).returncode == 0:
                return candidate
        except (OSError, KeyError):
            continue
    return sys.executable


@functools.cache
def commit() -> str:
    """What is installed, as git names it."""
    argv = ["git", "-C", str(TOP), "describe", "--always", "--dirty"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "of no git tree"


@functools.cache
def installed() -> Path:
    """Harmony's wheel of this tree, in a virtual environment of its own; its bin."""
    place = HOME / "harmony"
    commit()  # before anybody commits or merges during a campaign
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([_python(), "-m", "venv", "--without-pip", str(place)], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = place / "lib" / version / "site-packages"
    # What Harmony depends on comes from the environment that runs the bench; Harmony itself must not.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        "--python",
        str(place / "bin" / "python"),
    ]
    options = ["install", "--no-deps", "--no-index", "--ignore-installed", "--no-cache-dir"]
    built = wheel()
    subprocess.run([*pip, *options, str(built)], check=True)
    shutil.rmtree(built.parent)  # at once: a bench that is killed leaves nothing
    return place / "bin"


def _agent_user(bin_dir: Path) -> str | None:
    try:
        done = run_as(AGENT_USER, [str(bin_dir / "python"), "-I", "-c", "import harmony.agent"])
    except (OSError, KeyError):
        return None
    return AGENT_USER if done.returncode == 0 else None


class Harmony:
    """One cluster."""

    def __init__(self, lab: Lab, parts: Parts, options: Options) -> None:
        self._lab = lab
        self._parts = parts
        self._options = options
        self._bin = installed()
        self._agent_user = _agent_user(self._bin)
        self._stores = stores(options.stores)
        # Two silences that do not quite meet, an election of the store, and the promotion.
        self.takeover_s = 2 * PRESETS[options.preset].failover_timeout_s + 12

    def start(self) -> None:
        for name in self._stores:
            self.start_store(name)
        make_databases(self._lab, self._parts, self._options)
        for name in DATABASES:
            host = self._lab.hosts[name]
            (host.folder / "harmony.toml").write_text(tomli_w.dumps(self._settings(host)))
            host.run([str(self._bin / "harmonyctl"), "config", "check", str(host.folder / "harmony.toml")])
            self.start_host(name)

    def _settings(self, host: Light) -> dict[str, dict[str, object]]:
        hosts = self._lab.hosts
        pg = self._parts.postgres
        made: dict[str, dict[str, object]] = {
            "cluster": {"id": "bench", "preferred_primary": DATABASES[0]},
            "node": {
                "name": host.name,
                "state_dir": str(host.folder / "state"),
                "run_dir": str(RUN / host.name),
            },
            "members": {name: {"host": hosts[name].address, "port": PORT} for name in DATABASES},
            "store": {
                "urls": [f"nats://{hosts[name].address}:4222" for name in self._stores],
                "monitor_urls": [f"http://{hosts[name].address}:8222" for name in self._stores],
                "replicas": len(self._stores),
            },
            "timing": {"preset": self._options.preset},
            "replication": {"mode": "off" if self._options.sync == "off" else "quorum"},
            "postgresql": {
                "listen_addresses": "*",
                "data_dir": str(host.folder / "disk" / "data"),
                "bin_dir": str(pg.bin_dir),
                "socket_dir": str(host.folder / "disk" / "sock"),
            },
        }
        if pg.library_dir is not None:
            made["postgresql"]["library_dir"] = str(pg.library_dir)
        if self._parts.users.postgres is not None:
            made["postgresql"]["user"] = self._parts.users.postgres
        if self._agent_user is not None:
            made["agent"] = {"user": self._agent_user}
        return made

    def start_host(self, name: str) -> None:
        host, run = self._lab.hosts[name], str(RUN / name)
        host.run(["sh", "-c", 'rm -rf "$0" && mkdir -p "$0"', run])  # it does not outlive a power cut
        (host.folder / "state").mkdir(exist_ok=True)
        (host.folder / "state").chmod(0o711)
        host.start(["sh", "-c", UNIT, str(self._bin), str(host.folder), run], host.folder / "harmony.log")

    def start_store(self, name: str) -> None:
        host = self._lab.hosts[name]
        lines = [
            f"server_name: {name}",
            'listen: "0.0.0.0:4222"',
            'http: "0.0.0.0:8222"',
            f'jetstream {{ store_dir: "{host.folder}/jetstream", sync_interval: always }}',
        ]
        if len(self._stores) > 1:
            routes = ", ".join(f'"nats://{self._lab.hosts[other].address}:6222"' for other in self._stores)
            lines.append(f'cluster {{ name: bench, listen: "{host.address}:6222", routes: [{routes}] }}')
        (host.folder / "nats.conf").write_text("\n".join(lines) + "\n")
        argv = [str(self._parts.nats_server), "-c", str(host.folder / "nats.conf")]
        host.start(argv, host.folder / "nats.log")

    def agents(self, host: Light) -> list[Process]:
        return host.processes("harmony.agent")

    def guards(self, host: Light) -> dict[str, list[Process]]:
        return {name: host.processes(program) for name, program in GUARDS.items()}

    def restart_agent(self, name: str) -> None:
        """Nothing: its supervisor has."""

    def control(self, name: str, *words: str) -> str:
        """What harmonyctl says on that host. Raises HostError where it ends otherwise than with 0."""
        host = self._lab.hosts[name]
        argv = [str(self._bin / "harmonyctl"), *words, "--config", str(host.folder / "harmony.toml")]
        return host.run(argv, timeout=120).stdout

    def status(self, name: str) -> dict[str, object]:
        """What `status --json` says on that host. Its exit code judges the cluster: here a degraded one is no failure.

        Raises HostError where no agent answers.
        """
        host = self._lab.hosts[name]
        argv = [
            str(self._bin / "harmonyctl"),
            "status",
            "--json",
            "--config",
            str(host.folder / "harmony.toml"),
        ]
        done = host.run(argv, timeout=120, check=False)
        try:
            said: dict[str, object] = json.loads(done.stdout)
        except ValueError:
            words = (done.stderr or done.stdout).strip()[-2000:]
            raise HostError(f"{name}: status exited {done.returncode}: {words}") from None
        return said

    def switch_over(self, _old: str, new: str) -> None:
        self.control(new, "switchover", "--yes", "--to", new)

    def attend(self) -> None:
        self.control(DATABASES[0], "acknowledge", "--yes")

    def store_leader(self) -> str:
        def ask() -> str:
            for name in self._stores:
                url = f"http://{self._lab.hosts[name].address}:8222/jsz?streams=true"
                with urllib.request.urlopen(url, timeout=2) as reply:
                    said = json.load(reply)
                for account in said.get("account_details", []):
                    for stream in account.get("stream_detail", []):
                        if stream["name"] == "KV_harmony_bench" and stream.get("cluster", {}).get("leader"):
                            return str(stream["cluster"]["leader"])
            raise HostError("no NATS server says who leads the stream")

        return self._lab.hosts[self._stores[0]].in_net(ask)

    def versions(self) -> dict[str, str]:
        nats = subprocess.run(
            [str(self._parts.nats_server), "--version"], capture_output=True, text=True, check=True
        )
        return {
            "harmony": commit(),
            "nats-server": ".".join(map(str, version_of(nats.stdout))),
        }
