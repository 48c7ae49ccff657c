"""Losses that are no numbers, memory that ends, losses that jump: a cut of ``make faults``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import steps


@pytest.mark.parametrize(("where", "number"), [("clean", 0), ("all", 2)])  # more in tests/unit/trainer/test_trainer.py
def test_a_step_without_numbers_leaves_the_weights(where: str, number: int, tmp_path: Path):
    steps.bad_losses(tmp_path, where, steps.VALUES[number], (0, 1, 3)[number])


def test_they_end_the_run_where_they_stay(tmp_path: Path):
    steps.bad_to_the_end(tmp_path, steps.VALUES[2])


def test_out_of_memory_halves_the_micro_batch(tmp_path: Path):
    apart, retries = steps.out_of_memory(tmp_path, times=1)
    assert apart < 1e-5
    assert retries == 3


@pytest.mark.parametrize("guard", ["clip", "rollback"])
def test_a_loss_that_jumps(guard: str, tmp_path: Path):
    steps.guarded(tmp_path, guard)
