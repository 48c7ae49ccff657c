"""Checkpoints of a run: whole or not at all, without pickles."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.utils import SAFE_WEIGHTS_NAME

from zoft.errors import UserError
from zoft.journal import snapshot, state
from zoft.journal.snapshot import OPTIMIZER
from zoft.lm.models.names import without_asking
from zoft.lm.models.scales import has_trained_scales
from zoft.trainer.journaling import RunJournal
from zoft.trainer.processes import Processes
from zoft.trainer.protocol import HoldsObjects
from zoft.utils.random_state import put_random_state, random_state
from zoft.weights.tensors import Weights

TRAINED, SCHEDULER, RANDOM = "trained.safetensors", "scheduler.json", "random.json"
STATE, ARGUMENTS = "trainer_state.json", "training_args.json"


class Checkpoints:
    """Writes the checkpoints of a run, and reads them.

    Args:
        trainer: whose state is saved.
        journal: says what must be the same when the run is resumed.
        processes: all come to a save together.
    """

    def __init__(self, trainer: HoldsObjects, journal: RunJournal, processes: Processes) -> None:
        self.trainer, self.journal, self.processes = trainer, journal, processes

    # ---- saved -------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> Path:
        """Write the checkpoint of this step, whole or not at all; returns its folder."""
        trainer, args, state_ = self.trainer, self.trainer.args, self.trainer.state
        # engine=offload: steps may wait in memory, and files must have them
        trainer.settle_weights()
        target, best = folder / f"checkpoint-{state_.global_step}", folder / f"checkpoint-{state_.best_global_step}"
        if state_.best_global_step and (best == target or best.exists() or args.load_best_model_at_end):
            state_.best_model_checkpoint = str(best)
        # every process has random states of its own, and one of them writes all
        randoms = self.processes.gather(random_state())
        moved = {} if args.save_only_model else trainer.stages.gathered(trainer.zo_optimizer.state_dict())
        with trainer.stages.whole():
            if args.should_save:
                self.refuse_full_disk(target)
                # under another name until it is whole
                with snapshot.staged(target, self.journal.facts_at(state_.global_step)) as staged:
                    self._write(staged, randoms, moved)
            elif trainer.is_distributed_loading_by_transformers:
                trainer.save_model(str(target), _internal_call=True)
        self.processes.wait()
        return target

    def drop_old(self, target: Path) -> None:
        """Keep as many as ``save_total_limit`` says, the best one among them."""
        args, best = self.trainer.args, f"checkpoint-{self.trainer.state.best_global_step}"
        if args.should_save and args.save_total_limit:
            snapshot.rotate(target, args.save_total_limit, {best})

    def _write(self, folder: Path, randoms: list[dict[str, Any]], moved: dict[str, Any]) -> None:
        trainer = self.trainer
        self._write_weights(folder)
        # save_only_model: the weights, and nothing to resume from
        if not trainer.args.save_only_model:
            (folder / OPTIMIZER).write_bytes(state.pack(moved))
            (folder / SCHEDULER).write_text(json.dumps(trainer.lr_scheduler.state_dict(), default=str))
            (folder / RANDOM).write_text(json.dumps(randoms))
        self._export_callbacks()
        trainer.state.save_to_json(str(folder / STATE))

    def _write_weights(self, folder: Path) -> None:
        """The whole model as the Trainer saves it, or the adapter, or what is trained where that is a part."""
        model, part = self.trainer.model, self._trains_a_part()
        if not part:
            self.trainer.save_model(str(folder), _internal_call=True)
        # a saved model has the scales themselves, and not what was trained
        if part or has_trained_scales(model) or self._is_renamed(folder):
            (folder / TRAINED).write_bytes(state.pack(dict(Weights(model).tensors)))
        if part:
            model.config.save_pretrained(folder)

    def _is_renamed(self, folder: Path) -> bool:
        """Whether a saved model lacks a trained tensor's name: classes split fused experts, the Trainer reads by name.

        It would leave such a tensor as it is when it reads the file, and say so in a warning alone.
        """
        model = self.trainer.model
        if hasattr(model, "peft_config"):
            return False  # PEFT names an adapter's tensors as it reads them
        names: set[str] = set()
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                names |= set(tensors.keys())
        # a tied tensor is saved under one of its names
        saved = {id(tensor) for name, tensor in model.named_parameters(remove_duplicate=False) if name in names}
        return bool(names) and any(id(tensor) not in saved for tensor in model.parameters() if tensor.requires_grad)

    def _trains_a_part(self) -> bool:
        """Whether less than half of the model is trained, and no setting asks for checkpoints with all of it."""
        args, model = self.trainer.args, self.trainer.model
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        promised = args.save_only_model or args.push_to_hub or hasattr(model, "peft_config")
        # these are loaded outside of zoft, where the base model is not at hand
        return not promised and 2 * trained < sum(p.numel() for p in model.parameters())

    def refuse_full_disk(self, target: Path) -> None:
        """Before anything is written: what a checkpoint takes, as far as it is known, must be free."""
        model, optimizer = self.trainer.model, self.trainer.zo_optimizer
        tensors: Iterable[Tensor] = [*model.parameters(), *model.buffers()]
        if hasattr(model, "peft_config") or self._trains_a_part():
            tensors = [p for p in model.parameters() if p.requires_grad]
        # the optimizer's state beside the weights: both must fit
        moments = [m for of_tensor in optimizer.moments.values() for m in of_tensor.values()]
        size = sum(t.numel() * t.element_size() for t in [*tensors, *moments, *optimizer.masters.values()])
        snapshot.refuse_full_disk(target, size)

    def _export_callbacks(self) -> None:
        """What callbacks keep belongs to the saved state (as in the Trainer's own `_save_checkpoint`)."""
        trainer = self.trainer
        states = trainer.state.stateful_callbacks
        for one in [*trainer.callback_handler.callbacks, trainer.control]:
            if isinstance(one, ExportableState):
                name = type(one).__name__
                if isinstance(states.get(name), list):
                    states[name].append(one.state())
                else:
                    states[name] = one.state()

    def save_model(self, folder: Path, state_dict: dict[str, Any] | None = None) -> None:
        """What the Trainer's own ``_save`` writes, without the pickle of the arguments at its end: they are JSON here.

        Args:
            folder: where to.
            state_dict: the model's, where it is not as the model has it.
        """
        trainer, first = self.trainer, self.trainer.args.should_save
        trainer.settle_weights()
        if not first and not trainer.is_distributed_loading_by_transformers:
            return
        if first:
            folder.mkdir(parents=True, exist_ok=True)
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        if isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
            model.save_pretrained(str(folder), state_dict=state_dict, is_main_process=first, **without_asking(model))
        elif first:
            save_file(state_dict or model.state_dict(), folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        if not first:
            return
        tokenizer = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        (folder / ARGUMENTS).write_text(json.dumps(_public(trainer.args.to_sanitized_dict()), indent=1, default=str))

    # ---- read --------------------------------------------------------------------------------------------------------

    def check_state(self, checkpoint: Path | None) -> None:
        """The Trainer's own state, which it reads before anything else, is of this step."""
        if checkpoint is not None and (file := checkpoint / STATE).is_file():
            with snapshot.reading(file):
                step, said = TrainerState.load_from_json(str(file)).global_step, snapshot.facts_of(checkpoint)["step"]
                if step != said:
                    raise ValueError(f"it is of step {step}, and the checkpoint of {said}")

    def load_trained(self, folder: Path) -> bool:
        """Put the trained tensors of a checkpoint back; whether it has them in a file of their own."""
        self.trainer.settle_weights()
        if not (folder / TRAINED).is_file():
            return False
        saved, tensors = state.unpack((folder / TRAINED).read_bytes()), Weights(self.trainer.model).tensors
        if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in tensors.items()}:
            raise UserError(
                f"{folder} holds {len(saved)} trained tensors, this run trains {len(tensors)} or others: resume with "
                "the same model and trainable="
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(saved[name])
        return True

    def load_random_state(self, checkpoint: str | None) -> None:
        """The global random states as they were; a process that was not there then takes the first one's."""
        if checkpoint is not None and (file := Path(checkpoint) / RANDOM).is_file():
            with snapshot.reading(file):
                of_ranks, rank = json.loads(file.read_text()), self.processes.rank
                put_random_state(of_ranks[rank if rank < len(of_ranks) else 0])

    def load_optimizer_and_schedule(self, checkpoint: str | None) -> None:
        """The optimizer's state and the schedule's position; the schedule itself is the one of this run."""
        if checkpoint is None:
            return
        folder, optimizer, schedule = Path(checkpoint), self.trainer.zo_optimizer, self.trainer.lr_scheduler
        if not (folder / OPTIMIZER).is_file():
            raise UserError(f"{folder} holds a model alone (save_only_model): nothing can be resumed from it")
        with snapshot.reading(folder / OPTIMIZER):
            saved = state.unpack((folder / OPTIMIZER).read_bytes())
            optimizer.load_state_dict(self.trainer.stages.share_of(saved))
        with snapshot.reading(folder / SCHEDULER):
            saved = dict(json.loads((folder / SCHEDULER).read_text()))
            for of_this_run in ("base_lrs", "lr_lambdas", "_get_lr_called_within_step"):
                saved.pop(of_this_run, None)
            if not isinstance(saved.get("last_epoch"), int):
                raise ValueError("it says no last_epoch")
            schedule.load_state_dict({**schedule.state_dict(), **saved})
        if isinstance(schedule, LambdaLR):  # the next step is of this run's schedule already
            rates = [r * at(schedule.last_epoch) for r, at in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    # ---- the best one ------------------------------------------------------------------------------------------------

    def find_best(self) -> None:
        """Where the best checkpoint of a resumed run lies now: the folder may have moved since it was written down."""
        args, state_ = self.trainer.args, self.trainer.state
        if not state_.best_global_step:
            return
        best = Path(str(args.output_dir)) / f"checkpoint-{state_.best_global_step}"
        noted = Path(state_.best_model_checkpoint or best)
        folder = next((one for one in (best, noted) if one.is_dir()), best)
        state_.best_model_checkpoint = str(folder)
        if args.load_best_model_at_end:
            self.verify_best(folder)
        elif not folder.is_dir():
            state_.best_model_checkpoint = None

    def put_back(self, step: int) -> None:
        """Put the weights of this run's checkpoint of a step back, where it is kept."""
        folder = Path(str(self.trainer.args.output_dir)) / f"checkpoint-{step}"
        if folder.is_dir():
            self.trainer.state.best_model_checkpoint = str(folder)
            self.trainer._load_best_model()

    def verify_best(self, folder: Path) -> None:
        """Refuse a best checkpoint that is not whole, or another run's."""
        is_own = folder.parent.absolute() == Path(str(self.trainer.args.output_dir)).absolute()
        try:
            if not folder.is_dir():
                raise UserError(f"{folder} is missing")
            snapshot.verify(folder, self.journal.run if is_own else None)
        except UserError as error:
            raise UserError(
                f"the best checkpoint, which trainer.load_best_model_at_end=true asks for, cannot be loaded: {error}. "
                "Put it back, or end with the last weights by trainer.load_best_model_at_end=false"
            ) from None


def _public(values: dict[str, Any]) -> dict[str, Any]:
    """The arguments without secrets."""
    return {key: value for key, value in values.items() if "token" not in key or isinstance(value, bool | int)}
