"""Refusals of training arguments that transformers would silently replace or ignore, or fail on later."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zoft.errors import Conditions, UserError, did_you_mean, refuse_unmet

_AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "dataloader_prefetch_factor": 1,
    "save_total_limit": 1,
    "max_skipped_steps": 1,
    "guard_back": 1,
    "guard_factor": 1,
    "guard_steps": 1,
    "max_steps": -1,
    "num_train_epochs": 0,
    "ddp_timeout": 1,
    "eval_delay": 0,
    "warmup_steps": 0,
    "dataloader_num_workers": 0,
    "frozen_prefix_mb": 0,
    "journal_hash_steps": 0,
    "max_grad_norm": 0,
    "learning_rate": 0,
    "weight_decay": 0,
}
_WHOLE = set(_AT_LEAST) - {"eval_delay", "warmup_steps", "max_grad_norm", "learning_rate", "weight_decay"}
_WHOLE -= {"guard_factor", "num_train_epochs", "ddp_timeout"}
_NONE = ("eval_accumulation_steps", "dataloader_prefetch_factor", "save_total_limit", "eval_steps")  # None is theirs
_MOST_QUERIES = 100_000_000  # months of training; the steps of some methods are counted one by one
_MEANING = {
    "save_total_limit": "; leave it out to keep all checkpoints",
    "eval_accumulation_steps": "; leave it out to move predictions to the host at the end",
    "max_grad_norm": "; 0 clips nothing",
}
_EVERY = {"logging_steps": "logs nothing", "eval_steps": "evaluates at no step", "save_steps": "saves no checkpoint"}
"""Steps from one to the next -> what its strategy "no" does."""
_WORDS = {
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
    "log_level": ("detail", "debug", "info", "warning", "error", "critical", "passive"),
    "log_level_replica": ("detail", "debug", "info", "warning", "error", "critical", "passive"),
}
"""Choices that transformers looks up late, or not at all."""
_NO_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
_NO_KWARGS = ("constant", "constant_with_warmup")


DEFAULTS: dict[str, Any] = {
    **{"guard": "none", "guard_factor": 10.0, "guard_steps": 100, "guard_back": 20},
    **{"dataloader_num_workers": 0, "dataloader_persistent_workers": False, "dataloader_prefetch_factor": None},
    **dict.fromkeys(("bf16", "fp16", "torch_compile", "narrow_last_block"), False),
    **{"journal": True, "journal_hash_steps": 1000, "keep_frozen_prefix": True, "frozen_prefix_mb": 2048},
}
"""Of ZOConfig, without importing it."""
OF_FORWARDS = ("bf16", "fp16", "torch_compile", "narrow_last_block", "frozen_prefix_mb")
"""How forwards of this process are computed, whole rows at a time."""
COUNTS_WITH: Conditions = {
    **dict.fromkeys(("guard_factor", "guard_steps"), ("guard", ("clip", "rollback"))),
    "guard_back": ("guard", ("rollback",)),
    "journal_hash_steps": ("journal", (True,)),
    "frozen_prefix_mb": ("keep_frozen_prefix", (True,)),
    **dict.fromkeys(("dataloader_persistent_workers", "dataloader_prefetch_factor"), ("dataloader_num_workers", ())),
}


def require_taken(values: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse numbers and words that would be replaced, ignored, or fallen over in the middle of a run.

    Args:
        values: training arguments by name; those that are left out are not looked at.
        prefix: before each name in the message: ``trainer.`` where they stand in a config.

    Raises:
        UserError: saying which one, and what it can be.

    Example:
        >>> require_taken({"eval_steps": 0})
        Traceback (most recent call last):
        zoft.errors.UserError: eval_steps must be a whole number of steps from 1 on, or a share of the run between 0 \
and 1, got 0; eval_strategy=no evaluates at no step
    """
    for sentence in (*_numbers(values, prefix), *_words(values, prefix), *_ignored(values, prefix)):
        raise UserError(sentence)
    refuse_unmet(COUNTS_WITH, {**DEFAULTS, **values}, DEFAULTS, prefix)


def unread_forwards(
    values: Mapping[str, Any], why: str, prefix: str = "", names: Sequence[str] = OF_FORWARDS
) -> Iterator[str]:
    """A sentence for each of ``names`` that ``values`` have where there are no such forwards, with ``why``."""
    for name in names:
        if (value := values.get(name, DEFAULTS[name])) != DEFAULTS[name]:
            yield f"{prefix}{name}={str(value).lower()} does nothing: {why}: leave it out"


def require_budget(queries: int) -> None:
    """Refuse a budget of no query, and one that nobody spends.

    Args:
        queries: ``budget.queries``.

    Raises:
        UserError: saying between which numbers it must be.
    """
    if not _is_number(queries) or queries % 1 or queries < 1:
        raise UserError(f"budget.queries must be at least 1, and a whole number, got {queries!r}")
    if queries > _MOST_QUERIES:
        raise UserError(f"budget.queries must be {_MOST_QUERIES:,} or less (that is months), got {queries}")


def _numbers(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, least in _AT_LEAST.items():
        value: Any = values.get(name, least)
        if (value is None and name in _NONE) or (name == "learning_rate" and isinstance(value, str)):
            continue
        kind = "whole number" if name in _WHOLE else "finite number"
        if not _is_number(value) or value == math.inf or (name in _WHOLE and value % 1 > 0):
            yield f"{prefix}{name} must be at least {least}, and a {kind}, got {value!r}"
        elif not value >= least:
            yield f"{prefix}{name} must be at least {least}, got {value}{_MEANING.get(name, '')}"
    for name, nothing in _EVERY.items():
        value = values.get(name, 1)
        # transformers takes 0 for "as logging_steps", and counts backwards from a negative number
        is_left = value is None and name in _NONE
        if not is_left and not (_is_number(value) and (0 < value < 1 or (value >= 1 and value % 1 == 0))):
            yield (
                f"{prefix}{name} must be a whole number of steps from 1 on, or a share of the run between 0 and 1, "
                f"got {value}; {prefix}{name.removesuffix('steps')}strategy=no {nothing}"
            )


def _words(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, words in _WORDS.items():
        if values.get(name, words[0]) not in words:
            yield f"{prefix}{name}={values[name]} is none of its values.{did_you_mean(str(values[name]), words)}"


def _ignored(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    schedule = values.get("lr_scheduler_type", "constant")
    schedule = str(getattr(schedule, "value", schedule))
    if values.get("warmup_steps") and schedule in _NO_WARMUP:
        yield (
            f"{prefix}warmup_steps={values['warmup_steps']} would be ignored: {prefix}lr_scheduler_type={schedule} has "
            f"no warmup; use {prefix}lr_scheduler_type=constant_with_warmup, linear or cosine"
        )
    if values.get("lr_scheduler_kwargs") and schedule in _NO_KWARGS:
        yield (
            f"{prefix}lr_scheduler_kwargs would be ignored: {prefix}lr_scheduler_type={schedule} takes none; leave "
            "them out, or choose a schedule that does"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
