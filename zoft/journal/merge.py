"""Several journals from one base become one: the sum or the mean of what their steps moved, direction by direction."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from zoft.errors import UserError
from zoft.journal.file import FORMAT, Contents, Header
from zoft.journal.records import Record

WAYS = ("mean", "sum")
MOST_TERMS = 60_000
"""Coefficients of one record of a merged journal; a record can hold 65,535."""

_OWN = ("seed", "data_seed", "direction_seeds", "batch", "data")
"""Settings in which workers may differ; so may the rows that they evaluate."""
_ROWS = ("data", "eval_data", "_data")
_STATELESS = "sgd"

Name = tuple[int, ...]
"""What z depends on: (seed, step, index, example), or of MeZO's own stream the seed alone."""


def merge(
    journals: Sequence[tuple[str, Contents]], how: str, seed_of: Callable[[int], int], *, fold: bool = False
) -> tuple[Header, list[Record]]:
    """The header and the steps of the merged journal.

    A worker w that began at theta_0 and took T_w steps of SGD without decay is at

        theta_w = theta_0 - sum_{t < T_w} lr_wt sum_j c_wtj z(seed_w, t, j),

    since nothing of a step that is written down depends on the weights any more. The merged model is

        theta = theta_0 - alpha sum_w sum_t lr_wt sum_j c_wtj z(seed_w, t, j),   alpha = 1 / n (mean), or 1 (sum):

    the mean of the n models, or the base moved by all of their steps. In which order the steps were taken has no part
    in it, nor whether all took as many: workers need not keep step. Coefficients of one direction are added up, so
    that workers who draw the same directions (DeComFL), or from a finite set of seeds (FedKSeed; with MeZO's stream,
    whose directions are their seeds), make a journal no longer than that set. Exact but for rounding: every step of the
    merged journal is rounded into the weights once.

    Args:
        journals: (where it lies, what it holds), the first one's settings are kept.
        how: mean or sum.
        seed_of: step -> the seed of its directions, as the first worker's config draws them.
        fold: put all steps into as few as hold their coefficients.

    Returns:
        The header, and records that name their directions; learning rates are in the coefficients.

    Raises:
        UserError: another base, another method, one whose steps depend on each other, or steps that are not all in the
            journal.

    References: Qin et al. 2024 (FedKSeed, arXiv 2312.06353); Li et al. 2024 (DeComFL, arXiv 2405.15861).
    """
    if how not in WAYS:
        raise UserError(f"--as {how}: say mean (of the models) or sum (of all their steps)")
    if len(journals) < 2:
        raise UserError("give two journals or more: zoft journal merge RUN RUN --output DIR")
    first_path, first = journals[0]
    by_seed = first.header["settings"].get("estimator.noise") == "torch_sequential"
    for path, contents in journals:
        _check(path, contents)
        _check_same(first_path, first, path, contents)
    alpha = 1.0 if how == "sum" else 1.0 / len(journals)
    steps: dict[int, dict[Name, float]] = {}
    for _, contents in journals:
        for record in contents.records:
            if record.skipped:
                continue
            of_step = steps.setdefault(0 if fold else record.step, {})
            for name, coefficient in zip(_names(record), record.coefficients, strict=True):
                key = name[:1] if by_seed else name
                # c = alpha sum lr_wt c_wtj, over all that have this direction
                of_step[key] = of_step.get(key, 0.0) + alpha * record.lr * coefficient
    last = max(contents.end for _, contents in journals) - 1
    queries = sum(contents.records[-1].queries for _, contents in journals if contents.records)
    tokens = sum(contents.records[-1].tokens for _, contents in journals if contents.records)
    parts = _parts(steps, range(1 if fold else last + 1))
    records = []
    for number, terms in enumerate(parts):
        share = (number + 1) / len(parts)
        # MeZO's stream knows no step, and keeps its draws for one step at a time
        named = [[key[0], number, 0] if by_seed else list(key) for key in terms]
        records.append(
            Record(
                number, seed_of(number), 1.0, 0.0, round(queries * share), round(tokens * share), math.nan, math.nan,
                tuple(terms.values()), extra={"directions": named} if named else {},
                flags=0 if named else 1,
            )
        )  # fmt: skip
    return _header(journals, how), records


def _parts(steps: dict[int, dict[Name, float]], numbers: range) -> list[dict[Name, float]]:
    """The terms of each merged step; a step of too many is cut."""
    parts = []
    for number in numbers:
        terms = list(steps.get(number, {}).items())
        parts += [dict(terms[start : start + MOST_TERMS]) for start in range(0, max(1, len(terms)), MOST_TERMS)]
    return parts


def _names(record: Record) -> list[Name]:
    """The directions of a record, as they are named everywhere."""
    named = record.extra.get("directions") or [[record.seed, record.step, j] for j in range(len(record.coefficients))]
    return [tuple(which if which[-1] is not None else which[:-1]) for which in named]


def _header(journals: Sequence[tuple[str, Contents]], how: str) -> Header:
    first = journals[0][1].header
    settings = first["settings"] | {"data": "merged"}
    workers = [{"run": c.header["run"], "steps": c.end, "path": Path(path).parent.name} for path, c in journals]
    return {
        **first,
        "format": FORMAT,
        "run": uuid.uuid4().hex,
        "settings": settings,
        "merged": {"as": how, "of": workers},
    }


# ---- what cannot be merged -------------------------------------------------------------------------------------------


def _check(path: str, contents: Contents) -> None:
    """Refuse a journal whose steps are not a sum of directions times coefficients."""
    settings = contents.header.get("settings", {})
    why = None
    if contents.header["first"]:
        why = f"it begins at step {contents.header['first']}, behind a checkpoint, and not at its base"
    elif settings.get("optimizer") != _STATELESS:
        why = (
            f"optimizer={settings.get('optimizer')} makes each step of those before it, and a sum of several runs' "
            "steps has no such order: train the workers with optimizer=sgd"
        )
    elif settings.get("weight_decay"):
        why = f"weight_decay={settings['weight_decay']:g} shrinks weights that other workers move: train without"
    elif settings.get("subspace.interval") or settings.get("subspace") in ("cp", "coordinate", "sparse", "two_sided"):
        why = f"subspace={settings.get('subspace')} keeps for several steps what a seed chose: train with subspace=full"
    elif contents.observations:
        why = "its directions depend on what the model was seen to do: train with subspace=full"
    elif any(record.computed for record in contents.records):
        why = "some steps are made of a gradient, or left errors in the weights, and neither is written down"
    if why:
        raise UserError(f"{path} cannot be merged: {why}")
    for record in contents.records:
        if not record.skipped and len(_names(record)) != len(record.coefficients):
            raise UserError(
                f"{path}: step {record.step} has coefficients without directions: it was not written by zoft"
            )


def _check_same(first_path: str, first: Contents, path: str, contents: Contents) -> None:
    """Refuse another base, and another method."""
    for key, what in (("weights", "trained weights"), ("frozen", "frozen weights")):
        if first.header.get(key) != contents.header.get(key):
            raise UserError(
                f"{path} began with other {what} than {first_path}: what is merged has one base (the same model, "
                "adapter and seed of a fresh adapter or head)"
            )
    settings, other_settings = (one.header.get("settings", {}) for one in (first, contents))
    for key in sorted(settings.keys() | other_settings.keys()):
        if key in _OWN or key.endswith(_ROWS) or settings.get(key) == other_settings.get(key):
            continue
        raise UserError(
            f"{path} is of another method than {first_path}: {key} is {other_settings.get(key)}, and "
            f"{settings.get(key)} there"
        )
