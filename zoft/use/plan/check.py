"""The checks of a run before it begins: config, rows, tokenizer, model, memory, and two steps."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from zoft.config.schema import ZoftConfig
from zoft.errors import UserError
from zoft.lm.data.lengths import UNCUT, cut_of, length_of
from zoft.utils.words import counted

_SHOWN = 50  # rows that are tried on the tokenizer
_STEPS = 2
_FEW = 20  # held-out rows: of fewer, one is more than 5 points of an accuracy


@dataclass
class Finding:
    """One line.

    Args:
        name: what was looked at.
        state: ``ok``, ``failed`` (the run would not begin, or mean nothing) or ``note`` (it could be better).
        text: how it is.
    """

    name: str
    state: str
    text: str


def checked(cfg: ZoftConfig, *, rehearse: bool = True) -> Iterator[Finding]:
    """Every finding, in the order in which a run would come to it; a failed one ends what depends on it.

    Args:
        cfg: the run's config.
        rehearse: whether the weights are loaded for two steps at the end.
    """
    from zoft.lm.models.files import placed
    from zoft.lm.models.load import quiet

    try:
        yield _config(cfg)
        splits = cfg.task.load()
        placed(cfg.model.name)
        quiet()  # what is wrong with the data has been said by now: this imports transformers
        yield from _data(cfg, splits)
        yield from _rows(cfg, splits, rehearse)
    except UserError as error:
        yield Finding(_place(str(error)), "failed", str(error))


def _place(message: str) -> str:
    """What a sentence is about, by the keys in it."""
    of = {"options": "are the same tokens", "model": "model", "objective": "objective"}
    return next((name for name, word in of.items() if word in message), "data")


def _config(cfg: ZoftConfig) -> Finding:
    warnings = cfg.warnings()
    named = f"{cfg.config}, {counted(cfg.budget.queries, 'queries')}, output_dir={cfg.output_dir}"
    return Finding("config", "note", warnings[0]) if warnings else Finding("config", "ok", named)


def _data(cfg: ZoftConfig, splits: Any) -> Iterator[Finding]:
    from zoft.lm.data.repeats import notes

    task: Any = cfg.task
    read = f", {task.reading().sentence()}" if hasattr(task, "reading") else ""
    counts = ", ".join(f"{len(getattr(splits, name)):,} {name}" for name in ("train", "dev", "test"))
    yield Finding("data", "ok", f"{counts} rows of {getattr(task, 'train', '') or task.name()}{read}")
    remarks = notes(splits)
    for note in remarks:
        yield Finding("leaks", "note", note)
    if not remarks:
        yield Finding("leaks", "ok", "no row stands in two splits, or twice in one")
    few = " and ".join(f"{n} {name}" for name in ("dev", "test") if (n := len(getattr(splits, name))) < _FEW)
    if few:
        text = f"only {few} rows, of which each decides much about the checkpoint that is chosen or how good it is"
        yield Finding("held out", "note", f"{text}: have {_FEW} or more of each (task.num_dev, task.num_test)")
    labels = [example.label for example in splits.train if getattr(example, "label", None) is not None]
    lacking = [number for number in range(len(getattr(splits.train[0], "options", ()))) if number not in labels]
    if labels and lacking and len({getattr(example, "options", ()) for example in splits.train}) == 1:
        names = ", ".join(splits.train[0].options[number].strip() for number in lacking)
        yield Finding("labels", "note", f"no training row has the label {names}")


def _rows(cfg: ZoftConfig, splits: Any, rehearse: bool) -> Iterator[Finding]:
    from zoft.lm import formats
    from zoft.run.build import row_limit, tokenizer_of
    from zoft.use.plan.estimate import of_rows

    cfg.settle(formats.settled(cfg.task, splits.train, cfg.objective))
    form = formats.format_of(cfg.task, splits.train, cfg.objective)
    tokenizer = tokenizer_of(cfg)
    length, room = row_limit(cfg, tokenizer), formats.room_of(cfg.task, cfg.objective)

    def encoded(some: Any, longest: int) -> list[Any]:
        return formats.encode_rows(form, some, tokenizer, longest, room)

    rows = {name: encoded(getattr(splits, name), length) for name in ("train", "dev", "test")}
    yield _round_trip(splits.train, tokenizer)
    yield from _options(rows["train"], splits.train)
    yield _cut(length, splits.train, rows["train"], encoded)
    estimate = of_rows(cfg, rows)
    text = f"{estimate.num_params:,} weights, {estimate.num_trainable:,} trained, {cfg.model.dtype}"
    yield Finding("model", "ok", f"{cfg.model.name}: {text}; objective={cfg.objective.name()}")
    yield _memory(estimate)
    if rehearse:
        yield _rehearsal(cfg, rows)


def _round_trip(examples: Any, tokenizer: Any) -> Finding:
    """Whether texts come back from their tokens as they were; unknown words are lost for training too."""
    texts = [text for text in (getattr(example, "prompt", "") for example in examples[:_SHOWN]) if text]
    lost = [
        text
        for text in texts
        if tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).split() != text.split()
    ]
    if not lost:
        return Finding("tokenizer", "ok", f"{len(texts):,} texts come back from their tokens as they were")
    message = f"{len(lost):,} of {len(texts):,} texts do not come back from their tokens as they were"
    return Finding("tokenizer", "note", f"{message}, e.g. {lost[0][:60]!r}")


def _options(rows: Any, examples: Any) -> Iterator[Finding]:
    """Options whose tokens are the same cannot be told apart."""
    if "sequences" not in rows[0] or len(rows[0]["sequences"]) < 2:
        return
    for row, example in zip(rows, examples, strict=True):
        ends = [tuple(ids[len(ids) - n :]) for ids, n in zip(row["sequences"], row["lengths"], strict=True)]
        if len(set(ends)) < len(ends):
            twice = next(place for place, end in enumerate(ends) if end in ends[:place])
            pair = f"{example.options[ends.index(ends[twice])]!r} and {example.options[twice]!r}"
            yield Finding("options", "failed", f"{pair} are the same tokens to this model: give them other words")
            return
    yield Finding("options", "ok", "every option has tokens of its own")


def _cut(limit: int, examples: Any, rows: Any, encoded: Callable[[Any, int], list[Any]]) -> Finding:
    longest = max(map(length_of, rows))
    cut = cut_of(rows, limit, lambda: encoded(examples, UNCUT))
    if cut is None:
        return Finding(
            "length", "ok", f"at most {longest:,} tokens in a training row, none cut (of {limit:,} that are kept)"
        )
    message = f"{cut.num_cut:,} of {cut.num_rows:,} training rows are cut at {limit:,} tokens (task.max_length)"
    return Finding("length", "note" if cut.num_cut else "ok", f"{message}; the longest has {cut.longest:,}")


def _memory(estimate: Any) -> Finding:
    from zoft.report.text import gib

    wanted = estimate.method.total_mb - estimate.method.host_mb
    message = f"about {gib(estimate.method.total_mb)} on {estimate.device}"
    if estimate.free_mb is None:
        return Finding("memory", "ok", message)
    fits = wanted <= estimate.free_mb
    mend = "" if fits else ": take a smaller batch, model.dtype=bfloat16, or fewer tokens"
    return Finding("memory", "ok" if fits else "failed", f"{message}, {gib(estimate.free_mb)} free{mend}")


def _rehearsal(cfg: ZoftConfig, rows: dict[str, list[Any]]) -> Finding:
    """Two steps in a folder of their own; nothing of the run's is touched."""
    from zoft.run.build import model_to_train, tokenizer_of
    from zoft.run.rehearsal import rehearsing, rehearsing_trainer

    queries = sum(cfg.composition.queries_at(step) for step in range(_STEPS))
    with tempfile.TemporaryDirectory() as folder:
        cfg = rehearsing(cfg, folder, queries)
        tokenizer = tokenizer_of(cfg)
        trainer = rehearsing_trainer(cfg, model_to_train(cfg, tokenizer), tokenizer, rows)
        loss, skipped = float(trainer.train().training_loss), trainer.progress.num_skipped
    if skipped or not math.isfinite(loss):
        return Finding("rehearsal", "failed", f"the loss was not finite in {skipped} of {_STEPS} steps")
    return Finding("rehearsal", "ok", f"{_STEPS} steps, {queries} queries, loss {loss:.4g}")
