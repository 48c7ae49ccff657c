"""Prefix tuning through peft, started from the model's own activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zoft.errors import UserError
from zoft.lm.models.peft._positions import takes_positions
from zoft.lm.models.peft.base import Peft, task_type_of
from zoft.utils.lazy import nn


@dataclass
class Prefix(Peft):
    """Trained keys and values in front of every layer's own.

    Args:
        num_virtual_tokens: length of the prefix.
        init: activations starts from the keys and values of random real tokens (decoders), random from noise.
        layout: peft is one matrix of all layers, in front of a text whose positions count on behind it; mezo is a
            parameter for the keys and one for the values of each layer, and a text that begins at position 0
            (causal models; what ``protocol=mezo`` takes).

    References: Li & Liang 2021; activation initialisation: Malladi et al. 2023 (MeZO), Table 17 (SST-2 90.7 -> 91.9);
        MeZO's published code for its layout.
    """

    num_virtual_tokens: int = 5
    init: str = "activations"
    layout: str = "peft"

    def check(self) -> None:
        """Refuse an empty prefix, an unknown start and an unknown layout."""
        self.require(self.num_virtual_tokens >= 1, "num_virtual_tokens", "at least 1")
        self.require(self.init in ("activations", "random"), "init", "activations or random")
        self.require(self.layout in ("peft", "mezo"), "layout", "peft or mezo")

    def config(self, task_type: str) -> Any | None:
        """A ``peft.PrefixTuningConfig`` without reparameterisation (a projected prefix cannot be resumed)."""
        from peft import PrefixTuningConfig

        if self.layout == "mezo":
            from zoft.lm.models.peft._mezo_prefix import MezoPrefixConfig as PrefixTuningConfig

        return PrefixTuningConfig(task_type=task_type, num_virtual_tokens=self.num_virtual_tokens)

    def wrap(self, model: nn.Module, seed: int, revision: str | None = None) -> nn.Module:
        """The model with a prefix; from activations where the model is a decoder that returns its cache."""
        if self.layout == "mezo":
            _require_positions(model)
        cache = _real_keys_and_values(model, self.num_virtual_tokens, seed) if self.init == "activations" else None
        wrapped = super().wrap(model, seed, revision)
        if cache is not None:
            weight = wrapped.prompt_encoder["default"].embedding.weight  # type: ignore[union-attr,index]
            if weight.shape == cache.shape:
                weight.data.copy_(cache)
        if self.layout == "mezo":
            from zoft.lm.models.peft._mezo_prefix import MezoPrefix

            outer: Any = wrapped
            encoders, num_layers = outer.prompt_encoder, outer.peft_config["default"].num_layers
            encoders["default"] = MezoPrefix(encoders["default"].embedding.weight, num_layers, outer.dtype)
        return wrapped


def _require_positions(model: nn.Module) -> None:
    """Refuse a model that is no causal LM or takes no position ids: its text could not begin at 0."""
    if task_type_of(model) != "CAUSAL_LM" or not takes_positions(model):
        raise UserError(
            f"peft.layout=mezo has the text begin at position 0, and a {type(model).__name__} is "
            + ("no causal language model" if takes_positions(model) else "not told positions")
            + ": use peft.layout=peft"
        )


def _real_keys_and_values(model: Any, length: int, seed: int) -> Any | None:
    """Keys and values of random tokens as peft lays them out, [length, layers * 2 * heads * head size], or None."""
    from zoft.utils.lazy import torch

    if not hasattr(model, "generate") or getattr(model.config, "is_encoder_decoder", False):
        return None
    generator = torch.Generator().manual_seed(seed)
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(vocab, (1, length), generator=generator).to(model.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    model.train(was_training)
    if cache is None:
        return None
    pairs = [torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers]  # each [2, heads, length, size]
    return torch.stack(pairs).permute(3, 0, 1, 2, 4).reshape(length, -1)
