"""What all tests share: shared memory of their own, and `--rewrite`: documents and expected texts written anew."""

from __future__ import annotations

import ctypes
import os

import pytest
from hypothesis import settings

from tests.hosts.keeper import mount

# No example is ever too slow: the machine may be busy. What fails is printed so that it can be run again.
settings.register_profile("harmony", deadline=None, print_blob=True)
settings.load_profile("harmony")

NEW_MOUNTS, NEW_IPC = 0x00020000, 0x08000000  # CLONE_NEWNS, CLONE_NEWIPC in <linux/sched.h>


def pytest_configure() -> None:
    """As root: /dev/shm and System V's shared memory of their own, which go with this process.

    A killed PostgreSQL leaves its segments; Linux has 4,096 of System V's in all, and a day of tests leaves thousands.
    """
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS | NEW_IPC) != 0:
        print(f"no shared memory of their own for the tests: {os.strerror(ctypes.get_errno())}")
        return
    mount("--make-rprivate", "/")
    mount("-t", "tmpfs", "-o", "mode=1777", "harmony-tests", "/dev/shm")  # noqa: S108


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite", action="store_true", help="write rendered documents and expected texts anew"
    )


@pytest.fixture
def rewrite(request: pytest.FixtureRequest) -> bool:
    """Whether to write what is seen instead of comparing with it."""
    return bool(request.config.getoption("--rewrite"))
