"""Help, lists and completion: quick, true, and every example in them composes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from zoft.cli import VERBS, main
from zoft.cli.completion import SCRIPT, words
from zoft.config import compose
from zoft.config.catalog import ORDER, choices

REPOSITORY = Path(__file__).resolve().parents[2]


def out(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train", "--help"], ["train", "seed=1", "-h"], ["version"]])
def test_help_imports_nothing_heavy(arguments: list[str]):
    code = (
        f"import sys; from zoft.cli import main; code = main({arguments!r})\n"
        "heavy = {'hydra', 'omegaconf', 'yaml', 'torch', 'transformers', 'numpy', 'peft'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy or code else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


def test_help_names_every_command_group_and_choice(capsys: pytest.CaptureFixture[str]):
    top = out(capsys, "--help")
    assert all(verb in top for verb in VERBS)
    train = out(capsys, "train", "--help")
    for group in ORDER:
        assert group in train
        assert all(re.search(rf"\b{name}\b", train) for name in choices(group, plugins=False))
    assert max(map(len, train.splitlines())) <= 120
    for verb in VERBS:
        assert "usage: zoft" in out(capsys, verb, "--help")


def test_every_example_composes(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = out(capsys, "train", "--help")
    Path("runs/mine").mkdir(parents=True)
    config_text = text.split("everything else is a key:\n")[1].split("It can live")[0]
    for file in ("mine.yaml", "runs/mine/config.yaml"):
        Path(file).write_text("\n".join(line[2:] for line in config_text.splitlines()))
    examples = [line.strip() for line in text.split("Examples:\n")[1].split("\n\n")[0].splitlines()]
    assert len(examples) >= 8
    for example in examples:
        command = shlex.split(re.split(r"\s{3,}|(?<=again) ", example)[0])
        arguments = command[command.index("train") + 1 :]
        if "-m" in arguments:
            from zoft.config.loader import Loader
            from zoft.config.sweep import expand

            loader = Loader()
            loader.sweeping = True
            for cell in expand(loader, arguments[1:]):
                loader.load(list(cell))
        else:
            compose(arguments)


def test_ls_and_show_know_everything(capsys: pytest.CaptureFixture[str]):
    listed = out(capsys, "ls")
    for group in ORDER:
        for name in choices(group):
            assert re.search(rf"^  {name}  +\S", listed, re.M), f"{group}/{name} has no description"
            assert name in out(capsys, "show", f"{group}/{name}")
    assert "estimator.eps=0.001" in out(capsys, "show", "central")
    assert "Malladi" in out(capsys, "show", "central")
    assert "one_sided" in out(capsys, "show", "estimator")
    assert out(capsys, "ls", "peft").startswith("peft:")


def test_a_key_is_shown_by_itself(capsys: pytest.CaptureFixture[str]):
    assert out(capsys, "show", "trainer.eval_steps").startswith("  trainer.eval_steps=500   (float | None)")
    assert "seed=0   (int)" in out(capsys, "show", "seed")
    eps = out(capsys, "show", "estimator.eps")
    assert "    of estimator=nodes" in eps
    assert "central, " in eps
    for wrong, said in (
        ("eval_steps", "called 'eval_steps'. Did you mean trainer.eval_steps? zoft ls lists everything"),
        ("trainer.eval_stepz", "trainer has no key 'eval_stepz'. Did you mean eval_steps"),
        ("qwertyuiop", "there is nothing called 'qwertyuiop'. zoft ls lists everything"),
    ):
        assert main(["show", wrong]) == 2
        assert said in " ".join(capsys.readouterr().err.split())


def test_defaults_of_sections_are_those_of_a_run(capsys: pytest.CaptureFixture[str]):
    run = compose([])
    shown = {name: out(capsys, "show", name) for name in ("trainer", "budget", "model")}
    for key, value in run.trainer.items():
        assert f"  trainer.{key}={value!r}   (" in shown["trainer"], key
    assert f"budget.queries={run.budget.queries}   (int)" in shown["budget"]
    assert f"model.name={run.model.name!r}   (str)" in shown["model"]
    assert "trainer.bf16=False" in shown["trainer"], "what the run does not set is transformers' own default"


def test_every_setting_is_explained(capsys: pytest.CaptureFixture[str]):
    from zoft.component import GROUPS, components, describe

    for group in GROUPS:
        for cls in components(group).values():
            for name, _, _, meaning in describe(cls):
                assert meaning, f"{group}={cls.name()}: {name} is not explained in its docstring"


def test_cfg_prints_an_experiment(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(out(capsys, "train", "config=quickstart", "peft=lora", "--cfg"))
    assert compose(["config=mine.yaml"]) == compose(["config=quickstart", "peft=lora"])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("zoft tr", ["train"]),
        ("zoft train estimator=c", ["estimator=central"]),
        ("zoft train config=qu", ["config=quickstart"]),
        ("zoft train estimator.num_d", ["estimator.num_directions="]),
        ("zoft train seed=1 peft=lo", ["peft=lora"]),
        ("zoft train trainer.logging_st", ["trainer.logging_strategy=", "trainer.logging_steps="]),
        ("zoft show estimator/cen", ["estimator/central"]),
        ("zoft ls subs", ["subspace"]),
        ("zoft data ", ["show"]),
        ("zoft data show task=cus", ["task=custom"]),
        ("zoft data show --j", ["--json"]),
        ("zoft train foo=", []),
    ],
)
def test_completion_words(line: str, expected: list[str]):
    assert words(line) == expected


def test_completion_script_is_bash(tmp_path: Path):
    tool = tmp_path / "zoft"
    tool.write_text(f'#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {sys.executable} -m zoft "$@"\n')
    tool.chmod(0o755)
    script = (
        f'PATH={tmp_path}:$PATH\n{SCRIPT}\nCOMP_LINE="zoft train estimator=cen" COMP_POINT=25\n'
        'compopt() { :; }; _zoft; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "central"
