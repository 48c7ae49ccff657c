"""A run's final model as a folder that plain transformers or peft load: as it is, or merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from zoft.config.schema import ZoftConfig
from zoft.errors import UserError
from zoft.use.export.card import write_card


def facts_of(run: str) -> dict[str, Any]:
    """The facts of a finished run.

    Raises:
        UserError: it is not finished, or its report cannot be read.
    """
    from zoft.report.results import REPORT

    path = Path(run) / REPORT
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"run={run} holds no {REPORT}: finish it with the command that began it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): repeat the run's command, which writes it again") from None


@contextmanager
def new_folder(output: str) -> Iterator[Path]:
    """A folder to fill, whose files come into the export's, which must be empty, once all of them are whole."""
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"output={output} is there and not empty: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    # inside it, since it may be another disk, a link, or the folder that the command was started in
    with TemporaryDirectory(prefix=".saving-", dir=folder) as begun:
        yield Path(begun)
        for path in Path(begun).iterdir():
            path.rename(folder / path.name)


def export_folder(cfg: ZoftConfig, run: str, output: str, *, merge: bool, name: str = "") -> tuple[Path, str]:
    """Write the final model, its tokenizer and its card.

    Args:
        cfg: of the run.
        run: its folder.
        output: a folder that is empty or not there.
        merge: whether an adapter is added into the weights of its base.
        name: what the card loads it by; the folder where it is empty.

    Returns:
        The folder, and what it holds: ``adapter`` or ``model``.

    Raises:
        UserError: an adapter that cannot be merged, or a folder that is taken.
    """
    from zoft.lm import formats
    from zoft.run.build import tokenizer_of

    facts = facts_of(run)
    adapter = (Path(run) / "model" / "adapter_config.json").is_file()
    model = merged_model(cfg, run) if merge and adapter else None
    kind, name = "adapter" if adapter and not merge else "model", name or str(Path(output).absolute())
    with new_folder(output) as folder:
        if model is not None:
            model.save_pretrained(folder)
        else:
            _copy(Path(run) / "model", folder, cfg if adapter else None)
        tokenizer_of(cfg).save_pretrained(folder)
        write_card(folder, facts, kind=kind, head=formats.model_kind(cfg.task), name=name)
    return Path(output), kind


def merged_model(cfg: ZoftConfig, run: str) -> Any:
    """The run's final model without an adapter: its weights with the adapter's added, plain ones of a quantised base.

    Raises:
        UserError: an adapter that is no change of weights (prefix and prompt tuning).
    """
    from zoft.evaluation.evaluate import model_of

    model = model_of(cfg, run, plain=True)
    if not hasattr(model, "peft_config"):
        return model
    if not hasattr(model.base_model, "merge_and_unload"):
        raise UserError(
            f"peft={cfg.peft.name()} adds inputs and no weights to merge: export it without --merge or --gguf"
        )
    return model.merge_and_unload()


def _copy(source: Path, folder: Path, cfg: ZoftConfig | None) -> None:
    """The files as they are; an adapter's base by a name that loads from any folder."""
    from zoft.lm.models.names import portable_name

    for path in source.iterdir():
        if path.is_file() and path.suffix in (".safetensors", ".json"):
            shutil.copyfile(path, folder / path.name)
    if cfg is not None:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = portable_name(cfg.model.name)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
