"""wandb, offline: queries are the axis, files stay in the run's folder, two runs are two runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zoft.report import trackers

# In a process of its own: wandb keeps settings, threads and a service for the life of a process.
TWO_RUNS = """
import sys
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import WandbCallback
from zoft.report.trackers import TrackerAxisCallback, close_trackers

import wandb
for name in ("first", "second"):
    args = TrainingArguments(output_dir=name, run_name=f"the {name}", report_to=["wandb"], use_cpu=True)
    state, control = TrainerState(), TrainerControl()
    callbacks = [WandbCallback(), TrackerAxisCallback()]
    callbacks[1].on_init_end(args, state, control)
    for callback in callbacks:
        callback.on_train_begin(args, state, control, model=None)
    defined = []
    wandb.run.define_metric = lambda *a, **k: defined.append(a)
    for callback in callbacks:
        callback.on_log(args, state, control, logs={"loss": 1.0, "num_queries": 2})
    assert defined == [], "the axis is defined once a run"
    print(wandb.run.id)
    close_trackers()
    assert wandb.run is None
"""


def test_two_runs_in_one_process(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    here = str(Path(trackers.__file__).parents[2])
    environment |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": here}
    done = subprocess.run(
        [sys.executable, "-c", TWO_RUNS], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    first, second = [line for line in done.stdout.splitlines() if line.strip()][-2:]
    assert first != second
    for name, run_id in (("first", first), ("second", second)):
        (record,) = (tmp_path / name / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")
        content = record.read_bytes()
        # Both axes are in the record; the last definition for "*" is the one that counts.
        assert content.rfind(b"train/global_step", 0, content.rfind(trackers.QUERIES.encode())) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_without_wandb_nothing_is_imported_or_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    args = TrainingArguments(output_dir=str(tmp_path / "run"), report_to=[], use_cpu=True)
    callback = trackers.TrackerAxisCallback()
    callback.on_init_end(args, TrainerState(), TrainerControl())
    callback.on_train_begin(args, TrainerState(), TrainerControl())
    callback.on_log(args, TrainerState(), TrainerControl(), logs={})
    trackers.close_trackers()
    assert "wandb" not in sys.modules
    assert "WANDB_DIR" not in os.environ
    assert not list(tmp_path.iterdir())


def test_the_users_own_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    monkeypatch.setenv("WANDB_DIR", "/the/users/choice")
    args = TrainingArguments(output_dir=str(tmp_path / "run"), report_to=["wandb"], use_cpu=True)
    trackers.TrackerAxisCallback().on_init_end(args, TrainerState(), TrainerControl())
    trackers.close_trackers()
    assert os.environ["WANDB_DIR"] == "/the/users/choice"


def test_a_tracker_that_fails_is_left_out_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import TrainerCallback

    class Dead(TrainerCallback):
        asked = 0

        def on_log(self, *args: object, **kwargs: object) -> None:
            self.asked += 1
            raise ConnectionError("the server is gone\nand a long story")

    class Other(Dead):
        pass

    Dead.__module__ = "transformers.integrations.dead"
    dead, other = Dead(), Other()
    trackers.forgive_trackers([dead, other])
    for _ in range(3):
        dead.on_log(None, None, None)
    assert dead.asked == 1
    assert [record.message for record in caplog.records] == [
        "the tracker Dead is left out from here on: the server is gone"
    ]
    with pytest.raises(ConnectionError):  # a callback of the user's own is the user's business
        other.on_log(None, None, None)
