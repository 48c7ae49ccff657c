"""Single coordinates: each weight once a sweep, in an order of the seed's, and their mean is the gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoft.component import components
from zoft.engines.in_place import InPlace
from zoft.errors import UserError
from zoft.estimators.per_example import PerExample
from zoft.noise.direction import Direction
from zoft.step.method import Method
from zoft.step.query import StepQueries
from zoft.step.update import ZOOptimizer
from zoft.subspaces.coordinate import BoundCoordinate, Coordinate, permuted
from zoft.weights.tensors import Weights


def bound(model: nn.Module | None = None, q: int = 1) -> BoundCoordinate:
    coordinates = Coordinate().bind(Weights(model or nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))))
    coordinates.arrange("iid", q)
    return coordinates


def flat(coordinates: BoundCoordinate, direction: Direction) -> torch.Tensor:
    return torch.cat([coordinates.z(direction, name).view(-1) for name in coordinates.weights.tensors])


# --------------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("size", [*range(1, 20), 63, 64, 65, 1000, 4097])
def test_a_keyed_permutation_takes_every_place_once(size):
    orders = [[permuted(i, size, key) for i in range(size)] for key in (0, 1, 2**64 - 1)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    if size > 10:
        assert orders[0] != orders[1] != orders[2]


def test_a_permutation_of_many_needs_no_table():
    size = 13_000_000_001
    places = {permuted(i, size, 7) for i in range(2000)}
    assert len(places) == 2000
    assert all(0 <= i < size for i in places)
    assert abs(sum(places) / 2000 / size - 0.5) < 4 / (12 * 2000) ** 0.5


def test_first_places_are_spread_evenly():
    counts = torch.bincount(torch.tensor([permuted(0, 10, key) for key in range(5000)]), minlength=10)
    assert float((counts - 500).abs().max()) < 4.5 * (500 * 0.9) ** 0.5


@pytest.mark.parametrize("q", [1, 2, 5, 26, 40])
def test_every_weight_moves_once_a_sweep_whatever_the_number_of_directions(q):
    coordinates = bound(q=q)
    d = coordinates.weights.num_elements
    directions = [Direction(3, step, probe) for step in range(2 * d // q + 2) for probe in range(q)]
    z = torch.stack([flat(coordinates, direction) for direction in directions[: 2 * d]])
    assert ((z != 0).sum(1) == 1).all()
    torch.testing.assert_close(z.square().sum(1), torch.full((2 * d,), float(d)))
    for sweep in (z[:d], z[d:]):
        assert ((sweep != 0).sum(0) == 1).all()
        torch.testing.assert_close(sweep.T @ sweep / d, torch.eye(d))  # the mean of z z^T over a sweep
    assert not torch.equal(z[:d].abs().argmax(1), z[d:].abs().argmax(1))


def test_signs_are_random_and_seeds_differ():
    model = nn.Linear(40, 25, bias=False)
    coordinates = bound(model)
    values = torch.tensor([coordinates.one.place(Direction(0, step))[2] for step in range(1000)])
    assert abs(float(values.sign().mean())) < 4 / 1000**0.5
    places = [[coordinates.one.place(Direction(seed, step))[1] for step in range(20)] for seed in (0, 1)]
    assert places[0] != places[1]


# ------------------------------------------------------------------------------------------------------------- numbers


def test_a_full_sweep_of_central_differences_is_the_gradient_and_one_of_fewer_is_on_average():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    d = sum(p.numel() for p in model.parameters())
    gradient = torch.cat([g.view(-1) for g in torch.autograd.grad(model(x).square().mean(), list(model.parameters()))])
    for q in (d, 13):
        estimator = components("estimator")["central"](num_directions=q, eps=1e-3 / d**0.5)
        method = Method.of(subspace="coordinate", estimator=estimator)
        coordinates = method.bind(Weights(model))
        session = InPlace().bind(model, coordinates, lambda b: model(b).square().mean())
        zo_optimizer = ZOOptimizer(
            [{"params": list(model.parameters()), "weight_decay": 0.0}], method.optimizer, session, 1.0
        )
        queries, steps = StepQueries(method, zo_optimizer), []
        clean = [p.detach().clone() for p in model.parameters()]
        for step in range(d // q):
            asked = queries.estimate(x, estimator.directions(0, step))
            assert asked.is_usable
            zo_optimizer.apply(asked)
            steps.append(torch.cat([(c - p.detach()).view(-1) for c, p in zip(clean, model.parameters(), strict=True)]))
            for parameter, value in zip(model.parameters(), clean, strict=True):
                parameter.data.copy_(value)
        torch.testing.assert_close(torch.stack(steps).mean(0), gradient, rtol=1e-2, atol=1e-3)


def test_only_the_tensor_that_holds_the_coordinate_moves_and_of_a_sum_each_that_does():
    coordinates = bound(q=26)
    moving = {}
    for probe in range(26):
        names = [n for n in coordinates.weights.tensors if coordinates.moves(Direction(0, 0, probe), n)]
        assert len(names) == 1
        moving[probe] = names[0]
    coordinates.arrange("iid", 26, mixes=True)
    parts = [(Direction(0, 0, 0), 2.0), (Direction(0, 0, 1), -1.0), (Direction(0, 0, 2), 0.5)]
    mixed = Direction(0, 0, -1, mix=tuple(parts))
    assert {n for n in coordinates.weights.tensors if coordinates.moves(mixed, n)} == {moving[i] for i in range(3)}
    wanted = sum(c * flat(coordinates, direction) for direction, c in parts)
    torch.testing.assert_close(flat(coordinates, mixed), wanted)


def test_what_is_trained_by_other_means_is_no_coordinate():
    coordinates = Coordinate().bind(Weights(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))))
    coordinates.backprop_names = frozenset({"0.weight", "1.bias"})
    coordinates.arrange("iid", 12)
    directions = [Direction(0, 0, probe) for probe in range(12)]
    assert coordinates.dimension(directions[0]) == 12
    assert {coordinates.one.place(d)[0] for d in directions} == {"0.bias", "1.weight"}
    assert float(flat(coordinates, directions[0]).square().sum()) == pytest.approx(12)


def test_gram_knows_the_same_weight_of_two_sweeps():
    coordinates = bound(nn.Linear(2, 1, bias=False), q=4)
    directions = [Direction(0, 0, probe) for probe in range(4)]
    z = torch.stack([flat(coordinates, direction) for direction in directions]).double()
    torch.testing.assert_close(coordinates.gram(directions), z @ z.T)


def test_a_perturbed_copy_differs_in_one_place_and_may_be_in_place():
    model = nn.Linear(30, 20, bias=False)
    coordinates, direction = bound(model), Direction(0, 0)
    clean = model.weight.data.clone()
    outs = [torch.empty(600), torch.empty(600)]
    coordinates.perturb(direction, "weight", 0, [0.1, -0.1], outs)
    assert [int((out != clean.view(-1)).sum()) for out in outs] == [1, 1]
    weight = model.weight.data.view(-1)
    coordinates.source.perturb(weight, direction, "weight", 0, [0.1], [weight])
    assert torch.equal(weight, outs[0])


# ---------------------------------------------------------------------------------------------------------- refusals


def test_what_has_no_meaning_here_is_refused_with_a_sentence():
    with pytest.raises(UserError, match=r"coordinate.law must be rademacher .*random sign.*got 'gaussian'"):
        Coordinate(law="gaussian")
    for across in ("orthogonal", "antithetic"):
        estimator = components("estimator")["central"](num_directions=2, across=across)
        with pytest.raises(UserError, match=rf"across={across} has no meaning with subspace=coordinate.*iid"):
            Method.of(subspace="coordinate", estimator=estimator)
    with pytest.raises(UserError, match=r"noise=torch_sequential"):
        Coordinate().bind(Weights(nn.Linear(2, 2)), "torch_sequential")
    for name, cls in components("estimator").items():
        if issubclass(cls, PerExample):
            with pytest.raises(UserError, match=rf"estimator={name} .*subspace=coordinate.*subspace=full"):
                Method.of(subspace="coordinate", estimator=name)
    for name, cls in components("optimizer").items():
        if cls.shapes_directions and name != "hessian":
            with pytest.raises(UserError, match=rf"optimizer={name} shapes its directions.*subspace=full"):
                Method.of(subspace="coordinate", optimizer=name)
