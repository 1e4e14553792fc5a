"""A progress bar for long jobs: shown on terminals, silent elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

T = TypeVar("T")


def track(
    items: Iterable[T], description: str, *, total: int | None = None
) -> Iterator[T]:
    """Iterate with a progress bar on standard error.

    Args:
      items: What to go through.
      description: Said beside the bar.
      total: Number of items, where they have no length.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    console = Console(stderr=True)
    yield from rich_track(
        items, description, total=total, console=console, transient=True
    )


def say(line: object) -> None:
    """Print a line on standard error if it is a terminal."""
    if sys.stderr.isatty():
        Console(stderr=True, highlight=False).print(str(line))
