"""Node directions: the gradient of layers' outputs, from what a perturbation of those outputs does to the objective."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from zoft.errors import UserError
from zoft.estimators.base import Estimator, Point
from zoft.noise.direction import Direction
from zoft.utils.lazy import Tensor

FEEDBACK = ("auto", "scores", "hidden", "log_odds", "loss", "exact")
RESPONSE = ("auto", "identity", "learnt")


@dataclass
class Nodes(Estimator):
    """e = dL/dy of layers' outputs y, one clean forward a step, and probes y + eps v in some of the steps.

    With s what the objective is seen in (the scores of the options, the last hidden state, a loss), s' the same with
    y_p + eps v_p at every position p, and R the mean of (s' - s) / eps v^T over all positions and probes so far, the
    response, the estimate is

        e_p = R^T dL/ds_p,

    where dL/ds is known in closed form: softmax(z) - onehot(y) for scores z. The response is what examples have in
    common and hardly moves, so it is learnt once (``first`` probes) and a step is one clean forward from then on.

    Where blocks add their parts to a residual stream that ends in the last hidden state h, the response of h to a part
    is the identity for the last block, and nearly so below: response=identity takes it as that, e_p = dL/dh_p, and no
    probe is made at all.

    feedback=log_odds learns from losses alone: s = -log(exp(L) - 1), the log-odds of the right answer, with a response
    for each answer. feedback=loss keeps no response: e_p = (L' - L) / eps v_p with the loss of p's own term, unbiased
    where a row has one, and noisy, from a probe in every step. feedback=exact is the reference: e by backpropagation to
    the nodes, 3 queries a step.

    Args:
        num_directions: probes of a step that has some, but for the first.
        noise: counter.
        across: iid; how the directions of examples hang together is ``subspace.directions``.
        eps: radius, in units of the outputs.
        feedback: scores (options, classes, label words), hidden (any vocabulary, completions, chats), log_odds, loss,
            exact, or auto: the first of these that the objective has.
        response: identity (of the residual stream, no probes), learnt (from probes), or auto: a trainer takes identity
            where no setting of probes is given, the objective has feedback=hidden, positions=loss, and every layer that
            is trained lies in a part that its block adds unchanged, which it tries with two rows before training; else
            learnt.
        first: probes in the first step, at least 1.
        every: steps from one step with probes to the next; 0: none after the first.

    References: docs/nodes.md. Node perturbation: Dalm et al. 2023 (arXiv 2310.00965); response: Lansdell et al. 2020,
    PseuZO (2025).
    """

    eps: float = 0.1
    feedback: str = "auto"
    response: str = "auto"
    first: int = 4
    every: int = 0

    def check(self) -> None:
        """Refuse values that cannot work, and probes that a kind of feedback needs or cannot use."""
        super().check()
        self.require(0 < self.eps < float("inf"), "eps", "> 0 and finite")
        self.require(self.feedback in FEEDBACK, "feedback", f"one of {', '.join(FEEDBACK)}")
        self.require(self.response in RESPONSE, "response", f"one of {', '.join(RESPONSE)}")
        self.require(self.first >= 1, "first", "at least 1")
        self.require(self.every >= 0, "every", "0 (no probe after the first step) or more")
        self.require(self.noise == "counter", "noise", "counter")
        if self.response == "identity" and (self.feedback not in ("auto", "hidden") or self.of_probes()):
            ignored = self.of_probes() or ["feedback"]
            raise UserError(f"nodes.response=identity makes no probes: leave out {ignored[0]}, or use response=learnt")
        if self.feedback == "exact" and (ignored := self.of_probes() or ["response"] * (self.response != "auto")):
            raise UserError(f"nodes.feedback=exact makes no probes: leave out {ignored[0]}, or use another feedback")
        if self.num_directions > 1 and not self.every:
            raise UserError(
                "nodes.num_directions is of probes after the first step: set nodes.every=1, or nodes.first instead"
            )
        # one probe says little of its own step: nothing is remembered that the next one could add to
        if self.feedback == "loss" and self.every != 1:
            raise UserError(
                f"nodes.feedback=loss keeps no response and needs a probe in every step: set every=1, got {self.every}"
            )

    def of_probes(self) -> list[str]:
        """Names of the settings of probes that differ from their defaults: they ask for probes."""
        defaults = {field.name: field.default for field in fields(self)}
        return [name for name in ("first", "every", "eps", "num_directions") if getattr(self, name) != defaults[name]]

    def check_with(self, method: Any) -> None:
        """Refuse other subspaces, and what weighs, shapes or tries directions."""
        reason = "estimator=nodes perturbs layers' outputs, and "
        if not method.subspace.moves_outputs:
            raise UserError(
                f"{reason}subspace={method.subspace.name()} has directions in the weights: use subspace=nodes"
            )
        if method.weighting.name() != "mean":
            raise UserError(f"{reason}has no directions for weighting={method.weighting.name()}: use weighting=mean")
        if self.response == "identity" and method.subspace.of_probes():
            raise UserError(
                "estimator.response=identity makes no probes: leave out "
                f"subspace.{method.subspace.of_probes()[0]}, or use estimator.response=learnt"
            )
        optimizer = method.optimizer
        if optimizer.uses_directions:
            raise UserError(
                f"{reason}optimizer={optimizer.name()} {optimizer.uses_directions} in the weights: use optimizer=whiten"
            )
        if self.across != "iid":
            raise UserError(f"{reason}estimator.across is of directions in the weights: use subspace.directions")

    @property
    def num_queries(self) -> int:
        """A step without probes."""
        return 3 if self.feedback == "exact" else 1

    def probes_at(self, step: int) -> int:
        """How many probes a step has."""
        if self.feedback == "exact" or self.response == "identity":
            return 0
        # the response is unknown in the first step, so it is learnt from more probes
        if step == 0:
            return self.first
        return self.num_directions if self.every and step % self.every == 0 else 0

    def queries_at(self, step: int) -> int:
        """The clean forward and the probes; a backward pass counts as two more."""
        return self.num_queries + self.probes_at(step)

    def points(self, directions: list[Direction]) -> list[Point]:
        """Empty: no point lies in the weights."""
        del directions
        return []

    def projected_grads(self, losses: Tensor) -> Tensor:
        """Empty, [0]: there are no directions in the weights."""
        return losses.new_empty(0)

    def loss(self, losses: Tensor) -> Tensor:
        """The clean one."""
        return losses.new_zeros(()) if not len(losses) else losses.mean()
