"""Which tensors are trained: one canonical name each (tied tensors once), and the modules that own them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from zoft.errors import UserError
from zoft.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


class Weights:
    """The trainable tensors of a module, in ``named_parameters()`` order.

    Args:
        model: any ``torch.nn.Module``; what has ``requires_grad`` is trained.

    Raises:
        UserError: nothing is trainable.

    Example:
        >>> Weights(torch.nn.Linear(3, 2)).num_elements
        8
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        if not self.tensors:
            raise UserError(
                "nothing is trainable: every parameter has requires_grad=False; "
                "choose what moves with trainable=all, peft=lora, trainable=last_blocks or trainable=regex"
            )
        self.owners = _owners(model, self.tensors)

    @property
    def num_elements(self) -> int:
        """How many numbers are trained."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def sizes(self) -> dict[str, int]:
        """name -> number of elements."""
        return {name: tensor.numel() for name, tensor in self.tensors.items()}

    def digest(self) -> str:
        """SHA-256 over names, dtypes and bits: equal exactly when two sets of weights are bit-identical."""
        sha = hashlib.sha256()
        for name, tensor in self.tensors.items():
            sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
            sha.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
        return sha.hexdigest()

    def check_eps(self, eps: float) -> None:
        """Refuse an ``eps`` that the dtype cannot represent at the weights' own scale.

        A perturbation below half a unit in the last place of a typical weight is rounded away: the two losses of a
        pair would be equal and the run would do nothing.
        """
        for name, tensor in self.tensors.items():
            scale = float(tensor.detach().float().abs().mean())
            smallest = torch.finfo(tensor.dtype).eps * scale / 2
            if eps < smallest:
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise UserError(
                    f"estimator.eps={eps:g} is below what {dtype} can represent at the scale of {name} "
                    f"(mean |w| = {scale:.2g}, half a unit in the last place = {smallest:.2g}): "
                    f"raise estimator.eps to at least {2 * smallest:.1g}, or load the weights in float32"
                )


def _owners(model: nn.Module, tensors: dict[str, nn.Parameter]) -> dict[nn.Module, list[tuple[str, str]]]:
    """module -> [(attribute, canonical name)] for every module that holds a trainable tensor, tied ones included."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    owners: dict[nn.Module, list[tuple[str, str]]] = {}
    for module in model.modules():
        held = [(attr, names[id(p)]) for attr, p in module._parameters.items() if p is not None and id(p) in names]
        if held:
            owners[module] = held
    return owners


def perturbed(weight: Tensor, z: Tensor, scale: float) -> Tensor:
    """``weight + scale * z`` as a new tensor, added in float32 (or the wider dtype) and rounded once.

    Every engine computes a perturbed weight through this one line, so their losses can be equal to the bit.
    """
    return (z * scale).add_(weight).to(weight.dtype) if z.dtype != weight.dtype else (z * scale).add_(weight)
