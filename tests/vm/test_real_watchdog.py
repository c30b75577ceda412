"""A real kernel, a real driver, a machine that is really reset: watchdog.Device in a virtual machine.

HARMONY_VM=1 .venv/bin/python -m pytest tests/vm (machine.py says what it needs; it takes about two minutes).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.vm.machine import Machine, Seen, initramfs, kernel

pytestmark = pytest.mark.skipif(
    os.environ.get("HARMONY_VM") != "1", reason="starts virtual machines for minutes: HARMONY_VM=1 runs it"
)

TIMEOUT_S = 4  # as in guest.py; its init asks for 4.9
Boot = Callable[[str, str, int], list[Seen]]  # mode, what to wait for, how many times


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Kernel and initramfs."""
    folder = kernel()
    initrd = tmp_path_factory.mktemp("vm") / "initrd"
    initrd.write_bytes(initramfs(folder))
    return folder / "vmlinux", initrd


@pytest.fixture
def boot(images: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> Boot:
    """Run the guest in a mode; everything seen is printed as it happens."""

    def run(mode: str, until: str, times: int) -> list[Seen]:
        with capsys.disabled(), closing(Machine(*images, mode)) as machine:
            print(f"\n--- {mode}")
            return machine.watch(until, times)

    return run


def times(seen: list[Seen], part: str) -> list[float]:
    return [s.at_s for s in seen if part in s.what]


def check_reset(seen: list[Seen], last_pet_s: float) -> None:
    """The watchdog fired one timeout after the last pet, once, and the machine booted a second time."""
    (fired_s,) = times(seen, "QEMU: WATCHDOG")
    assert TIMEOUT_S - 0.5 < fired_s - last_pet_s < TIMEOUT_S + 1.5
    first_s, second_s = times(seen, "booted")
    assert first_s < fired_s < times(seen, "QEMU: RESET")[0] < second_s


def test_the_host_resets_when_it_is_not_petted(boot: Boot) -> None:
    """Petted for two timeouts it lives; one timeout after the last pet it is reset."""
    seen = boot("reset", "booted", 2)
    assert times(seen, "armed: 4 s in force")
    pets = times(seen, "petted")
    assert pets[-1] - pets[0] > 1.5 * TIMEOUT_S
    check_reset(seen, pets[-1])


def test_disarmed_the_host_lives_on(boot: Boot) -> None:
    """Three timeouts without a pet. Before, nobody else gets the device, and the error names who has it."""
    seen = boot("disarm", "QEMU: SHUTDOWN", 1)
    assert times(seen, "/dev/watchdog: Device or resource busy: held by init (pid 1)")
    (disarmed_s,) = times(seen, "disarm: True armed: False")
    (lived_s,) = times(seen, "lived on")
    assert lived_s - disarmed_s > 2.5 * TIMEOUT_S
    assert not times(seen, "QEMU: WATCHDOG")


def test_nowayout_says_so_and_stays_to_be_petted(boot: Boot) -> None:
    seen = boot("nowayout", "booted", 2)
    assert times(seen, "disarm: False armed: True")
    pets = times(seen, "petted")
    assert pets[-1] - pets[0] > 1.5 * TIMEOUT_S
    check_reset(seen, pets[-1])


def test_a_killed_holder_leaves_it_ticking(boot: Boot) -> None:
    """Even after another program's magic close. Its end is the last pet: the docstring's 2 × timeout."""
    seen = boot("killed", "booted", 2)
    first_s, last_s = times(seen, ": killed")
    assert last_s - first_s > 1.5 * TIMEOUT_S  # its successor armed it in time, and lived on
    check_reset(seen, last_s)
