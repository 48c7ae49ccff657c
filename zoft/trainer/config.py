"""ZOConfig: `transformers.TrainingArguments` plus the query budget, minus what needs a backward pass."""

from __future__ import annotations

import copy
import logging
import numbers
import os
from dataclasses import dataclass, field, fields, make_dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from zoft.errors import UserError
from zoft.step.method import Method, refuse_without_slopes
from zoft.step.shares import grid_of
from zoft.trainer.guard import FEWEST, GUARDS
from zoft.trainer.rate import start_of
from zoft.trainer.restarts import meeting
from zoft.trainer.values import require_budget, require_taken
from zoft.weights.rounding import ROUNDINGS

log = logging.getLogger(__name__)

# setting -> why it cannot be honoured; each is refused when it differs from the default
_MEANINGLESS = {
    "activation_checkpointing": "activation checkpointing saves memory of a backward pass, and there is none",
    "gradient_checkpointing": "gradient checkpointing saves memory of a backward pass, and there is none",
    "activation_checkpointing_kwargs": "there is no backward pass to checkpoint activations for",
    "gradient_checkpointing_kwargs": "there is no backward pass to checkpoint activations for",
    "neftune_noise_alpha": "NEFTune perturbs embeddings in training mode; zoft queries in evaluation mode",
    "fp16": "there is no gradient to scale: load the model in float16 (dtype=) or give bf16=True",
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"),
        "an evaluation before training would turn the weights themselves into 16 bits: give bf16=True instead",
    ),
    "fsdp": "FSDP shards gradients and optimizer states, and there are none; use torchrun instead",
    "fsdp_config": "FSDP shards gradients and optimizer states, and there are none; use torchrun instead",
    "deepspeed": "DeepSpeed shards gradients and optimizer states, and there are none",
    "optim": "`optim` names a first-order optimizer; pass optimizer= (sgd, momentum, adam) to the trainer",
    "optim_args": "`optim_args` belongs to `optim`; set the fields of the optimizer component",
    "optim_target_modules": "`optim_target_modules` belongs to first-order optimizers; choose trainable= instead",
    "adam_beta1": "set it on the optimizer: optimizer=Adam(adam_beta1=...)",
    "adam_beta2": "set it on the optimizer: optimizer=Adam(adam_beta2=...)",
    "adam_epsilon": "set it on the optimizer: optimizer=Adam(adam_epsilon=...)",
    "torch_empty_cache_steps": "there is no backward pass whose memory would have to be returned",
    "ddp_find_unused_parameters": "processes exchange losses, not gradients; DDP is not used",
    "ddp_bucket_cap_mb": "processes exchange losses, not gradients; DDP is not used",
    "ddp_broadcast_buffers": "processes exchange losses, not gradients; DDP is not used",
    "ddp_static_graph": "processes exchange losses, not gradients; DDP is not used",
    "resume_from_checkpoint": "the Trainer does not read it here: call trainer.train(resume_from_checkpoint=...)",
}
_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
_SEEDS = ("seed", "data_seed")


@dataclass
class ZOConfig(TrainingArguments):
    """Training arguments for :class:`zoft.ZOTrainer`; every `TrainingArguments` field keeps its name and meaning.

    What differs: ``max_grad_norm`` clips projected gradients (0, the default here, clips nothing), and settings that
    mean nothing without a backward pass are refused instead of ignored.

    Args:
        budget_queries: forward passes of the objective, clean ones included, after which training stops.
        learning_rate: step size; "auto" searches it before the first step, by short trainings whose queries count in
            ``budget_queries`` (a quarter of it at most); ``output_dir/auto.json`` keeps what was tried.
        max_skipped_steps: steps in a row with a non-finite loss before the run stops; their weights stay untouched.
        keep_frozen_prefix: compute hidden states below the lowest trained block once per example and keep them.
        frozen_prefix_mb: memory bound of those hidden states, MiB; those beyond it are computed again.
        narrow_last_block: compute the feed-forward part of the last block only where the loss is read from (one token
            of each row, in classification): the same numbers but for the last bits, in a third of the time where that
            block alone is trained.
        journal: write every step to ``output_dir/journal.bin``: a killed run goes on from there (docs/journal.md).
        journal_hash_steps: steps between hashes of the trained weights, by which a replay and other processes are
            checked; 0 makes none.
        guard: what to do about a step whose loss or |projected gradient| is far outside its running range: none, clip
            (the step is shortened to what the range allows), rollback (the run goes back some steps by its journal and
            on at half the learning rate, five times at most).
        guard_factor: how many times the running median, or the median distance from it, is far outside.
        guard_steps: steps that the running range is made of.
        guard_back: steps that rollback goes back.
        precision_update: how a step is written into bfloat16 and float16 weights: stochastic (small steps survive on
            average), master (a float32 copy takes them), nearest (they are lost), auto (a master for norms, biases and
            other small tensors, stochastic for the rest; nearest for MeZO's own numbers).
        parallel: what the processes of torchrun divide: data (a step's rows), directions (its points, over the same
            rows), both (a grid), pipeline (the model: each has some of its blocks, and their weights alone);
            docs/scaling.md.
        parallel_directions: processes that divide a step's points under ``parallel=both``; the others have other rows.

    Example:
        >>> ZOConfig(output_dir="runs/demo", budget_queries=2000, report_to=[]).budget_queries
        2000
    """

    budget_queries: int | None = field(
        default=None, metadata={"help": "Forward passes of the objective (clean ones too) after which training stops."}
    )
    max_skipped_steps: int = field(
        default=10, metadata={"help": "Steps in a row with a non-finite loss before the run stops."}
    )
    keep_frozen_prefix: bool = field(
        default=True,
        metadata={"help": "Keep the hidden states below the lowest trained block, computed once per example."},
    )
    frozen_prefix_mb: int = field(default=2048, metadata={"help": "Memory bound of the kept hidden states, MiB."})
    narrow_last_block: bool = field(
        default=False,
        metadata={"help": "Compute the last block's feed-forward part only at the positions that the loss reads."},
    )
    journal: bool = field(default=True, metadata={"help": "Write a journal of every step to output_dir/journal.bin."})
    journal_hash_steps: int = field(
        default=1000, metadata={"help": "Steps between hashes of the trained weights in the journal; 0: none."}
    )
    guard: str = field(
        default="none",
        metadata={"help": "What to do about a step far outside the running range: none, clip, rollback."},
    )
    guard_factor: float = field(default=10.0, metadata={"help": "How many times the running median is far outside."})
    guard_steps: int = field(default=100, metadata={"help": "Steps of the running range."})
    guard_back: int = field(default=20, metadata={"help": "Steps that guard=rollback goes back."})
    precision_update: str = field(
        default="auto", metadata={"help": "Updates of 16-bit weights: auto, stochastic, master or nearest."}
    )
    parallel: str = field(
        default="data",
        metadata={"help": "What processes divide: a step's rows (data), its points (directions), both, or the model."},
    )
    parallel_directions: int = field(
        default=0, metadata={"help": "With parallel=both: processes that divide a step's points; the others, its rows."}
    )
    learning_rate: Any = field(default=1e-6, metadata={"help": "Step size of the optimizer (MeZO's 1e-6)."})
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Schedule of the learning rate; constant as in MeZO."}
    )
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "Clip each projected gradient to +- this; 0 clips nothing."}
    )

    def __post_init__(self) -> None:
        _refuse_meaningless(self)
        _refuse_numbers(self)
        if isinstance(self.learning_rate, str) and self.learning_rate != "auto":
            raise UserError(f'learning_rate must be a number or "auto", got {self.learning_rate!r}')
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # without it, each process that torchrun started would train by itself
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and not PartialState._shared_state:
            PartialState(cpu=self.use_cpu, **meeting(self.ddp_timeout))
        super().__post_init__()
        if self.budget_queries is not None:
            require_budget(self.budget_queries)
        if self.precision_update not in ROUNDINGS:
            raise UserError(f"precision_update must be one of {', '.join(ROUNDINGS)}, got {self.precision_update!r}")
        self._check_guard()
        if self.budget_queries is not None and self.max_steps > 0:
            raise UserError("give budget_queries or max_steps, not both: the budget decides when training stops")

    def _check_guard(self) -> None:
        """Refuse settings of the guard that cannot be."""
        if self.guard not in GUARDS:
            raise UserError(f"guard must be one of {', '.join(GUARDS)}, got {self.guard!r}")
        if self.guard_factor <= 1:
            raise UserError(f"guard_factor must be larger than 1, got {self.guard_factor}")
        if self.guard_steps < FEWEST:
            raise UserError(f"guard_steps must be at least {FEWEST}, got {self.guard_steps}")
        if self.guard == "rollback" and not self.journal:
            raise UserError("guard=rollback goes back by the journal: leave journal=true")


def _refuse_meaningless(args: TrainingArguments, *, but: tuple[str, ...] = ()) -> None:
    """What differs from the default of the arguments' own class was chosen, and cannot be honoured."""
    defaults = {f.name: f.default for f in fields(args)}
    for name, why in _MEANINGLESS.items():
        value = getattr(args, name, None)
        if name in defaults and name not in but and value != defaults[name] and not _is_off(value):
            shown = str(value.value) if isinstance(value, Enum) else value  # `optim`, once it has been read
            raise UserError(f"{name}={shown!r} cannot be used with zeroth-order training: {why}")


def _refuse_numbers(args: TrainingArguments) -> None:
    """What would be taken for something else, or end in a traceback in the middle of a run."""
    require_taken(vars(args))
    for name in _SEEDS:
        value: Any = getattr(args, name)
        if (name, value) != ("data_seed", None) and not (
            isinstance(value, numbers.Integral) and 0 <= int(value) < 2**32
        ):
            raise UserError(f"{name} must be 0 or more and below 2**32 (numpy takes no more), got {value!r}")


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})  # a number is a choice, 0 too


@lru_cache
def zo_config(cls: type) -> type:
    """A config class with zoft's fields and defaults: what an SFTConfig or DPOConfig of TRL becomes for a `ZOMixin`.

    What the class switches on for a backward pass (checkpointing) is off in it, and its 16-bit autocast is a choice.

    Args:
        cls: ``TrainingArguments`` or a dataclass that inherits from it.

    Returns:
        The class ``ZO<name>``, which takes the fields of both: ``zo_config(SFTConfig)(budget_queries=200, ...)``.

    Raises:
        UserError: a class of another kind.

    Example:
        >>> zo_config(TrainingArguments)(output_dir="out", budget_queries=8, report_to=[]).learning_rate
        1e-06
    """
    if not (isinstance(cls, type) and issubclass(cls, TrainingArguments)):
        raise UserError(f"zo_config takes a class of training arguments, e.g. trl.SFTConfig, got {cls!r}")
    if issubclass(cls, ZOConfig):
        return cls
    if cls is TrainingArguments:
        return ZOConfig
    known: Any = cls
    names, stock = {f.name for f in fields(known)}, {f.name: f for f in fields(TrainingArguments)}
    own: list[Any] = [  # defaults of the class that are not transformers', which ZOConfig's would replace
        (f.name, f.type, field(default=f.default, default_factory=f.default_factory, metadata=f.metadata))
        for f in fields(known)
        if f.name in stock and f.name not in (*ZOConfig.__annotations__, *_CHECKPOINTING, "bf16")
        if (f.default, f.default_factory) != (stock[f.name].default, stock[f.name].default_factory)
    ]
    own += [(name, bool, field(default=False)) for name in (*_CHECKPOINTING, "bf16") if name in names]
    # no module has the class by its name: it is pickled by what it was made of
    pickled = {"__reduce__": lambda self: (_unpickled, (cls, vars(self)))}
    return make_dataclass(f"ZO{cls.__name__}", own, bases=(ZOConfig, cls), kw_only=True, namespace=pickled)


def _unpickled(cls: type, values: dict[str, Any]) -> Any:
    args: Any = object.__new__(zo_config(cls))
    vars(args).update(values)
    return args


def as_zo_config(args: TrainingArguments | None, default_output_dir: str) -> Any:
    """Arguments with zoft's fields: as they are, a plain ``TrainingArguments`` converted, another subclass completed.

    A subclass that knows nothing of zoft (TRL's ``SFTConfig``, say) keeps its type and fields; what it sets by default
    for a backward pass (checkpointing, a gradient norm of 1) is switched off and said.
    """
    if args is None:
        return ZOConfig(output_dir=default_output_dir, report_to=[])
    if isinstance(args, ZOConfig):
        return args
    if type(args) is TrainingArguments:
        stock = {f.name: f.default for f in fields(TrainingArguments)}
        given = {f.name: getattr(args, f.name) for f in fields(TrainingArguments) if f.init}
        left_out = ("learning_rate", "lr_scheduler_type", "max_grad_norm")  # the stock default is not a choice
        replaced = [name for name in left_out if given[name] == stock[name]]
        converted = ZOConfig(**{name: value for name, value in given.items() if name not in replaced})
        if replaced:
            values = ", ".join(f"{name}={ZOConfig.__dataclass_fields__[name].default}" for name in replaced)
            log.warning(
                "TrainingArguments left at their defaults are zoft's here: %s (ZOConfig has these, and node directions "
                "a rate of their own)",
                values,
            )
        return converted
    _refuse_meaningless(args, but=(*_CHECKPOINTING, *(f"{name}_kwargs" for name in _CHECKPOINTING)))
    _refuse_numbers(args)
    args = copy.copy(args)  # the user's own stay as they are
    for field_ in fields(ZOConfig):
        if not hasattr(args, field_.name):
            setattr(args, field_.name, field_.default)
    for name in _CHECKPOINTING:
        if getattr(args, name, False):
            log.warning("%s is switched off: there is no backward pass", name)
            setattr(args, name, False)
    if args.max_grad_norm == 1.0:
        log.warning("max_grad_norm=1.0, the default, is switched off: it would clip projected gradients (see ZOConfig)")
        args.max_grad_norm = 0.0
    return args


def settle_arguments(args: Any, method: Method, *, has_objective: bool) -> None:
    """Settings that belong together, in one place: learning rate, decay, budget, columns; ``args`` is changed.

    Args:
        args: with zoft's fields.
        method: what is trained with.
        has_objective: whether another loss than the model's own is trained on.

    Raises:
        UserError: two values for one setting, or one that would be ignored.
    """
    optimizer, estimator = method.optimizer, method.estimator
    for name in ("learning_rate", "weight_decay"):
        chosen, given = getattr(optimizer, name), getattr(args, name)
        if chosen is None or given == "auto":
            continue
        if given not in (type(args).__dataclass_fields__[name].default, chosen):
            raise UserError(f"two values for {name}: {given} in the arguments and {chosen} on the optimizer")
        setattr(args, name, chosen)
    if args.learning_rate == "auto":
        args.learning_rate = start_of(optimizer)
    elif optimizer.scale_with_directions:
        args.learning_rate *= estimator.num_directions
    refuse_without_slopes(estimator, args.max_grad_norm, args.guard)
    grid_of(args.parallel, args.parallel_directions, args.world_size, estimator)
    queries = getattr(args, "budget_queries", None)
    if queries is not None and args.max_steps <= 0:
        args.max_steps = method.steps_within(queries)
    if has_objective:
        args.remove_unused_columns = False  # the objective reads columns that the model's forward does not name
