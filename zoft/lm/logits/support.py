"""Capability probe of a model's head: do logits at selected positions equal the full forward's? Checked once a model.

A trial calls the model more often than the loss does. Engines that reuse work between queries count on all of them
calling it alike, so the trainer tries before the queries, and within :func:`no_trials` what is unknown is done plainly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from weakref import WeakKeyDictionary

from zoft.lm.logits.call import Inputs, inner, is_compiled
from zoft.lm.logits.head import CannotServeError, HeadCall, Positions, head_of, logits_of_rows, recorded_call, with_rows
from zoft.utils.lazy import Tensor, nn, torch
from zoft.weights.elsewhere import runtime_of
from zoft.weights.wider import TOLERANCE

log = logging.getLogger(__name__)

PIECE = 2**20
"""Elements of logits that a trial may make, 4 MiB of float32: it must not cost the memory that it is there to save."""

FAILURES = (CannotServeError, TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)
"""What a model may raise that is called in a way it does not support."""

_TOLERANCE = {"float32": TOLERANCE, "float64": 1e-8}  # by what the head computes in; 2e-2 in 16 bits


@dataclass(frozen=True)
class HeadSupport:
    """What the probe has found about one model's head.

    Args:
        head: its language-model head, if it has one.
        vocabulary: how many logits a position has.
        rows: whether the head may be given rows of the hidden states; otherwise the model is called plainly.
        tokens: whether it may be asked for some tokens only.
        ends: whether the class's own ``logits_to_keep`` may be used instead; not where rows came out different.
        after: what the class does to the head's output, where that is known.
        tolerance: how far apart two ways of computing the same logits may be, relative to the largest one.
    """

    head: nn.Module | None
    vocabulary: int
    rows: bool = False
    tokens: bool = False
    ends: bool = True
    after: Callable[[Tensor], Tensor] | None = None
    tolerance: float = 1e-4


_trials: ContextVar[bool] = ContextVar("trials", default=True)
_known: WeakKeyDictionary[nn.Module, HeadSupport] = WeakKeyDictionary()
_said: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


@contextmanager
def no_trials() -> Iterator[None]:
    """Within this block the model is called for the loss and for nothing else."""
    token = _trials.set(False)
    try:
        yield
    finally:
        _trials.reset(token)


def trials_allowed() -> bool:
    """Whether a model may be called to find out about it."""
    return _trials.get()


def is_known(model: nn.Module) -> bool:
    """Whether a trial of this model's head has given an answer; with another runtime there is no head to try."""
    return runtime_of(model) is not None or _known_of(model) is not None


def _known_of(model: nn.Module) -> HeadSupport | None:
    known = _known.get(model)
    # another head than then: the vocabulary was resized, or an adapter put on it
    return known if known is not None and known.head is head_of(model) else None


def probe(model: nn.Module, inputs: Inputs, positions: Positions) -> HeadSupport:
    """The model's support; probed with its first batch, and again as long as a batch tells nothing."""
    support = _known_of(model)
    if support is None:
        head = head_of(model)
        plainly = HeadSupport(
            head, _vocabulary(model, head), tolerance=_tolerance(getattr(inner(model), "dtype", None))
        )
        # a trial is no query: nothing of it is differentiated or counted
        with torch.no_grad():
            support = _examine(model, inputs, positions, plainly) if trials_allowed() else None
        # nothing was learnt (no trial allowed, or no finite logit): the next batch may tell
        if support is None:
            return plainly
        _known[model] = support
    return support


def tolerance_of(model: nn.Module) -> float:
    """How far apart two ways of computing this model's logits may be, relative to the largest one."""
    return _known[model].tolerance if model in _known else HeadSupport.tolerance


def refuse(model: nn.Module, what: str, why: object) -> None:
    """Say, once for each model, that something is done the plain way, with the first reason there was."""
    say_once(model, what, logging.WARNING, f": {why}")


def say_once(model: nn.Module, what: str, level: int, why: str = "") -> None:
    """A log line that names the model's class."""
    said = _said.setdefault(model, set())
    if what not in said:
        said.add(what)
        log.log(level, "%s: %s%s", type(inner(model)).__name__, what, why)


def close(values: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Whether two ways of computing the same numbers agree; where one has a NaN they do not."""
    if values.shape != wanted.shape:
        return False
    # relative to the largest wanted number: logits near zero are off by as much as large ones
    return bool((values.detach() - wanted.detach()).abs().max() <= tolerance * wanted.detach().abs().max())


def piece_of(inputs: Inputs, positions: Positions, vocabulary: int) -> tuple[Inputs, Positions]:
    """Two sequences of a batch around their positions, short enough for :data:`PIECE`; all of it where not [B, T].

    Args:
        inputs: a model's arguments, and its labels if there are any.
        positions: N >= 1 positions.
        vocabulary: how many logits a position has.

    Returns:
        (their inputs, the positions that are left).
    """
    batch, length = inputs["input_ids"].shape
    values = [value for value in inputs.values() if isinstance(value, torch.Tensor) and value.dim()]
    # an argument of another shape ([B], [B, T, T]) cannot be cut along with the rows
    if any(value.shape[:2] != (batch, length) for value in values):
        return inputs, positions
    # two sequences: whether a row depends on the others shows with two, and costs no more
    two = sorted({int(positions.row[0]), int(positions.row[-1])})
    stop = length + 1 + max(int(positions.column[positions.row == row].max()) for row in two)
    # no more columns than a trial may make logits
    start = max(0, stop - max(4, PIECE // (vocabulary * len(two))))
    cut = {
        key: value[two, start:stop] if isinstance(value, torch.Tensor) and value.dim() else value
        for key, value in inputs.items()
    }
    row = torch.stack([positions.row == row for row in two]).to(torch.int64).argmax(0)
    column = positions.column + length - stop
    inside = ((positions.row == two[0]) | (positions.row == two[-1])) & (column >= start - stop) & (column < 0)
    return cut, Positions(row, column).chosen(inside)


def _examine(model: nn.Module, inputs: Inputs, positions: Positions, plainly: HeadSupport) -> HeadSupport | None:
    """The trial; None where it says nothing: no position, or logits that are not finite."""
    what = "the head is applied to all positions, not only to those that count"
    head = plainly.head
    if is_compiled(model):
        return plainly  # compiled code does not see the replaced head; ``logits_to_keep`` serves there
    # nothing says which module is the head: its output would be guessed
    if head is None:
        refuse(model, what, "it names no output embeddings")
        return plainly
    if not len(positions):
        return None
    piece, where = piece_of(inputs, positions, plainly.vocabulary)
    whole: list[Tensor] = []
    # the output as the head made it, before hooks of others
    with head.register_forward_hook(lambda _module, _args, output: whole.append(output)):
        plain, call = recorded_call(model, piece)
    wanted = where.of(plain)
    # logits that are not finite agree with nothing, and say nothing of the head
    if not bool(torch.isfinite(wanted).all()):
        return None
    computed = whole[0] if whole and isinstance(whole[0], torch.Tensor) else plain
    tolerance = _tolerance(computed.dtype)  # under autocast the logits may come in float32 and yet have 16 bits
    try:
        # [N, V] from rows against [B, T, V] from a plain call, at the same positions
        if not close(logits_of_rows(model, piece, where), wanted, tolerance):
            raise CannotServeError("its logits come out different when the head is given some rows only")
        _check_exactly(model, piece, where, wanted, call)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        refuse(model, what, error)
        # ends=False: rows came out different, so the class's own slicing is not trusted either
        return replace(plainly, ends=False, tolerance=tolerance)
    tokens = _serves_tokens(model, piece, where, wanted, tolerance, call)
    return HeadSupport(head, plain.shape[-1], True, tokens, after=_after(model, whole, plain), tolerance=tolerance)


def _check_exactly(model: nn.Module, piece: Inputs, where: Positions, wanted: Tensor, call: HeadCall) -> None:
    """What a tolerance for rounding would hide: that logits depend, however little, on more than their own row.

    Raises:
        CannotServeError: they do.
    """
    head = head_of(model)
    # the head's own output is handed back: what comes out must be the plain call's logits, to the bit
    behind = with_rows(model, piece, where, lambda _forward, _rows: where.of(call.output).unsqueeze(0))
    if behind.shape[:2] != (1, len(where)) or not torch.equal(behind[0], wanted):
        raise CannotServeError("what it does behind its head depends on more than the row")
    assert head is not None
    weights = dict([*head.named_parameters(), *head.named_buffers()])
    if type(head) is torch.nn.Linear or not all(tensor.is_floating_point() for tensor in weights.values()):
        return  # a matrix product is one row after the other; quantised weights have no wider form to compare in
    # in float64 two orders of one product agree to 1e-8: what is larger is a dependence, not rounding
    wide = {name: tensor.double() for name, tensor in weights.items()}
    hidden = call.hidden.double()
    every, rows = (torch.func.functional_call(head, wide, (h,)) for h in (hidden, where.of(hidden).unsqueeze(0)))
    if not close(rows[0], where.of(every), _tolerance(every.dtype)):
        raise CannotServeError("its head looks at more than the row")


def _tolerance(dtype: torch.dtype | None) -> float:
    if dtype is None:
        return HeadSupport.tolerance
    return _TOLERANCE.get(str(dtype).removeprefix("torch."), 2e-2)


def _vocabulary(model: nn.Module, head: nn.Module | None) -> int:
    """How many logits a position has, before there are any to look at; 1 where nothing tells."""
    outputs = getattr(head, "out_features", None)
    if isinstance(outputs, int):
        return outputs
    config = getattr(inner(model), "config", None)
    return 1 if config is None else int(getattr(config.get_text_config(), "vocab_size", 1))


def _serves_tokens(
    model: nn.Module, piece: Inputs, where: Positions, wanted: Tensor, tolerance: float, call: HeadCall
) -> bool:
    """Quiet where it does not: the whole vocabulary at the wanted rows costs little more."""
    head = head_of(model)
    if type(head) is not torch.nn.Linear:  # an adapter on it, quantised: its weight alone is not what it computes
        return False
    # seven tokens spread over the vocabulary
    tokens = torch.arange(0, wanted.shape[1], -(-wanted.shape[1] // 7), device=wanted.device)
    few = wanted.index_select(1, tokens)
    try:
        computed = where.of(call.output).index_select(1, tokens).unsqueeze(0)
        behind = with_rows(model, piece, where, lambda _forward, _rows: computed)[0]
        return torch.equal(behind, few) and close(logits_of_rows(model, piece, where, tokens), few, tolerance)
    except torch.OutOfMemoryError:
        raise
    except FAILURES:
        return False


def _after(model: nn.Module, whole: list[Tensor], plain: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Which of the things that classes do behind their head gives these very logits."""
    if len(whole) != 1 or not isinstance(whole[0], torch.Tensor):
        return None
    # soft caps and scales are named in configs; the one that gives these logits, to the bit, is the class's
    config = inner(model).config.get_text_config()
    for name, transform in _TRANSFORMS:
        factor = getattr(config, name, None) if name else 1.0
        if isinstance(factor, (int, float)) and factor:
            after = partial(transform, factor)
            if torch.equal(after(whole[0]).to(plain.dtype), plain):
                return after
    return None


_TRANSFORMS: list[tuple[str, Callable[[float, Tensor], Tensor]]] = [  # the config's field, and what is done with it
    ("", lambda _, logits: logits),
    ("final_logit_softcapping", lambda cap, logits: torch.tanh(logits / cap) * cap),  # Gemma 2
    ("logit_scale", lambda scale, logits: logits * scale),  # Cohere
    ("logits_scaling", lambda scale, logits: logits / scale),  # Granite
    ("logits_scaling", lambda scale, logits: logits * scale),  # HyperCLOVA X
    ("lm_head_multiplier", lambda scale, logits: logits * scale),  # Falcon H1
]
