"""The examples of docs/python.md run as they stand, in one program from top to bottom."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


def test_every_example_runs(tmp_path: Path):
    pytest.importorskip("trl")
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    tokenizer = "from tests.runs import tiny_tokenizer\n\ntokenizer = tiny_tokenizer()\n"
    (tmp_path / "page.py").write_text("\n\n".join([tokenizer, *blocks]), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line.endswith(" queries")] == ["8 queries"] * 7


def test_a_config_of_any_trainer_takes_both_kinds_of_fields(tmp_path: Path):
    trl = pytest.importorskip("trl")
    from zoft import UserError, ZOConfig, zo_config

    for name in ("SFTConfig", "DPOConfig"):
        config_class = zo_config(getattr(trl, name))
        assert config_class.__name__ == f"ZO{name}"
        args = config_class(output_dir=str(tmp_path), budget_queries=8, max_length=16, report_to=[], use_cpu=True)
        assert isinstance(args, ZOConfig)
        assert isinstance(args, getattr(trl, name))
        assert (args.budget_queries, args.max_length, args.gradient_checkpointing, args.max_grad_norm) == (
            8,
            16,
            False,
            0,
        )
    assert zo_config(ZOConfig) is ZOConfig
    with pytest.raises(UserError, match="takes a class of training arguments"):
        zo_config(int)
