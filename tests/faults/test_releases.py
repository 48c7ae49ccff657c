"""What earlier releases have written is read, or refused in a sentence: tests/assets/run_format_*."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults import damage
from zoft.errors import UserError
from zoft.journal import snapshot

ASSETS = Path(__file__).resolve().parents[1] / "assets"


@pytest.mark.parametrize("asset", sorted(path.name for path in ASSETS.glob("run_format_*")))
def test_a_run_of_an_earlier_format_goes_on(asset: str, tmp_path: Path):
    """Its journal has two steps more than its snapshot; six steps and their hashes, then two of our own."""
    shutil.copytree(ASSETS / asset, tmp_path / "run")
    one = damage.trainer(tmp_path / "run", max_steps=8, save_steps=4, journal_hash_steps=2)
    one.train(resume_from_checkpoint=True)
    contents = damage.journal.read(tmp_path / "run" / damage.journal.NAME)
    assert contents.end == 8
    assert sorted(contents.digests) == [2, 4, 6, 8]


def test_the_trainers_own_checkpoint_is_refused_in_a_sentence(tmp_path: Path):
    from transformers import Trainer, TrainingArguments

    trainer = damage.trainer(tmp_path / "zoft")
    args = TrainingArguments(
        output_dir=str(tmp_path / "theirs"), max_steps=1, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    Trainer(trainer.model, args, train_dataset=trainer.train_dataset).train()
    with pytest.raises(
        UserError, match=r"there is nothing to resume in .*: no journal and no whole checkpoint of zoft"
    ):
        damage.trainer(tmp_path / "theirs").train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match=r"has no manifest.json: it was not written by this zoft"):
        damage.trainer(tmp_path / "theirs").train(resume_from_checkpoint=str(tmp_path / "theirs" / "checkpoint-1"))


def test_another_format_of_snapshot_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(snapshot, "FORMAT", 2)
    with snapshot.staged(tmp_path / "checkpoint-1", {"run": "r"}) as staged:
        (staged / "a").write_text("x")
    monkeypatch.undo()
    with pytest.raises(UserError, match="has a format that this zoft does not read"):
        snapshot.verify(tmp_path / "checkpoint-1")
