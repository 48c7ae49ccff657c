"""The processes of a run: how they exchange values, and which settings do not work with several."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoft.errors import UserError
from zoft.trainer.ranks import gather, share_weights


@dataclass
class Processes:
    """The processes that torchrun has started, or some of them, or the one that there is.

    Args:
        count: how many there are.
        rank: number of this one among them.
        device: of this one.
        group: of some of them, as torch.distributed has it; None for all.
        bytes_sent: of this one's numbers that the others were given so far.

    Example:
        >>> Processes(1, 0, torch.device("cpu")).gather("mine")
        ['mine']
    """

    count: int
    rank: int
    device: torch.device
    group: Any = None
    bytes_sent: int = 0

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank; tensors may differ in size."""
        if self.count == 1:
            return [value]
        self.bytes_sent += value.nbytes if isinstance(value, Tensor) else len(pickle.dumps(value))
        return gather(value, self.group)

    def gather_alike(self, numbers: Tensor) -> list[Tensor]:
        """A tensor of this process and those of the others, by rank, all of one shape and dtype; one all-gather."""
        sent = numbers.to(self.device).contiguous()
        values = [torch.empty_like(sent) for _ in range(self.count)]
        torch.distributed.all_gather(values, sent, group=self.group)
        self.bytes_sent += sent.nbytes
        return [value.to(numbers.device) for value in values]

    def agree(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def sum(self, numbers: Tensor) -> Tensor:
        """Numbers of all processes added up, float64 on the CPU; one all-reduce."""
        if self.count == 1:
            return numbers.double()
        total = numbers.to(self.device, torch.float64, copy=True)
        torch.distributed.all_reduce(total, group=self.group)
        self.bytes_sent += total.nbytes
        return total.cpu()

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.count > 1:
            torch.distributed.barrier()

    def share_weights(self, model: nn.Module) -> None:
        """Every process starts from the weights of the first one; DDP, which would do this, is not used."""
        if self.count > 1:
            share_weights(model)


def check_processes(args: Any, num_processes: int, *, shards: bool) -> None:
    """Refuse processes that could not train together.

    Args:
        args: of the Trainer.
        num_processes: those that accelerate knows of.
        shards: whether DeepSpeed or FSDP was asked for.

    Raises:
        UserError: with what to do instead.
    """
    if shards:
        raise UserError("DeepSpeed and FSDP shard gradients, and there are none: start the run with plain torchrun")
    if args.n_gpu > 1:
        raise UserError(
            "one process sees several GPUs: set CUDA_VISIBLE_DEVICES, or start one process a GPU with torchrun"
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != num_processes:
        raise UserError(
            f"torchrun started {started} processes, the arguments know of {num_processes}: "
            "give use_cpu=True where there is no accelerator, and make the arguments after torchrun has started"
        )
    if args.guard == "rollback" and started > 1:
        raise UserError("guard=rollback goes back in one process: start the run without torchrun, or use guard=clip")
