"""What reads what it computes makes nothing elsewhere: objectives, nodes, blocks, subspaces that choose."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.cards import register
from tests.contract.discovered import coordinates_of, example, with_fields
from tests.contract.test_nodes import only, queries
from tests.held_cards import held, put_on
from tests.invariant.walk_devices import ENGINES, READS_VALUES
from tests.models import batch_for, tiny_llama
from tests.unit.lm.objectives.test_each_example import OBJECTIVES
from tests.unit.lm.objectives.test_objectives_more import generated, pair_rows
from zoft.engines import _survey
from zoft.estimators.nodes import Nodes
from zoft.lm.data.encoding import PairCollator
from zoft.lm.objectives.preference import Preference, keep_reference
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
            loss = objective.loss(put_on(model, "card:0"), put_on(batch, "card:0"))
            assert float(loss) == float(wanted)


@pytest.mark.parametrize("feedback", ["hidden", "loss"])
def test_node_directions_compute_where_the_model_is(feedback):
    model = only(tiny_llama(attn="eager"), "layers.2.mlp")
    batch, asked = batch_for(model), Nodes(feedback=feedback, first=2, every=int(feedback == "loss"))
    wanted = queries(copy.deepcopy(model), feedback)(batch, Direction(0, 0), asked)
    with held():
        estimate = queries(put_on(model, "card:0"), feedback)(put_on(batch, "card:0"), Direction(0, 0), asked)
        assert estimate.loss == wanted.loss
        for name, one in wanted.factors.items():
            assert estimate.factors[name].e.device.type == estimate.factors[name].x.device.type == "card"
            torch.testing.assert_close(estimate.factors[name].e.cpu(), one.e)
            torch.testing.assert_close(estimate.factors[name].x.cpu(), one.x)


def test_a_preference_computes_where_the_model_is():
    """Its reference too, which is kept as numbers."""
    model, moved, collate = tiny_llama(), tiny_llama(seed=1), PairCollator(1)

    def losses(start, model, device):
        rows = pair_rows()
        list(keep_reference(start, rows, collate, batch_size=1))
        with torch.no_grad():
            return float(Preference().loss(model, put_on(collate(rows), device))), rows[0]["reference"]

    wanted = losses(copy.deepcopy(model), copy.deepcopy(moved), "cpu")
    with held():
        assert losses(put_on(model, "card:0"), put_on(moved, "card:0"), "card:0") == wanted


ASKED = [
    ("offload", "full"),  # its copies are made by a thread, as a card's are
    *((engine, subspace) for engine in ENGINES for subspace in READS_VALUES),
]
"""(engine, subspace): what walk_devices.py cannot walk without values."""


@pytest.mark.parametrize(("engine", "subspace"), ASKED)
def test_losses_and_steps_are_computed_on_the_card(engine, subspace):
    model = tiny_llama(attn="eager")
    asked = with_fields(example("estimator", "central"), num_directions=2, eps=1e-2)
    fields = {"store": "memory"} if engine == "offload" else {}

    def figures(model, batch):
        coordinates = coordinates_of(subspace, model, "gaussian")
        session = example("engine", engine, **fields).bind(
            model, coordinates, lambda b: model(**b, use_cache=False).loss
        )
        for step in range(3):  # a mask is chosen anew in the third
            directions = asked.directions(3, step)
            coordinates.begin(directions[0])
            yield session.losses(batch, asked.points(directions)).tolist()
            for name, tensor in session.weights.tensors.items():
                for start, stop in coordinates.chunks(name):
                    if engine != "offload" and coordinates.moves(directions[0], name):
                        update = coordinates.combination(name, start, stop, [(one, 0.5) for one in directions])
                        assert update.device == tensor.device
                        yield update.tolist()

    batch = batch_for(model)
    wanted = list(figures(copy.deepcopy(model), batch))
    with held():
        assert list(figures(put_on(model, "card:0"), put_on(batch, "card:0"))) == wanted


def test_a_tensor_on_another_device_shows():
    with held(), pytest.raises(RuntimeError, match="at least two devices, cpu and card:0"):
        torch.empty(3, device="card:0") + torch.arange(3)
    with held(), pytest.raises(RuntimeError, match="at least two devices, card:1 and card:0"):
        torch.empty(3, device="card:0") + torch.empty(3, device="card:1")
