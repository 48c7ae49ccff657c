"""pass@k: how likely one of k answers is right, from n of which some were; which are, and what rows it takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from zoft.errors import UserError
from zoft.lm.metrics.intervals import mean_of_scores

_NAME = re.compile(r"pass@([1-9]\d{0,5})")


def pass_at(n: int, c: int, k: int) -> float:
    """The chance that k answers drawn from n without putting back hold a right one: unbiased for fresh answers.

    1 - C(n - c, k) / C(n, k), as a product that does not overflow: 1 - prod_{i = n - c + 1}^{n} (1 - k / i).

    Args:
        n: answers of a prompt, n >= k.
        c: how many of them are right, 0 <= c <= n.
        k: from 1.

    Example:
        >>> [round(pass_at(5, c, k), 3) for c, k in ((2, 1), (2, 3), (3, 3))]
        [0.4, 0.9, 1.0]

    References: Chen et al. 2021 (Codex, arXiv 2107.03374), equation 1.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    if c > n - k:
        return 1.0
    none = 1.0
    for i in range(n - c + 1, n + 1):
        none *= (i - k) / i
    return 1.0 - none


def read_names(text: str) -> list[int]:
    """The ks of ``pass@1,pass@8``, each once.

    Raises:
        UserError: it is something else.
    """
    matches = [_NAME.fullmatch(name.strip()) for name in text.split(",")]
    if not all(matches):
        raise UserError(
            f"metric={text} is none that zoft eval computes beside a task's own: metric=pass@1,pass@8 (evaluate=NAME "
            "is for those of the evaluate library)"
        )
    return list(dict.fromkeys(int(one[1]) for one in matches if one))


def passes(right: Sequence[Sequence[bool]], ks: Sequence[int]) -> dict[str, float]:
    """Mean pass@k over prompts, with 95 % intervals.

    Args:
        right: of each prompt, whether each of its answers is.
        ks: at most as many as there are answers.

    Returns:
        ``pass@K``, ``pass@K_low`` and ``pass@K_high`` in [0, 1].

    Example:
        >>> passes([[True, False], [False, False]], [1, 2])["pass@2"]
        0.5
    """
    values: dict[str, float] = {}
    for k in ks:
        each = [pass_at(len(answers), sum(answers), k) for answers in right]
        low, high = mean_of_scores(each)
        values |= {f"pass@{k}": sum(each) / len(each), f"pass@{k}_low": low, f"pass@{k}_high": high}
    return values


def check_passes(form: str, objective: Any, ks: Sequence[int], least: float | None) -> None:
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


def passes_of(rows: Sequence[Mapping[str, Any]], ks: Sequence[int], least: float | None) -> dict[str, float]:
    """pass@k of what was written: right is a reward of ``least`` (1) or more, or an exact match.

    Args:
        rows: what each text of a row was worth.
        ks: of pass@k; nothing without.
        least: as for :func:`check_passes`.
    """

    def values(row: Mapping[str, Any]) -> list[float]:
        many, one = ("rewards", "reward") if "reward" in row else ("exact_matches", "exact_match")
        return list(row.get(many, [row.get(one, 0.0)]))

    enough = 1.0 if least is None else least
    return passes([[value >= enough for value in values(row)] for row in rows] if ks else [], ks)
