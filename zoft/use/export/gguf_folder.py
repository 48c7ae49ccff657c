"""A run's final model as a GGUF file with its card, in a folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from zoft.errors import UserError
from zoft.use.export.card import write_card
from zoft.use.export.folder import facts_of, merged_model, new_folder
from zoft.use.export.gguf_file import require, write_gguf

if TYPE_CHECKING:
    from zoft.config.schema import ZoftConfig


def export_gguf(cfg: ZoftConfig, run: str, output: str, quantize: str, *, name: str = "") -> Path:
    """Write the file and the card.

    Args:
        cfg: of the run.
        run: its folder.
        output: a folder that is empty or not there.
        quantize: f32, f16, q8_0 or q4_0.
        name: of the model in the card.

    Returns:
        The folder.

    Raises:
        UserError: a model that is not written as GGUF here, or a folder that is taken.
    """
    from zoft.lm import formats
    from zoft.run.build import tokenizer_of

    kind = formats.model_kind(cfg.task)
    if kind != "causal":
        raise UserError(f"--gguf writes causal language models, and this run has a {kind}: export without it")
    facts, tokenizer = facts_of(run), tokenizer_of(cfg)
    model = merged_model(cfg, run)
    require(model.config, tokenizer)
    folder = new_folder(output)
    title = str(facts.get("run_name", "run"))
    file = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', title)}-{quantize}.gguf"
    write_gguf(model, tokenizer, folder / file, quantize, title)
    write_card(folder, facts, kind="gguf", head=kind, name=name or str(folder.absolute()), files=[file])
    return folder
