"""Small promises kept: where trackers write, what is missing is said, what differs is shown, names that can be read."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import warnings
from types import ModuleType
from typing import Any

import pytest

from tests.runs import arguments, model_folder, zoft_anew
from zoft.cli import main
from zoft.config.foldername import named_after, suffix
from zoft.report.trackers import close_trackers, keep_in_folder

SHORT = ("budget.queries=4", "trainer.save_strategy=no")


def test_fault_14_wandb_offline_writes_into_the_runs_folder(tmp_path):
    pytest.importorskip("wandb")
    (tmp_path / "here").mkdir()
    words = arguments(tmp_path, tmp_path / "out", *SHORT, "tracker=wandb_offline")
    done = zoft_anew("train", *words, cwd=tmp_path / "here")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "here").iterdir()) == []
    assert len(list((tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb"))) == 1


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard", "trackio", "mlflow"])
def test_fault_14_every_tracker_is_sent_into_the_runs_folder(tmp_path, monkeypatch, tracker):
    from types import SimpleNamespace

    variables = {"wandb": "WANDB_DIR", "tensorboard": "TENSORBOARD_LOGGING_DIR", "trackio": "TRACKIO_DIR"}
    variable = variables.get(tracker, "MLFLOW_TRACKING_URI")
    monkeypatch.delenv(variable, raising=False)
    args: Any = SimpleNamespace(report_to=[tracker], output_dir=str(tmp_path / "run"))
    keep_in_folder(args)
    assert str(tmp_path / "run") in os.environ[variable]
    close_trackers()
    assert variable not in os.environ
    monkeypatch.setenv(variable, "the user's own")
    keep_in_folder(args)
    close_trackers()
    assert os.environ[variable] == "the user's own"


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard", "trackio", "mlflow"])
def test_fault_14_a_tracker_without_its_package_is_a_sentence(tmp_path, monkeypatch, capsys, tracker):
    find = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name in (tracker, "tensorboardX") else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    words = arguments(tmp_path, tmp_path / "out", *SHORT, f"tracker.report_to=[{tracker}]")
    assert main(["train", *words]) == 2
    assert f"tracker={tracker} needs a package that is not there: pip install {tracker}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_fault_14_a_reward_function_needs_no_reward_column(tmp_path, monkeypatch, capsys):
    module = ModuleType("own_rewards")
    module.length = lambda prompts, generations: [float(len(text)) for text in generations]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_rewards", module)
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"prompt": f"free win {i}"}) + "\n" for i in range(16)))
    words = ["config=quickstart", f"model.name={model_folder(tmp_path / 'model')}", "task=custom", "objective=reward"]
    words += [f"task.train={tmp_path / 'own.jsonl'}", "objective.function=own_rewards:length", "method=mezo"]
    words += ["task.num_train=8", "task.num_dev=4", "task.num_test=4", "budget.queries=8", "optimizer=sgd"]
    words += [
        "estimator=central",
        "trainer.per_device_train_batch_size=2",
        "objective.max_new_tokens=4",
        f"output_dir={tmp_path / 'out'}",
    ]
    assert main(["train", *words]) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "report.json").read_text())["metric"] == "reward"


@pytest.mark.parametrize("adapter", ["lora", "prefix", "prompt"])
def test_fault_14_adapters_warn_of_nothing_that_will_go(tmp_path, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        more = [*SHORT, f"peft={adapter}", "trainable=adapter"]
        assert main(["train", *arguments(tmp_path, tmp_path / "out", *more)]) == 0
        assert main(["eval", f"run={tmp_path / 'out'}"]) == 0


def test_fault_14_diff_shows_another_learning_rate(tmp_path, capsys):
    for name, rate in (("a", "1e-2"), ("b", "2e-2"), ("c", "1e-2")):
        assert main(["train", *arguments(tmp_path, tmp_path / name, *SHORT, f"optimizer.learning_rate={rate}")]) == 0
    capsys.readouterr()
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    said = capsys.readouterr().out
    assert "settings: they differ in\n  optimizer.learning_rate: 0.01 | 0.02\n" in said
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "c")]) == 0
    assert capsys.readouterr().out.startswith("settings: the same\n")
    files = [str(next((tmp_path / name).glob("*journal*"))) for name in ("a", "c")]
    assert main(["diff", *files]) == 0
    assert "as far as a journal has them (no learning rate" in capsys.readouterr().out


def test_fault_14_a_folder_is_told_what_it_is_for(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n")
    assert main(["eval", str(tmp_path / "run")]) == 2
    assert f"write run={tmp_path / 'run'}" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "run")]) == 2
    assert f"e.g. config={tmp_path / 'run'}/config.yaml" in capsys.readouterr().err


def test_fault_14_names_of_folders_can_be_read():
    words = [
        "task.template='{text} Is this message spam? Answer:'",
        "task.words={ham: no, spam: yes}",
        "task.label=class",
    ]
    words += ["model.name=HuggingFaceTB/SmolLM2-135M-Instruct", "optimizer.learning_rate=1e-3"]
    keys = sorted(word.split("=")[0] for word in words)
    name, other = named_after(words, keys), named_after([*words[:-1], "optimizer.learning_rate=1e-4"], keys)
    assert len(name) <= 64
    assert name != other
    assert len(suffix(words)) <= 65
