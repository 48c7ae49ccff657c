"""Fault 5: every step has its own micro-batches and no others, whatever the rows come as."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from tests.models import VOCAB, tiny_bert_classifier, tiny_llama
from zoft import ZOConfig, ZOTrainer
from zoft.errors import UserError

IDS = torch.randint(4, VOCAB, (40, 9), generator=torch.Generator().manual_seed(0))


def row(index: int, classes: bool) -> dict[str, torch.Tensor]:
    """Rows of different numbers of labels: a wrong divisor shows."""
    labels = torch.tensor(index % 3) if classes else IDS[index].masked_fill(torch.arange(9) < index % 5, -100)
    return {"input_ids": IDS[index], "attention_mask": torch.ones_like(IDS[index]), "labels": labels}


class Stream(IterableDataset):
    """Rows without a known number."""

    def __init__(self, count: int, classes: bool = False) -> None:
        self.count, self.classes = count, classes

    def __iter__(self):
        return (row(index, self.classes) for index in range(self.count))


class Counted(Stream):
    """The same with a number."""

    def __len__(self) -> int:
        return self.count


class Overstated(Stream):
    """A number that is too large, as that of a stream whose rows are filtered."""

    def __len__(self) -> int:
        return self.count + 7


class Table(Dataset):
    def __init__(self, count: int, classes: bool = False) -> None:
        self.count, self.classes = count, classes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        return row(index, self.classes)


class Watched(ZOTrainer):
    """Keeps which rows a step was made of, and what a plain call of the model says of them together."""

    def training_step(self, model, *args, **kwargs):
        before = self.run_steps.last_batch
        loss = super().training_step(model, *args, **kwargs)
        batch = self.run_steps.last_batch
        if batch is not before:  # the last micro-batch of a step, whose queries were made just now
            window = batch.micro_batches
            rows = {name: torch.cat([inputs[name] for inputs in window]) for name in window[0]}
            with torch.no_grad():
                self.steps.append((rows["input_ids"], float(model(**rows).loss), len(window)))
        return loss


def run(folder, rows, *, classes=False, resume=False, steps=7, **arguments):
    given = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": steps, "save_steps": 3}
    config = ZOConfig(
        output_dir=str(folder), learning_rate=1e-30, logging_steps=1, report_to=[], disable_tqdm=True,
        **given | arguments,
    )  # fmt: skip
    model = tiny_bert_classifier() if classes else tiny_llama()
    trainer = Watched(model, config, train_dataset=rows, estimator="one_sided")
    trainer.steps = []
    result = trainer.train(resume_from_checkpoint=resume or None)
    return trainer, result


def logged(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("classes", [False, True], ids=["tokens", "classes"])
@pytest.mark.parametrize("kind", [Stream, Counted, Overstated, Table])
@pytest.mark.parametrize("count", [3, 4, 5, 8, 10, 12, 14])
def test_fault_5_the_loss_of_every_step_is_that_of_its_rows(kind, count, classes, tmp_path):
    trainer, result = run(tmp_path, kind(count, classes), classes=classes, num_train_epochs=20)
    wanted = [loss for _, loss, _ in trainer.steps]
    assert len(wanted) == 7 or kind is Overstated  # passes are counted by the number that is too large
    torch.testing.assert_close(torch.tensor(logged(trainer)), torch.tensor(wanted), rtol=2e-3, atol=0)
    assert result.metrics["train_loss"] == pytest.approx(sum(wanted) / len(wanted), rel=2e-3)


@pytest.mark.parametrize("accumulation", [1, 2, 3, 5])
def test_fault_5_every_row_of_a_stream_is_used_in_turn(accumulation, tmp_path):
    trainer, _ = run(tmp_path, Stream(10), gradient_accumulation_steps=accumulation, steps=6)
    assert [count for _, _, count in trainer.steps] == [accumulation] * 6
    used = torch.cat([ids for ids, _, _ in trainer.steps])
    assert torch.equal(used, IDS[:10].repeat(20, 1)[: len(used)])


@pytest.mark.parametrize(("drop_last", "counts"), [(False, [2, 1, 2, 1]), (True, [2, 2, 2, 2])])
def test_fault_5_a_table_ends_its_pass_with_a_smaller_step(drop_last, counts, tmp_path):
    trainer, _ = run(tmp_path, Table(10), steps=4, dataloader_drop_last=drop_last)
    assert [count for _, _, count in trainer.steps] == counts
    wanted = [loss for _, loss, _ in trainer.steps]
    torch.testing.assert_close(torch.tensor(logged(trainer)), torch.tensor(wanted), rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", [Stream, Counted, Table])
@pytest.mark.parametrize("count", [3, 10, 14])
def test_fault_5_a_resumed_run_goes_on_behind_the_last_row(kind, count, tmp_path):
    whole, _ = run(tmp_path / "whole", kind(count), num_train_epochs=20)
    run(tmp_path / "cut", kind(count), steps=3, num_train_epochs=20)
    resumed, _ = run(tmp_path / "cut", kind(count), resume=True, num_train_epochs=20)
    assert [ids.tolist() for ids, _, _ in resumed.steps] == [ids.tolist() for ids, _, _ in whole.steps[3:]]
    assert logged(resumed) == logged(whole)
    last, wanted = ([line["epoch"] for line in one.state.log_history if "loss" in line] for one in (resumed, whole))
    assert list(map(int, last[3:])) == list(map(int, wanted[3:]))  # passes
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [Stream, Counted, Overstated])
def test_fault_20_a_stream_keeps_the_rows_that_fill_no_batch(kind, tmp_path):
    """The Trainer passes dataloader_drop_last over for them, without a word."""
    with pytest.raises(UserError, match=r"dataloader_drop_last=true is not for a stream"):
        run(tmp_path, kind(10), dataloader_drop_last=True, num_train_epochs=20)


@pytest.mark.parametrize("kind", [Stream, Counted, Overstated, Table])
def test_fault_5_rows_of_nothing_are_a_sentence(kind, tmp_path):
    with pytest.raises(UserError, match="is empty"):
        run(tmp_path, kind(0), num_train_epochs=20)


def test_fault_5_a_stream_that_can_be_read_once_is_told_so(tmp_path):
    class Once(IterableDataset):
        def __init__(self) -> None:
            self.rows = (row(index, False) for index in range(10))

        def __iter__(self):
            return self.rows

    with pytest.raises(UserError, match=r"pass 2 .* found none: train_dataset gives its rows only once"):
        run(tmp_path, Once(), num_train_epochs=20)
    with pytest.raises(UserError, match="gives its rows only once"):
        run(tmp_path / "one", Once(), num_train_epochs=20, gradient_accumulation_steps=1)
