"""Questions before what cannot be undone: asked on a terminal only; elsewhere the answer must be given as an option."""

from __future__ import annotations

import sys

import click

NOT_CONFIRMED = 2


def confirmed(question: str, *, yes: bool) -> bool:
    """Whether to go on. Without a terminal nobody can say yes but by --yes."""
    return yes or (sys.stdin.isatty() and click.confirm(question))


def typed(question: str) -> str:
    """What was typed; empty where there is no terminal."""
    return str(click.prompt(question, default="", show_default=False)).strip() if sys.stdin.isatty() else ""
