"""Nodes: layers whose trained tensor gets its gradient from the layer's input and the gradient of its output."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from zoft.errors import UserError
from zoft.utils.lazy import Tensor, nn, torch
from zoft.weights.tensors import ATTENTION, ROUTER, Weights, layer_of

_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|predictions\.decoder|embed_\w+|wte|word_embeddings)\.")
_LORA = re.compile(r"\.lora_([AB])\.")


@dataclass(frozen=True)
class Node:
    """One use of a trained tensor in a layer.

    Args:
        name: the tensor.
        module: the layer; its output is what is perturbed.
        kind: linear (y = x W^T), conv1d (y = x W, transformers' GPT-2), scale (y = x_hat * w), shift (y = ... + w),
            experts (a mixture's, [E, m, n]: inside a part, a token's own experts alone use their matrices), or
            part (several layers of a block together, no tensor of its own: ``name`` is the module's).
        size: m, how many outputs the layer has; of a part the most of any layer in it.
        behind: the node whose layer comes right behind this one, where e follows from its e by the chain rule (LoRA's
            A behind B: e_A = e_B B); None where this layer's own output is perturbed.
        then: of a part, the modules that its output goes through before a block adds it, one after the other: a
            normalisation (Gemma 2 and 3), or activation and second matrix behind the first one (OPT). What comes out of
            the last one is the part's output.
    """

    name: str
    module: nn.Module
    kind: str
    size: int
    behind: str | None = None
    then: tuple[nn.Module, ...] = ()

    @property
    def last(self) -> nn.Module:
        """The module whose output is perturbed."""
        return self.then[-1] if self.then else self.module

    def seen(self, x: Tensor) -> Tensor:
        """What the gradient is made of beside e, from rows x [P, n] of the layer's inputs: float32 [P, n] or [P, m]."""
        if self.kind in ("linear", "conv1d", "part"):
            return x.to(torch.float32)
        # dL/db = sum_p e_p 1: the input of a shift is one
        if self.kind == "shift":
            return torch.ones(len(x), self.size, device=x.device)
        call: Callable[..., Tensor] = torch.func.functional_call
        # the layer itself, in float32 and without its trained values, says what w is multiplied with
        wide, held = x.to(torch.float32).unsqueeze(1), dict(self.module.named_parameters(recurse=False))
        tensors = {key: torch.zeros_like(p, dtype=torch.float32) for key, p in held.items()}
        at_one = call(self.module, {**tensors, "weight": torch.ones_like(tensors["weight"])}, (wide,))
        if not isinstance(at_one, torch.Tensor):  # I-BERT's gives a scale of its numbers beside them
            raise UserError(
                f"subspace=nodes moves normalisations that give one tensor, and that of {self.name} gives more: use "
                "subspace.layers=linear, or method=mezo"
            )
        return (at_one - call(self.module, tensors, (wide,))).squeeze(1)  # y is affine in w: x_hat = y(1) - y(0)


def find_nodes(weights: Weights) -> dict[str, Node]:
    """Every node of the trained tensors by key: the tensor's name, ``#1`` ... behind it for a tied one's others."""
    nodes: dict[str, Node] = {}
    barred = _of_other_layers(weights)
    for module, held in weights.owners.items():
        # beside a trained matrix a bias moves outputs that the matrix can move too
        matrix = any(attribute == "weight" and weights.tensors[name].dim() == 2 for attribute, name in held)
        for attribute, name in held:
            kind = None if name in barred else _kind(module, attribute, weights.tensors[name])
            if kind is None or (kind == "shift" and matrix):  # a bias beside its matrix: the matrix does its work
                continue
            tensor = weights.tensors[name]
            size = tensor.shape[0 if kind == "linear" or tensor.dim() == 1 else 1]
            # a tied tensor is several nodes of one tensor: their factors are added
            key, count = name, 0
            while key in nodes:
                count += 1
                key = f"{name}#{count}"
            nodes[key] = Node(name, module, kind, size, _behind(name, weights))
    return nodes


def _of_other_layers(weights: Weights) -> set[str]:
    """Tensors that some layer uses which is no node: a tied embedding, a vocabulary's head."""
    # one use that is no node spoils the tensor: its gradient would lack that part
    return {
        name
        for module, held in weights.owners.items()
        for attribute, name in held
        if _kind(module, attribute, weights.tensors[name]) is None or _HEAD.search(name)
    }


def _kind(module: nn.Module, attribute: str, tensor: Tensor) -> str | None:
    if attribute == "bias" and tensor.dim() == 1:
        return "shift" if is_matrix(module) or _is_norm(module) else None
    if tensor.dim() == 3 and is_experts(module):
        return "experts"
    if attribute != "weight":
        return None
    if tensor.dim() == 2 and is_matrix(module):
        return "conv1d" if type(module).__name__ == "Conv1D" else "linear"
    return "scale" if tensor.dim() == 1 and _is_norm(module) else None


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds a mixture's experts as transformers does, each one's matrices [m, n] as a Linear's."""
    # gpt-oss has them transposed and with biases
    return getattr(module, "is_transposed", True) is False and not getattr(module, "has_bias", False)


def is_matrix(module: nn.Module) -> bool:
    """A map of the last dimension alone, row by row: torch's linear layer, and transformers' transposed one."""
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _behind(name: str, weights: Weights) -> str | None:
    """LoRA's B for its A; None for every other tensor, and where B is not trained."""
    match = _LORA.search(name)
    if match is None or match.group(1) == "B":
        return None
    # e_A follows from e_B, so A's output need not be perturbed
    other = _LORA.sub(".lora_B.", name)
    return other if other in weights.tensors else None


# ---- which of them ---------------------------------------------------------------------------------------------------


def is_adapter(node: Node) -> bool:
    """Whether the tensor is a LoRA's."""
    return _LORA.search(node.name) is not None


def is_mlp(node: Node) -> bool:
    """A matrix of a numbered layer outside of attention: gate, up, down, fc1, fc2, ...; no adapter, no router."""
    return is_outside_attention(node) and not is_adapter(node)


def is_outside_attention(node: Node) -> bool:
    """As :func:`is_mlp`, an adapter's matrices included."""
    matrix = node.kind in ("linear", "conv1d", "experts") and layer_of(node.name) is not None
    return matrix and not (ATTENTION.search(node.name) or ROUTER.search(node.name))


def is_fresh_head(node: Node) -> bool:
    """A matrix outside of the numbered layers: a classifier's head or pooler."""
    return node.kind in ("linear", "conv1d") and layer_of(node.name) is None


def is_linear(node: Node) -> bool:
    """Any matrix but a router, adapters included."""
    return node.kind in ("linear", "conv1d", "experts") and not ROUTER.search(node.name)
