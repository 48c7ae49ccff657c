"""The method of a run that names none: node directions where they serve, else another one, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from zoft.config.catalog import preset_files
from zoft.config.experiments import Experiments, find, read
from zoft.engines._elsewhere import Elsewhere
from zoft.errors import UserError
from zoft.lm import formats
from zoft.lm.data.files import ASSET, SUFFIXES
from zoft.lm.objectives.base import Objective
from zoft.lm.tasks.base import Task
from zoft.utils.files import at_home

METHOD_GROUPS = ("subspace", "estimator", "weighting", "optimizer")
"""Who chooses one of these composes a method by hand."""
BEST, FULL, FEW, SCALES = "zoft", "mezo", "zo_adam", "qzo"
"""Where it serves; for a model's weights; for few of them (adapters, norms, biases); for a quantised base's scales."""
_OTHER_EXPERTS = ("aria", "aria_text", "gpt_oss", "openai_privacy_filter")
"""Model types whose experts lie transposed or have biases: node directions do not know their gradients."""
_PREFERRED = {"completion": "cross_entropy", "chat": "cross_entropy", "preference": "preference", "reward": "reward"}


class Recommended(NamedTuple):
    """A method and why it is taken.

    Args:
        method: name of a preset.
        why: half a sentence.
    """

    method: str
    why: str

    def line(self) -> str:
        """For the console."""
        return f"chosen  method={self.method}, as none was named: {self.why} (docs/which_method.md)"


def is_named(parsed: list[Override], experiments: Experiments) -> bool:
    """Whether arguments or the experiment that they name choose a method, or a part of one."""
    if any(one.key_or_group in ("method", *METHOD_GROUPS) for one in parsed):
        return True
    chosen = [str(one.value()) for one in parsed if one.key_or_group == "config" and not one.is_delete()]
    content = experiments.contents.get(chosen[-1]) if chosen else None
    return content is not None and _names(content)


def _names(content: DictConfig) -> bool:
    """Whether a file's defaults, or those of an experiment that it builds on, choose a method or a part."""
    for entry in OmegaConf.to_container(content, resolve=False).get("defaults") or []:
        if isinstance(entry, dict):
            groups = {str(key).split()[-1].lstrip("/") for key, value in entry.items() if value is not None}
            if groups & {"method", *METHOD_GROUPS}:
                return True
        elif isinstance(entry, str) and (name := entry.removeprefix("/config/")) in preset_files("config"):
            file = find(name)
            if _names(read(file, str(file))):
                return True
    return False


def recommended(cfg: DictConfig) -> Recommended:
    """What serves a run best, of all that is known before its model is loaded.

    Args:
        cfg: composed with :data:`BEST`; nothing of it is changed.
    """
    if _name(cfg, "trainable") == "scales":
        return Recommended(SCALES, "it trains the scales of a quantised base")
    why = why_not(cfg)
    if why is None:
        return Recommended(BEST, "node directions learn from the fewest queries, and serve here")
    few = _name(cfg, "peft") != "none" or _name(cfg, "trainable") in ("norms_and_biases", "adapter")
    return Recommended(FEW if few else FULL, f"{why}, so directions are in the weights")


def why_not(cfg: DictConfig) -> str | None:
    """Why node directions do not serve; None where they do."""
    engine, peft = _name(cfg, "engine"), _name(cfg, "peft")
    if cfg.protocol == "mezo":
        return "protocol=mezo is MeZO's own step"
    if engine not in ("auto", "nodes"):
        away = issubclass(OmegaConf.get_type(cfg, "engine"), Elsewhere)
        return f"engine={engine} {'runs forwards elsewhere' if away else 'perturbs weights'}"
    if peft in ("prefix", "prompt"):
        return f"peft={peft} trains inputs of layers and not layers"
    first = _first_step(cfg)
    if first is not None and cfg.budget.queries < first:
        return f"node directions may need {first} queries for their first step, and budget.queries={cfg.budget.queries}"
    objective = _objective(cfg)
    if objective is not None and not objective.feedbacks:
        return f"objective={objective.name()} is one number for all that the model says"
    if objective is not None and objective.feedbacks == ("loss",):
        begin = " (begin with config=reward, which has an optimizer, eps and rate for that)"
        return f"objective={objective.name()} gives each written text one number and nothing else{begin}"
    if peft == "none" and _has_other_experts(str(cfg.model.name)):
        return "experts of this mixture lie transposed, or have biases"
    return None


def _name(cfg: DictConfig, group: str) -> str:
    cls: Any = OmegaConf.get_type(cfg, group)
    return str(cls.name())


def _first_step(cfg: DictConfig) -> int | None:
    """Queries of the first step; None where a setting of the estimator is wrong, which is said where it is checked."""
    try:
        queries: int = OmegaConf.to_object(cfg.estimator).queries_at(0)
    except UserError:
        return None
    return queries


def _objective(cfg: DictConfig) -> Objective | None:
    """The objective as the rows will have it; None where that is not known, or a setting of it is wrong."""
    try:
        objective: Any = OmegaConf.to_object(cfg.objective)
        task: Any = OmegaConf.to_object(cfg.task)
        return objective if objective.name() != "auto" else _usual(task)
    except Exception:  # an error of any kind is said where the run reads the same rows
        return None


def _usual(task: Task) -> Objective | None:
    from zoft.component import create

    kind = task.kind
    task_format = str(getattr(task, "format", ""))
    if task_format == "auto" and kind != "head":
        source = str(getattr(task, "train", ""))
        if not source.endswith(SUFFIXES) or source.startswith(ASSET):
            return None  # of the hub: not fetched to compose a config
        task_format = task.reading().format  # type: ignore[attr-defined]
    objective: Objective = create("objective", _PREFERRED.get(task_format) or formats.FORMS[kind].objective, "options")
    return objective


def _has_other_experts(name: str) -> bool:
    """Whether the config beside a model's weights names such a model type; False where none can be read."""
    try:
        said = json.loads((_folder(name) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, UserError):
        return False
    parts = [said, *(value for value in said.values() if isinstance(value, dict))] if isinstance(said, dict) else []
    return any(part.get("model_type") in _OTHER_EXPERTS for part in parts)


def _folder(name: str) -> Path:
    """Where a model lies on this machine: a folder, or the hub's cache."""
    folder = at_home(name)
    if folder.is_dir() or name.startswith("zoft:"):
        return folder
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    return Path(cached).parent if isinstance(cached, str) else folder
