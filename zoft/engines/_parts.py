"""Feed-forward parts of blocks: moved as a whole by node directions, with the gradients inside by the chain rule."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
    attention, if it computes position by position from one tensor: no experts in a list of modules, no second argument.

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
        holders = [child for child in block.children() if matrices & set(child.modules())]
        # one child holds all of them, and is no matrix itself (fc1 and fc2 of OPT lie in the block)
        if len(holders) != 1 or holders[0] in matrices or not _is_of_one_tensor(holders[0]):
            continue
        name, of_part = names[holders[0]], set(holders[0].modules())
        held = {key: node for key, node in nodes.items() if node.module in of_part}
        norm = next((child for child_name, child in block.named_children() if _NORM_BEHIND.search(child_name)), None)
        parts[name] = Node(name, holders[0], "part", max(node.size for node in held.values()), norm=norm)
        inside.update(dict.fromkeys(held, name))
    return parts, inside


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
    y = _first(part.module(x.to(dtype).unsqueeze(1)))
    return (y if part.norm is None else _first(part.norm(y))).squeeze(1)


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
    given: dict[nn.Module, Tensor] = {}  # normalisation behind a part -> what the part gave

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

    def giving(norm: nn.Module) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            given[norm] = rows(_first(output).detach())

        return hook

    def normalising(norm: nn.Module, args: Any) -> None:
        # what this normalisation is given must be what the part gave, and nothing else
        if not torch.equal(rows(args[0].detach()), given.pop(norm)):
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
                norm = held[child].norm
                handles.append(held[child].last.register_forward_hook(adding(block)))
                if norm is not None:
                    handles.append(child.register_forward_hook(giving(norm)))
                    handles.append(norm.register_forward_pre_hook(normalising))
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
