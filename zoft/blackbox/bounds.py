"""Bounds: their forms, and two ways of keeping them, by projection and by a change of variable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from zoft.errors import UserError
from zoft.utils.lazy import Tensor, torch

WAYS = ("projection", "reparameterize")
"""What ``bounds_by`` can be."""

_NUDGE = 1e-3  # a start on a bound is moved inside by so much of the width: the change of variable is flat there


class Box:
    """Bounds of x, and how they are kept.

    ``projection`` moves what is outside to the nearest point inside: every query, and every step once it is taken.
    ``reparameterize`` searches y without bounds, x = l + (u - l) (1 + sin y) / 2 between two bounds, and
    x = l - 1 + sqrt(y^2 + 1) above one (below one likewise). eps and learning rate are then in units of y; where x0
    lies on a bound, where x(y) is flat, the search begins a thousandth inside.

    Args:
        x0: float64 tensors by name.
        bounds: None; a tuple (lower, upper) of numbers or arrays like x, None for no bound; a list of pairs, or an
            array [d, 2], one for each element; an object with ``lb`` and ``ub``; a dict of these for a dict of arrays.
        bounds_by: one of :data:`WAYS`.
        dtypes: the user's, by name: what is handed to f is within bounds in this dtype too.
        called: name -> what messages call the array.

    Raises:
        UserError: bounds of another form or that cross, and an x0 outside of them.

    References: James & Roos 1975 (MINUIT) for the two changes of variable.
    """

    def __init__(
        self,
        x0: dict[str, Tensor],
        bounds: Any,
        bounds_by: str,
        dtypes: dict[str, torch.dtype],
        called: Callable[[str], str],
    ) -> None:
        if bounds_by not in WAYS:
            raise UserError(f"bounds_by must be one of {', '.join(WAYS)}, got {bounds_by!r}")
        if bounds_by != "projection" and bounds is None:
            raise UserError(f"bounds_by={bounds_by} without bounds has no effect: give bounds, or leave it out")
        self.by, self.dtypes = bounds_by, dtypes
        of_each = by_name(bounds, x0, "bounds")
        self.lower, self.upper = {}, {}
        for name, value in x0.items():
            low, high = _pair(of_each.get(name), value)
            self.lower[name] = _end(low, value, 0, called(name))
            self.upper[name] = _end(high, value, 1, called(name))
            _check(value, self.lower[name], self.upper[name], called(name))
        self.inner = {
            name: (_within(self.lower[name], dtypes[name], 1), _within(self.upper[name], dtypes[name], -1))
            for name in x0
        }
        self.bounded = {
            name: bool(torch.isfinite(torch.cat((self.lower[name].view(-1), self.upper[name].view(-1)))).any())
            for name in x0
        }
        if all(bool(self.is_fixed(name).all()) for name in x0):
            raise UserError("the bounds leave nothing to move: lower and upper are equal everywhere")

    def is_fixed(self, name: str) -> Tensor:
        """Which elements have one value only."""
        return self.lower[name] == self.upper[name]

    def widths(self, name: str) -> Tensor:
        """upper - lower; infinite where a bound is."""
        return self.upper[name] - self.lower[name]

    def project_(self, name: str, u: Tensor, scale: Tensor) -> None:
        """Moves u to where u * scale is within bounds, where that is how they are kept."""
        if self.by == "projection" and self.bounded[name]:
            u.copy_(torch.minimum(torch.maximum(u, self.lower[name] / scale), self.upper[name] / scale))

    def outside(self, name: str, y: Tensor) -> Tensor:
        """x of y, float64."""
        if not self.bounded[name]:
            return y
        low, high = self.lower[name], self.upper[name]
        if self.by == "projection":
            return torch.minimum(torch.maximum(y, low), high)
        both, above, below = _kinds(low, high)
        x = torch.where(both, low + (high - low) * (1 + y.sin()) / 2, y)
        root = (y.square() + 1).sqrt() - 1
        return torch.where(above, low + root, torch.where(below, high - root, x))

    def inside(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """y of x, float64."""
        return x if self.by == "projection" else {name: self._inside(name, value) for name, value in x.items()}

    def _inside(self, name: str, x: Tensor) -> Tensor:
        low, high = self.lower[name], self.upper[name]
        both, above, below = _kinds(low, high)
        share = ((x - low) / (high - low)).clamp(_NUDGE, 1 - _NUDGE)
        y = torch.where(both, (2 * share - 1).asin(), x)
        for side, gap in ((above, x - low), (below, high - x)):
            y = torch.where(side, (gap.clamp_min(_NUDGE) + 1).square().sub(1).sqrt(), y)
        return torch.where(low == high, torch.zeros_like(x), y)

    def cast(self, name: str, x: Tensor) -> Tensor:
        """x in the user's dtype, within bounds in that dtype too."""
        cast = x.to(self.dtypes[name])
        if not self.bounded[name] or cast.dtype == torch.float64:
            return cast
        low, high = self.inner[name]
        return torch.minimum(torch.maximum(cast, low), high)


def _kinds(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which elements have both bounds, the lower one only, the upper one only."""
    from_below, from_above = torch.isfinite(low), torch.isfinite(high)
    return from_below & from_above, from_below & ~from_above, from_above & ~from_below


def by_name(values: Any, x0: dict[str, Tensor], what: str) -> dict[str, Any]:
    """A setting of each array of x0; refuses one of an array that is not there."""
    if not isinstance(values, Mapping):
        return dict.fromkeys(x0, values)
    unknown = sorted(set(values) - set(x0), key=str)
    if unknown:
        raise UserError(f"{what} has the keys {', '.join(map(str, unknown))}, which x0 does not have")
    return dict(values)


def _pair(bounds: Any, x0: Tensor) -> tuple[Any, Any]:
    """(lower, upper), whatever form they came in."""
    if bounds is None:
        return None, None
    if hasattr(bounds, "lb") and hasattr(bounds, "ub"):
        return bounds.lb, bounds.ub
    if isinstance(bounds, tuple):
        if len(bounds) == 2:
            return bounds
        raise UserError(
            f"bounds as a tuple are (lower, upper), got {len(bounds)} items: a pair for each element is a list of pairs"
        )
    pairs = list(bounds) if isinstance(bounds, (list, np.ndarray)) else []
    if len(pairs) != x0.numel() or not all(np.ndim(pair) == 1 and len(pair) == 2 for pair in pairs):
        raise UserError(
            f"bounds must be a tuple (lower, upper) or a list of {x0.numel()} pairs, one for each element of x0"
        )
    sides = []
    for side, missing in ((0, -np.inf), (1, np.inf)):
        values = [missing if pair[side] is None else pair[side] for pair in pairs]
        sides.append(np.asarray(values, dtype=float).reshape(tuple(x0.shape)))
    return sides[0], sides[1]


def _end(end: Any, x0: Tensor, side: int, called: str) -> Tensor:
    missing, word = (-np.inf, "lower") if side == 0 else (np.inf, "upper")
    try:
        tensor = torch.as_tensor(missing if end is None else end, dtype=torch.float64, device=x0.device)
        tensor = tensor.expand(x0.shape).contiguous()
    except (RuntimeError, TypeError, ValueError):
        shape = tuple(x0.shape)
        raise UserError(f"the {word} bound must be a number or have the shape of {called}, {shape}") from None
    if bool(torch.isnan(tensor).any()):
        raise UserError(
            f"the {word} bound of {called} is NaN somewhere: use None or an infinity where there is no bound"
        )
    return tensor


def _check(x0: Tensor, lower: Tensor, upper: Tensor, called: str) -> None:
    crossed = (lower > upper).view(-1).nonzero()
    if len(crossed):
        at = int(crossed[0])
        low, high = float(lower.view(-1)[at]), float(upper.view(-1)[at])
        raise UserError(f"bounds cross at element {at} of {called}: lower {low:g} is above upper {high:g}")
    out = ((x0 < lower) | (x0 > upper)).view(-1).nonzero()
    if len(out):
        at = int(out[0])
        x, low, high = (float(t.view(-1)[at]) for t in (x0, lower, upper))
        raise UserError(
            f"{called} is out of bounds: element {at} is {x:g}, and its bounds are {low:g} and {high:g}: begin inside"
        )


def _within(bound: Tensor, dtype: torch.dtype, way: int) -> Tensor:
    """The bound in another dtype, rounded towards the inside."""
    cast = bound.to(dtype)
    is_out = (cast.double() < bound) if way > 0 else (cast.double() > bound)
    if not bool(is_out.any()):
        return cast
    step = torch.full_like(cast.float(), way * np.inf)
    return torch.where(is_out, torch.nextafter(cast, step.to(dtype)), cast)
