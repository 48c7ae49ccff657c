"""Feed-forward parts of blocks: moved as a whole by node directions, with the gradients inside by the chain rule."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

from zoft.engines._prefix import stack_with
from zoft.subspaces._node_layers import Node, is_experts, is_outside_attention
from zoft.utils.lazy import Tensor, nn, torch
from zoft.weights.tensors import ATTENTION

Rows = Callable[["Tensor"], "Tensor"]
"""[B, T, H] -> [P, H], at the positions of a step."""
_NORM_BEHIND = re.compile(r"^post_(feedforward|mlp|ffn)_(layer)?norm$")
"""A block's normalisation of what its feed-forward part gives, by the names that transformers' classes use."""
Verdict = Callable[..., bool]
"""Of :func:`seeing_sums`: takes the last hidden states [P, H] or nothing."""


def find_parts(model: nn.Module, nodes: Mapping[str, Node]) -> tuple[dict[str, Node], dict[str, str]]:
    """The feed-forward parts that hold nodes, and which part each of those nodes lies in.

    A part is the one module directly below a block that holds all of the block's trained matrices outside of
    attention, if it computes position by position from one tensor (no experts in a list of modules, no second
    argument), with the normalisation behind it; or two matrices directly below a block, with an activation between.

    Returns:
        name -> the part, as a node whose output is perturbed; and key of a node -> name of its part.
    """
    names = {module: name for name, module in model.named_modules()}
    parts, inside = dict[str, Node](), dict[str, str]()
    for block in stack_with({node.module for node in nodes.values()}, model):
        of_block = set(block.modules())
        matrices = {node.module for node in nodes.values() if node.module in of_block and is_outside_attention(node)}
        chain = _chain(block, matrices)
        if chain is None:
            continue
        name, of_part = names[chain[0]], {module for link in chain for module in link.modules()}
        held = {key: node for key, node in nodes.items() if node.module in of_part}
        size = max(node.size for node in held.values())
        parts[name] = Node(name, chain[0], "part", size, then=chain[1:])
        inside.update(dict.fromkeys(held, name))
    return parts, inside


def _chain(block: nn.Module, matrices: set[nn.Module]) -> tuple[nn.Module, ...] | None:
    """The modules of a block that its hidden states go through one after the other, with all these matrices in them."""
    children = dict(block.named_children())
    holders = [child for child in children.values() if matrices & set(child.modules())]
    if len(holders) == 1 and holders[0] not in matrices and _is_of_one_tensor(holders[0]):
        return (holders[0], *(child for name, child in children.items() if _NORM_BEHIND.search(name)))
    # fc1 and fc2 of OPT lie in the block itself, with the activation between them
    between = [child for name, child in children.items() if "act" in name and not list(child.parameters())]
    layers = [
        layer for holder in holders if isinstance(layer := getattr(holder, "base_layer", holder), torch.nn.Linear)
    ]
    if len(holders) == len(layers) == 2 and len(between) == 1:  # with or without an adapter around each
        first, second = layers
        if (first.in_features, first.out_features) == (second.out_features, second.in_features):
            return (holders[0], between[0], holders[1])
    return None


def _is_of_one_tensor(module: nn.Module) -> bool:
    """Whether a module is called with one tensor, and gives each position what follows from that position alone."""
    required = [
        one
        for one in inspect.signature(type(module).forward).parameters.values()
        if one.default is one.empty and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]
    # experts that are modules are each given other rows, and a convolution mixes positions
    is_other = any(
        isinstance(below, torch.nn.ModuleList)
        or (not is_experts(below) and any(tensor.dim() > 2 for tensor in below.parameters(recurse=False)))
        for below in module.modules()
    )
    return len(required) == 2 and not is_other  # self and the hidden states


def outputs_of(part: Node, x: Tensor) -> Tensor:
    """A part's outputs [P, m] of rows of its inputs [P, n] alone, each as a sequence of one token."""
    # float32 rows that were computed in the part's dtype go back into it without a rounding
    dtype = next((t.dtype for t in part.module.parameters() if t.is_floating_point()), x.dtype)
    y = x.to(dtype).unsqueeze(1)
    for module in (part.module, *part.then):
        y = _first(module(y))
    return y.squeeze(1)


@contextmanager
def seeing_sums(model: nn.Module, parts: Mapping[str, Node], rows: Rows) -> Iterator[Verdict]:
    """A forward in here tells whether every block adds its part to what enters it: out = in + attention + part.

    Where it does, an output of any part is a place of the residual stream. It does not where a normalisation follows
    the sum (BERT), or a factor scales what a part gives (Granite).

    Args:
        model: the whole model.
        parts: as :func:`find_parts` has them.
        rows: picks the step's positions.

    Yields:
        The verdict, to be asked for behind the forward; handed the last hidden states [P, H], it is also whether these
        are what leaves the last block.
    """
    held = {node.module: node for node in parts.values()}
    stack = stack_with(held.keys(), model)
    blocks = [block for block in stack if held.keys() & set(block.children())]
    sums = _Sums(rows)
    handles = [stack[-1].register_forward_hook(sums.end)] if stack else []
    for block in blocks:
        handles += sums.watch(block, held)
    with ExitStack() as hooks:
        for handle in handles:
            hooks.enter_context(handle)
        yield partial(sums.hold, len(blocks))


class _Sums:
    """The hooks of :func:`seeing_sums`, and the sums that they check in a forward."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.sums: dict[nn.Module, Tensor] = {}  # block -> in, then in + part
        # block -> what may be added for attention: its output, or that of the normalisation behind it (Gemma 2 and 3)
        self.attention: dict[nn.Module, list[Tensor]] = {}
        self.inputs: dict[nn.Module, Tensor] = {}  # a later module of a part -> the output of the one before it
        self.errors: list[float] = []  # of each block: how far out is from in + attention + part
        self.last_hidden: list[Tensor] = []  # what leaves the last block

    def watch(self, block: nn.Module, held: Mapping[nn.Module, Node]) -> list[Any]:
        """Put the hooks on a block, its part and its attention; the handles that remove them.

        Args:
            block: of the model.
            held: module -> the part that begins with it.
        """
        handles = [block.register_forward_pre_hook(self.enter, with_kwargs=True)]
        for name, child in block.named_children():
            if child in held:
                part = held[child]
                handles.append(part.last.register_forward_hook(partial(self.add_part, block)))
                for before, later in pairwise((part.module, *part.then)):
                    handles.append(before.register_forward_hook(partial(self.give, later)))
                    handles.append(later.register_forward_pre_hook(self.take))
            elif ATTENTION.search(name):
                handles.append(child.register_forward_hook(partial(self.note_attention, block)))
        handles.append(block.register_forward_hook(self.leave))
        return handles

    def enter(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, torch.Tensor):
            self.sums[block], self.attention[block] = self.rows(hidden.detach()).float(), []

    def note_attention(self, block: nn.Module, _module: nn.Module, _args: Any, output: Any) -> None:
        if block in self.sums:
            self.attention[block].append(self._rows_of(output).float())

    def add_part(self, block: nn.Module, _module: nn.Module, _args: Any, output: Any) -> None:
        if block in self.sums:
            self.sums[block] = self.sums[block] + self._rows_of(output).float()

    def give(self, later: nn.Module, _module: nn.Module, _args: Any, output: Any) -> None:
        self.inputs[later] = self._rows_of(output)

    def take(self, later: nn.Module, args: Any) -> None:
        # what it is given must be what the module before it gave, and nothing else
        if later not in self.inputs or not torch.equal(self.rows(args[0].detach()), self.inputs.pop(later)):
            self.errors.append(float("inf"))

    def leave(self, block: nn.Module, _args: Any, output: Any) -> None:
        if block in self.sums:
            out, inner = self._rows_of(output), self.sums.pop(block)
            # out = in + part + attention
            attention = self.attention.pop(block) or [torch.zeros_like(inner)]
            self.errors.append(min(_off(out, inner + one) for one in attention))

    def end(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.last_hidden.append(self._rows_of(output))

    def hold(self, num_blocks: int, last: Tensor | None = None) -> bool:
        """Whether the sums hold in all blocks; with ``last`` [P, H] also whether it is what leaves the last block."""
        hidden = self.last_hidden
        if last is not None and (len(hidden) != 1 or hidden[0].shape != last.shape or _off(hidden[0], last) >= 1):
            return False
        return len(self.errors) >= num_blocks > 0 and max(self.errors) < 1

    def _rows_of(self, output: Any) -> Tensor:
        return self.rows(_first(output).detach())


def _off(out: Tensor, expected: Tensor) -> float:
    """How far two tensors are apart, in units of what rounding may do."""
    unit = 5e-2 if out.element_size() < 4 else 1e-3
    return float((out.float() - expected.float()).norm() / out.float().norm().clamp_min(1e-30)) / unit


def _first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return tensor
