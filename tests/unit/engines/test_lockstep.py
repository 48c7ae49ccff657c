"""Forwards side by side: what they share is done once, whatever they do apart."""

from __future__ import annotations

import contextvars

import pytest
import torch
from torch import nn

from tests.models import batch_for, tiny_llama, tiny_opt
from zoft.component import create
from zoft.engines._lockstep import Lockstep
from zoft.engines.base import Session, of_example
from zoft.estimators.central import Central
from zoft.estimators.per_example import PerExample
from zoft.lm.data.rows import examples_of
from zoft.step.method import Method
from zoft.utils.meeting import met
from zoft.weights.tensors import Weights


def test_all_of_them_meet_at_every_place_in_order():
    together, seen = Lockstep(), []

    def work(brought):
        seen.append(list(brought))
        return [sum(brought)] * len(brought)

    def forward(x):
        for place in "ab":
            x += together.sync(place, x, work)
        return x

    assert together.run([lambda: forward(1), lambda: forward(2), lambda: forward(3)]) == [31, 32, 33]
    assert seen == [[1, 2, 3], [7, 8, 9]]


def test_what_waits_for_others_outside_of_the_model_waits_for_all():
    """Judges, who know of no engine; and alone where nothing runs side by side."""

    def forward(x):
        return met("judges", x, lambda brought: [(y, len(brought)) for y in brought])

    assert Lockstep().run([lambda: forward(1), lambda: forward(2)]) == [(1, 2), (2, 2)]
    assert forward(3) == (3, 1)


def test_those_that_part_meet_again():
    together, seen = Lockstep(), []

    def work(brought):
        seen.append(list(brought))
        return brought

    def forward(name, places):
        return [together.sync(place, name, work) for place in places]

    together.run([lambda: forward("x", [1, 2, 9, 10]), lambda: forward("y", [3, 9, 10]), lambda: forward("z", [9, 10])])
    assert seen[-1] == ["x", "y", "z"]
    assert sum(map(len, seen)) == 9


def test_without_company_the_work_is_done_alone():
    together = Lockstep()
    assert together.sync("place", 3, lambda brought: [b + 1 for b in brought]) == 4
    assert together.run([lambda: together.sync("place", 3, lambda brought: [len(brought)])]) == [1]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["first", "second", "work"])
def test_an_error_ends_all_of_them_and_goes_on(where, error):
    together, ended = Lockstep(), []

    def work(brought):
        if where == "work":
            raise error("here")
        return brought

    def forward(name):
        try:
            together.sync("a", name, work)
            if where == name:
                raise error("here")
            together.sync("b", name, work)
        finally:
            ended.append(name)

    with pytest.raises(error, match="here"):
        together.run([lambda: forward("first"), lambda: forward("second"), lambda: forward("third")])
    assert sorted(ended) == ["first", "second", "third"]
    assert together.run([lambda: 1, lambda: together.sync("c", 2, lambda brought: brought)]) == [1, 2]


def test_each_forward_has_its_own_autocast_and_gradient_mode():
    together = Lockstep()

    def forward(low):
        with torch.autocast("cpu", torch.bfloat16, enabled=low), torch.set_grad_enabled(not low):
            dtypes = [torch.nn.functional.linear(torch.ones(1, 2), torch.ones(2, 2)).dtype]
            together.sync("a", None, lambda brought: brought)
            dtypes.append(torch.nn.functional.linear(torch.ones(1, 2), torch.ones(2, 2)).dtype)
            assert torch.is_grad_enabled() is not low
        together.sync("b", None, lambda brought: brought)
        dtypes.append(torch.nn.functional.linear(torch.ones(1, 2), torch.ones(2, 2)).dtype)
        assert torch.is_grad_enabled()
        return dtypes

    low, high = together.run([lambda: forward(True), lambda: forward(False)])
    assert low == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert high == [torch.float32] * 3
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_context_variables_are_seen_and_kept_apart():
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(5)
    together = Lockstep()

    def forward(value):
        seen = [variable.get()]
        variable.set(value)
        together.sync("a", None, lambda brought: brought)
        return [*seen, variable.get()]

    assert together.run([lambda: forward(1), lambda: forward(2)]) == [[5, 1], [5, 2]]
    assert variable.get() == 5


def test_inside_a_context_that_must_close_in_order_nobody_waits():
    together, alone = Lockstep(), []

    def forward():
        with torch.device("meta"):
            together.sync("a", None, lambda brought: alone.append(len(brought)) or brought)
        return torch.zeros(1).device.type

    assert together.run([forward, forward]) == ["cpu", "cpu"]
    assert alone == [1, 1]


class ReadsOutside(nn.Module):
    """A layer whose weight is also read past its own forward."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.second(self.first(x)) + x @ self.first.weight


@pytest.mark.parametrize("engine", ["layerwise", "side_path"])
def test_forwards_that_run_again_side_by_side_leave_inference_mode(engine):
    """The first queries find the read, and all points go through the model again, as coroutines."""
    model = ReadsOutside()
    method = Method.of("full", Central(num_directions=6), "mean", "sgd")
    session = create("engine", engine, engine).bind(
        model, method.bind(Weights(model)), lambda x: model(x).square().mean()
    )
    session.losses(torch.ones(2, 6), method.estimator.points(method.estimator.directions(0, 0)))
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("subspace", ["full", "low_rank"])
@pytest.mark.parametrize("engine", ["layerwise", "side_path", "in_place"])
@pytest.mark.parametrize("built", [tiny_opt, tiny_llama])
def test_examples_side_by_side_have_the_losses_they_have_alone(built, engine, subspace):
    model = built()
    batch = batch_for(model)
    method = Method.of(
        create("subspace", subspace, "full", **({"rank": 2} if subspace == "low_rank" else {})), PerExample(eps=1e-2)
    )
    session = create("engine", engine, engine).bind(model, method.bind(Weights(model)), lambda one: model(**one).loss)
    examples, points = examples_of(batch), method.estimator.points(method.estimator.directions(0, 0))
    for _ in range(2):  # the first finds out how the model reads its weights
        losses = session.losses_per_example(examples, points)
    assert losses.shape == (2, len(examples))
    torch.testing.assert_close(losses, Session.losses_per_example(session, examples, points), rtol=0, atol=1e-6)
    assert len(losses.unique()) == losses.numel()
    for i, one in enumerate(examples):
        name = "model.decoder.layers.0.fc1.weight" if built is tiny_opt else "model.layers.0.mlp.up_proj.weight"
        directions = [of_example(point, j).direction for point in points[:1] for j in (i, i + 1)]
        assert not torch.equal(*(session.coordinates.z(direction, name) for direction in directions))
        assert one["input_ids"].shape[0] == 1
