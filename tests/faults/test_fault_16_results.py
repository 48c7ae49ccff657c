"""Results name the weights they are of: those of another state of the folder are measured anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.runs import arguments, report
from zoft.config import compose
from zoft.report import report as reports
from zoft.report import results
from zoft.run.train import run

FILES = (results.ZERO_SHOT, results.FINAL, results.REPORT)


class Killed(BaseException):
    pass


def _killed(*_: Any) -> Any:
    raise Killed


def _line(folder: Path, name: str, queries: int) -> Any:
    """A rate at which a few steps more are another accuracy."""
    return compose(arguments(folder, folder / name, f"budget.queries={queries}", "optimizer.learning_rate=5e-2"))


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("direct")
    return run(_line(folder, "out", 48))


def test_fault_16_killed_before_the_report_and_gone_on_with_a_larger_budget(
    direct: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patched:
        patched.setattr("zoft.report.report.write_report", _killed)
        with pytest.raises(Killed):
            run(_line(tmp_path, "out", 24))
    assert json.loads((tmp_path / "out" / results.FINAL).read_text())["weights_sha256"] != direct["weights_sha256"]
    facts = run(_line(tmp_path, "out", 48))
    for name in ("weights_sha256", "final", "zero_shot"):
        assert facts[name] == direct[name]
    final = json.loads((tmp_path / "out" / results.FINAL).read_text())
    assert final["weights_sha256"] == direct["weights_sha256"]
    assert final["accuracy"] == direct["final"]


@pytest.mark.parametrize("name", FILES)
def test_fault_16_a_file_of_another_run_does_not_count(name: str, tmp_path: Path):
    """The folder is put together of two runs' files; the same command makes it whole."""
    facts = run(_line(tmp_path, "out", 24))
    other = run(_line(tmp_path, "other", 48))
    (tmp_path / "out" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    again = run(_line(tmp_path, "out", 24))
    assert again["weights_sha256"] == facts["weights_sha256"] != other["weights_sha256"]
    assert (again["zero_shot"], again["final"]) == (facts["zero_shot"], facts["final"])
    assert report(tmp_path / "out")["weights_sha256"] == facts["weights_sha256"]


@pytest.mark.parametrize("where", ["report.md", "report.json"])
def test_fault_16_death_within_the_report(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The report for people is never older than the one for programs."""
    write = reports.write_atomically

    def dies(path: Path, content: str | bytes) -> None:
        if path.name == where:
            raise Killed
        write(path, content)

    run(_line(tmp_path, "out", 24))
    with monkeypatch.context() as patched:
        patched.setattr(reports, "write_atomically", dies)
        with pytest.raises(Killed):
            run(_line(tmp_path, "out", 48))
    facts = run(_line(tmp_path, "out", 48))
    assert facts["num_steps"] == 24
    assert "| queries | 48" in (tmp_path / "out" / "report.md").read_text()


def test_fault_16_the_best_weights_have_results_of_their_own(tmp_path: Path):
    """The end is that of the best checkpoint, before and after a kill at the very end."""

    class Dies(TrainerCallback):
        def on_train_end(self, *_: Any, **__: Any) -> None:
            raise Killed

    best = ["trainer.load_best_model_at_end=true", "trainer.metric_for_best_model=accuracy"]

    def line(name: str) -> Any:
        return compose(arguments(tmp_path, tmp_path / name, *best, "optimizer.learning_rate=5e-2"))

    whole = run(line("whole"))
    with pytest.raises(Killed):
        run(line("out"), [Dies()])
    facts = run(line("out"))
    assert (facts["weights_sha256"], facts["final"]) == (whole["weights_sha256"], whole["final"])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"accuracy": "high"}', b"\xff\x00" * 50, b"[" * 100_000]
)
def test_fault_25_damaged_results_are_measured_anew(content: bytes, name: str, finished: tuple[Path, dict[str, Any]]):
    folder, facts = finished
    (folder / "out" / name).write_bytes(content)
    again = run(_line(folder, "out", 24))
    assert {k: again[k] for k in ("weights_sha256", "zero_shot", "final")} == {
        k: facts[k] for k in ("weights_sha256", "zero_shot", "final")
    }
    assert results.finished(folder / "out") is not None


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(_line(folder, "out", 24))
