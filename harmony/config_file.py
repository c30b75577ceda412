"""Reads the configuration file. It checks nothing in it, and waits for nobody: a FIFO or a device is none."""

from __future__ import annotations

import os
import stat
import tomllib
from pathlib import Path

from harmony.errors import ConfigError

MAX_FILE_BYTES = 1024 * 1024


def read(path: str | Path) -> dict[str, object]:
    """The file as TOML gives it, nothing checked. Raises ConfigError, with line and column."""
    try:
        content = _bytes(path)
        return dict(tomllib.loads(content.decode("utf-8-sig")))  # editors of other systems begin with a BOM
    except OSError as e:
        raise ConfigError([f"{path}: cannot be read: {e.strerror or e}"]) from e
    except UnicodeDecodeError as e:
        raise ConfigError([f"{path}: not UTF-8: {e}"]) from e
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise ConfigError([f"{path}: not TOML: {e}"]) from e


def _bytes(path: str | Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ConfigError([f"{path}: no regular file: no configuration of Harmony"])
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError([f"{path}: longer than {MAX_FILE_BYTES} bytes: no configuration of Harmony"])
    return data
