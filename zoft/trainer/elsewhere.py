"""Trainer settings for forwards that run in another runtime: more is refused, and no hidden states are kept."""

from __future__ import annotations

from typing import Any

from zoft.engines._elsewhere import Elsewhere
from zoft.engines.base import Engine
from zoft.errors import UserError
from zoft.lm.objectives.base import Objective
from zoft.step.method import Method


def settle_elsewhere(engine: Engine, method: Method, objective: Objective | None, args: Any) -> None:
    """Refuse, before the model is loaded, what another runtime does not compute, and settings it would ignore.

    Args:
        engine: one of this process has nothing to settle.
        method: what is trained with.
        objective: or None for the model's own loss.
        args: of the Trainer; what cannot be seen from here is switched off in them.

    Raises:
        UserError: with what to use instead.
    """
    if not isinstance(engine, Elsewhere):
        return
    engine.check_method(method)
    if objective is None:
        raise UserError(
            f"engine={engine.name()} scores tokens, and the model's own loss is computed by the model: give an "
            "objective (objective=options, cross_entropy), or use engine=auto"
        )
    engine.check_objective(objective)
    # settings of this process's forwards would be ignored
    for name in ("bf16", "fp16", "torch_compile"):
        if getattr(args, name):
            raise UserError(
                f"trainer.{name}=true is about forwards of this process, and those of engine={engine.name()} run "
                "elsewhere: leave it out, or use engine=auto"
            )
    # last: a server is asked only once everything else fits
    engine.prepare()
    args.keep_frozen_prefix = False  # hidden states are not seen here
