"""A sparse space: some elements of each matrix move, the smallest (S-MeZO), random ones, or a supplied mask's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from zoft.errors import Conditions, UserError
from zoft.noise.direction import Direction, key_of
from zoft.noise.source import NoiseSource
from zoft.subspaces._masks import Mask, by_chance, check_file, read, smallest
from zoft.subspaces._observes import ObservesGradients
from zoft.subspaces.base import BoundSubspace, Subspace, SubspaceState
from zoft.utils.lazy import Tensor, torch
from zoft.weights.tensors import Weights, perturbed

CHOICES = ("magnitude", "random", "gradient", "mask")


@dataclass
class Sparse(Subspace):
    """Some elements of each matrix move along z = m * z_full / sqrt(s), with m in {0, 1} and s the share where m = 1.

    With magnitude and random, vectors (norms, biases) move in full, and every tensor of two or more dimensions,
    embeddings among them, has a mask of its own: vectors are a few thousandths of the weights, and the sizes of a
    norm's weights, all near 1, say nothing. A mask that is supplied or made of gradients says it of every tensor; what
    it leaves out stands still, and s is one for all tensors together, so that it does not change their steps relative
    to each other.

    E||z||^2 is the number of elements of what moves, as in the full space. The papers do not divide by sqrt(s): their
    eps is this one / sqrt(s), and their learning rate this one / s (at s = 0.2: eps 1e-3 there is 4.5e-4 here, and a
    learning rate of 1e-6 there 2e-7 here). The mask is kept at one bit an element. A mask by magnitude is made of the
    clean weights before the queries of a step, never during them, and is saved with a checkpoint.

    Args:
        law: distribution of z_full: gaussian, rademacher (+-1), or sphere (uniform over all trained weights, of which
            the mask leaves some).
        choose: magnitude (the smallest |theta| of each matrix move, with all that are as small as the largest of them),
            random (each element with probability ``keep``), gradient (those of the largest squared gradients in one
            backward pass over the first step's batch, for the whole run), or mask (a file's).
        keep: share of a matrix that moves, above 0 and at most 1 (for gradient, of all weights); a file has its own.
        interval: steps after which magnitude and random choose anew, at least 1.
        mask: for choose=mask, a .safetensors file of tensor name -> bool or uint8 of its shape, or int64 flat indices
            (scripts/score_weights.py makes one by squared gradients).

    References: Liu et al. 2024 (S-MeZO, arXiv 2402.15751), m_ij = [|theta_ij| <= h] with h of each layer: 80 % frozen
    does best, and the mask is made anew in every step (interval 1). Guo et al. 2024 (SensZOQ, arXiv 2406.02913): a
    static mask of the 0.1 % of weights of largest squared gradients.
    """

    changes_basis: ClassVar[bool] = True
    counts_with: ClassVar[Conditions] = {
        "keep": ("choose", ("magnitude", "random", "gradient")),
        "interval": ("choose", ("magnitude", "random")),
    }

    choose: str = "magnitude"
    keep: float = 0.2
    interval: int = 50
    mask: str | None = None

    def check(self) -> None:
        """Refuse unknown words, a share outside (0, 1], an interval below 1, and a file where none is read."""
        super().check()
        self.require(self.choose in CHOICES, "choose", f"one of {', '.join(CHOICES)}")
        self.require(0 < self.keep <= 1, "keep", "above 0 and at most 1")
        self.require(self.interval >= 1, "interval", "at least 1")
        if (self.choose == "mask") != (self.mask is not None):
            raise UserError(
                f"sparse.choose={self.choose} and sparse.mask={self.mask} do not go together: "
                + ("give a file, mask=FILE" if self.mask is None else "a file is read with choose=mask only")
            )

    def check_with(self, method: Any) -> None:
        """Refuse a file that is not there."""
        del method
        if self.mask is not None:
            check_file(self.mask)

    def observes_at(self, step: int) -> str:
        """The gradient, in the first step and for choose=gradient."""
        return "gradient" if self.choose == "gradient" and step == 0 else ""

    def bind(self, weights: Weights, noise: str = "counter") -> BoundSparse:
        """Coordinates are the tensors' elements; those that stand still are zero."""
        return BoundSparse(weights, self.source(weights, noise), self)


class BoundSparse(ObservesGradients, BoundSubspace):
    """Coordinates are the tensor's elements times the mask; lifting multiplies by the mask (again) and 1 / sqrt(s).

    An optimizer's state has an element for every weight. Where one stands still for an interval its state goes on
    without gradients, and the mask keeps the weight where it is.

    Example:
        >>> bound = Sparse(keep=0.5).bind(Weights(torch.nn.Linear(4, 2)))
        >>> int(bound.z(Direction(0, 0), "weight").count_nonzero()), round(bound.gain("weight") ** -2, 6)
        (4, 0.5)
    """

    def __init__(self, weights: Weights, source: NoiseSource, sparse: Sparse) -> None:
        super().__init__(weights, source)
        self.sparse = sparse
        self._masks: dict[str, Mask] = {}
        self._mask_interval: tuple[int, ...] | None = None  # the interval; where chosen by chance, (seed, interval)
        self._share: float | None = None  # s, where it is one for all tensors
        self._scores: dict[str, tuple[Tensor, Tensor]] = {}  # while gradients come: the largest squares, their places
        if sparse.mask is not None:
            none = Mask.of(torch.zeros(0, dtype=torch.bool))
            # tensors that the file leaves out have an empty mask: they stand still
            self._masks = dict.fromkeys(weights.tensors, none) | read(sparse.mask, weights.tensors)
            self._share_all()

    # ---- the mask ----------------------------------------------------------------------------------------------------

    def begin(self, direction: Direction) -> None:
        """By magnitude: chosen anew, of the clean weights, in the first step of every interval."""
        # during a query the smallest would be others
        if self.sparse.choose == "magnitude" and self._mask_interval != self._interval(direction):
            self._mask_interval = self._interval(direction)
            self._masks = {n: self._make_mask(direction, n) for n in self.weights.tensors if self._is_lifted(n)}
            # z was made with the old mask
            self.forget_z()

    def _share_all(self) -> None:
        """One s for all tensors."""
        moving = {name: mask for name, mask in self._masks.items() if mask.count}
        elements = sum(self.weights.tensors[name].numel() for name in moving)
        # s = moving elements / elements, over the tensors that move at all
        self._share = sum(mask.count for mask in moving.values()) / elements

    def gradients_wanted(self, direction: Direction) -> bool:
        """Whether gradients are wanted: once a run, for choose=gradient."""
        del direction
        return self.sparse.choose == "gradient" and self._mask_interval is None

    def score(self, name: str, gradient: Tensor) -> None:
        """Keep what may be among the largest squares of all tensors."""
        # no more of one tensor can be among the largest of all
        squares = gradient.detach().to(torch.float32).flatten().square()
        self._scores[name] = squares.topk(min(self._num_kept, len(squares)))

    def scored(self) -> None:
        """The largest squares of all tensors make the masks."""
        # one threshold over all tensors: the largest squares may lie in a few of them
        smallest_kept = torch.cat([squares.cpu() for squares, _ in self._scores.values()]).topk(self._num_kept)[0][-1]
        for name, tensor in self.weights.tensors.items():
            moves = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
            if name in self._scores:
                squares, places = self._scores[name]
                moves[places[squares >= smallest_kept.to(squares.device)]] = True
            self._masks[name] = Mask.of(moves)
        self._scores, self._mask_interval = {}, ()
        self.forget_z()
        self._share_all()

    @property
    def _num_kept(self) -> int:
        return max(1, round(self.sparse.keep * self.weights.num_elements))

    def basis_elements(self) -> int:
        """One bit an element of what has a mask."""
        masked = [
            t for t in self.weights.tensors.values() if _is_matrix(t) or self.sparse.choose in ("mask", "gradient")
        ]
        return -(-sum(tensor.numel() for tensor in masked) // 32)

    def state_dict(self) -> SubspaceState:
        """The masks by magnitude or gradient, packed: the weights of which they were made have moved on."""
        if self.sparse.choose not in ("magnitude", "gradient") or not self._masks or self._mask_interval is None:
            return {}
        return {
            "made_for": list(self._mask_interval),
            # masks of a file or by chance are made again from it, or from the seed
            "bits": {name: mask.bits for name, mask in self._masks.items()},
            "counts": {name: mask.count for name, mask in self._masks.items()},
        }

    def load_state_dict(self, state: SubspaceState) -> None:
        """Take over saved masks; without any in the state they are made anew."""
        if self.sparse.choose in ("magnitude", "gradient") and state:
            interval = state["made_for"]
            self._mask_interval = tuple(interval)
            devices = {name: tensor.device for name, tensor in self.weights.tensors.items()}
            self._masks = {
                name: Mask(bits.to(devices[name]).clone(), state["counts"][name])
                for name, bits in state["bits"].items()
            }
            if self.sparse.choose == "gradient":
                self._share_all()

    def _mask(self, direction: Direction, name: str) -> Mask | None:
        """The mask of a tensor; None where it moves in full. Before any step has begun it is made on first use."""
        if not self._is_lifted(name):
            return None
        # a random mask holds for an interval, and for one seed
        if self.sparse.choose == "random" and self._mask_interval != self._interval(direction):
            self._mask_interval, self._masks = self._interval(direction), {}
        if name not in self._masks:
            self._masks[name] = self._make_mask(direction, name)
        return self._masks[name]

    def _is_lifted(self, name: str) -> bool:
        scored = self.sparse.choose == "gradient" and self._mask_interval is not None
        return scored or self.sparse.choose == "mask" or _is_matrix(self.weights.tensors[name])

    def _interval(self, direction: Direction) -> tuple[int, ...]:
        """The interval of steps that share the mask in use."""
        index = direction.step // self.sparse.interval
        return {"magnitude": (index,), "random": (direction.seed, index)}.get(self.sparse.choose, ())

    def _make_mask(self, direction: Direction, name: str) -> Mask:
        tensor, keep = self.weights.tensors[name], self.sparse.keep
        with torch.inference_mode(False), torch.no_grad():  # it outlives the query in which it is first asked for
            if self.sparse.choose == "magnitude":
                # at least one element, or the matrix would not move at all
                return smallest(tensor.data, max(1, round(keep * tensor.numel())))
            refresh_period = Direction(direction.seed, direction.step // self.sparse.interval)
            return by_chance(key_of(refresh_period, name, role="sparse.mask"), tensor.numel(), keep, tensor.device)

    # ---- coordinates -------------------------------------------------------------------------------------------------

    def gain(self, name: str) -> float:
        """1 / sqrt(s) of the mask in use."""
        mask = self._masks.get(name)
        if mask is None or not mask.count:
            return 1.0
        # s over all tensors where that is one, else the tensor's own share
        return float((self._share or mask.count / self.weights.tensors[name].numel()) ** -0.5)

    def dimension(self, direction: Direction) -> int:
        """How many elements move."""
        masks = {name: self._mask(direction, name) for name in self.weights.tensors if self.moves(direction, name)}
        return sum(self.weights.tensors[n].numel() if mask is None else mask.count for n, mask in masks.items())

    def moves(self, direction: Direction, name: str) -> bool:
        """Whether some element moves; by magnitude, the smallest always does."""
        mask = None if self.sparse.choose == "magnitude" else self._mask(direction, name)
        return (mask is None or mask.count > 0) and super().moves(direction, name)

    def ever_moves(self, name: str) -> bool:
        """False where a supplied mask leaves the tensor out."""
        return super().ever_moves(name) and (self.sparse.choose != "mask" or self._masks[name].count > 0)

    def draw(self, direction: Direction, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of m * z_full, flat, float32."""
        mask, tensor = self._mask(direction, name), self.weights.tensors[name]
        if mask is None:
            return super().draw(direction, name, start, stop)
        if not mask.count:
            return torch.zeros(stop - start, dtype=torch.float32, device=tensor.device)
        drawn = self.source.draw(direction, name, start, stop, tensor.device, tensor.dtype)
        # m * z_full: what the mask drops is drawn all the same, so that z_full does not depend on the mask
        return drawn.mul_(mask.piece(start, stop))

    def combination(self, name: str, start: int, stop: int, terms: list[tuple[Direction, float]]) -> Tensor:
        """sum_j c_j m * z_j; refused where the directions do not share m."""
        # sum_j c_j (m * z_j) = m * sum_j c_j z_j needs one mask
        if len({self._interval(direction) for direction, _ in terms}) > 1:
            raise UserError(
                "subspace=sparse shares its mask between the directions of a step, and these are of several seeds or "
                "intervals: use subspace=full"
            )
        if not self._is_lifted(name):
            return super().combination(name, start, stop, terms)
        (first, coefficient), *rest = terms
        total = self.draw(first, name, start, stop).mul_(coefficient)
        for direction, coefficient in rest:
            total.add_(self.draw(direction, name, start, stop).mul_(coefficient))
        return total

    def same_basis(self, name: str, old: Direction, new: Direction) -> bool:
        """Whether the mask is the same, or the tensor moves in full."""
        return self._interval(old) == self._interval(new) or not self._is_lifted(name)

    def lift(self, direction: Direction, name: str, coordinates: Tensor, start: int, first: int, last: int) -> Tensor:
        """m * coordinates / sqrt(s)."""
        mask = self._mask(direction, name)
        if mask is None:
            return super().lift(direction, name, coordinates, start, first, last)
        if not mask.count:
            return coordinates.zero_()
        # m * C / sqrt(s): the mask once more, since a rule's step may be nonzero where the estimate is zero
        return coordinates.mul_(mask.piece(first, last)).mul_(self.gain(name))

    def _products(self, source: NoiseSource, directions: list[Direction]) -> Tensor:
        """Inner products of a source's directions over the elements that move."""
        total = torch.zeros(len(directions), len(directions), dtype=torch.float64)
        for name, tensor in self.weights.tensors.items():
            mask = self._mask(directions[0], name)
            for start, stop in self.chunks(name) if self.moves(directions[0], name) else ():
                drawn = [source.draw(d, name, start, stop, tensor.device, tensor.dtype) for d in directions]
                wide = torch.stack(drawn).double()
                # over the elements that move: directions are at right angles where they are used
                wide = wide if mask is None else wide.mul_(mask.piece(start, stop))
                total += (wide @ wide.T).cpu()
        return total

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def perturbed_rows(self, direction: Direction, name: str, rows: Tensor, scale: float) -> Tensor:
        """Rows of the matrix ``name`` at theta + scale * z: [len(rows), columns], in W's dtype."""
        mask, tensor = self._mask(direction, name), self.weights.tensors[name].data
        if mask is None:
            return super().perturbed_rows(direction, name, rows, scale)
        if not mask.count:
            return tensor[rows]
        places = rows.unsqueeze(1) * tensor.shape[1] + torch.arange(tensor.shape[1], device=rows.device)
        # m * z / sqrt(s) at the wanted rows
        z = self.source.gather(direction, name, places).mul_(mask.at(places)).mul_(self.gain(name))
        return perturbed(tensor[rows], z, scale)

    def _elements(self, direction: Direction, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of z: flat, float32, the caller's own."""
        z = self.z_cache.get((direction, name))
        if z is not None:
            return z.view(-1)[start:stop].clone()
        drawn = self.draw(direction, name, start, stop)
        return drawn.mul_(self.gain(name)) if self._is_lifted(name) else drawn


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.dim() >= 2 and tensor.numel() > 0
