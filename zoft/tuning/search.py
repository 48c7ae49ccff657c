"""The search: asks a study for points, has them evaluated, and says what is best."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import optuna
from optuna.trial import Trial, TrialState

from zoft.errors import UserError
from zoft.tuning.evaluation import FAILED, Evaluation, Job, TuneResult
from zoft.tuning.record import StudyRecord
from zoft.tuning.sampler import ZOSampler, known_values
from zoft.tuning.settings import TuneSettings
from zoft.tuning.space import SearchSpace, Values, as_arguments, key
from zoft.tuning.workers import Workers

_ENOUGH = 4  # points that may all fail before the search ends with an error
_MOST_KNOWN = 500  # points in a row that are known

Callback = Callable[[Evaluation, TuneResult], Any]
"""Called with every new evaluation and all of them; returning True ends the search."""


class Search:
    """A search under way.

    Which points it asks for is a function of the space, the settings and the values that came back, all of which are
    in the record: after a crash it goes on as if there had been none.

    Args:
        space: what is searched.
        settings: how.
        workers: carry out the jobs.
        record: keeps what came of them.
        x0: where to begin.
    """

    def __init__(
        self,
        space: SearchSpace,
        settings: TuneSettings,
        workers: Workers,
        record: StudyRecord,
        x0: Values | None = None,
    ) -> None:
        self.space, self.settings, self.workers, self.record = space, settings, workers, record
        self.batch: int = record.header["batch"]
        self.sampler: ZOSampler | None = None
        if settings.search == "zo":
            self.sampler = record.study.sampler = ZOSampler(space, seed=settings.seed, batch=self.batch, x0=x0)
        elif x0 and not record.study.get_trials(deepcopy=False):
            record.study.enqueue_trial(x0)
        self.by_key = {key(evaluation.values): evaluation for evaluation in record.ended()}
        self.result = TuneResult(space.texts(), settings.direction, settings.repeats, list(self.by_key.values()))
        self.result.num_resumed = len(self.by_key)

    def run(self, callback: Callback | None = None) -> TuneResult:
        """To the end of the budget, or of the space.

        Args:
            callback: see :data:`Callback`.

        Returns:
            Everything that was evaluated.

        Raises:
            UserError: none of the first points could be evaluated.
        """
        trials = self.record.unfinished()
        while True:
            room = self.settings.budget // self.settings.repeats - len(self.by_key)
            is_exhausted = False
            if not trials and room > 0:
                trials = self._ask(room)
                is_exhausted = not trials
            ended = self._evaluate(trials[: max(0, room)], callback)
            self.result.message = self._message(room - len(trials), ended, is_exhausted)
            if self.result.message:
                return self.result
            trials = []

    def _message(self, room: int, ended: bool, is_exhausted: bool) -> str:
        evaluations = f"{self.result.num_evaluations} evaluations"
        if ended:
            return f"Ended by the callback after {evaluations}."
        if len(self.by_key) >= self.space.count or is_exhausted:
            return f"Every point that the search asks for is known, after {evaluations}."
        if room < 1:
            return f"The budget of {self.settings.budget} evaluations is spent."
        if len(self.by_key) >= min(_ENOUGH, room) and all(e.status == FAILED for e in self.by_key.values()):
            first = self.result.evaluations[0]
            raise UserError(
                f"the first {len(self.by_key)} points all failed, the first at {as_arguments(first.values)}: "
                f"{first.error}"
            )
        return ""

    # ---- Which points ------------------------------------------------------------------------------------------------

    def _ask(self, room: int) -> list[Trial]:
        """Trials of new points, as many as go side by side; none where only known ones are proposed."""
        study = self.record.study
        if self.sampler is not None:
            count = len(self.sampler.points(known_values(study, self.space))[:room])
            return [study.ask(self.space.distributions) for _ in range(count)]
        names, trials = set(self.by_key), list[Any]()
        for _ in range(_MOST_KNOWN):
            study.sampler = self._sampler(len(study.get_trials(deepcopy=False)))
            trial = study.ask(self.space.distributions)
            name = key(self.record.values(trial))
            if name not in names:
                names.add(name)
                trials.append(trial)
                if len(trials) == min(self.batch, room):
                    break
            else:  # it costs nothing, and the sampler hears its value once more
                self.record.leave_out(trial.number)
                twin = self.by_key.get(name)
                if twin is None or not math.isfinite(twin.value):
                    study.tell(trial, state=TrialState.FAIL)
                else:
                    study.tell(trial, twin.value)
        return trials

    def _sampler(self, number: int) -> Any:
        """One of Optuna's, seeded anew for each trial: so an interruption changes nothing."""
        samplers = optuna.samplers
        seed = (self.settings.seed * 1_000_003 + number) % 2**32
        return samplers.RandomSampler(seed) if self.settings.search == "random" else samplers.TPESampler(seed=seed)

    # ---- What comes of them ------------------------------------------------------------------------------------------

    def _evaluate(self, trials: list[Trial], callback: Callback | None) -> bool:
        """Have trials evaluated, those repeats that have not ended yet; True if the callback ends the search."""
        of_job, jobs = [], []
        for trial in trials:
            for repeat in range(self.settings.repeats):
                if repeat not in self.record.outcomes(trial):
                    of_job.append(trial)
                    jobs.append(Job(trial.number, repeat, self.record.values(trial), trial._trial_id))
        ended = False
        for index, outcome in self.workers.run(jobs):
            trial = of_job[index]
            self.record.note(trial, jobs[index].repeat, outcome)
            if len(self.record.outcomes(trial)) == self.settings.repeats:
                ended = self._take(trial, callback) or ended
        self.result.evaluations.sort(key=lambda e: e.number)
        return ended

    def _take(self, trial: Trial, callback: Callback | None) -> bool:
        evaluation = self.record.end(trial)
        self.by_key[key(evaluation.values)] = evaluation
        self.result.evaluations.append(evaluation)
        return bool(callback(evaluation, self.result)) if callback is not None else False
