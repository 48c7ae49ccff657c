"""A path as users write it, whatever its folder is called."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.runs import REPOSITORY, data_file, model_folder
from zoft.config import compose
from zoft.lm.data.files import located
from zoft.lm.models.load import load_tokenizer
from zoft.lm.models.names import portable_name
from zoft.use.inference.load import load_named
from zoft.utils.files import at_home

PART = "import dataclasses\nfrom zoft.optimizers.sgd import SGD\n@dataclasses.dataclass\nclass Mine(SGD):\n    pass\n"


def test_a_folder_may_be_called_like_a_home_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert at_home("~/a") == Path("/home/me/a")
    model_folder(Path("~a/model"))
    data_file(Path("~a/data.jsonl"))
    Path("~a/mine.yaml").write_text(f"model: {json.dumps({'name': '~a/model'})}\ntask: {{train: ~a/data.jsonl}}\n")
    Path("~a/part.py").write_text(PART)
    cfg = compose(["config=~a/mine.yaml", "task=custom", "optimizer=~a/part.py:Mine", "method=null"])
    assert (cfg.model.name, cfg.optimizer.name()) == ("~a/model", "part.py:Mine")
    assert compose(["config=~a/mine.yaml", "task=custom"]).method  # the recommended one, for this model
    assert located("~a/data.jsonl").is_file()
    assert load_tokenizer("~a/model") is not None
    assert load_named("~a/model").name == "~a/model"
    assert portable_name("~a/model") == str(tmp_path / "~a" / "model")


def test_no_other_way_is_taken():
    """Path.expanduser is an error where there is no such home."""
    texts = {path: path.read_text() for path in (REPOSITORY / "zoft").rglob("*.py")}
    assert [path for path, text in texts.items() if re.search(r"\.expanduser\(\)", text)] == []
