"""The model card of an exported run: what it is, how it was trained, what it cost, how good it is, how it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoft.lm.models.names import is_local, portable_name
from zoft.lm.models.peft._positions import adapter_config, counts_from_zero
from zoft.report.report import complete_facts
from zoft.report.text import fact_rows

_LOADS = {
    "adapter": """from peft import PeftModel
from transformers import AutoModelFor{head}, AutoTokenizer

base = AutoModelFor{head}.from_pretrained("{base}"{more})
model = PeftModel.from_pretrained(base, "{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")""",
    "from 0": """from transformers import AutoModelFor{head}, AutoTokenizer
from zoft.lm.models.peft import load_adapter

# The text begins at position 0, in front of its prefix (MeZO's layout). Plain peft would count it behind the prefix.
model = load_adapter(AutoModelFor{head}.from_pretrained("{base}"{more}), "{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")""",
    "model": """from transformers import AutoModelFor{head}, AutoTokenizer

model = AutoModelFor{head}.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")""",
    "gguf": "llama-cli -m {file} -p 'your prompt'    # llama.cpp",
}
HEADS = {"causal": "CausalLM", "masked": "MaskedLM", "classifier": "SequenceClassification"}
_SETTINGS = (
    *("method", "subspace", "law", "estimator", "response", "num_directions", "eps", "weighting"),
    *("optimizer", "optimizer_settings", "learning_rate", "lr_scheduler_type", "batch_size", "num_train_rows"),
    *("template", "words", "objective", "function", "peft", "trainable", "trainable_settings"),
    *("engine", "dtype", "quantization", "seed"),
)


def write_card(
    folder: Path, facts: dict[str, Any], *, kind: str, head: str, name: str, files: Sequence[str] = ()
) -> Path:
    """Write README.md, a card that the hub reads.

    Args:
        folder: where the export is.
        facts: of the run's report.json.
        kind: ``adapter``, ``model`` or ``gguf``.
        head: a key of :data:`HEADS`.
        name: what the export is loaded by in the card's example.
        files: of a gguf export, its files.
    """
    from huggingface_hub import ModelCard, ModelCardData

    known = {"data": facts.get("task", "data of its own")} | complete_facts(facts)
    base = portable_name(str(known["model"]))
    data = ModelCardData(
        base_model=None if is_local(base) else base,
        library_name={"adapter": "peft", "model": "transformers", "gguf": "gguf"}[kind],
        pipeline_tag={"causal": "text-generation", "masked": "fill-mask"}.get(head, "text-classification"),
        tags=["zoft", "zeroth-order", "forward-only", *([str(known["method"])] if known.get("method") else [])],
    )
    text = "\n\n".join(_parts(known, base, folder, kind, head, name, files))
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")
    path = folder / "README.md"
    card.save(path)
    return path


def _parts(
    known: dict[str, Any], base: str, folder: Path, kind: str, head: str, name: str, files: Sequence[str]
) -> list[str]:
    what = {"adapter": "An adapter for", "model": "A fine-tune of", "gguf": "A fine-tune (GGUF) of"}[kind]
    revision = adapter_config(folder).get("revision")  # of the base that an adapter was trained on
    loads = "from 0" if kind == "adapter" and counts_from_zero(folder) else kind
    more = ", num_labels=..." * (head == "classifier") + (f', revision="{revision}"' if revision else "")
    load = _LOADS[loads].format(head=HEADS[head], base=base, name=name, more=more, file=files[0] if files else "")
    fence = "sh" if kind == "gguf" else "python"
    return [
        f"# {known.get('run_name', 'a run of zoft')}",
        f"{what} `{base}`, trained with forward passes only (zeroth-order) by zoft on `{known['data']}`.",
        *_warnings(known, base, kind),
        *_quantized(known, base, kind),
        f"## Load it\n\n```{fence}\n{load}\n```",
        f"## How good it is\n\n{_table(_results(known))}",
        f"## How it was trained\n\n{_table(_settings(known))}",
        f"## What it cost\n\n{_table(_costs(known))}",
        f"Again, exactly: `{known['command']}`" if "command" in known else "",
    ]


def _warnings(known: dict[str, Any], base: str, kind: str) -> list[str]:
    if is_local(base) and kind == "adapter":  # anything else holds all its weights
        return [
            f"> **Warning.** The base model is a folder of the machine it was trained on (`{base}`). Others can load "
            "this adapter only where they have the same base: say where it is to be had, or export with `--merge`."
        ]
    if str(known["model"]).startswith("zoft:"):
        more = ": on the original weights its results differ. `--merge` exports the weights it was measured with."
        return [
            f"> **Note.** It was trained on the copy of `{base}` that `zoft fetch` makes of a 4-bit file"
            + (more if kind == "adapter" else ", whose weights differ a little from the original's.")
        ]
    return []


def _quantized(known: dict[str, Any], base: str, kind: str) -> list[str]:
    quantization = known.get("quantization")
    if quantization is None or kind != "adapter":
        return []
    return [
        f"> **Note.** It was trained on `{base}` in {quantization}: on the plain weights, as below, its results "
        "differ a little. `--merge` exports plain weights of the values that it was trained on."
    ]


def _results(known: dict[str, Any]) -> list[tuple[str, str]]:
    rows = dict(fact_rows(known))
    names = {"zero-shot": "before training", "final": "after training"}
    names["paired gain" if "paired gain" in rows else "difference"] = "difference"
    metric = known["metric"]
    lines = [(f"{metric}, {label}", rows[name]) for name, label in names.items() if name in rows]
    if "evaluated on" in rows:
        lines.append(("rows", f"{rows['evaluated on']}, held out; intervals are 95 %"))
    return lines


def _settings(known: dict[str, Any]) -> list[tuple[str, str]]:
    known = known | {"words": known.get("read_as", {}).get("words")}
    shown = [(name, known[name]) for name in _SETTINGS if known.get(name) not in (None, {})]
    # without braces or quotes, and the ends of a template's lines as they are typed: a row is one line
    return [(name, repr(said)[1:-1] if isinstance(said, dict | str) else str(said)) for name, said in shown]


def _costs(known: dict[str, Any]) -> list[tuple[str, str]]:
    wanted = ("queries", "steps", "tokens", "wall time", "peak memory", "inference alone", "weights trained")
    rows = dict(fact_rows(known))
    costs = [(name, rows[name]) for name in (*wanted, "weights' SHA-256", "versions") if name in rows]
    return [*costs, ("device", str(known["device"]))] if "device" in known else costs


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|:--|:--|", *(f"| {name} | {value} |" for name, value in rows)])
