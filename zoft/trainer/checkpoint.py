"""The part of the trainer that writes checkpoints and loads them: whole or not at all, without pickles."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.utils import SAFE_WEIGHTS_NAME

from zoft.errors import UserError
from zoft.journal import snapshot, state
from zoft.weights.tensors import Weights

_Base: Any = Trainer if TYPE_CHECKING else object  # at run time the Trainer comes from the class beside the mixin

TRAINED, OPTIMIZER, SCHEDULER, RANDOM, STATE, ARGUMENTS = (
    "trained.safetensors",
    "optimizer.safetensors",
    "scheduler.json",
    "random.json",
    "trainer_state.json",
    "training_args.json",
)


class Checkpoints(_Base):
    """Checkpoints; mixed into :class:`zoft.trainer.trainer.ZOMixin`."""

    optimizer: Any
    lr_scheduler: Any
    _run: str | None  # identifier of the run
    lr_factor: float
    settings: Callable[[], dict[str, Any]]  # what must be the same when the run is resumed
    settle_weights: Callable[[], None]  # before weights are read or written from outside

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's own, without pickles, and whole or not at all."""
        del model
        self.settle_weights()
        if trial is None:
            self.store_flos()
        folder = Path(self._get_output_dir(trial=trial))
        target = folder / f"checkpoint-{self.state.global_step}"
        best = folder / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best == target or best.exists() or self.args.load_best_model_at_end):
            self.state.best_model_checkpoint = str(best)
        randoms = self._random_states()
        if self.args.should_save:
            self.refuse_full_disk(target)
            facts = {"run": self._run, "step": self.state.global_step, "settings": self.settings()}
            facts["lr_factor"] = self.lr_factor
            with snapshot.staged(target, facts) as staged:
                self._save_weights(staged)
                if not self.args.save_only_model:
                    (staged / OPTIMIZER).write_bytes(state.pack(self.stepper.state_dict()))
                    (staged / SCHEDULER).write_text(json.dumps(self.lr_scheduler.state_dict(), default=str))
                    (staged / RANDOM).write_text(json.dumps(randoms))
                self._export_callbacks()
                self.state.save_to_json(str(staged / STATE))
        elif self.is_distributed_loading_by_transformers:
            self.save_model(str(target), _internal_call=True)
        if self.args.world_size > 1:
            torch.distributed.barrier()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))
        if self.args.should_save and self.args.save_total_limit:
            snapshot.rotate(target, self.args.save_total_limit, {best.name})

    def _trains_a_part(self) -> bool:
        """Whether most of the model never changes, and nobody was promised a checkpoint with all of it."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        promised = self.args.save_only_model or self.args.push_to_hub or hasattr(self.model, "peft_config")
        return not promised and 2 * trained < sum(p.numel() for p in self.model.parameters())

    def _save_weights(self, folder: Path) -> None:
        """The whole model as the Trainer saves it, or the adapter, or what is trained where that is a part."""
        if not self._trains_a_part():
            self.save_model(str(folder), _internal_call=True)
            return
        (folder / TRAINED).write_bytes(state.pack(dict(Weights(self.model).tensors)))
        self.model.config.save_pretrained(folder)

    def _check_state(self, checkpoint: str | None) -> None:
        """The Trainer's own state, which it reads before anything else, is of this step."""
        file = Path(str(checkpoint)) / STATE
        if checkpoint is not None and file.is_file():
            with snapshot.reading(file):
                step, said = TrainerState.load_from_json(str(file)).global_step, snapshot.facts_of(file.parent)["step"]
                if step != said:
                    raise ValueError(f"it is of step {step}, and the checkpoint of {said}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As the Trainer's own, where the checkpoint holds more than what is trained."""
        self.settle_weights()
        with snapshot.reading(Path(resume_from_checkpoint)):
            if not self._load_trained(Path(resume_from_checkpoint)):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As the Trainer's own; the best model that is to be loaded at the end is saved when it is found."""
        is_best = bool(super()._determine_best_metric(metrics, trial))
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    def _find_best_checkpoint(self) -> None:
        """Where the best checkpoint of a resumed run lies now: the folder may have moved since it was written down."""
        step = self.state.best_global_step
        if not step:
            return
        name = f"checkpoint-{step}"
        own, noted = Path(str(self.args.output_dir)) / name, self.state.best_model_checkpoint
        here = next((one for one in (own, Path(noted or own)) if one.is_dir()), own)
        self.state.best_model_checkpoint = str(here)
        if self.args.load_best_model_at_end:
            self._verify_best(here)
        elif not here.is_dir():
            self.state.best_model_checkpoint = None

    def _verify_best(self, folder: Path) -> None:
        own = folder.parent.absolute() == Path(str(self.args.output_dir)).absolute()
        try:
            if not folder.is_dir():
                raise UserError(f"{folder} is missing")
            snapshot.verify(folder, self._run if own else None)
        except UserError as error:
            raise UserError(
                f"the best checkpoint, which trainer.load_best_model_at_end=true asks for, cannot be loaded: {error}. "
                "Put it back, or end with the last weights by trainer.load_best_model_at_end=false"
            ) from None

    def _load_best_model(self) -> None:
        """As the Trainer's own, where the checkpoint holds more than what is trained; none but a whole one."""
        folder = Path(str(self.state.best_model_checkpoint))
        self._verify_best(folder)
        self.settle_weights()
        with snapshot.reading(folder):
            if not self._load_trained(folder):
                super()._load_best_model()

    def put_back(self, step: int) -> None:
        """Put the weights of this run's checkpoint of a step back, where it is kept."""
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{step}"
        if folder.is_dir():
            self.state.best_model_checkpoint = str(folder)
            self._load_best_model()

    def _load_trained(self, folder: Path) -> bool:
        """Put the trained tensors of a checkpoint back; whether it has them in a file of their own."""
        if not (folder / TRAINED).is_file():
            return False
        kept, tensors = state.unpack((folder / TRAINED).read_bytes()), Weights(self.model).tensors
        if {n: t.shape for n, t in kept.items()} != {n: t.shape for n, t in tensors.items()}:
            raise UserError(
                f"{folder} holds {len(kept)} trained tensors, this run trains {len(tensors)} or others: resume with "
                "the same model and trainable="
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(kept[name])
        return True

    def refuse_full_disk(self, target: Path) -> None:
        """Before anything is written: what a checkpoint takes, as far as it is known, must be free."""
        tensors: Iterable[Tensor] = [*self.model.parameters(), *self.model.buffers()]
        if hasattr(self.model, "peft_config") or self._trains_a_part():
            tensors = [p for p in self.model.parameters() if p.requires_grad]
        moments = [m for kept in self.stepper.moments.values() for m in kept.values()]
        size = sum(t.numel() * t.element_size() for t in [*tensors, *moments, *self.stepper.masters.values()])
        snapshot.refuse_full_disk(target, size)

    def _export_callbacks(self) -> None:
        """What callbacks keep belongs to the saved state (as in the Trainer's own `_save_checkpoint`)."""
        for one in [*self.callback_handler.callbacks, self.control]:
            if isinstance(one, ExportableState):
                name, kept = type(one).__name__, one.state()
                if isinstance(self.state.stateful_callbacks.get(name), list):
                    self.state.stateful_callbacks[name].append(kept)
                else:
                    self.state.stateful_callbacks[name] = kept

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """What the Trainer's own writes, without the pickle of the arguments at its end: they are JSON here."""
        self.settle_weights()
        folder, first = Path(str(self.args.output_dir if output_dir is None else output_dir)), self.args.should_save
        if not first and not self.is_distributed_loading_by_transformers:
            return
        if first:
            folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
            model.save_pretrained(str(folder), state_dict=state_dict, is_main_process=first)
        elif first:
            save_file(state_dict or model.state_dict(), folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        if not first:
            return
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        (folder / ARGUMENTS).write_text(json.dumps(_public(self.args.to_sanitized_dict()), indent=1, default=str))

    def _random_states(self) -> list[dict[str, Any]]:
        """The global random states of all processes, as plain values."""
        mine = _random_state()
        if self.args.world_size == 1:
            return [mine]
        found: list[Any] = [None] * self.args.world_size
        torch.distributed.all_gather_object(found, mine)
        return found

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The global random states as they were; a process that was not there then takes the first one's."""
        if checkpoint is not None and (file := Path(checkpoint) / RANDOM).is_file():
            with snapshot.reading(file):
                kept = json.loads(file.read_text())
                _put_random_state(kept[self.args.process_index if self.args.process_index < len(kept) else 0])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The stepper's state and the schedule's position; the schedule itself is the one of this run."""
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if not (folder / OPTIMIZER).is_file():
            raise UserError(f"{folder} holds a model alone (save_only_model): nothing can be resumed from it")
        with snapshot.reading(folder / OPTIMIZER):
            self.optimizer.load_state_dict(state.unpack((folder / OPTIMIZER).read_bytes()))
        scheduler = self.lr_scheduler
        with snapshot.reading(folder / SCHEDULER):
            kept = dict(json.loads((folder / SCHEDULER).read_text()))
            for own in ("base_lrs", "lr_lambdas", "_get_lr_called_within_step"):
                kept.pop(own, None)
            if not isinstance(kept.get("last_epoch"), int):
                raise ValueError("it says no last_epoch")
            scheduler.load_state_dict({**scheduler.state_dict(), **kept})
        if isinstance(scheduler, LambdaLR):  # the next step is of this run's schedule already
            rates = [
                r * at(scheduler.last_epoch) for r, at in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            for group, rate in zip(self.stepper.param_groups, rates, strict=True):
                group["lr"] = rate

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is no loss scaler."""


# ---- plain values ----------------------------------------------------------------------------------------------------


def _random_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy.random.get_state()
    whole: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [name, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
    }
    if torch.cuda.is_available():
        whole["cuda"] = [bytes(one.tolist()).hex() for one in torch.cuda.get_rng_state_all()]
    return whole


def _put_random_state(kept: dict[str, Any]) -> None:
    version, words, gauss = kept["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = kept["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes(kept["torch"]))
    if torch.cuda.is_available() and len(kept.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_bytes(one) for one in kept["cuda"]])


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def _public(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is secret."""
    return {key: value for key, value in values.items() if "token" not in key or isinstance(value, bool | int)}
