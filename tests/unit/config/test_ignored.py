"""A setting that would be ignored is an error: what was set, why it does nothing, what to do instead."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from zoft.component import GROUPS, components
from zoft.config import ZoftConfig, compose, multirun
from zoft.errors import IgnoredError, UserError, of_recorded, refuse_ignored
from zoft.estimators.central import Central
from zoft.lm.objectives.metric import Metric
from zoft.optimizers.adamw import AdamW
from zoft.optimizers.muon import Muon
from zoft.optimizers.sgd import SGD
from zoft.subspaces.activation import Activation
from zoft.subspaces.sparse import Sparse
from zoft.trainer import values


@pytest.mark.parametrize(
    ("cls", "given", "ignored"),
    [
        (Central, {"eps_schedule": "tied", "eps_end": 0.5}, "eps_end=0.5 does nothing with central.eps_schedule=tied"),
        (Muon, {"top_k": 4}, "top_k=4 does nothing with muon.method=newton_schulz: leave it out, or set muon.method"),
        (Activation, {"basis": "first", "step_size": 0.1}, "step_size=0.1 does nothing with activation.basis=first"),
        (Activation, {"basis_columns": 9}, "or set activation.basis to oja"),
        (Sparse, {"choose": "gradient", "interval": 3}, "or set sparse.choose to magnitude or random"),
        (Sparse, {"choose": "mask", "mask": "x", "keep": 0.1}, "keep=0.1 does nothing with sparse.choose=mask"),
        (Metric, {"seed": 3}, "seed=3 does nothing with metric.temperature=0.0: leave it out, or set metric.temp"),
    ],
)
def test_settings_of_another_choice_are_refused(cls: type, given: dict[str, Any], ignored: str):
    with pytest.raises(UserError, match=f".*{ignored}"):
        cls(**given)
    with of_recorded(is_recorded=True):
        cls(**given)


def test_conditions_name_fields_and_their_defaults_are_never_refused():
    for group in GROUPS:
        for cls in components(group).values():
            names = {field.name for field in dataclasses.fields(cls)}
            assert {*cls.counts_with, *(other for other, _ in cls.counts_with.values())} <= names, cls


@pytest.mark.parametrize(
    ("given", "ignored"),
    [
        ({"guard_factor": 5.0}, r"trainer\.guard_factor=5\.0 does nothing with trainer\.guard=none"),
        ({"guard": "clip", "guard_back": 5}, "guard_back=5 does nothing with .*, or set trainer.guard to rollback"),
        ({"journal": False, "journal_hash_steps": 5}, "or set trainer.journal to true"),
        ({"keep_frozen_prefix": False, "frozen_prefix_mb": 5}, "does nothing with trainer.keep_frozen_prefix=false"),
    ],
)
def test_settings_of_the_trainer_that_need_another_one(given: dict[str, Any], ignored: str):
    with pytest.raises(UserError, match=ignored):
        values.require_taken(given, "trainer.")
    values.require_taken(values.DEFAULTS | {"guard_steps": 100}, "trainer.")


def test_defaults_of_the_trainer_are_its_own():
    from zoft.trainer.config import ZOConfig

    assert {name: ZOConfig.__dataclass_fields__[name].default for name in values.DEFAULTS} == values.DEFAULTS


def test_what_a_run_has_recorded_is_let_pass():
    with pytest.raises(UserError, match="would do nothing"):
        refuse_ignored("it would do nothing")
    with of_recorded(is_recorded=True):
        refuse_ignored("it would do nothing")


def test_an_argument_takes_the_place_of_what_a_preset_has_for_another_choice(tmp_path):
    (tmp_path / "mask.safetensors").touch()
    words = ["subspace.choose=random"]
    assert compose(["method=senszoq", *words]).subspace.keep == 0.001  # type: ignore[attr-defined]
    words = ["method=zo_mopi", "optimizer.method=svd", "optimizer.top_k=8"]
    with pytest.raises(UserError, match=r"^optimizer\.top_k=8 does nothing with optimizer\.method=svd"):
        compose(words)


@pytest.mark.parametrize(
    ("words", "ignored"),
    [
        (["method=zoft", "subspace.layers=mlp", "peft=lora"], "subspace.layers=mlp does nothing: an adapter's own"),
        (["precision.update=master"], "precision.update=master does nothing: model.dtype=float32 takes steps as they"),
        (
            ["model.revision=main"],
            "model.revision=main does nothing: model.name=zoft:smollm2-135m-instruct is an asset",
        ),
        (["model.name=/", "model.revision=v1"], "model.name=/ is a folder, which has no revisions: leave it out"),
        (["tracker.project=mine"], r"tracker.project=mine does nothing: of wandb, trackio, mlflow, which read it, "),
        (["tracker=tensorboard", "tracker.mode=offline"], r"tracker.report_to=\[tensorboard\] has none: leave it out"),
        (
            ["method=mezo", "protocol=mezo", "task=sst2", "trainer.data_seed=7"],
            "data_seed=7 does nothing: protocol=mezo",
        ),
        (["method=adamw", "engine=layerwise"], "engine=layerwise does nothing: it evaluates losses at points"),
        (["method=adamw", "subspace.law=sphere"], "law=sphere does nothing: estimator=backprop draws no directions"),
        (["method=zoft", "estimator.response=identity", "optimizer.trust=5"], "optimizer.trust=5.0 does nothing"),
        (
            ["method=zoft", "estimator.eps=auto"],
            "estimator.eps=auto cannot be measured with estimator=nodes: its radius",
        ),
        (
            ["trainer.use_cpu=true", "trainer.bf16_full_eval=true"],
            "bf16_full_eval=True would not be heeded: evaluations",
        ),
        (
            ["config=reward", "task.train=x", "method=zoft", "estimator.feedback=exact"],
            "objective=reward has no gradient, and estimator=nodes with estimator.feedback=exact computes one",
        ),
        (
            ["engine=onnx", "peft=lora", "method=mezo", "trainer.frozen_prefix_mb=9", "objective=options"],
            "trainer.frozen_prefix_mb=9 does nothing: forwards of engine=onnx run elsewhere: leave it out",
        ),
    ],
)
def test_settings_without_effect_in_a_run_are_refused_before_anything_is_loaded(words: list[str], ignored: str):
    with pytest.raises(UserError, match=ignored):
        compose(["config=quickstart", *words] if "config=" not in words[0] else words)


def test_a_tracker_is_given_the_project(monkeypatch: pytest.MonkeyPatch):
    from zoft.report.trackers import close_trackers
    from zoft.run import build

    monkeypatch.setattr(build, "require_trackers", lambda cfg: None)
    for name in ("WANDB_PROJECT", "WANDB_MODE", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.setenv(name, "before")
    cfg = compose(["config=quickstart", "tracker.report_to=[mlflow]", "tracker.project=mine", "trainer.use_cpu=true"])
    assert build.arguments_of(cfg).project == "mine"
    assert build.os.environ["MLFLOW_EXPERIMENT_NAME"] == "mine"
    build.arguments_of(compose(["config=quickstart", "tracker.report_to=[mlflow]", "trainer.use_cpu=true"]))
    assert build.os.environ["MLFLOW_EXPERIMENT_NAME"] == "zoft"  # not the last run's
    close_trackers()
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "before")
    build.arguments_of(compose(["config=quickstart", "tracker.report_to=[mlflow]", "trainer.use_cpu=true"]))
    assert build.os.environ["MLFLOW_EXPERIMENT_NAME"] == "before"


def test_what_is_written_has_settings_that_what_is_chosen_has_not():
    from zoft.run.build import _refuse_unread

    cfg = compose(["config=quickstart", "method=mezo", "objective=metric", "objective.max_new_tokens=5"])
    with pytest.raises(
        UserError, match=r"^objective.max_new_tokens=5 does nothing: task=sms_spam has answers to choose"
    ):
        _refuse_unread(cfg, is_written=False)
    cfg.trainer["narrow_last_block"] = True
    with pytest.raises(UserError, match=r"^trainer.narrow_last_block=true does nothing: what objective=metric writes"):
        _refuse_unread(cfg, is_written=True)


def test_rehearsals_leave_out_what_is_of_the_journal():
    from zoft.run.rehearsal import rehearsing

    cfg = compose(["config=quickstart", "method=mezo", "trainer.guard=rollback", "trainer.guard_back=3"])
    cfg.trainer["journal_hash_steps"] = 5
    values.require_taken(rehearsing(cfg, "x", 4).trainer, "trainer.")


def test_a_files_settings_of_a_choice_that_an_argument_replaces_are_left_out(tmp_path, caplog):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "defaults: [override /method: mezo]\ntrainer: {guard: clip, guard_steps: 20}\n"
        "estimator: {eps_schedule: cosine, eps_end: 0.01}\n"
    )
    for _ in range(2):  # the second time of parts that are there
        caplog.clear()
        cfg = compose([f"config={file}", "trainer.guard=none", "estimator.eps_schedule=constant"])
        assert "guard_steps" not in cfg.trainer
        assert cfg.estimator.eps_end == 0.25
        assert f"trainer.guard_steps of {file} is left out: it does nothing with trainer.guard=none" in caplog.text
        assert f"eps_end of {file} is left out: it does nothing with estimator.eps_schedule=constant" in caplog.text
        assert compose([f"config={file}"]).trainer["guard_steps"] == 20


def test_words_of_verbs_that_nothing_reads(tmp_path):
    from zoft.bench.reading import read_plan
    from zoft.cli.bench import command
    from zoft.cli.export import _refuse_unread
    from zoft.use.inference.generate import WritingSettings

    with pytest.raises(
        UserError, match=r"^seed=3 does nothing with temperature=0\.0: leave it out, or set temperature too$"
    ):
        WritingSettings(seed=3)
    for word, why in (
        ("demonstrations=4", "shown under icl: leave it out"),
        ("baseline=mezo", "counted to target=0.5"),
    ):
        with pytest.raises(UserError, match=f"^{word.split('=')[0]} does nothing: .*{why}"):
            read_plan(["config=quickstart", "references=[zero_shot]", "target=0.5", word])
    with pytest.raises(UserError, match=r"^--plan says what would be run, and --draw draws what was"):
        command(["output_dir=x", "--plan", "--draw"])
    with pytest.raises(
        UserError, match=r"^model\.dtype does nothing: files are copied as they are: leave it out, or merge"
    ):
        _refuse_unread(str(tmp_path), ["model.dtype=float16"], set())
    _refuse_unread(str(tmp_path), ["model.dtype=float16"], {"--gguf"})


@pytest.mark.parametrize(
    ("given", "ignored"),
    [
        (
            {"optimizer": SGD(weight_decay=0.1)},
            r"^optimizer.weight_decay=0.1 does nothing: norms and biases do not decay",
        ),
        (
            {"precision_update": "master"},
            r"^precision.update=master does nothing: what is trained is in float32, which",
        ),
        ({"optimizer": AdamW()}, ""),
    ],
)
def test_settings_of_steps_that_what_is_trained_does_not_read(given: dict[str, Any], ignored: str, tmp_path):
    from tests import models
    from zoft import ZOConfig, ZOTrainer

    model = models.tiny_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    update = given.pop("precision_update", "auto")
    args = ZOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, max_steps=1, precision_update=update)
    trainer = ZOTrainer(model, args, estimator="central", **given)
    if not ignored:
        assert trainer.create_optimizer()
        return
    with pytest.raises(UserError, match=ignored):
        trainer.create_optimizer()


def test_what_is_counted_as_trained_is_what_moves():
    from tests import models
    from zoft.subspaces.base import num_moving
    from zoft.subspaces.nodes import Nodes
    from zoft.weights.tensors import Weights

    model = models.tiny_llama()
    mlp = sum(parameter.numel() for name, parameter in model.named_parameters() if "mlp" in name)
    assert num_moving(Nodes().bind(Weights(model))) == mlp < Weights(model).num_elements


@pytest.mark.parametrize(("kind", "nothing"), [("eval", "evaluates at no step"), ("save", "saves no checkpoint")])
def test_steps_between_what_never_happens(kind: str, nothing: str, tmp_path):
    usual = {"eval": 500, "save": None}[kind]
    assert compose([]).trainer.get(f"{kind}_steps") == usual  # of train.yaml, which refuse_steps lets pass
    steps, never = f"trainer.{kind}_steps=7", f"trainer.{kind}_strategy='no'"
    with pytest.raises(IgnoredError, match=rf"{kind}_steps=7 does nothing: trainer\.{kind}_strategy=no {nothing}: "):
        compose([steps, never])
    assert compose(["config=quickstart", never]).trainer[f"{kind}_strategy"] == "no"  # puts the preset's to rest
    (tmp_path / "mine.yaml").write_text(f"trainer: {{{kind}_steps: 7, {kind}_strategy: 'no'}}\n")
    with pytest.raises(IgnoredError, match="does nothing"):
        compose([f"config={tmp_path / 'mine.yaml'}"])
    compose([f"config={tmp_path / 'mine.yaml'}"], recorded=True)


def _eps_end(cfg: ZoftConfig) -> dict[str, Any]:
    return {"radius": cfg.estimator.radius, "end": vars(cfg.estimator)["eps_end"]}


def test_a_sweep_over_a_condition_has_cells_in_which_a_setting_does_nothing(tmp_path):
    words = ["method=mezo", "estimator.eps_end=0.1", f"output_dir={tmp_path}"]
    cells = multirun(["estimator.eps_schedule=constant,cosine", *words], _eps_end)
    assert [(cell.error, cell.metrics["end"]) for cell in cells] == [(None, 0.1), (None, 0.1)]
    with pytest.raises(UserError, match=r"eps_end=0\.1 does nothing with estimator\.eps_schedule=tied: leave it out"):
        multirun(["estimator.eps_schedule=constant,tied", *words], _eps_end)  # in no cell
    with pytest.raises(UserError, match=r"eps_end=0\.1 does nothing"):
        multirun(["seed=0,1", *words], _eps_end)
