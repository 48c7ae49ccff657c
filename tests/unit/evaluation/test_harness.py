"""`zoft eval harness=`: what is refused, what reaches the harness, and (where lm_eval is installed) the real one."""

from __future__ import annotations

import importlib
import json
import logging
import random
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests.runs import arguments, model_folder
from zoft.cli import main
from zoft.evaluation.harness_tasks import _facts, quiet

COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/rows.jsonl, test: {folder}/rows.jsonl}}}}
training_split: train
test_split: test
doc_to_text: "{{{{q}}}} is it spam"
"""
FILES = {
    "choose.yaml": "task: choose_spam\noutput_type: multiple_choice\ndoc_to_choice: ['no', 'yes']\ndoc_to_target: label"
    + COMMON
    + "metric_list: [{{metric: acc}}, {{metric: acc_norm}}]\n",
    "write.yaml": "task: write_spam\noutput_type: generate_until\ndoc_to_target: answer\nnum_fewshot: 0"
    + COMMON
    + "generation_kwargs: {{until: ['free'], max_gen_toks: 3}}\nprocess_results: !function judge.judged\n"
    + "metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]\n",
    "broken.yaml": "task: broken\noutput_type: multiple_choice\ndoc_to_choice: ['no', 'yes']\ndoc_to_target: label"
    + COMMON
    + "process_results: !function judge.fails\n",
    "unread.yaml": "task: unread\nprocess_results: !function explode.boom\n",
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a folder of tasks, one of which must not be read."""
    folder = tmp_path_factory.mktemp("harness")
    model_folder(folder / "model", max_position_embeddings=128)
    (folder / "tasks").mkdir()
    for name, text in FILES.items():
        (folder / "tasks" / name).write_text(text.format(folder=folder / "tasks"))
    (folder / "tasks" / "judge.py").write_text(
        "def judged(doc, results):\n    print('noise')\n    return {'right': float(doc['answer'] in results[0])}\n"
        "def fails(doc, results):\n    return doc['absent']\n"
    )
    (folder / "tasks" / "explode.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('was_run').touch()\nraise RuntimeError('boom')\n"
    )
    rows = [{"q": f"win {k}", "label": k % 2, "answer": ("no", "yes")[k % 2]} for k in range(8)]
    (folder / "tasks" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluated(capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    assert main(["eval", *more, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    (line,) = captured.out.splitlines()
    return dict(json.loads(line))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["harness=a", "mode=icl"], "mode= is not read together with harness="),
        (["harness=a", "split=dev"], "split= is not read together with harness="),
        (["harness=a", "evaluate=rouge"], "evaluate= is not read together with harness="),
        (["harness=a", "task.max_length=9"], "task.max_length= is not read together with harness="),
        (["harness_limit=3"], "harness_limit=3 is read together with harness= alone"),
        (["harness_path=x"], "harness_path=x is read together with harness= alone"),
        (["harness=a", "harness_path=x"], "harness_path=x is no folder"),
        (["harness=a", "harness_limit=0"], "harness_limit must be at least 1 row"),
        (["harness=a", "harness_limit=half"], "harness_limit must be a whole number of rows, got 'half'"),
        (["harness=a", "k=-1"], "k must be a whole number of demonstrations"),
        (["harness=a,"], "harness= names no task"),
        (["harness=a,a"], "names a task twice"),
        (["harness=no/such.yaml"], "there is no such task file"),
    ],
)
def test_wrong_requests_are_one_sentence(more, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "config=quickstart", *more]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_extra_that_is_not_installed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "harness=arc_easy"]) == 2
    assert "pip install 'zoft[harness]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


RESULTS = {
    "results": {
        "one": {"alias": "one", "acc,none": 0.5, "acc_stderr,none": 0.5, "f1,strict": 0.4, "f1_stderr,strict": "N/A"},
        "two": {"acc,none": 0.0, "acc_stderr,none": 0.0},
    },
    "groups": {"both": {"alias": "both", "acc,none": 0.25, "acc_stderr,none": 0.25}},
    "group_subtasks": {"both": ["inner", "two"], "inner": ["one"]},
    "samples": {
        "one": [{"doc_id": 1 - k, "doc_hash": "x", "filter": "none", "acc": float(k), "f1": (k, k)} for k in (0, 1)],
        "two": [{"doc_id": k, "filter": "none", "acc": False} for k in (0, 1)],
    },
    "n-samples": {"one": {"original": 9, "effective": 2}, "two": {"original": 2, "effective": 5}},
    "n-shot": {"one": 3},
    "versions": {"one": 1.0},
    "configs": {"one": {"process_results": len}},
}


def test_intervals_of_tasks_and_groups():
    facts = _facts(RESULTS)
    one, both = facts["tasks"]["one"], facts["groups"]["both"]
    assert one["metrics"]["f1 (strict)"] == {"value": 0.4, "stderr": None}
    assert one["metrics"]["acc"]["low"] == pytest.approx(0.0945, abs=1e-4)  # Wilson's of 1 in 2
    assert both["metrics"]["acc"]["low"] == pytest.approx(0.0456, abs=1e-4)  # and of 1 in 4, where rows weigh the same
    assert (both["tasks"], both["num_rows"], facts["num_rows"]) == (["one", "two"], 4, 4)


class FakeTask:
    UNSAFE_CODE = False

    def __init__(self, shown: int | None) -> None:
        self.config: dict[str, Any] = {"num_fewshot": shown}
        self.get_config = self.config.get

    def set_config(self, key: str, value: Any) -> None:
        self.config[key] = value

    def set_fewshot_seed(self, seed: int) -> None:
        self.config["seed"] = seed


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A harness that notes what it is given, talks too much and seeds everything."""
    seen: dict[str, Any] = {"one": FakeTask(None), "two": FakeTask(0), "code": FakeTask(1)}
    seen["code"].UNSAFE_CODE = True

    class TaskManager:
        all_tasks = all_subtasks = ("one", "two", "code", "far", "needy")

        def __init__(self, include_path: str | None = None, include_defaults: bool = True) -> None: ...

        def load(self, names: list[str]) -> dict[str, Any]:
            (name,) = names
            if name == "far":
                raise ConnectionError("Couldn't reach it\nat all")
            if name == "needy":
                raise ModuleNotFoundError("No module named 'antlr'")
            return {"tasks": {name: seen[name]}, "groups": {}, "group_map": {}}

    def evaluate(**given: Any) -> dict[str, Any]:
        print("running")
        print("bar", file=sys.stderr)
        logging.getLogger("lm_eval").error("much")
        warnings.warn("more", UserWarning, stacklevel=1)
        random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
        if given["limit"] == 7:
            raise KeyError("label")
        return RESULTS

    def model(**given: Any) -> Any:
        seen["model"] = given
        return types.SimpleNamespace(max_length=128)

    package, huggingface = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.models.huggingface")
    package.evaluate, package.__version__ = evaluate, "9"  # type: ignore[attr-defined]
    tasks = types.ModuleType("lm_eval.tasks")
    tasks.TaskManager, huggingface.HFLM = TaskManager, model  # type: ignore[attr-defined]
    for module in (package, tasks, types.ModuleType("lm_eval.models"), huggingface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


def test_what_reaches_the_harness(workspace, fake, capsys, tmp_path):
    torch.manual_seed(1), numpy.random.seed(1), random.seed(1)
    before = torch.get_rng_state().clone(), random.getstate(), numpy.random.get_state()[1].copy()
    out = f"output_dir={tmp_path / 'out'}"
    given = [f"model.name={workspace / 'model'}", "seed=3", "trainer.per_device_eval_batch_size=4", out]
    facts = evaluated(capsys, *given, "harness=one", "harness_limit=2", "k=4")
    assert (torch.get_rng_state() == before[0]).all()
    assert random.getstate() == before[1]
    assert (numpy.random.get_state()[1] == before[2]).all()
    assert logging.root.manager.disable == 0
    assert fake["one"].config == {"num_fewshot": 4, "seed": 3}
    assert fake["model"]["batch_size"] == 4
    assert fake["model"]["mixed_precision_dtype"] is None
    assert not fake["model"]["pretrained"].training
    assert (facts["mode"], facts["seed"], facts["lm_eval"], facts["max_length"]) == ("harness", 3, "9", 128)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == facts
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [(row["task"], row["row"]) for row in rows] == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    assert "doc_hash" not in rows[0]
    assert main(["eval", *given, "harness=one"]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("both      acc 25.0 % [4.6, 69.9], on 4 rows of 2 tasks")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["harness=oen"], "harness=oen is no task of lm-evaluation-harness. Did you mean one or"),
        (["harness=far"], "harness=far: its data cannot be read (ConnectionError: Couldn't reach it)"),
        (["harness=needy"], "harness=needy needs what is not installed"),
        (["harness=code"], "harness task code runs the code that the model writes"),
        (["harness=two", "k=1"], "k=1 is not read by harness task two"),
        (["harness=one", "harness_limit=7"], "harness=one failed on its rows or on this model (KeyError: 'label')"),
    ],
)
def test_what_the_harness_cannot_do_is_one_sentence(more, message, workspace, fake, capsys, tmp_path):
    out = tmp_path / "out"
    assert main(["eval", f"model.name={workspace / 'model'}", f"output_dir={out}", *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not out.exists()


def test_a_model_that_does_not_continue_texts(fake, capsys, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    settings = "# @package _global_\ndefaults: [{override /task: masked_sst2}]\nmodel:\n  name: some\n"
    settings += "budget:\n  queries: 8\nseed: 0\n"
    (tmp_path / "run" / "config.yaml").write_text(settings)
    assert main(["eval", f"run={tmp_path / 'run'}", "harness=one"]) == 2
    assert "harness= is for causal language models, and with task=masked_sst2" in capsys.readouterr().err


def test_quiet_gives_the_console_back(capsys):
    def fails() -> None:
        print("nobody hears this")
        raise ValueError("x")

    with pytest.raises(ValueError, match="x"), quiet():
        fails()
    print("heard")
    assert capsys.readouterr().out == "heard\n"


# The real one: needs pip install 'zoft[harness]'.


def test_real_tasks_of_a_run_and_of_its_base_model(workspace, capsys, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(importlib.import_module("datasets").config, "HF_DATASETS_CACHE", tmp_path / "cache")
    from zoft.config import compose
    from zoft.run.train import run

    out = tmp_path / "out"
    run(compose(arguments(tmp_path, out, "peft=lora", "optimizer.learning_rate=1", "trainer.use_cpu=true")))
    capsys.readouterr()
    names = ["harness=choose_spam,write_spam", f"harness_path={workspace / 'tasks'}"]
    tuned = evaluated(capsys, f"run={out}", *names)
    assert tuned["output_dir"] == str(out / "eval-harness-choose_spam-write_spam")
    assert not (workspace / "tasks" / "was_run").exists()  # nor was the Python of what nobody named
    assert tuned["tasks"].keys() == {"choose_spam", "write_spam"}
    rows = [json.loads(line) for line in (Path(tuned["output_dir"]) / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == tuned["num_rows"] == 16
    accuracy = tuned["tasks"]["choose_spam"]["metrics"]["acc"]
    assert accuracy["value"] == sum(row["acc"] for row in rows[:8]) / 8
    assert accuracy["low"] < accuracy["value"] < accuracy["high"] or accuracy["value"] in (0, 1)
    file = [f"model.name={tmp_path / 'model'}", f"harness={workspace / 'tasks' / 'choose.yaml'}", "harness_limit=3"]
    base = evaluated(capsys, *file, f"output_dir={tmp_path / 'base'}", "k=2")
    assert base["tasks"]["choose_spam"]["num_demonstrations"] == 2
    (row, *others) = [json.loads(line) for line in (tmp_path / "base" / "predictions.jsonl").read_text().splitlines()]
    assert len(others) == 2
    assert row["arguments"][0][0].count("is it spam") == 3
    # The numbers are the model's: the sum of the log-probabilities of the answer's tokens behind the prompt.
    from zoft.lm.models.load import load_model, load_tokenizer

    prompt, answer = row["arguments"][1]
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    shown, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + answer, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = load_model(str(tmp_path / "model"))(whole).logits[0].log_softmax(-1)
    log_prob = sum(logits[place - 1, whole[0, place]].item() for place in range(len(shown), whole.shape[1]))
    assert row["resps"][1][0][0] == pytest.approx(log_prob, abs=1e-4)


def test_real_failures_write_nothing(workspace, capsys, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(importlib.import_module("datasets").config, "HF_DATASETS_CACHE", tmp_path / "cache")
    given = [f"model.name={workspace / 'model'}", f"output_dir={tmp_path / 'out'}"]
    for name, message in (
        ("broken.yaml", "harness=broken failed on its rows or on this model (KeyError: 'absent')"),
        ("unread.yaml", "unread.yaml cannot be loaded (RuntimeError: boom)"),
    ):
        assert main(["eval", *given, f"harness={workspace / 'tasks' / name}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert main(["eval", *given, "harness=write_spam", f"harness_path={workspace / 'tasks'}", "k=1"]) == 2
    assert "k=1 is not read by harness task write_spam" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
