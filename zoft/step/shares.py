"""Which points of a step each of several processes queries, and how the losses are gathered."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from zoft.errors import UserError
from zoft.estimators._optional import KeepsAnchor, NeedsBackward
from zoft.estimators.base import Estimator
from zoft.estimators.nodes import Nodes
from zoft.estimators.per_example import PerExample
from zoft.step.method import Method
from zoft.utils.lazy import Tensor, torch
from zoft.weightings.per_prompt import PerPrompt

PARALLEL = ("data", "directions", "both", "pipeline")
"""What processes divide: a step's rows, its points, rows and points (a grid), or the model."""

_STAGED = ("auto", "layerwise")
"""The engines whose numbers a pipeline has."""


@dataclass(frozen=True)
class Shares:
    """Deals numbered questions (points or probes) in contiguous runs to processes that have the same rows.

    Args:
        count: how many processes ask.
        rank: number of this one.
        gather: answers of this process, float64 -> those of each, of the same shape.

    Example:
        >>> [list(Shares(2, rank).questions(5)) for rank in (0, 1)]
        [[0, 1], [2, 3, 4]]
    """

    count: int = 1
    rank: int = 0
    gather: Callable[[Tensor], list[Tensor]] = lambda own: [own]

    def questions(self, number: int) -> range:
        """The questions that this process asks, of ``number``."""
        return self._of(self.rank, number)

    def joined(self, answers: Tensor, number: int) -> Tensor:
        """The answers to all questions, in their order: one gather of ``number / count`` answers.

        Args:
            answers: to those of :meth:`questions`, [questions, ...], on any device.
            number: of questions, [number, ...] comes back; bit for bit what each process has found.
        """
        if self.count == 1:
            return answers
        # float64 holds every float32 and bfloat16; the longest share decides the size, so that all are alike
        padded = answers.new_zeros(-(-number // self.count), *answers.shape[1:], dtype=torch.float64)
        padded[: len(answers)] = answers
        parts = [one[: len(self._of(rank, number))] for rank, one in enumerate(self.gather(padded))]
        return torch.cat(parts).to(answers.device, answers.dtype)

    def _of(self, rank: int, number: int) -> range:
        return range(rank * number // self.count, (rank + 1) * number // self.count)


def grid_of(parallel: str, directions: int, world: int, estimator: Estimator) -> tuple[int, int]:
    """(processes that divide rows, processes that have the same rows); their product is the world.

    Args:
        parallel: one of :data:`PARALLEL`.
        directions: processes that divide the points under ``both``; 0 for the others.
        world: how many processes there are.
        estimator: whose points or probes are divided.

    Raises:
        UserError: settings that do not go together, or a number that does not come out even.

    Example:
        >>> from zoft.estimators.central import Central
        >>> grid_of("both", 2, 4, Central(num_directions=3))
        (2, 2)
    """
    if parallel not in PARALLEL:
        raise UserError(f"trainer.parallel must be one of {', '.join(PARALLEL)}, got {parallel!r}")
    if parallel != "both":
        if directions:
            raise UserError(
                f"trainer.parallel_directions={directions} is a side of the grid of trainer.parallel=both, and "
                f"trainer.parallel={parallel} has none: leave it out"
            )
        directions = 1 if parallel == "data" else world
    elif directions < 1:
        raise UserError(
            "trainer.parallel=both is a grid of rows x directions: give trainer.parallel_directions, the number of "
            "processes that divide a step's points"
        )
    if world == 1:  # one process asks everything, whatever others would be asked
        return 1, 1
    if world % directions:
        raise UserError(
            f"trainer.parallel_directions={directions} does not divide the {world} processes that were started: start "
            f"a multiple of {directions}"
        )
    if directions > 1 and parallel != "pipeline":
        _check_even(directions, estimator)
    return world // directions, directions


def _check_even(processes: int, estimator: Estimator) -> None:
    """Every process asks as many perturbed points, or probes, as the others: the slowest one sets the pace."""
    if estimator.backpropagates or (isinstance(estimator, Nodes) and estimator.feedback == "exact"):
        raise UserError(
            f"estimator={estimator.name()} has a backward pass, which is no point that another process could ask: use "
            "trainer.parallel=data"
        )
    if isinstance(estimator, Nodes) and estimator.response == "identity":
        raise UserError(
            "estimator.response=identity makes no probes that processes could divide: use trainer.parallel=data, or "
            "estimator.response=learnt"
        )
    if isinstance(estimator, Nodes):
        counts = {"estimator.first": estimator.first}
        if estimator.every:
            counts["estimator.num_directions"] = estimator.num_directions
    else:
        points = estimator.points(estimator.directions(0, 0))
        perturbed = sum(point.direction is not None and not point.anchor for point in points)
        counts = {"estimator.num_directions": perturbed}
    for name, count in counts.items():
        if count % processes:
            what = f"{count} probes" if isinstance(estimator, Nodes) else f"{count} perturbed points"
            raise UserError(
                f"{processes} processes cannot divide the {what} of a step evenly (trainer.parallel): choose {name} so "
                f"that {processes} divides them, or start another number of processes"
            )


def check_pipeline(method: Method, engine: str, objective: Any, settings: Collection[str] = ()) -> None:
    """Refuse what needs tensors of several processes at once, or more than one call of the model for a loss.

    Args:
        method: what is trained with.
        engine: its name, as it was asked for.
        objective: the component, or None for the model's own loss.
        settings: that are on and call the model otherwise, as arguments.

    Raises:
        UserError: naming the part, and what to take instead.
    """
    subspace, estimator, weighting, optimizer = method.subspace, method.estimator, method.weighting, method.optimizer
    derivative = any(point.derivative for point in estimator.points(estimator.directions(0, 0)))
    writes = objective is not None and (objective.generates or objective.name() == "preference")
    refused = {
        f"estimator={estimator.name()} asks for more than losses of the batch along directions of the step": (
            isinstance(estimator, Nodes | NeedsBackward | KeepsAnchor | PerExample) or derivative
        ),
        f"only subspace=full is served, not subspace={subspace.name()}": subspace.name() != "full",
        "subspace.law=sphere scales directions over all tensors": subspace.law == "sphere",
        "estimator.noise=torch_sequential draws one tensor behind the other": estimator.noise != "counter",
        "estimator.across=orthogonal compares directions over all tensors": estimator.across == "orthogonal",
        f"weighting={weighting.name()} compares directions over all tensors": weighting.asks_gram,
        f"weighting={weighting.name()} reads the loss of each example": isinstance(weighting, PerPrompt),
        f"optimizer={optimizer.name()} shapes directions by the state of all tensors": optimizer.shapes_directions,
        f"engine={engine} computes the whole model": engine not in _STAGED,
        f"objective={writes and objective.name()} calls the model more than once for a loss": writes,
    } | {f"{setting} is about a whole model of plain tensors": True for setting in settings}
    why = next((why for why, is_so in refused.items() if is_so), None)
    if why is not None:
        raise UserError(
            f"trainer.parallel=pipeline gives every process some blocks of the model, and {why}: choose another one, "
            "or use trainer.parallel=data or directions"
        )
