"""What a process finds out about packed rows does not depend on where in the run it began."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.faults.test_fault_15_guard import Dies
from tests.runs import WORDS, arguments, report
from zoft.config import compose
from zoft.run.train import run


def words(folder: Path, output_dir: str) -> list[str]:
    """A run with anchors and options of several tokens, whose rows have very different lengths."""
    import json

    given = arguments(folder, folder / output_dir, "method=mezo_svrg", "trainer.save_steps=3", "budget.queries=72")
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=30 if number % 8 == 0 else 2)) for number in range(48)]
    rows = [{"text": text, "label": ("ham", "spam")[number % 2]} for number, text in enumerate(texts)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "task.words={ham: 'no win yes', spam: 'yes no home'}"
    return [options if word.startswith("task.words") else word for word in given]


@pytest.mark.parametrize("deaths", [[1], [4], [5, 9], [7]])
def test_fault_18_anchors_are_the_same_after_any_death(deaths: list[int], tmp_path: Path):
    run(compose(words(tmp_path, "whole")))
    for step in deaths:
        with pytest.raises(InterruptedError):
            run(compose(words(tmp_path, "run")), [Dies(step)])
    run(compose(words(tmp_path, "run")))
    assert report(tmp_path / "run")["weights_sha256"] == report(tmp_path / "whole")["weights_sha256"]


def test_fault_18_every_size_is_tried_before_the_first_query(monkeypatch: Any, tmp_path: Path):
    from zoft.lm.logits import packing

    sizes: list[set[int]] = []

    class Looks(Dies):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            sizes.append(set().union(*packing._checked.values()))

    run(compose(words(tmp_path, "out")), [Looks(0)])
    assert len(sizes[0]) > 1
    assert sizes[0] == sizes[-1]
