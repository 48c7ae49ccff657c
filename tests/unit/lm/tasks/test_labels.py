"""Labels of every kind of file by one rule: numbers and blanks are no differences, a missing one is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from zoft.errors import UserError
from zoft.lm.tasks._fields import one_of
from zoft.lm.tasks._labels import label_key
from zoft.lm.tasks.custom import Custom

SUFFIXES = ("csv", "tsv", "json", "jsonl", "parquet")
SMALL = {"num_dev": 2, "num_test": 2, "num_train": 4}
TEMPLATE = "{text} It was"


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as a file of the kind that its name says."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text("[" + ",\n".join(json.dumps(row) for row in rows) + "]", encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def task(path: Path, labels: list[Any], **fields: Any) -> Custom:
    rows = [{"text": f"row {number}", "label": label} for number, label in enumerate(labels)]
    return Custom(train=str(written(path, rows)), **{"template": TEMPLATE} | SMALL | fields)


def all_of(custom_task: Custom) -> list[Any]:
    splits = custom_task.load()
    return [*splits.train, *splits.dev, *splits.test]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("prompt", ["aligned", "none", "head"])
def test_fault_3_blanks_around_a_label_make_no_other(tmp_path, suffix, prompt):
    template = TEMPLATE if prompt == "aligned" else ""
    labels = ["pos", "neg", " pos", "neg\u00a0", "pos ", "neg", "pos", "neg"]
    custom_task = task(tmp_path / f"own.{suffix}", labels, prompt=prompt, template=template)
    assert sorted(row.label for row in all_of(custom_task)) == [0, 0, 0, 0, 1, 1, 1, 1]
    if prompt == "head":
        assert custom_task.labels == ("neg", "pos")
    else:
        assert {row.options for row in all_of(custom_task)} == {(" neg", " pos")}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("labels", [[0.0, 1.0] * 4, [0, 1] * 4, ["0.0", "1.0 "] * 4, ["+1", "-1"] * 4, [0.5, 1.0] * 4])
def test_fault_3_a_number_is_one_label_however_it_is_written(tmp_path, suffix, labels):
    low, high = sorted({float(label) for label in labels})
    words = {low: "bad", high: "good"}
    for one in (words, {f"{low:g}": "bad", f"{high:.2f}": "good"}):
        rows = all_of(task(tmp_path / f"own.{suffix}", labels, words=one))
        number = {row.prompt: row.label for row in rows}
        assert number["row 0 It was"] == (float(labels[0]) == high)
        assert number["row 1 It was"] == (float(labels[1]) == high)


def test_fault_3_numbers_take_words_on_the_command_line(tmp_path):
    from zoft.config import compose

    path = written(tmp_path / "own.csv", [{"text": f"row {i}", "label": ("0.0", "1.0")[i % 2]} for i in range(8)])
    sizes = [f"task.{name}={value}" for name, value in SMALL.items()]
    for words in ("{0.0: bad, 1.0: good}", "{0: bad, 1: good}"):
        more = [f"task.words={words}", "task.template='{text} It was'"]
        cfg = compose(["config=quickstart", "task=custom", f"task.train={path}", *sizes, *more])
        assert {row.options for row in all_of(cfg.task)} == {(" bad", " good")}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("missing", ["", "  ", None])
@pytest.mark.parametrize("prompt", ["aligned", "head"])
def test_fault_3_a_missing_label_is_refused_with_its_place(tmp_path, suffix, missing, prompt):
    template = TEMPLATE if prompt == "aligned" else ""
    custom_task = task(tmp_path / f"own.{suffix}", ["a", "b", missing, *"ababa"], prompt=prompt, template=template)
    place = {"csv": ":4", "tsv": ":4", "json": ":3", "jsonl": ":3", "parquet": ": row 3"}[suffix]
    with pytest.raises(
        UserError, match=rf"own\.{suffix}{place}: no label: 'label' is empty: fill it in, or leave the row out"
    ):
        custom_task.load()
    with pytest.raises(UserError, match=rf"own\.{suffix}{place}: no label"):
        task(tmp_path / f"own.{suffix}", ["a", "b", missing, *"ababa"], words={"a": "x", "b": "y"}).load()


def test_fault_3_a_label_that_is_not_there_at_all(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n{"text": "b"}\n' * 4)
    with pytest.raises(UserError, match=r"own\.jsonl:2: no label: 'label' is not there"):
        Custom(train=str(path), template=TEMPLATE, **SMALL).load()
    nan = written(tmp_path / "own.parquet", [{"text": "a", "label": 1.0}, {"text": "b", "label": float("nan")}] * 4)
    with pytest.raises(UserError, match=r"own\.parquet: row 2: no label"):
        Custom(train=str(nan), template=TEMPLATE, words={0: "x", 1: "y"}, **SMALL).load()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("prompt", ["aligned", "none", "head"])
def test_fault_3_an_empty_text_is_refused_with_its_place(tmp_path, suffix, prompt):
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(["a", "b", " ", *"cdefg"])]
    path = written(tmp_path / f"own.{suffix}", rows)
    template = TEMPLATE if prompt == "aligned" else ""
    place = {"csv": ":4", "tsv": ":4", "json": ":3", "jsonl": ":3", "parquet": ": row 3"}[suffix]
    with pytest.raises(UserError, match=rf"own\.{suffix}{place}: 'text' is empty"):
        Custom(train=str(path), prompt=prompt, template=template, **SMALL).load()


@pytest.mark.parametrize("prompt", ["aligned", "head"])
def test_fault_3_labels_that_differ_in_case_alone_are_refused_with_their_rows(tmp_path, prompt):
    template = TEMPLATE if prompt == "aligned" else ""
    custom_task = task(tmp_path / "own.csv", ["pos", "neg", "Pos", *"abcde"], prompt=prompt, template=template)
    with pytest.raises(UserError, match=r"own\.csv:4: the label 'Pos' differs from 'pos' \(.*own\.csv:2\) in its case"):
        custom_task.load()
    both = {"pos": "fine", "Pos": "great", "neg": "bad"}
    assert len(all_of(task(tmp_path / "own.csv", ["pos", "neg", "Pos", "neg"] * 2, words=both))) == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"pos": "good", "pos ": "great", "neg": "bad"}, r"one word for each label .*'pos'"),
        ({1: "good", "1.0": "great", 0: "bad"}, r"one word for each label .*'1'"),
        ({"a": "so  so", "b": " so so"}, r"another word for each label"),
        ({" ": "good", "b": "bad"}, r"no label is empty"),
        ({"a": True, "b": False}, r"each of them text"),
    ],
)
def test_fault_3_words_that_stand_twice_are_refused(tmp_path, words, said):
    with pytest.raises(UserError, match=said):
        task(tmp_path / "own.csv", list("abababab"), words=words).load()


def test_fault_3_true_and_false_are_labels_in_every_format(tmp_path):
    for suffix, labels in (
        ("jsonl", [True, False] * 4),
        ("csv", ["True", "FALSE"] * 4),
        ("parquet", [True, False] * 4),
    ):
        for words in ({True: "yes", False: "no"}, {"true": "yes", "false": "no"}):
            rows = all_of(task(tmp_path / f"own.{suffix}", labels, words=words))
            assert {row.prompt: row.label for row in rows}["row 0 It was"] == 0


def test_fault_3_the_published_tasks_read_numbers_by_the_same_rule():
    for value in (1, 1.0, "1", "1.0", " 1 "):
        assert one_of({"label": value}, "label", ("terrible", "great"), "own.csv", 1) == 1
    for value in (True, "true", "True", "TRUE"):
        assert one_of({"answer": value}, "answer", ("False", "True"), "own.csv", 1) == 1
    with pytest.raises(UserError, match=r"own\.csv: row 7: no label"):
        one_of({"label": " "}, "label", ("terrible", "great"), "own.csv", 7)


def test_fault_3_what_looks_like_a_number_and_is_a_name_stays_one():
    assert label_key("01") == "01"
    assert label_key("1e1") == "1e1"
    assert label_key("10.10") == "10.1"
    assert label_key("caf\u0065\u0301") == label_key("caf\u00e9")
    with pytest.raises(UserError, match="a label must be a word or a number, got a list"):
        label_key(["a"])


@pytest.mark.parametrize("unseen", ["\u200b", "\ufeff", "\u00a0", "\u2003", "\u2060"])
@pytest.mark.parametrize("prompt", ["aligned", "head"])
def test_fault_3_what_is_not_seen_at_a_labels_ends_makes_no_other(tmp_path, unseen, prompt):
    labels = ["pos", f"pos{unseen}", "neg", f"{unseen}neg"] * 3
    custom_task = task(tmp_path / "own.csv", labels, prompt=prompt, template=TEMPLATE if prompt == "aligned" else "")
    assert {example.label for example in all_of(custom_task)} == {0, 1}


@pytest.mark.parametrize("other", ["po\u200bs", "\uff50os", "po\u00ads"])
def test_fault_3_labels_that_look_the_same_are_refused_with_their_rows(tmp_path, other):
    custom_task = task(tmp_path / "own.csv", ["pos", "neg", other, *"abcde"])
    with pytest.raises(UserError, match=r"own\.csv:4: .* differs from 'pos' .* look the same or are not seen"):
        custom_task.load()


def test_fault_3_the_first_row_may_lack_what_others_have(tmp_path):
    """It is the row without a label, and not a file without labels."""
    file = tmp_path / "own.jsonl"
    file.write_text('{"text": "a"}\n' + "".join(f'{{"text": "b{i}", "label": "{"xy"[i % 2]}"}}\n' for i in range(9)))
    with pytest.raises(UserError, match=r"own\.jsonl:1: no label: 'label' is not there"):
        Custom(train=str(file), template="{text} is").load()


def test_fault_3_names_of_columns_may_have_blanks_around_them(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text("text , label\n" + "".join(f"b{i},{'xy'[i % 2]}\n" for i in range(9)))
    assert len(all_of(Custom(train=str(file), template="{text} is"))) == 9
    file.write_text("text, text\na,b\n")
    with pytest.raises(UserError, match=r"own\.csv:1: two columns are called 'text'"):
        Custom(train=str(file), template="{text} is").load()


def test_fault_3_line_ends_of_old_macs_are_a_sentence(tmp_path):
    file = tmp_path / "own.csv"
    file.write_bytes(b"text,label\ra,x\rb,y\r")
    with pytest.raises(UserError, match=r"own\.csv:1: a line end of old Macs"):
        Custom(train=str(file), template="{text} is").load()
