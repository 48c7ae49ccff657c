"""Options scored against a prompt without content, whose scores are subtracted."""

from __future__ import annotations

from collections.abc import Sequence

from zoft.evaluation.choices import Row, Scorer
from zoft.utils.lazy import Tensor, torch


class Calibrated:
    """Sums of log-probabilities less those behind the prompt without content, which is scored once for all its rows.

    Args:
        scores: means of log-probabilities of the options of rows.

    References: Holtzman et al. 2021 (surface-form competition), as in MeZO's published code.
    """

    def __init__(self, scores: Scorer) -> None:
        self.scores = scores
        self.known: dict[str, Tensor] = {}

    def __call__(self, rows: Sequence[Row]) -> Tensor:
        """The scores of rows, each with the row ``against`` which it is; float64 [B, O]."""
        own_sums = self._sums(rows)
        missing = {str(row["against"]["sequences"]): row["against"] for row in rows}
        missing = {key: row for key, row in missing.items() if key not in self.known}
        if missing:
            alone = len(rows) == 1
            parts = [[row] for row in missing.values()] if alone else [list(missing.values())]
            sums = [row for part in parts for row in self._sums(part)]
            self.known |= dict(zip(missing, sums, strict=True))
        domains = [self.known[str(row["against"]["sequences"])] for row in rows]
        return torch.stack([_less(one, other) for one, other in zip(own_sums, domains, strict=True)])

    def _sums(self, rows: Sequence[Row]) -> Tensor:
        means = self.scores(rows).double()
        lengths = torch.ones_like(means)
        for place, row in enumerate(rows):
            lengths[place, : len(row["lengths"])] = torch.tensor(row["lengths"], dtype=means.dtype)
        return means * lengths


def _less(sums: Tensor, domain: Tensor) -> Tensor:
    """Differences; options that the row lacks stay at -inf, in whatever width the two were padded to."""
    lacking = sums.isinf()
    domain = torch.nn.functional.pad(domain, (0, max(0, len(sums) - len(domain))))[: len(sums)]
    return torch.where(lacking, sums, sums - domain.where(~lacking, torch.zeros_like(domain)))
