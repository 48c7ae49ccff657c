"""The house does not get harder to find the way in: what scripts/house.py counts stays within its limits."""

from __future__ import annotations

import pytest

from scripts import house

STATIC = [figure for figure in house.FIGURES if figure.limit is not None]


@pytest.mark.parametrize("figure", STATIC, ids=lambda figure: figure.name)
def test_a_figure_is_no_worse_than_its_limit(figure):
    assert figure.is_within(figure.limit), f"{figure.value}, and the limit is {figure.limit}: {figure.measure()}"


def test_circles_are_found():
    assert house.circles({"a": "b", "b": "c", "c": "", "d": "a"}) == []
    assert house.circles({"a": "b", "b": "c", "c": "b", "d": "ae", "e": "d"}) == [["b", "c"], ["d", "e"]]


def test_comments_are_counted_but_no_rulers_and_no_marks():
    text = "# why\nx = 1  # [Q, B]\ny = '# no'\n# ---- part ----\nz = 2  # noqa: E501\n"
    assert list(house._comment_lines(text)) == [1, 2]
