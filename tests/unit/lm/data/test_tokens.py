"""Examples to token rows and batches, with the tokenizer of MeZO's recorded run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from tests.runs import tiny_tokenizer
from zoft.errors import UserError
from zoft.lm.data.examples import Completion
from zoft.lm.data.generated import encode_generated
from zoft.lm.data.tokens import OptionCollator, encode, encode_prompts, open_ended
from zoft.lm.models.load import load_tokenizer
from zoft.lm.tasks import Example

MODEL = Path(__file__).parents[3] / "assets" / "mezo_trajectory" / "model"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(MODEL), as_mezo=True)


def example(prompt="the movie is dull . It was", options=(" terrible", " great"), label=1) -> Example:
    return Example(prompt, options, label)


def test_the_tokenizer_pads_left_and_begins_opts_texts_as_mezo_does(tokenizer):
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id == 1
    assert tokenizer("the")["input_ids"][0] == tokenizer.bos_token_id == 0


def test_sequences_are_the_prompt_and_each_option(tokenizer):
    (row,) = encode([example()], tokenizer, 100)
    assert row["label"] == 1
    prompt = tokenizer("the movie is dull . It was")["input_ids"]
    for option, ids, length in zip((" terrible", " great"), row["sequences"], row["lengths"], strict=True):
        assert ids == tokenizer("the movie is dull . It was" + option)["input_ids"]
        assert length == len(ids) - len(prompt) >= 1


def test_lengths_follow_mezos_rule_also_where_tokens_merge_across_the_border(tokenizer):
    options = (" great", " xylophone quartz", "s")
    (row,) = encode([example("It was", options, 0)], tokenizer, 100)
    prompt = len(tokenizer("It was")["input_ids"])
    assert row["lengths"] == [len(tokenizer("It was" + o)["input_ids"]) - prompt for o in options]
    assert len(set(row["lengths"])) > 1


def test_examples_with_unequal_numbers_of_options_do_not_mix(tokenizer):
    rows = encode([example(), example("B", (" a", " b", " c"), 2), example("C", (" d",), 0)], tokenizer, 100)
    assert [len(r["sequences"]) for r in rows] == [2, 3, 1]
    assert rows[1]["sequences"][2] == tokenizer("B c")["input_ids"]
    assert rows[2]["sequences"][0] == tokenizer("C d")["input_ids"]


def test_long_rows_are_cut_at_the_left_and_keep_their_first_token(tokenizer):
    (whole,) = encode([example()], tokenizer, 100)
    (cut,) = encode([example()], tokenizer, 8)
    for long, short in zip(whole["sequences"], cut["sequences"], strict=True):
        assert len(long) > 8
        assert short == [long[0], *long[-7:]]


def test_a_tokenizer_without_a_first_token_is_cut_plainly():
    class Plain:
        bos_token_id = None

        def __call__(self, texts):
            return {"input_ids": [[ord(c) for c in text] for text in texts]}

    (row,) = encode([Example("abcdefghij", ("k",), 0)], Plain(), 4)
    assert row["sequences"] == [[ord(c) for c in "hijk"]]


def test_what_is_continued_has_no_mark_of_its_end():
    """A tokenizer with add_eos_token=True: options stand behind words, and an answer is written behind the prompt."""
    ending = tiny_tokenizer()
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 2)]
    )
    bos, eos = 0, 2
    free, win, yes, no = tiny_tokenizer()("free win yes no")["input_ids"]
    asked = [Example("free win", (" yes", " no"), 1), Example("", (" yes", " no win"), 1)]
    rows = encode(asked, ending, 100)
    assert rows[0]["sequences"] == [[bos, free, win, yes], [bos, free, win, no]]
    assert rows[1]["sequences"] == [[bos, yes], [bos, no, win]]
    assert [row["lengths"] for row in rows] == [[1, 1], [1, 2]]
    (written,) = encode_generated([Completion("free win", " yes", "x:1")], ending, 100, 4)
    assert (written["prompt_ids"], written["sequences"]) == ([bos, free, win], [[bos, free, win, yes]])
    # a head reads a text as the tokenizer ends it: BART's at that very mark
    assert encode_prompts(asked, ending, 100)[0]["input_ids"] == [bos, free, win, eos]


def test_an_option_that_adds_nothing_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"an option adds no token to its prompt: \('', ' great'\)"):
        encode([example(options=("", " great"))], tokenizer, 100)


@pytest.mark.parametrize("length", [2, 3])
def test_an_option_longer_than_the_limit_is_refused_or_kept_whole(tokenizer, length):
    """Cutting into the answer would score tokens that are not its own."""
    options = (" xylophone quartz jigsaw", " great")
    needed = len(tokenizer("It was" + options[0])["input_ids"]) - len(tokenizer("It was")["input_ids"])
    assert needed > length
    with pytest.raises(UserError, match="max_length"):
        encode([example(options=options)], tokenizer, length)


def test_what_stays_free_for_an_answer_can_be_less(tokenizer):
    """Where the limit is the model's own it cannot be raised: a completion's prediction has 64 tokens free."""
    message = r"max_length=64, of which 64 stay free .*: set fewer .*zoft generate max_new_tokens=N.*the model takes"
    with pytest.raises(UserError, match=message):
        encode_generated([Completion("free win", "?", "x:1")], tokenizer, 64, 64)


# ----------------------------------------------------------------------------------------------------------- collator

ROWS = [
    {"sequences": [[5, 6, 7, 10], [5, 6, 7, 11]], "lengths": [1, 1], "label": 1},
    {"sequences": [[8, 12], [8, 13]], "lengths": [1, 1], "label": 0},
]


def test_one_row_a_prompt():
    batch = OptionCollator(pad_token_id=1)(ROWS)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [1, 1, 8]],
        "attention_mask": [[1, 1, 1], [0, 0, 1]],
        "option_tokens": [[10, 11], [12, 13]],
        "labels": [1, 0],
    }


def test_one_row_an_option():
    batch = OptionCollator(pad_token_id=1, one_row_per_option=True)(ROWS)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 10], [5, 6, 7, 11], [1, 1, 8, 12], [1, 1, 8, 13]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]],
        "option_len": [1, 1, 1, 1],
        "num_options": [2, 2, 2, 2],
        "labels": [1, 1, 0, 0],
    }
    assert all(value.dtype == torch.int64 for value in batch.values())


@pytest.mark.parametrize(
    "row",
    [
        {"sequences": [[5, 6, 7], [5, 6, 7, 8]], "lengths": [1, 2], "label": 0},
        {"sequences": [[5, 6, 7], [5, 9, 7]], "lengths": [1, 1], "label": 0},  # merged across the border
        {"sequences": [[5, 6, 7, 8], [5, 6, 9, 8]], "lengths": [2, 2], "label": 0},
    ],
)
def test_one_row_that_is_not_a_single_token_behind_the_same_prompt_decides_for_the_batch(row):
    batch = OptionCollator(pad_token_id=1)([*ROWS, row])
    assert "option_tokens" not in batch
    assert len(batch["input_ids"]) == 6


def test_unequal_numbers_of_single_token_options():
    rows = [*ROWS, {"sequences": [[4, 2], [4, 3], [4, 9]], "lengths": [1, 1, 1], "label": 2}]
    batch = OptionCollator(pad_token_id=1)(rows)
    assert batch["num_options"].tolist() == [2, 2, 2, 2, 3, 3, 3]
    assert batch["labels"].tolist() == [1, 1, 0, 0, 2, 2, 2]


def test_lengths_are_multiples():
    batch = OptionCollator(pad_token_id=1, multiple_of=8)(ROWS)
    assert batch["input_ids"].shape == (2, 8)
    assert batch["input_ids"][0].tolist() == [1, 1, 1, 1, 1, 5, 6, 7]
    full = [{"sequences": [[3] * 9], "lengths": [1], "label": 0}]
    assert OptionCollator(pad_token_id=1, multiple_of=8)(full)["input_ids"].shape == (1, 8)


def test_no_rows_are_none_and_empty_texts_alone_lose_the_end_mark_too():
    ending = tiny_tokenizer()
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 2)]
    )
    assert encode([], ending, 8) == encode_prompts([], ending, 8, continued=True) == []
    assert open_ended(["", ""], ending) == [[0], [0]]
