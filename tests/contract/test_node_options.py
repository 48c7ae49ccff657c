"""Node directions over options that differ from example to example: one response, however a step is cut."""

from __future__ import annotations

import pytest
import torch

from tests import models
from zoft import ZOConfig, ZOTrainer
from zoft.estimators.nodes import Nodes
from zoft.lm.data.tokens import OptionCollator
from zoft.lm.objectives.options import Options
from zoft.noise.direction import Direction
from zoft.subspaces.nodes import Nodes as Outputs
from zoft.trainer.batch import StepBatch
from zoft.weights.tensors import Weights

ONE = [[[4], [5], [6]], [[7], [8], [9]]]  # the options of even rows, and of odd ones
SEVERAL = [[[4], [5, 6], [4, 7, 8]], [[4], [5, 6]]]


def rows(of_kind, count=6):
    made = []
    for number in range(count):
        context, options = [10 + number, 3, 11 + number % 3], of_kind[number % 2]
        sequences = [[*context, *option] for option in options]
        made.append({"sequences": sequences, "lengths": [len(o) for o in options], "label": number // 2 % 2})
    return made


def asking(folder, data, feedback, **fields):
    """(a step's queries, a trainer whose model's last block moves)."""
    model = models.tiny_llama()
    for name, parameter in model.named_parameters():
        parameter.data.mul_(3.0)
        parameter.requires_grad_("layers.2.mlp" in name)
    args = ZOConfig(
        output_dir=str(folder), max_steps=1, use_cpu=True, report_to=[], save_strategy="no", dataloader_pin_memory=False
    )
    trainer = ZOTrainer(
        model, args, train_dataset=data, data_collator=OptionCollator(0), objective=Options(), subspace=Outputs(),
        estimator=Nodes(feedback=feedback, **fields), optimizer="whiten",
    )  # fmt: skip
    trainer.create_optimizer()

    def ask(batches, step=0):
        batch = StepBatch([trainer.collated(one) for one in batches])
        trainer.query_forward.probe(batch)
        with trainer.query_forward.querying():
            return trainer.run_steps.queries.nodes(batch, Direction(0, step), trainer.method.estimator)

    return ask, trainer


@pytest.mark.parametrize("of_kind", [ONE, SEVERAL])
@pytest.mark.parametrize("feedback", ["scores", "log_odds", "hidden"])
def test_micro_batches_are_one_batch(tmp_path, of_kind, feedback):
    data = rows(of_kind)
    whole = asking(tmp_path, data, feedback, eps=1e-2, first=4)[0]([data])
    cut = asking(tmp_path, data, feedback, eps=1e-2, first=4)[0]([data[:1], data[1:3], data[3:]])
    assert whole.factors.keys() == cut.factors.keys()
    for name, one in whole.factors.items():
        off = (one.dense() - cut.factors[name].dense()).norm()
        assert float(off) < 2e-3 * float(one.dense().norm()), name


def test_options_that_come_later_are_as_strong_as_those_of_the_first_step(tmp_path):
    """The mean of what was asked of these options, not over the steps before they came."""
    data = rows(ONE)
    ask, trainer = asking(tmp_path, data, "scores", eps=1e-2, first=4, num_directions=4, every=1)
    ask([data[::2]], 0)
    later = ask([data[1::2]], 1)
    alone = asking(tmp_path, data, "scores", eps=1e-2, first=4, num_directions=4, every=1)[0]([data[1::2]], 1)
    for name, one in alone.factors.items():
        torch.testing.assert_close(later.factors[name].e, one.e)
    # a response of an earlier version has one count for all options
    space, state = trainer.zo_optimizer.subspace, trainer.zo_optimizer.subspace.state_dict()
    state["tables"]["counts"] = state["tables"]["counts"][:, 0]
    other = trainer.method.bind(Weights(trainer.model))
    other.load_state_dict(state)
    assert other.tables["counts"].shape == space.tables["counts"].shape


@pytest.mark.parametrize("feedback", ["scores", "log_odds"])
def test_what_several_tokens_tell_tends_to_the_gradient(tmp_path, feedback):
    """A token of the right answer raises the answer's odds, and the same token of a wrong one lowers them."""
    data = rows(SEVERAL)
    exact = asking(tmp_path, data, "exact")[0]([data])
    estimate = asking(tmp_path, data, feedback, eps=1e-2, first=256)[0]([data])
    for name, one in exact.factors.items():
        cosine = torch.nn.functional.cosine_similarity(
            one.dense().flatten(), estimate.factors[name].dense().flatten(), dim=0
        )
        assert float(cosine) > 0.8, name
