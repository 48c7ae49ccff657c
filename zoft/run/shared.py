"""What runs in one process share, one behind the other: rows, their hidden states, and a model that is loaded once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zoft.utils.lazy import Tensor, torch

if TYPE_CHECKING:
    from zoft.config.schema import ZoftConfig
    from zoft.engines._frozen_prefix import FrozenPrefix
    from zoft.trainer.trainer import ZOTrainer


_HERE = ("auto", "in_place", "layerwise", "side_path", "forward_mode", "nodes")
_MOST = 1 << 31  # bytes of trained weights that are kept as they were loaded


@dataclass
class Shared:
    """What a process keeps from cell to cell: a model, a task's rows, their hidden states below the trained blocks."""

    key: str = ""
    tokenizer: Any = None
    rows: dict[str, list[Any]] = field(default_factory=dict)
    objective: Any = None  # what objective=auto is for these rows
    prefixes: dict[str, FrozenPrefix] = field(default_factory=dict)
    models: dict[str, tuple[Any, dict[str, Tensor]]] = field(default_factory=dict)
    """The last one: the model that was trained, and what of its own weights was, as it was loaded."""
    base_mb: float | None = None

    def held_before(self, base_mb: float) -> float:
        """What the process held before it loaded its first model, MiB."""
        self.base_mb = base_mb if self.base_mb is None else self.base_mb
        return self.base_mb

    def of(self, cfg: ZoftConfig, splits: Any = None) -> tuple[Any, dict[str, list[Any]]]:
        """(tokenizer, rows) of a run; its rows, where they have been read already, are ``splits``."""
        from zoft.run.build import load_rows

        key = repr((cfg.task, cfg.model, cfg.objective, cfg.estimator.noise))  # MeZO's own noise: its own tokens too
        if key != self.key:
            self.prefixes.clear()
            self.tokenizer, self.rows = load_rows(cfg, splits)
            self.key, self.objective = key, cfg.objective
        cfg.settle(self.objective)
        return self.tokenizer, self.rows

    def model(self, cfg: ZoftConfig) -> Any:
        """The model of a run as it was loaded: the last cell's with its trained weights put back, where that is one.

        Below an adapter it is the base, from which the last cell's adapter is taken. What else a run adds to a model
        goes with it: one with a fresh head, autocast, codes or compiled parts is loaded anew, as is one that is spread,
        offloaded or somewhere else. So is one whose trained weights are more than 2 GiB: a copy of them stays in
        memory.
        """
        from zoft.lm import formats
        from zoft.lm.models.peft.base import unwrapped
        from zoft.run.build import load_fitting
        from zoft.weights.tensors import Weights

        kind, adapter = formats.model_kind(cfg.task), cfg.peft.name() != "none"
        keeps = kind != "classifier" and (not adapter or cfg.trainable.name() in ("auto", "adapter"))
        keeps = keeps and cfg.engine.name() in _HERE and not (cfg.model.quantization or cfg.model.device_map)
        if not keeps or any(cfg.trainer.get(name) for name in ("bf16", "fp16", "torch_compile")):
            self.models.clear()
            return load_fitting(cfg, self.tokenizer, self.rows)
        layout = ("below an adapter",) if adapter else (cfg.trainable, cfg.subspace.moves_outputs)
        key = repr((cfg.model, kind, *layout))
        last, loaded = self.models.pop(key, (None, {}))
        self.models.clear()  # one at a time: two may not fit
        if adapter:
            base = None if last is None else unwrapped(last)
            model = load_fitting(cfg, self.tokenizer, self.rows, base)
        elif last is None:
            model = load_fitting(cfg, self.tokenizer, self.rows)
            tensors = Weights(model).tensors
            if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > _MOST:
                return model
            loaded = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        else:
            model = last
            with torch.no_grad():
                for name, tensor in Weights(model).tensors.items():
                    tensor.copy_(loaded[name])
        self.models[key] = model, loaded
        return model

    def prefix(self, trainer: ZOTrainer) -> None:
        """Fill the trainer's hidden states, with those of an earlier cell where the same blocks are frozen."""
        prefix = trainer.query_forward.frozen_prefix
        if prefix is None:
            return
        key = f"{prefix.first} {trainer.args.bf16} {trainer.args.fp16}"
        if key in self.prefixes:
            prefix.share(self.prefixes[key])
        else:
            for _ in trainer.query_forward.fill_prefix(*self.rows.values()):
                pass
            if prefix.usable:
                self.prefixes[key] = prefix
