"""Every preset: it composes, states what it costs, has its entry in the paper index, and trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.models import batch_for, tiny_opt
from zoft.config import compose
from zoft.config.catalog import first_comment, preset_files
from zoft.data.rows import examples_of, of_lengths
from zoft.queries import Queries
from zoft.stepper import Stepper
from zoft.weights import Weights

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
]

every = pytest.mark.parametrize("name", PRESETS)


def composed(name, *more):
    return compose([f"method={name}", "budget.queries=100000", *more])


def entry(name) -> str:
    found = re.search(rf"^## `{name}`.*?(?=^## |\Z)", INDEX.read_text(encoding="utf-8"), re.M | re.S)
    assert found, f"docs/paper_index.md has no entry for {name}"
    return found.group(0)


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


class Steps:
    """A method driven as the trainer drives it, on a tiny model that overfits one batch."""

    def __init__(self, name):
        torch.manual_seed(0)
        self.model = tiny_opt()
        self.batch = batch_for(self.model)
        small = ["subspace.rank=2"] if hasattr(composed(name).subspace, "rank") else []
        cfg = composed(name, *small)
        self.method = cfg.composition
        coordinates = self.method.bind(Weights(self.model))
        engine = cfg.engine.choose(self.method.estimator, coordinates, self.model)
        self.session = engine.bind(self.model, coordinates, lambda batch: self.model(**batch).loss)
        groups = [{"params": list(self.session.weights.tensors.values()), "weight_decay": 0.0}]
        self.stepper = Stepper(groups, self.method.optimizer, self.session, cfg.optimizer.learning_rate)
        self.queries = Queries(
            self.method,
            self.stepper,
            examples=examples_of,
            select=lambda batch, lengths: of_lengths(batch, *lengths),
            batches=lambda count: [self.batch] * count,
        )

    def step(self, seed=3):
        step = self.stepper.progress.steps
        lr = self.stepper.param_groups[0]["lr"]
        asked = self.queries(self.batch, self.method.estimator.directions(seed, step), lr=lr)
        self.stepper.progress.steps += 1
        assert asked.usable
        self.stepper.step()
        return asked


@every
def test_a_preset_moves_the_weights_and_costs_what_it_says(name):
    run = Steps(name)
    before = run.session.weights.digest()
    for step in range(3):
        assert run.step().num_queries == run.method.queries_at(step)
    assert run.session.weights.digest() != before
    assert all(bool(torch.isfinite(tensor).all()) for tensor in run.session.weights.tensors.values())
    assert run.method.extra_elements(run.session.coordinates) == sum(
        tensor.numel() for state in run.stepper.moments.values() for tensor in state.values()
    )
