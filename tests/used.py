"""What a finished run is good for, by every verb that only reads its model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from tests import runs

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}is {% endif %}"
)


def chatting(folder: Path, **fields: Any) -> Path:
    """A folder with ``model``, whose tokenizer has a chat template, and ``data.jsonl``."""
    runs.model_folder(folder / "model", **fields)
    tokenizer = runs.tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    runs.data_file(folder / "data.jsonl")
    return folder


def used(run: Path, folder: Path, capsys: Any, monkeypatch: Any) -> dict[str, Any]:
    """What `zoft predict`, `eval`, `generate` and `chat --compare` say of a run.

    Args:
        run: its folder, of a model that :func:`chatting` made.
        folder: where predictions go; made.
    """
    from zoft.cli import main

    folder.mkdir()
    (folder / "new.jsonl").write_text('{"text": "free prize"}\n{"text": "meet later"}\n{"text": "home win"}\n')

    def said(verb: str, *words: str) -> str:
        capsys.readouterr()
        assert main([verb, f"run={run}", *words]) == 0, capsys.readouterr().err
        return str(capsys.readouterr().out)

    predicted = said("predict", f"data={folder / 'new.jsonl'}", f"output={folder / 'out.jsonl'}", "--json")
    said("eval", f"output_dir={folder / 'eval'}")
    written = said("generate", "prompt=is it free", "max_new_tokens=5")
    monkeypatch.setattr("sys.stdin", io.StringIO("is it\nyes\n"))
    talk = said("chat", "--compare", "max_new_tokens=4")
    assert talk.count("tuned") == 2
    facts = json.loads((folder / "eval" / "evaluation.json").read_text())
    return {"predicted": predicted, "loss": facts["loss"], "written": written, "talk": talk}
