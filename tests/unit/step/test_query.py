"""Queries: what is counted is what is asked, a step that comes to nothing leaves no trace, and anchors hold."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from tests.models import batch_for, tiny_opt
from zoft.component import components, create
from zoft.engines.base import Engine
from zoft.errors import UserError
from zoft.estimators.base import Estimator
from zoft.estimators.nodes import Nodes
from zoft.lm.data.rows import examples_of, of_lengths
from zoft.noise.direction import Direction
from zoft.step.method import Method
from zoft.step.query import StepQueries
from zoft.step.update import ZOOptimizer
from zoft.weights.tensors import Weights

QUERYING = [
    name for name, cls in components("estimator").items() if not cls.backpropagates and not issubclass(cls, Nodes)
]


class Bowl(nn.Module):
    """Rows x -> their mean (x (W - A))^2 / 2: a loss whose gradient is known."""

    def __init__(self, out: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.weight = nn.Parameter(torch.randn(5, out, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight).square().sum(1).mean() / 2


def rows(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))}


class Steps:
    """A method's parts stepping by hand; every forward of the objective is counted."""

    def __init__(
        self,
        estimator: str | Estimator,
        weighting: Any = "mean",
        optimizer: Any = "sgd",
        subspace: Any = "full",
        engine: str | Engine = "auto",
        model: nn.Module | None = None,
        lr: float = 1e-2,
        batches: list[Any] | None = None,
    ) -> None:
        self.model = Bowl() if model is None else model
        self.batch: Any = rows(3) if model is None else batch_for(model)
        self.method = Method.of(subspace, estimator, weighting, optimizer)
        self.calls = 0
        self.nan_at = -1
        coordinates = self.method.bind(Weights(self.model))
        chosen = create("engine", engine, "auto").choose(self.method.estimator, coordinates, self.model)
        self.session = chosen.bind(self.model, coordinates, self.objective)
        self.weights = self.session.weights
        groups = [{"params": list(self.weights.tensors.values()), "weight_decay": 0.0}]
        self.zo_optimizer = ZOOptimizer(groups, self.method.optimizer, self.session, lr)
        self.queries = StepQueries(
            self.method,
            self.zo_optimizer,
            examples=examples_of,
            select=lambda batch, lengths: of_lengths(batch, *lengths),
            batches=lambda batch, count, step: (batches or [self.batch] * count)[:count],
        )

    def objective(self, batch: Any) -> torch.Tensor:
        self.calls += 1
        loss = self.model(**batch)
        loss = getattr(loss, "loss", loss)
        return loss * float("nan") if self.calls == self.nan_at else loss

    def ask(self) -> Any:
        step = self.zo_optimizer.progress.steps
        asked = self.queries.estimate(self.batch, self.method.estimator.directions(5, step), lr=self.lr)
        self.zo_optimizer.progress.steps += 1
        return asked

    @property
    def lr(self) -> float:
        return float(self.zo_optimizer.param_groups[0]["lr"])

    def step(self) -> Any:
        asked = self.ask()
        self.zo_optimizer.apply(asked)
        return asked

    def z(self, direction: Direction, name: str = "weight") -> torch.Tensor:
        return self.session.coordinates.z(direction, name).clone()


# --------------------------------------------------------------------------------------------------- what is counted


@pytest.mark.parametrize("estimator", QUERYING)
def test_queries_are_the_forwards_that_are_made(estimator):
    run = Steps(estimator)
    run.step()  # an engine may look twice at its first queries
    work = {"forward_gradient": 2}.get(estimator, 1)  # a pass with a tangent is counted as two
    per_query = 3 if estimator == "per_example" else 1  # examples one by one are one query together
    for _ in range(4):
        run.calls, step = 0, run.zo_optimizer.progress.steps
        asked = run.step()
        assert asked.num_queries * per_query == run.calls * work
        assert asked.num_queries == run.method.queries_at(step)


@pytest.mark.parametrize("estimator", [n for n, cls in components("estimator").items() if cls.backpropagates])
def test_a_backward_pass_counts_as_two_forwards(estimator):
    fields = {"long_tokens": 5} if estimator == "addax" else {}
    run = Steps(components("estimator")[estimator](**fields), model=tiny_opt(), engine="layerwise")
    if estimator == "addax":  # one row of five tokens, two of seven
        run.batch["attention_mask"][0, :2] = 0
    run.step()
    run.calls, step = 0, run.zo_optimizer.progress.steps
    asked = run.step()
    assert asked.num_queries == run.method.queries_at(step) == run.calls + 2


def test_fewer_batches_than_asked_for_are_fewer_queries():
    run = Steps(components("estimator")["svrg"](anchor_batches=8), batches=[rows(2), rows(2, 1)], engine="layerwise")
    assert run.step().num_queries == 4


def test_trials_of_the_step_are_counted_too():
    run = Steps("central", optimizer="conservative", engine="layerwise")
    run.step()
    run.calls = 0
    assert run.step().num_queries == run.calls == run.method.queries_at(1)


# ------------------------------------------------------------------------------------------ steps that come to nothing


@pytest.mark.parametrize(
    ("estimator", "weighting"),
    [
        (n, "mean")
        for n, cls in components("estimator").items()
        if n != "forward_gradient" and not issubclass(cls, Nodes)
    ]
    + [("central", "kalman"), ("three_point", "curvature"), ("central", "loss_std")],
)
@pytest.mark.parametrize("last", [False, True])
def test_a_step_with_a_loss_that_is_not_finite_leaves_nothing_behind(estimator, weighting, last):
    model = None if estimator in QUERYING else tiny_opt()
    run, plain = (Steps(estimator, weighting, model=copy.deepcopy(model), engine="in_place") for _ in range(2))
    for _ in range(3):  # the third is an anchor's, the fourth is not
        assert run.step().is_usable
        plain.step()
    for _ in range(2):
        state = copy.deepcopy(run.zo_optimizer.scalars)
        anchor, digest, updates = run.session.anchor, run.weights.digest(), run.zo_optimizer.progress.updates
        run.calls = 0
        run.nan_at = plain_calls(plain) if last else 1
        asked = run.step()
        assert not asked.is_usable
        assert (asked.terms, asked.backward, asked.curvatures) == (None, None, None)
        assert run.zo_optimizer.scalars == state
        assert run.session.anchor is anchor
        assert run.weights.digest() == digest
        assert run.zo_optimizer.progress.updates == updates
        run.nan_at = -1


def plain_calls(run: Steps) -> int:
    run.calls = 0
    run.step()
    return run.calls


def test_coefficients_that_are_not_finite_leave_nothing_behind(monkeypatch):
    run = Steps("one_point")
    run.step()
    state = copy.deepcopy(run.zo_optimizer.scalars)
    mean = type(run.method.weighting)
    monkeypatch.setattr(mean, "coefficients", lambda self, m, g, s: m.projected_grads * float("inf"))
    digest = run.weights.digest()
    assert not run.step().is_usable
    assert run.zo_optimizer.scalars == state
    assert run.weights.digest() == digest


def test_an_interrupt_leaves_nothing_behind(monkeypatch):
    run = Steps("one_point", engine="layerwise")
    run.step()
    state, digest = copy.deepcopy(run.zo_optimizer.scalars), run.weights.digest()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(run.method.weighting), "coefficients", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.ask()
    assert run.zo_optimizer.scalars == state
    assert run.weights.digest() == digest


# ------------------------------------------------------------------------------------------------------- one_point


def test_the_first_step_of_one_point_moves_nothing_and_the_second_goes_by_the_first():
    run = Steps(components("estimator")["one_point"](eps=0.1), lr=0.5)
    before = run.weights.digest()
    first = run.step()
    assert run.weights.digest() == before
    clean = run.model.weight.detach().clone()
    second = run.step()
    slope = (second.losses - first.losses) / 0.1
    wanted = clean - 0.5 * slope * run.z(Direction(5, 1))
    torch.testing.assert_close(run.model.weight.detach(), wanted)


# ------------------------------------------------------------------------------------------------------ per example


def test_the_step_of_per_example_is_the_mean_over_examples_and_directions():
    run = Steps(components("estimator")["per_example"](eps=1e-3, num_directions=2), lr=0.1)
    clean = run.model.weight.detach().clone()
    directions = run.method.estimator.directions(5, 0)
    run.step()
    total = torch.zeros_like(clean)
    for direction in directions:
        for i, one in enumerate(examples_of(run.batch)):
            z = run.z(Direction(direction.seed, direction.step, direction.index, example=i))
            gradient = one["x"].T @ (one["x"] @ clean)
            total += (gradient * z).sum() * z / 6
    torch.testing.assert_close(run.model.weight.detach(), clean - 0.1 * total, rtol=1e-3, atol=1e-4)


def test_per_example_is_unbiased_and_has_the_variance_of_as_many_directions():
    """Over many steps at lr=0: the mean is the batch's gradient, and the variance a B-th of one direction's."""
    estimates, variances = {}, {}
    for name in ("central", "per_example"):
        estimator, signs = components("estimator")[name](eps=1e-2), components("subspace")["full"](law="rademacher")
        run = Steps(estimator, subspace=signs, lr=0.0, engine="layerwise")
        run.batch = {"x": torch.ones(8, 5) * torch.tensor([1.0, 2.0, 0.5, -1.0, 1.5])}  # equal rows: equal gradients
        drawn = []
        for _ in range(400):
            asked = run.ask()
            drawn.append(sum(c * run.z(d) for d, c in asked.terms))
            run.zo_optimizer.apply(asked)
        estimates[name] = torch.stack(drawn)
        x = run.batch["x"]
        gradient = (x.T @ (x @ run.model.weight.detach())) / 8
        error = estimates[name].std(0) / 20
        assert bool(((estimates[name].mean(0) - gradient).abs() < 4 * error).all())
        variances[name] = float(estimates[name].var(0).sum())
    assert 6 < variances["central"] / variances["per_example"] < 10


# ------------------------------------------------------------------------------------------------------------- svrg


def svrg(**fields: Any) -> Steps:
    data = [rows(2, seed) for seed in range(3)]
    estimator = components("estimator")["svrg"](eps=1e-3, interval=3, anchor_batches=3, **fields)
    return Steps(estimator, batches=data, lr=0.05, engine="layerwise")


def gradient_of(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.T @ (x @ weight) / len(x)


@pytest.mark.parametrize("q", [1, 2])
def test_svrg_step_by_step(q):
    run = svrg(num_directions=q)
    data = torch.cat([rows(2, seed)["x"] for seed in range(3)])
    for step in range(5):
        clean = run.model.weight.detach().clone()
        run.step()
        zs = [run.z(d) for d in run.method.estimator.directions(5, step)]
        if step % 3 == 0:
            anchor = clean
            of_anchor = sum((gradient_of(data, anchor) * z).sum() * z / q for z in zs)
            estimate = of_anchor
        else:
            x = run.batch["x"]
            change = gradient_of(x, clean) - gradient_of(x, anchor)
            estimate = sum((change * z).sum() * z / q for z in zs) + of_anchor
        torch.testing.assert_close(run.model.weight.detach(), clean - 0.05 * estimate, rtol=1e-3, atol=2e-3)
        assert torch.equal(run.session.anchor["weight"], anchor)
        assert run.session.anchor["weight"].data_ptr() != run.model.weight.data_ptr()


def test_svrg_goes_on_from_a_saved_state():
    straight, first = svrg(), svrg()
    for _ in range(5):
        straight.step()
    for _ in range(2):
        first.step()
    file = io.BytesIO()
    torch.save({"model": first.model.state_dict(), "optimizer": first.zo_optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = svrg()
    second.model.load_state_dict(saved["model"])
    second.zo_optimizer.load_state_dict(saved["optimizer"])
    for _ in range(3):
        second.step()
    assert second.weights.digest() == straight.weights.digest()


def test_a_skipped_anchor_leaves_the_one_before_in_use():
    run = svrg()
    for _ in range(3):
        run.step()
    anchor, terms = run.session.anchor, list(run.zo_optimizer.scalars["estimator"]["terms"])
    run.calls, run.nan_at = 0, 2
    assert not run.step().is_usable  # step 3 was to make the next one
    assert run.step().is_usable
    assert run.session.anchor is anchor
    assert run.zo_optimizer.scalars["estimator"]["terms"] == terms


def test_without_its_first_anchor_svrg_is_central_until_the_next():
    run, plain = svrg(), Steps(components("estimator")["central"](eps=1e-3), lr=0.05, engine="layerwise")
    run.nan_at = 1
    assert not run.step().is_usable
    plain.zo_optimizer.progress.steps = 1
    for _ in range(2):
        run.step()
        plain.step()
        torch.testing.assert_close(run.model.weight, plain.model.weight, rtol=1e-6, atol=1e-7)
    assert run.session.anchor is None
    run.step()
    assert run.session.anchor is not None


@pytest.mark.parametrize("engine", ["in_place", "layerwise", "side_path"])
def test_points_at_the_anchor_are_queried_at_the_anchor(engine):
    """The model's own weights come back, also when the objective raises."""
    run = Steps("svrg", model=tiny_opt(), engine=engine, lr=1e-2)
    for _ in range(2):
        run.step()
    direction = run.method.estimator.directions(5, 9)[0]
    points = run.method.estimator.points([direction])
    digest = run.weights.digest()
    losses = run.queries._at(run.batch, points)
    assert run.weights.digest() == digest
    other = tiny_opt()
    with torch.no_grad():
        for point, loss in zip(points, losses.tolist(), strict=True):
            for name, tensor in other.named_parameters():
                start = run.session.anchor[name] if point.anchor else run.weights.tensors[name]
                tensor.copy_(start + point.scale * run.z(direction, name))
            assert loss == pytest.approx(float(other(**run.batch).loss), rel=1e-5)
    assert len(set(losses.tolist())) == 4
    run.calls, run.nan_at = 0, -1
    real, run.session.objective = run.session.objective, lambda batch: raise_at(run, real, batch)
    with pytest.raises(RuntimeError, match="the objective's own"):
        run.queries._at(run.batch, points)
    assert run.weights.digest() == digest


def raise_at(run: Steps, real: Any, batch: Any) -> torch.Tensor:
    if run.calls >= 3:
        raise RuntimeError("the objective's own")
    return real(batch)


# ------------------------------------------------------------------------------------------------ combinations


@pytest.mark.parametrize("weighting", components("weighting"))
@pytest.mark.parametrize("estimator", QUERYING)
def test_every_estimator_goes_with_every_weighting_or_says_why_not(estimator, weighting):
    fields = {"num_directions": 3, "eps": 1e-2} if estimator != "forward_gradient" else {"num_directions": 3}
    try:
        run = Steps(components("estimator")[estimator](**fields), weighting, lr=1e-3)
    except UserError:
        return
    for _ in range(3):
        asked = run.step()
        assert asked.is_usable
        assert len(run.zo_optimizer.scalars["weighting"]) < 5
    assert run.zo_optimizer.progress.updates == 3


@pytest.mark.parametrize("weighting", components("weighting"))
@pytest.mark.parametrize("estimator", ["central", "one_sided", "leave_one_out", "three_point", "per_example", "kernel"])
def test_every_pair_goes_downhill(estimator, weighting):
    """On a bowl, with many directions and a step of a known length."""
    q = 2 if estimator == "per_example" else 64 if estimator == "kernel" else 16
    try:
        run = Steps(
            components("estimator")[estimator](num_directions=q, eps=1e-2), weighting, lr=0.02, engine="layerwise"
        )
    except UserError:
        return
    start = float(run.model(**run.batch).detach())
    for _ in range(20):
        run.step()
    assert float(run.model(**run.batch).detach()) < start
