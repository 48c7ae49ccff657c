"""Laws across directions: antithetic and orthogonal ones, sums, one for each example, and shaped by a state.

Each is a source of noise around another one. They work on coordinates, so they serve every subspace alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from zoft.errors import UserError
from zoft.noise.counter import sample
from zoft.noise.direction import Direction, key_of
from zoft.noise.source import NoiseSource
from zoft.utils.lazy import Tensor, torch

ACROSS = ("iid", "antithetic", "orthogonal")
"""How the directions of one step hang together."""

_DEPENDENT = 1e-12  # what is left of a direction without those before it, relative to its square: rounding

Get = Callable[[Direction], "Tensor"]
"""The same elements of another direction."""


class Transformed(NoiseSource):
    """A source whose numbers are computed from another source's numbers at the same places.

    Args:
        inner: the source around which this one stands.
    """

    def __init__(self, inner: NoiseSource) -> None:
        self.inner = inner

    def elements(self, direction: Direction, name: str, get: Get, where: slice | Tensor) -> Tensor:
        """Elements of one tensor of a direction.

        Args:
            direction: which.
            name: which tensor of it.
            get: the inner source's elements at the same places, float32; the result may be overwritten.
            where: flat places: a slice, or indices of any shape.
        """
        raise NotImplementedError

    def draw(
        self, direction: Direction, name: str, start: int, stop: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Elements [start, stop) of tensor ``name``, flat."""
        return self.elements(
            direction, name, lambda d: self.inner.draw(d, name, start, stop, device, dtype), slice(start, stop)
        )

    def gather(self, direction: Direction, name: str, indices: Tensor) -> Tensor:
        """Elements at any flat indices."""
        return self.elements(direction, name, lambda d: self.inner.gather(d, name, indices), indices)


class Antithetic(Transformed):
    """Directions 2 i and 2 i + 1 are each other's opposite: z and -z."""

    def elements(self, direction: Direction, name: str, get: Get, where: slice | Tensor) -> Tensor:
        """z of the pair, with its sign."""
        # z of the pair's number, drawn once for both
        z = get(replace(direction, index=direction.index // 2))
        return z.neg_() if direction.index % 2 else z


class Orthogonal(Transformed):
    """The q directions of a step are at right angles to each other, each of the length sqrt(d), and Haar-distributed.

    z'_j = sum_i z_i (R^-1)_ij sqrt(d) with Z^T Z = R^T R (Cholesky): Gram-Schmidt over all coordinates that move. The
    products are summed in float64; between devices the last bits of z' may differ.

    Args:
        inner: the source of independent directions.
        num_directions: q.
        gram: the inner products [q, q] of the inner source's directions of a step, float64, over what moves.
        dimension: how many coordinates move along a direction.

    References: Choromanski et al. 2018 (Structured Evolution with Compact Architectures).
    """

    def __init__(
        self,
        inner: NoiseSource,
        num_directions: int,
        gram: Callable[[NoiseSource, list[Direction]], Tensor],
        dimension: Callable[[Direction], int],
    ) -> None:
        super().__init__(inner)
        self.num_directions = num_directions
        self.gram = gram
        self.dimension = dimension
        self.columns_of_step: tuple[Direction, list[list[float]]] | None = None

    def elements(self, direction: Direction, name: str, get: Get, where: slice | Tensor) -> Tensor:
        """The combination of the step's independent directions that is orthogonal to those before it."""
        # z'_j = sum_{i <= j} z_i (R^-1)_ij sqrt(d): R is upper triangular, so later directions have no part
        column = self._columns(direction)[direction.index]
        total = get(replace(direction, index=0)).mul_(column[0])
        for index in range(1, direction.index + 1):
            total.add_(get(replace(direction, index=index)).mul_(column[index]))
        return total

    def _columns(self, direction: Direction) -> list[list[float]]:
        # one factorisation a step, for all of its directions and tensors
        first = replace(direction, index=0, example=None, mix=())
        if self.columns_of_step is None or self.columns_of_step[0] != first:
            dimension = self.dimension(first)
            if self.num_directions > dimension:
                raise UserError(
                    f"estimator.across=orthogonal: there are no {self.num_directions} directions at right angles in a "
                    f"space of {dimension} dimensions: lower estimator.num_directions, or take a larger subspace"
                )
            gram = self.gram(self.inner, [replace(first, index=index) for index in range(self.num_directions)])
            upper, failed = torch.linalg.cholesky_ex(gram.double().cpu(), upper=True)
            # R_jj^2 is what is left of z_j's square without the directions before it
            if failed or float(upper.diagonal().min()) ** 2 < _DEPENDENT * dimension:
                raise UserError(
                    f"estimator.across=orthogonal: the {self.num_directions} random directions of step "
                    f"{direction.step} are linearly dependent, as signs in few dimensions ({dimension} here) may be: "
                    "use subspace.law=gaussian, or lower estimator.num_directions"
                )
            # R^-1 sqrt(d): every z'_j has the length sqrt(d), as in the full space
            inverse = torch.linalg.inv(upper) * dimension**0.5
            self.columns_of_step = (first, inverse.T.tolist())
        return self.columns_of_step[1]


class ExampleSigns(Transformed):
    """Flipout: the directions of a step's examples share one z, and have signs of their own for rows and columns.

    z_i = z * (r_i s_i^T) with r_i, s_i random signs: each is distributed as z is (where z's law is symmetric), and
    those of two examples are uncorrelated.

    Args:
        inner: the source of z.
        shapes: name -> shape of the coordinates.

    References: Wen et al. 2018 (Flipout), section 3.1.
    """

    def __init__(self, inner: NoiseSource, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(inner)
        # columns of a matrix of coordinates; a vector has signs for its elements alone
        self.columns = {name: shape[-1] if len(shape) > 1 else 0 for name, shape in shapes.items()}
        self.sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        self._sign_cache: dict[tuple[Direction, str], tuple[Tensor, Tensor]] = {}

    def elements(self, direction: Direction, name: str, get: Get, where: slice | Tensor) -> Tensor:
        """z with the example's signs."""
        # one z for all examples of the step
        z = get(replace(direction, example=None))
        if direction.example is None:
            return z
        left, right = self._signs(direction, name, z.device)
        n = self.columns[name]
        if not n:
            return z.mul_(left[where])
        # z_i = z o (r_i s_i^T), at the flat places i = row n + column
        if isinstance(where, slice):
            first = where.start // n  # whole rows of signs, of which the piece may begin and end inside one
            rows = left[first : -(-where.stop // n)].unsqueeze(1) * right
            return z.mul_(rows.flatten()[where.start - first * n : where.stop - first * n])
        return z.mul_(left[where // n]).mul_(right[where % n])

    def _signs(self, direction: Direction, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        # signs of a step are kept, for they are asked for by every piece of every point
        if self._sign_cache and next(iter(self._sign_cache))[0].step != direction.step:
            self._sign_cache.clear()
        if (direction, name) not in self._sign_cache:
            columns = self.columns[name]
            counts = (self.sizes[name] // columns, columns) if columns else (self.sizes[name], 1)
            left, right = (
                sample("rademacher", key_of(direction, name, role=f"flipout.{side}.{direction.example}"), 0, n, device)
                for side, n in zip("rs", counts, strict=True)
            )
            self._sign_cache[direction, name] = (left, right)
        return self._sign_cache[direction, name]


class StateShaped(Transformed):
    """Directions that a state shapes: drawn around a momentum, or longer where the curvature is low.

    Args:
        inner: the source of unshaped directions.
        shape: (z, tensor name, flat places) -> the shaped elements; it may overwrite z.
    """

    def __init__(self, inner: NoiseSource, shape: Callable[[Tensor, str, slice | Tensor], Tensor]) -> None:
        super().__init__(inner)
        self.shape = shape

    def elements(self, direction: Direction, name: str, get: Get, where: slice | Tensor) -> Tensor:
        """The inner source's z, shaped."""
        # by the state as it is at this moment: it changes only when the step is written
        return self.shape(get(direction), name, where)


class LinearCombination(Transformed):
    """Sums of directions, by name: what a step would move along, as one direction."""

    def elements(self, direction: Direction, name: str, get: Get, where: slice | Tensor) -> Tensor:
        """sum_j c_j z_j for a direction with a mix, else its z."""
        if not direction.mix:
            return get(direction)
        # u = sum_j c_j z_j, drawn where the step would lead
        (first, factor), *rest = direction.mix
        total = get(first).mul_(factor)
        for other, factor in rest:
            total.add_(get(other).mul_(factor))
        return total
