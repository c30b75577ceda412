"""What is said and asked: questions on a terminal only, elsewhere the answer must be an option.

A terminal that was closed, or a pipe that nobody reads, never keeps anybody from what was begun.
"""

from __future__ import annotations

import contextlib
import os
import sys

import click

NOT_CONFIRMED = 2


def confirmed(question: str, *, yes: bool) -> bool:
    """Whether to go on. Without a terminal nobody can say yes but by --yes."""
    return yes or (sys.stdin.isatty() and click.confirm(question))


def typed(question: str) -> str:
    """What was typed; empty where there is no terminal."""
    return str(click.prompt(question, default="", show_default=False)).strip() if sys.stdin.isatty() else ""


def say(text: str, *, err: bool = False) -> None:
    """Print, and go on where nobody can read it any more: what is being done comes first."""
    try:
        click.echo(text, err=err)
    except OSError:
        deafen(2 if err else 1)


def deafen(fd: int) -> None:
    """Let a stream end nowhere, so that what is left in its buffer fails no more."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, fd)
        os.close(nowhere)
