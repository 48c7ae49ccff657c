"""Exact directional derivatives: dual numbers carried forward through the model, no graph, no eps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from zoft.engines.base import Engine, Objective, Session, memory_errors_say
from zoft.errors import UserError
from zoft.estimators.base import Point
from zoft.subspaces.base import BoundSubspace
from zoft.utils.lazy import Tensor, nn, torch


@dataclass
class ForwardMode(Engine):
    """Every trainable tensor W becomes the dual number W + e z; the loss's tangent is z^T grad L(theta).

    Attention runs in its plain form (the fused kernels have no forward derivative). Extra memory: z for every trainable
    tensor and the tangent of the activations in flight.

    References: Baydin et al. 2022 (Gradients without Backpropagation).
    """

    def bind(self, model: nn.Module, coordinates: BoundSubspace, objective: Objective) -> Session:
        """Duals are made for the length of one pass."""
        return _ForwardModeSession(model, coordinates, objective)


class _ForwardModeSession(Session):
    def losses(self, batch: Any, points: Sequence[Point]) -> Tensor:
        if any(point.direction is not None and not point.derivative for point in points):
            raise UserError("engine=forward_mode computes exact derivatives: use estimator=forward_gradient with it")
        with memory_errors_say("use estimator=central: it carries no tangents, and needs no z of every tensor at once"):
            return self._losses(batch, points)

    def _losses(self, batch: Any, points: Sequence[Point]) -> Tensor:
        results: list[Tensor | None] = []
        clean: Tensor | None = None
        for point in points:
            # one dual pass gives L and z^T grad L together: no forward for the clean point
            if point.direction is None:
                results.append(None)  # the clean loss comes with the first derivative
                continue
            clean, slope = self._loss_and_slope(batch, point)
            results.append(slope)
        if clean is None:
            clean = self.evaluate(batch)
        return torch.stack([clean if result is None else result for result in results])

    def _loss_and_slope(self, batch: Any, point: Point) -> tuple[Tensor, Tensor]:
        from torch.autograd import forward_ad
        from torch.nn.attention import SDPBackend, sdpa_kernel

        assert point.direction is not None
        # W + e z with e^2 = 0: the dual part of L(W + e z) is z^T grad L
        moving = [name for name in self.weights.tensors if self.coordinates.moves(point.direction, name)]
        # fused attention kernels have no forward derivative; the plain form is made of operations that have
        z = {name: self.coordinates.z(point.direction, name) for name in moving}
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), self._duals(z):
            loss = self.objective(batch)
            primal, tangent = forward_ad.unpack_dual(loss)
            if tangent is None:
                raise UserError(
                    "the objective has no derivative along the trainable weights: forward_gradient needs a "
                    "differentiable objective and weights that enter it; use estimator=central"
                )
            return primal.detach().to("cpu", torch.float32), tangent.detach().to("cpu", torch.float32)

    @contextmanager
    def _duals(self, z: dict[str, Tensor]) -> Iterator[None]:
        """Every owner of a trainable tensor sees its dual instead; the parameters are put back whatever happens."""
        from torch.autograd import forward_ad

        tensors = self.weights.tensors
        # z in float32 is cast to the weight's dtype: a dual number has one
        duals = {name: forward_ad.make_dual(tensors[name].data, z[name].to(tensors[name].dtype)) for name in z}
        held = [(module, a, name) for module, pairs in self.weights.owners.items() for a, name in pairs if name in z]
        try:
            for module, attr, name in held:  # into the dict itself: the order of parameters must not change
                module._parameters[attr] = duals[name]
            yield
        finally:
            for module, attr, name in held:
                module._parameters[attr] = tensors[name]
