"""`zoft eval harness=...`: a model, or a run's final one, on tasks of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoft.config.schema import ZoftConfig
from zoft.errors import UserError
from zoft.evaluation import harness_tasks


@dataclass(frozen=True)
class HarnessRequest:
    """What is asked for beside the run's config.

    Args:
        tasks: names of tasks, groups and tags, and paths of task files (``.yaml``).
        path: a folder with more task files, which can then be named; empty for none.
        limit: number of rows of every task, its first ones; None takes all.
        k: solved rows shown before each; None leaves it to the task.
        run: folder of a run whose final model is evaluated; empty for the model that the config names.
        output_dir: where predictions go.

    Raises:
        UserError: no task, one twice, a file or folder that is not there, or a limit below 1.
    """

    tasks: tuple[str, ...]
    path: str = ""
    limit: int | None = None
    k: int | None = None
    run: str = ""
    output_dir: str = "evaluation"

    def __post_init__(self) -> None:
        if not all(self.tasks):
            raise UserError("harness= names no task: give names, harness=hellaswag,arc_easy, or a task file's path")
        if len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"harness={','.join(self.tasks)} names a task twice: name each once")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"harness_limit must be at least 1 row a task, got {self.limit}")
        if self.path and not Path(self.path).is_dir():
            raise UserError(f"harness_path={self.path} is no folder (looked in {Path.cwd()}): give one with task files")
        for name in self.tasks:
            if harness_tasks.is_task_file(name) and not Path(name).is_file():
                raise UserError(f"harness={name}: there is no such task file (looked in {Path.cwd()})")


def default_output_dir(cfg: ZoftConfig, request: HarnessRequest, *, given: bool) -> str:
    """Where predictions go unless it is said: beside a run's own files, never where a run would begin.

    Args:
        cfg: its ``output_dir`` is taken as it is where it was ``given``.
        request: tasks, rows and run.
        given: whether the user wrote ``output_dir=``.

    Example:
        >>> default_output_dir(None, HarnessRequest(("arc_easy",), limit=100, k=5, run="runs/mine"), given=False)
        'runs/mine/eval-harness-arc_easy-k5-first100'
    """
    if given:
        return cfg.output_dir
    names = [Path(name).stem if harness_tasks.is_task_file(name) else name for name in request.tasks]
    if len("-".join(names)) > 80:
        names = [names[0][:80], "and", str(len(names) - 1), "more"]
    shown = [] if request.k is None else [f"k{request.k}"]
    first = [] if request.limit is None else [f"first{request.limit}"]
    name = "-".join(["eval-harness", *names, *shown, *first])
    return str(Path(request.run) / name) if request.run else f"{cfg.output_dir}-{name}"


def evaluate(cfg: ZoftConfig, request: HarnessRequest) -> dict[str, Any]:
    """Carry out tasks of the harness and write their predictions and facts.

    Args:
        cfg: the model; its task only says which kind of model that is.
        request: what is asked for.

    Returns:
        The facts, with the metrics by task.

    Raises:
        UserError: a task cannot be loaded or carried out; nothing is written then.
    """
    import transformers

    from zoft.evaluation.evaluate import model_of, write_files
    from zoft.lm import formats
    from zoft.run.build import arguments_of, tokenizer_of
    from zoft.trainer.placing import to_read
    from zoft.utils.random_state import global_random_state_kept

    harness_tasks.require_harness()
    if formats.model_kind(cfg.task) != "causal":
        raise UserError(
            f"harness= is for causal language models, and with task={cfg.task.name()} {request.run or cfg.model.name} "
            "is another: give a run, or a config, of a task that a causal model is scored on"
        )
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    began = time.perf_counter()
    cfg.tracker.report_to = []
    args = arguments_of(cfg)
    with global_random_state_kept():
        transformers.set_seed(cfg.seed)  # rows may be drawn when a task is loaded
        tasks = harness_tasks.loaded_tasks(request.tasks, request.path, request.k, cfg.seed)
        results, rows = harness_tasks.evaluated(
            tasks,
            to_read(cfg.engine, model_of(cfg, request.run), args.device),
            tokenizer_of(cfg),
            batch_size=args.per_device_eval_batch_size,
            autocast="bfloat16" if args.bf16 else "float16" if args.fp16 else None,
            limit=request.limit,
        )
    facts = {
        "mode": "harness",
        "model": request.run or cfg.model.name,
        "harness": list(request.tasks),
        "harness_limit": request.limit,
        "seed": cfg.seed,
        "device": str(args.device),
        "dtype": cfg.model.dtype,
        "per_device_eval_batch_size": args.per_device_eval_batch_size,
        **results,
        "seconds": time.perf_counter() - began,
        "output_dir": request.output_dir,
    }
    facts = json.loads(json.dumps(facts, default=_plain))
    write_files(request.output_dir, [json.dumps(row, default=_plain) for row in rows], facts)
    return facts


def _plain(value: Any) -> Any:
    """What a task's rows and settings hold beside JSON's own: numbers of numpy, functions, dates."""
    return value.item() if hasattr(value, "item") else str(value)
