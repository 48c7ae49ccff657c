"""A batch's context, kept from the clean forward: a probe then computes the last few tokens of each row and no others.

Where only some last positions of each row are moved, everything in front of them is the same with and without: their
keys and values, and what enters the lowest block that holds a node.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from zoft.engines._lockstep import is_sequential
from zoft.engines._prefix import (
    forwards_replaced,
    hidden_states_in,
    lowest_with,
    passes_through,
    stack_with,
    with_hidden_states,
)
from zoft.utils.lazy import Tensor, nn, torch

log = logging.getLogger(__name__)


@dataclass
class Context:
    """The keys, values and hidden states that one clean forward leaves for probes.

    Args:
        last: tokens of each row that a probe computes.
        mask: the attention mask of all tokens, [B, T].
        positions: of the last tokens, [B, last].
        hidden: what enters the lowest block, of the last tokens, [B, last, H].
        keys: of the others, by layer, from the lowest block on.
        values: the same.
    """

    last: int
    mask: Tensor | None = None
    positions: Tensor | None = None
    hidden: Tensor | None = None
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether a probe can begin from it."""
        return self.mask is not None and self.positions is not None and self.hidden is not None and bool(self.keys)


class ContextCache:
    """Keeps contexts of one model's forwards and begins forwards from them.

    Args:
        model: what the objective calls with keyword arguments.
        moving: the modules whose outputs move.
        new_cache: makes an empty cache of keys and values, as the model takes it.
    """

    def __init__(self, model: nn.Module, moving: set[nn.Module], new_cache: Callable[[], Any]) -> None:
        self.model = model
        self.new_cache = new_cache
        self.blocks = stack_with(moving, model)
        in_blocks = {module for block in self.blocks for module in block.modules()}
        # A linear layer outside of the blocks that moves may run before them: then nothing below it is known.
        moves_outside = any(isinstance(module, torch.nn.Linear) for module in moving - in_blocks)
        self.first = 0 if moves_outside else lowest_with(moving, self.blocks)
        self.usable = bool(self.blocks) and self.first < len(self.blocks) and _takes_cache(model)
        self.checked = False  # against whole rows; the first batch does it

    def give_up(self, why: Any) -> None:
        """Compute whole rows from now on."""
        self.usable = False
        log.info("probes compute whole rows, and not the last tokens behind kept keys and values: %s", why)

    @contextmanager
    def kept(self, last: int) -> Iterator[Context]:
        """Within this block the model is called once, on whole rows; what it leaves is in the context afterwards.

        Args:
            last: tokens of each row that a probe will compute.
        """
        context, cache, calls = Context(last), self.new_cache(), list[int]()

        def before(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            # a row of the frozen prefix on its way is no call of the objective's
            if is_sequential():
                return None
            calls.append(1)
            context.mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
            # the last tokens keep the positions that they have in the whole row
            context.positions = None if positions is None else positions[:, -last:]
            return args, {**kwargs, "past_key_values": cache, "use_cache": True}

        def entering(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if is_sequential():
                return
            context.hidden = hidden_states_in(args, kwargs)[:, -last:].clone()

        with (  # behind what serves the frozen prefix, which must see the call as it is
            self.model.register_forward_pre_hook(before, with_kwargs=True),
            self.blocks[self.first].register_forward_pre_hook(entering, with_kwargs=True),
        ):
            yield context
        # an objective that calls the model twice has no one context
        if len(calls) != 1:
            return
        for number, layer in enumerate(cache.layers[self.first :], self.first):
            # layers below `first` are left out by a probe: their keys and values are not asked for
            if layer.keys is not None and layer.values is not None:
                context.keys[number] = layer.keys[..., :-last, :]
                context.values[number] = layer.values[..., :-last, :]

    @contextmanager
    def reused(self, context: Context) -> Iterator[None]:
        """Within this block the model is called on the last tokens alone.

        Args:
            context: a whole one.
        """
        assert context.mask is not None
        assert context.hidden is not None
        cache, hidden = self.new_cache(), context.hidden
        batch, length = context.mask.shape
        # stands for the keys of layers that are left out: masks are made from a cache's length, often its first layer's
        nothing = hidden.new_zeros(batch, 1, length - context.last, 1)
        for number in range(self.first):
            cache.update(nothing, nothing, number)
        for number, keys in context.keys.items():
            cache.update(keys, context.values[number], number)

        def before(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            masked = {"attention_mask": context.mask, "position_ids": context.positions}
            return args, {**kwargs, **masked, "past_key_values": cache, "use_cache": True}

        def entering(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return with_hidden_states(hidden.clone(), args, kwargs)  # a block may write into its input

        with (  # in front of what serves the frozen prefix, whose rows are whole ones
            self.model.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
            self.blocks[self.first].register_forward_pre_hook(entering, with_kwargs=True),
            forwards_replaced(self.blocks[: self.first], lambda _: passes_through),
        ):
            yield


def _takes_cache(model: Any) -> bool:
    """Whether the class is a decoder that takes keys and values of earlier tokens, and the positions of its own."""
    # peft's wrapper takes any arguments: the class inside says which
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(bare, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False) or hasattr(bare, "_orig_mod"):
        return False
    return {"past_key_values", "position_ids", "use_cache"} <= inspect.signature(type(bare).forward).parameters.keys()
