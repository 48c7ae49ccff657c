"""Several options behind one shared context in one row: the tokens that sequences have in common are computed once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zoft.lm.data.rows import padded
from zoft.utils.lazy import torch

WORTH = 0.75
"""Rows are packed where that leaves at most this share of the cells that separate rows fill."""

MAX_MASK = 2**26
"""Cells of an attention mask [E, L, L], 256 MiB of float32; what would be more stays in separate rows."""


@dataclass
class _Tree:
    """One example: the beginning that its sequences share, and what each has behind it."""

    tokens: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)  # 0 for the context, k for what belongs to option k alone
    positions: list[int] = field(default_factory=list)  # each option goes on where the context ends
    scored: list[int] = field(default_factory=list)  # where each token of each option is predicted

    @property
    def num_branches(self) -> int:
        return len({segment for segment in self.segments if segment})


def pack(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any] | None:
    """The sequences of each example in one left-padded row: context, what option 1 adds, what option 2 adds, ...

    The last token of a sequence predicts nothing and is left out, so options of one token add nothing at all.

    Args:
        rows: examples as :func:`zoft.lm.data.tokens.encode` makes them, E of them.
        pad_token_id: fills the left.

    Returns:
        None where it does not save much, else ``input_ids``, ``attention_mask`` and ``position_ids`` [E, L]; ``row``
        and ``column`` [N], where each option token is predicted, in the order of examples, options and tokens (columns
        count from the right end: -1 is the last); and ``segments`` [E, L], -1 at padding, 0 in the context, k in what
        option k adds, where some row has two options that must not see each other.

    Example:
        >>> rows = [{"sequences": [[5, 6, 7, 8], [5, 6, 9, 3, 2]], "lengths": [2, 3]}]
        >>> packed = pack(rows * 2, 0)
        >>> packed["input_ids"][0].tolist(), packed["segments"][0].tolist(), packed["position_ids"][0].tolist()
        ([5, 6, 7, 9, 3], [0, 0, 1, 2, 2], [0, 1, 2, 2, 3])
        >>> packed["column"][:5].tolist()
        [-4, -3, -4, -2, -1]
    """
    trees = [_tree(row["sequences"], row["lengths"]) for row in rows]
    sequences = [sequence for row in rows for sequence in row["sequences"]]
    longest = max(len(tree.tokens) for tree in trees)
    branching = any(tree.num_branches > 1 for tree in trees)
    # cells of packed rows against cells of separate ones
    if len(trees) * longest > WORTH * len(sequences) * max(map(len, sequences)):
        return None
    # attention masks of trees are [E, L, L]: they, and not the tokens, would take the memory
    if branching and len(trees) * longest**2 > MAX_MASK:
        return None

    packed = {
        "input_ids": padded([tree.tokens for tree in trees], pad_token_id),
        "attention_mask": padded([[1] * len(tree.tokens) for tree in trees], 0),
        "position_ids": padded([tree.positions for tree in trees], 0),
        "row": torch.tensor([row for row, tree in enumerate(trees) for _ in tree.scored]),
        "column": torch.tensor([place - len(tree.tokens) for tree in trees for place in tree.scored]),
    }
    if branching:
        packed["segments"] = padded([tree.segments for tree in trees], -1)
    return packed


def _tree(sequences: list[list[int]], lengths: list[int]) -> _Tree:
    # the last token of a sequence predicts nothing
    fed = [sequence[:-1] for sequence in sequences]
    shared = num_shared(fed)
    tree = _Tree(fed[0][:shared], [0] * shared, list(range(shared)))
    for option, (ids, length) in enumerate(zip(fed, lengths, strict=True), start=1):
        begins = len(tree.tokens)
        tree.tokens += ids[shared:]
        tree.segments += [option] * len(ids[shared:])
        # an option goes on where the context ends, whatever stands between them in the row
        tree.positions += range(shared, len(ids))
        # the places that predict its tokens: one before each
        scored = range(len(ids) - length, len(ids))
        tree.scored += [place if place < shared else begins + place - shared for place in scored]
    return tree


def num_shared(sequences: Sequence[list[int]]) -> int:
    """How many first tokens all of them share."""
    places = enumerate(zip(*sequences, strict=False))  # up to where the shortest ends
    return next((place for place, tokens in places if len(set(tokens)) > 1), min(map(len, sequences)))


def one_of_each_size(rows: Iterable[Any]) -> list[Any]:
    """The first row of every size that packed rows have, in powers of two; rows without options have none.

    Whether a model can be served packed rows is found out size by size (:mod:`zoft.lm.logits.packing`).

    Args:
        rows: of a data set.

    Example:
        >>> row = {"sequences": [[5, 6, 7, 8], [5, 6, 9, 3, 2]], "lengths": [2, 3]}
        >>> len(one_of_each_size([row, row]))
        1
    """
    rows_by_size: dict[int, Any] = {}
    for row in rows:
        if not isinstance(row, Mapping) or "sequences" not in row:
            break
        tree = _tree(row["sequences"], row["lengths"])
        if tree.num_branches > 1:
            rows_by_size.setdefault(len(tree.tokens).bit_length(), row)
    return list(rows_by_size.values())
