"""Metrics of the `evaluate` library: those whose script is on this machine need no network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zoft.errors import UserError


def computed(name: str, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """What a metric of `evaluate` says, its numbers by name.

    Args:
        name: a name that `evaluate` has cached or can reach, or the folder of a metric's script; its code is run.
        predictions: class indices, or texts.
        references: class indices, or a list of right texts for each.

    Raises:
        UserError: it cannot be loaded, or does not take these.
    """
    import evaluate

    try:
        metric = evaluate.load(name)
    except Exception as error:  # FileNotFoundError, ConnectionError, ImportError of what the script needs, ...
        raise UserError(
            f"evaluate={name} could not be loaded ({_first_line(error)}): without a network give the folder of the "
            "metric's script"
        ) from error
    first_failure: Exception | None = None
    for right in (references, [one[0] if isinstance(one, list) else one for one in references]):
        try:
            found = metric.compute(predictions=list(predictions), references=list(right))
        except Exception as error:  # a metric that takes one reference a row says so in its own way
            first_failure = first_failure or error
            continue
        return {key: float(value) for key, value in (found or {}).items() if isinstance(value, (int, float))}
    assert first_failure is not None
    raise UserError(f"evaluate={name} does not take these predictions: {_first_line(first_failure)}") from first_failure


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
