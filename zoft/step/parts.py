"""Node gradients of layers inside a block's part, and whether parts reach the last hidden state as they are."""

from __future__ import annotations

from typing import Any

from zoft.engines.nodes import NodeSession
from zoft.errors import UserError
from zoft.estimators.nodes import Nodes
from zoft.step.positions import ObjectiveReader, expand
from zoft.subspaces._node_layers import is_adapter
from zoft.subspaces.nodes import NodeSpace
from zoft.utils.lazy import Tensor, torch


def probes_at(space: NodeSpace, estimator: Nodes, step: int) -> int:
    """How many probes a step has: a response that none has taught yet is learnt as in the first one.

    Args:
        space: with the response as far as it is known.
        estimator: of the run.
        step: number of the step, from 0.
    """
    # no label of the steps before counted, or their probes were not finite
    is_known = bool(space.tables) or estimator.feedback == "loss"
    return estimator.probes_at(step if is_known else 0)


def go_inside(session: NodeSession, e: dict[str, Tensor], seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the node gradients of the layers in each part, by the chain rule from those of its outputs.

    Args:
        session: of engine=nodes.
        e: key of a part or node, with the number of its call behind it (``key@1``) -> [P, m]; added to.
        seen: the same key -> what it saw in the clean forward, [P, n]; what experts see is added.

    Returns:
        key of experts -> the number of the expert that each of its rows belongs to, int64.

    Raises:
        UserError: a part computes its rows alone otherwise than in the whole model.
    """
    space = session.coordinates
    assert isinstance(space, NodeSpace)
    # the sums of 16-bit numbers agree to two digits
    few_bits = session.sees_few_bits or next(iter(session.weights.tensors.values())).element_size() < 4
    close = 5e-2 if few_bits else 1e-3
    experts: dict[str, Tensor] = {}
    for call in [key for key in e if key.partition("@")[0] in space.parts]:
        name, at, number = call.partition("@")
        nodes = {key: space.nodes[key] for key, part in space.inside.items() if part == name}
        is_first = name not in session.checked_parts and len(seen[call]) > 0
        session.checked_parts.update([name] if is_first else ())
        of_nodes, inputs, numbers = session.inside(space.parts[name], nodes, seen[call], e[call], looking=is_first)
        for key in inputs.keys() - numbers.keys():
            _check(name, key, inputs[key], seen.get(f"{key}{at}{number}"), close)
        e.update({f"{key}{at}{number}": of_node for key, of_node in of_nodes.items()})
        seen.update({f"{key}{at}{number}": inputs[key] for key in numbers})
        experts.update({f"{key}{at}{number}": each for key, each in numbers.items()})
    return experts


def _check(part: str, key: str, alone: Tensor, whole: Tensor | None, close: float) -> None:
    """Refuse a part whose rows alone do not give a layer in it the inputs that it has in the whole forward."""
    if whole is None or float((alone - whole).abs().max()) > close * max(1e-30, float(whole.abs().max())):
        raise UserError(
            f"subspace=nodes computes {part} position by position, and there {key} is given other values than in the "
            "whole model: use subspace.probed=layers"
        )


def refuse_uncalled(space: NodeSpace, seen: dict[str, Tensor]) -> None:
    """Refuse an adapter that changes a weight and is no layer that is called: it would stand still without a word."""
    called = {key.partition("@")[0] for key in seen}
    alone = next((key for key, node in space.nodes.items() if is_adapter(node) and key not in called), None)
    if alone is not None:
        raise UserError(
            f"subspace=nodes reads what layers are given, and {alone} is not called (an adapter of a parameter, peft's "
            "target_parameters): adapt linear layers (target_modules), or use method=mezo"
        )


def passes_down(session: NodeSession, reader: ObjectiveReader, batch: Any) -> bool | None:
    """Whether what each part that is trained gives is added unchanged to a residual stream that ends in what is read.

    None where no label of these rows counts.

    Then the response of the last hidden state to a part is the identity, up to what the blocks above it add.

    Args:
        session: of engine=nodes.
        reader: reads the last hidden state.
        batch: of a few rows; the forwards made of it are no queries.
    """
    space = session.coordinates
    assert isinstance(space, NodeSpace)
    if not space.parts or space.perturbed().keys() != space.parts.keys() or space.subspace.positions != "loss":
        return False
    part = next(iter(reader.parts(batch)))
    at = expand(reader.places(part), space)
    if not len(at.rows):
        return None
    reader.read(part)  # the first reading of a model may try what its head can be asked for, with shorter rows
    with torch.no_grad(), session.adding(space.parts, at.rows, at.columns, len(at.starts)) as verdict:
        last = reader.read(part).values
    return verdict(last)
