"""The space of inputs: a linear layer moves by R A^T, with A a basis of what comes in (AGZO, ZO-Act, AIM-ZO)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

from zoft.errors import Conditions, UserError
from zoft.noise.counter import sample
from zoft.noise.direction import Direction, key_of
from zoft.noise.source import NoiseSource
from zoft.subspaces._factored import Bases, BoundFactored, Factored, MatrixLayout
from zoft.subspaces._matrices import haar
from zoft.subspaces._observes import ObservesInputs
from zoft.subspaces.base import SubspaceState
from zoft.subspaces.outer import outer_factors, outer_noise
from zoft.utils.lazy import Tensor, nn, torch
from zoft.weights.tensors import Weights

BASES = ("batch", "first", "oja")


@dataclass
class Activation(Factored):
    """Linear layers move along z = s R A^T, with R drawn for each direction and A a basis of the layer's own inputs.

    R is [m, r] for a matrix W [m, n], and A [n, r] an orthonormal basis of the inputs H [tokens, n] that the layer
    sees: dL/dW = sum_t delta_t h_t^T has its rows in their span. Optimizers work on R.

    The mean estimate is s^2 grad L A A^T with s = sqrt(n / r), for which E||z||^2 = m n as in the full space: eps and
    the learning rate carry over from it. AGZO has s = 1: its eps is this one times s, its learning rate this one times
    s^2.

    The inputs are looked at in one clean forward before the queries, which costs nothing where the estimator asks for
    the clean loss anyway. Until a layer's inputs have been seen its basis is random (Haar). Layers are
    ``torch.nn.Linear``, and transformers' ``Conv1D``, whose matrix is stored transposed: z = s A R^T. Columns of
    padding count as inputs. What has no such inputs (embeddings and a head tied to one, norms, biases, experts in one
    tensor), and a layer with no more than ``rank`` inputs, moves in full. A tied tensor moves once, and its basis is of
    the inputs of all its layers. Where a layer is met several times before a step's queries (micro-batches, processes,
    tied tensors) A is made of the r leading directions of each part, so it depends a little on how the batch is cut.

    Args:
        rank: columns r of A, at least 1.
        basis: batch (of the step's own batch, by power iteration on H^T H: AGZO), first (of the first step's batch, for
            the whole run: ZO-Act), or oja (some columns of a larger basis that follows the batches by Oja's rule:
            AIM-ZO).
        power_iterations: rounds of the power iteration, at least 1.
        basis_columns: columns of the larger basis, for basis=oja; at least ``rank``.
        shared_columns: of ``rank`` columns, the leading ones that every step has, for basis=oja; the others are drawn
            anew for each step from those that remain. At least 0.
        step_size: of Oja's rule, for basis=oja: K <- orth(K + step_size H^T H K / lambda), with lambda the largest
            eigenvalue of K^T H^T H K; above 0.
        rank_one: draw R = a b^T, with vectors a and b; its elements have mean 0, variance 1 and no correlation, as
            those of an R of full rank. With law=sphere each matrix has its exact length sqrt(m n).

    References: AGZO (arXiv 2601.17261): basis=batch, rank 1, 3 iterations. ZO-Act (arXiv 2607.01125): basis=first.
    AIM-ZO (2026): basis=oja, 128 columns, 48 shared, rank 64, step 0.3, rank_one and law=sphere.
    """

    counts_with: ClassVar[Conditions] = dict.fromkeys(
        ("basis_columns", "shared_columns", "step_size"), ("basis", ("oja",))
    )

    rank: int = 1
    basis: str = "batch"
    power_iterations: int = 3
    basis_columns: int = 128
    shared_columns: int = 48
    step_size: float = 0.3
    rank_one: bool = False

    @property
    def changes_basis(self) -> bool:  # type: ignore[override]
        """Whether steps have bases of their own."""
        return self.basis != "first"

    @property
    def in_one_process(self) -> bool:  # type: ignore[override]
        """Oja's rule follows one process's rows; the other bases are put together of what all processes have seen."""
        return self.basis == "oja"

    def check(self) -> None:
        """Refuse unknown words, counts below 1 and sizes that do not fit together."""
        super().check()
        self.require(self.basis in BASES, "basis", f"one of {', '.join(BASES)}")
        self.require(self.power_iterations >= 1, "power_iterations", "at least 1")
        self.require(self.basis_columns >= 1, "basis_columns", "at least 1")
        self.require(self.shared_columns >= 0, "shared_columns", "at least 0")
        self.require(0 < self.step_size < float("inf"), "step_size", "above 0 and finite")
        if self.basis == "oja":
            self.require(self.basis_columns >= self.rank, "basis_columns", f"at least rank={self.rank}")
            self.require(self.shared_columns <= self.rank, "shared_columns", f"at most rank={self.rank}")

    def observes_at(self, step: int) -> str:
        """The inputs, in every step or the first."""
        return "inputs" if self.basis != "first" or step == 0 else ""

    def bind(self, weights: Weights, noise: str = "counter") -> BoundActivation:
        """Coordinates are the elements of R, and the tensor's own where it moves in full."""
        layers = linear_layers(weights)
        if not layers:
            raise UserError(
                "subspace=activation needs the inputs of linear layers, and no trained tensor is the weight of one: "
                "use subspace=full, or train linear layers"
            )
        layouts = self.layouts(weights)
        if not layouts:
            # before a run, with the number that would do: a basis of all inputs would be no subspace
            most = max(weights.tensors[name].shape[0 if turned else 1] for name, turned in layers.items())
            raise UserError(
                f"subspace.rank={self.rank} leaves no linear layer with more inputs than that (the most is {most}): "
                "lower the rank, or use subspace=full"
            )
        return BoundActivation(weights, self.source(weights, noise), layouts, self)

    def layouts(self, weights: Weights) -> dict[str, MatrixLayout]:
        """R is [m, r], or turned [r, n]; ||s R A^T||^2 = s^2 ||R||^2, whose mean is s^2 m r."""
        layouts = {}
        for name, turned in linear_layers(weights).items():
            m, n = weights.tensors[name].shape
            # Conv1D stores W^T [n_in, n_out], so that R stands on the right
            inputs, shape = (m, (self.rank, n)) if turned else (n, (m, self.rank))
            if inputs > self.rank:
                layouts[name] = MatrixLayout(m, n, shape, (inputs / self.rank) ** 0.5, by_rows=not turned)
        return layouts

    def source(self, weights: Weights, noise: str) -> NoiseSource:
        """The counter, over R or over a and b."""
        # R = a b^T: two vectors a direction instead of m r numbers
        plain = super().source(weights, noise)
        if not self.rank_one:
            return plain
        return outer_noise(self.law, weights, {name: layout.shape for name, layout in self.layouts(weights).items()})


class BoundActivation(ObservesInputs, BoundFactored):
    """Coordinates of a linear layer's matrix are R, row by row.

    The bases follow from what the layers have seen, so they are saved with the run.

    Args:
        weights: what is trained.
        source: where R and the directions of what moves in full come from.
        layouts: the linear layers' matrices.
        subspace: the component.
    """

    def __init__(
        self, weights: Weights, source: NoiseSource, layouts: dict[str, MatrixLayout], subspace: Activation
    ) -> None:
        super().__init__(weights, source, layouts, subspace.name())
        self.subspace = subspace
        self._seen: dict[str, tuple[int, Tensor]] = {}  # name -> the step it was seen in, A
        self._before: dict[str, tuple[int, Tensor]] = {}  # the one before that
        self._followed: dict[str, Tensor] = {}  # Oja's K [n, columns]
        self._sketches: dict[str, Tensor] = {}  # [r, n]: sum over the step's inputs so far, for a layer that runs twice

    # ---- what the layers see -----------------------------------------------------------------------------------------

    def begin(self, direction: Direction) -> None:
        """Forget the sums of the last step's inputs."""
        super().begin(direction)
        # a sketch of this step goes on with further micro-batches; those of an earlier step end
        self._sketches = {n: sketch for n, sketch in self._sketches.items() if self._seen[n][0] == direction.step}

    def inputs_wanted(self, direction: Direction) -> frozenset[str]:
        """All linear layers that move in the subspace; with basis=first none once some have been seen."""
        if self.subspace.basis == "first" and self._seen:
            return frozenset()
        return frozenset(name for name in self.layouts if name not in self.backprop_names)

    def observe(self, direction: Direction, name: str, inputs: Tensor) -> None:
        """Take the inputs of a layer into its basis; a layer that is met again in a step adds to what it has seen."""
        layout = self.layouts.get(name)
        # a batch whose inputs overflow leaves the basis as it was
        if layout is None or not inputs.is_floating_point() or not bool(torch.isfinite(inputs).all()):
            return
        if inputs.shape[-1] != _inputs(layout) or not len(inputs):
            return
        if name not in self._seen or self._seen[name][0] != direction.step:
            # the first look of a step: what was seen before becomes the basis before
            self._sketches.pop(name, None)
            self._bases.pop(name, None)  # a random one
            if name in self._seen:
                self._before[name] = self._seen[name]
        # in float32 whatever the forward computes in: a basis of bfloat16 columns is not orthonormal
        with torch.autocast(inputs.device.type, enabled=False):
            followed = self._follow(direction, name, inputs) if self.subspace.basis == "oja" else None
            self._seen[name] = (
                direction.step,
                self._main_inputs(direction, name, inputs) if followed is None else followed,
            )

    def _main_inputs(self, direction: Direction, name: str, inputs: Tensor) -> Tensor:
        """A: the leading right singular vectors of all that the layer has seen in this step."""
        before = self._sketches.get(name)
        if before is not None:
            # the sketch stands for the rows seen before: S^T S = A (H A)^T (H A) A^T
            inputs = torch.cat((before, inputs.to(torch.float32)))
        start = self._random(direction, name, self.subspace.rank)
        basis = power_iteration(inputs, start, self.subspace.power_iterations)
        # S = (Y^T Y)^(1/2) A^T with Y = H A, r rows instead of one a token
        self._sketches[name] = _root(_product(inputs, basis)) @ basis.T
        return basis

    def _follow(self, direction: Direction, name: str, inputs: Tensor) -> Tensor:
        """One step of Oja's rule on K, and the columns of it that are active: A."""
        rank, shared = self.subspace.rank, self.subspace.shared_columns
        columns = min(self.subspace.basis_columns, inputs.shape[1])
        if name not in self._followed:  # K begins at its limit for batches that are all like the first
            start = self._random(direction, name, columns)
            self._followed[name] = power_iteration(inputs, start, self.subspace.power_iterations)
        else:
            k = self._followed[name]
            # H^T (H K)
            pulled = _transposed_product(inputs, _product(inputs, k))
            largest = torch.linalg.eigvalsh((k.T @ pulled).double())[-1].clamp(min=torch.finfo(torch.float32).tiny)
            # K <- orth(K + eta H^T H K / lambda): the rule's step does not depend on how large inputs are
            self._followed[name] = orthonormal(k + self.subspace.step_size * (pulled / largest.float()), k)
        key = key_of(Direction(direction.seed, direction.step), name, role="activation.active")
        order = sample("gaussian", key, 0, columns - shared)
        # the leading columns are in every step, the others take turns at random, the same on every device
        drawn = order.argsort()[: rank - shared].sort().values + shared
        active = torch.cat((torch.arange(shared), drawn)).to(inputs.device)
        return self._followed[name][:, active].contiguous()

    def join(self, direction: Direction, gather: Callable[[Any], list[Any]]) -> None:
        """The leading singular vectors of what all processes have seen, as of a layer that is met several times."""
        of_ranks = gather({name: sketch.cpu() for name, sketch in self._sketches.items()})
        for name in self.layouts:
            sketches = [seen[name].to(self.weights.tensors[name].device) for seen in of_ranks if name in seen]
            # as if one process had met the layer with all rows: the sketches are its micro-batches
            if sketches:
                if name in self._seen and self._seen[name][0] != direction.step:
                    self._before[name] = self._seen[name]
                self._sketches.pop(name, None)
                self._bases.pop(name, None)
                self._seen[name] = direction.step, self._main_inputs(direction, name, torch.cat(sketches))

    def _random(self, direction: Direction, name: str, columns: int) -> Tensor:
        """The basis before anything is seen, and where power iteration begins."""
        key = key_of(Direction(direction.seed, 0), name, role="activation.A")
        return haar(key, _inputs(self.layouts[name]), columns, self.weights.tensors[name].device)

    def basis_elements(self) -> int:
        """Numbers in A, in the basis before it where every step has its own, in a step's sketches, and in Oja's K."""
        every = super().basis_elements() * {"first": 1, "oja": 2, "batch": 3}[self.subspace.basis]
        # A of this step, A of the step before (momentum is carried over from it), and a batch's sketch
        if self.subspace.basis != "oja":
            return every
        return every + sum(_inputs(f) * min(self.subspace.basis_columns, _inputs(f)) for f in self.layouts.values())

    # ---- which basis -------------------------------------------------------------------------------------------------

    def refresh_period(self, direction: Direction) -> Direction:
        """A step's bases are its own, or all steps'."""
        return Direction(direction.seed, 0 if self.subspace.basis == "first" else direction.step)

    def basis_key(self, direction: Direction, name: str) -> Hashable:
        """The step whose inputs the basis of this direction is of, or the seed of the random one."""
        # a direction of an earlier step is asked for when its state is carried over
        for entry in (self._seen.get(name), self._before.get(name)):
            if entry is not None and direction.step >= entry[0]:
                return ("seen", entry[0])
        return ("random", direction.seed)

    def bases(self, direction: Direction, name: str) -> Bases:
        """(identity, A); turned (A, identity)."""
        for entry in (self._seen.get(name), self._before.get(name)):
            if entry is not None and direction.step >= entry[0]:
                return self._placed(name, entry[1])
        return super().bases(direction, name)

    def make_bases(self, refresh_period: Direction, name: str) -> Bases:
        """The random basis."""
        return self._placed(name, self._random(refresh_period, name, self.subspace.rank))

    def _placed(self, name: str, basis: Tensor) -> Bases:
        return (None, basis) if self.layouts[name].by_rows else (basis, None)

    def factors(self, direction: Direction, name: str) -> tuple[Tensor, Tensor] | None:
        """(s R [m, r], A [n, r]); of R = a b^T (s a, A b), of rank one."""
        layout, device = self.layouts.get(name), self.weights.tensors[name].device
        pair = outer_factors(self.source, direction, name, device) if layout is not None else None
        if layout is None or pair is None:
            return super().factors(direction, name)
        left, right = self.bases(direction, name)
        a, b = pair
        # (s L a) (R b)^T: a product of two vectors lifted is one of two vectors again
        return (a if left is None else left @ a) * layout.scale, b if right is None else right @ b

    # ---- saved and loaded --------------------------------------------------------------------------------------------

    def state_dict(self) -> SubspaceState:
        """The bases in use, and what they are made of."""
        return {
            "seen": {name: [step, basis] for name, (step, basis) in self._seen.items()},
            "followed": dict(self._followed),
        }

    def load_state_dict(self, state: SubspaceState) -> None:
        """Take over saved bases; the basis of the step before stays known."""
        devices = {name: self.weights.tensors[name].device for name in self.layouts}
        # tensors that are no longer trained in the subspace are passed over
        seen = {name: entry for name, entry in state.get("seen", {}).items() if name in self.layouts}
        for name, (_, basis) in seen.items():
            if basis.shape != (_inputs(self.layouts[name]), self.subspace.rank):
                raise UserError(
                    f"the checkpoint has a basis of {basis.shape[1]} columns for {name}, this run has "
                    f"subspace.rank={self.subspace.rank}: resume with the same one, or start a new run"
                )
        self._seen = {n: (step, basis.to(devices[n], torch.float32).clone()) for n, (step, basis) in seen.items()}
        followed = {name: k for name, k in state.get("followed", {}).items() if name in self.layouts}
        self._followed = {name: k.to(devices[name], torch.float32).clone() for name, k in followed.items()}
        self._overlap = None


def linear_layers(weights: Weights) -> dict[str, bool]:
    """name -> whether it is stored transposed ([n_in, n_out]), of what is the weight of linear layers alone."""
    layers: dict[str, bool] = {}
    shared: set[str] = set()
    for module, held in weights.owners.items():
        for attribute, name in held:
            turned = _turned(module) if attribute == "weight" and weights.tensors[name].dim() == 2 else None
            # a tensor that is also something else's (a tied embedding) has no inputs to go by
            if turned is None or layers.setdefault(name, turned) != turned:
                shared.add(name)
    return {name: layers[name] for name in weights.tensors if name in layers and name not in shared}


def _turned(module: nn.Module) -> bool | None:
    if isinstance(module, torch.nn.Linear):
        return False
    return True if type(module).__name__ == "Conv1D" else None  # transformers', in GPT-2


def _inputs(layout: MatrixLayout) -> int:
    return layout.columns if layout.by_rows else layout.rows


# ---- linear algebra --------------------------------------------------------------------------------------------------

_TOKENS = 4096  # rows of H that are in float32 at a time


def power_iteration(inputs: Tensor, start: Tensor, iterations: int) -> Tensor:
    """An orthonormal basis near the leading right singular vectors of H: block power iteration on H^T H.

    Both H A and H^T Q are made orthonormal: the square of H's condition number would be too much for float32.

    Args:
        inputs: H [tokens, n], any float dtype.
        start: [n, r] with orthonormal columns; what H leaves undetermined (fewer tokens than r) comes from there.
        iterations: how often.

    Returns:
        A [n, r], float32.

    Example:
        >>> h = torch.tensor([[3.0, 0.0, 4.0]])
        >>> power_iteration(h, torch.eye(3)[:, :1], 3).abs().T
        tensor([[0.6000, 0.0000, 0.8000]])
    """
    basis = start
    for _ in range(iterations):
        # Q = orth(H A), then A = orth(H^T Q): two half steps of H^T H
        orthogonal, _ = torch.linalg.qr(_product(inputs, basis))
        basis = orthonormal(_transposed_product(inputs, orthogonal), start)
    return basis


def orthonormal(columns: Tensor, fill: Tensor) -> Tensor:
    """An orthonormal basis of the columns' span, each with the sign of its column, made up with columns of ``fill``.

    Args:
        columns: [n, k], float32; those that are zero or depend on the ones before are left out.
        fill: [n, r], r >= k, of full rank.

    Returns:
        [n, r], float32.
    """
    q, r = torch.linalg.qr(columns.double())
    sizes = r.diagonal().abs()
    alive = sizes > 1e-5 * sizes.max()  # none where all is zero
    missing = fill.shape[1] - int(alive.sum())
    # zero or dependent columns leave room, which columns of the start fill
    if missing:
        q, r = torch.linalg.qr(torch.cat((columns[:, alive], fill[:, :missing]), dim=1).double())
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).float().contiguous()


def _product(inputs: Tensor, basis: Tensor) -> Tensor:
    """H A, float32."""
    return torch.cat([piece.to(torch.float32) @ basis for piece in inputs.split(_TOKENS)])


def _transposed_product(inputs: Tensor, columns: Tensor) -> Tensor:
    """H^T Y, float32."""
    pairs = zip(inputs.split(_TOKENS), columns.split(_TOKENS), strict=True)
    # sum over pieces of tokens of H_piece^T Y_piece
    total, *rest = [piece.to(torch.float32).T @ of_piece for piece, of_piece in pairs]
    for term in rest:
        total += term
    return total


def _root(columns: Tensor) -> Tensor:
    """S [r, r] with S^T S = Y^T Y."""
    # S = Lambda^(1/2) V^T with Y^T Y = V Lambda V^T; rounding may make an eigenvalue negative
    values, vectors = torch.linalg.eigh((columns.T @ columns).double())
    return (values.clamp(min=0).sqrt().unsqueeze(1) * vectors.T).float()
