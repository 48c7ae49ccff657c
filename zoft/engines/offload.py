"""Blocks that rest in host memory or a file, and are on the device while they compute: a model larger than it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from zoft.engines._blocks import Block, BlockStream, blocks_of
from zoft.engines._lockstep import Barrier
from zoft.engines._optional import KeepsWeightsAway
from zoft.engines._prefix import passes_through
from zoft.engines._transfer import Transfer, transfer_for
from zoft.engines.base import Engine, Objective, Session
from zoft.engines.layerwise import LayerwiseSession
from zoft.errors import UserError
from zoft.estimators._optional import KeepsAnchor, NeedsBackward
from zoft.estimators.base import Estimator, Point
from zoft.subspaces.base import BoundSubspace
from zoft.utils.lazy import Tensor, nn, torch
from zoft.weights.mapped import is_mapped, mapped_where_it_lies, scratch_copies

STORES = ("auto", "memory", "file")

_sessions: weakref.WeakKeyDictionary[nn.Module, OffloadSession] = weakref.WeakKeyDictionary()  # the last one of each


@dataclass
class Offload(Engine):
    """The device holds two blocks at a time: the one that computes, and the next one on its way.

    What stands outside of the blocks (embeddings, last norm, head) stays on the device. All points of a step are
    evaluated at each visit of a block, by any architecture's own code: forwards go through the model side by side and
    meet where a block begins. A step is written at the next visit, and before anything is evaluated or saved; where
    directions or rules depend on the weights it is written at once, which brings each block once more. Losses and
    weights are those of ``engine=layerwise``, bit for bit.

    Device memory: two blocks, what stands outside of them, and for each point in flight the activations of a forward
    that waits. State of the optimizer that is as large as the weights stays on the device too: use a rule without one.

    Args:
        store: where blocks rest. memory is host memory, pinned beside a GPU; file is a scratch file for what is
            trained, and for what is frozen the checkpoint's own safetensors file, which is never written; auto is
            memory beside a GPU, and file on a CPU.
        folder: where the scratch file is made (it has no name, and is gone with the run, also after a kill); the
            system's folder for temporary files if left out.
        points_in_flight: how many points go through the model together; 0 is all of a step. Fewer take less memory for
            activations and bring the blocks more often.
        piece_mb: as for ``engine=layerwise``.

    References: Wang et al. 2025 (ZO2) for blocks that come and go with their steps; accelerate's disk offload for the
        checkpoint as the store.
    """

    store: str = "auto"
    folder: str | None = None
    points_in_flight: int = 0
    piece_mb: int = 0

    def check(self) -> None:
        """Refuse an unknown store and negative sizes."""
        self.require(self.store in STORES, "store", f"one of {', '.join(STORES)}")
        self.require(self.points_in_flight >= 0, "points_in_flight", "at least 0")
        self.require(self.piece_mb >= 0, "piece_mb", "at least 0")
        self.require(self.folder is None or self.store != "memory", "folder", "left out with store=memory")

    def choose(self, estimator: Estimator, coordinates: BoundSubspace, model: nn.Module) -> Engine:
        """Refuse what would need the whole model on the device at once.

        Raises:
            UserError: an estimator with a backward pass or an anchor, or a base of few bits.
        """
        super().choose(estimator, coordinates, model)
        if isinstance(estimator, NeedsBackward | KeepsAnchor):
            raise UserError(
                f"engine=offload has two blocks on the device at a time, and estimator={estimator.name()} needs all "
                "weights at once, for a backward pass or a second copy of them: use estimator=central, or engine=auto"
            )
        if getattr(model, "is_quantized", False):
            raise UserError(
                "engine=offload moves plain tensors, and this base is quantised: load it without "
                "model.quantization, or use engine=auto"
            )
        return self

    def rests_in_file(self, device: torch.device) -> bool:
        """Whether blocks rest in files, beside this device."""
        return self.store == "file" or (self.store == "auto" and device.type == "cpu")

    def bind(self, model: nn.Module, coordinates: BoundSubspace, objective: Objective) -> Session:
        """The blocks go where they rest, and come when they compute: in evaluations too, from now on."""
        earlier = _sessions.pop(model, None)
        if earlier is not None:
            earlier.close()
        session = OffloadSession(model, coordinates, objective, self)
        _sessions[model] = session
        return session


class OffloadSession(KeepsWeightsAway, LayerwiseSession):
    """The forwards side by side, and the stream of blocks that they meet at."""

    name = "offload"

    def __init__(self, model: nn.Module, coordinates: BoundSubspace, objective: Objective, engine: Offload) -> None:
        self.points_in_flight = engine.points_in_flight
        blocks, device = blocks_of(model), compute_device(model)
        self.transfer = transfer_for(device)
        trained, in_file = coordinates.weights.tensors, engine.rests_in_file(device)
        rest = partial(_in_file, trained, engine.folder) if in_file else partial(_resting, self.transfer)
        self.stream = BlockStream(blocks, rest, self.transfer)
        super().__init__(model, coordinates, objective, engine.piece_mb)
        self._is_asked = False  # the points of a step are several forwards: blocks rest after the last
        self._handles = [handle for index, block in enumerate(blocks) for handle in self._at(index, block.module)]
        self._handles.append(model.register_forward_hook(self._after_a_forward, always_call=True))

    # ---- blocks ------------------------------------------------------------------------------------------------------

    def _at(self, index: int, module: nn.Module) -> Iterator[Any]:
        def enter(module: nn.Module, _: Any) -> None:
            if module.__dict__.get("forward") is passes_through:
                return
            visit = ("block", index)
            visits = self.swapper.state.visits
            visits[visit] += 1
            self.swapper.sync(Barrier((*visit, visits[visit])), None, partial(self._enter_block, index))

        def leave(module: nn.Module, *_: Any) -> None:
            if module.__dict__.get("forward") is not passes_through:
                self.stream.leave(index)

        yield module.register_forward_pre_hook(enter, prepend=True)
        yield module.register_forward_hook(leave, always_call=True)

    def _enter_block(self, index: int, forwards: list[Any]) -> list[Any]:
        self.stream.enter(index, len(forwards))
        return forwards

    def _after_a_forward(self, *_: Any) -> None:
        if not self._is_asked:
            self.stream.rest()

    def close(self) -> None:
        """All weights rest, and the model is an ordinary one again."""
        self.stream.settle()
        for handle in self._handles:
            handle.remove()
        self.transfer.close()

    # ---- queries -----------------------------------------------------------------------------------------------------

    def evaluate_all(self, pairs: list[tuple[Any, Point]]) -> list[Tensor]:
        """The objective of each batch at its point; the blocks rest afterwards."""
        if not self.survey.is_done:
            self.stream.settle()  # every read of a tensor is looked at now, and a step would be one
        self._is_asked = True
        try:
            return super().evaluate_all(pairs)
        finally:
            self._is_asked = False
            self.stream.rest()

    def groups(self, points: Sequence[Point]) -> Iterator[list[Point]]:
        """All points of a step together, or ``points_in_flight`` at a time."""
        one_by_one = self.swapper.compiled or self.survey.sets_global_state
        size = 1 if one_by_one else self.points_in_flight or len(points)
        for start in range(0, len(points), size):
            yield list(points[start : start + size])

    def what_to_lower(self) -> str:
        """The settings of this engine that bound its memory."""
        return f"engine.points_in_flight (now {self.points_in_flight or 'all'}), or {super().what_to_lower()}"

    def _conclude(self) -> bool:
        super()._conclude()
        survey, visits = self.survey, self.swapper.state.visits
        for name in list(survey.whole_forward):
            index = self.stream.of.get(name)
            if index is None:
                continue
            if name in survey.read_outside or not visits["block", index]:
                self.stream.keep(name)
            else:  # not reached in a block that was: where another row reaches it, its module perturbs it
                survey.whole_forward.remove(name)
        return bool(survey.whole_forward)

    def _find_new_reads(self) -> bool:
        has_new = super()._find_new_reads()
        for name in self.survey.whole_forward:
            if name in self.stream.of:
                self.stream.keep(name)
        return has_new

    # ---- steps -------------------------------------------------------------------------------------------------------

    def write(self, name: str, step: Callable[[], None], *, can_wait: bool) -> None:
        """At the next visit of the tensor's block where the step can wait, else now."""
        self.stream.write(name, step, now=not can_wait)

    def settle(self) -> None:
        """All steps are written, and all blocks rest."""
        self.stream.settle()

    def device(self, name: str) -> torch.device:
        """The computing device, where a tensor belongs to a block."""
        return self.transfer.device if name in self.stream.of else self.weights.tensors[name].device


def stream_to_read(model: Any, engine: Offload, device: torch.device) -> None:
    """Blocks rest and come when they compute, for a model whose weights do not move: forwards alone.

    Args:
        model: with or without an adapter, on the CPU; what stands outside of its blocks goes to the device.
        engine: says where blocks rest.
        device: the one that computes.
    """
    place_outside(model, device)
    transfer, in_file = transfer_for(device), engine.rests_in_file(device)
    rest = partial(_in_file, (), engine.folder) if in_file else partial(_resting, transfer)
    stream = BlockStream(blocks_of(model), rest, transfer)
    for index, block in enumerate(stream.blocks):
        block.module.register_forward_pre_hook(lambda *_, index=index: stream.enter(index), prepend=True)
        block.module.register_forward_hook(lambda *_, index=index: stream.leave(index), always_call=True)
    # an adapter writes texts by its base's own forward
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.register_forward_hook(lambda *_: stream.rest(), always_call=True)


def compute_device(model: nn.Module) -> torch.device:
    """The device of what stands outside of the blocks, else of the model."""
    inside = {name for block in blocks_of(model) for name in block.tensors}
    parameters = dict(model.named_parameters())
    outside = next((p for name, p in parameters.items() if name not in inside), None)
    return (next(iter(parameters.values())) if outside is None else outside).device


def place_outside(model: nn.Module, device: torch.device) -> None:
    """Move what stands outside of the blocks, and every buffer, to a device; the blocks stay where they are."""
    inside = {id(parameter) for block in blocks_of(model) for parameter in block.tensors.values()}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in inside:
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def rest_in_files(blocks: Sequence[Block], trained: Collection[str], folder: str | None = None) -> None:
    """Put the blocks' tensors where they rest with store=file; those that do already stay."""
    for block in blocks:
        for parameter, tensor in zip(block.tensors.values(), _in_file(trained, folder, block), strict=True):
            parameter.data = tensor


def _resting(transfer: Transfer, block: Block) -> list[Tensor]:
    return [transfer.resting(tensor.data) for tensor in block.tensors.values()]


def _in_file(trained: Collection[str], folder: str | None, block: Block) -> list[Tensor]:
    """What is trained in a scratch file, what is not in the checkpoint's own where it is a view of that."""
    resting, copied = {}, {}
    for name, parameter in block.tensors.items():
        tensor = parameter.detach().cpu()
        mapped = tensor if is_mapped(tensor) else mapped_where_it_lies(tensor)
        if mapped is not None and (name not in trained or is_mapped(mapped, to_write=True)):
            resting[name] = mapped
        else:
            copied[name] = tensor if mapped is None else mapped
    if copied:
        resting |= dict(zip(copied, scratch_copies(list(copied.values()), folder), strict=True))
    return [resting[name] for name in block.tensors]
