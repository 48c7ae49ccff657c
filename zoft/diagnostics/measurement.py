"""One measurement of a step's estimate against the true gradient, on the step's batch, weights and directions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from zoft.component import Memory
from zoft.diagnostics.alignment import alignment, cosine_by_chance
from zoft.diagnostics.asking import Asking, further
from zoft.diagnostics.bystander import Bystander, mirrored
from zoft.diagnostics.gradient import Gradient, gradient_of
from zoft.diagnostics.probes import gram_summary, normalised, signal, true_slopes
from zoft.diagnostics.radius import exact_slopes, radius_table
from zoft.diagnostics.variance import Law, variance_table
from zoft.engines._backward import loss_with_graph
from zoft.errors import OutOfMemoryError, UserError
from zoft.estimators._optional import KeepsAnchor, NeedsBackward
from zoft.estimators.per_example import PerExample
from zoft.noise.direction import Direction
from zoft.report.backprop import backprop_parts_mb, model_shape
from zoft.step.method import BACKWARD, memory_of
from zoft.subspaces.base import BoundSubspace
from zoft.subspaces.full import Full
from zoft.trainer.batch import BatchSplitter, StepBatch

if TYPE_CHECKING:
    from zoft.trainer.trainer import ZOMixin

_MOST = 64  # directions whose inner products are taken at once
_ALONG = 2  # directions along which eps varies
_RIGHT_ANGLES = 1e-4  # cosines below this are rounding


@dataclass(frozen=True)
class Wanted:
    """What is measured.

    Args:
        gradient: whether the true gradient is computed by backpropagation.
        num_probes: directions that are queried in all, the step's own among them; 0: no more than those.
        eps: radii at which finite differences are compared with the exact derivative, beside the run's own.
    """

    gradient: bool = True
    num_probes: int = 16
    eps: tuple[float, ...] = ()


class Measurement:
    """A step of a run, measured between its queries and its update; the run is as before afterwards.

    Args:
        trainer: in the middle of a step: queried, and not written yet.
        wanted: what to measure.
        remembered: what estimator and weighting remembered before the step's queries.
        notes: takes what cannot be measured and why, each once.
    """

    def __init__(self, trainer: ZOMixin, wanted: Wanted, remembered: dict[str, Memory], notes: list[str]) -> None:
        self.trainer, self.wanted, self.notes = trainer, wanted, notes
        assert trainer.last_step is not None
        assert trainer.run_steps.last_batch is not None
        self.step, self.batch = trainer.last_step, trainer.run_steps.last_batch
        self.estimator = trainer.method.estimator.with_radius(self.step.eps)
        directions = list(self.step.directions)
        self.terms = list(self.step.terms or [])
        session = trainer.zo_optimizer.session
        run = session.coordinates
        given = trainer.direction_seeds is not None
        self.probes = further(directions, self._num_probes(run, directions[0]), self.estimator.noise, given=given)
        self.coordinates = mirrored(run, len(self.probes))
        self.session = Bystander(trainer.model, self.coordinates, session.objective)
        self.session.anchor = session.anchor
        points, losses = self.estimator.points(directions), self.step.losses
        if self._probes_tell and losses.shape == (len(points),):
            self.session.know(self.batch, points, losses)
        self.asking = Asking(trainer.run_steps.queries, self.session, self.batch, self.estimator, remembered)

    def __call__(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(one row of numbers, the tables)."""
        trainer, q = self.trainer, self.estimator.num_directions
        row: dict[str, Any] = {"step": trainer.state.global_step + 1, "num_queries": trainer.progress.num_queries}
        row |= {"num_directions": q, "eps": self.estimator.radius or None}
        tables: dict[str, Any] = {"step": row["step"]}
        gradient = self._gradient()
        aligned = alignment(self.coordinates, self.terms, self._dense(), gradient)
        row |= {"cosine": aligned.cosine, "estimate_norm": aligned.estimate_norm}
        row |= {"gradient_norm": aligned.gradient_norm, "norm_ratio": aligned.norm_ratio}
        if self.terms:
            row["cosine_by_chance"] = cosine_by_chance(len(self.terms), self._elements())
            gram = self._gram()
            row |= gram_summary(gram)
            tables["gram"] = normalised(gram).tolist()
            self._probe(row, tables, gram, gradient, aligned.gradient_norm)
        elif self.step.factors is not None and (self.wanted.num_probes or self.wanted.eps):
            self._note("node directions lie in no weights: num_probes and eps measure nothing of them")
        if self.wanted.eps:
            self._radius(row, tables, gradient)
        return row | {"diagnostics_queries": self.session.num_queries}, tables

    # ---- the estimate and the gradient -------------------------------------------------------------------------------

    def _gradient(self) -> Gradient | None:
        """The true gradient on the step's batch; None where it is not wanted, does not exist or does not fit."""
        if not self.wanted.gradient or not self._is_differentiable("the cosine to the true gradient"):
            return None
        if not self._fits():
            self._note("backpropagation does not fit in memory: no true gradient")
            return None
        try:
            return BatchSplitter()(self._gradient_over, self.batch)
        except OutOfMemoryError:
            self._note("backpropagation does not fit in memory: no true gradient")
        except UserError as error:
            self._note(f"no true gradient: {error}")
        return None

    def _gradient_over(self, batch: StepBatch) -> Gradient:
        """Of the micro-batches one by one, weighted as their losses are."""
        trainer = self.trainer
        counts = [trainer.step_loss.num_terms(inputs) for inputs in batch.micro_batches]
        adds_up = len(counts) == 1 or trainer.step_loss.is_a_share(batch)

        def parts() -> Iterator[tuple[StepBatch, float]]:
            for inputs, count in zip(batch.micro_batches, counts, strict=True):
                self.session.num_queries += BACKWARD
                yield StepBatch([inputs], batch.num_items), 1.0 if adds_up else count / sum(counts)

        return gradient_of(self.session, parts())

    def _dense(self) -> Gradient | None:
        """What a backward pass of the estimator's own adds to the estimate, computed as in the step."""
        estimator = self.estimator
        if self.step.factors is not None:
            return {name: factor.dense().reshape(-1) for name, factor in self.step.factors.items()}
        if self.step.backward is None:
            return None
        assert isinstance(estimator, NeedsBackward)
        select, dense = self.trainer.run_steps.queries.select, {}
        queried = bool(estimator.points(self.probes)) and select(self.batch, estimator.queried_lengths) is not None
        share = estimator.share_of_backward(queried)
        near = select(self.batch, estimator.backpropagated_lengths)
        _, run = loss_with_graph(self.session, near, frozenset(self.coordinates.backprop_names) or None)
        self.session.num_queries += BACKWARD

        def take(name: str, gradient: Tensor) -> None:
            dense[name] = gradient.mul(share).reshape(-1).float()

        run(take)
        return dense

    def _fits(self) -> bool:
        """Whether one row's backward pass and the gradient would fit, as far as that can be known."""
        weights = self.coordinates.weights
        memory = memory_of(next(iter(weights.tensors.values())).device)
        shape, ids = model_shape(self.trainer.model, weights.num_elements), self.batch.micro_batches[0].get("input_ids")
        if memory is None or shape is None or not isinstance(ids, Tensor):
            return True
        parts = backprop_parts_mb(shape, batch=1, seq=ids.shape[-1])
        return (sum(parts.values()) - parts["optimizer"]) * 2**20 + 4 * weights.num_elements < memory

    # ---- probes ------------------------------------------------------------------------------------------------------

    @property
    def _probes_tell(self) -> bool:
        """Whether more directions can be asked of this step's batch."""
        estimator = self.estimator
        makes_anchor = isinstance(estimator, KeepsAnchor) and estimator.batches_at(self.step.step) > 0
        return not (estimator.backpropagates or makes_anchor)

    def _num_probes(self, coordinates: BoundSubspace, direction: Direction) -> int:
        """A multiple of the step's own q; as many as wanted, as exist, and as are asked at once."""
        q, wanted = self.estimator.num_directions, self.wanted.num_probes
        if not self._probes_tell:
            if wanted and not self.estimator.backpropagates:
                self._note("steps whose losses are averaged over several batches are asked no further probes")
            return q
        if self.estimator.across == "orthogonal":
            wanted = min(wanted, coordinates.dimension(direction))
        if isinstance(self.estimator, PerExample):
            wanted = min(wanted, _MOST * q // max(1, len(self.terms)))
        return max(1, -(-wanted // q) if self.estimator.across != "orthogonal" else wanted // q) * q

    def _gram(self) -> Tensor:
        reads_terms = isinstance(self.estimator, PerExample) or not self._probes_tell
        directions = [direction for direction, _ in self.terms] if reads_terms else self.probes
        return self.coordinates.gram(directions[:_MOST])

    def _probe(
        self, row: dict[str, Any], tables: dict[str, Any], gram: Tensor, gradient: Gradient | None, norm: float | None
    ) -> None:
        """Signal-to-noise, and variance against q."""
        if not self._probes_tell:
            return
        slopes = self.asking.all_slopes(self.probes)
        row["num_probes"] = len(slopes)
        if not len(slopes):
            return
        row |= signal(slopes)
        if not self.wanted.num_probes:
            return

        def along(directions: Any) -> Tensor:
            assert gradient is not None
            return true_slopes(self.coordinates, gradient, directions)

        exact = None if gradient is None else along
        square = slopes.double().square() if exact is None else exact(self.probes).square()
        tables["variance"] = variance_table(
            self.probes,
            self.asking,
            self.coordinates.gram,
            self.asking.sizes(len(self.probes)),
            exact,
            norm,
            self._law(gram, float(square.mean()) if norm is None or not self._is_full else norm**2),
        )

    @property
    def _is_full(self) -> bool:
        return isinstance(self.trainer.method.subspace, Full)

    def _law(self, gram: Tensor, slope_square: float) -> Law | None:
        """What theory needs; None where it says nothing of this method."""
        method, estimator = self.trainer.method, self.estimator
        has_slopes = estimator.measures_slopes and not isinstance(estimator, (PerExample, KeepsAnchor))
        if not has_slopes or method.weighting.name() != "mean" or method.optimizer.shapes_directions:
            return None
        dimension = self.coordinates.dimension(self.probes[0])
        off = gram_summary(gram)["gram_offdiagonal"]
        across = "gaussian" if method.subspace.law == "gaussian" else "length"
        if off is not None and off < _RIGHT_ANGLES:
            across = "orthogonal"
        square = float(dimension) if self._is_full else float(gram.diagonal().mean())
        return Law(across, dimension, square, slope_square, estimator.across == "antithetic")

    def _elements(self) -> int:
        """Trained weights, moving in this step or not: what the gradient is of."""
        return self.coordinates.weights.num_elements

    # ---- eps ---------------------------------------------------------------------------------------------------------

    def _radius(self, row: dict[str, Any], tables: dict[str, Any], gradient: Gradient | None) -> None:
        if self.step.factors is not None or not self._is_differentiable("the error of finite differences"):
            return  # eps of node directions is in units of outputs, and these are differences along weights
        directions = self.probes[:: 2 if self.estimator.across == "antithetic" else 1][:_ALONG]
        exact, source = exact_slopes(self.session, self.batch, directions), "jvp"
        if exact is None and gradient is not None:
            exact, source = true_slopes(self.coordinates, gradient, directions), "gradient"
        if exact is None:
            self._note("the loss has no forward derivative here: finite differences have nothing to be held to")
            return
        radius = self.estimator.radius
        radii = [*self.wanted.eps, *([radius] if radius else [])]
        table = radius_table(self.session, self.batch, directions, self.estimator, exact, radii)
        tables["radius"] = {"exact": source, "num_directions": len(directions), "rows": table}
        row["fd_error_at_eps"] = next((one["error"] for one in table if one["eps"] == radius), None)
        best = min(table, key=lambda one: one["error"])
        row |= {"best_eps": best["eps"], "fd_error_at_best_eps": best["error"]}

    # ---- what cannot be measured -------------------------------------------------------------------------------------

    def _is_differentiable(self, what: str) -> bool:
        objective = self.trainer.zo_objective
        if objective is None or objective.differentiable:
            return True
        self._note(f"objective={objective.name()} has no gradient: {what} is left out")
        return False

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
