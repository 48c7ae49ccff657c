"""Which runtime computes the forwards of a model held elsewhere: objectives look here before they call the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from zoft.utils.lazy import Tensor, nn

_KEY = "_zoft_runtime"


class Runtime(Protocol):
    """What another runtime computes of a language model, at the weights of the query in progress."""

    writes: bool
    """Whether it generates text; where it does not, the model itself does."""

    def log_probs(self, inputs: Mapping[str, Any], row: Tensor, column: Tensor, tokens: Tensor) -> Tensor:
        """Log-probabilities of some tokens at some positions, over the whole vocabulary.

        Args:
            inputs: the model's arguments: ``input_ids`` and ``attention_mask`` [B, T], perhaps ``position_ids``.
            row: [N] int64, the sequence of each position.
            column: [N] int64, where in it, negative: counted from the right end.
            tokens: [N, C] int64, which tokens.

        Returns:
            float32 [N, C].
        """

    def write(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: str, ends: Sequence[int],
        temperature: float, seed: int,
    ) -> list[list[int]]:  # fmt: skip
        """Continue prompts.

        Args:
            prompts: token ids, one list each.
            max_new_tokens: tokens that a text may have.
            stop: text that ends one; empty for none.
            ends: tokens that end one.
            temperature: 0 takes the likeliest token.
            seed: of the samples.

        Returns:
            The tokens written behind each prompt.
        """


def runtime_of(model: nn.Module) -> Runtime | None:
    """The runtime that computes this model's forwards; None where the model itself is called."""
    # by the model's own dict: a model that is called itself has no such entry
    runtime: Runtime | None = vars(model).get(_KEY)
    return runtime


def answer_for(model: nn.Module, runtime: Runtime) -> None:
    """Let ``runtime`` compute this model's forwards from now on.

    Args:
        model: as objectives are given it, with its adapter.
        runtime: what is asked instead.
    """
    vars(model)[_KEY] = runtime  # no submodule, no buffer: it is in no state dict, and lives as long as the model
