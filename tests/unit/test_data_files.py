"""Every format reads the same rows; every broken file is one sentence with the file and the line."""

from __future__ import annotations

import json
import re

import pytest

from zoft.data.files import SUFFIXES, column, read_rows
from zoft.errors import UserError

ROWS = [{"text": 'a fine, "quoted" film', "label": "1"}, {"text": "naïve", "label": "0"}]


def written(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        import csv

        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_reads_the_same_rows(tmp_path, suffix):
    assert read_rows(written(tmp_path / f"rows{suffix}", ROWS)) == ROWS


def test_suffixes_in_capitals(tmp_path):
    path = tmp_path / "ROWS.JSONL"
    path.write_text('{"a": 1}\n')
    assert read_rows(str(path)) == [{"a": 1}]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    written(path, ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_rows(str(path)) == ROWS


def test_blank_lines_and_windows_line_ends(tmp_path):
    jsonl, csv = tmp_path / "a.jsonl", tmp_path / "a.csv"
    jsonl.write_bytes(b'{"a": 1}\r\n\r\n  \n{"a": 2}')
    csv.write_bytes(b"a,b\r\n1,2\r\n\r\n3,4\r\n")
    assert read_rows(str(jsonl)) == [{"a": 1}, {"a": 2}]
    assert read_rows(str(csv)) == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]


def test_a_newline_inside_a_cell(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"two\nlines",1\n')
    assert read_rows(str(path)) == [{"text": "two\nlines", "label": "1"}]


BROKEN = {
    "cut.jsonl": (b'{"a": 1}\n{"a": \n', r"cut.jsonl:2: not a JSON object"),
    "list.jsonl": (b'{"a": 1}\n\n[1]\n', r"list.jsonl:3: expected a JSON object, found list"),
    "number.jsonl": (b"7\n", r"number.jsonl:1: expected a JSON object, found int"),
    "deep.jsonl": (b'{"a": 1}\n' + b"[" * 100_000 + b"\n", r"deep.jsonl:2: not a JSON object"),
    "latin.jsonl": (b'{"a": 1}\n{"a": "na\xefve"}\n', r"latin.jsonl:2: not UTF-8 text \(byte 9"),
    "latin.csv": (b"a,b\n1,2\nna\xefve,2\n", r"latin.csv:3: not UTF-8 text"),
    "wide.csv": (b"a,b\n1,2\n1,2,3\n", r"wide.csv:3: 3 cells, the header has 2"),
    "narrow.tsv": (b"a\tb\n1\n", r"narrow.tsv:2: 1 cells, the header has 2"),
    "huge.csv": (b"a,b\n1," + b"x" * 200_000 + b"\n", r"huge.csv:2: "),
    "broken.json": (b'[{"a": 1},\n{"a": }]', r"broken.json:2"),
    "object.json": (b'{"a": 1}', r"object.json: expected a list of JSON objects; one object a line is .jsonl"),
    "mixed.json": (b'[{"a": 1}, 3]', r"mixed.json: expected a list of JSON objects"),
    "text.parquet": (b"not parquet at all", r"text.parquet: not a parquet file"),
    "empty.jsonl": (b"", r"empty.jsonl has no rows"),
    "empty.json": (b"[]", r"empty.json has no rows"),
    "void.json": (b"", r"void.json:1"),
    "header.csv": (b"a,b\n", r"header.csv has no rows"),
    "empty.csv": (b"", r"empty.csv has no rows"),
    "blank.csv": (b"\n1,2\n", r"blank.csv"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_sentence_with_its_place(tmp_path, name):
    content, message = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_rows(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_file_that_is_not_there_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"there is no data file rows.jsonl \(looked in {re.escape(str(tmp_path))}\)"):
        read_rows("rows.jsonl")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match="there is no data file"):
        read_rows("folder.csv")


def test_another_ending_names_those_that_are_read(tmp_path):
    path = tmp_path / "rows.xlsx"
    path.write_bytes(b"PK")
    with pytest.raises(UserError, match=r"rows.xlsx is not a data file: expected a name ending in .jsonl, .json, .csv"):
        read_rows(str(path))


def test_a_hub_name_that_cannot_be_reached_is_one_sentence(monkeypatch):
    import datasets

    def refuse(*_args, **_kwargs):
        raise ConnectionError("Couldn't reach the hub\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"could not load 'nobody/nothing:sub' \(train\).*give a local file") as caught:
        read_rows("nobody/nothing:sub")
    assert "\n" not in str(caught.value)


def test_a_hub_name_is_split_into_name_and_subset(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kw: asked.append((args, kw)) or [{"a": 1}])
    assert read_rows("nyu-mll/glue:sst2", "validation") == [{"a": 1}]
    read_rows("imdb")
    assert asked == [(("nyu-mll/glue", "sst2"), {"split": "validation"}), (("imdb", None), {"split": "train"})]


def test_a_missing_column_names_the_row_and_the_columns_there_are():
    assert column({"text": "x", "n": 0}, "n", "f.csv", 1) == 0
    for row in ({"text": "x"}, {"text": "x", "label": None}):
        with pytest.raises(UserError, match=r"f.csv: row 3 has no 'label' \(its columns: text"):
            column(row, "label", "f.csv", 3)
