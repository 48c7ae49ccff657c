"""Which weights are the most sensitive? Their squared gradients over some batches, and the top share as a mask.

The file says for each tensor which of its elements are among the top share of all trained weights of the model: int64
flat indices. `subspace=sparse subspace.choose=mask subspace.mask=FILE` moves those and no others. The gradients take a
backward pass, once, on whatever machine has the memory; texts of pretraining do, and the mask serves every task after.

    python scripts/score_weights.py --model zoft:stories-260k --rows texts.jsonl --keep 0.001 --out mask.safetensors

References: Guo et al. 2024 (SensZOQ, arXiv 2406.02913): the diagonal of the empirical Fisher matrix, 0.1 % of weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoft.errors import UserError
from zoft.lm.data.files import column, read_rows
from zoft.lm.models.load import load_model, load_tokenizer, require_causal_lm


def squared_gradients(model: Any, batches: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sum of g^2 over batches, element by element: float32, by name.

    Args:
        model: a causal language model; what has ``requires_grad`` is scored, tied tensors once.
        batches: inputs with ``labels``; each batch's mean loss has one gradient g.
    """
    model.eval()
    scores = {n: torch.zeros(p.shape, device=p.device) for n, p in model.named_parameters() if p.requires_grad}
    for batch in batches:
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                scores[name] += parameter.grad.float().square()
    model.zero_grad(set_to_none=True)
    return scores


def top(scores: dict[str, Tensor], keep: float) -> dict[str, Tensor]:
    """The ``keep`` share of largest scores over all tensors: int64 flat indices by name, of those that have some.

    Example:
        >>> top({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([[0.0, 9.0]])}, 0.5)
        {'a': tensor([1]), 'b': tensor([1])}
    """
    names, sizes = list(scores), [score.numel() for score in scores.values()]
    count = max(1, round(keep * sum(sizes)))
    # each tensor's own best are enough to choose from: nothing of the model's size is sorted
    best = [score.view(-1).topk(min(count, score.numel())) for score in scores.values()]
    values = torch.cat([topk.values.cpu() for topk in best])
    owners = torch.cat([torch.full((len(topk.values),), i) for i, topk in enumerate(best)])
    places = torch.cat([topk.indices.cpu() for topk in best])
    chosen = values.topk(count).indices
    return {
        name: places[chosen[owners[chosen] == i]].sort().values
        for i, name in enumerate(names)
        if (owners[chosen] == i).any()
    }


def batches_of(
    texts: list[str], tokenizer: Any, size: int, max_tokens: int, device: Any
) -> Iterable[dict[str, Tensor]]:
    """Texts as inputs of a causal language model, ``size`` at a time; padding has no loss."""
    rows = [ids for ids in (tokenizer(text)["input_ids"][:max_tokens] for text in texts) if len(ids) > 1]
    if not rows:
        raise UserError("--rows: no text has two tokens or more, so there is nothing to predict")
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        width = max(map(len, batch))
        inputs = torch.tensor([ids + [0] * (width - len(ids)) for ids in batch], device=device)
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in batch], device=device)
        yield {"input_ids": inputs, "attention_mask": mask, "labels": inputs.masked_fill(mask == 0, -100)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder, a hub name, or zoft:NAME")
    parser.add_argument("--rows", required=True, help="a file of rows with a text each: .jsonl, .csv, .parquet, ...")
    parser.add_argument("--column", default="text", help="the column that holds the text")
    parser.add_argument("--keep", type=float, default=0.001, help="share of all trained weights, above 0 and at most 1")
    parser.add_argument("--batches", type=int, default=16, help="how many batches to look at, at most")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=512, help="longer texts are cut")
    parser.add_argument("--out", required=True, help="the mask: a .safetensors file")
    options = parser.parse_args(arguments)
    try:
        score(options)
    except UserError as error:
        sys.exit(f"error: {error}")


def score(options: argparse.Namespace) -> None:
    """Write the mask that the options ask for."""
    from safetensors.torch import save_file

    if not 0 < options.keep <= 1:
        raise UserError(f"--keep must be above 0 and at most 1, got {options.keep}")
    if min(options.batches, options.batch_size, options.max_tokens) < 1:
        raise UserError("--batches, --batch-size and --max-tokens must be at least 1")
    rows = read_rows(options.rows)[: options.batches * options.batch_size]
    texts = [str(column(row, options.column, options.rows, number)) for number, row in enumerate(rows, 1)]
    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    require_causal_lm(model, options.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches = batches_of(texts, tokenizer, options.batch_size, options.max_tokens, device)
    mask = top(squared_gradients(model.to(device), islice(batches, options.batches)), options.keep)
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    save_file(mask, options.out)
    print(f"{options.out}: {sum(map(len, mask.values()))} weights of {len(mask)} tensors move")


if __name__ == "__main__":
    main()
