"""The watchdog: what cannot be one is refused by name; the rule of petting; the fake that later tests use.

A real one that resets a real kernel: tests/vm/test_real_watchdog.py.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harmony_fencer.watchdog import (
    WDIOC_GETSUPPORT,
    WDIOC_GETTIMEOUT,
    WDIOC_KEEPALIVE,
    WDIOC_SETOPTIONS,
    WDIOC_SETTIMEOUT,
    WDIOF_ALARMONLY,
    WDIOF_MAGICCLOSE,
    Device,
    Watchdog,
    WatchdogError,
    _explain,
    holders,
    may_pet,
)
from tests.fencer.fakes import NS, FakeClock, FakeWatchdog

NOBODY = 65534


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "watchdog").touch()
    return tmp_path / "watchdog"


def refused(path: Path | str, timeout_s: float = 5) -> str:
    """What arm() says; it must name the device, leave nothing open, and leave nothing armed."""
    before = os.listdir("/proc/self/fd") if os.access("/proc/self/fd", os.R_OK) else []
    device = Device(str(path))
    with pytest.raises(WatchdogError) as raised:
        device.arm(timeout_s)
    assert not device.armed
    if before:
        assert len(os.listdir("/proc/self/fd")) == len(before)
    text = str(raised.value)
    assert text.startswith(f"{path}: ")
    assert "; " in text, "what to do is missing"
    return text


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's rights, whoever runs the tests."""
    if os.getuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_the_request_numbers_are_the_kernels() -> None:
    """Built anew from asm-generic/ioctl.h: direction (2 read, 3 both), size, 'W', number."""
    for request, direction, number, size in (
        (WDIOC_GETSUPPORT, 2, 0, 40),
        (WDIOC_SETOPTIONS, 2, 4, 4),
        (WDIOC_KEEPALIVE, 2, 5, 4),
        (WDIOC_SETTIMEOUT, 3, 6, 4),
        (WDIOC_GETTIMEOUT, 2, 7, 4),
    ):
        assert request == direction << 30 | size << 16 | ord("W") << 8 | number


def test_a_missing_device(tmp_path: Path) -> None:
    assert f"{os.strerror(errno.ENOENT)}; load its driver" in refused(tmp_path / "watchdog")


@pytest.mark.parametrize("path", ["/dev/null", "/proc/self/oom_score_adj"])
def test_what_is_not_a_watchdog(path: str) -> None:
    assert "not a watchdog" in refused(path)


def test_a_file_is_not_a_watchdog_and_stays_as_it_is(file: Path, tmp_path: Path) -> None:
    """Above all no magic close, no keepalive byte, is written into somebody's file."""
    file.write_bytes(b"precious")
    assert "not a watchdog" in refused(file)
    assert file.read_bytes() == b"precious"
    assert "Is a directory" in refused(tmp_path)


def test_a_fifo_does_not_hold_the_event_loop_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "No such device or address" in refused(tmp_path / "fifo")


def test_no_permission(file: Path) -> None:
    file.chmod(0)
    with as_nobody():
        text = refused(file)
    assert "Permission denied; run the fencer as root" in text
    assert f"DeviceAllow={file} rw" in text


def test_busy() -> None:
    """EBUSY from a real device: a terminal in exclusive mode, opened by somebody without root's rights."""
    with as_nobody():
        ours, theirs = os.openpty()
        try:
            fcntl.ioctl(theirs, termios.TIOCEXCL)
            text = refused(os.ttyname(theirs))
        finally:
            os.close(ours)
            os.close(theirs)
    assert re.search(r"busy: held by .+; stop that program", text)


def test_the_holder_is_named(file: Path) -> None:
    assert holders(str(file)) == []
    code = "import sys; f = open(sys.argv[1]); print(flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", code, str(file)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        cause, what = _explain(str(file), OSError(errno.EBUSY, "busy"))
        name = Path(f"/proc/{child.pid}/comm").read_text().strip()
        assert cause == f"busy: held by {name} (pid {child.pid})"
        assert what.startswith("stop that program")
        child.communicate()
    assert holders(str(file)) == []


@pytest.mark.parametrize("timeout_s", [0, 0.99, -1])
def test_a_timeout_under_a_second_is_refused_before_the_device_is_touched(
    tmp_path: Path, timeout_s: float
) -> None:
    """Rounded up it would be longer than asked for; opening alone starts the timer."""
    assert "too short" in refused(tmp_path / "missing", timeout_s)


def test_nothing_to_pet_and_nothing_to_disarm(tmp_path: Path) -> None:
    device = Device(str(tmp_path / "watchdog"))
    with pytest.raises(WatchdogError, match="not armed"):
        device.pet()
    assert device.disarm()


class Driver:
    """A kernel driver's side of the requests, over an ordinary file: what few real devices can be made to do."""

    def __init__(self, options: int = WDIOF_MAGICCLOSE) -> None:
        self.options, self.timeout_s, self.shortest_s = options, 60, 1
        self.fails: dict[int, int] = {}  # request: errno
        self.asked: list[int] = []

    def __call__(self, fd: int, request: int, argument: bytes) -> bytes:
        self.asked.append(request)
        if request in self.fails:
            raise OSError(self.fails[request], os.strerror(self.fails[request]))
        if request == WDIOC_GETSUPPORT:
            return struct.pack("II32s", self.options, 0, b"fake")
        if request == WDIOC_SETTIMEOUT:
            self.timeout_s = max(self.shortest_s, struct.unpack("i", argument)[0])
        return struct.pack("i", self.timeout_s)


def test_arm_pet_disarm(file: Path) -> None:
    driver = Driver()
    device: Watchdog = Device(str(file), ioctl=driver)
    assert device.arm(5.9) == 5.0  # rounded down, read back
    assert device.armed
    assert driver.asked[-1] == WDIOC_KEEPALIVE
    with pytest.raises(WatchdogError, match="armed already"):
        device.arm(5)
    device.pet()
    assert driver.asked[-2:] == [WDIOC_KEEPALIVE] * 2
    assert holders(str(file))
    assert file.read_bytes() == b"\0"  # takes an earlier holder's magic close back
    assert device.disarm()
    assert driver.asked[-1] == WDIOC_SETOPTIONS
    assert b"V" not in file.read_bytes()  # it would outlast us
    assert not device.armed
    assert not holders(str(file))
    assert device.arm(1) == 1.0  # once more


@pytest.mark.parametrize(
    ("fails", "in_force_s"), [({}, 5.0), ({WDIOC_SETTIMEOUT: errno.EOPNOTSUPP}, 3.0)], ids=["set", "fixed"]
)
def test_the_timeout_in_force_is_returned(file: Path, fails: dict[int, int], in_force_s: float) -> None:
    driver = Driver()
    driver.timeout_s, driver.fails = 3, fails
    assert Device(str(file), ioctl=driver).arm(5) == in_force_s


@pytest.mark.parametrize(
    ("options", "shortest_s", "fails", "cause"),
    [
        (WDIOF_MAGICCLOSE, 10, {}, "its timeout is 10 s, longer than the 5 s asked for; configure 10 s"),
        (
            WDIOF_MAGICCLOSE,
            1,
            {WDIOC_SETTIMEOUT: errno.EINVAL},
            "its timeout is 60 s (it refused 5 s: Invalid argument), longer",
        ),
        (WDIOF_MAGICCLOSE, 1, {WDIOC_GETTIMEOUT: errno.EOPNOTSUPP}, "does not tell its timeout"),
        (WDIOF_MAGICCLOSE, 1, {WDIOC_KEEPALIVE: errno.EIO}, "could not be petted (Input/output error)"),
        (WDIOF_MAGICCLOSE | WDIOF_ALARMONLY, 1, {}, "resets nothing"),
        (0, 1, {}, "no WDIOF_MAGICCLOSE"),
    ],
)
@pytest.mark.parametrize("nowayout", [False, True])
def test_a_device_that_cannot_keep_the_promise_is_refused(
    file: Path, options: int, shortest_s: int, fails: dict[int, int], cause: str, nowayout: bool
) -> None:
    """Refused means disarmed again; where that is impossible the error and `armed` say that it ticks."""
    driver = Driver(options)
    driver.shortest_s = shortest_s
    driver.fails = fails | ({WDIOC_SETOPTIONS: errno.EBUSY} if nowayout else {})
    device = Device(str(file), ioctl=driver)
    with pytest.raises(WatchdogError) as raised:
        device.arm(5)
    text = str(raised.value)
    assert text.startswith(f"{file}: ")
    assert cause in text
    assert device.armed is nowayout
    assert ("the host resets unless it is petted on" in text) is nowayout
    assert b"V" not in file.read_bytes()
    assert bool(holders(str(file))) is nowayout


def test_nowayout_stays_open_and_is_petted_on(file: Path) -> None:
    driver = Driver()
    driver.fails = {WDIOC_SETOPTIONS: errno.EBUSY}
    device = Device(str(file), ioctl=driver)
    device.arm(5)
    assert not device.disarm()
    assert device.armed
    assert b"V" not in file.read_bytes()
    device.pet()
    assert driver.asked[-1] == WDIOC_KEEPALIVE


def test_a_driver_that_fails_later(file: Path) -> None:
    driver = Driver()
    device = Device(str(file), ioctl=driver)
    device.arm(5)
    driver.fails = {WDIOC_KEEPALIVE: errno.ENODEV}
    with pytest.raises(WatchdogError, match="could not be petted"):
        device.pet()
    assert device.armed


@pytest.mark.parametrize(
    ("now_ns", "lease_deadline_ns", "could_write", "expected"),
    [
        (99, 100, True, True),  # the lease is in force
        (100, 100, True, False),  # its deadline is not part of it
        (101, 100, True, False),
        (0, None, True, False),  # writable without a lease
        (99, 100, False, True),
        (101, 100, False, True),  # fenced in time, proven
        (0, None, False, True),  # a standby, or never activated
    ],
)
def test_may_pet(now_ns: int, lease_deadline_ns: int | None, could_write: bool, expected: bool) -> None:
    petted = may_pet(now_ns=now_ns, lease_deadline_ns=lease_deadline_ns, could_write=could_write)
    assert petted is expected


@pytest.mark.parametrize("step_ns", [NS // 7, NS // 2, NS])
def test_by_the_rule_the_host_resets_at_lease_end_plus_timeout_at_the_latest(step_ns: int) -> None:
    """The inequality's share: a lease that ends with no fence proven is over by deadline + timeout."""
    clock, deadline_ns, timeout_s = FakeClock(), 10 * NS, 2
    watchdog: Watchdog = FakeWatchdog(clock)
    assert isinstance(watchdog, FakeWatchdog)
    watchdog.arm(timeout_s)
    while watchdog.reset_at_ns is None:
        if may_pet(now_ns=clock(), lease_deadline_ns=deadline_ns, could_write=True):
            watchdog.pet()
        clock.now_ns += step_ns
    assert deadline_ns < watchdog.reset_at_ns < deadline_ns + timeout_s * NS


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(5)


def test_fake_resets_one_timeout_after_the_last_pet(clock: FakeClock) -> None:
    fake = FakeWatchdog(clock)
    assert not fake.armed
    assert fake.arm(2.9) == 2.0
    clock.now_ns += 2 * NS - 1
    fake.pet()
    assert fake.pets == [clock()]
    clock.now_ns += 2 * NS - 1
    assert fake.reset_at_ns is None
    clock.now_ns += NS
    fake.pet()  # too late
    assert fake.reset_at_ns == 5 + 2 * NS - 1 + 2 * NS


def test_fake_disarmed_lives_on(clock: FakeClock) -> None:
    fake = FakeWatchdog(clock)
    fake.arm(2)
    assert fake.disarm()
    assert not fake.armed
    clock.now_ns += 100 * NS
    assert fake.reset_at_ns is None


def test_fake_that_cannot_be_disarmed_is_petted_on(clock: FakeClock) -> None:
    fake = FakeWatchdog(clock, nowayout=True)
    fake.arm(2)
    assert not fake.disarm()
    assert fake.armed
    clock.now_ns += NS
    fake.pet()
    clock.now_ns += 2 * NS
    assert fake.reset_at_ns == clock()


def test_fake_whose_holder_dies_ticks_on(clock: FakeClock) -> None:
    fake = FakeWatchdog(clock)
    fake.arm(2)
    clock.now_ns += NS
    fake.holder_dies()
    assert not fake.armed
    clock.now_ns += 10 * NS
    assert fake.reset_at_ns == 5 + NS + 2 * NS


@pytest.mark.parametrize("call", [lambda w: w.arm(2), lambda w: w.pet()])
def test_fake_can_refuse(clock: FakeClock, call: Callable[[Watchdog], object]) -> None:
    fake = FakeWatchdog(clock)
    fake.refuse = "broken"
    with pytest.raises(WatchdogError, match="broken"):
        call(fake)
