"""With blocks that move one at a time, the layers below run once a step, and nothing else changes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.models import EVERY, batch_for, tiny_llama
from zoft.engines.in_place import InPlace
from zoft.engines.layerwise import Layerwise
from zoft.engines.side_path import SidePath
from zoft.estimators.central import Central
from zoft.subspaces import base
from zoft.subspaces.blocks import Blocks
from zoft.weights import Weights

CENTRAL = Central(num_directions=2, eps=1e-2)


def bind(engine, model, calls_of_model=1):
    def objective(batch):
        return sum(model(**batch).loss for _ in range(calls_of_model))

    return engine.bind(model, Blocks().bind(Weights(model)), objective)


@pytest.mark.parametrize("keep", [0, 1 << 22], ids=["lockstep", "one by one"])
@pytest.mark.parametrize("engine", [Layerwise(), SidePath()], ids=lambda e: e.name())
@pytest.mark.parametrize("kind", EVERY)
def test_the_losses_are_those_of_whole_forwards(kind, engine, keep, monkeypatch):
    monkeypatch.setattr(base, "_KEEP_MODELS", keep)
    model = EVERY[kind]()
    batch, session, plain = batch_for(model), bind(engine, model, 2), bind(InPlace("copy"), model, 2)
    forwards = [vars(module).get("forward") for module in model.modules()]
    for step in range(6):  # every block of the model comes by
        points = CENTRAL.points(CENTRAL.directions(0, step))
        torch.testing.assert_close(session.losses(batch, points), plain.losses(batch, points), rtol=1e-6, atol=0)
    assert [vars(module).get("forward") for module in model.modules()] == forwards


def test_layers_below_the_block_run_once_for_all_queries():
    model = tiny_llama()
    session, runs = bind(Layerwise(), model), Counter()
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: runs.update([index]))
    batch = batch_for(model)
    session.losses(batch, CENTRAL.points(CENTRAL.directions(0, 0)))  # the first look takes whole forwards
    for step, wanted in ((0, [4, 4, 4]), (1, [1, 4, 4]), (2, [1, 1, 4])):
        runs.clear()
        session.losses(batch, CENTRAL.points(CENTRAL.directions(0, step)))
        assert [runs[index] for index in range(3)] == wanted


def test_what_moves_below_the_block_too_forbids_it(monkeypatch):
    """The last block of a pass holds the embeddings, which run first."""
    model = tiny_llama()
    session = bind(Layerwise(), model)
    runs = Counter()
    model.model.layers[0].mlp.register_forward_hook(lambda *_: runs.update("0"))
    session.losses(batch_for(model), CENTRAL.points(CENTRAL.directions(0, 0)))
    runs.clear()
    session.losses(batch_for(model), CENTRAL.points(CENTRAL.directions(0, 3)))
    assert runs["0"] == 4
