"""The engine that fits what is asked for, what moves, and how much of the model that is."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.engines.base import Engine
from zoft.engines.forward_mode import ForwardMode
from zoft.engines.in_place import InPlace
from zoft.engines.layerwise import Layerwise
from zoft.engines.nodes import Nodes
from zoft.engines.side_path import SidePath
from zoft.estimators.base import Estimator
from zoft.estimators.nodes import Nodes as NodeEstimator
from zoft.noise.direction import Direction
from zoft.subspaces.base import BoundSubspace
from zoft.utils.lazy import nn

_FEW = 0.05  # of the model's numbers: adapters, norms and biases


@dataclass
class Auto(Engine):
    """Chooses the engine that fits the estimator, the directions and the share of the model that is trained.

    nodes for layers' outputs, forward_mode for exact derivatives, in_place for noise=torch_sequential and for a
    quantised model (its kernels round by all rows of a call, so points do not go together), side_path for low-rank
    directions and where 5 % of the model or less moves (adapters, norms), and layerwise otherwise.
    """

    def choose(self, estimator: Estimator, coordinates: BoundSubspace, model: nn.Module) -> Engine:
        """The engine for this estimator, these coordinates and this model."""
        # which direction does not matter here: whether it has factors is the subspace's law
        direction = Direction(0, 0)
        if isinstance(estimator, NodeEstimator):
            return Nodes()
        if any(point.derivative for point in estimator.points([direction] * estimator.num_directions)):
            return ForwardMode()
        if estimator.noise == "torch_sequential" or getattr(model, "is_quantized", False):
            return InPlace()
        # adapters, norms and biases: the linear layers do not move, and all points share their product
        names = coordinates.weights.tensors
        moving = sum(tensor.numel() for name, tensor in names.items() if coordinates.ever_moves(name))
        # low-rank directions U V^T: x W^T for all points at once, s (x V) U^T beside
        few = moving <= _FEW * sum(parameter.numel() for parameter in model.parameters())
        if few or any(coordinates.factors(direction, name) is not None for name in names):
            return SidePath()
        return Layerwise()
