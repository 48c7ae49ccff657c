"""Files of a run that are damaged, missing, cut, or would run code: noticed by name, and the run goes on without them.

The full numbers are carried out by ``make faults`` (scripts/faults.py); these are a cut of them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults import attacks, damage
from zoft.errors import DiskFullError, UserError, os_error_of
from zoft.estimators.central import Central
from zoft.journal import snapshot


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> damage.Damaged:
    return damage.Damaged(tmp_path_factory.mktemp("damaged") / "run")


def test_flipped_bits(damaged: damage.Damaged):
    damage.flip_bits(damaged, 40, resumes=1)


def test_cut_files(damaged: damage.Damaged):
    damage.truncate(damaged, 20, resumes=0)


def test_missing_files(damaged: damage.Damaged):
    assert damage.remove(damaged, resumes=0) >= 8


def test_a_checkpoint_asked_for_by_name_is_refused_by_the_file(damaged: damage.Damaged):
    file = damaged.newest / "model.safetensors"
    data = file.read_bytes()
    file.unlink()
    with pytest.raises(UserError, match=r"model.safetensors is missing"):
        damage.trainer(damaged.folder).train(resume_from_checkpoint=str(damaged.newest))
    file.write_bytes(data)


def test_a_journal_cut_anywhere_in_its_last_step(tmp_path: Path):
    cuts, lost = damage.cut_journal(tmp_path, every=200)
    assert cuts > 60
    assert lost == 1


def test_death_at_every_call_of_a_save(tmp_path: Path):
    assert damage.die_at_every_point(tmp_path) > 40


def _save(folder: Path, error: Exception) -> None:
    with snapshot.staged(folder / "checkpoint-1", {"run": "r", "step": 1}) as staged:
        (staged / "a").write_text("second")
        (staged / snapshot.OPTIMIZER).touch()
        raise error


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path):
    with snapshot.staged(tmp_path / "checkpoint-1", {"run": "r", "step": 1}) as staged:
        (staged / "a").write_text("first")
        (staged / snapshot.OPTIMIZER).touch()
    for full in (OSError(28, "No space left on device"), RuntimeError("I/O error: No space left (os error 28)")):
        with pytest.raises(DiskFullError, match=r"6 bytes are wanted, [\d,]+ are free"):
            _save(tmp_path, full)
        assert (snapshot.newest(tmp_path, "r") / "a").read_text() == "first"  # type: ignore[operator]
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert os_error_of(ValueError("I/O error")) is None


CHANGES = {
    "seed": ({"seed": 1}, "seed: 0 there, 1 now"),
    "data": ({"rows": 20}, "data: '24 rows"),
    "batch": ({"per_device_train_batch_size": 2}, "batch: 4 there, 2 now"),
    "eps": ({"estimator": Central(eps=2e-3)}, "estimator.eps: 0.001 there, 0.002 now"),
    "optimizer": ({"optimizer": "adam"}, "optimizer: 'sgd' there, 'adam' now"),
    "model": ({"model_seed": 1}, "does not belong to this model"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_run_is_refused_with_what_differs(what: str, damaged: damage.Damaged, tmp_path: Path):
    given, message = CHANGES[what]
    shutil.copytree(damaged.folder, tmp_path / "run")
    if what == "model":  # with a snapshot the weights are read from it; a journal alone needs its own base
        for checkpoint in snapshot.checkpoints(tmp_path / "run"):
            shutil.rmtree(checkpoint)
    with pytest.raises(UserError) as refused:
        damage.trainer(tmp_path / "run", **given).train(resume_from_checkpoint=True)
    assert message in str(refused.value)


def test_budget_logging_and_learning_rate_may_change(damaged: damage.Damaged, tmp_path: Path):
    shutil.copytree(damaged.folder, tmp_path / "run")
    again = damage.trainer(tmp_path / "run", max_steps=16, logging_steps=2, learning_rate=5e-4, save_steps=5)
    again.train(resume_from_checkpoint=True)
    rates = [record.lr for record in damage.journal.read(tmp_path / "run" / damage.journal.NAME).records]
    assert rates == [1e-3] * 12 + [5e-4] * 4
    assert (tmp_path / "run" / "checkpoint-15").is_dir()
    assert [line["step"] for line in again.state.log_history if "loss" in line][-2:] == [14, 16]


def test_pickles_are_never_carried_out(tmp_path: Path):
    planted, carried_out = attacks.pickles(tmp_path)
    assert planted > 30
    assert carried_out == 0


def test_code_beside_a_model_is_not_run_and_not_asked_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert attacks.remote_code(tmp_path) == 0
    assert "Do you wish to run" not in capsys.readouterr().out


def test_headers_that_claim_too_much_are_refused(tmp_path: Path):
    attacks.header_bombs(tmp_path)
