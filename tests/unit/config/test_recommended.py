"""The method of a run that names none: which, why, and that a composition by hand is left alone."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import transformers

from zoft.config import compose, recommended
from zoft.config.resolved import resolved_yaml

ROWS = {
    "labels.jsonl": {"text": "free", "label": "spam"},
    "choices.jsonl": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "prompts.jsonl": {"prompt": "a", "reward": "b"},
}


@pytest.fixture(autouse=True)
def _rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, row in ROWS.items():
        Path(name).write_text(json.dumps(row) + "\n")
    for name, said in (("transposed", {"model_type": "gpt_oss"}), ("mixture", {"model_type": "mixtral"})):
        Path(name).mkdir()
        (Path(name) / "config.json").write_text(json.dumps({"text_config": said}))


@pytest.mark.parametrize(
    ("words", "method", "why"),
    [
        ("", "zoft", "fewest queries"),
        ("config=classify task.train=labels.jsonl", "zoft", "fewest queries"),
        ("config=preference task.train=choices.jsonl", "zoft", "fewest queries"),
        ("task=custom task.train=labels.jsonl peft=lora", "zoft", "fewest queries"),
        ("task=custom task.train=missing.jsonl", "zoft", "fewest queries"),
        ("task=sst2 model.name=mixture optimizer.learning_rate=2", "zoft", "fewest queries"),
        ("task=custom task.train=prompts.jsonl", "mezo", "objective=reward gives each written text one number"),
        ("task=custom task.train=prompts.jsonl peft=lora", "zo_adam", "objective=reward gives each written text"),
        ("task=sst2 objective=metric trainable=norms_and_biases", "zo_adam", "objective=metric gives"),
        ("task=sst2 objective=expression objective.formula=2*options", "mezo", "one number for all"),
        ("task=sst2 peft=prefix", "zo_adam", "peft=prefix trains inputs"),
        ("task=sst2 engine=offload", "mezo", "engine=offload perturbs weights"),
        ("peft=lora engine=server", "zo_adam", "engine=server runs forwards elsewhere"),
        ("task=sst2 protocol=mezo", "mezo", "protocol=mezo"),
        ("task=sst2 budget.queries=4", "mezo", "node directions may need 5 queries for their first step"),
        ("task=sst2 model.name=transposed", "mezo", "experts of this mixture lie transposed"),
    ],
)
def test_a_run_without_a_method_takes_what_serves_and_says_why(words: str, method: str, why: str):
    cfg = compose(words.split())
    assert cfg.method == method
    assert cfg.chosen.startswith(f"chosen  method={method}, as none was named: ")
    assert why in cfg.chosen
    assert (cfg.subspace.name() == "nodes") == (method == "zoft")


@pytest.mark.parametrize(
    "words",
    [
        "estimator=one_sided",
        "optimizer=adam",
        "subspace=low_rank",
        "weighting=sign",
        "method=mezo",
        "method=null",
        "config=smoke",
        "config=quickstart",
        "config=reward task.train=prompts.jsonl",
        "config=mine.yaml",
    ],
)
def test_a_method_or_a_part_that_is_named_is_left_alone(words: str):
    Path("configs/config").mkdir(parents=True)
    Path("configs/config/base.yaml").write_text("# @package _global_\ndefaults: [override /optimizer: adam]\n")
    Path("mine.yaml").write_text("defaults: [base]\ntask: {num_train: 8}\n")
    cfg = compose(words.split())
    assert cfg.chosen == ""
    assert (cfg.subspace.name() == "nodes") == (words == "config=quickstart")


def test_what_an_experiment_sets_stands_above_the_method_that_was_chosen():
    Path("mine.yaml").write_text("optimizer: {learning_rate: 0.25}\n")
    cfg = compose(["config=mine.yaml"])
    assert (cfg.method, cfg.optimizer.learning_rate) == ("zoft", 0.25)


def test_the_written_config_names_the_parts_and_makes_the_same_run():
    cfg = compose(["task=sst2", "engine=offload"])
    Path("kept.yaml").write_text(resolved_yaml(cfg))
    again = compose(["config=kept.yaml"])
    assert dataclasses.replace(again, config="run") == cfg
    assert (again.method, again.chosen) == ("mezo", "")


def test_a_sweep_says_it_once_for_each_method(caplog: pytest.LogCaptureFixture):
    from zoft.config.loader import Loader
    from zoft.config.sweep import _base, expand

    loader = Loader()
    loader.sweeping = True
    _base(loader, list(expand(loader, ["seed=0,1", "engine=auto,offload"])))
    said = [record.getMessage().split(",")[0] for record in caplog.records]
    assert said == ["chosen  method=zoft", "chosen  method=mezo"]


@pytest.mark.parametrize(
    ("words", "method"),
    [
        (["trainable=scales"], "qzo"),
        (["task=sst2", "budget.queries=4"], "mezo"),  # four probes and a clean forward do not fit
    ],
)
def test_scales_have_their_own_and_a_budget_pays_for_the_first_step(words: list[str], method: str):
    assert compose(words).method == method


@pytest.mark.parametrize(
    ("words", "on"),
    [
        (["peft=lora"], "feed_forward"),
        (["peft=lora", "method=nodes"], "feed_forward"),
        (["peft=lora", "method=mezo"], "auto"),
        (["peft=lora", "peft.on=peft"], "peft"),
        (["peft=lora", "peft.target_modules=[q_proj]"], "auto"),
    ],
)
def test_where_a_lora_goes_that_nobody_has_placed(words: list[str], on: str):
    cfg = compose(["task=custom", "task.train=labels.jsonl", *words])
    assert cfg.peft.on == on  # type: ignore[attr-defined]
    again = Path("again.yaml")
    again.write_text(resolved_yaml(cfg))
    assert compose(["config=again.yaml"]).peft.on == on  # type: ignore[attr-defined]


def test_the_model_types_whose_experts_are_not_served_are_those_of_transformers():
    """Its classes say in their decorator that matrices lie transposed, or have biases."""
    folder = Path(transformers.__file__).parent / "models"
    model_types = {
        path.parent.name
        for path in folder.glob("*/modeling_*.py")
        if re.search(r"use_experts_implementation\([^)]*(is_transposed|has_bias)=True", path.read_text())
    }
    assert model_types == {name.removesuffix("_text") for name in recommended._OTHER_EXPERTS}
