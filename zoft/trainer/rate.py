"""The search for a learning rate: short trainings on a ladder of rates, and the chosen one tried for longer.

A short training does not see what ruins a long one, so the rate that it finds best is trained with four times as long;
where the loss has risen by then, the next lower rate is tried so, and where the budget does not pay for that the next
lower rate is taken unseen. Every trial begins at the same weights.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from zoft.errors import NonFiniteLossError, UserError
from zoft.trainer.batch import StepBatch
from zoft.utils.files import write_atomically
from zoft.weights.tensors import Weights

log = logging.getLogger(__name__)

NAME = "auto.json"
FACTOR, MOST_TRIALS, LONGER = 4.0, 6, 4
"""From a rate to the next; trials at most; lengths of a trial that the chosen rate is trained for."""
SHARE, MOST = 0.03, 0.25
"""Of the budget: what a trial takes at least, and what the whole search may take."""
_RISE = 0.05
"""Of the loss: what a longer training may end above the best short one, as dev rows are few."""
_FLAT = 1e-4
"""Of the loss: rates whose trials end closer than that have moved nothing."""
STARTS = {"whiten": 4.0, "adam": 1e-3, "adamw": 1e-3, "sgd": 1e-5, "momentum": 1e-5}


def climb(start: float, loss: Callable[[float], float], may_go_on: Callable[[], bool]) -> float:
    """The learning rate with the lowest loss on a ladder around ``start``, walked in the direction that pays.

    Args:
        start: the first rate.
        loss: of a rate; infinite where it ruins the model. Of 0 it is asked where all rates end alike.
        may_go_on: whether another trial can be paid for.

    Example:
        >>> climb(1.0, lambda rate: abs(math.log(rate / 0.07)), lambda: True)
        0.0625
    """
    losses = {0: loss(start)}
    for sign in (1, -1):
        at, rung = 0, sign
        while may_go_on():
            losses[rung] = loss(start * FACTOR**rung)
            ruined = sign < 0 and math.isinf(losses[rung])  # lower still
            flat = sign > 0 and are_flat((losses[at], losses[rung]))  # far too low: two rungs at a time
            if not (losses[rung] < losses[at] or ruined or flat):
                break
            at, rung = rung, rung + (2 if flat else sign)
        if at or not may_go_on():  # it fell in this direction: the other one was not meant
            break
    if are_flat(losses.values()):
        lowest, highest = start * FACTOR ** min(losses), start * FACTOR ** max(losses)
        if not are_flat((loss(0.0), *losses.values())):
            log.warning("every learning rate from %.3g to %.3g ends at the same loss: the lowest does", lowest, highest)
            return lowest
        log.warning(
            "no learning rate from %.3g to %.3g changed the loss in trials this short: the choice is a guess, and "
            "higher ones are worth a try (a larger budget tries more)",
            *(lowest, highest),
        )
        return highest
    return start * FACTOR ** min(losses, key=lambda rung: (losses[rung], rung))


def are_flat(losses: Iterable[float]) -> bool:
    """Whether losses differ by less than a search can use.

    Example:
        >>> are_flat([0.69731, 0.69732]), are_flat([0.7, 0.6]), are_flat([0.7, math.inf])
        (True, False, False)
    """
    low, high = min(losses := list(losses)), max(losses)
    return len(losses) > 1 and high - low <= _FLAT * abs(low)


def held(rate: float, best: float, longer: Callable[[float], float | None]) -> float:
    """The rate, or a lower one, with which a longer training ends no worse than a short one.

    Args:
        rate: the best of short trainings.
        best: its loss.
        longer: loss after a longer training; None where the budget does not pay for one.

    Example:
        >>> held(1.0, 0.5, lambda rate: 0.9 if rate > 0.3 else 0.4)
        0.25
    """
    for _ in range(MOST_TRIALS):
        loss = longer(rate)
        if loss is not None and loss <= best + _RISE * abs(best):
            return rate
        rate /= FACTOR
        if loss is None:
            break
    return rate


def settled(rate: float, trials: dict[str, float | None], longer: Callable[[float], float | None]) -> float:
    """As :func:`held`, of trials by rate; one that a bound makes as good as any (0 was tried, and is worse) stays."""
    best = min(losses := [loss for loss in trials.values() if loss is not None], default=math.inf)
    is_bounded = "0" in trials and not are_flat(losses)
    return rate if is_bounded else held(rate, best, longer)


@contextmanager
def weights_kept(model: Any) -> Iterator[None]:
    """The trained weights are put back at the end, bit for bit; the copy lies in the host's memory."""
    copies = {name: tensor.detach().cpu().clone() for name, tensor in Weights(model).tensors.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in Weights(model).tensors.items():
                tensor.copy_(copies[name])


def pays(spent: int, cost: int, longer: int, most: float) -> bool:
    """Whether another trial can be paid for, and the longer one after it still can if it can now.

    Args:
        spent: queries so far.
        cost: of a trial.
        longer: of a longer one.
        most: that the search may take.

    Example:
        >>> pays(0, 6, 18, 50), pays(30, 6, 18, 50), pays(36, 6, 18, 50)
        (True, False, True)
    """
    return spent + cost <= most and (spent + cost + longer <= most or spent + longer > most)


def few_queries(budget: int, cost: int) -> UserError:
    """The error of a budget that does not pay for a search."""
    return UserError(
        f"optimizer.learning_rate=auto compares short trainings, and budget.queries={budget} is too few for that "
        f"({cost} for the first two, and a quarter at most is spent on it): raise the budget, or give a learning rate"
    )


# ---- in a trainer with learning_rate="auto" --------------------------------------------------------------------------


def start_of(optimizer: Any) -> float:
    """Where the search of a trainer begins: the optimizer's own rate, or what is usual for it."""
    return float(optimizer.learning_rate or STARTS.get(optimizer.name(), 1e-3))


def choose(trainer: Any, start: float, *, resuming: bool) -> None:
    """Set the learning rate of a trainer whose training is about to begin, and count what that took.

    Args:
        trainer: at the weights that it begins with; ``args.learning_rate`` and ``max_steps`` are changed.
        start: the first rate that is tried.
        resuming: whether a run goes on, which takes the rate that it has chosen then.

    Raises:
        UserError: several processes, no budget, or one too small for a search.
    """
    args, known = trainer.args, Path(str(trainer.args.output_dir)) / NAME
    if args.world_size > 1:
        raise UserError('learning_rate="auto" is chosen in one process: start without torchrun, or give a value')
    if not args.budget_queries:
        raise UserError('learning_rate="auto" takes a share of budget_queries: give a budget')
    if resuming and known.is_file():
        choice = json.loads(known.read_text(encoding="utf-8"))
    else:
        choice = _searched(trainer, start)
        known.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(known, json.dumps(choice, indent=2) + "\n")
    trainer.optimizer = trainer.lr_scheduler = None
    args.learning_rate = choice["values"]["optimizer.learning_rate"]
    args.max_steps = trainer.method.steps_within(args.budget_queries - choice["queries"])
    trainer.create_optimizer()
    trainer.progress.num_queries, trainer.seeks_rate = choice["queries"], False
    set_seed(args.seed)  # a search draws rows: the run has the order that it would have had without one


def _searched(trainer: Any, start: float) -> dict[str, Any]:
    args, method = trainer.args, trainer.method
    rows = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
    size = args.per_device_train_batch_size
    dev = [rows[number] for number in range(min(len(rows), 4 * size))]
    batches = [dev[place : place + size] for place in range(0, len(dev), size)]
    queries = max(method.queries_at(0), int(SHARE * args.budget_queries) - len(batches))
    cost, more, most, spent = queries + len(batches), LONGER * queries + len(batches), MOST * args.budget_queries, 0
    if 2 * cost > most:
        raise few_queries(args.budget_queries, 2 * cost)
    trials: dict[str, float | None] = {}

    def loss(rate: float, share: int = 1) -> float:
        nonlocal spent
        with weights_kept(trainer.model):
            last_loss = _after(trainer, rate, method.steps_within(share * queries), batches)
        spent += trainer.progress.num_queries + len(batches)
        trials[f"{rate:.3g}" + (f", {share} times as long" if share > 1 else "")] = (
            last_loss if math.isfinite(last_loss) else None
        )
        return last_loss

    def longer(rate: float) -> float | None:
        return loss(rate, LONGER) if spent + more <= most else None

    rate = climb(start, loss, lambda: len(trials) < MOST_TRIALS and pays(spent, cost, more, most))
    chosen = settled(rate, trials, longer)
    return {"values": {"optimizer.learning_rate": chosen}, "queries": spent, "trials": trials}


def _after(trainer: Any, rate: float, num_steps: int, batches: list[Any]) -> float:
    """Loss of the dev rows after a few steps at a rate, infinite where they ruin the model."""
    args = trainer.args
    args.learning_rate, args.max_steps = rate, num_steps
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.create_optimizer()
    loader, steps = iter(()), 0
    trainer.model.eval()
    try:
        while steps < num_steps:
            micro: list[Any] = []
            while len(micro) < args.gradient_accumulation_steps:
                inputs = next(loader, None)
                if inputs is None:
                    loader = iter(trainer.get_train_dataloader())
                    continue
                micro.append(inputs)  # on the device already: accelerate's loader puts it there
            with trainer.query_forward.querying():
                estimate = trainer.run_steps.next(StepBatch(micro), steps / num_steps)
            trainer.zo_optimizer.apply(estimate)
            steps += 1
        trainer.settle_weights()
        with torch.no_grad(), trainer.compute_loss_context_manager():
            losses = [float(trainer.compute_loss(trainer.model, trainer.collated(rows))) for rows in batches]
    except NonFiniteLossError:
        return math.inf
    total = sum(losses) / len(losses)
    return total if math.isfinite(total) else math.inf
