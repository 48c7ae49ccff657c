"""Sweeps (`-m`): cells are expanded and checked first, then run by Hydra's launcher, each in a folder of its own."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from zoft.config import own, texts
from zoft.config.foldername import named_after, suffix
from zoft.config.loader import DEFAULT_DIR, PRIMARY, Loader, to_config
from zoft.config.schema import ZoftConfig
from zoft.errors import IgnoredError, Requeued, UserError, of_recorded


@dataclass
class CellResult:
    """What became of one cell.

    Args:
        name: the swept keys and their values; also its folder's name.
        output_dir: its folder.
        metrics: what ``zoft.run.train.run`` returned.
        error: why it failed, or None.
        user_error: whether that is something the user can mend (exit code 2 rather than 1).
    """

    name: str
    output_dir: str
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    user_error: bool = False


@dataclass
class RunCell:
    """What a launcher calls, here or in another process; failures are returned, so that the rest runs.

    Args:
        run: trains; an importable function, so that it can travel to another process.
        idle: names of cells in which a setting does nothing that counts in others.
    """

    run: Callable[[ZoftConfig], dict[str, Any] | None]
    idle: frozenset[str] = frozenset()

    def __call__(self, cfg: DictConfig) -> CellResult:
        """Run one cell."""
        output_dir = str(cfg.output_dir)
        result = CellResult(os.path.basename(output_dir), output_dir)
        try:
            with of_recorded(result.name in self.idle):
                result.metrics = dict(self.run(to_config(cfg)) or {})
        except Requeued:
            _requeue()  # in a job of submitit; elsewhere the whole sweep ends, and the same command goes on
            raise
        except Exception as error:  # an error of any kind ends this cell, and no other
            if os.environ.get("ZOFT_TRACEBACK"):
                raise
            result.error = " ".join(str(error).split()) or type(error).__name__
            result.user_error = isinstance(error, UserError)
            if not result.user_error:
                result.error = f"{type(error).__name__}: {result.error}"
        finally:
            gc.collect()  # a trainer and its model refer to each other: without this the next cell has both in memory
        return result


def multirun(overrides: list[str], run: Callable[[ZoftConfig], dict[str, Any] | None]) -> list[CellResult]:
    """Run every combination of the values that arguments list.

    Args:
        overrides: arguments, some of them with several values: ``seed=0,1,2``, ``optimizer.learning_rate=1e-6,1e-5``.
        run: trains one cell; importable, and what it returns can be pickled.

    Returns:
        One result a cell, in the order of the cells.

    Raises:
        UserError: any cell that could not be composed, before the first one starts and before anything is written.
    """
    loader = Loader()
    loader.sweeping = True
    own.register_named(overrides)
    overrides = [texts.argument(override) for override in overrides]
    cells = expand(loader, overrides)
    base, idle = _base(loader, list(cells))
    loader.cells = cells
    master = loader.load_configuration(PRIMARY, list(next(iter(cells))), RunMode.RUN)
    master.hydra.sweep.dir = master.output_dir = base
    with open_dict(master.hydra):
        for key in ("help", "hydra_help", "job_logging"):  # of no interest in multirun.yaml
            del master.hydra[key]
    sweeper = Plugins.instance().instantiate_sweeper(
        config=master,
        hydra_context=HydraContext(config_loader=loader, callbacks=Callbacks(master)),
        task_function=RunCell(run, frozenset(cells[cell] for cell in idle)),
    )
    sweeper.validate_batch_is_legal = lambda batch: None  # done: see _base
    arguments = [argument.input_line for argument in loader.parse(overrides)]
    try:
        with _lost_jobs_are_results():
            results = [job.return_value for batch in sweeper.sweep(arguments=arguments) for job in batch]
    except Exception as error:  # a launcher that has lost a process gives no results at all: the folders have them
        if os.environ.get("ZOFT_TRACEBACK"):
            raise
        if not any(os.path.isdir(os.path.join(base, name)) for name in cells.values()):
            raise UserError(f"the launcher did not start a single cell: {' '.join(str(error).split())}") from error
        results = [_Lost(f"{type(error).__name__}: {error}")] * len(cells)
    places = [(name, os.path.join(base, name)) for name in cells.values()]
    return [
        one if isinstance(one, CellResult) else _of_folder(*place, one.why)
        for one, place in zip(results, places, strict=True)
    ]


class _Lost:
    """What stands in the place of a cell's result where its process ended without one."""

    def __init__(self, why: str) -> None:
        self.why = " ".join(why.split())[:300]

    @property
    def return_value(self) -> _Lost:
        """As of Hydra's own results."""
        return self


def _of_folder(name: str, output_dir: str, why: str) -> CellResult:
    """A cell's result from its folder, where it is finished; else the reason why there is none."""
    from zoft.report.results import finished

    facts = finished(Path(output_dir))
    if facts is not None:
        return CellResult(name, output_dir, facts)
    return CellResult(name, output_dir, error=f"its process ended without a result ({why}); the same command goes on")


def _requeue() -> None:
    """Have submitit put this process's job back into the queue, as at the end of its time; elsewhere nothing."""
    if "SUBMITIT_FOLDER" not in os.environ:
        return
    import submitit

    os.kill(os.getpid(), submitit.JobEnvironment()._usr_sig())


@contextmanager
def _lost_jobs_are_results() -> Iterator[None]:
    """A job of submitit whose process died is a result like the others, which are waited for."""
    try:
        from submitit.core.core import Job
    except ImportError:
        yield
        return
    wait = Job.results

    def results(job: Any) -> Any:
        try:
            return wait(job)
        except Exception:  # UncompletedJobError, FailedJobError: what they say is a traceback, which the log has
            return [_Lost(f"job {job.job_id}, log {job.paths.stderr}")]

    # Hydra's launcher asks one job after the other, and the first that has died would take the others' results along
    Job.results = results  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Job.results = wait  # type: ignore[method-assign]


def expand(loader: Loader, overrides: list[str]) -> dict[tuple[str, ...], str]:
    """The cells of a sweep: arguments of each -> its name.

    Raises:
        UserError: a cell that would be run twice, or a sweep without an end.
    """
    parsed = loader.parse(overrides)
    swept = sorted(o.get_key_element() for o in parsed if o.is_sweep_override())
    if "output_dir" in swept:
        raise UserError("output_dir cannot be swept: every cell gets a folder of its own in it")
    try:
        cells = list(itertools.chain.from_iterable(BasicSweeper.split_arguments(parsed, None)))
    except HydraException as error:
        raise UserError(f"this sweep lists no values ({error}): use key=a,b or key=range(start,stop,step)") from error
    named: dict[tuple[str, ...], str] = {}
    names = [named_after(cell, swept) for cell in cells]
    for cell, name in zip(cells, names, strict=True):
        folder = name if names.count(name) == 1 else named_after(cell, swept, exactly=True)
        if folder in named.values():
            raise UserError(f"the sweep has the cell {name or 'without values'} twice: drop the repeated value")
        named[tuple(cell)] = folder
    return named


def _base(loader: Loader, cells: list[tuple[str, ...]]) -> tuple[str, list[tuple[str, ...]]]:
    """The sweep's folder; composing every cell on the way, so that a mistake in the last one is found now.

    With the cells in which a setting does nothing: one that counts in others is no mistake of the sweep.
    """
    folders, configs = set(), set()
    idle: list[tuple[str, ...]] = []
    same = set.intersection(*map(set, cells))

    def composed(cell: tuple[str, ...]) -> tuple[DictConfig, ZoftConfig]:
        cfg = loader.load(list(cell))
        return cfg, to_config(cfg)

    for cell in cells:
        try:
            try:
                cfg, resolved = composed(cell)
            except IgnoredError:
                idle.append(cell)
                with of_recorded(len(idle) < len(cells)):  # in the last of them that all ignore it: refused
                    cfg, resolved = composed(cell)
            if loader.chosen:
                loader.note(loader.chosen)
        except UserError as error:
            arguments = [argument for argument in cell if argument not in same]
            raise UserError(f"{error} (in the cell {' '.join(arguments)})" if arguments else str(error)) from error
        written = OmegaConf.to_container(cfg, resolve=False)
        assert isinstance(written, dict)
        configs.add(resolved.config)
        folders.add(None if written["output_dir"] == DEFAULT_DIR and len(cells) > 1 else resolved.output_dir)
    if len(folders) > 1:
        raise UserError("the cells of this sweep name different output_dirs: give one folder for all, output_dir=...")
    folder = folders.pop()
    if folder:
        return folder, idle
    shared = suffix(sorted(same))  # what all cells have in common tells sweeps apart
    return (f"runs/{configs.pop()}-sweep" if len(configs) == 1 else "runs/sweep") + shared, idle
