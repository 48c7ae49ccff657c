"""The last layers backpropagated, those below queried: gradients where they are cheap, and no graph below them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zoft.errors import UserError
from zoft.estimators._optional import NeedsBackward, check_parts
from zoft.estimators.central import Central
from zoft.weights.tensors import layer_of


@dataclass
class Hybrid(NeedsBackward, Central):
    """Backpropagation for the last ``backprop_blocks`` layers and what is behind them, central differences below.

    A layer is what ``subspace=blocks`` calls one: all that shares the first number in its tensors' names. Behind the
    last one are the final norm and the head (as far as names and their order tell: not embeddings, so a head that is
    tied to them is queried with them). These move by their exact gradient and by it alone; the directions of the
    queries move the rest. No graph is kept below the layers, so the backward pass takes the memory of those few.
    2 q + 3 queries a step: the backward pass is counted as if it went through the whole model.

    Args:
        backprop_blocks: how many of the last layers are backpropagated, at least 1.

    References: Hi-ZFO and ElasticZO (zeroth order below, first order above); ZO-Bench (arXiv 2402.11592), hybrid
    training.
    """

    backprop_blocks: int = 1

    def check(self) -> None:
        """Refuse less than one layer."""
        super().check()
        self.require(self.backprop_blocks >= 1, "backprop_blocks", "at least 1")

    def check_with(self, method: Any) -> None:
        """Refuse parts that know directions only."""
        check_parts(self, method)

    @property
    def num_queries(self) -> int:
        """Two a direction; a forward, and a backward that is counted as two more."""
        return 2 * self.num_directions + 3

    def backprop_names(self, names: list[str]) -> frozenset[str]:
        """The last layers, and what is behind them."""
        # layers in the order of the names, which is that of the forward in the classes that transformers has
        numbered = [i for i, name in enumerate(names) if layer_of(name) is not None]
        layers = list(dict.fromkeys(layer_of(names[i]) for i in numbered))
        if not layers:
            raise UserError(
                f"estimator={self.name()} backpropagates the last numbered layers, and no trained tensor has a layer's "
                f"number in its name (they have names such as {names[0]}): use estimator=central or backprop"
            )
        # the last ones, counted among those that are trained: a frozen layer above does not count
        last = set(layers[-self.backprop_blocks :])
        above = frozenset(
            name
            for i, name in enumerate(names)
            if layer_of(name) in last or (layer_of(name) is None and _behind(name, i, numbered[0], numbered[-1]))
        )
        # nothing would be left to query
        if len(above) == len(names):
            raise UserError(
                f"{self.name()}.backprop_blocks={self.backprop_blocks} leaves nothing below to be queried, of "
                f"{len(layers)} trained layers: lower it, or use estimator=backprop"
            )
        return above


def _behind(name: str, index: int, first: int, last: int) -> bool:
    """Whether a tensor outside the layers comes after them in the forward; some classes make their final norm first."""
    if index < first:
        # in front of the numbered layers: embeddings and the like, unless the name says that it comes last
        return "final" in name or "project_out" in name
    return index > last and ("emb" not in name or "out" in name)
