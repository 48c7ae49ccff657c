"""Feed-forward parts of blocks: moved as a whole by node directions, with the gradients inside by the chain rule."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from zoft.engines._prefix import longest_stack
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

    Args:
        model: the whole model.
        nodes: by key.

    Returns:
        name -> the part, as a node whose output is perturbed; and key of a node -> name of its part.
    """
    names = {module: name for name, module in model.named_modules()}
    parts, inside = dict[str, Node](), dict[str, str]()
    for block in longest_stack(model):
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
    held, stack = {node.module: node for node in parts.values()}, longest_stack(model)
    blocks = [block for block in stack if held.keys() & set(block.children())]
    left: list[Tensor] = []
    errors: list[float] = []
    state: dict[nn.Module, Tensor] = {}  # block -> in, then in + part
    # block -> what may be added for attention: its output, or that of the normalisation behind it (Gemma 2 and 3)
    attended: dict[nn.Module, list[Tensor]] = {}
    given: dict[nn.Module, Tensor] = {}  # a later module of a part -> what the one before it gave

    def entering(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, torch.Tensor):
            state[block], attended[block] = rows(hidden.detach()).float(), []

    def attending(block: nn.Module) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if block in state:
                attended[block].append(rows(_first(output).detach()).float())

        return hook

    def adding(block: nn.Module) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if block in state:
                state[block] = state[block] + rows(_first(output).detach()).float()

        return hook

    def giving(later: nn.Module) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            given[later] = rows(_first(output).detach())

        return hook

    def taking(later: nn.Module, args: Any) -> None:
        # what it is given must be what the module before it gave, and nothing else
        if later not in given or not torch.equal(rows(args[0].detach()), given.pop(later)):
            errors.append(float("inf"))

    def leaving(block: nn.Module, _args: Any, output: Any) -> None:
        if block in state:
            out, inner = rows(_first(output).detach()), state.pop(block)
            errors.append(min(_off(out, inner + more) for more in attended.pop(block) or [torch.zeros_like(inner)]))

    def at_end(_module: nn.Module, _args: Any, output: Any) -> None:
        left.append(rows(_first(output).detach()))

    def verdict(last: Tensor | None = None) -> bool:
        if last is not None and (len(left) != 1 or left[0].shape != last.shape or _off(left[0], last) >= 1):
            return False
        return len(errors) >= len(blocks) > 0 and max(errors) < 1

    handles = [stack[-1].register_forward_hook(at_end)] if stack else []
    for block in blocks:
        handles.append(block.register_forward_pre_hook(entering, with_kwargs=True))
        for name, child in block.named_children():
            if child in held:
                part = held[child]
                handles.append(part.last.register_forward_hook(adding(block)))
                for before, later in pairwise((part.module, *part.then)):
                    handles.append(before.register_forward_hook(giving(later)))
                    handles.append(later.register_forward_pre_hook(taking))
            elif ATTENTION.search(name):
                handles.append(child.register_forward_hook(attending(block)))
        handles.append(block.register_forward_hook(leaving))
    try:
        yield verdict
    finally:
        for handle in handles:
            handle.remove()


def _off(out: Tensor, expected: Tensor) -> float:
    """How far two tensors are apart, in units of what rounding may do."""
    unit = 5e-2 if out.element_size() < 4 else 1e-3
    return float((out.float() - expected.float()).norm() / out.float().norm().clamp_min(1e-30)) / unit


def _first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor
