"""Masked tasks: the published pieces, encoded one by one, the mask's place, and one token for each word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.task_rows import files, rows
from zoft.component import components
from zoft.errors import UserError
from zoft.lm.data.examples import MASK, Example, Piece
from zoft.lm.data.masked import encode_masked

MODEL = Path(__file__).parents[3] / "assets" / "mezo_trajectory" / "model"
M = None
BAKERY = "Mr. Okoro sold his bakery to a chain"
STARS = ("terrible", "bad", "okay", "good", "great")
KINDS = ("Description", "Entity", "Expression", "Human", "Location", "Number")

# (task, row, the parts of its text with None for the mask, words, gold, tokens kept of the first text, of all)
PUBLISHED = [
    ("masked_sst2", 0, ["a warm and funny film ", " It was", M, "."], ("terrible", "great"), 1, 0, 128),
    ("masked_sst5", 3, ["a fine film number 0", " It was", M, "."], STARS, 3, 110, 128),
    ("masked_trec", 2, [M, ":", " What does GPS stand for ?"], KINDS, 2, 110, 128),
    ("masked_trec", 5, [M, ":", " How many moons has Mars ?"], KINDS, 5, 110, 128),
    ("masked_snli", 0, ['She said "no"', "?", M, ",", " she Spoke."], ("No", "Yes", "Maybe"), 1, 0, 256),
    ("masked_mnli", 1, ["A man sits ", "?", M, ",", " he is tired."], ("No", "Yes", "Maybe"), 2, 240, 256),
    ("masked_mnli", 2, ["A dog runs", "?", M, ",", " the dog sleeps."], ("No", "Yes", "Maybe"), 0, 240, 256),
    ("masked_rte", 1, [BAKERY, "?", M, ",", " mr. Okoro bought a chain."], ("Yes", "No"), 1, 240, 256),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from zoft.lm.models.load import load_tokenizer

    masked_tokenizer = load_tokenizer(str(MODEL))
    masked_tokenizer.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"})
    return masked_tokenizer


@pytest.mark.parametrize(
    ("name", "row", "parts", "words", "gold", "first", "whole"), PUBLISHED, ids=[f"{p[0]}-{p[1]}" for p in PUBLISHED]
)
def test_pieces_words_and_lengths_are_the_published_ones(name, row, parts, words, gold, first, whole, tokenizer):
    task = components("task")[name]()
    example = task.example(rows(name)[row], "f", row + 1)
    assert [piece.text for piece in example.pieces] == parts
    assert (example.options, example.label) == (tuple(f" {word}" for word in words), gold)
    assert (max(piece.limit for piece in example.pieces), task.max_length, task.kind) == (first, whole, "mask")
    (encoded,) = encode_masked([Example("", (), gold, pieces=example.pieces)], tokenizer, task.max_length)
    ids = [tokenizer.cls_token_id]
    for part in parts:
        ids += [tokenizer.mask_token_id] if part is None else tokenizer.encode(part, add_special_tokens=False)
    assert encoded["input_ids"] == [*ids, tokenizer.sep_token_id]
    assert encoded["input_ids"][encoded["mask_position"]] == tokenizer.mask_token_id


def test_every_masked_task_is_written_out_here():
    assert {p[0] for p in PUBLISHED} == {name for name in components("task") if name.startswith("masked_")}


@pytest.mark.parametrize(
    ("prompt", "name", "parts"),
    [
        ("none", "masked_sst2", ["a warm and funny film ", M]),
        ("none", "masked_snli", ['She said "no".', " She Spoke.", M]),
        ("head", "masked_snli", ['She said "no".', "She Spoke."]),
    ],
)
def test_other_prompts_are_raw_text(prompt, name, parts, tokenizer):
    task = components("task")[name](prompt=prompt)
    example = task.example(rows(name)[0], "f", 1)
    assert [piece.text for piece in example.pieces] == parts
    assert bool(example.options) == (prompt == "none")
    if prompt == "head":
        (encoded,) = encode_masked([example], tokenizer, 50)
        first, second = (tokenizer.encode(part, add_special_tokens=False) for part in parts)
        sep = tokenizer.sep_token_id
        assert encoded == {"input_ids": [tokenizer.cls_token_id, *first, sep, *second, sep], "label": 1}
        assert task.kind == "head"


def test_the_first_text_is_cut_to_its_limit_and_the_whole_at_its_end(tokenizer):
    pieces = (Piece("a b c d e f g", limit=3), MASK, Piece(" z y x"))
    short, cut = (encode_masked([Example("", (" great",), 0, pieces=pieces)], tokenizer, n)[0] for n in (50, 5))
    first = tokenizer.encode("a b c d e f g", add_special_tokens=False)[:3]
    assert short["input_ids"][:5] == [tokenizer.cls_token_id, *first, tokenizer.mask_token_id]
    assert (short["mask_position"], cut["input_ids"]) == (4, short["input_ids"][:5])
    assert short["word_ids"] == tokenizer.encode(" great", add_special_tokens=False)
    with pytest.raises(UserError, match="max_length=4 cuts off the mask, token 5 of 'a b c d e f g"):
        encode_masked([Example("", (" great",), 0, pieces=pieces)], tokenizer, 4)


def test_a_text_that_spells_the_mask_does_not_move_it(tokenizer):
    pieces = (Piece("so <mask> and"), Piece(" It was"), MASK)
    (row,) = encode_masked([Example("", (" great",), 0, pieces=pieces)], tokenizer, 50)
    assert row["mask_position"] == len(row["input_ids"]) - 2


def test_words_of_several_tokens_and_tokenizers_without_a_mask_are_refused(tokenizer):
    example = Example("", (" great", " xylophone"), 0, pieces=(MASK,))
    with pytest.raises(
        UserError, match=r"the label word 'xylophone' is \d tokens to this tokenizer, and a mask holds one"
    ):
        encode_masked([example], tokenizer, 50)

    class Causal:
        mask_token_id = None

    with pytest.raises(UserError, match="Causal has no mask token"):
        encode_masked([example], Causal(), 50)


def test_published_rows_by_name_and_by_number_are_the_same():
    task = components("task")["masked_mnli"]()
    row = rows("masked_mnli")[0]
    assert task.example(row, "f", 1) == task.example(row | {"label": "entailment"}, "f", 1)


def test_a_masked_task_loads_from_local_files(tmp_path):
    splits = components("task")["masked_sst2"](num_train=1, num_dev=1, **files("masked_sst2", tmp_path)).load()
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (2, 2, 2)
    assert sorted(e.label for e in splits.train) == sorted(e.label for e in splits.dev) == [0, 1]
