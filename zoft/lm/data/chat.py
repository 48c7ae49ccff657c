"""Chats to token rows by the model's own chat template; what the assistant says counts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from zoft.errors import UserError
from zoft.lm.data.completions import Row, counted, without_beginning
from zoft.lm.data.examples import Chat, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_MARK = "\ue000{}.{}\ue001"  # private use: no text of the world has them


def encode_chats(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Token ids of every chat as the model's template writes it, and which of them are the assistant's.

    Counted are the tokens of the assistant's turns and the special token that ends each (``<|im_end|>``), not the
    header of a turn, which is given when the model answers. The messages are values to the template and never a
    template themselves, and a message that holds a special token of the model is refused: it would begin or end turns.

    Args:
        chats: what the task made.
        tokenizer: the model's, with its chat template.
        max_length: tokens kept; the beginning of longer ones is cut (a beginning-of-text mark is kept).

    Returns:
        Rows as :func:`zoft.lm.data.completions.encode_completions` makes them.

    Raises:
        UserError: no chat template, one that refuses a chat or rewrites what is said in it, a special token inside a
            message, or a chat of which nothing that counts is left.
    """
    if not getattr(tokenizer, "chat_template", None) or not tokenizer.is_fast:
        lacks = "chat template" if tokenizer.is_fast else "fast version, which tells where its tokens are"
        raise UserError(
            f"{chats[0].where} is a chat, and the model's tokenizer has no {lacks}: choose a model that was made for "
            "chats, or write the data as prompt + completion"
        )
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    return [_row(chat, tokenizer, max_length, sorted(special)) for chat in chats]


def rendered(chat: Chat, tokenizer: Any) -> tuple[str, list[Span]]:
    """The chat as the template writes it, and where in it the assistant's contents stand.

    They are found by writing the chat once more with marks in their place: a template may write an earlier turn
    otherwise than the last one, so that a chat's beginning is no beginning of its text.
    """
    contents = [message["content"] for message in chat.messages if message["role"] == "assistant"]
    salt = 0
    # a salt until no message holds the mark
    while any(_MARK.format(salt, "")[:-2] in message["content"] for message in chat.messages):
        salt += 1
    places = iter(range(len(contents)))
    marked: list[Message] = [
        {**message, "content": _MARK.format(salt, next(places))} if message["role"] == "assistant" else message
        for message in chat.messages
    ]
    text = _written(list(chat.messages), chat.where, tokenizer)
    # the text with marks, cut at them: what the template writes between the contents
    between = re.split(
        "|".join(re.escape(_MARK.format(salt, k)) for k in range(len(contents))),
        _written(marked, chat.where, tokenizer),
    )
    spans = _spans(text, between, contents)
    if spans is None:
        raise UserError(
            f"{chat.where}: the model's chat template does not write the assistant's turns as they are, so that it "
            "cannot be told which tokens are the assistant's: write this data as prompt + completion"
        )
    return text, spans


def _spans(text: str, between: list[str], contents: list[str]) -> list[Span] | None:
    """Where the contents stand in ``text``, the pieces ``between`` around them; None if it is not made of these."""
    if len(between) != len(contents) + 1 or not text.startswith(between[0]):
        return None
    place, spans = len(between[0]), []
    for content, behind in zip(contents, between[1:], strict=True):
        # many templates trim what is said
        forms = (content, content.strip(), content.lstrip(), content.rstrip())  # many templates trim
        form = next((form for form in forms if text.startswith(form + behind, place)), None)
        if form is None:
            return None
        spans.append((place, place + len(form)))
        # the next content stands behind this one and what the template writes after it
        place += len(form) + len(behind)
    return spans if place == len(text) else None


def _written(messages: list[Message], where: str, tokenizer: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # whatever a template does: it says no, is broken, or reaches for what it must not
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{where}: the model's chat template refuses this chat: {reason:.200}") from None


def _row(chat: Chat, tokenizer: Any, max_length: int, special: list[str]) -> Row:
    for place, message in enumerate(chat.messages):
        inside = next((token for token in special if token in message["content"]), None)
        if inside:
            raise UserError(
                f"{chat.where}: message {place} holds {inside!r}, which is a special token to the model and would "
                "begin or end a turn: take it out"
            )
    text, spans = rendered(chat, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    # tokens with at least one character in an assistant's turn, or in the token that ends it
    which = _overlapping(offsets, _with_ends(text, spans, special))
    cut = max(0, len(ids) - max_length)
    bos = tokenizer.bos_token_id
    begins_turns = ids.count(bos) != 1  # as <|im_start|> does in some models: no mark of the text's beginning
    tail = without_beginning(ids, cut, None if begins_turns else bos)
    # counted places move with the cut; the first token of all is predicted from nothing
    row = counted(tail, {place - cut for place in which if place - cut > 0})
    if all(label < 0 for label in row["labels"]):
        raise UserError(
            f"{chat.where}: nothing the assistant says is left of this chat of {len(ids):,} tokens, of which the last "
            f"{max_length:,} are kept: raise task.max_length"
        )
    return row | {"cut": cut, "cut_end": 0}


def _with_ends(text: str, spans: list[Span], special: list[str]) -> list[Span]:
    """The spans with the special token that ends each turn; some templates put a blank before it."""
    ending = re.compile(" ?(?:" + "|".join(map(re.escape, special)) + ")") if special else None
    ends = [ending.match(text, last) if ending else None for _, last in spans]
    return [(first, end.end() if end else last) for (first, last), end in zip(spans, ends, strict=True)]


def _overlapping(offsets: list[Span], spans: list[Span]) -> set[int]:
    """Positions of the tokens that have a character in a span; both lists are in order."""
    which, turn = set(), 0
    for place, (first, last) in enumerate(offsets):
        while turn < len(spans) and first >= spans[turn][1]:
            turn += 1
        if turn < len(spans) and last > spans[turn][0] and last > first:
            which.add(place)
    return which
