"""A few steps of a run in a folder of their own: nothing is evaluated, saved or tracked, and the run is untouched."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoft.config.schema import ZoftConfig
    from zoft.trainer.trainer import ZOTrainer

_OFF = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
_OF_GUARD = ("guard_factor", "guard_steps", "guard_back")


def rehearsing(cfg: ZoftConfig, folder: str, queries: int, **trainer: Any) -> ZoftConfig:
    """The config of the first steps of a run."""
    cfg = copy.copy(cfg)
    cfg.output_dir = folder
    goes_back = cfg.trainer.get("guard") == "rollback"  # by a journal, which there is none of
    of_journal = ("journal_hash_steps", *(("guard", *_OF_GUARD) if goes_back else ()))
    kept = {name: value for name, value in cfg.trainer.items() if name not in of_journal}
    cfg.trainer = kept | _OFF | {"eval_on_start": False, "journal": False, **trainer}
    cfg.tracker = type(cfg.tracker)()
    cfg.budget = dataclasses.replace(cfg.budget, queries=queries)
    return cfg


def rehearsing_trainer(cfg: ZoftConfig, model: Any, tokenizer: Any, rows: dict[str, list[Any]]) -> ZOTrainer:
    """The trainer of such a config, which shows nothing."""
    import transformers

    from zoft.run.build import arguments_of, make_trainer

    trainer = make_trainer(cfg, arguments_of(cfg), model, tokenizer, rows)
    for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
        trainer.remove_callback(callback)
    return trainer
