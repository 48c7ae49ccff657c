"""The ZOOptimizer around any rule: what it hands over, carries over and saves; every optimizer found is held to it."""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from zoft.component import components, create
from zoft.engines.layerwise import Layerwise
from zoft.noise.direction import Direction
from zoft.optimizers._optional import ReadsFactors, RescalesCoefficients
from zoft.optimizers.base import Optimizer
from zoft.optimizers.momentum import Momentum
from zoft.optimizers.muon import Muon
from zoft.optimizers.sgd import SGD
from zoft.step.estimate import StepEstimate
from zoft.step.method import Method
from zoft.step.query import StepQueries
from zoft.step.update import ZOOptimizer
from zoft.subspaces import base
from zoft.subspaces.blocks import Blocks
from zoft.subspaces.full import Full
from zoft.subspaces.low_rank import LowRank
from zoft.weights.tensors import Weights

RULES = [name for name, cls in components("optimizer").items() if not issubclass(cls, ReadsFactors)]
SHAPING = [name for name, cls in components("optimizer").items() if cls.shapes_directions]


class Run:
    """A small model and a method, stepping by hand; it remembers the weights at every query."""

    def __init__(self, optimizer="sgd", subspace=None, *, q=1, lrs=(1e-2, 1e-2), decays=(0.0, 0.0), constant=False):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5))
        self.weights = Weights(self.model)
        inputs, targets = torch.randn(4, 6), torch.randn(4, 5)
        rule = create("optimizer", optimizer, "sgd")
        estimator = create("estimator", "three_point" if rule.name() == "hessian" else "central", "", num_directions=q)
        self.method = Method.of(subspace, estimator, "mean", rule)
        coordinates = self.method.bind(self.weights)
        self.queried: list[torch.Tensor] = []

        def objective(batch):
            self.queried.append(self.flat())
            return torch.zeros(()) if constant else (self.model(inputs) - targets).square().mean()

        session = Layerwise().bind(self.model, coordinates, objective)
        self.coordinates = coordinates
        tensors = list(self.weights.tensors.values())
        sides = [p for p in tensors if p.dim() > 1], [p for p in tensors if p.dim() < 2]
        groups = [{"params": p, "lr": lr, "weight_decay": d} for p, lr, d in zip(sides, lrs, decays, strict=True)]
        self.zo_optimizer = ZOOptimizer(groups, rule, session, lrs[0])
        self.queries = StepQueries(self.method, self.zo_optimizer)

    def ask(self):
        self.queried.clear()
        directions = self.method.estimator.directions(3, self.zo_optimizer.progress.steps)
        asked = self.queries.estimate(None, directions, lr=self.zo_optimizer.param_groups[0]["lr"])
        assert asked.is_usable
        return asked

    def step(self, count=1):
        for _ in range(count):
            self.zo_optimizer.apply(self.ask())
            self.zo_optimizer.progress.steps += 1

    def flat(self):
        return torch.cat([p.detach().double().view(-1) for p in self.weights.tensors.values()])

    def restarted(self, *args, **kwargs):
        """A new run with this one's weights and saved state."""
        file = io.BytesIO()
        torch.save(self.zo_optimizer.state_dict(), file)
        file.seek(0)
        other = Run(*args, **kwargs)
        other.model.load_state_dict({k: v.clone() for k, v in self.model.state_dict().items()})
        other.zo_optimizer.load_state_dict(torch.load(file, weights_only=True))
        return other


def subspaces():
    return {"full": Full(), "low_rank": LowRank(rank=2, interval=2), "blocks": Blocks()}


@pytest.fixture
def in_pieces(monkeypatch):
    """Every direction is drawn anew, in pieces of a few elements, as in a model of billions."""
    monkeypatch.setattr(base, "_KEEP_MODELS", 0)
    monkeypatch.setattr(base, "_CHUNK", 7)


# ---- every optimizer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subspace", ["full", "low_rank"])
@pytest.mark.parametrize("optimizer", RULES)
def test_the_memory_is_what_is_claimed(optimizer, subspace):
    run = Run(optimizer, subspaces()[subspace], q=2)
    run.step(2)
    num_elements = sum(t.numel() for state in run.zo_optimizer.moments.values() for t in state.values())
    assert num_elements == run.method.extra_elements(run.coordinates)
    shapes = {n: {k: tuple(t.shape) for k, t in s.items()} for n, s in run.zo_optimizer.moments.items()}
    rule, shape = run.method.optimizer, run.coordinates.shape
    assert shapes == {name: rule.state_shapes(shape(name)) for name in run.weights.tensors}


@pytest.mark.parametrize("optimizer", RULES)
def test_where_the_objective_is_flat_nothing_but_decay_moves_the_weights(optimizer):
    run = Run(optimizer, constant=True, q=2, lrs=(0.1, 0.2), decays=(0.5, 0.25))
    before = {name: p.detach().clone() for name, p in run.weights.tensors.items()}
    run.step(2)
    for name, parameter in run.weights.tensors.items():
        wanted = before[name] * (1 - (0.1 * 0.5 if parameter.dim() > 1 else 0.2 * 0.25)) ** 2
        torch.testing.assert_close(parameter.data, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", RULES)
def test_groups_have_their_own_learning_rate_also_as_it_changes(optimizer):
    runs = [Run(optimizer, q=2) for _ in range(2)]
    runs[1].zo_optimizer.param_groups[1]["lr"] /= 2  # what a scheduler does
    before = {name: p.detach().double().clone() for name, p in runs[0].weights.tensors.items()}
    for run in runs:
        run.step()
    for name, old in before.items():
        one, two = (run.weights.tensors[name].detach().double() - old for run in runs)
        share = 1.0 if old.dim() > 1 else 0.5
        torch.testing.assert_close(two, share * one, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("subspace", ["full", "low_rank", "blocks"])
@pytest.mark.parametrize("optimizer", RULES)
def test_a_run_that_is_stopped_between_query_and_step_goes_on_as_if_it_had_not_been(optimizer, subspace, in_pieces):
    """The query of a refresh step has carried the state over; asking again must not do it twice."""
    straight, stopped = (Run(optimizer, subspaces()[subspace], q=2) for _ in range(2))
    straight.step(5)
    stopped.step(2)
    stopped.ask()  # step 2 is a refresh
    second = stopped.restarted(optimizer, subspaces()[subspace], q=2)
    second.step(3)
    assert second.weights.digest() == straight.weights.digest()
    assert second.zo_optimizer.scalars == straight.zo_optimizer.scalars
    for name, state in straight.zo_optimizer.moments.items():
        assert all(torch.equal(second.zo_optimizer.moments[name][key], t) for key, t in state.items())


@pytest.mark.parametrize("subspace", ["full", "low_rank", "blocks"])
@pytest.mark.parametrize("optimizer", SHAPING)
def test_a_shaped_direction_is_applied_as_it_was_measured_also_at_a_refresh(optimizer, subspace, in_pieces):
    """Drawn anew for the step, piece by piece while the state is being written, it is the one that was queried."""
    known = {"adam_epsilon": 1e6} if optimizer == "adamu" else {}  # then its scaling is the same everywhere
    known |= {"explore_steps": 0, "anneal_steps": 1, "alpha": 0.5} if optimizer == "adamu" else {}
    known |= {"smooth": 0.1} if optimizer == "hessian" else {}  # H moves a lot
    known |= {"angle": 0.7} if optimizer == "cone" else {}
    rule = components("optimizer")[optimizer](**known)
    run = Run(rule, subspaces()[subspace], lrs=[3e-2 * (1e6 if optimizer == "adamu" else 1)] * 2)
    for step in range(6):
        before = run.flat()
        run.step()
        points = [queried - before for queried in run.queried]
        ahead = next(point for point in points if point.abs().max() > 0)
        cosine = float(nn.functional.cosine_similarity(run.flat() - before, ahead, dim=0))
        assert abs(cosine) > 1 - 1e-5, step
        state = next(iter(run.zo_optimizer.moments.values()))
        assert not all(
            torch.equal(t, t.new_full((), rule.start_values.get(k, 0.0)).expand_as(t)) for k, t in state.items()
        )


# ---- what a rule is handed -------------------------------------------------------------------------------------------


@dataclass
class Spy(Optimizer):
    """Looks at everything, and steps along the estimate."""

    look_back: int = 0
    seen: list = field(default_factory=list)

    @property
    def history_length(self):
        return self.look_back

    def update_from(self, estimate, state, step):
        self.seen.append((estimate, step))
        return estimate.gradient()


@dataclass
class WholeSpy(Spy):
    per_matrix = True

    def state_shapes(self, shape):
        return {"odd": (3,)} if len(shape) > 1 else {}

    def update_from(self, estimate, state, step):
        self.seen.append((estimate, {key: tuple(t.shape) for key, t in state.items()}))
        return estimate.gradient().view(estimate.shape)


def steps_of(seen, name):
    return [step for estimate, step in seen if estimate.name == name and estimate.start == 0]


def test_records_are_the_last_steps_in_order():
    spy = Spy(look_back=2)
    run = Run(spy)
    run.step(4)
    looked = [[terms[0][0].step for terms in e.records] for e, _ in spy.seen if e.name == "0.weight"]
    assert looked == [[], [0], [0, 1], [1, 2]]
    assert len(run.zo_optimizer.records) == 2


def test_records_of_another_basis_are_left_out():
    spy = Spy(look_back=3)
    Run(spy, LowRank(rank=2, interval=2)).step(5)
    looked = [[terms[0][0].step for terms in e.records] for e, _ in spy.seen if e.name == "0.weight"]
    assert looked == [[], [0], [], [2], []]
    vector = [[terms[0][0].step for terms in e.records] for e, _ in spy.seen if e.name == "0.bias"]
    assert vector == [[], [0], [0, 1], [0, 1, 2], [1, 2, 3]]  # it moves in full, whatever V is


def test_records_of_steps_that_did_not_move_a_tensor_are_left_out():
    spy = Spy(look_back=10)
    run = Run(spy, Blocks())
    run.step(6)
    for name in run.weights.tensors:
        moved = [s for s in range(6) if run.coordinates.moves(Direction(3, s), name)]
        looked = [[terms[0][0].step for terms in e.records] for e, _ in spy.seen if e.name == name]
        assert looked == [moved[:i] for i in range(len(moved))]


def test_an_update_is_counted_for_the_tensors_that_it_moves():
    spy = Spy()
    run = Run(spy, Blocks())
    run.step(6)
    for name in run.weights.tensors:
        moved = sum(run.coordinates.moves(Direction(3, s), name) for s in range(6))
        assert steps_of(spy.seen, name) == list(range(1, moved + 1))
    assert run.zo_optimizer.progress.updates == 6


def test_terms_that_do_not_move_a_tensor_are_no_part_of_its_estimate():
    """An estimate may go along directions of several steps, which move different blocks."""
    spy = Spy()
    run = Run(spy, Blocks())
    terms = [(Direction(3, step), 1.0 + step) for step in range(2)]
    run.zo_optimizer.begin(terms[0][0])
    run.zo_optimizer.apply(StepEstimate.of(terms))
    assert len({e.name for e, _ in spy.seen}) > len(
        {n for n in run.weights.tensors if run.coordinates.moves(terms[0][0], n)}
    )
    for estimate, _ in spy.seen:
        assert estimate.terms == [t for t in terms if run.coordinates.moves(t[0], estimate.name)]


def test_curvatures_stay_with_their_directions():
    spy = Spy()
    run = Run(spy, q=3)
    directions = run.method.estimator.directions(3, 0)
    run.zo_optimizer.apply(StepEstimate.of([(d, 1.0) for d in directions], [5.0, 6.0, 7.0]))
    assert all(estimate.curvatures == [5.0, 6.0, 7.0] for estimate, _ in spy.seen)
    spy.seen.clear()
    run.zo_optimizer.apply(StepEstimate.of([(d, 1.0) for d in directions]))
    assert all(estimate.curvatures is None for estimate, _ in spy.seen), "those of an earlier step"


def test_whole_tensors_come_in_one_piece_with_their_state_as_it_is(monkeypatch):
    spy = WholeSpy()
    run, plain = Run(spy), Run("sgd")
    monkeypatch.setattr(base, "_CHUNK", 7)
    for one in (run, plain):
        one.step(2)
    for estimate, shapes in spy.seen:
        tensor = run.weights.tensors[estimate.name]
        assert (estimate.start, estimate.stop) == (0, tensor.numel())
        assert shapes == ({"odd": (3,)} if tensor.dim() > 1 else {})
    torch.testing.assert_close(run.flat(), plain.flat(), rtol=0, atol=1e-7)


def test_state_that_is_not_kept_of_every_tensor_is_carried_where_it_is():
    """Muon keeps no running mean of vectors."""
    run = Run(Muon(beta=0.9, method="power", top_k=2), LowRank(rank=2, interval=1))
    run.step(3)
    assert set(run.zo_optimizer.moments["0.weight"]) == {"momentum", "V"}
    assert run.zo_optimizer.moments["0.bias"] == {}


def test_state_is_carried_over_before_the_queries():
    run = Run(Momentum(), LowRank(rank=2, interval=2))
    run.step(2)
    old, before = run.zo_optimizer.history["0.weight"][1], run.zo_optimizer.moments["0.weight"]["momentum"].clone()
    run.ask()
    new = run.zo_optimizer.direction
    carried = run.zo_optimizer.moments["0.weight"]["momentum"]
    assert not torch.equal(carried, before)
    assert torch.equal(carried, run.coordinates.transport("0.weight", before, old, new))


def test_what_is_not_linear_in_the_estimates_stays_as_it_is_at_a_refresh():
    run = Run("adam", LowRank(rank=2, interval=2))
    run.step(2)
    before = {key: t.clone() for key, t in run.zo_optimizer.moments["0.weight"].items()}
    run.ask()
    after = run.zo_optimizer.moments["0.weight"]
    assert not torch.equal(after["moment1"], before["moment1"])
    assert torch.equal(after["moment2"], before["moment2"])


def test_the_numbers_of_a_context_are_those_of_the_tensors_that_move():
    contexts = []

    @dataclass
    class Context(Momentum):
        shapes_directions = True

        def shape_context(self, states, step):
            contexts.append((step, set(states)))
            return {}

    run = Run(Context(), Blocks())
    run.step(5)
    wanted = [{n for n in run.weights.tensors if run.coordinates.moves(Direction(3, s), n)} for s in range(5)]
    assert contexts == list(enumerate(wanted))


def test_a_rule_may_change_the_coefficients_once_a_step():
    @dataclass
    class Halved(RescalesCoefficients, SGD):
        def init(self):
            return {"calls": 0}

        def coefficients(self, coefficients, scalars):
            scalars["calls"] += 1
            return [c / 2 for c in coefficients]

    half, plain = Run(Halved(), q=2), Run("sgd", q=2)
    before = half.flat()
    for one in (half, plain):
        one.step()
    torch.testing.assert_close(half.flat() - before, (plain.flat() - before) / 2, rtol=1e-3, atol=1e-7)
    assert half.zo_optimizer.scalars["optimizer"] == {"calls": 1}
    assert half.restarted(Halved(), q=2).zo_optimizer.scalars["optimizer"] == {"calls": 1}


def test_records_outlive_a_restart():
    run = Run(Spy(look_back=2), q=2)
    run.step(3)
    other = run.restarted(Spy(look_back=2), q=2)
    assert other.zo_optimizer.records == run.zo_optimizer.records
    assert all(math.isfinite(c) for _, c in itertools.chain(*other.zo_optimizer.records))
