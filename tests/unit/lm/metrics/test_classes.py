"""Figures of every class, against scikit-learn's."""

from __future__ import annotations

import random

import pytest

from zoft.lm.metrics.classes import by_class, table


def test_figures_are_those_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    drawn = random.Random(0)
    labels = [drawn.randrange(4) for _ in range(60)]
    chosen = [label if drawn.random() < 0.6 else drawn.randrange(3) for label in labels]  # the last is rarely chosen
    report = by_class(labels, chosen, list("abcd"))
    precision, recall, f1, count = sklearn.precision_recall_fscore_support(labels, chosen, zero_division=0)
    for place, figures in enumerate(report["classes"].values()):
        assert (figures["precision"] or 0.0) == pytest.approx(precision[place])
        assert (figures["recall"], figures["f1"]) == (pytest.approx(recall[place]), pytest.approx(f1[place]))
        assert figures["num_rows"] == count[place]
    assert report["confusion"] == sklearn.confusion_matrix(labels, chosen).tolist()
    assert report["macro_f1"] == pytest.approx(f1.mean())


def test_a_class_without_rows_has_a_dash_and_no_part_in_the_mean():
    report = by_class([0, 0], [0, 0], ["one", "a very long title of a class"])
    assert report["classes"]["a very long title of a class"]["recall"] is None
    assert report["macro_f1"] == 1.0
    lines = table(report)
    assert lines[2].startswith("a very long tit~       0          -        -      -")
    assert len({len(line) for line in lines}) == 1


def test_where_columns_do_not_fit_the_commonest_mistakes_are_named():
    names = ["complaint about delivery", "other", "praise", "question", "refund request"]
    labels = [0, 0, 0, 0, 1, 2, 3, 4]
    chosen = [1, 1, 2, 4, 1, 3, 3, 4]
    lines = table(by_class(labels, chosen, names), room=80)
    assert lines[0].endswith("taken for")
    assert lines[1].endswith("other 2, praise 1, ...")
    assert lines[2].endswith("0.500")  # always right: nothing stands there
    assert max(map(len, lines)) <= 80
    assert lines != table(by_class(labels, chosen, names), room=140) == table(by_class(labels, chosen, names))
