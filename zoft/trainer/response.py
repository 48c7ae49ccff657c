"""Whether node directions know the response without probes: tried with two rows, before anything is planned."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch

from zoft.engines.nodes import NodeSession
from zoft.errors import UserError, refuse_ignored
from zoft.estimators.nodes import Nodes
from zoft.optimizers.whiten import unread_bound
from zoft.step.method import Method
from zoft.step.parts import passes_down
from zoft.trainer.batch import StepBatch
from zoft.trainer.readout import TrainerReader
from zoft.weights.tensors import Weights

log = logging.getLogger(__name__)
_TRIED = 32  # rows, until two are found whose labels count


def settle_response(trainer: Any) -> None:
    """Make ``estimator.response=auto`` identity or learnt; the steps are those that the budget pays for then.

    Args:
        trainer: with model and rows; ``method`` and ``args.max_steps`` are changed.

    Raises:
        UserError: identity is asked for and does not hold, or a bound is set that no step reads.
    """
    if unread := unread_bound(trainer.method):
        refuse_ignored(unread)
    _settle(trainer)
    if unread := unread_bound(trainer.method):  # not known before: a run of an earlier version may have it
        log.warning("%s", unread)


def _settle(trainer: Any) -> None:
    method, estimator = trainer.method, trainer.method.estimator
    if (
        not isinstance(estimator, Nodes)
        or estimator.response == "learnt"
        or estimator.feedback not in ("auto", "hidden")
    ):
        return
    asked = estimator.response
    # settings of probes, or processes that divide them: a learnt response is what is wanted
    wants_probes = estimator.of_probes() or method.subspace.of_probes() or trainer.grid.directions.count > 1
    if asked == "auto" and wants_probes:
        return _take(trainer, method, "learnt")
    _take(trainer, method, "identity")
    try:
        why = "" if _holds(trainer) else "blocks do not add what is trained to the last hidden state as it is"
    except UserError as error:
        why = str(error)
    if why and asked == "identity":
        raise UserError(f"estimator.response=identity: {why}: use estimator.response=learnt")
    if why:
        log.info("node directions learn the response from probes: %s", why)
        _take(trainer, method, "learnt")


def _take(trainer: Any, method: Method, response: str) -> None:
    """The method with this response, and as many steps as cost what was planned."""
    estimator = method.estimator
    assert isinstance(estimator, Nodes)
    args, settled = trainer.args, replace(method, estimator=replace(estimator, response=response))
    if args.max_steps > 0 and getattr(args, "budget_queries", None):
        planned = sum(trainer.method.queries_at(step) for step in range(args.max_steps))
        args.max_steps = settled.steps_within(planned)
    trainer.method = settled


def _holds(trainer: Any) -> bool:
    try:
        rows = [trainer.train_dataset[number] for number in range(min(_TRIED, len(trainer.train_dataset)))]
        batches = [StepBatch([trainer.collated(rows[at : at + 2])]) for at in range(0, len(rows), 2)]
    except (TypeError, KeyError, IndexError, ValueError, NotImplementedError):
        return False  # a stream, no rows, or rows that are not of this collator
    weights = Weights(trainer.model)
    space = trainer.method.bind(weights)
    session = trainer.engine.choose(trainer.method.estimator, space, trainer.model).bind(
        trainer.model, space, trainer.step_loss.of
    )
    if not isinstance(session, NodeSession):
        return False
    was_training = trainer.model.training
    trainer.model.eval()
    try:
        with torch.no_grad():
            reader = TrainerReader(trainer)
            verdicts = (passes_down(session, reader, batch) for batch in batches)
            return next((verdict for verdict in verdicts if verdict is not None), False)
    finally:
        trainer.model.train(was_training)
