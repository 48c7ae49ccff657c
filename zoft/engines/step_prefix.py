"""Layers below the lowest one that moves in a step: computed by the step's first query and reused by the others.

Where a step moves some blocks only (subspace=blocks), what enters the lowest of them is the same for all of its points.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from zoft.engines.frozen_prefix import longest_stack
from zoft.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


class StepPrefix:
    """The hidden states that one call of ``losses`` keeps: one for each time the objective calls the model.

    Exact to the bit: the first query computes them as it would anyway. Memory: the input of one block for every call of
    the model in the objective.

    Args:
        model: any module; without a stack of alike blocks that hand on a tensor, nothing is reused.
        counts: the counter of the forward that runs (several may be under way, side by side).
        moved: whether the forward that runs has entered a module that moves.
    """

    def __init__(self, model: nn.Module, counts: Callable[[], Counter[Any]], moved: Callable[[], bool]) -> None:
        self.blocks = longest_stack(model)
        self.counts = counts
        self.moved = moved
        self._kept: dict[int, Tensor] = {}
        self._usable = True

    @contextmanager
    def reused(self, moving: set[nn.Module]) -> Iterator[None]:
        """Within this block, later forwards begin at the lowest block that holds one of the ``moving`` modules."""
        first = next((i for i, block in enumerate(self.blocks) if moving & set(block.modules())), len(self.blocks) - 1)
        if first < 1 or not self._usable:
            yield
            return
        handle = self.blocks[first].register_forward_pre_hook(self._enter, with_kwargs=True)
        below = self.blocks[:first]
        for block in below:
            block.forward = self._passing(block.forward)
        try:
            yield
        finally:
            handle.remove()
            for block in below:
                block.__dict__.pop("forward", None)
            self._kept.clear()

    def _passing(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def passing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.counts()["prefix"] in self._kept:
                return hidden_states
            output = forward(hidden_states, *args, **kwargs)
            self._usable = self._usable and isinstance(output, torch.Tensor)
            return output

        return passing

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.counts()["prefix"]
        self.counts()["prefix"] += 1
        hidden = args[0] if args else kwargs.get("hidden_states")
        kept = self._kept.get(call)
        if kept is None:
            if self._usable and not self.moved() and isinstance(hidden, torch.Tensor):
                self._kept[call] = hidden
            return None
        return ((kept, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": kept})
