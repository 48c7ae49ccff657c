"""A model and its tokenizer from a name: a folder, a hub name, or `zoft:NAME` for what `zoft fetch` brings."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.errors import UserError
from zoft.lm.hub import not_here, not_waited_for, out_of_reach
from zoft.lm.models.agreement import agree, name_classes, require_classes
from zoft.lm.models.device_map import know_device_map, placing_arguments, require_in_memory
from zoft.lm.models.files import INSTEAD, check_files, placed
from zoft.lm.models.quantized import is_quantized, keep_codes_as_loaded, loading_arguments
from zoft.utils.lazy import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
DTYPES = ("float32", "bfloat16", "float16")

KINDS = {"causal": "causal language model", "masked": "masked language model", "classifier": "sequence classifier"}
"""Kinds of models that tasks need, in words."""

_COUNT_FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "data2vec-text", "longformer", "mpnet")
"""Families whose learned positions begin behind that of their padding token."""
_NO_LIMIT = 1 << 24
"""What a tokenizer that knows of no limit says is beyond it."""


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    quantization: str | None = None,
    device_map: Any = None,
) -> PreTrainedModel:
    """A model in a stated dtype, of the class its config names; no code from its repository is run.

    A config that names a class without a loss (``BertModel``), or none, is loaded as a causal language model.

    Args:
        name: a local folder, a hub name, or ``zoft:NAME`` for a model that `zoft fetch NAME` brings.
        revision: branch, tag or commit on the hub.
        dtype: float32, bfloat16 or float16; transformers would take the checkpoint's own otherwise.
        attn_implementation: eager, sdpa, ...; None takes transformers' choice.
        quantization: the weights in few bits: a member of :data:`zoft.lm.models.quantized.QUANTIZATIONS`, or None.
        device_map: over which devices: see :func:`zoft.lm.models.device_map.check_device_map`; None: the CPU.

    Raises:
        UserError: no such folder or hub model, one without some of its weights, or an unknown dtype.
    """
    import transformers

    arguments = _arguments(name, revision, dtype, attn_implementation, quantization, device_map)
    return _load_whole(class_of(name, revision) or transformers.AutoModelForCausalLM, name, arguments)


def quiet() -> None:
    """transformers says errors alone, and shows no bar while it loads."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def as_model(model: Any, peft_config: Any, seed: int) -> Any:
    """The model to train; None where ``model_init`` makes it.

    Args:
        model: a model, or a name or folder to load one from.
        peft_config: of the adapter to put on it, or None.
        seed: of the adapter's first weights; torch's global random state is set to it.

    Raises:
        UserError: an adapter that cannot be trained.
    """
    if isinstance(model, str):
        model = load_model(model)
    if peft_config is not None:
        if model is None:
            raise UserError("model_init= and peft_config= do not go together: put the adapter on inside model_init")
        if getattr(peft_config, "prefix_projection", False):
            raise UserError("prefix_projection=True cannot be resumed (peft saves the projected prefix): leave it off")
        from peft import PeftConfig, get_peft_model

        from zoft.lm.models.peft.base import without_old_names

        if not isinstance(peft_config, PeftConfig):
            raise UserError(f"peft_config takes a config of peft's, e.g. peft.LoraConfig(r=8), got {peft_config!r}")
        # an adapter draws its first weights from torch's global generator
        torch.manual_seed(seed)
        with without_old_names():
            model = get_peft_model(model, peft_config)
    return model


def load_model_as(
    kind: str,
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    quantization: str | None = None,
    device_map: Any = None,
    num_labels: int = 2,
    labels: Sequence[str] = (),
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """A model of the kind that a task needs; a wrong one is refused before its weights are read.

    Args:
        kind: a key of :data:`KINDS`.
        name: as for :func:`load_model`.
        revision: branch, tag or commit on the hub.
        dtype: float32, bfloat16 or float16.
        attn_implementation: eager, sdpa, ...; None takes transformers' choice.
        quantization: as for :func:`load_model`.
        device_map: as for :func:`load_model`.
        num_labels: classes of a classifier; a model that is none gets a fresh head for them.
        labels: their names, in the task's order.
        seed: of the fresh head; the global random state is left as it was.
        tokenizer: what rows will be encoded by: the model's configs get its special tokens; None leaves them.

    Raises:
        UserError: a model of another kind, a classifier with other classes, or a tokenizer that does not go with it.
    """
    given: dict[str, Any] = {
        "revision": revision,
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "quantization": quantization,
        "device_map": device_map,
    }
    model = _load_as(kind, name, given, num_labels, labels, seed)
    if tokenizer is not None:
        agree(model, tokenizer, name)
    return model


def _load_as(
    kind: str, name: str, given: dict[str, Any], num_labels: int, labels: Sequence[str], seed: int
) -> PreTrainedModel:
    if kind == "classifier":
        return _load_classifier(name, num_labels, labels, seed, **given)
    if kind == "masked":
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

        # before the weights are read: another class would load with a random head
        cls = class_of(name, given["revision"])
        if cls is None or cls.__name__ not in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
            raise UserError(
                f"model.name={name} is {'no known model' if cls is None else f'a {cls.__name__}'}, no masked language "
                "model, and the task asks one for the word at its mask: give one (any ...ForMaskedLM), e.g. "
                "model.name=FacebookAI/roberta-large"
            )
    model = load_model(name, **given)
    if kind == "causal":
        require_causal_lm(model, name)
    return model


def _load_classifier(
    name: str,
    num_labels: int,
    labels: Sequence[str],
    seed: int,
    *,
    revision: str | None,
    dtype: str,
    attn_implementation: str | None,
    quantization: str | None,
    device_map: Any,
) -> PreTrainedModel:
    import transformers

    cls = class_of(name, revision)
    arguments = _arguments(name, revision, dtype, attn_implementation, quantization, device_map)
    has_head = cls is not None and cls.__name__.endswith("ForSequenceClassification")
    if has_head:
        # the config as it was saved: transformers fills in defaults for what it lacks
        with not_waited_for():
            said, _ = transformers.PretrainedConfig.get_config_dict(placed(name), revision=revision)
        require_classes(name, said, num_labels, labels)
    # the head's first numbers come from the seed, and the caller's random state is not moved
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        arguments["num_labels"] = num_labels
        model = _load_whole(transformers.AutoModelForSequenceClassification, name, arguments, fresh_head=not has_head)
    if not has_head:
        name_classes(model, labels)
    return model


def require_causal_lm(model: PreTrainedModel, name: str) -> None:
    """Refuse a model that does not score texts from left to right, as ranking options needs."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if type(model).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise UserError(
            f"model.name={name} is a {type(model).__name__}, no causal language model, and a task ranks its options by "
            "one: give a causal one (any ...ForCausalLM), or train this model from Python with ZOTrainer"
        )


def class_of(name: str, revision: str | None) -> Any:
    """The class with a loss that the model's config names; None where it names none."""
    import transformers

    place = placed(name)
    if Path(place).is_dir():
        check_files(name, Path(place))
    config = _config_of(place, revision)
    if config is None:
        return None
    named: Any = getattr(transformers, str(next(iter(config.architectures or ()), "")), None)
    is_model = inspect.isclass(named) and issubclass(named, transformers.PreTrainedModel)
    # a class without labels has no loss
    return named if is_model and "labels" in inspect.signature(named.forward).parameters else None


def _config_of(place: str, revision: str | None) -> Any:
    import transformers

    try:
        with not_waited_for():
            return transformers.AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
    except UserError:
        raise
    except Exception:  # an adapter's folder, nothing at all, or a damaged one: loading says which
        return None


def tokens_taken(name: str, revision: str | None, tokenizer: Any) -> int | None:
    """Tokens of a row that a model is made for, by its config and its tokenizer; None where neither says."""
    text: Any = getattr(_config_of(placed(name), revision), "get_text_config", lambda: None)()
    said = [getattr(text, key, None) for key in ("max_position_embeddings", "n_positions", "max_sequence_length")]
    if getattr(text, "model_type", "") in _COUNT_FROM_PADDING:
        # RoBERTa's positions begin behind the padding token's: that many fewer are for tokens
        said = [size - text.pad_token_id - 1 for size in said if size]
    return min((size for size in [*said, tokenizer.model_max_length] if size and 0 < size < _NO_LIMIT), default=None)


def load_tokenizer(
    name: str, *, revision: str | None = None, as_mezo: bool = False, padding_side: str = "left"
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token.

    Args:
        name: as for :func:`load_model`.
        revision: branch, tag or commit on the hub.
        as_mezo: begin texts for OPT with ``<s>``, as MeZO's published code does, instead of the model's own ``</s>``.
        padding_side: left, where texts are continued, or right.

    Raises:
        UserError: no tokenizer, or one without a token to pad with.
    """
    import transformers

    tokenizer = _load(transformers.AutoTokenizer, name, {"revision": revision})
    _note_two_templates(name)
    # OPT's tokenizer names </s> as the beginning of texts; MeZO's code trained with <s>
    if as_mezo and tokenizer.bos_token == "</s>" and tokenizer.convert_tokens_to_ids("<s>") == 0:
        tokenizer = _load(transformers.AutoTokenizer, name, {"revision": revision, "bos_token": "<s>"})
    tokenizer.padding_side = padding_side
    # padded with the token that ends a text: it is masked, so that its value does not matter
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"the tokenizer of model.name={name} has neither a padding token nor one that ends a text: name one as "
            "pad_token in its tokenizer_config.json"
        )
    return tokenizer


def _note_two_templates(name: str) -> None:
    """A folder may hold two chat templates; transformers reads the file of its own."""
    folder = Path(placed(name))
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if not file.is_file() or not config.is_file():
        return
    try:
        other = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return
    if isinstance(other, str) and other.strip() != file.read_text(encoding="utf-8").strip():
        log.warning("%s is the chat template that is read; tokenizer_config.json beside it has another", file)


def _arguments(
    name: str,
    revision: str | None,
    dtype: str,
    attn_implementation: str | None,
    quantization: str | None,
    device_map: Any,
) -> dict[str, Any]:
    """What ``from_pretrained`` is given beside the name."""
    if dtype not in DTYPES:
        raise UserError(f"model.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    stored = None if quantization is None else _stored_quantization(name, revision)
    arguments = {"dtype": getattr(torch, dtype), "revision": revision}
    arguments |= loading_arguments(quantization, dtype, stored)
    arguments |= placing_arguments(device_map)
    if attn_implementation:
        arguments["attn_implementation"] = attn_implementation
    return arguments


def _stored_quantization(name: str, revision: str | None) -> dict[str, Any] | None:
    """How a checkpoint says that it is quantised; None where it does not, or where there is none to read."""
    import transformers

    try:
        with not_waited_for():
            config, _ = transformers.PretrainedConfig.get_config_dict(placed(name), revision=revision)
    except OSError:  # loading says what is wrong
        return None
    return config.get("quantization_config")


def _load(loader: Any, name: str, arguments: dict[str, Any]) -> Any:
    place = placed(name)
    if Path(place).is_dir():
        check_files(name, Path(place))
    try:  # False, not the default: that asks on the terminal whether to run the repository's code
        with not_waited_for():
            return loader.from_pretrained(place, trust_remote_code=False, **arguments)
    except UserError:
        raise
    except Exception as error:  # the files are the user's: whatever they bring down is theirs to mend
        first_line = next(iter(str(error).splitlines()), "") or type(error).__name__
        if "device_map" in first_line:  # a module that the map leaves out, or that the model does not have
            raise UserError(f"model.device_map does not go with model.name={name}: {first_line}") from error
        if not Path(place).is_dir() and isinstance(error, OSError) and out_of_reach():  # cached in part, or elsewise
            raise not_here(f"model.name={name}", INSTEAD) from error
        raise UserError(
            f"could not load model.name={name}: {first_line} "
            "Give a folder with config.json and model.safetensors, or a hub name this machine can reach or has cached"
        ) from error


def _load_whole(loader: Any, name: str, arguments: dict[str, Any], *, fresh_head: bool = False) -> Any:
    """A model none of whose weights are drawn anew, which transformers only logs; a head that was asked for may be."""
    asked = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # the sentence below is said instead
    model, report = _load(loader, name, arguments | asked)
    reshaped = {key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]}
    lost = sorted({*report["missing_keys"], *reshaped})
    if fresh_head:
        # of a fresh head the body must be whole; its own weights are drawn
        body = f"{model.base_model_prefix}."
        lost = [key for key in lost if key.startswith(body) and ".pooler." not in key]
    if lost:
        shown = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
        raise UserError(
            f"model.name={name} lacks {len(lost)} of the tensors of a {type(model).__name__}, or has them in another "
            f"shape ({shown}), and they would be random: give a folder whose files are whole, or another model"
        )
    know_device_map(model, arguments.get("device_map"))
    require_in_memory(model, name)
    # bitsandbytes packs its codes anew in the first forward: they are compared as they were loaded
    if is_quantized(model):
        keep_codes_as_loaded(model)
    return model
