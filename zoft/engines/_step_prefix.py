"""Layers below the lowest one that moves in a step: computed by the step's first query and reused by the others.

Where a step moves some blocks only (subspace=blocks), what enters the lowest of them is the same for all of its points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from zoft.engines._lockstep import is_sequential
from zoft.engines._prefix import forwards_replaced, hidden_states_in, longest_stack, lowest_with, with_hidden_states
from zoft.utils.lazy import Tensor, nn, torch


@dataclass
class PrefixState:
    """How far one forward has come.

    Args:
        call: number of the model's call that runs, or comes next; an objective may call the model several times.
        has_looked: whether the lowest block of this call has been entered.
        is_same: whether what entered it is what entered it in the step's first query.
    """

    call: int = 0
    has_looked: bool = False
    is_same: bool = False


class StepPrefix:
    """The hidden states that one call of ``losses`` keeps: one for each time the objective calls the model.

    Exact to the bit: the first query computes them as it would anyway, and they are used where the same goes into the
    lowest layer again. Memory: the inputs of two blocks for every call of the model in the objective.

    Args:
        model: any module; without a stack of alike blocks that hand on a tensor, nothing is reused.
        state: the state of the forward that runs (several may be under way, side by side).
        begin: called before every forward of the model.
        moved: whether a module that moves has been entered since.
    """

    def __init__(
        self, model: nn.Module, state: Callable[[], PrefixState], begin: Callable[[], None], moved: Callable[[], bool]
    ) -> None:
        self.model = model
        self.begin = begin
        self.blocks = longest_stack(model)
        self.state = state
        self.moved = moved
        self._inputs: dict[int, Tensor] = {}  # number of the call -> what went into the lowest block
        self._hidden: dict[int, Tensor] = {}  # number of the call -> what went into the first that moves
        self._usable = True

    @contextmanager
    def reused(self, moving: set[nn.Module]) -> Iterator[None]:
        """Within this block, later forwards begin at the lowest block that holds one of the ``moving`` modules."""
        # a forward has to enter some block to be given its states: the last one at most
        first = min(lowest_with(moving, self.blocks), len(self.blocks) - 1)
        if first < 1:
            yield
            return
        with (
            self.blocks[first].register_forward_pre_hook(self._enter, with_kwargs=True),
            # modules that were entered in an earlier call of this forward say nothing of this one
            self.model.register_forward_pre_hook(lambda *_: self.begin()),
            forwards_replaced(self.blocks[:first], lambda block: self._passing(block.forward)),
        ):
            yield

    def _passing(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def passing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            # a forward that fills the frozen prefix: its rows are other inputs
            if is_sequential():
                return forward(hidden_states, *args, **kwargs)
            state = self.state()
            if not state.has_looked:  # the lowest block of this call
                state.has_looked = True
                # what went in at this call's number is compared: an objective may call the model on something else
                first_input = self._inputs.setdefault(state.call, hidden_states)
                state.is_same = state.call in self._hidden and _same(first_input, hidden_states)
            if state.is_same:
                return hidden_states
            output = forward(hidden_states, *args, **kwargs)
            self._usable = self._usable and isinstance(output, torch.Tensor)
            return output

        return passing

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_sequential():
            return None
        state = self.state()
        call, has_looked, is_same = state.call, state.has_looked, state.is_same
        # the next call of the model in this forward counts from here
        state.call, state.has_looked, state.is_same = call + 1, False, False
        if is_same:
            return with_hidden_states(self._hidden[call], args, kwargs)
        hidden = hidden_states_in(args, kwargs)
        # a moving tensor that was entered below (an embedding) makes the states depend on the point
        exact = has_looked and self._usable and not self.moved()
        # the first query keeps them; the others find them
        if exact and hidden is not None and call not in self._hidden:
            self._hidden[call] = hidden
        return None


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one, other))
