"""Trainer settings for forwards of another runtime, or of several processes: more is refused, no hidden states kept."""

from __future__ import annotations

from typing import Any

from zoft.engines._elsewhere import Elsewhere
from zoft.engines.base import Engine
from zoft.errors import UserError, refuse_ignored
from zoft.lm.objectives.base import Objective
from zoft.step.method import Method
from zoft.step.shares import check_pipeline
from zoft.trainer.values import unread_forwards


def settle_forwards(engine: Engine, method: Method, objective: Objective | None, args: Any) -> None:
    """Refuse, before the model is loaded, what other forwards do not compute, and settings they would ignore.

    Args:
        engine: one of this process alone has nothing to settle.
        method: what is trained with.
        objective: or None for the model's own loss.
        args: of the Trainer; what cannot be seen from here is switched off in them.

    Raises:
        UserError: with what to use instead.
    """
    if args.parallel == "pipeline" and args.world_size > 1:
        names = {"trainer.narrow_last_block": args.narrow_last_block, "trainer.torch_compile": args.torch_compile}
        names["optimizer.learning_rate=auto"] = args.learning_rate == "auto"
        check_pipeline(method, engine.name(), objective, [name for name, is_on in names.items() if is_on])
        args.keep_frozen_prefix = False  # a process sees no rows below its own blocks
    if objective is not None and objective.generates:
        why = f"what objective={objective.name()} writes is computed token by token"
        for sentence in unread_forwards(vars(args), why, names=("frozen_prefix_mb",)):
            refuse_ignored(sentence)
    if not isinstance(engine, Elsewhere):
        return
    engine.check_method(method)
    if objective is None:
        raise UserError(
            f"engine={engine.name()} scores tokens, and the model's own loss is computed by the model: give an "
            "objective (objective=options, cross_entropy), or use engine=auto"
        )
    engine.check_objective(objective)
    for sentence in unread_forwards(vars(args), f"forwards of engine={engine.name()} run elsewhere"):
        refuse_ignored(sentence)
    # last: a server is asked only once everything else fits
    engine.prepare()
    args.keep_frozen_prefix = False  # hidden states are not seen here
