"""Imports point down: the contracts of [tool.importlinter] in pyproject.toml hold."""

from pathlib import Path

from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[1]


def test_imports_point_down(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))  # lint_imports adds the working directory; give it back afterwards
    failed = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    assert not failed, capsys.readouterr().out
