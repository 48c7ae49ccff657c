"""CONTRIBUTING's worked example, word by word, in a copy of the repository: files are saved, commands are run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
(SECTION,) = re.findall(r"^## Add an estimator in ten minutes\n(.*?)^## ", TEXT, re.S | re.M)
FILES = dict(re.findall(r"Save this as `([\w/.]+)`:\n\n```python\n(.*?)```", SECTION, re.S))
COMMANDS = [shlex.split(line) for block in re.findall(r"```sh\n(.*?)```", SECTION, re.S) for line in block.splitlines()]
COPIED = ("zoft", "configs", "tests", "pyproject.toml", "CONTRIBUTING.md", "docs")
FEW_ROWS = ["task.num_train=4", "task.num_dev=2", "task.num_test=2", "trainer.per_device_train_batch_size=2"]
FEW_ROWS += ["budget.queries=4", "trainer.save_strategy=no"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with the example's files; its caches stay behind."""
    import shutil

    folder = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    for path, text in FILES.items():
        assert not (folder / path).exists()
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return folder


def run(copy: Path, *words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_section_has_what_is_tried_here():
    assert set(FILES) == {"zoft/estimators/four_point.py", "tests/unit/estimators/test_four_point.py"}
    assert [" ".join(words[:2]) for words in COMMANDS] == [
        "zoft ls",
        "zoft show",
        "zoft train",
        "make test",
        "make lint",
    ]


def test_the_component_is_listed_shown_and_trained(copy):
    listing, shown, training = (words for words in COMMANDS if words[0] == "zoft")
    assert "four_point" in run(copy, "-m", *listing)
    assert "estimator.eps=0.001" in run(copy, "-m", *shown)
    assert "4 of 4 queries, 1 steps" in run(copy, "-m", *training, *FEW_ROWS)


def test_its_own_test_and_the_battery_pass(copy):
    (command,) = (words for words in COMMANDS if words[:2] == ["make", "test"])
    chosen = shlex.split(command[2].removeprefix("ARGS="))
    said = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen)
    assert "failed" not in said
    assert int(re.findall(r"(\d+) passed", said)[0]) > 20


def test_it_is_clean(copy):
    run(copy, "-m", "ruff", "check", "--no-cache", *FILES)
    run(copy, "-m", "ruff", "format", "--no-cache", "--check", *FILES)
