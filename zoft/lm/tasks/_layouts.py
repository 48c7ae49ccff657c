"""Layouts that instruction data come in, read as their users mean them; and columns that look like content unread."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""The prompts of Stanford Alpaca (Taori et al. 2023), as its data set's own column ``text`` has them."""

SHAPED = ("instruction", "question", "query")
"""Columns that hold what is asked, and no whole prompt: something has to stand between them and the answer."""

ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant"),
    "developer": "system",
}
"""What ShareGPT, OpenAssistant, Gemini and OpenAI call a role -> what chat templates call it."""

_HH = "\n\nAssistant:"
_CONTENT = ("context", "document", "history", "input", "instruction", "passage", "query", "question", "system", "text")
_NAMES = ("category", "date", "hash", "id", "lang", "language", "license", "model", "split", "tags", "url", "uuid")
_FEW_WORDS = 3
_LONG = 24  # characters of a text without blanks, as Chinese has it


def prompt_of(column: str, asked: str, given: str = "", system: str = "") -> str:
    r"""The prompt of a row whose answer is a text.

    Args:
        column: what the column is called that holds what is asked: ``instruction`` makes Alpaca's prompt, ``question``
            and ``query`` one with ``Question:`` and ``Answer:``; any other holds the whole prompt.
        asked: its text.
        given: text that it is about (Alpaca's input, Dolly's context); empty for none.
        system: text that stands before all of it; empty for none.

    Example:
        >>> prompt_of("question", "2 + 2?", "A sum."), prompt_of("prompt", "2 + 2 =")
        ('A sum.\nQuestion: 2 + 2?\nAnswer:', '2 + 2 =')
    """
    before = f"{system.strip()}\n\n" if system.strip() else ""
    name, about = column.lower(), given.strip()
    if name == "instruction":
        template = ALPACA_WITH_INPUT if about else ALPACA
        return before + template.replace("{instruction}", asked.strip()).replace("{input}", about)
    if name in SHAPED:
        return f"{before}{about}{chr(10) if about else ''}Question: {asked.strip()}\nAnswer:"
    return before + asked


def answer_behind(prompt: str, answer: str, column: str) -> str:
    """The answer as it stands, with a blank before it where the prompt is ours and ends in none.

    Example:
        >>> answer_behind("Question: 2 + 2?" + chr(10) + "Answer:", "4", "question")
        ' 4'
    """
    return f" {answer.strip()}" if column.lower() in SHAPED and not prompt[-1:].isspace() else answer


def dialogue(chosen: str, rejected: str) -> tuple[str, str, str] | None:
    r"""HH's two dialogues as (what they share, the answers behind it); None where they are no dialogues.

    The prompt ends with the last ``Assistant:`` before they part.

    Example:
        >>> dialogue("\n\nHuman: Hi\n\nAssistant: Hello", "\n\nHuman: Hi\n\nAssistant: Go")
        ('\n\nHuman: Hi\n\nAssistant:', ' Hello', ' Go')

    References: Bai et al. 2022 (hh-rlhf).
    """
    shared = next(
        (place for place, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)),
    )
    mark = chosen[:shared].rfind(_HH)
    if mark < 0:
        return None
    end = mark + len(_HH)
    return chosen[:end], chosen[end:], rejected[end:]


def unread_content(row: Mapping[str, Any], used: Iterable[str], example: Any) -> list[str]:
    """Columns that nothing reads and that look like content: several words, or a name that content goes by.

    A text that the example holds anyway, as a prompt that is a chat's first message too, is read.
    """
    read = set(used)
    left = [name for name in row if name not in read and str(name).lower() not in _NAMES]
    names = [name for name in left if _looks_like_content(str(name).lower(), row[name])]
    if not names:
        return []
    known = [" ".join(text.split()) for text in _texts(vars(example))]
    known.append(" ".join(known))
    return [name for name in names if not all(_stands_in(known, " ".join(text.split())) for text in _texts(row[name]))]


def _stands_in(known: list[str], text: str) -> bool:
    return text in known or (len(text) >= _LONG // 2 and text in known[-1])


def _looks_like_content(name: str, value: Any) -> bool:
    texts = [text for text in _texts(value) if text.strip()]
    named = any(name == one or name.startswith(f"{one}_") or name.endswith(f"_{one}") for one in _CONTENT)
    if isinstance(value, list | dict):
        return bool(texts) and (named or any(len(text.split()) >= _FEW_WORDS for text in texts))
    if not isinstance(value, str) or not texts or name.endswith("_id"):
        return False
    text = texts[0].strip()
    long = len(text) >= _LONG and not text.isascii()
    return named or long or len(text.split()) >= _FEW_WORDS


def _texts(value: Any) -> list[str]:
    """Every text inside a value."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for part in value.values() for text in _texts(part)]
    if dataclasses.is_dataclass(value):
        return _texts(vars(value))
    return [text for part in value for text in _texts(part)] if isinstance(value, list | tuple) else []
