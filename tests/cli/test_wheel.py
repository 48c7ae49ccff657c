"""What users install: the wheel carries configs/, and runs from an empty folder without the repository."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

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
    run(bin_ / "zoft", *QUICKSTART, cwd=empty)
    assert (empty / "run" / "metrics.csv").stat().st_size > 0
