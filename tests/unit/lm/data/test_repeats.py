"""Rows that stand in train and held out, or twice: every format, and train, eval and data show alike."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.runs import arguments, model_folder
from zoft.cli import main
from zoft.lm.data.examples import MASK, Example, Piece
from zoft.lm.data.repeats import notes
from zoft.lm.tasks.base import Splits
from zoft.lm.tasks.custom import Custom

LEAK = re.compile(r"[23] of 4 test rows stand in train too")  # dev may have taken one


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def row(kind: str, number: int) -> dict[str, Any]:
    said, ask = f"answer {number}", f"ask {number}"
    if kind in ("text_label", "head"):
        return {"text": ask, "label": "ab"[number % 2]}
    if kind == "multiple_choice":
        return {"question": ask, "choices": ["yes", "no", said], "answer": number % 2}
    if kind == "completion":
        return {"prompt": f"{ask} ", "completion": said}
    if kind == "chat":
        return {"messages": [turn("user", ask), turn("assistant", said)]}
    if kind == "preference":
        return {"prompt": f"{ask} ", "chosen": said, "rejected": "no"}
    if kind == "preference of chats":
        ends = {"chosen": said, "rejected": "no"}
        return {side: [turn("user", ask), turn("assistant", text)] for side, text in ends.items()}
    return {"prompt": ask, "reward": number}


KINDS = ("text_label", "head", "multiple_choice", "completion", "chat", "preference", "preference of chats", "reward")


def task(folder: Path, kind: str, train: list[int], held: list[int]) -> Custom:
    for name, numbers in (("train", train), ("held", held)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row(kind, n)) + "\n" for n in numbers))
    fields: dict[str, Any] = {"template": "{text} It was"} if kind == "text_label" else {}
    fields |= {"prompt": "head"} if kind == "head" else {}
    paths = {"train": str(folder / "train.jsonl"), "validation": str(folder / "held.jsonl")}
    return Custom(**paths, num_train=100, num_dev=1, num_test=100, **fields)


@pytest.mark.parametrize("kind", KINDS)
def test_fault_8_leaks_and_repeats_are_found_in_every_format(tmp_path, kind):
    train = [
        *range(20),
        0,
        1,
    ]  # dev takes one row of 22: a held-out copy of each of 2 to 4 stays in train or goes there
    splits = task(tmp_path, kind, train, [2, 3, 4, 90]).load()
    shared = sum(1 for one in splits.train + splits.dev if one in splits.test or _in(one, splits.test))
    assert shared == 3
    messages = "\n".join(notes(splits))
    assert "test rows stand" in messages
    assert "train rows repeat" in messages
    assert notes(task(tmp_path, kind, list(range(20)), [90, 91, 92]).load()) == []


def _in(example: Any, others: list[Any]) -> bool:
    import dataclasses

    def bare(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return [bare(getattr(value, field.name)) for field in dataclasses.fields(value) if field.name != "where"]
        return value

    return any(bare(example) == bare(other) for other in others)


def test_fault_8_another_label_other_blanks_and_another_order_are_no_other_row():
    one = Example("a film", (" bad", " good"), 0)
    splits = Splits(
        train=[one], dev=[Example("a film ", (" bad", " good"), 1)], test=[Example("a  film", (" good", " bad"), 0)]
    )
    assert [note.split(":")[0] for note in notes(splits)] == [
        "1 of 1 dev rows stands in train too",
        "1 of 1 test rows stands in train too",
        "1 of 1 test rows stands in dev too",
    ]
    pieces = (Piece("a film It was"), MASK)
    masked = [Example("", (" bad", " good"), label, pieces=pieces) for label in (0, 1)]
    assert notes(Splits(train=masked, dev=[one], test=[one]))[-1] == "1 of 2 train rows repeats another"
    assert notes(Splits(train=[one], dev=[Example("b", one.options, 0)], test=[Example("c", one.options, 0)])) == []


@pytest.mark.parametrize("twin", ["caf\u0065\u0301", "c\u200bafé", "\ufeffcafé", "ca\u00adfé", "café\u00a0"])
def test_fault_8_another_spelling_of_the_same_characters_is_no_other_row(twin):
    one, other = (Example(f"a {word}", (" bad", " good"), 0) for word in ("café", twin))
    assert notes(Splits(train=[one], dev=[other], test=[]))[0].startswith("1 of 1 dev rows stands in train too")


@pytest.mark.parametrize("verb", ["train", "eval", "data show", "data show --json"])
def test_fault_8_train_eval_and_data_show_all_say_it(tmp_path, capsys, verb):
    words = arguments(tmp_path, tmp_path / "out", "trainer.save_strategy=no")
    lines = (tmp_path / "data.jsonl").read_text().splitlines()
    (tmp_path / "held.jsonl").write_text("\n".join([*lines[:3], '{"text": "free home yes no", "label": "spam"}']))
    words += [f"task.validation={tmp_path / 'held.jsonl'}", "task.num_train=100", "task.num_dev=1", "task.num_test=4"]
    words += ["budget.queries=2"]
    assert main([*verb.split(), *words]) == 0
    out, err = capsys.readouterr()
    said = {"train": err, "eval": err, "data show": out, "data show --json": out}[verb]
    assert LEAK.search(said)
    assert re.search(r"train rows? repeats? another", said)


def test_fault_8_repeated_preference_pairs_are_noted_in_train(tmp_path, capsys):
    folder = model_folder(tmp_path / "model")
    rows = [{"prompt": f"{word} ", "chosen": "yes", "rejected": "no"} for word in ("free", "win", "prize", "call") * 4]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    words = ["config=quickstart", f"model.name={folder}", "task=custom", f"task.train={tmp_path / 'pairs.jsonl'}"]
    words += [
        "objective=preference",
        "method=mezo",
        "estimator=central",
        "task.num_train=8",
        "task.num_dev=4",
        "task.num_test=4",
        "budget.queries=8",
    ]
    assert main(["train", *words, "trainer.per_device_train_batch_size=2", f"output_dir={tmp_path / 'out'}"]) == 0
    assert "4 of 4 test rows stand in train too" in capsys.readouterr().err
