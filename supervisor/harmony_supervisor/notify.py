"""sd_notify: what systemd is told. Does nothing where NOTIFY_SOCKET is not set."""

from __future__ import annotations

import os
import socket


class Notifier:
    """Sends to $NOTIFY_SOCKET (a path, or an abstract name behind '@'); takes it out of the environment."""

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        usec = os.environ.pop("WATCHDOG_USEC", "")
        pid = os.environ.pop("WATCHDOG_PID", "")
        mine = not pid or pid == str(os.getpid())
        self.watchdog_s: float | None = int(usec) / 1e6 if usec.isdigit() and mine else None

    def send(self, *lines: str) -> None:
        """Send lines such as 'READY=1'. A systemd that does not listen changes nothing."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            try:
                sock.connect(self._address)
                sock.send("\n".join(lines).encode()[:4000])
            except OSError:
                return
