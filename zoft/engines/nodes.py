"""Forwards whose layers' outputs are perturbed at some positions, and seen: the engine of node directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from zoft.engines._context import ContextCache
from zoft.engines._experts import calls_of
from zoft.engines._parts import Verdict, find_parts, outputs_of, seeing_sums
from zoft.engines.base import Engine, Objective, Session, check_outputs, memory_errors_say
from zoft.errors import UserError
from zoft.estimators.base import Estimator, Point
from zoft.subspaces._node_layers import Node
from zoft.subspaces.base import BoundSubspace
from zoft.subspaces.nodes import NodeSpace
from zoft.utils.lazy import Tensor, nn, torch

_CROSS = re.compile(r"EncDecAttention|encoder_attn|cross_?attn|cross_?attention", re.IGNORECASE)


@dataclass
class Nodes(Engine):
    """Perturbs the outputs of layers by hooks; the weights are never touched but to write a step.

    References: docs/nodes.md.
    """

    def choose(self, estimator: Estimator, coordinates: BoundSubspace, model: nn.Module) -> Engine:
        """Itself, for estimators of node gradients."""
        del coordinates, model
        check_outputs(self.name(), estimator)
        return self

    def bind(self, model: nn.Module, coordinates: BoundSubspace, objective: Objective) -> NodeSession:
        """A session for the nodes of the subspace; of an encoder-decoder, those at positions of the decoder."""
        if isinstance(coordinates, NodeSpace) and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            # cross-attention's keys are at the encoder's positions: the loss says nothing of those
            coordinates.leave_out(lambda name: "decoder." not in name or _CROSS.search(name) is not None)
        if isinstance(coordinates, NodeSpace):
            coordinates.use_parts(*find_parts(model, coordinates.nodes))
        return NodeSession(model, coordinates, objective)


class NodeSession(Session):
    """Clean losses, and forwards with hooks on the nodes' layers."""

    _asking = False
    _contexts: ContextCache | None = None
    sees_few_bits = False  # whether a layer was given 16 bits, as in autocast

    @cached_property
    def checked_parts(self) -> set[str]:
        """Names of the parts whose rows alone have been compared with those of the whole forward."""
        return set()

    def contexts(self, nodes: dict[str, Node], new_cache: Callable[[], Any]) -> ContextCache:
        """Keeps what a batch's forwards have in common, where outputs of these nodes move."""
        if self._contexts is None:
            self._contexts = ContextCache(self.model, {node.module for node in nodes.values()}, new_cache)
        return self._contexts

    def losses(self, batch: Any, points: Sequence[Point]) -> Tensor:
        """The clean loss; there are no points in the weights."""
        if any(point.direction is not None for point in points):
            raise UserError("engine=nodes perturbs layers' outputs, never the weights: choose engine=auto")
        with memory_errors_say("task.max_length"):
            return torch.stack([self.evaluate(batch) for _ in points])

    @contextmanager
    def seeing(
        self, nodes: dict[str, Node], rows: Tensor, column: Tensor, num_rows: int
    ) -> Iterator[dict[str, Tensor]]:
        """Within this block a forward leaves what each node sees at some positions: key -> [P, n] as :meth:`Node.seen`.

        Args:
            nodes: by key.
            rows: [P] row of the batch of each position.
            column: [P] where in it, counted from the right end (negative).
            num_rows: rows of the batch.
        """
        seen: dict[str, Tensor] = {}

        def look(key: str, node: Node) -> Callable[..., None]:
            # the hook's own call of the layer is no call of the model's
            def hook(_module: nn.Module, args: Any) -> None:
                if self._asking:
                    return
                self._asking = True  # a scale's node calls its own layer, to see what is multiplied with it
                with torch.inference_mode(False), torch.no_grad():
                    x = _rows(args[0].detach(), rows, column, num_rows, node).clone()
                    self.sees_few_bits = self.sees_few_bits or x.element_size() < 4
                    # a layer that runs twice in a forward is two nodes: key, key@1
                    seen[_call(seen, key)] = node.seen(x)
                self._asking = False

            return hook

        with ExitStack() as hooks:
            for key, node in nodes.items():
                hooks.enter_context(node.module.register_forward_pre_hook(look(key, node)))
            yield seen

    @contextmanager
    def moved(
        self, nodes: dict[str, Node], rows: Tensor, column: Tensor, num_rows: int, shift: Callable[[str, int], Tensor]
    ) -> Iterator[None]:
        """Within this block a forward's layers give y + shift at some positions.

        Args:
            nodes: by key; these and what follows as of :meth:`seeing`.
            rows: [P].
            column: [P].
            num_rows: rows of the batch.
            shift: (key, outputs of the layer) -> [P, m], float32.
        """
        calls: dict[str, Any] = {}

        def move(key: str, node: Node) -> Callable[..., Tensor]:
            def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
                if self._asking:
                    return output
                name = _call(calls, key)
                calls[name] = None
                # y -> y + shift at the wanted positions, in the layer's own dtype
                flat, index = _places(output, rows, column, num_rows, node)
                return flat.index_add(0, index, shift(name, flat.shape[1]).to(flat.dtype)).view_as(output)

            return hook

        with ExitStack() as hooks:
            for key, node in nodes.items():
                hooks.enter_context(node.last.register_forward_hook(move(key, node)))
            yield

    @contextmanager
    def adding(self, parts: dict[str, Node], rows: Tensor, column: Tensor, num_rows: int) -> Iterator[Verdict]:
        """A forward within this block tells whether blocks add these parts to the residual stream unchanged.

        Args:
            parts: by name.
            rows: [P] row of the batch of each position.
            column: [P] where in it, counted from the right end (negative).
            num_rows: rows of the batch.
        """
        one = next(iter(parts.values()))
        with seeing_sums(self.model, parts, lambda x: _rows(x, rows, column, num_rows, one)) as verdict:
            yield verdict

    def inside(
        self, part: Node, nodes: dict[str, Node], x: Tensor, e: Tensor, *, looking: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """The node gradients inside a part, by the chain rule from those of its outputs; and what its nodes see.

        The part is computed once more, of the rows x alone, and derived within: no other layer is run.

        Args:
            part: as :func:`zoft.engines._parts.find_parts` has it.
            nodes: those that lie in it, by key.
            x: its inputs, [P, n] float32.
            e: gradient of its outputs, [P, m] float32.
            looking: whether what the nodes see is wanted.

        Returns:
            key -> e of the node, [P, m] float32; key -> x of the node, [P, n], if wanted, of experts in any case; and
            key -> number of the expert that each row belongs to, int64: of k experts a token, P k rows.
        """
        experts = {key: node for key, node in nodes.items() if node.kind == "experts"}
        tensors = {key: self.weights.tensors[node.name] for key, node in experts.items()}
        if not len(x):  # no label of these rows counts; processes that have some expect as many tensors
            none = {key: e.new_zeros(0, node.size) for key, node in nodes.items() if node.behind is None}
            seen_none = {key: x.new_zeros(0, tensor.shape[2]) for key, tensor in tensors.items()}
            return none, seen_none, {key: torch.empty(0, dtype=torch.int64, device=e.device) for key in experts}
        rows, column = torch.arange(len(x), device=x.device), torch.full((len(x),), -1, device=x.device)
        zeros = dict[str, Tensor]()

        def shift(key: str, size: int) -> Tensor:
            zeros[key] = torch.zeros(len(x), size, device=x.device, requires_grad=True)
            return zeros[key]

        # rows of length one: gradients of late training are small, and 16 bits hold no small numbers
        device, e = e.device, e.to(x.device)  # blocks may lie on several devices, and e comes from behind the last one
        length = e.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        layers = {key: node for key, node in nodes.items() if key not in experts}
        in_layers = {key: node for key, node in layers.items() if node.behind is None}
        if experts:
            length = length.max()  # an expert is given its rows in an order of its own
        with (
            torch.enable_grad(),
            self.seeing(layers if looking else {}, rows, column, len(x)) as seen,
            self.moved(in_layers, rows, column, len(x), shift),
            calls_of(tensors, {key: node.module for key, node in experts.items()}) as calls,
        ):
            y = outputs_of(part, x)
            zeros_of = [*zeros.values(), *(call.zero for each in calls.values() for call in each)]
            of_zeros = torch.autograd.grad(y, zeros_of, (e / length).to(y.dtype), allow_unused=True)
        gradients = iter(
            (torch.zeros_like(zero).detach() if one is None else one.float() * length).to(device)
            for zero, one in zip(zeros_of, of_zeros, strict=True)
        )
        of_nodes, numbers = {key: next(gradients) for key in zeros}, dict[str, Tensor]()
        for key, each in calls.items():
            of_nodes[key] = torch.cat([next(gradients) for _ in each])
            seen[key] = torch.cat([call.x for call in each])
            numbers[key] = torch.cat([torch.full((len(call.x),), call.number) for call in each]).to(device)
        return of_nodes, seen, numbers


def _call(calls: dict[str, Any], key: str) -> str:
    """The name of a layer's next call: its key, then key@1, key@2 ... for a layer that runs more than once."""
    # a shared layer runs several times in a forward, and any layer where text is written token by token
    name, count = key, 0
    while name in calls:
        count += 1
        name = f"{key}@{count}"
    return name


def _rows(x: Tensor, rows: Tensor, column: Tensor, num_rows: int, node: Node) -> Tensor:
    flat, index = _places(x, rows, column, num_rows, node)
    return flat[index]


def _places(x: Tensor, rows: Tensor, column: Tensor, num_rows: int, node: Node) -> tuple[Tensor, Tensor]:
    """(x as a list of positions, which of them are meant)."""
    width = x.shape[-1]
    if x.dim() == 3 and x.shape[0] == num_rows:
        length = x.shape[1]
    elif x.dim() == 2 and x.shape[0] % num_rows == 0:  # [B T, n], or one row an example: a pooled state
        length = x.shape[0] // num_rows
    else:
        raise UserError(
            f"subspace=nodes: the layer of {node.name} is given {list(x.shape)} for {num_rows} rows, which are not "
            "their positions (experts see a token's own): choose other layers (subspace.layers, trainable), or "
            "method=mezo"
        )
    # one row an example: it is the position, whatever column was asked for
    if length == 1:
        return x.reshape(-1, width), rows
    if len(column) and length + int(column.min()) < 0:
        raise UserError(
            f"subspace=nodes: the layer of {node.name} sees {length} positions of a row, fewer than the loss is "
            "read from (an encoder's, where the loss is the decoder's): train the decoder's layers, or use method=mezo"
        )
    # columns count from the right: row r, column -1 is element r T + T - 1
    return x.reshape(-1, width), rows * length + length + column
