"""The head of one call of a model: given the wanted rows of the hidden states instead of all of them.

The head's weight is read inside the head's own ``__call__`` only, as always: engines perturb it just there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from zoft.lm.logits.call import Inputs, called, inner
from zoft.utils.lazy import Tensor, nn, torch

Forward = Callable[..., "Tensor"]


class CannotServeError(Exception):
    """The head is not used in a way that rows can be taken from."""


@dataclass(frozen=True)
class Positions:
    """Which positions of a batch are wanted.

    Args:
        row: [N] int64, the sequence.
        column: [N] int64, the position in it, negative: counted from the right end, where virtual tokens that an
            adapter puts in front do not move it.

    Example:
        >>> positions = Positions(torch.tensor([0, 1]), torch.tensor([-1, -2]))
        >>> positions.of(torch.tensor([[1, 2, 3], [4, 5, 6]]))
        tensor([3, 5])
    """

    row: Tensor
    column: Tensor

    def __len__(self) -> int:
        return len(self.row)

    def of(self, values: Tensor) -> Tensor:
        """``values`` [B, T, ...] at the positions, [N, ...]: contiguous, so that one matrix product follows."""
        # element of the flattened [B T]: row T + T + column, with column counted from the right end
        return values.flatten(0, 1).index_select(0, self.row * values.shape[1] + values.shape[1] + self.column)

    def chosen(self, which: Tensor) -> Positions:
        """The positions where the mask ``which`` [N] is true."""
        return Positions(self.row[which], self.column[which])


def head_of(model: nn.Module) -> nn.Module | None:
    """The language-model head, by transformers' public interface; None where a model has none."""
    get = getattr(inner(model), "get_output_embeddings", None)
    head: nn.Module | None = get() if get is not None else None
    return head


def logits_of_rows(model: nn.Module, inputs: Inputs, positions: Positions, tokens: Tensor | None = None) -> Tensor:
    """Logits at the positions, [N, V], or of some tokens only, [N, C]; what the class does behind its head is done.

    Args:
        model: what is called.
        inputs: its keyword arguments.
        positions: N positions.
        tokens: [C] the tokens that are wanted, where the head is a plain ``torch.nn.Linear``.

    Raises:
        CannotServeError: the model does not hand [B, T, H] hidden states to its head, once.
    """

    def of_rows(forward: Forward, rows: Tensor) -> Tensor:
        # head(rows) as [1, N, H]: most classes hand [B, T, H] to their head, and so does this
        return forward(rows.unsqueeze(0)) if tokens is None else logits_of_tokens(model, rows, tokens).unsqueeze(0)

    logits = with_rows(model, inputs, positions, of_rows)
    # a class may reshape behind its head; then rows cannot be taken back apart
    if logits.dim() != 3 or logits.shape[:2] != (1, len(positions)):
        raise CannotServeError(f"its logits come as {list(logits.shape)}")
    return logits[0]


def logits_of_tokens(model: nn.Module, rows: Tensor, tokens: Tensor) -> Tensor:
    """What a plain linear head gives for some tokens, without what its class does behind it.

    Args:
        model: what is called.
        rows: [N, H] hidden states.
        tokens: [C] the tokens.

    Returns:
        float32 [N, C].
    """
    head: Any = head_of(model)
    # z_t = w_t . h + b_t for the wanted tokens t alone
    weight = torch.nn.functional.embedding(tokens, head.weight)  # so that engines perturb these rows alone
    bias = None if head.bias is None else head.bias[tokens]
    # In float32: a logit of 17 is known to 0.06 in bfloat16, and what is wanted is the difference of two losses.
    wide = None if bias is None else bias.float()
    return torch.nn.functional.linear(rows.float(), weight.float(), wide)


def with_rows(
    model: nn.Module, inputs: Inputs, positions: Positions, compute: Callable[[Forward, Tensor], Tensor]
) -> Tensor:
    """One call of the model whose head returns ``compute(forward, rows)``, with rows [N, H] of the hidden states."""
    head = head_of(model)
    assert head is not None
    calls = []

    def of_hidden(forward: Forward, hidden: Tensor) -> Tensor:
        calls.append(1)
        # an adapter's virtual tokens make the hidden states longer than the input, never shorter
        batch, length = inputs["input_ids"].shape
        if hidden.dim() != 3 or hidden.shape[0] != batch or hidden.shape[1] < length:
            raise CannotServeError(f"its head is given {list(hidden.shape)} for a batch of [{batch}, {length}]")
        return compute(forward, positions.of(hidden))

    # the model's own forward runs; its head is the one module that computes something else in it
    replaced: dict[nn.Module, Callable[..., Tensor]] = {head: of_hidden}
    narrowed = _narrowed.get()
    if narrowed is not None and len(positions):
        # the head sees nothing in front of the first wanted position, so the last block's layer need not either
        replaced[narrowed] = _at_the_end(-int(positions.column.min()))
    with _replaced_forwards(replaced):
        logits = called(model, inputs)
    # called twice (or never), it is not clear which call the rows belong to
    if len(calls) != 1:
        raise CannotServeError(f"its head is called {len(calls)} times in a forward")
    return logits


_narrowed: ContextVar[nn.Module | None] = ContextVar("narrowed", default=None)


@contextmanager
def narrowed(module: nn.Module | None) -> Iterator[None]:
    """Within this block a layer behind which no position is mixed with others sees only those that the head will see.

    From the first position that is wanted to the right end: of rows with one answer token the last one alone. At the
    others its output is zero, and is not read.

    Args:
        module: of [B, T, H] to [B, T, H], position by position: the feed-forward part of the last block; None: nothing.
    """
    token = _narrowed.set(module)
    try:
        yield
    finally:
        _narrowed.reset(token)


def _at_the_end(count: int) -> Callable[..., Tensor]:
    def of_end(forward: Forward, hidden: Tensor) -> Tensor:
        output = forward(hidden[:, -count:])  # [B, count, H]
        # zeros in front keep the shape: what stands behind the layer expects [B, T, H]
        return torch.nn.functional.pad(output, (0, 0, hidden.shape[1] - output.shape[1], 0))

    return of_end


@dataclass(frozen=True)
class HeadCall:
    """What the head was given and gave, before any hook looked at it: [B, T, H] and [B, T, V]."""

    hidden: Tensor
    output: Tensor


def recorded_call(model: nn.Module, inputs: Inputs) -> tuple[Tensor, HeadCall]:
    """The logits of a plain call, and the last call of the head in it; empty tensors where there was none."""
    head = head_of(model)
    assert head is not None
    # an empty call first: a model that does not call its head leaves this one
    calls = [HeadCall(torch.empty(0), torch.empty(0))]

    def recording(forward: Forward, *args: Any, **kwargs: Any) -> Tensor:
        output = forward(*args, **kwargs)
        # hidden states handed over by name are not seen, and such a head counts as not called
        calls.append(HeadCall(args[0], output) if args else calls[0])
        return output

    with _replaced_forwards({head: recording}):
        logits = called(model, inputs)
    return logits, calls[-1]


# Several calls of one model can be in progress at once, each in a context of its own (zoft.engines._lockstep): the
# replaced forward is therefore one for all of them, and asks its context what is wanted.
_wanted: ContextVar[Mapping[nn.Module, Callable[..., Tensor]]] = ContextVar("wanted", default=MappingProxyType({}))
_replaced: dict[nn.Module, list[Any]] = {}  # module -> [calls in progress, its instance's own forward if it had one]


@contextmanager
def _replaced_forwards(computed: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    token = _wanted.set(computed)
    # the forward is replaced once, however many calls are in progress, and put back by the last
    for module in computed:
        if module in _replaced:
            _replaced[module][0] += 1
        else:
            _replaced[module] = [1, vars(module).get("forward")]
            module.forward = partial(_forward_as_wanted, module, module.forward)
    try:
        yield
    finally:
        _wanted.reset(token)
        for module in computed:
            _replaced[module][0] -= 1
            if not _replaced[module][0]:
                _, forward = _replaced.pop(module)
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward


def _forward_as_wanted(module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Tensor:
    compute = _wanted.get().get(module)
    return forward(*args, **kwargs) if compute is None else compute(forward, *args, **kwargs)
