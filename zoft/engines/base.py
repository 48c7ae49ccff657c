"""The interface of every engine: losses at points, which leave the weights unchanged, and the writing of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from zoft.component import Component
from zoft.engines._optional import device_of
from zoft.errors import OutOfMemoryError, UserError
from zoft.estimators.base import Estimator, Point
from zoft.estimators.nodes import Nodes
from zoft.noise.direction import Direction
from zoft.noise.source import prepare
from zoft.subspaces._observes import ObservesInputs
from zoft.subspaces.base import BoundSubspace
from zoft.utils.lazy import Tensor, nn, torch
from zoft.weights.rounding import has_few_bits, round_stochastically

Objective = Callable[[Any], "Tensor"]
"""batch -> a scalar to minimise, at whatever the weights are while it runs."""


@dataclass
class Engine(Component):
    """How losses at points are computed."""

    def choose(self, estimator: Estimator, coordinates: BoundSubspace, model: nn.Module) -> Engine:
        """The engine that serves these: itself, unless it is ``auto``.

        Raises:
            UserError: it serves no such estimator.
        """
        del coordinates, model
        check_outputs(self.name(), estimator)
        return self

    def bind(self, model: nn.Module, coordinates: BoundSubspace, objective: Objective) -> Session:
        """This engine for a model, the coordinates that move in it, and the objective that is queried."""
        raise NotImplementedError


class Session:
    """An engine bound to a model.

    Args:
        model: the module whose weights move.
        coordinates: the subspace bound to its weights.
        objective: batch -> scalar loss.
    """

    def __init__(self, model: nn.Module, coordinates: BoundSubspace, objective: Objective) -> None:
        self.model = model
        self.coordinates = coordinates
        self.weights = coordinates.weights
        self.objective = objective
        self.anchor: dict[str, Tensor] | None = None  # earlier weights, for points that start from there
        self._evaluated = False
        # compiled noise is made once a device, before the first query
        for device in {device_of(self, name) for name in self.weights.tensors}:
            prepare(self.weights.num_elements, device)

    def losses(self, batch: Any, points: Sequence[Point]) -> Tensor:
        """The objective at each point; the weights are what they were before, also when the objective raises.

        Args:
            batch: handed to the objective as it is.
            points: where to evaluate.

        Returns:
            float32 [P] on the CPU, in the order of ``points``.
        """
        raise NotImplementedError

    def losses_per_example(
        self, examples: Sequence[Any], points: Sequence[Point], numbers: Sequence[int] | None = None
    ) -> Tensor:
        """The objective of each example alone, at points along directions of its own.

        Args:
            examples: batches of one example each, [B].
            points: where to evaluate; for each example along the directions with its number as ``example``.
            numbers: the examples' numbers; 0 to B - 1 if left out.

        Returns:
            float32 [P, B] on the CPU.
        """
        # examples of a batch by their numbers in the batch of all processes
        numbered = zip(examples, range(len(examples)) if numbers is None else numbers, strict=True)
        of_each = [self.losses(one, [of_example(p, number) for p in points]) for one, number in numbered]
        return torch.stack(of_each, dim=1)

    def keep_anchor(self) -> None:
        """Make a copy of the current weights the anchor."""
        self.anchor = {name: tensor.detach().clone() for name, tensor in self.weights.tensors.items()}

    @contextmanager
    def at_anchor(self) -> Iterator[None]:
        """Within this block the model has the anchor weights, or its own while there is no anchor."""
        if self.anchor is None:
            yield
            return
        current = {name: tensor.data for name, tensor in self.weights.tensors.items()}
        try:
            # .data is exchanged, nothing is copied: the anchor is a second set of weights in memory
            for name, tensor in self.weights.tensors.items():
                tensor.data = self.anchor[name]
            yield
        finally:
            for name, tensor in self.weights.tensors.items():
                tensor.data = current[name]

    def observe(self, batch: Any, direction: Direction) -> Tensor:
        """The clean loss, from a forward in which the subspace sees the inputs of the linear layers it asks for."""
        coordinates = self.coordinates
        assert isinstance(coordinates, ObservesInputs)
        names = coordinates.inputs_wanted(direction)

        def see(name: str) -> Callable[[Any, Any], None]:
            def hook(module: nn.Module, inputs: Any) -> None:
                del module
                with torch.inference_mode(False), torch.no_grad():
                    # what is observed outlives the query: it goes into a basis
                    x = inputs[0].detach()
                    coordinates.observe(direction, name, x.reshape(-1, x.shape[-1]).clone())

            return hook

        with ExitStack() as hooks:
            for module, held in self.weights.owners.items():
                for attribute, name in held:
                    if name in names and attribute == "weight":
                        hooks.enter_context(module.register_forward_pre_hook(see(name)))
            return self.evaluate(batch)

    def apply_(
        self,
        name: str,
        start: int,
        stop: int,
        step: Tensor,
        rounding_key: int | None = None,
        master: Tensor | None = None,
    ) -> None:
        """Subtract a step from the flat piece [start, stop) of tensor ``name``, rounding once to its dtype.

        Args:
            name: the tensor.
            start: first element of the piece.
            stop: one past the last.
            step: what to subtract, flat; may be overwritten.
            rounding_key: stream of bits for stochastic rounding into bfloat16 or float16; None rounds to nearest.
            master: the same piece in float32, flat: the step is taken there, and the weights become its nearest.
        """
        piece = self.piece(name, start, stop)
        # theta_32 <- theta_32 - step; theta <- round(theta_32)
        if master is not None:
            piece.copy_(master.sub_(step))
            return
        if rounding_key is not None and has_few_bits(piece):
            # theta - step in float32, then to a neighbour in bfloat16 or float16
            moved = step.to(torch.float32).neg_().add_(piece)
            piece.copy_(round_stochastically(moved, piece.dtype, rounding_key, start))
        # theta <- theta - step: one rounding, by the subtraction itself
        elif step.dtype == piece.dtype:
            piece.sub_(step)
        # the sum in the wider dtype, rounded once: twice would lose steps of half a unit
        else:
            wide = torch.promote_types(step.dtype, piece.dtype)
            piece.copy_(step.to(wide).neg_().add_(piece))

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """A view of the flat piece [start, stop) of tensor ``name``."""
        return self.weights.tensors[name].data.view(-1)[start:stop]

    def evaluate(self, batch: Any) -> Tensor:
        """One evaluation of the objective at the weights as they are: float32 scalar on the CPU, no graph."""
        # What a model makes once and keeps (rotary tables, ...) must be ordinary tensors: gradients may come later.
        once, self._evaluated = not self._evaluated, True
        with torch.no_grad() if once else torch.inference_mode():
            return self.objective(batch).detach().to("cpu", torch.float32)


@contextmanager
def memory_errors_say(mend: str) -> Iterator[None]:
    """An out-of-memory error is raised again with ``mend`` appended: which setting to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        message = str(error).strip().split("\n")[0] or "The process is out of memory."
        wanting = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        # torch says so in several words, by device and allocator
        if not wanting and not any(
            words in message for words in ("out of memory", "allocate memory", "not enough memory")
        ):
            raise
        raise OutOfMemoryError(
            f"{message} The weights are what they were. Lower trainer.per_device_train_batch_size, or {mend}"
        ) from error


def check_outputs(engine: str, estimator: Estimator) -> None:
    """Refuse an engine that perturbs weights where layers' outputs are perturbed, and the other one elsewhere."""
    if isinstance(estimator, Nodes) and engine not in ("auto", "nodes"):
        raise UserError(
            f"engine={engine} perturbs weights, and estimator={estimator.name()} perturbs layers' outputs: choose "
            "engine=auto"
        )
    if engine == "nodes" and not isinstance(estimator, Nodes):
        raise UserError(
            f"engine=nodes perturbs layers' outputs, and estimator={estimator.name()} moves weights: choose engine=auto"
        )


def of_example(point: Point, index: int) -> Point:
    """The point along one example's own version of its direction."""
    if point.direction is None:
        return point
    return replace(point, direction=replace(point.direction, example=index))


def refuse_derivatives(points: Sequence[Point], engine: str) -> None:
    """Refuse points that ask for exact derivatives, for engines that only evaluate losses."""
    for point in points:
        if point.derivative:
            raise UserError(f"engine={engine} evaluates losses; exact derivatives need engine=forward_mode (or auto)")
