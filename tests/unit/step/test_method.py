"""A method: what does not fit is refused before the first query, and eps goes by its schedule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from zoft.component import components
from zoft.errors import UserError
from zoft.estimators.base import FiniteDifference, scheduled
from zoft.estimators.central import Central
from zoft.optimizers.adam import Adam
from zoft.optimizers.sgd import SGD
from zoft.step import method
from zoft.step.method import Method
from zoft.subspaces.two_sided import TwoSided
from zoft.weights.tensors import Weights

FINITE = [name for name, cls in components("estimator").items() if issubclass(cls, FiniteDifference)]


def weights() -> Weights:
    return Weights(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(40, 50, bias=False)])}))  # 2000 elements


# ---- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "memory", "fits"),
    [
        (Adam(), 2 * 4 * 2000, True),
        (Adam(), 2 * 4 * 2000 - 1, False),
        (SGD(), 0, True),  # it keeps nothing
        (Adam(), None, True),  # nobody knows
    ],
)
def test_a_state_that_does_not_fit_is_refused_when_the_method_is_bound(optimizer, memory, fits, monkeypatch):
    monkeypatch.setattr(method, "memory_of", lambda device: memory)
    composed = Method.of("full", "central", "mean", optimizer)
    if fits:
        composed.bind(weights())
        return
    with pytest.raises(UserError, match=r"optimizer=adam keeps .* GiB beside the weights, .* use optimizer=sgd, or"):
        composed.bind(weights())


def test_the_same_rule_fits_in_a_subspace_of_few_coordinates(monkeypatch):
    monkeypatch.setattr(method, "memory_of", lambda device: 2 * 4 * 2000 - 1)
    Method.of(TwoSided(rank=2), "central", "mean", Adam()).bind(weights())


def test_an_anchor_counts_as_memory(monkeypatch):
    monkeypatch.setattr(method, "memory_of", lambda device: 4 * 2000 - 1)
    Method.of("full", "central").bind(weights())
    with pytest.raises(UserError, match="GiB beside the weights"):
        Method.of("full", "svrg").bind(weights())


def test_what_a_device_has():
    assert method.memory_of(torch.device("cpu")) > 2**28
    assert method.memory_of(torch.device("meta")) is None


@pytest.mark.parametrize(("subspace", "dimension"), [("full", 2000), (TwoSided(rank=2), 4)])
def test_more_orthogonal_directions_than_dimensions_are_refused(subspace, dimension):
    def bound(count):
        Method.of(subspace, Central(num_directions=count, across="orthogonal")).bind(weights())

    bound(dimension)
    with pytest.raises(UserError, match=rf"{dimension + 1} directions at right angles in a space of {dimension} dim"):
        bound(dimension + 1)


# ---- schedules of eps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", (1.0, 1.0, 1.0, 1.0)),
        ("linear", (1.0, 0.85, 0.7, 0.4)),
        ("cosine", (1.0, 0.4 + 0.3 * (1 + math.cos(math.pi / 4)), 0.7, 0.4)),
        ("tied", (0.5, 0.5, 0.5, 0.5)),
    ],
)
def test_eps_at_the_beginning_in_the_middle_and_at_the_end(name, schedule, shares):
    end = {"eps_end": 0.4} if schedule in ("linear", "cosine") else {}
    estimator = components("estimator")[name](eps=2e-3, eps_schedule=schedule, **end)
    for done, share in zip((0.0, 0.25, 0.5, 1.0), shares, strict=True):
        current = scheduled(estimator, done, rate=0.5)
        assert current.radius == pytest.approx(2e-3 * share, rel=1e-12)
        assert type(current) is type(estimator)
    assert estimator.radius == 2e-3


def test_tied_to_a_rate_of_zero_eps_stays():
    """A step that moves nothing is queried all the same: warm-up begins with one."""
    assert scheduled(Central(eps=1e-3, eps_schedule="tied"), 0.0, rate=0.0).radius == 1e-3


@pytest.mark.parametrize("parts", [{}, {"estimator": "svrg"}, {"subspace": "activation"}, {"optimizer": "adam"}])
def test_steps_are_counted_as_they_are_paid(parts: dict[str, str]):
    method = Method.of(**parts)  # type: ignore[arg-type]
    for queries in (method.queries_at(0), 100, 101):
        steps = method.steps_within(queries)
        spent = [sum(method.queries_at(step) for step in range(count)) for count in (steps, steps + 1)]
        assert spent[0] <= queries < spent[1]
