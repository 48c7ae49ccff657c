"""Ways around the lower blocks of a model: a forward begins at a block whose hidden states [B, T, H] are known.

Three caches know them, each for as long as they hold: for a run, by the row they belong to (``_frozen_prefix.py``); for
the queries of a step, by the number of the call (``_step_prefix.py``); for the probes of a batch, by the clean forward
before them (``_context.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from typing import Any

from zoft.utils.lazy import Tensor, nn, torch

Forward = Callable[..., Any]


def longest_stack(model: nn.Module) -> list[nn.Module]:
    """The model's blocks: its longest list of modules of one type; empty where it has none."""
    return max(_stacks(model), key=len, default=[])


def stack_with(modules: Set[nn.Module], model: nn.Module) -> list[nn.Module]:
    """The blocks that hold most of these modules, as a decoder's behind an encoder; the longest list if none does."""

    def held(stack: list[nn.Module]) -> int:
        return len(modules & {module for block in stack for module in block.modules()})

    # the first of equals: a list inside a block comes behind that of the blocks
    stack = max(_stacks(model), key=held, default=[])
    return stack if held(stack) else longest_stack(model)


def _stacks(model: nn.Module) -> list[list[nn.Module]]:
    """Lists of modules of one type."""
    return [list(m) for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len({type(b) for b in m}) == 1]


def lowest_with(modules: Set[nn.Module], blocks: list[nn.Module]) -> int:
    """Index of the lowest block that holds one of these modules, ``len(blocks)`` where none does."""
    return next((i for i, block in enumerate(blocks) if modules & set(block.modules())), len(blocks))


def num_below(model: nn.Module) -> int:
    """How many blocks lie below all that is trained: a backward pass does not come to them."""
    modules, blocks = list(model.modules()), longest_stack(model)
    trained = {m for m in modules if any(p.requires_grad for p in m.parameters(recurse=False))}
    # embeddings are named in front of the blocks
    return 0 if not blocks or trained & set(modules[: modules.index(blocks[0])]) else lowest_with(trained, blocks)


def passes_through(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """The forward of a block that is left out; engine=offload sees by it that the block needs no weights."""
    return hidden_states


@contextmanager
def forwards_replaced(modules: Iterable[nn.Module], replacement: Callable[[nn.Module], Forward]) -> Iterator[None]:
    """Within this block, modules compute by other forwards.

    Args:
        modules: whose forward is replaced; one that a user has set on the module itself comes back afterwards.
        replacement: a module, whose ``forward`` is still its own -> what it computes by.
    """
    own_forwards: list[tuple[nn.Module, Forward | None]] = []
    try:
        for module in modules:
            own_forwards.append((module, module.__dict__.get("forward")))
            module.forward = replacement(module)
        yield
    finally:
        for module, earlier in own_forwards:
            if earlier is None:
                module.__dict__.pop("forward", None)  # the class's again
            else:
                module.forward = earlier


def hidden_states_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a block is called with: transformers hands hidden states on by position, some classes by name."""
    return args[0] if args else kwargs.get("hidden_states")


def with_hidden_states(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """The same call of a block with other hidden states, as a pre-hook returns it."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
