"""`scripts/gpu_check.py`: a part that fails or hangs costs its own row only; without a card it says so."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def check() -> ModuleType:
    where = importlib.util.spec_from_file_location("gpu_check", REPOSITORY / "scripts" / "gpu_check.py")
    module = importlib.util.module_from_spec(where)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    where.loader.exec_module(module)
    return module


def part(check: ModuleType, name: str, code: str, seconds: int = 30, read=None):
    return check.Part(name, seconds, lambda args: [sys.executable, "-S", "-c", code], read or check.read_own)


def test_without_a_card_it_is_one_sentence(check, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main(["--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sees no NVIDIA GPU" in line
    assert "--rehearse" in line
    assert not (tmp_path / "out").exists()


def test_each_part_has_a_row_whatever_becomes_of_it(check, monkeypatch, capsys, tmp_path):
    child = (
        f"import subprocess, time; one = subprocess.Popen(['sleep', '60']); file = open({str(tmp_path / 'pid')!r}, 'w')"
    )
    child += "; file.write(str(one.pid)); file.close(); time.sleep(60)"
    parts = [
        part(check, "hangs", child, seconds=2),
        part(check, "fails", "print('a line'); raise SystemExit('out | of luck')"),
        part(check, "dies", "import os; os.kill(os.getpid(), 9)"),
        part(check, "mumbles", "print('no figures')"),
        part(check, "lacks", """print('{"how": "left out", "what": "no package"}')"""),
        part(check, "works", """print('advice'); print('{"how": "ok", "what": "12 ms"}')"""),
    ]
    monkeypatch.setattr(check, "PARTS", parts)
    began = time.perf_counter()
    assert check.main(["--rehearse", "--output", str(tmp_path)]) == 1
    assert time.perf_counter() - began < 50
    printed = capsys.readouterr().out
    rows = {row["part"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert {name: row["how"] for name, row in rows.items()} == {
        **{"hangs": "stopped", "fails": "failed", "dies": "failed", "mumbles": "failed"},
        **{"lacks": "left out", "works": "ok"},
    }
    assert rows["hangs"]["what"].startswith("not done after 2 s: ")
    assert rows["fails"]["what"].startswith("out | of luck: ")
    assert rows["dies"]["what"].startswith("exit code -9: ")
    assert rows["mumbles"]["what"].startswith("what it left cannot be read")
    assert (rows["lacks"]["what"], rows["works"]["what"]) == ("no package", "12 ms")
    assert "| works | ok | 12 ms |" in printed
    assert "out / of luck" in printed  # a cell of the table
    assert (tmp_path / "table.md").read_text().strip() == printed.strip()
    assert "rehearsed on a CPU" in printed
    grandchild = int((tmp_path / "pid").read_text())
    state = Path(f"/proc/{grandchild}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"  # ended with its part


def test_no_more_time_than_there_is_for_all(check, monkeypatch, tmp_path):
    monkeypatch.setattr(check, "TOTAL_SECONDS", 2)
    monkeypatch.setattr(
        check, "PARTS", [part(check, name, "import time; time.sleep(30)", seconds=60) for name in ("one", "two")]
    )
    assert check.main(["--rehearse", "--output", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["how"] for row in rows] == ["stopped", "stopped"]
    assert sum(row["seconds"] for row in rows) < 25


def test_the_limits_of_all_parts_are_ten_minutes(check):
    assert sum(part.seconds for part in check.PARTS) <= check.TOTAL_SECONDS == 600


def test_what_others_print_is_read(check, tmp_path):
    assert check.read_tests(tmp_path, "....\n== 29 passed, 2 skipped in 3.1s ==\n") == (
        "ok",
        "29 passed, 2 skipped in 3.1s",
    )
    assert check.read_tests(tmp_path, "2 skipped in 3.1s\n")[0] == "failed"  # a check that checked nothing
    case = {"variant": "gaussian", "engine": "layerwise", "peak_mb": {"zoft": 1234.5}}
    case["milliseconds"] = {"mezo": 100.0, "limit": 10.0, "zoft": 20.0}
    skip = {"size": "opt_13b", "variant": "lora", "why": "CUDA out of memory"}
    (tmp_path / "step.json").write_text(json.dumps({"cases": [case], "skipped": [skip]}))
    assert check.read_bench(tmp_path, "") == (
        "ok",
        "gaussian layerwise: 20 ms a step, forwards alone 10, MeZO 100 (5.0x), 1,234 MB above the weights; "
        "lora left out: CUDA out of memory",
    )
    (tmp_path / "step.json").write_text(json.dumps({"cases": [], "skipped": [skip]}))
    assert check.read_bench(tmp_path, "") == ("left out", "lora left out: CUDA out of memory")


def test_a_part_of_its_own_on_the_cpu(check, capsys):
    assert check.main(["--rehearse", "--part", "noise"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["how"] == "ok"
    assert "the eager code's bits; gaussian added" in report["what"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_whole_rehearsed(tmp_path):
    """Every part runs; few bits where bitsandbytes is there."""
    command = [sys.executable, str(REPOSITORY / "scripts" / "gpu_check.py"), "--rehearse", "--patience", "5"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 8
    assert {row["how"] for row in rows if "int8" not in row["part"] and "nf4" not in row["part"]} == {"ok"}
