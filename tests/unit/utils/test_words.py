"""The one reader of a command line's words: what is whose, and what is refused with a sentence."""

from __future__ import annotations

import pytest

from zoft.errors import UserError
from zoft.utils.words import read_words

KNOWN = {"keys": ("run", "k"), "flags": ("--json",), "options": ("--rows", "--to")}


def test_words_are_sorted_and_keep_their_order():
    words = read_words("eval", ["b=1", "run=x=y", "--rows", "3", "a", "--json", "--to=9", "k="], **KNOWN)
    assert words.own == {"run": "x=y", "k": ""}
    assert words.rest == ["b=1", "a"]
    assert words.flags == {"--json"}
    assert words.options == {"--rows": "3", "--to": "9"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=a", "run=b"], "run is given twice, as 'a' and 'b'"),
        (["--rows", "1", "--rows=2"], "--rows is given twice"),
        (["--rows"], "--rows is followed by a value"),
        (["--rows="], "--rows is followed by a value"),
        (["--rows", "--json"], "--rows is followed by a value"),
        (["--jsn"], "zoft eval has no flag '--jsn'. Did you mean --json?"),
        (["--run=a"], "Did you mean run=a?"),
        (["-m"], "zoft eval has no flag '-m'"),
    ],
)
def test_what_is_wrong_is_one_sentence(arguments, message):
    with pytest.raises(UserError) as refused:
        read_words("eval", arguments, **KNOWN)
    assert message in str(refused.value)


def test_bare_words_are_refused_where_a_verb_has_none():
    with pytest.raises(UserError, match=r"'runs/a' is not an argument of zoft predict.*Did you mean run=runs/a"):
        read_words("predict", ["runs/a"], bare=False, **KNOWN)
