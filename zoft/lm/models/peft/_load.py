"""An adapter's folder onto its base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zoft.lm.models.peft._positions import count_by_mask, counts_from_zero
from zoft.lm.models.peft.base import without_old_names


def load_adapter(model: Any, folder: str | Path) -> Any:
    """The base model with the adapter of a folder on it, for inference.

    Beside peft's own ``PeftModel.from_pretrained`` it counts positions as the adapter was trained: behind a prompt by
    the mask, and from 0 with a prefix in MeZO's layout, whose mark plain peft passes over with a warning.

    Args:
        model: a transformers model, the adapter's base.
        folder: with ``adapter_config.json``.
    """
    from peft import PeftModel

    config = None
    if counts_from_zero(folder):
        from zoft.lm.models.peft._mezo_prefix import MezoPrefixConfig

        known = MezoPrefixConfig.__dataclass_fields__
        said = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        config = MezoPrefixConfig(**{name: value for name, value in said.items() if name in known})
    with without_old_names():
        return count_by_mask(PeftModel.from_pretrained(model, str(folder), config=config))
