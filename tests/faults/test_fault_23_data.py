"""Data that was edited between a kill and a resume is noticed, whichever row and whichever split it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults import damage
from tests.runs import arguments, zoft
from zoft.errors import UserError
from zoft.journal.fingerprint import rows_digest


def _stopped(folder: Path, **given: Any) -> None:
    """A run that has a checkpoint at step 4, and goes on to 12."""
    damage.trainer(folder, max_steps=4, rows=100, **given).train()


@pytest.mark.parametrize("row", [0, 1, 41, 99])
def test_fault_23_one_label_of_any_row(row: int, tmp_path: Path):
    _stopped(tmp_path / "run")
    again = damage.trainer(tmp_path / "run", rows=100)
    again.train_dataset[row]["labels"][3] += 1
    with pytest.raises(UserError, match=r"differs in\n  data: '100 rows, .* there, '100 rows, .* now"):
        again.train(resume_from_checkpoint=True)


def test_fault_23_a_row_of_the_evaluation(tmp_path: Path):
    data = damage.trainer(tmp_path / "x", rows=50).train_dataset
    _stopped(tmp_path / "run", eval_dataset=data)
    changed = [dict(row) for row in data]
    changed[33]["labels"] = changed[33]["labels"] + 1
    with pytest.raises(UserError, match="eval_data"):
        damage.trainer(tmp_path / "run", rows=100, eval_dataset=changed).train(resume_from_checkpoint=True)
    damage.trainer(tmp_path / "run", rows=100, max_steps=5).train(resume_from_checkpoint=True)  # none is no other


def test_fault_23_without_a_journal_the_checkpoint_knows(tmp_path: Path):
    _stopped(tmp_path / "run", journal=False)
    again = damage.trainer(tmp_path / "run", rows=100, journal=False)
    again.train_dataset[77]["labels"][3] += 1
    with pytest.raises(UserError, match="data: '100 rows"):
        again.train(resume_from_checkpoint=True)
    damage.trainer(tmp_path / "run", rows=100, journal=False).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("number", [5, 27, 40])
def test_fault_23_a_line_of_the_users_file(number: int, tmp_path: Path):
    """Lines of training, of dev and of test alike: 24, 8 and 16 of the file's 48."""
    first = zoft("train", *arguments(tmp_path, "out", "budget.queries=8"), cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    lines = (tmp_path / "data.jsonl").read_text().splitlines()
    row = json.loads(lines[number])
    row["label"] = "spam" if row["label"] == "ham" else "ham"
    lines[number] = json.dumps(row)
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    second = zoft("train", *arguments(tmp_path, "out"), cwd=tmp_path)
    assert second.returncode == 2
    assert re.search(r"(data|eval_data|test_data): '\d+ rows", second.stderr), second.stderr


def test_fault_23_one_number_of_a_frozen_weight(tmp_path: Path):
    def new_trainer() -> Any:
        one = damage.trainer(tmp_path / "run")
        for name, parameter in one.model.named_parameters():
            parameter.requires_grad_("norm" in name)
        return one

    first = new_trainer()
    first.args.max_steps = 4
    first.train()
    again = new_trainer()
    again.model.lm_head.weight.data[3, 1] += 1e-3
    with pytest.raises(UserError, match="model: LlamaForCausalLM there"):
        again.train(resume_from_checkpoint=True)
    new_trainer().train(resume_from_checkpoint=True)


def test_fault_23_values_that_differ_have_other_digests():
    rows: list[Any] = [
        {"a": 1}, {"a": 1.0}, {"a": "1"}, {"a": [1]}, {"a": [[1]]}, {"a": [1, None]}, {"b": 1}, {"a": True},
        {"a": torch.tensor([1])}, {"a": torch.tensor([1], dtype=torch.int32)}, {"a": torch.tensor([[1]])}, "a", ["a"],
        {"a": "x", "b": "y"}, {"a": "xb", "b": "y"}, {"a": [2**70]}, {"a": "\ud800"},
    ]  # fmt: skip
    digests = [rows_digest([row]) for row in rows]
    assert len(set(digests)) == len(rows)
    assert rows_digest([{"a": object()}]) == rows_digest([{"a": object()}])  # an address says nothing
    assert rows_digest(iter(())) is None
    assert rows_digest({"x": [1], "y": [2]}) != rows_digest({"x": [1], "y": [3]})
