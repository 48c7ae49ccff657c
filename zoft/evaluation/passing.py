"""pass@k in an evaluation: what it needs of rows and objective, and which texts count as right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from zoft.errors import UserError
from zoft.lm.metrics.passing import passes

if TYPE_CHECKING:
    from zoft.evaluation.scoring import Scored


def check(form: str, objective: Any, ks: Sequence[int], least: float | None) -> None:
    """Refuse pass@k of rows that are not written, or are written too seldom.

    Args:
        form: of the rows.
        objective: that evaluates them.
        ks: of pass@k.
        least: the reward from which a text is right; None for 1.
    """
    if not ks:
        if least is not None:
            raise UserError("pass_reward= is read together with metric=pass@k alone: add metric=pass@1")
        return
    most, samples = max(ks), getattr(objective, "num_samples", 1)
    if form not in ("generate", "rated"):
        raise UserError(f"metric=pass@{most} counts right texts, and the model chooses in these rows: leave it out")
    if samples < most:
        raise UserError(
            f"metric=pass@{most} needs {most} texts of each prompt or more, and objective={objective.name()} writes "
            f"{samples}: set objective.num_samples={most} and a temperature above 0 (objective.temperature=0.8)"
            + ("" if hasattr(objective, "num_samples") else ", with objective=metric")
        )
    if least is not None and objective.name() != "reward":
        raise UserError(
            f"pass_reward={least:g} is about objective=reward; with objective={objective.name()} a text is right where "
            "it matches exactly: leave it out"
        )


def of(scored: Scored, ks: Sequence[int], least: float | None) -> dict[str, float]:
    """pass@k of what was written: right is a reward of ``least`` (1) or more, or an exact match.

    Args:
        scored: texts of every row with what each was worth.
        ks: of pass@k; nothing without.
        least: as for :func:`check`.
    """

    def values(row: dict[str, Any]) -> list[float]:
        many, one = ("rewards", "reward") if "reward" in row else ("exact_matches", "exact_match")
        return list(row.get(many, [row.get(one, 0.0)]))

    enough = 1.0 if least is None else least
    rights = [[value >= enough for value in values(row)] for row in scored.predictions] if ks else []
    return passes(rights, ks)
