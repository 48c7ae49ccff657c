"""Rows of every form scored by a model: what it chose or wrote for each, and the metrics with their intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from zoft.evaluation.choices import CLOSE, Calibrated, Decision, Scorer, choose, cross_entropy, in_batches
from zoft.lm.metrics.answers import SCORES, scored
from zoft.lm.metrics.intervals import mean_of_numbers, mean_of_scores, wilson
from zoft.lm.models.generate import Written, write
from zoft.lm.objectives.base import Objective
from zoft.utils.lazy import Tensor, nn, torch

Row = dict[str, Any]
CLOSE_LOGITS = {"float32": 1e-3, "float64": 1e-8}
"""How near the likeliest two tokens may be, in logits, before an answer is written again alone; 0.25 in 16 bits."""


@dataclass
class Scored:
    """What an evaluation found.

    Args:
        metrics: by name, with ``_low`` and ``_high``.
        predictions: one a row, plain values.
        num_alone: rows that were computed again by themselves, because the batch could have decided.
    """

    metrics: dict[str, float]
    predictions: list[dict[str, Any]]
    num_alone: int = 0


@dataclass
class Scoring:
    """A model, and how rows are put before it.

    Args:
        model: in evaluation mode.
        objective: one that is computed from such rows.
        collate: makes batches of them.
        batch_size: rows in a forward.
        autocast: the context that forwards run in.
    """

    model: nn.Module
    objective: Objective
    collate: Callable[[Sequence[Row]], dict[str, Any]]
    batch_size: int = 32
    autocast: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)

    @property
    def dtype(self) -> str:
        """What the model computes in."""
        # autocast decides over the weights' own dtype
        if torch.is_autocast_enabled(self.device.type):
            return str(torch.get_autocast_dtype(self.device.type)).removeprefix("torch.")
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    @property
    def device(self) -> Any:
        """Where the model is; of one whose base is in a server, where its adapter is."""
        return next(p.device for p in self.model.parameters() if not p.is_meta)

    def predict(self, rows: Sequence[Row], collate: Callable[..., dict[str, Any]] | None = None) -> Any:
        """The objective's predictions of one batch."""
        # lists and objects of a batch (prompts, answering) have no device
        batch = {
            key: value.to(self.device) if isinstance(value, torch.Tensor) else _moved(value, self.device)
            for key, value in (collate or self.collate)(rows).items()
        }
        with torch.inference_mode(), self.autocast():
            return self.objective.predict(self.model, batch)

    def scores(self, rows: Sequence[Row]) -> Tensor:
        """Scores of each row's options [B, O]."""
        return self.predict(rows)[1].float()

    # ---- choosing ----------------------------------------------------------------------------------------------------

    def choices(self, rows: Sequence[Row], against: Sequence[Row] | None = None) -> list[Decision]:
        """What is chosen in each row.

        Args:
            rows: with options, a mask, or for a head.
            against: the same options behind prompts without content: the sum of an option's log-probabilities there is
                taken from that behind its own prompt (calibration).
        """
        # options of several tokens are padded; alone they are not
        score: Scorer = self.scores
        score_alone: Scorer = self._alone if "sequences" in rows[0] else self.scores
        if against is not None:
            rows = [row | {"against": other} for row, other in zip(rows, against, strict=True)]
            score = Calibrated(self.scores)
            score_alone = Calibrated(self._alone)
        return choose(rows, score, score_alone, self.batch_size, self.close)

    @property
    def close(self) -> float:
        """How near two scores may be before the batch could decide: see :data:`zoft.evaluation.choices.CLOSE`."""
        with self.autocast():
            return CLOSE.get(self.dtype, 5e-2)

    def _alone(self, rows: Sequence[Row]) -> Tensor:
        """Scores of one row, each option in a forward of its own without padding, as MeZO evaluates."""
        from zoft.lm.data.tokens import OptionCollator

        # each option by itself, as MeZO's code evaluates: no padding, and no other option beside it
        (row,) = rows
        collate = OptionCollator(0, one_row_per_option=True)
        each = [
            {"sequences": [s], "lengths": [n], "label": 0}
            for s, n in zip(row["sequences"], row["lengths"], strict=True)
        ]
        return torch.cat([self.predict([one], collate)[1].float() for one in each], dim=1)

    def chosen(self, rows: Sequence[Row], choices: Sequence[Decision]) -> Scored:
        """Accuracy and loss of choices; a row may have several right ones."""
        right = [{row["label"], *row.get("also_right", ())} for row in rows]
        # a binomial share: Wilson's interval holds near 0 and 1, and for few rows
        hits = [choice.chosen in right_of_row for choice, right_of_row in zip(choices, right, strict=True)]
        low, high = wilson(sum(hits), len(hits))
        loss = cross_entropy(choices, [row["label"] for row in rows])
        return Scored(
            {"accuracy": sum(hits) / len(hits), "accuracy_low": low, "accuracy_high": high, "loss": loss},
            [
                {"scores": choice.scores, "chosen": choice.chosen, "label": row["label"], "right": hit}
                for choice, row, hit in zip(choices, rows, hits, strict=True)
            ],
            sum(choice.alone for choice in choices),
        )

    # ---- writing -----------------------------------------------------------------------------------------------------

    def written(self, rows: Sequence[Row]) -> Scored:
        """F1 and exact match of what is written, or the reward where the objective is one."""
        from zoft.lm.objectives.reward import Reward

        samples, num_alone = self.texts(rows)
        if isinstance(self.objective, Reward):
            return self._rewarded(rows, samples, num_alone)
        answering = self.collate(rows[:1])["answering"]
        predictions = []
        for number, row in enumerate(rows):
            texts = [texts[number] for texts in samples]
            # the answer in a text, before it is compared with the gold ones
            answers = [answering.answer_in(text) for text in texts]
            all_scores = [scored(one, row["answers"], as_mezo=answering.as_mezo) for one in answers]
            scores: dict[str, Any] = {name: _mean([of_sample[name] for of_sample in all_scores]) for name in SCORES}
            if len(texts) > 1:
                scores["exact_matches"] = [of_sample["exact_match"] for of_sample in all_scores]
            predictions.append(_texts(row, texts) | {"answer": answers[0], "answers": row["answers"]} | scores)
        metrics: dict[str, float] = {}
        for name in SCORES:
            # means over rows with an interval: rows are what was drawn, samples of one row are not
            values = [row[name] for row in predictions]
            low, high = mean_of_scores(values)
            metrics |= {name: _mean(values), f"{name}_low": low, f"{name}_high": high}
        return Scored(metrics, predictions, num_alone)

    def _rewarded(self, rows: Sequence[Row], samples: list[list[str]], num_alone: int) -> Scored:
        objective: Any = self.objective
        prompts = [row["prompt"] for row in rows]
        answers = [row["answers"][0] if len(row["answers"]) == 1 else row["answers"] for row in rows]
        of_samples = objective.rewards_of_samples(prompts, samples, answers)
        values = [_mean(of_row) for of_row in zip(*of_samples, strict=True)]
        low, high = mean_of_numbers(values)
        predictions = [
            _texts(row, [texts[number] for texts in samples])
            | {"reward": values[number]}
            | ({"rewards": [of_row[number] for of_row in of_samples]} if len(samples) > 1 else {})
            for number, row in enumerate(rows)
        ]
        return Scored({"reward": _mean(values), "reward_low": low, "reward_high": high}, predictions, num_alone)

    def texts(self, rows: Sequence[Row]) -> tuple[list[list[str]], int]:
        """What is written for every row, once a sample, and how many rows were written again alone."""
        answering, temperature = self.collate(rows[:1])["answering"], getattr(self.objective, "temperature", 0.0)
        room = getattr(self.objective, "max_new_tokens", 0)
        answering = dataclasses.replace(answering, max_new_tokens=room) if room else answering
        first = getattr(self.objective, "seed", 0)
        again: set[int] = set()
        samples = []
        # a seed for every sample, the objective's own first
        for seed in range(first, first + getattr(self.objective, "num_samples", 1)):
            texts = [""] * len(rows)

            def of(numbers: list[int], seed: int = seed) -> Written:
                prompts = [rows[number]["prompt_ids"] for number in numbers]
                with torch.inference_mode(), self.autocast():
                    return write(self.model, prompts, answering, temperature=temperature, seed=seed)

            def put(numbers: list[int], texts: list[str] = texts, of: Callable[..., Written] = of) -> None:
                # two tokens that are nearly as likely: the batch's rounding could decide, so it is written again alone
                written = of(numbers)
                for number, text, margin in zip(numbers, written.texts, written.margins, strict=True):
                    close = len(numbers) > 1 and margin <= self._close_logits
                    texts[number] = of([number]).texts[0] if close else text
                    again.update({number} if close else ())

            in_batches(rows, self.batch_size, put)
            samples.append(texts)
        return samples, len(again)

    @property
    def _close_logits(self) -> float:
        with self.autocast():
            return CLOSE_LOGITS.get(self.dtype, 0.25)

    # ---- texts and pairs ---------------------------------------------------------------------------------------------

    def counted(self, rows: Sequence[Row]) -> Scored:
        """Loss and perplexity of texts."""
        from zoft.lm.metrics.metrics import perplexity

        by_row: dict[int, tuple[float, int]] = {}

        def put(numbers: list[int]) -> None:
            _, sums, counts = self.predict([rows[number] for number in numbers])
            by_row.update(zip(numbers, zip(sums.tolist(), counts.tolist(), strict=True), strict=True))

        in_batches(rows, self.batch_size, put)
        ordered = [by_row[number] for number in range(len(rows))]
        predictions = _Predictions([loss for loss, _ in ordered], [count for _, count in ordered])
        metrics = perplexity(predictions)  # it reads these two fields
        return Scored(metrics, [{"loss": loss, "tokens": count} for loss, count in ordered])

    def pairs(self, rows: Sequence[Row]) -> Scored:
        """In how many pairs the better answer has the larger log-probability."""
        from zoft.lm.data.completions import CountedCollator

        def score(some: Sequence[Row]) -> Tensor:
            return self._sums(self.collate(some)).view(-1, 2)

        def score_alone(some: Sequence[Row]) -> Tensor:
            collate = CountedCollator(0)  # of one row, which has no padding
            return torch.stack([self._sums(collate([some[0][side]])) for side in ("chosen", "rejected")], dim=1)

        choices = choose(rows, score, score_alone, self.batch_size, self.close)
        predictions = []
        for choice in choices:
            better, worse = choice.scores
            predictions.append({"log_prob_chosen": better, "log_prob_rejected": worse, "right": better > worse})
        hits = [row["right"] for row in predictions]
        low, high = wilson(sum(hits), len(hits))
        alone = sum(choice.alone for choice in choices)
        return Scored({"accuracy": _mean(hits), "accuracy_low": low, "accuracy_high": high}, predictions, alone)

    def _sums(self, batch: dict[str, Any]) -> Tensor:
        """log p of each row's answer [B]; finite, because a score of -inf stands for no option."""
        from zoft.lm.objectives.preference import sums

        with torch.inference_mode(), self.autocast():
            log_probs = sums(self.model, {key: value.to(self.device) for key, value in batch.items()})
        return log_probs.clamp_min(torch.finfo(torch.float32).min)


@dataclass
class _Predictions:
    predictions: list[float]
    label_ids: list[int]


def _texts(row: Row, texts: list[str]) -> dict[str, Any]:
    return {"prompt": row["prompt"], "text": texts[0]} | ({"texts": texts} if len(texts) > 1 else {})


def _moved(value: Any, device: Any) -> Any:
    """``packed`` is a mapping of tensors."""
    if not isinstance(value, dict):
        return value
    return {key: part.to(device) if isinstance(part, torch.Tensor) else part for key, part in value.items()}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
