"""A whole run in a second: a tiny model folder, a labelled text file, and the arguments that join them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import models

REPOSITORY = Path(__file__).resolve().parents[1]
WORDS = [
    "free",
    "win",
    "prize",
    "claim",
    "lunch",
    "home",
    "meet",
    "later",
    "is",
    "it",
    "spam",
    "yes",
    "no",
    "call",
    "you",
]


def tiny_tokenizer(more: Sequence[str] = ()) -> Any:
    """One token for each of :data:`WORDS` and of ``more``; the special tokens are those of :mod:`tests.models`."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<bos>", "<pad>", "<eos>", "<unk>", *WORDS, *more])}
    tokenizer = Tokenizer(kinds.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def model_folder(folder: Path, more: Sequence[str] = (), **fields: Any) -> Path:
    """A tiny Llama and its tokenizer, which knows the words ``more`` too, saved."""
    models.tiny_llama(**fields).save_pretrained(folder)
    tiny_tokenizer(more).save_pretrained(folder)
    return folder


def data_file(path: Path, count: int = 48) -> Path:
    """Messages of three words, half of them spam."""
    generator = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            words = WORDS[:4] if number % 2 else WORDS[4:8]
            row = {
                "text": " ".join(generator.choices(words, k=3 + number % 3)),
                "label": "spam" if number % 2 else "ham",
            }
            file.write(json.dumps(row) + "\n")
    return path


def arguments(folder: Path, output_dir: str | Path, *more: str) -> list[str]:
    """The command line of a run of 12 steps with a checkpoint every fourth; ``folder`` gets what it needs.

    A strategy in ``more`` takes the place of that for evaluations or checkpoints, with its steps.

    Its method is composed by hand, of MeZO's parts where ``more`` says nothing: two queries a step.
    """
    if not (folder / "model").exists():
        model_folder(folder / "model")
        data_file(folder / "data.jsonl")
    every = {"eval": ["trainer.eval_steps=4"], "save": ["trainer.save_strategy=steps", "trainer.save_steps=4"]}
    strategies = "".join(word for word in more if "_strategy=" in word)
    return [
        f"model.name={folder / 'model'}",
        "task=custom",
        f"task.train={folder / 'data.jsonl'}",
        "task.template='{text} is it spam'",
        "task.words={ham: 'no', spam: 'yes'}",
        "task.num_train=24",
        "task.num_dev=8",
        "task.num_test=16",
        "budget.queries=24",
        "optimizer.learning_rate=1e-2",
        "trainer.per_device_train_batch_size=4",
        "trainer.logging_steps=2",
        *(word for kind, words in every.items() if f"{kind}_strategy" not in strategies for word in words),
        f"output_dir={output_dir}",
        *([] if any(word.startswith("method=") for word in more) else ["method=null"]),
        *more,
    ]


def environment() -> dict[str, str]:
    """What a subprocess runs under: this repository's zoft, one thread, no hub."""
    return os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def zoft(*words: str, cwd: Path, columns: int = 0, input: str = "") -> subprocess.CompletedProcess[str]:
    """``zoft ...`` in a process of its own, forked from one that has loaded all: a start without its seven seconds.

    Args:
        words: after ``zoft``.
        cwd: where it starts.
        columns: of its terminal, where one is meant.
        input: what it reads.
    """
    from tests.faults.zygote import shared

    env = environment() | ({"COLUMNS": str(columns)} if columns else {})
    with tempfile.TemporaryDirectory() as folder:
        output, errors, asked = (Path(folder, name) for name in ("told", "errors", "asked"))
        asked.write_text(input)
        run = shared().start(list(words), output, errors=errors, input=str(asked), cwd=str(cwd), env=env, anew=True)
        return subprocess.CompletedProcess(words, run.wait(), output.read_text(), errors.read_text())


def zoft_anew(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """``python -m zoft ...`` as a user would start it, imports and all."""
    command = [sys.executable, "-m", "zoft", *words]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=200, check=False)


def report(output_dir: Path) -> dict[str, Any]:
    """The facts of a finished run."""
    return dict(json.loads((output_dir / "report.json").read_text()))
