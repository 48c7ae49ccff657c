"""The form of x (a vector or a dict of arrays, numpy or torch), converted to the tensors a search moves and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zoft.blackbox.bounds import Box, by_name
from zoft.errors import UserError
from zoft.utils.lazy import Tensor, torch
from zoft.weights.tensors import Weights

VECTOR = "x"
"""The name of a vector that has none of its own."""

Values = dict[str, "Tensor"]
"""Flat or shaped float64 tensors by name."""


class Space:
    """The numbers that are searched, as float64 tensors u, and the way from u to x.

    x = box(u * scale): the box keeps the bounds. The user's x has the dtype, shape and kind of x0; x0 is not touched.

    Args:
        x0: where the search begins: an array or tensor of floats of any shape, a sequence of numbers (then float64), or
            a dict of these.
        bounds: see :class:`zoft.blackbox.bounds.Box`.
        bounds_by: ``projection`` or ``reparameterize``.
        scale: by how much x moves when u moves by one: a number, or an array (a dict of them) like x0; > 0.

    Raises:
        UserError: an x0 that is no vector of finite floats or is out of bounds, and a scale that does not fit.

    Example:
        >>> space = Space({"w": [1.0, 2.0], "b": 3.0})
        >>> {name: value.tolist() for name, value in space.x(space.start()).items()}
        {'w': [1.0, 2.0], 'b': 3.0}
    """

    def __init__(self, x0: Any, bounds: Any = None, bounds_by: str = "projection", scale: Any = None) -> None:
        self.is_dict = isinstance(x0, Mapping)
        given = dict(x0) if self.is_dict else {VECTOR: x0}
        if not given:
            raise UserError("x0 is an empty dict: there is nothing to move")
        if not all(isinstance(name, str) for name in given):
            raise UserError(f"the keys of x0 must be strings, got {next(n for n in given if not isinstance(n, str))!r}")
        self.likes = {name: _array(value, self._called(name)) for name, value in given.items()}
        self.x0: Values = {name: _float64(like) for name, like in self.likes.items()}
        for name, value in self.x0.items():
            if not bool(torch.isfinite(value).all()):
                raise UserError(
                    f"{self._called(name)} has elements that are not finite: the search must begin somewhere"
                )
        self.box = Box(
            self.x0, bounds, bounds_by, {n: _torch_dtype(like) for n, like in self.likes.items()}, self._called
        )
        self.scale = self._scales(1.0 if scale is None else scale)
        self.takes_scale = scale is None and bounds_by == "projection"  # from the bounds, where that is wanted

    def scale_by_bounds(self) -> None:
        """A quarter of the width where both bounds are there, unless a scale was given."""
        for name in self.scale if self.takes_scale else ():
            width = self.box.widths(name)
            self.scale[name] = torch.where(torch.isfinite(width) & (width > 0), width / 4, self.scale[name])

    @property
    def num_elements(self) -> int:
        """d: how many numbers are searched."""
        return sum(value.numel() for value in self.x0.values())

    def _called(self, name: str) -> str:
        return f"x0[{name!r}]" if self.is_dict else "x0"

    def _scales(self, scale: Any) -> Values:
        scales, of_each = {}, by_name(scale, self.x0, "scale")
        for name, value in self.x0.items():
            factor = of_each.get(name, 1.0)
            try:
                tensor = torch.as_tensor(factor, dtype=torch.float64, device=value.device).expand(value.shape)
            except (RuntimeError, TypeError, ValueError):
                raise UserError(f"scale must be a number or have the shape of {self._called(name)}") from None
            if not bool(((tensor > 0) & torch.isfinite(tensor)).all()):
                raise UserError(f"scale must be > 0 and finite, got {factor!r}")
            scales[name] = tensor
        return scales

    # ---- u and x -----------------------------------------------------------------------------------------------------

    def start(self) -> Values:
        """u of x0."""
        return {name: u / self.scale[name] for name, u in self.box.inside(self.x0).items()}

    def weights(self) -> Weights:
        """A module's weights, of the names of x0, that are u; they begin at x0."""
        module = torch.nn.Module()
        for name, u in self.start().items():
            module._parameters[name] = torch.nn.Parameter(u.clone().contiguous())  # a name may have dots in it
        return Weights(module)

    def project_(self, u: Values) -> None:
        """Where bounds are kept by projection, u comes back into them."""
        for name, value in u.items():
            self.box.project_(name, value, self.scale[name])

    def x(self, u: Mapping[str, Tensor]) -> Any:
        """x in the user's form, its memory its own."""
        values = {name: self._like(name, self.box.outside(name, value * self.scale[name])) for name, value in u.items()}
        return values if self.is_dict else values[VECTOR]

    def _like(self, name: str, value: Tensor) -> Any:
        like = self.likes[name]
        cast = self.box.cast(name, value.view(self.x0[name].shape))
        if not isinstance(like, np.ndarray):
            return cast.clone() if cast.data_ptr() == value.data_ptr() else cast
        return np.array(cast.cpu().numpy(), dtype=like.dtype)

    def stacked(self, xs: Sequence[Any]) -> Any:
        """n points as one: arrays with n in front."""

        def stack(values: list[Any]) -> Any:
            return np.stack(values) if isinstance(values[0], np.ndarray) else torch.stack(values)

        return {name: stack([x[name] for x in xs]) for name in self.likes} if self.is_dict else stack(list(xs))

    @property
    def most_eps(self) -> float:
        """Beyond it queries say little: half a turn of the sine that keeps two bounds is pi wide."""
        if self.box.by == "projection" or not any(self.box.bounded.values()):
            return math.inf
        return math.pi / 4 / max(float(scale.max()) for scale in self.scale.values())

    # ---- resolution --------------------------------------------------------------------------------------------------

    def spacing(self) -> Values:
        """Distance of x0 to the next number of its dtype, in units of u, element by element."""
        gaps = {}
        for name, value in self.x0.items():
            info = torch.finfo(_torch_dtype(self.likes[name]))
            gaps[name] = value.abs().clamp_min(info.tiny) * info.eps / self.scale[name]
        return gaps

    def check_eps(self, eps: float, reach: float) -> None:
        """Refuse a radius that is rounded away at x0.

        Args:
            eps: the estimator's, in units of u.
            reach: how far a direction goes in the one coordinate it moves most, about.
        """
        for name, gap in self.spacing().items():
            lost = (eps * reach < gap / 2) & ~self.box.is_fixed(name)
            if bool(lost.any()):
                at = int(lost.view(-1).nonzero()[0])
                x, smallest = float(self.x0[name].view(-1)[at]), float(gap.view(-1)[at]) / reach
                dtype = str(_torch_dtype(self.likes[name])).removeprefix("torch.")
                raise UserError(
                    f"eps={eps:g} is below the resolution of {dtype} at element {at} of {self._called(name)}, which is "
                    f"{x:g}: x + eps * z would be x; raise eps to {smallest:.1g} or more, or scale that element"
                )


def _array(value: Any, called: str) -> Any:
    """x0 as an array or tensor of floats; refuses what is none."""
    if not isinstance(value, np.ndarray):
        if type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach"):
            value = value.detach()
            if not value.dtype.is_floating_point:
                raise UserError(f"{called} has dtype {value.dtype}, and steps are real numbers: pass {called}.float()")
            return _not_empty(value, value.numel(), called)
        try:
            value = np.asarray(value, dtype=None if isinstance(value, np.generic) else np.float64)
        except (TypeError, ValueError):
            raise UserError(
                f"{called} must be an array of floats or a dict of arrays, got {type(value).__name__}"
            ) from None
    if value.dtype not in (np.float16, np.float32, np.float64):
        raise UserError(f"{called} has dtype {value.dtype}, and steps are real numbers: pass {called}.astype(float)")
    return _not_empty(value, value.size, called)


def _not_empty(value: Any, size: int, called: str) -> Any:
    if not size:
        raise UserError(f"{called} is empty: there is nothing to move")
    return value


def _float64(value: Any) -> Tensor:
    tensor = torch.from_numpy(np.array(value, dtype=np.float64)) if isinstance(value, np.ndarray) else value
    return tensor.to(torch.float64).clone(memory_format=torch.contiguous_format)


def _torch_dtype(like: Any) -> torch.dtype:
    return getattr(torch, str(like.dtype)) if isinstance(like, np.ndarray) else like.dtype
