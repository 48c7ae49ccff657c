"""FOOF: steps in a layer's weights that are whitened by the layer's inputs, solved in the space of examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from zoft.errors import UserError
from zoft.estimators.nodes import Nodes
from zoft.optimizers._factors import Factors
from zoft.optimizers._optional import ReadsFactors
from zoft.optimizers.base import Optimizer, State
from zoft.utils.lazy import Tensor, torch

_LENGTHENED = 2.0
"""By how much at most the kept share of steps' own length grows from one step to the next."""


@dataclass
class Whiten(ReadsFactors, Optimizer):
    """W <- W - lr * (E diag(mu))^T (X X^T diag(omega) + lambda I)^-1 X over a window of the last batches.

    X [N, n] are the inputs and E [N, m] the node gradients of all positions in the window, omega their weights in the
    inputs' second moment (decay^age, of sum 1) and mu those in the momentum ((1 - beta) beta^age). It is the step
    M A^-1 with the momentum M of E^T X and A = X^T diag(omega) X + lambda I [n, n], solved for N or n unknowns,
    whichever are fewer; one-sided K-FAC. A = I would be momentum. The step has the units of least squares. At lr = 4
    the bound below sets the length of most first steps (docs/nodes.md), and later ones average over more examples:
    step t is divided by sqrt(1 + t / cooling), whatever the trainer's own schedule of lr.

    The step is shortened where it promises too much: with p = <E^T X, step> the decrease of the loss that the last
    batch's own gradient predicts, summed over all layers, lr p is at most ``trust`` times the loss (Polyak's step), or
    ``trust_exact`` times, where node gradients are not from probes, whose noise is most of p; the bound cools as steps
    do. What is kept of a step's own length at most doubles from one step to the next. A loss of 0 or less (minus a
    reward) has no such bound.

    Scales and shifts of normalisations have a second moment for each element: w <- w - lr * M / (mean x^2 + lambda).

    Args:
        beta: weight of the past in the momentum, in [0, 1).
        decay: of the second moment, a batch, above 0 and at most 1.
        window: how many of the last batches are kept, at least 1: N (n + m) float32 numbers a layer.
        ridge: lambda as a share of the mean of X's squared elements, > 0. The more, the less a step follows what only
            a few inputs have in common.
        cooling: steps after which steps begin to become shorter, above 0; 0: they never do.
        trust: bound on the predicted decrease of the loss in one step, as a share of the loss, > 0.
        trust_exact: the same, where node gradients have no noise of probes.

    References: Benzing 2022 (FOOF, arXiv 2201.12250), section 3; Martens & Grosse 2015 (K-FAC); Polyak 1987 for the
    bound.
    """

    beta: float = 0.9
    decay: float = 0.95
    window: int = 10
    ridge: float = 1.0
    cooling: float = 8.0
    trust: float = 10.0
    trust_exact: float = 0.25

    def check(self) -> None:
        """Refuse shares outside their ranges and an empty window."""
        super().check()
        self.require(0 <= self.beta < 1, "beta", "in [0, 1)")
        self.require(0 < self.decay <= 1, "decay", "above 0 and at most 1")
        self.require(self.window >= 1, "window", "at least 1")
        self.require(0 < self.ridge < float("inf"), "ridge", "> 0 and finite")
        self.require(0 <= self.cooling < float("inf"), "cooling", "above 0 and finite, or 0 for none")
        for name in ("trust", "trust_exact"):
            self.require(0 < getattr(self, name) < float("inf"), name, "> 0 and finite")

    def check_with(self, method: Any) -> None:
        """Refuse estimators that do not know the layers' inputs."""
        if not isinstance(method.estimator, Nodes):
            hint = " estimator.feedback=exact" if method.estimator.backpropagates else ""
            raise UserError(
                f"optimizer=whiten needs the inputs of layers beside the gradients of their outputs, and "
                f"estimator={method.estimator.name()} gives neither: use subspace=nodes estimator=nodes{hint}, or "
                "optimizer=adam"
            )

    def update(self, gradient: Tensor, state: State, step: int) -> Tensor:
        """:meth:`steps` has made the step already."""
        del state, step
        return gradient

    def steps(
        self, factors: Mapping[str, Factors], states: Mapping[str, State], loss: float, lr: float
    ) -> dict[str, Factors]:
        """The steps of all tensors, before the learning rate, as factors.

        Args:
            factors: of the gradient estimate, by tensor.
            states: the windows: ``x`` [N, n], ``e`` [N, m], ``age`` [N] in batches, ``share`` [N], of experts
                ``expert`` [N]; ``count``, of the tensor's steps; and ``kept``, the share of its own length that the
                last step had; updated.
            loss: the clean loss of the batch.
            lr: the learning rate.
        """
        steps: dict[str, Factors] = {}
        # first all steps, then one factor for all: the bound is on what they promise together
        promised = 0.0
        for name, factor in factors.items():
            _take_in(factor, states[name], self.window)
            steps[name] = self._step(factor, states[name]).scaled(self._share(states[name]))
            # p <- p + <E^T X, step>
            promised += steps[name].inner(factor)
        is_noisy = any(one.noisy for one in factors.values())
        cooled = min((self._share(states[name]) for name in factors), default=1.0)
        bound = (self.trust if is_noisy else self.trust_exact) * loss * cooled
        # Polyak: lr p <= trust L, else the step is shortened to it
        share = bound / (lr * promised) if 0 < bound < lr * promised else 1.0
        # A batch whose loss is nearly 0, or whose gradient is at right angles to the momentum, promises nothing: the
        # bound would let a step of any length through.
        share = min(
            share, *(_LENGTHENED * float(states[name]["kept"]) for name in factors if "kept" in states[name]), 1.0
        )
        for name in factors:
            states[name]["kept"] = torch.tensor(share)
        return {name: one.scaled(share) for name, one in steps.items()} if share < 1 else steps

    def _share(self, state: State) -> float:
        """1 / sqrt(1 + t / cooling), with t the steps that this tensor has taken before."""
        before = float(state["count"]) - 1
        # counted by tensor: one that joins later takes long steps first, too
        return (1 + before / self.cooling) ** -0.5 if self.cooling else 1.0

    def _step(self, factor: Factors, state: State) -> Factors:
        x, e, age = state["x"], state["e"], state["age"]
        # omega_p = decay^age / rows of its batch, of sum 1
        omega = self.decay**age * state["share"]
        omega = omega / omega.sum()
        # E diag(mu), mu = (1 - beta) beta^age
        moved = e * ((1 - self.beta) * self.beta**age).unsqueeze(1)
        square = (omega.unsqueeze(1) * x.square()).mean(1).sum()  # mean of X's squared elements
        # lambda as a share of mean(x^2), so that the scale of a layer's inputs drops out
        ridge = self.ridge * square.clamp_min(torch.finfo(torch.float32).tiny)
        if factor.layout == "vector":
            # diagonal A: sum_p omega_p x_p^2, element by element
            second = (omega.unsqueeze(1) * x.square()).sum(0)  # [m]
            return replace(factor, e=moved, x=x / (second + ridge))
        if factor.expert is not None:
            # one second moment an expert, of its own rows; lambda is that of an expert with an average share of them
            experts, solved = state["expert"], torch.empty_like(x)
            numbers = experts.unique().tolist()
            ridge = ridge / max(1, len(numbers))
            for number in numbers:
                rows = experts == number
                solved[rows] = _whitened(x[rows], omega[rows], ridge)
            return replace(factor, e=moved, x=solved, expert=experts)
        if len(x) <= x.shape[1]:
            return replace(factor, e=moved, x=_whitened(x, omega, ridge))
        # M A^-1 [m, n] as min(m, n) rows: the window's N of every layer would be kept until all steps are known
        step, size = _solved(moved.T @ x, x, omega, ridge), moved.shape[1]
        if size <= x.shape[1]:
            return replace(factor, e=torch.eye(size, device=x.device), x=step)
        return replace(factor, e=step.T.contiguous(), x=torch.eye(x.shape[1], device=x.device))


def unread_bound(method: Any) -> str:
    """A sentence on a bound that is set and that no step reads; empty where it is not known yet whether steps do.

    Args:
        method: a :class:`zoft.step.method.Method`.
    """
    rule, estimator = method.optimizer, method.estimator
    if not (isinstance(rule, Whiten) and isinstance(estimator, Nodes)):
        return ""
    exact = estimator.feedback == "exact" or estimator.response == "identity"
    is_open = estimator.response == "auto" and estimator.feedback in ("auto", "hidden")
    name, other = ("trust", "trust_exact") if exact else ("trust_exact", "trust")
    if getattr(rule, name) == rule.defaults()[name] or (is_open and not exact):
        return ""
    why = "no step has probes" if exact else "every step is from probes"
    return f"optimizer.{name}={getattr(rule, name)} does nothing: {why}: leave it out, or set optimizer.{other}"


def _whitened(x: Tensor, omega: Tensor, ridge: Tensor) -> Tensor:
    """X A^-1, with A = X^T diag(omega) X + lambda I."""
    # N x N where positions are fewer: X (X^T O X + lambda I)^-1 = (X X^T O + lambda I)^-1 X with O = diag(omega)
    if len(x) <= x.shape[1]:  # (X X^T diag(omega) + lambda I)^-1 X
        matrix = (x @ x.T) * omega + ridge * torch.eye(len(x), device=x.device)
        return torch.linalg.solve(matrix, x)
    return _solved(x, x, omega, ridge)


def _solved(rows: Tensor, x: Tensor, omega: Tensor, ridge: Tensor) -> Tensor:
    """Rows of n numbers times A^-1, with A = X^T diag(omega) X + lambda I."""
    matrix = (x.T * omega) @ x + ridge * torch.eye(x.shape[1], device=x.device)
    return torch.linalg.solve(matrix, rows, left=False)


def _take_in(factor: Factors, state: State, window: int) -> None:
    """Add a batch to the window, and let go of what is too old."""
    # a batch's positions share a weight of 1, so that long batches do not count for more
    rows = len(factor.x)
    fresh = {
        "x": factor.x,
        "e": factor.e,
        "age": torch.zeros(rows, device=factor.x.device),
        "share": torch.full((rows,), 1.0 / max(1, rows), device=factor.x.device),
    }
    if factor.expert is not None:
        fresh["expert"] = factor.expert
    # older than the window is gone; what stays is a batch older
    if "age" in state:
        is_recent = state["age"] + 1 < window
        older = {key: state[key][is_recent] for key in fresh}
        older["age"] = older["age"] + 1
        fresh = {key: torch.cat((older[key], fresh[key])) for key in fresh}
    count = state["count"] + 1 if "count" in state else torch.ones((), device=factor.x.device)
    state.update(fresh, count=count)
