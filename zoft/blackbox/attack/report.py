"""An attack from its settings to its folder: results.json, pictures, and the images themselves."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoft.blackbox.attack.attack import ImageOutcome, attack
from zoft.blackbox.attack.data import Setting, digits, fashion_mnist
from zoft.blackbox.attack.hub import hub
from zoft.blackbox.attack.settings import AttackSettings
from zoft.errors import UserError
from zoft.lm.metrics.intervals import wilson
from zoft.utils.files import is_unfinished, remove_unfinished, write_atomically, write_filled

RESULTS, IMAGES, TRIPLETS, CURVE, PICTURE = "results.json", "images.npz", "triplets.png", "curve.png", "adversarial.png"


def carry_out(settings: AttackSettings, progress: Any = None) -> dict[str, Any]:
    """Attack, write the folder, and give what results.json holds; a folder that holds this very attack is read.

    Args:
        settings: resolved.
        progress: called with (images done, images).

    Raises:
        UserError: settings that do not fit what was loaded, a folder that holds something else, or one that cannot be
            written.
    """
    folder, asked = Path(settings.output_dir or ""), _plain(settings)
    if earlier := _earlier(folder, asked):
        return earlier
    setting = load(settings)
    images, labels, numbers = _chosen(settings, setting)
    target = None if settings.target is None else setting.classifier.index_of(settings.target)
    if settings.model and target is not None and target == labels[0]:
        raise UserError(f"the classifier already says {setting.classifier.labels[target]!r}: give another target")
    outcomes = attack(
        setting.classifier,
        images,
        labels.tolist(),
        norm=settings.norm,
        radius=settings.radius or 0.0,
        budget=settings.budget,
        method=settings.attack_method(),
        subspace=settings.subspace,
        grid=0 if settings.subspace == "pixels" else settings.grid or max(1, min(images.shape[2:]) // 4),
        loss=settings.loss,
        target=target,
        seed=settings.seed,
        numbers=numbers,
        progress=progress,
    )
    names = setting.classifier.labels
    results: dict[str, Any] = {
        "settings": asked,
        "classifier": setting.about,
        "summary": summary(outcomes),
        "curve": [dict(zip(("queries", "rate", "low", "high"), row, strict=True)) for row in curve(outcomes)],
        "images": [_row(outcome, names) for outcome in outcomes],
    }
    if settings.model and outcomes[0].success:
        results["picture"] = _in_bytes(setting, outcomes[0], target)
    _write(folder, results, outcomes, names, settings)
    return results


def load(settings: AttackSettings) -> Setting:
    """What is attacked."""
    if settings.data == "digits":
        return digits()
    if settings.data == "fashion_mnist":
        return fashion_mnist(settings.folder)
    return hub(settings.model or "", settings.image or "", settings.label)


def _chosen(settings: AttackSettings, setting: Setting) -> tuple[np.ndarray, np.ndarray, range]:
    if settings.model:
        return setting.images, setting.labels, range(1)
    first, count, total = settings.first or 0, settings.images or 0, len(setting.images)
    if first + count > total:
        raise UserError(
            f"data={settings.data} has {total:,} test images: images={count} from first={first} are too many"
        )
    part = slice(first, first + count)
    return setting.images[part], setting.labels[part], range(first, first + count)


def _in_bytes(setting: Setting, outcome: ImageOutcome, target: int | None) -> dict[str, Any]:
    """A PNG has bytes: what the classifier says of the rounded image (one query more)."""
    said = setting.classifier(_rounded(outcome)[None])[0]
    predicted = int(said.argmax())
    flipped = predicted != outcome.label if target is None else predicted == target
    return {
        "label": setting.classifier.labels[predicted],
        "probability": float(np.exp(said[predicted])),
        "success": flipped,
    }


def _rounded(outcome: ImageOutcome) -> np.ndarray:
    """To whole bytes, towards the original, so that the bound holds where the original is of whole bytes."""
    original, delta = outcome.original.astype(np.float64), outcome.adversarial.astype(np.float64) - outcome.original
    up = np.floor((original + delta) * 255 + 1e-4)
    down = np.ceil((original + delta) * 255 - 1e-4)
    return (np.where(delta > 0, up, down) / 255).clip(0, 1).astype(np.float32)


def _row(outcome: ImageOutcome, names: Sequence[str]) -> dict[str, Any]:
    return {
        "image": outcome.image,
        "label": names[outcome.label],
        "skipped": outcome.skipped,
        "success": outcome.success,
        "queries": outcome.num_queries,
        "before": {"label": names[outcome.before[0]], "probability": outcome.before[1]},
        "after": {"label": names[outcome.after[0]], "probability": outcome.after[1]},
        "size": outcome.size,
    }


def _plain(settings: AttackSettings) -> dict[str, Any]:
    given = dataclasses.asdict(settings)
    return {key: value for key, value in given.items() if value is not None and key != "output_dir"}


def _earlier(folder: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir={folder} is a file: give a folder")
    content = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if {name for name in content if not is_unfinished(name)} <= {TRIPLETS, CURVE, PICTURE, IMAGES}:
        return None  # nothing, or what an attack that was killed has left: its results are written last
    try:
        results = dict(json.loads((folder / RESULTS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(f"output_dir={folder} is not empty and holds no attack: choose another folder") from None
    if results.get("settings") != asked:
        raise UserError(f"output_dir={folder} holds another attack: choose another folder")
    return results


def _write(
    folder: Path, results: dict[str, Any], outcomes: list[ImageOutcome], names: Sequence[str], settings: AttackSettings
) -> None:
    """Pictures first; the results are the last file, and say that all is there."""
    from zoft.blackbox.attack import pictures

    try:
        folder.mkdir(parents=True, exist_ok=True)
        shown = [o for o in outcomes if not o.skipped]
        if shown:
            pictures.triplets(pictures.some(shown), names, folder / TRIPLETS)
        if len(shown) > 1:
            pictures.curves({settings.method: curve(outcomes)}, folder / CURVE, budget=settings.budget)
        if "picture" in results:
            pictures.save(_rounded(outcomes[0]), folder / PICTURE)
        before, after = np.stack([o.original for o in outcomes]), np.stack([o.adversarial for o in outcomes])
        write_filled(folder / IMAGES, lambda file: np.savez_compressed(file, original=before, adversarial=after))
        remove_unfinished(folder)
        write_atomically(folder / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"output_dir={folder} is not writable ({error.strerror}): choose another folder") from None


# ---- What the outcomes say together: success rate against queries, with 95 % intervals -------------------------------


def summary(outcomes: Sequence[ImageOutcome]) -> dict[str, Any]:
    """Counts, the rate of success and the queries that it took.

    Args:
        outcomes: of the images; those that were skipped are counted and left out of everything else.

    Returns:
        num_images, num_skipped, num_flipped, success_rate with its 95 % interval (Wilson), median_queries_flipped (of
        those that flipped; None without one), median_queries (of all, those that did not flip as never; None where
        fewer than half did) with its 95 % interval (order statistics; None for an end that is beyond the budget), and
        num_queries of all together.
    """
    tried = [o for o in outcomes if not o.skipped]
    flipped = sorted(o.num_queries for o in tried if o.success)
    spent = [*map(float, flipped), *[math.inf] * (len(tried) - len(flipped))]
    return {
        "num_images": len(tried),
        "num_skipped": len(outcomes) - len(tried),
        "num_flipped": len(flipped),
        "success_rate": len(flipped) / len(tried) if tried else None,
        "success_interval": list(wilson(len(flipped), len(tried))),
        "median_queries_flipped": _middle([float(q) for q in flipped]),
        "median_queries": _middle(spent),
        "median_interval": [_finite(end) for end in median_interval(spent)],
        "num_queries": sum(o.num_queries for o in outcomes),
    }


def curve(outcomes: Sequence[ImageOutcome]) -> list[tuple[int, float, float, float]]:
    """Success rate against queries: (queries, rate, low, high), a row for every number at which the rate rises.

    Args:
        outcomes: of the images; those that were skipped are left out.
    """
    tried = [o for o in outcomes if not o.skipped]
    rows, flipped = [], sorted(o.num_queries for o in tried if o.success)
    for queries in [1, *sorted(set(flipped))]:
        count = sum(q <= queries for q in flipped)
        rows.append((queries, count / max(1, len(tried)), *wilson(count, len(tried))))
    return rows


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a median: the innermost pair of the sorted values that holds it with that probability.

    Args:
        values: sorted; infinity for those beyond what was looked at.

    Returns:
        (low, high); (-inf, inf) of fewer than six values, which no pair of them can say so much about.

    Example:
        >>> median_interval([float(k) for k in range(1, 51)])
        (18.0, 33.0)

    References: David & Nagaraja 2003, section 7.1.
    """
    n, below = len(values), 0.0
    for k in range(n // 2):
        below += math.comb(n, k) / 2**n  # P(the median lies below the value number k, from 0)
        if below > 0.025:
            return (values[k - 1], values[n - k]) if k else (-math.inf, math.inf)
    return (-math.inf, math.inf)


def _middle(values: Sequence[float]) -> float | None:
    n = len(values)
    return _finite((values[(n - 1) // 2] + values[n // 2]) / 2) if n else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
