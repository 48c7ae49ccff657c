"""Solved rows before a prompt, prompts without their row, and answers without a prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.task_rows import files
from zoft.component import components
from zoft.errors import UserError
from zoft.lm.data.examples import Example
from zoft.lm.data.tokens import encode
from zoft.lm.tasks.base import uncontextual, with_demonstrations


def examples(name: str, folder: Path) -> list[Example]:
    splits = components("task")[name](num_train=2, num_dev=2, **files(name, folder)).load()
    return splits.train + splits.dev


def test_demonstrations_stand_before_the_prompt_as_published(tmp_path):
    solved, other, asked, _ = examples("squad", tmp_path)
    example = with_demonstrations(asked, [solved, other])
    shown = [(one.prompt + one.options[0]).strip() for one in (solved, other)]
    assert example.prompt == "\n\n".join([*shown, asked.prompt])
    assert (example.options, example.answers, example.max_new_tokens) == (asked.options, asked.answers, 50)
    assert with_demonstrations(asked, []) is asked


def test_calibration_drops_the_row_and_keeps_the_options(tmp_path):
    example = next(e for e in examples("copa", tmp_path) if e.prompt == "She was late because")
    bare = uncontextual(example)
    assert [bare.prompt + option for option in bare.options] == [
        "because the bus had broken down.",
        "because she ate an apple.",
    ]
    assert uncontextual(with_demonstrations(example, [example])).prompt.endswith("\n\nbecause")


class NoMark:
    bos_token_id, eos_token_id = None, 9

    def __call__(self, texts):
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


def test_an_empty_prompt_gets_the_mark_that_ends_a_text():
    (row,) = encode([Example("", ("ab", "c"), 0)], NoMark(), 10)
    assert (row["sequences"], row["lengths"]) == ([[9, 97, 98], [9, 99]], [2, 1])
    NoMark.eos_token_id = None
    with pytest.raises(UserError, match=r"nothing stands before the answers \('ab', 'c'\)"):
        encode([Example("", ("ab", "c"), 0)], NoMark(), 10)
