"""`zoft generate`: what a run's model, or any model, writes behind prompts."""

from __future__ import annotations

import json
from typing import Any

from zoft.errors import UserError, did_you_mean
from zoft.utils.words import counted, read_words

KEYS = ("run", "model", "prompt", "data", "output", "max_new_tokens", "temperature", "seed")
FLAGS = ("--chat", "--json")
HELP = """\
usage: zoft generate run=DIR prompt=TEXT [max_new_tokens=128] [temperature=0] [seed=0] [--chat]
       zoft generate model=NAME data=FILE [output=FILE.jsonl|FILE.csv] [--json]

What a run's model, or any causal language model, writes behind a prompt, or behind every row's `prompt` of a file.
temperature=0 takes the likeliest token; above, the same seed gives the same text. --chat puts the prompt into the
model's chat template as the user's turn; a run on conversations does so by itself.

Examples:
  zoft generate run=runs/quickstart-seed0 prompt='The weather today is' max_new_tokens=20
  zoft generate model=zoft:smollm2-135m-instruct prompt='Name three fruits.' --chat
"""


def command(arguments: list[str]) -> int:
    """Write."""
    asked, overrides, flags, _ = read_words("generate", arguments, keys=KEYS, flags=FLAGS, bare=False)
    if ("prompt" in asked) == ("data" in asked):
        raise UserError(
            'give prompt="..." or data=FILE with a column called prompt: zoft generate run=runs/mine prompt="Once"'
        )
    how = writing_of(asked)
    from zoft.use.inference.generate import chat_ids, plain_ids, written
    from zoft.use.inference.predict import check_output, write_rows

    if "output" in asked:
        check_output(asked["output"], asked.get("data", ""))
    rows = [{"prompt": asked["prompt"]}] if "prompt" in asked else _rows(asked["data"])
    prompts = [row["prompt"] for row in rows]
    loaded = loaded_of("generate", asked, overrides)
    as_chat = "--chat" in flags or loaded.is_chat
    room = how.max_new_tokens
    ids = [
        chat_ids(loaded, [{"role": "user", "content": prompt}], room) if as_chat else plain_ids(loaded, prompt, room)
        for prompt in prompts
    ]
    texts = [written(loaded, [one], how)[0] for one in ids]
    rows = [row | {"text": text} for row, text in zip(rows, texts, strict=True)]
    if "output" in asked:
        write_rows(asked["output"], rows)
        print(f"{counted(len(rows), 'texts')}: {asked['output']}")
    else:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False, default=str) if "--json" in flags else row["text"])
    return 0


def writing_of(asked: dict[str, str]) -> Any:
    """Length, temperature and seed, as typed."""
    from zoft.use.inference.generate import WritingSettings

    given: dict[str, Any] = {}
    for key, kind, what in (
        ("max_new_tokens", int, "a whole number"),
        ("temperature", float, "a number"),
        ("seed", int, "a whole number"),
    ):
        if key in asked:
            try:
                given[key] = kind(asked[key])
            except ValueError:
                raise UserError(f"{key} must be {what}, got {asked[key]!r}") from None
    return WritingSettings(**given)


def loaded_of(verb: str, asked: dict[str, str], overrides: list[str], *, with_base: bool = False) -> Any:
    """The run's model, or the one that is named; it writes text."""
    if bool(asked.get("run")) == bool(asked.get("model")):
        raise UserError(f"give run=DIR (a finished run) or model=NAME: zoft {verb} run=runs/mine")
    from zoft.use.inference.load import load_named, load_run, require_writer

    if asked.get("model"):
        if overrides:
            near = did_you_mean(overrides[0].partition("=")[0], KEYS)
            near = near if near.startswith(" Did") else ""
            raise UserError(f"{overrides[0]} could be a run's key alone, and model= names no run: leave it out.{near}")
        loaded = load_named(asked["model"])
    else:
        loaded = load_run(asked["run"], overrides, with_base=with_base)
    require_writer(loaded)
    return loaded


def _rows(data: str) -> list[dict[str, Any]]:
    from zoft.lm.data.files import read_placed, text_in

    rows = [row | {"prompt": text_in(row, "prompt", where)} for where, row in read_placed(data, "test")]
    if any("text" in row for row in rows):
        raise UserError(f"{data} has a column called 'text', as what is written would be: rename it")
    return rows
