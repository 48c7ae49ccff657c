"""Rows on disk: whole lines only, whenever the writer was killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from zoft.errors import UserError
from zoft.utils.rows import RowFile, append, csv_line, drop_cut_line, json_line, whole_lines


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_line_that_was_cut_off_is_dropped_and_written_again(tmp_path: Path, cut: int):
    path = tmp_path / "rows.jsonl"
    file = RowFile(path, [json_line({"a": 1})])
    file.add(json_line({"a": 2}))
    path.write_bytes(path.read_bytes()[:-cut])
    assert whole_lines(path) == [b'{"a": 1}']
    with path.open("a+b") as opened:
        assert drop_cut_line(opened) == [b'{"a": 1}']
        opened.write(json_line({"a": 3}))
    assert whole_lines(path) == [b'{"a": 1}', b'{"a": 3}']


def test_the_last_row_is_replaced_in_place(tmp_path: Path):
    path = tmp_path / "rows.csv"
    file = RowFile(path, [csv_line(["x", "y"]), csv_line([1, ""])])
    file.replace_last(csv_line([1, 5]))
    file.add(csv_line([2, ""]))
    file.replace_last(csv_line([2, 6]))
    assert whole_lines(path) == [b"x,y", b"1,5", b"2,6"]


def test_a_link_is_not_written_through(tmp_path: Path):
    (tmp_path / "other").write_text("mine\n")
    file = RowFile(tmp_path / "rows.csv", [])
    (tmp_path / "rows.csv").unlink()
    (tmp_path / "rows.csv").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match="symbolic link"):
        file.add(b"1\n")
    assert (tmp_path / "other").read_text() == "mine\n"


def test_rows_follow_behind_a_line_that_was_cut_off(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    append(path, [json_line({"a": 1})])
    path.write_bytes(path.read_bytes() + b'{"a": 2')
    append(path, [json_line({"a": 3})])
    assert whole_lines(path) == [b'{"a": 1}', b'{"a": 3}']


def test_no_row_is_appended_through_a_link(tmp_path: Path):
    (tmp_path / "elsewhere").write_bytes(b"")
    (tmp_path / "rows").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="link"):
        append(tmp_path / "rows", [b"1\n"])
