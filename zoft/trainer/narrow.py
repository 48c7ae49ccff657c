"""``narrow_last_block``: the last block's feed-forward part, only at the positions that the loss is read from."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from zoft.engines._prefix import longest_stack
from zoft.errors import UserError
from zoft.lm.logits.head import narrowed
from zoft.subspaces.base import Subspace

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def feed_forward_of(model: nn.Module, subspace: Subspace) -> nn.Module:
    """The module of the last block that works position by position: the one with several matrices outside of attention.

    Raises:
        UserError: there is none, or there are several; or the subspace looks at other positions too.
    """
    if subspace.observes_at(0) == "inputs" or getattr(subspace, "positions", "loss") != "loss":
        raise UserError(
            f"trainer.narrow_last_block=true: subspace={subspace.name()} looks at positions that the loss is not read "
            "from: leave it false"
        )
    blocks = longest_stack(model)
    children = blocks[-1].named_children() if blocks else ()
    candidates = [
        child
        for name, child in children
        if not _ATTENTION.search(name) and sum(p.dim() == 2 for p in child.parameters()) > 1
    ]
    if len(candidates) != 1:
        raise UserError(
            f"trainer.narrow_last_block=true: {type(model).__name__} has {len(candidates)} feed-forward modules in its "
            "last block where one is needed: leave it false"
        )
    return candidates[0]


def check_narrow(loss: Callable[[], Tensor]) -> None:
    """Refuse a model whose loss depends on what the feed-forward part of the last block gives at other positions.

    Args:
        loss: of one batch, computed anew by each call, in a context in which that part is narrowed.

    Raises:
        UserError: with both losses.
    """
    narrow = loss()
    with narrowed(None):
        whole = loss()
    if not torch.allclose(narrow.float(), whole.float(), rtol=1e-2 if whole.element_size() < 4 else 1e-4):
        raise UserError(
            f"trainer.narrow_last_block=true: the loss is {float(narrow):.6g} where the last block's feed-forward part "
            f"sees the positions of the loss alone, and {float(whole):.6g} where it sees all: leave it false"
        )
