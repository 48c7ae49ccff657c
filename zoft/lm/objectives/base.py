"""What every objective promises: a scalar for training, and predictions with their labels for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoft.component import Component
from zoft.errors import UserError
from zoft.utils.lazy import Tensor, nn

if TYPE_CHECKING:
    from zoft.lm.logits.head import Positions
    from zoft.lm.objectives._readout import Readout

Batch = dict[str, Any]


@dataclass
class Objective(Component):
    """One number per batch; the same object serves training and evaluation."""

    @property
    def forms(self) -> tuple[str, ...]:
        """Which rows it is computed from: keys of :data:`zoft.lm.formats.FORMS`; empty for any."""
        return ()

    @property
    def differentiable(self) -> bool:
        """Whether the loss has a gradient."""
        return True

    @property
    def generates(self) -> bool:
        """Whether the model writes text for it: many forwards with a cache, not one."""
        return False

    def prepare(self) -> None:
        """Refuse, before anything is loaded, what only a run needs: a setting without a default that could work."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """A scalar to minimise, float32, mean over the examples of the batch."""
        return self.predict(model, batch)[0]

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, predictions, labels): what the metric is computed from, one row per example."""
        raise NotImplementedError

    def probe(self, model: nn.Module, batch: Batch) -> None:
        """Called before the queries of a step, at the weights as they are: find out here what would call the model.

        All queries of a step must call it alike, because engines reuse from one what the next would compute again.
        """
        del model, batch

    @property
    def feedbacks(self) -> tuple[str, ...]:
        """What :meth:`readout` can be asked for, the best one first; empty where positions cannot be told apart."""
        return ()

    def places(self, model: nn.Module, batch: Batch) -> Positions:
        """The positions that the loss is read from, in the order of :meth:`readout`."""
        raise UserError(
            f"objective={self.name()} does not say which positions its loss is read from, and subspace=nodes moves "
            "those alone: use objective=options or cross_entropy, or method=mezo"
        )

    @property
    def tells_examples(self) -> bool:
        """Whether :meth:`losses` can be asked for."""
        return "loss" in self.feedbacks

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of each example alone, float32 [B]; where the loss is a mean over examples it is the mean of these.

        Args:
            model: what is called.
            batch: as for :meth:`loss`, without packed rows.
        """
        return self.readout(model, batch, "loss").losses

    def readout(self, model: nn.Module, batch: Batch, feedback: str) -> Readout:
        """One forward, read position by position (:mod:`zoft.lm.objectives._readout`).

        Args:
            model: what is called.
            batch: as for :meth:`loss`, without packed rows.
            feedback: one of :attr:`feedbacks`.
        """
        raise NotImplementedError

    def num_terms(self, batch: Batch) -> int:
        """How many terms (examples, or tokens) the mean of :meth:`loss` is over: the weight of a micro-batch."""
        raise NotImplementedError
