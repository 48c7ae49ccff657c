"""The part of the trainer that writes the journal and snapshots, and resumes from them without forward passes.

A resumed run starts at its newest whole snapshot (or at the base model) and goes through the Trainer's own loop: as
long as the journal knows a step, its estimate is taken from there instead of from queries. Batches, schedules,
callbacks and log lines take their usual way, so the run is the one that was never interrupted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import Trainer

from zoft.errors import DiskFullError, NonFiniteLossError, UserError
from zoft.estimators._anchor import anchor_batches
from zoft.journal import file as files
from zoft.journal import snapshot, state
from zoft.journal.file import Contents, Journal
from zoft.journal.fingerprint import BASE, know_base, rows_digest, some_rows_digest
from zoft.journal.records import Record
from zoft.lm.models.quantized import is_quantized, stored_parts
from zoft.optimizers.base import Term
from zoft.step import replay
from zoft.step.estimate import StepEstimate
from zoft.trainer.guard import RolledBack
from zoft.utils.files import write_atomically
from zoft.weights.tensors import Weights

log = logging.getLogger(__name__)

_FIRST = "first.safetensors"  # the trained weights before the first step, where the run may have to go back
_MOST_RETURNS = 5
_FACTOR_BYTES = 1 << 28  # of a run's factors (node directions) in the journal; beyond it, checkpoints alone are resumed

_Base: Any = Trainer if TYPE_CHECKING else object  # at run time the Trainer comes from the class beside the mixin


class _Beginning(NamedTuple):
    """Where a run begins.

    Args:
        checkpoint: to load, or None.
        contents: what the journal knows.
        run: the run's identifier; None without a journal.
        lr_factor: what is left of the learning rate after the run's returns to earlier steps.
    """

    checkpoint: Path | None
    contents: Contents | None
    run: str | None
    lr_factor: float


class Journaled(_Base):
    """Journal, snapshots and resuming; mixed into :class:`zoft.trainer.trainer.ZOMixin`."""

    journal: Journal | None = None  # of the first process, while training
    journal_end = 0  # number of steps that the journal knew when training began; 0 in a new run
    _known: dict[int, Record]  # step -> what the journal says of it, as long as it is ahead of the run
    _contents: Contents | None = None
    _run: str | None = None  # identifier of the run
    _settings: dict[str, Any] | None = None
    held_out: dict[str, Any]  # name -> rows that the trainer does not know of, and that the run's results are of
    control: Any
    optimizer: Any
    lr_scheduler: Any
    queries: Any
    last_step: StepEstimate | None
    lr_factor = 1.0  # what is left of the learning rate after returns to earlier steps
    _begun_rate: float | None = None  # the learning rate that was given
    _hashed = -1  # the step of the last hash
    _is_huge = False  # whether the step at hand is so long that weights may become infinite

    # ---- a run begins ------------------------------------------------------------------------------------------------

    def _begin_journal(self, resume: str | bool | None) -> str | None:
        """Open the journal, and say which checkpoint to load: the first process decides, the others hear of it."""
        told: list[Any] = [None]
        self._settings = None
        if self.args.process_index == 0:
            try:
                told = [self._decide(resume)]
            except UserError as error:
                told = [error]
        if self.args.world_size > 1:
            from accelerate.utils import broadcast_object_list

            told = broadcast_object_list(told)
        if isinstance(told[0], UserError):
            raise told[0]
        checkpoint, self._contents, self._run, self.lr_factor = told[0]
        self._known, self.journal_end = {}, 0
        if self._begun_rate is None:
            self._begun_rate = self.args.learning_rate
        self._set_rate(self._begun_rate * self.lr_factor)
        if self._contents is not None:
            self._known = {record.step: record for record in self._contents.records}
            self.journal_end = max(self._known, default=-1) + 1
        return None if checkpoint is None else str(checkpoint)

    def _set_rate(self, rate: float) -> None:
        """The learning rate that the schedule begins with, also where the optimizer was made before it was known."""
        self.args.learning_rate = rate
        for group in self.stepper.param_groups if self.optimizer is not None else ():
            group["lr"] = rate
            group.pop("initial_lr", None)  # a schedule's own note of the rate before

    @property
    def num_returns(self) -> int:
        """How often a guard has sent the run back to an earlier step; each time its learning rate was halved."""
        return round(-math.log2(self.lr_factor))

    def _decide(self, resume: str | bool | None) -> _Beginning:
        """Where the run begins; the journal is open behind what is kept of it."""
        folder = Path(str(self.args.output_dir))
        path = folder / files.NAME
        snapshot.clear_unfinished(folder)
        if not resume or not (path.is_file() and self.args.journal):
            return self._without_journal(folder, resume)
        contents = files.read(path)
        run = str(contents.header["run"])
        checkpoint, start = snapshot.newest(folder, run) if resume is True else Path(str(resume)), 0
        if checkpoint is not None:  # the newest one is verified already, and its name is its step
            start = snapshot.step_of(checkpoint) if resume is True else int(snapshot.verify(checkpoint, run)["step"])
        self._check_same(contents, path)
        self._refuse_fewer_steps(max(start, contents.end), folder, contents)
        if checkpoint is None and contents.header["first"]:
            raise UserError(
                f"{path} begins at step {contents.header['first']}, and no whole checkpoint from there on is left: "
                "start a new run in another output_dir"
            )
        if checkpoint is None:
            self._check_base(contents, path)
        lr_factor = _lr_factor(contents)
        if checkpoint is not None and contents.end < start:  # the snapshot knows more than what is left of the journal
            lr_factor = float(snapshot.verify(checkpoint, run).get("lr_factor", lr_factor))
            header = {**contents.header, "first": start, "weights": None, "lr_factor": lr_factor}
            self.journal = Journal.create(path, header)
            contents.records, contents.looks, contents.evaluations = [], {}, {}
            return _Beginning(checkpoint, contents, run, lr_factor)
        stop = next((r.step for r in contents.records if r.step >= start and r.computed), contents.end)
        self.journal = Journal.open(path, stop)
        contents.records = [record for record in contents.records if start <= record.step < stop]
        contents.evaluations = {step: made for step, made in contents.evaluations.items() if step <= stop}
        return _Beginning(checkpoint, contents, run, lr_factor)

    def _without_journal(self, folder: Path, resume: str | bool | None) -> _Beginning:
        """A new run, or one that goes on from a checkpoint alone."""
        checkpoint = None
        if resume is True:
            checkpoint = snapshot.newest(folder)
            if checkpoint is not None:
                self._check_same_as(checkpoint)
                self._refuse_fewer_steps(snapshot.step_of(checkpoint), folder)
            if checkpoint is None:
                raise UserError(
                    f"there is nothing to resume in {folder}: no journal and no whole checkpoint of zoft; "
                    "train without resume_from_checkpoint"
                )
        elif resume:
            checkpoint = Path(str(resume))
            snapshot.verify(checkpoint)
        known = {} if checkpoint is None else snapshot.verify(checkpoint)
        lr_factor = float(known.get("lr_factor", 1.0))
        if not self.args.journal:
            return _Beginning(checkpoint, None, None, lr_factor)
        header: dict[str, Any] = {"settings": self.settings(), "frozen": self.frozen_fingerprint(), "weights": None}
        header["model"] = self._model_name()
        if checkpoint is not None:
            header |= {"first": int(known["step"]), "lr_factor": lr_factor}
        elif self.model is not None:
            header["weights"] = Weights(self.model).digest()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskFullError.of(error, folder, 0) from None
        self.journal = Journal.create(folder / files.NAME, header)
        if self.args.guard == "rollback":
            begun = {name: tensor.detach() for name, tensor in Weights(self.model).tensors.items()}
            write_atomically(folder / _FIRST, state.pack(begun))
        return _Beginning(checkpoint, None, str(files.read(folder / files.NAME).header["run"]), lr_factor)

    def _end_journal(self, *, finished: bool) -> None:
        """Seal what is complete, and let go of the file."""
        journal, self.journal = self.journal, None
        if journal is not None:
            try:
                if finished:
                    journal.seal(with_losses=self.args.guard != "none")
            finally:
                journal.close()

    # ---- what must be the same ---------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """What changes the numbers of a run, as plain values; learning rate, budget and logging may change."""
        if self._settings is None:  # every row is read for it
            self._settings = self._read_settings()
        return dict(self._settings)

    def _read_settings(self) -> dict[str, Any]:
        method, args = self.method, self.args
        chosen: dict[str, Any] = {"seed": args.seed, "data_seed": args.data_seed}
        chosen["batch"] = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        chosen["precision_update"] = args.precision_update
        chosen["weight_decay"] = args.weight_decay
        chosen["max_grad_norm"] = args.max_grad_norm
        if self.mezo_protocol:
            chosen["protocol"] = "mezo"
        derived = self.direction_seeds is None or self.mezo_protocol  # of the run's seed: a longer run has more of them
        chosen["direction_seeds"] = None if derived else _short(self.direction_seeds)
        chosen["data"] = rows_digest(self.train_dataset)
        for name, rows in {"eval_data": self.eval_dataset, **self.held_out}.items():
            chosen[name] = None if rows is None else rows_digest(rows)
        for group in ("subspace", "estimator", "weighting", "optimizer"):
            part = getattr(method, group)
            chosen[group] = part.name()
            for field in dataclasses.fields(part):
                if field.name not in ("learning_rate", "weight_decay"):
                    chosen[f"{group}.{field.name}"] = getattr(part, field.name)
        for part in (method.subspace, method.estimator, method.weighting, method.optimizer, self.objective):
            chosen |= {f"code of {name}": sha for name, sha in (part.own_code() if part else {}).items()}
        return dict(json.loads(json.dumps(chosen, default=str)))

    def _check_same(self, contents: Contents, path: Path) -> None:
        lines = self._differing(contents.header.get("settings", {}))
        frozen = self.frozen_fingerprint()
        known = str(contents.header.get("frozen"))  # the first half alone in journals of before there was a second
        if known not in (str(frozen), str(frozen).split()[0]):
            lines.append(f"  model: {contents.header.get('model')} there, {self._model_name()} now")
        if lines:
            raise UserError(
                f"{path} belongs to another run; it differs in\n" + "\n".join(lines) + "\n"
                "give the same, or another output_dir for a new run"
            )

    def _check_same_as(self, checkpoint: Path) -> None:
        """Without a journal a checkpoint's manifest says what must be the same."""
        there = snapshot.verify(checkpoint).get("settings")
        lines = self._differing(there) if there else []
        if lines:
            raise UserError(
                f"{checkpoint} belongs to another run; it differs in\n" + "\n".join(lines) + "\n"
                "give the same, or another output_dir for a new run"
            )

    def _differing(self, there: dict[str, Any]) -> list[str]:
        """A line for every setting that is not what it was; rows for evaluation may come and go, but not change."""
        now = self.settings()
        for name in [key for key in {**there, **now} if key.endswith("_data")]:
            if there.get(name) is None or now.get(name) is None:
                there, now = ({k: v for k, v in one.items() if k != name} for one in (there, now))
        if "SHA-256" not in str(there.get("data")):  # a journal of before every row was hashed
            now["data"] = some_rows_digest(self.train_dataset)
        differing = [key for key in {**there, **now} if there.get(key) != now.get(key)]
        return [f"  {key}: {there.get(key)!r} there, {now.get(key)!r} now" for key in differing]

    def _refuse_fewer_steps(self, known: int, folder: Path, contents: Contents | None = None) -> None:
        """A run cannot end before what it has done: its journal would tell of another model than it leaves."""
        if not 0 < self.args.max_steps < known:
            return
        queries = f"budget.queries={contents.records[-1].queries} " if contents and contents.records else ""
        raise UserError(
            f"the run in {folder} has done {known} steps, and is to end after {self.args.max_steps}: give "
            f"{queries}(max_steps={known}) to end it where it is, or more; zoft replay --to gives an earlier state"
        )

    def _check_base(self, contents: Contents, path: Path) -> None:
        """Without a checkpoint the steps are replayed onto the model as it is: the one they began with."""
        begun = contents.header["weights"]
        if begun is not None and self.model is not None and Weights(self.model).digest() != begun:
            raise UserError(
                f"{path} does not belong to this model: its trained weights differ from those that the run began with; "
                "load the base model anew"
            )

    def frozen_fingerprint(self) -> str | None:
        """A fingerprint of what is not trained: some numbers of every tensor, and the sum of all of its bits."""
        if self.model is None:
            return None
        if BASE in vars(self.model):
            return str(vars(self.model)[BASE])
        digest, sums = hashlib.sha256(), hashlib.sha256()
        for name, tensor in sorted(self.model.named_parameters()):
            for part in () if tensor.requires_grad else stored_parts(tensor):
                sums.update(f"{_sum_of_bits(part)},".encode())
                some = part.detach().reshape(-1)[:: max(1, part.numel() // 8)][:8]
                digest.update(f"{name}|{tuple(part.shape)}|{part.dtype}".encode())
                digest.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        fingerprint = f"{digest.hexdigest()} {sums.hexdigest()[:16]}"
        if is_quantized(self.model):  # bitsandbytes packs codes and moves scales in the first forward
            know_base(self.model, fingerprint)
        return fingerprint

    def _model_name(self) -> str:
        return str(getattr(getattr(self.model, "config", None), "name_or_path", "") or type(self.model).__name__)

    # ---- a step is taken from the journal, or written into it --------------------------------------------------------

    def _replayed(self) -> StepEstimate | None:
        """The estimate that the journal has of the next step, which has begun; None where it has none."""
        step = self.progress.steps
        record = self._known.pop(step, None)
        if record is None:
            return None
        for group in self.stepper.param_groups:
            group["lr"] = record.lr
        look = None if self._contents is None else self._contents.looks.get(step)
        makes_anchor = bool(anchor_batches(self.method.estimator, step))
        estimate = StepEstimate.from_record(record, self.directions.at(step), look, keeps_anchor=makes_anchor)
        replay.begin(self.stepper, estimate, self.method.estimator)
        progress = self.progress
        progress.steps, progress.num_queries = step + 1, record.queries
        progress.num_tokens = record.tokens or progress.num_tokens
        progress.num_skipped += record.skipped
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if record.skipped else 0
        progress.losses.append(record.loss)
        progress.num_guarded += record.guarded
        progress.num_parts = estimate.num_parts
        self._remember(estimate)
        return estimate

    def _remember(self, estimate: StepEstimate) -> None:
        """A step inside the running range becomes part of it."""
        if self.args.guard != "none" and estimate.projected_grads is not None and estimate.outlier is None:
            self.progress.recent = [*self.progress.recent, [estimate.loss, estimate.slope]][-self.args.guard_steps :]

    def _go_back(self, back: RolledBack) -> None:
        """Cut journal and checkpoints off behind the step, put the first weights back, and lower the learning rate."""
        folder, path = Path(str(self.args.output_dir)), Path(str(self.args.output_dir)) / files.NAME
        times = self.num_returns + 1
        if times > _MOST_RETURNS:
            raise NonFiniteLossError(
                f"{back.reason}: the run has gone back {_MOST_RETURNS} times and left its range again; "
                "lower optimizer.learning_rate"
            )
        log.warning("%s; the run goes back to step %d at %g of its learning rate", back.reason, back.step, 0.5**times)
        for checkpoint in snapshot.checkpoints(folder):
            if snapshot.step_of(checkpoint) > back.step:
                shutil.rmtree(checkpoint)
        journal = Journal.open(path, back.step)
        journal.note(back.step, {"lr_factor": 0.5})
        journal.close()
        self.settle_weights()
        with torch.no_grad():
            begun = state.unpack((folder / _FIRST).read_bytes())
            for name, tensor in Weights(self.model).tensors.items():
                tensor.copy_(begun[name])
        self.optimizer = self.lr_scheduler = self.queries = self.last_step = None

    @property
    def _is_replaying(self) -> bool:
        """Whether the last step was taken from the journal."""
        return self.last_step is not None and self.last_step.from_journal

    def _journal_step(self, estimate: StepEstimate) -> None:
        """A step is about to be written."""
        lr = float(self.stepper.param_groups[0]["lr"])
        self._is_huge = _may_overflow(self.stepper.session.weights, lr, estimate.terms or ())
        if self.journal is None or estimate.from_journal:
            return
        look = estimate.to_look()
        has_factors = look is not None and estimate.factors is not None
        if has_factors and len(look or b"") * self.state.max_steps > _FACTOR_BYTES:
            look, has_factors = None, False
        if look is not None:
            self.journal.look(estimate.step, look)
        queries, tokens = self.progress.num_queries, self.progress.num_tokens
        self.journal.append(estimate.to_record(lr, queries, tokens, has_factors=has_factors))

    def _journal_digest(self) -> None:
        """Every ``journal_hash_steps`` steps the hash of the weights: run, replay and all processes must agree."""
        every, step = self.args.journal_hash_steps, self.state.global_step
        alone = self.journal is None and self.args.world_size == 1
        if not every or step % every or step == self._hashed or alone:
            return
        self._hashed = step
        self.settle_weights()
        sha = Weights(self.model).digest()
        self._check_digest(step, sha)
        if self.journal is not None and not self._is_replaying:
            self.journal.digest(step, sha)

    def _refuse_infinite_weights(self) -> None:
        """A step of finite losses can be too long for the weights' numbers: it is no step, and the run does not go on.

        In memory the weights are spoilt; the step is taken out of the journal, and nothing is saved of it.
        """
        huge, self._is_huge = self._is_huge, False
        if not huge or self._is_replaying:
            return
        self.settle_weights()
        if all(bool(torch.isfinite(tensor).all()) for tensor in Weights(self.model).tensors.values()):
            return
        step = self.progress.steps - 1
        if self.journal is not None:
            path, journal = self.journal.path, self.journal
            self.journal = None
            journal.close()
            Journal.open(path, step).close()
        raise NonFiniteLossError(
            f"step {step} has made weights infinite (its losses were finite, its projected gradient "
            f"{float(self._get_grad_norm(self.model)):.3g}): it was not kept, and the run's folder is as it was before "
            "it. Lower optimizer.learning_rate and repeat the command"
        )

    def _check_digest(self, step: int, sha: str) -> None:
        known = None if self._contents is None or not self._is_replaying else self._contents.digests.get(step)
        if known not in (None, sha):
            raise UserError(
                f"the weights after step {step} are not those of the run in {self.args.output_dir}: another device or "
                "another version of torch computes other last bits; start from a checkpoint, or a new run"
            )
        if self.args.world_size > 1:
            found: list[Any] = [None] * self.args.world_size
            torch.distributed.all_gather_object(found, sha)
            if len(set(found)) > 1:
                raise RuntimeError(
                    f"the processes' weights differ after step {step} ({', '.join(x[:8] for x in found)}): a device or "
                    "its memory is faulty; repeat the command to go on from the last checkpoint"
                )

    # ---- evaluations -------------------------------------------------------------------------------------------------

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
        step = self.state.global_step
        known = [] if self._contents is None else self._contents.evaluations.get(step, [])
        if known:
            metrics = dict(known.pop(0))
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.journal is not None:
            self.journal.evaluation(step, {key: _plain(value) for key, value in metrics.items()})
        return metrics


# ---- plain values ----------------------------------------------------------------------------------------------------


def _lr_factor(contents: Contents) -> float:
    """What is left of the learning rate: halved at every return, those before the journal's first step included."""
    before = float(contents.header.get("lr_factor", 1.0))
    return before * math.prod(note.get("lr_factor", 1.0) for note in contents.notes)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _sum_of_bits(tensor: torch.Tensor) -> int:
    """The tensor's bits as integers, added up: one that was changed shows, at the price of reading them."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    words = len(flat) // 8 * 8
    return int(flat[:words].view(torch.int64).sum()) + int(flat[words:].sum())


_MARGIN = 1e5  # how much longer than a learning rate times coefficient an element of a step may be


def _may_overflow(weights: Weights, lr: float, terms: Sequence[Term]) -> bool:
    """Whether a step is so long that the weights' dtype may not hold it."""
    largest = min(torch.finfo(tensor.dtype).max for tensor in weights.tensors.values())
    return abs(lr) * max((1.0, *(abs(c) for _, c in terms))) * _MARGIN > largest


def _short(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:16]
