"""Debian's own layout on a test host: a cluster made by pg_createcluster, its unit, its files under /etc/postgresql.

It starts PostgreSQL once, to give it roles and tables, and leaves it stopped; from then on Harmony or systemd do.
"""

from __future__ import annotations

from pathlib import Path

from harmony.demo.databases import CONTENT
from tests.hosts.harmony_host import Cluster, HarmonyHost

NAME = "main"
DROP_IN = "/etc/systemd/system/postgresql@.service.d/harmony.conf"
# As docs and the drop-in itself say: PostgreSQL's user reaches it by peer, the others here without a password.
HBA = """local all postgres peer
local all all trust
host all all 127.0.0.1/32 trust
local replication all trust
host replication all 127.0.0.1/32 trust
"""


def version() -> str | None:
    """The newest PostgreSQL that Debian's packages installed on this machine; None without its cluster tools."""
    if not Path("/usr/bin/pg_createcluster").exists():
        return None
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[-3]))
    return found[-1].parts[-3] if found else None


class Debian:
    """The cluster VERSION/main of a host."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.unit = f"postgresql@{version}-{NAME}.service"
        self.etc = f"/etc/postgresql/{version}/{NAME}"
        self.data = f"/var/lib/postgresql/{version}/{NAME}"

    def make(self, host: HarmonyHost) -> None:
        """On a running host: Debian's units unmasked, a fresh cluster with the tests' roles and tables, stopped."""
        units = "/etc/systemd/system"
        host.run(["rm", "-f", f"{units}/postgresql.service", f"{units}/postgresql@.service"])
        host.run(["sh", "-c", 'rm -rf /etc/postgresql/* "$0"', self.data])
        host.run(["pg_createcluster", self.version, NAME, "--port=5432"])
        host.write(f"{self.etc}/pg_hba.conf", HBA, mode=0o640, owner="postgres:postgres")
        control = ["pg_ctlcluster", "--skip-systemctl-redirect", self.version, NAME]
        host.run([*control, "start"])
        psql = ["psql", "--quiet", "--no-psqlrc", "--set=ON_ERROR_STOP=1"]
        host.run(psql, user="postgres", stdin=CONTENT.encode())
        host.run([*control, "stop"])
        host.systemctl("daemon-reload")

    def cluster(self, run: str) -> Cluster:
        """Harmony's configuration of it; where postgresql.conf is, Harmony finds by itself."""
        postgresql: dict[str, object] = {
            "data_dir": self.data,
            "socket_dir": "/var/run/postgresql",
            "run": run,
        }
        if run == "systemd":
            postgresql["unit"] = self.unit
        return Cluster(
            settings={
                "cluster": {"id": "debian"},
                "postgresql": postgresql,
            }
        )

    def programs(self) -> tuple[str, None]:
        """For HarmonyHost.configure."""
        return f"/usr/lib/postgresql/{self.version}/bin", None

    def at_boot(self, host: HarmonyHost, tree: Path) -> None:
        """Debian starts it at boot, after harmony-boot-fence: the unit enabled and the drop-in in its place."""
        host.write(DROP_IN, (tree / "systemd" / "postgresql-harmony.conf").read_bytes())
        host.systemctl("daemon-reload")
        host.systemctl("enable", "postgresql.service", "harmony-boot-fence.service")
