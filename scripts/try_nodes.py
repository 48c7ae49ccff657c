"""Trials behind docs/nodes.md, of what node directions could do and do not: one table each, dev rows alone.

    python scripts/try_nodes.py response sms trec     # an exponential mean, and a response that depends on the example
    python scripts/try_nodes.py again sms trec        # when to probe again: never, every k steps, by a monitor
    python scripts/try_nodes.py whiten sms rt trec    # MeZO and SubZero with their steps whitened by the layers' inputs
    python scripts/try_nodes.py ridge sms rt trec     # how much of it whitening needs, and how long steps may be then

All are of the demo's last block, a batch of 8, and `response` and `again` with
`estimator.response=learnt subspace.probed=layers`: SmolLM2 needs no probes, models that do are what these are about.
These two have the ridge, the rate and the bound that were the defaults when docs/nodes.md had their tables.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import transformers
from bench_nodes import TASKS, trainer_of
from torch import Tensor
from transformers import TrainerCallback

from zoft.estimators.nodes import Nodes
from zoft.step.nodes import NodeEstimate, NodeQueries
from zoft.trainer import binding

SMALL = ["trainer.per_device_train_batch_size=8", "task.num_dev=128", "task.num_test=2", "trainer.eval_steps=1000000"]
BEFORE = ["optimizer.ridge=0.1", "optimizer.learning_rate=1", "optimizer.trust=50"]
LEARNT = ["method=zoft", "estimator.response=learnt", "subspace.probed=layers", *BEFORE, *SMALL]


class DevLoss(TrainerCallback):
    """Dev loss when the queries spent reach each mark."""

    def __init__(self, trainer: Any, rows: list[Any], marks: list[int]) -> None:
        self.trainer, self.rows, self.left = trainer, rows, list(marks)
        self.seen: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A mark may have been reached."""
        if self.left and self.trainer.progress.num_queries >= self.left[0]:
            self.left.pop(0)
            self.evaluate()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A budget that does not pay for one more step ends just before its mark."""
        if self.left:
            self.evaluate()

    def evaluate(self) -> None:
        """Keep the dev loss of now."""
        self.seen.append(self.trainer.evaluate(self.rows, metric_key_prefix="dev")["dev_loss"])


def trained(task: str, words: list[str], options: argparse.Namespace, kind: type[NodeQueries]) -> None:
    """Train on a task with each seed and print the dev losses at the marks."""
    for seed in options.seeds:
        binding.NodeQueries = kind  # type: ignore[misc]
        trainer, rows = trainer_of([*TASKS[task], *words, f"seed={seed}", f"budget.queries={options.marks[-1]}"])
        share_prefix(trainer, rows, task)
        seen = DevLoss(trainer, rows["dev"], options.marks)
        trainer.add_callback(seen)
        trainer.train()
        print(f"    seed {seed}: {' '.join(f'{loss:.3f}' for loss in seen.seen)}", flush=True)


_PREFIXES: dict[str, Any] = {}


def share_prefix(trainer: Any, rows: dict[str, list[Any]], task: str) -> None:
    """Hidden states below the last block are those of the task's rows, whatever the run."""
    forward = trainer.query_forward
    if task in _PREFIXES:
        forward.frozen_prefix.share(_PREFIXES[task])
    _PREFIXES[task] = forward.frozen_prefix
    for _ in forward.fill_prefix(*rows.values()):
        pass


# ------------------------------------------------------------------------------------------------------------- response


class ByExample(NodeQueries):
    """A response R(x) = sum_f phi_f(x) R_f, with phi(x) 1 and `coordinates` main components of the first layer's input.

    R_f is the ridge regression of ds v^T on phi over all probes so far, which is a Kalman filter of a state that stands
    still; with `forget` below 1, of one that drifts. coordinates=0 with forget=1 is the mean, with forget below 1 an
    exponential mean.
    """

    coordinates, forget, ridge = 0, 1.0, 32.0

    def _phi(self, part: Any) -> Tensor:
        x = next(iter(part.seen.values()))
        if not hasattr(self, "axes"):
            self.center = x.mean(0)
            self.axes = torch.linalg.svd(x - self.center, full_matrices=False).Vh[: self.coordinates]
            self.spread = ((x - self.center) @ self.axes.T).square().mean(0).sqrt().clamp_min(1e-6)
            self.gram, self.sums = torch.zeros(self.coordinates + 1, self.coordinates + 1), dict[str, Tensor]()
        return torch.cat((torch.ones(len(x), 1), (x - self.center) @ self.axes.T / self.spread), 1)

    def _learn(self, parts: Any, direction: Any, probes: int, eps: float, total: int) -> None:
        for part in parts:
            phi = self._phi(part)  # [P, f]
            self.gram = self.forget * self.gram + probes * phi.T @ phi
        self.sums = {key: self.forget * value for key, value in self.sums.items()}
        for part, changes, directions in self._probes(parts, direction, probes, eps, total):
            for key, v in directions.items():
                # S_f <- S_f + sum phi_f ds v^T
                seen = torch.einsum("pf,qpc,qpm->fcm", self._phi(part), changes, v)
                self.sums[key] = self.sums[key] + seen if key in self.sums else seen

    def _answer(self, parts: Any) -> None:
        lam = self.ridge * torch.eye(self.coordinates + 1)
        lam[0, 0] = 0  # the mean is not shrunk
        for part in parts:
            weights = torch.linalg.solve(self.gram + lam, self._phi(part).T).T  # [P, f]
            for key, sums in self.sums.items():
                # e_p = R(x_p)^T dL/ds_p
                part.e[key] = torch.einsum("pf,pc,fcm->pm", weights, part.clean.slopes, sums)


def response(options: argparse.Namespace) -> None:
    """A probe in every step: the mean, exponential means, and responses that depend on the example."""
    for task in options.tasks:
        for count, forget in ((0, 1.0), (0, 0.97), (0, 0.9), (2, 1.0), (4, 1.0), (4, 0.97)):
            print(f"{task}: coordinates {count}, forget {forget}", flush=True)
            kind = type("_", (ByExample,), {"coordinates": count, "forget": forget})
            trained(task, [*LEARNT, "estimator.every=1", "estimator.feedback=scores"], options, kind)


# ---------------------------------------------------------------------------------------------------------- probe again


class Monitored(NodeQueries):
    """Probes four times again when the last steps' directions promise little in the next batches' gradients.

    With D the last step in the weights, g its own batch's gradient and g' the next batch's, <g', D> / <g, D> is near 1
    where batches agree; below a tenth on average over five steps, the response is learnt from new probes.
    """

    def __call__(self, batch: Any, direction: Any, estimator: Nodes) -> NodeEstimate:
        """A step with four probes where they are due."""
        tensors = self.session.weights.tensors
        due = getattr(self, "due", False)
        probing = replace(estimator, every=1, num_directions=4) if due else estimator
        estimate = super().__call__(batch, direction, probing)
        weights = {name: tensors[name].detach().clone() for name in estimate.factors}
        gradients = {name: one.dense() for name, one in estimate.factors.items()}
        ratios = getattr(self, "ratios", []) if not due else []
        if hasattr(self, "before"):
            moved = {name: weights[name] - self.before[name] for name in weights}
            promised, achieved = (
                sum(float((some[name] * moved[name]).sum()) for name in moved) for some in (self.gradients, gradients)
            )
            ratios = [*ratios, achieved / promised if promised else 1.0][-5:]
        self.ratios, self.before, self.gradients = ratios, weights, gradients
        self.due = len(ratios) == 5 and sum(ratios) / 5 < 0.1
        return estimate


def again(options: argparse.Namespace) -> None:
    """Four probes in the first step, and again never, every 20, 10, 5 steps, in every step, or by the monitor."""
    for task in options.tasks:
        for every in (0, 20, 10, 5, 1):
            print(f"{task}: every={every}", flush=True)
            trained(task, [*LEARNT, f"estimator.every={every}"], options, NodeQueries)
        print(f"{task}: by the monitor", flush=True)
        trained(task, LEARNT, options, Monitored)


# ---------------------------------------------------------------------------------------------------------------- ridge


def ridge(options: argparse.Namespace) -> None:
    """No probes: ridges and learning rates together."""
    for task in options.tasks:
        for share, rate in ((0.1, 1), (0.1, 4), (0.3, 2), (1, 2), (1, 4), (3, 4), (3, 8), (10, 16)):
            print(f"{task}: ridge {share}, learning rate {rate}", flush=True)
            words = [f"optimizer.ridge={share}", f"optimizer.learning_rate={rate}", *options.set]
            trained(task, ["method=zoft", *SMALL, *words], options, NodeQueries)


# --------------------------------------------------------------------------------------------------------------- whiten


class Rule(NamedTuple):
    """How a walk's directions and steps are made.

    Args:
        name: printed.
        rank: of SubZero's directions; 0: gaussian ones.
        whitened: whether the inputs of the last batches whiten the step.
        beta: momentum.
        spanned: whether directions lie in the span of those inputs.
    """

    name: str
    rank: int = 0
    whitened: bool = False
    beta: float = 0.0
    spanned: bool = False


RULES = (
    Rule("MeZO"),
    Rule("MeZO, whitened", whitened=True),
    Rule("MeZO, whitened, momentum", whitened=True, beta=0.9),
    Rule("MeZO in the inputs' span", spanned=True),
    Rule("MeZO in the inputs' span, whitened", whitened=True, spanned=True),
    Rule("SubZero", rank=64),
    Rule("SubZero, whitened", rank=64, whitened=True),
)
WINDOW = 10
"""Batches whose inputs are kept."""


def whiten(options: argparse.Namespace) -> None:
    """Two-point estimates of the last block's three matrices, as they are and whitened by the inputs."""
    for task in options.tasks:
        trainer, rows = trainer_of([*TASKS[task], "method=mezo", "trainer.narrow_last_block=true", *SMALL])
        share_prefix(trainer, rows, task)
        start = {name: weight.detach().clone() for name, weight in matrices(trainer.model).items()}
        for rule in RULES:
            if options.only and options.only not in rule.name:
                continue
            tried: dict[float, list[float]] = {}
            left = list(options.rates)
            while left:  # one beyond the largest or smallest rate where it is the best
                rate = left.pop(0)
                tried[rate] = Walk(trainer, rows, start, rule, rate, options.seeds[0]).run(options.marks)
                print(f"    {task}, {rule.name}, rate {rate:g}: {shown(tried[rate])}", flush=True)
                at_best = min(tried, key=lambda one: tried[one][-1])
                if not left and len(tried) < len(options.rates) + 1 and at_best in (min(tried), max(tried)):
                    left.append(at_best * 4 if at_best == max(tried) else at_best / 4)
            best = min(tried, key=lambda rate: tried[rate][-1])
            print(f"{task}: {rule.name}, rate {best:g}, seed {options.seeds[0]}: {shown(tried[best])}", flush=True)
            for seed in options.seeds[1:]:
                print(
                    f"    seed {seed}: {shown(Walk(trainer, rows, start, rule, best, seed).run(options.marks))}",
                    flush=True,
                )


def shown(losses: list[float]) -> str:
    """Three digits each."""
    return " ".join(f"{loss:.3f}" for loss in losses)


def matrices(model: Any) -> dict[str, torch.nn.Parameter]:
    """gate, up and down of the last block."""
    mlp = model.model.layers[-1].mlp
    return {name: getattr(mlp, f"{name}_proj").weight for name in ("gate", "up", "down")}


class Walk:
    """Steps from `start` by two-point estimates.

    Args:
        made: a trainer.
        rows: by split.
        start: matrix -> its values.
        rule: of directions and steps.
        rate: in MeZO's unit: the first step is as long as MeZO's of this rate.
        seed: of batches and directions.
    """

    eps = 1e-3

    def __init__(self, trainer: Any, rows: Any, start: dict[str, Tensor], rule: Rule, rate: float, seed: int) -> None:
        self.made, self.rows, self.rule, self.rate, self.seed = trainer, rows, rule, rate, seed
        self.weights = matrices(trainer.model)
        for name, weight in self.weights.items():
            weight.data.copy_(start[name])
        self.inputs: dict[str, list[Tensor]] = {name: [] for name in start}
        self.momentum = {name: torch.zeros_like(weight) for name, weight in start.items()}
        self.unit = 0.0

    def run(self, marks: list[int]) -> list[float]:
        """Dev losses at numbers of queries, two a step; a clean forward before the first one is not counted."""
        losses = []
        shuffle = torch.Generator().manual_seed(self.seed)
        for step, some in enumerate(batches(self.rows["train"], shuffle, marks[-1] // 2)):
            self.step(step, self.made.collated(some))
            if 2 * (step + 1) in marks:
                losses.append(self.made.evaluate(self.rows["dev"], metric_key_prefix="dev")["dev_loss"])
        return losses

    def step(self, step: int, batch: Any) -> None:
        """One step on a batch."""
        if self.rule.spanned and not step:
            self.loss(batch, see=True)
        z = {name: self.direction(name, number, step) for number, name in enumerate(self.weights)}
        values = []
        for sign in (1, -1):
            self.move(z, sign * self.eps)
            values.append(self.loss(batch, see=sign > 0 and (self.rule.whitened or self.rule.spanned)))
            self.move(z, -sign * self.eps)
        slope = (values[0] - values[1]) / (2 * self.eps)  # <g, z>
        beta = self.rule.beta
        for name in z:
            self.momentum[name].mul_(beta).add_(slope * z[name], alpha=1 - beta)
        steps = self.momentum
        if self.rule.whitened:
            steps = {name: solved(one, self.inputs[name]) for name, one in steps.items()}
        self.unit = self.unit or abs(slope) * norm(z) / norm(steps)
        self.move(steps, -self.rate * self.unit)

    def move(self, directions: dict[str, Tensor], by: float) -> None:
        """W <- W + by * direction."""
        for name, weight in self.weights.items():
            weight.data.add_(directions[name], alpha=by)

    def direction(self, name: str, number: int, step: int) -> Tensor:
        """Gaussian; SubZero's U Z V^T with U, V kept for 50 steps; or a gaussian in the span of the inputs."""
        shape, rank = self.weights[name].shape, self.rule.rank
        draw, frame = (
            torch.Generator().manual_seed(1 + number + 10 * (at + 10_000 * self.seed)) for at in (step, step // 50)
        )
        # as long as the full one, so that one grid of rates serves all
        if rank:
            u, v = (torch.linalg.qr(torch.randn(size, rank, generator=frame)).Q for size in shape)
            return u @ torch.randn(rank, rank, generator=draw) @ v.T * math.sqrt(shape[0] * shape[1]) / rank
        if self.rule.spanned:
            basis = torch.linalg.qr(torch.cat(self.inputs[name]).T).Q  # [n, N]
            return (
                torch.randn(shape[0], basis.shape[1], generator=draw) @ basis.T * math.sqrt(shape[1] / basis.shape[1])
            )
        return torch.randn(shape, generator=draw)

    def loss(self, batch: Any, *, see: bool) -> float:
        """The objective's loss of a batch, behind the frozen prefix; its inputs are kept with `see`."""
        with ExitStack() as stack:
            for name, inputs in self.inputs.items() if see else ():

                def keep(_: Any, seen: Any, inputs: list[Tensor] = inputs) -> None:
                    inputs.append(seen[0].detach().flatten(0, -2).clone())
                    del inputs[:-WINDOW]

                layer = getattr(self.made.model.model.layers[-1].mlp, f"{name}_proj")
                stack.callback(layer.register_forward_pre_hook(keep).remove)
            stack.enter_context(torch.inference_mode())
            stack.enter_context(self.made.query_forward.reusing_prefix())
            return float(self.made.zo_objective.loss(self.made.model, batch))


def norm(tensors: dict[str, Tensor]) -> float:
    """Of all together."""
    return math.sqrt(sum(float(one.square().sum()) for one in tensors.values()))


def batches(rows: list[Any], draw: torch.Generator, count: int) -> Iterator[list[Any]]:
    """Batches of 8, every row once an epoch."""
    order: list[int] = []
    for _ in range(count):
        if len(order) < 8:
            order = torch.randperm(len(rows), generator=draw).tolist()
        yield [rows[order.pop()] for _ in range(8)]


def solved(moved: Tensor, inputs: list[Tensor]) -> Tensor:
    """M A^-1 with A = sum_p omega_p x_p x_p^T + lambda I over the window, solved for its N rows."""
    x = torch.cat(inputs)
    omega = torch.cat([torch.full((len(one),), 0.95**age / len(one)) for age, one in enumerate(reversed(inputs))][::-1])
    omega = omega / omega.sum()
    lam = 0.1 * (omega.unsqueeze(1) * x.square()).mean(1).sum()
    inner = lam * torch.diag(1 / omega) + x @ x.T
    return (moved - (moved @ x.T) @ torch.linalg.solve(inner, x)) / lam


def main() -> None:
    """Read the command line."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    trials: dict[str, tuple[Callable[[argparse.Namespace], None], list[int]]] = {
        "response": (response, [30, 60, 120, 240]),
        "again": (again, [30, 60, 120]),
        "whiten": (whiten, [60, 120, 240]),
        "ridge": (ridge, [10, 30, 60]),
    }
    for name, (run, marks) in trials.items():
        one = verbs.add_parser(name)
        one.add_argument("tasks", nargs="+", choices=list(TASKS))
        one.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
        one.add_argument("--marks", type=int, nargs="+", default=marks, help="numbers of queries")
        if name == "whiten":
            one.add_argument("--only", default="", help="rules with this in their name")
            one.add_argument("--rates", type=float, nargs="+", default=[1e-3, 4e-3, 1.6e-2])
        if name == "ridge":
            one.add_argument("--set", nargs="*", default=[], help="further arguments of zoft train")
        one.set_defaults(run=run)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
