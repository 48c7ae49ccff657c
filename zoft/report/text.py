"""How each fact about a run is said in a table."""

from __future__ import annotations

import math
import sys
from typing import Any, TextIO

from tqdm import tqdm

from zoft.utils.terminal import fitted
from zoft.utils.words import counted


def fact_rows(known: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, what to say) of every known fact that has a place in the table."""
    rows: list[tuple[str, str | None]] = [
        ("zero-shot", _score(known, "zero_shot")),
        ("final", _score(known, "final")),
        ("difference", _format(known, "difference_points", "{:+.1f} points")),
        ("paired gain", _gain(known)),
        ("evaluated on", counted(known["num_eval_rows"], "rows") if "num_eval_rows" in known else None),
        ("queries", _join(_format(known, "num_queries", "{:,}"), _format(known, "budget_queries", "of {:,}"))),
        ("steps", _format(known, "num_steps", "{:,}")),
        ("steps skipped", _count(known, "num_skipped_steps", "their loss was not finite")),
        ("texts ungraded", _count(known, "num_ungraded", "`ungraded.jsonl` says why")),
        ("tokens", _format(known, "num_tokens", "{:,}")),
        ("wall time", _time(known)),
        ("peak memory", gib(known["peak_memory_mb"]) if "peak_memory_mb" in known else None),
        ("inference alone", _beside(known, "inference_peak_mb", "{}")),
        ("backpropagation", _beside(known, "backprop_estimate_mb", _BACKPROP)),
        ("weights trained", _trained(known)),
        ("weights' SHA-256", _format(known, "weights_sha256", "`{}`")),
        ("versions", ", ".join(f"{name} {version}" for name, version in known.get("versions", {}).items())),
    ]
    return [(name, text) for name, text in rows if text]


_BACKPROP = "about {} with AdamW on the same weights, by estimate"


def _format(known: dict[str, Any], name: str, template: str) -> str | None:
    return template.format(known[name]) if name in known else None


def _join(*parts: str | None) -> str | None:
    """The parts that are known, when the first is."""
    return " ".join(part for part in parts if part) if parts[0] else None


def _score(known: dict[str, Any], name: str) -> str | None:
    if name not in known:
        return None
    percent = known["metric"] == "accuracy"
    scale, digits = (100, 1) if percent else (1, 3)
    text = f"{known[name] * scale:.{digits}f}" + (" %" if percent else "")
    if f"{name}_interval" in known:
        low, high = known[f"{name}_interval"]
        text += f" [{low * scale:.{digits}f}, {high * scale:.{digits}f}]"
    if f"{name}_perplexity" in known:
        text += f" nats per token, perplexity {known[f'{name}_perplexity']:.2f}"
    return text


def _gain(known: dict[str, Any]) -> str | None:
    """The difference on the same rows, with the interval of pairs."""
    if "gain" not in known or "gain_interval" not in known:
        return None
    scale, digits = (100, 1) if known["metric"] == "accuracy" else (1, 3)
    low, high = known["gain_interval"]
    # rows of a loss or a reward that all changed alike have no interval
    has_one = None not in (low, high) and math.isfinite(high - low)
    interval = f" [{scale * low:+.{digits}f}, {scale * high:+.{digits}f}]" if has_one else ""
    return f"{scale * known['gain']:+.{digits}f}{interval} on the same rows"


def _count(known: dict[str, Any], name: str, why: str) -> str | None:
    return f"{known[name]:,}: {why}" if known.get(name) else None


def _time(known: dict[str, Any]) -> str | None:
    parts = [
        (duration(known[name]), what)
        for name, what in (
            ("seconds_forward", "in forward passes"),
            ("seconds_other", "in everything else"),
            ("seconds_prefix", "before that on frozen blocks"),
        )
        if name in known
    ]
    split = ", ".join(f"{clock} {what}" for clock, what in parts)
    total = duration(known["seconds"]) if "seconds" in known else None
    return f"{total} ({split})" if total and split else total or split or None


def _beside(known: dict[str, Any], name: str, template: str) -> str | None:
    """Another peak, and how many times it the run's own was."""
    if name not in known:
        return None
    text = template.format(gib(known[name]))
    if "peak_memory_mb" in known and known[name]:
        text += f"; the run took {known['peak_memory_mb'] / known[name]:.2f} times that"
    return text


def _trained(known: dict[str, Any]) -> str | None:
    if "num_trainable" not in known:
        return None
    text = f"{known['num_trainable']:,}"
    if known.get("num_params"):
        text += f" of {known['num_params']:,} ({100 * known['num_trainable'] / known['num_params']:.3g} %)"
    return text


# ---- How times, sizes and numbers are said, the same on the bar, in the report and in the files ----------------------


def duration(seconds: float) -> str:
    """Seconds as a clock shows them.

    Args:
        seconds: >= 0.

    Returns:
        mm:ss, or h:mm:ss from one hour on.

    Example:
        >>> duration(72), duration(3725)
        ('01:12', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


def gib(mb: float) -> str:
    """A size in MiB as GiB.

    Example:
        >>> gib(625)
        '0.61 GiB'
    """
    return f"{mb / 1024:.2f} GiB"


def finite(value: Any) -> Any:
    """The value as JSON can say it: None in place of every number that is not finite, at any depth.

    Example:
        >>> finite({"loss": float("nan"), "interval": (0.5, float("inf"))})
        {'loss': None, 'interval': [0.5, None]}
    """
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- One line on the terminal, beside a progress bar that is being drawn ---------------------------------------------


def say(text: str, file: TextIO | None = None) -> None:
    """Print one line without breaking a progress bar that is being drawn; as several where the terminal is narrow.

    Args:
        text: the line.
        file: where to; standard output when None.

    Example:
        >>> say("zero-shot accuracy 62.4 %")
        zero-shot accuracy 62.4 %
    """
    stream = file or sys.stdout
    tqdm.write(fitted(text, stream), file=stream)
    stream.flush()  # a pipe keeps its text back otherwise, and it would come after the bar's lines
