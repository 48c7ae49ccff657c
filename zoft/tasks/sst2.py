"""SST-2: sentiment of film-review sentences, with MeZO's template, sampling and splits."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.data.files import Row, column, read_rows
from zoft.errors import UserError
from zoft.tasks.base import Example, Splits, Task


@dataclass
class SST2(Task):
    """``{sentence} It was`` terrible / great; train and dev from the training split, test from the validation split.

    Args:
        num_train: rows to train on.
        num_dev: rows the best checkpoint is chosen by.
        num_test: held-out rows that the reported metric is computed on; fewer where the split has fewer.
        data_seed: which rows go where; the run's seed does not change them.
        max_length: tokens kept of a prompt and its option; the beginning of longer ones is cut.
        train: hub name (``name:subset``) or a local file with the columns sentence and label.
        validation: the same for the held-out rows.

    References: Socher et al. 2013; Malladi et al. 2023 (MeZO), Table 14 (template); its published sampler.
    """

    train: str = "nyu-mll/glue:sst2"
    validation: str = "nyu-mll/glue:sst2"

    def load(self) -> Splits:
        """MeZO's rows: a permutation under the seed, dev from its end."""
        import numpy

        rows = read_rows(self.train, "train")
        if len(rows) < self.num_train + self.num_dev:  # MeZO's sampler would let dev eat the training rows
            raise UserError(
                f"{self.train} has {len(rows)} rows, num_train={self.num_train} and num_dev={self.num_dev} are wanted: "
                "lower task.num_train or task.num_dev"
            )
        order = numpy.random.RandomState(self.data_seed).permutation(len(rows))[: self.num_train + self.num_dev]
        picked = [self._example(rows[i], self.train, i) for i in order]
        held = read_rows(self.validation, "validation")
        order = numpy.random.RandomState(self.data_seed).permutation(len(held))[: self.num_test]
        test = [self._example(held[i], self.validation, i) for i in order]
        return Splits(train=picked[: -self.num_dev], dev=picked[-self.num_dev :], test=test)

    def _example(self, row: Row, source: str, index: int) -> Example:
        number = int(index) + 1
        sentence = str(column(row, "sentence", source, number))
        label = str(column(row, "label", source, number))
        if label not in ("0", "1"):
            raise UserError(f"{source}: row {number}: label must be 0 (negative) or 1 (positive), got {label!r}")
        return Example(f"{sentence.strip()} It was", (" terrible", " great"), int(label))
