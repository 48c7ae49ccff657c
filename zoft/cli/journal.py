"""`zoft journal`: what a run's journal says, step by step (`show`); the journals of several runs as one (`merge`)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.errors import UserError, did_you_mean
from zoft.utils.terminal import fitted
from zoft.utils.words import folder_of, read_words

if TYPE_CHECKING:
    from zoft.journal.file import Contents
    from zoft.journal.records import Record

_SHOWN = 20  # rows at either end


def command(arguments: list[str]) -> int:
    """Show a journal as a table, or as one JSON object a line; or merge several."""
    if arguments[:1] == ["merge"]:
        return _merge(arguments[1:])
    flags = {word for word in arguments if word.startswith("-")}
    words = [word for word in arguments if word not in flags]
    for flag in sorted(flags - {"--json", "--all"}):
        raise UserError(f"zoft journal show knows no {flag}.{did_you_mean(flag, ['--json', '--all'])}")
    if words[:1] != ["show"] or len(words) != 2:
        raise UserError(
            "say which run: zoft journal show RUN [--json] [--all], or zoft journal merge RUN RUN... --output DIR"
        )
    from zoft.journal import file as journal

    path = journal_of(folder_of(words[1]))
    contents = journal.read(path)
    if "--json" in flags:
        print(json.dumps({"header": contents.header, "steps": contents.end, "damaged_bytes": contents.damaged}))
        for record in contents.records:
            print(json.dumps(as_row(record)))
        return 0
    print(fitted("\n".join(line.rstrip() for line in _lines(path, contents, everything="--all" in flags))))
    return 0


def _merge(arguments: list[str]) -> int:
    from zoft.run.merge import merge_runs

    words = read_words("journal", arguments, flags=["--fold"], options=["--output", "--as"])
    if "--output" not in words.options:
        raise UserError("say where to: zoft journal merge RUN RUN... --output DIR")
    for run in words.rest:
        if journal_of(run).parent != Path(run):
            raise UserError(f"{run} is a file: give the run's folder, whose config says what the journal is of")
    output, how = Path(words.options["--output"]), words.options.get("--as", "mean")
    print("\n".join(merge_runs([Path(run) for run in words.rest], output, how, fold="--fold" in words.flags)))
    return 0


def journal_of(run: str) -> Path:
    """The journal file of a run's folder, or the file itself."""
    from zoft.journal import file as journal

    path = Path(run)
    path = path / journal.NAME if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"{run} holds no {journal.NAME}: give the folder of a run that was made with trainer.journal=true"
        )
    return path


def as_row(record: Record) -> dict[str, Any]:
    """A step as plain values; what a sealed journal has left out is null."""
    finite = {"loss": record.loss, "slope": record.slope}
    return {
        "step": record.step,
        "seed": record.seed,
        "learning_rate": record.lr,
        "eps": record.eps,
        "queries": record.queries,
        "tokens": record.tokens or None,
        **{name: value if math.isfinite(value) else None for name, value in finite.items()},
        "coefficients": list(record.coefficients),
        "curvatures": list(record.curvatures),
        "skipped": record.skipped,
        "backward_pass": record.computed,
        **record.extra,
    }


def _lines(path: Path, contents: Contents, *, everything: bool) -> list[str]:
    header, records = contents.header, contents.records
    settings = header.get("settings", {})
    method = ", ".join(
        f"{part}={settings[part]}" for part in ("subspace", "estimator", "weighting", "optimizer") if part in settings
    )
    lines = [
        f"{path}: {path.stat().st_size:,} bytes, steps {header['first']:,} to {contents.end:,}, "
        f"seed {settings.get('seed')}",
        f"model   {header.get('model')}, first weights {str(header.get('weights'))[:16]}",
        f"method  {method}",
        f"also    {len(contents.digests)} hashes of the weights, {sum(map(len, contents.evaluations.values()))} "
        f"evaluations, {len(contents.observations)} observations of activations or gradients, "
        f"{len(contents.notes)} returns",
    ]
    if contents.damaged:
        lines.append(f"damaged {contents.damaged:,} bytes at the end are no whole records, and are not read")
    if not records:
        return [*lines, "no steps yet"]
    lines.append(f"{'step':>8} {'queries':>9} {'loss':>9} {'slope':>10} {'lr':>9} {'eps':>9}  coefficients")
    few = records if everything or len(records) <= 2 * _SHOWN else [*records[:_SHOWN], None, *records[-_SHOWN:]]
    return [*lines, *(f"{'...':>8}" if record is None else _line(record) for record in few)]


def _line(record: Record) -> str:
    loss, slope = (f"{x:.4f}" if math.isfinite(x) else "-" for x in (record.loss, record.slope))
    text = " ".join(f"{c:.4g}" for c in record.coefficients[:4]) + (" ..." if len(record.coefficients) > 4 else "")
    if record.skipped:
        text = "skipped: a loss was not finite"
    if record.computed:
        text += " and a gradient"
    return f"{record.step:>8} {record.queries:>9} {loss:>9} {slope:>10} {record.lr:>9.3g} {record.eps:>9.3g}  {text}"
