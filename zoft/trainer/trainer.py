"""ZOTrainer: the glue between `transformers.Trainer` and the five nouns; no loop of its own.

The overrides live in :class:`ZOMixin`, so that any Trainer subclass becomes a zeroth-order one:
``class ZOSFT(ZOMixin, SFTTrainer): ...``.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from transformers import Trainer, set_seed
from transformers.trainer_utils import has_length

from zoft.component import create
from zoft.engines._frozen_prefix import FrozenPrefix
from zoft.engines._lockstep import sequential
from zoft.engines.base import Engine, Session
from zoft.engines.nodes import NodeSession
from zoft.errors import NonFiniteLossError, UserError
from zoft.estimators._anchor import anchor_batches
from zoft.estimators.base import Estimator, scheduled
from zoft.estimators.nodes import Nodes
from zoft.lm.data.packing import one_of_each_size
from zoft.lm.data.rows import examples_of, groups_of, of_lengths
from zoft.lm.logits.head import narrowed
from zoft.lm.logits.own_loss import is_known, own_loss
from zoft.lm.logits.packing import serves
from zoft.lm.logits.support import no_trials
from zoft.lm.metrics.order import LongestFirst, in_rows_order, lengths_of, metric_in_rows_order, order_of
from zoft.lm.models.agreement import align
from zoft.lm.models.peft._positions import count_by_mask
from zoft.lm.models.quantized import is_quantized
from zoft.lm.objectives.base import Objective
from zoft.noise.direction import step_seed
from zoft.optimizers.base import Optimizer
from zoft.step.directions import StepDirections
from zoft.step.estimate import StepEstimate, clip
from zoft.step.method import NOTHING_TO_CLIP, Method
from zoft.step.nodes import NodeQueries
from zoft.step.progress import Progress
from zoft.step.query import StepQueries
from zoft.step.update import ZOOptimizer, decay_groups
from zoft.subspaces.base import Subspace
from zoft.trainer.batch import Inputs, StepBatch
from zoft.trainer.batch_splitter import BatchSplitter
from zoft.trainer.checkpoint import Checkpoints
from zoft.trainer.config import as_zo_config
from zoft.trainer.elsewhere import AskedElsewhere
from zoft.trainer.epochs import WholeSteps
from zoft.trainer.foreign import by_name, refuse_generating
from zoft.trainer.guard import RolledBack, guard
from zoft.trainer.journaling import Journaled
from zoft.trainer.loss import LossAveraging, with_float32_losses
from zoft.trainer.mezo import MezoRowOrder, decays
from zoft.trainer.narrow import NarrowLastBlock
from zoft.trainer.placing import Placing
from zoft.trainer.readout import TrainerReader
from zoft.utils.random_state import global_random_state_kept
from zoft.weightings.base import Weighting
from zoft.weights.rounding import Rounding
from zoft.weights.tensors import Weights

log = logging.getLogger(__name__)


class ZOMixin(Journaled, Checkpoints, Placing, WholeSteps, AskedElsewhere, LossAveraging, NarrowLastBlock):
    """Replaces the backward pass of a Trainer by zeroth-order queries.

    Args:
        model: a model, or a name or folder to load one from (float32; the class its config names, else a causal LM).
        args: a :class:`zoft.ZOConfig` or plain ``TrainingArguments``.
        estimator: name or component (default ``central``).
        weighting: name or component (default ``mean``).
        optimizer: name or component (default ``sgd``).
        subspace: name or component (default ``full``).
        engine: name or component (default ``auto``).
        objective: name or component that replaces the model's own loss (default: the model's own loss).
        peft_config: a ``peft.PeftConfig``; the adapter alone is then trained.
        direction_seeds: the seed of each step's directions, for replaying a recorded run (MeZO's step seeds).
        mezo_protocol: rows in the order of MeZO's published code, and weight decay where it has it.
        *positional: what the Trainer subclass takes, in its own order.
        **kwargs: everything the Trainer subclass takes.
    """

    optimizer: Any  # a ZOOptimizer, inside accelerate's wrapper once training has begun
    compute_metrics: Any

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
        self.engine: Engine = create("engine", engine, "auto")
        self.objective: Objective | None = None if objective is None else create("objective", objective, "options")
        self.direction_seeds = None if direction_seeds is None else [int(seed) for seed in direction_seeds]
        chosen = self.method.subspace
        if direction_seeds is not None and (chosen.keeps_choices or hasattr(chosen, "interval")):
            raise UserError(
                f"direction_seeds gives every step a seed of its own, and subspace={chosen.name()} keeps "
                "what the seed chose for several steps: use subspace=full"
            )
        self.mezo_protocol = mezo_protocol
        self.held_out: dict[str, Any] = {}
        self.session: Session | None = None
        self.engine_name = self.engine.name()  # the one that serves, once there is a session
        self.frozen_prefix: FrozenPrefix | None = None
        self.queries: StepQueries | None = None
        self.last_batch: StepBatch | None = None  # the rows of the last step
        self.last_step: StepEstimate | None = None  # what its queries found, or the journal said
        self.peak_memory_mb: Callable[[], float] | None = None
        self._began: float | None = None  # on this process's clock, as if earlier sessions had been part of this one
        self._has_probed_sizes = False
        self._micro_batches: list[Inputs] = []  # of the step that is being collected
        self._waiting: list[Inputs] = []
        for name in ("optimizers", "optimizer_cls_and_kwargs"):
            if kwargs.get(name) not in (None, (None, None)):
                raise UserError(f"{name}= is for first-order optimizers: pass optimizer= (sgd, momentum, adam)")
        args = copy.copy(as_zo_config(args, "zoft_run"))  # what is settled here must not reach the user's next trainer
        self._settle(args)
        self._settle_elsewhere(args)
        with global_random_state_kept():
            model = _as_model(model, peft_config, args.seed)
            self._let_blocks_rest(model, args.device)
            super().__init__(model=model, args=args, **kwargs)
        align(self.model, self.processing_class)  # before an evaluation too, not only when training begins
        if self.objective is not None:
            self.model_accepts_loss_kwargs = False
        count_by_mask(self.model)
        if is_quantized(self.model):
            self.frozen_fingerprint()  # before the first forward, which stores the same numbers otherwise
        weights = Weights(self.model)
        if self.method.estimator.radius:
            weights.check_eps(self.method.estimator.radius)
        self._keep_frozen_prefix(weights)
        self._narrow(chosen)

    # ---- settings ----------------------------------------------------------------------------------------------------

    def _settle(self, args: Any) -> None:
        """Settings that belong together, in one place: learning rate, decay, budget, columns."""
        for name in ("learning_rate", "weight_decay"):
            chosen, given = getattr(self.method.optimizer, name), getattr(args, name)
            if chosen is None:
                continue
            if given not in (type(args).__dataclass_fields__[name].default, chosen):
                raise UserError(f"two values for {name}: {given} in the arguments and {chosen} on the optimizer")
            setattr(args, name, chosen)
        if self.method.optimizer.scale_with_directions:
            args.learning_rate *= self.method.estimator.num_directions
        if args.max_grad_norm and (self.method.estimator.backpropagates or isinstance(self.method.estimator, Nodes)):
            raise UserError(NOTHING_TO_CLIP.format(self.method.estimator.name()))
        queries = getattr(args, "budget_queries", None)
        if queries is not None and args.max_steps <= 0:
            args.max_steps = self.method.steps_within(queries)
        args.remove_unused_columns &= self.objective is None  # it reads columns that the model's forward does not name

    def _keep_frozen_prefix(self, weights: Weights) -> None:
        """Find what lies below the trained weights, anew when ``model_init`` has made another model."""
        if not self.args.keep_frozen_prefix or self.args.torch_compile:
            return
        if self.objective is not None and self.objective.generates:  # with a cache: no call has whole rows
            return
        if self.frozen_prefix is None or self.frozen_prefix.model is not self.model:
            self.frozen_prefix = FrozenPrefix.of(self.model, weights, self.args.frozen_prefix_mb)

    def create_accelerator_and_postprocess(self) -> None:
        """No DDP, FSDP or DeepSpeed wrapping and no loss scaler: there is no gradient to synchronise or to scale."""
        super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise UserError("DeepSpeed and FSDP shard gradients, and there are none: start the run with plain torchrun")
        if self.args.n_gpu > 1:
            raise UserError(
                "one process sees several GPUs: set CUDA_VISIBLE_DEVICES, or start one process a GPU with torchrun"
            )
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != self.accelerator.num_processes:
            raise UserError(
                f"torchrun started {started} processes, the arguments know of {self.accelerator.num_processes}: "
                "give use_cpu=True where there is no accelerator, and make the arguments after torchrun has started"
            )
        if self.args.guard == "rollback" and started > 1:
            raise UserError(
                "guard=rollback goes back in one process: start the run without torchrun, or use guard=clip"
            )
        self.accelerator.scaler = None
        self._prepare_model_in_place()

    # ---- training ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's own, with a journal; the global torch, numpy and Python random states are left as they were.

        Args:
            resume_from_checkpoint: True goes on from the newest whole checkpoint and the journal in ``output_dir``; a
                folder, from that checkpoint.
            *args: as the Trainer's.
            **kwargs: as the Trainer's.
        """
        with global_random_state_kept():
            try:
                return self._train(resume_from_checkpoint, *args, **kwargs)
            except RolledBack as back:
                self._go_back(back)
        return self.train(True, *args, **kwargs)  # from the earlier step on; it goes back a few times at most

    def _train(self, resume: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        set_seed(self.args.seed)  # the order of the rows comes from it, not from what the caller has drawn before
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "watch"):  # one that measures the steps (zoft.diagnostics)
                callback.watch(self)
        checkpoint, finished = self._begin_journal(resume), False
        self._check_state(checkpoint)
        try:
            trained = super().train(checkpoint, *args, **kwargs)
            finished = self.state.global_step >= self.state.max_steps
        finally:
            self.settle_weights()
            self._end_journal(finished=finished)
        return trained

    def _guarded(self, estimate: StepEstimate) -> StepEstimate:
        """What `guard` makes of a step far outside the running range; a step inside it becomes part of the range."""
        args, progress = self.args, self.progress
        if args.guard == "none":
            return estimate
        found = guard(estimate, progress.recent, args.guard_factor)
        if found.outlier is None:
            self._remember(found)
            return found
        if args.guard == "rollback":
            raise RolledBack(max(0, progress.steps - 1 - args.guard_back), f"step {progress.steps}: {found.outlier}")
        progress.num_guarded += 1
        said = "step %d: %s; the step is shortened to %.2g of its length"
        log.warning(said, progress.steps, found.outlier, found.share)
        return found

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's own, once the weights are known to be numbers."""
        self._refuse_infinite_weights()
        self._journal_digest()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's own, for evaluate and predict; a data loader draws from the global random state."""
        with global_random_state_kept(), self._told_in_rows_order(dataloader) as in_order:
            return in_order(super().evaluation_loop(dataloader, *args, **kwargs))

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's own; when to log, evaluate and save is what is asked for now, not when the run began."""
        epochs = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        self._find_best_checkpoint()
        return epochs

    def _run_epoch(self, **given: Any) -> None:
        """As the Trainer's own; a finished run that is resumed is finished (the Trainer would take one more step)."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        self._run_pass(**given)

    def fill_frozen_prefix(self, *datasets: Sequence[Any], group: int = 16) -> Iterator[int]:
        """Compute the hidden states below the lowest trained block for whole datasets ahead of time.

        Rows of equal length go through together, in an order that depends on the data alone, so the kept states are
        the same bits in a resumed run. Yields the number of rows done so far; nothing where there is nothing to keep.

        Args:
            *datasets: rows that the collator takes.
            group: rows computed together.
        """
        if self.frozen_prefix is None or self.objective is None:
            return
        by_length: dict[int, list[Any]] = {}
        for row in (row for rows in datasets for row in rows):
            by_length.setdefault(self.data_collator([row])["input_ids"].shape[1], []).append(row)
        done = 0
        self.model.eval()
        for rows in (by_length[length] for length in sorted(by_length)):
            for start in range(0, len(rows), group):
                batch = self.collated(rows[start : start + group])
                with torch.no_grad(), self.compute_loss_context_manager(), no_trials():  # one call, of this batch
                    self.frozen_prefix.fill(functools.partial(self.compute_loss, self.model, batch))
                done += len(rows[start : start + group])
                yield done

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """A :class:`zoft.step.update.ZOOptimizer` over the trainable weights, with the Trainer's decay groups."""
        if self.optimizer is None:
            model = self.model if model is None else model
            weights = Weights(model)
            estimator = self.method.estimator
            coordinates = self.method.bind(weights)
            engine = self.engine.choose(estimator, coordinates, model)
            self.engine_name = engine.name()
            self.session = engine.bind(model, coordinates, with_float32_losses(self._objective_of_batch))
            self._keep_frozen_prefix(weights)
            groups = decay_groups(weights, self.get_decay_parameter_names(model), self.args.weight_decay)
            rounding = Rounding.chosen(self.args.precision_update, self.args.seed, estimator.noise)
            rate, rule = self.args.learning_rate, self.method.optimizer
            self.optimizer = ZOOptimizer(groups, rule, self.session, rate, rounding, self._estimate_to_apply)
            self.queries = self._queries(self.optimizer)
        return self.optimizer

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Every process starts from the weights of the first one; DDP, which would do this, is not used."""
        self.progress.losses.clear()  # what a checkpoint holds of them is read in the next line
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._micro_batches, self._waiting, self._passes_before = [], [], 0
        self._began = time.perf_counter() - self.progress.seconds
        self._share_weights()
        self._probe_loss_scaling = self.accelerator.num_processes > 1 or self.args.gradient_accumulation_steps > 1
        return prepared

    @property
    def directions(self) -> StepDirections:
        """The directions of every step."""
        return StepDirections(self.method.estimator, self.args.seed, self.direction_seeds)

    @property
    def stepper(self) -> ZOOptimizer:
        """The optimizer underneath accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @property
    def progress(self) -> Progress:
        """Counters of the run: steps, queries, tokens, seconds."""
        return self.stepper.progress if self.optimizer is not None else Progress()

    def training_step(self, model: nn.Module, inputs: Inputs, num_items_in_batch: Any = None) -> Tensor:
        """Collect micro-batches; at the last one of the step, query the objective and hand over the estimate."""
        self._micro_batches.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batch, self._micro_batches = StepBatch(self._micro_batches, num_items_in_batch), []
        with self.querying(model):
            self.last_step = self._replayed() or self._queried(model, batch)
        self._read_clock()
        return torch.tensor(self.last_step.loss, device=self.args.device)

    def _estimate_to_apply(self) -> StepEstimate:
        """The step is about to be written: the journal has it first."""
        assert self.last_step is not None
        self._journal_step(self.last_step)
        return self.last_step

    def pause_clock(self, seconds: float) -> None:
        """Time that was no part of the run (a diagnosis) does not count as its own."""
        if self._began is not None:
            self._began += seconds

    def collated(self, rows: Sequence[Any]) -> Inputs:
        """One batch of these rows, on the device."""
        return self._prepare_inputs(self.data_collator(rows))

    def _read_clock(self) -> None:
        """Bring the run's wall time up to now: everything since training began, over all resumes."""
        if self.is_in_train and self._began is not None:
            self.progress.seconds = time.perf_counter() - self._began

    def _queried(self, model: nn.Module, batch: StepBatch) -> StepEstimate:
        """The estimate of the next step, clipped and guarded; the counters of the run have it."""
        if self._probe_loss_scaling:
            batch = self._settle_loss_scaling(model, batch)
        progress = self.progress
        self._probe_sizes()
        self._probe(batch)
        self._check_narrow(batch)
        if count := anchor_batches(self.method.estimator, progress.steps):
            for other in self._batches(count, like=batch):
                self._probe(other)
        started = time.perf_counter()
        with no_trials():
            estimate = self._ask(batch)
        progress.seconds_forward += time.perf_counter() - started
        progress.steps += 1
        progress.num_queries += estimate.num_queries
        progress.num_tokens += self._tokens_over_processes(batch) * estimate.num_queries
        progress.losses.append(estimate.loss)
        self._count_skipped(estimate)
        estimate = self._guarded(estimate)
        return clip(estimate, self.args.max_grad_norm) if self.args.max_grad_norm > 0 else estimate

    def _ask(self, batch: StepBatch) -> StepEstimate:
        """The queries of the next step, in smaller micro-batches where memory does not suffice."""
        stepper, queries, directions = self.stepper, self.queries, self.directions.at(self.progress.steps)
        assert queries is not None
        estimator, lr, observed = self._estimator(), stepper.param_groups[0]["lr"], stepper.coordinates.state_dict()

        def ask(micro_batches: StepBatch) -> StepEstimate:
            if micro_batches is not batch:  # asked again: what the first try has looked at is forgotten
                stepper.coordinates.load_state_dict(observed)
            self.last_batch = micro_batches
            return queries.estimate(micro_batches, directions, estimator, lr=lr)

        if self.accelerator.num_processes > 1:
            return ask(batch)
        splitter = BatchSplitter(self.progress.num_parts)
        estimate = splitter(ask, batch)
        self.progress.num_parts = splitter.parts
        return replace(estimate, num_parts=splitter.parts)

    def _queries(self, stepper: ZOOptimizer) -> StepQueries:
        """What asks the model, with what the method may want of the data and of the other processes."""
        estimator, alone = self.method.estimator, self.accelerator.num_processes == 1
        if not alone and estimator.backpropagates:
            raise UserError(f"estimator={estimator.name()} works in one process: start the run without torchrun")
        if not alone and self.method.subspace.in_one_process:
            raise UserError(
                f"subspace={self.method.subspace.name()} with these settings follows the rows of one process: "
                "start the run without torchrun"
            )
        return StepQueries(
            self.method,
            stepper,
            examples=self._examples_of,
            select=self._rows_of_lengths,
            batches=self._batches,
            average=self._over_processes,
            agree=None if alone else self._agree,
            gather=None if alone else self._gather,
            places=self._places,
            rank=self.args.process_index,
            nodes=self._node_queries(stepper.session),
        )

    def _node_queries(self, session: Session) -> NodeQueries | None:
        """What asks for node gradients, where the method is made of them."""
        if not isinstance(session, NodeSession):
            return None
        gather = None if self.accelerator.num_processes == 1 else self._gather
        return NodeQueries(session, TrainerReader(self), gather, self.args.process_index)

    def _examples_of(self, batch: StepBatch) -> list[StepBatch]:
        return [self._batch_of([one], batch) for inputs in batch.micro_batches for one in examples_of(inputs)]

    def _rows_of_lengths(self, batch: StepBatch, lengths: tuple[int, float]) -> StepBatch | None:
        rows = [some for inputs in batch.micro_batches if (some := of_lengths(inputs, *lengths))]
        return self._batch_of(rows, batch) if rows else None

    def _batches(self, count: int, like: StepBatch | None = None) -> Iterator[StepBatch]:
        """So many batches of the training rows, in an order of their own."""
        like = like or self.last_batch
        assert like is not None
        size, rows = self.args.per_device_train_batch_size, self.train_dataset
        of_step = size * self.args.gradient_accumulation_steps  # rows of this process in a step, however they are cut
        drawn = torch.Generator().manual_seed(step_seed(self.args.seed, self.progress.steps))
        chosen = torch.randperm(len(rows), generator=drawn).tolist()
        even = len(chosen) // self.args.world_size * self.args.world_size  # all processes have as many batches
        share = chosen[self.args.process_index : even : self.args.world_size][: count * of_step]
        for first in range(0, len(share), of_step):
            ours = share[first : first + of_step]
            parts = [[rows[index] for index in ours[start : start + size]] for start in range(0, len(ours), size)]
            yield self._batch_of([self.collated(part) for part in parts], like)

    def _places(self, batch: StepBatch, count: int) -> list[list[int]]:
        """For every process, the places of its examples in the step's batch as one process would have it.

        A micro-batch of one process is cut into contiguous parts, one for each of several: their order is micro-batch,
        process, example.
        """
        if self.accelerator.num_processes == 1:
            return [list(range(count))]
        counts = self._gather([len(groups_of(inputs)) for inputs in batch.micro_batches])  # [processes][micro-batches]
        places: list[list[int]] = [[] for _ in counts]
        first = 0
        for micro_batch in range(max(map(len, counts))):
            for rank, of_rank in enumerate(counts):
                here = of_rank[micro_batch] if micro_batch < len(of_rank) else 0
                places[rank] += range(first, first + here)
                first += here
        return places

    def _gather(self, mine: Any) -> list[Any]:
        """What this process has and what the others have, by rank; tensors may differ in size."""
        found: list[Any] = [None] * self.accelerator.num_processes
        torch.distributed.all_gather_object(found, mine)
        return found

    def _agree(self, seen: dict[str, Any]) -> dict[str, Any]:
        """What the first process has seen, in all of them."""
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([seen])[0]

    def _estimator(self) -> Estimator:
        """The estimator as it is at this step: eps has a schedule."""
        done = self.state.global_step / max(1, self.state.max_steps)
        start = self.args.learning_rate
        rate = self.stepper.param_groups[0]["lr"] / start if start else 1.0
        return scheduled(self.method.estimator, min(done, 1.0), rate)

    def _count_skipped(self, estimate: StepEstimate) -> None:
        """A step whose losses are not finite does not reach the weights; many in a row end the run."""
        progress = self.progress
        if estimate.is_usable:
            progress.skipped_in_a_row = 0
            return
        progress.num_skipped += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row >= self.args.max_skipped_steps:
            raise NonFiniteLossError(
                f"the loss was not finite in {progress.skipped_in_a_row} steps in a row (losses of the last: "
                f"{[round(x, 4) for x in estimate.losses.flatten().tolist()]}); the weights are those before them. "
                "Lower optimizer.learning_rate or estimator.eps, or load the model in float32"
            )

    # ---- the objective -----------------------------------------------------------------------------------------------

    def compute_loss(self, model: nn.Module, inputs: Inputs, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The objective's loss where one was given, else the Trainer's, in a query from the labelled positions only."""
        if self.objective is None:
            called = functools.partial(own_loss, model) if self._only_the_loss_counts(return_outputs) else model
            return super().compute_loss(called, inputs, return_outputs=return_outputs, **kwargs)
        inputs = self._as_served(inputs)
        if not return_outputs:
            # What is written parts sooner or later: no waiting for others, and nothing of a step's first query reused.
            with sequential() if self.objective.generates else nullcontext():
                return self.objective.loss(model, inputs)
        loss, predictions, _ = self.objective.predict(model, inputs)
        return loss, {"logits": predictions}

    def prediction_step(
        self, model: nn.Module, inputs: Inputs, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """The objective's predictions and labels, so that metrics are computed over options; else the Trainer's."""
        with self._reusing_prefix():
            if self.objective is None:
                return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            with torch.inference_mode(), self.compute_loss_context_manager():
                batch = self._as_served(self._prepare_inputs(inputs))
                loss, predictions, labels = self.objective.predict(model, batch)
        return (loss, None, None) if prediction_loss_only else (loss, predictions, labels)

    def _only_the_loss_counts(self, return_outputs: bool) -> bool:
        """Whether the model's own loss is all that is wanted: in a query, and nobody computes one from its logits."""
        return (
            not return_outputs
            and hasattr(self, "_called")
            and self.compute_loss_func is None
            and self.label_smoother is None
            and super().compute_loss.__func__ is Trainer.compute_loss  # not TRL's, which looks at the outputs
        )

    def _probe(self, batch: StepBatch) -> None:
        """What can be left out of this model's forward is found out before the queries, which must all be alike."""
        for inputs in batch.micro_batches:
            with torch.inference_mode(), self.compute_loss_context_manager():
                if self.objective is not None:
                    self.objective.probe(self._called, self._as_served(inputs))
                elif self._only_the_loss_counts(False):
                    counted = self.model_accepts_loss_kwargs and batch.num_items is not None
                    given = {**inputs, "num_items_in_batch": batch.num_items} if counted else inputs
                    if not is_known(self._called, given):
                        own_loss(self._called, **given)

    def _probe_sizes(self) -> None:
        """The same once for all rows that the run knows of: what a process finds out must not depend on where it began.

        A resumed run has not seen the batches, and has not made the evaluations, that the run before it has.
        """
        if self._has_probed_sizes or self.objective is None:
            return
        self._has_probed_sizes = True
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        known = [self.train_dataset, *evaluated.values(), *self.held_out.values()]
        for row in one_of_each_size(row for rows in known if hasattr(rows, "__len__") for row in rows):
            self._probe(StepBatch([self.collated([row])]))

    def _as_served(self, inputs: Inputs) -> Inputs:
        """The batch without packed rows where they are not used: kept hidden states are those of separate rows."""
        packed = inputs.get("packed")
        keeping = self.frozen_prefix is not None and self.frozen_prefix.usable
        if packed is None or (not keeping and serves(self.model_wrapped, packed)):
            return inputs
        return {key: value for key, value in inputs.items() if key != "packed"}

    def _get_dataloader(self, *pos: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """As the Trainer's own, whose settings for training rows let no row of an evaluation fall and none move."""
        args = self.args
        if is_training:
            self._refuse_training_rows()
            made = super()._get_dataloader(*pos, is_training=True, **kwargs)
            self._refuse_no_batch(made)
            return made
        chosen = args.dataloader_drop_last, args.dataloader_in_order
        args.dataloader_drop_last, args.dataloader_in_order = False, True
        try:
            return super()._get_dataloader(*pos, **kwargs)
        finally:
            args.dataloader_drop_last, args.dataloader_in_order = chosen

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As the Trainer's own, or MeZO's order."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.mezo_protocol and has_length(rows):
            return MezoRowOrder(len(rows), self.args.seed)
        return super()._get_train_sampler(train_dataset)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As the Trainer's own, or MeZO's."""
        if self.mezo_protocol:
            return [name for name, _ in model.named_parameters() if decays(name)]
        return list(super().get_decay_parameter_names(model))

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """An objective's rows are evaluated longest first, where everything is told of all rows at the end."""
        args = self.args
        in_batches = args.batch_eval_metrics or args.include_for_metrics or not args.eval_do_concat_batches
        sortable = self.objective is not None and not in_batches
        lengths = lengths_of(eval_dataset) if sortable else None
        return super()._get_eval_sampler(eval_dataset) if lengths is None else LongestFirst(lengths)

    @contextmanager
    def _told_in_rows_order(self, dataloader: Any) -> Iterator[Callable[[Any], Any]]:
        """While rows are evaluated in another order: metric and results see them in their own."""
        order, metric = order_of(dataloader), self.compute_metrics
        if order is None:
            yield lambda output: output
            return
        self.compute_metrics = None if metric is None else metric_in_rows_order(metric, order)
        try:
            yield lambda output: output._replace(
                predictions=in_rows_order(output.predictions, order), label_ids=in_rows_order(output.label_ids, order)
            )
        finally:
            self.compute_metrics = metric

    @contextmanager
    def querying(self, model: nn.Module) -> Iterator[None]:
        """Evaluation mode (no dropout), the frozen prefix reused, and the model that compute_loss is called with."""
        self._called = model
        model.eval()
        if any(cls.__module__.startswith("trl.") for cls in type(self).__mro__):
            model.training = True  # TRL decides by the root's flag alone whether a loss is logged as training
        try:
            with self._reusing_prefix():
                yield
        finally:
            del self._called

    @contextmanager
    def _reusing_prefix(self) -> Iterator[None]:
        prefix = nullcontext() if self.frozen_prefix is None else self.frozen_prefix.reused()
        with prefix, narrowed(self.narrow_layer):
            yield

    # ---- what the Trainer's loop asks about gradients ----------------------------------------------------------------

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | None:
        """The slope before clipping: the projected gradients are clipped already (:func:`zoft.step.estimate.clip`)."""
        return self._get_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Root mean square of the projected gradients of the step; None where none were measured."""
        del model
        if grad_norm is not None:
            return grad_norm
        slopes = None if self.last_step is None else self.last_step.projected_grads
        return None if slopes is None else slopes.square().mean().sqrt()

    def floating_point_ops(self, inputs: Inputs) -> float:
        """2 N per token and query; the Trainer's own figure is 6 N (a forward and a backward pass)."""
        return super().floating_point_ops(inputs) / 3 * self.method.queries_at(max(0, self.progress.steps - 1))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Every line carries queries, tokens and seconds; a training line also loss, projected gradient and eps."""
        self._read_clock()
        progress = self.progress
        if "loss" in logs:
            finite = [loss for loss in progress.losses if numpy.isfinite(loss)]
            logs["loss"] = sum(finite) / len(finite) if finite else float("nan")
            progress.losses.clear()
            slope = self._get_grad_norm(self.model)
            if slope is not None:
                logs["projected_grad"] = float(slope)
            logs["eps"] = self.method.estimator.radius if self.last_step is None else self.last_step.eps
            logs["seconds_forward"] = progress.seconds_forward
            logs["seconds_other"] = progress.seconds - progress.seconds_forward
            logs["num_skipped_steps"] = progress.num_skipped
            if self.args.guard != "none":
                logs["num_guarded_steps"] = progress.num_guarded + self.num_returns
            if self.peak_memory_mb is not None:
                logs["peak_memory_mb"] = self.peak_memory_mb()
        logs |= {"num_queries": progress.num_queries, "num_tokens": progress.num_tokens, "seconds": progress.seconds}
        super().log(logs, *args, **kwargs)


class ZOTrainer(ZOMixin, Trainer):
    """`transformers.Trainer` with forward passes only.

    Args: those of ``transformers.Trainer``, and those of :class:`ZOMixin`.

    Example:
        >>> from zoft import ZOConfig, ZOTrainer
        >>> trainer = ZOTrainer(  # doctest: +SKIP
        ...     model="facebook/opt-125m",
        ...     args=ZOConfig(output_dir="runs/demo", budget_queries=40_000, learning_rate=1e-6),
        ...     train_dataset=rows,
        ...     estimator="central",
        ... )
        >>> trainer.train()  # doctest: +SKIP

    References: Malladi et al. 2023 (MeZO) for the default composition: subspace full, estimator central, optimizer sgd.
    """


def _as_model(model: Any, peft_config: Any, seed: int) -> Any:
    if isinstance(model, str):
        from zoft.lm.models.load import load_model

        model = load_model(model)
    if peft_config is not None:
        if model is None:
            raise UserError("model_init= and peft_config= do not go together: put the adapter on inside model_init")
        if getattr(peft_config, "prefix_projection", False):
            raise UserError("prefix_projection=True cannot be resumed (peft saves the projected prefix): leave it off")
        from peft import get_peft_model

        from zoft.lm.models.peft.base import without_old_names

        torch.manual_seed(seed)
        with without_old_names():
            model = get_peft_model(model, peft_config)
    return model
