"""No tensor is made on a device other than its weights': engines in every subspace, on cards that are not there."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from tests.cards import like, pretended, put_on, register, spread
from tests.contract.discovered import CELLS, coordinates_of, example, with_fields
from tests.models import batch_for, tiny_llama
from zoft.engines import _survey

ENGINES = ("in_place", "layerwise", "side_path")

READS_VALUES = ("sparse", "coordinate")
"""One chooses by the weights' values; the other reuses hidden states where they are equal: walk_objectives.py."""

ESTIMATORS = dict.fromkeys(ENGINES, "central") | {"forward_mode": "forward_gradient"}
"""What each engine is asked by."""

WALK = [
    (engine, subspace)
    for engine, estimator, subspace in CELLS
    if ESTIMATORS.get(engine) == estimator and subspace not in READS_VALUES
    if engine == "layerwise" or subspace in ("full", "low_rank")
]
"""Four engines in two subspaces, every subspace in one; offload copies in a thread: walk_objectives.py."""


@pytest.fixture(autouse=True, scope="module")
def cards():
    register()  # here and not on import: the collection of doctests imports every file


@pytest.fixture(autouse=True)
def without_values(monkeypatch):
    monkeypatch.setenv("ZOFT_COMPILE", "never")
    monkeypatch.setattr(_survey, "_global_state", lambda: None)  # the random state is a tensor with values


def model_and_batch(**sizes: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Its embeddings do not move: which of their rows are in use is a question of values."""
    model = tiny_llama(**sizes)
    model.model.embed_tokens.requires_grad_(False)
    return model, batch_for(model)


def lease_of_one_device(lease, tensors):
    assert len({tensor.device for tensor in tensors}) == 1
    return lease(tensors)


def ask(model, batch, engine, subspace):
    """Two steps of queries; then a step is written into every tensor."""
    estimator = with_fields(example("estimator", ESTIMATORS[engine]), num_directions=2, eps=1e-2)
    coordinates = coordinates_of(subspace, model, "gaussian")
    on_card = {key: like(value, "card:0") for key, value in batch.items()}
    session = example("engine", engine).bind(model, coordinates, lambda b: model(**b, use_cache=False).loss)
    if hasattr(session, "swapper"):  # fake tensors keep their device when .data is set, so it is seen here
        session.swapper.scratch.lease = partial(lease_of_one_device, session.swapper.scratch.lease)
    for step in range(2):
        directions = estimator.directions(3, step)
        coordinates.begin(directions[0])
        losses = session.losses(on_card, estimator.points(directions))
        assert losses.device.type == "cpu"
    for name, tensor in session.weights.tensors.items():
        for start, stop in coordinates.chunks(name):
            if coordinates.moves(directions[0], name):
                update = coordinates.combination(name, start, stop, [(one, 0.5) for one in directions])
                assert update.device == tensor.device
    return session


@pytest.mark.parametrize(("engine", "subspace"), WALK)
def test_all_is_made_where_the_weights_are(engine, subspace):
    model, batch = model_and_batch(num_hidden_layers=1)  # the test below has several
    with pretended():
        put_on(model, "card:0")
        ask(model, batch, engine, subspace)


@pytest.mark.parametrize("engine", ESTIMATORS)
def test_a_model_on_two_cards(engine):
    """As accelerate's device_map has it: each tensor's direction is made beside it, also of one read from outside."""
    model, batch = model_and_batch()
    with pretended():
        put_on(model, "card:0")
        spread(model, [model.model.layers[2]])
        first, later = (model.model.layers[i].mlp.down_proj for i in (0, 2))
        model.register_forward_pre_hook(lambda *_: (first.weight.sum(), later.weight.sum(), None)[-1])
        session = ask(model, batch, engine, "full")
        assert {str(tensor.device) for tensor in session.weights.tensors.values()} == {"card:0", "card:1"}


def test_a_tensor_on_another_device_shows():
    with pretended(), pytest.raises(RuntimeError, match="at least two devices, card:0 and cpu"):
        torch.empty(3, device="card:0") + torch.arange(3)
