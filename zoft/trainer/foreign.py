"""Trainers of other libraries under the mixin: their arguments by name, and those that cannot work."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import Trainer

from zoft.errors import UserError

_OWN_TEXTS = (
    "GRPOTrainer",
    "RLOOTrainer",
    "DistillationTrainer",
    "GKDTrainer",
    "OnlineDPOTrainer",
    "NashMDTrainer",
    "XPOTrainer",
    "PPOTrainer",
)
"""Trainers of TRL that write the texts they train on, and count them, in a training step of their own."""


def by_name(cls: type, positional: Sequence[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a Trainer by their names: the second one is ``args`` in some classes and ``ref_model`` in others.

    Args:
        cls: a class with the mixin in front of a Trainer.
        positional: arguments without a name, in the order of that Trainer.
        given: those with one.

    Returns:
        All of them by name.

    Raises:
        UserError: more arguments than the Trainer has, or one twice.
    """
    base, names = _names_of(cls)
    if len(positional) > len(names):
        raise UserError(f"{base} takes {len(names)} arguments, got {len(positional)}: give them by name")
    named = dict(zip(names, positional, strict=False))
    twice = [name for name in named if name in given]
    if twice:
        raise UserError(f"{base} was given {twice[0]} twice, by its place and by its name: drop one")
    return named | dict(given)


def _names_of(cls: type) -> tuple[str, list[str]]:
    """(the first class behind the mixin that says what it takes, the names of that in order)."""
    for base in cls.__mro__:
        init = vars(base).get("__init__")
        parameters = [] if init is None else list(inspect.signature(init).parameters.values())[1:]
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        if {"model", "args"} <= set(names) and not issubclass(base, _mixin(cls)):
            return base.__name__, names
    raise AssertionError("there is a Trainer behind the mixin")


def _mixin(cls: type) -> type:
    return next(base for base in cls.__mro__ if base.__name__ == "ZOMixin" and base.__module__.startswith("zoft."))


def refuse_generating(cls: type) -> None:
    """A zeroth-order step takes the place of the training step in which such a Trainer writes its texts.

    Raises:
        UserError: it is one of these.
    """
    for base in cls.__mro__:
        writes = base.__name__ in _OWN_TEXTS or "_generate_and_score_completions" in vars(base)
        if writes and base.__module__.startswith("trl."):
            raise UserError(
                f"{base.__name__} writes the texts it trains on inside its own training step, which ZOMixin replaces: "
                "use objective=reward with ZOTrainer, which scores generated texts with forward passes only"
            )


def refuse_optimizers(given: Mapping[str, Any]) -> None:
    """Refuse what makes a first-order optimizer.

    Raises:
        UserError: there is such an argument.
    """
    for name in ("optimizers", "optimizer_cls_and_kwargs"):
        if given.get(name) not in (None, (None, None)):
            raise UserError(f"{name}= is for first-order optimizers: pass optimizer= (sgd, momentum, adam)")


def has_own_loss(compute_loss: Any) -> bool:
    """Whether a Trainer computes its loss by itself, from more than the model's own one: TRL's look at the outputs.

    Args:
        compute_loss: its method.
    """
    return getattr(compute_loss, "__func__", compute_loss) is not Trainer.compute_loss
