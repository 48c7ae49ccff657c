"""Every command and the Python example of README.md run as written, cut down to a few rows and queries."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from zoft.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCH = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8")
SMALL = [
    "task.num_train=4",
    "trainer.load_best_model_at_end=false",  # nothing is saved on the way
    "task.num_dev=2",
    "task.num_test=2",
    "trainer.per_device_train_batch_size=2",
    "trainer.eval_steps=2",
    "trainer.logging_steps=1",
    "trainer.save_strategy=no",
]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


QUICKSTART = ["zoft", "train", "config=quickstart"]
COMMANDS = [words for words in commands() if words[0] != "make"]
AFTERWARDS = [words for words in COMMANDS if any("runs/quickstart-seed0" in word for word in words)]
OTHERS = [words for words in COMMANDS if words != QUICKSTART and words not in AFTERWARDS]


def cut_down(words):
    """The same command with few rows and two steps: five queries each in the quickstart, at most two in a method."""
    words = list(words)
    if words == QUICKSTART:
        words.append("output_dir=runs/quickstart-seed0")  # its default; what cuts it down would join the name
    if not {"train", "data", "check"} & set(words):
        return words
    return [*words, *SMALL, "budget.queries=10"]


def in_a_process(words):
    """`zoft` of this environment."""
    assert words[0] == "zoft", words
    return [sys.executable, "-m", "zoft", *words[1:]]


def run(arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader would stand, with a file of their own."""
    rows = [f'"film {i} was {word}",{label}' for i in range(20) for label, word in ((0, "dull"), (1, "superb"))]
    (tmp_path / "reviews.csv").write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_quickstart_and_what_is_done_with_its_run(folder):
    """It in a process of its own, as it is started; what follows it here, where everything is loaded."""
    assert QUICKSTART in COMMANDS
    assert len(AFTERWARDS) >= 4
    run(in_a_process(cut_down(QUICKSTART)), folder)
    assert (folder / "runs" / "quickstart-seed0" / "report.md").is_file()
    for words in AFTERWARDS:
        assert words[0] == "zoft"
        assert main(cut_down(words)[1:]) == 0, shlex.join(words)
    assert {path.name for path in folder.iterdir()} == {"reviews.csv", "runs"}


@pytest.mark.parametrize("words", OTHERS, ids=shlex.join)
def test_command(words, folder):
    assert main(cut_down(words)[1:]) == 0
    assert {path.name for path in folder.iterdir()} <= {"reviews.csv", "runs"}


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_example(number, tmp_path):
    (tmp_path / "example.py").write_text(blocks("python")[number], encoding="utf-8")
    assert "queries" in run([sys.executable, "example.py"], tmp_path)


def test_make_targets_are_what_is_promised():
    targets = [words[1] for words in commands() if words[0] == "make"]
    assert {"train", "test"} <= set(targets)
    for target, needle in (("train", "zoft train config=quickstart"), ("test", "-m pytest")):
        printed = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert needle in printed
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_default_folder_is_what_the_readme_says(tmp_path):
    assert "\noutput_dir: runs/quickstart-seed0\n" in run(
        [sys.executable, "-m", "zoft", "train", "config=quickstart", "--cfg"], tmp_path
    )
    assert not list(tmp_path.iterdir())


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def tables(text):
    """Every table of a page: its header's cells, and first cell -> the others of each row."""
    pairs = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        header, _, *rows = [[cell.strip(" *`") for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        pairs.append((header[1:], {first: rest for first, *rest in rows}))
    return pairs


NAMES = {"AdamW, by backpropagation": "adamw", "MeZO": "mezo", "SubZero": "subzero", "zoft": "zoft"}


def test_what_to_expect_is_what_the_bench_printed():
    (_, expected), *_ = tables(README)
    (budgets, printed), *_ = [one for one in tables(BENCH) if one[0][0] == "sms_spam, 30"]  # with the template
    (_, untrained), *_ = [one for one in tables(BENCH) if "zero_shot" in one[1]]
    assert set(expected) - set(NAMES) == {"a linear probe on the same 256 rows"}
    for title, name in NAMES.items():
        scores = {budget: cell.split()[0] for budget, cell in zip(budgets, printed[name], strict=True)}
        tasks = ("sms_spam", "rotten_tomatoes", "trec")
        assert expected[title] == [f"{scores[f'{task}, 60']} ({scores[f'{task}, 240']})" for task in tasks], title
    assert expected["a linear probe on the same 256 rows"] == [
        cell.split()[0] for cell in untrained["linear_probe"][:6:2]
    ]
