"""Every engine and subspace on every family of models, with forwards side by side and matrices in pieces."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch

from tests import models
from tests.contract.discovered import SUBSPACES, bind, example, serves, with_fields
from zoft.component import components
from zoft.subspaces import base
from zoft.weights.tensors import Weights

FAMILIES = models.EVERY | {
    "gemma": models.tiny_gemma,
    "gemma2": models.tiny_gemma2,
    "mixtral": models.tiny_mixtral,
    "vit": models.tiny_vit,
}
ENGINES = [name for name in components("engine") if name != "auto"]  # which is one of the others


def cells() -> list[tuple[str, str, str]]:
    """Every engine on every family in the full space; elsewhere every family, and the engines by turns.

    What a family asks of an engine is where its modules read their weights, which no subspace changes; what a subspace
    asks of it is met on several families.
    """
    combinations = []
    for subspace in SUBSPACES:
        serving = [engine for engine in ENGINES if serves(engine, "central", subspace)]
        turns = cycle(serving)
        combinations += [
            (engine, subspace, family)
            for family in FAMILIES
            for engine in (serving if subspace == "full" else [next(turns)])
        ]
    return combinations


@pytest.mark.parametrize(("engine", "subspace", "family"), cells())
def test_losses_are_those_of_perturbed_weights_and_nothing_stays_behind(engine, subspace, family, monkeypatch):
    """Also with dropout configured: the model is in evaluation mode, and stays in it."""
    monkeypatch.setattr(base, "_KEEP_MODELS", 0)  # no direction is kept: forwards go side by side
    model = FAMILIES[family]()
    batch = models.batch_for(model)
    estimator = with_fields(example("estimator", "central"), num_directions=2, eps=1e-2)
    session = bind(example("engine", engine), estimator, model, lambda b: model(**b).loss, "gaussian", subspace)
    if hasattr(session, "swapper"):
        session.swapper.piece_bytes = 700
        session.swapper.largest_output = 0
    digest = Weights(model).digest()
    states = [(sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    for step in range(2):  # the first looks for reads outside the modules, the second does not
        points = estimator.points(estimator.directions(3, step))
        if hasattr(session, "swapper"):
            session.swapper.largest_output = 0  # of the forward before: larger than these pieces
        losses = session.losses(batch, points)
        assert Weights(model).digest() == digest
        assert [(sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == states
        torch.testing.assert_close(losses, plainly(model, batch, session, points), rtol=1e-6, atol=0)


def plainly(model, batch, session, points) -> torch.Tensor:
    """The losses at weights that are written out."""
    clean = {name: p.data.clone() for name, p in session.weights.tensors.items()}
    losses = []
    for point in points:
        for name, tensor in session.weights.tensors.items():
            tensor.data = clean[name] + point.scale * session.coordinates.z(point.direction, name)
        with torch.no_grad():
            losses.append(model(**batch).loss)
        for name, tensor in session.weights.tensors.items():
            tensor.data = clean[name]
    return torch.stack(losses)
