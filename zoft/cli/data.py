"""`zoft data show`: the rows of a run as the model will see them, before anything is trained."""

from __future__ import annotations

import json
import logging
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zoft.errors import UserError
from zoft.utils.terminal import fitted, laid_out, whole, width_of
from zoft.utils.words import counted, read_words

ROWS = 3
"""Rows shown of a split."""

_MAX_TOKENS = 300  # of one row on the terminal; the middle of a longer one is left out
_MAX_TEXT = 600  # characters
_TOKENS_WIDTH = 80  # of a line of tokens where no terminal says another
_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"
BREAK, TAB = "↵", "⇥"
_SPLITS = ("train", "dev", "test")


def command(arguments: list[str]) -> int:
    """Show the data of a run."""
    if not arguments or arguments[0] != "show":
        given = arguments[0] if arguments else ""
        raise UserError(f"say `zoft data show`, with the arguments of zoft train, got {given!r}. See zoft data --help")
    words = read_words("data", arguments[1:], flags=["--json"], options=["--rows"])
    overrides, as_json = words.rest, "--json" in words.flags
    num_rows = _num_rows(words.options.get("--rows", str(ROWS)))
    facts = gathered(overrides, num_rows)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        print("\n".join(lines(facts, width=width_of(), colour=_colour())))
    return 0


def gathered(overrides: list[str], num_rows: int = ROWS) -> dict[str, Any]:
    """What the verb shows, as plain values; the model's weights are not read."""
    from zoft.cli.train import _quiet
    from zoft.config import compose

    _quiet()
    cfg = compose(overrides)
    from zoft.lm.data import repeats
    from zoft.lm.data.preview import preview
    from zoft.lm.models.load import load_tokenizer

    task: Any = cfg.task
    with _noted() as notes:
        reading = task.reading() if hasattr(task, "reading") else None
        splits = task.load()
        repeats.warn(splits)
    sentence = f"{task.train}: {reading.sentence()}" if reading else None
    import transformers  # what is wrong with the data has been said by now

    transformers.utils.logging.set_verbosity_error()
    tokenizer = load_tokenizer(
        cfg.model.name, revision=cfg.model.revision, as_mezo=cfg.estimator.noise == "torch_sequential"
    )
    way, objective, refusal = _way(cfg, splits.train, tokenizer)
    split_rows = {name: preview(getattr(splits, name), way, tokenizer, num_rows) for name in _SPLITS}
    for name in ("dev", "test"):
        split_rows[name]["in_train"] = repeats.repeated(getattr(splits, name), splits.train)
    return {
        "task": task.name(),
        "read_as": reading and {"format": reading.format, "columns": reading.columns, "unused": list(reading.unused)},
        "sentence": sentence,
        "notes": [note for note in notes if not (reading and reading.sentence() in note)],
        "model": cfg.model.name,
        "vocabulary": len(tokenizer),
        "max_length": way.max_length,
        "room": way.room,
        "objective": objective,
        "compares": way.compares,
        "writes": way.writes,
        "refusal": refusal,
        "classes": list(getattr(task, "labels", ())) if task.kind == "head" else [],
        "splits": split_rows,
    }


@contextmanager
def _noted() -> Iterator[list[str]]:
    """What `zoft train` would note on the way, once each, in place of noting it."""
    notes: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notes.extend({record.getMessage()} - set(notes))

    log = logging.getLogger("zoft")
    handlers, propagate = log.handlers[:], log.propagate
    log.handlers[:], log.propagate = [Kept()], False
    try:
        yield notes
    finally:
        log.handlers[:], log.propagate = handlers, propagate


def _way(cfg: Any, examples: Any, tokenizer: Any) -> tuple[Any, str, str | None]:
    """(how training would put the rows before the model, its objective's name, the sentence where it would refuse).

    An objective that does not fit shows the rows as the one would see them that they are trained on by default.
    """
    from zoft.lm import formats
    from zoft.lm.data.preview import Way
    from zoft.run.build import row_limit

    task, objective, refusal = cfg.task, formats.settled(cfg.task, examples, cfg.objective), None
    form = formats.nearest_format(task, examples, objective)
    try:
        formats.require_fit(task, form, objective)
    except UserError as error:
        refusal = str(error)
        objective = formats.scorer_of(task, examples, objective)
    room = formats.room_of(task, objective)
    terms = [term for term, _ in objective.terms()] if hasattr(objective, "terms") else [objective]
    names = {term.name() for term in terms}
    way = Way(
        form,
        lambda some, length: formats.encode_rows(form, some, tokenizer, length, room),
        row_limit(cfg, tokenizer),
        compares=form == "options" and names != {"cross_entropy"},
        writes=form == "rated" or (form == "generate" and "cross_entropy" not in names),
        room=getattr(examples[0], "max_new_tokens", room) if form in ("generate", "rated") else 0,
    )
    return way, objective.name(), refusal


def lines(facts: dict[str, Any], *, width: int | None = None, colour: bool = False) -> list[str]:
    """The facts for people.

    Args:
        facts: what :func:`gathered` gives.
        width: columns of the terminal; None breaks lines of tokens at 80 columns, and no others.
        colour: whether tokens that count are coloured too; they are always marked.
    """
    printed = [
        f"task    {facts['task']}" + (f", {safe(facts['sentence'])}" if facts["sentence"] else ""),
        f"tokens  {facts['model']}, vocabulary {facts['vocabulary']:,}; of a row {facts['max_length']:,} are kept "
        "(task.max_length)" + (f", {facts['room']:,} of them free for an answer" if facts.get("room") else ""),
        f"loss    objective={facts['objective']} {_looks_at(facts)}",
    ]
    if facts.get("refusal"):
        printed += [f"note    zoft train refuses this: {safe(facts['refusal'])}"]
    printed += [f"note    {safe(note)}" for note in facts.get("notes", ())]
    if facts.get("classes"):
        printed += ["classes " + ", ".join(f"{place} {safe(name)}" for place, name in enumerate(facts["classes"][:12]))]
    printed += [f"{name:<7} {_summary(split)}" for name, split in facts["splits"].items()]
    printed = _within("\n".join(printed), width)
    for name, split in facts["splits"].items():
        for number, row in enumerate(split["first"], start=1):
            origin = f" ({row['where']})" if row["where"] else ""
            printed += ["", f"--- {name}, row {number} of {split['rows']:,}{origin}"]
            for part in row["parts"]:
                printed += _part(part, width, colour)
            if row.get("options"):
                printed += _within(_options(row["options"]), width)
            if "answers" in row:
                printed += ["  answers  " + ", ".join(repr(safe(str(answer))) for answer in row["answers"][:12])]
            if "reward" in row:
                printed += [f"  reward   {safe(str(row['reward']))}"]
    return printed


def _looks_at(facts: dict[str, Any]) -> str:
    """What the loss is computed from."""
    if facts.get("writes"):
        return "judges what the model writes behind the prompt"
    what = "asks a head for the class of the text" if facts.get("classes") else "looks at the tokens marked ^"
    return what + (", and compares the options" if facts.get("compares") else "")


def safe(text: str) -> str:
    r"""Text that cannot move the cursor or hide anything: what does not print is written as an escape.

    Example:
        >>> print(safe("a\nb\x1b[31m"))
        a\nb\x1b[31m
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def visible(text: str) -> str:
    r"""As :func:`safe`, with signs for a line break and a tab: a backslash and an n look otherwise.

    Example:
        >>> print(visible("a\nb\tc"), visible(r"a\nb"))
        a↵b⇥c a\nb
    """
    return safe(text.replace("\n", BREAK).replace("\t", TAB))


def _summary(split: dict[str, Any]) -> str:
    tokens, read, cut = split["tokens"], split["counted"], split["cut"]
    share = f"{100 * read['total'] / max(1, tokens['total']):.0f} % of all"
    parts = [
        counted(split["rows"], "rows"),
        f"{_range(tokens)} tokens (median {tokens['median']:g})",
        f"{_range(read)} of them count{'s' * (read['max'] == 1)} ({share})" if read["max"] else "none of them count",
        f"{cut['rows']:,} cut by {cut['tokens']:,} tokens" if cut["rows"] else "none cut",
    ]
    if split.get("in_train"):
        parts.append(f"{split['in_train']:,} OF THEM STAND IN TRAIN TOO")
    labels = ", ".join(f"{safe(name)} {count:,}" for name, count in list(split["labels"].items())[:12])
    return "; ".join(parts + ([f"labels: {labels}"] if labels else []))


def _range(spread: dict[str, Any]) -> str:
    low, high = spread["min"], spread["max"]
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _part(part: dict[str, Any], width: int | None, colour: bool) -> list[str]:
    cuts = [f"{part['cut']:,} of the beginning"] * bool(part["cut"])
    cuts += [f"{part['cut_end']:,} of the end"] * bool(part["cut_end"])
    head = f"{counted(len(part['ids']), 'tokens')}, {(num := sum(part['counted'])):,} count{'s' * (num == 1)}" + (
        f", cut: {' and '.join(cuts)}" if cuts else ""
    )
    text = part["text"] if len(part["text"]) <= _MAX_TEXT else part["text"][:_MAX_TEXT] + " ..."
    printed = [f"  {part['name']}: {head}"]
    lines = visible(text).replace(BREAK, f"{BREAK}\n").split("\n")
    for k, line in enumerate(lines):
        printed += _within(f"  text     {line}" if not k else f"           {line}", width)
    return printed + _tokens(part["tokens"], part["counted"], (width or _TOKENS_WIDTH) - 11, colour)


def _within(text: str, width: int | None) -> list[str]:
    return (laid_out(text, width) if width else fitted(text)).split("\n")


def _tokens(tokens: list[str], counted: list[bool], width: int, colour: bool) -> list[str]:
    """Tokens with a bar between, and under those that count a row of ^."""
    pairs = [(visible(token), counts) for token, counts in zip(tokens, counted, strict=True)]
    if len(pairs) > _MAX_TOKENS:
        half = _MAX_TOKENS // 2
        pairs = [*pairs[:half], (f" ... {len(pairs) - 2 * half:,} more ... ", False), *pairs[-half:]]
    printed: list[str] = []
    text, marks, used = "", "", 0
    for token, counts in pairs:
        room = _cells(token) + 1
        if used and used + room > max(20, width):
            printed += _line(text, marks, first=not printed)
            text, marks, used = "", "", 0
        text += (f"{_GREEN}{token}{_PLAIN}" if colour and counts else token) + "|"
        marks += ("^" if counts else " ") * (room - 1) + " "
        used += room
    return printed + _line(text, marks, first=not printed)


def _line(text: str, marks: str, *, first: bool) -> list[str]:
    printed = [("  tokens   " if first else "           ") + text]
    return [*printed, "  counted  " + marks.rstrip()] if marks.strip() else printed


def _options(options: list[dict[str, Any]]) -> str:
    shown = (
        whole(f"{safe(option['text'])!r:.60} ({option['tokens']} token{'s' * (option['tokens'] != 1)})")
        + (whole(" <- right") if option["right"] else "")
        for option in options[:12]
    )
    return "  options  " + ", ".join(shown)


def _cells(text: str) -> int:
    """How many cells of a terminal the text takes."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def _num_rows(text: str) -> int:
    if not text.isdecimal() or int(text) > 1000:
        raise UserError(f"--rows must be a whole number up to 1000, got {text!r}")
    return int(text)


def _colour() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
