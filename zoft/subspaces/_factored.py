"""The base of subspaces of matrices: along a direction a matrix moves by Z = s L C R^T, and C are its coordinates."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from zoft.errors import UserError
from zoft.noise.direction import Direction
from zoft.noise.source import CounterNoise, NoiseSource
from zoft.subspaces._matrices import matmul, rows_of
from zoft.subspaces.base import BoundSubspace, Subspace
from zoft.utils.lazy import Tensor, torch
from zoft.weights.tensors import Weights, perturbed

log = logging.getLogger(__name__)

# Elements of Z that one matrix product makes. Where the products begin and end is fixed by the tensor's shape alone, so
# that the bits of an element do not depend on the piece that was asked for.
_BLOCK = 1 << 16
_BLOCK_GPU = 1 << 22

Bases = tuple["Tensor | None", "Tensor | None"]
"""(L [m, a], R [n, b]) with orthonormal columns; None is the identity."""


@dataclass(frozen=True)
class MatrixLayout:
    """How a tensor is taken.

    Args:
        rows: m of the matrix that its elements make up, in flat order.
        columns: n.
        shape: of the coordinates C.
        scale: s, for which E||Z||^2 = m n.
        by_rows: row i of Z is made of row i of C alone (L is the identity).
    """

    rows: int
    columns: int
    shape: tuple[int, ...]
    scale: float
    by_rows: bool = False

    def basis_elements(self) -> int:
        """Numbers in L [m, a] and R [n, b]; in U and V where C is a vector."""
        if len(self.shape) == 1:
            return (self.rows + self.columns) * self.shape[0]
        sides = ((self.rows, self.shape[0]), (self.columns, self.shape[1]))
        # a side with as many coordinates as rows (or columns) is the identity: it takes no memory
        return sum(full * few for full, few in sides if full != few)


@dataclass
class Factored(Subspace):
    """Base of the subspaces of matrices.

    Args:
        rank: columns r of the bases, at least 1. Vectors, and matrices with no more rows or columns, move in full.
    """

    rank: int = 64

    def check(self) -> None:
        """Refuse an unknown law and rank < 1."""
        super().check()
        self.require(self.rank >= 1, "rank", "at least 1")

    def layout(self, rows: int, columns: int) -> MatrixLayout:
        """How a matrix of this size moves."""
        raise NotImplementedError

    def layouts(self, weights: Weights) -> dict[str, MatrixLayout]:
        """name -> layout of what moves in the subspace; the rest moves in full."""
        sizes = {name: self.matrix(tuple(tensor.shape)) for name, tensor in weights.tensors.items()}
        # a matrix with no more than r rows or columns has nothing to save: its own elements are its coordinates
        return {name: self.layout(*size) for name, size in sizes.items() if size is not None and min(size) > self.rank}

    def matrix(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """(m, n) of the matrix that a tensor is taken as: [shape[0], the rest]; None for vectors."""
        return (shape[0], math.prod(shape[1:])) if len(shape) >= 2 else None

    def coordinates(self, weights: Weights, source: NoiseSource, layouts: dict[str, MatrixLayout]) -> BoundFactored:
        """The subspace for these weights."""
        raise NotImplementedError

    def bind(self, weights: Weights, noise: str = "counter") -> BoundFactored:
        """Coordinates are the elements of C, and the tensor's own where it moves in full."""
        layouts, source = self.layouts(weights), self.source(weights, noise)
        if not layouts:
            log.warning(
                "subspace=%s: no trained tensor has more than rank=%d rows and columns, so all of them move in full, "
                "as with subspace=full",
                *(self.name(), self.rank),
            )
        return self.coordinates(weights, source, layouts)

    def source(self, weights: Weights, noise: str) -> NoiseSource:
        """The counter, over the coordinates: there is no published stream of structured directions."""
        self.check_noise(noise)
        # the counter's stream is of C's size; sphere's length is over coordinates, not weights
        shapes = {name: math.prod(layout.shape) for name, layout in self.layouts(weights).items()}
        return CounterNoise(self.law, weights.sizes() | shapes)


class BoundFactored(BoundSubspace):
    """Coordinates of a matrix are C, row by row.

    Z is made by matrix products of whole blocks of rows, always the same ones, from which what is asked for is cut.
    Devices and numbers of threads may differ in its last bits.

    A subclass says what the bases are (:meth:`make_bases`), and if need be when they change (:meth:`basis_key`). A
    basis is a function of seed and period, kept while it is in use: nothing of it has to be saved.

    Args:
        weights: what is trained.
        source: where C and the directions of what moves in full come from.
        layouts: what moves in the subspace.
        name: the subspace's.
        interval: steps that share the bases; 0: all do.
    """

    def __init__(
        self, weights: Weights, source: NoiseSource, layouts: dict[str, MatrixLayout], name: str, interval: int = 0
    ) -> None:
        super().__init__(weights, source)
        self.layouts = layouts
        self.name = name
        self.interval = interval
        self._bases: dict[str, tuple[Hashable, Bases]] = {}
        self._drawn: tuple[Direction, str, Tensor] | None = None
        self._overlap: tuple[tuple[str, Hashable, Hashable], Bases] | None = None

    # ---- bases -------------------------------------------------------------------------------------------------------

    def make_bases(self, refresh_period: Direction, name: str) -> Bases:
        """(L, R) of a period, float32 on the tensor's device; the period's name is a direction's."""
        raise NotImplementedError

    def refresh_period(self, direction: Direction) -> Direction:
        """The name of the bases: the same for ``interval`` steps and for all directions of a step."""
        # a basis has a direction's name, so that it has a stream of random numbers by the same key
        return Direction(direction.seed, direction.step // self.interval if self.interval else 0)

    def basis_key(self, direction: Direction, name: str) -> Hashable:
        """Equal for two directions exactly when they have the bases of tensor ``name`` in common."""
        del name
        return self.refresh_period(direction)

    def bases(self, direction: Direction, name: str) -> Bases:
        """(L, R) of a matrix; those of the last period asked for are kept."""
        basis_key = self.basis_key(direction, name)
        entry = self._bases.get(name)
        # of the last period only: a state is carried over from the one before to this one, and then that is past
        if entry is None or entry[0] != basis_key:
            with torch.inference_mode(False), torch.no_grad():  # they outlive the forward in which they are made
                entry = self._bases[name] = (basis_key, self.make_bases(self.refresh_period(direction), name))
        return entry[1]

    def basis_elements(self) -> int:
        """Numbers in all L and R."""
        return sum(layout.basis_elements() for layout in self.layouts.values())

    def begin(self, direction: Direction) -> None:
        """What was kept for a step goes."""
        super().begin(direction)
        self._drawn = None

    # ---- coordinates -------------------------------------------------------------------------------------------------

    def shape(self, name: str) -> tuple[int, ...]:
        """C's for a matrix, else the tensor's own."""
        return self.layouts[name].shape if name in self.layouts else super().shape(name)

    def gain(self, name: str) -> float:
        """s for a matrix: ||Z|| = s ||C||."""
        return self.layouts[name].scale if name in self.layouts else super().gain(name)

    def chunks(self, name: str) -> Iterator[tuple[int, int]]:
        """Flat ranges of coordinates: whole rows where each moves one of the matrix, else all of C, which is small."""
        if name not in self.layouts:
            yield from super().chunks(name)
            return
        layout = self.layouts[name]
        count = math.prod(layout.shape)
        width, size = layout.shape[-1], count
        # by rows: a chunk of C moves whole rows of Z, in whole blocks of the product
        if layout.by_rows:
            rows, block = max(1, self._chunk(name) // width), self._block_rows(name)
            size = (rows // block * block or rows) * width
        yield from ((start, min(count, start + size)) for start in range(0, count, size))

    def combination(self, name: str, start: int, stop: int, terms: list[tuple[Direction, float]]) -> Tensor:
        """sum_j c_j C_j; refused where the directions do not share their bases."""
        # sum_j c_j s L C_j R^T = s L (sum_j c_j C_j) R^T needs one L and one R
        if len({self.refresh_period(direction) for direction, _ in terms}) > 1:
            raise UserError(
                f"subspace={self.name} shares its bases between the directions of a step, and these have bases of "
                "their own: use subspace=full with direction_seeds"
            )
        return super().combination(name, start, stop, terms)

    def same_basis(self, name: str, old: Direction, new: Direction) -> bool:
        """Whether the bases are the same, or the tensor moves in full."""
        return name not in self.layouts or self.basis_key(old, name) == self.basis_key(new, name)

    def transport(self, name: str, state: Tensor, old: Direction, new: Direction) -> Tensor:
        """What a state linear in the estimates becomes in new bases: (L'^T L) C (R^T R'), the projection of its step.

        Args:
            name: the tensor.
            state: float32, of the coordinates' shape; not overwritten.
            old: a direction of the step that ``state`` was last updated in.
            new: a direction of the step to come.
        """
        # same bases: the same coordinates mean the same step
        if self.same_basis(name, old, new):
            return state
        # L' (L'^T L C R^T R') R'^T: the old step L C R^T, projected on the new bases on either side
        left, right = self._overlaps(name, old, new)
        if left is not None:
            state = left @ state
        return state if right is None else state @ right

    def _overlaps(self, name: str, old: Direction, new: Direction) -> Bases:
        """(L'^T L, R^T R'); the last pair is kept, since an optimizer may carry over more than one state."""
        key = (name, self.basis_key(old, name), self.basis_key(new, name))
        if self._overlap is None or self._overlap[0] != key:
            left, right = self.bases(old, name)
            new_left, new_right = self.bases(new, name)
            self._overlap = (
                key,
                (
                    None if left is None or new_left is None else new_left.T @ left,
                    None if right is None or new_right is None else right.T @ new_right,
                ),
            )
        return self._overlap[1]

    # ---- Z = (s L C) R^T in two factors ------------------------------------------------------------------------------

    def left(self, direction: Direction, name: str, coordinates: Tensor, row: int, end: int) -> Tensor:
        """Rows [row, end) of the left factor, a new tensor: of s L C, or of s L where R is the identity.

        Args:
            direction: says which bases.
            name: the tensor.
            coordinates: C, or its rows [row, end) where each moves a row of the matrix.
            row: first row.
            end: one past the last.
        """
        left, right = self.bases(direction, name)
        # L = I: s C, whose rows are those of the matrix
        if left is None:
            factor = coordinates.clone()
        # R = I: s L, and C is the right factor (:meth:`right`)
        elif right is None:
            factor = left[row:end].clone()
        # s L C, once a block of rows, before the product with R^T
        else:
            factor = matmul(left[row:end], coordinates)
        return factor.mul_(self.layouts[name].scale)

    def right(self, direction: Direction, name: str, coordinates: Tensor) -> Tensor:
        """The right factor [k, n]: R^T, or C where R is the identity."""
        right = self.bases(direction, name)[1]
        return coordinates if right is None else right.T

    def factors(self, direction: Direction, name: str) -> tuple[Tensor, Tensor] | None:
        """(s L C [m, k], R [n, k]), float32, for a matrix of two dimensions that is taken as it is, else None."""
        layout = self.layouts.get(name)
        # a reshaped matrix (long and narrow ones) is no m x n product as the layer sees it
        if layout is None or tuple(self.weights.tensors[name].shape) != (layout.rows, layout.columns):
            return None
        coordinates = self._rows_of(direction, name, 0, layout.rows)
        left = self.left(direction, name, coordinates, 0, layout.rows)
        return left, self.right(direction, name, coordinates).T.contiguous()

    def _rows_of(self, direction: Direction, name: str, row: int, end: int) -> Tensor:
        """What :meth:`left` needs of a direction's C for these rows; not to be overwritten."""
        layout = self.layouts[name]
        if layout.by_rows:
            width = layout.shape[1]
            return self.draw(direction, name, row * width, end * width).view(-1, width)
        # C is small: drawn once for all blocks of rows of a direction
        if self._drawn is None or self._drawn[:2] != (direction, name):
            drawn = self.draw(direction, name, 0, math.prod(layout.shape)).view(layout.shape)
            self._drawn = (direction, name, drawn)
        return self._drawn[2]

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The rows that these rows of C move, or all of the matrix."""
        if name not in self.layouts:
            yield from super().pieces(name, start, stop)
            return
        layout = self.layouts[name]
        num_elements = layout.rows * layout.columns
        # rows of C -> rows of Z, as flat ranges
        first, last = (
            (i // layout.shape[1] * layout.columns for i in (start, stop)) if layout.by_rows else (0, num_elements)
        )
        yield from self._cut(name, first, last)

    def spans(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """As in the full space; of a matrix whole blocks, where a piece may be as large."""
        yield from self._cut(name, start, stop) if name in self.layouts else super().spans(name, start, stop)

    def lift(self, direction: Direction, name: str, coordinates: Tensor, start: int, first: int, last: int) -> Tensor:
        """Elements [first, last) of s L C R^T."""
        if name not in self.layouts:
            return super().lift(direction, name, coordinates, start, first, last)
        layout = self.layouts[name]
        matrix = coordinates.view(-1, layout.shape[1]) if layout.by_rows else coordinates.view(layout.shape)
        step = torch.empty(last - first, dtype=torch.float32, device=coordinates.device)
        for row, end, begin, stop in self._blocks(name, first, last):
            # rows of C for this block; those that are not given count as zero, and are cut away below
            of_block = rows_of(matrix, row - start // layout.shape[1], end - row) if layout.by_rows else matrix
            step[begin - first : stop - first] = self._block(direction, name, of_block, row, end, begin, stop)
        return step

    def perturbed_rows(self, direction: Direction, name: str, rows: Tensor, scale: float) -> Tensor:
        """Rows of the matrix at theta + scale * z, from the blocks that hold them: [len(rows), n], in W's dtype."""
        if name not in self.layouts:
            return super().perturbed_rows(direction, name, rows, scale)
        tensor, n = self.weights.tensors[name].data, self.layouts[name].columns
        # reshaped: a row of the tensor is no row of the matrix
        if tensor.shape[1] != n:  # reshaped
            return perturbed(tensor[rows], self.z(direction, name)[rows], scale)
        z = torch.empty(len(rows), n, dtype=torch.float32, device=tensor.device)
        size = self._block_rows(name)
        # block by block: a row's bits must be those of the whole block's product
        blocks = rows // size
        for block in torch.unique(blocks).tolist():
            row, end = block * size, min(len(tensor), (block + 1) * size)
            of_block = (blocks == block).nonzero().squeeze(1)
            z[of_block] = self._elements(direction, name, row * n, end * n).view(-1, n)[rows[of_block] - row]
        return perturbed(tensor[rows], z, scale)

    def _is_lifted(self, name: str) -> bool:
        return name in self.layouts

    # ---- blocks ------------------------------------------------------------------------------------------------------

    def _elements(self, direction: Direction, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of z, flat; the caller may overwrite them."""
        if name not in self.layouts:
            return super()._elements(direction, name, start, stop)
        cached = self.z_cache.get((direction, name))
        if cached is not None:
            return cached.view(-1)[start:stop].clone()
        z = torch.empty(stop - start, dtype=torch.float32, device=self.weights.tensors[name].device)
        for row, end, first, last in self._blocks(name, start, stop):
            coordinates = self._rows_of(direction, name, row, end)
            z[first - start : last - start] = self._block(direction, name, coordinates, row, end, first, last)
        return z

    def _block(
        self, direction: Direction, name: str, coordinates: Tensor, row: int, end: int, first: int, last: int
    ) -> Tensor:
        """Elements [first, last) of Z, from the block of the rows [row, end) that holds them."""
        left = self.left(direction, name, coordinates, row, end)
        # Z = (s L C) R^T for whole rows, then the elements that were asked for
        n = self.layouts[name].columns
        return matmul(left, self.right(direction, name, coordinates)).view(-1)[first - row * n : last - row * n]

    def _block_rows(self, name: str) -> int:
        block = _BLOCK if self.weights.tensors[name].device.type == "cpu" else _BLOCK_GPU
        return max(1, block // self.layouts[name].columns)

    def _blocks(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """(first row, one past the last, first element, one past the last) of the blocks that hold [start, stop)."""
        layout, size = self.layouts[name], self._block_rows(name)
        while start < stop:
            # blocks begin at multiples of their size, wherever the piece begins
            row = start // (layout.columns * size) * size
            end = min(layout.rows, row + size)
            last = min(stop, end * layout.columns)
            yield row, end, start, last
            start = last

    def _cut(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """[start, stop) in pieces of bounded size: of whole blocks, or within one where a block is larger."""
        block, size = self._block_rows(name) * self.layouts[name].columns, self._chunk(name)
        blocks_size = size // block * block
        while start < stop:
            # cut at borders of blocks, so that no block's product is made twice
            border = start // block * block
            end = min(stop, border + blocks_size if blocks_size else min(start + size, border + block))
            yield start, end
            start = end
