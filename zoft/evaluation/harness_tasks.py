"""Tasks of EleutherAI's lm-evaluation-harness: loaded, run silently, and reported as `zoft eval` does."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from zoft.errors import UserError, did_you_mean
from zoft.lm.metrics.intervals import mean_of_numbers, mean_of_scores

RESAMPLES = 1000
"""Bootstrap samples for the standard error of what is no mean (F1, perplexity); those of bleu, chrf and ter are 100."""


def require_harness() -> None:
    """Refuse where the extra is not installed.

    Raises:
        UserError: saying how to install it.
    """
    try:
        importlib.import_module("lm_eval")
    except ImportError as error:
        raise UserError(
            f"harness= needs EleutherAI's lm-evaluation-harness ({error}): pip install 'zoft[harness]'"
        ) from error


def is_task_file(name: str) -> bool:
    """Whether the name of a task is the path of a file.

    Example:
        >>> is_task_file("tasks/mine.yaml"), is_task_file("arc_easy")
        (True, False)
    """
    return name.endswith((".yaml", ".yml")) or os.sep in name


def loaded_tasks(names: Sequence[str], path: str, k: int | None, seed: int) -> dict[str, Any]:
    """The tasks with their rows, as the harness takes them. The Python that their files name is run.

    Args:
        names: of tasks, groups and tags, and paths of task files.
        path: a folder with more task files, or the empty string; of those that are not named no Python is run.
        k: solved rows shown before each; None leaves it to the task.
        seed: of the draw of solved rows.

    Returns:
        What its ``TaskManager.load`` gives: ``tasks``, ``groups`` and ``group_map``.

    Raises:
        UserError: an unknown name, data that cannot be read, or a task that zoft cannot carry out.
    """
    with quiet():
        manager = _manager(names, path)
        merged: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in names:
            _refuse_unknown(name, manager)
            values = _loaded(name, manager)
            twice = merged["tasks"].keys() & values["tasks"].keys()
            if twice:
                raise UserError(f"harness={name} has the task {min(twice)}, and so has another one: name it once")
            for part, members in values.items():
                merged[part] |= members
        for name, task in merged["tasks"].items():
            _refuse_unfit(name, task)
            _show(name, task, k)
            task.set_fewshot_seed(seed=seed)
    return merged


def evaluated(
    tasks: dict[str, Any], model: Any, tokenizer: Any, *, batch_size: int, autocast: str | None, limit: int | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Facts and predictions of a model on tasks.

    Args:
        tasks: what :func:`loaded_tasks` gave.
        model: a causal language model on its device, with or without an adapter.
        tokenizer: its own.
        batch_size: rows in a forward.
        autocast: bfloat16 or float16 for mixed precision; None for none.
        limit: rows of every task; None takes all.

    Returns:
        Facts (``tasks``, ``groups``, ``num_rows``, ...), and one dict a row and filter, task by task.

    Raises:
        UserError: a task failed on its own rows, or asks for what the model cannot do.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    try:
        with quiet():
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, mixed_precision_dtype=autocast)
            # evaluate, not simple_evaluate: that one asks the hub for the model, git for a commit and pip for a list.
            results = lm_eval.evaluate(
                lm=wrapped, task_dict=tasks, limit=limit, bootstrap_iters=RESAMPLES, log_samples=True
            )
    except Exception as error:
        if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError):
            raise  # torch's, as elsewhere
        raise UserError(
            f"harness={','.join(tasks['tasks'])} failed on its rows or on this model ({_said(error)}): mend the task "
            "file, or take a model that does what the task asks for"
        ) from error
    return _facts(results) | {"lm_eval": lm_eval.__version__, "max_length": wrapped.max_length}, _rows(results)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness, its tasks and data sets from writing to the console; their settings are restored afterwards.

    Example:
        >>> with quiet():
        ...     print("heard by nobody")
    """
    before, alone = logging.root.manager.disable, os.environ.get("DISABLE_MULTIPROC")
    logging.disable(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"  # the bootstrap in this process: a fork would copy a model on a device
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if alone is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = alone


def _manager(names: Sequence[str], path: str) -> Any:
    """The list of tasks; without the harness's own 14,000, which take ten seconds to read, where none is asked for."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=path or None, include_defaults=False)
    # A group may name any of the harness's own tasks.
    if all(name in manager.all_subtasks or (is_task_file(name) and not _is_group(name)) for name in names):
        return manager
    return TaskManager(include_path=path or None)


def _is_group(name: str) -> bool:
    return bool(re.search(r"^group\s*:", Path(name).read_text(encoding="utf-8"), re.MULTILINE))


def _refuse_unknown(name: str, manager: Any) -> None:
    if is_task_file(name) or name in manager.all_tasks:
        return
    near = did_you_mean(name, manager.all_tasks) if manager.all_tasks else ""
    hint = near if len(near) < 200 else ""  # not all of them
    raise UserError(
        f"harness={name} is no task of lm-evaluation-harness.{hint} `lm_eval ls tasks` lists them; your own are given "
        "by path, harness=mine.yaml, or by name with harness_path=FOLDER"
    )


def _loaded(name: str, manager: Any) -> dict[str, Any]:
    try:
        return dict(manager.load([name]))
    except OSError as error:  # ConnectionError, DatasetNotFoundError, ...
        raise UserError(
            f"harness={name}: its data cannot be read ({_said(error)}): it takes a network once, the data set in the "
            "cache of `datasets`, or a task file with data of your own"
        ) from error
    except ImportError as error:
        raise UserError(
            f"harness={name} needs what is not installed ({_said(error)}): install it; pip install 'lm_eval[tasks]' "
            "brings what the harness's own tasks need"
        ) from error
    except Exception as error:  # whatever a task file, or the Python beside it, can do
        raise UserError(f"harness={name} cannot be loaded ({_said(error)}): mend its task file") from error


def _refuse_unfit(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"harness task {name} runs the code that the model writes, which zoft does not: leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"harness task {name} shows images or sounds, and the model reads text alone: leave it out")


def _show(name: str, task: Any, k: int | None) -> None:
    """Say how many solved rows are shown."""
    num_shown = task.get_config("num_fewshot")
    if k and num_shown == 0:  # the harness would leave it at 0, and say so in its log
        raise UserError(f"k={k} is not read by harness task {name}, which is defined without solved rows: leave k out")
    if k is not None or num_shown is None:
        task.set_config(key="num_fewshot", value=k or 0)


def _facts(results: dict[str, Any]) -> dict[str, Any]:
    """What was found, task by task and group by group."""
    samples = results["samples"]
    tasks, groups = {}, {}
    for name, part in samples.items():
        counts = results["n-samples"][name]
        tasks[name] = {
            "metrics": _metrics(results["results"][name], part),
            "num_rows": min(counts["effective"], counts["original"]),
            "num_rows_of_task": counts["original"],
            "num_demonstrations": results["n-shot"].get(name, 0),
            "version": results["versions"].get(name),
            "config": results["configs"].get(name),
        }
    for name, group in results.get("groups", {}).items():
        members = _members(name, results["group_subtasks"])
        part = [row for member in members for row in samples.get(member, ())]
        rows = sum(tasks[member]["num_rows"] for member in members if member in tasks)
        groups[name] = {"metrics": _metrics(group, part), "num_rows": rows, "tasks": members}
    return {"tasks": tasks, "groups": groups, "num_rows": sum(task["num_rows"] for task in tasks.values())}


def _members(group: str, parts: dict[str, list[str]]) -> list[str]:
    """The tasks of a group and of the groups in it."""
    return [task for part in parts[group] for task in (_members(part, parts) if part in parts else [part])]


def _metrics(results: dict[str, Any], samples: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every metric with its standard error and 95 % interval; a filter's name stands behind the metric's."""
    values = {}
    for key, value in results.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = results.get(f"{metric}_stderr,{kind}")
        stderr = float(stderr) if isinstance(stderr, (int, float)) else None
        scores = [row[metric] for row in samples if row["filter"] == kind and metric in row]
        interval = _interval(float(value), stderr, scores)
        name = metric if kind == "none" else f"{metric} ({kind})"
        values[name] = {"value": float(value), "stderr": stderr, **interval}
    return values


def _interval(value: float, stderr: float | None, scores: Sequence[Any]) -> dict[str, float]:
    """As `zoft eval` has them where the metric is a mean over rows; else 1.96 standard errors, or nothing."""
    numbers = [float(score) for score in scores if isinstance(score, (bool, int, float))]
    numbers = numbers if len(numbers) == len(scores) else []
    share = bool(numbers) and all(0 <= one <= 1 for one in numbers)
    if numbers and math.isclose(math.fsum(numbers) / len(numbers), value, abs_tol=1e-9):
        low, high = mean_of_scores(numbers) if share else mean_of_numbers(numbers)
    elif stderr is not None:
        low, high = value - 1.96 * stderr, value + 1.96 * stderr
        low, high = (max(0.0, low), min(1.0, high)) if share else (low, high)
    else:
        return {}
    return {"low": low, "high": high}


def _rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Predictions: what was shown, what came back, what was right."""
    left_out = ("doc_id", "doc_hash", "prompt_hash", "target_hash", "metrics")
    return [
        {"task": name, "row": row["doc_id"], **{key: value for key, value in row.items() if key not in left_out}}
        for name, part in results["samples"].items()
        for row in sorted(part, key=lambda one: one["doc_id"])
    ]


def _said(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}"[:200]
