"""The part of the trainer that knows where the weights are: on the device, or where engine=offload keeps its blocks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer

from zoft.engines._away import settle
from zoft.engines._blocks import blocks_of
from zoft.engines.base import Engine, Session
from zoft.engines.offload import Offload, place_outside, rest_in_files
from zoft.engines.server import Server
from zoft.weights.tensors import Weights

_Base: Any = Trainer if TYPE_CHECKING else object  # at run time the Trainer comes from the class beside the mixin


class Placing(_Base):
    """Which weights go to which device; mixed into :class:`zoft.trainer.trainer.ZOMixin`."""

    engine: Engine
    session: Session | None

    def _let_blocks_rest(self, model: nn.Module | None, device: torch.device) -> None:
        """Before anything reads all weights: those that will rest in files do so from the beginning."""
        if isinstance(self.engine, Offload) and model is not None and self.engine.rests_in_file(device):
            rest_in_files(blocks_of(model), list(Weights(model).tensors), self.engine.folder)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """As the Trainer's own; the blocks of an offloaded model stay where they rest."""
        if isinstance(self.engine, Offload):
            place_outside(model, device)
        elif not isinstance(self.engine, Server):  # whose base may be shapes alone, and the adapter is small
            super()._move_model_to_device(model, device)

    def _prepare_model_in_place(self) -> None:
        """No wrapping by accelerate, and no moving where the blocks rest elsewhere."""
        stays = {"device_placement": False} if isinstance(self.engine, Offload) else {}
        if isinstance(self.engine, Server):
            self.accelerator.device_placement = False
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True, **stays)

    def _share_weights(self) -> None:
        """Every process starts from the weights of the first one."""
        if self.accelerator.num_processes > 1:
            self.settle_weights()
            with torch.no_grad():
                for tensor in [*self.model.parameters(), *self.model.buffers()]:
                    torch.distributed.broadcast(tensor.data, src=0)

    def settle_weights(self) -> None:
        """Steps that wait for their block's next visit are written, and all weights are where they can be read."""
        settle(self.session)
