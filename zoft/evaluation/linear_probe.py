"""Linear probing: logistic regression on the model's last hidden states, a reference that trains no weight of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zoft.errors import UserError
from zoft.evaluation.choices import Row, in_batches
from zoft.evaluation.scoring import Scoring
from zoft.lm.data.masked import RightPaddedCollator
from zoft.lm.logits.call import inner
from zoft.utils.lazy import Tensor, torch

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Strengths that the dev rows choose from: of the squared weights, for standardised features, over the mean loss."""


@dataclass(frozen=True)
class Probe:
    """A fitted classifier of features.

    Args:
        mean: of the training features [H].
        scale: their standard deviation [H]; infinite where they never change.
        weight: of the standardised features [H, C].
        bias: [C].
        penalty: that it was fitted with.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    penalty: float

    def log_probs(self, features: Tensor) -> Tensor:
        """Of the labels, float64 [M, C], from features [M, H]."""
        standard = (features.double() - self.mean) / self.scale
        return torch.log_softmax(standard @ self.weight + self.bias, dim=-1)


def probe(train: tuple[Tensor, Sequence[int]], dev: tuple[Tensor, Sequence[int]], num_labels: int) -> Probe:
    """Fit on the training rows, with the penalty that has the smallest dev loss.

    Args:
        train: features [N, H] and labels.
        dev: the same, to choose the penalty by.
        num_labels: how many there are.

    Example:
        >>> x = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]])
        >>> fitted = probe((x, [0, 0, 1, 1]), (x, [0, 0, 1, 1]), 2)
        >>> fitted.log_probs(torch.tensor([[-3.0], [3.0]])).argmax(1).tolist()
        [0, 1]

    References: Malladi et al. 2023 (MeZO), Table 1 (LP).
    """
    mean, scale = train[0].double().mean(0), train[0].double().std(0, correction=0)
    scale = torch.where(scale > 1e-6 * (1 + mean.abs()), scale, torch.inf)  # what never changes says nothing
    best: tuple[float, Probe] | None = None
    wanted = torch.tensor(dev[1], device=train[0].device)
    for penalty in PENALTIES:
        weight, bias = fit((train[0].double() - mean) / scale, train[1], num_labels, penalty)
        fitted = Probe(mean, scale, weight, bias, penalty)
        loss = float(torch.nn.functional.nll_loss(fitted.log_probs(dev[0]), wanted))
        if best is None or loss < best[0]:
            best = loss, fitted
    assert best is not None
    return best[1]


def fit(features: Tensor, labels: Sequence[int], num_labels: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by L-BFGS from zero: the loss is convex, so nothing is random.

    Args:
        features: float64 [N, H].
        labels: N indices.
        num_labels: C.
        penalty: of the squared weights, over the mean loss; above 0.

    Returns:
        weight [H, C] and bias [C].
    """
    with torch.inference_mode(False), torch.enable_grad():
        features = features.clone()  # made in inference mode, they could not be saved for a gradient
        weight = features.new_zeros(features.shape[1], num_labels, requires_grad=True)
        bias = features.new_zeros(num_labels, requires_grad=True)
        wanted = torch.tensor(labels, device=features.device)
        exact: dict[str, Any] = {"tolerance_grad": 1e-9, "tolerance_change": 1e-15, "line_search_fn": "strong_wolfe"}
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, **exact)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(features @ weight + bias, wanted)
            loss = loss + 0.5 * penalty * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    return weight.detach(), bias.detach()


def features(scoring: Scoring, rows: Sequence[Row]) -> Tensor:
    """The last layer's state where the answer would be predicted.

    That is the last token of a prompt with options, the mask of a masked row, and the mean over the tokens of a row for
    a head.

    Args:
        scoring: the model; its adapter counts where it lies inside the model's layers.
        rows: of the forms options, mask or head.

    Returns:
        float32 [N, H], on the CPU.
    """
    model = scoring.model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UserError("mode=linear_probe sees nothing of virtual tokens (peft=prompt, prefix): probe without them")
    backbone = inner(model).base_model
    prompts = [_prompt(row) for row in rows]
    collate = RightPaddedCollator(getattr(model.config, "pad_token_id", None) or 0)
    by_row: dict[int, Tensor] = {}

    def put(numbers: list[int]) -> None:
        batch = {key: value.to(scoring.device) for key, value in collate([prompts[n] for n in numbers]).items()}
        with torch.inference_mode(), scoring.autocast():
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            states = backbone(**inputs).last_hidden_state.float()  # [B, T, H]
        by_row.update(zip(numbers, _one_each(states, batch, prompts[numbers[0]]).cpu(), strict=True))

    in_batches(prompts, scoring.batch_size, put)
    return torch.stack([by_row[number] for number in range(len(rows))])


def _prompt(row: Row) -> Row:
    if "sequences" not in row:
        return row
    shared = row["sequences"][0][: len(row["sequences"][0]) - row["lengths"][0]]
    return {"input_ids": shared, "label": row["label"], "is_prompt": True}


def _one_each(states: Tensor, batch: dict[str, Any], row: Row) -> Tensor:
    numbers = torch.arange(len(states), device=states.device)
    if "mask_position" in batch:
        return states[numbers, batch["mask_position"]]
    if "is_prompt" in row:
        return states[numbers, batch["attention_mask"].sum(1) - 1]
    mask = batch["attention_mask"].unsqueeze(2)
    return (states * mask).sum(1) / mask.sum(1)
