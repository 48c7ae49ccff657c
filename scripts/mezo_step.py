"""MeZO's published step, written anew from its description: the baseline of bench_step.py.

What it does, and why it is slow: one sequence per answer option, padded to the longest; logits at every position; four
passes over the weights per direction, each drawing all of z again with ``torch.normal`` and replacing every tensor by
a new one. Three things are kinder here than in the published code, so that the comparison is about the step alone: the
forward runs in today's transformers (fused attention), builds no cache of keys and values, and may be given positions
(without them the loss of a rotary model with a prefix depends on how far its rows happen to be padded).

References: Malladi et al. 2023 (MeZO), Algorithms 1 and 2; the published classification loss over answer options.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

UNDECAYED = ("bias", "layer_norm", "layernorm")


def option_loss(model: nn.Module, batch: dict[str, Tensor], num_options: int = 2) -> Tensor:
    """Cross-entropy over each example's options, scored by the mean log-probability of the option's tokens.

    Args:
        model: a causal language model.
        batch: one row an option, left-padded: ``input_ids`` and ``attention_mask`` [R, T], ``option_len`` and
            ``labels`` [R] (the gold index, on every row of an example); perhaps ``position_ids`` [R, T].
        num_options: rows per example.
    """
    ids, lengths = batch["input_ids"], batch["option_len"]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    logits = model(**inputs, use_cache=False).logits  # [R, T, V]
    log_probs = torch.log_softmax(logits[:, :-1], dim=-1)  # of every position, though only the options' count
    chosen = log_probs.gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)  # [R, T - 1]
    from_the_end = torch.arange(chosen.shape[1], 0, -1, device=ids.device)
    inside = from_the_end <= lengths.unsqueeze(1)
    scores = (chosen * inside).sum(1) / lengths
    return torch.nn.functional.cross_entropy(scores.view(-1, num_options), batch["labels"][::num_options])


class MezoStep:
    """MeZO on whatever is trainable in ``model``.

    Args:
        model: its weights are replaced, tensor by tensor.
        learning_rate: of plain SGD.
        eps: finite-difference radius.
        seeds: of the directions, one after the other; random ones when left out.
        weight_decay: added to the gradient of every tensor but biases and layer norms; computed also where it is 0.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        eps: float,
        seeds: Iterator[int] | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        self.model = model
        self.learning_rate, self.eps, self.weight_decay = learning_rate, eps, weight_decay
        self.tensors = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        draw = random.Random(0)
        self.seeds = seeds or iter(lambda: draw.randrange(10**9), -1)

    def step(self, batch: dict[str, Tensor], num_directions: int = 1) -> float:
        """One step; more directions are as many one-direction estimates, averaged. Answers the loss at +eps z."""
        estimates, loss_plus = [], 0.0
        for _ in range(num_directions):
            seed = next(self.seeds)
            self.perturb(seed, 1)
            loss_plus = self.loss(batch)
            self.perturb(seed, -2)
            loss_minus = self.loss(batch)
            self.perturb(seed, 1)
            estimates.append((seed, (loss_plus - loss_minus) / (2 * self.eps)))
        for seed, projected_grad in estimates:
            self.update(seed, projected_grad, self.learning_rate / num_directions)
        return loss_plus

    def loss(self, batch: dict[str, Tensor]) -> float:
        """The loss at the weights as they are."""
        with torch.inference_mode():
            return float(option_loss(self.model, batch))

    def perturb(self, seed: int, scale: float) -> None:
        """theta <- theta + scale eps z."""
        torch.manual_seed(seed)
        for _, tensor in self.tensors:
            z = self._normal(tensor)
            tensor.data = tensor.data + scale * z * self.eps

    def update(self, seed: int, projected_grad: float, rate: float) -> None:
        """theta <- theta - rate (g z + weight_decay theta)."""
        torch.manual_seed(seed)
        for name, tensor in self.tensors:
            z = self._normal(tensor)
            if any(word in name for word in UNDECAYED):
                tensor.data = tensor.data - rate * (projected_grad * z)
            else:
                tensor.data = tensor.data - rate * (projected_grad * z + self.weight_decay * tensor.data)

    def _normal(self, tensor: Any) -> Tensor:
        return torch.normal(mean=0, std=1, size=tensor.shape, device=tensor.device, dtype=tensor.dtype)
