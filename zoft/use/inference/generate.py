"""Texts that a model writes behind prompts, plain or as turns of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zoft.errors import UserError, refuse_unmet
from zoft.use.inference.load import Loaded


@dataclass(frozen=True)
class WritingSettings:
    """How texts are written.

    Args:
        max_new_tokens: the most tokens of one.
        temperature: 0 takes the likeliest token; above, samples are drawn.
        seed: of the samples.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 or more and finite, got {self.temperature}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be 0 or more and below 2**32, got {self.seed}")
        refuse_unmet({"seed": ("temperature", ())}, vars(self), {"temperature": 0.0, "seed": 0}, "")


def written(loaded: Loaded, prompts: Sequence[Sequence[int]], how: WritingSettings, model: Any = None) -> list[str]:
    """What the model writes behind prompts.

    Args:
        loaded: the model with its tokenizer.
        prompts: token ids.
        how: length, temperature and seed.
        model: another model with the same tokenizer; None takes ``loaded.model``.
    """
    import torch

    from zoft.lm.models.generate import Answering, write

    writer = loaded.model if model is None else model
    with torch.inference_mode():
        sampled = write(
            writer, prompts, Answering(loaded.tokenizer, how.max_new_tokens), temperature=how.temperature, seed=how.seed
        )
    return sampled.texts


def plain_ids(loaded: Loaded, prompt: str, new_tokens: int) -> list[int]:
    """A prompt's tokens, as the tokenizer begins a text.

    Raises:
        UserError: there are none, or with the new ones more than the model has positions for.
    """
    from zoft.lm.data.tokens import open_ended

    _require_unicode(prompt)
    return _checked(loaded, open_ended([prompt], loaded.tokenizer)[0], new_tokens)


def chat_ids(loaded: Loaded, messages: Sequence[dict[str, str]], new_tokens: int) -> list[int]:
    """The tokens of a conversation up to where the assistant answers.

    Raises:
        UserError: the model has no chat template, it refuses these messages, or they leave too few positions.
    """
    require_template(loaded)
    _require_unicode("".join(message["content"] for message in messages))
    try:
        text = loaded.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template does
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"the chat template of {loaded.name} refuses this conversation: {reason:.200}") from None
    return _checked(loaded, loaded.tokenizer(text, add_special_tokens=False)["input_ids"], new_tokens)


def require_template(loaded: Loaded) -> None:
    """Refuse a model that was not made for conversations."""
    if not getattr(loaded.tokenizer, "chat_template", None):
        raise UserError(f"the tokenizer of {loaded.name} has no chat template: write behind plain text, zoft generate")


def _require_unicode(text: str) -> None:
    from zoft.lm.data.files import is_unicode

    if not is_unicode(text):
        raise UserError("the prompt is not UTF-8 text: re-encode it")


def _checked(loaded: Loaded, ids: list[int], new_tokens: int) -> list[int]:
    room = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or 0
    if not ids:
        raise UserError("the prompt is empty: give some text")
    if 0 < room < len(ids) + new_tokens:  # XLNet's -1: there is no limit
        free = f"leaves {max(0, room - len(ids)):,} for max_new_tokens={new_tokens}: lower that, or shorten it"
        raise UserError(f"{loaded.name} takes {room:,} tokens at most, of which the prompt ({len(ids):,}) {free}")
    return list(ids)
