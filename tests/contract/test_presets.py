"""Every preset: it composes, states what it costs, has its entry in the paper index, and trains."""

from __future__ import annotations

import copy
import dataclasses
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.models import batch_for, tiny_opt
from tests.node_reader import ModelReader
from zoft.config import compose
from zoft.config.catalog import first_comment, preset_files
from zoft.estimators.nodes import Nodes
from zoft.lm.data.rows import examples_of, of_lengths
from zoft.optimizers._optional import ReadsFactors
from zoft.step.nodes import NodeQueries
from zoft.step.query import StepQueries
from zoft.step.update import ZOOptimizer
from zoft.weights.tensors import Weights

PRESETS = list(preset_files("method"))
INDEX = Path(__file__).resolve().parents[2] / "docs" / "paper_index.md"
PUBLISHED = [
    "mezo",
    "mezo_adam",
    "n_spsa",
    "zo_sgd_sign",
    "zo_sgd_mmt",
    "zo_sgd_cons",
    "forward_gradient",
    "s_mezo",
    "senszoq",
    "mezo_bcd",
    "lezo",
    "lozo",
    "lozo_m",
    "subzero",
    "subzero_plus",
    "tezo",
    "zo_muon",
    "zo_mopi",
    "agzo",
    "zo_act",
    "aim_zo",
    "fzoo",
    "grzo",
    "spsa_1_5",
    "hizoo",
    "mezo_svrg",
    "meazo",
    "adamezo",
    "conmezo",
    "zo_adamu",
    "bszo",
    "kerzoo",
    "es",
    "eggroll",
    "addax",
    "deepzero",
    "one_point",
    "qzo",
]

every = pytest.mark.parametrize("name", PRESETS)


@cache
def _composed(*words):
    return compose(list(words))


def composed(name, *more):
    """A copy of its own: the parts are set up and used."""
    return copy.deepcopy(_composed(f"method={name}", "budget.queries=20000", *more))


def entry(name) -> str:
    match = re.search(rf"^## `{name}`.*?(?=^## |\Z)", INDEX.read_text(encoding="utf-8"), re.M | re.S)
    assert match, f"docs/paper_index.md has no entry for {name}"
    return match.group(0)


def test_every_published_method_is_there():
    assert set(PUBLISHED) <= set(PRESETS)


@every
def test_a_preset_names_its_parts_and_its_paper(name):
    text = preset_files("method")[name].read_text(encoding="utf-8")
    for group in ("subspace", "estimator", "weighting", "optimizer"):
        assert f"override /{group}:" in text, "parts that an experiment chose would be mixed with the method's"
    assert len(first_comment(preset_files("method")[name])) > 20
    assert composed(name).optimizer.learning_rate is not None


@every
def test_the_paper_index_gives_the_same_overrides_and_cost(name):
    text, cfg = entry(name), composed(name)
    line = re.search(r"^```\n(.*?)\n```", text, re.M | re.S)
    assert line, "the overrides stand in a block of their own"
    written = compose([*line.group(1).split(), "budget.queries=100000"])
    for group in ("subspace", "estimator", "weighting", "optimizer"):
        assert getattr(written, group) == getattr(cfg, group)
    costs = re.search(r"\*\*Queries a step\*\*: (\d+)", text)
    assert costs
    assert int(costs.group(1)) == cfg.composition.queries_at(1)
    assert "**Extra memory**:" in text


SMALL = {"rank": 4, "basis_columns": 8, "shared_columns": 2}
"""Settings of subspaces whose published values the tensors of a tiny model do not reach."""


def tensors_in(value):
    """All tensors that are reached from here."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = list(vars(value).values())
    return [t for one in value for t in tensors_in(one)] if isinstance(value, list | tuple) else []


class Steps:
    """A method driven as the trainer drives it, on a tiny model that overfits one batch.

    Args:
        name: the preset.
        more: overrides besides.
    """

    def __init__(self, name, *more):
        torch.manual_seed(0)
        self.model = tiny_opt(num_hidden_layers=1)
        self.batch = batch_for(self.model)
        subspace = composed(name).subspace
        counting = [field for field in SMALL if field == "rank" or getattr(subspace, "basis", "") == "oja"]
        small = [f"subspace.{field}={SMALL[field]}" for field in counting if hasattr(subspace, field)]
        cfg = composed(name, *small, *more)
        self.method = cfg.composition
        coordinates = self.method.bind(Weights(self.model))
        engine = cfg.engine.choose(self.method.estimator, coordinates, self.model)
        self.session = engine.bind(self.model, coordinates, lambda batch: self.model(**batch).loss)
        groups = [{"params": list(self.session.weights.tensors.values()), "weight_decay": 0.0}]
        self.zo_optimizer = ZOOptimizer(groups, self.method.optimizer, self.session, cfg.optimizer.learning_rate)
        self.queries = StepQueries(
            self.method,
            self.zo_optimizer,
            examples=examples_of,
            select=lambda batch, lengths: of_lengths(batch, *lengths),
            batches=lambda batch, count, step: [self.batch] * count,
            nodes=NodeQueries(self.session, ModelReader(self.model))
            if isinstance(self.method.estimator, Nodes)
            else None,
        )

    def bytes_kept(self):
        """Of all tensors that are kept from step to step: the optimizer's state, an anchor, bases and masks."""
        of_a_step = ("weights", "source", "z_cache", "_drawn", "_overlap", "_last_basis")
        subspace = [value for key, value in vars(self.session.coordinates).items() if key not in of_a_step]
        moments = (
            {} if isinstance(self.method.optimizer, ReadsFactors) else self.zo_optimizer.moments
        )  # of the batches' size
        state = tensors_in([moments, self.session.anchor, subspace])
        return sum({(t.data_ptr(), t.numel() * t.element_size()): t.numel() * t.element_size() for t in state}.values())

    def loss(self):
        with torch.no_grad():
            return float(self.model(**self.batch).loss)

    def step(self, seed=3):
        step = self.zo_optimizer.progress.steps
        lr = self.zo_optimizer.param_groups[0]["lr"]
        asked = self.queries.estimate(self.batch, self.method.estimator.directions(seed, step), lr=lr)
        self.zo_optimizer.progress.steps += 1
        assert asked.is_usable
        self.zo_optimizer.apply(asked)
        return asked


@every
def test_a_preset_moves_the_weights_and_costs_what_it_says(name):
    run = Steps(name)
    before = run.session.weights.digest()
    for step in range(3):
        assert run.step().num_queries == run.method.queries_at(step)
    assert run.session.weights.digest() != before
    assert all(bool(torch.isfinite(tensor).all()) for tensor in run.session.weights.tensors.values())
    claimed, counted = 4 * run.method.extra_elements(run.session.coordinates), run.bytes_kept()
    assert claimed - 4 < counted <= claimed, "extra memory"  # the last bits of a mask fill a number


BUDGET = 100
"""Queries, within which every preset is to lower the loss of the batch."""

RATES = {
    # A mean over many directions, or a difference in units of the losses' spread, stands a longer step.
    "addax": 3e-2,
    "aim_zo": 3e-2,
    "bszo": 3e-2,
    "deepzero": 3e-2,
    "fzoo": 3e-2,
    "grzo": 3e-2,
    "zo_act": 3e-2,
    "eggroll": 1e-1,
    "es": 1e-1,
    "spsa_1_5": 1e-1,
    "zo_mopi": 1e-1,  # its steps have a length of their own
    "zo_muon": 1e-1,
    # An estimate that is noisier than a central difference needs a shorter one.
    "kerzoo": 1e-3,
    "one_point": 3e-3,
    "senszoq": 1e-4,  # z is longer by 1 / sqrt(keep) where a thousandth of the weights moves
}
"""Learning rates for a tiny model with random weights; 1e-2 where nothing is said."""

OVERRIDES = {"one_point": ["estimator.eps=3e-2"]}
"""What is not as published: the variance of one point is the change of the loss from step to step over eps squared."""


@every
def test_a_preset_lowers_the_loss_within_a_budget_of_queries(name):
    """A few steps of each: populations of more than 16 are cut down to it, so that there are some within the budget."""
    few = ["estimator.num_directions=16"] if composed(name).estimator.num_directions > 16 else []
    run = Steps(name, *few, *OVERRIDES.get(name, []))
    for group in run.zo_optimizer.param_groups:
        group["lr"] = RATES.get(name, 1e-2)
    start, spent = run.loss(), 0
    while spent + (cost := run.method.queries_at(run.zo_optimizer.progress.steps)) <= BUDGET:
        assert run.step().num_queries == cost
        spent += cost
    assert run.zo_optimizer.progress.steps >= 3
    assert run.loss() < start - 0.01
