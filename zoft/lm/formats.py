"""What rows ask of a model: which objectives fit, how they are encoded and put together, and what is reported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from zoft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zoft.lm.objectives.base import Objective
    from zoft.lm.tasks.base import Task

log = logging.getLogger(__name__)
Row = dict[str, Any]
ROOM = 64
"""Tokens of a generated text where neither task nor objective says how many."""


@dataclass(frozen=True)
class RowFormat:
    """One form of rows.

    Args:
        what: in words.
        objective: what it is trained on unless something else is chosen.
        metrics: what an evaluation computes beside the loss; of each also ``_low`` and ``_high``.
    """

    what: str
    objective: str
    metrics: tuple[str, ...] = ("accuracy",)


FORMS = {
    "options": RowFormat("answers to choose from", "options"),
    "generate": RowFormat("answers that the model writes", "cross_entropy", ("f1", "exact_match")),
    "mask": RowFormat("a word at a mask", "label_words"),
    "head": RowFormat("classes for a head", "classes"),
    "counted": RowFormat("texts to continue", "cross_entropy", ("loss",)),
    "pairs": RowFormat("preference pairs", "preference"),
    "rated": RowFormat("prompts with what a reward judges by", "reward", ("reward",)),
}
"""Every form by its name."""


def format_of(task: Task, examples: Sequence[Any], objective: Objective) -> str:
    """The form of a task's examples under an objective: a key of :data:`FORMS`.

    Args:
        task: where they come from.
        examples: of one split.
        objective: completions are texts to continue, or gold answers of generated ones, as it wants them.

    Rows that are trained on come through here: where a published protocol trains them otherwise, a warning says so.

    Raises:
        UserError: the objective is computed from something else; the sentence names those that fit.
    """
    form = nearest_format(task, examples, objective)
    require_fit(task, form, objective)
    published = getattr(task, "published_objective", "")
    if published not in ("", objective.name()) and getattr(task, "protocol", "") == "mezo":
        _note_once(
            f"task.protocol=mezo: MeZO trains task={task.name()} on the text of the right choice, "
            f"objective={published}, and this run has objective={objective.name()}"
        )
    return form


@lru_cache
def _note_once(text: str) -> None:
    log.warning(text)


def nearest_format(task: Task, examples: Sequence[Any], objective: Objective) -> str:
    """As :func:`format_of`, also where the objective does not fit: the form such rows usually have."""
    possible = _possible(task, examples)
    return next((one for one in possible if one in objective.forms), possible[0])


def settled(task: Task, examples: Sequence[Any], objective: Objective) -> Objective:
    """The objective, or where it is ``auto`` the one that such rows are usually trained on.

    Args:
        task: where they come from; a published protocol may train them otherwise.
        examples: of one split.
        objective: as it was chosen.
    """
    from zoft.component import create

    if objective.name() != "auto":
        return objective
    published = getattr(task, "published_objective", "") if getattr(task, "protocol", "") == "mezo" else ""
    chosen: Objective = create("objective", published or FORMS[_possible(task, examples)[0]].objective, "options")
    return chosen


def scorer_of(task: Task, examples: Sequence[Any], objective: Objective) -> Objective:
    """The objective that evaluates such rows: the one given where it fits, else what they are trained on by default."""
    from zoft.component import create

    objective = settled(task, examples, objective)
    possible = _possible(task, examples)
    if not objective.forms or set(possible) & set(objective.forms):
        return objective
    scorer: Objective = create("objective", FORMS[possible[0]].objective, "options")
    return scorer


def _possible(task: Task, examples: Sequence[Any]) -> tuple[str, ...]:
    """The forms that these examples can take, the usual one first."""
    from zoft.lm.data.examples import Chat, Completion, PreferencePair, Rated

    fixed = {Chat: ("counted",), Completion: ("counted", "generate"), PreferencePair: ("pairs",), Rated: ("rated",)}
    return fixed.get(type(examples[0]), (task.kind,))


def format_of_row(row: Row) -> str:
    """The form of an encoded row."""
    if "chosen" in row:
        return "pairs"
    if "prompt_ids" in row:
        return "generate" if "sequences" in row else "rated"
    if "sequences" in row:
        return "options"
    if "word_ids" in row:
        return "mask"
    return "counted" if isinstance(row.get("labels"), list) else "head"


def require_rows(
    objective: Objective, rows: Sequence[Any], collator: Callable[[Sequence[Any]], Mapping[str, Any]]
) -> None:
    """Refuse rows and a collator of a caller's own that do not make batches which the objective is computed from.

    Args:
        objective: what is minimised.
        rows: at least one.
        collator: makes a batch of them.

    Raises:
        UserError: saying which rows it is computed from, and what makes them.
    """
    name, forms, why = getattr(collator, "__name__", type(collator).__name__), set[str](), ""
    try:
        batch = collator(rows)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        why = f"does not take these rows ({type(error).__name__}: {error})"
    else:
        why = f"makes batches of {', '.join(batch)}"
        dim = {2: "counted", 1: "head"}.get(getattr(batch.get("labels"), "ndim", 0), "")
        marks = {"prompt_ids": "generate rated", "word_ids": "mask", "option_tokens": "options"}
        marks |= {"option_len": "options", "num_options": "pairs"}  # options have num_options, too
        forms = set(next((of for mark, of in marks.items() if mark in batch), dim).split())
        if "attention_mask" not in batch:
            forms, why = set(), f"{why} without attention_mask"
    if objective.forms and not forms & set(objective.forms):
        wanted, one = ", or ".join(FORMS[each].what for each in objective.forms), objective.forms[0]
        raise UserError(
            f"objective={objective.name()} is computed from {wanted}"
            f', and data_collator={name} {why}: make rows by zoft.lm.formats.encode_rows("{one}", ...) and their '
            f'collator by collator_for("{one}", ...), as the documentation shows (From Python)'
        )


def require_fit(task: Task, form: str, objective: Objective) -> None:
    """Refuse an objective that is not computed from such rows, and settings that do not go with the task.

    Raises:
        UserError: saying which objectives are.
    """
    if objective.forms and form not in objective.forms:
        from zoft.component import components

        known: dict[str, Any] = components("objective")
        others = ("auto", "expression")
        fitting = [name for name, cls in known.items() if name not in others and form in cls().forms]
        wanted = " or ".join(FORMS[one].what for one in objective.forms)
        raise UserError(
            f"task={task.name()} has {FORMS[form].what}, and objective={objective.name()} is computed from {wanted}: "
            f"set objective={' or '.join(fitting)}"
        )
    objective.prepare()
    room, task_room = getattr(objective, "max_new_tokens", 0), getattr(task, "max_new_tokens", 0)
    if task_room and room > task_room:
        raise UserError(
            f"objective.max_new_tokens={room} is more than the task keeps free for an answer: raise "
            f"task.max_new_tokens ({task_room})"
        )
    if form in ("generate", "rated") and 0 < task.max_length < room_of(task, objective) + 8:
        raise UserError(
            f"task.max_length={task.max_length} leaves no room for a prompt in front of a text of "
            f"{room_of(task, objective)} tokens: raise it, or set a smaller objective.max_new_tokens"
        )


def reported(form: str, task: Task) -> str:
    """The metric that a run is judged by: one of the form's."""
    metrics = FORMS[form].metrics
    return task.metric if task.metric in metrics else metrics[0]


def metric_function(form: str) -> Callable[[Any], dict[str, float]]:
    """What computes the metrics from an objective's predictions."""
    from zoft.lm.metrics import metrics
    from zoft.lm.metrics.metrics import perplexity

    of_forms = {"counted": perplexity, "generate": metrics.answers, "rated": metrics.reward}
    return of_forms.get(form, metrics.accuracy)


def encode_rows(
    form: str,
    examples: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    room: int = ROOM,
    *,
    as_mezo: bool = False,
) -> list[Row]:
    """Token rows of one split's examples.

    Args:
        form: a key of :data:`FORMS`.
        examples: what the task made.
        tokenizer: the model's.
        max_length: tokens kept of a row.
        room: tokens kept free for a generated text where the examples do not say.
        as_mezo: cut prompts whose answers are generated as MeZO's published code does.
    """
    from zoft.lm.data.encoding import encode_examples, encode_pairs
    from zoft.lm.data.generated import encode_generated
    from zoft.lm.data.masked import encode_masked
    from zoft.lm.data.tokens import encode_prompts

    if form in ("generate", "rated"):
        return encode_generated(examples, tokenizer, max_length, room, as_mezo=as_mezo)
    if form == "pairs":
        return encode_pairs(examples, tokenizer, max_length)
    if form == "mask" or (form == "head" and examples[0].pieces):
        return encode_masked(examples, tokenizer, max_length)
    if form == "head":
        return encode_prompts(examples, tokenizer, max_length)
    return encode_examples(examples, tokenizer, max_length)


def room_of(task: Task | None, objective: Objective | None) -> int:
    """Tokens that a generated text may have."""
    return int(getattr(objective, "max_new_tokens", 0) or getattr(task, "max_new_tokens", 0) or ROOM)


def collator_for(
    form: str,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    task: Task | None = None,
    objective: Objective | None = None,
    *,
    as_mezo: bool = False,
) -> Callable[[Sequence[Row]], dict[str, Any]]:
    """What makes batches of such rows.

    Args:
        form: a key of :data:`FORMS`.
        rows: what :func:`encode_rows` gave.
        tokenizer: the model's.
        task: says how a generated answer is read; without one it is the whole text.
        objective: may say how long one may be.
        as_mezo: batches as MeZO's published code makes them.
    """
    from zoft.lm.data.encoding import PairCollator, collator_of
    from zoft.lm.data.generated import GeneratedCollator
    from zoft.lm.data.masked import RightPaddedCollator
    from zoft.lm.metrics.answers import SCORES
    from zoft.lm.models.generate import Answering

    pad: Any = tokenizer.pad_token_id
    if form in ("generate", "rated"):
        metric = task.metric if task is not None and task.metric in SCORES else "f1"
        read = getattr(task, "answer_in", str.strip)
        stop = getattr(task, "stop", "")
        published = getattr(task, "protocol", "") == "mezo"
        answering = Answering(tokenizer, room_of(task, objective), stop, read, metric, published)
        return GeneratedCollator(pad, answering, as_mezo)
    if form == "pairs":
        return PairCollator(pad)
    if form in ("mask", "head"):
        return RightPaddedCollator(pad)
    return collator_of(rows, pad, as_mezo=as_mezo)


def model_kind(task: Task) -> str:
    """Which kind of model the task needs: a key of :data:`zoft.lm.models.load.KINDS`."""
    return {"mask": "masked", "head": "classifier"}.get(task.kind, "causal")


def num_labels(task: Task) -> int:
    """Classes of a fresh head for this task."""
    return len(getattr(task, "labels", ())) or 2


def class_names(task: Task) -> tuple[str, ...]:
    """The classes of a head for this task, by name; empty where they have none."""
    return tuple(map(str, getattr(task, "labels", ()))) if model_kind(task) == "classifier" else ()
