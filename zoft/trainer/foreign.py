"""Trainers of other libraries under the mixin: their arguments by name, and refusals of those that cannot work."""

from __future__ import annotations

import inspect
import sys
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

    Raises:
        UserError: more arguments than the Trainer has, one twice, or settings of a class that it does not read.
    """
    base, names = _names_of(cls)
    if positional and not names:
        raise UserError(f"{base} has arguments of its own before a Trainer's: give all of them by name")
    if len(positional) > len(names):
        raise UserError(f"{base} takes {len(names)} arguments, got {len(positional)}: give them by name")
    named = dict(zip(names, positional, strict=False))
    twice = [name for name in named if name in given]
    if twice:
        raise UserError(f"{base} was given {twice[0]} twice, by its place and by its name: drop one")
    arguments = named | dict(given)
    _refuse_other_settings(cls, arguments.get("args"))
    if isinstance(arguments.get("model"), str) and getattr(arguments.get("args"), "model_init_kwargs", None):
        raise UserError(
            "model_init_kwargs would be ignored: a model's name is loaded in float32; load it with from_pretrained, "
            "and give model= the model"
        )
    return arguments


def _refuse_other_settings(cls: type, args: Any) -> None:
    """A DPOTrainer reads fields that a DPOConfig alone has: none, or another class, ends inside of it."""
    for base in cls.__mro__:
        module = base.__module__
        if module.split(".")[0] not in ("trl", "transformers") or not base.__name__.endswith("Trainer"):
            continue  # a user's own class may well take what it is given
        stem = base.__name__.removesuffix("Trainer")
        package = module.split(".")[0]
        for place, suffix in ((module, "Config"), (package, "Config"), ("transformers", "TrainingArguments")):
            wanted = getattr(sys.modules.get(place), stem + suffix, None)
            if not isinstance(wanted, type):
                continue
            if stem and not isinstance(args, wanted):
                got = "none" if args is None else f"a {type(args).__name__}"
                raise UserError(
                    f"{base.__name__} reads its settings from a {wanted.__name__}, got {got}: "
                    f"give args=zo_config({wanted.__name__})(output_dir=...)"
                )
            return


def _names_of(cls: type) -> tuple[str, list[str]]:
    """(the first class behind the mixin that says what it takes, the names of that in order)."""
    for base in cls.__mro__:
        init = vars(base).get("__init__")
        parameters = [] if init is None else list(inspect.signature(init).parameters.values())[1:]
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        if issubclass(base, _mixin(cls)) or base.__module__.startswith("zoft."):
            continue
        if {"model", "args"} <= set(names):
            return base.__name__, names
        if names:  # and the others' places behind them, which nobody can know
            return base.__name__, []
    raise UserError("ZOMixin is half of a class: class ZOSFT(ZOMixin, SFTTrainer), or ZOTrainer")


def _mixin(cls: type) -> type:
    return next(base for base in cls.__mro__ if base.__name__ == "ZOMixin" and base.__module__.startswith("zoft."))


def refuse_behind(cls: type) -> None:
    """A Trainer in front of the mixin would train by backpropagation, and nothing of the mixin would be called.

    Raises:
        UserError: it stands there.
    """
    for base in cls.__mro__[1 : cls.__mro__.index(_mixin(cls))]:
        if issubclass(base, Trainer) and not issubclass(base, _mixin(cls)):
            raise UserError(f"class {cls.__name__}: put ZOMixin in front of {base.__name__}, whose steps it replaces")


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
    """Whether a Trainer computes its loss by itself, from more than the model's own one: TRL's look at the outputs."""
    return getattr(compute_loss, "__func__", compute_loss) is not Trainer.compute_loss
