"""`zoft doctor`: one line a check, the same for machines, and an exit code that a script can believe."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from tests.runs import zoft
from zoft.cli import doctor, main
from zoft.cli.completion import words
from zoft.noise.kernels import choice, cpu


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process that has not chosen its noise yet, an empty cache, and little patience."""
    for name, value in (("ACTIVE", {}), ("_why", {}), ("_broken", set())):
        monkeypatch.setattr(choice, name, value)
    monkeypatch.delenv("ZOFT_COMPILE", raising=False)
    monkeypatch.setenv("ZOFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "_SECONDS", 0.01)
    return tmp_path / "cache"


def asked(capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, dict]:
    assert main(["doctor", "--json"]) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    answer = json.loads(captured.out)
    assert answer["ok"] is (code == 0)
    return {check["name"].strip(): check for check in answer["checks"]}


def test_table(capsys):
    assert main(["doctor"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[-1] == "All is well."
    names = [line[4:22].strip() for line in lines[:-2]]
    assert names[:7] == ["python", "torch", *doctor.PACKAGES]
    assert {"noise on cpu", "gaussian", "rademacher", "cache", "disk"} <= set(names)
    assert all(line[2] in "✓–" for line in lines[:-2])
    assert max(map(len, lines)) <= 120


def test_json(capsys, fresh):
    checks = asked(capsys)
    assert checks["torch"]["values"] == {
        "version": metadata.version("torch"),
        "threads": torch.get_num_threads(),
        "cuda_devices": [],
    }
    assert checks["transformers"]["values"]["version"] == metadata.version("transformers")
    for law in ("gaussian", "rademacher"):
        assert 0 < checks[law]["values"]["nanoseconds_per_element"] < 1000
    assert checks["cache"]["values"] == {"folder": str(fresh), "writable": True}
    assert checks["disk"]["values"]["free_bytes"] > 0


@pytest.mark.skipif(cpu.compiler() is None, reason="no C++ compiler here")
def test_noise_is_compiled_compared_and_kept(capsys, fresh):
    checks = asked(capsys)
    assert checks["noise on cpu"]["values"]["how"] == "compiled"
    assert checks["same bits"]["values"] == {"same": True}
    assert cpu.library().parent == fresh / "compiled"
    assert cpu.library().exists()


def test_without_a_compiler_it_says_so_and_all_is_well(capsys, monkeypatch):
    monkeypatch.setattr(cpu.shutil, "which", lambda name: None)
    checks = asked(capsys)
    assert checks["noise on cpu"]["state"] == "note"
    assert checks["noise on cpu"]["text"] == "eager: there is no C++ compiler: install g++, or set CXX"
    assert "same bits" not in checks
    assert checks["gaussian"]["values"]["how"] == "eager"


def test_noise_as_the_user_wants_it(capsys, monkeypatch, fresh):
    monkeypatch.setenv("ZOFT_COMPILE", "never")
    assert asked(capsys)["noise on cpu"]["text"] == "eager: ZOFT_COMPILE=never"
    assert asked(capsys)["noise on cpu"]["state"] == "ok"
    assert not fresh.exists()
    monkeypatch.setenv("ZOFT_COMPILE", "maybe")
    assert main(["doctor", "--json"]) == 2
    assert "auto, always, never" in capsys.readouterr().err


@pytest.mark.skipif(cpu.compiler() is None, reason="no C++ compiler here")
def test_other_bits_are_a_failure(capsys, monkeypatch):

    from zoft.noise import source

    real = source.agrees
    answers = iter([True, False])  # right when it was chosen, and no longer
    monkeypatch.setattr(source, "agrees", lambda *a, **k: real(*a, **k) and next(answers))
    assert asked(capsys, 1)["same bits"]["state"] == "failed"


def test_a_missing_package_is_a_cross_and_exit_code_1(capsys, monkeypatch):
    real = metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert main(["doctor"]) == 1
    table = capsys.readouterr().out
    assert "✗ peft                not installed: pip install peft" in table
    assert table.endswith("Not well: peft.\n")
    assert asked(capsys, 1)["peft"]["state"] == "failed"


def test_a_version_that_zoft_does_not_ask_for_is_a_cross(capsys, monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: ["datasets>=9999", "peft>=0.1", 'torch>=9; extra == "x"'])
    checks = asked(capsys, 1)
    assert checks["datasets"]["text"] == f"{metadata.version('datasets')}: zoft asks for datasets>=9999"
    assert checks["peft"]["state"] == checks["torch"]["state"] == "ok"


def test_torch_that_cannot_be_imported_is_a_cross_and_the_rest_is_checked(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    checks = asked(capsys, 1)
    assert checks["torch"]["state"] == "failed"
    assert checks["cache"]["state"] == "ok"


def test_a_cache_that_cannot_be_written_is_a_cross(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ZOFT_CACHE", str(tmp_path / "file"))
    cache = asked(capsys, 1)["cache"]
    assert cache["state"] == "failed"
    assert "set ZOFT_CACHE to another folder" in cache["text"]


def test_unknown_arguments(capsys):
    assert main(["doctor", "--jsn"]) == 2
    assert "Did you mean --json?" in capsys.readouterr().err


def test_signs_that_any_terminal_can_print(monkeypatch):
    class Terminal:
        encoding = "ascii"

    monkeypatch.setattr(sys, "stdout", Terminal())
    signs = [doctor.line(doctor.Check("a", state, "b"))[2] for state in ("ok", "failed", "note")]
    monkeypatch.undo()
    assert signs == ["+", "x", "-"]


def test_help_and_completion(capsys):
    assert main(["doctor", "--help"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("usage: zoft doctor [--json]")
    assert "ZOFT_COMPILE" in output
    assert words("zoft doctor -") == ["--json"]
    assert words("zoft do") == ["doctor"]


def test_from_the_command_line(tmp_path):
    done = zoft("doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout)["ok"] is True
