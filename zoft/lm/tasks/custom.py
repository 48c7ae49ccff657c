"""Your own data: a file or a hub dataset, its columns found or named, in any of six formats."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from typing import Any, cast

from zoft.errors import UserError, did_you_mean
from zoft.lm.data.choosing import choose
from zoft.lm.data.examples import Completion, PreferencePair
from zoft.lm.data.files import ASSET, located, read_placed
from zoft.lm.tasks import _custom_rows as rows
from zoft.lm.tasks._custom_formats import FORMATS, Reading, listed, reading
from zoft.lm.tasks._labels import in_order, label_key, look, spelled
from zoft.lm.tasks._layouts import unread_content
from zoft.lm.tasks.base import NO_ROWS, PROMPTS, NewRow, Splits, Task
from zoft.utils.words import counted

log = logging.getLogger("zoft.lm.tasks.custom")
_JOINS = "([{<>\"'`|/=-_#@$"
"""What a word may follow without a blank."""

MAX_LABELS = 64
"""Labels that can be their own words; more is no set of labels."""

_ANSWERS = {"text_label": "label", "multiple_choice": "answer", "completion": "completion", "reward": "reward"}
"""Format -> the role that a new row has no column for."""

_MOST_HELD_OUT, _TEST, _DEV = 0.5, 0.2, 0.1
"""Of a file: the most that is held out as it is set; beyond that, these shares are for test and dev."""

_LOOKED_AT = 100
"""Rows whose columns say what the data are: the first may lack some that others have."""

MAX_CLASSES = 1000
"""Labels that can be classes of a head."""


@dataclass
class _Noting:
    """Makes examples, and notes once what a user would want to know of the rows on the way.

    Args:
        example_of: (row, place) -> example.
        used: the columns that are read.
        written: those of the template.
    """

    example_of: Callable[[Any, str], Any]
    used: tuple[str, ...]
    written: tuple[str, ...]
    noted: set[str] = field(default_factory=set)

    def __call__(self, row: Any, where: str) -> Any:
        """The example."""
        example = self.example_of(row, where)
        for name in unread_content(row, (*self.used, *self.noted), example):
            self.noted.add(name)
            log.warning(
                "NOT READ: the column %r, which looks like content (%s: %r): name it in task.template or task.columns, "
                "or drop it",
                name,
                where,
                " ".join(str(row[name]).split())[:60],
            )
        for name in self.written:
            if f"empty {name}" not in self.noted and isinstance(row.get(name), str) and not row[name].strip():
                self.noted.add(f"empty {name}")
                log.warning("the column %r is empty in some rows (first at %s)", name, where)
        self._note_glued(example, where)
        return example

    def _note_glued(self, example: Any, where: str) -> None:
        one = example.chosen if isinstance(example, PreferencePair) else example
        if "glued" in self.noted or not isinstance(one, Completion):
            return
        last, first = one.prompt[-1:], one.completion[:1]
        if last and not last.isspace() and first.isalnum() and first.isascii() and last not in _JOINS:
            self.noted.add("glued")
            seen = f"{one.prompt[-20:]}{one.completion[:20]}"
            log.warning(
                "nothing stands between prompt and completion: the model reads %r (%s); 'task.template=\"{prompt} \"' "
                "puts a blank there, if one is meant",
                seen,
                where,
            )


@dataclass
class _Label:
    """A label of the training rows: as its first row has it, where that is, and how many rows have it."""

    spelling: str
    where: str
    rows: int = 0


@dataclass
class Custom(Task):
    r"""Rows of a file or hub dataset: text + label, multiple choice, prompt + completion, chat, preferences, rewards.

    Without ``validation`` the held-out rows are taken from ``train``, which is then cut into three disjoint parts.
    `zoft data show` prints the first rows as the model will see them. docs/data.md has an example of every format.

    Args:
        num_train: rows to train on; fewer where the file has fewer.
        num_dev: rows the best checkpoint is chosen by; a tenth of a file of which more than half would be held out.
        num_test: held-out rows that the reported metric is computed on; a fifth of such a file.
        data_seed: which rows go where; the run's seed does not change them.
        max_length: tokens kept of a row; the beginning of longer ones is cut. 0: all that the model takes.
        train: a json, jsonl, csv, tsv or parquet file, a data set that `zoft fetch` brings (``zoft:NAME``), or a hub
            name (``name:subset``).
        validation: the same for held-out rows; empty takes them from ``train``.
        format: text_label, multiple_choice, completion, chat, preference or reward; auto finds it from the columns.
        columns: which column plays which role where its name does not say so, e.g. ``{prompt: q, completion: a}``;
            ``choices`` may be several, ``{choices: [a, b, c]}``.
        prompt: of text_label: aligned (the template), none (the text and the words only), or head (the text for a fresh
            classification head). The text is the template's columns, or without a template the column that is found or
            named as ``text``.
        label: the column that holds the label; empty finds it by its name.
        template: the prompt, with columns in braces, e.g. ``{text}\nIs this spam? Answer:``.
        words: label -> answer word, e.g. ``{ham: No, spam: Yes}``; empty takes labels that are words as they are. A
            head's classes are in the same order.
    """

    escapes = ("template", "words")

    num_train: int = 1000
    num_dev: int = 100
    num_test: int = 500
    max_length: int = 0
    train: str = ""
    validation: str = ""
    format: str = "auto"
    columns: dict[str, Any] = field(default_factory=dict)
    prompt: str = "aligned"
    label: str = ""
    template: str = ""
    words: dict[Any, str] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse a format that there is not, and settings that it would not read."""
        super().check()
        for name, known in (("format", ("auto", *FORMATS)), ("prompt", PROMPTS)):
            near = did_you_mean(getattr(self, name), known)
            meant = near.strip() if "Did" in near else ""
            self.require(getattr(self, name) in known, name, f"one of {', '.join(known)}", meant)
        self._refuse_unread(self.format)

    @property
    def kind(self) -> str:
        """Options are ranked and texts continued, unless a head is wanted."""
        return "head" if self.prompt == "head" else "options"

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Names of a head's classes, in their order; there are none without a head."""
        return tuple(self._words(self.reading().columns["label"])) if self.kind == "head" else ()

    def load(self) -> Splits:
        """Read, check every row, and cut."""
        self._need(not self._held_out_in_train(), "validation", "another file than task.train, or empty")
        reading = self.reading()
        if reading.found:
            log.warning("task.train=%s is read as %s", self.train, reading.sentence())
        example_of = self._maker(reading)
        held = self.num_test if not self.validation else 0
        pool = self._chosen(self.train, "train", example_of, held + self.num_dev + self.num_train)
        held, num_dev = self._counts(held, len(pool))
        if self.validation:
            test = self._chosen(self.validation, "validation", example_of, self.num_test)
        else:
            test, pool = pool[:held], pool[held:]
        dev, train = pool[:num_dev], pool[num_dev:][: self.num_train]
        self.say_if_fewer(len(train))
        return cast(Any, Splits)(train=train, dev=dev, test=test)

    def remembered(self) -> dict[str, Any]:
        """What the training rows have said of themselves, as JSON: a finished run reads new rows without them."""
        reading = self.reading()
        words = self._words(reading.columns["label"]) if reading.format == "text_label" else {}
        return {"format": reading.format, "columns": reading.columns, "words": words}

    def remember(self, said: dict[str, Any]) -> None:
        """Go by what another one's :meth:`remembered` was, and not by the training rows, which may be gone."""
        vars(self).pop("labels", None)
        self._remembered = said

    def for_new_rows(self) -> tuple[NewRow, tuple[str, ...]]:
        """Rows of the same columns; those of the label, the answer, the completion or the reward may be missing."""
        reading = self.reading()
        if reading.format in ("chat", "preference"):
            raise UserError(
                f"the rows of {self.train} are {FORMATS[reading.format].what}, which have no answer to predict: try "
                "the model with zoft chat or zoft generate"
            )
        example_of, labelled = self._maker(reading), reading.format == "text_label"
        names = tuple(self._words(reading.columns["label"])) if labelled else ()
        role = _ANSWERS[reading.format]
        answer = names[0] if names else 0 if role == "answer" else "?"
        known = {reading.columns[role]: answer} if role in reading.columns else {}
        optional = {*known, reading.columns.get("input"), reading.columns.get("system")}

        def example(row: Any, where: str) -> Any:
            for name in example_of.used:
                if name not in optional:  # asked before the answer stands among the columns that an error lists
                    rows.value_of(row, name, where)
            return example_of({**row, **known}, where)

        return example, names

    def _counts(self, num_test: int, num_rows: int) -> tuple[int, int]:
        """Held-out and dev rows: as set, or shares of a small file where they are the defaults.

        Args:
            num_test: rows that are to be held out of the file; 0 where they have a file of their own.
            num_rows: rows of the file.
        """
        wanted = {"num_test": num_test, "num_dev": self.num_dev}
        counts = dict(wanted)
        if sum(wanted.values()) > _MOST_HELD_OUT * num_rows:
            for name, share in (("num_test", _TEST), ("num_dev", _DEV)):
                if wanted[name] == type(self).__dataclass_fields__[name].default:  # the default, and not asked for
                    counts[name] = min(wanted[name], max(1, int(num_rows * share)))
        if num_rows <= sum(counts.values()):
            raise UserError(
                f"{self.train} has too few rows ({num_rows:,}) for num_test={counts['num_test']} and "
                f"num_dev={counts['num_dev']} with something left to train on: lower them, or give task.validation"
            )
        if counts != wanted:
            counted = " and ".join(f"task.{name}={count:,}" for name, count in counts.items() if count != wanted[name])
            log.warning("%s has only %s rows, hence %s", self.train, f"{num_rows:,}", counted)
        return counts["num_test"], counts["num_dev"]

    def reading(self) -> Reading:
        """What the first row of ``train`` is, by its columns and the settings.

        Raises:
            UserError: no first row, no format that fits or several, or a setting that the format does not read.
        """
        if not self.train:
            raise UserError(NO_ROWS)
        if self.words:
            self._check_words()
        if known := vars(self).get("_remembered"):
            return Reading(known["format"], known["columns"], (), found=False)
        template = rows.Template.of(self.template).columns if self.template else ()
        placed = read_placed(self.train, "train")
        where, row = next(placed)
        for _, later in islice(placed, _LOOKED_AT - 1):  # the first row may lack what others have
            row = row | {name: value for name, value in later.items() if row.get(name) is None}
        chosen = reading(
            row,
            where,
            format=self.format,
            columns=self.columns,
            label=self.label,
            words=bool(self.words),
            template=template,
        )
        self._refuse_unread(chosen.format)
        if chosen.format == "text_label" and not self.template:
            others = listed(name for name in row if name != chosen.columns["label"])
            rule = f"the prompt, with columns in braces (there are {others}), e.g. '{{text}} It was'"
            self._need(self.prompt != "aligned", "template", rule)
            if "text" not in chosen.columns:
                named = "name it, 'task.columns={text: COLUMN}'"
                raise UserError(f"{where} has no column called text (its columns: {listed(row)}): {named}")
        return chosen

    def _held_out_in_train(self) -> bool:
        """Whether both sources are one file; a hub name has splits of its own, an asset need not be there to say so."""
        if self.train.startswith(ASSET) and self.train == self.validation:
            return True
        train, validation = located(self.train), located(self.validation or ".")
        return validation.is_file() and train.is_file() and validation.samefile(train)

    def _chosen(self, source: str, split: str, example_of: Callable[[Any, str], Any], wanted: int) -> list[Any]:
        return choose(partial(read_placed, source, split), example_of, wanted, self.data_seed)

    def _maker(self, reading: Reading) -> _Noting:
        """(row, place) -> example, for this format."""
        template = rows.Template.of(self.template) if self.template else None
        written = tuple(template.columns if template else ())
        for role, column in reading.columns.items():
            if column in written and role != "choices":
                why = f"the column of the {role}, and a prompt that says it leaves nothing to learn"
                raise UserError(f"task.template names {column!r}, {why}: take {{{column}}} out")
        more: dict[str, Any] = {"columns": reading.columns}
        if reading.format != "chat":
            more["template"] = template
        if reading.format == "text_label":
            head = self.prompt == "head"
            more |= {
                "words": dict.fromkeys(self.labels, "") if head else self._words(reading.columns["label"]),
                "head": head,
            }
            if self.prompt != "aligned":
                more["template"] = rows.Template.bare(template.columns if template else [reading.columns["text"]])
        return _Noting(partial(getattr(rows, reading.format), **more), reading.used + written, written)

    def _words(self, column: str) -> dict[str, str]:
        """Label -> its word: as set, or the labels of the training rows where those are words or a head's classes."""
        if self.words:
            return {label_key(label) or "": word for label, word in self.words.items()}
        if known := vars(self).get("_remembered"):
            return dict(known["words"])
        words: dict[tuple[str, str], dict[str, str]] = vars(self).setdefault("_found", {})  # all rows are read for it
        if (self.train, column) not in words:
            words[self.train, column] = self._words_of_rows(column)
        return words[self.train, column]

    def _words_of_rows(self, column: str) -> dict[str, str]:
        head = self.kind == "head"
        seen = self._labels_seen(column, MAX_CLASSES if head else MAX_LABELS)
        labels = ", ".join(f"{label[:40]} ({counted(each.rows, 'rows')})" for label, each in list(seen.items())[:12])
        if head and len(seen) < 2:
            raise UserError(f"a head needs two classes or more; the labels of {self.train} are {labels}")
        if len(seen) == 1:
            raise UserError(
                f"every row of {self.train} has the same label, {labels}: there is nothing to tell apart; give rows of "
                "two labels or more, or name the column that has them, task.label=COLUMN"
            )
        if not seen or not (head or all(any(c.isalpha() for c in label) for label in seen)):
            raise UserError(
                "task.words must be a word for each label, e.g. '{0: terrible, 1: great}', got none; the labels of "
                f"{self.train} are {labels}"
            )
        what = "classes" if head else "words"
        log.warning("task.words is not given: the labels are their own %s: %s", what, labels)
        return {label: each.spelling for label, each in seen.items()}

    def _labels_seen(self, column: str, limit: int) -> dict[str, _Label]:
        """Every label of the training rows, numbers by their size and then texts by the alphabet."""
        seen: dict[str, _Label] = {}
        for where, row in read_placed(self.train, "train"):
            label = rows.label_of(row, column, where)
            known = seen.setdefault(label, _Label(spelled(row[column]), where))
            known.rows += 1
            if len(seen) > limit:
                raise UserError(
                    f"{where}: {column!r} has more than {limit} different values so far, no set of labels: name "
                    "the label's column, task.label=COLUMN, or the format, task.format=completion"
                )
        self._refuse_alike(seen)
        return {label: seen[label] for label in sorted(seen, key=in_order)}

    def _refuse_alike(self, seen: dict[str, _Label]) -> None:
        """Labels that look alike, whatever their case, are one that was misspelt, or need words of their own."""
        first: dict[str, _Label] = {}
        for one in seen.values():
            other = first.setdefault(look(one.spelling), one)
            if other is not one:
                in_case = one.spelling.casefold() == other.spelling.casefold()
                how = "its case" if in_case else "characters that look the same or are not seen"
                both = f"the label {one.spelling[:40]!r} differs from {other.spelling[:40]!r} ({other.where})"
                mend = "write them alike, or give each its word, 'task.words={LABEL: WORD, ...}'"
                raise UserError(f"{one.where}: {both} in {how} alone: {mend}")

    def _check_words(self) -> None:
        self._need(len(self.words) >= 2, "words", "a word for each label, e.g. '{0: terrible, 1: great}'")
        words: list[Any] = list(self.words.values())
        self._need(all(isinstance(word, str) for word in words), "words", "a word for each label, each of them text")
        self._need(all(word.strip() for word in words), "words", "a word for each label, none of them empty")
        self._need(len({" ".join(w.split()) for w in words}) == len(words), "words", "another word for each label")
        keys = [label_key(label) for label in self.words]
        self._need(None not in keys, "words", "a word for each label, and no label is empty")
        twice = next((key for key in keys if keys.count(key) > 1), None)
        self._need(twice is None, "words", f"one word for each label (blanks, and 1 or 1.0, make no other: {twice!r})")

    def _need(self, ok: bool, field: str, rule: str) -> None:
        """As :meth:`require`, for what is found out when the data are read: by the name that the user sets it by."""
        if not ok:
            raise UserError(f"task.{field} must be {rule}, got {getattr(self, field)!r}")

    def _refuse_unread(self, format: str) -> None:
        """A setting that would be ignored is an error."""
        if format == "auto":
            return
        labelled = format == "text_label"
        if self.prompt != "aligned" and not labelled:
            why = "whose prompt is the template's or the row's own"
            if self.prompt == "head":
                why = "which have no classes" + " for all rows" * (format == "multiple_choice")
            raise UserError(
                f"task.prompt={self.prompt} is for text + label, and not for rows of format={format}, {why}: leave it "
                "out, or set task.format=text_label"
            )
        if labelled and self.prompt == "aligned" and self.columns:
            raise UserError(
                "task.columns is not read by format=text_label with task.prompt=aligned: task.template and task.label "
                "name its columns"
            )
        for name in ("template", "words", "label", "columns"):
            if getattr(self, name) and name not in FORMATS[format].settings:
                raise UserError(f"task.{name} is not read by format={format}: leave it out, or set task.format")
