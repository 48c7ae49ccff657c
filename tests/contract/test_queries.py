"""Every engine, estimator and subspace that go together, under every law and dtype: right losses, weights untouched."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import nn

from tests.contract.discovered import (
    CELLS,
    DTYPES,
    ENGINES_SEE,
    QUERYING,
    SUBSPACES,
    bind,
    example,
    own_cells,
    own_cells_with,
    serves,
    settings,
    with_fields,
)
from tests.models import batch_for, tiny_bert_classifier, tiny_opt, tiny_roberta_mlm, tiny_t5
from zoft.component import components
from zoft.errors import UserError
from zoft.noise.source import LAWS
from zoft.weights.tensors import Weights, perturbed

MODELS = {"opt": tiny_opt, "bert": tiny_bert_classifier, "roberta": tiny_roberta_mlm, "t5": tiny_t5}
EPS = 1e-2


@cache
def built(kind: str, dtype: str) -> tuple[nn.Module, dict]:
    model = MODELS[kind]().to(DTYPES[dtype])
    return model, batch_for(model)


def parts(engine, estimator, subspace="full", *, kind="opt", dtype="fp32", law="gaussian", q=2, objective=None):
    model, batch = built(kind, dtype)
    if engine == "offload":  # its hooks stay until it is closed, and the other engines' tests share the model
        model = copy.deepcopy(model)
    chosen = with_fields(example("estimator", estimator), num_directions=q, eps=EPS)
    session = bind(example("engine", engine), chosen, model, objective or (lambda b: model(**b).loss), law, subspace)
    points = [point for point in chosen.points(chosen.directions(3, 1)) if not point.anchor]  # not a session's business
    return model, batch, session, points


def plainly(model, batch, session, points) -> torch.Tensor:
    """The same losses, with the weights written out: clean + s z set by hand, or backpropagation's gradient times z."""
    clean = {name: p.data.clone() for name, p in session.weights.tensors.items()}
    values = []
    for point in points:
        if point.derivative:
            loss = model(**batch).loss
            grads = torch.autograd.grad(loss, list(session.weights.tensors.values()))
            slope = sum(
                (g.double() * session.coordinates.z(point.direction, n).double()).sum()
                for n, g in zip(clean, grads, strict=True)
            )
            values.append(float(slope))
            continue
        for name, tensor in session.weights.tensors.items():
            if point.direction is not None:
                z = session.coordinates.z(point.direction, name)
                wanted = (clean[name].float() + point.scale * z.float()).to(tensor.dtype)
                torch.testing.assert_close(perturbed(clean[name], z, point.scale), wanted, rtol=1e-6, atol=1e-7)
                tensor.data = wanted
        with torch.no_grad():
            values.append(float(model(**batch).loss))
        for name, tensor in session.weights.tensors.items():
            tensor.data = clean[name]
    return torch.tensor(values)


def close(session, dtype: str, points) -> dict[str, float]:
    if any(point.derivative for point in points):
        return {"rtol": 1e-4, "atol": 1e-4} if dtype == "fp32" else {"rtol": 0.1, "atol": 0.5}
    moved = next(point.direction for point in points if point.direction is not None)
    beside = getattr(session, "name", "") == "side_path" and any(
        session.coordinates.factors(moved, name) is not None for name in session.weights.tensors
    )  # s z goes beside W there: it is not rounded to W's few bits
    return {"rtol": 5e-4 if beside and dtype != "fp32" else 1e-6, "atol": 0}


def tried(engine: str, estimator: str, subspace: str) -> list[tuple[str, str]]:
    """Laws and dtypes of a cell: every dtype where an engine does something of its own, laws where they are drawn by.

    All that an engine knows of a law is what is drawn, so that one engine is enough for a subspace's laws.
    """
    if engine == "auto" or estimator not in ENGINES_SEE:
        return settings(subspace, LAWS[:1], list(DTYPES)[:1])
    return settings(subspace, LAWS if subspace == "full" or engine == "in_place" else LAWS[:1], DTYPES)


@pytest.mark.parametrize(
    ("engine", "estimator", "subspace", "law", "dtype"),
    [(*cell, *setting) for cell in CELLS for setting in tried(*cell)],
)
def test_losses_equal_a_plain_forward_of_perturbed_weights(engine, estimator, subspace, law, dtype):
    model, batch, session, points = parts(engine, estimator, subspace, dtype=dtype, law=law)
    digest = Weights(model).digest()
    losses = session.losses(batch, points)
    assert losses.dtype == torch.float32
    assert losses.device.type == "cpu"
    assert losses.shape == (len(points),)
    assert not losses.requires_grad
    assert Weights(model).digest() == digest
    wanted = plainly(model, batch, session, points)
    torch.testing.assert_close(losses, wanted, **close(session, dtype, points))
    if dtype == "fp32":
        perturbed_ones = [p.direction is not None for p in points]
        apart = len(wanted[perturbed_ones].unique())  # all, but where a direction is one weight that is not used
        assert len(losses[perturbed_ones].unique()) == apart, "two points with the same loss: nothing moved"


@own_cells_with("kind", *(kind for kind in MODELS if kind != "opt"))
def test_every_kind_of_model(engine, estimator, subspace, kind):
    model, batch, session, points = parts(engine, estimator, subspace, kind=kind)
    digest = Weights(model).digest()
    losses = session.losses(batch, points)
    assert Weights(model).digest() == digest
    wanted = plainly(model, batch, session, points)
    torch.testing.assert_close(losses, wanted, **close(session, "fp32", points))


@own_cells
def test_the_same_points_give_the_same_bits_again(engine, estimator, subspace):
    _, batch, session, points = parts(engine, estimator, subspace)
    first = session.losses(batch, points)
    assert torch.equal(session.losses(batch, points), first)
    _, batch, other, points = parts(engine, estimator, subspace)
    assert torch.equal(other.losses(batch, points), first)


@pytest.mark.parametrize("fails_at", [0, 1])
@own_cells_with("dtype", *DTYPES)
def test_an_objective_that_raises_leaves_the_weights_and_the_modules_as_they_were(
    engine, estimator, subspace, fails_at, dtype
):
    calls = []

    def objective(inputs):
        loss = model(**inputs).loss
        calls.append(1)
        if len(calls) > fails_at:
            raise RuntimeError("the objective's own")
        return loss

    model, batch, session, points = parts(engine, estimator, subspace, dtype=dtype, objective=objective)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="the objective's own"):
        session.losses(batch, points)
    assert state_of(model) == before


@own_cells_with("inside", "lm_head", "model.decoder.layers.1.fc1", "model.decoder.embed_tokens")
def test_a_forward_that_raises_halfway_leaves_everything_as_it_was(engine, estimator, subspace, inside):
    model, batch, session, points = parts(engine, estimator, subspace)
    before = state_of(model)

    def explode(*_):
        raise RuntimeError("halfway")

    for handle in (
        model.get_submodule(inside).register_forward_pre_hook(explode),
        model.get_submodule(inside).register_forward_hook(explode),
    ):
        with pytest.raises(RuntimeError, match="halfway"):
            session.losses(batch, points)
        handle.remove()
    assert state_of(model) == before
    session.losses(batch, points)
    assert state_of(model) == before


@own_cells_with("k", -1, 0, 1, -1, 7)
def test_an_interrupt_while_a_direction_is_drawn_leaves_everything_as_it_was(
    engine, estimator, subspace, k, monkeypatch
):
    model, batch, session, points = parts(engine, estimator, subspace)
    before, calls = state_of(model), []
    real = session.coordinates.source.draw
    if k < 0:  # the last one but a few, however many there are
        monkeypatch.setattr(session.coordinates.source, "draw", lambda *args: calls.append(1) or real(*args))
        session.losses(batch, points)
        k, calls = len(calls) * 9 // 10, []
        model, batch, session, points = parts(engine, estimator, subspace)
        before = state_of(model)
        real = session.coordinates.source.draw

    def interrupted(*args):
        calls.append(1)
        if len(calls) == k + 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(session.coordinates.source, "draw", interrupted)
    try:
        session.losses(batch, points)
    except KeyboardInterrupt:
        assert len(calls) == k + 1
    else:
        assert len(calls) <= k, "the interrupt was swallowed"  # a direction may be made of few draws
    assert state_of(model) == before


def state_of(model: nn.Module):
    """Bits, identities, gradients and hooks: what a query must not change."""
    return (
        Weights(model).digest(),
        [(name, id(p), p.data_ptr(), p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        [module.training for module in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
        torch.get_rng_state().tolist(),
    )


@own_cells
def test_queries_leave_no_gradient_hook_or_global_state_behind(engine, estimator, subspace):
    model, batch, session, points = parts(engine, estimator, subspace)
    before = state_of(model)
    session.losses(batch, points)
    assert state_of(model) == before


@own_cells
def test_gradients_that_are_there_stay(engine, estimator, subspace):
    model, batch, session, points = parts(engine, estimator, subspace)
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    session.losses(batch, points)
    assert torch.equal(first.grad, torch.ones_like(first))
    first.grad = None


class Tied(nn.Module):
    """x -> W (W x + a) + b with one tensor in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.layers[0].weight.data = torch.eye(4)
        self.layers[1].weight = self.layers[0].weight
        for layer in self.layers:
            layer.bias.data.zero_()

    def forward(self, x):
        return self.layers[1](self.layers[0](x))


@own_cells
def test_tied_weights_move_once_and_together(engine, estimator, subspace):
    model, x = Tied(), torch.ones(1, 4)
    chosen = with_fields(example("estimator", estimator), eps=0.5)
    session = bind(example("engine", engine), chosen, model, lambda b: model(b).sum(), "rademacher", subspace)
    points = chosen.points(chosen.directions(0, 0))
    losses = session.losses(x, points)
    names = ("layers.0.weight", "layers.0.bias", "layers.1.bias")
    for point, loss in zip(points, losses.tolist(), strict=True):
        still = (torch.zeros(4, 4), torch.zeros(4), torch.zeros(4))
        weight, *biases = [session.coordinates.z(point.direction, n) for n in names] if point.direction else still
        if point.derivative:  # of both places where the tensor is used
            assert loss == pytest.approx(float(2 * (x @ weight.T).sum() + sum(biases).sum()), rel=1e-5, abs=1e-5)
        else:
            moved, first, second = torch.eye(4) + point.scale * weight, *(point.scale * bias for bias in biases)
            assert loss == pytest.approx(float(((x @ moved.T + first) @ moved.T + second).sum()), rel=1e-6)


@pytest.mark.parametrize("subspace", SUBSPACES)
@pytest.mark.parametrize("estimator", QUERYING)
def test_some_engine_serves_every_estimator_and_subspace_and_auto_always_does(estimator, subspace):
    assert serves("auto", estimator, subspace)
    assert sum(serves(engine, estimator, subspace) for engine in components("engine")) >= 2


def query(engine, estimator, subspace):
    _, batch, session, points = parts(engine, estimator, subspace)
    session.losses(batch, points)


@pytest.mark.parametrize("engine", components("engine"))
def test_an_engine_that_does_not_serve_refuses_with_a_sentence_and_touches_nothing(engine):
    for estimator in QUERYING:
        for subspace in SUBSPACES:
            if not serves(engine, estimator, subspace):
                before = state_of(built("opt", "fp32")[0])
                with pytest.raises(UserError, match=r"engine=|estimator=|subspace="):
                    query(engine, estimator, subspace)
                assert state_of(built("opt", "fp32")[0]) == before


COSTS = [(n, q) for n in QUERYING for q in (1, 2, 5) if q > 1 or n != "leave_one_out"]
"""Estimators with so many directions."""


@pytest.mark.parametrize(("estimator", "q"), COSTS)
def test_an_estimator_states_what_a_step_costs(estimator, q):
    chosen = with_fields(example("estimator", estimator), num_directions=q)
    points = chosen.points(chosen.directions(0, 1))  # an ordinary step: some cost more
    work = sum(2 if p.derivative else 1 for p in points)  # a pass with a tangent is two forward passes of work
    clean_comes_free = any(p.derivative for p in points) and any(p.direction is None for p in points)
    assert chosen.num_queries == work - clean_comes_free
    losses = torch.arange(float(len(points)))
    measured = chosen.measure(losses)
    assert measured.projected_grads.shape == (q,)
    assert measured.loss.shape == ()
    assert measured.losses.shape[0] == q
    assert torch.equal(losses, torch.arange(float(len(points)))), "the losses were overwritten"
