"""What a person watches while a run goes on: one line per stretch of steps, and on a terminal a bar below it.

    step 120/2,000   loss 1.8342   12,410 tokens/s   MFU nan   zeros 93.1 %   ETA 2:31

Nothing here touches a device: values come from `metrics.MetricStream` as plain numbers.
"""

from __future__ import annotations

import collections
import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class StepTimer:
    """Seconds, tokens and time left of the steps alone: compilation, evaluation and saving happen inside `pause`.

    The rate of the last `window` steps is reported, so that a slow start does not stay in the figure.
    """

    def __init__(
        self, total_steps: int, first_step: int = 0, window: int = 50, now: Callable[[], float] = time.perf_counter
    ) -> None:
        """Start the clock.

        Args:
          total_steps: steps of the whole run, those before a resume included.
          first_step: the step from which this process goes on.
          window: steps over which rates are taken.
          now: the clock, in seconds.
        """
        self._total_steps, self._step, self._now = total_steps, first_step, now
        self._start, self._paused, self._depth = now(), 0.0, 0
        self._tokens = 0
        self._marks = collections.deque([(0.0, 0)], maxlen=window + 1)  # (running seconds, tokens) after each step

    @property
    def seconds(self) -> float:
        """Seconds since the start without the pauses that have ended."""
        return self._now() - self._start - self._paused

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave what happens inside out of every rate; pauses may nest."""
        self._depth += 1
        start = self._now()
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._paused += self._now() - start

    def tick(self, step: int, tokens: int) -> None:
        """Count one finished step.

        Args:
          step: number of steps finished, of the whole run.
          tokens: tokens (examples, for images) in that step over all hosts.
        """
        self._step, self._tokens = step, self._tokens + tokens
        self._marks.append((self.seconds, self._tokens))

    @property
    def step_seconds(self) -> float:
        """Seconds per step over the window; nan before the first step."""
        (start, _), (end, _) = self._marks[0], self._marks[-1]
        return (end - start) / (len(self._marks) - 1) if len(self._marks) > 1 else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over the window; nan before the first step."""
        (start, before), (end, after) = self._marks[0], self._marks[-1]
        return (after - before) / (end - start) if end > start else math.nan

    @property
    def seconds_left(self) -> float:
        """Expected seconds of the steps that are left, pauses to come not included; nan before the first step."""
        return self.step_seconds * max(self._total_steps - self._step, 0)


def clock(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`, `-:--` where unknown."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


# Name in the record -> how it is printed, in this order; a metric that a record does not hold is left out of its line.
_COLUMNS: dict[str, Callable[[float], str]] = {
    "loss_ema": lambda v: f"loss {v:.4f}",
    "tokens_per_second": lambda v: f"{v:,.0f} tokens/s",
    "examples_per_second": lambda v: f"{v:,.0f} examples/s",
    "mfu": lambda v: "MFU nan" if math.isnan(v) else f"MFU {100 * v:.1f} %",
    "zero_fraction": lambda v: f"zeros {100 * v:.1f} %",
    "seconds_left": lambda v: f"ETA {clock(v)}",
}


def progress_line(step: int, total_steps: int, values: Mapping[str, float]) -> str:
    """One line of text for a step.

    Args:
      step: number of steps finished.
      total_steps: steps of the run.
      values: loss_ema, tokens_per_second or examples_per_second, mfu (fraction), zero_fraction, seconds_left; others are
        not shown.
    """
    width = len(f"{total_steps:,}")
    return "   ".join([f"step {step:>{width},}/{total_steps:,}", *_shown(values)])


def _shown(values: Mapping[str, Any]) -> list[str]:
    for name, value in values.items():
        if isinstance(value, jax.Array):
            raise TypeError(f"{name} is still on the device; it comes through MetricStream")
    return [show(float(values[name])) for name, show in _COLUMNS.items() if name in values]


class ProgressReport:
    """A line every `every` steps, and on a terminal a bar that is refreshed at most ten times a second.

    Used as a context manager, so that the terminal is restored whatever happens. Standard output that is a file or a pipe
    gets the lines alone, without control characters.
    """

    def __init__(
        self, total_steps: int, every: int, first_step: int = 0, stream: TextIO | None = None, enabled: bool = True
    ) -> None:
        """Prepare the report.

        Args:
          total_steps: steps of the whole run.
          every: steps between lines; the last step always has one.
          first_step: steps done before this process.
          stream: standard output unless given.
          enabled: False prints nothing (hosts other than the first).
        """
        self._total_steps, self._every = total_steps, max(every, 1)
        self._stream, self._enabled = stream or sys.stdout, enabled
        self._bar: Progress | None = None
        self._refreshed = 0.0
        if enabled and self._stream.isatty():
            text = TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[text]}", markup=False)
            self._bar = Progress(
                BarColumn(bar_width=None), text, console=Console(file=self._stream), auto_refresh=False, transient=True
            )
            self._task = self._bar.add_task("", total=total_steps, completed=first_step, text="")

    def __enter__(self) -> ProgressReport:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show the record of a finished step; see `progress_line` for the names."""
        if not self._enabled:
            return
        last = step == self._total_steps
        if last or step % self._every == 0:
            self.print(progress_line(step, self._total_steps, values))
        if self._bar and (last or time.monotonic() - self._refreshed > 0.1):
            self._refreshed = time.monotonic()
            short = {name: values[name] for name in ("loss_ema", "seconds_left") if name in values}
            self._bar.update(self._task, completed=step, text="   ".join(_shown(short)), refresh=True)

    def print(self, text: str) -> None:
        """Print text above the bar."""
        if not self._enabled:
            return
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)
