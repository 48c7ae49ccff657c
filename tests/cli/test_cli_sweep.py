"""Sweeps: cells are checked before the first one runs, and land in the same folders under every launcher."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hydra.types import RunMode

from tests.runs import arguments, report
from zoft.cli import main
from zoft.config.catalog import choices
from zoft.config.foldername import named_after
from zoft.config.loader import PRIMARY, Loader
from zoft.config.sweep import expand
from zoft.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]

FAKE_RUN = """
# Stands in for zoft.run.train in every process, workers too: Python imports sitecustomize when it starts.
import sys, types
def run(cfg, opening=None, shared=None):
    import json, os
    os.makedirs(cfg.output_dir, exist_ok=True)
    if cfg.seed == 14:
        os._exit(9)
    if cfg.seed == 15 and not os.path.exists(os.path.join(cfg.output_dir, "begun")):
        from zoft.errors import Requeued
        open(os.path.join(cfg.output_dir, "begun"), "w").close()
        raise Requeued
    if cfg.seed == 13:
        from zoft.errors import NonFiniteLossError
        raise NonFiniteLossError("10 losses in a row were not finite")
    row = {"seed": cfg.seed, "estimator": cfg.estimator.name(), "config": cfg.config, "cwd": os.getcwd()}
    with open(os.path.join(cfg.output_dir, "cell.json"), "w") as file:
        json.dump(row, file)
    return {"eval_accuracy": cfg.seed / 10}
module = types.ModuleType("zoft.run.train")
module.run = run
sys.modules["zoft.run.train"] = module
"""


@pytest.fixture
def sweep(tmp_path: Path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FAKE_RUN)
    (tmp_path / "work").mkdir()

    def zoft(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "zoft", "train", "-m", *arguments],
            capture_output=True, text=True, check=False, timeout=240, cwd=tmp_path / "work",
            env={**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{REPOSITORY}"},
        )  # fmt: skip

    return zoft


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_cells_land_in_the_same_folders_under_every_launcher(launcher: str, sweep, tmp_path: Path):
    if launcher != "basic":
        pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    work = tmp_path / "work"
    (work / "mine.yaml").write_text("defaults: [override /estimator: one_sided]\nseed: 5\n")
    done = sweep("config=smoke,mine.yaml", "seed=2,1", "output_dir=out", f"launcher={launcher}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    cells = [f"config={config},seed={seed}" for config in ("mine", "smoke") for seed in (1, 2)]
    written = [name for name in files(work / "out") if not name.startswith(".submitit")]
    assert written == [*(f"{cell}/cell.json" for cell in cells), "multirun.yaml"]
    assert sorted(path.name for path in work.iterdir()) == ["mine.yaml", "out"]
    row = json.loads((work / "out" / "config=mine,seed=2" / "cell.json").read_text())
    assert row == {"seed": 2, "estimator": "one_sided", "config": "mine", "cwd": str(work)}
    assert [line.split() for line in done.stdout.splitlines()[:2]] == [
        ["cell", "eval_accuracy"], ["config=smoke,seed=2", "0.2"],
    ]  # fmt: skip


def test_default_folder(sweep, tmp_path: Path):
    assert sweep("config=smoke", "seed=1,2").returncode == 0
    assert files(tmp_path / "work") == [
        "runs/smoke-sweep/multirun.yaml",
        "runs/smoke-sweep/seed=1/cell.json",
        "runs/smoke-sweep/seed=2/cell.json",
    ]


def test_a_bad_cell_stops_everything_before_it_starts(sweep, tmp_path: Path):
    done = sweep("config=smoke", "estimator=central", "estimator.eps=1e-3,-1")
    assert done.returncode == 2
    assert done.stderr.startswith("zoft: error: estimator.eps must be > 0")
    assert not list((tmp_path / "work").iterdir())


def test_a_failing_cell_does_not_stop_the_others(sweep, tmp_path: Path):
    done = sweep("config=smoke", "seed=13,1", "output_dir=out")
    assert done.returncode == 1
    assert (tmp_path / "work" / "out" / "seed=1" / "cell.json").is_file()
    assert "seed=13" in done.stderr
    assert "not finite" in done.stderr
    assert "failed" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_job_that_dies_loses_no_other_and_one_that_is_told_to_stop_is_queued_again(sweep, tmp_path: Path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    done = sweep("config=smoke", "seed=14,15", "output_dir=out", "launcher=submitit_local")
    assert done.returncode == 1, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[:3]]
    assert rows == [["cell", "eval_accuracy"], ["seed=14", "failed"], ["seed=15", "1.5"]]
    assert "zoft: error: seed=14: its process ended without a result" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "work" / "out" / "seed=15" / "begun").is_file()


def test_a_cell_that_is_told_to_stop_in_this_process_ends_the_sweep_with_75(sweep):
    assert sweep("config=smoke", "seed=15,16", "output_dir=out").returncode == 75
    assert sweep("config=smoke", "seed=15,16", "output_dir=out").returncode == 0  # and the same command goes on


def test_a_launcher_that_starts_nothing_is_one_sentence(sweep, tmp_path: Path):
    done = sweep("config=smoke", "seed=1,2", "output_dir=out", "launcher=submitit_slurm")
    assert done.returncode == 2
    assert "the launcher did not start a single cell: " in done.stderr


def test_cells_of_one_process_load_the_model_once_and_are_the_runs_alone(tmp_path: Path, monkeypatch):
    from zoft.lm.models import load

    loads, real = [], load.load_model_as
    monkeypatch.setattr(load, "load_model_as", lambda *given, **more: loads.append(given) or real(*given, **more))
    words = arguments(tmp_path, tmp_path / "out", "trainable=last_blocks")
    rates = "optimizer.learning_rate=0.001,0.01"
    words = [word for word in words if not word.startswith(("optimizer.learning_rate", "output_dir"))]
    assert main(["train", "-m", *words, rates, f"output_dir={tmp_path / 'out'}"]) == 0
    assert len(loads) == 1
    alone = [*words, "optimizer.learning_rate=0.01", f"output_dir={tmp_path / 'alone'}"]
    assert main(["train", *alone]) == 0
    second = tmp_path / "out" / "optimizer.learning_rate=0.01"  # behind another cell, whose weights the model had
    assert report(tmp_path / "alone")["weights_sha256"] == report(second)["weights_sha256"]
    loads.clear()
    assert main(["train", "-m", *words, rates, f"output_dir={tmp_path / 'out'}"]) == 0  # all are there
    assert not loads


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["seed=1,1"], "the sweep has the cell seed=1 twice"),
        (["task=custom", "task.template=\"a b\",'a b'"], "cell task.template=a-b twice"),
        (["output_dir=a,b"], "output_dir cannot be swept"),
        (["seed=interval(0,1)"], "range(start,stop,step)"),
    ],
)
def test_sweeps_that_cannot_be(given: list[str], expected: str):
    with pytest.raises(UserError) as caught:
        expand(Loader(), given)
    assert expected in str(caught.value)


def test_expansion_and_names():
    cells = expand(
        Loader(), ["seed=range(1,3)", "config=smoke", "estimator=glob([forward_*,one_s*])", "model.name=a/b,c"]
    )
    assert list(cells.values())[:2] == [
        "estimator=forward_gradient,model.name=a-b,seed=1",
        "estimator=forward_gradient,model.name=c,seed=1",
    ]
    assert len(cells) == 8
    assert "/" not in "".join(cells.values())
    assert named_after(["b=2", "a=1"], ["a", "b"]) == named_after(["a=1", "b=2"], ["a", "b"]) == "a=1,b=2"
    assert len(named_after(["a=" + "x" * 500], ["a"])) < 255
    assert named_after(["seed=1"], []) == ""


def test_values_that_differ_in_signs_alone_have_folders_of_their_own():
    """The same ones in every order; cells whose names are their own keep them."""
    words = ["task=custom", 'task.template="a {text}","a {text} ",b', "task.data_seed=-1,1"]
    names = list(expand(Loader(), words).values())
    assert len(set(names)) == 6
    assert all(name.startswith("task.data_seed=1,task.template=") for name in names)
    assert set(names) == set(expand(Loader(), [*words[:2], "task.data_seed=1,-1", "budget.queries=9"]).values())
    assert list(expand(Loader(), ["task=custom", "task.data_seed=-1,1,2"]).values())[2] == "task.data_seed=2"


def test_table():
    from zoft.cli.train import table
    from zoft.config.sweep import CellResult

    text = table(
        [CellResult("seed=1", "x", {"eval_accuracy": 0.5, "note": "n"}), CellResult("seed=2", "x", error="no")]
    )
    assert text == textwrap.dedent("""\
        cell    eval_accuracy
        seed=1  0.5
        seed=2  failed""")


@pytest.mark.parametrize("launcher", choices("launcher"))
def test_every_launcher_composes_and_writes_below_the_output_dir(launcher: str, capsys):
    if launcher == "ray" and importlib.util.find_spec("hydra_plugins.hydra_ray_launcher") is None:
        assert main(["train", "-m", "config=smoke", "seed=1,2", "launcher=ray"]) == 2
        assert "launcher=ray needs a package: pip install 'zoft[ray]'" in capsys.readouterr().err
        return
    loader = Loader()
    loader.sweeping = True
    cfg = loader.load_configuration(PRIMARY, [f"launcher={launcher}", "output_dir=out"], RunMode.RUN)
    assert cfg.hydra.sweep.dir == "out"
    if launcher.startswith("submitit"):
        assert cfg.hydra.launcher.submitit_folder == "out/.submitit/%j"
    with pytest.raises(UserError, match="add -m"):
        Loader().load([f"launcher={launcher}"])
