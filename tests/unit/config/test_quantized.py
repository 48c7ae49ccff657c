"""Every subspace and estimator with a base of few bits: it trains, or it is one sentence before anything is loaded."""

from __future__ import annotations

import pytest
import torch

from tests import models, runs
from tests.contract.discovered import coordinates_of
from tests.few_bits import with_trained_scales
from zoft.component import components
from zoft.config import compose
from zoft.config.quantized import check_quantization
from zoft.engines.in_place import InPlace
from zoft.errors import UserError
from zoft.estimators.base import Point
from zoft.lm.models import quantized
from zoft.lm.models.peft.lora import Lora
from zoft.lm.models.peft.none import NoAdapter
from zoft.lm.models.trainable.adapter import Adapter
from zoft.lm.models.trainable.all import All
from zoft.lm.models.trainable.scales import Scales
from zoft.noise.direction import Direction

NOT_VECTORS = {"nodes", "activation"}
"""Subspaces that are about the inputs of trained matrices."""


def composed(folder, *more):
    return compose([*runs.arguments(folder, folder / "out"), *more])


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    monkeypatch.setattr(quantized, "find_spec", lambda name: name)


@pytest.mark.parametrize("subspace", components("subspace"))
def test_every_subspace_goes_with_an_adapter_and_with_scales_or_says_why_not(subspace, tmp_path):
    estimator = {"nodes": "nodes", "vectors": "per_example"}.get(subspace, "central")
    cfg = composed(tmp_path, f"subspace={subspace}", f"estimator={estimator}")
    for quantization in quantized.QUANTIZATIONS:
        cfg.model.quantization = quantization
        cfg.peft, cfg.trainable = Lora(), Adapter()
        if subspace == "vectors":
            with pytest.raises(UserError, match=r"the adapter alone is trained, which has none: use subspace=full"):
                check_quantization(cfg)
        else:  # an adapter's matrices are plain ones
            check_quantization(cfg)
        cfg.peft, cfg.trainable = NoAdapter(), All()
        with pytest.raises(
            UserError, match=rf"model\.quantization={quantization} leaves the base's weights in few bits"
        ):
            check_quantization(cfg)
        cfg.trainable = Scales()
        if subspace in NOT_VECTORS:
            with pytest.raises(UserError, match=rf"trainable=scales moves vectors, and subspace={subspace}"):
                check_quantization(cfg)
        else:
            check_quantization(cfg)


@pytest.mark.parametrize("quantization", quantized.QUANTIZATIONS)
def test_rows_of_several_points_go_through_codes_together_where_they_are_not_rounded(quantization, tmp_path):
    words = ["peft=lora", "trainable=adapter", "engine=side_path", f"model.quantization={quantization}"]
    if quantization == "nf4":
        composed(tmp_path, *words)
        return
    with pytest.raises(
        UserError, match=rf"^engine=side_path multiplies the rows .* model\.quantization={quantization}"
    ):
        composed(tmp_path, *words)


def test_exact_derivatives_through_8_bit_layers_are_refused(tmp_path):
    words = ["peft=lora", "trainable=adapter", "method=forward_gradient"]
    with pytest.raises(
        UserError, match=r"^estimator=forward_gradient needs exact derivatives, which bitsandbytes' 8-bit"
    ):
        composed(tmp_path, *words, "model.quantization=int8")
    composed(tmp_path, *words, "model.quantization=nf4")


@pytest.mark.parametrize("subspace", sorted(set(components("subspace")) - NOT_VECTORS))
def test_scales_move_in_every_subspace_that_is_not_refused(subspace):
    model = with_trained_scales()
    coordinates = coordinates_of(subspace, model, "gaussian")
    session = InPlace().bind(model, coordinates, lambda batch: model(**batch).loss)
    direction = Direction(3, 0)
    coordinates.begin(direction)
    losses = session.losses(models.batch_for(model), [Point(direction, 0.1), Point(direction, -0.1)])
    assert torch.isfinite(losses).all()
    assert losses[0] != losses[1]
