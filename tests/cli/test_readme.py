"""Every command and the Python example of README.md run as written, cut down to a few rows and queries."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = [
    "task.num_train=8",
    "task.num_dev=4",
    "task.num_test=4",
    "budget.queries=10",
    "trainer.per_device_train_batch_size=4",
    "trainer.eval_steps=2",
    "trainer.logging_steps=1",
    "trainer.save_strategy=no",
]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = [words for words in commands() if words[0] != "make"]
SEVERAL_RUNS = [words for words in COMMANDS if "-m" in words[2:3] or words[1] == "tune"]


def as_run_here(words):
    """`zoft` and `torchrun` of this environment; training runs small."""
    words = list(words)
    if words == ["zoft", "train", "config=quickstart"]:
        words.append("output_dir=runs/quickstart-seed0")  # its default; what cuts it down would join the name
    small = SMALL if {"train", "tune", "data"} & set(words) and "--help" not in words else []
    small = [*small, *["budget=2"] * (words[1] == "tune")]
    if words[0] == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:], *small]
    assert words[0] == "zoft", words
    return [sys.executable, "-m", "zoft", *words[1:], *small]


def run(arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def with_reviews(folder):
    """Where a reader would stand, with a file of their own."""
    rows = [f'"film {i} was {word}",{label}' for i in range(20) for label, word in ((0, "dull"), (1, "superb"))]
    (folder / "reviews.csv").write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def after_quickstart(tmp_path_factory):
    """Where the quickstart has been run."""
    folder = with_reviews(tmp_path_factory.mktemp("quickstart"))
    run(as_run_here(["zoft", "train", "config=quickstart"]), folder)
    return folder


@pytest.mark.parametrize(
    "words",
    [pytest.param(words, marks=[pytest.mark.slow] * (words in SEVERAL_RUNS)) for words in COMMANDS],
    ids=[shlex.join(words) for words in COMMANDS],
)
def test_command(words, tmp_path, request):
    if any("runs/quickstart-seed0" in word for word in words):
        folder = request.getfixturevalue("after_quickstart")
    elif words == ["zoft", "train", "config=quickstart"]:  # has been run there
        assert (request.getfixturevalue("after_quickstart") / "runs" / "quickstart-seed0" / "report.md").is_file()
        return
    else:
        folder = with_reviews(tmp_path)
    run(as_run_here(words), folder)
    assert {path.name for path in folder.iterdir()} <= {"reviews.csv", "runs"}


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_example(number, tmp_path):
    (tmp_path / "example.py").write_text(blocks("python")[number], encoding="utf-8")
    assert "queries" in run([sys.executable, "example.py"], tmp_path)


def test_make_targets_are_what_is_promised():
    targets = [words[1] for words in commands() if words[0] == "make"]
    assert {"train", "test"} <= set(targets)
    for target, needle in (("train", "zoft train config=quickstart"), ("test", "-m pytest")):
        told = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert needle in told
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
