"""A run from its config to its report: what the folder holds, and that nothing is ever overwritten or half-written."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.runs import arguments, report
from zoft.config import compose
from zoft.errors import NonFiniteLossError, UserError
from zoft.journal.file import read
from zoft.run.train import run
from zoft.trainer.forward import QueryForward
from zoft.trainer.trainer import ZOTrainer
from zoft.weights.tensors import Weights

FACTS = """
run_name model task device dtype seed zero_shot final zero_shot_interval final_interval num_eval_rows num_queries
budget_queries num_steps num_tokens num_skipped_steps seconds seconds_forward seconds_other peak_memory_mb
inference_peak_mb backprop_estimate_mb subspace law estimator num_directions eps weighting optimizer learning_rate
lr_scheduler_type batch_size num_train_rows objective peft trainable engine data
num_trainable num_params weights_sha256 versions command metric difference_points
"""


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() + str(path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def go(folder: Path, name: str, *more: str) -> dict[str, Any]:
    return run(compose(arguments(folder, folder / name, *more)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("finished")
    return folder, go(folder, "out")


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the next run be interrupted in its n-th step."""

    def at(step: int) -> None:
        original = ZOTrainer.training_step

        def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.progress.steps == step - 1:
                os.kill(os.getpid(), signal.SIGINT)
                monkeypatch.setattr(ZOTrainer, "training_step", original)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(ZOTrainer, "training_step", training_step)

    return at


def test_the_folder_holds_everything(finished: tuple[Path, dict[str, Any]]):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, facts = finished
    out = folder / "out"
    names = {path.name for path in out.iterdir()}
    expected = {"config.yaml", "metrics.csv", "metrics.jsonl", "curve.png", "model", "report.md", "report.json"}
    expected.add("journal.bin")
    assert expected <= names
    assert {name for name in names - expected if not name.startswith("checkpoint-")} == {
        *("zero_shot.json", "final.json", "zero_shot_rows.json", "final_rows.json")
    }
    saved_report = report(out)
    assert set(saved_report) >= set(FACTS.split())
    assert saved_report["weights_sha256"] == facts["weights_sha256"]
    counts = ("num_queries", "budget_queries", "num_steps", "num_eval_rows")
    assert [saved_report[name] for name in counts] == [24, 24, 12, 16]
    loaded = AutoModelForCausalLM.from_pretrained(out / "model")
    assert Weights(loaded).digest() == facts["weights_sha256"]
    assert (out / "model" / "model.safetensors").is_file()
    assert len(AutoTokenizer.from_pretrained(out / "model")("free prize")["input_ids"]) == 2
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "report.md").read_text()
    for word in ("zero-shot", "final", "24 of 24", "wall time", "peak memory", "AdamW", facts["weights_sha256"]):
        assert word in text
    assert "curve.png" in text


def test_the_metrics_have_a_row_a_log_step(finished: tuple[Path, dict[str, Any]]):
    folder, _ = finished
    with (folder / "out" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8, 10, 12]
    assert [int(row["queries"]) for row in rows] == [4, 8, 12, 16, 20, 24]
    for row in rows:
        for key in (
            "loss",
            "projected_grad",
            "learning_rate",
            "eps",
            "seconds_forward",
            "seconds_other",
            "peak_memory_mb",
        ):
            assert math.isfinite(float(row[key])), key
    assert [bool(row["eval_accuracy"]) for row in rows] == [False, True] * 3
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["queries"] for line in lines] == [4, 8, 12, 16, 20, 24]
    assert [line["loss"] for line in lines] == [float(row["loss"]) for row in rows]


def test_the_resolved_config_is_the_run(finished: tuple[Path, dict[str, Any]], tmp_path: Path):
    folder, facts = finished
    again = run(compose([f"config={folder / 'out' / 'config.yaml'}", f"output_dir={tmp_path / 'again'}"]))
    assert again["weights_sha256"] == facts["weights_sha256"]
    assert again["final"] == facts["final"]


def test_a_finished_run_is_shown_and_left_alone(
    finished: tuple[Path, dict[str, Any]], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    folder, facts = finished
    before = contents(folder / "out")
    monkeypatch.setattr(ZOTrainer, "train", None)
    shown = go(folder, "out")
    assert shown["weights_sha256"] == facts["weights_sha256"]
    assert "holds this run, finished" in "".join(capfd.readouterr())
    assert contents(folder / "out") == before


@pytest.mark.parametrize("change", ["seed=1", "estimator.eps=1e-2", "task.max_length=20"])
def test_another_run_is_refused(change: str, finished: tuple[Path, dict[str, Any]]):
    folder, _ = finished
    before = contents(folder / "out")
    with pytest.raises(UserError) as caught:
        go(folder, "out", change)
    key, _, value = change.rpartition(".")[2].partition("=")
    message = str(caught.value)
    assert "holds another run" in message
    assert f"+{key}: " in message.replace("+  ", "+")
    assert float(message.replace("+  ", "+").split(f"+{key}: ")[1].split("\n")[0]) == float(value)
    assert contents(folder / "out") == before


def test_a_finished_run_is_not_shown_for_another_learning_rate(finished: tuple[Path, dict[str, Any]]):
    with pytest.raises(UserError, match=r"finished with other settings or rows:(.|\n)*larger budget\.queries"):
        go(finished[0], "out", "optimizer.learning_rate=1e-4")


@pytest.mark.parametrize("change", ["trainer.logging_steps=3", "budget.queries=20"])
def test_what_may_change_does_not_make_another_run(
    change: str, finished: tuple[Path, dict[str, Any]], capfd: pytest.CaptureFixture[str]
):
    folder, facts = finished
    assert go(folder, "out", change)["weights_sha256"] == facts["weights_sha256"]
    assert "holds this run, finished" in "".join(capfd.readouterr())


def test_a_finished_run_with_a_larger_budget_goes_on(finished: tuple[Path, dict[str, Any]], tmp_path: Path):
    folder, facts = finished
    shutil.copytree(folder / "out", tmp_path / "longer")
    longer_facts = go(folder, str(tmp_path / "longer"), "budget.queries=32", "optimizer.learning_rate=0")
    assert (longer_facts["num_queries"], longer_facts["num_steps"]) == (32, 16)
    assert longer_facts["weights_sha256"] == facts["weights_sha256"]  # at the new learning rate nothing moved any more
    assert read(tmp_path / "longer" / "journal.bin").records[-1].lr == 0.0
    lines = (tmp_path / "longer" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8, 10, 12, 14, 16]


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("optimizer=adam", "optimizer.learning_rate=1e-3", "trainer.lr_scheduler_type=linear"),
        ("peft=lora", "estimator=one_sided", "estimator.num_directions=2"),
        ("trainable=last_blocks", "trainable.num_blocks=1"),
        ("trainer.save_strategy='no'",),
        ("trainer.journal=false",),
    ],
    ids=["full", "adam", "lora", "last_blocks", "no_checkpoints", "no_journal"],
)
def test_interrupted_and_repeated_is_the_same_run(more: tuple[str, ...], interrupted: Any, tmp_path: Path):
    whole = go(tmp_path, "whole", *more)
    interrupted(whole["num_steps"] // 2 - 1)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, "stopped", *more)
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "stopped" / "report.json").exists()
    facts = go(tmp_path, "stopped", *more)
    for key in ("weights_sha256", "final", "zero_shot", "num_queries", "num_steps", "num_tokens"):
        assert facts[key] == whole[key], key

    def metric_rows(name: str) -> list[dict[str, Any]]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        timed = ("seconds", "memory", "time", "per_second")
        return [{k: v for k, v in json.loads(line).items() if not any(t in k for t in timed)} for line in lines]

    assert metric_rows("stopped") == metric_rows("whole")


def test_interrupted_in_its_last_step(interrupted: Any, tmp_path: Path):
    """Everything is trained, nothing is reported: the same command adds what is missing and no step."""
    whole = go(tmp_path, "whole")
    interrupted(12)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, "stopped")
    facts = go(tmp_path, "stopped")
    assert facts["num_steps"] == 12
    assert facts["num_queries"] == 24
    assert facts["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.parametrize("journal", ["there", "moved away"])
def test_killed_between_checkpoints(journal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No checkpoint is written on the way out: the run goes on from the last one, and its rows are not doubled."""
    whole = go(tmp_path, "whole")
    original = ZOTrainer.training_step

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.progress.steps == 6:
            raise SystemExit(9)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ZOTrainer, "training_step", killed)
    with pytest.raises(SystemExit):
        go(tmp_path, "killed")
    monkeypatch.setattr(ZOTrainer, "training_step", original)
    assert sorted(p.name for p in (tmp_path / "killed").glob("checkpoint-*")) == ["checkpoint-4"]
    if journal == "moved away":
        (tmp_path / "killed" / "journal.bin").unlink()
    assert go(tmp_path, "killed")["weights_sha256"] == whole["weights_sha256"]
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8, 10, 12]


def test_interrupted_before_the_first_step_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original = ZOTrainer.train

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(ZOTrainer, "train", train)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, "out")
    monkeypatch.setattr(ZOTrainer, "train", original)
    assert go(tmp_path, "out")["num_steps"] == 12


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("task.train=nowhere.jsonl", "there is no data file nowhere.jsonl"),
        ("model.name=./nowhere", "there is no model folder ./nowhere"),
        ("task.label=lable", "data.jsonl:1 has no 'lable'"),
        ("task.template='{txt} is'", "data.jsonl:1 has no 'txt'"),
        ("task.num_test=48", "too few rows"),
        ("estimator.eps=1e-12", "estimator.eps=1e-12 is below what float32"),
        ("trainable=adapter", "trainable=adapter needs an adapter"),
        ("trainer.lr_scheduler_type=sideways", "trainer: "),
        ("trainer.eval_strategy=sometimes", "trainer: "),
        ("trainer.gradient_checkpointing=true", "gradient_checkpointing=True cannot be used"),
        ("trainer.fp16=true", "fp16=True cannot be used with zeroth-order training: there is no gradient to scale"),
        ("trainer.per_device_train_batch_size=0", "per_device_train_batch_size must be at least 1, got 0"),
        ("trainer.per_device_eval_batch_size=0", "per_device_eval_batch_size must be at least 1, got 0"),
        ("trainer.gradient_accumulation_steps=0", "gradient_accumulation_steps must be at least 1, got 0"),
        ("trainer.data_seed=99999999999", "data_seed must be 0 or more and below 2**32"),
        ("seed=99999999999", "seed must be 0 or more and below 2**32"),
        (
            "trainer.load_best_model_at_end=true trainer.metric_for_best_model=acuracy",
            "trainer.metric_for_best_model=acuracy is not computed by an evaluation. Did you mean accuracy",
        ),
        ("trainer.greater_is_better=true", "trainer.greater_is_better=true would keep the worst loss for the best"),
        (
            "trainer.greater_is_better=false trainer.metric_for_best_model=accuracy",
            "trainer.greater_is_better=false would keep the worst accuracy for the best",
        ),
        (
            "trainer.load_best_model_at_end=true trainer.eval_delay=13",
            "trainer.eval_delay=13 is longer than the run of 12 steps",
        ),
        ("trainer.disable_tqdm=true", "trainer.disable_tqdm cannot be set here"),
        ("trainer.resume_from_checkpoint=x", "the same command resumes"),
        ("engine=layerwise estimator=forward_gradient", "needs exact derivatives: choose engine=auto"),
        ("engine=forward_mode", "choose engine=auto"),
        ("engine=in_place engine.restore=subtract model.dtype=bfloat16 estimator.eps=1e-2", "engine.restore=subtract"),
        ("estimator.noise=torch_sequential subspace.law=sphere", "torch_sequential"),
    ],
)
def test_a_start_that_fails_leaves_no_folder(more: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    with pytest.raises(UserError) as caught:
        run(compose(arguments(tmp_path, cwd / "runs" / "out", *words(more))))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(cwd.iterdir())


def words(text: str) -> list[str]:
    """Several arguments in one string; a value with spaces is quoted."""
    return [text] if "'" in text else text.split(" ")


def test_a_model_folder_without_a_model(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"could not load model\.name="):
        go(tmp_path, "out", f"model.name={tmp_path / 'empty'}")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else(tmp_path: Path):
    arguments(tmp_path, "")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds no run of zoft"):
        go(tmp_path, "out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file: give a folder"):
        go(tmp_path, "file")
    with pytest.raises(UserError, match="is not writable"):
        go(tmp_path, "file/below")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_an_adapter_is_saved_for_peft(tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    facts = go(tmp_path, "out", "peft=lora")
    model = tmp_path / "out" / "model"
    assert (model / "adapter_model.safetensors").is_file()
    assert not (model / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loaded = PeftModel.from_pretrained(base, model, is_trainable=True)
    assert Weights(loaded).digest() == facts["weights_sha256"]
    assert facts["num_trainable"] < facts["num_params"]


@pytest.mark.parametrize("adapter", ["prefix", "prompt"])
def test_other_adapters_run(adapter: str, tmp_path: Path):
    facts = go(tmp_path, "out", f"peft={adapter}")
    assert (tmp_path / "out" / "model" / "adapter_model.safetensors").is_file()
    assert facts["num_queries"] == 24


@pytest.mark.parametrize(
    "more",
    [
        ("estimator=forward_gradient", "model.attn_implementation=eager"),
        ("estimator.noise=torch_sequential",),
        ("subspace.law=sphere", "engine=in_place"),
        ("model.dtype=bfloat16", "estimator.eps=1e-2"),
        ("objective=cross_entropy", "trainer.gradient_accumulation_steps=2"),
        ("trainable=regex", "trainable.pattern=norm"),
        ("trainer.load_best_model_at_end=true", "trainer.metric_for_best_model=accuracy"),
    ],
    ids=lambda more: more[0],
)
def test_choices_run(more: tuple[str, ...], tmp_path: Path):
    facts = go(tmp_path, "out", *more)
    assert facts["num_queries"] == 24
    assert facts["num_skipped_steps"] == 0


def test_losses_that_are_not_finite_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from zoft.lm.objectives.options import Options

    original = Options.loss
    monkeypatch.setattr(Options, "loss", lambda self, *a: original(self, *a) * math.nan)
    with pytest.raises(NonFiniteLossError, match="10 steps in a row"):
        go(tmp_path, "out")
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["num_skipped_steps"] for line in lines] == [2, 4, 6, 8]
    assert all(json.loads(line)["loss"] is None for line in lines)
    assert not (tmp_path / "out" / "report.json").exists()


def test_the_interrupt_handler_is_given_back_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    handler = signal.getsignal(signal.SIGINT)

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ZOTrainer, "training_step", training_step)
    with pytest.raises(RuntimeError):
        go(tmp_path, "out")
    assert signal.getsignal(signal.SIGINT) is handler


def test_two_runs_in_one_process_do_not_touch_each_other(finished: tuple[Path, dict[str, Any]], tmp_path: Path):
    _, facts = finished
    other = go(tmp_path, "other", "seed=5")
    again = go(tmp_path, "again")
    assert other["weights_sha256"] != facts["weights_sha256"]
    assert again["weights_sha256"] == facts["weights_sha256"]


def test_a_folder_keeps_its_run_under_other_names(
    interrupted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: tuple[Path, dict[str, Any]]
):
    """Stopped as `out`, moved, finished under its absolute path, and shown under a third spelling."""
    _, whole = finished
    monkeypatch.chdir(tmp_path)
    interrupted(6)
    with pytest.raises(KeyboardInterrupt):
        run(compose(arguments(tmp_path, "out")))
    Path("out").rename("moved")
    facts = run(compose(arguments(tmp_path, tmp_path / "moved")))
    assert facts["weights_sha256"] == whole["weights_sha256"]
    assert not Path("out").exists()
    assert run(compose(arguments(tmp_path, "./moved")))["weights_sha256"] == whole["weights_sha256"]


def test_a_run_in_progress_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same command while the first is at it: refused, and the first ends as if nothing had been."""
    original, messages = ZOTrainer.training_step, []

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.progress.steps == 6:
            before = contents(tmp_path / "out")
            with pytest.raises(UserError, match="is in use by process") as caught:
                go(tmp_path, "out")
            messages.append(str(caught.value))
            assert contents(tmp_path / "out") == before
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ZOTrainer, "training_step", training_step)
    assert go(tmp_path, "out")["num_steps"] == 12
    assert len(messages) == 1
    assert not (tmp_path / "out" / ".lock").exists()


@pytest.mark.parametrize("kind", ["interrupted", "failed"])
def test_the_lock_goes_with_the_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert (tmp_path / "out" / ".lock").exists()
        raise KeyboardInterrupt if kind == "interrupted" else RuntimeError

    monkeypatch.setattr(ZOTrainer, "train", train)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        go(tmp_path, "out")
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_classifier_is_no_model_for_a_task(tmp_path: Path):
    from tests import models
    from tests.runs import tiny_tokenizer

    arguments(tmp_path, "")
    models.tiny_bert_classifier().save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match=r"is a BertForSequenceClassification, no causal language model"):
        go(tmp_path, "out", f"model.name={tmp_path / 'bert'}")
    assert not (tmp_path / "out").exists()


def test_the_inference_peak_is_taken_after_the_frozen_prefix_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from zoft.report.memory import PeakMemory

    said: list[str] = []
    fill, reset, predict = QueryForward.fill_prefix, PeakMemory.reset, ZOTrainer.predict
    monkeypatch.setattr(QueryForward, "fill_prefix", lambda self, *a: said.append("fill") or fill(self, *a))
    monkeypatch.setattr(PeakMemory, "reset", lambda self: said.append("reset") or reset(self))
    monkeypatch.setattr(ZOTrainer, "predict", lambda self, *a, **k: said.append("predict") or predict(self, *a, **k))
    go(tmp_path, "out", "trainable=last_blocks", "trainable.num_blocks=1")
    assert said[:3] == ["fill", "reset", "predict"]
