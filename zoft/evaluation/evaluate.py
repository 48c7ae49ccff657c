"""`zoft eval`: a model as it is, with demonstrations, calibrated or probed, or a run's final one, on held-out rows."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.errors import UserError, did_you_mean
from zoft.lm.data.examples import Example
from zoft.lm.metrics.passing import check_passes, passes_of
from zoft.lm.tasks._rows import RowsTask, permutation
from zoft.lm.tasks.base import Task, with_demonstrations
from zoft.report.results import finished
from zoft.run import folder
from zoft.utils.files import at_home, write_atomically

if TYPE_CHECKING:
    from zoft.config.schema import ZoftConfig
    from zoft.evaluation.scoring import Scored, Scoring


MODES = ("zero_shot", "icl", "calibrated", "linear_probe")
SPLITS = ("test", "dev", "train")
SHOWN = 32
"""Demonstrations, unless said otherwise: the published number."""

PREDICTIONS, FACTS = "predictions.jsonl", "evaluation.json"


SERVES = {"icl": ("options", "generate"), "calibrated": ("options",), "linear_probe": ("options", "mask", "head")}
"""Mode -> the forms of rows that it is for; every form where it is not listed."""


@dataclass(frozen=True)
class Request:
    """What is asked for beside the run's config.

    Args:
        mode: zero_shot (the model as it is), icl (behind solved rows), calibrated (against a prompt without content)
            or linear_probe (logistic regression on its hidden states).
        k: solved rows shown; None takes 32 with icl and none elsewhere.
        split: test, dev or train.
        run: folder of a run whose final model is evaluated; empty for the model that the config names.
        metric: a metric of the `evaluate` library, computed too; empty for none.
        output_dir: where predictions go.
        pass_at: the ks of pass@k; empty for none.
        pass_reward: the reward from which a text counts as right, where a reward judges.
    """

    mode: str = "zero_shot"
    k: int | None = None
    split: str = "test"
    run: str = ""
    metric: str = ""
    output_dir: str = "evaluation"
    pass_at: tuple[int, ...] = ()
    pass_reward: float | None = None

    def __post_init__(self) -> None:
        for name, known in (("mode", MODES), ("split", SPLITS)):
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {value!r}.{did_you_mean(value, known)}")
        if self.k is not None and self.mode not in ("icl", "calibrated"):
            raise UserError(f"k={self.k} is not read by mode={self.mode}: set mode=icl, or calibrated")
        if self.k is not None and self.k < 1:
            raise UserError(f"k must be at least 1, got {self.k}")
        # a row of the training split could be shown in front of itself
        if self.shown and self.split != "test":
            raise UserError(
                f"split={self.split} and mode={self.mode} with k={self.shown}: a row would be its own example"
            )

    @property
    def name(self) -> str:
        """What the evaluation is called: ``zero_shot`` is a model as it was loaded, without training."""
        return "trained" if self.run and self.mode == "zero_shot" else self.mode

    @property
    def shown(self) -> int:
        """Demonstrations before each row."""
        return self.k or (SHOWN if self.mode == "icl" else 0)


def evaluate(cfg: ZoftConfig, request: Request) -> dict[str, Any]:
    """Carry out an evaluation and write its predictions and facts.

    Args:
        cfg: model, task and what else a run is made of.
        request: what is asked for.

    Returns:
        The facts, with the metrics by name.

    Raises:
        UserError: something does not go together; nothing is written then.
    """
    from zoft.lm import formats
    from zoft.lm.data import repeats
    from zoft.lm.metrics.libraries import split
    from zoft.lm.models.load import quiet
    from zoft.lm.objectives._grading import take_ungraded
    from zoft.lm.objectives.metric import Metric
    from zoft.run.build import row_limit, tokenizer_of

    quiet()
    began = time.perf_counter()
    take_ungraded()  # of what this process did before: another evaluation, or a training that broke off
    # read and checked before the model, which takes longest to load
    splits = cfg.task.load()
    repeats.warn(splits)
    # which objective scores the rows decides how they are encoded
    examples = getattr(splits, request.split)
    objective = formats.scorer_of(cfg.task, examples, cfg.objective)
    form = formats.nearest_format(cfg.task, examples, objective)
    formats.require_fit(cfg.task, form, objective)
    _check(form, request, cfg, splits.train)
    check_passes(form, objective, request.pass_at, request.pass_reward)
    metrics = [request.metric] * bool(request.metric)
    if isinstance(objective, Metric) and objective.library:  # it judges all rows at the end, not each batch on the way
        metrics.append(split(objective.library)[0])
        objective = objective.without_library()
    if request.shown:
        examples = with_solved(cfg.task, examples, splits.train, request.shown)
    tokenizer = tokenizer_of(cfg, request.run)
    encode = functools.partial(
        formats.encode_rows,
        form,
        tokenizer=tokenizer,
        max_length=row_limit(cfg, tokenizer),
        room=formats.room_of(cfg.task, objective),
        as_mezo=cfg.protocol == "mezo",
    )
    rows = encode(examples)
    scoring = scoring_of(cfg, request.run, form, rows, tokenizer, objective)
    if request.mode == "linear_probe":
        scored = _probed(scoring, splits, request, encode)
    else:
        scored = _scored(scoring, form, rows, examples, request, encode)
    facts = _facts(cfg, request, form, scored, metrics, time.perf_counter() - began)
    facts |= _classes(form, examples, scored) | passes_of(scored.predictions, request.pass_at, request.pass_reward)
    facts["num_ungraded"] = _ungraded(request.output_dir)
    _write(request.output_dir, facts, scored, getattr(splits, request.split), form)
    return facts


def _check(form: str, request: Request, cfg: ZoftConfig, train: Any) -> None:
    """Refuse a mode that the rows have nothing for."""
    from zoft.lm.data.examples import Example
    from zoft.lm.formats import FORMS

    if form not in SERVES.get(request.mode, (form,)) or (request.shown and not isinstance(train[0], Example)):
        wanted = " or ".join(FORMS[one].what for one in SERVES[request.mode])
        raise UserError(
            f"mode={request.mode} is for {wanted}, task={cfg.task.name()} has {FORMS[form].what}: set mode=zero_shot"
        )
    if request.mode == "linear_probe" and len({one.options for one in train}) > 1:
        raise UserError(
            f"mode=linear_probe needs the same few labels in every row, and the options of task={cfg.task.name()} "
            "differ: choose another mode"
        )
    if request.metric and form not in ("options", "mask", "head", "generate"):
        raise UserError(f"evaluate={request.metric} compares predictions with labels, and this task has none")


def scoring_of(cfg: ZoftConfig, run: str, form: str, rows: Any, tokenizer: Any, objective: Any) -> Scoring:
    """The model on its device, and what makes batches for it.

    Args:
        cfg: model, task and adapter.
        run: a run's folder, whose final model it is; or the empty string, for the config's.
        form: of the rows, a key of :data:`zoft.lm.formats.FORMS`.
        rows: encoded ones.
        tokenizer: the model's.
        objective: one that is computed from such rows.
    """
    from zoft.evaluation.scoring import Scoring
    from zoft.evaluation.served import served_model
    from zoft.lm import formats
    from zoft.lm.models.agreement import require_rows_fit
    from zoft.run.build import arguments_of
    from zoft.trainer.placing import to_read
    from zoft.utils.lazy import torch

    # nothing is trained: trackers would open a run of their own
    cfg.tracker.report_to = []
    args = arguments_of(cfg)
    model = served_model(cfg, run, tokenizer)
    if model is None:
        model = model_of(cfg, run, tokenizer)
        require_rows_fit(model, rows, tokenizer, cfg.model.name)
        model = to_read(cfg.engine, model, args.device)
    # the same autocast as in training: scores are compared with those of a run
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    autocast: Any = nullcontext if dtype is None else functools.partial(torch.autocast, args.device.type, dtype)
    collate = formats.collator_for(form, rows, tokenizer, cfg.task, objective)
    return Scoring(model.eval(), objective, collate, args.per_device_eval_batch_size, autocast)


def model_of(cfg: ZoftConfig, run: str, tokenizer: Any = None, *, plain: bool = False) -> Any:
    """The config's model, or a run's final one: its own folder, or its adapter on the config's model.

    Args:
        cfg: model, task and adapter.
        run: a run's folder, or the empty string.
        tokenizer: what rows are encoded by, if it is there already.
        plain: whether a quantised base gets plain weights of the same values, as for merging an adapter into it.
    """
    from zoft.lm.models.quantized import dequantized
    from zoft.run.build import load_base, tokenizer_of

    # a run's folder has a whole model, or the adapter alone and the base's name
    saved = Path(run) / "model"
    adapter = bool(run) and (saved / "adapter_config.json").is_file()
    name = _base_of(saved, cfg.model.name) if adapter else str(saved.absolute()) if run else cfg.model.name
    revision = None if run and not adapter else cfg.model.revision
    model: Any = load_base(cfg, name, revision, tokenizer or tokenizer_of(cfg, run))
    model = dequantized(model) if plain else model
    if adapter:
        from zoft.lm.models.peft import load_adapter

        return load_adapter(model, saved)
    # the config's model as a run would begin with it: its fresh adapter computes nothing yet
    return model if run else cfg.peft.wrap(model, cfg.seed, cfg.model.revision)


def _base_of(adapter: Path, name: str) -> str:
    """The model under an adapter: the config's, or where that was a folder of another place, the one it lies in."""
    from zoft.lm.models.peft._positions import adapter_config

    # a config that names a local folder of another machine: the adapter knows where its base was
    if at_home(name).is_dir():
        return name
    base = adapter_config(adapter).get("base_model_name_or_path")
    return base if isinstance(base, str) and Path(base).is_absolute() and Path(base).is_dir() else name


def _scored(scoring: Scoring, form: str, rows: Any, examples: Any, request: Request, encode: Any) -> Scored:
    if form in ("generate", "rated"):
        return scoring.written(rows)
    if form == "counted":
        return scoring.counted(rows)
    if form == "pairs":
        return scoring.pairs(rows)
    # calibration sets each option against the same one behind a prompt without content
    against = None
    if request.mode == "calibrated":
        from zoft.lm.tasks.base import uncontextual

        against = encode([uncontextual(example) for example in examples])
    return scoring.chosen(rows, scoring.choices(rows, against))


def _probed(scoring: Scoring, splits: Any, request: Request, encode: Any) -> Scored:
    from zoft.evaluation.choices import choose
    from zoft.evaluation.linear_probe import features, probe

    # fitted on train, its penalty chosen on dev, reported on the split that was asked for
    parts = {name: encode(getattr(splits, name)) for name in {"train", "dev", request.split}}
    labels = {name: [row["label"] for row in rows] for name, rows in parts.items()}
    count = max(max(values) for values in labels.values()) + 1
    train, dev = ((features(scoring, parts[name]), labels[name]) for name in ("train", "dev"))
    fitted, rows = probe(train, dev, count), parts[request.split]

    def score(some: Any) -> Any:
        return fitted.log_probs(features(scoring, some))

    scored = scoring.chosen(rows, choose(rows, score, score, scoring.batch_size, scoring.close))
    scored.metrics["penalty"] = fitted.penalty
    return scored


def _facts(
    cfg: ZoftConfig, request: Request, form: str, scored: Scored, metrics: list[str], seconds: float
) -> dict[str, Any]:
    from zoft.lm import formats
    from zoft.lm.metrics.libraries import computed

    facts: dict[str, Any] = {
        "mode": request.name,
        "model": request.run or cfg.model.name,
        "task": cfg.task.name(),
        "prompt": getattr(cfg.task, "prompt", None),
        "split": request.split,
        "num_rows": len(scored.predictions),
        "num_demonstrations": request.shown,
        "metric": formats.reported(form, cfg.task),
        **scored.metrics,
        "num_computed_alone": scored.num_alone,
        "seconds": seconds,
        "output_dir": request.output_dir,
    }
    # what was chosen or written, against labels or gold answers, as the metric wants them
    predictions = [row.get("answer", row.get("chosen")) for row in scored.predictions]
    references = [row.get("answers", row.get("label")) for row in scored.predictions]
    for name in metrics:
        facts["evaluate"] = facts.get("evaluate", {}) | computed(name, predictions, references)
    return facts


def _classes(form: str, examples: Sequence[Any], scored: Scored) -> dict[str, Any]:
    """Figures of every class, where all rows have the same few."""
    from zoft.lm.metrics.classes import MOST, by_class

    # a table of classes needs the same few options in every row
    options = tuple(getattr(examples[0], "options", ())) if form in ("options", "mask", "head") else ()
    if not 2 <= len(options) <= MOST or any(tuple(example.options) != options for example in examples):
        return {}
    names = [option.strip() for option in options]
    rows = scored.predictions
    return by_class([row["label"] for row in rows], [row["chosen"] for row in rows], names)


def _write(output_dir: str, facts: dict[str, Any], scored: Scored, examples: Any, form: str) -> None:
    """The predictions line by line, and the facts."""
    lines = []
    # one line a row, in the rows' order: two evaluations can be compared line by line
    for number, (row, example) in enumerate(zip(scored.predictions, examples, strict=True)):
        line: dict[str, Any] = {"row": number}
        if form in ("options", "mask", "head"):
            text = example.prompt or "".join("<mask>" if p.text is None else p.text for p in example.pieces)
            line |= {"prompt": text, "options": list(example.options)}
        lines.append(json.dumps(line | row))
    write_files(output_dir, lines, facts)


def _ungraded(output_dir: str) -> int:
    """Texts that a judge gave no number, which go into a file of their own."""
    from zoft.report import ungraded

    (Path(output_dir) / ungraded.NAME).unlink(missing_ok=True)
    return ungraded.write(Path(output_dir))


def write_files(output_dir: str, lines: list[str], facts: dict[str, Any]) -> None:
    """Predictions and facts, each whole or not at all."""
    place = Path(output_dir)
    place.mkdir(parents=True, exist_ok=True)
    write_atomically(place / PREDICTIONS, "".join(f"{line}\n" for line in lines))
    write_atomically(place / FACTS, json.dumps(facts, indent=2) + "\n")


def default_output_dir(cfg: ZoftConfig, request: Request, *, given: bool) -> str:
    """Where predictions go unless it is said: beside a run's own files, never where a run would begin.

    Args:
        cfg: its ``output_dir`` is taken as it is where it was ``given``.
        request: mode, split and run.
        given: whether the user wrote ``output_dir=``.
    """
    if given:
        return cfg.output_dir
    name = "-".join(["eval", request.name, *([str(request.k)] if request.k else []), request.split])
    return str(Path(request.run) / name) if request.run else f"{cfg.output_dir}-{name}"


_OF_TRAINING = ("method", "subspace", "estimator", "weighting", "optimizer", "budget", "tracker", "diagnostics")


def config_of_run(run: str, overrides: Sequence[str] = ()) -> str:
    """The config of a run with a final model; arguments that change nothing are refused, but for files of parts."""
    path = folder.config_of(run)
    if not (path.parent / "model").is_dir():
        again = f"it was removed, and zoft replay {run} --output {run}/model writes it again"
        mend = again if finished(path.parent) else "finish it with the command that began it"
        raise UserError(f"run={run} holds no final model: {mend}")
    is_whole = not (path.parent / "model" / "adapter_config.json").is_file()
    for key in (word.lstrip("+~").partition("=")[0] for word in overrides if ".py" not in word):
        if key.partition(".")[0] in _OF_TRAINING or (is_whole and key in ("model", "model.name", "model.revision")):
            raise UserError(f"{key} was of the training of run={run}, and changes nothing now: leave it out")
    return str(path)


# ---- Solved rows shown before each row to solve: in-context learning -------------------------------------------------


def with_solved(task: Task, examples: Sequence[Example], train: Sequence[Example], k: int) -> list[Example]:
    """Every example behind ``k`` solved ones, another set for each, drawn as MeZO draws them.

    A published task draws from all rows of its training source, your own from the rows that it trains on.

    Raises:
        UserError: there are fewer than ``k``.
    """
    # published tasks draw demonstrations from their whole training source, with MeZO's seeds
    if isinstance(task, RowsTask):
        shown = task.demonstrations(len(examples), k)
    else:
        import numpy

        seeds = numpy.random.RandomState(0).randint(0, 10_000, len(examples)).tolist()
        shown = [[train[index] for index in permutation(len(train), seed)[:k]] for seed in seeds]
    if shown and len(shown[0]) < k:
        raise UserError(f"k={k} demonstrations are wanted and there are {len(shown[0])} rows to show: lower k")
    return [with_demonstrations(one, solved, task.separator) for one, solved in zip(examples, shown, strict=True)]
