"""`zoft train` without anything to train on, the words of other trainers, and the ready configs for own data."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runs import arguments, environment, model_folder, zoft
from tests.unit.run.test_formats import PAIRS, SUM, TEXTS
from zoft.cli import main
from zoft.config import compose
from zoft.report import pace
from zoft.run.build import load_rows
from zoft.run.train import run

READY = ("classify", "instruct", "chat", "preference", "reward")
ROWS: dict[str, list[dict[str, Any]]] = {
    "classify": [{"text": f"you call {k}", "label": ("no", "yes")[k % 2]} for k in range(40)],
    "instruct": TEXTS,
    "chat": [
        {"messages": [{"role": "user", "content": "is it"}, {"role": "assistant", "content": ("yes", "no")[k % 2]}]}
        for k in range(12)
    ],
    "preference": PAIRS,
    "reward": SUM,
}
FORM_OBJECTIVES = {
    "classify": "options",
    "instruct": "cross_entropy",
    "chat": "cross_entropy",
    "preference": "preference",
    "reward": "reward",
}


def test_train_alone_says_what_is_missing_and_begins_nothing(tmp_path: Path):
    done = zoft("train", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("zoft: error: there is nothing to train on")
    assert sum(line.startswith("  zoft ") for line in done.stderr.splitlines()) == 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words", [["seed=1"], ["method=mezo", "model.name=x"], ["-m", "seed=0,1"], ["task.train=own.csv"]]
)
def test_neither_do_arguments_without_data(words: list[str], capsys: Any, tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words]) == 2
    assert "there is nothing to train on" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["train", "check", "estimate"])
def test_neither_does_a_config_for_own_rows_without_them(verb: str, capsys: Any, tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    for config in READY:
        more = ["objective.function=zoft.lm.rewards:countdown"] if config == "reward" else []
        assert main([verb, f"config={config}", *more]) == 2
        said = capsys.readouterr().err
        assert "there are no rows to train on: set task.train=FILE" in " ".join(said.split())
        assert sum(line.startswith("  zoft ") for line in said.splitlines()) == 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--lr=1e-3", "Did you mean optimizer.learning_rate=1e-3?"),
        ("--lr", "Did you mean optimizer.learning_rate=...?"),
        ("--batch-size=4", "Did you mean trainer.per_device_train_batch_size=4?"),
        ("lr=1e-3", "Did you mean optimizer.learning_rate?"),
        ("epochs=3", "Did you mean budget.queries?"),
        ("model_name_or_path=x", "Did you mean model.name?"),
        ("dataset=x.csv", "Did you mean task.train?"),
    ],
)
def test_the_words_of_other_trainers_are_understood(word: str, meant: str, capsys: Any):
    assert main(["train", "config=quickstart", word]) == 2
    assert meant in capsys.readouterr().err


def test_what_others_call_a_key_is_a_key():
    from zoft.config.catalog import ELSEWHERE, ORDER
    from zoft.config.training_arguments import fields

    values = {
        "peft": "lora",
        "peft.r": "4",
        "model.name": "x",
        "task.train": "x",
        "output_dir": "x",
        "model.dtype": "float16",
    }
    for key in set(ELSEWHERE.values()):
        group = ["peft=lora"] if key.startswith("peft.") else ["method=mezo"] if key.startswith("estimator.") else []
        assert key in ORDER or compose(["config=quickstart", "task=custom", *group, f"{key}={values.get(key, '8')}"])
    assert "per_device_train_batch_size" in fields()


def test_a_long_run_says_so_before_it_begins(tmp_path: Path, capsys: Any, monkeypatch: Any):
    """A query of the tiny model is not timed: the clock is."""
    monkeypatch.setattr(pace, "_seconds_of", lambda query: query() or 200.0)
    monkeypatch.setattr("zoft.run.train._FEW_QUERIES", 10)
    facts = run(compose(arguments(tmp_path, tmp_path / "out")))
    said = capsys.readouterr().out
    assert "time    at least 1:20:00: 24 forward passes of 200 s" in said
    assert "budget.queries=18 takes an hour" in said
    assert said.index("time    at least") < said.index("zero-shot held-out")
    monkeypatch.undo()
    plain = run(compose(arguments(tmp_path, tmp_path / "plain")))
    assert "time    at least" not in capsys.readouterr().out
    assert facts["weights_sha256"] == plain["weights_sha256"]


WRONG = {
    "train config=classify task.train=missing.csv": "there is no data file missing.csv",
    "train config=classify task.train=broken.csv": "broken.csv:3: 1 cells, the header has 2",
    "train config=classify task.train=other.csv": "other.csv:2 has no column for 'label'",
    "train config=classify task.train=good.csv task.label=stars": "good.csv:2 has no 'stars'",
    "train config=classify task.train=good.csv task.num_test=2": "good.csv has too few rows (2)",
    "train task=custom task.train=broken.jsonl": "broken.jsonl:2: not a JSON object",
    "train config=clasify": "there is no config called 'clasify'. Did you mean classify?",
    "train config=quickstart optimizer.learnng_rate=1": "has no 'learnng_rate'. Did you mean learning_rate?",
    "train config=quickstart tracker.report_to=[mlflow]": "tracker=mlflow needs a package that is not there",
    "train config=quickstart trainer.use_liger_kernel=true": "trainer.use_liger_kernel=true needs a package",
    "train config=classify task.train=many.csv model.name=./nowhere": "there is no model folder ./nowhere",
    "data show config=classify task.train=broken.csv": "broken.csv:3: 1 cells",
    "check config=classify task.train=broken.csv": "broken.csv:3: 1 cells",
    "estimate config=classify task.train=missing.csv": "there is no data file missing.csv",
    "tune config=classify task.train=missing.csv space.estimator.eps=log(0.1,1)": "there is no data file missing.csv",
    "predict run=nowhere data=good.csv": "run=nowhere holds no config.yaml",
    "eval run=nowhere": "run=nowhere holds no config.yaml",
    "export run=nowhere": "run=nowhere holds no config.yaml",
    "compare nowhere": "there is no folder nowhere",
    "plot nowhere": "there is no folder nowhere",
}
"""Words -> what is said of them."""


def test_what_is_wrong_is_said_before_anything_heavy_is_imported(tmp_path: Path):
    (tmp_path / "broken.csv").write_text("text,label\na,b\nc\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "a", "label": "b"}\nc\n')
    (tmp_path / "other.csv").write_text("one,two\na,b\n")
    (tmp_path / "good.csv").write_text("text,label\na,b\nc,d\n")
    (tmp_path / "many.csv").write_text("text,label\n" + "a,b\nc,d\n" * 20)
    code = f"""
import contextlib, io, shlex, sys
from zoft.cli import main
for words in {list(WRONG)!r}:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(shlex.split(words))
    heavy = {{"torch", "transformers", "datasets", "pandas", "pyarrow", "peft", "accelerate"}} & set(sys.modules)
    print(repr((words, code, sorted(heavy), said.getvalue())))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = [ast.literal_eval(line) for line in done.stdout.splitlines()]
    assert [words for words, *_ in outcomes] == list(WRONG)
    for words, code, heavy, said in outcomes:
        assert (code, heavy) == (2, []), (words, heavy, said)
        assert WRONG[words] in said, (words, said)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    model_folder(folder / "model", max_position_embeddings=1200)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}is {% endif %}"
    )
    tokenizer.save_pretrained(folder / "model")
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words_of(folder: Path, name: str) -> list[str]:
    more = ["objective.function=zoft.lm.rewards:countdown"] if name == "reward" else []
    return [f"config={name}", f"task.train={folder / name}.jsonl", f"model.name={folder / 'model'}", *more]


@pytest.mark.parametrize("name", READY)
def test_a_ready_config_trains_on_rows_of_its_format(name: str, data: Path, tmp_path: Path):
    short = ["budget.queries=16", "objective.max_new_tokens=2"][: 1 + (name == "reward")]
    cfg = compose([*words_of(data, name), *short, f"output_dir={tmp_path / 'out'}"])
    facts = run(cfg)
    assert facts["num_queries"] >= 8
    assert cfg.objective.name() == FORM_OBJECTIVES[name]
    assert (tmp_path / "out" / "report.md").is_file()


@pytest.mark.parametrize("name", READY)
def test_every_key_of_a_ready_config_is_explained(name: str):
    from zoft.config.catalog import configs_dir

    lines = (configs_dir() / "config" / f"{name}.yaml").read_text().splitlines()
    assert any(f"zoft train config={name} task.train=" in line for line in lines)
    assert sum("#" in line for line in lines) >= 10


@pytest.mark.parametrize(
    ("name", "objective"), [("classify", "options"), ("instruct", "cross_entropy"), ("preference", "preference")]
)
def test_the_objective_follows_from_the_rows(name: str, objective: str, data: Path):
    given = [f"task.train={data / name}.jsonl", f"model.name={data / 'model'}", "task.template='{text} is it'"]
    rows = ["task.num_train=8", "task.num_dev=2", "task.num_test=2"]  # of twelve
    cfg = compose(["config=smoke", "task=custom", *rows, *given[: 2 + (name == "classify")]])
    assert cfg.objective.name() == "auto"
    load_rows(cfg)
    assert cfg.objective.name() == objective


def test_a_reward_refuses_a_method_with_a_gradient_once_it_is_known(data: Path):
    from zoft.errors import UserError

    given = [f"task.train={data / 'reward'}.jsonl", f"model.name={data / 'model'}"]
    given += ["task.num_train=8", "task.num_dev=2", "task.num_test=2"]
    cfg = compose(["config=smoke", "task=custom", *given, "method=forward_gradient"])
    with pytest.raises(UserError, match="has no gradient"):
        load_rows(cfg)


def test_an_adapter_that_is_chosen_is_what_is_trained():
    assert compose(["config=quickstart", "peft=lora"]).trainable.name() == "adapter"
    assert compose(["config=quickstart", "peft=none", "trainable=all"]).trainable.name() == "all"
    assert compose(["config=quickstart", "peft=none"]).trainable.name() == "last_blocks"
