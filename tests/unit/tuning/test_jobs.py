"""A search over training jobs: what a job is, what is read of it, what is stopped at half, what is left on the disk."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import runs
from zoft.config import compose
from zoft.errors import UserError
from zoft.tuning.evaluation import Job
from zoft.tuning.job import Training
from zoft.tuning.jobs import tune_training
from zoft.tuning.record import StudyRecord
from zoft.tuning.settings import TuneSettings, record_at
from zoft.tuning.space import SearchSpace

BASE = ["model.name=none", "method=mezo", "task=sms_spam", "budget.queries=24", "optimizer.learning_rate=1e-2"]
SPACE = {"optimizer.learning_rate": "log(1e-4,1)", "estimator.num_directions": "int(1,4)"}


class FakeRun:
    """Takes the place of zoft.run.train.run: a loss of the learning rate alone, logged as a run would."""

    def __init__(self, steps=10, logged=("eval_loss",)):
        self.steps, self.logged, self.seen, self.stopped = steps, logged, [], 0

    def __call__(self, cfg, callbacks=()):
        self.seen.append(cfg)
        rate = cfg.optimizer.learning_rate
        if rate > 0.3:
            raise FloatingPointError("the loss is not finite")
        loss = (math.log10(rate) + 2.5) ** 2 + 0.01 * cfg.seed
        folder = Path(cfg.output_dir)
        (folder / "model").mkdir(parents=True)
        (folder / "checkpoint-3").mkdir()
        state = SimpleNamespace(max_steps=self.steps, global_step=0)
        for callback in callbacks:
            callback.on_train_begin(None, state, None)
        for step in range(1, self.steps + 1):
            control = SimpleNamespace(should_evaluate=False, should_log=False)
            state.global_step = step
            for callback in callbacks:
                callback.on_step_end(None, state, control)
            if control.should_evaluate:
                row = dict.fromkeys(self.logged, loss + (1 if step < self.steps else 0))
                with (folder / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps({"step": step, **row}) + "\n")
                for callback in callbacks:
                    try:
                        callback.on_log(None, state, control, logs=row)
                    except Exception:
                        self.stopped += 1
                        raise
        return {}


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr("zoft.tuning.job.gc.collect", lambda: None)  # 0.3 s each in a process this full
    fake_run = FakeRun()
    monkeypatch.setattr("zoft.run.train.run", fake_run)
    return fake_run


def tuned(folder, fake=None, *, space=None, metric="eval_loss", arguments=BASE, **settings):
    given = TuneSettings(**{"budget": 10, **settings})
    return tune_training(list(arguments), space or SPACE, given, metric=metric, output_dir=str(folder), isolated=False)


def test_a_search_of_training_jobs(tmp_path, fake):
    folder = tmp_path / "t"
    search = tuned(folder, stop_early=True)
    result = search.result
    assert len(fake.seen) == 10 == result.num_evaluations
    assert fake.seen[0].optimizer.learning_rate == 0.01  # the config's own value is where it begins
    assert [cfg.output_dir for cfg in fake.seen[:2]] == [str(folder / "0000"), str(folder / "0001")]
    assert result.fun == min(e.value for e in result.ranked) < 0.2
    assert result.failed[0].error == "FloatingPointError: the loss is not finite"
    assert len(result.stopped) == fake.stopped > 0
    assert all(e.outcomes[0].half == e.value for e in result.stopped)
    assert all(e.outcomes[0].half == pytest.approx(e.value + 1) for e in result.ranked)
    names = sorted(path.parent.name for path in folder.glob("*/model"))
    assert names == [Path(search.best_folder).name] == [f"{result.best.number:04d}"]
    data = json.loads((folder / "results.json").read_text())
    assert data["best"]["point"] == result.x
    assert data["num_failed"] == len(result.failed)
    assert (folder / "tune.png").stat().st_size > 5000
    words = shlex.split(data["command"])
    assert words[:2] == ["zoft", "train"]
    again = compose(words[2:])
    assert again.optimizer.learning_rate == result.x["optimizer.learning_rate"]
    assert again.output_dir == f"{folder}-best"
    tuned(folder, stop_early=True)
    assert len(fake.seen) == 10  # all of it is in the journal


def test_a_search_does_not_go_on_with_other_rows(tmp_path, fake):
    rows, config = tmp_path / "rows.jsonl", tmp_path / "mine.yaml"
    rows.write_text('{"text": "x", "label": "a"}\n')
    config.write_text("seed: 3\n")
    words = [f"config={config}", f"task.train={rows}"]
    words += ["task=custom", "task.template='{text} is'", "task.words={a: b, c: d}"]
    words += ["model.name=none", "method=mezo", "budget.queries=24", "optimizer.learning_rate=1e-2"]
    tuned(tmp_path / "t", arguments=words)
    tuned(tmp_path / "t", arguments=words, budget=11)
    for file, text in ((rows, '{"text": "x", "label": "c"}\n'), (config, "seed: 3\n# edited\n")):
        before = file.read_text()
        file.write_text(text)
        with pytest.raises(UserError, match=r"is the journal of another search: its data is .*SHA-256"):
            tuned(tmp_path / "t", arguments=words, budget=12)
        file.write_text(before)


def test_repeats_are_seeds_and_accuracy_goes_up(tmp_path, monkeypatch):
    fake = FakeRun(logged=("eval_accuracy", "eval_loss"))
    monkeypatch.setattr("zoft.run.train.run", fake)
    narrow = {"optimizer.learning_rate": "log(1e-4,1e-1)"}
    search = tuned(
        tmp_path / "t", space=narrow, metric="eval_accuracy", direction="maximize", budget=8, repeats=2, stop_early=True
    )
    assert [cfg.seed for cfg in fake.seen[:4]] == [0, 1, 0, 1]
    assert fake.seen[1].output_dir.endswith("0000-1")
    assert search.result.fun == max(e.value for e in search.result.ranked) > 1.5
    assert search.result.best.spread == pytest.approx(0.005)


def test_a_metric_that_is_never_logged_ends_it_at_once(tmp_path, fake):
    with pytest.raises(UserError, match=r"eval_accuracy is never logged by this job, which logs eval_loss"):
        tuned(tmp_path / "t", metric="eval_accuracy")
    assert len(fake.seen) == 1


@pytest.mark.parametrize(
    ("space", "given", "words"),
    [
        ({"optimizer.learning_rat": "log(1e-4,1)"}, {}, "Did you mean learning_rate"),
        ({"eps": "log(1e-4,1)"}, {}, "Did you mean estimator.eps"),
        ({"estimator.num_directions": "uniform(1,4)"}, {}, "must be a whole number"),
        ({"estimator.num_directions": "int(0,4)"}, {}, "at 0: "),
        ({"trainer.lr_scheduler": "choice(linear,constant)"}, {}, "Did you mean trainer.lr_scheduler_type"),
        ({"optimizer": "choice(sgd,adamm)"}, {}, "Did you mean adam"),
        ({"seed": "int(1,4)"}, {}, "repeats=N"),
        (SPACE, {"metric": "eval_los"}, "Did you mean eval_loss"),
        (SPACE, {"arguments": [*BASE, "optimizer=none"]}, "no optimizer called 'none'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(tmp_path, fake, space, given, words):
    with pytest.raises(UserError) as caught:
        tuned(tmp_path / "t", space=space, **given)
    assert words in str(caught.value)
    assert not fake.seen
    assert not (tmp_path / "t").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path, fake):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds no search"):
        tuned(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_real_job_and_one_that_is_stopped_at_half(tmp_path):
    output_dir, *others = reversed(runs.arguments(tmp_path, tmp_path / "none", "trainer.eval_steps=100"))
    del output_dir
    arguments = [argument for argument in reversed(others) if not argument.startswith("output_dir")]
    work = Training([*arguments, "trainer.eval_steps=100"], str(tmp_path / "t"), "eval_loss")
    done = work(Job(0, 0, {"optimizer.learning_rate": 1e-3}))
    assert done.status == "done"
    assert done.value != done.half
    assert (tmp_path / "t" / "0000" / "model").is_dir()
    again = work(Job(0, 0, {"optimizer.learning_rate": 1e-3}))  # a search that was killed before it noted it
    assert (again.value, again.half) == (done.value, done.half)
    space = SearchSpace({"optimizer.learning_rate": "log(1e-4,1)"})
    record = StudyRecord(record_at(tmp_path / "t"), {"direction": "minimize"}, space)
    for _ in range(4):  # others, each a little better at half
        trial = record.study.ask(space.distributions)
        trial.report(done.half - 0.01, step=0)
        record.study.tell(trial, done.value)
    trial = record.study.ask(space.distributions)
    work.record = str(record.path)
    stopped = work(Job(1, 0, {"optimizer.learning_rate": 1e-3}, trial._trial_id))
    record.close()
    assert stopped.status == "stopped"
    assert stopped.value == stopped.half == done.half
    assert not (tmp_path / "t" / "0001" / "report.json").exists()
    assert "queries" in (tmp_path / "t" / "0001.log").read_text()
    failed = work(Job(2, 0, {"trainer.per_device_train_batch_size": 0}))
    assert failed.status == "failed"
