"""With blocks that move one at a time, the layers below run once a step, and nothing else changes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.models import EVERY, batch_for, tiny_llama
from zoft.engines._frozen_prefix import FrozenPrefix
from zoft.engines.in_place import InPlace
from zoft.engines.layerwise import Layerwise
from zoft.engines.side_path import SidePath
from zoft.estimators.central import Central
from zoft.subspaces import base
from zoft.subspaces.blocks import Blocks
from zoft.weights.tensors import Weights

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


def test_an_objective_that_calls_the_model_differently_gets_what_it_asked_for():
    """The number of a call says nothing about its inputs: they are compared."""
    model = tiny_llama()
    first, second = batch_for(model, seed=0), batch_for(model, seed=1)
    calls = []

    def objective(_):
        calls.append(1)
        batches = [first, second] if len(calls) % 3 else [second, first, second]
        return sum((i + 1) * model(**batch).loss for i, batch in enumerate(batches))

    session = Layerwise().bind(model, Blocks().bind(Weights(model)), objective)
    plain = InPlace("copy").bind(model, Blocks().bind(Weights(model)), objective)
    points = CENTRAL.points(CENTRAL.directions(0, 2))
    session.losses(None, points)
    calls.clear()
    losses = session.losses(None, points)
    calls.clear()
    torch.testing.assert_close(losses, plain.losses(None, points), rtol=1e-6, atol=0)


def test_together_with_hidden_states_that_are_kept_for_the_whole_run():
    model = tiny_llama(num_hidden_layers=4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.2" in name or "layers.3" in name)
    coordinates = Blocks().bind(Weights(model))
    prefix = FrozenPrefix.of(model, Weights(model), 8)
    session = Layerwise().bind(model, coordinates, lambda batch: model(**batch).loss)
    plain = InPlace("copy").bind(model, coordinates, lambda batch: model(**batch).loss)
    runs = Counter()
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: runs.update([index]))
    for step in range(4):
        batch = batch_for(model, seed=step)
        points = CENTRAL.points(CENTRAL.directions(0, step))
        wanted = plain.losses(batch, points)
        runs.clear()
        with prefix.reused():
            losses = session.losses(batch, points)
        torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=0)
        if step == 3:  # the last block moves: below it one row after another was kept, and the rest ran once
            assert runs == {0: 3, 1: 3, 2: 1, 3: 4}


def test_every_call_of_the_model_in_an_objective_is_reused():
    model = tiny_llama()
    session, runs = bind(Layerwise(), model, 2), Counter()
    model.model.layers[0].mlp.register_forward_hook(lambda *_: runs.update("0"))
    session.losses(batch_for(model), CENTRAL.points(CENTRAL.directions(0, 2)))
    runs.clear()
    session.losses(batch_for(model), CENTRAL.points(CENTRAL.directions(0, 2)))
    assert runs["0"] == 2


def test_a_forward_of_the_users_own_stays():
    model = tiny_llama()
    forward = model.model.layers[0].forward
    model.model.layers[0].forward = forward
    session = bind(Layerwise(), model)
    prefix = FrozenPrefix(model, list(model.model.layers), 2, [], 1 << 20)
    for step in range(3):
        with prefix.reused():
            session.losses(batch_for(model), CENTRAL.points(CENTRAL.directions(0, step)))
    assert vars(model.model.layers[0])["forward"] == forward
    assert not any("forward" in vars(layer) for layer in model.model.layers[1:])
