"""Damage done to a run's folder, and what is made of it: every file, every kind."""

from __future__ import annotations

import json
import random
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import models
from zoft import ZOConfig, ZOTrainer
from zoft.errors import UserError
from zoft.journal import file as journal
from zoft.journal import snapshot
from zoft.weights.tensors import Weights

STEPS, EVERY = 12, 4
PARTS = ("estimator", "optimizer", "engine", "callbacks", "eval_dataset", "compute_metrics")


def trainer(
    folder: Path, cls: type[ZOTrainer] = ZOTrainer, *, seed: int = 0, rows: int = 24, **given: Any
) -> ZOTrainer:
    """A run of twelve steps with a snapshot every fourth."""
    model = models.tiny_llama(given.pop("model_seed", 0)).to(getattr(torch, given.pop("dtype", "float32")))
    batch = models.batch_for(model, rows=rows, length=9)
    data = [{name: value[i] for name, value in batch.items()} for i in range(rows)]
    parts = {part: given.pop(part) for part in PARTS if part in given}
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": EVERY,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 100,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": seed,
    }
    return cls(model, ZOConfig(**settings | given), train_dataset=data, **parts)


def digest(one: ZOTrainer) -> str:
    """The hash of its weights."""
    return str(Weights(one.model).digest())


class Damaged:
    """A run that has ended, its newest snapshot, and what is to come of it whatever is done to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        one = trainer(folder)
        one.train()
        self.expected = digest(one)
        self.newest, self.before = (folder / f"checkpoint-{step}" for step in (STEPS, STEPS - EVERY))
        self.files = sorted(path for path in self.newest.rglob("*") if path.is_file())
        self.run = str(journal.read(folder / journal.NAME).header["run"])

    def is_noticed(self, file: Path) -> str:
        """The snapshot is refused by the name of the file, and the one before is taken; says how it was refused."""
        with pytest.raises(UserError, match=re.escape(file.name)) as refused:
            snapshot.verify(self.newest, self.run)
        assert snapshot.newest(self.folder, self.run) == self.before
        return str(refused.value)

    def goes_on(self) -> None:
        """The run resumes from what is left, and ends with the same weights."""
        copy = self.folder.with_name("copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder, copy)
        again = trainer(copy)
        again.train(resume_from_checkpoint=True)
        assert digest(again) == self.expected
        shutil.rmtree(copy)


def flip_bits(damaged: Damaged, count: int, resumes: int, seed: int = 0) -> int:
    """So many single bits, each in a file drawn at random; how many were noticed."""
    generator = random.Random(seed)
    for number in range(count):
        file = generator.choice(damaged.files)
        data = file.read_bytes()
        flipped = bytearray(data)
        flipped[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        file.write_bytes(flipped)
        damaged.is_noticed(file)
        if number < resumes:
            damaged.goes_on()
        file.write_bytes(data)
    return count


def truncate(damaged: Damaged, count: int, resumes: int, seed: int = 0) -> int:
    """So many files cut at a random byte; how many were noticed."""
    generator = random.Random(seed)
    for number in range(count):
        file = generator.choice(damaged.files)
        data = file.read_bytes()
        file.write_bytes(data[: generator.randrange(len(data))])
        damaged.is_noticed(file)
        if number < resumes:
            damaged.goes_on()
        file.write_bytes(data)
    return count


def remove(damaged: Damaged, resumes: int) -> int:
    """Each file missing; how many were noticed."""
    for number, file in enumerate(damaged.files):
        data = file.read_bytes()
        file.unlink()
        assert "missing" in damaged.is_noticed(file) or file.name == snapshot.MANIFEST
        if number < resumes:
            damaged.goes_on()
        file.write_bytes(data)
    return len(damaged.files)


def cut_journal(folder: Path, every: int) -> tuple[int, int]:
    """A journal without its last bytes, at every (``every``-th) byte of its last record: (cuts, most steps lost)."""

    class Stop(Exception):
        pass

    class Stopped(ZOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if self.progress.steps == STEPS - 1:
                raise Stop
            return super().compute_loss(*args, **kwargs)

    whole = trainer(folder / "whole")
    whole.train()
    one = trainer(folder / "cut", Stopped)
    with suppress(Stop):
        one.train()
    path = folder / "cut" / journal.NAME
    data, known, lost = path.read_bytes(), journal.read(path).end, 0
    last = next(n for n in range(len(data) - 1, 0, -1) if _steps(path, data[:n]) < known - 1)
    for number, size in enumerate(range(last + 1, len(data))):
        lost = max(lost, known - _steps(path, data[:size]))
        if number % every == 0:
            copy = folder / "copy"
            shutil.copytree(folder / "cut", copy)
            (copy / journal.NAME).write_bytes(data[:size])
            again = trainer(copy)
            again.train(resume_from_checkpoint=True)
            assert digest(again) == digest(whole)
            shutil.rmtree(copy)
    return len(data) - last - 1, lost


def _steps(path: Path, data: bytes) -> int:
    beside = path.with_name("beside.bin")
    beside.write_bytes(data)
    end = journal.read(beside).end
    beside.unlink()
    return end


def die_at_every_point(folder: Path) -> int:
    """A snapshot taken anew over an older one, dying at each call it makes of the disk: one of both is always whole.

    As :func:`tests.faults.injected.die_in_save` does it to processes; here the process lives on, and what it would
    still do is not done.
    """
    import os

    class Dead(BaseException):
        pass

    state = {"points": 0, "at": -1}
    calls = {(os, name): getattr(os, name) for name in ("fsync", "rename", "mkdir", "rmdir", "unlink", "open")}
    calls[shutil, "rmtree"] = shutil.rmtree

    def point() -> None:
        if state["points"] >= state["at"] >= 0:
            raise Dead
        state["points"] += 1

    def around(call: Any) -> Any:
        def surrounded(*args: Any, **kwargs: Any) -> Any:
            point()
            done = call(*args, **kwargs)
            point()
            return done

        return surrounded

    def save(text: str) -> None:
        with snapshot.staged(target, {"run": "r", "step": 4}) as staged:
            (staged / "a").write_text(text)
            (staged / snapshot.OPTIMIZER).touch()
            (staged / "inside").mkdir()
            (staged / "inside" / "b").write_text(text)

    target = folder / "checkpoint-4"
    save("first")
    for at in range(1000):
        state.update(points=0, at=at)
        for (module, name), call in calls.items():
            setattr(module, name, around(call))
        died = False
        try:
            save("second")
        except Dead:
            died = True
        finally:
            for (module, name), call in calls.items():
                setattr(module, name, call)
        snapshot.clear_unfinished(folder)
        assert snapshot.newest(folder, "r") == target, f"nothing whole after death at point {at}"
        assert [path.name for path in folder.iterdir()] == ["checkpoint-4"]
        texts = {(target / name).read_text() for name in ("a", "inside/b")}
        assert texts in ({"first"}, {"second"})
        if not died:
            return at
        shutil.rmtree(target)
        save("first")
    raise AssertionError("a save does not end")


def forge_manifest(folder: Path) -> None:
    """Let the manifest of a snapshot say what is in it now, as somebody would who has put a file there."""
    path = folder / snapshot.MANIFEST
    said = json.loads(path.read_text().split("\n", 1)[1])
    path.unlink()
    snapshot._write_manifest(folder, {key: value for key, value in said.items() if key not in ("files", "format")})


def weights_are_finite(one: ZOTrainer) -> bool:
    """Whether all weights are numbers."""
    return all(bool(torch.isfinite(p).all()) for p in one.model.parameters())
