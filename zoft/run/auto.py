"""`optimizer.learning_rate=auto`, and eps and q: what a run chooses by itself before its first step.

The number of directions follows from the method. The radius is measured: of a ladder of radii the one is taken at which
slopes along a few directions change least from one rung to the next, between the rounding of the losses (too small) and
the curvature (too large). The learning rate is searched (:mod:`zoft.trainer.rate`): from the config's own, a few steps
of training at a rate, then at the next one by a factor of four, in the direction in which the loss of a few dev rows
falls, until it rises; what is chosen is tried for four times as long. All queries count in the budget, and the run's
folder keeps the choice.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.errors import NonFiniteLossError, UserError
from zoft.run.rehearsal import rehearsing, rehearsing_trainer
from zoft.trainer.rate import LONGER, MOST, MOST_TRIALS, NAME, SHARE, climb, few_queries, pays, settled, weights_kept
from zoft.utils.files import write_atomically

if TYPE_CHECKING:
    from zoft.config.schema import ZoftConfig
    from zoft.trainer.trainer import ZOTrainer

log = logging.getLogger("zoft.run.auto")
RADII = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
RADIUS_DIRECTIONS = 3
_FIRST_DROP = 0.01
"""Of the loss, by the first step at the rate where a search without a rate of its own begins."""


@dataclass
class AutoSettings:
    """What was chosen.

    Args:
        values: key of the config -> its value.
        queries: that the choice took.
        trials: learning rate -> loss of the dev rows behind the trial; None where it was not finite.
        slopes: radius -> how much the slopes change to the next radius, as a share of them.
    """

    values: dict[str, float] = field(default_factory=dict)
    queries: int = 0
    trials: dict[str, float | None] = field(default_factory=dict)
    slopes: dict[str, float] = field(default_factory=dict)

    def line(self) -> str:
        """For the console."""
        chosen = ", ".join(f"{name}={value:g}" for name, value in self.values.items())
        losses = {rate: "inf" if loss is None else f"{loss:.4g}" for rate, loss in self.trials.items()}
        tried = "; ".join(f"{rate}: {loss}" for rate, loss in losses.items())
        return f"auto    {chosen}, by {self.queries:,} queries" + (f" (dev loss by rate: {tried})" if tried else "")


def choose(cfg: ZoftConfig, model: Any, tokenizer: Any, rows: dict[str, list[Any]]) -> AutoSettings:
    """Choose what ``cfg.auto`` names, or read what an earlier start of the run has chosen; ``cfg`` has it afterwards.

    Args:
        cfg: of the run, whose folder is there.
        model: the run's; its weights are what they were.
        tokenizer: the run's.
        rows: encoded ones, by split.

    Returns:
        The choice, with the queries that it took, now or then.

    Raises:
        UserError: several processes, or a budget too small for a search.
    """
    known = Path(cfg.output_dir) / NAME
    if known.is_file():
        choice = AutoSettings(**json.loads(known.read_text(encoding="utf-8")))
        apply(cfg, choice.values)
        return choice
    choice = AutoSettings()
    if "estimator.num_directions" in cfg.auto:
        _keep(cfg, choice, "estimator.num_directions", num_directions(cfg))
    with tempfile.TemporaryDirectory() as folder:
        if "estimator.eps" in cfg.auto:
            _keep(cfg, choice, "estimator.eps", _radius(cfg, folder, model, tokenizer, rows, choice))
        if "optimizer.learning_rate" in cfg.auto:
            trial = _Trials(cfg, folder, model, tokenizer, rows, choice)
            start = cfg.optimizer.learning_rate or _first_rate(cfg, folder, model, tokenizer, rows, choice)
            rate = climb(start, trial, trial.may_go_on)
            _keep(cfg, choice, "optimizer.learning_rate", settled(rate, choice.trials, trial.longer))
    write_atomically(known, json.dumps(dataclasses.asdict(choice), indent=2) + "\n")
    return choice


def apply(cfg: ZoftConfig, values: dict[str, Any]) -> None:
    """Set keys of a config to what was chosen.

    Args:
        cfg: changed in place.
        values: ``estimator.eps`` and the like -> value.
    """
    for key, value in values.items():
        group, name = key.split(".")
        setattr(cfg, group, dataclasses.replace(getattr(cfg, group), **{name: value}))


def num_directions(cfg: ZoftConfig) -> int:
    """q by the method: one where steps are cheap to repeat, ten where second moments are kept of every coordinate.

    Where an estimator wants more (two, an even number), the next one that it takes.
    """
    from zoft.config.schema import FEW_FOR_ADAM

    many = cfg.optimizer.name() in ("adam", "adamw") and cfg.subspace.name() == "full"
    wanted = FEW_FOR_ADAM if many else 1
    while True:
        try:
            return int(dataclasses.replace(cfg.estimator, num_directions=wanted).num_directions)
        except UserError:
            wanted += 1


def _keep(cfg: ZoftConfig, choice: AutoSettings, key: str, value: float) -> None:
    choice.values[key] = value
    apply(cfg, {key: value})


@dataclass
class _Trials:
    """Short trainings at one learning rate each, from the same weights."""

    cfg: ZoftConfig
    folder: str
    model: Any
    tokenizer: Any
    rows: dict[str, list[Any]]
    choice: AutoSettings

    def __post_init__(self) -> None:
        cfg = self.cfg
        batch = int(cfg.trainer.get("per_device_train_batch_size", 8))
        self.dev = self.rows["dev"][: 4 * batch]
        self.cost = math.ceil(len(self.dev) / batch)
        least = cfg.composition.queries_at(0)
        self.queries = max(least, int(SHARE * cfg.budget.queries) - self.cost)
        if 2 * (self.queries + self.cost) > MOST * cfg.budget.queries:
            raise few_queries(cfg.budget.queries, 2 * (self.queries + self.cost))

    def may_go_on(self) -> bool:
        """Whether the budget allows another trial."""
        spent, cost, longer = self.choice.queries, self.queries + self.cost, LONGER * self.queries + self.cost
        return len(self.choice.trials) < MOST_TRIALS and pays(spent, cost, longer, MOST * self.cfg.budget.queries)

    def longer(self, rate: float) -> float | None:
        """Loss of the dev rows after a longer training; None where the budget does not pay for one."""
        spent = self.choice.queries + LONGER * self.queries + self.cost
        return self(rate, LONGER) if spent <= MOST * self.cfg.budget.queries else None

    def __call__(self, rate: float, share: int = 1) -> float:
        """Loss of the dev rows after a training of ``share`` times the shortest."""
        cfg = rehearsing(self.cfg, self.folder, share * self.queries, lr_scheduler_type="constant", warmup_steps=0)
        apply(cfg, {"optimizer.learning_rate": rate})
        trainer = rehearsing_trainer(cfg, self.model, self.tokenizer, {**self.rows, "dev": self.dev})
        with weights_kept(self.model):
            try:
                trainer.train()
                loss = float(trainer.evaluate()["eval_loss"])
            except NonFiniteLossError:
                loss = math.inf
        loss = loss if math.isfinite(loss) else math.inf
        trial = f"{rate:.3g}" + (f", {share} times as long" if share > 1 else "")
        self.choice.trials[trial] = loss if math.isfinite(loss) else None
        self.choice.queries += trainer.progress.num_queries + self.cost
        return loss


def _radius(
    cfg: ZoftConfig, folder: str, model: Any, tokenizer: Any, rows: dict[str, list[Any]], choice: AutoSettings
) -> float:
    """The radius at which slopes change least to the next one: (L(+eps) - L(-eps)) / 2 eps on a plateau."""
    slopes, _ = _slopes(cfg, folder, model, tokenizer, rows, choice, *RADII)
    return plateau(slopes, choice.slopes)


def _first_rate(
    cfg: ZoftConfig, folder: str, model: Any, tokenizer: Any, rows: dict[str, list[Any]], choice: AutoSettings
) -> float:
    """Where the search begins without a rate in the config: a step of the estimate takes a hundredth of the loss."""
    if cfg.optimizer.name() not in ("sgd", "momentum") or not cfg.estimator.radius or cfg.subspace.observes_at(0):
        return 1e-3  # what is scaled by the rule itself
    slopes, loss = _slopes(cfg, folder, model, tokenizer, rows, choice, cfg.estimator.radius)
    squares = [slope**2 for slope in slopes[cfg.estimator.radius]]
    # a step -lr g z changes the loss by -lr g^2
    return float(f"{_FIRST_DROP * abs(loss) / max(sum(squares) / len(squares), 1e-12):.1g}")


def _slopes(
    cfg: ZoftConfig,
    folder: str,
    model: Any,
    tokenizer: Any,
    rows: dict[str, list[Any]],
    choice: AutoSettings,
    *radii: float,
) -> tuple[dict[float, list[float]], float]:
    """Radius -> slope along each of a few directions, on one batch; and the mean loss there."""
    from zoft.estimators.central import Central
    from zoft.noise.direction import Direction
    from zoft.trainer.batch import StepBatch

    cfg = rehearsing(cfg, folder, 2)
    cfg.estimator = Central(noise=cfg.estimator.noise)
    trainer: ZOTrainer = rehearsing_trainer(cfg, model, tokenizer, rows)
    trainer.create_optimizer()
    batch = StepBatch([trainer.collated(rows["train"][: trainer.args.per_device_train_batch_size])])
    slopes: dict[float, list[float]] = {}
    total = 0.0
    for eps in radii:
        slopes[eps] = []
        for step in range(RADIUS_DIRECTIONS):
            estimator = Central(eps=eps)
            with trainer.query_forward.querying():
                points = estimator.points([Direction(cfg.seed, step, 0)])
                losses = trainer.zo_optimizer.session.losses(batch, points)
            choice.queries += len(points)
            slopes[eps].append(float(estimator.projected_grads(losses)[0]))
            total += float(losses.mean())
    return slopes, total / (len(radii) * RADIUS_DIRECTIONS)


def plateau(slopes: dict[float, list[float]], differences: dict[str, float] | None = None) -> float:
    """Of radii with the slopes along the same directions, the one whose slopes differ least from the next one's.

    Args:
        slopes: radius -> slope along each direction.
        differences: gets radius -> difference, as a share of the slopes.

    Example:
        >>> plateau({1e-4: [1.4, -2.9], 1e-3: [1.01, -2.0], 1e-2: [1.0, -2.0], 1e-1: [0.3, -0.9]})
        0.001
    """
    radii = sorted(slopes)
    changes = {}
    for eps, following in itertools.pairwise(radii):
        pairs = list(zip(slopes[eps], slopes[following], strict=True))
        size = sum(abs(a) + abs(b) for a, b in pairs) / 2
        change = sum(abs(a - b) for a, b in pairs) / size if size > 0 else math.inf  # no loss moved at all
        changes[eps] = change if math.isfinite(change) else math.inf
    if differences is not None:
        differences.update({f"{eps:g}": change for eps, change in changes.items() if math.isfinite(change)})
    if not any(map(math.isfinite, changes.values())):
        raise UserError("estimator.eps=auto: no loss moves at any radius up to 0.1: give a radius, estimator.eps=...")
    return min(changes, key=lambda eps: changes[eps])
