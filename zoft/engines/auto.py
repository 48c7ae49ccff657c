"""The engine that fits: exact derivatives where they are asked for, MeZO's walk for MeZO's noise, else layerwise."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.engines.base import Engine
from zoft.engines.forward_mode import ForwardMode
from zoft.engines.in_place import InPlace
from zoft.engines.layerwise import Layerwise
from zoft.estimators.base import Estimator


@dataclass
class Auto(Engine):
    """Chooses forward_mode for exact derivatives, in_place for noise=torch_sequential, layerwise otherwise."""

    def choose(self, estimator: Estimator) -> Engine:
        """The engine for this estimator."""
        if any(point.derivative for point in estimator.points(estimator.directions(0, 0))):
            return ForwardMode()
        return InPlace() if estimator.noise == "torch_sequential" else Layerwise()
