"""What a trainer does otherwise where forwards run elsewhere: it refuses more, and its evaluations are asked there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer

from zoft.engines._elsewhere import Elsewhere
from zoft.engines.base import Engine
from zoft.errors import UserError
from zoft.lm.objectives.base import Objective
from zoft.step.method import Method

_Base: Any = Trainer if TYPE_CHECKING else object  # at run time the Trainer comes from the class beside the mixin


class AskedElsewhere(_Base):
    """The part of :class:`zoft.trainer.trainer.ZOMixin` that knows of :class:`zoft.engines._elsewhere.Elsewhere`."""

    engine: Engine
    method: Method
    objective: Objective | None

    def _settle_elsewhere(self, args: Any) -> None:
        """Refuse, before the model is loaded, what another runtime does not compute, and settings it would ignore."""
        engine = self.engine
        if not isinstance(engine, Elsewhere):
            return
        engine.check_method(self.method)
        if self.objective is None:
            raise UserError(
                f"engine={engine.name()} scores tokens, and the model's own loss is computed by the model: give an "
                "objective (objective=options, cross_entropy), or use engine=auto"
            )
        engine.check_objective(self.objective)
        for name in ("bf16", "fp16", "torch_compile"):
            if getattr(args, name):
                raise UserError(
                    f"trainer.{name}=true is about forwards of this process, and those of engine={engine.name()} run "
                    "elsewhere: leave it out, or use engine=auto"
                )
        engine.prepare()
        args.keep_frozen_prefix = False  # hidden states are not seen here

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's own; what answers for the model is there."""
        if isinstance(self.engine, Elsewhere):
            self.create_optimizer()
        return super().evaluation_loop(*args, **kwargs)
