"""The name that a base model goes by in another folder or on another machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoft.lm.hub import out_of_reach


def portable_name(name: str) -> str:
    """A base model's name that says the same from every folder.

    A fetched demo base becomes its name on the hub, a folder its absolute path; anything else is a hub name already.

    Args:
        name: a folder, a hub name, or ``zoft:NAME``.

    Example:
        >>> portable_name("zoft:smollm2-135m-instruct"), portable_name("Qwen/Qwen3-0.6B")
        ('HuggingFaceTB/SmolLM2-135M-Instruct', 'Qwen/Qwen3-0.6B')
    """
    from zoft.lm.data.assets import ASSETS
    from zoft.utils.files import at_home, cache_dir

    for asset in ASSETS.values():
        cached = (cache_dir() / asset.target).absolute()
        if asset.hub and (name == f"zoft:{asset.name}" or at_home(name).absolute() == cached):
            return asset.hub
    folder = at_home(name)
    return str(folder.absolute()) if folder.is_dir() else name


def without_asking(model: Any) -> dict[str, Any]:
    """Arguments for ``save_pretrained`` of an adapter, so that peft asks no hub for its base's vocabulary.

    Args:
        model: any; arguments are needed for an adapter whose base is the demo's, or on a hub that cannot be reached:
            there peft would wait for minutes, and take the vocabulary for the base's own.
    """
    from zoft.lm.data.assets import ASSETS

    configs = getattr(model, "peft_config", {}) if hasattr(model, "get_base_model") else {}
    demo = {asset.hub for asset in ASSETS.values() if asset.hub}
    bases = [config.base_model_name_or_path or "" for config in configs.values()]
    asks_for_nothing = any(name in demo or (not Path(name).is_dir() and out_of_reach()) for name in bases)
    return {"save_embedding_layers": False} if asks_for_nothing else {}


def is_local(name: str) -> bool:
    """Whether others cannot load it by this name: a folder of this machine."""
    return Path(name).is_absolute()
