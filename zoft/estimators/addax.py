"""Short rows backpropagated, long ones queried: the memory of a backward pass stays that of short rows (Addax)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from zoft.estimators._optional import NeedsBackward, check_parts
from zoft.estimators.central import Central


@dataclass
class Addax(NeedsBackward, Central):
    """Central differences for rows above ``long_tokens``, a backward pass for the others: 2 q + 3 queries a step.

    g = zo_share g_queries + (1 - zo_share) g_backward, each the gradient of its own rows' mean loss. A batch of one
    kind of rows is estimated in that one way alone. Queries are counted as 2 q + 3 a batch, whatever its mix (a
    backward pass counts as two forwards), so that a budget can be divided into steps; the loss that is logged is that
    of the short rows where there are any.

    Args:
        long_tokens: longest row that goes through the backward pass, in tokens, at least 0; longer ones are queried.
        zo_share: weight of the queries' estimate where a batch has both (the paper's alpha), in [0, 1]. The estimate
            is about sqrt(weights / q) times as long as the gradient, so it is a small one.

    References: Li et al. 2024 (Addax, arXiv 2410.06441), Algorithm 1. It draws a batch of each kind from data divided
    by length; here every batch is divided.
    """

    long_tokens: int = 128
    zo_share: float = 1e-3

    def check(self) -> None:
        """Refuse a negative length, and a share outside of [0, 1]."""
        super().check()
        self.require(self.long_tokens >= 0, "long_tokens", "at least 0")
        self.require(0 <= self.zo_share <= 1, "zo_share", "in [0, 1]")

    def check_with(self, method: Any) -> None:
        """Refuse parts that know directions only."""
        check_parts(self, method)

    @property
    def num_queries(self) -> int:
        """Two a direction; a forward, and a backward that is counted as two more."""
        # a budget is divided into steps beforehand, when the mix of a batch is not known
        return 2 * self.num_directions + 3

    @property
    def queried_lengths(self) -> tuple[int, float]:
        """Longer than ``long_tokens``."""
        return self.long_tokens + 1, math.inf

    @property
    def backpropagated_lengths(self) -> tuple[int, float]:
        """At most ``long_tokens``."""
        return 0, self.long_tokens

    def share_of_backward(self, queried: bool) -> float:
        """1 - alpha; all of it where nothing was queried."""
        # g = zo_share g_queries + (1 - zo_share) g_backward; a batch of one kind has that kind's gradient alone
        return 1.0 - self.zo_share if queried else 1.0
