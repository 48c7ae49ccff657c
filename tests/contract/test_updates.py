"""Every optimizer, subspace and estimator: the direction applied is the one measured, and lr=0 changes no bit."""

from __future__ import annotations

import io
from itertools import combinations

import pytest
import torch
from torch import nn

from tests.contract.discovered import (
    CELLS,
    DTYPES,
    OPTIMIZERS,
    OWN_CELLS,
    PAIRS,
    SUBSPACES,
    coordinates_of,
    draws_by,
    draws_from,
    example,
    method,
)
from tests.models import batch_for, tiny_opt
from zoft.component import components
from zoft.engines._optional import settle
from zoft.lm.data.rows import examples_of, of_lengths
from zoft.noise.direction import Direction
from zoft.noise.source import LAWS, SOURCES
from zoft.step.estimate import StepEstimate
from zoft.step.query import StepQueries
from zoft.step.update import ZOOptimizer
from zoft.subspaces import base
from zoft.weights.tensors import Weights


class Run:
    """A model, an estimator and an optimizer stepping by hand, as the trainer drives them."""

    def __init__(
        self,
        optimizer,
        *,
        estimator="central",
        weighting="mean",
        engine="auto",
        law="gaussian",
        dtype="fp32",
        lr=1e-2,
        decay=0.0,
        subspace="full",
        noise="counter",
        interval=2,
        q=2,
        eps=1e-2,
    ):
        self.model = tiny_opt(num_hidden_layers=2).to(DTYPES[dtype])
        self.batch = batch_for(self.model)
        self.method = method(subspace, estimator, weighting, optimizer, law, interval, q, eps, noise)
        self.estimator = self.method.estimator
        coordinates = self.method.bind(Weights(self.model))
        chosen = example("engine", engine).choose(self.estimator, coordinates, self.model)
        self.session = chosen.bind(self.model, coordinates, lambda b: self.model(**b).loss)
        self.weights = self.session.weights
        groups = [
            {"params": [p for p in self.weights.tensors.values() if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in self.weights.tensors.values() if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.zo_optimizer = ZOOptimizer(groups, self.method.optimizer, self.session, lr)
        self.queries = StepQueries(
            self.method,
            self.zo_optimizer,
            examples=examples_of,
            select=lambda b, lengths: of_lengths(b, *lengths),
            batches=lambda batch, count, step: [self.batch] * count,
        )

    def ask(self) -> StepEstimate:
        """The estimate of the next step, which is not written."""
        directions = self.estimator.directions(5, self.zo_optimizer.progress.steps)
        asked = self.queries.estimate(self.batch, directions, lr=self.zo_optimizer.param_groups[0]["lr"])
        self.zo_optimizer.progress.steps += 1
        assert asked.is_usable
        return asked

    def step(self) -> list[tuple[Direction, float]]:
        estimate = self.ask()
        self.zo_optimizer.apply(estimate)
        return list(estimate.terms)

    def flat(self) -> torch.Tensor:
        settle(self.session)  # a step may wait for the next visit of its block
        return torch.cat([p.detach().double().view(-1) for p in self.weights.tensors.values()])

    def direction_of(self, terms) -> torch.Tensor:
        z = self.session.coordinates.z
        return torch.cat([sum(c * z(d, n).double() for d, c in terms).view(-1) for n in self.weights.tensors])


AS_CHOSEN = [cell for cell in CELLS if cell[0] == "auto" and cell[2] == "full" and cell not in OWN_CELLS]
"""Every estimator, by the engine that is chosen for it."""


# Laws and numbers of directions are the coordinates' own business, which no engine has a part in: one is enough.
@pytest.mark.parametrize(
    ("engine", "estimator", "subspace", "law", "q"),
    [(*cell, LAWS[0], 2) for cell in OWN_CELLS + AS_CHOSEN]
    + [("auto", "central", subspace, law, 2) for subspace in SUBSPACES for law in LAWS[1:] if draws_by(subspace, law)]
    + [("auto", "central", subspace, LAWS[0], 1) for subspace in SUBSPACES],  # may be made while it is added
)
def test_the_direction_applied_is_the_direction_measured(engine, estimator, subspace, law, q):
    run = Run("sgd", estimator=estimator, engine=engine, subspace=subspace, law=law, q=q, lr=1e-3)
    run.step()  # residual feedback has nothing to compare its first losses with
    for _ in range(3):  # every step is a fresh direction; what lasts an interval of two steps changes within these
        before = run.flat()
        terms = run.step()
        moved = run.flat() - before
        measured = run.direction_of(terms)
        if measured.any() or moved.any():  # the slope along a weight that is not used is zero
            assert float(torch.nn.functional.cosine_similarity(moved, -measured, dim=0)) > 1 - 1e-6
        torch.testing.assert_close(moved, -1e-3 * measured, rtol=0, atol=2e-7)


@pytest.mark.parametrize(
    ("engine", "estimator", "subspace"),
    [cell for cell in OWN_CELLS + AS_CHOSEN if components("estimator")[cell[1]].measures_slopes],
)
def test_measured_along_what_is_applied(engine, estimator, subspace):
    """Each coefficient is the slope of the loss along the very direction that the step moves along."""
    run = Run("sgd", estimator=estimator, engine=engine, subspace=subspace, lr=0.0, eps=1e-4)
    directions = run.estimator.directions(5, 0)
    run.queries.session.coordinates.begin(directions[0])
    losses = run.session.losses(run.batch, run.estimator.points(directions))
    grads = torch.autograd.grad(run.model(**run.batch).loss, list(run.weights.tensors.values()))
    gradient = torch.cat([g.double().view(-1) for g in grads])
    slopes = torch.stack([gradient @ run.direction_of([(d, 1.0)]) for d in directions])
    torch.testing.assert_close(run.estimator.projected_grads(losses).double(), slopes, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("q", [1, 2])
@pytest.mark.parametrize("subspace", SUBSPACES)
def test_a_step_writes_every_element_of_what_moves_once_and_no_other(subspace, q, monkeypatch):
    monkeypatch.setattr(base, "_CHUNK", 100)
    run = Run("sgd", subspace=subspace, interval=1, q=q)
    written, moved = [], set()
    subtract, add = run.session.apply_, run.session.coordinates.add_

    def subtracted(name, start, stop, *args):
        written.append((name, start, stop))
        subtract(name, start, stop, *args)

    def added(out, direction, name, start, scale):  # a step that is made while it is added
        written.append((name, start, start + out.numel()))
        add(out, direction, name, start, scale)

    for _ in range(8):  # more than it has layers
        asked = run.ask()
        written.clear()
        with monkeypatch.context() as writing:  # queries move weights too, and back
            writing.setattr(run.session, "apply_", subtracted)
            writing.setattr(run.session.coordinates, "add_", added)
            run.zo_optimizer.apply(asked)
        terms = list(asked.terms)
        for name, tensor in run.weights.tensors.items():
            elements = [i for n, start, stop in written if n == name for i in range(start, stop)]
            moves = any(run.session.coordinates.moves(direction, name) for direction, _ in terms)
            assert elements == list(range(tensor.numel() if moves else 0))
            assert all(stop - start <= 100 for _, start, stop in written)
            moved |= {name} if moves else set()
    if subspace != "coordinate":  # where a step moves one weight or two, eight are not enough
        assert moved == set(filter(run.session.coordinates.ever_moves, run.weights.tensors)), "something never moves"


STILL = [
    *[(optimizer, "full", dtype, "counter") for optimizer in OPTIMIZERS for dtype in DTYPES],
    *[("sgd", subspace, dtype, "counter") for subspace in SUBSPACES if subspace != "full" for dtype in DTYPES],
    *[(*pair, "bf16", "counter") for pair in PAIRS if pair[0] != "sgd" and pair[1] != "full"],
    *[("sgd", s, "fp32", noise) for s in SUBSPACES for noise in SOURCES if noise != "counter" and draws_from(s, noise)],
]
"""(optimizer, subspace, dtype, noise): a step is rounded after both have made it: each meets every dtype once."""


@pytest.mark.parametrize(("optimizer", "subspace", "dtype", "noise"), STILL)
def test_a_learning_rate_of_zero_changes_no_bit(optimizer, subspace, dtype, noise):
    run = Run(optimizer, subspace=subspace, dtype=dtype, lr=0.0, decay=0.1, noise=noise, engine="layerwise")
    for tensor in run.weights.tensors.values():
        tensor.data.view(-1)[:4] = -0.0  # which 0 - 0 would turn into +0
    digest = run.weights.digest()
    for _ in range(3):
        run.step()
    assert run.weights.digest() == digest
    assert run.zo_optimizer.progress.updates == 3


# Half precision has its own state besides what float32 has. Chunks are of no consequence (see below): one each.
@pytest.mark.parametrize(
    ("optimizer", "subspace", "dtype", "chunk"),
    [
        (*pair, dtype, chunk)
        for pair in PAIRS
        for dtype, chunk in (("fp32", 101), ("bf16", 1 << 20), ("fp16", 1 << 20))
        if pair[1] == "full" or dtype == "bf16"
    ],
)
def test_a_saved_state_continues_bit_for_bit(optimizer, subspace, dtype, chunk, monkeypatch):
    monkeypatch.setattr(base, "_CHUNK", chunk)
    same = {"subspace": subspace, "dtype": dtype, "decay": 0.1}
    straight = Run(optimizer, **same)
    for _ in range(2):
        straight.step()
    file = io.BytesIO()
    torch.save({"model": straight.model.state_dict(), "optimizer": straight.zo_optimizer.state_dict()}, file)
    file.seek(0)
    for _ in range(3):
        straight.step()
    saved = torch.load(file, weights_only=True)  # tensors and plain numbers only
    second = Run(optimizer, **same, lr=123.0)
    second.model.load_state_dict(saved["model"])
    second.zo_optimizer.load_state_dict(saved["optimizer"])
    for _ in range(3):
        second.step()
    assert second.weights.digest() == straight.weights.digest()
    assert second.zo_optimizer.progress == straight.zo_optimizer.progress
    for name, state in straight.zo_optimizer.moments.items():
        for key, tensor in state.items():
            assert torch.equal(second.zo_optimizer.moments[name][key], tensor)
            assert tensor.dtype == torch.float32
            shapes = straight.method.optimizer.state_shapes(straight.session.coordinates.shape(name))
            assert tensor.shape == shapes[key]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_saved_state_is_not_changed_by_what_follows(optimizer):
    run = Run(optimizer)
    run.step()
    state = run.zo_optimizer.state_dict()
    other = Run(optimizer)
    other.zo_optimizer.load_state_dict(state)
    copies = {(n, k): t.clone() for n, moments in state["state"].items() for k, t in moments.items()}
    other.step()
    assert all(torch.equal(state["state"][n][k], t) for (n, k), t in copies.items())


@pytest.mark.parametrize(("optimizer", "subspace"), PAIRS)
def test_chunks_do_not_change_the_step(optimizer, subspace, monkeypatch):
    digests = set()
    for chunk in (101, 1 << 20):  # no tensor is a multiple of it
        monkeypatch.setattr(base, "_CHUNK", chunk)
        run = Run(optimizer, subspace=subspace, decay=0.1)
        for _ in range(3):
            run.step()
        digests.add(run.weights.digest())
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("optimizer", "subspace", "dtype"),
    [(*pair, "fp32") for pair in PAIRS if pair[0] != "momentum" or pair[1] in ("full", "low_rank")]
    + [(optimizer, "full", dtype) for optimizer in ("sgd", "adam") for dtype in DTYPES if dtype != "fp32"],
)
def test_every_optimizer_moves_downhill(optimizer, subspace, dtype):
    run = Run(optimizer, subspace=subspace, dtype=dtype, lr=1e-3, q=8)
    start = float(run.model(**run.batch).loss.detach())
    for _ in range(3):
        run.step()
    assert float(run.model(**run.batch).loss.detach()) < start


@pytest.mark.parametrize(("optimizer", "subspace"), PAIRS)
def test_weight_decay_and_learning_rate_are_honoured(optimizer, subspace):
    """Halving the rate halves the first step; decay adds rate * decay * theta to it, on the decayed group alone."""
    moved = {}
    for lr, decay in ((1e-2, 0.0), (5e-3, 0.0), (1e-2, 0.5)):
        run = Run(optimizer, subspace=subspace, lr=lr, decay=decay)
        before = {n: p.detach().double().clone() for n, p in run.weights.tensors.items()}
        terms = run.step()
        moved[lr, decay] = {n: p.detach().double() - before[n] for n, p in run.weights.tensors.items()}
    for name, step in moved[1e-2, 0.0].items():
        torch.testing.assert_close(moved[5e-3, 0.0][name], step / 2, rtol=1e-3, atol=2e-7)
        moves = any(run.session.coordinates.moves(direction, name) for direction, _ in terms)
        decays = before[name].dim() > 1 and moves
        decay = -1e-2 * 0.5 * before[name] if decays else torch.zeros_like(step)
        torch.testing.assert_close(moved[1e-2, 0.5][name] - step, decay, rtol=1e-3, atol=3e-7)


class Alike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(300, 300, bias=False) for _ in range(4))
        self.gains = nn.ParameterList(torch.ones(90_000) for _ in range(2))


@pytest.mark.parametrize(
    ("subspace", "noise"), [(s, noise) for s in SUBSPACES for noise in SOURCES if draws_from(s, noise)]
)
def test_tensors_of_one_shape_do_not_share_their_noise(subspace, noise):
    """Nor do steps of a run; every law, and steps with one seed: see the tests of estimates."""
    coordinates = coordinates_of(subspace, Alike(), LAWS[0], noise, interval=1)
    directions = [Direction(7 + step, step) for step in range(4)]
    drawn = [
        coordinates.z(direction, name).view(-1).clone()
        for direction in directions
        for name in coordinates.weights.tensors
        if coordinates.moves(direction, name)
    ]
    assert len(drawn) >= 4
    # Elements of a product of few factors are not independent: their correlations are that much wider.
    bound = 0.04 if coordinates.factors(directions[0], "layers.0.weight") is not None else 0.015  # 4.5 / sqrt(90 000)
    for a, b in combinations(drawn, 2):
        few = (min(int(a.count_nonzero()), int(b.count_nonzero())) / a.numel()) ** 0.5  # of a mask, elements are fewer
        assert abs(float(torch.corrcoef(torch.stack((a, b)))[0, 1])) < bound / few
