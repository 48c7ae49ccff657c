"""Whether training helped: the metric on the same rows before and after, with a paired interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from zoft.lm.metrics.intervals import mean_of_seeds
from zoft.utils.files import write_atomically
from zoft.utils.words import counted

_DOWN = ("loss",)  # the lower the better
_SHARES = ("accuracy", "f1", "exact_match")  # of a row it is 0 to 1


class RowValues(TypedDict):
    """A metric row by row.

    Args:
        values: what each row adds to it.
        weights: how much each row counts.
    """

    values: list[float]
    weights: list[float]


class KeptRows(RowValues):
    """The same beside a file of numbers; ``of`` has the digests of the weights and rows that they are of."""

    of: dict[str, str | None]


def row_values(metric: str, predictions: Any, labels: Any) -> RowValues:
    """What each row adds to the metric, and how much it weighs.

    Args:
        metric: accuracy, loss, f1, exact_match or reward.
        predictions: as the objective's metric gets them.
        labels: likewise.
    """
    import numpy

    columns = numpy.asarray(predictions, dtype=numpy.float64)
    if metric == "accuracy":
        values = columns.argmax(axis=1) == numpy.asarray(labels)
    elif metric in ("f1", "exact_match"):
        values = columns[:, ("f1", "exact_match").index(metric)]
    else:
        values = columns.reshape(len(columns))
    weights = numpy.asarray(labels, dtype=numpy.float64) if metric == "loss" else numpy.ones(len(columns))
    return {"values": numpy.asarray(values, dtype=float).tolist(), "weights": weights.tolist()}


def paired_gain(metric: str, before: RowValues, after: RowValues) -> tuple[float, float, float] | None:
    """(gain, low, high) of the metric over the same rows, 95 %; None where the rows are not the same.

    d_i = after_i - before_i: their mean over rows of equal weight, the ratio sum d_i / sum w_i over rows of w_i tokens;
    of few rows with Student's t. Rows that all changed alike have no spread to tell an interval by: then at most a
    share p of others would do otherwise, (1 - p)^n = 0.05, which bounds what lies between 0 and 1 in a row; a loss or
    a reward is not bounded, and its interval infinite.

    Example:
        >>> one = {"values": [0.0, 0.0, 1.0, 0.0], "weights": [1.0] * 4}
        >>> two = {"values": [1.0, 1.0, 1.0, 0.0], "weights": [1.0] * 4}
        >>> "{:.2f} {:.2f} {:.2f}".format(*paired_gain("accuracy", one, two))
        '0.50 -0.42 1.00'
        >>> "{:.2f} {:.2f} {:.2f}".format(*paired_gain("accuracy", one, one))
        '0.00 -0.53 0.53'

    References: Cochran 1977, Sampling Techniques, chapter 6 (ratio estimators); Hanley and Lippman-Hand 1983, If
    nothing goes wrong, is everything all right? (the bound for rows that are all alike).
    """
    if before["weights"] != after["weights"] or len(before["values"]) < 2:
        return None
    weights = before["weights"]
    differences = [b - a for a, b in zip(before["values"], after["values"], strict=True)]
    gain = math.fsum(differences) / math.fsum(weights)
    # around the gain: residuals d_i - gain * w_i, on the scale of the mean
    share = len(weights) / math.fsum(weights)
    residuals = [share * (d - gain * w) for d, w in zip(differences, weights, strict=True)]
    if max(map(abs, residuals)) <= 1e-9 * max(1.0, abs(gain)):
        # (1 - p)^n = 0.05; d_i is between -1 and 1
        p = 1 - 0.05 ** (1 / len(weights))
        bounds = (gain - p * (1 + gain), gain + p * (1 - gain)) if metric in _SHARES else (-math.inf, math.inf)
        return gain, *bounds
    low, high = mean_of_seeds(residuals)
    most = 1.0 if metric in _SHARES else math.inf
    return gain, max(-most, gain + low), min(most, gain + high)


def kept_line(args: Any, state: Any) -> str | None:
    """That the weights are not the last ones but the best on the dev rows; None where they are the last ones."""
    best, last = state.best_global_step, state.global_step
    if not args.load_best_model_at_end or not best or best == last:
        return None
    metric = str(args.metric_for_best_model or "loss").removeprefix("eval_")
    return (
        f"kept      the weights of step {best:,} of {last:,}, the best dev {metric} on the way: {state.best_metric:.4g}"
    )


def verdict_line(metric: str, gain: tuple[float, float, float], num_rows: int) -> str:
    """The gain in a sentence.

    Example:
        >>> verdict_line("accuracy", (0.382, 0.331, 0.433), 500)
        'verdict   +38.2 points [+33.1, +43.3] on the same 500 rows: better than before'
        >>> verdict_line("loss", (-0.01, -0.04, 0.02), 80)
        'verdict   -0.010 [-0.040, +0.020] on the same 80 rows: within noise, no gain can be told'
        >>> verdict_line("reward", (1.0, -math.inf, math.inf), 16)
        'verdict   +1.000 on the same 16 rows, each by as much: no interval can be told from that'
    """
    same = f"on the same {counted(num_rows, 'rows')}"
    scale, digits, unit = (100, 1, " points") if metric == "accuracy" else (1, 3, "")
    middle, low, high = (scale * value for value in gain)
    if not math.isfinite(high - low):
        change = "each by as much" if middle else "none of which changed"
        return f"verdict   {middle:+.{digits}f} {same}, {change}: no interval can be told from that"
    sentence = f"verdict   {middle:+.{digits}f}{unit} [{low:+.{digits}f}, {high:+.{digits}f}] {same}"
    if low <= 0 <= high:
        return f"{sentence}: within noise, no gain can be told"
    return f"{sentence}: {'better' if (middle > 0) != (metric in _DOWN) else 'WORSE'} than before"


def next_lines(output_dir: str, *, chats: bool, chooses: bool, own: Sequence[str] = ()) -> list[str]:
    """The next three commands."""
    run = " ".join([f"run={output_dir}", *own])
    use = f"zoft predict {run} data=new.csv" if chooses else f"zoft generate {run} prompt='...'"
    use = f"zoft chat {run} --compare" if chats else use
    return [f"next    {use}", f"        zoft export {run}", f"        zoft journal show {output_dir}"]


def keep_rows(path: Path, rows: RowValues, of: dict[str, str | None]) -> None:
    """Write rows beside the numbers that are of them."""
    import json

    write_atomically(_beside(path), json.dumps({**rows, "of": of}) + "\n")


def kept_rows(path: Path) -> KeptRows | None:
    """The rows that :func:`keep_rows` wrote beside a file of numbers, where both are of the same weights and rows."""
    from zoft.report.results import read_json

    numbers, rows = read_json(path) or {}, read_json(_beside(path)) or {}
    same = bool(rows.get("of")) and all(numbers.get(name) == sha for name, sha in rows["of"].items())
    return cast(KeptRows, rows) if same else None


def gain_of(metric: str, before: Path, after: Path) -> tuple[float, float, float] | None:
    """The gain between two files of numbers, where both have kept their rows and these are the same."""
    one, two = kept_rows(before), kept_rows(after)
    if one is None or two is None or one["of"].get("rows") != two["of"].get("rows"):
        return None
    return paired_gain(metric, one, two)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}_rows.json")
