"""`zoft attack`: adversarial examples against an image classifier that answers queries only."""

from __future__ import annotations

import json
import sys
from typing import Any

from zoft.utils.terminal import fitted
from zoft.utils.words import read_words


def command(arguments: list[str]) -> int:
    """Attack, and say what came of it."""
    words = read_words("attack", arguments, flags=["--json"])
    from zoft.blackbox.attack.settings import AttackSettings

    settings = AttackSettings.of(words.rest).resolved()
    from zoft.blackbox.attack.report import carry_out

    results = carry_out(settings, progress=_progress)
    if words.flags:
        print(json.dumps(results, ensure_ascii=False))
    else:
        for line in [*lines(results), f"results: {settings.output_dir}"]:  # each by itself: one is no part of the next
            print(fitted(line))
    return 0


def lines(results: dict[str, Any]) -> list[str]:
    """The results for people."""
    summary, settings = results["summary"], results["settings"]
    bound = f"{settings['norm']} {settings['radius']:.4g}"
    wanted = f" to {settings['target']!r}" if "target" in settings else ""
    head = [results["classifier"], f"method={settings['method']}, bound {bound}, budget {settings['budget']:,} queries"]
    if summary["num_skipped"]:
        why = "was wrong already, or the target" if wanted else "was wrong already"
        head.append(f"{summary['num_skipped']} skipped: the classifier's label of the clean image {why}")
    if not summary["num_images"]:
        return [*head, "nothing was left to attack"]
    if summary["num_images"] == 1:
        return head + _one(next(row for row in results["images"] if not row["skipped"]), results.get("picture"))
    low, high = (100 * end for end in summary["success_interval"])
    head.append(
        f"flipped{wanted} {summary['num_flipped']} of {summary['num_images']}: {100 * summary['success_rate']:.1f} % "
        f"(95 % interval {low:.1f} to {high:.1f})"
    )
    if summary["num_flipped"]:
        (low, high), middle = summary["median_interval"], summary["median_queries"]
        of_all = "beyond the budget" if middle is None else f"{middle:g} (too few images for an interval)"
        if middle is not None and low is not None:
            of_all = f"{middle:g} (95 % interval {low:g} to {'beyond the budget' if high is None else f'{high:g}'})"
        head.append(f"queries: median {summary['median_queries_flipped']:g} of those flipped; of all, {of_all}")
    return head


def _one(row: dict[str, Any], picture: dict[str, Any] | None) -> list[str]:
    before, after = (f"{row[at]['label']!r} ({100 * row[at]['probability']:.1f} %)" for at in ("before", "after"))
    verb = "became" if row["success"] else "did not become what was wanted; the nearest was"
    summary = [f"{before} {verb} {after} after {row['queries']:,} queries, perturbation {row['size']:.4g}"]
    if picture:
        verdict = "still" if picture["success"] else "but no longer adversarial:"
        summary.append(
            f"rounded to bytes (adversarial.png) it is {verdict} {picture['label']!r} "
            f"({100 * picture['probability']:.1f} %)"
        )
    return summary


def _progress(done: int, of: int) -> None:
    if sys.stderr.isatty() and of > 1:
        print(f"\r{done:,} of {of:,} images", end="\n" if done >= of else "", file=sys.stderr, flush=True)
