"""Weights whose names match a regular expression."""

from __future__ import annotations

import re
from dataclasses import dataclass

from zoft.errors import UserError
from zoft.lm.models.trainable.base import Trainable
from zoft.utils.lazy import nn


@dataclass
class Regex(Trainable):
    r"""Weights whose names, as in ``named_parameters()``, contain a match.

    Args:
        pattern: a Python regular expression, searched anywhere in the name, e.g. ``layers\.(28|29)\..*q_proj``.
    """

    pattern: str = ""

    def check(self) -> None:
        """Refuse an empty or broken expression."""
        self.require(bool(self.pattern), "pattern", "a regular expression over parameter names")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"regex.pattern={self.pattern!r} is not a regular expression: {error}") from None

    def chosen(self, model: nn.Module) -> set[str]:
        """The matching names."""
        return {name for name, _ in model.named_parameters() if re.search(self.pattern, name)}
