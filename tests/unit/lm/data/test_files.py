"""Every format reads the same rows; every broken file is one sentence with the file and the line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.runs import environment
from zoft.errors import UserError
from zoft.lm.data import _json
from zoft.lm.data.files import SUFFIXES, column, read_placed, read_rows

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
    "object.json": (b'{"a": 1}', r"object.json:1: expected a list of JSON objects; one object a line is .jsonl"),
    "mixed.json": (b'[{"a": 1},\n 3]', r"mixed.json:2: expected a list of JSON objects.*found '3\]'"),
    "comma.json": (b'[{"a": 1},\n]', r"comma.json:2: expected a list"),
    "missing_comma.json": (b'[{"a": 1}\n{"a": 2}]', r"missing_comma.json:2: expected a list"),
    "after.json": (b'[{"a": 1}]\n\n{}', r"after.json:3: expected a list"),
    "cut.json": (b'[{"a": 1},\n{"a": "x', r"cut.json:2: not JSON: what begins here has no end"),
    "cut_list.json": (b'[{"a": 1}', r"cut_list.json:1: expected a list.*found the end of the file"),
    "deep.json": (b'[{"a": 1},\n{"a": ' + b"[" * 100_000, r"deep.json:2: nested too deeply"),
    "latin.json": (b'[{"a": 1},\n{"a": "na\xefve"}]', r"latin.json:2: not UTF-8 text \(byte 9"),
    "deeper.jsonl": (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", r"deeper.jsonl:1: .*nested too deeply"),
    "twice.jsonl": (b'{"a": 1}\n{"a": 1, "b": 2, "a": 3}', r"twice.jsonl:2: the key 'a' stands twice"),
    "twice_inside.json": (b'[{"b": [{"a": 1, "a": 1}]}]', r"twice_inside.json:1: the key 'a' stands twice"),
    "nan.jsonl": (b'{"a": NaN}', r"nan.jsonl:1: NaN is not JSON"),
    "infinity.json": (b'[{"a": 1},\n{"a": -Infinity}]', r"infinity.json:2: -Infinity is not JSON"),
    "large.jsonl": (b'{"a": 1e999}', r"large.jsonl:1: the number 1e999 is too large"),
    "digits.jsonl": (b'{"a": ' + b"9" * 10_000 + b"}", r"digits.jsonl:1: a number of too many digits"),
    "utf16.jsonl": ('{"a": 1}'.encode("utf-16"), r"utf16.jsonl:1: UTF-16 text .*re-encode it as UTF-8"),
    "twice.csv": (b"a,b,a\n1,2,3\n", r"twice.csv:1: two columns are called 'a'"),
    "open_quote.csv": (b'a,b\n1,2\n"x,3\n4,5\n', r"open_quote.csv:\d: a quotation mark that does not fit"),
    "inner_quote.tsv": (b'a\tb\n"x" y\t3\n', r"inner_quote.tsv:2: a quotation mark that does not fit"),
    "mac.csv": (b"a,b\r1,2\r", r"mac.csv:1: "),
    "text.parquet": (b"not parquet at all", r"text.parquet: not a parquet file"),
    "empty.jsonl": (b"", r"empty.jsonl has no rows"),
    "empty.json": (b"[]", r"empty.json has no rows: give a file that has some"),
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
    with pytest.raises(UserError, match=r"^folder\.csv is a folder: give a file in it$"):
        read_rows("folder.csv")


def test_another_ending_names_those_that_are_read(tmp_path):
    path = tmp_path / "rows.xlsx"
    path.write_bytes(b"PK")
    with pytest.raises(UserError, match=r"rows.xlsx is not a data file: expected a name ending in .jsonl, .json, .csv"):
        read_rows(str(path))


@pytest.mark.parametrize(
    "source",
    ["../../etc/passwd", "/etc/passwd", "/etc", "~nobody_here/x.csv", "a\0b.jsonl", "x" * 5000 + ".csv", "json",
     "pandas", "user/../name", "a/b/c", "https://example.org/a", "", "-x/..", "file:///etc/hosts"],
)  # fmt: skip
def test_what_is_neither_a_file_nor_a_hub_name_is_not_asked_for(monkeypatch, source):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match=r"data file") as caught:
        read_rows(source)
    assert len(str(caught.value)) < 400


def test_a_link_that_leads_in_circles_and_a_pipe_are_no_files(tmp_path):
    (tmp_path / "circle.jsonl").symlink_to(tmp_path / "circle.jsonl")
    os.mkfifo(tmp_path / "pipe.csv")
    for name in ("circle.jsonl", "pipe.csv"):
        with pytest.raises(UserError, match=r"data file"):
            read_rows(str(tmp_path / name))


ROW_OF_MANY = {"text": 'say "hi" \\ {[}], \n über 日本', "list": [[1], {"a": "]"}], "n": None}


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_a_list_is_read_object_by_object_wherever_its_pieces_end(tmp_path, monkeypatch, size):
    monkeypatch.setattr(_json, "_CHUNK", size)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([ROW_OF_MANY, {}, ROW_OF_MANY], ensure_ascii=False, indent=1), encoding="utf-8")
    assert read_rows(str(path)) == [ROW_OF_MANY, {}, ROW_OF_MANY]
    assert [where for where, _ in read_placed(str(path))] == [f"{path}:{line}" for line in (2, 14, 15)]


def test_places_are_those_that_an_editor_shows(tmp_path):
    csv = tmp_path / "a.csv"
    csv.write_text("a,b\n1,2\n\n3,4\n")
    assert [where for where, _ in read_placed(str(csv))] == [f"{csv}:2", f"{csv}:4"]
    parquet = tmp_path / "a.parquet"
    written(parquet, ROWS)
    assert [where for where, _ in read_placed(str(parquet))] == [f"{parquet}: row 1", f"{parquet}: row 2"]


def test_chats_in_parquet_come_as_they_went_in(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "yo"}]}
        for i in range(99)
    ]
    assert read_rows(written(tmp_path / "a.parquet", rows)) == rows


HOSTILE = """
import json, os, sys
from itertools import islice
from pathlib import Path
from zoft.lm.data.files import read_placed
from zoft.errors import UserError
folder = Path(sys.argv[1])

def peak():  # MiB of this program; getrusage would tell the peak of the one that started it
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

def sparse(name, beginning):
    with open(folder / name, "wb") as file:
        file.write(beginning)
        file.truncate(2**30)

def parquet(name, columns, **more):
    pq.write_table(pa.table(columns), folder / name, store_schema=False, compression="zstd", **more)

if os.fork() == 0:  # what writing takes is not what reading takes
    import pyarrow as pa, pyarrow.parquet as pq
    sparse("line.jsonl", b'{"text": "a"}\\n{"text": "')
    sparse("list.json", b'[{"text": "a"},\\n{"text": "')
    sparse("blank.json", b'[')
    sparse("line.csv", b"text,label\\nfine,1\\n")
    (folder / "lists.jsonl").write_bytes(b'{"a": [' + b"[]," * 1_300_000 + b"[]]}")
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["x" * 2**20]))
    parquet("texts.parquet", {"text": long})
    turns = pa.StructArray.from_arrays([pa.array(["user"] * 2000), long], ["role", "content"])
    parquet("chat.parquet", {"messages": pa.ListArray.from_arrays(pa.array([0, 2000], pa.int32()), turns)})
    parquet("same.parquet", {"text": pa.array([b"x" * 100 * 2**20])}, use_dictionary=False)
    parquet("nulls.parquet", {"list": pa.array([[None] * 2**25], pa.list_(pa.int8()))})
    os._exit(0)
assert os.wait()[1] == 0
before = peak()
told = {}
for path in sorted(folder.iterdir()):
    try:
        told[path.name] = sum(len(row) for _, row in islice(read_placed(str(path)), 200))
    except UserError as error:
        told[path.name] = str(error).replace(str(folder), "")
print(json.dumps({"told": told, "grown": peak() - before, "before": before}))
"""


def test_hostile_files_are_refused_in_bounded_memory(tmp_path):
    """Lines of 1 GiB, 2 GiB of text in 500 bytes of parquet: what they take is some hundred MiB, and a moment."""
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, str(tmp_path)],
        capture_output=True, text=True, timeout=120, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout)
    outcomes = facts["told"]
    assert re.match(r"/line.jsonl:2: more than 4 MiB in one row", outcomes["line.jsonl"])
    assert re.match(r"/list.json:2: more than 4 MiB in one row", outcomes["list.json"])
    assert re.match(r"/blank.json:1: expected a list of JSON objects", outcomes["blank.json"])
    assert re.match(r"/line.csv:3: more than 4 MiB in one row", outcomes["line.csv"])
    assert re.match(r"/chat.parquet: row 1: more than 4 MiB in one row", outcomes["chat.parquet"])
    assert re.match(r"/same.parquet: the column 'text' unpacks", outcomes["same.parquet"])
    assert re.match(r"/nulls.parquet: the column 'list.list.element' unpacks", outcomes["nulls.parquet"])
    assert (outcomes["texts.parquet"], outcomes["lists.jsonl"]) == (200, 1)  # rows that can be read, one at a time
    assert facts["grown"] < 300


def test_a_hub_name_that_cannot_be_reached_is_one_sentence(monkeypatch):
    import datasets

    def refuse(*_args, **_kwargs):
        raise ConnectionError("Couldn't reach the hub\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr("zoft.lm.data.files.out_of_reach", lambda: "")  # it answers, and not to this question
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
