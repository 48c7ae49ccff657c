"""The grid of a run's processes: those of one column divide a step's rows, those of one row its points or the model."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from zoft.engines._optional import LeavesTrace
from zoft.engines._stage import Stage
from zoft.engines.base import Session
from zoft.errors import UserError
from zoft.estimators.base import Estimator
from zoft.step.shares import Shares, grid_of
from zoft.trainer.batch import StepBatch
from zoft.trainer.processes import Processes
from zoft.weights.tensors import bits_of


class Grid:
    """Process number r * D + d of R * D has the r-th part of a step's rows and asks the d-th part of its points.

    Args:
        world: all processes.
        directions: D, how many divide a step's points; 1 where all divide its rows.
        is_pipeline: whether these D divide the model instead.

    Attributes:
        rows: the R processes that ask this one's points of other rows.
        directions: the D processes that have this one's rows.
        stage: of this process, in a pipeline, once it is taken.
        traffic: ``bytes_sent``, of this process's numbers in the last step that was asked; empty in one process.
    """

    def __init__(self, world: Processes, directions: int = 1, *, is_pipeline: bool = False) -> None:
        self.world = world
        self.is_pipeline = is_pipeline
        self.stage: Stage | None = None
        alone = Processes(1, 0, world.device)
        self.rows, self.directions = world, alone
        if directions == world.count > 1:
            self.rows, self.directions = alone, world
        elif directions > 1:
            shape, names = (world.count // directions, directions), ("rows", "directions")
            mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
            self.rows, self.directions = (
                Processes(mesh[name].size(), mesh[name].get_local_rank(), world.device, mesh[name].get_group())
                for name in names
            )
        self.traffic: dict[str, int] = {}
        self._rows_sum = 0.0  # of the step at hand

    @classmethod
    def of(cls, args: Any, world: Processes, estimator: Estimator) -> Grid:
        """As the arguments ask for it."""
        directions = grid_of(args.parallel, args.parallel_directions, world.count, estimator)[1]
        return cls(world, directions, is_pipeline=args.parallel == "pipeline" and world.count > 1)

    def _bytes_sent(self) -> int:
        """Bytes that this process has sent to the others so far."""
        return self.rows.bytes_sent + self.directions.bytes_sent + (0 if self.stage is None else self.stage.bytes_sent)

    def shares(self) -> Shares:
        """Which of a step's points this process asks; in a pipeline all of them, with its part of the model."""
        return Shares() if self.is_pipeline else Shares(self.directions.count, self.directions.rank, self.gather)

    @contextmanager
    def asking(self, batch: StepBatch) -> Iterator[None]:
        """In here the answers of several processes are about these rows: they are compared when they come together."""
        self._rows_sum = float(_checksum(batch)) if self.directions.count > 1 else 0.0
        before = self._bytes_sent()
        yield
        self.traffic = {"bytes_sent": self._bytes_sent() - before}

    def holds(self, is_so: bool) -> bool:
        """Whether something is so here, and in every other process of a pipeline: all come here."""
        return is_so if not self.is_pipeline else all(map(bool, self.gather(torch.tensor(float(is_so)).double())))

    def gather(self, answers: Tensor) -> list[Tensor]:
        """One all-gather of the answers and of the rows' checksum behind them."""
        gathered = self.directions.gather_alike(torch.cat((answers.flatten(), answers.new_tensor([self._rows_sum]))))
        if any(float(one[-1]) != self._rows_sum for one in gathered):
            raise UserError(
                "processes that share a step's points (trainer.parallel) were given other rows: the collator draws "
                "random numbers, or the rows change while they are read; use trainer.parallel=data"
            )
        return [one[:-1].view_as(answers) for one in gathered]

    def divide(self, loader: Any, is_training: bool) -> Any:
        """The Trainer's loader of rows, whose batches are divided by :attr:`rows` alone, in a pipeline always.

        Raises:
            UserError: rows without a known number, which every process would draw for itself.
        """
        if self.directions.count == 1 or not (is_training or self.is_pipeline):
            return loader
        shard = getattr(loader, "batch_sampler", None)
        if not isinstance(shard, BatchSamplerShard):
            raise UserError(
                "trainer.parallel gives several processes the same rows, and a stream (IterableDataset) may give each "
                "of them others: give rows whose number is known, or use trainer.parallel=data"
            )
        shard.num_processes, shard.process_index = self.rows.count, self.rows.rank
        if self.rows.count == 1:
            shard.even_batches = False  # a pass ends as it does in one process
        return loader

    def refuse_traces(self, session: Session) -> None:
        """Queries that leave a trace in the weights would leave another one in every process.

        Raises:
            UserError: with what to do instead.
        """
        if self.directions.count > 1 and isinstance(session, LeavesTrace):
            raise UserError(
                "trainer.parallel=directions: MeZO's own arithmetic (estimator.noise=torch_sequential, or "
                "engine.restore=subtract) leaves another trace in the weights of each process: use "
                "estimator.noise=counter, engine.restore=copy, or trainer.parallel=data"
            )


def _checksum(batch: StepBatch) -> int:
    """CRC-32 of all tensors of the micro-batches."""
    checksum = 0
    for inputs in batch.micro_batches:
        for value in inputs.values():
            if isinstance(value, Tensor):
                checksum = zlib.crc32(bits_of(value), checksum)
    return checksum
