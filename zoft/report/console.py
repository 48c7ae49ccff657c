"""Progress on the terminal: a bar counted in queries, or plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zoft.report.text import duration, gib, say
from zoft.utils.terminal import columns, width_of

__all__ = ["ProgressCallback", "say"]

_REFRESH_SECONDS = 0.1  # of the bar: faster than the eye is wasted on steps of a millisecond
_LINE_SHARE = 0.1  # of the run: how often a plain line is printed
_FIRST_LINE = 60.0  # seconds: the latest time of the first one, which says how long is left; then as the time doubles
_BAR_CELLS = 10
# what a narrow terminal loses, in this order
_EXPENDABLE = ("bar", "snr", "slope", "rate", "skipped", "evaluation", "memory", "time")

_SHOWN = ("loss", "projected_grad", "grad_norm", "peak_memory_mb", "num_skipped_steps")  # of a log row


class ProgressCallback(TrainerCallback):
    """Takes the place of transformers' ProgressCallback and PrinterCallback; prints no raw dictionaries.

    On a terminal a bar, redrawn while steps pass; elsewhere (CI logs, pipes, `disable_tqdm`) a line every tenth, and
    in a slow run after one, two, four ... minutes:

        queries 1,240/2,000 | loss 0.412 | |g| 3.1 | acc 91.0 % (dev) | 0.61 GiB peak | 12.3 q/s | 01:12<00:44

    |g| is the root mean square of the projected gradients (of node directions the estimate's norm), behind it the
    signal-to-noise where diagnostics measure it. In a narrow terminal the drawn bar goes first, then these, then the
    rate. The rate and the time left count this session's steps and the evaluations between them.

    Args:
        queries_per_step: forward passes one optimizer step takes, all its micro-batches together; the mean where steps
            differ. Between two log rows the count goes by this; every log row's own `num_queries` corrects it.
        before: queries that were made before the first step.
        peak_mb: gives the run's peak memory so far in MiB; the log rows' `peak_memory_mb` when None.
        snr: gives the signal-to-noise of the last estimate that was measured; None where none is.
        split: what the evaluated rows are called.
        stream: where to draw; standard error when None.

    Example:
        >>> ProgressCallback(queries_per_step=2).text()
        'queries 0/0'
    """

    def __init__(
        self,
        queries_per_step: float,
        *,
        before: int = 0,
        peak_mb: Callable[[], float] | None = None,
        snr: Callable[[], float | None] | None = None,
        split: str = "dev",
        stream: TextIO | None = None,
    ) -> None:
        self.queries_per_step, self.before = queries_per_step, before
        self.split, self.snr = split, snr
        self._peak_mb, self._stream = peak_mb, stream
        self._bar: Any = None  # tqdm's, on a terminal only
        self._training = False
        self._total = self._done = self._first = 0  # queries; _first: already done when this session began
        self._logged = (0, 0)  # (step, queries) at the last row that had both
        self._values: dict[str, float] = {}  # the newest loss, peak_memory_mb and num_skipped_steps
        self._metric: tuple[str, float] | None = None
        self._batches = 0  # evaluated so far, while an evaluation runs
        self._began = self._drawn = self._next_time = 0.0  # _next_time: when a line is due whatever is done
        self._next_line = 0.0  # queries at which the next plain line is due

    def parts(self) -> dict[str, str]:
        """The figures of a progress line by name, in its order; those that are not known are left out."""
        parts = {"queries": f"queries {self._done:,}/{self._total:,}"}
        if "loss" in self._values:
            parts["loss"] = f"loss {self._values['loss']:.3f}"
        if (slope := self._values.get("projected_grad", self._values.get("grad_norm"))) is not None:
            parts["slope"] = f"|g| {slope:.2g}"
        if self.snr is not None and (snr := self.snr()) is not None:
            parts["snr"] = f"snr {snr:.2g}"
        if self._metric is not None:
            name, value = self._metric
            text = f"acc {100 * value:.1f} %" if name == "accuracy" else f"{name} {value:.3f}"
            parts["metric"] = f"{text} ({self.split})"
        peak = self._peak_mb() if self._peak_mb is not None else self._values.get("peak_memory_mb")
        if peak is not None:
            parts["memory"] = f"{gib(peak)} peak"
        if self._values.get("num_skipped_steps"):
            parts["skipped"] = f"{self._values['num_skipped_steps']:.0f} skipped"
        if self._batches:
            parts["evaluation"] = f"evaluating, batch {self._batches}"
        elapsed, fresh = time.monotonic() - self._began, self._done - self._first
        if self._training and fresh > 0 and elapsed > 0:
            parts["rate"] = f"{fresh / elapsed:.1f} q/s"
            left = max(0, self._total - self._done) * elapsed / fresh
            parts["time"] = f"{duration(elapsed)}<{duration(left)}"
        return parts

    def text(self) -> str:
        """The whole progress line."""
        return " | ".join(self.parts().values())

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar, at what a resumed run has already spent."""
        if not state.is_world_process_zero:
            return
        self.close()
        # What will really be spent: whole steps, and no more than either of the two limits allows.
        planned = self.before + round(state.max_steps * self.queries_per_step)
        self._total = min(planned, getattr(args, "budget_queries", None) or planned)
        self._first = self._done = self.before + round(state.global_step * self.queries_per_step)
        self._logged = (state.global_step, self._done)
        self._began, self._training, self._batches = time.monotonic(), True, 0
        self._next_line, self._next_time = self._done + _LINE_SHARE * self._total, self._began + _FIRST_LINE
        stream = self._stream or sys.stderr
        if stream.isatty() and not args.disable_tqdm:
            self._bar = tqdm(total=self._total, initial=self._done, file=stream, ncols=columns(stream), bar_format=" ")
            self._draw(force=True)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Print the plain line that came due: here, after the last step's log and evaluation rows came in."""
        is_due = self._done >= self._next_line or time.monotonic() >= self._next_time
        if self._training and self._bar is None and is_due:
            self._line()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count the step's queries."""
        if self._training:
            step, queries = self._logged
            self._done = queries + round((state.global_step - step) * self.queries_per_step)
            self._draw()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        """Take over the row's values."""
        if not logs or not state.is_world_process_zero:
            return
        self._values.update({name: logs[name] for name in _SHOWN if name in logs})
        best = (getattr(args, "metric_for_best_model", None) or "accuracy").removeprefix("eval_")
        for name in ("accuracy", best, "perplexity"):
            if f"eval_{name}" in logs and name != "loss":
                self._metric = (name, logs[f"eval_{name}"])
                break
        if self._training and "num_queries" in logs:
            self._done = int(logs["num_queries"])
            self._logged = (state.global_step, self._done)
        self._draw()

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Show that an evaluation goes on, so that the bar does not seem stuck."""
        if self._bar is not None:
            self._batches += 1
            self._draw()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The evaluation is over."""
        self._batches = 0
        self._draw()

    on_predict = on_evaluate

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Show where the run ended and leave that on the screen."""
        if self._training and self._bar is None:
            self._line()
        self.close()

    def close(self) -> None:
        """Let go of the terminal; to be called when training ends in an exception. Closing twice does nothing."""
        if self._bar is not None:
            self._draw(force=True)
            self._bar.close()
        self._bar, self._training = None, False

    def _line(self) -> None:
        stream = self._stream or sys.stderr
        width = width_of(stream)
        say(self.text() if width is None else " | ".join(_within(self.parts(), width).values()), stream)
        elapsed = time.monotonic() - self._began
        self._next_line = self._done + _LINE_SHARE * self._total
        self._next_time = self._began + max(_FIRST_LINE, 2 * elapsed)

    def _draw(self, force: bool = False) -> None:
        if self._bar is None or (not force and time.monotonic() - self._drawn < _REFRESH_SECONDS):
            return
        self._drawn = time.monotonic()
        parts = self.parts()
        first = parts.pop("queries")
        rest = _within({"queries": first, "bar": "x" * _BAR_CELLS, **parts}, columns(self._bar.fp) - 1)
        del rest["queries"]
        if "bar" in rest:
            rest["bar"] = f"{{bar:{_BAR_CELLS}}}"  # tqdm draws it, in blocks where the terminal's encoding has them
        self._bar.bar_format = " | ".join([first, *rest.values()])
        self._bar.ncols = columns(self._bar.fp)  # not tqdm's own measure, which draws nothing on a terminal that says 0
        self._bar.n, self._bar.total = self._done, max(self._total, self._done)
        self._bar.refresh()


def _within(parts: dict[str, str], width: int) -> dict[str, str]:
    """The parts that fit on a line of ``width`` characters; what says least goes first."""
    parts = dict(parts)
    for expendable in _EXPENDABLE:
        if len(" | ".join(parts.values())) <= width:
            break
        parts.pop(expendable, None)
    return parts
