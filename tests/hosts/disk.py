"""What is done to a new host's disk before its first boot, as shell scripts that run on it, and how files get there.

It refuses to start anything, and to let units through that this machine's administrator enabled.
"""

from __future__ import annotations

MASKED = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "getty.target",
    "console-getty.service",
    "networking.service",
    "systemd-binfmt.service",
    "systemd-firstboot.service",
    "systemd-logind.service",
    "systemd-networkd.service",
    "systemd-repart.service",
    "systemd-resolved.service",
    "systemd-timesyncd.service",
    "systemd-tmpfiles-clean.timer",
    "systemd-udevd.service",
    "systemd-udev-trigger.service",
    "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service",
    "postgresql.service",
    "postgresql@.service",
)
# $0 are the units to mask, $1 those to enable. Whatever this machine's administrator enabled is not for the host.
PREPARE = """set -e
find /etc/systemd/system /etc/init.d /etc/rc?.d /etc/network/interfaces.d -mindepth 1 -delete 2>/dev/null || true
rm -f /etc/fstab /var/lib/dbus/machine-id
rm -rf /var/log/journal
mkdir -p /var/log/journal
for unit in $0; do ln -s /dev/null "/etc/systemd/system/$unit"; done
if [ -n "$1" ]; then systemctl --root=/ enable $1; fi
"""
IDENTIFY = """set -e
rm -f /etc/machine-id /etc/hostname /etc/hosts
echo "$0" > /etc/hostname
printf '127.0.0.1 localhost\\n127.0.1.1 %s\\n' "$0" > /etc/hosts
echo "$1" > /etc/machine-id
"""
WRITE = """set -e
mkdir -p "$(dirname "$0")"
cat > "$0.new"
chown "$2" "$0.new"
chmod "$1" "$0.new"
mv -fT "$0.new" "$0"
"""
