"""Where a run begins (the start, a checkpoint, or its journal's end), and which settings a resumed run must share."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoft.errors import DiskFullError, UserError
from zoft.journal import file as files
from zoft.journal import snapshot
from zoft.journal.file import Contents, Header, Journal
from zoft.journal.fingerprint import BASE, know_base, rows_digest, some_rows_digest
from zoft.lm.models.quantized import is_quantized, stored_parts
from zoft.trainer.protocol import HoldsObjects
from zoft.trainer.ranks import require_same
from zoft.weights.tensors import Weights

_BUDGETED = ("learning_rate", "weight_decay")  # of the optimizer: the first may change, the arguments have the second


@dataclass(frozen=True)
class Beginning:
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


def decide(args: Any, identity: RunIdentity, resume: str | bool | None) -> tuple[Beginning, Journal | None]:
    """Where the run begins, and its journal, open behind what is kept of it.

    Args:
        args: of the Trainer.
        identity: what must be the same.
        resume: as ``trainer.train(resume_from_checkpoint=...)`` takes it.

    Raises:
        UserError: the folder has another run, or one that cannot go on.
        DiskFullError: there is no room for the folder.
    """
    folder = Path(str(args.output_dir))
    path = folder / files.NAME
    # what a crash has left half-written is no checkpoint, and only takes up room
    snapshot.clear_unfinished(folder)
    if not (resume and args.journal and path.is_file()):
        return _without_journal(args, identity, resume, folder)
    contents = files.read(path)
    run = str(contents.header["run"])
    # True: the newest whole checkpoint; a path: the one that was asked for, and no other
    checkpoint, start = snapshot.newest(folder, run) if resume is True else Path(str(resume)), 0
    if checkpoint is not None:  # the newest one is verified already, and its name is its step
        start = snapshot.step_of(checkpoint) if resume is True else int(snapshot.verify(checkpoint, run)["step"])
    identity.check_journal(contents, path)
    _refuse_fewer_steps(args, max(start, contents.end), contents)
    # a journal that begins later needs the weights that it begins with
    if checkpoint is None and contents.header["first"]:
        raise UserError(
            f"{path} begins at step {contents.header['first']}, and no whole checkpoint from there on is left: "
            "start a new run in another output_dir"
        )
    # without a checkpoint every step is replayed from the base, which must be the same one
    if checkpoint is None:
        identity.check_base(contents, path)
    lr_factor = _lr_factor(contents)
    if checkpoint is not None and contents.end < start:  # the snapshot knows more than what is left of the journal
        lr_factor = float(snapshot.verify(checkpoint, run).get("lr_factor", lr_factor))
        header: Header = {**contents.header, "first": start, "weights": None, "lr_factor": lr_factor}
        contents.records, contents.observations, contents.evaluations = [], {}, {}
        return Beginning(checkpoint, contents, run, lr_factor), Journal.create(path, header)
    # a step that no record is enough for is taken anew, and so is all behind it
    stop = next((r.step for r in contents.records if r.step >= start and r.computed), contents.end)
    journal = Journal.open(path, stop)
    contents.records = [record for record in contents.records if start <= record.step < stop]
    contents.evaluations = {step: metrics for step, metrics in contents.evaluations.items() if step <= stop}
    return Beginning(checkpoint, contents, run, lr_factor), journal


def _without_journal(
    args: Any, identity: RunIdentity, resume: str | bool | None, folder: Path
) -> tuple[Beginning, Journal | None]:
    """A new run, or one that goes on from a checkpoint alone."""
    checkpoint = _checkpoint_alone(args, identity, resume, folder)
    facts = {} if checkpoint is None else snapshot.verify(checkpoint)
    lr_factor = float(facts.get("lr_factor", 1.0))
    if not args.journal:
        return Beginning(checkpoint, None, None, lr_factor), None
    header: Header = {"settings": identity.settings(), "frozen": identity.frozen_fingerprint(), "weights": None}
    # the header says all that a later session has to find equal
    header["model"] = identity.model_name
    if checkpoint is not None:
        header |= {"first": int(facts["step"]), "lr_factor": lr_factor}
    else:
        # a hash of what is trained, so that steps are never replayed onto another model
        header["weights"] = identity.weights_digest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskFullError.of(error, folder, 0) from None
    journal = Journal.create(folder / files.NAME, header)
    return Beginning(checkpoint, None, str(files.read(journal.path).header["run"]), lr_factor), journal


def _checkpoint_alone(args: Any, identity: RunIdentity, resume: str | bool | None, folder: Path) -> Path | None:
    """The checkpoint to go on from where no journal is read; None for a new run."""
    if resume is True:
        newest = snapshot.newest(folder)
        if newest is None:
            raise UserError(
                f"there is nothing to resume in {folder}: no journal and no whole checkpoint of zoft; "
                "train without resume_from_checkpoint"
            )
        identity.check_checkpoint(newest)
        _refuse_fewer_steps(args, snapshot.step_of(newest))
        return newest
    if resume:
        snapshot.verify(Path(str(resume)))
        return Path(str(resume))
    return None


def _refuse_fewer_steps(args: Any, known: int, contents: Contents | None = None) -> None:
    """A run cannot end before what it has done: its journal would tell of another model than it leaves."""
    # 0 < max_steps: a run of epochs says its length only when its rows are known
    if not 0 < args.max_steps < known:
        return
    queries = f"budget.queries={contents.records[-1].queries} " if contents and contents.records else ""
    raise UserError(
        f"the run in {Path(str(args.output_dir))} has done {known} steps, and is to end after {args.max_steps}: give "
        f"{queries}(max_steps={known}) to end it where it is, or more; zoft replay --to gives an earlier state"
    )


def _lr_factor(contents: Contents) -> float:
    """What is left of the learning rate: halved at every return, those before the journal's first step included."""
    before = float(contents.header.get("lr_factor", 1.0))
    # each return notes its own factor: they multiply
    return before * math.prod(note.get("lr_factor", 1.0) for note in contents.notes)


# ---- what must be the same -------------------------------------------------------------------------------------------


class RunIdentity:
    """The settings, rows and weights that identify a run."""

    def __init__(self, trainer: HoldsObjects) -> None:
        self.trainer = trainer
        self._settings: dict[str, Any] | None = None
        self._digest: str | None = None  # of weights that no process has alone

    def forget(self) -> None:
        """Forget the digests of the rows: a new training reads them again."""
        self._settings = None

    def settings(self) -> dict[str, Any]:
        """What changes the numbers of a run, as plain values; learning rate, budget and logging may change."""
        if self._settings is None:  # every row is read for it
            self._settings = self._read_settings()
        return dict(self._settings)

    def require_same_everywhere(self) -> None:
        """Every process has the settings of the first; rows are not read for it, which may be drawn or streamed.

        Raises:
            UserError: in all processes, naming one with other settings or other code, and the first of them.
        """
        args = self.trainer.args
        # these may change when a run is resumed, and not between processes of one run
        names = ("learning_rate", "max_steps", "lr_scheduler_type", "parallel", "parallel_directions")
        more = {name: str(getattr(args, name)) for name in names}
        settings = self._settings_without_rows() | more
        require_same({"settings": "\n".join(f"{name}: {value}" for name, value in settings.items())})

    def _read_settings(self) -> dict[str, Any]:
        trainer, settings = self.trainer, self._settings_without_rows()
        settings["data"] = rows_digest(trainer.train_dataset)
        for name, rows in {"eval_data": trainer.eval_dataset, **trainer.held_out}.items():
            settings[name] = None if rows is None else rows_digest(rows)
        return settings

    def _settings_without_rows(self) -> dict[str, Any]:
        trainer, method, args = self.trainer, self.trainer.method, self.trainer.args
        settings: dict[str, Any] = {"seed": args.seed, "data_seed": args.data_seed}
        # rows of a step over all processes, however it is cut: that many make one loss
        of_process = args.per_device_train_batch_size * args.gradient_accumulation_steps
        settings["batch"] = of_process * trainer.grid.rows.count
        settings["precision_update"] = args.precision_update
        settings["weight_decay"] = args.weight_decay
        settings["max_grad_norm"] = args.max_grad_norm
        if trainer.mezo_protocol:
            settings["protocol"] = "mezo"
        # MeZO's seeds follow from the run's own, and a longer run has more of them
        is_given = trainer.direction_seeds is not None and not trainer.mezo_protocol
        settings["direction_seeds"] = _short(trainer.direction_seeds) if is_given else None
        for group in ("subspace", "estimator", "weighting", "optimizer"):
            part = getattr(method, group)
            settings[group] = part.name()
            for field in dataclasses.fields(part):
                if field.name not in _BUDGETED:
                    settings[f"{group}.{field.name}"] = getattr(part, field.name)
        # code of the user's own (a reward, an objective) by its hash: another function is another run
        for part in (method.subspace, method.estimator, method.weighting, method.optimizer, trainer.zo_objective):
            settings |= {f"code of {name}": sha for name, sha in (part.own_code() if part else {}).items()}
        # as the journal has them: tuples are lists there, and a comparison must not see a difference
        return dict(json.loads(json.dumps(settings, default=str)))

    # ---- the model ---------------------------------------------------------------------------------------------------

    @property
    def model_name(self) -> str:
        """Where the model was loaded from, or the name of its class."""
        model = self.trainer.model
        return str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)

    def weights_digest(self) -> str | None:
        """SHA-256 of what is trained; None before ``model_init`` has made the model."""
        return self._digest or (None if self.trainer.model is None else Weights(self.trainer.model).digest())

    def gather_weights(self) -> None:
        """Processes that have parts of the model hash it together; all come here, and one asks for it later."""
        self._digest = None if self.trainer.stages.stage is None else self.trainer.stages.digest()

    def frozen_fingerprint(self) -> str | None:
        """A fingerprint of what is not trained: some numbers of every tensor, and the sum of all of its bits."""
        model = self.trainer.model
        if model is None:
            return None
        if BASE in vars(model):
            return str(vars(model)[BASE])
        digest, sums = hashlib.sha256(), hashlib.sha256()
        # sorted: the order of modules may depend on versions
        for name, tensor in sorted(model.named_parameters()):
            for part in () if tensor.requires_grad else stored_parts(tensor):
                sums.update(f"{_sum_of_bits(part)},".encode())
                # eight numbers of every tensor find another model; the sum of all bits finds a changed one
                some = part.detach().reshape(-1)[:: max(1, part.numel() // 8)][:8]
                digest.update(f"{name}|{tuple(part.shape)}|{part.dtype}".encode())
                digest.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        fingerprint = f"{digest.hexdigest()} {sums.hexdigest()[:16]}"
        if is_quantized(model):  # bitsandbytes packs codes and moves scales in the first forward
            know_base(model, fingerprint)
        return fingerprint

    # ---- compared ----------------------------------------------------------------------------------------------------

    def check_journal(self, contents: Contents, path: Path) -> None:
        """Refuse the journal of another run."""
        lines = self._differing(contents.header.get("settings", {}))
        frozen, known = str(self.frozen_fingerprint()), str(contents.header.get("frozen"))
        # journals of earlier versions have the first half alone
        if known not in (frozen, frozen.split()[0]):  # the first half alone in journals of before there was a second
            lines.append(f"  model: {contents.header.get('model')} there, {self.model_name} now")
        _refuse_differing(lines, path)

    def check_checkpoint(self, checkpoint: Path) -> None:
        """Refuse the checkpoint of another run, by its manifest: without a journal, that says what must be the same."""
        known = snapshot.verify(checkpoint).get("settings")
        _refuse_differing(self._differing(known) if known else [], checkpoint)

    def check_base(self, contents: Contents, path: Path) -> None:
        """Without a checkpoint the steps are replayed onto the model as it is: the one they began with."""
        known = contents.header["weights"]
        if known is not None and self.weights_digest() not in (None, known):
            raise UserError(
                f"{path} does not belong to this model: its trained weights differ from those that the run began with; "
                "load the base model anew"
            )

    def _differing(self, known: Mapping[str, Any]) -> list[str]:
        """A line for every setting that is not what it was; rows for evaluation may come and go, but not change."""
        before, now = dict(known), self.settings()
        # rows for evaluation may be added or left out later; where both have them they must be equal
        for name in [key for key in {**before, **now} if key.endswith("_data")]:
            if before.get(name) is None or now.get(name) is None:
                before.pop(name, None)
                now.pop(name, None)
        if "SHA-256" not in str(before.get("data")):  # a journal of before every row was hashed
            now["data"] = some_rows_digest(self.trainer.train_dataset)
        # what is on one side only differs too
        differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return [f"  {key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in differing]


def _refuse_differing(lines: list[str], path: Path) -> None:
    if lines:
        raise UserError(
            f"{path} belongs to another run; it differs in\n" + "\n".join(lines) + "\n"
            "give the same, or another output_dir for a new run"
        )


def _sum_of_bits(tensor: torch.Tensor) -> int:
    """The tensor's bits as integers, added up: one that was changed shows, at the price of reading them."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    # eight bytes at a time; the rest by itself
    words = len(flat) // 8 * 8
    return int(flat[:words].view(torch.int64).sum()) + int(flat[words:].sum())


def _short(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:16]
