"""`trainer.narrow_last_block`: the same numbers, from the positions of the loss alone; refused where that is not so."""

import json

import pytest
import torch

from tests import models, runs
from zoft.cli import main
from zoft.errors import UserError
from zoft.subspaces.activation import Activation
from zoft.subspaces.full import Full
from zoft.subspaces.nodes import Nodes
from zoft.trainer.narrow import check_narrow, feed_forward_of

METHODS = {
    "mezo": ["method=mezo"],
    "adamw": ["method=adamw"],
    "forward_gradient": ["method=forward_gradient"],
    "subzero": ["method=subzero"],
    "zoft": ["method=zoft", "optimizer.learning_rate=0.3"],
}


def losses_of(folder, name, *more):
    """What a run's log says of its dev loss."""
    words = runs.arguments(folder, folder / name, "trainable=last_blocks", "trainable.num_blocks=1", *more)
    assert main(["train", *words]) == 0
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_the_same(method, tmp_path, monkeypatch):
    seen = []
    real = torch.nn.functional.silu

    def silu(x, *args, **kwargs):
        seen.append(x.shape[-2])  # positions
        return real(x, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "silu", silu)
    whole = losses_of(tmp_path, "whole", *METHODS[method])
    probes = seen.count(1)  # behind cached keys and values a probe is one token
    assert not probes or method == "zoft"
    seen.clear()
    narrow = losses_of(tmp_path, "narrow", *METHODS[method], "trainer.narrow_last_block=true")
    assert len(narrow) == len(whole) > 1
    assert narrow == pytest.approx(whole, rel=1e-4)
    assert seen.count(1) - probes >= 12  # every query and every batch of an evaluation


def test_layers_that_it_needs():
    model = models.tiny_llama()
    assert feed_forward_of(model, Full()) is model.model.layers[-1].mlp
    assert feed_forward_of(model, Nodes()) is model.model.layers[-1].mlp
    for subspace in (Nodes(positions="all"), Activation()):
        with pytest.raises(UserError, match="looks at positions that the loss is not read from"):
            feed_forward_of(model, subspace)
    with pytest.raises(UserError, match="has 0 feed-forward modules in its last block"):
        feed_forward_of(models.tiny_opt(), Full())


def test_a_loss_that_depends_on_other_positions_is_refused():
    values = iter([1.0, 1.1])
    with pytest.raises(UserError, match=r"the loss is 1 where .* and 1.1 where it sees all"):
        check_narrow(lambda: torch.tensor(next(values)))
