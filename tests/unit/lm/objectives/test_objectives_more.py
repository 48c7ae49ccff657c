"""Label words, classes, metrics, preferences, rewards and sums of them, against naive versions."""

from __future__ import annotations

import dataclasses
import random
import re
from fractions import Fraction

import numpy
import pytest
import torch

from tests.models import MASK, PAD, tiny_bert_classifier, tiny_llama, tiny_roberta_mlm
from tests.runs import WORDS, tiny_tokenizer
from tests.unit.lm.objectives.test_objectives import COLLATE, SINGLE, UNEQUAL
from zoft.config import compose
from zoft.errors import UserError
from zoft.lm.data.completions import counted
from zoft.lm.data.encoding import PairCollator
from zoft.lm.data.examples import Example, Rated
from zoft.lm.data.generated import GeneratedCollator, encode_generated
from zoft.lm.data.masked import RightPaddedCollator
from zoft.lm.data.rows import examples_of
from zoft.lm.models.generate import Answering, write
from zoft.lm.objectives.classes import Classes
from zoft.lm.objectives.cross_entropy import CrossEntropy
from zoft.lm.objectives.expression import Expression
from zoft.lm.objectives.label_words import LabelWords
from zoft.lm.objectives.metric import Metric
from zoft.lm.objectives.options import Options
from zoft.lm.objectives.preference import Preference, keep_reference
from zoft.lm.objectives.reward import Reward

RIGHT = RightPaddedCollator(PAD)
MASKED = [
    {"input_ids": [0, *range(5, 5 + n), MASK, 2], "mask_position": n + 1, "word_ids": [9, 30, 12], "label": n % 3}
    for n in (7, 2, 4)
]
ANSWERED = [
    Example("is it", (" spam",), 0, answers=("spam", "free prize")),
    Example("call", (" you",), 0, answers=("you",)),
]


def generated(answers=None) -> tuple[list, GeneratedCollator, Answering]:
    answering = Answering(tiny_tokenizer(), 3)
    return (
        encode_generated(answers or ANSWERED, answering.tokenizer, 60, 3),
        GeneratedCollator(PAD, answering),
        answering,
    )


def test_label_words_read_the_words_at_the_mask():
    model = tiny_roberta_mlm()
    with torch.no_grad():
        rows = [model(torch.tensor([row["input_ids"]])).logits[0, row["mask_position"]] for row in MASKED]
        scores = torch.stack([logits[row["word_ids"]] for logits, row in zip(rows, MASKED, strict=True)])
        batch = RIGHT(MASKED)
        loss, predicted, gold = LabelWords().predict(model, batch)
        again = LabelWords().loss(model, batch)
    torch.testing.assert_close(predicted, scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(scores, gold))
    torch.testing.assert_close(again, loss)
    assert gold.tolist() == [1, 2, 1]
    for one, row in zip(examples_of(batch), scores, strict=True):  # padding is cut off, the mask stays where it is
        with torch.no_grad():
            torch.testing.assert_close(LabelWords().predict(model, one)[1][0], row, rtol=1e-5, atol=1e-5)


def test_classes_are_the_heads():
    model, rows = (
        tiny_bert_classifier(),
        [{"input_ids": [0, 5, 6, 2], "label": 2}, {"input_ids": [0, 7, 2], "label": 0}],
    )
    with torch.no_grad():
        scores = torch.cat([model(torch.tensor([row["input_ids"]])).logits for row in rows])
        loss, predicted, _ = Classes().predict(model, RIGHT(rows))
    torch.testing.assert_close(predicted, scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(scores, torch.tensor([2, 0])))


def test_metric_is_accuracy_of_what_is_chosen():
    for model, batch, chooser in (
        (tiny_llama(), COLLATE(SINGLE), Options()),
        (tiny_llama(), COLLATE(UNEQUAL), Options()),
        (tiny_roberta_mlm(), RIGHT(MASKED), LabelWords()),
    ):
        with torch.no_grad():
            loss, scores, gold = Metric().predict(model, batch)
            _, wanted, _ = chooser.predict(model, batch)
        assert torch.equal(scores, wanted)
        assert float(loss) == pytest.approx(1 - float((wanted.argmax(1) == gold).float().mean()))
        assert Metric().num_terms(batch) == len(gold)


def test_metric_and_cross_entropy_of_what_is_written():
    model, (rows, collate, answering) = tiny_llama(vocab_size=4 + len(WORDS)), generated()
    texts = write(model, [row["prompt_ids"] for row in rows], answering).texts
    read = dataclasses.replace(answering, answer_in=lambda text: "a prize" if text == texts[0] else "you")
    batch = collate(rows) | {"answering": read}
    with torch.no_grad():
        loss, scores, _ = Metric().predict(model, batch)
        assert scores.tolist() == [[pytest.approx(2 / 3), 0.0], [1.0, 1.0]]
        assert float(loss) == pytest.approx(1 - 5 / 6)
        assert float(Metric(metric="exact_match").loss(model, batch)) == 0.5
        trained, same, _ = CrossEntropy().predict(model, batch)
        assert torch.equal(scores, same)
        gold = {key: batch[key] for key in batch.keys() - {"prompt_ids", "prompts", "answers", "answering"}}
        assert torch.equal(trained, CrossEntropy().loss(model, gold))
        parts = [Metric().loss(model, one) for one in examples_of(batch)]  # texts go with their rows
    assert torch.stack(parts).mean().item() == pytest.approx(float(loss))


SCRIPT = """import datasets
import evaluate
class {name}(evaluate.Metric):
    def _info(self):
        features = datasets.Features({{"predictions": {kind}, "references": {kind}}})
        return evaluate.MetricInfo(description="", citation="", features=features)
    def _compute(self, predictions, references):
        same = sum(map({test}, predictions, references)) / len(references)
        return {{"note": "x", "share": same, "errors": 100 * (1 - same)}}
"""


def test_metric_may_be_any_of_the_evaluate_library(tmp_path, monkeypatch):
    """Of texts, whose first gold answer it takes, and of choices; its first number or the one that is named."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    places = {}
    for name, kind, test in (("begins", "string", "str.startswith"), ("equals", "int32", "int.__eq__")):
        (tmp_path / name).mkdir()
        script = SCRIPT.format(name=name.title(), kind=f"datasets.Value('{kind}')", test=test)
        (tmp_path / name / f"{name}.py").write_text(script)
        places[name] = f"evaluate:{tmp_path / name}"
    model, (rows, collate, answering) = tiny_llama(vocab_size=4 + len(WORDS)), generated()
    texts = write(model, [row["prompt_ids"] for row in rows], answering).texts
    read = dataclasses.replace(answering, answer_in=lambda text: "spam, I say" if text == texts[0] else "me")
    batch, options = collate(rows) | {"answering": read}, COLLATE(UNEQUAL)
    before = numpy.random.get_state()[1].tolist(), random.getstate()
    with torch.no_grad():
        loss, scores, _ = Metric(metric=places["begins"]).predict(model, batch)
        assert (float(loss), scores.shape) == (0.5, (2, 2))
        errors = Metric(metric=f"{places['begins']}#errors", greater_is_better=False, temperature=1e-6, num_samples=2)
        assert float(errors.loss(model, batch)) == 50
        wanted, scores, _ = Metric().predict(tiny_llama(), options)
        other_loss, same, _ = Metric(metric=places["equals"]).predict(tiny_llama(), options)
    assert float(other_loss) == pytest.approx(float(wanted))
    assert torch.equal(scores, same)
    assert before == (numpy.random.get_state()[1].tolist(), random.getstate())
    with pytest.raises(
        UserError, match=r"#share2 is no number of that metric, it has share, errors. Did you mean shar"
    ):
        Metric(metric=f"{places['equals']}#share2").loss(tiny_llama(), options)
    with pytest.raises(UserError, match=r"the evaluate metric .*nowhere could not be loaded .*give the folder"):
        Metric(metric=f"evaluate:{tmp_path / 'nowhere'}").prepare()
    with pytest.raises(UserError, match=r"metric f1 is not on this machine, and HF_HUB_OFFLINE is set: .*give the fol"):
        Metric(metric="evaluate:f1").prepare()
    for fields in ({"metric": "evaluate:"}, {"metric": "evaluate"}, {"metric": "f1", "greater_is_better": False}):
        with pytest.raises(UserError, match="must be"):
            Metric(**fields)


PAIRS = [([4, 5, 6], [7, 8], [9]), ([4, 6], [10], [11, 12, 13])]
"""(prompt, better answer, other answer)."""


def pair_rows() -> list[dict]:
    """Two preference pairs, without their reference yet."""

    def answer(prompt: list[int], ids: list[int]) -> dict:
        return counted([*prompt, *ids], range(len(prompt), len(prompt) + len(ids)))

    return [{"chosen": answer(p, c), "rejected": answer(p, r), "input_ids": [*p, *c]} for p, c, r in PAIRS]


def test_preference_is_dpo_against_the_start():
    rows = pair_rows()
    start, moved, collate = tiny_llama(0), tiny_llama(1), PairCollator(PAD)
    with pytest.raises(UserError, match="keep_reference"):
        Preference().loss(start, collate(rows))
    assert list(keep_reference(start, rows, collate, 1)) == [1, 2]
    batch = collate(rows)

    def log_prob(model, ids: list[int], begins: int) -> torch.Tensor:
        logits = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        return sum(logits[place - 1, ids[place]] for place in range(begins, len(ids)))

    with torch.no_grad():
        gains = [
            [log_prob(moved, [*p, *side], len(p)) - log_prob(start, [*p, *side], len(p)) for side in (c, r)]
            for p, c, r in PAIRS
        ]
        wanted = torch.stack([-torch.nn.functional.logsigmoid(0.3 * (c - r)) for c, r in gains]).mean()
        torch.testing.assert_close(Preference(beta=0.3).loss(moved, batch), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(Preference().loss(start, batch), torch.tensor(2.0).log(), rtol=1e-5, atol=1e-6)
    assert Preference().num_terms(batch) == 2
    assert [len(one["input_ids"]) for one in examples_of(batch)] == [2, 2]


def test_a_reward_is_any_function(monkeypatch, tmp_path):
    model = tiny_llama(vocab_size=4 + len(WORDS))
    rows, collate, answering = generated([Rated("is it", 2.5, "f:1"), Rated("call", "seven", "f:2")])
    calls = []
    (tmp_path / "judge.py").write_text(
        "def lengths(prompts, generations):\n    return [len(text) for text in generations]\n"
        "def bad(prompts, generations):\n    return [float('nan')] * len(prompts)\n"
        "def wrong(texts):\n    return texts\n"
        "def other(prompt, completion, **_):\n    return prompt\n"
        "def more(prompts, generations, scale):\n    return prompts\n"
    )
    monkeypatch.chdir(tmp_path)

    def judge(prompts, generations, answers):
        calls.append((prompts, answers))
        return range(len(generations))

    batch = collate(rows)
    with torch.no_grad():
        loss, rewards, _ = Reward(function=judge).predict(model, batch)
        lengths = Reward(function="judge:lengths").predict(model, batch)[1].tolist()
    assert (float(loss), rewards.tolist()) == (-0.5, [0.0, 1.0])
    assert calls == [(["is it", "call"], [2.5, "seven"])]
    assert lengths == [len(text) for text in write(model, batch["prompt_ids"], answering).texts]
    with pytest.raises(UserError, match="judge:bad must return finite numbers, got nan"):
        Reward(function="judge:bad").loss(model, batch)
    numbers = [numpy.float32(0.5), torch.tensor(2), Fraction(1, 4), True]
    assert Reward(function=lambda prompts, generations: numbers).rewards(["a"] * 4, ["b"] * 4, []) == [0.5, 2, 0.25, 1]
    for value in ("1", None, 1j, [1.0], torch.ones(1), numpy.float64("inf"), 10**400):
        with pytest.raises(UserError, match="must return finite numbers"):
            Reward(function=lambda prompts, generations, value=value: [value]).rewards(["a"], ["b"], [])
    for function, message in (
        ("judge:none", "no function called none"),
        ("nowhere:f", "No module named 'nowhere'"),
        ("judge:wrong", "must take prompts and generations"),
        ("judge:other", r"it is other\(prompt, completion, \*\*_\), write def other\(prompts, generations\)"),
        ("judge:more", r"it is more\(prompts, generations, scale\)"),
        (lambda texts: texts, r"must take prompts and generations, two lists of texts, by these names"),
        ("", "needs objective.function=module:function"),
    ):
        with pytest.raises(UserError, match=message):
            Reward(function=function).prepare()
    with pytest.raises(UserError, match="function must be module:function"):
        Reward(function="import os")


def test_an_expression_is_the_weighted_sum():
    model, batch = tiny_llama(), COLLATE(UNEQUAL)
    expression = Expression(
        formula="options - 0.5*cross_entropy + 2e-1 * metric", settings={"metric": {"metric": "accuracy"}}
    )
    with torch.no_grad():
        options, entropy, metric = (one.loss(model, batch) for one in (Options(), CrossEntropy(), Metric()))
        loss, scores, _ = expression.predict(model, batch)
        torch.testing.assert_close(loss, options - 0.5 * entropy + 0.2 * metric)
        torch.testing.assert_close(expression.loss(model, batch), loss)
        assert torch.equal(scores, Options().predict(model, batch)[1])
    assert (expression.forms, expression.differentiable, expression.generates) == (("options",), False, False)
    assert Expression(formula="cross_entropy + metric").generates
    for fields, message in (
        ({"formula": "options cross_entropy"}, "formula must be objectives with weights joined by"),
        ({"formula": "2 options"}, "formula must be"),
        ({"formula": ""}, "formula must be"),
        ({"formula": "option"}, "no objective called 'option'. Did you mean options"),
        ({"formula": "expression"}, "no objective called 'expression'"),
        ({"settings": {"metric": {}}}, "settings must be of objectives in the formula"),
        ({"formula": "metric", "settings": {"metric": {"sed": 1}}}, "settings must be settings of metric"),
    ):
        with pytest.raises(UserError, match=message):
            Expression(**fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["objective=metric", "method=adamw"], "objective=metric has no gradient, and estimator=backprop"),
        (["objective=metric", "estimator=forward_gradient"], "has no gradient, and estimator=forward_gradient"),
        (["objective=expression", "objective.formula=options+metric", "method=adamw"], "objective=expression has no"),
        (["objective=metric", "objective.num_samples=2"], "num_samples must be 1 with temperature=0"),
        (["objective=metric", "objective.metric=accuracy", "objective.seed=3"], "accuracy writes nothing"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_config(arguments, message):
    with pytest.raises(UserError, match=message):
        compose(arguments)


def test_a_file_names_no_code(tmp_path):
    file = tmp_path / "mine.yaml"
    for objective, setting in (
        ("reward", "{function: 'os:system'}"),
        ("expression", "{formula: reward, settings: {reward: {function: 'os:system'}}}"),
    ):
        file.write_text(f"# @package _global_\ndefaults:\n  - override /objective: {objective}\nobjective: {setting}\n")
        with pytest.raises(UserError, match=r"mine\.yaml names a function to call, objective\.function=os:system"):
            compose([f"config={file}"])
        assert compose([f"config={file}"], runs_code=False).objective.name() == objective
    for objective, setting, message in (
        ("metric", "{metric: 'evaluate:evil#a'}", "a metric whose script is run, objective.metric=evaluate:evil#a"),
        ("metric", "{metric: '${model.name}'}", "a metric whose script is run"),
        (
            "expression",
            "{formula: metric, settings: {metric: {metric: 'evaluate:evil'}}}",
            "objective.metric=evaluate:evil",
        ),
        ("expression", "{formula: reward, settings: '${task.columns}'}", "a function to call"),
        ("expression", "{formula: reward, settings: {reward: '${task.columns}'}}", "a function to call"),
    ):
        file.write_text(f"# @package _global_\ndefaults:\n  - override /objective: {objective}\nobjective: {setting}\n")
        with pytest.raises(UserError, match=re.escape(message)):
            compose([f"config={file}"])
    file.write_text("# @package _global_\nobjective: {metric: 'evaluate:evil#a'}\n")
    given = "objective.metric=evaluate:evil#a"
    assert compose([f"config={file}", "objective=metric", given]).objective.library == "evil#a"
    # what cannot become code may refer to another key
    settings = "{formula: metric, settings: {metric: {max_new_tokens: '${seed}'}}}"
    file.write_text(f"# @package _global_\ndefaults:\n  - override /objective: expression\nobjective: {settings}\n")
    assert compose([f"config={file}", "seed=7"]).objective.terms()[0][0].max_new_tokens == 7
    file.write_text(
        "# @package _global_\ndefaults:\n  - override /objective: reward\nobjective: {function: 'os:system'}\n"
    )
    assert compose([f"config={file}", "objective.function=os:system"]).objective.function == "os:system"
