"""What every subspace promises: coordinates to draw and to update in, and the way from them to a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from zoft.component import Component
from zoft.errors import UserError
from zoft.noise.counter import perturb_with
from zoft.noise.direction import Direction
from zoft.noise.joint import Antithetic, ExampleSigns, LinearCombination, Orthogonal, StateShaped
from zoft.noise.mezo import TorchSequentialNoise
from zoft.noise.source import LAWS, SOURCES, CounterNoise, NoiseSource
from zoft.utils.lazy import Tensor, torch
from zoft.weights.tensors import Weights, perturbed

# Elements updated at a time: bounds the temporaries of an update. No more than noise makes at a time
# (zoft.noise.counter), so that adding a direction to a piece is one addition, which a signal finds done or not done.
_CHUNK = 1 << 18
_CHUNK_GPU = 1 << 25  # the same where launching a kernel costs more than its work on a smaller piece
_KEEP_MODELS = 1 << 22  # trained elements up to which z is kept: adapters and norms draw each direction once a step
_KEEP = 1 << 24  # elements kept at most, over all of a step's directions: 64 MiB

SubspaceState = dict[str, Any]
"""Tensors and plain numbers that a bound subspace has observed or chosen, as journals and checkpoints hold them."""

NOT_LAWS = {
    "cone": "a cone around the momentum is optimizer=cone",
    **dict.fromkeys(("orthogonal", "antithetic"), "how a step's directions hang together is estimator.across"),
}
"""What papers call a law of directions, and belongs to another part here."""


@dataclass
class Subspace(Component):
    """Which coordinates move.

    Args:
        law: distribution of one direction: gaussian, rademacher (+-1), or sphere (uniform, ||z||^2 = weights).
    """

    changes_basis: ClassVar[bool] = False
    """Whether the same coordinates stand for other steps in the weights after a while (a refreshed basis)."""

    has_matrices: ClassVar[bool] = True
    """Whether the coordinates of a matrix are a matrix too."""

    keeps_choices: ClassVar[bool] = False
    """Whether what the seed chose is kept for several steps, or for the run (true where there is an ``interval``)."""

    in_one_process: ClassVar[bool] = False
    """Whether its directions follow the rows of one process alone, so that a run cannot have several."""

    moves_outputs: ClassVar[bool] = False
    """Whether directions are of layers' outputs, and not of the weights."""

    laws: ClassVar[tuple[str, ...]] = LAWS
    """The laws that it draws by."""

    serves_sequential: ClassVar[bool] = False
    """Whether MeZO's own stream of numbers, one for every weight, makes its directions."""

    law: str = "gaussian"

    def check(self) -> None:
        """Refuse an unknown law."""
        self.require(self.law in self.laws, "law", f"one of {', '.join(self.laws)}", NOT_LAWS.get(self.law, ""))

    def check_with(self, method: Any) -> None:
        """Refuse the other parts of a :class:`zoft.step.method.Method` that make no sense with this subspace."""

    def check_noise(self, noise: str) -> None:
        """Refuse a noise source that does not make this subspace's directions.

        Raises:
            UserError: MeZO's own stream, where directions are not Gaussian ones of every weight; an unknown one.
        """
        if noise not in SOURCES:
            raise UserError(f"estimator.noise must be one of {', '.join(SOURCES)}, got {noise!r}")
        if noise == "torch_sequential" and not self.serves_sequential:
            raise UserError(
                f"noise=torch_sequential draws MeZO's directions, which move every weight by itself: subspace="
                f"{self.name()} needs estimator.noise=counter"
            )
        if noise == "torch_sequential" and self.law != "gaussian":
            raise UserError(
                f"noise=torch_sequential draws Gaussian directions; subspace.law={self.law} needs noise=counter"
            )

    def observes_at(self, step: int) -> str:
        """What is looked at before the queries of this step.

        Returns:
            "inputs" of linear layers (one clean forward), "gradient" (a backward pass: three queries), or "" for none.
        """
        del step
        return ""

    def bind(self, weights: Weights, noise: str = "counter") -> BoundSubspace:
        """This subspace for these weights, drawing from ``noise`` (one of :data:`zoft.noise.source.SOURCES`)."""
        raise NotImplementedError

    def source(self, weights: Weights, noise: str) -> NoiseSource:
        """The noise source by name."""
        self.check_noise(noise)
        if noise == "counter":
            return CounterNoise(self.law, weights.sizes())
        return TorchSequentialNoise([(n, t.shape, t.dtype, t.device) for n, t in weights.tensors.items()])


def num_moving(coordinates: BoundSubspace) -> int:
    """How many of the trained numbers are in tensors that directions, or a backward pass, ever move."""
    moving = (name for name in coordinates.weights.tensors if coordinates.ever_moves(name))
    return sum(coordinates.weights.tensors[name].numel() for name in {*moving, *coordinates.backprop_names})


class BoundSubspace:
    """A subspace bound to tensors: draws coordinates, lifts them to pieces of tensors, perturbs weights.

    This class is the full space (coordinates are the tensor's own elements). A structured subspace overrides
    :meth:`shape`, :meth:`pieces`, :meth:`draw`, :meth:`lift`, :meth:`_is_lifted` and :meth:`_elements`; the rest
    follows from them.

    Args:
        weights: what is trained.
        source: where random numbers come from.
    """

    def __init__(self, weights: Weights, source: NoiseSource) -> None:
        self.weights = weights
        self.source = source
        # few weights: a direction is drawn once a step and kept; many: drawn where it is needed, never held as a whole
        self.keeps = weights.num_elements <= _KEEP_MODELS
        self.z_cache: dict[tuple[Direction, str], Tensor] = {}
        self._cached_elements = 0
        self._cached_step = (-1, -1)
        self.backprop_names: frozenset[str] = frozenset()  # trained by other means: no direction moves them

    # ---- a step begins -----------------------------------------------------------------------------------------------

    def begin(self, direction: Direction) -> None:
        """A step begins, and the weights are clean: what depends on them is settled here and holds for the step."""
        del direction

    def basis_elements(self) -> int:
        """Numbers (32 bits each) that bases and masks take, as long as they are in use."""
        return 0

    def state_dict(self) -> SubspaceState:
        """State that a restart needs: tensors and plain numbers; empty where all follows from seed and step."""
        return {}

    def load_state_dict(self, state: SubspaceState) -> None:
        """Take over what :meth:`state_dict` gave."""
        del state

    def arrange(
        self,
        across: str = "iid",
        num_directions: int = 1,
        *,
        per_example: bool = False,
        mixes: bool = False,
        shape: Callable[[Tensor, str, slice | Tensor], Tensor] | None = None,
    ) -> None:
        """How the directions of a step hang together (:mod:`zoft.noise.joint`); to be called once, before any is drawn.

        Args:
            across: one of :data:`zoft.noise.joint.ACROSS`.
            num_directions: directions of a step.
            per_example: directions that carry an example's number are the example's own.
            mixes: directions that are sums of others are asked for.
            shape: what a state makes of the elements of a direction (see :class:`zoft.noise.joint.StateShaped`).
        """
        # from the inside out: the rule shapes z, an example's signs go onto that, and sums are made of the result
        if across == "antithetic":
            self.source = Antithetic(self.source)
        if across == "orthogonal":
            self.source = Orthogonal(self.source, num_directions, self._products, self.dimension)
        if shape is not None:
            self.source = StateShaped(self.source, shape)
        if per_example:
            self.source = ExampleSigns(self.source, {name: self.shape(name) for name in self.weights.tensors})
        if mixes:
            self.source = LinearCombination(self.source)

    def dimension(self, direction: Direction) -> int:
        """How many coordinates move along a direction."""
        return sum(math.prod(self.shape(name)) for name in self.weights.tensors if self.moves(direction, name))

    def gram(self, directions: Sequence[Direction]) -> Tensor:
        """Inner products <z_i, z_j> of a step's directions over all weights: [q, q], float64, on the CPU."""
        total = torch.zeros(len(directions), len(directions), dtype=torch.float64)
        # directions of a step move the same tensors: any of them tells which
        for name in self.weights.tensors:
            if self.moves(directions[0], name):
                # chunk by chunk, so that q directions of a large tensor never stand side by side as a whole
                for start, stop in self.chunks(name):
                    drawn = torch.stack([self.draw(direction, name, start, stop) for direction in directions])
                    total += self.products(directions[0], name, drawn, start).cpu()
        return total

    def products(self, direction: Direction, name: str, drawn: Tensor, start: int) -> Tensor:
        """Inner products, in the weights, of what some coordinates of tensor ``name`` stand for.

        Args:
            direction: says which basis.
            name: the tensor.
            drawn: [q, count] coordinates from ``start`` on, a chunk of :meth:`chunks`.
            start: flat index of the first of them.

        Returns:
            float64 [q, q].
        """
        del direction, start
        # <s z_i, s z_j> = s^2 <z_i, z_j> for coordinates between orthonormal bases
        wide = drawn.double()
        return (wide @ wide.T) * self.gain(name) ** 2

    def _products(self, source: NoiseSource, directions: list[Direction]) -> Tensor:
        """Inner products of a source's directions in coordinates, over what moves."""
        total = torch.zeros(len(directions), len(directions), dtype=torch.float64)
        for name, tensor in self.weights.tensors.items():
            if self.moves(directions[0], name):
                for start, stop in self.chunks(name):
                    drawn = [source.draw(d, name, start, stop, tensor.device, tensor.dtype) for d in directions]
                    wide = torch.stack(drawn).double()
                    total += (wide @ wide.T).cpu()
        return total

    # ---- coordinates: what an optimizer sees -------------------------------------------------------------------------

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the coordinates of tensor ``name``."""
        return tuple(self.weights.tensors[name].shape)

    def gain(self, name: str) -> float:
        """How much longer the step in the weights is than the coordinates that stand for it, for orthonormal bases."""
        del name
        return 1.0

    def chunks(self, name: str) -> Iterator[tuple[int, int]]:
        """Flat ranges [start, stop) that cover the coordinates of ``name``."""
        yield from _ranges(0, math.prod(self.shape(name)), self._chunk(name))

    def draw(self, direction: Direction, name: str, start: int, stop: int) -> Tensor:
        """Coordinates [start, stop) of one direction, flat, float32; the caller may overwrite the result."""
        z = None if self._is_lifted(name) else self.z_cache.get((direction, name))
        if z is not None:
            # a copy: the caller may overwrite it, and the next query wants it as it was
            return z.view(-1)[start:stop].clone()
        tensor = self.weights.tensors[name]
        return self.source.draw(direction, name, start, stop, tensor.device, tensor.dtype)

    def combination(self, name: str, start: int, stop: int, terms: list[tuple[Direction, float]]) -> Tensor:
        """sum_j c_j z_j over coordinates [start, stop) of ``name``: the estimate, never tensor-sized per direction."""
        # g = c_1 z_1 + c_2 z_2 + ..., in the order of the terms: float32 sums depend on it
        (first, coefficient), *rest = terms
        total = self.draw(first, name, start, stop).mul_(coefficient)
        for direction, coefficient in rest:
            if self.keeps:
                total.add_(self.draw(direction, name, start, stop).mul_(coefficient))
            else:
                # c_j z_j is added while it is made: no second tensor of the piece's size
                self.source.add_(total, direction, name, start, coefficient)
        return total

    def same_basis(self, name: str, old: Direction, new: Direction) -> bool:
        """Whether coordinates of tensor ``name`` stand for the same in the steps of both directions."""
        del name, old, new
        return True

    def transport(self, name: str, state: Tensor, old: Direction, new: Direction) -> Tensor:
        """An optimizer's state that is linear in the estimates, carried over from ``old``'s basis to ``new``'s."""
        # in the full space a coordinate is a weight, whatever the step
        del name, old, new
        return state

    # ---- tensors: what an engine sees --------------------------------------------------------------------------------

    def moves(self, direction: Direction, name: str) -> bool:
        """Whether tensor ``name`` moves at all along this direction; where not, z is zero."""
        del direction
        return name not in self.backprop_names

    def moving(self, direction: Direction) -> set[str]:
        """The tensors that move along a direction."""
        return {name for name in self.weights.tensors if self.moves(direction, name)}

    def ever_moves(self, name: str) -> bool:
        """Whether tensor ``name`` moves in any step of a run."""
        del name
        return True

    def pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Flat ranges of tensor ``name`` that its coordinates [start, stop) move, in pieces of bounded size."""
        del name
        yield start, stop

    def spans(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Flat ranges of bounded size that cover elements [start, stop) of tensor ``name`` itself."""
        yield from _ranges(start, stop, self._chunk(name))

    def lift(self, direction: Direction, name: str, coordinates: Tensor, start: int, first: int, last: int) -> Tensor:
        """Elements [first, last) of the step in tensor ``name`` that these coordinates stand for.

        Args:
            direction: one of the step's directions: it says which basis is in use.
            name: the tensor.
            coordinates: coordinates from ``start`` on, flat, float32; may be overwritten and handed back.
            start: flat index of the first coordinate.
            first: first element of the tensor, flat; one of the ranges of :meth:`pieces`.
            last: one past the last.
        """
        del direction, name, start, first, last
        return coordinates

    def z(self, direction: Direction, name: str) -> Tensor:
        """The direction for tensor ``name``, in the tensor's shape; read-only (it may be kept for the step)."""
        # a new step (or another seed) draws anew: what was kept of the last one goes
        if self._cached_step != (direction.seed, direction.step):
            self.forget_z()
            self._cached_step = (direction.seed, direction.step)
        cached = self.z_cache.get((direction, name))
        if cached is not None:
            return cached
        tensor = self.weights.tensors[name]
        z = self._elements(direction, name, 0, tensor.numel()).view(tensor.shape)
        # kept up to a bound over all directions of the step; what does not fit is drawn again
        if self.keeps and self._cached_elements + z.numel() <= _KEEP:
            self.z_cache[direction, name] = z
            self._cached_elements += z.numel()
        return z

    def forget_z(self) -> None:
        """Empty the cache of :meth:`z`."""
        self.z_cache, self._cached_elements = {}, 0

    def _is_lifted(self, name: str) -> bool:
        """Whether z of tensor ``name`` is computed from coordinates; else its elements are the coordinates."""
        del name
        return False

    def _elements(self, direction: Direction, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of z for tensor ``name``, flat; the caller may overwrite them."""
        return self.draw(direction, name, start, stop)

    def add_(self, out: Tensor, direction: Direction, name: str, start: int, scale: float) -> None:
        """``out += scale * z`` on the flat piece of tensor ``name`` that begins at ``start``.

        The arithmetic is that of ``out.add_(z.mul_(scale))`` in z's dtype.
        """
        if self.keeps or self._is_lifted(name) or out.dtype != torch.float32:
            # one addition: an interrupt finds it done or not done
            out.add_(self._elements(direction, name, start, start + out.numel()).mul_(scale))
        else:
            self.source.add_(out, direction, name, start, scale)

    def perturb(
        self, direction: Direction, name: str, start: int, scales: Sequence[float], outs: Sequence[Tensor]
    ) -> None:
        """``outs[i] = W + scales[i] * z`` on the flat piece of tensor ``name`` from ``start`` on; z is made once.

        Args:
            direction: which z.
            name: the tensor W.
            start: first element of the piece.
            scales: signed distances.
            outs: flat tensors of W's dtype, one for each scale, all of the piece's length.
        """
        stop = start + outs[0].numel()
        # the clean weights: engines perturb beside them, never on them
        weight = self.weights.tensors[name].data.view(-1)
        if not self.moves(direction, name):
            for out in outs:  # z = 0
                out.copy_(weight[start:stop])
        elif self.keeps:
            # kept z serves all points of the step, and the update
            perturb_with(self.z(direction, name).view(-1)[start:stop], weight[start:stop], scales, outs)
        elif self._is_lifted(name):
            # z in pieces of bounded size, each for all points of the direction
            for first, last in self.spans(name, start, stop):
                z = self._elements(direction, name, first, last)
                perturb_with(z, weight[first:last], scales, [out[first - start : last - start] for out in outs])
        else:
            self.source.perturb(weight[start:stop], direction, name, start, scales, outs)

    def perturbed_rows(self, direction: Direction, name: str, rows: Tensor, scale: float) -> Tensor:
        """Rows of the matrix ``name`` at theta + scale * z, of those rows alone: [len(rows), columns], in W's dtype."""
        tensor = self.weights.tensors[name].data
        columns = torch.arange(tensor.shape[1], device=rows.device)
        # flat places of the wanted rows: noise by counter is made for those alone
        z = self.source.gather(direction, name, rows.unsqueeze(1) * tensor.shape[1] + columns)
        return perturbed(tensor[rows], z, scale)

    def factors(self, direction: Direction, name: str) -> tuple[Tensor, Tensor] | None:
        """(U [m, r], V [n, r]) with z = U V^T where the direction has that form, else None."""
        del direction, name
        return None

    def _chunk(self, name: str) -> int:
        return _CHUNK if self.weights.tensors[name].device.type == "cpu" else _CHUNK_GPU


def _ranges(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, size):
        yield first, min(stop, first + size)
