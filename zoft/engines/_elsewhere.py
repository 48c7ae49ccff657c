"""The engines whose forwards run elsewhere: a point is a set of adapter tensors, handed to another runtime."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

from zoft.engines._lockstep import Lockstep, together
from zoft.engines.base import Engine, Objective, Session, check_outputs, of_example, refuse_derivatives
from zoft.errors import UserError
from zoft.estimators.base import Estimator, Point
from zoft.subspaces.base import BoundSubspace
from zoft.utils.lazy import Tensor, nn, torch
from zoft.weights.elsewhere import answer_for
from zoft.weights.tensors import perturbed

Adapter = Mapping[str, "Tensor"]
"""The adapter tensors at one point, by their names in the model."""


@dataclass(frozen=True)
class ScoreRequest:
    """What one forward asks: :meth:`zoft.weights.elsewhere.Runtime.log_probs`, with an adapter."""

    adapter: Adapter
    inputs: Mapping[str, Any]
    row: Tensor
    column: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class WriteRequest:
    """What one forward asks: :meth:`zoft.weights.elsewhere.Runtime.write`, with an adapter."""

    adapter: Adapter
    prompts: Sequence[Sequence[int]]
    settings: Mapping[str, Any]


class Backend(Protocol):
    """Another runtime that holds the frozen part of a model and is handed adapters."""

    def scores(self, asked: Sequence[ScoreRequest]) -> list[Tensor]:
        """Log-probabilities for each, float32 [N, C] on the CPU."""

    def texts(self, asked: Sequence[WriteRequest]) -> list[list[list[int]]]:
        """The tokens written, for each and each of its prompts."""


@dataclass
class Elsewhere(Engine):
    """An engine whose forwards run in another runtime."""

    writes: ClassVar[bool] = False
    """Whether the other runtime generates text at a point."""

    holds_base: ClassVar[bool] = False
    """Whether the other runtime alone has the base, so that settings of how it is loaded here say nothing."""

    reads_masks: ClassVar[bool] = False
    """Whether the other runtime can be asked for a word at a mask; others score next tokens alone."""

    about_quantization: ClassVar[str] = ""
    """How the frozen weights are held in few bits with this engine."""

    def served_name(self) -> str:
        """The identity of a base that only the other runtime holds: a run is not resumed with another base."""
        raise NotImplementedError

    def base_mb(self) -> float:
        """MiB of this process's memory that the other runtime's base takes."""
        return 0.0

    def prepare(self) -> None:
        """Refuse, before anything is loaded, what only a run needs: packages, a server."""

    def check_method(self, method: Any) -> None:
        """Refuse what needs more than losses at points."""
        estimator, subspace = method.estimator, method.subspace
        check_outputs(self.name(), estimator)
        why = None
        if any(point.derivative for point in estimator.points(estimator.directions(0, 0))):
            why = f"estimator={estimator.name()} needs exact derivatives"
        elif estimator.backpropagates:
            why = f"estimator={estimator.name()} needs a backward pass"
        elif subspace.observes_at(0):
            why = f"subspace={subspace.name()} looks at the layers' inputs or gradients"
        if why is not None:
            raise UserError(
                f"engine={self.name()} evaluates losses in another runtime, and {why}: choose engine=auto, or a method "
                "that asks for losses alone (method=mezo)"
            )

    def check_objective(self, objective: Any) -> None:
        """Refuse an objective whose queries this engine cannot answer."""
        if objective.generates and not self.writes:
            raise UserError(
                f"engine={self.name()} scores tokens and writes no text, and objective={objective.name()} is computed "
                "from texts: use engine=auto or server, or an objective that scores tokens (objective=cross_entropy)"
            )
        if objective.forms and set(objective.forms) <= {"mask"} and not self.reads_masks:
            raise UserError(
                f"engine={self.name()} scores next tokens, and objective={objective.name()} reads a word at a mask: "
                "use engine=auto or onnx"
            )
        if objective.forms and set(objective.forms) <= {"head"}:
            raise UserError(
                f"engine={self.name()} scores tokens, and objective={objective.name()} reads a classification head: "
                "use engine=auto, or answers as words (task.prompt=aligned)"
            )

    def choose(self, estimator: Estimator, coordinates: BoundSubspace, model: nn.Module) -> Engine:
        """Itself, where nothing but an adapter is trained."""
        del estimator, model
        for name in coordinates.weights.tensors:
            if ".lora_" not in name:
                raise UserError(
                    f"engine={self.name()} hands adapters to another runtime, and {name} is trained, which is no part "
                    "of one: choose peft=lora trainable=adapter, or engine=auto"
                )
        return self

    def bind(self, model: nn.Module, coordinates: BoundSubspace, objective: Objective) -> Session:
        """A session that answers for the model from now on."""
        return ElsewhereSession(model, coordinates, objective, self.backend(model, coordinates), self)

    def backend(self, model: nn.Module, coordinates: BoundSubspace) -> Backend:
        """The backend that computes the forwards of this model."""
        raise NotImplementedError


_point: ContextVar[Point | None] = ContextVar("point", default=None)  # of the query in progress


class ElsewhereSession(Session):
    """Runs the objective once a point, side by side; where each asks for its model's outputs, all go out together.

    The objective is the house's own and runs here. What it asks of the model comes to :meth:`log_probs` and
    :meth:`write`, from evaluations too, which are at the weights as they are.

    Args:
        model: with its adapter.
        coordinates: the subspace bound to the adapter's tensors.
        objective: batch -> scalar loss.
        backend: the other runtime.
        engine: whose session this is.
    """

    def __init__(
        self, model: nn.Module, coordinates: BoundSubspace, objective: Objective, backend: Backend, engine: Elsewhere
    ) -> None:
        super().__init__(model, coordinates, objective)
        self.backend = backend
        self.name, self.writes = engine.name(), engine.writes
        self._lockstep = Lockstep()
        self._adapters: dict[Point, Adapter] = {}  # of the points in flight
        answer_for(model, self)

    # ---- losses ------------------------------------------------------------------------------------------------------

    def losses(self, batch: Any, points: Sequence[Point]) -> Tensor:
        """The objective at each point (see the base class)."""
        return torch.stack(self._asked([(batch, point) for point in points]))

    def losses_per_example(
        self, examples: Sequence[Any], points: Sequence[Point], numbers: Sequence[int] | None = None
    ) -> Tensor:
        """The objective of each example along its own directions, all of them side by side."""
        numbered = zip(examples, range(len(examples)) if numbers is None else numbers, strict=True)
        pairs = [(one, of_example(point, number)) for one, number in numbered for point in points]
        return torch.stack(self._asked(pairs)).view(len(examples), len(points)).T

    def _asked(self, pairs: list[tuple[Any, Point]]) -> list[Tensor]:
        refuse_derivatives([point for _, point in pairs], self.name)
        try:
            with torch.no_grad():
                losses: list[Tensor] = self._lockstep.run([partial(self._loss_at, *pair) for pair in pairs])
                return losses
        finally:
            self._adapters.clear()

    def _loss_at(self, batch: Any, point: Point) -> Tensor:
        token = _point.set(point)
        try:
            return self.objective(batch).detach().to("cpu", torch.float32)
        finally:
            _point.reset(token)

    # ---- what the objective asks of the model ------------------------------------------------------------------------

    def log_probs(self, inputs: Mapping[str, Any], row: Tensor, column: Tensor, tokens: Tensor) -> Tensor:
        """Asked for all points together; float32 [N, C]."""
        asked = ScoreRequest(self._adapter(), inputs, row, column, tokens)
        log_probs: Tensor = self._sync(asked, lambda every: self.backend.scores(every))
        return log_probs.to(tokens.device)

    def write(self, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[int]]:
        """Asked for all points together."""
        written: list[list[int]] = self._sync(
            WriteRequest(self._adapter(), prompts, settings), lambda every: self.backend.texts(every)
        )
        return written

    def _sync(self, asked: ScoreRequest | WriteRequest, batch_fn: Callable[[list[Any]], Sequence[Any]]) -> Any:
        with together():  # a text is one question here, however many tokens it has
            return self._lockstep.sync(type(asked).__name__, asked, batch_fn)

    def _adapter(self) -> Adapter:
        """The adapter at the point of this query; outside of one, as it is."""
        point = _point.get()
        if point is None:
            return {name: tensor.data for name, tensor in self.weights.tensors.items()}
        if point not in self._adapters:
            with torch.no_grad():
                self._adapters[point] = {name: self._at(name, point) for name in self.weights.tensors}
        return self._adapters[point]

    def _at(self, name: str, point: Point) -> Tensor:
        clean, direction = self.weights.tensors[name].data, point.direction
        if direction is None or not self.coordinates.moves(direction, name):
            return clean
        # W + s z
        return perturbed(clean, self.coordinates.z(direction, name), point.scale)


def saved_name(name: str) -> str:
    """As an adapter's file has it: without the adapter's own name.

    Example:
        >>> saved_name("base_model.model.lm.q_proj.lora_A.default.weight")
        'base_model.model.lm.q_proj.lora_A.weight'
    """
    *front, _adapter, last = name.split(".")
    return ".".join([*front, last])


def digest_of(adapter: Adapter) -> str:
    """A name for an adapter's numbers: other numbers have another one."""
    sha = hashlib.sha256()
    for name, tensor in adapter.items():
        sha.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:24]
