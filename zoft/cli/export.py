"""`zoft export`: a finished run as a folder, a GGUF file, or a repository on the hub."""

from __future__ import annotations

from pathlib import Path

from zoft.errors import UserError
from zoft.utils.words import read_words

KEYS = ("run", "output", "quantize", "push")
FLAGS = ("--merge", "--gguf", "--public")
HELP = """\
usage: zoft export run=DIR [--merge | --gguf [--quantize f32|f16|q8_0|q4_0]] [--push OWNER/NAME [--public]] [output=DIR]

A finished run's model as something that others load, with a model card (README.md) from its report: data, budget,
method with its settings, seed, versions, memory, metric with its interval, how to load it.

(no flag)     the model, or the adapter, as it is: loads with from_pretrained, or PeftModel.from_pretrained
--merge       an adapter is added into its base: one model, that needs no peft
--gguf        one file for llama.cpp; --quantize f16 (default), f32, q8_0 or q4_0. Llama and Qwen models with BPE
--push NAME   upload the export to the hub, private unless --public is given; a login (hf auth login) is needed

An adapter names its base by a name that loads from any folder: a base of yours by its absolute path, with a warning
in the card, the demo's by its name on the hub. output= is DIR/export unless given; it must be empty.

Examples:
  zoft export run=runs/quickstart-seed0
  zoft export run=runs/quickstart-seed0 --gguf --quantize q8_0
  zoft export run=runs/mine --merge --push me/spam-filter
"""
OPTIONS = ("--quantize", "--push")


def command(arguments: list[str]) -> int:
    """Export."""
    words = read_words("export", arguments, keys=KEYS, flags=FLAGS, options=OPTIONS, bare=False)
    asked = words.own | {name.lstrip("-"): text for name, text in words.options.items()}
    overrides, flags = words.rest, words.flags
    _check(asked, flags)
    _refuse_unread(asked["run"], overrides, flags)
    from zoft.cli.train import _quiet
    from zoft.lm.models.load import quiet
    from zoft.use.export.push import push, require_name
    from zoft.use.inference.load import config_of

    _quiet()
    cfg = config_of(asked["run"], overrides)
    if "push" in asked:
        require_name(asked["push"])
    quiet()
    output = asked.get("output") or str(Path(asked["run"]) / "export")
    name = asked.get("push", "")
    if "--gguf" in flags:
        from zoft.use.export.gguf_file import export_gguf

        folder, what = export_gguf(cfg, asked["run"], output, asked.get("quantize", "f16"), name=name), "gguf"
    else:
        from zoft.use.export.folder import export_folder

        folder, what = export_folder(cfg, asked["run"], output, merge="--merge" in flags, name=name)
    files = ", ".join(sorted(path.name for path in folder.iterdir()))
    print(f"{what:<8}{folder}: {files}")
    if "push" in asked:
        print(f"pushed  {push(folder, asked['push'], public='--public' in flags)}")
    return 0


def _refuse_unread(run: str, overrides: list[str], flags: set[str]) -> None:
    """Files that are copied as they are read nothing of the config but the names of model and task."""
    if "--gguf" in flags or ("--merge" in flags and (Path(run) / "model" / "adapter_config.json").is_file()):
        return
    for key in (word.lstrip("+~").partition("=")[0] for word in overrides if ".py" not in word):
        if key not in ("model.name", "model.revision") and not key.startswith("task"):
            raise UserError(
                f"{key} does nothing: files are copied as they are: leave it out, or merge an adapter (--merge)"
            )


def _check(asked: dict[str, str], flags: set[str]) -> None:
    from zoft.errors import did_you_mean
    from zoft.use.export.gguf_file import QUANTIZATIONS

    if not asked.get("run"):
        raise UserError("run= is missing: give the folder of a finished run, zoft export run=runs/mine")
    if {"--merge", "--gguf"} <= flags:
        raise UserError("--gguf merges by itself: leave --merge out")
    if "quantize" in asked and "--gguf" not in flags:
        raise UserError("--quantize is of a GGUF file: add --gguf")
    kind = asked.get("quantize", "f16")
    if kind not in QUANTIZATIONS:
        raise UserError(
            f"--quantize must be one of {', '.join(QUANTIZATIONS)}, got {kind!r}.{did_you_mean(kind, QUANTIZATIONS)}"
        )
    if (output := asked.get("output", "")).endswith((".gguf", ".safetensors")):
        raise UserError(f"output= is a folder, in which files have names of their own: output={Path(output).stem}")
    if "--public" in flags and "push" not in asked:
        raise UserError("--public is of --push NAME: add it, or leave --public out")
