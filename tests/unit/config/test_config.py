"""Composition: precedence, every shipped file, a user's own files, and the round trip through a run's config.yaml."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from hydra.types import RunMode
from omegaconf import open_dict

from zoft.component import GROUPS, components
from zoft.config import compose, resolved_yaml
from zoft.config.catalog import ORDER, choices, component_names, configs_dir, first_comment, preset_files
from zoft.config.loader import PRIMARY, Loader
from zoft.errors import UserError
from zoft.estimators.central import Central
from zoft.estimators.forward_gradient import ForwardGradient
from zoft.estimators.nodes import Nodes
from zoft.estimators.one_sided import OneSided
from zoft.optimizers.adam import Adam
from zoft.optimizers.momentum import Momentum
from zoft.optimizers.whiten import Whiten

SHIPPED = sorted(file for file in configs_dir().glob("*/*.yaml") if file.parent.name != "bench")  # test_bench_plan.py
NEEDS = {
    "weighting=curvature": ["estimator=three_point"],
    "optimizer=hessian": ["estimator=three_point"],
    "trainable=regex": ["trainable.pattern=norm"],
    "trainable=adapter": ["peft=lora"],
    "engine=forward_mode": ["estimator=forward_gradient"],
    "engine=llamacpp": ["peft=lora", "trainable=adapter"],
    "engine=onnx": ["peft=lora", "trainable=adapter"],
    "engine=server": ["peft=lora", "trainable=adapter"],
    "subspace=nodes": ["estimator=nodes"],
    "estimator=nodes": ["subspace=nodes"],
    "optimizer=whiten": ["subspace=nodes", "estimator=nodes"],
}
EVERY_CHOICE = [f"{group}={name}" for group in ORDER if group != "launcher" for name in choices(group)]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, text: str) -> str:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(text))
    return path


# ------------------------------------------------------------------------------------------------------------- shipped


def test_default_run_is_complete():
    cfg = compose([])
    assert (cfg.config, cfg.method, cfg.seed, cfg.output_dir) == ("run", "zoft", 0, "runs/run-seed0")
    assert isinstance(cfg.estimator, Nodes)
    assert isinstance(cfg.optimizer, Whiten)
    assert cfg.budget.queries == 2_000
    assert cfg.trainer["per_device_train_batch_size"] == 16


@pytest.mark.parametrize("choice", EVERY_CHOICE)
def test_every_choice_composes(choice: str):
    compose([choice, *NEEDS.get(choice, [])])


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_listing_by_file_name_agrees_with_the_components(group: str):
    assert component_names(group) == sorted(components(group))


@pytest.mark.parametrize("name", choices("config"))
def test_every_experiment_survives_the_round_trip(name: str):
    cfg = compose([f"config={name}", "seed=3"])
    Path("kept.yaml").write_text(resolved_yaml(cfg))
    assert compose(["config=kept.yaml"]) == cfg


def test_every_shipped_file_is_in_a_known_group_and_says_what_it_is_for():
    assert SHIPPED
    for file in SHIPPED:
        assert file.parent.name in ORDER, file
        assert len(first_comment(file)) > 10, file


def test_no_shipped_file_repeats_a_component():
    for group in GROUPS:
        assert not set(preset_files(group)) & set(components(group))


def test_every_key_of_the_schema_is_explained_in_train_yaml():
    from dataclasses import fields

    from zoft.config.schema import BudgetConfig, ModelConfig, TrackerConfig, ZoftConfig

    text = (configs_dir() / "train.yaml").read_text()
    for field in fields(ZoftConfig):
        assert f"{field.name}:" in text or f"{field.name}." in text, field.name
    for section, cls in (("model", ModelConfig), ("budget", BudgetConfig), ("tracker", TrackerConfig)):
        for field in fields(cls):
            assert f"# {section}.{field.name} " in text


def test_train_yaml_states_the_schemas_own_defaults():
    from zoft.config.schema import ZoftConfig

    cfg = compose([])
    assert cfg.seed == ZoftConfig.__dataclass_fields__["seed"].default
    assert ZoftConfig.__dataclass_fields__["output_dir"].default in (configs_dir() / "train.yaml").read_text()


# ---------------------------------------------------------------------------------------------------------- precedence


def test_argument_wins_over_method_wins_over_experiment():
    write("mine.yaml", "defaults: [override /estimator: one_sided]\nestimator: {eps: 0.5, num_directions: 7}")
    assert compose(["config=mine.yaml"]).estimator == OneSided(eps=0.5, num_directions=7)
    assert compose(["config=mine.yaml", "method=mezo"]).estimator == Central(eps=1e-3, num_directions=1)
    assert compose(["method=mezo", "config=mine.yaml"]).estimator == Central(eps=1e-3, num_directions=1)
    cfg = compose(["config=mine.yaml", "method=mezo", "estimator=one_sided", "estimator.eps=0.25", "optimizer=adam"])
    assert cfg.estimator == OneSided(eps=0.25, num_directions=1)
    assert isinstance(cfg.optimizer, Adam)
    assert cfg.method == "mezo"


def test_quickstart_with_everything_replaced():
    cfg = compose(["config=quickstart", "method=mezo", "optimizer=adam", "estimator.eps=1e-2"])
    assert (cfg.config, cfg.method, cfg.estimator.radius, type(cfg.optimizer)) == ("quickstart", "mezo", 0.01, Adam)


def test_experiment_wins_over_the_method_it_chooses_itself():
    write("mine.yaml", "defaults: [override /method: mezo_adam]\nestimator: {eps: 0.5}\noptimizer: {adam_beta1: 0.5}")
    cfg = compose(["config=mine.yaml"])
    assert cfg.method == "mezo_adam"
    assert cfg.estimator.radius == 0.5
    assert cfg.optimizer == Adam(learning_rate=1e-5, adam_beta1=0.5)


def test_an_arguments_method_replaces_the_experiments():
    """Its own values win; a value that it says nothing of is still the experiment's."""
    write(
        "mine.yaml",
        "defaults: [override /method: mezo_adam]\n"
        "estimator: {eps: 0.5}\n"
        "optimizer: {learning_rate: 2.0, weight_decay: 0.5}",
    )
    cfg = compose(["config=mine.yaml", "method=zo_sgd_mmt"])
    assert (cfg.method, cfg.estimator.radius) == ("zo_sgd_mmt", 1e-3)
    assert cfg.optimizer == Momentum(learning_rate=1e-6, weight_decay=0.5, beta=0.9)
    assert compose(["config=mine.yaml", "method=null"]).method is None


def test_settings_of_a_replaced_part_are_left_out(caplog: pytest.LogCaptureFixture):
    cfg = compose(["method=mezo", "estimator=forward_gradient"])
    assert cfg.estimator == ForwardGradient(num_directions=1)
    assert "estimator.eps" in caplog.text
    assert "mezo.yaml" in caplog.text


def test_settings_that_the_replacement_has_too_are_kept():
    write("mine.yaml", "optimizer: {learning_rate: 3e-4}\nestimator: {eps: 0.5}")
    cfg = compose(["config=mine.yaml", "optimizer=momentum", "estimator=one_sided"])
    assert cfg.optimizer == Momentum(learning_rate=3e-4)
    assert cfg.estimator == OneSided(eps=0.5)


def test_a_setting_of_a_part_nobody_replaced_is_a_mistake():
    write("mine.yaml", "defaults: [override /estimator: forward_gradient]\nestimator: {eps: 0.5}")
    with pytest.raises(UserError, match=r"mine\.yaml.*forward_gradient has no 'eps'"):
        compose(["config=mine.yaml"])
    with pytest.raises(UserError, match=r"mine\.yaml.*forward_gradient has no 'eps'"):
        compose(["config=mine.yaml", "estimator=forward_gradient"])


def test_model_preset_is_not_overwritten_by_the_defaults():
    assert compose(["model=qwen3_0_6b"]).model.dtype == "bfloat16"


def test_experiment_built_on_another():
    write("mine.yaml", "defaults: [smoke, _self_, override /estimator: one_sided]\nseed: 4")
    cfg = compose(["config=mine.yaml"])
    assert (cfg.budget, cfg.seed, cfg.config) == (compose(["config=smoke"]).budget, 4, "mine")
    assert isinstance(cfg.estimator, OneSided)


# ----------------------------------------------------------------------------------------------------- a user's own


def test_path_with_and_without_the_package_line():
    write("a/mine.yaml", "# @package _global_\nseed: 5\n")
    write("b/mine.yaml", "seed: 6\n")
    assert compose(["config=a/mine.yaml"]).seed == 5
    assert compose(["config=b/mine.yaml"]).seed == 6
    assert compose([f"config={Path('b/mine.yaml').resolve()}"]).output_dir == "runs/mine-seed6"


def test_paths_that_hydras_grammar_would_stumble_over():
    signs = [f"{sign}/a (1).yaml" for sign in ("'", '"', "{", "[", "${x}", "\\", "\\'\\", " ", "a: b#", "%", "@")]
    for path in ("out/seed=0,task=x/config.yaml", "a b.yaml", "a,b.yaml", *signs):
        write(path, "seed: 5\n")
        assert compose([f"config={path}"]).seed == 5
    assert compose(["output_dir=out/seed=1,task=x"]).output_dir == "out/seed=1,task=x"
    assert compose(["model.name=/models/step=5"]).model.name == "/models/step=5"


def test_letters_that_hydras_grammar_has_not():
    """Files whose names differ in such letters or signs alone stay apart."""
    loader = Loader()
    for seed, path in enumerate(("é/a.yaml", "日/a.yaml", "b/ä.yaml", "b/_.yaml", "b/_.yml")):
        write(path, f"seed: {seed}\n")
        assert loader.load([f"config={path}"]).seed == seed
    assert len(set(loader.experiments.files)) == 5


def test_own_configs_folder():
    write("configs/config/mine.yaml", "seed: 5\n")
    write("configs/flat.yaml", "seed: 6\n")
    write("configs/model/tiny.yaml", "# Tiny.\nname: ./tiny\n")
    write("configs/estimator/wide.yaml", "# Wide.\ndefaults: [one_sided, _self_]\nnum_directions: 64\n")
    assert compose(["config=mine", "model=tiny"]).model.name == "./tiny"
    assert compose(["config=flat"]).seed == 6
    assert compose(["estimator=wide"]).estimator == OneSided(num_directions=64)
    assert compose(["config=quickstart"]).config == "quickstart"


def test_own_configs_folder_hides_a_shipped_experiment():
    write("configs/config/quickstart.yaml", "seed: 77\n")
    assert compose(["config=quickstart"]).seed == 77


def test_a_foreign_train_yaml_changes_nothing():
    write("configs/train.yaml", "defaults: [whatever: x]\nlr: 1\n")
    assert compose(["config=quickstart"]).config == "quickstart"


def test_a_changed_file_is_read_again():
    write("mine.yaml", "seed: 5")
    assert compose(["config=mine.yaml"]).seed == 5
    write("mine.yaml", "seed: 6")
    assert compose(["config=mine.yaml"]).seed == 6


# ------------------------------------------------------------------------------------- parts that were chosen before


@pytest.mark.parametrize(
    "words",
    [
        "config=quickstart method=nodes optimizer.learning_rate=2 trainer.use_cpu=true budget.queries=7",
        "task=sst2 estimator=one_sided estimator.eps=1e-2",
        "peft=lora seed=3 task=custom task.train=zoft:trec-questions",
        "method=mezo estimator=forward_gradient output_dir=elsewhere",
        "config=reward task.train=x.jsonl objective.function=my:score engine=offload",
    ],
)
def test_parts_chosen_before_and_new_values_are_what_hydra_composes_at_once(words: str):
    hydras = Loader().load_configuration(PRIMARY, words.split(), RunMode.RUN)
    with open_dict(hydras):
        del hydras["hydra"]
    for seed in ("seed=5", "seed=6"):  # the first puts the parts together, if no test before it has
        Loader().load([*words.split(), "optimizer.learning_rate=9", seed])
    assert Loader().load(words.split()) == hydras


def test_what_is_refused_or_noted_the_first_time_is_again(caplog: pytest.LogCaptureFixture):
    write("code.yaml", "objective: {function: os:system}\ndefaults: [override /objective: reward]")
    compose(["config=code.yaml", "objective.function=os:system"])
    for _ in range(2):
        caplog.clear()
        compose(["method=mezo", "estimator=forward_gradient"])
        assert "estimator.eps of" in caplog.text
        with pytest.raises(UserError, match="optimizer=sgd has no 'beta'"):
            compose(["method=mezo", "optimizer.beta=1"])
        with pytest.raises(UserError, match=r"optimizer\.learning_rate must be a number"):
            compose(["method=mezo", "optimizer.learning_rate=[1]"])
        with pytest.raises(UserError, match=r"code\.yaml names a function to call, objective\.function=os:system"):
            compose(["config=code.yaml"])
        with pytest.raises(UserError, match=r"code\.yaml names a function to call, objective\.function=os:system"):
            compose(["config=code.yaml", "objective.function=my:score"])


# ---------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_trainer_takes_training_arguments_with_and_without_plus(prefix: str):
    cfg = compose([f"{prefix}trainer.dataloader_num_workers=2", f"{prefix}trainer.logging_steps=3"])
    assert cfg.trainer["dataloader_num_workers"] == 2
    assert cfg.trainer["logging_steps"] == 3


def test_open_mappings_and_lists():
    cfg = compose(
        [
            "task=custom",
            "task.words={ham: No, spam: Yes}",
            "trainer.lr_scheduler_type=polynomial",
            "trainer.lr_scheduler_kwargs={power: 2}",
            "peft=lora",
        ]
    )
    assert cfg.task.words == {"ham": "No", "spam": "Yes"}
    assert cfg.trainer["lr_scheduler_kwargs"] == {"power": 2}
    assert compose(["task=custom", "task.words.ham=No"]).task.words == {"ham": "No"}
    assert compose(["peft=lora", "peft.target_modules=[q,v]"]).peft.target_modules == ["q", "v"]


def test_round_trip_keeps_parts_settings_and_names():
    cfg = compose(
        ["config=mezo_sst2", "method=n_spsa", "peft=lora", "estimator=one_sided", "trainer.eval_steps=7", "seed=2"]
    )
    Path("config.yaml").write_text(resolved_yaml(cfg))
    again = compose(["config=config.yaml"])
    assert again == cfg
    assert (again.config, again.method) == ("mezo_sst2", "n_spsa")
    assert "${" not in resolved_yaml(cfg)
    assert resolved_yaml(again) == resolved_yaml(cfg)
    assert compose(["config=config.yaml", "estimator=central", "output_dir=x"]).output_dir == "x"


def test_what_the_fields_of_training_arguments_are():
    transformers_args = pytest.importorskip("transformers.training_args")
    import dataclasses

    from zoft.config.training_arguments import fields

    real = {field.name for field in dataclasses.fields(transformers_args.TrainingArguments) if field.init}
    assert real <= set(fields())
