"""A run's model without its weights: every tensor's shape and dtype on torch's meta device."""

from __future__ import annotations

from typing import Any

from zoft.errors import UserError
from zoft.lm.models.load import _class_of, _place
from zoft.utils.lazy import torch


def meta_model(
    kind: str, name: str, *, revision: str | None, dtype: str, attention: str | None, num_labels: int
) -> Any:
    """The model of a name as :func:`zoft.lm.models.load.load_model_as` would load it; of its files the config is read.

    Args:
        kind: a key of :data:`zoft.lm.models.load.KINDS`.
        name: a local folder, a hub name, or ``zoft:NAME``.
        revision: branch, tag or commit on the hub.
        dtype: float32, bfloat16 or float16.
        attention: eager, sdpa, ...; None takes transformers' choice.
        num_labels: classes of a classifier.

    Raises:
        UserError: no such folder or hub model, or a config that no model is made from.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(_place(name), revision=revision, trust_remote_code=False)
        if kind == "classifier":
            config.num_labels = num_labels
            loader: Any = transformers.AutoModelForSequenceClassification
        else:
            loader = _class_of(name, revision) or transformers.AutoModelForCausalLM
        more = {"attn_implementation": attention} if attention else {}
        with torch.device("meta"):
            make = loader.from_config if hasattr(loader, "from_config") else loader._from_config
            return make(config, dtype=getattr(torch, dtype), **more).eval()
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"could not read the config of model.name={name}: {first_line:.200}") from error
