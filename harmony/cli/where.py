"""Where a node's sockets are: --run-dir, else the configuration file's, else the default. Never an error."""

from __future__ import annotations

import os
from pathlib import Path

import click

from harmony.config import load
from harmony.errors import ConfigError

DEFAULT_RUN_DIR = "/run/harmony"


def find_run_dir(run_dir: str | None, config: str | None) -> Path:
    """The folder of the sockets. A broken configuration must not stand in the way of a fence."""
    if run_dir is not None:
        return Path(run_dir)
    file = config or os.environ.get("HARMONY_CONFIG", "/etc/harmony/harmony.toml")
    try:
        return Path(load(file).node.run_dir)
    except ConfigError:
        if config is not None:
            click.echo(f"{config} cannot be used; trying {DEFAULT_RUN_DIR}", err=True)
        return Path(DEFAULT_RUN_DIR)
