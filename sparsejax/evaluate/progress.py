"""A bar with the time left, on standard error, so that results on standard output stay clean."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[int], None]


@contextlib.contextmanager
def progress_bar(
    title: str, total: int, stream: TextIO | None = None, *, unit: str = "tokens", doing: str = "scoring"
) -> Iterator[Advance]:
    """A function that takes the number of units just finished.

    On a terminal there is a bar that goes away; a file or a pipe gets one line when the work begins.

    Args:
      title: what is worked on.
      total: units in all.
      stream: standard error unless given.
      unit: what is counted, in the plural.
      doing: what the line says is done to `title`.
    """
    stream = stream or sys.stderr
    if not stream.isatty():
        print(f"{doing} {title}: {total:,} {unit}", file=stream, flush=True)
        yield _ignore
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit, markup=False),
        TimeElapsedColumn(),
        TextColumn("ETA", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda finished: bar.advance(task, finished)


@contextlib.contextmanager
def no_progress(title: str, total: int) -> Iterator[Advance]:
    """Silence, with the interface of `progress_bar`."""
    yield _ignore


def _ignore(finished: int) -> None:
    pass
