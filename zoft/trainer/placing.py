"""Where a model's weights lie, in training and afterwards: on the device, or where engine=offload keeps its blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from zoft.engines._blocks import blocks_of
from zoft.engines._elsewhere import Elsewhere
from zoft.engines.base import Engine
from zoft.engines.offload import Offload, place_outside, rest_in_files, stream_to_read
from zoft.lm.models.device_map import is_spread, on_device, require_run_on
from zoft.weights.tensors import Weights


def stay_in_place(engine: Engine, model: nn.Module | None, args: Any) -> None:
    """Before the Trainer is made, and anything reads all weights: those that will rest in files do so from here on.

    Args:
        engine: of the run.
        model: or None, where ``model_init`` makes it.
        args: of the Trainer, which has the run's device; one GPU is all that it may see of a model that is spread.
    """
    if isinstance(engine, Offload) and model is not None and engine.rests_in_file(args.device):
        rest_in_files(blocks_of(model), list(Weights(model).tensors), engine.folder)
    if is_spread(model):
        args._n_gpu = 1  # it is on all of them already, and the Trainer would replicate it


def place(engine: Engine, model: nn.Module, device: torch.device, args: Any) -> bool:
    """Bring an offloaded model's other weights to the device, its blocks stay where they rest; whether all is placed.

    A base that another runtime has may be shapes alone here, and its adapter is small: it stays where it is. So does a
    model that is going to be cut into a pipeline's stages.
    """
    if _is_cut(args):
        return True
    if isinstance(engine, Offload):
        place_outside(model, device)
    elif not _holds_base(engine):
        require_run_on(model, device)
    return isinstance(engine, Offload) or _holds_base(engine)


def answers_when_bound(engine: Engine, args: Any) -> bool:
    """Whether a model has forwards only once its engine is bound: it brings blocks, or other processes answer."""
    return isinstance(engine, Offload | Elsewhere) or _is_cut(args)


def to_read(engine: Engine, model: Any, device: torch.device) -> Any:
    """A model for forwards alone (evaluations, texts), in evaluation mode: where a run of this engine would have it.

    Args:
        engine: of the run.
        model: as loaded, with or without an adapter.
        device: of the forwards; a model that is spread over several devices stays where it is.

    Raises:
        UserError: the device map keeps the model on the CPU, and the device is another.
    """
    if not isinstance(engine, Offload):
        return on_device(model, device).eval()
    stream_to_read(model, engine, device)
    return model.eval()


def without_wrapping(accelerator: Any, engine: Engine, args: Any) -> None:
    """No DDP, FSDP or DeepSpeed and no loss scaler: there is no gradient to synchronise or to scale.

    Nor does accelerate move a model whose blocks rest elsewhere.
    """
    stays = {"device_placement": False} if isinstance(engine, Offload) or _is_cut(args) else {}
    if _holds_base(engine):
        accelerator.device_placement = False
    accelerator.scaler = None
    accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True, **stays)


def _holds_base(engine: Engine) -> bool:
    return isinstance(engine, Elsewhere) and engine.holds_base


def _is_cut(args: Any) -> bool:
    return bool(args.parallel == "pipeline" and args.world_size > 1)
