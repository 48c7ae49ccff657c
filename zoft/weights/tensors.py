"""Which tensors are trained: one canonical name each (tied tensors once), and the modules that own them."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable

from zoft.errors import UserError
from zoft.noise.counter import perturb_with
from zoft.utils.lazy import Tensor, nn, torch
from zoft.weights.mapped import release

log = logging.getLogger(__name__)

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
"""In the names of a block's attention and of what lies in it."""
ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate|classifier_router)\.", re.IGNORECASE)
"""In the names of tensors that choose experts."""


class Weights:
    """The trainable tensors of a module, in ``named_parameters()`` order.

    Args:
        model: any ``torch.nn.Module``; what has ``requires_grad`` is trained.
        shapes_only: whether tensors without values are fine, because nothing is going to be trained (an estimate).

    Raises:
        UserError: nothing is trainable, or a trained tensor has no values in memory.

    Example:
        >>> Weights(torch.nn.Linear(3, 2)).num_elements
        8
    """

    def __init__(self, model: nn.Module, *, shapes_only: bool = False) -> None:
        self.tensors: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        if not self.tensors:
            raise UserError(
                "nothing is trainable: every parameter has requires_grad=False; "
                "choose what moves with trainable=all, peft=lora, trainable=last_blocks or trainable=regex"
            )
        on_meta = next((name for name, tensor in self.tensors.items() if tensor.is_meta), None)
        if on_meta is not None and not shapes_only:  # an addition to a tensor on meta does nothing, and says nothing
            raise UserError(
                f"{on_meta} is to be trained and has no values in memory (it is on the meta device, as weights are "
                "that accelerate has offloaded): use engine=offload instead, load the model without offloading (no "
                "device_map=auto to a disk or the CPU's memory), or train an adapter, whose weights stay in memory"
            )
        for tensor in self.tensors.values():
            if not tensor.is_contiguous():
                tensor.data = tensor.data.contiguous()  # engines and steps work on flat pieces
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
        return digest_of(self.tensors.items())

    def sample(self, size: int = 1_000_000) -> Tensor:
        """Every n-th number that is trained, some ``size`` of them at most, on the host: what steps have moved."""
        stride, chosen = max(1, self.num_elements // size), list[Tensor]()
        for tensor in self.tensors.values():
            chosen.append(tensor.detach().view(-1)[::stride].cpu().clone())  # a view would move along
            release(tensor)
        return torch.cat(chosen)

    def check_eps(self, eps: float) -> None:
        """Refuse an ``eps`` that the dtype cannot represent at the scale of most of the weights.

        A perturbation below half a unit in the last place of a typical weight is rounded away: the two losses of a
        pair would be equal and the run would do nothing. Where that holds for the smaller part of the weights only
        (norms of size 1 in bfloat16 at eps 1e-3) it is said, and the run goes on.
        """
        lost: dict[str, float] = {}  # name -> half a unit in the last place
        for name, tensor in self.tensors.items():
            # half a unit in the last place: eps_dtype |theta| / 2
            smallest = torch.finfo(tensor.dtype).eps * float(tensor.detach().float().abs().mean()) / 2
            release(tensor)
            if eps < smallest:
                lost[name] = smallest
        if not lost:
            return
        elements = sum(self.tensors[name].numel() for name in lost)
        # the largest tensor speaks for the others in the message
        name, smallest = max(lost.items(), key=lambda item: self.tensors[item[0]].numel())
        dtype = str(self.tensors[name].dtype).removeprefix("torch.")
        message = (
            f"estimator.eps={eps:g} is below what {dtype} can represent at the scale of {len(lost)} tensors, "
            f"{100 * elements / self.num_elements:.3g} % of what is trained (for {name}, half a unit in the last place "
            f"of a typical weight is {smallest:.2g})"
        )
        wider = ", or load the weights in float32" if torch.finfo(self.tensors[name].dtype).bits < 32 else ""
        if 2 * elements > self.num_elements:
            raise UserError(f"{message}: raise estimator.eps to {2 * smallest:.1g} or more{wider}")
        log.warning("%s: those hardly move; raise estimator.eps to %.1g or more%s", message, 2 * smallest, wider)


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bits of tensors, one after the other.

    Args:
        tensors: names and values; each is let go of before the next one is asked for.
    """
    sha = hashlib.sha256()
    for name, tensor in tensors:
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        # bits, not values: -0.0 and 0.0, or two NaNs, are different weights
        sha.update(bits_of(tensor))
        release(tensor)  # what rests in a file need not stay in memory for having been looked at
    return sha.hexdigest()


def bits_of(tensor: Tensor) -> memoryview:
    """All bytes of a tensor of any dtype and device, in the order of its elements; of a CPU tensor without a copy.

    Example:
        >>> list(bits_of(torch.tensor([1, 2], dtype=torch.int16)))
        [1, 0, 2, 0]
    """
    return tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data


def layer_of(name: str) -> str | None:
    """The numbered layer that a tensor belongs to, outermost first; None outside of them.

    Example:
        >>> layer_of("model.layers.7.mlp.experts.3.up_proj.weight"), layer_of("model.norm.weight")
        ('model.layers.7', None)
    """
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return None if number is None else ".".join(parts[: number + 1])


def _owners(model: nn.Module, tensors: dict[str, nn.Parameter]) -> dict[nn.Module, list[tuple[str, str]]]:
    """module -> [(attribute, canonical name)] for every module that holds a trainable tensor, tied ones included."""
    # by identity: a tied tensor has one name, and several modules hold it
    names = {id(tensor): name for name, tensor in tensors.items()}
    owners: dict[nn.Module, list[tuple[str, str]]] = {}
    for module in model.modules():
        held = [(attr, names[id(p)]) for attr, p in module._parameters.items() if p is not None and id(p) in names]
        if held:
            owners[module] = held
    return owners


def perturbed(weight: Tensor, z: Tensor, scale: float) -> Tensor:
    """``weight + scale * z`` as a new tensor, added in float32 (or the wider dtype) and rounded once.

    The arithmetic is that of :func:`zoft.noise.counter.perturb_with`, as in every engine: losses can be equal to
    the bit.
    """
    # W + s z
    moved = torch.empty_like(weight)
    perturb_with(z, weight, [scale], [moved])
    return moved
