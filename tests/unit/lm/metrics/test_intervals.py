"""The Wilson interval against published and exact values."""

from __future__ import annotations

import math

import pytest

from zoft.lm.metrics.intervals import wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_newcombes_table(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_the_bounds_solve_the_score_equation() -> None:
    low, high = wilson(17, 40)
    for bound in (low, high):
        assert abs(17 / 40 - bound) / math.sqrt(bound * (1 - bound) / 40) == pytest.approx(1.959963984540054)


def test_ends_and_mirror() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == 1.0
    assert wilson(5, 5)[0] == pytest.approx(1 - wilson(0, 5)[1])


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (0, -1)])
def test_impossible_counts_are_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="0 <= successes <= n"):
        wilson(successes, n)
