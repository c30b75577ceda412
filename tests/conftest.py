"""What all tests share: memory and a network of their own, and `--rewrite`: expected texts written anew."""

from __future__ import annotations

import ctypes
import os
import subprocess

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests import sampling
from tests.hosts.keeper import mount

# No example is ever too slow: the machine may be busy. What fails is printed so that it can be run again.
settings.register_profile("harmony", deadline=None, print_blob=True)
settings.load_profile("harmony")

TOGETHER = ("tests/hosts/",)
# The longest first: what is left at the end is short, and no lane waits for another.
LONG = (*TOGETHER, "tests/bench/test_chaos", "tests/demo/", "tests/fencer/", "tests/agent/", "tests/store/")

# From <linux/sched.h>
NEW_MOUNTS, NEW_IPC, NEW_NETWORK = 0x00020000, 0x08000000, 0x40000000


def pytest_configure(config: pytest.Config) -> None:
    """As root: /dev/shm, System V's shared memory and loopback of this process's own, which go with it.

    A killed PostgreSQL leaves its segments; Linux has 4,096 of System V's in all, and a day of tests leaves thousands.
    Lanes that run side by side (tests/__main__.py) can take each other's ports only where they share a loopback.
    """
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS | NEW_IPC | NEW_NETWORK) != 0:
        print(f"no memory and network of their own for the tests: {os.strerror(ctypes.get_errno())}")
        return
    mount("--make-rprivate", "/")
    mount("-t", "tmpfs", "-o", "mode=1777", "harmony-tests", "/dev/shm")  # noqa: S108
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite", action="store_true", help="write rendered documents and expected texts anew"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What this turn leaves to others is deselected, and counted as such. In lanes what takes long comes first."""
    items[:], left = sampling.drop(items)
    config.hook.pytest_deselected(items=left)
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(
            key=lambda item: next((i for i, f in enumerate(LONG) if item.nodeid.startswith(f)), len(LONG))
        )


class Lanes(LoadScopeScheduling):
    """A file is never in two lanes, nor are files whose costly fixtures are shared."""

    def _split_scope(self, nodeid: str) -> str:
        return next((f for f in TOGETHER if nodeid.startswith(f)), nodeid.partition("::")[0])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Lanes:
    return Lanes(config, log)


@pytest.fixture
def rewrite(request: pytest.FixtureRequest) -> bool:
    """Whether to write what is seen instead of comparing with it."""
    return bool(request.config.getoption("--rewrite"))
