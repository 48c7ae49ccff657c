"""`zoft eval`: metrics of a model, or of a run's final model, on held-out rows."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from zoft.errors import UserError
from zoft.lm.metrics.classes import table
from zoft.lm.metrics.passing import read_names
from zoft.utils.terminal import fitted, width_of
from zoft.utils.words import counted, read_words

_HARNESS = ("harness", "harness_limit", "harness_path")
_OURS = ("mode", "split", "evaluate", "metric", "pass_reward")
_KEYS = ("run", "k", *_OURS, *_HARNESS)


def command(arguments: list[str]) -> int:
    """Evaluate."""
    words = read_words("eval", arguments, keys=_KEYS, flags=["--json"])
    overrides, asked, as_json = words.rest, words.own, "--json" in words.flags
    from zoft.cli.train import _quiet
    from zoft.config import compose
    from zoft.evaluation import evaluate, harness
    from zoft.evaluation.harness_tasks import require_harness

    _quiet()
    run = asked.get("run", "")
    wanted: Any = _harness_settings(asked, overrides) if "harness" in asked else _settings(asked)
    place: Any = harness if "harness" in asked else evaluate
    make = harness.HarnessRequest if "harness" in asked else evaluate.Request
    request = make(**wanted)  # what is wrong with it is said before anything is read
    if "harness" in asked:
        require_harness()
    if run:
        run_config = f"config={evaluate.config_of_run(run, overrides)}"
        overrides = overrides if any(word.startswith("config=") for word in overrides) else [run_config, *overrides]
    cfg = compose(overrides, recorded=bool(run))
    given = any(word.startswith("output_dir=") for word in overrides)
    request = dataclasses.replace(request, output_dir=place.default_output_dir(cfg, request, given=given))
    facts = place.evaluate(cfg, request)
    if as_json:
        print(json.dumps(facts))
    else:
        print(fitted("\n".join(lines(facts))))
    return 0


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts for people.

    Example:
        >>> lines = lines({
        ...     "mode": "zero_shot", "model": "m", "task": "sst2", "split": "test", "num_rows": 2, "metric": "accuracy",
        ...     "accuracy": 0.5, "accuracy_low": 0.1, "accuracy_high": 0.9, "num_demonstrations": 0, "seconds": 1.0,
        ...     "num_computed_alone": 0, "output_dir": "out"})
        >>> print(lines[0])
        accuracy  50.0 % [10.0, 90.0] of m, zero_shot, on 2 test rows of sst2
    """
    if facts["mode"] == "harness":
        return _harness_lines(facts)
    metrics: list[str] = [name for name in ("accuracy", "f1", "exact_match", "reward", "loss") if name in facts]
    metrics.sort(key=lambda name: name != facts["metric"])
    metrics += [name for name in facts if name.startswith("pass@") and "_" not in name]
    shown = f", {facts['num_demonstrations']} demonstrations" if facts["num_demonstrations"] else ""
    rows = f"{facts['num_rows']:,} {facts['split']} rows of {facts['task']}"
    about = f" of {facts['model']}, {facts['mode']}{shown}, on {rows}"
    width = max(8, *map(len, metrics), 10 if "perplexity" in facts else 0)
    lines = [f"{name:<{width}}  {_value(facts, name)}" for name in metrics]
    lines[0] += about
    if "perplexity" in facts:
        lines.append(f"{'perplexity':<{width}}  {facts['perplexity']:.2f}")
    if "confusion" in facts:
        lines += ["", *table(facts, room=width_of()), f"{'macro F1':<{width}}  {facts['macro_f1']:.3f}", ""]
    lines += [f"{name:<{width}}  {value:.4g} (evaluate)" for name, value in facts.get("evaluate", {}).items()]
    if facts.get("num_ungraded"):
        lines.append(f"{'ungraded':<{width}}  {counted(facts['num_ungraded'], 'texts')}, see ungraded.jsonl")
    alone = facts["num_computed_alone"]
    closeness = f", {alone:,} of them again alone because a batch could have decided" if alone else ""
    lines.append(f"{'spent':<{width}}  {facts['seconds']:.1f} s for {counted(facts['num_rows'], 'rows')}{closeness}")
    lines.append(f"{'written':<{width}}  {facts['output_dir']}: predictions.jsonl, evaluation.json")
    return lines


def _harness_lines(facts: dict[str, Any]) -> list[str]:
    """A line for every group and task."""
    parts = facts["groups"] | facts["tasks"]
    width = max(8, *map(len, parts))
    lines = []
    for name, part in parts.items():
        metrics = ", ".join(_harness_value(metric, value) for metric, value in part["metrics"].items())
        shown = (
            f"of {len(part['tasks'])} tasks" if "tasks" in part else f"with {part['num_demonstrations']} demonstrations"
        )
        on = f"on {counted(part['num_rows'], 'rows')} {shown}"
        lines.append(f"{name:<{width}}  {metrics or 'no metric that is a number'}, {on}")
    lines[0] += f", by {facts['model']}"
    harness = f"lm_eval {facts['lm_eval']}"
    lines.append(f"{'spent':<{width}}  {facts['seconds']:.1f} s for {counted(facts['num_rows'], 'rows')}, {harness}")
    lines.append(f"{'written':<{width}}  {facts['output_dir']}: predictions.jsonl, evaluation.json")
    return lines


def _harness_value(metric: str, value: dict[str, Any]) -> str:
    scale, digits, unit = (100, 1, " %") if metric.startswith("acc") else (1, 3, "")
    interval = ""
    if "low" in value:
        interval = f" [{scale * value['low']:.{digits}f}, {scale * value['high']:.{digits}f}]"
    return f"{metric} {scale * value['value']:.{digits}f}{unit}{interval}"


def _value(facts: dict[str, Any], name: str) -> str:
    scale, digits, unit = (100, 1, " %") if name == "accuracy" or name.startswith("pass@") else (1, 3, "")
    lines = f"{scale * facts[name]:.{digits}f}{unit}"
    if f"{name}_low" in facts:
        low, high = (scale * facts[f"{name}_{end}"] for end in ("low", "high"))
        lines += f" [{low:.{digits}f}, {high:.{digits}f}]"
    return lines


def _settings(asked: dict[str, str]) -> dict[str, Any]:
    """Of a request for the config's own task."""
    lost = next((key for key in _HARNESS if key in asked), None)
    if lost:
        raise UserError(f"{lost}={asked[lost]} is read together with harness= alone: name tasks, harness=hellaswag")
    names = {"run": "run", "mode": "mode", "split": "split", "evaluate": "metric"}
    given: dict[str, Any] = {names[key]: value for key, value in asked.items() if key in names}
    if "k" in asked:
        if not asked["k"].isdecimal():
            raise UserError(f"k must be a whole number of demonstrations, got {asked['k']!r}")
        given["k"] = int(asked["k"])
    if "metric" in asked:
        given["pass_at"] = tuple(read_names(asked["metric"]))
    if "pass_reward" in asked:
        try:
            given["pass_reward"] = float(asked["pass_reward"])
        except ValueError:
            raise UserError(f"pass_reward must be a number, got {asked['pass_reward']!r}") from None
    return given


def _harness_settings(asked: dict[str, str], overrides: list[str]) -> dict[str, Any]:
    """Of a request for tasks of the harness, which have rows and metrics of their own."""
    ours = [key for key in asked if key in _OURS]
    ours += [word.partition("=")[0] for word in overrides if word.startswith(("task=", "task.", "objective"))]
    if ours:
        raise UserError(
            f"{ours[0]}= is not read together with harness=, whose tasks say what is measured: leave one out"
        )
    names = tuple(name.strip() for name in asked["harness"].split(","))
    given: dict[str, Any] = {"tasks": names, "run": asked.get("run", ""), "path": asked.get("harness_path", "")}
    for key, field, what in (("k", "k", "demonstrations"), ("harness_limit", "limit", "rows")):
        if key in asked:
            if not asked[key].isdecimal():
                raise UserError(f"{key} must be a whole number of {what}, got {asked[key]!r}")
            given[field] = int(asked[key])
    return given
