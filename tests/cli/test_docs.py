"""The pages of docs/: each has its place in the index, names verbs and configs that there are, and its examples run."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from zoft.cli import main
from zoft.cli.verbs import VERBS
from zoft.config import compose

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def commands(page: Path) -> list[str]:
    """Lines of shell blocks and indented ones that begin with zoft."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"\\\n\s*", "", text)  # a line that goes on
    blocks = "\n".join(re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.S) + re.findall(r"^ {4}(.*)", text, re.M))
    return [line for line in blocks.splitlines() if line.startswith("zoft ") and "`" not in line]


def test_every_page_has_one_place_in_the_index():
    listed = re.findall(r"^(\w+)$", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(page.stem for page in PAGES if page.stem != "index")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_name_verbs_that_there_are(page: Path):
    for line in commands(page):
        verb = line.split()[1]
        assert verb in VERBS or verb.startswith("-"), line


@pytest.mark.parametrize("name", ["quickstart", "own_part", "before"])
def test_trainings_compose(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / f"{name}.md"
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        Path("my_est.py").write_text(block, encoding="utf-8")
    split = [shlex.split(line, comments=True) for line in commands(page)]
    trainings = [words[2:] for words in split if words[1] in ("train", "check", "estimate")]
    assert trainings
    for words in trainings:
        settings = [word for word in words if "=" in word and not word.startswith(("config=runs/", "seed="))]
        compose(settings)


def test_the_part_of_ten_minutes_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "own_part.md").read_text(encoding="utf-8")
    Path("my_est.py").write_text(re.findall(r"```python\n(.*?)```", page, re.S)[0], encoding="utf-8")
    assert main(["show", "estimator=./my_est.py:Wide"]) == 0
    assert "estimator.eps=0.01" in capsys.readouterr().out


def test_recipes_are_read_by_what_reads_them(tmp_path: Path):
    recipes = ROOT / "recipes"
    subprocess.run(["bash", "-n", str(recipes / "slurm.sh")], check=True)
    sky = yaml.safe_load((recipes / "sky.yaml").read_text())
    assert compose(sky["envs"]["ARGS"].split()).config == "quickstart"
    assert [mount["mode"] for mount in sky["file_mounts"].values()] == ["MOUNT_CACHED"]  # MOUNT takes no appending
    assert all("conda activate zoft" in sky[part] for part in ("setup", "run"))  # its images have an older Python
    dockerfile = (recipes / "Dockerfile").read_text()
    assert "HF_HOME=/cache/" in dockerfile
    for source in re.findall(r"^COPY (.+) \S+$", dockerfile, re.M):
        assert all((ROOT / name).exists() for name in source.split())


def test_a_job_that_asks_to_be_requeued_is(tmp_path: Path):
    """recipes/slurm.sh with stand-ins: zoft leaves with 75 at SIGUSR1, and the job goes back into the queue."""
    (tmp_path / "zoft").write_text(
        "#!/bin/bash\ntrap 'sleep 0.2; exit 75' USR1\necho begun\nwhile :; do sleep 0.05; done\n"
    )
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$@" > requeued\n')
    for name in ("zoft", "scontrol"):
        (tmp_path / name).chmod(0o755)
    job = subprocess.Popen(
        ["bash", str(ROOT / "recipes" / "slurm.sh"), "config=quickstart"],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None
    assert job.stdout.readline() == "begun\n"
    job.send_signal(10)
    assert job.wait(timeout=30) == 75
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
