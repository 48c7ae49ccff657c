"""How sure a measured proportion is: the Wilson score interval."""

from __future__ import annotations

import math

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
    p, z = successes / n, _Z_95
    center = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At p = 0 and p = 1 the bound is exactly 0 or 1; rounding would leave it 1e-17 off or outside.
    low = 0.0 if successes == 0 else max(0.0, (center - half) / scale)
    high = 1.0 if successes == n else min(1.0, (center + half) / scale)
    return low, high
