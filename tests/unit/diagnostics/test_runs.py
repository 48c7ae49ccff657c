"""Diagnostics beside a run: the update as it is written, the run the same to the bit, files, settings."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from tests import models
from tests.contract.discovered import SUBSPACES, small_subspace
from zoft import ZOConfig, ZOTrainer
from zoft.component import create
from zoft.diagnostics import DiagnosticsCallback
from zoft.diagnostics.record import COLUMNS, MeasurementFiles, read_rows, read_tables
from zoft.errors import UserError
from zoft.estimators.nodes import Nodes
from zoft.journal import file as files
from zoft.lm.objectives.base import Objective
from zoft.weights.tensors import Weights


class Net(nn.Module):
    """Two linear layers and a norm."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 5)])
        self.norm = nn.LayerNorm(8)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 2)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers[1](self.norm(self.layers[0](inputs)).tanh())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trainer_of(folder: Path, callback: Any = None, model: Any = None, **given: Any) -> ZOTrainer:
    generator = torch.Generator().manual_seed(1)
    rows = [{"inputs": torch.randn(6, generator=generator), "labels": torch.tensor(i % 5)} for i in range(16)]
    field_names = ("max_steps", "learning_rate", "gradient_accumulation_steps", "max_grad_norm")
    chosen = {"max_steps": 4, "learning_rate": 1e-2} | {key: given.pop(key) for key in field_names if key in given}
    args = ZOConfig(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        per_device_train_batch_size=4,
        dataloader_pin_memory=False,
        **chosen,
    )
    return ZOTrainer(model or Net(), args, train_dataset=rows, callbacks=[callback] if callback else None, **given)


def quick(every: int = 1, **given: Any) -> DiagnosticsCallback:
    return DiagnosticsCallback(every, **({"num_probes": 0, "eps": (), "draw": False} | given))


def facts(trainer: ZOTrainer) -> tuple[Any, ...]:
    """All that a run leaves, but for its seconds."""
    records = [astuple(record) for record in files.read(Path(trainer.args.output_dir) / files.NAME).records]
    lines = [
        {k: v for k, v in line.items() if "sec" not in k and "runtime" not in k} for line in trainer.state.log_history
    ]
    return Weights(trainer.model).digest(), str(records), str(lines), trainer.progress.num_queries


def random_states(trainer: ZOTrainer) -> list[bytes]:
    """The global random state after every step, once the run has been made."""
    states: list[bytes] = []
    trainer.journal.digest = lambda *_, **__: states.append(torch.get_rng_state().numpy().tobytes())  # type: ignore[method-assign]
    return states


RUNS: dict[str, dict[str, Any]] = {
    "mezo": {},
    "q of one side": {
        "estimator": ("one_sided", 4),
        "weighting": "loss_std",
        "subspace": small_subspace("low_rank", "gaussian", 2),
    },
    "own stream, in place": {"estimator": ("central", 1, "torch_sequential")},
    "remembers": {"estimator": ("svrg", 2)},
    "pairs, orthogonal": {"estimator": ("central", 4, "counter", "orthogonal"), "optimizer": "cone"},
    "looks at inputs": {"subspace": small_subspace("activation", "gaussian", 2), "optimizer": "adam"},
    "backward": {"estimator": "backprop", "gradient_accumulation_steps": 2},
    "tries steps": {"optimizer": "conservative", "max_grad_norm": 0.1},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_to_the_bit_with_diagnostics(name: str, tmp_path: Path):
    given = dict(RUNS[name])
    if isinstance(given.get("estimator"), tuple):
        kind, q, *more = given["estimator"]
        fields = dict(zip(("noise", "across"), more, strict=False))
        given["estimator"] = type(create("estimator", kind, ""))(num_directions=q, **fields)
    plain = trainer_of(tmp_path / "plain", **given)
    states = [random_states(plain)]
    plain.train()
    watched = trainer_of(tmp_path / "watched", quick(2, num_probes=4, eps=(1e-2,)), **given)
    states.append(random_states(watched))
    watched.train()
    assert facts(watched) == facts(plain)
    assert states[0] == states[1]
    assert len(states[0]) >= 4
    rows = read_rows(tmp_path / "watched")
    assert [row["step"] for row in rows] == ["1", "3"]
    assert all(float(row["diagnostics_queries"]) > 0 for row in rows)
    assert not (tmp_path / "plain" / "diagnostics.csv").exists()
    if name == "backward":
        assert float(rows[0]["cosine"]) == pytest.approx(1)
        assert float(rows[0]["norm_ratio"]) == pytest.approx(1)


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_the_estimate_measured_is_the_update_written(subspace: str, tmp_path: Path):
    """With sgd and a learning rate of 1 the weights move by the estimate."""
    estimator = type(create("estimator", "central", ""))(num_directions=3, eps=1e-2)
    callback = quick()
    chosen = small_subspace(subspace, "gaussian", 2)
    trainer = trainer_of(tmp_path, callback, subspace=chosen, estimator=estimator, max_steps=1, learning_rate=1.0)
    batches: list[Any] = []
    ask = trainer.step_loss.of
    trainer.step_loss.of = lambda window: (batches.append(window), ask(window))[1]  # type: ignore[method-assign]
    before = Net()
    trainer.train()
    rows = batches[-1].micro_batches
    loss = sum(before(**batch)["loss"] for batch in rows) / len(rows)
    loss.backward()
    gradient = torch.cat([p.grad.view(-1) for p in before.parameters()])
    step = torch.cat(
        [(a - b).detach().view(-1) for a, b in zip(before.parameters(), trainer.model.parameters(), strict=True)]
    )
    row = read_rows(tmp_path)[0]
    assert float(row["estimate_norm"]) == pytest.approx(float(step.norm()), rel=1e-4)
    assert float(row["gradient_norm"]) == pytest.approx(float(gradient.norm()), rel=1e-4)
    cosine = float(step @ gradient / step.norm() / gradient.norm())
    assert float(row["cosine"]) == pytest.approx(cosine, abs=1e-4)


def test_gradient_over_micro_batches_is_that_of_the_whole_batch(tmp_path: Path):
    norms = []
    for folder, accumulated in (("one", 1), ("two", 2)):
        callback = quick()
        trainer = trainer_of(tmp_path / folder, callback, gradient_accumulation_steps=accumulated, max_steps=1)
        trainer.args.per_device_train_batch_size = 8 // accumulated
        trainer._train_batch_size = 8 // accumulated
        trainer.train()
        norms.append(float(read_rows(tmp_path / folder)[0]["gradient_norm"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@dataclass
class Wrong(Objective):
    """The share of rows that are wrong: no gradient."""

    @property
    def differentiable(self) -> bool:
        return False

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        return (model(**batch)["logits"].argmax(-1) != batch["labels"]).float().mean()

    def num_terms(self, batch: Any) -> int:
        return len(batch["labels"])


def test_an_objective_without_gradient_says_so_once_and_has_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    estimator = type(create("estimator", "central", ""))(eps=0.5)
    callback = quick(num_probes=4, eps=(1e-2,))
    trainer_of(tmp_path, callback, objective=Wrong(), estimator=estimator, max_steps=3).train()
    rows, tables = read_rows(tmp_path), read_tables(tmp_path)
    assert len(rows) == 3
    assert all(row["cosine"] == "" and row["gradient_norm"] == "" and row["fd_error_at_eps"] == "" for row in rows)
    assert all(row["probe_rms"] and row["gram_effective_rank"] for row in rows)
    assert "variance" in tables
    assert len(tables["notes"]) == 2
    assert sum("true gradient" in line for line in caplog.messages) == 1


def test_weights_are_whole_when_a_measurement_fails(tmp_path: Path):
    callback = quick(num_probes=4)
    trainer = trainer_of(tmp_path, callback, engine="in_place")
    start, ask = Weights(trainer.model).digest(), trainer.step_loss.num_terms

    def fails(inputs: Any) -> int:
        if callback._remembered is not None and trainer.last_step is not None:
            raise RuntimeError("broken")
        return ask(inputs)

    trainer.step_loss.num_terms = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train()
    assert Weights(trainer.model).digest() == start


def test_losses_that_are_not_finite_are_left_out(tmp_path: Path):
    callback = quick(num_probes=4)
    trainer = trainer_of(tmp_path, callback, max_steps=2)
    ask, times = trainer.step_loss.of, [0]

    def sometimes(window: Any) -> torch.Tensor:
        times[0] += 1
        loss = ask(window)
        return loss * math.nan if times[0] == 5 else loss  # of the first measurement

    trainer.step_loss.of = sometimes  # type: ignore[method-assign]
    trainer.train()
    rows = read_rows(tmp_path)
    assert len(rows) == 2
    assert math.isfinite(float(rows[0]["probe_rms"]))


# ---------------------------------------------------------------------------------------------------- files and picture


def test_a_resumed_run_has_every_row_once(tmp_path: Path):
    whole = trainer_of(tmp_path / "whole", quick(2, num_probes=4), max_steps=6)
    whole.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = state.global_step == 4
            return control

    folder = tmp_path / "cut"
    first = trainer_of(folder, quick(2, num_probes=4), max_steps=6)
    first.add_callback(Stop())
    first.train()
    with (folder / "diagnostics.csv").open("a") as file:
        file.write("5,10,1,0.001,of another life" + "," * (len(COLUMNS) - 5) + "\n7,1")
    again = trainer_of(folder, quick(2, num_probes=4), max_steps=6)
    again.train(resume_from_checkpoint=True)
    assert Weights(again.model).digest() == Weights(whole.model).digest()

    def rows_of(one: Path) -> list[list[str]]:
        return [[row[name] for name in COLUMNS if name != "diagnostics_seconds"] for row in read_rows(one)]

    assert rows_of(folder) == rows_of(tmp_path / "whole")
    assert [row[0] for row in rows_of(folder)] == ["1", "3", "5"]


def test_tables_of_steps_that_are_taken_again_are_forgotten(tmp_path: Path):
    record = MeasurementFiles(tmp_path, 0)
    record.add({"step": 5, "diagnostics_queries": 3}, {"step": 5, "gram": [[math.nan]]}, 0.5)
    assert json.loads((tmp_path / "diagnostics.json").read_text())["gram"] == [[None]]
    assert MeasurementFiles(tmp_path, 5).num_queries == 3
    assert MeasurementFiles(tmp_path, 4).num_queries == 0
    assert read_tables(tmp_path) == {}
    with (tmp_path / "diagnostics.csv").open() as file:
        assert next(csv.reader(file)) == list(COLUMNS)


def test_the_picture(tmp_path: Path):
    trainer_of(tmp_path, DiagnosticsCallback(2, num_probes=4, eps=(1e-4, 1e-1)), max_steps=3).train()
    assert (tmp_path / "diagnostics.png").read_bytes()[:4] == b"\x89PNG"
    from zoft.report.report import write_report

    assert "(diagnostics.png)" in write_report(tmp_path, {"final": 0.5}).read_text()


# ------------------------------------------------------------------------------------------------------------- settings


def test_off_by_default_and_settings_that_would_be_ignored_are_refused():
    from zoft.config import compose

    assert compose([]).diagnostics.every == 0
    full = compose(["diagnostics=full", "diagnostics.every=7"]).diagnostics
    assert (full.every, full.gradient) == (7, True)
    assert not compose(["diagnostics=cheap"]).diagnostics.gradient
    DiagnosticsCallback(**vars(full))
    with pytest.raises(UserError, match="nothing is measured: choose diagnostics=cheap"):
        compose(["diagnostics.num_probes=3"])
    with pytest.raises(UserError, match="Did you mean every"):
        compose(["diagnostics.evry=3"])
    for wrong in ({"every": 0}, {"num_probes": -1}, {"eps": (0.0,)}):
        with pytest.raises(UserError, match="diagnostics"):
            DiagnosticsCallback(**wrong)


def test_one_process_and_a_trainer_of_ours(tmp_path: Path):
    callback = quick()
    trainer = trainer_of(tmp_path, callback)
    with pytest.raises(UserError, match="belongs to a trainer of zoft"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)

    class Two:
        class args:
            world_size = 2

    with pytest.raises(UserError, match="one process"):
        callback.watch(Two())  # type: ignore[arg-type]


def test_node_directions_have_their_cosine_with_the_true_gradient(tmp_path: Path):
    """Exact node gradients of all trained matrices are the gradient; a response of sixteen probes is on its side."""
    cosines = {}
    for feedback in ("exact", "hidden"):
        model = models.tiny_llama()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.2.mlp.down_proj" in name)
        batch = models.batch_for(model, rows=8, length=7)
        trainer = ZOTrainer(
            model,
            ZOConfig(
                output_dir=str(tmp_path / feedback), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
                max_steps=2, per_device_train_batch_size=4, dataloader_pin_memory=False,
            ),
            train_dataset=[{key: value[i] for key, value in batch.items()} for i in range(8)],
            callbacks=[quick(1, eps=(1e-3,))],
            subspace="nodes", optimizer="whiten",
            estimator=Nodes(feedback=feedback, first=16 if feedback == "hidden" else 4),
        )  # fmt: skip
        trainer.train()
        rows = read_rows(tmp_path / feedback)
        cosines[feedback] = [float(row["cosine"]) for row in rows]
        assert {row.get("fd_error_at_eps", "") for row in rows} == {""}, "eps is in units of outputs, not of weights"
    assert cosines["exact"] == pytest.approx([1, 1], abs=1e-3)
    assert min(cosines["hidden"]) > 0.5
