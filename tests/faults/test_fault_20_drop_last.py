"""What a setting says of training rows is about training rows alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import damage
from tests.runs import arguments, report
from zoft.config import compose
from zoft.errors import UserError
from zoft.run.train import run


def test_fault_20_every_held_out_row_counts(tmp_path: Path):
    """Sixteen rows in batches of ten, and in one of twenty."""
    plain = run(compose(arguments(tmp_path, tmp_path / "plain")))
    for size in (10, 20):
        more = ["trainer.dataloader_drop_last=true", f"trainer.per_device_eval_batch_size={size}"]
        facts = run(compose(arguments(tmp_path, tmp_path / f"out{size}", *more)))
        assert facts["zero_shot"] == plain["zero_shot"]
        assert facts["final"] == plain["final"]
        assert report(tmp_path / f"out{size}")["num_eval_rows"] == 16


def test_fault_20_training_rows_that_fill_no_batch(tmp_path: Path):
    one = damage.trainer(tmp_path / "run", rows=3, dataloader_drop_last=True)
    with pytest.raises(UserError, match="leaves nothing of 3 training rows"):
        one.train()
    assert one.evaluate(one.train_dataset)["eval_loss"] > 0
