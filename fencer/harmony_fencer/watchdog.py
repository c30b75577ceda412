"""The hardware watchdog: a timer that resets the host unless it is petted in time.

It covers what the ladder cannot: a fencer that hangs, or never gets to run, while PostgreSQL may write.
It decides nothing: the fencer says when to arm, pet and disarm; `may_pet` is the rule that it goes by.

Only `disarm()` stops a timer. Closing the device without it, as the kernel does for a process that died,
leaves it ticking, and counts as one last pet: a hung fencer that is killed after its lease's end moves the
reset from lease end + timeout to at most lease end + 2 × timeout. A virtual machine's timer is the
hypervisor's: it stands still while the machine is paused.

Sources: Linux's Documentation/watchdog/watchdog-api.rst, include/uapi/linux/watchdog.h and
drivers/watchdog/watchdog_dev.c. The request numbers are _IOR and _IOWR('W', n, type) as in
asm-generic/ioctl.h (x86, ARM, RISC-V, s390x); on POWER, MIPS and SPARC no device is recognised.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, Protocol

from harmony_fencer.log import log

WDIOC_GETSUPPORT = 0x80285700  # _IOR('W', 0, struct watchdog_info)
WDIOC_SETOPTIONS = 0x80045704  # _IOR('W', 4, int)
WDIOC_KEEPALIVE = 0x80045705  # _IOR('W', 5, int)
WDIOC_SETTIMEOUT = 0xC0045706  # _IOWR('W', 6, int), in seconds
WDIOC_GETTIMEOUT = 0x80045707  # _IOR('W', 7, int), in seconds
WDIOF_MAGICCLOSE = 0x0100
WDIOF_ALARMONLY = 0x0400  # it tells somebody, and resets nothing
WDIOS_DISABLECARD = 0x0001
INFO = struct.Struct("II32s")  # struct watchdog_info: options, firmware version, identity
INT = struct.Struct("i")
ANOTHER = "use another watchdog"
HOLDERS_S = 0.15  # this runs in the event loop


class WatchdogError(Exception):
    """The watchdog cannot be used: the device, the cause, and what to do about it."""


class Watchdog(Protocol):
    """What the fencer uses. Each method is a few system calls: microseconds, save for a driver that waits
    for another chip (ipmi_watchdog for the BMC): call them in a thread there."""

    @property
    def armed(self) -> bool:
        """Whether the timer runs, and must be petted."""

    def arm(self, timeout_s: float) -> float:
        """Start the timer; returns the timeout in force, in seconds, never longer than asked for.

        Also pets a timer that an earlier process left ticking: only where `may_pet` says so.
        Raises WatchdogError; where `armed` is True even so, the timer could not be stopped again.
        """

    def pet(self) -> None:
        """Start the timeout anew. Raises WatchdogError: not armed, or the driver failed."""

    def disarm(self) -> bool:
        """Stop the timer. False: it cannot be stopped (nowayout); it stays open, to be petted on."""


def may_pet(*, now_ns: int, lease_deadline_ns: int | None, could_write: bool) -> bool:
    """Whether the fencer keeps its promises at `now_ns` (CLOCK_BOOTTIME), and so may pet.

    It does while the lease is in force, its deadline excluded, and while nothing here could write: a
    fence is proven, or PostgreSQL is a standby. From the lease's end until a fence is proven it does not:
    so the host resets at the latest at lease end + watchdog timeout, and that timeout takes fence_timeout's
    place where it is longer: failover_timeout > lease + max(fence_timeout, watchdog timeout) + safety_margin.
    """
    return not could_write or (lease_deadline_ns is not None and now_ns < lease_deadline_ns)


class Device:
    """A Watchdog of the kernel, such as /dev/watchdog."""

    def __init__(self, path: str, *, ioctl: Callable[[int, int, bytes], bytes] = fcntl.ioctl) -> None:
        self._path = path
        self._ioctl = ioctl
        self._fd: int | None = None

    @property
    def armed(self) -> bool:
        return self._fd is not None

    def arm(self, timeout_s: float) -> float:
        """See Watchdog. The device counts in whole seconds: `timeout_s` is rounded down."""
        if self._fd is not None:
            raise self._error("it is armed already", "disarm it first")
        if timeout_s < 1:  # refused before opening, which starts the timer
            raise self._error(f"a timeout of {timeout_s:g} s is too short", "it counts in seconds: 1 or more")
        try:
            # O_NONBLOCK: a FIFO without a reader must not hold us up.
            fd = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as e:
            raise self._error(*_explain(self._path, e)) from e
        try:
            options: int = INFO.unpack(self._ioctl(fd, WDIOC_GETSUPPORT, bytes(INFO.size)))[0]
        except OSError as e:
            os.close(fd)
            what = "name a watchdog's device, such as /dev/watchdog"
            raise self._error(f"not a watchdog ({e.strerror})", what) from e
        self._fd = fd
        try:
            return self._start(fd, options, timeout_s)
        except WatchdogError as e:
            if self.disarm():
                raise
            left = "it cannot be disarmed (nowayout), so the host resets unless it is petted on"
            raise WatchdogError(f"{e}; {left}") from e

    def _start(self, fd: int, options: int, timeout_s: float) -> float:
        if options & WDIOF_ALARMONLY:
            raise self._error("it raises an alarm and resets nothing", ANOTHER)
        if not options & WDIOF_MAGICCLOSE:
            raise self._error("no WDIOF_MAGICCLOSE: a fencer that dies would stop it", ANOTHER)
        wanted_s, refused = int(timeout_s), ""
        try:
            self._ioctl(fd, WDIOC_SETTIMEOUT, INT.pack(wanted_s))
        except OSError as e:  # fixed, or out of its range: what is in force decides
            refused = f" (it refused {wanted_s} s: {e.strerror})"
        with self._driver("it does not tell its timeout", ANOTHER):
            in_force_s: int = INT.unpack(self._ioctl(fd, WDIOC_GETTIMEOUT, bytes(INT.size)))[0]
        if in_force_s > timeout_s:
            cause = f"its timeout is {in_force_s} s{refused}, longer than the {timeout_s:g} s asked for"
            raise self._error(cause, f"configure {in_force_s} s, or {ANOTHER}")
        # An earlier holder's magic close can outlast its close (systemd's does): then our death would stop
        # the timer. Any other byte takes it back.
        with self._driver("it cannot be written to", ANOTHER):
            os.write(fd, b"\0")
        self.pet()  # one that cannot be petted is found now
        return float(in_force_s)

    def pet(self) -> None:
        if self._fd is None:
            raise self._error("it is not armed", "arm it first")
        with self._driver("it could not be petted", "see the kernel's log"):
            self._ioctl(self._fd, WDIOC_KEEPALIVE, bytes(INT.size))

    def disarm(self) -> bool:
        if self._fd is None:
            return True
        try:
            # Not by magic close ("V"): under nowayout that fails too, but only once the device is closed.
            self._ioctl(self._fd, WDIOC_SETOPTIONS, INT.pack(WDIOS_DISABLECARD))
        except OSError:
            return False
        os.close(self._fd)
        self._fd = None
        return True

    @contextlib.contextmanager
    def _driver(self, cause: str, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise self._error(f"{cause} ({e.strerror})", what) from e

    def _error(self, cause: str, what: str) -> WatchdogError:
        return WatchdogError(f"{self._path}: {cause}; {what}")


def _explain(path: str, error: OSError) -> tuple[str, str]:
    """Why the device could not be opened, and what to do."""
    cause = error.strerror or str(error)
    if error.errno == errno.EBUSY:
        found = holders(path, HOLDERS_S)
        what = "stop that program: only one can have it"
        if any(name.startswith("systemd ") for name in found):
            what = "set RuntimeWatchdogSec=0 in /etc/systemd/system.conf and reboot"
        return f"{cause}: held by {', '.join(found) or 'another program'}", f"{what}, or name another device"
    if error.errno in {errno.EACCES, errno.EPERM}:
        return cause, f"run the fencer as root, under systemd with DeviceAllow={path} rw"
    return cause, "load its driver (such as iTCO_wdt, sp5100_tco, ipmi_watchdog), or name another device"


def holders(path: str, within_s: float = 60.0) -> list[str]:
    """Who has the device open, as "name (pid n)", as far as /proc lets us see."""
    first = {"/dev/watchdog", "/dev/watchdog0"}  # one device under two names
    names = first if path in first else {path}
    found = set[str]()
    until = time.monotonic() + within_s
    for link in glob.iglob("/proc/[0-9]*/fd/*"):  # noqa: PTH207 (Path.glob raises where a process ends)
        if time.monotonic() > until:
            break  # systemd, the likeliest, is pid 1 and comes first
        with contextlib.suppress(OSError):  # ended meanwhile, or not ours to see
            if os.fspath(Path(link).readlink()) in names:
                process = Path(link).parents[1]
                found.add(f"{(process / 'comm').read_text().strip()} (pid {process.name})")
    return sorted(found)


class Policy:
    """What the configuration wants of the watchdog: off, automatic (where it can be had), or required.

    `marker`: a file in run_dir that stands while the timer runs. A fencer that finds it takes the timer over
    from one that died: it arms anew while the lease lasts, else stops it once nothing here can write.
    """

    def __init__(
        self,
        mode: Literal["off", "automatic", "required"],
        timeout_s: float,
        device: Watchdog | None,
        marker: Path,
    ) -> None:
        self._mode, self._timeout_s, self.device, self._marker = mode, timeout_s, device, marker
        self._said = ""
        self._failed = ""

    def __str__(self) -> str:
        return f"{self._mode}: {self._failed or self._said}".rstrip(": ")

    @property
    def cannot_lead(self) -> str:
        """Why an activation would fail for want of a watchdog, as far as it is known; else ""."""
        return self._failed if self._mode == "required" else ""

    def arm(self) -> None:
        """Before anything here may write. Raises WatchdogError where it is required and cannot be armed."""
        if self.device is None or self.device.armed:
            return
        try:
            timeout_s = self.device.arm(self._timeout_s)
        except WatchdogError as e:
            if str(e) != self._failed:
                log.error("the watchdog cannot be armed", why=str(e), mode=self._mode)
            self._failed = str(e)
            if self._mode == "required":
                raise
        else:
            with contextlib.suppress(OSError):
                self._marker.touch()
            self._said, self._failed = f"armed, {timeout_s:g} s", ""
            log.info("watchdog armed", timeout_s=timeout_s)

    def disarm(self) -> None:
        """Nothing here can write any more: stop the timer, also one that a dead fencer left ticking."""
        if self.device is None:
            return
        if not self.device.armed and self._marker.exists():
            with contextlib.suppress(WatchdogError):
                self.device.arm(self._timeout_s)
        if self.device.armed:
            if self.device.disarm():
                self._said = "disarmed"
                with contextlib.suppress(OSError):
                    self._marker.unlink(missing_ok=True)
            else:
                self._said = "armed for good (nowayout)"
