"""Everything the contract tests run over: found by discovery, so that a new file is held to them unlisted."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn

from zoft.component import GROUPS, Component, components
from zoft.engines.base import Session
from zoft.errors import UserError
from zoft.noise import LAWS
from zoft.weights import Weights

NEEDS: dict[tuple[str, str], dict[str, Any]] = {("trainable", "regex"): {"pattern": "norm"}}
"""Fields without which a component cannot be made: (group, name) -> fields."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

EVERY = [(group, name) for group in GROUPS for name in components(group)]


def example(group: str, name: str, **fields: Any) -> Any:
    """A component with its defaults, and what it cannot do without."""
    return components(group)[name](**NEEDS.get((group, name), {}), **fields)


def with_fields(component: Component, **fields: Any) -> Any:
    """The same component with those of ``fields`` that it has."""
    import dataclasses

    known = {field.name for field in dataclasses.fields(component)}
    return dataclasses.replace(component, **{key: value for key, value in fields.items() if key in known})


def bind(engine: Any, estimator: Any, model: nn.Module, objective: Any, law: str, subspace: str = "full") -> Session:
    """An engine for an estimator, as the trainer binds them."""
    engine = engine.choose(estimator) if hasattr(engine, "choose") else engine
    space = with_fields(example("subspace", subspace), law=law)
    return engine.bind(model, space.bind(Weights(model), estimator.noise), objective)


@lru_cache
def serves(engine: str, estimator: str) -> bool:
    """Whether this engine computes what this estimator asks for; otherwise it refuses with a UserError."""
    layer = nn.Linear(2, 1)
    chosen = example("estimator", estimator)
    session = bind(example("engine", engine), chosen, layer, lambda x: layer(x).square().mean(), "gaussian")
    try:
        session.losses(torch.ones(1, 2), chosen.points(chosen.directions(0, 0)))
    except UserError:
        return False
    return True


PAIRS = [(e, s) for e in components("engine") for s in components("estimator") if serves(e, s)]
"""(engine, estimator) where the engine serves the estimator."""

__all__ = ["DTYPES", "EVERY", "LAWS", "NEEDS", "PAIRS", "bind", "example", "serves", "with_fields"]
