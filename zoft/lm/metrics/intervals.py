"""How sure a measured proportion or mean is: 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

_Z_95 = 1.959963984540054  # the normal distribution's 97.5 % quantile: two sides of 2.5 % each


def wilson(successes: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion.

    (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n),  p = successes/n.  Unlike p -+ 1.96 sqrt(p (1-p)/n)
    it stays inside [0, 1], is never of width zero, and holds its coverage near 0 and 1, where accuracies live.

    Args:
        successes: how many of the rows were right, 0 <= successes <= n.
        n: how many rows, n >= 0.

    Returns:
        (low, high), fractions in [0, 1]; (0, 1), which says nothing, when there are no rows.

    Raises:
        ValueError: n is negative, or successes lies outside [0, n].

    Example:
        >>> low, high = wilson(91, 100)
        >>> f"{low:.4f} {high:.4f}"
        '0.8377 0.9519'

    References: Wilson 1927, Probable inference, the law of succession, and statistical inference, JASA 22.
    """
    if n < 0 or not 0 <= successes <= n:
        raise ValueError(f"wilson needs 0 <= successes <= n, got successes={successes}, n={n}")
    if n == 0:
        return 0.0, 1.0
    # At p = 0 and p = 1 the bound is exactly 0 or 1; rounding would leave it 1e-17 off or outside.
    low, high = _wilson(successes / n, n)
    return 0.0 if successes == 0 else low, 1.0 if successes == n else high


def _wilson(p: float, n: float) -> tuple[float, float]:
    z = _Z_95
    center = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def mean_of_scores(scores: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of scores that lie in [0, 1] (F1, exact match): Wilson's, for as many sure answers.

    The variance s^2 of n scores with mean m is that of n' = n m (1 - m) / s^2 >= n answers that are right or wrong.
    Where all are right or wrong this is :func:`wilson`.

    Returns:
        (low, high), fractions in [0, 1].

    Example:
        >>> mean_of_scores([1.0, 0.0, 1.0, 1.0]) == wilson(3, 4)
        True
        >>> low, high = mean_of_scores([0.5, 0.6, 0.4, 0.5])
        >>> f"{low:.2f} {high:.2f}"
        '0.43 0.57'
    """
    n = len(scores)
    if n == 0:
        return wilson(0, 0)
    mean = math.fsum(scores) / n
    variance = math.fsum((score - mean) ** 2 for score in scores) / n
    effective = mean * (1 - mean) / variance if variance > 0 else 1.0
    if (
        math.isclose(effective, 1.0) or effective < 1
    ):  # all right or wrong, up to rounding; or all alike, which says no more
        return wilson(min(n, mean * n), n)
    return _wilson(mean, n * effective)


def mean_of_numbers(numbers: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of any numbers (rewards): mean -+ 1.96 standard errors; infinite for one number.

    Example:
        >>> mean_of_numbers([1.0])
        (-inf, inf)
    """
    return _around_mean(numbers, _Z_95)


def _around_mean(numbers: Sequence[float], quantile: float) -> tuple[float, float]:
    n = len(numbers)
    if n < 2:
        return -math.inf, math.inf
    mean = math.fsum(numbers) / n
    half = quantile * math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / (n - 1) / n)
    return mean - half, mean + half


_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""Student's t distribution, 97.5 % quantiles for 1 to 30 degrees of freedom."""


def mean_of_seeds(numbers: Sequence[float], metric: str = "") -> tuple[float, float]:
    """The 95 % interval of the mean over a few seeds: mean -+ t s / sqrt(n), with Student's t; infinite for one number.

    Returns:
        (low, high). Of three seeds it is 2.5 sample standard deviations to each side: three seeds say little. Where
        the metric is an accuracy, F1 or exact match it ends at 0 and 1, as they do.

    Example:
        >>> low, high = mean_of_seeds([0.80, 0.82, 0.84])
        >>> f"{low:.2f} {high:.2f}"
        '0.77 0.87'

    References: Student 1908, The probable error of a mean, Biometrika 6.
    """
    degrees = len(numbers) - 1
    low, high = _around_mean(numbers, _T_975[degrees - 1] if 1 <= degrees <= len(_T_975) else _Z_95)
    return (max(0.0, low), min(1.0, high)) if metric in ("accuracy", "f1", "exact_match") else (low, high)
