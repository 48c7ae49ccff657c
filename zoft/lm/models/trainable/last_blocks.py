"""The last n blocks and the normalisation after them."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.errors import UserError
from zoft.lm.models.trainable.base import Trainable, block_of, fresh_head
from zoft.utils.lazy import nn


@dataclass
class LastBlocks(Trainable):
    """Every weight of the last n blocks, the final norm and a fresh head; embeddings and a tied head stay frozen.

    What lies below never changes, so its hidden states are computed once per example for the whole run.

    Args:
        num_blocks: how many blocks, counted from the output, at least 1.
    """

    num_blocks: int = 2

    def check(self) -> None:
        """Refuse less than one block."""
        self.require(self.num_blocks >= 1, "num_blocks", "at least 1")

    def chosen(self, model: nn.Module) -> set[str]:
        """Names in the last blocks, the final norm and a fresh head."""
        return in_last_blocks(model, self.num_blocks, self) | fresh_head(model)


def in_last_blocks(model: nn.Module, num_blocks: int, asker: Trainable) -> set[str]:
    """Names in the last ``num_blocks`` blocks of the longest stack, and in the normalisation that follows it.

    Raises:
        UserError: the model has no stack of blocks, or fewer of them.
    """
    stacks: dict[str, set[int]] = {}
    for name, _ in model.named_parameters():
        index = block_of(name)
        if index is not None:
            stacks.setdefault(_stack(name, index), set()).add(index)
    if not stacks:
        raise UserError(f"trainable={asker.name()} found no numbered blocks in this model: use trainable=regex")
    # Of an encoder and a decoder the decoder is nearer the output.
    stack, indices = max(stacks.items(), key=lambda item: ("decoder" in item[0], len(item[1])))
    depth = max(indices) + 1
    if num_blocks > depth:
        raise UserError(f"trainable.num_blocks={num_blocks} but the model has {depth} blocks")
    parent = stack.rpartition(".")[0]
    chosen = set()
    for name, _ in model.named_parameters():
        index = block_of(name)
        inside = index is not None and _stack(name, index) == stack and index >= depth - num_blocks
        after = index is None and name.startswith(parent) and "norm" in name.lower().removeprefix(parent.lower())
        is_final_ln = name.removeprefix(parent).lstrip(".") in {"ln_f.weight", "ln_f.bias"}
        if inside or (after and "embed" not in name.lower()) or is_final_ln:
            chosen.add(name)
    return chosen


def _stack(name: str, index: int) -> str:
    return name[: name.index(f".{index}.")]
