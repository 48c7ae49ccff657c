"""Parts from a user's own file: chosen by `FILE.py:Class`, trusted from the command line alone, held to by a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs import arguments, report
from zoft import create
from zoft.cli import main
from zoft.component import components
from zoft.config import compose, resolved_yaml
from zoft.errors import UserError

FILE = '''
"""Parts of my own."""
from dataclasses import dataclass

from zoft.estimators.central import Central
from zoft.lm.objectives.options import Options
from zoft.optimizers.sgd import SGD
from zoft.subspaces.full import Full
from zoft.weightings.mean import Mean


@dataclass
class Wide(Central):
    """Two points a direction, ten times as far apart as usual.

    Args:
        note: what is written to it.
    """

    eps: float = 1e-2
    note: str = ""


@dataclass
class Steady(SGD):
    """A step."""


@dataclass
class Everything(Full):
    """All of them."""


@dataclass
class Middle(Mean):
    """The mean."""


@dataclass
class Ranked(Options):
    """Options."""


class Bare(Central):
    eps: float = 1e-2


class Other:
    pass
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("my_est.py").write_text(FILE)
    return tmp_path


def test_every_kind_of_part_and_its_settings(folder: Path):
    named = ["estimator=./my_est.py:Wide", "optimizer=my_est.py:Steady", f"subspace={folder}/my_est.py:Everything"]
    named += ["weighting=./my_est.py:Middle", "objective=./my_est.py:Ranked"]
    cfg = compose(["config=smoke", *named, "estimator.eps=0.03", "estimator.note=01"])
    estimator: Any = cfg.estimator
    assert [part.name() for part in (estimator, cfg.optimizer, cfg.subspace, cfg.weighting, cfg.objective)] == [
        f"my_est.py:{name}" for name in ("Wide", "Steady", "Everything", "Middle", "Ranked")
    ]
    assert (estimator.eps, estimator.note) == (0.03, "01")  # text is as it is written
    assert "-estimator=my_est.py-Wide,estimator.eps=0.03,e" in cfg.output_dir
    assert create("estimator", "./my_est.py:Wide", "central").radius == 0.01
    assert "my_est.py:Wide" not in components("estimator")  # what one run names is no choice of the next


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("estimator=./my_est.py:Wid", r"defines no part called 'Wid'. Did you mean Wide"),
        ("estimator=./my_est.py:Central", r"defines no part called 'Central'"),  # imported there, not defined
        ("estimator=./my_est.py:Other", r"defines no part called 'Other'"),
        ("estimator=./my_est.py:Bare", r"put @dataclass above class Bare"),
        ("optimizer=./my_est.py:Wide", r"must inherit from zoft.optimizers.base.Optimizer"),
        ("estimator=./absent.py:Wide", r"there is no file ./absent.py"),
        ("estimator=./broken.py:Wide", r"broken.py, line 2 cannot be imported: NameError"),
        ("estimator=./wrong.py:Wide", r"wrong.py, line 1 cannot be imported: SyntaxError"),
    ],
)
def test_what_cannot_be_is_one_sentence(word: str, message: str):
    Path("broken.py").write_text("x = 1\ny = z\n")
    Path("wrong.py").write_text("def f(:\n")
    with pytest.raises(UserError, match=message):
        compose(["config=smoke", word])


def test_a_file_whose_name_hydras_grammar_has_not(folder: Path):
    (folder / "mené.py").write_text(FILE)
    assert type(compose(["config=smoke", "estimator=./mené.py:Wide"]).estimator).__name__ == "Wide"


def test_a_setting_that_it_has_not_is_an_error():
    with pytest.raises(UserError, match=r"estimator=my_est.py:Wide has no 'noote'. Did you mean note"):
        compose(["config=smoke", "estimator=./my_est.py:Wide", "estimator.noote=1"])
    with pytest.raises(UserError, match=r"estimator.eps must be"):
        compose(["config=smoke", "estimator=./my_est.py:Wide", "estimator.eps=-1"])


def test_a_config_that_names_code_is_no_reason_to_run_it(folder: Path):
    argument = "estimator=./my_est.py:Wide"
    cfg = compose(["config=smoke", argument, "estimator.note=a"])
    Path("kept.yaml").write_text(resolved_yaml(cfg))
    with pytest.raises(UserError, match=r"names code to run.*write that on the command line too"):
        compose(["config=kept.yaml"])
    assert compose(["config=kept.yaml", argument]) == cfg
    Path("configs").mkdir()
    Path("configs/mine.yaml").write_text("# @package _global_\ndefaults:\n  - override /estimator: ./my_est.py:Wide\n")
    with pytest.raises(UserError, match="names code to run"):
        compose(["config=mine"])


def test_show_and_ls_know_it_by_its_name(capsys: Any):
    assert main(["show", "estimator=./my_est.py:Wide", "my_est.py:Steady", "./my_est.py:Middle"]) == 0
    output = capsys.readouterr().out
    assert "estimator.note=''   (str)\n      what is written to it." in output
    assert "optimizer=my_est.py:Steady" in output
    assert main(["ls", "my_est.py"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "estimator=my_est.py:Wide  Two points a direction, ten times as far apart as usual." in lines
    assert len(lines) == 6


def test_a_run_holds_to_its_file(folder: Path, capsys: Any):
    words = arguments(folder, folder / "out", "estimator=./my_est.py:Wide", "budget.queries=8")
    words = [word for word in words if word != "budget.queries=24"]
    assert main(["train", *words]) == 0
    facts = report(folder / "out")
    assert facts["estimator"] == "my_est.py:Wide"
    assert f"estimator={folder}/my_est.py:Wide" in facts["command"]
    output = capsys.readouterr().out
    assert f"run={folder}/out estimator={folder}/my_est.py:Wide" in output  # the next commands name it too
    assert main(["replay", str(folder / "out")]) == 2  # a journal is no reason to run code
    assert "names code to run" in capsys.readouterr().err
    assert main(["replay", str(folder / "out"), "estimator=my_est.py:Wide"]) == 0
    Path("my_est.py").write_text(FILE + "\n# another\n")
    assert main(["train", *words]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert main(["replay", str(folder / "out"), "estimator=my_est.py:Wide"]) == 2
    assert "my_est.py:Wide is not the file of this run" in capsys.readouterr().err
    Path("my_est.py").write_text(FILE)
    assert main(["train", *words]) == 0  # finished, and shown


def test_a_journal_of_another_file_is_refused(folder: Path):
    """From Python, where no config.yaml stands before it."""
    from tests.models import batch_for, tiny_llama
    from zoft import ZOConfig, ZOTrainer

    model = tiny_llama(num_hidden_layers=1)
    batch = batch_for(model, rows=4)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(4)]
    given: dict[str, Any] = {"output_dir": str(folder / "py"), "report_to": [], "use_cpu": True, "save_strategy": "no"}

    def trained(steps: int, resume: bool) -> None:
        args = ZOConfig(max_steps=steps, learning_rate=1e-3, per_device_train_batch_size=2, **given)
        model = tiny_llama(num_hidden_layers=1)
        trainer = ZOTrainer(model, args, train_dataset=rows, estimator="./my_est.py:Wide")
        trainer.train(resume_from_checkpoint=resume)

    trained(2, False)
    trained(3, True)
    Path("my_est.py").write_text(FILE + "\n# another\n")
    with pytest.raises(UserError, match=r"code of my_est\.py:Wide"):
        trained(4, True)


def test_a_reward_from_a_file(folder: Path):
    Path("judge.py").write_text(
        "def score(prompts, generations):\n    return [float(len(text)) for text in generations]\n"
    )
    cfg = compose(["config=reward", "task.train=x.jsonl", "objective.function=./judge.py:score"])
    reward: Any = cfg.objective
    assert reward.rewards(["a"], ["four"], []) == [4.0]
    assert list(reward.own_code()) == ["judge.py:score"]
    assert "# objective: judge.py:score has the SHA-256" in resolved_yaml(cfg)
    absent: Any = create("objective", "reward", "reward", function="./judge.py:scre")
    with pytest.raises(UserError, match="has no function called scre"):
        absent.loaded()


def test_an_entry_point_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch, folder: Path):
    import importlib.metadata
    import sys

    Path("plugged.py").write_text(FILE)
    monkeypatch.syspath_prepend(str(folder))
    entry = importlib.metadata.EntryPoint("broad", "plugged:Wide", "zoft.estimator")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry] * (group == "zoft.estimator"))
    estimator_class = components.__wrapped__("estimator")["broad"]
    assert estimator_class.name() == "broad"
    assert estimator_class().own_code().keys() == {"broad"}
    assert estimator_class.own_file == ""
    del sys.modules["plugged"]


@pytest.mark.parametrize(
    "value", ["plugged:Everything", "plugged:Bare", "plugged:Nope", "plugged:score", "nowhere:Wide"]
)
def test_a_part_of_a_package_that_cannot_be_loaded_stops_no_other(
    value: str, monkeypatch: pytest.MonkeyPatch, folder: Path, caplog: pytest.LogCaptureFixture
):
    """Each command ended with the package's traceback, whatever it was about."""
    import importlib.metadata
    import sys

    Path("plugged.py").write_text(FILE + "\n    more: int = 0\n\n\nscore = len\n")
    monkeypatch.syspath_prepend(str(folder))
    entry = importlib.metadata.EntryPoint("broad", value, "zoft.estimator")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry] * (group == "zoft.estimator"))
    known = components.__wrapped__("estimator")
    assert "central" in known
    assert "broad" not in known
    assert f"estimator=broad, which {value} brings, is left out: " in caplog.text
    sys.modules.pop("plugged", None)


@pytest.mark.parametrize(
    "command",
    [["train", "config=smoke", "estimator=./parts.py"], ["show", "./parts.py"], ["show", "estimator=parts.py"]],
)
def test_a_file_without_its_part_is_told_how(command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]):
    Path("parts.py").write_text(FILE)
    assert main(command) == 2
    path = command[-1].rpartition("=")[2]
    assert f"Of a file name one part, {path}:NAME; zoft ls {path} lists them." in capsys.readouterr().err
