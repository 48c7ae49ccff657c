"""Everything the contract tests run over: found by discovery, so that a new file is held to them unlisted."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import pytest
from torch import bfloat16, float16, float32, nn, ones

from zoft.component import GROUPS, Component, components
from zoft.engines.base import Session
from zoft.errors import UserError
from zoft.estimators._optional import MeasuresCurvature
from zoft.estimators.nodes import Nodes
from zoft.optimizers._optional import ReadsFactors
from zoft.step.method import Method
from zoft.subspaces.base import BoundSubspace
from zoft.weights.tensors import Weights

NEEDS: dict[tuple[str, str], dict[str, Any]] = {("trainable", "regex"): {"pattern": "norm"}}
"""Fields without which a component cannot be made: (group, name) -> fields."""

OPTIMIZERS = [name for name, cls in components("optimizer").items() if not issubclass(cls, ReadsFactors)]
"""Those that work on a tensor's estimate; the others see factors of node gradients."""

DTYPES = {"fp32": float32, "bf16": bfloat16, "fp16": float16}

EVERY = [(group, name) for group in GROUPS for name in components(group)]

SUBSPACES = [name for name, cls in components("subspace").items() if not cls.moves_outputs]
"""Those with directions in the weights; node directions have tests of their own (test_nodes.py)."""

QUERYING = [
    name for name, cls in components("estimator").items() if not cls.backpropagates and not issubclass(cls, Nodes)
]
"""Estimators for which losses at points are all there is: every engine is asked for them."""


def example(group: str, name: str, **fields: Any) -> Any:
    """A component with its defaults, and what it cannot do without."""
    return components(group)[name](**NEEDS.get((group, name), {}), **fields)


def with_fields(component: Component, **fields: Any) -> Any:
    """The same component with those of ``fields`` that it has."""
    known = {field.name for field in dataclasses.fields(component)}
    return dataclasses.replace(component, **{key: value for key, value in fields.items() if key in known})


def coordinates_of(
    subspace: str, model: nn.Module, law: str, noise: str = "counter", interval: int = 2
) -> BoundSubspace:
    """A subspace bound to a model; what it keeps for some steps changes within the few steps of a test."""
    return small_subspace(subspace, law, interval).bind(Weights(model), noise)


def small_subspace(subspace: str, law: str, interval: int) -> Any:
    """A subspace whose rank the tensors of a test model exceed; where it does not draw by ``law``, by its own first."""
    laws = components("subspace")[subspace].laws
    law = law if law in laws else laws[0]
    return with_fields(example("subspace", subspace), law=law, interval=interval, rank=2)


def method(
    subspace="full",
    estimator="central",
    weighting="mean",
    optimizer="sgd",
    law="gaussian",
    interval=2,
    q=2,
    eps=1e-2,
    noise="counter",
) -> Method:
    """A composition of discovered parts, with the settings of a test; it makes up for what its optimizer needs."""
    if optimizer == "hessian" and not issubclass(components("estimator")[estimator], MeasuresCurvature):
        estimator = next(n for n, cls in components("estimator").items() if issubclass(cls, MeasuresCurvature))
    return Method(
        small_subspace(subspace, law, interval),
        with_fields(example("estimator", estimator), num_directions=q, eps=eps, noise=noise),
        example("weighting", weighting),
        example("optimizer", optimizer),
    )


def bind(
    engine: Any, estimator: Any, model: nn.Module, objective: Any, law: str, subspace: str = "full", interval: int = 2
) -> Session:
    """An engine for an estimator, as the trainer binds them."""
    coordinates = coordinates_of(subspace, model, law, estimator.noise, interval)
    return engine.choose(estimator, coordinates, model).bind(model, coordinates, objective)


@lru_cache
def serves(engine: str, estimator: str, subspace: str = "full") -> bool:
    """Whether this engine computes what this estimator asks for in this subspace; otherwise it refuses."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4))
    chosen = example("estimator", estimator)
    try:
        session = bind(
            example("engine", engine), chosen, model, lambda x: model(x).square().mean(), "gaussian", subspace
        )
        session.losses(ones(1, 4), chosen.points(chosen.directions(0, 0)))
    except UserError:
        return False
    return True


@lru_cache
def draws_from(subspace: str, noise: str) -> bool:
    """Whether this subspace draws its directions from this source; otherwise it refuses."""
    try:
        coordinates_of(subspace, nn.Sequential(nn.Linear(4, 4)), "gaussian", noise)
    except UserError:
        return False
    return True


def draws_by(subspace: str, law: str) -> bool:
    """Whether this subspace knows this law; :func:`small_subspace` takes one that it knows."""
    return law in components("subspace")[subspace].laws


ENGINES_SEE = ("central", "forward_gradient")
"""An estimator for each kind of point: all that an engine knows of it. They are tried in every subspace."""

WITH_CLEAN = "one_sided"
"""One that asks for the clean loss among the others: all that an engine sees of the rest of the estimators."""

CELLS = [
    (engine, estimator, subspace)
    for engine in components("engine")
    for estimator in QUERYING
    for subspace in SUBSPACES
    if (subspace == "full" or estimator in ENGINES_SEE)
    and (engine != "offload" or subspace in ("full", "low_rank"))  # it reads a subspace as layerwise does
    and serves(engine, estimator, subspace)
]
"""(engine, estimator, subspace) where the engine serves both."""

OWN_CELLS = [
    (engine, estimator, subspace)
    for engine, estimator, subspace in CELLS
    if engine != "auto" and (estimator in ENGINES_SEE or (subspace, estimator) == ("full", WITH_CLEAN))
]
"""Those in which an engine does something of its own: auto is one of the others, more points are more of the same."""


@lru_cache
def composes(**parts: str) -> bool:
    """Whether these parts make sense together; otherwise they are refused with a sentence."""
    try:
        method(**parts)
    except UserError:
        return False
    return True


PAIRS = [
    (optimizer, subspace)
    for optimizer in OPTIMIZERS
    for subspace in SUBSPACES
    if (subspace in ("full", "low_rank") or optimizer in ("sgd", "momentum"))
    and composes(optimizer=optimizer, subspace=subspace)
]
"""(optimizer, subspace): every optimizer in a fixed and in a changing basis, every subspace without and with state."""

own_cells = pytest.mark.parametrize(("engine", "estimator", "subspace"), OWN_CELLS)


def own_cells_with(name: str, *values: Any) -> Any:
    """Own cells with one axis more: all of its values in the full space, elsewhere one of them by turns.

    What an axis like the kind of model or the moment of a failure meets is the engine; that every subspace meets every
    value in some engine, and every engine every value in some subspace, is enough.
    """
    turns = itertools.cycle(values)
    rows = [(*cell, value) for cell in OWN_CELLS for value in (values if cell[2] == "full" else [next(turns)])]
    return pytest.mark.parametrize(("engine", "estimator", "subspace", name), rows)


def settings(subspace: str, *axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Values of several axes: all combinations in the full space, elsewhere at most one that is not its axis's first.

    Example:
        >>> settings("low_rank", "ab", "xy")
        [('a', 'x'), ('a', 'y'), ('b', 'x')]
    """
    values = [list(axis) for axis in axes]
    return [
        chosen
        for chosen in itertools.product(*values)
        if subspace == "full" or sum(value != axis[0] for value, axis in zip(chosen, values, strict=True)) <= 1
    ]
