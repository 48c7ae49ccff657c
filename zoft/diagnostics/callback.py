"""DiagnosticsCallback: a measurement of the estimate every few steps of any run, which leaves the run unchanged."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zoft.component import Memory
from zoft.diagnostics.measurement import Measurement, Wanted
from zoft.diagnostics.record import MeasurementFiles, read_rows, read_tables
from zoft.errors import UserError
from zoft.lm.logits.support import no_trials
from zoft.utils.random_state import global_random_state_kept

if TYPE_CHECKING:
    from zoft.trainer.trainer import ZOMixin

log = logging.getLogger(__name__)

RADII = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""The values of eps at which finite differences are compared with the exact derivative."""


class DiagnosticsCallback(TrainerCallback):
    """Measures what a run's estimates are worth, and writes diagnostics.csv, .json and .png into its folder.

    It looks between the queries of a step and its update: at the estimate that the optimizer is about to be handed, and
    at the weights that were queried. Weights, random states, journal, coefficients and query counts of the run are to
    the bit what they are without it; its own queries and seconds are counted apart. A step that is taken from the
    journal, or skipped, is not measured.

    Args:
        every: steps from one measurement to the next, at least 1; the first step is measured.
        gradient: whether the true gradient is computed, by backpropagation through one micro-batch at a time: the
            memory of a backward pass, and four bytes for every trained weight.
        num_probes: directions that are asked at the same weights, the step's own among them; 0: no more than those.
        eps: radii at which finite differences are compared with the exact derivative; empty: none.
        draw: whether the picture is drawn when training ends.

    Raises:
        UserError: numbers that cannot be; several processes.

    Example:
        >>> from zoft import ZOTrainer
        >>> ZOTrainer(model, args, callbacks=[DiagnosticsCallback(every=50)])  # doctest: +SKIP

    References: docs/diagnostics.md has the formula and the source of every number.
    """

    def __init__(
        self,
        every: int = 50,
        *,
        gradient: bool = True,
        num_probes: int = 16,
        eps: Sequence[float] = RADII,
        draw: bool = True,
    ) -> None:
        if every < 1:
            raise UserError(f"diagnostics.every must be at least 1, got {every}")
        if num_probes < 0:
            raise UserError(f"diagnostics.num_probes must be 0 or more, got {num_probes}")
        if not all(0 < value < math.inf for value in eps):
            raise UserError(f"diagnostics.eps must be > 0 and finite, got {list(eps)}")
        self.every, self.draw = every, draw
        self.wanted = Wanted(gradient, num_probes, tuple(float(value) for value in eps))
        self.trainer: ZOMixin | None = None
        self.record: MeasurementFiles | None = None
        self._remembered: dict[str, Memory] | None = None
        self.snr: float | None = None  # of the last measurement

    def watch(self, trainer: ZOMixin) -> None:
        """The trainer introduces itself, before training begins."""
        if trainer.args.world_size > 1:
            raise UserError(
                "diagnostics measure a run of one process: start it without torchrun, or leave them out "
                "(diagnostics=none)"
            )
        if trainer.engine.name() == "offload":
            raise UserError(
                "diagnostics perturb the whole model, and engine=offload has two blocks of it at hand: leave them out "
                "(diagnostics=none), or use engine=auto"
            )
        self.trainer = trainer

    @property
    def is_due(self) -> bool:
        """Whether this step is measured."""
        return self.trainer is not None and not self.trainer.state.global_step % self.every

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """New files, or those of the run that goes on."""
        if self.trainer is None:
            raise UserError("DiagnosticsCallback belongs to a trainer of zoft: use ZOTrainer, or ZOMixin beside yours")
        self.record = MeasurementFiles(Path(str(args.output_dir)), max(state.global_step, self.trainer.journal.end))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """What parts remember before the step."""
        if self.is_due:
            assert self.trainer is not None
            self._remembered = self.trainer.zo_optimizer.memory()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure, where it is time and there is an estimate that was queried."""
        trainer, record = self.trainer, self.record
        if not self.is_due or self._remembered is None:
            return
        assert trainer is not None
        assert record is not None
        estimate = trainer.last_step
        if estimate is None or estimate.from_journal or not estimate.is_usable:
            return
        began, num_notes = time.perf_counter(), len(record.notes)
        with global_random_state_kept(), trainer.query_forward.querying(), no_trials():
            row, tables = Measurement(trainer, self.wanted, self._remembered, record.notes)()
        took = time.perf_counter() - began
        record.add(row, tables, took)
        self.snr = row.get("snr")
        for note in record.notes[num_notes:]:
            log.warning("diagnostics: %s", note)
        trainer.run_steps.pause_clock(took)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draw the picture."""
        if self.draw and self.record is not None:
            from zoft.diagnostics.picture import draw_diagnostics

            folder = self.record.folder
            draw_diagnostics(folder, read_rows(folder), read_tables(folder))
