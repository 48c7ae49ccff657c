"""Objectives, node directions and offloaded blocks make nothing elsewhere: on cards that are not there."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.cards import register
from tests.contract.discovered import coordinates_of, example, with_fields
from tests.contract.test_nodes import only, queries
from tests.held_cards import held, put_on
from tests.models import batch_for, tiny_llama
from tests.unit.lm.objectives.test_each_example import OBJECTIVES
from tests.unit.lm.objectives.test_objectives_more import generated
from zoft.engines import _survey
from zoft.estimators.nodes import Nodes
from zoft.noise.direction import Direction


@pytest.fixture(autouse=True)
def a_card(monkeypatch):
    register()
    monkeypatch.setenv("ZOFT_COMPILE", "never")
    monkeypatch.setattr(_survey, "_global_state", lambda: None)  # it reads memory


@pytest.mark.parametrize(
    ("objective", "model", "batch"), OBJECTIVES, ids=lambda v: v.name() if hasattr(v, "name") else ""
)
def test_an_objective_computes_where_the_model_is(objective, model, batch):
    model = copy.deepcopy(model)
    if batch == "generated":
        rows, collate, _ = generated()
        batch = collate(rows)
    batch = {name: value for name, value in batch.items() if name != "packed"}
    with torch.no_grad():
        wanted = objective.loss(model, batch)
        with held():
            found = objective.loss(put_on(model, "card:0"), put_on(batch, "card:0"))
            assert float(found) == float(wanted)


@pytest.mark.parametrize("feedback", ["hidden", "loss"])
def test_node_directions_compute_where_the_model_is(feedback):
    model = only(tiny_llama(attn="eager"), "layers.2.mlp")
    batch, asked = batch_for(model), Nodes(feedback=feedback, first=2, every=int(feedback == "loss"))
    wanted = queries(copy.deepcopy(model), feedback)(batch, Direction(0, 0), asked)
    with held():
        found = queries(put_on(model, "card:0"), feedback)(put_on(batch, "card:0"), Direction(0, 0), asked)
        assert found.loss == wanted.loss
        for name, one in wanted.factors.items():
            assert found.factors[name].e.device.type == found.factors[name].x.device.type == "card"
            assert torch.equal(found.factors[name].e.cpu(), one.e)
            assert torch.equal(found.factors[name].x.cpu(), one.x)


def test_offloaded_blocks_compute_on_the_card():
    """Their copies are made by a thread, as a card's are."""
    model = tiny_llama(attn="eager")
    asked = with_fields(example("estimator", "central"), num_directions=2, eps=1e-2)

    def losses(model, batch):
        coordinates = coordinates_of("full", model, "gaussian")
        engine = example("engine", "offload", store="memory")
        session = engine.bind(model, coordinates, lambda b: model(**b, use_cache=False).loss)
        return [session.losses(batch, asked.points(asked.directions(3, step))).tolist() for step in range(2)]

    batch = batch_for(model)
    wanted = losses(copy.deepcopy(model), batch)
    with held():
        assert losses(put_on(model, "card:0"), put_on(batch, "card:0")) == wanted


def test_a_tensor_on_another_device_shows():
    with held(), pytest.raises(RuntimeError, match="at least two devices, cpu and card:0"):
        torch.empty(3, device="card:0") + torch.arange(3)
    with held(), pytest.raises(RuntimeError, match="at least two devices, card:1 and card:0"):
        torch.empty(3, device="card:0") + torch.empty(3, device="card:1")
