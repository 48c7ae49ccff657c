"""The loss of each example alone: its own where it is asked for by itself, and their mean the batch's."""

from __future__ import annotations

import pytest
import torch

from tests.models import tiny_bert_classifier, tiny_llama, tiny_roberta_mlm
from tests.runs import WORDS
from tests.unit.lm.objectives.test_objectives import COLLATE, LONG, SINGLE, UNEQUAL
from tests.unit.lm.objectives.test_objectives_more import MASKED, RIGHT, generated
from zoft.config import compose
from zoft.errors import UserError
from zoft.lm.data.completions import CountedCollator, counted
from zoft.lm.data.rows import examples_of
from zoft.lm.objectives.classes import Classes
from zoft.lm.objectives.cross_entropy import CrossEntropy
from zoft.lm.objectives.expression import Expression
from zoft.lm.objectives.label_words import LabelWords
from zoft.lm.objectives.metric import Metric
from zoft.lm.objectives.options import Options
from zoft.lm.objectives.reward import Reward
from zoft.step.method import Method

TEXTS = [counted([4, 5, 6, 7, 8], range(start, 5)) for start in (2, 4, 1)]
WRITER = tiny_llama(vocab_size=4 + len(WORDS))


def lengths(prompts, generations):
    return [len(prompt) / 10 + len(text) for prompt, text in zip(prompts, generations, strict=True)]


OBJECTIVES = [
    (Options(), tiny_llama(), COLLATE(SINGLE)),
    (Options(), tiny_llama(), COLLATE(UNEQUAL)),
    (Options(), tiny_llama(), COLLATE(LONG)),
    (CrossEntropy(), tiny_llama(), COLLATE(SINGLE)),
    (CrossEntropy(), tiny_llama(), COLLATE(UNEQUAL)),
    (CrossEntropy(), tiny_llama(), CountedCollator(1)(TEXTS)),
    (LabelWords(), tiny_roberta_mlm(), RIGHT(MASKED)),
    (Classes(), tiny_bert_classifier(), RIGHT([{"input_ids": [0, 5, 6, 2], "label": 2}] * 2)),
    (Metric(), tiny_llama(), COLLATE(UNEQUAL)),
    (Metric(), WRITER, "generated"),
    (Reward(function=lengths), WRITER, "generated"),
    (Reward(function=lengths, temperature=1.0, num_samples=3), WRITER, "generated"),
    (Expression(formula="options - 0.5*metric"), tiny_llama(), COLLATE(LONG)),
]
"""(objective, model, batch): one of each kind, most of them in several shapes."""


@pytest.mark.parametrize(
    ("objective", "model", "batch"), OBJECTIVES, ids=lambda value: value.name() if hasattr(value, "name") else ""
)
def test_each_example_has_the_loss_that_it_has_alone(objective, model, batch):
    if batch == "generated":
        rows, collate, _ = generated()
        batch = collate(rows)
    batch = {name: value for name, value in batch.items() if name != "packed"}
    assert objective.tells_examples
    with torch.no_grad():
        losses = objective.losses(model, batch)
        alone = torch.stack([objective.loss(model, one) for one in examples_of(batch)])
        whole = objective.loss(model, batch)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, alone, rtol=1e-5, atol=1e-5)
    if not isinstance(objective, CrossEntropy):  # a mean over tokens
        torch.testing.assert_close(losses.mean(), whole, rtol=1e-5, atol=1e-5)


def test_an_objective_that_does_not_tell_them_apart_is_refused():
    method = Method.of(weighting="per_prompt")
    with pytest.raises(UserError, match=r"per_prompt reads the loss of each example, and the model's own loss is one"):
        method.check_objective(None)
    with pytest.raises(UserError, match="objective=metric with these settings is one number for all: use objective="):
        compose(["config=smoke", "weighting=per_prompt"]).settle(Metric(metric="evaluate:rouge"))
    compose(["config=smoke", "weighting=per_prompt"]).settle(Options())
