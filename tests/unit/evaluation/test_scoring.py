"""Evaluation in batches decides as one candidate at a time does; calibration and probing are what they say."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.models import CAUSAL, PAD, VOCAB, tiny_llama, tiny_roberta_mlm
from tests.runs import WORDS
from tests.unit.lm.objectives.test_objectives import naive_scores
from tests.unit.lm.objectives.test_objectives_more import ANSWERED, MASKED, RIGHT, generated
from zoft.evaluation import evaluate
from zoft.evaluation.choices import CLOSE, choose, cross_entropy, is_close
from zoft.evaluation.linear_probe import features, fit, probe
from zoft.evaluation.scoring import Scoring
from zoft.lm.data.completions import CountedCollator, counted
from zoft.lm.data.encoding import PairCollator
from zoft.lm.data.examples import Example
from zoft.lm.data.tokens import OptionCollator
from zoft.lm.objectives.label_words import LabelWords
from zoft.lm.objectives.metric import Metric
from zoft.lm.objectives.options import Options
from zoft.lm.objectives.preference import Preference, sums


def random_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Options of one or many tokens behind prompts of any length; some options are there twice, and tie."""
    drawn = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return drawn.choices(range(4, VOCAB), k=count)

    rows = []
    for number in range(count):
        prompt = tokens(drawn.randint(1, 20))
        options = [tokens(drawn.choice([1, 1, 2, 5])) for _ in range(drawn.randint(2, 4))]
        if number % 4 == 0:
            options[-1] = options[0]
        sequences = [prompt + option for option in options]
        row = {"sequences": sequences, "lengths": list(map(len, options)), "input_ids": max(sequences, key=len)}
        rows.append(row | {"label": drawn.randrange(len(options))})
    return rows


@pytest.mark.parametrize("family", ["opt", "qwen"])
def test_choices_in_batches_are_those_of_one_candidate_at_a_time(family):
    model, rows = CAUSAL[family](), random_rows(24, seed=len(family))
    scoring = Scoring(model, Options(), OptionCollator(PAD), batch_size=5)
    choices = scoring.choices(rows)
    means = [[float(s.mean()) for s in example] for example in naive_scores(model, rows)]
    assert [choice.chosen for choice in choices] == [row_means.index(max(row_means)) for row_means in means]
    for choice, row_means in zip(choices, means, strict=True):
        assert choice.scores == pytest.approx(row_means, abs=1e-5)
        assert choice.alone == is_close(row_means, CLOSE["float32"])
    assert any(choice.alone for choice in choices)
    assert not all(choice.alone for choice in choices)
    one_by_one = Scoring(model, Options(), OptionCollator(PAD), batch_size=1).choices(rows)
    assert [choice.chosen for choice in one_by_one] == [choice.chosen for choice in choices]
    scored = scoring.chosen(rows, choices)
    losses = [
        -torch.log_softmax(torch.tensor(row_means), 0)[row["label"]] for row_means, row in zip(means, rows, strict=True)
    ]
    assert scored.metrics["loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
    hits = [row_means.index(max(row_means)) == row["label"] for row_means, row in zip(means, rows, strict=True)]
    assert scored.metrics["accuracy"] == sum(hits) / len(hits)
    assert scored.metrics["accuracy_low"] < scored.metrics["accuracy"] < scored.metrics["accuracy_high"]


def test_calibration_takes_off_what_the_options_have_anyway():
    model, rows = tiny_llama(), random_rows(16, seed=1)
    domains = []
    for row in rows:
        options = [s[len(s) - n :] for s, n in zip(row["sequences"], row["lengths"], strict=True)]
        domains.append({"sequences": [[7, *option] for option in options], "lengths": row["lengths"], "label": 0})
    scoring = Scoring(model, Options(), OptionCollator(PAD), batch_size=5)
    choices = scoring.choices(rows, domains)
    scores, other = naive_scores(model, rows), naive_scores(model, domains)
    for choice, ours, theirs in zip(choices, scores, other, strict=True):
        wanted = [float(a.double().sum() - b.double().sum()) for a, b in zip(ours, theirs, strict=True)]
        assert choice.scores == pytest.approx(wanted, abs=1e-4)
        if not is_close(wanted, 1e-4):
            assert choice.chosen == wanted.index(max(wanted))
    alone = Scoring(model, Options(), OptionCollator(PAD), batch_size=1).choices(rows, domains)
    assert [choice.chosen for choice in alone] == [choice.chosen for choice in choices]


def test_words_at_masks_and_several_right_answers():
    scoring = Scoring(tiny_roberta_mlm(), LabelWords(), RIGHT, batch_size=2)
    choices = scoring.choices(MASKED)
    assert [c.chosen for c in choices] == [scoring.scores([row]).argmax().item() for row in MASKED]
    others = [[(c.chosen + 1) % 3, c.chosen][k % 2 : k % 2 + 1] for k, c in enumerate(choices)]
    rows = [
        row | {"label": (c.chosen + 2) % 3, "also_right": more}
        for row, c, more in zip(MASKED, choices, others, strict=True)
    ]
    assert scoring.chosen(rows, choices).metrics["accuracy"] == pytest.approx(1 / 3)
    assert cross_entropy(choices, [c.chosen for c in choices]) < cross_entropy(choices, [row["label"] for row in rows])


def test_pairs_in_batches_are_decided_as_one_answer_at_a_time():
    """Answers that are as likely tie in a batch and alone: such a pair counts as wrong, its numbers are alone's."""
    model, drawn, rows = tiny_llama(), random.Random(0), []
    for number in range(14):
        prompt, better, worse = (drawn.choices(range(4, VOCAB), k=drawn.randint(1, 9)) for _ in range(3))
        sides = [counted([*prompt, *a], range(len(prompt), len(prompt) + len(a))) for a in (better, worse)]
        sides[1] = sides[0] if number % 3 == 0 else sides[1]
        row = {"chosen": sides[0], "rejected": sides[1]}
        rows.append(row | {"input_ids": max((side["input_ids"] for side in sides), key=len)})
    with torch.no_grad():
        expected = [
            [float(sums(model, CountedCollator(PAD)([row[side]]))) for side in ("chosen", "rejected")] for row in rows
        ]
    result = Scoring(model, Preference(), PairCollator(PAD), batch_size=5).pairs(rows)
    assert [row["right"] for row in result.predictions] == [better > worse for better, worse in expected]
    ties = [is_close(values, CLOSE["float32"]) for values in expected]
    assert result.num_alone == sum(ties) == 5
    for row, values, tie in zip(result.predictions, expected, ties, strict=True):
        log_probs = [row["log_prob_chosen"], row["log_prob_rejected"]]
        assert log_probs == (values if tie else pytest.approx(values, abs=1e-3))


def test_what_is_too_close_is_scored_alone():
    rows = [{"input_ids": [1] * n} for n in (3, 1, 2)]
    asked: list[Any] = []

    def alone(rows: Any) -> torch.Tensor:
        asked.append(rows)
        return torch.tensor([[0.0, 1.0]])

    together = {3: [1.0, 1.0 + 1e-6], 1: [0.0, -1.0], 2: [float("nan"), 0.0]}
    choices = choose(rows, lambda rows: torch.tensor([together[len(r["input_ids"])] for r in rows]), alone, 2, 1e-4)
    assert [choice.chosen for choice in choices] == [1, 0, 1]
    assert asked == [[rows[0]], [rows[2]]]


def test_answers_in_batches_are_those_written_alone():
    words = list(range(4, 4 + len(WORDS)))
    model, drawn = tiny_llama(vocab_size=4 + len(WORDS)), random.Random(0)
    rows, collate, _ = generated([ANSWERED[k % 2] for k in range(9)])
    rows = [row | {"prompt_ids": [0, *drawn.choices(words, k=drawn.randint(1, 8))]} for row in rows]
    rows = [row | {"input_ids": row["prompt_ids"]} for row in rows]
    for objective in (Metric(), Metric(temperature=1.0, num_samples=2)):
        one, many = (Scoring(model, objective, collate, size) for size in (1, 4))
        assert many.texts(rows)[0] == one.texts(rows)[0]
        scored = many.written(rows)
        assert scored.metrics["f1"] == pytest.approx(sum(row["f1"] for row in scored.predictions) / 9)
        assert scored.metrics["exact_match_low"] <= scored.metrics["exact_match"] <= scored.metrics["exact_match_high"]
    model.lm_head.weight.data.zero_()  # all tokens alike: nothing that a batch says counts
    assert Scoring(model, Metric(), collate, 4).texts(rows)[1] == 8  # the ninth is alone in its batch


def test_a_probe_is_logistic_regression():
    torch.manual_seed(0)
    with torch.random.fork_rng():
        x = torch.randn(40, 3, dtype=torch.float64)
    labels = (x[:, 0] + 0.5 * x[:, 1] > 0).long().tolist()
    weight, bias = fit(x, labels, 2, 0.1)
    w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ w + b, torch.tensor(labels)) + 0.05 * w.square().sum()
    loss.backward()
    assert float(w.grad.abs().max()) < 1e-6  # where its gradient vanishes
    constant = torch.cat((x, torch.full((40, 1), 3.0)), 1)  # a feature that never changes says nothing
    fitted = probe((constant, labels), (constant, labels), 2)
    assert fitted.log_probs(constant).argmax(1).tolist() == labels
    assert fitted.penalty == 1e-3


def test_a_probe_asks_again_alone_where_it_cannot_tell(monkeypatch):
    """Of rows that are all alike it cannot, of rows that differ it can."""
    asked: list[int] = []

    def counted_features(scoring: Any, rows: Any) -> torch.Tensor:
        asked.append(len(rows))
        return torch.tensor([[float(len(row["input_ids"])), 1.0] for row in rows])

    monkeypatch.setattr("zoft.evaluation.linear_probe.features", counted_features)
    scoring = Scoring(tiny_llama(), Options(), OptionCollator(PAD), batch_size=4)
    for rows, alone in (
        ([{"input_ids": [1, 2], "label": k % 2} for k in range(6)], 6),
        ([{"input_ids": [1] * (1 + 3 * (k % 2)), "label": k % 2} for k in range(6)], 0),
    ):
        asked.clear()
        splits = SimpleNamespace(train=rows, dev=rows, test=rows)
        scored = evaluate._probed(scoring, splits, evaluate.Request("linear_probe"), lambda rows: rows)
        assert scored.num_alone == alone
        assert asked == [6, 6, 4, 2] + [1] * alone
    assert scored.metrics["accuracy"] == 1


def test_features_stand_where_the_answer_would():
    model, rows = tiny_llama(), random_rows(5, seed=3)
    vectors = features(Scoring(model, Options(), OptionCollator(PAD), 2), rows)
    with torch.no_grad():
        for row, vector in zip(rows, vectors, strict=True):
            prompt = row["sequences"][0][: -row["lengths"][0]]
            wanted = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0, -1]
            torch.testing.assert_close(vector, wanted, rtol=1e-4, atol=1e-5)
        masked = tiny_roberta_mlm()
        (vector, *_) = features(Scoring(masked, LabelWords(), RIGHT, 2), MASKED)
        states = masked(torch.tensor([MASKED[0]["input_ids"]]), output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(vector, states[0, MASKED[0]["mask_position"]], rtol=1e-4, atol=1e-5)


def test_demonstrations_of_ones_own_rows():
    from zoft.errors import UserError
    from zoft.evaluation.evaluate import with_solved
    from zoft.lm.tasks.sms_spam import SmsSpam

    train = [Example(f"text {k}", (" No", " Yes"), k % 2) for k in range(6)]
    one, two = with_solved(SmsSpam(), [Example("ask", (" No", " Yes"), 0)] * 2, train, 3)
    assert one.prompt != two.prompt
    assert one.prompt.endswith("\n\nask")
    assert one.prompt.count("text") == 3
    with pytest.raises(UserError, match="k=7 demonstrations are wanted and there are 6"):
        with_solved(SmsSpam(), train, train, 7)
