"""An adapter's folder onto its base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoft.errors import UserError
from zoft.lm.models.peft._positions import adapter_config, count_by_mask, counts_from_zero
from zoft.lm.models.peft.base import without_old_names


def base_of(folder: str | Path) -> tuple[str, str | None]:
    """Name and revision of the model that an adapter's folder is for.

    A relative path is looked for from here and from the folder: on the hub its name would be a stranger's model.

    Raises:
        UserError: the folder does not say, or names a path at which nothing lies.
    """
    file, said = Path(folder) / "adapter_config.json", adapter_config(folder)
    name, revision = said.get("base_model_name_or_path"), said.get("revision")
    if not isinstance(name, str) or not name:
        raise UserError(f"{file} names no base_model_name_or_path: write the model there that the adapter is for")
    places = [Path(name), *(above / name for above in (Path(folder), *Path(folder).absolute().parents[:2]))]
    base = next((place for place in places if place.is_dir()), None)
    if base is None and name.startswith((".", "/", "~")):
        raise UserError(f"{file}: there is no model folder {name}: write where the adapter's base lies")
    return str(base or name), revision


def load_adapter(model: Any, folder: str | Path) -> Any:
    """The base model with the adapter of a folder on it, for inference.

    Beside peft's own ``PeftModel.from_pretrained`` it counts positions as the adapter was trained: behind a prompt by
    the mask, and from 0 with a prefix in MeZO's layout, whose mark plain peft passes over with a warning.

    Raises:
        UserError: its files are damaged, or for another model.
    """
    from peft import PeftModel

    config = None
    if counts_from_zero(folder):
        from zoft.lm.models.peft._mezo_prefix import MezoPrefixConfig

        known = MezoPrefixConfig.__dataclass_fields__
        said = adapter_config(folder)
        config = MezoPrefixConfig(**{name: value for name, value in said.items() if name in known})
    try:
        with without_old_names():
            return count_by_mask(PeftModel.from_pretrained(model, str(folder), config=config))
    except Exception as error:  # the files are the user's: whatever they bring down is theirs to mend
        first_line = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"the adapter in {folder} cannot be loaded: {first_line}") from error
