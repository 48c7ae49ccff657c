"""The result of a search, and the record of its steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StepRecord:
    """One step of a search.

    Args:
        step: its number, from 0.
        num_queries: calls of f up to its end.
        loss: f as the step's queries say it (at x, or the mean over points around it); NaN where a query failed.
        best: the lowest value seen so far.
        learning_rate: multiple of the estimate by which x moved; 0 where the step was not taken.
        eps: the finite-difference radius.
        length: how far x moved, in units of scale.
    """

    step: int
    num_queries: int
    loss: float
    best: float
    learning_rate: float
    eps: float
    length: float


@dataclass(frozen=True)
class Failure:
    """A query that gave no finite number.

    Args:
        query: its number, from 0.
        x: the point.
        error: what f raised, or what was wrong with what it returned.
    """

    query: int
    x: Any
    error: BaseException

    def __str__(self) -> str:
        said = f"{type(self.error).__name__}: {self.error}".strip().rstrip(":")
        return f"query {self.query} at x = {' '.join(repr(self.x).split())[:200]}: {said}"


@dataclass
class Result:
    """Where a search ended, in SciPy's names.

    Args:
        x: the best point seen, of the form of x0; of a noisy f, where the search stood at its end.
        fun: f there; of a noisy f, the mean of the calls that were left for it.
        num_queries: calls of f.
        num_steps: steps that were begun.
        num_failed: calls that raised, or gave no finite number.
        failures: the first of them, with their points.
        history: a record of every step.
        success: whether the search ended as it should: not because f failed, and not by an interrupt.
        status: ``budget``, ``target``, ``converged``, ``callback``, ``interrupted``, ``failed`` or ``running``.
        message: one sentence about it.
        noisy: whether f was taken to be noisy.
    """

    x: Any
    fun: float
    num_queries: int = 0
    num_steps: int = 0
    num_failed: int = 0
    failures: list[Failure] = field(default_factory=list)
    history: list[StepRecord] = field(default_factory=list)
    success: bool = True
    status: str = "running"
    message: str = ""
    noisy: bool = False

    def __str__(self) -> str:
        return f"{self.message} fun = {self.fun:.6g} after {self.num_queries} queries in {self.num_steps} steps."
