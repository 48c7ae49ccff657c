"""A bench from its YAML file and its command line, every key checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from pathlib import Path
from typing import Any

import yaml

from zoft.bench.ledger import Ledger
from zoft.bench.plan import BUILT_IN, FIELDS, MODES, STANDARD, Cell, Entry, Plan
from zoft.config import texts
from zoft.config.catalog import preset_files
from zoft.config.schema import ZoftConfig
from zoft.errors import UserError, did_you_mean
from zoft.utils.words import read_words

_VARIED = {
    "seed": "seeds",
    "method": "methods",
    "task": "tasks",
    "task.prompt": "prompts",
    "budget.queries": "queries",
    "optimizer.learning_rate": "rates, and learning_rate of a method",
    "output_dir": "output_dir",
    **dict.fromkeys(("trainer.eval_strategy", "trainer.eval_steps", "trainer.eval_on_start"), "evaluations"),
    **dict.fromkeys(("trainer.save_strategy", "trainer.save_steps", "trainer.save_total_limit"), "evaluations"),
    **dict.fromkeys(("trainer.logging_steps", "trainer.run_name"), "evaluations"),
    **dict.fromkeys(("trainer.metric_for_best_model", "trainer.greater_is_better"), "select"),
    "trainer.load_best_model_at_end": "select",
}
"""Arguments of `zoft train` that a bench sets itself -> its own key for them."""

_OF_TASK = ("task", "model", "objective", "precision")
_OF_METHOD = ("subspace", "estimator", "weighting", "optimizer", "engine", "peft", "trainable", "trainer")
_TEXTS = dict.fromkeys(("base", "references", "prompts"), texts.Text()) | {
    "tasks": texts.Each(texts.Text()),
    "methods": texts.Each({"arguments": texts.Text()}),
    **dict.fromkeys(("baseline", "select", "output_dir"), texts.Text()),
}
"""Where a bench's file has text."""

_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def read_plan(words: list[str]) -> Plan:
    """The bench that a command line describes.

    Args:
        words: ``config=`` (a file of configs/bench, a path, or an experiment of `zoft train`), keys of :class:`Plan`,
            and arguments of `zoft train` for every cell; or ``output_dir=`` alone, for the plan that was run there.

    Raises:
        UserError: a file or key that is not there, a value of another kind, an argument that the bench itself varies.
    """
    settings, training, _, _ = read_words("bench", words, keys=(*FIELDS, "config"))
    if "config" not in settings:
        if settings.keys() == {"output_dir"} and not training:
            return Ledger(settings["output_dir"]).plan()
        raise UserError(
            "zoft bench needs config=: a file of configs/bench (config=demo), a path, or an experiment; or output_dir= "
            "alone, the folder of a bench that has begun"
        )
    name = settings.pop("config")
    content, about = _content(name)
    of_file = content.get("methods")
    for key, text in settings.items():
        content[key] = _value(key, text, content)
    if isinstance(content.get("methods"), dict) and isinstance(of_file, dict):  # references keep what the file says
        references = {name: of_file[name] for name in _list(content.get("references", [])) if name in of_file}
        content["methods"] = references | content["methods"]
    plan = _made(content)
    plan.about = about
    # of the command line: what a file says of them may be for other references, and another target
    if "demonstrations" in settings and "icl" not in plan.references:
        raise UserError("demonstrations does nothing: they are shown under icl: leave it out, or add icl to references")
    if "baseline" in settings and plan.target is not None:
        raise UserError(f"baseline does nothing: queries are counted to target={plan.target:g}: leave it out")
    plan.base += training
    plan.output_dir = plan.output_dir or f"runs/bench-{about}"
    _check(plan)
    return plan


def fill_in(plan: Plan) -> None:
    """Compose every method with one task and every task with one method, so that a mistake is found now.

    A bench without tasks is of its base's; one without ``queries`` has its base's budget; a method without a learning
    rate has its own, and the forward gradient as a reference that of the method it is compared with.

    Raises:
        UserError: what `zoft train` would say, and of which part of the bench.
    """
    from zoft.config import compose
    from zoft.evaluation.evaluate import SERVES

    if not plan.tasks:
        plan.tasks = {compose(plan.base).task.name(): []}
    plan.queries = plan.queries or compose([*plan.base, *next(iter(plan.tasks.values()))]).budget.queries
    if plan.budgets and max(plan.budgets) >= plan.queries:
        raise UserError(f"budgets must be below queries={plan.queries}, got {plan.budgets}")
    first = (next(iter(plan.tasks)), plan.prompts[0])
    for task in plan.tasks:
        for prompt in plan.prompts:
            cfg = _composed(plan, Cell(task, prompt, plan.runs[0], 1.0, plan.seeds[0]))
            plan.digests[f"{task}/{prompt}"] = _digest(cfg, _OF_TASK)
            unfit = (mode for mode in plan.modes if cfg.task.kind not in SERVES.get(mode, (cfg.task.kind,)))
            plan.unfit |= {(task, prompt, mode) for mode in unfit}
    for method in plan.runs:
        cfg = _composed(plan, Cell(*first, method, 1.0, plan.seeds[0]))
        if cfg.auto:
            raise UserError(f"{cfg.auto[0]}=auto is chosen by zoft train alone: give a value")
        for budget in plan.all_budgets:
            cfg.composition.steps_within(budget)
        plan.digests[method] = _digest(cfg, _OF_METHOD)
        entry = plan.methods[method]
        entry.learning_rate = entry.learning_rate or _rate_of_compared(plan, method) or cfg.optimizer.learning_rate


_EXACT = "forward_gradient"
"""The reference that takes the steps of a finite-difference method without its error: at the same learning rate."""


def _rate_of_compared(plan: Plan, method: str) -> float | None:
    """For the exact reference without a rate of its own, that of the method it is compared with."""
    if method != _EXACT or method not in plan.references:
        return None
    methods = [name for name in plan.runs if name not in plan.references]  # filled in before the references
    compared = next((name for name in (plan.baseline, "mezo") if name in methods), methods[0] if methods else None)
    return plan.methods[compared].learning_rate if compared else None


def _composed(plan: Plan, cell: Cell) -> ZoftConfig:
    from zoft.config import compose

    try:
        return compose(plan.arguments(cell))
    except UserError as error:
        raise UserError(f"{error} (in the cell {cell.task}, prompt {cell.prompt}, {cell.method})") from error


def _digest(cfg: ZoftConfig, parts: tuple[str, ...]) -> str:
    """A number for what a config's files say of these parts, and for the data files it reads."""
    stamps = [repr(getattr(cfg, part)) for part in parts]
    sources = [str(getattr(cfg.task, name, "")) for name in ("train", "validation")] if "task" in parts else []
    stamps += [f"{file.stat().st_size} {file.stat().st_mtime_ns}" for name in sources if (file := Path(name)).is_file()]
    return hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:8]


def _content(name: str) -> tuple[dict[str, Any], str]:
    """What a bench's file says; an experiment stands for a bench of its own task."""
    from zoft.config.experiments import find, is_path, yaml_message

    benches = preset_files("bench")
    if not is_path(name) and name not in benches:
        if name in preset_files("config"):
            return {"base": [f"config={name}"]}, name
        raise UserError(f"there is no bench called {name!r}.{did_you_mean(name, [*benches, *preset_files('config')])}")
    file = find(name) if is_path(name) else benches[name]
    try:
        content = texts.load(file.read_text(encoding="utf-8"), _TEXTS, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(yaml_message(error, str(file))) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if isinstance(content, dict) and content and not content.keys() & (set(FIELDS) - {"output_dir"}) and is_path(name):
        return {"base": [f"config={name}"]}, Path(name).stem  # an experiment's file
    if not isinstance(content, dict):
        raise UserError(f"{file}: a bench is a mapping of keys to values (key: value)")
    for key in content:
        if key not in FIELDS:
            raise UserError(f"{file}: a bench has no key {key!r}.{did_you_mean(str(key), FIELDS)}")
    return content, file.stem


def _value(key: str, text: str, content: dict[str, Any]) -> Any:
    """A key's value from the command line; methods and tasks named there keep what the file says of them."""
    try:
        value = texts.load(text, _TEXTS.get(key), yaml.SafeLoader)
    except yaml.YAMLError:
        value = text
    if key in ("methods", "tasks") and isinstance(value, str | list):
        names = _words(value, key)
        section = content.get(key) or {}
        return {name: section.get(name) if isinstance(section, dict) else None for name in names}
    return value


def _made(content: dict[str, Any]) -> Plan:
    """A plan from plain values, each of its own kind."""
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key == "tasks":
            tasks = dict.fromkeys(_words(value, key)) if isinstance(value, list) else _map(value, key)
            values[key] = {
                str(name): [f"task={name}"] if arguments is None else _words(arguments, f"tasks.{name}")
                for name, arguments in tasks.items()
            }
        elif key == "methods":
            methods = dict.fromkeys(_words(value, key)) if isinstance(value, list) else _map(value, key)
            values[key] = {str(name): _entry(settings, str(name)) for name, settings in methods.items()}
        elif key in ("base", "references", "prompts"):
            values[key] = _words(value, key)
        elif key in ("seeds", "budgets"):
            values[key] = [_number(one, key, int) for one in _list(value)]
        elif key == "rates":
            values[key] = [_number(one, key, float) for one in _list(value)]
        elif key in ("queries", "grow", "demonstrations", "evaluations", "jobs"):
            values[key] = _number(value, key, int)
            if key == "queries" and values[key] < 1:
                raise UserError(f"queries must be at least 1, got {value!r}")
        elif key == "target":
            values[key] = None if value is None else _number(value, key, float)
        else:
            values[key] = str(value)
    if "methods" in values and not values["methods"]:
        raise UserError("methods must be a list of at least one value, got none")
    plan = Plan(**values)
    if not plan.methods:
        plan.methods = {name: Entry() for name in STANDARD}
    for name in plan.references:
        if name not in MODES:
            plan.methods.setdefault(name, Entry())
    return plan


def _entry(settings: Any, name: str) -> Entry:
    if settings is None or isinstance(settings, Entry):
        return settings or Entry()
    if isinstance(settings, int | float | str) and not isinstance(settings, bool):
        return Entry(_number(settings, f"methods.{name}", float))
    known = [f.name for f in dataclasses.fields(Entry)]
    values = _map(settings, f"methods.{name}")
    for key in values:
        if key not in known:
            raise UserError(f"methods.{name} has no key {key!r}.{did_you_mean(str(key), known)}")
    rate = values.get("learning_rate")
    return Entry(
        None if rate is None else _number(rate, f"methods.{name}.learning_rate", float),
        _words(values.get("arguments"), f"methods.{name}.arguments"),
    )


def _map(value: Any, key: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{key} must be a mapping of names to settings, got {value!r}")
    return value


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _words(value: Any, key: str) -> list[str]:
    words = [] if value is None else _list(value)
    if not all(isinstance(word, str) for word in words):
        raise UserError(f"{key} must be a list of words, got {value!r}; one with a colon in it wants quotes")
    return list(words)


def _number(value: Any, key: str, kind: type) -> Any:
    try:
        number = kind(value)
        whole = kind is float or float(value) == number
    except (TypeError, ValueError, OverflowError):
        number, whole = math.nan, False
    if not whole or isinstance(value, bool) or not math.isfinite(number):
        raise UserError(f"{key} must be {'whole numbers' if kind is int else 'numbers'}, got {value!r}")
    return number


def _check(plan: Plan) -> None:
    """Refuse what makes no bench."""

    def need(ok: bool, key: str, rule: str) -> None:
        if not ok:
            raise UserError(f"{key} must be {rule}, got {getattr(plan, key)!r}")

    for key in ("prompts", "seeds", "rates", "references"):
        values = getattr(plan, key)
        need(bool(values) or key == "references", key, "a list of at least one value")
        need(len(set(values)) == len(values), key, "a list without repeated values")
    need(all(rate > 0 for rate in plan.rates), "rates", "factors above 0")
    need(all(seed >= 0 for seed in plan.seeds), "seeds", "0 or more")
    need(len(set(plan.budgets)) == len(plan.budgets), "budgets", "a list without repeated values")
    need(all(one >= 1 for one in plan.budgets), "budgets", "1 or more")
    need(plan.jobs >= 1, "jobs", "at least 1")
    need(plan.evaluations >= 1, "evaluations", "at least 1")
    need(plan.demonstrations >= 1, "demonstrations", "at least 1")
    need(plan.select in ("loss", "metric"), "select", "loss or metric")
    need(plan.grow >= 0, "grow", "0 or more")
    need(plan.target is None or plan.target > 0, "target", "a dev loss above 0")
    for name in (*plan.tasks, *plan.methods, *plan.prompts):
        if not _SLUG.fullmatch(name):
            raise UserError(f"{name!r} cannot name files: use letters, digits, and _.- between them")
    presets = preset_files("method")
    for name, entry in plan.methods.items():
        arguments = [*BUILT_IN.get(name, []), *entry.arguments]
        if name not in presets and not any(word.startswith("method=") for word in arguments):
            near = did_you_mean(name, [*presets, *BUILT_IN, *MODES])
            raise UserError(
                f"there is no method called {name!r}.{near} A method of your own names its parts: "
                f"methods: {{{name}: {{arguments: [method=mezo, ...]}}}}"
            )
        if entry.learning_rate is not None and entry.learning_rate <= 0:
            raise UserError(f"methods.{name}.learning_rate must be above 0, got {entry.learning_rate:g}")
    plan.baseline = plan.baseline or ("mezo" if "mezo" in plan.runs else plan.runs[0] if plan.runs else "")
    if plan.target is None and plan.runs and plan.baseline not in plan.runs:
        raise UserError(f"baseline={plan.baseline} is not among the methods: choose one of {', '.join(plan.runs)}")
    _refuse_varied(plan)


def _refuse_varied(plan: Plan) -> None:
    """Arguments of `zoft train` that a bench varies or sets itself."""
    given = [("base", plan.base, () if plan.tasks else ("task",))]
    given += [(f"tasks.{name}", words, ("task",)) for name, words in plan.tasks.items()]
    given += [(f"methods.{name}", entry.arguments, ("method",)) for name, entry in plan.methods.items()]
    for what, words, allowed in given:
        for word in words:
            key = word.partition("=")[0].lstrip("+")
            if key in _VARIED and key not in allowed:
                raise UserError(f"{word} ({what}): a bench sets that itself; its key is {_VARIED[key]}")
