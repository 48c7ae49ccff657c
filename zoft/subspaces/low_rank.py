"""The low-rank space: along a direction a matrix moves by U V^T, with U fresh and V kept for some steps (LOZO)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from zoft.errors import UserError
from zoft.noise import counter
from zoft.noise.counter import sample
from zoft.noise.direction import Direction, key_of
from zoft.noise.source import CounterNoise, NoiseSource
from zoft.subspaces.base import BoundSubspace, Subspace
from zoft.utils.lazy import Tensor, torch
from zoft.weights.tensors import Weights, perturbed

log = logging.getLogger(__name__)

_PIECE = 1 << 18  # elements of a product made at a time on a CPU: it and the next term stay in the cache


@dataclass
class LowRank(Subspace):
    """Matrices move along z = U V^T / sqrt(r), with U drawn for each direction and V kept for ``interval`` steps.

    U is [m, r], and V [n, r] ~ N(0, 1); all directions of a step share V. Optimizers work on U's coordinates.

    Vectors, and matrices with no more than ``rank`` rows or columns, move in full; a tensor of more than two dimensions
    is taken as the matrix [shape[0], the rest].

    E||z||^2 = m n as in the full space, so that eps and the learning rate carry over from it. The paper queries at
    U V^T and divides the step by r: the same step at the same learning rate, and its eps is this one / sqrt(r). Its
    published code does not divide: a learning rate of that code is to be multiplied by r here.

    Args:
        law: distribution of U and of what moves in full: gaussian, rademacher (+-1), or sphere (all coordinates of a
            direction taken together are uniform, ||coordinates||^2 = their number).
        rank: columns r of U and V, at least 1.
        interval: steps (nu in the paper) that share one V, at least 1.

    References: Chen et al. 2024 (LOZO, arXiv 2410.07698), Algorithm 1. The published code draws U after V in the probes
    of a refresh step and without V in its update, so that those updates go where nothing was measured; here U and V
    have a stream each.
    """

    changes_basis: ClassVar[bool] = True

    rank: int = 2
    interval: int = 50

    def check(self) -> None:
        """Refuse an unknown law, rank < 1 and interval < 1."""
        super().check()
        self.require(self.rank >= 1, "rank", "at least 1")
        self.require(self.interval >= 1, "interval", "at least 1")

    def bind(self, weights: Weights, noise: str = "counter") -> BoundLowRank:
        """Coordinates are the elements of U, and the tensor's own where it moves in full."""
        if not any(_is_matrix(tensor, self.rank) for tensor in weights.tensors.values()):
            log.warning(
                "subspace=low_rank: no trained tensor has more than rank=%d rows and columns, so all of them move in "
                "full, as with subspace=full",
                self.rank,
            )
        return BoundLowRank(weights, self.source(weights, noise), self.rank, self.interval)

    def source(self, weights: Weights, noise: str) -> NoiseSource:
        """The counter: there is no published stream of low-rank directions."""
        self.check_noise(noise)
        # the counter's law is over coordinates: those of U for a matrix, the tensor's own else
        return CounterNoise(self.law, {n: math.prod(_shape(t, self.rank)) for n, t in weights.tensors.items()})


class BoundLowRank(BoundSubspace):
    """Coordinates of a matrix are U, row by row.

    Every element of z is made by the same r multiplications and r - 1 additions wherever it is needed, each rounded
    by itself, so that its bits depend neither on the device nor on the piece (a matrix product's would).

    Args:
        weights: what is trained.
        source: where U and the directions of what moves in full come from.
        rank: columns of U and V.
        interval: steps that share one V.

    Example:
        >>> weights = Weights(torch.nn.Linear(5, 4))
        >>> coordinates = LowRank(rank=2).bind(weights)
        >>> coordinates.shape("weight"), coordinates.shape("bias")
        ((4, 2), (4,))
        >>> u, v = coordinates.factors(Direction(0, 0), "weight")
        >>> torch.allclose(coordinates.z(Direction(0, 0), "weight"), u @ v.T)
        True
    """

    def __init__(self, weights: Weights, source: NoiseSource, rank: int, interval: int) -> None:
        super().__init__(weights, source)
        self.rank = rank
        self.interval = interval
        self._columns = {  # matrix name -> n; what moves in full is not in it
            name: tensor.numel() // tensor.shape[0]
            for name, tensor in weights.tensors.items()
            if _is_matrix(tensor, rank)
        }
        self._last_basis: tuple[Direction, str, Tensor] | None = None

    # ---- coordinates -------------------------------------------------------------------------------------------------

    def shape(self, name: str) -> tuple[int, ...]:
        """[m, r] for a matrix, else the tensor's own."""
        return _shape(self.weights.tensors[name], self.rank)

    def chunks(self, name: str) -> Iterator[tuple[int, int]]:
        """Flat ranges of coordinates; of a matrix whole rows of U."""
        if name not in self._columns:
            yield from super().chunks(name)
            return
        count = math.prod(self.shape(name))
        # whole rows of U: each moves one row of the matrix
        size = max(1, self._chunk(name) // self.rank) * self.rank
        yield from ((start, min(count, start + size)) for start in range(0, count, size))

    def combination(self, name: str, start: int, stop: int, terms: list[tuple[Direction, float]]) -> Tensor:
        """sum_j c_j U_j; refused where the directions do not share V."""
        # sum_j c_j U_j V^T = (sum_j c_j U_j) V^T needs one V
        if len({(direction.seed, direction.step) for direction, _ in terms}) > 1:
            raise UserError(
                "subspace=low_rank shares V between the directions of a step, and these have a seed each: "
                "use subspace=full with direction_seeds"
            )
        return super().combination(name, start, stop, terms)

    def products(self, direction: Direction, name: str, drawn: Tensor, start: int) -> Tensor:
        """<U_i V^T, U_j V^T> / r, from V^T V."""
        if name not in self._columns:
            return super().products(direction, name, drawn, start)
        basis = self._basis(direction, name).double()
        left = drawn.double().view(len(drawn), -1, self.rank)
        # <U_i V^T, U_j V^T> = tr(U_i (V^T V) U_j^T), over r
        return (left @ (basis @ basis.T / self.rank)).flatten(1) @ left.flatten(1).T

    def same_basis(self, name: str, old: Direction, new: Direction) -> bool:
        """Whether V is the same, or the tensor moves in full."""
        return name not in self._columns or self._refresh_period(old) == self._refresh_period(new)

    def transport(self, name: str, state: Tensor, old: Direction, new: Direction) -> Tensor:
        """A running mean of estimates in ``old``'s coordinates, carried over to ``new``'s: N V_old^T V_new / n.

        N stands for the step N V_old^T. Once V is drawn anew the same N would stand for N V_new^T, which has nothing to
        do with it; this is what N V_old^T becomes when projected onto V_new (V^T V is about n I). Of two random
        bases only about sqrt(r / n) of its length is left, so a momentum nearly begins anew.

        Args:
            name: the tensor.
            state: N, float32, of the coordinates' shape; not overwritten. It has to be linear in the estimates.
            old: a direction of the step that ``state`` was last updated in.
            new: a direction of the step to come.

        Returns:
            float32 [m, r]; ``state`` itself where V is the same, or the tensor moves in full.

        References: Chen et al. 2024 (LOZO), Algorithm 2 (LOZO-M).
        """
        if self.same_basis(name, old, new):
            return state
        overlap = self._draw_basis(self._refresh_period(old), name) @ self._basis(new, name).T  # V_old^T V_new: [r, r]
        return state @ overlap.div_(self._columns[name])

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The rows of the matrix whose rows of U these are, as flat ranges of whole rows."""
        if name not in self._columns:
            yield from super().pieces(name, start, stop)
            return
        # rows of U -> rows of the matrix
        n = self._columns[name]
        rows = max(1, self._chunk(name) // n)
        last = stop // self.rank
        yield from ((row * n, min(last, row + rows) * n) for row in range(start // self.rank, last, rows))

    def lift(self, direction: Direction, name: str, coordinates: Tensor, start: int, first: int, last: int) -> Tensor:
        """Elements [first, last) of C V^T / sqrt(r), where ``coordinates`` are whole rows of C."""
        if name not in self._columns:
            return super().lift(direction, name, coordinates, start, first, last)
        # whole rows of C, of which the elements [first, last) are cut out
        row, end, cut = self._rows(name, first, last)
        factor = coordinates.view(-1, self.rank)[row - start // self.rank : end - start // self.rank]
        # (C / sqrt(r)) V^T
        return _product(factor * self.rank**-0.5, self._basis(direction, name)).view(-1)[cut]

    def factors(self, direction: Direction, name: str) -> tuple[Tensor, Tensor] | None:
        """(U / sqrt(r) [m, r], V [n, r]), float32, for a matrix of two dimensions, else None."""
        if name not in self._columns or self.weights.tensors[name].dim() != 2:
            return None
        rows = self.weights.tensors[name].shape[0]
        return self._factor(direction, name, 0, rows), self._basis(direction, name).T.contiguous()

    def add_(self, out: Tensor, direction: Direction, name: str, start: int, scale: float) -> None:
        """``out += scale * z`` in one addition: an interrupt finds it done or not done."""
        # kernels add c U V^T to whole rows without a piece of z in memory
        if name not in self._columns or not self._add_rows_(out, direction, name, start, scale):
            super().add_(out, direction, name, start, scale)

    def _add_rows_(self, out: Tensor, direction: Direction, name: str, start: int, scale: float) -> bool:
        """Add with compiled kernels, where they are in use and the piece is whole rows; returns whether it was done."""
        compiled, n = counter.compiled_on(out.device), self._columns[name]
        if compiled is None or start % n or out.numel() % n or out.dtype != torch.float32:
            return False
        left = self._factor(direction, name, start // n, (start + out.numel()) // n)
        return compiled.add_product(left, self._basis(direction, name), out, scale)

    def spans(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """As in the full space; of a matrix whole rows, where ``start`` begins one."""
        yield from self._ranges(name, start, stop) if name in self._columns else super().spans(name, start, stop)

    def perturbed_rows(self, direction: Direction, name: str, rows: Tensor, scale: float) -> Tensor:
        """Rows of the matrix at theta + scale * z from their rows of U alone: [len(rows), n], in W's dtype."""
        if name not in self._columns:
            return super().perturbed_rows(direction, name, rows, scale)
        # the wanted rows of U, r numbers each, and no others
        places = rows.unsqueeze(1) * self.rank + torch.arange(self.rank, device=rows.device)
        factor = self.source.gather(direction, name, places).mul_(self.rank**-0.5)
        z = _product(factor, self._basis(direction, name))
        return perturbed(self.weights.tensors[name].data[rows], z, scale)

    def _is_lifted(self, name: str) -> bool:
        return name in self._columns

    # ---- U and V -----------------------------------------------------------------------------------------------------

    def _elements(self, direction: Direction, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of z, flat, made piece by piece."""
        if name not in self._columns:
            return super()._elements(direction, name, start, stop)
        pieces = []
        for first, last in self._ranges(name, start, stop):
            row, end, cut = self._rows(name, first, last)
            rows = _product(self._factor(direction, name, row, end), self._basis(direction, name))
            pieces.append(rows.view(-1)[cut])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _rows(self, name: str, first: int, last: int) -> tuple[int, int, slice]:
        """The rows that hold elements [first, last), and where in these rows the elements are."""
        n = self._columns[name]
        row, end = first // n, -(-last // n)
        return row, end, slice(first - row * n, last - row * n)

    def _ranges(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """[start, stop) cut at borders of rows, in pieces of bounded size."""
        n, size = self._columns[name], self._chunk(name)
        if self.weights.tensors[name].device.type == "cpu":
            size = min(size, _PIECE)
        # whole rows, at least one: a piece that begins within a row ends at a border
        size = max(1, size // n) * n
        while start < stop:
            end = min(stop, (start // n) * n + size)
            yield start, end
            start = end

    def _factor(self, direction: Direction, name: str, row: int, end: int) -> Tensor:
        """Rows [row, end) of U / sqrt(r): [end - row, r]."""
        # U / sqrt(r): the scale is put on the small factor, once
        drawn = self.draw(direction, name, row * self.rank, end * self.rank)
        return drawn.view(-1, self.rank).mul_(self.rank**-0.5)

    def _refresh_period(self, direction: Direction) -> Direction:
        """The name of V: the same for ``interval`` steps and for all directions of a step."""
        return Direction(direction.seed, direction.step // self.interval)

    def _basis(self, direction: Direction, name: str) -> Tensor:
        """V^T [r, n]; the last one is kept, since a tensor is worked on piece by piece."""
        refresh_period = self._refresh_period(direction)
        if self._last_basis is None or self._last_basis[:2] != (refresh_period, name):
            self._last_basis = (refresh_period, name, self._draw_basis(refresh_period, name))
        return self._last_basis[2]

    def _draw_basis(self, refresh_period: Direction, name: str) -> Tensor:
        # V by its own stream and period: drawing U neither moves nor needs it
        size = self.rank * self._columns[name]
        key = key_of(refresh_period, name, role="low_rank.V")  # U's stream has the role z
        return sample("gaussian", key, 0, size, self.weights.tensors[name].device).view(self.rank, -1)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left [m, r] times right [r, n], term by term: the bits of an element depend on its own factors alone."""
    # z_ik = sum_r u_ir v_kr as r products and r - 1 sums, each rounded by itself; a matrix product's order varies
    total = left[:, :1] * right[0]
    for k in range(1, left.shape[1]):
        total.add_(left[:, k : k + 1] * right[k])
    return total


def _is_matrix(tensor: Tensor, rank: int) -> bool:
    return tensor.dim() >= 2 and tensor.numel() > 0 and min(tensor.shape[0], tensor.numel() // tensor.shape[0]) > rank


def _shape(tensor: Tensor, rank: int) -> tuple[int, ...]:
    return (tensor.shape[0], rank) if _is_matrix(tensor, rank) else tuple(tensor.shape)
