"""One warning for a run that is ruined, flat, at chance, or moves no weight: what happened and what to try."""

from __future__ import annotations

import logging
import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zoft.lm.metrics.intervals import wilson

log = logging.getLogger(__name__)

RUINED_FACTOR, RUINED_NATS = 3.0, 10.0
"""A loss is ruined above this many times the first one plus this many nats."""

SKIPPED_SHARE, FEWEST_SKIPPED = 0.5, 3
"""A run is ruined too where this share of its steps, and at least this number, had a loss that is not finite."""

ROUNDING = 4 * 2**-23
"""Of a loss: points whose losses differ by no more (four units in the last place of float32) show no slope."""

CHANCE_SHARE = 0.25
"""Share of the budget after which an accuracy at chance level is said."""


class HealthCallback(TrainerCallback):
    """Watches what is logged and warns once of each kind.

    Args:
        chance: accuracy of a guess; None where the metric is another one.
        num_rows: rows that the accuracy on the way is measured on.
        asks_directions: whether a step asks for directions or makes probes, of which more would help.
        eps: radius of the directions; None where there is none.
    """

    def __init__(
        self, chance: float | None, num_rows: int, *, asks_directions: bool = True, eps: float | None = None
    ) -> None:
        self.chance = chance
        self.num_rows = num_rows
        self.eps = eps
        self.more = "more estimator.num_directions, " if asks_directions else ""
        self.first: float | None = None
        self.sees_slopes = False
        self.warned: set[str] = set()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Look at a row."""
        if not logs or not state.is_world_process_zero:
            return
        loss = logs.get("loss")
        if isinstance(loss, int | float) and math.isfinite(loss):
            self._loss(float(loss), args.learning_rate)
        skipped = logs.get("num_skipped_steps", 0)
        if skipped >= max(FEWEST_SKIPPED, SKIPPED_SHARE * state.global_step):
            self._ruined(f"the loss was no finite number in {skipped} of {state.global_step} steps", args.learning_rate)
        slope = logs.get("projected_grad")
        if slope is not None and self.eps and isinstance(loss, int | float):
            self.sees_slopes |= not 2 * self.eps * abs(slope) <= ROUNDING * abs(loss)  # NaN is another matter
        if slope is not None and self.eps and not self.sees_slopes and self._is_late(state):
            self._warn(
                "flat",
                f"the losses of a step's points differ by rounding alone: estimator.eps={self.eps:g} is too small for "
                f"what they resolve, and nothing is learnt; try estimator.eps={10 * self.eps:.3g}, or =auto",
            )
        accuracy = logs.get("eval_accuracy")
        if accuracy is not None and self._is_late(state):
            self._accuracy(float(accuracy), args.learning_rate)

    @staticmethod
    def _is_late(state: TrainerState) -> bool:
        return bool(state.max_steps) and state.global_step >= CHANCE_SHARE * state.max_steps

    def _loss(self, loss: float, rate: float) -> None:
        if self.first is None:
            self.first = loss
        elif loss > RUINED_FACTOR * abs(self.first) + RUINED_NATS:
            self._ruined(f"the loss went from {self.first:.4g} to {loss:.4g}", rate)

    def _ruined(self, what: str, rate: float) -> None:
        self._warn(
            "ruined",
            f"{what}: the run is ruined, its steps are too long; begin again with a tenth of the learning rate, "
            f"optimizer.learning_rate={rate / 10:.3g}",
        )

    def _accuracy(self, accuracy: float, rate: float) -> None:
        if self.chance is None or self.warned & {"ruined", "flat"}:  # which say more
            return
        low, high = wilson(accuracy * self.num_rows, self.num_rows)
        if low <= self.chance <= high:
            self._warn(
                "chance",
                f"after a quarter of the budget the dev accuracy, {100 * accuracy:.1f} %, cannot be told from guessing "
                f"({100 * self.chance:.1f} %): try another learning rate (optimizer.learning_rate={rate / 3:.3g} or "
                f"{rate * 3:.3g}), {self.more}or fewer trained weights (peft=lora)",
            )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            log.warning(text)


def warn_unmoved(before: str | None, after: str | None, steps: int, rate: float) -> None:
    """Say so where no weight has changed: the steps are lost in the weights' rounding, or are none.

    Args:
        before: a hash of the weights before training, :meth:`~zoft.weights.tensors.Weights.digest_above`; None where
            it is not known.
        after: after it.
        steps: of the run.
        rate: its learning rate.
    """
    if before is not None and before == after and steps:
        log.warning(
            "no weight has changed in %s steps, but for zeros: the steps are smaller than the weights' rounding; raise "
            "the learning rate, optimizer.learning_rate=%.3g",
            f"{steps:,}",
            rate * 10,
        )
