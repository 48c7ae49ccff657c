"""engine=offload: the bits of the resident run, two blocks on the device, and steps that wait for the next visit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models import batch_for, tiny_llama, tiny_opt
from zoft.engines.layerwise import Layerwise
from zoft.engines.offload import Offload
from zoft.errors import UserError
from zoft.estimators.base import Point
from zoft.estimators.central import Central
from zoft.noise.direction import Direction
from zoft.step.method import Method
from zoft.step.query import StepQueries
from zoft.step.update import ZOOptimizer, decay_groups
from zoft.weights.rounding import Rounding
from zoft.weights.tensors import Weights


def run(engine, model, *, steps=3, optimizer="sgd", subspace="full", estimator=None, update="auto", decay=0.0):
    """(losses of each step, optimizer) of a few steps on one batch."""
    method = Method.of(subspace, estimator or Central(num_directions=2, eps=1e-2), None, optimizer)
    weights = Weights(model)
    coordinates = method.bind(weights)
    session = engine.choose(method.estimator, coordinates, model).bind(
        model, coordinates, lambda batch: model(**batch).loss
    )
    groups = decay_groups(weights, list(weights.tensors), decay)
    zo_optimizer = ZOOptimizer(groups, method.optimizer, session, 0.05, Rounding(update, seed=7))
    queries, losses = StepQueries(method, zo_optimizer), []
    for step in range(steps):
        batch = batch_for(model, seed=step)
        directions = [Direction(3, step, index) for index in range(method.estimator.num_directions)]
        estimate = queries.estimate(batch, directions, lr=0.05)
        zo_optimizer.apply(estimate)
        losses.append(estimate.losses.tolist())
    return losses, zo_optimizer


@pytest.mark.parametrize("store", ["file", "memory"])
@pytest.mark.parametrize(
    ("dtype", "optimizer", "subspace"),
    [
        (torch.float32, "sgd", "full"),
        (torch.bfloat16, "sgd", "full"),
        (torch.float32, "adam", "full"),
        (torch.bfloat16, "momentum", "low_rank"),
        (torch.float32, "cone", "full"),
    ],
)
def test_losses_and_weights_are_those_of_the_resident_run(store, dtype, optimizer, subspace):
    update = "stochastic" if dtype == torch.bfloat16 else "auto"
    wanted, resident = run(
        Layerwise(), tiny_llama().to(dtype), optimizer=optimizer, subspace=subspace, update=update, decay=0.1
    )
    model = tiny_llama().to(dtype)
    losses, zo_optimizer = run(Offload(store), model, optimizer=optimizer, subspace=subspace, update=update, decay=0.1)
    assert losses == wanted
    zo_optimizer.session.settle()
    assert zo_optimizer.session.weights.digest() == resident.session.weights.digest()


def test_a_block_is_visited_once_for_all_points_and_its_step_waits_for_the_next_visit():
    model = tiny_opt(num_hidden_layers=4)
    _, zo_optimizer = run(Offload("file"), model, steps=1)  # its first queries go one by one, to see what reads what
    session = zo_optimizer.session
    assert set(session.stream.waiting) == set(session.stream.of)
    before = dict(session.transfer.counts)
    batch, points = batch_for(model), [Point(Direction(3, 9, i), s) for i in range(3) for s in (1e-2, -1e-2)]
    session.losses(batch, [*points, Point()])
    moved = {key: count - before.get(key, 0) for key, count in session.transfer.counts.items()}
    assert not session.stream.waiting
    assert moved["up"] == moved["down"] == 4  # seven points, four blocks
    assert session.transfer.counts["buffers"] == 2 * max(block.num_bytes for block in session.stream.blocks)


def test_between_runs_the_model_is_an_ordinary_one():
    model = tiny_llama()
    _, zo_optimizer = run(Offload("file"), model, steps=2)
    batch = batch_for(model)
    with torch.no_grad():
        streamed = model(**batch).loss  # an evaluation writes what waits, block by block
    zo_optimizer.session.settle()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = tiny_llama()
    again.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(again(**batch).loss, streamed)
    _, other = run(Offload("file"), model, steps=1)
    assert len(model.model.layers[0]._forward_pre_hooks) == 1
    other.session.close()
    assert not model.model.layers[0]._forward_pre_hooks


def test_what_needs_all_weights_at_once_is_refused():
    from zoft.estimators.backprop import Backprop
    from zoft.estimators.svrg import SVRG

    for estimator in (Backprop(), SVRG()):
        with pytest.raises(UserError, match=f"estimator={estimator.name()} needs all weights at once"):
            run(Offload(), tiny_llama(), estimator=estimator)
    model = tiny_llama()
    model.is_quantized = True
    with pytest.raises(UserError, match="this base is quantised"):
        run(Offload(), model)
    with pytest.raises(UserError, match="store must be one of auto, memory, file"):
        Offload("disk")


def test_an_objective_that_raises_leaves_clean_weights_and_memory_of_two_blocks():
    model = tiny_llama()
    _, zo_optimizer = run(Offload("file"), model, steps=1)
    session = zo_optimizer.session
    session.settle()
    before = session.weights.digest()
    model.model.layers[1].mlp.register_forward_hook(lambda *_: (_ for _ in ()).throw(ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        session.losses(batch_for(model), [Point(Direction(1, 5, 0), 1e-2), Point(Direction(1, 5, 0), -1e-2)])
    session.settle()
    assert session.weights.digest() == before
    assert session.transfer.counts["buffers"] == 2 * max(block.num_bytes for block in session.stream.blocks)


def test_tensors_that_something_else_reads_stay():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).tanh()
            return x @ self.layers[0].weight

    losses = []
    for engine in (Layerwise(), Offload("file")):
        torch.manual_seed(0)
        model = Twice()
        weights = Weights(model)
        method = Method.of("full", Central(eps=1e-2), None, "sgd")
        session = engine.bind(model, method.bind(weights), lambda x, model=model: model(x).square().mean())
        points = [Point(Direction(1, 0, 0), 1e-2), Point(Direction(1, 0, 0), -1e-2)]
        losses.append([session.losses(torch.ones(2, 4), points).tolist() for _ in range(2)])
    assert losses[0] == losses[1]
    assert "layers.0.weight" not in session.stream.of
