"""A model and its tokenizer brought to agree on special tokens, sizes and classes; what cannot agree is refused."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zoft.errors import UserError
from zoft.utils.lazy import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
_UNNAMED = re.compile(r"LABEL_\d+")
_IDS = ("input_ids", "prompt_ids", "word_ids")


def align(model: Any, tokenizer: Any) -> None:
    """Give the model's configs the tokenizer's special tokens, as the Trainer does when training begins.

    A classifier finds a text's last token by ``config.pad_token_id``, and batches are padded with the tokenizer's.
    Before training and after it must see the same. Another library's model or processor is left as it is.
    """
    from transformers import PreTrainedTokenizerBase
    from transformers.trainer_utils import align_special_tokens

    if isinstance(tokenizer, PreTrainedTokenizerBase) and hasattr(getattr(model, "config", None), "get_text_config"):
        align_special_tokens(model, tokenizer)


def agree(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """As :func:`align`, for a model that was just loaded; what cannot be one value is refused.

    Args:
        model: its configs are changed.
        tokenizer: with a padding token.
        name: what the model was asked for, for the message.

    Raises:
        UserError: embeddings that lack the padding token, or positions that are counted by another one.
    """
    pad: Any = tokenizer.pad_token_id
    size = _vocabulary(model)
    if size is not None and pad >= size:
        raise UserError(
            f"model.name={name}: its tokenizer pads with {tokenizer.pad_token!r} (token {pad}), and the model has "
            f"embeddings for {size:,} tokens, 0 to {size - 1:,}: name one that it has as pad_token in "
            "tokenizer_config.json, or resize the embeddings and save the model"
        )
    counted = next((m.padding_idx for m in model.modules() if hasattr(m, "create_position_ids_from_input_ids")), pad)
    if counted != pad:
        raise UserError(
            f"model.name={name} counts positions from its padding token, {counted} by config.json, and its tokenizer "
            f"pads with {tokenizer.pad_token!r} (token {pad}): make pad_token in tokenizer_config.json the model's"
        )
    align(model, tokenizer)


def require_rows_fit(model: Any, rows: Iterable[Mapping[str, Any]], tokenizer: Any, name: str) -> None:
    """Refuse rows with tokens that the model's embeddings lack, and rows longer than its learned positions.

    Args:
        model: of transformers, also inside an adapter.
        rows: encoded ones, of any format.
        tokenizer: what they were encoded by.
        name: what the model was asked for, for the message.

    Raises:
        UserError: naming the token, or the length.
    """
    largest = longest = 0
    for row in rows:
        for ids in _sequences(row):
            largest, longest = max(largest, max(ids, default=0)), max(longest, len(ids))
    size, room = _vocabulary(model), _positions(model)
    if size is not None and largest >= size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"model.name={name}: the rows hold {token!r} (token {largest}), and the model has embeddings for {size:,} "
            f"tokens, 0 to {size - 1:,}: this tokenizer is not the model's, or the embeddings have to be resized"
        )
    if room is not None and longest > room:
        raise UserError(
            f"model.name={name} has positions for {room:,} tokens, and the longest row has {longest:,}: set "
            f"task.max_length={room} or less"
        )


def require_classes(name: str, config: Mapping[str, Any], count: int, labels: Sequence[str]) -> None:
    """Refuse a classifier whose classes are not the task's: another number, or the same names in another order.

    Args:
        name: what the model was asked for.
        config: what its config.json says.
        count: the task's classes.
        labels: their names, in the task's order; empty where it has none.

    Raises:
        UserError: saying both.
    """
    named, num_labels = config.get("id2label"), config.get("num_labels")
    if named and num_labels is not None and len(named) != num_labels:
        raise UserError(
            f"model.name={name}: config.json says num_labels={num_labels} and names {len(named)} classes: mend it"
        )
    num_labels = len(named) if named else 2 if num_labels is None else num_labels
    if num_labels != count:
        raise UserError(
            f"model.name={name} has a head for {num_labels} classes, and the task has {count}: give another"
        )
    if not named or len(labels) != count:
        return
    names = [str(label) for _, label in sorted(named.items(), key=lambda item: int(item[0]))]
    if all(map(_UNNAMED.fullmatch, names)) or _plain(names) == _plain(labels):
        return
    theirs, ours = (", ".join(f"{place}={label}" for place, label in enumerate(all_)) for all_ in (names, labels))
    if sorted(_plain(names)) == sorted(_plain(labels)):
        words = ", ".join(f"{label}: {label}" for label in names)
        raise UserError(
            f"model.name={name} has the classes {theirs}, and the task has {ours}: give the task's words in the "
            f"model's order, 'task.words={{{words}}}'"
        )
    log.warning("model.name=%s calls its classes %s; to the task they are %s", name, theirs, ours)


def name_classes(model: PreTrainedModel, labels: Sequence[str]) -> None:
    """Write the task's labels into the config of a fresh head: a model that is loaded later has their names."""
    if len(labels) == model.config.num_labels:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: place for place, label in enumerate(labels)}


def _plain(labels: Iterable[str]) -> list[str]:
    return [" ".join(label.split()).casefold() for label in labels]


def _vocabulary(model: Any) -> int | None:
    """Tokens that the embeddings know; None for a model without any."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        return getattr(get(), "num_embeddings", None) if get is not None else None
    except NotImplementedError:
        return None


def _positions(model: Any) -> int | None:
    """Tokens that learned positions are for; None where positions are computed."""
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, torch.nn.Embedding) and (
            name == "wpe" or name in ("position_embeddings", "embed_positions")
        ):
            first = getattr(module, "offset", None)  # OPT, BART: two positions in front
            if first is None:
                first = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa: those up to its padding
            return int(module.num_embeddings - first)
    return None


def _sequences(row: Mapping[str, Any]) -> list[list[int]]:
    """Every list of tokens in a row."""
    sequences = [list(row[name]) for name in _IDS if name in row]
    sequences += [list(ids) for ids in row.get("sequences", ())]
    return sequences + [ids for side in ("chosen", "rejected") if side in row for ids in _sequences(row[side])]
