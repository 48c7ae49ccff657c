"""report.md and report.json: what a run reached and what it cost, on one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zoft.lm.metrics.intervals import wilson
from zoft.report.results import REPORT
from zoft.report.text import fact_rows, finite
from zoft.utils.files import write_atomically

MARKDOWN, JSON = "report.md", REPORT
_PICTURES = {
    "curve.png": "![loss and accuracy against queries](curve.png)",
    "diagnostics.png": "![cosine, signal-to-noise, variance and eps of the estimates](diagnostics.png)",
}


def write_report(folder: str | Path, facts: dict[str, Any]) -> Path:
    """Write a run's report.md, for people, and report.json, the same facts for programs.

    A fact that is missing, None or not finite is left out of both, never shown as 0. Facts not named here go into
    report.json as they are.

    Args:
        folder: the run's output_dir; made when it is not there.
        facts: any of

            * run_name, model, task, method, device, dtype, seed: text;
            * metric: its name, "accuracy" when missing; zero_shot, final: its values, fractions for accuracy;
              num_eval_rows: how many rows both were measured on; zero_shot_interval, final_interval: (low, high),
              95 %, computed (Wilson) for an accuracy whose number of rows is known;
            * zero_shot_perplexity, final_perplexity: beside a loss in nats per token;
            * num_queries, budget_queries, num_steps, num_tokens, num_skipped_steps, num_ungraded;
            * seconds, seconds_forward, seconds_other;
            * peak_memory_mb, inference_peak_mb, backprop_estimate_mb: MiB;
            * num_trainable, num_params; weights_sha256; versions: name -> version; command.

    Returns:
        The path of report.md.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    known = complete_facts(facts)
    path = folder / MARKDOWN
    pictures = [text for name, text in _PICTURES.items() if (folder / name).is_file()]
    write_atomically(path, _markdown(known, pictures=pictures))
    # Last: it says that the run has ended.
    write_atomically(folder / JSON, json.dumps(finite(known), indent=2, default=str, allow_nan=False) + "\n")
    return path


def complete_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts that are known, with those that follow from them: the intervals and the difference in points.

    Example:
        >>> complete_facts({"zero_shot": 0.5, "final": 0.75, "num_steps": None})
        {'zero_shot': 0.5, 'final': 0.75, 'metric': 'accuracy', 'difference_points': 25.0}
    """
    known = {key: value for key, value in facts.items() if finite(value) is not None}
    if "versions" in known:
        known["versions"] = {name: version for name, version in known["versions"].items() if version is not None}
    known.setdefault("metric", "accuracy")
    num_rows = known.get("num_eval_rows")
    for name in ("zero_shot", "final"):
        if known["metric"] == "accuracy" and name in known and num_rows and f"{name}_interval" not in known:
            known[f"{name}_interval"] = wilson(known[name] * num_rows, num_rows)
    if known["metric"] == "accuracy" and "zero_shot" in known and "final" in known:
        known["difference_points"] = round(100 * (known["final"] - known["zero_shot"]), 2)
    return known


def summary_lines(facts: dict[str, Any]) -> list[str]:
    """The report in a few lines for the console.

    Args:
        facts: as for `write_report`.

    Returns:
        At most four lines; none for what is not known.

    Example:
        >>> for line in summary_lines({"zero_shot": 0.624, "final": 0.92, "num_eval_rows": 1000, "num_queries": 2000}):
        ...     print(line)
        accuracy  92.0 % [90.2, 93.5] from zero-shot 62.4 % [59.4, 65.3], +29.6 points on 1,000 rows
        spent     2,000 queries
    """
    known = complete_facts(facts)
    rows = dict(fact_rows(known))
    lines = []
    if "final" in rows or "zero-shot" in rows:
        text = rows.get("final", "")
        if "zero-shot" in rows:
            text += (" from " if text else "") + f"zero-shot {rows['zero-shot']}"
        if "difference" in rows:
            text += f", {rows['difference']}"
        if "evaluated on" in rows:
            text += f" on {rows['evaluated on']}"
        lines.append((known["metric"], text))
    spent = [
        rows[name] + unit
        for name, unit in (("queries", " queries"), ("steps", " steps"), ("wall time", ""))
        if name in rows
    ]
    memory = [rows["peak memory"]] if "peak memory" in rows else []
    memory += [
        f"{name} {rows[name].partition(';')[0]}" for name in ("inference alone", "backpropagation") if name in rows
    ]
    lines += [("spent", ", ".join(spent)), ("memory", ", ".join(memory)), ("trained", rows.get("weights trained", ""))]
    lines = [(name, text) for name, text in lines if text]
    width = max((len(name) for name, _ in lines), default=0)
    return [f"{name:<{width}}  {text}" for name, text in lines]


def _markdown(known: dict[str, Any], *, pictures: list[str]) -> str:
    about = [
        f"{name} `{known[name]}`" for name in ("model", "task", "method", "device", "dtype", "seed") if name in known
    ]
    lines = [f"# {known.get('run_name', 'A zoft run')}", ""]
    if about:
        lines += [", ".join(about), ""]
    rows = fact_rows(known)
    if rows:
        lines += ["| | |", "|:--|:--|", *(f"| {name} | {text} |" for name, text in rows), ""]
    if "backprop_estimate_mb" in known:
        lines += [
            "The estimate counts weights, gradients, AdamW's moments and stored activations (Korthikanti et al. 2022);",
            "on a CPU the interpreter and its libraries are counted in it as in the measured peaks.",
            "",
        ]
    for picture in pictures:
        lines += [picture, ""]
    if "command" in known:
        lines += ["To run it again:", "", "```sh", str(known["command"]), "```", ""]
    return "\n".join(lines)
