"""One warning for a run that is ruined, flat, at chance, or moves no weight: what happened and what to try."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback, TrainerState

from zoft.lm.metrics.intervals import wilson
from zoft.utils.lazy import Tensor
from zoft.utils.words import counted

log = logging.getLogger(__name__)

RUINED_FACTOR, RUINED_NATS = 3.0, 10.0
"""A loss is ruined above this many times the first one plus this many nats."""

SKIPPED_SHARE, FEWEST_SKIPPED = 0.5, 3
"""A run is ruined too where this share of its steps, and at least this number, had a loss that is not finite."""

ROUNDING = 4 * 2**-23
"""Of a loss: points whose losses differ by no more (four units in the last place of float32) show no slope."""

CHANCE_SHARE = 0.25
"""Share of the budget after which an accuracy at chance level is said, and slopes that are not there."""

UNMOVED_SHARE, FAR = 0.99, 100.0
"""Share of weights that stay as they were from which it is said; how many times the usual rate is far above it."""


@dataclass(eq=False)
class HealthCallback(TrainerCallback):
    """Watches what is logged and warns once of each kind."""

    chance: float | None  # accuracy of a guess; None where the metric is another one
    num_rows: int  # that the accuracy on the way is measured on
    more_of: str = "estimator.num_directions"  # the setting of which more would help; empty where nothing is drawn
    eps: float | None = None  # radius of the directions; None where there is none
    usual: float = 0.0  # learning rate of such a method; 0 where it is not known
    bounded: bool = False  # whether a bound sets the length of steps from that rate upwards
    has_adapter: bool = False
    last_step: Callable[[], Any] = lambda: None  # the estimate of the step that has just been taken
    first: float | None = None  # the untrained model's loss, or else the first that is logged
    sloped: int = 0  # the last step whose losses differed by more than rounding
    warned: set[str] = field(default_factory=set)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """See whether the step had a slope: rows are too rare for a run that its first step has ruined."""
        step = self.last_step()
        if step is not None and step.projected_grads is not None:
            self._slope(state.global_step, step.slope, step.loss)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        """Look at a row."""
        if not logs or not state.is_world_process_zero:
            return
        loss, slope = logs.get("loss", logs.get("eval_loss")), logs.get("projected_grad")
        if isinstance(loss, int | float) and math.isfinite(loss):
            self._loss(float(loss), args.learning_rate)
        skipped = logs.get("num_skipped_steps", 0)
        if skipped >= max(FEWEST_SKIPPED, SKIPPED_SHARE * state.global_step):
            self._ruined(f"the loss was no finite number in {skipped} of {state.global_step} steps", args.learning_rate)
        if slope is not None and self.eps and isinstance(loss, int | float):
            self._slope(state.global_step, slope, loss)
            if state.max_steps and state.global_step - self.sloped >= CHANCE_SHARE * state.max_steps:
                self._flat(args.learning_rate)
        accuracy = logs.get("eval_accuracy")
        is_late = bool(state.max_steps) and state.global_step >= CHANCE_SHARE * state.max_steps
        if accuracy is not None and is_late:
            self._accuracy(float(accuracy), args.learning_rate)

    def _slope(self, step: int, slope: float, loss: float) -> None:
        if self.eps and not 2 * self.eps * abs(slope) <= ROUNDING * abs(loss):  # NaN is another matter
            self.sloped = step

    def _flat(self, rate: float) -> None:
        if not self.sloped:
            self._warn(
                "flat",
                f"the losses of a step's points differ by rounding alone: estimator.eps={self.eps:g} is too small for "
                f"what they resolve, and nothing is learnt; try estimator.eps={10 * (self.eps or 0):.3g}, or =auto",
            )
        elif self._is_far(rate):  # at a rate that is usual, an objective in jumps may have none for a while
            self._ruined(f"the losses of a step's points have been equal since step {self.sloped}", rate)

    def _is_far(self, rate: float) -> bool:
        return 0 < FAR * self.usual < rate

    def _loss(self, loss: float, rate: float) -> None:
        if self.first is None:
            self.first = loss
        elif loss > RUINED_FACTOR * abs(self.first) + RUINED_NATS:
            self._ruined(f"the loss went from {self.first:.4g} to {loss:.4g}", rate)

    def _ruined(self, what: str, rate: float) -> None:
        self._warn(
            "ruined",
            f"{what}: the run is ruined, its steps are too long; begin again with a lower learning rate, "
            f"optimizer.learning_rate={self.usual if self._is_far(rate) else rate / 10:.3g}",
        )

    def _accuracy(self, accuracy: float, rate: float) -> None:
        if self.chance is None or self.warned & {"ruined", "flat"}:  # which say more
            return
        low, _ = wilson(accuracy * self.num_rows, self.num_rows)
        if low <= self.chance:
            more = f", or more {self.more_of}" * bool(self.more_of)
            fewer = ", or fewer trained weights (peft=lora)" * (not self.has_adapter)
            rates = f"{self.usual:.3g}" if self._is_far(rate) else f"{rate / 3:.3g} or {rate * 3:.3g}"
            if self.bounded and rate >= self.usual:  # any higher one is the same
                rates = f"{self.usual / 3:.3g}"
            self._warn(
                "chance",
                f"after a quarter of the budget the dev accuracy, {100 * accuracy:.1f} %, cannot be told from guessing "
                f"({100 * self.chance:.1f} %) or is below it: try another learning rate "
                f"(optimizer.learning_rate={rates}){more}{fewer}",
            )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            log.warning(text)


def warn_unmoved(
    before: Tensor, after: Tensor, steps: int, rate: float, *, partial: bool = False, flat: bool = False
) -> None:
    """Say so where (nearly) no weight has changed: the steps are lost in the weights' rounding, or are none.

    ``before`` and ``after`` are each a :meth:`~zoft.weights.tensors.Weights.sample`. Where ``partial``, as with a
    mask, steps leave most weights as they are; where ``flat``, all points of the last step had the same loss.
    """
    unmoved = float(((after - before).abs() <= 1e-12).double().mean())  # a zero that has become 1e-30 is as it was
    if steps and unmoved == 1 and flat:
        log.warning(
            "no weight has changed in %s: all points of the last step had the same loss, which says not where to go; "
            "take more rows a step (trainer.per_device_train_batch_size), a larger estimator.eps, or a finer objective",
            counted(steps, "steps"),
        )
    elif steps and unmoved > UNMOVED_SHARE and (unmoved == 1 or not partial):
        log.warning(
            "%s in %s: the steps are smaller than the weights' rounding; raise the learning rate, "
            "optimizer.learning_rate=%.3g",
            "no weight has changed" if unmoved == 1 else f"{100 * unmoved:.1f} % of the weights have not changed",
            counted(steps, "steps"),
            rate * 10,
        )
