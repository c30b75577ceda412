"""Where a node's sockets are: --run-dir, else the configuration file's, else the default; who asks. Never an error."""

from __future__ import annotations

import getpass
import os
from pathlib import Path

import click

from harmony.config import load, read
from harmony.errors import ConfigError

DEFAULT_RUN_DIR = "/run/harmony"


def who() -> str:
    """For the record; a host without names must not keep anyone from fencing."""
    try:
        name = os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):
        name = f"uid {os.getuid()}"
    return f"{name} (pid {os.getpid()})"


def find_run_dir(run_dir: str | None, config: str | None) -> Path:
    """The folder of the sockets. A broken configuration must not stand in the way of a fence."""
    if run_dir is not None:
        return Path(run_dir)
    file = config or os.environ.get("HARMONY_CONFIG", "/etc/harmony/harmony.toml")
    try:
        return Path(load(file).node.run_dir)
    except ConfigError:
        found = _stated(file)
        if config is not None or found != DEFAULT_RUN_DIR:
            click.echo(f"{file} is not valid; looking in {found}", err=True)
        return Path(found)


def _stated(file: str) -> str:
    """node.run_dir of a file that has problems elsewhere."""
    stated: object = os.environ.get("HARMONY_NODE_RUN_DIR")
    if stated is None:
        try:
            node = read(file).get("node")
        except ConfigError:
            node = None
        stated = node.get("run_dir") if isinstance(node, dict) else None
    return stated if isinstance(stated, str) and stated.startswith("/") else DEFAULT_RUN_DIR
