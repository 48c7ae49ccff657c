"""The interface of every adapter: a `peft` configuration, and where needed a starting point that is not random."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from zoft.component import Component
from zoft.errors import UserError
from zoft.utils.lazy import nn


@dataclass
class Peft(Component):
    """Which adapter is put on the model, if any."""

    def config(self, task_type: str) -> Any | None:
        """The ``peft.PeftConfig``, or None for no adapter.

        Args:
            task_type: peft's own word: CAUSAL_LM, SEQ_CLS, SEQ_2_SEQ_LM, or FEATURE_EXTRACTION for the rest.
        """
        raise NotImplementedError

    def wrap(self, model: nn.Module, seed: int, revision: str | None = None) -> nn.Module:
        """The model with the adapter on it; the global random state is left as it was.

        Args:
            model: a transformers model.
            seed: seeds the adapter's random initial weights.
            revision: of the model on the hub: what loads the adapter asks for its base by it.

        Raises:
            UserError: peft refuses the model, for instance because no module has the asked name.
        """
        from zoft.utils.lazy import torch

        with torch.random.fork_rng(), without_old_names():
            torch.manual_seed(seed)
            try:
                config = self.config(task_type_of(model))
                if config is None:
                    return model
                from peft import get_peft_model

                wrapped = get_peft_model(model, config)
            except ValueError as error:
                first_line = next(iter(str(error).splitlines()), type(error).__name__)
                raise UserError(f"peft={self.name()} does not fit {type(model).__name__}: {first_line}") from error
        from zoft.lm.models.names import portable_name
        from zoft.lm.models.peft._positions import count_by_mask

        for peft_config in wrapped.peft_config.values():  # what loads the adapter asks for its base by this name
            peft_config.base_model_name_or_path = portable_name(peft_config.base_model_name_or_path or "") or None
            peft_config.revision = revision
        return count_by_mask(wrapped)


def unwrapped(model: Any) -> Any:
    """The model below an adapter as it was before :meth:`Peft.wrap`, in evaluation mode; the adapter is lost.

    Args:
        model: a peft model whose base has not been trained.
    """
    from peft.tuners.tuners_utils import BaseTuner

    from zoft.lm.models.peft._positions import forget_positions

    base = model.base_model.unload() if isinstance(model.base_model, BaseTuner) else model.get_base_model()
    forget_positions(base)
    vars(base).pop("peft_config", None)  # or peft would add a second adapter to the first one's
    return base.eval()


@contextmanager
def without_old_names() -> Iterator[None]:
    """Silence the warning that peft calls transformers by a deprecated name: users cannot change that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`?is_gradient_checkpointing", FutureWarning)
        yield


def task_type_of(model: nn.Module) -> str:
    """peft's task type for a transformers model, by its class name.

    Example:
        >>> class OPTForCausalLM: ...
        >>> task_type_of(OPTForCausalLM())
        'CAUSAL_LM'
    """
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    if name.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else "FEATURE_EXTRACTION"
