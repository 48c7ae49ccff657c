"""Node directions where a tensor serves two layers, and where only the last k positions of a row are perturbed."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from tests import models
from tests.contract.test_nodes import EXACT, gradients, only, queries
from zoft.estimators.nodes import Nodes as Estimator
from zoft.noise.direction import Direction
from zoft.step.nodes import expand

TIED = "model.layers.1.mlp.down_proj.weight"


def tied():
    """Two blocks share their last matrix, and nothing else is trained."""
    model = models.tiny_llama()
    first, second = (model.model.layers[i].mlp.down_proj for i in (1, 2))
    second.weight = first.weight
    return only(model, "layers.1.mlp.down_proj")


def one_answer(model, rows=3, length=8):
    """Each row's loss is of its last token alone: the position that it is read from is the last but one."""
    batch = models.batch_for(model, rows=rows, length=length)
    batch["labels"][:, :-1] = -100
    return batch


LAST = {"positions": "last", "num_positions": 3}
WHERE = [-2, -3, -4]
"""The last three positions up to the one that the loss of such a row is read from."""


def middle():
    """What moves is below a block: positions in front of the answer reach it by attention."""
    return only(models.tiny_llama(), "layers.1.mlp.down_proj")


@contextmanager
def behind(model):
    """What forwards hand to the last block: [rows, tokens, hidden] of each."""
    handed = []
    handle = model.model.layers[2].register_forward_pre_hook(
        lambda _m, args, kwargs: handed.append((args[0] if args else kwargs["hidden_states"]).detach().clone()),
        with_kwargs=True,
    )
    yield handed
    handle.remove()


def test_a_tied_tensor_is_two_nodes_and_its_gradient_is_the_sum_of_both():
    model = tied()
    batch = models.batch_for(model, rows=3, length=7)
    ask = queries(model, "loss", positions="all")
    assert list(ask.session.coordinates.nodes) == [TIED, f"{TIED}#1"]
    estimate, wanted = ask(batch, Direction(0, 0), EXACT), gradients(model, batch)
    assert set(estimate.factors) == {TIED}
    assert len(estimate.factors[TIED].e) == 2 * 3 * 6  # a row for each position of each use
    torch.testing.assert_close(estimate.factors[TIED].dense(), wanted[TIED], rtol=1e-3, atol=1e-6)


def test_what_is_applied_to_a_tied_tensor_is_what_was_measured_in_both_layers():
    model = tied()
    batch = models.batch_for(model, rows=3, length=7)
    ask = queries(model, "loss", positions="all")
    space, session = ask.session.coordinates, ask.session
    at = expand(ask.reader.places(batch), space)
    where = at.rows, at.columns, len(at.starts)
    delta = 0.1 * torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    with (
        torch.no_grad(),
        session.seeing(space.nodes, *where) as seen,
        # the second layer's input is what the first one's move has made of it
        session.moved(space.nodes, *where, lambda key, _size: seen[key] @ delta.T),
    ):
        moved = ask.reader.read(batch).losses
    with torch.no_grad():
        before = ask.reader.read(batch).losses
        space.weights.tensors[TIED].data += delta
        applied = ask.reader.read(batch).losses
    torch.testing.assert_close(moved, applied, rtol=1e-5, atol=1e-6)
    assert float((moved - before).abs().max()) > 1e-3


def test_a_probe_moves_the_last_k_positions_and_no_other():
    model = middle()
    batch, ask = one_answer(model), queries(model, "loss", **LAST)
    with behind(model) as handed:
        ask(batch, Direction(0, 1), Estimator(feedback="loss", every=1, first=1, num_directions=2))
    clean, probes = next(one for one in handed if one.shape[:2] == (3, 8)), handed[-2:]
    for probe in probes:  # behind a kept context they are shorter: columns count from the right
        length = probe.shape[1]
        changed = (probe - clean[:, -length:]).abs().amax(-1) > 1e-6
        assert {(row, column - length) for row, column in changed.nonzero().tolist()} == {
            (row, column) for row in range(3) for column in WHERE
        }
    assert not torch.equal(probes[0], probes[1])


def test_what_is_applied_at_the_last_k_positions_is_what_was_measured_there():
    """A step in W moves the other positions too: the loss sees their part, the probe did not."""
    model = middle()
    batch, ask = one_answer(model), queries(model, "loss", **LAST)
    space, session = ask.session.coordinates, ask.session
    at = expand(ask.reader.places(batch), space)
    assert at.columns.tolist() == WHERE * 3
    where = at.rows, at.columns, len(at.starts)
    delta = 0.1 * torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    with (
        torch.no_grad(),
        behind(model) as handed,
        session.seeing(space.nodes, *where) as seen,
        session.moved(space.nodes, *where, lambda key, _size: seen[key] @ delta.T),
    ):
        model(**batch)
    space.weights.tensors[TIED].data += delta
    with torch.no_grad(), behind(model) as later:
        model(**batch)
    torch.testing.assert_close(handed[0][:, WHERE], later[0][:, WHERE], rtol=1e-5, atol=1e-6)
    assert float((handed[0][:, 0] - later[0][:, 0]).abs().max()) > 1e-3


def test_exact_node_gradients_at_the_last_k_positions_are_autograds():
    model = middle()
    batch, ask = one_answer(model), queries(model, "loss", **LAST)
    factors = ask(batch, Direction(0, 0), EXACT).factors[TIED]
    outputs = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _m, _i, y: outputs.append(y))
    loss = model(**batch).loss
    handle.remove()
    (wanted,) = torch.autograd.grad(loss, outputs)
    torch.testing.assert_close(factors.e.view(3, 3, 16), wanted[:, WHERE], rtol=1e-3, atol=1e-7)
    assert all(float(wanted[:, column].abs().max()) > 0 for column in WHERE)


@pytest.mark.parametrize(("make", "fields"), [(middle, LAST), (tied, {"positions": "loss"})])
def test_raw_losses_estimate_them_without_bias(make, fields):
    """As for other positions (test_nodes.py): 32 probes, five draws, within what these scatter."""
    model = make()
    batch, ask = one_answer(model), queries(model, "loss", **fields)
    exact = ask(batch, Direction(0, 0), EXACT).factors[TIED].e
    many = Estimator(feedback="loss", every=1, first=1, num_directions=32, eps=1e-2)
    estimates = torch.stack([ask(batch, Direction(0, step), many).factors[TIED].e for step in range(1, 6)])
    assert estimates.shape[1:] == exact.shape == ((6 if make is tied else 3) * fields.get("num_positions", 1), 16)
    along = (estimates * exact).sum((1, 2)) / exact.square().sum()
    assert abs(float(along.mean()) - 1) < 4 * float(along.std() / 5**0.5) + 0.02
    off, noise = estimates.mean(0) - exact, (estimates.std(0) / 5**0.5).square().sum().sqrt()
    assert float(off.norm()) < 2.5 * float(noise) + 0.05 * float(exact.norm())
