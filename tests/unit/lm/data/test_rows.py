"""Parts of a batch: nothing is lost, options stay together, and padding goes where it is all there is."""

from __future__ import annotations

import pytest
import torch

from tests.models import batch_for, tiny_opt
from zoft.lm.data.rows import examples_of, groups_of, lengths_of, of_lengths, take


def padded(*lengths: int) -> dict:
    """Left-padded rows; token ids count from 10 on."""
    width = max(lengths)
    ids, mask = torch.ones(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.arange(length) + 10 * (row + 1)
        mask[row, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(lengths))}


def with_options(sizes: list[int], lengths: list[int]) -> dict:
    batch = padded(*lengths)
    batch["num_options"] = torch.tensor([size for size in sizes for _ in range(size)])
    batch["option_len"] = torch.ones(len(lengths), dtype=torch.long)
    batch["packed"] = {"input_ids": batch["input_ids"]}
    batch["name"] = "kept as it is"
    return batch


def test_examples_are_single_rows_without_padding():
    ones = examples_of(padded(2, 4, 1))
    assert [one["input_ids"].tolist() for one in ones] == [[[10, 11]], [[20, 21, 22, 23]], [[30]]]
    assert all(bool(one["attention_mask"].all()) for one in ones)
    assert [one["labels"].tolist() for one in ones] == [[0], [1], [2]]


def test_the_options_of_an_example_stay_together():
    batch = with_options([2, 1, 3], [3, 4, 2, 5, 5, 6])
    assert groups_of(batch) == [[0, 1], [2], [3, 4, 5]]
    ones = examples_of(batch)
    assert [len(one["input_ids"]) for one in ones] == [2, 1, 3]
    assert [one["input_ids"].shape[1] for one in ones] == [4, 2, 6]
    assert [one["option_len"].tolist() for one in ones] == [[1, 1], [1], [1, 1, 1]]
    assert all("packed" not in one and one["name"] == "kept as it is" for one in ones)


def test_rows_of_some_length():
    batch = padded(2, 4, 1, 4)
    assert lengths_of(batch).tolist() == [2, 4, 1, 4]
    assert of_lengths(batch, 3, float("inf"))["labels"].tolist() == [1, 3]
    short = of_lengths(batch, 0, 2)
    assert (short["labels"].tolist(), short["input_ids"].shape) == ([0, 2], (2, 2))
    assert of_lengths(batch, 5, 9) is None
    assert of_lengths(batch, 0, 9) is batch  # as it came, packed rows included


def test_an_example_is_as_long_as_its_longest_option():
    batch = with_options([2, 2], [2, 5, 3, 3])
    assert of_lengths(batch, 4, 9)["input_ids"].shape == (2, 5)
    assert of_lengths(batch, 0, 3)["input_ids"].shape == (2, 3)


@pytest.mark.parametrize("bound", range(8))
def test_long_and_short_rows_are_all_rows(bound):
    batch = padded(2, 4, 1, 4, 7)
    parts = [of_lengths(batch, 0, bound), of_lengths(batch, bound + 1, float("inf"))]
    assert sorted(label for part in parts if part for label in part["labels"].tolist()) == list(range(5))


def test_batches_without_a_mask():
    images = {"pixel_values": torch.zeros(3, 2, 4, 4), "labels": torch.arange(3)}
    assert lengths_of(images).tolist() == [1, 1, 1]
    assert [one["pixel_values"].shape for one in examples_of(images)] == [(1, 2, 4, 4)] * 3
    ids = {"input_ids": torch.zeros(2, 5, dtype=torch.long), "labels": torch.zeros(2, 5)}
    assert lengths_of(ids).tolist() == [5, 5]


def test_padding_inside_and_on_the_right():
    batch = padded(3, 3)
    batch["attention_mask"] = torch.tensor([[1, 0, 1], [1, 1, 0]])
    assert take(batch, [1])["input_ids"].tolist() == [[20, 21]]
    assert take(batch, [0])["input_ids"].tolist() == [[10, 11, 12]]  # what is between tokens stays
    batch["attention_mask"].zero_()
    assert take(batch, [0])["input_ids"].shape == (1, 3)


def test_the_mean_over_examples_of_equal_length_is_the_loss_of_the_batch():
    model = tiny_opt()
    batch = batch_for(model)
    with torch.no_grad():
        apart = torch.stack([model(**one).loss for one in examples_of(batch)]).mean()
        torch.testing.assert_close(apart, model(**batch).loss, rtol=1e-6, atol=0)


def test_a_row_alone_has_the_loss_that_it_has_among_padding():
    model, batch = tiny_opt(), batch_for(tiny_opt(), rows=2)
    batch["attention_mask"][0, :3] = 0
    batch["labels"][0, :4] = -100  # the first token is predicted by padding, or by nothing
    for row, one in enumerate(examples_of(batch)):
        same = {key: value[row : row + 1] for key, value in batch.items()}
        with torch.no_grad():
            torch.testing.assert_close(model(**one).loss, model(**same).loss, rtol=1e-5, atol=0)
