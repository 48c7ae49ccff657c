"""A bench in words and numbers: bench.md, its table for people, and bench.csv, one row a cell."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import mean

from zoft.bench.choosing import badness, best_point
from zoft.bench.ledger import Row
from zoft.bench.plan import MODES, Cell, Plan
from zoft.bench.results import MethodResult, Results, agreement, interval
from zoft.lm.metrics.intervals import wilson
from zoft.utils.files import write_atomically

TABLE, ROWS = "bench.md", "bench.csv"
_COLUMNS = (
    *("task", "prompt", "method", "factor", "learning_rate", "seed", "queries", "steps", "queries_a_step", "trained"),
    *("metric", "best_queries", "dev_loss", "dev_metric", "test_loss", "test_metric", "num_test"),
    *("seconds", "peak_memory_mb", "memory_before_mb", "failed"),
)
"""Those of bench.csv; behind them come the diagnostics, where there are any."""


def write(plan: Plan, rows: Mapping[Cell, Row]) -> str:
    """Write both files; returns the text of bench.md."""
    folder = Path(plan.output_dir)
    text = "\n\n".join([*at_budgets(plan, rows), markdown(plan, Results(plan, rows))])
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TABLE, text + "\n")
    write_atomically(folder / ROWS, _csv(plan, rows))
    return text


def markdown(plan: Plan, results: Results) -> str:
    """Test scores of all methods side by side, then what each cost and how far it is from the references."""
    return "\n\n".join([_overview(plan, results), _details(plan, results), _notes(plan, results)])


def at_budgets(plan: Plan, rows: Mapping[Cell, Row]) -> list[str]:
    """Where the plan has smaller budgets, a table a prompt: test metric and dev loss at each of them."""
    if not plan.budgets:
        return []
    by_budget = {budget: Results(plan, rows, budget) for budget in plan.all_budgets}
    parts = []
    for prompt in plan.prompts:
        tasks = [task for task in plan.tasks if any(results.of((task, prompt)) for results in by_budget.values())]
        methods = [
            m for m in plan.runs if any(((t, prompt), m) in r.results for t in tasks for r in by_budget.values())
        ]
        head = [f"prompt {prompt}", *(f"{task}, {budget}" for task in tasks for budget in plan.all_budgets)]
        lines = [_line(head), "|:--|" + "--:|" * (len(head) - 1)]
        for method in methods:
            label = f"*{method}*" if method in plan.references else method
            cells = [_brief(r.results.get(((task, prompt), method))) for task in tasks for r in by_budget.values()]
            lines.append(_line([label, *cells]))
        parts += ["\n".join(lines)] if methods else []
    if parts:
        parts.append(
            "At each budget: mean test score over the seeds, the worst seed's in brackets, mean dev loss, of the best "
            "point within that budget at the learning rate that is best there by the dev rows of seed "
            f"{plan.seeds[0]}; `*`: that rate is at the edge of those tried; `!` and a number: seeds that diverged."
        )
    return parts


def _brief(result: MethodResult | None) -> str:
    """A method's score at a budget."""
    if result is None or (not result.finished and not result.diverges):
        return ""
    if not result.finished:
        return "diverges"
    scale, digits = _scale(result.metric)
    scores = [scale * value for value in result.test()]
    worst = min(scores) if badness(1.0, result.metric) < 0 else max(scores)
    text = f"{mean(scores):.{digits}f} ({worst:.{digits}f}), {mean(point['loss'] for point in result.dev()):.3f}"
    text += " *" if result.at_edge else ""
    return text + (f" !{result.broken}" if result.broken else "") + (" ..." if result.pending else "")


def _overview(plan: Plan, results: Results) -> str:
    """One line a method, one column a task and prompt."""
    groups = [g for g in results.groups if results.of(g) or any((g, m) in results.untrained for m in plan.modes)]
    ranks = {prompt: results.ranks(prompt) for prompt in plan.prompts}
    order = {m: mean([ranks[p].get(m, math.inf) for p in plan.prompts]) for m in plan.runs}
    names = sorted(plan.runs, key=lambda m: (m not in plan.references, order[m]))
    head = ["method", *(f"{task}, {prompt}" for task, prompt in groups), *(f"rank, {p}" for p in plan.prompts)]
    lines = [_line(head), "|:--|" + "--:|" * (len(head) - 1)]
    for mode in (mode for mode in plan.modes if any((group, mode) in results.untrained for group in groups)):
        cells = [_untrained(results.untrained.get((group, mode))) for group in groups]
        lines.append(_line([f"*{mode}*", *cells, *[""] * len(plan.prompts)]))
    for name in names:
        label = f"*{name}*" if name in plan.references else name
        cells = [_scores(results.results.get((group, name))) for group in groups]
        lines.append(_line([label, *cells, *(_number(ranks[p].get(name, math.nan), ".1f") for p in plan.prompts)]))
    return "\n".join(lines)


def _details(plan: Plan, results: Results) -> str:
    """One line a task, prompt and method."""
    exact, first_order = "forward_gradient", "adamw"
    head = ["task", "prompt", "method", "learning rate", "queries a step", "dev loss", "queries to target"]
    head += [f"gap to {exact}", f"gap to {first_order}", "MiB", "seconds"]
    lines = [_line(head), "|:--|:--|:--|" + "--:|" * (len(head) - 3)]
    for group in results.groups:
        for result in results.of(group):
            if not result.finished:
                text = "diverges at every rate" if result.diverges else f"{result.pending} to come"
                lines.append(_line([*group, result.method, text, *[""] * 7]))
                continue
            row = result.finished[0]
            lines.append(
                _line(
                    [
                        *group,
                        result.method,
                        f"{row['learning_rate']:g}{' *' if result.at_edge else ''}",
                        str(row["queries_a_step"]),
                        _spread([point["loss"] for point in result.dev()], ".3f"),
                        _reached(result.queries_to(results.target(group))),
                        *(
                            _spread(results.gap(group, result.method, other) if other != result.method else [], "+.3f")
                            for other in (exact, first_order)
                        ),
                        f"{result.memory_mb():.0f}",
                        f"{result.seconds():.1f}",
                    ]
                )
            )
    return "\n".join(lines)


def _notes(plan: Plan, results: Results) -> str:
    """What the numbers are, and the agreement of the prompts."""
    broken = sum(result.broken for result in results.results.values())
    of_rates = sum(bool(row["failed"]) for result in results.results.values() for row in result.rates.values())
    seeds = len(plan.seeds)
    target = f"the lowest mean dev loss of {plan.baseline}" if plan.target is None else f"a dev loss of {plan.target:g}"
    rates = ", ".join(f"x {rate:g}" for rate in plan.rates) + (" and beyond" if plan.grow else "")
    sentences = [
        f"{plan.queries:,} queries a run. Test scores: mean over {seeds} seeds ± half of Student's 95 % interval, of "
        f"the checkpoint with the best dev {plan.select}, at the learning rate (of {rates}) with the best dev "
        f"{plan.select} under seed {plan.seeds[0]}; `*`: that rate is at the edge of those tried. Untrained: with "
        f"the 95 % interval over rows. Ranks: among the methods, references (in italics) apart. Queries to {target}: "
        "mean of the seeds that get there; gaps in dev loss, nats, seed by seed; MiB: what training took beside the "
        "loaded model and rows, median of the seeds; seconds: of the fastest seed."
    ]
    edge = [f"{r.method} ({', '.join(group)})" for (group, _), r in results.results.items() if r.rows and r.at_edge]
    if edge:
        sentences.append(
            f"The best rate is at the edge of those tried, so these may be better than they look: {', '.join(edge)}. "
            "Give them other learning rates, methods={NAME: RATE}, or a larger grow."
        )
    if broken or of_rates:
        sentences.append(f"Diverged: {of_rates} runs of the search for rates, {broken} runs with other seeds.")
    for first, second in zip(plan.prompts, plan.prompts[1:], strict=False):
        tau = agreement(results.ranks(first), results.ranks(second))
        if math.isfinite(tau):
            sentences.append(f"Ranks under prompt {first} and {second} agree with Kendall's tau {tau:.2f}.")
    return "\n".join(sentences)


def _scores(result: MethodResult | None) -> str:
    if result is None:
        return ""
    if not result.finished:
        return "diverges" if result.diverges else f"({result.pending} to come)"
    scale, digits = _scale(result.metric)
    text = _spread([scale * value for value in result.test()], f".{digits}f")
    text += f" ({result.broken} diverged)" if result.broken else ""
    return text + (f" ({result.pending} to come)" if result.pending else "")


def _spread(numbers: list[float], form: str) -> str:
    """Mean ± half of the interval over seeds.

    Example:
        >>> _spread([0.5], ".2f"), _spread([], ".2f")
        ('0.50', '-')
    """
    if not numbers:
        return "-"
    middle, low, high = interval(numbers)
    half = f" ± {format((high - low) / 2, form.lstrip('+'))}" if math.isfinite(high) else ""
    return f"{format(middle, form)}{half}"


def _reached(queries: list[float]) -> str:
    """The mean over the seeds that got there, and how many did where some did not.

    Example:
        >>> _reached([10.0, 30.0]), _reached([10.0, math.inf]), _reached([math.inf])
        ('20', '10 (1 of 2)', '-')
    """
    finite = [value for value in queries if math.isfinite(value)]
    if not finite:
        return "-"
    return f"{mean(finite):.0f}" + (f" ({len(finite)} of {len(queries)})" if len(finite) < len(queries) else "")


def _untrained(row: Row | None) -> str:
    if row is None:
        return ""
    metric = row["metric"]
    scale, digits = _scale(metric)
    value = row["test"][metric]
    low, high = row["test"].get(f"{metric}_low"), row["test"].get(f"{metric}_high")
    if low is None and metric == "accuracy":
        low, high = wilson(value * row["num_test"], row["num_test"])
    bounds = "" if low is None else f" [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"
    return f"{scale * value:.{digits}f}{bounds}"


def _scale(metric: str) -> tuple[float, int]:
    """(factor, digits): accuracies are told in per cent."""
    return (100.0, 1) if metric == "accuracy" else (1.0, 3)


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _csv(plan: Plan, rows: Mapping[Cell, Row]) -> str:
    """One row a cell."""
    text = io.StringIO()
    measured = sorted({name for row in rows.values() for name in row.get("diagnostics", {})})
    writer = csv.DictWriter(text, [*_COLUMNS, *measured], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for cell in sorted(rows, key=lambda cell: cell.name):
        row = rows[cell] | rows[cell].get("diagnostics", {})
        metric, test = row["metric"], row["test"] or {}
        best = None if cell.method in MODES else best_point(row, plan.select)
        if best is not None:
            row |= {"best_queries": best["queries"], "dev_loss": best["loss"], "dev_metric": best[metric]}
        writer.writerow(row | {"test_loss": test.get("loss"), "test_metric": test.get(metric)})
    return text.getvalue()
