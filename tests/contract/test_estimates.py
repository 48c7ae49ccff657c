"""Every part, on a quadratic whose gradient is known: what the mean estimate is, and how far single ones are off."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from math import prod

import pytest
import torch
from torch import nn

from tests.contract.discovered import SUBSPACES, coordinates_of, example, small_subspace, with_fields
from zoft.component import components
from zoft.engines.base import Session
from zoft.errors import UserError
from zoft.estimators.nodes import Nodes
from zoft.estimators.per_example import PerExample
from zoft.noise.direction import Direction, key_of
from zoft.noise.joint import ACROSS
from zoft.noise.source import LAWS
from zoft.step.method import Method
from zoft.step.query import StepQueries
from zoft.step.update import ZOOptimizer
from zoft.subspaces._observes import ObservesInputs
from zoft.subspaces.base import BoundSubspace
from zoft.weights.tensors import Weights

MANY = 10_000
ESTIMATORS = [name for name, cls in components("estimator").items() if not issubclass(cls, Nodes)]
"""Those of directions in the weights; for those in layers' outputs see test_nodes.py."""
WEIGHTINGS = list(components("weighting"))


class Quadratic(nn.Module):
    """f(theta) = theta^T H theta / 2 + b^T theta + 1, over two layers and a vector; example i adds c_i^T theta.

    Args:
        dtype: of the weights.
        spread: how long the c_i are, whose sum is zero.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, spread: float = 0.0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 8, bias=False) for _ in range(2))
        self.norm = nn.Parameter(torch.empty(5))
        self.count = sum(p.numel() for p in self.parameters())
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=random).to(dtype)
        root = torch.randn(self.count, self.count, generator=random, dtype=torch.float64) / self.count**0.5
        self.hessian = 0.3 * root @ root.T + torch.diag(torch.rand(self.count, generator=random, dtype=torch.float64))
        self.slope = torch.randn(self.count, generator=random, dtype=torch.float64)
        offsets = spread * torch.randn(2, self.count, generator=random, dtype=torch.float64)
        self.own = offsets - offsets.mean(0)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        theta = torch.cat([self.norm, *(layer.weight.view(-1) for layer in self.layers)]).double()
        return self.at(theta.unsqueeze(0), rows)[0]

    def at(self, thetas: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """f at many places at once, which takes a test a third of the time: [P, d] -> [P]."""
        common = (thetas @ self.hessian * thetas).sum(1) / 2 + thetas @ self.slope + 1
        return common + (thetas @ self.own[rows].T).mean(1)

    def gradient(self) -> torch.Tensor:
        return self.hessian @ self.flat() + self.slope

    def flat(self) -> torch.Tensor:
        return torch.cat([p.detach().view(-1) for p in self.parameters()]).double()


def begun(coordinates: BoundSubspace, direction: Direction) -> BoundSubspace:
    """A subspace at the beginning of a step, with inputs to look at where it asks for them."""
    coordinates.begin(direction)
    wanted = coordinates.inputs_wanted(direction) if isinstance(coordinates, ObservesInputs) else ()
    for name in wanted:
        tensor = coordinates.weights.tensors[name]
        random = torch.Generator().manual_seed(key_of(direction, name) % 2**31)
        coordinates.observe(direction, name, torch.randn(40, tensor.shape[1], generator=random).to(tensor))
    return coordinates


def lifting(bound: BoundSubspace, direction: Direction, name: str) -> torch.Tensor:
    """L [elements, coordinates] of a tensor, by lifting one coordinate after the other."""
    count = prod(bound.shape(name))
    columns = torch.zeros(count, bound.weights.tensors[name].numel(), dtype=torch.float64)
    for index in range(count):
        for start, stop in bound.chunks(name):
            for first, last in bound.pieces(name, start, stop):
                unit = torch.zeros(count)
                unit[index] = 1.0
                lifted = bound.lift(direction, name, unit[start:stop], start, first, last)
                columns[index, first:last] += lifted.double().view(-1)
    return columns.T


class Drawn:
    """Many directions of one step, in one basis.

    Args:
        subspace: by name.
        law: of one direction.
        count: how many.
    """

    def __init__(self, subspace: str, law: str, count: int) -> None:
        self.model = Quadratic()
        self.bound = bound = coordinates_of(subspace, self.model, law)
        bound.arrange("iid", count)
        self.directions = [Direction(11, 0, probe) for probe in range(count)]
        begun(bound, self.directions[0])
        self.gradient, self.flat, lifts = self.model.gradient(), {}, []
        for name in bound.weights.tensors:
            moving = [bound.moves(d, name) for d in self.directions]
            size = prod(bound.shape(name))
            drawn = torch.zeros(count, size if any(moving) else 0, dtype=torch.float64)
            for row, (direction, moves) in enumerate(zip(self.directions, moving, strict=True)):
                if moves:
                    drawn[row] = bound.draw(direction, name, 0, size).double()
            self.flat[name] = drawn
            elements = bound.weights.tensors[name].numel()
            first = next((d for d, moves in zip(self.directions, moving, strict=True) if moves), None)
            lifts.append(torch.zeros(elements, 0).double() if first is None else lifting(bound, first, name))
        self.of_each = dict(zip(bound.weights.tensors, lifts, strict=True))
        self.lift = torch.block_diag(*lifts)  # L [d, k]
        self.z = torch.cat(list(self.flat.values()), dim=1) @ self.lift.T  # [count, d]

    @property
    def moving(self) -> list[str]:
        return [name for name, drawn in self.flat.items() if drawn.shape[1]]


@cache
def drawn(subspace: str, law: str) -> Drawn:
    return Drawn(subspace, law, MANY)


def laws(index: int, subspace: str) -> list[str]:
    """All of them in the full space; elsewhere the first, and one of the others by turns."""
    known = components("subspace")[subspace].laws
    return list(known) if subspace == "full" else [known[0], *known[1:][index % 2 :][:1]]


laws_of = pytest.mark.parametrize(
    ("subspace", "law"), [(name, law) for index, name in enumerate(SUBSPACES) for law in laws(index, name)]
)


def assert_mean_is(samples: torch.Tensor, wanted: torch.Tensor, *, groups: int = 0) -> None:
    """The mean of rows is within what 3 standard errors are for one number, for the largest of all elements.

    Args:
        samples: [n, d].
        wanted: [d].
        groups: where neighbouring rows are not independent, how many groups of them are.
    """
    if groups:
        samples = samples[: len(samples) // groups * groups].view(groups, -1, samples.shape[1]).mean(1)
    n, d = samples.shape
    mean, error = samples.mean(0), samples.std(0) / n**0.5
    scale = float(wanted.norm()) + 1e-12
    away = (mean - wanted).abs() - 1e-5 * scale
    chance = 0.0027 / d  # of 3 standard errors, shared by d elements
    bound = float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - chance / 2, dtype=torch.float64)))
    bound *= 1 + 3 / n**0.5 if not groups else (1 + 40 / groups)  # the error is an estimate itself
    worst = float((away / error.clamp_min(1e-300)).max())
    assert worst < bound, f"{worst:.2f} standard errors, of {bound:.2f} that chance explains"


# ------------------------------------------------------------------------------------------------ directions and bases


@laws_of
def test_the_mean_estimate_is_the_gradient_projected_on_the_subspace(subspace, law):
    """E[<g, z> z] = L L^T g over 10^4 directions in one basis, within 3 standard errors; the sign is right."""
    got = drawn(subspace, law)
    wanted = got.lift @ (got.lift.T @ got.gradient)
    estimates = (got.z @ got.gradient).unsqueeze(1) * got.z
    assert_mean_is(estimates, wanted)
    assert float(wanted @ got.gradient) > 0
    assert float(torch.nn.functional.cosine_similarity(estimates.mean(0), wanted, dim=0)) > 0.9


@laws_of
def test_coordinates_are_uncorrelated_and_of_variance_one(subspace, law):
    """E[c c^T] = 1 where there is a coordinate; it is what the mean rests on, and what optimizers may rely on."""
    got = drawn(subspace, law)
    for name in got.moving:
        c = got.flat[name]
        used = (c != 0).any(0)
        covariance = c[:, used].T @ c[:, used] / len(c)
        slack = 6 * (2.0 if law == "gaussian" or subspace == "coordinate" else 1.5) ** 0.5 / len(c) ** 0.5
        slack *= got.bound.dimension(got.directions[0]) ** 0.5 if subspace == "coordinate" else 1.0
        assert float((covariance - torch.eye(int(used.sum()))).abs().max()) < slack


@laws_of
def test_a_direction_is_what_its_coordinates_lift_to(subspace, law):
    got = drawn(subspace, law)
    for row in (0, 1, 77):
        offset = 0
        for name, tensor in got.bound.weights.tensors.items():
            z = got.z[row, offset : offset + tensor.numel()]
            offset += tensor.numel()
            if got.bound.moves(got.directions[row], name):
                torch.testing.assert_close(
                    got.bound.z(got.directions[row], name).double().view(-1), z, rtol=1e-4, atol=1e-5
                )


@laws_of
def test_gram_is_the_inner_products_of_the_directions(subspace, law):
    got = drawn(subspace, law)
    gram = got.bound.gram(got.directions[:5])
    torch.testing.assert_close(gram, got.z[:5] @ got.z[:5].T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_the_trace_of_the_projection_is_the_number_of_elements_that_move(subspace):
    """trace(L L^T) = E||z||^2 = elements: exactly for orthonormal bases, on average over bases for random ones."""
    bound = coordinates_of(subspace, Quadratic(), "gaussian", interval=1)
    shares = []
    for step in range(200):
        begun(bound, Direction(11, step))
        moving = [n for n in bound.weights.tensors if n != "norm" and bound.moves(Direction(11, step), n)]
        for name in moving:
            trace = float(lifting(bound, Direction(11, step), name).square().sum())
            shares.append(trace / bound.weights.tensors[name].numel())
        if len(shares) > 12 and max(abs(share - 1) for share in shares) < 1e-5:
            return  # exact
    values = torch.tensor(shares or [1.0, 1.0], dtype=torch.float64)  # none: only vectors move
    assert abs(float(values.mean()) - 1) <= 4 * float(values.std()) / len(values) ** 0.5


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_inner_products_of_coordinates_are_those_of_the_steps_they_stand_for(subspace):
    """L^T L as the subspace says it is: gain^2 where its basis is orthonormal."""
    got = drawn(subspace, components("subspace")[subspace].laws[0])
    for name in got.moving:
        square = got.of_each[name].T @ got.of_each[name]
        used = square.diagonal() > 0
        products = torch.zeros_like(square)
        for start, stop in got.bound.chunks(name):
            unit = torch.eye(stop - start)
            products[start:stop, start:stop] = got.bound.products(got.directions[0], name, unit, start)
            products[:start, start:stop] = square[:start, start:stop]
            products[start:stop, :start] = square[start:stop, :start]
        torch.testing.assert_close(square[used][:, used], products[used][:, used].double(), rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------- tensors have noise of their own


class Alike(nn.Module):
    def __init__(self, names: str = "abc") -> None:
        super().__init__()
        random = torch.Generator().manual_seed(4)
        values = {name: torch.randn(320, 320, generator=random) for name in "abc"}
        self.layers = nn.ModuleList([nn.ModuleDict({n: nn.Linear(320, 320, bias=False) for n in names})])
        self.norms = nn.ParameterList(torch.ones(320 * 320) for _ in range(2))
        for name in names:
            self.layers[0][name].weight.data = values[name]


@laws_of
def test_tensors_of_one_shape_have_uncorrelated_noise(subspace, law):
    """|corr| < 0.01 over 10^5 elements, and no more on average than chance gives."""
    bound, correlations = coordinates_of(subspace, Alike(), law, interval=1), []
    for step in range(6):
        direction = Direction(5, step)
        begun(bound, direction)
        moving = [bound.z(direction, n).view(-1).clone() for n in bound.weights.tensors if bound.moves(direction, n)]
        correlations += [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairwise(moving)]
    if correlations:
        values = torch.tensor(correlations)
        assert float(values.mean().abs()) < 0.01
        assert float(values.abs().max()) < 4.5 / 102_400**0.5


@laws_of
def test_the_order_in_which_tensors_are_asked_for_and_which_are_changes_nothing(subspace, law):
    direction = Direction(5, 3, 1)
    whole = begun(coordinates_of(subspace, Alike(), law), direction)
    wanted = {name: whole.z(direction, name).clone() for name in whole.weights.tensors}
    for names in (list(wanted)[::-1], list(wanted)[1:2], [list(wanted)[-1]]):
        fresh = begun(coordinates_of(subspace, Alike(), law), direction)
        for name in names:
            assert torch.equal(fresh.z(direction, name), wanted[name])


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_tensors_in_another_order_or_left_out_change_nothing_for_the_others(subspace):
    """Where what moves is the same: a block of layers, or a single coordinate, is chosen among all that is there."""
    directions = [Direction(5, 0, probe) for probe in range(3)]
    whole = begun(coordinates_of(subspace, Alike(), "gaussian"), directions[0])
    for names in ("cba", "ac", "b"):
        other = begun(coordinates_of(subspace, Alike(names), "gaussian"), directions[0])
        for name in other.weights.tensors:
            if all(bound.moves(d, name) for bound in (whole, other) for d in directions):
                assert torch.equal(other.z(directions[1], name), whole.z(directions[1], name))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@laws_of
def test_a_gpu_draws_the_bits_of_a_cpu(subspace, law):
    near = begun(coordinates_of(subspace, Alike(), law), Direction(5, 3))
    far = begun(coordinates_of(subspace, Alike().cuda(), law), Direction(5, 3))
    for probe in range(2):
        for name in near.weights.tensors:
            direction = Direction(5, 3, probe)
            assert torch.equal(near.z(direction, name), far.z(direction, name).cpu())


# --------------------------------------------------------------------------------------------------------- whole steps


class Plain(Session):
    """Weights written out for every point; derivatives from a backward pass. Engines are held to the same elsewhere."""

    def losses(self, batch, points):
        clean = torch.cat([tensor.detach().view(-1) for tensor in self.weights.tensors.values()]).double()
        known = {direction: self.flat(direction) for direction in {p.direction for p in points} if direction}
        if any(point.derivative for point in points):
            gradient = torch.cat([g.view(-1) for g in self.gradients(batch)]).double()
        places = [clean + p.scale * known[p.direction] if p.direction else clean for p in points]
        values = self.model.at(torch.stack(places), batch).tolist()
        slopes = [float(gradient @ known[p.direction]) if p.derivative else 0.0 for p in points]
        return torch.tensor([s if p.derivative else v for p, s, v in zip(points, slopes, values, strict=True)])

    def gradients(self, batch):
        return torch.autograd.grad(self.objective(batch), list(self.weights.tensors.values()))

    def flat(self, direction):
        coordinates = self.coordinates
        return torch.cat(
            [
                coordinates.z(direction, n).double().view(-1)
                if coordinates.moves(direction, n)
                else t.new_zeros(t.numel(), dtype=torch.float64)
                for n, t in self.weights.tensors.items()
            ]
        )


class Estimates:
    """A composition asked for its estimate again and again, at the same weights.

    Args:
        method: the composition.
        spread: how much the examples of a batch differ.
    """

    def __init__(self, method: Method, spread: float = 0.0) -> None:
        self.model, self.method = Quadratic(torch.float64, spread), method
        coordinates = method.bind(Weights(self.model))
        self.rows = torch.arange(2)
        self.parameters = list(self.model.parameters())
        session = Plain(self.model, coordinates, self.model)
        groups = [{"params": list(self.model.parameters()), "weight_decay": 0.0}]
        self.zo_optimizer = ZOOptimizer(groups, method.optimizer, session, 1.0)
        self.queries = StepQueries(
            method,
            self.zo_optimizer,
            examples=lambda rows: [row.view(1) for row in rows],
            batches=lambda batch, count, step: [self.rows] * count,
            select=lambda rows, lengths: rows,
        )

    def take(self, count: int, first: int = 0) -> torch.Tensor:
        """[count, d]: what a step at learning rate 1 takes away from the weights."""
        clean, steps = [p.detach().clone() for p in self.parameters], []
        at = self.model.flat()
        for step in range(first, first + count):
            directions = self.method.estimator.directions(5, step)
            asked = self.queries.estimate(self.rows, directions, lr=1.0)
            assert asked.is_usable
            self.zo_optimizer.progress.steps += 1
            self.zo_optimizer.apply(asked)
            steps.append(at - self.model.flat())
            for parameter, value in zip(self.parameters, clean, strict=True):
                parameter.data.copy_(value)
        return torch.stack(steps)


def composed(estimator="central", weighting="mean", subspace="full", law="gaussian", **fields) -> Method:
    """A composition; ``fields`` go to the estimator as far as it takes them."""
    chosen = example("estimator", estimator)
    for key, value in fields.items():
        try:
            chosen = with_fields(chosen, **{key: value})
        except UserError:
            continue  # that estimator has its own
    return Method(
        small_subspace(subspace, law, 10**6), chosen, example("weighting", weighting), example("optimizer", "sgd")
    )


def of_any_estimator(weighting: str, **fields) -> Method:
    """A weighting with the first estimator that it goes with."""
    for estimator in ("central", "one_sided", "three_point", *ESTIMATORS):
        try:
            return composed(estimator, weighting, **fields)
        except UserError:
            continue
    raise AssertionError(f"no estimator goes with weighting={weighting}")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_mean_estimate_of_every_estimator_is_the_gradient(estimator):
    """10^4 directions on a quadratic, through queries and steps: the gradient within 3 standard errors."""
    asks = Estimates(composed(estimator, num_directions=20, eps=0.1), spread=0.5)
    asks.take(4)  # what it remembers of the steps before is there then
    samples = asks.take(MANY // (40 if isinstance(asks.method.estimator, PerExample) else 20), first=4)
    gradient = asks.model.gradient()
    exact = samples.std(0) < 1e-9 * gradient.norm()
    torch.testing.assert_close(samples.mean(0)[exact], gradient[exact], rtol=1e-4, atol=1e-4)
    if not exact.all():
        assert_mean_is(samples[:, ~exact], gradient[~exact], groups=50)
    assert float(torch.nn.functional.cosine_similarity(samples.mean(0), gradient, dim=0)) > 0.5


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_weighting_goes_downhill_on_average(weighting):
    asks = Estimates(of_any_estimator(weighting, num_directions=8, eps=0.1))
    asks.take(2)
    mean = asks.take(250, first=2).mean(0)
    assert float(torch.nn.functional.cosine_similarity(mean, asks.model.gradient(), dim=0)) > 0.8


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_aligned_estimates_are_the_gradient_projected_on_the_span_of_the_directions(subspace):
    method = composed("central", "align", subspace, law="rademacher", num_directions=6, eps=0.1)
    asks = Estimates(method)
    coordinates = asks.queries.session.coordinates
    if isinstance(coordinates, ObservesInputs):
        return  # its basis is made in the queries, of what a model's layers see
    estimate = asks.take(1)[0]
    directions = method.estimator.directions(5, 0)
    span = torch.stack(
        [torch.cat([coordinates.z(d, n).double().view(-1) for n in coordinates.weights.tensors]) for d in directions], 1
    )
    # Not lstsq: of directions that depend on each other (six in five dimensions) its answer differs from call to call.
    wanted = span @ (torch.linalg.pinv(span) @ asks.model.gradient())
    torch.testing.assert_close(estimate, wanted, rtol=1e-2, atol=1e-2 * float(wanted.norm()))


# ------------------------------------------------------------------------------------------------------------ variance


@laws_of
def test_variance_grows_with_the_coordinates_that_move_and_not_with_the_weights(subspace, law):
    """E||<g, z> z - P g||^2 / ||P g||^2 of one direction is k + O(1) for k coordinates: O(d) in full, O(r) below."""
    got = drawn(subspace, law)
    wanted = got.lift @ (got.lift.T @ got.gradient)
    estimates = (got.z @ got.gradient).unsqueeze(1) * got.z
    variance = float((estimates - wanted).square().sum(1).mean() / wanted.square().sum())
    k = got.bound.dimension(got.directions[0])
    assert k == int((torch.cat([c for c in got.flat.values() if c.shape[1]], 1) != 0).any(0).sum())
    assert 0.4 * k - 2 < variance < 1.6 * k + 4


def variance(method: Method, steps: int = 150) -> float:
    """Of one step's estimate, all elements together."""
    asks = Estimates(method)
    asks.take(2)
    return float(asks.take(steps, first=2).var(0).sum())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_variance_falls_with_one_over_the_number_of_directions(estimator):
    few, many = (composed(estimator, num_directions=q, eps=0.1) for q in (4, 16))
    if many.estimator.num_directions != 16:
        return  # it draws nothing
    assert variance(many) < 1.25 * variance(few) / 4 + 1e-12


def test_the_variance_of_one_point_explodes_as_eps_vanishes_and_that_of_two_points_does_not():
    def between_batches(estimator: str, eps: float) -> float:
        """The loss goes up and down from step to step, as with batches."""
        asks = Estimates(composed(estimator, num_directions=4, eps=eps), spread=0.5)
        steps = []
        for step in range(200):
            asks.rows = torch.tensor([step % 2])
            steps.append(asks.take(1, first=step)[0])
        return float(torch.stack(steps[1:]).var(0).sum())

    one = [between_batches("one_point", eps) for eps in (1e-1, 1e-2, 1e-3)]
    two = [between_batches("central", eps) for eps in (1e-1, 1e-2, 1e-3)]
    assert one[1] > 30 * one[0]
    assert one[2] > 30 * one[1]
    assert max(two) < 1.05 * min(two)


@pytest.mark.parametrize("across", ACROSS)
@pytest.mark.parametrize("estimator", ["central", "one_sided", "forward_gradient"])
def test_directions_that_hang_together_are_no_noisier(estimator, across):
    """Than as many independent ones; a pair z, -z is one line."""
    together = composed(estimator, num_directions=8, across=across, eps=0.1)
    assert together.estimator.across == across
    apart = composed(estimator, num_directions=4 if across == "antithetic" else 8, eps=0.1)
    assert variance(together) < 1.15 * variance(apart)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("subspace", SUBSPACES)
def test_as_many_orthogonal_directions_as_coordinates_give_the_projected_gradient_exactly(subspace, law):
    got = drawn(subspace, components("subspace")[subspace].laws[0])
    orthonormal = type(got.bound).gain is not BoundSubspace.gain or got.lift.shape == (got.model.count,) * 2
    k = got.bound.dimension(got.directions[0])
    try:
        method = composed("central", "mean", subspace, law, num_directions=k, across="orthogonal", eps=0.1)
        estimator, law = method.estimator, method.subspace.law
        bound = begun(method.bind(Weights(Quadratic())), Direction(5, 0))
    except UserError as refused:
        assert "across" in str(refused)  # noqa: PT017 - said in a sentence
        return
    if estimator.num_directions != k or estimator.across != "orthogonal":
        return  # it makes none
    directions = estimator.directions(5, 0)
    z = torch.stack(
        [
            torch.cat([bound.z(d, n).double().view(-1) * bound.moves(d, n) for n in bound.weights.tensors])
            for d in directions
        ]
    )
    lift = torch.block_diag(
        *(
            lifting(bound, directions[0], n)
            if bound.moves(directions[0], n)
            else torch.zeros(bound.weights.tensors[n].numel(), 0)
            for n in bound.weights.tensors
        )
    )
    gradient = got.gradient
    wanted = lift @ (lift.T @ gradient)
    torch.testing.assert_close((z @ gradient) @ z / k, wanted, rtol=1e-3, atol=1e-3 * float(wanted.norm()))
    assert orthonormal or subspace != "full"
