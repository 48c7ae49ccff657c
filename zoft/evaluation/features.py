"""A model's last hidden states, one vector a row: what linear probing looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zoft.errors import UserError
from zoft.evaluation.choices import in_batches
from zoft.evaluation.scoring import Scoring
from zoft.lm.data.masked import RightPaddedCollator
from zoft.lm.logits.call import inner
from zoft.utils.lazy import Tensor, torch

Row = dict[str, Any]


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
