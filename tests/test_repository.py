"""What GitHub and pre-commit read is whole: targets, tools, versions and files that it names are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import zoft

ROOT = Path(__file__).resolve().parents[1]
READ_BY_OTHERS = sorted([*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"])


@pytest.mark.parametrize("path", READ_BY_OTHERS, ids=lambda path: path.name)
def test_it_is_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_workflows_run_targets_that_exist_at_the_lowest_python():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    (lowest,) = re.findall(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text())["jobs"].values()
        steps = [step for job in jobs for step in job["steps"]]
        commands = {word for step in steps for word in re.findall(r"make ([a-z-]+)", step.get("run", ""))}
        assert commands
        assert commands <= targets
        assert {step["with"]["python-version"] for step in steps if "setup-python" in step.get("uses", "")} == {lowest}
        assert all("timeout-minutes" in job for job in jobs)


def test_pre_commit_runs_the_tools_of_make_lint():
    lint = re.search(r"^lint:.*?\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    tools = set(re.findall(r"\$\(BIN\)/([\w-]+)", lint[1]))
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in hooks} <= tools


def test_the_citation_has_the_version_and_the_licence():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == zoft.__version__
    assert f'license = "{cited["license"]}"' in (ROOT / "pyproject.toml").read_text()
    assert cited["authors"] == [{"name": "zoft developers"}]


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", ".github/pull_request_template.md"])
def test_paths_in_backticks_are_there(name):
    named = re.findall(r"`((?:zoft|docs|tests|scripts|configs|\.github)/[\w./-]*)`", (ROOT / name).read_text())
    assert not [path for path in named if not (ROOT / path).exists() and "four_point" not in path]


def test_the_picture_of_the_house_has_every_room_in_its_layer():
    from scripts.draw_architecture import layers

    drawn = re.findall(r"<text[^>]*>([^<]+)</text>", (ROOT / "docs" / "architecture.svg").read_text())
    rooms = [room for row in layers() for room in row]
    assert [word for word in drawn if word in rooms] == rooms, "python scripts/draw_architecture.py draws it anew"


@pytest.mark.parametrize("name", ["architecture", "mathematics", "performance", "reliability"])
def test_documents_name_files_that_are_there(name):
    named = re.findall(r"`((?:zoft|docs|tests|scripts|configs)/[\w./-]*)`", (ROOT / "docs" / f"{name}.md").read_text())
    assert not [path for path in named if not (ROOT / path).exists()]
