"""A method bound to model and rows: the optimizer that writes steps, and what makes their estimates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from zoft.engines._stage import Pipeline
from zoft.engines.base import Engine
from zoft.engines.nodes import NodeSession
from zoft.errors import refuse_ignored
from zoft.lm.data.rows import examples_of, groups_of, of_lengths
from zoft.noise.direction import step_seed
from zoft.step.directions import StepDirections
from zoft.step.estimate import StepEstimate
from zoft.step.method import Method
from zoft.step.nodes import NodeQueries
from zoft.step.query import StepQueries
from zoft.step.update import ZOOptimizer, decay_groups
from zoft.trainer.batch import Inputs, StepBatch
from zoft.trainer.loss import StepLoss, with_float32_losses
from zoft.trainer.processes import Processes
from zoft.trainer.protocol import HoldsObjects
from zoft.trainer.readout import TrainerReader
from zoft.trainer.stepping import RunSteps
from zoft.weights.rounding import Rounding, has_few_bits
from zoft.weights.tensors import Weights


def optimizer_of(
    trainer: HoldsObjects, model: nn.Module, next_estimate: Callable[[], StepEstimate]
) -> tuple[ZOOptimizer, str]:
    """The optimizer over the trained weights, and the name of the engine that serves.

    Args:
        trainer: of the run.
        model: whose weights are trained.
        next_estimate: what the Trainer's loop lets it apply.
    """
    args, method, loss = trainer.args, trainer.method, trainer.step_loss
    engine: Engine = trainer.stages.take()
    stage = engine.stage if isinstance(engine, Pipeline) else None
    weights, estimator = Weights(model), method.estimator
    coordinates = method.bind(weights)
    engine = engine.choose(estimator, coordinates, model)
    # only the last process of a pipeline comes to a loss
    objective = loss.of if stage is not None and not stage.is_last else with_float32_losses(loss.of)
    session = engine.bind(model, coordinates, objective)
    decayed = trainer.get_decay_parameter_names(model)
    if stage is None:  # of several stages one alone may have nothing that decays
        is_decaying = any(name in decayed and coordinates.ever_moves(name) for name in weights.tensors)
        _refuse_unread(args, method, weights, is_decaying=is_decaying)
    groups = decay_groups(weights, decayed, args.weight_decay)
    rounding = Rounding.chosen(args.precision_update, args.seed, estimator.noise)
    optimizer = ZOOptimizer(groups, method.optimizer, session, args.learning_rate, rounding, next_estimate)
    return optimizer, engine.name()


def _refuse_unread(args: Any, method: Method, weights: Weights, *, is_decaying: bool) -> None:
    """Refuse decay where nothing that decays moves, and ways to write 16 bits where no trained tensor has them."""
    usual = (method.optimizer.defaults()["weight_decay"], type(args).__dataclass_fields__["weight_decay"].default)
    if args.weight_decay and args.weight_decay not in usual and not is_decaying:
        refuse_ignored(
            f"optimizer.weight_decay={args.weight_decay} does nothing: norms and biases do not decay, and nothing else "
            "moves: leave it out"
        )
    if args.precision_update != "auto" and not any(map(has_few_bits, weights.tensors.values())):
        dtype = str(next(iter(weights.tensors.values())).dtype).removeprefix("torch.")
        refuse_ignored(
            f"precision.update={args.precision_update} does nothing: what is trained is in {dtype}, which takes steps "
            "as they are: leave it out"
        )


def steps_of(trainer: HoldsObjects, optimizer: ZOOptimizer) -> RunSteps:
    """The steps of a run: they ask the model, with what the method may want of the data and of the other processes.

    Raises:
        UserError: a method of one process in several.
    """
    args, method, loss, grid = trainer.args, trainer.method, trainer.step_loss, trainer.grid
    session, nodes, shares = optimizer.session, None, grid.shares()
    rows = StepRows(args, trainer.train_dataset, trainer.collated, loss, grid.rows)
    gather = None if grid.rows.count == 1 else grid.rows.gather
    if grid.world.count > 1:
        method.check_processes()
    grid.refuse_traces(session)
    if isinstance(session, NodeSession):
        nodes = NodeQueries(session, TrainerReader(trainer), gather, grid.rows.rank, shares)
    queries = StepQueries(
        method,
        optimizer,
        examples=rows.examples,
        each=lambda batch: replace(batch, of_each=True),
        select=rows.of_lengths,
        batches=rows.batches,
        average=loss.over_processes,
        agree=None if grid.world.count == 1 else grid.world.agree,
        gather=gather,
        places=rows.places,
        rank=grid.rows.rank,
        nodes=nodes,
        shares=shares,
    )
    directions = StepDirections(method.estimator, args.seed, trainer.direction_seeds)
    return RunSteps(args, queries, directions, trainer.query_forward, loss, trainer.journal, grid)


class StepRows:
    """Takes batches apart, and makes further ones.

    Args:
        args: of the Trainer: sizes of batches, and the seed.
        dataset: the training rows.
        collated: rows -> a micro-batch, on the device.
        loss: counts the labels of other rows than the step's.
        processes: each has rows of its own.
    """

    def __init__(
        self, args: Any, dataset: Any, collated: Callable[[Sequence[Any]], Inputs], loss: StepLoss, processes: Processes
    ) -> None:
        self.args = args
        self.dataset = dataset
        self.collated = collated
        self.loss = loss
        self.processes = processes

    def examples(self, batch: StepBatch) -> list[StepBatch]:
        """Batches of one example each."""
        return [self.loss.batch_of([one], batch) for inputs in batch.micro_batches for one in examples_of(inputs)]

    def of_lengths(self, batch: StepBatch, lengths: tuple[int, float]) -> StepBatch | None:
        """The rows of that many tokens (shortest, longest); None where there are none."""
        rows = [some for inputs in batch.micro_batches if (some := of_lengths(inputs, *lengths))]
        return self.loss.batch_of(rows, batch) if rows else None

    def batches(self, batch: StepBatch, count: int, step: int) -> Iterator[StepBatch]:
        """Batches of the training rows, in an order of their own.

        Args:
            batch: the step's.
            count: how many, or as many as the rows suffice for.
            step: number of the step; each has another order.
        """
        size, rows = self.args.per_device_train_batch_size, self.dataset
        of_step = size * self.args.gradient_accumulation_steps  # rows of this process in a step, however they are cut
        generator = torch.Generator().manual_seed(step_seed(self.args.seed, step))
        order = torch.randperm(len(rows), generator=generator).tolist()
        even = len(order) // self.processes.count * self.processes.count  # all processes have as many batches
        share = order[self.processes.rank : even : self.processes.count][: count * of_step]
        for first in range(0, len(share), of_step):
            indices = share[first : first + of_step]
            parts = [indices[start : start + size] for start in range(0, len(indices), size)]
            yield self.loss.batch_of([self.collated([rows[index] for index in part]) for part in parts], batch)

    def places(self, batch: StepBatch, count: int) -> list[list[int]]:
        """For every process, the places of its examples in the step's batch as one process would have it.

        A micro-batch of one process is cut into contiguous parts, one for each of several: their order is micro-batch,
        process, example.
        """
        if self.processes.count == 1:
            return [list(range(count))]
        counts = self.processes.gather([len(groups_of(inputs)) for inputs in batch.micro_batches])
        places: list[list[int]] = [[] for _ in counts]
        first = 0
        for micro_batch in range(max(map(len, counts))):
            for rank, of_rank in enumerate(counts):  # [processes][micro-batches]
                num_here = of_rank[micro_batch] if micro_batch < len(of_rank) else 0
                places[rank] += range(first, first + num_here)
                first += num_here
        return places
