"""The record of a search: an Optuna study in memory or in a file that a killed search goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from zoft.errors import DiskFullError, UserError
from zoft.tuning.evaluation import FAILED, STOPPED, Evaluation, JobOutcome
from zoft.tuning.sampler import UNCOUNTED
from zoft.tuning.space import SearchSpace, Values
from zoft.utils import shared
from zoft.utils.rows import drop_cut_line

_STUDY = "zoft"
_ENOUGH = 4  # points that must have gone to their end before any is compared with their median
_OUTCOMES = "outcomes"  # of a trial: what came of each repeat so far


class StudyRecord:
    """What is searched, and every evaluation; on the disk (one line each) before the next one.

    A last line that a crash has cut off is dropped. Points that failed at the very end, after which nothing else
    succeeded, are asked again: what made them fail may be mended.

    Args:
        path: the file, which Optuna's JournalStorage keeps; its folder is made. None keeps it in memory.
        header: what must be the same for a search to go on: space, metric, seed, ...
        space: what is searched.

    Raises:
        UserError: the file is that of another search, in use by another process, or none.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any], space: SearchSpace) -> None:
        self.path, self.space, self._lock = path, space, -1
        self.header = json.loads(json.dumps(header))  # as it reads back
        storage: BaseStorage = InMemoryStorage()
        if path is not None:
            self._open(path)
            storage = JournalStorage(_File(str(path)))
        try:
            self.study = self._study(storage)
            self.uncounted: set[int] = set(self.study.user_attrs.get(UNCOUNTED, []))
            ended = [t for t in self._counted() if t.state.is_finished()]
            while ended and ended[-1].state == TrialState.FAIL:
                self.leave_out(ended.pop().number)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        """Take the file for this process, and see that it is the record of a search."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = shared.no_link(str(path), os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): choose another folder") from None
        try:
            if not shared.lock(self._lock):
                raise UserError(f"{path} is in use by another search: wait until it ends, or choose another folder")
            with shared.open_own(path, "r+b") as file:
                lines = drop_cut_line(file)
            for number, line in enumerate(lines, 1):
                _check_line(path, number, line)
        except BaseException:
            self.close()
            raise

    def _study(self, storage: BaseStorage) -> optuna.Study:
        """The study in the storage if it is that of this search; a new one where there is none."""
        try:
            study = optuna.load_study(study_name=_STUDY, storage=storage)
        except KeyError:
            study = optuna.create_study(study_name=_STUDY, storage=storage, direction=self.header["direction"])
            study.set_user_attr("search", self.header)
        self._compare(study.user_attrs["search"])
        return study

    def _compare(self, before: Mapping[str, Any]) -> None:
        # batch: how many points were asked for side by side; a search goes on with what it began with
        self.header["batch"] = before.get("batch", self.header.get("batch"))
        # data: earlier records have none
        for name in sorted({*before, *self.header} - ({"data"} - before.keys())):
            if before.get(name) != self.header.get(name):
                raise UserError(
                    f"{self.path} is the journal of another search: its {name} is {_as_text(before.get(name))}, and "
                    f"now it is {_as_text(self.header.get(name))}; choose another folder, or repeat that search's "
                    "command to go on with it"
                )

    # ---- Trials and evaluations --------------------------------------------------------------------------------------

    def _counted(self) -> list[FrozenTrial]:
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.number not in self.uncounted]

    def ended(self) -> list[Evaluation]:
        """Every evaluation that has ended, in the order of the search."""
        return [self._evaluation(trial) for trial in self._counted() if trial.state.is_finished()]

    def unfinished(self) -> list[Trial]:
        """Trials that a killed search was at."""
        running = [trial for trial in self._counted() if trial.state == TrialState.RUNNING]
        return [Trial(self.study, trial._trial_id) for trial in running]  # Optuna has no public way back to a trial

    def leave_out(self, number: int) -> None:
        """Count a trial no longer."""
        self.uncounted.add(number)
        self.study.set_user_attr(UNCOUNTED, sorted(self.uncounted))

    def values(self, trial: Trial | FrozenTrial) -> Values:
        """The point that is evaluated for a trial."""
        return self.space.rounded(trial.params)

    def outcomes(self, trial: Trial | FrozenTrial) -> dict[int, JobOutcome]:
        """Repeat -> what came of it, of those that have ended."""
        return {int(repeat): JobOutcome.of(row) for repeat, row in trial.user_attrs.get(_OUTCOMES, {}).items()}

    def _evaluation(self, trial: Trial | FrozenTrial) -> Evaluation:
        outcomes = self.outcomes(trial)
        return Evaluation(trial.number, self.values(trial), [outcomes[repeat] for repeat in sorted(outcomes)])

    def note(self, trial: Trial, repeat: int, outcome: JobOutcome) -> None:
        """Keep what came of one repeat."""
        outcomes = self.outcomes(trial) | {repeat: outcome}
        trial.set_user_attr(_OUTCOMES, {str(number): one.as_dict() for number, one in outcomes.items()})

    def end(self, trial: Trial) -> Evaluation:
        """Tell the study what came of a trial, all of whose repeats have ended."""
        evaluation = self._evaluation(trial)
        if evaluation.status == FAILED:
            self.study.tell(trial, state=TrialState.FAIL)
        elif evaluation.status == STOPPED:
            trial.report(evaluation.value, step=len(evaluation.outcomes))  # a pruned trial's value is its last report
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            self.study.tell(trial, evaluation.value)
        return evaluation

    def close(self) -> None:
        """Let go of the file and its lock."""
        if self._lock >= 0:
            shared.close(self._lock)
            self._lock = -1


class Halfway:
    """What a job says of its metric at half, and whether it shall stop there: Optuna's median pruner.

    Args:
        path: of the search's record.
        trial_id: the storage's number of the trial.
        repeat: of the point; each is compared with the same repeat of the others.
    """

    def __init__(self, path: str, trial_id: int, repeat: int) -> None:
        pruner = optuna.pruners.MedianPruner(n_startup_trials=_ENOUGH, n_min_trials=_ENOUGH)
        study = optuna.load_study(study_name=_STUDY, storage=JournalStorage(_File(path)), pruner=pruner)
        self.trial, self.repeat = Trial(study, trial_id), repeat

    def is_bad(self, value: float) -> bool:
        """Keep the metric at half; True where it is worse than the median of the others."""
        self.trial.report(value, step=self.repeat)
        return bool(self.trial.should_prune())


class _File(JournalFileBackend):
    """Optuna's file, with a full disk said in a sentence."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        try:
            super().append_logs(logs)
        except OSError as error:
            raise DiskFullError.of(error, Path(self._file_path), len(json.dumps(logs))) from error


def _check_line(path: Path, number: int, line: bytes) -> None:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if isinstance(row, dict) and "journal" in row:
        raise UserError(f"{path} is the journal of a search by an older zoft: choose another folder")
    if not isinstance(row, dict) or "op_code" not in row:
        raise UserError(f"{path} is not the journal of a search (line {number}): choose another folder")


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={text}" for name, text in value.items())
    return " ".join(value) if isinstance(value, list) and value else str(value)
