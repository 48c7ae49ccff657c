"""What goes wrong inside a step: losses that are no numbers, memory that ends, losses that jump."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tests.faults.damage import digest, trainer, weights_are_finite
from zoft import ZOTrainer
from zoft.errors import NonFiniteLossError
from zoft.estimators.central import Central
from zoft.estimators.one_sided import OneSided
from zoft.journal import file as journal

DIRECTIONS = 3
WHERE: dict[str, tuple[Any, list[int]]] = {
    "plus": (Central(), [0]),
    "minus": (Central(), [1]),
    "both": (Central(), [0, 1]),
    "one of all": (Central(num_directions=DIRECTIONS), [3]),
    "all": (Central(num_directions=DIRECTIONS), list(range(2 * DIRECTIONS))),
    "clean": (OneSided(num_directions=DIRECTIONS), [0]),
}
"""Where in a step: the estimator, and the queries whose losses are no numbers."""
VALUES = (math.nan, math.inf, -math.inf)
DTYPES = ("float32", "bfloat16", "float16")


class Faulty(ZOTrainer):
    """Whose loss is another one at some queries: (step, number of the query in it) -> loss, or a factor."""

    faults: dict[tuple[int, int], float] = {}  # noqa: RUF012  # set on the instance
    factors: dict[int, float] = {}  # noqa: RUF012

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.asked = 0
        return super().training_step(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if not self.query_forward.is_querying:
            return loss
        step, query = self.progress.steps, self.asked
        self.asked += 1
        fault = self.faults.get((step, query), self.faults.get((-1, query)))
        return loss * self.factors.get(step, 1.0) if fault is None else loss * 0 + fault


def bad_losses(folder: Path, where: str, value: float, step: int) -> None:
    """One step without numbers: the weights stay those before it, it is counted, logged and in the journal."""
    estimator, queries = WHERE[where]
    one = trainer(folder, Faulty, estimator=estimator, max_steps=4, save_strategy="no", logging_steps=1)
    one.faults = {(step, query): value for query in queries}
    seen = [digest(one)]
    one.add_callback(_Witness(lambda: seen.append(digest(one))))
    one.train()
    assert [a == b for a, b in pairwise(seen)] == [i == step for i in range(4)]
    assert weights_are_finite(one)
    assert one.progress.num_skipped == 1
    lines = [line for line in one.state.log_history if "loss" in line]
    assert [line["num_skipped_steps"] for line in lines] == [int(i >= step) for i in range(4)]
    if len(queries) > 1 or where == "clean":
        assert not math.isfinite(lines[step]["loss"])  # and not 0, as the Trainer would log it
    assert [r.skipped for r in journal.read(folder / journal.NAME).records] == [i == step for i in range(4)]


class _Witness(TrainerCallback):
    def __init__(self, look: Callable[[], None]) -> None:
        self.look = look

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.look()


def bad_to_the_end(folder: Path, value: float, most: int = 3) -> None:
    """Losses that stay no numbers end the run after so many steps, on the weights before them."""
    one = trainer(folder, Faulty, max_steps=50, save_strategy="no", max_skipped_steps=most)
    before = digest(one)
    one.faults = {(-1, 0): value}
    try:
        one.train()
    except NonFiniteLossError:
        assert digest(one) == before
        assert one.progress.steps == most
        return
    raise AssertionError("the run did not stop")


class OutOfMemory(ZOTrainer):
    """Whose forward of some number does not fit, or that of too many rows."""

    at, rows, asked, thrown = -1, 10**9, 0, 0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.query_forward.is_querying:
            self.asked += 1
            if self.asked == self.at or len(inputs["input_ids"]) > self.rows:
                self.thrown += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().compute_loss(model, inputs, *args, **kwargs)


def out_of_memory(folder: Path, times: int, seed: int = 0) -> tuple[float, int]:
    """OOM at random forwards, one a run: (largest difference of any step's loss, most retries of a run)."""
    generator, most, retries = random.Random(seed), 0.0, 0
    given: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 6,
        "estimator": Central(eps=1e-2),
    }
    plain = trainer(folder / "plain", **given)
    plain.train()
    expected = _losses(plain)
    for number in range(times + 1):
        one = trainer(folder / str(number), OutOfMemory, **given)
        if number < times:
            one.at = generator.randrange(1, 2 * 6 + 1)
        else:
            one.rows = 1  # nothing but single examples fits: halved as often as there are halves
        one.train()
        assert one.thrown >= 1
        bound = 1 if number < times else 3  # log2 of the batch of 8
        assert one.thrown <= bound, one.thrown
        retries = max(retries, one.thrown)
        assert one.progress.num_queries == plain.progress.num_queries
        most = max(most, *(abs(a - b) for a, b in zip(_losses(one), expected, strict=True)))
    return most, retries


def _losses(one: ZOTrainer) -> list[float]:
    return [line["loss"] for line in one.state.log_history if "loss" in line]


BACK = {"rollback": {"guard_back": 4}, "clip": {}}


def guarded(folder: Path, guard: str) -> ZOTrainer:
    """A step whose loss is fifty times the others', under a guard."""
    one = trainer(
        folder, Faulty, max_steps=24, guard=guard, guard_steps=10, **BACK[guard], logging_steps=1, save_steps=6
    )
    one.factors = {16: 50.0}
    begun = _go_back(one)
    one.train()
    assert one.state.global_step == 24
    assert weights_are_finite(one)
    records = journal.read(folder / journal.NAME)
    assert len(records.records) == 24
    if guard == "clip":
        assert one.progress.num_guarded == 1
        assert not begun
    else:
        assert len(begun) == 1
        assert [note["lr_factor"] for note in records.notes] == [0.5]
        rates = [record.lr for record in records.records]
        assert rates == [1e-3] * 12 + [5e-4] * 12  # from step 16 back by four
    return one


def _go_back(one: Any) -> list[int]:
    """The steps that a run goes back to, as it does; what made it leave its range is over then."""
    begun: list[int] = []
    go_back = one.journal.go_back

    def noted(back: Any, model: Any) -> None:
        begun.append(back.step)
        one.factors = {}
        go_back(back, model)

    one.journal.go_back = noted
    return begun


def downhill(seeds: int, size: int = 32, steps: int = 40) -> float:
    """The share of seeds with which L = ½‖θ‖² has fallen after some steps."""
    from torch import nn

    from zoft.component import create
    from zoft.step.estimate import StepEstimate
    from zoft.step.method import Method
    from zoft.step.update import ZOOptimizer
    from zoft.weights.tensors import Weights

    fell = 0
    for seed in range(seeds):
        model, estimator = nn.Linear(size, 1, bias=False), Central(eps=1e-3)
        model.weight.data = torch.randn(1, size, generator=torch.Generator().manual_seed(seed))
        method = Method.of(None, estimator, None, None)
        session = create("engine", "layerwise", "layerwise").bind(
            model, method.bind(Weights(model)), lambda batch, of=model: of(batch).square().sum() / 2
        )
        zo_optimizer = ZOOptimizer([{"params": [model.weight], "weight_decay": 0.0}], method.optimizer, session, 1e-2)
        first = float(model.weight.detach().square().sum())
        for step in range(steps):
            directions = estimator.directions(seed, step)
            session.coordinates.begin(directions[0])
            zo_optimizer.begin(directions[0])
            slopes = estimator.projected_grads(session.losses(torch.eye(size), estimator.points(directions)))
            zo_optimizer.apply(StepEstimate.of(list(zip(directions, slopes.tolist(), strict=True))))
        fell += float(model.weight.detach().square().sum()) < first
    return fell / seeds


def stand_still(folder: Path, dtype: str, count: int) -> None:
    """So many steps at a learning rate of zero, with queries: not one bit of a weight is another."""
    one = trainer(
        folder, dtype=dtype, max_steps=count, learning_rate=0.0, save_strategy="no", estimator=Central(eps=1e-2)
    )
    before = digest(one)
    one.train()
    assert digest(one) == before
    assert one.progress.updates == count
