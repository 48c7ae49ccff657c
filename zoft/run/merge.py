"""`zoft journal merge`: the journals of several runs into a folder that `zoft replay` takes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from zoft.errors import UserError
from zoft.journal import file as files
from zoft.journal.file import Journal
from zoft.journal.merge import merge
from zoft.utils.files import write_atomically


def merge_runs(runs: Sequence[Path], output: Path, how: str, *, fold: bool = False) -> list[str]:
    """Write the merged journal and the first run's config; what was written, in lines.

    Args:
        runs: folders with a journal each, and a config in the first.
        output: a new folder.
        how: mean or sum.
        fold: as few steps as hold all coefficients.

    Raises:
        UserError: they cannot be merged, or the folder is not empty.
    """
    from zoft.config import compose
    from zoft.run import folder
    from zoft.step.directions import StepDirections

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} is not empty: give a new folder")
    config = Path(folder.config_of(str(runs[0])))
    paths = [run / files.NAME for run in runs]
    cfg = compose([f"config={config}"], runs_code=False)
    directions = StepDirections(cfg.composition.estimator, cfg.seed)
    read = [(str(path), files.read(path)) for path in paths]
    header, records = merge(read, how, lambda step: directions.at(step)[0].seed, fold=fold)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / folder.CONFIG, config.read_text())
    with closing(Journal.create(output / files.NAME, header)) as journal:
        for record in records:
            journal.append(record)
        journal.seal()
    size, before = (output / files.NAME).stat().st_size, sum(path.stat().st_size for path in paths)
    count = sum(len(record.coefficients) for record in records)
    known = sum(len(record.coefficients) for _, contents in read for record in contents.records)
    return [
        f"{output / files.NAME}: {size:,} bytes, the {how} of {len(runs)} runs of {before:,} bytes",
        f"steps   {len(records):,}, with {count:,} coefficients of the {known:,} that the runs have",
        f"next    zoft replay {output} --output MODEL",
    ]
