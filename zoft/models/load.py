"""A model and its tokenizer from a name: a folder, a hub name, or `zoft:NAME` for what `zoft fetch` brings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.errors import UserError
from zoft.lazy import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float16")


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A causal language model in a stated dtype; no code from its repository is run.

    Args:
        name: a local folder, a hub name, or ``zoft:NAME`` for a model that `zoft fetch NAME` brings.
        revision: branch, tag or commit on the hub.
        dtype: float32, bfloat16 or float16; transformers would take the checkpoint's own otherwise.
        attn_implementation: eager, sdpa, ...; None takes transformers' choice.

    Raises:
        UserError: no such folder or hub model, or an unknown dtype.
    """
    import transformers

    if dtype not in DTYPES:
        raise UserError(f"model.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    arguments: dict[str, Any] = {"dtype": getattr(torch, dtype), "revision": revision}
    if attn_implementation:
        arguments["attn_implementation"] = attn_implementation
    return _load(transformers.AutoModelForCausalLM, name, arguments)


def load_tokenizer(name: str, *, revision: str | None = None, as_mezo: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the left, with a padding token.

    Args:
        name: as for :func:`load_model`.
        revision: branch, tag or commit on the hub.
        as_mezo: begin texts for OPT with ``<s>``, as MeZO's published code does, instead of the model's own ``</s>``.
    """
    import transformers

    tokenizer = _load(transformers.AutoTokenizer, name, {"revision": revision})
    if as_mezo and tokenizer.bos_token == "</s>" and tokenizer.convert_tokens_to_ids("<s>") == 0:
        tokenizer = _load(transformers.AutoTokenizer, name, {"revision": revision, "bos_token": "<s>"})
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(loader: Any, name: str, arguments: dict[str, Any]) -> Any:
    place = _place(name)
    try:
        return loader.from_pretrained(place, **arguments)
    except (OSError, ValueError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"could not load model.name={name}: {first_line} "
            "Give a folder with config.json and model.safetensors, or a hub name this machine can reach or has cached"
        ) from error


def _place(name: str) -> str:
    if name.startswith("zoft:"):
        from zoft.data.assets import fetch

        return str(fetch(name.removeprefix("zoft:")))
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    path = Path(name).expanduser()
    if looks_local and not path.is_dir():
        raise UserError(f"there is no model folder {name} (looked in {Path.cwd()})")
    return str(path) if path.is_dir() else name
