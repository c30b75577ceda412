"""Where a node's sockets are: --run-dir, else the configuration file's, else the default; who asks.

The default file may be broken: that never keeps anyone from a fence. A file that was named by hand may not be: whoever
names it means that cluster, and no other.
"""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path

import click

from harmony.errors import EXIT_CONFIG, ConfigError

DEFAULT_RUN_DIR = "/run/harmony"
DEFAULT_CONFIG = "/etc/harmony/harmony.toml"


def config_file(option: str | None) -> str:
    """The file that is meant: by option, by HARMONY_CONFIG, or the default."""
    return option or os.environ.get("HARMONY_CONFIG") or DEFAULT_CONFIG


def who() -> str:
    """For the record; a host without names must not keep anyone from fencing."""
    try:
        name = os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):
        name = f"uid {os.getuid()}"
    return f"{name} (pid {os.getpid()})"


def denied(e: BaseException) -> str:
    """What to do where the kernel refused this user; empty: that was not it."""
    cause: BaseException | None = e
    while cause is not None:
        if isinstance(cause, PermissionError):
            return f"not permitted for this user: run it as root: sudo {click.get_current_context().command_path}"
        cause = cause.__cause__
    return ""


def find_run_dir(run_dir: str | None, config: str | None) -> Path:
    """The folder of the sockets. Ends the process (78) where a file named by hand cannot be used."""
    if run_dir is not None:
        return Path(run_dir)
    from harmony.config import load  # noqa: PLC0415 (whoever gives --run-dir needs no configuration)

    file = config_file(config)
    try:
        return Path(load(file).node.run_dir)
    except ConfigError as e:
        if config or os.environ.get("HARMONY_CONFIG"):
            click.echo("\n".join(e.problems), err=True)
            click.echo(
                f"nothing was done: {file} was named, and cannot be used; correct it, or name the node's folder "
                f"itself (--run-dir {DEFAULT_RUN_DIR})",
                err=True,
            )
            sys.exit(EXIT_CONFIG)
        found = _stated(file)
        if found != DEFAULT_RUN_DIR:
            click.echo(f"{file} is not valid; looking in {found}", err=True)
        return Path(found)


def _stated(file: str) -> str:
    """node.run_dir of a file that has problems elsewhere."""
    from harmony.config_file import read  # noqa: PLC0415 (as above)

    stated: object = os.environ.get("HARMONY_NODE_RUN_DIR")
    if stated is None:
        try:
            node = read(file).get("node")
        except ConfigError:
            node = None
        stated = node.get("run_dir") if isinstance(node, dict) else None
    return stated if isinstance(stated, str) and stated.startswith("/") else DEFAULT_RUN_DIR
