"""The progress line: counted in queries, a bar on a terminal, a line every tenth elsewhere."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from zoft.report.console import ProgressCallback, say


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that only goes when it is told to."""
    fake = SimpleNamespace(now=100.0)
    monkeypatch.setattr("zoft.report.console.time.monotonic", lambda: fake.now)
    return fake


def args(**more: Any) -> Any:
    return SimpleNamespace(**{"disable_tqdm": False, "budget_queries": None, "metric_for_best_model": None, **more})


def train(
    progress: ProgressCallback, clock: Any, *, first: int = 0, last: int = 100, every: int = 10, **more: Any
) -> None:
    """One second a step, two queries a step, a log row every tenth step."""
    state, control, options = TrainerState(global_step=first, max_steps=last), TrainerControl(), args(**more)
    progress.on_train_begin(options, state, control)
    for step in range(first + 1, last + 1):
        progress.on_step_begin(options, state, control)
        clock.now += 1
        state.global_step = step
        progress.on_step_end(options, state, control)
        if step % every == 0:
            progress.on_log(options, state, control, logs={"loss": 1 / step, "num_queries": 2 * step})
            progress.on_log(options, state, control, logs={"eval_accuracy": 0.91, "num_queries": 2 * step})
    progress.on_train_end(options, state, control)


def test_a_pipe_gets_a_plain_line_every_tenth(clock: Any) -> None:
    stream = io.StringIO()
    train(ProgressCallback(2, peak_mb=lambda: 625.0, stream=stream), clock)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert "\r" not in stream.getvalue()
    assert lines[4] == "queries 100/200 | loss 0.020 | acc 91.0 % (dev) | 0.61 GiB peak | 2.0 q/s | 00:50<00:50"
    assert lines[-1].startswith("queries 200/200 | loss 0.010")
    assert lines[-1].endswith("01:40<00:00")


def test_a_slow_run_says_early_how_long_is_left_and_then_as_its_time_doubles(clock: Any) -> None:
    """1,000 steps of a second: a tenth is 100 of them, which in a run of days would be hours."""
    stream = io.StringIO()
    train(ProgressCallback(2, stream=stream), clock, last=1_000)
    lines = stream.getvalue().splitlines()
    assert [line.split(" | ")[0] for line in lines[:4]] == [f"queries {done}/2,000" for done in (120, 240, 440, 640)]
    assert lines[0].endswith("01:00<15:40")


def test_a_plain_line_is_one_line_where_columns_are_known(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = io.StringIO()
    train(ProgressCallback(2, peak_mb=lambda: 625.0, stream=stream), clock)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[4] == "queries 100/200 | loss 0.020 | acc 91.0 % (dev) | 0.61 GiB peak | 00:50<00:50"


def test_disable_tqdm_means_plain_lines_on_a_terminal_too(clock: Any) -> None:
    stream = Terminal()
    train(ProgressCallback(2, stream=stream), clock, disable_tqdm=True)
    assert len(stream.getvalue().splitlines()) == 10


def test_a_terminal_gets_a_bar_that_moves_every_step(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    train(ProgressCallback(2, stream=stream), clock, every=1000)
    counts = re.findall(r"queries ([\d,]+)/200", stream.getvalue())
    assert {int(count) for count in counts} == set(range(0, 201, 2))  # without any log row


def test_what_does_not_fit_is_left_out(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    train(ProgressCallback(2, peak_mb=lambda: 625.0, stream=stream), clock)
    last = stream.getvalue().rstrip().split("\r")[-1]
    assert last == "queries 200/200 | loss 0.010 | acc 91.0 % (dev) | 0.61 GiB peak | 01:40<00:00"


def test_a_resumed_run_counts_on_and_times_only_itself(clock: Any) -> None:
    progress = ProgressCallback(2, stream=io.StringIO())
    options, state = args(), TrainerState(global_step=50, max_steps=100)
    progress.on_train_begin(options, state, TrainerControl())
    clock.now, state.global_step = clock.now + 10, 60
    progress.on_step_end(options, state, TrainerControl())
    assert progress.text() == "queries 120/200 | 2.0 q/s | 00:10<00:40"


def test_a_log_rows_own_count_corrects_the_guess(clock: Any) -> None:
    progress = ProgressCallback(2, stream=io.StringIO())
    options, state = args(budget_queries=150), TrainerState(max_steps=100)
    progress.on_train_begin(options, state, TrainerControl())
    state.global_step = 10
    progress.on_log(options, state, TrainerControl(), logs={"num_queries": 33, "num_skipped_steps": 2})
    state.global_step = 12
    progress.on_step_end(options, state, TrainerControl())
    assert progress.text() == "queries 37/150 | 2 skipped"


def test_another_metric_is_called_by_its_name() -> None:
    progress = ProgressCallback(2)
    progress.on_log(args(metric_for_best_model="eval_f1"), TrainerState(), TrainerControl(), logs={"eval_f1": 0.8123})
    assert progress.text() == "queries 0/0 | f1 0.812 (dev)"


def test_other_processes_and_closing_twice_print_nothing(clock: Any) -> None:
    stream = io.StringIO()
    progress = ProgressCallback(2, stream=stream)
    options, state = args(), TrainerState(max_steps=10, is_world_process_zero=False)
    progress.on_train_begin(options, state, TrainerControl())
    progress.on_log(options, state, TrainerControl(), logs={"loss": 1.0})
    progress.on_step_end(options, state, TrainerControl())
    progress.on_train_end(options, state, TrainerControl())
    progress.close()
    assert stream.getvalue() == ""


def test_say_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    say("one line")
    assert capsys.readouterr() == ("one line\n", "")


def test_the_slope_and_what_diagnostics_measured_stand_on_the_line(clock: Any) -> None:
    measured: dict[str, float] = {}
    progress = ProgressCallback(2, before=30, snr=lambda: measured.get("snr"), stream=io.StringIO())
    options, state = args(), TrainerState(global_step=0, max_steps=100)
    progress.on_train_begin(options, state, TrainerControl())
    assert progress.text() == "queries 30/230"  # a search before the first step has made some
    progress.on_log(options, state, TrainerControl(), logs={"loss": 0.5, "projected_grad": 3.14159})
    assert progress.text() == "queries 30/230 | loss 0.500 | |g| 3.1"
    measured["snr"] = 0.271
    assert "| |g| 3.1 | snr 0.27" in progress.text()


def test_a_run_without_projected_gradients_shows_the_norm_of_its_estimate(clock: Any) -> None:
    progress = ProgressCallback(1, stream=io.StringIO())
    options, state = args(), TrainerState(global_step=0, max_steps=100)
    progress.on_train_begin(options, state, TrainerControl())
    progress.on_log(options, state, TrainerControl(), logs={"loss": 0.5, "grad_norm": 0.271828})
    assert progress.text() == "queries 0/100 | loss 0.500 | |g| 0.27"
