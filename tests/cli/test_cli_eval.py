"""`zoft eval`: a run's final model scores as reported, every mode writes its predictions, wrong pairs are refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs import WORDS, arguments, model_folder, tiny_tokenizer
from tests.serving import serving
from tests.unit.run.test_formats import folder, words  # noqa: F401  # a fixture
from zoft.cli import main
from zoft.config import compose
from zoft.lm.models.load import load_model
from zoft.lm.models.peft.lora import Lora
from zoft.run.train import run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("finished")
    return root, run(compose(arguments(root, root / "out", "peft=lora", "optimizer.learning_rate=1")))


def evaluated(capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    assert main(["eval", *more, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_a_runs_model_scores_as_its_report_says(finished, capsys):
    root, facts = finished
    report = evaluated(capsys, f"run={root / 'out'}")
    assert report["accuracy"] == facts["final"]
    assert report["output_dir"] == str(root / "out" / "eval-trained-test")
    rows = [json.loads(line) for line in (Path(report["output_dir"]) / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == report["num_rows"] == 16
    assert sum(row["right"] for row in rows) / 16 == report["accuracy"]
    assert all(row["options"] == [" no", " yes"] and len(row["scores"]) == 2 and row["prompt"] for row in rows)
    assert json.loads((Path(report["output_dir"]) / "evaluation.json").read_text()) == report
    before = evaluated(capsys, *arguments(root, root / "before"), "peft=lora")
    assert before["accuracy"] == facts["zero_shot"]
    assert before["output_dir"] == str(root / "before")
    assert (
        run(compose(arguments(root, root / "out", "peft=lora", "optimizer.learning_rate=1")))["final"] == facts["final"]
    )


def test_every_mode(finished, capsys, tmp_path):
    root, _ = finished
    given = arguments(root, tmp_path / "out")
    reports = {mode: evaluated(capsys, *given, f"mode={mode}") for mode in ("calibrated", "linear_probe")}
    reports["icl"] = evaluated(capsys, *given, "mode=icl", "k=3", "task.max_length=60")
    assert {report["metric"] for report in reports.values()} == {"accuracy"}
    assert reports["linear_probe"]["accuracy"] > 0.7  # spam has other words
    assert reports["icl"]["num_demonstrations"] == 3
    (row, *_) = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(row["scores"]) == 2


@pytest.mark.parametrize(
    ("task", "model", "more", "metrics"),
    [
        ("squad", "causal", ["task.max_new_tokens=3", "mode=icl", "k=1"], {"f1", "exact_match", "f1_low"}),
        ("pairs", "causal", [], {"accuracy"}),
        ("rated", "causal", ["objective=reward", "objective.function=zoft.lm.rewards:countdown"], {"reward"}),
    ],
)
def test_every_form(folder, capsys, tmp_path, task, model, more, metrics):  # noqa: F811
    report = evaluated(capsys, *words(folder, task, model), *more, f"output_dir={tmp_path}")
    assert metrics <= report.keys()
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == report["num_rows"] == 2


def test_metrics_of_the_evaluate_library_need_no_network(finished, capsys, tmp_path, monkeypatch):
    root, _ = finished
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "share.py").write_text(
        "import datasets\nimport evaluate\n"
        "class Share(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        number = datasets.Value('int32')\n"
        "        features = datasets.Features({'predictions': number, 'references': number})\n"
        "        return evaluate.MetricInfo(description='', citation='', features=features)\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'share': sum(map(int.__eq__, predictions, references)) / len(references)}\n"
    )
    report = evaluated(capsys, *arguments(root, tmp_path / "out"), f"evaluate={tmp_path / 'share'}")
    assert report["evaluate"]["share"] == report["accuracy"]
    trained = ("objective=metric", f"objective.metric=evaluate:{tmp_path / 'share'}#share")  # over all rows here
    report = evaluated(capsys, *arguments(root, tmp_path / "out"), *trained)
    assert report["evaluate"]["share"] == report["accuracy"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["mode=icll"], "mode must be one of zero_shot, icl, calibrated, linear_probe, got 'icll'. Did you mean icl?"),
        (["k=3"], "k=3 is not read by mode=zero_shot"),
        (["mode=icl", "k=x"], "k must be a whole number"),
        (["mode=icl", "split=dev"], "would be its own example"),
        (["--jsn"], "zoft eval has no flag '--jsn'. Did you mean --json?"),
        (["run=nowhere"], "run=nowhere holds no config.yaml"),
    ],
)
def test_wrong_requests_are_one_sentence(more, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "config=quickstart", *more]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_modes_that_the_rows_have_nothing_for(folder, capsys, tmp_path):  # noqa: F811
    for task, more, message in (
        ("texts", ["mode=icl"], "mode=icl is for answers to choose from or answers that the model writes"),
        ("squad", ["mode=calibrated"], "mode=calibrated is for answers to choose from, task=squad has answers that"),
        ("copa", ["mode=linear_probe"], "the options of task=copa differ"),
        ("rated", [], "objective=reward needs objective.function"),
    ):
        assert main(["eval", *words(folder, task), *more, f"output_dir={tmp_path / 'out'}"]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


PASSING = """def odd(prompts, generations):
    return [float(len(text) % 2) for text in generations]
"""


def test_pass_at_k_is_that_of_the_samples_here_and_on_a_server(tmp_path, capsys, monkeypatch):
    """What a brute-force count over all subsets of the samples gives, for a reward; the server's texts are its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge.py").write_text(PASSING)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{w} is", "reward": 0}}\n' for w in WORDS[:8]))
    model_folder(tmp_path / "model")
    words = ["model.name=model", "task=custom", "task.train=rows.jsonl", "task.format=reward", "task.num_train=2"]
    words += ["task.num_dev=2", "task.num_test=4", "objective=reward", "objective.function=./judge.py:odd", "peft=lora"]
    words += ["objective.num_samples=5", "objective.temperature=1", "objective.max_new_tokens=4", "task.max_length=40"]
    words += ["trainable=adapter", "metric=pass@1,pass@3"]
    with serving(Lora().wrap(load_model("model"), seed=0), tokenizer=tiny_tokenizer()) as server:
        for more in ([], ["engine=server", f"engine.url={server.url}"]):
            report = evaluated(capsys, *words, *more, f"output_dir={tmp_path / 'out'}")
            rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
            assert all(row["rewards"] == [len(text) % 2 for text in row["texts"]] for row in rows)
            for k in (1, 3):
                each = [any(one) for row in rows for one in itertools.combinations(row["rewards"], k)]
                assert report[f"pass@{k}"] == pytest.approx(sum(each) / len(each))
                assert report[f"pass@{k}_low"] <= report[f"pass@{k}"] <= report[f"pass@{k}_high"]
        assert len(server.completions) >= 20  # a prompt a sample
    assert main(["eval", *words, "pass_reward=2", f"output_dir={tmp_path / 'out'}"]) == 0
    assert "pass@3    0.0 % [0.0, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["metric=f1"], "metric=f1 is none that zoft eval computes"),
        (["metric=pass@0"], "metric=pass@0 is none"),
        (["metric=pass@2"], "the model chooses in these rows"),
        (["pass_reward=1"], "read together with metric=pass@k"),
        (["metric=pass@1", "pass_reward=high"], "pass_reward must be a number, got 'high'"),
        (["harness=x", "metric=pass@1"], "metric= is not read together with harness="),
    ],
)
def test_what_pass_at_k_does_not_go_with(tmp_path, capsys, more, sentence):
    assert main(["eval", *arguments(tmp_path, tmp_path / "out"), *more]) == 2
    assert sentence in capsys.readouterr().err


def test_pass_at_k_wants_as_many_samples(folder, capsys):  # noqa: F811
    assert main(["eval", *words(folder, "squad", "causal"), "task.max_new_tokens=3", "metric=pass@2"]) == 2
    assert "needs 2 texts of each prompt or more, and objective=cross_entropy writes 1" in capsys.readouterr().err
