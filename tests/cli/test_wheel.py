"""What users install: the wheel carries configs/, and runs from an empty folder without the repository."""

import os
import shlex
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.runs import data_file

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ["train", "config=quickstart", "budget.queries=16", "output_dir=run"]
FEW_ROWS = ["task.num_train=8", "task.num_dev=2", "task.num_test=2"]  # the real run scores hundreds, for minutes
FEW_ROWS += ["trainer.per_device_train_batch_size=2", "trainer.save_strategy=no"]


def run(*command, cwd, **env):
    """Run to the end, fail with what it printed, and return its standard output."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("zoft-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder that holds zoft as the wheel brings it, and nothing else; its dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--target", folder, wheel, cwd=folder)
    return folder


@pytest.fixture
def empty(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def python(installed, cwd, *arguments):
    return run(sys.executable, *arguments, cwd=cwd, PYTHONPATH=str(installed))


def test_wheel_holds_every_config_and_nothing_of_the_repository(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"zoft/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert {"zoft/configs/train.yaml", "zoft/configs/config/quickstart.yaml"} <= shipped
    assert shipped <= names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"zoft"}


def test_installed_copy_is_the_one_that_runs(installed, empty):
    where = python(installed, empty, "-c", "import zoft; print(zoft.__file__)").strip()
    assert Path(where) == installed / "zoft" / "__init__.py"


def test_help_and_composed_config_from_an_empty_folder(installed, empty):
    assert "train" in python(installed, empty, "-m", "zoft", "--help")
    assert "queries" in python(installed, empty, "-m", "zoft", "train", "config=smoke", "--cfg")
    assert list(empty.iterdir()) == []


def test_console_script(installed, empty):
    assert "train" in run(installed / "bin" / "zoft", "--help", cwd=empty, PYTHONPATH=str(installed))


def test_trains_the_quickstart_from_an_empty_folder(installed, empty):
    python(installed, empty, "-m", "zoft", *QUICKSTART, *FEW_ROWS)
    assert [path.name for path in empty.iterdir()] == ["run"]
    assert (empty / "run" / "metrics.csv").stat().st_size > 0


VERBS = {
    "data show config=classify task.train=mail.jsonl model.name=base": "spam",
    "check {words}": "Ready",
    "estimate {words}": "this run",
    "train {words} output_dir=runs/a": "chosen  method=zoft, as none was named",
    "train {words} seed=1 output_dir=runs/b peft=lora": "verdict",
    "eval run=runs/a": "accuracy",
    "predict run=runs/a data=new.csv": "new.csv",
    "generate run=runs/a prompt=free max_new_tokens=2": "",
    "chat run=runs/a --compare max_new_tokens=2": "",
    "plot runs/a": "curve.png",
    "compare runs/a runs/b": "runs/compare",
    "journal show runs/a": "steps",
    "replay runs/a --output runs/again": "again",
    "export run=runs/a output=whole": "whole",
    "export run=runs/b output=adapter": "adapter",
    "export run=runs/b output=merged --merge": "merged",
    "export run=runs/a output=file --gguf": "gguf",
    "train {words} output_dir=runs/sweep -m seed=0,1 budget.queries=6": "compare.md",
    "diff runs/a runs/b": "differ in",
    "show method/zoft": "whiten",
    "show trainer": "per_device_train_batch_size",
    "ls methods": "zoft",
    "doctor": "torch",
    "version": "zoft",
}
"""A verb with its words -> what it prints; in this order, as later ones use what earlier ones left."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_verb_from_an_empty_folder(installed, empty):
    from tests.models import tiny_llama
    from tests.unit.use.export.test_export import pairs_tokenizer

    tokenizer = pairs_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 600}
    tiny_llama(**sizes).save_pretrained(empty / "base")
    tokenizer.save_pretrained(empty / "base")
    data_file(empty / "mail.jsonl")
    (empty / "new.csv").write_text("text\nyou call no\nfree\n")
    words = (
        "config=classify task.train=mail.jsonl model.name=base budget.queries=12 trainer.per_device_train_batch_size=4"
    )
    for verb, said in VERBS.items():
        command = shlex.split(verb.format(words=words))
        done = subprocess.run(
            [sys.executable, "-m", "zoft", *command],
            cwd=empty,
            env={**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            input="free\n" if verb.startswith("chat") else "",
            capture_output=True,
            text=True,
            check=False,
        )
        expected = 1 if verb.startswith("diff") else 0  # the two runs differ, and diff says so by its exit code too
        assert done.returncode == expected, f"zoft {verb}: {done.stdout[-1000:]}\n{done.stderr[-2000:]}"
        assert said in done.stdout + done.stderr, f"zoft {verb} printed {done.stdout[-1500:]}"
    names = {"base", "mail.jsonl", "new.csv", "runs", "whole", "adapter", "merged", "file"}
    assert {path.name for path in empty.iterdir()} == names, "nothing is written elsewhere"
    loads = (
        "from transformers import AutoModelForCausalLM as A; print(A.from_pretrained('empty/{}').config.hidden_size)"
    )
    for folder in ("whole", "merged"):
        assert run(sys.executable, "-c", loads.format(folder), cwd=empty.parent).strip().endswith("32")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_trains_in_an_environment_that_holds_the_wheel_alone(wheel, empty, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    bin_ = tmp_path / "venv" / "bin"
    pip = [bin_ / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    pip += ["-c", ROOT / "constraints.txt"]
    run(*pip, "--upgrade", "pip", cwd=empty)
    run(*pip, "torch", cwd=empty)  # first, so that no other package asks for its newest build
    run(*pip, "--build-constraint", ROOT / "constraints.txt", wheel, cwd=empty)
    run(bin_ / "zoft", *QUICKSTART, *FEW_ROWS, cwd=empty)
    assert (empty / "run" / "metrics.csv").stat().st_size > 0
