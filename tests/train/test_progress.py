"""The line a person watches, and the clock behind it."""

import io
import math

import jax.numpy as jnp
import pytest

from sparsejax.train.progress import ProgressReport, StepTimer, clock, progress_line


class Clock:
    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_rates_and_time_left_exclude_pauses():
    now = Clock()
    timer = StepTimer(total_steps=10, now=now)
    with timer.pause():
        now.seconds += 50  # compilation
    for step in range(1, 5):
        now.seconds += 2
        timer.tick(step, tokens=100)
        if step == 2:
            with timer.pause(), timer.pause():
                now.seconds += 30  # evaluation
    assert timer.tokens_per_second == pytest.approx(50) and timer.step_seconds == pytest.approx(2)
    assert timer.seconds_left == pytest.approx(12)
    assert timer.seconds == pytest.approx(8)


def test_a_failure_inside_a_pause_ends_the_pause():
    now = Clock()
    timer = StepTimer(total_steps=1, now=now)
    with pytest.raises(OSError), timer.pause():
        now.seconds += 5
        raise OSError
    now.seconds += 1
    assert timer.seconds == pytest.approx(1)


def test_rates_follow_the_last_steps_and_a_resumed_run_counts_what_is_left():
    now = Clock()
    timer = StepTimer(total_steps=120, first_step=100, window=4, now=now)
    assert math.isnan(timer.seconds_left) and math.isnan(timer.tokens_per_second)
    for step, seconds in enumerate([9, 9, 9, 1, 1, 1, 1], start=101):
        now.seconds += seconds
        timer.tick(step, tokens=10)
    assert timer.tokens_per_second == pytest.approx(10) and timer.seconds_left == pytest.approx(13)


def test_the_line_shows_every_quantity_with_its_unit():
    values = {"loss_ema": 1.83421, "tokens_per_second": 12410.4, "mfu": math.nan, "zero_fraction": 0.931, "seconds_left": 151}
    line = progress_line(120, 2000, {**values, "learning_rate": 1e-3})
    assert line == "step   120/2,000   loss 1.8342   12,410 tokens/s   MFU nan   zeros 93.1 %   ETA 2:31"
    assert progress_line(1, 9, {"mfu": 0.4123}) == "step 1/9   MFU 41.2 %"


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0:00"), (59.6, "1:00"), (3661, "1:01:01"), (math.nan, "-:--")])
def test_clock_text(seconds, text):
    assert clock(seconds) == text


def test_a_pipe_gets_plain_lines_every_n_steps_and_the_last():
    stream = io.StringIO()
    with ProgressReport(7, every=3, stream=stream) as report:
        for step in range(1, 8):
            report.update(step, {"loss_ema": float(step)})
        report.print("saved [bold]")
    assert stream.getvalue().splitlines() == [
        "step 3/7   loss 3.0000", "step 6/7   loss 6.0000", "step 7/7   loss 7.0000", "saved [bold]"]  # fmt: skip


def test_a_terminal_gets_a_bar_below_the_lines():
    stream = Terminal()
    with ProgressReport(4, every=2, stream=stream) as report:
        for step in range(1, 5):
            report.update(step, {"loss_ema": 1.5, "seconds_left": 10.0})
    text = stream.getvalue()
    assert "step 2/4   loss 1.5000   ETA 0:10" in text and "━" in text
    assert text.endswith("\x1b[?25h") or "\x1b[?25h" in text  # the cursor is shown again


def test_hosts_other_than_the_first_print_nothing():
    stream = io.StringIO()
    with ProgressReport(1, every=1, stream=stream, enabled=False) as report:
        report.update(1, {"loss_ema": 1.0})
        report.print("x")
    assert stream.getvalue() == ""


def test_a_device_array_is_refused():
    with pytest.raises(TypeError, match="loss_ema"):
        progress_line(1, 2, {"loss_ema": jnp.float32(1)})
