"""Prefix tuning as MeZO lays it out: each layer has keys and values of its own, and the text begins at 0."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from peft import PrefixTuningConfig
from peft.tuners.tuners_utils import BasePromptEncoder
from torch import Tensor, nn


@dataclass
class MezoPrefixConfig(PrefixTuningConfig):
    """peft's own, with a mark that plain peft does not know: it warns, and counts the text behind the prefix.

    Args:
        positions_from_zero: the text's first token stands at position 0, as if there were no prefix.
    """

    positions_from_zero: bool = True


class _LayerPrefix(nn.Module):
    """One layer's prefix: keys and values [P, heads * head size]."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.prefix_keys, self.prefix_values = nn.Parameter(keys), nn.Parameter(values)

    def forward(self) -> Tensor:
        """[P, 2, heads * head size]."""
        return torch.stack((self.prefix_keys, self.prefix_values), dim=1)


class MezoPrefix(BasePromptEncoder):
    """What peft asks for a prefix, put together of the layers' parameters; saved as peft saves its own.

    Args:
        flat: a prefix as peft lays it out, [P, 2 * layers * width]: of each token, layer by layer, keys and values.
        num_layers: how many.
        dtype: of the parameters.
    """

    def __init__(self, flat: Tensor, num_layers: int, dtype: torch.dtype) -> None:
        super().__init__()
        pairs = self._pairs(flat, num_layers).to(dtype)
        self.layers = nn.ModuleList(_LayerPrefix(pair[0].clone(), pair[1].clone()) for pair in pairs)

    @staticmethod
    def _pairs(flat: Tensor, num_layers: int) -> Tensor:
        """[P, 2 * layers * width] -> [layers, 2, P, width]."""
        return flat.detach().view(flat.shape[0], num_layers, 2, -1).permute(1, 2, 0, 3)

    @property
    def embedding(self) -> Any:
        """peft asks for the device of ``embedding.weight``; there is no such matrix."""
        return SimpleNamespace(weight=torch.empty(0, device=self.layers[0].prefix_keys.device))  # type: ignore[arg-type]

    def forward(self, tokens: Tensor) -> Tensor:
        """The prefix for each row, [B, P, 2 * layers * width]."""
        flat = torch.stack([layer() for layer in self.layers], dim=1).flatten(1)  # [P, L, 2, W] -> [P, 2 L W]
        return flat.unsqueeze(0).expand(tokens.shape[0], -1, -1)

    def _load_adapter_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        pairs = self._pairs(state_dict["prompt_embeddings"], len(self.layers))
        with torch.no_grad():
            for layer, (keys, values) in zip(self.layers, pairs, strict=True):
                layer.prefix_keys.copy_(keys)  # type: ignore[operator]
                layer.prefix_values.copy_(values)  # type: ignore[operator]
