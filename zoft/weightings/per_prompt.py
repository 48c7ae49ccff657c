"""Each prompt's loss against the mean of its own over the step's points: group baselines, as GRPO has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zoft.component import Memory
from zoft.errors import UserError
from zoft.estimators._optional import KeepsAnchor
from zoft.estimators.base import Measured
from zoft.utils.lazy import Tensor, torch
from zoft.weightings._spread import refuse_one_loss, refuse_other_rows
from zoft.weightings.base import Gram, Weighting, by_direction

SCALES = ("prompt", "step", "none")


@dataclass
class PerPrompt(Weighting):
    """a_j = 1 / (q B) sum_i s_ij: what direction j is worth to each of B prompts, every prompt on a scale of its own.

    L_ij is the loss of prompt i (minus its reward) at point j, the points being the q (one side) or 2 q (two sides)
    perturbed ones of the step, all of which answer the same prompts:

        d_ij = L_ij - mean_j L_ij                       the prompt's baseline: how hard it is has no part in it
        s_ij = d_ij / std_j L_ij                        scale=prompt
        s_ij = d_ij / rms_ij d_ij                       scale=step
        s_ij = d_ij / eps                               scale=none

    With two sides a_j = 1 / (q B) sum_i (s+_ij - s-_ij) / 2. ``prompt`` is GRPO's advantage, a group's answers being
    those of the points: a prompt whose losses hardly differ counts as much as one whose losses differ widely, and one
    that all points answer alike (std <= floor) counts nothing. With ``step`` all prompts share one unit; the baselines
    alone change nothing in the sum over prompts, so this differs from ``z_score`` in the unit, which is free of how
    hard the prompts are only here. ``none`` leaves slopes: with two sides it is ``mean`` where every example counts
    alike. With ``prompt`` and ``step`` eps has no part, and learning rates are those of ``z_score``.

    Every example counts alike, also where the objective's own loss is a mean over tokens. The objective has to know the
    loss of each: ``reward``, ``metric``, ``options``, ``classes``, ``label_words``, ``cross_entropy``, ``preference``.

    Args:
        scale: prompt (each prompt's own deviation), step (one for all prompts) or none.
        floor: smallest deviation that is believed, in units of the loss, >= 0: below it nothing moves.

    References: Shao et al. 2024 (DeepSeekMath, GRPO), section 4.1.2, for baseline and scale of a prompt.
    """

    scale: str = "prompt"
    floor: float = 1e-6

    def check(self) -> None:
        """Refuse an unknown scale, and a negative floor."""
        self.require(self.scale in SCALES, "scale", f"one of {', '.join(SCALES)}")
        self.require(0 <= self.floor < float("inf"), "floor", ">= 0 and finite")

    def check_with(self, method: Any) -> None:
        """Refuse what asks for anything but losses of the same rows at perturbed points."""
        refuse_one_loss(self, method, "compares losses of a prompt")
        refuse_other_rows(self, method)
        estimator = method.estimator
        points = [] if estimator.backpropagates else estimator.points(estimator.directions(0, 0))
        if not points or isinstance(estimator, KeepsAnchor) or any(point.derivative for point in points):
            raise UserError(
                f"weighting={self.name()} compares each prompt's losses at the points of a step, and "
                f"estimator={estimator.name()} asks for something else: use estimator=central or one_sided"
            )

    def coefficients(self, measured: Measured, gram: Gram, state: Memory) -> Tensor:
        """The mean over prompts of the scores, or of half a pair's difference, over q."""
        del gram, state
        losses = measured.examples  # [Q, S, B]
        assert losses is not None
        # d_ij = L_ij - mean_j L_ij
        centred = losses.double() - losses.double().mean(dim=(0, 1))
        if self.scale == "none":
            scores = centred / measured.eps
        else:
            # std_j L_ij [B], or one for all prompts
            squares = centred.square()
            deviation = (squares.mean(dim=(0, 1)) if self.scale == "prompt" else squares.mean()).sqrt()
            scores = torch.where(deviation <= self.floor, torch.zeros_like(centred), centred / deviation)
        # a_j = 1 / (q B) sum_i s_ij
        return (by_direction(scores).mean(1) / len(scores)).to(measured.projected_grads.dtype)
