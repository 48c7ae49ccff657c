"""ZOTrainer: the glue between `transformers.Trainer` and the five nouns; no loop of its own.

What the Trainer does differently stands here, each under its own name in `transformers`; how, in the objects that it
holds. :class:`ZOMixin` has all of it, for any Trainer: ``class ZOSFT(ZOMixin, SFTTrainer): ...``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, set_seed
from transformers.trainer_utils import has_length

from zoft.component import create
from zoft.engines._optional import settle
from zoft.engines.base import Engine
from zoft.estimators.base import Estimator
from zoft.journal import snapshot
from zoft.lm.metrics.order import every_row_in_order, longest_first, reported_in_rows_order
from zoft.lm.models.load import as_model
from zoft.lm.objectives.base import Objective
from zoft.optimizers.base import Optimizer
from zoft.step.estimate import StepEstimate
from zoft.step.method import Method
from zoft.step.update import Progress, ZOOptimizer
from zoft.subspaces.base import Subspace
from zoft.trainer import rate
from zoft.trainer.batch import Inputs, StepBatch
from zoft.trainer.beginning import RunIdentity
from zoft.trainer.binding import optimizer_of, steps_of
from zoft.trainer.checkpoint import Checkpoints
from zoft.trainer.config import as_zo_config, settle_arguments
from zoft.trainer.elsewhere import settle_forwards
from zoft.trainer.epochs import Passes, refuse_no_batch, refuse_training_rows
from zoft.trainer.foreign import by_name, has_own_loss, refuse_behind, refuse_generating, refuse_optimizers
from zoft.trainer.forward import QueryForward, make_ready
from zoft.trainer.grid import Grid
from zoft.trainer.guard import RolledBack
from zoft.trainer.journaling import RunJournal
from zoft.trainer.loss import StepLoss
from zoft.trainer.mezo import MezoRowOrder, decays
from zoft.trainer.placing import answers_when_bound, place, stay_in_place, without_wrapping
from zoft.trainer.processes import Processes, check_processes
from zoft.trainer.recommended import may_be, recommended
from zoft.trainer.response import settle_response
from zoft.trainer.stages import Stages
from zoft.trainer.stepping import RunSteps, beside, by_metrics, complete
from zoft.utils.random_state import global_random_state_kept
from zoft.weightings.base import Weighting
from zoft.weights.tensors import Weights

_Base: Any = Trainer if TYPE_CHECKING else object  # at run time the Trainer comes from the class beside the mixin


class ZOMixin(_Base):
    """Replaces the backward pass of a Trainer by zeroth-order queries.

    Args:
        model: a model, or a name or folder to load one from (float32; the class its config names, else a causal LM).
        args: a :class:`zoft.ZOConfig` or plain ``TrainingArguments``.
        estimator: name or component (default ``central``). Where none of these four and no learning rate is given, it
            is node directions (``method=zoft``) if the loss can be read position by position, which a note says.
        weighting: name or component (default ``mean``).
        optimizer: name or component (default ``sgd``).
        subspace: name or component (default ``full``).
        engine: name or component (default ``auto``).
        objective: name or component that replaces the model's own loss (default: the model's own loss).
        peft_config: a ``peft.PeftConfig``; the adapter alone is then trained.
        direction_seeds: the seed of each step's directions, for replaying a recorded run (MeZO's step seeds).
        mezo_protocol: rows in the order of MeZO's published code, and weight decay where it has it.
        *positional: everything the Trainer subclass takes, in its own order or by name.
    """

    optimizer: Any  # a ZOOptimizer, inside accelerate's wrapper once training has begun
    control: Any
    run_steps: RunSteps  # there is one as soon as there is an optimizer
    passes: Passes  # over the rows, of the training at hand

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a Trainer in front of the mixin, whose own training step would be taken."""
        super().__init_subclass__(**kwargs)
        refuse_behind(cls)

    def __init__(
        self,
        *positional: Any,
        estimator: str | Estimator | None = None,
        weighting: str | Weighting | None = None,
        optimizer: str | Optimizer | None = None,
        subspace: str | Subspace | None = None,
        engine: str | Engine | None = None,
        objective: str | Objective | None = None,
        peft_config: Any = None,
        direction_seeds: Sequence[int] | None = None,
        mezo_protocol: bool = False,
        **kwargs: Any,
    ) -> None:
        refuse_generating(type(self))
        kwargs = by_name(type(self), positional, kwargs)
        model, args = kwargs.pop("model", None), kwargs.pop("args", None)
        self.method = Method.of(subspace, estimator, weighting, optimizer)
        is_named = any(part is not None for part in (subspace, estimator, weighting, optimizer, direction_seeds))
        self.engine: Engine = create("engine", engine, "auto")
        self.engine_name = self.engine.name()  # the one that serves, once there is a session
        self.zo_objective: Objective | None = None if objective is None else create("objective", objective, "options")
        self.method.check_objective(self.zo_objective)
        self.direction_seeds = self.method.step_seeds(direction_seeds)
        self.mezo_protocol = mezo_protocol
        self.held_out: dict[str, Any] = {}  # name -> rows that the Trainer knows not of, and that results are of
        self.peak_memory_mb: Callable[[], float] | None = None
        self.last_step: StepEstimate | None = None  # what its queries found, or the journal said
        self.micro_batches: list[Inputs] = []  # those of the step at hand that the Trainer's loop has handed over
        refuse_optimizers(kwargs)
        args = copy.copy(as_zo_config(args, "zoft_run"))  # what is settled here must not reach the user's next trainer
        own_loss = has_own_loss(super().compute_loss)
        if not (is_named or mezo_protocol) and may_be(args, self.engine_name, self.zo_objective):
            other = own_loss or type(self).compute_loss is not ZOMixin.compute_loss
            with global_random_state_kept():
                model, peft_config = as_model(model, peft_config, args.seed), None
                self.method = recommended(model, self.zo_objective, args, kwargs, other) or self.method
        self.seeks_rate = args.learning_rate == "auto"
        settle_forwards(self.engine, self.method, self.zo_objective, args)
        settle_arguments(args, self.method, has_objective=objective is not None)
        with global_random_state_kept():
            model = as_model(model, peft_config, args.seed)
            stay_in_place(self.engine, model, args)
            super().__init__(model=model, args=args, **kwargs)
        self.processes = Processes(self.args.world_size, self.args.process_index, self.args.device)
        self.grid = Grid.of(self.args, self.processes, self.method.estimator)
        self.stages = Stages(self)  # by the grid
        self.journal = RunJournal(self.args, RunIdentity(self), self.processes)
        self.checkpoints = Checkpoints(self, self.journal, self.processes)
        self.step_loss = StepLoss(self, self.grid.rows)
        self.query_forward = QueryForward(self, has_own_loss=own_loss)
        make_ready(self, self.journal.identity)
        self.query_forward.keep_prefix(Weights(self.model))
        self.query_forward.narrow()
        settle_response(self)

    # ---- what it holds -----------------------------------------------------------------------------------------------

    @property
    def zo_optimizer(self) -> ZOOptimizer:
        """The optimizer underneath accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @property
    def progress(self) -> Progress:
        """Counters of the run: steps, queries, tokens, seconds."""
        return self.zo_optimizer.progress if self.optimizer is not None else Progress()

    def settle_weights(self) -> None:
        """Steps that wait for their block's next visit are written, and all weights are where they can be read."""
        if self.optimizer is not None:
            settle(self.zo_optimizer.session)

    def collated(self, rows: Sequence[Any]) -> Inputs:
        """One batch of these rows, on the device."""
        return self.stages.placed(self._prepare_inputs(self.data_collator(rows)))

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's own, without gradient synchronisation and loss scaling."""
        super().create_accelerator_and_postprocess()
        shards = self.is_deepspeed_enabled or self.is_fsdp_enabled
        check_processes(self.args, self.accelerator.num_processes, shards=shards)
        without_wrapping(self.accelerator, self.engine, self.args)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """As the Trainer's own; a model stays where it is that is offloaded, or of which a part goes to the device."""
        if not place(self.engine, model, device, self.args):
            super()._move_model_to_device(model, device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """A :class:`zoft.step.update.ZOOptimizer` over the trainable weights, with the Trainer's decay groups."""
        if self.optimizer is None:
            model = self.model if model is None else model
            self.optimizer, self.engine_name = optimizer_of(self, model, self._next_estimate)
            self.query_forward.keep_prefix(Weights(model))
            self.run_steps = steps_of(self, self.optimizer)
        return self.optimizer

    # ---- a training begins and ends ----------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's own, with a journal; True goes on from what is in ``output_dir``, a folder from that."""
        with global_random_state_kept():
            try:
                return self._train(resume_from_checkpoint, *args, **kwargs)
            except RolledBack as back:
                self.settle_weights()
                self.journal.go_back(back, self.model)
        self.optimizer = self.lr_scheduler = self.last_step = None
        return self.train(True, *args, **kwargs)  # from the earlier step on; it goes back a few times at most

    def _train(self, resume: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        set_seed(self.args.seed)  # the order of the rows comes from it, not from what the caller has drawn before
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "watch"):  # one that measures the steps (zoft.diagnostics)
                callback.watch(self)
        if self.seeks_rate:
            rate.choose(self, self.args.learning_rate, resuming=bool(resume))
        checkpoint, finished = self.journal.begin(resume), False
        try:
            self.journal.keep_first(self.model)
            self.journal.lower_rate(() if self.optimizer is None else self.zo_optimizer.param_groups)
            self.checkpoints.check_state(checkpoint)
            result = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
            finished = self.state.global_step >= self.state.max_steps
        finally:
            self.settle_weights()
            self.journal.close(finished=finished)
            if self.optimizer is not None:
                self.run_steps.stop_clock()
        return result

    def hyperparameter_search(self, hp_space: Any = None, compute_objective: Any = None, *pos: Any, **kw: Any) -> Any:
        """As the Trainer's own; its sum of metrics leaves out what each line counts (queries, tokens, seconds)."""
        return super().hyperparameter_search(hp_space, compute_objective or by_metrics, *pos, **kw)

    def _hp_search_setup(self, trial: Any) -> None:
        """As the Trainer's own; a trial may have a budget of its own."""
        super()._hp_search_setup(trial)
        if trial is not None and self.args.budget_queries is not None:
            self.args.max_steps = self.method.steps_within(self.args.budget_queries)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's own; when to log, evaluate and save is what is asked for now, not when the run began."""
        epochs = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        self.checkpoints.find_best()
        return epochs

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's own; every process starts from the weights of the first one."""
        self.progress.losses.clear()  # what a checkpoint holds of them is read in the next line
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.passes = Passes(skips=not self.args.ignore_data_skip)
        self.run_steps.start_clock()
        self.stages.share_weights()
        self.step_loss.asks_for_scaling = self.grid.rows.count > 1 or self.args.gradient_accumulation_steps > 1
        return prepared

    # ---- rows --------------------------------------------------------------------------------------------------------

    def _run_epoch(self, **given: Any) -> None:
        """As the Trainer's own; a finished run that is resumed is finished (the Trainer would take one more step)."""
        if self.run_steps.is_at_end(self.state, 0):
            self.control.should_training_stop = True
            return
        self.micro_batches = []  # a callback may have ended the last pass in the middle of a step
        super()._run_epoch(**self.passes.begin(given))

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """As the Trainer's own: ``num_batches`` micro-batches, or none."""
        samples = self.passes.next_samples(epoch_iterator, num_batches)
        return samples, self._get_num_items_in_batch(samples, device) if samples else None

    def _get_dataloader(self, *pos: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """As the Trainer's own; no row of an evaluation falls, and no training goes without rows."""
        if is_training:
            refuse_training_rows(self.args, self.train_dataset)
        with nullcontext() if is_training else every_row_in_order(self.args):
            loader = self.grid.divide(super()._get_dataloader(*pos, is_training=is_training, **kwargs), is_training)
        if is_training:
            refuse_no_batch(self.args, loader, self.train_dataset)
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As the Trainer's own, or MeZO's order."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        order = MezoRowOrder(len(rows), self.args.seed) if self.mezo_protocol and has_length(rows) else None
        return super()._get_train_sampler(train_dataset) if order is None else order

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """As the Trainer's own; an objective's rows are evaluated longest first."""
        sampler = None if self.zo_objective is None else longest_first(self.args, eval_dataset)
        return super()._get_eval_sampler(eval_dataset) if sampler is None else sampler

    def get_tp_size(self) -> int:
        """As the Trainer's own: how many processes have the same rows, which it takes into account in its sums."""
        return int(super().get_tp_size()) * self.grid.directions.count

    # ---- a step ------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Inputs, num_items_in_batch: Any = None) -> Tensor:
        """Collect micro-batches; at the step's last one query the objective, always of self.model_wrapped."""
        self.micro_batches.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batch, self.micro_batches = StepBatch(self.micro_batches, num_items_in_batch), []
        with self.query_forward.querying():
            self.last_step = self.run_steps.next(batch, self.state.global_step / max(1, self.state.max_steps))
        self.run_steps.is_at_end(self.state, 1)
        return torch.tensor(self.last_step.loss, device=self.args.device)

    def compute_loss(self, model: nn.Module, inputs: Inputs, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The objective's loss where one was given, else the Trainer's, in a query from the labelled positions only."""
        if self.zo_objective is not None:
            return self.query_forward.of_objective(model, inputs, return_outputs, of_each=bool(kwargs.get("of_each")))
        called = model if return_outputs else self.query_forward.as_called(model)
        return super().compute_loss(called, inputs, return_outputs=return_outputs, **kwargs)

    def _next_estimate(self) -> StepEstimate:
        """What the Trainer's loop lets the optimizer apply, once; the journal has it first."""
        estimate = self.last_step
        if estimate is None or estimate.is_applied:
            raise RuntimeError("optimizer.step() without a training step before it: there is nothing to apply")
        self.run_steps.hand_over(estimate, self.state.max_steps)
        self.last_step = estimate.applied()
        return estimate

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As the Trainer's own, or MeZO's."""
        if self.mezo_protocol:
            return [name for name, _ in model.named_parameters() if decays(name)]
        return list(super().get_decay_parameter_names(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the step's estimate, as far as it is known (:attr:`StepEstimate.norm`)."""
        return grad_norm if grad_norm is not None or self.last_step is None else self.last_step.norm

    def _clip_grad_norm(self, model: nn.Module) -> float | None:
        """The slope before clipping: the projected gradients are clipped already (:func:`zoft.step.estimate.clip`)."""
        return self._get_grad_norm(model)

    def floating_point_ops(self, inputs: Inputs) -> float:
        """2 N per token and query; the Trainer's own figure is 6 N (a forward and a backward pass)."""
        step = self.last_step  # none before the first step of a training, which may go on from a checkpoint
        num_queries = self.method.queries_at(max(0, self.progress.steps - 1)) if step is None else step.num_queries
        return super().floating_point_ops(inputs) / 3 * num_queries

    # ---- between steps -----------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's own, once the weights are known to be numbers."""
        step, session = self.last_step, self.zo_optimizer.session
        self.run_steps.refuse_infinite_weights(step)
        self.journal.digest(session, self.state.global_step, is_replaying=step is not None and step.from_journal)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Every line carries queries, tokens and seconds; a training line also loss, projected gradient and eps."""
        if self.optimizer is not None:
            self.run_steps.read_clock()
        complete(logs, self.progress, self.last_step, beside(self))
        super().log(logs, *args, **kwargs)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        """As the Trainer's own; the one at the start (the only one without the schedule) is not made when resuming."""
        if skip_scheduler and self.state.global_step:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler=skip_scheduler)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """As the Trainer's own; one that the journal knows is not made again."""
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if not self.is_in_train or isinstance(given, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics = self.journal.next_evaluation(self.state.global_step)
        if metrics is None:
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            return self.journal.evaluated(self.state.global_step, metrics)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's own, for evaluate and predict; a data loader draws from the global random state."""
        if answers_when_bound(self.engine, self.args):
            self.create_optimizer()
        with global_random_state_kept(), reported_in_rows_order(self, dataloader) as in_order:
            return in_order(super().evaluation_loop(dataloader, *args, **kwargs))

    def prediction_step(self, model: Any, inputs: Inputs, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The objective's predictions and labels, so that metrics are computed over options; else the Trainer's."""
        with self.query_forward.reusing_prefix():
            if self.zo_objective is None:
                return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            with torch.inference_mode(), self.compute_loss_context_manager():
                batch = self.query_forward.as_served(self._prepare_inputs(inputs))
                loss, predictions, labels = self.stages.everywhere(self.zo_objective.predict, model, batch)
        return (loss, None, None) if prediction_loss_only else (loss, predictions, labels)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's own; of a pipeline the first process gathers the model."""
        with self.stages.whole():
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's own, without pickles, and whole or not at all."""
        del model
        if trial is None:
            self.store_flos()
        target = self.checkpoints.save(Path(self._get_output_dir(trial=trial)))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))
        self.checkpoints.drop_old(target)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As the Trainer's own, without the pickle of the arguments at its end: they are JSON here."""
        self.checkpoints.save_model(Path(str(self.args.output_dir if output_dir is None else output_dir)), state_dict)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As the Trainer's own; the best model that is to be loaded at the end is saved when it is found."""
        is_best = bool(super()._determine_best_metric(metrics, trial))
        self.control.should_save |= is_best and self.args.load_best_model_at_end
        return is_best

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As the Trainer's own, where the checkpoint holds more than what is trained."""
        with snapshot.reading(Path(resume_from_checkpoint)), self.stages.refilled():
            if not self.checkpoints.load_trained(Path(resume_from_checkpoint)):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """As the Trainer's own, where the checkpoint holds more than what is trained; none but a whole one."""
        self.checkpoints.verify_best(folder := Path(str(self.state.best_model_checkpoint)))
        with snapshot.reading(folder), self.stages.refilled():
            if not self.checkpoints.load_trained(folder):
                super()._load_best_model()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As the Trainer's own, without pickles."""
        self.checkpoints.load_random_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer's own, without pickles; the schedule itself is the one of this run."""
        self.checkpoints.load_optimizer_and_schedule(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is no loss scaler."""


class ZOTrainer(ZOMixin, Trainer):
    """`transformers.Trainer` with forward passes only; its arguments, and those of :class:`ZOMixin`.

    Example:
        >>> from zoft import ZOConfig, ZOTrainer
        >>> args = ZOConfig(output_dir="runs/demo", budget_queries=40_000, learning_rate=1e-6)  # doctest: +SKIP
        >>> trainer = ZOTrainer("facebook/opt-125m", args, train_dataset=rows, estimator="central")  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """
