"""Which keys `trainer.` accepts: the fields of `transformers.TrainingArguments`, read without importing it (5.7 s)."""

from __future__ import annotations

import ast
import difflib
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

from zoft.errors import UserError

HOMES = {
    "learning_rate": "optimizer.learning_rate",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.adam_beta1 (with optimizer=adam)",
    "adam_beta2": "optimizer.adam_beta2 (with optimizer=adam)",
    "adam_epsilon": "optimizer.adam_epsilon (with optimizer=adam)",
    "optim": "optimizer, e.g. optimizer=adam",
    "optim_args": "the fields of optimizer, e.g. optimizer.learning_rate",
    "seed": "seed",
    "output_dir": "output_dir",
    "precision_update": "precision.update",
    "report_to": "tracker.report_to, e.g. tracker=wandb",
    "project": "tracker.project",
    "max_steps": "budget.queries (training is counted in queries)",
    "num_train_epochs": "budget.queries (training is counted in queries)",
    "budget_queries": "budget.queries",
    "hub_token": "the environment variable HF_TOKEN (a config is kept with the run)",
}
"""Fields that have another home -> that home."""

REFUSED = {
    "frozen_prefix_disk_mb": "hidden states go to no file any more: leave it out, or raise trainer.frozen_prefix_mb",
    "disable_tqdm": "zoft shows its own progress bar, and plain lines where there is no terminal: leave it out",
    "resume_from_checkpoint": "leave it out: the same command resumes an unfinished run from its last checkpoint",
}
"""Fields that a run does not take -> why."""

UNHEEDED = {
    "label_smoothing_factor": "the run's objective computes the loss, and smooths no labels",
    "prediction_loss_only": "a run reports the metric of what the model predicts",
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"),
        "evaluations are of the weights as they are trained; trainer.bf16=true computes in bfloat16, training too",
    ),
    "ignore_data_skip": "a run that is resumed goes on with the rows that it would have had, and ends the same",
    "batch_eval_metrics": "the metric is of all held-out rows at once",
    "eval_do_concat_batches": "the metric is of all held-out rows at once",
    "include_for_metrics": "the metric reads predictions and answers alone",
    "label_names": "the task says what is an answer",
    "length_column_name": "the lengths of rows are counted",
    "do_train": "zoft train trains, evaluates and tests; zoft eval and zoft predict do without training",
    "do_eval": "when to evaluate is trainer.eval_strategy",
    "do_predict": "zoft predict run=DIR data=FILE answers new rows",
    "local_rank": "torchrun says which process this is",
    "parallelism_config": "what processes divide is trainer.parallel",
    "enable_jit_checkpoint": "a run that gets SIGTERM saves itself, and the same command continues it",
    "push_to_hub": "a finished run is published by `zoft export run=DIR --push OWNER/NAME`",
}
"""Fields that would change nothing in a run, or break it, unless they are left at transformers' default -> why."""

_SIMPLE: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}


@lru_cache
def fields() -> dict[str, str]:
    """Field name -> annotation as written, of TrainingArguments and of zoft's own arguments."""
    return {
        item.target.id: ast.unparse(item.annotation) for source, cls in _sources() for item in _assignments(source, cls)
    }


def explained() -> list[tuple[str, str, str, str]]:
    """(name, type, default, meaning) of every field that ``trainer.`` takes, as its own source has them."""
    rows: dict[str, tuple[str, str, str, str]] = {}
    for source, cls in _sources():
        for item in _assignments(source, cls):
            if item.target.id not in HOMES.keys() | REFUSED.keys():
                rows[item.target.id] = (item.target.id, ast.unparse(item.annotation), *_default_and_help(item.value))
    return [rows[name] for name in sorted(rows)]


@lru_cache
def _defaults() -> dict[str, str]:
    """Field name -> its default, as Python writes it."""
    return {name: default for name, _, default, _ in explained()}


def _sources() -> list[tuple[Path, str]]:
    """The files that define the fields, and the class in each."""
    sources = []
    transformers = importlib.util.find_spec("transformers")  # a top-level find_spec imports nothing
    if transformers is not None and transformers.submodule_search_locations:
        sources.append((Path(transformers.submodule_search_locations[0]) / "training_args.py", "TrainingArguments"))
    return [*sources, (Path(__file__).resolve().parent.parent / "trainer" / "config.py", "ZOConfig")]


def _default_and_help(value: ast.expr | None) -> tuple[str, str]:
    """What ``field(default=..., metadata={"help": ...})`` says; the text is put together where it is in pieces."""
    if not isinstance(value, ast.Call):
        return ("" if value is None else ast.unparse(value)), ""
    given = {keyword.arg: keyword.value for keyword in value.keywords}
    default, help_text = given.get("default", given.get("default_factory")), ""
    metadata = given.get("metadata")
    if isinstance(metadata, ast.Dict):
        for key, text in zip(metadata.keys, metadata.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "help":
                parts = [node.value for node in ast.walk(text) if isinstance(node, ast.Constant)]
                help_text = "".join(part for part in parts if isinstance(part, str)).replace("%%", "%")
    return ("" if default is None else ast.unparse(default)), help_text


def _assignments(source: Path, name: str) -> list[Any]:
    """The annotated fields of a class, as they stand in its file."""
    if not source.is_file():
        return []
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return [
                item
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                if not item.target.id.startswith("_") and "ClassVar" not in ast.unparse(item.annotation)
            ]
    return []


def check(name: str, value: Any, where: str) -> None:
    """Refuse a key of ``trainer`` that does not exist, lives elsewhere, or has a value of another type.

    Args:
        name: the key, without ``trainer.``.
        value: what it is set to.
        where: the file or argument that sets it, for the message.

    Raises:
        UserError: saying which key was meant.
    """
    if name in HOMES:
        raise UserError(f"{where}: trainer.{name} has its own place here: set {HOMES[name]}")
    if name in REFUSED:
        raise UserError(f"{where}: trainer.{name} cannot be set here: {REFUSED[name]}")
    known = fields()
    why = UNHEEDED.get("push_to_hub" if name.startswith("hub_") else name)
    if why and value is not None and repr(value) != _defaults().get(name):
        raise UserError(f"{where}: trainer.{name}={value} would not be heeded: {why}; leave it out")
    if known and name not in known:
        usable = known.keys() - HOMES.keys() - REFUSED.keys()
        raise UserError(
            f"{where}: trainer.{name} is not a field of transformers.TrainingArguments.{_near(name, usable)}"
        )
    if known and not _fits(value, known[name]):
        raise UserError(f"{where}: trainer.{name} must be {known[name].replace(' | ', ' or ')}, got {value!r}")


def _near(name: str, known: set[str]) -> str:
    # The right key may be one that has another home: `trainer.lerning_rate` means optimizer.learning_rate.
    near = difflib.get_close_matches(name, [*known, *HOMES], n=3, cutoff=0.6)
    if not near:
        return " transformers' documentation of TrainingArguments lists them all."
    return f" Did you mean {' or '.join(HOMES.get(key, f'trainer.{key}') for key in near)}?"


def _fits(value: Any, annotation: str) -> bool:
    """Whether a plain value can be right; anything but simple annotations is left to transformers."""
    parts = [part.strip() for part in annotation.split("|")]
    if isinstance(value, str) and "${" in value:
        return True
    if value is None:
        return "None" in parts or any(part not in _SIMPLE for part in parts)
    if any(part not in _SIMPLE and part != "None" for part in parts):
        return True
    allowed = tuple(kind for part in parts for kind in _SIMPLE.get(part, ()))
    if isinstance(value, bool):
        return bool in allowed
    return isinstance(value, allowed)
