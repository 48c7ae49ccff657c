"""The journal of a run, as its trainer keeps it: steps written before they are taken, and read instead of queried.

A resumed run starts at its newest whole snapshot (or at the base model) and goes through the Trainer's own loop: as
long as the journal knows a step, its estimate is taken from there instead of from queries. Batches, schedules,
callbacks and log lines take their usual way, so the run is the one that was never interrupted.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from zoft.engines._optional import settle
from zoft.engines.base import Session
from zoft.errors import NonFiniteLossError, UserError
from zoft.journal import file as files
from zoft.journal import snapshot, state
from zoft.journal.file import Contents, Journal
from zoft.journal.records import Record
from zoft.step.estimate import StepEstimate
from zoft.step.update import Progress
from zoft.trainer.beginning import Beginning, RunIdentity, decide
from zoft.trainer.guard import RolledBack
from zoft.trainer.processes import Processes
from zoft.utils.files import write_atomically
from zoft.weights.tensors import Weights

log = logging.getLogger(__name__)

_FIRST = "first.safetensors"  # the trained weights before the first step, where the run may have to go back
_MOST_RETURNS = 5
_FACTOR_BYTES = 1 << 28  # of a run's factors (node directions) in the journal; beyond it, checkpoints alone are resumed


class RunJournal:
    """The journal of a run: written by its first process, known to all of them.

    Args:
        args: of the Trainer: the folder, and what is written.
        identity: what must be the same when the run goes on.
        processes: the first one decides where the run begins, the others hear of it.
    """

    def __init__(self, args: Any, identity: RunIdentity, processes: Processes) -> None:
        self.args = args
        self.identity = identity
        self.processes = processes
        self.folder = Path(str(args.output_dir))
        self.file: Journal | None = None  # of the first process, while training
        self.contents: Contents | None = None  # what was known when training began
        self.run: str | None = None  # identifier of the run
        self.lr_factor = 1.0  # what is left of the learning rate after returns to earlier steps
        self.end = 0  # number of steps that were known when training began; 0 in a new run
        self._records: dict[int, Record] = {}  # step -> what is known of it, as long as it is ahead of the run
        self._hashed = -1  # the step of the last hash
        self._given_rate: float | None = None  # the learning rate before any return

    # ---- a run begins and ends ---------------------------------------------------------------------------------------

    def begin(self, resume: str | bool | None) -> Path | None:
        """Open the journal; the checkpoint to load, or None.

        Args:
            resume: as ``trainer.train(resume_from_checkpoint=...)`` takes it.
        """
        # rows may have changed since an earlier training of the same trainer
        self.identity.forget()
        if self.processes.count > 1:
            self.identity.require_same_everywhere()
            self.identity.gather_weights()
        self.folder = Path(str(self.args.output_dir))
        answer: Beginning | UserError | None = None
        # one process reads the folder: others could see it a moment later, and decide otherwise
        if self.processes.rank == 0:
            try:
                answer, self.file = decide(self.args, self.identity, resume)
            except UserError as error:
                answer = error
        # an error is agreed on too: all processes raise it, and none waits for the others
        answer = self.processes.agree(answer)
        if not isinstance(answer, Beginning):
            assert answer is not None
            raise answer
        self.contents, self.run, self.lr_factor = answer.contents, answer.run, answer.lr_factor
        self._records = {} if self.contents is None else {record.step: record for record in self.contents.records}
        self.end = max(self._records, default=-1) + 1
        return answer.checkpoint

    def lower_rate(self, groups: Iterable[dict[str, Any]]) -> None:
        """The learning rate that the schedule begins with, also where the optimizer was made before it was known.

        Args:
            groups: of the optimizer; none where there is no optimizer yet.
        """
        if self._given_rate is None:
            # remembered once: each return halves it, whatever the arguments say by then
            self._given_rate = self.args.learning_rate
        self.args.learning_rate = self._given_rate * self.lr_factor
        for group in groups:
            group["lr"] = self.args.learning_rate
            group.pop("initial_lr", None)  # a schedule's own note of the rate before

    def keep_first(self, model: torch.nn.Module) -> None:
        """Save the weights that a new run begins with, where a guard may send it back to them."""
        # written before the first step, as a whole model may be larger than the run's checkpoints
        if self.file is not None and self.contents is None and self.args.guard == "rollback":
            weights = {name: tensor.detach() for name, tensor in Weights(model).tensors.items()}
            write_atomically(self.folder / _FIRST, state.pack(weights))

    def close(self, *, finished: bool) -> None:
        """Seal what is complete, and let go of the file."""
        journal, self.file = self.file, None
        if journal is not None:
            try:
                # losses are what a guard judges a longer run by; without one a sealed journal is smaller
                if finished:
                    journal.seal(with_losses=self.args.guard != "none")
            finally:
                journal.close()

    def facts_at(self, step: int) -> dict[str, Any]:
        """What a checkpoint's manifest says of the run."""
        return {"run": self.run, "step": step, "settings": self.identity.settings(), "lr_factor": self.lr_factor}

    # ---- steps -------------------------------------------------------------------------------------------------------

    def next_record(self, step: int) -> tuple[Record, bytes | None] | None:
        """A step's record and what the subspace observed in it; None where the step has yet to be queried."""
        record = self._records.pop(step, None)
        if record is None or self.contents is None:
            return None
        return record, self.contents.observations.get(step)

    def append(self, estimate: StepEstimate, lr: float, progress: Progress, num_steps: int) -> None:
        """Write down a step before it goes into the weights.

        Args:
            estimate: of the step; one that was read from the journal is in it.
            lr: learning rate of the step.
            progress: counters of the run, this step included.
            num_steps: of the whole run.
        """
        # a step from the journal is in it
        if self.file is None or estimate.from_journal:
            return
        observed = estimate.observed()
        has_factors = observed is not None and estimate.factors is not None
        # factors of every step could be larger than checkpoints: then checkpoints alone are resumed
        if has_factors and len(observed or b"") * num_steps > _FACTOR_BYTES:
            observed, has_factors = None, False
        # before the step's record: a record without its observation could not be replayed
        if observed is not None:
            self.file.observation(estimate.step, observed)
        self.file.append(estimate.to_record(lr, progress.num_queries, progress.num_tokens, has_factors=has_factors))

    def take_out(self, step: int) -> None:
        """Cut the journal off before a step, and write no more into it."""
        if self.file is not None:
            # closed and opened anew at the step: the file is cut there
            journal, self.file = self.file, None
            journal.close()
            Journal.open(journal.path, step).close()

    # ---- evaluations -------------------------------------------------------------------------------------------------

    def next_evaluation(self, step: int) -> dict[str, Any] | None:
        """The recorded metrics of the next evaluation after a step; None where it has to be made."""
        recorded = [] if self.contents is None else self.contents.evaluations.get(step, [])
        return dict(recorded.pop(0)) if recorded else None

    def evaluated(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """Write down an evaluation that was made; its metrics come back as they are."""
        if self.file is not None:
            plain = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in metrics.items()}
            self.file.evaluation(step, plain)
        return metrics

    # ---- hashes of the weights ---------------------------------------------------------------------------------------

    def digest(self, session: Session, step: int, *, is_replaying: bool) -> None:
        """Every ``journal_hash_steps`` steps the hash of the weights: run, replay and all processes must agree.

        Args:
            session: holds the weights, after the step.
            step: how many have been taken.
            is_replaying: whether the last one was read from the journal.
        """
        period, is_alone = self.args.journal_hash_steps, self.file is None and self.processes.count == 1
        if not period or step % period or step == self._hashed or is_alone:
            # once a step, and only where something is compared or written
            return
        self._hashed = step
        # engine=offload: the hash is of weights that have their steps
        settle(session)
        sha = self.identity.trainer.stages.digest()
        # a step that is queried may differ: another device computes other last bits
        recorded = None if self.contents is None or not is_replaying else self.contents.digests.get(step)
        if recorded not in (None, sha):
            raise UserError(
                f"the weights after step {step} are not those of the run in {self.args.output_dir}: another device or "
                "another version of torch computes other last bits; start from a checkpoint, or a new run"
            )
        shas = self.processes.gather(sha)
        # all apply the same numbers to the same weights: a difference is a fault of the machine
        if len(set(shas)) > 1:
            raise RuntimeError(
                f"the processes' weights differ after step {step} ({', '.join(x[:8] for x in shas)}): a device or "
                "its memory is faulty; repeat the command to go on from the last checkpoint"
            )
        if self.file is not None and not is_replaying:
            self.file.digest(step, sha)

    # ---- a guard sends the run back ----------------------------------------------------------------------------------

    @property
    def num_returns(self) -> int:
        """How often a guard has sent the run back to an earlier step; each time its learning rate was halved."""
        # lr_factor = 2^-returns
        return round(-math.log2(self.lr_factor))

    def go_back(self, back: RolledBack, model: torch.nn.Module) -> None:
        """Cut journal and checkpoints off behind the step, put the first weights back, and lower the learning rate.

        Args:
            back: where to, and why.
            model: takes the first weights; the journal leads from there to the step.
        """
        times = self.num_returns + 1
        if times > _MOST_RETURNS:
            raise NonFiniteLossError(
                f"{back.reason}: the run has gone back {_MOST_RETURNS} times and left its range again; "
                "lower optimizer.learning_rate"
            )
        log.warning("%s; the run goes back to step %d at %g of its learning rate", back.reason, back.step, 0.5**times)
        # checkpoints behind the step are of a path that is given up
        for checkpoint in snapshot.checkpoints(self.folder):
            if snapshot.step_of(checkpoint) > back.step:
                shutil.rmtree(checkpoint)
        journal = Journal.open(self.folder / files.NAME, back.step)
        journal.note(back.step, {"lr_factor": 0.5})
        journal.close()
        # the journal leads from the first weights to the step, without a query
        first = state.unpack((self.folder / _FIRST).read_bytes())
        with torch.no_grad():
            for name, tensor in Weights(model).tensors.items():
                tensor.copy_(first[name])
