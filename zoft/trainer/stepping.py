"""The steps of a run: each is queried or read from the journal, counted, guarded and clipped."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from transformers.trainer_utils import default_compute_objective

from zoft.engines._optional import settle
from zoft.errors import NonFiniteLossError
from zoft.estimators._optional import KeepsAnchor
from zoft.estimators.base import scheduled
from zoft.estimators.nodes import Nodes
from zoft.journal.records import Record
from zoft.lm.logits.support import no_trials
from zoft.step.directions import StepDirections, replayed
from zoft.step.estimate import StepEstimate, clip
from zoft.step.parts import probes_at
from zoft.step.query import StepQueries
from zoft.step.update import Progress
from zoft.subspaces.nodes import NodeSpace
from zoft.trainer.batch import BatchSplitter, StepBatch
from zoft.trainer.forward import QueryForward
from zoft.trainer.grid import Grid
from zoft.trainer.guard import RolledBack, guard
from zoft.trainer.journaling import RunJournal
from zoft.trainer.loss import StepLoss, num_tokens

log = logging.getLogger(__name__)

_MARGIN = 1e5  # how much longer than a learning rate times coefficient an element of a step may be


class RunSteps:
    """Makes the estimate of each step, and keeps the counters of the run.

    Args:
        args: of the Trainer.
        queries: asks the model; it holds the optimizer, whose counters these are.
        directions: of every step.
        forward: finds out what a query may leave out.
        loss: of a step.
        journal: knows the steps of a run that goes on.
        grid: of processes: each has a part of a step's rows, or of its points, or of both.
    """

    def __init__(
        self,
        args: Any,
        queries: StepQueries,
        directions: StepDirections,
        forward: QueryForward,
        loss: StepLoss,
        journal: RunJournal,
        grid: Grid,
    ) -> None:
        self.args = args
        self.queries = queries
        self.optimizer = queries.optimizer
        self.directions = directions
        self.forward = forward
        self.loss = loss
        self.journal = journal
        self.grid = grid
        self.last_batch: StepBatch | None = None  # the rows that were queried last
        self._began: float | None = None  # on this process's clock, as if earlier sessions had been part of this one
        self._largest = _largest_number(queries.session.model)
        self._is_first = True  # whether the next step is the first of this training
        self._suspects: list[str] = []  # tensors that the step at hand may make infinite

    def next(self, batch: StepBatch, share_done: float) -> StepEstimate:
        """The estimate of the next step; the counters of the run have it.

        Args:
            batch: the rows of the step.
            share_done: of the run, for schedules of the estimator.
        """
        recorded = self.journal.next_record(self.optimizer.progress.steps)
        estimate = self._queried(batch, share_done) if recorded is None else self._replayed(*recorded)
        self.read_clock()
        return estimate

    def is_at_end(self, state: Any, ahead: int) -> bool:
        """Whether no step follows; a run ends early where lost probes were made once more, and the budget is spent.

        Args:
            state: of the Trainer; its number of steps is lowered where the budget does not pay for the next one.
            ahead: steps that are queried, and not counted by it yet.
        """
        progress, space, budget = self.optimizer.progress, self.optimizer.subspace, self.args.budget_queries
        estimator, end = self.queries.method.estimator, state.global_step + ahead
        if end < state.max_steps and isinstance(estimator, Nodes) and budget is not None:
            assert isinstance(space, NodeSpace)
            # those of a search for the rate are counted already
            if progress.num_queries + estimator.num_queries + probes_at(space, estimator, progress.steps) > budget:
                said = "probes that were not finite were made once more: the budget ends %d steps before the plan"
                log.warning(said, state.max_steps - end)
                state.max_steps = end
        return bool(end >= state.max_steps)

    # ---- queried -----------------------------------------------------------------------------------------------------

    def _queried(self, batch: StepBatch, share_done: float) -> StepEstimate:
        """The estimate of the next step, clipped and guarded."""
        if self.loss.asks_for_scaling:
            batch = self.loss.settle_scaling(batch)
        self._probe(batch)
        began, progress = time.perf_counter(), self.optimizer.progress
        asking = self.grid.asking(batch) if self.grid.world.count > 1 else nullcontext()
        with no_trials(), asking:
            estimate = self._ask(batch, share_done)
        progress.seconds_forward += time.perf_counter() - began
        progress.steps += 1
        progress.num_queries += estimate.num_queries
        tokens = num_tokens(map(self.forward.as_served, batch.micro_batches))  # of one query
        if self.grid.rows.count > 1:
            tokens = int(self.grid.rows.sum(torch.tensor(float(tokens))))
        progress.num_tokens += tokens * estimate.num_queries
        progress.losses.append(estimate.loss)
        self._count_skipped(estimate)
        if self.args.guard != "none":
            estimate = self._guarded(estimate)
        return clip(estimate, self.args.max_grad_norm) if self.args.max_grad_norm > 0 else estimate

    def _probe(self, batch: StepBatch) -> None:
        """What a model allows is found out before the queries, which must all be alike."""
        step = self.optimizer.progress.steps
        is_first, self._is_first = self._is_first, False
        if is_first:
            self.forward.probe_sizes()
        self.forward.probe(batch)
        if is_first:
            self.forward.check_narrow(batch)
        estimator = self.queries.method.estimator
        if isinstance(estimator, KeepsAnchor) and (count := estimator.batches_at(step)):
            for other in self.queries.batches(batch, count, step):
                self.forward.probe(other)

    def _ask(self, batch: StepBatch, share_done: float) -> StepEstimate:
        """The queries of the next step, in smaller micro-batches where memory does not suffice."""
        optimizer, args = self.optimizer, self.args
        directions, lr = self.directions.at(optimizer.progress.steps), optimizer.param_groups[0]["lr"]
        # eps has a schedule: by the run's length, or tied to the learning rate
        share_of_rate = lr / args.learning_rate if args.learning_rate else 1.0
        estimator = scheduled(self.queries.method.estimator, min(share_done, 1.0), share_of_rate)
        observed = optimizer.subspace.state_dict()

        def ask(part: StepBatch) -> StepEstimate:
            if part is not batch:  # asked again: what the first try has observed is forgotten
                optimizer.subspace.load_state_dict(observed)
            self.last_batch = part
            return self.queries.estimate(part, directions, estimator, lr=lr)

        if self.grid.world.count > 1:  # all must ask alike, and one cannot know that another has to ask again
            return ask(batch)
        splitter = BatchSplitter(optimizer.progress.num_parts)
        estimate = splitter(ask, batch)
        optimizer.progress.num_parts = splitter.parts
        return replace(estimate, num_parts=splitter.parts)

    def _count_skipped(self, estimate: StepEstimate) -> None:
        """A step whose losses are not finite does not reach the weights; many in a row end the run."""
        progress = self.optimizer.progress
        if estimate.is_usable:
            progress.skipped_in_a_row = 0
            return
        progress.num_skipped += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row >= self.args.max_skipped_steps:
            raise NonFiniteLossError(
                f"the loss was not finite in {progress.skipped_in_a_row} steps in a row (losses of the last: "
                f"{[round(x, 4) for x in estimate.losses.flatten().tolist()]}); the weights are those before them. "
                "Lower optimizer.learning_rate or estimator.eps, or load the model in float32"
            )

    # ---- guarded -----------------------------------------------------------------------------------------------------

    def _guarded(self, estimate: StepEstimate) -> StepEstimate:
        """What `guard` makes of a step far outside the running range; a step inside it becomes part of the range."""
        args, progress = self.args, self.optimizer.progress
        judged = guard(estimate, progress.recent, args.guard_factor)
        if judged.outlier is None:
            self._remember(judged)
            return judged
        if args.guard == "rollback":
            raise RolledBack(max(0, progress.steps - 1 - args.guard_back), f"step {progress.steps}: {judged.outlier}")
        progress.num_guarded += 1
        message = "step %d: %s; the step is shortened to %.2g of its length"
        log.warning(message, progress.steps, judged.outlier, judged.share)
        return judged

    def _remember(self, estimate: StepEstimate) -> None:
        """A step inside the running range becomes part of it."""
        progress = self.optimizer.progress
        if self.args.guard != "none" and estimate.projected_grads is not None and estimate.outlier is None:
            progress.recent = [*progress.recent, [estimate.loss, estimate.slope]][-self.args.guard_steps :]

    # ---- read from the journal ---------------------------------------------------------------------------------------

    def _replayed(self, record: Record, observed: bytes | None) -> StepEstimate:
        """The estimate of a step that the journal knows, counted as it was then."""
        progress = self.optimizer.progress
        estimate = replayed(self.optimizer, self.directions, record, observed)
        estimate = replace(estimate, num_queries=record.queries - progress.num_queries)
        progress.steps, progress.num_queries = record.step + 1, record.queries
        progress.num_tokens = record.tokens or progress.num_tokens
        progress.num_skipped += record.skipped
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if record.skipped else 0
        progress.losses.append(record.loss)
        progress.num_guarded += record.guarded
        progress.num_parts = estimate.num_parts
        self._remember(estimate)
        return estimate

    # ---- written -----------------------------------------------------------------------------------------------------

    def hand_over(self, estimate: StepEstimate, num_steps: int) -> None:
        """The step is about to be written into the weights: the journal has it first."""
        lr = float(self.optimizer.param_groups[0]["lr"])
        # it may be so long that the weights' dtypes do not hold it; how long a gradient's step is shows afterwards
        largest = max((1.0, *(abs(coefficient) for _, coefficient in estimate.terms or ())))
        if estimate.factors:  # no element of E^T X is larger than |E| |X|
            largest = float(_together([one.e.norm() * one.x.norm() for one in estimate.factors.values()]).max())
        is_huge = not abs(lr) * largest * _MARGIN <= self._largest or estimate.backward is not None
        self._suspects = list(self.queries.session.weights.tensors) if is_huge else []
        self.journal.append(estimate, lr, self.optimizer.progress, num_steps)

    def refuse_infinite_weights(self, estimate: StepEstimate | None) -> None:
        """End the run where a step of finite losses has made weights infinite: it was too long for their dtypes.

        In memory the weights are spoilt; the step is taken out of the journal, and nothing is saved of it.
        """
        suspects, self._suspects = self._suspects, []
        if not suspects or estimate is None or estimate.from_journal:
            return
        settle(self.queries.session)
        tensors = self.queries.session.weights.tensors
        if self.grid.holds(_are_finite([tensors[name].detach() for name in suspects])):
            return
        step = self.optimizer.progress.steps - 1
        self.journal.take_out(step)
        raise NonFiniteLossError(
            f"step {step} has made weights infinite (its losses were finite"
            f"{'' if estimate.projected_grads is None else f', its projected gradient {estimate.slope:.3g}'}): "
            "it was not kept, and the run's folder is as it was before it. "
            "Lower optimizer.learning_rate and repeat the command"
        )

    # ---- wall time ---------------------------------------------------------------------------------------------------

    def start_clock(self) -> None:
        """Training begins, or goes on: seconds of earlier sessions count."""
        self._began = time.perf_counter() - self.optimizer.progress.seconds

    def read_clock(self) -> None:
        """Bring the run's wall time up to now: everything since training began, over all resumes."""
        if self._began is not None:
            self.optimizer.progress.seconds = time.perf_counter() - self._began

    def pause_clock(self, seconds: float) -> None:
        """Time that was no part of the run (a diagnosis) does not count as its own."""
        if self._began is not None:
            self._began += seconds

    def stop_clock(self) -> None:
        """Training has ended: what comes after it takes no time of the run."""
        self._began = None


def _are_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether all numbers are: sums take one pass and no memory, and only finite numbers have a finite one."""
    if torch.isfinite(_together([tensor.sum(dtype=torch.float32) for tensor in tensors])).all():
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)  # a sum of large ones may be too large


def _together(numbers: list[torch.Tensor]) -> torch.Tensor:
    """Numbers of several tensors, on the device of the first: it is waited for once, and not for each."""
    return torch.stack([number.to(numbers[0].device) for number in numbers])


def _largest_number(model: torch.nn.Module) -> float:
    """What the narrowest dtype of a model's parameters can hold; the same in all processes of a pipeline."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return float(min(torch.finfo(dtype).max for dtype in dtypes))


def beside(trainer: Any) -> dict[str, Any]:
    """What a log line of training says beside losses and costs."""
    step = trainer.last_step
    facts = {"eps": trainer.method.estimator.radius if step is None else step.eps}
    if trainer.args.guard != "none":
        facts["num_guarded_steps"] = trainer.progress.num_guarded + trainer.journal.num_returns
    if trainer.peak_memory_mb is not None:
        facts["peak_memory_mb"] = trainer.peak_memory_mb()
    return facts | trainer.grid.traffic


_COUNTERS = ("num_queries", "num_tokens", "seconds")
"""Of a run, in each line of its log."""


def complete(logs: dict[str, Any], progress: Progress, estimate: StepEstimate | None, more: dict[str, Any]) -> None:
    """Add to a log line what the run has cost; to one of training, its mean loss since the last one, and the step's.

    Args:
        logs: of the Trainer; a line with ``loss`` is of training.
        progress: counters of the run; their losses are taken.
        estimate: of the last step.
        more: what a line of training says besides.
    """
    if "loss" in logs:
        finite = [loss for loss in progress.losses if math.isfinite(loss)]
        logs["loss"] = sum(finite) / len(finite) if finite else math.nan
        progress.losses.clear()
        if estimate is not None and estimate.projected_grads is not None:
            logs["projected_grad"] = estimate.slope
        logs["seconds_forward"] = progress.seconds_forward
        logs["seconds_other"] = progress.seconds - progress.seconds_forward
        logs["num_skipped_steps"] = progress.num_skipped
        logs |= more
    logs |= dict(zip(_COUNTERS, (progress.num_queries, progress.num_tokens, progress.seconds), strict=True))


def by_metrics(metrics: Mapping[str, float]) -> float:
    """What a search of hyper-parameters goes by: the loss, or the sum of the user's metrics, without our counters.

    Example:
        >>> by_metrics({"eval_loss": 0.5, "num_queries": 8, "num_tokens": 256, "seconds": 0.1})
        0.5
    """
    return float(default_compute_objective({key: metrics[key] for key in metrics if key not in _COUNTERS}))
