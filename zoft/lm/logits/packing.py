"""Option tokens scored in packed rows (:mod:`zoft.lm.data.packing`) where that is the same as in separate ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from zoft.lm.logits.call import Inputs, arguments, inner, is_compiled, takes
from zoft.lm.logits.head import CannotServeError, Positions
from zoft.lm.logits.logits import log_probs_at
from zoft.lm.logits.support import FAILURES, close, refuse, tolerance_of, trials_allowed
from zoft.utils.lazy import Tensor, nn, torch
from zoft.weights.elsewhere import runtime_of
from zoft.weights.wider import TOLERANCE, widened

_WHAT = "the options of an example are not packed behind one context"
_WINDOWS = ("sliding_window", "attention_window", "attention_chunk_size", "window_size", "local_attention")
"""Fields of configs: how many tokens a layer sees. In a packed row an option's own tokens are further away."""

_checked: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()
_refused: WeakSet[nn.Module] = WeakSet()


def serves(model: nn.Module, packed: Mapping[str, Any]) -> bool:
    """Whether option tokens are scored in these packed rows, as far as is known so far."""
    if "segments" not in packed:  # nothing stands behind another option: ordinary rows
        return True
    if model in _refused or runtime_of(model) is not None:
        return False
    if is_compiled(model) or not takes(model, "position_ids"):
        _refuse(model, "it runs compiled" if is_compiled(model) else "its forward takes no position_ids")
        return False
    config, length = inner(model).config.get_text_config(), packed["input_ids"].shape[1]
    try:
        # a window or a table of positions that a packed row would exceed: its tokens would see less
        limits = [getattr(config, name, None) for name in ("max_position_embeddings", *_WINDOWS)]
    except RuntimeError:  # a field that differs from layer to layer: such configs refuse to give one value
        return False
    return all(not isinstance(limit, int) or isinstance(limit, bool) or length <= limit for limit in limits)


def is_known(model: nn.Module, packed: Mapping[str, Any]) -> bool:
    """Whether rows like these can be scored without probing the model first."""
    return "segments" not in packed or not serves(model, packed) or _size(packed) in _checked.get(model, ())


def packed_log_probs(
    model: nn.Module, packed: Mapping[str, Any], targets: Tensor, separately: Callable[[], Tensor]
) -> Tensor:
    """Log-probability of every option token, from packed rows if they give what separate rows give.

    The two are compared with the first packed batch, and again when rows are twice as long as any before; a model where
    they differ is named once and served separate rows from then on.

    Args:
        model: any causal language model.
        packed: what :func:`zoft.lm.data.packing.pack` made.
        targets: [N] the option tokens.
        separately: computes the same from separate rows.

    Returns:
        float32 [N].
    """
    if not serves(model, packed):
        return separately()
    positions = Positions(packed["row"], packed["column"])
    if "segments" not in packed:
        return log_probs_at(model, arguments(model, packed["input_ids"], packed["attention_mask"]), positions, targets)
    if is_known(model, packed):
        return log_probs_at(model, _tree_inputs(model, packed), positions, targets)
    # the first time for a model and size: separate rows say what is right
    plain = separately()
    if not trials_allowed() or not bool(torch.isfinite(plain).all()):
        return plain
    try:
        packed_values = log_probs_at(model, _tree_inputs(model, packed), positions, targets)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        _refuse(model, error)
        return plain
    if not close(packed_values, plain, tolerance_of(model)):
        _refuse(model, f"their scores would be off by {float((packed_values - plain).detach().abs().max()):.2g}")
        return plain
    try:
        # 16-bit agreement is not enough: what differs by a small term differs
        _check_in_wider_floats(model, packed, targets, separately)
    except FAILURES as error:  # out of memory, too: separate rows need less
        _refuse(model, error)
        return plain
    _checked.setdefault(model, set()).add(_size(packed))
    return packed_values  # as every later call: a resumed run, which compares again, must find the same bits


def _size(packed: Mapping[str, Any]) -> int:
    # rows of twice the length are another size: a class may treat long rows in another way
    return int(packed["input_ids"].shape[1]).bit_length()


def _refuse(model: nn.Module, why: object) -> None:
    _refused.add(model)
    refuse(model, _WHAT, why)


def _check_in_wider_floats(
    model: nn.Module, packed: Mapping[str, Any], targets: Tensor, separately: Callable[[], Tensor]
) -> None:
    """The same comparison where 16 bits round nothing away: a small term that differs is a term that differs.

    Raises:
        CannotServeError: the scores differ, or the class computes in 16 bits whatever its weights are.
    """
    with widened(model) as dtype:
        if dtype is None:
            return
        packed_values = log_probs_at(
            model, _tree_inputs(model, packed, dtype), Positions(packed["row"], packed["column"]), targets
        )
        plain = separately()
    if not close(packed_values, plain, TOLERANCE):
        raise CannotServeError(
            f"their scores would be off by {float((packed_values - plain).detach().abs().max()):.2g}"
        )


def _tree_inputs(model: nn.Module, packed: Mapping[str, Any], dtype: torch.dtype | None = None) -> Inputs:
    return {
        "input_ids": packed["input_ids"],
        "attention_mask": tree_mask(packed["segments"], inner(model).dtype if dtype is None else dtype),
        "position_ids": packed["position_ids"],
    }


def tree_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention to the context and to one's own option only, as transformers takes it: [E, 1, L, L], to be added.

    Args:
        segments: [E, L] -1 at padding, 0 in the context, k in what option k adds.
        dtype: the model's.

    Example:
        >>> import torch
        >>> (tree_mask(torch.tensor([[-1, 0, 1, 2]]), torch.float32)[0, 0] == 0).int().tolist()
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]
    """
    # query position i asks, key position j is asked
    asking, asked = segments.unsqueeze(2), segments.unsqueeze(1)
    length = segments.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    # j is seen from i if it is in the context or in i's own option, is no padding, and stands in front
    seen = ((asked == 0) | (asked == asking)) & (asked >= 0) & before
    seen |= torch.eye(length, dtype=torch.bool, device=segments.device)  # padding sees itself: no empty softmax
    mask = torch.zeros(seen.shape, dtype=dtype, device=segments.device)
    # added to attention scores: 0 where seen, the dtype's lowest number elsewhere
    return mask.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)
