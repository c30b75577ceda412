"""The guest's init: arms the real /dev/watchdog as its kernel argument harmony=… says, and tells the serial port.

Runs as process 1 on a bare kernel, with Python's standard library and harmony_fencer.watchdog only.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, "/harmony")

from harmony_fencer.watchdog import WDIOC_SETOPTIONS, WDIOS_DISABLECARD, Device, WatchdogError

TIMEOUT_S = 4
PET_S = 0.5
DEVICE = "/dev/watchdog"
MODULES = Path("/modules")
SYS_FINIT_MODULE = 313  # on x86-64
POWER_OFF = 0x4321FEDC  # LINUX_REBOOT_CMD_POWER_OFF, linux/reboot.h
libc = ctypes.CDLL(None, use_errno=True)


def say(text: str) -> None:
    print(f"guest {time.monotonic():6.2f}: {text}", flush=True)


def check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(kind: str, target: str) -> None:
    Path(target).mkdir(exist_ok=True)
    check(libc.mount(kind.encode(), target.encode(), kind.encode(), 0, None), f"mount {target}")


def load(module: str, parameters: str = "") -> None:
    with (MODULES / f"{module}.ko").open("rb") as file:
        check(libc.syscall(SYS_FINIT_MODULE, file.fileno(), parameters.encode(), 0), f"load {module}")


def pet_for(device: Device, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        device.pet()
        say("petted")
        time.sleep(PET_S)


def wait(seconds: float) -> None:
    """Live on without petting: so long, or until the host resets."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(PET_S)
        say("alive")


def stop_petting(device: Device) -> None:
    pet_for(device, 2 * TIMEOUT_S)
    wait(3 * TIMEOUT_S)


def disarm(device: Device) -> None:
    """Meanwhile nobody else gets it: the error names us."""
    try:
        Device(DEVICE).arm(TIMEOUT_S)
    except WatchdogError as e:
        say(f"second: {e}")
    pet_for(device, TIMEOUT_S / 2)
    say(f"disarm: {device.disarm()} armed: {device.armed}")
    wait(3 * TIMEOUT_S)


def nowayout(device: Device) -> None:
    say(f"disarm: {device.disarm()} armed: {device.armed}")
    stop_petting(device)


def hold(device: Device, seconds: float) -> None:
    """A fencer in a process of its own: it arms, pets for so long, hangs, and is killed half a timeout later."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        say(f"armed: {device.arm(TIMEOUT_S):g} s in force")
        pet_for(device, seconds)
        os.write(theirs, b"x")
        while True:
            signal.pause()
    os.read(ours, 1)
    wait(TIMEOUT_S / 2)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    say("killed")


def killed(device: Device) -> None:
    """A fencer is killed, its successor arms the ticking timer, pets it, and disarms it; then another
    program, which disarms as systemd does: its magic close outlasts the close. The next one is killed for good.
    """
    say(f"disarm: {device.disarm()} armed: {device.armed}")
    hold(device, PET_S)
    device.arm(TIMEOUT_S)
    pet_for(device, 2 * TIMEOUT_S)
    say(f"disarm: {device.disarm()} armed: {device.armed}")
    fd = os.open(DEVICE, os.O_WRONLY)
    fcntl.ioctl(fd, WDIOC_SETOPTIONS, struct.pack("i", WDIOS_DISABLECARD))
    os.write(fd, b"V")
    os.close(fd)
    hold(device, PET_S)
    wait(3 * TIMEOUT_S)


MODES = {"reset": stop_petting, "disarm": disarm, "nowayout": nowayout, "killed": killed}


def main() -> None:
    for kind, target in (("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")):
        mount(kind, target)
    arguments = dict(a.partition("=")[::2] for a in Path("/proc/cmdline").read_text().split())
    mode = arguments["harmony"]
    say(f"booted, Linux {os.uname().release}, mode {mode}")
    load("watchdog")
    load("i6300esb", "nowayout=1" if mode == "nowayout" else "")
    device = Device(DEVICE)
    in_force_s = device.arm(TIMEOUT_S + 0.9)
    say(f"armed: {in_force_s:g} s in force")
    MODES[mode](device)
    say("lived on")


try:
    main()
except BaseException as e:  # noqa: BLE001 (process 1 may not end: say why, then power off)
    say(f"failed: {e!r}")
os.sync()
libc.reboot(POWER_OFF)
