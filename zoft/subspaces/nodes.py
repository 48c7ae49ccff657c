"""The space of layers' outputs: every example moves its own nodes, and the step in W follows from the inputs x."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from zoft.errors import UserError, refuse_ignored
from zoft.noise.counter import sample
from zoft.noise.direction import Direction, key_of
from zoft.noise.source import CounterNoise, NoiseSource
from zoft.subspaces._node_layers import Node, find_nodes, is_adapter, is_fresh_head, is_linear, is_mlp
from zoft.subspaces.base import BoundSubspace, Subspace, SubspaceState
from zoft.utils.lazy import Tensor, torch
from zoft.weights.tensors import Weights

LAYERS = ("auto", "mlp", "linear", "all")
POSITIONS = ("loss", "last", "all")
DIRECTIONS = ("orthogonal", "iid")
PROBED = ("auto", "layers", "parts", "shared")
OF_AN_ADAPTER = (
    "subspace.layers={} does nothing: an adapter's own layers move, and what is below is frozen: leave it out"
)
_OTHER_ADAPTER = re.compile(r"lora_magnitude|lora_embedding|(^|\.)prompt_encoder\.|adaption_(prompt|gate)")
STREAM = "residual stream"
"""Stands among the responses for that of all blocks' parts together."""


@dataclass
class Nodes(Subspace):
    """Directions in the outputs y = W x of layers instead of in their weights W.

    The gradient of W [m, n] is sum_p e_p x_p^T over the positions p of all examples, with the inputs x_p [n] known from
    the clean forward: only the node gradients e_p = dL/dy_p [m] are unknown. Each position of each example has a
    direction v_p of its own, so one forward of a batch is as many probes in m dimensions as it has positions, instead
    of one in m n. Nothing of the weights' size is drawn, and weights are never perturbed.

    At positions=loss the gradient that reaches the loss through earlier positions (by attention) is left out; behind
    the last block's attention there is none. Layers are ``torch.nn.Linear`` and transformers' ``Conv1D``; scales and
    shifts of normalisations and LoRA's A and B are nodes too. The experts of a mixture are nodes inside their block's
    part, each of the tokens that are sent to it. A bias beside a trained matrix, embeddings, a vocabulary's head, and
    experts that lie transposed (gpt-oss) are none: they stand still.

    Args:
        layers: mlp (matrices outside of attention, and a fresh classifier's), linear (all matrices), all
            (normalisations and biases too), or auto (the adapter's where there is one, else mlp, else all).
        positions: where outputs are perturbed and steps are made: loss (those that the loss is read from), last
            (``num_positions`` up to each of those), or all up to there.
        num_positions: for positions=last, at least 1.
        directions: orthogonal (over examples and probes of a step, of length sqrt(m)), or iid (Gaussian).
        probed: whose outputs are perturbed. layers: each layer's own. parts: those of a block's feed-forward part (the
            mlp of a Llama), and the node gradients of the layers in it follow by the chain rule inside the part, which
            is exact and takes no forward of the model; other layers move their own. shared: the same, and all parts
            have one response between them, because a block adds its part to the residual stream. auto: shared, where
            blocks do add their part unchanged and positions=loss, else parts.

    References: node perturbation: Ren et al. 2023 (arXiv 2210.03310); Dalm et al. 2023 (arXiv 2310.00965).
    """

    moves_outputs: ClassVar[bool] = True
    laws: ClassVar[tuple[str, ...]] = ("gaussian",)

    layers: str = "auto"
    positions: str = "loss"
    num_positions: int = 1
    directions: str = "orthogonal"
    probed: str = "auto"

    def check(self) -> None:
        """Refuse unknown words and a count below 1."""
        super().check()
        words = {"layers": LAYERS, "positions": POSITIONS, "directions": DIRECTIONS, "probed": PROBED}
        for field, known in words.items():
            self.require(getattr(self, field) in known, field, f"one of {', '.join(known)}")
        self.require(self.num_positions >= 1, "num_positions", "at least 1")
        if self.num_positions > 1:
            self.require(self.positions == "last", "positions", "last, where num_positions is given")

    def of_probes(self) -> list[str]:
        """Names of the settings of probes that differ from their defaults: they ask for probes."""
        return [
            name for name, usual in (("directions", "orthogonal"), ("probed", "auto")) if getattr(self, name) != usual
        ]

    def check_with(self, method: Any) -> None:
        """Refuse estimators that perturb weights."""
        if method.estimator.name() != "nodes":
            whole = "; method=adamw sets every part for backpropagation" if method.estimator.backpropagates else ""
            raise UserError(
                f"subspace=nodes moves layers' outputs, and estimator={method.estimator.name()} moves weights: use "
                f"estimator=nodes, or subspace=full{whole}"
            )

    def bind(self, weights: Weights, noise: str = "counter") -> NodeSpace:
        """The nodes of the trained tensors."""
        self.check_noise(noise)
        nodes = self.chosen(weights)
        return NodeSpace(weights, CounterNoise(self.law, weights.sizes()), nodes, self)

    def chosen(self, weights: Weights) -> dict[str, Node]:
        """The nodes that move, by key.

        Raises:
            UserError: there are none among what is trained.
        """
        # DoRA's output is no product W x: its gradient does not follow from inputs alone
        _refuse_other_adapters(weights)
        every = find_nodes(weights)
        if any(is_adapter(node) for node in every.values()):
            # an adapter's own layers are the ones that move; the base below is frozen anyway
            if self.layers != "auto":
                refuse_ignored(OF_AN_ADAPTER.format(self.layers))
            every = {key: node for key, node in every.items() if is_adapter(node)}
            rules = [_any]
        else:
            rules = {
                "mlp": [is_mlp],
                "linear": [is_linear],
                "all": [_any],
                # experts that are no nodes (transposed, as gpt-oss has them): auto does not fall back on attention
                "auto": [is_mlp] if _has_experts(weights) else [is_mlp, _any],
            }[self.layers]
        for rule in rules:
            chosen = {key: node for key, node in every.items() if rule(node)}
            if chosen:
                # a classifier's fresh head is random: it moves with whichever layers are chosen
                heads = {key: node for key, node in every.items() if is_fresh_head(node)}
                return {key: node for key, node in every.items() if key in chosen or key in heads}
        raise UserError(_nothing(self, weights, every))


def _any(node: Node) -> bool:
    return bool(node.name)


def _has_experts(weights: Weights) -> bool:
    return any(tensor.dim() == 3 for tensor in weights.tensors.values())


def _nothing(subspace: Nodes, weights: Weights, every: dict[str, Node]) -> str:
    reason = f"subspace=nodes finds no layer for subspace.layers={subspace.layers} among what is trained"
    if _has_experts(weights):
        return (
            f"{reason}: the experts of this mixture are not held as transformers holds most (one matrix [m, n] an "
            "expert, without biases); use subspace.layers=linear (its attention), or method=mezo"
        )
    if every:
        return f"{reason} (such as {next(iter(every))}): use subspace.layers=auto"
    return (
        f"{reason}, such as {next(iter(weights.tensors))}: its gradient does not follow from a layer's inputs; train "
        "linear layers, normalisations or LoRA (trainable=last_blocks), or use method=mezo"
    )


def _refuse_other_adapters(weights: Weights) -> None:
    odd = next((name for name in weights.tensors if _OTHER_ADAPTER.search(name)), None)
    if odd is not None:
        raise UserError(
            f"subspace=nodes serves plain LoRA of linear layers, and {odd} is none (DoRA, or of an embedding or of "
            "virtual tokens): use peft=lora, or method=mezo"
        )


class NodeSpace(BoundSubspace):
    """Nodes bound to a model's trained tensors, and the response of the objective to them, as far as it is known.

    Args:
        weights: what is trained.
        source: of the tensors' coordinates; nothing is drawn from it.
        nodes: by key.
        subspace: the component.
    """

    def __init__(self, weights: Weights, source: NoiseSource, nodes: dict[str, Node], subspace: Nodes) -> None:
        super().__init__(weights, source)
        self.nodes = nodes
        self.subspace = subspace
        self.names = frozenset(node.name for node in nodes.values())
        self.response: dict[str, Tensor] = {}  # node -> sum of (values' - values) / eps v^T, float32 [K, C, m]
        self.tables: dict[str, Tensor] = {}  # keys [K], columns [C], counts [K]: what the response is of
        self.parts: dict[str, Node] = {}  # by name: what is perturbed in place of the layers in it
        self.inside: dict[str, str] = {}  # node -> its part
        self.shared: bool | None = None  # whether parts have one response; None until a forward has shown it

    def moves(self, direction: Direction, name: str) -> bool:
        """Whether the tensor is a node's."""
        del direction
        return name in self.names

    def ever_moves(self, name: str) -> bool:
        """Whether the tensor is a node's."""
        return name in self.names

    def leave_out(self, which: Callable[[str], bool]) -> None:
        """Keep the tensors still whose names satisfy ``which``.

        Raises:
            UserError: nothing would move.
        """
        self.nodes = {key: node for key, node in self.nodes.items() if not which(node.name)}
        self.names = frozenset(node.name for node in self.nodes.values())
        if not self.nodes:
            raise UserError(
                "subspace=nodes moves the decoder of an encoder-decoder outside of its cross-attention, and nothing of "
                "that is trained: train it, or use method=mezo"
            )

    def use_parts(self, parts: dict[str, Node], inside: dict[str, str]) -> None:
        """Perturb parts in place of the layers in them, or no longer, where both are empty.

        Args:
            parts: by name.
            inside: key of a node -> name of its part.

        Raises:
            UserError: the setting asks for parts, and there are none.
        """
        if not parts and self.subspace.probed in ("parts", "shared"):
            raise UserError(
                f"subspace.probed={self.subspace.probed} needs blocks with a feed-forward module of one input, in "
                "which all trained matrices outside of attention lie, and there is none here: use "
                "subspace.probed=layers"
            )
        # a response that was learnt of layers (by an earlier version, or where parts did not serve) goes on with them
        is_of_layers = bool(self.response) and {key.partition("@")[0] for key in self.response} <= self.nodes.keys()
        if self.subspace.probed == "layers" or is_of_layers:
            parts, inside = {}, {}
        self.parts, self.inside = parts, inside
        alone = next((key for key, node in self.nodes.items() if node.kind == "experts" and key not in inside), None)
        if alone is not None:
            raise UserError(
                f"subspace=nodes knows the gradients of experts ({alone}) inside of their block's feed-forward part "
                "alone: use subspace.probed=auto, subspace.layers=linear (attention), or method=mezo"
            )

    def perturbed(self) -> dict[str, Node]:
        """What is perturbed: parts, and the nodes outside of them whose own output is."""
        layers = {key: node for key, node in self.nodes.items() if node.behind is None and key not in self.inside}
        return {**layers, **self.parts}

    def seen(self) -> dict[str, Node]:
        """Whose inputs a clean forward keeps; those of experts are computed once more, inside their part."""
        return {**{key: node for key, node in self.nodes.items() if node.kind != "experts"}, **self.parts}

    def response_of(self, key: str) -> str:
        """The name under which the response of a node or part is kept.

        Args:
            key: of it; where a layer runs more than once, of one of its calls (``key@1``).
        """
        return STREAM if self.shared and key.partition("@")[0] in self.parts else key

    def directions(self, step: Direction, key: str, size: int, count: int, device: torch.device) -> Tensor:
        """v of one node for a step, [count, m], rows of mean square length m.

        Args:
            step: any direction of the step.
            key: of the node, and of its call where the layer runs more than once in a forward.
            size: m.
            count: probes times positions, over all processes; row j * positions + p is of probe j and position p.
            device: where to.
        """
        # without an index: all probes of a step are drawn from one stream, and told apart by their rows
        named = Direction(step.seed, step.step)
        if self.subspace.directions == "iid":
            return sample("gaussian", key_of(named, key, role="node"), 0, count * size, device).view(count, size)
        blocks = []
        # in groups of m rows: more than m directions cannot be at right angles in m dimensions
        for start in range(0, count, size):
            rows = min(size, count - start)
            drawn = sample("gaussian", key_of(named, key, role=f"node.{start}"), 0, rows * size, "cpu")
            q, r = torch.linalg.qr(drawn.view(rows, size).T)  # [m, rows], Haar once the signs are those of r
            # rows at right angles of length sqrt(m): E[v v^T] = I, as for Gaussian rows
            blocks.append((q * r.diagonal().sign()).T * size**0.5)
        return torch.cat(blocks).to(device)

    def basis_elements(self) -> int:
        """Numbers of the response, once there is one."""
        tensors = [*self.response.values(), *self.tables.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) // 4

    # ---- saved and loaded --------------------------------------------------------------------------------------------

    def state_dict(self) -> SubspaceState:
        """The response."""
        return {"response": dict(self.response), "tables": dict(self.tables)}

    def load_state_dict(self, state: SubspaceState) -> None:
        """Take up a saved response."""
        if "response" not in state:  # a step of the journal without probes
            return
        device = {key: self.weights.tensors[node.name].device for key, node in self.nodes.items()}
        device.update({part: device[key] for key, part in self.inside.items()})
        response = state.get("response", {})
        self.response = {key: response[key].to(device.get(key.partition("@")[0], "cpu")).clone() for key in response}
        self.tables = {key: tensor.clone() for key, tensor in state.get("tables", {}).items()}
        if "counts" in self.tables and self.tables["counts"].dim() == 1:  # of an earlier version: the same for a key
            self.tables["counts"] = self.tables["counts"].unsqueeze(1).repeat(1, len(self.tables["columns"]))
        if self.response:
            self.shared = STREAM in self.response
            self.use_parts(self.parts, self.inside)
