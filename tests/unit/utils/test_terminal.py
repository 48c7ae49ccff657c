"""Text on a narrow terminal: nothing is cut, words and commands stay whole, a second column stays a column."""

import io

import pytest

from zoft.cli import VERBS, help_text
from zoft.utils.terminal import columns, fitted, laid_out, whole, width_of

HELP = [None, *VERBS]


def help_of(verb, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    return help_text.of(verb)


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("verb", HELP)
def test_help_fits_a_terminal_and_says_the_same(verb, width, monkeypatch):
    text = help_of(verb, monkeypatch)
    shown = laid_out(text, width)
    assert shown.split() == text.split(), "a word is lost, cut or moved"
    wide = [line for line in shown.splitlines() if len(line) > width]
    commands = ("zoft ", "torchrun ")  # stand alone in their line, to be copied
    assert all(line.lstrip().startswith(commands) for line in wide if len(line.split()) > 1), wide


@pytest.mark.parametrize("verb", HELP)
def test_help_fits_120_columns(verb, monkeypatch):
    text = help_of(verb, monkeypatch)
    assert max(map(len, text.splitlines())) <= 120
    assert laid_out(text, 120) == text


def test_a_second_column_stays_one():
    line = "  seeds=[0,1,2]  the first one chooses the learning rate, the others measure"
    assert laid_out(line, 48).splitlines() == [
        "  seeds=[0,1,2]  the first one chooses the",
        "                 learning rate, the others",
        "                 measure",
    ]


def test_a_text_beside_a_long_command_goes_below_it():
    line = "  zoft train config=quickstart peft=lora          train an adapter"
    assert laid_out(line, 50).splitlines() == ["  zoft train config=quickstart peft=lora", "      train an adapter"]


def test_a_row_of_a_table_is_left_alone():
    row = "  method    loss    seconds    " + "x" * 60
    assert laid_out(row, 40) == row


def test_a_command_that_ends_a_sentence_is_not_broken():
    shown = laid_out("  plot  a curve drawn again, also while it runs: zoft plot runs/mine", 50)
    assert shown.splitlines()[-1] == "        zoft plot runs/mine"


def test_a_command_with_settings_is_one_line_however_long():
    run = "runs/classify-seed0-task.train=reviews.csv,task.words=0-terrible-1-great"
    for line in (f"next    zoft predict run={run} data=new.csv", f"        zoft export run={run} output=there"):
        assert laid_out(line, 80) == line
    assert "\n" in laid_out("note    zoft says what it does in words that are many more than fit on one line of it", 80)


def test_an_error_of_a_verb_begins_in_its_own_line():
    shown = laid_out("zoft: error: zoft bench needs config=: a file of configs/bench, a path, or an experiment", 60)
    assert shown.splitlines()[0].startswith("zoft: error: zoft bench needs")


def test_a_file_has_no_width_and_columns_says_one(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    text = "word " * 60
    assert width_of(io.StringIO()) is None
    assert fitted(text, io.StringIO()) == text
    assert columns(io.StringIO()) == 80
    monkeypatch.setenv("COLUMNS", "50")
    assert max(map(len, fitted(text, io.StringIO()).splitlines())) <= 50


def test_what_is_whole_is_not_broken(monkeypatch):
    text = "  options  " + ", ".join(whole(f"' option {k}' (1 token)") for k in range(9))
    lines = laid_out(text, 60).split("\n")
    assert len(lines) > 2
    assert all(line.rstrip(",").endswith("token)") for line in lines)
    monkeypatch.delenv("COLUMNS", raising=False)
    assert fitted(whole("a b"), io.StringIO()) == "a b"
